"""
The callbacks on a TRL trainer and on trainers of this project: their numbers, and that training does not notice them.
"""

import json
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
from launching import fork
from methods import BY_ID
from peft import LoraConfig
from transformers import EarlyStoppingCallback
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer

from trl_ext.evaluation import (
    FrontierCallback,
    Judge,
    JudgeError,
    RankingAccuracyCallback,
    RewardFunctionJudge,
    SamplingSettings,
    WinRateCallback,
    sample_responses,
    score_pairs,
    score_responses,
    score_samples,
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


@pytest.mark.parametrize(
    "kind, peft, checkpointing",
    [
        ("dpo", False, True),
        ("dpo", True, False),
        ("fdpo", False, False),
        ("tdpo", True, True),
    ],
)
def test_training_does_not_notice_them(kind, peft, checkpointing, tiny_folder, tmp_path):
    """
    With dropout and shuffling, so that every draw counts: the same weights, bit for bit, and the same logs but for
    what the callbacks add, at every evaluation. Saved checkpoints go on training likewise.
    """
    results = []
    for with_callbacks in (False, True):
        lora = LoraConfig(r=4, target_modules="all-linear", lora_dropout=0.2) if peft else None
        folder = tmp_path / str(with_callbacks)
        trainer = build(
            kind,
            tiny_folder,
            folder,
            peft_config=lora,
            eval_on_start=True,
            disable_dropout=False,
            max_steps=4,
            gradient_checkpointing=checkpointing,
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
    # At the start the policy is the reference: nothing flipped, KL 0, and with the same seeds every comparison is a
    # tie.
    assert ranking[0]["eval_ranking/accuracy"] == ranking[0]["eval_ranking/reference_accuracy"]
    assert win_rate[0]["eval_win_rate"] == 0.5 and win_rate[0]["eval_win_rate/ties"] == 1.0
    assert frontier[0]["eval_frontier/reverse_kl"] == pytest.approx(0, abs=1e-6)
    assert frontier[-1]["eval_frontier/reverse_kl"] > 1e-4
    points = json.loads((folder / "frontier.json").read_text())
    assert [point["step"] for point in points] == [0, 2, 4]
    assert (
        points[-1]["reverse_kl"]["n"] == 4
        and points[-1]["reverse_kl"]["value"] == frontier[-1]["eval_frontier/reverse_kl"]
    )


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
    assert metrics["eval_frontier/reverse_kl"] > 0.01 and metrics["eval_frontier/entropy"] > 0
    # An evaluation outside of training looks again, though no step was taken.
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            parameter.mul_(0.5)
    assert trainer.evaluate()["eval_frontier/entropy"] > metrics["eval_frontier/entropy"]


def ranking_numbers(chosen, rejected):
    """What `RankingAccuracyCallback` logs, by its definitions, of two `ScoredResponses`."""
    right, right_before = chosen.logps >= rejected.logps, chosen.ref_logps >= rejected.ref_logps
    lengths = chosen.mask.sum(1), rejected.mask.sum(1)
    gains = chosen.logps - chosen.ref_logps, rejected.logps - rejected.ref_logps
    found = {
        "accuracy": right.mean(),
        "accuracy_norm": (chosen.logps / lengths[0] >= rejected.logps / lengths[1]).mean(),
        "reference_accuracy": right_before.mean(),
        "reference_accuracy_norm": (chosen.ref_logps / lengths[0] >= rejected.ref_logps / lengths[1]).mean(),
        "reward_accuracy": (gains[0] > gains[1]).mean(),
        "flipped": right[~right_before].mean(),
        "unflipped": (~right[right_before]).mean(),
    }
    return {f"eval_ranking/{name}": pytest.approx(value, abs=1e-12) for name, value in found.items()}


def test_every_ranking_number(tiny_folder, tmp_path):
    """
    Each from log-probabilities and lengths alone, on responses where no two of them agree: what is mixed up is seen.
    """
    generator, reference = np.random.default_rng(0), tiny.model(seed=3)

    def ids(low, high):
        return generator.integers(5, 384, generator.integers(low, high)).tolist()

    names = {"prompt_ids": (2, 6), "chosen_ids": (4, 7), "rejected_ids": (4, 7)}
    pairs = [{name: ids(*limits) for name, limits in names.items()} for _ in range(97)]
    trainer = build("fdpo", tiny_folder, tmp_path, ref_model=reference)
    trainer.add_callback(RankingAccuracyCallback(trainer, pairs, batch_size=5))
    metrics = trainer.evaluate()
    scores = score_pairs(trainer.model, pairs, trainer.processing_class, reference=reference)
    expected = ranking_numbers(scores.chosen, scores.rejected)
    assert {name: value for name, value in metrics.items() if name.startswith("eval_ranking/")} == expected
    lengths = scores.rejected.lengths, scores.chosen.lengths  # the wrong way round
    swapped = [
        (chosen / lengths[0] >= rejected / lengths[1]).mean()
        for chosen, rejected in (
            (scores.chosen.logps, scores.rejected.logps),
            (scores.chosen.ref_logps, scores.rejected.ref_logps),
        )
    ]
    values = [approximate.expected for approximate in expected.values()]
    assert len({round(value, 6) for value in values + swapped}) == 9
    assert set(RankingAccuracyCallback.NAMES) == set(expected)


def test_models_are_measured_in_the_precision_of_their_weights(tiny_folder, tmp_path):
    """
    Trained under bfloat16 autocast, as TRL does by default, policy and reference are ranked, sampled and scored as the
    float32 models that they are; the trainer goes on under autocast.
    """
    pairs = tiny.dataset(12, seed=7)
    trainer = build("dpo", tiny_folder, tmp_path, bf16=True, eval_dataset=pairs)
    ranking = RankingAccuracyCallback(trainer)
    frontier = FrontierCallback(longer, trainer, num_prompts=4, settings=SETTINGS)
    trainer.add_callback(ranking)
    trainer.add_callback(frontier)
    trainer.train()
    policy, reference = harness.load(tiny_folder), harness.load(tiny_folder)
    policy.load_state_dict(trainer.model.state_dict())
    expected = score_pairs(policy, pairs, trainer.processing_class, reference=reference)
    for side, ours, theirs in zip(
        ("chosen", "rejected"), ranking._score(ranking.model), ranking._score(ranking.reference), strict=True
    ):
        assert ours == pytest.approx(getattr(expected, side).logps, abs=1e-5)
        assert theirs == pytest.approx(getattr(expected, side).ref_logps, abs=1e-5)
    prompts = [row["prompt"] for row in tiny.rows(4, seed=7)]
    samples = sample_responses(policy, trainer.processing_class, prompts, SETTINGS)
    kl = score_samples(policy, samples, reference=reference, divergences=["reverse_kl"]).divergence("reverse_kl")
    assert frontier.history[-1]["eval_frontier/reverse_kl"] == pytest.approx(kl.mean(), abs=1e-5)
    # The models are still prepared: their own forwards are bfloat16's.
    ids = torch.tensor([trainer.processing_class(text=prompts[0])["input_ids"]])
    with torch.no_grad():
        for prepared, exact in ((trainer.model, policy), (trainer.ref_model, reference)):
            assert (prepared(input_ids=ids).logits - exact(input_ids=ids).logits).abs().max() > 1e-3


def test_half_precision_weights_keep_their_autocast(tiny_folder):
    """Layers of two precisions work together under autocast alone."""
    from accelerate import Accelerator

    model = harness.load(tiny_folder)
    model.lm_head.to(torch.bfloat16)
    accelerator = Accelerator(cpu=True, mixed_precision="bf16")
    accelerator.prepare_model(model)
    assert np.isfinite(score_responses(model, [[5, 6]], [[7, 8]]).logps).all()


def test_reference_log_probabilities_that_were_precomputed(tiny_folder, tmp_path, caplog):
    """
    The evaluation dataset holds them, and they are used; where they are of other tokens, it is said what is left out.
    """
    pairs = tiny.dataset(31, seed=7)
    options = dict(precompute_ref_log_probs=True, eval_dataset=pairs, learning_rate=3e-2)
    for kind in ("dpo", "fdpo"):
        trainer = build(kind, tiny_folder, tmp_path / kind, **options)
        callback = RankingAccuracyCallback(trainer, num_pairs=30)
        assert callback.reference is None
        trainer.add_callback(callback)
        trainer.train()
        scores = score_pairs(
            trainer.model,
            pairs.select(range(30)),
            trainer.processing_class,
            reference=harness.load(tiny_folder),
        )
        found = {name: value for name, value in callback.history[-1].items() if name != "step"}
        assert found == ranking_numbers(scores.chosen, scores.rejected)
        assert "leaves out" not in caplog.text
    for other in (RankingAccuracyCallback(trainer, pairs), RankingAccuracyCallback(trainer, max_length=12)):
        caplog.clear()
        assert other.measure(trainer.state).keys() == {"eval_ranking/accuracy", "eval_ranking/accuracy_norm"}
        assert "leaves out what compares with the reference" in caplog.text


def test_a_reference_that_moves(tiny_folder, tmp_path):
    """
    With `sync_ref_model` every callback compares with the trainer's reference of that moment, or with the one given.
    """
    trainer = build(
        "dpo",
        tiny_folder,
        tmp_path,
        sync_ref_model=True,
        ref_model_sync_steps=2,
        ref_model_mixup_alpha=1.0,
        eval_on_start=True,
        learning_rate=3e-2,
    )
    callbacks = add_all(trainer)
    fixed = RankingAccuracyCallback(trainer, reference=harness.load(tiny_folder))
    trainer.add_callback(fixed)
    trainer.train()
    moving, win_rate, frontier = (callback.history for callback in callbacks)
    start, last = fixed.history[0], fixed.history[-1]
    # At each evaluation the reference has just become the policy.
    for entry in moving:
        assert entry["eval_ranking/reference_accuracy"] == entry["eval_ranking/accuracy"]
    assert [entry["eval_win_rate/ties"] for entry in win_rate] == [1.0, 1.0, 1.0]
    assert [entry["eval_frontier/reverse_kl"] for entry in frontier] == pytest.approx([0, 0, 0], abs=1e-6)
    assert last["eval_ranking/reference_accuracy_norm"] == start["eval_ranking/accuracy_norm"]
    assert last["eval_ranking/accuracy_norm"] > start["eval_ranking/accuracy_norm"] + 0.3


class Scripted(Judge):
    """A judge whose win rates are those of a list, one an evaluation, or a failure."""

    name, symmetric = "scripted", True

    def __init__(self, values):
        self.values = iter(values)

    def __call__(self, prompts, completions_a, completions_b):
        value = next(self.values)
        if isinstance(value, Exception):
            raise value
        return [value] * len(prompts)


@pytest.mark.parametrize("early_stopping", ["before", "after"])
@pytest.mark.parametrize("failing", [False, True])
def test_other_callbacks_see_their_numbers(early_stopping, failing, tiny_folder, tmp_path, caplog):
    """
    Early stopping and the best checkpoint go by a win rate, in whatever order the callbacks were added: it is best at
    step 4, and training stops at 6. A judge that fails at step 2 is no better than what comes after, and does not stop
    the run.
    """
    trainer = build(
        "dpo",
        tiny_folder,
        tmp_path,
        max_steps=12,
        save_strategy="steps",
        save_steps=2,
        load_best_model_at_end=True,
        metric_for_best_model="eval_win_rate",
        greater_is_better=True,
    )
    values = [JudgeError("HTTP 503") if failing else 0.25, 0.75, 0.5, 1.0, 1.0, 1.0]
    ours = [
        RankingAccuracyCallback(trainer),
        WinRateCallback(Scripted(values), trainer, opponent="chosen", num_prompts=4, settings=SETTINGS),
    ]
    stopping = EarlyStoppingCallback(1)
    for callback in [stopping, *ours] if early_stopping == "before" else [*ours, stopping]:
        trainer.add_callback(callback)
    others = [type(c) for c in trainer.callback_handler.callbacks if c not in ours]
    trainer.train()
    assert trainer.state.global_step == 6
    assert (trainer.state.best_global_step, trainer.state.best_metric) == (4, 0.75)
    best = harness.load(tmp_path / "checkpoint-4").state_dict()
    assert all(torch.equal(best[name], weight) for name, weight in trainer.model.state_dict().items())
    assert trainer.callback_handler.callbacks[:2] == ours
    assert [type(c) for c in trainer.callback_handler.callbacks[2:]] == others


@pytest.mark.parametrize("judge", ["fails", "silent"])
def test_a_judge_that_fails_costs_a_point(judge, tiny_folder, tmp_path, caplog):
    """
    It is told once an evaluation, with the reason; nothing is logged for it, and the run goes on, the others' numbers
    too.
    """
    failure = JudgeError("HTTP 503") if judge == "fails" else None
    trainer = build("dpo", tiny_folder, tmp_path, eval_dataset={"a": tiny.dataset(8, seed=7), "b": tiny.dataset(8)})

    def rewards(prompts, completions, values=iter([failure, 1.0])):  # noqa: B008
        value = next(values)
        if isinstance(value, Exception):
            raise value
        return [value] * len(prompts)

    options = dict(num_prompts=4, settings=SETTINGS)
    ranking = RankingAccuracyCallback(trainer)
    win_rate = WinRateCallback(Scripted([failure, 1.0]), trainer, opponent="chosen", **options)
    frontier = FrontierCallback(rewards, trainer, **options)
    for callback in (ranking, win_rate, frontier):
        trainer.add_callback(callback)
    trainer.train()
    steps = [[entry["step"] for entry in callback.history] for callback in (ranking, win_rate, frontier)]
    assert steps == [[2, 4], [4], [4]]
    logged = {entry["step"] for entry in trainer.state.log_history if "eval_win_rate" in entry}
    assert logged == {4} and [point["step"] for point in frontier.points] == [4]
    warnings = [record.getMessage() for record in caplog.records if "training goes on" in record.getMessage()]
    reason = "HTTP 503" if judge == "fails" else "no "
    assert [warning.split("`")[1] for warning in warnings] == ["WinRateCallback", "FrontierCallback"]
    assert all("at step 2" in warning and reason in warning for warning in warnings)


def test_a_judge_that_is_broken_ends_the_run(tiny_folder, tmp_path):
    """An error that is none of a judge's is a bug, with its own traceback."""
    trainer = build("dpo", tiny_folder, tmp_path)
    callback = WinRateCallback(Scripted([ZeroDivisionError("oops")]), trainer, opponent="chosen", settings=SETTINGS)
    trainer.add_callback(callback)
    with pytest.raises(ZeroDivisionError, match="oops"):
        trainer.train()


def test_columns_and_missing_rewards(tiny_folder, tmp_path):
    """
    Reward functions get the columns of each prompt's row, once a sample; a column that is not there ends the run
    before it.
    """
    rows = [{**row, "solution": i} for i, row in enumerate(tiny.rows(6, seed=7))]
    trainer = build("dpo", tiny_folder, tmp_path, eval_dataset=Dataset.from_list(rows))
    seen = []

    def reward(prompts, completions, solution, chosen):
        seen.extend(zip(prompts, solution, chosen, strict=True))
        return [None if right == 2 else float(right) for right in solution]

    options = dict(num_prompts=5, settings=SETTINGS)
    frontier = FrontierCallback(reward, trainer, num_samples=2, **options)
    win_rate = WinRateCallback(RewardFunctionJudge(reward), trainer, **options)
    assert frontier.measure(trainer.state)["eval_frontier/reward"].value == (0 + 1 + 3 + 4) / 4
    assert frontier.points[0]["reward"]["n"] == 4 and frontier.points[0]["reverse_kl"]["n"] == 5
    expected = [(row["prompt"], row["solution"], row["chosen"]) for row in rows[:5]]
    assert seen == [entry for entry in expected for _ in range(2)]
    seen.clear()
    assert win_rate.measure(trainer.state)["eval_win_rate/judged"] == 0.8
    assert seen == expected * 2
    fresh = build("dpo", tiny_folder, tmp_path)
    fresh.add_callback(WinRateCallback(RewardFunctionJudge(reward), fresh, **options))
    with pytest.raises(ValueError, match="needs the column `solution`"):
        fresh.train()
    assert fresh.state.global_step == 0


def test_under_sft(tiny_folder, tmp_path):
    """
    A trainer that keeps no reference and logs by TRL's rules: with data and a reference given, every number is there.
    """
    rows = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in tiny.rows(8)]
    args = SFTConfig(**harness.defaults(tmp_path), eval_strategy="steps", eval_steps=2)
    trainer = SFTTrainer(
        tiny_folder, args=args, train_dataset=Dataset.from_list(rows), eval_dataset=Dataset.from_list(rows)
    )
    pairs, reference = tiny.dataset(12, seed=7), harness.load(tiny_folder)
    callbacks = [
        RankingAccuracyCallback(trainer, pairs, reference=reference),
        WinRateCallback(prefers_longer, trainer, reference=reference, num_prompts=4, settings=SETTINGS),
        FrontierCallback(longer, trainer, reference=reference, num_prompts=4, settings=SETTINGS),
    ]
    for callback in callbacks:
        trainer.add_callback(callback)
    trainer.train()
    for callback in callbacks:
        assert [entry["step"] for entry in callback.history] == [2, 4]
        assert set(callback.history[-1]) - {"step"} <= set(callback.NAMES)
    logged = [entry for entry in trainer.state.log_history if "eval_loss" in entry]
    assert len(logged) == 2 and all("eval_mean_token_accuracy" in entry for entry in logged)
    scores = score_pairs(trainer.model, pairs, trainer.processing_class, reference=reference)
    accuracy = (scores.chosen.logps >= scores.rejected.logps).mean()
    assert callbacks[0].history[-1]["eval_ranking/accuracy"] == pytest.approx(accuracy)
    assert callbacks[2].history[-1]["eval_frontier/reverse_kl"] > 1e-4


def test_under_grpo(tiny_folder, tmp_path, capsys):
    """
    The table of completions is printed once a log of the trainer's own, and its metrics stay with its evaluation.
    """
    options = harness.defaults(tmp_path) | dict(max_steps=2, num_generations=2, max_completion_length=4, beta=0.1)
    args = GRPOConfig(**options, eval_strategy="steps", eval_steps=2, log_completions=True)

    def reward(prompts, completions, **kwargs):
        return [float(len(completion)) for completion in completions]

    rows = tiny.dataset(4).select_columns(["prompt"])
    tables = []
    for with_callbacks in (False, True):
        trainer = GRPOTrainer(tiny_folder, reward_funcs=reward, args=args, train_dataset=rows, eval_dataset=rows)
        if with_callbacks:
            trainer.add_callback(RankingAccuracyCallback(trainer, tiny.dataset(6, seed=7)))
            trainer.add_callback(
                WinRateCallback(RewardFunctionJudge(reward), trainer, num_prompts=4, settings=SETTINGS)
            )
            trainer.add_callback(FrontierCallback(reward, trainer, num_prompts=4, settings=SETTINGS))
        trainer.train()
        tables.append(capsys.readouterr().out.count("Step 2"))
        evaluations = [entry for entry in trainer.state.log_history if "eval_reward" in entry]
        assert len(evaluations) == 1
    assert tables[0] == tables[1] > 0
    names = set().union(*trainer.state.log_history)
    assert {"eval_win_rate", "eval_frontier/reverse_kl", "eval_ranking/reward_accuracy"} <= names


def test_several_evaluation_datasets_are_one_evaluation(tiny_folder, tmp_path):
    trainer = build(
        "dpo", tiny_folder, tmp_path, eval_dataset={"a": tiny.dataset(8, seed=7), "b": tiny.dataset(8, seed=8)}
    )
    callback = RankingAccuracyCallback(trainer)
    trainer.add_callback(callback)
    trainer.train()
    assert [entry["step"] for entry in callback.history] == [2, 4]


def test_a_method_without_a_reference(tiny_folder, tmp_path):
    """
    SimPER keeps none: its own accuracy is logged, and what needs a reference says what to do, before the first step.
    """
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


def test_the_frontier_has_one_point_a_step(tiny_folder, tmp_path):
    """
    An evaluation after training measures the last step again, in place of it; one of another trainer leaves the points
    that are there; training from the start begins anew. What is infinite is null, which any JSON reader reads.
    """

    def read():
        refuse = pytest.fail
        points = json.loads((tmp_path / "frontier.json").read_text(), parse_constant=refuse)
        return {point["step"]: point for point in points}

    options = dict(num_prompts=1, settings=SETTINGS)
    trainer = build("dpo", tiny_folder, tmp_path, max_steps=4)
    trainer.add_callback(FrontierCallback(longer, trainer, **options))
    trainer.train()
    whole = read()
    assert list(whole) == [2, 4]
    assert whole[4]["reverse_kl"]["low"] is None and whole[4]["reverse_kl"]["n"] == 1
    trainer.evaluate()
    assert read() == whole and len(json.loads((tmp_path / "frontier.json").read_text())) == 2
    other = build("dpo", tiny_folder, tmp_path, max_steps=2)
    other.add_callback(FrontierCallback(longer, other, **options))
    other.evaluate()
    before = read()
    assert list(before) == [0, 2, 4] and {step: before[step] for step in (2, 4)} == whole
    other.train()
    assert list(read()) == [0, 2] and read()[0] == before[0]
    assert [path.name for path in tmp_path.glob("frontier*")] == ["frontier.json"]


def test_a_disk_that_is_full_costs_no_training(tiny_folder, tmp_path, monkeypatch, caplog):
    """The point that could not be written is written with the next one."""
    from trl_ext.evaluation import callbacks

    replace, calls = callbacks.os.replace, []

    def full(*args):
        calls.append(None)
        if len(calls) == 1:
            raise OSError("No space left on device")
        replace(*args)

    trainer = build("dpo", tiny_folder, tmp_path, max_steps=4)
    trainer.add_callback(FrontierCallback(longer, trainer, num_prompts=1, settings=SETTINGS))
    monkeypatch.setattr(callbacks.os, "replace", full)
    trainer.train()
    assert "frontier.json` was not written, and training goes on: No space left on device" in caplog.text
    assert [point["step"] for point in json.loads((tmp_path / "frontier.json").read_text())] == [2, 4]


@pytest.mark.parametrize("engine", ["none", "fsdp2"])
def test_two_processes(engine, tiny_folder, tmp_path):
    """
    Each scores and judges a share (7 prompts: 4 and 3) of the same batches, and both know the whole: every pair's
    ranking and every greedy response's verdict are those of one process, and samples are of as many prompts. Under
    FSDP2, too: policy and reference are whole while they are measured, and sharded in training.
    """
    script = Path(__file__).resolve().parent.parent / "scripts" / "run_callbacks.py"
    for name, processes, *options in (("one", 1, "4"), ("two", 2, "2", engine)):
        (tmp_path / name).mkdir()
        printed = fork(script, tiny_folder, str(tmp_path / name), *options, processes=processes)
        assert printed.count("measured nothing at step 2, and training goes on: HTTP 503") == 1
    (one, first, second) = (
        json.loads((tmp_path / path).read_text())
        for path in ("one/process_0.json", "two/process_0.json", "two/process_1.json")
    )
    assert first == second
    assert one[3] == first[3] == []  # a judge that fails in one process costs the point in both, and nobody waits
    for alone, shared in zip(one[:2], first[:2], strict=True):
        assert [entry.keys() for entry in alone] == [entry.keys() for entry in shared]
        for a, b in zip(alone, shared, strict=True):
            assert a == pytest.approx(b)
    points = json.loads((tmp_path / "two" / "frontier.json").read_text())
    assert [(point["step"], point["reverse_kl"]["n"]) for point in points] == [(2, 7), (3, 7)]
    assert points[0]["reverse_kl"]["value"] == pytest.approx(one[2][0]["eval_frontier/reverse_kl"], rel=0.5)


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


@pytest.mark.parametrize("sharding", ["FSDP1", "ZeRO-3"])
def test_weights_that_cannot_be_gathered_are_refused(sharding, tiny_folder, tmp_path, monkeypatch):
    """In the constructor, with what to do instead; ZeRO-2, whose processes hold whole weights, and FSDP2 are not."""
    trainer = build("dpo", tiny_folder, tmp_path)
    accelerator = trainer.accelerator
    if sharding == "FSDP1":
        monkeypatch.setattr(type(accelerator), "distributed_type", DistributedType.FSDP)
        monkeypatch.setattr(type(accelerator), "is_fsdp2", True)
        RankingAccuracyCallback(trainer)
        monkeypatch.setattr(type(accelerator), "is_fsdp2", False)
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
        with pytest.raises(ValueError, match=f"under.*{sharding}.*Use FSDP2.*trl-ext evaluate"):
            make()


@pytest.mark.parametrize("kind", [RankingAccuracyCallback, WinRateCallback, FrontierCallback])
def test_a_missing_extra_is_named_by_the_constructor(kind, tiny_folder, tmp_path, monkeypatch):
    trainer = build("fdpo", tiny_folder, tmp_path)
    monkeypatch.setitem(sys.modules, "scipy", None)
    with pytest.raises(ImportError, match=rf"`{kind.__name__}`.*`scipy`.*trl-ext\[evaluation\]"):
        kind(*() if kind is RankingAccuracyCallback else (longer,), trainer=trainer)
