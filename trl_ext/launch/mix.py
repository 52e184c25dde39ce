"""`trl-ext mix`: weights for policies aligned apart, a report, and the mixture's samples or merged adapter."""

import dataclasses
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from .._checks import NOT_EMPTY, above, at_least, between, check_fields
from .configurations import with_configuration
from .mix_loading import load_policies, load_prompts, load_rewards, resolve_betas


PROG = "trl-ext mix"


@dataclass
class MixArguments:
    """
    Which policies are mixed, on which prompts, and what is made of the mixture.

    Raises:
        `ValueError`: If an option has a wrong type, is out of its range, or does not fit another one.
    """

    policy: Annotated[list[str], NOT_EMPTY] = field(
        metadata={
            "help": "Two policies or more: adapters of one base, or models of one vocabulary. Hub ids or folders.",
            "nargs": "+",
        }
    )
    dataset: Annotated[str, NOT_EMPTY] = field(
        metadata={"help": "Prompts: a Hub id, a folder, or a JSONL, JSON, Parquet or CSV file with a column `prompt`."}
    )
    base: Annotated[str | None, NOT_EMPTY] = field(
        default=None,
        metadata={
            "help": "The reference: the model that all policies were trained from. Adapters name theirs themselves."
        },
    )
    output_dir: Annotated[str, NOT_EMPTY] = field(
        default="mixture", metadata={"help": "Folder for weights.json, report.json and report.md."}
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of a Hub dataset."})
    split: Annotated[str, NOT_EMPTY] = field(
        default="train", metadata={"help": "Split whose prompts the weights are solved on, or its first rows."}
    )
    num_prompts: Annotated[int, at_least(1)] = field(
        default=64, metadata={"help": "Prompts that the weights are solved on, the first distinct ones."}
    )
    responses: Annotated[int, at_least(2)] = field(default=8, metadata={"help": "Responses to each prompt."})
    max_new_tokens: Annotated[int, at_least(1)] = field(
        default=64, metadata={"help": "Longest response, in tokens. Fewer responses count the longer they are."}
    )
    method: str = field(
        default="auto",
        metadata={
            "help": "What is sampled for the weights: the reference, the mixture, or the mixture where too few "
            "responses of the reference count.",
            "choices": ["auto", "reference", "mixture"],
        },
    )
    weights: list[float] | None = field(
        default=None, metadata={"help": "Given weights, one a policy, in place of solving for them.", "nargs": "+"}
    )
    beta: Annotated[float | None, above(0)] = field(
        default=None,
        metadata={
            "help": "Beta that the policies were trained with, the scale of the objectives. By default what is saved "
            "beside them, or 0.1."
        },
    )
    betas: list[float] | None = field(
        default=None, metadata={"help": "One beta a policy, if they differ; brought to `beta`.", "nargs": "+"}
    )
    test_split: str | None = field(
        default=None,
        metadata={
            "help": "Split whose prompts policies and mixtures are measured on; without it nothing is measured."
        },
    )
    num_test_prompts: Annotated[int, at_least(1)] = field(
        default=64, metadata={"help": "Prompts of `test_split` that are measured on."}
    )
    reward: list[str] | None = field(
        default=None,
        metadata={
            "help": "Rewards to measure besides the objectives: FILE.py:FUNCTION, MODULE:FUNCTION, or "
            "reward_model:ID_OR_FOLDER.",
            "nargs": "+",
        },
    )
    merge: bool = field(
        default=False,
        metadata={"help": "Also write the linear merge of the adapters, and measure its distance from the mixture."},
    )
    num_samples: Annotated[int, at_least(0)] = field(
        default=0, metadata={"help": "Prompts whose response by the mixture goes to samples.jsonl."}
    )
    candidates: Annotated[int, at_least(1)] = field(
        default=8, metadata={"help": "Candidates of each of these responses, of which one is drawn by exact weights."}
    )
    batch_size: Annotated[int, at_least(1)] = field(default=8, metadata={"help": "Responses in a forward."})
    cache_dir: str | None = field(
        default=None,
        metadata={
            "help": "Folder that keeps samples and scores; `cache` in `output_dir` by default. A killed run "
            "resumes from it."
        },
    )
    dtype: str = field(
        default="float32",
        metadata={"help": "Precision of the models.", "choices": ["float32", "float64", "bfloat16", "float16"]},
    )
    load_in_4bit: bool = field(
        default=False,
        metadata={"help": "Hold models in 4 bits (NF4), as policies that were trained with QLoRA had their base."},
    )
    device: str | None = field(default=None, metadata={"help": "Where models run; a CUDA device if there is one."})
    trust_remote_code: bool = field(default=False, metadata={"help": "Whether code that comes with a model may run."})
    seed: Annotated[int, between(0, 2**63 - 1)] = field(default=0, metadata={"help": "Seed of the samples."})

    def __post_init__(self):
        check_fields(self)
        if len(self.policy) < 2:
            raise ValueError(f"`policy` must name two policies or more, got {self.policy}.")
        if len(set(self.policy)) < len(self.policy):
            raise ValueError(f"`policy` names a policy twice: {' '.join(self.policy)}.")
        for name, values in (("weights", self.weights), ("betas", self.betas)):
            if values is not None and len(values) != len(self.policy):
                raise ValueError(f"`{name}` must hold one number a policy, {len(self.policy)}, got {len(values)}.")
        if self.weights is not None and (min(self.weights) < 0 or abs(sum(self.weights) - 1) > 1e-6):
            raise ValueError(f"`weights` must not be below 0 and must sum to 1, got {self.weights}.")
        if self.weights is not None and self.betas is not None:
            raise ValueError("`betas` has no effect with `weights`, which are not solved for. Leave one of them out.")
        if self.reward is not None and self.test_split is None:
            raise ValueError("`reward` is measured on the prompts of `test_split`. Give it too.")


def run(arguments: MixArguments, write: Callable[[str], Any]) -> dict:
    """Loads, solves, measures and writes what the arguments ask for; returns the report."""
    from ..mixing import (
        AlignedPolicies,
        MixtureWeights,
        Policy,
        PolicyMixture,
        measure_policies,
        solve_mixture_weights,
    )
    from ..training.output_folder import check_writable

    folder = Path(arguments.output_dir).expanduser()
    check_writable(folder, ("weights.json", "report.json", "report.md", "samples.jsonl"))
    prompts = load_prompts(arguments, arguments.split, arguments.num_prompts)
    rewards = load_rewards(arguments.reward, arguments.device)
    beta = resolve_betas(arguments.policy, arguments.beta, arguments.betas)
    loaded = load_policies(arguments)
    if arguments.merge and loaded.adapters is None:
        raise ValueError("`merge` is for adapters of one base; these policies are models of their own.")
    policies = AlignedPolicies(
        loaded.model,
        processing_class=loaded.tokenizer,
        adapters=loaded.adapters,
        reference=loaded.reference,
        responses=arguments.responses,
        max_new_tokens=arguments.max_new_tokens,
        batch_size=arguments.batch_size,
        seed=arguments.seed,
        cache_dir=arguments.cache_dir or folder / "cache",
    )
    report: dict[str, Any] = {"policies": dict(zip(loaded.names, arguments.policy, strict=True))}
    report["settings"] = dataclasses.asdict(arguments) | {"beta": beta}
    weights = arguments.weights
    if weights is None:
        solved = solve_mixture_weights(policies, prompts, method=arguments.method, beta=beta, betas=arguments.betas)
        weights = solved.weights
        solved.save(folder / "weights.json")
        report["weights"] = dataclasses.asdict(solved)
        write(describe_weights(loaded.names, solved))
    else:
        report["weights"] = {"weights": weights}
    mixture = policies.mixture(weights)
    named = {"mixture": mixture}
    if arguments.merge:
        mixture.merge("merged")
        loaded.model.save_pretrained(str(folder), selected_adapters=["merged"])
        named["merged"] = PolicyMixture.of_one(Policy(loaded.model, "merged", True))
    if arguments.test_split is not None:
        count = len(weights)
        others = {"reference": policies.reference_mixture()}
        for k, name in enumerate(loaded.names):
            others[name] = policies.mixture([float(j == k) for j in range(count)])
        others["uniform mixture"] = policies.mixture([1 / count] * count)
        measured = measure_policies(
            policies,
            load_prompts(arguments, arguments.test_split, arguments.num_test_prompts),
            others | named,
            beta=beta,
            rewards=rewards,
            distance_of="mixture",
        )
        report["measurements"] = {name: dataclasses.asdict(found) for name, found in measured.items()}
        write(table(loaded.names, report["measurements"]))
    elif arguments.merge:
        measured = measure_policies(policies, prompts, named, beta=beta, distance_of="mixture")
        distance = measured["merged"].distance
        assert distance is not None  # a single policy has one
        report["distance of the merged adapter"] = dataclasses.asdict(distance)
        write(
            f"KL of the mixture to the merged adapter: {distance.value:.3f} [{distance.low:.3f}, {distance.high:.3f}] "
            "nats a response, on the prompts of the solution."
        )
    (folder / "report.json").write_text(json.dumps(report, indent=2) + "\n")
    page = markdown(loaded.names, report, MixtureWeights)
    (folder / "report.md").write_text(page, encoding="utf-8", errors="replace")
    if arguments.num_samples:
        write_samples(folder / "samples.jsonl", policies, mixture, prompts[: arguments.num_samples], arguments)
    write(f"Written to {folder}: {', '.join(sorted(p.name for p in folder.iterdir() if p.name != 'cache'))}")
    return report


def write_samples(path: Path, policies, mixture, prompts: list, arguments: MixArguments) -> None:
    """One response of the mixture to each prompt, drawn from `candidates` by their exact weights."""
    import torch

    from ..training.record_file import format_entry
    from ..training.sampling import end_token_ids

    tokenizer = policies.processing_class
    with path.open("wb") as file:
        for number, prompt in enumerate(prompts):
            ids = torch.tensor([policies.prompt_ids(prompt)])
            found = mixture.generate(
                ids,
                max_new_tokens=arguments.max_new_tokens,
                candidates=arguments.candidates,
                eos_token_id=end_token_ids(policies.base.model, tokenizer),
                pad_token_id=tokenizer.pad_token_id,
                generator=torch.Generator(mixture.device).manual_seed(arguments.seed + number),
            )
            row = {
                "prompt": prompt,
                "completion": tokenizer.decode(found.completion_ids[0], skip_special_tokens=True),
                "log_weights": found.log_weights[0].tolist(),
                "effective_candidates": found.effective_size.item(),
            }
            file.write(format_entry(row))


# ---- Reporting ------------------------------------------------------------------------------------------------------


def describe_weights(names: list[str], solved) -> str:
    """The weights with their intervals, as lines for a terminal."""
    lines = ["weights"]
    for name, weight, (low, high) in zip(names, solved.weights, solved.intervals, strict=True):
        lines.append(f"  {name:<30}{weight:8.3f}   [{low:.3f}, {high:.3f}]")
    lines.append(
        f"  from {solved.num_prompts} prompts x {solved.num_responses} responses of the {solved.source}; "
        f"{solved.effective_size:.1f} of {solved.num_responses} count at the median prompt"
    )
    if solved.undetermined:
        lines.append("  An interval covers nearly all of [0, 1]: the policies hardly differ on these prompts.")
    return "\n".join(lines)


def _shown(estimate: dict | None) -> str:
    return "" if estimate is None else f"{estimate['value']:.3f} [{estimate['low']:.3f}, {estimate['high']:.3f}]"


def table(names: list[str], measurements: dict[str, dict]) -> str:
    """What was measured, as a Markdown table."""
    rewards = list(next(iter(measurements.values()))["rewards"])
    heads = ["", *(f"objective of {name}" for name in names), "smallest", "KL", "tokens", *rewards]
    heads.append("KL of the mixture to it")
    rows = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for name, found in measurements.items():
        cells = [name, *map(_shown, found["objectives"]), _shown(found["smallest"]), _shown(found["kl"])]
        cells += [_shown(found["length"]), *(_shown(found["rewards"][reward]) for reward in rewards)]
        rows.append("| " + " | ".join([*cells, _shown(found["distance"])]) + " |")
    return "\n".join(rows)


def markdown(names: list[str], report: dict, weights_class: type) -> str:
    """The report as a page."""
    parts = ["# Mixture of policies", ""]
    parts += [f"- {name}: `{path}`" for name, path in report["policies"].items()]
    found = report["weights"]
    if len(found) > 1:
        parts += ["", "```", describe_weights(names, weights_class(**found)), "```"]
    else:
        parts += ["", f"Given weights: {found['weights']}"]
    if "measurements" in report:
        parts += ["", "Objectives are `E[beta L] - beta KL`, with 95 % bootstrap intervals over prompts.", ""]
        parts.append(table(names, report["measurements"]))
    return "\n".join(parts) + "\n"


def main(arguments: list[str], write: Callable[[str], Any] = print) -> int:
    from datasets.exceptions import DatasetsError
    from safetensors import SafetensorError
    from trl import TrlParser

    from ..evaluation.command import joined
    from ..judges import JudgeError

    parser = TrlParser([MixArguments], prog=PROG, allow_abbrev=False)
    try:
        words = joined(with_configuration(arguments, "mix"), ("policy", "weights", "betas", "reward"))
        (parsed,) = parser.parse_args_and_config(words)
        run(parsed, write)
    except (ValueError, OSError, ImportError, JudgeError, DatasetsError, SafetensorError) as error:
        print(f"{PROG}: {error}", file=sys.stderr)
        return 1
    return 0
