"""Mallows-DPO's weights and losses against the Mallows models themselves (arXiv 2405.14953)."""

import doctest
import itertools
import math

import mpmath as mp
import pytest
import torch
import torch.nn.functional as F

from trl_ext.losses import dispersion_weight, mallows, mallows_dpo_loss


every_link = pytest.mark.parametrize("link", mallows.LINKS)
PHIS = (1e-12, 0.02, 0.3, 0.6, 0.9, 0.999)


def tensor(*numbers, dtype=torch.float64):
    return torch.tensor(numbers, dtype=dtype)


def random_pairs(count=50, seed=0):
    """Log ratios of either sign, and positive weights."""
    generator = torch.Generator().manual_seed(seed)
    logratios = 5 * torch.randn(2, count, generator=generator, dtype=torch.float64)
    return *logratios, 3 * torch.rand(count, generator=generator, dtype=torch.float64)


def kendall(s, phi):
    """g of the link "phi" as the trainer sees it: from the loss at beta = 1, with w = -2 log phi."""
    s = torch.as_tensor(s, dtype=torch.float64).reshape(-1)
    return (-mallows_dpo_loss(s, 0 * s, 0 * s - 2 * math.log(phi), beta=1.0, link="phi")).exp()


# ---- The weight -----------------------------------------------------------------------------------------------------


def test_weight_by_hand():
    """
    Entropies 0.1 and 0.3: H = 0.2, and at kappa 0.5 w = 0.5 log 5. The released constant 0.29 at H = .001, .01, .05,
    .1, .2, .9: 2.00, 1.34, .869, .668, .467, .031.
    """
    assert dispersion_weight(tensor(0.1), tensor(0.3), kappa=0.5).item() == pytest.approx(0.5 * math.log(5), rel=1e-14)
    entropies = tensor(0.001, 0.01, 0.05, 0.1, 0.2, 0.9)
    weights = dispersion_weight(entropies, entropies, kappa=0.29)
    assert weights.tolist() == pytest.approx([2.00, 1.34, 0.869, 0.668, 0.467, 0.031], abs=5e-3)


def test_weight_falls_with_entropy_and_is_symmetric():
    """The higher the entropy, the smaller the weight; the sides are interchangeable."""
    entropies = torch.linspace(0, 1, 101, dtype=torch.float64)
    weights = dispersion_weight(entropies, entropies, kappa=1.0)
    assert (weights.diff()[1:-1] < 0).all()
    a, b = torch.rand(2, 20, generator=torch.Generator().manual_seed(0))
    assert torch.equal(dispersion_weight(a, b, kappa=1.0), dispersion_weight(b, a, kappa=1.0))


def test_weight_is_of_the_mean_of_two_means():
    """Not the mean of two weights, nor of the tokens of both responses pooled: H = (H_w + H_l) / 2 before the log."""
    weight = dispersion_weight(tensor(0.1), tensor(0.5), kappa=1.0).item()
    assert weight == pytest.approx(-math.log(0.3)) and weight != pytest.approx(-(math.log(0.1) + math.log(0.5)) / 2)


@pytest.mark.parametrize("entropy", [0.0, 1e-30, 1.0, 1.0 + 2**-7, 30.0])
def test_weight_at_the_ends(entropy):
    """
    A deterministic reference gives a finite weight and loss; a uniform one (which bf16 can put above 1), and entropies
    that somebody summed instead of averaging, a weight that is nearly 0 and never negative.
    """
    weight = dispersion_weight(tensor(entropy), tensor(entropy), kappa=2.0)
    expected = -2 * math.log(1e-4) if entropy < 0.5 else -2 * math.log1p(-1e-4)
    assert weight.item() == pytest.approx(expected, rel=1e-9) and weight.item() > 0
    for link in mallows.LINKS:
        assert mallows_dpo_loss(tensor(0.0), tensor(0.0), weight, beta=0.1, link=link).isfinite()


def test_weight_is_a_constant():
    """No gradient reaches the entropies, from the weight or through a loss, whatever made them."""
    entropies = torch.rand(2, 6, requires_grad=True)
    weight = dispersion_weight(*entropies, kappa=1.0)
    assert not weight.requires_grad
    live = torch.rand(6, requires_grad=True)
    margin = torch.randn(6, requires_grad=True)
    for link in mallows.LINKS:
        loss = mallows_dpo_loss(margin, margin.detach() * 0, live, beta=0.1, link=link).sum()
        assert torch.autograd.grad(loss, live, allow_unused=True) == (None,)


