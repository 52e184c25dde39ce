"""Switching adapters, of a `PeftModel` or in the layers of a model: the right one computes, nothing else changes."""

import copy

import harness
import pytest
import tiny
import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from reading import nearby

from trl_ext.training.adapters import (
    check_starts_at_base,
    reference_adapter,
    shared_parameters,
    use_adapter,
    use_reference_adapter,
)


IDS = torch.arange(5, 17).reshape(2, 6)


def lora(**options) -> LoraConfig:
    return LoraConfig(r=4, init_lora_weights=False, **{"target_modules": ["q_proj", "v_proj"], **options})


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


def state(model) -> dict:
    layers = [module for module in model.modules() if hasattr(module, "active_adapters")]
    return {
        "trained": [parameter.requires_grad for parameter in model.parameters()],
        "modes": [module.training for module in model.modules()],
        "disabled": [getattr(module, "disable_adapters", None) is True for module in model.modules()],
        "active": [list(x.active_adapters) for x in layers if not callable(x.active_adapters)],
        "logits": logits(model).tolist(),
    }


def with_two(kind: str, copied: bool = True):
    """A model with the adapter that is trained and, where `copied`, a frozen one; and the truth for each, and none."""
    model = tiny.model()
    base = copy.deepcopy(model)
    whole = {"modules_to_save": ["lm_head"]} if kind != "rows" else {"trainable_token_indices": [7, 9]}
    if kind == "layers":
        harness.require_own_adapters()
        model.add_adapter(lora(**whole), adapter_name="default")
        # transformers activates a new adapter in every module, so it needs whole modules, too.
        add = lambda: model.add_adapter(lora(**whole), adapter_name="ref")  # noqa: E731
    else:
        model = get_peft_model(model, lora(**whole))
        add = lambda: model.add_adapter("ref", lora())  # noqa: E731
    nearby(model, only="lm_head.modules_to_save" if kind != "rows" else "trainable_tokens_delta")
    alone = logits(copy.deepcopy(model))
    if copied:
        add()
        model.set_adapter("ref")
    copy_alone = logits(copy.deepcopy(model))
    model.set_adapter("default")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".default" in name)
    return model, {"default": alone, "ref": copy_alone, None: logits(base)}


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("kind", ["peft", "layers", "rows"])
@pytest.mark.parametrize("name", ["ref", None])
def test_switching(name, kind, fails):
    model, expected = with_two(kind)
    assert logits(model) == pytest.approx(expected["default"], abs=1e-6)
    before = state(model)
    try:
        with use_adapter(model, name):
            inside = logits(model)
            if fails:
                raise KeyError
    except KeyError:
        pass
    assert inside == pytest.approx(expected[name], abs=1e-6)
    assert (inside - expected["default"]).abs().max() > 1e-2
    assert state(model) == before


@pytest.mark.parametrize("copied", [False, True])
@pytest.mark.parametrize("kind", ["peft", "layers"])
def test_reference(kind, copied):
    model, expected = with_two(kind, copied)
    assert reference_adapter(model) == ("ref" if copied else None)
    with use_reference_adapter(model):
        assert logits(model) == pytest.approx(expected["ref" if copied else None], abs=1e-6)
        with use_reference_adapter(model):  # already switched
            assert logits(model) == pytest.approx(expected["ref" if copied else None], abs=1e-6)
        assert logits(model) == pytest.approx(expected["ref" if copied else None], abs=1e-6)
    assert logits(model) == pytest.approx(expected["default"], abs=1e-6)


def test_learned_prompts():
    model = get_peft_model(tiny.model(), PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"))
    with use_adapter(model, None):
        assert logits(model) == pytest.approx(logits(tiny.model()), abs=1e-6)
    assert logits(model).shape[1] == IDS.shape[1] + 2


@pytest.mark.parametrize("init", ["PiSSA_niter_4", "olora", "corda", "loftq", "lora_ga", False])
def test_adapters_that_do_not_start_at_the_base(init):
    config = LoraConfig()
    config.init_lora_weights = init
    with pytest.raises(ValueError, match=f"`init_lora_weights={init!r}`.*`init_lora_weights=True`, or else"):
        check_starts_at_base(config, is_fresh=True, instead=", or else")
    if init is False:  # an adapter that was trained before
        check_starts_at_base(config, is_fresh=False)


@pytest.mark.parametrize("init", [True, "gaussian", "orthogonal", "eva"])
def test_adapters_that_start_at_the_base(init):
    config = LoraConfig()
    config.init_lora_weights = init
    check_starts_at_base(config, is_fresh=True)
    config.bias = "all"
    with pytest.raises(ValueError, match="`bias='all'`.*`bias='none'`"):
        check_starts_at_base(config, is_fresh=False)


def test_shared_parameters():
    model = tiny.model()
    assert shared_parameters(model, copy.deepcopy(model)) == []
    other = copy.deepcopy(model)
    other.model.norm = model.model.norm
    other.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.data.view(-1).view_as(model.lm_head.weight))
    assert shared_parameters(model, other) == ["lm_head.weight", "model.norm.weight"]
    model.model.norm.weight.requires_grad_(False)
    assert shared_parameters(model, other, trained_only=True) == ["lm_head.weight"]
