"""
The contract with TRL and transformers: what `trl_ext` leans on, named one by one, so that a new version of either
fails here with a sentence and not in a user's run.
"""

import ast
import dataclasses
import inspect
import subprocess
import sys
from collections import Counter
from pathlib import Path

import harness
import pytest
import rooms
import tiny
import torch
import trl
from methods import METHODS, ONLINE, PRIMARY, WITH_PRECOMPUTE
from peft import LoraConfig, get_peft_model
from transformers import Trainer, TrainerCallback
from trl import DPOConfig, DPOTrainer, GRPOTrainer, RLOOTrainer
from trl.trainer.dpo_trainer import DataCollatorForPreference

import trl_ext
from trl_ext import PreferenceConfig, PreferenceTrainer, _trl
from trl_ext.training.logging import MeteredTrainer
from trl_ext.training.model_card import DocumentedRun
from trl_ext.training.resume import ResumableRun
from trl_ext.training.text_card import DocumentedTextRun


ROOT = Path(__file__).resolve().parent.parent

# Name in `_trl.py` -> the parameters that we pass, in the order in which we pass them by position.
SIGNATURES = {
    "common_prefix_length": ["ids", "other_ids"],
    "add_fused_lm_head": ["model", "temperature", "cast_lm_head_to_fp32", "outputs"],
    "disable_gradient_checkpointing": ["model", "gradient_checkpointing_kwargs"],
    "get_config_model_id": ["config"],
    "get_comet_experiment_url": [],
    "get_trackio_space_url": [],
    "global_then_local_main_first": [],
    "maybe_gather_lm_head_ctx": ["params"],
    "prepare_deepspeed": ["model", "accelerator"],
    "prepare_fsdp": ["model", "accelerator"],
    "pad": ["tensors", "padding_value", "padding_side", "pad_to_multiple_of"],
    "tokenize": ["processing_class", "input", "apply_chat_template_kwargs"],
    "unwrap_model_for_generation": [
        "model",
        "accelerator",
        "gather_deepspeed3_params",
        "generation_kwargs",
        "gradient_checkpointing_kwargs",
    ],
}


# ---- Names, signatures, fields --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SIGNATURES)
def test_private_functions_take_what_we_pass(name):
    """Every private function of TRL that we import has the parameters that we rely on, in this order."""
    assert list(inspect.signature(getattr(_trl, name)).parameters) == SIGNATURES[name]


def test_border_is_covered():
    """Every name that `_trl.py` exports is either ours or has a contract here."""
    ours = {"SUPPORTED_TRL", "TRAINER_INTERNALS", "check_trl_version", "HeadSettings", "fused_head_settings"}
    ours |= {"load_vllm_generation"}  # tests/d2po/test_vllm.py
    kernels = {"ChunkedDivergenceFunction", "ChunkedLogProbFunction", "CHUNKED_LOGPROB_CHUNK_SIZE"}  # below
    bases = {"BaseConfig", "BaseTrainer"}  # tests/diffusion/test_diffusion_contract.py
    classes = {"DataCollatorForPreference"}
    assert set(_trl.__all__) == ours | set(SIGNATURES) | kernels | bases | classes
    assert all(hasattr(_trl, name) for name in _trl.__all__)


def test_kernels_of_the_benchmark():
    """The two kernels that `recipes/benchmarks/paired_head.py` composes take what it passes, by position."""
    first = ["ctx", "hidden", "weight", "bias", "targets", "temperature", "chunk_size", "final_logit_softcapping"]
    parameters = list(inspect.signature(_trl.ChunkedLogProbFunction.forward).parameters)
    assert parameters == [*first, "logit_scale", "outputs"]
    parameters = list(inspect.signature(_trl.ChunkedDivergenceFunction.forward).parameters)
    sides = [f"{side}_{part}" for side in ("student", "teacher") for part in ("hidden", "weight", "bias")]
    assert parameters[:8] == ["ctx", *sides, "beta"]


def test_fused_head_settings():
    """
    TRL's fused head still tells the backbone, the logit scale and the soft-capping that it read from a configuration,
    in the spellings of three families; and asking it leaves the model as it was.
    """
    for options, expected in (
        ({}, ("base_model", 1.0, None)),
        ({"logit_scale": 0.25}, ("base_model", 0.25, None)),
        ({"logits_scaling": 4.0, "final_logit_softcapping": 30.0}, ("base_model", 0.25, 30.0)),
    ):
        model = tiny.model(**options)
        forward = model.forward
        assert _trl.fused_head_settings(model) == expected
        assert model.forward == forward and hasattr(model, expected[0])


