"""D2PO's rounds: what is sampled, bought, learned and trained on, in every mode; and what is refused."""

import copy
import dataclasses
import json
import logging
import math
import pickle
import re

import harness
import methods
import online
import pytest
import tiny
import torch
from datasets import Dataset, IterableDataset
from methods import BY_ID
from online import CountedLabeller
from peft import LoraConfig
from test_labellers import reward_model
from transformers import BitsAndBytesConfig, TrainerCallback
from trl import TrlParser

from trl_ext import (
    D2POConfig,
    D2POTrainer,
    FDPOTrainer,
    MallowsDPOTrainer,
    RainbowPOTrainer,
    SimPERTrainer,
    TDPOConfig,
    TDPOTrainer,
)
from trl_ext.d2po import LabellerError, Ledger, RewardFunctionLabeller, ledger_to_dataset
from trl_ext.d2po.loss_options import method_options
from trl_ext.d2po.prompts import PromptError, tokenize_prompt
from trl_ext.d2po.window import Completion, Pair, Window, WindowSampler, order_pair, select_pairs
from trl_ext.judges import RewardFunctionJudge
from trl_ext.preference.method import get_method
from trl_ext.training.sampling import SeededSampling, end_token_ids


def decisive(prompts, completions, **columns) -> list[float]:
    """A gold reward without ties: any two texts differ in it."""
    texts = (c if isinstance(c, str) else c[0]["content"] for c in completions)
    return [sum(letter in "aeiou" for letter in text) + (hash_of(text) % 997) / 1000 for text in texts]


def hash_of(text: str) -> int:
    return int.from_bytes(text.encode(), "big")


def windows_of(trainer) -> list[list[Pair]]:
    """Records the pairs of every window as the trainer orders them, beside the batches that it trains on."""
    windows, label = [], trainer.rounds._label

    def recorded(pairs, *rest):
        windows.append(pairs)
        return label(pairs, *rest)

    trainer.rounds._label = recorded
    return windows


def batches_of(trainer) -> list[dict]:
    batches, compute_loss = [], trainer.compute_loss

    def recorded(model, inputs, *args, **kwargs):
        if model.training:
            batches.append(inputs)
        return compute_loss(model, inputs, *args, **kwargs)

    trainer.compute_loss = recorded
    return batches


# ---- Parts ----------------------------------------------------------------------------------------------------------


def pair(margin=None, verdict=None, spread=None, number=0):
    scores = None if margin is None else [margin, 0.0]
    first, second = Completion([1, number], "a"), Completion([2, number], "b")
    return Pair("p", [0], first, second, {}, scores, spread, verdict, verdict is not None)


def test_selection():
    """The nearest scores, the largest disagreement, or by chance; ties by chance too; never more than there are."""
    margins = [3.0, -0.1, 0.5, -2.0, 0.2]
    pairs = [pair(margin, spread=spread) for margin, spread in zip(margins, (0.1, 0.2, 0.4, 0.3, 0.0), strict=True)]

    def chosen(strategy, count, candidates=range(5), seed=0):
        return select_pairs(strategy, pairs, list(candidates), count, torch.Generator().manual_seed(seed))

    assert chosen("confidence", 3) == [1, 4, 2]
    assert chosen("confidence", 2, candidates=[0, 3]) == [3, 0]
    assert chosen("disagreement", 2) == [2, 3]
    assert {tuple(sorted(chosen("random", 2, seed=seed))) for seed in range(200)} == {
        (i, j) for i in range(5) for j in range(i + 1, 5)
    }
    equal = [pair(0.0) for _ in range(4)]
    firsts = {
        select_pairs("confidence", equal, [0, 1, 2, 3], 1, torch.Generator().manual_seed(s))[0] for s in range(50)
    }
    assert firsts == {0, 1, 2, 3}
    assert sorted(chosen("random", 9)) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    "margin, verdict, policy, chosen, weight",
    [
        (0.3, None, "discriminator", 1, 1.0),
        (-0.3, None, "discriminator", 2, 1.0),
        (0.3, 0.0, "discriminator", 2, 1.0),  # gold before silver
        (-0.3, 0.9, "discriminator", 1, 1.0),
        (0.3, 0.5, "discriminator", 1, 0.0),  # a tie trains nothing
        (0.3, 0.5, "drop", 1, 0.0),
        (-0.3, 0.5, "silver", 2, 1.0),
        (0.0, None, "discriminator", 1, 0.0),  # nobody can tell
        (None, 1.0, "discriminator", 1, 1.0),
    ],
)
def test_order(margin, verdict, policy, chosen, weight):
    ordered = order_pair(pair(margin, verdict), policy)
    assert ordered.weight == weight
    if weight:
        assert ordered.chosen_ids[0] == chosen and ordered.rejected_ids[0] == 3 - chosen


def test_identical_completions_train_nothing():
    same = pair(0.0, 1.0)
    same.second = same.first
    assert order_pair(same, "discriminator").weight == 0.0


def test_micro_batches_do_not_depend_on_the_split():
    """
    Eight pairs, one of them a tie: an optimizer step of four pairs has the same ones in one process and in two, with
    accumulation or without, and every batch's mean times its factor adds up to the sum over the step's pairs over
    four.
    """
    rows = [order_pair(pair(0.0 if i == 2 else 1.0, number=i), "discriminator") for i in range(8)]
    steps = []
    for batch, processes, accumulated in ((4, 1, 1), (2, 1, 2), (2, 2, 1), (1, 2, 2), (1, 4, 1)):
        windows = [Window(0, rows) for _ in range(processes)]
        found = []
        for _ in range(3):  # the third step begins the second pass over the window
            numbers, total = [], 0.0
            for _ in range(accumulated):
                for rank, window in enumerate(windows):
                    got, scale = window.next_batch(batch, rank, processes)
                    values = [float(row["chosen_ids"][1]) for row in got]
                    numbers += [] if scale == 0 else values
                    total += sum(values) / len(values) * scale / (processes * accumulated)
            found.append((sorted(numbers), round(total, 9)))
        steps.append(found)
    assert all(found == steps[0] for found in steps)
    assert steps[0] == [([0.0, 1.0, 3.0], 1.0), ([4.0, 5.0, 6.0, 7.0], 5.5), ([0.0, 1.0, 3.0], 1.0)]


def test_prompt_order():
    """
    Whole windows, each repeated for its micro-batches; every prompt once an epoch; another order in another epoch.
    """
    epoch = [0]
    sampler = WindowSampler(11, 4, 3, shuffle=True, seed=0, epoch=lambda: epoch[0])
    orders = []
    for epoch[0] in (0, 1, 0):
        order = list(sampler)
        assert len(order) == len(sampler) == 2 * 4 * 3
        assert order[:4] == order[4:8] == order[8:12] and len(set(order)) == 8
        orders.append(order)
    assert orders[0] == orders[2] != orders[1]
    assert list(WindowSampler(5, 2, 1, shuffle=False, seed=0, epoch=lambda: 0)) == [0, 1, 2, 3]


def test_sampling_is_the_distribution():
    """
    By the inverse of the cumulative distribution 20,000 random numbers give each token its probability, to three
    standard errors, under temperature and truncation too; a token of probability 0 is never drawn.
    """
    from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper

    logits = torch.tensor([[1.0, float("-inf"), 0.0, 2.0, -1.0, float("-inf")]])
    uniforms = torch.rand(20000, 1, generator=torch.Generator().manual_seed(0))
    uniforms[0], uniforms[1] = 0.0, 1 - 2**-24
    for warpers in ([], [TemperatureLogitsWarper(0.5), TopKLogitsWarper(3)]):
        warpers = LogitsProcessorList(warpers)
        sampling = SeededSampling(uniforms, 4, warpers)
        drawn = sampling(torch.zeros(20000, 4, dtype=torch.long), logits.expand(20000, -1)).argmax(-1)
        expected = warpers(torch.zeros(1, 4, dtype=torch.long), logits.clone()).softmax(-1)[0]
        observed = torch.bincount(drawn, minlength=6) / 20000
        assert (observed[expected == 0] == 0).all()
        assert ((observed - expected).abs() <= 3 * (expected * (1 - expected) / 20000).sqrt() + 1e-9).all()


