"""The WRO trainer: its anchors, its win rate in evaluation, whole groups, and the optimum on enumerated responses."""

import math

import enumerated
import harness
import pytest
import tiny
import torch
from datasets import Dataset

from trl_ext.evaluation import SamplingSettings, WinRateCallback
from trl_ext.wro import WROConfig, WROTrainer, anchors


def longer(prompts, completions_a, completions_b):
    lengths = ((len(a), len(b)) for a, b in zip(completions_a, completions_b, strict=True))
    return [1.0 if a > b else 0.0 if a < b else 0.5 for a, b in lengths]


def another(prompts, completions_a, completions_b):
    return [0.5] * len(prompts)


def make(folder, out, judge=longer, train_dataset=None, eval_dataset=None, **options):
    defaults = harness.defaults(out) | dict(
        per_device_train_batch_size=8,
        per_device_eval_batch_size=8,
        num_generations=4,
        max_completion_length=4,
        num_anchors=2,
        max_steps=2,
    )
    data = tiny.dataset(8).select_columns(["prompt"]) if train_dataset is None else train_dataset
    args = WROConfig(**(defaults | options))
    return WROTrainer(folder, [], args, data, eval_dataset, judge=judge)


def test_anchors_are_the_references_and_kept(tiny_folder, tmp_path, monkeypatch):
    """Training and evaluation sets get a column; another run of the same reference samples nothing."""
    calls = []
    original = anchors.add_anchors

    def counted(*args, **kwargs):
        calls.append(1)
        return original(*args, **kwargs)

    monkeypatch.setattr(anchors, "add_anchors", counted)
    held_out = tiny.dataset(4, seed=1).select_columns(["prompt"])
    trainer = make(tiny_folder, tmp_path / "a", eval_dataset=held_out, anchor_cache_dir=str(tmp_path / "kept"))
    assert len(calls) == 2 and len(trainer.train_dataset["anchors"][0]) == 2
    assert len(trainer.eval_dataset["anchors"]) == 4
    files = sorted((tmp_path / "kept").iterdir())
    again = make(tiny_folder, tmp_path / "b", eval_dataset=held_out, anchor_cache_dir=str(tmp_path / "kept"))
    assert sorted((tmp_path / "kept").iterdir()) == files
    assert again.train_dataset["anchors"] == trainer.train_dataset["anchors"]
    with_anchors = tiny.dataset(8).select_columns(["prompt"]).add_column("anchors", [["x"]] * 8)
    own = make(tiny_folder, tmp_path / "c", train_dataset=with_anchors)
    assert own.train_dataset["anchors"][0] == ["x"] and len(calls) == 4


def test_the_win_rate_of_an_evaluation(tiny_folder, tmp_path):
    """
    `evaluate` returns it with the ends of its interval, so that it chooses the best checkpoint; it is the mean over
    prompts of what a judge says of each one's completions.
    """
    held_out = tiny.dataset(5, seed=1).select_columns(["prompt"])
    trainer = make(
        tiny_folder,
        tmp_path,
        eval_dataset=held_out,
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        metric_for_best_model="eval_win_rate/reference",
        greater_is_better=True,
        load_best_model_at_end=True,
    )
    rewards, original = [], trainer._calculate_rewards

    def keep(inputs, prompts, completions, ids):
        found = original(inputs, prompts, completions, ids)
        if not trainer.model.training:
            rewards.append(found[:, 0])
        return found

    trainer._calculate_rewards = keep
    metrics = trainer.evaluate()
    whole = torch.cat(rewards).view(5, 4)
    assert metrics["eval_win_rate/reference"] == pytest.approx(whole.mean().item())
    low, high = metrics["eval_win_rate/reference_low"], metrics["eval_win_rate/reference_high"]
    half = 2.776 * whole.mean(1).std().item() / 5**0.5  # Student's t with 4 degrees of freedom
    value = metrics["eval_win_rate/reference"]
    assert low == pytest.approx(max(0, value - half), abs=2e-3) and high == pytest.approx(
        min(1, value + half), abs=2e-3
    )
    trainer.train()
    rates = {
        entry["step"]: entry["eval_win_rate/reference"] for entry in trainer.state.log_history if "eval_loss" in entry
    }
    assert trainer.state.best_metric == max(rates[1], rates[2])


