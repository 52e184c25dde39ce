"""The demonstrations of f-DPG, WRO and mixtures, each from its command to results and plot on a tiny model."""

import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch


EXPERIMENTS = Path(__file__).resolve().parents[2] / "recipes" / "experiments"
sys.path.insert(0, str(EXPERIMENTS))

import fdpg_constraints  # noqa: E402
import mixture_of_two  # noqa: E402
import toy_model  # noqa: E402
import wro_win_rate  # noqa: E402


def is_plot(path: Path) -> bool:
    return path.read_bytes().startswith(b"\x89PNG")


# ---- f-DPG ----------------------------------------------------------------------------------------------------------


def test_least_kl():
    """0 where nothing changes; log 2 from a half to all; and the KL of the tilted distribution itself."""
    assert fdpg_constraints.least_kl(0.3, 0.3) == 0.0
    assert fdpg_constraints.least_kl(1.0, 0.5) == pytest.approx(math.log(2))
    reference, feature = np.array([0.1, 0.2, 0.3, 0.4]), np.array([1.0, 1.0, 0.0, 0.0])
    tilted = reference * np.exp(1.7 * feature)
    tilted /= tilted.sum()
    kl = float((tilted * np.log(tilted / reference)).sum())
    assert fdpg_constraints.least_kl(float(tilted @ feature), 0.3) == pytest.approx(kl)


def test_fdpg_constraints(tiny_folder, tmp_path, monkeypatch, capsys):
    """Two methods and a reference, kept: a second run trains nothing and reports the same."""
    # The tiny model says nothing positive.
    monkeypatch.setattr(fdpg_constraints, "satisfies", lambda texts: [float(len(text) % 2) for text in texts])
    command = ["--model", tiny_folder, "--seeds", "0", "--methods", "RLOO", "f-DPG, JS", "--steps", "1"]
    command += ["--completions", "8", "--new_tokens", "4", "--prompts", "2", "--samples", "4"]
    command += ["--runs_dir", str(tmp_path / "runs"), "--output_dir", str(tmp_path)]
    fdpg_constraints.main(command)
    first = (tmp_path / "fdpg_constraints.json").read_text()
    monkeypatch.setattr(fdpg_constraints, "train_run", lambda *args: pytest.fail("trained again"))
    fdpg_constraints.main(command)
    assert (tmp_path / "fdpg_constraints.json").read_text() == first
    assert is_plot(tmp_path / "fdpg_constraints.png")
    results = json.loads(first)
    assert list(results["runs"]) == ["RLOO", "f-DPG, JS"]
    for seeds in results["runs"].values():
        run = seeds["0"]
        assert len(run["training"]) == 1 and len(run["measured"]["satisfied"]) == 2
        assert all(kl > 0 for kl in run["measured"]["kl"])
    # lambda moves the odds of the training samples to those of the wanted share.
    share, wanted = results["reference"]["train_share"], fdpg_constraints.WANTED
    expected = math.log(wanted / (1 - wanted)) - math.log(share / (1 - share))
    assert results["reference"]["exponent"] == pytest.approx(expected)
    assert "| target | 0.80 |" in capsys.readouterr().out


# ---- WRO ------------------------------------------------------------------------------------------------------------


def test_judge_of_wro_win_rate():
    """Probabilities of both orders sum to one, and the taste goes round in a circle."""
    generator = np.random.default_rng(0)
    responses = toy_model.all_responses(5, 3)
    assert len(responses) == 85
    for _ in range(50):
        first, second = (responses[i] for i in generator.integers(85, size=2))
        prompt = wro_win_rate.PROMPTS[generator.integers(64)]
        both = wro_win_rate.probability(prompt, first, second) + wro_win_rate.probability(prompt, second, first)
        assert both == pytest.approx(1)
    circle = [wro_win_rate.taste([one], [other]) for one, other in ((1, 2), (2, 3), (3, 1), (2, 1), (4, 1))]
    assert circle == [1, 1, 1, -1, 0]


def test_ruler_of_wro_win_rate():
    """The reference wins half of the time at KL 0, and no policy is above the limit."""
    reference, other = (
        toy_model.make_model(5, hidden_size=16, num_heads=2, initializer_range=0.5, seed=seed) for seed in (0, 1)
    )
    ruler = wro_win_rate.Ruler(reference, wro_win_rate.HELD_OUT[:3])
    start, found = ruler.measure(reference), ruler.measure(other)
    assert start == pytest.approx({"win_rate": 0.5, "kl": 0.0, "self": 0.5}, abs=1e-6)
    seed = {"limit": ruler.limit()}
    assert found["kl"] > 0.01 and found["win_rate"] < wro_win_rate.limit_at(seed, found["kl"])
    assert wro_win_rate.limit_at(seed, 0.2) > 0.5


