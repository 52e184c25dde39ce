"""Metrics of images are means over pairs, under the name of their evaluation set."""

import diffusion_harness as harness
import pytest


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
