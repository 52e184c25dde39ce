"""Options of an evaluation."""

from dataclasses import dataclass, field
from typing import Annotated

from .._checks import NOT_EMPTY, above, at_least, between, check_fields, check_value
from ..losses import get_divergence
from .generation import SamplingSettings


@dataclass
class EvaluationConfig:
    """
    What [`evaluate_models`] measures, and how. Every sample, bootstrap and simulation follows from `seed`, which all
    models share.

    Raises:
        `ValueError`: If an option has a wrong type, is out of its range, or does not fit another one.
    """

    num_pairs: Annotated[int, at_least(1)] = field(
        default=300, metadata={"help": "Number of preference pairs to score, from the dataset's first on."}
    )
    num_prompts: Annotated[int, at_least(1)] = field(
        default=300, metadata={"help": "Number of prompts to answer, the first distinct ones."}
    )
    num_samples: Annotated[int, at_least(0)] = field(
        default=4, metadata={"help": "Samples per prompt for KL, entropy and diversity; 0 skips these."}
    )
    max_new_tokens: Annotated[int, at_least(1)] = field(
        default=128, metadata={"help": "Maximum length of a response, in tokens."}
    )
    temperature: Annotated[float, above(0)] = field(
        default=1.0, metadata={"help": "Temperature of the samples for KL, entropy and diversity (no truncation)."}
    )
    judge_temperature: Annotated[float, at_least(0)] = field(
        default=0.7, metadata={"help": "Temperature of the judged response to each prompt; 0 is greedy."}
    )
    judge_top_p: Annotated[float, between(0, 1, "(]")] = field(
        default=0.95, metadata={"help": "Top-p of the judged responses; 1 is no truncation."}
    )
    opponent: Annotated[str, NOT_EMPTY] = field(
        default="reference",
        metadata={
            "help": "What the models are judged against: 'reference', or a column of responses such as 'chosen'."
        },
    )
    beta: Annotated[float, above(0)] = field(
        default=0.1,
        metadata={"help": "Beta of the implicit reward, for calibration and flip losses: the one used in training."},
    )
    idealized_betas: Annotated[list[float], NOT_EMPTY] = field(
        default_factory=lambda: [0.01, 0.1, 1.0, 5.0, 10.0],
        metadata={"help": "Betas of the idealized ranking accuracy; the paper's grid by default."},
    )
    epsilon: Annotated[float, between(0, 0.5, "()")] = field(
        default=1e-3,
        metadata={
            "help": "Idealized ranking accuracy: a single rating counts as an agreement of 1 - epsilon; the paper's "
            "is 0.001."
        },
    )
    max_length: Annotated[int | None, at_least(2)] = field(
        default=None,
        metadata={"help": "Maximum length of prompt and response together when pairs are scored; the start is kept."},
    )
    divergences: list[str] = field(
        default_factory=lambda: ["forward_kl", "js"],
        metadata={
            "help": "Divergences from the reference to measure on the samples besides KL, by the names of "
            "get_divergence: forward_kl, js, hellinger, jeffreys, chi_po and so on."
        },
    )
    distinct_length: Annotated[int, at_least(2)] = field(
        default=32, metadata={"help": "Distinct-n: tokens counted of each sample; shorter samples are left out."}
    )
    embedding_model: Annotated[str | None, NOT_EMPTY] = field(
        default=None,
        metadata={"help": "sentence-transformers model (id or folder) for embedding diversity; skipped by default."},
    )
    batch_size: Annotated[int, at_least(1)] = field(
        default=8, metadata={"help": "Responses per forward; twice as many are sampled at once."}
    )
    shown_samples: Annotated[int, at_least(0)] = field(
        default=20, metadata={"help": "Number of prompts whose responses the report shows."}
    )
    seed: Annotated[int, between(0, 2**63 - 1)] = field(
        default=0, metadata={"help": "Seed of sampling, bootstraps and simulations."}
    )

    def __post_init__(self):
        check_fields(self)
        for beta in self.idealized_betas:
            check_value("idealized_betas", beta, Annotated[float, above(0)])
        if len(set(self.idealized_betas)) < len(self.idealized_betas):
            raise ValueError(f"`idealized_betas` has a value twice, got {self.idealized_betas!r}. Give each once.")
        try:
            names = [get_divergence(name).name for name in self.divergences]
        except (ValueError, TypeError) as error:
            raise ValueError(f"`divergences={self.divergences!r}`: {error}") from None
        if len(set(names)) < len(names):
            raise ValueError(f"`divergences` has one of them twice, got {self.divergences!r}. Give each once.")
        if self.embedding_model is not None and self.num_samples < 2:
            raise ValueError(
                f"`embedding_model={self.embedding_model!r}` compares the samples of a prompt, and `num_samples` is "
                f"{self.num_samples}. Set it to 2 or more."
            )

    @property
    def divergence_settings(self) -> SamplingSettings:
        return SamplingSettings(self.max_new_tokens, self.temperature, seed=self.seed)

    @property
    def judge_settings(self) -> SamplingSettings:
        return SamplingSettings(self.max_new_tokens, self.judge_temperature, self.judge_top_p, seed=self.seed)