def test_constant_entropy_is_dpo():
    """
    One H for all pairs is DPO with beta' = -beta kappa log H, in value and gradient; kappa = -1 / log H is DPO itself,
    and so is phi = e^(-1/2).
    """
    m_w, m_l, _ = random_pairs()
    entropy = torch.full_like(m_w, 0.07)
    inputs = [m_w.clone().requires_grad_(), m_l.clone().requires_grad_()]
    losses = mallows_dpo_loss(*inputs, dispersion_weight(entropy, entropy, kappa=0.29), beta=0.3)
    plain = [m_w.clone().requires_grad_(), m_l.clone().requires_grad_()]
    dpo = -F.logsigmoid(-0.3 * 0.29 * math.log(0.07) * (plain[0] - plain[1]))
    torch.testing.assert_close(losses, dpo, rtol=1e-13, atol=1e-15)
    losses.sum().backward()
    dpo.sum().backward()
    for ours, theirs in zip(inputs, plain, strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-12, atol=1e-15)
    weight = dispersion_weight(entropy, entropy, kappa=-1 / math.log(0.07))
    dpo = -F.logsigmoid(0.3 * (m_w - m_l))
    torch.testing.assert_close(mallows_dpo_loss(m_w, m_l, weight, beta=0.3), dpo, rtol=1e-13, atol=0)
    torch.testing.assert_close(mallows_dpo_loss(m_w, m_l, 0 * m_w - 2 * math.log(math.exp(-0.5)), beta=0.3), dpo)


def test_uniform_reference():
    """
    At weight 0 the pair teaches nothing: loss log 2, gradient 0. A reference uniform on k of V symbols has H = log k /
    log V.
    """
    for link in ("sigmoid", "phi"):
        margin = tensor(3.0, -2.0).requires_grad_()
        loss = mallows_dpo_loss(margin, tensor(0.0, 0.0), tensor(0.0, 0.0), beta=0.5, link=link)
        assert loss.tolist() == pytest.approx([math.log(2)] * 2, abs=1e-5)
        loss.sum().backward()
        assert margin.grad.abs().max() < 1e-6
    entropy = tensor(math.log(8) / math.log(64))  # a half
    weight = dispersion_weight(entropy, entropy, kappa=0.6)
    loss = mallows_dpo_loss(tensor(2.0), tensor(0.0), weight, beta=0.5)
    assert loss.item() == pytest.approx(math.log1p(math.exp(-0.5 * 0.6 * math.log(2) * 2)), rel=1e-14)


# ---- The links ------------------------------------------------------------------------------------------------------


def marginals(n: int, phi, distance) -> list:
    """P(item i before item i + k) of a Mallows model over n items, for gaps k, by enumeration."""
    center, total, before = range(n), mp.mpf(0), [mp.mpf(0)] * n
    for order in itertools.permutations(center):
        place = [order.index(item) for item in center]
        mass = mp.mpf(phi) ** distance(place)
        total += mass
        for k in range(1, n):
            before[k] += mass * (place[0] < place[k])
    return [before[k] / total for k in range(1, n)]


def inversions(place) -> int:
    return sum(place[i] > place[j] for i, j in itertools.combinations(range(len(place)), 2))


def squared_displacement(place) -> int:
    return sum((i - p) ** 2 for i, p in enumerate(place))


@pytest.mark.parametrize("phi", [0.3, 0.6, 0.9])
def test_kendall_marginals(phi):
    """
    The link "phi" has the probabilities of Kendall's Mallows model at every gap, from all 120 orders of five items.
    """
    with mp.workdps(30):
        exact = [float(p) for p in marginals(5, phi, inversions)]
    assert kendall([1.0, 2.0, 3.0, 4.0], phi).tolist() == pytest.approx(exact, rel=1e-13)
    assert exact[0] == pytest.approx(1 / (1 + phi))
    assert kendall([-1.0, -2.0, -3.0, -4.0], phi).tolist() == pytest.approx([1 - p for p in exact], rel=1e-12)


