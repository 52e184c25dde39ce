"""Short names for the tests of the trainers that learn from rewards of their own images."""

import diffusion_harness
import harness
import numpy as np
import tiny_pipelines
from datasets import Dataset

from trl_ext import ScoreAsActionConfig, ScoreAsActionTrainer


PROMPTS = ("a bold seven", "a thin one", "a red digit", "a two")


def brightness(images, **kwargs) -> list[float]:
    """Mean brightness of each image, in [0, 1]."""
    return [float(np.asarray(image).mean() / 255) for image in images]


def prompts(count: int = 4, **columns) -> Dataset:
    return Dataset.from_dict({"prompt": [PROMPTS[i % len(PROMPTS)] for i in range(count)], **columns})


def options(folder, **given) -> dict:
    """Options of a short fp32 run on CPU: two groups of two images a step, in chains of three noisy steps."""
    short = dict(
        max_steps=2,
        per_device_train_batch_size=4,
        per_device_eval_batch_size=2,
        num_generations=2,
        num_inference_steps=4,
        num_reference_images=4,
        eval_inference_steps=2,
        resolution=tiny_pipelines.RESOLUTION,
    )
    return {**harness.defaults(folder), **short, **given}


def trainer(
    model,
    folder,
    *,
    reward_funcs=brightness,
    trainer_class=ScoreAsActionTrainer,
    config_class=ScoreAsActionConfig,
    train_dataset=None,
    peft_config="lora",
    **given,
):
    """
    A trainer over four prompts; trainer arguments are recognized by name, the rest goes to the configuration. `model`
    may be the name of a tiny pipeline's family.
    """
    names = ("ref_model", "eval_dataset", "callbacks", "optimizers", "quantization_config", "processing_class")
    kwargs = {name: given.pop(name) for name in names if name in given}
    if model in tiny_pipelines.FAMILIES:
        model = tiny_pipelines.pipeline(model)
    return trainer_class(
        model=model,
        reward_funcs=reward_funcs,
        args=config_class(**options(folder, **given)),
        train_dataset=prompts() if train_dataset is None else train_dataset,
        peft_config=diffusion_harness.lora() if peft_config == "lora" else peft_config,
        **kwargs,
    )


def comparable(run) -> list[dict]:
    """The log without what measures the machine."""
    return [
        {key: value for key, value in entry.items() if not any(part in key for part in harness.MACHINE_KEYS)}
        for entry in run.state.log_history
    ]
