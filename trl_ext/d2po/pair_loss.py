"""Any method of the project as the loss of D2PO's pairs: its trainer's `pair_loss`, its configuration's parameters."""

import dataclasses
import functools
from dataclasses import dataclass

from ..losses import ipo_loss
from ..preference import PairLoss, PreferenceConfig, PreferenceTrainer


class IPOTrainer(PreferenceTrainer):
    """IPO (https://huggingface.co/papers/2310.12036), on log ratios summed over the response, as in the paper."""

    _name = "IPO"

    def pair_loss(self, chosen, rejected):
        losses = ipo_loss(chosen.logratios, rejected.logratios, beta=self.args.beta)
        return PairLoss(losses, *(self.args.beta * side.logratios.detach() for side in (chosen, rejected)))


def get_method(name: str) -> type[PreferenceTrainer]:
    """
    The trainer of the paired method `name`: `"dpo"`, `"ipo"`, or a method of the project as its recipe is named: `"fdpo"`,
    `"mallows"`, `"rainbowpo"`, `"simper"`, `"tdpo"`.

    Raises:
        `ValueError`: If there is none of that name, or its data are not pairs of texts.
    """
    if name == "ipo":
        return IPOTrainer
    import trl_ext

    trainers = [item for item in trl_ext._PUBLIC.items() if item[0].endswith("Trainer")]
    public = {module.rpartition(".")[2]: trainer for trainer, module in trainers}
    for other in ("preference", "d2po", "diffusion_dpo", "dspo"):
        del public[other]
    # f-DPO with its default divergence, the reverse KL, is DPO.
    public["dpo"] = "FDPOTrainer"
    if name not in public:
        names = sorted({"ipo", *public})
        raise ValueError(
            f"`loss={name!r}` is not a paired method of this project. Names: {', '.join(map(repr, names))}."
        )
    return getattr(trl_ext, public[name])


@functools.cache
def with_loss_config(config_class: type[PreferenceConfig], loss: str) -> type[PreferenceConfig]:
    """
    `config_class` with the parameters, checks and refusals of the method `loss` added, and with that method's defaults for
    whatever `config_class` leaves as [`PreferenceConfig`] has it: RainbowPO's `beta` is 10.

    The defaults are the class's own, so a value that a user gives is kept, also where it is `PreferenceConfig`'s default.
    """
    if "_composed_from" in vars(config_class):
        if loss != config_class.loss:
            raise ValueError(
                f"This `{config_class.__name__}` was made for `loss={config_class.loss!r}`, got {loss!r}."
            )
        return config_class
    method_config = get_method(loss).config_class
    bases = (config_class,) if issubclass(config_class, method_config) else (config_class, method_config)
    shared, own, methods = (
        {option.name: option for option in dataclasses.fields(cls)}
        for cls in (PreferenceConfig, config_class, method_config)
    )
    # A dataclass keeps the fields that it inherits as they are, so what is not the parent's has been defined anew.
    redefined = {
        name: option
        for name, option in methods.items()
        if name in shared and option is not shared[name] and own[name] is shared[name]
    }
    # The configuration's dependent options stand before the method's in the order of classes, and would hide them.
    dependent = (*config_class._dependent_options, *method_config._dependent_options)
    names = {
        "__module__": config_class.__module__,
        "__doc__": config_class.__doc__,
        "__annotations__": {"loss": str, **{name: option.type for name, option in redefined.items()}},
        "loss": dataclasses.field(default=loss, metadata=dict(own["loss"].metadata)),
        **{name: _field_like(option) for name, option in redefined.items()},
        "_dependent_options": tuple(dict.fromkeys(dependent)),
        "_composed_from": config_class,
    }
    return dataclass(type(config_class.__name__, bases, names))


def _field_like(option: dataclasses.Field):
    """A field for another class: a `Field` belongs to the class that it was made for."""
    return dataclasses.field(
        default=option.default, default_factory=option.default_factory, metadata=dict(option.metadata)
    )


@functools.cache
def with_loss_trainer(
    trainer_class: type[PreferenceTrainer], config_class: type, loss: str
) -> type[PreferenceTrainer]:
    """`trainer_class` with the `pair_loss` of the method `loss`, and whatever that needs."""
    names = {
        "__module__": trainer_class.__module__,
        "__doc__": trainer_class.__doc__,
        "config_class": config_class,
        "_composed_from": trainer_class,
    }
    return type(trainer_class.__name__, (trainer_class, get_method(loss)), names)


def rebuild_config(config_class: type, loss: str):
    """An empty configuration, for unpickling: the class that [`with_loss_config`] makes has no name of its own."""
    composed = with_loss_config(config_class, loss)
    return composed.__new__(composed)
