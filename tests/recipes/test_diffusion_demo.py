"""
The diffusion demonstration: its images, its ruler, its pairs and intervals, and the whole command on a small scale.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch


pytest.importorskip("sklearn", reason="needs the extra `demo`")

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "recipes"))

import diffusion_demo as demo  # noqa: E402
import digits_pipeline  # noqa: E402
from digits import NAMES, WORDINGS, Digits, Reader, caption, stroke_width  # noqa: E402


@pytest.fixture(scope="module")
def digits():
    return Digits()


def bar(width: int, ink: float = 0.0, paper: float = 1.0) -> np.ndarray:
    """A vertical stroke, so long that its ends hardly count."""
    image = np.full((256, 32), paper, dtype=np.float32)
    image[:, 10 : 10 + width] = ink
    return image


def test_stroke_width_of_known_strokes():
    """Straight strokes of 3, 6 and 10 pixels, and a diagonal one of 7 / sqrt(2)."""
    assert stroke_width(np.stack([bar(3), bar(6), bar(10)])) == pytest.approx([3, 6, 10], abs=0.3)
    y, x = np.mgrid[:128, :128]
    diagonal = np.where(abs(x - y) <= 3, 0.0, 1.0).astype(np.float32)
    assert stroke_width(diagonal[None])[0] == pytest.approx(7 / 2**0.5, rel=0.1)  # a diagonal is jagged


def test_stroke_width_is_not_darkness():
    """A paler pen on greyer paper draws a stroke of the same width, and a blank image has none."""
    dark, pale = stroke_width(np.stack([bar(5), bar(5, ink=0.4, paper=0.9)]))
    assert dark == pytest.approx(pale)
    blank = np.full((32, 32), 0.5, dtype=np.float32) + np.linspace(0, 0.1, 32, dtype=np.float32)
    assert stroke_width(blank[None]) == [0.0]


def test_pens_and_reader(digits):
    """Moving the outline by a pixel widens a stroke by two; the reader reads digits that it has not seen, drawn so."""
    some = digits.test[:60]
    thin, bold = digits.draw(some, -0.5), digits.draw(some, 0.5)
    assert thin.shape == (60, 32, 32) and thin.dtype == np.float32 and 0 <= thin.min() and thin.max() <= 1
    # Corners fill and small loops close, so not 2 exactly.
    assert (stroke_width(bold) - stroke_width(thin)).mean() == pytest.approx(2.0, rel=0.25)
    assert not set(digits.train) & set(digits.test)
    reader = Reader(digits)
    for pen in (-1.0, 0.0, 1.2):
        assert (reader.read(digits.draw(digits.test, pen)) == digits.labels[digits.test]).mean() > 0.95


def test_held_out_prompts_are_in_no_pair():
    training, held_out = demo.training_prompts(), demo.held_out_prompts()
    assert not set(training) & set(held_out)
    assert len(training) + len(held_out) == len(NAMES) * len(WORDINGS)
    assert not any(digit in demo.HELD_OUT_DIGITS or wording in demo.HELD_OUT_WORDINGS for digit, wording in training)


def test_pairs_are_bold_over_thin():
    """
    Eight images of each of two prompts, one of them unreadable: the widest quarter over the narrowest, each prompt by
    itself.
    """
    widths = np.array([5.0, 1.0, 7.0, 3.0, 2.0, 8.0, 9.0, 4.0] + [11.0, 12.0, 13.0, 14.0, 15.0, 16.0, 17.0, 18.0])
    readable = np.ones(16, dtype=bool)
    readable[6] = False  # the boldest of the first prompt
    images = np.repeat(widths / 20, 16).reshape(16, 4, 4).astype(np.float32)
    pairs, indices = demo.make_pairs(images, ["a"] * 8 + ["b"] * 8, widths, readable)
    assert indices.tolist() == [[2, 1], [5, 4], [14, 8], [15, 9]]
    assert pairs["prompt"] == ["a", "a", "b", "b"]
    for (chosen, rejected), row in zip(indices, pairs, strict=True):
        assert np.asarray(row["chosen"])[0, 0] == round(widths[chosen] / 20 * 255)
        assert np.asarray(row["rejected"])[0, 0] == round(widths[rejected] / 20 * 255)
    # Fewer where too few can be read: an image is never on both sides.
    assert demo.choose_pairs([1.0, 2.0, 3.0, 4.0], [True, True, True, False], 2) == [(2, 0)]
    assert demo.choose_pairs([1.0, 2.0], [True, False], 1) == []


def test_intervals():
    from scipy.stats import binomtest

    for successes, trials in ((0, 20), (7, 20), (20, 20), (231, 256)):
        expected = binomtest(successes, trials).proportion_ci(method="wilson")
        p, low, high = demo.wilson(successes, trials)
        assert p == successes / trials
        assert (low, high) == pytest.approx((expected.low, expected.high), abs=1e-6)


def test_comparison_is_paired():
    """
    Four images: wider, narrower, equal, wider but misread. Wins: 1 + 0 + 1/2 + 1 of 4; 1.5 of 4 if it must be read.
    """
    groups = {"first": np.array([True, True, False, False]), "last": np.array([False, False, True, True])}
    result = demo.compare(
        np.array([5.0, 3.0, 4.0, 9.0]), np.array([4.0] * 4), np.array([1, 2, 3, 9]), np.array([1, 2, 3, 4]), groups
    )
    assert result["win_rate"][0] == 2.5 / 4
    assert result["win_rate_and_read"][0] == 1.5 / 4
    assert {name: rate[0] for name, rate in result["win_rate_by_group"].items()} == {"first": 0.5, "last": 0.75}
    assert result["read"][0] == 0.75 and result["read_by_group"]["last"][0] == 0.5
    assert result["stroke_width"] == 5.25 and result["stroke_width_gain"] == 1.25


def test_tokenizer_tells_captions_apart(tmp_path):
    tokenizer = digits_pipeline.make_tokenizer()
    captions = [caption(digit, wording) for digit in range(len(NAMES)) for wording in range(len(WORDINGS))] + [""]
    ids = tokenizer(captions, padding="max_length", truncation=True).input_ids
    assert len({tuple(row) for row in ids}) == len(captions)
    # Neither cut off nor spelled with the unknown token, which is the end token, before the end.
    for row in ids:
        ends = [i for i, token in enumerate(row) if token == tokenizer.eos_token_id]
        assert ends == list(range(ends[0], digits_pipeline.MAX_TOKENS))
    tokenizer.save_pretrained(tmp_path)
    assert type(tokenizer).from_pretrained(tmp_path)(captions).input_ids == tokenizer(captions).input_ids


def test_standardized_latents():
    """Latents of mean 0 and deviation 1 a channel, their variances scaled alike, and the same reconstructions."""
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    vae = AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, layers_per_block=1).eval()
    images = torch.randn(8, 3, 16, 16)
    with torch.no_grad():
        before = vae.encode(images).latent_dist
        reconstruction = vae.decode(before.mean).sample
        digits_pipeline.standardize(vae, before.mean)
        after = vae.encode(images).latent_dist
        torch.testing.assert_close(after.mean.mean((0, 2, 3)), torch.zeros(4), atol=1e-5, rtol=0)
        torch.testing.assert_close(after.mean.std((0, 2, 3)), torch.ones(4), atol=1e-5, rtol=0)
        torch.testing.assert_close(after.std * before.mean.std((0, 2, 3))[:, None, None], before.std)
        torch.testing.assert_close(vae.decode(after.mean).sample, reconstruction, atol=1e-5, rtol=1e-4)


def test_pipeline_folder_is_whole_or_absent(tmp_path, digits, monkeypatch):
    """
    An interrupted training leaves nothing behind, a folder that is there is not trained again, and what it was trained
    with is in its name.
    """
    trained = []

    class Pipeline:
        def save_pretrained(self, folder, **kwargs):
            folder.mkdir()
            (folder / "model_index.json").write_text("{}")

    def train(digits, config):
        trained.append(config.seed)
        if config.seed == 1:
            raise KeyboardInterrupt
        return Pipeline()

    monkeypatch.setattr(digits_pipeline, "train_pipeline", train)

    def make(**changes):
        config = digits_pipeline.PretrainingConfig(**changes)
        folder = digits_pipeline.pipeline_folder(tmp_path / "cache", config)
        digits_pipeline.make_pipeline(folder, digits, config)
        return folder

    first = make(seed=0)
    with pytest.raises(KeyboardInterrupt):
        make(seed=1)
    assert make(seed=0) == first
    other = make(seed=0, unet_steps=7)
    assert trained == [0, 1, 0]
    assert sorted((tmp_path / "cache").iterdir()) == sorted([first, other])


@pytest.mark.timeout(300)
def test_trial_of_the_whole_command(tmp_path):
    """Every part once: what is written is whole, and the terminal shows this run and nothing of the libraries' own."""
    env = {**os.environ, demo.INSIDE: "1", "TRL_EXT_CACHE": str(tmp_path / "cache")}
    env["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    command = [sys.executable, str(ROOT / "recipes" / "diffusion_demo.py"), "--trial", "--output_dir", str(tmp_path)]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    lines = done.stdout.splitlines()
    assert len(lines) < 45 and max(map(len, lines[:-1])) < 120

    report = json.loads((tmp_path / "report.json").read_text())
    assert list(report["results"]) == [demo.REFERENCE, *demo.RUNS]
    assert report["setup"]["pairs"] == len(demo.training_prompts())
    reference = report["results"][demo.REFERENCE]
    assert reference["stroke_width_gain"] == 0 and reference["win_rate"][0] == 0.5
    for name in demo.RUNS:
        result = report["results"][name]
        assert name in done.stdout
        assert [point["step"] for point in result["curve"]] == [0, 1, 2]
        assert [entry["step"] for entry in result["eval"]] == [0, 1, 2]
        # A policy that is still its reference, in the evaluation and in the images.
        assert result["eval"][0]["gaps/chosen"] == 0 and result["curve"][0]["stroke_width_gain"] == 0
        assert all(np.isfinite(value) for value in result["win_rate"])
    swapped = report["results"]["Diffusion-DPO, pairs swapped"]["eval"][-1]["rewards/margins"]
    assert swapped != report["results"]["Diffusion-DPO"]["eval"][-1]["rewards/margins"]
    for name in ("grid.png", "curves.png"):
        data = (tmp_path / name).read_bytes()
        assert data.startswith(b"\x89PNG") and len(data) < 150_000
