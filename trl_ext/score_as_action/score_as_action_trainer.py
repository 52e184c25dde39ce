"""Score as Action (https://huggingface.co/papers/2502.01819)."""

import textwrap
from collections.abc import Sequence
from typing import Any

import torch

from ..diffusion import OnlineDiffusionTrainer, ReferenceRewards
from ..diffusion.rollouts import rollout_step_loss
from ..losses import reward_advantages
from .score_as_action_config import KL, ScoreAsActionConfig
from .surrogate import SurrogateRewards
from .value_network import ValueBaseline


class ScoreAsActionTrainer(OnlineDiffusionTrainer):
    r"""
    Trainer for text-to-image models on rewards of their own images, by the policy gradient of the stochastic sampler,
    after the paper [Score as Action: Fine-Tuning Diffusion Generative Models by Continuous-time Reinforcement
    Learning](https://huggingface.co/papers/2502.01819).

    It maximizes E[reward] - beta KL, with the KL of the sampler's steps in nats, summed over steps and dimensions. The
    score of a step is weighted by the reward less beta times the KL of LATER steps, less the mean of that over the
    other images of the prompt; the KL of the step itself is differentiated. Settings of the same trainer: DDPO is
    `beta=0`; Flow-GRPO's loss is `kl_in_return=False`; both are published with `reward_scale="group"`.

    Example:

    ```python
    >>> from datasets import Dataset
    >>> from peft import LoraConfig
    >>> from trl_ext import ScoreAsActionConfig, ScoreAsActionTrainer

    >>> def is_bright(images, **kwargs):
    ...     return [sum(image.convert("L").resize((1, 1)).getdata()) / 255 for image in images]

    >>> trainer = ScoreAsActionTrainer(
    ...     model="stable-diffusion-v1-5/stable-diffusion-v1-5",
    ...     reward_funcs=is_bright,
    ...     args=ScoreAsActionConfig("sd15-bright"),
    ...     train_dataset=Dataset.from_dict({"prompt": ["a lighthouse", "a fox", "a bowl of soup"]}),
    ...     peft_config=LoraConfig(r=16, lora_alpha=16),
    ... )
    >>> trainer.train()
    ```

    The arguments are those of [`~trl_ext.diffusion.OnlineDiffusionTrainer`].
    """

    config_class = ScoreAsActionConfig

    _tag_names = ["trl", "trl-ext", "score-as-action"]
    _name = "Score as Action"
    _paper = {
        "title": "Score as Action: Fine-Tuning Diffusion Generative Models by Continuous-time Reinforcement Learning",
        "id": "2502.01819",
        # docstyle-ignore
        "citation": textwrap.dedent("""\
            @inproceedings{zhao2025score,
                title        = {{Score as Action: Fine-Tuning Diffusion Generative Models by Continuous-time Reinforcement Learning}},
                author       = {Hanyang Zhao and Haoxian Chen and Ji Zhang and David D. Yao and Wenpin Tang},
                year         = 2025,
                booktitle    = {Forty-second International Conference on Machine Learning, ICML 2025},
                url          = {https://huggingface.co/papers/2502.01819},
            }"""),
    }

    args: ScoreAsActionConfig

    def _prepare_data(self, args, train_dataset, eval_dataset):
        prepared = super()._prepare_data(args, train_dataset, eval_dataset)
        self.reference_rewards = ReferenceRewards(self)
        self._surrogate = None if args.divergence == KL else SurrogateRewards(self, args.get_divergence())
        self._value = None if args.value_network is None else ValueBaseline(self, args)
        return prepared

    def prepare_window(self) -> None:
        images = self.args.num_reference_images
        per_prompt = None if self._surrogate is None else self.args.reference_images_per_prompt
        self.reference_rewards.measure_spread(images, per_prompt)

    def in_units(self, rewards: torch.Tensor, rows: Sequence[int], is_logged: bool = True) -> torch.Tensor:
        """Rewards of the window's images in the units of `beta`, and for another divergence the surrogate ones."""
        if self.args.reward_scale == "reference":
            rewards = rewards / self.reference_rewards.spread
        return rewards if self._surrogate is None else self._surrogate(rewards, rows, is_logged)

    def window_advantages(self, rewards, step_kls, rows, rollouts):
        args = self.args
        rewards = self.in_units(rewards, rows)
        known = values = None
        if self._value is not None:
            known = self._value.known(rollouts, rows, lambda own: self.in_units(own, rows, is_logged=False))
            values = self._value.values(rollouts, known)
        advantages = reward_advantages(
            rewards,
            step_kls,
            beta=args.beta,
            num_generations=args.num_generations,
            reward_scale="group" if args.reward_scale == "group" else 1.0,
            kl_in_return=args.kl_in_return,
            values=values,
        )
        if self._value is not None:
            onward = step_kls.flip(1).cumsum(1).flip(1) if args.kl_in_return else torch.zeros_like(step_kls)
            self._value.fit(rollouts, known, values, rewards[:, None] - args.beta * onward)
        return advantages

    def step_loss(self, model, rollout, step, advantages, *, is_first_iteration):
        # The ratio of the first iteration is 1 by construction: no other numerics of a micro-batch enter it.
        epsilon = None if is_first_iteration else self.args.epsilon
        return rollout_step_loss(model, self.sampler, rollout, step, advantages, beta=self.args.beta, epsilon=epsilon)

    def state_dict(self) -> dict[str, Any]:
        state: dict[str, Any] = {"reference_rewards": self.reference_rewards.by_row}
        return state if self._value is None else {**state, "value": self._value.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.reference_rewards.by_row = state["reference_rewards"]
        if self._value is not None and "value" in state:  # else it starts to learn here
            self._value.load_state_dict(state["value"])

    def resolved_hyperparameters(self) -> dict:
        estimates, is_kl = self._progress.estimates, self._surrogate is None
        return {
            **super().resolved_hyperparameters(),
            "spread of the reference's rewards": estimates.get("reward_spread"),
            "mean of the reference's rewards": estimates.get("reference_reward"),
            "reference_images_per_prompt": None if is_kl else self.args.reference_images_per_prompt,
            "epsilon": None if self.args.num_iterations == 1 else self.args.epsilon,
        }
