"""D2PO (https://huggingface.co/papers/2405.01511)."""

import dataclasses
import json
import os
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch
from accelerate.logging import get_logger
from datasets import Dataset
from peft import PeftConfig, PeftModel
from safetensors.torch import load_file, save_file
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from transformers import DataCollator, PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback
from transformers.trainer_utils import EvalPrediction
from transformers.utils.quantization_config import QuantizationConfigMixin

from ..judges.callables import check_columns
from ..losses import Divergence
from ..preference import Method, PairLoss, PreferenceTrainer, ResponseScores
from ..preference.method import get_method
from .build import check_arguments, check_engine, make_discriminator, make_sampler
from .d2po_config import D2POConfig
from .labellers import LabellerError, as_labeller
from .labelling import GoldLabels
from .loss_options import method_options
from .prompts import PromptCollator, is_preference_data, prepare_prompts
from .rounds import Rounds
from .window import Window, WindowSampler


logger = get_logger(__name__)

STATE_FILE, DISCRIMINATOR_FILE = "d2po_state.json", "d2po_discriminator.safetensors"


class D2POTrainer(PreferenceTrainer):
    r"""
    Trainer for D2PO, introduced in the paper [D2PO: Discriminator-Guided DPO with Response Evaluation
    Models](https://huggingface.co/papers/2405.01511): online preference optimization in which a few pairs of each
    window get gold labels, and a discriminator that learns from all gold labels so far orders the other pairs.

    Training goes window by window. Completions of the window's prompts are sampled from the policy and scored by the
    discriminator; gold labels are bought for some pairs and written to a ledger on disk before they are used; the
    discriminator learns from them and from earlier ones; all pairs are ordered, by gold where there is a verdict, by
    the discriminator elsewhere; and the policy is trained on them, with DPO's loss or that of any method of this
    project.

    Example:

    ```python
    >>> from datasets import load_dataset
    >>> from peft import LoraConfig
    >>> from trl_ext import D2POConfig, D2POTrainer
    >>> from trl_ext.judges import EndpointJudge

    >>> trainer = D2POTrainer(
    ...     model="Qwen/Qwen2.5-0.5B-Instruct",
    ...     args=D2POConfig("Qwen2.5-0.5B-D2PO", label_budget=1000),
    ...     train_dataset=load_dataset("trl-lib/ultrafeedback-prompt", split="train"),
    ...     peft_config=LoraConfig(),
    ...     gold_labeller=EndpointJudge("gpt-4o-mini"),
    ... )
    >>> trainer.train()
    ```

    The arguments are those of [`~trl.DPOTrainer`], and:

    Args:
        train_dataset ([`~datasets.Dataset`]):
            Prompts, text or messages, in the column `prompt`. Further columns are passed to the labeler.
        eval_dataset ([`~datasets.Dataset`] or `dict`, *optional*):
            Prompts, whose completions are sampled, or preference pairs. Evaluation buys no labels.
        gold_labeller ([`~trl_ext.judges.Judge`] or `Callable`, *optional*):
            Who gives gold labels: a judge; a function on pairs, `(prompts, completions_a, completions_b, **columns)`,
            that gives one verdict a pair, 1 if `a` is better, 0 if `b` is, -1 for a tie, or the probability that `a`
            is better; a reward function as TRL takes it, `(prompts, completions, **columns)`; or a
            [`~trl_ext.d2po.Gold`] of any of these, which states the cost of a label. Required unless `label_budget=0`.
        discriminator (optional):
            Replaces the one that `args.discriminator` names: a [`~peft.LoraConfig`] of its adapter, a
            sequence-classification model, or a list of either, an ensemble.
        discriminator_processing_class ([`~transformers.PreTrainedTokenizerBase`], *optional*):
            Tokenizer of a discriminator that is a model; loaded from where the model was by default.
        discriminator_dataset ([`~datasets.Dataset`], *optional*):
            Preference pairs that the discriminator learns from before the first window, such as
            [`~trl_ext.d2po.ledger_to_dataset`] makes of an earlier run's ledger.
        divergence ([`~trl_ext.losses.Divergence`], *optional*):
            With `loss="fdpo"`, a divergence of your own; see [`FDPOTrainer`].

    Raises:
        `ValueError`, `TypeError`: In the constructor, for invalid settings.
        [`~trl_ext.d2po.LabellerError`]: In training, if the labeler or the ledger failed. The run can be resumed.
    """

    config_class = D2POConfig
    args: D2POConfig
    train_dataset: Dataset

    _tag_names = ["trl", "trl-ext", "d2po", "online"]
    _name = "D2PO"
    _paper = {
        "title": "D2PO: Discriminator-Guided DPO with Response Evaluation Models",
        "id": "2405.01511",
        # docstyle-ignore
        "citation": textwrap.dedent("""\
            @article{singhal2024d2po,
                title        = {{D2PO: Discriminator-Guided DPO with Response Evaluation Models}},
                author       = {Prasann Singhal and Nathan Lambert and Scott Niekum and Tanya Goyal and Greg Durrett},
                year         = 2024,
                eprint       = {arXiv:2405.01511},
                url          = {https://huggingface.co/papers/2405.01511},
            }"""),
    }

    def __init__(
        self,
        model: str | PreTrainedModel | PeftModel,
        ref_model: PreTrainedModel | PeftModel | None = None,
        args: D2POConfig | None = None,
        data_collator: DataCollator | None = None,
        train_dataset: Dataset | None = None,
        eval_dataset: Dataset | dict[str, Dataset] | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        compute_metrics: Callable[[EvalPrediction], dict] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Optimizer | None, LRScheduler | None] = (None, None),
        quantization_config: QuantizationConfigMixin | None = None,
        peft_config: PeftConfig | None = None,
        *,
        gold_labeller: Callable | None = None,
        discriminator: Any = None,
        discriminator_processing_class: PreTrainedTokenizerBase | None = None,
        discriminator_dataset: Dataset | None = None,
        divergence: Divergence | None = None,
    ):
        self._given_divergence = divergence
        check_arguments(self, args, eval_dataset, gold_labeller, discriminator, discriminator_dataset)
        super().__init__(
            model=model,
            ref_model=ref_model,
            args=args,
            data_collator=data_collator,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            compute_metrics=compute_metrics,
            callbacks=callbacks,
            optimizers=optimizers,
            quantization_config=quantization_config,
            peft_config=peft_config,
        )
        config: D2POConfig = self.args
        check_engine(self, discriminator)
        if len(self.train_dataset) < config.resolved_window_size:
            raise ValueError(
                f"The train dataset has {len(self.train_dataset)} prompts, fewer than a window of "
                f"`window_size={config.window_size}`. Lower `window_size` (a multiple of the pairs of an optimizer "
                "step), or give more prompts."
            )
        labeller = None if gold_labeller is None else as_labeller(gold_labeller)
        if labeller is not None:
            check_columns(labeller, self.train_dataset.column_names)
        self._pair_collator = self.data_collator
        self.data_collator = PromptCollator(self._pair_collator)
        self.sampler = make_sampler(self)
        self.discriminator = make_discriminator(self, discriminator, discriminator_processing_class)
        self._warm_start_dataset = None
        if discriminator_dataset is not None:
            self._warm_start_dataset = PreferenceTrainer._prepare_dataset(
                self, discriminator_dataset, self.processing_class, config, "discriminator"
            )
        self.gold = GoldLabels(
            labeller,
            config.ledger_file or os.path.join(config.output_dir, "gold_labels.jsonl"),
            budget=config.label_budget,
            batch_size=config.label_batch_size,
            retries=config.label_retries,
            retry_delay=config.label_retry_delay,
            timeout=config.label_timeout,
            seed=config.seed,
            accelerator=self.accelerator,
            show_progress=not config.disable_tqdm,
        )
        self.rounds = Rounds(config, self.sampler, self.discriminator, self.gold, self.accelerator)
        self._pair_window: Window | None = None
        self._pair_scale = 1.0
        self._batch_is_sampled = False
        self._resume_folder: str | None = None
        self.add_callback(_RunBoundary(self))

    # ---- The method ------------------------------------------------------------------------------------------------

    def _make_method(self, args: D2POConfig) -> Method:
        method_class: Callable[..., Method] = get_method(args.loss)
        if self._given_divergence is None:
            return method_class(args.make_method_args())
        if args.loss != "fdpo":
            raise ValueError(
                f"`divergence={self._given_divergence!r}` has no effect with `loss={args.loss!r}`. Use `loss='fdpo'`, "
                "or leave it out."
            )
        return method_class(args.make_method_args(), divergence=self._given_divergence)

    @property
    def pair_collator(self):
        return self._pair_collator

    @property
    def pairs_for_estimates(self) -> list[dict]:
        if self._pair_window is None:
            raise ValueError(
                "`kappa='auto'` is estimated from the pairs of the first window, which are not sampled yet. Evaluate "
                "after training has begun (`eval_on_start=False`), or give `kappa` as a number in `loss_kwargs`."
            )
        return [dataclasses.asdict(row) for row in self._pair_window.rows]

    # ---- Prompts ---------------------------------------------------------------------------------------------------

    def _prepare_dataset(self, dataset, processing_class, args, dataset_name):
        columns = next(iter(dataset))
        if dataset_name != "train" and is_preference_data(columns):
            return super()._prepare_dataset(dataset, processing_class, args, dataset_name)
        room = None if args.max_length is None else args.max_length - args.max_completion_length
        return prepare_prompts(dataset, processing_class, dataset_name, room, args.dataset_num_proc)

    def _remove_unused_columns(self, dataset, description=None):
        # The labeler gets the further columns of a prompt.
        if is_preference_data(dataset.column_names):
            return super()._remove_unused_columns(dataset, description)
        return dataset

    # ---- The windows -----------------------------------------------------------------------------------------------

    @property
    def _micro_batches(self) -> int:
        """Micro-batches in which a process trains on a window."""
        config = self.args
        return config.resolved_window_size * config.num_policy_epochs // (config.train_batch_size * config.world_size)

    def get_train_dataloader(self):
        # Each batch holds a process's whole share of the window, once for every micro-batch of it.
        return self._get_dataloader(
            dataset=self.train_dataset,
            description="Training",
            batch_size=self.args.resolved_window_size // self.args.world_size,
            sampler_fn=self._get_train_sampler,
            is_training=True,
        )

    def _get_train_sampler(self, train_dataset=None) -> WindowSampler:
        return WindowSampler(
            len(self.train_dataset if train_dataset is None else train_dataset),
            self.args.resolved_window_size,
            self._micro_batches,
            shuffle=self.args.train_sampling_strategy == "random",
            seed=self.args.seed if self.args.data_seed is None else self.args.data_seed,
            # What has been trained says which epoch begins, in a resumed run too.
            epoch=lambda: int(self.state.epoch or 0),
        )

    def _prepare_inputs(self, inputs):
        if isinstance(inputs, list):
            mode = "train" if self.model.training else "eval"
            if mode == "train":
                rows, values = self._training_pairs(inputs)
                metrics = {name: (value, 1) for name, value in values.items()}
            else:
                self._pair_scale = 1.0
                rows, metrics = self.rounds.evaluation_pairs(inputs, self._rows_of_last_batch())
            for name, (total, count) in metrics.items():
                self._window[mode].add(name, total, count)
            self._batch_is_sampled = True
            inputs = self._pair_collator(rows)
        elif not self.model.training:
            self._pair_scale, self._batch_is_sampled = 1.0, False
        return super()._prepare_inputs(inputs)

    def floating_point_ops(self, inputs):
        return 0 if isinstance(inputs, list) else super().floating_point_ops(inputs)

    def _training_pairs(self, examples: list[dict]) -> tuple[list[dict], dict[str, float]]:
        """The next micro-batch, of a new window where the last is used up, and the window's metrics."""
        window = self._pair_window
        if window is None or window.position == self._micro_batches:
            number = 0 if window is None else window.number + 1
            try:
                window = self._pair_window = self.rounds.make_window(examples, number, self.state.global_step)
            except LabellerError:
                self._save_before_window()
                raise
        rows, self._pair_scale = window.next_batch(
            self.args.train_batch_size, self.accelerator.process_index, self.accelerator.num_processes
        )
        if self.discriminator is None and window.position == self._micro_batches and self.gold.remaining == 0:
            logger.info("The label budget is used up, and there is no discriminator to go on with: training ends.")
            self.control.should_training_stop = True
        return rows, window.metrics

    # ---- The step --------------------------------------------------------------------------------------------------

    def pair_loss(self, chosen: ResponseScores, rejected: ResponseScores) -> PairLoss:
        self.method.args.beta = cast(float, self.args.beta)  # a schedule sets it on `args`
        result = super().pair_loss(chosen, rejected)
        if self._pair_scale == 1.0:
            return result
        # The ties left out of the batch count as pairs of loss 0.
        return dataclasses.replace(result, losses=result.losses * self._pair_scale)

    def _add_metrics(self, metrics, policy, chosen, rejected, result):
        super()._add_metrics(metrics, policy, chosen, rejected, result)
        if self._batch_is_sampled and self.needs_reference:
            # Both completions are the policy's own, so the mean log ratio estimates KL(policy || reference).
            for name in ("d2po/reverse_kl", "d2po/kl"):  # the latter is the name in 0.1.0, kept for one release
                metrics.mean(name, torch.cat([chosen.logratios, rejected.logratios]))

    # ---- Checkpoints and resuming ----------------------------------------------------------------------------------

    def _is_whole(self, checkpoint):
        return super()._is_whole(checkpoint) and (checkpoint / STATE_FILE).is_file()

    def train(self, resume_from_checkpoint=None, *args, **kwargs):
        """
        Like [`~transformers.Trainer.train`]. With `resume_from_checkpoint=True` it continues from the last checkpoint
        that is whole, or, if there is none, begins again with the labels in the ledger.
        """
        if resume_from_checkpoint is True:
            resume_from_checkpoint = self.last_whole_checkpoint()
            if resume_from_checkpoint is None:
                logger.info(f"There is no checkpoint in `{self.args.output_dir}`: training begins at the first step.")
        self._resume_folder = resume_from_checkpoint or None
        try:
            return super().train(resume_from_checkpoint or None, *args, **kwargs)
        finally:
            self.gold.close()

    def _begin(self) -> None:
        """Starts the run's own state, or restores it."""
        folder = self._resume_folder
        if self.discriminator is not None:
            self.discriminator.prepare()
        if folder is None:
            self._pair_window, self.rounds.fresh_accuracy = None, []
            self.gold.begin()
            if self._warm_start_dataset is not None:
                self.rounds.warm_start(self._warm_start_dataset, self._tokenizer.decode)
            return
        try:
            state = json.loads(Path(folder, STATE_FILE).read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise ValueError(
                f"`{folder}` is not a checkpoint of D2PO: it has no `{STATE_FILE}`. Resume from one of this trainer's."
            ) from None
        self.gold.begin(**state["gold"])
        self._pair_window = None if state["window"] is None else Window.from_state_dict(state["window"])
        if self._pair_window is not None and len(self._pair_window.rows) != self.args.window_size:
            raise ValueError(
                f"The checkpoint's windows have {len(self._pair_window.rows)} pairs, and `window_size` is "
                f"{self.args.window_size}. Resume with the settings of the run."
            )
        self.rounds.fresh_accuracy = state["fresh_accuracy"]
        if self.discriminator is not None and self.discriminator.is_trainable:
            self.discriminator.load_state_dict(load_file(Path(folder, DISCRIMINATOR_FILE)))

    def _save_checkpoint(self, model, trial):
        # Before the parent, which ends with `trainer_state.json`: a checkpoint that has it has everything.
        folder = Path(self._get_output_dir(trial=trial), f"checkpoint-{self.state.global_step}")
        weights = None
        if self.discriminator is not None and self.discriminator.is_trainable:
            weights = self.discriminator.state_dict()  # on every process
        if self.args.should_save:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "trainer_state.json").unlink(missing_ok=True)
            state = {
                "gold": self.gold.state_dict(),
                "window": None if self._pair_window is None else self._pair_window.state_dict(),
                "fresh_accuracy": self.rounds.fresh_accuracy,
            }
            (folder / STATE_FILE).write_text(json.dumps(state), encoding="utf-8")
            if weights is not None:
                save_file(weights, folder / DISCRIMINATOR_FILE)
        super()._save_checkpoint(model, trial)

    def _save_before_window(self) -> None:
        """Saves the state before a window whose labels could not be had, so that nothing trained is lost either."""
        step = self.state.global_step
        try:
            if step > 0 and not self._is_whole(Path(self._get_output_dir(trial=None), f"checkpoint-{step}")):
                self._save_checkpoint(self.model, trial=None)
            self.create_model_card()  # an earlier one does not say how far the run has come
        except OSError as error:  # a full disk, most likely; why the run stops is said by the caller's error
            logger.error(f"The state before the window could not be saved ({type(error).__name__}: {error}).")

    def save_model(self, output_dir=None, _internal_call=False):
        super().save_model(output_dir, _internal_call)
        # In checkpoints the discriminator's weights are beside its optimizer's.
        if not _internal_call and self.discriminator is not None and self.is_world_process_zero():
            self.discriminator.save_pretrained(Path(output_dir or self.args.output_dir, "discriminator"))

    def saved_parts(self):
        members = [] if self.discriminator is None else self.discriminator.members
        names = ("discriminator" if index == 0 else f"discriminator_{index}" for index in range(len(members)))
        return [*super().saved_parts(), *names]

    # ---- Sharing ---------------------------------------------------------------------------------------------------

    def resolved_hyperparameters(self) -> dict:
        config = self.args
        method_args = self.method.args
        resolved = {name: getattr(method_args, name) for name in method_options(config.loss)}
        resolved["loss_kwargs"] = None  # its entries have rows of their own
        if "beta" in method_args.refused_options():
            resolved["beta"] = None
        resolved.update(super().resolved_hyperparameters())
        resolved["gold labels bought"] = self.gold.describe()
        if self.discriminator is not None:
            resolved["discriminator updates"] = self.discriminator.updates
        resolved["ledger_file"] = None  # a local path does not belong on a public card
        if not config.use_vllm:
            resolved.update({option: None for option, needed in config._dependent_options if needed == "use_vllm"})
        return resolved


class _RunBoundary(TrainerCallback):
    """Initializes the trainer's own state once the weights are in place and before anything is evaluated."""

    def __init__(self, trainer: D2POTrainer):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        self.trainer._begin()
