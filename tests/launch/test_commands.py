"""
`trl-ext` as somebody meets it: which commands there are, what their help says, and what a wrong option is answered.
"""

import ast
import json
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import trl_ext
from trl_ext import cli
from trl_ext.launch import configurations, train
from trl_ext.launch.commands import COMMANDS, METHODS
from trl_ext.launch.options import COMMON, UsageError, make_parser, parse


ROOT = Path(__file__).resolve().parents[2]


def test_help_lists_every_command(capsys):
    assert cli.main(["--help"]) == 0
    lines = capsys.readouterr().out.splitlines()
    listed = [line.split()[0] for line in lines if line.startswith("  ") and not line.startswith("  trl-ext")]
    assert listed == list(COMMANDS) and set(listed) >= {"fdpo", "tdpo", "mallows", "rainbowpo", "simper", "d2po"}
    assert max(map(len, lines)) <= 119


def test_mistyped_command(capsys):
    assert cli.main(["diffusion-dpo"]) == 2
    said = capsys.readouterr().err
    assert "'diffusion-dpo'" in said and "`diffusion_dpo`" in said


def test_help_waits_for_nothing():
    """`trl-ext --help` must not import torch."""
    code = "import sys, trl_ext.cli; trl_ext.cli.main(['--help']); assert not {'torch', 'trl'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, stdout=subprocess.DEVNULL, timeout=60)


def test_subpackages_are_attributes():
    """As the README writes it: `import trl_ext; trl_ext.losses.f_dpo_loss`."""
    code = "import trl_ext; trl_ext.losses.f_dpo_loss; trl_ext.kernels.paired_head_statistics; trl_ext.preference"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, timeout=120)
    folders = {path.parent.name for path in (ROOT / "trl_ext").glob("*/__init__.py")}
    assert set(trl_ext._SUBPACKAGES) == folders and folders <= set(dir(trl_ext))


def test_type_checkers_see_what_is_there():
    """The names under `TYPE_CHECKING`, the lazy names and `__all__` are the same."""
    tree = ast.parse(Path(trl_ext.__file__).read_text())
    block = next(node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")
    seen = {(node.module, alias.name) for node in block.body for alias in node.names}
    classes = {(module.removeprefix("trl_ext."), name) for name, module in trl_ext._PUBLIC.items()}
    rooms = {name for module, name in seen if module is None}
    assert {pair for pair in seen if pair[0]} == classes
    assert {"evaluation", "fdpo", "kernels", "losses", "preference"} <= rooms <= set(trl_ext._SUBPACKAGES)
    assert set(trl_ext.__all__) == {*trl_ext._PUBLIC, "__version__"}


# ---- Help -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", METHODS)
def test_help_is_short(name, capsys):
    """What the method does, its own options, those that people set, and how to see the rest."""
    method = METHODS[name]
    with pytest.raises(SystemExit) as exited:
        parse(method, ["--help"], f"trl-ext {name}")
    text = capsys.readouterr().out
    lines = text.splitlines()
    assert exited.value.code == 0
    assert lines[0].startswith(f"usage: trl-ext {name}") and lines[2].startswith(f"{method.title}: ")
    shown = [line.split()[0].removeprefix("--") for line in lines if line.startswith("  --")]
    assert len(shown) == len(set(shown)) and "--help-all" in lines[-2]
    refused = set(method.config_class.refused_options())
    parser = make_parser(method)
    known = {action.dest for action in parser._actions}
    assert set(shown) >= (set(COMMON) & known) - refused and not set(shown) & refused
    own = {field for cls in method.config_class.__mro__[:1] for field in vars(cls).get("__annotations__", {})}
    assert set(shown) >= {field for field in own if not field.startswith("_")} - refused
    assert len(shown) < len(known) / 2 and "this will be ignored" not in text and "no_bf16" not in text


def test_help_tells_defaults():
    """Of parameters whose field is None, and of beta, whose help once spoke of a loss type that is refused."""
    text = " ".join(make_parser(METHODS["fdpo"]).format_help().split())
    for option, default in {"alpha": "0.5", "skew": "0.5", "gamma": "1"}.items():
        part = text[text.index(f" --{option} ") :].partition(" --")[2].partition(" --")[0]
        assert f"Default: {default}." in part and "None" not in part
    assert "loss_type" not in text and "ipo" not in text
    complete = " ".join(make_parser(METHODS["fdpo"]).format_help_all().split())
    assert "`datasets` is provided, this" not in complete


@pytest.mark.parametrize("name", METHODS)
def test_closed_sets_are_choices(name):
    """A field that has choices is a choice of the command line too, and a wrong value is answered with them."""
    method = METHODS[name]
    parser = make_parser(method)
    fields = method.config_class.__dataclass_fields__.values()
    closed = {field.name: list(field.metadata["choices"]) for field in fields if "choices" in field.metadata}
    actions = {action.dest: action for action in parser._actions}
    for option, values in closed.items():
        assert set(actions[option].choices) == set(values), option
    expected = {"fdpo": "divergence", "tdpo": "variant", "mallows": "link", "rainbowpo": "link", "d2po": "selection"}
    expected |= {"diffusion_dpo": "loss_type", "dspo": "variant"}
    if name in expected:
        assert expected[name] in closed
        with pytest.raises(UsageError, match=f"--{expected[name]}.*nonsense"):
            parser.parse([f"--{expected[name]}", "nonsense"])


# ---- Wrong arguments ------------------------------------------------------------------------------------------------


def test_unknown_options(tmp_path, capsys):
    """On the command line and in a file: named, with the nearest one, before anything else is said."""
    assert cli.main(["fdpo", "--divergense", "js"]) == 2
    said = capsys.readouterr().err
    assert "--divergense" in said and "Did you mean --divergence?" in said and "bf16" not in said
    (tmp_path / "config.yaml").write_text("learning_rat: 1.0e-5\n")
    assert cli.main(["fdpo", "--config", str(tmp_path / "config.yaml"), "--use_cpu", "true"]) == 2
    said = capsys.readouterr().err
    assert "learning_rat" in said and "configuration file" in said and "Did you mean --learning_rate?" in said


@pytest.mark.parametrize("name", ["fdpo", "diffusion_dpo"])
def test_without_a_gpu_the_remedy_is_an_option(name, monkeypatch, capsys):
    """Transformers says "assign use_cpu"; on a command line that is `--use_cpu true`."""
    monkeypatch.setattr("transformers.training_args.is_torch_bf16_gpu_available", lambda: False)
    assert cli.main([name, "--model_name_or_path", "m", "--dataset_name", "d", "--output_dir", "o"]) == 2
    assert "--use_cpu true" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["--dataset_name", "d"], "--model_name_or_path"),
        (["--model_name_or_path", "m"], "--dataset_name"),
        (["--config"], "full, lora, qlora"),
        (["--config", "lorra"], "full, lora, qlora"),
        (["--beta", "-1"], "`beta`"),
        (["--accelerate_config", "many_gpus"], "multi_gpu"),
        (["--num_processes", "two"], "--num_processes two"),
    ],
)
def test_arguments_that_cannot_be(arguments, said, capsys):
    assert cli.main(["simper" if arguments[0] != "--beta" else "fdpo", "--use_cpu", "true", *arguments]) == 2
    error = capsys.readouterr().err
    assert said in error and "Traceback" not in error


