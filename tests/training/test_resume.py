"""Resuming from the last checkpoint of a run that was killed while it wrote one."""

import logging
import shutil

import harness
import pytest
import tiny
from methods import BY_ID


@pytest.mark.parametrize("left", ["weights only", "half a state"])
def test_a_half_written_checkpoint_is_passed_over(left, tiny_folder, tmp_path, caplog):
    """The run goes on from the checkpoint before, bit for bit, and says so."""

    def build(name):
        options = dict(
            max_steps=5, save_strategy="steps", save_steps=2, logging_steps=1, per_device_train_batch_size=2
        )
        return harness.trainer(BY_ID["fdpo"], tiny_folder, tmp_path / name, train_dataset=tiny.dataset(12), **options)

    whole = build("run")
    whole.train()
    state = tmp_path / "run" / "checkpoint-4" / "trainer_state.json"
    text = state.read_text()
    state.unlink()
    if left == "half a state":
        state.write_text(text[: len(text) // 2])
    (tmp_path / "run" / "checkpoint-none").mkdir()  # no checkpoint by its name
    shutil.rmtree(tmp_path / "run" / "checkpoint-5", ignore_errors=True)
    resumed = build("run")
    with caplog.at_level(logging.WARNING, logger="trl_ext"):
        resumed.train(resume_from_checkpoint=True)
    assert "checkpoint-4` was not written to its end" in caplog.text and "checkpoint-2`" not in caplog.text
    assert harness.largest_difference(harness.weights(whole.model), harness.weights(resumed.model)) == 0
    harness.assert_same_logs(harness.logs(whole), harness.logs(resumed))


def test_no_whole_checkpoint(tiny_folder, tmp_path):
    trainer = harness.trainer(BY_ID["simper"], tiny_folder, tmp_path, max_steps=1)
    (tmp_path / "checkpoint-3").mkdir()
    with pytest.raises(ValueError, match="no whole checkpoint in .*Leave it out"):
        trainer.train(resume_from_checkpoint=True)
    trainer.train(resume_from_checkpoint=False)
    assert trainer.state.global_step == 1
