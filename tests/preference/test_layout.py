"""Packed rows in the trainers: on by default, with the logs of padded rows; elsewhere refused or off, with a reason."""

import logging

import harness
import pytest
import tiny
import torch
from methods import BY_ID, PRIMARY
from peft import LoraConfig, PromptTuningConfig

from trl_ext import SimPERConfig
from trl_ext.preference import layout as module


FDPO, TDPO, MALLOWS, D2PO = (BY_ID[name] for name in ("fdpo", "tdpo", "mallows", "d2po"))


@pytest.fixture
def layouts(monkeypatch) -> list[bool]:
    """Whether each scored batch was packed, in order."""
    seen, score = [], module.score_tokens

    def counted(model, inputs, request=None, output_router_logits=False, rows=None):
        seen.append(rows is not None)
        return score(model, inputs, request, output_router_logits, rows=rows)

    monkeypatch.setattr(module, "score_tokens", counted)
    return seen


def first_step(trainer) -> dict:
    trainer.train()
    return {key: value for key, value in harness.logs(trainer)[0].items() if key != "grad_norm"}


def both(method, folder, tmp_path, **options):
    return [
        harness.trainer(method, folder, tmp_path / str(shared), share_prompts=shared, max_steps=3, **options)
        for shared in (None, False)
    ]


