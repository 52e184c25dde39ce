"""The trainer that the methods for pairs of images share: everything but the loss."""

import hashlib
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from datasets import Dataset
from peft import LoraConfig
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from transformers import PreTrainedTokenizerBase, ProcessorMixin, TrainerCallback
from transformers.trainer_utils import EvalPrediction
from transformers.utils.quantization_config import QuantizationConfigMixin

from ..losses.diffusion import PairErrors, pair_errors, safeguard_scale
from ..training.fingerprints import describe_tokenizer, fingerprint
from ..training.metrics import StepMetrics
from ..training.seeds import forked_random_state
from .buckets import BucketedBatches, bucket_sizes
from .data import EpochCallback, ImagePreferenceDataset, PairCollator, check_resolution, warn_once_a_run
from .diffusion_config import DiffusionConfig
from .families import PipelineFamily
from .image_trainer import ImageTrainer
from .latent_cache import CachedPairs, cache_latents, estimate_bytes
from .loading import free_memory
from .prompts import warn_of_cut_prompts


if TYPE_CHECKING:  # diffusers is optional
    from diffusers import DiffusionPipeline

logger = logging.getLogger(__name__)

# Number of consecutive logs with a positive chosen gap after which a warning is given.
_GAP_PATIENCE = 5


@dataclass(frozen=True)
class DenoisedPairs:
    """
    Predictions of both models for a batch of pairs, and their targets; every tensor of images is `(B, C, h, w)`.

    Attributes:
        chosen_pred, rejected_pred (`torch.Tensor`):
            Predictions of the policy, with gradient.
        chosen_ref_pred, rejected_ref_pred (`torch.Tensor`):
            Predictions of the reference.
        chosen_target, rejected_target (`torch.Tensor`):
            Targets of the predictions, in float32.
        timesteps (`torch.Tensor` of shape `(B,)`):
            Timestep of each pair, in the pipeline's units.
        weight (`torch.Tensor` of shape `(B,)`, *optional*):
            Weight of the errors of each pair; `None` for 1.
    """

    chosen_pred: torch.Tensor
    rejected_pred: torch.Tensor
    chosen_ref_pred: torch.Tensor
    rejected_ref_pred: torch.Tensor
    chosen_target: torch.Tensor
    rejected_target: torch.Tensor
    timesteps: torch.Tensor
    weight: torch.Tensor | None = None

    @property
    def predictions(self) -> tuple[torch.Tensor, ...]:
        """The six tensors in the order in which every loss takes them."""
        return (
            self.chosen_pred,
            self.rejected_pred,
            self.chosen_ref_pred,
            self.rejected_ref_pred,
            self.chosen_target,
            self.rejected_target,
        )

    @cached_property
    def errors(self) -> PairErrors:
        """Squared errors without gradient, for metrics."""
        with torch.no_grad():
            return pair_errors(*self.predictions, weight=self.weight)


class PredictionCheck:
    """
    Warns if the reference does worse than a model that always predicts 0 where noise dominates, over the first pairs
    of a run. The usual cause is a scheduler whose `prediction_type` is not the denoiser's: a prediction of v taken for
    one of the noise, or the reverse, is then off by the size of the image.
    """

    num_pairs = 64

    def __init__(self) -> None:
        self._errors: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._is_done = False

    def add(self, pairs: DenoisedPairs, family: PipelineFamily) -> None:
        if self._is_done:
            return
        noisiest = pairs.timesteps.float() > 0.5 * family.num_train_timesteps
        if noisiest.any():
            target, prediction = pairs.chosen_target[noisiest], pairs.chosen_ref_pred[noisiest].detach().float()
            self._errors.append(((prediction - target).square().mean((1, 2, 3)), target.square().mean((1, 2, 3))))
        if sum(len(error) for error, _ in self._errors) >= self.num_pairs:
            error, zero = (torch.cat(column).mean().item() for column in zip(*self._errors, strict=True))
            self._errors.clear()
            self._is_done = True
            if error > zero:
                logger.warning(
                    f"At high noise the reference's squared error is {error:.3g}; a model that always predicts 0 has "
                    f"{zero:.3g}. Either the denoiser is untrained, or the scheduler's `prediction_type` "
                    f"({family.prediction_type!r}) is not what the denoiser predicts. To change it: "
                    "`pipeline.scheduler.register_to_config(prediction_type='v_prediction')`."
                )


