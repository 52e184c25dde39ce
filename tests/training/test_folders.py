"""Folders that the user names: `~` is the home folder wherever a path is an option, as in `output_dir`."""

import harness
import pytest
import tiny
from methods import BY_ID

from trl_ext.d2po import Ledger, ledger_to_dataset
from trl_ext.evaluation.output import ReportFolder
from trl_ext.judges.loading import load_function
from trl_ext.training.output_folder import check_writable
from trl_ext.training.tensor_cache import TensorCache


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    """The home folder; nothing may be written to the working directory beside it."""
    (tmp_path / "home").mkdir()
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path / "elsewhere")
    yield tmp_path / "home"
    assert list((tmp_path / "elsewhere").iterdir()) == []


def test_gold_labels(home):
    names = ("prompt_ids", "completion_a_ids", "completion_b_ids")
    texts = {"key": "k", "prompt": "q", "completion_a": "a", "completion_b": "b", "labeller": "me"}
    ledger = Ledger("~/bought/labels.jsonl")
    ledger.append([{**texts, "window": 0, "verdict": 1.0, **{name: [1] for name in names}}])
    ledger.close()
    assert (home / "bought" / "labels.jsonl").exists()
    assert len(ledger_to_dataset("~/bought/labels.jsonl")) == 1


def test_reference_cache(home, tiny_folder):
    options = dict(precompute_ref_log_probs=True, reference_cache_dir="~/statistics")
    harness.trainer(BY_ID["fdpo"], tiny_folder, home / "run", train_dataset=tiny.dataset(4), **options)
    assert list((home / "statistics").rglob("*.arrow"))


def test_caches_reports_and_functions(home):
    assert TensorCache("~/anchors").folder == home / "anchors"
    output = ReportFolder("~/report", {})
    output.prepare()
    assert (home / "report").is_dir()
    (home / "mine.py").write_text("def reward(prompts, completions): return [0.0] * len(prompts)\n")
    assert load_function("~/mine.py:reward", "judge")(prompts=["p"], completions=["c"]) == [0.0]


def test_a_folder_that_can_be_written(home):
    check_writable(home / "new" / "deeper", ("a",))
    (home / "new" / "deeper" / "a").mkdir()
    with pytest.raises(ValueError, match="`output_dir=.*a folder `a`"):
        check_writable(home / "new" / "deeper", ("a",))
