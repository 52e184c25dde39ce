"""
The f-DPO loss against the definition in the paper (arXiv 2309.16240).

The reference values come from `ORACLES`: each divergence's generator f and its derivative f', written down as in a
textbook and evaluated with hundreds of digits. Nothing there is arranged for numerical stability.
"""

import copy
import doctest
import inspect
import itertools
import math
import pickle

import mpmath as mp
import pytest
import torch
import torch.nn.functional as F

from trl_ext.losses import DIVERGENCES, Divergence, TangentTail, f_divergence, f_dpo_loss, get_divergence


def alpha_oracle(a):
    a = mp.mpf(a)
    return (lambda u: (u ** (1 - a) - (1 - a) * u - a) / (a * (a - 1)), lambda u: (1 - u**-a) / a)


def skew_oracle(s):
    s = mp.mpf(s)
    return (
        lambda u: s * u * mp.log(u) - (s * u + 1 - s) * mp.log(s * u + 1 - s),
        lambda u: s * mp.log(u / (s * u + 1 - s)),
    )


def chi_po_oracle(c):
    return (lambda u: (u - 1) ** 2 / 2 + c * (u * mp.log(u) - u + 1), lambda u: u - 1 + c * mp.log(u))


# (name, parameters) -> generator f and derivative f', both with f'(1) = 0
ORACLES = {
    ("reverse_kl", ()): (lambda u: u * mp.log(u) - u + 1, mp.log),
    ("forward_kl", ()): (lambda u: -mp.log(u) + u - 1, lambda u: 1 - 1 / u),
    ("js", ()): (
        lambda u: u * mp.log(u) - (u + 1) * mp.log((u + 1) / 2),
        lambda u: mp.log(2 * u / (1 + u)),
    ),
    ("alpha", (("alpha", 0.3),)): alpha_oracle(0.3),
    ("alpha", (("alpha", 0.5),)): alpha_oracle(0.5),
    ("alpha", (("alpha", 1e-3),)): alpha_oracle(1e-3),
    ("alpha", (("alpha", 1.7),)): alpha_oracle(1.7),
    ("hellinger", ()): (lambda u: (mp.sqrt(u) - 1) ** 2, lambda u: 1 - 1 / mp.sqrt(u)),
    ("jeffreys", ()): (lambda u: (u - 1) * mp.log(u), lambda u: mp.log(u) + 1 - 1 / u),
    ("neyman", ()): (lambda u: (1 - u) ** 2 / u, lambda u: 1 - 1 / u**2),
    ("skew_js", (("skew", 0.5),)): skew_oracle(0.5),
    ("skew_js", (("skew", 0.02),)): skew_oracle(0.02),
    ("skew_js", (("skew", 0.97),)): skew_oracle(0.97),
    ("chi_po", (("gamma", 1.0),)): chi_po_oracle(1.0),
    ("chi_po", (("gamma", 0.1),)): chi_po_oracle(0.1),
}
CASES = [pytest.param(*key, id="-".join([key[0], *(str(v) for _, v in key[1])])) for key in ORACLES]
every_divergence = pytest.mark.parametrize(("name", "params"), CASES)

GENERIC = [-7.3, -2.1, -0.4, -1e-3, 1e-4, 0.25, 1.9, 6.2]
TAILS = [-250.0, -90.0, -88.8, -44.0, 0.0, 44.0, 90.0]
GRID = [-1e4, -250.0, -90.0, -88.8, -44.0, 0.0, 44.0, 90.0, 1e4]
FLOAT32_MAX = torch.finfo(torch.float32).max


def build(name, params):
    return get_divergence(name, **dict(params))


def loss_and_grads(chosen, rejected, divergence, beta=0.1, dtype=torch.float32):
    chosen = torch.tensor(chosen, dtype=dtype, requires_grad=True)
    rejected = torch.tensor(rejected, dtype=dtype, requires_grad=True)
    loss = f_dpo_loss(chosen, rejected, beta=beta, divergence=divergence)
    loss.sum().backward()
    return loss.detach(), chosen.grad, rejected.grad


def oracle_loss_and_grads(derivative, chosen, rejected, beta=0.1):
    """The definition, with the derivative of f' taken numerically at 300 digits."""
    chosen, rejected, beta = mp.mpf(chosen), mp.mpf(rejected), mp.mpf(beta)

    def weight(logratio):  # d f'(e^l) / dl
        step = mp.mpf(10) ** -140
        return (derivative(mp.exp(logratio + step)) - derivative(mp.exp(logratio - step))) / (2 * step)

    z = beta * (derivative(mp.exp(chosen)) - derivative(mp.exp(rejected)))
    loss = mp.log1p(mp.exp(-z)) if z > -1e5 else -z
    sigmoid = 1 / (1 + mp.exp(z)) if z < 1e5 else mp.mpf(0)  # e^{1e5} is far beyond every exponent compared below
    return loss, -beta * sigmoid * weight(chosen), beta * sigmoid * weight(rejected)


def assert_matches(actual, expected, rtol, smallest, largest):
    """Equal to the exact value where it is representable, saturated (finite, same sign) where it is not."""
    assert math.isfinite(actual)
    if abs(expected) > largest:
        assert actual == math.copysign(largest, expected)
    elif abs(expected) < smallest:
        assert abs(actual) <= 2 * smallest
    else:
        assert abs(mp.mpf(actual) - expected) <= rtol * abs(expected)


# --- The divergence itself ------------------------------------------------------------------------------------------


@every_divergence
def test_score_is_the_derivative_of_the_generator(name, params):
    """The oracle's f' is checked against its f first, so that the two textbook formulas vouch for each other."""
    generator, derivative = ORACLES[name, params]
    divergence = build(name, params)
    with mp.workdps(60):
        for logratio in GENERIC:
            u = mp.exp(mp.mpf(logratio))
            exact = derivative(u)
            assert mp.almosteq(mp.diff(generator, u), exact, rel_eps=mp.mpf(10) ** -20)
            logratio = torch.tensor(logratio, dtype=torch.float64)
            assert divergence.score(logratio).item() == pytest.approx(float(exact), rel=1e-12)
            assert divergence.score(logratio.float()).item() == pytest.approx(
                float(derivative(mp.exp(mp.mpf(logratio.float().item())))), rel=1e-6
            )
            u64 = logratio.exp()
            assert divergence.f(u64).item() == pytest.approx(float(generator(mp.mpf(u64.item()))), rel=1e-7, abs=1e-15)


@every_divergence
def test_normalization_and_curvature(name, params):
    generator, derivative = ORACLES[name, params]
    divergence = build(name, params)
    assert divergence.f(torch.ones(())).item() == pytest.approx(0, abs=1e-12)
    assert divergence.score(torch.zeros(())).item() == 0
    with mp.workdps(60):
        curvature = float(mp.diff(generator, 1, 2))
    assert divergence.curvature == pytest.approx(curvature, rel=1e-12)
    assert divergence.log_weight(torch.zeros(())).exp().item() == pytest.approx(curvature, rel=1e-6)


