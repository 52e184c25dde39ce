"""
What is TDPO's own: the trainer against the plain definition, tiles, references of every kind, heads of every kind.

The definition is written in `methods.tdpo` from full-vocabulary log-softmax.
"""

import copy

import harness
import pytest
import tiny
import torch
from methods import BY_ID
from peft import LoraConfig, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from transformers import GPT2Config, GPT2LMHeadModel
from trl import DPOTrainer

from trl_ext import FDPOConfig, SimPERConfig, TDPOConfig
from trl_ext.kernels import paired_head_details


both_variants = pytest.mark.parametrize("method", [BY_ID["tdpo"], BY_ID["tdpo1"]], ids=lambda method: method.id)


def gpt2(seed: int = 0, dtype=torch.float64, **kwargs):
    """A tied head, and no operation that rounds to fp32 whatever the dtype, as the norms of Llama's family do."""
    torch.manual_seed(seed)
    sizes = dict(vocab_size=384, n_embd=32, n_layer=2, n_head=4, n_positions=512, initializer_range=0.2)
    return GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=None, eos_token_id=None, **kwargs)).to(dtype)


def built(method, model, reference, tmp_path, **options):
    return harness.trainer(method, model, tmp_path, ref_model=reference, processing_class=tiny.tokenizer(), **options)


def plain_gradients(method, model, reference, inputs, beta):
    """Loss and gradients by autograd through full logits, in the models' own dtype."""
    dtype = next(model.parameters()).dtype
    with torch.no_grad():
        ref = harness.sides(reference, inputs, dtype)
    losses, *rewards = method.equation(*harness.sides(model, inputs, dtype), *ref, beta)
    losses.mean().backward()
    return losses.mean().item(), {name: p.grad for name, p in model.named_parameters()}, rewards


@both_variants
@pytest.mark.parametrize("tiles", [None, (5, 100), (64, 37)])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-10), (torch.float32, 1e-5)], ids=["f64", "f32"])
def test_trainer_is_the_definition(method, tiles, dtype, tolerance, tmp_path, monkeypatch):
    """Loss and every parameter's gradient of the whole trainer, for any tiling, to 1e-10 in float64."""
    if tiles is not None:
        monkeypatch.setattr("trl_ext.kernels.paired_head._tile_sizes", lambda *_: tiles)
    policy, reference = gpt2(0, dtype), gpt2(0, dtype)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator, dtype=dtype))
    plain, plain_reference = copy.deepcopy(policy).double(), copy.deepcopy(reference).double()
    trainer = built(method, policy, reference, tmp_path)
    inputs = harness.batch(trainer, 6)
    trainer.model.eval()
    loss = trainer.compute_loss(trainer.model, inputs)
    loss.backward()
    expected, gradients, _ = plain_gradients(method, plain.eval(), plain_reference.eval(), inputs, 0.1)
    assert loss.dtype == dtype and abs(loss.item() - expected) < tolerance
    largest = max(gradient.abs().max().item() for gradient in gradients.values())
    assert largest > 1e-2
    for name, parameter in trainer.model.named_parameters():
        assert (parameter.grad.double() - gradients[name]).abs().max().item() < tolerance * max(1, largest), name


def test_stop_gradient_and_variants(tiny_folder, tmp_path):
    """The two variants have different losses and gradients; the rewards are the same."""
    logs = {}
    for name in ("tdpo", "tdpo1"):
        reference = tiny.model(seed=1)
        trainer = harness.trainer(BY_ID[name], tiny_folder, tmp_path / name, ref_model=reference, max_steps=1)
        trainer.train()
        logs[name] = trainer.state.log_history[0]
    assert logs["tdpo"]["loss"] != pytest.approx(logs["tdpo1"]["loss"], rel=1e-3)
    assert logs["tdpo"]["rewards/margins"] == logs["tdpo1"]["rewards/margins"]


