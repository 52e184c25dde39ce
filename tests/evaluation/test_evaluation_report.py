"""`trl-ext evaluate` from end to end on tiny models: the JSON, the page, and that nothing in it can act."""

import html.parser
import json
import re
import subprocess
import sys

import numpy as np
import pytest
import sacrebleu
import tiny
import torch
from peft import LoraConfig, get_peft_model
from scipy import optimize, stats
from transformers import AutoModelForCausalLM, AutoTokenizer

from trl_ext import cli
from trl_ext.evaluation import (
    EvaluationConfig,
    RewardFunctionJudge,
    SamplingSettings,
    evaluate_models,
    render_report,
    sample_responses,
    score_pairs,
    score_responses,
    score_samples,
    write_report,
)
from trl_ext.evaluation.loading import load_causal_lm


REWARDS = """
def longer(prompts, completions):
    return [len(c if isinstance(c, str) else c[0]["content"]) for c in completions]
"""


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Three models that share a tokenizer, pairs in a file, and a reward function in another."""
    root = tiny.write_models(tmp_path_factory.mktemp("evaluate"), 24)
    (root / "rewards.py").write_text(REWARDS)
    return root


OPTIONS = ["--num_samples", "2", "--max_new_tokens", "6", "--distinct_length", "3", "--device", "cpu"]


@pytest.fixture(scope="module")
def command(folders):
    """The report of one run of the command, with two models."""
    arguments = ["evaluate", "--model", str(folders / "first"), str(folders / "second")]
    arguments += ["--reference", str(folders / "reference"), "--dataset", str(folders / "pairs.jsonl")]
    arguments += ["--judge", f"{folders / 'rewards.py'}:longer", "--output-dir", str(folders / "out"), *OPTIONS]
    assert cli.main(arguments) == 0
    return json.loads((folders / "out" / "report.json").read_text()), (folders / "out" / "report.html").read_text()


def test_the_json(command, folders):
    """Each model's numbers are there, and they are those of the runners; config, versions and judge are recorded."""
    report, _ = command
    assert (report["num_pairs"], report["num_prompts"]) == (24, 24)
    assert list(report["models"]) == [str(folders / "first"), str(folders / "second")]
    assert report["config"]["num_samples"] == 2 and report["judge"]["name"] == "longer"
    assert {"torch", "trl", "transformers"} <= set(report["versions"])
    first, second = report["models"].values()
    rows = tiny.rows(24)
    tokenizer = AutoTokenizer.from_pretrained(folders / "reference")
    scores = score_pairs(tiny.model(seed=1), rows, tokenizer, reference=tiny.model(seed=0))
    assert first["ranking"]["accuracy"]["value"] == pytest.approx(
        (scores.chosen.logps >= scores.rejected.logps).mean(), abs=1e-9
    )
    difficulty = scores.rejected.ref_logps - scores.chosen.ref_logps
    assert first["pairs"]["difficulty"] == pytest.approx(difficulty, rel=1e-4, abs=1e-4)
    assert first["pairs"]["difficulty"] == second["pairs"]["difficulty"]
    for result in (first, second):
        estimates = [result["ranking"]["accuracy"], result["divergence"]["kl"], result["win_rate"]["win_rate"]]
        for estimate in estimates:
            assert estimate["low"] <= estimate["value"] <= estimate["high"] and estimate["n"] == 24
        # The same expectation three ways.
        assert result["divergence"]["kl_k1"]["low"] < result["divergence"]["kl"]["high"]
        assert result["divergence"]["kl"]["value"] > 0.1
        rate, scores = result["win_rate"], result["responses"]["scores"]
        assert rate["win_rate"]["value"] == pytest.approx(np.mean(scores))
        assert rate["wins"] == sum(score > 0.5 for score in scores)
        # The judge counts characters, so the verdicts follow from the lengths.
        assert scores == [0.5 + np.sign(d) / 2 for d in result["responses"]["length_difference"]]
        assert result["reward"]["gain"]["value"] == pytest.approx(np.mean(result["responses"]["length_difference"]))
        assert result["calibration"]["uniform"]["n"] == 24
        # A tie of two predictions has no side: every pair is in a bin.
        assert sum(b["count"] for b in result["calibration"]["adaptive"]["bins"]) == 24
    difference = np.array(second["responses"]["scores"]) - first["responses"]["scores"]
    assert second["win_rate"]["difference_from_first"]["value"] == pytest.approx(difference.mean())


class Page(html.parser.HTMLParser):
    """Tags, their attributes, and the visible text."""

    VOID = {"meta", "br", "img", "link", "input", "hr"}

    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.text, self.open = [], [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, name, value) for name, value in attrs]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, name, value) for name, value in attrs]

    def handle_endtag(self, tag):
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-3:]}"
        self.open.pop()

    def handle_data(self, data):
        self.text.append(data)


def check_self_contained(text: str) -> Page:
    page = Page(text)
    assert page.open == []
    assert not {"script", "link", "iframe", "img", "object", "embed", "image"} & set(page.tags)
    for tag, name, value in page.attributes:
        assert not name.startswith("on"), (tag, name)
        if name in ("src", "href", "xlink:href", "data", "action"):
            # Links to papers load nothing until somebody follows them; the rest is inside the page.
            assert value.startswith("#") or (tag == "a" and value.startswith("https://huggingface.co/papers/"))
    assert not re.search(r"@import|url\((?!#)", text)
    return page


def test_the_page(command):
    """Self-contained, every plot in it, ids unique among them, and the numbers of the JSON to be read."""
    report, text = command
    page = check_self_contained(text)
    assert page.tags.count("svg") == 5
    ids = [value for tag, name, value in page.attributes if name == "id" and tag == "clippath"]
    assert len(ids) == len(set(ids)) and ids
    shown = " ".join("".join(page.text).split())
    for result in report["models"].values():
        for estimate in (result["ranking"]["accuracy"], result["win_rate"]["win_rate"]):
            assert f"{100 * estimate['value']:.1f}" in shown
            assert f"{100 * estimate['low']:.1f} to {100 * estimate['high']:.1f}" in shown
    for title in ("Reward against drift", "Ranking accuracy before and after", "Calibration", "flipped", "and length"):
        assert title in shown
    assert shown.count("reward ") >= 3 * 20  # the table of responses
    assert "nan" not in shown.lower().split() and "None" not in shown


def test_the_same_numbers_make_the_same_page(command):
    report, text = command
    assert render_report(report) == text


def test_one_run_is_reproducible(folders):
    """Two runs agree in every number; and neither touches the random state."""
    config = EvaluationConfig(num_pairs=6, num_prompts=4, num_samples=2, max_new_tokens=4, distinct_length=2)
    tokenizer = AutoTokenizer.from_pretrained(folders / "reference")
    reference, model = tiny.model(), tiny.model(seed=1)
    torch.manual_seed(5)
    state = torch.random.get_rng_state()
    reports = [
        evaluate_models({"m": model}, reference, tiny.rows(6), tokenizer, f"{folders / 'rewards.py'}:longer", config)
        for _ in range(2)
    ]
    assert (torch.random.get_rng_state() == state).all()
    assert reports[0]["models"] == reports[1]["models"] and reports[0]["samples"] == reports[1]["samples"]


ATTACK = (
    '</script><script>alert(1)</script><img src=x onerror=alert(1)> $x^2$ {{ 7*7 }} "quoted" --> &amp; \r\x00\x1b[31m'
)


