"""Aspect buckets: sizes, the order of the pairs, batches of one size, and training with them."""

import json
import sys
from pathlib import Path

import diffusion_harness as harness
import numpy as np
import pytest
import tiny_pipelines
import torch
from datasets import Dataset
from diffusion_harness import dataset, trained, trainer
from launching import fork
from safetensors.torch import load_file

from trl_ext import DiffusionDPOConfig
from trl_ext.diffusion.buckets import BucketSampler, bucket_sizes
from trl_ext.diffusion.data import ImagePreferenceDataset, PairCollator, Repeated


TESTS = Path(__file__).resolve().parents[1]
# Heights and widths of the pictures; under a UNet's multiple of 2 they are brought to 16 x 16, 12 x 20 and 20 x 12.
SHAPES = ((16, 16), (16, 28), (30, 16))
EXPECTED = ((16, 16), (12, 20), (20, 12))


def images(count: int = 9, **options) -> ImagePreferenceDataset:
    return ImagePreferenceDataset(dataset(count, sizes=SHAPES), 16, buckets=bucket_sizes(16, 2, 2.0), **options)


# ---- Sizes ----------------------------------------------------------------------------------------------------------


def test_sizes_of_sdxl():
    """
    At 1024 pixels the step is 64: 1152 leaves 1024 * 1024 / 1152 = 910.2, so a width of 896, at a ratio of 1.29; the
    last is 1408 x 704, at exactly 2.
    """
    sizes = bucket_sizes(1024, 8, 2.0)
    half = [(704, 1408), (768, 1344), (768, 1280), (832, 1216), (896, 1152), (960, 1088)]
    assert sizes == sorted({(1024, 1024), *half, *((w, h) for h, w in half)}, key=lambda s: (s[1] / s[0], s))
    assert bucket_sizes(1024, 8, 1.0) == [(1024, 1024)]


@pytest.mark.parametrize("side, multiple", [(16, 2), (16, 4), (512, 8), (768, 16), (1000, 8), (1024, 16)])
@pytest.mark.parametrize("ratio", [1.0, 1.5, 3.0])
def test_no_size_has_more_pixels_than_the_square(side, multiple, ratio):
    sizes = bucket_sizes(side, multiple, ratio)
    assert (side, side) in sizes and len(set(sizes)) == len(sizes)
    for height, width in sizes:
        assert height * width <= side * side and not height % multiple and not width % multiple
        assert max(height, width) <= ratio * min(height, width) and (width, height) in sizes


# ---- The order ------------------------------------------------------------------------------------------------------


def test_groups_have_one_bucket():
    """Every pair is drawn; what fills a group is of its bucket; the epoch and the seed decide the order."""
    buckets = np.array([0, 1, 1, 0, 2, 1, 1, 1, 0, 1])
    epoch = [0]
    sampler = BucketSampler(buckets, 4, epoch=lambda: epoch[0], seed=3)
    order = list(sampler)
    assert len(order) == len(sampler) == 16 and sampler.repeated == 6 and set(order) == set(range(10))
    groups = np.array(order).reshape(-1, 4)
    assert all(len(set(buckets[group])) == 1 for group in groups)
    assert [order.count(row) for row in range(10) if buckets[row] == 1] == pytest.approx([8 / 6] * 6, abs=0.7)
    assert list(sampler) == order
    assert list(BucketSampler(buckets, 4, epoch=lambda: 0, seed=4)) != order
    epoch[0] = 1
    assert list(sampler) != order


def test_leftover_pairs():
    """Left out with `drop_last`; in the data's order without an epoch; marked in an evaluation."""
    buckets = np.array([1, 0, 1, 0, 1])
    assert list(BucketSampler(buckets, 2)) == [0, 2, 1, 3, 4, 0]
    assert list(BucketSampler(buckets, 2, drop_last=True)) == [0, 2, 1, 3]
    marked = list(BucketSampler(buckets, 2, mark_repeated=True))
    assert marked == [0, 2, 1, 3, 4, 0] and [isinstance(row, Repeated) for row in marked] == [False] * 5 + [True]


# ---- The data -------------------------------------------------------------------------------------------------------