class DiffusionTrainer(BucketedBatches, ImageTrainer):
    """
    Base of the diffusion preference trainers: everything but the loss.

    A method is a subclass with a configuration and a loss:

    ```python
    class MyTrainer(DiffusionTrainer):
        config_class = MyConfig

        def pair_loss(self, pairs):
            return torch.relu(1 - pairs.errors.argument(self.args.beta))
    ```

    (with errors that have a gradient, from `trl_ext.losses.pair_errors(*pairs.predictions)`).

    Data flows one way: dataset -> pixels or cached latents -> one timestep and one noise for each pair -> policy and
    reference in one forward -> [`pair_loss`] -> metrics. Noise and timestep are drawn from the seed, the step and the
    pair's number, so they do not depend on the split into micro-batches and processes. Every evaluation has the same
    draws.

    Args:
        model (`str` or `diffusers.DiffusionPipeline`):
            Pipeline to train: its id on the Hub, its folder, a single-file checkpoint (`.safetensors`), or itself. If
            it comes with a LoRA and no `peft_config` is given, that LoRA is trained on, and its frozen copy is the
            reference.
        ref_model (`torch.nn.Module` or `diffusers.DiffusionPipeline`, *optional*):
            Reference. Defaults to what training starts from: with a LoRA the same model with the LoRA switched off,
            which takes no memory; under full fine-tuning a second denoiser.
        args ([`DiffusionConfig`], *optional*):
            Configuration.
        data_collator (`Callable`, *optional*):
            From a list of items of the dataset to a batch. Defaults to [`~trl_ext.diffusion.data.PairCollator`].
        train_dataset, eval_dataset ([`~datasets.Dataset`]):
            Pairs: `prompt`, `chosen` and `rejected`, or Pick-a-Pic's columns. See
            [`~trl_ext.diffusion.data.ImagePreferenceDataset`]. `eval_dataset` may be a `dict` of several.
        processing_class (*optional*):
            Refused: tokenizers and image processing are the pipeline's.
        compute_metrics (*optional*):
            Refused: an evaluation has errors, and no predictions to hand over.
        callbacks (`list[TrainerCallback]`, *optional*):
            Callbacks.
        optimizers (`tuple`, *optional*):
            Optimizer and scheduler.
        quantization_config (`BitsAndBytesConfig`, *optional*):
            Load the denoiser in 4 bit (QLoRA). Needs `peft_config` and a `model` that is a string.
        peft_config (`peft.LoraConfig`, *optional*):
            LoRA to train. Its `target_modules` default to the attention's projections.

    Raises:
        `TypeError`, `ValueError`: For arguments that cannot be honored; each message names the argument and the
        remedy. `FloatingPointError`: In training and evaluation, on a loss that is not finite.
    """

    config_class: ClassVar[type[DiffusionConfig]] = DiffusionConfig
    needed_data = "pairs of images with `prompt`, `chosen` and `rejected`"
    card_task = "pairs of preferred and rejected images"
    card_unit = data_unit = "pairs"

    _name = "Diffusion preference optimization"

    train_dataset: ImagePreferenceDataset | CachedPairs
    eval_dataset: ImagePreferenceDataset | CachedPairs | dict[str, ImagePreferenceDataset | CachedPairs] | None

    def __init__(
        self,
        model: "str | DiffusionPipeline",
        ref_model: "torch.nn.Module | DiffusionPipeline | None" = None,
        args: DiffusionConfig | None = None,
        data_collator: Callable[[list[dict]], dict] | None = None,
        train_dataset: Dataset | None = None,
        eval_dataset: Dataset | dict[str, Dataset] | None = None,
        processing_class: PreTrainedTokenizerBase | ProcessorMixin | None = None,
        compute_metrics: Callable[[EvalPrediction], dict] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Optimizer | None, LRScheduler | None] = (None, None),
        quantization_config: QuantizationConfigMixin | None = None,
        peft_config: LoraConfig | None = None,
    ):
        if compute_metrics is not None:
            raise ValueError(
                "`compute_metrics` is not supported: an evaluation keeps errors, and no predictions to compute it "
                "from. Leave it out; the metrics are in the log."
            )
        self._positive_gaps = 0
        self._prediction_check = PredictionCheck()
        super().__init__(
            model=model,
            ref_model=ref_model,
            args=args,
            data_collator=data_collator,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            callbacks=[*(callbacks or []), EpochCallback()],
            optimizers=optimizers,
            quantization_config=quantization_config,
            peft_config=peft_config,
        )

    # ---- What is refused -------------------------------------------------------------------------------------------

    def _check_options(self, args: DiffusionConfig) -> None:
        """Checks the options whose validity depends on the pipeline."""
        sampling = args.timestep_sampling or self.family.timestep_sampling
        for option, default in (("logit_mean", 0.0), ("logit_std", 1.0)):
            if sampling != "logit_normal" and getattr(args, option) != default:
                raise ValueError(
                    f"`{option}={getattr(args, option)!r}` has no effect with `timestep_sampling={sampling!r}`. Set "
                    f"`timestep_sampling='logit_normal'`, or leave `{option}` at its default ({default})."
                )
        if args.guidance_scale is not None and not self.family.is_guidance_distilled:
            raise ValueError(
                f"`guidance_scale={args.guidance_scale!r}` has no effect: the `{type(self.family.denoiser).__name__}` "
                "of this pipeline takes no guidance scale as input. Leave it out; `validation_guidance_scale` is for "
                "sampling."
            )
        self._timestep_sampling = sampling
        self._error_space = args.error_space or self.family.error_space
        self._prompt_dropout = args.prompt_dropout
        if self._prompt_dropout is None:
            self._prompt_dropout = 0.2 if self.family.uses_empty_prompt else 0.0
        if args.guidance_scale is not None:
            self.family.guidance_scale = args.guidance_scale

    # ---- Data ------------------------------------------------------------------------------------------------------

    def _prepare_data(self, args, train_dataset, eval_dataset):
        resolution = args.resolution or self.family.default_resolution
        self._buckets = None
        if args.aspect_buckets:
            multiple = self.family.resolution_multiple
            self._buckets = bucket_sizes(check_resolution(resolution, multiple)[0], multiple, args.max_aspect_ratio)
        images = self._open_images(train_dataset, "train", args, resolution, augment=True)
        eval_images: Any
        if isinstance(eval_dataset, dict):
            eval_images = {name: self._open_images(d, name, args, resolution) for name, d in eval_dataset.items()}
        else:
            eval_images = self._open_images(eval_dataset, "eval", args, resolution)
        self._list_skipped(args, images, eval_images)
        self.image_size = images.size
        return images, eval_images, PairCollator(images.size)

    def _open_images(self, dataset, name: str, args, resolution, augment: bool = False):
        if dataset is None:
            return None
        options = {}
        if augment:
            seed = args.seed if args.data_seed is None else args.data_seed
            options = dict(
                random_crop=args.random_crop,
                random_flip=args.random_flip,
                prompt_dropout=self._prompt_dropout,
                seed=seed,
            )
        images = ImagePreferenceDataset(
            dataset,
            resolution,
            name=name,
            multiple=self.family.resolution_multiple,
            buckets=self._buckets,
            image_dir=args.image_dir,
            verify_images=args.verify_images,
            skip_broken_images=args.skip_broken_images,
            **options,
        )
        warn_of_cut_prompts(self.family, images)
        return images

    def _list_skipped(self, args, images, eval_images) -> None:
        """Writes what `skip_broken_images` left out into a file of the output folder."""
        others = eval_images.values() if isinstance(eval_images, dict) else [eval_images]
        messages = [message for opened in (images, *others) if opened is not None for message in opened.skipped]
        if messages and args.should_save:
            path = Path(args.output_dir) / "skipped_images.txt"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("".join(f"{message}\n" for message in messages), encoding="utf-8")

    def _prepare_encoders(self) -> None:
        """Moves the encoders to the device. With `cache_latents`, fills the cache and frees them."""
        super()._prepare_encoders()
        if not self.args.cache_latents:
            return
        self._warn_of_unseen_pairs(len(self.train_dataset))
        self.train_dataset = self._cache(self.train_dataset)
        if isinstance(self.eval_dataset, dict):
            self.eval_dataset = {name: self._cache(dataset) for name, dataset in self.eval_dataset.items()}
        elif self.eval_dataset is not None:
            self.eval_dataset = self._cache(self.eval_dataset)
        self._free_encoders()

    @cached_property
    def _encoder_fingerprints(self) -> dict[str, Any]:
        pipeline = self.family.pipeline
        tokenizers = [
            getattr(pipeline, name.replace("text_encoder", "tokenizer")) for name in self.family.text_encoder_names
        ]
        limits = (
            type(pipeline).__name__,
            getattr(self.family, "max_sequence_length", None),
            pipeline.config.get("force_zeros_for_empty_prompt"),  # what "" becomes in SDXL
        )
        legacy = fingerprint(*self.family.text_encoders, *tokenizers, *limits)
        return {
            "image_fingerprint": fingerprint(pipeline.vae),
            "prompt_fingerprint": fingerprint(legacy, *map(describe_tokenizer, tokenizers)),
            "legacy_prompt_fingerprint": legacy,
        }

    def _latent_bytes(self, size: tuple[int, int]) -> int:
        """Bytes of an image's latents in float32."""
        height, width = (side // self.family.vae_scale_factor for side in size)
        return 4 * self.family.latent_channels * height * width

    def cache_bytes(self) -> tuple[int, int]:
        """Bytes that the latents and the embeddings of the training data take in an empty cache, before it is made."""
        images = self.train_dataset
        latents = estimate_bytes(images, range(len(images)), self._latent_bytes(images.size))
        prompts = {*images.prompts(), ""}
        embeddings = sum(tensor.nbytes for tensor in self._encode_prompts([""]).values())
        return latents, len(prompts) * embeddings

    def _warn_of_unseen_pairs(self, count: int) -> None:
        args = self.args
        seen = args.max_steps * args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        if 0 < seen < count:
            warn_once_a_run(
                f"`max_steps={args.max_steps}` sees at most {seen:,} of the {count:,} pairs of the train dataset, and "
                f"the latents of all are cached. To cache fewer, give fewer: `dataset.select(range({seen}))`, or for "
                f"the recipes `--dataset_train_split 'train[:{seen}]'`."
            )

    def _cache(self, images: Any) -> CachedPairs:
        return cache_latents(
            images,
            self.args.cache_dir or os.path.join(self.args.output_dir, "_latent_cache"),
            encode_images=self.family.encode_images,
            encode_prompts=self._encode_prompts,
            latent_bytes=self._latent_bytes(images.size),
            progress=not self.args.disable_tqdm,
            **self._encoder_fingerprints,
        )

    def _free_encoders(self) -> None:
        """
        Frees the encoders, as only the cache is read from here on. The VAE stays if validation decodes with it. The
        encoders of a pipeline that the user passed are only moved to the CPU.
        """
        names = list(self.family.text_encoder_names)
        if self._validation is None:
            names.append("vae")
        if self._source is not None:
            self.family.free(names)
        else:
            for part in (getattr(self.family.pipeline, name) for name in names):
                if part is not None:
                    part.to("cpu")
        free_memory()

    def _set_signature_columns_if_needed(self):
        # Names that the collator reads; the wrapper's `forward` takes others.
        if self._signature_columns is None:
            columns = ["index", "prompt", "pixel_values", "latents", "conditioning", "counted"]
            self._signature_columns = [*columns, "original_size", "crop_top_left", "target_size"]

    # ---- The method ------------------------------------------------------------------------------------------------

    def pair_loss(self, pairs: DenoisedPairs) -> torch.Tensor:
        """
        Returns the method's loss of each pair, of shape `(B,)`. A method overrides this, and nothing else of the step.

        Args:
            pairs ([`DenoisedPairs`]):
                Predictions of both models, and their targets.
        """
        raise NotImplementedError(f"`{type(self).__name__}` must define `pair_loss(self, pairs)`.")

    # ---- The step --------------------------------------------------------------------------------------------------

    def _encode(self, inputs: dict) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Returns latents of shape `(2B, C, h, w)`, chosen first, and conditioning with B rows."""
        latents = inputs.get("latents")
        if latents is None:
            latents = self.family.encode_images(inputs["pixel_values"])
        conditioning = inputs.get("conditioning")
        if conditioning is None:
            conditioning = self._encode_prompts(inputs["prompt"])
        return latents, {**conditioning, **self.family.image_conditioning(inputs["size_conditioning"])}

    def _draw(self, index: torch.Tensor, shape: torch.Size) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Draws a noise and a timestep for each pair, `(B, C, h, w)` and `(B,)`, from the pair's number and the step:
        they are the same on every device, for every split of the batch and after a resume, and the global random state
        is not touched. Evaluations have draws of their own, the same for every checkpoint.
        """
        when = ("train", self.args.seed, self.state.global_step) if self.model.training else ("eval",)
        noise, timesteps = [], []
        for number in index.tolist():
            digest = hashlib.blake2b(repr((*when, number)).encode(), digest_size=8).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest) >> 1)
            timesteps.append(
                self.family.sample_timesteps(
                    1,
                    sampling=self._timestep_sampling,
                    logit_mean=self.args.logit_mean,
                    logit_std=self.args.logit_std,
                    generator=generator,
                )
            )
            noise.append(torch.randn(shape, generator=generator))
        return torch.stack(noise).to(index.device), torch.cat(timesteps).to(index.device)

    def _error_weight(self, timesteps: torch.Tensor) -> torch.Tensor | None:
        weight = None
        if self._error_space == "epsilon" and self.family.prediction_type != "epsilon":
            weight = self.family.epsilon_error_weight(timesteps)
        if self.args.snr_gamma is not None:
            # min(SNR, gamma) / SNR, in the form that is finite at an SNR of 0: the last time of a flow, or of a UNet
            # whose schedule was rescaled.
            clipped = (self.args.snr_gamma / self.family.snr(timesteps)).clamp(max=1.0)
            weight = clipped if weight is None else weight * clipped
        return weight

    def training_step(self, model, inputs, num_items_in_batch=None):
        if self._start_is_unchecked:
            self._start_is_unchecked = False
            if self.state.global_step == 0:
                self._check_start(self._prepare_inputs(inputs))
        return super().training_step(model, inputs, num_items_in_batch)

    def _check_start(self, inputs) -> None:
        """
        Checks on the first batch that the reference is what training starts from: both predictions of the first pair
        must be the same, as nothing has been learned.
        """
        policy, was_training = self.policy, self.model.training
        with torch.no_grad(), self.accelerator.autocast(), forked_random_state(self.accelerator.device):
            policy.eval()  # a LoRA's dropout is the policy's alone
            noisy, _, timesteps, conditioning = self._noisy_batch(inputs)
            pair = [0, len(timesteps) // 2]
            conditioning = {name: tensor[pair] for name, tensor in conditioning.items()}
            pred, ref_pred = (p.float() for p in policy(noisy[pair], timesteps[pair], conditioning))
            policy.train(was_training)
        self.check_start_difference(pred, ref_pred)

    def _noisy_batch(self, inputs) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
        """Noisy latents, targets, timesteps and conditioning of a batch, `2B` rows, chosen first."""
        latents, conditioning = self._encode(inputs)
        noise, timesteps = self._draw(inputs["index"], latents.shape[1:])
        # A pair's images share noise and timestep, so that their errors differ by the images alone.
        timesteps, noise = torch.cat([timesteps, timesteps]), torch.cat([noise, noise])
        noisy = self.family.add_noise(latents, noise, timesteps)
        target = self.family.target(latents, noise, timesteps)
        return noisy, target, timesteps, {name: torch.cat([c, c]) for name, c in conditioning.items()}

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        self._counted = None if self.model.training else inputs.get("counted")
        noisy, target, both, conditioning = self._noisy_batch(inputs)
        pred, ref_pred = model(noisy, both, conditioning)
        timesteps = both.chunk(2)[0]
        halves = [half for tensor in (pred, ref_pred, target) for half in tensor.chunk(2)]
        chosen, rejected, ref_chosen, ref_rejected, chosen_target, rejected_target = halves
        pairs = DenoisedPairs(
            chosen,
            rejected,
            ref_chosen,
            ref_rejected,
            chosen_target,
            rejected_target,
            timesteps,
            self._error_weight(timesteps),
        )
        losses = self.pair_loss(pairs)
        loss = self.mean_loss(losses)
        self._record_step(inputs, pairs, losses, loss)
        return (loss, {"losses": losses}) if return_outputs else loss

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            return self.compute_loss(model, inputs).detach(), None, None

    def _record_step(self, inputs, pairs: DenoisedPairs, losses: torch.Tensor, loss: torch.Tensor) -> None:
        """Stops on a loss that is not finite; otherwise keeps the step's metrics until the next log."""
        metrics = self.start_metrics(losses, loss)
        self._add_metrics(metrics, pairs)
        if self.model.training:
            self._prediction_check.add(pairs, self.family)
        elif self._counted is not None:
            # Transformers weighs the losses of all batches alike, however many pairs of each count.
            metrics.mean("loss", losses)
        if self.record(metrics) is None:
            bad = ~torch.isfinite(losses.detach())
            raise FloatingPointError(self._describe_nonfinite(self._mode, inputs, bad, pairs, losses))

    def _add_metrics(self, metrics: StepMetrics, pairs: DenoisedPairs) -> None:
        errors, beta = pairs.errors, self.args.beta
        u = errors.argument(beta)
        # As in diffusers' scripts: a tie, such as an untrained policy has everywhere, is half right.
        correct = (u > 0).float() + 0.5 * (u == 0).float()
        metrics.mean("rewards/chosen", -0.5 * beta * errors.chosen_gap)
        metrics.mean("rewards/rejected", -0.5 * beta * errors.rejected_gap)
        metrics.mean("rewards/accuracies", correct)
        metrics.mean("rewards/margins", u)
        metrics.mean("errors/chosen", errors.chosen)
        metrics.mean("errors/rejected", errors.rejected)
        metrics.mean("gaps/chosen", errors.chosen_gap)
        metrics.mean("gaps/rejected", errors.rejected_gap)
        if self.args.safeguard_mu is not None:
            residuals = (pairs.chosen_pred - pairs.chosen_target, pairs.rejected_pred - pairs.rejected_target)
            metrics.batch_value("safeguard/scale", safeguard_scale(*residuals, mu=self.args.safeguard_mu))
        # Errors depend mostly on the timestep, so a mean over all timesteps depends on which were drawn.
        count = self.args.num_timestep_buckets
        bucket = (pairs.timesteps.float() / self.family.num_train_timesteps * count).long().clamp(max=count - 1)
        for i in range(count):
            for name, values in (
                ("rewards/accuracies", correct),
                ("gaps/chosen", errors.chosen_gap),
                ("gaps/rejected", errors.rejected_gap),
            ):
                metrics.mean(self._name_of_bucket(name, i), values, where=bucket == i)

    def _name_of_bucket(self, name: str, bucket: int) -> str:
        width = self.family.num_train_timesteps / self.args.num_timestep_buckets
        return f"{name}/t{round(bucket * width)}-{round((bucket + 1) * width)}"

    def _describe_nonfinite(self, mode, inputs, bad, pairs: DenoisedPairs, losses) -> str:
        step = self.state.global_step + (mode == "train")
        rows = []
        for i in bad.nonzero().flatten().tolist():
            errors = ", ".join(f"{name} {value[i].item():g}" for name, value in pairs.errors._asdict().items())
            rows.append(
                f"pair {inputs['index'][i].item()} of the {mode} dataset, timestep {pairs.timesteps[i].item():g}, "
                f"prompt {inputs['prompt'][i]!r}: loss {losses[i].item():g}, errors: {errors}"
            )
        rows = rows or ["the offending pairs are on another process"]
        return "\n  ".join(
            [
                f"The loss is not finite at step {step} ({mode}). Nothing was saved over the last checkpoint.",
                *rows,
                "If the reference's errors are not finite, the pair's latents are not: an fp16 VAE overflows (SDXL's "
                "does), so keep it in float32. If only the policy's are, its weights have diverged: lower "
                "`learning_rate`, set `safeguard_mu`, train in bf16 rather than fp16.",
            ]
        )

    # ---- Logging and evaluation -------------------------------------------------------------------------------------

    def _pop_metrics(self, mode: str) -> dict[str, float]:
        metrics = super()._pop_metrics(mode)
        if mode == "train" and metrics:
            self._watch_chosen_gap(metrics["gaps/chosen"])
        return metrics

    def _window_of_0_1(self, window):
        # It kept the numerators and denominators of the buckets apart, under names of their own.
        means = {name: values for name, values in window.items() if not name.startswith("sum/")}
        counts = {name.rsplit("/", 1)[1]: values for name, values in window.items() if name.startswith("sum/count/")}
        sums = {}
        for name in window.keys() - means.keys():
            key, bucket = name.removeprefix("sum/").rsplit("/", 1)
            if key != "count":
                entry = [sum(window[name]), sum(counts[bucket]), len(counts[bucket])]
                sums[self._name_of_bucket(key, int(bucket))] = entry
        return {"sums": sums, "means": means}

    def _watch_chosen_gap(self, gap: float) -> None:
        self._positive_gaps = self._positive_gaps + 1 if gap > 0 else 0
        if self._positive_gaps == _GAP_PATIENCE:
            advice = "lower `learning_rate` or raise `beta`"
            if self.args.safeguard_mu is None:
                advice += ", or set `safeguard_mu`, which keeps a step from raising the chosen error"
            logger.warning(
                f"`gaps/chosen` has been positive for {_GAP_PATIENCE} logs (now {gap:.3g}, step "
                f"{self.state.global_step}): the policy has become worse than the reference at the preferred images, "
                f"although the margin may grow. Images degrade this way. To avoid it, {advice}."
            )

    def _prepare_given(self, dataset, name: str):
        if self.family.pipeline.vae is None or not self.family.text_encoders:
            raise ValueError(
                f"The {name} dataset was given after the encoders had been freed (`cache_latents=True`), so it cannot "
                "be encoded. Give it to the constructor as `eval_dataset`, or set `cache_latents=False`."
            )
        return self._open_images(dataset, name, self.args, self.image_size)

    # ---- Sharing ---------------------------------------------------------------------------------------------------

    def resolved_hyperparameters(self) -> dict:
        """
        Hyperparameters for the model card that are missing from `args` or were resolved later. `None` removes one from
        the card.
        """
        resolved = {
            "resolution": f"{self.image_size[1]} x {self.image_size[0]}",
            "prompt_dropout": self._prompt_dropout,
            "guidance_scale": self.family.guidance_scale if self.family.is_guidance_distilled else None,
            "timestep_sampling": self._timestep_sampling,
            "error_space": self._error_space,
        }
        if self._buckets is not None:
            sizes = ", ".join(f"{width} x {height}" for height, width in self._buckets)
            resolved["resolution"] = f"buckets of at most {resolved['resolution']}: {sizes}"
        if self._timestep_sampling != "logit_normal":
            resolved.update(logit_mean=None, logit_std=None)
        if not self.args.use_ema:
            resolved.update(ema_decay=None)
        return resolved
