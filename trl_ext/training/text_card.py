"""The model card of a language model."""

import dataclasses
from pathlib import Path
from typing import ClassVar

from accelerate.utils import is_peft_model

from .._trl import get_config_model_id
from . import card_facts as facts
from .card_facts import BaseModel, TrainingData, code
from .config import HubOptions
from .model_card import CardFacts, DocumentedRun


class DocumentedTextRun(DocumentedRun):
    """
    [`DocumentedRun`] of a language model.

    Class attributes:
        card_task (`str`):
            What is trained on, in words.
        card_unit (`str`):
            What a row of a batch is, in the plural.
    """

    card_task: ClassVar[str] = "pairs of preferred and rejected responses"
    card_unit: ClassVar[str] = "pairs"

    def own_option_names(self) -> list[str]:
        """Names of the method's own options, in the order of the card's table."""
        raise NotImplementedError(f"`{type(self).__name__}` must define `own_option_names(self)`.")

    def card_facts(self) -> CardFacts:
        return _card_facts(self)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        super().save_model(output_dir, _internal_call)
        # PEFT writes a card of placeholders next to the adapter; replace it, in checkpoints too.
        self.write_model_card(Path(output_dir or self.args.output_dir))

    def saved_parts(self) -> list[str]:
        return list(getattr(self.accelerator.unwrap_model(self.model), "peft_config", {}))


def names_of_fields(config: type, beside: type) -> list[str]:
    """Names of the fields that a configuration has and neither another one nor [`HubOptions`]."""
    shared = {field.name for parent in (beside, HubOptions) for field in dataclasses.fields(parent)}
    return [field.name for field in dataclasses.fields(config) if field.name not in shared]


def base_of(model, args) -> BaseModel:
    """Describes the model that training starts from: an instance, or the name of one."""
    hub_id = args.hub_base_model_id
    if isinstance(model, str):
        return BaseModel.of(model, "", hub_id)
    architecture = type(model.get_base_model() if is_peft_model(model) else model).__name__
    return BaseModel.of(get_config_model_id(model.config) or "", architecture, hub_id)


def _card_facts(trainer: DocumentedTextRun) -> CardFacts:
    args, model = trainer.args, trainer.accelerator.unwrap_model(trainer.model)
    is_peft, is_vision = is_peft_model(model), getattr(trainer, "_is_vlm", False)
    config = model.peft_config[getattr(model, "active_adapter", "default")] if is_peft else None
    adapter, settings = facts.describe_adapter(config)
    quantized = facts.quantization_of(model).get("quant_method")
    given = trainer.__dict__.get("_card_details", {})
    packages = ["trl", "transformers", *(["peft"] if is_peft else []), "torch", "accelerate", "datasets", "tokenizers"]
    packages += ["bitsandbytes"] if facts.value_text(quantized) == "bitsandbytes" else []
    packages += ["deepspeed"] if trainer.is_deepspeed_enabled else []
    return CardFacts(
        task=trainer.card_task,
        unit=trainer.card_unit,
        data=TrainingData.of(trainer.train_dataset, given.get("dataset_name"), trainer.is_card_public),
        library="peft" if adapter else "transformers",
        pipeline_tag="image-text-to-text" if is_vision else "text-generation",
        hyperparameters=_hyperparameters(trainer, model),
        packages=packages,
        adapter=adapter,
        adapter_settings=settings,
        quantization=facts.describe_quantization(model),
        tags=[
            *([adapter.lower()] if adapter else []),
            *(["unsloth"] if hasattr(model.config, "unsloth_version") else []),
        ],
        quick_start={
            "is_vision": is_vision,
            "is_chat": bool(getattr(trainer.processing_class, "chat_template", "")),
            "trust": ", trust_remote_code=True" if args.trust_remote_code else "",
        },
    )


def _hyperparameters(trainer, model) -> dict[str, str]:
    """Rows of the table: the method's own options first, then those needed to reproduce any run."""
    args = trainer.args
    refused = type(args).refused_options()
    rows = facts.own_options(trainer, (name for name in trainer.own_option_names() if name not in refused))
    rows["reference"] = describe_reference(trainer)
    rows.update(facts.describe_optimization(trainer, trainer.card_unit))
    if hasattr(args, "max_length"):
        limit = f"{args.max_length} tokens (`{args.truncation_mode}`)" if args.max_length is not None else "no limit"
        rows["maximum length"] = limit
    dtype = next((p.dtype for p in model.parameters() if p.requires_grad), model.dtype)
    rows.update(facts.describe_precision(args, dtype))
    # Under FSDP a process sees its own shard only.
    rows["trained parameters"] = "" if trainer.is_fsdp_enabled else _parameters(model)
    return rows


def _parameters(model) -> str:
    if is_peft_model(model):
        trainable, total = model.get_nb_trainable_parameters()
    else:
        sizes = [(getattr(p, "ds_numel", p.numel()), p.requires_grad) for p in model.parameters()]
        trainable, total = sum(n for n, grad in sizes if grad), sum(n for n, _ in sizes)
    return f"{trainable:,} of {total:,} ({trainable / total:.2%})" if trainable < total else f"{total:,}"


def describe_reference(trainer) -> str:
    if not trainer.needs_reference:
        return "not used"
    how = ", log-probabilities precomputed" if trainer.precompute_ref_logps else ""
    if trainer.args.sync_ref_model:
        how += f", synchronized every {trainer.args.ref_model_sync_steps} steps"
    if trainer.reference_config is not None:
        name = get_config_model_id(trainer.reference_config)
        base = trainer.base_model
        base = base if name == base.loaded_from else BaseModel.of(name, "")
        name = (base.for_the_public() if trainer.is_card_public else base).name
        return (code(name) if name else "a separate model") + ", frozen" + how
    if is_peft_model(trainer.model):
        started = "a frozen copy of the adapter that training started from"
        return (started if "ref" in trainer.model.peft_config else "the base model, without the adapter") + how
    return "the model that training started from" + how