@pytest.mark.parametrize("phi", [0.3, 0.6, 0.9])
def test_spearman_marginals(phi):
    """
    The link "sigmoid", 1 / (1 + phi^(2s)), is exact for two items and an approximation beyond: of five at phi = 0.6
    the first gap's probability is .769, the link's .735.
    """
    with mp.workdps(30):
        two = float(marginals(2, phi, squared_displacement)[0])
        five = float(marginals(5, phi, squared_displacement)[0])
    loss = mallows_dpo_loss(tensor(1.0), tensor(0.0), tensor(-2 * math.log(phi)), beta=1.0)
    assert loss.neg().exp().item() == pytest.approx(two, rel=1e-13)
    assert abs(five - two) > 5e-3
    if phi == 0.6:
        assert (round(five, 3), round(two, 3)) == (0.769, 0.735)
    tanh = 0.5 + 0.5 * math.tanh(-math.log(phi))
    assert two == pytest.approx(tanh, rel=1e-13)


def exact_kendall(s, phi):
    """The definition in the docstring of `mallows_dpo_loss`, with 60 digits and the removable point of h filled in."""
    s, phi = mp.mpf(s), mp.mpf(phi)

    def h(k):
        return -1 / mp.log(phi) if k == 0 else k / (1 - phi**k)

    v = (1 - mp.log(phi)) * s
    r = mp.sign(v) if abs(v) >= 1 else v * (15 - 10 * v**2 + 3 * v**4) / 8
    x = s + r / 2
    return h(x + mp.mpf("0.5")) - h(x - mp.mpf("0.5"))


GAPS = [0.0, 1e-9, 1e-3, 0.05, 0.11, 0.4, 0.5, 0.77, 1.0, 1.5, 3.0, 12.0, 80.0, 700.0]


@pytest.mark.parametrize("phi", PHIS)
def test_kendall_is_the_definition(phi):
    """Loss and gradient at gaps from 0 to 700 on either side, in float64 and in float32."""
    gaps = tensor(*GAPS, *(-gap for gap in GAPS[1:]))
    weight = torch.full_like(gaps, -2 * math.log(phi))
    with mp.workdps(60):
        phi = mp.exp(-mp.mpf(weight[0].item()) / 2)  # what the weight, a double, stands for
        loss = [float(-mp.log(exact_kendall(s, phi))) for s in gaps.tolist()]
        slope = [float(-mp.diff(exact_kendall, (s, phi), (1, 0)) / exact_kendall(s, phi)) for s in gaps.tolist()]
    for dtype, rtol in ((torch.float64, 1e-10), (torch.float32, 1e-5)):
        if dtype == torch.float32 and float(phi) < 1e-6:
            rtol = 1e-4  # 27.6 x 700 in the exponent
        margin = gaps.clone().to(dtype).detach().requires_grad_()
        losses = mallows_dpo_loss(margin, torch.zeros_like(margin), weight.to(dtype), beta=1.0, link="phi")
        assert losses.dtype == dtype
        torch.testing.assert_close(losses.double(), tensor(*loss), rtol=rtol, atol=1e-37)
        losses.sum().backward()
        torch.testing.assert_close(margin.grad.double(), tensor(*slope), rtol=rtol, atol=1e-37)


def test_kendall_is_the_papers_outside_the_smoothing():
    """
    (1 - sgn s)/2 + sgn s [(|s|+1)/(1-phi^(|s|+1)) - |s|/(1-phi^|s|)] for |s| >= 1/(1 - log phi): not at whole gaps
    alone.
    """
    for phi in (0.05, 0.5, 0.9):
        start = 1 / (1 - math.log(phi))
        assert start < 1
        for s in (start * 1.000001, 0.5 * (1 + start), 1.0, 1.3, 2.718):
            paper = (s + 1) / (1 - phi ** (s + 1)) - s / (1 - phi**s)
            assert kendall([s, -s], phi).tolist() == pytest.approx([paper, 1 - paper], rel=1e-11)


