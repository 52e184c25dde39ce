"""
Version 0.1.0 goes on working: its checkpoints, caches and ledgers are read, its names and command lines exist.

The files in `legacy/` were written by 0.1.0 (`legacy/make.py`). A run's checkpoint of step 5 is resumed here and has
to log what 0.1.0 went on to log.
"""

import json
import pickle
import shutil
import sys
from pathlib import Path

import pytest
import safetensors.torch


LEGACY = Path(__file__).parent / "legacy"
RECIPES = Path(__file__).parents[1] / "recipes"
sys.path.insert(0, str(LEGACY))

import runs  # noqa: E402


LOGS = json.loads((LEGACY / "logs.json").read_text())
INTERFACE = json.loads((LEGACY / "interface.json").read_text())


@pytest.fixture
def folder(request, tmp_path, monkeypatch) -> Path:
    """A folder with the files that the run of 0.1.0 left, to resume in."""
    pytest.importorskip("diffusers")
    monkeypatch.chdir(LEGACY)
    return shutil.copytree(LEGACY / request.node.callspec.params["name"], tmp_path / "run")


def contents(folder: Path) -> dict[str, bytes]:
    """The caches and the ledger in a run's folder."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.relative_to(folder).parts[0] in KEPT]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def assert_kept(before: dict[str, bytes], after: dict[str, bytes]) -> None:
    """
    What was stored is as it was, and nothing was computed again. A list of a dataset's images goes by the fingerprint
    that `datasets` gives it, which in 4.7 is another one: the images are then listed anew, and found in the cache.
    """
    added = {name: content for name, content in after.items() if name not in before}
    assert {name: content for name, content in after.items() if name in before} == before
    if runs.pictures()._fingerprint == FINGERPRINT:
        assert not added
    names = {name.rpartition("/")[2] for content in added.values() for name in safetensors.torch.load(content)}
    assert names <= {"keys", "sizes"}


FINGERPRINT = "998d26cb14baa00b"  # of `runs.pictures()` where the files were written
KEPT = ("cache", "gold_labels.jsonl")
ROUNDING = 2.0**-23  # of single precision, relative
DIFFERENCES = ("logratios/", "rewards/", "eval_logratios/", "eval_rewards/")


def assert_continues(name: str, entries: list[dict], first: int = 0) -> None:
    """Every number of 0.1.0's log is there: to rounding, as the order of sums is not a promise."""
    assert len(entries) == len(LOGS[name])
    for entry, expected in list(zip(entries, LOGS[name], strict=True))[first:]:
        assert entry.keys() >= expected.keys(), sorted(expected.keys() - entry.keys())
        found = {key: entry[key] for key in expected}
        # Log-ratios and rewards are differences of log-probabilities, whose own rounding stays in them.
        rounding = 2 * ROUNDING * max((abs(expected[key]) for key in expected if key.startswith("logps/")), default=0)
        for key, value in expected.items():
            absolute = max(1e-6, rounding) if key.startswith(DIFFERENCES) else 1e-6
            assert found[key] == pytest.approx(value, rel=1e-5, abs=absolute), (
                f"{name}, step {expected['step']}: {key}"
            )


@pytest.mark.parametrize("name", runs.NAMES)
def test_checkpoint_is_resumed(name, folder):
    """
    The resumed run logs what 0.1.0 logged, and neither computes anything that is in the cache nor buys a label again:
    what is on disk stays as it is. There is no `training_args.bin` in the checkpoint.
    """
    before = contents(folder)
    assert before and not list(folder.rglob("training_args.bin"))
    trainer = runs.trainer(name, folder)
    trainer.train(resume_from_checkpoint=str(folder / f"checkpoint-{runs.STOP}"))
    assert trainer.state.global_step == runs.STEPS
    assert_continues(name, runs.logs(trainer))
    assert_kept(before, contents(folder))


@pytest.mark.parametrize("name", runs.NAMES)
def test_run_is_repeated_from_the_cache(name, folder):
    """From the first step: caches are hit and labels replayed, and the numbers are those of 0.1.0."""
    shutil.rmtree(folder / f"checkpoint-{runs.STOP}")
    before = contents(folder)
    trainer = runs.trainer(name, folder)
    trainer.train()
    assert_continues(name, runs.logs(trainer))
    assert_kept(before, contents(folder))


