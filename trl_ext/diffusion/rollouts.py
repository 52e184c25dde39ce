r"""
Rollouts of diffusion models: images sampled with noise in every step, and the policy gradient of their rewards.

An image is the end of a chain of K steps from noise, `x_K -> ... -> x_0`. All but the last are Gaussian and have a
density: see [`trl_ext.losses.score_as_action`]. The last step takes the mean, and enters neither loss nor KL. Policy
and reference predict at the same latents, so the KL of a step is exact, and 0 where the two are equal.

A chain is drawn from a key for each image: it does not depend on the batch, the process, or the global random state.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..losses import step_kl, transition
from ..losses.score_as_action import Transition, predicted_clean, share_of_signal
from ..training.seeds import derive_seed
from .paired_denoiser import PairedDenoiser


class ReferenceSampler:
    """The reference in a policy's place, for [`sample_rollout`]: both predictions are the reference's."""

    def __init__(self, model: PairedDenoiser):
        self.model = model
        self.device = model.device

    @property
    def training(self) -> bool:
        return self.model.training

    def train(self, mode: bool = True) -> None:
        self.model.train(mode)

    def eval(self) -> None:
        self.model.eval()

    def __call__(self, noisy, timesteps, conditioning) -> tuple[torch.Tensor, torch.Tensor]:
        prediction = self.model.reference_prediction(noisy, timesteps, conditioning)
        return prediction, prediction


@dataclass(frozen=True)
class Sampler:
    """
    The stochastic sampler of a pipeline.

    Args:
        timesteps (`torch.Tensor` of shape `(K,)`):
            Timesteps of the nodes, the noisiest first.
        levels (`torch.Tensor` of shape `(K + 1,)`):
            Levels of the nodes and of the image, as [`~trl_ext.losses.transition`] takes them.
        prediction_type (`str`):
            What the denoiser predicts.
        noise_level (`float`):
            Noise of a step: 1 is DDPM's for a UNet; 0.7 is usual for flows.
        guidance_scale (`float`, *optional*, defaults to `1.0`):
            Classifier-free guidance of policy and reference alike; 1 predicts without the empty prompt.
    """

    timesteps: torch.Tensor
    levels: torch.Tensor
    prediction_type: str
    noise_level: float
    guidance_scale: float = 1.0

    @classmethod
    def of(cls, family, num_steps: int, size: tuple[int, int], noise_level: float, guidance_scale: float = 1.0):
        """
        The sampler of a pipeline's family.

        Raises:
            `ValueError`: If there is no step with a density, or the pipeline's schedule has not so many steps.
        """
        if num_steps < 2:
            raise ValueError(
                f"`num_inference_steps={num_steps}`: the last step takes the mean, so that at least 2 are needed."
            )
        if noise_level <= 0:
            raise ValueError(
                f"`noise_level={noise_level!r}` must be above 0: a deterministic step has no density to take the "
                "gradient of."
            )
        if guidance_scale != 1.0 and not family.uses_empty_prompt:
            raise ValueError(
                f"`guidance_scale={guidance_scale!r}`: this pipeline is not sampled with the empty prompt. Leave it at "
                "1."
            )
        try:
            timesteps, levels = family.sampling_schedule(num_steps, size)
        except NotImplementedError:
            raise ValueError(
                f"The `{type(family.pipeline).__name__}` has no stochastic sampler here: its `{type(family).__name__}` "
                "does not define `sampling_schedule`."
            ) from None
        return cls(timesteps, levels, family.prediction_type, noise_level, guidance_scale)

    @property
    def num_noisy_steps(self) -> int:
        """Steps that have a density: all but the last."""
        return len(self.timesteps) - 1

    def predict(
        self,
        model: PairedDenoiser | ReferenceSampler | torch.nn.Module,
        latents: torch.Tensor,
        step: int,
        conditioning: dict[str, torch.Tensor],
        empty: dict[str, torch.Tensor] | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Predictions of the policy, with gradient, and of the reference, in float32, of the latents' shape.

        Args:
            model ([`PairedDenoiser`]):
                Policy and reference, or a wrapper of it for several processes.
            latents (`torch.Tensor` of shape `(B, C, h, w)`):
                Latents at the node.
            step (`int`):
                Number of the node.
            conditioning (`dict[str, torch.Tensor]`):
                Conditioning of the prompts, B rows.
            empty (`dict[str, torch.Tensor]`, *optional*):
                That of the empty prompt, B rows. Needed where `guidance_scale` is not 1.
        """
        is_guided = self.guidance_scale != 1.0
        if is_guided:
            if empty is None:
                raise ValueError(f"`guidance_scale={self.guidance_scale!r}` needs the empty prompt's conditioning.")
            conditioning = {name: torch.cat([empty[name], tensor]) for name, tensor in conditioning.items()}
        rows = torch.cat([latents, latents]) if is_guided else latents
        timesteps = self.timesteps[step].to(rows.device).expand(len(rows))
        predictions = (prediction.float() for prediction in model(rows, timesteps, conditioning))
        if not is_guided:
            policy, reference = predictions
            return policy, reference
        (low, high), (ref_low, ref_high) = (prediction.chunk(2) for prediction in predictions)
        scale = self.guidance_scale
        return low + scale * (high - low), ref_low + scale * (ref_high - ref_low)

    def _settings(self, step: int) -> dict[str, Any]:
        return dict(
            level=self.levels[step].item(),
            next_level=self.levels[step + 1].item(),
            noise_level=self.noise_level if step < self.num_noisy_steps else 0.0,
            prediction_type=self.prediction_type,
        )

    def transition(self, latents: torch.Tensor, prediction: torch.Tensor, step: int) -> Transition:
        """The step from node `step` by a prediction there; the last one has no noise."""
        return transition(latents.float(), prediction, **self._settings(step))

    def kl(self, prediction: torch.Tensor, ref_prediction: torch.Tensor, step: int) -> torch.Tensor:
        """KL of a step in nats, of shape `(B,)`, with gradient to `prediction`."""
        return step_kl(prediction, ref_prediction, **self._settings(step))

    def predicted_clean(self, latents: torch.Tensor, mean: torch.Tensor, step: int) -> torch.Tensor:
        """
        The clean latents that the prediction at node `step` implied, `(B, C, h, w)` in float32, from the latents there
        and the mean that the step had.
        """
        # The mean is linear in the prediction: what it would be without one, and what a prediction of 1 adds.
        origin = self.transition(latents, torch.zeros_like(latents), step).mean
        one = torch.ones_like(latents[:1])
        factor = self.transition(torch.zeros_like(one), one, step).mean.flatten()[0]
        prediction = (mean - origin) / factor
        level = self.levels[step].item()
        return predicted_clean(latents.float(), prediction, level, prediction_type=self.prediction_type)

    def share_of_signal(self, step: int) -> float:
        """Share of the variance at node `step` that is the image's; 1 at the image."""
        return share_of_signal(self.levels[step].item(), prediction_type=self.prediction_type)


