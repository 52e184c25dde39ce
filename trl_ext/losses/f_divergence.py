"""
DPO under a general f-divergence: the divergences, their tails, and the pair loss.

Source: *Beyond Reverse KL: Generalizing Direct Preference Optimization with Diverse Divergence Constraints* (f-DPO),
https://huggingface.co/papers/2309.16240.

Notation, used throughout: `u = pi(y|x) / pi_ref(y|x)` is the ratio of the policy to the reference for one response,
`l = log u` its log-ratio in nats, summed (never averaged) over the tokens of the response. A divergence
`D_f(pi || pi_ref) = E_{pi_ref}[f(u)]` enters the loss only through its score `g(l) = f'(e^l)`, and the gradient only
through its weight `h(l) = dg/dl = u f''(u)`.

Both grow like `e^{-l}` for forward KL, so they leave the range of any float format long before a log-ratio becomes
unusual (200 tokens at half a nat each make `l = -100`). Everything here that feeds the loss is therefore carried as a
logarithm: `log h`, and `log |g(l_w) - g(l_l)|`.
"""

import functools
import inspect
import math
from collections.abc import Callable
from numbers import Real

import torch
import torch.nn.functional as F


# Scores that float32 cannot represent saturate this far below the largest finite number, so that the logged mean of up
# to 1024 of them is still finite.
_SCORE_HEADROOM = 2.0**-10

_UNBOUNDED_BELOW = (
    "The score would not tend to -inf as l -> -inf, which f-DPO needs to recover the optimum of the constrained "
    "problem. Adding a positive multiple of reverse KL restores that: 'chi_po' is chi-squared repaired in this way."
)


def _working_dtype(device: torch.device) -> torch.dtype:
    # A few float64 operations on one number per response are free, and they keep the rounding of a logarithm (1e-5 of
    # its exponential in float32) below float32 precision. MPS has no float64.
    return torch.float32 if device.type == "mps" else torch.float64


def _result_dtype(*tensors: torch.Tensor) -> torch.dtype:
    return functools.reduce(torch.promote_types, (tensor.dtype for tensor in tensors), torch.float32)


def _saturate(value: torch.Tensor, dtype: torch.dtype, headroom: float = 1.0) -> torch.Tensor:
    """Casts to `dtype`; values out of range become the largest finite number (times `headroom`), not infinity."""
    limit = torch.finfo(dtype).max * headroom
    return value.clamp(-limit, limit).to(dtype)


def _elementwise(method: Callable | None = None, *, saturate: bool = False) -> Callable:
    """Runs a method in the working precision; its result is float32, or float64 if an argument is."""
    if method is None:
        return functools.partial(_elementwise, saturate=saturate)

    @functools.wraps(method)
    def wrapped(self, *values):
        tensors = [torch.as_tensor(value) for value in values]
        dtype = _result_dtype(*tensors)
        result = method(self, *(tensor.to(_working_dtype(tensor.device)) for tensor in tensors))
        return _saturate(result, dtype, _SCORE_HEADROOM) if saturate else result.to(dtype)

    return wrapped


def _check_number(name: str, value: float) -> float:
    if isinstance(value, bool) or not isinstance(value, Real) or not math.isfinite(value):
        raise ValueError(f"{name} must be a finite number, got {value!r}.")
    return float(value)


def _check_positive(name: str, value: float) -> float:
    value = _check_number(name, value)
    if value <= 0:
        raise ValueError(f"{name} must be greater than 0, got {value!r}.")
    return value


def _expm1_ratio(x: torch.Tensor) -> torch.Tensor:
    """`(e^x - 1) / x`, which is 1 at 0, with the exponent held inside the range of the dtype."""
    small = x.abs() < 1e-8
    # `torch.where` differentiates both branches, so the unused one must not divide by zero.
    x_safe = torch.where(small, torch.ones_like(x), x.clamp(max=math.log(torch.finfo(x.dtype).max)))
    return torch.where(small, 1 + x / 2, torch.expm1(x_safe) / x_safe)


def _power_integral(power: float, logratio: torch.Tensor) -> torch.Tensor:
    r"""`\int_0^l e^{power t} dt`, infinite where it leaves the range of the dtype and at infinite `l`; never NaN."""
    # Below the smallest normal number `power * l` would lose its digits, and is nothing beside 1.
    return logratio if abs(power) < 1e-300 else torch.expm1(power * logratio) / power


def _power_value(rate: float, logratio: torch.Tensor) -> torch.Tensor:
    """
    `f(e^l)` of the alpha-divergence of `alpha = rate` at `l <= 0`, `-inf` included.

    `(u^{1-a} - (1-a) u - a) / (a (a-1))` is the second divided difference of `t -> e^{tl}` at the nodes 0, 1 and `1 -
    a`. Near `l = 0`, where its terms cancel to `l^2 / 2`, it is summed as a series in the complete homogeneous
    polynomials of `l` and `(1-a) l`.
    """
    power = 1 - rate
    near = logratio.abs() * max(1.0, abs(power)) < 0.125
    first = torch.where(near, logratio, 0.0)
    second = power * first
    polynomial, last = torch.ones_like(first), torch.ones_like(first)
    series = torch.full_like(first, 0.5)
    for n in range(1, 11):
        last = last * second
        polynomial = polynomial * first + last
        series = series + polynomial / math.factorial(n + 2)

    if rate <= 0.5:
        # e^l int_0^l e^{-at} dt, with the larger of the two exponentials in front: it vanishes where the other is
        # large.
        front = torch.exp((power if rate > 0 else 1.0) * logratio)
        raised = front * torch.where(front == 0, 0.0, _power_integral(abs(rate), logratio))
        far = (raised - torch.expm1(logratio)) / power
    else:
        far = (torch.expm1(logratio) - _power_integral(power, logratio)) / rate
    return torch.where(near, first.square() * series, far)


def _log1p_gap(x: torch.Tensor) -> torch.Tensor:
    """`x - log(1 + x)` for `x > -1`, without the cancellation at 0."""
    near = x.abs() < 0.25
    x_near = torch.where(near, x, 0.0)
    # log(1 + x) = 2 artanh(y) with y = x / (2 + x), and x - 2 y = x y.
    y = x_near / (2 + x_near)
    squared = y.square()
    series = torch.zeros_like(y)
    for n in range(9, -1, -1):
        series = 1 / (2 * n + 3) + squared * series
    return torch.where(near, y * (x_near - 2 * squared * series), x - torch.log1p(x))


def _log_power_margin(first: torch.Tensor, second: torch.Tensor, rate: float) -> torch.Tensor:
    r"""`log |\int e^{-rate t} dt|` between the two log-ratios."""
    distance = (first - second).abs()
    if rate == 0:
        return distance.log()
    x = abs(rate) * distance
    # The factor that remains after dividing by the larger of the two exponentials: log(1 - e^{-x}), with its limit at
    # 0.
    remainder = torch.where(x < 1e-8, distance.log() - x / 2, torch.log(-torch.expm1(-x)) - math.log(abs(rate)))
    # Clamped, so that equal log-ratios at the end of the dtype's range give -inf instead of inf - inf.
    exponent = torch.maximum(-rate * first, -rate * second).clamp(max=torch.finfo(first.dtype).max)
    return exponent + remainder


def _log_softplus(x: torch.Tensor) -> torch.Tensor:
    """`log log(1 + e^x)`, which is `x` where `e^x` underflows."""
    return torch.where(x < -40, x, torch.logaddexp(x, torch.zeros_like(x)).log())


