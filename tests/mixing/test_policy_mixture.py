"""
The mixture's decoding against enumeration of all responses of tiny models, and its bookkeeping of caches and adapters.
"""

import itertools
import warnings

import pytest
import tiny
import torch
from peft import LoraConfig, get_peft_model

from trl_ext.mixing import MixtureWeights, PolicyMixture


VOCAB, EOS = 6, 5
PROMPT = torch.tensor([[1, 2, 3]])


@pytest.fixture(scope="module")
def models():
    made = [tiny.model(seed=seed, vocab_size=VOCAB, dtype=torch.float64).eval() for seed in (0, 1)]
    for model in made:
        model.generation_config.eos_token_id = EOS
    return made


@pytest.fixture(scope="module")
def adapters():
    """A base with two adapters that change it visibly, in training mode with one adapter active."""
    torch.manual_seed(0)
    model = tiny.model(seed=0, vocab_size=VOCAB, dtype=torch.float64)
    model.generation_config.eos_token_id = EOS
    config = LoraConfig(r=2, target_modules=["q_proj", "v_proj", "down_proj"], init_lora_weights=False)
    model = get_peft_model(model, config, adapter_name="first")
    model.add_adapter("second", config)
    return model.train()


def sequence_logps(model, prompt, completion):
    """log pi of a completion, by a plain forward."""
    ids = torch.cat([prompt, completion], 1)
    with torch.no_grad():
        logps = model(ids).logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
    return logps[:, prompt.shape[1] - 1 :].sum(1)


def responses(length):
    """Every response of at most `length` tokens, as rows of ids padded with 0, and their masks."""
    found = []
    for tokens in itertools.product(range(VOCAB), repeat=length):
        end = tokens.index(EOS) + 1 if EOS in tokens else length
        if all(token == 0 for token in tokens[end:]):
            found.append((list(tokens), [1] * end + [0] * (length - end)))
    ids, masks = zip(*found, strict=True)
    return torch.tensor(ids), torch.tensor(masks)


def masked_logps(model, ids, mask):
    whole = torch.cat([PROMPT.expand(len(ids), -1), ids], 1)
    with torch.no_grad():
        logps = model(whole).logits[:, :-1].log_softmax(-1).gather(-1, whole[:, 1:, None])[..., 0]
    return (logps[:, PROMPT.shape[1] - 1 :] * mask).sum(1)


def mixture_logps(mixture, ids, mask):
    """log q and sum of log Z of every response."""
    whole = torch.cat([PROMPT.expand(len(ids), -1), ids], 1)
    found = mixture.log_probs(whole)
    start = PROMPT.shape[1] - 1
    return tuple((values[:, start:] * mask).sum(1) for values in found)


def test_weights_repair_the_token_level_mixture(models):
    """
    Over all 156 responses of up to 3 tokens: log q + sum log Z is sum_k lambda_k log pi_k, so q times its weight,
    normalized, is the mixture of whole responses. q alone is another distribution.
    """
    ids, mask = responses(3)
    assert masked_logps(models[0], ids, mask).exp().sum().item() == pytest.approx(1)
    mixture = PolicyMixture(models, weights=[0.3, 0.7])
    log_q, log_z = mixture_logps(mixture, ids, mask)
    geometric = 0.3 * masked_logps(models[0], ids, mask) + 0.7 * masked_logps(models[1], ids, mask)
    torch.testing.assert_close(log_q + log_z, geometric, rtol=1e-10, atol=1e-10)
    assert log_q.exp().sum().item() == pytest.approx(1) and (log_z <= 1e-12).all()
    exact = geometric.softmax(0)
    assert (exact - log_q.exp()).abs().sum().item() / 2 > 0.02


