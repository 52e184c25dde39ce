"""
Weights of pairs derived from how much people agree on a prompt, shared by the methods that use them.

Source: *Mallows-DPO: Fine-Tune Your LLM with Preference Dispersions*, https://huggingface.co/papers/2405.14953.
"""

import math
from dataclasses import dataclass, field
from typing import Annotated

import torch
from accelerate.logging import get_logger
from datasets import IterableDataset
from tqdm.auto import tqdm

from .._checks import NOT_EMPTY, Words, above, at_least
from ..losses import dispersion_weight
from ..losses.mallows import DISPERSION_BOUNDS
from .method import Method
from .preference_config import PreferenceConfig
from .preference_trainer import PreferenceTrainer
from .scoring import REFERENCE_COLUMNS, ResponseScores


logger = get_logger(__name__)

# The mean weight rescales beta. A mean outside this range, over the first pairs of a run, gets a warning: `kappa` is
# then most likely another model's number, as Llama-3's is for a model with weights that average 0.03.
MEAN_WEIGHT_RANGE = (0.5, 2.0)
MEAN_WEIGHT_PAIRS = 32


@dataclass
class DispersionConfig(PreferenceConfig):
    r"""
    Options of the methods that weigh pairs by their dispersion; the parent of their configurations.

    Parameters:
        kappa (`float` or `str`, *optional*, defaults to `"auto"`):
            Scale of the weights `-kappa log(dispersion)`. `"auto"` makes them average 1 over the training set, so that
            `beta` keeps its meaning whatever the model, the vocabulary and the data; it is estimated once, from the
            reference, before the first loss, reported on the model card and kept in checkpoints. The released code has
            the constant 0.29, which is such an estimate for Llama-3-8B-Instruct.
        num_kappa_samples (`int` or `None`, *optional*, defaults to `1024`):
            Number of training pairs, evenly spaced, from which `kappa="auto"` is estimated. `None` takes them all.
            With 1024 the average weight is within about one percent of 1.
        dispersion_column (`str`, *optional*):
            Column of the datasets, evaluation sets included, that holds the dispersion of each pair, a number in [0,
            1]: 0 if everybody prefers the chosen response, 1 if people are evenly split. Use it for data with several
            raters. It replaces the reference's entropy, which is then not computed.
    """

    # A union without `None` would be a float on the command line, where "auto" must be possible.
    kappa: Annotated[float | str | None, above(0), Words("auto")] = field(
        default="auto",
        metadata={
            "help": "Scale of the weights -kappa log(dispersion): a number, or 'auto', with which they average 1 over "
            "the training set."
        },
    )
    num_kappa_samples: Annotated[int | None, at_least(1)] = field(
        default=1024,
        metadata={"help": "Number of training pairs from which kappa='auto' is estimated. None takes them all."},
    )
    dispersion_column: Annotated[str | None, NOT_EMPTY] = field(
        default=None,
        metadata={
            "help": "Column of the datasets with each pair's dispersion in [0, 1] (0: all agree), in place of the "
            "reference's entropy."
        },
    )

    def _check_options(self) -> None:
        super()._check_options()
        if self.num_kappa_samples != 1024 and self.kappa != "auto":
            raise ValueError(
                f"`num_kappa_samples={self.num_kappa_samples!r}` has no effect with `kappa={self.kappa!r}`, which is "
                "not estimated. Set `kappa='auto'`, or leave `num_kappa_samples` at its default (1024)."
            )

    @property
    def uses_dispersion(self) -> bool:
        """Whether pairs are weighted at all."""
        return True


