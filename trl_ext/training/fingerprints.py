"""Fingerprints of models: a hash of everything that a frozen model's outputs depend on, as the key of a cache."""

import contextlib
import itertools
import json
from collections.abc import Iterator

import numpy as np
import torch
import xxhash
from accelerate.utils import broadcast_object_list, is_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch.distributed.tensor import DTensor

from .._trl import maybe_gather_lm_head_ctx


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
    names, absent = {}, None
    state = sorted(reference_state(model, adapter), key=lambda item: item[0])
    for name, tensor in state:
        first = names.setdefault(id(tensor), name)  # tied embeddings are one tensor with two names
        with maybe_gather_lm_head_ctx(tensor) if hasattr(tensor, "ds_status") else contextlib.nullcontext():
            whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
            if accelerator.is_main_process:
                digest.update(f"{name} {whole.dtype} {tuple(whole.shape)} {first}\n".encode())
                if whole.is_meta:
                    absent = absent or name
                elif first == name:
                    digest.update(_bytes(whole))
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


def _bytes(tensor: torch.Tensor) -> np.ndarray:
    return tensor.detach().contiguous().cpu().reshape(-1).view(torch.uint8).numpy()
