"""
The one sampler: independent of batch and random state, of the model's own generation settings, and leaving no trace.
"""

import harness
import pytest
import tiny
import torch
from transformers import GenerationConfig

from trl_ext.training.sampling import end_token_ids, sample_tokens


PROMPTS = [[5, 6, 7, 8], [9], [10, 11], [5, 6, 7, 8], [12, 13, 14]]
SEEDS = [("test", i) for i in range(len(PROMPTS))]


@pytest.fixture
def model(tiny_folder):
    model = harness.load(tiny_folder)
    with torch.no_grad():  # some responses end, some are cut
        model.lm_head.weight[1] *= 4
    return model


def sample(model, prompts=PROMPTS, seeds=SEEDS, **options):
    return sample_tokens(model, tiny.tokenizer(), prompts, seeds, **{"max_new_tokens": 8, **options})


def test_batches_do_not_matter(model):
    """Row i depends on its prompt and its seed: not on the batch size, its neighbors, or the global random state."""
    expected = sample(model, batch_size=5)
    for batch_size in (1, 2, 3):
        torch.manual_seed(batch_size)
        assert sample(model, batch_size=batch_size) == expected
    assert sample(model, PROMPTS[2:3], SEEDS[2:3]) == expected[2:3]
    assert expected[0] != expected[3]  # one prompt, two seeds
    assert len({tokens.finished for tokens in sample(model, PROMPTS * 8, [("s", i) for i in range(40)])}) == 2


def test_nothing_is_left_behind(model):
    """Modes, each module's own, the generation configuration and the random state are what they were."""
    model.train()
    model.model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    config, state = model.generation_config, torch.get_rng_state()
    sample(model)
    assert [module.training for module in model.modules()] == modes
    assert model.generation_config is config and torch.equal(torch.get_rng_state(), state)


def test_generation_config_of_the_model_is_not_used(model):
    """
    A model that ships `repetition_penalty` or `suppress_tokens` is sampled like any other, but for its end tokens.
    """
    expected = sample(model)
    ends = end_token_ids(model, tiny.tokenizer())
    model.generation_config = GenerationConfig(
        repetition_penalty=50.0, suppress_tokens=list(range(10, 60)), max_length=5, temperature=0.01, do_sample=True
    )
    model.generation_config.eos_token_id = ends
    assert sample(model) == expected
    penalized = sample(model, generation_options={"repetition_penalty": 50.0})
    assert penalized != expected
    # Another end token of the model's cuts there, after the token.
    token = next(ids[2] for ids, _ in expected if len(ids) > 3 and ids[2] not in ids[:2])
    model.generation_config.eos_token_id = [token]
    row = next(i for i, (ids, _) in enumerate(expected) if len(ids) > 3 and ids[2] == token)
    assert sample(model)[row] == (expected[row].ids[:3], True)


def test_greedy(model):
    """Temperature 0 takes the likeliest token at each step, whatever the seed."""
    (tokens,) = sample(model, PROMPTS[:1], SEEDS[:1], temperature=0.0)
    ids = list(PROMPTS[0])
    for token in tokens.ids:
        with torch.no_grad():
            assert token == model(torch.tensor([ids])).logits[0, -1].argmax().item()
        ids.append(token)
    assert sample(model, PROMPTS[:1], [("other",)], temperature=0.0) == [tokens]
    assert sample(model, PROMPTS[:1], SEEDS[:1], top_k=1) == [tokens]
