"""What could keep a report from being written after hours of measuring: numbers, names, the folder, the disk."""

import errno
import io
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny

from trl_ext import cli
from trl_ext.evaluation import (
    EvaluationConfig,
    Judge,
    RewardFunctionJudge,
    evaluate,
    evaluate_models,
    render_report,
    report as module,
)
from trl_ext.evaluation.command import _show
from trl_ext.evaluation.output import ReportFolder
from trl_ext.evaluation.report import numbers_as_json, write_report


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return tiny.write_models(tmp_path_factory.mktemp("output"), 6)


@pytest.fixture(scope="module")
def measured() -> dict:
    """A report with everything in it but what a judge that fails late leaves out."""

    def longer(prompts, completions):
        return [float(len(completion)) for completion in completions]

    config = EvaluationConfig(num_samples=2, max_new_tokens=4, distinct_length=2, num_prompts=4)
    models = {"a": tiny.model(seed=1), "b": tiny.model(seed=2)}
    judge = RewardFunctionJudge(longer)
    return evaluate_models(models, tiny.model(), tiny.rows(6), tiny.tokenizer(), judge, config)


def copied(report: dict) -> dict:
    return json.loads(json.dumps(report))


def arguments(folders, output, *more: str, models=("first", "second")) -> list[str]:
    words = ["evaluate", "--model", *(str(folders / name) for name in models), "--device", "cpu", "--num_samples", "0"]
    words += ["--reference", str(folders / "reference"), "--dataset", str(folders / "pairs.jsonl")]
    return [*words, "--output_dir", str(output), *more]


# ---- Numbers --------------------------------------------------------------------------------------------------------


def with_numbers(value, number: float):
    """A report whose every estimate is `number`, with an interval of it."""
    if isinstance(value, list):
        return [with_numbers(item, number) for item in value]
    if not isinstance(value, dict):
        return value
    is_estimate = {"value", "low", "high"} <= value.keys()
    return {
        k: number if is_estimate and k in ("value", "low", "high") else with_numbers(v, number)
        for k, v in value.items()
    }


@pytest.mark.parametrize("number", [np.nan, np.inf, -np.inf, np.float32(3.5), 1e300], ids=str)
def test_any_number(number, measured, tmp_path):
    """The JSON can be read by every parser, the page is made, and made again from the JSON it is the same."""
    report = with_numbers(copied(measured), number)
    for result in report["models"].values():
        result["pairs"]["difficulty"][:2] = [number, -number]
        result["divergence"]["kl_per_token"] = number
    numbers, page = write_report(report, tmp_path)

    def refuse(name):
        raise AssertionError(f"{name} is no JSON")

    found = json.loads(numbers.read_text(), parse_constant=refuse)
    value = found["models"]["a"]["divergence"]["kl"]["value"]
    assert value == (float(number) if np.isfinite(number) else None)
    assert render_report(found) == page.read_text() == render_report(report)


def test_difficulties_that_are_none(measured, tmp_path):
    """Responses that the reference finds impossible, all of them."""
    report = copied(measured)
    for result in report["models"].values():
        result["pairs"]["difficulty"] = [np.inf] * len(result["pairs"]["difficulty"])
    write_report(report, tmp_path)


def test_a_judge_of_the_users_may_describe_itself_as_it_likes(tmp_path):
    """Numbers of NumPy, sets, paths, functions, keys that are no texts: all in the report, as text if need be."""

    class Odd(Judge):
        name = "odd"

        def __call__(self, prompts, completions_a, completions_b):
            return [1.0 for _ in prompts]

        def describe(self):
            told = {"name": self.name, "scale": np.float32(0.5), "counts": np.arange(2), "where": Path("x"), 3: {1}}
            return {**told, "nan": float("nan"), "function": len, ("a", 1): (np.int64(2), None, True)}

    config = EvaluationConfig(num_samples=0, num_prompts=2, max_new_tokens=2)
    report = evaluate_models({"m": tiny.model(seed=1)}, tiny.model(), tiny.rows(2), tiny.tokenizer(), Odd(), config)
    numbers, page = write_report(report, tmp_path)
    found = json.loads(numbers.read_text())["judge"]
    assert found["scale"] == 0.5 and found["counts"] == [0, 1] and found["where"] == "x" and found["3"] == [1]
    assert found["nan"] is None and "len" in found["function"] and found["('a', 1)"] == [2, None, True]
    assert "odd" in page.read_text()


def test_a_judge_that_cannot_describe_itself_is_found_before_anything_is_measured(monkeypatch):
    class Mute(Judge):
        def describe(self):
            raise RuntimeError("no words")

    monkeypatch.setattr(evaluate, "sample_responses", lambda *args, **kwargs: pytest.fail("sampled"))
    with pytest.raises(RuntimeError, match="no words"):
        evaluate_models({"m": tiny.model()}, tiny.model(), tiny.rows(2), tiny.tokenizer(), Mute())


