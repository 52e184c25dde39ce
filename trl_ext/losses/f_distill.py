r"""
f-distill: one-step students of a diffusion model by f-divergence matching.

Source: *One-step Diffusion Models with f-Divergence Distribution Matching*, https://huggingface.co/papers/2502.15681.

Notation: `p` is the teacher's density of noised images and `q` the student's, `r = p / q` their ratio, teacher over
student. A divergence of [`get_divergence`] is read as `D_f(teacher || student) = E_student[f(r)]`: the TEACHER takes
the place that the policy has in f-DPO, and the STUDENT that of the reference. Its gradient is

    grad D_f = -E_student[ h(r) (score_teacher - score_student) dx/dtheta ],    h(r) = r^2 f''(r)

| `divergence` here | name in the released code | h(r), up to a factor | |
|---|---|---|---|
| `"kl_student_teacher"`, which is `"forward_kl"` | `rkl` | 1 | DMD, mode-seeking |
| `"kl_teacher_student"`, which is `"reverse_kl"` | `kl` | r | matches mean and variance |
| `"js"` | `js` | r / (1 + r) | |
| `"hellinger"` | `sh` | sqrt(r) | |
| `"jeffreys"` | `jf` | 1 + r | |
| `"neyman"` | `neyman` | 1 / r | unbounded as r -> 0 |
"""

import math

import torch

from ._inputs import is_number, prepare_inputs
from .f_divergence import Divergence, get_divergence


# The two KL divergences under names that state their direction; "reverse" and "forward" refer to f-DPO's policy.
_SIDES = {"kl_teacher_student": "reverse_kl", "kl_student_teacher": "forward_kl"}


def density_ratio_weight(log_ratio: torch.Tensor, divergence: str | Divergence) -> torch.Tensor:
    r"""
    `h(r) = r^2 f''(r)`, the weight of the score difference in f-distill (https://huggingface.co/papers/2502.15681),
    with `r = p_teacher / p_student` and `D_f(teacher || student) = E_student[f(r)]`.

    Args:
        log_ratio (`torch.Tensor` of any shape):
            `log p_teacher - log p_student` of the student's noised samples, in nats: a discriminator's logit for "from
            the teacher".
        divergence (`str` or [`Divergence`]):
            An instance, or any name that [`get_divergence`] knows, including those that f-DPO refuses. The names
            `"kl_teacher_student"` (`h = r`) and `"kl_student_teacher"` (`h = 1`) state the direction of the KL.

    Returns:
        `torch.Tensor` of the same shape, in float32, or float64 if the input is, without gradient. A weight beyond the
        range of that dtype saturates at its largest finite number.

    Raises:
        ValueError: if `log_ratio` is not floating-point, the name is unknown, or the divergence has no weight (total
            variation).

    Example: an image that is three times as likely under the teacher has the JS weight `3 / (1 + 3)`.

    ```python
    >>> density_ratio_weight(torch.tensor([3.0]).log(), "js")
    tensor([0.7500])
    ```
    """
    divergence = _checked_divergence(divergence)
    (log_ratio,) = prepare_inputs(log_ratio=log_ratio)
    return _log_weight(divergence, log_ratio).exp().clamp(max=torch.finfo(log_ratio.dtype).max).to(log_ratio.dtype)


