"""
Fingerprints, the keys of caches: hashes of everything that the outputs of a frozen model depend on.

Caches on disk are found again by these hashes, so what is hashed, and in which order, must not change.
"""

import contextlib
import hashlib
import itertools
import json
from collections.abc import Iterable, Iterator

import torch
import xxhash
from accelerate.utils import broadcast_object_list, is_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer

from .._trl import maybe_gather_lm_head_ctx
from .sharding import whole


# Part of every fingerprint and shard: raise it when the same inputs would give other numbers or another layout.
FORMAT = b"trl_ext reference statistics 2"

# Entries of a model's configuration that say where it came from or how it is used, not what it computes.
_NOT_THE_MODEL = {"_name_or_path", "transformers_version", "architectures", "use_cache"}
_NOT_THE_MODEL |= {"pad_token_id", "bos_token_id", "eos_token_id"}
_NOT_THE_MODEL |= {"dtype", "torch_dtype"}  # the weights' own counts
_NOT_THE_ADAPTER = {
    "base_model_name_or_path",
    "revision",
    "inference_mode",
    "task_type",
    "auto_mapping",
    "peft_version",
}


# ---- References -----------------------------------------------------------------------------------------------------


def reference_fingerprint(model, adapter: str | None, precision: tuple, accelerator) -> str:
    """
    Hash of everything about a reference that its statistics depend on.

    Every process must call it: weights that are sharded (DeepSpeed ZeRO-3, distributed tensors) are gathered one at a
    time. The main process hashes, the others are told.

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            The reference, or the policy whose adapter is switched off or replaced to make it one.
        adapter (`str`, *optional*):
            Name of the adapter that is active in the reference. Without one, a model with adapters has the fingerprint
            of its base.
        precision (`tuple`):
            Other settings that determine the precision of the forward (autocast).
        accelerator ([`~accelerate.Accelerator`]):
            The trainer's accelerator.

    Returns:
        `str`: 32 hexadecimal digits.

    Raises:
        `ValueError`: If weights are not in memory.
    """
    base = model.get_base_model() if is_peft_model(model) else model
    described = [type(base).__name__, _plain(base.config.to_dict(), _NOT_THE_MODEL), precision]
    if adapter is not None:
        described.append(_plain(model.peft_config[adapter].to_dict(), _NOT_THE_ADAPTER))
    digest = xxhash.xxh3_128(FORMAT)
    digest.update(json.dumps(described, sort_keys=True, default=str).encode())
    state = sorted(reference_state(model, adapter), key=lambda item: item[0])
    absent = _add_state(digest, state, ties=True, hashes=accelerator.is_main_process)
    fingerprint, absent = broadcast_object_list([digest.hexdigest(), absent])
    if absent is not None:
        raise ValueError(
            f"The reference's weight `{absent}` is not in memory (device 'meta'), so the cache of "
            "`precompute_ref_log_probs` cannot tell this reference from another. Load the reference without "
            "offloading to disk, or set `precompute_ref_log_probs=False`."
        )
    return fingerprint


def _plain(config: dict, without: set[str]) -> dict:
    """A configuration in canonical form, without some entries at any depth."""

    def plain(value):
        if isinstance(value, dict):
            return {str(key): plain(item) for key, item in value.items() if key not in without}
        if isinstance(value, set | frozenset):
            return sorted(map(str, value))
        return [plain(item) for item in value] if isinstance(value, list | tuple) else value

    return plain(config)


def reference_state(model, adapter: str | None) -> Iterator[tuple[str, torch.Tensor]]:
    """Weights and buffers that the reference's forward may read, under the names they have without an adapter."""
    state = model.state_dict(keep_vars=True)
    if not is_peft_model(model):
        yield from state.items()
        return
    base = model.get_base_model()
    prefix = next(name for name, module in model.named_modules() if module is base) + "."
    attributes = {"modules_to_save", "prompt_encoder"}
    for module in model.modules():
        if isinstance(module, BaseTunerLayer):
            attributes.update(module.adapter_layer_names, module.other_param_names)
    for name, tensor in state.items():
        parts = name.split(".")
        # Only what is certainly another adapter's is left out: too much in the hash costs time, too little is wrong.
        owners = [b for a, b in itertools.pairwise(parts) if a in attributes and b in model.peft_config]
        if owners:
            if owners[0] == adapter:
                parts.remove(adapter)
                yield "adapter." + ".".join(parts), tensor
        else:
            plain = [
                part for part in name.removeprefix(prefix).split(".") if part not in ("base_layer", "original_module")
            ]
            yield ".".join(plain), tensor


