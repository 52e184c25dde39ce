"""
The model card: what was trained from what, on what, how, with which versions, and how it measured.

Everything on it is read from the trainer, its state and the files beside it. What is not known is left out: a card
that claims a base model or data set which does not exist is worse than a short one. Values of options are written only
for those listed here and for the method's own, so no token, path or command line gets out by accident.
"""

import dataclasses
import importlib.metadata
import json
import math
import os
import platform
import re
import sys
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import Any

import datasets
import jinja2
import torch
import yaml
from accelerate.utils import DistributedType, is_peft_model
from datasets.naming import camelcase_to_snakecase
from datasets.packaged_modules import _PACKAGED_DATASETS_MODULES
from huggingface_hub import ModelCardData, constants, try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from .._trl import get_comet_experiment_url, get_config_model_id, get_trackio_space_url
from .._version import __version__
from .preference_config import PreferenceConfig


_TEMPLATE = Path(__file__).with_name("model_card_template.md")

# Metrics that say how the run went rather than what came out of it; the trackers have them.
_LEFT_OUT_METRICS = re.compile(
    r"(epoch|step|learning_rate|grad_norm|num_tokens|entropy|aux_loss|mean_token_accuracy|total_flos|"
    r"(logits|logps|logratios)/.*|.*(runtime|samples_per_second|steps_per_second|model_preparation_time))"
)
_FIRST_METRICS = ("loss", "rewards/accuracies", "rewards/margins", "rewards/chosen", "rewards/rejected")
_SECRET_OPTION = re.compile(r"(token|key|secret|password)$")


def create_model_card(trainer, folder, model_name=None, dataset_name=None, tags=None, render=None) -> None:
    """
    Writes `folder/README.md`.

    What a caller says once (a name, the data, tags) also holds for the cards written later without it: Transformers
    and TRL write one at every checkpoint and again before a push, and only the push hands these on.

    Args:
        trainer ([`PreferenceTrainer`]):
            The trainer, before, in or after training.
        folder (`str` or `Path`):
            Folder of the card, and of the saved model that it describes.
        model_name (`str`, *optional*):
            Name of the model. Defaults to that of the repository on the Hub, or of the output folder.
        dataset_name (`str`, *optional*):
            Hub id or path of the training data. Defaults to what `datasets` knows of where it came from.
        tags (`str` or `list[str]`, *optional*):
            Tags beside the method's.
        render (`Callable`, *optional*, defaults to [`render_model_card`]):
            From these arguments to the text of the card.
    """
    given = trainer.__dict__.setdefault("_card_details", {})
    given.update({k: v for k, v in {"model_name": model_name, "dataset_name": dataset_name}.items() if v})
    given.setdefault("tags", set()).update([tags] if isinstance(tags, str) else tags or [])

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "README.md").write_text((render or render_model_card)(trainer, folder, **given), encoding="utf-8")