def _quadrature(length: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Double-exponential nodes on `[0, length]` and the logarithm of their weights, in a new last dimension."""
    t = torch.linspace(-4, 4, 257, dtype=length.dtype, device=length.device)
    x = math.pi * torch.sinh(t)
    log_step = F.logsigmoid(x) + F.logsigmoid(-x) + torch.log(math.pi * torch.cosh(t) * (t[1] - t[0]))
    return length.unsqueeze(-1) * torch.sigmoid(x), length.unsqueeze(-1).log() + log_step


class _Value(torch.autograd.Function):
    """`f(e^l)`, whose gradient is the divergence's slope."""

    @staticmethod
    def forward(ctx, logratio, divergence):
        dtype = _result_dtype(logratio)
        ctx.dtype = logratio.dtype
        logratio = logratio.to(_working_dtype(logratio.device))
        ctx.save_for_backward(divergence._exact_slope(logratio))
        value = divergence.scaled_value(logratio) * logratio.clamp(min=0).exp()
        return _saturate(value, dtype, _SCORE_HEADROOM)

    @staticmethod
    def backward(ctx, grad_output):
        if torch.is_grad_enabled():
            # The saved slope would enter the second derivative as a constant.
            raise RuntimeError(
                "Divergence.value can be differentiated only once; call backward without create_graph=True."
            )
        (slope,) = ctx.saved_tensors
        largest = torch.finfo(slope.dtype).max
        return _saturate(grad_output.to(slope.dtype) * slope.clamp(-largest, largest), ctx.dtype), None


class Divergence:
    r"""
    An f-divergence as f-DPO uses it, as a function of the log-ratio `l = log u` (nats).

    To add your own, subclass it and define `score` and `log_weight`; both receive and return float64 tensors when they
    are called by the functions of this package. Everything else is derived from these two. Let a score that leaves the
    range of float64 become infinite instead of clamping it: the loss then integrates `log_weight`, whereas a clamped
    score looks like a flat one. `f` is optional: without it, `value` integrates `log_weight` as well, and `f` itself
    raises `NotImplementedError`.

    Attributes:
        name (`str`):
            Name of the divergence in errors and logs.

    Example: the KL divergence from the policy to the even mixture of policy and reference, `f(u) = u log(2u / (u+1))`.

    ```python
    >>> import math
    >>> import torch
    >>> import torch.nn.functional as F
    >>> from trl_ext.losses import Divergence, f_dpo_loss

    >>> class KLToMixture(Divergence):
    ...     name = "kl_to_mixture"
    ...
    ...     def score(self, logratio):  # f'(u) - f'(1) = log(2u / (1 + u)) + 1 / (1 + u) - 1/2
    ...         return math.log(2) + F.logsigmoid(logratio) + torch.sigmoid(-logratio) - 0.5
    ...
    ...     def log_weight(self, logratio):  # u f''(u) = 1 / (1 + u)^2
    ...         return 2 * F.logsigmoid(-logratio)

    >>> divergence = KLToMixture()
    >>> divergence.curvature, divergence.admissible
    (0.25, True)
    >>> f_dpo_loss(torch.tensor([0.5]), torch.tensor([-0.5]), beta=0.1, divergence=divergence)
    tensor([0.6805])
    ```
    """

    name: str = "custom"

    def score(self, logratio: torch.Tensor) -> torch.Tensor:
        r"""
        `g(l) = f'(e^l)`, with the constant of `f'` chosen so that `g(0) = 0`. `beta * score` is the implicit reward.

        Args:
            logratio (`torch.Tensor` of any shape):
                Log-ratios of policy to reference, in nats.

        Returns:
            `torch.Tensor` of the same shape, float32, or float64 if the input is. In the built-in divergences a score
            beyond 1/1024 of the largest finite number of that dtype (3.3e35 in float32: `l = -81.8` for forward KL)
            saturates there, so that means of logged scores stay finite; the loss does not go through this method.
        """
        raise NotImplementedError(f"{type(self).__name__} must define score(logratio), its f'(e^l) with f'(1) = 0.")

    def log_weight(self, logratio: torch.Tensor) -> torch.Tensor:
        """
        `log h(l)`, the logarithm of the derivative of the score; never overflows.

        Args:
            logratio (`torch.Tensor` of any shape):
                Log-ratios of policy to reference, in nats.

        Returns:
            `torch.Tensor` of the same shape, float32, or float64 if the input is.
        """
        raise NotImplementedError(f"{type(self).__name__} must define log_weight(logratio), the log of d score / dl.")

    def f(self, u: torch.Tensor) -> torch.Tensor:
        """
        The generator, with `f(1) = 0` and `f'(1) = 0`: `D_f(pi || pi_ref) = E_{pi_ref}[f(u)]`.

        Args:
            u (`torch.Tensor` of any shape):
                Ratios of policy to reference, at least 0.

        Returns:
            `torch.Tensor` of the same shape, float32, or float64 if the input is.
        """
        raise NotImplementedError(f"{type(self).__name__} does not define f(u); the loss does not need it.")

    def value(self, logratio: torch.Tensor) -> torch.Tensor:
        r"""
        `f(e^l)`, the generator as a function of the log-ratio: `D_f(pi || pi_ref) = E_{pi_ref}[f(e^l)]`.

        Differentiable once. The gradient is [`slope`](Self.slope), evaluated on its own and not through `exp`: both
        are exact wherever they are representable, in the tails and at the cancellation at `l = 0` alike.

        Args:
            logratio (`torch.Tensor` of any shape):
                Log-ratios of policy to reference, in nats, finite.

        Returns:
            `torch.Tensor` of the same shape, not below 0, in float32, or float64 if the input is. A value beyond
            1/1024 of the largest finite number of that dtype saturates there, like a score.

        Example: forward KL of a ratio of 1/2 is `log 2 + 1/2 - 1`, and its slope `1/2 * (1 - 2)`.

        ```python
        >>> logratio = torch.tensor([0.5]).log().requires_grad_()
        >>> value = get_divergence("forward_kl").value(logratio)
        >>> value.sum().backward()
        >>> value.detach(), logratio.grad
        (tensor([0.1931]), tensor([-0.5000]))
        ```
        """
        return _Value.apply(torch.as_tensor(logratio), self)

    @_elementwise(saturate=True)
    def slope(self, logratio: torch.Tensor) -> torch.Tensor:
        r"""
        `d f(e^l) / dl = e^l f'(e^l) = e^l g(l)`: the force with which `E_{pi_ref}[f(e^l)]` moves a log-ratio.

        It is the product of a probability ratio and a score that may leave the range of floats in opposite directions,
        so it is computed from the logarithm of the score, `log |g(l) - g(0)|`.

        Args:
            logratio (`torch.Tensor` of any shape):
                Log-ratios of policy to reference, in nats, finite.

        Returns:
            `torch.Tensor` of the same shape, with the sign of `l`, in float32, or float64 if the input is; saturated
            like [`value`](Self.value).
        """
        return self._exact_slope(logratio)

    def _exact_slope(self, logratio: torch.Tensor) -> torch.Tensor:
        return torch.sign(logratio) * (logratio + self.log_margin(logratio, torch.zeros_like(logratio))).exp()

    @_elementwise
    def scaled_value(self, logratio: torch.Tensor) -> torch.Tensor:
        r"""
        `f(u) / max(u, 1)`, which does not overflow just because `u` does: `f(u) / u` tends to the supremum of the
        score as `l -> +inf`, and `f(u)` to `f(0)` as `l -> -inf`.

        This default takes `f`, if the class defines it, within 300 nats of 0. Elsewhere it integrates the weight,
        `f(u) = \int_0^l (u - e^t) h(t) dt`, by double-exponential quadrature in log space, up to a million nats.

        Args:
            logratio (`torch.Tensor` of any shape):
                Log-ratios of policy to reference, in nats; infinite ones are allowed.

        Returns:
            `torch.Tensor` of the same shape, not below 0 and never NaN, in float32, or float64 if the input is;
            infinite where it leaves the range of that dtype.
        """
        integrated = torch.ones_like(logratio, dtype=torch.bool)
        values = torch.zeros_like(logratio)
        if type(self).f is not Divergence.f:
            integrated = ~(logratio.abs() <= 300)
            u = torch.where(integrated, 0.0, logratio).exp()
            values = torch.where(integrated, values, self.f(u) / u.clamp(min=1))
        if integrated.any():
            # In parts, as each log-ratio takes 257 evaluations of the weight.
            parts = logratio[integrated].split(4096)
            values[integrated] = torch.cat([self._integrated_value(part) for part in parts])
        return values

    def _integrated_value(self, logratio: torch.Tensor) -> torch.Tensor:
        distance = logratio.abs().clamp(max=1e6)
        # From the end where u is largest, l for l > 0 and 0 for l < 0: that is where the integrand is.
        depth, log_step = _quadrature(distance)
        position = torch.where(logratio > 0, distance, 0.0).unsqueeze(-1) - depth
        # (u - e^t) / max(u, 1) in absolute value: 1 - e^{-depth} above 0, e^{-depth} - e^{-distance} below.
        rest = (distance.unsqueeze(-1) - depth).clamp(min=torch.finfo(depth.dtype).tiny)
        above = torch.log(-torch.expm1(-depth.clamp(min=torch.finfo(depth.dtype).tiny)))
        below = torch.log(-torch.expm1(-rest)) - depth
        factor = torch.where(logratio.unsqueeze(-1) > 0, above, below)
        integral = torch.logsumexp(self.log_weight(position) + factor + log_step, dim=-1).exp()
        return torch.where(logratio == 0, 0.0, torch.where(logratio.isnan(), logratio, integral))

    @_elementwise
    def inverse_score(self, v: torch.Tensor) -> torch.Tensor:
        r"""
        `u = (f')^{-1}(v)`. The optimal policy of the constrained problem is
        `pi*(y) = pi_ref(y) (f')^{-1}((r(y) - lambda) / beta)`, with `lambda` fixed by normalization.

        Where a divergence has no closed form this bisects the score, which is not differentiable.

        Args:
            v (`torch.Tensor` of any shape):
                Scores.

        Returns:
            `torch.Tensor` of the same shape, float32, or float64 if the input is: ratios (not log-ratios), `+inf`
            for a `v` at or above the supremum of the score.
        """
        return self.log_inverse_score(v).exp()

    @_elementwise
    def log_inverse_score(self, v: torch.Tensor) -> torch.Tensor:
        """
        `l = log (f')^{-1}(v)`, the log-ratio at which the score is `v`; it neither overflows nor underflows.

        Args:
            v (`torch.Tensor` of any shape):
                Scores.

        Returns:
            `torch.Tensor` of the same shape, float32, or float64 if the input is; `+inf` for a `v` at or above the
            supremum of the score, and for a divergence that is not [`admissible`](Self.admissible) `-inf`, or a
            log-ratio below -1e9, for a `v` at or below its infimum.
        """
        with torch.no_grad():
            lower, upper = -torch.ones_like(v), torch.ones_like(v)
            for _ in range(30):
                too_high, too_low = self.score(lower) > v, self.score(upper) < v
                if not (too_high.any() or too_low.any()):
                    break
                lower, upper = torch.where(too_high, 2 * lower, lower), torch.where(too_low, 2 * upper, upper)
            reachable = self.score(upper) >= v
            for _ in range(100):
                middle = (lower + upper) / 2
                if ((middle == lower) | (middle == upper)).all():
                    break
                below = self.score(middle) < v
                lower, upper = torch.where(below, middle, lower), torch.where(below, upper, middle)
            logratio = torch.where(reachable, upper, torch.inf)
            return torch.where(v.isnan(), v, logratio)

    @_elementwise
    def log_margin(self, chosen_logratios: torch.Tensor, rejected_logratios: torch.Tensor) -> torch.Tensor:
        r"""
        `log |g(l_w) - g(l_l)|`. The sign of the margin is that of `l_w - l_l`, because a score increases.

        This default takes the difference of the two scores. Where that overflows, or cancels because the log-ratios
        are close or both lie where the score is flat, it integrates the weight between them instead,
        `log \int h(t) dt`, by double-exponential quadrature in log space.

        Args:
            chosen_logratios (`torch.Tensor` of any shape):
                Log-ratios of the chosen responses, in nats.
            rejected_logratios (`torch.Tensor` of the same shape):
                Log-ratios of the rejected responses, in nats.

        Returns:
            `torch.Tensor` of the same shape, float32, or float64 if an input is; `-inf` where the two are equal.
        """
        scores = torch.stack([self.score(chosen_logratios), self.score(rejected_logratios)])
        difference = (scores[0] - scores[1]).abs()
        # False for NaN (both infinite) and for infinity (one infinite), too.
        reliable = difference > 1e-6 * scores.abs().amax(dim=0)
        if reliable.all():
            return difference.log()

        start = torch.minimum(chosen_logratios, rejected_logratios).unsqueeze(-1)
        depth, log_step = _quadrature((chosen_logratios - rejected_logratios).abs())
        integral = torch.logsumexp(self.log_weight(start + depth) + log_step, dim=-1)
        return torch.where(reliable, difference.log(), integral)

    def in_tail(self, logratio: torch.Tensor) -> torch.Tensor:
        """
        Where this divergence differs from the one it is named after: nowhere, unless it is a [`TangentTail`].

        Args:
            logratio (`torch.Tensor` of any shape):
                Log-ratios of policy to reference, in nats.

        Returns:
            `torch.BoolTensor` of the same shape.
        """
        return torch.zeros_like(logratio, dtype=torch.bool)

    @property
    def curvature(self) -> float:
        """
        `f''(1) = h(0)`. The gradient of the loss at `pi = pi_ref` is proportional to `beta * curvature`, so compare
        divergences at equal `beta * curvature`.
        """
        return self.log_weight(torch.zeros((), dtype=torch.float64)).exp().item()

    @property
    def admissible(self) -> bool:
        """
        Whether f-DPO recovers the optimum of the constrained problem, which needs `score -> -inf` as `l -> -inf`
        (otherwise the optimum may put zero probability on a response, where the stationarity condition that the loss
        is derived from does not hold; see https://huggingface.co/papers/2602.06788, Corollary 1). The default
        checks whether the score still decreases between `l = -1e4` and `l = -1e8`.
        """
        near, far = self.score(torch.tensor([-1e4, -1e8], dtype=torch.float64)).tolist()
        return far < -1e30 or far < near - 1

    @property
    def bounded_above(self) -> bool:
        """
        Whether the score has a finite supremum as `l -> +inf`. Then no policy has a score above it: `inverse_score` is
        infinite there. The default checks whether the score still grows between `l = 1e4` and `l = 1e8`.
        """
        near, far = self.score(torch.tensor([1e4, 1e8], dtype=torch.float64)).tolist()
        return not (far > 1e30 or far > near + 1)

    @property
    def exponentiates(self) -> bool:
        """
        Whether the weight exceeds the range of float16 for some `|l| <= 1e4`. Such a divergence should not be trained
        with float16 gradients.
        """
        log_weights = self.log_weight(torch.tensor([-1e4, 1e4], dtype=torch.float64))
        return log_weights.max().item() > math.log(torch.finfo(torch.float16).max)

    def __repr__(self) -> str:
        parameters = (f"{key}={value!r}" for key, value in vars(self).items() if not key.startswith("_"))
        return f"{type(self).__name__}({', '.join(parameters)})"


class _PowerSum(Divergence):
    """
    The divergences whose weight is a sum of powers of the ratio, `h(l) = sum_i c_i e^{-a_i l}` with every `c_i > 0`.

    Each term is `c_i` times the alpha-divergence of `alpha = a_i`: reverse KL at 0, forward KL at 1, half of Pearson's
    chi-squared at -1. All terms of a margin have the same sign, so they add in log space without canceling.
    """

    def __init__(self, *terms: tuple[float, float]):
        self._terms = terms  # (c_i, a_i)

    @_elementwise(saturate=True)
    def score(self, logratio):
        return sum(c * logratio * _expm1_ratio(-a * logratio) for c, a in self._terms)  # c (1 - e^{-a l}) / a

    @_elementwise
    def log_weight(self, logratio):
        return torch.stack([math.log(c) - a * logratio for c, a in self._terms]).logsumexp(dim=0)

    @_elementwise
    def log_margin(self, chosen_logratios, rejected_logratios):
        margins = [math.log(c) + _log_power_margin(chosen_logratios, rejected_logratios, a) for c, a in self._terms]
        return torch.stack(margins).logsumexp(dim=0)

    @_elementwise
    def scaled_value(self, logratio):
        # f(u) / u of alpha is f(1/u) of 1 - alpha: one function of l <= 0 serves both sides.
        below = -logratio.abs()
        return sum(
            c * torch.where(logratio > 0, _power_value(1 - a, below), _power_value(a, below)) for c, a in self._terms
        )

    @_elementwise
    def f(self, u):
        return self.value(u.log())

    @_elementwise
    def log_inverse_score(self, v):
        if len(self._terms) > 1:
            return super().log_inverse_score(v)
        c, a = self._terms[0]
        # (1 - a v / c)^{-1/a}; the clamp makes it +inf from the supremum c / a on, and 0 below an infimum.
        return v / c if a == 0 else -torch.log1p((-a * v / c).clamp(min=-1)) / a

    @property
    def curvature(self) -> float:
        return sum(c for c, _ in self._terms)

    @property
    def admissible(self) -> bool:
        return any(a >= 0 for _, a in self._terms)


class ReverseKL(_PowerSum):
    """
    `KL(pi || pi_ref)`, `f(u) = u log u - u + 1`: plain DPO. Score `l`, weight 1.

    Example: at `beta = 0.1`, log-ratios 1 and -1 give `z = 0.1 * (1 + 1) = 0.2` and the loss `log(1 + e^{-0.2})`.

    ```python
    >>> f_dpo_loss(torch.tensor([1.0]), torch.tensor([-1.0]), beta=0.1, divergence=ReverseKL())
    tensor([0.5981])
    ```
    """

    name = "reverse_kl"

    def __init__(self):
        super().__init__((1.0, 0.0))


class ForwardKL(_PowerSum):
    """
    `KL(pi_ref || pi)`, `f(u) = -log u + u - 1`. Score `1 - e^{-l}`, weight `e^{-l}`, which explodes as `l -> -inf`.

    Example: at `beta = 0.1`, log-ratios `log 2` and `-log 2` (ratios 2 and 1/2) have the scores `1 - 1/2` and `1 - 2`,
    so `z = 0.1 * 1.5` and the loss is `log(1 + e^{-0.15})`.

    ```python
    >>> l = torch.tensor([2.0]).log()
    >>> f_dpo_loss(l, -l, beta=0.1, divergence=ForwardKL())
    tensor([0.6210])
    ```
    """

    name = "forward_kl"

    def __init__(self):
        super().__init__((1.0, 1.0))


class AlphaDivergence(_PowerSum):
    r"""
    Alpha-divergence in the convention of the f-DPO paper: `alpha -> 0` is REVERSE KL and `alpha -> 1` is FORWARD KL.

    `f(u) = (u^{1-alpha} - (1-alpha) u - alpha) / (alpha (alpha-1))`, score `(1 - e^{-alpha l}) / alpha`, weight
    `e^{-alpha l}`. The score is unbounded below for every `alpha > 0`, not only for those in (0, 1).

    Args:
        alpha (`float`, *optional*):
            Paper convention, greater than 0. 0.5 if neither parameter is given.
        trl_alpha (`float`, *optional*):
            The same in TRL's convention (`f_alpha_divergence_coef` since TRL 0.29), less than or equal to 1:
            `alpha = 1 - trl_alpha`, and 1 is reverse KL itself. The two conventions agree only at 0.5.

    Raises:
        ValueError: if both are given, `alpha` is not a finite number greater than 0, or `trl_alpha` is not a finite
            number of at most 1.

    Example: with `alpha = 0.5`, a ratio of 4 has the score `(1 - 4^{-1/2}) / 0.5 = 1`.

    ```python
    >>> AlphaDivergence(alpha=0.5).score(torch.tensor([4.0]).log())
    tensor([1.])
    >>> AlphaDivergence(trl_alpha=0.75).alpha
    0.25
    ```
    """

    name = "alpha"

    def __init__(self, alpha: float | None = None, trl_alpha: float | None = None):
        if alpha is not None and trl_alpha is not None:
            raise ValueError(
                f"Pass alpha (f-DPO paper) or trl_alpha (TRL, alpha = 1 - trl_alpha), not both; got alpha={alpha!r} "
                f"and trl_alpha={trl_alpha!r}."
            )
        if trl_alpha is not None:
            alpha = 1 - _check_number("trl_alpha", trl_alpha)
            if alpha < 0:
                raise ValueError(
                    f"trl_alpha must be less than or equal to 1, got {trl_alpha!r}, which is alpha={alpha!r} in the "
                    f"f-DPO paper's convention. {_UNBOUNDED_BELOW}"
                )
        else:
            alpha = 0.5 if alpha is None else _check_number("alpha", alpha)
            if alpha == 0:
                raise ValueError("alpha must be greater than 0, got 0; its limit there is 'reverse_kl'.")
            if alpha < 0:
                raise ValueError(f"alpha must be greater than 0, got {alpha!r}. {_UNBOUNDED_BELOW}")
        self.alpha = alpha
        super().__init__((1.0, alpha))


class SquaredHellinger(_PowerSum):
    """
    Squared Hellinger distance, `f(u) = (sqrt(u) - 1)^2`. Score `1 - e^{-l/2}`, weight `e^{-l/2} / 2`.

    It is half of the alpha-divergence of `alpha = 0.5`: the loss at `2 beta` equals that one's at `beta`.
    """

    name = "hellinger"

    def __init__(self):
        super().__init__((0.5, 0.5))


class Neyman(_PowerSum):
    """
    Neyman's chi-squared, `f(u) = (1 - u)^2 / u`. Score `1 - e^{-2l}`, weight `2 e^{-2l}`.

    It is twice the alpha-divergence of `alpha = 2`, and explodes twice as fast as forward KL.
    """

    name = "neyman"

    def __init__(self):
        super().__init__((2.0, 2.0))


class Jeffreys(_PowerSum):
    """
    Jeffreys divergence, the sum of both KL divergences, `f(u) = (u - 1) log u`. Score `l + 1 - e^{-l}`, weight
    `1 + e^{-l}`.
    """

    name = "jeffreys"

    def __init__(self):
        super().__init__((1.0, 0.0), (1.0, 1.0))


class ChiPO(_PowerSum):
    r"""
    The mix of Pearson's chi-squared and reverse KL of chi-PO (https://huggingface.co/papers/2407.13399):
    `f(u) = (u - 1)^2 / 2 + gamma (u log u - u + 1)`. Score `e^l - 1 + gamma l`, weight `e^l + gamma`.

    Chi-squared alone is not admissible; any positive weight on the KL part makes it so. The weight explodes as
    `l -> +inf`, where forward KL's vanishes, and is flat as `l -> -inf`. The paper's experiments clip the exponent at
    20, which [`TangentTail`] does with a slope that continues instead of ending in a zero gradient.

    Args:
        gamma (`float`, *optional*, defaults to `1.0`):
            Weight of the KL part, greater than 0.

    Raises:
        ValueError: if `gamma` is not a finite number greater than 0.
    """

    name = "chi_po"

    def __init__(self, gamma: float = 1.0):
        self.gamma = _check_positive("gamma", gamma)
        super().__init__((1.0, -1.0), (self.gamma, 0.0))


class SkewJensenShannon(Divergence):
    r"""
    Skewed Jensen-Shannon divergence: with the mixture `m = s pi + (1-s) pi_ref`, the sum
    `s KL(pi || m) + (1-s) KL(pi_ref || m)`.

    `f(u) = s u log u - (s u + 1 - s) log(s u + 1 - s)`, score `-s log(s + (1-s) e^{-l})`, weight
    `s (1-s) / (s u + 1 - s)`, which is bounded by `s`. At `s = 0.5` it is half of the paper's JS.

    Args:
        skew (`float`, *optional*, defaults to `0.5`):
            `s`, the weight of the policy in the mixture, strictly between 0 and 1. Divided by `s`, the divergence
            tends to reverse KL as `s -> 0`; divided by `1-s`, to forward KL as `s -> 1`.

    Raises:
        ValueError: if `skew` is not strictly between 0 and 1.
    """

    name = "skew_js"
    _scale = 1.0

    def __init__(self, skew: float = 0.5):
        self.skew = _check_number("skew", skew)
        if not 0 < self.skew < 1:
            raise ValueError(f"skew must be strictly between 0 and 1, got {skew!r}.")
        self._log_skew, self._log_rest = math.log(self.skew), math.log1p(-self.skew)

    @_elementwise(saturate=True)
    def score(self, logratio):
        # log(s + (1-s) e^{-l}): by log1p where that is near log 1, else as a sum of two exponentials.
        x = (1 - self.skew) * torch.expm1(-logratio.clamp(min=-30))
        log_sum = torch.logaddexp(torch.full_like(logratio, self._log_skew), self._log_rest - logratio)
        near = (x > -0.5) & (logratio > -30)
        return -self._scale * self.skew * torch.where(near, torch.log1p(x.clamp(min=-0.5)), log_sum)

    @_elementwise
    def log_weight(self, logratio):
        return math.log(self._scale * self.skew) + F.logsigmoid(self._log_rest - self._log_skew - logratio)

    @_elementwise
    def log_margin(self, chosen_logratios, rejected_logratios):
        # With M the larger log-ratio, d the distance and q(l) = (1-s) e^{-l} / (s + (1-s) e^{-l}):
        # log(s + (1-s) e^{d-M}) - log(s + (1-s) e^{-M}) = log(1 + q(M) (e^d - 1)).
        larger = torch.maximum(chosen_logratios, rejected_logratios)
        log_q = F.logsigmoid(self._log_rest - self._log_skew - larger)
        log_expm1 = _log_power_margin(chosen_logratios - larger, rejected_logratios - larger, rate=1.0)
        return math.log(self._scale * self.skew) + _log_softplus(log_q + log_expm1)

    @_elementwise
    def scaled_value(self, logratio):
        # f(u) / u of the skew s is f(1/u) of 1 - s: one function of l <= 0 serves both sides. With v = u - 1, w = 1/u
        # - 1 and k(x) = x - log(1 + x), which is positive and of second order, f(u) = (1-s) k(s v) + s u k((1-s) w).
        below = (-logratio.abs()).clamp(min=1 - math.log(torch.finfo(logratio.dtype).max))
        policy_share = torch.where(logratio > 0, 1 - self.skew, torch.full_like(logratio, self.skew))
        first = (1 - policy_share) * _log1p_gap(policy_share * torch.expm1(below))
        second = policy_share * below.exp() * _log1p_gap((1 - policy_share) * torch.expm1(-below))
        return self._scale * (first + second)

    @_elementwise
    def f(self, u):
        return self.value(u.log())

    @_elementwise
    def inverse_score(self, v):
        rest = 1 - self.skew
        # (1-s) / (e^{-v/s} - s); the clamp makes it +inf from the supremum on.
        return rest / (rest + torch.expm1(-v / (self._scale * self.skew))).clamp(min=0)

    @_elementwise
    def log_inverse_score(self, v):
        v = v / (self._scale * self.skew)
        # log(e^{-v} - s): with e^{-v} taken out where it is large.
        far = -v + torch.log1p(-self.skew * v.clamp(max=0).exp())
        near = torch.log((1 - self.skew + torch.expm1(-v.clamp(min=-1))).clamp(min=0))
        return self._log_rest - torch.where(v < -1, far, near)

    @property
    def curvature(self) -> float:
        return self._scale * self.skew * (1 - self.skew)

    @property
    def admissible(self) -> bool:
        return True


class JensenShannon(SkewJensenShannon):
    """
    Jensen-Shannon divergence of the f-DPO paper, `f(u) = u log u - (u+1) log((u+1)/2)`, which is TWICE the textbook's.
    Score `log(2u / (1+u))`, weight `1 / (1+u)`.

    Its curvature is 1/2, so training at `beta` starts like reverse KL at `beta / 2`.

    Example: a ratio of 3 has the score `log(6 / 4)`.

    ```python
    >>> JensenShannon().score(torch.tensor([3.0]).log())
    tensor([0.4055])
    ```
    """

    name = "js"
    _scale = 2.0

    def __init__(self):
        super().__init__(0.5)


class Pearson(_PowerSum):
    """
    Pearson's chi-squared, `f(u) = (u - 1)^2`. Score `2 (u - 1)`, weight `2 e^l`. Not admissible in f-DPO: the score
    tends to -2 as `l -> -inf`.

    It is twice the alpha-divergence of `alpha = -1`, and `inverse_score` is 0 from a score of -2 down.

    Example: a ratio of 3 has the value `(3 - 1)^2` and the score `2 * (3 - 1)`.

    ```python
    >>> logratio = torch.tensor([3.0]).log()
    >>> Pearson().value(logratio), Pearson().score(logratio)
    (tensor([4.]), tensor([4.]))
    ```
    """

    name = "pearson"

    def __init__(self):
        super().__init__((2.0, -1.0))


class TotalVariation(Divergence):
    """
    Total variation, `f(u) = |u - 1| / 2`. Score `sign(l) / 2`, no weight. Not admissible in f-DPO: the score is
    constant on either side of 0, so no margin tells two responses on one side apart, and a gradient of the score is 0.

    `inverse_score` returns the ratio 1 for every score between -1/2 and 1/2, 0 below and infinity above.
    """

    name = "total_variation"

    @_elementwise
    def score(self, logratio):
        return torch.sign(logratio) / 2

    @_elementwise
    def log_weight(self, logratio):
        return torch.where(logratio.isnan(), logratio, -torch.inf)

    @_elementwise
    def scaled_value(self, logratio):
        return -torch.expm1(-logratio.abs()) / 2

    @_elementwise
    def f(self, u):
        return (u - 1).abs() / 2

    @_elementwise
    def log_inverse_score(self, v):
        outside = torch.where(v > 0.5, torch.inf, torch.where(v < -0.5, -torch.inf, 0.0))
        return torch.where(v.isnan(), v, outside)


class LeCam(Divergence):
    """
    Le Cam's (triangular) divergence, `f(u) = (u - 1)^2 / (u + 1)`. Score `1 - 4 / (1 + u)^2`, weight `8 u / (1 +
    u)^3`. Not admissible in f-DPO: the score tends to -3 as `l -> -inf`.

    Example: a ratio of 3 has the value `4 / 4` and the score `1 - 4 / 16`.

    ```python
    >>> logratio = torch.tensor([3.0]).log()
    >>> LeCam().value(logratio), LeCam().score(logratio)
    (tensor([1.]), tensor([0.7500]))
    ```
    """

    name = "le_cam"

    @_elementwise
    def score(self, logratio):
        # With q = 1 / (1 + u): 1 - 4 q^2 = (1 - 2 q) (1 + 2 q), which does not cancel at 0.
        return torch.tanh(logratio / 2) * (1 + 2 * torch.sigmoid(-logratio))

    @_elementwise
    def log_weight(self, logratio):
        return math.log(8) + F.logsigmoid(logratio) + 2 * F.logsigmoid(-logratio)

    @_elementwise
    def scaled_value(self, logratio):
        below = -logratio.abs()  # f(u) / u = f(1/u)
        return torch.expm1(below).square() / (1 + below.exp())

    @_elementwise
    def f(self, u):
        return self.value(u.log())

    @_elementwise
    def log_inverse_score(self, v):
        # 2 / sqrt(1 - v) - 1; the clamps make it 0 from the infimum down and +inf from the supremum on.
        return torch.log((2 / (1 - v).clamp(min=0).sqrt() - 1).clamp(min=0))

    @property
    def admissible(self) -> bool:
        return False


class TangentTail(Divergence):
    r"""
    A divergence with a bounded weight: beyond the log-ratios where `h` reaches `e^{max_log_weight}`, the score
    continues along its tangent.

    The weight of forward KL at `l = -90` is `e^{90}`. That is what the equation says, but the norm of such a gradient
    is infinite in float32, and gradient clipping then silently multiplies the whole step by zero. Clamping the
    log-ratio instead would give no gradient to exactly the pairs that most need correcting. Along the tangent, `g(l_0)
    + h(l_0) (l - l_0)`, they keep the largest allowed weight.

    The result is itself a divergence, strictly convex and with a score that still tends to `-inf`, so the guarantees
    of f-DPO hold for it unchanged. It differs from the original one only for ratios outside `[e^{lower}, e^{upper}]`;
    a divergence with a bounded weight does not change at all. The weight is assumed to be monotonic on either side of
    `l = 0`.

    Args:
        divergence ([`Divergence`]):
            Divergence to bound.
        max_log_weight (`float`, *optional*, defaults to `20.0`):
            Logarithm of the largest weight, greater than `log(divergence.curvature)`. With the default, the gradient
            norm of one log-ratio can grow to 3e10 (with `beta` up to 1) before its square overflows float32. chi-PO's
            experiments clip at the same value. The tangent begins at `l = -20` for forward KL and at `l = -40` for
            `alpha = 0.5`.

    Attributes:
        lower, upper (`float`):
            Log-ratios between which nothing changes; infinite where the weight stays below the bound.

    Raises:
        ValueError: if `max_log_weight` is not a finite number greater than `log(divergence.curvature)`.
        TypeError: if `divergence` is not a [`Divergence`].

    Example: forward KL bounded at weight `e^2` follows `1 - e^2 + e^2 (l + 2)` below `l = -2`.

    ```python
    >>> tail = TangentTail(ForwardKL(), max_log_weight=2.0)
    >>> tail.score(torch.tensor([-3.0])), 1 - math.exp(2) - math.exp(2)
    (tensor([-13.7781]), -13.7781121978613)
    >>> tail.in_tail(torch.tensor([-3.0, -1.0, 90.0]))
    tensor([ True, False, False])
    ```
    """

    def __init__(self, divergence: Divergence, max_log_weight: float = 20.0):
        if not isinstance(divergence, Divergence):
            raise TypeError(f"divergence must be a Divergence, got {divergence!r}; see get_divergence.")
        self.divergence = divergence
        self.max_log_weight = _check_number("max_log_weight", max_log_weight)
        if self.max_log_weight <= math.log(divergence.curvature):
            raise ValueError(
                f"max_log_weight must be greater than the log-weight at l = 0, which is "
                f"{math.log(divergence.curvature):.4g} for {divergence!r}; got {max_log_weight!r}."
            )
        self.lower, self.upper = self._boundary(-1.0), self._boundary(1.0)
        self._max_weight = math.exp(self.max_log_weight)

    def _boundary(self, direction: float) -> float:
        """The log-ratio in this direction from 0 at which the weight reaches its bound."""

        def exceeds(distance):
            logratio = torch.tensor(direction * distance, dtype=torch.float64)
            return self.divergence.log_weight(logratio).item() > self.max_log_weight

        inside, outside = 0.0, 1.0
        while not exceeds(outside):
            inside, outside = outside, 2 * outside
            if outside > 1e12:
                return direction * math.inf
        while inside < (middle := (inside + outside) / 2) < outside:
            inside, outside = (inside, middle) if exceeds(middle) else (middle, outside)
        return direction * inside

    @property
    def name(self) -> str:  # type: ignore[override]  # other divergences have an attribute, which nothing sets
        """Name of the bounded divergence; [`in_tail`] tells where the two differ."""
        return self.divergence.name

    def in_tail(self, logratio: torch.Tensor) -> torch.Tensor:
        """
        Where the score follows the tangent. A pair is affected if either of its log-ratios is:
        `tail.in_tail(chosen_logratios) | tail.in_tail(rejected_logratios)`, whose mean is the share to log.

        Args:
            logratio (`torch.Tensor` of any shape):
                Log-ratios of policy to reference, in nats.

        Returns:
            `torch.BoolTensor` of the same shape.
        """
        return (logratio < self.lower) | (logratio > self.upper) | self.divergence.in_tail(logratio)

    @_elementwise(saturate=True)
    def score(self, logratio: torch.Tensor) -> torch.Tensor:
        """
        The divergence's score between the boundaries, its tangents beyond: `g(l_0) + e^{max_log_weight} (l - l_0)`.

        Args:
            logratio (`torch.Tensor` of any shape):
                Log-ratios of policy to reference, in nats.

        Returns:
            `torch.Tensor` of the same shape, float32, or float64 if the input is; saturated as
            [`Divergence.score`] says.
        """
        nearest = logratio.clamp(self.lower, self.upper)
        return self.divergence.score(nearest) + self._max_weight * (logratio - nearest)

    @_elementwise
    def log_weight(self, logratio: torch.Tensor) -> torch.Tensor:
        """
        The divergence's log-weight between the boundaries, `max_log_weight` beyond.

        Args:
            logratio (`torch.Tensor` of any shape):
                Log-ratios of policy to reference, in nats.

        Returns:
            `torch.Tensor` of the same shape, float32, or float64 if the input is.
        """
        outside = (logratio < self.lower) | (logratio > self.upper)
        return torch.where(outside, self.max_log_weight, self.divergence.log_weight(logratio))

    @_elementwise
    def log_margin(self, chosen_logratios: torch.Tensor, rejected_logratios: torch.Tensor) -> torch.Tensor:
        """
        `log |g(l_w) - g(l_l)|`: the divergence's margin between the boundaries, and the tangents' beyond, added in log
        space.

        Args:
            chosen_logratios (`torch.Tensor` of any shape):
                Log-ratios of the chosen responses, in nats.
            rejected_logratios (`torch.Tensor` of the same shape):
                Log-ratios of the rejected responses, in nats.

        Returns:
            `torch.Tensor` of the same shape, float32, or float64 if an input is; `-inf` where the two are equal.
        """
        chosen, rejected = (x.clamp(self.lower, self.upper) for x in (chosen_logratios, rejected_logratios))
        # Both parts have the sign of l_w - l_l.
        linear = ((chosen_logratios - chosen) - (rejected_logratios - rejected)).abs()
        return torch.logaddexp(self.divergence.log_margin(chosen, rejected), self.max_log_weight + linear.log())

    @_elementwise
    def f(self, u: torch.Tensor) -> torch.Tensor:
        """
        The generator of the bounded divergence: the divergence's own between the boundaries, the integral of the
        tangents beyond.

        Args:
            u (`torch.Tensor` of any shape):
                Ratios of policy to reference, at least 0.

        Returns:
            `torch.Tensor` of the same shape, float32, or float64 if the input is.
        """
        return self.value(u.log())

    @_elementwise
    def scaled_value(self, logratio: torch.Tensor) -> torch.Tensor:
        """
        `f(u) / max(u, 1)` of the bounded divergence, the integral over `u` of a score that is `g_0 + h x` at the
        distance `x` beyond a boundary.

        Args:
            logratio (`torch.Tensor` of any shape):
                Log-ratios of policy to reference, in nats; infinite ones are allowed.

        Returns:
            `torch.Tensor` of the same shape, float32, or float64 if the input is; as of [`Divergence.scaled_value`].
        """
        nearest = logratio.clamp(self.lower, self.upper)
        inside, score = self.divergence.scaled_value(nearest), self.divergence.score(nearest)
        outside = logratio != nearest
        x = torch.where(outside, (logratio - nearest).abs(), 0.0)  # inf - inf, where there is no boundary
        fade, faded = torch.exp(-x), -torch.expm1(-x)
        above = inside * fade + score * faded + self._max_weight * (x - faded)
        fading = torch.where(fade > 0, x * fade, 0.0)
        below = inside + nearest.exp() * (self._max_weight * (faded - fading) - score * faded)
        return torch.where(outside, torch.where(logratio > 0, above, below), inside)

    @_elementwise
    def log_inverse_score(self, v: torch.Tensor) -> torch.Tensor:
        """
        `l = log (f')^{-1}(v)`: the divergence's own between the scores at the boundaries, that of the tangents beyond.

        Args:
            v (`torch.Tensor` of any shape):
                Scores.

        Returns:
            `torch.Tensor` of the same shape, float32, or float64 if the input is: log-ratios, as of
            [`Divergence.log_inverse_score`].
        """
        lower, upper = (
            self.divergence.score(torch.tensor(end, dtype=torch.float64)).item() if math.isfinite(end) else end
            for end in (self.lower, self.upper)
        )
        nearest = v.clamp(lower, upper)
        return self.divergence.log_inverse_score(nearest) + (v - nearest) / self._max_weight

    @property
    def curvature(self) -> float:
        """`f''(1) = h(0)`, that of the divergence: nothing changes at 0."""
        return self.divergence.curvature

    @property
    def admissible(self) -> bool:
        """
        Whether the score tends to `-inf` as `l -> -inf`: as for the divergence itself, and along a tangent always.
        """
        return math.isfinite(self.lower) or self.divergence.admissible  # a tangent falls without bound


DIVERGENCES: dict[str, type[Divergence]] = {
    cls.name: cls
    for cls in (
        ReverseKL,
        ForwardKL,
        JensenShannon,
        AlphaDivergence,
        SquaredHellinger,
        Jeffreys,
        SkewJensenShannon,
        ChiPO,
        Neyman,
    )
}

# Divergences that f-DPO refuses. Methods with an explicit target may use them, as they need no inverse of the score.
INADMISSIBLE_DIVERGENCES: dict[str, type[Divergence]] = {cls.name: cls for cls in (Pearson, TotalVariation, LeCam)}

_ALIASES = {
    "js_divergence": "js",  # TRL's name for the same function
    "chi2": "pearson",
    "chi_squared": "pearson",
    "triangular": "le_cam",
}

# Score at zero ratio of divergences that a user may well ask for, with f'(1) = 0.
_INADMISSIBLE = {
    "pearson": "-2",
    "chi2": "-2",
    "chi_squared": "-2",
    "total_variation": "-1/2",
    "le_cam": "-3",
    "triangular": "-3",
    "skew_kl_reference": "-(1-s)^2 / s",
}


def get_divergence(name: str | Divergence, *, allow_inadmissible: bool = False, **params: float) -> Divergence:
    r"""
    A divergence by its name.

    | name | f(u) | score g(l) | curvature | parameters |
    |---|---|---|---|---|
    | `reverse_kl` | u log u - u + 1 | l | 1 | |
    | `forward_kl` | -log u + u - 1 | 1 - e^{-l} | 1 | |
    | `js` (or TRL's `js_divergence`) | u log u - (u+1) log((u+1)/2) | log 2 + logsigmoid(l) | 1/2 | |
    | `alpha` | (u^{1-a} - (1-a) u - a) / (a (a-1)) | (1 - e^{-al}) / a | 1 | `alpha` or `trl_alpha` |
    | `hellinger` | (sqrt u - 1)^2 | 1 - e^{-l/2} | 1/2 | |
    | `jeffreys` | (u-1) log u | l + 1 - e^{-l} | 2 | |
    | `skew_js` | s u log u - (su+1-s) log(su+1-s) | -s log(s + (1-s) e^{-l}) | s (1-s) | `skew` |
    | `chi_po` | (u-1)^2 / 2 + c (u log u - u + 1) | e^l - 1 + c l | 1 + c | `gamma` |
    | `neyman` | (1-u)^2 / u | 1 - e^{-2l} | 2 | |
    | `pearson` (or `chi2`, `chi_squared`) | (u-1)^2 | 2 (e^l - 1) | 2 | refused by default |
    | `total_variation` | abs(u-1) / 2 | sign(l) / 2 | 0 | refused by default |
    | `le_cam` (or `triangular`) | (u-1)^2 / (u+1) | 1 - 4 / (1+e^l)^2 | 1 | refused by default |

    Args:
        name (`str` or [`Divergence`]):
            One of the names above. An instance is returned as it is.
        allow_inadmissible (`bool`, *optional*, defaults to `False`):
            Also return the last three, for methods whose target is explicit. f-DPO's target is implicit: it is
            recovered from the score, which needs a score that tends to -inf as the policy's probability tends to 0.
        **params (`float`):
            What the divergence takes: `alpha` (default 0.5, in the f-DPO paper's convention: 0 is the limit of
            reverse KL and 1 is forward KL) or `trl_alpha` (TRL's convention, `alpha = 1 - trl_alpha`) for `alpha`;
            `skew` (default 0.5, the weight of the policy in the mixture) for `skew_js`; `gamma` (default 1.0, the
            weight of reverse KL) for `chi_po`.

    Returns:
        [`Divergence`]

    Raises:
        ValueError: for an unknown name, for a divergence whose score does not tend to -inf as the policy's probability
            tends to 0 (unless `allow_inadmissible`), and for a parameter that is out of range or that the divergence
            does not take.
        TypeError: if `name` is neither a string nor a [`Divergence`].

    Example:

    ```python
    >>> get_divergence("alpha", alpha=0.3)
    AlphaDivergence(alpha=0.3)
    >>> get_divergence("skew_js", skew=0.1).curvature
    0.09000000000000001
    ```
    """
    if isinstance(name, Divergence):
        if params:
            raise ValueError(f"{name!r} already has its parameters; got {_format(params)} as well.")
        return name
    if not isinstance(name, str):
        raise TypeError(f"divergence must be a name or a Divergence, got {name!r}.")
    if name == "alpha_divergence":
        raise ValueError(
            "'alpha_divergence' is TRL's name, and TRL's alpha is 1 minus that of the f-DPO paper. Use 'alpha' with "
            "trl_alpha=... for TRL's convention, or with alpha=... for the paper's."
        )
    known = DIVERGENCES | INADMISSIBLE_DIVERGENCES if allow_inadmissible else DIVERGENCES
    cls = known.get(_ALIASES.get(name, name))
    if cls is None and name in _INADMISSIBLE and not allow_inadmissible:
        raise ValueError(
            f"divergence {name!r} cannot be used in f-DPO: as l -> -inf its score tends to {_INADMISSIBLE[name]}. "
            f"{_UNBOUNDED_BELOW}"
        )
    if cls is None:
        raise ValueError(f"Unknown divergence {name!r}. Known ones: {', '.join(known)}.")
    accepted = inspect.signature(cls).parameters
    unknown = {key: value for key, value in params.items() if key not in accepted}
    if unknown:
        takes = f"it takes: {', '.join(accepted)}" if accepted else "it takes no parameters"
        raise ValueError(f"divergence {name!r} does not take {_format(unknown)}; {takes}.")
    return cls(**params)


def _format(params: dict) -> str:
    return ", ".join(f"{key}={value!r}" for key, value in params.items())


class _FDPOLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, chosen_logratios, rejected_logratios, beta, divergence):
        dtype = _result_dtype(chosen_logratios, rejected_logratios)
        ctx.dtypes = chosen_logratios.dtype, rejected_logratios.dtype
        working_dtype = _working_dtype(chosen_logratios.device)
        l_w, l_l = chosen_logratios.to(working_dtype), rejected_logratios.to(working_dtype)

        # z = beta [g(l_w) - g(l_l)], by sign and logarithm: the two scores may both overflow.
        log_z = math.log(beta) + divergence.log_margin(l_w, l_l)
        z = torch.sign(l_w - l_l) * log_z.exp().clamp(max=torch.finfo(working_dtype).max)

        # |dL/dl| = sigmoid(-z) beta h(l). As a product of its factors this is 0 * inf in the tails.
        log_common = F.logsigmoid(-z) + math.log(beta)
        ctx.save_for_backward(
            -(log_common + divergence.log_weight(l_w)).exp(), (log_common + divergence.log_weight(l_l)).exp()
        )
        return _saturate(-F.logsigmoid(z), dtype)  # L = -log sigmoid(z)

    @staticmethod
    def backward(ctx, grad_output):
        if torch.is_grad_enabled():
            # The saved gradients would enter the second derivative as constants.
            raise RuntimeError("f_dpo_loss can be differentiated only once; call backward without create_graph=True.")
        largest = torch.finfo(ctx.saved_tensors[0].dtype).max
        grads = (
            _saturate(grad_output.to(grad.dtype) * grad.clamp(-largest, largest), dtype)
            for grad, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        )
        return *grads, None, None


