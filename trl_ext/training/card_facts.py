"""
Facts of a model card that every trainer can state: base model, data, adapter, optimization, results, run.

Unknown facts are left out: a card that claims a base model or a dataset that does not exist is worse than a short one.
Functions that return text return Markdown: whatever a user, a file or the Hub named went through [`plain`] or
[`code`].
"""

import html
import importlib.metadata
import math
import os
import platform
import re
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate.utils import DistributedType
from datasets.packaged_modules import _PACKAGED_DATASETS_MODULES as _FORMATS
from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from .._secrets import is_secret_name, without_secrets
from .._trl import get_comet_experiment_url, get_trackio_space_url
from .._version import __version__


# Metrics of the run's progress rather than of its result; the trackers have them.
_LEFT_OUT_METRICS = re.compile(
    r"(epoch|step|learning_rate|grad_norm|num_tokens|entropy|aux_loss|mean_token_accuracy|total_flos|"
    r"(logits|logps|logratios)/.*|step_time|.*(runtime|samples_per_second|steps_per_second|model_preparation_time)|"
    r".*/t\d+-\d+)"  # by timestep
)
_FIRST_METRICS = ("loss", "rewards/accuracies", "rewards/margins", "rewards/chosen", "rewards/rejected")
_FRONT_MATTER = re.compile(r"\A\s*---[ \t]*\r?\n(.*?)\r?\n---[ \t]*(\r?\n|$)", flags=re.DOTALL)


# ---- Text ----------------------------------------------------------------------------------------------------------


def one_line(text: Any) -> str:
    """`text` on one line, without control characters and lone surrogates."""
    return " ".join("".join(c if c.isprintable() else " " for c in str(text)).split())


# Underscores between letters are no markup.
_MARKUP = re.compile(r"[\\`*\[\]|~$]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])")
_ADDRESS = re.compile(r":(?=//)|@|(?<=\bwww)\.", flags=re.IGNORECASE)


def plain(text: Any) -> str:
    """`text` as Markdown that shows it as it is: no HTML, no links, no markup, no mathematics."""
    marked = _MARKUP.sub(lambda found: "\\" + found[0], html.escape(one_line(text), quote=False))
    # GitHub and the Hub make links of bare addresses, which have no escape.
    return _ADDRESS.sub(lambda found: f"&#{ord(found[0])};", marked)


def code(text: Any) -> str:
    """`text` as a code span, or as plain text if it could end the span or be read as HTML."""
    text = one_line(text)
    return plain(text) if re.search(r"[`<>]", text) or not text else f"`{text}`"


def cell(markdown: str) -> str:
    """Keeps Markdown inside its cell of a table."""
    return re.sub(r"(?<!\\)\|", r"\\|", one_line(markdown))


def number(value: float) -> str:
    return f"{value:.4g}"


def value_text(value: Any) -> str:
    """The value of an option: of an enumeration its value, of a list its items, of a local path the last part."""
    value = getattr(value, "value", value)
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, (list, tuple, set)):
        return ", ".join(value_text(item) for item in value)
    return public_name(str(value).removeprefix("torch."))


def public_name(name: str) -> str:
    """The last part of a local path, which means nothing on another machine; any other name as it is."""
    return Path(name).name if os.path.isabs(name) or name.startswith("~") or os.path.exists(name) else name


def hub_link(repo_id: str, kind: str = "") -> str:
    return f"[{repo_id}](https://huggingface.co/{kind}{repo_id})"


