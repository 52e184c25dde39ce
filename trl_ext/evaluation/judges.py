"""Deprecated location of `trl_ext.judges`; kept for scripts written for 0.1.0."""

import warnings

from ..judges.callables import *  # noqa: F403
from ..judges.loading import *  # noqa: F403
from ..judges.reward_models import *  # noqa: F403
from ..judges.verdicts import *  # noqa: F403
from .judging import *  # noqa: F403


warnings.warn("`trl_ext.evaluation.judges` has moved to `trl_ext.judges`.", FutureWarning, stacklevel=2)