def test_kendall_at_zero():
    """
    The paper's formula tends to 1/(1-phi) + 1/log phi from above, .5573 at phi = .5, and to 1 minus it from below; the
    link is 1/2 there, with a loss of log 2 and the slope (1 + 15/16 (1 - log phi)) (2 h'(1/2) - 1).
    """
    assert 1 / (1 - 0.5) + 1 / math.log(0.5) == pytest.approx(0.5573, abs=5e-5)
    for phi in PHIS:
        assert kendall(0.0, phi).item() == pytest.approx(0.5, rel=1e-12)
    s, root = tensor(0.0).requires_grad_(), math.sqrt(0.5)
    loss = mallows_dpo_loss(s, tensor(0.0), tensor(-2 * math.log(0.5)), beta=1.0, link="phi")
    loss.backward()
    derivative = 1 / (1 - root) + 0.5 * root * math.log(0.5) / (1 - root) ** 2  # of k / (1 - phi^k) at 1/2
    slope = (1 + 15 / 16 * (1 + math.log(2))) * (2 * derivative - 1)
    assert loss.item() == pytest.approx(math.log(2)) and s.grad.item() == pytest.approx(-2 * slope, rel=1e-9)


@pytest.mark.parametrize("phi", PHIS)
def test_kendall_is_symmetric_and_increasing(phi):
    s = torch.linspace(-6, 6, 4801, dtype=torch.float64)
    g = kendall(s, phi)
    torch.testing.assert_close(g + g.flip(0), torch.ones_like(g), rtol=0, atol=1e-9)
    assert (g.diff() >= 0).all() and (kendall(s[2300:2501], phi).diff() > 0).all()


def test_kendall_limits():
    """phi -> 0 is the step from 0 to 1 at every gap but 0, phi -> 1 one half; in between it grows with consensus."""
    s = tensor(0.01, 0.2, 1.0, 5.0)
    assert (kendall(s, 1e-300) > 1 - 2e-3).all() and (kendall(-s, 1e-300) < 2e-3).all()
    torch.testing.assert_close(kendall(s, 1 - 1e-7), torch.full_like(s, 0.5), rtol=0, atol=1e-5)
    rows = torch.stack([kendall(s, phi) for phi in sorted(PHIS, reverse=True)])
    assert (rows.diff(dim=0) > -1e-15).all() and (rows[1:4].diff(dim=0) > 0).all()


@pytest.mark.parametrize("phi", [0.02, 0.6])
def test_kendall_is_twice_differentiable(phi):
    """Value, slope and curvature meet where the smoothing ends, and at 0, where the two halves of the code meet."""
    for at in (0.0, 1 / (1 - math.log(phi))):
        sides = []
        for s in (at - 1e-9, at + 1e-9):
            s = tensor(s).requires_grad_()
            loss = mallows_dpo_loss(s, tensor(0.0), tensor(-2 * math.log(phi)), beta=1.0, link="phi")
            (slope,) = torch.autograd.grad(loss, s, create_graph=True)
            (curvature,) = torch.autograd.grad(slope, s)
            sides.append([loss.item(), slope.item(), curvature.item()])
        assert sides[0] == pytest.approx(sides[1], rel=1e-5, abs=1e-6)


@every_link
def test_gradcheck(link):
    m_w, m_l, weight = (x[:12] for x in random_pairs())
    inputs = [m_w.requires_grad_(), m_l.requires_grad_()]
    assert torch.autograd.gradcheck(lambda a, b: mallows_dpo_loss(a, b, weight, beta=0.4, link=link), inputs)


def test_ipo():
    """
    Optimum at w (m_w - m_l) = 1 / (2 beta); weight 1 is IPO; the released RainbowPO code's form is beta^2 times it.
    """
    m_w, m_l, weight = random_pairs()
    losses = mallows_dpo_loss(m_w, m_l, weight, beta=0.2, link="ipo")
    released = (0.2 * weight * (m_w - m_l) - 0.5) ** 2
    torch.testing.assert_close(0.2**2 * losses, released, rtol=1e-11, atol=1e-14)
    ones = torch.ones_like(weight)
    torch.testing.assert_close(mallows_dpo_loss(m_w, m_l, ones, beta=0.2, link="ipo"), (m_w - m_l - 2.5) ** 2)
    best = (2.5 / weight).requires_grad_()
    loss = mallows_dpo_loss(best, torch.zeros_like(weight), weight, beta=0.2, link="ipo")
    loss.sum().backward()
    assert loss.max() < 1e-24 and best.grad.abs().max() < 1e-11


def test_weight_multiplies_the_argument_and_not_the_loss():
    m_w, m_l, weight = random_pairs()
    dpo = -F.logsigmoid(0.3 * (m_w - m_l))
    losses = mallows_dpo_loss(m_w, m_l, weight, beta=0.3)
    torch.testing.assert_close(losses, -F.logsigmoid(0.3 * weight * (m_w - m_l)), rtol=1e-13, atol=0)
    assert ((losses - weight * dpo).abs() > 1e-3).float().mean() > 0.9


