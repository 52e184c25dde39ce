"""The paired head against full log-softmax in float64, which shares no code with it."""

import math

import pytest
import torch
from recording import Recorder

from trl_ext.kernels import paired_head_details, paired_head_statistics


TILES = [None, (1, 1), (3, 7), (100, 5), (4, 1000), (2, 36)]


def log_softmax(hidden, weight, bias=None, scale=1.0, softcap=None):
    z = hidden.double() @ weight.double().T
    if bias is not None:
        z = z + bias.double()
    z = z * scale
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    return z.log_softmax(-1)


def oracle(policy, reference, labels, **transform):
    """Log-probabilities and KL(reference || policy) from both full distributions; `0 log 0 = 0`."""
    log_p, log_q = log_softmax(*policy, **transform), log_softmax(*reference, **transform)
    picked = [x.gather(1, labels[:, None])[:, 0] for x in (log_p, log_q)]
    terms = torch.where(log_q == -math.inf, 0.0, log_q.exp() * (log_q - log_p))
    return *picked, terms.sum(-1)


def heads(n=11, hidden=8, vocab=37, dtype=torch.float64, seed=0, biases=False, ref_hidden_size=None):
    generator = torch.Generator().manual_seed(seed)

    def random(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    def head(size):
        return [random(n, size), random(vocab, size), random(vocab) if biases else None]

    policy, reference = head(hidden), head(ref_hidden_size or hidden)
    return policy, reference, torch.randint(0, vocab, (n,), generator=generator)


def call(policy, reference, labels, **kwargs):
    biases = {"policy_bias": policy[2], "ref_bias": reference[2]}
    return paired_head_statistics(*policy[:2], *reference[:2], labels, **biases, **kwargs)


def gradients(outputs, inputs, weights):
    """Gradient of a combination of policy log-probability and KL that no single sign or factor explains away."""
    value = (outputs[0] * weights[0]).sum() + (outputs[2] * weights[1]).sum()
    return torch.autograd.grad(value, inputs, retain_graph=True)


@pytest.mark.parametrize("tiles", TILES)
@pytest.mark.parametrize("masked", [False, True])
def test_entropies(tiles, masked):
    """Entropy of either model, for any tiling, with tokens that a bias of `-inf` takes out of the vocabulary."""
    policy, reference, labels = heads(biases=True)
    if masked:
        policy[2][[0, 5]] = reference[2][[0, 5, 36]] = -math.inf
        labels = labels.clamp(6, 35)
    found = paired_head_details(
        *policy[:2],
        *reference[:2],
        labels,
        policy_bias=policy[2],
        ref_bias=reference[2],
        details=True,
        ref_entropy=True,
        _tiles=tiles,
    )
    for value, model in ((found.entropy, policy), (found.ref_entropy, reference)):
        logs = log_softmax(*model)
        truth = -torch.where(logs == -math.inf, 0.0, logs.exp() * logs).sum(-1)
        torch.testing.assert_close(value, truth, rtol=1e-12, atol=1e-12)
    assert call(policy, reference, labels, _tiles=tiles)[1].equal(found.ref_logps)  # and nothing else changes


# ---- Values and gradients -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tiles", TILES)
@pytest.mark.parametrize(
    "transform",
    [{}, {"scale": 0.3}, {"softcap": 2.5}, {"scale": 1.7, "softcap": 4.0}],
    ids=["", "scale", "cap", "both"],
)
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-5)], ids=["f64", "f32"])
@pytest.mark.parametrize("trained", [True, False], ids=["trained", "frozen"])
def test_against_full_log_softmax(tiles, transform, dtype, tolerance, trained):
    """
    Values and all gradients, with biases, scale and soft-capping, at an odd vocabulary, for any tiling. A trained
    head's gradient is recomputed in the backward, a frozen one's accumulates in the forward.
    """
    policy, reference, labels = heads(dtype=dtype, biases=True, ref_hidden_size=6)
    inputs = policy if trained else policy[:1]
    for tensor in inputs:
        tensor.requires_grad_()
    kwargs = {{"scale": "logit_scale"}.get(key, key): value for key, value in transform.items()}
    outputs = call(policy, reference, labels, **kwargs, _tiles=tiles)
    expected = oracle(policy, reference, labels, **transform)
    for value, truth in zip(outputs, expected, strict=True):
        assert value.dtype == dtype and value.shape == (11,)
        torch.testing.assert_close(value.double(), truth, rtol=tolerance, atol=tolerance)
    weights = torch.linspace(-1, 2, 22, dtype=torch.float64).reshape(2, 11)
    for value, truth in zip(gradients(outputs, inputs, weights), gradients(expected, inputs, weights), strict=True):
        torch.testing.assert_close(value, truth, rtol=tolerance, atol=tolerance)


