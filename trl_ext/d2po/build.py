"""Validates D2PO's arguments and builds its sampler and discriminator."""

import dataclasses
from typing import Any

import torch
from accelerate.utils import is_peft_model
from peft import LoraConfig, PeftType

from ..training.vllm import check_vllm
from .d2po_config import D2POConfig
from .discriminator import AdapterMember, Discriminator, ImplicitRewardMember, ModelMember
from .generation import CompletionSampler, VLLMSampler
from .labellers import as_labeller
from .prompts import is_preference_data


def check_arguments(trainer, args, eval_dataset, gold_labeller, discriminator, warm_start) -> None:
    """Raises `ValueError` or `TypeError` for invalid arguments of the trainer, before a model is loaded."""
    if args is None:
        buys_labels, named = True, trainer.config_class.discriminator
    elif not isinstance(args, D2POConfig):
        return  # refused, with a message, by the parent
    else:
        buys_labels, named = args.buys_labels, args.discriminator
    labeller = None if gold_labeller is None else as_labeller(gold_labeller)
    if labeller is None and buys_labels:
        raise ValueError(
            "`gold_labeller` is needed to buy gold labels. Give one, or set `label_budget=0` to train with a fixed "
            "discriminator."
        )
    if labeller is not None and not buys_labels and not labeller.is_free:
        raise ValueError(
            f"`gold_labeller` ({labeller.name}) would never be asked, as no labels are bought (`label_budget=0` or "
            "`labels_per_window=0`). Leave it out, or set a budget."
        )
    if discriminator is not None and named != "adapter":
        raise ValueError(
            f"A discriminator was given to the trainer, and another in `args` (`discriminator={named!r}`). Give one."
        )
    if isinstance(discriminator, str):
        raise TypeError(
            f"`discriminator={discriminator!r}`: the trainer takes objects. Name it in the configuration instead: "
            f"`D2POConfig(discriminator={discriminator!r})`."
        )
    if warm_start is not None and named in ("self", "none"):
        raise ValueError(
            f"`discriminator_dataset` has no effect with `discriminator={named!r}`, which learns from no labels of "
            "its own. Leave it out."
        )
    is_adapter = named == "adapter" and (discriminator is None or isinstance(discriminator, (LoraConfig, list)))
    if not buys_labels and is_adapter and warm_start is None and not _holds_models(discriminator):
        raise ValueError(
            "Without gold labels the discriminator's adapter would never be trained: its scores are all 0 and order "
            "nothing. Give a `discriminator_dataset` to train it on first, a trained model as `discriminator`, or a "
            "`label_budget`."
        )
    for name, dataset in trainer._named_splits(eval_dataset).items():
        columns = next(iter(dataset))
        orders = named != "none" or (labeller is not None and labeller.is_free)
        if not is_preference_data(columns) and not orders:
            raise ValueError(
                f"With `discriminator='none'` and a labeler that is not free, nothing orders the completions of the "
                f"{name} dataset's prompts. Give preference pairs as `eval_dataset`."
            )


def check_engine(trainer, discriminator) -> None:
    """Raises `ValueError` if the discriminator cannot learn, or be loaded, under the trainer's engine."""
    named = trainer.args.discriminator
    if named in ("none", "self"):
        return
    if trainer.is_fsdp_enabled and not trainer.accelerator.is_fsdp2 and (named, discriminator) == ("adapter", None):
        raise ValueError(
            "`discriminator='adapter'` is not supported under FSDP1, which flattens the adapters of a layer into one "
            "parameter, so that they cannot be trained apart. Use FSDP2 (`fsdp_version: 2`)."
        )
    plugin = getattr(trainer.accelerator.state, "deepspeed_plugin", None)
    if plugin is not None and plugin.zero_stage == 3:
        raise ValueError(
            f"`discriminator={named!r}` is not supported under DeepSpeed ZeRO-3, which gathers and reduces only what its "
            "own engine trains: the discriminator's parameters would stay partitioned. Use ZeRO-2 or FSDP2 "
            "(`recipes/accelerate/zero2.yaml`, `fsdp2.yaml`), or `discriminator='self'` or 'none'."
        )