def render_model_card(trainer, folder: Path, model_name=None, dataset_name=None, tags=()) -> str:
    """Text of the card; the arguments are those of [`create_model_card`]."""
    args, model = trainer.args, trainer.accelerator.unwrap_model(trainer.model)
    in_output_dir = folder.resolve() == Path(args.output_dir).resolve()
    base = BaseModel.of(model)
    data = TrainingData.of(trainer.train_dataset, dataset_name)
    data.unit = _unit_of(trainer.train_dataset)
    adapter, quantization = _describe_adapter(model), _describe_quantization(model)
    repo_id = trainer.hub_model_id or args.hub_model_id
    model_name = model_name or (repo_id or Path(args.output_dir).resolve().name).split("/")[-1]
    # A repository holds what the output folder holds; other folders, such as checkpoints, are only here.
    model_id = trainer.hub_model_id if in_output_dir and trainer.hub_model_id else folder.as_posix()
    is_vision = getattr(trainer, "_is_vlm", False)

    card_data = ModelCardData(
        base_model=base.hub_ids[0] if len(base.hub_ids) == 1 else base.hub_ids or None,
        datasets=data.hub_ids or None,
        library_name="peft" if adapter else "transformers",
        license=base.license.get("license"),
        license_name=base.license.get("license_name"),
        license_link=base.license.get("license_link"),
        model_name=model_name,
        pipeline_tag="image-text-to-text" if is_vision else "text-generation",
        tags=_tags(trainer, model, adapter, tags),
    )
    context = {
        "card_data": card_data.to_yaml(),
        "model_name": model_name,
        "model_id": json.dumps(model_id, ensure_ascii=False),  # quoted, as in Python
        "method": trainer._name,
        "trainer_class": type(trainer).__name__,
        "paper": {"id": "", "title": trainer._name, "citation": "", **(trainer._paper or {})},
        "base": base,
        "data": data,
        "eval_rows": _rows_of(getattr(trainer, "eval_dataset", None)),
        "eval_unit": _unit_of(getattr(trainer, "eval_dataset", None)),
        "adapter": adapter,
        "adaptation": _adaptation(adapter, quantization),
        "quantization": quantization,
        "is_vision": is_vision,
        "is_chat": bool(getattr(trainer.processing_class, "chat_template", "")),
        "trust": ", trust_remote_code=True" if args.trust_remote_code else "",
        "is_trained": trainer.state.global_step > 0,
        "status": _status(trainer),
        "results": _results(trainer),
        "hyperparameters": _hyperparameters(trainer, model),
        "run": _run_facts(trainer),
        "trackers": _trackers(),
        "versions": _versions(trainer, model),
    }
    return _template().render(**context)


@cache
def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True, undefined=jinja2.StrictUndefined
    )
    environment.filters["cell"] = _cell
    return environment.from_string(_TEMPLATE.read_text(encoding="utf-8"))


# ---- The base model ------------------------------------------------------------------------------------------------


def is_hub_id(name) -> bool:
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
        text = Path(readme).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return {}
    match = re.match(r"\s*---[ \t]*\r?\n(.*?)\r?\n---[ \t]*(\r?\n|$)", text, flags=re.DOTALL)
    try:
        metadata = yaml.safe_load(match.group(1)) if match else {}
    except yaml.YAMLError:
        return {}
    return metadata if isinstance(metadata, dict) else {}


@dataclass
class BaseModel:
    """
    Where the trained weights started.

    Attributes:
        name (`str`):
            Hub id or path the model was loaded from; empty for a model built in memory.
        architecture (`str`):
            Class of the model.
        hub_ids (`list[str]`):
            The nearest ancestors on the Hub: `name` itself, or those that a local folder's card names.
        is_loadable (`bool`):
            Whether `from_pretrained(name)` finds the model.
        license (`dict[str, str]`):
            The licence keys of the base's card, where there is a card on this machine.
    """

    name: str
    architecture: str
    hub_ids: list[str]
    is_loadable: bool
    license: dict[str, str]

    @classmethod
    def of(cls, model) -> "BaseModel":
        architecture = type(model.get_base_model() if is_peft_model(model) else model).__name__
        name = get_config_model_id(model.config) or ""
        if is_hub_id(name):
            readme = try_to_load_from_cache(name, "README.md")
            metadata = read_front_matter(readme) if isinstance(readme, str) else {}
            return cls(name, architecture, [name], True, cls._license(metadata))

        # Up the chain of local folders, each of whose cards may name the next.
        hub_ids, licence, folder, seen = [], {}, name, set()
        while folder and os.path.isdir(folder) and os.path.realpath(folder) not in seen:
            seen.add(os.path.realpath(folder))
            metadata = read_front_matter(Path(folder) / "README.md")
            licence = licence or cls._license(metadata)
            ancestors = metadata.get("base_model") or []
            ancestors = [ancestors] if isinstance(ancestors, str) else ancestors
            hub_ids = [ancestor for ancestor in ancestors if is_hub_id(ancestor)]
            folder = "" if hub_ids or len(ancestors) != 1 else str(ancestors[0])
        is_loadable = bool(name) and (Path(name) / "config.json").is_file()
        return cls(name, architecture, hub_ids, is_loadable, licence)

    @property
    def text(self) -> str:
        """The base in a sentence."""
        if self.hub_ids == [self.name]:
            return _hub_link(self.name)
        if self.hub_ids:
            return f"`{self.name}`, a local model derived from {' and '.join(map(_hub_link, self.hub_ids))}"
        if self.name:
            return f"the local model `{self.name}`"
        return f"a `{self.architecture}` built in memory"

    @staticmethod
    def _license(metadata: dict) -> dict[str, str]:
        keys = ("license", "license_name", "license_link")
        licence = {key: metadata[key] for key in keys if isinstance(metadata.get(key), str)}
        return licence if "license" in licence else {}


