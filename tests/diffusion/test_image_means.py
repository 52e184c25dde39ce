"""Metrics of images are means over pairs, under the name of their evaluation set."""

import json
import sys

import diffusion_harness as harness
import pytest
import torch
from accelerate.data_loader import BatchSamplerShard
from launching import TESTS, fork
from safetensors.torch import load_file
from torch.utils.data import BatchSampler


def test_several_evaluation_sets(tmp_path):
    """Every metric of each set is under its own prefix, so that `metric_for_best_model` can name it."""
    sets = {"a": harness.dataset(5, start=20), "b": harness.dataset(4, start=40)}
    trainer = harness.trainer(
        "sd",
        tmp_path,
        eval_dataset=sets,
        metric_for_best_model="eval_a_errors/chosen",
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        max_steps=2,
        load_best_model_at_end=True,
        greater_is_better=False,
    )
    trainer.train()
    logged = {key for entry in trainer.state.log_history for key in entry}
    for name in ("rewards/margins", "errors/chosen", "gaps/rejected"):
        assert {f"eval_a_{name}", f"eval_b_{name}"} <= logged and f"eval_{name}" not in logged
    values = [
        [entry[f"eval_{s}_errors/chosen"] for entry in trainer.state.log_history if f"eval_{s}_errors/chosen" in entry]
        for s in "ab"
    ]
    assert len(values[0]) == len(values[1]) == 2 and values[0] != values[1]


@pytest.mark.parametrize("batch_size", [2, 3, 8])
def test_evaluation_does_not_depend_on_the_batch(batch_size, tmp_path):
    """Five pairs, alone and in batches: the buckets of timesteps, too."""
    found = []
    for size in (1, batch_size):
        trainer = harness.trainer(
            "sd",
            tmp_path / str(size),
            eval_dataset=harness.dataset(5, start=20),
            max_steps=1,
            per_device_eval_batch_size=size,
        )
        trainer.train()
        found.append(trainer.evaluate())
    names = [name for name in found[0] if "/" in name or name == "eval_loss"]
    assert len(names) > 10
    for name in names:
        assert found[1][name] == pytest.approx(found[0][name], rel=2e-3, abs=1e-4), name


def test_pairs_that_fill_the_last_batch_of_two_processes(tmp_path):
    """
    Five training pairs in batches of two on two processes: Accelerate fills the last batch with pairs of the first, as
    for TRL's trainers. These are trained on and counted in training's means, as if one process had them twice, and the
    five pairs of the evaluation count once each.
    """
    script = TESTS / "scripts" / "run_diffusion.py"
    options = dict(pairs=5, max_steps=2, optim="sgd", learning_rate=0.1, save_strategy="no")
    fork(script, str(tmp_path / "two"), json.dumps(options))
    two = json.loads((tmp_path / "two" / "result.json").read_text())
    order = [*two["pairs"][0], *(pair for pair in range(5) if pair not in two["pairs"][0])]
    shares = [BatchSamplerShard(BatchSampler(order, 2, False), 2, process) for process in (0, 1)]
    # A sampler deals batches to the processes in turn, so the shares of a step follow each other in the epoch.
    assert two["pairs"] == [[*a, *b] for a, b in zip(*shares, strict=True)]
    assert len(sum(two["pairs"], [])) == 8 > len({*sum(two["pairs"], [])}) == 5

    sys.path.insert(0, str(TESTS / "scripts"))
    import run_diffusion

    run_diffusion.main(
        str(tmp_path / "one"), json.dumps({**options, "order": two["pairs"], "per_device_train_batch_size": 4})
    )
    one = json.loads((tmp_path / "one" / "result.json").read_text())
    assert one["pairs"] == two["pairs"] and two["equal_on_all"] and two["processes"] == 2
    a, b = (load_file(tmp_path / name / "pytorch_lora_weights.safetensors") for name in ("one", "two"))
    for key in a:
        torch.testing.assert_close(b[key], a[key], rtol=1e-3, atol=1e-6)
    for first, second in zip(one["logs"], two["logs"], strict=True):
        for key in first.keys() - {"train_loss", "epoch"}:
            assert second[key] == pytest.approx(first[key], rel=2e-3, abs=2e-4), key