def with_frequent_ends(folder):
    """The tiny model, ending often enough to see both kinds of completions."""
    model = harness.load(folder)
    with torch.no_grad():
        model.lm_head.weight[1] *= 4
    return model


# ---- Sampling -------------------------------------------------------------------------------------------------------


def test_sampled_tokens_are_trained_on(tiny_folder, tmp_path):
    """
    What is trained on is prompt and sampled tokens, never text encoded again; a completion has an EOS token if and
    only if one was sampled, at its end; cut ones get none. Generation runs in evaluation mode, with the cache, and
    leaves the random state alone.
    """
    trainer = online.trainer(
        with_frequent_ends(tiny_folder),
        tmp_path,
        labeller=CountedLabeller(),
        processing_class=tiny.tokenizer(),
        max_steps=4,
        window_size=16,
    )
    windows, batches, modes = windows_of(trainer), batches_of(trainer), []
    generate, sampler = trainer.model.generate, trainer.sampler

    def watched(**kwargs):
        modes.append((trainer.model.training, kwargs["generation_config"].use_cache))
        return generate(**kwargs)

    def same_state(*args):
        state = torch.get_rng_state()
        result = sampler(*args)
        assert torch.equal(state, torch.get_rng_state())
        return result

    trainer.model.generate, trainer.rounds.sampler = watched, same_state
    trainer.train()
    assert set(modes) == {(False, True)} and trainer.model.training
    completions = [c for pairs in windows for pair in pairs for c in (pair.first, pair.second)]
    eos = end_token_ids(trainer.model, trainer.processing_class)
    assert {c.finished for c in completions} == {True, False}
    for completion in completions:
        inside, last = completion.ids[:-1], completion.ids[-1]
        assert not set(inside) & set(eos) and (last in eos) == completion.finished
        assert len(completion.ids) == 8 or completion.finished
    sampled = {tuple(p.prompt_ids + c.ids) for pairs in windows for p in pairs for c in (p.first, p.second)}
    for batch in batches:
        for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True):
            assert tuple(ids[mask.bool()].tolist()) in sampled
    encoded = {
        tuple(p.prompt_ids + tiny.tokenizer()(c.text)["input_ids"]) for w in windows for p in w for c in (p.first,)
    }
    assert not encoded <= sampled  # text does not give the tokens back, so the test says something


def test_completions_do_not_depend_on_the_batch(tiny_folder, tmp_path):
    """Each prompt's random numbers are its own: the batch size and the other prompts change nothing."""
    samplers = [
        online.trainer(
            tiny_folder, tmp_path / str(size), labeller=CountedLabeller(), generation_batch_size=size
        ).sampler
        for size in (32, 3)
    ]
    ids = [[5 + i] * (3 + i % 4) for i in range(6)]
    seeds = [(0, i) for i in range(6)]
    first, second = (sampler(ids, 2, seeds) for sampler in samplers)
    assert first == second
    assert samplers[0](ids[2:3], 2, seeds[2:3])[0] == first[2]
    assert samplers[0](ids, 2, [(1, i) for i in range(6)]) != first
    assert all(group[0].ids != group[1].ids for group in first)


def test_conversational_prompts(tiny_folder, tmp_path):
    """Messages go through the chat template up to the assistant's turn; the labeler gets messages."""
    labeller = CountedLabeller()
    trainer = online.trainer(
        tiny_folder, tmp_path, labeller=labeller, train_dataset=online.prompts(16, conversational=True), max_steps=2
    )
    row = trainer.train_dataset[0]
    text = f"<|user|>{row['prompt'][0]['content']}<|end|><|assistant|>"
    assert trainer.processing_class.decode(row["prompt_ids"]) == text
    trainer.train()
    prompt, a, b = labeller.asked[0]
    assert prompt[0]["role"] == "user" and a[0]["role"] == b[0]["role"] == "assistant"


def test_more_than_two_completions(tiny_folder, tmp_path):
    """The pair is the best and the worst by the discriminator, which scored all four completions of each prompt."""
    trainer = online.trainer(tiny_folder, tmp_path, labeller=CountedLabeller(), num_completions=4, max_steps=4)
    scores, margins = [], []
    score, label = trainer.discriminator.score, trainer.rounds._label

    def recorded_score(samples):
        scores.append(score(samples))
        return scores[-1]

    def recorded_label(pairs, *rest):
        margins.append([abs(pair.margin) for pair in pairs])
        assert all(pair.first.ids != pair.second.ids for pair in pairs)
        return label(pairs, *rest)

    trainer.discriminator.score, trainer.rounds._label = recorded_score, recorded_label
    trainer.train()
    # Each window is scored twice: all completions, and after the update the pairs.
    assert [len(found) for found in scores] == [32, 16, 32, 16]
    groups = [scores[2][i : i + 4] for i in range(0, 32, 4)]
    assert margins[1] == pytest.approx([max(group) - min(group) for group in groups]) and min(margins[1]) > 0


# ---- Labels ---------------------------------------------------------------------------------------------------------


def test_labels_and_metrics_of_a_run(tiny_folder, tmp_path):
    """
    Three labels a window of eight, the extra column handed on; gold orders where it exists, the discriminator
    elsewhere; every label is in the ledger and every one is learned from; the logged numbers are those of the window.
    """
    seen_columns = []
    labeller = CountedLabeller()
    rewards = labeller.rewards

    def watched(prompts, completions, **columns):
        seen_columns.append(set(columns))
        return rewards(prompts, completions, **columns)

    labeller.rewards = watched
    trainer = online.trainer(tiny_folder, tmp_path, labeller=labeller, max_steps=6, replay_decay=1.0)
    windows, learned = windows_of(trainer), []
    learn = trainer.discriminator.learn
    trainer.discriminator.learn = lambda examples, *rest: (learned.append(len(examples)), learn(examples, *rest))[1]
    trainer.train()
    entries = Ledger(tmp_path / "gold_labels.jsonl", read_only=True).entries
    assert len(entries) == len(labeller.asked) == 9 and seen_columns[0] == {"number"}
    assert [entry["window"] for entry in entries] == [0] * 3 + [1] * 3 + [2] * 3
    assert [entry["step"] for entry in entries] == [0] * 3 + [2] * 3 + [4] * 3
    assert learned == [3, 6, 9]
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    for number, pairs in enumerate(windows):
        entry = logs[2 * number]
        assert entry["d2po/gold_labels"] == 3 * (number + 1)
        completions = [c for pair in pairs for c in (pair.first, pair.second)]
        assert entry["d2po/completion_length"] == pytest.approx(sum(len(c.ids) for c in completions) / 16)
        gold = online.vowels(None, [c.text for c in completions])
        assert entry["d2po/gold_reward"] == pytest.approx(sum(gold) / 16)
        assert sum(pair.is_gold for pair in pairs) == 3
        trained = [pair for pair in pairs if order_pair(pair, "discriminator").weight]
        assert entry["d2po/silver_share"] == pytest.approx(sum(not p.is_gold for p in trained) / len(trained))
        assert entry["d2po/tied_share"] == pytest.approx(1 - len(trained) / 8)
    assert (
        logs[0]["d2po/margin"] == 0
        and logs[0].get("d2po/gold_accuracy", 0.5) == 0.5
        and logs[0]["d2po/reverse_kl"] == 0
    )
    assert logs[4]["d2po/margin"] > 0


def test_labels_are_the_least_certain_of_the_whole_window(tiny_folder, tmp_path):
    """
    From the second window on, no pair left to the discriminator was nearer than one bought, over all micro-batches.
    """
    trainer = online.trainer(
        tiny_folder, tmp_path, labeller=CountedLabeller(), max_steps=8, window_size=16, labels_per_window=4
    )
    label, margins = trainer.rounds._label, []

    def recorded(pairs, *rest):
        before = [abs(pair.margin) for pair in pairs]
        label(pairs, *rest)
        margins.append((before, [pair.is_gold for pair in pairs]))

    trainer.rounds._label = recorded
    trainer.train()
    before, is_gold = margins[1]
    bought = [m for m, gold in zip(before, is_gold, strict=True) if gold]
    left = [m for m, gold in zip(before, is_gold, strict=True) if not gold]
    assert len(bought) == 4 and max(bought) <= min(left) and max(left) > 0