@every_divergence
def test_weight_is_the_positive_derivative_of_the_score(name, params):
    divergence = build(name, params)
    logratio = torch.linspace(-40, 40, 161, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(divergence.score(logratio).sum(), logratio)
    # Autograd differentiates expm1 as expm1 + 1, which rounds at 1e-16; log_weight does not.
    torch.testing.assert_close(divergence.log_weight(logratio).exp(), slope, rtol=1e-11, atol=1e-15)
    assert divergence.log_weight(logratio).isfinite().all()
    # The generator's derivative is the score: f'(u) by autograd.
    u = torch.linspace(-4, 4, 41, dtype=torch.float64).exp().requires_grad_()
    (derivative,) = torch.autograd.grad(divergence.f(u).sum(), u)
    torch.testing.assert_close(derivative, divergence.score(u.detach().log()), rtol=1e-9, atol=1e-12)


@every_divergence
def test_inverse_score(name, params):
    divergence = build(name, params)
    logratio = torch.linspace(-8, 8, 65, dtype=torch.float64)
    torch.testing.assert_close(divergence.inverse_score(divergence.score(logratio)), logratio.exp(), rtol=1e-9, atol=0)


def test_inverse_score_beyond_a_bounded_score():
    """Forward KL's score stays below 1 and JS's below log 2: above, the ratio is infinite, not negative."""
    assert get_divergence("forward_kl").inverse_score(torch.tensor([1.0, 2.0])).tolist() == [math.inf] * 2
    assert get_divergence("js").inverse_score(torch.tensor([0.7])).item() == math.inf
    # The numerical inverse, which Jeffreys and chi-PO use, has the same convention, and keeps NaN.
    values = Divergence.inverse_score(get_divergence("forward_kl"), torch.tensor([0.5, 1.5, math.nan]))
    assert values[:2].tolist() == pytest.approx([2.0, math.inf]) and values[2].isnan()


def test_weights_and_inverses_by_hand():
    """
    At a ratio of 4: JS 1/(1+4); alpha=.5 4^-.5; Hellinger 4^-.5/2; Jeffreys 1 + 1/4; chi-PO 4 + 1; Neyman 2/16.
    Chi-PO's inverse is c W(exp((v+1)/c) / c): W(e) = 1 gives u = 1 at v = 0 and c = 1.
    """
    logratio = torch.tensor(4.0).log()
    weights = {
        name: get_divergence(name).log_weight(logratio).exp().item()
        for name in ("reverse_kl", "forward_kl", "js", "alpha", "hellinger", "jeffreys", "chi_po", "neyman")
    }
    assert weights == pytest.approx(
        dict(reverse_kl=1, forward_kl=0.25, js=0.2, alpha=0.5, hellinger=0.25, jeffreys=1.25, chi_po=5, neyman=0.125)
    )
    assert get_divergence("chi_po").inverse_score(torch.tensor(0.0)).item() == pytest.approx(1)
    for v, c in itertools.product([-3.0, 0.5, 4.0], [0.1, 2.0]):
        expected = float((c * mp.lambertw(mp.exp((v + 1) / c) / c)).real)
        actual = get_divergence("chi_po", gamma=c).inverse_score(torch.tensor(v, dtype=torch.float64)).item()
        assert actual == pytest.approx(expected, rel=1e-12)


def test_generator_at_zero_ratio():
    """f(0) is finite for reverse KL (1), JS (log 2) and alpha < 1 (1 / (1 - alpha)), infinite from forward KL on."""
    zero = torch.zeros(())
    assert get_divergence("reverse_kl").f(zero).item() == pytest.approx(1)
    assert get_divergence("js").f(zero).item() == pytest.approx(math.log(2))
    assert get_divergence("hellinger").f(zero).item() == pytest.approx(1)
    assert get_divergence("alpha", alpha=0.25).f(zero).item() == pytest.approx(4 / 3)
    assert get_divergence("alpha", alpha=0.75).f(zero).item() == pytest.approx(4)
    assert get_divergence("forward_kl").f(zero).item() == math.inf
    assert get_divergence("neyman").f(zero).item() == math.inf


def test_divergence_between_distributions_is_the_textbook_one():
    torch.manual_seed(0)
    p, q = torch.randn(2, 7, dtype=torch.float64).softmax(-1)
    m = (p + q) / 2

    def kl(a, b):
        return (a * (a / b).log()).sum()

    def measured(name, first=p, second=q, **params):
        return (second * get_divergence(name, **params).f(first / second)).sum().item()

    s, mixture = 0.2, 0.2 * p + 0.8 * q
    assert measured("reverse_kl") == pytest.approx(kl(p, q).item(), rel=1e-12)
    assert measured("forward_kl") == pytest.approx(kl(q, p).item(), rel=1e-12)
    assert measured("jeffreys") == pytest.approx((kl(p, q) + kl(q, p)).item(), rel=1e-12)
    assert measured("js") == pytest.approx((kl(p, m) + kl(q, m)).item(), rel=1e-12)  # twice the textbook's JS
    assert measured("skew_js", skew=s) == pytest.approx((s * kl(p, mixture) + (1 - s) * kl(q, mixture)).item())
    assert measured("hellinger") == pytest.approx(((p.sqrt() - q.sqrt()) ** 2).sum().item(), rel=1e-12)
    assert measured("neyman") == pytest.approx(((p - q) ** 2 / p).sum().item(), rel=1e-12)
    chi2 = ((p - q) ** 2 / q).sum()
    assert measured("chi_po", gamma=0.3) == pytest.approx((chi2 / 2 + 0.3 * kl(p, q)).item(), rel=1e-12)
    # Duality: D_alpha(p || q) = D_{1 - alpha}(q || p)
    for alpha in (0.2, 0.5, 0.9):
        assert measured("alpha", alpha=alpha) == pytest.approx(measured("alpha", q, p, alpha=1 - alpha), rel=1e-12)


def test_alpha_convention_and_limits():
    """Paper: alpha -> 0 is reverse KL and alpha -> 1 forward KL. TRL's alpha is 1 minus it."""
    logratio = torch.linspace(-6, 6, 49, dtype=torch.float64)
    u = logratio.exp()
    for alpha, limit in [(1e-8, "reverse_kl"), (5e-324, "reverse_kl"), (1 - 1e-8, "forward_kl"), (1, "forward_kl")]:
        divergence, limit = get_divergence("alpha", alpha=alpha), get_divergence(limit)
        torch.testing.assert_close(divergence.score(logratio), limit.score(logratio), rtol=1e-6, atol=0)
        torch.testing.assert_close(divergence.f(u), limit.f(u), rtol=1e-6, atol=1e-12)
        for chosen, rejected in [(0.7, -1.3), (-2.0, 2.0), (3.0, 2.9)]:
            torch.testing.assert_close(
                loss_and_grads([chosen], [rejected], divergence, dtype=torch.float64),
                loss_and_grads([chosen], [rejected], limit, dtype=torch.float64),
                rtol=1e-6,
                atol=0,
            )
    for trl_alpha in (0.3, 0.5, 0.7, 0.0, -1.0):
        # TRL 1.16: f'(t) = (t^(alpha - 1) - 1) / (alpha - 1)
        expected = (u ** (trl_alpha - 1) - 1) / (trl_alpha - 1)
        torch.testing.assert_close(get_divergence("alpha", trl_alpha=trl_alpha).score(logratio), expected)
    torch.testing.assert_close(get_divergence("alpha", trl_alpha=1).score(logratio), logratio)
    assert get_divergence("alpha", trl_alpha=0.25).alpha == 0.75


def test_skew_limits():
    """skew JS / s -> reverse KL as s -> 0, and skew JS / (1 - s) -> forward KL as s -> 1."""
    logratio = torch.linspace(-5, 5, 41, dtype=torch.float64)
    for skew, scale, limit in [(1e-9, 1e-9, "reverse_kl"), (1 - 2.0**-30, 2.0**-30, "forward_kl")]:
        scaled = get_divergence("skew_js", skew=skew).score(logratio) / scale
        torch.testing.assert_close(scaled, get_divergence(limit).score(logratio), rtol=1e-6, atol=1e-6)


def test_exponentiating_divergences():
    """Those whose weight leaves float16, which the configuration refuses to train in it."""
    assert {name for name in DIVERGENCES if not get_divergence(name).exponentiates} == {"reverse_kl", "js", "skew_js"}
    assert all(get_divergence(name).admissible for name in DIVERGENCES)


@every_divergence
def test_scores_stay_finite_so_that_means_can_be_logged(name, params):
    score = build(name, params).score(torch.tensor(GRID * 50))
    assert score.dtype == torch.float32 and score.isfinite().all() and score.mean().isfinite()
    assert (score[: len(GRID)].diff() >= 0).all()


@every_divergence
def test_result_dtypes(name, params):
    divergence = build(name, params)
    for dtype, expected in [
        (torch.float16, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ]:
        value = torch.tensor([0.5, 0.25], dtype=dtype, requires_grad=True)
        for method in ("f", "score", "log_weight", "inverse_score"):
            assert getattr(divergence, method)(value).dtype == expected
        loss = f_dpo_loss(value, value.detach() - 1, beta=0.1, divergence=divergence)
        assert loss.dtype == expected and loss.shape == (2,)
        loss.sum().backward()
        assert value.grad.dtype == dtype


# --- The pair loss --------------------------------------------------------------------------------------------------


@every_divergence
@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float32, 1e-5), (torch.float64, 1e-9)])
def test_loss_and_gradients_equal_the_definition(name, params, dtype, rtol):
    """Generic points of either sign, nearly equal log-ratios, and both tails, where e^250 leaves float32."""
    _, derivative = ORACLES[name, params]
    divergence = build(name, params)
    pairs = list(itertools.product(GENERIC, GENERIC[::2]))
    pairs += itertools.product(TAILS, TAILS)
    pairs += [(3.0, 3.0 + 2**-12), (-60.0, -60.0 + 2**-10), (120.0, 121.0), (121.0, 120.0), (-90.0, -91.0)]
    pairs = torch.tensor(pairs, dtype=dtype)
    actual = torch.stack(loss_and_grads(*pairs.T.tolist(), divergence, dtype=dtype), dim=-1)
    info = torch.finfo(dtype)
    with mp.workdps(300):
        for (chosen, rejected), values in zip(pairs.tolist(), actual.tolist(), strict=True):
            exact = oracle_loss_and_grads(derivative, chosen, rejected)
            for value, expected in zip(values, exact, strict=True):
                assert_matches(value, expected, rtol, smallest=info.tiny, largest=info.max)


