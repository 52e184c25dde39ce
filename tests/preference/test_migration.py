"""What scripts for `trl.DPOTrainer` do, and what must not go wrong silently when two names are changed in them."""

import copy
import logging

import harness
import pytest
import tiny
import torch
from datasets import Dataset
from methods import METHODS, ONLINE, PRIMARY
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    Qwen2Config,
    Qwen2ForSequenceClassification,
    Qwen2Model,
    T5Config,
    T5ForConditionalGeneration,
    TrainerCallback,
)

from trl_ext import FDPOTrainer, SimPERTrainer, TDPOTrainer


FDPO = next(method for method in METHODS if method.id == "fdpo")
WITH_REFERENCE = [method for method in PRIMARY if method.needs_reference]
PRECOMPUTES = [method for method in WITH_REFERENCE if method.id != "tdpo"]


def warnings_of(caplog) -> str:
    return "\n".join(record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING)


@pytest.fixture(scope="module")
def adapter(tiny_folder, tmp_path_factory) -> str:
    """A LoRA of the tiny model on disk, with weights that do something."""
    folder = tmp_path_factory.mktemp("adapter")
    torch.manual_seed(0)
    model = get_peft_model(harness.load(tiny_folder), LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)
    return str(folder)


# ---- Nothing to train -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", PRIMARY + ONLINE, ids=lambda method: method.id)
def test_a_frozen_adapter_is_not_trained_in_name_only(method, tiny_folder, adapter, tmp_path):
    """`is_trainable=True` forgotten: an error that says so, also after an evaluation, and before labels are bought."""
    model = PeftModel.from_pretrained(harness.load(tiny_folder), adapter)
    trainer = harness.trainer(method, model, tmp_path, eval_dataset=tiny.dataset(4, seed=1))
    trainer.evaluate()
    before = harness.weights(model)
    with pytest.raises(ValueError, match="is_trainable=True"):
        trainer.train()
    assert harness.largest_difference(before, harness.weights(model)) == 0
    assert not (tmp_path / "gold_labels.jsonl").exists()  # D2PO: nothing was bought


def test_a_frozen_model_is_not_trained_in_name_only(tiny_folder, tmp_path):
    model = harness.load(tiny_folder).requires_grad_(False)
    with pytest.raises(ValueError, match="no parameter that requires a gradient"):
        harness.trainer(FDPO, model, tmp_path).train()


@pytest.mark.parametrize("method", WITH_REFERENCE, ids=lambda method: method.id)
def test_the_reference_pass_changes_no_flags(method, tiny_folder, adapter, tmp_path):
    """What was frozen stays frozen, and what was trained is trained, however often the reference is asked."""
    model = PeftModel.from_pretrained(harness.load(tiny_folder), adapter, is_trainable=True)
    frozen = next(name for name, p in model.named_parameters() if "lora_A" in name)
    model.get_parameter(frozen).requires_grad_(False)
    trainer = harness.trainer(method, model, tmp_path, max_steps=2)
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    before = harness.weights(model)
    trainer.train()
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags
    assert torch.equal(before[frozen], model.get_parameter(frozen))
    assert harness.largest_difference(before, harness.weights(model)) > 0


# ---- Data that another trainer has prepared -------------------------------------------------------------------------


@pytest.mark.parametrize("method", PRECOMPUTES, ids=lambda method: method.id)
def test_statistics_of_another_reference_are_not_used(method, tiny_folder, tmp_path, caplog):
    """Iterative training on the dataset that the last trainer prepared: the new reference's numbers, and a warning."""
    first = harness.trainer(method, tiny_folder, tmp_path / "a", precompute_ref_log_probs=True)
    tiny.model(seed=7).save_pretrained(tmp_path / "other")
    tiny.tokenizer().save_pretrained(tmp_path / "other")
    options = dict(precompute_ref_log_probs=True, max_steps=1)
    with caplog.at_level(logging.WARNING):
        second = harness.trainer(
            method, str(tmp_path / "other"), tmp_path / "b", train_dataset=first.train_dataset, **options
        )
    assert "ref_chosen_logps" in warnings_of(caplog)
    fresh = harness.trainer(method, str(tmp_path / "other"), tmp_path / "c", **options)
    for column in ("ref_chosen_logps", "ref_rejected_logps"):
        found, expected, old = (list(each.train_dataset[column]) for each in (second, fresh, first))
        assert found == pytest.approx(expected) and found != pytest.approx(old)


