"""A training run from the command line, like `trl dpo`, for every method in the table."""

import json
import os
import signal
import sys
import threading
import traceback
import warnings
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from . import console
from .configurations import find_accelerate_configuration
from .options import UsageError, parse, without_arguments


if TYPE_CHECKING:
    from .commands import Method
    from .scripts import Script

_PACKAGE = Path(__file__).resolve().parent.parent


class Terminated(KeyboardInterrupt):
    """SIGTERM, which schedulers send before they kill."""


def run_method(method: "Method", arguments: list[str], prog: str) -> int:
    """
    Trains a method with the arguments of a command line.

    Args:
        method ([`~trl_ext.launch.commands.Method`]):
            Row of the table.
        arguments (`list[str]`):
            The arguments after its name.
        prog (`str`):
            Name of the program, for messages.

    Returns:
        `int`: The exit status: 0, 1 for an error, 2 for invalid arguments, 130 or 143 if interrupted.
    """
    # TRL's default sets, and TRL and PEFT read, what Transformers 5.23 calls `activation_checkpointing`.
    warnings.filterwarnings("ignore", message="`(is_)?gradient_checkpointing", category=FutureWarning)
    if not arguments:
        print(without_arguments(method, prog), file=sys.stderr)
        return 2
    try:
        launch = launch_arguments(arguments)
        if launch is not None:
            return relaunch(method, *launch)
        script, parsed = parse(method, arguments, prog)
        check_arguments(*parsed)
    except (UsageError, ImportError) as error:
        console.say(f"{prog}: {error}")
        return 2

    from .curves import CurvesCallback

    trainer = None
    output_dir = Path(parsed[1].output_dir)
    existed = output_dir.exists()
    try:
        with _sigterm_interrupts():
            trainer = make_trainer(script, *parsed)
            if parsed[4].dry_run:
                from .dry_run import describe

                print(describe(trainer, script))
                if not existed:
                    with suppress(OSError):  # with something in it, it stays
                        output_dir.rmdir()
            else:
                trainer.add_callback(CurvesCallback(script.method.title))
                train(trainer, *parsed)
        trainer.end()
        return 0
    except (KeyboardInterrupt, Exception) as error:
        status = _report(error, prog)
        if trainer is not None and trainer.state.max_steps > 0:
            for callback in trainer.callback_handler.callbacks:
                if isinstance(callback, CurvesCallback):
                    callback.draw(trainer.args, trainer.state)
            console.say(console.how_to_resume(trainer))
        if int(os.environ.get("WORLD_SIZE", 1)) > 1:
            # The other processes may be waiting for this one inside a collective: nothing here may wait for them.
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
        return status


# ---- Starting several processes -------------------------------------------------------------------------------------


def launch_arguments(arguments: list[str]) -> tuple[list[str], list[str]] | None:
    """
    Returns the arguments of `accelerate launch` and the remaining ones if the run should start several processes: with
    `--accelerate_config` or `--num_processes`, or if there are several GPUs. Returns `None` if this process trains.

    Raises:
        [`UsageError`]: For a launch option in a process that was already launched.
    """
    launch: list[str] = []
    rest: list[str] = []
    words = iter(arguments)
    for word in words:
        name, equals, value = word.partition("=")
        option = name.replace("-", "_").removeprefix("__")
        if not name.startswith("--") or option not in ("accelerate_config", "num_processes"):
            rest.append(word)
            continue
        value = value if equals else next(words, "")
        try:
            if option == "num_processes":
                launch += ["--num_processes", str(int(value))]
            else:
                launch += ["--config_file", str(find_accelerate_configuration(value))]
        except ValueError as error:
            raise UsageError(
                error if option == "accelerate_config" else f"`--{option} {value}`: not a number."
            ) from None
    launched = "LOCAL_RANK" in os.environ or "ACCELERATE_MIXED_PRECISION" in os.environ
    if launched:
        if launch:
            raise UsageError(
                f"{launch[0]} is for `accelerate launch`, which started this process: give it before the script's "
                "name."
            )
        return None
    if not launch and not {"-h", "--help", "--help-all", "--help_all", "--dry_run"} & set(arguments):
        launch = ["--num_processes", str(count)] if (count := _gpu_count()) > 1 else []
    return (launch, rest) if launch else None


def _gpu_count() -> int:
    import torch

    return torch.cuda.device_count()


def relaunch(method: "Method", launch: list[str], rest: list[str]) -> int:
    """`accelerate launch` with this method and these arguments."""
    from accelerate.commands.launch import launch_command, launch_command_parser

    os.environ[console.COMMAND_VARIABLE] = json.dumps(console.typed_command())
    launch_command(launch_command_parser().parse_args([*launch, "--module", "trl_ext", method.name, *rest]))
    return 0


# ---- The run --------------------------------------------------------------------------------------------------------


