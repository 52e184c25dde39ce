"""A paired method as an object: what it reads of the reference and of the dataset, and its loss."""

import importlib
import math
from typing import ClassVar

from .preference_config import PreferenceConfig
from .scoring import REFERENCE_STATISTICS, PairLoss, ResponseScores


# Names of the methods, as in the recipes, and where each is defined. A method is imported when it is asked for.
_METHODS = {
    "dpo": "trl_ext.fdpo.fdpo_trainer.FDPO",  # f-DPO with its default divergence, the reverse KL
    "fdpo": "trl_ext.fdpo.fdpo_trainer.FDPO",
    "ipo": "trl_ext.d2po.ipo.IPO",
    "mallows": "trl_ext.mallows.mallows_trainer.MallowsDPO",
    "rainbowpo": "trl_ext.rainbowpo.rainbowpo_trainer.RainbowPO",
    "simper": "trl_ext.simper.simper_trainer.SimPER",
    "tdpo": "trl_ext.tdpo.tdpo_trainer.TDPO",
}
METHOD_NAMES = sorted(_METHODS)


class Method:
    r"""
    A paired method. Trainers hold one: a leaf trainer its own, [`~trl_ext.D2POTrainer`] the one that `loss` names.

    A method is a subclass that says what it needs and how it turns the scores of a pair into a loss:

    ```python
    class Hinge(Method):
        name = "Hinge"

        def pair_loss(self, chosen, rejected):
            rewards = [self.args.beta * side.logratios for side in (chosen, rejected)]
            return PairLoss(torch.relu(1 - rewards[0] + rewards[1]), *(reward.detach() for reward in rewards))


    class HingeTrainer(PreferenceTrainer):
        method_class = Hinge
    ```

    Args:
        args ([`PreferenceConfig`]):
            Configuration with the method's parameters, an instance of `config_class`.

    Class attributes:
        name (`str`):
            Name in messages and on the model card.
        config_class (`type[PreferenceConfig]`):
            Configuration that declares and checks the method's parameters.
        reference_statistics (`tuple[str, ...]`, defaults to `("logps",)`):
            What `pair_loss` reads of the reference, one number a response: `"logps"` gives `ref_logps` and
            `logratios`, `"entropy"` gives `ref_entropy`. `()` means that no reference model is loaded, built or run. A
            method for which this depends on its parameters sets it on the instance.
        needs_token_kl (`bool`, defaults to `False`):
            Whether `pair_loss` reads `kl` or `token_kl`, KL(reference || policy) of each next-token distribution. Both
            models are then scored in one pass over tiles of their logits.
        extra_columns (`tuple[str, ...]`, defaults to `()`):
            Further columns of the dataset that `pair_loss` reads from `columns`, one finite number a pair.
        extra_columns_range (`tuple[float, float]`, defaults to `(-inf, inf)`):
            Smallest and largest number that these columns may hold.
    """

    name: str = ""
    config_class: ClassVar[type[PreferenceConfig]] = PreferenceConfig

    reference_statistics: tuple[str, ...] = ("logps",)
    needs_token_kl: bool = False
    extra_columns: tuple[str, ...] = ()
    extra_columns_range: tuple[float, float] = (-math.inf, math.inf)

    def __init__(self, args: PreferenceConfig):
        self.args = args

    @property
    def needs_reference(self) -> bool:
        """Whether `pair_loss` reads anything of the reference."""
        return bool(self.reference_statistics) or self.needs_token_kl

    @property
    def token_kl_gradient(self) -> tuple[bool, bool]:
        """
        Whether the KL of the chosen and that of the rejected responses need a gradient. A loss that detaches one of
        them returns `False` for it here, which saves its computation.
        """
        return self.needs_token_kl, self.needs_token_kl

    def pair_loss(self, chosen: ResponseScores, rejected: ResponseScores) -> PairLoss:
        """
        The loss of each pair.

        Args:
            chosen ([`ResponseScores`]):
                Scores of the preferred responses.
            rejected ([`ResponseScores`]):
                Scores of the other responses, in the same order.
        """
        raise NotImplementedError(f"`{type(self).__name__}` must define `pair_loss(self, chosen, rejected)`.")

    def bind(self, trainer) -> None:
        """
        Called once, at the end of the trainer's constructor. A method that estimates a parameter from the training
        data keeps the trainer; a method may also warn about its parameters here.
        """

    def check_dataset(self, columns, dataset_name: str) -> None:
        """
        Called with the columns of each dataset before it is prepared. Raises or warns if the method cannot use it.
        """

    def resolved_hyperparameters(self) -> dict:
        """
        Hyperparameters for the model card that are missing from `args` or were resolved later (e.g. an estimated
        kappa). `None` leaves a row out.
        """
        return {}


def get_method(name: str) -> type[Method]:
    """
    The paired method called `name`: `"dpo"`, `"ipo"`, or a method of this project under the name of its recipe.

    Raises:
        `ValueError`: If there is no paired method of that name.
    """
    if name not in _METHODS:
        raise ValueError(
            f"`loss={name!r}` is not a paired method of this project. Names: {', '.join(map(repr, METHOD_NAMES))}."
        )
    module, _, attribute = _METHODS[name].rpartition(".")
    return getattr(importlib.import_module(module), attribute)


def check_needs(method: Method, args: PreferenceConfig) -> None:
    """Raises `ValueError` for unknown reference statistics and for options without effect on what the method needs."""
    unknown = set(method.reference_statistics) - set(REFERENCE_STATISTICS)
    if unknown:
        raise ValueError(
            f"{method.name} needs the unknown reference statistics {sorted(unknown)}. Known are "
            f"{list(REFERENCE_STATISTICS)}."
        )
    for option in () if method.needs_reference else ("precompute_ref_log_probs", "sync_ref_model", "log_token_kl"):
        if getattr(args, option):
            raise ValueError(
                f"`{option}=True` has no effect: {method.name}, as configured, uses no reference model. Leave "
                f"`{option}` at its default (False)."
            )
    if method.needs_token_kl and args.precompute_ref_log_probs:
        raise ValueError(
            f"`precompute_ref_log_probs=True` is not supported by {method.name}, whose KL needs the reference's whole "
            "next-token distributions. Set `precompute_ref_log_probs=False`."
        )
