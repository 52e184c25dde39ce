"""
What every configuration shares: checked options, refused and dependent ones, and secrets that stay where they are.
"""

import copy
import dataclasses
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from transformers.debug_utils import DebugOption
from transformers.trainer_pt_utils import AcceleratorConfig

from .._checks import (
    ANY_TEXT,
    JSON_FILE,
    NOT_EMPTY,
    Range,
    annotations_of,
    at_least,
    between,
    check_fields,
    check_value,
    default_of,
)
from .._secrets import without_secrets
from .processes import honored_ddp_timeout


if TYPE_CHECKING:  # what the mixin expects to be mixed into
    from transformers import TrainingArguments as _TrainingArguments
else:
    _TrainingArguments = object

_HIDDEN = "<HIDDEN>"


class CheckedConfig(_TrainingArguments):
    r"""
    Mixin of a configuration that descends from [`~transformers.TrainingArguments`]: no option is silently ignored.

    What an option may hold is in its annotation (see [`_checks`]). Beyond that, a class lists

    - in `_refused_options`, what its method cannot honor: option -> reason;
    - in `_honored_options`, what it honors although a parent refuses it;
    - in `_dependent_options`, what means nothing without another option: `(option, the one it needs)`;
    - in `_inherited_annotations`, narrower or wider annotations of options that TRL or Transformers declare.

    Each class lists its own; those of its parents stay. What several options must fulfill together is checked by
    [`~CheckedConfig._check_options`], to which every field has its type already.

    Raises:
        `ValueError`: For an option of a wrong type, out of its range, refused, or without the option it needs. The
        message names the option, the value, and what to do.
    """

    _refused_options: ClassVar[dict[str, str]] = {
        "label_smoothing_factor": "it smooths the labels of a classifier, which preference losses do not have",
        "average_tokens_across_devices": "the loss is a mean over pairs, not over tokens",
        "logging_nan_inf_filter": "a loss that is not finite stops the run, so none is ever logged",
    }
    _honored_options: ClassVar[tuple[str, ...]] = ()
    _dependent_options: ClassVar[tuple[tuple[str, str], ...]] = ()
    _inherited_annotations: ClassVar[dict[str, Any]] = {
        "per_device_train_batch_size": Annotated[int, at_least(1)],
        "per_device_eval_batch_size": Annotated[int, at_least(1)],
        "gradient_accumulation_steps": Annotated[int, at_least(1)],
        "eval_accumulation_steps": Annotated[int | None, at_least(1)],
        "num_train_epochs": Annotated[float, at_least(0)],
        "max_steps": Annotated[int, at_least(-1)],
        "learning_rate": Annotated[float, at_least(0)],
        "weight_decay": Annotated[float, at_least(0)],
        "adam_beta1": Annotated[float, between(0, 1, "[)")],
        "adam_beta2": Annotated[float, between(0, 1, "[)")],
        "adam_epsilon": Annotated[float, at_least(0)],
        "max_grad_norm": Annotated[float | None, Range(0, finite=False)],  # inf measures the norm and clips nothing
        "neftune_noise_alpha": Annotated[float | None, at_least(0)],
        # Transformers divides by them, so that a negative number means every step.
        "logging_steps": Annotated[float, at_least(0)],
        "eval_steps": Annotated[float | None, at_least(0)],
        "save_steps": Annotated[float, at_least(0)],
        "eval_delay": Annotated[float, at_least(0)],
        "save_total_limit": Annotated[int | None, at_least(1)],
        "seed": Annotated[int, between(0, 2**32 - 1)],
        "data_seed": Annotated[int | None, between(0, 2**32 - 1)],
        "dataloader_num_workers": Annotated[int, at_least(0)],
        "ddp_bucket_cap_mb": Annotated[int | None, at_least(1)],
        "ddp_timeout": Annotated[int, between(1, 10**9)],
        "include_num_input_tokens_seen": bool | Literal["all", "non_padding", "no"],
        **dict.fromkeys(
            (
                "output_dir",
                "hub_model_id",
                "hub_token",
                "hub_revision",
                "resume_from_checkpoint",
                "metric_for_best_model",
                "optim_args",
                "torch_compile_backend",
                "torch_compile_mode",
            ),
            Annotated[str | None, NOT_EMPTY],
        ),
        # Wider than declared, as Transformers takes these, too.
        "accelerator_config": Annotated[dict | str | AcceleratorConfig | None, JSON_FILE],
        "fsdp_config": Annotated[dict | str | None, JSON_FILE],
        "deepspeed": Annotated[dict | str | None, ANY_TEXT],
        "fsdp": bool | str | list[str] | None,
        "ddp_backend": Annotated[str | None, NOT_EMPTY],
        "debug": str | list[DebugOption] | None,
    }

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        # `@dataclass` writes a `__repr__` that shows every field, unless the class has one.
        if "__repr__" not in vars(cls):
            cls.__repr__ = CheckedConfig.__repr__  # type: ignore[method-assign]  # it is the inherited one

    def __post_init__(self):
        check_fields(self, annotations=self._all_inherited_annotations())
        self._check_texts()
        self._check_refused_options()
        self._check_dependent_options()
        self._check_options()
        with honored_ddp_timeout(self):
            super().__post_init__()

    def _check_options(self) -> None:
        """Checks constraints between several options; a method's configuration overrides it."""

    def _check_texts(self) -> None:
        """Checks options that Transformers takes apart."""
        words = [word for word in (self.optim_args or "").replace(" ", "").split(",") if self.optim_args]
        if any(word.count("=") != 1 or word[0] == "=" or word[-1] == "=" for word in words):
            raise ValueError(
                f"`optim_args={self.optim_args!r}` must be `NAME=VALUE`, or several with commas between them, such as "
                "'momentum=0.9,nesterov=True'."
            )
        if isinstance(self.accelerator_config, dict):
            known = annotations_of(AcceleratorConfig)
            for key, value in self.accelerator_config.items():
                if key not in known:
                    raise ValueError(
                        f"`accelerator_config` has the unknown key {key!r}. Known are: {', '.join(map(repr, known))}."
                    )
                check_value(f"accelerator_config[{key!r}]", value, known[key])

    # ---- Declarations ----------------------------------------------------------------------------------------------

    @classmethod
    def _all_inherited_annotations(cls) -> dict[str, Any]:
        merged: dict[str, Any] = {}
        for parent in reversed(cls.__mro__):
            merged.update(vars(parent).get("_inherited_annotations", {}))
            for option in vars(parent).get("__annotations__", {}):
                merged.pop(option, None)  # declared anew
        return merged

    @classmethod
    def refused_options(cls) -> dict[str, str]:
        """The options that must be left at their defaults, each with the reason."""
        refused: dict[str, str] = {}
        for parent in reversed(cls.__mro__):
            refused.update(vars(parent).get("_refused_options", {}))
            for option in vars(parent).get("_honored_options", ()):
                refused.pop(option, None)
        return refused

    @classmethod
    def dependent_options(cls) -> tuple[tuple[str, str], ...]:
        """The options that mean nothing without another one: `(option, the one it needs)`."""
        pairs = [pair for parent in reversed(cls.__mro__) for pair in vars(parent).get("_dependent_options", ())]
        return tuple(dict.fromkeys(pairs))

    def _check_refused_options(self) -> None:
        defaults = {option.name: default_of(option) for option in dataclasses.fields(self)}
        for option, reason in self.refused_options().items():
            value, default = getattr(self, option), defaults[option]
            # None and False switch an option off, unless it is on by default. A list of one may come as its element,
            # as `loss_type` does.
            is_off = value is None or (value is False and default is not True)
            if not is_off and value != default and [value] != default:
                raise ValueError(
                    f"`{option}={value!r}` is not supported by `{type(self).__name__}`: {reason}. Leave `{option}` at "
                    f"its default ({default!r})."
                )

    def _check_dependent_options(self) -> None:
        defaults = {option.name: default_of(option) for option in dataclasses.fields(self)}
        for option, needed in self.dependent_options():
            value, default = getattr(self, option), defaults[option]
            if value != default and not getattr(self, needed):
                is_switch = annotations_of(type(self))[needed] is bool
                wanted, given = (f"`{needed}=True`",) * 2 if is_switch else (f"`{needed}` is given", f"`{needed}`")
                raise ValueError(
                    f"`{option}={value!r}` has no effect unless {wanted}. Set {given}, or leave `{option}` at its "
                    f"default ({default!r})."
                )

        optimizer = str(getattr(self.optim, "value", self.optim))
        if self.optim_target_modules is not None and not optimizer.startswith(("galore", "apollo")):
            raise ValueError(
                f"`optim_target_modules={self.optim_target_modules!r}` has no effect with `optim={optimizer!r}`: it "
                "names the layers that GaLore and APOLLO project. Set `optim='galore_adamw'` or another of these, or "
                "leave it out."
            )

    # ---- Secrets ---------------------------------------------------------------------------------------------------

    def __getstate__(self) -> dict:
        # Transformers pickles the arguments into `training_args.bin`, which goes up with every push.
        return {name: without_secrets(name, value, None) for name, value in self.__dict__.items()}

    def __repr__(self) -> str:
        options = (f"{field.name}={self._shown(field.name)!r}" for field in dataclasses.fields(self) if field.init)
        return f"{type(self).__name__}({', '.join(options)})"

    def __str__(self) -> str:
        names = sorted(field.name for field in dataclasses.fields(self) if field.init)
        options = "".join(f"{name}={self._shown(name)},\n" for name in names)
        return f"{type(self).__name__}(\n{options})"

    def _shown(self, name: str):
        return without_secrets(name, getattr(self, name), _HIDDEN)

    def to_dict(self) -> dict[str, Any]:
        """The options, for JSON and for experiment trackers, with secrets hidden."""
        return {name: without_secrets(name, value, _HIDDEN) for name, value in super().to_dict().items()}

    # Copies in memory keep the secrets.

    def __deepcopy__(self, memo):
        copied = memo[id(self)] = type(self).__new__(type(self))
        copied.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return copied

    def __copy__(self):
        copied = type(self).__new__(type(self))
        copied.__dict__.update(self.__dict__)
        return copied


@dataclass
class HubOptions:
    r"""
    Options of a trainer that describes and pushes what it trained (see
    [`~trl_ext.training.model_card.DocumentedRun`]).

    Parameters:
        hub_base_model_id (`str`, *optional*):
            Hub id of the model that training starts from, where it is loaded from a local path. The model card and
            `adapter_config.json` name it in place of the path. An adapter is pushed only if its base is on the Hub.
    """

    hub_base_model_id: Annotated[str | None, NOT_EMPTY] = field(
        default=None,
        metadata={
            "help": "Hub id of the base model, if it is loaded from a local path: the model card and "
            "`adapter_config.json` name it in place of the path. Needed to push an adapter of a local model."
        },
    )