@every_divergence
@pytest.mark.parametrize("wrap", [lambda divergence: divergence, TangentTail], ids=["exact", "tangent"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_stability_grid(name, params, wrap, dtype):
    """Every combination of extreme log-ratios: finite value and gradients, of the right sign, none lost to a clamp."""
    divergence = wrap(build(name, params))
    chosen, rejected = torch.tensor(list(itertools.product(GRID, GRID))).T.tolist()
    loss, grad_chosen, grad_rejected = loss_and_grads(chosen, rejected, divergence, dtype=dtype)
    for value in (loss, grad_chosen, grad_rejected):
        assert value.isfinite().all()
    assert (loss >= 0).all() and (grad_chosen <= 0).all() and (grad_rejected >= 0).all()
    # A wrongly ordered pair pulls its chosen side by at least beta sigma(0) h(l_w), as far as that is representable.
    l_w, l_l = torch.tensor(chosen, dtype=torch.float64), torch.tensor(rejected, dtype=torch.float64)
    visible = (l_w <= l_l) & (divergence.log_weight(l_w) > -60)
    assert (grad_chosen[visible] < 0).all()
    assert (loss[l_w < l_l] > math.log(2) * 0.99).all() and (loss[l_w > l_l] < math.log(2) * 1.01).all()


@every_divergence
def test_finite_for_the_largest_representable_inputs(name, params):
    for dtype in (torch.float32, torch.float64):
        largest = torch.finfo(dtype).max
        values = [-largest, -1.0, 0.0, largest]
        chosen, rejected = zip(*itertools.product(values, values), strict=True)
        for result in loss_and_grads(chosen, rejected, build(name, params), dtype=dtype):
            assert result.isfinite().all()


def trl_loss(chosen, rejected, score, beta=0.1):
    return -F.logsigmoid(beta * (score(chosen) - score(rejected)))


def test_reverse_kl_is_dpo():
    torch.manual_seed(0)
    chosen, rejected = 30 * torch.randn(2, 200)
    inputs = chosen.requires_grad_(), rejected.requires_grad_()
    expected = trl_loss(*inputs, score=lambda logratio: logratio)
    actual = f_dpo_loss(*inputs, beta=0.1, divergence="reverse_kl")
    torch.testing.assert_close(actual, expected, rtol=2e-6, atol=0)
    torch.testing.assert_close(
        torch.autograd.grad(actual.sum(), inputs), torch.autograd.grad(expected.sum(), inputs), rtol=5e-6, atol=0
    )


@pytest.mark.parametrize(
    ("name", "score"),
    [
        ("forward_kl", lambda logratio: 1 - torch.exp(-logratio)),
        ("js", lambda logratio: math.log(2) + F.logsigmoid(logratio)),
        ("alpha", lambda logratio: (torch.exp(torch.clamp(-0.5 * logratio, max=80.0)) - 1) / -0.5),
    ],
)
def test_equals_trl_where_its_formula_holds(name, score):
    torch.manual_seed(0)
    inputs = [x.requires_grad_() for x in 3 * torch.randn(2, 100, dtype=torch.float64)]
    expected, actual = trl_loss(*inputs, score), f_dpo_loss(*inputs, beta=0.1, divergence=name)
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(*(torch.autograd.grad(loss.sum(), inputs) for loss in (actual, expected)))


def test_forward_kl_where_the_plain_formula_fails():
    """
    The formula of TRL 1.16 in float32, -logsigmoid(beta (e^{-l_l} - e^{-l_w})), at three pairs:

    - (0, -90): z = .1 (e^90 - 1) = 1.2e38, so the loss and both gradients are 0. The formula returns a loss of 0 that
      hides a NaN gradient.
    - (-90, 0): the loss is -z = 1.2e38, and so is the pull on the chosen side. The formula returns infinities.
    - (-90, -91): e^91 - e^90 is not representable in float32 but positive: a loss of 0. The formula returns NaN.
    """
    pairs = [(0.0, -90.0), (-90.0, 0.0), (-90.0, -91.0)]
    chosen, rejected = (torch.tensor(x, requires_grad=True) for x in zip(*pairs, strict=True))
    naive = trl_loss(chosen, rejected, lambda logratio: 1 - torch.exp(-logratio))
    naive_chosen, naive_rejected = torch.autograd.grad(naive.sum(), (chosen, rejected))
    assert naive[0] == 0 and naive_rejected[0].isnan()
    assert naive[1].isinf() and naive_chosen[1].isinf()
    assert naive[2].isnan()

    loss, grad_chosen, grad_rejected = loss_and_grads(*zip(*pairs, strict=True), "forward_kl")
    huge = 0.1 * math.exp(90)
    assert loss.tolist() == pytest.approx([0, huge, 0], rel=1e-5)
    assert grad_chosen.tolist() == pytest.approx([0, -huge, 0], rel=1e-5)
    assert grad_rejected.tolist() == pytest.approx([0, 0.1, 0], rel=1e-5)


def test_gradient_that_a_clamp_would_lose():
    """TRL clamps alpha's exponent at 80, so from l = -160 on (alpha 0.5) the chosen side gets no gradient at all."""
    chosen = torch.tensor([-170.0], requires_grad=True)
    score = lambda logratio: (torch.exp(torch.clamp(-0.5 * logratio, max=80.0)) - 1) / -0.5  # noqa: E731
    (clamped,) = torch.autograd.grad(trl_loss(chosen, torch.zeros(1), score).sum(), chosen)
    assert clamped.item() == 0
    _, exact, _ = loss_and_grads([-170.0], [0.0], get_divergence("alpha", alpha=0.5))
    assert exact.item() == pytest.approx(-0.1 * math.exp(85), rel=1e-5)


def test_js_keeps_its_limits_in_the_tails():
    """
    Where the chosen side is extremely unlikely JS is linear, like reverse KL: from -1e3 to -1e4 the loss grows by
    .1 * 9e3, with both gradients at their limits, beta h(l) = .1 and .1 sigma(0) = .05. Where both sides are very
    likely its score is flat, and the margin is e^{-300} (e - 1), not the 0 of a difference of two scores.
    """
    loss, grad_chosen, grad_rejected = loss_and_grads([-1e3, -1e4], [0.0, 0.0], "js")
    assert (loss[1] - loss[0]).item() == pytest.approx(900, rel=1e-6)
    assert grad_chosen.tolist() == pytest.approx([-0.1, -0.1])
    assert grad_rejected.tolist() == pytest.approx([0.05, 0.05])
    margin = get_divergence("js").log_margin(
        torch.tensor(300.0, dtype=torch.float64), torch.tensor(299.0, dtype=torch.float64)
    )
    assert margin.item() == pytest.approx(-300 + math.log(math.e - 1), abs=1e-12)


@every_divergence
def test_gradcheck(name, params):
    torch.manual_seed(0)
    chosen, rejected = (1.5 * torch.randn(2, 3, dtype=torch.float64)).requires_grad_()
    divergence = build(name, params)
    for target in (divergence, TangentTail(divergence, max_log_weight=math.log(divergence.curvature) + 0.5)):
        torch.autograd.gradcheck(
            lambda l_w, l_l, target=target: f_dpo_loss(l_w, l_l, beta=0.3, divergence=target),
            (chosen, rejected),
            eps=1e-5,
            atol=1e-9,
            rtol=1e-6,
        )


@every_divergence
def test_gradient_identities(name, params):
    """dL/dl_w : dL/dl_l = -h(l_w) : h(l_l). At pi = pi_ref: L = log 2 and gradients -/+ beta f''(1) / 2."""
    divergence = build(name, params)
    torch.manual_seed(0)
    chosen, rejected = 2 * torch.randn(2, 20, dtype=torch.float64)
    _, grad_chosen, grad_rejected = loss_and_grads(chosen.tolist(), rejected.tolist(), divergence, dtype=torch.float64)
    ratio = (divergence.log_weight(chosen) - divergence.log_weight(rejected)).exp()
    torch.testing.assert_close(grad_chosen / grad_rejected, -ratio)

    loss, grad_chosen, grad_rejected = loss_and_grads([0.0], [0.0], divergence, beta=0.3)
    assert loss.item() == pytest.approx(math.log(2))
    assert -grad_chosen.item() == pytest.approx(0.15 * divergence.curvature)
    assert grad_rejected.item() == pytest.approx(0.15 * divergence.curvature)
    loss, _, _ = loss_and_grads(GRID, GRID, divergence)
    assert loss.tolist() == pytest.approx([math.log(2)] * len(GRID))


@every_divergence
def test_swapping_the_pair_and_ordering(name, params):
    """Swapping gives L' = L + z, and L < log 2 exactly where the chosen log-ratio is the larger one."""
    divergence = build(name, params)
    torch.manual_seed(0)
    chosen, rejected = 2 * torch.randn(2, 20, dtype=torch.float64)
    loss = f_dpo_loss(chosen, rejected, beta=0.2, divergence=divergence)
    swapped = f_dpo_loss(rejected, chosen, beta=0.2, divergence=divergence)
    z = 0.2 * (divergence.score(chosen) - divergence.score(rejected))
    torch.testing.assert_close(swapped - loss, z, rtol=1e-9, atol=1e-12)
    assert torch.equal(loss < math.log(2), chosen > rejected)
    permutation = torch.randperm(20)
    assert torch.equal(
        f_dpo_loss(chosen[permutation], rejected[permutation], beta=0.2, divergence=divergence), loss[permutation]
    )


def test_scale_identities():
    """Hellinger is half of alpha 0.5, skew JS at 0.5 half of JS, Neyman twice alpha 2."""
    torch.manual_seed(0)
    inputs = 4 * torch.randn(2, 30, dtype=torch.float64)

    def loss(beta, divergence, **params):
        return f_dpo_loss(*inputs, beta=beta, divergence=get_divergence(divergence, **params))

    torch.testing.assert_close(loss(0.2, "hellinger"), loss(0.1, "alpha", alpha=0.5), rtol=1e-12, atol=0)
    torch.testing.assert_close(loss(0.2, "skew_js", skew=0.5), loss(0.1, "js"), rtol=1e-12, atol=0)
    torch.testing.assert_close(loss(0.1, "neyman"), loss(0.2, "alpha", alpha=2), rtol=1e-12, atol=0)


def test_changing_the_divergence_changes_the_loss():
    losses = [
        f_dpo_loss(torch.tensor([1.0]), torch.tensor([-0.5]), beta=1.0, divergence=name).item() for name in DIVERGENCES
    ]
    assert len({round(loss, 6) for loss in losses}) == len(DIVERGENCES)


def test_a_constant_in_the_score_is_free():
    """Adding c (u - 1) to f shifts the score by c: neither the divergence nor the loss notices."""

    class Shifted(Logarithm):
        def score(self, logratio):
            return super().score(logratio) + 17

    inputs = torch.tensor([0.3, 40.0]), torch.tensor([-2.0, 39.0])
    torch.testing.assert_close(
        f_dpo_loss(*inputs, beta=0.1, divergence=Shifted()), f_dpo_loss(*inputs, beta=0.1, divergence="reverse_kl")
    )


def test_gradient_scaling_stays_finite():
    """A loss scale on top of a saturated gradient must not turn it into infinity; masked pairs contribute nothing."""
    chosen = torch.tensor([-1e4, -1e4], requires_grad=True)
    loss = f_dpo_loss(chosen, torch.zeros(2), beta=0.1, divergence="forward_kl")
    (65536 * loss * torch.tensor([1.0, 0.0])).sum().backward()
    assert chosen.grad.tolist() == [-FLOAT32_MAX, 0]


def test_differentiable_once():
    chosen = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    loss = f_dpo_loss(chosen, torch.ones(2), beta=0.1, divergence="js")
    with pytest.raises(RuntimeError, match="differentiated only once"):
        torch.autograd.grad(loss.sum(), chosen, create_graph=True)


# --- The bounded tail -----------------------------------------------------------------------------------------------


def test_tangent_tail_by_hand():
    """
    Forward KL bounded at e^2 is 1 - e^{-l} above l = -2 and follows the slope e^2 below: at l = -5 the score is
    1 - e^2 - 3 e^2. Chi-PO (gamma 1) bounded at weight 5 has e^l + 1 = 5, so the tangent starts at u = 4 on the right.
    """
    tail = TangentTail(get_divergence("forward_kl"), max_log_weight=2.0)
    assert tail.lower == pytest.approx(-2) and tail.upper == math.inf
    assert tail.score(torch.tensor([-5.0, -1.0])).tolist() == pytest.approx([1 - 4 * math.exp(2), 1 - math.e])
    assert tail.log_weight(torch.tensor([-5.0, -1.0])).tolist() == pytest.approx([2, 1])
    loss, grad, _ = loss_and_grads([-5.0], [0.0], tail)
    z = 0.1 * (1 - 4 * math.exp(2))
    assert loss.item() == pytest.approx(math.log1p(math.exp(-z)))
    assert grad.item() == pytest.approx(-0.1 * math.exp(2) / (1 + math.exp(z)))

    tail = TangentTail(get_divergence("chi_po"), max_log_weight=math.log(5))
    assert tail.lower == -math.inf and tail.upper == pytest.approx(math.log(4))
    assert tail.score(torch.tensor(10.0)).item() == pytest.approx(3 + math.log(4) + 5 * (10 - math.log(4)))


@every_divergence
def test_tangent_tail_is_a_divergence_that_changes_nothing_inside(name, params):
    base = build(name, params)
    tail = TangentTail(base, max_log_weight=3.0)
    logratio = torch.linspace(-30, 30, 241, dtype=torch.float64)
    outside = tail.in_tail(logratio)
    assert torch.equal(outside, base.log_weight(logratio) > 3)
    assert torch.equal(tail.score(logratio)[~outside], base.score(logratio)[~outside])
    # Continuous and increasing with a continuous slope, which is what it says it is; f and inverse belong to it.
    assert (tail.score(logratio).diff() > -1e-15).all()  # rounding, where a score is flat
    leaf = logratio.clone().requires_grad_()
    (slope,) = torch.autograd.grad(tail.score(leaf).sum(), leaf)
    torch.testing.assert_close(slope, tail.log_weight(logratio).exp(), rtol=1e-11, atol=1e-14)
    assert slope.max() <= math.exp(3) * (1 + 1e-12)
    near = torch.linspace(-8, 8, 33, dtype=torch.float64)
    torch.testing.assert_close(tail.inverse_score(tail.score(near)), near.exp(), rtol=1e-9, atol=0)
    u = near.exp().requires_grad_()
    (derivative,) = torch.autograd.grad(tail.f(u).sum(), u)
    torch.testing.assert_close(derivative, tail.score(near), rtol=1e-9, atol=1e-9)
    for end in (tail.lower, tail.upper):
        if math.isfinite(end):
            around = torch.tensor([end - 1e-9, end + 1e-9], dtype=torch.float64)
            assert tail.score(around).diff().item() == pytest.approx(2e-9 * math.exp(3), rel=1e-4)
            assert tail.f(around.exp()).diff().abs().item() < 1e-6
    assert tail.curvature == base.curvature and tail.admissible and tail.name == base.name
    # A pair with both sides in the tail: the margin is the slope times the distance.
    if math.isfinite(tail.lower):
        margin = tail.log_margin(torch.tensor(-5000.0), torch.tensor(-5001.0))
        assert margin.item() == pytest.approx(3)


@pytest.mark.parametrize("name", [name for name in DIVERGENCES if get_divergence(name).exponentiates])
def test_clip_grad_norm_is_finite_with_the_tangent_tail(name):
    """
    A linear policy with 1,000 parameters. One pair at l = -90 (or +90 for chi-PO) in a batch of sixteen: with the
    exact loss the norm of the gradient is infinite in float32 and clipping drops the whole batch; with the tail the
    step survives, and the share of pairs in the tail is 1/16.
    """
    torch.manual_seed(0)
    features = F.normalize(torch.randn(2, 16, 1000), dim=-1)
    extreme = 1e4 if name == "chi_po" else -1e4

    def clipped_step(divergence):
        weight = torch.zeros(1000, requires_grad=True)
        offset = torch.zeros(2, 16)
        offset[0, 3] = extreme if name != "chi_po" else 0
        offset[1, 3] = extreme if name == "chi_po" else 0
        logratios = features @ weight + offset
        f_dpo_loss(*logratios, beta=0.1, divergence=divergence).mean().backward()
        norm = torch.nn.utils.clip_grad_norm_([weight], 1.0)
        in_tail = divergence.in_tail(logratios[0]) | divergence.in_tail(logratios[1])
        return norm, weight.grad, in_tail.float().mean().item()

    norm, _, share = clipped_step(get_divergence(name))
    assert norm.isinf() and share == 0
    norm, grad, share = clipped_step(TangentTail(get_divergence(name)))
    assert norm.isfinite() and grad.isfinite().all() and grad.norm().item() == pytest.approx(1, rel=1e-4)
    assert share == 1 / 16


def test_tangent_tail_leaves_bounded_weights_alone():
    for name in ("reverse_kl", "js", "skew_js"):
        tail = TangentTail(get_divergence(name))
        assert (tail.lower, tail.upper) == (-math.inf, math.inf)
        assert not tail.in_tail(torch.tensor(GRID)).any()
        chosen, rejected = zip(*itertools.product(GRID, GRID), strict=True)
        torch.testing.assert_close(
            loss_and_grads(chosen, rejected, tail), loss_and_grads(chosen, rejected, name), rtol=0, atol=0
        )


# --- The distribution that the loss leads to ------------------------------------------------------------------------


class Pearson(Divergence):
    """
    Half of Pearson's chi-squared, f(u) = (u-1)^2 / 2, which `get_divergence` refuses: its score u - 1 is -1 at 0.
    """

    name = "pearson"

    def score(self, logratio):
        return torch.expm1(logratio)

    def log_weight(self, logratio):
        return logratio


REFERENCE = torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=torch.float64)
REWARDS = torch.tensor([-1.5, 0.2, 1.0, 2.5], dtype=torch.float64)


def closed_form_optimum(divergence, beta, reference=REFERENCE, rewards=REWARDS):
    """pi* = pi_ref (f')^{-1}((r - lambda) / beta), with lambda by bisection on the total probability."""
    low, high = rewards.min() - 100 * beta, rewards.max() + 100 * beta
    for _ in range(60):
        middle = (low + high) / 2
        total = (reference * divergence.inverse_score((rewards - middle) / beta)).sum()
        low, high = (middle, high) if total > 1 else (low, middle)
    return reference * divergence.inverse_score((rewards - high) / beta), high


def population_loss(policy, divergence, beta):
    """f-DPO's loss over all ordered pairs of outcomes, weighted by their Bradley-Terry probability."""
    logratios = policy.log() - REFERENCE.log()
    first, second = zip(*itertools.permutations(range(len(REFERENCE)), 2), strict=True)
    preferred = torch.sigmoid(REWARDS[list(first)] - REWARDS[list(second)])
    losses = f_dpo_loss(logratios[list(first)], logratios[list(second)], beta=beta, divergence=divergence)
    return (preferred * losses).sum() / (len(first) / 2)


def fitted_policy(divergence, beta):
    logits = REFERENCE.log().clone().requires_grad_()
    optimizer = torch.optim.LBFGS(
        [logits], max_iter=50, tolerance_grad=1e-13, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def closure():
        optimizer.zero_grad()
        loss = population_loss(logits.softmax(-1), divergence, beta)
        loss.backward()
        return loss

    optimizer.step(closure)
    return logits.detach().softmax(-1)


def bradley_terry_entropy():
    first, second = zip(*itertools.combinations(range(len(REFERENCE)), 2), strict=True)
    p = torch.sigmoid(REWARDS[list(first)] - REWARDS[list(second)])
    return -(p * p.log() + (1 - p) * (1 - p).log()).mean().item()


@pytest.mark.parametrize("name", list(DIVERGENCES))
def test_the_optimum_of_the_constrained_problem_minimises_the_loss(name):
    """
    Its loss is the entropy of the preferences, the floor of any model of them, and fitting finds the same policy.
    """
    divergence, beta = get_divergence(name), 0.8
    optimum, _ = closed_form_optimum(divergence, beta)
    assert optimum.sum().item() == pytest.approx(1) and (optimum > 0).all()
    assert population_loss(optimum, divergence, beta).item() == pytest.approx(bradley_terry_entropy(), rel=1e-9)
    torch.testing.assert_close(fitted_policy(divergence, beta), optimum, rtol=1e-3, atol=1e-5)

    # It is the maximizer of E[r] - beta D_f: no step inside the simplex improves it.
    def objective(policy):
        return (policy * REWARDS).sum() - beta * (REFERENCE * divergence.f(policy / REFERENCE)).sum()

    torch.manual_seed(0)
    for _ in range(20):
        other = torch.randn(4, dtype=torch.float64).softmax(-1)
        assert objective(0.99 * optimum + 0.01 * other) < objective(optimum)


def test_the_tangent_tail_has_the_guarantees_of_a_divergence():
    """With a bound that bites, the optimum is that of the modified divergence, and still reaches the floor."""
    tail, beta = TangentTail(get_divergence("forward_kl"), max_log_weight=0.2), 0.8
    optimum, _ = closed_form_optimum(tail, beta)
    assert tail.in_tail((optimum / REFERENCE).log()).any()
    assert population_loss(optimum, tail, beta).item() == pytest.approx(bradley_terry_entropy(), rel=1e-9)
    # Whereas a bound outside the optimum's ratios leaves it where it was.
    torch.testing.assert_close(
        closed_form_optimum(TangentTail(get_divergence("forward_kl")), beta)[0],
        closed_form_optimum(get_divergence("forward_kl"), beta)[0],
    )


def test_why_pearson_is_refused():
    """
    At beta = 0.8 the constrained optimum under (u-1)^2 / 2 gives the worst outcome zero probability: there the score
    cannot fall below -1. So no policy has the margins of the rewards, the loss stays above its floor, and what fitting
    finds is not the optimum.
    """
    pearson, beta = Pearson(), 0.8
    assert not pearson.admissible
    low, high = -100.0, 100.0
    for _ in range(200):  # the Karush-Kuhn-Tucker solution: u = max(0, 1 + (r - lambda) / beta)
        middle = (low + high) / 2
        optimum = REFERENCE * (1 + (REWARDS - middle) / beta).clamp(min=0)
        low, high = (middle, high) if optimum.sum() > 1 else (low, middle)
    assert optimum[0] == 0 and optimum.sum().item() == pytest.approx(1)
    fitted = fitted_policy(pearson, beta)
    assert population_loss(fitted, pearson, beta).item() > bradley_terry_entropy() + 1e-2
    assert (fitted - optimum).abs().max() > 1e-2


def test_forward_kl_normalizer_is_the_expected_reward():
    """E_{pi*}[1/u] = 1, so lambda = E_{pi*}[r] - beta E_{pi*}[1 - 1/u] = E_{pi*}[r]."""
    optimum, multiplier = closed_form_optimum(get_divergence("forward_kl"), 0.8)
    assert multiplier.item() == pytest.approx((optimum * REWARDS).sum().item())


def test_hellinger_and_alpha_share_their_optimum():
    torch.testing.assert_close(
        closed_form_optimum(get_divergence("hellinger"), 1.0)[0],
        closed_form_optimum(get_divergence("alpha", alpha=0.5), 0.5)[0],
    )


def test_trade_off_from_reverse_to_forward_kl():
    """
    Toward forward KL the optimum keeps more entropy and earns less reward, at a beta small against the rewards (at
    equal beta this is not a law: where the optimum stays near the reference, it can turn around).
    """
    optima = [closed_form_optimum(get_divergence("alpha", alpha=a), 0.1)[0] for a in (1e-6, 0.25, 0.5, 0.75, 1)]
    entropies = [-(p * p.log()).sum().item() for p in optima]
    rewards = [(p * REWARDS).sum().item() for p in optima]
    assert entropies == sorted(entropies) and rewards == sorted(rewards, reverse=True)


# --- A user's own divergence ----------------------------------------------------------------------------------------


class Logarithm(Divergence):
    """Reverse KL by its minimum definition."""

    def score(self, logratio):
        return logratio

    def log_weight(self, logratio):
        return torch.zeros_like(logratio)


class PlainForwardKL(Divergence):
    """Forward KL without any care for stability: its score is -inf below l = -709 in float64."""

    def score(self, logratio):
        return 1 - torch.exp(-logratio)

    def log_weight(self, logratio):
        return -logratio


class PlainJS(Divergence):
    def score(self, logratio):
        return math.log(2) + F.logsigmoid(logratio)

    def log_weight(self, logratio):
        return F.logsigmoid(-logratio)


class PlainChiPO(Divergence):
    def score(self, logratio):
        return torch.exp(logratio) - 1 + logratio

    def log_weight(self, logratio):
        return F.softplus(logratio)


@pytest.mark.parametrize(
    ("custom", "name"),
    [(Logarithm, "reverse_kl"), (PlainForwardKL, "forward_kl"), (PlainJS, "js"), (PlainChiPO, "chi_po")],
)
def test_the_two_methods_of_a_subclass_are_enough(custom, name):
    """Every pair of the grid, those where the scores overflow or cancel included, agrees with the built-in one."""
    custom, built_in = custom(), get_divergence(name)
    values = [*GRID, 0.5, 0.5 + 1e-9, -3.0, 300.0, 301.0, 1e4 - 1]
    chosen, rejected = torch.tensor(list(itertools.product(values, values)), dtype=torch.float64).T
    torch.testing.assert_close(
        custom.log_margin(chosen, rejected), built_in.log_margin(chosen, rejected), rtol=1e-8, atol=1e-8
    )
    for wrap in (lambda divergence: divergence, TangentTail):
        torch.testing.assert_close(
            loss_and_grads(chosen.tolist(), rejected.tolist(), wrap(custom)),
            loss_and_grads(chosen.tolist(), rejected.tolist(), wrap(built_in)),
            rtol=1e-5,
            atol=0,
        )
    assert custom.curvature == pytest.approx(built_in.curvature)
    assert (custom.admissible, custom.exponentiates) == (built_in.admissible, built_in.exponentiates)
    logratio = torch.linspace(-5, 5, 21, dtype=torch.float64)
    torch.testing.assert_close(custom.inverse_score(custom.score(logratio)), logratio.exp(), rtol=1e-9, atol=0)
    with pytest.raises(NotImplementedError, match=r"does not define f\(u\)"):
        custom.f(torch.ones(1))


def test_an_unfinished_subclass_says_what_is_missing():
    class Empty(Divergence):
        pass

    with pytest.raises(NotImplementedError, match=r"Empty must define score\(logratio\)"):
        f_dpo_loss(torch.zeros(1), torch.zeros(1), beta=0.1, divergence=Empty())
    with pytest.raises(NotImplementedError, match=r"Empty must define log_weight\(logratio\)"):
        Empty().log_weight(torch.zeros(1))


# --- f(e^l) and its slope --------------------------------------------------------------------------------------------

# Refused by f-DPO, allowed where the target is explicit.
ORACLES_INADMISSIBLE = {
    "pearson": (lambda u: (u - 1) ** 2, lambda u: 2 * (u - 1)),
    "total_variation": (lambda u: abs(u - 1) / 2, lambda u: mp.sign(u - 1) / 2),
    "le_cam": (lambda u: (u - 1) ** 2 / (u + 1), lambda u: 1 - 4 / (1 + u) ** 2),
}
ALL_ORACLES = {
    **{key: (get_divergence(key[0], **dict(key[1])), *oracle) for key, oracle in ORACLES.items()},
    **{
        (name, ()): (get_divergence(name, allow_inadmissible=True), *oracle)
        for name, oracle in ORACLES_INADMISSIBLE.items()
    },
}
every_oracle = pytest.mark.parametrize(
    ("divergence", "generator", "derivative"),
    [
        pytest.param(*oracle, id="-".join([key[0], *(str(v) for _, v in key[1])]))
        for key, oracle in ALL_ORACLES.items()
    ],
)
FAR = [5000.0, 1400.0, 720.0, 700.0, 350.0, 301.0, 103.0, 88.0, 40.0, 9.7, 1.1, 0.126, 0.124, 0.01, 1e-5, 1e-9]


def saturated(exact, dtype):
    """`exact` as float, held at 1/1024 of the largest number of `dtype`, as scores are."""
    limit = torch.finfo(dtype).max / 1024
    return math.copysign(limit, exact) if abs(exact) > limit else float(exact)


@every_oracle
@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float32, 1e-6), (torch.float64, 3e-12)])
def test_value_and_slope_equal_the_definition(divergence, generator, derivative, dtype, rtol):
    """
    Against f(u) and u f'(u) in 60 digits, over 5000 nats in either direction and down to 1e-9, where both terms of f
    cancel to half of the square. Where float64 cannot hold the result it saturates, with its sign.
    """
    logratio = torch.tensor([sign * x for x in FAR for sign in (-1, 1)], dtype=dtype, requires_grad=True)
    value = divergence.value(logratio)
    value.sum().backward()
    slope, grad, value = divergence.slope(logratio.detach()), logratio.grad, value.detach()
    assert value.dtype == slope.dtype == dtype
    assert value.isfinite().all() and slope.isfinite().all() and grad.isfinite().all()
    tiny = torch.finfo(dtype).tiny
    with mp.workdps(60):
        for x, found, found_slope, found_grad in zip(
            logratio.tolist(), value.tolist(), slope.tolist(), grad.tolist(), strict=True
        ):
            u = mp.exp(mp.mpf(x))
            assert found == pytest.approx(saturated(generator(u), dtype), rel=rtol, abs=tiny), x
            exact = u * derivative(u)
            assert found_slope == pytest.approx(saturated(exact, dtype), rel=rtol, abs=tiny), x
            assert found_grad == pytest.approx(
                float(max(min(exact, torch.finfo(dtype).max), -torch.finfo(dtype).max)), rel=rtol, abs=tiny
            ), x


