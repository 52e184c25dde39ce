"""What the paired head does with a tile, compiled, beside the same run eagerly."""

import functools
import math

import pytest
import torch
from test_paired_head import heads

from trl_ext.kernels import paired_head_details, paired_head_statistics, tiles


COMPILED = {  # arguments of `paired_head_details`, whether the head is trained, whether it has biases
    "frozen": (dict(), False, False),
    "frozen, all statistics": (dict(details=True, ref_entropy=True), False, False),
    "trained, masked": (dict(details=True, ref_entropy=True), True, True),
    "trained, soft-capped": (dict(softcap=3.0, logit_scale=0.7), True, False),
    "some rows": (dict(kl_gradient=torch.arange(11) > 4), False, False),
}


def eager_and_compiled(case, dtype=torch.float32, device="cpu", **shape):
    """Outputs and gradients of one input, eager and compiled."""
    options, trained, biases = COMPILED[case]
    policy, reference, labels = heads(dtype=dtype, biases=biases, **shape)
    if biases:  # tokens that one of the models, or neither, can generate
        policy[2][3], reference[2][5] = -math.inf, -math.inf
        policy[2][7] = reference[2][7] = -math.inf
        labels[labels == 3] = labels[labels == 7] = 1
    move = {name: value.to(device) if torch.is_tensor(value) else value for name, value in options.items()}
    found = []
    for compiled in (False, True):
        tensors = [None if x is None else x.to(device) for x in (*policy, *reference)]
        tensors[0].requires_grad_()
        tensors[1].requires_grad_(trained)
        own = dict(policy_bias=tensors[2], ref_bias=tensors[5], compiled=compiled, **move)
        tiles = (4, 16) if device == "cpu" else None
        outputs = paired_head_details(*tensors[:2], *tensors[3:5], labels.to(device), _tiles=tiles, **own)
        loss = outputs.policy_logps.sum() + outputs.kl[torch.isfinite(outputs.kl)].sum()
        inputs = tensors[: 2 if trained else 1]
        found.append((outputs, torch.autograd.grad(loss, inputs)))
    return found


def assert_agree(found, tolerance):
    (eager, eager_grads), (compiled, compiled_grads) = found
    for name, expected in eager._asdict().items():
        if expected is None or expected.dtype == torch.bool:
            continue
        torch.testing.assert_close(getattr(compiled, name), expected, rtol=tolerance, atol=tolerance, msg=name)
    for expected, actual in zip(eager_grads, compiled_grads, strict=True):
        torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance * expected.abs().max().item())


@pytest.fixture
def compiler(monkeypatch, request):
    """`torch.compile` with the backend of the parameter, and no trace of what earlier tests compiled or failed to."""
    backend = getattr(request, "param", "aot_eager")
    torch._dynamo.reset()
    made = []

    def compile_(function):
        made.append(function.__name__)
        return torch.compile(function, dynamic=True, backend=backend)

    monkeypatch.setattr(tiles, "_compile", functools.cache(compile_))
    monkeypatch.setattr(tiles, "_failed", set())
    yield made
    torch._dynamo.reset()


@pytest.mark.parametrize("case", COMPILED)
def test_compiled_tiles(case, compiler):
    """
    What is compiled, which is another code path where the tiles may not be overwritten, computes the same: in float64
    within 1e-12, as its sums run in another order. The compiler's own code is left to the slow test.
    """
    assert_agree(eager_and_compiled(case, torch.float64), 1e-12)
    assert "fold_tile" in compiler and ("logit_gradient" in compiler) == COMPILED[case][1]
    assert not tiles._failed


@pytest.mark.slow
@pytest.mark.parametrize("compiler", ["inductor"], indirect=True)
@pytest.mark.parametrize("case", COMPILED)
def test_code_of_the_compiler(case, compiler):
    """The C++ that PyTorch's compiler writes for a CPU, in float32."""
    assert_agree(eager_and_compiled(case), 2e-5)
    assert not tiles._failed


def test_identical_models_compiled(compiler):
    """Their divergence and its gradient are exactly zero in the compiled code as well."""
    (hidden, weight, _), _, labels = heads(dtype=torch.float32)
    hidden.requires_grad_()
    _, _, kl = paired_head_statistics(hidden, weight, hidden.detach(), weight, labels, compiled=True)
    assert kl.abs().max() == 0 and torch.autograd.grad(kl.sum(), hidden)[0].abs().max() == 0
    assert compiler and not tiles._failed


def test_a_failing_compiler_is_done_without(monkeypatch):
    def fail(function):
        raise RuntimeError("no compiler")

    monkeypatch.setattr(tiles, "_compile", fail)
    monkeypatch.setattr(tiles, "_failed", set())
    with pytest.warns(UserWarning, match="fold_tile.*no compiler"):
        found = eager_and_compiled("frozen, all statistics")
    for eager, compiled in zip(*(found[i][0] for i in (0, 1)), strict=True):
        assert eager is None or torch.equal(eager, compiled)
    assert torch.equal(found[0][1][0], found[1][1][0])


def test_when_tiles_are_compiled(monkeypatch):
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    monkeypatch.delenv(tiles.COMPILE_VARIABLE, raising=False)
    assert not tiles.is_compiled(cuda, None) and tiles.is_compiled(cpu, True)
    monkeypatch.setenv(tiles.COMPILE_VARIABLE, "1")
    assert tiles.is_compiled(cuda, None) and not tiles.is_compiled(cpu, None) and not tiles.is_compiled(cuda, False)


@pytest.mark.gpu
@pytest.mark.parametrize("case", COMPILED)
def test_compiled_on_cuda(case, monkeypatch):
    monkeypatch.setattr(tiles, "_failed", set())
    rows = {"n": 11} if case == "some rows" else {"n": 300}
    assert_agree(eager_and_compiled(case, device="cuda", hidden=64, vocab=5000, **rows), 1e-4)
    assert not tiles._failed
