"""Recipes as users launch them: `accelerate launch recipes/<method>.py`, with files, folders and configurations."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import yaml
from methods import ONLINE, PRIMARY

from trl_ext.launch import d2po, train
from trl_ext.launch.commands import METHODS
from trl_ext.launch.options import make_parser
from trl_ext.training.named_datasets import get_split, load_named_dataset, load_split


ROOT = Path(__file__).resolve().parents[2]
RECIPES = ROOT / "recipes"
CONFIGS = sorted(path for m in PRIMARY + ONLINE for path in (RECIPES / "configs" / m.recipe).glob("*.yaml"))


def launch(recipe: str, *arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--num_processes", "1"]
    command += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--cpu"]
    command += [str(RECIPES / f"{recipe}.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=600)


def options(model: str, data: Path, output: Path, *more: str) -> list[str]:
    arguments = ["--model_name_or_path", model, "--dataset_name", str(data), "--output_dir", str(output)]
    arguments += ["--use_cpu", "true", "--bf16", "false", "--max_steps", "2", "--per_device_train_batch_size", "2"]
    return [*arguments, "--gradient_accumulation_steps", "1", "--report_to", "none", "--logging_steps", "1", *more]


@pytest.mark.parametrize("method", PRIMARY, ids=lambda method: method.id)
def test_launch(method, tiny_folder, tmp_path):
    """
    The LoRA configuration, overridden from the command line to a tiny model and a JSONL file, trains and saves an
    adapter, its card and the trainer's log; evaluation runs where asked for.
    """
    data = tmp_path / "data"
    data.mkdir()
    tiny.write_jsonl(data / "train.jsonl", 16)
    tiny.write_jsonl(data / "test.jsonl", 6, seed=1)
    output = tmp_path / "out"
    config = str(RECIPES / "configs" / method.recipe / "lora.yaml")
    result = launch(
        method.recipe,
        "--config",
        config,
        *options(tiny_folder, data, output, "--eval_strategy", "steps"),
        "--eval_steps",
        "2",
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert {"adapter_config.json", "adapter_model.safetensors", "README.md", "trainer_state.json"} <= {
        path.name for path in output.iterdir()
    }
    log = json.loads((output / "trainer_state.json").read_text())["log_history"]
    assert sum("loss" in entry for entry in log) == 2 and sum("eval_loss" in entry for entry in log) == 1
    card = (output / "README.md").read_text()
    assert method.trainer._paper["id"] in card and str(data) in card and not re.search(r"\bNone\b", card)


def test_launch_full_from_one_file(tiny_folder, tmp_path):
    """Full fine-tuning from a single JSONL file, without a configuration."""
    data, output = tiny.write_jsonl(tmp_path / "pairs.jsonl", 16), tmp_path / "out"
    result = launch("fdpo", *options(tiny_folder, data, output, "--divergence", "js"))
    assert result.returncode == 0, result.stderr[-3000:]
    assert (output / "model.safetensors").exists() and (output / "tokenizer.json").exists()


def test_launch_qlora(tiny_folder, tmp_path):
    """The QLoRA configuration: a base in 4 bits, and an adapter that says so on its card."""
    pytest.importorskip("bitsandbytes")
    data, output = tiny.write_jsonl(tmp_path / "pairs.jsonl", 16), tmp_path / "out"
    config = str(RECIPES / "configs" / "simper" / "qlora.yaml")
    result = launch("simper", "--config", config, *options(tiny_folder, data, output))
    assert result.returncode == 0, result.stderr[-3000:]
    assert (output / "adapter_model.safetensors").exists()
    assert "QLoRA" in (output / "README.md").read_text()


def test_unknown_key_of_a_configuration_is_an_error(tiny_folder, tmp_path):
    """TRL's scripts ignore it; a misspelt hyperparameter would then train with its default."""
    config = tmp_path / "config.yaml"
    config.write_text("divergense: js\n")
    result = launch("fdpo", "--config", str(config), *options(tiny_folder, tmp_path, tmp_path / "out"))
    assert result.returncode != 0 and "divergense" in result.stderr


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_configurations_parse(path):
    """Every key is an option, and every value arrives where it should."""
    arguments = ["--config", str(path), "--use_cpu", "true"]
    parsed = make_parser(METHODS[path.parent.name]).parse(arguments)
    for key, value in yaml.safe_load(path.read_text()).items():
        owner = next(namespace for namespace in parsed if hasattr(namespace, key))
        got = getattr(owner, key)
        if key not in ("report_to", "optim", "lr_scheduler_type", "eval_strategy", "save_strategy"):
            assert got == value, key
        else:
            assert str(getattr(got, "value", got)) in (str(value), f"['{value}']", "[]"), key


