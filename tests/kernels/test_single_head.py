"""
One LM head, in tiles: against full logits, against the policy's half of the paired head, and its cost in GEMMs.
"""

import math

import pytest
import torch
from recording import Recorder

from trl_ext._trl import ChunkedLogProbFunction
from trl_ext.kernels import head_statistics, paired_head_details


N, H, V = 11, 6, 37
TILES = [None, (4, 8), (3, V), (N, 5)]


def inputs(dtype=torch.float64, bias=False, seed=0):
    generator = torch.Generator().manual_seed(seed)
    hidden, weight = (torch.randn(n, H, generator=generator, dtype=dtype) for n in (N, V))
    labels = torch.randint(V, (N,), generator=generator)
    return hidden, weight, torch.randn(V, generator=generator, dtype=dtype) if bias else None, labels


def naive(hidden, weight, bias, labels, scale=1.0, softcap=None):
    """Log-probability, entropy, mean logit and whether the label is the most likely one, from full logits."""
    logits = torch.nn.functional.linear(hidden, weight, bias) * scale
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    logps = logits.log_softmax(-1)
    entropy = torch.special.entr(logps.exp()).sum(-1)
    return logps.gather(1, labels[:, None])[:, 0], entropy, logits.mean(-1), logits.argmax(-1) == labels


@pytest.mark.parametrize("tiles", TILES, ids=str)
@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])
@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
@pytest.mark.parametrize("scale, softcap", [(1.0, None), (0.25, None), (1.5, 2.0)])
def test_equals_full_logits(tiles, trained, bias, scale, softcap):
    tensors = inputs(bias=bias)
    found, expected = [], []
    for results, compute in ((found, True), (expected, False)):
        hidden, weight, b = (None if x is None else x.clone().requires_grad_(trained) for x in tensors[:3])
        hidden.requires_grad_()
        if compute:
            values = head_statistics(
                hidden, weight, tensors[3], bias=b, logit_scale=scale, softcap=softcap, details=True, _tiles=tiles
            )
        else:
            values = naive(hidden, weight, b, tensors[3], scale, softcap)
        (values[0] * torch.arange(1.0, N + 1)).sum().backward()
        results += [*(value.detach() for value in values), hidden.grad]
        results += [x.grad for x in (weight, b) if trained and x is not None]
    for value, truth in zip(found, expected, strict=True):
        torch.testing.assert_close(value, truth, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])
def test_gradient_in_float64(trained):
    hidden, weight, _, labels = inputs()
    hidden.requires_grad_()
    weight.requires_grad_(trained)
    assert torch.autograd.gradcheck(lambda h, w: head_statistics(h, w, labels, _tiles=(4, 8)).logps, (hidden, weight))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])
def test_is_the_policys_half_of_the_paired_head(dtype, trained):
    """To the bit, so that TDPO's log-probabilities are f-DPO's."""
    hidden, weight, _, labels = inputs(dtype)
    other = inputs(dtype, seed=1)[0]
    single = head_statistics(hidden.requires_grad_(), weight.requires_grad_(trained), labels, details=True)
    paired = paired_head_details(hidden, weight, other, weight, labels, details=True)
    expected = (paired.policy_logps, paired.entropy, paired.mean_logits, paired.is_top1)
    for value, truth in zip(single, expected, strict=True):
        assert torch.equal(value, truth)
    gradients = [torch.autograd.grad(logps.sum(), hidden)[0] for logps in (single.logps, paired.policy_logps)]
    assert torch.equal(*gradients) or trained
    torch.testing.assert_close(*gradients, rtol=2e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-6)


def test_ignored_labels_and_missing_tokens():
    hidden, weight, bias, labels = inputs(bias=True)
    bias[[3, 5]] = -math.inf  # as a padded vocabulary has them
    labels[labels == 3], labels[labels == 5] = 4, 6
    labels[2] = -100
    found = head_statistics(hidden.requires_grad_(), weight, labels, bias=bias, details=True, _tiles=(4, 8))
    truth = naive(hidden, weight, bias, labels.clamp(min=0))[0].detach()
    truth[2] = 0.0
    torch.testing.assert_close(found.logps.detach(), truth)
    assert found.entropy.isfinite().all() and found.entropy[2] == 0
    found.logps.sum().backward()
    assert hidden.grad.isfinite().all() and not hidden.grad[2].any() and hidden.grad[3].any()
    nothing = head_statistics(hidden, weight, torch.full_like(labels, -100))
    assert nothing.logps.requires_grad and not nothing.logps.any()


@pytest.mark.parametrize("trained, own, trls", [(False, 2, 3), (True, 4, 4)], ids=["frozen", "trained"])
def test_matrix_products(trained, own, trls):
    """Of the head's size, forward and backward, counted in multiplications; TRL's head beside it."""
    hidden, weight, _, labels = inputs(torch.float32)
    hidden.requires_grad_()
    weight.requires_grad_(trained)
    for products, compute in (
        (own, lambda: head_statistics(hidden, weight, labels).logps),
        (
            trls,
            lambda: ChunkedLogProbFunction.apply(hidden, weight, None, labels, 1.0, V, None, 1.0, ("log_probs",))[0],
        ),
    ):
        with Recorder() as counter:
            compute().sum().backward()
        assert counter.multiplications == products * N * H * V


@pytest.mark.parametrize(
    "change, match",
    [
        ({"labels": torch.zeros(N - 1, dtype=torch.long)}, "as many positions, got 11 and 10"),
        ({"labels": torch.full((N,), V)}, f"holds {V}"),
        ({"labels": torch.full((N,), -1)}, "holds -1"),
        ({"hidden": torch.zeros(1, N, H)}, r"\(1, 11, 6\)"),
        ({"weight": torch.zeros(V, H + 1)}, f"{H + 1}"),
        ({"softcap": 0.0}, "softcap"),
        ({"logit_scale": math.inf}, "logit_scale"),
    ],
    ids=["positions", "label", "negative label", "shape", "weight", "softcap", "scale"],
)
def test_bad_input(change, match):
    hidden, weight, _, labels = inputs(torch.float32)
    with pytest.raises(ValueError, match=match):
        head_statistics(**{"hidden": hidden, "weight": weight, "labels": labels} | change)
