"""What a trainer adds to its loss for the answers that it rehearses."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from accelerate.logging import get_logger
from accelerate.utils import gather_object
from datasets import Dataset

from .._trl import disable_gradient_checkpointing
from ..losses import Divergence
from ..training.modes import evaluation_mode
from .exact import ExactDivergence
from .rehearsal import (
    RehearsalOrder,
    RehearsedAnswer,
    collate,
    fingerprint,
    load_reference,
    read_rehearsal,
    save_reference,
)
from .terms import rehearsal_term, where_bounded


logger = get_logger(__name__)

# A token is called forgotten below this log ratio: a tenth of its initial probability.
_FORGOTTEN = -2.302585092994046


class Rehearser:
    """
    The answers that a trainer rehearses, their log-probabilities under what training starts from, and the loss.

    Args:
        trainer ([`DPHRLTrainer`]):
            The trainer, ready to train.
        answers (`list[RehearsedAnswer]`):
            The answers.
        divergence ([`~trl_ext.losses.Divergence`]):
            The divergence.
        exact ([`ExactDivergence`], *optional*):
            Computes it over the vocabulary; by default it is estimated at the answers' tokens.
    """

    def __init__(
        self,
        trainer: Any,
        answers: list[RehearsedAnswer],
        divergence: Divergence,
        exact: ExactDivergence | None = None,
    ):
        self.trainer, self.answers, self.divergence, self.exact = trainer, answers, divergence, exact
        self.start_logps: list[torch.Tensor] = []
        args = trainer.args
        self.order = RehearsalOrder(
            len(answers), args.rehearsal_batch_size, trainer.accelerator.num_processes, args.seed
        )
        self._window_start = (-1, 0)  # optimizer step, and the micro-step with which it began

    @classmethod
    def of(cls, trainer, dataset: Dataset | None, divergence: Divergence | None, ref_model) -> "Rehearser | None":
        """
        The rehearser of a trainer, from the arguments of its constructor; `None` with `rehearsal_coef=0`.

        Raises:
            `TypeError`, `ValueError`: For missing or invalid arguments, and for a run that cannot rehearse.
        """
        args = trainer.args
        found = args.get_divergence(divergence)
        exact = ExactDivergence.of(trainer, ref_model)
        if args.rehearsal_coef == 0:
            return None
        if dataset is None:
            raise ValueError(
                f"`rehearsal_dataset` is required with `rehearsal_coef={args.rehearsal_coef:g}`. Collect answers with "
                "`collect_rehearsal`, or set `rehearsal_coef=0`, which is GRPO."
            )
        limit = getattr(trainer.model.config.get_text_config(), "max_position_embeddings", None)
        answers = read_rehearsal(dataset, trainer.processing_class, limit, trainer.chat_template_kwargs)
        rehearser = cls(trainer, answers, found, exact)
        rehearser.check_run()
        return rehearser

    def check_run(self) -> None:
        """Raises `ValueError` for a run in which a step cannot have two forwards; warns of a second divergence."""
        args = self.trainer.args
        reentrant = (args.gradient_checkpointing_kwargs or {}).get("use_reentrant")
        if args.gradient_checkpointing and reentrant and self.trainer.accelerator.num_processes > 1:
            raise ValueError(
                "`gradient_checkpointing_kwargs={'use_reentrant': True}` is not supported in several processes: a step "
                "has two forwards before its backward. Leave `use_reentrant` at its default."
            )
        if args.beta != 0:
            logger.warning(
                f"`beta={args.beta:g}` adds GRPO's own KL on the sampled answers. DPH-RL uses none: it holds the policy "
                "by the rehearsed answers alone."
            )

    # ---- What training starts from ---------------------------------------------------------------------------------

    def start_run(self, checkpoint: str | None) -> None:
        """
        Computes the answers' log-probabilities under the model as it is, or reads those of the run's start. Every
        process calls it, once the model is prepared.
        """
        self._window_start = (-1, 0)
        output_dir, described = Path(self.trainer.args.output_dir), self._described_reference()
        if checkpoint is not None:
            self.start_logps = load_reference([Path(checkpoint).parent, output_dir], described)
            return
        self.start_logps = self._score_start()
        if self.trainer.is_world_process_zero():
            save_reference(output_dir, self.start_logps, described)
        self.trainer.accelerator.wait_for_everyone()

    def _described_reference(self) -> dict[str, str]:
        args = self.trainer.args
        autocast = "bfloat16" if args.bf16 else "float16" if args.fp16 else "none"
        dtype = f"{str(self.trainer.model.dtype).removeprefix('torch.')}, autocast {autocast}"
        return {"answers": fingerprint(self.answers), "dtype": dtype, "temperature": repr(float(args.temperature))}

    @torch.no_grad()
    def _score_start(self) -> list[torch.Tensor]:
        """Each process scores a part of the answers; all get the whole."""
        trainer, accelerator = self.trainer, self.trainer.accelerator
        world, size, count = accelerator.num_processes, self.order.batch_size, len(self.answers)
        rounds = -(-count // (world * size))  # as many forwards on every process, for sharded models
        scored: list[tuple[int, list[float]]] = []
        with (
            evaluation_mode(trainer.model),
            disable_gradient_checkpointing(trainer.model, trainer.args.gradient_checkpointing_kwargs),
        ):
            for step in range(rounds):
                start = (step * world + accelerator.process_index) * size
                rows = [row % count for row in range(start, start + size)]
                batch, logps = self._score(trainer.model_wrapped, rows)
                for row, values, mask in zip(rows, logps, batch["completion_mask"], strict=True):
                    length = len(self.answers[row].completion_ids)
                    scored.append((row, values[:length].float().masked_fill(mask[:length] == 0, 0.0).tolist()))
        by_row = dict(gather_object(scored) if world > 1 else scored)
        return [torch.tensor(by_row[row]) for row in range(count)]

    # ---- The loss --------------------------------------------------------------------------------------------------

    def _batch(self, rows: list[int]) -> dict[str, torch.Tensor]:
        trainer = self.trainer
        return collate(
            [self.answers[row] for row in rows], trainer._tokenizer.pad_token_id, trainer.accelerator.device
        )

    def _score(self, model, rows: list[int]) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        """A batch of answers, and the log-probabilities of their tokens, as TRL computes those of the samples."""
        trainer, batch = self.trainer, self._batch(rows)
        scores = trainer._get_per_token_logps_and_entropies(
            model, batch["input_ids"], batch["attention_mask"], batch["completion_mask"].size(1)
        )
        return batch, scores[0]

    def loss(self, model) -> torch.Tensor:
        """
        This micro-step's part of the mean over the tokens that the optimizer step rehearses.

        Args:
            model:
                The policy, wrapped as in the step.
        """
        trainer = self.trainer
        args, accelerator = trainer.args, trainer.accelerator
        rows = self.order.rows(trainer._step, accelerator.process_index)
        if self.exact is not None:
            batch = self._batch(rows)
            mask = batch["completion_mask"].bool()
            terms, logratios = self.exact(batch)
        else:
            batch, logps = self._score(model, rows)
            mask = batch["completion_mask"].bool()
            logratios = torch.where(mask, logps - self._start_of(rows, mask).to(logps), 0.0)
            if args.rehearsal_estimator == "nll":
                terms = -logps
            else:
                terms = rehearsal_term(logratios, self.divergence, args.rehearsal_max_logratio)
        terms = torch.where(mask, terms, 0.0)
        self._record(terms.detach(), logratios.detach(), mask)
        # DDP takes the mean of the processes' gradients.
        return terms.sum() * (accelerator.num_processes / self.tokens_of_step())

    def _start_of(self, rows: list[int], mask: torch.Tensor) -> torch.Tensor:
        start = torch.zeros(mask.shape)
        for values, row in zip(start, rows, strict=True):
            values[: len(self.start_logps[row])] = self.start_logps[row]
        return start.to(mask.device)

    def tokens_of_step(self) -> int:
        """Tokens that all processes rehearse in this optimizer step: every process knows all answers."""
        trainer = self.trainer
        if self._window_start[0] != trainer.state.global_step:
            self._window_start = (trainer.state.global_step, trainer._step)
        first = self._window_start[1]
        steps: Iterable[int] = range(first, first + trainer.current_gradient_accumulation_steps)
        return sum(sum(self.answers[row].completion_mask) for row in self.order.rows_of_all(steps))

    def _record(self, terms: torch.Tensor, logratios: torch.Tensor, mask: torch.Tensor) -> None:
        bounded = where_bounded(logratios, self.trainer.args.rehearsal_max_logratio)
        self.trainer.record_means(
            rehearsal__divergence=(terms, mask),
            rehearsal__kl=(torch.expm1(logratios) - logratios, mask),
            rehearsal__logratio=(logratios, mask),
            rehearsal__forgotten=((logratios < _FORGOTTEN).float(), mask),
            rehearsal__bounded=(bounded.float(), mask),
        )

    def facts(self) -> dict[str, Any]:
        """Rows of the model card."""
        return {"divergence": repr(self.divergence), "rehearsed answers": len(self.answers)}