def _add_state(digest, state: Iterable[tuple[str, torch.Tensor]], ties: bool, hashes: bool = True) -> str | None:
    """
    Adds named tensors to a digest: name, type, shape and bytes of each. Sharded ones are gathered one at a time.

    Args:
        digest:
            A hash object.
        state (iterable of `tuple[str, torch.Tensor]`):
            Names and tensors.
        ties (`bool`):
            Whether the bytes of a tensor with two names are added once, with its first name.
        hashes (`bool`, *optional*, defaults to `True`):
            Whether this process adds anything. It helps to gather in any case.

    Returns:
        `str`: Name of a tensor that is not in memory, `None` if all are.
    """
    names: dict[int, str] = {}
    absent = None
    for name, tensor in state:
        first = names.setdefault(id(tensor), name) if ties else name  # tied embeddings are one tensor with two names
        with maybe_gather_lm_head_ctx(tensor) if hasattr(tensor, "ds_status") else contextlib.nullcontext():
            gathered = whole(tensor)
            if not hashes:
                continue
            header = f"{name} {gathered.dtype} {tuple(gathered.shape)} "
            digest.update((f"{header}{first}\n" if ties else header).encode())
            if gathered.is_meta:
                absent = absent or name
            elif first == name:
                digest.update(gathered.detach().contiguous().cpu().reshape(-1).view(torch.uint8).numpy().data)
    return absent


# ---- Encoders -------------------------------------------------------------------------------------------------------


def fingerprint(*components) -> str:
    """
    Returns a hash of what the output of frozen encoders depends on: classes, configurations, weights (values and
    types), and the vocabulary and maximum length of tokenizers. [`describe_tokenizer`] has the rest of a tokenizer.

    Args:
        components:
            Modules, tokenizers, and strings or numbers for anything else. `None`, for a text encoder that the pipeline
            does not have, changes the hash as well.

    Raises:
        `ValueError`: If weights are not in memory.
    """
    digest = hashlib.sha256()
    for component in components:
        digest.update(f"\n{type(component).__name__}\n".encode())
        if isinstance(component, torch.nn.Module):
            config = getattr(component, "config", {})
            config = dict(config.to_dict() if hasattr(config, "to_dict") else config)
            # Source and library versions do not change what a module computes.
            described = {k: v for k, v in sorted(config.items()) if not k.startswith("_") and "version" not in k}
            digest.update(json.dumps(described, sort_keys=True, default=str).encode())
            state = [(k, v) for k, v in sorted(component.state_dict().items()) if isinstance(v, torch.Tensor)]
            absent = _add_state(digest, state, ties=False)
            if absent is not None:
                raise ValueError(
                    f"The weight `{absent}` of the `{type(component).__name__}` is not in memory (device 'meta'), so "
                    "a cache cannot tell this model from another. Load it without offloading."
                )
        elif hasattr(component, "get_vocab"):
            digest.update(json.dumps(component.get_vocab(), sort_keys=True).encode())
            digest.update(str(component.model_max_length).encode())
        else:
            digest.update(repr(component).encode())
    return digest.hexdigest()


def describe_tokenizer(tokenizer) -> str:
    """Describes what else a tokenizer's output depends on: merges, normalization, special tokens, padding side."""
    if tokenizer is None:
        return ""
    described = {"special": tokenizer.special_tokens_map, "side": [tokenizer.padding_side, tokenizer.truncation_side]}
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        # `padding` and `truncation` are those of the last call.
        described["backend"] = {
            k: v for k, v in json.loads(backend.to_str()).items() if k not in ("padding", "truncation")
        }
    else:
        described["options"] = {k: v for k, v in tokenizer.init_kwargs.items() if not k.endswith(("path", "file"))}
    return json.dumps(described, sort_keys=True, default=str)


def make_key(*parts) -> bytes:
    """Returns the SHA-256 of a list of strings, numbers and bytes. Different lists have different encodings."""
    digest = hashlib.sha256()
    for part in parts:
        encoded = part if isinstance(part, bytes) else repr(part).encode()
        digest.update(f"{type(part).__name__} {len(encoded)} ".encode() + encoded)
    return digest.digest()
