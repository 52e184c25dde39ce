"""
Every field of every configuration: what has its type passes, what has not is refused by name; secrets stay where they
are.
"""

import copy
import dataclasses
import decimal
import enum
import fractions
import pickle
import re
import types
import typing

import numpy as np
import pytest
import torch
from trl import TrlParser

import trl_ext
from trl_ext import D2POConfig, DSPOConfig, FDPOConfig, RainbowPOConfig, SimPERConfig
from trl_ext._checks import NOT_EMPTY, Range, Words, above, annotations_of, at_least, between, check_value
from trl_ext._secrets import without_secrets


CONFIGS = [getattr(trl_ext, name) for name in trl_ext.__all__ if name.endswith("Config")]
CONFIGS = [config for config in CONFIGS if hasattr(config, "refused_options")]
every_config = pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.__name__)

NAN, INF = float("nan"), float("inf")
# What no field of the type holds; `None` where the annotation does not have it.
WRONG = {
    bool: ["false", "no", "", 1, 0.0, NAN, [], {}],
    int: ["8", "", 2.5, NAN, INF, 1e30, True, [], {}, "abc"],
    float: ["0.1", "", NAN, True, [], {}, "abc"],
    str: [3, 0.5, NAN, True, {}, object()],
    list: [3, 0.5, True, {}],
    dict: [3.0, True, [1]],
}
RIGHT = {bool: [True, False], int: [1, 2, np.int64(3), 4.0], float: [0.25, np.float32(0.5), np.float64(0.5)]}
# Narrower than their annotation, or tied to others; their values have tests of their own.
SPECIAL = {"loss", "fsdp", "accelerator_config", "debug", "parallelism_config", "optim_target_modules", "report_to"}
SPECIAL |= {"include_num_input_tokens_seen"}


def kinds_of(config: type, field: dataclasses.Field) -> list:
    """Types that a field may have, as written by whoever declared it."""
    hint = {**annotations_of(config), **config._all_inherited_annotations()}[field.name]
    if typing.get_origin(hint) is typing.Annotated:
        hint = typing.get_args(hint)[0]
    union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    members = typing.get_args(hint) if union else (hint,)
    return [typing.get_origin(member) or member for member in members]


def build(config, **options):
    if issubclass(config, D2POConfig):
        options.setdefault("max_length", 512)
    return config(**{"output_dir": "unused", "use_cpu": True, "bf16": False, **options})


@every_config
def test_wrong_types_are_refused_by_name(config):
    """A value of a type that no annotation of the field has: `ValueError` with the field's name and the value."""
    checked = 0
    for field in dataclasses.fields(config):
        kinds = kinds_of(config, field)
        if not field.init or field.name in SPECIAL or typing.Any in kinds:
            continue
        known = [kind for kind in kinds if kind in WRONG]
        if not known or any(isinstance(kind, type) and issubclass(kind, enum.Enum) for kind in kinds):
            continue
        # A value is wrong if it is wrong for every type of the union; an integer is a number of a `float` field.
        accepted_as_int = {1} if {int, float} & set(kinds) else set()
        for value in WRONG[known[0]]:
            wrong_for_all = all(any(value is other for other in WRONG[kind]) for kind in known)
            if type(value) is int and value in accepted_as_int or not wrong_for_all and len(known) > 1:
                continue
            if value == INF and float in kinds:
                continue
            with pytest.raises(ValueError, match=f"`{field.name}"):
                build(config, **{field.name: value})
            checked += 1
        if type(None) not in kinds and field.default is not None and field.name != "kappa":
            with pytest.raises(ValueError, match=f"`{field.name}` must be .* got None"):
                build(config, **{field.name: None})
    assert checked > 400


@every_config
def test_values_of_the_right_type_pass(config):
    """Defaults, both truth values, integers also as NumPy's or as integral floats: no check of the fields objects."""
    args = build(config)
    assert repr(dataclasses.replace(args)) == repr(args)  # what the constructor makes of the options is taken again
    hints, inherited = annotations_of(config), config._all_inherited_annotations()
    for field in dataclasses.fields(config):
        hint = inherited.get(field.name, hints[field.name])
        marks = typing.get_args(hint)[1:] if typing.get_origin(hint) is typing.Annotated else ()
        for kind in kinds_of(config, field):
            for value in RIGHT.get(kind, []):
                if any(isinstance(mark, Range) and not mark.holds(value) for mark in marks):
                    continue
                found = check_value(field.name, value, hint)
                assert found == value and type(found) is not np.int64 and (kind is not int or type(found) is int)
            if kind is type(None) and not any(isinstance(mark, Words) for mark in marks):
                assert check_value(field.name, None, hint) is None