@pytest.mark.parametrize("opponent", ["reference", "chosen"])
def test_what_models_and_data_say_is_only_text(opponent, folders, tmp_path):
    """
    Markup in names, prompts, responses and verdicts is shown, not done. A judge of pairs without rewards, one
    undecided verdict, `chosen` as the opponent, messages as prompts: the page stands.
    """
    rows = [
        {
            "prompt": [{"role": "user", "content": f"{ATTACK} {i}"}],
            "chosen": [{"role": "assistant", "content": f"{ATTACK} yes {i}"}],
            "rejected": [{"role": "assistant", "content": "no"}],
        }
        for i in range(5)
    ]

    def judge(prompts, completions_a, completions_b):
        assert all(isinstance(c, list) for c in completions_a + completions_b)
        return [None, *(1.0 for _ in prompts[1:])]  # the first one shown, always: with both orders a tie

    judge.__name__ = ATTACK
    config = EvaluationConfig(
        num_samples=2, max_new_tokens=4, distinct_length=2, opponent=opponent, judge_temperature=0.0
    )
    tokenizer = AutoTokenizer.from_pretrained(folders / "reference")
    models = {ATTACK: tiny.model(seed=1), "b" * 80: tiny.model(seed=2)}
    report = evaluate_models(models, tiny.model(), rows, tokenizer, judge, config)
    assert report["models"][ATTACK]["win_rate"]["not_judged"] == 1
    assert report["models"][ATTACK]["win_rate"]["win_rate"]["value"] == 0.5
    assert report["models"][ATTACK]["win_rate"]["order_consistency"]["value"] == 0.0
    for sample in report["samples"]:
        sample["responses"][ATTACK]["text"] = ATTACK
    numbers, html_file = write_report(report, tmp_path)
    page = check_self_contained(html_file.read_text())
    assert not re.search(r"[\x00-\x08\x0b-\x1f]", html_file.read_text())
    assert "<script" in "".join(page.text) and "{{ 7*7 }}" in "".join(page.text)
    assert json.loads(numbers.read_text())["samples"][0]["responses"][ATTACK]["text"] == ATTACK


def test_without_a_judge_or_samples(folders, tmp_path):
    """Pairs alone: ranking, difficulty and calibration, and three plots."""
    tokenizer = AutoTokenizer.from_pretrained(folders / "reference")
    config = EvaluationConfig(num_samples=0)
    report = evaluate_models({"m": tiny.model(seed=1)}, tiny.model(), tiny.rows(8), tokenizer, None, config)
    assert set(report["models"]["m"]) == {"ranking", "pairs", "calibration"}
    page = check_self_contained(write_report(report, tmp_path)[1].read_text())
    assert page.tags.count("svg") == 3


def test_the_reference_itself(folders):
    """The reference evaluated as a model: KL 0, no gap between the two, a win rate of exactly 1/2."""
    tokenizer = AutoTokenizer.from_pretrained(folders / "reference")
    config = EvaluationConfig(num_prompts=6, num_samples=2, max_new_tokens=4, distinct_length=2)
    judge = f"{folders / 'rewards.py'}:longer"
    report = evaluate_models({"same": tiny.model()}, tiny.model(), tiny.rows(8), tokenizer, judge, config)
    same = report["models"]["same"]
    assert same["divergence"]["kl"]["value"] == pytest.approx(0, abs=1e-6)
    assert same["win_rate"]["win_rate"]["value"] == 0.5 and same["win_rate"]["ties"] == 6
    assert same["ranking"]["accuracy"] == same["ranking"]["reference_accuracy"]
    assert same["diversity"] == report["reference"]["diversity"]
    render_report(report)


def test_one_pair(folders, tmp_path):
    """One pair and one prompt have no intervals, which JSON says as null; the page is the same from either."""
    tokenizer = AutoTokenizer.from_pretrained(folders / "reference")
    config = EvaluationConfig(num_samples=1, max_new_tokens=4)
    judge = f"{folders / 'rewards.py'}:longer"
    report = evaluate_models({"m": tiny.model(seed=1)}, tiny.model(), tiny.rows(1), tokenizer, judge, config)
    numbers, page = write_report(report, tmp_path)
    assert json.loads(numbers.read_text())["models"]["m"]["divergence"]["kl"]["low"] is None
    assert render_report(json.loads(numbers.read_text())) == page.read_text()
    check_self_contained(page.read_text())


def test_a_folder_with_an_adapter_is_the_model_with_it(folders, tmp_path):
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(folders / "reference"),
        LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False),
    )
    model.save_pretrained(tmp_path)
    ids = [[5, 6, 7]], [[8, 9]]
    loaded = load_causal_lm(str(tmp_path), device="cpu")
    scores = score_responses(loaded, *ids, reference="base")
    assert scores.logps == pytest.approx(score_responses(model, *ids).logps, abs=1e-5)
    assert scores.ref_logps == pytest.approx(score_responses(tiny.model(), *ids).logps, abs=1e-5)
    assert abs(scores.logratios[0]) > 0.1


def test_weights_that_are_pickles_are_refused(folders, tmp_path):
    model = tiny.model()
    model.config.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(OSError, match="safetensors"):
        load_causal_lm(str(tmp_path), device="cpu")


@pytest.mark.parametrize(
    "change, message",
    [
        ({"--dataset": "nothing.txt"}, "nothing.txt"),
        ({"--judge": "nobody"}, "judge='nobody'"),
        ({"--opponent": "gold"}, "opponent='gold'"),
        ({"--temperature": "0"}, "`temperature`"),
        ({"--dtype": "int8"}, "dtype='int8'"),
        ({"--num_pairs": "0"}, "`num_pairs`"),
        ({"--embedding_model": "some/encoder", "--num_samples": "1"}, "`num_samples` is 1"),
    ],
)
def test_bad_arguments(change, message, folders, capsys):
    arguments = {
        "--model": str(folders / "first"),
        "--reference": str(folders / "reference"),
        "--dataset": str(folders / "pairs.jsonl"),
        "--judge": f"{folders / 'rewards.py'}:longer",
        "--output_dir": str(folders / "unused"),
    } | change
    (folders / "nothing.txt").write_text("")
    if change.get("--dataset"):
        arguments["--dataset"] = str(folders / "nothing.txt")
    assert cli.main(["evaluate", *(word for pair in arguments.items() for word in pair)]) == 1
    assert message in capsys.readouterr().err


# ---- Every number of a model, once more -----------------------------------------------------------------------------


def wilson(hits) -> dict:
    """Wilson's interval from its own formula, `(p + z^2/2n +- z sqrt(p(1-p)/n + z^2/4n^2)) / (1 + z^2/n)`."""
    hits, z = np.asarray(hits, dtype=float), 1.959963984540054
    n, p = len(hits), hits.mean()
    half = z * np.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    low, high = ((p + z**2 / (2 * n) + sign * half) / (1 + z**2 / n) for sign in (-1, 1))
    return {"value": p, "low": max(low, 0.0), "high": min(high, 1.0), "n": n, "confidence": 0.95}


def bootstrapped(values) -> dict:
    """Mean over prompts of the mean over samples, with scipy's bootstrap over prompts at the report's seed."""
    values = np.asarray(values, dtype=float)
    values = values.reshape(len(values), -1).mean(1)
    assert np.ptp(values) > 0
    draws = stats.bootstrap((values,), np.mean, n_resamples=2000, rng=np.random.default_rng(SEED)).confidence_interval
    return {"value": values.mean(), "low": draws.low, "high": draws.high, "n": len(values), "confidence": 0.95}