def test_dpo_trainer_construction(monkeypatch, tiny_folder, tmp_path):
    """
    `DPOTrainer` adds its fused head, to policy and reference, and hashes the reference, by these names of its module;
    our trainers put one scoring head in the place of the former, do without the latter, and leave the module as it
    was.
    """
    heads, hashes, module = [], [], trl.trainer.dpo_trainer
    original = module.add_fused_lm_head
    monkeypatch.setattr(
        module, "add_fused_lm_head", lambda model, **kwargs: heads.append(model) or original(model, **kwargs)
    )
    monkeypatch.setattr(module, "hash_module", lambda model: hashes.append(model) or "hash")
    theirs = module.add_fused_lm_head
    options = dict(precompute_ref_log_probs=True, max_steps=1)
    trainer = harness.trainer(WITH_PRECOMPUTE[0], tiny_folder, tmp_path / "ours", **options)
    assert not heads and not hashes and module.add_fused_lm_head is theirs
    assert hasattr(trainer.model, "_scoring_head")
    DPOTrainer(
        model=tiny_folder,
        args=DPOConfig(**{**harness.defaults(tmp_path / "trl"), **options}),
        train_dataset=tiny.dataset(4),
    )
    assert heads and len(hashes) == 1


def test_fused_head_convention(tiny_folder):
    """The head's values are shifted onto their targets, fp32, and zero where the label is -100."""
    model = harness.load(tiny_folder).eval()
    ids = torch.tensor([[9, 8, 7, 6, 5], [5, 6, 7, 8, 9]])
    labels = ids.clone()
    labels[:, :3] = -100
    plain = model(ids).logits[:, :-1].log_softmax(-1)
    _trl.add_fused_lm_head(model, outputs=("log_probs", "entropy", "mean_logits", "is_top1"))
    output = model(input_ids=ids, labels=labels, fused_lm_head=True, use_cache=False)
    expected = plain.gather(-1, ids[:, 1:, None]).squeeze(-1)
    expected[:, :2] = 0
    torch.testing.assert_close(output.log_probs, expected, rtol=1e-5, atol=1e-5)
    entropy = -(plain.exp() * plain).sum(-1)
    entropy[:, :2] = 0
    torch.testing.assert_close(output.entropy, entropy, rtol=1e-5, atol=1e-5)
    assert output.log_probs.shape == output.mean_logits.shape == output.is_top1.shape == (2, 4)
    assert torch.equal(output.is_top1[:, 2:], (plain.argmax(-1) == ids[:, 1:])[:, 2:])


def test_batch_of_the_collator():
    """Keys and layout of a batch: chosen rows first, right padding, the completion marked."""
    collator = DataCollatorForPreference(pad_token_id=0)
    rows = [
        {"prompt_ids": [1, 2, 3], "chosen_ids": [4, 5], "rejected_ids": [6]},
        {"prompt_ids": [7, 8], "chosen_ids": [9], "rejected_ids": [10, 11]},
    ]
    batch = collator(rows)
    assert set(batch) == {"input_ids", "attention_mask", "completion_mask"}
    assert batch["input_ids"].tolist() == [[1, 2, 3, 4, 5], [7, 8, 9, 0, 0], [1, 2, 3, 6, 0], [7, 8, 10, 11, 0]]
    assert batch["completion_mask"].tolist() == [[0, 0, 0, 1, 1], [0, 0, 1, 0, 0], [0, 0, 0, 1, 0], [0, 0, 1, 1, 0]]
    precomputed = [{**row, "ref_chosen_logps": -1.0, "ref_rejected_logps": -2.0} for row in rows]
    assert set(collator(precomputed)) == set(batch) | {"ref_chosen_logps", "ref_rejected_logps"}


# ---- Sharded models -------------------------------------------------------------------------------------------------


