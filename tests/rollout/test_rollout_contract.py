"""
The contract with TRL's GRPO and RLOO trainers: which of their methods the base overrides, that their signatures are
kept, and that each override is really called.
"""

import ast
import dataclasses
import inspect
import textwrap
from collections import Counter

import sampling
import torch
from joint import by_id
from sampling import PLAIN, ROLLOUTS
from torch.utils.data import Sampler
from transformers import Trainer
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer


PARENTS = (GRPOTrainer, RLOOTrainer)
every_method = by_id(ROLLOUTS)
every_plain = by_id(PLAIN)


def own_classes(trainer: type) -> list[type]:
    return [cls for cls in trainer.__mro__ if cls.__module__.startswith("trl_ext.")]


def overrides(trainer: type) -> dict[str, tuple[type, type]]:
    """Methods of ours that TRL or transformers define too: name -> (our class, theirs)."""
    ours = own_classes(trainer)
    theirs = [cls for cls in trainer.__mro__ if cls not in ours and cls is not object]
    found = {}
    for cls in ours:
        for name, value in vars(cls).items():
            owner = next((parent for parent in theirs if name in vars(parent)), None)
            if owner is not None and inspect.isfunction(value) and name not in found:
                found[name] = (cls, owner)
    return found


def test_list_of_overrides():
    """What the base overrides, over either parent: a new override must be added here and be called below."""
    expected = {
        "__init__",
        "_calculate_rewards",
        "_get_train_sampler",
        "_load_from_checkpoint",
        "_load_optimizer_and_scheduler",
        "_push_from_checkpoint",
        "_run_epoch",
        "_save_checkpoint",
        "_save_rng_state",
        "create_model_card",
        "end",
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
        expected.remove("end")
    for method in PLAIN:
        assert set(overrides(method.trainer)) == expected


@every_method
def test_overrides_keep_the_signature(method):
    """An override accepts whatever the original accepts, by position and by name, of both of TRL's trainers."""
    for name, (cls, owner) in overrides(method.trainer).items():
        if name == "__init__":
            continue
        own = inspect.signature(vars(cls)[name]).parameters
        original = inspect.signature(vars(owner)[name]).parameters
        if not any(p.kind == inspect.Parameter.VAR_POSITIONAL for p in own.values()):
            assert list(own) == list(original), name
            assert [p.default for p in own.values()] == [p.default for p in original.values()], name


@every_method
def test_overrides_are_called(method, tiny_folder, tmp_path, monkeypatch):
    """Every override really runs in a small training with evaluation, prediction, saving and a resume."""
    calls = Counter()
    for name, (cls, _) in overrides(method.trainer).items():
        original = vars(cls)[name]

        def counted(self, *args, _name=name, _original=original, **kwargs):
            calls[_name] += 1
            return _original(self, *args, **kwargs)

        monkeypatch.setattr(cls, name, counted)
    for name in ("push_to_hub", "_push_from_checkpoint", "init_hf_repo"):
        monkeypatch.setattr(Trainer, name, lambda self, *args, **kwargs: None)
    trained = sampling.trainer(
        method,
        tiny_folder,
        tmp_path,
        max_steps=2,
        save_strategy="steps",
        save_steps=1,
        push_to_hub=True,
        eval_dataset=sampling.prompts(2, seed=1),
    )
    trained.train()
    trained.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    trained.evaluate()
    trained.predict(trained.eval_dataset)
    trained.save_model()
    trained.end()
    assert set(calls) == set(overrides(method.trainer))
    assert calls["training_step"] == 3 and calls["_load_optimizer_and_scheduler"] == 1


@every_method
def test_no_method_of_trl_is_copied(method):
    """Every override calls `super()`, or the method of the same name, so that a change in TRL arrives here."""
    own = {"create_model_card", "_run_epoch"}  # the card is ours; an epoch is skipped or run as it is
    for name, (cls, _) in overrides(method.trainer).items():
        tree = ast.parse(textwrap.dedent(inspect.getsource(vars(cls)[name])))
        calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
        assert name in own or any(getattr(call.func, "id", "") == "super" for call in calls), name


def test_signatures_of_the_hooks():
    """The methods that methods may override, as `RolloutTrainer` names them, with the arguments that we pass."""
    for parent in PARENTS:
        assert list(inspect.signature(parent._compute_loss).parameters) == ["self", "model", "inputs"]
        assert list(inspect.signature(parent._generate_and_score_completions).parameters) == ["self", "inputs"]
        names = ["self", "inputs", "prompts", "completions", "completion_ids_list"]
        assert list(inspect.signature(parent._calculate_rewards).parameters) == names
        names = ["self", "model", "input_ids", "attention_mask", "logits_to_keep"]
        assert list(inspect.signature(parent._get_per_token_logps_and_entropies).parameters)[:5] == names


@every_plain
def test_attributes_of_a_running_trainer(method, tiny_folder, tmp_path):
    """What the base reads and sets: the sampler's generator, the count of micro-steps, and the buffered window."""
    trained = sampling.trainer(method, tiny_folder, tmp_path, max_steps=1, steps_per_generation=2)
    sampler = trained._get_train_sampler()
    assert isinstance(sampler.sampler, Sampler) and isinstance(sampler.sampler.generator, torch.Generator)
    assert sampler.sampler.shuffle and sampler.sampler.num_samples == 16 and len(sampler) == len(list(sampler))
    trained.train()
    assert trained._step == 1 and len(trained._buffered_inputs) == 2
    rows = trained._buffered_inputs[0]
    assert set(rows) >= {"prompt_ids", "prompt_mask", "completion_ids", "completion_mask", "advantages"}
    assert rows["advantages"].shape == (8,)
    assert set(trained._metrics) == {"train", "eval"} and trained.reward_func_names == ["reward"]


@every_method
def test_configurations_add_to_trls(method):
    """A configuration has every field of its parent with its default; the method's own come with help."""
    parent = GRPOConfig if issubclass(method.config, GRPOConfig) else RLOOConfig
    theirs = {field.name: field.default for field in dataclasses.fields(parent)}
    ours = {field.name: field for field in dataclasses.fields(method.config)}
    other = getattr(method.config, "other_defaults", {})
    assert {name: ours[name].default for name in theirs} == {**theirs, **other}
    for name in set(ours) - set(theirs):
        text = ours[name].metadata["help"]
        assert text and "%" not in text, name
    names = set(ours)
    for cls in method.config.__mro__:
        assert set(vars(cls).get("_refused_options", {})) <= names
        assert set(vars(cls).get("_honored_options", ())) <= names
    assert {name for pair in method.config.dependent_options() for name in pair} <= names


@every_method
def test_constructor_is_trls(method):
    """Explicit and typed: TRL's arguments in its order, then the method's own, keyword-only, with defaults."""
    if method.is_plain:
        return
    ours = list(inspect.signature(method.trainer.__init__).parameters.values())[1:]
    theirs = list(inspect.signature(method.parent.__init__).parameters.values())[1:]
    assert [(p.name, p.default) for p in ours[: len(theirs)]] == [(p.name, p.default) for p in theirs]
    assert all(p.kind is inspect.Parameter.KEYWORD_ONLY for p in ours[len(theirs) :])
    assert all(p.annotation is not inspect.Parameter.empty for p in ours)
    assert all(p.default is not inspect.Parameter.empty for p in ours[len(theirs) :])
