"""Alignment methods that TRL does not have, as drop-in `*Trainer` / `*Config` classes."""

import importlib
import pkgutil
from typing import TYPE_CHECKING

from ._version import __version__


if TYPE_CHECKING:  # what `__getattr__` below gives, for type checkers and editors
    from . import (  # noqa: F401
        d2po,
        diffusion,
        diffusion_dpo,
        dph_rl,
        dspo,
        evaluation,
        fdpg,
        fdpo,
        judges,
        kernels,
        launch,
        losses,
        mallows,
        mixing,
        preference,
        rainbowpo,
        rollout,
        score_as_action,
        simper,
        tdpo,
        training,
        wro,
    )
    from .d2po import D2POConfig, D2POTrainer
    from .diffusion_dpo import DiffusionDPOConfig, DiffusionDPOTrainer
    from .dph_rl import DPHRLConfig, DPHRLTrainer, collect_rehearsal
    from .dspo import DSPOConfig, DSPOTrainer
    from .fdpg import FDPGConfig, FDPGTrainer, fit_moments
    from .fdpo import FDPOConfig, FDPOTrainer
    from .mallows import MallowsDPOConfig, MallowsDPOTrainer
    from .mixing import PolicyMixture, solve_mixture_weights
    from .preference import PreferenceConfig, PreferenceTrainer
    from .rainbowpo import RainbowPOConfig, RainbowPOTrainer
    from .score_as_action import ScoreAsActionConfig, ScoreAsActionTrainer
    from .simper import SimPERConfig, SimPERTrainer
    from .tdpo import TDPOConfig, TDPOTrainer
    from .wro import WinRateReward, WROConfig, WROTrainer


# Public class -> the module that defines it. Imported on first use, so that `import trl_ext` costs nothing.
_PUBLIC = {
    "D2POConfig": "trl_ext.d2po",
    "D2POTrainer": "trl_ext.d2po",
    "DPHRLConfig": "trl_ext.dph_rl",
    "DPHRLTrainer": "trl_ext.dph_rl",
    "DSPOConfig": "trl_ext.dspo",
    "DSPOTrainer": "trl_ext.dspo",
    "DiffusionDPOConfig": "trl_ext.diffusion_dpo",
    "DiffusionDPOTrainer": "trl_ext.diffusion_dpo",
    "FDPGConfig": "trl_ext.fdpg",
    "FDPGTrainer": "trl_ext.fdpg",
    "FDPOConfig": "trl_ext.fdpo",
    "FDPOTrainer": "trl_ext.fdpo",
    "MallowsDPOConfig": "trl_ext.mallows",
    "MallowsDPOTrainer": "trl_ext.mallows",
    "PolicyMixture": "trl_ext.mixing",
    "PreferenceConfig": "trl_ext.preference",
    "PreferenceTrainer": "trl_ext.preference",
    "RainbowPOConfig": "trl_ext.rainbowpo",
    "RainbowPOTrainer": "trl_ext.rainbowpo",
    "ScoreAsActionConfig": "trl_ext.score_as_action",
    "ScoreAsActionTrainer": "trl_ext.score_as_action",
    "SimPERConfig": "trl_ext.simper",
    "SimPERTrainer": "trl_ext.simper",
    "TDPOConfig": "trl_ext.tdpo",
    "TDPOTrainer": "trl_ext.tdpo",
    "WROConfig": "trl_ext.wro",
    "WROTrainer": "trl_ext.wro",
    "WinRateReward": "trl_ext.wro",
    "collect_rehearsal": "trl_ext.dph_rl",
    "fit_moments": "trl_ext.fdpg",
    "solve_mixture_weights": "trl_ext.mixing",
}
_SUBPACKAGES = tuple(module.name for module in pkgutil.iter_modules(__path__) if module.ispkg)

__all__ = [
    "D2POConfig",
    "D2POTrainer",
    "DPHRLConfig",
    "DPHRLTrainer",
    "DSPOConfig",
    "DSPOTrainer",
    "DiffusionDPOConfig",
    "DiffusionDPOTrainer",
    "FDPGConfig",
    "FDPGTrainer",
    "FDPOConfig",
    "FDPOTrainer",
    "MallowsDPOConfig",
    "MallowsDPOTrainer",
    "PolicyMixture",
    "PreferenceConfig",
    "PreferenceTrainer",
    "RainbowPOConfig",
    "RainbowPOTrainer",
    "ScoreAsActionConfig",
    "ScoreAsActionTrainer",
    "SimPERConfig",
    "SimPERTrainer",
    "TDPOConfig",
    "TDPOTrainer",
    "WROConfig",
    "WROTrainer",
    "WinRateReward",
    "__version__",
    "collect_rehearsal",
    "fit_moments",
    "solve_mixture_weights",
]


def __getattr__(name: str):
    if name in _PUBLIC:
        value = getattr(importlib.import_module(_PUBLIC[name]), name)
    elif name in _SUBPACKAGES:
        value = importlib.import_module(f"{__name__}.{name}")
    else:
        raise AttributeError(f"module 'trl_ext' has no attribute '{name}'. Public names: {', '.join(__all__)}.")
    globals()[name] = value
    return value


def __dir__():
    return sorted({*globals(), *__all__, *_SUBPACKAGES})