@pytest.mark.parametrize("method", [*PRIMARY, D2PO], ids=lambda method: method.id)
def test_logs_are_those_of_padded_rows(method, tiny_folder, tmp_path, layouts):
    """
    Every number of the first step is equal to the bit, those of later steps to what rounding of gradients allows; so
    is an evaluation.
    """
    pairs = {} if method.online else {"eval_dataset": tiny.dataset(6, seed=3)}
    packed, padded = both(method, tiny_folder, tmp_path, **pairs)
    first = first_step(packed)
    models = 1 if method.id == "simper" else 2  # each compared once, on the first batch
    assert layouts.count(False) == models and layouts.count(True) >= 4 * models
    layouts.clear()
    expected = first_step(padded)
    assert not any(layouts)
    assert first == expected
    harness.assert_same_logs(harness.logs(packed), harness.logs(padded), rtol=2e-4, atol=2e-5)
    if pairs:
        results = [trainer.evaluate() for trainer in (packed, padded)]
        for key in ("eval_loss", "eval_rewards/margins", "eval_num_tokens"):
            assert results[0][key] == pytest.approx(results[1][key], rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("mode", ["keep_start", "keep_end"])
def test_truncation_and_token_counts(mode, tiny_folder, tmp_path, layouts):
    packed, padded = both(FDPO, tiny_folder, tmp_path, max_length=18, truncation_mode=mode)
    assert first_step(packed) == first_step(padded)
    assert harness.column(packed, "num_tokens") == harness.column(padded, "num_tokens")
    assert any(layouts)


@pytest.mark.parametrize("adapter", ["lora", "qlora", "checkpointing", "reentrant"])
def test_ways_to_train(adapter, tiny_folder, tmp_path, layouts):
    options = {"peft_config": LoraConfig(target_modules="all-linear", r=4)}
    if adapter == "qlora":
        from transformers import BitsAndBytesConfig

        options["quantization_config"] = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    elif adapter != "lora":
        options = {"gradient_checkpointing_kwargs": {"use_reentrant": adapter == "reentrant"}}
        options |= {"gradient_checkpointing": True}
    packed, padded = both(TDPO, tiny_folder, tmp_path, **options)
    assert first_step(packed) == first_step(padded)
    assert any(layouts)


def test_mixture_of_experts(tiny_folder, tmp_path, layouts):
    """The auxiliary loss is that of two prompts a pair, in the log and in the loss."""
    from transformers import MixtralConfig, MixtralForCausalLM

    size = dict(hidden_size=16, intermediate_size=16, num_attention_heads=2, num_key_value_heads=2)
    config = MixtralConfig(vocab_size=384, num_hidden_layers=2, num_local_experts=4, output_router_logits=True, **size)
    torch.manual_seed(0)
    model = MixtralForCausalLM(config)
    model.save_pretrained(tmp_path / "experts")
    tiny.tokenizer().save_pretrained(tmp_path / "experts")
    packed, padded = both(FDPO, str(tmp_path / "experts"), tmp_path, router_aux_loss_coef=0.5)
    first, expected = first_step(packed), first_step(padded)
    assert any(layouts) and expected["aux_loss"] > 0
    for key, value in expected.items():
        assert first[key] == pytest.approx(value, rel=1e-6), key


def test_dropout(tiny_folder, tmp_path, layouts):
    """
    Dropout draws for the row's tokens: repeated to the bit, another draw than on padded rows, and no dropout in the
    comparison of the first batch.
    """
    options = dict(peft_config=LoraConfig(target_modules="all-linear", r=4, lora_dropout=0.5), disable_dropout=False)
    packed, padded = both(TDPO, tiny_folder, tmp_path, **options)
    packed.train(), padded.train()
    assert any(layouts)
    again = both(TDPO, tiny_folder, tmp_path / "again", **options)[0]
    again.train()
    assert harness.logs(again) == harness.logs(packed)
    assert harness.column(packed, "loss")[2] != harness.column(padded, "loss")[2]


def test_resumed_run(tiny_folder, tmp_path, layouts):
    """A resumed run compares the layouts anew, and is bit-identical to one that was never stopped."""
    whole = harness.trainer(FDPO, tiny_folder, tmp_path / "whole", share_prompts=True, max_steps=4)
    whole.train()
    stopped = harness.trainer(
        FDPO, tiny_folder, tmp_path / "stopped", share_prompts=True, max_steps=4, callbacks=[harness.StopAt(2)]
    )
    stopped.train()
    resumed = harness.trainer(FDPO, tiny_folder, tmp_path / "stopped", share_prompts=True, max_steps=4)
    layouts.clear()
    resumed.train(resume_from_checkpoint=True)
    assert layouts.count(True) == 2 + 2 * 2 and layouts.count(False) == 2
    assert harness.logs(resumed)[2:4] == harness.logs(whole)[2:4]
    assert harness.largest_difference(harness.weights(resumed.model), harness.weights(whole.model)) == 0


def test_reference_cache(tiny_folder, tmp_path, layouts):
    """The reference's statistics are computed on packed rows too, and to the bit the same."""
    options = dict(precompute_ref_log_probs=True)
    columns = []
    for shared in (None, False):
        options["reference_cache_dir"] = str(tmp_path / f"cache {shared}")
        trainer = harness.trainer(MALLOWS, tiny_folder, tmp_path / str(shared), share_prompts=shared, **options)
        data = trainer.train_dataset
        columns.append([data[name] for name in data.column_names if name.startswith("ref_")])
        assert any(layouts) == (shared is None)
        layouts.clear()
    assert list(map(list, columns[0])) == list(map(list, columns[1])) and columns[0]


def test_predictions_are_those_of_padded_rows(tiny_folder, tmp_path):
    """`predict` returns logits, which a forward of its own computes on padded rows; the scores are packed."""
    results = [t.predict(tiny.dataset(6, seed=5)) for t in both(FDPO, tiny_folder, tmp_path)]
    for one, other in zip(*(result.predictions for result in results), strict=True):
        assert (one == other).all()
    assert results[0].metrics["test_loss"] == results[1].metrics["test_loss"]


# ---- Off, and refused -----------------------------------------------------------------------------------------------


def vision(tmp_path):
    return {"folder": tiny.save_vision(tmp_path / "model"), "train_dataset": tiny.vision_dataset()}


CANNOT = {
    "torch_compile": lambda path: {"torch_compile": True, "torch_compile_backend": "eager"},
    "learns a prompt": lambda path: {
        "peft_config": PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2),
        "gradient_checkpointing": False,
    },
    "images": vision,
}