def f_distill_loss(
    student_x0: torch.Tensor,
    teacher_x0: torch.Tensor,
    fake_x0: torch.Tensor,
    log_ratio: torch.Tensor,
    *,
    divergence: str | Divergence,
    ratio_range: tuple[float, float] | None = (0.1, 20),
    normalize_weights: bool = True,
) -> torch.Tensor:
    r"""
    f-distill loss of each sample, from https://huggingface.co/papers/2502.15681, on top of DMD2
    (https://huggingface.co/papers/2405.14867).

    With `x` the student's sample and `d = fake_x0 - teacher_x0`, which is proportional to the difference of the two
    scores at the noised sample,

        L = 1/2 mean (x - sg(x - w d))^2,    w = h(r) / (mean |x - teacher_x0| + 1e-6),

    with means over the dimensions of a sample; the gradient is `w d / numel`. At `h = 1` this is DMD's loss. The
    divisor is DMD's as well. It depends on the sample, so neither this gradient nor DMD's is exactly that of a
    divergence.

    Args:
        student_x0 (`torch.Tensor` of shape `(B, ...)`):
            The student's samples, with gradient.
        teacher_x0 (`torch.Tensor` of shape `(B, ...)`):
            The teacher's prediction of the clean image from the noised sample (not of the noise, nor of v). No
            gradient goes to it.
        fake_x0 (`torch.Tensor` of shape `(B, ...)`):
            The same prediction by the network that is trained on the student's samples. No gradient goes to it.
        log_ratio (`torch.Tensor` of shape `(B,)`):
            `log p_teacher - log p_student` of each noised sample, as for [`density_ratio_weight`]. If the
            discriminator scores patches, average the logits of a sample first, which gives the logarithm of the
            geometric mean of its ratios.
        divergence (`str` or [`Divergence`]):
            `D_f(teacher || student)`, as for [`density_ratio_weight`].
        ratio_range (`tuple[float, float]`, *optional*, defaults to `(0.1, 20)`):
            Range that the ratio is clipped to. `None` does not clip; it is refused if the mean of `h` may be infinite.
        normalize_weights (`bool`, *optional*, defaults to `True`):
            Divide `h` by its mean over the batch, as published. A constant error of the log-ratios then cancels, if
            `h` is a power.

    Returns:
        `torch.Tensor` of shape `(B,)`: the losses, in float32, or float64 if an input is.

    Raises:
        ValueError: if the shapes differ, `log_ratio` does not have one number per sample, an input is not
            floating-point, `ratio_range` is not an increasing pair of positive numbers, or the divergence has no
            weight, or one that needs a `ratio_range`.

    Example: a student's sample 1, a teacher that predicts 0.5 and a fake score that predicts 0.7: `d = 0.2`, DMD's
    divisor is 0.5, and at weight 1 the loss is `(0.2 / 0.5)^2 / 2 = 0.08`.

    ```python
    >>> student, teacher, fake = (torch.full((1, 4, 8, 8), value) for value in (1.0, 0.5, 0.7))
    >>> f_distill_loss(student, teacher, fake, torch.zeros(1), divergence="kl_student_teacher")
    tensor([0.0800])
    ```
    """
    divergence = _checked_divergence(divergence)
    if student_x0.dim() < 2:
        raise ValueError(
            f"student_x0 must have a batch dimension and others, got the shape {tuple(student_x0.shape)}."
        )
    if log_ratio.shape != student_x0.shape[:1]:
        raise ValueError(
            f"log_ratio must have one number a sample, the shape {tuple(student_x0.shape[:1])}, got "
            f"{tuple(log_ratio.shape)}. Average a map of logits over each sample first."
        )
    (log_ratio,) = prepare_inputs(log_ratio=log_ratio)
    student, teacher, fake = prepare_inputs(student_x0=student_x0, teacher_x0=teacher_x0, fake_x0=fake_x0)
    dtype = torch.promote_types(student.dtype, log_ratio.dtype)
    # Squares of numbers up to this bound, and means of such squares, are finite.
    bound = math.sqrt(torch.finfo(dtype).max) / 16
    student, teacher, fake = (x.to(dtype).clamp(-bound, bound) for x in (student, teacher.detach(), fake.detach()))

    with torch.no_grad():
        log_weight = _log_weight(divergence, _clip(log_ratio, ratio_range, divergence))
        if normalize_weights:
            # Scaled by the largest weight first, which leaves the ratio to the mean unchanged and avoids overflow.
            weight = (log_weight - log_weight.amax()).exp()
            weight = weight / weight.mean()
        else:
            weight = log_weight.exp()
        per_sample = (-1, *[1] * (student.dim() - 1))
        distance = (student - teacher).abs().flatten(1).mean(1)
        weight = (weight / (distance + 1e-6)).clamp(max=torch.finfo(dtype).max).to(dtype)
        step = (weight.view(per_sample) * (fake - teacher)).clamp(-bound, bound)
    # The value and the gradient of (x - sg(x - step))^2 / 2, without the rounding of x - (x - step).
    loss = step.square() / 2 + step * (student - student.detach())
    return loss.flatten(1).mean(1)


def _checked_divergence(divergence: str | Divergence) -> Divergence:
    name = divergence
    if isinstance(divergence, str):
        divergence = _SIDES.get(divergence, divergence)
    divergence = get_divergence(divergence, allow_inadmissible=True)
    if divergence.curvature == 0:
        raise ValueError(
            f"divergence {name!r} cannot be used in f-distill: its f'' is 0, and so is every gradient. Choose another "
            "one."
        )
    return divergence


def _log_weight(divergence: Divergence, log_ratio: torch.Tensor) -> torch.Tensor:
    """`log h`, in float64 where the device has it: `log_weight` is the logarithm of `r f''(r)`."""
    log_ratio = log_ratio.detach()
    if log_ratio.device.type != "mps":
        log_ratio = log_ratio.double()
    return log_ratio + divergence.log_weight(log_ratio)


def _clip(log_ratio: torch.Tensor, ratio_range, divergence: Divergence) -> torch.Tensor:
    if ratio_range is None:
        # E_student[h] is finite for all pairs of densities if h <= c (1 + r), as E_student[r] = 1.
        far = torch.tensor([-1e8, 1e8], dtype=torch.float64)
        low, high = (_log_weight(divergence, far) - far.clamp(min=0)).tolist()
        if low > 100 or high > 100:
            raise ValueError(
                f"ratio_range=None, but the weight of {divergence!r} is unbounded as the ratio tends to "
                f"{'0' if low > 100 else 'infinity'}: its mean may be infinite. Give a range, such as (0.1, 20)."
            )
        return log_ratio
    try:
        low, high = ratio_range
    except (TypeError, ValueError):
        raise ValueError(f"ratio_range must be a pair of numbers or None, got {ratio_range!r}.") from None
    if not (is_number(low) and is_number(high) and 0 < low < high):
        raise ValueError(f"ratio_range must be two positive numbers, the smaller one first, got {ratio_range!r}.")
    return log_ratio.clamp(math.log(low), math.log(high))
