"""RainbowPO's corners are the methods they are named after, in whole runs; what it loads, and what it says it is."""

import gc
import math
from types import SimpleNamespace

import harness
import pytest
import tiny
import torch
from methods import BY_ID
from transformers import Qwen2ForCausalLM
from trl import DPOConfig, DPOTrainer

from trl_ext import RainbowPOConfig


RAINBOW, MALLOWS = BY_ID["rainbowpo"], BY_ID["mallows"]
PLAIN = dict(contextual_scaling=False, kappa="auto")  # beside the options of the suite's entry, which sets kappa


def dpo_corner(**options):
    return dict(PLAIN, mixing_alpha=1.0, gamma=0.0, **options)


def make(**options):
    return RainbowPOConfig("unused", use_cpu=True, bf16=False, **options)


def scores(trainer, inputs):
    return trainer._score_responses(trainer.score_policy(trainer.model, inputs), inputs)


# ---- Corners --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, loss_type",
    [
        (dict(length_normalization=False, beta=0.1), "sigmoid"),
        (dict(length_normalization=True, beta=5.0), "sigmoid_norm"),
        (dict(length_normalization=False, beta=0.1, link="hinge"), "hinge"),
        (dict(length_normalization=True, beta=0.5, link="ipo"), "ipo"),
    ],
    ids=["dpo", "sigmoid_norm", "hinge", "ipo"],
)
def test_corner_is_trls(options, loss_type, tiny_folder, tmp_path):
    """
    At `mixing_alpha=1` without scaling: the losses and the weights of `trl.DPOTrainer` with its own loss, over a run.
    """
    ours = harness.trainer(RAINBOW, tiny_folder, tmp_path / "ours", **dpo_corner(**options), learning_rate=1e-4)
    ours.train()
    args = {**harness.defaults(tmp_path / "trl"), "learning_rate": 1e-4}
    theirs = DPOTrainer(
        model=tiny_folder,
        args=DPOConfig(**args, beta=options["beta"], loss_type=loss_type),
        train_dataset=tiny.dataset(),
    )
    theirs.train()
    losses = harness.column(theirs, "loss")
    assert harness.column(ours, "loss") == pytest.approx(losses, rel=2e-5) and abs(losses[-1] - losses[0]) > 1e-3
    assert harness.largest_difference(harness.weights(ours.model), harness.weights(theirs.model)) < 2e-6


def test_simpo(tiny_folder, tmp_path):
    """
    At `mixing_alpha=0` without scaling: `trl.experimental.cpo`'s SimPO loss and rewards, its gamma being beta times
    ours.
    """
    from trl.experimental.cpo import CPOTrainer

    options = dict(PLAIN, mixing_alpha=0.0, beta=2.5, gamma=0.55)
    trainer = harness.trainer(RAINBOW, tiny_folder, tmp_path, **options)
    chosen, rejected = scores(trainer, harness.batch(trainer, 8))
    ours = trainer.pair_loss(chosen, rejected)
    simpo = SimpleNamespace(
        alpha=0.0,
        beta=2.5,
        simpo_gamma=2.5 * 0.55,
        loss_type="simpo",
        label_smoothing=0.0,
        accelerator=trainer.accelerator,
    )
    theirs = CPOTrainer.cpo_loss(simpo, chosen.mean_logps, rejected.mean_logps)
    for own, other in zip((ours.losses, ours.chosen_rewards, ours.rejected_rewards), theirs, strict=True):
        torch.testing.assert_close(own, other, rtol=1e-5, atol=1e-6)
    assert ours.losses.std() > 1e-3


@pytest.mark.parametrize("link", ["sigmoid", "ipo"])
def test_mallows_dpo(link, tiny_folder, tmp_path):
    """Without length normalization, at `mixing_alpha=1`: a run of `MallowsDPOTrainer`, estimated kappa included."""
    runs = []
    for method, options in (
        (RAINBOW, dict(length_normalization=False, mixing_alpha=1.0, gamma=0.0)),
        (MALLOWS, {}),
    ):
        trainer = harness.trainer(
            method, tiny_folder, tmp_path / method.id, kappa="auto", beta=0.1, link=link, learning_rate=1e-4, **options
        )
        trainer.train()
        runs.append(trainer)
    assert runs[0].kappa == runs[1].kappa
    harness.assert_same_logs(*(harness.logs(trainer) for trainer in runs), rtol=1e-5, atol=1e-7)
    assert harness.largest_difference(*(harness.weights(trainer.model) for trainer in runs)) < 2e-6