def test_accuracy_is_measured_before_learning(tiny_folder, tmp_path):
    """`d2po/gold_accuracy` compares the scores before the update with the fresh verdicts."""
    trainer = online.trainer(
        tiny_folder,
        tmp_path,
        labeller=RewardFunctionLabeller(decisive),
        max_steps=6,
        labels_per_window=8,
        selection="random",
    )
    label, expected = trainer.rounds._label, []

    def recorded(pairs, *rest):
        label(pairs, *rest)
        right = [0.5 if p.margin == 0 else float((p.margin > 0) == (p.verdict > 0.5)) for p in pairs]
        expected.append(sum(right) / len(right))

    trainer.rounds._label = recorded
    trainer.train()
    assert harness.column(trainer, "d2po/gold_accuracy")[::2] == pytest.approx(expected)
    # Gold is free here, so the accuracy on all pairs is known: on these, the same.
    assert harness.column(trainer, "d2po/silver_accuracy")[::2] == pytest.approx(expected)


@pytest.mark.parametrize("policy, learned", [("discriminator", True), ("silver", True), ("drop", False)])
def test_ties(policy, learned, tiny_folder, tmp_path):
    """A tie costs a label; it draws the discriminator's scores together unless it is dropped."""
    labeller = RewardFunctionLabeller(lambda prompts, completions, **columns: [1.0] * len(completions))
    trainer = online.trainer(
        tiny_folder, tmp_path, labeller=labeller, max_steps=2, tie_policy=policy, discriminator=None
    )
    trainer.train()
    assert len(trainer.gold.entries) == 3
    # Targets of 0.5 at a margin of 0 have no gradient: what tells is whether a step was taken at all.
    assert (trainer.discriminator.updates > 0) == learned


def test_budget(tiny_folder, tmp_path):
    """
    The budget is never exceeded; its last window gets what is left, and afterward the discriminator orders alone.
    """
    labeller = CountedLabeller()
    trainer = online.trainer(tiny_folder, tmp_path, labeller=labeller, max_steps=8, label_budget=7)
    trainer.train()
    assert len(labeller.asked) == 7 and trainer.state.global_step == 8
    assert harness.column(trainer, "d2po/gold_labels")[::2] == [3, 6, 7, 7]
    assert "d2po/gold_accuracy" not in trainer.state.log_history[6]


def test_evaluation_buys_nothing(tiny_folder, tmp_path):
    """
    Evaluation on prompts samples, orders by free gold and logs its reward; on pairs it is the usual one. Neither asks
    for labels, changes the discriminator, or changes what training does.
    """
    labellers, trainers = [], []
    for name in ("plain", "evaluated"):
        labellers.append(CountedLabeller())
        evaluated = name == "evaluated"
        trainers.append(
            online.trainer(
                tiny_folder,
                tmp_path / name,
                labeller=labellers[-1],
                max_steps=4,
                eval_dataset={"prompts": online.prompts(8), "pairs": tiny.dataset(8)} if evaluated else None,
                eval_strategy="steps" if evaluated else "no",
                eval_steps=1,
                eval_on_start=evaluated,
            )
        )
        trainers[-1].train()
    assert labellers[0].asked == labellers[1].asked and len(labellers[0].asked) == 6
    plain, evaluated = trainers
    assert harness.largest_difference(harness.weights(plain.model), harness.weights(evaluated.model)) == 0
    first, second = plain.discriminator.state_dict(), evaluated.discriminator.state_dict()
    assert all(torch.equal(first[key], second[key]) for key in first)
    entry = next(e for e in evaluated.state.log_history if "eval_prompts_loss" in e)
    assert "eval_prompts_d2po/gold_reward" in entry and "eval_prompts_d2po/gold_labels" not in entry
    entry = next(e for e in evaluated.state.log_history if "eval_pairs_loss" in e)
    assert (
        entry["eval_pairs_loss"] == pytest.approx(math.log(2), abs=1e-5) and "eval_pairs_d2po/gold_reward" not in entry
    )
    # The same noise at every evaluation: without training in between, the same numbers.
    assert evaluated.evaluate(online.prompts(8))["eval_loss"] == evaluated.evaluate(online.prompts(8))["eval_loss"]
    assert len(labellers[1].asked) == 6


# ---- Modes ----------------------------------------------------------------------------------------------------------


class GoldScores:
    """A discriminator member that scores with the gold reward: a perfect one."""

    def __init__(self, sign=1.0):
        self.sign = sign

    def named_parameters(self):
        return {}

    def active(self, training):
        import contextlib

        return contextlib.nullcontext()

    def check_layout(self, samples):
        pass

    def score(self, samples):
        return self.sign * torch.tensor(decisive(None, [s.completion for s in samples]))

    def save_pretrained(self, folder):
        pass


def own_model() -> dict:
    return {"discriminator": reward_model(), "discriminator_processing_class": tiny.tokenizer()}


def with_perfect_discriminator(folder, tmp_path, sign=1.0, **options):
    trainer = online.trainer(folder, tmp_path, label_budget=0, **own_model(), **options)
    trainer.discriminator.members, trainer.discriminator.is_trainable = [GoldScores(sign)], False
    return trainer


def test_modes_meet(tiny_folder, tmp_path):
    """
    Online DPO with gold on every pair, with no discriminator or with one that is overruled everywhere, is the run with
    a perfect fixed discriminator and no labels at all: the same pairs, weights and losses, bit for bit. With the
    scores turned round the policy is pushed the other way.
    """
    labeller = RewardFunctionLabeller(decisive)
    gold = dict(labeller=labeller, labels_per_window=8, max_steps=6)
    trainers = [
        online.trainer(tiny_folder, tmp_path / "gold", discriminator="none", **gold),
        online.trainer(tiny_folder, tmp_path / "overruled", **gold),
        with_perfect_discriminator(tiny_folder, tmp_path / "perfect", max_steps=6),
        with_perfect_discriminator(tiny_folder, tmp_path / "wrong", -1.0, max_steps=6),
    ]
    batches = [batches_of(trainer) for trainer in trainers]
    for trainer in trainers:
        trainer.train()
    policies = [
        {name: value for name, value in harness.weights(trainer.model).items() if "discriminator" not in name}
        for trainer in trainers
    ]
    for other in (1, 2):
        assert harness.largest_difference(policies[0], policies[other]) == 0
        assert harness.column(trainers[0], "loss") == harness.column(trainers[other], "loss")
    assert harness.largest_difference(policies[0], policies[3]) > 1e-3
    # Of the first window the same completions were sampled, and each pair turned round.
    chosen, rejected = batches[0][0]["input_ids"].chunk(2)
    wrong_chosen, wrong_rejected = batches[3][0]["input_ids"].chunk(2)
    assert torch.equal(chosen, wrong_rejected) and torch.equal(rejected, wrong_chosen)
    silver = [harness.column(trainer, "d2po/silver_share")[0] for trainer in trainers]
    assert silver == [0.0, 0.0, 1.0, 1.0]


def test_fixed_discriminator_stays(tiny_folder, tmp_path):
    """Without labels a warm-started adapter is bitwise what it was, and orders everything; with a rate of 0 too."""
    pairs = tiny.dataset(16)
    for name, options in (
        ("budget", {"label_budget": 0}),
        ("rate", {"labeller": CountedLabeller(), "discriminator_learning_rate": 0.0}),
    ):
        if name == "rate":
            options |= own_model()
        else:
            options["discriminator_dataset"] = pairs
        trainer = online.trainer(tiny_folder, tmp_path / name, max_steps=4, **options)
        states, make_window = [], trainer.rounds.make_window

        def recorded(*arguments, trainer=trainer, make_window=make_window, states=states):
            states.append(trainer.discriminator.state_dict())
            return make_window(*arguments)

        trainer.rounds.make_window = recorded
        trainer.train()
        last = trainer.discriminator.state_dict()
        assert all(torch.equal(states[0][key], last[key]) for key in last)
        if name == "budget":
            assert trainer.discriminator.updates == 4 and last["weight/0.head.weight"].abs().max() > 0
            assert not trainer.gold.entries and not (tmp_path / name / "gold_labels.jsonl").exists()
            assert harness.column(trainer, "d2po/silver_share") == [1.0] * 4


