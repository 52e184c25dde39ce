"""
Models whose parameters are spread over processes: FSDP2, DeepSpeed ZeRO.

By default one method of each kind trains under FSDP2; `--runslow` has all of them, and with DeepSpeed installed
(`pip install deepspeed`; `DS_ACCELERATOR=cpu` is set here) all of them under ZeRO-2 and ZeRO-3.
"""

import dataclasses
import json
import os
import re
import sys
import types
from pathlib import Path

import engines
import harness
import methods
import numpy as np
import pytest
import sampling
import tiny
import torch
from launching import fork, launch
from peft import PeftModel
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, Trainer

from trl_ext.wro import add_anchors


TESTS = Path(__file__).parent
sys.path[:0] = [str(TESTS / name) for name in ("scripts", "diffusion", "d2po")]

import diffusion_harness  # noqa: E402
import online  # noqa: E402
import reward_harness  # noqa: E402
import run_engine  # noqa: E402


@pytest.mark.parametrize("head", ["frozen", "trained"])
def test_sharded_heads(head):
    """
    FSDP2: both models' heads sharded, in two processes: values, gradients, and at most one head gathered by hand.
    """
    printed = fork(TESTS / "scripts" / "sharded_heads.py", head)
    assert printed.count("sharded heads agree") == 2


def test_encoders_are_read_by_every_process(tmp_path):
    """
    `fsdp_cpu_ram_efficient_loading` has the main process read for all; text encoders, which nothing shards, would not
    be sent to the others.
    """
    diffusion_harness.tiny_pipelines.pipeline("sd").save_pretrained(tmp_path)
    assert fork(TESTS / "scripts" / "read_by_all.py", str(tmp_path)).count("read by all") == 2


