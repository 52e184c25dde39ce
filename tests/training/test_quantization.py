"""A quantized base stays what it is, whatever is done between steps."""

import harness
import pytest
import tiny
import torch
from methods import BY_ID
from peft import LoraConfig
from transformers import BitsAndBytesConfig


@pytest.mark.parametrize("hidden_size", [32, 128])
def test_evaluation_leaves_the_base_alone(hidden_size, tmp_path):
    """
    An evaluation between two forwards of the policy changes neither. On CPUs with bfloat16 units bitsandbytes would
    repack the 4-bit layers in it, or fail where they are too small for that.
    """
    folder = tmp_path / "model"
    folder.mkdir()
    tiny.save(folder, hidden_size=hidden_size)
    quantization = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    trainer = harness.trainer(
        BY_ID["fdpo"],
        str(folder),
        tmp_path / "out",
        peft_config=LoraConfig(r=2),
        quantization_config=quantization,
        eval_dataset=tiny.dataset(8),
        model_init_kwargs={"dtype": "float32"},
    )
    inputs = {name: value for name, value in harness.batch(trainer).items() if name in ("input_ids", "attention_mask")}

    def logits():
        trainer.model.train()
        with torch.no_grad():
            return trainer.model(**inputs).logits

    before = logits()
    trainer.evaluate()
    assert torch.equal(before, logits())
