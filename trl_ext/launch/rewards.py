"""Online rewards of text-to-image pipelines on the command line: reward functions, and models that reward images."""

from dataclasses import dataclass, field
from typing import Any

from .rollout import load_rewards
from .scripts import ImageScript


@dataclass
class ImageRewardArguments:
    """
    Rewards. Those that are given are added, in this order, with `reward_weights`.

    Args:
        reward (`list[str]`):
            Reward functions `f(prompts, images, **columns)`: `FILE.py:FUNCTION` or `MODULE:FUNCTION`.
        clip_reward (`str`):
            Hub id or folder of a CLIP model, whose cosine of image and prompt is the reward.
        pick_score (`list[str]`):
            Hub id or folder of PickScore's model, and of its processor if it is elsewhere.
        aesthetic_reward (`list[str]`):
            Hub id or folder of a CLIP model, and a safetensors file with the head.
    """

    reward: list[str] | None = field(
        default=None,
        metadata={
            "help": "Reward functions `f(prompts, images, **columns)`: FILE.py:FUNCTION or MODULE:FUNCTION.",
            "nargs": "+",
        },
    )
    clip_reward: str | None = field(
        default=None, metadata={"help": "CLIP model (Hub id or folder): cosine of image and prompt."}
    )
    pick_score: list[str] | None = field(
        default=None,
        metadata={
            "help": "PickScore's model (yuvalkirstain/PickScore_v1, or a folder), and its processor if it is "
            "elsewhere (laion/CLIP-ViT-H-14-laion2B-s32B-b79K).",
            "nargs": "+",
        },
    )
    aesthetic_reward: list[str] | None = field(
        default=None,
        metadata={
            "help": "CLIP model (Hub id or folder), and a safetensors file with the layers of the head on its "
            "embedding.",
            "nargs": "+",
        },
    )


class RewardScript(ImageScript):
    """Script of the methods that learn from rewards of their own images."""

    arguments: tuple[type, ...] = (ImageRewardArguments,)
    unit = "prompts"
    example = "--config sd15_lora --dataset_name my_prompts.jsonl --reward my_rewards.py:is_bright"
    hints = (
        "",
        "To see it work without a model to download, from a clone of the project:",
        "",
        "  python3 recipes/reward_demo.py",
    )

    def complete(self, script_args, training_args) -> None:
        """Reward models run where the trainer does."""
        self.device = str(training_args.device)

    def trainer_arguments(self, *more) -> dict[str, Any]:
        from ..diffusion import AestheticReward, CLIPReward

        rewards: ImageRewardArguments = more[0]
        functions: list[Any] = load_rewards(rewards.reward) if rewards.reward else []
        if rewards.clip_reward:
            functions.append(CLIPReward(rewards.clip_reward, device=self.device))
        if rewards.pick_score:
            wanted = "the model and, if it is elsewhere, its processor"
            model, *processor = _checked_names("pick_score", rewards.pick_score, wanted, least=1)
            other = processor[0] if processor else None
            functions.append(CLIPReward(model, other, use_logit_scale=True, device=self.device))
        if rewards.aesthetic_reward:
            wanted = "the model and the file of the head"
            model, head = _checked_names("aesthetic_reward", rewards.aesthetic_reward, wanted, least=2)
            functions.append(AestheticReward(model, head, device=self.device))
        if not functions:
            raise ValueError(
                "A reward is required: `--reward FILE.py:FUNCTION` of yours, `--clip_reward MODEL`, `--pick_score "
                "MODEL` or `--aesthetic_reward MODEL HEAD`."
            )
        return {"reward_funcs": functions}

    # ---- For `--dry_run` -------------------------------------------------------------------------------------------

    def describe_data(self, trainer) -> list[str]:
        from ..diffusion.prompts import count_cut_prompts

        args, data = trainer.args, trainer.train_dataset
        height, width = trainer.image_size
        lines = [
            f"training data      {data.num_rows:,} prompts",
            f"samples            {args.num_generations} images of each prompt, {width} x {height} pixels, "
            f"{args.num_inference_steps} steps at noise level {trainer.sampler.noise_level:g}",
            f"rewards            {', '.join(trainer.rewards.names)}",
        ]
        for cut in count_cut_prompts(trainer.family, data):
            lines.append(
                f"  cut prompts      {cut.cut:,} of {cut.prompts:,}: the encoder of `{cut.tokenizer}` reads "
                f"{cut.limit} tokens, the longest has {cut.longest}"
            )
        return lines

    def step_size(self, trainer) -> tuple[int, float]:
        from .dry_run import pairs_per_step

        return pairs_per_step(trainer) // trainer.args.num_generations, float("nan")

    def example_row(self, trainer) -> list[str]:
        return ["first prompt", f"  {trainer.train_dataset.row(0)['prompt']}"]


def _checked_names(option: str, given: list[str] | str, wanted: str, least: int) -> list[str]:
    names = [given] if isinstance(given, str) else list(given)
    if not least <= len(names) <= 2:
        raise ValueError(f"`--{option} {' '.join(names)}` has {len(names)} names. Give {wanted}.")
    return names
