"""
Aspect buckets: sizes of about one area among which every pair gets the one nearest to its shape, and the order in
which pairs are drawn so that a batch has one size.
"""

import math
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from .data import ImagePreferenceDataset, Repeated, warn_once_a_run


if TYPE_CHECKING:  # what the mixin expects to be mixed into
    from transformers import Trainer as _Trainer

    from .diffusion_config import DiffusionConfig
else:
    _Trainer = object

# Share of an epoch's pairs above which the repetitions that fill groups are worth a warning.
MANY_REPEATED = 0.1


def bucket_sizes(side: int, multiple: int, max_aspect_ratio: float) -> list[tuple[int, int]]:
    """
    Returns the sizes `(height, width)` of the buckets: the square of `side`, and for every height in steps of about a
    sixteenth of it the largest width with which the image has no more pixels than the square; both ways round.

    Args:
        side (`int`):
            Side of the square in pixels, divisible by `multiple`.
        multiple (`int`):
            Divisor of every height and width.
        max_aspect_ratio (`float`):
            Largest ratio of the longer side to the shorter one.
    """
    step = multiple * max(1, round(side / 16 / multiple))
    sizes = {(side, side)}
    for long in range(math.ceil(side / step) * step, int(side * max_aspect_ratio) + 1, step):
        short = side * side // long // step * step
        if short and short < long <= max_aspect_ratio * short:
            sizes |= {(long, short), (short, long)}
    return sorted(sizes, key=lambda size: (size[1] / size[0], size))


class BucketSampler(torch.utils.data.Sampler[int]):
    """
    The pairs of a dataset in an order in which every `group` consecutive ones have one size. What a bucket's last
    group lacks is filled with other pairs of the bucket.

    The order depends on the seed, the epoch and the buckets alone: a group is the same whatever the number of
    processes it is spread over.

    Args:
        buckets (`np.ndarray` of shape `(N,)`):
            Bucket of each pair.
        group (`int`):
            Pairs in a group.
        epoch (`Callable`, *optional*):
            Returns the number of the epoch, for which an order is drawn. Without it the groups are in the order of
            their first pairs, and the pairs in theirs.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the orders.
        drop_last (`bool`, *optional*, defaults to `False`):
            Leave out the pairs of a bucket that fill no group.
        mark_repeated (`bool`, *optional*, defaults to `False`):
            Give the pairs that fill a group as [`Repeated`].
    """

    def __init__(
        self,
        buckets: np.ndarray,
        group: int,
        *,
        epoch: Callable[[], int] | None = None,
        seed: int = 0,
        drop_last: bool = False,
        mark_repeated: bool = False,
    ):
        self.group, self.epoch, self.seed, self.mark_repeated = group, epoch, seed, mark_repeated
        self._rows = [np.flatnonzero(buckets == bucket) for bucket in np.unique(buckets)]
        self._lengths = [(len(rows) if drop_last else len(rows) + group - 1) // group * group for rows in self._rows]

    def __len__(self) -> int:
        return sum(self._lengths)

    @property
    def repeated(self) -> int:
        """Pairs that are drawn more than once in an epoch, counted each time."""
        return sum(max(0, length - len(rows)) for rows, length in zip(self._rows, self._lengths, strict=True))

    def __iter__(self) -> Iterator[int]:
        generator = None if self.epoch is None else np.random.default_rng((self.seed, self.epoch()))
        groups: list[list[int]] = []
        for rows, length in zip(self._rows, self._lengths, strict=True):
            order = np.resize(rows if generator is None else generator.permutation(rows), length).tolist()
            if self.mark_repeated:
                order[len(rows) :] = [Repeated(row) for row in order[len(rows) :]]
            groups += [order[start : start + self.group] for start in range(0, length, self.group)]
        if generator is None:
            groups.sort(key=lambda group: group[0])
        else:
            groups = [groups[i] for i in generator.permutation(len(groups))]
        for group in groups:
            yield from group


def images_of(dataset: Any) -> ImagePreferenceDataset | None:
    """The images of a dataset of the trainer, cached or not; `None` for another dataset."""
    images = getattr(dataset, "images", dataset)
    return images if isinstance(images, ImagePreferenceDataset) else None


class BucketedBatches(_Trainer):
    """
    Mixin of a trainer over an [`ImagePreferenceDataset`]: where it has buckets, every batch is of one.

    In training a group of pairs from one bucket is an optimizer step by default, so that the step has the same pairs
    however it is split into micro-batches and processes. In an evaluation each pair counts once.
    """

    args: "DiffusionConfig"
    _counted: torch.Tensor | None = None

    def _get_train_sampler(self, train_dataset=None):
        dataset = self.train_dataset if train_dataset is None else train_dataset
        images = images_of(dataset)
        if images is None or images.buckets is None:
            return super()._get_train_sampler(train_dataset)
        args, batch = self.args, self._train_batch_size
        step = batch * args.gradient_accumulation_steps * args.world_size
        group = args.bucket_group_size or step
        if group % batch or step % group:
            raise ValueError(
                f"`bucket_group_size={group}` must be a multiple of the batch on a device ({batch}) and divide the "
                f"pairs of an optimizer step ({step}), so that a batch has one bucket and a step whole groups."
            )
        sampler = BucketSampler(
            images.bucket_of,
            group,
            epoch=None if args.train_sampling_strategy == "sequential" else lambda: images.epoch,
            seed=images.seed,
            drop_last=args.dataloader_drop_last,
        )
        self._report_buckets(images, sampler)
        return sampler

    def _report_buckets(self, images: ImagePreferenceDataset, sampler: BucketSampler) -> None:
        if len(sampler) == 0:
            raise ValueError(
                f"No bucket has the {sampler.group} pairs of a group, and `dataloader_drop_last=True` leaves out what "
                f"does not fill one. Set `dataloader_drop_last=False`, or lower the batch size. Buckets: "
                f"{images.describe_buckets()}."
            )
        if sampler.repeated > MANY_REPEATED * len(images):
            warn_once_a_run(
                f"{sampler.repeated:,} of the {len(sampler):,} pairs that an epoch draws are repetitions, which fill "
                f"groups of {sampler.group} pairs of one bucket ({images.describe_buckets()}). To have fewer, lower "
                "`bucket_group_size` to a multiple of the batch size of a device, or `max_aspect_ratio`."
            )

    def _get_eval_sampler(self, eval_dataset):
        images = images_of(eval_dataset)
        if images is None or images.buckets is None:
            return super()._get_eval_sampler(eval_dataset)
        # Whole batches for every process: otherwise Accelerate would fill them, with pairs of other sizes.
        return BucketSampler(images.bucket_of, self.args.eval_batch_size * self.args.world_size, mark_repeated=True)

    def counted_pairs(self, num_pairs: int) -> torch.Tensor | None:
        return super().counted_pairs(num_pairs) if self._counted is None else self._counted
