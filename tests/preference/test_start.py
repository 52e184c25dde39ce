"""
The reference is what training starts from: whatever would make it something else is refused by name, or handled so
that the log ratios of the first step are zero. The expected values are those of the base model's full logits.
"""

import copy
import logging

import harness
import pytest
import tiny
import torch
from methods import BY_ID, WITH_PRECOMPUTE
from peft import (
    AdaLoraConfig,
    BOFTConfig,
    C3AConfig,
    CPTConfig,
    FourierFTConfig,
    HRAConfig,
    IA3Config,
    LNTuningConfig,
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    MultitaskPromptTuningConfig,
    OFTConfig,
    OSFConfig,
    PolyConfig,
    PrefixTuningConfig,
    PromptTuningConfig,
    TrainableTokensConfig,
    VeraConfig,
    XLoraConfig,
    get_peft_model,
)
from reading import nearby
from transformers import (
    FalconConfig,
    FalconForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    MixtralConfig,
    MixtralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
)

from trl_ext.training.dropout import disable_functional_dropout


FDPO, TDPO, SIMPER = BY_ID["fdpo"], BY_ID["tdpo"], BY_ID["simper"]
both = pytest.mark.parametrize("method", [FDPO, TDPO], ids=lambda method: method.id)


def lora(**options) -> LoraConfig:
    return LoraConfig(**{"r": 4, "target_modules": ["q_proj", "v_proj"], "lora_dropout": 0.0, **options})


def saved(model, folder) -> str:
    model.save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return str(folder)


def errors_of_the_reference(trainer, base) -> list[float]:
    """By step of a training: how far the reference's log-probabilities are from those of `base`, in nats."""
    errors, original = [], trainer._score_responses

    def recorded(policy, inputs):
        sides = original(policy, inputs)
        with torch.no_grad():
            expected = harness.sides(base.eval(), inputs)
        pairs = zip(sides, expected, strict=True)
        errors.append(max((side.ref_logps - plain.logps).abs().max().item() for side, plain in pairs))
        return sides

    trainer._score_responses = recorded
    trainer.train()
    return errors


# ---- Adapters -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_4", "olora", "loftq", "corda", "lora_ga"])
@pytest.mark.parametrize("given", ["config", "model"])
def test_initializations_that_rewrite_the_base_are_refused(init, given, tiny_folder, tmp_path):
    config = lora()
    config.init_lora_weights = init  # LoftQ and CorDA need more to be made, and none of it to be refused
    arguments = {"peft_config": config}
    model = tiny_folder
    if given == "model":
        model = get_peft_model(harness.load(tiny_folder), lora())
        model.peft_config["default"].init_lora_weights, arguments = init, {}
    with pytest.raises(ValueError, match=f"`init_lora_weights='{init}'`.*ref_model"):
        harness.trainer(FDPO, model, tmp_path, **arguments)


def test_such_an_adapter_with_a_reference_of_its_own(tiny_folder, tmp_path):
    """The remedy that the message names: the first loss is log 2."""
    reference = harness.load(tiny_folder)
    trainer = harness.trainer(
        FDPO, tiny_folder, tmp_path, peft_config=lora(init_lora_weights="pissa"), ref_model=reference, max_steps=1
    )
    trainer.train()
    assert harness.column(trainer, "loss")[0] == pytest.approx(0.693147, abs=1e-4)
    # A method without a reference may have it, too.
    harness.trainer(SIMPER, tiny_folder, tmp_path / "simper", peft_config=lora(init_lora_weights="pissa"))


