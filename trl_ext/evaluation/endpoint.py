"""Deprecated location of `trl_ext.judges`; kept for scripts written for 0.1.0."""

import warnings

from ..judges.endpoint import *  # noqa: F403


warnings.warn("`trl_ext.evaluation.endpoint` has moved to `trl_ext.judges`.", FutureWarning, stacklevel=2)