def test_tuples_are_lists():
    """Transformers would put the tuple into a list of one tracker of that name."""
    assert build(FDPOConfig, report_to=("none",)).report_to == build(FDPOConfig, report_to=["none"]).report_to == []
    assert build(FDPOConfig, include_for_metrics=("loss",)).include_for_metrics == ["loss"]


def test_numbers_of_other_libraries():
    """NumPy's are taken for what they are, to the type; what only resembles a number is refused by name."""
    args = build(FDPOConfig, learning_rate=np.float32(0.5), seed=np.int64(3), max_length=512.0)
    assert (args.learning_rate, args.seed, args.max_length) == (0.5, 3, 512)
    assert (type(args.learning_rate), type(args.seed), type(args.max_length)) == (float, int, int)
    for name, value in (
        ("learning_rate", decimal.Decimal("0.5")),
        ("learning_rate", torch.tensor(0.5)),
        ("beta", torch.tensor([0.1])),
        ("beta", np.array([0.1])),
        ("bf16", np.bool_(False)),
        ("max_length", fractions.Fraction(5, 2)),
    ):
        with pytest.raises(ValueError, match=f"`{name}` must be"):
            build(FDPOConfig, **{name: value})


@pytest.mark.parametrize(
    "config, options, told",
    [
        (RainbowPOConfig, {"length_normalization": "no"}, "True or False"),
        (FDPOConfig, {"max_log_weight": "abc"}, "a positive, finite number or None"),
        (FDPOConfig, {"precompute_ref_log_probs": True, "reference_cache_dir": ""}, "not empty"),
        (FDPOConfig, {"precompute_ref_log_probs": True, "precompute_ref_batch_size": -1}, "at least 1"),
        (FDPOConfig, {"truncation_mode": "abc"}, "'keep_start', 'keep_end'"),
        (FDPOConfig, {"pad_to_multiple_of": 0}, "at least 1"),
        (FDPOConfig, {"pad_to_multiple_of": "seven"}, "at least 1"),
        (FDPOConfig, {"train_sampling_strategy": "abc"}, "'random', 'sequential'"),
        (FDPOConfig, {"learning_rate": NAN}, "a finite number"),
        (FDPOConfig, {"learning_rate": INF}, "a finite number"),
        (FDPOConfig, {"lr_scheduler_type": "linaer"}, "'linear'"),
        (FDPOConfig, {"max_steps": 2.5}, "an integer"),
        (FDPOConfig, {"label_names": "labels"}, "a list of strings"),
        (FDPOConfig, {"per_device_train_batch_size": 0}, "at least 1"),
        (DSPOConfig, {"resolution": 1e30}, "an integer"),
        (DSPOConfig, {"num_timestep_buckets": 2.5}, "an integer"),
        (DSPOConfig, {"validation_prompts": ["a"], "validation_seed": "abc"}, "an integer"),
        (DSPOConfig, {"validation_prompts": ["a"], "validation_guidance_scale": NAN}, "a finite number"),
        (DSPOConfig, {"validation_prompts": []}, "a list of strings"),
        (DSPOConfig, {"use_ema": "no"}, "True or False"),
        (DSPOConfig, {"use_ema": "False"}, "True or False"),
        (DSPOConfig, {"use_ema": 0}, "True or False"),
        # Negative numbers, which Transformers divides by, clips to or skips without a word.
        (FDPOConfig, {"max_grad_norm": -1.0}, "at least 0"),
        (FDPOConfig, {"max_grad_norm": -INF}, "at least 0"),
        (FDPOConfig, {"logging_steps": -1}, "at least 0"),
        (FDPOConfig, {"eval_steps": -5}, "at least 0"),
        (FDPOConfig, {"save_steps": -1}, "at least 0"),
        (FDPOConfig, {"eval_delay": -1}, "at least 0"),
        (FDPOConfig, {"max_steps": -2}, "at least -1"),
        (FDPOConfig, {"num_train_epochs": -1}, "at least 0"),
        (FDPOConfig, {"save_total_limit": 0}, "at least 1"),
        (FDPOConfig, {"weight_decay": -0.1}, "at least 0"),
        (FDPOConfig, {"adam_beta1": 1.0}, r"a number in \[0, 1\)"),
        (FDPOConfig, {"adam_beta2": -0.5}, r"a number in \[0, 1\)"),
        (FDPOConfig, {"adam_epsilon": -INF}, "at least 0"),
        (FDPOConfig, {"seed": -1}, "an integer in"),
        (FDPOConfig, {"data_seed": 2**32}, "an integer in"),
        (FDPOConfig, {"dataloader_num_workers": -1}, "at least 0"),
        (FDPOConfig, {"eval_accumulation_steps": 0}, "at least 1"),
        (FDPOConfig, {"ddp_timeout": 0}, "an integer in"),
        (D2POConfig, {"label_timeout": 1e308}, "a number in"),
        (D2POConfig, {"label_retry_delay": 1e300}, "a number in"),
        # Texts.
        (FDPOConfig, {"include_num_input_tokens_seen": "False"}, "'all', 'non_padding', 'no'"),
        (FDPOConfig, {"lr_scheduler_kwargs": "[1]"}, "the JSON text of one"),
        (FDPOConfig, {"lr_scheduler_kwargs": "{bad"}, "the JSON text of one"),
        (FDPOConfig, {"lr_scheduler_kwargs": {1: 2}}, "the JSON text of one"),
        (FDPOConfig, {"model_init_kwargs": "bfloat16"}, "the JSON text of one"),
        (FDPOConfig, {"model_init_kwargs": {"rope": {"factor": NAN}}}, "without NaN"),
        (FDPOConfig, {"gradient_checkpointing_kwargs": {"use_reentrant": "False"}}, "`true` and `false`"),
        (FDPOConfig, {"fsdp_config": "no file"}, "a file that holds one"),
        (D2POConfig, {"generation_kwargs": {"min_new_tokens": NAN}}, "without NaN"),
        (D2POConfig, {"loss_kwargs": " "}, "the JSON text of one"),
        (trl_ext.DPHRLConfig, {"chat_template_kwargs": "{'enable_thinking': False}"}, "the JSON text of one"),
        (FDPOConfig, {"liger_kernel_config": {"rope": "False"}}, "a dictionary"),
        (FDPOConfig, {"output_dir": "a\0b"}, "without control characters"),
        (FDPOConfig, {"hub_model_id": " "}, "not empty"),
        (FDPOConfig, {"metric_for_best_model": ""}, "not empty"),
        (D2POConfig, {"ledger_file": "a\nb"}, "without control characters"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_values_that_were_taken(config, options, told):
    name, value = list(options.items())[-1]
    with pytest.raises(ValueError, match=rf"`{name}` must be .*{told}.*, got {re.escape(repr(value))}"):
        build(config, **options)


@pytest.mark.parametrize(
    "options, told",
    [
        ({"optim_args": "momentum"}, "`optim_args='momentum'`.*NAME=VALUE"),
        ({"optim_args": "a=1,,b=2"}, "`optim_args=.*NAME=VALUE"),
        ({"accelerator_config": {"a": 1}}, "`accelerator_config` has the unknown key 'a'.*'split_batches'"),
        (
            {"accelerator_config": '{"split_batches": "False"}'},
            r"`accelerator_config\['split_batches'\]` must be True or",
        ),
        ({"accelerator_config": "no file"}, "`accelerator_config` must be .*a file that holds one"),
    ],
    ids=str,
)
def test_texts_that_are_taken_apart(options, told):
    with pytest.raises(ValueError, match=told):
        build(FDPOConfig, **options)


def test_json_text_is_a_dictionary(tmp_path):
    """As on the command line; a file's name stays where Transformers reads files."""
    args = build(FDPOConfig, lr_scheduler_kwargs=' {"power": 2.0}', optim_args="momentum=0.9, nesterov=True")
    assert args.lr_scheduler_kwargs == {"power": 2.0}
    (tmp_path / "accelerator.json").write_text('{"even_batches": true}')
    assert build(FDPOConfig, accelerator_config=str(tmp_path / "accelerator.json")).accelerator_config.even_batches


def test_what_transformers_takes_beside_its_annotations():
    """Forms that a field is not annotated with, and that TRL and Transformers work with all the same."""
    from pathlib import Path

    assert build(FDPOConfig, output_dir=Path("a/b")).output_dir == "a/b"
    assert build(FDPOConfig, max_steps=1e3).max_steps == 1000
    assert build(FDPOConfig, max_grad_norm=INF).max_grad_norm == INF
    assert (
        build(FDPOConfig, report_to="none", save_steps=0.25, logging_steps=5, loss_type="sigmoid").save_steps == 0.25
    )
    assert (
        build(FDPOConfig, eval_strategy="no", lr_scheduler_type="cosine", optim="adamw_torch").optim == "adamw_torch"
    )
    assert build(FDPOConfig, accelerator_config={"split_batches": True}).accelerator_config.split_batches
    assert build(RainbowPOConfig, kappa="0.25").kappa == 0.25 and build(RainbowPOConfig).kappa == "auto"


@pytest.mark.parametrize(
    "annotation, right, wrong, text",
    [
        (typing.Annotated[float, above(0)], [1e-9, 3], [0, -1, NAN, INF, "1", None], "a positive, finite number"),
        (typing.Annotated[float, between(0, 1, "[)")], [0, 0.5], [1, -0.1], r"a number in \[0, 1\)"),
        (
            typing.Annotated[int | None, at_least(2)],
            [2, 3.0, None],
            [1, 2.5, True],
            "an integer of at least 2 or None",
        ),
        (typing.Annotated[str, NOT_EMPTY], ["a"], ["", 3], "a string that is not empty"),
        (float | typing.Literal["auto"], ["auto", 0.5], ["other", True], "'auto'"),
        (list[float], [[1, 2.5], (), [0]], [[NAN], [INF], ["a"], "abc"], "a list of finite numbers"),
        (dict[str, int], [{}, {"a": 1}], [[], "{}", None], "a dictionary"),
    ],
    ids=str,
)
def test_check_value(annotation, right, wrong, text):
    for value in right:
        assert check_value("x", value, annotation) == (list(value) if isinstance(value, tuple) else value)
    for value in wrong:
        with pytest.raises(ValueError, match=f"`x` must be .*{text}"):
            check_value("x", value, annotation)


def test_choices_reach_the_command_line(capsys):
    """A closed set of strings is one for `argparse`, too, and its help lists it."""
    for config, option, choice in ((RainbowPOConfig, "link", "cauchy"), (DSPOConfig, "variant", "squared")):
        parser = TrlParser(config)
        options = ["--output_dir", "x", "--use_cpu", "true", "--bf16", "false", f"--{option}"]
        assert getattr(parser.parse_args_and_config([*options, choice])[0], option) == choice
        with pytest.raises(SystemExit):
            parser.parse_args_and_config([*options, "other"])
        assert f"--{option}" in capsys.readouterr().err


# ---- Secrets --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [FDPOConfig, SimPERConfig, D2POConfig, DSPOConfig], ids=lambda c: c.__name__)
def test_secrets(config, tmp_path):
    """
    Neither `hub_token` nor a token of `model_init_kwargs` is pickled, shown or handed to a tracker; copies keep both.
    """
    args = build(config, hub_token="hf_first", model_init_kwargs={"token": "hf_second", "revision": "main"})
    torch.save(args, tmp_path / "training_args.bin")
    pickled = (tmp_path / "training_args.bin").read_bytes()
    for text in (
        repr(args),
        str(args),
        args.to_json_string(),
        str(args.to_sanitized_dict()),
        pickled.decode("latin1"),
    ):
        assert "hf_first" not in text and "hf_second" not in text
        assert "revision" in text
    restored = pickle.loads(pickle.dumps(args))
    assert restored.hub_token is None and restored.model_init_kwargs == {"token": None, "revision": "main"}
    for kept in (args, copy.copy(args), copy.deepcopy(args), dataclasses.replace(args)):
        assert kept.hub_token == "hf_first" and kept.model_init_kwargs["token"] == "hf_second"


@pytest.mark.parametrize(
    "given",
    [
        {"headers": {"Authorization": "Bearer S3CRET-value"}},
        {"proxies": {"https": "http://user:S3CRET@proxy:8080"}},
        {"api_key": "S3CRET"},
        {"storage": [{"AWS_SECRET_ACCESS_KEY": "S3CRET"}]},
        {"wandb": {"WANDB_API_KEY": "S3CRET"}},
        {"hf-token": "S3CRET"},
        {"clientSecret": "S3CRET"},
        {"password": "S3CRET"},
        {"comment": "the token is hf_S3CRETvaluevalue"},
        {"use_auth_token": "S3CRET"},
        {"nested": {"deep": ({"access_token": "S3CRET"},)}},
    ],
    ids=lambda given: next(iter(given)),
)
def test_secrets_by_other_names(given, tmp_path, caplog):
    """In headers, proxies and lists, under the names of other services, or told by their form only."""
    args = build(FDPOConfig, model_init_kwargs={**given, "revision": "main"})
    shown = [repr(args), str(args), args.to_json_string(), str(args.to_sanitized_dict())]
    for text in (*shown, pickle.dumps(args).decode("latin1")):
        assert "S3CRET" not in text and "revision" in text
    assert args.model_init_kwargs == {**given, "revision": "main"}
    with pytest.raises(ValueError, match="`model_init_kwargs`") as error:
        build(FDPOConfig, model_init_kwargs={**given, "x": NAN})
    assert "S3CRET" not in str(error.value)


def test_what_is_no_secret():
    """Special tokens, counts and switches are shown, and saved, as they are."""
    plain = {"pad_token": "<pad>", "eos_token_id": 2, "max_new_tokens": 8, "token": True, "key": "v", "tokenizer": "x"}
    assert without_secrets("model_init_kwargs", plain, None) is plain
    with pytest.raises(ValueError, match="`hub_token`") as error:
        build(FDPOConfig, hub_token="S3CRET\n")
    assert "S3CRET" not in str(error.value)
