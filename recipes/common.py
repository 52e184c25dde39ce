"""What every recipe shares: TRL's script, with the trainer as a parameter and data that may be a file or a folder."""

import dataclasses
import inspect
import os
import re
import warnings
from dataclasses import dataclass, field
from pathlib import Path


ROOT = Path(__file__).resolve().parent.parent
FILE_TYPES = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv"}


def load_preference_dataset(name: str, config: str | None = None, streaming: bool = False):
    """
    Loads a dataset with its splits.

    Args:
        name (`str`):
            A Hub id, a folder (of data files named after their splits, or written by `save_to_disk`), or one JSONL,
            JSON, Parquet or CSV file (gzipped or not), which becomes the split `train`. Relative paths are looked up
            from the working directory, then from the project's folder.
        config (`str`, *optional*):
            Configuration of a Hub dataset.
        streaming (`bool`, *optional*, defaults to `False`):
            Whether to stream.
    """
    from datasets import load_dataset, load_from_disk

    path = next((p for p in (Path(name).expanduser(), ROOT / name) if p.exists()), None)
    if path is None:
        # What can only be a path is not looked for on the Hub, which would try several times and then speak of a Hub id.
        if name.startswith(("/", "./", "../", "~")) or name.removesuffix(".gz").endswith(tuple(FILE_TYPES)):
            raise ValueError(
                f"`dataset_name={name!r}`: there is no file or folder {name} in {Path.cwd()} or {ROOT}. Check the path; a "
                "dataset of the Hub has an id such as 'trl-lib/ultrafeedback_binarized'."
            )
        return load_dataset(name, name=config, streaming=streaming)
    if path.is_file():
        suffix = Path(path.stem if path.suffix == ".gz" else path.name).suffix
        if suffix not in FILE_TYPES:
            raise ValueError(f"`dataset_name={name!r}` is a file of an unknown type; known: {', '.join(FILE_TYPES)}.")
        return load_dataset(FILE_TYPES[suffix], data_files={"train": str(path)}, streaming=streaming)
    if (path / "dataset_dict.json").exists() or (path / "state.json").exists():
        return load_from_disk(str(path))
    return load_dataset(str(path), name=config, streaming=streaming)


def get_split(dataset, name: str, option: str):
    """The split `name` of a dataset, or its first rows: `test` or `test[:96]`."""
    match = re.fullmatch(r"([^\[]+)(?:\[:(\d+)\])?", name)
    if match is None or match[1] not in dataset:
        raise ValueError(
            f"`{option}={name!r}`: the dataset has {', '.join(map(repr, dataset))}. Give one of these, or its first rows "
            "as in 'test[:96]'."
        )
    split = dataset[match[1]]
    return split.take(int(match[2])) if match[2] else split


def checkpoint_to_resume(value: str | bool | None) -> str | bool | None:
    """`--resume_from_checkpoint` as `train` takes it: "true", for the last checkpoint in `output_dir`, arrives as a text."""
    return {"true": True, "false": None}.get(str(value).lower(), value)


def resolve_model(name: str) -> str:
    """The model's name as given, except that SmolLM2-135M-Instruct can also be had where the Hub cannot be reached."""
    from quickstart_model import BASE_MODEL, quickstart_model

    return quickstart_model() if name == BASE_MODEL else name


def compact_progress(trainer) -> None:
    """Replaces the trainer's log of some twenty numbers a line by a progress bar and the few that a first run needs."""
    from transformers.trainer_callback import PrinterCallback, ProgressCallback

    class CompactProgress(ProgressCallback):
        names = {"loss": "loss", "rewards/accuracies": "reward accuracy", "rewards/margins": "margin"}

        def on_log(self, args, state, control, logs=None, **kwargs):
            prefix = "eval_" if "eval_loss" in logs else ""
            parts = [f"{label} {logs[prefix + key]:6.3f}" for key, label in self.names.items() if prefix + key in logs]
            if parts and self.training_bar is not None:
                where = "held out" if prefix else "training"
                self.training_bar.write(f"  step {state.global_step:>4}  {where}  " + "   ".join(parts))

    for callback in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(callback)
    if not trainer.args.disable_tqdm:
        trainer.add_callback(CompactProgress())


