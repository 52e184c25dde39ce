"""
What every text method promises of its runs, whatever its data: the checks that `test_method_suite.py` and
`rollout/test_sampling_suite.py` share.

A check takes `build(name, **options)`, which makes a trainer with its own output folder. "Bitwise" means equality.
Where the order of fp32 sums differs (padding, accumulation, processes), losses must agree to 2e-6 and weights to 1e-6
after a few steps. Adam divides by the root of a squared gradient, so a gradient of rounding noise moves a weight by the
whole learning rate; comparisons across orders of summation therefore use `adam_epsilon=1e-3`, above the noise.
"""

import json
from collections.abc import Callable, Iterable
from pathlib import Path

import harness
import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file
from transformers import BitsAndBytesConfig


TESTS = Path(__file__).resolve().parent
SMOOTH = dict(adam_epsilon=1e-3)
LOSS_NOISE, WEIGHT_NOISE = 2e-6, 1e-6

Build = Callable[..., object]


def by_id(methods):
    return pytest.mark.parametrize("method", methods, ids=lambda method: method.id)


def lora(**kwargs):
    return LoraConfig(**{"r": 4, "lora_alpha": 8, "lora_dropout": 0.0, "target_modules": "all-linear", **kwargs})


# ---- Models ---------------------------------------------------------------------------------------------------------


def check_full(build: Build, folder: str) -> None:
    """A string and an instance give bitwise the same run, every weight moves, and the reference stays where it was."""
    runs = []
    for name, model in (("id", folder), ("instance", harness.load(folder))):
        trainer = build(name, model=model)
        trainer.train()
        runs.append((harness.weights(trainer.model), harness.logs(trainer)))
        if trainer.ref_model is not None:
            initial = harness.weights(harness.load(folder))
            assert harness.largest_difference(harness.weights(trainer.ref_model), initial) == 0
    assert harness.largest_difference(runs[0][0], runs[1][0]) == 0
    harness.assert_same_logs(runs[0][1], runs[1][1])
    for name, before in harness.load(folder).named_parameters():
        assert not torch.equal(before, runs[0][0][name]), name


def check_lora(trainer) -> None:
    """With LoRA the base is bitwise frozen, every adapter weight moves, and no second model is kept."""
    before = harness.weights(trainer.model)
    assert trainer.ref_model is None
    trainer.train()
    for name, after in trainer.model.named_parameters():
        assert torch.equal(before[name], after) == ("lora_" not in name), name


def check_qlora(build: Build, dtype: str = "float32", **options):
    """4-bit NF4 with LoRA: linear layers are quantized and frozen, adapters move, losses are finite."""
    pytest.importorskip("bitsandbytes")
    quantization = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=getattr(torch, dtype)
    )
    trainer = build("qlora", peft_config=lora(), quantization_config=quantization, learning_rate=5e-3, **options)
    before = harness.weights(trainer.model)
    quantized = [name for name, weight in before.items() if weight.dtype == torch.uint8]
    assert len(quantized) == 2 * 7  # the seven linear layers of each of two blocks
    assert trainer.ref_model is None
    trainer.train()
    moved = {name for name, after in trainer.model.named_parameters() if not torch.equal(before[name], after)}
    assert moved == {name for name in before if "lora_" in name}
    assert all(torch.isfinite(torch.tensor(harness.column(trainer, "loss"))))
    return trainer


# ---- Repetition -----------------------------------------------------------------------------------------------------


def check_same_logs(build: Build, variants: dict[str, dict], ignore=()) -> None:
    """Runs of these options log the same, bit for bit."""
    first, *others = [trained_logs(build(name, **options)) for name, options in variants.items()]
    for other in others:
        harness.assert_same_logs(first, other, ignore=ignore)


def trained_logs(trainer) -> list[dict]:
    trainer.train()
    return harness.logs(trainer)


def check_golden(trainer, name: str, keys: Iterable[str], regenerate: bool) -> None:
    """Eight steps give the values of `golden/<name>.json`, to 1e-4: numbers do not drift unnoticed."""
    trainer.train()
    values = {key: harness.column(trainer, key) for key in keys}
    path = TESTS / "golden" / f"{name}.json"
    if regenerate:
        harness.write_json(path, values)
    golden = json.loads(path.read_text())
    assert golden.keys() == values.keys()
    for key, expected in golden.items():
        assert len(expected) == 8
        assert values[key] == pytest.approx(expected, rel=1e-4, abs=1e-6), key


def check_same_seed(build: Build, apart: float) -> None:
    """Twice the same seed, with dropout in the adapter: logs and weights bitwise equal. Another seed differs."""
    runs = []
    for seed in (3, 3, 4):
        trainer = build(str(len(runs)), peft_config=lora(lora_dropout=0.3), seed=seed)
        trainer.train()
        runs.append((harness.weights(trainer.model), harness.logs(trainer)))
    assert harness.largest_difference(runs[0][0], runs[1][0]) == 0
    harness.assert_same_logs(runs[0][1], runs[1][1])
    assert harness.largest_difference(runs[0][0], runs[2][0]) > apart


# ---- Invariances ----------------------------------------------------------------------------------------------------


