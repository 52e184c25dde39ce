"""TDPO (https://huggingface.co/papers/2404.11999)."""

import textwrap

from ..losses import tdpo_loss
from ..preference import Method, PairLoss, PreferenceTrainer, ResponseScores
from .tdpo_config import TDPOConfig


class TDPO(Method):
    """TDPO's loss; the parameters are those of [`TDPOConfig`]."""

    name = "TDPO"
    config_class = TDPOConfig
    needs_token_kl = True

    @property
    def token_kl_gradient(self):
        return self.args.variant == "tdpo1", True  # TDPO2 stops the gradient of the chosen KL

    def pair_loss(self, chosen: ResponseScores, rejected: ResponseScores) -> PairLoss:
        losses = tdpo_loss(
            chosen.logratios,
            rejected.logratios,
            chosen.kl,
            rejected.kl,
            beta=self.args.beta,
            alpha=self.args.alpha,
            variant=self.args.variant,
        )
        rewards = (self.args.beta * (side.logratios + side.kl).detach() for side in (chosen, rejected))
        return PairLoss(losses, *rewards)


class TDPOTrainer(PreferenceTrainer):
    r"""
    Trainer for TDPO, introduced in the paper [Token-level Direct Preference
    Optimization](https://huggingface.co/papers/2404.11999). TDPO is DPO with a penalty on the forward KL divergence
    from the reference at every token of the responses. The trainer never holds the full logits of either model.

    The logged `rewards/*` are the paper's for both variants: beta (m + K), with m the log ratio of a response and K
    its sequential KL divergence. The log ratios are logged as `logratios/*`, the divergences as `kl/*`.

    Example:

    ```python
    >>> from datasets import load_dataset
    >>> from trl_ext import TDPOConfig, TDPOTrainer

    >>> trainer = TDPOTrainer(
    ...     model="Qwen/Qwen2.5-0.5B-Instruct",
    ...     args=TDPOConfig("Qwen2.5-0.5B-TDPO"),
    ...     train_dataset=load_dataset("trl-lib/ultrafeedback_binarized", split="train"),
    ... )
    >>> trainer.train()
    ```

    The arguments are those of [`~trl.DPOTrainer`].
    """

    method_class = TDPO
    config_class = TDPOConfig

    _tag_names = ["trl", "trl-ext", "tdpo"]
    _name = "TDPO"
    _paper = {
        "title": "Token-level Direct Preference Optimization",
        "id": "2404.11999",
        # docstyle-ignore
        "citation": textwrap.dedent("""\
            @inproceedings{zeng2024tokenlevel,
                title        = {{Token-level Direct Preference Optimization}},
                author       = {Yongcheng Zeng and Guoqing Liu and Weiyu Ma and Ning Yang and Haifeng Zhang and Jun Wang},
                year         = 2024,
                booktitle    = {Forty-first International Conference on Machine Learning, ICML 2024},
                url          = {https://huggingface.co/papers/2404.11999},
            }"""),
    }
