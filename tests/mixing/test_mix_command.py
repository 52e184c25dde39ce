"""`trl-ext mix` on adapters and on models, from folders to weights, report, merged adapter and samples."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny
import torch
import yaml
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM
from trl import DPOConfig

from trl_ext import cli
from trl_ext.launch.configurations import CONFIGURATIONS
from trl_ext.launch.mix import MixArguments
from trl_ext.launch.mix_loading import load_policies, trained_beta
from trl_ext.mixing import MixtureWeights


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A base, two adapters and two whole models near it, and prompts with a split to measure on."""
    root = tmp_path_factory.mktemp("mix")
    base = root / "base"
    tiny.model(seed=0).save_pretrained(base)
    tiny.tokenizer().save_pretrained(base)
    for k, name in enumerate(("positive", "short")):
        torch.manual_seed(k)
        config = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
        for parameter_name, parameter in model.named_parameters():
            if "lora_B" in parameter_name:
                torch.nn.init.normal_(parameter, std=0.05)
        model.save_pretrained(root / name)
        whole = root / f"{name}-model"
        model.merge_and_unload().save_pretrained(whole)
        tiny.tokenizer().save_pretrained(whole)
    data = root / "data"
    data.mkdir()
    tiny.write_jsonl(data / "train.jsonl", 8)
    tiny.write_jsonl(data / "test.jsonl", 4, seed=1)
    (root / "rewards.py").write_text(
        "def brevity(prompts, completions, **kw): return [-len(c) for c in completions]\n"
    )
    return root


def arguments(folders, output, *policies, **options):
    words = ["mix", "--policy", *(str(folders / name) for name in policies), "--dataset", str(folders / "data")]
    words += ["--output_dir", str(output), "--responses", "4", "--max_new_tokens", "4", "--num_prompts", "4"]
    for name, value in options.items():
        words += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    return words


def test_adapters(folders, tmp_path, capsys):
    output = tmp_path / "out"
    options = dict(test_split="test", num_test_prompts=2, merge=True, num_samples=2, candidates=3)
    options |= dict(reward=f"{folders / 'rewards.py'}:brevity", device="cpu")
    words = arguments(folders, output, "positive", "short", **options)
    assert cli.main(words) == 0
    said = capsys.readouterr().out
    weights = MixtureWeights.load(output / "weights.json")
    assert sum(weights.weights) == pytest.approx(1) and weights.num_prompts == 4 and weights.num_responses == 4
    report = json.loads((output / "report.json").read_text())
    measured = report["measurements"]
    assert list(measured) == ["reference", "positive", "short", "uniform mixture", "mixture", "merged"]
    assert measured["reference"]["kl"]["value"] == pytest.approx(0, abs=1e-4)
    assert all(found["rewards"]["brevity"]["value"] < 0 for found in measured.values())
    assert measured["merged"]["distance"]["value"] > -1e-4 and measured["mixture"]["distance"] is None
    assert "positive" in said and f"{weights.weights[0]:.3f}" in said
    page = (output / "report.md").read_text()
    assert "| merged |" in page and str(folders / "short") in page
    samples = [json.loads(line) for line in (output / "samples.jsonl").read_text().splitlines()]
    assert len(samples) == 2 and all(len(row["log_weights"]) == 3 for row in samples)

    merged = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folders / "base"), output / "merged")
    layer = "base_model.model.model.layers.0.self_attn.q_proj"
    change = merged.get_submodule(layer).get_delta_weight("default")
    expected = 0
    for weight, name in zip(weights.weights, ("positive", "short"), strict=True):
        model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folders / "base"), folders / name)
        expected = expected + weight * model.get_submodule(layer).get_delta_weight("default")
    torch.testing.assert_close(change, expected, rtol=1e-4, atol=1e-6)

    # Everything expensive is in the cache: the second run computes nothing and writes the same weights.
    before = sorted((output / "cache").iterdir())
    first = (output / "weights.json").read_text()
    assert cli.main(words) == 0
    assert sorted((output / "cache").iterdir()) == before and (output / "weights.json").read_text() == first


