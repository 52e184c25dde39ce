"""One head for every score: against full logits of the model's own forward, for every kind of head that it reads."""

import copy

import pytest
import tiny
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    Gemma2Config,
    GPT2Config,
    GPTNeoXConfig,
    OPTConfig,
    RobertaConfig,
    XLMRobertaConfig,
)

from trl_ext.training.scoring_head import ScoringRequest, add_scoring_head, head_parameters, scoring_head


IDS = torch.arange(5, 29).reshape(2, 12)
LABELS = torch.where(torch.arange(12) >= 7, IDS, -100)
SMALL = dict(vocab_size=384, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64)


def expected(model, temperature=1.0):
    """From full logits: log-probability of the label, entropy, mean logit; 0 where there is no label."""
    logits = model(input_ids=IDS).logits[:, :-1].float()
    log_probs = (logits / temperature).log_softmax(-1)
    mask = LABELS[:, 1:] != -100
    of_label = log_probs.gather(-1, IDS[:, 1:, None])[..., 0]
    return [torch.where(mask, x, 0) for x in (of_label, -(log_probs.exp() * log_probs).sum(-1), logits.mean(-1))]


def tied(seed=0):
    config = copy.deepcopy(tiny.model().config)
    config.tie_word_embeddings = True
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    return model


def models():
    """Name -> model with a linear head, among them adapters that train the head whole or some of its rows."""
    torch.manual_seed(0)
    yield "plain", tiny.model()
    yield "tied", tied()
    gpt2 = GPT2Config(vocab_size=384, n_embd=32, n_layer=2, n_head=4)
    for config in (
        gpt2,
        GPTNeoXConfig(**SMALL),
        OPTConfig(
            vocab_size=384,
            hidden_size=32,
            ffn_dim=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            word_embed_proj_dim=16,
        ),
    ):
        yield config.model_type, AutoModelForCausalLM.from_config(config)
    yield (
        "softcap",
        AutoModelForCausalLM.from_config(
            Gemma2Config(**SMALL, num_key_value_heads=2, head_dim=8, final_logit_softcapping=3.0)
        ),
    )
    for name, options in {
        "whole copy": dict(modules_to_save=["lm_head"]),
        "rows of the head": dict(trainable_token_indices={"lm_head": [7, 9, 20]}),
        "rows of tied embeddings": dict(trainable_token_indices=[7, 9, 20]),
    }.items():
        model = get_peft_model(
            tied() if "tied" in name else tiny.model(), LoraConfig(target_modules=["q_proj"], **options)
        )
        for parameter in model.parameters():
            if parameter.requires_grad:
                torch.nn.init.normal_(parameter, std=0.3)
        yield name, model


@pytest.mark.parametrize("name, model", list(models()), ids=lambda value: value if isinstance(value, str) else "")
def test_one_model(name, model):
    model.eval()
    with torch.no_grad():
        truth = expected(model)
        with model.disable_adapter() if hasattr(model, "disable_adapter") else torch.no_grad():
            base_truth = expected(model)
        forward = (model.get_base_model() if hasattr(model, "get_base_model") else model).forward
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        with scoring_head(base):
            scored = model(input_ids=IDS, labels=LABELS, scoring=ScoringRequest())
            request = ScoringRequest(keep_states=True)
            model(input_ids=IDS, labels=LABELS, scoring=request)
            if hasattr(model, "disable_adapter"):
                with model.disable_adapter():
                    base_scored = model(input_ids=IDS, labels=LABELS, scoring=ScoringRequest(()))
                torch.testing.assert_close(base_scored.log_probs, base_truth[0], rtol=1e-5, atol=1e-5)
                assert base_scored.entropy is None and not torch.equal(base_truth[0], truth[0])
        assert base.forward == forward and not hasattr(base, "_scoring_head")
    for value, want in zip((scored.log_probs, scored.entropy, scored.mean_logits), truth, strict=True):
        torch.testing.assert_close(value, want, rtol=1e-5, atol=2e-5)
    logits = request.states.logits(slice(1, 4))
    of_label = logits.log_softmax(-1).gather(-1, LABELS[:, 1:][LABELS[:, 1:] != -100][1:4, None])[:, 0]
    torch.testing.assert_close(of_label, truth[0][0][truth[0][0] != 0][1:4], rtol=1e-5, atol=2e-5)


