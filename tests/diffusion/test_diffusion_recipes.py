"""Recipes of the diffusion methods, as users launch them, and their configurations."""

import json
import re
import subprocess
import sys
from pathlib import Path

import diffusion_harness
import pytest
import reward_harness
import tiny_pipelines
import yaml
from peft import LoraConfig
from safetensors.torch import load_file
from test_latent_cache import png

from trl_ext import DiffusionDPOConfig, DiffusionDPOTrainer, DSPOConfig, DSPOTrainer, cli
from trl_ext.diffusion.data import ImagePreferenceDataset
from trl_ext.launch.commands import METHODS as COMMANDS
from trl_ext.launch.options import make_parser
from trl_ext.launch.scripts import ImageScript
from trl_ext.launch.train import main
from trl_ext.training.named_datasets import load_named_dataset


ROOT = Path(__file__).resolve().parents[2]
RECIPES = ROOT / "recipes"
METHODS = {"diffusion_dpo": DiffusionDPOConfig, "dspo": DSPOConfig}
TRAINERS = {"diffusion_dpo": DiffusionDPOTrainer, "dspo": DSPOTrainer}
CONFIGS = sorted(path for method in METHODS for path in (RECIPES / "configs" / method).glob("*.yaml"))


def parse(path: Path, *arguments: str):
    arguments = ["--config", str(path), "--use_cpu", "true", *arguments]
    return make_parser(COMMANDS[path.parent.name]).parse(arguments)


def init_kwargs(training_args, model_args):
    return ImageScript(COMMANDS["dspo"]).model_init_kwargs(training_args, model_args)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_configurations_parse(path):
    """Every key is an option, and every value arrives where it should."""
    parsed = parse(path)
    for key, value in yaml.safe_load(path.read_text()).items():
        got = getattr(next(namespace for namespace in parsed if hasattr(namespace, key)), key)
        if key in ("optim", "lr_scheduler_type"):
            assert str(got.value if hasattr(got, "value") else got) == value
        else:
            assert got == value, key
    _, training_args, model_args, *_ = parsed
    assert model_args.use_peft == (not path.stem.endswith("_full"))
    assert model_args.load_in_4bit == path.stem.endswith("_qlora")
    # 4-bit weights compute in `dtype`; a frozen base is held in it.
    kwargs = init_kwargs(training_args, model_args)
    assert kwargs.get("dtype") == ("bfloat16" if model_args.use_peft else None)
    assert "trust_remote_code" not in kwargs


@pytest.mark.parametrize("name, config", METHODS.items())
def test_help_begins_with_the_method_and_says_what_is_refused(name, config):
    text = make_parser(COMMANDS[name]).format_help_all()
    own, _, rest = text.partition("model, data and start:\n")
    assert "'s own options:\n" in own and "\n  --cache_latents " in own and "\n  --dtype " in rest
    refused = text[text.index("\nrefused by ") :]
    # Each once: `--no_...`, the second name of some switches, refers to the first.
    assert refused.count("Refused: ") == text.count("Refused: ") == len(config.refused_options()) > 0
    assert all(f"\n  --{name} " in refused for name in config.refused_options())


def test_every_model_has_its_configurations():
    names = {path.stem for path in CONFIGS if path.parent.name == "diffusion_dpo"}
    newer = {
        f"{model}_{mode}" for model in ("flux", "kontext", "flux2", "klein", "qwen") for mode in ("lora", "qlora")
    }
    assert {f"{model}_{mode}" for model in ("sd15", "sdxl", "sd35") for mode in ("lora", "qlora")} <= names
    for method in (*METHODS, "score_as_action"):
        assert newer <= {path.stem for path in (RECIPES / "configs" / method).glob("*.yaml")}
    for path in CONFIGS:
        # QLoRA is LoRA with quantized weights, and nothing else.
        if path.stem.endswith("_qlora"):
            qlora, lora = (
                yaml.safe_load(p.read_text()) for p in (path, path.with_stem(path.stem.replace("qlora", "lora")))
            )
            assert qlora.pop("load_in_4bit") and qlora.pop("use_bnb_nested_quant")
            assert qlora.pop("output_dir") != lora.pop("output_dir")
            assert qlora == lora