# ---- The data ------------------------------------------------------------------------------------------------------


@dataclass
class TrainingData:
    """
    What is known of the training data.

    Attributes:
        hub_ids (`list[str]`):
            Datasets on the Hub.
        description (`str`):
            What it is, where that is not a dataset on the Hub.
        split (`str`):
            Its split, if it has one.
        rows (`int`, *optional*):
            Number of rows after preparation; `None` for a stream.
        unit (`str`, *optional*, defaults to `"pairs"`):
            What a row is: a method that samples its own pairs trains on prompts.
    """

    hub_ids: list[str]
    description: str
    split: str
    rows: int | None
    unit: str = "pairs"

    @classmethod
    def of(cls, dataset, name: str | None = None) -> "TrainingData":
        """
        Reads what `datasets` knows; a `name` given by the user goes before it.

        `datasets` keeps no URL. A dataset of the Hub is known by its folder in the cache, `<namespace>___<name>`, with
        the name in snake case; the exact id is the matching repository in the Hub's cache, if there is one.
        """
        rows = len(dataset) if isinstance(dataset, datasets.Dataset) else None
        split = str(getattr(dataset, "split", None) or "")
        if name and "/" in name and is_hub_id(name):
            return cls([name], "", split, rows)
        if name and name not in _PACKAGED_DATASETS_MODULES:
            return cls([], f"`{name}`", split, rows)

        files = [Path(file["filename"]) for file in getattr(dataset, "cache_files", None) or []]
        cached = {part for file in files for part in file.parts if re.fullmatch(r"[\w.-]+?___[\w.-]+", part)}
        hub_ids = {part: cls._hub_id(part) for part in sorted(cached)}
        if hub_ids and all(hub_ids.values()):
            return cls(list(hub_ids.values()), "", split, rows)
        if hub_ids:
            return cls([], " and ".join(f"`{part.replace('___', '/')}`" for part in hub_ids), split, rows)

        saved = [file.parent for file in files if (file.parent / "state.json").is_file()]
        if saved:
            return cls([], f"`{saved[0].name}`, a dataset saved to disk", split, rows)
        info = getattr(dataset, "info", None)
        builder, dataset_name = getattr(info, "builder_name", None), getattr(info, "dataset_name", None)
        if builder in _PACKAGED_DATASETS_MODULES:
            # Named after the folder it was loaded from, or after the builder if from single files.
            files_of = f"{builder.upper() if len(builder) <= 4 else builder} files"
            return cls([], files_of if dataset_name == builder else f"`{dataset_name}` ({files_of})", split, rows)
        if builder:
            return cls([], f"`{dataset_name or builder}`", split, rows)
        if files:
            return cls([], "a dataset combined from several sources", split, rows)
        if rows is None:
            return cls([], "a streamed dataset", split, rows)
        return cls([], "a dataset built in memory", split, rows)

    @property
    def text(self) -> str:
        """The data in a sentence."""
        what = " and ".join(_hub_link(hub_id, "datasets/") for hub_id in self.hub_ids) or self.description
        facts = [
            f"{self.rows:,} {self.unit}" if self.rows is not None else "",
            f"split `{self.split}`" if self.split else "",
        ]
        facts = ", ".join(fact for fact in facts if fact)
        return f"{what} ({facts})" if facts else what

    @staticmethod
    def _hub_id(cached: str) -> str:
        namespace, name = cached.split("___", 1)
        prefix = f"datasets--{namespace}--"
        repositories = (folder.name[len(prefix) :] for folder in Path(constants.HF_HUB_CACHE).glob(prefix + "*"))
        matches = [repository for repository in repositories if camelcase_to_snakecase(repository) == name]
        return f"{namespace}/{matches[0]}" if len(matches) == 1 else ""


