"""IPO's pair loss: worked values, gradient, precision and what is refused."""

import math

import pytest
import torch

from trl_ext.losses import ipo_loss


def test_worked_example():
    """
    Log ratios 2 and -1 at beta 1/4: the margin 3 is 1 more than 2, so 1. At 0 and 0, 4; swapped, (-3 - 2)^2 = 25.
    """
    chosen, rejected = torch.tensor([2.0, 0.0, -1.0]), torch.tensor([-1.0, 0.0, 2.0])
    assert ipo_loss(chosen, rejected, beta=0.25).tolist() == [1.0, 4.0, 25.0]


def test_gradient():
    values = torch.randn(2, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    torch.autograd.gradcheck(lambda x: ipo_loss(x[0], x[1], beta=0.3), (values,))


@pytest.mark.parametrize(
    "dtypes, expected",
    [
        ((torch.bfloat16, torch.bfloat16), torch.float32),
        ((torch.float32, torch.float64), torch.float64),
    ],
)
def test_precision(dtypes, expected):
    """The margin 255 of 256 and 1, less 1. In bfloat16 254 squared, 64516, would be 64512."""
    chosen, rejected = (torch.tensor([value], dtype=dtype) for value, dtype in zip((256.0, 1.0), dtypes, strict=True))
    loss = ipo_loss(chosen, rejected, beta=0.5)
    assert loss.dtype == expected and loss.item() == 254.0**2


@pytest.mark.parametrize("beta", [0.0, -1.0, math.nan, math.inf, "0.1", True])
def test_bad_beta(beta):
    with pytest.raises(ValueError, match="^beta must be a finite number greater than 0, got "):
        ipo_loss(torch.zeros(1), torch.zeros(1), beta=beta)