def calibrated(confidence, correct, edges) -> dict:
    """
    Calibration in given bins, the last one closed, by loops; its floor from outcomes drawn with the stated
    confidences.
    """
    n = len(confidence)
    inside = [
        (confidence >= low) & ((confidence < high) if high < edges[-1] else True)
        for low, high in zip(edges[:-1], edges[1:], strict=True)
    ]

    def error(outcomes):
        return sum(abs((outcomes - confidence)[rows].sum()) / n for rows in inside)

    draws = np.random.default_rng(SEED).random((2000, n)) < confidence
    chance = np.array([error(draw) for draw in draws])
    ece = error(correct)
    return {
        "ece": ece,
        "floor": chance.mean(),
        "floor_95": np.quantile(chance, 0.95),
        "p_value": (1 + (chance >= ece - 1e-12).sum()) / 2001,
        "bins": [
            {
                "low": low,
                "high": high,
                "count": rows.sum(),
                "confidence": confidence[rows].mean() if rows.any() else None,
                "accuracy": wilson(correct[rows]) if rows.any() else None,
            }
            for low, high, rows in zip(edges[:-1], edges[1:], inside, strict=True)
        ],
        "n": n,
    }


def ranking_oracle(chosen, rejected) -> dict:
    """What the report says of pairs, from their log-probabilities and lengths."""
    policy, reference = chosen.logps - rejected.logps, chosen.ref_logps - rejected.ref_logps
    per_token, ref_per_token = (
        a / chosen.mask.sum(1) - b / rejected.mask.sum(1)
        for a, b in ((chosen.logps, rejected.logps), (chosen.ref_logps, rejected.ref_logps))
    )
    margin = BETA * (policy - reference)
    loss = np.log1p(np.exp(-margin))
    confidence = 1 / (1 + np.exp(-abs(margin)))
    certain = np.log((1 - EPSILON) / EPSILON)

    def gap(after, before):
        idealized = {str(beta): np.mean(before + certain / beta > 0) for beta in BETAS}
        return {"gap": np.median(list(idealized.values())) - np.mean(after >= 0), "idealized": idealized}

    adaptive = np.quantile(confidence, np.linspace(0, 1, len(confidence) // 15 + 1)[1:-1])
    return {
        "ranking": {
            "accuracy": wilson(policy >= 0),
            "accuracy_norm": wilson(per_token >= 0),
            "reference_accuracy": wilson(reference >= 0),
            "reference_accuracy_norm": wilson(ref_per_token >= 0),
            "reward_accuracy": wilson(margin > 0),
            "flipped": wilson((policy >= 0)[reference < 0]),
            "unflipped": wilson((policy < 0)[reference >= 0]),
            "alignment_gap": gap(policy, reference),
            "alignment_gap_norm": gap(per_token, ref_per_token),
            "dpo_loss": bootstrapped(loss),
            "chosen_logratio": bootstrapped(chosen.logps - chosen.ref_logps),
            "rejected_logratio": bootstrapped(rejected.logps - rejected.ref_logps),
            "chosen_sequential_kl": bootstrapped(chosen.token_divergences["forward_kl"].sum(1)),
            "rejected_sequential_kl": bootstrapped(rejected.token_divergences["forward_kl"].sum(1)),
        },
        "pairs": {
            "difficulty": -reference,
            "flip_loss": np.log1p(np.exp(BETA * reference)),
            "dpo_loss": loss,
            "correct": policy >= 0,
            "correct_norm": per_token >= 0,
            "reference_correct": reference >= 0,
        },
        "calibration": {
            "uniform": calibrated(confidence, (margin > 0) * 1.0, np.linspace(0.5, 1, 11)),
            "adaptive": calibrated(confidence, (margin > 0) * 1.0, np.array([0.5, *adaptive, 1.0])),
        },
    }


def diversity_oracle(samples, scores) -> dict:
    """What the report says of samples, `(prompts, samples)`."""
    shape, lengths = (-1, samples.num_samples), scores.mask.sum(1)
    groups = [samples.response_ids[i : i + shape[1]] for i in range(0, len(lengths), shape[1])]

    def distinct(n):
        shares = []
        for group in groups:
            # Of three samples, the first two make a pool, and none is left for the third.
            grams = [tuple(ids[i : i + n]) for ids in group[:2] for i in range(DISTINCT_LENGTH - n + 1)]
            shares.append(len(set(grams)) / len(grams))
        return bootstrapped(shares)

    bleu = sacrebleu.BLEU(effective_order=True)
    texts = [samples.texts[i : i + shape[1]] for i in range(0, len(lengths), shape[1])]
    self_bleu = [
        np.mean([bleu.sentence_score(group[i], group[:i] + group[i + 1 :]).score / 100 for i in range(len(group))])
        for group in texts
    ]
    return {
        "entropy": bootstrapped((scores.token_entropy.sum(1) / lengths).reshape(shape)),
        "sequence_entropy": bootstrapped(-scores.token_logps.sum(1).reshape(shape)),
        "sample_length": bootstrapped(lengths.reshape(shape)),
        "finished": np.mean([ids[-1] == tiny.tokenizer().eos_token_id for ids in samples.response_ids]),
        "distinct_1": distinct(1),
        "distinct_2": distinct(2),
        "self_bleu": bootstrapped(self_bleu),
    }


def divergence_oracle(samples, scores) -> dict:
    shape, tokens = (-1, samples.num_samples), scores.mask.sum()
    ratio = scores.token_logps - scores.ref_token_logps
    kl = scores.token_divergences["reverse_kl"].sum(1)
    return {
        "kl": bootstrapped(kl.reshape(shape)),
        "kl_k1": bootstrapped(ratio.sum(1).reshape(shape)),
        "kl_k2": bootstrapped((ratio**2 / 2).sum(1).reshape(shape)),
        "kl_k3": bootstrapped((np.exp(-ratio) - 1 + ratio).sum(1).reshape(shape)),
        "kl_per_token": kl.sum() / tokens,
        "exact": {
            name: {
                "response": bootstrapped(scores.token_divergences[name].sum(1).reshape(shape)),
                "per_token": scores.token_divergences[name].sum() / tokens,
            }
            for name in DIVERGENCES
        },
    }


def rewarded(lengths) -> dict:
    """The mean of rewards that no response lacks."""
    return {**bootstrapped(lengths), "not_rewarded": 0}


def win_rate_oracle(texts, opponents) -> dict:
    """What the report says of responses that are judged by their length, from their lengths."""
    lengths, others = (np.array([len(text) for text in side], dtype=float) for side in (texts, opponents))
    difference = lengths - others
    scores = (np.sign(difference) + 1) / 2
    x = np.tanh(difference / difference.std())

    def loss(theta, phi):
        odds = theta + phi * x
        return np.log1p(np.exp(odds)).sum() - scores @ odds + 0.05 * phi**2

    theta, phi = optimize.minimize(lambda both: loss(*both), [0.0, 0.0], tol=1e-12).x

    def standardized(theta):
        odds = theta + optimize.minimize_scalar(lambda phi: loss(theta, phi), options=dict(xtol=1e-12)).x * x
        rates = 1 / (1 + np.exp(-odds))
        design = np.stack([np.ones(len(x)), x], axis=1)
        information = design.T @ (design * (rates * (1 - rates))[:, None]) + np.diag([0, 0.1])
        return (scores - rates).sum() * np.sqrt(np.linalg.inv(information)[0, 0])

    z = stats.norm.ppf(0.975)
    low, high = (
        1 / (1 + np.exp(-optimize.brentq(lambda t, level=level: standardized(t) - level, theta - 9, theta + 9)))
        for level in (z, -z)
    )
    similar = scores[abs(difference) < 0.15 * np.maximum(lengths, others)]

    def rate(values):
        counts = {"wins": (values > 0.5).sum(), "ties": (values == 0.5).sum(), "losses": (values < 0.5).sum()}
        return {"win_rate": wilson(values), **counts}

    return {
        "win_rate": {
            **rate(scores),
            "not_judged": 0,
            "order_consistency": None,  # a judge of rewards is asked in one order
            "length_controlled": {
                "win_rate": {
                    "value": 1 / (1 + np.exp(-theta)),
                    "low": low,
                    "high": high,
                    "n": len(x),
                    "confidence": 0.95,
                },
                "length_coefficient": phi,
                "correlation": np.corrcoef(difference, scores)[0, 1],
                "similar_length": rate(similar),
                "similar": 0.15,
                "mean_length": lengths.mean(),
                "mean_opponent_length": others.mean(),
            },
        },
        "responses": {"scores": scores, "length_difference": difference},
        "reward": {"mean": rewarded(lengths), "gain": bootstrapped(difference)},
    }


def same(found, expected, where="") -> int:
    """
    Compares all leaves of two trees, and returns how many numbers there were; a leaf that only one has is a failure.
    """
    if isinstance(found, dict):
        assert set(found) == set(expected), f"{where}: {set(found) ^ set(expected)}"
        return sum(same(found[key], expected[key], f"{where}/{key}") for key in found)
    if isinstance(found, list):
        assert len(found) == len(expected), where
        return sum(same(a, b, f"{where}[{i}]") for i, (a, b) in enumerate(zip(found, expected, strict=True)))
    if found is None or expected is None:
        assert found is None and expected is None, f"{where}: {found!r}, expected {expected!r}"
        return 0
    # The fits of the length control stop by other rules; all others differ by float32 sums in other orders.
    tolerance = 2e-3 if "/length_controlled/" in where else 2e-5
    assert found == pytest.approx(float(expected), rel=tolerance, abs=tolerance), where
    return 1


SEED, BETA, EPSILON, BETAS = 2, 0.3, 0.01, [0.05, 0.4, 6.0]
DISTINCT_LENGTH, DIVERGENCES = 3, ["forward_kl", "js", "hellinger"]


def chatty(seed: int):
    """A tiny model with some responses that end by themselves."""
    model = tiny.model(seed=seed)
    with torch.no_grad():
        model.lm_head.weight[tiny.tokenizer().eos_token_id] *= 1.8
    return model


def test_every_number_of_a_model(folders):
    """
    Each number in the JSON of two models and of the reference is computed again from log-probabilities, lengths and
    texts, with NumPy alone or by another library. A number that is new, or gone, fails too.
    """
    config = EvaluationConfig(
        num_pairs=40,
        num_prompts=12,
        num_samples=3,
        max_new_tokens=12,
        temperature=0.25,
        judge_temperature=0.9,
        judge_top_p=0.8,
        beta=BETA,
        epsilon=EPSILON,
        idealized_betas=BETAS,
        divergences=DIVERGENCES,
        distinct_length=DISTINCT_LENGTH,
        seed=SEED,
    )
    tokenizer = tiny.tokenizer()
    # Between responses of like lengths, in every other row, length alone does not decide.
    others = tiny.rows(40, seed=1)
    rows = [row | {"rejected": others[i]["chosen"]} if i % 2 else row for i, row in enumerate(tiny.rows(40))]
    reference, models = chatty(0), {"one": chatty(1), "two": chatty(2)}
    judge = f"{folders / 'rewards.py'}:longer"
    report = json.loads(json.dumps(evaluate_models(models, reference, rows, tokenizer, judge, config)))

    prompts = [row["prompt"] for row in rows[:12]]
    divergences = ["reverse_kl", *DIVERGENCES]

    def sampled(model, count, temperature, top_p):
        settings = SamplingSettings(12, temperature, top_p, seed=SEED)
        return sample_responses(model, tokenizer, prompts, settings, num_samples=count, batch_size=16)

    answers = {name: sampled(model, 1, 0.9, 0.8).texts for name, model in {"": reference, **models}.items()}
    samples = sampled(reference, 3, 0.25, 1.0)
    assert min(map(len, samples.response_ids)) >= DISTINCT_LENGTH
    expected = {
        "diversity": diversity_oracle(samples, score_samples(reference, samples)),
        "sample_reward": rewarded(np.array([len(text) for text in samples.texts]).reshape(-1, 3)),
    }
    opponent = {"name": "reference", "reward": rewarded([len(text) for text in answers[""]])}
    assert report["opponent"].pop("name") == opponent.pop("name") and same(report["opponent"], opponent) == 6
    assert report["reference"].pop("name") == "reference"
    assert same(report["reference"], expected, "reference") == 37  # 7 estimates, a share and a count

    found = {}
    for name, model in models.items():
        scores = score_pairs(model, rows, tokenizer, reference=reference, divergences=["forward_kl"])
        assert (scores.chosen.lengths != scores.rejected.lengths).mean() > 0.4
        samples = sampled(model, 3, 0.25, 1.0)
        assert min(map(len, samples.response_ids)) >= DISTINCT_LENGTH
        of_samples = score_samples(model, samples, reference=reference, divergences=divergences)
        found[name] = {
            **ranking_oracle(scores.chosen, scores.rejected),
            "diversity": diversity_oracle(samples, of_samples),
            "divergence": divergence_oracle(samples, of_samples),
            "sample_reward": rewarded(np.array([len(text) for text in samples.texts]).reshape(-1, 3)),
            **win_rate_oracle(answers[name], answers[""]),
        }
    first, second = found.values()
    second["win_rate"]["difference_from_first"] = bootstrapped(
        np.array(second["responses"]["scores"]) - first["responses"]["scores"]
    )
    second["ranking"]["difference_from_first"] = {}
    for metric, hits in (("accuracy", "correct"), ("accuracy_norm", "correct_norm")):
        a, b = second["pairs"][hits], first["pairs"][hits]
        only, both = (a & ~b).sum(), (a != b).sum()
        test = min(1.0, 2 * stats.binom.cdf(min(only, both - only), both, 0.5))  # exact, and the coin is fair
        # Bonett and Price: a pair more on which only the one, and one on which only the other is right.
        n, p, q = len(a) + 2, ((a & ~b).sum() + 1) / (len(a) + 2), ((b & ~a).sum() + 1) / (len(a) + 2)
        half = stats.norm.ppf(0.975) * np.sqrt((p + q - (p - q) ** 2) / n)
        ends = {"value": a.mean() - b.mean(), "low": p - q - half, "high": p - q + half, "n": len(a)}
        second["ranking"]["difference_from_first"][metric] = {**ends, "confidence": 0.95, "p_value": test}
    for name in models:
        assert same(report["models"][name], found[name], name) > 400


def test_embedding_diversity_in_the_report(folders, encoder_folder):
    """The report's number is the mean over prompts of the encoder's; empty responses are left out, not made up."""
    import sentence_transformers

    from trl_ext.evaluation import evaluate

    config = EvaluationConfig(
        num_pairs=4, num_prompts=4, num_samples=3, max_new_tokens=5, distinct_length=2, embedding_model=encoder_folder
    )
    tokenizer = AutoTokenizer.from_pretrained(folders / "reference")
    texts = []
    original = evaluate._Run._samples

    def samples(self, model):
        found = original(self, model)
        found.texts[:2] = ["", "  "]  # one response is left of the first prompt, and all of the others
        texts.append(found.texts)
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate._Run, "_samples", samples)
        result = evaluate_models({"m": tiny.model(seed=1)}, tiny.model(seed=0), tiny.rows(4), tokenizer, None, config)
    encoder = sentence_transformers.SentenceTransformer(encoder_folder)
    expected = []
    for i in range(3, 12, 3):
        similarity = encoder.similarity(*2 * [encoder.encode(texts[1][i : i + 3])]).numpy()
        expected.append(1 - similarity[np.triu_indices(3, 1)].mean())
    found = result["models"]["m"]["diversity"]["embedding"]
    assert found["n"] == 3 and found["value"] == pytest.approx(np.mean(expected), abs=1e-5)
    assert "Embedding diversity" in render_report(result)


def answers(prompts, completions, solution):
    """
    A reward of the prompt's own answer, none for prompts without one; it can be told that it got the right row's.
    """
    return [
        None if right is None else float(len(completion) + 100 * int(prompt.split("number ")[1][:-1]) + right)
        for prompt, completion, right in zip(prompts, completions, solution, strict=True)
    ]


def test_reward_functions_take_columns_and_may_have_no_reward(folders):
    """
    Each response is scored with the columns of its prompt's first row. Those without a reward are left out of the
    means, and counted; the gain is over prompts of which both sides have one.
    """
    rows = [{**row, "solution": None if i % 3 == 0 else i} for i, row in enumerate(tiny.rows(7))]
    rows += [{**row, "solution": 1000} for row in rows]  # the same prompts again
    tokenizer = AutoTokenizer.from_pretrained(folders / "reference")
    config = EvaluationConfig(
        num_pairs=4, num_prompts=7, num_samples=2, max_new_tokens=4, distinct_length=2, opponent="chosen"
    )
    arguments = (tiny.model(seed=0), rows, tokenizer, RewardFunctionJudge(answers), config)
    report = evaluate_models({"m": tiny.model(seed=1)}, *arguments)
    found = report["models"]["m"]
    offsets = {i: 101 * i for i in range(7) if i % 3}  # 1, 2, 4 and 5 have a reward
    lengths = {i: len(sample["responses"]["m"]["text"]) for i, sample in enumerate(report["samples"])}
    by_hand = {i: lengths[i] + offset for i, offset in offsets.items()}
    assert found["reward"]["mean"]["value"] == pytest.approx(np.mean(list(by_hand.values())))
    assert (found["reward"]["mean"]["n"], found["reward"]["mean"]["not_rewarded"]) == (4, 3)
    opponents = [len(rows[i]["chosen"]) + offset for i, offset in offsets.items()]
    assert report["opponent"]["name"] == "chosen" and "opponent_reward" not in report["reference"]
    assert report["opponent"]["reward"]["value"] == pytest.approx(np.mean(opponents))
    assert found["reward"]["gain"]["value"] == pytest.approx(np.mean(list(by_hand.values())) - np.mean(opponents))
    assert found["win_rate"]["not_judged"] == 3 and found["sample_reward"]["n"] == 4
    shown = [sample["responses"]["m"].get("reward") for sample in report["samples"]]
    assert shown == [by_hand.get(i) for i in range(7)]
    page = render_report(report)
    assert "3 of the judged responses have no reward" in page
    (row,) = re.findall(r"Reward of judged responses.*?</tr>", page, flags=re.DOTALL)
    assert f">{np.mean(opponents):.0f}" in row and f">{np.mean(list(by_hand.values())):.0f}" in row


def test_a_missing_column_is_found_before_sampling(folders, monkeypatch):
    from trl_ext.evaluation import evaluate

    def sample(*args, **kwargs):
        raise AssertionError("sampled")

    monkeypatch.setattr(evaluate, "sample_responses", sample)
    tokenizer = AutoTokenizer.from_pretrained(folders / "reference")
    config = EvaluationConfig(num_pairs=4, num_prompts=4)
    models = ({"m": tiny.model(seed=1)}, tiny.model(seed=0), tiny.rows(4), tokenizer)
    with pytest.raises(
        ValueError, match="judge answers needs the column `solution`, and the data have chosen, rejected"
    ):
        evaluate_models(*models, RewardFunctionJudge(answers), config)


def test_prompts_within_both_responses_and_data_that_come_once(folders):
    """Implicit prompts, text or messages, out of a generator, are those of explicit data in a list, row for row."""
    tokenizer = AutoTokenizer.from_pretrained(folders / "reference")
    judge = f"{folders / 'rewards.py'}:longer"
    options = dict(num_prompts=8, num_samples=1, max_new_tokens=4, distinct_length=2)
    for opponent in ("chosen", "reference"):
        explicit = tiny.rows(8, conversational=True)
        implicit = ({side: row["prompt"] + row[side] for side in ("chosen", "rejected")} for row in explicit)
        config = EvaluationConfig(num_pairs=3, opponent=opponent, **options)
        one, two = (
            evaluate_models({"m": tiny.model(seed=1)}, tiny.model(seed=0), rows, tokenizer, judge, config)
            for rows in (explicit, implicit)
        )
        assert one["models"] == two["models"] and one["samples"] == two["samples"]
        assert (two["num_pairs"], two["num_prompts"]) == (3, 8)
    nothing_shared = [{"chosen": "yes", "rejected": "no"}]
    with pytest.raises(ValueError, match="no column `prompt`"):
        evaluate_models({"m": tiny.model(seed=1)}, tiny.model(), nothing_shared, tokenizer, judge, config)


def test_a_missing_encoder_is_found_before_sampling(folders, monkeypatch):
    """Minutes of sampling come after what can fail at once."""
    from trl_ext.evaluation import evaluate

    def sample(*args, **kwargs):
        raise AssertionError("sampled")

    monkeypatch.setattr(evaluate, "sample_responses", sample)
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    tokenizer = AutoTokenizer.from_pretrained(folders / "reference")
    config = EvaluationConfig(num_pairs=4, num_prompts=4, embedding_model="some/encoder")
    with pytest.raises(ImportError, match="sentence-transformers"):
        evaluate_models({"m": tiny.model(seed=1)}, tiny.model(seed=0), tiny.rows(4), tokenizer, None, config)


def test_the_command_line(capsys):
    assert cli.main([]) == 0
    usage = capsys.readouterr().out
    assert "trl-ext evaluate" in usage and "trl-ext fdpo" in usage
    assert cli.main(["train"]) == 2 and "unknown command 'train'" in capsys.readouterr().err


def test_metrics_need_no_model_library():
    """The functions on arrays load neither transformers nor TRL."""
    code = (
        "import sys; from trl_ext.evaluation import ranking_accuracy, win_rate, expected_calibration_error;"
        "win_rate([1, 0]); ranking_accuracy([1.0], [0.0]); expected_calibration_error([0.7], [1]);"
        "assert not {'transformers', 'trl', 'torch', 'matplotlib'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# ---- What fails, and when -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, value, message",
    [
        ("num_prompts", 0, "`num_prompts` must be an integer of at least 1, got 0"),
        ("batch_size", 1.5, "`batch_size` must be an integer"),
        ("num_samples", -1, "`num_samples` must be an integer of at least 0, got -1"),
        ("max_new_tokens", 0, "`max_new_tokens` must be an integer of at least 1, got 0"),
        ("max_length", 1, "`max_length` must be an integer of at least 2.*, got 1"),
        ("distinct_length", 1, "`distinct_length` must be an integer of at least 2, got 1"),
        ("seed", -1, "`seed` must be .*, got -1"),
        ("temperature", 0.0, "`temperature` must be .*, got 0.0"),
        ("judge_temperature", float("nan"), "`judge_temperature` must be .*, got nan"),
        ("judge_top_p", 0.0, "`judge_top_p` must be .*, got 0.0"),
        ("beta", float("inf"), "`beta` must be .*, got inf"),
        ("epsilon", 0.7, "`epsilon` must be .*0.5.*, got 0.7"),
        ("idealized_betas", [], r"`idealized_betas` must be .*, got \[\]"),
        ("idealized_betas", [0], "`idealized_betas` must be .*, got 0"),
        ("beta", "abc", "`beta` must be .*, got 'abc'"),
        ("beta", True, "`beta` must be .*, got True"),
        ("num_pairs", "8", "`num_pairs` must be .*, got '8'"),
        ("embedding_model", 0.5, "`embedding_model` must be .*, got 0.5"),
        ("opponent", None, "`opponent` must be .*, got None"),
        ("divergences", "js", "`divergences` must be .*, got 'js'"),
        ("idealized_betas", [1.0, 1.0], "`idealized_betas` has a value twice"),
        ("divergences", ["kl2"], r"`divergences=\['kl2'\]`"),
        ("divergences", ["js", "js_divergence"], "`divergences` has one of them twice"),
        ("opponent", "", "`opponent`"),
    ],
)
def test_every_option_is_checked_when_it_is_set(name, value, message):
    with pytest.raises(ValueError, match=message):
        EvaluationConfig(**{name: value})


def sampling_fails(monkeypatch):
    from trl_ext.evaluation import evaluate

    monkeypatch.setattr(evaluate, "sample_responses", lambda *a, **k: pytest.fail("sampled before it failed"))
    monkeypatch.setattr(evaluate, "score_pairs", lambda *a, **k: pytest.fail("scored before it failed"))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"--model": "{}/nowhere"}, "there is no file or folder {}/nowhere"),
        ({"--model": "{}/empty"}, "The model '{}/empty' cannot be loaded, as its configuration cannot be read"),
        ({"--model": "{}/no_weights"}, "has no weights of the model in safetensors"),
        ({"--model": "{}/lost_base"}, "The model '{}/lost_base' cannot be loaded"),
        ({"--reference": "{}/nowhere"}, "there is no file or folder {}/nowhere"),
        ({"--dataset": "my_pairs.jsonl"}, "`dataset='my_pairs.jsonl'`: there is no file or folder my_pairs.jsonl in "),
        ({"--dataset": "~/nowhere/my_pairs"}, "there is no file or folder ~/nowhere/my_pairs in "),
        ({"--judge": "nomodule.x:g"}, "`judge='nomodule.x:g'` cannot be loaded. ModuleNotFoundError: No module named"),
        (
            {"--judge": "{}/broken.py:g"},
            "cannot be loaded. ZeroDivisionError: division by zero ({}/broken.py, line 2)",
        ),
        ({"--output_dir": "{}/broken.py/out"}, "`output_dir='{}/broken.py/out'` cannot be written"),
        ({"--epsilon": "0.7"}, "`epsilon`"),
    ],
)
def test_what_is_not_there_is_found_before_sampling(change, message, folders, capsys, monkeypatch, tmp_path):
    """The second model too; and in a line, without a traceback."""
    (tmp_path / "empty").mkdir()
    tiny.model().config.save_pretrained(tmp_path / "no_weights")
    (tmp_path / "lost_base").mkdir()
    adapter = LoraConfig(base_model_name_or_path=str(tmp_path / "gone"), task_type="CAUSAL_LM")
    adapter.save_pretrained(tmp_path / "lost_base")
    (tmp_path / "broken.py").write_text("x = 1\n1 / 0\n")
    sampling_fails(monkeypatch)
    change = {name: value.format(tmp_path) for name, value in change.items()}
    arguments = {
        "--model": f"{folders / 'first'}",
        "--reference": f"{folders / 'reference'}",
        "--dataset": f"{folders / 'pairs.jsonl'}",
        "--output_dir": f"{tmp_path / 'out'}",
    } | {name: value for name, value in change.items() if name != "--model"}
    words = [word for pair in arguments.items() for word in pair]
    assert cli.main(["evaluate", *words, *(["--model", change["--model"]] if "--model" in change else [])]) == 1
    err = capsys.readouterr().err
    assert message.format(tmp_path) in err and "Traceback" not in err
    assert not list(tmp_path.glob("out/*"))


