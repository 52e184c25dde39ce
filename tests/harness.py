"""Short names for what most tests of the trainers do: configure, build, train, and read weights and logs."""

import json
import os
from pathlib import Path

import peft
import pytest
import tiny
import torch
import transformers
from methods import Method, Side
from packaging.version import Version
from transformers import AutoModelForCausalLM, TrainerCallback
from transformers.integrations.peft import MIN_PEFT_VERSION


# Keys of a log entry that measure the machine and not the method.
MACHINE_KEYS = ("runtime", "per_second", "total_flos", "preparation_time", "step_time")


def defaults(folder) -> dict:
    """Options of a short fp32 run on CPU."""
    return dict(
        output_dir=str(folder),
        max_steps=4,
        per_device_train_batch_size=4,
        per_device_eval_batch_size=4,
        learning_rate=1e-3,
        lr_scheduler_type="constant",
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        seed=0,
    )


def config(method: Method, folder, **options):
    """The method's configuration of a short run; `options` override both the defaults and the method's."""
    options = {**defaults(folder), **method.options, **options}
    if method.online:  # a window of one step, so that everything is on-policy
        accumulated, processes = options.get("gradient_accumulation_steps", 1), int(os.environ.get("WORLD_SIZE", 1))
        options.setdefault("window_size", options["per_device_train_batch_size"] * accumulated * processes)
    return method.config(**options)


def decisive_reward(prompts, completions, **columns) -> list[float]:
    """A gold reward without ties: vowels first, then whatever else there is."""
    texts = [c if isinstance(c, str) else c[0]["content"] for c in completions]
    return [sum(x in "aeiou" for x in text) + int.from_bytes(text.encode(), "big") % 997 / 1000 for text in texts]


def trainer(method: Method, model, folder, *, train_dataset=None, peft_config=None, ref_model=None, **options):
    """A trainer over 32 tiny pairs; trainer arguments are recognized by name, the rest goes to the configuration."""
    names = ("eval_dataset", "callbacks", "optimizers", "quantization_config", "compute_metrics", "processing_class")
    names += ("data_collator",)
    kwargs = {name: options.pop(name) for name in names if name in options}
    if ref_model is not None:
        kwargs["ref_model"] = ref_model
    if train_dataset is None:
        train_dataset = tiny.dataset()
    if method.online:
        train_dataset = train_dataset.select_columns(["prompt"])
        kwargs["gold_labeller"] = decisive_reward
    args = config(method, folder, **options)
    return method.trainer(model=model, args=args, train_dataset=train_dataset, peft_config=peft_config, **kwargs)


def load(folder, **kwargs):
    """The tiny model as an instance, as a user would load it."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **kwargs)


def weights(model) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def modes(model) -> dict[str, bool]:
    """Whether each module is in training mode."""
    return {name: module.training for name, module in model.named_modules()}


def logs(trainer) -> list[dict]:
    """`log_history` without what measures the machine."""
    return [
        {key: value for key, value in entry.items() if not any(word in key for word in MACHINE_KEYS)}
        for entry in trainer.state.log_history
    ]


def column(trainer, key: str) -> list[float]:
    return [entry[key] for entry in trainer.state.log_history if key in entry]


def largest_difference(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> float:
    assert first.keys() == second.keys()
    return max((first[name].float() - second[name].float()).abs().max().item() for name in first)


def assert_same_logs(first: list[dict], second: list[dict], rtol=0.0, atol=0.0, ignore=()) -> None:
    """Every entry has the same keys and the same numbers; with the default tolerances, bit for bit."""
    assert len(first) == len(second)
    for a, b in zip(first, second, strict=True):
        a, b = ({k: v for k, v in entry.items() if k not in ignore} for entry in (a, b))
        assert a.keys() == b.keys()
        for key in a:
            limit = atol + rtol * abs(a[key])
            assert abs(a[key] - b[key]) <= limit, f"{key} at step {a['step']}: {a[key]!r} and {b[key]!r}"


def batch(trainer, count: int = 4, start: int = 0) -> dict:
    """Pairs of the trainer's prepared training data, in order, as the collator makes them."""
    return trainer.data_collator([trainer.train_dataset[i] for i in range(start, start + count)])


def sides(model, inputs: dict, dtype=torch.float32) -> tuple[Side, Side]:
    """Chosen and rejected side under `model` by plain means: full logits, log-softmax, no fused head."""
    logits = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], use_cache=False).logits
    logprobs = logits[:, :-1].to(dtype).log_softmax(-1)
    parts = (logprobs, inputs["input_ids"][:, 1:], inputs["completion_mask"][:, 1:].bool())
    return tuple(Side(*halves) for halves in zip(*(part.chunk(2) for part in parts), strict=True))


def evaluate_equation(method: Method, model, reference, inputs: dict, beta: float):
    """Losses and rewards of the method's equation under `model` and `reference`, recomputed from full logits."""
    ref = (None, None)
    if method.needs_reference:
        with torch.no_grad():
            ref = sides(reference, inputs)
    return method.equation(*sides(model, inputs), *ref, beta)


class StopAt(TrainerCallback):
    """Ends training after a step, as an interruption would, with the schedule of the whole run kept."""

    def __init__(self, step: int):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            control.should_save = True
            control.should_training_stop = True


def write_json(path: Path, value) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=1) + "\n")


def require_own_adapters() -> None:
    """Skips a test of the adapters that Transformers itself puts into layers, where it wants a newer PEFT than this."""
    if Version(peft.__version__) < Version(MIN_PEFT_VERSION):
        pytest.skip(f"`add_adapter` of transformers {transformers.__version__} needs peft >= {MIN_PEFT_VERSION}")
