"""Reward functions of images: what they are given, what they may return, and CLIP models as such."""

import math

import numpy as np
import pytest
import tiny_pipelines
import torch
from PIL import Image
from safetensors.torch import save_file
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPProcessor,
    CLIPVisionModelWithProjection,
)

from trl_ext.diffusion.rewards import AestheticReward, CLIPReward, ImageRewards, load_head, to_images


PROMPTS = ["a bold seven", "a thin one"]
PIXELS = torch.stack([torch.full((3, 4, 4), 1.0), torch.full((3, 4, 4), -3.0)])


def brightness(images, **columns):
    return [np.asarray(image).mean() / 255 for image in images]


def test_what_functions_are_given():
    """Images as PIL or tensors in [0, 1], cut to the range; prompts; columns by name, or all of them."""
    seen = {}

    def by_name(prompts, images, answer, other=None):
        seen["by name"] = (prompts, [type(image) for image in images], answer, other)
        return [1.0, 2.0]

    def tensors(images, **columns):
        seen["tensors"] = (images, sorted(columns))
        return images.mean((1, 2, 3))

    tensors.takes_tensors = True
    rewards = ImageRewards([by_name, tensors, brightness], [1.0, 10.0, 100.0], columns=["prompt", "answer", "more"])
    sums, each = rewards(PROMPTS, PIXELS, answer=[7, 1], more=["x", "y"])
    assert seen["by name"] == (PROMPTS, [Image.Image] * 2, [7, 1], None)
    images, columns = seen["tensors"]
    assert columns == ["answer", "more", "prompts"] and images.min() == 0 and images.max() == 1
    assert each.tolist() == [[1.0, 1.0, 1.0], [2.0, 0.0, 0.0]]
    assert sums.tolist() == [111.0, 2.0] and rewards.names == ["by_name", "tensors", "brightness"]


def test_none_is_no_opinion():
    """A sum is over the functions that have one; where none has, it is NaN, which is no reward of 0."""
    rewards = ImageRewards([lambda images: [None, None], lambda prompts: [0.5, None]])
    sums, each = rewards(PROMPTS, PIXELS)
    assert sums[0] == 0.5 and math.isnan(sums[1]) and each.isnan().tolist() == [[True, False], [True, True]]
    assert rewards.names == ["<lambda>_1", "<lambda>_2"]


@pytest.mark.parametrize(
    "returned, told",
    [
        ([1.0], "returned 1 rewards for 2 images"),
        (0.5, "returned a `float`"),
        ((r for r in (1.0, 2.0)), "returned a `generator`"),
        ([1.0, math.nan], "nan for an image of the prompt 'a thin one'"),
        ([math.inf, 1.0], "inf for an image of the prompt 'a bold seven'"),
        (["high", 1.0], "'high' for an image of the prompt 'a bold seven'"),
    ],
)
def test_what_is_no_reward(returned, told):
    def odd(images):
        return returned

    with pytest.raises((TypeError, ValueError), match=f"`odd` .*{told}"):
        ImageRewards(odd)(PROMPTS, PIXELS)


@pytest.mark.parametrize("returned", [[True, 0], np.array([1.0, 0.0], np.float32), torch.tensor([1, 0])])
def test_other_numbers_are_rewards(returned):
    assert ImageRewards(lambda images: returned)(PROMPTS, PIXELS)[0].tolist() == [1.0, 0.0]


def test_what_is_refused_before_the_first_image():
    with pytest.raises(ValueError, match="`reward_funcs` is empty"):
        ImageRewards([])
    with pytest.raises(TypeError, match="'some/model'.*`CLIPReward`"):
        ImageRewards("some/model")
    with pytest.raises(ValueError, match="`reward_weights` has 2 numbers for 1"):
        ImageRewards(brightness, [1.0, 2.0])
    with pytest.raises(ValueError, match=r"`needy` needs \['answer'\].*\['label'\]"):

        def needy(images, answer):
            return []

        ImageRewards(needy, columns=["prompt", "label"])


def tiny_clip():
    torch.manual_seed(0)
    tokenizer = tiny_pipelines.clip_tokenizer()
    sizes = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    text = dict(sizes, vocab_size=len(tokenizer), max_position_embeddings=16, eos_token_id=tokenizer.eos_token_id)
    config = CLIPConfig(text_config=text, vision_config=dict(sizes, image_size=16, patch_size=8), projection_dim=8)
    images = CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    return CLIPModel(config), CLIPProcessor(image_processor=images, tokenizer=tokenizer)


@pytest.fixture(scope="module")
def clip():
    return tiny_clip()


def test_clip_models_are_rewards(clip, tmp_path):
    """The cosine of the embeddings, one an image whatever the batch; PickScore's is times the scale; by folder, too."""
    model, processor = clip
    pixels = torch.rand(3, 3, 20, 20) * 2 - 1
    prompts = ["a bold seven", "a", "one"]
    sums, _ = ImageRewards(CLIPReward(model, processor))(prompts, pixels)
    alone = torch.cat(
        [ImageRewards(CLIPReward(model, processor))(prompts[i : i + 1], pixels[i : i + 1])[0] for i in range(3)]
    )
    assert torch.allclose(sums, alone, atol=1e-5) and (sums.abs() <= 1).all() and sums.std() > 0
    scaled, _ = ImageRewards(CLIPReward(model, processor, use_logit_scale=True))(prompts, pixels)
    assert torch.allclose(scaled, sums * model.logit_scale.exp().item(), rtol=1e-4)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    assert torch.allclose(ImageRewards(CLIPReward(str(tmp_path)))(prompts, pixels)[0], sums, atol=1e-6)
    with pytest.raises(ValueError, match="`processor` is needed"):
        CLIPReward(model)


def test_aesthetic_heads_are_rewards(clip, tmp_path):
    """A head from a file of linear layers, on normalized embeddings; a pickle is not opened."""
    model, processor = clip
    vision = CLIPVisionModelWithProjection(model.config.vision_config)
    size = vision.config.projection_dim
    state = {
        "layers.10.weight": torch.ones(1, 3),
        "layers.2.weight": torch.randn(3, size),
        "layers.2.bias": torch.zeros(3),
    }
    save_file(state, tmp_path / "head.safetensors")
    head = load_head(tmp_path / "head.safetensors")
    assert [layer.out_features for layer in head] == [3, 1]
    pixels = torch.rand(2, 3, 16, 16) * 2 - 1
    reward = AestheticReward(vision, tmp_path / "head.safetensors", processor.image_processor)
    sums, _ = ImageRewards(reward)(PROMPTS, pixels)
    inputs = processor.image_processor(images=to_images((pixels + 1) / 2), return_tensors="pt")
    embeddings = vision(**inputs).image_embeds
    units = embeddings / embeddings.norm(dim=1, keepdim=True)
    expected = (units @ state["layers.2.weight"].T) @ state["layers.10.weight"].T
    assert torch.allclose(sums.float(), expected.flatten(), atol=1e-5) and sums.std() > 0
    with pytest.raises(ValueError, match="safetensors"):
        load_head(tmp_path / "head.pt")
    save_file({"a.weight": torch.ones(2, 3)}, tmp_path / "bad.safetensors")
    with pytest.raises(ValueError, match=r"\[\(3, 2\)\]"):
        load_head(tmp_path / "bad.safetensors")