@pytest.mark.parametrize("reason", CANNOT)
def test_where_it_cannot_be(reason, tiny_folder, tmp_path, caplog, layouts):
    options = CANNOT[reason](tmp_path)
    folder = options.pop("folder", tiny_folder)
    with pytest.raises(ValueError, match=f"`share_prompts=True`.*{reason}"):
        harness.trainer(FDPO, folder, tmp_path / "true", share_prompts=True, **options)
    with caplog.at_level(logging.WARNING, logger="trl_ext"):
        trainer = harness.trainer(FDPO, folder, tmp_path / "none", **options)
        lines = [record.getMessage() for record in caplog.records if "Prompts are not shared" in record.getMessage()]
    assert len(lines) == 1 and reason in lines[0]
    if reason != "torch_compile":  # which takes its time
        trainer.compute_loss(trainer.model, trainer._prepare_inputs(harness.batch(trainer)))
        assert layouts and not any(layouts)


def test_batches_with_further_arguments(tiny_folder, tmp_path, layouts, caplog):
    """A collator of the user's that adds an argument of the model: its batches keep TRL's layout."""
    trainer = harness.trainer(FDPO, tiny_folder, tmp_path)
    inputs = trainer._prepare_inputs(harness.batch(trainer))
    further = {**inputs, "position_ids": torch.arange(inputs["input_ids"].size(1)).expand_as(inputs["input_ids"])}
    with caplog.at_level(logging.WARNING, logger="trl_ext"):
        trainer.compute_loss(trainer.model, further)
    assert not any(layouts) and "position_ids" in caplog.text
    explicit = harness.trainer(FDPO, tiny_folder, tmp_path, share_prompts=True)
    with pytest.raises(ValueError, match="share_prompts=True.*position_ids"):
        explicit.compute_loss(explicit.model, further)


def test_an_explicit_wish_is_an_error_where_the_first_batch_differs(tiny_folder, tmp_path, monkeypatch):
    monkeypatch.setattr("trl_ext.training.shared_prompt._LIMIT", -1.0)
    with pytest.raises(ValueError, match="share_prompts=True.*nats a token"):
        harness.trainer(FDPO, tiny_folder, tmp_path, share_prompts=True).train()
    harness.trainer(FDPO, tiny_folder, tmp_path, max_steps=1).train()


def test_padding_free_is_its_other_name(tmp_path):
    options = dict(output_dir=str(tmp_path), use_cpu=True, bf16=False)
    config = SimPERConfig(padding_free=True, **options)
    assert config.share_prompts is True and not config.padding_free
    with pytest.raises(ValueError, match="`padding_free=True` contradicts `share_prompts=False`"):
        SimPERConfig(padding_free=True, share_prompts=False, **options)
    assert SimPERConfig(**options).share_prompts is None


def test_attention_by_segments(tiny_folder, tmp_path, monkeypatch):
    """On request only, to 1e-5; refused for a router, which rounding can flip, and without shared prompts."""
    from transformers import MixtralConfig, MixtralForCausalLM

    from trl_ext.training import shared_prompt

    calls, attend = [], shared_prompt._attend_by_segments
    monkeypatch.setattr(shared_prompt, "_SEGMENTS_PAY", 1e3)
    monkeypatch.setattr(shared_prompt, "_attend_by_segments", lambda *args: calls.append(1) or attend(*args))
    results = []
    for by_segments in (True, False):
        trainer = harness.trainer(FDPO, tiny_folder, tmp_path, max_steps=1, attention_by_segments=by_segments)
        results.append(first_step(trainer))
        assert bool(calls) == by_segments
        calls.clear()
    assert results[0] == pytest.approx(results[1], rel=1e-4, abs=1e-5) and results[0] != results[1]
    trainer.args.attention_by_segments = True
    size = dict(hidden_size=8, intermediate_size=8, num_attention_heads=2, num_key_value_heads=2)
    experts = MixtralForCausalLM(MixtralConfig(vocab_size=16, num_hidden_layers=1, num_local_experts=2, **size))
    with pytest.raises(ValueError, match="attention_by_segments=True.*mixture of experts"):
        module.Layout(trainer.args, experts, trainer.accelerator)
    with pytest.raises(ValueError, match="attention_by_segments=True.*share_prompts=False"):
        harness.config(FDPO, tmp_path, attention_by_segments=True, share_prompts=False)
