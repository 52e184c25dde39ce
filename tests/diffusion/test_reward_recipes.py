"""Score as Action on the command line: its configurations, rewards, dry run, and a run from start to end."""

import json
import re
from pathlib import Path

import pytest
import reward_harness
import tiny_pipelines
import yaml

from trl_ext import ScoreAsActionConfig, cli
from trl_ext.launch.commands import METHODS
from trl_ext.launch.options import make_parser
from trl_ext.launch.rewards import ImageRewardArguments, RewardScript


ROOT = Path(__file__).resolve().parents[2]
CONFIGS = sorted((ROOT / "recipes" / "configs" / "score_as_action").glob("*.yaml"))
REWARDS = "def width(images, target=None):\n    return [float(i) for i in range(len(images))]\n"


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_configurations_parse(path):
    """Every key is an option, and every value arrives where it should; groups are whole."""
    parser = make_parser(METHODS["score_as_action"])
    parsed = parser.parse(["--config", str(path), "--use_cpu", "true", "--reward", "trl.rewards:accuracy_reward"])
    for key, value in yaml.safe_load(path.read_text()).items():
        got = getattr(next(namespace for namespace in parsed if hasattr(namespace, key)), key)
        assert str(getattr(got, "value", got)) == str(value) or got == value, key
    _, training_args, model_args, *_ = parsed
    assert isinstance(training_args, ScoreAsActionConfig)
    assert model_args.use_peft == (not path.stem.endswith("_full")) and model_args.lora_dropout in (0.0, 0.05)
    assert model_args.load_in_4bit == path.stem.endswith("_qlora")


def test_every_model_has_its_configurations():
    names = {path.stem for path in CONFIGS}
    assert names >= {"sd15_lora", "sdxl_lora", "sdxl_qlora", "sd35_lora", "sd35_qlora", "flux_lora", "flux_qlora"}


@pytest.fixture
def arguments(tmp_path) -> list[str]:
    tiny_pipelines.pipeline("sd").save_pretrained(tmp_path / "model")
    (tmp_path / "rewards.py").write_text(REWARDS)
    rows = [json.dumps({"prompt": prompt, "target": 1.0}) for prompt in reward_harness.PROMPTS]
    (tmp_path / "prompts.jsonl").write_text("\n".join(rows))
    options = dict(
        config=CONFIGS[[path.stem for path in CONFIGS].index("sd15_lora")],
        model_name_or_path=tmp_path / "model",
        dataset_name=tmp_path / "prompts.jsonl",
        output_dir=tmp_path / "out",
        reward=f"{tmp_path / 'rewards.py'}:width",
        use_cpu="true",
        bf16="false",
        dtype="float32",
        resolution=16,
        max_steps=1,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=1,
        num_generations=2,
        num_inference_steps=3,
        num_reference_images=4,
        validation_inference_steps=2,
        report_to="none",
    )
    return [word for name, value in options.items() for word in (f"--{name}", str(value))]


def test_dry_run_and_run(arguments, tmp_path, capsys):
    assert cli.main(["score_as_action", *arguments, "--dry_run"]) == 0
    said = capsys.readouterr().out
    assert re.search(r"training data +4 prompts", said) and "optimizer step     2 prompts" in said
    assert "2 images of each prompt, 16 x 16 pixels, 3 steps at noise level 1" in said and "width" in said
    assert not (tmp_path / "out").exists()
    assert cli.main(["score_as_action", *arguments]) == 0
    assert (tmp_path / "out" / "pytorch_lora_weights.safetensors").is_file()
    assert (tmp_path / "out" / "validation" / "step-1.png").is_file()
    card = (tmp_path / "out" / "README.md").read_text()
    assert "prompts.jsonl" in card and "`width`" in card and "2502.01819" in card


def test_a_reward_is_required(arguments, capsys):
    start = arguments.index("--reward")
    assert cli.main(["score_as_action", *arguments[:start], *arguments[start + 2 :]]) == 1
    assert "A reward is required" in capsys.readouterr().err


@pytest.mark.parametrize(
    "given, told",
    [
        (dict(pick_score=["a", "b", "c"]), "`--pick_score a b c` has 3 names"),
        (dict(aesthetic_reward=["clip"]), "`--aesthetic_reward clip` has 1 names"),
    ],
)
def test_wrong_names_of_models(given, told):
    script = RewardScript(METHODS["score_as_action"])
    script.device = "cpu"
    with pytest.raises(ValueError, match=told):
        script.trainer_arguments(ImageRewardArguments(**given))


def test_help_begins_with_the_method():
    text = make_parser(METHODS["score_as_action"]).format_help_all()
    own, _, rest = text.partition("model, data and start:\n")
    assert "'s own options:\n" in own and "\n  --kl_in_return " in own and "\n  --clip_reward " in text
    refused = text[text.index("\nrefused by ") :]
    assert all(f"\n  --{name} " in refused for name in ScoreAsActionConfig.refused_options())