@every_oracle
def test_value_gradcheck(divergence, generator, derivative):
    """The gradient is the slope; a factor in front of a saturated one stays finite; differentiable once."""
    logratio = torch.tensor([-6.0, -1.3, -0.2, 0.3, 2.0, 5.0], dtype=torch.float64, requires_grad=True)
    torch.autograd.gradcheck(divergence.value, logratio, eps=1e-6, atol=1e-8, rtol=1e-6)
    (grad,) = torch.autograd.grad(divergence.value(logratio).sum(), logratio)
    assert torch.equal(grad, divergence.slope(logratio.detach()))
    far = torch.tensor([-1e30, -5000.0, 5000.0, 1e30], requires_grad=True)
    (grad,) = torch.autograd.grad((65536 * divergence.value(far)).sum(), far)
    assert grad.isfinite().all()
    with pytest.raises(RuntimeError, match="differentiated only once"):
        torch.autograd.grad(divergence.value(logratio).sum(), logratio, create_graph=True)


@every_oracle
def test_value_at_zero_and_of_nan(divergence, generator, derivative):
    values = divergence.value(torch.tensor([0.0, math.nan]))
    slopes = divergence.slope(torch.tensor([0.0, math.nan]))
    assert values[0] == 0 and slopes[0] == 0 and values[1].isnan() and slopes[1].isnan()
    assert divergence.value(0.5).item() == pytest.approx(float(generator(mp.exp(0.5))))