@pytest.mark.parametrize("package", ["scipy", "matplotlib"])
def test_missing_packages_are_found_before_sampling(package, folders, capsys, monkeypatch, tmp_path):
    sampling_fails(monkeypatch)
    monkeypatch.setitem(sys.modules, package, None)
    arguments = ["--model", str(folders / "first"), "--reference", str(folders / "reference")]
    arguments += ["--dataset", str(folders / "pairs.jsonl"), "--output_dir", str(tmp_path)]
    assert cli.main(["evaluate", *arguments]) == 1
    assert f'`{package}`: pip install "trl-ext[evaluation]"' in capsys.readouterr().err
    if package == "scipy":
        with pytest.raises(ImportError, match="trl-ext.evaluation"):
            evaluate_models({"m": tiny.model()}, tiny.model(), tiny.rows(2), tiny.tokenizer())


FAILING = """
calls = []

def tired(prompts, completions):
    calls.append(1)
    if len(calls) > {}:
        raise RuntimeError("the judge went home")
    return [float(len(c)) for c in completions]
"""


# Asked for the reference's samples and answers; then for each model's samples, its verdicts, and its answers' rewards.
@pytest.mark.parametrize("calls, told", [(2, 0), (3, 0), (4, 1), (5, 1), (6, 1)])
def test_a_judge_that_fails_late(calls, told, folders, tmp_path, capsys):
    """
    What was measured is in the report, with the failure by name, and every model has its other numbers. `told`: win
    rates.
    """
    (tmp_path / "tired.py").write_text(FAILING.format(calls))
    arguments = ["--model", str(folders / "first"), "--model", str(folders / "second"), *OPTIONS]
    arguments += ["--reference", str(folders / "reference"), "--dataset", str(folders / "pairs.jsonl")]
    arguments += [
        "--judge",
        f"{tmp_path / 'tired.py'}:tired",
        "--output_dir",
        str(tmp_path / "out"),
        "--num_prompts",
        "8",
    ]
    with pytest.warns(UserWarning, match="went home"):
        assert cli.main(["evaluate", *arguments]) == 1
    assert "the judge failed. RuntimeError: the judge went home" in capsys.readouterr().err
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["judge_failure"] == "RuntimeError: the judge went home" and report["unfinished"] == []
    assert list(report["models"]) == [str(folders / "first"), str(folders / "second")]
    for result in report["models"].values():
        assert {"ranking", "calibration", "diversity", "divergence"} <= set(result)
    assert sum("win_rate" in result for result in report["models"].values()) == told
    page = check_self_contained((tmp_path / "out" / "report.html").read_text())
    assert "The judge failed" in "".join(page.text) and "went home" in "".join(page.text)


