"""`trl-ext evaluate` from end to end on tiny models: the JSON, the page, and that nothing in it can act."""

import html.parser
import json
import re
import subprocess
import sys

import numpy as np
import pytest
import tiny
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from trl_ext import cli
from trl_ext.evaluation import (
    EvaluationConfig,
    RewardFunctionJudge,
    evaluate_models,
    render_report,
    score_pairs,
    score_responses,
    write_report,
)
from trl_ext.evaluation.evaluate import load_causal_lm


REWARDS = """
def longer(prompts, completions):
    return [len(c if isinstance(c, str) else c[0]["content"]) for c in completions]
"""


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Three models that share a tokenizer, pairs in a file, and a reward function in another."""
    root = tmp_path_factory.mktemp("evaluate")
    tokenizer = tiny.tokenizer()
    for seed, name in enumerate(("reference", "first", "second")):
        tiny.model(seed=seed).save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
    tiny.write_jsonl(root / "pairs.jsonl", 24)
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
    import torch

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
    Markup in names, prompts, responses and verdicts is shown, not done. A judge of pairs without rewards, one undecided
    verdict, `chosen` as the opponent, messages as prompts: the page stands.
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
    import torch

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
    """A reward of the prompt's own answer, none for prompts without one; it can be told that it got the right row's."""
    return [
        None if right is None else float(len(completion) + 100 * int(prompt.split("number ")[1][:-1]) + right)
        for prompt, completion, right in zip(prompts, completions, solution, strict=True)
    ]


def test_reward_functions_take_columns_and_may_have_no_reward(folders):
    """
    Each response is scored with the columns of its prompt's first row. Those without a reward are left out of the means, and
    counted; the gain is over prompts of which both sides have one.
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
    assert "3 of its responses that were judged have no reward" in page
    (row,) = re.findall(r"Mean reward.*?</tr>", page, flags=re.DOTALL)
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
    assert cli.main([]) == 0 and "trl-ext evaluate" in capsys.readouterr().out
    assert cli.main(["train"]) == 2 and "unknown command 'train'" in capsys.readouterr().err


def test_metrics_need_no_model_library():
    """The functions on arrays load neither transformers nor TRL."""
    code = (
        "import sys; from trl_ext.evaluation import ranking_accuracy, win_rate, expected_calibration_error;"
        "win_rate([1, 0]); ranking_accuracy([1.0], [0.0]); expected_calibration_error([0.7], [1]);"
        "assert not {'transformers', 'trl', 'torch', 'matplotlib'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
