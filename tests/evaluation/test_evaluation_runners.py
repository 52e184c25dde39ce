"""
Scoring and sampling: against full logits, against every sequence of an enumerable transformer, and without side
effects.
"""

import itertools
import json

import harness
import numpy as np
import pytest
import tiny
import torch
from datasets import Dataset
from methods import BY_ID
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from scipy import stats
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    MixtralConfig,
    MixtralForCausalLM,
)

from trl_ext.evaluation import (
    SamplingSettings,
    sample_responses,
    score_pairs,
    score_responses,
    score_samples,
    tokenize_pairs as tokenize,
)
from trl_ext.evaluation.data import template_options, tokenize_and_count
from trl_ext.evaluation.scoring import evaluating, without_adapters


SIZES = dict(
    vocab_size=90,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    initializer_range=0.3,
    max_position_embeddings=128,
)


def models(kind: str, seed: int):
    torch.manual_seed(seed)
    if kind == "qwen2":
        return tiny.model(seed=seed, vocab_size=90)
    if kind == "gpt2":  # absolute positions
        return GPT2LMHeadModel(GPT2Config(vocab_size=90, n_embd=32, n_layer=2, n_head=4, initializer_range=0.3))
    if kind == "gemma2":  # soft-capped logits
        return Gemma2ForCausalLM(Gemma2Config(**SIZES, final_logit_softcapping=2.0))
    if kind == "cohere":  # scaled logits
        sizes = {name: value for name, value in SIZES.items() if name != "head_dim"}
        return CohereForCausalLM(CohereConfig(**sizes, logit_scale=0.3))
    if kind == "mixtral":  # its forward reads more of the backbone's output than the hidden states
        config = MixtralConfig(**SIZES, num_local_experts=2, num_experts_per_tok=1, output_router_logits=True)
        return MixtralForCausalLM(config)
    raise ValueError(kind)


PROMPTS = [[5, 6, 7], [8], [9, 10, 11, 12, 13], [5], [70, 3]]
RESPONSES = [[20, 21], [22, 23, 24, 25], [26], [27, 28, 29], [20, 20, 1]]