@dataclasses.dataclass(frozen=True)
class Case:
    """
    A method under an engine: its kind and id, as `scripts/run_engine.py` takes them, the rows of a step over all
    processes, and the logged values that are compared (all but those of Transformers by default), within tolerances.
    """

    kind: str
    method: str
    rows: int = 4
    names: tuple[str, ...] | None = None
    rtol: float = 1e-4
    atol: float = 5e-6
    full: dict = dataclasses.field(default_factory=dict)  # of the run that trains all weights
    lora: dict = dataclasses.field(default_factory=dict)  # of the run that trains an adapter

    def options(self, processes: int) -> dict:
        sizes = dict.fromkeys(("per_device_train_batch_size", "per_device_eval_batch_size"), self.rows // processes)
        # AdamW divides by tiny second moments, which magnifies rounding.
        return dict(sizes, max_steps=4, save_strategy="steps", save_steps=2, adam_epsilon=1e-3)

    def compare(self, one: list[dict], other: list[dict]) -> None:
        for a, b in zip(one, other, strict=True):
            assert a.keys() == b.keys()
            for key in a.keys() - {"train_loss", "eval_loss" if self.kind == "sampling" else ""}:
                if self.names is None or key.removeprefix("eval_") in self.names:
                    # TRL's mean over tokens counts the rows that fill up the last batch of an evaluation.
                    if self.names is None or key != "eval_entropy":
                        assert b[key] == pytest.approx(a[key], rel=self.rtol, abs=self.atol), key


COMMON = ("loss", "reward", "rewards/reward/mean", "entropy", "num_tokens")
CASES = [Case("paired", method.id) for method in methods.PRIMARY]
CASES += [
    Case(
        "sampling",
        method.id,
        rows=16,
        names=COMMON + method.metrics,
        # A separate reference is sharded, so WRO cannot sample its anchors from it.
        full={"options": {"anchors": "self", "num_anchors": 4} if method.id == "wro" else {"beta": 0.1}},
    )
    for method in sampling.PRIMARY
    if not method.is_plain and method.id not in methods.BY_ID
]
CASES += [
    Case(
        "online",
        "d2po",
        # Rows without an order stay in a batch, or fill it up, and count in the means over rows.
        names=("loss", "d2po/gold_labels", "d2po/gold_reward", "d2po/silver_share", "d2po/discriminator_loss"),
        full={"options": {"discriminator": "self"}},
        lora={"options": {"discriminator_lora_dropout": 0.0, "discriminator_learning_rate": 1e-3}},
    )
]
# `beta` multiplies differences of errors by thousands, and rounding with them.
VALIDATION = {"validation_prompts": ["a thin one"], "validation_steps": 2, "validation_inference_steps": 2}
IMAGES = [
    Case(
        "images",
        name,
        names=("loss",),
        rtol=2e-3,
        atol=2e-4,
        full={"options": VALIDATION},
        lora={"options": VALIDATION},
    )
    for name in ("DiffusionDPO", "DSPO")
]
# Chains, and the reference's rewards, are sampled with whole weights; the loss is beta times their KL.
REWARDS = Case(
    "rewards",
    "ScoreAsAction",
    names=("loss", "policy_kl", "kl", "reward", "reward/gain"),
    rtol=2e-3,
    atol=2e-5,
    full={"options": VALIDATION},
    lora={"options": {**VALIDATION, "value_network": "latent"}},
)
OF_PIPELINES = ("images", "rewards")
GRID = Path("validation", "step-2.png")
BY_DEFAULT = {"tdpo", "fdpg", "d2po", "DiffusionDPO"}


def nearby(folder, scale: float = 0.02):
    """The tiny model a little displaced: a reference whose log ratios to the policy are not zero."""
    model = harness.load(folder)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(scale * torch.randn(parameter.shape, generator=generator))
    return model


def run_here(plan: dict) -> None:
    run_engine.main(json.dumps(plan))


def check_engine(engine: str, case: Case, model: str, folder: Path) -> None:
    """
    Two processes under an engine are one process on the same global batch, by every logged value and every weight:
    all weights trained, and an adapter, which is also the reference when it is off. Stopped and resumed they are
    bitwise what they are uninterrupted, and what they save loads in one process.
    """

    def plan(name: str, engine: str, processes: int) -> dict:
        base = {"kind": case.kind, "method": case.method, "evaluate": True, "save": True}
        base["model"] = "sd" if case.kind in OF_PIPELINES else model
        options, runs = case.options(processes), []
        for part, own in (("full", case.full), ("lora", {"lora": True, **case.lora})):
            own = {
                **base,
                **own,
                "options": {**options, **own.get("options", {})},
                "folder": f"{folder}/{name}-{part}",
            }
            runs.append(own)
            if processes > 1:  # resumed in the middle, to the same end
                checkpoint = f"{own['folder']}/checkpoint-2"
                runs.append({**own, "resume": checkpoint, "folder": f"{own['folder']}-resumed"})
        return {"engine": engine, "runs": runs}

    if case.kind == "paired" and methods.BY_ID[case.method].needs_reference:
        nearby(model).save_pretrained(folder / "reference")
        case = dataclasses.replace(case, full={**case.full, "reference": f"{folder}/reference"})
    run_here(plan("one", "none", 1))
    fork(engines.SCRIPT, json.dumps(plan("two", engine, 2)))
    for part in ("full", "lora"):
        (weights, one), (two_weights, two) = (engines.result(folder / f"{name}-{part}") for name in ("one", "two"))
        assert (one["processes"], two["processes"]) == (1, 2)
        assert two["engine"] == {"fsdp2": "FSDP"}.get(engine, "DEEPSPEED")
        if engine != "zero2":  # whose parameters are whole
            assert two["sharded"] == two["parameters"] > 0 and two["sharded_reference"] in (None, True)
        case.compare(one["logs"], two["logs"])
        assert harness.largest_difference(weights, two_weights) < 1e-5
        resumed_weights, resumed = engines.result(folder / f"two-{part}-resumed")
        assert harness.largest_difference(two_weights, resumed_weights) == 0
        harness.assert_same_logs(two["logs"], resumed["logs"])
        check_loads(case, model, folder / f"two-{part}" / "final", two_weights)
        if case.kind in OF_PIPELINES:  # sampled with whole weights, in the middle of training
            grids = [np.asarray(Image.open(folder / f"{name}-{part}" / GRID), float) for name in ("one", "two")]
            assert grids[0].shape == grids[1].shape and np.abs(grids[0] - grids[1]).max() <= 1


def check_loads(case: Case, model: str, final: Path, weights: dict[str, torch.Tensor]) -> None:
    """What was saved, loaded in one process, has the trained weights."""
    if case.kind in OF_PIPELINES:
        lora = final / "pytorch_lora_weights.safetensors"
        saved = load_file(lora if lora.exists() else final / "unet" / "diffusion_pytorch_model.safetensors")
        trained = {name for name in weights if "lora_" in name or not lora.exists()}
        assert len(saved) == len(trained) > 0
        by_value = sorted(value.double().sum().item() for value in saved.values())
        assert by_value == sorted(weights[name].double().sum().item() for name in trained)
        return
    if (final / "adapter_config.json").exists():
        loaded = PeftModel.from_pretrained(harness.load(model), final)
    else:
        loaded = AutoModelForCausalLM.from_pretrained(final, dtype=torch.float32)
    own = harness.weights(loaded)
    assert own.keys() <= weights.keys()
    assert all(torch.equal(value, weights[name]) for name, value in own.items())


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, id=case.method, marks=() if case.method in BY_DEFAULT else pytest.mark.slow)
        for case in [*CASES, *IMAGES, REWARDS]
    ],
)
def test_fsdp2(case, tiny_folder, tmp_path):
    check_engine("fsdp2", case, tiny_folder, tmp_path)


