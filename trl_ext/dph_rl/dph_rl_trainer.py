"""DPH-RL (https://huggingface.co/papers/2509.07430)."""

import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import torch
from accelerate.logging import get_logger
from accelerate.utils import gather_object
from datasets import Dataset, IterableDataset
from peft import PeftConfig, PeftModel
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin, TrainerCallback
from transformers.utils.quantization_config import QuantizationConfigMixin
from trl import GRPOTrainer

from .._trl import disable_gradient_checkpointing
from ..losses import Divergence
from ..rollout import RolloutTrainer
from ..training.modes import evaluation_mode
from .dph_rl_config import DPHRLConfig
from .exact import ExactDivergence
from .rehearsal import RehearsalOrder, collate, fingerprint, load_reference, read_rehearsal, save_reference
from .terms import rehearsal_term, where_bounded


logger = get_logger(__name__)

# A token is called forgotten below this log ratio: a tenth of its initial probability.
_FORGOTTEN = -2.302585092994046


class DPHRLTrainer(RolloutTrainer, GRPOTrainer):
    r"""
    Trainer for DPH-RL, introduced in the paper [The Choice of Divergence: A Neglected Key to Mitigating Diversity
    Collapse in Reinforcement Learning with Verifiable Reward](https://huggingface.co/papers/2509.07430): GRPO on the
    prompts that still teach, and beside it an f-divergence on saved answers of the initial model to prompts that it
    masters, so that what it knew is not forgotten:

    L = L_GRPO + eta * mean over tokens of f(pi / pi_0)

    The answers come from [`collect_rehearsal`], which also splits the prompts. Their log-probabilities are computed
    before the first step, by the forward that trains, and kept in `output_dir`.

    Example:

    ```python
    >>> from trl.rewards import accuracy_reward
    >>> from trl_ext import DPHRLConfig, DPHRLTrainer, collect_rehearsal

    >>> exploration, _, rehearsal, rates = collect_rehearsal(
    ...     model, tokenizer, dataset, accuracy_reward, reward_threshold=1.0, cache_dir="answers"
    ... )
    >>> trainer = DPHRLTrainer(
    ...     model="Qwen/Qwen2.5-0.5B-Instruct",
    ...     reward_funcs=accuracy_reward,
    ...     args=DPHRLConfig("Qwen2.5-0.5B-DPH-RL", rehearsal_coef=0.1),
    ...     train_dataset=exploration,
    ...     rehearsal_dataset=rehearsal,
    ... )
    >>> trainer.train()
    ```

    The arguments are those of [`~trl.GRPOTrainer`], and:

    Args:
        rehearsal_dataset ([`~datasets.Dataset`], *optional*):
            Answers to rehearse: `prompt_ids` and `completion_ids`, or `prompt` and `completion`. Required unless
            `rehearsal_coef=0`.
        divergence ([`~trl_ext.losses.Divergence`], *optional*):
            A divergence of your own, in place of the one that `args` names.
        ref_model ([`~transformers.PreTrainedModel`], *optional*):
            With `rehearsal_estimator="exact"` and without an adapter: a second copy of the model that training starts
            from.
    """

    config_class: ClassVar[type] = DPHRLConfig
    args: DPHRLConfig

    _tag_names = ["trl", "trl-ext", "dph-rl", "grpo"]
    _name = "DPH-RL"
    _paper = {
        "title": "The Choice of Divergence: A Neglected Key to Mitigating Diversity Collapse in Reinforcement Learning "
        "with Verifiable Reward",
        "id": "2509.07430",
        # docstyle-ignore
        "citation": textwrap.dedent("""\
            @article{li2025choice,
                title        = {{The Choice of Divergence: A Neglected Key to Mitigating Diversity Collapse in Reinforcement Learning with Verifiable Reward}},
                author       = {Long Li and Jiaran Hao and Jason Klein Liu and Zhijian Zhou and Yanting Miao and Wei Pang and Xiaoyu Tan and Wei Chu and Zhe Wang and Shirui Pan and Chao Qu and Yuan Qi},
                year         = 2025,
                eprint       = {arXiv:2509.07430},
            }"""),
    }

    def __init__(
        self,
        model: str | PreTrainedModel | PeftModel,
        reward_funcs: Callable | str | PreTrainedModel | list | None = None,
        args: DPHRLConfig | None = None,
        train_dataset: Dataset | IterableDataset | None = None,
        eval_dataset: Dataset | IterableDataset | dict[str, Dataset | IterableDataset] | None = None,
        processing_class: PreTrainedTokenizerBase | ProcessorMixin | None = None,
        reward_processing_classes: PreTrainedTokenizerBase | list[PreTrainedTokenizerBase] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Optimizer | None, LRScheduler | None] = (None, None),
        quantization_config: QuantizationConfigMixin | None = None,
        peft_config: PeftConfig | None = None,
        tools: list[Callable] | None = None,
        rollout_func: Callable | None = None,
        environment_factory: Callable | dict[str, Callable] | None = None,
        *,
        rehearsal_dataset: Dataset | None = None,
        divergence: Divergence | None = None,
        ref_model: PreTrainedModel | None = None,
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
            tools=tools,
            rollout_func=rollout_func,
            environment_factory=environment_factory,
        )
        self.divergence = self.args.get_divergence(divergence)
        self._exact = ExactDivergence.of(self, ref_model)
        self._rehearsed = self._read_rehearsal(rehearsal_dataset)
        self._start_logps: list[torch.Tensor] = []
        self._window_start = (-1, 0)  # optimizer step, and the micro-step with which it began
        self._resumed_from: str | None = None
        self._check_run()
        self.add_callback(_RunBoundary(self))

    # ---- The answers -----------------------------------------------------------------------------------------------

    @property
    def rehearses(self) -> bool:
        """Whether anything is added to GRPO's loss."""
        return self.args.rehearsal_coef != 0

    def _read_rehearsal(self, dataset: Dataset | None) -> list:
        if not self.rehearses:
            return []
        if dataset is None:
            raise ValueError(
                f"`rehearsal_dataset` is required with `rehearsal_coef={self.args.rehearsal_coef:g}`. Collect answers "
                "with `collect_rehearsal`, or set `rehearsal_coef=0`, which is GRPO."
            )
        limit = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        answers = read_rehearsal(dataset, self.processing_class, limit, self.chat_template_kwargs)
        batch_size = self.args.rehearsal_batch_size or 1  # set by the configuration
        self._order = RehearsalOrder(len(answers), batch_size, self.accelerator.num_processes, self.args.seed)
        return answers

    def _check_run(self) -> None:
        args = self.args
        reentrant = (args.gradient_checkpointing_kwargs or {}).get("use_reentrant")
        if self.rehearses and args.gradient_checkpointing and reentrant and self.accelerator.num_processes > 1:
            raise ValueError(
                "`gradient_checkpointing_kwargs={'use_reentrant': True}` is not supported in several processes: a step "
                "has two forwards before its backward. Leave `use_reentrant` at its default."
            )
        if self.rehearses and args.beta != 0:
            logger.warning(
                f"`beta={args.beta:g}` adds GRPO's own KL on the sampled answers. DPH-RL uses none: it holds the policy "
                "by the rehearsed answers alone."
            )

    def _needs_reference(self, args) -> bool:
        return args.beta != 0 or (args.rehearsal_coef != 0 and args.rehearsal_estimator == "exact")

    # ---- What training starts from ---------------------------------------------------------------------------------

    @property
    def _described_reference(self) -> dict[str, str]:
        args = self.args
        dtype = "bfloat16" if args.bf16 else "float16" if args.fp16 else "none"
        dtype = f"{str(self.model.dtype).removeprefix('torch.')}, autocast {dtype}"
        return {"answers": fingerprint(self._rehearsed), "dtype": dtype, "temperature": repr(float(self.temperature))}

    def _begin(self, checkpoint: str | None) -> None:
        """Computes the answers' log-probabilities under the model as it is, or reads those of the run's start."""
        if not self.rehearses:
            return
        output_dir, described = Path(self.args.output_dir), self._described_reference
        if checkpoint is not None:
            self._start_logps = load_reference([Path(checkpoint).parent, output_dir], described)
            return
        self._start_logps = self._score_start()
        if self.is_world_process_zero():
            save_reference(output_dir, self._start_logps, described)
        self.accelerator.wait_for_everyone()

    @torch.no_grad()
    def _score_start(self) -> list[torch.Tensor]:
        """Each process scores a part of the answers; all get the whole."""
        world, size = self.accelerator.num_processes, self.args.rehearsal_batch_size
        count = len(self._rehearsed)
        rounds = -(-count // (world * size))  # as many forwards on every process, for sharded models
        scored: list[tuple[int, list[float]]] = []
        with (
            evaluation_mode(self.model),
            disable_gradient_checkpointing(self.model, self.args.gradient_checkpointing_kwargs),
        ):
            for step in range(rounds):
                start = (step * world + self.accelerator.process_index) * size
                rows = [row % count for row in range(start, start + size)]
                batch, logps = self._score(self.model_wrapped, rows)
                for row, values, mask in zip(rows, logps, batch["completion_mask"], strict=True):
                    length = len(self._rehearsed[row].completion_ids)
                    scored.append((row, values[:length].float().masked_fill(mask[:length] == 0, 0.0).tolist()))
        if world > 1:
            scored = gather_object(scored)
        by_row = dict(scored)
        return [torch.tensor(by_row[row]) for row in range(count)]

    def _score(self, model, rows: list[int]) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        """A batch of answers, and the log-probabilities of their tokens, as TRL computes those of the samples."""
        batch = collate([self._rehearsed[row] for row in rows], self._tokenizer.pad_token_id, self.accelerator.device)
        scores = self._get_per_token_logps_and_entropies(
            model, batch["input_ids"], batch["attention_mask"], batch["completion_mask"].size(1)
        )
        return batch, scores[0]

    # ---- The step --------------------------------------------------------------------------------------------------

    def _compute_loss(self, model, inputs):
        loss = super()._compute_loss(model, inputs)
        if not self.rehearses or not self.model.training:
            return loss
        return loss + self.args.rehearsal_coef * self._rehearsal_loss(model)

    def _rehearsal_loss(self, model) -> torch.Tensor:
        """This micro-step's part of the mean over the tokens that the optimizer step rehearses."""
        args = self.args
        rows = self._order.rows(self._step, self.accelerator.process_index)
        if self._exact is None:
            batch, logps = self._score(model, rows)
            start = self._start_of(rows, batch["completion_mask"]).to(logps)
            mask = batch["completion_mask"].bool()
            logratios = torch.where(mask, logps - start, 0.0)
            if args.rehearsal_estimator == "nll":
                terms = torch.where(mask, -logps, 0.0)
            else:
                terms = rehearsal_term(logratios, self.divergence, args.rehearsal_max_logratio)
        else:
            batch = collate(
                [self._rehearsed[row] for row in rows], self._tokenizer.pad_token_id, self.accelerator.device
            )
            mask = batch["completion_mask"].bool()
            terms, logratios = self._exact(batch)
        terms = torch.where(mask, terms, 0.0)
        self._record(terms.detach(), logratios.detach(), mask)
        # DDP takes the mean of the processes' gradients.
        return terms.sum() * (self.accelerator.num_processes / self._tokens_of_step())

    def _start_of(self, rows: list[int], mask: torch.Tensor) -> torch.Tensor:
        start = torch.zeros(mask.shape)
        for values, row in zip(start, rows, strict=True):
            values[: len(self._start_logps[row])] = self._start_logps[row]
        return start.to(mask.device)

    def _tokens_of_step(self) -> int:
        """Tokens that all processes rehearse in this optimizer step: every process knows all answers."""
        if self._window_start[0] != self.state.global_step:
            self._window_start = (self.state.global_step, self._step)
        first = self._window_start[1]
        rows = self._order.rows_of_all(range(first, first + self.current_gradient_accumulation_steps))
        return sum(sum(self._rehearsed[row].completion_mask) for row in rows)

    def _record(self, terms: torch.Tensor, logratios: torch.Tensor, mask: torch.Tensor) -> None:
        self.record_means(
            rehearsal__divergence=(terms, mask),
            rehearsal__kl=(torch.expm1(logratios) - logratios, mask),
            rehearsal__logratio=(logratios, mask),
            rehearsal__forgotten=((logratios < _FORGOTTEN).float(), mask),
            rehearsal__bounded=(where_bounded(logratios, self.args.rehearsal_max_logratio).float(), mask),
        )

    # ---- Sharing ---------------------------------------------------------------------------------------------------

    def train(self, resume_from_checkpoint=None, *args, **kwargs):
        """
        Like [`~transformers.Trainer.train`]; with `resume_from_checkpoint=True` it continues from the last checkpoint
        that was written to its end.
        """
        self._window_start = (-1, 0)
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def _load_optimizer_and_scheduler(self, checkpoint):
        super()._load_optimizer_and_scheduler(checkpoint)
        self._resumed_from = checkpoint

    def resolved_hyperparameters(self) -> dict[str, Any]:
        resolved = super().resolved_hyperparameters()
        if not self.rehearses:
            return {**resolved, **dict.fromkeys(("divergence", "rehearsal_batch_size"))}
        resolved["divergence"] = repr(self.divergence)
        resolved["rehearsed answers"] = len(self._rehearsed)
        return resolved


class _RunBoundary(TrainerCallback):
    """Scores the rehearsed answers once the model is prepared, and before it is trained or evaluated."""

    def __init__(self, trainer: DPHRLTrainer):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        self.trainer._begin(self.trainer._resumed_from if state.global_step > 0 else None)