def test_generation_of_sharded_models():
    """
    `generate` goes on until every process is done if the model has an attribute, which PyTorch sets on what FSDP2
    shards (`test_sharded.py` has the processes); `_patches.generation_apart` takes it away for a while, of an adapted
    model and of its base.
    """
    from torch.distributed.fsdp import fully_shard
    from transformers.integrations.fsdp import is_fsdp_managed_module

    from trl_ext._patches import generation_apart

    assert "managed_module._is_fsdp_managed_module = True" in inspect.getsource(inspect.unwrap(fully_shard))
    model = tiny.model()
    adapted = get_peft_model(model, LoraConfig(r=2))
    model._is_fsdp_managed_module = adapted._is_fsdp_managed_module = True
    with generation_apart(adapted):
        assert not is_fsdp_managed_module(model) and not is_fsdp_managed_module(adapted)
    assert is_fsdp_managed_module(model) and is_fsdp_managed_module(adapted)
    assert "is_fsdp_managed_module(self)" in inspect.getsource(type(model)._extract_generation_mode_kwargs)


# ---- Attention of packed rows --------------------------------------------------------------------------------------


def test_registries_of_attention_and_masks():
    """
    `_patches.wrap_attention_functions` and `_patches.mask_functions_replaced`: models of transformers find their
    attention function, the eager one too, by `get_interface` at each forward, and their masks in the other registry,
    which is called with these keywords; both are undone, or inert, outside.
    """
    from transformers import masking_utils
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface

    from trl_ext._patches import mask_functions_replaced, wrap_attention_functions
    from trl_ext.training.shared_prompt import _with_rows

    assert list(inspect.signature(AttentionInterface.get_interface).parameters) == [
        "self",
        "attn_implementation",
        "default",
    ]
    wrap_attention_functions(_with_rows)
    once = AttentionInterface.get_interface
    wrap_attention_functions(_with_rows)
    assert AttentionInterface.get_interface is once
    assert ALL_ATTENTION_FUNCTIONS.get_interface("eager", len).__wrapped__ is len

    seen = []

    def replace(make):
        return lambda *args, **kwargs: seen.append((args, kwargs)) or make(*args, **kwargs)

    masks = masking_utils.ALL_MASK_ATTENTION_FUNCTIONS
    before = {name: masks[name] for name in masks}
    for implementation in ("eager", "sdpa"):
        model = tiny.model()
        model.set_attn_implementation(implementation)
        with mask_functions_replaced(replace):
            model(input_ids=torch.ones(1, 3, dtype=torch.long))
        (args, kwargs), *others = seen
        assert not args and not others
        assert {"batch_size", "q_length", "kv_length", "mask_function", "attention_mask", "use_vmap"} <= set(kwargs)
        seen.clear()
    assert {name: masks[name] for name in masks} == before


def test_mask_functions_that_are_the_same_for_every_row():
    """Known by how transformers composes them: causal, windows and chunks; anything else is not."""
    from transformers import masking_utils as m

    from trl_ext.training.shared_prompt import _is_the_same_for_every_row as same

    causal, zeros = m.causal_mask_function, torch.zeros(1, dtype=torch.long)
    chunks = m.chunked_causal_mask_function(4, zeros)
    assert same(causal) and same(m.sliding_window_causal_mask_function(4)) and same(chunks)
    for other in (
        m.bidirectional_mask_function,
        m.sliding_window_bidirectional_mask_function(4),
        m.sliding_window_overlay(4),
        m.or_masks(causal, m.blockwise_overlay(zeros[None])),
        m.and_masks(causal, m.padding_mask_function(zeros[None])),
        m.and_masks(causal, lambda *places: True),
        m.packed_sequence_mask_function(zeros[None]),
    ):
        assert not same(other)


@pytest.mark.parametrize(
    "path",
    [
        "transformers.modeling_utils.AttentionInterface.get_interface",
        "transformers.masking_utils.ALL_MASK_ATTENTION_FUNCTIONS",
        "transformers.masking_utils.causal_mask_function",
        "transformers.modeling_utils.PreTrainedModel._is_stateful",
    ],
)
def test_a_transformers_that_moves_them_trains_on_padded_rows(path, monkeypatch):
    """... and says so in a sentence."""
    from trl_ext.preference.scoring import score_tokens
    from trl_ext.training.scoring_head import add_scoring_head
    from trl_ext.training.shared_prompt import SharedPrompts

    model, messages = tiny.model(), []
    add_scoring_head(model)
    ids = torch.tensor([[5, 6, 7, 8], [5, 6, 9, 0]])
    inputs = {
        "input_ids": ids,
        "attention_mask": (ids > 0).long(),
        "completion_mask": torch.tensor([[0, 0, 1, 1], [0, 0, 1, 0]]),
    }
    shared = SharedPrompts(report=messages.append)
    monkeypatch.delattr(path)
    shared.check(model, inputs, lambda rows: score_tokens(model, inputs, rows=rows).log_probs.detach())
    monkeypatch.undo()
    assert shared.rows(model, inputs) is None and path.rpartition(".")[2] in messages[0]