def test_a_judge_that_fails_at_once(folders):
    """Nothing is lost yet, so it is an error."""

    def judge(prompts, completions):
        raise RuntimeError("never")

    from trl_ext.evaluation import RewardFunctionJudge

    config = EvaluationConfig(num_prompts=2, num_samples=0, max_new_tokens=2)
    with pytest.raises(RuntimeError, match="never"):
        evaluate_models(
            {"m": tiny.model()}, tiny.model(), tiny.rows(2), tiny.tokenizer(), RewardFunctionJudge(judge), config
        )


def test_a_model_that_fails_late_does_not_take_the_others_with_it(folders, tmp_path, capsys, monkeypatch):
    """Its weights are cut off, which no look at its files tells: the first model's numbers are written, whole."""
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "cut").mkdir(exist_ok=True)
        (tmp_path / "cut" / name).write_bytes((folders / "second" / name).read_bytes())
    whole = (folders / "second" / "model.safetensors").read_bytes()
    (tmp_path / "cut" / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    arguments = ["--model", str(folders / "first"), str(tmp_path / "cut"), "--num_samples", "0", "--device", "cpu"]
    arguments += ["--reference", str(folders / "reference"), "--dataset", str(folders / "pairs.jsonl")]
    monkeypatch.chdir(tmp_path)
    assert cli.main(["evaluate", *arguments, "--output_dir", "out"]) == 1
    err = capsys.readouterr().err
    assert "What was measured until then is in out/report.json and out/report.html." in err and "Traceback" not in err
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert list(report["models"]) == [str(folders / "first")] and report["unfinished"] == [str(tmp_path / "cut")]
    assert f"Not measured yet: {tmp_path / 'cut'}" in (tmp_path / "out" / "report.html").read_text()
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["report.html", "report.json"]


def test_reports_are_written_whole(command, tmp_path, monkeypatch):
    """A page that cannot be made leaves the numbers, and the older page as it was."""
    from trl_ext.evaluation import report as module

    report, text = command
    write_report(report, tmp_path)

    def broken(*args):
        raise RuntimeError("no page")

    monkeypatch.setattr(module, "render_report", broken)
    with pytest.raises(RuntimeError, match="no page"):
        write_report({**report, "seconds": 1.0}, tmp_path)
    assert json.loads((tmp_path / "report.json").read_text())["seconds"] == 1.0
    assert (tmp_path / "report.html").read_text() == text
    assert len(list(tmp_path.iterdir())) == 2
    with pytest.raises(ValueError, match="layout 1"):
        render_report({**report, "schema": 1})


# ---- Data and names -------------------------------------------------------------------------------------------------


def test_pairs_that_are_left_out_are_counted(tmp_path):
    """
    Four of eight prompts fill `max_length` and one pair is cut to the same response: three are scored, and the page
    says so.
    """
    rows = [row | {"prompt": f"What {i}?" * (10 if i % 2 else 1)} for i, row in enumerate(tiny.rows(8))]
    rows[0] |= {"rejected": rows[0]["chosen"] + " And more of it."}
    tokenizer = tiny.tokenizer()
    longest = len(tokenizer("What 0?")["input_ids"]) + 3
    config = EvaluationConfig(num_samples=0, max_length=longest)
    report = evaluate_models({"m": tiny.model(seed=1)}, tiny.model(), rows, tokenizer, None, config)
    assert report["dropped_pairs"] == {"no_room": 4, "same_responses": 1}
    assert report["num_pairs"] == 3 == report["models"]["m"]["ranking"]["accuracy"]["n"]
    page = write_report(report, tmp_path)[1].read_text()
    said = (
        f"left out were 4 whose prompt alone fills max_length = {longest} and 1 whose two responses are the same once"
    )
    assert f"Of 8 pairs 3 were scored; {said}" in page and '<p class="lead">\n  3 preference pairs' in page


def test_a_generator_gives_all_its_rows():
    """Pairs and prompts come from one pass: over a generator as over a list."""
    config = EvaluationConfig(num_pairs=5, num_prompts=8, num_samples=1, max_new_tokens=2)
    arguments = {"m": tiny.model(seed=1)}, tiny.model()
    reports = [
        evaluate_models(*arguments, rows, tiny.tokenizer(), None, config)
        for rows in (tiny.rows(12), iter(tiny.rows(12)), (row for row in tiny.rows(12)))
    ]
    assert reports[0]["num_pairs"] == 5 and reports[0]["num_prompts"] == 8
    assert reports[0]["models"] == reports[1]["models"] == reports[2]["models"]


def test_tools_of_the_rows_are_in_the_prompts_that_are_sampled(monkeypatch):
    from trl_ext.evaluation import evaluate

    seen, original = [], evaluate.sample_responses

    def sample(*args, **kwargs):
        seen.append(original(*args, **kwargs))
        return seen[-1]

    monkeypatch.setattr(evaluate, "sample_responses", sample)
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = "{% if tools %}{{ tools[0].function.name }} {% endif %}{{ mood }}" + tiny.CHAT_TEMPLATE
    rows = [
        row
        | {
            "tools": json.dumps([{"type": "function", "function": {"name": f"tool_{i}"}}]),
            "chat_template_kwargs": {"mood": "calm "},
        }
        for i, row in enumerate(tiny.rows(3, conversational=True))
    ]
    config = EvaluationConfig(num_samples=1, max_new_tokens=2)
    judge = lambda prompts, a, b: [0.5] * len(a)  # noqa: E731
    evaluate_models({"m": tiny.model(seed=1)}, tiny.model(), rows, tokenizer, judge, config)
    assert len(seen) == 4
    for samples in seen:
        assert [tokenizer.decode(ids)[:12] for ids in samples.prompt_ids] == [f"tool_{i} calm " for i in range(3)]


@pytest.mark.parametrize(
    "names, shown",
    [
        (["/data/experiments/tdpo/checkpoint-100"], ["tdpo/checkpoint-100"]),
        (["HuggingFaceTB/SmolLM2-135M-Instruct"], ["SmolLM2-135M-Instruct"]),
        (["/runs/tdpo/checkpoint-100", "/runs/fdpo/checkpoint-100/"], ["tdpo", "fdpo"]),
        (["/runs/tdpo/checkpoint-100", "/runs/tdpo/checkpoint-200"], ["checkpoint-100", "checkpoint-200"]),
        (
            [f"/runs/smollm2-tdpo-beta-{beta}-lr-1e-6-epochs-3/checkpoint-100" for beta in ("0.05", "0.50")],
            ["…beta-0.05…", "…beta-0.50…"],
        ),
        (
            [
                f"/runs/smollm2-{m}-beta-{b}-lr-1e-6-epochs-3/checkpoint-100"
                for m, b in (("tdpo", "0.05"), ("fdpo", "0.50"))
            ],
            ["smollm2-tdpo-beta-0.05…", "smollm2-fdpo-beta-0.50…"],
        ),
        (
            ["x" * 60 + "1" + "y" * 60, "x" * 60 + "2" + "y" * 60],
            ["1: " + (s := "x" * 13 + "…" + "y" * 14), "2: " + s],
        ),
        (["a", "a/"], ["1: a", "2: a"]),
        (["a", "b/a"], ["a", "b/a"]),
    ],
)
def test_models_can_be_told_apart(names, shown):
    from trl_ext.evaluation.plots import short_names

    assert short_names(names) == shown


def test_like_names_in_the_page(command):
    """
    Full names, whatever is shown in the table, in the settings and in a list; the reference by another name than a
    model.
    """
    report, _ = command
    names = [f"/data/experiments/{m}/checkpoint-100" for m in ("tdpo", "fdpo")]
    report = report | {
        "models": dict(zip(names, report["models"].values(), strict=True)),
        "samples": [],
        "reference": report["reference"] | {"name": "sft/tdpo"},
    }
    page = Page(render_report(report))
    shown = "".join(page.text)
    assert "tdpo, fdpo against tdpo (reference)" in shown
    for name in names:
        assert shown.count(name) >= 2
    settings = json.loads(shown[shown.index("Settings{") + len("Settings") : shown.index("Judge{")])
    assert settings["models"] == names and settings["reference"] == "sft/tdpo"


def test_both_calibration_errors_are_named(command):
    """The table has both with their p-values; the remark names the bins in which chance alone explains the error."""
    report, text = command
    report = json.loads(json.dumps(report))
    first, *others = (result["calibration"] for result in report["models"].values())
    for calibration in others:
        for binning in ("uniform", "adaptive"):
            calibration[binning]["p_value"] = 0.001
    first["uniform"] |= {"ece": 0.191, "p_value": 0.2}
    first["adaptive"] |= {"ece": 0.031, "p_value": 0.9}

    def shown():
        return " ".join("".join(Page(render_report(report)).text).split())

    assert "in bins of equal width and of equal count is not distinguishable" in shown() and "on 24 pairs" in shown()
    for ece, p_value in (("0.191", "p = 0.2"), ("0.031", "p = 0.9")):
        assert re.search(rf"{ece}\s*{p_value}", shown())
    first["adaptive"]["p_value"] = 0.0005
    assert "in bins of equal width is not distinguishable" in shown() and re.search(r"0.031\s*p < 0.001", shown())
    first["uniform"]["p_value"] = 0.0005
    assert "not distinguishable from that of a calibrated" not in shown()
    for row in ("ECE, bins of equal width", "ECE, bins of equal count"):
        assert row in shown()
    assert "The bins hold equally many pairs each" in shown()


def test_the_table_has_every_divergence_with_its_interval(command):
    report, text = command
    shown = " ".join("".join(Page(text).text).split())
    for result in report["models"].values():
        for estimate in [
            result["divergence"]["kl_k2"],
            *(d["response"] for d in result["divergence"]["exact"].values()),
        ]:
            assert f"{estimate['low']:.3g} to {estimate['high']:.3g}" in shown
        assert set(result["divergence"]["exact"]) == {"forward_kl", "js"}
    assert "KL(reference || model)" in shown and "twice the textbook" in shown
    second = list(report["models"].values())[1]["ranking"]["difference_from_first"]["accuracy_norm"]
    sign = "+" if second["value"] > 0 else ""
    assert f"{sign}{100 * second['value']:.1f}" in shown and f"p = {second['p_value']:.2g}" in shown


def test_options_in_several_places():
    """`--model A --model B` is two models; another option twice is an error, as one of the two would be forgotten."""
    from trl_ext.evaluation.command import joined

    arguments = ["--model", "a", "--beta=0.2", "--model=b", "c", "--output-dir", "my-folder", "--trust_remote_code"]
    assert joined(arguments) == [
        "--model", "a", "b", "c", "--beta", "0.2", "--output_dir", "my-folder", "--trust_remote_code",
    ]  # fmt: skip
    with pytest.raises(ValueError, match="`--beta` is given twice"):
        joined(["--beta", "0.1", "--beta=0.2"])


def test_numbers_for_readers():
    """Zero has no sign, small numbers are not 0.000, and the ends of an interval are told apart."""
    from trl_ext.evaluation.report import NATS, PERCENT, PLAIN, _cell, format_number

    assert format_number(2.65e-06) == "2.65e-06" and format_number(-1e-9, PERCENT, signed=True) == "0.0"
    assert format_number(0.0, PLAIN, signed=True) == "0" and format_number(0.05, PERCENT, signed=True) == "+5.0"
    assert format_number(12345.6) == "12346" and format_number(float("nan")) == "–"
    estimate = {"value": 0.0, "low": 0.0, "high": 0.0, "n": 3, "confidence": 0.95}
    assert _cell(estimate, PERCENT, signed=True) == {"text": "0.0", "interval": "all equal"}
    assert _cell({**estimate, "value": 1.0001, "low": 1.0, "high": 1.0002}, NATS)["interval"] == "1 to 1.0002"
    assert _cell({**estimate, "low": -1e-9, "high": 1e-9}, PERCENT, signed=True)["interval"] == "all nearly equal"
    assert _cell(None, reason="samples too short") == {"text": "–", "interval": "samples too short"}


def test_a_remark_of_several_models_is_made_once(command):
    """
    What holds for all models is said once, and what was asked for but could not be measured keeps its row and a
    reason.
    """
    report, _ = command
    report = json.loads(json.dumps(report))
    for result in report["models"].values():
        result["win_rate"]["win_rate"] |= {"value": 0.5, "low": 0.3, "high": 0.7}
        result["diversity"]["finished"] = 0.1
        result["diversity"]["distinct_1"] = result["diversity"]["distinct_2"] = None
    shown = "".join(Page(render_report(report)).text)
    for once in ("not distinguishable from 50%", "Most samples were cut", "All models"):
        assert shown.count(once) == 1, once
    for row in ("Distinct-1", "Distinct-2"):
        assert re.search(rf"{row}[^–]*–\s*samples too short", shown)
    assert (
        "Distinct-n was not measured" in shown and f"distinct_length = {report['config']['distinct_length']}" in shown
    )
    # Two rewards of two kinds of responses have two names, as have all divergences.
    assert "Reward of judged responses" in shown and "Reward of samples" in shown and "Mean reward" not in shown
    assert "Forward KL" in shown and "Jensen-Shannon" in shown and not re.search(r"Divergence|forward_klnats", shown)


@pytest.mark.parametrize("kl", [2.65e-06, 0.0, 20.0])
def test_the_axis_of_kl_begins_at_zero(kl, command):
    """However near the models are: the axis has no negative KL, and every marker is on it, whole."""
    from matplotlib.figure import Figure

    from trl_ext.evaluation import plots

    report = json.loads(json.dumps(command[0]))
    for result in report["models"].values():
        result["divergence"]["kl"] |= {"value": kl, "low": 0.9 * kl, "high": 1.1 * kl}
    figure = Figure()
    plots.frontier(figure, report)
    (axes,) = figure.axes
    low, high = axes.get_xlim()
    assert low == 0 and 1.1 * kl <= high <= max(1.3 * kl, 1)
    assert all(not line.get_clip_on() for line in axes.lines if line.get_marker() not in (".", "None", None))


def test_a_lone_surrogate_costs_nothing(command, tmp_path):
    """
    Half of a character, in names and texts, at the end of hours of measuring: both files are written, the JSON loses
    nothing.
    """
    report = json.loads(json.dumps(command[0]))
    broken = "half \ud83d of it"
    report["models"] = {f"{name}{broken}": result for name, result in report["models"].items()}
    report["judge"]["name"] = report["dataset"] = broken
    report["samples"][0]["prompt"] = broken
    report["samples"][0]["opponent"]["text"] = broken
    numbers, page = write_report(report, tmp_path)
    assert json.loads(numbers.read_text(encoding="utf-8")) == report
    check_self_contained(page.read_text(encoding="utf-8"))
    assert "half \ufffd of it" in page.read_text(encoding="utf-8")


def test_hostile_names(command):
    """Names of models, dataset, judge and columns are text on the page and in the figures, whatever they hold."""
    report = json.loads(json.dumps(command[0]))
    hostile = "--><script>alert(1)</script><img src=x onerror=alert(2)>\"'</style></svg>]]>"
    report["models"] = {f"{number}{hostile}": result for number, result in enumerate(report["models"].values())}
    for sample in report["samples"]:
        sample["responses"] = dict(zip(report["models"], sample["responses"].values(), strict=True))
    report["reference"]["name"] = report["dataset"] = report["judge"]["name"] = hostile
    report["config"]["opponent"] = report["device"] = report["judge_failure"] = hostile
    report["versions"][hostile] = hostile
    page = check_self_contained(render_report(report))
    assert "<script>alert(1)</script>" in "".join(page.text)


@pytest.mark.parametrize("call", [1, 2, 3, 4])
def test_an_interrupted_command_is_repeated(call, command, folders, tmp_path, monkeypatch):
    """
    Stopped before the reference's samples, within the first model, between the models and within the second: what is
    on disk can be read, with the models that are missing, and the same command makes the report of a run that nobody
    stopped.
    """
    from trl_ext.evaluation import evaluate

    whole, _ = command
    arguments = ["evaluate", "--model", str(folders / "first"), str(folders / "second")]
    arguments += ["--reference", str(folders / "reference"), "--dataset", str(folders / "pairs.jsonl")]
    arguments += ["--judge", f"{folders / 'rewards.py'}:longer", "--output-dir", str(tmp_path), *OPTIONS]
    original, calls = evaluate.sample_responses, []

    def interrupted(*args, **kwargs):
        calls.append(None)
        if len(calls) == [1, 3, 5, 6][call - 1]:
            raise KeyboardInterrupt
        return original(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(evaluate, "sample_responses", interrupted)
        with pytest.raises(KeyboardInterrupt):
            cli.main(arguments)
    assert (tmp_path / "report.json").exists() == (tmp_path / "report.html").exists() == (call > 2)
    if call > 2:
        report = json.loads((tmp_path / "report.json").read_text())
        assert report["unfinished"] == [str(folders / "second")] and len(report["models"]) == 1
        check_self_contained((tmp_path / "report.html").read_text())
    assert cli.main(arguments) == 0
    report = json.loads((tmp_path / "report.json").read_text())
    assert {**report, "created": 0, "seconds": 0} == {**whole, "created": 0, "seconds": 0}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.html", "report.json"]
