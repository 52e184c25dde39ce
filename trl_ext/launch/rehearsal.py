"""`trl-ext rehearsal`: which prompts a model masters, and answers to them for DPH-RL to rehearse."""

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from .._checks import NOT_EMPTY, above, at_least, between, check_fields
from .rollout import load_rewards


PROG = "trl-ext rehearsal"


@dataclass
class RehearsalCommandArguments:
    """
    Which model answers which prompts, and what is right.

    Raises:
        `ValueError`: If an option has a wrong type or is out of its range.
    """

    model_name_or_path: Annotated[str, NOT_EMPTY] = field(metadata={"help": "The model that training starts from."})
    dataset_name: Annotated[str, NOT_EMPTY] = field(
        metadata={"help": "Prompts: a Hub id, a folder, or a JSONL, JSON, Parquet or CSV file with a column `prompt`."}
    )
    reward: Annotated[list[str], NOT_EMPTY] = field(
        metadata={
            "help": "Reward functions: FILE.py:FUNCTION or MODULE:FUNCTION, such as trl.rewards:accuracy_reward.",
            "nargs": "+",
        }
    )
    reward_weights: list[float] | None = field(
        default=None, metadata={"help": "One weight a reward function; 1 by default.", "nargs": "+"}
    )
    reward_threshold: float | None = field(
        default=None,
        metadata={"help": "Least reward of a right answer. Default: the largest reward of any answer."},
    )
    output_dir: Annotated[str, NOT_EMPTY] = field(
        default="rehearsal",
        metadata={
            "help": "Folder for exploration.jsonl, near_perfect.jsonl, rehearsal.jsonl and report.json. What was "
            "sampled is kept in `cache` in it: a killed run resumes from there."
        },
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of a Hub dataset."})
    split: Annotated[str, NOT_EMPTY] = field(
        default="train", metadata={"help": "Split of the prompts, or its first rows, as in 'train[:1000]'."}
    )
    samples: Annotated[int, at_least(1)] = field(
        default=8, metadata={"help": "Answers to each prompt that decide whether it is mastered."}
    )
    threshold: Annotated[float, between(0, 1, "(]")] = field(
        default=1.0, metadata={"help": "Share of right answers from which a prompt is mastered."}
    )
    extra: Annotated[int, at_least(1)] = field(
        default=1, metadata={"help": "Further answers to each mastered prompt: the right ones are rehearsed."}
    )
    drop_hopeless: bool = field(
        default=False, metadata={"help": "Leave prompts without a right answer out of exploration.jsonl."}
    )
    max_completion_length: Annotated[int, at_least(1)] = field(
        default=512, metadata={"help": "Tokens of an answer at most."}
    )
    temperature: Annotated[float, above(0)] = field(default=1.0, metadata={"help": "Divides the logits."})
    top_p: Annotated[float, between(0, 1, "(]")] = field(
        default=1.0, metadata={"help": "Samples the most likely tokens with this share of the probability."}
    )
    top_k: Annotated[int, at_least(0)] = field(
        default=0, metadata={"help": "Samples this many of the most likely tokens; 0 for all."}
    )
    batch_size: Annotated[int, at_least(1)] = field(default=32, metadata={"help": "Answers sampled at once."})
    dtype: str = field(
        default="float32",
        metadata={"help": "Precision of the model.", "choices": ["float32", "bfloat16", "float16"]},
    )
    device: str | None = field(default=None, metadata={"help": "Where the model runs; a CUDA device if there is one."})
    trust_remote_code: bool = field(default=False, metadata={"help": "Whether code that comes with a model may run."})
    seed: Annotated[int, between(0, 2**63 - 1)] = field(default=42, metadata={"help": "Seed of the answers."})

    def __post_init__(self):
        check_fields(self)


def run(arguments: RehearsalCommandArguments, write: Callable[[str], Any]) -> dict[str, Any]:
    """Loads, samples, and writes what the arguments ask for; returns the report."""
    from accelerate import PartialState
    from transformers import AutoTokenizer

    from ..dph_rl import collect_rehearsal
    from ..evaluation.loading import load_causal_lm
    from ..rollout import AnswerOptions
    from ..training.named_datasets import get_split, load_named_dataset

    rewards = load_rewards(arguments.reward)
    dataset = load_named_dataset(arguments.dataset_name, arguments.dataset_config)
    rows = get_split(dataset, arguments.split, "split")
    state = PartialState(cpu=arguments.device == "cpu")
    device = arguments.device or (str(state.device) if state.num_processes > 1 else None)
    model = load_causal_lm(
        arguments.model_name_or_path,
        dtype=arguments.dtype,
        device=device,
        trust_remote_code=arguments.trust_remote_code,
    )
    tokenizer = AutoTokenizer.from_pretrained(
        arguments.model_name_or_path, trust_remote_code=arguments.trust_remote_code
    )
    folder = Path(arguments.output_dir).expanduser()
    result = collect_rehearsal(
        model,
        tokenizer,
        rows,
        rewards,
        samples=arguments.samples,
        threshold=arguments.threshold,
        extra=arguments.extra,
        reward_weights=arguments.reward_weights,
        reward_threshold=arguments.reward_threshold,
        drop_hopeless=arguments.drop_hopeless,
        options=AnswerOptions(
            max_completion_length=arguments.max_completion_length,
            temperature=arguments.temperature,
            top_p=arguments.top_p,
            top_k=arguments.top_k,
            seed=arguments.seed,
            batch_size=arguments.batch_size,
        ),
        cache_dir=folder / "cache",
        show_progress=True,
    )
    report = {
        "prompts": len(rows),
        "reward_threshold": result.rates.reward_threshold,
        "samples": arguments.samples,
        "histogram": result.rates.histogram(),
        **{name: len(getattr(result, name)) for name in ("exploration", "near_perfect", "rehearsal")},
    }
    if state.is_main_process:
        for name in ("exploration", "near_perfect", "rehearsal"):
            getattr(result, name).to_json(folder / f"{name}.jsonl", force_ascii=False)
        (folder / "report.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
        write(result.rates.describe())
        write(
            f"{report['near_perfect']} of {len(rows)} prompts are mastered, {report['exploration']} are left to train "
            f"on, {report['rehearsal']} answers to rehearse. Written to {folder}."
        )
    state.wait_for_everyone()
    return report


def main(arguments: list[str], write: Callable[[str], Any] = print) -> int:
    from datasets.exceptions import DatasetsError
    from safetensors import SafetensorError
    from trl import TrlParser

    from ..judges import JudgeError
    from .configurations import with_configuration

    parser = TrlParser([RehearsalCommandArguments], prog=PROG, allow_abbrev=False)
    try:
        (parsed,) = parser.parse_args_and_config(with_configuration(arguments, "rehearsal"))
        run(parsed, write)
    except (ValueError, OSError, ImportError, JudgeError, DatasetsError, SafetensorError) as error:
        print(f"{PROG}: {error}", file=sys.stderr)
        return 1
    return 0
