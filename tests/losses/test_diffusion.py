"""
Losses on predictions of a diffusion model: closed forms, the derivatives worked out by hand, and what each is
invariant to.

With E the mean squared error over dimensions, m = (E_w - Eref_w) - (E_l - Eref_l) and u = -(beta / 2) m. D is the
number of dimensions of a sample, B that of pairs; gradients are those of the mean over pairs.
"""

import math

import pytest
import torch
import torch.nn.functional as F

from trl_ext.losses import diffusion_dpo_loss, dspo_loss, pair_errors, safeguard_scale
from trl_ext.losses.diffusion import LOSS_TYPES


B, SHAPE = 3, (2, 4, 4)
D = math.prod(SHAPE)


def predictions(seed=0, dtype=torch.float64, scale=1.0, policy_is_reference=False):
    """chosen_pred, rejected_pred, chosen_ref_pred, rejected_ref_pred, chosen_target, rejected_target."""
    generator = torch.Generator().manual_seed(seed)
    w, l, ref_w, ref_l, target = (  # noqa: E741
        scale * torch.randn(B, *SHAPE, generator=generator, dtype=torch.float64) for _ in range(5)
    )
    if policy_is_reference:
        ref_w, ref_l = w, l
    tensors = [w.clone(), l.clone(), ref_w.clone(), ref_l.clone(), target, target.clone()]
    return [tensor.to(dtype) for tensor in tensors]


def with_gradient(loss_function, tensors, **kwargs):
    """Losses and the gradient of their mean with respect to the two predictions of the policy."""
    tensors = list(tensors)
    tensors[0], tensors[1] = (tensor.clone().requires_grad_() for tensor in tensors[:2])
    losses = loss_function(*tensors, **kwargs)
    return losses, *torch.autograd.grad(losses.mean(), tensors[:2], allow_unused=True)


def margin(tensors):
    w, l, ref_w, ref_l, target_w, target_l = tensors  # noqa: E741

    def error(prediction, target):
        return ((prediction - target) ** 2).sum((1, 2, 3)) / D

    return (error(w, target_w) - error(ref_w, target_w)) - (error(l, target_l) - error(ref_l, target_l))


DPO = {
    "sigmoid": dict(beta=2.0),
    "smoothed": dict(beta=2.0, label_smoothing=0.1),
    "hinge": dict(beta=2.0, loss_type="hinge"),
    "ipo": dict(beta=2.0, loss_type="ipo"),
    "dmpo": dict(beta=2.0, loss_type="dmpo", label_smoothing=0.01),
}
DSPO = {
    "score": dict(beta=1.5, score_weight=0.7),
    "score-one-weight": dict(beta=0.3),
    "squared": dict(beta=2.0, variant="squared"),
}
ALL = [(diffusion_dpo_loss, kwargs) for kwargs in DPO.values()] + [(dspo_loss, kwargs) for kwargs in DSPO.values()]
IDS = [f"dpo-{name}" for name in DPO] + [f"dspo-{name}" for name in DSPO]
every_loss = pytest.mark.parametrize("loss, kwargs", ALL, ids=IDS)


# ---- Closed forms ---------------------------------------------------------------------------------------------------


def test_examples_of_the_docstrings():
    """
    Errors 1 and 4, of the reference 1.21 and 3.61: m = -0.21 - 0.39 = -0.6 and u = 0.3 at beta 1. DPO's loss is log(1
    + e^-0.3) = 0.55436; DSPO's, with 1 - sigmoid(0.3) = 0.42556, a = 1 and b = -0.1, is 1.042556^2 = 1.08692 and,
    squared, 0.42556^2 = 0.18110.
    """
    tensors = [torch.full((1, *SHAPE), v, dtype=torch.float64) for v in (1.0, 2.0, 1.1, 1.9, 0.0, 0.0)]
    assert diffusion_dpo_loss(*tensors, beta=1.0).item() == pytest.approx(math.log1p(math.exp(-0.3)), rel=1e-12)
    p = 1 / (1 + math.exp(0.3))
    assert dspo_loss(*tensors, beta=1.0).item() == pytest.approx((1 + 0.1 * p) ** 2, rel=1e-12)
    assert dspo_loss(*tensors, beta=1.0, variant="squared").item() == pytest.approx(p**2, rel=1e-12)


