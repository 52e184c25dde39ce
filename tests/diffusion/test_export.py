"""LoRA files for other programs: read back by readers that know the layout and nothing of ours."""

import json

import diffusion_harness as harness
import numpy as np
import pytest
import tiny_pipelines
import torch
from diffusion_harness import lora, pixels, trainer
from safetensors import safe_open
from safetensors.torch import load_file


KOHYA = "kohya_lora_weights.safetensors"


def trained(name, folder, **given):
    run = trainer(name, folder, max_steps=2, learning_rate=3e-3, export_format="kohya", **given)
    run.train()
    run.save_model()
    return run


def apply_to_unet(pipeline, file) -> None:
    """What A1111 and ComfyUI do: the module's name with underscores, W + alpha / rank * up @ down."""
    modules = {"lora_unet_" + name.replace(".", "_"): module for name, module in pipeline.unet.named_modules()}
    state = load_file(file)
    for name in {key.split(".")[0] for key in state}:
        down, up, alpha = (state.pop(f"{name}.{part}") for part in ("lora_down.weight", "lora_up.weight", "alpha"))
        weight = modules[name].weight
        delta = (up.flatten(1) @ down.flatten(1)).view(weight.shape) if up.shape[2:] in ((), (1, 1)) else None
        with torch.no_grad():
            weight += alpha / len(down) * delta
    assert not state


@pytest.mark.parametrize("name", ["sd", "sdxl"])
@pytest.mark.parametrize(
    "given", [dict(r=4, lora_alpha=16), dict(r=4, lora_alpha=16, use_rslora=True)], ids=["alpha", "rslora"]
)
def test_unet(name, given, tmp_path):
    run = trained(name, tmp_path, peft_config=lora(**given))
    expected = pixels(run.family.pipeline)
    merged = tiny_pipelines.pipeline(name)
    assert np.abs(pixels(merged) - expected).max() > 1
    apply_to_unet(merged, tmp_path / KOHYA)
    assert np.abs(pixels(merged) - expected).max() <= 1
    loaded = tiny_pipelines.pipeline(name)
    loaded.load_lora_weights(str(tmp_path), weight_name=KOHYA)
    assert np.abs(pixels(loaded) - expected).max() <= 1
    # Beside it there is the file in diffusers' own layout, which a folder's reader picks.
    plain = tiny_pipelines.pipeline(name)
    plain.load_lora_weights(str(tmp_path))
    assert np.abs(pixels(plain) - expected).max() == 0


def test_unet_with_convolutions_and_ranks_of_their_own(tmp_path):
    config = lora(
        r=4,
        lora_alpha=8,
        target_modules=["to_q", "to_v", "conv1"],
        rank_pattern={"to_v": 2},
        alpha_pattern={"to_q": 12},
    )
    run = trained("sd", tmp_path, peft_config=config)
    expected = pixels(run.family.pipeline)
    state = load_file(tmp_path / KOHYA)
    assert {int(state[key]) for key in state if key.endswith("to_q.alpha")} == {12}
    loaded = tiny_pipelines.pipeline("sd")
    loaded.load_lora_weights(str(tmp_path), weight_name=KOHYA)
    assert np.abs(pixels(loaded) - expected).max() <= 1


@pytest.mark.parametrize("name", ["sd", "sd3", "flux", "flux2", "qwen"])
@pytest.mark.parametrize("is_rslora", [False, True], ids=["alpha", "rslora"])
def test_diffusers_layout(name, is_rslora, tmp_path):
    """
    The file in diffusers' own layout, by a reader of our own: W + scale * B @ A of the module whose name the keys have,
    with the scale from the alpha in the file's metadata. Its picture is the trained one's.
    """
    run = harness.trainer(name, tmp_path, peft_config=lora(r=4, lora_alpha=16, use_rslora=is_rslora))
    with torch.no_grad():
        for part, parameter in run.policy.named_parameters():
            if "lora_B" in part:  # further from 0 than a short training comes
                parameter.normal_(0, 0.3, generator=torch.Generator().manual_seed(len(part)))
    run.save_model()
    expected = pixels(run.family.pipeline)
    with safe_open(tmp_path / "pytorch_lora_weights.safetensors", "pt") as file:
        metadata = json.loads(file.metadata()["lora_adapter_metadata"])
        state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a dict
    component = run.family.denoiser_name
    rank, alpha = metadata[f"{component}.r"], metadata[f"{component}.lora_alpha"]
    assert (rank, alpha, metadata[f"{component}.use_rslora"]) == (4, 16, is_rslora)
    merged = tiny_pipelines.pipeline(name)
    assert np.abs(pixels(merged) - expected).max() > 10
    modules = dict(getattr(merged, component).named_modules())
    for key in [key for key in state if key.endswith("lora_A.weight")]:
        down, up = state.pop(key), state.pop(key.replace("lora_A", "lora_B"))
        with torch.no_grad():
            module = modules[key.removeprefix(f"{component}.").removesuffix(".lora_A.weight")]
            module.weight += alpha / (rank**0.5 if is_rslora else rank) * up @ down
    assert not state and np.abs(pixels(merged) - expected).max() <= 1


def apply_to_flux(pipeline, file) -> None:
    """Into the matrices of the authors' layout, which are those of diffusers stacked; and back."""
    transformer, state = pipeline.transformer, load_file(file)

    def add(key, modules):
        down, up, alpha = (
            state.pop(f"lora_unet_{key}.{part}") for part in ("lora_down.weight", "lora_up.weight", "alpha")
        )
        delta = alpha / len(down) * up @ down
        with torch.no_grad():
            for module, part in zip(modules, delta.split([m.out_features for m in modules]), strict=True):
                module.weight += part

    for i, block in enumerate(transformer.transformer_blocks):
        attn = block.attn
        add(f"double_blocks_{i}_img_attn_qkv", [attn.to_q, attn.to_k, attn.to_v])
        add(f"double_blocks_{i}_txt_attn_qkv", [attn.add_q_proj, attn.add_k_proj, attn.add_v_proj])
        add(f"double_blocks_{i}_img_attn_proj", [attn.to_out[0]])
        add(f"double_blocks_{i}_txt_attn_proj", [attn.to_add_out])
    for i, block in enumerate(transformer.single_transformer_blocks):
        add(f"single_blocks_{i}_linear1", [block.attn.to_q, block.attn.to_k, block.attn.to_v, block.proj_mlp])
    assert not state


def test_flux(tmp_path):
    run = trained("flux", tmp_path, peft_config=lora(r=4, lora_alpha=16))
    expected = pixels(run.family.pipeline)
    merged = tiny_pipelines.pipeline("flux")
    apply_to_flux(merged, tmp_path / KOHYA)
    assert np.abs(pixels(merged) - expected).max() <= 1


def test_refused(tmp_path):
    with pytest.raises(
        ValueError, match="`export_format='kohya'` is known for UNets and FLUX.1, not for a `SD3Transformer2DModel`"
    ):
        trainer("sd3", tmp_path, export_format="kohya")
    with pytest.raises(ValueError, match="`export_format='kohya'` is for LoRAs"):
        trainer("sd", tmp_path, export_format="kohya", peft_config=None)
    with pytest.raises(ValueError, match="`export_format='kohya'`: .* `x_embedder`"):
        trainer("flux", tmp_path, export_format="kohya", peft_config=lora(target_modules=["x_embedder"]))
    with pytest.raises(ValueError, match="export_format.*'peft'"):
        harness.trainer("sd", tmp_path, export_format="peft")