@every_oracle
def test_scaled_value_at_infinity(divergence, generator, derivative):
    """f(0) on the one side and the supremum of f' on the other, infinite where they are."""
    ends = divergence.scaled_value(torch.tensor([-math.inf, math.inf], dtype=torch.float64)).tolist()
    far = divergence.scaled_value(torch.tensor([-1e300, 1e300], dtype=torch.float64)).tolist()
    for end, near in zip(ends, far, strict=True):
        assert end == pytest.approx(near, rel=1e-12) or (end == math.inf and near > 1e290)
    assert divergence.bounded_above == math.isfinite(ends[1])


def test_value_by_hand():
    """
    At a ratio of 4: reverse KL 4 log 4 - 3, slope 4 log 4; chi-PO 9/2 + (4 log 4 - 3); Hellinger 1, slope 4 (1 - 1/2).
    """
    logratio = torch.tensor(4.0, dtype=torch.float64).log()
    for name, value, slope in [
        ("reverse_kl", 4 * math.log(4) - 3, 4 * math.log(4)),
        ("chi_po", 4.5 + 4 * math.log(4) - 3, 4 * (3 + math.log(4))),
        ("hellinger", 1, 2),
    ]:
        assert get_divergence(name).value(logratio).item() == pytest.approx(value)
        assert get_divergence(name).slope(logratio).item() == pytest.approx(slope)


