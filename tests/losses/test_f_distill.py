"""The f-distill loss and its weights (arXiv 2502.15681) against definitions, closed forms and DMD."""

import doctest
import math

import pytest
import torch

from trl_ext.losses import (
    DIVERGENCES,
    INADMISSIBLE_DIVERGENCES,
    density_ratio_weight,
    f_distill,
    f_distill_loss,
    get_divergence,
)


WEIGHTED = [*DIVERGENCES, "pearson", "le_cam"]

# h(r) = r^2 f''(r) of the released code's names, by the name here.
PUBLISHED = {
    "kl_student_teacher": lambda r: torch.ones_like(r),
    "kl_teacher_student": lambda r: r,
    "js": lambda r: r / (1 + r),
    "hellinger": lambda r: r.sqrt() / 2,
    "jeffreys": lambda r: 1 + r,
    "neyman": lambda r: 2 / r,
}


def batch(seed=0, size=5, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(3, size, 2, 4, 4, generator=generator, dtype=dtype)
    return *images, torch.randn(size, generator=generator, dtype=dtype)


@pytest.mark.parametrize("name", WEIGHTED)
def test_weight_is_r_squared_times_the_curvature_of_f(name):
    """Against central differences of the catalog's own f."""
    divergence = get_divergence(name, allow_inadmissible=True)
    r = torch.tensor([0.05, 0.3, 0.9, 1.0, 1.7, 6.0, 40.0], dtype=torch.float64)
    step = 1e-4 * r
    second = (divergence.f(r + step) - 2 * divergence.f(r) + divergence.f(r - step)) / step**2
    torch.testing.assert_close(density_ratio_weight(r.log(), name), r**2 * second, rtol=1e-5, atol=0)
    assert torch.equal(density_ratio_weight(r.log(), divergence), density_ratio_weight(r.log(), name))


@pytest.mark.parametrize("name", list(PUBLISHED))
def test_weights_of_the_released_code(name):
    r = torch.tensor([0.1, 0.5, 1.0, 3.0, 20.0], dtype=torch.float64)
    torch.testing.assert_close(density_ratio_weight(r.log(), name), PUBLISHED[name](r), rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", WEIGHTED)
def test_gradient_of_the_divergence_is_the_weighted_score_difference(name):
    """
    d/dtheta D_f(p || q_theta) = -E_q[h(r) (s_p - s_q) dx/dtheta] for a Gaussian student of mean m and scale s against
    the standard normal teacher, by quadrature; the left side by differences of D_f = E_q[f(p / q)].
    """
    divergence = get_divergence(name, allow_inadmissible=True)
    x = torch.linspace(-12, 12, 20001, dtype=torch.float64)
    log_p = -x.square() / 2

    def log_q(m, s):
        return -((x - m) / s).square() / 2 - math.log(s)

    def divergence_of(m, s):  # the densities lack 1 / sqrt(2 pi)
        return torch.trapezoid(log_q(m, s).exp() * divergence.value(log_p - log_q(m, s)), x)

    m, s, step = 0.2, 0.9, 1e-4
    q, log_ratio = log_q(m, s).exp(), log_p - log_q(m, s)
    scores = -x + (x - m) / s**2
    for direction, numeric in [
        (torch.ones_like(x), divergence_of(m + step, s) - divergence_of(m - step, s)),
        ((x - m) / s, divergence_of(m, s + step) - divergence_of(m, s - step)),
    ]:
        exact = -torch.trapezoid(q * density_ratio_weight(log_ratio, divergence) * scores * direction, x)
        assert exact.item() == pytest.approx(numeric.item() / (2 * step), rel=1e-5)


def test_kl_to_the_student_has_the_closed_form_gradient():
    """
    KL(N(0, 1) || N(m, s)) = log s + (1 + m^2) / (2 s^2) - 1/2 moves the mean by m / s^2: forward KL of a student.
    """
    x = torch.linspace(-12, 12, 20001, dtype=torch.float64)
    m, s = 0.7, 1.3
    log_q = -((x - m) / s).square() / 2 - math.log(s)
    weight = density_ratio_weight(-x.square() / 2 - log_q, "kl_teacher_student")
    gradient = -torch.trapezoid(log_q.exp() * weight * (-x + (x - m) / s**2), x) / math.sqrt(2 * math.pi)
    assert gradient.item() == pytest.approx(m / s**2, rel=1e-9)


def dmd_loss(student, teacher, fake):
    """DMD's distribution matching loss as published, of each sample."""
    divisor = (student - teacher).abs().mean(dim=(1, 2, 3), keepdim=True) + 1e-6
    target = (student - (fake - teacher) / divisor).detach()
    return 0.5 * (student - target).square().mean(dim=(1, 2, 3))


def test_weight_one_is_dmd():
    student, teacher, fake, log_ratio = batch()
    student.requires_grad_()
    loss = f_distill_loss(student, teacher, fake, log_ratio, divergence="kl_student_teacher")
    expected = dmd_loss(student, teacher, fake)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    grads = [torch.autograd.grad(value.sum(), student)[0] for value in (loss, expected)]
    torch.testing.assert_close(*grads, rtol=1e-10, atol=1e-15)
    # In every bit: the log-ratios do not enter.
    other = f_distill_loss(student, teacher, fake, 5 * log_ratio.flip(0), divergence="forward_kl")
    assert torch.equal(loss, other)


def test_gradients():
    """
    w (fake - teacher) / numel to the student, with w = h / mean h / (mean |student - teacher| + 1e-6); none elsewhere.
    """
    student, teacher, fake, log_ratio = (x.requires_grad_() for x in batch())
    f_distill_loss(student, teacher, fake, log_ratio, divergence="js").sum().backward()
    h = log_ratio.detach().clamp(math.log(0.1), math.log(20)).sigmoid()
    weight = h / h.mean() / ((student - teacher).abs().mean(dim=(1, 2, 3)) + 1e-6)
    expected = weight.view(-1, 1, 1, 1) * (fake - teacher) / student[0].numel()
    torch.testing.assert_close(student.grad, expected.detach(), rtol=1e-12, atol=1e-16)
    assert teacher.grad is None and fake.grad is None and log_ratio.grad is None


def test_value_by_hand():
    """Ratios 1 and 3 under JS have h = 1/2 and 3/4, mean 5/8: weights 0.8 and 1.2 of DMD's step 0.2 / 0.5."""
    student, teacher, fake = (torch.full((2, 1, 2, 2), value) for value in (1.0, 0.5, 0.7))
    log_ratio = torch.tensor([1.0, 3.0]).log()
    loss = f_distill_loss(student, teacher, fake, log_ratio, divergence="js")
    assert loss.tolist() == pytest.approx([(0.8 * 0.4) ** 2 / 2, (1.2 * 0.4) ** 2 / 2], rel=1e-4)
    loss = f_distill_loss(student, teacher, fake, log_ratio, divergence="js", normalize_weights=False)
    assert loss.tolist() == pytest.approx([(0.5 * 0.4) ** 2 / 2, (0.75 * 0.4) ** 2 / 2], rel=1e-4)


def test_a_constant_error_of_the_log_ratios_cancels_for_powers():
    student, teacher, fake, log_ratio = batch()

    def loss(shift, name, **options):
        return f_distill_loss(student, teacher, fake, log_ratio + shift, divergence=name, **options)

    for name in ("kl_teacher_student", "hellinger"):
        torch.testing.assert_close(loss(3.0, name, ratio_range=None), loss(0.0, name, ratio_range=None))
    torch.testing.assert_close(
        loss(0.7, "neyman", ratio_range=(1e-9, 1e9)), loss(0.0, "neyman", ratio_range=(1e-9, 1e9))
    )
    assert not torch.allclose(loss(3.0, "js", ratio_range=None), loss(0.0, "js", ratio_range=None))
    # Equal log-ratios: every weight is 1.
    assert torch.equal(
        f_distill_loss(student, teacher, fake, torch.full_like(log_ratio, 0.3), divergence="js"),
        f_distill_loss(student, teacher, fake, log_ratio, divergence="kl_student_teacher"),
    )


@pytest.mark.parametrize("name", WEIGHTED)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_extreme_inputs(name, dtype):
    student, teacher, fake, _ = batch(dtype=dtype, size=4)
    largest = torch.finfo(dtype).max
    log_ratio = torch.tensor([-1e4, -30.0, 30.0, 1e4], dtype=dtype)
    student[1], teacher[2], fake[3] = largest, -largest, largest
    student.requires_grad_()
    # Weights over 60 orders of magnitude, not brought to a mean of 1, leave float16 with the gradient that they scale.
    wide = dict(normalize_weights=False, ratio_range=(1e-30, 1e30))
    for options in ({}, wide)[: 1 if dtype == torch.float16 else 2]:
        loss = f_distill_loss(student, teacher, fake, log_ratio, divergence=name, **options)
        (grad,) = torch.autograd.grad(loss.mean(), student)
        assert loss.dtype == torch.promote_types(dtype, torch.float32) and loss.shape == (4,)
        assert loss.isfinite().all() and grad.isfinite().all() and (grad != 0).any()
    weight = density_ratio_weight(log_ratio, name)
    assert weight.isfinite().all() and (weight >= 0).all()


def test_half_precision_is_computed_in_float32():
    inputs = [x.half() for x in batch()]
    half = f_distill_loss(*inputs, divergence="js")
    full = f_distill_loss(*(x.float() for x in inputs), divergence="js")
    assert torch.equal(half, full)


def test_batch_order():
    inputs, order = batch(), torch.tensor([3, 0, 4, 1, 2])
    loss = f_distill_loss(*inputs, divergence="jeffreys")
    torch.testing.assert_close(f_distill_loss(*(x[order] for x in inputs), divergence="jeffreys"), loss[order])


def test_fit_of_one_gaussian_to_two_modes():
    """
    Gradient descent on m and s by the weighted score difference, exact on a grid, after noise of 0.7. KL(teacher ||
    student) returns the moments of 0.6 N(-1.5, 0.7) + 0.4 N(2, 0.5), which are -0.1 and 1.83; "rkl" narrows to the
    larger mode where the noise is small.
    """
    x = torch.linspace(-14, 14, 1401, dtype=torch.float64)

    def normal(mean, std):
        return (-((x - mean) / std).square() / 2 - math.log(std)).exp() / math.sqrt(2 * math.pi)

    def fit(name, noise):
        p = 0.6 * normal(-1.5, math.hypot(0.7, noise)) + 0.4 * normal(2.0, math.hypot(0.5, noise))
        teacher_score = torch.gradient(p.log(), spacing=(x,))[0]
        m, s = -1.0, 1.0
        for _ in range(1500):
            width = math.hypot(s, noise)
            q = normal(m, width)
            weight = density_ratio_weight(p.log() - q.log(), name)
            force = -q * weight * (teacher_score + (x - m) / width**2)
            m -= 0.1 * torch.trapezoid(force, x).item()
            s -= 0.1 * torch.trapezoid(force * s * (x - m) / width**2, x).item()
        return m, s

    mean, std = fit("kl_teacher_student", 0.7)
    assert mean == pytest.approx(-0.1, abs=1e-3)
    assert std == pytest.approx(math.sqrt(0.6 * (0.49 + 2.25) + 0.4 * (0.25 + 4) - 0.01), abs=1e-3)
    mean, std = fit("kl_student_teacher", 0.1)
    assert mean == pytest.approx(-1.5, abs=0.05) and std == pytest.approx(0.7, abs=0.05)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(ratio_range=(20, 0.1)), r"ratio_range must be two positive numbers.*\(20, 0.1\)"),
        (dict(ratio_range=(0, 20)), "ratio_range must be two positive numbers"),
        (dict(ratio_range=(0.1, math.inf)), "ratio_range must be two positive numbers"),
        (dict(ratio_range=3.0), "ratio_range must be a pair"),
        (dict(divergence="neyman", ratio_range=None), r"ratio_range=None.*Neyman.*tends to 0"),
        (dict(divergence="chi2", ratio_range=None), r"ratio_range=None.*Pearson.*tends to infinity"),
        (dict(divergence="total_variation"), "'total_variation' cannot be used in f-distill"),
        (dict(divergence="rkl"), "Unknown divergence 'rkl'"),
        (dict(log_ratio=torch.zeros(5, 2, 2)), r"log_ratio must have one number a sample.*Average a map"),
        (dict(log_ratio=torch.zeros(5, dtype=torch.long)), "log_ratio must be a floating-point"),
        (dict(fake_x0=torch.zeros(5, 2, 4, 3)), r"same shape.*fake_x0 \(5, 2, 4, 3\)"),
        (dict(student_x0=torch.zeros(5)), "student_x0 must have a batch dimension"),
        (dict(teacher_x0=torch.zeros(5, 2, 4, 4, dtype=torch.long)), "teacher_x0 must be a floating-point"),
    ],
)
def test_bad_input(options, message):
    names = ("student_x0", "teacher_x0", "fake_x0", "log_ratio")
    arguments = dict(zip(names, batch(), strict=True)) | dict(divergence="js") | options
    with pytest.raises(ValueError, match=message):
        f_distill_loss(**arguments)


def test_unbounded_weights_without_a_range():
    """Every divergence whose h is at most c (1 + r) needs no range; the mean of the others may be infinite."""
    refused = set()
    for name in [*DIVERGENCES, *INADMISSIBLE_DIVERGENCES]:
        try:
            f_distill_loss(*batch(), divergence=name, ratio_range=None)
        except ValueError:
            refused.add(name)
    assert refused == {"neyman", "chi_po", "pearson", "total_variation"}


def test_nan_is_not_hidden():
    student, teacher, fake, log_ratio = batch()
    log_ratio[1] = math.nan
    assert f_distill_loss(student, teacher, fake, log_ratio, divergence="js").isnan().any()


@pytest.mark.parametrize("documented", [density_ratio_weight, f_distill_loss], ids=lambda value: value.__name__)
def test_examples_in_the_documentation(documented):
    text = documented.__doc__.replace("```python", "").replace("```", "")
    example = doctest.DocTestParser().get_doctest(text, vars(f_distill).copy(), documented.__name__, None, 0)
    assert doctest.DocTestRunner(verbose=False).run(example).failed == 0
