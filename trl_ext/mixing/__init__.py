"""Mixtures of policies that were each aligned to one preference: their weights and their decoding."""

from .mixture import MixtureLogProbs, MixtureSamples, PolicyMixture
from .solve import reference_logratios, solve_mixture_weights
from .weights import MixtureWeights, log_partition, match_betas, maximin_weights


__all__ = [
    "MixtureLogProbs",
    "MixtureSamples",
    "MixtureWeights",
    "PolicyMixture",
    "log_partition",
    "match_betas",
    "maximin_weights",
    "reference_logratios",
    "solve_mixture_weights",
]
