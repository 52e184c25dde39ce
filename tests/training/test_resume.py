"""Resuming from the last checkpoint of a run that was killed while it wrote one."""

import json
import logging
import shutil

import harness
import pytest
import tiny
import torch
from methods import BY_ID
from peft import LoraConfig, get_peft_model
from transformers import Trainer


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


@pytest.mark.parametrize("method", ["fdpo", "simper"])
def test_a_run_that_is_complete_trains_no_further_step(method, tiny_folder, tmp_path):
    """
    Resumed from the checkpoint of its last step, once and again, a run has the weights and logs of the uninterrupted
    one.
    """

    def build():
        options = dict(
            max_steps=3, save_strategy="steps", save_steps=1, logging_steps=2, per_device_train_batch_size=2
        )
        return harness.trainer(BY_ID[method], tiny_folder, tmp_path / "run", train_dataset=tiny.dataset(32), **options)

    whole = build()
    whole.train()
    for _ in range(2):
        resumed = build()
        output = resumed.train(resume_from_checkpoint=True)
        assert resumed.state.global_step == output.global_step == 3
        assert harness.largest_difference(harness.weights(whole.model), harness.weights(resumed.model)) == 0
        harness.assert_same_logs(harness.logs(whole), harness.logs(resumed))
        assert harness.modes(whole.model) == harness.modes(resumed.model)
    assert not (tmp_path / "run" / "checkpoint-4").exists()


def test_a_checkpoint_written_anew_is_not_whole_until_it_is_written(tiny_folder, tmp_path, monkeypatch):
    """A run that dies while it overwrites a checkpoint of the same number leaves none that counts as whole."""
    options = dict(max_steps=2, save_strategy="steps", save_steps=2, per_device_train_batch_size=2)
    first = harness.trainer(BY_ID["fdpo"], tiny_folder, tmp_path, train_dataset=tiny.dataset(8), **options)
    first.train()
    assert first.last_whole_checkpoint() == str(tmp_path / "checkpoint-2")
    second = harness.trainer(BY_ID["fdpo"], tiny_folder, tmp_path, train_dataset=tiny.dataset(8), **options)

    def die(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(second, "_save_optimizer_and_scheduler", die)
    with pytest.raises(KeyboardInterrupt):
        second.train()
    assert (tmp_path / "checkpoint-2" / "optimizer.pt").exists()  # the old one's, beside new weights
    assert second.last_whole_checkpoint() is None


def test_every_adapter_of_a_checkpoint_is_loaded(tiny_folder, tmp_path, monkeypatch):
    """
    The policy's adapter is in the checkpoint's own folder and another in one below, of which Transformers 5.17 loads
    the second alone: here it loads none.
    """

    def build():
        model = get_peft_model(harness.load(tiny_folder), LoraConfig(target_modules=["q_proj"], r=2))
        model.add_adapter("other", LoraConfig(target_modules=["q_proj"], r=2))
        return harness.trainer(BY_ID["fdpo"], model, tmp_path, max_steps=1, save_strategy="steps", save_steps=1)

    trained = build()
    trained.train()
    checkpoint = tmp_path / "checkpoint-1"
    assert (checkpoint / "other" / "adapter_model.safetensors").exists()
    monkeypatch.setattr(Trainer, "_load_from_checkpoint", lambda self, folder, model=None: None)
    resumed = build()
    resumed._load_from_checkpoint(str(checkpoint))
    found, expected = (harness.weights(each.model) for each in (resumed, trained))
    policy = [name for name in expected if ".default." in name]
    assert max(expected[name].abs().max() for name in policy if "lora_B" in name) > 0
    assert all(torch.equal(found[name], expected[name]) for name in policy)
    assert {p.requires_grad for name, p in resumed.model.named_parameters() if ".default." in name} == {True}


def test_training_time_of_a_resumed_run(tiny_folder, tmp_path):
    """The card adds what came before the checkpoint, and says nothing where an older checkpoint does not tell."""

    def card(**options) -> str:
        given = dict(max_steps=2, save_strategy="steps", save_steps=1, per_device_train_batch_size=2)
        trainer = harness.trainer(BY_ID["simper"], tiny_folder, tmp_path, train_dataset=tiny.dataset(8), **given)
        trainer.train(**options)
        trainer.save_model()
        return (tmp_path / "README.md").read_text()

    assert "Training time: " in card()
    file = tmp_path / "checkpoint-1" / "trainer_state.json"
    state = json.loads(file.read_text())
    progress = state["stateful_callbacks"]["PreferenceProgress"]["args"]
    assert 0 < progress["seconds"] < 60
    progress["seconds"] = 7200.0
    harness.write_json(file, state)
    assert "Training time: 2:00:0" in card(resume_from_checkpoint=str(file.parent))
    del progress["seconds"]
    harness.write_json(file, state)
    assert "Training time" not in card(resume_from_checkpoint=str(file.parent))