def test_tokens_beside_their_text_are_made_again(tiny_folder, tmp_path):
    """
    A dataset prepared under another chat template: the text is what counts. Without text, tokens are taken as they
    are.
    """
    rows = tiny.dataset(8, conversational=True)
    plain = harness.trainer(FDPO, tiny_folder, tmp_path / "a", train_dataset=rows).train_dataset
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = tokenizer.chat_template.replace("<|end|>", "<|end|>\n")
    again = harness.trainer(
        FDPO, tiny_folder, tmp_path / "b", train_dataset=plain, processing_class=tokenizer
    ).train_dataset
    fresh = harness.trainer(
        FDPO, tiny_folder, tmp_path / "c", train_dataset=rows, processing_class=tokenizer
    ).train_dataset
    assert again["prompt_ids"] == fresh["prompt_ids"] != plain["prompt_ids"]
    ids = plain.select_columns(["prompt_ids", "chosen_ids", "rejected_ids"])
    kept = harness.trainer(FDPO, tiny_folder, tmp_path / "d", train_dataset=ids, processing_class=tokenizer)
    assert kept.train_dataset["prompt_ids"] == plain["prompt_ids"]


def test_what_the_trainer_has_prepared_is_taken_as_it_is(tiny_folder, tmp_path, monkeypatch):
    options = dict(eval_dataset=tiny.dataset(4, seed=1), precompute_ref_log_probs=True)
    trainer = harness.trainer(FDPO, tiny_folder, tmp_path, **options)
    expected = trainer.evaluate()
    monkeypatch.setattr("trl_ext.preference.preference_trainer.add_reference_statistics", None)
    monkeypatch.setattr("trl.DPOTrainer._prepare_dataset", None)
    found = trainer.evaluate(trainer.eval_dataset)
    assert found["eval_loss"] == expected["eval_loss"]