@pytest.mark.slow
def test_precomputed_reference(tiny_folder, tmp_path):
    """FSDP2: the statistics of a reference are computed before anything is sharded, and then no reference is kept."""
    precomputed = {"options": {"precompute_ref_log_probs": True}}
    check_engine("fsdp2", Case("paired", "fdpo", full=precomputed, lora=precomputed), tiny_folder, tmp_path)


@pytest.mark.slow
@engines.needs_deepspeed
@pytest.mark.parametrize("case", CASES + IMAGES, ids=lambda case: case.method)
def test_zero2(case, tiny_folder, tmp_path, monkeypatch):
    monkeypatch.setitem(os.environ, "DS_ACCELERATOR", "cpu")
    check_engine("zero2", case, tiny_folder, tmp_path)


@pytest.mark.slow
@engines.needs_deepspeed
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.method)
def test_zero3(case, tiny_folder, tmp_path, monkeypatch):
    monkeypatch.setitem(os.environ, "DS_ACCELERATOR", "cpu")
    if case.method in ("d2po", "wro"):  # whose discriminator has no parameters, and whose anchors are not sampled
        case = dataclasses.replace(case, lora=case.full)
    check_engine("zero3", case, tiny_folder, tmp_path)


@pytest.fixture
def engine_is(monkeypatch):
    """Has trainers find themselves under an engine: `fsdp1`, `fsdp2`, or a stage of ZeRO."""
    prepare = Trainer.create_accelerator_and_postprocess

    def choose(engine: str, **plugin_options) -> None:
        def create_accelerator_and_postprocess(self):
            prepare(self)
            self.is_fsdp_enabled, self.is_deepspeed_enabled = (engine.startswith(name) for name in ("fsdp", "zero"))
            if engine == "fsdp2":
                monkeypatch.setattr(type(self.accelerator), "is_fsdp2", True)
                plugin = types.SimpleNamespace(fsdp_version=2, **plugin_options)
                monkeypatch.setattr(type(self.accelerator.state), "fsdp_plugin", plugin, raising=False)
            if engine.startswith("zero"):
                plugin = types.SimpleNamespace(zero_stage=int(engine[-1]))
                monkeypatch.setattr(type(self.accelerator.state), "deepspeed_plugin", plugin, raising=False)

        monkeypatch.setattr(Trainer, "create_accelerator_and_postprocess", create_accelerator_and_postprocess)

    return choose


@pytest.mark.parametrize("engine, named", [("fsdp1", "FSDP1.*Use FSDP2"), ("zero3", "ZeRO-3.*Use ZeRO-2 or FSDP2")])
def test_a_discriminator_that_cannot_learn_is_refused(engine, named, engine_is, tiny_folder, tmp_path):
    """D2PO, in the constructor: an adapter that FSDP1 would flatten, parameters that ZeRO-3 would leave partitioned."""
    engine_is(engine)
    with pytest.raises(ValueError, match=f"`discriminator='adapter'` is not supported under.*{named}"):
        online.trainer(tiny_folder, tmp_path, labeller=online.CountedLabeller())


def test_anchors_of_a_sharded_reference_are_refused(tiny_folder):
    """WRO: one process would sample, and wait for the others' shards, as they wait for its anchors."""
    model = harness.load(tiny_folder)
    next(model.parameters()).ds_id = 0  # as DeepSpeed ZeRO-3 marks what it has partitioned
    with pytest.raises(ValueError, match="weights are sharded.*`trl_ext.wro.add_anchors`"):
        add_anchors(sampling.prompts(2), model, tiny.tokenizer())


