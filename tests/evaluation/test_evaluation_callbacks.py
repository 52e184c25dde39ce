"""The callbacks on a TRL trainer and on trainers of this project: their numbers, and that training does not notice them."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import harness
import numpy as np
import pytest
import tiny
import torch
from accelerate.utils import DistributedType
from datasets import Dataset
from methods import BY_ID
from peft import LoraConfig
from trl import DPOConfig, DPOTrainer

from trl_ext.evaluation import (
    FrontierCallback,
    RankingAccuracyCallback,
    SamplingSettings,
    WinRateCallback,
    sample_responses,
    score_pairs,
)


SETTINGS = SamplingSettings(max_new_tokens=5)


def longer(prompts, completions):
    return [float(len(completion)) for completion in completions]


def prefers_longer(prompts, completions_a, completions_b):
    return [
        0.5 if len(a) == len(b) else float(len(a) > len(b)) for a, b in zip(completions_a, completions_b, strict=True)
    ]


def build(kind, folder, tmp_path, **options):
    options = {"eval_strategy": "steps", "eval_steps": 2, "eval_dataset": tiny.dataset(12, seed=7), **options}
    if kind == "dpo":
        evaluation = options.pop("eval_dataset")
        peft_config = options.pop("peft_config", None)
        args = DPOConfig(**{**harness.defaults(tmp_path), **options})
        return DPOTrainer(
            folder, args=args, train_dataset=tiny.dataset(), eval_dataset=evaluation, peft_config=peft_config
        )
    return harness.trainer(BY_ID[kind], folder, tmp_path, **options)


def add_all(trainer):
    callbacks = [
        RankingAccuracyCallback(trainer),
        WinRateCallback(prefers_longer, trainer, num_prompts=6, settings=SETTINGS),
        FrontierCallback(longer, trainer, num_prompts=4, num_samples=2, settings=SETTINGS),
    ]
    for callback in callbacks:
        trainer.add_callback(callback)
    return callbacks


@pytest.mark.parametrize("kind, peft", [("dpo", False), ("dpo", True), ("fdpo", False), ("tdpo", True)])
def test_training_does_not_notice_them(kind, peft, tiny_folder, tmp_path):
    """
    With dropout and shuffling, so that every draw counts: the same weights, bit for bit, and the same logs but for what the
    callbacks add, at every evaluation. Saved checkpoints go on training likewise.
    """
    results = []
    for with_callbacks in (False, True):
        lora = LoraConfig(r=4, target_modules="all-linear", lora_dropout=0.2) if peft else None
        folder = tmp_path / str(with_callbacks)
        trainer = build(
            kind, tiny_folder, folder, peft_config=lora, eval_on_start=True, disable_dropout=False, max_steps=4
        )
        callbacks = add_all(trainer) if with_callbacks else []
        torch.manual_seed(0)
        trainer.train()
        results.append((harness.weights(trainer.model), harness.logs(trainer), callbacks, folder))
    (plain, plain_logs, *_), (watched, logs, callbacks, folder) = results
    assert all(torch.equal(plain[name], watched[name]) for name in plain)
    added = [
        entry for entry in logs if any(key.startswith(("eval_ranking/", "eval_win", "eval_front")) for key in entry)
    ]
    assert [entry for entry in logs if entry not in added] == plain_logs
    assert [entry["step"] for entry in added] == [0, 0, 0, 2, 2, 2, 4, 4, 4]  # three callbacks

    ranking, win_rate, frontier = (callback.history for callback in callbacks)
    assert [entry["step"] for entry in ranking] == [0, 2, 4]
    # At the start the policy is the reference: nothing flipped, KL 0, and with the same seeds every comparison is a tie.
    assert ranking[0]["eval_ranking/accuracy"] == ranking[0]["eval_ranking/reference_accuracy"]
    assert win_rate[0]["eval_win_rate"] == 0.5 and win_rate[0]["eval_win_rate/ties"] == 1.0
    assert frontier[0]["eval_frontier/kl"] == pytest.approx(0, abs=1e-6)
    assert frontier[-1]["eval_frontier/kl"] > 1e-4
    points = json.loads((folder / "frontier.json").read_text())
    assert [point["step"] for point in points] == [0, 2, 4]
    assert points[-1]["kl"]["n"] == 4 and points[-1]["kl"]["value"] == frontier[-1]["eval_frontier/kl"]


def test_the_numbers(tiny_folder, tmp_path):
    """After training, against the runners by hand; and a metric that the choice of the best model can name."""
    reference = tiny.model(seed=3)
    trainer = build("fdpo", tiny_folder, tmp_path, ref_model=reference)
    ranking = RankingAccuracyCallback(trainer, num_pairs=10)
    win_rate = WinRateCallback(prefers_longer, trainer, opponent="chosen", num_prompts=6, settings=SETTINGS)
    frontier = FrontierCallback(longer, trainer, num_prompts=5, num_samples=2, settings=SETTINGS)
    for callback in (ranking, win_rate, frontier):
        trainer.add_callback(callback)
    trainer.train()
    metrics = trainer.evaluate()

    scores = score_pairs(
        trainer.model,
        tiny.dataset(12, seed=7).select(range(10)),
        trainer.processing_class,
        reference=reference,
    )
    right = scores.chosen.logps >= scores.rejected.logps
    right_before = scores.chosen.ref_logps >= scores.rejected.ref_logps
    assert metrics["eval_ranking/accuracy"] == pytest.approx(right.mean())
    assert metrics["eval_ranking/reference_accuracy"] == pytest.approx(right_before.mean())
    assert metrics["eval_ranking/flipped"] == pytest.approx(right[~right_before].mean())
    assert metrics["eval_ranking/reward_accuracy"] == pytest.approx(
        (scores.chosen.logratios > scores.rejected.logratios).mean()
    )

    rows = tiny.rows(12, seed=7)[:6]
    texts = sample_responses(trainer.model, trainer.processing_class, [row["prompt"] for row in rows], SETTINGS).texts
    by_hand = prefers_longer(None, texts, [row["chosen"] for row in rows])
    assert metrics["eval_win_rate"] == pytest.approx(np.mean(by_hand))
    assert (
        metrics["eval_win_rate/low"] < metrics["eval_win_rate"] < metrics["eval_win_rate/high"] or np.ptp(by_hand) == 0
    )
    assert metrics["eval_win_rate/length"] == pytest.approx(np.mean([len(text) for text in texts]))
    assert metrics["eval_win_rate/opponent_length"] == pytest.approx(np.mean([len(row["chosen"]) for row in rows]))
    assert metrics["eval_frontier/kl"] > 0.01 and metrics["eval_frontier/entropy"] > 0
    # An evaluation outside of training looks again, though no step was taken.
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            parameter.mul_(0.5)
    assert trainer.evaluate()["eval_frontier/entropy"] > metrics["eval_frontier/entropy"]


def test_several_evaluation_datasets_are_one_evaluation(tiny_folder, tmp_path):
    trainer = build(
        "dpo", tiny_folder, tmp_path, eval_dataset={"a": tiny.dataset(8, seed=7), "b": tiny.dataset(8, seed=8)}
    )
    callback = RankingAccuracyCallback(trainer)
    trainer.add_callback(callback)
    trainer.train()
    assert [entry["step"] for entry in callback.history] == [2, 4]


def test_a_method_without_a_reference(tiny_folder, tmp_path):
    """SimPER keeps none: its own accuracy is logged, and what needs a reference says what to do, before the first step."""
    trainer = build("simper", tiny_folder, tmp_path, max_steps=2)
    trainer.add_callback(RankingAccuracyCallback(trainer))
    trainer.train()
    logged = [entry for entry in trainer.state.log_history if "eval_ranking/accuracy" in entry]
    assert len(logged) == 1 and "eval_ranking/flipped" not in logged[0]
    for callback in (
        WinRateCallback(prefers_longer, trainer, settings=SETTINGS),
        FrontierCallback(longer, trainer, settings=SETTINGS),
    ):
        fresh = build("simper", tiny_folder, tmp_path, max_steps=2)
        callback.trainer = fresh
        fresh.add_callback(callback)
        with pytest.raises(ValueError, match="keeps none"):
            fresh.train()
        assert fresh.state.global_step == 0


def test_frontier_goes_on_after_a_resume(tiny_folder, tmp_path):
    trainer = build("fdpo", tiny_folder, tmp_path, max_steps=4, save_strategy="steps", save_steps=2)
    trainer.add_callback(FrontierCallback(longer, trainer, num_prompts=4, settings=SETTINGS))
    trainer.train()
    whole = json.loads((tmp_path / "frontier.json").read_text())
    resumed = build("fdpo", tiny_folder, tmp_path, max_steps=4)
    resumed.add_callback(FrontierCallback(longer, resumed, num_prompts=4, settings=SETTINGS))
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert json.loads((tmp_path / "frontier.json").read_text()) == whole and len(whole) == 2


def test_two_processes(tiny_folder, tmp_path):
    """
    Each scores and judges a share (7 prompts: 4 and 3) of the same batches, and both know the whole: every pair's ranking and
    every greedy response's verdict are those of one process, and samples are of as many prompts.
    """
    tests = Path(__file__).resolve().parent.parent
    script = [str(tests / "scripts" / "run_callbacks.py"), tiny_folder]
    config = str(tests.parent / "recipes" / "accelerate" / "cpu_2proc.yaml")
    two = ["-m", "accelerate.commands.accelerate_cli", "launch", "--config_file", config, "--main_process_port", "0"]
    for name, launcher, batch_size in (("one", [], "4"), ("two", two, "2")):
        (tmp_path / name).mkdir()
        command = [sys.executable, *launcher, *script, str(tmp_path / name), batch_size]
        path = os.pathsep.join(filter(None, [str(tests.parent), os.environ.get("PYTHONPATH")]))
        subprocess.run(command, check=True, timeout=300, env={**os.environ, "PYTHONPATH": path})
    (one, first, second) = (
        json.loads((tmp_path / path).read_text())
        for path in ("one/process_0.json", "two/process_0.json", "two/process_1.json")
    )
    assert first == second
    for alone, shared in zip(one[:2], first[:2], strict=True):
        assert [entry.keys() for entry in alone] == [entry.keys() for entry in shared]
        for a, b in zip(alone, shared, strict=True):
            assert a == pytest.approx(b)
    points = json.loads((tmp_path / "two" / "frontier.json").read_text())
    assert [(point["step"], point["kl"]["n"]) for point in points] == [(2, 7)]
    assert points[0]["kl"]["value"] == pytest.approx(one[2][0]["eval_frontier/kl"], rel=0.5)


def test_bad_input(tiny_folder, tmp_path):
    trainer = build("dpo", tiny_folder, tmp_path)
    with pytest.raises(ValueError, match="truncate"):
        FrontierCallback(longer, trainer, settings=SamplingSettings(top_p=0.9))
    trainer.add_callback(WinRateCallback(prefers_longer, trainer, opponent="gold", settings=SETTINGS))
    with pytest.raises(ValueError, match="opponent='gold'"):
        trainer.evaluate()
    without = build("dpo", tiny_folder, tmp_path, eval_strategy="no", eval_dataset=None)
    callback = RankingAccuracyCallback(without)
    with pytest.raises(ValueError, match="has no data"):
        callback.measure(without.state)
    bare = Dataset.from_list([{"chosen": "a", "rejected": "b"}])
    with pytest.raises(ValueError, match="no column `prompt`"):
        WinRateCallback(prefers_longer, trainer, bare, settings=SETTINGS).measure(trainer.state)


@pytest.mark.parametrize("sharding", ["FSDP", "ZeRO-3"])
def test_sharded_weights_are_refused(sharding, tiny_folder, tmp_path, monkeypatch):
    """In the constructor, with what to do instead; ZeRO-2, whose processes hold whole weights, is not."""
    trainer = build("dpo", tiny_folder, tmp_path)
    accelerator = trainer.accelerator
    if sharding == "FSDP":
        monkeypatch.setattr(type(accelerator), "distributed_type", DistributedType.FSDP)
    else:
        plugin = SimpleNamespace(zero_stage=2)
        monkeypatch.setattr(type(accelerator.state), "deepspeed_plugin", plugin, raising=False)
        RankingAccuracyCallback(trainer)
        plugin.zero_stage = 3
    for make in (
        lambda: RankingAccuracyCallback(trainer),
        lambda: WinRateCallback(prefers_longer, trainer, settings=SETTINGS),
        lambda: FrontierCallback(longer, trainer, settings=SETTINGS),
    ):
        with pytest.raises(ValueError, match=f"{sharding} shards.*trl-ext evaluate"):
            make()