@both
@pytest.mark.parametrize(
    "config",
    [
        lora(),
        lora(init_lora_weights="gaussian"),
        lora(init_lora_weights="orthogonal"),
        lora(use_dora=True),
        lora(modules_to_save=["lm_head"]),
        lora(trainable_token_indices=[5, 6]),
        IA3Config(target_modules=["q_proj"], feedforward_modules=[]),
        OFTConfig(target_modules=["q_proj"], r=0, oft_block_size=4),
        lora(use_rslora=True, rank_pattern={"q_proj": 2}, alpha_pattern={"q_proj": 32}),
        lora(lora_bias=True),
        lora(target_modules=["embed_tokens", "q_proj"]),
        lora(modules_to_save=["embed_tokens", "norm"]),
        lora(target_modules=None, target_parameters=["mlp.gate_proj.weight"]),
        *(kind(target_modules=["q_proj"]) for kind in (LoHaConfig, LoKrConfig, HRAConfig, OSFConfig)),
        VeraConfig(r=8, target_modules=["q_proj"]),
        BOFTConfig(boft_block_size=4, target_modules=["q_proj"]),
        LNTuningConfig(target_modules=["input_layernorm"], task_type="CAUSAL_LM"),
        FourierFTConfig(n_frequency=20, init_weights=True, target_modules=["q_proj"]),
        TrainableTokensConfig(token_indices=[5, 300], target_modules=["embed_tokens"]),
    ],
    ids=[
        *("lora", "gaussian", "orthogonal", "dora", "modules_to_save", "token_indices", "ia3", "oft", "rslora"),
        *("lora_bias", "embeddings", "whole embeddings", "parameters", "loha", "lokr", "hra", "osf", "vera", "boft"),
        *("norms", "fourierft", "tokens"),
    ],
)
def test_adapters_that_start_at_the_base(method, config, tiny_folder, tmp_path):
    """
    No other initialization and no other kind of adapter is refused, and the reference stays the base as it trains.
    """
    trainer = harness.trainer(method, tiny_folder, tmp_path, peft_config=config, max_steps=3, learning_rate=1e-2)
    assert trainer.reference.kind == "adapter off"
    errors = errors_of_the_reference(trainer, harness.load(tiny_folder))
    assert max(errors) < 1e-3 and harness.column(trainer, "loss")[0] == pytest.approx(0.693147, abs=1e-4)


