"""
The methods under test.

A new method joins the shared suite, the drop-in, contract and bad-input tests with one `Method(...)` line in
`METHODS`, and with its equation: a function from plain full-vocabulary log-softmax to losses and rewards, written here
from the paper and sharing no code with `trl_ext`. Mark one entry a trainer class `primary=True`: the expensive tests
(launches of two processes, kills, quantization) run for that one, everything else for all. Then run `pytest
tests/test_method_suite.py -k <id> --regen-golden` once and commit the golden trajectory it writes.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F

from trl_ext import (
    D2POConfig,
    D2POTrainer,
    FDPOConfig,
    FDPOTrainer,
    MallowsDPOConfig,
    MallowsDPOTrainer,
    RainbowPOConfig,
    RainbowPOTrainer,
    SimPERConfig,
    SimPERTrainer,
    TDPOConfig,
    TDPOTrainer,
)


@dataclass
class Side:
    """What a model says of one side of the pairs: full log-softmax at every position, shifted onto its target."""

    logprobs: torch.Tensor  # (B, T-1, V)
    targets: torch.Tensor  # (B, T-1)
    mask: torch.Tensor  # (B, T-1), True on the response

    @property
    def token_logps(self) -> torch.Tensor:
        return self.logprobs.gather(-1, self.targets[..., None]).squeeze(-1) * self.mask

    @property
    def logps(self) -> torch.Tensor:
        return self.token_logps.sum(-1)

    @property
    def mean_logps(self) -> torch.Tensor:
        return self.logps / self.mask.sum(-1)

    @property
    def mean_entropy(self) -> torch.Tensor:
        """Entropy of the next-token distributions as a share of the largest, averaged over the response's tokens."""
        entropy = -(self.logprobs.exp() * self.logprobs).sum(-1) / math.log(self.logprobs.size(-1))
        return (entropy * self.mask).sum(-1) / self.mask.sum(-1)


def f_dpo(score: Callable) -> Callable:
    """f-DPO (https://huggingface.co/papers/2309.16240): -log sigmoid(beta (f'(u_w) - f'(u_l))), by f'(e^l)."""

    def equation(chosen, rejected, ref_chosen, ref_rejected, beta):
        rewards = [
            beta * score(side.logps - ref.logps) for side, ref in ((chosen, ref_chosen), (rejected, ref_rejected))
        ]
        return -F.logsigmoid(rewards[0] - rewards[1]), *rewards

    return equation


def simper(chosen, rejected, ref_chosen, ref_rejected, beta):
    """SimPER (https://huggingface.co/papers/2502.00883): difference of inverse perplexities."""
    return rejected.mean_logps.exp() - chosen.mean_logps.exp(), chosen.mean_logps, rejected.mean_logps


def tdpo(alpha: float, chosen_has_gradient: bool) -> Callable:
    """
    TDPO (https://huggingface.co/papers/2404.11999), Eq. 15 and 18: -log sigmoid(beta [m_w - m_l - alpha (K_l - K_w)]),
    K_w behind a stop-gradient in TDPO2; rewards beta (m + K).
    """

    def equation(chosen, rejected, ref_chosen, ref_rejected, beta):
        pairs = ((chosen, ref_chosen), (rejected, ref_rejected))
        m_w, m_l = (side.logps - ref.logps for side, ref in pairs)
        k_w, k_l = (
            ((ref.logprobs.exp() * (ref.logprobs - side.logprobs)).sum(-1) * side.mask).sum(-1) for side, ref in pairs
        )
        held = k_w if chosen_has_gradient else k_w.detach()
        return -F.logsigmoid(beta * (m_w - m_l - alpha * (k_l - held))), beta * (m_w + k_w), beta * (m_l + k_l)

    return equation


def mallows_weight(ref_chosen, ref_rejected, kappa: float) -> torch.Tensor:
    """Mallows-DPO (https://huggingface.co/papers/2405.14953), Eq. 12 with means over tokens: -kappa log H."""
    return -kappa * torch.log((ref_chosen.mean_entropy + ref_rejected.mean_entropy) / 2)


def mallows(kappa: float) -> Callable:
    """Mallows-theta-DPO: -log sigmoid(beta w (m_w - m_l)); rewards beta m."""

    def equation(chosen, rejected, ref_chosen, ref_rejected, beta):
        rewards = [beta * (side.logps - ref.logps) for side, ref in ((chosen, ref_chosen), (rejected, ref_rejected))]
        weight = mallows_weight(ref_chosen, ref_rejected, kappa)
        return -F.logsigmoid(weight * (rewards[0] - rewards[1])), *rewards

    return equation