@pytest.mark.parametrize("name", ["fdpo"])
def test_comparison_notices_lost_state(name, folder):
    """Without the random state, whose dropout the adapter has, the numbers are others."""
    (folder / f"checkpoint-{runs.STOP}" / "rng_state.pth").unlink()
    trainer = runs.trainer(name, folder)
    trainer.train(resume_from_checkpoint=str(folder / f"checkpoint-{runs.STOP}"))
    with pytest.raises(AssertionError):
        assert_continues(name, runs.logs(trainer))


def test_ledger_is_read():
    from trl_ext.d2po import Ledger, ledger_to_dataset

    ledger = Ledger(LEGACY / "d2po" / "gold_labels.jsonl", read_only=True)
    assert [entry["window"] for entry in ledger.entries] == [0, 0, 0, 1, 1, 1]
    dataset = ledger_to_dataset(LEGACY / "d2po" / "gold_labels.jsonl")
    assert len(dataset) == 6 and {"prompt", "chosen", "rejected"} <= set(dataset.column_names)


def test_arguments_of_d2po_are_unpickled():
    """
    0.1.0 pickled a class that it had composed at run time, with the loss's parameters as fields: they are in
    `loss_kwargs`. The file is that of `D2POConfig("run", loss="tdpo", variant="tdpo1", beta=0.2, label_budget=6,
    ...)`.
    """
    import torch

    from trl_ext import D2POConfig

    args = torch.load(LEGACY / "d2po_training_args.bin", weights_only=False)
    assert type(args) is D2POConfig and args.loss == "tdpo" and args.loss_kwargs == {"variant": "tdpo1"}
    assert (args.beta, args.label_budget, args.output_dir) == (0.2, 6, "run") and not hasattr(args, "variant")
    again = pickle.loads(pickle.dumps(args))
    assert again.to_dict() == args.to_dict() and again.make_method_args().variant == "tdpo1"


def expected(kind: str, key: str) -> set[str]:
    from transformers import TrainingArguments

    names = INTERFACE[kind]
    found = set(names["own"][key]) | set(names["shared"] if key in names["alike"] else ())
    # Options of Transformers itself, which 5.22 and older do not have.
    newer = {"activation_checkpointing", "activation_checkpointing_kwargs"} - set(
        TrainingArguments.__dataclass_fields__
    )
    return {each for each in found if each.removeprefix("--").removeprefix("no_") not in newer}


@pytest.mark.parametrize("module", INTERFACE["names"])
def test_public_names_exist(module):
    import importlib

    found = importlib.import_module("trl_ext" + module)
    for name in INTERFACE["names"][module]:
        assert getattr(found, name) is not None  # a renamed one is an alias


def test_options_of_configurations_exist():
    fields = runs.config_fields()
    for name in INTERFACE["fields"]["own"]:
        missing = expected("fields", name) - set(fields[name])
        assert not missing, f"{name}: {sorted(missing)}"


@pytest.mark.parametrize("command", INTERFACE["options"]["own"])
def test_command_line_exists(command):
    missing = expected("options", command) - set(runs.options_of(command, RECIPES))
    if command.startswith("d2po.py"):
        missing -= parameters_taken(command, missing)
    assert not missing, sorted(missing)


def parameters_taken(command: str, options: set[str]) -> set[str]:
    """The options that D2PO's help no longer lists, as they are `loss_kwargs` now, and its parser still takes."""
    from trl_ext import D2POConfig

    _, _, loss = command.partition("--loss ")
    arguments = ["--loss", loss] if loss else []
    parser, taken = D2POConfig._parser_class(D2POConfig), set()
    for option in options:
        is_off = option.startswith("--no_")
        with pytest.warns(FutureWarning, match="loss_kwargs"):
            namespace, unknown = parser.parse_known_args([*arguments, option, *([] if is_off else ["0.5"])])
        name, value = (option.removeprefix("--no_"), False) if is_off else (option.removeprefix("--"), 0.5)
        if not unknown and namespace.loss_kwargs == {name: value}:
            taken.add(option)
    return taken