def language_model_init_kwargs(training_args, model_args) -> dict:
    """What the command line says of how a language model is loaded."""
    return dict(
        revision=model_args.model_revision,
        trust_remote_code=training_args.trust_remote_code,
        attn_implementation=model_args.attn_implementation,
        dtype=model_args.dtype,
    )


def pipeline_init_kwargs(training_args, model_args) -> dict:
    """What the command line says of how a diffusion pipeline is loaded."""
    if model_args.attn_implementation is not None:
        raise ValueError(
            f"`--attn_implementation {model_args.attn_implementation}` has no effect on a diffusion pipeline. Leave it out."
        )
    # Without a dtype the trainer chooses: that of the mixed precision where the weights are frozen, else float32.
    dtype = {} if model_args.dtype is None else {"dtype": model_args.dtype}
    return {"revision": model_args.model_revision, **dtype}


def train(
    trainer_class,
    script_args,
    training_args,
    model_args,
    dataset_args,
    prepare=lambda split: split,
    init_kwargs=language_model_init_kwargs,
    **trainer_arguments,
) -> None:
    """
    Trains `trainer_class`, saves, and pushes where asked to, as `trl dpo` does with `DPOTrainer`. `prepare` is applied to
    each split of the data, `init_kwargs` says what the training and model arguments mean for loading the model; further
    arguments go to the trainer.
    """
    from trl import get_dataset, get_peft_config, get_quantization_config

    if model_args.model_name_or_path is None:
        raise ValueError("`--model_name_or_path` is required: a Hub id or a local folder.")
    if dataset_args.datasets and script_args.dataset_name:
        raise ValueError("Give either `datasets` or `dataset_name`, not both.")
    if not dataset_args.datasets and not script_args.dataset_name:
        raise ValueError("`--dataset_name` is required: a Hub id, a local folder or a JSONL file.")

    model_init_kwargs = init_kwargs(training_args, model_args)
    training_args.model_init_kwargs = {**model_init_kwargs, **(training_args.model_init_kwargs or {})}

    if dataset_args.datasets:
        dataset = get_dataset(dataset_args)
    else:
        dataset = load_preference_dataset(
            script_args.dataset_name, script_args.dataset_config, script_args.dataset_streaming
        )
    eval_dataset = None
    if training_args.eval_strategy != "no":
        eval_dataset = prepare(get_split(dataset, script_args.dataset_test_split, "dataset_test_split"))

    trainer = trainer_class(
        model=resolve_model(model_args.model_name_or_path),
        args=training_args,
        train_dataset=prepare(get_split(dataset, script_args.dataset_train_split, "dataset_train_split")),
        eval_dataset=eval_dataset,
        quantization_config=get_quantization_config(model_args),
        peft_config=get_peft_config(model_args),
        **trainer_arguments,
    )
    if os.environ.get("TRL_EXT_COMPACT_LOG"):
        compact_progress(trainer)
    # Said once, it holds for every card: a dataset read from files does not remember their path, nor a mixture its parts.
    trainer.create_model_card(dataset_name=script_args.dataset_name or [part.path for part in dataset_args.datasets])
    trainer.train(resume_from_checkpoint=checkpoint_to_resume(training_args.resume_from_checkpoint))
    trainer.save_model(training_args.output_dir)
    trainer.save_state()
    trainer.accelerator.print(f"Model saved to {training_args.output_dir}.")
    if training_args.push_to_hub:
        trainer.push_to_hub(dataset_name=script_args.dataset_name)
        trainer.accelerator.print(f"Model pushed to https://huggingface.co/{trainer.hub_model_id}.")
    trainer.end()


def make_parser(config_class, prog: str | None = None, model_config=None, more: tuple = ()):
    """
    The parser of `trl dpo`, with the method's configuration and `more` dataclasses of arguments: `--config some.yaml`,
    options override it. Its help shows the method's own options first, and those that it refuses last, with the reason.
    """
    from trl import DatasetMixtureConfig, ModelConfig, ScriptArguments, TrlParser

    refused = config_class.refused_options()

    class RecipeParser(getattr(config_class, "_parser_class", TrlParser)):
        def format_help(self) -> str:
            formatter = self._get_formatter()
            formatter.add_usage(self.usage, (), ())
            formatter.add_text(self.description)
            for title, names in help_sections(config_class, more, {action.dest for action in self._actions}).items():
                formatter.start_section(title)
                formatter.add_arguments([action for action in self._actions if action.dest in names])
                formatter.end_section()
            return formatter.format_help()

    parser = RecipeParser(
        (ScriptArguments, config_class, model_config or ModelConfig, DatasetMixtureConfig, *more),
        prog=prog,
        usage="%(prog)s [--config FILE] [options]",
        description="`--config FILE` reads options from a YAML file. Those on the command line override the file's.",
    )
    for action in parser._actions:
        if action.dest in refused:
            action.help = f"Refused: {refused[action.dest]}.".replace("%", "%%")
    return parser