def _unit_of(dataset) -> str:
    """What the rows of a prepared dataset, or of all of several, are."""
    parts = list(dataset.values()) if isinstance(dataset, dict) else [dataset]
    columns = [set(getattr(part, "column_names", None) or ()) for part in parts]
    has_prompts = ["prompt_ids" in names and "chosen_ids" not in names for names in columns]
    if any(has_prompts):
        return "prompts" if all(has_prompts) else "rows"
    return "pairs"


def _rows_of(dataset) -> int | None:
    """Rows of an evaluation dataset, or of all of several."""
    parts = list(dataset.values()) if isinstance(dataset, dict) else [dataset]
    if not parts or not all(isinstance(part, datasets.Dataset) for part in parts):
        return None
    return sum(len(part) for part in parts)


# ---- What was trained ----------------------------------------------------------------------------------------------


def _describe_adapter(model) -> dict[str, Any]:
    """Name and settings of the trained adapter; empty under full fine-tuning."""
    if not is_peft_model(model):
        return {}
    return _describe_peft_config(model.peft_config[getattr(model, "active_adapter", "default")])


def _describe_peft_config(config) -> dict[str, Any]:
    kind = getattr(config.peft_type, "value", str(config.peft_type))
    if kind == "LORA":
        kind = "DoRA" if config.use_dora else "LoRA"
    targets = getattr(config, "target_modules", None)
    facts = {
        "rank": getattr(config, "r", None),
        "alpha": getattr(config, "lora_alpha", None),
        "dropout": getattr(config, "lora_dropout", None),
        "rank-stabilised scaling": getattr(config, "use_rslora", False) or None,
        "target modules": targets if isinstance(targets, str) else sorted(targets or []),
        "target parameters": sorted(getattr(config, "target_parameters", None) or []),
        "modules trained in full": sorted(getattr(config, "modules_to_save", None) or []),
    }
    return {"kind": kind, "facts": {key: _value(value) for key, value in facts.items() if value not in (None, [])}}


def _quantization(model) -> dict[str, Any]:
    config = getattr(model.config, "quantization_config", None) or {}
    values = dict(config if isinstance(config, dict) else config.to_dict())
    if "quant_method" in values:
        values["quant_method"] = _value(values["quant_method"])
    return values


def _describe_quantization(model) -> str:
    values = _quantization(model)
    if values.get("load_in_4bit"):
        dtype = str(values.get("bnb_4bit_compute_dtype", "float32")).removeprefix("torch.")
        double = ", double quantisation" if values.get("bnb_4bit_use_double_quant") else ""
        return f"4-bit {str(values.get('bnb_4bit_quant_type', 'fp4')).upper()}{double}, computing in {dtype}"
    if values.get("load_in_8bit"):
        return "8-bit LLM.int8()"
    return values.get("quant_method", "")


def _adaptation(adapter: dict, quantization: str) -> str:
    if not adapter:
        return "full fine-tuning"
    return f"{'Q' if quantization and adapter['kind'] in ('LoRA', 'DoRA') else ''}{adapter['kind']}"