@pytest.mark.parametrize("seed", range(3))
def test_equations(seed):
    """Each loss type is its function of u, with the errors as sums divided by D, and the half in u."""
    tensors, beta, s = predictions(seed), 3.0, 0.1
    m = margin(tensors)
    u = -0.5 * beta * m
    p = torch.sigmoid(u)

    def dpo(**kwargs):
        return diffusion_dpo_loss(*tensors, beta=beta, **kwargs)

    torch.testing.assert_close(dpo(), -torch.log(p))
    torch.testing.assert_close(dpo(label_smoothing=s), -(1 - s) * torch.log(p) - s * torch.log(1 - p))
    torch.testing.assert_close(dpo(loss_type="hinge"), torch.relu(1 - u))
    torch.testing.assert_close(dpo(loss_type="ipo"), (-m - 1 / (2 * beta)) ** 2)
    kl = p * torch.log(p / (1 - s)) + (1 - p) * torch.log((1 - p) / s)
    torch.testing.assert_close(dpo(loss_type="dmpo", label_smoothing=s), kl)

    w, _, ref_w, _, target, _ = tensors
    k = 0.8 * (1 - p).view(-1, 1, 1, 1)
    score = (((w - target) - k * (w - ref_w)) ** 2).mean((1, 2, 3))
    torch.testing.assert_close(dspo_loss(*tensors, beta=beta, score_weight=0.8), score)
    torch.testing.assert_close(dspo_loss(*tensors, beta=beta, variant="squared"), (1 - p) ** 2)


def test_dmpo_is_exo_pair():
    """DMPO is TRL's `exo_pair`, whose epsilon is the label smoothing, for random u."""
    tensors, beta, alpha = predictions(1), 5.0, 0.01
    u = -0.5 * beta * margin(tensors)
    # `trl.DPOTrainer`, loss_type "exo_pair".
    exo = torch.sigmoid(u) * (F.logsigmoid(u) - math.log(1 - alpha)) + torch.sigmoid(-u) * (
        F.logsigmoid(-u) - math.log(alpha)
    )
    got = diffusion_dpo_loss(*tensors, beta=beta, loss_type="dmpo", label_smoothing=alpha)
    torch.testing.assert_close(got, exo)


def test_values_of_an_untrained_policy():
    """
    Where the policy equals the reference u is 0, exactly: log 2 for DPO, smoothed or not, 1 for the hinge, (1 / (2
    beta))^2 for IPO, 1/4 for the squared link, 1.6144631 for DMPO at 0.01 (log(1/2) - (log 0.99 + log 0.01) / 2), and
    for DSPO's score form the error at the preferred image.
    """
    tensors, beta = predictions(policy_is_reference=True), 5000.0

    def all_equal(losses, value):
        torch.testing.assert_close(losses, torch.full_like(losses, value), rtol=1e-12, atol=0)

    all_equal(diffusion_dpo_loss(*tensors, beta=beta), math.log(2))
    all_equal(diffusion_dpo_loss(*tensors, beta=beta, label_smoothing=0.2), math.log(2))
    all_equal(diffusion_dpo_loss(*tensors, beta=beta, loss_type="hinge"), 1.0)
    all_equal(diffusion_dpo_loss(*tensors, beta=beta, loss_type="ipo"), (1 / (2 * beta)) ** 2)
    dmpo = math.log(0.5) - 0.5 * (math.log(0.99) + math.log(0.01))
    assert dmpo == pytest.approx(1.6144631, abs=1e-7)
    all_equal(diffusion_dpo_loss(*tensors, beta=beta, loss_type="dmpo", label_smoothing=0.01), dmpo)
    all_equal(dspo_loss(*tensors, beta=beta, variant="squared"), 0.25)
    score = dspo_loss(*tensors, beta=0.001)
    assert torch.equal(score, pair_errors(*tensors).chosen)


# ---- Gradients ------------------------------------------------------------------------------------------------------


@every_loss
def test_gradcheck(loss, kwargs):
    """The gradient is that of the value, in float64, in both predictions of the policy."""
    tensors = predictions(2)

    def function(w, l):  # noqa: E741
        return loss(w, l, *tensors[2:], **kwargs)

    assert torch.autograd.gradcheck(function, [tensor.clone().requires_grad_() for tensor in tensors[:2]])


@every_loss
def test_no_gradient_to_the_reference(loss, kwargs):
    """Reference and targets are constants even if they come with a graph."""
    tensors = [tensor.requires_grad_() for tensor in predictions(2)]
    loss(*tensors, **kwargs).sum().backward()
    assert all(tensor.grad is not None for tensor in tensors[:1])
    assert all(tensor.grad is None for tensor in tensors[2:])


