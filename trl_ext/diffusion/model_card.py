"""
Writes the model card of a diffusion model: base, data, settings, results and images.

Everything on the card is read from the trainer, its state and the files beside it; unknown facts are left out.
"""

import dataclasses
import json
import platform
import re
import shutil
from functools import cache
from pathlib import Path

import jinja2
from huggingface_hub import ModelCardData, try_to_load_from_cache
from transformers import TrainingArguments

from .._version import __version__
from ..training import model_card as shared
from .export import KOHYA_FILE
from .saving import LORA_FILE, trained_parameters


_TEMPLATE = Path(__file__).with_name("model_card_template.md")
_GRID = "validation.png"
# Options about files and validation images, which do not affect how the model was trained.
_LEFT_OUT_OPTIONS = re.compile(
    r"cache_.*|validation_.*|model_init_kwargs|ddp_.*|num_timestep_buckets|image_dir|verify_images"
)
_BUCKET = re.compile(r".*/t\d+-\d+")


def create_model_card(trainer, folder, model_name=None, dataset_name=None, tags=None) -> None:
    """
    Writes `folder/README.md` and the last image grid. A `README.md` that was not generated is left as it is.

    The arguments are those of [`~trl_ext.training.model_card.create_model_card`].
    """
    if trainer.last_grid is not None:
        Path(folder).mkdir(parents=True, exist_ok=True)
        shutil.copyfile(trainer.last_grid, Path(folder) / _GRID)
    shared.create_model_card(trainer, folder, model_name, dataset_name, tags, render=render_model_card)


def render_model_card(trainer, folder: Path, model_name=None, dataset_name=None, tags=()) -> str:
    """Returns the text of the card; the arguments are those of [`create_model_card`]."""
    args, policy, state = trainer.args, trainer.policy, trainer.state
    in_output_dir = folder.resolve() == Path(args.output_dir).resolve()
    is_lora = policy.adapter_name is not None
    base = _base_model(trainer)
    data = shared.TrainingData.of(trainer.source_dataset, dataset_name)
    data = dataclasses.replace(data, rows=len(trainer.train_dataset))
    repo_id = trainer.hub_model_id or args.hub_model_id
    model_name = model_name or (repo_id or Path(args.output_dir).resolve().name).split("/")[-1]
    model_id = trainer.hub_model_id if in_output_dir and trainer.hub_model_id else folder.as_posix()
    adapter = shared._describe_peft_config(policy.denoiser.peft_config[policy.adapter_name]) if is_lora else {}
    quantization = shared._describe_quantization(policy.denoiser) if trainer.is_quantized else ""

    card_data = ModelCardData(
        base_model=base.hub_ids[0] if len(base.hub_ids) == 1 else base.hub_ids or None,
        datasets=data.hub_ids or None,
        library_name="diffusers",
        license=base.license.get("license"),
        license_name=base.license.get("license_name"),
        license_link=base.license.get("license_link"),
        model_name=model_name,
        pipeline_tag="text-to-image",
        tags=_tags(trainer, adapter, tags),
    )
    prompts = list(args.validation_prompts or [])
    context = {
        "card_data": card_data.to_yaml(),
        "notice": shared.NOTICE,
        "model_name": model_name,
        "model_id": json.dumps(model_id, ensure_ascii=False),  # quoted, as in Python
        "base_id": json.dumps(base.name, ensure_ascii=False),
        "pipeline_class": type(policy.family.pipeline).__name__,
        "prompt": json.dumps(prompts[0] if prompts and prompts[0] else "a lighthouse at dusk", ensure_ascii=False),
        "weight_name": LORA_FILE,
        "method": trainer._name,
        "trainer_class": type(trainer).__name__,
        "trainer_source": shared._trainer_source(trainer),
        "paper": _paper(trainer),
        "base": base,
        "data": data,
        "eval_rows": _rows_of(trainer.eval_dataset),
        "adapter": adapter,
        "adaptation": shared._adaptation(adapter, quantization),
        "quantization": quantization,
        "is_trained": state.global_step > 0,
        "status": shared._status(trainer),
        "kohya_file": KOHYA_FILE if args.export_format == "kohya" else "",
        "grid": _GRID if trainer.last_grid is not None else "",
        "results": _results(trainer),
        "hyperparameters": _hyperparameters(trainer),
        "run": shared._run_facts(trainer),
        "trackers": shared._trackers(),
        "versions": _versions(trainer),
    }
    return _template().render(**context)


