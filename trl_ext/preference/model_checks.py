"""Checks of the models given to a trainer: catches what `DPOTrainer` would get wrong later or silently."""

import torch
from accelerate.logging import get_logger
from peft import PeftModel, PeftType
from torch import nn
from transformers import PreTrainedModel

from .._trl import get_config_model_id
from ..training.adapters import check_needs_no_more, check_starts_at_base, reference_adapter, shared_parameters


logger = get_logger(__name__)


def check_policy(model, ref_model) -> None:
    """
    Raises `ValueError` for a policy that is not a causal language model, or whose adapters the trainer cannot train.

    Args:
        model (`str` or [`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            The trainer's `model`. A name is not checked, as nothing is loaded yet.
        ref_model ([`~transformers.PreTrainedModel`], *optional*):
            The trainer's `ref_model`.
    """
    if isinstance(model, PeftModel):
        if "default" not in model.peft_config:
            names = ", ".join(map(repr, model.peft_config))
            raise ValueError(
                f"`model` has the adapters {names}, and the one that is trained must be called 'default'. Load yours "
                "with `PeftModel.from_pretrained(base, folder, is_trainable=True)`, without `adapter_name`."
            )
        if model.active_adapters != ["default"]:
            active = ", ".join(map(repr, model.active_adapters)) or "none"
            raise ValueError(
                f"The active adapters of `model` are {active}, and the one that is trained is 'default': training "
                "would not start from the model as it was given. Call `model.set_adapter('default')`, or merge the others "
                "into the base (`merge_and_unload`)."
            )
        if reference_adapter(model) and ref_model is None:
            raise ValueError(
                "`model` already has an adapter 'ref', the name of the frozen copy that serves as reference: another "
                "trainer has made it. Remove it with `model.delete_adapter('ref')`, and the adapter as it is now "
                "becomes the reference."
            )
        model = model.get_base_model()
    if isinstance(model, PreTrainedModel):
        check_architecture(model)


def check_architecture(model: PreTrainedModel) -> None:
    """Raises `ValueError` for an encoder-decoder, and for a model without a language-modeling head."""
    if model.config.is_encoder_decoder:
        raise ValueError(
            f"`model` is a `{type(model).__name__}`, an encoder-decoder, whose responses have no place in one "
            "sequence with the prompt. Give a decoder (`AutoModelForCausalLM`)."
        )
    if model.get_output_embeddings() is None:
        raise ValueError(
            f"`model` is a `{type(model).__name__}`, which has no language-modeling head. Load it with "
            "`AutoModelForCausalLM.from_pretrained(...)`."
        )


def usable_reference(ref_model):
    """
    Returns the reference as the trainer uses it: for a [`~peft.PeftModel`], the base model with the adapter injected
    into its layers, which computes the same function.

    Raises:
        `TypeError`: If `ref_model` is a name, which `DPOTrainer` does not load either.
        `ValueError`: If its adapter learns a prompt, which is added outside the base model.
    """
    if isinstance(ref_model, str):
        raise TypeError(
            f"`ref_model={ref_model!r}` is a name. Pass the model, "
            f"`AutoModelForCausalLM.from_pretrained({ref_model!r})`, or leave `ref_model` out if `model` was loaded "
            "from the same place."
        )
    if not isinstance(ref_model, PeftModel):
        return ref_model
    if ref_model.peft_config[ref_model.active_adapter].is_prompt_learning:
        raise ValueError(
            "`ref_model` has an adapter of prompts, which are added outside the model that is scored here. Give a "
            "reference without one, or with LoRA."
        )
    return ref_model.get_base_model()


def check_separate(model, ref_model) -> None:
    """Raises `ValueError` if `ref_model` and `model` share parameters: training one would change the other."""
    if not isinstance(model, nn.Module) or not isinstance(ref_model, nn.Module) or ref_model is model:
        return  # the same object is refused by `DPOTrainer`
    shared = shared_parameters(model, ref_model)
    if shared:
        raise ValueError(
            f"`ref_model` shares parameters with `model` ({', '.join(shared[:3])}; {len(shared)} in all), so it would "
            "change with it. Leave `ref_model` out, or pass a model with weights of its own: "
            "`copy.deepcopy(model)`, or one that was loaded a second time."
        )


def check_adapter(model, peft_config, args, is_own_reference: bool) -> None:
    """
    Raises `ValueError` for an adapter with which training could not run or would not start at its reference.

    Args:
        model (`str`, [`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            What the trainer was given.
        peft_config ([`~peft.PeftConfig`], *optional*):
            Configuration of a new adapter.
        args ([`PreferenceConfig`]):
            Configuration.
        is_own_reference (`bool`):
            Whether the reference is the policy with its adapter switched off, or with a copy of it.
    """
    config = peft_config
    if config is None and isinstance(model, PeftModel):
        config = model.peft_config["default"]
    if config is None:
        return
    if config.peft_type == PeftType.PREFIX_TUNING and args.gradient_checkpointing:
        raise ValueError(
            "`gradient_checkpointing=True`, the default, is not supported with prefix tuning, which passes its prefix "
            "as a cache that checkpointing discards. Set `gradient_checkpointing=False`."
        )
    check_needs_no_more(config, is_fresh=peft_config is not None)
    if is_own_reference:
        instead = ", or pass a separate `ref_model` (`AutoModelForCausalLM.from_pretrained(...)`)"
        if getattr(config, "init_lora_weights", getattr(config, "init_weights", True)) is False:
            instead = (
                "; or make the model yourself (`get_peft_model`), then a frozen copy of its adapter is the reference"
                f"{instead}"
            )
        check_starts_at_base(config, is_fresh=peft_config is not None, instead=instead)


def check_trainable(model: nn.Module) -> None:
    """Raises `ValueError` if nothing in the model would be trained."""
    if not any(parameter.requires_grad for parameter in model.parameters()):
        how = (
            "Load the adapter with `PeftModel.from_pretrained(base, folder, is_trainable=True)`"
            if isinstance(model, PeftModel)
            else "Set `requires_grad` of what is to be trained, or give a `peft_config`"
        )
        raise ValueError(
            f"`model` has no parameter that requires a gradient, so training would change nothing. {how}."
        )


def follow_memory(model: PreTrainedModel, reference: PreTrainedModel) -> None:
    """
    Copies the weights of `model` into a reference that was loaded from disk, if they differ, and warns. The reference
    is what training starts from, even if `model` was trained or merged earlier in the same script.
    """
    loaded = dict(reference.named_parameters())
    changed = []
    for name, parameter in model.named_parameters():
        other = loaded.get(name)
        if other is None or other.shape != parameter.shape:
            continue
        if parameter.is_meta or other.is_meta or hasattr(parameter, "ds_id"):
            continue  # not here
        if other.dtype == parameter.dtype and not torch.equal(parameter, other.to(parameter.device)):
            changed.append(name)
            with torch.no_grad():
                other.copy_(parameter)
    if changed:
        logger.warning(
            f"`model` has changed since it was loaded (`{changed[0]}` differs"
            f"{f', and {len(changed) - 1} more' if len(changed) > 1 else ''}), and no `ref_model` was given: the "
            f"reference is the model as it is now, in memory. To compare with `{get_config_model_id(model.config)}` "
            "as it is on disk, load it and pass it as `ref_model`."
        )
