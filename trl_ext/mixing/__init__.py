"""Mixtures of policies that were each aligned to one preference: their weights and their decoding."""

from .measure import MeanWithInterval, PolicyMeasurement, measure_policies
from .mixture import MixtureLogProbs, MixtureSamples, Policy, PolicyMixture
from .policies import AlignedPolicies, ScoredResponses
from .solve import reference_logratios, solve_mixture_weights
from .weights import MixtureWeights, log_partition, match_betas, maximin_weights


__all__ = [
    "AlignedPolicies",
    "MeanWithInterval",
    "MixtureLogProbs",
    "MixtureSamples",
    "MixtureWeights",
    "Policy",
    "PolicyMeasurement",
    "PolicyMixture",
    "ScoredResponses",
    "log_partition",
    "match_betas",
    "maximin_weights",
    "measure_policies",
    "reference_logratios",
    "solve_mixture_weights",
]
