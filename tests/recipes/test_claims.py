"""
The experiments on the papers' claims: their data, their measurements, and every claim from run to plot on a tiny
model.
"""

import dataclasses
import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest


sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "recipes" / "experiments"))

import claims  # noqa: E402
import laboratory as lab  # noqa: E402


SMALL = lab.Setting(
    max_steps=2,
    batch_size=2,
    lora_rank=2,
    lora_layers=1,
    held_out_pairs=8,
    held_out_prompts=6,
    max_new_tokens=6,
    max_length=256,
)


@pytest.fixture
def small(tiny_folder, monkeypatch):
    """A setting in seconds, on few of the pairs."""
    rows = {split: lab.Laboratory.rows(split)[:12] for split in ("train", "test")}
    monkeypatch.setattr(lab.Laboratory, "rows", staticmethod(lambda split: rows[split]))
    return dataclasses.replace(SMALL, model=tiny_folder)


def shortened(runs):
    """A claim's runs, of two steps."""

    def make(seed):
        return {
            arm: dataclasses.replace(
                run,
                options={**run.options, **({"max_steps": 2} if "max_steps" in run.options else {})},
                measure_at=tuple(range(1, 1 + bool(run.measure_at))),
                train_pairs=min(run.train_pairs, 6),
            )
            for arm, run in runs(seed).items()
        }

    return make


@pytest.mark.parametrize("name", list(claims.RUNS))
def test_claim_from_run_to_plot(name, small, tmp_path, monkeypatch):
    """Everything once, of one seed: numbers that add up, a plot, and nothing made twice."""
    monkeypatch.setitem(claims.RUNS, name, shortened(claims.RUNS[name]))
    monkeypatch.setattr(claims, "LEARNING_RATES", claims.LEARNING_RATES[:2])
    laboratory = lab.Laboratory(tmp_path / "runs", small)
    for run in claims.RUNS[name](0).values():
        laboratory.run(run)
    laboratory.reference()
    made = sorted((tmp_path / "runs").iterdir())
    reader = lab.Laboratory(tmp_path / "runs", small, make=False)
    claims.write(name, reader, tmp_path, [0])
    assert sorted((tmp_path / "runs").iterdir()) == made
    result = json.loads((tmp_path / f"{name}.json").read_text())
    assert (tmp_path / f"{name}.png").stat().st_size > 10_000
    assert result["versions"]["trl"] and result["setting"]["max_steps"] == 2 and result["minutes"] >= 0
    if name == "ranking":
        assert [row[part]["theorem_violations"] for row in result["steps"].values() for part in row] == [0] * 4
        assert result["steps"]["2"]["train_pairs"]["pairs"] == 6
        return
    arms = result["arms"]
    assert set(arms) == set(claims.RUNS[name](0))
    for row in arms.values():
        mean, low, high = row["kl"]
        assert 0 <= low <= mean <= high and 0 <= row["reward_accuracy"][0] <= 1
        assert row["entropy"][0] <= math.log(384) + 1e-6
    if name == "mallows":
        assert set(result["entropy_against_dispersion"]) == {"0"}


def test_measurements_are_the_evaluations(small, tmp_path):
    """At step 0 nothing has changed: the policy's log-probabilities are the reference's, and KL is 0."""
    laboratory = lab.Laboratory(tmp_path, small)
    run = lab.Run("fdpo", {"learning_rate": 0.0}, sequential_kl=True)
    found = claims.measured(laboratory.run(run))
    reference = laboratory.reference_logps({"keys": found["pairs"]["keys"]})
    for side, expected in zip(("chosen", "rejected"), reference, strict=True):
        assert found["pairs"][f"{side}_logps"] == pytest.approx(expected.tolist(), abs=1e-4)
        assert found["pairs"][f"{side}_sequential_kl"] == pytest.approx([0] * 8, abs=1e-5)
    assert found["samples"]["kl"] == pytest.approx([0] * len(found["samples"]["kl"]), abs=1e-5)
    assert found["samples"]["texts"] == laboratory.reference()["samples"]["texts"]


def test_runs_are_told_apart(tmp_path):
    """Whatever changes a run changes where it is kept; a run that is not there is an error where none may be made."""
    laboratory = lab.Laboratory(tmp_path, SMALL, make=False)
    run = lab.Run("fdpo", {"beta": 0.1})
    others = [
        dataclasses.replace(run, **change)
        for change in (
            {"method": "tdpo"},
            {"options": {"beta": 0.2}},
            {"seed": 1},
            {"raters": True},
            {"train_pairs": 1},
        )
    ]
    paths = {laboratory.path(each) for each in [run, *others]}
    paths.add(lab.Laboratory(tmp_path, dataclasses.replace(SMALL, max_steps=3), make=False).path(run))
    assert len(paths) == 7
    with pytest.raises(FileNotFoundError, match="fdpo"):
        laboratory.run(run)


def test_raters_have_the_dispersion_that_is_known():
    """Chosen is turned as often as the raters' probability says, and the column holds 1 - |2p - 1|."""
    rows = lab.Laboratory.rows("train")
    counts = np.zeros(len(rows))
    for seed in range(40):
        rated = lab.simulate_raters(rows, seed)
        assert rated == lab.simulate_raters(rows, seed)
        for i, (row, before) in enumerate(zip(rated, rows, strict=True)):
            turned = row["chosen"] != before["chosen"]
            assert {row["chosen"], row["rejected"]} == {before["chosen"], before["rejected"]}
            # A pair of dispersion d is turned with probability d / 2.
            counts[i] += turned - row["dispersion"] / 2
        share = np.mean([row["taste"] for row in rated])
        assert 0.35 < share < 0.65
    assert abs(counts.sum()) < 4 * math.sqrt(40 * len(rows) * 0.25)
    fact = [row["dispersion"] for row in rated if not row["taste"]]
    taste = [row["dispersion"] for row in rated if row["taste"]]
    assert max(fact) < 0.1 and min(taste) > 0.5


def test_published_measurements_come_with_the_project():
    """Every published run of both seeds is in the packed file, to which nothing is added."""
    packed = claims.HERE / "results" / "measurements.json.gz"
    laboratory = lab.Laboratory(packed, lab.Setting())
    for seed in (0, 1):
        for runs in claims.RUNS.values():
            for run in runs(seed).values():
                assert laboratory.run(run)["run"]["seed"] == seed
    assert laboratory.reference()["run"] is None
    with pytest.raises(ValueError, match=r"--runs_dir .*measurements\.json\.gz.*outputs/claims"):
        laboratory.run(lab.Run("dpo", seed=17))
