"""`trl-ext fdpg` and `trl-ext wro`: from prompts on disk to a trained adapter, and bad command lines."""

import json

import pytest
import tiny

from trl_ext import cli
from trl_ext.launch.commands import METHODS
from trl_ext.launch.options import parse


FUNCTIONS = """
def score(prompts, completions, **columns):
    return [len(completion) / 20 for completion in completions]


def prefers(prompts, completions_a, completions_b):
    return [1.0 if len(a) > len(b) else 0.5 if len(a) == len(b) else 0.0 for a, b in zip(completions_a, completions_b)]
"""


@pytest.fixture
def files(tmp_path):
    (tmp_path / "functions.py").write_text(FUNCTIONS)
    rows = [{"prompt": row["prompt"]} for row in tiny.rows(8)]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def words(method, files, tiny_folder, **options) -> list[str]:
    given = {
        "config": "lora",
        "model_name_or_path": tiny_folder,
        "dataset_name": files / "prompts.jsonl",
        "output_dir": files / "out",
        "max_steps": 1,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 1,
        "num_generations": 4,
        "max_completion_length": 4,
        "use_cpu": "true",
        "bf16": "false",
        "report_to": "none",
        **options,
    }
    return [method, *(str(word) for name, value in given.items() for word in (f"--{name}", value))]


@pytest.mark.parametrize("method, function", [("fdpg", "score"), ("wro", "prefers")])
def test_trains_from_its_configuration(method, function, files, tiny_folder):
    option = "reward" if method == "fdpg" else "judge"
    assert cli.main(words(method, files, tiny_folder, **{option: f"{files / 'functions.py'}:{function}"})) == 0
    assert (files / "out" / "adapter_model.safetensors").exists()
    card = (files / "out" / "README.md").read_text()
    assert function in card
    assert (files / "out" / "anchors").exists() == (method == "wro")


def test_a_reward_and_a_judge_are_needed(files, tiny_folder, tmp_path, capsys):
    for method, option in (("fdpg", "reward"), ("wro", "judge")):
        config = tmp_path / f"{method}.yaml"
        config.write_text("seed: 1\n")
        assert cli.main(words(method, files, tiny_folder, config=config)) != 0
        assert f"`--{option}` is required" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["full", "lora", "qlora"])
@pytest.mark.parametrize("method", ["fdpg", "wro"])
def test_shipped_configurations(method, name):
    """Every shipped configuration is parsed, and says what its name says."""
    _, parsed = parse(METHODS[method], ["--config", name, "--use_cpu", "true", "--bf16", "false"])
    model_arguments = next(group for group in parsed if hasattr(group, "load_in_4bit"))
    assert model_arguments.use_peft == (name != "full") and model_arguments.load_in_4bit == (name == "qlora")
    training = next(group for group in parsed if hasattr(group, "learning_rate"))
    assert training.output_dir == f"outputs/{method}-{name}" and training.warmup_steps > 0
    assert training.learning_rate == (1e-6 if name == "full" else 1e-5)