def test_dpo_gradient_at_the_start():
    """beta / (2 D B) (pred - target): + at the preferred image, - at the other."""
    tensors, beta = predictions(policy_is_reference=True), 7.0
    _, w, l = with_gradient(diffusion_dpo_loss, tensors, beta=beta)  # noqa: E741
    torch.testing.assert_close(w, beta / (2 * D * B) * (tensors[0] - tensors[4]), rtol=0, atol=1e-14)
    torch.testing.assert_close(l, -beta / (2 * D * B) * (tensors[1] - tensors[5]), rtol=0, atol=1e-14)


@pytest.mark.parametrize("weight", [0.001, 0.5, 1.9])
def test_score_gradient_at_the_start(weight):
    """1 - weight / 2 of fine-tuning's on the preferred image, and none at all for the other."""
    tensors = predictions(policy_is_reference=True)
    _, w, l = with_gradient(dspo_loss, tensors, beta=50.0, score_weight=weight)  # noqa: E741
    torch.testing.assert_close(w, (1 - weight / 2) * 2 / (D * B) * (tensors[0] - tensors[4]), rtol=1e-12, atol=0)
    assert l.abs().max() == 0


def test_score_gradient():
    """
    Away from the start, with c = (2 beta w / (D^2 B)) sigmoid(u) sigmoid(-u) <a - k b, b>:
    preferred 2 / (D B) (1 - k) (a - k b) - c a, the other +c (pred_l - target).
    """
    tensors, beta, weight = predictions(3), 2.0, 0.7
    _, got_w, got_l = with_gradient(dspo_loss, tensors, beta=beta, score_weight=weight)
    w, l, ref_w, _, target_w, target_l = tensors  # noqa: E741
    u = (-0.5 * beta * margin(tensors)).view(-1, 1, 1, 1)
    a, b, k = w - target_w, w - ref_w, weight * torch.sigmoid(-u)
    inner = ((a - k * b) * b).sum((1, 2, 3), keepdim=True)
    c = 2 * beta * weight / (D**2 * B) * torch.sigmoid(u) * torch.sigmoid(-u) * inner
    torch.testing.assert_close(got_w, 2 / (D * B) * (1 - k) * (a - k * b) - c * a, rtol=0, atol=1e-15)
    torch.testing.assert_close(got_l, c * (l - target_l), rtol=0, atol=1e-15)


@pytest.mark.parametrize(
    "loss, kwargs, factor",
    [
        (dspo_loss, dict(variant="squared"), 0.5),
        (diffusion_dpo_loss, dict(loss_type="hinge"), 2.0),
        (diffusion_dpo_loss, dict(loss_type="dmpo", label_smoothing=0.01), 0.5 * math.log(99)),
        (diffusion_dpo_loss, dict(label_smoothing=0.2), 0.6),
    ],
    ids=["squared", "hinge", "dmpo", "smoothed"],
)
def test_gradient_at_the_start_beside_dpo(loss, kwargs, factor):
    """
    dL/du at 0 beside DPO's -1/2: squared -1/4 is half of it, the hinge -1 twice, DMPO p (1 - p) (u - logit 0.99) =
    -log(99) / 4 is 2.2976 times, smoothing by s 1 - 2 s.
    """
    tensors = predictions(policy_is_reference=True)
    _, w, l = with_gradient(loss, tensors, beta=7.0, **kwargs)  # noqa: E741
    _, dpo_w, dpo_l = with_gradient(diffusion_dpo_loss, tensors, beta=7.0)
    torch.testing.assert_close(w, factor * dpo_w)
    torch.testing.assert_close(l, factor * dpo_l)


# ---- Invariances ----------------------------------------------------------------------------------------------------


def swapped(tensors):
    w, l, ref_w, ref_l, target_w, target_l = tensors  # noqa: E741
    return [l, w, ref_l, ref_w, target_l, target_w]


def test_swapping_negates_the_argument():
    """u(l, w) = -u(w, l), so for DPO L(u) - L(-u) = -u."""
    tensors, beta = predictions(4), 3.0
    u, u_swapped = pair_errors(*tensors).argument(beta), pair_errors(*swapped(tensors)).argument(beta)
    torch.testing.assert_close(u, -u_swapped)
    difference = diffusion_dpo_loss(*tensors, beta=beta) - diffusion_dpo_loss(*swapped(tensors), beta=beta)
    torch.testing.assert_close(difference, -u)


