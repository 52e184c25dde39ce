"""Writes and reads the trained weights: a LoRA in diffusers' format, or a whole denoiser."""

import contextlib
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch.distributed.fsdp import FSDPModule

from ..training.adapters import REFERENCE_ADAPTER
from ..training.sharding import sharded_like
from .paired_denoiser import PairedDenoiser


LORA_FILE = "pytorch_lora_weights.safetensors"
BASE_FILE = "base_model.json"
EMA_FILE = "ema.safetensors"


def trained_parameters(model: PairedDenoiser) -> dict[str, torch.nn.Parameter]:
    """Returns the trained parameters by name."""
    # Selected by name, as adapters lose `requires_grad` while they are switched off.
    if model.adapter_name is None:
        return dict(model.denoiser.named_parameters())
    part = f".{model.adapter_name}."
    return {name: p for name, p in model.denoiser.named_parameters() if "lora_" in name and part in f".{name}."}


def describe_base(model: PairedDenoiser) -> dict:
    """
    Describes the base that an adapter belongs to, or that full fine-tuning started from: its class, its source, and a
    hash of its configuration and of some weights of every tensor.
    """
    base = model.denoiser if model.reference is None else model.reference
    config = {k: v for k, v in sorted(model.config.denoiser.items()) if not k.startswith("_")}
    config.pop("quantization_config", None)  # the weights hashed below depend on it
    digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
    for name, tensor in sorted(base.named_parameters()):
        if "lora_" in name and f".{REFERENCE_ADAPTER}." not in name:
            continue
        name = name.replace(".base_layer.", ".")
        sample = tensor.detach().reshape(-1)[:64].cpu().contiguous()
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(sample.view(torch.uint8).numpy().tobytes())
    return {
        "pipeline": type(model.family.pipeline).__name__,
        "denoiser": type(model.denoiser).__name__,
        "name_or_path": model.config.name_or_path,
        "fingerprint": digest.hexdigest(),
    }


@contextlib.contextmanager
def gathered_denoiser(model: PairedDenoiser, state: dict[str, torch.Tensor] | None) -> Iterator[Any]:
    """
    Context with a denoiser that can be saved, which is the pipeline's too: the model's own or, where it is sharded, one
    made of its whole `state`, as Accelerate gathers it in the main process.
    """
    family = model.family
    if state is None:
        yield model.denoiser
        return
    kind: Any = next(each for each in type(model.denoiser).__mro__ if not issubclass(each, FSDPModule))
    with torch.device("meta"):
        whole = kind.from_config(model.denoiser.config)
    whole.load_state_dict({name.removeprefix("denoiser."): tensor for name, tensor in state.items()}, assign=True)
    setattr(family.pipeline, family.denoiser_name, whole)
    try:
        yield whole
    finally:
        setattr(family.pipeline, family.denoiser_name, model.denoiser)


def save_weights(model: PairedDenoiser, folder, base: dict, state: dict[str, torch.Tensor] | None = None) -> None:
    """
    Writes the trained weights into `folder`: for an adapter `pytorch_lora_weights.safetensors`, which
    `pipe.load_lora_weights(folder)` reads, with the alpha in its metadata (without it a LoRA is loaded with a scale of
    1); otherwise the denoiser, as a component of a pipeline. `state` are the weights of a model that is sharded.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    component = model.family.denoiser_name
    if model.adapter_name is None:
        with gathered_denoiser(model, state) as denoiser:
            denoiser.save_pretrained(folder / component)
    else:
        from peft import get_peft_model_state_dict

        if state is not None:
            state = {name.removeprefix("denoiser."): tensor for name, tensor in state.items()}
        state = get_peft_model_state_dict(model.denoiser, state_dict=state, adapter_name=model.adapter_name)
        # Contiguous and on the CPU, as safetensors needs them.
        state = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
        metadata = model.denoiser.peft_config[model.adapter_name].to_dict()
        type(model.family.pipeline).save_lora_weights(
            folder,
            **{f"{component}_lora_layers": state, f"{component}_lora_adapter_metadata": _jsonable(metadata)},
        )
    (folder / BASE_FILE).write_text(json.dumps(base, indent=2) + "\n")


def load_weights(model: PairedDenoiser, folder, base: dict) -> None:
    """
    Reads the weights that [`save_weights`] wrote into the parameters that the optimizer holds.

    Raises:
        `FileNotFoundError`: If `folder` has no such file.
        `ValueError`: If they belong to another base, or to an adapter of another shape.
    """
    folder = Path(folder)
    component = model.family.denoiser_name
    expected = folder / (component if model.adapter_name is None else LORA_FILE)
    if not expected.exists():
        kind = "a full fine-tuning" if model.adapter_name is None else "a LoRA"
        raise FileNotFoundError(f"{folder} has no `{expected.name}`: it is no checkpoint of {kind} of this pipeline.")
    check_base(folder, base)
    if model.adapter_name is None:
        loaded = type(model.denoiser).from_pretrained(folder / component, dtype=torch.float32)
        own = model.denoiser.state_dict()
        model.denoiser.load_state_dict({n: sharded_like(t, own[n]) for n, t in loaded.state_dict().items()})
        return

    from peft import get_peft_model_state_dict, set_peft_model_state_dict

    state = {name.removeprefix(f"{component}."): tensor for name, tensor in load_file(expected).items()}
    own = get_peft_model_state_dict(model.denoiser, adapter_name=model.adapter_name)
    tensors, own = own, {name: tuple(tensor.shape) for name, tensor in own.items()}
    read = {name: tuple(tensor.shape) for name, tensor in state.items()}
    if own != read:
        different = sorted(set(own.items()) ^ set(read.items()))
        raise ValueError(
            f"The LoRA in {folder} is not of the trainer's rank and targets: {len(different)} tensors differ, such as "
            f"`{different[0][0]}` of shape {different[0][1]}. Give the `peft_config` that it was trained with."
        )
    state = {name: sharded_like(tensor, tensors[name]) for name, tensor in state.items()}
    # `load_lora_weights` would create and activate a second adapter, while the optimizer holds this one.
    set_peft_model_state_dict(model.denoiser, state, adapter_name=model.adapter_name)


def check_base(folder: Path, base: dict) -> None:
    """Raises `ValueError` if the checkpoint in `folder` was trained from another base than `base`."""
    path = folder / BASE_FILE
    if not path.is_file():
        return
    saved = json.loads(path.read_text())
    if saved["fingerprint"] != base["fingerprint"]:
        described = [
            f"{kind['denoiser']} of {kind['name_or_path'] or 'a pipeline built in memory'} "
            f"(fingerprint {kind['fingerprint'][:12]})"
            for kind in (saved, base)
        ]
        raise ValueError(
            f"The checkpoint {folder} was trained from another base: it is for the {described[0]}, the trainer has "
            f"the {described[1]}. Give the model, and the quantization, that the checkpoint was trained with."
        )


def save_ema(path, shadow: list[torch.Tensor], names: list[str], steps: int) -> None:
    """Writes an average of the weights and the number of its steps."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in zip(names, shadow, strict=True)}
    save_file(tensors, path, metadata={"format": "pt", "optimization_step": str(steps)})


def _jsonable(value):
    if isinstance(value, dict):
        return {key: _jsonable(item) for key, item in value.items()}
    if isinstance(value, (set, tuple, list)):
        return [_jsonable(item) for item in (sorted(value) if isinstance(value, set) else value)]
    return getattr(value, "value", value) if not isinstance(value, (str, int, float, bool, type(None))) else value