# ---- Options that change in training --------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["trainer", "args"])
@pytest.mark.parametrize("method", WITH_REFERENCE, ids=lambda method: method.id)
def test_beta_can_be_scheduled(method, where, tiny_folder, tmp_path):
    """A callback that sets beta: rewards are those of the new beta, as in a run that always had it."""

    class Schedule(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 1:
                (trainer if where == "trainer" else args).beta = 3.0

    options = dict(max_steps=2, learning_rate=0.0)
    reference = tiny.model(seed=9)  # so that log ratios are not 0
    trainer = harness.trainer(
        method, tiny_folder, tmp_path / "a", ref_model=reference, callbacks=[Schedule()], **options
    )
    trainer.train()
    constant = harness.trainer(
        method, tiny_folder, tmp_path / "b", ref_model=copy.deepcopy(reference), **{**options, "beta": 3.0}
    )
    constant.train()
    margins, expected = harness.column(trainer, "rewards/margins"), harness.column(constant, "rewards/margins")
    assert margins[0] != pytest.approx(expected[0]) and margins[1] == pytest.approx(expected[1])
    assert harness.column(trainer, "loss")[1] == pytest.approx(harness.column(constant, "loss")[1])


def test_a_beta_that_a_method_has_not_is_refused(tiny_folder, tmp_path):
    simper = next(method for method in METHODS if method.id == "simper")
    trainer = harness.trainer(simper, tiny_folder, tmp_path)
    with pytest.raises(AttributeError, match="SimPER has none"):
        trainer.beta = 1.0


@pytest.mark.parametrize("name", ["_compute_loss", "compute_ref_log_probs"])
def test_overrides_that_nobody_calls_are_refused(name):
    with pytest.raises(TypeError, match=f"Mine.{name}` would never be called"):
        type("Mine", (FDPOTrainer,), {name: lambda self: None})


# ---- References -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", WITH_REFERENCE, ids=lambda method: method.id)
def test_a_reference_with_an_adapter(method, tiny_folder, adapter, tmp_path):
    """It is the merged model."""

    def first_loss(folder, ref_model, **options):
        trainer = harness.trainer(method, tiny_folder, folder, ref_model=ref_model, max_steps=1, **options)
        trainer.train()
        return harness.column(trainer, "loss")[0]

    wrapped = PeftModel.from_pretrained(harness.load(tiny_folder), adapter)
    merged = copy.deepcopy(wrapped).merge_and_unload()
    expected = first_loss(tmp_path / "merged", merged)
    assert first_loss(tmp_path / "wrapped", wrapped) == pytest.approx(expected, rel=1e-5)
    if method in PRECOMPUTES:
        options = dict(precompute_ref_log_probs=True)
        wrapped = PeftModel.from_pretrained(harness.load(tiny_folder), adapter)
        assert first_loss(tmp_path / "cached", wrapped, **options) == pytest.approx(expected, rel=1e-5)
        # The scale of an adapter is in its configuration and in no weight.
        scaled = PeftModel.from_pretrained(harness.load(tiny_folder), adapter)
        for module in scaled.modules():
            if isinstance(getattr(module, "scaling", None), dict):
                module.scaling["default"] *= 4
        scaled.peft_config["default"].lora_alpha *= 4
        assert first_loss(tmp_path / "scaled", scaled, **options) != pytest.approx(expected, rel=1e-5)


def test_a_changed_model_is_its_own_reference(tiny_folder, tmp_path, caplog):
    """
    Trained before, in the same script: the reference is the model as it is now, not its file, and somebody says so.
    """
    model = harness.load(tiny_folder)
    with caplog.at_level(logging.WARNING):
        harness.trainer(FDPO, model, tmp_path / "a")
    assert "has changed since it was loaded" not in warnings_of(caplog)
    with torch.no_grad():
        model.model.norm.weight += 0.1
    with caplog.at_level(logging.WARNING):
        trainer = harness.trainer(FDPO, model, tmp_path / "b")
    assert "`model.norm.weight` differs" in warnings_of(caplog) and "`ref_model`" in warnings_of(caplog)
    reference = dict(trainer.ref_model.named_parameters())
    assert all(torch.equal(parameter, reference[name]) for name, parameter in model.named_parameters())
    assert all(reference[name] is not parameter for name, parameter in model.named_parameters())
    model = harness.load(tiny_folder)
    model.resize_token_embeddings(400)
    with pytest.raises(ValueError, match="deepcopy"):
        harness.trainer(FDPO, model, tmp_path / "c")


# ---- Evaluation -----------------------------------------------------------------------------------------------------


def test_every_evaluation_set_has_its_own_metrics(tiny_folder, tmp_path):
    """Names, values and `metric_for_best_model`, which reads them; and a prefix of one's own."""
    sets = {"a": tiny.dataset(4, seed=1), "b": tiny.dataset(8, seed=2)}
    options = dict(eval_strategy="steps", eval_steps=1, save_strategy="steps", save_steps=1, max_steps=2)
    options |= dict(
        load_best_model_at_end=True, metric_for_best_model="eval_a_rewards/margins", greater_is_better=True
    )
    trainer = harness.trainer(FDPO, tiny_folder, tmp_path / "both", eval_dataset=sets, **options)
    trainer.train()
    found = trainer.evaluate()
    assert trainer.state.best_metric is not None
    for name, dataset in sets.items():
        alone = trainer.evaluate(dataset, metric_key_prefix="foo")
        for key in ("loss", "rewards/margins", "ranking_accuracy/policy", "logps/chosen"):
            assert found[f"eval_{name}_{key}"] == pytest.approx(alone[f"foo_{key}"], rel=1e-5)
    assert not [key for key in found if key.startswith("eval_rewards")]
    assert found["eval_a_rewards/margins"] != found["eval_b_rewards/margins"]


# ---- Inputs with an error of their own ------------------------------------------------------------------------------


def whole_dialogues() -> Dataset:
    """As `trl-lib/ultrafeedback_binarized` once was: the prompt as text, and once more in both dialogues."""
    rows = []
    for row in tiny.rows(4):
        asked = {"role": "user", "content": row["prompt"]}
        sides = {side: [asked, {"role": "assistant", "content": row[side]}] for side in ("chosen", "rejected")}
        rows.append({"prompt": row["prompt"], **sides})
    return Dataset.from_list(rows)


def test_whole_dialogues_beside_their_prompt(tiny_folder, tmp_path):
    with pytest.raises(ValueError, match=r'remove_columns\("prompt"\)'):
        harness.trainer(FDPO, tiny_folder, tmp_path, train_dataset=whole_dialogues())
    trainer = harness.trainer(FDPO, tiny_folder, tmp_path, train_dataset=whole_dialogues().remove_columns("prompt"))
    assert len(trainer.train_dataset) == 4


def test_a_missing_prompt_is_named(tiny_folder, tmp_path):
    rows = [*tiny.rows(3), {**tiny.rows(1)[0], "prompt": None}]
    with pytest.raises(ValueError, match="Row 3 of the train dataset has `prompt=None`"):
        harness.trainer(FDPO, tiny_folder, tmp_path, train_dataset=Dataset.from_list(rows))


def test_a_tokenizer_without_end(tiny_folder, tmp_path):
    tokenizer = tiny.tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="no end-of-sequence token"):
        harness.trainer(FDPO, tiny_folder, tmp_path, processing_class=tokenizer)


