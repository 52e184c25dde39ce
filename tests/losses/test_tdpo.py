"""The TDPO losses against their equations (arXiv 2404.11999, Eq. 15 and 18)."""

import doctest
import itertools
import math

import mpmath as mp
import pytest
import torch
import torch.nn.functional as F

from trl_ext.losses import tdpo, tdpo_loss


def random_pairs(count=50, seed=0):
    """Log ratios of either sign and divergences, which have none."""
    generator = torch.Generator().manual_seed(seed)
    logratios = 5 * torch.randn(2, count, generator=generator, dtype=torch.float64)
    return *logratios, *(4 * torch.rand(2, count, generator=generator, dtype=torch.float64))


def values(*numbers):
    return [torch.tensor([number], dtype=torch.float64) for number in numbers]


def test_by_hand():
    """
    m_w = 1, m_l = 0.7, K_w = 0.1, K_l = 0.5 at beta = 2: DPO's argument 2 x 0.3 = 0.6, TDPO1's 2 x (0.3 - 0.4) = -0.2,
    TDPO2's at alpha 0.5 2 x (0.3 - 0.2) = 0.2. Three methods, three losses: log(1 + e^-0.6), log(1 + e^0.2),
    log(1 + e^-0.2).
    """
    inputs = values(1.0, 0.7, 0.1, 0.5)
    assert tdpo_loss(*inputs, beta=2.0, alpha=0.0).item() == pytest.approx(math.log1p(math.exp(-0.6)), rel=1e-14)
    assert tdpo_loss(*inputs, beta=2.0, variant="tdpo1").item() == pytest.approx(math.log1p(math.exp(0.2)), rel=1e-14)
    assert tdpo_loss(*inputs, beta=2.0).item() == pytest.approx(math.log1p(math.exp(-0.2)), rel=1e-14)


def test_two_symbols():
    """
    A reference of (1/2, 1/2) and a policy of (1/4, 3/4), one token, chosen the second symbol, rejected the first: m_w
    = log(3/2), m_l = log(1/2), K_w = K_l = log(4/3) / 2. Equal divergences: TDPO1 is DPO, -log sigmoid(log 3) =
    log(4/3).
    """
    kl = 0.5 * math.log(4 / 3)
    inputs = values(math.log(1.5), math.log(0.5), kl, kl)
    for variant in ("tdpo1", "tdpo2"):
        assert tdpo_loss(*inputs, beta=1.0, variant=variant).item() == pytest.approx(math.log(4 / 3), rel=1e-14)


@pytest.mark.parametrize("variant", ["tdpo1", "tdpo2"])
def test_equals_the_definition(variant):
    inputs = random_pairs()
    with mp.workdps(40):
        weight = mp.mpf(1) if variant == "tdpo1" else mp.mpf(0.3)
        exact = [
            float(mp.log(1 + mp.exp(-mp.mpf(0.7) * ((a - b) - weight * (d - c)))))
            for a, b, c, d in ([mp.mpf(x) for x in row] for row in zip(*(x.tolist() for x in inputs), strict=True))
        ]
    losses = tdpo_loss(*inputs, beta=0.7, alpha=0.3, variant=variant)
    torch.testing.assert_close(losses, torch.tensor(exact, dtype=torch.float64), rtol=1e-12, atol=1e-15)


def test_gradients():
    """
    With g = beta sigmoid(-u): TDPO1 has -g, g, -g, g with respect to m_w, m_l, K_w, K_l; TDPO2 -g, g, none, alpha g.
    """
    for variant in ("tdpo1", "tdpo2"):
        inputs = [x.requires_grad_() for x in random_pairs()]
        losses = tdpo_loss(*inputs, beta=0.4, alpha=0.25, variant=variant)
        grads = torch.autograd.grad(losses.sum(), inputs, allow_unused=True)
        g = 0.4 * -torch.expm1(-losses.detach())
        expected = [-g, g, -g, g] if variant == "tdpo1" else [-g, g, None, 0.25 * g]
        for value, truth in zip(grads, expected, strict=True):
            if truth is None:
                assert value is None or not value.any()
            else:
                torch.testing.assert_close(value, truth, rtol=1e-12, atol=1e-15)


def test_gradcheck():
    inputs = [x[:5].requires_grad_() for x in random_pairs()]
    assert torch.autograd.gradcheck(lambda *x: tdpo_loss(*x, beta=0.4, variant="tdpo1"), inputs)
    detached = inputs[2].detach()
    assert torch.autograd.gradcheck(
        lambda m_w, m_l, k_l: tdpo_loss(m_w, m_l, detached, k_l, beta=0.4, alpha=0.25), (*inputs[:2], inputs[3])
    )


