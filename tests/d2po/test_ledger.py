"""What was bought stays bought: the file of gold labels."""

import json
import os

import pytest
from datasets import Dataset

from trl_ext.d2po import Ledger, ledger_to_dataset
from trl_ext.d2po.ledger import LedgerError, request_key


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
    """
    `append` returns after fsync of the whole line, in another process's eyes too; nothing is made before the first.
    """
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
    """
    A line that lacks some of its entry was never used: it goes, the rest stays, and the next label begins a new line.
    """
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


@pytest.mark.parametrize(
    "text", ["a\u2028b", "a\u2029b", "a\x85b", "a\x1cb\x0cc", "\ud800", "a\r\nb", "\0", "\U0001f600"], ids=ascii
)
def test_any_text_comes_back(text, tmp_path):
    """
    Line separators of every kind, control characters and lone surrogates: in memory, on disk and read again it is one
    label.
    """
    path = tmp_path / "ledger.jsonl"
    ledger = Ledger(path)
    ledger.append([entry("first", prompt=text, columns={"note": text}), entry("second")])
    expected = ledger.entries
    ledger.close()
    assert expected[0]["prompt"] == text and len(expected) == 2
    assert Ledger(path, read_only=True).entries == expected
    assert len(path.read_bytes().decode("utf-8").splitlines()) == 2  # for other readers too


@pytest.mark.parametrize("edit", ["newline", "cr", "crlf", "bom"])
def test_what_editors_do_is_no_loss(edit, tmp_path):
    """A missing last line end, line ends of Windows or CR alone, and a byte order mark leave every label a label."""
    path = tmp_path / "ledger.jsonl"
    ledger = Ledger(path)
    ledger.append([entry("first"), entry("second")])
    ledger.close()
    content = path.read_bytes()
    change = {
        "newline": lambda: content[:-1],
        "cr": lambda: content.replace(b"\n", b"\r"),
        "crlf": lambda: content.replace(b"\n", b"\r\n"),
        "bom": lambda: b"\xef\xbb\xbf" + content,
    }[edit]
    path.write_bytes(change())
    assert [e["key"] for e in Ledger(path, read_only=True).entries] == ["first", "second"]
    ledger = Ledger(path)
    ledger.append([entry("third")])
    ledger.close()
    assert [e["key"] for e in Ledger(path, read_only=True).entries] == ["first", "second", "third"]


@pytest.mark.parametrize(
    "line, reason",
    [
        *((json.dumps(entry(verdict=value)), "'verdict'") for value in (17.5, -0.5, float("nan"), "yes", True, [1])),
        *((json.dumps(entry(window=value)), "'window'") for value in ("x", -1, 1.5, None, True)),
        (json.dumps(entry(prompt_ids=[1, "2"])), "'prompt_ids'"),
        (json.dumps(entry(completion_b=None)), "'completion_b'"),
        (json.dumps(entry(cost=float("inf"))), "'cost'"),
        (json.dumps({"key": "k", "verdict": 1.0, "window": 0}), "no 'prompt'"),
        (b'{"key": "\xff"}', "not UTF-8"),
        (json.dumps(entry()).encode("utf-16"), "not UTF-8"),
        (b"[" * 100000, "not JSON"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_every_line_is_checked(line, reason, tmp_path):
    path = tmp_path / "ledger.jsonl"
    line = line.encode() if isinstance(line, str) else line
    path.write_bytes(json.dumps(entry()).encode() + b"\n" + line + b"\n" + json.dumps(entry()).encode() + b"\n")
    with pytest.raises(ValueError, match=rf"Line 2 of the ledger .* is not a gold label: .*{reason}"):
        Ledger(path, read_only=True)


@pytest.mark.parametrize("change", ["removed", "replaced", "changed"])
def test_a_ledger_that_something_else_touches(change, tmp_path):
    """
    The next write stops; the new label, and those that the path no longer has, are in a file that the message names.
    """
    path = tmp_path / "ledger.jsonl"
    ledger = Ledger(path)
    ledger.append([entry("first"), entry("second")])
    if change == "removed":
        path.unlink()
    elif change == "replaced":  # as editors write
        (tmp_path / "new").write_text(json.dumps(entry("first"), ensure_ascii=False) + "\n")
        os.replace(tmp_path / "new", path)
    else:
        path.write_bytes(path.read_bytes() + b"x")
    with pytest.raises(LedgerError, match=f"was {change} by something else"):
        ledger.reserve(1)
    with pytest.raises(LedgerError, match=f"was {change} by something else.* are in `(.*)`: append") as error:
        ledger.append([entry("third")])
    (rescued,) = tmp_path.glob("*rescued*")
    assert str(rescued) in str(error.value)
    expected = {"removed": ["first", "second", "third"], "replaced": ["second", "third"], "changed": ["third"]}[change]
    assert [e["key"] for e in Ledger(rescued, read_only=True).entries] == expected


def test_places_that_cannot_be_written(tmp_path):
    """A folder, a device, or a folder that cannot be made is refused when the ledger is opened, by name."""
    (tmp_path / "file").write_text("")
    for path in (tmp_path, tmp_path / "file" / "ledger.jsonl", "/dev/null", "/proc/nope/ledger.jsonl"):
        with pytest.raises(LedgerError, match=str(path)):
            Ledger(path).open()


def test_a_line_that_stands_twice_is_one_label(tmp_path):
    path = tmp_path / "ledger.jsonl"
    ledger = Ledger(path)
    ledger.append([entry("first"), entry("second", verdict=0.0), entry("first")])
    assert len(ledger.to_dataset()) == 2
