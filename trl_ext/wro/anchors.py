"""Anchors: responses of the reference to each prompt, sampled once and kept on disk."""

import contextlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
from accelerate import PartialState
from accelerate.utils import is_peft_model
from datasets import Dataset
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin

from .._checks import at_least, between, check_value
from .._trl import tokenize
from ..training.adapters import use_adapter
from ..training.fingerprints import reference_fingerprint
from ..training.sampling import pack, sample_tokens, unpack
from ..training.sharding import is_sharded
from ..training.tensor_cache import TensorCache
from .wro_config import WROConfig


# Prompts whose anchors are one file of the cache.
_PROMPTS_A_FILE = 16


def add_anchors(
    dataset: Dataset,
    model: PreTrainedModel | PeftModel,
    processing_class: PreTrainedTokenizerBase | ProcessorMixin,
    *,
    num_anchors: int = 4,
    max_completion_length: int = 256,
    batch_size: int = 16,
    seed: int = 42,
    cache_dir: str | Path | None = None,
    column: str = "anchors",
    chat_template_kwargs: dict | None = None,
) -> Dataset:
    """
    Adds a column of reference responses, for [`WinRateReward`].

    Responses are sampled at temperature 1 without truncation, from the model without its adapter, if it has one. An
    anchor depends on the model, the prompt's tokens, `seed` and its number, not on the batch or the process.

    Args:
        dataset ([`~datasets.Dataset`]):
            Prompts, text or messages, in the column `prompt`.
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            The reference, or the policy whose adapter is new.
        processing_class ([`~transformers.PreTrainedTokenizerBase`]):
            The tokenizer.
        num_anchors (`int`, *optional*, defaults to `4`):
            Anchors of each prompt. Any number gives an unbiased win rate; but they stay the same for the whole run,
            and few of them are a target of their own.
        max_completion_length (`int`, *optional*, defaults to `256`):
            Tokens of an anchor at most: that of the training.
        batch_size (`int`, *optional*, defaults to `16`):
            Anchors sampled at once.
        seed (`int`, *optional*, defaults to `42`):
            Seed of the samples.
        cache_dir (`str` or `Path`, *optional*):
            Folder that keeps them. An interrupted run resumes there, and another run of the same reference samples
            nothing.
        column (`str`, *optional*, defaults to `"anchors"`):
            Name of the column.
        chat_template_kwargs (`dict`, *optional*):
            Arguments of the chat template: those of the training.

    Returns:
        [`~datasets.Dataset`] with the column: a list of texts for each prompt, of messages if the prompt is messages.

    Raises:
        `ValueError`: For a dataset without prompts or with a column of that name, a number out of its range, or a
        sharded model.
    """
    check_value("num_anchors", num_anchors, Annotated[int, at_least(1)])
    check_value("max_completion_length", max_completion_length, Annotated[int, at_least(1)])
    check_value("batch_size", batch_size, Annotated[int, at_least(1)])
    check_value("seed", seed, Annotated[int, between(0, 2**63 - 1)])
    if "prompt" not in dataset.column_names:
        raise ValueError(f"`dataset` has no column `prompt`, only {', '.join(dataset.column_names)}.")
    if column in dataset.column_names:
        raise ValueError(
            f"`dataset` already has a column {column!r}. Give `column` another name, or use what it holds with "
            "`anchors='column'`."
        )
    if is_sharded(model):
        raise ValueError(
            "Anchors are sampled by one process, and the reference's weights are sharded over all (FSDP2, DeepSpeed "
            f"ZeRO-3). Train with LoRA under FSDP2, or give a dataset that has the column {column!r}: "
            "`trl_ext.wro.add_anchors` makes it in one process."
        )
    tokenizer = getattr(processing_class, "tokenizer", processing_class)
    prompts = list(dataset["prompt"])
    prompt_ids = [_prompt_ids(processing_class, prompt, chat_template_kwargs or {}) for prompt in prompts]
    cache = TensorCache(cache_dir)
    state = PartialState()
    fingerprint = "" if cache.folder is None else reference_fingerprint(model, None, (), state)
    settings = (num_anchors, max_completion_length, seed)
    texts: list[str] = []
    for start in range(0, len(prompt_ids), _PROMPTS_A_FILE):
        part = prompt_ids[start : start + _PROMPTS_A_FILE]

        def compute(part=part, start=start) -> dict[str, torch.Tensor]:
            rows = [(start + i, number) for i in range(len(part)) for number in range(num_anchors)]
            sampled = sample_tokens(
                model,
                tokenizer,
                [prompt_ids[row] for row, _ in rows],
                [(seed, "anchor", prompt_ids[row], number) for row, number in rows],
                max_new_tokens=max_completion_length,
                batch_size=batch_size,
            )
            return pack(sampled)

        # Every process needs all anchors: the main one samples while the others wait, and then read.
        with state.main_process_first(), _without_adapter(model):
            found = cache(compute, "anchors", fingerprint, settings, part)
        texts += tokenizer.batch_decode(unpack(found), skip_special_tokens=True)
    groups: list[Sequence] = []
    for i, prompt in enumerate(prompts):
        group = texts[i * num_anchors : (i + 1) * num_anchors]
        groups.append(
            group if isinstance(prompt, str) else [[{"role": "assistant", "content": text}] for text in group]
        )
    return dataset.add_column(column, groups)


def with_anchors(dataset: Any, reference: PreTrainedModel | PeftModel, processing_class: Any, args: WROConfig) -> Any:
    """The dataset or datasets of a trainer with anchors of `reference`, unless `args` asks for others."""
    if isinstance(dataset, Mapping):
        return {name: with_anchors(each, reference, processing_class, args) for name, each in dataset.items()}
    if args.anchors != "reference" or not hasattr(dataset, "column_names"):  # None, or the name of a set
        return dataset
    if args.anchor_column in (dataset.column_names or ()):  # it has them
        return dataset
    return add_anchors(
        dataset,
        reference,
        processing_class,
        num_anchors=args.num_anchors,
        max_completion_length=args.max_completion_length,
        batch_size=args.per_device_train_batch_size,
        seed=args.seed,
        cache_dir=args.anchor_cache_dir or Path(args.output_dir) / "anchors",
        column=args.anchor_column,
        chat_template_kwargs=args.chat_template_kwargs,
    )


def _without_adapter(model):
    return use_adapter(model, None) if is_peft_model(model) else contextlib.nullcontext()


def _prompt_ids(processing_class, prompt, chat_template_kwargs: dict) -> list[int]:
    if isinstance(prompt, str):
        return list(tokenize(processing_class, prompt)["input_ids"])
    return list(tokenize(processing_class, prompt, add_generation_prompt=True, **chat_template_kwargs)["input_ids"])
