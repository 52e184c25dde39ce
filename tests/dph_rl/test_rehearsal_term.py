"""The term of a rehearsed token: closed forms, and what goes wrong in other ways of writing it."""

import math

import pytest
import torch

from trl_ext.dph_rl.rehearsal import RehearsalOrder
from trl_ext.dph_rl.terms import rehearsal_term, where_bounded
from trl_ext.losses import get_divergence


DIVERGENCES = [
    ("reverse_kl", {}),
    ("forward_kl", {}),
    ("js", {}),
    ("alpha", {"alpha": 0.2}),
    ("alpha", {"alpha": 0.8}),
    ("hellinger", {}),
    ("jeffreys", {}),
    ("skew_js", {"skew": 0.1}),
    ("chi_po", {}),
    ("neyman", {}),
]
every_divergence = pytest.mark.parametrize("name, params", DIVERGENCES, ids=lambda value: str(value))


def gradient(term, logratio: float, dtype=torch.float64) -> float:
    point = torch.tensor([logratio], dtype=dtype, requires_grad=True)
    term(point).sum().backward()
    return point.grad.item()


@every_divergence
def test_term_is_the_generator(name, params):
    """Within the bound the term is f(e^l), by float64 from the definition; beyond it the tangent at the bound."""
    divergence = get_divergence(name, **params)
    inside = torch.linspace(-6, 2, 81, dtype=torch.float64)
    torch.testing.assert_close(
        rehearsal_term(inside, divergence, 2.0), divergence.f(inside.exp()), rtol=1e-9, atol=1e-12
    )
    bound = torch.tensor(2.0, dtype=torch.float64)
    for step in (0.5, 4.0, 60.0):
        expected = divergence.f(bound.exp()) + divergence.slope(bound) * step
        assert rehearsal_term(bound + step, divergence, 2.0).item() == pytest.approx(expected.item(), rel=1e-9)
        assert gradient(lambda x: rehearsal_term(x, divergence, 2.0), 2.0 + step) == pytest.approx(
            divergence.slope(bound).item(), rel=1e-9
        )
    torch.testing.assert_close(rehearsal_term(inside, divergence, None), divergence.value(inside))


@every_divergence
def test_finite_in_float32(name, params):
    """Value and gradient are finite from l = -80 to 80 in float32, with the bound; the gradient has the sign of l."""
    divergence = get_divergence(name, **params)
    points = torch.tensor([-80.0, -20.0, -5.0, -0.1, 0.1, 4.0, 20.0, 80.0], requires_grad=True)
    values = rehearsal_term(points, divergence)
    values.sum().backward()
    assert values.isfinite().all() and points.grad.isfinite().all() and (values >= 0).all()
    # Zero only where the slope itself leaves the range of float32.
    assert (points.grad * points >= 0).all() and (points.grad[1:] != 0).all()


def test_pull_on_forgotten_tokens():
    """The page's table: the slope at l = -12. Only forward KL, Jeffreys and Neyman bring back what is forgotten."""
    point = torch.tensor(-12.0, dtype=torch.float64)
    pull = {name: get_divergence(name, **params).slope(point).item() for name, params in DIVERGENCES if not params}
    pull |= {a: get_divergence("alpha", alpha=a).slope(point).item() for a in (0.2, 0.8)}
    assert pull["forward_kl"] == pytest.approx(-1, abs=1e-4) and pull["jeffreys"] == pytest.approx(-1, abs=1e-3)
    assert pull["neyman"] == pytest.approx(-1.6e5, rel=0.05)
    assert pull[0.8] == pytest.approx(-0.11, abs=0.01) and pull["hellinger"] == pytest.approx(-2.5e-3, abs=1e-4)
    assert pull[0.2] == pytest.approx(-3e-4, abs=1e-4)
    assert all(-1e-4 < pull[name] < 0 for name in ("reverse_kl", "js", "chi_po"))


@pytest.mark.parametrize("logratio", [-20.0, -12.0, 4.0, 8.0])
def test_clamped_k3_has_no_gradient(logratio):
    """
    Negative control, the released code's forward KL: k3 with its two clamps has gradient zero outside of [-11, 2.6],
    where the term has the full one (its tangent's beyond 3).
    """

    def released(x):
        difference = torch.clamp(-x, min=-20, max=20)
        return torch.clamp(torch.exp(-difference) + difference - 1, min=-10, max=10)

    def ours(x):
        return rehearsal_term(x, get_divergence("forward_kl"))

    assert gradient(released, logratio) == 0
    assert gradient(ours, logratio) == pytest.approx(math.expm1(min(logratio, 3.0)), rel=1e-9)
    assert gradient(released, 1.0) == pytest.approx(gradient(ours, 1.0), rel=1e-9)


@pytest.mark.parametrize("logratio", [-104.0, 89.0])
def test_js_by_its_formula_is_nan(logratio):
    """Negative control: the JS generator through u = e^l is not a number in float32 where the term is finite."""
    u = torch.tensor(logratio).exp()
    assert not torch.isfinite(u * u.log() - (u + 1) * ((u + 1) / 2).log())
    assert torch.isfinite(rehearsal_term(torch.tensor(logratio), get_divergence("js")))