def _parameters(trainer, model) -> str:
    if trainer.is_fsdp_enabled:
        return ""  # a process sees its own shard only
    if is_peft_model(model):
        trainable, total = model.get_nb_trainable_parameters()
    else:
        sizes = [(getattr(p, "ds_numel", p.numel()), p.requires_grad) for p in model.parameters()]
        trainable, total = sum(n for n, grad in sizes if grad), sum(n for n, _ in sizes)
    return f"{trainable:,} of {total:,} ({trainable / total:.2%})" if trainable < total else f"{total:,}"


# ---- How -----------------------------------------------------------------------------------------------------------


def _hyperparameters(trainer, model) -> dict[str, str]:
    """Rows of the table: the method's own first, then what every run is reproduced by."""
    args = trainer.args
    rows = {name: f"`{_value(value)}`" for name, value in _method_hyperparameters(trainer).items()}
    rows["reference"] = _describe_reference(trainer)
    rows.update(_optimization(trainer))
    if args.max_length is None:
        rows["maximum length"] = "no limit"
    else:
        rows["maximum length"] = f"{args.max_length} tokens (`{args.truncation_mode}`)"
    rows.update(_precision(args, next((p.dtype for p in model.parameters() if p.requires_grad), model.dtype)))
    rows["trained parameters"] = _parameters(trainer, model)
    return {name: value for name, value in rows.items() if value}


def _optimization(trainer) -> dict[str, str]:
    """Optimizer, schedule and batch."""
    args, state, rows = trainer.args, trainer.state, {}
    optimizer_given, scheduler_given = getattr(trainer, "_given_optimizers", (False, False))
    optimizer = getattr(trainer.optimizer, "optimizer", trainer.optimizer)  # out of accelerate's wrapper
    if optimizer_given:
        rows["learning rate"] = f"{optimizer.defaults['lr']:g}" if "lr" in optimizer.defaults else ""
        rows["optimizer"] = f"{type(optimizer).__name__}, given by the user"
    else:
        rows["learning rate"] = f"{args.learning_rate:g}"
        rows["optimizer"] = f"{_value(args.optim)}, weight decay {args.weight_decay:g}"
        if "adam" in rows["optimizer"]:
            rows["optimizer"] += f", betas ({args.adam_beta1:g}, {args.adam_beta2:g}), epsilon {args.adam_epsilon:g}"
    if scheduler_given:
        scheduler = getattr(trainer.lr_scheduler, "scheduler", trainer.lr_scheduler)
        rows["learning rate schedule"] = f"{type(scheduler).__name__}, given by the user"
    else:
        rows["learning rate schedule"] = _value(args.lr_scheduler_type)
        warmup = args.get_warmup_steps(state.max_steps) if state.max_steps > 0 else args.warmup_steps
        rows["warmup"] = f"{warmup:g} steps" if warmup >= 1 or not warmup else f"{warmup:g} of the steps"
    rows["gradient clipping"] = f"{args.max_grad_norm:g}" if args.max_grad_norm else ""

    if args.max_steps > 0:
        rows["steps"] = f"{args.max_steps:,}"
    else:
        rows["epochs"] = f"{args.num_train_epochs:g}"
    processes = f"{args.world_size} processes" if args.world_size > 1 else "1 process"
    processes += f" with {args.n_gpu} devices each" if args.n_gpu > 1 else ""
    per_device = trainer._train_batch_size // max(1, args.n_gpu)
    rows["pairs per step"] = (
        f"{trainer.get_total_train_batch_size(args)} ({per_device} per device x "
        f"{args.gradient_accumulation_steps} accumulated x {processes})"
    )
    return rows


def _precision(args, trained: torch.dtype) -> dict[str, str]:
    autocast = "bf16 autocast" if args.bf16 else "fp16 autocast" if args.fp16 else "no autocast"
    return {
        "precision": f"trained weights in {_value(trained)}, {autocast}",
        "seed": f"{args.seed}" + (f", data {args.data_seed}" if args.data_seed is not None else ""),
    }