@pytest.mark.parametrize("method", [FDPO, SIMPER], ids=lambda method: method.id)
@pytest.mark.parametrize(
    "config, named",
    [
        (AdaLoraConfig(total_step=10, target_modules=["q_proj"]), "AdaLoraConfig.*update_and_allocate"),
        (PolyConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"), "PolyConfig.*task_ids"),
        (
            MultitaskPromptTuningConfig(num_virtual_tokens=4, num_tasks=2, task_type="CAUSAL_LM"),
            "MultitaskPromptTuningConfig.*task_ids",
        ),
        (lora(init_lora_weights="eva"), "`init_lora_weights='eva'`.*initialize_lora_eva_weights"),
    ],
    ids=["adalora", "poly", "multitask", "eva"],
)
def test_adapters_that_need_more_than_a_step_are_refused(method, config, named, tiny_folder, tmp_path):
    """AdaLoRA never allocated a rank, and EVA was a plain LoRA, without a word."""
    with pytest.raises(ValueError, match=named):
        harness.trainer(method, tiny_folder, tmp_path, peft_config=config)


@both
@pytest.mark.parametrize(
    "config",
    [C3AConfig(block_size=8, target_modules=["q_proj"]), FourierFTConfig(n_frequency=20, target_modules=["q_proj"])],
    ids=["c3a", "fourierft"],
)
def test_kinds_that_start_elsewhere_by_default_are_refused(method, config, tiny_folder, tmp_path):
    """By name or on the first batch, before any step; the remedy is in the message."""
    with pytest.raises(ValueError, match="`init_weights=False`|does not start at its reference.*`ref_model`"):
        harness.trainer(method, tiny_folder, tmp_path, peft_config=config).train()


def test_a_random_adapter(tiny_folder, tmp_path):
    """Made in the trainer it is refused; made before, its frozen copy is the reference."""
    random = lora(init_lora_weights=False)
    with pytest.raises(ValueError, match="`init_lora_weights=False`.*get_peft_model"):
        harness.trainer(FDPO, tiny_folder, tmp_path, peft_config=random)
    model = get_peft_model(harness.load(tiny_folder), random)
    start = copy.deepcopy(model)
    trainer = harness.trainer(FDPO, model, tmp_path, max_steps=3, learning_rate=1e-2)
    assert trainer.reference.kind == "frozen adapter"
    assert max(errors_of_the_reference(trainer, start)) < 1e-3


@both
@pytest.mark.parametrize(
    "config",
    [
        lora(lora_bias=True, use_rslora=True),
        lora(use_dora=True),
        lora(target_modules=None, target_parameters=["mlp.gate_proj.weight"]),
        lora(trainable_token_indices=[5, 6]),
        TrainableTokensConfig(token_indices=[5, 300], target_modules=["embed_tokens"]),
        IA3Config(target_modules=["q_proj"], feedforward_modules=[]),
        *(kind(target_modules=["q_proj"]) for kind in (LoHaConfig, LoKrConfig, HRAConfig)),
        VeraConfig(r=8, target_modules=["q_proj"]),
        BOFTConfig(boft_block_size=4, target_modules=["q_proj"]),
        FourierFTConfig(n_frequency=20, init_weights=True, target_modules=["q_proj"]),
        C3AConfig(block_size=8, target_modules=["q_proj"]),
    ],
    ids=[
        *("lora_bias", "dora", "parameters", "token_indices", "tokens", "ia3", "loha", "lokr", "hra", "vera", "boft"),
        *("fourierft", "c3a"),
    ],
)
def test_a_trained_adapter_is_its_own_reference(method, config, tiny_folder, tmp_path):
    """Whatever its parameters are called. TRL's frozen copy has those alone that lie below a module `default`."""
    model = get_peft_model(harness.load(tiny_folder), copy.deepcopy(config))
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))
    start = copy.deepcopy(model)
    trainer = harness.trainer(method, model, tmp_path / "live", max_steps=3, learning_rate=1e-2)
    assert trainer.reference.kind == "frozen adapter"
    assert max(errors_of_the_reference(trainer, start)) < 1e-3
    assert harness.column(trainer, "loss")[0] == pytest.approx(0.693147, abs=1e-4)
    if method in WITH_PRECOMPUTE:
        cached = harness.trainer(method, start, tmp_path / "cached", max_steps=1, precompute_ref_log_probs=True)
        cached.train()
        assert harness.column(cached, "loss")[0] == pytest.approx(0.693147, abs=1e-4)


def test_an_adapter_on_packed_experts(tmp_path):
    """Reference and policy of a mixture of experts whose weights are parameters of three dimensions."""
    for given in (False, True):
        torch.manual_seed(0)
        sizes = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2)
        heads = dict(num_attention_heads=4, num_key_value_heads=2, num_local_experts=4, output_router_logits=False)
        base = MixtralForCausalLM(MixtralConfig(vocab_size=384, **sizes, **heads))
        targets = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
        config = LoraConfig(r=4, target_modules=[], target_parameters=targets)
        model, arguments, start = base, {"peft_config": config}, copy.deepcopy(base)
        if given:
            model, arguments = get_peft_model(base, config), {}
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    if "lora_B" in name:
                        parameter.normal_(std=0.05)
            start = copy.deepcopy(model)
        options = dict(processing_class=tiny.tokenizer(), max_steps=3, learning_rate=1e-2, router_aux_loss_coef=0.0)
        trainer = harness.trainer(FDPO, model, tmp_path / str(given), **arguments, **options)
        assert max(errors_of_the_reference(trainer, start)) < 1e-3
        assert harness.column(trainer, "loss")[0] == pytest.approx(0.693147, abs=1e-4)
        assert abs(harness.column(trainer, "logratios/chosen")[-1]) > 1e-3


