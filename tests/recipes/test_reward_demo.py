"""The demonstration of online rewards: best-of-n, its reward, and the whole command on a small scale."""

import itertools
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest


pytest.importorskip("sklearn", reason="needs the extra `demo`")

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "recipes"))

import reward_demo as demo  # noqa: E402
from digits import Digits, Reader  # noqa: E402


def test_best_of_n_is_the_mean_over_all_choices():
    """Against every choice of n among the images, without replacement; n = 1 is the mean, and costs nothing."""
    rewards = np.random.default_rng(0).normal(size=(3, 6))
    for n in (1, 2, 4, 6):
        best = [max(row[list(choice)]) for row in rewards for choice in itertools.combinations(range(6), n)]
        assert demo.best_of(rewards, n) == pytest.approx(np.mean(best))
    assert demo.best_of_kl(1) == 0.0 and demo.best_of_kl(16) == pytest.approx(math.log(16) - 15 / 16)


def test_reward_is_the_width_of_what_can_be_read():
    digits = Digits()
    reader = Reader(digits)
    from PIL import Image

    thin, bold = (
        Image.fromarray((digits.draw(digits.test[:1], pen)[0] * 255).astype(np.uint8)).convert("RGB")
        for pen in (-0.8, 0.8)
    )
    digit = int(reader.read(np.asarray(bold.convert("L"))[None] / 255)[0])
    up, down = demo.make_reward(reader, 1.0), demo.make_reward(reader, -1.0)
    assert up([bold], [digit])[0] > up([thin], [digit])[0] > 0 or up([thin], [digit])[0] == demo.UNREADABLE
    assert up([bold], [digit])[0] == -down([bold], [digit])[0]
    assert up([bold], [(digit + 1) % 10]) == [demo.UNREADABLE] and down([bold], [(digit + 1) % 10])[0] < -5


def test_curves_pair_rewards_with_the_kl_of_the_same_weights():
    log = [
        {"step": 0, "eval_reward": 1.0},
        {"step": 1, "kl": 0.0},
        {"step": 2, "kl": 0.5},
        {"step": 2, "eval_reward": 2.0, "eval_reward/low": 1.5},
    ]
    first, last = demo.curve_of(log)
    assert first == {"step": 0, "kl": 0.0, "reward": 1.0}
    assert last == {"step": 2, "kl": 0.5, "reward": 2.0, "reward/low": 1.5}


@pytest.mark.slow
def test_trial_of_the_whole_command(tmp_path):
    """Every part in small: the report, its numbers, both pictures and the adapters."""
    env = {**os.environ, demo.INSIDE: "1", "TRL_EXT_CACHE": str(tmp_path / "cache")}
    env["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    command = [sys.executable, str(ROOT / "recipes" / "reward_demo.py"), "--trial", "--output_dir", str(tmp_path)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    numbers = json.loads((tmp_path / "report.json").read_text())
    assert set(numbers["results"]) == {demo.REFERENCE, *demo.RUNS}
    assert [point["n"] for point in numbers["best_of_n"]] == [1, 2]
    for name in ("grid.png", "curves.png", "report.txt"):
        assert (tmp_path / name).is_file()
    assert len(list((tmp_path / "runs").rglob("pytorch_lora_weights.safetensors"))) == len(demo.RUNS)
