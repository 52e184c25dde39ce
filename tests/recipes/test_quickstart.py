"""The README's first command: what it reports from a run's log, and, marked slow, a short run of the real thing."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "recipes"))

import quickstart  # noqa: E402
from sentiment import format_prompt  # noqa: E402


TRAINING = [{"step": step, "loss": 0.7 - step / 100} for step in (5, 10)]
PROMPTS = [format_prompt(opening) for opening in ("The acting in this film", "The music", "By the end of the film I")]
BEFORE = [" is dull.", " is loud. It never stops.", " was asleep."], [-0.4, -0.1, 0.0]
AFTER = [" is a joy.", " is lovely. It never stops.", " was delighted."], [0.6, 0.5, 0.7]


def evaluation(step: int, accuracy: float, ranking: float, reference: bool = True) -> dict:
    entry = {
        "step": step,
        "eval_loss": 0.69 - accuracy / 10,
        "eval_rewards/accuracies": accuracy,
        "eval_rewards/margins": accuracy - 0.1,
        "eval_rewards/chosen": accuracy / 2,
        "eval_rewards/rejected": -accuracy / 2,
        "eval_ranking_accuracy/policy": ranking - 0.05,
        "eval_ranking_accuracy/policy_norm": ranking,
    }
    return {**entry, "eval_logratios/chosen": 0.0} if reference else entry


def test_report_and_plot(tmp_path):
    """The numbers of the log and of the samples arrive in the text, in its two columns, and in the plot's file."""
    evals = [evaluation(0, 0.0, 0.52), evaluation(10, 0.875, 0.61)]
    text, numbers = quickstart.report("fdpo", TRAINING, evals, BEFORE, AFTER, PROMPTS, seconds=90.0)
    lines = {line.split("  ")[1].strip(): line for line in text.splitlines() if line.startswith("  ")}
    assert lines["reward accuracy"].split()[2:4] == ["0.000", "0.875"]
    assert lines["ranking accuracy of the policy, per token"].split()[-2:] == ["0.520", "0.610"]
    assert "policy = reference" in lines["reward accuracy"]
    # mean of (1.0, 0.6, 0.7)
    assert numbers["gold"]["gain"][0] == pytest.approx(0.7666667)
    assert "+0.767" in lines["gain, opening by opening"]
    for opening, texts in zip(
        ("The acting in this film", "The music"), zip(BEFORE[0], AFTER[0], strict=True), strict=False
    ):
        assert opening in text and all(sample.strip() in text for sample in texts)
    quickstart.plot(tmp_path / "report.png", TRAINING, evals, BEFORE[1], AFTER[1], "fdpo")
    assert (tmp_path / "report.png").read_bytes().startswith(b"\x89PNG")


def test_report_without_a_reference():
    """SimPER has rewards from the start, so no footnote excuses the first accuracy."""
    evals = [evaluation(0, 0.4, 0.52, reference=False), evaluation(10, 0.875, 0.61, reference=False)]
    text, _ = quickstart.report("simper", TRAINING, evals, BEFORE, AFTER, PROMPTS, seconds=90.0)
    assert "policy = reference" not in text


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("method", list(quickstart.TITLES))
def test_short_run_twice(method, tmp_path):
    """Three steps and twelve openings, twice: the same numbers. Needs a package index or the Hub, for the model."""
    numbers = []
    for run in ("a", "b"):
        command = [sys.executable, str(ROOT / "recipes" / "quickstart.py"), "--method", method, "--max_steps", "3"]
        env = {key: value for key, value in os.environ.items() if key not in ("HF_HUB_OFFLINE", "OMP_NUM_THREADS")}
        subprocess.run([*command, "--openings", "12", "--output_dir", str(tmp_path / run)], check=True, env=env)
        report = json.loads((tmp_path / run / "report.json").read_text())
        for entry in (report["eval_before"], report["eval_after"], report["training"]):
            for key in [key for key in entry if "runtime" in key or "per_second" in key]:
                del entry[key]
        numbers.append(report)
    assert numbers[0] == numbers[1]