def test_pull_on_a_forgotten_token():
    """
    At l = -12 only forward KL and Jeffreys keep a pull of order 1; Neyman's is e^{12}, JS's and reverse KL's e^{-12}.
    """
    slopes = {name: get_divergence(name).slope(torch.tensor(-12.0)).item() for name in DIVERGENCES}
    assert slopes["forward_kl"] == pytest.approx(-1, rel=1e-4) and slopes["jeffreys"] == pytest.approx(-1, rel=1e-3)
    assert slopes["neyman"] == pytest.approx(-math.exp(12), rel=1e-4)
    assert slopes["hellinger"] == pytest.approx(math.exp(-12) - math.exp(-6), rel=1e-4)
    assert max(abs(slopes[name]) for name in ("reverse_kl", "js", "skew_js", "chi_po")) < 1e-4


@pytest.mark.parametrize("name", list(DIVERGENCES))
def test_values_of_the_tangent_tail(name):
    """Its slope is e^l times its own score, and its value the integral of that: the two vouch for each other."""
    tail = TangentTail(get_divergence(name), max_log_weight=2.0)
    logratio = torch.linspace(-12, 12, 97, dtype=torch.float64)
    torch.testing.assert_close(tail.slope(logratio), logratio.exp() * tail.score(logratio), rtol=1e-11, atol=1e-15)
    end = torch.tensor([-12.0, -3.0, 4.0, 12.0], dtype=torch.float64)
    nodes = torch.linspace(0, 1, 20001, dtype=torch.float64)
    for stop, value in zip(end, tail.value(end), strict=True):
        integral = torch.trapezoid(tail.slope(stop * nodes), stop * nodes)
        assert value.item() == pytest.approx(integral.item(), rel=1e-6)


