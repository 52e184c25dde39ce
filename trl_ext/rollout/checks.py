"""Checks of what the trainers of methods that sample are given."""

from collections.abc import Mapping
from typing import Any

import torch
from accelerate.utils import is_peft_model
from datasets import Dataset
from torch import nn

from .._trl import get_config_model_id
from ..training.adapters import check_needs_no_more, check_starts_at_base
from ..training.processes import check_is_split
from ..training.vllm import check_vllm


def check_arguments(args, train_dataset, eval_dataset, trainer_arguments: dict[str, Any]) -> None:
    """Raises `TypeError` or `ValueError` for data and options that do not go together, before a model is loaded."""
    check_is_split(train_dataset)
    splits = eval_dataset if isinstance(eval_dataset, Mapping) else {"eval": eval_dataset}
    for name, dataset in {"train": train_dataset, **splits}.items():
        if dataset is not None:
            check_prompts(dataset, name)
    if isinstance(train_dataset, Dataset):
        check_number_of_prompts(train_dataset, args)
    if eval_dataset is not None:
        args.check_groups(args.per_device_eval_batch_size, args.num_generations_eval or args.num_generations, "eval")
    if args.use_vllm:
        check_vllm(args.vllm_mode, args.device)
    check_tool_options(args, trainer_arguments)


def check_start(model, peft_config, args, *, needs_reference: bool) -> None:
    """Raises `ValueError` for an adapter or a reference that would not be what it is meant to be."""
    check_adapter(model, peft_config)
    if needs_reference:
        check_reference(model, peft_config, is_loaded=args.beta != 0)


def check_prompts(dataset, name: str) -> None:
    """Raises `TypeError` or `ValueError` for a dataset whose rows have no prompts."""
    if not hasattr(dataset, "column_names"):
        raise TypeError(
            f"The {name} dataset must be a `datasets.Dataset` or `IterableDataset`, got a `{type(dataset).__name__}`."
        )
    row = next(iter(dataset), None)
    if row is None:
        raise ValueError(f"The {name} dataset is empty. Give a dataset with at least one row.")
    if "prompt" not in row:
        raise ValueError(
            f"The {name} dataset has no column `prompt`, only {sorted(row)}. Rename the column that holds the prompts "
            "(text or messages)."
        )
    prompt = row["prompt"]
    is_messages = isinstance(prompt, list) and bool(prompt) and all(isinstance(part, Mapping) for part in prompt)
    if not isinstance(prompt, str) and not is_messages:
        raise ValueError(
            f"`prompt` of the {name} dataset's first row is {prompt!r}. A prompt is a string or a list of messages "
            "(`{'role': ..., 'content': ...}`)."
        )


def check_number_of_prompts(dataset: Dataset, args) -> None:
    """Raises `ValueError` if there are fewer prompts than one generation needs: TRL's sampler would yield nothing."""
    prompts = args.generation_batch_size // args.num_generations
    if len(dataset) < prompts:
        raise ValueError(
            f"The train dataset has {len(dataset)} prompts, and {prompts} are generated for at once "
            f"(`generation_batch_size={args.generation_batch_size}` divided by `num_generations="
            f"{args.num_generations}`). Give more prompts, or lower `steps_per_generation` or "
            "`per_device_train_batch_size`."
        )


def check_tool_options(args, trainer_arguments: dict[str, Any]) -> None:
    """Raises `ValueError` for options of tool calls where there are no tools to call."""
    limit = getattr(args, "max_tool_calling_iterations", None)
    if limit is not None and not any(trainer_arguments.get(name) for name in ("tools", "environment_factory")):
        raise ValueError(
            f"`max_tool_calling_iterations={limit!r}` has no effect without tools. Give the trainer `tools` or "
            "`environment_factory`, or leave the option out."
        )


def check_adapter(model, peft_config) -> None:
    """Raises `ValueError` for an adapter that the trainer would not train as it is meant."""
    if peft_config is not None:
        check_needs_no_more(peft_config, is_fresh=True)
    elif not isinstance(model, str) and is_peft_model(model):
        check_needs_no_more(model.active_peft_config, is_fresh=False)


def check_generation_keeps_weights(model: nn.Module, args) -> None:
    """Raises `ValueError` if TRL would round the trained weights, and keep them so, before it generates."""
    cast = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else None
    trained = {p.dtype for p in model.parameters() if p.requires_grad}
    if args.use_transformers_continuous_batching and cast is not None and trained - {cast}:
        kinds = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in trained))
        raise ValueError(
            f"`use_transformers_continuous_batching=True` casts the trained weights ({kinds}) to "
            f"{str(cast).removeprefix('torch.')} for good, in which small updates vanish. Leave it out, or set "
            "`bf16=False` and `fp16=False`."
        )


def check_reference(model, peft_config, is_loaded: bool) -> None:
    """Raises `ValueError` if the reference would not be what training starts from."""
    if peft_config is not None:
        check_starts_at_base(peft_config, is_fresh=True)
    elif not isinstance(model, str) and is_peft_model(model):
        check_starts_at_base(model.active_peft_config, is_fresh=False)
    elif is_loaded and not isinstance(model, str) and not get_config_model_id(model.config):
        raise ValueError(
            f"`model` is a `{type(model).__name__}` that was built in memory, and its reference is loaded by name. "
            "Save it with `save_pretrained` and pass the folder as `model`."
        )


def is_noisy(model: nn.Module, args) -> bool:
    """Whether two forwards of one model in training mode differ."""
    config = getattr(model, "config", None)
    functional = any(getattr(config, name, 0) for name in ("attention_dropout", "attn_pdrop", "resid_pdrop"))
    modules = any(isinstance(module, nn.Dropout) and module.p > 0 for module in model.modules())
    return bool(functional or modules or args.neftune_noise_alpha)
