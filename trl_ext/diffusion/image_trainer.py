"""What the trainers of text-to-image pipelines share: loading, adapters, checkpoints, validation images, cards."""

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch
from datasets import Dataset
from peft import LoraConfig
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from transformers import (
    PreTrainedTokenizerBase,
    ProcessorMixin,
    TrainerCallback,
    enable_full_determinism,
    set_seed,
)
from transformers.trainer_utils import HubStrategy
from transformers.utils.quantization_config import QuantizationConfigMixin

from .._trl import BaseTrainer, prepare_fsdp
from ..training.arguments import check_optimizers, resolve_args
from ..training.card_facts import BaseModel
from ..training.model_card import CardFacts, DocumentedRun
from ..training.processes import check_is_split, check_same_lengths
from ..training.progress import PreferenceProgress
from ..training.resume import ResumableRun
from ..training.seeds import forked_random_state
from ..training.sharding import loaded_by_every_process, whole_weights
from .ema import EMACallback
from .export import check_export_format, export_kohya
from .image_config import ImageConfig
from .loading import (
    is_quantized,
    is_single_file,
    load_pipeline,
    prepare_policy,
    prepare_reference,
    restore_pipeline,
)
from .model_card import TEMPLATE, base_of, card_facts, copy_grid
from .paired_denoiser import PairedDenoiser
from .prompts import without_truncation_warnings
from .saving import describe_base, gathered_denoiser, load_weights, save_weights, trained_parameters
from .validation import ValidationCallback


if TYPE_CHECKING:  # diffusers is optional
    from diffusers import DiffusionPipeline


