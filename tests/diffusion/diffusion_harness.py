"""Short names for what the tests of the diffusion trainers do: data, configuration, trainer, samples."""

from collections.abc import Sequence

import harness
import numpy as np
import tiny_pipelines
import torch
from datasets import Dataset, Features, Image, Value
from peft import LoraConfig
from PIL import Image as PIL

from trl_ext import DiffusionDPOConfig, DiffusionDPOTrainer


def picture(seed: int, bright: bool, size: tuple[int, int] = (16, 16)) -> PIL.Image:
    """Noise about a light or a dark level: something that a preference can be about. The size is height and width."""
    pixels = np.random.default_rng(seed).integers(0, 80, (*size, 3)) + (160 if bright else 0)
    return PIL.fromarray(pixels.astype(np.uint8))


def dataset(count: int = 8, start: int = 0, sizes: Sequence[tuple[int, int]] = ((16, 16),)) -> Dataset:
    """Pairs in which the light picture is preferred, of these heights and widths in turn."""
    prompts = ("a bold seven", "a thin one", "a red digit", "")
    rows = [
        {
            "prompt": prompts[i % len(prompts)],
            "chosen": picture(2 * i, True, sizes[i % len(sizes)]),
            "rejected": picture(2 * i + 1, False, sizes[i % len(sizes)]),
        }
        for i in range(start, start + count)
    ]
    features = Features({"prompt": Value("string"), "chosen": Image(), "rejected": Image()})
    return Dataset.from_list(rows, features=features)


def options(folder, **given) -> dict:
    """Options of a short fp32 run on CPU, without what is random about the data."""
    images = dict(
        max_steps=3,
        per_device_train_batch_size=2,
        per_device_eval_batch_size=2,
        resolution=tiny_pipelines.RESOLUTION,
        prompt_dropout=0.0,
    )
    return {**harness.defaults(folder), **images, **given}


def lora(**kwargs) -> LoraConfig:
    return LoraConfig(**{"r": 4, "lora_alpha": 8, **kwargs})


def trainer(
    model,
    folder,
    *,
    trainer_class=DiffusionDPOTrainer,
    config_class=DiffusionDPOConfig,
    train_dataset=None,
    peft_config="lora",
    **given,
):
    """
    A trainer over 8 pairs; trainer arguments are recognized by name, the rest goes to the configuration. `model` may
    be the name of a tiny pipeline's family.
    """
    names = ("ref_model", "eval_dataset", "callbacks", "optimizers", "quantization_config", "compute_metrics")
    names += ("data_collator", "processing_class")
    kwargs = {name: given.pop(name) for name in names if name in given}
    if model in tiny_pipelines.FAMILIES:
        model = tiny_pipelines.pipeline(model)
    return trainer_class(
        model=model,
        args=config_class(**options(folder, **given)),
        train_dataset=dataset() if train_dataset is None else train_dataset,
        peft_config=lora() if peft_config == "lora" else peft_config,
        **kwargs,
    )


def pixels(pipeline, prompt: str = "a bold seven", seed: int = 0) -> np.ndarray:
    image = pipeline(
        prompt=prompt,
        **tiny_pipelines.CALLS.get(type(pipeline).__name__, {}),
        height=tiny_pipelines.RESOLUTION,
        width=tiny_pipelines.RESOLUTION,
        num_inference_steps=2,
        generator=torch.Generator().manual_seed(seed),
    ).images[0]
    return np.asarray(image).astype(int)


def trained(trainer) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in trainer.policy.named_parameters() if p.requires_grad}


def batch(trainer, count: int = 2) -> dict:
    return trainer.data_collator([trainer.train_dataset[i] for i in range(count)])
