"""RainbowPO (https://huggingface.co/papers/2410.04203)."""

import textwrap

import torch
from accelerate.logging import get_logger

from ..losses import rainbow_po_loss
from ..preference import PairLoss, ResponseScores
from ..preference.dispersion import DispersionMethod, DispersionTrainer
from .rainbowpo_config import RainbowPOConfig


logger = get_logger(__name__)


class RainbowPO(DispersionMethod):
    """RainbowPO's loss; the parameters are those of [`RainbowPOConfig`]."""

    name = "RainbowPO"
    config_class = RainbowPOConfig

    def __init__(self, args: RainbowPOConfig):
        super().__init__(args)
        if args.mixing_alpha == 0:
            self.reference_statistics = tuple(name for name in self.reference_statistics if name != "logps")

    def bind(self, trainer) -> None:
        super().bind(trainer)
        args: RainbowPOConfig = self.args
        # The squared links compare with 1 / (2 beta) and have no such scale.
        if args.length_normalization == (args.beta < 1) and args.link in ("sigmoid", "hinge", "cauchy"):
            logger.warning(
                f"`beta={args.beta:g}` with `length_normalization={args.length_normalization}` is unusual: "
                "differences of log-probabilities per token are about a hundred times smaller than those of whole "
                "responses. Usual values are 2.5 to 10 with length normalization, and about 0.1 without."
            )
        trainer.accelerator.print(f"{type(trainer).__name__}: these options amount to {args.equivalent_method}.")

    def resolved_hyperparameters(self):
        return {"amounts to": self.args.equivalent_method, **super().resolved_hyperparameters()}

    def pair_loss(self, chosen: ResponseScores, rejected: ResponseScores) -> PairLoss:
        args: RainbowPOConfig = self.args
        sides, prefix = (chosen, rejected), "mean_" if args.length_normalization else ""
        policy = [getattr(side, f"{prefix}logps") for side in sides]
        rewards = [logps.detach() for logps in policy]
        reference_margin, weight = None, None
        metrics: dict[str, torch.Tensor] = {}
        if args.mixing_alpha > 0:
            reference = [getattr(side, f"ref_{prefix}logps") for side in sides]
            reference_margin = reference[0] - reference[1]
            rewards = [r - args.mixing_alpha * ref for r, ref in zip(rewards, reference, strict=True)]
        if args.contextual_scaling:
            weight, metrics = self.pair_weights(chosen, rejected)
        losses = rainbow_po_loss(
            policy[0] - policy[1],
            reference_margin,
            weight,
            beta=args.beta,
            gamma=args.gamma,
            mixing_alpha=args.mixing_alpha,
            link=args.link,
        )
        if args.sft_coef:
            losses = losses - args.sft_coef * policy[0]
            metrics["sft_loss"] = -policy[0].detach()
        return PairLoss(losses, args.beta * rewards[0], args.beta * rewards[1], metrics)


class RainbowPOTrainer(DispersionTrainer):
    r"""
    Trainer for RainbowPO, introduced in the paper [RainbowPO: A Unified Framework for Combining Improvements in
    Preference Optimization](https://huggingface.co/papers/2410.04203). RainbowPO combines length normalization, a
    reference mixed with a margin, and the prompt weights of Mallows-DPO; each can be turned off. DPO,
    length-normalized DPO, SimPO and Mallows-DPO are among its configurations: the constructor prints which one `args`
    amounts to ([`RainbowPOConfig.equivalent_method`]).

    The logged `rewards/*` are beta (log policy - alpha log reference), per token with length normalization. They
    contain neither the weight nor the margin gamma, which belongs to the pair: the middle of the loss is at
    `rewards/margins = beta (1 - alpha) gamma`.

    Example:

    ```python
    >>> from datasets import load_dataset
    >>> from trl_ext import RainbowPOConfig, RainbowPOTrainer

    >>> trainer = RainbowPOTrainer(
    ...     model="Qwen/Qwen2.5-0.5B-Instruct",
    ...     args=RainbowPOConfig("Qwen2.5-0.5B-RainbowPO"),
    ...     train_dataset=load_dataset("trl-lib/ultrafeedback_binarized", split="train"),
    ... )
    >>> trainer.train()
    ```

    The arguments are those of [`~trl.DPOTrainer`]; `ref_model` is refused with options for which no reference is read.
    """

    method_class = RainbowPO
    config_class = RainbowPOConfig

    _tag_names = ["trl", "trl-ext", "rainbowpo"]
    _name = "RainbowPO"
    _paper = {
        "title": "RainbowPO: A Unified Framework for Combining Improvements in Preference Optimization",
        "id": "2410.04203",
        # docstyle-ignore
        "citation": textwrap.dedent("""\
            @inproceedings{zhao2025rainbowpo,
                title        = {{RainbowPO: A Unified Framework for Combining Improvements in Preference Optimization}},
                author       = {Hanyang Zhao and Genta Indra Winata and Anirban Das and Shi-Xiong Zhang and David D. Yao and Wenpin Tang and Sambit Sahu},
                year         = 2025,
                booktitle    = {The Thirteenth International Conference on Learning Representations, ICLR 2025},
                url          = {https://huggingface.co/papers/2410.04203},
            }"""),
    }