def test_repeated_layers_are_refused(tiny_folder, tmp_path):
    with pytest.raises(ValueError, match=r"`layer_replication=\[\[0, 2\], \[1, 2\]\]`"):
        harness.trainer(FDPO, tiny_folder, tmp_path, peft_config=lora(layer_replication=[[0, 2], [1, 2]]))


@pytest.mark.parametrize("bias", ["all", "lora_only"])
@pytest.mark.parametrize("given", ["config", "model"])
def test_trained_biases_are_refused(bias, given, tiny_folder, tmp_path):
    config = lora(bias=bias)
    model, arguments = (tiny_folder, {"peft_config": config})
    if given == "model":
        model, arguments = get_peft_model(harness.load(tiny_folder), config), {}
    with pytest.raises(ValueError, match=f"`bias='{bias}'`.*`bias='none'`"):
        harness.trainer(FDPO, model, tmp_path, **arguments)


@both
@pytest.mark.parametrize("when", ["before", "after"])
def test_trained_parameters_outside_the_adapter_are_refused(method, when, tiny_folder, tmp_path):
    """Unfrozen by hand, before the constructor or before `train`: they would stay when the adapter is switched off."""
    model = get_peft_model(harness.load(tiny_folder), lora())
    norm = model.get_base_model().model.norm.weight
    norm.requires_grad_(when == "before")
    with pytest.raises(ValueError, match=r"model\.norm\.weight.*1 in all.*Freeze"):
        trainer = harness.trainer(method, model, tmp_path)
        norm.requires_grad_(True)
        trainer.train()


@pytest.mark.parametrize("method", [FDPO, SIMPER], ids=lambda method: method.id)
@pytest.mark.parametrize(
    "config, named",
    [
        (lora(alora_invocation_tokens=[5]), "alora_invocation_tokens"),
        (
            CPTConfig(cpt_token_ids=[5, 6], cpt_mask=[1, 1], cpt_tokens_type_mask=[1, 2], task_type="CAUSAL_LM"),
            "CPTConfig",
        ),
        (XLoraConfig(task_type="CAUSAL_LM", hidden_size=32, adapters={}), "XLoraConfig"),
    ],
    ids=["alora", "cpt", "xlora"],
)
def test_adapters_that_would_not_be_trained_are_refused(method, config, named, tiny_folder, tmp_path):
    """They act around the backbone that is scored: aLoRA stayed at a loss of 0.6931 for ever."""
    with pytest.raises(ValueError, match=f"{named}.*not be trained"):
        harness.trainer(method, tiny_folder, tmp_path, peft_config=config)


@pytest.mark.parametrize("method", [FDPO, SIMPER], ids=lambda method: method.id)
def test_another_active_adapter_is_refused(method, tiny_folder, tmp_path):
    """The one called 'default' is trained, and the run would not start from the model that was given."""
    model = get_peft_model(harness.load(tiny_folder), lora())
    model.add_adapter("other", lora(init_lora_weights=False))
    harness.trainer(method, model, tmp_path)
    model = get_peft_model(harness.load(tiny_folder), lora())
    model.add_adapter("other", lora(init_lora_weights=False))
    for active in ("other", ["default", "other"]):
        model.base_model.set_adapter(active)
        with pytest.raises(ValueError, match="active adapters of `model` are .*'other'.*set_adapter"):
            harness.trainer(method, model, tmp_path)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind", [PrefixTuningConfig, PromptTuningConfig])
def test_learned_prompts(kind, checkpointing, tiny_folder, tmp_path):
    """
    Prefix tuning with checkpointing is refused with the remedy; what is learned starts at random and still trains.
    """
    config = kind(num_virtual_tokens=4, task_type="CAUSAL_LM")
    options = dict(peft_config=config, gradient_checkpointing=checkpointing, max_steps=1)
    if checkpointing and kind is PrefixTuningConfig:
        with pytest.raises(ValueError, match="`gradient_checkpointing=True`.*`gradient_checkpointing=False`"):
            harness.trainer(FDPO, tiny_folder, tmp_path, **options)
        return
    trainer = harness.trainer(FDPO, tiny_folder, tmp_path, **options)
    assert max(errors_of_the_reference(trainer, harness.load(tiny_folder))) < 1e-3