def test_trained_rows_of_the_head_in_both_models():
    """
    The reference of an adapter that trains rows of tied embeddings is scored without them, the policy's gradient
    reaches them.
    """
    options = dict(target_modules=["q_proj"], trainable_token_indices=[7, 9, 20])
    model = get_peft_model(tied(), LoraConfig(**options))
    delta = next(p for name, p in model.named_parameters() if "trainable_tokens_delta" in name)
    torch.nn.init.normal_(delta)
    add_scoring_head(model.get_base_model())
    kept = ScoringRequest(keep_states=True)
    with torch.no_grad(), model.disable_adapter():
        truth = expected(model)
        model(input_ids=IDS, labels=LABELS, scoring=kept)
    scored = model(input_ids=IDS, labels=LABELS, scoring=ScoringRequest(reference=kept.states))
    torch.testing.assert_close(scored.ref_log_probs, truth[0], rtol=1e-5, atol=2e-5)
    policy = expected(model)
    torch.testing.assert_close(scored.log_probs, policy[0], rtol=1e-5, atol=2e-5)
    gradients = [torch.autograd.grad(x.sum(), delta)[0] for x in (scored.log_probs, policy[0])]
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-6)
    assert gradients[0].abs().max() > 0


@pytest.mark.parametrize("config", [BertConfig, RobertaConfig, XLMRobertaConfig], ids=lambda c: c.model_type)
def test_head_of_several_layers_is_refused(config):
    model = AutoModelForCausalLM.from_config(config(**SMALL, is_decoder=True))
    with pytest.raises(ValueError, match=rf"{type(model).__name__}.*dense.*one linear layer"):
        add_scoring_head(model)


def test_adapter_on_the_head_is_refused():
    model = get_peft_model(tiny.model(), LoraConfig(target_modules=["lm_head"])).get_base_model()
    with pytest.raises(ValueError, match="adapter on the LM head.*modules_to_save.*merge_and_unload"):
        add_scoring_head(model)
    assert head_parameters(copy.deepcopy(tiny.model()).lm_head)[1] is None


def test_other_devices_than_cuda_score_responses_only(monkeypatch):
    """TRL projects prompts and padding too on a CPU; the scoring head projects the positions whose label counts."""
    from trl_ext.training import scoring_head as module

    projected, kernel = [], module.head_statistics

    def counted(hidden, *args, **kwargs):
        projected.append(len(hidden))
        return kernel(hidden, *args, **kwargs)

    monkeypatch.setattr(module, "head_statistics", counted)
    model = tiny.model()
    add_scoring_head(model)
    scored = model(input_ids=IDS, labels=LABELS, scoring=ScoringRequest())
    assert projected == [10]
    nothing = model(input_ids=IDS, labels=torch.full_like(LABELS, -100), scoring=ScoringRequest())
    nothing.log_probs.sum().backward()  # connected to the model, with a gradient of zero
    assert scored.log_probs.requires_grad and not model.lm_head.weight.grad.any()


def test_deep_copy_runs_its_own_weights():
    """As in `ref_model=copy.deepcopy(model)` for a model that has been through a trainer."""
    model = tiny.model()
    add_scoring_head(model)
    copied = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in copied.parameters():
            parameter.mul_(2)
        assert not torch.equal(model(input_ids=IDS).logits, copied(input_ids=IDS).logits)
        scored = [m(input_ids=IDS, labels=LABELS, scoring=ScoringRequest(())).log_probs for m in (model, copied)]
        for m, value in zip((model, copied), scored, strict=True):
            torch.testing.assert_close(value, expected(m)[0], rtol=1e-5, atol=2e-5)