def test_training_ends_with_the_budget_where_nothing_else_orders(tiny_folder, tmp_path):
    trainer = online.trainer(
        tiny_folder,
        tmp_path,
        labeller=RewardFunctionLabeller(decisive),
        discriminator="none",
        label_budget=12,
        labels_per_window=8,
        max_steps=8,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
    )
    trainer.train()
    # One whole window of two steps, and a second of which half is labeled.
    assert len(trainer.gold.entries) == 12 and trainer.state.global_step == 4
    assert harness.column(trainer, "d2po/tied_share") == [0.0, 0.0, 0.5, 0.5]


def test_self_rewarding(tiny_folder, tmp_path):
    """
    The policy's own log ratio orders: nothing at first, where policy and reference agree; gold teaches the policy.
    """
    trainer = online.trainer(
        tiny_folder, tmp_path, labeller=RewardFunctionLabeller(decisive), discriminator="self", max_steps=6
    )
    trainer.train()
    silver = harness.column(trainer, "d2po/silver_share")
    assert silver[0] == 0.0 and silver[2] > 0.5
    assert not list(trainer.discriminator.members[0].named_parameters())


def test_it_learns(tiny_folder, tmp_path):
    """
    With half of the pairs labeled, of which gold prefers the shorter completion, the discriminator comes to order
    fresh pairs well above chance, and the policy's completions on held-out prompts get shorter. (Seeds 0 to 3:
    accuracy
    0.67 to 0.74, 0.8 to 2.1 tokens shorter. With a sixth labeled, on 16 steps, 0.61 to 0.69 and 0.4 to 0.9.)
    """

    def brief(prompts, completions, **columns):
        return [-float(len(completion)) for completion in completions]

    trainer = online.trainer(
        with_frequent_ends(tiny_folder),
        tmp_path,
        labeller=RewardFunctionLabeller(brief),
        processing_class=tiny.tokenizer(),
        train_dataset=online.prompts(48),
        eval_dataset=online.prompts(24),
        max_steps=24,
        per_device_train_batch_size=12,
        window_size=24,
        labels_per_window=12,
        selection="random",
        learning_rate=1e-3,
        discriminator_epochs=4,
        discriminator_learning_rate=2e-3,
    )
    before = trainer.evaluate()["eval_d2po/completion_length"]
    trainer.train()
    after = trainer.evaluate()["eval_d2po/completion_length"]
    accuracy = harness.column(trainer, "d2po/silver_accuracy")
    assert len(trainer.gold.entries) == 144
    assert sum(accuracy[-8:]) / 8 > 0.65, accuracy
    assert after < before - 0.5, (before, after)


# ---- Losses ---------------------------------------------------------------------------------------------------------


def test_dpo_at_the_reference(tiny_folder, tmp_path):
    """The first loss is log 2 on every pair that has an order: reward 0 on both sides."""
    trainer = online.trainer(
        tiny_folder,
        tmp_path,
        labeller=RewardFunctionLabeller(decisive),
        discriminator="none",
        labels_per_window=8,
        max_steps=1,
    )
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)


@pytest.mark.parametrize(
    "loss, options, method, equation",
    [
        ("dpo", {}, FDPOTrainer.method_class, BY_ID["fdpo"].equation),
        ("fdpo", {"divergence": "js"}, FDPOTrainer.method_class, BY_ID["fdpo_js"].equation),
        ("simper", {}, SimPERTrainer.method_class, BY_ID["simper"].equation),
        ("tdpo", {"variant": "tdpo1"}, TDPOTrainer.method_class, BY_ID["tdpo1"].equation),
        ("mallows", {"kappa": 0.3}, MallowsDPOTrainer.method_class, methods.mallows(kappa=0.3)),
        (
            "rainbowpo",
            {"kappa": 0.3},
            RainbowPOTrainer.method_class,
            methods.rainbowpo(alpha=0.25, gamma=0.1, kappa=0.3),
        ),
        ("ipo", {}, None, None),
    ],
)
def test_losses_by_name(loss, options, method, equation, tiny_folder, tmp_path):
    """Any method's loss by name, with its parameters: the loss on the last batch is the method's equation on it."""
    trainer = online.trainer(
        tiny_folder,
        tmp_path,
        labeller=RewardFunctionLabeller(decisive),
        labels_per_window=8,
        max_steps=3,
        loss=loss,
        loss_kwargs=options,
    )
    assert type(trainer) is D2POTrainer and type(trainer.method) is get_method(loss)
    assert method is None or type(trainer.method) is method
    assert trainer.needs_reference == (loss != "simper")
    batches, states = batches_of(trainer), []
    compute_loss = trainer.compute_loss

    def recorded(model, inputs, *args, **kwargs):
        states.append({name: value.clone() for name, value in trainer.model.state_dict().items()})
        return compute_loss(model, inputs, *args, **kwargs)

    trainer.compute_loss = recorded
    trainer.train()
    assert ("d2po/kl" in trainer.state.log_history[0]) == (loss != "simper")
    trainer.model.load_state_dict(states[-1])
    trainer.model.eval()
    with torch.no_grad():
        policy = harness.sides(trainer.model, batches[-1])
        with trainer.model.disable_adapter():
            reference = harness.sides(trainer.model, batches[-1])
    if equation is not None:
        losses, _, _ = equation(*policy, *reference, trainer.args.beta)
    else:
        ratios = [side.logps - ref.logps for side, ref in zip(policy, reference, strict=True)]
        losses = (ratios[0] - ratios[1] - 1 / (2 * trainer.args.beta)) ** 2
    assert trainer.state.log_history[2]["loss"] == pytest.approx(losses.mean().item(), rel=1e-4)


def test_configuration_of_a_loss(tmp_path):
    """
    The method's parameters are `loss_kwargs`, with its checks and refusals; the configuration copies and pickles.
    """
    config = online.config(tmp_path, loss="tdpo", loss_kwargs={"alpha": 0.25})
    assert type(config) is D2POConfig and config.loss == "tdpo"
    for twin in (copy.copy(config), copy.deepcopy(config), pickle.loads(pickle.dumps(config))):
        assert type(twin) is D2POConfig and twin.loss_kwargs == {"alpha": 0.25} and twin.window_size == 8
        assert type(twin.make_method_args()) is TDPOConfig and twin.make_method_args().alpha == 0.25
    with pytest.raises(ValueError, match="`loss`.*'simper'.*'dop'"):
        online.config(tmp_path, loss="dop")
    with pytest.raises(ValueError, match="'variant'.*`loss='simper'`.*none"):
        online.config(tmp_path, loss="simper", loss_kwargs={"variant": "tdpo1"})
    with pytest.raises(ValueError, match="'varient'.*`loss='tdpo'`.*'variant'"):
        online.config(tmp_path, loss="tdpo", loss_kwargs={"varient": "tdpo1"})
    with pytest.raises(ValueError, match="'beta'.*set `beta=0.2`"):
        online.config(tmp_path, loss="tdpo", loss_kwargs={"beta": 0.2})
    with pytest.raises(ValueError, match="`beta=0.2`.*SimPER has no beta"):
        online.config(tmp_path, loss="simper", beta=0.2)
    with pytest.raises(ValueError, match="Use `loss='fdpo'`"):
        online.config(tmp_path, loss_kwargs={"divergence": "js"})
    with pytest.raises(ValueError, match="`log_token_kl=True`.*`SimPERConfig`"):
        online.config(tmp_path, loss="simper", log_token_kl=True)
    with pytest.raises(ValueError, match="`precompute_ref_log_probs=True`.*`D2POConfig`"):
        online.config(tmp_path, loss="tdpo", precompute_ref_log_probs=True)


def test_the_loss_of_a_configuration_stays(tmp_path):
    """Its beta and parameters were checked for one loss, so another one is refused; setting the same is no offense."""
    config = online.config(tmp_path, loss="tdpo")
    config.loss = "tdpo"
    with pytest.raises(AttributeError, match="`loss='simper'`.*'tdpo'"):
        config.loss = "simper"
    assert config.loss == "tdpo"