# ---- Shared parameters ----------------------------------------------------------------------------------------------


def whole(model):
    return copy.copy(model)


def one_layer(model):
    other = copy.deepcopy(model)
    other.model.layers[1] = model.model.layers[1]
    return other


def one_view(model):
    other = copy.deepcopy(model)
    other.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.data.view(-1).view_as(model.lm_head.weight))
    return other


@both
@pytest.mark.parametrize("share", [whole, one_layer, one_view], ids=lambda share: share.__name__)
@pytest.mark.parametrize("peft", [False, True], ids=["full", "lora"])
def test_shared_parameters_are_refused(method, share, peft, tiny_folder, tmp_path):
    model = harness.load(tiny_folder)
    with pytest.raises(ValueError, match="`ref_model` shares parameters with `model`.*deepcopy"):
        harness.trainer(method, model, tmp_path, ref_model=share(model), peft_config=lora() if peft else None)


# ---- Noise ----------------------------------------------------------------------------------------------------------


def gpt2(**options):
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=384, n_embd=32, n_layer=2, n_head=4, n_positions=512, **options))


def opt(**options):
    torch.manual_seed(0)
    sizes = dict(hidden_size=32, ffn_dim=64, num_hidden_layers=2, num_attention_heads=4, word_embed_proj_dim=32)
    return OPTForCausalLM(OPTConfig(vocab_size=384, max_position_embeddings=512, **sizes, **options))


def falcon():
    """Reads `hidden_dropout`, and `attention_dropout` in two ways, from its configuration in every forward."""
    torch.manual_seed(0)
    sizes = dict(vocab_size=384, hidden_size=32, num_hidden_layers=2, num_attention_heads=4)
    layout = dict(parallel_attn=False, new_decoder_architecture=False)
    return FalconForCausalLM(FalconConfig(**sizes, **layout, hidden_dropout=0.3, attention_dropout=0.3))


NOISY = {
    "modules": lambda: gpt2(resid_pdrop=0.3, embd_pdrop=0.3, attn_pdrop=0.3),
    "functions": lambda: opt(dropout=0.3, attention_dropout=0.3),
    "attention": lambda: tiny.model(attention_dropout=0.3),
    "configuration": falcon,
}


@pytest.mark.parametrize("model", NOISY.values(), ids=NOISY)
@pytest.mark.parametrize("reference", ["adapter off", "frozen adapter", "given", "precomputed"])
def test_the_reference_has_no_noise(model, reference, tmp_path):
    """
    With `disable_dropout=False` and NEFTune, wherever the reference is: its numbers are those of evaluation mode.
    """
    folder = saved(model(), tmp_path / "model")
    target = {"gpt2": "c_attn", "falcon": "query_key_value"}.get(model().config.model_type, "q_proj")
    options = dict(disable_dropout=False, neftune_noise_alpha=5.0, max_steps=2, learning_rate=1e-2)
    policy, config, base = folder, lora(target_modules=[target], lora_dropout=0.3), harness.load(folder)
    if reference == "frozen adapter":
        policy = nearby(get_peft_model(harness.load(folder), config), only="lora_B")
        base, config = copy.deepcopy(policy), None
    elif reference == "given":
        options["ref_model"], config = harness.load(folder).train(), None
    elif reference == "precomputed":
        options |= dict(precompute_ref_log_probs=True, reference_cache_dir=str(tmp_path / "cache"))
    trainer = harness.trainer(FDPO, policy, tmp_path, peft_config=config, processing_class=tiny.tokenizer(), **options)
    assert max(errors_of_the_reference(trainer, base)) < 1e-3


