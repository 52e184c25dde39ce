"""Fingerprints are the names of what is on users' disks: these hashes were computed by version 0.1.0's rules."""

import pytest
import torch
from accelerate import Accelerator
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from trl_ext.training import fingerprints
from trl_ext.training.fingerprints import fingerprint, make_key, reference_fingerprint


def numbered(model, scale):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.arange(parameter.numel()).reshape(parameter.shape) * scale)
    return model


def test_encoders():
    model = numbered(torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.LayerNorm(3, dtype=torch.bfloat16)), 1 / 8)
    model.config = {"_class_name": "x", "depth": 2, "some_version": 3}
    digest = "025b2295829ddf10c3f815e5b639290348aad4c2852fd91c2e1b0d0d58ca9a9f"
    assert fingerprint(model, None, "a", 3) == digest
    model.config |= {"_class_name": "y", "some_version": 4}
    assert fingerprint(model, None, "a", 3) == digest
    model.config |= {"depth": 3}
    assert fingerprint(model, None, "a", 3) != digest
    assert make_key("a", 1, b"x", None).hex() == "29d4c2323046430840cc818cb1aca3779d7b1b0b65943501bd15be67cc8a87b4"
    with pytest.raises(ValueError, match="`0.bias` of the `Sequential`.*meta"):
        fingerprint(model.to("meta"))


def test_references(monkeypatch):
    """With tied embeddings; the configuration, which grows with transformers, is replaced."""
    monkeypatch.setattr(fingerprints, "_plain", lambda config, without: {"size": 4})
    accelerator, precision = Accelerator(cpu=True), ("no", False)
    sizes = dict(vocab_size=8, hidden_size=4, intermediate_size=4, num_hidden_layers=1, num_attention_heads=1)
    model = numbered(LlamaForCausalLM(LlamaConfig(**sizes, tie_word_embeddings=True)), 1 / 64)
    digest = "05cca1ff98a8d22c70303116027fe08f"
    assert reference_fingerprint(model, None, precision, accelerator) == digest
    adapted = get_peft_model(model, LoraConfig(r=1, target_modules=["q_proj"]))
    for name, parameter in adapted.named_parameters():
        if "lora" in name:
            torch.nn.init.constant_(parameter, 0.5)
    assert reference_fingerprint(adapted, None, precision, accelerator) == digest
    assert reference_fingerprint(adapted, "default", precision, accelerator) == "87297a107efd934779c654c7f45d62ab"