def test_worked_example():
    """
    p = (1/4, 3/4), q = (1/2, 1/2), label 1: log p = log 0.75, log q = log 0.5,
    KL(q || p) = 1/2 log 2 + 1/2 log(2/3) = 1/2 log(4/3) = 0.1438; KL(p || q) would be 0.1308.
    """
    hidden, weight = torch.tensor([[1.0]]), torch.tensor([[0.0], [math.log(3)]])
    logps, ref_logps, kl = paired_head_statistics(hidden, weight, 0 * hidden, weight, torch.tensor([1]))
    assert logps.item() == pytest.approx(math.log(0.75), abs=1e-6)
    assert ref_logps.item() == pytest.approx(math.log(0.5), abs=1e-6)
    assert kl.item() == pytest.approx(0.5 * math.log(4 / 3), abs=1e-6)


@pytest.mark.parametrize("softcap", [None, 3.0])
def test_gradcheck(softcap):
    policy, reference, labels = heads(n=4, hidden=3, vocab=7, biases=True)
    labels[1] = -100
    for tensor in policy:
        tensor.requires_grad_()

    def function(hidden, weight, bias):
        return call((hidden, weight, bias), reference, labels, logit_scale=0.8, softcap=softcap, _tiles=(3, 4))[::2]

    assert torch.autograd.gradcheck(function, tuple(policy))


@pytest.mark.parametrize("softcap", [None, 3.0], ids=["accumulated", "recomputed"])
def test_kl_gradient_of_some_rows(softcap):
    """Rows that are told to have no gradient for the KL keep its value, and all others their gradients."""
    policy, reference, labels = heads()
    policy[0].requires_grad_()
    labels[2] = -100
    rows = torch.tensor([True, False] * 5 + [True])
    expected = oracle(policy, reference, labels.clamp(min=0), softcap=softcap)
    expected = [value.masked_fill(labels == -100, 0.0) for value in expected]
    expected[2] = torch.where(rows, expected[2], expected[2].detach())
    for given, held in ((rows, expected[2]), (True, None), (False, expected[2].detach())):
        outputs = paired_head_details(
            *policy[:2], *reference[:2], labels, softcap=softcap, kl_gradient=given, _tiles=(3, 7)
        )
        truths = list(expected)
        if held is None:
            truths[2] = oracle(policy, reference, labels.clamp(min=0), softcap=softcap)[2].masked_fill(
                labels == -100, 0.0
            )
        else:
            truths[2] = held
        torch.testing.assert_close(outputs.kl, truths[2], rtol=1e-12, atol=1e-12)
        value, truth = (gradients(values, policy[0], (1.0, 2.0))[0] for values in (outputs, truths))
        torch.testing.assert_close(value, truth, rtol=1e-12, atol=1e-12)


def test_a_gradient_for_one_output_only():
    """Without a gradient for the KL, or without one for the log-probability, and from rows that mix the two."""
    policy, reference, labels = heads()
    policy[0].requires_grad_()
    expected = oracle(policy, reference, labels)
    chosen = torch.arange(11) < 6
    for weights in ((1.0, 0.0), (0.0, 1.0), (1.0, torch.where(chosen, 0.0, 1.0))):
        outputs = call(policy, reference, labels, _tiles=(3, 7))
        value, truth = (gradients(values, policy[0], weights)[0] for values in (outputs, expected))
        torch.testing.assert_close(value, truth, rtol=1e-12, atol=1e-12)
    for index in (0, 2):
        outputs = call(policy, reference, labels)
        value, truth = (
            torch.autograd.grad(values[index].sum(), policy[0], retain_graph=True)[0] for values in (outputs, expected)
        )
        torch.testing.assert_close(value, truth, rtol=1e-12, atol=1e-12)


def test_no_gradient_to_the_reference():
    policy, reference, labels = heads(biases=True)
    for tensor in (*policy, *reference):
        tensor.requires_grad_()
    logps, ref_logps, kl = call(policy, reference, labels)
    assert not ref_logps.requires_grad
    (logps + kl).sum().backward()
    assert all(tensor.grad is None for tensor in reference) and all(tensor.grad is not None for tensor in policy)