@pytest.mark.parametrize("model", NOISY.values(), ids=NOISY)
def test_disabled_dropout_is_all_of_it(model, tmp_path, caplog):
    """
    `disable_dropout=True`, the default: the first loss is log 2, and the configuration that is saved keeps its
    dropout.
    """
    folder = saved(model(), tmp_path / "model")
    with caplog.at_level(logging.WARNING):
        trainer = harness.trainer(FDPO, folder, tmp_path, max_steps=1)
        trainer.train()
    assert harness.column(trainer, "loss")[0] == pytest.approx(0.693147, abs=1e-5)
    assert "noisy" not in caplog.text
    configs = (trainer.model.config.to_dict(), harness.load(folder).config.to_dict())
    kept, expected = ({name: value for name, value in config.items() if "drop" in name} for config in configs)
    assert kept == expected and max(expected.values()) > 0


def test_dropout_of_the_configuration():
    """A view, which shares everything else and is not saved; models without dropout keep their configuration."""
    model = falcon()
    config, layer = model.config, model.transformer.h[0]
    disable_functional_dropout(model)
    assert layer.config.hidden_dropout == layer.config.attention_dropout == 0
    assert config.hidden_dropout == 0.3 and layer.config.to_dict() == model.config.to_dict() == config.to_dict()
    config.use_cache = False
    assert layer.config.use_cache is False and isinstance(layer.config, FalconConfig)
    other = copy.deepcopy(model)
    assert other.transformer.h[0].config.hidden_dropout == 0
    plain = tiny.model()
    disable_functional_dropout(plain)
    assert plain.model.layers[0].self_attn.config is plain.config


def test_functional_dropout_is_what_is_named_so():
    model = tiny.model(attention_dropout=0.3)
    scale = model.model.layers[0].self_attn.scaling
    disable_functional_dropout(model)
    assert model.model.layers[0].self_attn.attention_dropout == 0 and model.model.layers[0].self_attn.scaling == scale


def test_noise_that_stays_is_said(tmp_path, caplog):
    """A router's jitter is noise of training that no option of ours switches off: a warning, and training goes on."""
    torch.manual_seed(0)
    sizes = dict(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2
    )
    config = MixtralConfig(
        vocab_size=384, num_local_experts=4, initializer_range=0.2, **sizes, router_jitter_noise=0.5
    )
    folder = saved(MixtralForCausalLM(config), tmp_path / "model")
    with caplog.at_level(logging.WARNING):
        trainer = harness.trainer(FDPO, folder, tmp_path, max_steps=1)
        trainer.train()
    assert "forward is noisy" in caplog.text


# ---- The first batch ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [FDPO, TDPO, BY_ID["rainbowpo"]], ids=lambda method: method.id)
@pytest.mark.parametrize("peft", [False, True], ids=["full", "lora"])
def test_a_model_that_was_moved_is_found_out(method, peft, tiny_folder, tmp_path):
    """
    Weights changed behind the trainer's back, on either side: an error that says how far and why, before any step.
    """
    trainer = harness.trainer(method, tiny_folder, tmp_path, peft_config=lora() if peft else None)
    nearby(trainer.model, only="lora_B" if peft else "")
    before = harness.weights(trainer.model)
    with pytest.raises(ValueError, match="does not start at its reference.*nats.*`init_lora_weights`.*`ref_model`"):
        trainer.train()
    assert harness.largest_difference(before, harness.weights(trainer.model)) == 0


@pytest.mark.parametrize("method", WITH_PRECOMPUTE[:1], ids=lambda method: method.id)
def test_precomputed_statistics_of_another_model_are_found_out(method, tiny_folder, tmp_path):
    options = dict(precompute_ref_log_probs=True, reference_cache_dir=str(tmp_path / "cache"))
    trainer = harness.trainer(method, tiny_folder, tmp_path, **options)
    nearby(trainer.model)
    with pytest.raises(ValueError, match="the policy itself, before its first step"):
        trainer.train()