def test_one_policy_is_itself(models):
    ids, mask = responses(2)
    for k, weights in enumerate(([1.0, 0.0], [0.0, 1.0])):
        log_q, log_z = mixture_logps(PolicyMixture(models, weights=weights), ids, mask)
        torch.testing.assert_close(log_q, masked_logps(models[k], ids, mask), rtol=1e-10, atol=1e-10)
        assert log_z.abs().max() < 1e-12
    # Identical policies, too.
    log_q, log_z = mixture_logps(PolicyMixture([models[0]] * 2, weights=[0.4, 0.6]), ids, mask)
    torch.testing.assert_close(log_q, masked_logps(models[0], ids, mask), rtol=1e-10, atol=1e-10)


def test_resampling_approaches_the_mixture(models):
    """
    Frequencies of 3000 draws: with 16 candidates half as far from the mixture of whole responses as with one, or
    nearer.
    """
    ids, mask = responses(2)
    mixture = PolicyMixture(models, weights=[0.5, 0.5])
    exact = (0.5 * (masked_logps(models[0], ids, mask) + masked_logps(models[1], ids, mask))).softmax(0)
    distance = {}
    for candidates in (1, 16):
        generator = torch.Generator().manual_seed(0)
        found = mixture.generate(PROMPT.expand(3000, -1), max_new_tokens=2, candidates=candidates, generator=generator)
        keys = found.completion_ids[:, 0] * VOCAB + found.completion_ids[:, 1]
        counts = torch.bincount(keys, minlength=VOCAB**2).double() / 3000
        distance[candidates] = (counts[ids[:, 0] * VOCAB + ids[:, 1]] - exact).abs().sum().item() / 2
        assert counts[ids[:, 0] * VOCAB + ids[:, 1]].sum() == 1  # nothing but proper responses
    log_q, _ = mixture_logps(mixture, ids, mask)
    expected = (log_q.exp() - exact).abs().sum().item() / 2
    assert distance[1] == pytest.approx(expected, abs=0.03) and distance[16] < 0.5 * expected + 0.01


@pytest.mark.parametrize("use_adapters", [False, True])
def test_caches_and_padding(models, adapters, use_adapters):
    """What is sampled with a cache per policy has the weights of a plain forward, for prompts of two lengths."""
    if use_adapters:
        mixture = PolicyMixture(adapters, adapters=["first", "second"], weights=[0.3, 0.7])
    else:
        mixture = PolicyMixture(models, weights=[0.3, 0.7])
    prompts = torch.tensor([[1, 2, 3, 4], [0, 0, 2, 2]])
    mask = torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1]])
    found = mixture.generate(prompts, mask, max_new_tokens=6, candidates=3, generator=torch.Generator().manual_seed(1))
    assert found.log_weights.shape == (2, 3) and found.chosen.shape == (2,)
    for row, start in ((0, 0), (1, 2)):
        length = int(found.completion_mask[row].sum())
        completion = found.completion_ids[row : row + 1, :length]
        assert EOS not in completion[0, :-1].tolist() and (found.completion_ids[row, length:] == 0).all()
        prompt = prompts[row : row + 1, start:]
        log_z = mixture.log_probs(torch.cat([prompt, completion], 1)).log_normalizers
        assert log_z[0, prompt.shape[1] - 1 :].sum().item() == pytest.approx(
            found.log_weights[row, found.chosen[row]].item(), rel=1e-9, abs=1e-9
        )
    shares = found.log_weights.softmax(1)
    torch.testing.assert_close(found.effective_size, 1 / shares.square().sum(1))


def test_adapters_are_policies_and_nothing_is_left_changed(adapters):
    """Equal to two models with these adapters; active adapter, gradients and modes are what they were."""
    ids, mask = responses(2)
    separate = []
    for name in ("first", "second"):
        adapters.set_adapter(name)
        adapters.eval()
        separate.append(masked_logps(adapters, ids, mask))
    adapters.set_adapter("first")
    adapters.train()
    trainable = {name: parameter.requires_grad for name, parameter in adapters.named_parameters()}
    mixture = PolicyMixture(adapters, adapters=["first", "second"], weights=[0.6, 0.4])
    log_q, log_z = mixture_logps(mixture, ids, mask)
    torch.testing.assert_close(log_q + log_z, 0.6 * separate[0] + 0.4 * separate[1], rtol=1e-10, atol=1e-10)
    mixture.generate(PROMPT, max_new_tokens=2)
    assert adapters.active_adapter == "first" and adapters.training
    assert {name: parameter.requires_grad for name, parameter in adapters.named_parameters()} == trainable


