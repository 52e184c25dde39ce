"""
Weights from samples of the mixture, where the reference's are too far away; the cache of samples and scores; what is
measured of policies and mixtures. Against models whose tokens are independent, so that F is known however long the
responses are.
"""

import types

import pytest
import tiny
import torch
from peft import LoraConfig, get_peft_model

from trl_ext.mixing import (
    AlignedPolicies,
    MixtureWeights,
    Policy,
    PolicyMixture,
    maximin_weights,
    measure_policies,
    solve_mixture_weights,
)


VOCAB = 8
PROMPTS = ["the red fox", "a blue bird sings", "one"]


class Independent(torch.nn.Module):
    """A model that gives every token the same distribution, whatever came before."""

    def __init__(self, logits):
        super().__init__()
        size = 384
        whole = torch.full((size,), -60.0, dtype=torch.float64)
        whole[5 : 5 + len(logits)] = logits  # behind the special tokens, so that no response ends
        self.head = torch.nn.Parameter(whole.log_softmax(0))
        self.generation_config = types.SimpleNamespace(eos_token_id=None)
        self.config = types.SimpleNamespace(to_dict=dict)
        self.forwards = 0

    def get_output_embeddings(self):
        return types.SimpleNamespace(weight=self.head)

    def forward(self, input_ids, **ignored):
        self.forwards += 1
        return types.SimpleNamespace(logits=self.head.expand(*input_ids.shape, -1), past_key_values=None)


def independent(scale=1.0, strength=1.0):
    """
    Reference and two policies in conflict that differ from it by about `scale` nats a token, the second by `strength`
    times as much.
    """
    generator = torch.Generator().manual_seed(0)
    base, first, second = torch.randn(3, VOCAB, generator=generator, dtype=torch.float64)
    first = scale * first
    second = scale * strength * (0.7 * second - 0.8 * first)
    return Independent(base), [Independent(base + first), Independent(base + second)]


def exact_partition(reference, policies, lam, length):
    """F of `length` independent tokens at the weights (lam, 1 - lam)."""
    ref, first, second = (model.head.detach() for model in (reference, *policies))
    return length * (ref + lam * (first - ref) + (1 - lam) * (second - ref)).logsumexp(0).item()


@pytest.mark.parametrize("length", [5, 60])
def test_weights_from_samples_of_the_mixture(length):
    """
    F at the solution within 3 % of the minimum, at 60 tokens as at 5. The reference's samples alone are refused at
    60 tokens, where `auto` samples the mixture.
    """
    reference, policies = independent(strength=3.0)
    options = dict(
        processing_class=tiny.tokenizer(), reference=reference, responses=8, max_new_tokens=length, batch_size=48
    )
    prompts = PROMPTS * 2
    least = min(exact_partition(reference, policies, lam / 200, length) for lam in range(201))
    found = solve_mixture_weights(policies, prompts, method="mixture", **options)
    assert found.source == "mixture" and found.effective_size > 2
    value = exact_partition(reference, policies, found.weights[0], length)
    assert value - least < 0.03 * abs(least)
    assert found.value == pytest.approx(value, abs=0.1 * abs(least))
    if length == 60:
        with pytest.raises(ValueError, match="effective sample size.*method='mixture'"):
            solve_mixture_weights(policies, prompts, method="reference", **options)
        assert solve_mixture_weights(policies, prompts, **options) == found
        assert found.num_rounds > 1
        with pytest.raises(ValueError, match="max_rounds=1"):
            solve_mixture_weights(policies, prompts, method="mixture", max_rounds=1, **options)


def test_samples_of_another_distribution_are_weighted():
    """
    Enumerated outcomes, once as samples of the reference and once of a distribution q that gives them other
    probabilities, repeated accordingly: `log_offsets` gives the same F. Without them it is another one.
    """
    logratios = torch.tensor([[0.6, -1.2], [-0.4, 0.3], [-1.5, 0.5]], dtype=torch.float64)
    reference = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    logratios = logratios - (logratios + reference.log().unsqueeze(1)).logsumexp(0)
    counts = {"reference": [5, 3, 2], "q": [2, 2, 6]}
    rows = {name: torch.tensor(sum(([i] * n for i, n in enumerate(count)), [])) for name, count in counts.items()}
    options = dict(jackknife=False, num_resamples=20)
    expected = maximin_weights(logratios[rows["reference"]][None], **options)
    q = torch.tensor(counts["q"], dtype=torch.float64) / 10
    offsets = (reference / q).log()[rows["q"]][None]
    found = maximin_weights(logratios[rows["q"]][None], log_offsets=offsets, **options)
    assert found.weights == pytest.approx(expected.weights, abs=1e-6)
    assert found.value == pytest.approx(expected.value)
    assert maximin_weights(logratios[rows["q"]][None], **options).value != pytest.approx(expected.value, abs=0.01)
    with pytest.raises(ValueError, match="log_offsets.*shape"):
        maximin_weights(logratios[None], log_offsets=torch.zeros(1, 2), **options)