def test_limits():
    """alpha = 0 is DPO bitwise; alpha = 1 has TDPO1's value; equal divergences leave DPO; at the reference, log 2."""
    m_w, m_l, k_w, k_l = random_pairs()
    dpo = -F.logsigmoid(0.1 * (m_w - m_l))
    assert torch.equal(tdpo_loss(m_w, m_l, k_w, k_l, beta=0.1, alpha=0.0), dpo)
    one = tdpo_loss(m_w, m_l, k_w, k_l, beta=0.1, variant="tdpo1")
    torch.testing.assert_close(tdpo_loss(m_w, m_l, k_w, k_l, beta=0.1, alpha=1.0), one, rtol=1e-15, atol=0)
    assert torch.equal(tdpo_loss(m_w, m_l, k_w, k_w, beta=0.1, variant="tdpo1"), dpo)
    zero = torch.zeros(3, dtype=torch.float64)
    for variant in ("tdpo1", "tdpo2"):
        losses = tdpo_loss(zero, zero, zero, zero, beta=0.1, variant=variant)
        torch.testing.assert_close(losses, zero + math.log(2), rtol=1e-15, atol=0)


def test_tdpo1_does_not_read_alpha():
    inputs = random_pairs()
    losses = [tdpo_loss(*inputs, beta=0.1, alpha=alpha, variant="tdpo1") for alpha in (0.0, 0.5, 3.0)]
    assert torch.equal(losses[0], losses[1]) and torch.equal(losses[0], losses[2])


def test_swapping_the_sides_flips_the_argument():
    m_w, m_l, k_w, k_l = random_pairs()
    for variant in ("tdpo1", "tdpo2"):
        first = tdpo_loss(m_w, m_l, k_w, k_l, beta=0.1, variant=variant)
        second = tdpo_loss(m_l, m_w, k_l, k_w, beta=0.1, variant=variant)
        torch.testing.assert_close((-first).exp() + (-second).exp(), torch.ones_like(first), rtol=1e-14, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_finite_for_finite_inputs(dtype):
    """Any corner of the dtype gives finite losses and gradients, in fp32 at least."""
    largest = torch.finfo(dtype).max
    corners = torch.tensor(list(itertools.product((-largest, 0.0, largest), repeat=4)), dtype=dtype)
    for variant in ("tdpo1", "tdpo2"):
        inputs = [x.clone().requires_grad_() for x in corners.T]
        losses = tdpo_loss(*inputs, beta=3.0, alpha=2.0, variant=variant)
        assert losses.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert losses.isfinite().all() and (losses >= 0).all()
        grads = torch.autograd.grad(losses.sum(), inputs, allow_unused=True)
        assert all(grad.isfinite().all() for grad in grads if grad is not None)


def test_a_lost_pair_keeps_its_gradient():
    """Where the sigmoid is 0 in fp32 the loss is linear, with the gradient beta."""
    inputs = [torch.tensor([value], requires_grad=True) for value in (-1e4, 1e4, 3.0, 5.0)]
    losses = tdpo_loss(*inputs, beta=0.1)
    assert losses.item() == pytest.approx(0.1 * (2e4 + 1), rel=1e-6)
    losses.backward()
    assert inputs[0].grad.item() == pytest.approx(-0.1) and inputs[3].grad.item() == pytest.approx(0.05)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"beta": 0.0}, "beta must be a finite number greater than 0, got 0.0"),
        ({"beta": math.nan}, "beta must be"),
        ({"alpha": -0.1}, "alpha must be a finite number of at least 0, got -0.1"),
        ({"alpha": math.inf}, "alpha must be"),
        ({"variant": "tdpo"}, "variant must be one of 'tdpo2', 'tdpo1', got 'tdpo'"),
    ],
)
def test_bad_parameters(change, message):
    with pytest.raises(ValueError, match=message):
        tdpo_loss(*random_pairs(), **{"beta": 0.1, **change})


def test_bad_inputs():
    inputs = random_pairs()
    with pytest.raises(ValueError, match=r"same shape, got .*rejected_kl \(49,\)"):
        tdpo_loss(*inputs[:3], inputs[3][1:], beta=0.1)
    with pytest.raises(ValueError, match="chosen_kl must be a floating-point tensor, got torch.int64"):
        tdpo_loss(inputs[0], inputs[1], inputs[2].long(), inputs[3], beta=0.1)


def test_docstring():
    text = tdpo_loss.__doc__.replace("```python", "").replace("```", "")
    example = doctest.DocTestParser().get_doctest(text, vars(tdpo).copy(), "tdpo_loss", None, 0)
    assert doctest.DocTestRunner(verbose=False).run(example).failed == 0