@pytest.mark.parametrize("engine, named", [("fsdp1", "FSDP1"), ("zero3", "DeepSpeed ZeRO-3")])
def test_images_refuse_other_shards(engine, named, engine_is, tmp_path):
    """In the constructor; FSDP2 is not refused, nor ZeRO-2, whose processes hold whole weights."""
    engine_is(engine)
    with pytest.raises(ValueError, match=f"{named} is not supported by `DiffusionDPOTrainer`.*Use FSDP2"):
        diffusion_harness.trainer("sd", tmp_path)


def test_rewards_refuse_deepspeed(engine_is, tmp_path):
    """Score as Action, in the constructor: its micro-batches have several backwards."""
    engine_is("zero2")
    with pytest.raises(ValueError, match="DeepSpeed is not supported by `ScoreAsActionTrainer`.*FSDP2"):
        reward_harness.trainer("sd", tmp_path)


@pytest.mark.parametrize(
    "options, named",
    [({"use_ema": True}, "`use_ema=True`"), ({"state": "SHARDED_STATE_DICT"}, "`fsdp_state_dict_type`.*SHARDED")],
)
def test_images_refuse_options_of_whole_weights(options, named, engine_is, tmp_path):
    """FSDP2, in the constructor: an average that would be made of whole weights, checkpoints that are shards."""
    options = dict(options)
    engine_is("fsdp2", state_dict_type=options.pop("state", "FULL_STATE_DICT"))
    with pytest.raises(ValueError, match=named):
        diffusion_harness.trainer("sd", tmp_path, **options)


def different_lengths(model: str, folder: Path, **options) -> dict:
    """A run whose samples all end at once in the first process, and never in the second."""
    run = {"kind": "sampling", "method": "fdpg", "model": model, "folder": str(folder), "fixed": False}
    run["ends"] = [list(range(384)), [tiny.tokenizer().eos_token_id]]
    run["options"] = dict(per_device_train_batch_size=4, max_steps=3, max_completion_length=24, **options)
    return run


def test_samples_of_different_lengths(tiny_folder, tmp_path):
    """FSDP2: samples that end early in one process and late in the other are generated by both together."""
    fork(engines.SCRIPT, json.dumps({"engine": "fsdp2", "runs": [different_lengths(tiny_folder, tmp_path)]}))
    _, result = engines.result(tmp_path)
    assert result["sharded"] == result["parameters"] and result["engine"] == "FSDP"


def test_samples_of_different_lengths_wait_for_each_other(tiny_folder, tmp_path):
    """Without Transformers' synchronization one process is sent what it does not expect, or waits for `ddp_timeout`."""
    run = {**different_lengths(tiny_folder, tmp_path, ddp_timeout=5), "unsynchronized": True}
    with pytest.raises(AssertionError, match="(?is)exit statuses.*gloo"):
        fork(engines.SCRIPT, json.dumps({"engine": "fsdp2", "runs": [run]}))


def test_a_process_that_is_gone(tiny_folder, tmp_path):
    """FSDP2: when a process is gone, the other ends with an error within seconds: it does not wait for `ddp_timeout`."""
    run = {"kind": "paired", "method": "simper", "model": tiny_folder, "folder": str(tmp_path), "leaves_at": 1}
    run["options"] = dict(per_device_train_batch_size=2, max_steps=4, ddp_timeout=100)
    printed = fork(engines.SCRIPT, json.dumps({"engine": "fsdp2", "runs": [run]}))
    assert float(re.search(r"left alone for ([\d.]+) s", printed)[1]) < 50


@pytest.mark.slow
def test_uneven_batches_and_accumulation(tiny_folder, tmp_path):
    """
    FSDP2 logs what plain data parallelism logs where the last batch of an epoch is smaller and the last step of it
    accumulates fewer batches.
    """
    options = dict(per_device_train_batch_size=2, gradient_accumulation_steps=2, max_steps=5, adam_epsilon=1e-3)
    run = {"kind": "paired", "method": "fdpo", "model": tiny_folder, "rows": 11, "evaluate": True, "options": options}
    for engine in ("none", "fsdp2"):
        plan = {"engine": engine, "runs": [{**run, "folder": str(tmp_path / engine)}]}
        fork(engines.SCRIPT, json.dumps(plan))
    (weights, plain), (sharded_weights, sharded) = (engines.result(tmp_path / name) for name in ("none", "fsdp2"))
    assert (plain["engine"], sharded["engine"]) == ("MULTI_CPU", "FSDP")
    harness.assert_same_logs(plain["logs"], sharded["logs"], rtol=1e-4, atol=5e-6)
    assert harness.largest_difference(weights, sharded_weights) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("storage", ["uint8", "float32"])