def mallows_phi(kappa: float) -> Callable:
    """
    Mallows-phi-DPO: -log [h(x + 1/2) - h(x - 1/2)], h(k) = k / (1 - phi^k), phi^2 = e^-w, at x the margin s and half a
    smooth sign of (1 - log phi) s.
    """

    def equation(chosen, rejected, ref_chosen, ref_rejected, beta):
        rewards = [beta * (side.logps - ref.logps) for side, ref in ((chosen, ref_chosen), (rejected, ref_rejected))]
        phi = torch.exp(-mallows_weight(ref_chosen, ref_rejected, kappa).double() / 2)
        s = (rewards[0] - rewards[1]).double()  # h loses digits near its removable point, k = 0
        v = ((1 - phi.log()) * s).clamp(-1, 1)
        x = s + (15 * v - 10 * v**3 + 3 * v**5) / 16
        upper, lower = ((x + d) / (1 - phi ** (x + d)) for d in (0.5, -0.5))
        return -torch.log(upper - lower), *rewards

    return equation


def rainbowpo(alpha: float, gamma: float, kappa: float) -> Callable:
    """
    RainbowPO (https://huggingface.co/papers/2410.04203), per token: -log sigmoid(beta w [D - alpha D_ref - (1 - alpha)
    gamma]); rewards beta (log policy - alpha log reference).
    """

    def equation(chosen, rejected, ref_chosen, ref_rejected, beta):
        pairs = ((chosen, ref_chosen), (rejected, ref_rejected))
        rewards = [beta * (side.mean_logps - alpha * ref.mean_logps) for side, ref in pairs]
        margin = rewards[0] - rewards[1] - beta * (1 - alpha) * gamma
        return -F.logsigmoid(mallows_weight(ref_chosen, ref_rejected, kappa) * margin), *rewards

    return equation


@dataclass(frozen=True)
class Method:
    """
    One entry of the suite.

    Args:
        id (`str`): Name in test ids and of the golden file.
        trainer, config (`type`): The method's classes.
        equation (`Callable`): `(chosen, rejected, ref_chosen, ref_rejected, beta) -> losses, chosen_rewards,
            rejected_rewards`, from [`Side`]s; the reference sides are `None` for a method without reference.
        options (`dict`): Arguments of the configuration. recipe (`str`): Name of the script in `recipes/` and of its
        folder of configurations. primary (`bool`): Whether the expensive tests run for this entry. online (`bool`):
        Whether it trains on prompts and samples its own pairs. The harness then gives it the prompts of a
            preference dataset and a gold function, and a window of one optimizer step.
    """

    id: str
    trainer: type
    config: type
    equation: Callable
    options: dict = field(default_factory=dict)
    recipe: str = ""
    primary: bool = False
    online: bool = False

    @property
    def needs_reference(self) -> bool:
        return self.trainer.needs_reference


METHODS = [
    Method("fdpo", FDPOTrainer, FDPOConfig, f_dpo(lambda x: x), recipe="fdpo", primary=True),
    Method(
        "fdpo_js",
        FDPOTrainer,
        FDPOConfig,
        f_dpo(lambda x: math.log(2) + F.logsigmoid(x)),
        options={"divergence": "js"},
        recipe="fdpo",
    ),
    Method(
        "fdpo_forward_kl",
        FDPOTrainer,
        FDPOConfig,
        f_dpo(lambda x: 1 - torch.exp(-x)),
        options={"divergence": "forward_kl", "learning_rate": 1e-4},
        recipe="fdpo",
    ),
    Method(
        "mallows",
        MallowsDPOTrainer,
        MallowsDPOConfig,
        mallows(1.5),
        options={"kappa": 1.5},
        recipe="mallows",
        primary=True,
    ),
    Method(
        "mallows_phi",
        MallowsDPOTrainer,
        MallowsDPOConfig,
        mallows_phi(4.0),
        options={"kappa": 4.0, "link": "phi"},
        recipe="mallows",
    ),
    Method(
        "rainbowpo",
        RainbowPOTrainer,
        RainbowPOConfig,
        rainbowpo(0.25, 0.1, 1.5),
        options={"kappa": 1.5},
        recipe="rainbowpo",
        primary=True,
    ),
    Method("simper", SimPERTrainer, SimPERConfig, simper, recipe="simper", primary=True),
    Method("tdpo", TDPOTrainer, TDPOConfig, tdpo(0.5, chosen_has_gradient=False), recipe="tdpo", primary=True),
    Method(
        "tdpo1",
        TDPOTrainer,
        TDPOConfig,
        tdpo(1.0, chosen_has_gradient=True),
        options={"variant": "tdpo1"},
        recipe="tdpo",
    ),
]

# Methods that sample their own pairs: they join the tests that ask how a run behaves, whatever its data.
ONLINE = [
    Method(
        "d2po",
        D2POTrainer,
        D2POConfig,
        f_dpo(lambda x: x),
        options={"discriminator": "none", "max_completion_length": 8},
        recipe="d2po",
        primary=True,
        online=True,
    ),
]

PRIMARY = [method for method in METHODS if method.primary]
WITH_REFERENCE = [method for method in METHODS if method.needs_reference]
WITH_PRECOMPUTE = [
    method for method in WITH_REFERENCE if "precompute_ref_log_probs" not in method.config._refused_options
]
BY_ID = {method.id: method for method in [*METHODS, *ONLINE]}
