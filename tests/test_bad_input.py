"""
Bad input gets an error before the first step that names the argument, the value it had and what to do; suspicious data
gets one warning; a run that goes wrong stops and leaves the last good checkpoint alone.
"""

import dataclasses
import logging
import re

import harness
import pytest
import tiny
import torch
from datasets import Dataset, DatasetDict, IterableDataset
from methods import BY_ID, METHODS, ONLINE, PRIMARY, WITH_REFERENCE
from peft import LoraConfig
from safetensors.torch import load_file
from transformers import TrainerCallback
from trl import DPOConfig

import trl_ext
from trl_ext import FDPOConfig, FDPOTrainer, PreferenceConfig, SimPERConfig
from trl_ext.losses import Divergence, get_divergence
from trl_ext.preference import rows as rows_module


CONFIGS = {PreferenceConfig} | {method.config for method in METHODS}
CONFIGS |= {method.config for method in ONLINE}
CONFIGS = sorted(CONFIGS, key=lambda config: config.__name__)
with_beta = pytest.mark.parametrize("config", [c for c in CONFIGS if c is not SimPERConfig])
# Where `beta=None` is the default of the method whose loss it is.
BETA_MAY_BE_NONE = {method.config for method in ONLINE}
every_trainer = pytest.mark.parametrize("method", PRIMARY, ids=lambda method: method.id)


def make(config, **options):
    return config(output_dir="unused", use_cpu=True, bf16=False, **options)


# ---- Options --------------------------------------------------------------------------------------------------------


@with_beta
@pytest.mark.parametrize("beta", [0, 0.0, -0.1, float("nan"), float("inf"), "0.1", None, True], ids=repr)
def test_beta(config, beta):
    """beta must be a positive finite number."""
    if beta is None and config in BETA_MAY_BE_NONE:
        pytest.skip("the default of the loss's method")
    default = re.escape(repr(next(f.default for f in dataclasses.fields(config) if f.name == "beta")))
    with pytest.raises(
        ValueError, match=rf"`beta` must be a positive, finite number.*, got {re.escape(repr(beta))}.*{default}"
    ):
        make(config, beta=beta)


def refusals():
    """(configuration, option) for every option that it refuses, its own and those it inherits."""
    for config in CONFIGS:
        refused = {}
        for cls in reversed(config.__mro__):
            refused.update(vars(cls).get("_refused_options", {}))
            for option in vars(cls).get("_honored_options", ()):
                refused.pop(option, None)
        yield from ((config, option) for option in refused)


# One value other than the default of every option that some method refuses.
OTHER_VALUES = {
    "average_tokens_across_devices": False,
    "label_smoothing_factor": 0.1,
    "logging_nan_inf_filter": False,
    "length_column_name": "tokens",
    "label_names": ["labels"],
    "loss_type": ["hinge"],
    "loss_weights": [0.5],
    "ld_alpha": 0.5,
    "use_weighting": True,
    "label_smoothing": 0.1,
    "discopop_tau": 0.1,
    "f_divergence_type": "js_divergence",
    "f_alpha_divergence_coef": 0.25,
    "beta": 0.2,
    "precompute_ref_log_probs": True,
    "precompute_ref_batch_size": 2,
    "reference_cache_dir": "cache",
    "log_token_kl": True,
    "drop_empty_completions": True,
    "truncation_mode": "keep_end",
    "auto_find_batch_size": True,
    "ignore_data_skip": True,
    "sync_ref_model": True,
    "ref_model_mixup_alpha": 0.25,
    "ref_model_sync_steps": 7,
}


@pytest.mark.parametrize("config, option", list(refusals()))
def test_refused_options(config, option):
    """An inherited option that the method cannot honor is refused by name, value and reason, never ignored."""
    value = OTHER_VALUES[option]
    default = {f.name: f for f in dataclasses.fields(config)}[option]
    shown = re.escape(f"`{option}={value!r}` is not supported by `{config.__name__}`: ")
    with pytest.raises(ValueError, match=rf"{shown}.+Leave `{option}` at its default"):
        make(config, **{option: value})
    if default.default is not dataclasses.MISSING:
        make(config, **{option: default.default})  # the default itself is no offense


def test_layers_for_an_optimizer_that_projects_none():
    """Transformers reads `optim_target_modules` for GaLore and APOLLO alone, and says nothing elsewhere."""
    with pytest.raises(ValueError, match=r"`optim_target_modules='all-linear'` has no effect with `optim='.*GaLore"):
        make(FDPOConfig, optim_target_modules="all-linear")
    make(FDPOConfig, optim_target_modules="all-linear", optim="galore_adamw")