def sections_of(text: str) -> dict[str, str]:
    """A help's sections by their titles, which begin a line and end in a colon."""
    parts = re.split(r"^(\S.*):\n", text, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


@pytest.mark.parametrize("method", PRIMARY + ONLINE, ids=lambda method: method.id)
def test_help_begins_with_the_method_and_says_what_is_refused(method):
    """
    Every option stands in it once: the method's own first, those that its configuration refuses last and as refused.
    """
    config = method.config
    parser = make_parser(METHODS[method.recipe])
    sections = sections_of(parser.format_help_all())
    name = f"{method.config.__name__.removesuffix('Config')}'s own options"
    if method.recipe == "simper":
        assert name not in sections, "it has none"
        sections = {name: "", **sections}
    assert list(sections)[0] == name
    assert list(sections)[-1].startswith("refused by ")
    listed = {title: re.findall(r"^  (--[\w-]+|-h)\b", text, flags=re.MULTILINE) for title, text in sections.items()}
    options = [next(name for name in action.option_strings if name.startswith("--")) for action in parser._actions]
    assert sorted(sum(listed.values(), [])) == sorted(options)

    own, *_, refused = listed.values()
    # A switch that is on by default has a second name that turns it off.
    assert {name.removeprefix("--").removeprefix("no_") for name in refused} == set(config.refused_options())
    assert {"--loss_type", "--use_weighting"} <= set(refused)
    # Each once: `--no_...`, the second name of some switches, refers to the first.
    assert list(sections.values())[-1].count("Refused: ") == len(config.refused_options())
    assert sum(text.count("Refused: ") for text in sections.values()) == len(config.refused_options())
    assert ("--beta" in refused, "--beta" in own) == ((True, False) if method.recipe == "simper" else (False, True))
    added = {name for name in vars(method.config).get("__annotations__", {}) if not name.startswith("_")}
    assert {f"--{name}" for name in added} <= set(own)
    if method.online:
        assert {"--loss", "--loss_kwargs"} <= set(own), "where the loss's parameters are given"
        assert "--judge_model" in listed["Where gold labels come from"]


def test_help_of_a_recipe():
    """As somebody reads it, without a launcher: how to call it in a line, and then what f-DPO has."""
    command = [sys.executable, str(RECIPES / "fdpo.py"), "--help"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-3000:]
    lines = result.stdout.splitlines()
    assert lines[0] == "usage: fdpo.py [--config FILE] [options]" and lines[2].startswith("f-DPO: ")
    assert "FDPO's own options:" in lines[:8] and any(line.startswith("  --divergence ") for line in lines[:20])


@pytest.mark.parametrize("method", PRIMARY + ONLINE, ids=lambda method: method.id)
def test_every_method_has_its_configurations(method):
    """QLoRA computes in bf16: TRL takes the compute type of the 4-bit weights from `dtype`, whose default is fp32."""
    folder = RECIPES / "configs" / method.recipe
    assert {"full.yaml", "lora.yaml", "qlora.yaml"} <= {path.name for path in folder.iterdir()}
    qlora = yaml.safe_load((folder / "qlora.yaml").read_text())
    assert qlora["load_in_4bit"] and qlora["use_peft"] and qlora["dtype"] == "bfloat16"


def test_accelerate_configurations_are_read():
    """Accelerate accepts each file, and the processes are what its name says."""
    from accelerate.commands.config.config_args import load_config_from_file

    for name in ("single_gpu", "multi_gpu", "zero2", "zero3", "fsdp2", "cpu_2proc"):
        config = load_config_from_file(str(RECIPES / "accelerate" / f"{name}.yaml"))
        assert config.num_processes == {"single_gpu": 1, "cpu_2proc": 2}.get(name, 8)
        assert config.use_cpu == (name == "cpu_2proc")


def test_datasets_are_found(tmp_path):
    """
    A file becomes the split `train`; a folder has the splits its files are named after; a missing split is named.
    """
    tiny.write_jsonl(tmp_path / "train.jsonl", 4)
    tiny.write_jsonl(tmp_path / "test.jsonl", 2)
    assert list(load_named_dataset(str(tmp_path / "test.jsonl"))) == ["train"]
    folder = load_named_dataset(str(tmp_path))
    assert {name: len(split) for name, split in folder.items()} == {"train": 4, "test": 2}
    folder.save_to_disk(str(tmp_path / "saved"))
    assert set(load_named_dataset(str(tmp_path / "saved"))) == {"train", "test"}
    assert get_split(folder, "train[:3]", "dataset_train_split")[:] == folder["train"][:3]
    for name in ("validation", "train[:x]", "train[:3", "train[:", "train[:]", "train[-3:]"):
        with pytest.raises(ValueError, match=re.escape(f"`dataset_test_split={name!r}`: the dataset has 't")):
            get_split(folder, name, "dataset_test_split")
    for name, split, count in (("test.jsonl", "test", 2), ("train.jsonl", "test[:3]", 3), ("", "test[:1]", 1)):
        assert len(load_split(str(tmp_path / name), split)) == count
    with pytest.raises(ValueError, match=re.escape("`split='dev'`: the dataset has")):
        load_split(str(tmp_path), "dev")
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(ValueError, match="unknown type.*jsonl"):
        load_named_dataset(str(tmp_path / "notes.txt"))


def test_launch_d2po(tiny_folder, tmp_path):
    """
    D2PO from the prompts of a file of pairs, with a loss of another method and its option, a gold task, and the ledger
    of the first run for the second run's discriminator.
    """
    data, output = tiny.write_jsonl(tmp_path / "pairs.jsonl", 16), tmp_path / "out"
    more = ["--use_peft", "true", "--max_completion_length", "8", "--window_size", "4", "--labels_per_window", "4"]
    more += ["--gold", "word_collector", "--loss", "tdpo", "--variant", "tdpo1"]
    result = launch("d2po", *options(tiny_folder, data, output, *more))
    assert result.returncode == 0, result.stderr[-3000:]
    assert len((output / "gold_labels.jsonl").read_text().splitlines()) == 4
    assert (output / "discriminator" / "score_head.safetensors").exists()
    card = (output / "README.md").read_text()
    assert "2405.01511" in card and "`4 by word_collector" in card and "| variant | `tdpo1` |" in card


def test_resume_on_the_command_line():
    """Transformers reads the option as a text, a folder's name; "true" means the last checkpoint."""
    assert [train.checkpoint_to_resume(value) for value in ("true", "True", True)] == [True] * 3
    assert [train.checkpoint_to_resume(value) for value in (None, "false", False)] == [None] * 3
    assert train.checkpoint_to_resume("outputs/checkpoint-2") == "outputs/checkpoint-2"


def test_arguments_of_d2po(tmp_path):
    """Every gold that the recipe knows becomes a labeler; prompts are taken once; a ledger or pairs are found."""
    from datasets import Dataset

    assert d2po.make_labeller(d2po.GoldArguments(gold="none")) is None
    assert d2po.make_labeller(d2po.GoldArguments(gold="film_sentiment", label_cost=2.0)).cost == 2.0
    assert d2po.make_labeller(d2po.GoldArguments(gold="judge", judge_model="j")).name == "j at api.openai.com"
    assert d2po.make_labeller(d2po.GoldArguments(gold="terminal")).name
    for wrong, message in (("judge", "--judge_model"), ("reward_model", "--gold_reward_model"), ("vowels", "unknown")):
        with pytest.raises(ValueError, match=message):
            d2po.make_labeller(d2po.GoldArguments(gold=wrong))
    pairs = Dataset.from_list(
        [{"prompt": p, "chosen": "a", "rejected": "b", "answer": i} for i, p in enumerate("xxy")]
    )
    assert d2po.only_prompts(pairs)[:] == {"prompt": ["x", "y"], "answer": [0, 2]}
    assert d2po.only_prompts(pairs.select_columns(["prompt"]))["prompt"][:] == ["x", "x", "y"]
    assert len(d2po.load_pairs(str(tiny.write_jsonl(tmp_path / "pairs.jsonl", 6)))) == 6
    entry = {"key": "k", "window": 0, "verdict": 1.0, "prompt": "Q", "completion_a": "a", "completion_b": "b"}
    entry |= {"prompt_ids": [1], "completion_a_ids": [2], "completion_b_ids": [3], "step": 0, "labeller": "somebody"}
    (tmp_path / "gold_labels.jsonl").write_text(json.dumps(entry) + "\n")
    assert d2po.load_pairs(str(tmp_path / "gold_labels.jsonl"))["chosen"][:] == ["a"]


@pytest.mark.parametrize(
    "name", ["my_pairs.jsonl", "data/pairs.csv.gz", "./pairs", "../pairs", "/nowhere/pairs", "~/no/pairs"]
)
def test_a_mistyped_file_is_not_looked_for_on_the_hub(name, monkeypatch, tmp_path):
    import datasets

    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kwargs: pytest.fail("asked the Hub"))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=re.escape(f"no file or folder {name} in {tmp_path}")):
        load_named_dataset(name)