@pytest.mark.parametrize("whose", ["model", "reference"])
def test_weights_that_are_not_numbers_are_named(whose, folders, tmp_path, capsys):
    """The models before are in the report, and so says the error."""
    import torch

    broken = tiny.model(seed=1)
    with torch.no_grad():
        broken.model.layers[0].mlp.up_proj.weight[0, 0] = float("nan")
    broken.save_pretrained(tmp_path / "broken")
    tiny.tokenizer().save_pretrained(tmp_path / "broken")
    words = arguments(folders, tmp_path / "out", models=("first",))
    words.insert(words.index("--model") + 2, str(tmp_path / "broken"))
    if whose == "reference":
        words = arguments(folders, tmp_path / "out")
        words[words.index("--reference") + 1] = str(tmp_path / "broken")
    assert cli.main(words) == 1
    told = capsys.readouterr().err
    assert f"{'The reference' if whose == 'reference' else tmp_path / 'broken'}: the log-probabilities of 6" in told
    assert ("What was measured until then is in" in told) == (whose == "model")
    if whose == "model":
        found = json.loads((tmp_path / "out" / "report.json").read_text())
        assert list(found["models"]) == [str(folders / "first")] and found["unfinished"] == [str(tmp_path / "broken")]


# ---- Names ----------------------------------------------------------------------------------------------------------

NAMES = {
    "slashes": "a/b\\c//d/../e/",
    "lines": "a\nb\r\nc\u2028d\x85e",
    "long": "x" * 300,
    "empty": "",
    "blank": "  \t",
    "control": "a\x00b\x1b[31mc\x7f",
    "surrogate": "a\ud83d",
    "formula": "$\\frac{1}$ a_b^c $x$ %s {0} {{ 7*7 }}",
    "right to left": "\u202eabc\u200f\u05d0",
    "emoji": "\U0001f600\U0001f468\u200d\U0001f469",
    "number": "1e9999",
}


@pytest.mark.filterwarnings("ignore:Glyph")
@pytest.mark.parametrize("name", NAMES)
def test_any_name(name, measured, tmp_path):
    """Of models, reference, data, judge and opponent; two models of like names can be told apart."""
    report, given = copied(measured), NAMES[name]
    results = list(report["models"].values())
    report["models"] = {given: results[0], f"{given}'": results[1]}
    for sample in report["samples"]:
        sample["responses"] = dict(zip(report["models"], sample["responses"].values(), strict=True))
    report["reference"]["name"] = report["dataset"] = report["judge"]["name"] = report["config"]["opponent"] = given
    for result in results:  # the figure of win rates, whose axis names the opponent
        del result["sample_reward"]
    numbers, page = write_report(report, tmp_path)
    assert list(json.loads(numbers.read_text(encoding="utf-8"))["models"]) == [given, f"{given}'"]
    text = page.read_text(encoding="utf-8")
    assert text.count("<svg") == 5 and not {"\x00", "\x1b", "\x7f"} & set(text)


@pytest.mark.parametrize("encoding", ["ascii", "utf-8", "latin-1"])
def test_any_name_on_standard_output(encoding, monkeypatch):
    """A folder's name may hold bytes that are no UTF-8, which Python reads as lone surrogates."""
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding=encoding))
    _show("runs/\udcff-ü-\U0001f600")
    sys.stdout.flush()
    assert written.getvalue().startswith(b"runs/?-")


@pytest.mark.parametrize("setting", [{"text.usetex": True}, {"font.size": 1000}, {"svg.fonttype": "none"}], ids=str)
def test_the_users_style_is_not_the_reports(setting, measured, tmp_path):
    """LaTeX, which may not be installed, is asked for in the user's `matplotlibrc`; the page is the same."""
    import matplotlib

    plain = render_report(measured)
    with matplotlib.rc_context(setting):
        assert render_report(measured) == plain
        assert matplotlib.rcParams[next(iter(setting))] == next(iter(setting.values()))


# ---- The folder -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kind", ["a file", "below a file", "report.json", "report.html", "null", "too long", "no space"]
)
def test_a_folder_that_cannot_be_written_is_found_before_anything_is_measured(
    kind, folders, tmp_path, capsys, monkeypatch
):
    from trl_ext.training import output_folder

    folder = tmp_path / "out"
    if kind in ("a file", "below a file"):
        folder.write_text("")
        folder = folder / "deeper" if kind == "below a file" else folder
    elif kind.startswith("report"):
        (folder / kind).mkdir(parents=True)
    elif kind == "null":
        folder = f"{tmp_path}/a\0b"
    elif kind == "too long":
        folder = tmp_path / ("x" * 300)
    else:

        def full(**kwargs):
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(output_folder.tempfile, "TemporaryFile", full)
    for name in ("sample_responses", "score_pairs", "tokenize_and_count"):
        monkeypatch.setattr(evaluate, name, lambda *args, **kwargs: pytest.fail("measured"))
    assert cli.main(arguments(folders, folder)) == 1
    told = capsys.readouterr().err
    assert "`output_dir=" in told and "Give another" in told and "Traceback" not in told