def check_arguments(script_args, training_args, model_args, dataset_args, *more) -> None:
    """
    Raises [`UsageError`] for arguments that are missing or exclude each other, `ImportError` for a missing extra.
    """
    from ..training.extras import require_extra

    if model_args.model_name_or_path is None:
        raise UsageError("`--model_name_or_path` is required: a Hub id or a local folder.")
    if model_args.load_in_4bit or model_args.load_in_8bit:
        require_extra("quantization", "A quantized model", "bitsandbytes")
    if dataset_args.datasets and script_args.dataset_name:
        raise UsageError("Give either `datasets` or `dataset_name`, not both.")
    if not dataset_args.datasets and not script_args.dataset_name:
        raise UsageError("`--dataset_name` is required: a Hub id, a local folder, or a JSONL, Parquet or CSV file.")


def load_data(script_args, training_args, dataset_args, prepare=lambda split: split):
    """The training split and the evaluation split (`None` without evaluation), each as the trainer takes it."""
    from trl import get_dataset

    from ..training.named_datasets import get_split, load_named_dataset

    if dataset_args.datasets:
        dataset = get_dataset(dataset_args)
    else:
        dataset = load_named_dataset(
            script_args.dataset_name, script_args.dataset_config, script_args.dataset_streaming
        )
    train_dataset = prepare(get_split(dataset, script_args.dataset_train_split, "dataset_train_split"))
    if training_args.eval_strategy == "no":
        return train_dataset, None
    return train_dataset, prepare(get_split(dataset, script_args.dataset_test_split, "dataset_test_split"))


def make_trainer(script: "Script", script_args, training_args, model_args, dataset_args, run_args, *more):
    """Loads everything and builds the trainer that the arguments describe."""
    import torch
    from trl import get_peft_config, get_quantization_config

    model_init_kwargs = script.model_init_kwargs(training_args, model_args)
    training_args.model_init_kwargs = {**model_init_kwargs, **(training_args.model_init_kwargs or {})}
    script.complete(script_args, training_args)
    train_dataset, eval_dataset = load_data(script_args, training_args, dataset_args, script.prepare)
    if run_args.dry_run:
        from .dry_run import without_long_work

        script.raw = train_dataset
        without_long_work(training_args)
    trainer = script.method.trainer_class(
        model=model_args.model_name_or_path,
        args=training_args,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        quantization_config=get_quantization_config(model_args),
        peft_config=get_peft_config(model_args),
        **script.trainer_arguments(*more),
    )
    if script_args.ignore_bias_buffers:  # as in TRL's scripts
        trainer.model._ddp_params_and_buffers_to_ignore = [
            name for name, buffer in trainer.model.named_buffers() if buffer.dtype == torch.bool
        ]
    if os.environ.get("TRL_EXT_COMPACT_LOG"):
        console.compact_progress(trainer)
    return trainer


def train(trainer, script_args, training_args, model_args, dataset_args, *more) -> None:
    """Trains, saves, and pushes if asked to, as `trl dpo` does."""
    # A dataset read from files does not record their path, nor a mixture its parts.
    trainer.state_card_details(dataset_name=script_args.dataset_name or [part.path for part in dataset_args.datasets])
    trainer.train(resume_from_checkpoint=checkpoint_to_resume(training_args.resume_from_checkpoint))
    trainer.save_model(training_args.output_dir)
    trainer.save_state()
    trainer.accelerator.print(f"Model saved to {training_args.output_dir}.")
    if training_args.push_to_hub:
        trainer.push_to_hub(dataset_name=script_args.dataset_name)
        trainer.accelerator.print(f"Model pushed to https://huggingface.co/{trainer.hub_model_id}.")


def checkpoint_to_resume(value: str | bool | None) -> str | bool | None:
    """
    `--resume_from_checkpoint` as `train` takes it: "true", for the last checkpoint in `output_dir`, arrives as a text.
    """
    return {"true": True, "false": None}.get(str(value).lower(), value)


# ---- Errors and interruptions ---------------------------------------------------------------------------------------


@contextmanager
def _sigterm_interrupts():
    """Turns SIGTERM into an exception, so that the run can print how to continue it."""

    def interrupt(number, frame):
        raise Terminated

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def _report(error: BaseException, prog: str) -> int:
    """Prints an error and returns the exit status. Errors raised by this project are shown without a traceback."""
    if isinstance(error, KeyboardInterrupt):
        console.say("\nInterrupted.")
        return 143 if isinstance(error, Terminated) else 130
    frames = traceback.extract_tb(error.__traceback__)
    ours = Path(frames[-1].filename).is_relative_to(_PACKAGE) if frames else False
    process = "" if int(os.environ.get("WORLD_SIZE", 1)) == 1 else f" (process {os.environ.get('RANK', '0')})"
    if ours and isinstance(error, (ValueError, TypeError, ImportError, FloatingPointError, RuntimeError)):
        # Errors speak to the caller of the trainer. Here that is a command line.
        text = str(error).replace("`trainer.train(resume_from_checkpoint=True)`", "`--resume_from_checkpoint true`")
        print(f"{prog}{process}: {text}", file=sys.stderr)
    else:
        traceback.print_exception(error)
    return 1


def main(method: str, arguments: list[str], prog: str | None = None) -> None:
    """Entry point of the recipes: trains, and exits with the status."""
    from .commands import METHODS

    status = run_method(METHODS[method], arguments, prog or Path(sys.argv[0]).name)
    if status:
        sys.exit(status)
