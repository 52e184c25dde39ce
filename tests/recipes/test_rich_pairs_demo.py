"""The demonstration of rich pairs: its critic, editor and reward on real digits, and the whole command in small."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest


pytest.importorskip("sklearn", reason="needs the extra `demo`")

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "recipes"))

import rich_pairs_demo as demo  # noqa: E402
from digits import NAMES, Digits, Reader, stroke_width  # noqa: E402


@pytest.fixture(scope="module")
def digits():
    return Digits()


@pytest.fixture(scope="module")
def reader(digits):
    return Reader(digits)


def pictures(digits, pen: float, count: int = 12):
    rows = digits.test[:count]
    return [demo.as_image(paper) for paper in digits.draw(rows, pen)], digits.labels[rows].tolist()


def test_critic_reads_and_measures(digits, reader):
    """A misread digit is redrawn, a thin one thickened, a bold one left alone."""
    critic = demo.RulerAndReader(reader)
    seen = set()
    for pen in (-0.5, 1.2):
        images, labels = pictures(digits, pen)
        papers = demo.as_papers(images)
        critiques = critic(["a"] * len(images), images, labels)
        for critique, width, read, label in zip(
            critiques, stroke_width(papers), reader.read(papers), labels, strict=True
        ):
            if read == label:
                assert critique.instructions == ([demo.THICKEN] if width < demo.WIDE else [])
                seen.add(len(critique.instructions))
    assert seen == {0, 1}
    wrong = (labels[0] + 1) % 10
    assert critic(["a"], images[:1], [wrong])[0].instructions == [demo.REDRAW.format(NAMES[wrong])]


def test_editor_thickens(digits):
    """By twice the pen; with an empty instruction the width stays, and the drawing nearly does."""
    images, _ = pictures(digits, 0.0)
    before = demo.as_papers(images)
    thick, same = (np.stack([demo.move_outline(paper, pen) for paper in before]) for pen in (demo.PEN, 0.0))
    assert (stroke_width(thick) - stroke_width(before)).mean() == pytest.approx(2 * demo.PEN, abs=0.3)
    assert abs(stroke_width(same) - stroke_width(before)).mean() < 0.15 and abs(same - before).mean() < 0.03


def test_reward_is_the_width_of_what_can_be_read(digits, reader):
    images, _ = pictures(digits, 0.3)
    labels = reader.read(demo.as_papers(images))
    reward = demo.WidthIfRead(reader)
    assert reward(images, labels.tolist()) == stroke_width(demo.as_papers(images)).tolist()
    assert reward(images, ((labels + 1) % 10).tolist()) == [-1.0] * len(images)


@pytest.mark.slow
def test_trial_of_the_whole_command(tmp_path):
    """Every part in small: as many pairs for each run, a report, its numbers, the picture and the ledger."""
    env = {**os.environ, demo.INSIDE: "1", "TRL_EXT_CACHE": str(tmp_path / "cache")}
    env["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    command = [sys.executable, str(ROOT / "recipes" / "rich_pairs_demo.py"), "--trial", "--output_dir", str(tmp_path)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    numbers = json.loads((tmp_path / "report.json").read_text())
    assert list(numbers["results"]) == ["reference", demo.BEST, demo.RICH, demo.SIGNED, demo.TRIP]
    assert numbers["setup"]["pairs"] == 28 and numbers["results"][demo.BEST]["pairs"]["distance"] > 0
    for name in ("pairs.png", "report.txt", "rich/ledger.jsonl"):
        assert (tmp_path / name).is_file()
