"""What was bought stays bought: the file of gold labels."""

import json
import os

import pytest
from datasets import Dataset

from trl_ext.d2po import Ledger, ledger_to_dataset
from trl_ext.d2po.ledger import request_key


def entry(key="k", verdict=1.0, **fields):
    return {
        "key": key,
        "window": 0,
        "prompt": "Q",
        "completion_a": "yes",
        "completion_b": "no",
        "prompt_ids": [1, 2],
        "completion_a_ids": [3, 4],
        "completion_b_ids": [5],
        "verdict": verdict,
        "labeller": "me",
        **fields,
    }


def test_appended_is_on_disk(tmp_path, monkeypatch):
    """`append` returns after fsync of the whole line, in another process's eyes too; nothing is made before the first."""
    synced = []
    fsync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda descriptor: (synced.append(path.read_bytes()), fsync(descriptor)))
    path = tmp_path / "new" / "ledger.jsonl"
    ledger = Ledger(path)
    assert not path.exists()
    ledger.append([entry("first"), entry("second")])
    assert synced[-1].count(b"\n") == 2  # written before it was synced
    ledger.append([])
    ledger.append([entry("third")])
    assert len(ledger) == 3 and synced[-1].count(b"\n") == 3
    assert [e["key"] for e in Ledger(path, read_only=True).entries] == ["first", "second", "third"]
    with pytest.raises(ValueError, match="read_only"):
        Ledger(path, read_only=True).append([entry()])


def test_unfinished_line_is_cut_off(tmp_path, caplog):
    """A line that lacks some of its entry was never used: it goes, the rest stays, and the next label begins a new line."""
    path = tmp_path / "ledger.jsonl"
    ledger = Ledger(path)
    ledger.append([entry("first"), entry("second")])
    ledger.close()
    whole = path.read_bytes()
    for cut in range(2, len(whole) // 2, 37):
        path.write_bytes(whole[:-cut])
        assert [e["key"] for e in Ledger(path, read_only=True).entries] == ["first"]
        assert path.read_bytes() == whole[:-cut]  # only looking changes nothing
        ledger = Ledger(path)
        assert len(ledger) == 1
        ledger.append([entry("third")])
        ledger.close()
        assert [json.loads(line)["key"] for line in path.read_text().splitlines()] == ["first", "third"]
    assert "unfinished" in caplog.text


@pytest.mark.parametrize("line", ["not json", '{"a": 1}', "[1]", ""])
def test_foreign_lines_are_refused(line, tmp_path):
    path = tmp_path / "ledger.jsonl"
    path.write_text(json.dumps(entry()) + "\n" + line + "\n" + json.dumps(entry()) + "\n")
    with pytest.raises(ValueError, match=r"Line 2 of the ledger .* is not a gold label"):
        Ledger(path)


def test_one_writer(tmp_path):
    """A second run on the same ledger is refused while the first lives, and not after."""
    pytest.importorskip("fcntl")
    path = tmp_path / "ledger.jsonl"
    first = Ledger(path)
    first.append([entry()])
    with pytest.raises(RuntimeError, match="is being written by another process"):
        Ledger(path)
    assert len(Ledger(path, read_only=True)) == 1
    first.close()
    assert len(Ledger(path)) == 1


def test_key():
    """The same comparison has one key, whichever completion comes first; anything else another."""
    key = request_key([1], [2, 3], [4], {"answer": "x"})
    assert key == request_key([1], [4], [2, 3], {"answer": "x"})
    others = [
        ([1], [2], [3, 4], {"answer": "x"}),
        ([1], [2, 3], [4], {"answer": "y"}),
        ([9], [2, 3], [4], {"answer": "x"}),
    ]
    assert len({key, *(request_key(*other) for other in others)}) == 4


def test_as_preference_data(tmp_path):
    """The better completion is chosen; ties and missing verdicts are left out; tokens are the sampled ones."""
    path = tmp_path / "ledger.jsonl"
    ledger = Ledger(path)
    ledger.append([entry(verdict=1.0), entry(verdict=0.25), entry(verdict=0.5), entry(verdict=None)])
    ledger.close()
    plain = ledger_to_dataset(path)
    assert isinstance(plain, Dataset) and len(plain) == 2
    assert plain[0] == {"prompt": "Q", "chosen": "yes", "rejected": "no", "confidence": 1.0}
    assert plain[1] == {"prompt": "Q", "chosen": "no", "rejected": "yes", "confidence": 0.75}
    tokens = ledger_to_dataset(path, tokenized=True)
    assert tokens[1] == {"prompt_ids": [1, 2], "chosen_ids": [5], "rejected_ids": [3, 4], "confidence": 0.75}
    with pytest.raises(FileNotFoundError, match="no ledger"):
        ledger_to_dataset(tmp_path / "missing.jsonl")