class Disk:
    """A disk on which some of the writes fail, by the names of the files."""

    def __init__(self, monkeypatch, fails):
        self.original, self.fails, self.tried = module._write_whole, fails, []
        monkeypatch.setattr(module, "_write_whole", self.write)

    def write(self, path, text):
        self.tried.append(path.name)
        if self.fails(path, len(self.tried)):
            raise OSError(errno.ENOSPC, "No space left on device")
        self.original(path, text)


@pytest.mark.filterwarnings("ignore:The report so far")
def test_a_disk_that_is_full_for_a_while(folders, tmp_path, capsys, monkeypatch):
    """After the first model nothing can be written; the second is measured all the same, and then all is there."""
    Disk(monkeypatch, lambda path, number: number == 1)
    assert cli.main(arguments(folders, tmp_path / "out")) == 0
    told = capsys.readouterr()
    assert "was not saved (OSError" in told.err and "Numbers:" in told.out
    found = json.loads((tmp_path / "out" / "report.json").read_text())
    assert list(found["models"]) == [str(folders / "first"), str(folders / "second")] and not found["unfinished"]


@pytest.mark.filterwarnings("ignore:The report so far")
@pytest.mark.parametrize("last", [1, 3])
def test_a_disk_that_is_full_at_the_end(last, folders, tmp_path, capsys, monkeypatch):
    """The numbers go to the temporary folder, wherever in the run it began; the exit status says that it failed."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    Disk(monkeypatch, lambda path, number: number >= last and path.is_relative_to(tmp_path / "out"))
    assert cli.main(arguments(folders, tmp_path / "out")) == 1
    told = capsys.readouterr()
    (numbers,) = tmp_path.glob("trl-ext-evaluation-*/report.json")
    assert f"No space left on device. The numbers are in {numbers}." in told.err
    assert len(json.loads(numbers.read_text())["models"]) == 2
    assert "ranking accuracy" in told.out  # and the main ones on the terminal


@pytest.mark.filterwarnings("ignore:The report so far")
def test_no_disk_at_all(folders, tmp_path, capsys, monkeypatch):
    """The numbers are printed, as JSON in one line."""
    Disk(monkeypatch, lambda path, number: True)
    assert cli.main(arguments(folders, tmp_path / "out")) == 1
    told = capsys.readouterr()
    assert "The numbers are on standard output" in told.err
    found = json.loads(told.out.splitlines()[-1])
    assert len(found["models"]) == 2 and found["dataset"] == str(folders / "pairs.jsonl")


@pytest.mark.filterwarnings("ignore:The report so far")
def test_a_page_that_cannot_be_made(folders, tmp_path, capsys, monkeypatch):
    """Both models are measured, their numbers are there, and how to make a page of them is told."""

    def broken(*args, **kwargs):
        raise RuntimeError("no fonts")

    monkeypatch.setattr(module.plots, "draw", broken)
    assert cli.main(arguments(folders, tmp_path / "out")) == 1
    told = capsys.readouterr().err
    assert "the page cannot be made (RuntimeError: no fonts)" in told and "render_report" in told
    found = json.loads((tmp_path / "out" / "report.json").read_text())
    assert len(found["models"]) == 2
    monkeypatch.undo()
    assert "<svg" in render_report(found)


@pytest.mark.filterwarnings("ignore:The report so far")
def test_a_full_disk_and_a_model_that_fails(folders, tmp_path, capsys, monkeypatch):
    """What was measured before the error, and could not be written then, is written with it."""
    Disk(monkeypatch, lambda path, number: number == 1)
    original, calls = evaluate.score_pairs, []

    def fails(*args, **kwargs):
        calls.append(None)
        if len(calls) == 2:
            raise RuntimeError("CUDA error")
        return original(*args, **kwargs)

    monkeypatch.setattr(evaluate, "score_pairs", fails)
    assert cli.main(arguments(folders, tmp_path / "out")) == 1
    told = capsys.readouterr().err
    assert "RuntimeError: CUDA error" in told and f"What was measured until then is in {tmp_path / 'out'}" in told
    assert list(json.loads((tmp_path / "out" / "report.json").read_text())["models"]) == [str(folders / "first")]


def test_nothing_is_left_to_write(measured, tmp_path):
    output = ReportFolder(tmp_path, {"dataset": "d"})
    output.prepare()
    assert output.finish() is None and output.written == []
    output.save(measured)
    assert output.finish() is None and [path.name for path in output.written] == ["report.json", "report.html"]
    assert json.loads(numbers_as_json({**measured, "dataset": "d"})) == json.loads(output.written[0].read_text())