def test_a_missing_extra_is_named_before_anything_is_loaded(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    arguments = ["--model_name_or_path", "m", "--dataset_name", "d", "--use_cpu", "true", "--load_in_4bit", "true"]
    assert cli.main(["fdpo", *arguments]) == 2
    said = capsys.readouterr().err
    assert "trl-ext[quantization]" in said and "`bitsandbytes`" in said


# ---- Configurations -------------------------------------------------------------------------------------------------


def test_configurations_by_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = configurations.with_configuration(["--config", "lora", "--seed", "1"], "fdpo")
    assert found == ["--config", str(ROOT / "recipes/configs/fdpo/lora.yaml"), "--seed", "1"]
    assert configurations.with_configuration(["--config=lora"], "fdpo") == found[:2]
    (tmp_path / "lora").write_text("seed: 3\n")  # a file of the user's goes first
    assert configurations.with_configuration(["--config", "lora"], "fdpo") == ["--config", "lora"]
    assert configurations.find_accelerate_configuration("zero2").name == "zero2.yaml"


def test_the_wheel_has_what_the_launcher_reads():
    wheel = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]["wheel"]
    for folder in ("configs", "accelerate", "data"):
        assert wheel["force-include"][f"recipes/{folder}"] == f"trl_ext/recipes/{folder}"
        assert (ROOT / "recipes" / folder).is_dir()
    assert {configurations.CONFIGURATIONS.name, configurations.ACCELERATE.name} <= {"configs", "accelerate"}
    for method in METHODS:
        assert configurations.shipped(method), method


@pytest.mark.parametrize("name", ["full", "lora", "qlora"])
def test_kappa_is_estimated_for_the_model_at_hand(name):
    """Llama-3's number makes the weights of another model average 0.03, which silently rescales beta."""
    import yaml

    config = yaml.safe_load((configurations.CONFIGURATIONS / "rainbowpo" / f"{name}.yaml").read_text())
    assert config["kappa"] == "auto"


# ---- Several processes ----------------------------------------------------------------------------------------------


def test_trl_ext_starts_several_processes(monkeypatch):
    """`--accelerate_config` and `--num_processes` become options of `accelerate launch`, the rest the command's."""
    started = {}

    def launch_command(arguments):
        started.update(vars(arguments))
        started["typed"] = json.loads(train.os.environ["TRL_EXT_COMMAND"])

    monkeypatch.setattr("accelerate.commands.launch.launch_command", launch_command)
    monkeypatch.setattr(sys, "argv", ["/usr/bin/trl-ext", "fdpo", "--num_processes", "2", "--seed", "1"])
    monkeypatch.setenv("TRL_EXT_COMMAND", "")
    monkeypatch.delenv("TRL_EXT_COMMAND")
    for variable in ("LOCAL_RANK", "ACCELERATE_MIXED_PRECISION"):
        monkeypatch.delenv(variable, raising=False)
    assert cli.main(["fdpo", "--num_processes", "2", "--seed", "1", "--accelerate-config=cpu_2proc"]) == 0
    assert started["num_processes"] == 2 and started["module"] and started["training_script"] == "trl_ext"
    assert started["config_file"].endswith("cpu_2proc.yaml")
    assert started["training_script_args"] == ["fdpo", "--seed", "1"]
    assert started["typed"] == ["trl-ext", "fdpo", "--num_processes", "2", "--seed", "1"]
    monkeypatch.setenv("LOCAL_RANK", "0")
    with pytest.raises(UsageError, match="accelerate launch"):
        train.launch_arguments(["--num_processes", "2"])