def test_argument_is_linear_in_beta():
    """And d loss / d beta has the sign of m."""
    tensors = predictions(5)
    errors, m = pair_errors(*tensors), margin(tensors)
    torch.testing.assert_close(errors.argument(10.0), 10 * errors.argument(1.0))
    slope = diffusion_dpo_loss(*tensors, beta=1.001) - diffusion_dpo_loss(*tensors, beta=1.0)
    assert torch.equal(slope.sign(), m.sign())


@every_loss
def test_resolution_does_not_matter(loss, kwargs):
    """
    Errors are means: on a canvas tiled from the same predictions the losses are the same, so beta keeps its meaning.
    """
    tensors = predictions(6)
    tiled = [tensor.repeat(1, 1, 2, 3) for tensor in tensors]
    torch.testing.assert_close(loss(*tiled, **kwargs), loss(*tensors, **kwargs))


def test_constant_in_the_errors():
    """What raises both images' errors alike leaves u unchanged: here noise in a channel of its own."""
    tensors = predictions(7)
    extra = torch.randn(B, 1, 4, 4, dtype=torch.float64)
    appended = [torch.cat([t, extra if i in (0, 1) else 0 * extra], 1) for i, t in enumerate(tensors)]
    ratio = appended[0][0].numel() / D  # the mean is over more dimensions now
    torch.testing.assert_close(pair_errors(*appended).argument(ratio), pair_errors(*tensors).argument(1.0))


@every_loss
def test_pairs_are_independent(loss, kwargs):
    """A pair's loss does not depend on the others, or on the order."""
    tensors = predictions(8)
    alone = torch.cat([loss(*[tensor[i : i + 1] for tensor in tensors], **kwargs) for i in range(B)])
    torch.testing.assert_close(loss(*tensors, **kwargs), alone)
    torch.testing.assert_close(loss(*[tensor.flip(0) for tensor in tensors], **kwargs), alone.flip(0))


def test_weight():
    """
    A weight multiplies a pair's errors: in DPO it is a beta of its own, in the score form it weighs the square too.
    """
    tensors, weight = predictions(9), torch.tensor([0.5, 1.0, 3.0], dtype=torch.float64)
    each = [diffusion_dpo_loss(*[t[i : i + 1] for t in tensors], beta=2.0 * w) for i, w in enumerate(weight.tolist())]
    torch.testing.assert_close(diffusion_dpo_loss(*tensors, beta=2.0, weight=weight), torch.cat(each))
    w, _, ref_w, _, target, _ = tensors
    u = weight * -0.5 * 2.0 * margin(tensors)
    k = (0.7 * torch.sigmoid(-u)).view(-1, 1, 1, 1)
    score = weight * (((w - target) - k * (w - ref_w)) ** 2).mean((1, 2, 3))
    torch.testing.assert_close(dspo_loss(*tensors, beta=2.0, score_weight=0.7, weight=weight), score)


# ---- The safeguard --------------------------------------------------------------------------------------------------


def batch_gradients(tensors):
    """
    Gradients of the two errors, mean over the batch, with respect to the predictions, in one space: the noise is
    shared.
    """
    return 2 * (tensors[0] - tensors[4]) / (B * D), 2 * (tensors[1] - tensors[5]) / (B * D)


@pytest.mark.parametrize("mu", [0.0, 0.5, 0.9])
def test_safeguard_is_the_bound(mu):
    """Where it bites, a step against gA - lambda gB changes the chosen error by exactly -mu |gA|^2, to first order."""
    tensors = predictions(10)
    tensors[1] = tensors[0] + (tensors[0] - tensors[4]) + 0.1 * tensors[1]  # residuals that point the same way
    g_a, g_b = batch_gradients(tensors)
    scale = safeguard_scale(tensors[0] - tensors[4], tensors[1] - tensors[5], mu=mu)
    assert 0 < scale < 1
    step = -g_a + scale * g_b
    assert ((step * g_a).sum() / (g_a * g_a).sum()).item() == pytest.approx(-mu, abs=1e-12)


def test_safeguard_at_its_ends():
    """
    1 where the residuals do not point the same way; 1 - mu where they are equal; never more than 1; never negative.
    """
    a = predictions(11)[0]
    for other in (-a, torch.zeros_like(a)):
        assert safeguard_scale(a, other, mu=0.9).item() == 1
    torch.testing.assert_close(safeguard_scale(a, a, mu=0.9).item(), 0.1)
    assert safeguard_scale(a, 0.01 * a, mu=0.9).item() == 1
    assert safeguard_scale(a, a, mu=1.0).item() == 0
    assert safeguard_scale(torch.zeros_like(a), torch.zeros_like(a), mu=0.5).item() == 1


