"""Messages of a run to the terminal, besides the trainer's log."""

import json
import os
import shlex
import sys
from pathlib import Path


# Set by `trl-ext` for the processes that it launches: the words that the user typed.
COMMAND_VARIABLE = "TRL_EXT_COMMAND"

# Values of these options are not repeated on the terminal, whose output ends up in log files.
_SECRETS = ("hub_token", "push_to_hub_token", "token")


def is_main_process() -> bool:
    """Whether this is the main process, read from the environment before anything is initialized."""
    return int(os.environ.get("RANK", os.environ.get("LOCAL_RANK", "0"))) == 0


def say(text: str) -> None:
    """Prints to standard error, once for all processes."""
    if is_main_process():
        print(text, file=sys.stderr, flush=True)


def typed_command() -> list[str]:
    """The command that started this run, including the launcher, as far as it can be determined."""
    if COMMAND_VARIABLE in os.environ:
        return json.loads(os.environ[COMMAND_VARIABLE])
    script, *arguments = sys.argv
    if Path(script).name in ("trl-ext", "__main__.py", "cli.py"):
        return ["trl-ext", *arguments]
    return _launcher_words(script) or ["python", script, *arguments]


def _launcher_words(script: str) -> list[str] | None:
    """`accelerate launch ...` or `torchrun ...`, read off the parent processes; `None` if there is no such parent."""
    try:
        import psutil

        lines = [process.cmdline() for process in psutil.Process().parents()]
    except Exception:  # psutil raises errors of its own where processes cannot be read
        return None
    for words in lines:
        if script not in words:
            continue
        for i, word in enumerate(words[: words.index(script)]):
            name = Path(word).name
            if name in ("accelerate", "accelerate.commands.accelerate_cli") and words[i + 1] == "launch":
                return ["accelerate", "launch", *words[i + 2 :]]
            if name in ("torchrun", "torch.distributed.run", "accelerate-launch"):
                return [name if name != "torch.distributed.run" else "torchrun", *words[i + 1 :]]
    return None


def resume_command(words: list[str]) -> str:
    """The command that continues a run that was started with `words`."""
    kept, skip = [], False
    for i, word in enumerate(words):
        if skip:
            skip = False
            continue
        name = word.partition("=")[0].lstrip("-").replace("-", "_") if word.startswith("--") else ""
        follows = i + 1 < len(words) and not words[i + 1].startswith("--")
        if name in ("resume_from_checkpoint", "overwrite_output_dir"):
            skip = "=" not in word and follows
        elif name in _SECRETS:
            skip = "=" not in word and follows
            kept += [f"--{name}", "<hidden>"]
        else:
            kept.append(word)
    return shlex.join([*kept, "--resume_from_checkpoint", "true"]).replace("'<hidden>'", "...")


def how_to_resume(trainer) -> str:
    """Describes where a run stopped and how to continue it."""
    state, output_dir = trainer.state, Path(trainer.args.output_dir)
    where = f"The run stopped at step {state.global_step} of {state.max_steps}."
    checkpoint = trainer.last_whole_checkpoint()
    command = f"\n\n    {resume_command(typed_command())}\n"
    if checkpoint is not None:
        return f"{where} Its last complete checkpoint is {checkpoint}. Continue with{command}"
    ledger = getattr(getattr(trainer, "gold", None), "path", None)
    if ledger is not None and Path(ledger).exists():
        return (
            f"{where} There is no checkpoint yet. The labels in {ledger} are kept and used again: continue with"
            f"{command}"
        )
    every = (
        "" if trainer.args.save_strategy == "no" else f" The first would be written at step {trainer.args.save_steps}."
    )
    return f"{where} It has no complete checkpoint in {output_dir}, so it can only be started again.{every}"


def compact_progress(trainer) -> None:
    """
    Replaces the trainer's log of some twenty numbers per line with a progress bar and the few that a first run needs.
    """
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