def test_loss_type_in_either_form():
    """TRL's default loss may be spelt out, as string or list; anything else is refused in both forms."""
    for same in ("sigmoid", ["sigmoid"]):
        make(FDPOConfig, loss_type=same)
    for other in ("ipo", ["ipo"], ["sigmoid", "sft"]):
        with pytest.raises(ValueError, match="`loss_type=.*` is not supported by `FDPOConfig`.*trl.DPOTrainer"):
            make(FDPOConfig, loss_type=other)


@with_beta
@pytest.mark.parametrize(
    "option, value, needed",
    [
        ("ref_model_mixup_alpha", 0.3, "sync_ref_model"),
        ("ref_model_sync_steps", 10, "sync_ref_model"),
        ("precompute_ref_batch_size", 2, "precompute_ref_log_probs"),
        ("reference_cache_dir", "cache", "precompute_ref_log_probs"),
    ],
)
def test_dependent_options(config, option, value, needed):
    """An option that means nothing without another is refused without it and taken with it."""
    if option in config._refused_options:
        pytest.skip("refused with its own reason")
    with pytest.raises(
        ValueError, match=rf"`{option}={value!r}` has no effect unless `{needed}=True`. Set `{needed}=True`"
    ):
        make(config, **{option: value})
    make(config, **{option: value, needed: True})


# ---- f-DPO ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, message",
    [
        ({"divergence": "revers_kl"}, "Unknown divergence 'revers_kl'. Known ones: reverse_kl, forward_kl"),
        ({"divergence": "pearson"}, "'pearson' cannot be used in f-DPO.*chi_po"),
        ({"divergence": "total_variation"}, "'total_variation' cannot be used in f-DPO.*-inf"),
        ({"divergence": "alpha_divergence"}, "TRL's alpha is 1 minus.*trl_alpha"),
        ({"divergence": "js", "alpha": 0.5}, "'js' does not take alpha=0.5; it takes no parameters"),
        ({"alpha": 0.3}, "'reverse_kl' does not take alpha=0.3; it takes no parameters"),
        ({"divergence": "alpha", "skew": 0.5}, "'alpha' does not take skew=0.5; it takes: alpha"),
        ({"divergence": "skew_js", "gamma": 1.0}, "'skew_js' does not take gamma=1.0; it takes: skew"),
        ({"divergence": "skew_js", "skew": 1.5}, "skew.*1.5"),
        ({"divergence": "chi_po", "gamma": -1.0}, "gamma must be greater than 0, got -1.0"),
        ({"divergence": "alpha", "alpha": float("nan")}, "`alpha` must be a .*number.*, got nan"),
        ({"divergence": "alpha", "alpha": "0.5"}, "`alpha` must be a .*number.*, got '0.5'"),
        ({"max_log_weight": 0.0}, "`max_log_weight` must be a positive, finite number or None.*got 0.0.*20.0"),
        ({"max_log_weight": float("inf")}, "`max_log_weight` must be a positive, finite number or None.*got inf"),
        ({"f_divergence_type": "kl"}, "`f_divergence_type='kl'` is not one of TRL's: 'reverse_kl', 'forward_kl'"),
        (
            {"divergence": "js", "f_divergence_type": "forward_kl"},
            "Both `divergence='js'` and TRL's `f_divergence_type='forward_kl'`.*Use one",
        ),
        (
            {"f_divergence_type": "alpha_divergence", "alpha": 0.3},
            "`alpha=0.3`.*cannot be combined with TRL's.*`divergence='alpha', alpha=0.3`",
        ),
        (
            {"f_alpha_divergence_coef": 0.25},
            "`f_alpha_divergence_coef=0.25` is TRL's.*has no effect unless.*`divergence='alpha', alpha=0.75`",
        ),
    ],
    ids=lambda value: str(value)[:40],
)
def test_divergence_options(options, message):
    """Unknown and inadmissible divergences, foreign or misplaced parameters, mixed conventions."""
    with pytest.raises(ValueError, match=message):
        make(FDPOConfig, **options)


@pytest.mark.parametrize("options", [{"divergence": "forward_kl"}, {"divergence": "alpha", "alpha": 0.5}], ids=str)
def test_fp16_with_exponential_weights(options):
    """fp16 is refused for divergences whose weights exponentiate, and left to those whose weights are bounded."""
    message = rf"`fp16=True` is not supported with the divergence '{options['divergence']}'.*Use `bf16=True`, or"
    with pytest.raises(ValueError, match=message):
        make(FDPOConfig, fp16=True, **options)