def test_sft_term(tiny_folder, tmp_path):
    """It adds the negative log-likelihood of the chosen response: per token with length normalization, else summed."""
    for normalized in (True, False):
        values = []
        for coefficient in (0.0, 0.5):
            trainer = harness.trainer(
                RAINBOW, tiny_folder, tmp_path, length_normalization=normalized, beta=0.1, sft_coef=coefficient
            )
            chosen, rejected = scores(trainer, harness.batch(trainer))
            values.append(trainer.pair_loss(chosen, rejected))
        likelihood = chosen.mean_logps if normalized else chosen.logps
        torch.testing.assert_close(values[1].losses - values[0].losses, -0.5 * likelihood, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(values[1].metrics["sft_loss"], -likelihood.detach())
        assert "sft_loss" not in values[0].metrics


# ---- The reference --------------------------------------------------------------------------------------------------


def models_alive() -> set[int]:
    gc.collect()
    return {id(thing) for thing in gc.get_objects() if type(thing) is Qwen2ForCausalLM}


@pytest.mark.parametrize(
    "options, statistics",
    [
        (dict(PLAIN, mixing_alpha=0.0), ()),
        (dict(mixing_alpha=0.0), ("entropy",)),
        (dict(PLAIN, mixing_alpha=0.25), ("logps",)),
        (dict(mixing_alpha=0.25), ("logps", "entropy")),
        (dict(mixing_alpha=0.0, dispersion_column="dispersion"), ()),
        (dict(mixing_alpha=0.25, dispersion_column="dispersion"), ("logps",)),
    ],
    ids=str,
)
def test_what_is_read_of_the_reference(options, statistics, tiny_folder, tmp_path):
    """No more than the options need; with `mixing_alpha=0` and no scaling no second model is built, held or run."""
    before = models_alive()
    data = tiny.dataset(8).add_column("dispersion", [0.3] * 8)
    trainer = harness.trainer(RAINBOW, tiny_folder, tmp_path, train_dataset=data, max_steps=1, **options)
    assert trainer.reference_statistics == statistics and trainer.needs_reference == bool(statistics)
    assert len(models_alive() - before) == 1 + bool(statistics)
    assert (trainer.ref_model is None) == (not statistics)
    trainer.train()
    entry = trainer.state.log_history[0]
    assert ("logratios/chosen" in entry) == ("logps" in statistics)
    assert ("dispersion/weight" in entry) == trainer.args.contextual_scaling
    assert math.isfinite(entry["loss"]) and entry["grad_norm"] > 0


def test_reference_that_is_not_read_is_refused(tiny_folder, tmp_path):
    options = dict(PLAIN, mixing_alpha=0.0)
    with pytest.raises(
        ValueError, match="`ref_model` was given.*RainbowPO uses no reference model with these options"
    ):
        harness.trainer(RAINBOW, tiny_folder, tmp_path, ref_model=harness.load(tiny_folder), **options)
    with pytest.raises(ValueError, match="`precompute_ref_log_probs=True` has no effect: RainbowPO, as configured"):
        harness.trainer(RAINBOW, tiny_folder, tmp_path, precompute_ref_log_probs=True, **options)


@pytest.mark.parametrize("mixing_alpha", [0.0, 0.25])
def test_precomputed_is_the_same_run(mixing_alpha, tiny_folder, tmp_path):
    """Whichever of the two numbers are read: entropies alone, or log-probabilities too."""
    runs = []
    for precompute in (False, True):
        trainer = harness.trainer(
            RAINBOW,
            tiny_folder,
            tmp_path / f"{precompute}",
            mixing_alpha=mixing_alpha,
            precompute_ref_log_probs=precompute,
            adam_epsilon=1e-3,
        )
        assert (trainer.ref_model is None) == precompute
        trainer.train()
        runs.append(harness.logs(trainer))
    harness.assert_same_logs(*runs, rtol=1e-4, atol=5e-5)


# ---- What it says it is ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, name",
    [
        ({}, "RainbowPO (log-probabilities per token, 0.25 of the reference, a margin of 0.75 x 0.1, contextual scal"),
        (dict(contextual_scaling=False, length_normalization=False, mixing_alpha=1.0), "DPO"),
        (dict(contextual_scaling=False, mixing_alpha=1.0), "length-normalized DPO (TRL's `sigmoid_norm`)"),
        (
            dict(contextual_scaling=False, mixing_alpha=0.0, beta=2.5, gamma=0.5),
            "SimPO with the margin 2.5 x 0.5 = 1.25",
        ),
        (dict(length_normalization=False, mixing_alpha=1.0), "Mallows-DPO"),
        (dict(length_normalization=False, mixing_alpha=1.0, link="ipo"), "Mallows-DPO with the link 'ipo'"),
        (dict(mixing_alpha=1.0), "length-normalized Mallows-DPO"),
        (dict(contextual_scaling=False, mixing_alpha=1.0, link="ipo"), "IPO (TRL's `ipo`)"),
        (
            dict(contextual_scaling=False, mixing_alpha=0.0, link="hinge"),
            "RainbowPO (log-probabilities per token, no ref",
        ),
        (
            dict(contextual_scaling=False, mixing_alpha=1.0, sft_coef=0.5),
            "length-normalized DPO (TRL's `sigmoid_norm`), w",
        ),
    ],
    ids=lambda value: str(value)[:30],
)
def test_name(options, name):
    assert make(**options).amounts_to.startswith(name)
    if name.endswith(("DPO", "`)", "1.25")):
        assert make(**options).amounts_to == name