class ImageTrainer(DocumentedRun, ResumableRun, BaseTrainer):
    """
    Base of the trainers of text-to-image pipelines: everything but the data and the step.

    A kind of method, such as [`DiffusionTrainer`] for pairs or [`OnlineDiffusionTrainer`] for rewards, says what it
    trains on in [`~ImageTrainer._prepare_data`], and overrides Transformers' `compute_loss` and `prediction_step`.

    Args:
        model (`str` or `diffusers.DiffusionPipeline`):
            Pipeline to train: its id on the Hub, its folder, a single-file checkpoint (`.safetensors`), or itself.
        ref_model (`torch.nn.Module` or `diffusers.DiffusionPipeline`, *optional*):
            Reference. Defaults to what training starts from.
        args ([`ImageConfig`], *optional*):
            Configuration.
        data_collator (`Callable`, *optional*):
            From a list of items of the dataset to a batch. Defaults to the method's own.
        train_dataset, eval_dataset ([`~datasets.Dataset`]):
            Data; `eval_dataset` may be a `dict` of several.
        processing_class (*optional*):
            Refused: tokenizers and image processing are the pipeline's.
        callbacks, optimizers (*optional*):
            As for [`~transformers.Trainer`].
        quantization_config (`BitsAndBytesConfig`, *optional*):
            Load the denoiser in 4 bit (QLoRA). Needs `peft_config` and a `model` that is a string.
        peft_config (`peft.LoraConfig`, *optional*):
            LoRA to train. Its `target_modules` default to the attention's projections.

    Class attributes:
        config_class (`type`):
            The configuration, a subclass of [`ImageConfig`].
        needed_data (`str`):
            What `train_dataset` must be, for the message if it is missing.
        card_task, card_unit, data_unit (`str`):
            What the model card says was trained on, and what a row of a batch and of the training data is.

    Raises:
        `TypeError`, `ValueError`: For arguments that cannot be honored; each message names the argument and the
        remedy.
    """

    config_class: ClassVar[type[ImageConfig]] = ImageConfig
    needed_data: ClassVar[str] = "the training data"
    card_task: ClassVar[str] = "images"
    card_unit: ClassVar[str] = "images"
    data_unit: ClassVar[str] = "images"

    _card_template = TEMPLATE
    _tag_names = ["trl", "trl-ext"]
    _name = "Training of images"
    _paper: ClassVar[dict[str, str]] = {}

    _signature_columns: list[str] | None
    image_size: tuple[int, int]
    train_dataset: Any
    eval_dataset: Any

    def __init__(
        self,
        model: "str | DiffusionPipeline",
        ref_model: "torch.nn.Module | DiffusionPipeline | None",
        args: ImageConfig | None,
        data_collator: Any,
        train_dataset: Dataset | None,
        eval_dataset: Dataset | dict[str, Dataset] | None,
        processing_class: PreTrainedTokenizerBase | ProcessorMixin | None,
        callbacks: list[TrainerCallback] | None,
        optimizers: tuple[Optimizer | None, LRScheduler | None],
        quantization_config: QuantizationConfigMixin | None,
        peft_config: LoraConfig | None,
    ):
        check_is_split(train_dataset)
        args = self._check_arguments(model, args, train_dataset, processing_class)
        splits = eval_dataset if isinstance(eval_dataset, dict) else {"eval": eval_dataset}
        check_same_lengths({"train": train_dataset, **splits})
        if quantization_config is not None and peft_config is None:
            raise ValueError(
                "`quantization_config` was given without `peft_config`: quantized weights cannot be trained. Pass a "
                "`peft_config` (QLoRA), or leave `quantization_config` out for full fine-tuning."
            )
        if isinstance(model, str):  # fails before gigabytes are downloaded
            self.state_base(args, BaseModel.of(model, "", args.hub_base_model_id), peft_config is not None)
        with loaded_by_every_process():
            self.family = load_pipeline(
                model,
                dtype=_frozen_dtype(args) if peft_config is not None else torch.float32,
                init_kwargs=cast(dict, args.model_init_kwargs or {}),  # JSON text has been read by the configuration
                quantization_config=quantization_config,
                device=args.device,
            )
        # Where freed encoders are loaded from again.
        self._source = model if isinstance(model, str) and not is_single_file(model) else None
        # `Trainer` also seeds, but later; a LoRA is initialized here.
        enable_full_determinism(args.seed) if args.full_determinism else set_seed(args.seed)
        adapter_name = prepare_policy(self.family, peft_config)
        autocast_dtype = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else None
        reference = prepare_reference(self.family, ref_model, adapter_name, autocast_dtype)
        policy = PairedDenoiser(
            self.family, adapter_name, reference, name_or_path=model if isinstance(model, str) else None
        )
        self.state_base(args, base_of(policy, args), is_adapter=adapter_name is not None)
        self._base = describe_base(policy)
        self._check_options(args)
        check_export_format(policy, args.export_format)
        check_optimizers(
            policy,
            optimizers,
            "The trainer makes the LoRA of `peft_config` anew: leave `optimizers` out and set `optim` and "
            "`learning_rate`.",
        )
        self._init_metrics()
        # A reference that the user gives may be any other model; every other one is what training starts from.
        self._start_is_unchecked = ref_model is None
        self._given_optimizers = tuple(given is not None for given in optimizers)
        self.source_dataset = train_dataset
        train_data, eval_data, collator = self._prepare_data(args, train_dataset, eval_dataset)
        super().__init__(
            model=policy,
            args=args,
            data_collator=data_collator or collator,
            train_dataset=train_data,
            eval_dataset=eval_data,
            callbacks=[*(callbacks or []), PreferenceProgress()],
            optimizers=optimizers,
        )
        self._check_distributed()
        self.ref_model = reference
        # The accelerator neither moves nor shards the reference, which is no submodule.
        policy.to_device(self.accelerator.device)
        if self.is_fsdp_enabled and reference is not None:
            prepare_fsdp(reference, self.accelerator)

        self._ema = None
        if args.use_ema:
            self._ema = EMACallback(trained_parameters(policy), args.ema_decay)
            self.add_callback(self._ema)
        self._validation = None
        if args.validation_prompts:
            self._validation = ValidationCallback(self)
            self.add_callback(self._validation)
        self._prepare_encoders()

    # ---- What a kind of method says ----------------------------------------------------------------------------------

    def _check_options(self, args) -> None:
        """Checks and resolves the options whose validity depends on the pipeline."""

    def _prepare_data(self, args, train_dataset, eval_dataset) -> tuple[Any, Any, Any]:
        """
        Returns training data, evaluation data (of a `dict`, the same of each) and the collator, and sets `image_size`.
        """
        raise NotImplementedError(f"`{type(self).__name__}` must define `_prepare_data`.")

    def _prepare_given(self, dataset: Dataset, name: str) -> Any:
        """Evaluation data in the trainer's form, from a dataset that was given to `evaluate` or `predict`."""
        raise NotImplementedError(f"`{type(self).__name__}` must define `_prepare_given`.")

    def _prepare_encoders(self) -> None:
        """Moves the encoders to the device, and encodes the validation prompts."""
        for part in (self.family.pipeline.vae, *self.family.text_encoders):
            part.to(self.accelerator.device)
        if self._validation is not None:
            self._validation.prepare()

    # ---- What is refused -------------------------------------------------------------------------------------------

    def _check_arguments(self, model, args, train_dataset, processing_class):
        args = resolve_args(self, model if isinstance(model, str) else type(model).__name__, args)
        if train_dataset is None:
            raise ValueError(f"`train_dataset` is required: {self.needed_data}.")
        if processing_class is not None:
            raise ValueError(
                "`processing_class` is not used: tokenizers and image processing are the pipeline's. Leave it out; to "
                "change them, pass a pipeline instance as `model`."
            )
        return args

    def _check_distributed(self) -> None:
        engine = reason = None
        if getattr(getattr(self.accelerator.state, "deepspeed_plugin", None), "zero_stage", 0) == 3:
            engine = "DeepSpeed ZeRO-3"
            reason = "Transformers would partition the pipeline's text encoders, too, which nothing gathers"
        elif self.is_fsdp_enabled and not self.accelerator.is_fsdp2:
            engine, reason = "FSDP1", "it flattens the LoRA's parameters together with the base's"
        if engine is not None:
            raise ValueError(
                f"{engine} is not supported by `{type(self).__name__}`: {reason}. Use FSDP2 (`fsdp_version: 2`), DDP or "
                "ZeRO-2."
            )
        if not self.is_fsdp_enabled:
            return
        if self.args.use_ema:
            raise ValueError(
                "`use_ema=True` is not supported under FSDP2: the average is made of whole weights, which no process "
                "has. Leave it out, or use DDP or ZeRO-2; with a LoRA the denoiser fits."
            )
        if "FULL" not in str(self.accelerator.state.fsdp_plugin.state_dict_type):
            raise ValueError(
                "`fsdp_state_dict_type` must be FULL_STATE_DICT: checkpoints are written in diffusers' format, by one "
                f"process. Got {self.accelerator.state.fsdp_plugin.state_dict_type}."
            )

    def check_start_difference(self, pred: torch.Tensor, ref_pred: torch.Tensor) -> None:
        """
        Raises `ValueError` if, before the first step, predictions of policy and reference differ by more than
        rounding: the reference is then not what training starts from. Every process must call it.
        """
        difference = (pred - ref_pred).norm() / ref_pred.norm().clamp(min=1e-12)
        is_half = self.policy.input_dtype != torch.float32 or self.accelerator.mixed_precision != "no"
        tolerance = 1e-2 if is_half else 1e-4
        if self.accelerator.gather(difference.reshape(1)).max() > tolerance:
            raise ValueError(
                f"Before the first step, the predictions of policy and reference differ by {difference:.2g} of their "
                f"norm (at most {tolerance:g} is rounding): the reference is not what training starts from. Likely "
                "causes: weights that were changed after the trainer was made; a module with randomness of its own; a "
                "LoRA of a kind that changes the base. If the difference is intended, pass the reference as "
                "`ref_model`."
            )

    # ---- Evaluation ------------------------------------------------------------------------------------------------

    def _encode_prompts(self, prompts: list[str]) -> dict[str, torch.Tensor]:
        with without_truncation_warnings(self.family.pipeline):
            return self.family.encode_prompts(prompts)

    def averaged_weights(self):
        """Context with the moving average in place of the weights, if there is one."""
        return contextlib.nullcontext() if self._ema is None else self._ema.applied()

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval"):
        """Like [`~transformers.Trainer.evaluate`]; a raw dataset is prepared first."""
        if isinstance(eval_dataset, dict):
            eval_dataset = {name: self._given_data(dataset, name) for name, dataset in eval_dataset.items()}
        else:
            eval_dataset = self._given_data(eval_dataset, metric_key_prefix)
        # An iterator over a DataLoader draws from the global random state, which would change the rest of training.
        with forked_random_state(self.accelerator.device), self.averaged_weights():
            return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)

    def predict(self, test_dataset, ignore_keys=None, metric_key_prefix="test"):
        """
        Like [`~transformers.Trainer.predict`]; a raw dataset is prepared first. There are metrics and no predictions.
        """
        with forked_random_state(self.accelerator.device), self.averaged_weights():
            return super().predict(self._given_data(test_dataset, metric_key_prefix), ignore_keys, metric_key_prefix)

    def _given_data(self, dataset, name: str):
        return self._prepare_given(dataset, name) if isinstance(dataset, Dataset) else dataset

    # ---- Checkpoints -----------------------------------------------------------------------------------------------

    @property
    def policy(self) -> PairedDenoiser:
        """Policy and reference, unwrapped."""
        return self.accelerator.unwrap_model(self.model)

    def _save(self, output_dir: str | None = None, state_dict=None) -> None:
        if not self.args.should_save:
            return
        folder = Path(output_dir or self.args.output_dir)
        base = self.base_model.for_the_public() if self.is_card_public else self.base_model
        state = state_dict if self.is_fsdp_enabled else None
        save_weights(self.policy, folder, {**self._base, "name_or_path": base.name}, state)
        torch.save(self.args, folder / "training_args.bin")

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """
        Saves the LoRA in diffusers' format, or under full fine-tuning the whole pipeline, with a model card. If there
        is a moving average, it is saved in place of the weights; a checkpoint has both.
        """
        folder = Path(output_dir or self.args.output_dir)
        # A push saves by an internal call, too, but into the output folder.
        is_checkpoint = _internal_call and folder.resolve() != Path(self.args.output_dir).resolve()
        with contextlib.nullcontext() if is_checkpoint else self.averaged_weights():
            if not is_checkpoint and self.policy.adapter_name is None:
                state = self.accelerator.get_state_dict(self.model) if self.is_fsdp_enabled else None
                if self.args.should_save:
                    with gathered_denoiser(self.policy, state):
                        self.full_pipeline().save_pretrained(folder)
            if self.args.should_save and is_checkpoint and self._ema is not None:
                self._ema.save(folder)
            super().save_model(output_dir, _internal_call)
            if not is_checkpoint and self.args.export_format == "kohya":
                with whole_weights(self.policy):
                    if self.args.should_save:
                        export_kohya(self.policy, folder)
        if self.args.should_save:
            self.write_model_card(folder)

    def saved_parts(self) -> list[str]:
        is_whole = self.policy.adapter_name is None
        return list(self.family.pipeline.components) if is_whole else []

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        # Transformers copies only the weight files that it knows from the checkpoint.
        if self.args.hub_strategy != HubStrategy.END:
            self.save_model(self.args.output_dir, _internal_call=True)
        super()._push_from_checkpoint(checkpoint_folder)

    def full_pipeline(self):
        """Returns the pipeline with the policy in it; freed components are loaded again."""
        return restore_pipeline(self.family, self._source, self.args.model_init_kwargs or {})

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model=None) -> None:
        load_weights(self.policy if model is None else model, resume_from_checkpoint, self._base)
        if self._ema is not None:
            self._ema.load(resume_from_checkpoint)

    def _load_best_model(self) -> None:
        self._load_from_checkpoint(self.state.best_model_checkpoint)

    # ---- Sharing ---------------------------------------------------------------------------------------------------

    @property
    def last_grid(self) -> Path | None:
        """File of the last grid of validation images, if there is one."""
        return None if self._validation is None else self._validation.last_grid

    @property
    def num_training_rows(self) -> int:
        """Rows of the training data that are trained on."""
        return len(self.train_dataset)

    def card_facts(self) -> CardFacts:
        return card_facts(self)

    def write_model_card(self, folder: Path) -> None:
        """Like the parent's; the last grid of validation images is copied beside the card."""
        if self.is_world_process_zero():
            copy_grid(self, folder)
        super().write_model_card(folder)

    @property
    def is_quantized(self) -> bool:
        """Whether the denoiser's frozen weights are quantized."""
        return is_quantized(self.family.denoiser)


def _frozen_dtype(args) -> torch.dtype:
    return torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else torch.float32