def test_models_with_given_weights(folders, tmp_path):
    output = tmp_path / "out"
    options = dict(base=folders / "base", weights=[0.25, 0.75], num_samples=1, device="cpu")
    assert cli.main(arguments(folders, output, "positive-model", "short-model", **options)) == 0
    report = json.loads((output / "report.json").read_text())
    assert report["weights"] == {"weights": [0.25, 0.75]} and not (output / "weights.json").exists()
    assert (output / "samples.jsonl").read_text().count("\n") == 1


def test_adapters_and_models_agree(folders, tmp_path):
    """The merged models are the adapters' policies: the same samples and weights up to rounding."""
    found = []
    for kind, base in (("", None), ("-model", folders / "base")):
        output = tmp_path / f"out{kind}"
        options = dict(device="cpu") | ({} if base is None else {"base": base})
        assert cli.main(arguments(folders, output, f"positive{kind}", f"short{kind}", **options)) == 0
        found.append(MixtureWeights.load(output / "weights.json").weights)
    assert found[0] == pytest.approx(found[1], abs=1e-3)


def test_refusals(folders, tmp_path, capsys):
    output = tmp_path / "out"

    def said(*policies, **options):
        assert cli.main(arguments(folders, output, *policies, **({"device": "cpu"} | options))) == 1
        return capsys.readouterr().err

    assert "adapters and whole models" in said("positive", "short-model")
    assert "`base` is needed" in said("positive-model", "short-model")
    assert "`policy` must name two" in said("positive")
    assert "`policy` names a policy twice" in said("positive", "positive")
    assert "`weights` must hold one number a policy, 2, got 1" in said("positive", "short", weights=[1.0])
    assert "must sum to 1" in said("positive", "short", weights=[0.9, 0.9])
    assert "`merge` is for adapters" in said("positive-model", "short-model", base=folders / "base", merge=True)
    assert "'validation'" in said("positive", "short", split="validation")
    assert "no folder" in said("positive", "missing") or "missing" in said("positive", "missing")
    assert "`reward` is measured" in said("positive", "short", reward="rewards.py:brevity")

    other = folders / "elsewhere"
    if not other.exists():
        shutil.copytree(folders / "short", other)
        config = json.loads((other / "adapter_config.json").read_text())
        config["base_model_name_or_path"] = "another/model"
        (other / "adapter_config.json").write_text(json.dumps(config))
    assert "adapters of different bases" in said("positive", "elsewhere")

    stranger = tiny.tokenizer()
    stranger.add_tokens(["<|new|>"])
    foreign = folders / "foreign-model"
    AutoModelForCausalLM.from_pretrained(folders / "base").save_pretrained(foreign)
    stranger.save_pretrained(foreign)
    assert "another vocabulary" in said("positive-model", "foreign-model", base=folders / "base")


def trained_with(folders, tmp_path, **betas):
    """Copies of the adapters with the arguments that TRL saves beside them."""
    for name, beta in betas.items():
        shutil.copytree(folders / name, tmp_path / name)
        args = DPOConfig(str(tmp_path), beta=beta, use_cpu=True, bf16=False)
        torch.save(args, tmp_path / name / "training_args.bin")
    return [tmp_path / name for name in betas]


def test_what_was_measured_is_written_before_samples_are_drawn(folders, tmp_path, monkeypatch, capsys):
    """A full disk while samples are drawn leaves the numbers; a folder in the way is found first."""
    from trl_ext.launch import mix

    def full(*args):
        raise OSError("No space left on device")

    words = arguments(folders, tmp_path / "out", "positive", "short", num_samples=1, device="cpu")
    monkeypatch.setattr(mix, "write_samples", full)
    assert cli.main(words) == 1
    assert "No space left on device" in capsys.readouterr().err
    assert sum(json.loads((tmp_path / "out" / "report.json").read_text())["weights"]["weights"]) == pytest.approx(1)
    assert (tmp_path / "out" / "report.md").read_text()
    monkeypatch.setattr(mix, "load_prompts", lambda *args: pytest.fail("the prompts were read"))
    (tmp_path / "taken" / "weights.json").mkdir(parents=True)
    (tmp_path / "file").write_text("")
    for folder in ("taken", "file", "file/below"):
        assert cli.main(arguments(folders, tmp_path / folder, "positive", "short", device="cpu")) == 1
        assert "`output_dir=" in capsys.readouterr().err


