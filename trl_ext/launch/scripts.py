"""Turns the arguments of a command into a trainer, for pairs of texts and for pairs of images."""

import os
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from trl import ModelConfig, ScriptArguments


if TYPE_CHECKING:
    from .commands import Method


@dataclass
class DataArguments(ScriptArguments):
    """TRL's arguments of every script, with help texts for this project."""

    dataset_name: str | None = field(
        default=None,
        metadata={
            "help": "Training data: a Hub id, a folder, or a JSONL, JSON, Parquet or CSV file. Give either this or "
            "`datasets`, a mixture in the configuration file."
        },
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of a Hub dataset."})
    dataset_train_split: str = field(
        default="train", metadata={"help": "Split to train on, or its first rows, as in 'train[:1000]'."}
    )
    dataset_test_split: str = field(
        default="test",
        metadata={"help": "Split to evaluate on, or its first rows; read if `eval_strategy` is not 'no'."},
    )
    dataset_streaming: bool = field(default=False, metadata={"help": "Stream the dataset instead of loading it."})


@dataclass
class RunArguments:
    """
    Options that determine how the run is started.

    Args:
        dry_run (`bool`, *optional*, defaults to `False`):
            Load the model and the data, describe what the run would do, and stop before the first step.
        accelerate_config (`str`, *optional*):
            For `trl-ext` only: start the run under `accelerate launch` with this configuration.
        num_processes (`int`, *optional*):
            For `trl-ext` only: start the run under `accelerate launch` with this many processes.
    """

    dry_run: bool = field(
        default=False,
        metadata={
            "help": "Load model and data, say what the run would do (pairs kept and left out, lengths, memory, disk), "
            "and stop before the first step."
        },
    )
    accelerate_config: str | None = field(
        default=None,
        metadata={
            "help": "Start under `accelerate launch` with this configuration: a file, or single_gpu, multi_gpu, "
            "zero2, zero3, fsdp2, cpu_2proc. Of `trl-ext` only; a recipe is launched with it."
        },
    )
    num_processes: int | None = field(
        default=None,
        metadata={"help": "Processes under `accelerate launch`. Of `trl-ext` only; a recipe is launched with it."},
    )


class Script:
    """
    Base of the scripts of a kind of method: its additional arguments, and how they affect loading and the trainer.

    Args:
        method ([`~trl_ext.launch.commands.Method`]):
            Row of the table.

    Attributes:
        arguments (`tuple[type, ...]`):
            Further dataclasses of arguments. Their first docstring line is the title of their section in the help.
        model_config (`type`):
            Arguments of the model.
        unit (`str`):
            What a row of the data is called.
        example, hints (`str`, `tuple[str, ...]`):
            Example options of a first run, and further lines, shown if no arguments were given.
    """

    arguments: tuple[type, ...] = ()
    model_config: type = ModelConfig
    unit = "pairs"
    example = "--config lora --model_name_or_path Qwen/Qwen2.5-0.5B-Instruct --dataset_name my_pairs.jsonl"
    hints: tuple[str, ...] = ()

    def __init__(self, method: "Method"):
        self.method = method
        self.raw: Any = ()  # the training split, before the trainer prepared it

    def model_init_kwargs(self, training_args, model_args) -> dict[str, Any]:
        """Keyword arguments for loading the model, from the command line."""
        return dict(
            revision=model_args.model_revision,
            trust_remote_code=training_args.trust_remote_code,
            attn_implementation=model_args.attn_implementation,
            dtype=model_args.dtype,
        )

    def complete(self, script_args, training_args) -> None:
        """Sets options that follow from where the data are."""

    def prepare(self, split):
        """Returns a split in the form that the trainer takes."""
        return split

    def trainer_arguments(self, *more) -> dict[str, Any]:
        """Builds the trainer's arguments from the additional dataclasses."""
        return {}

    # ---- For `--dry_run` -------------------------------------------------------------------------------------------

    def describe_data(self, trainer) -> list[str]:
        """Lines about the training data."""
        from .dry_run import describe_text_data

        return describe_text_data(trainer, self.raw)

    def step_size(self, trainer) -> tuple[float, float]:
        """Pairs of an optimizer step, and their tokens on average (NaN if they have none)."""
        from .dry_run import tokens_per_step

        return tokens_per_step(trainer)

    def example_row(self, trainer) -> list[str]:
        """Lines that show the first row as the model reads it."""
        from .dry_run import rendered_example

        return rendered_example(trainer)


@dataclass
class PipelineConfig(ModelConfig):
    """[`~trl.ModelConfig`] with the `dtype` left open, which depends on what is trained."""

    dtype: str | None = field(
        default=None,
        metadata={
            "help": "Type of the frozen denoiser and the text encoders. Defaults to that of the mixed precision with "
            "an adapter, to float32 otherwise. With QLoRA also the type in which the 4-bit weights compute.",
            "choices": ["bfloat16", "float16", "float32"],
        },
    )


class ImageScript(Script):
    """Of text-to-image pipelines."""

    model_config = PipelineConfig
    example = "--config sd15_lora --dataset_name my_pairs.jsonl"
    hints = (
        "",
        "To see it work without a model to download, from a clone of the project:",
        "",
        "  python3 recipes/diffusion_demo.py",
    )

    def model_init_kwargs(self, training_args, model_args) -> dict[str, Any]:
        if model_args.attn_implementation is not None:
            raise ValueError(
                f"`--attn_implementation {model_args.attn_implementation}` has no effect on a diffusion pipeline. "
                "Leave it out."
            )
        # Without a dtype the trainer chooses: that of the mixed precision where the weights are frozen, else float32.
        dtype = {} if model_args.dtype is None else {"dtype": model_args.dtype}
        return {"revision": model_args.model_revision, **dtype}

    def complete(self, script_args, training_args) -> None:
        """Relative image paths start from the data file's folder, unless `--image_dir` says otherwise."""
        from ..training.named_datasets import folder_of_images

        if training_args.image_dir is None:
            training_args.image_dir = folder_of_images(script_args.dataset_name)

    def describe_data(self, trainer) -> list[str]:
        from ..diffusion.prompts import count_cut_prompts
        from .describe_data import image_sizes

        images, rows = trainer.train_dataset, len(self.raw)
        height, width = trainer.image_size
        lines = [
            f"training data      {len(images):,} of {rows:,} pairs of images, trained at {width} x {height} pixels"
        ]
        broken = len(images.skipped)
        if broken:
            lines.append(f"  left out         {broken:,}: an image cannot be used (`skip_broken_images`)")
        if len(images) + broken < rows:
            lines.append(f"  left out         {rows - len(images) - broken:,}: a tie, or no label")
        lines.append(f"  image sizes      {image_sizes(images)}")
        if images.buckets is not None:
            lines.append(f"  buckets          {images.describe_buckets()}")
        lines.append(f"  prompts          {len(set(images.prompts())):,} different")
        for cut in count_cut_prompts(trainer.family, images):
            lines.append(
                f"  cut prompts      {cut.cut:,} of {cut.prompts:,}: the encoder of `{cut.tokenizer}` reads "
                f"{cut.limit} tokens, the longest has {cut.longest}"
            )
        return [*lines, *self._cache_lines(trainer)]

    @staticmethod
    def _cache_lines(trainer) -> list[str]:
        if "cache_latents" not in trainer.args._dry_run_postponed:
            return []
        from .dry_run import gib

        latents, prompts = trainer.cache_bytes()
        where = trainer.args.cache_dir or f"{trainer.args.output_dir}/_latent_cache"
        return [
            f"latent cache       about {gib(latents + prompts)} in {where}, filled before step 1",
            f"  latents          {gib(latents)}",
            f"  prompts          {gib(prompts)}",
        ]

    def step_size(self, trainer) -> tuple[int, float]:
        from .dry_run import pairs_per_step

        return pairs_per_step(trainer), float("nan")

    def example_row(self, trainer) -> list[str]:
        pair = trainer.train_dataset.pair(0)
        lines = ["first example", f"  prompt   | {pair.prompt}"]
        for name, source, (height, width) in zip(("chosen", "rejected"), pair.sources, pair.sizes, strict=True):
            path = source.get("path") if isinstance(source, dict) else source
            where = f", {path}" if isinstance(path, (str, os.PathLike)) and path else ""
            lines.append(f"  {name:<9}| {width} x {height} pixels{where}")
        return lines
