"""The precision in which models are measured."""

from ..training.modes import without_autocast


__all__ = ["without_autocast"]
