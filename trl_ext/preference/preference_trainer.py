"""The shared paired step of every language-model method."""

from collections.abc import Callable
from functools import cached_property
from typing import Any, ClassVar, Literal, cast, overload

import torch
from accelerate.logging import get_logger
from accelerate.utils import recursively_apply
from datasets import Dataset, IterableDataset
from peft import PeftConfig, PeftModel
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import SequentialSampler
from transformers import DataCollator, PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin, TrainerCallback
from transformers.trainer_pt_utils import LengthGroupedSampler
from transformers.trainer_utils import EvalPrediction
from transformers.utils.quantization_config import QuantizationConfigMixin
from trl import DPOTrainer

from .._patches import dpo_trainer_construction, keep_quantized_weights
from .._trl import get_config_model_id, global_then_local_main_first
from ..training.adapters import complete_reference_adapter
from ..training.arguments import check_optimizers, resolve_args, without_format
from ..training.dropout import disable_functional_dropout
from ..training.metrics import StepMetrics
from ..training.processes import check_is_split, check_same_lengths
from ..training.progress import PreferenceProgress
from ..training.resume import ResumableRun
from ..training.scoring_head import HeadStates, ScoringRequest, add_scoring_head
from ..training.text_card import DocumentedTextRun, base_of, names_of_fields
from . import data, rows
from .layout import Layout
from .method import Method, check_needs
from .model_checks import (
    check_adapter,
    check_architecture,
    check_policy,
    check_separate,
    check_trainable,
)
from .preference_config import PreferenceConfig
from .reference import Reference
from .reference_cache import add_reference_statistics
from .scoring import (
    NON_MODEL_KEYS,
    REFERENCE_COLUMNS,
    PairLoss,
    ResponseScores,
    TokenStatistics,
)


logger = get_logger(__name__)

# What a trainer class may declare instead of its method.
_NEEDS = ("reference_statistics", "needs_token_kl", "extra_columns", "extra_columns_range")


