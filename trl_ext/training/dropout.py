"""Switches off the dropout that TRL's `disable_dropout` does not know of, as it only sees `nn.Dropout`."""

import functools
import inspect
import re

from torch import nn
from torch.nn.modules.dropout import _DropoutNd
from transformers import PreTrainedConfig


def disable_functional_dropout(model: nn.Module) -> None:
    """
    Switches off dropout that is not an `nn.Dropout`, for good:

    - probabilities that modules store as plain attributes (`attention_dropout` of Llama and Qwen, every dropout of
      OPT, layer drop) are set to zero;
    - modules whose forward reads a probability from the configuration (`hidden_dropout` of Falcon) get a view of their
      configuration in which it is zero.

    The configurations themselves are not changed, so what is saved keeps its dropout.
    """
    views: dict[int, PreTrainedConfig] = {}
    for module in model.modules():
        if isinstance(module, _DropoutNd):
            module.p = 0.0
        for name, value in vars(module).items():
            if "drop" in name and _is_probability(value):
                setattr(module, name, 0.0)
        config = vars(module).get("config")
        if not isinstance(config, PreTrainedConfig):
            continue
        kind: type = type(module)
        names = _read_from_config(kind)
        if any(_is_probability(value) for name, value in vars(config).items() if name in names):
            if id(config) not in views:
                views[id(config)] = _without_dropout(config)
            module.config = views[id(config)]


def _is_probability(value) -> bool:
    return isinstance(value, float) and value > 0


@functools.cache
def _read_from_config(module_class: type) -> frozenset[str]:
    """Names of the dropout probabilities that the methods of a module read from its configuration."""
    names: set[str] = set()
    for cls in module_class.__mro__:
        if cls.__module__.partition(".")[0] in ("builtins", "torch"):
            continue
        try:
            source = inspect.getsource(cls)
        except (OSError, TypeError):  # defined interactively
            continue
        names.update(re.findall(r"\bself\.config\.(\w*drop\w*)", source))
    return frozenset(names)


def _without_dropout(config: PreTrainedConfig) -> PreTrainedConfig:
    """A view of a configuration that shares all its values and gives 0 for every dropout probability."""

    class View(type(config)):  # type: ignore[misc]
        def __getattribute__(self, name: str):
            value = super().__getattribute__(name)
            return 0.0 if "drop" in name and _is_probability(value) else value

    view = View.__new__(View)
    object.__setattr__(view, "__dict__", config.__dict__)
    View.__name__, View.__qualname__ = type(config).__name__, type(config).__qualname__
    return view
