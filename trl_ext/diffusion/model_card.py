"""Facts for the model card of a text-to-image model."""

import dataclasses
import json
import re
import shutil
from pathlib import Path

from transformers import TrainingArguments

from ..training import card_facts as facts
from ..training.card_facts import BaseModel, TrainingData
from ..training.config import HubOptions
from ..training.model_card import CardFacts
from .export import KOHYA_FILE
from .saving import LORA_FILE, trained_parameters


TEMPLATE = Path(__file__).with_name("image_card_template.md")
_GRID = "validation.png"
# Options about files and validation images, which do not affect how the model was trained.
_LEFT_OUT_OPTIONS = re.compile(
    r"cache_.*|validation_.*|model_init_kwargs|ddp_.*|num_timestep_buckets|image_dir|verify_images"
)


def base_of(policy, args) -> BaseModel:
    """Describes the pipeline that training starts from."""
    architecture = type(policy.family.pipeline).__name__
    return BaseModel.of(policy.config.name_or_path, architecture, args.hub_base_model_id, index="model_index.json")


def copy_grid(trainer, folder: Path) -> None:
    """Copies the last image grid into the card's folder."""
    if trainer.last_grid is not None:
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(trainer.last_grid, folder / _GRID)


def card_facts(trainer) -> CardFacts:
    """The facts of an [`ImageTrainer`]."""
    args, policy, is_lora = trainer.args, trainer.policy, trainer.policy.adapter_name is not None
    adapter, settings = facts.describe_adapter(policy.denoiser.peft_config[policy.adapter_name] if is_lora else None)
    given = trainer.__dict__.get("_card_details", {})
    data = TrainingData.of(trainer.source_dataset, given.get("dataset_name"), trainer.is_card_public)
    prompts = [prompt for prompt in args.validation_prompts or [] if prompt]
    packages = ["trl", "diffusers", "transformers", "peft", "torch", "accelerate", "datasets"]
    return CardFacts(
        task=trainer.card_task,
        data=dataclasses.replace(data, rows=trainer.num_training_rows, unit=trainer.data_unit),
        unit=trainer.card_unit,
        library="diffusers",
        pipeline_tag="text-to-image",
        hyperparameters=_hyperparameters(trainer),
        packages=[*packages, *(["bitsandbytes"] if trainer.is_quantized else [])],
        adapter=adapter,
        adapter_settings=settings,
        quantization=facts.describe_quantization(policy.denoiser) if trainer.is_quantized else "",
        tags=["diffusers", "text-to-image", *([adapter.lower(), "template:diffusion-lora"] if adapter else [])],
        quick_start={
            "base_id": json.dumps(trainer.base_model.name, ensure_ascii=False),  # quoted, as in Python
            "pipeline_class": type(policy.family.pipeline).__name__,
            "prompt": json.dumps(prompts[0] if prompts else "a lighthouse at dusk", ensure_ascii=False),
            "weight_name": LORA_FILE,
            "kohya_file": KOHYA_FILE if args.export_format == "kohya" else "",
            "grid": _GRID if trainer.last_grid is not None else "",
        },
    )


def _hyperparameters(trainer) -> dict[str, str]:
    """Rows of the table: the method's options first, then those of every run."""
    args, policy = trainer.args, trainer.policy
    inherited = {field.name for parent in (TrainingArguments, HubOptions) for field in dataclasses.fields(parent)}
    names = [field.name for field in dataclasses.fields(args) if field.name not in inherited]
    rows = facts.own_options(trainer, (name for name in names if not _LEFT_OUT_OPTIONS.fullmatch(name)))
    rows["reference"] = _describe_reference(policy)
    rows.update(facts.describe_optimization(trainer, trainer.card_unit))
    trained = trained_parameters(policy).values()
    rows.update(facts.describe_precision(args, next(iter(trained)).dtype))
    rows["trained parameters"] = f"{sum(parameter.numel() for parameter in trained):,}"
    return rows


def _describe_reference(policy) -> str:
    if policy.reference is not None:
        return "a separate denoiser, frozen"
    if len(policy.denoiser.peft_config) > 1:
        return "a frozen copy of the LoRA that training started from"
    return "the base model, without the LoRA"