@cache
def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True, undefined=jinja2.StrictUndefined
    )
    environment.filters.update(cell=shared._cell, inline=shared._inline)
    return environment.from_string(_TEMPLATE.read_text(encoding="utf-8"))


def _paper(trainer) -> dict[str, str]:
    paper = {"title": trainer._name, "citation": "", "url": "", **(trainer._paper or {})}
    if paper.get("id"):
        paper["url"] = f"https://huggingface.co/papers/{paper['id']}"
    return paper


def _base_model(trainer) -> shared.BaseModel:
    """Describes the base model, from the source of the pipeline."""
    policy = trainer.policy
    architecture = type(policy.family.pipeline).__name__
    name = policy.config.name_or_path
    if shared.is_hub_id(name):
        readme = try_to_load_from_cache(name, "README.md")
        metadata = shared.read_front_matter(readme) if isinstance(readme, str) else {}
        return shared.BaseModel(name, architecture, [name], True, shared.BaseModel._license(metadata))
    metadata = shared.read_front_matter(Path(name) / "README.md") if name else {}
    ancestors = metadata.get("base_model") or []
    ancestors = [ancestors] if isinstance(ancestors, str) else ancestors
    hub_ids = [ancestor for ancestor in ancestors if shared.is_hub_id(ancestor)]
    is_loadable = bool(name) and (Path(name) / "model_index.json").is_file()
    return shared.BaseModel(name, architecture, hub_ids, is_loadable, shared.BaseModel._license(metadata))


def _rows_of(dataset) -> int | None:
    if dataset is None:
        return None
    return sum(len(part) for part in (dataset.values() if isinstance(dataset, dict) else [dataset]))


def _tags(trainer, adapter: dict, given) -> list[str]:
    tags = ["generated_from_trainer", *trainer._tag_names, "diffusers", "text-to-image"]
    if adapter:
        tags += [adapter["kind"].lower(), "template:diffusion-lora"]
    return list(dict.fromkeys([*tags, *sorted(given)]))


def _results(trainer) -> dict[str, list]:
    results = shared._results(trainer)
    # Metrics by timestep are for trackers; in a table they are too many.
    return {**results, "rows": [row for row in results["rows"] if not _BUCKET.fullmatch(row[0])]}


def _hyperparameters(trainer) -> dict[str, str]:
    """Returns the rows of the table: the method's options first, then those of every run."""
    args, policy = trainer.args, trainer.policy
    inherited = {field.name for field in dataclasses.fields(TrainingArguments)}
    names = [f.name for f in dataclasses.fields(args) if f.name not in inherited]
    values = {name: getattr(args, name) for name in names if not _LEFT_OUT_OPTIONS.fullmatch(name)}
    values.update(trainer.resolved_hyperparameters())
    rows = {name: f"`{shared._value(value)}`" for name, value in values.items() if value is not None}
    rows["reference"] = _describe_reference(policy)
    rows.update(shared._optimization(trainer))
    trained = trained_parameters(policy).values()
    rows.update(shared._precision(args, next(iter(trained)).dtype))
    count = sum(parameter.numel() for parameter in trained)
    rows["trained parameters"] = f"{count:,}"
    return {name: value for name, value in rows.items() if value}


def _describe_reference(policy) -> str:
    if policy.reference is not None:
        return "a separate denoiser, frozen"
    if len(policy.denoiser.peft_config) > 1:
        return "a frozen copy of the LoRA that training started from"
    return "the base model, without the LoRA"


def _versions(trainer) -> dict[str, str]:
    packages = ["trl", "diffusers", "transformers", "peft", "torch", "accelerate", "datasets"]
    packages += ["bitsandbytes"] if trainer.is_quantized else []
    versions = {name: shared._package_version(name) for name in packages}
    return {"trl_ext": __version__, **versions, "Python": platform.python_version()}
