"""
Shared code of Diffusion-DPO and DSPO: pipeline families, data, latent cache, the paired step.

The collator makes, and the trainer reads, a batch of pairs as a `dict` of

- `index`, int64 of shape `(B,)`: number of each pair in the dataset, from which its noise is drawn;
- `prompt`, a list of B strings, `""` where it was dropped;
- `pixel_values`, `(2B, 3, H, W)` in [-1, 1], all chosen first; or, cached, `latents`, `(2B, C, h, w)`, as
  [`PipelineFamily.encode_images`] gives them, and `conditioning`, a `dict` of tensors with B rows, as
  [`PipelineFamily.encode_prompts`] gives it;
- `size_conditioning`, int64 of shape `(B, 6)`, as in [`PipelineFamily.image_conditioning`].
"""

import importlib
from typing import TYPE_CHECKING

from . import newer_families as _newer_families  # noqa: F401 - registers its families
from .diffusion_config import DiffusionConfig
from .diffusion_trainer import DenoisedPairs, DiffusionTrainer
from .families import FlowFamily, PipelineFamily, family_class, get_family, known_pipelines, register_family
from .image_config import ImageConfig
from .image_trainer import ImageTrainer
from .online_config import OnlineDiffusionConfig
from .online_trainer import OnlineDiffusionTrainer
from .reference_rewards import ReferenceRewards
from .rewards import AestheticReward, CLIPReward, ImageRewards


if TYPE_CHECKING:
    from .bdia import BDIAScheduler, NoisePair, invert, sample_from
    from .rich_pairs import RichPairsReport, make_rich_pairs
    from .rich_parts import Critique, EndpointCritic, EndpointInstructor, PipelineEditor, PipelineSampler


__all__ = [
    "AestheticReward",
    "BDIAScheduler",
    "CLIPReward",
    "Critique",
    "DenoisedPairs",
    "DiffusionConfig",
    "DiffusionTrainer",
    "EndpointCritic",
    "EndpointInstructor",
    "FlowFamily",
    "ImageConfig",
    "ImageRewards",
    "ImageTrainer",
    "NoisePair",
    "OnlineDiffusionConfig",
    "OnlineDiffusionTrainer",
    "PipelineEditor",
    "PipelineFamily",
    "PipelineSampler",
    "ReferenceRewards",
    "RichPairsReport",
    "family_class",
    "get_family",
    "invert",
    "known_pipelines",
    "make_rich_pairs",
    "register_family",
    "sample_from",
]


# On first use: the scheduler is a subclass of diffusers', which the rest of the room imports where it is needed, and a
# critic brings an HTTP client.
_LAZY = {
    **dict.fromkeys(("BDIAScheduler", "NoisePair", "invert", "sample_from"), "bdia"),
    **dict.fromkeys(("RichPairsReport", "make_rich_pairs"), "rich_pairs"),
    **dict.fromkeys(
        ("Critique", "EndpointCritic", "EndpointInstructor", "PipelineEditor", "PipelineSampler"), "rich_parts"
    ),
}


def __getattr__(name: str):
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_LAZY[name]}", __name__), name)
    globals()[name] = value
    return value
