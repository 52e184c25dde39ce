"""The benchmark of layouts: its mixes, and a run on a small shape."""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import pytest
import tiny


BENCHMARKS = Path(__file__).resolve().parents[2] / "recipes" / "benchmarks"


@pytest.fixture
def steps_of_mix(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    from layout_cost import steps_of_mix

    options = argparse.Namespace(warmup=1, rounds=2, reference="live", pairs_file=None)
    return lambda mix, **more: steps_of_mix(mix, argparse.Namespace(**{**vars(options), **more}), tiny.tokenizer())


def test_mixes(steps_of_mix):
    """Three steps each; grouped ones have the same pairs in another order, and less padding."""
    (batch,), *others = steps_of_mix("20:6")
    assert len(others) == 2 and batch["input_ids"].shape == (2, 26) and batch["completion_mask"].sum() == 2 * 6
    as_they_come, grouped = steps_of_mix("hh-2x4"), steps_of_mix("hh-2x4-grouped")
    for one, other in zip(as_they_come, grouped, strict=True):
        assert [len(batch["input_ids"]) for batch in one] == [len(batch["input_ids"]) for batch in other] == [4] * 4
        assert sum(b["attention_mask"].sum() for b in one) == sum(b["attention_mask"].sum() for b in other)
        assert sum(b["input_ids"].numel() for b in other) < sum(b["input_ids"].numel() for b in one)
    (cached,), *_ = steps_of_mix("20:6", reference="cached")
    assert cached["ref_chosen_logps"].tolist() == [-24.0]


@pytest.mark.slow
@pytest.mark.parametrize("reference", ["live", "cached", "none"])
def test_the_benchmark_of_layouts_runs(reference, tmp_path):
    command = [sys.executable, str(BENCHMARKS / "step_cost.py"), "--shape", "tiny", "--mixes", "20:6", "--rounds", "2"]
    command += ["--reference", reference, "--clock", "cpu", "--threads", "1", "--json", str(tmp_path / "results.json")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads((tmp_path / "results.json").read_text())["results"]["20:6"]
    assert all(len(times) == 2 for times in found["seconds"].values()) and len(found["memory"]) == 4
    assert found["memory"]["packed rows"]["kept"] < found["memory"]["padded rows"]["kept"]
    assert done.stdout.count("| 20:6 |") == 4