def test_betas_of_the_training(folders, tmp_path, capsys):
    """
    The beta that is saved beside the policies is the scale of the objectives; different ones are refused unless
    `betas` says how they are to be brought to one, and a given `beta` does not change that.
    """
    equal = trained_with(folders, tmp_path / "equal", positive=0.5, short=0.5)
    values = {}
    for beta in (None, 0.5, 1.0):
        output = tmp_path / f"out-{beta}"
        options = {"device": "cpu"} | ({} if beta is None else {"beta": beta})
        assert cli.main(arguments(folders, output, *equal, cache_dir=tmp_path / "cache", **options)) == 0
        values[beta] = MixtureWeights.load(output / "weights.json").value
        assert json.loads((output / "report.json").read_text())["settings"]["beta"] == (beta or 0.5)
    assert values[None] == values[0.5] == pytest.approx(values[1.0] / 2) != 0

    unequal = trained_with(folders, tmp_path / "unequal", positive=0.1, short=0.5)
    for given in ({}, {"beta": 0.1}):
        capsys.readouterr()
        words = arguments(folders, tmp_path / "refused", *unequal, device="cpu", **given)
        assert cli.main(words) == 1
        said = capsys.readouterr().err
        assert "with 0.1" in said and "with 0.5" in said and "--betas 0.1 0.5" in said
    assert not (tmp_path / "refused" / "weights.json").exists()
    assert cli.main(arguments(folders, tmp_path / "given", *unequal, device="cpu", betas=[0.1, 0.5])) == 0
    settings = json.loads((tmp_path / "given" / "report.json").read_text())["settings"]
    assert settings["betas"] == [0.1, 0.5] and settings["beta"] == 0.1


class Hostile:
    """Runs code where it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_saved_arguments_run_no_code(folders, tmp_path):
    """`training_args.bin` is a pickle of whoever uploaded it: it is read, and nothing in it is called."""
    (trained,) = trained_with(folders, tmp_path, positive=0.25)
    assert trained_beta(str(trained)) == 0.25 and trained_beta(str(folders / "positive")) is None
    path = trained / "training_args.bin"
    for beta in (Hostile(tmp_path / "ran"), [0.1, 0.2], -1.0, "0.1"):
        torch.save(SimpleNamespace(beta=beta), path)
        assert trained_beta(str(trained)) is None
    torch.load(path, weights_only=False)
    torch.save(Hostile(tmp_path / "ran"), path)
    assert trained_beta(str(trained)) is None and not (tmp_path / "ran").exists()
    torch.load(path, weights_only=False)
    assert (tmp_path / "ran").exists()  # as it would have been
    path.write_bytes(b"no pickle")
    assert trained_beta(str(trained)) is None


def test_policies_in_4_bits(folders, tmp_path):
    """As adapters that were trained with QLoRA had their base: linear layers are NF4, and the weights are others."""
    pytest.importorskip("bitsandbytes")
    paths = [str(folders / name) for name in ("positive", "short")]
    options = dict(policy=paths, dataset=str(folders / "data"), device="cpu")
    loaded = load_policies(MixArguments(**options, load_in_4bit=True)).model
    quantized = [name for name, weight in loaded.named_parameters() if weight.dtype == torch.uint8]
    assert len(quantized) == 2 * 7 and not any("lora_" in name for name in quantized)
    found = []
    for flag in (False, True):
        output = tmp_path / str(flag)
        words = arguments(folders, output, "positive", "short", device="cpu", load_in_4bit=flag, merge=True)
        assert cli.main(words) == 0 and (output / "merged" / "adapter_model.safetensors").exists()
        found.append(MixtureWeights.load(output / "weights.json"))
    assert sum(found[1].weights) == pytest.approx(1) and found[0].value != found[1].value


@pytest.mark.parametrize("path", sorted((CONFIGURATIONS / "mix").glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_configurations(path):
    """Every option of a shipped configuration is one of the command's."""
    from trl import TrlParser

    words = ["--config", str(path), "--policy", "a", "b", "--dataset", "d"]
    (parsed,) = TrlParser([MixArguments]).parse_args_and_config(words)
    for name, value in yaml.safe_load(path.read_text()).items():
        assert getattr(parsed, name) == value