def _method_hyperparameters(trainer) -> dict[str, Any]:
    """What the method's configuration adds to the shared one, beta if the method has one, and what was resolved."""
    config_class = type(trainer.args)
    shared = {field.name for field in dataclasses.fields(PreferenceConfig)}
    names = ["beta"] if "beta" not in config_class.refused_options() else []
    names += [field.name for field in dataclasses.fields(config_class) if field.name not in shared]
    values = {name: getattr(trainer.args, name) for name in names if not _SECRET_OPTION.search(name)}
    values.update(trainer.resolved_hyperparameters())
    return {name: value for name, value in values.items() if value is not None}


def _describe_reference(trainer) -> str:
    if not trainer.needs_reference:
        return "not used"
    how = ", log-probabilities precomputed" if trainer.precompute_ref_logps else ""
    if trainer.args.sync_ref_model:
        how += f", synchronised every {trainer.args.ref_model_sync_steps} steps"
    if trainer.reference_config is not None:
        name = get_config_model_id(trainer.reference_config)
        return (f"`{name}`" if name else "a separate model") + ", frozen" + how
    if is_peft_model(trainer.model):
        started = "a frozen copy of the adapter that training started from"
        return (started if "ref" in trainer.model.peft_config else "the base model, without the adapter") + how
    return "the model that training started from" + how


def _status(trainer) -> str:
    """A sentence on how far training has come, empty if it ran to its end."""
    state, args = trainer.state, trainer.args
    if state.global_step == 0:
        return "It has not been trained yet: the weights are those that training starts from."
    epoch = f" (epoch {state.epoch:.3g})" if state.epoch is not None else ""
    at = f"step {state.global_step:,} of {state.max_steps:,}{epoch}"
    if _has_best_weights(trainer):
        best, metric, value = state.best_global_step, args.metric_for_best_model, state.best_metric
        scored = f" (`{metric}` {_number(value)})" if metric and value is not None else ""
        where = f"at step {best:,}" if best else "before training"
        return f"Training ran to {at}. The weights are those {where}, the best by evaluation{scored}."
    if state.global_step < state.max_steps:
        return f"This is a checkpoint, saved at {at}." if trainer.is_in_train else f"Training ended early, at {at}."
    return ""


def _has_best_weights(trainer) -> bool:
    # `Trainer` loads the best checkpoint as the last act of training.
    state = trainer.state
    return bool(trainer.args.load_best_model_at_end and state.best_model_checkpoint and not trainer.is_in_train)


# ---- How it measured -----------------------------------------------------------------------------------------------


def _results(trainer) -> dict[str, list]:
    """Columns and rows of the table of metrics; empty before the first log."""
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
            title = f"Evaluation{f' on {name}' if name else ''}, step {log['step']:,}"
            columns.append((title, _metrics(log, prefix)))

    keys = list(dict.fromkeys(key for _, metrics in columns for key in metrics))
    keys.sort(key=lambda key: (_FIRST_METRICS.index(key) if key in _FIRST_METRICS else len(_FIRST_METRICS), key))
    return {
        "titles": [title for title, _ in columns],
        "rows": [(key, [_number(metrics[key]) if key in metrics else "" for _, metrics in columns]) for key in keys],
    }


def _metrics(log: dict, prefix: str = "") -> dict[str, float]:
    metrics = {}
    for key, value in log.items():
        # TRL's own keys carry `eval_` only, whichever the evaluation set.
        name = key.removeprefix(prefix).removeprefix("eval_" if prefix else "")
        if isinstance(value, (int, float)) and not _LEFT_OUT_METRICS.fullmatch(name):
            metrics[name] = value
    return metrics


