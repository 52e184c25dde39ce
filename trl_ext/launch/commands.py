"""The table of commands. A new method needs one row here for its command, its recipe and its line in the help."""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Command:
    """
    A command of `trl-ext`.

    Args:
        name (`str`):
            The word after `trl-ext`.
        summary (`str`):
            One-line description for `trl-ext --help`.
        main (`str`):
            `module:function` that runs the command: takes the arguments after its name, returns the exit status.
    """

    name: str
    summary: str
    main: str

    @property
    def group(self) -> str:
        return "measure and inspect"

    def run(self, arguments: list[str]) -> int:
        return _named(self.main)(arguments)


@dataclass(frozen=True)
class Method(Command):
    """
    A command that trains.

    Args:
        trainer (`str`):
            The trainer, a public name of `trl_ext`; its configuration is the trainer's `config_class`.
        title (`str`):
            The method's name as its paper writes it.
        data (`str`):
            Description of its training data, for the help.
        script (`str`, *optional*):
            `module:class` of its [`~trl_ext.launch.scripts.Script`]: how arguments become a trainer.
        main (`str`, *optional*):
            As for any command; the shared training by default.
    """

    trainer: str = ""
    title: str = ""
    data: str = ""
    script: str = "trl_ext.launch.scripts:Script"
    main: str = ""

    @property
    def group(self) -> str:
        return "train"

    def run(self, arguments: list[str]) -> int:
        from .train import run_method

        return run_method(self, arguments, f"trl-ext {self.name}")

    @property
    def trainer_class(self) -> Any:
        import trl_ext

        return getattr(trl_ext, self.trainer)

    @property
    def config_class(self) -> Any:
        return self.trainer_class.config_class

    def make_script(self):
        return _named(self.script)(self)


def _named(path: str) -> Callable:
    module, _, name = path.partition(":")
    return getattr(importlib.import_module(module), name)


PAIRS = "preference pairs: `prompt`, `chosen`, `rejected`"
IMAGES = "pairs of images: `prompt`, `chosen`, `rejected`, or the columns of Pick-a-Pic"
_IMAGES = "trl_ext.launch.scripts:ImageScript"

_ROWS: tuple[Command, ...] = (
    Method(
        "fdpo",
        "DPO held near the reference by another f-divergence (JS, forward KL, alpha, chi-PO, ...)",
        trainer="FDPOTrainer",
        title="f-DPO",
        data=PAIRS,
    ),
    Method(
        "tdpo",
        "DPO held near the reference at every token, by the forward KL",
        trainer="TDPOTrainer",
        title="TDPO",
        data=PAIRS,
    ),
    Method(
        "mallows",
        "DPO that gives a pair more weight if people agree on its prompt",
        trainer="MallowsDPOTrainer",
        title="Mallows-DPO",
        data=PAIRS + "; optionally a column of your raters' dispersion",
    ),
    Method(
        "rainbowpo",
        "length normalization, a mixed reference and Mallows-DPO's weights in one loss",
        trainer="RainbowPOTrainer",
        title="RainbowPO",
        data=PAIRS,
    ),
    Method(
        "simper",
        "inverse perplexity, up for chosen and down for rejected: no reference model, no beta",
        trainer="SimPERTrainer",
        title="SimPER",
        data=PAIRS,
    ),
    Method(
        "d2po",
        "online DPO for expensive labels: a discriminator orders most pairs, gold labels those that help",
        trainer="D2POTrainer",
        title="D2PO",
        data="prompts: `prompt`",
        script="trl_ext.launch.d2po:PromptScript",
    ),
    Method(
        "dph_rl",
        "GRPO that rehearses what the model already knew, held by an f-divergence on saved answers",
        trainer="DPHRLTrainer",
        title="DPH-RL",
        data="prompts that reward functions can score: `prompt`, and the columns that they read",
        script="trl_ext.launch.rollout:RehearsalScript",
    ),
    Method(
        "fdpg",
        "RLOO toward an explicit target, the reference times exp(reward / beta), under any f-divergence",
        trainer="FDPGTrainer",
        title="f-DPG",
        data="prompts that reward functions can score: `prompt`, and the columns that they read",
        script="trl_ext.launch.rollout:RolloutScript",
    ),
    Method(
        "wro",
        "RLOO whose reward is how often a judge prefers a completion to samples of the reference",
        trainer="WROTrainer",
        title="WRO",
        data="prompts: `prompt`; optionally a column of anchors",
        script="trl_ext.launch.wro:JudgeScript",
    ),
    Method(
        "diffusion_dpo",
        "DPO for text-to-image pipelines: Stable Diffusion, SDXL, SD3, FLUX",
        trainer="DiffusionDPOTrainer",
        title="Diffusion-DPO",
        data=IMAGES,
        script=_IMAGES,
    ),
    Method(
        "dspo",
        "score matching toward preferred images, for text-to-image pipelines",
        trainer="DSPOTrainer",
        title="DSPO",
        data=IMAGES,
        script=_IMAGES,
    ),
    Method(
        "score_as_action",
        "rewards of a pipeline's own images, held near the reference by KL in nats",
        trainer="ScoreAsActionTrainer",
        title="Score as Action",
        data="prompts: `prompt`, and the columns that reward functions read",
        script="trl_ext.launch.rewards:RewardScript",
    ),
    Command(
        "evaluate",
        "measure aligned models against their reference: one JSON and one HTML report",
        main="trl_ext.evaluation.command:main",
    ),
    Command(
        "mix",
        "weights for policies that were each aligned to one preference, and their mixture",
        main="trl_ext.launch.mix:main",
    ),
    Command(
        "rehearsal",
        "split prompts into those that a model masters and those to train on, and collect answers for dph_rl",
        main="trl_ext.launch.rehearsal:main",
    ),
    Command(
        "data",
        "describe a preference dataset: pairs, columns, lengths, what training would leave out",
        main="trl_ext.launch.describe_data:main",
    ),
)

COMMANDS: dict[str, Command] = {row.name: row for row in _ROWS}
METHODS: dict[str, Method] = {name: row for name, row in COMMANDS.items() if isinstance(row, Method)}