@pytest.mark.parametrize("scale", [1e-30, 1e-6, 1e30])
def test_safeguard_does_not_depend_on_the_size_of_the_residuals(scale):
    """In float32 too, where the squares of 1e-30 are 0."""
    a, b = predictions(12)[:2]
    b = a + 0.5 * b
    expected = safeguard_scale(a, b, mu=0.3).item()
    got = safeguard_scale((scale * a).float(), (scale * b).float(), mu=0.3).item()
    assert 0 < expected < 1 and got == pytest.approx(expected, rel=1e-5)


def test_safeguard_in_half_precision():
    """
    float16 residuals give what float32 gives: their sums of squares are not taken in float16, where they underflow.
    """
    a, b = predictions(12, scale=1e-4)[:2]
    b = (a + 0.5 * b).half()
    a = a.half()
    assert (a * a).sum() < 1e-5  # float16 itself has next to nothing left
    got = safeguard_scale(a, b, mu=0.3)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, safeguard_scale(a.float(), b.float(), mu=0.3), rtol=0, atol=0)


def test_safeguard_of_each_pair():
    """With `per_pair` a pair's scale is that of the pair alone."""
    a, b = predictions(13)[:2]
    b = a + 0.5 * b
    alone = [safeguard_scale(a[i : i + 1], b[i : i + 1], mu=0.3) for i in range(B)]
    torch.testing.assert_close(safeguard_scale(a, b, mu=0.3, per_pair=True), torch.stack(alone))


@every_loss
def test_safeguard_scales_a_gradient_and_no_value(loss, kwargs):
    """The losses and the chosen gradient stay bit for bit; the rejected gradient is multiplied by the scale."""
    tensors = predictions(14)
    tensors[1] = tensors[0] + 0.5 * tensors[1]
    scale = safeguard_scale(tensors[0] - tensors[4], tensors[1] - tensors[5], mu=0.3)
    assert 0 < scale < 1
    losses, w, l = with_gradient(loss, tensors, **kwargs)  # noqa: E741
    safe, safe_w, safe_l = with_gradient(loss, tensors, safeguard_mu=0.3, **kwargs)
    assert torch.equal(losses, safe) and torch.equal(w, safe_w)
    torch.testing.assert_close(safe_l, scale * l, rtol=1e-12, atol=0)


# ---- Precision and extremes -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_errors_are_not_reduced_in_half_precision(dtype):
    """
    Predictions in 16 bits: an untrained policy has u = 0, and the loss is log 2 in float32. A reference error reduced
    in its own precision would be off by up to 16 in u at beta 5000.
    """
    tensors = predictions(15, policy_is_reference=True)
    tensors = [tensor.to(dtype) for tensor in tensors[:4]] + [tensor.float() for tensor in tensors[4:]]
    losses = diffusion_dpo_loss(*tensors, beta=5000.0)
    assert losses.dtype == torch.float32
    assert (losses - math.log(2)).abs().max() < 1e-7
    # What the released code does: the policy's error in float32, the reference's in 16 bits.
    low = [(F.mse_loss(tensors[i], tensors[4].to(dtype), reduction="none").mean((1, 2, 3))) for i in (2, 3)]
    high = [(tensors[i].float() - tensors[4]).square().mean((1, 2, 3)) for i in (0, 1)]
    assert (2500 * ((high[0] - low[0]) - (high[1] - low[1]))).abs().max() > 0.05


@every_loss
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_extreme_inputs(loss, kwargs, dtype):
    """
    Every finite input has a finite loss and a finite gradient (in float32, where that of a 16-bit prediction is
    taken); a pair that is utterly wrong still has one.
    """
    largest = torch.finfo(dtype).max
    values = [0.0, 1e-6, 1.0, -30.0, largest, -largest]
    columns = torch.tensor(values, dtype=dtype)
    grid = torch.cartesian_prod(columns, columns, columns)
    w, l, ref = (grid[:, i].view(-1, 1, 1).expand(-1, 2, 2) for i in range(3))  # noqa: E741
    target = torch.full_like(w, 0.5)
    tensors = [w, l, ref, ref.flip(0), target, target]
    tensors[:2] = (tensor.to(torch.promote_types(dtype, torch.float32)) for tensor in tensors[:2])
    losses, w_grad, l_grad = with_gradient(loss, tensors, **kwargs)
    assert torch.isfinite(losses).all() and torch.isfinite(w_grad).all() and torch.isfinite(l_grad).all()

    wrong = [torch.full((1, 1, 2, 2), v, dtype=dtype) for v in (20.0, 1.0, 1.0, 20.0, 0.0, 0.0)]
    _, gradient, _ = with_gradient(diffusion_dpo_loss, wrong, beta=5000.0)
    assert gradient.abs().max() > 0