def test_wro_win_rate(tmp_path, monkeypatch):
    """WRO and f-DPO from the command line, with the votes that each asked for."""
    monkeypatch.setitem(wro_win_rate.METHODS, "f-DPO, few labels", {"labels": 300, "beta": 0.1})
    command = ["--seeds", "0", "--steps", "2", "--methods", "WRO", "f-DPO, few labels", "--output_dir", str(tmp_path)]
    wro_win_rate.main(command)
    runs = json.loads((tmp_path / "wro_win_rate.json").read_text())["seeds"]["0"]["runs"]
    assert runs["WRO"]["votes"] == 2 * wro_win_rate.BATCH * wro_win_rate.ANCHORS
    assert runs["f-DPO, few labels"]["votes"] == 300
    for run in runs.values():
        assert [entry["step"] for entry in run["curve"]] == [0, 2]
        assert run["curve"][0]["kl"] == pytest.approx(0, abs=1e-9) and run["curve"][1]["kl"] > 0
    assert is_plot(tmp_path / "wro_win_rate.png")


# ---- Mixture --------------------------------------------------------------------------------------------------------


def test_pairs_of_mixture_of_two():
    """The same completions for both, the shorter or the more positive first; some pairs differ, some do not."""
    positive, short = mixture_of_two.pairs("positive"), mixture_of_two.pairs("short")
    turned = [one["chosen"] != other["chosen"] for one, other in zip(positive, short, strict=True)]
    assert 0.2 < np.mean(turned) < 0.8
    for one, other in zip(positive, short, strict=True):
        assert {one["chosen"], one["rejected"]} == {other["chosen"], other["rejected"]}
        assert len(other["chosen"].split()) < len(other["rejected"].split())
        assert mixture_of_two.sentiment([], [one["chosen"]]) > mixture_of_two.sentiment([], [one["rejected"]])


def test_objectives_by_weight():
    """
    Three outcomes, each as often as the reference and two policies want it: the curve is that of the enumerated
    mixtures.
    """
    distributions = torch.tensor([[0.5, 0.3, 0.2], [0.1, 0.3, 0.6], [0.3, 0.6, 0.1]], dtype=torch.float64)
    ratios = (distributions[1:] / distributions[0]).log().T
    drawn = torch.arange(3).repeat_interleave((10 * distributions).sum(0).round().int())
    found = mixture_of_two.objectives_by_weight(ratios[drawn].expand(2, -1, -1))
    assert len(drawn) == 30 and [found[0]["weight"], found[10]["weight"], found[-1]["weight"]] == [0, 0.5, 1]
    for entry in found:
        weights = torch.tensor([entry["weight"], 1 - entry["weight"]], dtype=torch.float64)
        log_p = (distributions[0].log() + ratios @ weights).log_softmax(0)
        kl = log_p.exp() @ (log_p - distributions[0].log())
        expected = mixture_of_two.BETA * (log_p.exp() @ ratios - kl)
        assert entry["objectives"] == pytest.approx(expected.tolist(), abs=1e-9)


def test_mixture_of_two(tiny_folder, tmp_path):
    """Adapters, `trl-ext mix`, the curve of the objectives, and the report."""
    command = ["--model", tiny_folder, "--seeds", "0", "--steps", "2", "--pairs_a_step", "2", "--prompts", "2"]
    command += ["--learning_rate", "0.01", "--test_prompts", "2", "--responses", "8", "--new_tokens", "4"]
    command += ["--runs_dir", str(tmp_path / "runs"), "--output_dir", str(tmp_path)]
    mixture_of_two.main(command)
    found = json.loads((tmp_path / "mixture_of_two.json").read_text())["seeds"]["0"]
    assert set(found["measured"]) == set(mixture_of_two.MEASURED)
    # At its own end of the curve a policy's objective is 0 up to sampling, and it falls toward the other one's.
    curve = found["curve"]
    for policy, own, other in ((0, curve[-1], curve[0]), (1, curve[0], curve[-1])):
        assert own["weight"] == 1 - policy and other["objectives"][policy] < 0
        assert abs(own["objectives"][policy]) < abs(other["objectives"][policy])
    assert is_plot(tmp_path / "mixture_of_two.png")


# ---- What is published ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("module", [fdpg_constraints, wro_win_rate, mixture_of_two])
def test_plot_only(module, tmp_path, capsys):
    """Table and plot from the published results; the page has the table's rows."""
    name = module.__name__
    (tmp_path / f"{name}.json").write_text((EXPERIMENTS / f"{name}.json").read_text())
    module.main(["--plot_only", "--output_dir", str(tmp_path)])
    assert is_plot(tmp_path / f"{name}.png")
    page = (EXPERIMENTS / "README.md").read_text()
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert len(rows) > 3 and all(row in page for row in rows[1:])
