"""
Every field of every configuration: what has its type passes, what has not is refused by name; secrets stay where they
are.
"""

import copy
import dataclasses
import enum
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
    ],
    ids=lambda value: str(value)[:40],
)
def test_values_that_were_taken(config, options, told):
    name, value = list(options.items())[-1]
    with pytest.raises(ValueError, match=rf"`{name}` must be .*{told}.*, got {re.escape(repr(value))}"):
        build(config, **options)


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
        assert check_value("x", value, annotation) == (tuple(value) if isinstance(value, tuple) else value)
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
