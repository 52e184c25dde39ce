"""The check of a CUDA device: what it keeps, what it runs again, and a rehearsal of its parts."""

import importlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest


BENCHMARKS = Path(__file__).resolve().parents[2] / "recipes" / "benchmarks"
MACHINE = {"device": "CPU", "python": "3", "versions": {"torch": "0"}}

# Stands for a benchmark: writes a number, fails, or waits together with a child of its own.
PROGRAM = """
import json, os, subprocess, sys, time
mode, _, path = sys.argv[1:4]
print("began", mode, flush=True)
if mode == "waits":
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    print("child", child.pid, flush=True)
    time.sleep(60)
if mode == "fails":
    raise SystemExit("out of luck")
if mode != "says nothing":
    with open(path, "w") as file:
        json.dump({"number": 7}, file)
"""


@pytest.fixture
def check(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module("cuda_check")


@pytest.fixture
def fake(check, monkeypatch, tmp_path):
    """`run(*arguments)` of parts that stand for benchmarks, and the records that they leave, in the file's order."""
    kind = check.Kind(("-c", PROGRAM), "--json", check.read_json, lambda found: [("number", str(found["number"]))])
    parts = {
        "quick": check.Part("fake", "a quick one", 20, tiny="works"),
        "broken": check.Part("fake", "a broken one", 20, tiny="fails"),
        "slow": check.Part("fake", "a slow one", 1, tiny="waits"),
        "silent": check.Part("fake", "a silent one", 20, tiny="'says nothing'"),
        "lacking": check.Part("fake", "one that lacks a package", 20, tiny="works", needs="flash-attn"),
    }
    monkeypatch.setattr(check, "KINDS", {"fake": kind})
    monkeypatch.setattr(check, "PARTS", parts)
    monkeypatch.setattr(check, "about_machine", lambda device: MACHINE)
    results = tmp_path / "found" / "results.jsonl"
    base = ["--device", "cpu", "--shape", "tiny", "--results", str(results)]

    def run(*arguments):
        code = check.main([*base, *arguments])
        lines = results.read_text().splitlines() if results.exists() else []
        return code, [json.loads(line) for line in lines if line.endswith("}")]

    run.results = results
    handler = signal.getsignal(signal.SIGTERM)
    yield run
    signal.signal(signal.SIGTERM, handler)


def assert_ends(process: int) -> None:
    """It dies with its parent, and is gone once its zombie is reaped."""
    state = Path(f"/proc/{process}/stat")
    for _ in range(50):
        if not state.exists() or state.read_text().split()[2] == "Z":
            return
        time.sleep(0.1)
    pytest.fail(f"process {process}, started by a part, is still running")


def test_each_part_leaves_a_record(fake):
    """One that fails or takes too long is written down with its output, and the rest goes on."""
    code, records = fake()
    assert code == 1
    by_name = {record["part"]: record for record in records}
    assert [record["status"] for record in records] == ["done", "failed", "over time", "failed", "skipped"]
    assert by_name["quick"]["result"] == {"number": 7} and by_name["quick"]["machine"] == MACHINE
    assert "out of luck" in by_name["broken"]["error"]
    assert 1 <= by_name["slow"]["seconds"] < 10
    assert by_name["lacking"]["error"].startswith("flash-attn")
    assert_ends(int(by_name["slow"]["error"].split("child ")[1].split()[0]))


def test_sigterm_ends_the_part_that_runs(fake):
    """What a job scheduler sends: nothing is left running, no record is written, and the part runs next time."""
    log = fake.results.with_suffix("") / "slow.log"

    def terminate():
        while not (log.exists() and "child" in log.read_text()):
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=terminate, daemon=True).start()
    with pytest.raises(SystemExit):
        fake("--parts", "slow", "--limit", "30")
    assert not fake.results.exists()
    assert_ends(int(log.read_text().split("child ")[1].split()[0]))


def test_what_is_done_is_not_run_again(fake):
    code, _ = fake("--parts", "quick", "broken")
    code, records = fake("--parts", "silent", "broken", "quick")
    # First the part without a record, then the one that failed.
    assert code == 1 and [record["part"] for record in records] == ["quick", "broken", "silent", "broken"]
    code, records = fake("--parts", "quick")
    assert code == 0 and len(records) == 4
    code, records = fake("--parts", "quick", "--again")
    assert code == 0 and [record["part"] for record in records[4:]] == ["quick"]


def test_a_record_that_was_cut_off_is_ignored(fake):
    """A kill while a record is written costs this part, and the next record begins on a line of its own."""
    fake("--parts", "quick")
    fake.results.write_text(fake.results.read_text().rstrip()[:-9])
    code, records = fake("--parts", "quick")
    assert code == 0 and [record["part"] for record in records] == ["quick"]


def test_the_budget_ends_a_run(fake, capsys):
    code, records = fake("--parts", "quick", "--budget", "4")
    assert code == 1 and records == [] and "quick" in capsys.readouterr().out
    code, records = fake("--parts", "slow", "--budget", "6", "--limit", "slow=0.5")
    assert code == 1 and records[0]["seconds"] < 3


def test_the_table_has_every_part(fake, capsys):
    fake("--parts", "quick", "slow")
    capsys.readouterr()
    code, _ = fake("--table")
    rows = capsys.readouterr().out.splitlines()
    assert code == 0 and "measure nothing" in rows[0] and rows[2] == "CPU, Python 3, torch 0"
    assert "| a quick one | number | 7 |" in rows
    assert any(row.startswith("| a slow one | | over time: ended after 1 s; child ") for row in rows)
    assert "| a broken one | | not measured |" in rows


def test_results_of_another_device_are_refused(check, fake, capsys):
    fake("--parts", "quick")
    with pytest.raises(SystemExit):
        check.main(["--device", "cuda", "--results", str(fake.results), "--parts", "quick"])
    assert str(fake.results) in capsys.readouterr().err
    with pytest.raises(SystemExit):
        check.main(["--limit", "nothing=3"])


@pytest.mark.parametrize("shape", ["full", "tiny"])
def test_the_benchmarks_know_their_arguments(check, shape, monkeypatch):
    for name, part in check.PARTS.items():
        script = Path(check.KINDS[part.kind].command[0])
        if script.suffix != ".py":
            continue
        monkeypatch.setattr(sys, "argv", [script.name, *part.arguments(shape), "--json", "found"])
        options = importlib.import_module(script.stem).parse_args()
        assert options.json == "found", name
    assert any("test_shared_prompt" in word for word in check.KINDS["tests"].command)


@pytest.mark.slow
def test_a_rehearsal(tmp_path):
    """Every part runs on a CPU at a tiny shape, but for flash attention, and each has a row of the table."""
    command = [sys.executable, str(BENCHMARKS / "cuda_check.py"), "--device", "cpu", "--shape", "tiny"]
    command += ["--results", str(tmp_path / "found.jsonl"), "--budget", "1200", "--limit", "300"]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=1300)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    shown = subprocess.run([*command, "--table"], capture_output=True, text=True, env=env, check=True).stdout
    assert "| paired head, trained | paired head |" in shown and "not measured" not in shown
