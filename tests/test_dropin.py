"""
The promise of two changed names: `FDPOTrainer` is `trl.DPOTrainer` where TRL has the method, and SimPER never meets a
reference model.

Observed over 20 Adam steps in fp32: losses and metrics equal to 1e-6, weights to 3e-7.
"""

import gc

import harness
import pytest
import tiny
import torch
import trl.trainer.dpo_trainer
from methods import BY_ID
from peft import LoraConfig, get_peft_model
from transformers import PreTrainedModel
from trl import DPOConfig, DPOTrainer

from trl_ext import FDPOConfig, FDPOTrainer, SimPERTrainer


def run(trainer_class, config_class, model, folder, peft=False, **options):
    # The evaluation set in one batch: of several, TRL logs the mean of the batches' means
    # (tests/training/test_pair_means.py).
    options = {"max_steps": 20, "learning_rate": 1e-3 if peft else 1e-4, "per_device_eval_batch_size": 8, **options}
    trainer = trainer_class(
        model=model,
        args=config_class(**{**harness.defaults(folder), **options}),
        train_dataset=tiny.dataset(),
        eval_dataset=tiny.dataset(8, seed=1),
        peft_config=LoraConfig(r=4, target_modules="all-linear", lora_dropout=0.1) if peft else None,
    )
    trainer.train()
    trainer.evaluate()
    return trainer


def assert_same_run(ours, theirs, keys_differ=()) -> None:
    for own, other in zip(harness.logs(ours), harness.logs(theirs), strict=True):
        assert set(other) <= set(own)  # every key of TRL is there
        for key in set(other) - set(keys_differ):
            assert own[key] == pytest.approx(other[key], rel=2e-5, abs=2e-6), (key, other["step"])
    assert harness.largest_difference(harness.weights(ours.model), harness.weights(theirs.model)) < 2e-6


@pytest.mark.parametrize("peft", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_default_is_dpo(peft, accumulation, tiny_folder, tmp_path):
    """With its defaults f-DPO is TRL's DPO: losses, every metric that TRL logs, the evaluation and the weights."""
    options = dict(gradient_accumulation_steps=accumulation)
    ours = run(FDPOTrainer, FDPOConfig, tiny_folder, tmp_path / "ours", peft, **options)
    theirs = run(DPOTrainer, DPOConfig, tiny_folder, tmp_path / "trl", peft, **options)
    assert len(harness.column(theirs, "loss")) == 20
    assert harness.column(theirs, "loss")[-1] < 0.6  # something was learned
    assert_same_run(ours, theirs)


@pytest.mark.parametrize(
    "options",
    [
        {"f_divergence_type": "js_divergence"},
        {"f_divergence_type": "alpha_divergence"},
        {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 0.7},
    ],
    ids=["js", "alpha-0.5", "alpha-0.7"],
)
def test_trl_names_of_divergences(options, tiny_folder, tmp_path):
    """
    TRL's `f_divergence_type` means here what it means there: losses and weights. `rewards/chosen`, `rewards/rejected`
    and `rewards/margins` differ by design: TRL logs beta times the log ratio whatever the divergence.
    """
    ours = run(FDPOTrainer, FDPOConfig, tiny_folder, tmp_path / "ours", **options)
    theirs = run(DPOTrainer, DPOConfig, tiny_folder, tmp_path / "trl", **options)
    rewards = {f"{p}rewards/{key}" for p in ("", "eval_") for key in ("chosen", "rejected", "margins")}
    assert_same_run(ours, theirs, keys_differ=rewards)
    default = run(DPOTrainer, DPOConfig, tiny_folder, tmp_path / "default")
    assert abs(harness.column(default, "loss")[-1] - harness.column(theirs, "loss")[-1]) > 1e-3  # it matters


class Counter:
    """Counts what a trainer builds and how often a model runs."""

    def __init__(self, monkeypatch):
        self.loads, self.forwards = 0, 0
        original = trl.trainer.dpo_trainer.create_model_from_path

        def load(*args, **kwargs):
            self.loads += 1
            return original(*args, **kwargs)

        monkeypatch.setattr(trl.trainer.dpo_trainer, "create_model_from_path", load)

    def forward(self, module, args, kwargs=None):
        self.forwards += 1


def models_alive() -> list[PreTrainedModel]:
    gc.collect()
    # By type: `isinstance` would make deprecated lazy objects of torch answer, with a warning each.
    return [
        thing for thing in gc.get_objects() if issubclass(type(thing), PreTrainedModel) and "lm_head" in dir(thing)
    ]


@pytest.mark.parametrize("name, models", [("fdpo", 2), ("simper", 1)])
@pytest.mark.parametrize("as_instance", [False, True], ids=["id", "instance"])
def test_models_loaded_and_run(name, models, as_instance, tiny_folder, tmp_path, monkeypatch):
    """
    SimPER loads one model, holds one model's parameters, and runs exactly one forward a micro-step; f-DPO two of each.
    Before the first step each model runs twice more, on padded rows and on packed ones, which must agree.
    """
    before = {id(model) for model in models_alive()}
    counter = Counter(monkeypatch)
    model = harness.load(tiny_folder) if as_instance else tiny_folder
    trainer = harness.trainer(BY_ID[name], model, tmp_path, gradient_accumulation_steps=2, max_steps=3)
    assert counter.loads == models - as_instance
    alive = [model for model in models_alive() if id(model) not in before]
    assert len(alive) == models
    for model in alive:
        model.model.embed_tokens.register_forward_pre_hook(counter.forward)
    del alive, model
    trainer.train()
    assert counter.forwards == models * (2 * 3 + 2)
    assert (trainer.ref_model is None) == (models == 1)


def test_simper_keeps_no_copy_of_a_pretrained_adapter(tiny_folder, tmp_path):
    """`DPOTrainer` copies a pre-trained adapter as its reference; SimPER must not, and f-DPO must."""
    adapters = {}
    for name in ("fdpo", "simper"):
        model = get_peft_model(harness.load(tiny_folder), LoraConfig(r=4, target_modules="all-linear"))
        trainer = harness.trainer(BY_ID[name], model, tmp_path / name, max_steps=2)
        trainer.train()
        adapters[name] = set(trainer.model.peft_config)
    assert adapters == {"fdpo": {"default", "ref"}, "simper": {"default"}}


def test_simper_is_not_dpo(tiny_folder, tmp_path):
    """The two methods really train different losses from the same start."""
    losses = {}
    for name in ("fdpo", "simper"):
        trainer = harness.trainer(BY_ID[name], tiny_folder, tmp_path / name)
        trainer.train()
        losses[name] = harness.column(trainer, "loss")
    assert losses["fdpo"][0] == pytest.approx(0.6931472, abs=1e-6)
    assert abs(losses["simper"][0]) < 0.1
    assert isinstance(trainer, SimPERTrainer) and torch.isfinite(torch.tensor(losses["simper"])).all()
