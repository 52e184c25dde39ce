"""The study of entropy and human disagreement: that it measures what the trainer measures, and finds what is there."""

import json
import math
import sys
from pathlib import Path

import harness
import numpy as np
import pytest
import tiny
from datasets import Dataset
from methods import BY_ID


sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "recipes" / "experiments"))

import mallows_dispersion as study  # noqa: E402


def made_up(count: int, seed: int = 0):
    """
    Sentences rated by fifteen people around a mean, the more at odds the higher a score that stands for an entropy.
    """
    generator = np.random.default_rng(seed)
    score, mean = generator.uniform(0.1, 0.5, count), generator.uniform(-2, 2, count)
    ratings = [(m + 4 * s * generator.standard_normal(15)).tolist() for m, s in zip(mean, score, strict=True)]
    words = (tiny.ADJECTIVES, tiny.NOUNS)
    texts = [f"A {words[0][i % 8]} {words[1][i % 5]} and {'so ' * (i % 4)}on." for i in range(count)]
    return score, [{"text": text, "ratings": values} for text, values in zip(texts, ratings, strict=True)]


def test_entropy_is_the_trainers(tiny_folder, tmp_path):
    """The same number as the trainer's dispersion for the same prompt and responses, EOS included."""
    _, rows = made_up(8)
    texts = [f" {row['text']}" for row in rows]
    pairs = [
        {"prompt": study.WRITTEN, "chosen": a, "rejected": b} for a, b in zip(texts[::2], texts[1::2], strict=True)
    ]
    trainer = harness.trainer(BY_ID["mallows"], tiny_folder, tmp_path, train_dataset=Dataset.from_list(pairs))
    chosen, rejected = trainer.method._dispersions_of([0, 1, 2, 3])
    found = study.Reference(tiny_folder, batch_size=3).score([study.WRITTEN] * 8, texts)
    assert found["entropy"][::2].tolist() == pytest.approx(chosen.tolist(), rel=1e-5)
    assert found["entropy"][1::2].tolist() == pytest.approx(rejected.tolist(), rel=1e-5)
    inputs = harness.batch(trainer, 4)
    policy = trainer.score_policy(trainer.model, inputs)
    assert found["surprisal"][::2].tolist() == pytest.approx(
        (-policy.per_response("logps") / policy.mask.sum(1))[:4].tolist()
    )


def test_split():
    """All for the one: 0. As many for either: 1. Three of four: a half. Ties count half."""
    assert study.split([1, 2, 3]) == 0.0 and study.split([-1, 1, 2, -2]) == 1.0 and study.split([0, 0]) == 1.0
    assert study.split([1, 1, 1, -1]) == pytest.approx(0.5)
    assert study.split([3, 4], [1, 2]) == 0.0 and study.split([1, 2], [1, 2]) == 1.0


def test_partial_correlation():
    """A relation through a third variable goes away given it; one of its own stays."""
    generator = np.random.default_rng(0)
    third, own, noise = generator.standard_normal((3, 4000))
    assert study.spearman(third + 0.1 * own, third + 0.1 * noise) > 0.9
    assert abs(study.spearman(third + 0.1 * own, third + 0.1 * noise, (third,))) < 0.05
    assert study.spearman(third + own, third + 2 * own, (third,)) > 0.9
    assert study.spearman(own, np.exp(own)) == pytest.approx(1.0)


def test_a_planted_relation_is_found(monkeypatch):
    """Where the score makes people disagree, its correlation is close to the ceiling; a shuffled one's is at 0."""
    monkeypatch.setattr(study, "RESAMPLES", 50)
    score, rows = made_up(400)
    shuffled = np.random.default_rng(1).permutation(score)
    tokens = np.array([len(row["text"]) for row in rows], float)
    written = {"entropy": score, "surprisal": shuffled, "tokens": tokens}
    (sentences, pairs, judged), _ = study.analyze(rows, written, score, seed=0)
    found = sentences["correlations"]
    assert found["entropy"]["low"] > 0.6 and 0.8 < sentences["ceiling"] < 1
    assert found["entropy"]["value"] < sentences["ceiling"] + 0.05
    assert found["surprisal"]["low"] < 0 < found["surprisal"]["high"]
    assert pairs["correlations"]["distance"]["value"] < -0.8 and pairs["count"] == 200
    assert judged["correlations"]["extremity"]["value"] < -0.5
    assert judged["correlations"]["entropy, given length and extremity"]["low"] > 0.3


def test_script(tiny_folder, tmp_path, monkeypatch):
    """From a file to numbers and a plot, twice the same."""
    monkeypatch.setattr(study, "RESAMPLES", 20)
    data = tmp_path / "rated.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in made_up(41)[1]))
    reports = []
    for name in "ab":
        output = tmp_path / name
        study.main(["--data", str(data), "--model", tiny_folder, "--sentences", "40", "--output_dir", str(output)])
        assert (output / "mallows_dispersion.png").read_bytes().startswith(b"\x89PNG")
        reports.append(json.loads((output / "mallows_dispersion.json").read_text()))
    assert reports[0] == reports[1]
    assert [part["count"] for part in reports[0]["comparisons"]] == [40, 20, 40]
    assert all(
        math.isfinite(value["value"]) for part in reports[0]["comparisons"] for value in part["correlations"].values()
    )


def test_page_has_the_numbers():
    """What the method's page says is what the committed run found."""
    report = json.loads((Path(study.__file__).with_suffix(".json")).read_text())
    page = (Path(study.HERE).parents[1] / "trl_ext" / "mallows" / "README.md").read_text()
    rows = [line for line in page.splitlines() if line.startswith(("| 1,000 sentences", "| 500 pairs"))]
    assert len(rows) == len(report["comparisons"]) == 3
    for row, part in zip(rows, report["comparisons"], strict=True):
        given = next(key for key in part["correlations"] if " and " in key)
        for key in ("entropy", given):
            value, low, high = (f"{part['correlations'][key][name]:.2f}" for name in ("value", "low", "high"))
            assert f"| {value.replace('-0.00', '0.00')} [{low}, {high}] |" in row
        assert row.endswith(f"| {part['ceiling']:.2f} |")