class DispersionMethod(Method):
    """
    Base of the methods that weigh pairs by their dispersion: `pair_loss` gets the weights from [`pair_weights`].

    The dispersion of a pair is the entropy of the reference's next-token distribution, averaged over each response's
    tokens and then over the two responses, divided by log V, with V the rows of the LM head. With `dispersion_column`
    it comes from a column of the dataset. It has no gradient and does not depend on the policy.

    Logged are the mean dispersion (`dispersion/index`), the mean weight (`dispersion/weight`), the share of pairs
    whose dispersion was too close to 0 or 1 and was clamped (`dispersion/clamped`), and an estimated kappa
    (`dispersion/kappa`). A run whose first 32 pairs have a mean weight below 0.5 or above 2 is warned of, once.

    Raises:
        `ValueError`: For `kappa="auto"` with a streaming training set, whose length is not known, or with prompts in
            place of pairs; for a column of dispersions with a value outside [0, 1].
    """

    config_class = DispersionConfig
    extra_columns_range = (0.0, 1.0)

    def __init__(self, args: DispersionConfig):
        super().__init__(args)
        self._first_weights: list[torch.Tensor] | None = []  # of this process, until their mean has been checked
        if args.uses_dispersion:
            if args.dispersion_column is None:
                self.reference_statistics = (*self.reference_statistics, "entropy")
            else:
                self.extra_columns = (args.dispersion_column,)

    def bind(self, trainer):
        self.trainer = trainer
        if not self.args.uses_dispersion or self.args.kappa != "auto":
            return
        if isinstance(trainer.train_dataset, IterableDataset):
            raise ValueError(
                "`kappa='auto'` is estimated from the whole training set and is not supported with a streaming one. "
                "Give a number: the one on the model card of an earlier run on such data, or an estimate from a part "
                "of the data that is not streamed."
            )

    def check_dataset(self, columns, dataset_name):
        if self.args.uses_dispersion and self.args.dispersion_column is None and "dispersion" in columns:
            logger.warning(
                f"The {dataset_name} dataset has a column `dispersion`, which is ignored: the dispersion is taken "
                "from the reference's entropy. Set `dispersion_column='dispersion'` to read it."
            )

    # ---- Weights ---------------------------------------------------------------------------------------------------

    def pair_weights(
        self, chosen: ResponseScores, rejected: ResponseScores
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Returns the weight of each pair, `(B,)`, without gradient, and the metrics to log."""
        column = self.args.dispersion_column
        if column is not None:
            entropies = chosen.columns[column], rejected.columns[column]
        else:
            entropies = self._normalized(chosen.ref_entropy), self._normalized(rejected.ref_entropy)
        weight = dispersion_weight(*entropies, kappa=self.kappa)
        index = (entropies[0] + entropies[1]) / 2
        low, high = DISPERSION_BOUNDS
        metrics = {"index": index, "weight": weight, "clamped": (index < low) | (index > high)}
        if self.args.kappa == "auto":
            metrics["kappa"] = torch.full_like(weight, self.kappa)
        if self._first_weights is not None and self.trainer.model.training:
            self._first_weights.append(weight)
            if sum(len(part) for part in self._first_weights) >= MEAN_WEIGHT_PAIRS:
                self._check_mean(torch.cat(self._first_weights).mean().item())
                self._first_weights = None
        return weight, {f"dispersion/{name}": value for name, value in metrics.items()}

    def _check_mean(self, mean: float) -> None:
        """Warns if the first weights of a run average far from 1."""
        low, high = MEAN_WEIGHT_RANGE
        if not low <= mean <= high:
            beta = self.args.beta
            logger.warning(
                f"The weights of the first {MEAN_WEIGHT_PAIRS} pairs average {mean:.3g} with `kappa={self.kappa:.6g}`, "
                f"so that `beta={beta:g}` acts like {beta * mean:.3g}. A kappa of another model or dataset does "
                "this: set `kappa='auto'`, with which the weights average 1, or choose `beta` for these weights."
            )

    def _normalized(self, entropy: torch.Tensor) -> torch.Tensor:
        """Entropy in nats as a share of the largest one, log V."""
        trainer = self.trainer
        head = trainer.accelerator.unwrap_model(trainer.model).get_output_embeddings()
        # The weight may be quantized or sharded and have another shape than the matrix.
        rows = getattr(head, "out_features", None) or head.weight.shape[0]
        return entropy / math.log(rows)

    # ---- kappa -----------------------------------------------------------------------------------------------------

    @property
    def kappa(self) -> float:
        """Scale of the weights: the configured number, or the estimate, which is computed on first access."""
        if self.args.kappa != "auto":
            return self.args.kappa
        estimates = self.trainer._progress.estimates
        if "kappa" not in estimates:
            estimates["kappa"] = self._estimate_kappa()
        return estimates["kappa"]

    def _estimate_kappa(self) -> float:
        """1 / mean(-log dispersion) over training pairs, the same on every process."""
        trainer, accelerator = self.trainer, self.trainer.accelerator
        total = len(trainer.pairs_for_estimates)
        count = min(total, self.args.num_kappa_samples or total)
        rows = [i * total // count for i in range(count)]
        own = rows[accelerator.process_index :: accelerator.num_processes]
        # A sharded model needs as many forwards on every process; the repeated rows do not enter the mean.
        padded = own + rows[:1] * (math.ceil(count / accelerator.num_processes) - len(own))
        batch_size = trainer.args.per_device_eval_batch_size
        starts = range(0, len(padded), batch_size)
        quiet = trainer.args.disable_tqdm or not trainer.is_world_process_zero()
        weights = [
            dispersion_weight(*self._dispersions_of(padded[start : start + batch_size]), kappa=1.0)
            for start in tqdm(starts, desc="Estimating kappa", disable=quiet)
        ]
        mean = accelerator.reduce(torch.cat(weights)[: len(own)].sum(), reduction="sum").item() / count
        accelerator.print(
            f"kappa = {1 / mean:.6g}, with which the weights of {count} of the {total} training pairs average 1."
        )
        return 1 / mean

    def _dispersions_of(self, rows: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Dispersion of the two sides of training pairs, from the same source as in the training step."""
        trainer = self.trainer
        examples = [trainer.pairs_for_estimates[i] for i in rows]

        def values(column):
            numbers = [example[column] for example in examples]
            return torch.tensor(numbers, dtype=torch.float32, device=trainer.accelerator.device)

        if self.args.dispersion_column is not None:
            return (values(self.args.dispersion_column),) * 2
        if trainer.precompute_ref_logps:
            return tuple(self._normalized(values(column)) for column in REFERENCE_COLUMNS["entropy"])
        inputs = trainer._prepare_inputs(trainer.pair_collator(examples))
        return self._normalized(trainer.score_reference(inputs).per_response("entropy")).chunk(2)

    def resolved_hyperparameters(self):
        if not self.args.uses_dispersion:
            return dict.fromkeys(("kappa", "num_kappa_samples", "dispersion_column"))
        if self.args.kappa != "auto":
            return {"num_kappa_samples": None}
        estimate = self.trainer._progress.estimates.get("kappa")
        return {"kappa": f"{estimate:.6g}, estimated"} if estimate is not None else {}


class DispersionTrainer(PreferenceTrainer):
    """Base of the trainers whose method is a [`DispersionMethod`]."""

    method_class = DispersionMethod
    method: DispersionMethod

    @property
    def kappa(self) -> float:
        """Scale of the weights; see [`DispersionMethod.kappa`]."""
        return self.method.kappa

    def pair_weights(
        self, chosen: ResponseScores, rejected: ResponseScores
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Weight of each pair; see [`DispersionMethod.pair_weights`]."""
        return self.method.pair_weights(chosen, rejected)