# Ids of the Hub, and the tiny pipeline of the same class.
MODELS = {
    "stable-diffusion-v1-5/stable-diffusion-v1-5": "sd",
    "stabilityai/stable-diffusion-xl-base-1.0": "sdxl",
    "stabilityai/stable-diffusion-3.5-medium": "sd3",
    "black-forest-labs/FLUX.1-dev": "flux",
    "black-forest-labs/FLUX.1-Kontext-dev": "kontext",
    "black-forest-labs/FLUX.2-dev": "flux2",
    "black-forest-labs/FLUX.2-klein-base-4B": "klein",
    "Qwen/Qwen-Image": "qwen",
}
NO_QLORA = [path for path in CONFIGS if not path.stem.endswith("_qlora")]
NO_QLORA += sorted((RECIPES / "configs" / "score_as_action").glob("*_lora.yaml"))


@pytest.mark.parametrize("path", NO_QLORA, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_configurations_fit_their_pipelines(path, tmp_path):
    """
    A trainer can be made with every option of a configuration, of a small pipeline of the class that its model has:
    none of them is refused there. Latents are cached for Stable Diffusion 1.5 alone, whose are small.
    """
    values = yaml.safe_load(path.read_text())
    names = ("resolution", "bf16", "dtype", "use_peft", "dataset_name", "output_dir", "validation_prompts")
    names += ("lora_r", "lora_alpha", "lora_dropout", "model_name_or_path", "validation_steps")
    given = {name: value for name, value in values.items() if name not in names}
    lora = LoraConfig(r=values["lora_r"], lora_alpha=values["lora_alpha"]) if values.get("use_peft") else None
    if path.parent.name == "score_as_action":
        needed = given["per_device_train_batch_size"] * given["gradient_accumulation_steps"]
        data = reward_harness.prompts(needed // given["num_generations"])
        make, classes = reward_harness.trainer, {}
    else:
        classes = {"config_class": METHODS[path.parent.name], "trainer_class": TRAINERS[path.parent.name]}
        data, make = diffusion_harness.dataset(4), diffusion_harness.trainer
        assert not given["cache_latents"] or values["model_name_or_path"].startswith("stable-diffusion-v1-5")
    name = MODELS[values["model_name_or_path"]]
    run = make(name, tmp_path, peft_config=lora, train_dataset=data, **classes, **given)
    if "guidance_scale" in given:
        used = run.family.guidance_scale if run.family.is_guidance_distilled else run.sampler.guidance_scale
        assert used == given["guidance_scale"]


def test_an_option_without_effect_is_refused():
    _, training_args, model_args, *_ = parse(CONFIGS[0], "--attn_implementation", "sdpa")
    with pytest.raises(ValueError, match="`--attn_implementation sdpa` has no effect on a diffusion pipeline"):
        init_kwargs(training_args, model_args)


def launch(recipe: str, *arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--num_processes", "1"]
    command += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--cpu"]
    command += [str(RECIPES / f"{recipe}.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=600)


def test_launch(tmp_path):
    """
    The LoRA configuration, overridden to a tiny pipeline's folder and to a JSONL file that names images, trains from
    cached latents and saves a LoRA that a fresh pipeline loads.
    """
    from diffusers import StableDiffusionPipeline

    tiny_pipelines.pipeline("sd").save_pretrained(tmp_path / "model")
    rows = []
    for i in range(4):
        row = {"prompt": f"digit {i}"}
        for j, side in enumerate(("chosen", "rejected")):
            path = tmp_path / f"{side}{i}.png"
            path.write_bytes(png(2 * i + j))
            row[side] = path.name  # looked up beside the data file
        rows.append(json.dumps(row))
    (tmp_path / "pairs.jsonl").write_text("\n".join(rows))
    output = tmp_path / "out"
    arguments = ["--config", str(RECIPES / "configs" / "diffusion_dpo" / "sd15_lora.yaml")]
    arguments += ["--model_name_or_path", str(tmp_path / "model"), "--dataset_name", str(tmp_path / "pairs.jsonl")]
    arguments += ["--output_dir", str(output), "--use_cpu", "true", "--bf16", "false", "--dtype", "float32"]
    arguments += ["--resolution", "16", "--max_steps", "2", "--logging_steps", "1", "--report_to", "none"]
    arguments += ["--per_device_train_batch_size", "2", "--gradient_accumulation_steps", "1"]
    arguments += ["--validation_inference_steps", "2", "--cache_dir", str(tmp_path / "cache")]
    result = launch("diffusion_dpo", *arguments)
    assert result.returncode == 0, result.stderr[-3000:]
    log = json.loads((output / "trainer_state.json").read_text())["log_history"]
    assert sum("loss" in entry for entry in log) == 2
    assert list((tmp_path / "cache").glob("shard-*.safetensors"))
    card = (output / "README.md").read_text()
    assert "2311.12908" in card and "pairs.jsonl" in card
    pipeline = StableDiffusionPipeline.from_pretrained(tmp_path / "model")
    pipeline.load_lora_weights(output)
    assert pipeline.get_list_adapters()


@pytest.mark.parametrize("kind", ["json", "jsonl", "csv", "parquet"])
def test_relative_images_are_looked_up_beside_the_data_file(kind, tmp_path, monkeypatch):
    """Whatever the working directory; `--image_dir` goes first; a dataset of the Hub has no folder."""
    import pandas as pd

    from trl_ext.training.named_datasets import folder_of_images

    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a.png").write_bytes(png(0))
    frame = pd.DataFrame([{"prompt": "a", "chosen": "a.png", "rejected": "a.png"}])
    path = tmp_path / "data" / f"pairs.{kind}"
    write = {
        "json": lambda: frame.to_json(path, orient="records"),
        "jsonl": lambda: frame.to_json(path, orient="records", lines=True),
        "csv": lambda: frame.to_csv(path, index=False),
        "parquet": lambda: frame.to_parquet(path),
    }
    write[kind]()
    monkeypatch.chdir(tmp_path)
    script_args, training_args, *_ = parse(CONFIGS[0], "--dataset_name", f"data/pairs.{kind}")
    ImageScript(COMMANDS["dspo"]).complete(script_args, training_args)
    rows = load_named_dataset(script_args.dataset_name)["train"]
    monkeypatch.chdir("/")
    assert ImagePreferenceDataset(rows, 8, image_dir=training_args.image_dir)[0]["pixel_values"].shape == (2, 3, 8, 8)
    monkeypatch.chdir(tmp_path)
    script_args, training_args, *_ = parse(CONFIGS[0], "--dataset_name", f"data/pairs.{kind}", "--image_dir", "here")
    ImageScript(COMMANDS["dspo"]).complete(script_args, training_args)
    assert training_args.image_dir == "here"
    assert folder_of_images("yuvalkirstain/pickapic_v2") is None and folder_of_images(None) is None


@pytest.mark.parametrize("name, family", [("diffusion_dpo", "sdxl"), ("dspo", "sd")])
def test_dry_run(name, family, tmp_path, capsys):
    """Pairs left out, sizes, prompts that are cut, the cache's size on disk as it turns out; nothing is encoded yet."""
    tiny_pipelines.pipeline(family).save_pretrained(tmp_path / "model")
    rows = []
    for i in range(6):
        for j in (i, i + 6):
            (tmp_path / f"{j}.png").write_bytes(png(j))
        rows.append({"caption": "a " * 40 if i == 1 else f"digit {i}", "jpg_0": f"{i}.png", "jpg_1": f"{i + 6}.png"})
        rows[-1]["label_0"] = 0.5 if i == 5 else float(i % 2)
    rows[2]["jpg_0"] = "nowhere.png"
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = ["--model_name_or_path", str(tmp_path / "model"), "--dataset_name", str(tmp_path / "pairs.jsonl")]
    arguments += ["--output_dir", str(tmp_path / "out"), "--use_cpu", "true", "--bf16", "false", "--resolution", "16"]
    arguments += ["--use_peft", "true", "--lora_r", "4", "--cache_latents", "true", "--report_to", "none"]
    arguments += ["--skip_broken_images", "true", "--max_steps", "2", "--per_device_train_batch_size", "2"]
    arguments += ["--prompt_dropout", "0.0", "--save_strategy", "no"]
    assert cli.main([name, *arguments, "--dry_run"]) == 0
    text = capsys.readouterr().out
    assert re.search(r"training data +4 of 6 pairs.*16 x 16", text) and re.search(r"image sizes +24 x 20 \(8\)", text)
    assert re.search(r"left out +1: an image", text) and re.search(r"left out +1: a tie", text)
    limits = re.findall(r"cut prompts +1 of 4: .*`(tokenizer\w*)` reads 16 tokens", text)
    assert limits == (["tokenizer", "tokenizer_2"] if family == "sdxl" else ["tokenizer"])
    assert re.search(r"optimizer step +2 pairs", text) and re.search(r"length +2 steps, 1 epoch,", text)
    assert re.search(r"parameters +[\d,]+ trained of", text) and re.search(r"memory +about [\d.]+ [KMG]iB", text)
    assert re.search(r"chosen +\| 24 x 20 pixels, .*/6.png", text)  # the first row prefers `jpg_1`
    assert not list(tmp_path.glob("out/_latent_cache/*"))
    size = float(re.search(r"latent cache +about ([\d.]+) KiB in .*out/_latent_cache", text)[1])
    assert cli.main([name, *arguments]) == 0
    written = 0
    for path in (tmp_path / "out" / "_latent_cache").glob("*.safetensors"):
        written += sum(tensor.nbytes for tensor in load_file(path).values())
    assert size * 1024 == pytest.approx(written, rel=0.03)  # each image's size is kept too


def test_data_and_the_trainers_name_the_same_images(tmp_path, capsys):
    """`trl-ext data` says of a file of image pairs what a trainer's constructor says, and finds images beside it."""
    rows = []
    for i in range(4):
        (tmp_path / f"{i}.png").write_bytes(png(i))
        rows.append({"prompt": f"digit {i}", "chosen": f"{i}.png", "rejected": f"{i}.png"})
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert cli.main(["data", str(path)]) == 0
    said = capsys.readouterr().out
    assert "pairs of images" in said and "(8)" in said and "diffusion_dpo" in said and "No problems" in said
    (tmp_path / "2.png").write_bytes(b"no image")
    (tmp_path / "3.png").write_bytes(png(3)[:200])  # cut: only decoding shows it
    rows[1]["rejected"] = "nowhere.png"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for verify in (False, True):
        dataset = load_named_dataset(str(path))["train"]
        with pytest.raises(ValueError, match="Row 1 .*`rejected`.*\nRow 2 .*`chosen`") as raised:
            ImagePreferenceDataset(dataset, 16, image_dir=tmp_path, verify_images=verify)
        assert cli.main(["data", str(path), *(["--verify_images"] if verify else [])]) == 1
        said = capsys.readouterr().out
        assert all(line in said for line in str(raised.value).splitlines())
        assert ("Row 3" in said) == verify


def test_without_arguments_it_says_what_to_give(capsys):
    """The smallest pipeline, and the demonstration that downloads none: not the biggest one, whose model is gated."""
    for name in METHODS:
        with pytest.raises(SystemExit) as exited:
            main(name, [], f"{name}.py")
        said = capsys.readouterr().err
        assert exited.value.code == 2
        assert f"{name}.py --config sd15_lora --dataset_name" in said and "recipes/diffusion_demo.py" in said
        assert "flux_" not in said


def test_the_benchmark_runs(tmp_path):
    """On a small shape: every way is measured, and what is printed is what is written."""
    command = [sys.executable, str(RECIPES / "benchmarks" / "diffusion_cost.py"), "--shape", "tiny", "--rounds", "2"]
    command += ["--no_memory", "--json", str(tmp_path / "results.json")]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-3000:]
    measured = json.loads((tmp_path / "results.json").read_text())["results"]["time"]
    assert [len(times) for times in measured["seconds"].values()] == [2, 2]
    assert f"{measured['ratio']:.3f} times" in result.stdout