def check_equal_runs(build: Build, initial, first: dict, second: dict, keys: Callable[[str], bool]) -> None:
    """Runs under two configurations that must agree but for the order of fp32 sums, in the logs that `keys` wants."""
    runs = []
    for name, options in (("first", first), ("second", second)):
        trainer = build(name, **{**SMOOTH, **options})
        trainer.train()
        runs.append((harness.weights(trainer.model), harness.logs(trainer)))
    moved = harness.largest_difference(runs[0][0], harness.weights(initial))
    difference = harness.largest_difference(runs[0][0], runs[1][0])
    assert moved > 1e-4 and difference < min(WEIGHT_NOISE, 1e-2 * moved), (moved, difference)
    assert_close_logs(runs[0][1], runs[1][1], keys)


def assert_close_logs(first: list[dict], second: list[dict], keys: Callable[[str], bool]) -> None:
    for entry, other in zip(first, second, strict=True):
        for key in filter(keys, entry):
            assert entry[key] == pytest.approx(other[key], rel=1e-4, abs=LOSS_NOISE), key


# ---- Processes, interruption, resuming ------------------------------------------------------------------------------


def script(file: str, method, model: str, output: Path, **options) -> list[str]:
    """The command line of one of `scripts/`."""
    output.mkdir(parents=True, exist_ok=True)
    return [str(TESTS / "scripts" / file), method.id, model, str(output), json.dumps(options)]


def result(folder: Path) -> tuple[dict, dict]:
    """Weights, and the other results, of a script."""
    return load_file(folder / "weights.safetensors"), json.loads((folder / "result.json").read_text())


def assert_bitwise(first: Path, second: Path) -> None:
    """Two scripts ended with the same weights and logs."""
    (weights, one), (others, other) = result(first), result(second)
    assert harness.largest_difference(weights, others) == 0
    harness.assert_same_logs(one["logs"], other["logs"])


def check_resume(build: Build, step: int, variants: Iterable[dict] = ({},)):
    """
    Stopped after a step and resumed by a new trainer, a run is bitwise the uninterrupted one: weights and every logged
    value, `num_tokens` and `train_loss` among them; and so is its card.
    """
    whole = build("whole")
    summary = whole.train()
    build("stopped", callbacks=[harness.StopAt(step)]).train()
    for options in variants:
        resumed = build("stopped", **options)
        checkpoint = str(Path(resumed.args.output_dir) / f"checkpoint-{step}")
        resumed_summary = resumed.train(resume_from_checkpoint=checkpoint)
        assert harness.largest_difference(harness.weights(whole.model), harness.weights(resumed.model)) == 0
        harness.assert_same_logs(harness.logs(whole), harness.logs(resumed))
        assert resumed_summary.training_loss == summary.training_loss
    assert card(resumed) == card(whole)
    return resumed


def card(trainer) -> list[str]:
    """The lines of a trainer's model card, without its name and what measures the machine."""
    trainer.save_model()
    folder = Path(trainer.args.output_dir)
    text = (folder / "README.md").read_text(encoding="utf-8").replace(str(folder), "").replace(folder.name, "")
    return [line for line in text.splitlines() if "Training time" not in line]


def check_second_training(trainer):
    """`train()` again on the same trainer starts `num_tokens` anew, as its step does. Returns both columns."""
    trainer.train()
    first = harness.column(trainer, "num_tokens")
    trainer.train()
    second = harness.column(trainer, "num_tokens")
    assert len(second) == len(first) and second[0] < 2 * first[0]
    return first, second


def check_resume_in_the_same_trainer(build: Build, step: int) -> None:
    """Resuming with the trainer that was interrupted, as in a notebook, does not count its last window twice."""
    whole = build("whole")
    whole.train()
    stopped = build("same", callbacks=[harness.StopAt(step)])
    stopped.train()
    stopped.train(resume_from_checkpoint=True)
    harness.assert_same_logs(harness.logs(whole), harness.logs(stopped))


def check_no_trace(build: Build, eval_dataset, every: int) -> None:
    """
    Checkpoints and evaluations in the middle of logging windows change neither the run nor what it logs; resumed from
    its last checkpoint, where nothing is left to be trained, it logs the same once more, and leaves the model in the
    same mode.
    """
    plain = build("plain")
    plain.train()  # before the other is built: sampling draws from the random state, which a constructor seeds
    saving = dict(save_strategy="steps", save_steps=every, eval_strategy="steps", eval_steps=every)
    busy = build("busy", eval_dataset=eval_dataset, **saving)
    busy.train()
    training = [entry for entry in harness.logs(busy) if not any(key.startswith("eval_") for key in entry)]
    assert len(training) < len(harness.logs(busy))
    # The metrics of a half-filled last window are in the summary, whether or not an evaluation ended the run.
    harness.assert_same_logs(harness.logs(plain), training)
    assert len(training[-1]) > 4, "the run ends with its window half-filled, so that there is something to lose"
    assert harness.largest_difference(harness.weights(plain.model), harness.weights(busy.model)) == 0
    resumed = build("busy", eval_dataset=eval_dataset, **saving)
    resumed.train(resume_from_checkpoint=True)
    harness.assert_same_logs(harness.logs(busy), harness.logs(resumed))
    assert harness.modes(busy.model) == harness.modes(resumed.model)