@pytest.mark.parametrize("loss", ["dpo", "ipo", "fdpo", "mallows", "rainbowpo", "simper", "tdpo"])
def test_defaults_of_a_loss(loss, tmp_path):
    """
    Without `beta` and `loss_kwargs` every parameter has the method's own default, however the configuration comes to
    be.
    """
    config = online.config(tmp_path, loss=loss)
    expected = 10.0 if loss == "rainbowpo" else 0.1
    method_args = config.make_method_args()
    assert config.beta == method_args.beta == expected and config.to_dict()["beta"] == expected
    for name, option in method_options(loss).items():
        assert getattr(method_args, name) == option.default
    cpu = ["--use_cpu", "true", "--bf16", "false", "--output_dir", str(tmp_path)]
    (parsed,) = TrlParser(D2POConfig).parse_args_and_config([*cpu, "--loss", loss])
    assert type(parsed) is type(D2POConfig("x", use_cpu=True, bf16=False)) is D2POConfig and parsed.beta == expected


def test_beta_that_is_given_is_kept(tmp_path):
    """A value given by the user is not taken for a default, in whatever way the configuration comes to be."""
    config = online.config(tmp_path, loss="rainbowpo", beta=0.1)
    default = online.config(tmp_path, loss="rainbowpo")
    for given, beta in ((config, 0.1), (default, 10.0)):
        for twin in (dataclasses.replace(given, seed=3), copy.deepcopy(given), pickle.loads(pickle.dumps(given))):
            assert twin.beta == beta and type(twin) is type(given)
        assert given.to_dict()["beta"] == beta
    parser = TrlParser(D2POConfig)
    path = tmp_path / "config.yaml"
    path.write_text("beta: 0.1\nloss: rainbowpo\nbf16: false\nuse_cpu: true\nloss_kwargs:\n  kappa: 0.5\n")
    cpu = ["--use_cpu", "true", "--bf16", "false", "--output_dir", str(tmp_path), "--loss", "rainbowpo"]
    assert parser.parse_args_and_config([*cpu, "--beta", "0.1"])[0].beta == 0.1
    (parsed,) = parser.parse_args_and_config(["--config", str(path), "--output_dir", str(tmp_path)])
    assert parsed.beta == 0.1 and parsed.make_method_args().kappa == 0.5
    (parsed,) = TrlParser(D2POConfig).parse_args_and_config([*cpu, "--loss_kwargs", '{"kappa": 0.25}'])
    assert parsed.beta == 10.0 and parsed.make_method_args().kappa == 0.25

    @dataclasses.dataclass
    class Mild(D2POConfig):
        beta: float = dataclasses.field(default=0.5, metadata={"help": "Of this class."})

    assert Mild(str(tmp_path), loss="rainbowpo", use_cpu=True, bf16=False).beta == 0.5


def test_options_of_a_loss_as_in_0_1_0(tmp_path):
    """
    The parameters of the method as options of the configuration, in the constructor, on a command line, in a file and
    in a class made for a parser: they become `loss_kwargs`, with a warning that names them.
    """
    with pytest.warns(FutureWarning, match="`divergence`.*'fdpo'.*loss_kwargs"):
        config = online.config(tmp_path, loss="fdpo", divergence="js")
    assert type(config) is D2POConfig and config.make_method_args().divergence == "js"
    with pytest.raises(TypeError, match="variant"):
        online.config(tmp_path, loss="simper", variant="tdpo1")
    with pytest.raises(TypeError, match="`divergence` was given both"):
        online.config(tmp_path, loss="fdpo", divergence="js", loss_kwargs={"divergence": "js"})

    cpu = ["--use_cpu", "true", "--bf16", "false", "--output_dir", str(tmp_path)]
    parser = D2POConfig._parser_class(D2POConfig)
    with pytest.warns(FutureWarning, match="`variant`.*`alpha`"):
        (config,) = parser.parse_args_and_config(
            [*cpu, "--loss", "tdpo", "--variant", "tdpo2", "--alpha=0.25"], fail_with_unknown_args=True
        )
    assert config.loss_kwargs == {"variant": "tdpo2", "alpha": 0.25}
    path = tmp_path / "config.yaml"
    with pytest.warns(FutureWarning, match="`length_normalization`"):
        (config,) = parser.parse_args_and_config([*cpu, "--loss", "rainbowpo", "--no_length_normalization"])
    assert config.loss_kwargs == {"length_normalization": False}
    with pytest.warns(FutureWarning, match="`normalize_curvature`"):
        (config,) = parser.parse_args_and_config(
            [*cpu, "--loss", "fdpo", "--normalize_curvature", "--divergence", "js"]
        )
    assert config.loss_kwargs == {"normalize_curvature": True, "divergence": "js"}
    path.write_text("loss: rainbowpo\nmixing_alpha: 0.5\nlink: hinge\n")
    with pytest.warns(FutureWarning, match="`mixing_alpha`"):
        (config,) = parser.parse_args_and_config(["--config", str(path), *cpu], fail_with_unknown_args=True)
    assert config.loss_kwargs == {"mixing_alpha": 0.5, "link": "hinge"} and config.beta == 10.0
    for unknown in (["--mixing_alpha", "0.5"], ["--nonsense", "1"]):
        with pytest.raises(ValueError, match=unknown[0]):
            parser.parse_args_and_config([*cpu, "--loss", "tdpo", *unknown], fail_with_unknown_args=True)

    with pytest.warns(FutureWarning, match="for_loss"):
        made = D2POConfig.for_loss("tdpo")
    with pytest.warns(FutureWarning, match="`alpha`"):
        (config,) = TrlParser(made).parse_args_and_config([*cpu, "--alpha", "0.25"])
    assert type(config) is D2POConfig and (config.loss, config.loss_kwargs) == ("tdpo", {"alpha": 0.25})
    (config,) = TrlParser(made).parse_args_and_config(cpu)
    assert config.loss == "tdpo" and not config.loss_kwargs