def test_name_is_printed_and_on_the_card(tiny_folder, tmp_path, capsys):
    """Once, as the trainer is made; and again where the model goes."""
    trainer = harness.trainer(RAINBOW, tiny_folder, tmp_path, **dpo_corner(length_normalization=False, beta=0.1))
    assert capsys.readouterr().out.count("RainbowPOTrainer: these options amount to DPO.") == 1
    trainer.create_model_card()
    card = (tmp_path / "README.md").read_text()
    assert "`DPO`" in card and "kappa" not in card and "dispersion_column" not in card


@pytest.mark.parametrize(
    "options, unusual",
    [
        (dict(beta=10.0), False),
        (dict(beta=0.1), True),
        (dict(beta=0.1, link="ipo"), False),
        (dict(beta=10.0, length_normalization=False), True),
        (dict(beta=0.1, length_normalization=False), False),
    ],
    ids=str,
)
def test_beta_of_another_scale_is_said(options, unusual, tiny_folder, tmp_path, caplog):
    """Turning length normalization on or off and keeping `beta` changes the argument's scale a hundredfold."""
    harness.trainer(RAINBOW, tiny_folder, tmp_path, **options)
    assert ("is unusual: differences of log-probabilities per token" in caplog.text) == unusual


# ---- Options --------------------------------------------------------------------------------------------------------


def test_defaults_are_the_released_codes():
    """Of `dpo_config.py` in the released code, whose README has others; all but kappa, which is estimated."""
    config = make()
    assert (config.beta, config.gamma, config.mixing_alpha, config.link) == (10.0, 0.1, 0.25, "sigmoid")
    assert config.length_normalization and config.contextual_scaling and config.sft_coef == 0.0


@pytest.mark.parametrize(
    "options, message",
    [
        ({"mixing_alpha": 1.2}, r"mixing_alpha.*\[0, 1\], got 1.2"),
        ({"gamma": math.nan}, "gamma.*finite number.*got nan"),
        ({"mixing_alpha": 1.0, "gamma": 0.3}, "`gamma=0.3` has no effect with `mixing_alpha=1`.*Lower `mixing_alpha`"),
        ({"sft_coef": -1.0}, "`sft_coef`.*at least 0, got -1.0"),
        ({"sft_coef": "0.5"}, "`sft_coef`.*at least 0, got '0.5'"),
        ({"contextual_scaling": False, "kappa": 0.3}, "`kappa=0.3` has no effect unless `contextual_scaling=True`"),
        (
            {"contextual_scaling": False, "dispersion_column": "d"},
            "`dispersion_column='d'` has no effect unless `cont",
        ),
        ({"contextual_scaling": False, "num_kappa_samples": 8}, "`num_kappa_samples=8` has no effect unless `cont"),
    ],
    ids=str,
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        make(**options)