@pytest.mark.parametrize("anchors", ["self", "column"])
def test_other_anchors(tiny_folder, tmp_path, anchors):
    """No anchors are sampled; the card says what the opponents are, and who judges."""
    data = tiny.dataset(8).select_columns(["prompt", "chosen"])
    more = {"anchor_column": "chosen"} if anchors == "column" else {}
    trainer = make(tiny_folder, tmp_path, train_dataset=data, eval_dataset=data, anchors=anchors, max_steps=1, **more)
    trainer.train()
    metrics = trainer.evaluate()
    assert not (tmp_path / "anchors").exists() and "anchors" not in trainer.train_dataset.column_names
    assert ("eval_win_rate/chosen" in metrics) == (anchors == "column")
    trainer.save_model()
    card = (tmp_path / "README.md").read_text()
    assert "longer" in card and ("not the reference" if anchors == "column" else "of the group") in card


def test_self_play_is_evaluated_by_a_callback(tiny_folder, tmp_path, caplog):
    """
    Against itself a policy wins half of the time. The callback's opponent is the reference; its judge should be another
    one.
    """
    data = tiny.dataset(8).select_columns(["prompt"])
    options = dict(eval_dataset=data, eval_strategy="steps", eval_steps=1, max_steps=1, save_strategy="steps")
    options |= dict(save_steps=1, load_best_model_at_end=True, metric_for_best_model="eval_win_rate")
    for judge in (longer, another):
        caplog.clear()
        trainer = make(tiny_folder, tmp_path / judge.__name__, train_dataset=data, anchors="self", **options)
        settings = SamplingSettings(max_new_tokens=4)
        trainer.add_callback(WinRateCallback(judge, trainer, num_prompts=4, settings=settings))
        trainer.train()
        (logged,) = harness.column(trainer, "eval_win_rate")
        assert 0 <= logged <= 1 and trainer.state.best_metric == logged
        assert not harness.column(trainer, "eval_win_rate/self")
        assert ("whose verdicts are optimized" in caplog.text) == (judge is longer)


# ---- The optimum on enumerated responses ----------------------------------------------------------------------------

BETA = 0.4


def words(text) -> int:
    return sum(not character.isspace() for character in text)


# Words of every response as a judge reads it.
SAID = torch.tensor([float(sum(token != 0 for token in ids)) for ids in enumerated.RESPONSES], dtype=torch.float64)


def shorter(prompts, completions_a, completions_b):
    pairs = zip(completions_a, completions_b, strict=True)
    return [1 / (1 + math.exp(2 * (words(a) - words(b)))) for a, b in pairs]