@pytest.mark.parametrize("where", ["trainer", "args"])
def test_beta_can_be_scheduled(where, tiny_folder, tmp_path):
    """The method reads the beta of the step: DPO's rewards are beta times the log ratio."""

    class Schedule(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 2:
                (trainer if where == "trainer" else args).beta = 3.0

    trainer = online.trainer(
        tiny_folder,
        tmp_path,
        labeller=RewardFunctionLabeller(decisive),
        labels_per_window=8,
        max_steps=3,
        callbacks=[Schedule()],
    )
    trainer.train()
    ratios, rewards = harness.column(trainer, "logratios/chosen"), harness.column(trainer, "rewards/chosen")
    assert rewards[1] == pytest.approx(0.1 * ratios[1], rel=1e-4)
    assert rewards[2] == pytest.approx(3.0 * ratios[2], rel=1e-4) and abs(ratios[2]) > 1e-4


def test_kappa_is_estimated_from_the_first_window(tiny_folder, tmp_path):
    """Its weights average 1 over that window, and the estimate consumes no batch and buys no label."""
    trainer = online.trainer(
        tiny_folder,
        tmp_path,
        labeller=RewardFunctionLabeller(decisive),
        labels_per_window=8,
        max_steps=2,
        loss="mallows",
    )
    trainer.train()
    assert len(trainer.gold.entries) == 8
    weights = harness.column(trainer, "dispersion/weight")
    assert sum(weights) / 2 == pytest.approx(1.0, rel=1e-4) and weights[0] != weights[1]


def test_dependent_options_of_a_loss(tmp_path):
    """D2PO's options that mean nothing alone are refused alone, and so are the method's."""
    with pytest.raises(ValueError, match="`kappa=0.3` has no effect unless `contextual_scaling=True`"):
        online.config(tmp_path, loss="rainbowpo", loss_kwargs={"contextual_scaling": False, "kappa": 0.3})
    with pytest.raises(ValueError, match="has no effect unless `use_vllm=True`"):
        online.config(tmp_path, loss="rainbowpo", vllm_mode="server")


# ---- Training in general --------------------------------------------------------------------------------------------


def test_accumulation(tiny_folder, tmp_path):
    """Four pairs a step, at once or in four micro-batches with ties among them: the same weights to rounding."""
    runs = []
    for batch, accumulated in ((4, 1), (1, 4)):
        trainer = online.trainer(
            tiny_folder,
            tmp_path / str(batch),
            labeller=CountedLabeller(),
            max_steps=4,
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=accumulated,
            adam_epsilon=1e-3,
            labels_per_window=8,
        )
        trainer.train()
        runs.append((harness.weights(trainer.model), trainer))
    assert harness.column(runs[0][1], "d2po/tied_share")[0] > 0  # there is something to get wrong
    assert harness.largest_difference(runs[0][0], runs[1][0]) < 1e-6
    for first, second in zip(*(harness.column(t, "loss") for _, t in runs), strict=True):
        assert first == pytest.approx(second, abs=2e-6)
    norms = [harness.column(t, "grad_norm") for _, t in runs]
    assert norms[0] == pytest.approx(norms[1], rel=1e-4)


def test_full_fine_tuning_with_a_model_as_discriminator(tiny_folder, tmp_path):
    """
    Without adapters the discriminator is a model of its own; the reference stays, the policy and discriminator move.
    """
    trainer = online.trainer(
        tiny_folder,
        tmp_path,
        labeller=RewardFunctionLabeller(decisive),
        peft_config=None,
        discriminator=reward_model(),
        discriminator_processing_class=tiny.tokenizer(),
        max_steps=4,
        num_policy_epochs=2,
    )
    before = trainer.discriminator.state_dict()
    trainer.train()
    assert (
        harness.largest_difference(harness.weights(trainer.ref_model), harness.weights(harness.load(tiny_folder))) == 0
    )
    after = trainer.discriminator.state_dict()
    assert any(not torch.equal(before[key], after[key]) for key in before)
    assert len(trainer.gold.entries) == 3  # four steps are two passes over one window


def test_qlora_and_checkpointing(tiny_folder, tmp_path):
    """
    On a 4-bit base with gradient checkpointing both adapters move, each by its own updates, and the base does not.
    """
    pytest.importorskip("bitsandbytes")
    trainer = online.trainer(
        tiny_folder,
        tmp_path,
        labeller=RewardFunctionLabeller(decisive),
        quantization_config=BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"),
        max_steps=4,
        gradient_checkpointing=True,
        model_init_kwargs={"dtype": "float32"},
    )
    before = harness.weights(trainer.model)
    assert all(p.dtype == torch.float32 for p in trainer.discriminator.members[0].named_parameters().values())
    trainer.train()
    moved = {name for name, after in trainer.model.named_parameters() if not torch.equal(before[name], after)}
    assert moved == {name for name in before if "lora_" in name}


def test_gradient_checkpointing_changes_nothing(tiny_folder, tmp_path):
    runs = []
    for checkpointing in (False, True):
        trainer = online.trainer(
            tiny_folder,
            tmp_path / str(checkpointing),
            labeller=CountedLabeller(),
            max_steps=4,
            gradient_checkpointing=checkpointing,
            discriminator_lora_dropout=0.0,
        )
        trainer.train()
        runs.append(harness.weights(trainer.model))
    assert harness.largest_difference(*runs) < 1e-6


# ---- Interruption ---------------------------------------------------------------------------------------------------


def test_labeller_that_fails_leaves_the_run_resumable(tiny_folder, tmp_path):
    """
    The run stops with a sentence, having saved what was trained; when the labeler works again it goes on, asks only
    for what is missing, and ends where the undisturbed run ends, bit for bit.
    """
    options = dict(max_steps=6, save_strategy="steps", save_steps=100, label_retries=0, label_batch_size=1)
    whole = online.trainer(tiny_folder, tmp_path / "whole", labeller=CountedLabeller(), **options)
    whole.train()

    labeller = CountedLabeller()
    compare = labeller._compare

    def breaks(a, b):
        if len(labeller.asked) == 5 and fails[0]:
            raise ConnectionError("the judge is away")
        return compare(a, b)

    fails, labeller._compare = [True], breaks
    trainer = online.trainer(tiny_folder, tmp_path / "broken", labeller=labeller, **options)
    with pytest.raises(LabellerError, match="the judge is away.*4 gold labels are in .*resume_from_checkpoint=True"):
        trainer.train()
    assert (tmp_path / "broken" / "checkpoint-2" / "trainer_state.json").exists()
    fails[0] = False
    resumed = online.trainer(tiny_folder, tmp_path / "broken", labeller=labeller, **options)
    resumed.train(resume_from_checkpoint=True)
    assert len(labeller.asked) == len(whole.gold.labeller.asked) + 1  # the one that failed
    assert resumed.gold.entries == whole.gold.entries
    assert harness.largest_difference(harness.weights(whole.model), harness.weights(resumed.model)) == 0
    harness.assert_same_logs(harness.logs(whole), harness.logs(resumed))


def test_unfinished_checkpoint_is_passed_over(tiny_folder, tmp_path):
    """A checkpoint without its last file is none; without any, training begins again with the ledger's labels."""
    options = dict(max_steps=4, save_strategy="steps", save_steps=2)
    trainer = online.trainer(tiny_folder, tmp_path, labeller=CountedLabeller(), **options)
    trainer.train()
    expected = harness.weights(trainer.model)
    for broken in ("checkpoint-4", "checkpoint-2"):
        state = tmp_path / broken / "trainer_state.json"
        state.write_text(state.read_text()[:-20])
        labeller = CountedLabeller()
        again = online.trainer(tiny_folder, tmp_path, labeller=labeller, **{**options, "save_strategy": "no"})
        again.train(resume_from_checkpoint=True)
        assert labeller.asked == []
        assert harness.largest_difference(expected, harness.weights(again.model)) == 0


def test_ledger_warm_starts_a_new_run(tiny_folder, tmp_path):
    """A ledger, as preference data, teaches a new discriminator; and any trainer of the project takes it."""
    first = online.trainer(
        tiny_folder, tmp_path / "a", labeller=RewardFunctionLabeller(decisive), max_steps=4, labels_per_window=8
    )
    first.train()
    data = ledger_to_dataset(tmp_path / "a" / "gold_labels.jsonl", tokenized=True)
    assert len(data) == 16
    second = online.trainer(
        tiny_folder, tmp_path / "b", label_budget=0, discriminator_dataset=data, warm_start_epochs=8, max_steps=2
    )
    second.train()
    rows = [{**row, "prompt": "", "chosen": "", "rejected": ""} for row in data]
    samples = [
        [online_sample(row["prompt_ids"], row[f"{side}_ids"]) for row in rows] for side in ("chosen", "rejected")
    ]
    chosen, rejected = (second.discriminator.score(side) for side in samples)
    assert sum(c > r for c, r in zip(chosen, rejected, strict=True)) >= 14
    offline = harness.trainer(
        BY_ID["fdpo"], tiny_folder, tmp_path / "c", train_dataset=data.remove_columns("confidence")
    )
    offline.train()


def online_sample(prompt_ids, completion_ids):
    from trl_ext.d2po.discriminator import Sample

    return Sample("", prompt_ids, "", completion_ids)


def test_collapse_is_reported(tiny_folder, tmp_path, caplog):
    """
    A discriminator that is no better than a coin on the fresh labels of its last windows is reported; a good one not.
    """
    for name, sign, reported in (("good", 1.0, False), ("bad", -1.0, True)):
        caplog.clear()
        trainer = online.trainer(
            tiny_folder,
            tmp_path / name,
            labeller=RewardFunctionLabeller(decisive),
            **own_model(),
            labels_per_window=8,
            collapse_windows=3,
            max_steps=6,
        )
        trainer.discriminator.members, trainer.discriminator.is_trainable = [GoldScores(sign)], False
        with caplog.at_level(logging.WARNING):
            trainer.train()
        assert ("The discriminator is at chance" in caplog.text) == reported


# ---- The card -------------------------------------------------------------------------------------------------------


def test_card_says_who_labelled(tiny_folder, tmp_path):
    """Labels bought, by whom, what they cost; the method, its loss and settings; not where the ledger lies."""
    labeller = CountedLabeller(name="two vowel counters", cost=0.25)
    ledger = tmp_path / "elsewhere" / "labels.jsonl"
    trainer = online.trainer(
        tiny_folder, tmp_path / "out", labeller=labeller, max_steps=4, loss="ipo", ledger_file=str(ledger)
    )
    trainer.train()
    trainer.save_model()
    card = (tmp_path / "out" / "README.md").read_text()
    assert re.search(r"gold labels bought \| `6 by two vowel counters \(cost 1\.5\)`", card)
    assert re.search(r"\| loss \| `ipo`", card) and "2405.01511" in card and "replay_decay" in card
    assert "(32 prompts)" in card and "Pairs seen: 16 in 4 steps" in card
    assert "elsewhere" not in card and not re.search(r"\bNone\b", card)
    assert len(ledger.read_text().splitlines()) == 6
    assert (tmp_path / "out" / "discriminator" / "score_head.safetensors").exists()
    saved = {json.loads(p.read_text())["peft_type"] for p in (tmp_path / "out").rglob("adapter_config.json")}
    assert saved == {"LORA"}


# ---- Refusals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, message",
    [
        ({"labels_per_window": 9}, "`labels_per_window=9` must be between 0 and `window_size=8`"),
        ({"window_size": 6}, "`window_size=6` must be a multiple of the 4 pairs of an optimizer step"),
        ({"label_budget": 2}, "`label_budget=2` does not last for one window"),
        ({"label_budget": -1}, "`label_budget` must be an integer of at least 0"),
        ({"label_budget": 0, "discriminator": "none", "labels_per_window": 8}, "nothing orders the pairs"),
        ({"discriminator": "none"}, "leaves 5 pairs of each window without an order"),
        ({"discriminator": "none", "labels_per_window": 8, "num_completions": 3}, "needs a discriminator"),
        ({"discriminator": "none", "labels_per_window": 8, "selection": "random"}, "has no effect"),
        ({"discriminator": "self", "selection": "disagreement"}, "needs dropout or an ensemble"),
        ({"selection": "disagreement", "discriminator_lora_dropout": 0.0}, "needs dropout or an ensemble"),
        ({"discriminator": "self", "discriminator_ensemble_size": 2}, "is a number of adapters"),
        ({"selection": "margin"}, "`selection` must be one of 'confidence', 'random', 'disagreement', got 'margin'"),
        ({"tie_policy": "keep"}, "`tie_policy` must be one of"),
        ({"num_completions": 1}, "`num_completions` must be an integer of at least 2, got 1"),
        ({"temperature": 0.0}, "`temperature` must be .*, got 0.0"),
        ({"top_p": 1.5}, "`top_p` must be a number in"),
        ({"replay_decay": 1.1}, "`replay_decay` must be a number in"),
        ({"label_timeout": 0}, "`label_timeout` must be .*, got 0"),
        ({"max_completion_length": 64, "max_length": 64}, "leaves no room for a prompt"),
        ({"generation_kwargs": {"temperature": 0.5}}, "`generation_kwargs` has 'temperature': set `temperature`"),
        ({"generation_kwargs": '{"num_beams": 4}'}, "`generation_kwargs` has 'num_beams', which is not supported"),
        ({"train_sampling_strategy": "group_by_length"}, "prompts are drawn a window at a time"),
        (
            {"precompute_ref_log_probs": True},
            "`precompute_ref_log_probs=True` is not supported.*sampled during training",
        ),
        ({"ignore_data_skip": True}, "`ignore_data_skip=True` is not supported"),
        ({"beta": 0.0}, "`beta` must be a positive"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_settings_that_cannot_be(options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        online.config(tmp_path, **options)


def test_defaults_are_resolved(tmp_path):
    """A window of four steps, one label in eight pairs; every pair without a discriminator; none without a budget."""
    settings = {**harness.defaults(tmp_path), "per_device_train_batch_size": 2, "gradient_accumulation_steps": 3}
    assert (c := D2POConfig(**settings)).window_size == 24 and c.labels_per_window == 3 and c.buys_labels
    assert D2POConfig(**settings, discriminator="none").labels_per_window == 24
    assert D2POConfig(**settings, label_budget=0).labels_per_window == 0


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"labeller": None}, ValueError, "`gold_labeller` is needed"),
        ({"labeller": None, "label_budget": 0}, ValueError, "would never be trained"),
        ({"labeller": max, "label_budget": 0}, ValueError, "would never be asked"),
        ({"labeller": "gpt"}, TypeError, "`gold_labeller` must be a `Judge`.* got a `str`"),
        ({"discriminator_dataset": tiny.dataset(4), "discriminator": "self"}, ValueError, "has no effect"),
        ({"peft_config": None}, ValueError, "the policy must be trained with LoRA"),
        ({"loss": "simper", "discriminator": "self"}, ValueError, "has no reference"),
        ({"discriminator": reward_model(2), "discriminator_processing_class": None}, ValueError, "has 2 outputs"),
        ({"discriminator": reward_model()}, ValueError, "`discriminator_processing_class` is needed"),
        ({"train_dataset": tiny.dataset()}, ValueError, "already has pairs .*select_columns"),
        ({"train_dataset": online.prompts().rename_column("prompt", "text")}, ValueError, "has no column `prompt`"),
        ({"train_dataset": online.prompts(6)}, ValueError, "has 6 prompts, fewer than a window of `window_size=8`"),
        ({"max_length": 10}, ValueError, "Every prompt of the train dataset has more than 2 tokens"),
        (
            {"train_dataset": IterableDataset.from_generator(lambda: iter([{"prompt": "a"}]))},
            TypeError,
            "is a `IterableDataset`",
        ),
        (
            {"train_dataset": Dataset.from_list([{"prompt": "a"}, {"prompt": ""}] * 8)},
            ValueError,
            "Row 1 of the train dataset has an empty prompt",
        ),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_arguments_that_cannot_be(options, error, message, tiny_folder, tmp_path):
    options = {"labeller": CountedLabeller(), **options}
    with pytest.raises(error, match=message):
        online.trainer(tiny_folder, tmp_path, **options)


def test_discriminator_is_named_in_the_configuration(tiny_folder, tmp_path):
    def make(**kwargs):
        return D2POTrainer(
            tiny_folder,
            args=online.config(tmp_path, **kwargs.pop("config", {})),
            train_dataset=online.prompts(),
            **kwargs,
        )

    with pytest.raises(TypeError, match=r"D2POConfig\(discriminator='self'\)"):
        make(discriminator="self", gold_labeller=CountedLabeller())
    with pytest.raises(ValueError, match="another in `args`"):
        make(discriminator=LoraConfig(), gold_labeller=CountedLabeller(), config={"discriminator": "self"})


@pytest.mark.parametrize("labeller", [lambda texts: [1.0], "gpt-4o"])
def test_what_cannot_label_is_refused_before_the_model_is_loaded(labeller, tmp_path):
    with pytest.raises(TypeError, match=r"`gold_labeller`.*\(prompts, completions, \*\*columns\)"):
        D2POTrainer(
            str(tmp_path / "no such model"),
            args=online.config(tmp_path),
            train_dataset=online.prompts(),
            gold_labeller=labeller,
        )


def test_a_reward_function_labels(tiny_folder, tmp_path):
    """
    A reward function as TRL takes it is gold as it is: the same run as with a judge made of it, with free rewards
    logged.
    """
    runs = []
    for name, labeller in (("function", online.vowels), ("judge", RewardFunctionJudge(online.vowels))):
        trainer = online.trainer(tiny_folder, tmp_path / name, labeller=labeller, max_steps=2)
        trainer.train()
        runs.append(([e["verdict"] for e in trainer.gold.entries], harness.weights(trainer.model)))
        assert {entry["labeller"] for entry in trainer.gold.entries} == {"vowels"}
        assert "d2po/gold_reward" in trainer.state.log_history[0]
    assert runs[0][0] == runs[1][0] and all(torch.equal(runs[0][1][key], runs[1][1][key]) for key in runs[0][1])


def test_long_prompts_are_left_out_with_a_word(tiny_folder, tmp_path, caplog):
    rows = [{"prompt": "Q" * (3 if i % 2 else 40)} for i in range(32)]
    with caplog.at_level(logging.WARNING):
        trainer = online.trainer(
            tiny_folder, tmp_path, labeller=CountedLabeller(), train_dataset=Dataset.from_list(rows), max_length=30
        )
    assert len(trainer.train_dataset) == 16 and "Left out 16 of the 32 prompts" in caplog.text


@pytest.mark.parametrize("kind", ["function", "judge", "rewards", "template"])
def test_columns_that_a_labeller_needs_are_looked_for_in_the_constructor(kind, tiny_folder, tmp_path):
    """Not when the first labels are bought; a column that has a default, or is there, is no matter."""
    from trl_ext.d2po import JudgeLabeller, RewardFunctionLabeller
    from trl_ext.evaluation import RewardFunctionJudge

    def pairs(prompts, completions_a, completions_b, solution, note="none"):
        return [float(len(a) > len(s)) for a, s in zip(completions_a, solution, strict=True)]

    def reward(prompts, completions, solution):
        return [float(len(c) == len(s)) for c, s in zip(completions, solution, strict=True)]

    labeller = {
        "function": lambda: pairs,
        "judge": lambda: RewardFunctionJudge(reward),
        "rewards": lambda: RewardFunctionLabeller(reward),
        "template": lambda: JudgeLabeller(
            "m", "http://127.0.0.1:9/v1", template="{solution} {completion_a} {completion_b}"
        ),
    }[kind]()
    with pytest.raises(ValueError, match="needs the column `solution`"):
        online.trainer(tiny_folder, tmp_path / "a", labeller=labeller)
    rows = online.prompts()
    rows = rows.add_column("solution", ["x"] * len(rows))
    online.trainer(tiny_folder, tmp_path / "b", labeller=labeller, train_dataset=rows)


@pytest.mark.parametrize(
    "row, message",
    [
        ({"prompt": None}, "Row 3 of the train dataset has `prompt=None`"),
        ({"prompt": ""}, "Row 3 of the train dataset has an empty prompt"),
        ({"prompt": []}, "Row 3 of the train dataset has an empty conversation"),
        ({"prompt": [{"role": "user", "content": None}]}, "Row 3 of the train dataset has no content in message 0"),
        ({"prompt": [{"role": None, "content": "x"}]}, "Row 3 of the train dataset has the role None in message 0"),
        ({"tools": "{not json"}, "Row 3 of the train dataset has `tools` that are not JSON"),
        ({"prompt_ids": []}, "Row 3 of the train dataset has an empty prompt"),
        ({"completions": "x"}, "has the column `completions`, which is the name of an argument"),
        ({"self": "x"}, "has the column `self`, which is the name of an argument"),
    ],
    ids=str,
)
def test_prompts_that_cannot_be(row, message, tiny_folder, tmp_path):
    """Each is refused in the constructor with its row, for texts and conversations."""
    text = isinstance(row.get("prompt", ""), str) or row["prompt"] is None
    prompt = "Q?" if text and "tools" not in row else [{"role": "user", "content": "Q?"}]
    rows = [
        {**dict.fromkeys(row), "prompt": prompt, **({"prompt_ids": [5]} if "prompt_ids" in row else {})}
        for _ in range(16)
    ]
    rows[3] = {**rows[3], **row}
    with pytest.raises(ValueError, match=message):
        online.trainer(tiny_folder, tmp_path, labeller=online.vowels, train_dataset=Dataset.from_list(rows))


@pytest.mark.parametrize(
    "row, message",
    [
        ({"prompt": [{"role": "user", "content": 5}]}, r"a int as content of `prompt\[0\]`"),
        ({"prompt": [{"from": "human", "value": "x"}]}, r"ShareGPT.*`prompt\[0\]`"),
        ({"prompt": '[{"role": "user", "content": "x"}]'}, "messages as JSON text in `prompt`"),
        ({"prompt": [{"role": "user", "content": "x"}], "tools": 3}, "a int as `tools`"),
        (
            {"prompt": [{"role": "user", "content": "x"}], "chat_template_kwargs": "x"},
            "a str as `chat_template_kwargs`",
        ),
    ],
    ids=str,
)
def test_prompts_are_read_as_those_of_pairs(row, message):
    with pytest.raises(PromptError, match=message):
        tokenize_prompt(row, tiny.tokenizer())


def test_a_prompt_that_ends_in_the_assistants_turn_is_continued():
    prompt = [{"role": "user", "content": "Q?"}, {"role": "assistant", "content": "Well,"}]
    ids = tokenize_prompt({"prompt": prompt}, tiny.tokenizer())
    assert tiny.tokenizer().decode(ids) == "<|user|>Q?<|end|><|assistant|>Well,"


def test_tools_may_be_json(tiny_folder, tmp_path):
    """As `trl.DPOTrainer` takes them: the same tokens as from the list."""
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = "{% for t in tools or [] %}{{ t.function.name }}{% endfor %}" + tokenizer.chat_template
    tools = [{"type": "function", "function": {"name": "search"}}]
    prompt = [{"role": "user", "content": "Q?"}]
    ids = []
    for name, value in (("json", json.dumps(tools)), ("list", tools), ("none", None)):
        rows = Dataset.from_list([{"prompt": prompt, "tools": value}] * 16)
        trainer = online.trainer(
            tiny_folder, tmp_path / name, labeller=online.vowels, train_dataset=rows, processing_class=tokenizer
        )
        ids.append(trainer.train_dataset[0]["prompt_ids"])
    assert ids[0] == ids[1] != ids[2]


@pytest.mark.parametrize(
    "given, message",
    [
        ({"repetition_penality": 1.3}, "has 'repetition_penality'.*Did you mean 'repetition_penalty'"),
        ({"stop": ["x"]}, "has 'stop', which is no setting"),
        ({"output_scores": True}, "has 'output_scores', which is not supported"),
        ({"use_cache": False}, "has 'use_cache'"),
        ({"eos_token_id": 3}, "has 'eos_token_id'"),
        ("{not json", "must be a dictionary or the JSON text of one"),
        ("[1]", "must be a dictionary"),
    ],
    ids=str,
)
def test_generation_settings_that_cannot_be(given, message, tmp_path):
    with pytest.raises(ValueError, match=f"`generation_kwargs` {message}"):
        online.config(tmp_path, generation_kwargs=given)
    online.config(tmp_path, generation_kwargs={"repetition_penalty": 1.3, "min_new_tokens": 2})


def test_card_of_a_run_that_stops(tiny_folder, tmp_path):
    """
    Before training it tells what the ledger holds; when a run stops for want of labels, how far it came; it does not
    list the options of a sampler that was not used.
    """
    first = online.trainer(tiny_folder, tmp_path, labeller=CountedLabeller(), max_steps=4, save_strategy="no")
    first.train()
    labeller = CountedLabeller()
    labeller._compare = lambda a, b: float("nan")
    again = online.trainer(tiny_folder, tmp_path, labeller=labeller, max_steps=8, save_strategy="no", seed=1)
    again.create_model_card()
    card = tmp_path / "README.md"
    assert "gold labels bought | `6 by vowels (cost 6)`" in card.read_text() and "vllm_" not in card.read_text()
    with pytest.raises(LabellerError, match="gave the verdict nan"):
        again.train()
    assert "gold labels bought | `6 by vowels (cost 6)`" in card.read_text()


def test_card_of_a_resumed_run(tiny_folder, tmp_path):
    """The card of a resumed run counts the labels of the whole run and its steps; before, it is the earlier run's."""
    options = dict(labeller=CountedLabeller(), save_strategy="steps", save_steps=4)
    first = online.trainer(tiny_folder, tmp_path, max_steps=4, **options)
    first.train()
    first.save_model()
    card = tmp_path / "README.md"
    assert "Pairs seen: 16 in 4 steps" in card.read_text() and "bought | `6 by vowels (cost 6)`" in card.read_text()
    again = online.trainer(tiny_folder, tmp_path, max_steps=8, **options)
    again.state_card_details(dataset_name="org/prompts")  # as the launcher does: it writes no card before training
    assert "Pairs seen: 16 in 4 steps" in card.read_text()
    again.train(resume_from_checkpoint=True)
    again.save_model()
    bought = len((tmp_path / "gold_labels.jsonl").read_text().splitlines())
    assert bought > 6
    for text in (f"bought | `{bought} by vowels (cost {bought})`", "Pairs seen: 32 in 8 steps", "org/prompts"):
        assert text in card.read_text(), text
    assert "not been trained" not in card.read_text() and "vllm_" not in card.read_text()


def test_formats_of_prompts(tiny_folder, tmp_path):
    """A dataset with a format is read as it is; one with a transform, which would be lost, is refused."""
    rows = online.prompts(16)
    trainer = online.trainer(tiny_folder, tmp_path, labeller=online.vowels, train_dataset=rows.with_format("torch"))
    assert isinstance(trainer.train_dataset[0]["prompt_ids"], list)
    with pytest.raises(ValueError, match="train dataset has a transform"):
        online.trainer(
            tiny_folder, tmp_path, labeller=online.vowels, train_dataset=rows.with_transform(lambda batch: batch)
        )
