"""The options of a method: their parser, and a help that begins with the most common ones."""

import argparse
import dataclasses
import difflib
import inspect
import shutil
import sys
import warnings
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from trl import DatasetMixtureConfig, DPOConfig, GRPOConfig, RLOOConfig, TrlParser

from .configurations import shipped, with_configuration
from .scripts import DataArguments, RunArguments, Script


if TYPE_CHECKING:
    from .commands import Method


# The most common options of every method, in the order of the help, with their descriptions.
COMMON = {
    "model_name_or_path": "Model to train: a Hub id or a folder.",
    "dataset_name": None,
    "output_dir": "Folder for the model, its card, checkpoints and training curves.",
    "learning_rate": "Learning rate of AdamW.",
    "num_train_epochs": "Passes over the data.",
    "max_steps": "Optimizer steps, in place of `num_train_epochs`, if above 0.",
    "per_device_train_batch_size": "Rows in a batch of each process.",
    "gradient_accumulation_steps": "Batches that an optimizer step adds up.",
    "max_length": "Tokens of prompt and response together; longer ones are cut.",
    "use_peft": "Train a LoRA adapter instead of all weights.",
    "lora_r": "Rank of the LoRA.",
    "load_in_4bit": "Hold the base model in 4 bits (QLoRA). Needs `use_peft`.",
    "dtype": "Type in which the model's weights are loaded.",
    "bf16": "Compute in bfloat16. On by default unless `fp16` is; on a CPU, false is faster.",
    "use_cpu": "Train on the CPU.",
    "eval_strategy": "When to evaluate on `dataset_test_split`.",
    "save_steps": "Steps between two checkpoints; below 1, a share of all steps.",
    "logging_steps": "Steps between two logs; below 1, a share of all steps.",
    "report_to": "Trackers: 'wandb', 'tensorboard', 'trackio', ..., 'all' or 'none'.",
    "push_to_hub": "Push the model to the Hub.",
    "seed": "Seed of the run.",
    "resume_from_checkpoint": "Continue an interrupted run: `true` for its last complete checkpoint in `output_dir`, "
    "or a checkpoint's folder.",
    "dry_run": None,
}
# Options whose help is another library's, and not true of the methods here.
CORRECTED = {
    "padding_free": "The same as `share_prompts=True`: no padding, and each pair's prompt once.",
}


# The parser's class is known when the method is; see [`make_parser`].
if TYPE_CHECKING:

    class _Base(TrlParser):
        pass
else:
    _Base = object


class UsageError(ValueError):
    """An invalid command line. Its message is shown without a traceback."""


class HelpFormatter(argparse.HelpFormatter):
    """`--name TYPE`, one spelling an option, and its default where there is one."""

    def __init__(self, prog: str):
        super().__init__(prog, max_help_position=32, width=min(119, shutil.get_terminal_size().columns))

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if not action.option_strings:
            return super()._format_action_invocation(action)
        name = next((name for name in action.option_strings if name.startswith("--")), action.option_strings[0])
        return name if action.nargs == 0 else f"{name} {self._format_args(action, _metavar(action))}"

    def _format_args(self, action, default_metavar):
        if _has_many_choices(action):
            return default_metavar
        return super()._format_args(action, default_metavar)

    def _expand_help(self, action: argparse.Action) -> str:
        if action.nargs == 0 and action.const is False:  # `--no_NAME`, which has the help of `--NAME`
            return f"Switch --{action.dest} off."
        text = super()._expand_help(action).rstrip()
        if _has_many_choices(action) and "Possible values" not in text:
            text = f"{text} Choices: {', '.join(_choices(action))}."
        default = action.default
        if (
            default in (None, argparse.SUPPRESS, "", [], {})
            or action.nargs == 0
            or text.startswith("Refused: ")
            or "efault" in text
        ):
            return text
        shown = getattr(default, "value", default)
        return f"{text} (default: {str(shown).lower() if isinstance(shown, bool) else shown})"


def _choices(action: argparse.Action) -> list[str]:
    return [str(choice) for choice in action.choices or ()]


def _has_many_choices(action: argparse.Action) -> bool:
    """Whether the choices of an option are too long to stand beside its name."""
    return len(", ".join(_choices(action))) > 40


def _metavar(action: argparse.Action) -> str:
    name = getattr(action.type, "__name__", "")
    return {"int": "N", "float": "X", "string_to_bool": "BOOL"}.get(name, "VALUE")