def make_sampler(trainer) -> CompletionSampler | VLLMSampler:
    """Builds the sampler of completions that the trainer's configuration describes."""
    config: D2POConfig = trainer.args
    options: dict[str, Any] = dict(
        max_new_tokens=config.max_completion_length,
        temperature=config.temperature,
        top_p=config.top_p,
        top_k=config.top_k,
        min_p=config.min_p,
        settings=config.generation_kwargs or {},
        batch_size=config.generation_batch_size,
    )
    if not config.use_vllm:
        return CompletionSampler(trainer, trainer._tokenizer, **options)
    check_vllm(config.vllm_mode, config.device)
    vllm_settings = {
        "mode": config.vllm_mode,
        "server_base_url": config.vllm_server_base_url,
        "gpu_memory_utilization": config.vllm_gpu_memory_utilization,
        "tensor_parallel_size": config.vllm_tensor_parallel_size,
        "max_model_length": config.max_length,
        "trust_remote_code": config.trust_remote_code,
    }
    return VLLMSampler(trainer, trainer._tokenizer, vllm_settings=vllm_settings, **options)


def make_discriminator(trainer, given, processing_class) -> Discriminator | None:
    """Builds the discriminator from the trainer's argument or from the name in its configuration."""
    config: D2POConfig = trainer.args
    if config.discriminator == "none":
        return None
    pad_token_id = trainer._tokenizer.pad_token_id
    if given is None and config.discriminator not in ("adapter", "self"):
        given = config.discriminator  # the name of a model
    if config.discriminator == "self":
        if not trainer.needs_reference:
            raise ValueError(
                f"`discriminator='self'` is the log ratio of policy and reference, and `loss={config.loss!r}` has no "
                "reference. Choose another loss or discriminator."
            )
        members: list[Any] = [ImplicitRewardMember(trainer, pad_token_id)]
    elif given is None or isinstance(given, LoraConfig) or (isinstance(given, list) and not _holds_models(given)):
        members = _make_adapters(trainer, given, pad_token_id)
    else:
        models = given if isinstance(given, list) else [given]
        if config.selection == "disagreement" and len(models) == 1 and not _has_dropout(models[0]):
            raise ValueError(
                "`selection='disagreement'` needs dropout or an ensemble, and the discriminator has neither. Give a "
                "list of models, or choose 'confidence' or 'random'."
            )
        prompts = trainer.layout.for_other_models()
        members = [
            ModelMember(model, processing_class, config.max_length, trainer.accelerator, prompts) for model in models
        ]
    return Discriminator(
        members,
        learning_rate=config.discriminator_learning_rate,
        batch_size=config.discriminator_batch_size,
        epochs=config.discriminator_epochs,
        dropout_samples=config.dropout_samples,
        seed=config.seed,
        accelerator=trainer.accelerator,
    )


def _make_adapters(trainer, given, pad_token_id: int) -> list[AdapterMember]:
    config: D2POConfig = trainer.args
    policy = trainer.accelerator.unwrap_model(trainer.model)
    if not is_peft_model(policy) or policy.peft_config["default"].peft_type != PeftType.LORA:
        raise ValueError(
            "`discriminator='adapter'` shares the policy's frozen base, so the policy must be trained with LoRA. Give "
            "a `peft_config=LoraConfig(...)`, or a discriminator that is a model of its own."
        )
    if given is None:
        given = LoraConfig(
            r=config.discriminator_lora_r,
            lora_alpha=config.discriminator_lora_alpha,
            lora_dropout=config.discriminator_lora_dropout,
            target_modules=policy.peft_config["default"].target_modules,
        )
    configs = given if isinstance(given, list) else [given] * config.discriminator_ensemble_size
    names = [f"discriminator_{i}" if i else "discriminator" for i in range(len(configs))]
    prompts = trainer.layout.for_other_models()
    return [
        AdapterMember(policy, name, dataclasses.replace(config), pad_token_id, trainer.accelerator, prompts)
        for name, config in zip(names, configs, strict=True)
    ]


def _holds_models(discriminator) -> bool:
    given = discriminator if isinstance(discriminator, list) else [discriminator]
    return any(item is not None and not isinstance(item, LoraConfig) for item in given)


def _has_dropout(model) -> bool:
    if isinstance(model, str):
        return True  # the name of a model: whether it has dropout shows only once it is loaded
    return any(isinstance(module, torch.nn.Dropout) and module.p > 0 for module in model.modules())
