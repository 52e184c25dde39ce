"""The command `trl-ext evaluate`."""

import functools
import sys
import traceback
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from .output import ReportFolder


@dataclass
class CommandArguments:
    """Models, data and output folder of an evaluation. Options of the measurements are in [`EvaluationConfig`]."""

    model: list[str] = field(
        metadata={"help": "Models to evaluate: Hub ids or folders, of whole models or of adapters.", "nargs": "+"}
    )
    reference: str = field(metadata={"help": "Their reference: the model that training started from."})
    dataset: str = field(
        metadata={
            "help": "Preference pairs that nothing was trained on: a Hub id, a folder, or a JSONL, Parquet or CSV "
            "file."
        }
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of a Hub dataset."})
    split: str = field(
        default="test",
        metadata={"help": "Split of the dataset, or its first rows, as in 'test[:96]'; a single file is taken whole."},
    )
    judge: str | None = field(
        default=None,
        metadata={
            "help": "Who judges responses: FILE.py:FUNCTION or MODULE:FUNCTION (a reward function of yours), "
            "reward_model:ID_OR_FOLDER, or endpoint:MODEL@URL (OpenAI-compatible, its key in OPENAI_API_KEY). Without "
            "one there is no win rate."
        },
    )
    output_dir: str = field(
        default="evaluation",
        metadata={
            "help": "Folder for report.json and report.html, and for verdicts.jsonl, the answers of a judge "
            "that is paid: the same command reads them instead of asking again."
        },
    )
    dtype: str = field(
        default="float32",
        metadata={"help": "Precision of the models. bfloat16 is too coarse to rank responses of similar probability."},
    )
    device: str | None = field(default=None, metadata={"help": "Where models run; a CUDA device if there is one."})
    trust_remote_code: bool = field(default=False, metadata={"help": "Whether code that comes with a model may run."})

    def __post_init__(self):
        if self.dtype not in ("float32", "float64", "bfloat16", "float16"):
            raise ValueError(f"`dtype={self.dtype!r}`: give one of float32, float64, bfloat16, float16.")
        if len(set(self.model)) < len(self.model):
            raise ValueError(f"`model` names a model twice: {' '.join(self.model)}.")


def main(arguments: list[str]) -> int:
    import torch
    from datasets.exceptions import DatasetsError
    from safetensors import SafetensorError
    from transformers import AutoTokenizer, HfArgumentParser
    from transformers.utils import logging

    from ..judges.records import RecordedJudge
    from ..judges.verdicts import JudgeError
    from ..training.named_datasets import load_split
    from ..training.record_file import RecordError
    from .config import EvaluationConfig
    from .evaluate import evaluate_models
    from .loading import check_causal_lm, load_causal_lm, require
    from .output import ReportFolder

    # No abbreviations: `--model A --mode B` would be two ways to say the same.
    parser = HfArgumentParser((CommandArguments, EvaluationConfig), prog="trl-ext evaluate", allow_abbrev=False)
    output: ReportFolder | None = None

    try:
        command, config = parser.parse_args_into_dataclasses(joined(arguments))
        require("jinja2", "matplotlib", "scipy")
        logging.disable_progress_bar()
        dataset = load_split(command.dataset, command.split, command.dataset_config)
        judge = None if command.judge is None else _load_judge(command.judge, command.device)
        check = functools.partial(check_causal_lm, trust_remote_code=command.trust_remote_code)
        check(command.reference)
        tokenizer = AutoTokenizer.from_pretrained(command.reference, trust_remote_code=command.trust_remote_code)
        load = functools.partial(
            load_causal_lm,
            dtype=command.dtype,
            device=command.device,
            trust_remote_code=command.trust_remote_code,
        )
        output = ReportFolder(command.output_dir, {"dataset": command.dataset})
        output.prepare()
        if judge is not None and not judge.is_free:
            judge = RecordedJudge(judge, Path(command.output_dir, "verdicts.jsonl"))
            print(f"Verdicts: {judge.record.path} ({len(judge.record)} so far)", file=sys.stderr, flush=True)
        report = evaluate_models(
            {name: name for name in command.model},
            command.reference,
            dataset,
            tokenizer,
            judge,
            config,
            load=load,
            check=check,
            progress=lambda message: print(message, file=sys.stderr, flush=True),
            save=output.save,
        )
        # What was paid for and measured is shown and kept whatever happens from here on.
        _show(summary(report))
        problem = output.finish()
    except torch.OutOfMemoryError as error:
        return _failed(f"out of memory. Lower `--batch_size` or `--max_new_tokens`. {error}", output)
    except (ValueError, OSError, ImportError, JudgeError, RecordError, DatasetsError, SafetensorError) as error:
        return _failed(str(error), output)
    except (TypeError, KeyError) as error:  # most often of data in another form, which their texts alone do not say
        frame = traceback.extract_tb(error.__traceback__)[-1]
        return _failed(f"{type(error).__name__}: {error} ({frame.filename}, line {frame.lineno})", output)
    except Exception as error:
        traceback.print_exc()
        return _failed(f"{type(error).__name__}: {error}", output)
    if problem is not None:
        return _failed(problem, None)
    _show("Numbers: {}\nReport:  {}".format(*output.written))
    if isinstance(judge, RecordedJudge):
        _show(f"Verdicts: {judge.record.path}")
    if report["judge_failure"]:
        return _failed(f"the judge failed. {report['judge_failure']}", output)
    return 0


def _failed(message: str, output: "ReportFolder | None") -> int:
    print(f"trl-ext evaluate: {message}", file=sys.stderr)
    problem = None if output is None else output.finish()
    if problem is not None:
        print(f"trl-ext evaluate: {problem}", file=sys.stderr)
    elif output is not None and output.written:
        files = " and ".join(map(str, output.written))
        print(f"What was measured until then is in {files}.", file=sys.stderr)
    return 1


def _show(text: str) -> None:
    """Prints to standard output, in whose encoding there may be no such characters: names may hold lone surrogates."""
    encoding = sys.stdout.encoding or "utf-8"
    print(text.encode(encoding, "replace").decode(encoding))


def _load_judge(spec: str, device: str | None):
    """Loads a judge. An exception raised by its file or module is reported in one line, with its location."""
    from ..judges.loading import load_judge

    try:
        return load_judge(spec, device=device)
    except (ValueError, OSError) as error:
        if f"{spec!r}" in str(error):
            raise
        raise ValueError(f"`judge={spec!r}` cannot be loaded. {error}") from error
    except Exception as error:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        raise ValueError(
            f"`judge={spec!r}` cannot be loaded. {type(error).__name__}: {error} ({frame.filename}, line "
            f"{frame.lineno})"
        ) from error


def joined(arguments: list[str], several: tuple[str, ...] = ("model", "idealized_betas", "divergences")) -> list[str]:
    """
    Normalizes command-line arguments: hyphens in option names become underscores, as in TRL, and repeated uses of an
    option that takes several values are merged, since argparse would keep only the last.

    Raises:
        `ValueError`: For another option that is given twice.
    """
    options: dict[str, list[str]] = {"": []}
    current = ""
    for argument in arguments:
        if argument.startswith("--") and len(argument) > 2:
            name, equals, value = argument[2:].partition("=")
            current = name.replace("-", "_")
            if current in options and current not in several:
                raise ValueError(f"`--{current}` is given twice. Give it once.")
            options.setdefault(current, []).extend([value] if equals else [])
        else:
            options[current].append(argument)
    return [word for name, values in options.items() for word in ([f"--{name}"] if name else []) + values]


def summary(report: dict) -> str:
    """The main numbers as lines for a terminal."""
    from .report import format_number

    lines = []
    for name, result in report["models"].items():
        lines.append(name)
        rows = [
            ("ranking accuracy", result["ranking"]["accuracy"]),
            ("  of the reference", result["ranking"]["reference_accuracy"]),
            ("reward accuracy", result["ranking"]["reward_accuracy"]),
        ]
        if "divergence" in result:
            rows.append(("KL to the reference, nats", result["divergence"]["kl"]))
        if "win_rate" in result:
            rows.append((f"win rate over {report['config']['opponent']}", result["win_rate"]["win_rate"]))
            rows.append(("  length controlled", result["win_rate"]["length_controlled"]["win_rate"]))
        for label, estimate in rows:
            value, low, high = (format_number(estimate[name]) for name in ("value", "low", "high"))
            lines.append(f"  {label:<28}{value:>9}   [{low}, {high}]")
    return "\n".join(lines)