# ---- The trainers ---------------------------------------------------------------------------------------------------


def parameters(function) -> list[inspect.Parameter]:
    return list(inspect.signature(function).parameters.values())[1:]


def test_constructor_is_trls():
    """`PreferenceTrainer` takes `DPOTrainer`'s arguments, in its order, with its defaults."""
    ours, theirs = parameters(PreferenceTrainer.__init__), parameters(DPOTrainer.__init__)
    assert [p.name for p in ours] == [p.name for p in theirs]
    assert [p.default for p in ours] == [p.default for p in theirs]


@pytest.mark.parametrize(
    "trainer", dict.fromkeys(method.trainer for method in [*METHODS, *ONLINE]), ids=lambda trainer: trainer.__name__
)
def test_leaf_constructors_are_trls(trainer):
    """
    Explicit and typed: `DPOTrainer`'s arguments in its order, then the method's own, keyword-only, with defaults.
    """
    ours, theirs = parameters(trainer.__init__), parameters(DPOTrainer.__init__)
    assert [(p.name, p.default) for p in ours[: len(theirs)]] == [(p.name, p.default) for p in theirs]
    assert all(p.kind is inspect.Parameter.KEYWORD_ONLY for p in ours[len(theirs) :])
    assert all(p.annotation is not inspect.Parameter.empty for p in ours)
    assert all(p.default is not inspect.Parameter.empty for p in ours[len(theirs) :])


OURS = (PreferenceTrainer, DocumentedTextRun, DocumentedRun, ResumableRun, MeteredTrainer)


def overrides() -> dict[str, type]:
    """Methods and properties of ours that a class of TRL or transformers defines too, and the class that does."""
    found = {}
    for own in OURS:
        for name, value in vars(own).items():
            owner = next((b for b in PreferenceTrainer.__mro__ if b not in OURS and name in vars(b)), None)
            if owner is not None and owner is not object and callable(value):
                found[name] = owner
    return found


def definer(name: str) -> type:
    """Our class that defines `name`, the first that is asked."""
    return next(own for own in OURS if name in vars(own))


def test_list_of_overrides():
    """What `PreferenceTrainer` overrides, and whose: a new override must be added here and be called below."""
    found = {name: owner.__name__ for name, owner in overrides().items()}
    found.setdefault("end", "Trainer")  # which Transformers 5.17 does not have
    assert found == {
        "__init__": "DPOTrainer",
        "compute_loss": "DPOTrainer",
        "log": "DPOTrainer",
        "training_step": "DPOTrainer",
        "train": "Trainer",
        "_save_checkpoint": "DPOTrainer",
        "_prepare_dataset": "DPOTrainer",
        "_set_signature_columns_if_needed": "DPOTrainer",
        "_precompute_ref_logps": "DPOTrainer",
        "evaluate": "DPOTrainer",
        "evaluation_loop": "Trainer",
        "predict": "Trainer",
        "end": "Trainer",
        "create_model_card": "_BaseTrainer",
        "save_model": "Trainer",
        "_run_epoch": "Trainer",
        "_save_rng_state": "Trainer",
        "_get_train_sampler": "Trainer",
        "_get_eval_sampler": "Trainer",
        "_load_from_checkpoint": "Trainer",
        "_push_from_checkpoint": "Trainer",
        "push_to_hub": "Trainer",
    }


@pytest.mark.parametrize("name, owner", [(n, o) for n, o in overrides().items() if n != "__init__"])
def test_overrides_keep_the_signature(name, owner):
    """An override accepts whatever the original accepts, by position and by name."""
    own = inspect.signature(vars(definer(name))[name]).parameters
    original = inspect.signature(vars(owner)[name]).parameters
    if not any(p.kind == inspect.Parameter.VAR_POSITIONAL for p in own.values()):
        assert list(own) == list(original)
        assert [p.default for p in own.values()] == [p.default for p in original.values()]


