"""
LoRA files for programs outside diffusers. ComfyUI, A1111, Forge and older versions of diffusers do not know the
metadata in which diffusers keeps a LoRA's alpha; they look for `.alpha` tensors, and without them apply it at another
strength.
"""

import re
from pathlib import Path

import torch
from safetensors.torch import save_file

from .paired_denoiser import PairedDenoiser


EXPORT_FORMATS = ("diffusers", "kohya")
KOHYA_FILE = "kohya_lora_weights.safetensors"

# FLUX in the layout of its authors, where projections of one input are one matrix: pattern of its modules in diffusers
# -> name, and the modules whose outputs are stacked in it, with the multiples of the hidden size that each has.
_FLUX_MODULES = {
    r"transformer_blocks\.(\d+)": {
        "double_blocks_{}_img_attn_qkv": (("attn.to_q", 1), ("attn.to_k", 1), ("attn.to_v", 1)),
        "double_blocks_{}_txt_attn_qkv": (("attn.add_q_proj", 1), ("attn.add_k_proj", 1), ("attn.add_v_proj", 1)),
        "double_blocks_{}_img_attn_proj": (("attn.to_out.0", 1),),
        "double_blocks_{}_txt_attn_proj": (("attn.to_add_out", 1),),
        "double_blocks_{}_img_mlp_0": (("ff.net.0.proj", 4),),
        "double_blocks_{}_img_mlp_2": (("ff.net.2", 1),),
        "double_blocks_{}_txt_mlp_0": (("ff_context.net.0.proj", 4),),
        "double_blocks_{}_txt_mlp_2": (("ff_context.net.2", 1),),
        "double_blocks_{}_img_mod_lin": (("norm1.linear", 6),),
        "double_blocks_{}_txt_mod_lin": (("norm1_context.linear", 6),),
    },
    r"single_transformer_blocks\.(\d+)": {
        "single_blocks_{}_linear1": (("attn.to_q", 1), ("attn.to_k", 1), ("attn.to_v", 1), ("proj_mlp", 4)),
        "single_blocks_{}_linear2": (("proj_out", 1),),
        "single_blocks_{}_modulation_lin": (("norm.linear", 3),),
    },
}


def check_export_format(model: PairedDenoiser, export_format: str) -> None:
    """Raises `ValueError` if the trained weights cannot be written in `export_format`."""
    if export_format == "diffusers":
        return
    if model.adapter_name is None:
        raise ValueError(
            f"`export_format={export_format!r}` is for LoRAs, and no LoRA is trained. Leave it at its default "
            "('diffusers')."
        )
    kind, family = type(model.denoiser).__name__, model.family
    if family.denoiser_name != "unet" and kind != "FluxTransformer2DModel":
        raise ValueError(
            f"`export_format='kohya'` is known for UNets and FLUX.1, not for a `{kind}`. Leave it at its default "
            "('diffusers'), and set `lora_alpha` to the LoRA's rank: then every reader applies it at the right "
            "strength."
        )
    if model.denoiser.peft_config[model.adapter_name].lora_bias:
        raise ValueError(
            "`export_format='kohya'` has no place for `lora_bias=True` of the `LoraConfig`. Leave one of them out."
        )
    modules = _lora_modules(model)
    if kind == "FluxTransformer2DModel":
        _flux_tensors(modules)


def export_kohya(model: PairedDenoiser, folder) -> Path:
    """
    Writes the LoRA into `folder` with the names of kohya's sd-scripts and an alpha tensor for each module, which
    ComfyUI, A1111, Forge and diffusers read.
    """
    modules = _lora_modules(model)
    is_flux = type(model.denoiser).__name__ == "FluxTransformer2DModel"
    tensors = _flux_tensors(modules) if is_flux else _unet_tensors(modules)
    path = Path(folder) / KOHYA_FILE
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata={"format": "pt"})
    return path


def _lora_modules(model: PairedDenoiser) -> dict[str, dict[str, torch.Tensor]]:
    """
    Name of a module -> its factors `down` and `up`, the scale of their product, and DoRA's magnitude where it has one.
    """
    adapter, modules = model.adapter_name, {}
    for name, module in model.denoiser.named_modules():
        if adapter not in getattr(module, "lora_A", {}):
            continue
        modules[name] = {
            "down": module.lora_A[adapter].weight.detach().cpu(),
            "up": module.lora_B[adapter].weight.detach().cpu(),
            "scale": module.scaling[adapter],
            "out_features": module.out_features,
        }
        if adapter in module.lora_magnitude_vector:
            modules[name]["magnitude"] = module.lora_magnitude_vector[adapter].weight.detach().cpu()
    return modules


def _factors(name: str, down: torch.Tensor, up: torch.Tensor, scale: float) -> dict[str, torch.Tensor]:
    # A reader multiplies the product by alpha / rank.
    return {
        f"{name}.lora_down.weight": down,
        f"{name}.lora_up.weight": up,
        f"{name}.alpha": torch.tensor(float(scale * len(down))),
    }


def _unet_tensors(modules: dict) -> dict[str, torch.Tensor]:
    tensors = {}
    for name, module in modules.items():
        name = f"lora_unet_{name.replace('.', '_')}"
        tensors.update(_factors(name, module["down"], module["up"], module["scale"]))
        if "magnitude" in module:
            magnitude = module["magnitude"]
            tensors[f"{name}.dora_scale"] = magnitude if magnitude.dim() > 1 else magnitude[:, None]
    return tensors


def _flux_tensors(modules: dict) -> dict[str, torch.Tensor]:
    tensors, left = {}, dict(modules)
    hidden = next((m["out_features"] for n, m in modules.items() if n.endswith(("to_q", "to_k", "to_v"))), 0)
    for pattern, groups in _FLUX_MODULES.items():
        numbers = {match[1] for name in modules if (match := re.match(pattern + r"\.", name))}
        for number in sorted(numbers, key=int):
            prefix = re.sub(r"\\|\(d\+\)", "", pattern.replace(r"(\d+)", number)) + "."
            for target, parts in groups.items():
                present = [prefix + part for part, _ in parts if prefix + part in modules]
                if not present:
                    continue
                chosen = [left.pop(name) for name in present]
                scale = chosen[0]["scale"]
                sizes = {prefix + part: multiple for part, multiple in parts}
                if len(present) < len(parts) and not hidden:
                    raise ValueError(
                        f"`export_format='kohya'`: the size of what `{present[0]}` is stacked with is not known."
                    )
                # Block-diagonal: what the factors of one projection see, the others do not.
                rank, rows, column = sum(len(module["down"]) for module in chosen), [], 0
                for part in sizes:
                    module = modules.get(part)
                    if module is None:
                        rows.append(torch.zeros(sizes[part] * hidden, rank))
                        continue
                    row = torch.zeros(len(module["up"]), rank)
                    width = len(module["down"])
                    row[:, column : column + width] = module["up"] * (module["scale"] / scale)
                    rows.append(row)
                    column += width
                down = torch.cat([module["down"] for module in chosen])
                tensors.update(_factors("lora_unet_" + target.format(number), down, torch.cat(rows), scale))
    left.update({name: module for name, module in modules.items() if "magnitude" in module})
    if left:
        raise ValueError(
            f"`export_format='kohya'`: {len(left)} modules of the LoRA, such as `{next(iter(left))}`, have no place "
            "in FLUX's layout (the attention's projections and the feed-forward layers have, without DoRA). Choose "
            "other `target_modules`, or leave `export_format` at its default ('diffusers')."
        )
    return tensors
