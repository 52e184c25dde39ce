"""Arguments that every trainer's constructor takes, checked in one place."""

import torch
from datasets import Dataset, IterableDataset


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


def check_optimizers(model: torch.nn.Module, optimizers: tuple, remedy: str) -> None:
    """
    Checks that the optimizer and the scheduler of the argument `optimizers` act on what is trained.

    Raises:
        `ValueError`: If the optimizer holds none of the trainable parameters, or the scheduler is of another
            optimizer, whose learning rate it would change in place of the run's.
    """
    optimizer, scheduler = optimizers
    if optimizer is not None:
        held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        if not any(id(parameter) in held for parameter in model.parameters() if parameter.requires_grad):
            raise ValueError(
                f"`optimizers` has a `{type(optimizer).__name__}` that holds none of the parameters to be trained, so "
                f"training would change nothing. {remedy}"
            )
    inner = getattr(optimizer, "optimizer", optimizer)  # of Accelerate's wrapper
    if scheduler is not None and getattr(scheduler, "optimizer", inner) is not inner:
        missing = "the optimizer is made by the trainer" if optimizer is None else "the optimizer beside it is another"
        raise ValueError(
            f"`optimizers` has a `{type(scheduler).__name__}` that changes the learning rate of its own optimizer, "
            f"and {missing}, so the run's would stay as it is. Give both, the scheduler made of this optimizer, or "
            "leave the scheduler out and set `lr_scheduler_type`."
        )


def without_format(dataset, name: str):
    """
    A dataset in plain Python values: a format of tensors or arrays (`with_format("torch")`) is taken off. Anything
    else is returned as it is.

    Args:
        dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]):
            The dataset.
        name (`str`):
            Name of the split, for messages.

    Raises:
        `ValueError`: For a transform, which is applied as rows are read and would be lost here.
    """
    if isinstance(dataset, Dataset) and dataset.format["type"] == "custom":
        raise ValueError(
            f"The {name} dataset has a transform (`with_transform` or `set_transform`), which would not be applied. "
            "Use `dataset.map(...)`, which stores its result, or `dataset.reset_format()` to drop the transform."
        )
    return dataset.with_format(None) if isinstance(dataset, Dataset | IterableDataset) else dataset
