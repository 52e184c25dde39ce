"""Checks of the models that a trainer is given: what `DPOTrainer` would fail on later, or without a word."""

import torch
from accelerate.logging import get_logger
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel

from .._trl import get_config_model_id


logger = get_logger(__name__)


def check_policy(model, ref_model) -> None:
    """
    Raises `ValueError` for a policy that is no causal language model, or whose adapters the trainer cannot work with.

    Args:
        model (`str` or [`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            What the trainer was given; a name says nothing yet.
        ref_model ([`~transformers.PreTrainedModel`], *optional*):
            The reference that it was given.
    """
    if isinstance(model, PeftModel):
        if "default" not in model.peft_config:
            names = ", ".join(map(repr, model.peft_config))
            raise ValueError(
                f"`model` has the adapters {names}, and the one that is trained must be called 'default'. Load yours with "
                "`PeftModel.from_pretrained(base, folder, is_trainable=True)`, without `adapter_name`."
            )
        if "ref" in model.peft_config and ref_model is None:
            raise ValueError(
                "`model` already has an adapter 'ref', the name of the frozen copy that serves as reference: another "
                "trainer has made it. Remove it with `model.delete_adapter('ref')`, and the adapter as it is now becomes the "
                "reference."
            )
        model = model.get_base_model()
    if isinstance(model, PreTrainedModel):
        check_architecture(model)


def check_architecture(model: PreTrainedModel) -> None:
    """Raises `ValueError` for an encoder-decoder, and for a model without a language-modelling head."""
    if model.config.is_encoder_decoder:
        raise ValueError(
            f"`model` is a `{type(model).__name__}`, an encoder-decoder, whose responses have no place in one sequence with "
            "the prompt. Give a decoder (`AutoModelForCausalLM`)."
        )
    if model.get_output_embeddings() is None:
        raise ValueError(
            f"`model` is a `{type(model).__name__}`, which has no language-modelling head. Load it with "
            "`AutoModelForCausalLM.from_pretrained(...)`."
        )


def usable_reference(ref_model):
    """
    The reference as the trainer uses it: of a [`~peft.PeftModel`] the model with the adapter in its layers, which is the
    same function.

    Raises:
        `TypeError`: If it is a name, which `DPOTrainer` does not load either.
        `ValueError`: If its adapter is one of prompts, which live outside the model.
    """
    if isinstance(ref_model, str):
        raise TypeError(
            f"`ref_model={ref_model!r}` is a name. Give the model: `AutoModelForCausalLM.from_pretrained({ref_model!r})`, "
            "or nothing, if it is what `model` was loaded from."
        )
    if not isinstance(ref_model, PeftModel):
        return ref_model
    if ref_model.peft_config[ref_model.active_adapter].is_prompt_learning:
        raise ValueError(
            "`ref_model` has an adapter of prompts, which are added outside the model that is scored here. Give a reference "
            "without one, or with LoRA."
        )
    return ref_model.get_base_model()


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


def warn_if_file_differs(model: PreTrainedModel, reference: PreTrainedModel) -> None:
    """
    Warns if a reference that was loaded for a model in memory, from where that model once came, has other weights: then the
    model has been changed since, and what training starts from is not its reference.
    """
    loaded = dict(reference.named_parameters())
    for name, parameter in model.named_parameters():
        other = loaded.get(name)
        comparable = other is not None and (other.shape, other.dtype) == (parameter.shape, parameter.dtype)
        if not comparable or parameter.is_meta or other.is_meta or hasattr(parameter, "ds_id"):
            continue  # of another precision, or not here
        if not torch.equal(parameter, other.to(parameter.device)):  # the policy may be on its device already
            logger.warning(
                f"`model` has changed since it was loaded (`{name}` differs), and no `ref_model` was given: the reference is "
                f"`{get_config_model_id(model.config)}` as it is on disk. If training should start at its reference, pass "
                "`ref_model=copy.deepcopy(model)`."
            )
            return
