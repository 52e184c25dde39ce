"""Mixtures of policies that were each aligned to one preference: their weights."""

from .weights import MixtureWeights, log_partition, match_betas, maximin_weights


__all__ = ["MixtureWeights", "log_partition", "match_betas", "maximin_weights"]