def by_full_logits(model, prompt, response, temperature=1.0):
    """Log-probabilities `(len(response), V)` from a forward of this sequence alone, without padding, in float64."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([prompt + response]), use_cache=False).logits[0].double()
    return (logits[len(prompt) - 1 : -1] / temperature).log_softmax(-1)


@pytest.mark.parametrize("kind", ["qwen2", "gpt2", "gemma2", "cohere", "mixtral"])
def test_scores_are_those_of_full_logits(kind, monkeypatch):
    """
    Tiles of 2 positions, batches of 3 with padding, both models, three divergences, a temperature: all as by plain
    means.
    """
    monkeypatch.setattr("trl_ext.evaluation.scoring.TILE_ELEMENTS", 180)
    policy, reference = models(kind, 0).eval(), models(kind, 1).eval()
    for temperature in (1.0, 0.7):
        scores = score_responses(
            policy,
            PROMPTS,
            RESPONSES,
            reference=reference,
            divergences=["reverse_kl", "forward_kl", "js"],
            temperature=temperature,
            batch_size=3,
        )
        for i, (prompt, response) in enumerate(zip(PROMPTS, RESPONSES, strict=True)):
            p, q = (by_full_logits(model, prompt, response, temperature) for model in (policy, reference))
            index = torch.tensor(response)[:, None]
            m = ((p.exp() + q.exp()) / 2).log()
            expected = {
                "token_logps": p.gather(1, index)[:, 0],
                "ref_token_logps": q.gather(1, index)[:, 0],
                "token_entropy": -(p.exp() * p).sum(-1),
                "reverse_kl": (p.exp() * (p - q)).sum(-1),
                "forward_kl": (q.exp() * (q - p)).sum(-1),
                # The project's JS is twice the textbook's, f-DPO's convention.
                "js": (p.exp() * (p - m) + q.exp() * (q - m)).sum(-1),
            }
            assert expected["reverse_kl"].min() > 0.01
            for name, values in expected.items():
                found = scores.token_divergences[name] if name in scores.token_divergences else getattr(scores, name)
                assert found[i, : len(response)] == pytest.approx(values.numpy(), rel=1e-4, abs=2e-5), name
                assert (found[i, len(response) :] == 0).all()
        assert scores.lengths.tolist() == [len(response) for response in RESPONSES]
        assert scores.logratios == pytest.approx(scores.logps - scores.ref_logps)
        assert scores.divergence("reverse_kl") == pytest.approx(scores.token_divergences["reverse_kl"].sum(1))


def test_adapters_and_their_base():
    """ "base" is the model under the adapter, its logits those of the untouched model; parameters stay trainable."""
    base = tiny.model(vocab_size=90)
    untouched = tiny.model(vocab_size=90)
    lora = get_peft_model(base, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    trained = [p.requires_grad for p in lora.parameters()]
    scores = score_responses(lora, PROMPTS, RESPONSES, reference="base")
    plain = score_responses(untouched, PROMPTS, RESPONSES)
    assert scores.ref_logps == pytest.approx(plain.logps, abs=1e-5)
    assert np.abs(scores.logratios).max() > 0.1
    assert [p.requires_grad for p in lora.parameters()] == trained and any(trained)
    # Virtual tokens in front of the prompt.
    prompts = get_peft_model(
        tiny.model(vocab_size=90), PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")
    )
    scores = score_responses(prompts, PROMPTS, RESPONSES)
    for i, (prompt, response) in enumerate(zip(PROMPTS, RESPONSES, strict=True)):
        with torch.no_grad():
            logits = prompts(input_ids=torch.tensor([prompt + response]), use_cache=False).logits[0, 3:]
        expected = logits[len(prompt) - 1 : -1].log_softmax(-1).gather(1, torch.tensor(response)[:, None]).sum()
        assert scores.logps[i] == pytest.approx(expected.item(), abs=1e-4)


def test_a_reference_adapter_is_the_reference():
    """
    TRL keeps the adapter that training went on from under the name "ref": then that is "base", not the bare model.
    """
    model = get_peft_model(tiny.model(vocab_size=90), LoraConfig(r=4, init_lora_weights=False))
    model.add_adapter("ref", LoraConfig(r=4, init_lora_weights=False))
    trained = [p.requires_grad for p in model.parameters()]
    scores = score_responses(model, PROMPTS, RESPONSES, reference="base")
    assert [p.requires_grad for p in model.parameters()] == trained
    assert model.active_adapter == "default"
    model.set_adapter("ref")
    assert scores.ref_logps == pytest.approx(score_responses(model, PROMPTS, RESPONSES).logps, abs=1e-5)


def adapted(kind: str):
    """
    A model with adapters, and the function that says what must not change: training, modes, active adapters, switches.
    """
    config = LoraConfig(r=4, init_lora_weights=False, target_modules=["q_proj", "v_proj"], modules_to_save=["lm_head"])
    if kind == "transformers":
        harness.require_own_adapters()
        model = tiny.model(vocab_size=90)
        model.add_adapter(config)
    else:
        model = get_peft_model(tiny.model(vocab_size=90), config)
        if kind == "ref":
            model.add_adapter("ref", LoraConfig(r=4, init_lora_weights=False, target_modules=["q_proj"]))
        if kind == "two at once":
            model.add_adapter("more", LoraConfig(r=4, init_lora_weights=False, target_modules=["q_proj"]))
            model.add_adapter("ref", LoraConfig(r=4, init_lora_weights=False, target_modules=["q_proj"]))
            model.base_model.set_adapter(["default", "more"])

    def state():
        active = model.active_adapters() if kind == "transformers" else model.active_adapters
        return {
            "trained": [p.requires_grad for p in model.parameters()],
            "modes": [module.training for module in model.modules()],
            "active": list(active),
            "disabled": [getattr(module, "disable_adapters", None) is True for module in model.modules()],
            "logps": score_responses(model, PROMPTS, RESPONSES).logps.tolist(),
        }

    return model, state


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("kind", ["peft", "ref", "two at once", "transformers"])
def test_the_reference_leaves_a_model_with_adapters_as_it_was(kind, frozen, training):
    """
    Frozen adapters (`is_trainable=False`) stay frozen, also after an error; so do modes, active adapters, and modules
    that the adapter brought along whole.
    """
    model, state = adapted(kind)
    if frozen:
        model.requires_grad_(False)
    model.train(training)
    before = state()
    assert any(before["trained"]) == (not frozen)
    scores = score_responses(model, PROMPTS, RESPONSES, reference="base")
    assert np.abs(scores.logratios).max() > 0.1
    assert state() == before
    with pytest.raises(RuntimeError, match="stop"), without_adapters(model):
        raise RuntimeError("stop")
    assert state() == before


def test_modes_and_random_state_are_left_alone():
    model, reference, tokenizer = tiny.model(), tiny.model(seed=1), tiny.tokenizer()
    model.train()
    model.model.layers[0].eval()  # as of somebody who froze a layer
    modes = [module.training for module in model.modules()]
    forward, config, side = model.forward, model.generation_config, tokenizer.padding_side
    state = torch.random.get_rng_state()
    samples = sample_responses(model, tokenizer, ["What of the film?"], SamplingSettings(max_new_tokens=3))
    score_samples(model, samples, reference=reference)
    assert [module.training for module in model.modules()] == modes
    assert (torch.random.get_rng_state() == state).all()
    assert model.forward == forward and model.generation_config is config and tokenizer.padding_side == side
    assert "forward" not in model.model.__dict__ and not model.model._forward_hooks
    with pytest.raises(RuntimeError, match="stop"), evaluating(model):
        raise RuntimeError("stop")
    assert [module.training for module in model.modules()] == modes


class Digits:
    """A tokenizer of single digits; 0 ends."""

    eos_token_id, pad_token_id, padding_side = 0, 0, "right"
    bos_token_id = None

    def __call__(self, text):
        return {"input_ids": [int(c) for c in text]}

    def batch_decode(self, rows, skip_special_tokens):
        return ["".join(str(i) for i in ids if i) for ids in rows]


@pytest.fixture(scope="module")
def enumerated():
    """Two transformers over four tokens, and every response of at most three tokens to the prompt "12"."""
    policy, reference = (tiny.model(seed=seed, vocab_size=4).eval() for seed in (0, 1))
    sequences = [
        [*body, token]
        for length in (1, 2, 3)
        for body in itertools.product((1, 2, 3), repeat=length - 1)
        for token in ((0, 1, 2, 3) if length == 3 else (0,))
    ]
    return policy, reference, sequences


def exact(model, sequences, temperature):
    logps = [
        by_full_logits(model, [1, 2], s, temperature).gather(1, torch.tensor(s)[:, None]).sum().item()
        for s in sequences
    ]
    assert np.exp(logps).sum() == pytest.approx(1.0, abs=1e-6)
    return np.array(logps)


@pytest.mark.parametrize("temperature", [1.0, 1.6])
def test_samples_and_kl_are_those_of_the_enumerated_model(enumerated, temperature):
    """
    4000 samples at a temperature: their frequencies fit the exact probabilities at it (chi-squared), the model's own
    generation configuration (top-k 1, a penalty) notwithstanding; k1, k3 and the exact token KL estimate the exact KL
    of the sampled policy, and the log-probabilities are the exact ones.
    """
    policy, reference, sequences = enumerated
    policy.generation_config.top_k, policy.generation_config.repetition_penalty = 1, 5.0
    policy.generation_config.temperature = 0.1
    settings = SamplingSettings(max_new_tokens=3, temperature=temperature)
    samples = sample_responses(policy, Digits(), ["12"], settings, num_samples=4000, batch_size=2000)
    counts = np.array([samples.response_ids.count(s) for s in sequences])
    assert counts.sum() == 4000
    assert samples.finished == [ids[-1] == 0 for ids in samples.response_ids]

    p, q = (exact(model, sequences, temperature) for model in (policy, reference))
    common = np.exp(p) * 4000 > 5
    observed = np.append(counts[common], counts[~common].sum())
    wanted = np.append(4000 * np.exp(p[common]), 4000 * np.exp(p[~common]).sum())
    kept = wanted > 0
    assert stats.chisquare(observed[kept], wanted[kept] * observed[kept].sum() / wanted[kept].sum()).pvalue > 1e-3

    scores = score_samples(policy, samples, reference=reference, divergences=["reverse_kl"], batch_size=500)
    kl = (np.exp(p) * (p - q)).sum()
    for values in (scores.kl("k1"), scores.kl("k3"), scores.divergence("reverse_kl")):
        assert values.mean() == pytest.approx(kl, abs=4 * values.std() / np.sqrt(4000))
    assert scores.divergence("reverse_kl").std() < scores.kl("k1").std()
    index = [sequences.index(ids) for ids in samples.response_ids]
    assert scores.logps == pytest.approx(p[index], abs=1e-4)
    # Scored at another temperature they would be another policy's.
    other = score_responses(policy, samples.prompt_ids, samples.response_ids, temperature=2.5, batch_size=500)
    assert np.abs(other.logps - p[index]).max() > 0.1


def test_sampling_settings():
    """
    Same seed, same responses; other seed, others. Greedy is one response. Batches of prompts of other lengths are
    padded.
    """
    model, tokenizer = tiny.model(), tiny.tokenizer()
    prompts = ["What of the film?", [{"role": "user", "content": "And the score, number 7?"}], [7, 8, 9]]

    def run(num_samples=2, batch_size=16, **settings):
        settings = SamplingSettings(max_new_tokens=6, **settings)
        return sample_responses(model, tokenizer, prompts, settings, num_samples=num_samples, batch_size=batch_size)

    first = run()
    assert first.response_ids == run().response_ids != run(seed=1).response_ids
    assert first.repeated_prompts == [prompt for prompt in prompts for _ in range(2)]
    greedy = run(temperature=0.0)
    assert greedy.response_ids[0::2] == greedy.response_ids[1::2]
    alone = [
        sample_responses(model, tokenizer, [prompt], SamplingSettings(max_new_tokens=6, temperature=0.0)).response_ids[
            0
        ]
        for prompt in prompts
    ]
    assert greedy.response_ids[0::2] == alone
    with pytest.raises(ValueError, match="top_p"):
        score_samples(model, run(top_p=0.9), reference=model)


def test_responses_have_random_numbers_of_their_own(monkeypatch):
    """
    A response is the same in every batch, beside any other prompts and samples, and no response of any seed is
    another's. No generator is touched, of the CPU or of a device.
    """
    model, tokenizer = tiny.model(), tiny.tokenizer()

    def touched(*args):
        raise AssertionError("a global generator was seeded")

    for name in ("cuda", "xpu", "mps"):
        for function in ("manual_seed", "manual_seed_all"):
            monkeypatch.setattr(f"torch.{name}.{function}", touched, raising=False)

    def run(seed, prompts=("What of the film?",) * 8, num_samples=1, batch_size=4, max_new_tokens=8):
        settings = SamplingSettings(max_new_tokens=max_new_tokens, seed=seed)
        options = dict(num_samples=num_samples, batch_size=batch_size)
        return sample_responses(model, tokenizer, list(prompts), settings, **options).response_ids

    state = torch.random.get_rng_state()
    responses = [str(response) for seed in range(12) for response in run(seed)]
    assert len(set(responses)) == len(responses)
    prompts = [row["prompt"] for row in tiny.rows(5)] + ["And the score, a longer prompt than the others have?"]
    whole = run(3, prompts, num_samples=3, batch_size=18)
    for batch_size in (1, 4, 7):
        assert run(3, prompts, num_samples=3, batch_size=batch_size) == whole
    assert run(3, prompts[:2], num_samples=3) == whole[:6]
    assert run(3, prompts, num_samples=2) == [whole[3 * i + j] for i in range(6) for j in range(2)]
    assert run(3, prompts, num_samples=3, max_new_tokens=3) == [response[:3] for response in whole]
    assert (torch.random.get_rng_state() == state).all()
    with pytest.raises(ValueError, match="`seed`"):
        SamplingSettings(seed=-1)


TOOL = {"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {}}}}
TOOL_TEMPLATE = (
    "{% if tools %}<|system|>{{ tools[0]['function']['name'] }}<|end|>{% endif %}{% if mood is defined %}{{ mood }}{% "
    "endif %}" + tiny.CHAT_TEMPLATE
)


@pytest.mark.parametrize("as_text", [False, True])
def test_tools_and_template_options(as_text, tiny_folder, tmp_path):
    """
    The columns `tools` (JSON or not) and `chat_template_kwargs` are in the tokens as in training's, and in what is
    sampled from.
    """
    rows = tiny.rows(6, conversational=True)
    rows = [
        row | {"tools": json.dumps([TOOL]) if as_text else [TOOL], "chat_template_kwargs": {"mood": f"{i % 2} mood "}}
        for i, row in enumerate(rows)
    ]
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = TOOL_TEMPLATE
    trainer = harness.trainer(
        BY_ID["fdpo"], tiny_folder, tmp_path, train_dataset=Dataset.from_list(rows), processing_class=tokenizer
    )
    ours = tokenize(rows, tokenizer)
    names = ("prompt_ids", "chosen_ids", "rejected_ids")
    assert ours == [{name: row[name] for name in names} for row in trainer.train_dataset]
    settings = SamplingSettings(max_new_tokens=2)
    options = [template_options(row) for row in rows]
    samples = sample_responses(
        tiny.model(), tokenizer, [row["prompt"] for row in rows], settings, num_samples=2, template_options=options
    )
    assert samples.prompt_ids[::2] == [pair["prompt_ids"] for pair in ours]
    for i in (0, 1):
        assert tokenizer.decode(samples.prompt_ids[2 * i]).startswith(f"<|system|>look<|end|>{i} mood ")
    with pytest.raises(ValueError, match="template_options"):
        sample_responses(tiny.model(), tokenizer, [row["prompt"] for row in rows], settings, template_options=[{}])


@pytest.mark.parametrize("conversational", [False, True])
def test_pairs_are_tokenized_as_in_training(conversational, tiny_folder, tmp_path):
    """
    Ids of `trl_ext` (and so of `DPOTrainer`): special tokens, chat template, boundary; and the trainer's dataset as it
    is.
    """
    dataset = tiny.dataset(conversational=conversational)
    trainer = harness.trainer(BY_ID["fdpo"], tiny_folder, tmp_path, train_dataset=dataset)
    tokenizer = trainer.processing_class
    ours = tokenize(dataset, tokenizer)
    theirs = [
        {name: row[name] for name in ("prompt_ids", "chosen_ids", "rejected_ids")} for row in trainer.train_dataset
    ]
    assert ours == theirs == tokenize(trainer.train_dataset, tokenizer)
    # And so the scores are those of training.
    trainer.model.eval()
    inputs = harness.batch(trainer, 4)
    scores = score_pairs(trainer.model, dataset.select(range(4)), tokenizer, reference=tiny.model(seed=1))
    for side, found in zip(harness.sides(trainer.model, inputs), (scores.chosen, scores.rejected), strict=True):
        assert found.logps == pytest.approx(side.logps.detach().numpy(), abs=1e-3)


def test_truncation():
    pairs = tokenize(tiny.dataset(4), tiny.tokenizer())
    length = len(pairs[0]["prompt_ids"]) + 1
    short = tokenize(tiny.dataset(4), tiny.tokenizer(), max_length=length)
    assert short[0]["chosen_ids"] == pairs[0]["chosen_ids"][:1]
    with pytest.raises(ValueError, match="No pair is left"):
        tokenize(tiny.dataset(4), tiny.tokenizer(), max_length=1)


def test_pairs_without_an_order_are_left_out_and_counted():
    """Cut before they differ, or the same from the start, two responses tie, which would count as ranked correctly."""
    row = {"prompt": "What of the film?", "chosen": " The film was bright.", "rejected": " The film was dull."}
    same = row | {"rejected": row["chosen"]}
    long = row | {"prompt": row["prompt"] * 10}
    tokenizer = tiny.tokenizer()
    found = tokenize_and_count([row, same, long], tokenizer)
    assert (len(found.pairs), found.no_room, found.same_responses) == (2, 0, 1)
    prompt, chosen, rejected = found.pairs[0].values()
    shared = next(i for i, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b)
    assert shared > 0
    found = tokenize_and_count([row, same, long], tokenizer, max_length=len(prompt) + shared + 1)
    assert (len(found.pairs), found.no_room, found.same_responses) == (1, 1, 1)
    with pytest.raises(ValueError, match="1 pairs fill .* and 2 have"):
        tokenize_and_count([row, same, long], tokenizer, max_length=len(prompt) + shared)


def test_a_tokenizer_without_an_end():
    tokenizer = tiny.tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="no end-of-sequence token.*Set `tokenizer.eos_token`"):
        tokenize(tiny.rows(1), tokenizer)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda m: score_responses(m, [[1]], []), "`response_ids` 0"),
        (lambda m: score_responses(m, [[]], [[1]]), r"`prompt_ids\[0\]` has no tokens"),
        (lambda m: score_responses(m, [[1]], [[1]], divergences=["js"]), "`reference`"),
        (lambda m: score_responses(m, [[1]], [[1]], reference="base"), "without its adapters"),
        (lambda m: score_responses(m, [[1]], [[1]], temperature=0.0), "`temperature`"),
        (lambda m: score_responses(m, [[1]], [[1]], reference=tiny.model(vocab_size=80)), "vocabulary"),
        (lambda m: score_responses(m, [[1]], [[1]], reference=m, divergences=["js", "js"]), "same name"),
        (lambda m: score_responses(m, [[1]], [[1]]).ref_logps, "without a reference"),
        (lambda m: score_pairs(m, [{"prompt": "a", "chosen": "b"}], tiny.tokenizer()), "no column `rejected`"),
        (lambda m: SamplingSettings(top_p=0.0), "`top_p`"),
        (lambda m: SamplingSettings(temperature=-1.0), "`temperature`"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call(tiny.model(vocab_size=90))
