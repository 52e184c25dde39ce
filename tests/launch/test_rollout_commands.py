"""`trl-ext rehearsal` and `trl-ext dph_rl`: from prompts on disk to a trained model, and bad command lines."""

import json

import pytest
import tiny
from datasets import load_dataset

from trl_ext import cli
from trl_ext.launch.commands import METHODS
from trl_ext.launch.dry_run import describe
from trl_ext.launch.options import parse
from trl_ext.launch.train import make_trainer


REWARDS = """
def parity(prompts, completions, completion_ids, easy, **columns):
    return [1.0 if simple else float(sum(ids) % 2) for ids, simple in zip(completion_ids, easy)]
"""


@pytest.fixture(scope="module")
def files(tmp_path_factory, tiny_folder):
    folder = tmp_path_factory.mktemp("rollout")
    (folder / "rewards.py").write_text(REWARDS)
    rows = [{"prompt": row["prompt"], "easy": i % 3 == 0} for i, row in enumerate(tiny.rows(18))]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def options(files, tiny_folder, **more) -> list[str]:
    given = {
        "model_name_or_path": tiny_folder,
        "reward": f"{files / 'rewards.py'}:parity",
        "output_dir": str(files / "answers"),
        **more,
    }
    return [word for name, value in given.items() for word in (f"--{name}", str(value))]


def collect(files, tiny_folder, **more) -> list[str]:
    data = str(files / "prompts.jsonl")
    given = {"dataset_name": data, "samples": 4, "max_completion_length": 4, "device": "cpu", **more}
    return ["rehearsal", *options(files, tiny_folder, **given)]


def training(files, tiny_folder, **more) -> list[str]:
    answers = files / "answers"
    run = {
        "dataset_name": answers / "exploration.jsonl",
        "rehearsal_dataset_name": answers / "rehearsal.jsonl",
        "output_dir": files / "out",
        "max_steps": 2,
        "per_device_train_batch_size": 4,
        "num_generations": 4,
        "max_completion_length": 4,
        "use_cpu": "true",
        "bf16": "false",
        "gradient_checkpointing": "false",
        "dtype": "float32",
        "report_to": "none",
        "save_strategy": "no",
        **more,
    }
    return options(files, tiny_folder, **run)


def test_collects_and_trains(files, tiny_folder, capsys):
    """The two commands one after the other: what the first writes the second trains with; repeated, nothing differs."""
    assert cli.main(collect(files, tiny_folder)) == 0
    printed = capsys.readouterr().out
    report = json.loads((files / "answers" / "report.json").read_text())
    assert report["near_perfect"] >= 6 and report["exploration"] + report["near_perfect"] == report["prompts"] == 18
    assert f"{report['rehearsal']} answers to rehearse" in printed and "prompts with so many" in printed
    rehearsal = load_dataset("json", data_files=str(files / "answers" / "rehearsal.jsonl"), split="train")
    assert len(rehearsal) == report["rehearsal"] and {"prompt_ids", "completion_ids"} <= set(rehearsal.column_names)
    text = (files / "answers" / "rehearsal.jsonl").read_text()
    assert cli.main(collect(files, tiny_folder)) == 0
    assert (files / "answers" / "rehearsal.jsonl").read_text() == text

    assert cli.main(["dph_rl", *training(files, tiny_folder, dry_run="true")]) == 0
    dry = capsys.readouterr().out
    assert "4 of each prompt" in dry and "1 prompts (4 a device" in dry and "2 steps" in dry
    assert cli.main(["dph_rl", *training(files, tiny_folder)]) == 0
    assert (files / "out" / "model.safetensors").exists() and (
        files / "out" / "rehearsal_reference.safetensors"
    ).exists()


def test_shipped_configurations(files, tiny_folder, tmp_path):
    """Every shipped configuration is parsed, with its reward functions and its answers."""
    for name in ("full", "lora", "qlora"):
        script, parsed = parse(METHODS["dph_rl"], ["--config", name, "--use_cpu", "true", "--bf16", "false"])
        assert parsed[5].reward == ["trl.rewards:accuracy_reward"] or parsed[5].reward == "trl.rewards:accuracy_reward"
        assert parsed[6].rehearsal_dataset_name == "answers/rehearsal.jsonl"
        assert parsed[2].use_peft == (name != "full") and parsed[2].load_in_4bit == (name == "qlora")
        assert script.trainer_arguments.__func__ is not None


def test_describe_without_length(files, tiny_folder):
    """A streamed or short run is described by its prompts."""
    if not (files / "answers" / "rehearsal.jsonl").exists():
        assert cli.main(collect(files, tiny_folder)) == 0
    words = training(files, tiny_folder, dry_run="true", max_steps=-1, num_train_epochs=2)
    script, parsed = parse(METHODS["dph_rl"], words)
    trainer = make_trainer(script, *parsed)
    prompts = len(trainer.train_dataset)
    assert (
        f"{prompts} prompts" in (text := describe(trainer, script))
        and f"length             {2 * prompts} steps" in text
    )


@pytest.mark.parametrize(
    "words, told",
    [
        (["--threshold", "0"], "`threshold` must be"),
        (["--reward", "nowhere.py:f"], "`reward='nowhere.py:f'`: there is no file nowhere.py"),
        (["--reward", "f"], "`reward='f'` is none of `FILE.py:FUNCTION` and `MODULE:FUNCTION`"),
        (["--reward", "trl.rewards:nothing"], "trl.rewards has no nothing"),
        (["--dataset_name", "none.jsonl"], "`dataset_name='none.jsonl'`: there is no file"),
        (["--split", "other"], "other"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_bad_command_lines(words, told, files, tiny_folder, capsys):
    assert cli.main([*collect(files, tiny_folder), *words]) == 1
    assert told in capsys.readouterr().err


def test_rewards_are_required(files, tiny_folder, capsys):
    words = training(files, tiny_folder)
    start = words.index("--reward")
    assert cli.main(["dph_rl", *words[:start], *words[start + 2 :]]) == 1
    assert "`--reward` is required" in capsys.readouterr().err