def test_qlora(storage, tiny_folder, tmp_path):
    """
    FSDP2 with weights in 4 bit: sharded if they are stored as floats, whole on every process if as bytes; either way
    two processes are one.
    """
    run = {
        "kind": "paired",
        "method": "fdpo",
        "model": tiny_folder,
        "lora": True,
        "storage": storage,
        "evaluate": True,
    }
    for name, engine, size in (("one", "none", 4), ("two", "fsdp2", 2)):
        options = dict(per_device_train_batch_size=size, max_steps=4, adam_epsilon=1e-3)
        plan = {"engine": engine, "runs": [{**run, "folder": str(tmp_path / name), "options": options}]}
        fork(engines.SCRIPT, json.dumps(plan), processes=4 // size)
    (weights, one), (two_weights, two) = (engines.result(tmp_path / name) for name in ("one", "two"))
    quantized = sum(weight.dtype == torch.uint8 for weight in weights.values())
    assert two["engine"] == "FSDP" and two["sharded"] == two["parameters"] - quantized
    assert (quantized > 0) == (storage == "uint8")
    # TRL trains the adapter of a model in 4 bit in bfloat16, whose last place the difference is.
    Case("paired", "fdpo", rtol=1e-3, atol=1e-4).compare(one["logs"], two["logs"])
    assert harness.largest_difference(weights, two_weights) < 1e-3


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, engine",
    [
        ("single_gpu", "NO"),
        ("multi_gpu", "MULTI_CPU"),
        ("cpu_2proc", "MULTI_CPU"),
        ("fsdp2", "FSDP"),
        pytest.param("zero2", "DEEPSPEED", marks=engines.needs_deepspeed),
        pytest.param("zero3", "DEEPSPEED", marks=engines.needs_deepspeed),
    ],
)
def test_accelerate_configurations_are_launched(name, engine, tiny_folder, tmp_path, monkeypatch):
    """Each file of `recipes/accelerate` starts the engine that it is named after; here on CPUs, two at most."""
    monkeypatch.setitem(os.environ, "DS_ACCELERATOR", "cpu")
    processes = 1 if name == "single_gpu" else 2
    run = {"kind": "paired", "method": "fdpo", "model": tiny_folder, "folder": str(tmp_path)}
    run["options"] = dict(per_device_train_batch_size=2, max_steps=2)
    config = TESTS.parent / "recipes" / "accelerate" / f"{name}.yaml"
    options = ("--num_processes", str(processes), "--mixed_precision", "no")
    launch(engines.SCRIPT, json.dumps({"engine": "launched", "runs": [run]}), config=config, options=options)
    _, result = engines.result(tmp_path)
    assert (result["engine"], result["processes"]) == (engine, processes)
    assert result["sharded"] == (result["parameters"] if name in ("fsdp2", "zero3") else 0)


@pytest.mark.slow
def test_images_launched_from_a_folder(tmp_path):
    """
    FSDP2 as `recipes/accelerate/fsdp2.yaml` has it: the main process alone reads what is sharded, every process the
    encoders, and the denoiser's own blocks are the units.
    """
    diffusion_harness.tiny_pipelines.pipeline("sd").save_pretrained(tmp_path / "pipeline")
    run = {"kind": "images", "method": "DiffusionDPO", "model": str(tmp_path / "pipeline"), "lora": True}
    case = IMAGES[0]
    run_here({"engine": "none", "runs": [{**run, "folder": str(tmp_path / "one"), "options": case.options(1)}]})
    plan = {"engine": "launched", "runs": [{**run, "folder": str(tmp_path / "two"), "options": case.options(2)}]}
    config = TESTS.parent / "recipes" / "accelerate" / "fsdp2.yaml"
    options = ("--num_processes", "2", "--mixed_precision", "no")
    launch(engines.SCRIPT, json.dumps(plan), config=config, options=options)
    (_, one), (_, two) = (engines.result(tmp_path / name) for name in ("one", "two"))
    assert two["engine"] == "FSDP" and two["sharded"] == two["parameters"]
    case.compare(one["logs"], two["logs"])