class PreferenceTrainer(DocumentedTextRun, ResumableRun, DPOTrainer):
    """
    Base of the paired preference trainers: everything of [`~trl.DPOTrainer`] but the loss.

    A trainer holds a [`Method`], an instance of `method_class`: what is read of the reference, and the loss. A
    subclass can also define both itself:

    ```python
    class MyTrainer(PreferenceTrainer):
        _name = "My method"

        def pair_loss(self, chosen, rejected):
            margin = self.args.beta * (chosen.logratios - rejected.logratios)
            rewards = (self.args.beta * side.logratios for side in (chosen, rejected))
            return PairLoss(torch.relu(1 - margin), *rewards)
    ```

    Data flows one way: dataset -> TRL's tokenization and collator -> [`compute_loss`] -> policy scores -> reference
    scores (forward, precomputed, or none) -> [`pair_loss`] -> metrics.

    The arguments are those of [`~trl.DPOTrainer`], in its order.

    Class attributes:
        method_class (`type[Method]`):
            The method.
        config_class (`type[PreferenceConfig]`):
            The method's configuration.
        needs_reference, reference_statistics, needs_token_kl, extra_columns, extra_columns_range:
            What the method needs; see [`Method`]. A subclass that defines `pair_loss` itself declares its needs here.
            On an instance: what this trainer needs, given its `args`.

    Raises:
        `TypeError`: If `args` is not an instance of the method's configuration class.
        `ValueError`: For data without preference columns, rows, or responses; for a `ref_model` given to a method that
            uses none, or one whose vocabulary differs from the policy's.
        `FloatingPointError`: In training and evaluation, on a loss that is not finite.
    """

    method_class: ClassVar[type[Method]] = Method
    config_class: ClassVar[type[PreferenceConfig]] = PreferenceConfig
    method: Method
    train_dataset: Dataset | IterableDataset | None
    eval_dataset: Dataset | IterableDataset | dict[str, Dataset | IterableDataset] | None
    data_collator: Callable[[list[dict]], dict]

    needs_reference: bool = True
    reference_statistics: tuple[str, ...] = Method.reference_statistics
    needs_token_kl: bool = Method.needs_token_kl
    extra_columns: tuple[str, ...] = Method.extra_columns
    extra_columns_range: tuple[float, float] = Method.extra_columns_range

    _tag_names = ["trl", "trl-ext"]
    _name = "Preference optimization"
    _paper: ClassVar[dict[str, str]] = {}
    _is_built = False

    def __init__(
        self,
        model: str | PreTrainedModel | PeftModel,
        ref_model: PreTrainedModel | PeftModel | None = None,
        args: PreferenceConfig | None = None,
        data_collator: DataCollator | None = None,
        train_dataset: Dataset | IterableDataset | None = None,
        eval_dataset: Dataset | IterableDataset | dict[str, Dataset | IterableDataset] | None = None,
        processing_class: PreTrainedTokenizerBase | ProcessorMixin | None = None,
        compute_metrics: Callable[[EvalPrediction], dict] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Optimizer | None, LRScheduler | None] = (None, None),
        quantization_config: QuantizationConfigMixin | None = None,
        peft_config: PeftConfig | None = None,
    ):
        args = resolve_args(self, model if isinstance(model, str) else get_config_model_id(model.config), args)
        check_is_split(train_dataset)
        data.check_dataset_types(eval_dataset)
        splits = {"train": train_dataset, **self._named_splits(eval_dataset)}
        for name, dataset in splits.items():
            data.check_not_empty_dataset(dataset, name)
        check_same_lengths(splits)
        check_policy(model, ref_model)
        self.method = self._make_method(args)
        self._resolve_needs(args)
        if not self.needs_reference:
            if ref_model is not None:
                raise ValueError(
                    f"`ref_model` was given, a `{type(ref_model).__name__}`, but {self.method.name} uses no reference "
                    f"model{' with these options' if type(self).needs_reference else ''}. Leave `ref_model` out."
                )
        check_separate(model, ref_model)
        check_adapter(model, peft_config, args, is_own_reference=self.needs_reference and ref_model is None)
        self.reference = Reference(
            ref_model,
            method=self.method,
            args=args,
            policy=lambda: self.model,
            accelerator=lambda: self.accelerator,
            step=lambda: self.state.global_step,
            is_in_memory=not isinstance(model, str),
            layout=lambda: self.layout,
        )
        del ref_model  # `precompute_ref_log_probs` lets go of it below

        self.state_base(args, base_of(model, args), peft_config is not None or isinstance(model, PeftModel))
        self._init_metrics()
        # Fingerprints of the datasets that this trainer has tokenized, and of those whose statistics it has computed.
        self._prepared: dict[str, set[str]] = {"tokens": set(), "statistics": set()}
        self._given_optimizers = tuple(given is not None for given in optimizers)
        with dpo_trainer_construction(_add_checked_head):
            super().__init__(
                model=model,
                ref_model=self.reference.take_argument(),
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
        self._is_built = True
        for name, dataset in {"train": self.train_dataset, **self._named_splits(self.eval_dataset)}.items():
            self._check_tokens(dataset, name)
        if self._tokenizer.pad_token_id is not None:
            self._check_token(self._tokenizer.pad_token_id, "the padding")
        if self.precompute_ref_logps:
            self.reference.free()
        for quantized in (self.model, self.ref_model):
            if quantized is not None:
                keep_quantized_weights(quantized)
        if self._scores_in_one_pass:
            if self.is_fsdp_enabled and not self.accelerator.is_fsdp2:
                raise ValueError(
                    "FSDP1 is not supported with the token KL, which reads both models' heads in one forward: FSDP1 "
                    "frees the reference's at the end of its own. Use FSDP2 (`fsdp_version: 2`) or DeepSpeed ZeRO."
                )
        self.reference.check_frozen()
        _ = self.layout  # made here at the latest, so that `share_prompts=True` is refused in the constructor
        check_optimizers(
            self.model,
            optimizers,
            "The trainer makes an adapter of `peft_config` anew: make it first (`get_peft_model`) and the optimizer "
            "from its parameters, or leave `optimizers` out and set `optim` and `learning_rate`.",
        )
        if self.args.disable_dropout:
            disable_functional_dropout(self.model)
        self.add_callback(PreferenceProgress())
        if self.extra_columns + self._precomputed_columns:
            self.data_collator = data.ColumnCollator(self.data_collator, self.extra_columns, self._precomputed_columns)
        if self._is_vision_dataset:
            # Collated on the fly and never prepared, so `_prepare_dataset` does not see it.
            self.data_collator = data.VisionCollator(self.data_collator, self.args.max_length)
            self.train_dataset = self._check_vision_dataset(train_dataset, "train")
            if isinstance(eval_dataset, dict):
                self.eval_dataset = {
                    key: self._check_vision_dataset(split, key) for key, split in eval_dataset.items()
                }
            elif eval_dataset is not None:
                self.eval_dataset = self._check_vision_dataset(eval_dataset, "eval")
        self.method.bind(self)
        self._check_sampling()

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        if "method_class" in vars(cls):
            # A trainer class says what its method needs; a subclass of it may say something else.
            method = cls.method_class
            needs = {name: getattr(method, name) for name in _NEEDS}
            needs["needs_reference"] = bool(method.reference_statistics) or method.needs_token_kl
            for name, value in needs.items():
                if name not in vars(cls):
                    setattr(cls, name, value)
        for name, instead in {
            "_compute_loss": "`pair_loss`, the loss of a method, or `compute_loss`, the step",
            "compute_ref_log_probs": "`score_reference`",
        }.items():
            if name in vars(cls):
                raise TypeError(f"`{cls.__name__}.{name}` would never be called: override {instead}.")

    # ---- The method ------------------------------------------------------------------------------------------------

    @property
    def beta(self) -> float:
        """`args.beta`, which every loss reads: a schedule may set either in training."""
        return self.args.beta

    @beta.setter
    def beta(self, value: float) -> None:
        if "args" not in vars(self):
            return  # `DPOTrainer.__init__` copies it before there are any
        if value != self.args.beta and "beta" in self.method.args.refused_options():
            raise AttributeError(f"`beta={value!r}` has no effect: {self.method.name} has none.")
        self.args.beta = value

    def _make_method(self, args: PreferenceConfig) -> Method:
        """The method, an instance of `method_class`. Called before the trainer is built."""
        method = self.method_class(args)
        method.name = self._name
        return method

    def pair_loss(self, chosen: ResponseScores, rejected: ResponseScores) -> PairLoss:
        """
        The loss of each pair: the method's, unless a subclass overrides it. See [`Method.pair_loss`].

        Args:
            chosen ([`ResponseScores`]):
                Scores of the preferred responses.
            rejected ([`ResponseScores`]):
                Scores of the other responses, in the same order.
        """
        if type(self.method) is Method:
            raise NotImplementedError(f"`{type(self).__name__}` must define `pair_loss(self, chosen, rejected)`.")
        return self.method.pair_loss(chosen, rejected)

    @property
    def pair_collator(self) -> Callable[[list[dict]], dict]:
        """What makes a batch of tokenized pairs."""
        return self.data_collator

    @property
    def pairs_for_estimates(self):
        """Tokenized training pairs, by index, from which a method may estimate a parameter before the first loss."""
        return self.train_dataset

    # ---- What the method needs -------------------------------------------------------------------------------------

    def _needed_reference_statistics(self, args: PreferenceConfig) -> tuple[str, ...]:
        """
        What this trainer reads of the reference, `()` for nothing. A trainer without a method of its own overrides it
        where that depends on the configuration. Called before the trainer is built, when `self.args` is not there yet.
        """
        return self.method.reference_statistics if self.needs_reference else ()

    def _needed_columns(self, args: PreferenceConfig) -> tuple[str, ...]:
        """The additional dataset columns that this trainer reads; override it like `_needed_reference_statistics`."""
        return self.method.extra_columns

    def _resolve_needs(self, args: PreferenceConfig) -> None:
        """Reconciles the needs of the method and of the trainer, and refuses options that then have no effect."""
        method = self.method
        for name in _NEEDS:
            declared = getattr(type(self), name)
            if declared != getattr(self.method_class, name):  # a subclass declares its own
                setattr(method, name, declared)
        method.reference_statistics = tuple(self._needed_reference_statistics(args))
        method.extra_columns = tuple(self._needed_columns(args))
        for name in (*_NEEDS, "needs_reference"):
            setattr(self, name, getattr(method, name))
        check_needs(method, args)

    @property
    def _precomputed_columns(self) -> tuple[str, ...]:
        """Columns of the precomputed reference statistics that TRL does not know of."""
        if not self.precompute_ref_logps:
            return ()
        return tuple(key for name in self.reference_statistics if name != "logps" for key in REFERENCE_COLUMNS[name])

    # ---- The reference ---------------------------------------------------------------------------------------------

    @property
    def ref_model(self):
        """The separate reference model; `None` if the policy is its own reference or no reference is needed."""
        return self.reference.model

    @ref_model.setter
    def ref_model(self, ref_model) -> None:
        if ref_model is None and not self._is_built:
            complete_reference_adapter(self.model)  # before anything is precomputed with it
        self.reference.attach(ref_model)

    @property
    def _scores_in_one_pass(self) -> bool:
        return self.needs_token_kl or self.args.log_token_kl

    @property
    def token_kl_gradient(self) -> tuple[bool, bool]:
        """
        Whether the KL of the chosen and that of the rejected responses have a gradient; otherwise they are detached.
        """
        return self.method.token_kl_gradient

    @property
    def reference_config(self):
        """
        Configuration of the separate reference model, even after it was freed; `None` if the policy is its own
        reference.
        """
        return self.reference.config

    # ---- The step --------------------------------------------------------------------------------------------------

    @cached_property
    def layout(self) -> Layout:
        """
        Whether batches are scored on padded rows or on packed ones. Made at its first use: precomputing the
        reference's statistics, or the end of the constructor.
        """
        return Layout(self.args, self.model, self.accelerator, has_images=self._is_vision_dataset)

    def score_policy(self, model, inputs: dict) -> TokenStatistics:
        """
        Per-token statistics of the batch under the policy, with gradient; where the token KL is needed, beside those
        of the reference, whose backbone runs first.
        """
        request = None
        if self._scores_in_one_pass:
            request = ScoringRequest(
                reference=self.score_reference(inputs, keep_states=True),
                kl_gradient=self.token_kl_gradient,
                ref_entropy="entropy" in self.reference_statistics,
            )
        scores = self.layout.score(model, inputs, request, output_router_logits=self.aux_loss_enabled)
        return cast(TokenStatistics, scores)  # `HeadStates` come with `keep_states` only

    @overload
    def score_reference(self, inputs: dict, keep_states: Literal[False] = False) -> TokenStatistics: ...

    @overload
    def score_reference(self, inputs: dict, keep_states: Literal[True]) -> HeadStates: ...

    def score_reference(self, inputs: dict, keep_states: bool = False) -> TokenStatistics | HeadStates:
        """Per-token statistics of the batch under the reference, without gradient; or its hidden states and head."""
        return self.reference.score(inputs, keep_states)

    def _score_responses(self, policy: TokenStatistics, inputs: dict) -> tuple[ResponseScores, ResponseScores]:
        fields = {"mask": policy.mask, "token_logps": policy.log_probs}
        if self.needs_reference and self.precompute_ref_logps:
            for name in self.reference_statistics:
                fields[f"ref_{name}"] = torch.cat([inputs[key] for key in REFERENCE_COLUMNS[name]])
        elif self.needs_reference:
            reference = policy.reference or self.score_reference(inputs)
            fields["ref_token_logps"] = reference.log_probs
            fields.update({f"ref_{name}": reference.per_response(name) for name in self.reference_statistics})
        if policy.token_kl is not None:
            fields["token_kl"] = policy.token_kl
        columns = inputs.get("columns", {})
        sides = zip(*(value.chunk(2) for value in fields.values()), strict=True)
        chosen, rejected = (ResponseScores(**dict(zip(fields, side, strict=True)), columns=columns) for side in sides)
        return chosen, rejected

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        self.layout.check(model, inputs)
        self.reference.check_layout(inputs)
        try:
            policy = self.score_policy(model, inputs)
        except ValueError as error:
            if "Image features and image tokens do not match" in str(error) and self.args.max_length is not None:
                raise ValueError(
                    f"`max_length={self.args.max_length}` is too short: it cuts image placeholders out of `input_ids` "
                    "while the image features remain. Raise `max_length`, or set it to `None`."
                ) from error
            raise
        chosen, rejected = self._score_responses(policy, inputs)
        if self.is_in_train and self.model.training:
            self.reference.check_start(
                chosen, rejected, lambda: self._score_responses(self.score_policy(model, inputs), inputs)
            )
        result = self.pair_loss(chosen, rejected)
        loss = self.mean_loss(result.losses)
        if self.aux_loss_enabled:
            loss = loss + self.router_aux_loss_coef * policy.aux_loss
        self._record_step(inputs, policy, chosen, rejected, result, loss)

        if not return_outputs:
            return loss
        # As in `DPOTrainer`: `compute_metrics` and `predict` get logits, which the fused head never builds.
        model_kwargs = {key: value for key, value in inputs.items() if key not in NON_MODEL_KEYS}
        with torch.no_grad():
            return loss, model(**model_kwargs, use_cache=False)

    def _record_step(self, inputs, policy, chosen, rejected, result: PairLoss, loss: torch.Tensor) -> None:
        """Stops on a loss that is not finite; otherwise keeps the step's metrics until the next log."""
        metrics = self.start_metrics(result.losses, loss)
        metrics.total("num_tokens", inputs["attention_mask"].sum())
        self._add_metrics(metrics, policy, chosen, rejected, result)
        totals = self.record(metrics)
        if totals is None:
            bad = ~torch.isfinite(result.losses.detach())
            raise FloatingPointError(self._describe_nonfinite(self._mode, inputs, bad, chosen, rejected, result))
        if self.model.training:
            # Tensor parallel ranks are given the same batch, so the sum repeats every token once a rank of the group.
            self._progress.num_tokens += int(totals["num_tokens"]) // self._tp_size

    def _add_metrics(self, metrics: StepMetrics, policy, chosen, rejected, result: PairLoss) -> None:
        """TRL's keys, then what every method is compared by, then the method's own."""
        if policy.aux_loss is not None:
            metrics.batch_value("aux_loss", policy.aux_loss)
        metrics.mean("entropy", policy.entropy, where=policy.mask)
        chosen_logits, rejected_logits = policy.mean_logits.chunk(2)
        metrics.mean("logits/chosen", chosen_logits, where=chosen.mask)
        metrics.mean("logits/rejected", rejected_logits, where=rejected.mask)
        metrics.mean("mean_token_accuracy", policy.is_top1.chunk(2)[0], where=chosen.mask)
        metrics.mean("rewards/chosen", result.chosen_rewards)
        metrics.mean("rewards/rejected", result.rejected_rewards)
        metrics.mean("rewards/accuracies", result.chosen_rewards > result.rejected_rewards)
        metrics.mean("rewards/margins", result.chosen_rewards - result.rejected_rewards)
        metrics.mean("logps/chosen", chosen.logps)
        metrics.mean("logps/rejected", rejected.logps)
        # The policy's own ranking of the two responses, which a reward margin does not show
        # (https://huggingface.co/papers/2405.19534). A tie is right here (its Definition 2.3), and wrong in TRL's
        # `rewards/accuracies`: trl_ext/evaluation/README.md, "Metric names".
        metrics.mean("ranking_accuracy/policy", chosen.logps >= rejected.logps)
        metrics.mean("ranking_accuracy/policy_norm", chosen.mean_logps >= rejected.mean_logps)
        if chosen.ref_logps is not None:
            metrics.mean("ranking_accuracy/reference", chosen.ref_logps >= rejected.ref_logps)
            metrics.mean("ranking_accuracy/reference_norm", chosen.ref_mean_logps >= rejected.ref_mean_logps)
            # Mean log ratio: how far each side's log-probability has drifted from the reference's.
            metrics.mean("logratios/chosen", chosen.logratios)
            metrics.mean("logratios/rejected", rejected.logratios)
        if chosen.token_kl is not None:
            for name in ("forward_kl", "kl"):  # `kl` is the name in 0.1.0, kept for one release
                metrics.mean(f"{name}/chosen", chosen.kl)
                metrics.mean(f"{name}/rejected", rejected.kl)
                metrics.mean(f"{name}/margin", chosen.kl - rejected.kl)
        for name, values in (result.metrics or {}).items():
            metrics.mean(name, values)

    def _describe_nonfinite(self, mode, inputs, bad, chosen, rejected, result) -> str:
        step = self.state.global_step + (mode == "train")
        head = f"The loss is not finite at step {step} ({mode}). Nothing was saved over the last checkpoint."
        rows = []
        for i in bad.nonzero().flatten().tolist():
            described = [f"pair {i} of the batch on process {self.accelerator.process_index}: loss {result.losses[i]}"]
            for side, scores, row in (("chosen", chosen, i), ("rejected", rejected, i + bad.numel())):
                ids = inputs["input_ids"][row][inputs["attention_mask"][row].bool()]
                text = self._tokenizer.decode(ids)
                text = text if len(text) <= 300 else f"{text[:150]} ... {text[-150:]}"
                described.append(
                    f"{side}: {int(scores.num_tokens[i])} response tokens, log-probability {scores.logps[i].item()}"
                    + ("" if scores.ref_logps is None else f", reference {scores.ref_logps[i].item()}")
                    + f", text {text!r}"
                )
            rows.append("\n    ".join(described))
        rows = rows or ["the offending pairs are on another process, or the auxiliary loss is not finite"]
        advice = (
            "If the log-probabilities are not finite, the model's weights or activations are: look at earlier "
            "`grad_norm`s, lower `learning_rate`, train in bf16 rather than fp16. If they are finite, the pair is."
        )
        return "\n  ".join([head, *rows, advice])

    # ---- Logging, checkpoints, resuming ----------------------------------------------------------------------------

    def _metrics_to_log(self, mode: str) -> dict[str, float]:
        metrics = super()._metrics_to_log(mode)
        return {**metrics, "num_tokens": self._progress.num_tokens} if metrics else {}

    def evaluation_loop(
        self, dataloader, description, prediction_loss_only=None, ignore_keys=None, metric_key_prefix="eval"
    ):
        if not self.args.eval_use_gather_object:
            self.gather_function = self._gather_rows
        return super().evaluation_loop(dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix)

    def _gather_rows(self, data):
        """
        What a batch gives to `predict` and `compute_metrics`, of all processes and without the pairs that only fill it
        up: rows of the chosen responses, then as many of the rejected. [`~accelerate.Accelerator.gather_for_metrics`]
        cuts the last batch to as many rows as it has pairs.
        """
        data = self.accelerator.gather(data)
        remainder = self._rows_of_last_batch()
        processes = self.accelerator.num_processes

        def cut(tensor: torch.Tensor) -> torch.Tensor:
            if tensor.dim() == 1:  # the loss, repeated
                return tensor if remainder is None else tensor[:remainder]
            sides = tensor.reshape(processes, 2, -1, *tensor.shape[1:]).transpose(0, 1).flatten(1, 2)
            return sides[:, :remainder].flatten(0, 1)

        return recursively_apply(cut, data)

    def train(self, *args, **kwargs):
        check_trainable(self.accelerator.unwrap_model(self.model))
        self.reference.check_frozen()
        self.reference.release_memory()
        return super().train(*args, **kwargs)

    # ---- Data ------------------------------------------------------------------------------------------------------

    def _check_sampling(self) -> None:
        """Raises `ValueError` for a `train_sampling_strategy` that the training data do not have the lengths for."""
        has_lengths = isinstance(self.train_dataset, Dataset) and "prompt_ids" in self.train_dataset.column_names
        if self.args.train_sampling_strategy != "group_by_length" or has_lengths:
            return
        raise ValueError(
            "`train_sampling_strategy='group_by_length'` needs the lengths of all pairs before training, which a "
            "streaming dataset or one with images does not have. Use 'random' or 'sequential'."
        )

    def _get_train_sampler(self, train_dataset=None):
        if self.args.train_sampling_strategy != "group_by_length":
            return super()._get_train_sampler(train_dataset)
        # Transformers looks for the column `input_ids`, which pairs do not have.
        dataset: Any = self.train_dataset if train_dataset is None else train_dataset
        columns = (dataset[f"{part}_ids"] for part in ("prompt", "chosen", "rejected"))
        lengths = [len(p) + max(len(c), len(r)) for p, c, r in zip(*columns, strict=True)]
        if self.args.max_length is not None:
            lengths = [min(length, self.args.max_length) for length in lengths]
        pairs_of_step = self.args.train_batch_size * self.args.gradient_accumulation_steps
        return LengthGroupedSampler(pairs_of_step, lengths=lengths)

    def _get_eval_sampler(self, eval_dataset):
        if self.args.train_sampling_strategy != "group_by_length":
            return super()._get_eval_sampler(eval_dataset)
        # In the dataset's order, which is that of the rows of `predict`.
        return SequentialSampler(eval_dataset) if self.args.world_size <= 1 else None

    @staticmethod
    def _named_splits(dataset) -> dict:
        if dataset is None:
            return {}
        return dict(dataset) if isinstance(dataset, dict) else {"eval": dataset}

    def _prepare_dataset(self, dataset, processing_class, args, dataset_name):
        if self._has_prepared(dataset, "tokens"):
            return dataset
        dataset = without_format(dataset, dataset_name)
        first = next(iter(dataset))
        data.check_columns(first, dataset_name)
        self.method.check_dataset(list(first), dataset_name)
        dataset = data.check_numbers(dataset, dataset_name, self.extra_columns, self.extra_columns_range)
        options = {"num_proc": args.dataset_num_proc} if isinstance(dataset, Dataset) else {}
        if data.is_tokenized(first) and not set(data.SIDES) <= set(first):  # tokens beside their text may be another's
            data.check_token_columns(dataset, dataset_name)
            if args.max_length is not None and args.truncation_mode == "keep_start":
                # As in `DPOTrainer`: truncation would leave nothing of these rows' responses.
                dataset = dataset.filter(_fits, fn_kwargs={"max_length": args.max_length}, **options)
        else:
            with global_then_local_main_first():
                if "prompt" not in first:
                    # As in `DPOTrainer`, but first: a response can be empty once the shared prompt is taken off.
                    dataset = rows.split_prompts(dataset, dataset_name, options)
                data.check_eos_token(first, self._tokenizer)
                dataset = rows.check_rows(dataset, dataset_name, args.drop_empty_completions)
                dataset = rows.ready_to_tokenize(dataset, self._tokenizer, options)
            dataset = super()._prepare_dataset(dataset, processing_class, args, dataset_name)
            with global_then_local_main_first():
                dataset = rows.settle_tokens(dataset, processing_class, self._tokenizer, options)
        if isinstance(dataset, Dataset) and len(dataset) == 0:
            raise ValueError(
                f"Every prompt of the {dataset_name} dataset fills `max_length={args.max_length}` tokens, so no row "
                "is left. Raise `max_length`."
            )
        dataset = data.check_tokenized(dataset, dataset_name, args.max_length, args.truncation_mode, self._check_token)
        if "model" in vars(self):  # an evaluation set that comes later; before, there is no model to ask
            self._check_tokens(dataset, dataset_name)
        return self._remember(dataset, "tokens")

    def _check_token(self, token: int, where: str) -> None:
        embedding = self.model.get_input_embeddings()
        data.check_known(token, where, getattr(embedding, "num_embeddings", None), self._tokenizer)

    def _check_tokens(self, dataset, name: str) -> None:
        """Raises `ValueError` if the model lacks a token of a prepared dataset. Streams are checked as they come."""
        if isinstance(dataset, Dataset) and data.is_tokenized(dataset.column_names):
            for token, row in data.extreme_tokens(dataset):
                self._check_token(token, f"the {name} dataset (row {row})")

    def _remember(self, dataset, *what: str):
        """
        Records which preparation steps a dataset has been through, so `evaluate` and `predict` do not repeat them.
        """
        for done in what if isinstance(dataset, Dataset) else ():
            self._prepared[done].add(dataset._fingerprint)
        return dataset

    def _has_prepared(self, dataset, what: str) -> bool:
        return isinstance(dataset, Dataset) and dataset._fingerprint in self._prepared[what]

    def _check_vision_dataset(self, dataset, name: str):
        """Returns a vision dataset without unusable rows, or raises; a streaming dataset is checked as it streams."""
        first = next(iter(dataset))
        data.check_columns(first, name)
        if "prompt" not in first:
            raise ValueError(
                f"The {name} dataset has images and no column `prompt`; it has {sorted(first)}. Implicit prompts are "
                "for text only: split them off with `trl.extract_prompt`."
            )
        dataset = data.check_numbers(dataset, name, self.extra_columns, self.extra_columns_range)
        return rows.check_rows(dataset, name, self.args.drop_empty_completions)

    def _set_signature_columns_if_needed(self):
        super()._set_signature_columns_if_needed()
        missing = [
            name for name in self.extra_columns + self._precomputed_columns if name not in self._signature_columns
        ]
        self._signature_columns += missing

    def _precompute_ref_logps(self, dataset, name, batch_size):
        if isinstance(dataset, IterableDataset):
            raise ValueError(
                f"`precompute_ref_log_probs=True` is not supported with a streaming dataset, as the {name} dataset "
                "is: its pairs come anew each time. Use a map-style dataset, or set `precompute_ref_log_probs=False`."
            )
        there = [key for keys in REFERENCE_COLUMNS.values() for key in keys if key in dataset.column_names]
        if there:
            if self._has_prepared(dataset, "statistics"):
                return dataset  # `evaluate` and `predict` are given what the constructor prepared
            logger.warning(
                f"The {name} dataset already has the columns {there} from an unknown reference model; they are "
                "ignored and recomputed."
            )
            dataset = dataset.remove_columns(there)
        dataset = add_reference_statistics(
            dataset,
            name,
            rows=self._remove_unused_columns(dataset),
            statistics=self.reference_statistics,
            reference=self.reference,
            score=self.score_reference,
            collator=self.data_collator,
            accelerator=self.accelerator,
            folder=self.args.reference_cache_dir,
            batch_size=batch_size,
            num_workers=self.args.dataloader_num_workers,
            pin_memory=self.args.dataloader_pin_memory,
            show_progress=not self.args.disable_tqdm,
        )
        return self._remember(dataset, "tokens", "statistics")

    def _prepare_later(self, dataset, name: str):
        """Prepares an evaluation set that was not given to the constructor, as the constructor would have."""
        if isinstance(dataset, dict):
            return {key: self._prepare_later(split, key) for key, split in dataset.items()}
        check_same_lengths({name: dataset})
        dataset = self._prepare_dataset(dataset, self.processing_class, self.args, name)
        if self.precompute_ref_logps:
            batch_size = self.args.precompute_ref_batch_size or self.args.per_device_eval_batch_size
            dataset = self._precompute_ref_logps(dataset, name, batch_size)
        return dataset

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval"):
        if not self.precompute_ref_logps or eval_dataset is None or isinstance(eval_dataset, str):
            return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        # `DPOTrainer.evaluate` would refuse any dataset once the reference is gone. The cache may have its pairs.
        dataset = self._prepare_later(eval_dataset, "eval")
        return super(DPOTrainer, self).evaluate(dataset, ignore_keys, metric_key_prefix)

    def predict(self, test_dataset, ignore_keys=None, metric_key_prefix="test"):
        """Like [`~transformers.Trainer.predict`], and like `evaluate` it prepares a raw dataset first."""
        if not self._is_vision_dataset:
            test_dataset = self._prepare_later(test_dataset, "test")
        return super().predict(test_dataset, ignore_keys, metric_key_prefix)

    # ---- Sharing ---------------------------------------------------------------------------------------------------

    def resolved_hyperparameters(self) -> dict:
        """
        Hyperparameters for the model card that are missing from `args` or were resolved later (e.g. an estimated
        kappa). `None` leaves a row out.
        """
        return self.method.resolved_hyperparameters()

    def own_option_names(self) -> list[str]:
        return ["beta", *names_of_fields(type(self.args), beside=PreferenceConfig)]


def _add_checked_head(model, **kwargs) -> None:
    check_architecture(model)
    add_scoring_head(model, **kwargs)


def _fits(row, max_length: int) -> bool:
    return len(row["prompt_ids"]) < max_length
