"""Configuration of Mallows-DPO."""

from dataclasses import dataclass, field

from ..losses.mallows import LINKS
from ..preference.dispersion import DispersionConfig


@dataclass
class MallowsDPOConfig(DispersionConfig):
    r"""
    Configuration class for [`MallowsDPOTrainer`].

    Only the parameters that Mallows-DPO adds are listed; the others are those of [`~trl.DPOConfig`].

    Parameters:
        link (`str`, *optional*, defaults to `"sigmoid"`):
            `"sigmoid"` (Mallows-theta-DPO, Spearman's rho), `"ipo"` (the squared loss with the same weights), or
            `"phi"` (Mallows-phi-DPO, Kendall's tau). See [`~trl_ext.losses.mallows_dpo_loss`].
        kappa (`float` or `str`, *optional*, defaults to `"auto"`):
            Scale of the weights `-kappa log(dispersion)`. `"auto"` makes them average 1 over the training set, so that
            `beta` keeps DPO's meaning; it is estimated once, from the reference, before the first loss, reported on
            the model card and kept in checkpoints. The released code has the constant 0.29, which is such an estimate
            for Llama-3-8B-Instruct.
        num_kappa_samples (`int` or `None`, *optional*, defaults to `1024`):
            Number of training pairs, evenly spaced, from which `kappa="auto"` is estimated. `None` takes them all.
        dispersion_column (`str`, *optional*):
            Column of the datasets, evaluation sets included, that holds the dispersion of each pair, a number in [0,
            1]: 0 where everybody prefers the chosen response, 1 where people are evenly split. It takes the place of
            the reference's entropy, which is then not computed. With `kappa=2` it is the phi of the Mallows model.

    > [!NOTE]
    > These parameters have default values different from [`~transformers.TrainingArguments`]:
    > - `logging_steps`: Defaults to `10` instead of `500`.
    > - `gradient_checkpointing`: Defaults to `True` instead of `False`.
    > - `bf16`: Defaults to `True` if `fp16` is not set, instead of `False`.
    > - `learning_rate`: Defaults to `1e-6` instead of `5e-5`.
    """

    link: str = field(
        default="sigmoid",
        metadata={
            "help": "Link between margin and loss. Possible values are: 'sigmoid' (Mallows-theta, Spearman's rho), "
            "'ipo' (squared), 'phi' (Mallows-phi, Kendall's tau).",
            "choices": list(LINKS),
        },
    )