def train_to_the_optimum(tmp_path, optimum_of, steps, responses, drawn_evenly=True, **options):
    """
    Trains the enumerable policy. Returns the optimum's KL to policy before and after, and the total variation after.
    """
    folder = enumerated.save(tmp_path / "model")
    reference = enumerated.log_probs(enumerated.model(0)).detach()
    options = enumerated.to_the_optimum(steps, responses) | options
    prompts = Dataset.from_dict({"prompt": ["c"] * max(64, responses // options["num_generations"])})
    trainer = make(folder, tmp_path / "out", judge=shorter, train_dataset=prompts, beta=BETA, **options)
    if drawn_evenly:
        enumerated.draw_evenly(trainer)
    optimum = optimum_of(trainer, reference)
    before = enumerated.kl(enumerated.log_probs(trainer.model).detach(), optimum)
    trainer.train()
    after = enumerated.log_probs(trainer.model).detach()
    return before, enumerated.kl(after, optimum), enumerated.total_variation(after, optimum)


def against_anchors(trainer, reference):
    """`pi_ref exp(q / beta) / Z`, q the win rate against the anchors that the trainer sampled."""
    found = {tuple(map(words, row)) for row in trainer.train_dataset["anchors"]}
    assert len(found) == 1  # one prompt
    anchors = torch.tensor(found.pop(), dtype=torch.float64)
    return (reference + torch.sigmoid(2 * (anchors - SAID[:, None])).mean(1) / BETA).log_softmax(0)


def against_itself(beta):
    """The regularized Nash policy: the fixed point of `pi = pi_ref exp(E_pi p(y, .) / beta) / Z`."""

    def optimum(trainer, reference):
        wins = torch.sigmoid(2 * (SAID - SAID[:, None]))
        policy = reference
        for _ in range(500):
            policy = (0.9 * policy + 0.1 * (reference + wins @ policy.exp() / beta)).log_softmax(0)
        return policy

    return optimum


def test_training_reaches_the_closed_form(tmp_path):
    """
    85 enumerated responses, a judge to which shorter is better. Less than 5 % of the KL to `pi_ref exp(q / beta) / Z`
    is left after 100 steps of 128 responses.
    """
    before, after, variation = train_to_the_optimum(
        tmp_path, against_anchors, 100, 128, num_anchors=8, both_orders=False
    )
    assert before > 0.05 and after < 0.05 * before and variation < 0.04


@pytest.mark.slow
def test_sampled_responses_reach_the_closed_form(tmp_path):
    """As users train: responses that are really sampled, eight to a prompt."""
    options = dict(num_anchors=8, both_orders=False, num_generations=8, drawn_evenly=False)
    before, after, variation = train_to_the_optimum(tmp_path, against_anchors, 300, 128, **options)
    print(f"KL {before:.4f} -> {after:.5f}, TV {variation:.4f}")
    assert after < 0.05 * before and variation < 0.04


@pytest.mark.slow
def test_self_play_reaches_the_nash_policy(tmp_path):
    """
    Groups of two, where a leave-one-out baseline makes wins twice too large: the trainer arrives at the fixed point at
    beta, and not at that at beta / 2, which is where it arrives without the factor.
    """
    options = dict(anchors="self", num_generations=2, drawn_evenly=False)
    before, after, variation = train_to_the_optimum(tmp_path, against_itself(BETA), 300, 256, **options)
    print(f"KL {before:.4f} -> {after:.5f}, TV {variation:.4f}")
    reference = enumerated.log_probs(enumerated.model(0)).detach()
    apart = enumerated.total_variation(*(against_itself(at)(None, reference) for at in (BETA, BETA / 2)))
    assert variation < 0.05 < 0.15 < apart and after < 0.1 * before


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (dict(anchors="nobody"), "`anchors`.*nobody"),
        (dict(anchors="column"), "`anchors='column'` needs `anchor_column`"),
        (dict(anchors="self", num_generations_eval=1), "`num_generations_eval=1`"),
        (dict(anchors="self", h="log"), "`h='log'` is not supported"),
        (dict(h="cube"), "`h`.*cube"),
        (dict(h_clip=0.7), "`h_clip`.*0.7"),
        (dict(num_anchors=0), "`num_anchors`.*0"),
        (dict(beta=0.0), "`beta`.*0"),
        (dict(normalize_advantages=True), "`normalize_advantages=True`"),
        (dict(reward_clip_range=(0.0, 1.0)), "`reward_clip_range"),
        (dict(temperature=0.7), "`temperature=0.7`"),
        (dict(top_p=0.9), "`top_p=0.9`"),
        (dict(top_k=50), "`top_k=50`"),
        (dict(min_p=0.1), "`min_p=0.1`"),
        (dict(repetition_penalty=1.2), "`repetition_penalty=1.2`"),
        (dict(generation_kwargs={"typical_p": 0.9}), "`generation_kwargs"),
        (dict(mask_truncated_completions=True), "`mask_truncated_completions=True`"),
        (dict(sync_ref_model=True), "`sync_ref_model=True`"),
    ],
)
def test_bad_options(options, told, tmp_path):
    with pytest.raises(ValueError, match=told):
        WROConfig(str(tmp_path), use_cpu=True, bf16=False, **options)


def test_bad_arguments(tiny_folder, tmp_path):
    with pytest.raises(ValueError, match="`judge` is required"):
        make(tiny_folder, tmp_path, judge=None)
    data = tiny.dataset(8).select_columns(["prompt"])
    trainer = make(tiny_folder, tmp_path, train_dataset=data, anchors="column", anchor_column="chosen")
    with pytest.raises(ValueError, match="'chosen'.*Name one of them"):
        trainer.train()