@dataclass(frozen=True)
class Rollout:
    """
    A batch of chains. Tensors are in float32 and have no gradient.

    Args:
        latents (`torch.Tensor` of shape `(B, K + 1, C, h, w)`):
            The chains, from noise to image.
        means (`torch.Tensor` of shape `(B, K - 1, C, h, w)`):
            Means that the noisy steps were drawn around.
        kls (`torch.Tensor` of shape `(B, K - 1)`):
            KL of each noisy step to the reference's, in nats.
        conditioning (`dict[str, torch.Tensor]`):
            Conditioning of the prompts, B rows.
        empty (`dict[str, torch.Tensor]`, *optional*):
            That of the empty prompt, where the sampler is guided.
    """

    latents: torch.Tensor
    means: torch.Tensor
    kls: torch.Tensor
    conditioning: dict[str, torch.Tensor]
    empty: dict[str, torch.Tensor] | None = None

    @property
    def images(self) -> torch.Tensor:
        """Latents of the images, `(B, C, h, w)`."""
        return self.latents[:, -1]

    def rows(self, where) -> "Rollout":
        """Some of the chains, by anything that indexes a tensor's rows."""
        part = {field.name: _rows(getattr(self, field.name), where) for field in dataclasses.fields(self)}
        return Rollout(**part)


def _rows(value, where):
    if isinstance(value, dict):
        return {name: tensor[where] for name, tensor in value.items()}
    return None if value is None else value[where]


