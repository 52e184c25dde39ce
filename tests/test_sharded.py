"""
Models whose parameters are spread over processes: FSDP2, DeepSpeed ZeRO.

By default one method of each kind trains under FSDP2; `--runslow` has all of them, and with DeepSpeed installed
(`pip install deepspeed`; `DS_ACCELERATOR=cpu` is set here) all of them under ZeRO-2 and ZeRO-3.
"""

import dataclasses
import json
import os
import sys
from pathlib import Path

import engines
import harness
import methods
import pytest
import sampling
import torch
from launching import fork
from peft import PeftModel
from transformers import AutoModelForCausalLM


TESTS = Path(__file__).parent

needs_deepspeed = pytest.mark.skipif(not engines.HAS_DEEPSPEED, reason="needs deepspeed: pip install deepspeed")


@pytest.mark.parametrize("head", ["frozen", "trained"])
def test_sharded_heads(head):
    """
    FSDP2: both models' heads sharded, in two processes: values, gradients, and at most one head gathered by hand.
    """
    printed = fork(TESTS / "scripts" / "sharded_heads.py", head)
    assert printed.count("sharded heads agree") == 2


@dataclasses.dataclass(frozen=True)
class Case:
    """
    A method under an engine: its kind and id, as `scripts/run_engine.py` takes them, the rows of a step over all
    processes, and the logged values that are compared (all but those of Transformers by default).
    """

    kind: str
    method: str
    rows: int = 4
    names: tuple[str, ...] | None = None
    full: dict = dataclasses.field(default_factory=dict)  # of the run that trains all weights
    lora: dict = dataclasses.field(default_factory=dict)  # of the run that trains an adapter

    def options(self, processes: int) -> dict:
        sizes = dict.fromkeys(("per_device_train_batch_size", "per_device_eval_batch_size"), self.rows // processes)
        # AdamW divides by tiny second moments, which magnifies rounding.
        return dict(sizes, max_steps=4, save_strategy="steps", save_steps=2, adam_epsilon=1e-3)

    def compare(self, one: list[dict], other: list[dict]) -> None:
        for a, b in zip(one, other, strict=True):
            assert a.keys() == b.keys()
            for key in a.keys() - {"train_loss", "eval_loss" if self.kind == "sampling" else ""}:
                if self.names is None or key.removeprefix("eval_") in self.names:
                    # TRL's mean over tokens counts the rows that fill up the last batch of an evaluation.
                    if self.names is None or key != "eval_entropy":
                        assert b[key] == pytest.approx(a[key], rel=1e-4, abs=5e-6), key


COMMON = ("loss", "reward", "rewards/reward/mean", "entropy", "num_tokens")
CASES = [Case("paired", method.id, full={"reference": method.needs_reference}) for method in methods.PRIMARY]
CASES += [
    Case("sampling", method.id, rows=16, names=COMMON + method.metrics, full={"options": {"beta": 0.1}})
    for method in sampling.PRIMARY
    if not method.is_plain
]
BY_DEFAULT = {"tdpo", "fdpg"}


def cases(by_default: set[str]):
    slow = pytest.mark.slow
    params = [pytest.param(case, id=case.method, marks=() if case.method in by_default else slow) for case in CASES]
    return pytest.mark.parametrize("case", params)


def run_here(plan: dict) -> None:
    sys.path.insert(0, str(engines.SCRIPT.parent))
    import run_engine

    run_engine.main(json.dumps(plan))


def check_engine(engine: str, case: Case, model: str, folder: Path) -> None:
    """
    Two processes under an engine are one process on the same global batch, by every logged value and every weight:
    all weights trained, and an adapter, which is also the reference when it is off. Stopped and resumed they are
    bitwise what they are uninterrupted, and what they save loads in one process.
    """

    def plan(name: str, engine: str, processes: int) -> dict:
        base = {"kind": case.kind, "method": case.method, "model": model, "evaluate": True, "save": True}
        options, runs = case.options(processes), []
        for part, own in (("full", case.full), ("lora", {"lora": True, **case.lora})):
            own = {
                **base,
                **own,
                "options": {**options, **own.get("options", {})},
                "folder": f"{folder}/{name}-{part}",
            }
            runs.append(own)
            if processes > 1:  # resumed in the middle, to the same end
                checkpoint = f"{own['folder']}/checkpoint-2"
                runs.append({**own, "resume": checkpoint, "folder": f"{own['folder']}-resumed"})
        return {"engine": engine, "runs": runs}

    run_here(plan("one", "none", 1))
    fork(engines.SCRIPT, json.dumps(plan("two", engine, 2)))
    for part in ("full", "lora"):
        (weights, one), (two_weights, two) = (engines.result(folder / f"{name}-{part}") for name in ("one", "two"))
        assert (one["processes"], two["processes"]) == (1, 2)
        assert two["engine"] == {"fsdp2": "FSDP"}.get(engine, "DEEPSPEED")
        if engine != "zero2":  # whose parameters are whole
            assert two["sharded"] == two["parameters"] > 0 and two["sharded_reference"] in (None, True)
        case.compare(one["logs"], two["logs"])
        assert harness.largest_difference(weights, two_weights) < 1e-5
        resumed_weights, resumed = engines.result(folder / f"two-{part}-resumed")
        assert harness.largest_difference(two_weights, resumed_weights) == 0
        harness.assert_same_logs(two["logs"], resumed["logs"])
        check_loads(case, model, folder / f"two-{part}" / "final", two_weights)


def check_loads(case: Case, model: str, final: Path, weights: dict[str, torch.Tensor]) -> None:
    """What was saved, loaded in one process, has the trained weights."""
    if (final / "adapter_config.json").exists():
        loaded = PeftModel.from_pretrained(harness.load(model), final)
    else:
        loaded = AutoModelForCausalLM.from_pretrained(final, dtype=torch.float32)
    own = harness.weights(loaded)
    assert own.keys() <= weights.keys()
    assert all(torch.equal(value, weights[name]) for name, value in own.items())


@cases(BY_DEFAULT)
def test_fsdp2(case, tiny_folder, tmp_path):
    check_engine("fsdp2", case, tiny_folder, tmp_path)


@pytest.mark.slow
@needs_deepspeed
@pytest.mark.parametrize("engine", ["zero2", "zero3"])
@cases(set())
def test_deepspeed(engine, case, tiny_folder, tmp_path, monkeypatch):
    monkeypatch.setitem(os.environ, "DS_ACCELERATOR", "cpu")
    check_engine(engine, case, tiny_folder, tmp_path)
