# /// script
# dependencies = [
#     "trl-ext[quantization,tasks]",
# ]
#
# [tool.uv.sources]
# trl-ext = { path = "..", editable = true }
# ///

"""
D2PO. Without arguments: the embedded default, SmolLM2-135M on the film openings that ship with the project, VADER's sentiment
as gold.

# QLoRA, a language model behind an OpenAI-compatible endpoint as judge, 1000 labels
```bash
OPENAI_API_KEY=... accelerate launch recipes/d2po.py --config recipes/configs/d2po/qlora.yaml \
    --model_name_or_path Qwen/Qwen2.5-7B-Instruct \
    --dataset_name trl-lib/ultrafeedback-prompt \
    --gold judge --judge_model gpt-4o-mini --label_budget 1000 \
    --output_dir Qwen2.5-7B-D2PO
```

# You are the labeler
```bash
python recipes/d2po.py --config recipes/configs/d2po/lora.yaml --dataset_name my_prompts.jsonl --gold terminal
```

An interrupted run goes on with `--resume_from_checkpoint true`; no label is bought twice.
"""

from dataclasses import dataclass, field

from common import command_line, make_parser, train


@dataclass
class GoldArguments:
    """
    Where gold labels come from.

    Args:
        gold (`str`, *optional*, defaults to `"judge"`):
            `"judge"`, `"reward_model"`, `"terminal"`, or a task: `"word_collector"`, `"unique_nouns"`, `"math_expansion"`,
            `"film_sentiment"`. `"none"` with `--label_budget 0`.
        judge_model (`str`, *optional*):
            The judge, as its endpoint knows it.
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
            "help": "'judge', 'reward_model', 'terminal', 'word_collector', 'unique_nouns', 'math_expansion', "
            "'film_sentiment', or 'none' with --label_budget 0."
        },
    )
    judge_model: str | None = field(default=None, metadata={"help": "The judge, as its endpoint knows it."})
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
    """The labeler that the arguments name."""
    from trl_ext.d2po import JudgeLabeller, RewardFunctionLabeller, RewardModelLabeller, TerminalLabeller
    from trl_ext.d2po.gold_tasks import GOLD_TASKS

    name, cost = gold_args.gold, gold_args.label_cost
    if name == "none":
        return None
    if name == "terminal":
        return TerminalLabeller(cost=cost)
    if name == "judge":
        if not gold_args.judge_model:
            raise ValueError("`--gold judge` needs `--judge_model`, the judge's name at its endpoint.")
        return JudgeLabeller(
            gold_args.judge_model, gold_args.judge_base_url, api_key_env=gold_args.judge_api_key_env or None, cost=cost
        )
    if name == "reward_model":
        if not gold_args.gold_reward_model:
            raise ValueError("`--gold reward_model` needs `--gold_reward_model`, a model's name or folder.")
        return RewardModelLabeller(gold_args.gold_reward_model, cost=cost)
    if name not in GOLD_TASKS:
        known = ", ".join(["judge", "reward_model", "terminal", *GOLD_TASKS, "none"])
        raise ValueError(f"`--gold {name}` is unknown; known: {known}.")
    return RewardFunctionLabeller(GOLD_TASKS[name], cost=cost)


def only_prompts(split):
    """Prompts of a dataset that may have pairs: each once, without the pairs."""
    pairs = [column for column in ("chosen", "rejected") if column in split.column_names]
    if not pairs:
        return split
    seen: set[str] = set()
    rows = [i for i, prompt in enumerate(split["prompt"]) if not (str(prompt) in seen or seen.add(str(prompt)))]
    return split.select(rows).remove_columns(pairs)


def load_pairs(name: str | None):
    """Pairs for the discriminator, from a ledger or a dataset."""
    import json
    from pathlib import Path

    from common import get_split, load_preference_dataset

    from trl_ext.d2po import ledger_to_dataset

    if name is None:
        return None
    path = Path(name)
    if path.is_file() and path.suffix == ".jsonl":
        with open(path, encoding="utf-8") as file:
            if "verdict" in json.loads(file.readline() or "{}"):
                return ledger_to_dataset(path)
    return get_split(load_preference_dataset(name), "train", "discriminator_dataset_name")


def main(script_args, training_args, model_args, dataset_args, gold_args):
    from trl_ext import D2POTrainer

    train(
        D2POTrainer,
        script_args,
        training_args,
        model_args,
        dataset_args,
        prepare=only_prompts,
        gold_labeller=make_labeller(gold_args),
        discriminator_dataset=load_pairs(gold_args.discriminator_dataset_name),
    )


if __name__ == "__main__":
    from trl_ext import D2POConfig

    parser = make_parser(D2POConfig, more=(GoldArguments,))
    main(*parser.parse_args_and_config(command_line("d2po"), fail_with_unknown_args=True))
