"""The parameters of a divergence as options of a configuration."""

import dataclasses
from typing import Any


_HELP = {
    "alpha": "Parameter of divergence='alpha', above 0, in the f-DPO paper's convention: toward 0 it is the reverse KL "
    "(DPO), at 1 the forward KL. TRL's `f_alpha_divergence_coef` is 1 minus it. Default: 0.5.",
    "skew": "Parameter of divergence='skew_js', in (0, 1): the weight of the policy in the mixture. Default: 0.5.",
    "gamma": "Parameter of divergence='chi_po', above 0: the weight of the KL divergence beside chi-squared. Default: "
    "1.",
}


def divergence_parameter(name: str) -> Any:
    """The dataclass field of `"alpha"`, `"skew"` or `"gamma"`; `None` stands for the divergence's own default."""
    return dataclasses.field(default=None, metadata={"help": _HELP[name]})


def given_parameters(config) -> dict[str, Any]:
    """Those of the parameters that a configuration sets, for [`~trl_ext.losses.get_divergence`]."""
    return {name: getattr(config, name) for name in _HELP if getattr(config, name) is not None}
