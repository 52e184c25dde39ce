"""Preference-optimization methods that TRL does not have, as drop-in `*Trainer` / `*Config` classes."""

import importlib

from ._version import __version__


# Public name -> module that defines it; imported on first use, so that `import trl_ext` costs nothing.
_PUBLIC = {
    "D2POConfig": "trl_ext.d2po",
    "D2POTrainer": "trl_ext.d2po",
    "DSPOConfig": "trl_ext.dspo",
    "DSPOTrainer": "trl_ext.dspo",
    "DiffusionDPOConfig": "trl_ext.diffusion_dpo",
    "DiffusionDPOTrainer": "trl_ext.diffusion_dpo",
    "FDPOConfig": "trl_ext.fdpo",
    "FDPOTrainer": "trl_ext.fdpo",
    "MallowsDPOConfig": "trl_ext.mallows",
    "MallowsDPOTrainer": "trl_ext.mallows",
    "PolicyMixture": "trl_ext.mixing",
    "PreferenceConfig": "trl_ext.preference",
    "PreferenceTrainer": "trl_ext.preference",
    "RainbowPOConfig": "trl_ext.rainbowpo",
    "RainbowPOTrainer": "trl_ext.rainbowpo",
    "SimPERConfig": "trl_ext.simper",
    "SimPERTrainer": "trl_ext.simper",
    "TDPOConfig": "trl_ext.tdpo",
    "TDPOTrainer": "trl_ext.tdpo",
    "solve_mixture_weights": "trl_ext.mixing",
}

__all__ = ["__version__", *_PUBLIC]


def __getattr__(name: str):
    if name not in _PUBLIC:
        raise AttributeError(f"module 'trl_ext' has no attribute '{name}'. Public names: {', '.join(__all__)}.")
    value = getattr(importlib.import_module(_PUBLIC[name]), name)
    globals()[name] = value
    return value


def __dir__():
    return sorted(set(globals()) | set(__all__))