@both_variants
@pytest.mark.parametrize("peft", [False, True], ids=["full", "lora"])
def test_start(method, peft, tiny_folder, tmp_path):
    """
    At the reference: loss log 2, KL and log ratios exactly 0, both with a copied reference and a switched-off adapter.
    """
    trainer = harness.trainer(
        method,
        tiny_folder,
        tmp_path,
        peft_config=LoraConfig(r=4, target_modules="all-linear") if peft else None,
        max_steps=3,
        learning_rate=1e-2,
    )
    trainer.train()
    first, *_, last = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert first["loss"] == pytest.approx(0.693147, abs=1e-6)
    assert first["forward_kl/chosen"] == first["forward_kl/rejected"] == first["forward_kl/margin"] == 0.0
    assert first["logratios/chosen"] == first["logratios/rejected"] == 0.0
    assert last["forward_kl/chosen"] > 0 and last["forward_kl/rejected"] > 0
    assert last["forward_kl/margin"] == pytest.approx(
        last["forward_kl/chosen"] - last["forward_kl/rejected"], rel=1e-5, abs=1e-6
    )


@pytest.mark.parametrize("name", ["fdpo", "tdpo"])
def test_logged_kl(name, tiny_folder, tmp_path):
    """
    `forward_kl/*` is the sequential KL of full float64 distributions, for TDPO and, with `log_token_kl`, for others.
    """
    method = BY_ID[name]
    options = {} if name == "tdpo" else {"log_token_kl": True}
    reference = tiny.model(seed=1)
    plain = copy.deepcopy(reference).double()
    trainer = harness.trainer(method, tiny_folder, tmp_path, ref_model=reference, max_steps=1, **options)
    trainer.train()
    inputs = harness.batch(trainer, 4)
    trainer.model.eval()
    fresh = harness.trainer(method, tiny_folder, tmp_path / "fresh", ref_model=tiny.model(seed=1), **options)
    with torch.no_grad():
        scores = fresh._score_responses(fresh.score_policy(fresh.model, inputs), inputs)
        policy = harness.load(tiny_folder).double()
        for side, ours, ref in zip(
            scores,
            harness.sides(policy, inputs, torch.float64),
            harness.sides(plain, inputs, torch.float64),
            strict=True,
        ):
            kl = (ref.logprobs.exp() * (ref.logprobs - ours.logprobs)).sum(-1) * ours.mask
            torch.testing.assert_close(side.token_kl.double(), kl, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(side.kl.double(), kl.sum(1), rtol=1e-5, atol=1e-4)
    entry = trainer.state.log_history[0]
    assert entry["forward_kl/chosen"] > 0 and entry["forward_kl/margin"] == pytest.approx(
        entry["forward_kl/chosen"] - entry["forward_kl/rejected"], rel=1e-4, abs=1e-3
    )


def test_log_token_kl_changes_nothing(tiny_folder, tmp_path):
    """The same losses with and without the metric, to the rounding of another order of sums."""
    runs = {}
    for log_token_kl in (False, True):
        trainer = harness.trainer(
            BY_ID["fdpo"], tiny_folder, tmp_path / f"{log_token_kl}", log_token_kl=log_token_kl, adam_epsilon=1e-3
        )
        trainer.train()
        runs[log_token_kl] = trainer
        assert bool(harness.column(trainer, "forward_kl/chosen")) == log_token_kl
    for key in ("loss", "entropy", "logits/chosen", "mean_token_accuracy", "logps/rejected"):
        first, second = (harness.column(trainer, key) for trainer in runs.values())
        assert first == pytest.approx(second, rel=1e-4, abs=1e-6), key


def test_no_logits(tiny_folder, tmp_path):
    """Neither model's head is ever called, so nothing of the size of the vocabulary is made."""
    trainer = harness.trainer(BY_ID["tdpo"], tiny_folder, tmp_path)
    inputs = harness.batch(trainer)

    def called(*_):
        raise AssertionError("the LM head was called")

    for model in (trainer.model, trainer.ref_model):
        model.get_output_embeddings().register_forward_hook(called)
    trainer.compute_loss(trainer.model, inputs).backward()


def test_one_pass_over_response_positions(tiny_folder, tmp_path, monkeypatch):
    """The head runs once a step, on the response positions alone, and with LoRA on one weight for both models."""
    seen = []

    def spy(hidden, weight, ref_hidden, ref_weight, labels, **kwargs):
        seen.append((len(hidden), weight is ref_weight, (labels == -100).any().item()))
        return paired_head_details(hidden, weight, ref_hidden, ref_weight, labels, **kwargs)

    monkeypatch.setattr("trl_ext.training.scoring_head.paired_head_details", spy)
    for peft_config in (None, LoraConfig(r=4, target_modules="all-linear")):
        seen.clear()
        trainer = harness.trainer(BY_ID["tdpo"], tiny_folder, tmp_path, peft_config=peft_config)
        inputs = harness.batch(trainer)
        trainer.compute_loss(trainer.model, inputs)
        assert seen == [(inputs["completion_mask"].sum().item(), peft_config is not None, False)]


# ---- Heads ----------------------------------------------------------------------------------------------------------


def check_against_definition(trainer, method, plain, plain_reference):
    """Loss of the trainer against full logits of the two models as they stand."""
    inputs = harness.batch(trainer)
    trainer.model.eval()
    with torch.no_grad():
        loss = trainer.compute_loss(trainer.model, inputs).item()
        losses, _, _ = harness.evaluate_equation(
            method, plain.eval(), plain_reference.eval(), inputs, trainer.args.beta
        )
    assert loss == pytest.approx(losses.mean().item(), rel=1e-5)
    assert loss != pytest.approx(0.693147, abs=1e-4)


@pytest.mark.parametrize("family", ["gemma2", "cohere", "granite"])
def test_scaled_and_capped_logits(family, tmp_path):
    """Soft-capping (Gemma 2) and logit scales (Cohere, Granite) are part of both models' logits."""
    from transformers import (
        CohereConfig,
        CohereForCausalLM,
        Gemma2Config,
        Gemma2ForCausalLM,
        GraniteConfig,
        GraniteForCausalLM,
    )

    sizes = dict(
        vocab_size=384,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=512,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=1,
        initializer_range=0.5,
    )
    config, cls = {
        "gemma2": (lambda: Gemma2Config(**sizes, head_dim=16, final_logit_softcapping=2.0), Gemma2ForCausalLM),
        "cohere": (lambda: CohereConfig(**sizes, logit_scale=0.25), CohereForCausalLM),
        "granite": (lambda: GraniteConfig(**sizes, logits_scaling=4.0), GraniteForCausalLM),
    }[family]
    models = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        models.append(cls(config()))
    plain = [copy.deepcopy(model) for model in models]
    trainer = built(BY_ID["tdpo"], *models, tmp_path)
    check_against_definition(trainer, BY_ID["tdpo"], *plain)


def test_head_with_bias(tmp_path):
    """A head with a bias (GPT-J, Phi), in both models."""
    from transformers import PhiConfig, PhiForCausalLM

    models = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        config = PhiConfig(
            vocab_size=384,
            hidden_size=32,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=512,
            bos_token_id=None,
            eos_token_id=1,
            initializer_range=0.3,
        )
        models.append(PhiForCausalLM(config))
        torch.nn.init.normal_(models[-1].lm_head.bias)
    plain = [copy.deepcopy(model) for model in models]
    trainer = built(BY_ID["tdpo"], *models, tmp_path)
    check_against_definition(trainer, BY_ID["tdpo"], *plain)
    trainer.compute_loss(trainer.model, harness.batch(trainer)).backward()
    assert trainer.model.lm_head.bias.grad.any()


def test_head_in_modules_to_save(tiny_folder, tmp_path):
    """A head trained whole beside the adapters: the policy's is its copy, the reference's the original."""
    peft_config = LoraConfig(r=4, target_modules="all-linear", modules_to_save=["lm_head"])
    trainer = harness.trainer(BY_ID["tdpo"], tiny_folder, tmp_path, peft_config=peft_config, max_steps=4)
    initial = harness.load(tiny_folder)
    trainer.train()
    copies = [p for name, p in trainer.model.named_parameters() if "lm_head.modules_to_save" in name]
    assert len(copies) == 1 and not torch.equal(copies[0], initial.lm_head.weight)
    check_against_definition(trainer, BY_ID["tdpo"], trainer.model, initial)


@pytest.mark.parametrize("kind", [PrefixTuningConfig, PromptTuningConfig])
def test_prompt_learning_is_the_definition(kind, tiny_folder, tmp_path):
    """Virtual tokens in front of the policy only: the same response positions of both models meet in the head."""
    method = BY_ID["tdpo"]
    trainer = harness.trainer(
        method,
        tiny_folder,
        tmp_path,
        peft_config=kind(task_type="CAUSAL_LM", num_virtual_tokens=3),
        max_steps=3,
        learning_rate=3e-2,
    )
    trainer.train()
    inputs = harness.batch(trainer)
    trainer.model.eval()
    with torch.no_grad():
        loss = trainer.compute_loss(trainer.model, inputs).item()
        length = inputs["input_ids"].shape[1]

        class WithoutVirtualTokens:
            def __call__(self, **kwargs):
                output = trainer.model(**kwargs)
                output.logits = output.logits[:, -length:]
                return output

        policy = harness.sides(WithoutVirtualTokens(), inputs)
        reference = harness.sides(harness.load(tiny_folder), inputs)
        losses, _, _ = method.equation(*policy, *reference, trainer.args.beta)
    assert loss == pytest.approx(losses.mean().item(), rel=1e-5)
    assert loss != pytest.approx(0.693147, abs=1e-4)


def test_adapter_as_reference(tiny_folder, tmp_path):
    """A reference that is a model with an adapter, beside a policy of its own."""
    reference = get_peft_model(tiny.model(seed=1), LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False))
    plain = copy.deepcopy(reference)
    trainer = harness.trainer(BY_ID["tdpo"], tiny_folder, tmp_path, ref_model=reference)
    check_against_definition(trainer, BY_ID["tdpo"], harness.load(tiny_folder), plain)


