"""D2PO's rounds: turns a window's prompts into ordered pairs."""

from collections.abc import Callable
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from accelerate.utils import gather_object
from datasets import Dataset

from ..training.seeds import derive_seed
from .d2po_config import D2POConfig
from .discriminator import Discriminator, GoldExample, Sample
from .labelling import GoldLabels
from .prompts import PROMPT_COLUMNS
from .window import Completion, Pair, Window, order_pair, select_pairs


logger = get_logger(__name__)

# With fewer fresh labels than this, the discriminator's accuracy is too noisy to call it collapsed.
LEAST_FOR_COLLAPSE = 20


class Rounds:
    """
    Runs the steps of a window: sample, score, choose, buy labels, train the discriminator, order the pairs. The result
    depends only on the policy, the discriminator, the labels used so far and the seed.

    Args:
        config ([`D2POConfig`]): Settings.
        sampler (`Callable`): `(prompts, count, seeds)` -> completions, of the current policy.
        discriminator ([`Discriminator`], *optional*): Orders the pairs without a gold label.
        gold ([`GoldLabels`]): Source of the labels.
        accelerator ([`~accelerate.Accelerator`]): Gathers the window from all processes.
    """

    def __init__(
        self,
        config: D2POConfig,
        sampler: Callable,
        discriminator: Discriminator | None,
        gold: GoldLabels,
        accelerator: Accelerator,
    ):
        self.config = config
        self.sampler = sampler
        self.discriminator = discriminator
        self.gold = gold
        self.accelerator = accelerator
        self.fresh_accuracy: list[list[float]] = []  # (right, decisive) fresh labels of each of the last windows

    # ---- A window --------------------------------------------------------------------------------------------------

    def make_window(self, examples: list[dict], number: int, step: int) -> Window:
        """
        Makes window `number` from this process's share of its prompts. Every process must call it.

        Raises:
            [`LabellerError`]: On every process, if gold labels could not be obtained.
        """
        self.gold.absorb_unclaimed(number)
        share, rank = len(examples), self.accelerator.process_index
        seeds = [(self.config.seed, "train", number, rank * share + i) for i in range(share)]
        pairs, sampled = self._sample_pairs(examples, seeds, with_spread=self.config.selection == "disagreement")
        # From here on every process has the whole window and treats it alike.
        pairs, sampled = gather_object(pairs), gather_object(sampled)
        sums = self._describe_samples(pairs, sampled)
        metrics = {name: total / count for name, (total, count) in sums.items()}
        self._label(pairs, number, step, metrics)
        if self.discriminator is not None:
            self._teach(self.discriminator, number, metrics)
            if self.config.rescore:
                self._rescore(self.discriminator, pairs, rank * share, share)
        rows = [order_pair(pair, self.config.tie_policy) for pair in pairs]
        trained = [pair for pair, row in zip(pairs, rows, strict=True) if row.weight > 0]
        if not trained:
            logger.warning(f"Window {number} has ties only, so the policy learns nothing from it.")
        silver = sum(not pair.is_gold for pair in trained)
        metrics["d2po/silver_share"] = silver / max(1, len(trained))
        metrics["d2po/tied_share"] = 1 - len(trained) / len(pairs)
        return Window(number, rows, metrics)

    def _sample_pairs(
        self, examples: list[dict], seeds: list[tuple], with_spread: bool = False
    ) -> tuple[list[Pair], list[dict]]:
        """Returns a pair per prompt, scored if there is a discriminator, and [`_measure`] of all completions."""
        count = self.config.num_completions
        groups = self.sampler([row["prompt_ids"] for row in examples], count, seeds)
        columns = [{k: v for k, v in row.items() if k not in PROMPT_COLUMNS} for row in examples]
        scores: list[list[float] | None] = [None] * len(examples)
        if self.discriminator is not None:
            samples = [
                _sample(row["prompt"], row["prompt_ids"], completion)
                for row, group in zip(examples, groups, strict=True)
                for completion in group
            ]
            flat = self.discriminator.score(samples)
            scores = [flat[i : i + count] for i in range(0, len(flat), count)]
        pairs = []
        for row, group, extra, of_group in zip(examples, groups, columns, scores, strict=True):
            first, second = _choose_two(group, of_group)
            chosen = None if of_group is None else [of_group[first], of_group[second]]
            pairs.append(Pair(row["prompt"], row["prompt_ids"], group[first], group[second], extra, chosen))
        if with_spread and self.discriminator is not None:
            sides = (
                [_sample(pair.prompt, pair.prompt_ids, getattr(pair, side)) for pair in pairs]
                for side in ("first", "second")
            )
            for pair, spread in zip(pairs, self.discriminator.disagreement(*sides, *seeds[0]), strict=True):
                pair.spread = spread
        return pairs, self._measure(examples, groups, columns)

    def _measure(self, examples: list[dict], groups: list[list[Completion]], columns: list[dict]) -> list[dict]:
        """Length of every completion, whether it is finished, and its reward if gold is free."""
        measured: list[dict[str, Any]] = [
            {"length": len(c.ids), "finished": c.finished} for group in groups for c in group
        ]
        labeller = self.gold.labeller
        if labeller is not None and labeller.is_free:
            count = self.config.num_completions
            prompts = [row["prompt"] for row in examples for _ in range(count)]
            replies = [c.as_reply(row["prompt"]) for row, group in zip(examples, groups, strict=True) for c in group]
            repeated = {name: [extra[name] for extra in columns for _ in range(count)] for name in columns[0]}
            for row, reward in zip(measured, labeller.rewards(prompts, replies, **repeated), strict=True):
                row["reward"] = reward
        return measured

    def _describe_samples(self, pairs: list[Pair], sampled: list[dict]) -> dict[str, tuple[float, int]]:
        """Returns the sum and the count of each metric."""
        metrics = {
            "d2po/completion_length": (sum(row["length"] for row in sampled), len(sampled)),
            "d2po/truncated_share": (sum(not row["finished"] for row in sampled), len(sampled)),
        }
        if self.discriminator is not None:
            metrics["d2po/margin"] = (sum(abs(pair.margin) for pair in pairs), len(pairs))
        rewards = [row["reward"] for row in sampled if row.get("reward") is not None]
        if rewards:
            metrics["d2po/gold_reward"] = (sum(rewards), len(rewards))
        if (
            self.discriminator is not None
            and all("reward" in row for row in sampled)
            and self.config.num_completions == 2
        ):
            # Free gold tells how well the discriminator orders the pairs that were not labeled.
            compared = [
                (pair.margin, first["reward"] - second["reward"])
                for pair, first, second in zip(pairs, sampled[::2], sampled[1::2], strict=True)
                if first["reward"] is not None and second["reward"] is not None
            ]
            right, count = _count_right(compared)
            if count:
                metrics["d2po/silver_accuracy"] = (right, count)
        return metrics

    # ---- Gold labels and the discriminator -------------------------------------------------------------------------

    def _label(self, pairs: list[Pair], number: int, step: int, metrics: dict[str, float]) -> None:
        """Buys labels for the window and sets the verdict of every labeled pair."""
        config = self.config
        seen, candidates = set(), []
        for index, pair in enumerate(pairs):
            # A pair with a verdict is not bought again; one of equal completions has none.
            if not pair.is_identical and pair.key not in seen and self.gold.known(pair) is None:
                seen.add(pair.key)
                candidates.append(index)
        count = int(min(config.labels_per_window or 0, self.gold.remaining)) if config.buys_labels else 0
        generator = torch.Generator().manual_seed(derive_seed(config.seed, "select", number))
        strategy = config.selection if self.discriminator is not None else "random"
        chosen = sorted(select_pairs(strategy, pairs, candidates, count, generator))
        self.gold.label([pairs[i] for i in chosen], number, step)
        for pair in pairs:
            entry = self.gold.known(pair)
            if entry is not None and entry["verdict"] is not None:
                is_first = entry["completion_a_ids"] == pair.first.ids
                pair.verdict = entry["verdict"] if is_first else 1 - entry["verdict"]
                pair.is_gold = True
        metrics["d2po/gold_labels"] = float(len(self.gold.used))
        fresh = [pairs[i] for i in chosen if pairs[i].is_gold]
        if fresh and self.discriminator is not None:
            compared = [(pair.margin, pair.verdict - 0.5) for pair in fresh if pair.verdict is not None]
            right, decisive = _count_right(compared)
            if decisive:
                metrics["d2po/gold_accuracy"] = right / decisive
            self._watch_accuracy(number, right, decisive)

    def _watch_accuracy(self, number: int, right: float, decisive: int) -> None:
        """Reports a discriminator that has been at chance on the fresh labels of the last windows."""
        self.fresh_accuracy = [*self.fresh_accuracy, [right, decisive]][-self.config.collapse_windows :]
        right, decisive = (sum(column) for column in zip(*self.fresh_accuracy, strict=True))
        is_full = len(self.fresh_accuracy) == self.config.collapse_windows and decisive >= LEAST_FOR_COLLAPSE
        # At chance: within one standard error of a fair coin.
        if is_full and right / decisive < 0.5 + 0.5 / decisive**0.5:
            logger.warning(
                f"The discriminator is at chance: right on {right:g} of the last {decisive:g} gold labels (windows up "
                f"to {number}), before learning from them. The silver labels are noise. Raise `labels_per_window`, "
                "`discriminator_learning_rate` or `discriminator_epochs`, or give a `discriminator_dataset`. (Labels "
                "chosen by confidence are the hardest; with `selection='random'` the accuracy is that on all pairs.)"
            )

    def _teach(self, discriminator: Discriminator, number: int, metrics: dict[str, float]) -> None:
        """Trains the discriminator on the gold labels so far, if there are fresh ones."""
        examples = [
            GoldExample.from_entry(entry, number)
            for entry in self.gold.used_entries()
            if entry["verdict"] is not None and not (entry["verdict"] == 0.5 and self.config.tie_policy == "drop")
        ]
        if self.config.discriminator_learning_rate > 0 and any(example.age == 0 for example in examples):
            loss = discriminator.learn(examples, self.config.replay_decay, number)
            if loss is not None:
                metrics["d2po/discriminator_loss"] = loss

    def warm_start(self, dataset: Dataset, decode: Callable[[list[int]], str]) -> None:
        """Trains the discriminator on tokenized preference pairs, before the first window."""
        examples = []
        for row in dataset:
            # The dataset's text is preferred: a discriminator with another tokenizer reads text.
            prompt = row.get("prompt") or decode(row["prompt_ids"])
            chosen, rejected = (
                Sample(prompt, row["prompt_ids"], row.get(side) or decode(row[f"{side}_ids"]), row[f"{side}_ids"])
                for side in ("chosen", "rejected")
            )
            examples.append(GoldExample(chosen, rejected, target=row.get("confidence") or 1.0))
        discriminator = self.discriminator
        assert discriminator is not None  # `discriminator_dataset` is refused without one
        epochs, discriminator.epochs = discriminator.epochs, self.config.warm_start_epochs
        try:
            loss = discriminator.learn(examples, 0.0, "warm start")
        finally:
            discriminator.epochs = epochs
        if loss is not None:
            logger.info(
                f"The discriminator learned from {len(examples)} pairs before the first window: loss {loss:.4f}."
            )

    def _rescore(self, discriminator: Discriminator, pairs: list[Pair], start: int, share: int) -> None:
        own = pairs[start : start + share]
        scores = discriminator.score([_sample(p.prompt, p.prompt_ids, c) for p in own for c in (p.first, p.second)])
        everywhere = gather_object([scores[i : i + 2] for i in range(0, len(scores), 2)])
        for pair, of_pair in zip(pairs, everywhere, strict=True):
            pair.scores = of_pair

    # ---- Evaluation ------------------------------------------------------------------------------------------------

    def evaluation_pairs(
        self, examples: list[dict], counted: int | None = None
    ) -> tuple[list[dict], dict[str, tuple[float, int]]]:
        """
        Samples pairs from the policy and orders them by free gold or by the discriminator. It buys and uses no labels.

        Args:
            examples (`list[dict]`):
                This process's prompts.
            counted (`int`, *optional*):
                Prompts that count in the metrics, from the first on in the order of the processes; all by default.

        Returns:
            This process's pairs, and the sum and count of each metric over all processes.
        """
        seeds = [(self.config.seed, "evaluation", tuple(row["prompt_ids"])) for row in examples]
        pairs, sampled = self._sample_pairs(examples, seeds)
        count, rows = self.config.num_completions, []
        everywhere, sampled_everywhere = gather_object(pairs), gather_object(sampled)
        counted = len(everywhere) if counted is None else counted
        metrics = self._describe_samples(everywhere[:counted], sampled_everywhere[: counted * count])
        for i, pair in enumerate(pairs):
            group = sampled[i * count : (i + 1) * count]
            if count == 2 and all(row.get("reward") is not None for row in group):
                pair.verdict, pair.is_gold = float(group[0]["reward"] >= group[1]["reward"]), True
            row = order_pair(pair, "silver")
            rows.append({"prompt_ids": row.prompt_ids, "chosen_ids": row.chosen_ids, "rejected_ids": row.rejected_ids})
        return rows, metrics


def _sample(prompt: Any, prompt_ids: list[int], completion: Completion) -> Sample:
    return Sample(prompt, prompt_ids, completion.as_reply(prompt), completion.ids)


def _choose_two(group: list, scores: list[float] | None) -> tuple[int, int]:
    """Indices of the best and the worst completion by score, in the order of sampling."""
    if len(group) == 2:
        return 0, 1
    assert scores is not None  # without a discriminator there are two
    order = sorted(range(len(group)), key=scores.__getitem__)
    best, worst = order[-1], order[0]
    if scores[best] == scores[worst]:
        # An untrained discriminator gives equal scores: take two completions that differ.
        best = 0
        worst = next((i for i in range(1, len(group)) if group[i].ids != group[0].ids), 1)
    return min(best, worst), max(best, worst)


def _count_right(compared: list[tuple[float, float]]) -> tuple[float, int]:
    """
    Counts, for `(margin, preference)` of each pair, the margins that agree with a decisive preference (a margin of 0
    counts one half), and the decisive preferences.
    """
    decisive = [(margin, preference) for margin, preference in compared if preference != 0]
    return sum(0.5 if margin == 0 else float(margin * preference > 0) for margin, preference in decisive), len(
        decisive
    )
