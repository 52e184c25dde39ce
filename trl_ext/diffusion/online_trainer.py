"""The trainer that the methods share which learn from rewards of their own images: everything but the gradient."""

import contextlib
import dataclasses
import logging
import math
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from datasets import Dataset
from peft import LoraConfig
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from transformers import PreTrainedTokenizerBase, ProcessorMixin, TrainerCallback
from transformers.utils.quantization_config import QuantizationConfigMixin

from ..training.seeds import derive_seed
from ..training.sharding import whole_weights
from ..training.window_file import load_window, save_window
from .data import check_resolution, warn_once_a_run
from .image_trainer import ImageTrainer
from .online_config import OnlineDiffusionConfig
from .online_evaluation import RewardEvaluation
from .prompt_data import PromptDataset, WindowSampler, collate_prompts
from .prompts import warn_of_cut_prompts
from .rewards import ImageRewards
from .rollouts import Rollout, Sampler, StepLoss, sample_rollout


if TYPE_CHECKING:  # diffusers is optional
    from diffusers import DiffusionPipeline

logger = logging.getLogger(__name__)

# Noise of a step with which an image is next to independent of its first noise, by what the denoiser predicts.
FULL_NOISE = {"epsilon": 1.0, "v_prediction": 1.0, "flow": 0.7}