def is_hub_id(name: Any) -> bool:
    """Whether `name` can be the id of a repository on the Hub, rather than a folder on this machine."""
    if not isinstance(name, str) or not name or os.path.exists(name):
        return False
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def read_front_matter(readme) -> dict:
    """Metadata of a card, empty if there is none that can be read: a base's broken card must not stop a save."""
    try:
        match = _FRONT_MATTER.match(Path(readme).read_text(encoding="utf-8"))
        metadata = yaml.safe_load(match.group(1)) if match else {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return {}
    return metadata if isinstance(metadata, dict) else {}


# ---- Base model and data -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class BaseModel:
    """
    The base model that training started from.

    Attributes:
        name (`str`):
            Hub id or path; empty for a model built in memory.
        architecture (`str`):
            Class of the model.
        hub_ids (`list[str]`, *optional*):
            The nearest ancestors on the Hub: `name` itself, or those that a local folder's card names.
        is_loadable (`bool`, *optional*):
            Whether `from_pretrained(name)` finds the model.
        license (`dict[str, str]`, *optional*):
            The license keys of the base's card, where there is a card on this machine.
        loaded_from (`str`, *optional*):
            What was loaded, where the user says that `name` is the same model.
    """

    name: str
    architecture: str
    hub_ids: list[str] = field(default_factory=list)
    is_loadable: bool = False
    license: dict[str, str] = field(default_factory=dict)
    loaded_from: str = ""

    @classmethod
    def of(cls, name: str, architecture: str, hub_id: str | None = None, index: str = "config.json") -> "BaseModel":
        """
        Describes what was loaded from `name`.

        Args:
            name (`str`):
                Hub id or path; empty for a model built in memory.
            architecture (`str`):
                Class of the model.
            hub_id (`str`, *optional*):
                Where the user says that the same model is on the Hub.
            index (`str`, *optional*):
                File that a loadable folder has.
        """
        if is_hub_id(hub_id or name):
            card = try_to_load_from_cache(hub_id or name, "README.md")
            readme = card if isinstance(card, str) else Path(name, "README.md") if name else None
            metadata = read_front_matter(readme) if readme else {}
            return cls(hub_id or name, architecture, [hub_id or name], True, _license(metadata), name)

        # Up the chain of local folders, each of whose cards may name the next.
        ids: list[str] = []
        license: dict[str, str] = {}
        folder, seen = name, set()
        while folder and os.path.isdir(folder) and os.path.realpath(folder) not in seen:
            seen.add(os.path.realpath(folder))
            metadata = read_front_matter(Path(folder, "README.md"))
            license = license or _license(metadata)
            ancestors = metadata.get("base_model") or []
            ancestors = [ancestors] if isinstance(ancestors, str) else ancestors
            ids = [ancestor for ancestor in ancestors if is_hub_id(ancestor)]
            folder = "" if ids or len(ancestors) != 1 else str(ancestors[0])
        return cls(name, architecture, ids, bool(name) and Path(name, index).is_file(), license, name)

    @property
    def is_local(self) -> bool:
        """Whether it was loaded from this machine, where nobody else finds it."""
        return bool(self.name) and self.hub_ids != [self.name]

    def for_the_public(self) -> "BaseModel":
        """The same without a path of this machine."""
        return replace(self, name=Path(self.name).name, is_loadable=False) if self.is_local else self

    @property
    def text(self) -> str:
        """The base in a sentence."""
        if self.hub_ids == [self.name]:
            return hub_link(self.name)
        if self.hub_ids:
            return f"{code(self.name)}, a local model derived from {' and '.join(map(hub_link, self.hub_ids))}"
        return f"the local model {code(self.name)}" if self.name else f"a `{self.architecture}` built in memory"


def _license(metadata: dict) -> dict[str, str]:
    keys = ("license", "license_name", "license_link")
    license = {key: one_line(metadata[key]) for key in keys if isinstance(metadata.get(key), str)}
    return license if "license" in license else {}


@dataclass(frozen=True)
class TrainingData:
    """
    Known facts about the training data.

    Attributes:
        hub_ids (`list[str]`):
            Datasets on the Hub.
        others (`list[str]`):
            Markdown about each part that is not a dataset on the Hub.
        split (`str`):
            Its split, if it has one.
        rows (`int`, *optional*):
            Number of rows after preparation; `None` for a stream.
        unit (`str`):
            Name of a row's content: a method that samples its own pairs trains on prompts.
    """

    hub_ids: list[str]
    others: list[str]
    split: str
    rows: int | None
    unit: str = "pairs"

    @classmethod
    def of(cls, dataset, names: str | Iterable[str] | None = None, is_public: bool = False) -> "TrainingData":
        """Describes the data by the `names` given to the card, or else by what the dataset itself records."""
        rows = len(dataset) if hasattr(dataset, "__len__") else None
        split = str(getattr(dataset, "split", None) or "")
        names = [names] if isinstance(names, str) else names or []
        names = list(dict.fromkeys(name for name in names if name))
        if all(name in _FORMATS for name in names):
            return cls([], [_recorded_source(dataset)], split, rows, unit_of(dataset))
        hub_ids = [name for name in names if "/" in name and is_hub_id(name)]
        # A format is no dataset, but where it is a part of several its files are not to be passed over.
        others = [
            _files(name) if name in _FORMATS else code(public_name(name) if is_public else name)
            for name in names
            if name not in hub_ids
        ]
        return cls(hub_ids, others, split, rows, unit_of(dataset))

    @property
    def text(self) -> str:
        """The data in a sentence."""
        what = " and ".join([*(hub_link(hub_id, "datasets/") for hub_id in self.hub_ids), *self.others])
        facts = [f"{self.rows:,} {self.unit}"] if self.rows is not None else []
        facts += [f"split {code(self.split)}"] if self.split else []
        return f"{what} ({', '.join(facts)})" if facts else what


def _recorded_source(dataset) -> str:
    info = getattr(dataset, "info", None)
    builder, name = (getattr(info, key, None) or "" for key in ("builder_name", "dataset_name"))
    if builder in _FORMATS:
        # Named after the folder or the repository it was loaded from, or after the builder if from single files.
        return _files(builder) if name == builder else f"{code(name)} ({_files(builder)})"
    if builder:
        return code(name or builder)
    if getattr(dataset, "cache_files", None):
        return "a dataset combined from several sources"
    return "a dataset built in memory" if hasattr(dataset, "__len__") else "a streamed dataset"


def _files(builder: str) -> str:
    return f"{builder.upper() if len(builder) <= 4 else builder} files"


def _parts(dataset) -> list:
    return list(dataset.values()) if isinstance(dataset, dict) else [dataset]


def unit_of(dataset) -> str:
    """Name of the rows' content in a prepared dataset, or in several."""
    stated = {str(getattr(part, "unit", "")) for part in _parts(dataset)}
    if len(stated) == 1 and "" not in stated:
        return stated.pop()
    columns = [set(getattr(part, "column_names", None) or ()) for part in _parts(dataset)]
    has_prompts = ["prompt_ids" in names and "chosen_ids" not in names for names in columns]
    return "pairs" if not any(has_prompts) else "prompts" if all(has_prompts) else "rows"


def describe_rows(dataset) -> str:
    """Number and content of the rows of a dataset, or of several; empty if they are not known."""
    if dataset is None or not all(hasattr(part, "__len__") for part in _parts(dataset)):
        return ""
    return f"{sum(getattr(part, 'num_rows', len(part)) for part in _parts(dataset)):,} {unit_of(dataset)}"


# ---- What was trained ----------------------------------------------------------------------------------------------


def describe_adapter(config) -> tuple[str, str]:
    """Kind of an adapter and its settings, from its PEFT configuration; two empty texts for `None`."""
    if config is None:
        return "", ""
    kind = getattr(config.peft_type, "value", str(config.peft_type))
    if kind == "LORA":
        kind = "DoRA" if config.use_dora else "LoRA"
    facts = {
        "rank": getattr(config, "r", None),
        "alpha": getattr(config, "lora_alpha", None),
        "dropout": getattr(config, "lora_dropout", None),
        "rank-stabilized scaling": getattr(config, "use_rslora", False) or None,
    }
    texts = [f"{name} {value_text(value)}" for name, value in facts.items() if value is not None]
    for name, option in (
        ("target modules", "target_modules"),
        ("target parameters", "target_parameters"),
        ("modules trained in full", "modules_to_save"),
    ):
        if modules := getattr(config, option, None):
            texts.append(f"{name} {code(modules if isinstance(modules, str) else _summarize_modules(modules))}")
    return kind, ", ".join(texts)


def _summarize_modules(names: Iterable[str]) -> str:
    """
    Names of layers; of paths, which PEFT lists for `all-linear` in some models, the different ends and how many there
    are.
    """
    names = sorted(names)
    if not any("." in name for name in names):
        return ", ".join(names)
    return f"{', '.join(sorted({name.rsplit('.', 1)[-1] for name in names}))} ({len(names)} modules)"


def quantization_of(model) -> dict[str, Any]:
    config = getattr(model.config, "quantization_config", None) or {}
    return dict(config if isinstance(config, dict) else config.to_dict())


def describe_quantization(model) -> str:
    values = quantization_of(model)
    if values.get("load_in_4bit"):
        dtype = value_text(values.get("bnb_4bit_compute_dtype", "float32"))
        double = ", double quantization" if values.get("bnb_4bit_use_double_quant") else ""
        return f"4-bit {str(values.get('bnb_4bit_quant_type', 'fp4')).upper()}{double}, computing in {dtype}"
    return "8-bit LLM.int8()" if values.get("load_in_8bit") else value_text(values.get("quant_method", ""))


# ---- How -----------------------------------------------------------------------------------------------------------


def own_options(trainer, names: Iterable[str]) -> dict[str, str]:
    """Options `names` of the method as they were resolved, without those that are unset or could be secret."""
    values = {name: getattr(trainer.args, name) for name in names if not is_secret_name(name)}
    values.update(trainer.resolved_hyperparameters())
    shown = {name: without_secrets(None, value, "<HIDDEN>") for name, value in values.items()}
    return {name: code(value_text(value)) for name, value in shown.items() if value is not None}


def describe_optimization(trainer, unit: str = "pairs") -> dict[str, str]:
    """Optimizer, schedule and batch, by their names in the table; empty where there is nothing to say."""
    args, state = trainer.args, trainer.state
    optimizer_given, scheduler_given = getattr(trainer, "_given_optimizers", (False, False))
    optimizer = getattr(trainer.optimizer, "optimizer", trainer.optimizer)  # out of accelerate's wrapper
    rate = optimizer.defaults.get("lr") if optimizer_given else args.learning_rate
    rows = {"learning rate": "" if rate is None else f"{rate:g}"}
    if optimizer_given:
        rows["optimizer"] = f"{type(optimizer).__name__}, given by the user"
    else:
        rows["optimizer"] = f"{value_text(args.optim)}, weight decay {args.weight_decay:g}"
        if "adam" in rows["optimizer"]:
            rows["optimizer"] += f", betas ({args.adam_beta1:g}, {args.adam_beta2:g}), epsilon {args.adam_epsilon:g}"
    if scheduler_given:
        scheduler = getattr(trainer.lr_scheduler, "scheduler", trainer.lr_scheduler)
        rows["learning rate schedule"] = f"{type(scheduler).__name__}, given by the user"
    else:
        rows["learning rate schedule"] = value_text(args.lr_scheduler_type)
        warmup = args.get_warmup_steps(state.max_steps) if state.max_steps > 0 else args.warmup_steps
        steps = "of the steps" if 0 < warmup < 1 else "step" if warmup == 1 else "steps"
        rows["warmup"] = f"{warmup:g} {steps}"
    rows["gradient clipping"] = f"{args.max_grad_norm:g}" if args.max_grad_norm else ""
    is_by_steps = args.max_steps > 0
    rows["steps" if is_by_steps else "epochs"] = f"{args.max_steps:,}" if is_by_steps else f"{args.num_train_epochs:g}"
    processes = f"{args.world_size} processes" if args.world_size > 1 else "1 process"
    processes += f" with {args.n_gpu} devices each" if args.n_gpu > 1 else ""
    rows[f"{unit} per step"] = (
        f"{trainer.get_total_train_batch_size(args)} ({trainer._train_batch_size // max(1, args.n_gpu)} per device x "
        f"{args.gradient_accumulation_steps} accumulated x {processes})"
    )
    return rows


def describe_precision(args, trained: torch.dtype) -> dict[str, str]:
    autocast = "bf16 autocast" if args.bf16 else "fp16 autocast" if args.fp16 else "no autocast"
    return {
        "precision": f"trained weights in {value_text(trained)}, {autocast}",
        "seed": f"{args.seed}" + (f", data {args.data_seed}" if args.data_seed is not None else ""),
    }


def describe_status(trainer) -> str:
    """A sentence on how far training has come, empty if it ran to its end."""
    state, args = trainer.state, trainer.args
    if state.global_step == 0:
        return "It has not been trained yet: the weights are those that training starts from."
    epoch = f" (epoch {state.epoch:.3g})" if state.epoch is not None else ""
    at = f"step {state.global_step:,} of {state.max_steps:,}{epoch}"
    if _has_best_weights(trainer):
        best, metric, value = state.best_global_step, args.metric_for_best_model, state.best_metric
        scored = f" ({code(metric)} {number(value)})" if metric and value is not None else ""
        where = f"at step {best:,}" if best else "before training"
        return f"Training ran to {at}. The weights are those {where}, the best by evaluation{scored}."
    if state.global_step < state.max_steps:
        return f"This is a checkpoint, saved at {at}." if trainer.is_in_train else f"Training ended early, at {at}."
    return ""


def _has_best_weights(trainer) -> bool:
    # `Trainer` loads the best checkpoint as the last act of training.
    state = trainer.state
    return bool(trainer.args.load_best_model_at_end and state.best_model_checkpoint and not trainer.is_in_train)


# ---- Results and run -----------------------------------------------------------------------------------------------


def results_of(trainer) -> dict[str, list]:
    """Titles of the columns and rows of the table of metrics; empty before the first log."""
    history, columns = trainer.state.log_history, []
    train_log = next((log for log in reversed(history) if "loss" in log), None)
    if train_log:
        columns.append((f"Training, step {train_log['step']:,}", _metrics(train_log)))
    names = list(trainer.eval_dataset) if isinstance(getattr(trainer, "eval_dataset", None), dict) else []
    for name in ["", *names]:
        prefix = f"eval_{name}_" if name else "eval_"
        logs = [log for log in history if f"{prefix}loss" in log]
        if _has_best_weights(trainer):
            logs = [log for log in logs if log["step"] <= trainer.state.best_global_step] or logs
        shown = [logs[0]] if len(logs) > 1 and logs[0]["step"] == 0 else []  # what training started from
        for log in shown + logs[-1:]:
            title = f"Evaluation{f' on {plain(name)}' if name else ''}, step {log['step']:,}"
            columns.append((title, _metrics(log, prefix)))
    keys = list(dict.fromkeys(key for _, metrics in columns for key in metrics))
    keys.sort(key=lambda key: (_FIRST_METRICS.index(key) if key in _FIRST_METRICS else len(_FIRST_METRICS), key))
    return {
        "titles": [title for title, _ in columns],
        "rows": [(key, [number(metrics[key]) if key in metrics else "" for _, metrics in columns]) for key in keys],
    }


def _metrics(log: dict, prefix: str = "") -> dict[str, float]:
    # TRL's own keys carry `eval_` only, whichever the evaluation set.
    named = {key.removeprefix(prefix).removeprefix("eval_" if prefix else ""): value for key, value in log.items()}
    return {
        name: value
        for name, value in named.items()
        if isinstance(value, (int, float)) and not _LEFT_OUT_METRICS.fullmatch(name)
    }


def rows_seen(trainer) -> str:
    """Rows that the steps so far have trained on. The last batch of an epoch of pairs may be short."""
    args, steps, dataset = trainer.args, trainer.state.global_step, trainer.train_dataset
    per_step = trainer.get_total_train_batch_size(args)
    rows = steps * per_step
    if hasattr(dataset, "__len__") and unit_of(dataset) == "pairs":
        per_batch = per_step // args.gradient_accumulation_steps
        per_epoch = len(dataset) // per_batch * per_batch if args.dataloader_drop_last else len(dataset)
        steps_of_epoch = max(1, math.ceil(per_epoch / per_step))
        rows = steps // steps_of_epoch * per_epoch + steps % steps_of_epoch * per_step
    return f"{rows:,} in {steps:,} steps"


def run_facts(trainer, unit: str = "pairs") -> dict[str, str]:
    """What the run consumed and ran on."""
    args, state, facts = trainer.args, trainer.state, {}
    if state.global_step:
        facts[f"{unit.capitalize()} seen"] = rows_seen(trainer)
    if trainer._progress.num_tokens:
        facts["Tokens seen"] = f"{trainer._progress.num_tokens:,}, without padding"
    # `train_runtime` of a resumed run is that of its last part.
    runtime = trainer._progress.elapsed
    if runtime and any("train_runtime" in log for log in state.log_history):
        facts["Training time"] = f"{timedelta(seconds=round(runtime))} (h:mm:ss)" if runtime >= 1 else "under a second"
    device = trainer.accelerator.device
    backend: Any = getattr(torch, device.type, None)
    if device.type == "cpu":
        hardware = f"CPU ({platform.machine()})"
    else:
        name = backend.get_device_name(device) if hasattr(backend, "get_device_name") else device.type.upper()
        hardware = f"{args.world_size * max(1, args.n_gpu)} x {name}"
    distributed = trainer.accelerator.distributed_type
    facts["Hardware"] = hardware + (f", {distributed.value}" if distributed != DistributedType.NO else "")
    return facts


def tracker_urls() -> dict[str, str]:
    urls = {"Comet": get_comet_experiment_url(), "Trackio": get_trackio_space_url()}
    wandb: Any = sys.modules.get("wandb")  # a run exists only if somebody has imported it
    if getattr(wandb, "run", None) is not None:
        urls["Weights & Biases"] = wandb.run.url
    return {name: url for name, url in urls.items() if url}


def versions_of(packages: Iterable[str]) -> dict[str, str]:
    # `torch.__version__` says which build; the metadata of some wheels does not.
    found = {name: torch.__version__ if name == "torch" else importlib.metadata.version(name) for name in packages}
    return {"trl_ext": __version__, **found, "Python": platform.python_version()}
