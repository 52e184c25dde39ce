"""What the tests of D2PO share: tiny prompts, a gold function that the tiny tokenizer can please, and a trainer."""

import harness
import tiny
from datasets import Dataset
from peft import LoraConfig

from trl_ext import D2POConfig, D2POTrainer
from trl_ext.d2po import Labeller
from trl_ext.judges import RewardFunctionJudge


def prompts(count: int = 32, conversational: bool = False) -> Dataset:
    rows = []
    for i, row in enumerate(tiny.rows(count)):
        prompt = [{"role": "user", "content": row["prompt"]}] if conversational else row["prompt"]
        rows.append({"prompt": prompt, "number": i})
    return Dataset.from_list(rows)


def vowels(prompts, completions, **columns) -> list[float]:
    """How many vowels: random byte-level text has some, and more can be learned."""
    texts = (c if isinstance(c, str) else c[0]["content"] for c in completions)
    return [float(sum(letter in "aeiou" for letter in text)) for text in texts]


class CountedLabeller(Labeller, RewardFunctionJudge):
    """The gold function, counting what it was asked."""

    def __init__(self, cost=1.0, is_free=True, **kwargs):
        super().__init__(vowels, **kwargs)
        self.cost, self.is_free = cost, is_free
        self.asked = []

    def __call__(self, prompts, completions_a, completions_b, **columns):
        self.asked += list(zip(prompts, completions_a, completions_b, strict=True))
        return super().__call__(prompts, completions_a, completions_b, **columns)


DEFAULTS = dict(
    per_device_train_batch_size=4,
    max_completion_length=8,
    window_size=8,
    labels_per_window=3,
    discriminator_learning_rate=1e-2,
    discriminator_epochs=2,
    discriminator_batch_size=4,
    label_retry_delay=0.0,
)


def config(folder, **options) -> D2POConfig:
    return D2POConfig(**{**harness.defaults(folder), **DEFAULTS, **options})


def lora(**kwargs) -> LoraConfig:
    return LoraConfig(**{"r": 4, "lora_alpha": 8, "lora_dropout": 0.0, "target_modules": "all-linear", **kwargs})


TRAINER_ARGUMENTS = (
    "eval_dataset",
    "callbacks",
    "discriminator",
    "discriminator_dataset",
    "discriminator_processing_class",
    "quantization_config",
    "processing_class",
)


def trainer(model, folder, *, labeller=None, train_dataset=None, peft_config="lora", **options) -> D2POTrainer:
    kwargs = {name: options.pop(name) for name in TRAINER_ARGUMENTS if name in options}
    if isinstance(kwargs.get("discriminator"), str):  # by name it belongs to the configuration
        options["discriminator"] = kwargs.pop("discriminator")
    return D2POTrainer(
        model=model,
        args=config(folder, **options),
        train_dataset=prompts() if train_dataset is None else train_dataset,
        peft_config=lora() if peft_config == "lora" else peft_config,
        gold_labeller=labeller,
        **kwargs,
    )