def test_a_killed_run_resumes_from_its_cache(tmp_path, monkeypatch):
    """
    Killed in the third batch, the next run samples only what is missing, and its weights are those of a run without
    interruption, in every bit. Another policy or another seed finds nothing of its own.
    """
    options = dict(processing_class=tiny.tokenizer(), responses=4, max_new_tokens=3, batch_size=2)
    whole = solve_mixture_weights(independent()[1], PROMPTS, reference=independent()[0], **options)
    generate, calls = PolicyMixture.generate, []

    def killed(self, *args, **kwargs):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return generate(self, *args, **kwargs)

    monkeypatch.setattr(PolicyMixture, "generate", killed)
    with pytest.raises(KeyboardInterrupt):
        solve_mixture_weights(independent()[1], PROMPTS, reference=independent()[0], cache_dir=tmp_path, **options)
    resumed = solve_mixture_weights(
        independent()[1], PROMPTS, reference=independent()[0], cache_dir=tmp_path, **options
    )
    assert len(calls) == 3 + 4 and resumed == whole
    reference, policies = independent()
    assert solve_mixture_weights(policies, PROMPTS, reference=reference, cache_dir=tmp_path, **options) == whole
    assert len(calls) == 7 and reference.forwards == policies[0].forwards == policies[1].forwards == 0

    changed = independent(scale=1.1)[1]
    solve_mixture_weights([policies[0], changed[1]], PROMPTS, reference=reference, cache_dir=tmp_path, **options)
    assert len(calls) == 7 and policies[0].forwards == 0 and changed[1].forwards == 6  # scored, not sampled
    solve_mixture_weights(policies, PROMPTS, reference=reference, cache_dir=tmp_path, seed=1, **options)
    assert len(calls) == 13


def test_measurements_are_those_of_the_distributions():
    """
    Of independent tokens everything is known: KL, objectives and the distance to another policy, within the standard
    error of 400 responses.
    """
    length, beta = 4, 0.5
    reference, models = independent(scale=0.7)
    policies = AlignedPolicies(
        models, processing_class=tiny.tokenizer(), reference=reference, responses=100, max_new_tokens=length,
        batch_size=200,
    )  # fmt: skip
    prompts = PROMPTS + ["two"]
    mixtures = {
        "reference": policies.reference_mixture(),
        "first": policies.mixture([1.0, 0.0]),
        "mixture": policies.mixture([0.4, 0.6]),
    }
    rewards = {"count": lambda prompts, texts: [float(len(prompt)) for prompt in prompts]}
    found = measure_policies(policies, prompts, mixtures, beta=beta, rewards=rewards, distance_of="mixture")

    ref, first, second = (model.head.detach() for model in (reference, *models))
    mixed = (0.4 * first + 0.6 * second).log_softmax(0)
    for name, log_p in (("reference", ref), ("first", first), ("mixture", mixed)):
        p = log_p.exp()
        kl = length * (p * (log_p - ref)).sum().item()
        assert found[name].kl.value == pytest.approx(kl, abs=0.15)
        for k, policy in enumerate((first, second)):
            expected = beta * (length * (p * (policy - ref)).sum().item() - kl)
            assert found[name].objectives[k].value == pytest.approx(expected, abs=0.15)
        assert found[name].smallest.value == min(objective.value for objective in found[name].objectives)
        assert found[name].length.value == length
        assert found[name].rewards["count"].value == pytest.approx(sum(map(len, prompts)) / 4)
    assert found["reference"].kl.value == pytest.approx(0, abs=1e-9)
    distance = length * (mixed.exp() * (mixed - first)).sum().item()
    assert found["first"].distance.value == pytest.approx(distance, abs=0.15)
    assert found["mixture"].distance is None
    assert found["mixture"].effective_size == pytest.approx(100)  # tokens are independent: q is the mixture
    with pytest.raises(ValueError, match="'count' returned 1 values for 400"):
        measure_policies(policies, prompts, mixtures, rewards={"count": lambda prompts, texts: [0.0]})
    with pytest.raises(ValueError, match="distance_of='third'"):
        measure_policies(policies, prompts, mixtures, distance_of="third")


def test_merge_with_its_distance():
    """
    Of one policy the merge is the policy, at distance 0. Of two whose LoRAs change the model much it is another
    distribution than the mixture, and the distance says so.
    """
    torch.manual_seed(0)
    config = LoraConfig(r=2, target_modules=["q_proj", "v_proj", "down_proj"], init_lora_weights=False)
    model = get_peft_model(tiny.model(seed=0, dtype=torch.float64), config, adapter_name="first")
    model.add_adapter("second", config)
    policies = AlignedPolicies(
        model, processing_class=tiny.tokenizer(), adapters=["first", "second"], responses=8, max_new_tokens=4
    )
    measured = {}
    for name, weights in (("alone", [1.0, 0.0]), ("both", [0.5, 0.5])):
        mixture = policies.mixture(weights)
        mixture.merge(name)
        named = {"mixture": mixture, name: PolicyMixture.of_one(Policy(model, name, True))}
        measured |= measure_policies(policies, PROMPTS, named, distance_of="mixture")
    assert measured["alone"].distance.value == pytest.approx(0, abs=1e-9)
    assert measured["both"].distance.low > 1e-4


def test_weights_of_a_file_without_the_newer_fields(tmp_path):
    path = tmp_path / "weights.json"
    weights = MixtureWeights([0.5, 0.5], -0.1, [-0.1, -0.1], [[0.4, 0.6]] * 2, 3.0, 4, 8, 0.0)
    weights.save(path)
    path.write_text(path.read_text().replace(',\n  "source": "reference",\n  "num_rounds": 1', ""))
    assert "source" not in path.read_text() and MixtureWeights.load(path) == weights


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(method="samples"), "`method` must be"),
        (dict(max_rounds=0), "`max_rounds`.*0"),
        (dict(method="mixture", betas=[0.1, 0.2]), "`betas` with `method='mixture'`"),
        (dict(betas=[0.1]), "betas must hold one number per policy"),
        (dict(seed=-1), "`seed`.*-1"),
    ],
)
def test_bad_input(options, message):
    reference, policies = independent()
    with pytest.raises(ValueError, match=message):
        solve_mixture_weights(
            policies, PROMPTS, processing_class=tiny.tokenizer(), reference=reference, responses=2, max_new_tokens=2,
            **options,
        )  # fmt: skip