@pytest.mark.parametrize("link", ["sigmoid", "phi"])
def test_swapping_the_sides_flips_the_argument(link):
    m_w, m_l, weight = random_pairs()
    first, second = (mallows_dpo_loss(*m, weight, beta=0.3, link=link) for m in ((m_w, m_l), (m_l, m_w)))
    torch.testing.assert_close((-first).exp() + (-second).exp(), torch.ones_like(first), rtol=1e-11, atol=0)


# ---- Edges ----------------------------------------------------------------------------------------------------------


@every_link
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_finite_for_finite_inputs(link, dtype):
    """Any corner of the dtype gives finite losses and gradients, in fp32 at least."""
    largest, tiny = torch.finfo(dtype).max, torch.finfo(dtype).tiny
    values = (-largest, -3.0, -tiny, 0.0, tiny, 3.0, largest)
    corners = torch.tensor(list(itertools.product(values, values, (0.0, tiny, 1.0, largest))), dtype=dtype)
    m_w, m_l, weight = (x.clone() for x in corners.T)
    for beta in (1e-3, 3.0):
        inputs = [m_w.clone(), m_l.clone()]
        if dtype == torch.float16:  # the gradient itself, w beta, is beyond its largest number
            inputs = [x.float() for x in inputs]
        inputs = [x.requires_grad_() for x in inputs]
        losses = mallows_dpo_loss(*inputs, weight, beta=beta, link=link)
        assert losses.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert losses.isfinite().all() and (losses >= 0).all()
        losses.sum().backward()
        assert all(x.grad.isfinite().all() for x in inputs)


@every_link
def test_a_lost_pair_keeps_its_gradient(link):
    """
    Where the sigmoid is 0 in fp32 the losses grow linearly, at w beta (and half that for Kendall's, where w = -2 log
    phi), and the square at its own.
    """
    inputs = [torch.tensor([value], requires_grad=True) for value in (-1e4, 1e4)]
    mallows_dpo_loss(*inputs, torch.tensor([1.5]), beta=0.1, link=link).backward()
    expected = {"sigmoid": 0.15, "phi": 0.075, "ipo": 2 * 1.5 * (1.5 * 2e4 + 5)}[link]
    assert inputs[1].grad.item() == pytest.approx(expected, rel=1e-3) and inputs[0].grad == -inputs[1].grad


@pytest.mark.parametrize(
    "change, message",
    [
        ({"beta": 0.0}, "beta must be a finite number greater than 0, got 0.0"),
        ({"beta": math.nan}, "beta must be"),
        ({"link": "theta"}, "link must be one of 'sigmoid', 'ipo', 'phi', got 'theta'"),
    ],
)
def test_bad_parameters(change, message):
    with pytest.raises(ValueError, match=message):
        mallows_dpo_loss(*random_pairs(), **{"beta": 0.1, **change})


@pytest.mark.parametrize("kappa", [0, -0.29, math.inf, "auto", True])
def test_bad_kappa(kappa):
    with pytest.raises(ValueError, match=f"kappa must be a finite number greater than 0, got {kappa!r}"):
        dispersion_weight(tensor(0.1), tensor(0.1), kappa=kappa)


def test_bad_inputs():
    m_w, m_l, weight = random_pairs()
    with pytest.raises(ValueError, match=r"same shape, got .*weight \(49,\)"):
        mallows_dpo_loss(m_w, m_l, weight[1:], beta=0.1)
    with pytest.raises(ValueError, match="weight must be a floating-point tensor, got torch.int64"):
        mallows_dpo_loss(m_w, m_l, weight.long(), beta=0.1)
    with pytest.raises(ValueError, match=r"same shape, got chosen_entropy \(2,\), rejected_entropy \(1,\)"):
        dispersion_weight(tensor(0.1, 0.2), tensor(0.1), kappa=1.0)


@pytest.mark.parametrize("function", [dispersion_weight, mallows_dpo_loss])
def test_docstring(function):
    text = function.__doc__.replace("```python", "").replace("```", "")
    example = doctest.DocTestParser().get_doctest(text, vars(mallows).copy(), function.__name__, None, 0)
    assert example.examples and doctest.DocTestRunner(verbose=False).run(example).failed == 0
