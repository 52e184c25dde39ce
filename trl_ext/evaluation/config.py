"""Options of an evaluation."""

import math
import numbers
from dataclasses import dataclass, field

from ..losses import get_divergence
from .generation import SamplingSettings


@dataclass
class EvaluationConfig:
    """
    What [`evaluate_models`] measures, and how. Every sample, every bootstrap and every simulation follows from `seed`, the same
    for all models.
    """

    num_pairs: int = field(default=300, metadata={"help": "Preference pairs to score: the dataset's first."})
    num_prompts: int = field(default=300, metadata={"help": "Prompts to answer: the first different ones."})
    num_samples: int = field(
        default=4, metadata={"help": "Samples of each prompt for KL, entropy and diversity; 0 leaves these out."}
    )
    max_new_tokens: int = field(default=128, metadata={"help": "Longest response, in tokens."})
    temperature: float = field(
        default=1.0, metadata={"help": "Temperature of the samples for KL, entropy and diversity (no truncation)."}
    )
    judge_temperature: float = field(
        default=0.7, metadata={"help": "Temperature of the one response a prompt that is judged; 0 is greedy."}
    )
    judge_top_p: float = field(default=0.95, metadata={"help": "Top-p of the responses that are judged."})
    opponent: str = field(
        default="reference",
        metadata={
            "help": "Whom the models are judged against: 'reference', or a column of responses such as 'chosen'."
        },
    )
    beta: float = field(
        default=0.1,
        metadata={"help": "Beta of the implicit reward, for calibration and flip losses: the trained one."},
    )
    idealized_betas: list[float] = field(
        default_factory=lambda: [0.01, 0.1, 1.0, 5.0, 10.0],
        metadata={"help": "Betas of the idealised ranking accuracy; the paper's grid by default."},
    )
    epsilon: float = field(
        default=1e-3,
        metadata={"help": "Idealised ranking accuracy: one rating counts as an agreement of 1 - epsilon."},
    )
    max_length: int | None = field(
        default=None, metadata={"help": "Longest prompt and response together when pairs are scored, the start kept."}
    )
    divergences: list[str] = field(
        default_factory=lambda: ["forward_kl", "js"],
        metadata={
            "help": "Divergences from the reference to measure on the samples besides KL, by the names of get_divergence: "
            "forward_kl, js, hellinger, jeffreys, chi_po and so on."
        },
    )
    distinct_length: int = field(
        default=32, metadata={"help": "Distinct-n: tokens that count of each sample; shorter samples are left out."}
    )
    embedding_model: str | None = field(
        default=None,
        metadata={
            "help": "Model of sentence-transformers (id or folder) for embedding diversity; left out by default."
        },
    )
    batch_size: int = field(default=8, metadata={"help": "Responses in a forward; twice as many are sampled at once."})
    shown_samples: int = field(default=20, metadata={"help": "Prompts whose responses the report shows."})
    seed: int = field(default=0, metadata={"help": "Of sampling, bootstraps and simulations."})

    def __post_init__(self):
        for name, least in {
            "num_pairs": 1,
            "num_prompts": 1,
            "num_samples": 0,
            "max_new_tokens": 1,
            "max_length": 2,  # a token of the prompt and one of the response
            "distinct_length": 2,  # distinct-2 needs a pair of tokens
            "batch_size": 1,
            "shown_samples": 0,
            "seed": 0,
        }.items():
            value = getattr(self, name)
            if name == "max_length" and value is None:
                continue
            if not isinstance(value, numbers.Integral) or isinstance(value, bool) or value < least:
                raise ValueError(f"`{name}` must be an integer of at least {least}, got {value!r}.")
        for name, positive in {"temperature": True, "judge_temperature": False, "beta": True}.items():
            value = getattr(self, name)
            if not math.isfinite(value) or value < 0 or (positive and value == 0):
                hint = {
                    "temperature": ": greedy samples have no KL. The responses that are judged have their own, "
                    "`judge_temperature`",
                    "judge_temperature": "; 0 is greedy decoding",
                    "beta": ": the one that the models were trained with",
                }[name]
                least = "greater than 0" if positive else "0 or greater"
                raise ValueError(f"`{name}` must be a finite number {least}, got {value!r}{hint}.")
        if not 0 < self.judge_top_p <= 1:
            raise ValueError(
                f"`judge_top_p` must be greater than 0 and at most 1, got {self.judge_top_p!r}; 1 is no truncation."
            )
        if not 0 < self.epsilon < 0.5:
            raise ValueError(
                f"`epsilon` must be strictly between 0 and 0.5, got {self.epsilon!r}; the paper's is 0.001."
            )
        if not self.idealized_betas or not all(math.isfinite(beta) and beta > 0 for beta in self.idealized_betas):
            raise ValueError(
                f"`idealized_betas` must be finite numbers greater than 0, and at least one, got {self.idealized_betas!r}."
            )
        if len(set(self.idealized_betas)) < len(self.idealized_betas):
            raise ValueError(f"`idealized_betas` has a value twice, got {self.idealized_betas!r}. Give each once.")
        try:
            names = [get_divergence(name).name for name in self.divergences]
        except (ValueError, TypeError) as error:
            raise ValueError(f"`divergences={self.divergences!r}`: {error}") from None
        if len(set(names)) < len(names):
            raise ValueError(f"`divergences` has one of them twice, got {self.divergences!r}. Give each once.")
        if not self.opponent:
            raise ValueError(f"`opponent` must be 'reference' or a column of responses, got {self.opponent!r}.")
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