def test_where_log_ratios_may_be_anything(tiny_folder, tmp_path):
    """A reference of one's own, a resumed run, and `train` called again on a trained model."""
    trainer = harness.trainer(FDPO, tiny_folder, tmp_path / "own", ref_model=tiny.model(seed=5), max_steps=1)
    trainer.train()
    options = dict(max_steps=2, save_strategy="steps", save_steps=1, learning_rate=1e-2)
    harness.trainer(FDPO, tiny_folder, tmp_path / "run", **options).train()
    trainer = harness.trainer(FDPO, tiny_folder, tmp_path / "run", **options)
    trainer.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-1"))
    trainer.train()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_rounding_is_no_offence(dtype, tiny_folder, tmp_path):
    """
    The reference's numbers come from other batches and kernels: what the precision explains passes, for every dtype.
    """
    folder = saved(harness.load(tiny_folder).to(dtype), tmp_path / "model")
    options = dict(
        precompute_ref_log_probs=True, reference_cache_dir=str(tmp_path / "cache"), precompute_ref_batch_size=1
    )
    trainer = harness.trainer(
        FDPO, folder, tmp_path, model_init_kwargs={"dtype": str(dtype).removeprefix("torch.")}, max_steps=1, **options
    )
    assert trainer.model.dtype == dtype
    trainer.train()


@pytest.mark.parametrize("precompute", [False, True])
def test_a_model_changed_in_memory_is_its_own_reference(precompute, tiny_folder, tmp_path, caplog):
    """Trained or merged in the same script: the reference is the model as it is now, precomputed or not."""
    model = nearby(harness.load(tiny_folder))
    start = copy.deepcopy(model)
    options = dict(precompute_ref_log_probs=True, reference_cache_dir=str(tmp_path / "cache")) if precompute else {}
    trainer = harness.trainer(FDPO, model, tmp_path, max_steps=2, learning_rate=1e-2, **options)
    assert max(errors_of_the_reference(trainer, start)) < 1e-3


# ---- Optimizers -----------------------------------------------------------------------------------------------------


def test_an_optimizer_of_something_else_is_refused(tiny_folder, tmp_path):
    model = harness.load(tiny_folder)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    with pytest.raises(ValueError, match="`AdamW`.*none of the parameters"):
        harness.trainer(FDPO, model, tmp_path / "a", peft_config=lora(), optimizers=(optimizer, None))
    with pytest.raises(ValueError, match="`SGD`.*none of the parameters"):
        other = torch.optim.SGD(tiny.model().parameters(), lr=1e-2)
        harness.trainer(FDPO, tiny_folder, tmp_path / "b", optimizers=(other, None))
    model = get_peft_model(harness.load(tiny_folder), lora())
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad][:2], lr=1e-2)
    harness.trainer(FDPO, model, tmp_path / "c", optimizers=(optimizer, None))  # a part is enough


@pytest.mark.parametrize("kind", [torch.optim.lr_scheduler.LambdaLR, torch.optim.lr_scheduler.ReduceLROnPlateau])
def test_a_scheduler_of_another_optimizer_is_refused(kind, tiny_folder, tmp_path):
    """Its steps change the learning rate of its own optimizer. Of the run's it is used."""
    model = harness.load(tiny_folder)

    def made(optimizer):
        more = {"lr_lambda": lambda step: 0.5**step} if kind is torch.optim.lr_scheduler.LambdaLR else {}
        return kind(optimizer, **more)

    optimizer, other = (torch.optim.SGD(model.parameters(), lr=1e-2) for _ in range(2))
    for given in ((optimizer, made(other)), (None, made(other))):
        with pytest.raises(ValueError, match=rf"`{kind.__name__}`.*`lr_scheduler_type`"):
            harness.trainer(FDPO, model, tmp_path / "refused", optimizers=given)
    run = harness.trainer(FDPO, model, tmp_path / "taken", optimizers=(optimizer, made(optimizer)), max_steps=2)
    run.train()
    if kind is torch.optim.lr_scheduler.LambdaLR:
        assert harness.column(run, "learning_rate") == [1e-2, 5e-3]