class OnlineDiffusionTrainer(RewardEvaluation, ImageTrainer):
    """
    Base of the trainers that learn from rewards of their own images: everything but the advantages and the loss.

    A step samples a window of images with the stochastic sampler, `num_generations` of each prompt, without gradient;
    rewards them; and trains on the sampler's noisy steps one after the other, so that the memory is that of one step.
    Images are drawn from the seed, the window, and the numbers of prompt and image, so they do not depend on the split
    into micro-batches and processes, and a resumed run repeats them.

    A method is a subclass with a configuration, [`~OnlineDiffusionTrainer.window_advantages`] and
    [`~OnlineDiffusionTrainer.step_loss`].

    Args:
        model (`str` or `diffusers.DiffusionPipeline`):
            Pipeline to train: its id on the Hub, its folder, a single-file checkpoint (`.safetensors`), or itself. If
            it comes with a LoRA and no `peft_config` is given, that LoRA is trained on, and its frozen copy is the
            reference.
        reward_funcs (`Callable` or `list[Callable]`):
            Reward functions `f(prompts, images, **columns)`, called by keyword: see
            [`~trl_ext.diffusion.rewards.ImageRewards`]. They return one number for each image, or `None` for no
            opinion.
        args ([`OnlineDiffusionConfig`], *optional*):
            Configuration.
        train_dataset, eval_dataset ([`~datasets.Dataset`]):
            Prompts, in the column `prompt`; other columns are for the reward functions. `eval_dataset` may be a `dict`
            of several.
        processing_class (*optional*):
            Refused: tokenizers and image processing are the pipeline's.
        callbacks (`list[TrainerCallback]`, *optional*):
            Callbacks.
        optimizers (`tuple`, *optional*):
            Optimizer and scheduler.
        quantization_config (`BitsAndBytesConfig`, *optional*):
            Load the denoiser in 4 bit (QLoRA). Needs `peft_config` and a `model` that is a string.
        peft_config (`peft.LoraConfig`, *optional*):
            LoRA to train, without dropout. Its `target_modules` default to the attention's projections.
        ref_model (`torch.nn.Module` or `diffusers.DiffusionPipeline`, *optional*):
            Reference. Defaults to what training starts from: with a LoRA the same model with the LoRA switched off,
            which takes no memory; under full fine-tuning a second denoiser.

    Raises:
        `TypeError`, `ValueError`: For arguments that cannot be honored; each message names the argument and the
        remedy. In training, for rewards that cannot be used. `FloatingPointError`: For images or losses that are not
        finite.
    """

    config_class: ClassVar[type[OnlineDiffusionConfig]] = OnlineDiffusionConfig
    needed_data = "a dataset of prompts, in the column `prompt`"
    card_task = "rewards of its own images"
    data_unit = "prompts"

    _name = "Rewards of sampled images"

    args: OnlineDiffusionConfig

    def __init__(
        self,
        model: "str | DiffusionPipeline",
        reward_funcs: Callable | list[Callable] | None = None,
        args: OnlineDiffusionConfig | None = None,
        train_dataset: Dataset | None = None,
        eval_dataset: Dataset | dict[str, Dataset] | None = None,
        processing_class: PreTrainedTokenizerBase | ProcessorMixin | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Optimizer | None, LRScheduler | None] = (None, None),
        quantization_config: QuantizationConfigMixin | None = None,
        peft_config: LoraConfig | None = None,
        *,
        ref_model: "torch.nn.Module | DiffusionPipeline | None" = None,
    ):
        if reward_funcs is None:
            raise ValueError(
                "`reward_funcs` is required: a function `(prompts, images, **columns)` that returns one number for "
                "each image, or several."
            )
        dropout: Any = getattr(peft_config, "lora_dropout", None)
        if dropout:
            raise ValueError(
                f"`lora_dropout={dropout}` of the `LoraConfig`: the policy that is trained would not "
                "be the one that sampled. Set `lora_dropout=0.0`."
            )
        self._reward_funcs = reward_funcs
        self._rollouts: list[dict[str, Any]] | None = None  # the window's micro-batches
        self._step_results: list[tuple[int, StepLoss]] = []  # of the sampler's steps of a micro-batch
        super().__init__(
            model=model,
            ref_model=ref_model,
            args=args,
            data_collator=None,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            callbacks=callbacks,
            optimizers=optimizers,
            quantization_config=quantization_config,
            peft_config=peft_config,
        )

    # ---- The method ------------------------------------------------------------------------------------------------

    def prepare_window(self) -> None:
        """
        Called in every process before a window is sampled. A method overrides it to measure what it needs of the
        reference once; such numbers go to `self._progress.estimates`, which checkpoints keep.
        """

    def window_advantages(
        self, rewards: torch.Tensor, step_kls: torch.Tensor, rows: Sequence[int], rollouts: Sequence[Rollout]
    ) -> torch.Tensor:
        """
        Returns the factor of each step's score in the gradient, of shape `(N, K - 1)`. A method overrides this.

        Args:
            rewards (`torch.Tensor` of shape `(N,)`):
                Rewards of the window's images over all processes, whole groups one after the other. NaN stands for no
                opinion.
            step_kls (`torch.Tensor` of shape `(N, K - 1)`):
                KL of each noisy step in nats.
            rows (`Sequence[int]`):
                Row of the dataset of each group.
            rollouts (`Sequence[Rollout]`):
                This process's micro-batches of images.
        """
        raise NotImplementedError(f"`{type(self).__name__}` must define `window_advantages`.")

    def step_loss(
        self,
        model: torch.nn.Module,
        rollout: Rollout,
        step: int,
        advantages: torch.Tensor,
        *,
        is_first_iteration: bool,
    ) -> StepLoss:
        """
        Returns the loss of one noisy step of each image. A method overrides this.

        Args:
            model (`torch.nn.Module`):
                Policy and reference, or a wrapper of it for several processes, which must be called.
            rollout ([`~trl_ext.diffusion.rollouts.Rollout`]):
                The micro-batch of images.
            step (`int`):
                Number of the step.
            advantages (`torch.Tensor` of shape `(B,)`):
                Advantage of each image at this step.
            is_first_iteration (`bool`):
                Whether the policy is still the one that sampled.
        """
        raise NotImplementedError(f"`{type(self).__name__}` must define `step_loss`.")

    # ---- Options and data ------------------------------------------------------------------------------------------

    def _check_options(self, args) -> None:
        family = self.family
        if not family.text_encoders:
            raise ValueError(
                "The pipeline has no text encoder, and prompts are encoded as they are sampled. Load the pipeline "
                "with its text encoders."
            )
        self.image_size = check_resolution(args.resolution or family.default_resolution, family.resolution_multiple)
        guidance = args.guidance_scale
        if family.is_guidance_distilled:
            if guidance is not None:
                family.guidance_scale = guidance
            guidance = None
        full = FULL_NOISE[family.prediction_type]
        noise_level = full if args.noise_level is None else args.noise_level
        if family.prediction_type != "flow" and noise_level > 1:
            raise ValueError(
                f"`noise_level={noise_level!r}` must be at most 1 for a `{type(family.denoiser).__name__}`: more noise "
                "than DDPM's leaves no room for the image."
            )
        self.sampler = Sampler.of(
            family, args.num_inference_steps, self.image_size, noise_level, 1.0 if guidance is None else guidance
        )
        if noise_level < full:
            warn_once_a_run(
                f"`noise_level={noise_level:g}` is below {full:g}: an image then depends on its first noise, which "
                "training cannot change, and the optimum is biased toward the reference. In the limit of 0 nothing "
                f"can be learned at the price `beta`. Leave `noise_level` out for {full:g}."
            )
        is_fast = not family.uses_empty_prompt and not family.is_guidance_distilled
        if is_fast or "turbo" in str(family.pipeline.config.get("_name_or_path", "")).lower():
            warn_once_a_run(
                "This pipeline is distilled into a few steps, and is sampled here with "
                f"`num_inference_steps={args.num_inference_steps}` noisy ones: look at its images first. The model "
                "that it was distilled from is the safer choice."
            )

    def _prepare_data(self, args, train_dataset, eval_dataset):
        prompts = PromptDataset(train_dataset, args.num_generations, "train")
        self.rewards = ImageRewards(self._reward_funcs, args.reward_weights, prompts.columns)
        needed = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
        if needed > len(prompts):
            raise ValueError(
                f"The train dataset has {prompts.num_rows} prompts, and a step samples for "
                f"{needed // args.num_generations} (`per_device_train_batch_size={args.per_device_train_batch_size}` "
                f"times `gradient_accumulation_steps={args.gradient_accumulation_steps}` times {args.world_size} "
                f"processes, divided by `num_generations={args.num_generations}`). Give more prompts, or lower one of "
                "these."
            )
        warn_of_cut_prompts(self.family, prompts)
        if isinstance(eval_dataset, dict):
            return prompts, {n: self._eval_prompts(d, n, args) for n, d in eval_dataset.items()}, collate_prompts
        evaluated = None if eval_dataset is None else self._eval_prompts(eval_dataset, "eval", args)
        return prompts, evaluated, collate_prompts

    def _eval_prompts(self, dataset, name: str, args) -> PromptDataset:
        prompts = PromptDataset(dataset, args.num_generations_eval, name)
        ImageRewards(self._reward_funcs, args.reward_weights, prompts.columns)  # raises if a column is missing
        return prompts

    def _prepare_given(self, dataset, name):
        return self._eval_prompts(dataset, name, self.args)

    def _check_distributed(self) -> None:
        super()._check_distributed()
        if self.is_deepspeed_enabled:
            raise ValueError(
                f"DeepSpeed is not supported by `{type(self).__name__}`: a micro-batch has a backward for each step of the "
                "sampler, and DeepSpeed counts them as micro-batches. Use DDP (`accelerate launch --multi_gpu`) or FSDP2 "
                "(`fsdp_version: 2`)."
            )

    def _set_signature_columns_if_needed(self):
        if self._signature_columns is None:
            self._signature_columns = ["row", "generation", "prompt", "columns"]

    def _get_train_sampler(self, train_dataset=None):
        args = self.args
        seed = args.seed if args.data_seed is None else args.data_seed
        return WindowSampler(
            self.train_dataset.num_rows,
            args.num_generations,
            batch_size=args.per_device_train_batch_size,
            accumulation_steps=args.gradient_accumulation_steps,
            num_processes=self.accelerator.num_processes,
            num_iterations=args.num_iterations,
            seed=seed if args.train_sampling_strategy == "random" else None,
            # Transformers tells a resumed run's sampler nothing; the steps so far say which epoch begins.
            epoch=lambda: self.state.global_step // max(1, self._steps_per_epoch),
        )

    @property
    def _steps_per_epoch(self) -> int:
        args = self.args
        images = args.per_device_train_batch_size * args.gradient_accumulation_steps * self.accelerator.num_processes
        return len(self.train_dataset) // images * args.num_iterations

    # ---- The window ------------------------------------------------------------------------------------------------

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """Like the parent's: an optimizer step's micro-batches, which here are images that were sampled for them."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        if not batches:
            return batches, None
        if self._progress.to_restore:  # before the window's metrics are added to what a checkpoint had
            self._restore_progress()
        iteration = self.state.global_step % self.args.num_iterations
        if iteration == 0:
            self._rollouts = None  # frees the memory of the last ones
            with whole_weights(self.policy, self.policy.reference):
                self.prepare_window()
                self._rollouts = self.sample_window(batches)
        assert self._rollouts is not None
        return [{**part, "iteration": iteration} for part in self._rollouts], None

    def sample_window(self, batches: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """
        Samples and rewards the images of an optimizer step.

        Args:
            batches (`list[dict]`):
                This process's micro-batches of [`~trl_ext.diffusion.prompt_data.collate_prompts`].

        Returns:
            `list[dict]`: For each micro-batch its `rollout`, and its `advantages` of shape `(B, K - 1)`.
        """
        number = self.state.global_step // self.args.num_iterations
        started = time.perf_counter()
        rollouts = [
            self.sample_chains(self.policy, batch["prompt"], [("train", self.args.seed, number, *key) for key in keys])
            for batch in batches
            for keys in [list(zip(batch["row"].tolist(), batch["generation"].tolist(), strict=True))]
        ]
        step_kls = self.gather(torch.cat([rollout.kls for rollout in rollouts]))
        if self.state.global_step == 0 and self._start_is_unchecked:
            self._check_start(rollouts[0])
        sampled = time.perf_counter()
        prompts = [prompt for batch in batches for prompt in batch["prompt"]]
        columns = {name: [v for batch in batches for v in batch["columns"][name]] for name in batches[0]["columns"]}
        pixels = torch.cat([self.decode(rollout.images) for rollout in rollouts])
        self._check_finite(pixels, step_kls, prompts)
        local_sums, local_rewards = self.rewards(prompts, pixels, **columns)
        del pixels
        rewarded = time.perf_counter()
        sums, rewards = self.gather(local_sums), self.gather(local_rewards)
        rows = self.gather(torch.cat([batch["row"] for batch in batches]))[:: self.args.num_generations].tolist()
        if sums.isnan().all():
            raise ValueError(
                f"The reward functions {', '.join(self.rewards.names)} returned None for every image of step "
                f"{self.state.global_step + 1}, so that nothing can be learned from it. Return numbers for more of "
                "them."
            )
        advantages = self.window_advantages(sums, step_kls, rows, rollouts)
        self._record_window(sums, rewards, step_kls, sampled - started, rewarded - sampled)
        first = self.accelerator.process_index * len(prompts)
        parts = advantages[first : first + len(prompts)].split([len(batch["prompt"]) for batch in batches])
        return [
            {"rollout": rollout, "advantages": part.float()} for rollout, part in zip(rollouts, parts, strict=True)
        ]

    def sample_chains(self, model, prompts: Sequence[str], keys: Sequence[tuple]) -> Rollout:
        """
        One chain of the training sampler for each prompt and key, in the precision of training.

        Args:
            model ([`~trl_ext.diffusion.paired_denoiser.PairedDenoiser`]):
                Policy, which samples, and reference.
            prompts (`Sequence[str]`):
                Prompts.
            keys (`Sequence[tuple]`):
                What each chain is drawn from.
        """
        factor = self.family.vae_scale_factor
        shape = (self.family.latent_channels, self.image_size[0] // factor, self.image_size[1] // factor)
        empty = self.conditioning([""] * len(prompts)) if self.sampler.guidance_scale != 1.0 else None
        with self.accelerator.autocast():
            return sample_rollout(model, self.sampler, keys, shape, self.conditioning(prompts), empty)

    def conditioning(self, prompts: Sequence[str]) -> dict[str, torch.Tensor]:
        """Conditioning of the prompts, one row for each."""
        different = list(dict.fromkeys(prompts))
        encoded = self._encode_prompts(different)
        where = [different.index(prompt) for prompt in prompts]
        size = torch.tensor([[*self.image_size, 0, 0, *self.image_size]] * len(prompts))
        rows = {**{name: tensor[where] for name, tensor in encoded.items()}, **self.family.image_conditioning(size)}
        return {name: tensor.to(self.policy.device) for name, tensor in rows.items()}

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Pixels of shape `(B, 3, H, W)`, approximately in [-1, 1], as many at once as in training."""
        size = self.args.per_device_train_batch_size
        return torch.cat([self.family.decode_latents(part) for part in latents.split(size)])

    def gather(self, values: torch.Tensor) -> torch.Tensor:
        """Rows of all processes, in their order: a window's groups, one after the other."""
        if self.accelerator.device.type == "mps" and values.dtype == torch.float64:
            values = values.float()
        return self.accelerator.gather(values.to(self.accelerator.device).contiguous())

    def _check_start(self, rollout: Rollout) -> None:
        self._start_is_unchecked = False
        with torch.no_grad(), self.accelerator.autocast():
            pair = self.sampler.predict(self.policy, rollout.latents[:, 0], 0, rollout.conditioning, rollout.empty)
        self.check_start_difference(*pair)

    def _check_finite(self, pixels: torch.Tensor, step_kls: torch.Tensor, prompts: list[str]) -> None:
        bad = ~pixels.flatten(1).isfinite().all(1)
        found = self.gather(bad.float()).sum() + (~step_kls.isfinite()).sum()
        if found > 0:
            which = [prompts[i] for i in bad.nonzero().flatten().tolist()]
            raise FloatingPointError(
                f"The images of step {self.state.global_step + 1} are not finite"
                f"{f', of the prompts {which[:3]!r}' if which else ''}. Nothing was saved over the last checkpoint. "
                "Either the weights have diverged: lower `learning_rate` or raise `beta`; or half precision "
                "overflows: train in bf16 rather than fp16, and keep the VAE in float32."
            )

    # ---- The step --------------------------------------------------------------------------------------------------

    def chosen_steps(self) -> list[int]:
        """The sampler's steps that this optimizer step trains on: evenly spread, from a random start."""
        total = self.sampler.num_noisy_steps
        count = max(1, round(self.args.timestep_fraction * total))
        generator = torch.Generator().manual_seed(derive_seed("steps", self.args.seed, self.state.global_step))
        start = torch.rand((), generator=generator).item()
        return [min(int((start + i) * total / count), total - 1) for i in range(count)]

    def training_step(self, model, inputs, num_items_in_batch=None):
        # A backward for each of the sampler's steps, so that the activations of one are held at a time.
        steps, self._step_results = self.chosen_steps(), []
        weight = self.sampler.num_noisy_steps / len(steps)
        loss = torch.zeros((), device=self.accelerator.device)
        for step in steps:
            is_last = step == steps[-1]
            with contextlib.nullcontext() if is_last else self.accelerator.no_sync(model):
                part = {**inputs, "step": step, "weight": weight}
                loss = loss + super().training_step(model, part, num_items_in_batch)
        self._record_step(self._step_results, weight, loss)
        return loss

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        step = inputs["step"]
        result = self.step_loss(
            model,
            inputs["rollout"],
            step,
            inputs["advantages"][:, step],
            is_first_iteration=inputs["iteration"] == 0,
        )
        self._step_results.append((step, dataclasses.replace(result, loss=result.loss.detach())))
        loss = result.loss.mean() * inputs["weight"]
        return (loss, {"losses": result.loss}) if return_outputs else loss

    # ---- Logs ------------------------------------------------------------------------------------------------------

    def _record_window(self, sums, rewards, step_kls, sampling_seconds: float, reward_seconds: float) -> None:
        window, size = self._window["train"], self.args.num_generations

        def add(name: str, values: torch.Tensor) -> None:
            known = values[~values.isnan()]
            window.add(name, known.sum().item(), len(known))

        add("reward", sums)
        groups = sums.view(-1, size)
        known = ~groups.isnan()
        counts = known.sum(1)
        means = groups.nan_to_num().sum(1) / counts.clamp(min=1)
        deviations = (groups - means[:, None]).masked_fill(~known, 0.0)
        variances = deviations.square().sum(1) / (counts - 1).clamp(min=1)
        add("reward_std", _deviation(sums).reshape(1))
        add("reward_std/group", variances.sqrt()[counts > 1])
        add("groups/without_spread", (variances == 0).float())
        add("rewards/no_opinion", sums.isnan().float())
        for i, name in enumerate(self.rewards.names):
            add(f"rewards/{name}/mean", rewards[:, i])
        add("kl", step_kls.sum(1))
        factor = self.family.vae_scale_factor
        dimensions = self.family.latent_channels * math.prod(side // factor for side in self.image_size)
        add("kl/per_dimension", step_kls.sum(1) / dimensions)
        for i, part in enumerate(step_kls.tensor_split(4, 1)):
            if part.shape[1]:
                add(f"kl/quarter{i + 1}", part.sum(1))
        add("sampling_runtime", torch.tensor([sampling_seconds]))
        add("reward_runtime", torch.tensor([reward_seconds]))

    def _record_step(self, results: list[tuple[int, StepLoss]], weight: float, loss: torch.Tensor) -> None:
        """Stops on a loss that is not finite; otherwise keeps the step's metrics until the next log."""
        losses = torch.stack([result.loss.detach() for _, result in results]).sum(0) * weight
        metrics = self.start_metrics(losses, loss)
        ratios = torch.cat([result.log_ratio for _, result in results])
        metrics.mean("policy_kl", torch.stack([result.kl for _, result in results]).sum(0) * weight)
        metrics.batch_value("log_ratio/max", ratios.max())
        metrics.batch_value("log_ratio/min", ratios.min())
        clipped = torch.stack([result.is_clipped for _, result in results]).float().mean(0)
        metrics.mean("clip_ratio", clipped)
        if self.record(metrics) is None:
            bad = [step for step, result in results if not torch.isfinite(result.loss).all()]
            where = f"in the sampler's steps {bad}" if bad else "on another process"
            raise FloatingPointError(
                f"The loss is not finite at step {self.state.global_step + 1}, {where}. Nothing was saved over the "
                "last checkpoint. The weights have diverged: lower `learning_rate`, raise `beta`, or train in bf16 "
                "rather than fp16."
            )

    # ---- Checkpoints -----------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """
        What the method itself carries through checkpoints, of this process: tensors, numbers, strings, and lists and
        dictionaries of them. A method that has a state overrides it.
        """
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores the result of [`~OnlineDiffusionTrainer.state_dict`]."""

    @property
    def _window_settings(self) -> dict[str, int]:
        """Options that give a window its meaning."""
        names = ("per_device_train_batch_size", "gradient_accumulation_steps", "num_iterations", "num_generations")
        return {name: getattr(self.args, name) for name in names}

    def _save_rng_state(self, output_dir):
        inside = self.state.global_step % self.args.num_iterations != 0
        window = None
        if inside and self._rollouts is not None:
            window = [{**part, "rollout": vars(part["rollout"])} for part in self._rollouts]
        state = {"settings": self._window_settings, "window": window, "method": self.state_dict()}
        save_window(output_dir, self.accelerator.process_index, self.accelerator.num_processes, state)
        super()._save_rng_state(output_dir)

    def _load_optimizer_and_scheduler(self, checkpoint):
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None:
            return
        accelerator = self.accelerator
        rank, ranks = accelerator.process_index, accelerator.num_processes
        state = load_window(checkpoint, rank, ranks, accelerator.device, self._window_settings)
        self._rollouts = None
        if state["window"] is not None:
            self._rollouts = [{**part, "rollout": Rollout(**part["rollout"])} for part in state["window"]]
        self.load_state_dict(state["method"])

    # ---- Sharing ---------------------------------------------------------------------------------------------------

    @property
    def num_training_rows(self) -> int:
        return self.train_dataset.num_rows

    def resolved_hyperparameters(self) -> dict:
        """
        Hyperparameters for the model card that are missing from `args` or were resolved later. `None` removes one from
        the card.
        """
        distilled = self.family.guidance_scale if self.family.is_guidance_distilled else None
        return {
            "reward functions": ", ".join(self.rewards.names),
            "resolution": f"{self.image_size[1]} x {self.image_size[0]}",
            "noise_level": self.sampler.noise_level,
            "guidance_scale": distilled or self.sampler.guidance_scale,
            "ema_decay": self.args.ema_decay if self.args.use_ema else None,
        }


def _deviation(values: torch.Tensor) -> torch.Tensor:
    known = values[~values.isnan()]
    return known.std() if len(known) > 1 else known.new_zeros(())
