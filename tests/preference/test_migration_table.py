"""The table of what becomes of each option of `trl.DPOConfig`: up to date, complete, and what it says is so."""

import dataclasses
import sys
from pathlib import Path

import pytest
import trl

import trl_ext


sys.path.insert(0, str(Path(__file__).resolve().parents[2] / ".ci" / "docs"))

import migration  # noqa: E402


OTHER = {  # values beside the default, of options that are no numbers
    "loss_type": ["hinge"],
    "loss_weights": [1.0],
    "label_names": ["labels"],
    "truncation_mode": "keep_end",
    "f_divergence_type": "js_divergence",
}


def test_page_is_up_to_date():
    assert migration.PAGE.read_text() == migration.page(), "run `python .ci/docs/migration.py`"


def test_every_option_is_an_option_here():
    for name in migration.METHODS.values():
        assert set(migration.options_of(trl.DPOConfig)) <= set(migration.options_of(getattr(trl_ext, name)))


def another_value(option: dataclasses.Field):
    default = migration.default(option)
    if option.name in OTHER:
        return OTHER[option.name]
    if isinstance(default, bool):
        return not default
    if isinstance(default, str):
        return f"{default}_2"
    return 2 if default is None else default / 2 if isinstance(default, float) and default else default + 1


@pytest.mark.parametrize("method", migration.METHODS)
def test_what_is_refused_is_refused(method, tmp_path):
    """Another value than the default is an error that names the option."""
    config = getattr(trl_ext, migration.METHODS[method])
    options = {option.name: option for option in dataclasses.fields(trl.DPOConfig)}
    refused = [name for name in options if migration.outcome(name, method) == "refused"]
    assert {"loss_type", "use_weighting"} <= set(refused)
    for name in refused:
        with pytest.raises(ValueError, match=f"`{name}="):
            config(str(tmp_path), bf16=False, use_cpu=True, **{name: another_value(options[name])})


def test_names_of_trl_are_understood(tmp_path):
    config = trl_ext.FDPOConfig(
        str(tmp_path), bf16=False, use_cpu=True, f_divergence_type="alpha_divergence", f_alpha_divergence_coef=0.25
    )
    assert (
        config.get_divergence().name
        == trl_ext.FDPOConfig(str(tmp_path), bf16=False, use_cpu=True, divergence="alpha", alpha=0.75)
        .get_divergence()
        .name
    )