@pytest.mark.parametrize(
    ("custom", "name"), [("Logarithm", "reverse_kl"), ("PlainForwardKL", "forward_kl"), ("PlainChiPO", "chi_po")]
)
def test_values_of_ones_own_divergence(custom, name):
    """`score` and `log_weight` are enough: f is the integral of the weight. A constant in the score is left out."""
    custom, built_in = globals()[custom](), get_divergence(name)
    logratio = torch.tensor([-5000.0, -300.0, -8.0, -0.3, -1e-6, 0.0, 1e-6, 0.3, 8.0, 300.0], dtype=torch.float64)
    torch.testing.assert_close(custom.value(logratio), built_in.value(logratio), rtol=1e-8, atol=1e-300)
    torch.testing.assert_close(custom.slope(logratio), built_in.slope(logratio), rtol=1e-8, atol=1e-300)

    class Shifted(Logarithm):
        def score(self, logratio):
            return super().score(logratio) + 17

    torch.testing.assert_close(
        Shifted().slope(logratio), built_in_slope := get_divergence("reverse_kl").slope(logratio)
    )
    assert built_in_slope[4] < 0


@every_oracle
def test_minimizing_the_value_reaches_the_closed_form_optimum(divergence, generator, derivative):
    """
    max E_pi[r] - beta E_ref[f(u)] over four outcomes, by gradient through `value`, is pi_ref (f')^{-1}((r - lambda) /
    beta).
    """
    if divergence.name == "total_variation":
        pytest.skip("its score has no inverse")
    beta = 1.5 / min(divergence.curvature, 1.0)
    expected, _ = closed_form_optimum(divergence, beta)
    assert (expected > 1e-3).all()
    logits = REFERENCE.log().clone().requires_grad_()
    optimizer = torch.optim.LBFGS(
        [logits], max_iter=60, tolerance_grad=1e-10, tolerance_change=1e-16, line_search_fn="strong_wolfe"
    )

    def closure():
        optimizer.zero_grad()
        log_policy = logits.log_softmax(-1)
        loss = beta * (REFERENCE * divergence.value(log_policy - REFERENCE.log())).sum()
        loss = loss - (log_policy.exp() * REWARDS).sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    torch.testing.assert_close(logits.detach().softmax(-1), expected, rtol=1e-6, atol=1e-8)


def test_log_inverse_score():
    """The logarithm of `inverse_score`, where that underflows or overflows too."""
    v = torch.tensor([-2000.0, -30.0, -0.4, 0.0, 0.3], dtype=torch.float64)
    for divergence, _, _ in ALL_ORACLES.values():
        found = divergence.log_inverse_score(v)
        torch.testing.assert_close(found.exp(), divergence.inverse_score(v), rtol=1e-9, atol=1e-300)
    for name, expected in [("reverse_kl", -2000.0), ("js", -2000 - math.log(2)), ("forward_kl", -math.log(2001))]:
        assert get_divergence(name).log_inverse_score(v[0]).item() == pytest.approx(expected, rel=1e-12)
    assert get_divergence("reverse_kl").log_inverse_score(torch.tensor(2000.0)).item() == 2000
    assert get_divergence("js").log_inverse_score(torch.tensor(0.7)).item() == math.inf