def help_sections(config_class, more: tuple, options: set[str]) -> dict[str, set[str]]:
    """The sections of a recipe's help, in their order: title -> names of the options in it, all of `options` once."""
    from trl import DPOConfig

    from trl_ext import PreferenceConfig

    method = config_class.__name__.removesuffix("Config")
    own = f"{method}'s own options"
    extra = {(arguments.__doc__ or "").strip().partition("\n")[0]: arguments for arguments in more}
    preference, training = "preference training, for every method", "training, of Transformers"
    data, refused = "model and data", f"refused by {method}: leave them at their defaults"
    sections = {title: set() for title in (own, *extra, data, preference, training, refused)}

    names = {option.name for option in dataclasses.fields(config_class)}
    for name in options:
        owner = next((cls for cls in config_class.__mro__ if name in inspect.get_annotations(cls)), None)
        if name in config_class.refused_options():
            title = refused
        elif name not in names:
            title = next((title for title, cls in extra.items() if name in cls.__dataclass_fields__), data)
        elif name == "beta" or owner not in (PreferenceConfig, *DPOConfig.__mro__):
            title = own  # beta is TRL's by name and the method's by its meaning
        else:
            title = preference if owner in (PreferenceConfig, DPOConfig) else training
        sections[title].add(name)
    return sections


def pipeline_model_config():
    """[`~trl.ModelConfig`] with the `dtype` left open, which depends on what is trained."""
    from trl import ModelConfig

    @dataclass
    class PipelineConfig(ModelConfig):
        dtype: str | None = field(
            default=None,
            metadata={
                "help": "Type of the frozen denoiser and the text encoders. Defaults to that of the mixed precision with an "
                "adapter, to float32 otherwise. Of a QLoRA also the type that it computes in.",
                "choices": ["bfloat16", "float16", "float32"],
            },
        )

    return PipelineConfig


def embedded_default(method: str) -> list[str]:
    """Arguments of a run with nothing but the project: SmolLM2-135M and the pairs that ship with it."""
    import torch

    arguments = ["--config", str(ROOT / "recipes" / "configs" / method / "quickstart.yaml")]
    if torch.cuda.is_available():
        return arguments + ["--load_in_4bit", "true", "--dtype", "bfloat16", "--bf16", "true"]
    return arguments + ["--use_cpu", "true", "--bf16", "false"]


def command_line(method: str) -> list[str]:
    """The arguments of a recipe, or, where there are none, those of the embedded default."""
    import sys

    arguments = sys.argv[1:]
    if not arguments:
        configs = ROOT / "recipes" / "configs" / method
        if not (configs / "quickstart.yaml").exists():
            sys.exit(
                f"Give a configuration, for example `--config {next(iter(sorted(configs.glob('*_lora.yaml'))))}`, or "
                "`--model_name_or_path` and `--dataset_name`; `--help` lists all options."
            )
        arguments = embedded_default(method)
        if int(os.environ.get("LOCAL_RANK", 0)) == 0:
            print(f"No arguments: training the embedded default, {' '.join(arguments)}", flush=True)
    return arguments


def run(method: str, main, config_class, model_config=None) -> None:
    """Command line of a recipe. Without arguments it trains the embedded default, if the method has one."""
    # TRL's default sets, and TRL and PEFT read, what Transformers 5.23 calls `activation_checkpointing`.
    warnings.filterwarnings("ignore", message="`(is_)?gradient_checkpointing", category=FutureWarning)
    # Unknown keys of a configuration file are errors, where TRL's scripts ignore them.
    parser = make_parser(config_class, model_config=model_config)
    main(*parser.parse_args_and_config(command_line(method), fail_with_unknown_args=True))