class Pearson(Divergence):
    name = "pearson_of_mine"

    def score(self, logratio):
        return 2 * torch.expm1(logratio)

    def log_weight(self, logratio):
        return logratio + torch.log(torch.tensor(2.0))


def test_divergence_instances(tiny_folder, tmp_path):
    """A divergence of one's own must be an instance, admissible, and the only one given."""
    method = BY_ID["fdpo"]

    def build(instance, **options):
        args = harness.config(method, tmp_path, **options)
        return FDPOTrainer(tiny_folder, args=args, train_dataset=tiny.dataset(8), divergence=instance)

    for wrong in ("js", Divergence, 3):
        with pytest.raises(
            TypeError, match=r"`divergence` must be an instance of `trl_ext.losses.Divergence`, got .*"
        ):
            build(wrong)
    with pytest.raises(ValueError, match="Pearson.* is not admissible.*Add"):
        build(Pearson())
    with pytest.raises(ValueError, match="divergence was given to the trainer.*another in `args`.*'js'.*Give one"):
        build(get_divergence("js"), divergence="js")
    with pytest.raises(ValueError, match="`fp16=True`.*'forward_kl'"):
        FDPOTrainer(
            tiny_folder,
            args=make(FDPOConfig, fp16=True),
            train_dataset=tiny.dataset(8),
            divergence=get_divergence("forward_kl"),
        )


# ---- Trainer arguments ----------------------------------------------------------------------------------------------


@every_trainer
def test_wrong_configuration_class(method, tiny_folder, tmp_path):
    """TRL's configuration, or another method's, is refused with the one to use."""
    for other in (DPOConfig, PreferenceConfig):
        wanted = method.config.__name__
        message = f"`args` of `{method.trainer.__name__}` must be a `{wanted}`, got a `{other.__name__}`. Replace"
        with pytest.raises(TypeError, match=message):
            method.trainer(tiny_folder, args=make(other), train_dataset=tiny.dataset(4))


def test_reference_for_a_method_without(tiny_folder, tmp_path):
    """SimPER refuses a reference model instead of loading it for nothing."""
    with pytest.raises(ValueError, match="`ref_model` was given, a `Qwen2ForCausalLM`, but SimPER uses no reference"):
        harness.trainer(BY_ID["simper"], tiny_folder, tmp_path, ref_model=harness.load(tiny_folder))


@pytest.mark.parametrize("method", WITH_REFERENCE, ids=lambda method: method.id)
@pytest.mark.parametrize("peft", [False, True], ids=["full", "lora"])
def test_reference_with_another_vocabulary(method, peft, tiny_folder, tmp_path):
    """Policy and reference must share a vocabulary; both sizes are named."""
    other = tiny.model(vocab_size=512)
    peft_config = LoraConfig(r=2) if peft else None
    with pytest.raises(ValueError, match="vocabulary of `ref_model` has 512 entries, that of the policy 384.*Use a"):
        harness.trainer(method, tiny_folder, tmp_path, ref_model=other, peft_config=peft_config)


# ---- Data -----------------------------------------------------------------------------------------------------------


def build(method, folder, tmp_path, rows, streaming=False, **options):
    data = IterableDataset.from_generator(lambda: iter(rows)) if streaming else Dataset.from_list(rows)
    return harness.trainer(method, folder, tmp_path, train_dataset=data, **options)


streamed = pytest.mark.parametrize("streaming", [False, True], ids=["map", "streaming"])


@every_trainer
@streamed
@pytest.mark.parametrize("missing", [["chosen"], ["rejected"], ["chosen", "rejected"]], ids="-".join)
def test_missing_columns(method, streaming, missing, tiny_folder, tmp_path):
    """A missing column is named, with those there are and how to rename one."""
    rows = [{("response" if key in missing[:1] else key): row[key] for key in row} for row in tiny.rows(4)]
    rows = [{key: value for key, value in row.items() if key not in missing} for row in rows]
    message = "train dataset has no column " + " and no column ".join(f"`{name}`" for name in missing)
    with pytest.raises(ValueError, match=rf"{message}; it has \[.*'prompt'.*rename_column"):
        build(method, tiny_folder, tmp_path, rows, streaming)


