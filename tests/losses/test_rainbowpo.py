"""The RainbowPO loss against its equation and the methods at its corners (arXiv 2410.04203)."""

import doctest
import itertools
import math

import mpmath as mp
import pytest
import torch
import torch.nn.functional as F

from trl_ext.losses import mallows_dpo_loss, rainbow_po_loss, rainbowpo


every_link = pytest.mark.parametrize("link", rainbowpo.LINKS)
HYPERPARAMETERS = dict(beta=3.0, gamma=0.3, mixing_alpha=0.25)


def random_pairs(count=60, seed=0):
    """Margins of policy and reference, and weights."""
    generator = torch.Generator().manual_seed(seed)
    margins = torch.randn(2, count, generator=generator, dtype=torch.float64)
    return *margins, 2 * torch.rand(count, generator=generator, dtype=torch.float64)


def values(*numbers):
    return [torch.tensor([number], dtype=torch.float64) for number in numbers]


EXACT = {
    "sigmoid": lambda z, beta: mp.log(1 + mp.exp(-z)),
    "hinge": lambda z, beta: max(mp.mpf(0), 1 - z),
    "ipo": lambda z, beta: (z / beta - 1 / (2 * mp.mpf(beta))) ** 2,
    "squared_hinge": lambda z, beta: max(mp.mpf(0), 1 / (2 * mp.mpf(beta)) - z / beta) ** 2,
    "cauchy": lambda z, beta: -mp.log(mp.atan(z) / mp.pi + mp.mpf(1) / 2),
}


@every_link
def test_equals_the_definition(link):
    pairs = random_pairs()
    with mp.workdps(50):
        exact = []
        for policy, reference, weight in zip(*(x.tolist() for x in pairs), strict=True):
            x = mp.mpf(policy) - mp.mpf(0.25) * mp.mpf(reference) - mp.mpf(0.75) * mp.mpf(0.3)
            exact.append(float(EXACT[link](3 * mp.mpf(weight) * x, 3)))
    losses = rainbow_po_loss(*pairs, **HYPERPARAMETERS, link=link)
    torch.testing.assert_close(losses, torch.tensor(exact, dtype=torch.float64), rtol=1e-12, atol=1e-15)


def test_by_hand():
    """
    0.8 - 0.25 x 0.4 - 0.75 x 0.1 = 0.625; times 10 x 0.8 is 5: log(1 + e^-5), hinge 0, (5 - 0.5)^2 / 100 for IPO.
    """
    inputs, options = values(0.8, 0.4, 0.8), dict(beta=10.0, gamma=0.1, mixing_alpha=0.25)
    expected = {
        "sigmoid": math.log1p(math.exp(-5)),
        "hinge": 0.0,
        "ipo": 0.2025,
        "squared_hinge": 0.0,
        "cauchy": -math.log(math.atan(5) / math.pi + 0.5),
    }
    for link, loss in expected.items():
        assert rainbow_po_loss(*inputs, **options, link=link).item() == pytest.approx(loss, rel=1e-12, abs=1e-15)


# ---- Corners --------------------------------------------------------------------------------------------------------


def test_dpo_and_length_normalized_dpo():
    """alpha = 1, no weight: -log sigmoid(beta (D_policy - D_reference)), and gamma vanishes."""
    policy, reference, _ = random_pairs()
    dpo = -F.logsigmoid(0.1 * (policy - reference))
    for gamma in (0.0, 5.0):
        losses = rainbow_po_loss(policy, reference, None, beta=0.1, gamma=gamma, mixing_alpha=1.0)
        torch.testing.assert_close(losses, dpo, rtol=1e-14, atol=0)


def test_simpo():
    """
    alpha = 0, no weight: SimPO with the margin beta gamma. A pair whose policy margin is gamma has the loss log 2. The
    reference is not read, and may be absent.
    """
    policy, reference, _ = random_pairs()
    simpo = -F.logsigmoid(2.5 * policy - 2.5 * 0.55)
    for given in (reference, None):
        losses = rainbow_po_loss(policy, given, None, beta=2.5, gamma=0.55, mixing_alpha=0.0)
        torch.testing.assert_close(losses, simpo, rtol=1e-13, atol=0)
    at_margin = rainbow_po_loss(*values(0.55), None, None, beta=2.5, gamma=0.55, mixing_alpha=0.0)
    assert at_margin.item() == pytest.approx(math.log(2), rel=1e-14)