@pytest.mark.parametrize("method", PRIMARY, ids=lambda method: method.id)
def test_overrides_are_called(method, tiny_folder, tmp_path, monkeypatch):
    """Every override really runs in a small training with evaluation, prediction and saving."""
    calls = Counter()
    for name in overrides():
        original = vars(definer(name))[name]

        def counted(self, *args, _name=name, _original=original, **kwargs):
            calls[_name] += 1
            return _original(self, *args, **kwargs)

        monkeypatch.setattr(definer(name), name, counted)
    for name in ("push_to_hub", "_push_from_checkpoint", "init_hf_repo"):
        monkeypatch.setattr(Trainer, name, lambda self, *args, **kwargs: None)
    trainer = harness.trainer(
        method,
        tiny_folder,
        tmp_path,
        max_steps=2,
        gradient_accumulation_steps=2,
        save_strategy="steps",
        save_steps=2,
        push_to_hub=True,
        eval_dataset=tiny.dataset(4, seed=1),
        **({"precompute_ref_log_probs": True} if method in WITH_PRECOMPUTE else {}),
    )
    trainer.train()
    assert calls["training_step"] == calls["compute_loss"] == 4
    trainer.evaluate()
    assert calls["compute_loss"] == 5
    trainer.predict(trainer.eval_dataset)
    assert calls["compute_loss"] == 6
    trainer.save_model()
    trainer.train(resume_from_checkpoint=True)  # of the last step: nothing is left to be trained
    assert calls["compute_loss"] == 6
    trainer.end()
    expected = set(overrides()) - (set() if method in WITH_PRECOMPUTE else {"_precompute_ref_logps"})
    assert set(calls) == expected
    assert calls["_save_checkpoint"] == 1 and calls["train"] == 2 and calls["log"] >= 4


