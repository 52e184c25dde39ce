"""
The parameters of the method that `D2POConfig(loss=...)` names.

They are given as `loss_kwargs`. 0.1.0 took them as options of `D2POConfig` itself, in the constructor, on the command
line and in configuration files. Those forms work for one more release, with a warning, and end up in `loss_kwargs`:
everything in this module but `method_options` then goes.
"""

import dataclasses
import functools
import warnings
from typing import Any, cast

import yaml
from trl import TrlParser

from ..preference import PreferenceConfig
from ..preference.method import get_method


def method_options(loss: str) -> dict[str, dataclasses.Field]:
    """The parameters that the method's configuration adds to [`PreferenceConfig`], by name."""
    shared = {option.name for option in dataclasses.fields(PreferenceConfig)}
    options = dataclasses.fields(get_method(loss).config_class)
    return {option.name: option for option in options if option.name not in shared}


def _moved_to_loss_kwargs(loss: str, options: dict[str, Any], loss_kwargs: dict | str | None) -> dict[str, Any]:
    """
    `loss_kwargs` with the options of 0.1.0 added; warns about them, and raises `TypeError` if one is given twice.
    """
    if isinstance(loss_kwargs, str):
        loss_kwargs = yaml.safe_load(loss_kwargs)
    twice = sorted(set(options) & set(loss_kwargs or {}))
    if twice:
        raise TypeError(f"`{twice[0]}` was given both as an option and in `loss_kwargs`. Leave the option out.")
    warnings.warn(
        f"The options {', '.join(f'`{name}`' for name in options)} belong to the loss {loss!r}: give them as "
        f"`loss_kwargs={options!r}`. As options of `D2POConfig` they are removed in the next release.",
        FutureWarning,
        stacklevel=4,
    )
    return {**cast(dict, loss_kwargs or {}), **options}


def accept_method_options(config_class: type) -> type:
    """Decorator of `D2POConfig`: its constructor takes the method's parameters as keywords, as in 0.1.0."""
    init = config_class.__init__  # type: ignore[misc]  # of this class: what follows is for no subclass
    names = {option.name for option in dataclasses.fields(config_class)}

    @functools.wraps(init)
    def __init__(self, *args, **kwargs):
        loss = kwargs.get("loss", "dpo")
        moved = {name: value for name, value in kwargs.items() if name not in names}
        if moved and set(moved) <= set(method_options(loss)):
            kwargs = {name: value for name, value in kwargs.items() if name in names}
            kwargs["loss_kwargs"] = _moved_to_loss_kwargs(loss, moved, kwargs.get("loss_kwargs"))
        init(self, *args, **kwargs)

    config_class.__init__ = __init__  # type: ignore[misc]  # as above
    return config_class


def config_for_loss(config_class: Any, loss: str) -> type:
    """
    Returns a class for a parser: `config_class` with `loss` as the default and the method's parameters as options. Its
    instances are of `config_class`.
    """
    options = method_options(loss)

    def __post_init__(self):
        given = {name: self.__dict__.pop(name) for name in options}
        given = {name: value for name, value in given.items() if value != options[name].default}
        self.__class__ = config_class
        if given:
            self.loss_kwargs = _moved_to_loss_kwargs(self.loss, given, self.loss_kwargs)
        config_class.__post_init__(self)

    default = next(option for option in dataclasses.fields(config_class) if option.name == "loss")
    fields: list[tuple[str, Any, Any]] = [
        ("loss", str, dataclasses.field(default=loss, metadata=dict(default.metadata)))
    ]
    for name, option in options.items():
        copied = dataclasses.field(default=option.default, metadata=dict(option.metadata))
        fields.append((name, option.type, copied))
    return dataclasses.make_dataclass(
        config_class.__name__,
        fields,
        bases=(config_class,),
        namespace={"__post_init__": __post_init__, "__doc__": config_class.__doc__},
    )


class MethodOptionsParser(TrlParser):
    """
    Parser of `D2POConfig` that also takes the method's parameters as options, `--loss tdpo --variant tdpo1`, as in
    0.1.0.
    """

    def set_defaults_with_config(self, **config):
        known = {action.dest for action in self._actions}
        # Which loss it will be is not known yet: the command line comes after the file.
        self._from_file = {name: value for name, value in config.items() if name not in known}
        return super().set_defaults_with_config(**{name: config[name] for name in config if name in known})

    def parse_known_args(self, args=None, namespace=None):
        namespace, rest = super().parse_known_args(args, namespace)
        options = method_options(namespace.loss)
        from_file = self.__dict__.pop("_from_file", {})
        moved = {name: value for name, value in from_file.items() if name in options}
        unknown = [
            text for name, value in from_file.items() if name not in options for text in (f"--{name}", str(value))
        ]
        while rest:
            name, equals, value = rest.pop(0).partition("=")
            option = name.removeprefix("--").replace("-", "_")
            switch = option.removeprefix("no_")
            if not name.startswith("--") or not {option, switch} & set(options):
                unknown.append(name + equals + value)
            elif option not in options:
                moved[switch] = False  # `--no_length_normalization`
            else:
                if not equals and rest and not rest[0].startswith("--"):
                    value = rest.pop(0)
                moved[option] = yaml.safe_load(value) if value else True
        if moved:
            namespace.loss_kwargs = _moved_to_loss_kwargs(namespace.loss, moved, namespace.loss_kwargs)
        return namespace, unknown