def test_pairs_get_the_nearest_size():
    """By the geometric mean of both images' shapes, so whichever is preferred; SDXL is told the size of the bucket."""
    data = images()
    for i in range(len(data)):
        expected = EXPECTED[i % 3]
        item = data[i]
        assert item["pixel_values"].shape == (2, 3, *expected) and item["target_size"] == expected
    assert data.describe_buckets() == "12 x 20 (3), 16 x 16 (3), 20 x 12 (3)"
    row = {"prompt": "a", "chosen": harness.picture(0, True, (16, 18)), "rejected": harness.picture(1, True, (16, 16))}
    swapped = {**row, "chosen": row["rejected"], "rejected": row["chosen"]}
    two = ImagePreferenceDataset(Dataset.from_list([row, swapped]), 16, buckets=bucket_sizes(16, 2, 2.0))
    assert two.size_of(0) == two.size_of(1)
    collated = PairCollator()([data[1], data[4]])
    # Resized to 12 x 21 and cropped by a column, of which rounding leaves none at the left.
    assert collated["size_conditioning"].tolist() == [[16, 28, 0, 0, 12, 20]] * 2
    with pytest.raises(ValueError, match=r"several sizes, \[\(12, 20\), \(16, 16\)\]"):
        PairCollator((16, 16))([data[0], data[1]])


def test_every_header_is_read():
    """A pair needs a bucket, so that a broken image anywhere is found, named, or left out."""
    rows = dataset(4, sizes=SHAPES).to_list()
    rows[2]["rejected"]["bytes"] = b"broken"
    broken = Dataset.from_list(rows)
    with pytest.raises(ValueError, match="Row 2 of the train dataset, column `rejected`"):
        ImagePreferenceDataset(broken, 16, buckets=[(16, 16), (12, 20), (20, 12)])
    kept = ImagePreferenceDataset(broken, 16, buckets=[(16, 16), (12, 20), (20, 12)], skip_broken_images=True)
    assert [kept.size_of(i) for i in range(len(kept))] == [(16, 16), (12, 20), (16, 16)]
    assert [tuple(kept[i]["pixel_values"].shape[-2:]) for i in range(3)] == [(16, 16), (12, 20), (16, 16)]


# ---- Training -------------------------------------------------------------------------------------------------------


BUCKETS = dict(aspect_buckets=True, logging_steps=1, random_flip=True)


def comparable(run, skip=()) -> list[dict]:
    skip = ("runtime", "per_second", "total_flos", *skip)
    return [{k: v for k, v in entry.items() if not any(s in k for s in skip)} for entry in run.state.log_history]


def sizes_of_batches(run) -> list[tuple[int, ...]]:
    """Height and width of the latents in every micro-batch that the policy is given."""
    seen, predict = [], run.family.predict
    run.family.predict = lambda denoiser, noisy, *args: (
        seen.append(tuple(noisy.shape[-2:])),
        predict(denoiser, noisy, *args),
    )[1]
    run.train()
    return seen[2::2]  # without the check of the start