def test_attributes_of_a_running_trainer(tiny_folder, tmp_path):
    """The attributes of TRL's and transformers' trainers that we read or set exist while training runs."""
    names = ("_tr_loss", "_globalstep_last_logged", "_total_loss_scalar")  # transformers
    names += ("_metrics", "_tp_size", "_tokenizer", "_is_vision_dataset", "_precompute_engine", "ref_model")
    names += ("precompute_ref_logps", "aux_loss_enabled", "router_aux_loss_coef", "beta")
    present = {}

    class Look(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            present.update({name: getattr(trainer, name, "missing") for name in names})

    trainer = harness.trainer(METHODS[0], tiny_folder, tmp_path, callbacks=[Look()], max_steps=1)
    trainer.train()
    assert set(present) == set(names) and "missing" not in [v for v in present.values() if isinstance(v, str)]
    assert isinstance(present["_tr_loss"], torch.Tensor) and isinstance(present["_total_loss_scalar"], float)
    assert isinstance(present["_globalstep_last_logged"], int)
    assert set(present["_metrics"]) == {"train", "eval"}


def test_trl_still_logs_from_metrics():
    """`DPOTrainer.log` averages and clears `_metrics`, and `Trainer.train` is the entry that we wrap."""
    source = inspect.getsource(DPOTrainer.log)
    assert "self._metrics[mode]" in source and ".clear()" in source
    assert PreferenceTrainer.train is not Trainer.train
    assert DPOTrainer.train is Trainer.train


def test_configurations_add_to_trls():
    """
    A configuration has every field of `DPOConfig` with its default, but for those listed here, which its docstring
    states; the method's own come with help.
    """
    other_defaults = {"RainbowPOConfig": {"beta": 10.0}}  # an argument per token is a hundred times smaller
    theirs = {field.name: field.default for field in dataclasses.fields(DPOConfig)}
    for config in {PreferenceConfig} | {method.config for method in METHODS}:
        ours = {field.name: field for field in dataclasses.fields(config)}
        other = other_defaults.get(config.__name__, {})
        assert {name: ours[name].default for name in theirs} == {**theirs, **other}
        assert all(
            f"{name} (`float`, *optional*, defaults to `{value}`)" in config.__doc__ for name, value in other.items()
        )
        for name in set(ours) - set(theirs):
            text = ours[name].metadata["help"]
            assert text and "%" not in text, f"{config.__name__}.{name}"  # argparse would choke on a percent sign


def test_refused_options_are_options():
    """Every option that a method refuses, honors or ties to another is a field, so no refusal is dead."""
    for config in {PreferenceConfig} | {method.config for method in METHODS}:
        names = {field.name for field in dataclasses.fields(config)}
        for cls in config.__mro__:
            assert set(vars(cls).get("_refused_options", {})) <= names
            assert set(vars(cls).get("_honored_options", ())) <= names
        assert {name for pair in config.dependent_options() for name in pair} <= names


# ---- Versions and imports -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", ["1.16.0", "1.16.3", "1.16.1.dev0", trl.__version__])
def test_supported_versions(version):
    """Every release of the supported minor, and development versions after the first, is accepted."""
    _trl.check_trl_version(version)


@pytest.mark.parametrize("version", ["1.15.0", "1.17.0", "2.0.0", "0.29.0"])
def test_unsupported_versions(version):
    """Any other minor is refused, with what is installed, what is supported, and the command that helps."""
    with pytest.raises(ImportError, match=rf'trl {version} is installed.*pip install "trl.*1\.16'):
        _trl.check_trl_version(version)


def imports_of(path: Path) -> set[tuple[str, str]]:
    """(module, name) of every import of TRL in a file, at any depth."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level == 0 and node.module.split(".")[0] == "trl":
            found |= {(node.module, alias.name) for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {(alias.name, "") for alias in node.names if alias.name.split(".")[0] == "trl"}
    return found


def test_only_the_border_imports_private_names():
    """Outside `_trl.py`, only names that `trl` exports at its top level are imported from it."""
    files = [path for folder in ("trl_ext", "recipes") for path in (ROOT / folder).rglob("*.py")]
    assert len(files) > 20
    for path in files:
        if path.name == "_trl.py":
            continue
        for module, name in imports_of(path):
            assert module == "trl", f"{path.relative_to(ROOT)} imports {module}; import it in trl_ext/_trl.py"
            assert not name or name in trl.__all__ or name in dir(trl), f"{path.relative_to(ROOT)}: trl.{name}"


def test_import_is_lazy():
    """`import trl_ext`, its version and its names cost no heavy import."""
    code = "import sys, trl_ext; trl_ext.__version__; dir(trl_ext); print(sorted({'torch', 'trl', 'transformers'} & "
    code += "set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and done.stdout.strip() == "[]", done


def test_public_names():
    """Every public name imports, and a wrong one is answered with those there are."""
    for name in trl_ext.__all__:
        assert getattr(trl_ext, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'TDPOTrainr'.*Public names: .*FDPOTrainer"):
        trl_ext.TDPOTrainr  # noqa: B018


def private_names_of_trainers() -> set[str]:
    """Private methods of TRL's and Transformers' trainers, and private attributes that they set on themselves."""
    names = set()
    for cls in {parent for trainer in (DPOTrainer, GRPOTrainer, RLOOTrainer) for parent in trainer.__mro__}:
        if cls.__module__.split(".")[0] in ("trl", "transformers"):
            names |= set(vars(cls))
            for node in ast.walk(ast.parse(inspect.getsource(sys.modules[cls.__module__]))):
                if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
                    if isinstance(node.value, ast.Name) and node.value.id == "self":
                        names.add(node.attr)
    return {name for name in names if name.startswith("_") and not name.startswith("__")}


def test_internals_of_trainers_are_listed():
    """
    `_trl.TRAINER_INTERNALS` is what the code overrides or reads of the trainers' private names, and these still exist.
    """
    theirs, used = private_names_of_trainers(), set()
    assert set(_trl.TRAINER_INTERNALS) <= theirs
    for path in rooms.files():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute):
                owner = node.value
                is_super = isinstance(owner, ast.Call) and getattr(owner.func, "id", "") == "super"
                if is_super or (isinstance(owner, ast.Name) and owner.id in ("self", "trainer")):
                    used.add(node.attr)
            elif isinstance(node, ast.ClassDef) and (
                "Trainer" in node.name or "Resum" in node.name or "Logg" in node.name
            ):
                used |= {item.name for item in node.body if isinstance(item, ast.FunctionDef)}
    assert used & theirs == set(_trl.TRAINER_INTERNALS)
