"""The SimPER loss against its equation, L = -exp(s_w) + exp(s_l) (arXiv 2502.00883)."""

import doctest
import math

import mpmath as mp
import pytest
import torch

from trl_ext.losses import simper, simper_loss


def random_pairs(count=50, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return -4 * torch.rand(2, count, generator=generator, dtype=torch.float64)


def test_by_hand():
    """
    Chosen tokens of probability 0.9 and 0.4: sqrt(0.36) = 0.6. Rejected token of probability 0.25. -0.6 + 0.25 =
    -0.35.
    """
    loss = simper_loss(torch.tensor([(math.log(0.9) + math.log(0.4)) / 2]), torch.tensor([math.log(0.25)]))
    assert loss.item() == pytest.approx(-0.35)


def test_single_tokens_give_the_difference_of_probabilities():
    p_w, p_l = random_pairs().exp()
    torch.testing.assert_close(simper_loss(p_w.log(), p_l.log()), p_l - p_w)


def test_equals_the_definition():
    chosen, rejected = random_pairs()
    with mp.workdps(40):
        exact = [
            float(-mp.exp(mp.mpf(s_w)) + mp.exp(mp.mpf(s_l)))
            for s_w, s_l in zip(chosen.tolist(), rejected.tolist(), strict=True)
        ]
    torch.testing.assert_close(
        simper_loss(chosen, rejected), torch.tensor(exact, dtype=torch.float64), rtol=1e-13, atol=1e-15
    )


def test_gradients():
    """dL/ds_w = -exp(s_w), dL/ds_l = exp(s_l), and no coupling of the two sides."""
    chosen, rejected = (x.requires_grad_() for x in random_pairs())
    loss = simper_loss(chosen, rejected)
    grads = torch.autograd.grad(loss.sum(), (chosen, rejected), create_graph=True)
    torch.testing.assert_close(grads, (-chosen.exp(), rejected.exp()), rtol=1e-12, atol=0)
    (mixed,) = torch.autograd.grad(grads[0].sum(), rejected, allow_unused=True, materialize_grads=True)
    assert (mixed == 0).all()
    torch.autograd.gradcheck(simper_loss, (chosen, rejected))


def test_gradient_by_token():
    """Through the average, every token of a response of n tokens gets exp(s) / n, which adds up to exp(s)."""
    logps = (-torch.rand(2, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)).requires_grad_()
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]], dtype=torch.float64)
    mean = (logps * mask).sum(1) / mask.sum(1)
    simper_loss(mean[:1], mean[1:]).backward()
    expected = torch.stack([-mean[0].exp() * mask[0] / 5, mean[1].exp() * mask[1] / 3])
    torch.testing.assert_close(logps.grad, expected.detach())


def test_range_symmetry_and_order():
    chosen, rejected = random_pairs()
    loss = simper_loss(chosen, rejected)
    assert (loss > -1).all() and (loss < 1).all()
    assert torch.equal(simper_loss(rejected, chosen), -loss)
    assert torch.equal(torch.sign(-loss), torch.sign(chosen - rejected))
    assert (simper_loss(chosen, chosen) == 0).all()
    assert simper_loss(torch.tensor([0.0, -1e4]), torch.tensor([-1e4, 0.0])).tolist() == [-1, 1]


def test_additive_in_the_two_sides():
    (a, b), (c, d) = random_pairs(2)
    total = simper_loss(a, c) + simper_loss(b, d)
    torch.testing.assert_close(total, simper_loss(a, d) + simper_loss(b, c))


def test_small_margins():
    """Around s, a margin of delta gives -exp(s) delta."""
    s, delta = torch.tensor([-1.0, -3.0], dtype=torch.float64), 1e-6
    torch.testing.assert_close(simper_loss(s + delta, s), -s.exp() * delta, rtol=1e-5, atol=0)


def test_uniform_model_has_nearly_no_signal():
    """s = -log V on both sides: loss 0, gradients -/+ 1 / V."""
    s = torch.full((2, 1), -math.log(32000), requires_grad=True)
    loss = simper_loss(*s)
    loss.backward()
    assert loss.item() == 0
    assert s.grad.flatten().tolist() == pytest.approx([-1 / 32000, 1 / 32000], rel=1e-5)


def test_extreme_inputs_are_finite():
    """Far below 0 a side has no weight left; above 0 there is no log-probability, but neither an infinity."""
    values = torch.tensor([-3e38, -1e4, -104.0, 0.0, 90.0, 1e4, 3e38])
    chosen, rejected = torch.cartesian_prod(values, values).T.clone().requires_grad_()
    loss = simper_loss(chosen, rejected)
    assert loss.isfinite().all()
    assert all(grad.isfinite().all() for grad in torch.autograd.grad(loss.sum(), (chosen, rejected)))


def test_result_dtypes():
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        assert simper_loss(torch.zeros(3, dtype=dtype), torch.zeros(3)).dtype == torch.float32
    loss = simper_loss(torch.zeros(3, dtype=torch.float64), torch.zeros(3, dtype=torch.float64))
    assert loss.dtype == torch.float64 and loss.shape == (3,)


def test_refused_arguments():
    with pytest.raises(ValueError, match=r"same shape, got \(2,\) and \(3,\)"):
        simper_loss(torch.zeros(2), torch.zeros(3))
    with pytest.raises(ValueError, match="must be floating-point tensors, got torch.int64"):
        simper_loss(torch.zeros(2, dtype=torch.long), torch.zeros(2))


def test_example_in_the_documentation():
    text = simper_loss.__doc__.replace("```python", "").replace("```", "")
    example = doctest.DocTestParser().get_doctest(text, vars(simper).copy(), "simper_loss", None, 0)
    assert doctest.DocTestRunner(verbose=False).run(example).failed == 0
