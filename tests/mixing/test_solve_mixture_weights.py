"""From models and prompts to weights, against enumeration of all responses of tiny models."""

import pytest
import tiny
import torch
from peft import LoraConfig, get_peft_model

from trl_ext.mixing import PolicyMixture, maximin_weights, reference_logratios, solve_mixture_weights
from trl_ext.training.sampling import end_token_ids
from trl_ext.training.seeds import derive_seed


PROMPTS = ["the red fox", "a blue bird sings", "one"]


def shifted(model, seed, scale):
    """A policy near a model: its head with noise."""
    other = tiny.model(seed=0, dtype=torch.float64)
    other.load_state_dict(model.state_dict())
    torch.manual_seed(seed)
    with torch.no_grad():
        other.lm_head.weight += scale * torch.randn_like(other.lm_head.weight)
    return other.eval()


@pytest.fixture(scope="module")
def setting():
    tokenizer = tiny.tokenizer()
    reference = tiny.model(seed=0, dtype=torch.float64).eval()
    for parameter in reference.parameters():
        parameter.requires_grad_(False)
    policies = [shifted(reference, seed, 0.05) for seed in (1, 2)]
    return tokenizer, reference, policies


def sequence_logps(model, prompt, completions):
    whole = torch.cat([prompt.expand(len(completions), -1), completions], 1)
    with torch.no_grad():
        logps = model(whole).logits[:, :-1].log_softmax(-1).gather(-1, whole[:, 1:, None])[..., 0]
    return logps[:, prompt.shape[1] - 1 :].sum(1)


def test_logratios_are_those_of_plain_forwards(setting):
    """Recomputed from the samples of the same seed, one response at a time and without padding."""
    tokenizer, reference, policies = setting
    options = dict(processing_class=tokenizer, reference=reference, responses=3, max_new_tokens=4, batch_size=9)
    found = reference_logratios(policies, PROMPTS, **options)
    assert found.shape == (3, 3, 2) and found.dtype == torch.float64
    rows = [torch.tensor(tokenizer(prompt)["input_ids"]) for prompt in PROMPTS for _ in range(3)]
    longest = max(map(len, rows))
    ids = torch.stack([torch.cat([torch.full((longest - len(r),), tokenizer.pad_token_id), r]) for r in rows])
    mask = torch.stack([torch.cat([torch.zeros(longest - len(r)), torch.ones(len(r))]) for r in rows]).long()
    sampled = PolicyMixture([reference], weights=[1.0]).generate(
        ids,
        mask,
        max_new_tokens=4,
        eos_token_id=end_token_ids(reference, tokenizer),
        pad_token_id=tokenizer.pad_token_id,
        generator=torch.Generator().manual_seed(derive_seed(0, "reference", 0)),
    )
    for i, row in enumerate(rows):
        completion = sampled.completion_ids[i : i + 1, : int(sampled.completion_mask[i].sum())]
        base = sequence_logps(reference, row[None], completion)
        for k, policy in enumerate(policies):
            expected = (sequence_logps(policy, row[None], completion) - base).item()
            assert found[i // 3, i % 3, k].item() == pytest.approx(expected, abs=1e-9)
    assert torch.equal(found, reference_logratios(policies, PROMPTS, **options))
    assert not torch.equal(found, reference_logratios(policies, PROMPTS, **options, seed=1))


def test_weights_are_near_those_of_all_responses(setting):
    """
    Responses of one token, which can be enumerated: the exact F on a grid of weights against the solution from 48
    samples to each of three prompts.
    """
    tokenizer, reference, policies = setting
    policies = [shifted(reference, 1, 0.1), shifted(reference, 2, 0.2)]
    every = torch.arange(384)[:, None]
    grid = torch.linspace(0, 1, 101, dtype=torch.float64)
    exact = torch.zeros(101, dtype=torch.float64)
    for prompt in PROMPTS:
        ids = torch.tensor([tokenizer(prompt)["input_ids"]])
        base = sequence_logps(reference, ids, every)
        first, second = (sequence_logps(policy, ids, every) - base for policy in policies)
        exact += (base + grid[:, None] * first + (1 - grid[:, None]) * second).logsumexp(1) / len(PROMPTS)
    found = solve_mixture_weights(
        policies,
        PROMPTS,
        processing_class=tokenizer,
        reference=reference,
        responses=48,
        max_new_tokens=1,
        batch_size=48,
    )
    chosen = exact[int(round(100 * found.weights[0]))]
    assert chosen - exact.min() < 0.1 * exact.min().abs() and exact.min() < exact[[0, 25, 100]].min()
    assert found.effective_size > 20 and found.num_prompts == 3


def test_adapters_of_one_base(setting):
    """The reference is the base with its adapters off: fresh adapters have log-ratios of exactly 0."""
    tokenizer, _, _ = setting
    torch.manual_seed(0)
    config = LoraConfig(r=2, target_modules=["q_proj", "v_proj"])
    model = get_peft_model(tiny.model(seed=0, dtype=torch.float64), config, adapter_name="first")
    model.add_adapter("second", config)
    options = dict(processing_class=tokenizer, adapters=["first", "second"], responses=2, max_new_tokens=3)
    assert (reference_logratios(model, PROMPTS, **options) == 0).all()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    found = reference_logratios(model, PROMPTS, **options)
    assert (found != 0).any() and not torch.equal(found[..., 0], found[..., 1])
    messages = [[{"role": "user", "content": "the red fox"}]]
    assert reference_logratios(model, messages, **options).shape == (1, 2, 2)
    weights = maximin_weights(found.repeat(2, 4, 1), num_resamples=20)
    assert PolicyMixture(model, adapters=["first", "second"], weights=weights).weights == weights.weights


def test_policies_trained_with_other_betas(setting):
    """`betas` are matched before the solution, and change the weights."""
    tokenizer, reference, _ = setting
    policies = [shifted(reference, 1, 0.1), shifted(reference, 2, 0.1)]
    options = dict(
        processing_class=tokenizer, reference=reference, responses=16, max_new_tokens=1, batch_size=48, beta=0.5
    )
    weights = {
        betas: solve_mixture_weights(policies, PROMPTS, **options, betas=betas).weights[0]
        for betas in ((0.5, 0.5), (0.5, 1.5))
    }
    # The second policy's log-ratios count threefold: a smaller weight is enough for its objective.
    assert weights[0.5, 1.5] > weights[0.5, 0.5] + 0.05


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(reference=None), "`reference` is needed"),
        (dict(prompts=[]), "`prompts` must be a list"),
        (dict(prompts="the red fox"), "`prompts` must be a list"),
        (dict(responses=1), "responses.*1"),
        (dict(max_new_tokens=0), "max_new_tokens.*0"),
        (dict(batch_size=0), "batch_size.*0"),
    ],
)
def test_bad_input(setting, options, message):
    tokenizer, reference, policies = setting
    arguments = dict(prompts=PROMPTS, processing_class=tokenizer, reference=reference) | options
    with pytest.raises(ValueError, match=message):
        solve_mixture_weights(policies, **arguments)


def test_refused_policies(setting):
    tokenizer, reference, policies = setting
    for chosen, message in (
        (policies[:1], "two policies or more, got 1"),
        ([policies[0], tiny.model(vocab_size=10)], "one vocabulary"),
    ):
        with pytest.raises(ValueError, match=message):
            reference_logratios(chosen, PROMPTS, processing_class=tokenizer, reference=reference)
    without_padding = tiny.tokenizer()
    without_padding.pad_token = None
    with pytest.raises(ValueError, match="no padding token"):
        reference_logratios(policies, PROMPTS, processing_class=without_padding, reference=reference)