def test_models_of_an_earlier_trainer(tmp_path):
    """Instances that another trainer has had score as they did there, for this method and for another."""
    policy, reference, losses = tiny.model(), tiny.model(seed=1), []
    for name in ("tdpo", "fdpo", "tdpo"):
        trainer = built(BY_ID[name], policy, reference, tmp_path / f"{len(losses)}")
        trainer.model.eval()
        with torch.no_grad():
            losses.append(trainer.compute_loss(trainer.model, harness.batch(trainer)).item())
    assert losses[0] == losses[2] != losses[1]


# ---- Refused --------------------------------------------------------------------------------------------------------


def test_adapter_on_the_head_is_refused(tiny_folder, tmp_path):
    peft_config = LoraConfig(r=4, target_modules=["q_proj", "lm_head"])
    with pytest.raises(ValueError, match="adapter to `lm_head` is not supported.*Remove"):
        harness.trainer(BY_ID["tdpo"], tiny_folder, tmp_path, peft_config=peft_config)
    reference = get_peft_model(tiny.model(seed=1), peft_config)
    with pytest.raises(ValueError, match="adapter on the LM head is not supported.*merge_and_unload"):
        harness.trainer(BY_ID["tdpo"], tiny_folder, tmp_path, ref_model=reference)


def test_reference_with_other_logits_is_refused(tmp_path):
    """A reference whose logits are scaled otherwise cannot share the policy's head."""
    with pytest.raises(ValueError, match="`ref_model` are scaled and soft-capped by.*policy's architecture"):
        built(BY_ID["tdpo"], tiny.model(), tiny.model(logit_scale=0.5), tmp_path)


