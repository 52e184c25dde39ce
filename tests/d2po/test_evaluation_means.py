"""D2PO's evaluation: means over prompts and their pairs, whatever the batch."""

import harness
import online
import pytest


def test_evaluation_does_not_depend_on_the_batch(tiny_folder, tmp_path):
    """Five prompts, one at a time and in batches of two and four: samples have random numbers of each prompt's own."""
    found = []
    for size in (1, 2, 4):
        trainer = online.trainer(
            tiny_folder,
            tmp_path / str(size),
            labeller=online.CountedLabeller(),
            eval_dataset=online.prompts(5),
            per_device_eval_batch_size=size,
            max_steps=1,
        )
        found.append(trainer.evaluate())
    names = [
        n
        for n in found[0]
        if n.startswith("eval_") and not any(word in n for word in (*harness.MACHINE_KEYS, "preparation"))
    ]
    assert {"eval_d2po/completion_length", "eval_d2po/gold_reward", "eval_rewards/margins"} <= set(names)
    for metrics in found[1:]:
        for name in names:
            assert metrics[name] == pytest.approx(found[0][name], rel=1e-4, abs=1e-5), name