class MethodParser(_Base):
    """
    Mixin of the parser of `trl dpo`, with the method's configuration, its further arguments, and how the run is
    started: `--config some.yaml`, options override it. [`make_parser`] puts it before the parser that the
    configuration needs.

    Args:
        script ([`~trl_ext.launch.scripts.Script`]):
            The method's script.
        config_class (`type`):
            The method's configuration.
        prog (`str`, *optional*):
            Name of the program, for messages.
    """

    def __init__(self, script: Script, config_class: type[Any], prog: str | None = None):
        self.script, self.config_class = script, config_class
        super().__init__(
            (
                DataArguments,
                config_class,
                script.model_config,
                DatasetMixtureConfig,
                RunArguments,
                *script.arguments,
            ),
            prog=prog,
            usage="%(prog)s [--config FILE] [options]",
            formatter_class=HelpFormatter,
            add_help=False,
        )
        self.add_argument("-h", "--help", action="store_true", help="Show the options that people set.")
        self.add_argument("--help-all", "--help_all", action="store_true", help="Show every option.")
        refused = config_class.refused_options()
        for action in self._actions:
            action.help = COMMON.get(action.dest) or CORRECTED.get(action.dest) or action.help
            if action.dest in refused:
                action.help = f"Refused: {refused[action.dest]}.".replace("%", "%%")

    # ---- Parsing ---------------------------------------------------------------------------------------------------

    def parse(self, arguments: list[str]) -> tuple:
        """
        Returns the dataclasses of arguments, in the order of the constructor.

        Raises:
            [`UsageError`]: For unknown options or invalid values. The message names each, and the fix.
        """
        words = _without_configuration(arguments)
        try:
            *parsed, in_file, rest = self.parse_args_and_config(
                arguments, return_remaining_strings=True, separate_remaining_strings=True
            )
        except UsageError:
            raise
        except (ValueError, TypeError, OSError) as error:
            # A misspelled option must not be hidden by what the others make of its absence.
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                self._refuse_unknown(self.parse_known_args(words)[1])
            raise UsageError(_with_remedy(str(error))) from error
        self._refuse_unknown([word for word in rest if word in words])
        self._refuse_unknown([word for word in in_file + rest if word.startswith("--")], " in the configuration file")
        return tuple(parsed)[: 5 + len(self.script.arguments)]

    def _refuse_unknown(self, words: list[str], where: str = "") -> None:
        if not words:
            return
        known = [name for action in self._actions for name in action.option_strings if name.startswith("--")]
        close = difflib.get_close_matches(words[0].partition("=")[0], known, n=1)
        hint = f" Did you mean {close[0]}?" if close else ""
        raise UsageError(f"unknown option{where}: {' '.join(words)}.{hint} `--help-all` lists all options.")

    def error(self, message: str):
        raise UsageError(message)

    # ---- Help ------------------------------------------------------------------------------------------------------

    @property
    def heading(self) -> str:
        """The method's one-line description and references."""
        method = self.script.method
        lines = [f"{method.title}: {method.summary}.", f"Learns from {method.data}."]
        paper = method.trainer_class._paper
        if paper:
            lines.append(
                f"Paper: {paper['url'] if 'url' in paper else 'https://huggingface.co/papers/' + paper['id']}"
            )
        names = shipped(method.name)
        if names:
            lines.append(
                f"Configurations for --config, overridden by options: {', '.join(names)}; or a file of yours."
            )
        return "\n".join(lines)

    def format_help(self) -> str:
        """The method's own options, then those that people set."""
        sections = self._sections()
        own: dict[str, Iterable[str]] = {
            title: names for title, names in sections.items() if title in self._own_titles
        }
        seen = set().union(*own.values())
        left_out = seen | set(self.config_class.refused_options())
        known = {action.dest for action in self._actions}
        common = [name for name in COMMON if name in known and name not in left_out]
        own["common options"] = common
        shown = sum(len(list(names)) for names in own.values())
        total = len(known)
        return self._format(own, f"{shown} of {total} options are shown; --help-all shows every one.")

    def format_help_all(self) -> str:
        """Every option once: the method's own first, those that its configuration refuses last, with the reason."""
        return self._format(self._sections(), None)

    def _format(self, sections: Mapping[str, Iterable[str]], epilog: str | None) -> str:
        formatter = self._get_formatter()
        formatter.add_usage(self.usage, (), ())
        actions: dict[str, list[argparse.Action]] = {action.dest: [] for action in self._actions}
        for action in self._actions:
            actions[action.dest].append(action)
        for title, names in sections.items():
            if isinstance(names, set):  # in the order of their dataclasses
                names = [name for name in actions if name in names]
            formatter.start_section(title)
            for name in names:
                # A flag and its negation (`--no_...`) are two actions; the short help shows one.
                formatter.add_arguments(actions[name][:1] if epilog else actions[name])
            formatter.end_section()
        usage, _, rest = formatter.format_help().partition("\n")
        return "\n".join([usage, "", self.heading, rest.rstrip(), *(["", epilog] if epilog else []), ""])

    @property
    def _method_name(self) -> str:
        return self.config_class.__name__.removesuffix("Config")

    @property
    def _own_titles(self) -> list[str]:
        return [f"{self._method_name}'s own options", *map(_title, self.script.arguments)]

    def _sections(self) -> dict[str, set[str]]:
        """The sections of the complete help, in their order: title -> names of the options in it, each option once."""
        from .. import PreferenceConfig
        from ..training.config import HubOptions

        config_class = self.config_class
        own, *extra = self._own_titles
        preference, training = "preference training, for every method", "training, of Transformers"
        sampling = "sampling, rewards and their loss, of TRL"
        data, refused = "model, data and start", f"refused by {self._method_name}: leave them at their defaults"
        sections: dict[str, set[str]] = {
            title: set() for title in (own, *extra, data, preference, sampling, training, refused)
        }

        fields = {option.name for option in dataclasses.fields(config_class)}
        more: dict[str, Any] = dict(zip(extra, self.script.arguments, strict=True))
        for name in {action.dest for action in self._actions}:
            owner = next((cls for cls in config_class.__mro__ if name in inspect.get_annotations(cls)), None)
            if name in config_class.refused_options():
                title = refused
            elif name not in fields:
                title = next((title for title, cls in more.items() if name in cls.__dataclass_fields__), data)
            elif owner in (GRPOConfig, RLOOConfig):
                title = sampling
            elif name == "beta" or owner not in (PreferenceConfig, HubOptions, *DPOConfig.__mro__):
                title = own  # beta is TRL's by name and the method's by its meaning
            else:
                title = preference if owner in (PreferenceConfig, DPOConfig) else training
            sections[title].add(name)
        return {title: names for title, names in sections.items() if names}