# --- The door for divergences that f-DPO refuses ---------------------------------------------------------------------


@pytest.mark.parametrize("name", list(ORACLES_INADMISSIBLE))
def test_inadmissible_divergences_by_the_second_door(name):
    generator, derivative = ORACLES_INADMISSIBLE[name]
    with pytest.raises(ValueError, match=f"'{name}' cannot be used in f-DPO"):
        get_divergence(name)
    with pytest.raises(ValueError, match=f"'{name}' cannot be used in f-DPO"):
        f_dpo_loss(torch.zeros(1), torch.zeros(1), beta=0.1, divergence=name)
    divergence = get_divergence(name, allow_inadmissible=True)
    assert not divergence.admissible and divergence.name == name
    logratio = torch.tensor(GENERIC, dtype=torch.float64)
    with mp.workdps(60):
        for x, score, value in zip(
            GENERIC, divergence.score(logratio).tolist(), divergence.f(logratio.exp()).tolist(), strict=True
        ):
            u = mp.exp(mp.mpf(x))
            assert score == pytest.approx(float(derivative(u)), rel=1e-12)
            assert value == pytest.approx(float(generator(u)), rel=1e-12)
    if name != "total_variation":
        leaf = logratio.clone().requires_grad_()
        (weight,) = torch.autograd.grad(divergence.score(leaf).sum(), leaf)
        torch.testing.assert_close(divergence.log_weight(logratio).exp(), weight, rtol=1e-11, atol=1e-15)
        torch.testing.assert_close(divergence.inverse_score(divergence.score(logratio)), logratio.exp())


def test_names_behind_the_second_door():
    for alias in ("chi2", "chi_squared"):
        assert get_divergence(alias, allow_inadmissible=True).name == "pearson"
    assert get_divergence("triangular", allow_inadmissible=True).name == "le_cam"
    assert get_divergence("js", allow_inadmissible=True).name == "js"
    with pytest.raises(ValueError, match="Unknown divergence 'kl'.*le_cam"):
        get_divergence("kl", allow_inadmissible=True)
    # Below the infimum of the score the ratio is 0: the constrained optimum gives such an outcome no probability.
    for name, infimum in [("pearson", -2), ("le_cam", -3), ("total_variation", -0.5)]:
        inverse = get_divergence(name, allow_inadmissible=True).inverse_score
        assert inverse(torch.tensor([infimum - 1.0, 0.0])).tolist() == [0, 1]


# --- Names, parameters and errors -----------------------------------------------------------------------------------


def test_names():
    assert list(DIVERGENCES) == [get_divergence(name).name for name in DIVERGENCES]
    assert get_divergence("js_divergence").name == "js"
    divergence = get_divergence("alpha", alpha=0.3)
    assert get_divergence(divergence) is divergence
    assert repr(divergence) == "AlphaDivergence(alpha=0.3)"
    assert repr(TangentTail(get_divergence("reverse_kl"))).startswith("TangentTail(divergence=ReverseKL(), max_log_w")
    for restored in (copy.deepcopy(divergence), pickle.loads(pickle.dumps(TangentTail(divergence)))):
        assert restored.score(torch.tensor(1.0)) == divergence.score(torch.tensor(1.0))


@pytest.mark.parametrize(
    ("name", "params", "message"),
    [
        ("kl", {}, r"Unknown divergence 'kl'. Known ones: reverse_kl, forward_kl, js, alpha, .*chi_po"),
        (
            "chi_squared",
            {},
            r"'chi_squared' cannot be used .* tends to -2.*would not tend to -inf.*reverse KL.*'chi_po'",
        ),
        ("pearson", {}, "cannot be used in f-DPO"),
        ("total_variation", {}, "cannot be used in f-DPO"),
        ("le_cam", {}, "cannot be used in f-DPO"),
        ("skew_kl_reference", {}, "cannot be used in f-DPO"),
        ("alpha_divergence", {}, r"TRL's alpha is 1 minus .* trl_alpha=\.\.\. for TRL's convention"),
        ("alpha", {"alpha": -1}, r"alpha must be greater than 0, got -1\.0\. The score would not tend to -inf"),
        ("alpha", {"alpha": 0}, r"alpha must be greater than 0, got 0; its limit there is 'reverse_kl'"),
        ("alpha", {"alpha": math.nan}, "alpha must be a finite number, got nan"),
        ("alpha", {"alpha": True}, "alpha must be a finite number, got True"),
        ("alpha", {"alpha": "0.5"}, "alpha must be a finite number, got '0.5'"),
        ("alpha", {"trl_alpha": 2}, r"trl_alpha must be less than or equal to 1, got 2, which is alpha=-1"),
        ("alpha", {"trl_alpha": math.inf}, "trl_alpha must be a finite number, got inf"),
        ("alpha", {"alpha": 0.3, "trl_alpha": 0.7}, r"not both; got alpha=0\.3 and trl_alpha=0\.7"),
        ("js", {"alpha": 0.3}, r"'js' does not take alpha=0\.3; it takes no parameters"),
        ("skew_js", {"alpha": 0.3}, r"'skew_js' does not take alpha=0\.3; it takes: skew"),
        ("alpha", {"gamma": 2}, r"'alpha' does not take gamma=2; it takes: alpha, trl_alpha"),
        ("skew_js", {"skew": 1}, "skew must be strictly between 0 and 1, got 1"),
        ("skew_js", {"skew": math.nan}, "skew must be a finite number, got nan"),
        ("chi_po", {"gamma": 0}, r"gamma must be greater than 0, got 0\.0"),
        ("chi_po", {"gamma": math.inf}, "gamma must be a finite number, got inf"),
        (get_divergence("js"), {"alpha": 1}, r"JensenShannon\(.*\) already has its parameters; got alpha=1"),
    ],
)
def test_refused_divergences(name, params, message):
    with pytest.raises(ValueError, match=message):
        get_divergence(name, **params)


def test_refused_arguments():
    pair = torch.zeros(2), torch.zeros(2)
    for beta in (0, -0.1, math.nan, math.inf, True, "0.1", None):
        with pytest.raises(ValueError, match="beta must be"):
            f_dpo_loss(*pair, beta=beta, divergence="js")
    with pytest.raises(ValueError, match=r"same shape, got \(2,\) and \(3,\)"):
        f_dpo_loss(torch.zeros(2), torch.zeros(3), beta=0.1, divergence="js")
    with pytest.raises(ValueError, match="must be floating-point tensors, got torch.int64"):
        f_dpo_loss(torch.zeros(2, dtype=torch.long), torch.zeros(2), beta=0.1, divergence="js")
    with pytest.raises(TypeError, match="a name or a Divergence, got 3"):
        f_dpo_loss(*pair, beta=0.1, divergence=3)
    with pytest.raises(TypeError, match="must be a Divergence, got 'js'"):
        TangentTail("js")
    with pytest.raises(ValueError, match=r"greater than the log-weight at l = 0, which is 0\.6931 for Jeffreys\(\)"):
        TangentTail(get_divergence("jeffreys"), max_log_weight=0.5)
    with pytest.raises(ValueError, match="max_log_weight must be a finite number, got inf"):
        TangentTail(get_divergence("jeffreys"), max_log_weight=math.inf)


def test_nan_is_not_hidden():
    loss = f_dpo_loss(torch.tensor([math.nan, 1.0]), torch.zeros(2), beta=0.1, divergence="forward_kl")
    assert loss.isnan().tolist() == [True, False]


@pytest.mark.parametrize(
    "documented",
    [value for _, value in inspect.getmembers(f_divergence) if ">>>" in (getattr(value, "__doc__", None) or "")],
    ids=lambda value: value.__name__,
)
def test_examples_in_the_documentation(documented):
    text = documented.__doc__.replace("```python", "").replace("```", "")
    example = doctest.DocTestParser().get_doctest(text, vars(f_divergence).copy(), documented.__name__, None, 0)
    assert doctest.DocTestRunner(verbose=False).run(example).failed == 0