@every_divergence
def test_enumerated_optimum_is_the_closed_form(name, params):
    """
    Eight outcomes: minimizing -E_pi[r] + eta E_0[f(pi / pi_0)] by the term ends at pi_0 f'^{-1}((r - lambda) / eta),
    lambda such that it sums to one: the catalogue's inverse is the oracle.
    """
    divergence, eta = get_divergence(name, **params), 0.7
    generator = torch.Generator().manual_seed(3)
    start = torch.randn(8, generator=generator, dtype=torch.float64).log_softmax(0)
    reward = torch.rand(8, generator=generator, dtype=torch.float64)
    low, high = reward.min() - 60, reward.max() + 60
    for _ in range(200):  # sum is decreasing in lambda
        middle = (low + high) / 2
        # Where a score is bounded above, lambda below the bound asks for more than there is.
        value = divergence.inverse_score((reward - middle) / eta)
        total = (start.exp() * value).sum()
        low, high = (middle, high) if not torch.isfinite(total) or total > 1 else (low, middle)
    expected = start.exp() * divergence.inverse_score((reward - high) / eta)
    logits = start.clone().requires_grad_()
    optimizer = torch.optim.LBFGS(
        [logits], lr=1, max_iter=500, tolerance_grad=1e-14, tolerance_change=1e-18, line_search_fn="strong_wolfe"
    )

    def loss():
        optimizer.zero_grad()
        logprobs = logits.log_softmax(0)
        value = -(logprobs.exp() * reward).sum()
        value = value + eta * (start.exp() * rehearsal_term(logprobs - start, divergence, None)).sum()
        value.backward()
        return value

    optimizer.step(loss)
    found = logits.detach().softmax(0)
    assert expected.sum().item() == pytest.approx(1, abs=1e-9)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_sum_over_tokens_is_not_the_sequence_divergence():
    """
    Two tokens of a vocabulary of four: E_0 of the summed terms is the divergence of the sequences for the forward KL
    and for no other. The page says so.
    """
    generator = torch.Generator().manual_seed(0)

    def chain():
        first = torch.randn(4, generator=generator, dtype=torch.float64).log_softmax(-1)
        second = torch.randn(4, 4, generator=generator, dtype=torch.float64).log_softmax(-1)
        return first, second

    (p1, p2), (q1, q2) = chain(), chain()
    weight = (q1[:, None] + q2).exp()
    for name in ("forward_kl", "reverse_kl", "js"):
        divergence = get_divergence(name)
        tokens = (weight * (divergence.value(p1 - q1)[:, None] + divergence.value(p2 - q2))).sum()
        sequences = (weight * divergence.value((p1[:, None] + p2) - (q1[:, None] + q2))).sum()
        assert (abs(tokens - sequences) < 1e-12) == (name == "forward_kl"), name


def test_few_saved_answers_are_not_memorized():
    """
    Section K of the method's notes: 40 contexts, one saved answer each, many passes from a disturbed policy. The
    term brings the policy nearer to the start and keeps its entropy; the likelihood of the same answers memorizes
    them.
    """
    generator = torch.Generator().manual_seed(1)
    start = torch.randn(40, 8, generator=generator, dtype=torch.float64).log_softmax(-1)
    disturbed = (start + 0.7 * torch.randn(40, 8, generator=generator, dtype=torch.float64)).log_softmax(-1)
    saved = torch.multinomial(start.exp(), 1, generator=generator)

    def train(term):
        logits = disturbed.clone().requires_grad_()
        optimizer = torch.optim.Adam([logits], lr=0.02)
        for _ in range(400):
            logps = logits.log_softmax(-1).gather(-1, saved)
            optimizer.zero_grad()
            term(logps, start.gather(-1, saved)).mean().backward()
            optimizer.step()
        logprobs = logits.detach().log_softmax(-1)
        kl = (start.exp() * (start - logprobs)).sum(-1).mean().item()
        return kl, -(logprobs.exp() * logprobs).sum(-1).mean().item()

    before = (start.exp() * (start - disturbed)).sum(-1).mean().item()
    kl, entropy = train(lambda logps, of_start: rehearsal_term(logps - of_start, get_divergence("forward_kl")))
    likelihood_kl, likelihood_entropy = train(lambda logps, of_start: -logps)
    assert kl < before and entropy > 1.4
    assert likelihood_kl > 2 * before and likelihood_entropy < 0.5


def test_where_bounded():
    logratios = torch.tensor([-5.0, 2.9, 3.1])
    assert where_bounded(logratios, 3.0).tolist() == [False, False, True]
    assert not where_bounded(logratios, None).any()


# ---- The order of the answers ---------------------------------------------------------------------------------------


def test_order_covers_all_and_does_not_depend_on_the_split():
    """
    Every pass has each answer once. One process of eight, two of four, and eight micro-steps of one take the same
    answers in an optimizer step; another seed has another order.
    """
    one = RehearsalOrder(10, 8, 1, seed=5)
    taken = [row for step in range(5) for row in one.rows(step, 0)]
    assert all(sorted(taken[k : k + 10]) == list(range(10)) for k in range(0, 40, 10))
    assert taken[:10] != taken[10:20]
    two, accumulated = RehearsalOrder(10, 4, 2, seed=5), RehearsalOrder(10, 1, 1, seed=5)
    assert [row for step in range(5) for process in range(2) for row in two.rows(step, process)] == taken
    assert two.rows_of_all(range(5)) == taken
    assert accumulated.rows_of_all(range(40)) == taken
    assert RehearsalOrder(10, 8, 1, seed=6).rows(0, 0) != one.rows(0, 0)
    # A late step does not need the earlier ones.
    assert RehearsalOrder(10, 8, 1, seed=5).rows(4, 0) == taken[32:]