@pytest.mark.parametrize("link", ["sigmoid", "ipo"])
def test_mallows_dpo(link):
    """alpha = 1 with weights: Mallows-DPO, of the same log ratios."""
    policy, reference, weight = random_pairs()
    losses = rainbow_po_loss(policy, reference, weight, beta=0.4, gamma=0.1, mixing_alpha=1.0, link=link)
    zero = torch.zeros_like(policy)
    expected = mallows_dpo_loss(policy - reference, zero, weight, beta=0.4, link=link)
    torch.testing.assert_close(losses, expected, rtol=1e-12, atol=1e-15)


def test_no_weight_is_weight_one():
    policy, reference, weight = random_pairs()
    for link in rainbowpo.LINKS:
        losses = [
            rainbow_po_loss(policy, reference, w, **HYPERPARAMETERS, link=link)
            for w in (None, torch.ones_like(weight))
        ]
        assert torch.equal(*losses)


# ---- Structure ------------------------------------------------------------------------------------------------------


def argument(policy, reference, weight=None, **options):
    """The argument z / (beta w) of the loss, read off the sigmoid link at beta = 1."""
    return -torch.expm1(rainbow_po_loss(policy, reference, weight, beta=1.0, **options)).log()


def test_linear_in_alpha():
    """
    x(alpha) = alpha x(1) + (1 - alpha) x(0), x(0) = D_policy - gamma: (1 - alpha) belongs to gamma, alpha to the
    reference.
    """
    policy, reference, _ = random_pairs()
    one, zero = (argument(policy, reference, gamma=0.7, mixing_alpha=alpha) for alpha in (1.0, 0.0))
    torch.testing.assert_close(zero, policy - 0.7, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(one, policy - reference, rtol=1e-9, atol=1e-9)
    mixed = argument(policy, reference, gamma=0.7, mixing_alpha=0.3)
    torch.testing.assert_close(mixed, 0.3 * one + 0.7 * zero, rtol=1e-9, atol=1e-9)


def test_gamma_is_inside_beta_and_weight():
    """dL/dgamma = beta w (1 - alpha) sigmoid(-z), never negative: by central differences over gamma."""
    policy, reference, weight = random_pairs()

    def losses(gamma):
        return rainbow_po_loss(policy, reference, weight, beta=3.0, gamma=gamma, mixing_alpha=0.25)

    slope = (losses(0.3 + 1e-6) - losses(0.3 - 1e-6)) / 2e-6
    expected = 3.0 * weight * 0.75 * -torch.expm1(-losses(0.3))
    torch.testing.assert_close(slope, expected, rtol=1e-6, atol=1e-8)
    assert (slope >= 0).all()


def test_at_the_reference():
    """policy = reference: log 2 at alpha = 1, and -log sigmoid(beta w (1 - alpha)(D_reference - gamma)) below."""
    _, reference, weight = random_pairs()
    losses = rainbow_po_loss(reference, reference, weight, beta=3.0, gamma=0.3, mixing_alpha=1.0)
    torch.testing.assert_close(losses, torch.full_like(losses, math.log(2)), rtol=1e-14, atol=0)
    losses = rainbow_po_loss(reference, reference, weight, **HYPERPARAMETERS)
    expected = -F.logsigmoid(3.0 * weight * 0.75 * (reference - 0.3))
    torch.testing.assert_close(losses, expected, rtol=1e-12, atol=1e-15)
    assert (losses - math.log(2)).abs().max() > 0.1


def test_length_normalization_is_a_scale_of_beta():
    """For responses of n tokens: margins per token at beta are summed margins at beta / n, with gamma times n."""
    policy, reference, weight = random_pairs()
    n = 37
    options = dict(mixing_alpha=0.25)
    for link in ("sigmoid", "hinge", "cauchy"):
        normalized = rainbow_po_loss(policy, reference, weight, beta=10.0, gamma=0.1, **options, link=link)
        summed = rainbow_po_loss(n * policy, n * reference, weight, beta=10.0 / n, gamma=0.1 * n, **options, link=link)
        torch.testing.assert_close(normalized, summed, rtol=1e-11, atol=1e-14)


def test_squared_losses():
    """
    beta^2 times "ipo" is the released mallows_ipo (z - 1/2)^2, beta^2 times "squared_hinge" its mallows_ipo_modified
    relu(1/2 - z)^2: equal below z = 1/2, where the latter is 0 with gradient 0 from there on.
    """
    policy, reference, weight = random_pairs()
    policy.requires_grad_()
    ipo, hinge = (
        rainbow_po_loss(policy, reference, weight, **HYPERPARAMETERS, link=link) for link in ("ipo", "squared_hinge")
    )
    z = (3.0 * weight * (policy - 0.25 * reference - 0.75 * 0.3)).detach()
    torch.testing.assert_close(9 * ipo.detach(), (z - 0.5) ** 2, rtol=1e-11, atol=1e-14)
    reached = z >= 0.5
    assert reached.any() and not reached.all()
    assert torch.equal(ipo[~reached], hinge[~reached]) and not hinge[reached].any()
    (gradient,) = torch.autograd.grad(hinge.sum(), policy)
    assert not gradient[reached].any() and gradient[~reached].all()


def test_cauchy_has_a_heavy_tail():
    """
    The gradient on a lost pair is 1/|z|, not a constant, and still right where the difference arctan(z)/pi + 1/2 is
    rounding in float32; a won pair's loss is 1 / (pi z).
    """
    for margin in (-1e3, -1e6, -1e9):
        policy = torch.tensor([margin], requires_grad=True)
        loss = rainbow_po_loss(policy, None, None, beta=1.0, gamma=0.0, mixing_alpha=0.0, link="cauchy")
        loss.backward()
        assert loss.item() == pytest.approx(math.log(math.pi * -margin), rel=1e-6)
        assert policy.grad.item() == pytest.approx(1 / margin, rel=1e-5)
    won = rainbow_po_loss(torch.tensor([1e6]), None, None, beta=1.0, gamma=0.0, mixing_alpha=0.0, link="cauchy")
    assert won.item() == pytest.approx(1 / (math.pi * 1e6), rel=1e-5)


@every_link
def test_gradcheck(link):
    policy, reference, weight = (x[:12] for x in random_pairs())
    policy.requires_grad_()
    assert torch.autograd.gradcheck(
        lambda x: rainbow_po_loss(x, reference, weight, **HYPERPARAMETERS, link=link), [policy]
    )


def test_weight_is_a_constant():
    policy, reference, weight = (x.requires_grad_() for x in random_pairs())
    for link in rainbowpo.LINKS:
        loss = rainbow_po_loss(policy, reference, weight, **HYPERPARAMETERS, link=link).sum()
        assert torch.autograd.grad(loss, weight, allow_unused=True) == (None,)


@every_link
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_finite_for_finite_inputs(link, dtype):
    """Any corner of the dtype gives finite losses and gradients, in fp32 at least."""
    largest, tiny = torch.finfo(dtype).max, torch.finfo(dtype).tiny
    numbers = (-largest, -3.0, -tiny, 0.0, tiny, 3.0, largest)
    corners = torch.tensor(list(itertools.product(numbers, numbers, (0.0, tiny, 1.0, largest))), dtype=dtype)
    for beta in (1e-3, 30.0):
        policy, reference, weight = (x.clone() for x in corners.T)
        if dtype == torch.float16:  # the gradient itself, w beta, is beyond its largest number
            policy, reference = policy.float(), reference.float()
        policy.requires_grad_(), reference.requires_grad_()
        losses = rainbow_po_loss(policy, reference, weight, beta=beta, gamma=0.3, mixing_alpha=0.5, link=link)
        assert losses.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert losses.isfinite().all() and (losses >= 0).all()
        losses.sum().backward()
        assert policy.grad.isfinite().all() and reference.grad.isfinite().all()


@pytest.mark.parametrize(
    "change, message",
    [
        ({"beta": 0.0}, "beta must be a finite number greater than 0, got 0.0.*10"),
        ({"gamma": math.inf}, "gamma must be a finite number, got inf"),
        ({"mixing_alpha": 1.5}, r"mixing_alpha must be a number in \[0, 1\], got 1.5"),
        ({"mixing_alpha": True}, r"mixing_alpha must be a number in \[0, 1\], got True"),
        ({"link": "logistic"}, "link must be one of 'sigmoid', 'hinge', 'ipo', 'squared_hinge', 'cauchy', got 'logi"),
    ],
)
def test_bad_parameters(change, message):
    with pytest.raises(ValueError, match=message):
        rainbow_po_loss(*random_pairs(), **{**HYPERPARAMETERS, **change})


def test_bad_inputs():
    policy, reference, weight = random_pairs()
    with pytest.raises(ValueError, match="reference_margin is None, but mixing_alpha=0.25 reads it"):
        rainbow_po_loss(policy, None, weight, **HYPERPARAMETERS)
    with pytest.raises(ValueError, match=r"same shape, got .*weight \(59,\)"):
        rainbow_po_loss(policy, reference, weight[1:], **HYPERPARAMETERS)
    with pytest.raises(ValueError, match="policy_margin must be a floating-point tensor, got torch.int64"):
        rainbow_po_loss(policy.long(), reference, None, **HYPERPARAMETERS)


def test_docstring():
    text = rainbow_po_loss.__doc__.replace("```python", "").replace("```", "")
    example = doctest.DocTestParser().get_doctest(text, vars(rainbowpo).copy(), "rainbow_po_loss", None, 0)
    assert example.examples and doctest.DocTestRunner(verbose=False).run(example).failed == 0
