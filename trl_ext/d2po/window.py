"""
A window: the pairs that are sampled together, the choice of those that get gold labels, and the order of training.
"""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch.utils.data import Sampler

from ..training.seeds import derive_seed
from .ledger import request_key


SELECTIONS = ("confidence", "random", "disagreement")
TIE_POLICIES = ("discriminator", "silver", "drop")


@dataclass
class Completion:
    """
    One sampled completion.

    Args:
        ids (`list[int]`): The sampled tokens, with the EOS token if one was sampled.
        text (`str`): Their text, without special tokens.
        finished (`bool`): Whether the model ended it; otherwise it was cut at `max_completion_length`.
    """

    ids: list[int]
    text: str
    finished: bool = True

    def as_reply(self, prompt: Any) -> Any:
        """The completion as labelers and reward functions take it: text, or an assistant message to a conversation."""
        return self.text if isinstance(prompt, str) else [{"role": "assistant", "content": self.text}]


@dataclass
class Pair:
    """
    Two completions of one prompt.

    Args:
        prompt (`str` or `list[dict]`): The prompt as in the dataset.
        prompt_ids (`list[int]`): Its tokens.
        first, second ([`Completion`]): The completions, in the order in which they were sampled.
        columns (`dict`): Further columns of the row, which the labeler gets.
        scores (`list[float]`, *optional*): The discriminator's scores of the two.
        spread (`float`, *optional*): How far the discriminator's members disagree about the pair.
        verdict (`float`, *optional*): Gold's probability that `first` is better.
        is_gold (`bool`): Whether a gold verdict was given.
    """

    prompt: Any
    prompt_ids: list[int]
    first: Completion
    second: Completion
    columns: dict = field(default_factory=dict)
    scores: list[float] | None = None
    spread: float | None = None
    verdict: float | None = None
    is_gold: bool = False

    @property
    def key(self) -> str:
        return request_key(self.prompt_ids, self.first.ids, self.second.ids, self.columns)

    @property
    def is_identical(self) -> bool:
        return self.first.ids == self.second.ids

    @property
    def margin(self) -> float:
        """The discriminator's score of `first` minus that of `second`."""
        return self.scores[0] - self.scores[1] if self.scores is not None else 0.0


def select_pairs(
    strategy: str, pairs: list[Pair], candidates: list[int], count: int, generator: torch.Generator
) -> list[int]:
    """
    Chooses which pairs to buy gold labels for.

    Args:
        strategy (`str`):
            `"confidence"` chooses the pairs whose two scores are closest, `"disagreement"` those about whose order the
            discriminator's members (or its forwards with dropout) disagree most, `"random"` any.
        pairs (`list[Pair]`):
            The whole window, of all processes.
        candidates (`list[int]`):
            Indices of the pairs to choose from.
        count (`int`):
            How many to choose; fewer if there are fewer candidates.
        generator (`torch.Generator`):
            Decides where the strategy does not, as between equal scores.

    Returns:
        `list[int]`: Indices into `pairs`, best candidate first.
    """
    # Shuffled first, so that equal candidates are chosen at random and not by their position in the batch.
    order = [candidates[i] for i in torch.randperm(len(candidates), generator=generator).tolist()]
    if strategy == "confidence":
        order.sort(key=lambda i: abs(pairs[i].margin))
    elif strategy == "disagreement":
        order.sort(key=lambda i: pairs[i].spread or 0.0, reverse=True)
    return order[:count]


@dataclass
class TrainingPair:
    """A pair as the policy is trained on it, preferred completion first. A tie has `weight` 0 and trains nothing."""

    prompt_ids: list[int]
    chosen_ids: list[int]
    rejected_ids: list[int]
    weight: float = 1.0


def order_pair(pair: Pair, tie_policy: str) -> TrainingPair:
    """Orders a pair by its gold verdict, or by the discriminator if it has none."""
    preference = pair.margin
    if pair.verdict is not None and pair.is_gold and not (pair.verdict == 0.5 and tie_policy == "silver"):
        preference = pair.verdict - 0.5
    first, second = pair.first.ids, pair.second.ids
    if preference < 0:
        first, second = second, first
    # There is nothing to learn from two equal completions, or from two with equal scores.
    weight = 0.0 if preference == 0 or pair.is_identical else 1.0
    return TrainingPair(pair.prompt_ids, first, second, weight)


@dataclass
class Window:
    """
    The pairs of a window in the order of training, and the number of micro-batches that the policy has taken.

    Micro-batch `i` of process `r` of `n` has the rows `[(i n + r) b, (i n + r + 1) b)` of the window, so that an
    optimizer step sees the same pairs whatever the split over processes and accumulation steps.

    Args:
        number (`int`): Number of the window, from 0.
        rows (`list[TrainingPair]`): The pairs of all processes.
        metrics (`dict[str, float]`): The window's metrics, to be logged.
        position (`int`): Micro-batches already taken.
    """

    number: int
    rows: list[TrainingPair]
    metrics: dict[str, float] = field(default_factory=dict)
    position: int = 0

    def next_batch(self, batch_size: int, process_index: int, num_processes: int) -> tuple[list[dict], float]:
        """
        Returns the next micro-batch of a process without its ties, and a factor for the mean loss of the remaining
        pairs. With the factor, each tie counts as a pair of loss 0, whatever the split into batches.
        """
        start = (self.position * num_processes + process_index) * batch_size % len(self.rows)
        batch = self.rows[start : start + batch_size]
        self.position += 1
        kept = [row for row in batch if row.weight > 0]
        # A batch of ties only keeps one of them, at weight 0, so that the processes stay in step.
        rows = [
            {"prompt_ids": row.prompt_ids, "chosen_ids": row.chosen_ids, "rejected_ids": row.rejected_ids}
            for row in kept or batch[:1]
        ]
        return rows, len(kept) / len(batch)

    def state_dict(self) -> dict:
        return asdict(self)

    @classmethod
    def from_state_dict(cls, state: dict) -> "Window":
        return cls(**{**state, "rows": [TrainingPair(**row) for row in state["rows"]]})


class WindowSampler(Sampler[int]):
    """
    Draws prompts without replacement, window by window. It repeats a window once for every micro-batch that trains on
    it: the trainer samples completions at the first and reuses them at the others. An epoch has whole windows only.

    Args:
        num_prompts (`int`): Prompts in the dataset.
        window_size (`int`): Prompts in a window, over all processes.
        repeats (`int`): Micro-batches of a window in each process.
        shuffle (`bool`): Whether the order is random.
        seed (`int`): Seed of the order, together with the epoch.
        epoch (`Callable[[], int]`): Returns the current epoch.
    """

    def __init__(
        self, num_prompts: int, window_size: int, repeats: int, shuffle: bool, seed: int, epoch: Callable[[], int]
    ):
        self.num_prompts = num_prompts
        self.window_size = window_size
        self.repeats = repeats
        self.shuffle = shuffle
        self.seed = seed
        self.epoch = epoch

    def __len__(self) -> int:
        return self.num_prompts // self.window_size * self.window_size * self.repeats

    def __iter__(self) -> Iterator[int]:
        order = list(range(self.num_prompts))
        if self.shuffle:
            generator = torch.Generator().manual_seed(derive_seed(self.seed, "prompts", self.epoch()))
            order = torch.randperm(self.num_prompts, generator=generator).tolist()
        for start in range(0, self.num_prompts - self.window_size + 1, self.window_size):
            window = order[start : start + self.window_size]
            yield from itertools.chain.from_iterable(itertools.repeat(window, self.repeats))