@pytest.mark.parametrize("name", tiny_pipelines.FAMILIES)
def test_every_family_trains_on_every_shape(name, tmp_path):
    """An epoch over three shapes, from the reference; the first loss is log 2."""
    run = trainer(
        name, tmp_path, train_dataset=dataset(6, sizes=SHAPES), aspect_buckets=True, logging_steps=1, max_steps=3
    )
    assert {tuple(int(side) for side in size) for size in sizes_of_batches(run)} == {
        tuple(side // run.family.vae_scale_factor for side in run.train_dataset.size_of(i)) for i in range(6)
    }
    logs = comparable(run)
    assert logs[0]["loss"] == pytest.approx(np.log(2), abs=1e-4)


def test_size_conditioning_of_sdxl(tmp_path):
    """`time_ids` are original size, crop and bucket, as the pipeline makes them for an image of that size."""
    run = trainer("sdxl", tmp_path, train_dataset=dataset(6, sizes=SHAPES), aspect_buckets=True)
    item = run.data_collator([run.train_dataset[1], run.train_dataset[4]])
    _, conditioning = run._encode(item)
    pipeline = run.family.pipeline
    expected = pipeline._get_add_time_ids((16, 28), (0, 0), (12, 20), torch.float32, text_encoder_projection_dim=24)
    assert torch.equal(conditioning["time_ids"], expected.expand(2, -1))


@pytest.mark.parametrize("size", [1, 2])
def test_split_of_a_step(size, tmp_path):
    """A step of four pairs has one bucket, and is the same as a batch and as micro-batches."""
    runs = []
    for each in (4, size):
        # `beta` multiplies the rounding of float32.
        options = dict(
            beta=100.0, per_device_train_batch_size=each, gradient_accumulation_steps=4 // each, optim="sgd"
        )
        run = trainer("sd", tmp_path / str(each), train_dataset=dataset(9, sizes=SHAPES), **BUCKETS, **options)
        runs.append((sizes_of_batches(run), run))
    (whole, first), (split, second) = runs
    assert [set(split[i : i + 4 // size]) for i in range(0, len(split), 4 // size)] == [{shape} for shape in whole]
    assert len(set(whole)) > 1
    for a, b in zip(comparable(first), comparable(second), strict=True):
        for key in (key for key in a if "accuracies" not in key):
            assert b[key] == pytest.approx(a[key], rel=2e-3, abs=2e-4), key


def test_smaller_groups(tmp_path):
    """Groups of a batch: a step mixes buckets, and its batches do not."""
    options = dict(per_device_train_batch_size=2, gradient_accumulation_steps=2, bucket_group_size=2, max_steps=2)
    run = trainer("sd", tmp_path, train_dataset=dataset(8, sizes=SHAPES), **BUCKETS, **options)
    seen = sizes_of_batches(run)
    assert len(seen) == 4 and any(seen[i] != seen[i + 1] for i in (0, 2))
    for size in (3, 8):
        run.args.bucket_group_size = size
        with pytest.raises(ValueError, match=f"`bucket_group_size={size}` must be a multiple .* device \\(2\\)"):
            run.get_train_dataloader()


def test_options_of_the_loader(tmp_path, caplog):
    """`dataloader_drop_last` and the sequential order are honored; many repetitions are worth a warning."""
    data = dataset(7, sizes=SHAPES)  # three squares, and two pairs of each other shape
    run = trainer("sd", tmp_path, train_dataset=data, per_device_train_batch_size=2, **BUCKETS)
    assert len(run.get_train_dataloader()) == 4 and "repetitions" in caplog.text
    run.args.dataloader_drop_last, run.args.train_sampling_strategy = True, "sequential"
    order = [step["index"].tolist() for step in run.get_train_dataloader()]
    assert order == [[0, 3], [1, 4], [2, 5]]
    run.args.per_device_train_batch_size = run._train_batch_size = 8
    with pytest.raises(ValueError, match="No bucket has the 8 pairs.*16 x 16 \\(3\\)"):
        run.get_train_dataloader()


def test_cache_of_buckets(tmp_path):
    """
    Latents of every bucket are cached: the run is that without a cache, a second one encodes nothing, and a run
    without buckets shares what is of its size.
    """
    runs = []
    for cached in (False, True, True):
        options = dict(cache_latents=True, cache_dir=str(tmp_path / "cache")) if cached else {}
        run = trainer(
            "sdxl", tmp_path / str(len(runs)), train_dataset=dataset(6, sizes=SHAPES), beta=100.0, **BUCKETS, **options
        )
        if len(runs) == 2:
            run.family.pipeline.vae = None
        run.train()
        runs.append(run)
    fresh, first, second = runs
    assert comparable(second) == comparable(first)
    for a, b in zip(comparable(fresh), comparable(first), strict=True):
        # Encoded in batches of other sizes: equal but for rounding.
        assert all(b[key] == pytest.approx(a[key], rel=2e-3, abs=1e-4) for key in a if "accuracies" not in key)
    files = sum(1 for _ in (tmp_path / "cache").glob("*.safetensors"))
    squares = dataset(6, sizes=SHAPES).select([0, 3])
    plain = trainer(
        "sdxl", tmp_path / "plain", train_dataset=squares, cache_latents=True, cache_dir=str(tmp_path / "cache")
    )
    new = list((tmp_path / "cache").glob("*.safetensors"))
    names = {name for path in new for name in load_file(path) if name.endswith("/latents")}
    # Six images of three shapes, in two orientations; of the squares nothing was encoded again.
    assert len(names) == 24 and len(new) == files + 1
    assert torch.equal(
        plain.train_dataset[0]["latents"][0],
        first.train_dataset.store.get(first.train_dataset._keys[0, 0, 0].tobytes())["latents"],
    )


def test_evaluation_does_not_depend_on_the_batch(tmp_path):
    """Each pair counts once, whatever fills the batches: the loss too, as an evaluation of each pair alone shows."""
    found = []
    for size in (1, 2, 3):
        run = trainer(
            "sd",
            tmp_path / str(size),
            eval_dataset=dataset(7, start=20, sizes=SHAPES),
            per_device_eval_batch_size=size,
            max_steps=2,
            learning_rate=1e-2,
            **BUCKETS,
        )
        run.train()
        found.append(run.evaluate())
    names = [name for name in found[0] if "/" in name or name == "eval_loss"]
    assert len(names) > 10
    assert found[0]["eval_loss"] != pytest.approx(np.log(2), abs=1e-3)
    for other in found[1:]:
        for name in names:
            assert other[name] == pytest.approx(found[0][name], rel=2e-3, abs=1e-4), name
    alone = [
        run.evaluate(dataset(7, start=20, sizes=SHAPES).select([i]), metric_key_prefix="one")["one_errors/chosen"]
        for i in range(7)
    ]
    # Drawn by the pair's number, which is 0 for each alone: the first is the same.
    assert len(alone) == 7 and run.predict(dataset(7, start=20, sizes=SHAPES)).metrics["test_loss"] == pytest.approx(
        found[0]["eval_loss"], rel=2e-3
    )


def test_resume(tmp_path):
    """Interrupted within an epoch and resumed, also into the next one, the run is the same to the bit."""
    options = dict(
        train_dataset=dataset(8, sizes=SHAPES), max_steps=7, gradient_accumulation_steps=2, **BUCKETS
    )  # three steps an epoch
    whole = trainer("sd", tmp_path / "whole", save_strategy="steps", save_steps=4, **options)
    whole.train()
    resumed = trainer("sd", tmp_path, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-4"))
    assert comparable(resumed) == comparable(whole)
    assert all(torch.equal(value, trained(whole)[name]) for name, value in trained(resumed).items())


def test_two_processes(tmp_path):
    """Two processes on one global batch of one bucket are one process on it, also in the evaluation."""
    script, sizes = TESTS / "scripts" / "run_diffusion.py", json.dumps(SHAPES)
    options = dict(max_steps=3, optim="sgd", beta=100.0, **BUCKETS)
    fork(script, str(tmp_path / "two"), json.dumps(options), sizes)
    sys.path.insert(0, str(TESTS / "scripts"))
    import run_diffusion

    run_diffusion.main(str(tmp_path / "one"), json.dumps({**options, "per_device_train_batch_size": 4}), sizes)
    one, two = (json.loads((tmp_path / name / "result.json").read_text()) for name in ("one", "two"))
    assert (one["processes"], two["processes"]) == (1, 2) and two["equal_on_all"]
    a, b = (load_file(tmp_path / name / "pytorch_lora_weights.safetensors") for name in ("one", "two"))
    for key in a:
        torch.testing.assert_close(b[key], a[key], rtol=1e-3, atol=1e-6)
    for first, second in zip(one["logs"], two["logs"], strict=True):
        assert first.keys() == second.keys()
        for key in first:
            if key != "train_loss" and "accuracies" not in key:  # the sign of a rounding error
                assert second[key] == pytest.approx(first[key], rel=2e-3, abs=2e-4), key


def test_refused():
    """What buckets cannot be made of, and options without them."""
    with pytest.raises(ValueError, match=r"`resolution=\[16, 24\]` with `aspect_buckets=True` must be one number"):
        DiffusionDPOConfig("x", use_cpu=True, bf16=False, aspect_buckets=True, resolution=[16, 24])
    for option in ({"max_aspect_ratio": 3.0}, {"bucket_group_size": 4}):
        with pytest.raises(ValueError, match=f"`{next(iter(option))}.*`aspect_buckets"):
            DiffusionDPOConfig("x", use_cpu=True, bf16=False, **option)
    with pytest.raises(ValueError, match="max_aspect_ratio"):
        DiffusionDPOConfig("x", use_cpu=True, bf16=False, aspect_buckets=True, max_aspect_ratio=0.5)