def test_merge_sums_the_weight_changes(adapters):
    mixture = PolicyMixture(adapters, adapters=["first", "second"], weights=[0.6, 0.4])
    mixture.merge("merged")
    try:
        layer = adapters.base_model.model.model.layers[0].self_attn.q_proj
        expected = 0.6 * layer.get_delta_weight("first") + 0.4 * layer.get_delta_weight("second")
        torch.testing.assert_close(layer.get_delta_weight("merged"), expected, rtol=1e-10, atol=1e-12)
    finally:
        adapters.delete_adapter("merged")
        adapters.set_adapter("first")


def test_greedy_and_reproducible(models):
    mixture = PolicyMixture(models, weights=[0.5, 0.5])
    first, second = (mixture.generate(PROMPT, max_new_tokens=4, do_sample=False) for _ in range(2))
    assert torch.equal(first.completion_ids, second.completion_ids)
    log_q = mixture.log_probs(torch.cat([PROMPT, first.completion_ids[:, :1]], 1)).token_logps[0, -1]
    for token in range(VOCAB):
        other = torch.cat([PROMPT, torch.tensor([[token]])], 1)
        assert mixture.log_probs(other).token_logps[0, -1] <= log_q
    sampled = [
        mixture.generate(PROMPT, max_new_tokens=4, candidates=3, generator=torch.Generator().manual_seed(3))
        for _ in range(2)
    ]
    assert torch.equal(sampled[0].completion_ids, sampled[1].completion_ids)


def test_weights_of_the_solver_and_outside_the_simplex(models):
    solved = MixtureWeights([0.25, 0.75], 0.0, [0.0, 0.0], [[0.1, 0.4], [0.6, 0.9]], 4.0, 8, 8, 0.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert PolicyMixture(models, weights=solved).weights == [0.25, 0.75]
    with pytest.warns(UserWarning, match=r"\[1.5, -0.5\] do not lie on the simplex"):
        PolicyMixture(models, weights=[1.5, -0.5])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(weights=[1.0]), "one number per policy, 2, got 1"),
        (dict(weights=[0.0, 0.0]), "all 0"),
        (dict(weights=[0.5, float("nan")]), r"weights\[1\].*nan"),
        (dict(weights=[0.5, float("inf")]), r"weights\[1\].*inf"),
        (dict(weights=[0.5, 0.5], adapters=["a", "b"]), r"which has none, got \['a', 'b'\]"),
    ],
)
def test_refused_mixtures(models, options, message):
    with pytest.raises(ValueError, match=message):
        PolicyMixture(models[0] if "adapters" in options else models, **options)


def test_refused_vocabularies_and_settings(models, adapters):
    other = tiny.model(vocab_size=VOCAB + 1, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"one vocabulary, got heads of \[6, 7\]"):
        PolicyMixture([models[0], other], weights=[0.5, 0.5])
    mixture = PolicyMixture(models, weights=[0.5, 0.5])
    for options, message in (
        (dict(max_new_tokens=0), "max_new_tokens.*0"),
        (dict(max_new_tokens=2, candidates=0), "candidates.*0"),
        (dict(max_new_tokens=2, candidates=2, do_sample=False), "candidates=2.*do_sample=False"),
        (dict(max_new_tokens=2, attention_mask=torch.tensor([[1, 1, 0]])), "padded on the left"),
    ):
        with pytest.raises(ValueError, match=message):
            mixture.generate(PROMPT, **options)
    with pytest.raises(ValueError, match="models of their own"):
        mixture.merge("merged")
    with pytest.raises(ValueError, match=r"which has 'first', 'second', got \['third'\]"):
        PolicyMixture(adapters, adapters=["third"], weights=[1.0])