@every_loss
def test_dtype(loss, kwargs):
    """float32 in, float32 out; float64 if any input is."""
    tensors = predictions(dtype=torch.float32)
    assert loss(*tensors, **kwargs).dtype == torch.float32
    assert loss(tensors[0].double(), *tensors[1:], **kwargs).dtype == torch.float64


# ---- What is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "loss, kwargs, message",
    [
        (diffusion_dpo_loss, dict(beta=0.0), "beta must be a finite number greater than 0, got 0.0"),
        (diffusion_dpo_loss, dict(beta=math.nan), "beta must be"),
        (diffusion_dpo_loss, dict(beta=True), "beta must be"),
        (diffusion_dpo_loss, dict(beta=1.0, loss_type="cpo"), "loss_type must be one of 'sigmoid', 'hinge'"),
        (diffusion_dpo_loss, dict(beta=1.0, label_smoothing=0.5), r"label_smoothing must be in \[0, 0.5\)"),
        (diffusion_dpo_loss, dict(beta=1.0, loss_type="dmpo"), "needs a label_smoothing greater than 0"),
        (diffusion_dpo_loss, dict(beta=1.0, loss_type="ipo", label_smoothing=0.1), "has no effect on loss_type='ipo'"),
        (diffusion_dpo_loss, dict(beta=1.0, safeguard_mu=1.5), r"safeguard_mu must be a number in \[0, 1\]"),
        (dspo_loss, dict(beta=-1.0), "beta must be"),
        (dspo_loss, dict(beta=5000.0), "beta must be greater than 0 and less than 2.*Give score_weight"),
        (dspo_loss, dict(beta=5000.0, score_weight=2.0), "score_weight must be greater than 0 and less than 2"),
        (dspo_loss, dict(beta=1.0, score_weight=0.5, variant="squared"), "has no effect with variant='squared'"),
        (dspo_loss, dict(beta=1.0, variant="brier"), "variant must be one of 'score', 'squared'"),
    ],
)
def test_bad_hyperparameters(loss, kwargs, message):
    with pytest.raises(ValueError, match=message):
        loss(*predictions(), **kwargs)


@pytest.mark.parametrize("mu", [-0.1, 1.5, math.nan, True, "0.9"])
def test_bad_mu(mu):
    """Each function names its own argument."""
    residual = torch.ones(2, 1, 2, 2)
    with pytest.raises(ValueError, match=r"^mu must be a number in \[0, 1\], got "):
        safeguard_scale(residual, residual, mu=mu)
    with pytest.raises(ValueError, match=r"^safeguard_mu must be a number in \[0, 1\], got "):
        pair_errors(*predictions(), safeguard_mu=mu)
    with pytest.raises(ValueError, match=r"same shape, got \(2, 1, 2, 2\) and \(1, 1, 2, 2\)"):
        safeguard_scale(residual, residual[:1], mu=0.5)


@pytest.mark.parametrize("loss", [diffusion_dpo_loss, dspo_loss])
def test_bad_tensors(loss):
    tensors = predictions()
    with pytest.raises(
        ValueError, match=r"same shape, got chosen_pred \(3, 2, 4, 4\).*rejected_target \(2, 2, 4, 4\)"
    ):
        loss(*tensors[:5], tensors[5][:2], beta=1.0)
    with pytest.raises(ValueError, match="rejected_pred must be a floating-point tensor, got torch.int64"):
        loss(tensors[0], tensors[1].long(), *tensors[2:], beta=1.0)
    with pytest.raises(ValueError, match="must have a batch dimension and others"):
        loss(*[tensor[0, 0, 0] for tensor in tensors], beta=1.0)


def test_every_loss_type_is_tested():
    assert {kwargs.get("loss_type", "sigmoid") for kwargs in DPO.values()} == set(LOSS_TYPES)