def test_evaluation_sets_in_a_list(tiny_folder, tmp_path):
    with pytest.raises(TypeError, match="as a dictionary"):
        harness.trainer(FDPO, tiny_folder, tmp_path, eval_dataset=[tiny.dataset(4)])


def test_models_that_are_no_causal_language_models(tiny_folder, tmp_path):
    sizes = dict(vocab_size=384, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    config = Qwen2Config(**sizes, num_key_value_heads=1)
    t5 = T5ForConditionalGeneration(T5Config(vocab_size=384, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2))
    for model, message in (
        (t5, "encoder-decoder"),
        (Qwen2ForSequenceClassification(config), "no language-modeling head"),
        (Qwen2Model(config), "no language-modeling head"),
    ):
        with pytest.raises(ValueError, match=message):
            harness.trainer(FDPO, model, tmp_path, processing_class=tiny.tokenizer())


def test_references_that_cannot_be_used(tiny_folder, tmp_path):
    with pytest.raises(TypeError, match="is a name"):
        harness.trainer(FDPO, tiny_folder, tmp_path, ref_model=tiny_folder)


@pytest.mark.parametrize("trainer", [FDPOTrainer, TDPOTrainer, SimPERTrainer])
def test_adapters_under_other_names(trainer, tiny_folder, adapter, tmp_path):
    method = next(method for method in METHODS if method.trainer is trainer)
    model = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(tiny_folder), adapter, adapter_name="mine", is_trainable=True
    )
    with pytest.raises(ValueError, match="'mine'.*called 'default'"):
        harness.trainer(method, model, tmp_path)


def test_one_model_for_one_trainer_after_another(tiny_folder, adapter, tmp_path):
    """The frozen copy of the first trainer is not taken for the second's."""
    model = PeftModel.from_pretrained(harness.load(tiny_folder), adapter, is_trainable=True)
    harness.trainer(FDPO, model, tmp_path / "a").train()
    with pytest.raises(ValueError, match=r"delete_adapter\('ref'\)"):
        harness.trainer(FDPO, model, tmp_path / "b")
    model.delete_adapter("ref")
    trainer = harness.trainer(FDPO, model, tmp_path / "c", max_steps=1)
    trainer.train()
    assert harness.column(trainer, "rewards/margins") == [pytest.approx(0.0, abs=1e-6)]


# ---- Images ---------------------------------------------------------------------------------------------------------


def test_empty_responses_beside_images(tmp_path):
    """Left out where asked, streamed or not; otherwise named."""
    folder = tiny.save_vision(tmp_path / "model")
    dataset = tiny.vision_dataset(6)
    empty = [{"role": "assistant", "content": ""}]
    chosen = [empty if i == 2 else row for i, row in enumerate(dataset["chosen"])]
    dataset = dataset.remove_columns("chosen").add_column("chosen", chosen)
    with pytest.raises(ValueError, match="Row 2 of the train dataset has an empty `chosen`"):
        harness.trainer(FDPO, folder, tmp_path / "a", train_dataset=dataset)
    trainer = harness.trainer(FDPO, folder, tmp_path / "b", train_dataset=dataset, drop_empty_completions=True)
    assert len(trainer.train_dataset) == 5
    stream = dataset.to_iterable_dataset()
    trainer = harness.trainer(FDPO, folder, tmp_path / "c", train_dataset=stream, drop_empty_completions=True)
    assert len(list(trainer.train_dataset)) == 5
    trainer = harness.trainer(FDPO, folder, tmp_path / "d", train_dataset=stream)
    with pytest.raises(ValueError, match="Row 2"):
        list(trainer.train_dataset)
    with pytest.raises(ValueError, match="images and no column `prompt`"):
        harness.trainer(FDPO, folder, tmp_path / "e", train_dataset=dataset.remove_columns("prompt"))