def sample_rollout(
    model: PairedDenoiser | ReferenceSampler,
    sampler: Sampler,
    keys: Sequence[tuple],
    shape: tuple[int, int, int],
    conditioning: dict[str, torch.Tensor],
    empty: dict[str, torch.Tensor] | None = None,
) -> Rollout:
    """
    Samples one chain for each key, without gradient and in evaluation mode.

    Args:
        model ([`PairedDenoiser`] or [`ReferenceSampler`]):
            Policy, which samples, and reference.
        sampler ([`Sampler`]):
            The sampler.
        keys (`Sequence[tuple]`):
            What each chain is drawn from, such as (seed, step, prompt number, image number).
        shape (`tuple[int, int, int]`):
            Channels, height and width of the latents.
        conditioning, empty (`dict[str, torch.Tensor]`):
            As in [`Sampler.predict`], with one row for each key.

    Returns:
        [`Rollout`]
    """
    device = model.device
    generators = [torch.Generator().manual_seed(derive_seed(*key)) for key in keys]

    def noise() -> torch.Tensor:
        return torch.stack([torch.randn(shape, generator=generator) for generator in generators]).to(device)

    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            latents, means, kls = [noise()], [], []
            for step in range(len(sampler.timesteps)):
                predictions = sampler.predict(model, latents[-1], step, conditioning, empty)
                mean, std = sampler.transition(latents[-1], predictions[0], step)
                if step < sampler.num_noisy_steps:
                    means.append(mean)
                    kls.append(sampler.kl(*predictions, step))
                    mean = mean + std.view(-1, 1, 1, 1) * noise()
                latents.append(mean)
    finally:
        model.train(was_training)
    return Rollout(torch.stack(latents, 1), torch.stack(means, 1), torch.stack(kls, 1), conditioning, empty)


@dataclass(frozen=True)
class StepLoss:
    """
    Loss of one step of a rollout, each of shape `(B,)`.

    Args:
        loss (`torch.Tensor`):
            To be summed over the steps, with gradient to the policy.
        kl (`torch.Tensor`):
            KL of the step under the current policy, in nats.
        log_ratio (`torch.Tensor`):
            Log-ratio of the step's density to the one it was sampled from, in nats for each dimension.
        is_clipped (`torch.Tensor`):
            Where the ratio is beyond the clip, so that only the KL has a gradient.
    """

    loss: torch.Tensor
    kl: torch.Tensor
    log_ratio: torch.Tensor
    is_clipped: torch.Tensor


def rollout_step_loss(
    model: PairedDenoiser | torch.nn.Module,
    sampler: Sampler,
    rollout: Rollout,
    step: int,
    advantages: torch.Tensor,
    *,
    beta: float,
    epsilon: float | None = None,
) -> StepLoss:
    r"""
    Loss of one noisy step, whose gradient is that of `-(advantage log p(step)) + beta KL(step)`.

    The advantages are those of [`~trl_ext.losses.reward_advantages`]: they hold the KL of the later steps. The KL of
    this step is differentiated here, directly.

    Args:
        model ([`PairedDenoiser`]):
            Policy and reference, or a wrapper of it for several processes.
        sampler ([`Sampler`]), rollout ([`Rollout`]):
            What was sampled, and how.
        step (`int`):
            Number of the step, below `sampler.num_noisy_steps`.
        advantages (`torch.Tensor` of shape `(B,)`):
            Advantage of each image at this step.
        beta (`float`):
            Price of a nat.
        epsilon (`float`, *optional*):
            Clip of the ratio for each dimension, the `D`-th root of the densities' ratio, as in DDPO and Flow-GRPO:
            1e-4 at 16,384 dimensions is 1.6 nats. Without it the policy must be the one that sampled: the ratio is 1
            by construction, and its gradient that of the log-density.

    Raises:
        `ValueError`: If the step has no density.
    """
    if not 0 <= step < sampler.num_noisy_steps:
        raise ValueError(
            f"`step` must be from 0 to {sampler.num_noisy_steps - 1}, got {step}: the last has no density."
        )
    latents, next_latents = rollout.latents[:, step], rollout.latents[:, step + 1]
    policy, reference = sampler.predict(model, latents, step, rollout.conditioning, rollout.empty)
    move = sampler.transition(latents, policy, step)
    kl = sampler.kl(policy, reference, step)
    log_ratio = move.log_ratio(next_latents, move.mean if epsilon is None else rollout.means[:, step])
    per_dimension = log_ratio / latents[0].numel()
    if epsilon is None:
        is_clipped = torch.zeros_like(log_ratio, dtype=torch.bool)
        gain = advantages * log_ratio
    else:
        # Its gradient at a ratio of 1 is that of the log-density, which is D times that of the ratio of a dimension.
        ratio, size = per_dimension.exp(), latents[0].numel()
        clipped = ratio.clamp(1 - epsilon, 1 + epsilon)
        is_clipped = advantages * clipped < advantages * ratio
        gain = torch.minimum(advantages * ratio, advantages * clipped) * size
    return StepLoss(beta * kl - gain, kl.detach(), per_dimension.detach(), is_clipped)