@pytest.mark.parametrize(
    "config, options, message",
    [
        (TDPOConfig, {"precompute_ref_log_probs": True}, "whole next-token distribution.*Leave `precompute"),
        (TDPOConfig, {"variant": "tdpo3"}, "variant.*'tdpo2', 'tdpo1'.*got 'tdpo3'"),
        (TDPOConfig, {"alpha": -1.0}, "alpha.*at least 0, got -1.0"),
        (TDPOConfig, {"variant": "tdpo1", "alpha": 0.3}, "`alpha=0.3` has no effect with `variant='tdpo1'`"),
        (
            FDPOConfig,
            {"log_token_kl": True, "precompute_ref_log_probs": True},
            "`log_token_kl=True` cannot be combined",
        ),
        (SimPERConfig, {"log_token_kl": True}, "`log_token_kl=True` is not supported by `SimPERConfig`"),
    ],
)
def test_refused_options(config, options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        config(output_dir=str(tmp_path), use_cpu=True, bf16=False, **options)


def test_fsdp1_is_refused(tiny_folder, tmp_path, monkeypatch):
    """
    FSDP1 frees the reference's head at the end of its own forward; FSDP2 has a test of its own, `test_sharded.py`.
    """
    original = DPOTrainer.__init__

    def init(self, *args, **kwargs):
        original(self, *args, **kwargs)
        self.is_fsdp_enabled = True  # as under FSDP1, which accelerate runs on accelerators only

    monkeypatch.setattr(DPOTrainer, "__init__", init)
    with pytest.raises(ValueError, match="FSDP1 is not supported with the token KL.*Use FSDP2"):
        harness.trainer(BY_ID["tdpo"], tiny_folder, tmp_path, peft_config=LoraConfig(r=2))
