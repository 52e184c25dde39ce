"""
The contract with TRL, transformers, diffusers and bitsandbytes: what the diffusion trainers override or replace, named
one by one, so that a new version fails here with a sentence and not in a user's run.
"""

import inspect
from collections import Counter

import diffusion_harness as harness
import pytest
import reward_harness
from diffusers.quantizers.bitsandbytes.bnb_quantizer import BnB4BitDiffusersQuantizer
from transformers import Trainer, TrainingArguments
from trl.trainer.base_trainer import _BaseTrainer

from trl_ext import ScoreAsActionTrainer, _trl
from trl_ext.diffusion import DiffusionTrainer, ImageTrainer, OnlineDiffusionTrainer
from trl_ext.diffusion.buckets import BucketedBatches
from trl_ext.diffusion.online_evaluation import RewardEvaluation
from trl_ext.diffusion.paired_denoiser import PairedDenoiser
from trl_ext.training.logging import MeteredTrainer
from trl_ext.training.model_card import DocumentedRun
from trl_ext.training.resume import ResumableRun


SHARED = (ImageTrainer, DocumentedRun, ResumableRun, MeteredTrainer)
# Trainer -> whose methods it has.
OWN = {
    DiffusionTrainer: (DiffusionTrainer, BucketedBatches, *SHARED),
    OnlineDiffusionTrainer: (OnlineDiffusionTrainer, RewardEvaluation, *SHARED),
}


def overrides(trainer: type) -> dict[str, type]:
    """Methods of ours that TRL's or transformers' trainer defines too, and whose they are."""
    found = {}
    for own in OWN[trainer]:
        for name, value in vars(own).items():
            owner = next((base for base in (_BaseTrainer, Trainer) if name in vars(base)), None)
            if owner is not None and callable(value) and not name.startswith("__"):
                found[name] = owner
    return found


def test_list_of_overrides():
    """A new override must be added here, and be called below."""
    both = {
        "_load_best_model",
        "_load_from_checkpoint",
        "_push_from_checkpoint",
        "_run_epoch",
        "_save",
        "_save_checkpoint",
        "_save_rng_state",
        "_set_signature_columns_if_needed",
        "compute_loss",
        "create_model_card",
        "end",
        "evaluate",
        "evaluation_loop",
        "log",
        "predict",
        "prediction_step",
        "push_to_hub",
        "save_model",
        "train",
        "training_step",
    }
    if not hasattr(Trainer, "end"):  # Transformers 5.17
        both.remove("end")
    assert set(overrides(DiffusionTrainer)) == both | {"_get_eval_sampler", "_get_train_sampler"}
    sampled = {"_get_train_sampler", "_load_optimizer_and_scheduler", "get_batch_samples"}
    assert set(overrides(OnlineDiffusionTrainer)) == both | sampled


@pytest.mark.parametrize(
    "trainer, name, owner", [(trainer, *found) for trainer in OWN for found in overrides(trainer).items()]
)
def test_overrides_keep_the_signature(trainer, name, owner):
    """An override accepts whatever the original accepts, by position and by name."""
    own = inspect.signature(getattr(trainer, name)).parameters
    original = inspect.signature(vars(owner)[name]).parameters
    if not any(p.kind == inspect.Parameter.VAR_POSITIONAL for p in own.values()):
        assert list(own) == list(original)
        assert [p.default for p in own.values()] == [p.default for p in original.values()]


@pytest.mark.parametrize("trainer", OWN)
def test_overrides_are_called(trainer, tmp_path, monkeypatch):
    """Every override really runs: in training with checkpoints and evaluations, on a resume, and when a push comes."""
    calls = Counter()
    for name in overrides(trainer):
        own = next(cls for cls in OWN[trainer] if name in vars(cls))
        original = vars(own)[name]

        def counted(self, *args, _name=name, _original=original, **kwargs):
            calls[_name] += 1
            return _original(self, *args, **kwargs)

        monkeypatch.setattr(own, name, counted)
    monkeypatch.setattr(Trainer, "_push_from_checkpoint", lambda self, folder: None)
    monkeypatch.setattr(Trainer, "init_hf_repo", lambda self, token=None: None)
    is_online = issubclass(ScoreAsActionTrainer, trainer)
    make, data = (reward_harness.trainer, reward_harness.prompts) if is_online else (harness.trainer, harness.dataset)
    options = dict(
        eval_dataset=data(2),
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        load_best_model_at_end=True,
        push_to_hub=True,
        hub_model_id="someone/something",
        hub_base_model_id="someone/base",
    )
    run = make("sd", tmp_path, **{**options, "max_steps": 1})
    monkeypatch.setattr(Trainer, "push_to_hub", lambda self, **kwargs: None)
    run.train()
    run = make("sd", tmp_path, **{**options, "max_steps": 2})
    run.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    run.push_to_hub()
    run.create_model_card()
    run.predict(data(2))
    run.end()
    assert set(calls) == set(overrides(trainer))
    # Pushed at every save, the folder has the weights of that save.
    assert (tmp_path / "pytorch_lora_weights.safetensors").exists()


def test_forward_takes_no_keyword_arguments():
    """`Trainer` would take `**kwargs` for a model that divides its loss by the number of items itself."""
    parameters = inspect.signature(PairedDenoiser.forward).parameters
    assert list(parameters) == ["self", "noisy", "timesteps", "conditioning"]


@pytest.mark.skipif(
    "activation_checkpointing_kwargs" not in TrainingArguments.__dataclass_fields__,
    reason="Transformers 5.17 and 5.18 call `gradient_checkpointing_enable` instead",
)
def test_activation_checkpointing_is_called_by_name():
    """`Trainer` hands these three over by name."""
    parameters = inspect.signature(PairedDenoiser.activation_checkpointing_enable).parameters
    assert list(parameters)[1:] == ["activation_checkpointing_kwargs", "every_n_layers", "offload"]
    source = inspect.getsource(Trainer)
    for name in list(parameters)[1:]:
        assert f"{name}=" in source


def test_what_lets_diffusers_quantise_on_the_cpu():
    """The two methods that are replaced while a 4-bit model is loaded without an accelerator."""
    assert "No GPU found" in inspect.getsource(BnB4BitDiffusersQuantizer.validate_environment)
    assert list(inspect.signature(BnB4BitDiffusersQuantizer.update_device_map).parameters) == ["self", "device_map"]


def test_base_classes():
    """The base of TRL's trainers is a `Trainer`, and its configuration has the defaults that our docstrings name."""
    assert issubclass(_trl.BaseTrainer, Trainer)
    parameters = inspect.signature(_trl.BaseTrainer.create_model_card).parameters
    assert list(parameters) == ["self", "model_name", "dataset_name", "tags"]
    args = _trl.BaseConfig("x", use_cpu=True, bf16=False)
    assert args.logging_steps == 10 and args.gradient_checkpointing is True
