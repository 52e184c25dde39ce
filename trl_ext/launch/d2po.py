"""
`trl-ext d2po`: builds the labeler, extracts prompts from datasets of pairs, and loads pairs for the discriminator.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .scripts import Script


@dataclass
class GoldArguments:
    """
    Where gold labels come from.

    Args:
        gold (`str`, *optional*, defaults to `"judge"`):
            `"judge"`, `"reward_model"`, `"terminal"`, or a task: `"word_collector"`, `"unique_nouns"`,
            `"math_expansion"`, `"film_sentiment"`. Also what `trl-ext evaluate --judge` takes: `FILE.py:FUNCTION` or
            `MODULE:FUNCTION`, a reward function of yours, `reward_model:ID_OR_FOLDER` or `endpoint:MODEL@URL`.
            `"none"` with `--label_budget 0`.
        judge_model (`str`, *optional*):
            Name of the judge's model at its endpoint.
        judge_base_url (`str`, *optional*, defaults to `"https://api.openai.com/v1"`):
            The endpoint.
        judge_api_key_env (`str`, *optional*, defaults to `"OPENAI_API_KEY"`):
            Environment variable with the endpoint's key.
        gold_reward_model (`str`, *optional*):
            A sequence-classification model with one output.
        label_cost (`float`, *optional*, defaults to `1.0`):
            Cost of a label, for the ledger and the card.
        discriminator_dataset_name (`str`, *optional*):
            Preference pairs that the discriminator learns from first: a dataset, or the ledger of an earlier run.
    """

    gold: str = field(
        default="judge",
        metadata={
            "help": "'judge', 'reward_model', 'terminal' (you), a task ('word_collector', 'unique_nouns', "
            "'math_expansion', 'film_sentiment'), FILE.py:FUNCTION or MODULE:FUNCTION (a reward function of yours), "
            "or 'none' with --label_budget 0."
        },
    )
    judge_model: str | None = field(default=None, metadata={"help": "Name of the judge's model at its endpoint."})
    judge_base_url: str = field(default="https://api.openai.com/v1", metadata={"help": "The judge's endpoint."})
    judge_api_key_env: str = field(
        default="OPENAI_API_KEY", metadata={"help": "Environment variable with the endpoint's key."}
    )
    gold_reward_model: str | None = field(
        default=None, metadata={"help": "A sequence-classification model with one output."}
    )
    label_cost: float = field(default=1.0, metadata={"help": "Cost of a label, for the ledger and the card."})
    discriminator_dataset_name: str | None = field(
        default=None,
        metadata={"help": "Pairs that the discriminator learns from first: a dataset, or an earlier run's ledger."},
    )


def make_labeller(gold_args: GoldArguments):
    """
    Builds the labeler that the arguments name; `None` for `"none"`.

    Raises:
        `ValueError`: If `gold` is unknown, or an argument that it needs is missing.
    """
    from ..d2po.gold_tasks import GOLD_TASKS
    from ..d2po.labellers import Gold, TerminalLabeller
    from ..judges import EndpointJudge, RewardFunctionJudge, RewardModelJudge, load_judge

    name, cost = gold_args.gold, gold_args.label_cost
    if name == "none":
        return None
    if name == "terminal":
        return TerminalLabeller(cost=cost)
    if name == "judge":
        if not gold_args.judge_model:
            raise ValueError("`--gold judge` needs `--judge_model`, the name of the judge's model at its endpoint.")
        key = gold_args.judge_api_key_env or None
        return Gold(EndpointJudge(gold_args.judge_model, gold_args.judge_base_url, api_key_env=key), cost)
    if name == "reward_model":
        if not gold_args.gold_reward_model:
            raise ValueError("`--gold reward_model` needs `--gold_reward_model`, a model's name or folder.")
        return Gold(RewardModelJudge(gold_args.gold_reward_model), cost)
    if name in GOLD_TASKS:
        GOLD_TASKS[name]([""], [""])  # a package that it needs is missed now, and not in the first window
        return Gold(RewardFunctionJudge(GOLD_TASKS[name]), cost)
    if ":" not in name:
        known = ", ".join(["judge", "reward_model", "terminal", *GOLD_TASKS, "none"])
        raise ValueError(
            f"`--gold {name}` is unknown. Known are {known}, and FILE.py:FUNCTION, a reward function of yours."
        )
    try:
        return Gold(load_judge(name), cost)
    except ValueError as error:
        raise ValueError(f"`--gold {name}` cannot be loaded. {error}") from error


def only_prompts(split: Any) -> Any:
    """Distinct prompts of a dataset, which may contain pairs."""
    pairs = [column for column in ("chosen", "rejected") if column in split.column_names]
    if not pairs:
        return split
    first_rows: dict[str, int] = {}
    for row, prompt in enumerate(split["prompt"]):
        first_rows.setdefault(str(prompt), row)
    return split.select(list(first_rows.values())).remove_columns(pairs)


def load_pairs(name: str | None):
    """Pairs for the discriminator, from a ledger or a dataset."""
    from ..d2po import ledger_to_dataset
    from ..training.named_datasets import get_split, load_named_dataset

    if name is None:
        return None
    path = Path(name).expanduser()
    if path.is_file() and path.suffix == ".jsonl":
        with open(path, encoding="utf-8") as file:
            if "verdict" in json.loads(file.readline() or "{}"):
                return ledger_to_dataset(path)
    option = "discriminator_dataset_name"
    return get_split(load_named_dataset(name, option=option), "train", option)


class PromptScript(Script):
    """Script of D2PO, which learns from prompts."""

    arguments = (GoldArguments,)
    unit = "prompts"
    example = (
        "--config lora --model_name_or_path Qwen/Qwen2.5-0.5B-Instruct --dataset_name my_prompts.jsonl --gold terminal"
    )

    def prepare(self, split):
        return only_prompts(split)

    def trainer_arguments(self, gold_args: GoldArguments) -> dict[str, Any]:
        return {
            "gold_labeller": make_labeller(gold_args),
            "discriminator_dataset": load_pairs(gold_args.discriminator_dataset_name),
        }

    # ---- For `--dry_run` -------------------------------------------------------------------------------------------

    def describe_data(self, trainer) -> list[str]:
        from .dry_run import steps

        args, gold = trainer.args, trainer.gold
        per_step = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
        each = args.window_size * args.num_policy_epochs // per_step
        windows = -(-steps(trainer) // each)
        wanted = windows * args.labels_per_window
        labels = wanted if gold.budget is None else min(wanted, gold.budget)
        who = "nobody" if gold.labeller is None else gold.labeller.name
        cost = "" if gold.labeller is None else f", at a cost of {labels * gold.labeller.cost:g}"
        return [
            *super().describe_data(trainer),
            f"  completions      2 a prompt, up to {args.max_completion_length} tokens each, sampled from the policy",
            f"windows            {windows:,} of {args.window_size} prompts, {each} steps each",
            f"gold labels        up to {labels:,} from {who}{cost}: {args.labels_per_window} a window"
            + ("" if gold.budget is None else f", {gold.budget:,} in all"),
            f"  ledger           {gold.path}",
        ]
