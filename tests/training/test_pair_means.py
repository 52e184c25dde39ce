"""
Means are over pairs, and `predict` and `compute_metrics` get every row: whatever the size of evaluation batches and
the number of processes. Expected values come from one pair at a time.
"""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import harness
import numpy as np
import pytest
import tiny
import torch
from methods import BY_ID

from trl_ext.training.metrics import MetricWindow, StepMetrics


SCRIPT = Path(__file__).parents[1] / "scripts" / "evaluate_pairs.py"


def evaluation(method, model, folder, batch_size, count=5, **options):
    """A trainer over `count` pairs of various lengths, and what `evaluate` measures."""
    trainer = harness.trainer(
        BY_ID[method],
        model,
        folder,
        eval_dataset=tiny.dataset(count, seed=3),
        per_device_eval_batch_size=batch_size,
        max_steps=3,
        **options,
    )
    trainer.train()
    return trainer, trainer.evaluate()


@pytest.mark.parametrize("method", ["fdpo", "simper", "tdpo", "mallows"])
def test_evaluation_does_not_depend_on_the_batch(method, tiny_folder, tmp_path):
    """
    Every metric of 5 pairs in batches of 1, 2, 3, 4 and 8 is the mean over the 5, over tokens where it is one over
    tokens.
    """
    options = {"kappa": 0.5} if method == "mallows" else {}
    alone = evaluation(method, tiny_folder, tmp_path / "1", 1, **options)[1]
    for batch_size in (2, 3, 4, 8):
        metrics = evaluation(method, tiny_folder, tmp_path / str(batch_size), batch_size, **options)[1]
        for name in alone:
            if name.startswith("eval_") and not any(word in name for word in (*harness.MACHINE_KEYS, "preparation")):
                assert metrics[name] == pytest.approx(alone[name], rel=2e-5, abs=1e-6), (name, batch_size)


def test_margins_are_those_of_the_pairs(tiny_folder, tmp_path):
    """The logged margin and the pairs' own, from full logits."""
    trainer, metrics = evaluation("fdpo", tiny_folder, tmp_path, 4)
    reference = tiny_model(tiny_folder)
    margins = []
    with torch.no_grad():
        for row in range(5):
            inputs = trainer.data_collator([trainer.eval_dataset[row]])
            own, ref = (harness.sides(model.eval(), inputs) for model in (trainer.model, reference))
            ratios = [mine.logps - theirs.logps for mine, theirs in zip(own, ref, strict=True)]
            margins.append(0.1 * (ratios[0] - ratios[1]).item())
    assert metrics["eval_rewards/margins"] == pytest.approx(sum(margins) / 5, abs=1e-5)
    assert metrics["eval_loss"] == pytest.approx(sum(math.log1p(math.exp(-m)) for m in margins) / 5, abs=1e-5)


def tiny_model(folder):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


@pytest.mark.parametrize("batch_size", [1, 2, 3, 4, 8])
def test_every_row_is_returned(batch_size, tiny_folder, tmp_path):
    """`compute_metrics` and `predict` get ten rows of five pairs: the chosen of a batch, then its rejected."""
    seen = []

    def compute_metrics(given):
        seen.append(given)
        return {"rows": len(given.label_ids)}

    trainer = harness.trainer(
        BY_ID["fdpo"],
        tiny_folder,
        tmp_path,
        eval_dataset=tiny.dataset(5, seed=3),
        compute_metrics=compute_metrics,
        per_device_eval_batch_size=batch_size,
        include_for_metrics=["inputs", "loss"],
    )
    assert trainer.evaluate()["eval_rows"] == 10
    assert len(seen[0].inputs) == 10 and len(seen[0].predictions) == 10
    assert len(trainer.predict(tiny.dataset(5, seed=3)).predictions) == 10
    expected = []
    for start in range(0, 5, batch_size):
        inputs = trainer.data_collator([trainer.eval_dataset[i] for i in range(start, min(5, start + batch_size))])
        expected += [
            row[mask.bool()].tolist() for row, mask in zip(inputs["input_ids"], inputs["attention_mask"], strict=True)
        ]
    for row, ids in zip(seen[0].label_ids, expected, strict=True):
        assert row[: len(ids)].tolist() == ids


def test_windows_of_training():
    """In training a mean over tokens is one a micro-step, as TRL's; in evaluation it is one over all tokens."""

    class OneProcess:
        num_processes = 1

    values = [torch.tensor([[1.0, 2.0], [3.0, 0.0]]), torch.tensor([[8.0, 0.0]])]
    masks = [torch.tensor([[True, True], [True, False]]), torch.tensor([[True, False]])]
    for averages_steps, expected in ((True, (2 * 2.0 + 1 * 8.0) / 3), (False, (6.0 + 8.0) / 4)):
        window = MetricWindow()
        for value, mask in zip(values, masks, strict=True):
            metrics = StepMetrics(torch.device("cpu"), len(value), averages_steps=averages_steps)
            metrics.total("nonfinite", torch.tensor(0))
            metrics.mean("tokens", value, where=mask)
            metrics.mean("pairs", value.sum(dim=1))
            names, sums = metrics.reduce(OneProcess)
            window.append(names[1:], sums[:, 1:])
        # As a checkpoint in the middle would carry it.
        resumed = MetricWindow()
        resumed.load_state_dict(json.loads(json.dumps(window.state_dict())))
        assert window.pop_means() == resumed.pop_means() == {"tokens": expected, "pairs": (3.0 + 3.0 + 8.0) / 3}
        assert window.is_empty and window.pop_means() == {}


def test_a_window_of_the_first_version():
    """0.1.0 wrote one mean a micro-step: each counts as much as a micro-step since."""
    window = MetricWindow()
    window.load_state_dict({"means": {"a": [1.0, 2.0], "b": [4.0]}})
    window.add("a", 12.0, 4.0)
    assert window.pop_means() == {"a": (1.0 + 2.0 + 3.0) / 3, "b": 4.0}


@pytest.mark.parametrize("batch_size, count", [(1, 5), (4, 5), (2, 7)])
def test_two_processes(batch_size, count, tiny_folder, tmp_path):
    """Pairs that fill up the last batch have no part: neither in the metrics, nor in the loss, nor in the rows."""
    alone, metrics = evaluation("fdpo", tiny_folder, tmp_path / "alone", 1, count=count, max_grad_norm=1.0)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "0"]
    command += ["--rdzv_backend", "c10d", "--rdzv_endpoint", "localhost:0", str(SCRIPT)]
    tiny_weights = tmp_path / "weights.pt"
    torch.save(alone.model.state_dict(), tiny_weights)
    command += [str(tiny_folder), str(tiny_weights), str(tmp_path / "two"), str(batch_size), str(count)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads((tmp_path / "two" / "result.json").read_text())
    assert found.pop("rows") == found.pop("predicted") == 2 * count
    for name, value in found.items():
        assert value == pytest.approx(metrics[name], rel=2e-5, abs=1e-6), name
    assert {"eval_loss", "eval_rewards/margins", "eval_entropy", "eval_ranking_accuracy/policy"} <= set(found)
    labels = np.load(tmp_path / "two" / "labels.npy")
    rows = [tuple(row[row >= 0].tolist()) for row in labels]
    assert len(rows) == 2 * count