def _title(arguments: type) -> str:
    return (arguments.__doc__ or "").strip().partition("\n")[0].rstrip(".")


def _without_configuration(arguments: list[str]) -> list[str]:
    if "--config" not in arguments:
        return arguments
    i = arguments.index("--config")
    return arguments[:i] + arguments[i + 2 :]


def _with_remedy(message: str) -> str:
    """Transformers' message about bfloat16, with what to type on a command line."""
    if "doesn't support bf16" in message:
        return (
            "`bf16` is on by default, and there is no CUDA device that computes in it. To train on the CPU, add "
            "`--use_cpu true` (and `--bf16 false` for float32, which is faster on most CPUs)."
        )
    return message


def make_parser(method: "Method", prog: str | None = None) -> MethodParser:
    """The parser of a method's arguments."""
    config_class = method.config_class
    base = getattr(config_class, "_parser_class", TrlParser)
    return type("MethodParser", (MethodParser, base), {})(method.make_script(), config_class, prog)


def parse(method: "Method", arguments: list[str], prog: str | None = None) -> tuple[Script, tuple]:
    """
    Returns the script of a method and its dataclasses of arguments. Prints the help and exits if it is requested.

    Raises:
        [`UsageError`]: For an invalid command line.
    """
    parser = make_parser(method, prog)
    asks_for_help = {"-h", "--help", "--help-all", "--help_all"} & set(arguments)
    if asks_for_help:
        print(parser.format_help() if asks_for_help <= {"-h", "--help"} else parser.format_help_all())
        sys.exit(0)
    try:
        arguments = with_configuration(arguments, method.name)
    except (ValueError, OSError) as error:
        raise UsageError(str(error)) from error
    return parser.script, parser.parse(arguments)


def without_arguments(method: "Method", prog: str) -> str:
    """The message for a method that is started without arguments."""
    script = method.make_script()
    lines = [
        f"{method.title}: {method.summary}.",
        "Give a model and data, for example",
        "",
        f"  {prog} {script.example}",
    ]
    return "\n".join([*lines, *script.hints, "", "`--help` shows the options that people set."])
