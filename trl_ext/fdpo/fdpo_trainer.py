"""f-DPO (https://huggingface.co/papers/2309.16240)."""

import textwrap

from ..losses import Divergence, TangentTail, f_dpo_loss
from ..preference import PairLoss, PreferenceTrainer
from .fdpo_config import FDPOConfig


class FDPOTrainer(PreferenceTrainer):
    r"""
    Trainer for f-DPO, introduced in the paper [Beyond Reverse KL: Generalizing Direct Preference Optimization with
    Diverse Divergence Constraints](https://huggingface.co/papers/2309.16240): DPO whose policy is held near the
    reference by an f-divergence of your choice. With the default, reverse KL, it is [`~trl.DPOTrainer`].

    The logged `rewards/*` are the method's implicit rewards, beta f'(u), with u the ratio of policy to reference and f
    shifted so that f'(1) = 0. The log ratios themselves are logged as `logratios/*`.

    Example:

    ```python
    >>> from datasets import load_dataset
    >>> from trl_ext import FDPOConfig, FDPOTrainer

    >>> trainer = FDPOTrainer(
    ...     model="Qwen/Qwen2.5-0.5B-Instruct",
    ...     args=FDPOConfig("Qwen2.5-0.5B-FDPO", divergence="js"),
    ...     train_dataset=load_dataset("trl-lib/ultrafeedback_binarized", split="train"),
    ... )
    >>> trainer.train()
    ```

    The arguments are those of [`~trl.DPOTrainer`], and:

    Args:
        divergence ([`~trl_ext.losses.Divergence`], *optional*):
            A divergence of your own, in place of the one that `args` names.
    """

    config_class = FDPOConfig

    _tag_names = ["trl", "trl-ext", "f-dpo"]
    _name = "f-DPO"
    _paper = {
        "title": "Beyond Reverse KL: Generalizing Direct Preference Optimization with Diverse Divergence Constraints",
        "id": "2309.16240",
        # docstyle-ignore
        "citation": textwrap.dedent("""\
            @inproceedings{wang2024beyond,
                title        = {{Beyond Reverse KL: Generalizing Direct Preference Optimization with Diverse Divergence Constraints}},
                author       = {Chaoqi Wang and Yibo Jiang and Chenghao Yang and Han Liu and Yuxin Chen},
                year         = 2024,
                booktitle    = {The Twelfth International Conference on Learning Representations, ICLR 2024},
                url          = {https://huggingface.co/papers/2309.16240},
            }"""),
    }

    def __init__(self, *args, divergence: Divergence | None = None, **kwargs):
        self._given_divergence = divergence
        super().__init__(*args, **kwargs)
        config: FDPOConfig = self.args
        if divergence is None:
            divergence = config.get_divergence()
        elif not isinstance(divergence, Divergence):
            raise TypeError(
                f"`divergence` must be an instance of `trl_ext.losses.Divergence`, got {divergence!r}. To use one by "
                "name, set it in the configuration: `FDPOConfig(divergence=...)`."
            )
        elif config.divergence != "reverse_kl":
            raise ValueError(
                f"A divergence was given to the trainer ({divergence!r}) and another in `args` "
                f"(`divergence={config.divergence!r}`). Give one."
            )
        config.check_divergence(divergence)
        self._curvature = divergence.curvature if config.normalize_curvature else 1.0
        self.divergence = divergence
        if config.max_log_weight is not None:
            self.divergence = TangentTail(divergence, max_log_weight=config.max_log_weight)

    @property
    def f_beta(self) -> float:
        """What multiplies f'(u)."""
        # At the reference the gradient is beta f''(1) / 2 on each side: this makes it DPO's, beta / 2.
        return self.args.beta / self._curvature

    def resolved_hyperparameters(self):
        return {"divergence": repr(self._given_divergence)} if self._given_divergence is not None else {}

    def pair_loss(self, chosen, rejected):
        losses = f_dpo_loss(chosen.logratios, rejected.logratios, beta=self.f_beta, divergence=self.divergence)
        sides = {"chosen": chosen.logratios.detach(), "rejected": rejected.logratios.detach()}
        rewards = (self.f_beta * self.divergence.score(logratios) for logratios in sides.values())
        tails = {f"tail/{side}": self.divergence.in_tail(logratios) for side, logratios in sides.items()}
        return PairLoss(losses, *rewards, metrics=tails)
