"""Single-file checkpoints, in the layout of the original Stable Diffusion code, as `model`."""

import math

import pytest
import tiny_pipelines
import torch
from diffusion_harness import pixels, trainer
from safetensors.torch import save_file


def original_unet(unet) -> dict[str, torch.Tensor]:
    """State of the tiny UNet (two blocks of one layer) under the names of the original code."""
    resnet = {
        "norm1": "in_layers.0",
        "conv1": "in_layers.2",
        "norm2": "out_layers.0",
        "conv2": "out_layers.3",
        "time_emb_proj": "emb_layers.1",
        "conv_shortcut": "skip_connection",
    }
    places = {
        "time_embedding.linear_1": "time_embed.0",
        "time_embedding.linear_2": "time_embed.2",
        "conv_in": "input_blocks.0.0",
        "conv_norm_out": "out.0",
        "conv_out": "out.2",
        "down_blocks.0.resnets.0": "input_blocks.1.0",
        "down_blocks.0.downsamplers.0.conv": "input_blocks.2.0.op",
        "down_blocks.1.resnets.0": "input_blocks.3.0",
        "down_blocks.1.attentions.0": "input_blocks.3.1",
        "mid_block.resnets.0": "middle_block.0",
        "mid_block.attentions.0": "middle_block.1",
        "mid_block.resnets.1": "middle_block.2",
        "up_blocks.0.resnets.0": "output_blocks.0.0",
        "up_blocks.0.attentions.0": "output_blocks.0.1",
        "up_blocks.0.resnets.1": "output_blocks.1.0",
        "up_blocks.0.attentions.1": "output_blocks.1.1",
        "up_blocks.0.upsamplers.0": "output_blocks.1.2",
        "up_blocks.1.resnets.0": "output_blocks.2.0",
        "up_blocks.1.resnets.1": "output_blocks.3.0",
    }
    state = {}
    for name, tensor in unet.state_dict().items():
        place = next(place for place in places if name.startswith(f"{place}."))
        rest = name[len(place) + 1 :]
        if ".resnets." in place:
            first, _, last = rest.partition(".")
            rest = f"{resnet[first]}.{last}"
        state[f"model.diffusion_model.{places[place]}.{rest}"] = tensor.contiguous()
    return state


@pytest.fixture(scope="module")
def single_file(tmp_path_factory):
    """A UNet in one file, and the keyword arguments that have the rest."""
    folder = tmp_path_factory.mktemp("single")
    pipeline = tiny_pipelines.pipeline("sd")
    pipeline.save_pretrained(folder / "config")
    save_file(original_unet(pipeline.unet), folder / "model.safetensors")
    kwargs = {"config": str(folder / "config"), "vae": pipeline.vae, "text_encoder": pipeline.text_encoder}
    return str(folder / "model.safetensors"), {**kwargs, "safety_checker": None}


def test_is_loaded_and_trained(single_file, tmp_path):
    """
    As the pipeline in a folder is: the same picture, and the loss starts at log 2; in full it saves a whole pipeline.
    """
    path, kwargs = single_file
    run = trainer(path, tmp_path, model_init_kwargs=kwargs, peft_config=None, cache_latents=True, max_steps=1)
    assert (pixels(run.full_pipeline()) == pixels(tiny_pipelines.pipeline("sd"))).all()
    run.train()
    assert run.state.log_history[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    run.save_model()
    assert {"unet", "vae", "text_encoder", "tokenizer"} <= {part.name for part in tmp_path.iterdir()}


def test_types_of_the_components(single_file, tmp_path):
    path, kwargs = single_file
    run = trainer(path, tmp_path, model_init_kwargs={**kwargs, "dtype": "bfloat16"}, bf16=True)
    assert run.family.denoiser.dtype == torch.bfloat16 and run.family.pipeline.vae.dtype == torch.float32


@pytest.mark.parametrize(
    "path", ["/nowhere/model.safetensors", "./model.ckpt", "model.safetensors", "/nowhere/pipeline"]
)
def test_what_is_not_there_is_said_to_be_missing(path, tmp_path):
    with pytest.raises(FileNotFoundError, match=f"`model='{path}'`: there is no such file or folder"):
        trainer(path, tmp_path)


def test_what_is_no_pipeline_is_named(single_file, tmp_path):
    file = tmp_path / "other.safetensors"
    save_file({"a": torch.zeros(1)}, file)
    with pytest.raises(ValueError, match="(?s)other.safetensors' could not be loaded.*`model_init_kwargs=.*'config'"):
        trainer(str(file), tmp_path, model_init_kwargs={"config": single_file[1]["config"]})


def test_quantized_is_refused(single_file, tmp_path):
    from transformers import BitsAndBytesConfig

    with pytest.raises(
        ValueError, match="`quantization_config` is not supported with the single file.*save_pretrained"
    ):
        trainer(single_file[0], tmp_path, quantization_config=BitsAndBytesConfig(load_in_4bit=True))
