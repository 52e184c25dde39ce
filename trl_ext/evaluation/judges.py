"""Deprecated location of `trl_ext.judges`; kept for scripts written for 0.1.0."""

import warnings

from ..judges.judges import *  # noqa: F403


warnings.warn("`trl_ext.evaluation.judges` has moved to `trl_ext.judges`.", FutureWarning, stacklevel=2)
