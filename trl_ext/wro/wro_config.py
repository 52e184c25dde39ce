"""Configuration of win-rate optimization."""

from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar

from trl import RLOOConfig

from .._checks import NOT_EMPTY, above, at_least, between
from ..rollout import RolloutConfig
from .win_rate_reward import ANCHORS, LINKS


_OTHER_POLICY = "the KL in the reward would be to a reference that is sampled differently"


@dataclass
class WROConfig(RolloutConfig, RLOOConfig):
    r"""
    Configuration of [`WROTrainer`]: that of [`~trl.RLOOTrainer`] with the anchors and the link of the win rate.

    Args:
        anchors (`str`, *optional*, defaults to `"reference"`):
            What completions are compared with: `"reference"`, samples of the reference that are drawn before training;
            `"column"`, the data's own responses; `"self"`, the other completions of the group.
        anchor_column (`str`, *optional*, defaults to `"anchors"`):
            Column of the anchors. With `anchors="reference"` it is made if the data do not have it.
        num_anchors (`int`, *optional*, defaults to `4`):
            Anchors of each prompt that are sampled.
        anchor_cache_dir (`str`, *optional*):
            Folder that keeps them; `anchors` in `output_dir` by default.
        h (`str`, *optional*, defaults to `"identity"`):
            `"identity"`, `"logit"` or `"log"` of each probability.
        h_clip (`float`, *optional*, defaults to `0.01`):
            Probabilities are held in `[h_clip, 1 - h_clip]` before an h other than the identity.
        both_orders (`bool`, *optional*, defaults to `True`):
            Whether a judge that is not symmetric is asked twice, with the completions swapped.
        beta (`float`, *optional*, defaults to `0.1`):
            Weight of the KL to the reference, in the reward, above 0.
        num_generations (`int`, *optional*, defaults to `8`):
            Completions of a prompt.
    """

    _refused_options: ClassVar[dict[str, str]] = {
        "normalize_advantages": "it would change beta from batch to batch",
        "reward_clip_range": "win rates are bounded; `h_clip` bounds the others",
        "sync_ref_model": "it moves the reference, and with it the optimum",
        "mask_truncated_completions": "a completion without tokens has no KL",
        "temperature": _OTHER_POLICY,
        "top_p": _OTHER_POLICY,
        "top_k": _OTHER_POLICY,
        "min_p": _OTHER_POLICY,
        "repetition_penalty": _OTHER_POLICY,
        "generation_kwargs": _OTHER_POLICY,
    }
    _dependent_options: ClassVar[tuple[tuple[str, str], ...]] = ()
    _inherited_annotations: ClassVar[dict[str, Any]] = {}
    other_defaults = {"beta": 0.1, "num_generations": 8}

    anchors: str = field(
        default="reference",
        metadata={
            "help": "What completions are compared with: samples of the reference, a column of the data, or the other "
            "completions of the group.",
            "choices": list(ANCHORS),
        },
    )
    anchor_column: Annotated[str, NOT_EMPTY] = field(
        default="anchors", metadata={"help": "Column of the anchors, one completion or a list of them."}
    )
    num_anchors: Annotated[int, at_least(1)] = field(
        default=4, metadata={"help": "Anchors of each prompt that are sampled from the reference before training."}
    )
    anchor_cache_dir: str | None = field(
        default=None, metadata={"help": "Folder that keeps sampled anchors; `anchors` in `output_dir` by default."}
    )
    h: str = field(
        default="identity",
        metadata={
            "help": "Applied to each probability to win. Other than the identity it needs a judge that gives "
            "probabilities.",
            "choices": list(LINKS),
        },
    )
    h_clip: Annotated[float, between(0, 0.5, "()")] = field(
        default=0.01, metadata={"help": "Bounds of the probabilities before an `h` other than the identity."}
    )
    both_orders: bool = field(
        default=True, metadata={"help": "Ask a judge that is not symmetric twice, with the completions swapped."}
    )
    beta: Annotated[float, above(0)] = field(
        default=0.1, metadata={"help": "Weight of the KL to the reference, which is in the reward."}
    )
    num_generations: Annotated[int, at_least(2)] = field(default=8, metadata={"help": "Completions of each prompt."})

    def _check_options(self) -> None:
        super()._check_options()
        if self.anchors == "column" and self.anchor_column == "anchors":
            raise ValueError(
                "`anchors='column'` needs `anchor_column`, the name of the column, such as 'chosen'. For samples of "
                "the reference use `anchors='reference'`."
            )
        if self.anchors == "self" and self.num_generations_eval == 1:
            raise ValueError(
                "`num_generations_eval=1` with `anchors='self'` leaves no opponent. Leave it at `num_generations`."
            )
        if self.h == "log" and self.anchors == "self":
            raise ValueError("`h='log'` is not supported with `anchors='self'`. Use 'identity' or 'logit'.")