def _run_facts(trainer) -> dict[str, str]:
    """What the run consumed and ran on."""
    args, state = trainer.args, trainer.state
    facts = {}
    if state.global_step:
        rows = len(trainer.train_dataset) if hasattr(trainer.train_dataset, "__len__") else None
        per_step = trainer.get_total_train_batch_size(args)
        pairs = state.global_step * per_step
        if rows is not None and _unit_of(trainer.train_dataset) == "pairs":
            # The last batch of an epoch may be short.
            per_batch = per_step // args.gradient_accumulation_steps
            per_epoch = rows // per_batch * per_batch if args.dataloader_drop_last else rows
            steps = max(1, math.ceil(per_epoch / per_step))
            pairs = state.global_step // steps * per_epoch + state.global_step % steps * per_step
        facts["Pairs seen"] = f"{pairs:,} in {state.global_step:,} steps"
    if trainer._progress.num_tokens:
        facts["Tokens seen"] = f"{trainer._progress.num_tokens:,}, without padding"
    runtime = next((log["train_runtime"] for log in reversed(state.log_history) if "train_runtime" in log), None)
    if runtime:
        facts["Training time"] = f"{timedelta(seconds=round(runtime))} (h:mm:ss)" if runtime >= 1 else "under a second"
    device = trainer.accelerator.device
    if device.type == "cpu":
        hardware = f"CPU ({platform.machine()})"
    else:
        backend = getattr(torch, device.type, None)
        name = backend.get_device_name(device) if hasattr(backend, "get_device_name") else device.type.upper()
        hardware = f"{args.world_size * max(1, args.n_gpu)} x {name}"
    distributed = trainer.accelerator.distributed_type
    facts["Hardware"] = hardware + (f", {distributed.value}" if distributed != DistributedType.NO else "")
    return facts


def _trackers() -> dict[str, str]:
    urls = {"Comet": get_comet_experiment_url(), "Trackio": get_trackio_space_url()}
    wandb = sys.modules.get("wandb")  # a run exists only if somebody has imported it
    if getattr(wandb, "run", None) is not None:
        urls["Weights & Biases"] = wandb.run.url
    return {name: url for name, url in urls.items() if url}


def _versions(trainer, model) -> dict[str, str]:
    packages = ["trl", "transformers"]
    packages += ["peft"] if is_peft_model(model) else []
    packages += ["torch", "accelerate", "datasets", "tokenizers"]
    packages += ["bitsandbytes"] if _quantization(model).get("quant_method") == "bitsandbytes" else []
    packages += ["deepspeed"] if trainer.is_deepspeed_enabled else []
    versions = {name: _package_version(name) for name in packages}
    return {"trl_ext": __version__, **versions, "Python": platform.python_version()}


@cache
def _package_version(name: str) -> str:
    if name == "torch":
        return str(torch.__version__)  # says which build; the metadata of some wheels does not
    return importlib.metadata.version(name)


def _tags(trainer, model, adapter: dict, given) -> list[str]:
    tags = ["generated_from_trainer", *trainer._tag_names]
    if adapter:
        tags.append(adapter["kind"].lower())
    if hasattr(model.config, "unsloth_version"):
        tags.append("unsloth")
    if "JOB_ID" in os.environ:
        tags.append("hf_jobs")  # TRL's habit
    url = get_trackio_space_url()
    tags += [f"trackio:{url}"] if url else []
    tags += sorted(tag for tag in given if not (url and tag.startswith("trackio:")))
    return list(dict.fromkeys(tags))


# ---- Formats -------------------------------------------------------------------------------------------------------


def _hub_link(repo_id: str, kind: str = "") -> str:
    return f"[{repo_id}](https://huggingface.co/{kind}{repo_id})"


def _number(value: float) -> str:
    return f"{value:.4g}"


def _value(value) -> str:
    value = getattr(value, "value", value)  # out of an enum
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, (list, tuple, set)):
        return ", ".join(_value(item) for item in value)
    return str(value).removeprefix("torch.")


def _cell(text) -> str:
    """Keeps a text inside its cell of a Markdown table."""
    return " ".join(str(text).split()).replace("|", "\\|")
