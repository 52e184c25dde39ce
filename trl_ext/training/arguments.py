"""Arguments that every trainer's constructor takes, checked in one place."""

import torch


def resolve_args(trainer, model_name: str, args):
    """
    The trainer's configuration: what was given, or the default one.

    Args:
        trainer ([`~transformers.Trainer`]):
            The trainer, whose class has `config_class` and `_name`.
        model_name (`str`):
            Name of the model, for the default output folder.
        args (*optional*):
            What was given as `args`.

    Raises:
        `TypeError`: If `args` is a configuration of another class.
    """
    wanted = trainer.config_class
    if args is None:
        return wanted(f"{model_name.rstrip('/').split('/')[-1]}-{trainer._name}")
    if not isinstance(args, wanted):
        raise TypeError(
            f"`args` of `{type(trainer).__name__}` must be a `{wanted.__name__}`, got a `{type(args).__name__}`. "
            f"Replace `{type(args).__name__}(...)` with `{wanted.__name__}(...)`."
        )
    return args


def check_optimizer(model: torch.nn.Module, optimizer: torch.optim.Optimizer | None, remedy: str) -> None:
    """Raises `ValueError` if the optimizer in `optimizers` holds none of the trainable parameters."""
    if optimizer is None:
        return
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    if not any(id(parameter) in held for parameter in model.parameters() if parameter.requires_grad):
        raise ValueError(
            f"`optimizers` has a `{type(optimizer).__name__}` that holds none of the parameters to be trained, so "
            f"training would change nothing. {remedy}"
        )