def f_dpo_loss(
    chosen_logratios: torch.Tensor,
    rejected_logratios: torch.Tensor,
    *,
    beta: float,
    divergence: str | Divergence,
) -> torch.Tensor:
    r"""
    f-DPO loss of each pair, `L = -log sigmoid(beta [f'(u_w) - f'(u_l)])`, from *Beyond Reverse KL*
    (https://huggingface.co/papers/2309.16240).

    Its gradient is `dL/dl_w = -beta sigmoid(-z) h(l_w)` and `dL/dl_l = beta sigmoid(-z) h(l_l)`, with `z` the argument
    of the sigmoid and `h` the divergence's weight. Value and gradient are evaluated in log space and are those of the
    equation wherever the result is representable. Beyond, they saturate at the largest finite number of the dtype:
    a single pair never yields an infinity or a NaN. A sum over pairs, or the norm of the parameters' gradient, still
    can, since forward KL's gradient at `l = -90` really is `beta e^{90}`: for training, bound the weight explicitly
    with [`TangentTail`].

    Args:
        chosen_logratios (`torch.Tensor` of shape `(B,)`):
            `log pi(y_w|x) - log pi_ref(y_w|x)` of the chosen responses, in nats: summed over the tokens of the
            response, not averaged.
        rejected_logratios (`torch.Tensor` of shape `(B,)`):
            The same of the rejected responses.
        beta (`float`):
            Strength of the constraint, greater than 0. Compare divergences at equal `beta * divergence.curvature`.
        divergence (`str` or [`Divergence`]):
            Name of the divergence, as for [`get_divergence`], or an instance. In the `alpha` divergence, alpha follows
            the paper: 0 is the limit of reverse KL and 1 is forward KL, one minus TRL's.

    Returns:
        `torch.Tensor` of shape `(B,)`: the losses, in float32, or float64 if an input is. Differentiable once: a
        backward pass with `create_graph=True` raises a `RuntimeError`.

    Raises:
        ValueError: if the shapes differ, an input is not floating-point, `beta` is not a finite number greater than 0,
            or the name is refused by [`get_divergence`].

    Example: with forward KL the ratios 2 and 1/2 have the scores `1 - 1/2` and `1 - 2`. At `beta = 1`, `z = 1.5` and
    the loss is `log(1 + e^{-1.5}) = 0.2014`. The gradients are `-sigmoid(-1.5) / 2 = -0.0912` and
    `sigmoid(-1.5) * 2 = 0.3649`: a likely response is pulled weakly, an unlikely one pushed hard.

    ```python
    >>> chosen = torch.tensor([2.0]).log().requires_grad_()
    >>> rejected = torch.tensor([0.5]).log().requires_grad_()
    >>> loss = f_dpo_loss(chosen, rejected, beta=1.0, divergence="forward_kl")
    >>> loss.mean().backward()
    >>> loss.detach(), chosen.grad, rejected.grad
    (tensor([0.2014]), tensor([-0.0912]), tensor([0.3649]))
    ```
    """
    if chosen_logratios.shape != rejected_logratios.shape:
        raise ValueError(
            f"chosen_logratios and rejected_logratios must have the same shape, got {tuple(chosen_logratios.shape)} "
            f"and {tuple(rejected_logratios.shape)}."
        )
    if not (chosen_logratios.is_floating_point() and rejected_logratios.is_floating_point()):
        raise ValueError(
            f"chosen_logratios and rejected_logratios must be floating-point tensors, got {chosen_logratios.dtype} "
            f"and {rejected_logratios.dtype}."
        )
    return _FDPOLoss.apply(
        chosen_logratios, rejected_logratios, _check_positive("beta", beta), get_divergence(divergence)
    )