def test_gradients_only_where_required():
    """A frozen head gets none; a trained head under frozen hidden states still does."""
    policy, reference, labels = heads(biases=True)
    expected = heads(biases=True)[0]
    for tensor in expected:
        tensor.requires_grad_()
    sum(x.sum() for x in oracle(expected, reference, labels)[::2]).backward()
    for index in range(3):
        inputs = [tensor.clone().requires_grad_(i == index) for i, tensor in enumerate(policy)]
        outputs = call(inputs, reference, labels, _tiles=(4, 10))
        (outputs[0] + outputs[2]).sum().backward()
        assert [tensor.grad is not None for tensor in inputs] == [i == index for i in range(3)]
        torch.testing.assert_close(inputs[index].grad, expected[index].grad, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("tiles", TILES)
def test_shared_head(tiles):
    """One weight for both models, trained through the policy alone."""
    policy, reference, labels = heads(biases=True)
    policy[1].requires_grad_()
    reference[1:] = policy[1:]
    outputs = call(policy, reference, labels, _tiles=tiles)
    expected = oracle(policy, [x.detach() for x in reference], labels)
    for value, truth in zip(outputs, expected, strict=True):
        torch.testing.assert_close(value, truth, rtol=1e-12, atol=1e-12)
    value, truth = (gradients(values, policy[1], (1.0, 2.0))[0] for values in (outputs, expected))
    torch.testing.assert_close(value, truth, rtol=1e-12, atol=1e-12)


def test_details():
    """Entropy, mean logit and top-1 of the policy are those of the full logits, in every tiling."""
    policy, reference, labels = heads()
    labels[:4] = (policy[0] @ policy[1].T).argmax(-1)[:4]
    log_p = log_softmax(*policy)
    for tiles in TILES:
        values = paired_head_details(*policy[:2], *reference[:2], labels, details=True, _tiles=tiles)
        torch.testing.assert_close(values.entropy, -(log_p.exp() * log_p).sum(-1))
        torch.testing.assert_close(values.mean_logits, (policy[0] @ policy[1].T).mean(-1))
        assert torch.equal(values.is_top1, log_p.argmax(-1) == labels) and values.is_top1.sum() >= 4
        assert not (values.entropy.requires_grad or values.mean_logits.requires_grad)


# ---- Extremes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("shared", [False, True], ids=["two-heads", "shared"])
@pytest.mark.parametrize("n, hidden, vocab", [(11, 8, 37), (130, 48, 1001), (65, 33, 257), (1, 16, 500)])
def test_identical_models(dtype, shared, n, hidden, vocab):
    """KL and its gradient are exactly zero, whatever the tiles."""
    policy, _, labels = heads(n, hidden, vocab, dtype, biases=True)
    reference = [policy[0].clone()] + ([*policy[1:]] if shared else [x.clone() for x in policy[1:]])
    policy[0].requires_grad_()
    for tiles in (None, (7, 64), (64, 100)):
        logps, ref_logps, kl = call(policy, reference, labels, _tiles=tiles)
        assert torch.equal(kl, torch.zeros_like(kl)) and torch.equal(logps, ref_logps)
        assert not torch.autograd.grad(kl.sum(), policy[0])[0].any()


@pytest.mark.parametrize("scale", [1e-1, 1e-2, 1e-3, 1e-4, 1e-5])
def test_nearby_models(scale):
    """
    In fp32 the KL of close models is never negative, and its error shrinks with their distance: that of the logits,
    1e-6, times the distance. The plain formula returns noise of 1e-7 of either sign at any distance; at 1e-4 the KL is
    2e-7.
    """
    policy, _, labels = heads(64, 16, 500, torch.float32)
    policy[0] *= 3
    reference = [policy[0], policy[1] + scale * heads(64, 16, 500, torch.float32, seed=1)[0][1], None]
    kl = call(policy, reference, labels, _tiles=(16, 64))[2]
    truth = oracle(policy, reference, labels)[2]
    assert (kl > 0).all()
    torch.testing.assert_close(kl.double(), truth, rtol=1e-5, atol=2e-4 * scale)
    log_p, log_q = ((h @ w.T).log_softmax(-1) for h, w, _ in (policy, reference))
    plain = (log_q.exp() * (log_q - log_p)).sum(-1)
    if scale <= 1e-4:
        assert (plain - truth).abs().max() > 50 * (kl - truth).abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("gap", [200.0, -200.0, 1e4, -1e4])
def test_large_gaps(dtype, gap):
    """Logits ten thousand apart: values and gradients are finite and right."""
    policy, reference, labels = heads(dtype=dtype, biases=True)
    policy[2][5] += gap
    for tensor in policy:
        tensor.requires_grad_()
    outputs, expected = call(policy, reference, labels, _tiles=(4, 9)), oracle(policy, reference, labels)
    for value, truth in zip(outputs, expected, strict=True):
        assert value.isfinite().all()
        torch.testing.assert_close(value.double(), truth, rtol=1e-6, atol=1e-5)
    for value, truth in zip(
        gradients(outputs, policy, (1.0, 2.0)), gradients(expected, policy, (1.0, 2.0)), strict=True
    ):
        torch.testing.assert_close(value, truth, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("tiles", TILES)
def test_padded_vocabulary(tiles):
    """Tokens that neither model has, at -inf: the statistics are those of the vocabulary without them."""
    policy, reference, labels = heads(biases=True)
    labels = labels % 30
    for bias in (policy[2], reference[2]):
        bias[30:] = -math.inf
        bias[:2] = -math.inf
    labels = labels.clamp(min=2)
    for tensor in policy:
        tensor.requires_grad_()
    details = paired_head_details(
        *policy[:2], *reference[:2], labels, policy_bias=policy[2], ref_bias=reference[2], details=True, _tiles=tiles
    )
    small = [[h, w[2:30].detach().clone(), b[2:30].detach().clone()] for h, w, b in (policy, reference)]
    for tensor in small[0][1:]:
        tensor.requires_grad_()
    expected = oracle(*small, labels - 2)
    for value, truth in zip(details[:3], expected, strict=True):
        torch.testing.assert_close(value, truth, rtol=1e-12, atol=1e-12)
    assert details.entropy.isfinite().all()
    values, truths = gradients(details, policy, (1.0, 2.0)), gradients(expected, small[0], (1.0, 2.0))
    torch.testing.assert_close(values[0], truths[0], rtol=1e-12, atol=1e-12)
    for value, truth in zip(values[1:], truths[1:], strict=True):
        torch.testing.assert_close(value[2:30], truth, rtol=1e-12, atol=1e-12)
        assert not value[:2].any() and not value[30:].any()


@pytest.mark.parametrize("tiles", TILES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_tokens_of_one_model_only(tiles, dtype):
    """
    Missing in the reference: a finite KL. Missing in the policy only: infinite, even where q underflows; never NaN.
    """
    policy, reference, labels = heads(dtype=dtype, biases=True)
    labels = labels.clamp(min=3)
    policy[0].requires_grad_()
    reference[2][:3] = -math.inf
    outputs, expected = call(policy, reference, labels, _tiles=tiles), oracle(policy, reference, labels)
    for value, truth in zip(outputs, expected, strict=True):
        torch.testing.assert_close(value.double(), truth, rtol=1e-5, atol=1e-5)
    value, truth = (gradients(values, policy[0], (1.0, 2.0))[0] for values in (outputs, expected))
    torch.testing.assert_close(value, truth, rtol=1e-5, atol=1e-5)

    policy[2][1], reference[2][1] = -math.inf, -1e5
    logps, _, kl = call(policy, reference, labels, _tiles=tiles)
    assert (kl == math.inf).all() and logps.isfinite().all()
    assert torch.autograd.grad(kl.sum(), policy[0])[0].isfinite().all()


def test_ignored_labels():
    """-100 gives zeros and no gradient, and the other positions are what they are alone."""
    policy, reference, labels = heads()
    for tensor in policy[:2]:
        tensor.requires_grad_()
    some = labels.clone()
    some[[0, 3, 10]] = -100
    kept = some != -100
    outputs, all_outputs = call(policy, reference, some), call(policy, reference, labels)
    for value, whole in zip(outputs, all_outputs, strict=True):
        assert not value[~kept].any()
        torch.testing.assert_close(value[kept], whole[kept], rtol=1e-13, atol=1e-13)
    hidden, _ = gradients(outputs, policy[:2], (1.0, 2.0))
    assert not hidden[~kept].any() and hidden[kept].any(dim=1).all()


@pytest.mark.parametrize("n", [0, 5])
def test_nothing_to_score(n):
    """No position, or none that counts: zeros, connected to the model, with a gradient of zero."""
    policy, reference, labels = heads(n, biases=True)
    for tensor in policy:
        tensor.requires_grad_()
    labels = torch.full_like(labels, -100)
    outputs = paired_head_details(
        *policy[:2],
        *reference[:2],
        labels,
        policy_bias=policy[2],
        ref_bias=reference[2],
        details=True,
        ref_entropy=True,
    )
    assert all(value.shape == (n,) and not value.any() for value in outputs)
    (outputs.policy_logps + outputs.kl).sum().backward()
    assert all(tensor.grad is not None and not tensor.grad.any() for tensor in policy)


@pytest.mark.parametrize("autocast", [True, False])
def test_bf16(autocast):
    """bf16 operands, from the inputs or from autocast: results in fp32, exact for the rounded operands."""
    policy, reference, labels = heads(32, 64, 300, torch.float32 if autocast else torch.bfloat16)
    for tensor in policy[:2]:
        tensor.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        outputs = call(policy, reference, labels, _tiles=(16, 77))
    rounded = [[x if x is None else x.bfloat16().float().detach() for x in head] for head in (policy, reference)]
    rounded[0][:2] = [tensor.requires_grad_() for tensor in rounded[0][:2]]
    expected = oracle(*rounded, labels)
    for value, truth in zip(outputs, expected, strict=True):
        assert value.dtype == torch.float32
        torch.testing.assert_close(value.double(), truth, rtol=1e-5, atol=2e-5)
    values, truths = gradients(outputs, policy[:2], (1.0, 2.0)), gradients(expected, rounded[0][:2], (1.0, 2.0))
    for tensor, value, truth in zip(policy, values, truths, strict=False):
        assert value.dtype == tensor.dtype
        tolerance = 1e-5 if autocast else 1e-2
        torch.testing.assert_close(value.float(), truth, rtol=tolerance, atol=tolerance * truth.abs().max().item())


# ---- Cost -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize(
    "trained, softcap, with_kl, expected",
    [
        (True, None, True, 6),
        (True, None, False, 5),
        (False, None, True, 4),
        (False, None, False, 3),
        (False, 2.0, True, 5),
        (False, 2.0, False, 4),
    ],
)
def test_number_of_head_gemms(shared, trained, softcap, with_kl, expected):
    """
    6 with a trained head, 4 with a frozen one, 5 with a frozen one behind soft-capping, one less without a gradient
    for the KL: in head-sized GEMMs.
    """
    policy, reference, labels = heads(64, 8, 96, torch.float32)
    if shared:
        reference[1] = policy[1]
    policy[0].requires_grad_()
    policy[1].requires_grad_(trained)
    with Recorder() as recorder:
        values = paired_head_details(
            *policy[:2], *reference[:2], labels, softcap=softcap, kl_gradient=with_kl, _tiles=(16, 32)
        )
        (values.policy_logps + values.kl).sum().backward()
    assert recorder.multiplications == expected * 64 * 8 * 96


@pytest.mark.parametrize("trained, expected", [(True, 5.5), (False, 3.5)])
def test_chosen_rows_of_tdpo2_need_no_reference(trained, expected):
    """Half of the rows have no gradient for the KL: they need no mean of the reference, or no tiles of it again."""
    policy, reference, labels = heads(64, 8, 96, torch.float32)
    policy[0].requires_grad_()
    policy[1].requires_grad_(trained)
    kl_gradient = torch.arange(64) >= 32
    with Recorder() as recorder:
        values = paired_head_details(*policy[:2], *reference[:2], labels, kl_gradient=kl_gradient, _tiles=(32, 32))
        (values.policy_logps + values.kl).sum().backward()
    assert recorder.multiplications == expected * 64 * 8 * 96


def test_shared_weight_is_read_once_a_tile():
    """Where the models share the head, a bf16 tile of it is cast once for both."""
    counts = {}
    for shared in (False, True):
        policy, reference, labels = heads(64, 8, 96, torch.bfloat16)
        if shared:
            reference[1] = policy[1]
        with Recorder() as recorder, torch.no_grad():
            call(policy, reference, labels, _tiles=(16, 32))
        counts[shared] = recorder.weight_casts
    assert counts == {False: 6, True: 3}


@pytest.mark.parametrize("n", [256, 1024])
def test_no_logits_are_held(n):
    """
    The largest tensor of forward and backward is a tile, an input or an output, for any number of positions: what is
    allocated beside inputs and outputs does not grow with them.
    """
    vocab, tile = 4096, (32, 512)
    policy, reference, labels = heads(n, 8, vocab, torch.float32)
    policy[0].requires_grad_()
    with Recorder() as recorder:
        logps, _, kl = call(policy, reference, labels, _tiles=tile)
        (logps + kl).sum().backward()
    assert recorder.largest <= max(policy[0].numel(), policy[1].numel(), tile[0] * tile[1]) < n * vocab / 4


@pytest.mark.parametrize("trained", [True, False])
def test_saved_for_backward(trained):
    """
    Between forward and backward only the inputs and two numbers a position are kept, or with a frozen head two
    gradients of the hidden states' size, and neither head.
    """
    policy, reference, labels = heads(64, 8, 4096, torch.float32)
    policy[0].requires_grad_()
    policy[1].requires_grad_(trained)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: (saved.append(x.numel()), x)[1], lambda x: x):
        call(policy, reference, labels, _tiles=(32, 512))
    inputs = sum(x.numel() for x in (*policy[:2], *reference[:2], labels))
    assert sum(saved) == (inputs + 2 * 64 if trained else 2 * policy[0].numel())


# ---- Errors ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change, message",
    [
        (
            lambda a: a.update(ref_weight=a["ref_weight"][:-1]),
            "37 vocabulary rows and `ref_weight` 36.*policy's vocab",
        ),
        (lambda a: a.update(labels=a["labels"][:-1]), "as many positions, got 11, 11 and 10"),
        (lambda a: a.update(policy_hidden=a["policy_hidden"][None]), "of shape \\(N, H\\).*Flatten"),
        (lambda a: a.update(policy_weight=a["policy_weight"][:, :-1]), "`policy_weight` must be.*\\(V, 8\\)"),
        (lambda a: a.update(ref_weight=a["ref_weight"].to(torch.uint8)), "`ref_weight` must be.*dequantized"),
        (lambda a: a.update(policy_bias=torch.zeros(5)), "`policy_bias` must be of shape \\(37,\\), got \\(5,\\)"),
        (lambda a: a.update(labels=a["labels"] + 37), "`labels` holds .*but the heads have 37 vocabulary rows"),
        (lambda a: a.update(labels=a["labels"] - 40), "neither a token id nor -100"),
        (lambda a: a.update(softcap=0.0), "`softcap` must be a positive"),
        (lambda a: a.update(logit_scale=math.nan), "`logit_scale` must be finite"),
        (lambda a: a.update(kl_gradient=torch.ones(5)), "`kl_gradient` must be a bool.*of shape \\(11,\\)"),
    ],
)
def test_errors(change, message):
    policy, reference, labels = heads()
    arguments = {
        "policy_hidden": policy[0],
        "policy_weight": policy[1],
        "ref_hidden": reference[0],
        "ref_weight": reference[1],
        "labels": labels,
    }
    change(arguments)
    with pytest.raises(ValueError, match=message):
        paired_head_details(**arguments)


# ---- On a device ----------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-4), (torch.bfloat16, 2e-2)], ids=["f32", "bf16"])
def test_on_cuda(dtype, tolerance, trained):
    """Against the same in float64 on the CPU, of the same rounded inputs: cuBLAS's products into float32 among it."""
    policy, reference, labels = heads(n=300, hidden=64, vocab=5000, dtype=dtype)
    results = []
    for device, to in (("cpu", torch.float64), ("cuda", dtype)):
        hidden, weight, ref_hidden, ref_weight = (x.to(device, to) for x in (*policy[:2], *reference[:2]))
        hidden.requires_grad_()
        weight.requires_grad_(trained)
        outputs = paired_head_statistics(hidden, weight, ref_hidden, ref_weight, labels.to(device))
        inputs = [hidden, weight] if trained else [hidden]
        grads = torch.autograd.grad(outputs[0].sum() + outputs[2].sum(), inputs)
        results.append([x.detach().cpu().double() for x in (*outputs, *grads)])
    for expected, actual in zip(*results, strict=True):
        assert (actual - expected).norm() <= tolerance * expected.norm()
