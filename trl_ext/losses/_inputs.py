"""Shared argument validation and dtype promotion for the losses."""

import math
from typing import TypeGuard

import torch


def is_number(value) -> TypeGuard[float]:
    """Whether `value` is a finite number (not a `bool`)."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def prepare_inputs(**named: torch.Tensor) -> list[torch.Tensor]:
    """
    Converts a loss's inputs to one dtype, float32 or float64 if one of them is, and clamps them far beyond any
    log-probability, so that differences of finite inputs stay finite.

    Raises:
        ValueError: if the shapes differ or an input is not floating-point. The message names the inputs.
    """
    if len({value.shape for value in named.values()}) > 1:
        shapes = ", ".join(f"{name} {tuple(value.shape)}" for name, value in named.items())
        raise ValueError(f"The inputs must have the same shape, got {shapes}.")
    dtype = torch.float32
    for name, value in named.items():
        if not value.is_floating_point():
            raise ValueError(f"{name} must be a floating-point tensor, got {value.dtype}.")
        dtype = torch.promote_types(dtype, value.dtype)
    bound = saturation(dtype)
    return [value.to(dtype).clamp(-bound, bound) for value in named.values()]


def saturation(dtype: torch.dtype) -> float:
    """Largest magnitude of a prepared input: an eighth of the dtype's largest number."""
    return torch.finfo(dtype).max / 8
