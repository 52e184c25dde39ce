"""f-DPG: the policy approaches an explicit target under any f-divergence."""

from collections.abc import Callable
from typing import Any

import torch
from accelerate.utils import gather, gather_object
from datasets import Dataset, IterableDataset
from peft import PeftConfig, PeftModel
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin, TrainerCallback
from transformers.utils.quantization_config import QuantizationConfigMixin
from trl import RLOOTrainer

from ..rollout import RolloutTrainer
from .fdpg_config import FDPGConfig
from .pseudo_rewards import PseudoRewards, RunningPartition, group_log_mean, key_of, pseudo_rewards, total_rewards
from .statistics import statistics
from .vllm_difference import VLLMDifference


class FDPGTrainer(RolloutTrainer, RLOOTrainer):
    r"""
    Trainer of f-DPG: minimizes `D_f(pi || p)` for a target `p` that is known up to its normalizer, by default the
    reference times `exp(reward / beta)`.

    It is [`~trl.RLOOTrainer`] with other advantages: the pseudo-reward of a response is `-f'(pi / p)` instead of
    `reward - beta KL`. With `divergence="reverse_kl"` these are RLOO's advantages divided by beta. A reward of `-inf`
    forbids a response, for divergences whose score is bounded above.

    Args:
        model, reward_funcs, args, train_dataset, eval_dataset, processing_class, reward_processing_classes, callbacks, optimizers, quantization_config, peft_config:
            As for [`~trl.RLOOTrainer`], with an [`FDPGConfig`] as `args`.

    Raises:
        `ValueError`: As [`~trl_ext.rollout.RolloutTrainer`]; in training for a reward of `+inf`, or of `-inf` with a
            divergence that is infinite there.
    """

    config_class = FDPGConfig

    _tag_names = ["trl", "trl-ext", "fdpg"]
    _name = "f-DPG"
    _paper = {
        "title": "Aligning Language Models with Preferences through f-divergence Minimization",
        "id": "2302.08215",
        # docstyle-ignore
        "citation": """@inproceedings{go2023aligning,
    title        = {{Aligning Language Models with Preferences through f-divergence Minimization}},
    author       = {Dongyoung Go and Tomasz Korbak and Germ\\'{a}n Kruszewski and Jos Rozen and Nahyeon Ryu and Marc Dymetman},
    year         = 2023,
    booktitle    = {Proceedings of the 40th International Conference on Machine Learning},
    publisher    = {PMLR},
}""",
    }

    def __init__(
        self,
        model: str | PreTrainedModel | PeftModel,
        reward_funcs: Callable | str | PreTrainedModel | list,
        args: FDPGConfig | None = None,
        train_dataset: Dataset | IterableDataset | None = None,
        eval_dataset: Dataset | IterableDataset | dict[str, Dataset | IterableDataset] | None = None,
        processing_class: PreTrainedTokenizerBase | ProcessorMixin | None = None,
        reward_processing_classes: PreTrainedTokenizerBase | list[PreTrainedTokenizerBase] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Optimizer | None, LRScheduler | None] = (None, None),
        quantization_config: QuantizationConfigMixin | None = None,
        peft_config: PeftConfig | None = None,
    ):
        super().__init__(
            model=model,
            reward_funcs=reward_funcs,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            reward_processing_classes=reward_processing_classes,
            callbacks=callbacks,
            optimizers=optimizers,
            quantization_config=quantization_config,
            peft_config=peft_config,
        )
        self.divergence = self.args.get_divergence()
        self.partition = RunningPartition()
        self._rewards = torch.empty(0)
        self._scored: list[torch.Tensor] | None = None
        self._vllm_difference = VLLMDifference(self.vllm_generation if self.use_vllm else None)

    def _get_per_token_logps_and_entropies(self, model, *args, **kwargs):
        scored = super()._get_per_token_logps_and_entropies(model, *args, **kwargs)
        if self._scored is not None:
            self._scored.append(scored[0])
        return scored

    def _calculate_rewards(self, inputs, prompts, completions, completion_ids_list):
        rewards = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        self._rewards = total_rewards(rewards, self.reward_weights, self.divergence)
        # RLOO's own statistics are of the responses that are allowed.
        return rewards.masked_fill(torch.isneginf(rewards), torch.nan)

    def _generate_and_score_completions(self, inputs):
        self._scored = []
        try:
            output = super()._generate_and_score_completions(inputs)
            logps = [self._summed(scored, output["completion_mask"]) for scored in self._scored]
            self._vllm_difference.record(self._metrics[self._mode], self._scored[0], output["completion_mask"])
        finally:
            self._scored = None
        log_target = self._rewards if self.args.target == "none" else logps[1] + self._rewards / self.beta
        log_weights = log_target - logps[0]
        size = self.num_generations if self.model.training else self.num_generations_eval
        log_z = self._log_partition(inputs, log_weights, size)
        found = pseudo_rewards(log_weights, log_z, self.divergence, size, self.args.max_pseudo_reward)
        self._record(found, log_weights, log_z, size)
        output["advantages"] = self.local_rows(found.advantages).to(output["advantages"].dtype)
        return output

    def _summed(self, per_token: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Log-probabilities of the responses of all processes `(N,)`."""
        return gather(torch.where(mask.bool(), per_token.detach().double(), 0.0).sum(1))

    def _log_partition(self, inputs, log_weights: torch.Tensor, size: int) -> torch.Tensor:
        if self.args.partition == "group":
            return group_log_mean(log_weights, size)
        keys = ["all"] * len(log_weights)
        if self.args.partition == "prompt":
            keys = gather_object([key_of(row["prompt"]) for row in inputs])
        if self.model.training:
            self.partition.add(keys, log_weights)
        known = self.partition.log_means(keys).to(log_weights.device)
        return known.where(~known.isnan(), group_log_mean(log_weights, size))

    def _record(self, found: PseudoRewards, log_weights: torch.Tensor, log_z: torch.Tensor, size: int) -> None:
        rows = None if self.model.training else self._rows_of_last_batch()  # the others only fill it up
        values = statistics(found, log_weights, log_z, self.divergence, size, rows)
        self.record_means(**{name: tuple(map(self.local_rows, pair)) for name, pair in values.items()})

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "partition": self.partition.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.partition.load_state_dict(state["partition"])

    def resolved_hyperparameters(self) -> dict[str, Any]:
        beta = {"beta": None} if self.args.target == "none" else {}
        return {**super().resolved_hyperparameters(), "divergence": repr(self.divergence), **beta}