@every_trainer
def test_missing_columns_in_evaluation(method, tiny_folder, tmp_path):
    """The same for evaluation data, by the name of its split, in the constructor and in `evaluate`."""
    bad = tiny.dataset(4).rename_column("chosen", "good")
    with pytest.raises(ValueError, match="The heldout dataset has no column `chosen`"):
        harness.trainer(method, tiny_folder, tmp_path, eval_dataset={"heldout": bad})
    trainer = harness.trainer(method, tiny_folder, tmp_path)
    with pytest.raises(ValueError, match="The eval dataset has no column `chosen`"):
        trainer.evaluate(bad)
    with pytest.raises(ValueError, match="The test dataset has no column `chosen`"):
        trainer.predict(bad)


@every_trainer
def test_a_dictionary_of_splits(method, tiny_folder, tmp_path):
    """A `DatasetDict` as training data: the error names the argument and the split to give."""
    splits = DatasetDict(train=tiny.dataset(4), test=tiny.dataset(4))
    with pytest.raises(TypeError, match=r"`train_dataset`.*DatasetDict.*dataset\['train'\]"):
        harness.trainer(method, tiny_folder, tmp_path, train_dataset=splits)


@pytest.mark.parametrize("name", ["D2PO", "DiffusionDPO", "DSPO", "DPHRL", "FDPG", "WRO"])
def test_a_dictionary_of_splits_elsewhere(name, tiny_folder, tmp_path):
    """The same from trainers of images and of sampled responses."""
    trainer, config = (getattr(trl_ext, f"{name}{kind}") for kind in ("Trainer", "Config"))
    further = {"WRO": {"judge": len_judge}, "D2PO": {"gold_labeller": len_judge}}.get(name, {})
    if name in ("DPHRL", "FDPG", "WRO"):
        further["reward_funcs"] = lambda prompts, completions, **columns: [0.0] * len(prompts)
    args = config(output_dir=str(tmp_path), use_cpu=True, bf16=False, report_to=[])
    splits = DatasetDict(heldout=tiny.dataset(4))
    with pytest.raises(TypeError, match=r"`train_dataset`.*DatasetDict.*dataset\['heldout'\]"):
        trainer(model=tiny_folder, args=args, train_dataset=splits, **further)


def len_judge(prompts, completions_a, completions_b):
    return [0.5] * len(prompts)


@every_trainer
def test_empty_datasets(method, tiny_folder, tmp_path):
    """No rows: said of the training data and of each evaluation split by name, of a stream as well."""
    empty = tiny.dataset(4).select([])
    with pytest.raises(ValueError, match="The train dataset has no rows. Check the split's name"):
        harness.trainer(method, tiny_folder, tmp_path, train_dataset=empty)
    with pytest.raises(ValueError, match="The dev dataset has no rows"):
        harness.trainer(method, tiny_folder, tmp_path, eval_dataset={"dev": empty})
    with pytest.raises(ValueError, match="The train dataset has no rows"):
        build(method, tiny_folder, tmp_path, [], streaming=True)


@every_trainer
@streamed
@pytest.mark.parametrize("conversational", [False, True], ids=["plain", "conversational"])
@pytest.mark.parametrize("side", ["chosen", "rejected"])
@pytest.mark.parametrize("text", ["", "  \n\t"], ids=["empty", "whitespace"])
def test_empty_completions(method, streaming, conversational, side, text, tiny_folder, tmp_path):
    """An empty or blank response is refused with its row, its column and the remedy; a stream as it streams."""
    rows = tiny.rows(6, conversational)
    rows[3][side] = [{"role": "assistant", "content": text}] if conversational else text
    message = rf"Row 3 of the train dataset has an empty `{side}` completion.*drop_empty_completions=True"
    with pytest.raises(ValueError, match=message):
        build(method, tiny_folder, tmp_path, rows, streaming, max_steps=2).train()


@streamed
def test_empty_completions_can_be_dropped(streaming, tiny_folder, tmp_path, caplog):
    """With the remedy that the error names, the row is left out, counted, and the others are kept in order."""
    rows = tiny.rows(6)
    rows[3]["rejected"] = " "
    trainer = build(BY_ID["fdpo"], tiny_folder, tmp_path, rows, streaming, max_steps=2, drop_empty_completions=True)
    assert [row["prompt"] for row in trainer.train_dataset] == [row["prompt"] for i, row in enumerate(rows) if i != 3]
    assert streaming or "Left out 1 of the 6 pairs of the train dataset" in caplog.text


@every_trainer
def test_empty_after_the_shared_prompt(method, tiny_folder, tmp_path):
    """
    With an implicit prompt a response can be empty although its text is not: dialogues of HH-RLHF end after
    "Assistant:" on one side. TRL takes the shared beginning for the prompt and trains on nothing but EOS.
    """
    rows = [{"chosen": "Human: Hi. Assistant: Hello.", "rejected": "Human: Hi. Assistant: "}]
    with pytest.raises(ValueError, match="Row 0 of the train dataset has an empty `rejected`"):
        build(method, tiny_folder, tmp_path, rows)


def test_completions_of_parts():
    """Messages whose content is a list of parts: blank text is empty, and a tool call is not."""
    rows = tiny.rows(3, conversational=True)
    tool_calls = [{"type": "function", "function": {"name": "search", "arguments": {"query": "films"}}}]
    rows_module.check_rows(
        Dataset.from_list([{**rows[0], "chosen": [{"role": "assistant", "tool_calls": tool_calls}]}]), "train"
    )
    for content in ("", " ", [], [{"type": "text", "text": " "}]):
        rows[1]["chosen"] = [{"role": "assistant", "content": content}]
        with pytest.raises(ValueError, match="Row 0 of the train dataset has an empty `chosen`"):
            rows_module.check_rows(Dataset.from_list([rows[1]]), "train")
    rows[1]["chosen"] = [{"role": "assistant", "content": [{"type": "text", "text": "Good."}]}]
    rows_module.check_rows(Dataset.from_list([rows[1]]), "train")


@every_trainer
def test_vision_data(method, tmp_path):
    """Data with images, which is collated on the fly, gets the same checks in the constructor."""
    folder, images = tiny.save_vision(tmp_path / "vision"), tiny.vision_dataset(4)
    with pytest.raises(ValueError, match="The train dataset has no column `rejected`.*rename_column"):
        bad = images.rename_column("rejected", "worse")
        harness.trainer(method, folder, tmp_path, train_dataset=bad, max_length=None)
    blank = [[{"role": "assistant", "content": " "}]] * 4
    with pytest.raises(ValueError, match="Row 0 of the eval dataset has an empty `chosen` completion"):
        bad = images.remove_columns("chosen").add_column("chosen", blank)
        harness.trainer(method, folder, tmp_path, train_dataset=images, eval_dataset=bad, max_length=None)


@every_trainer
def test_empty_tokenized_completions(method, tiny_folder, tmp_path):
    """The same for tokenized data."""
    rows = [{"prompt_ids": [5, 6], "chosen_ids": [7], "rejected_ids": [8, 9]} for _ in range(4)]
    rows[1]["rejected_ids"] = []
    with pytest.raises(ValueError, match="Row 1 of the train dataset has an empty `rejected` completion"):
        build(method, tiny_folder, tmp_path, rows)


@every_trainer
def test_identical_pairs_are_counted_and_kept(method, tiny_folder, tmp_path, caplog):
    """Pairs without a preference draw one warning with their number and rows, and stay."""
    rows = tiny.rows(8)
    for i in (2, 5):
        rows[i]["rejected"] = rows[i]["chosen"]
    with caplog.at_level(logging.WARNING):
        trainer = build(method, tiny_folder, tmp_path, rows)
    warnings = [record.getMessage() for record in caplog.records if "identical" in record.getMessage()]
    assert len(warnings) == 1 and "2 of the 8 pairs of the train dataset" in warnings[0] and "rows 2, 5" in warnings[0]
    assert len(trainer.train_dataset) == 8


@every_trainer
@pytest.mark.parametrize("mode", ["keep_start", "keep_end"])
def test_pairs_that_truncation_makes_identical(method, mode, tiny_folder, tmp_path, caplog):
    """
    Pairs that differ only beyond `max_length` are identical to the loss, and counted; with `keep_end`, which cuts the
    prompt, what remains is compared.
    """
    rows = [{"prompt_ids": [5] * 6, "chosen_ids": [7, 8, 9], "rejected_ids": [7, 8, 10]} for _ in range(4)]
    with caplog.at_level(logging.WARNING):
        build(method, tiny_folder, tmp_path / "short", rows, max_length=8, truncation_mode=mode)
    assert ("4 of the 4 pairs" in caplog.text) == (mode == "keep_start")
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        build(method, tiny_folder, tmp_path / "shorter", rows, max_length=7, truncation_mode=mode)
        build(method, tiny_folder, tmp_path / "shortest", [*rows], max_length=6, truncation_mode="keep_end")
    assert ("4 of the 4 pairs" in caplog.text) == (mode == "keep_start")


@every_trainer
def test_prompts_that_fill_max_length(method, tiny_folder, tmp_path):
    """When truncation would leave no response anywhere, the limit is named; raw and tokenized data."""
    for rows in (tiny.dataset(6), harness.trainer(method, tiny_folder, tmp_path).train_dataset):
        with pytest.raises(ValueError, match="Every prompt of the train dataset fills `max_length=3` tokens.*Raise"):
            harness.trainer(method, tiny_folder, tmp_path, train_dataset=rows, max_length=3)


# ---- Runs that go wrong ---------------------------------------------------------------------------------------------


class Poison(TrainerCallback):
    """Sets one weight to NaN after a step, before the next forward or before the checkpoint of that step."""

    def __init__(self, step: int, value: float = float("nan")):
        self.step, self.value = step, value

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step == self.step:
            with torch.no_grad():
                parameter = next(p for p in reversed(list(model.parameters())) if p.requires_grad)
                parameter.view(-1)[0] = self.value


def snapshot(folder) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@every_trainer
@pytest.mark.parametrize("peft", [False, True], ids=["full", "lora"])
def test_loss_that_is_not_finite(method, peft, tiny_folder, tmp_path):
    """
    A NaN loss stops the run at its step, naming the step and the texts of the offending pairs. The last good
    checkpoint is byte for byte what it was, and there is no newer one.
    """
    kept = {}

    class Keep(TrainerCallback):
        def on_save(self, args, state, control, **kwargs):
            kept.update(snapshot(tmp_path / "checkpoint-2"))

    trainer = harness.trainer(
        method,
        tiny_folder,
        tmp_path,
        max_steps=6,
        save_strategy="steps",
        save_steps=2,
        callbacks=[Keep(), Poison(3)],
        peft_config=LoraConfig(r=2, target_modules="all-linear") if peft else None,
    )
    with pytest.raises(FloatingPointError, match=r"not finite at step 4 \(train\)") as error:
        trainer.train()
    message = str(error.value)
    assert message.count("pair ") >= 4 and "log-probability nan" in message and "lower `learning_rate`" in message
    assert re.search(r"chosen: \d+ response tokens.*text 'What of the \w+, number \d+\? The ", message)
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-2"]
    assert kept and snapshot(tmp_path / "checkpoint-2") == kept
    saved = next((tmp_path / "checkpoint-2").glob("*model.safetensors"))
    assert all(torch.isfinite(weight).all() for weight in load_file(saved).values())


@every_trainer
def test_only_the_offending_pair_is_named(method, tiny_folder, tmp_path):
    """A token with a broken embedding spoils the pairs that have it, and only these are in the message."""
    rows = tiny.rows(4)
    rows[2]["chosen"] += " camera"
    others = [row["prompt"] for i, row in enumerate(rows) if i != 2]
    trainer = build(method, tiny_folder, tmp_path, rows)
    tokens = [set(row["prompt_ids"] + row["chosen_ids"] + row["rejected_ids"]) for row in trainer.train_dataset]
    only = tokens[2] - tokens[0] - tokens[1] - tokens[3]
    assert only  # tokens of the third pair alone
    with torch.no_grad():
        trainer.model.model.embed_tokens.weight[list(only)] = float("nan")
    with pytest.raises(FloatingPointError, match=re.escape(rows[2]["prompt"])) as error:
        trainer.train()
    assert str(error.value).count("loss nan") == 1 and not any(text in str(error.value) for text in others)


@every_trainer
def test_loss_that_is_not_finite_in_evaluation(method, tiny_folder, tmp_path):
    """Evaluation says so, too, instead of reporting a NaN."""
    trainer = harness.trainer(method, tiny_folder, tmp_path, eval_dataset=tiny.dataset(4, seed=1))
    with torch.no_grad():
        trainer.model.lm_head.weight[0, 0] = float("nan")
    with pytest.raises(FloatingPointError, match=r"not finite at step 0 \(eval\)"):
        trainer.evaluate()


@every_trainer
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite(method, value, tiny_folder, tmp_path):
    """A step that leaves a weight that is not finite is not saved: no checkpoint, and the weight is named."""
    trainer = harness.trainer(
        method, tiny_folder, tmp_path, save_strategy="steps", save_steps=1, max_steps=3, callbacks=[Poison(2, value)]
    )
    with pytest.raises(
        FloatingPointError, match=r"Weights are not finite after step 2: lm_head.weight.*was not written"
    ):
        trainer.train()
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-1"]
