"""Image preference data: what is read, what a pair's two images share, and what is refused with which words."""

import io
import logging
import pickle

import numpy as np
import pytest
import torch
from datasets import Dataset, DatasetDict, Features, Image, Value
from PIL import Image as PIL, ImageOps

from trl_ext.diffusion.data import (
    EpochCallback,
    ImagePreferenceDataset,
    PairCollator,
    check_resolution,
    image_hash,
    normalize,
    open_image,
    place_crop,
    to_rgb,
    transform,
    upright_size,
)


def noise(seed: int, size: tuple[int, int] = (24, 24), mode: str = "RGB") -> PIL.Image:
    """An image of random pixels; `size` is height and width."""
    generator = np.random.default_rng(seed)
    return PIL.fromarray(generator.integers(0, 256, (*size, 3), dtype=np.uint8)).convert(mode)


def encoded(image: PIL.Image, format: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def pairs(count: int = 4, size: tuple[int, int] = (24, 24)) -> Dataset:
    return Dataset.from_list(
        [
            {
                "prompt": f"prompt {i}",
                "chosen": encoded(noise(2 * i, size)),
                "rejected": encoded(noise(2 * i + 1, size)),
            }
            for i in range(count)
        ]
    )


def array(image: PIL.Image) -> np.ndarray:
    return np.asarray(image)


# ---- Sources -------------------------------------------------------------------------------------------------------


def test_images_may_be_pil_images_paths_bytes_or_datasets_images(tmp_path):
    chosen, rejected = noise(0), noise(1)
    chosen.save(tmp_path / "chosen.png")
    rejected.save(tmp_path / "rejected.png")
    paths = {"chosen": str(tmp_path / "chosen.png"), "rejected": str(tmp_path / "rejected.png")}
    image_features = Features(prompt=Value("string"), chosen=Image(), rejected=Image())
    forms = {
        "pil": Dataset.from_list([{"prompt": "p", "chosen": chosen, "rejected": rejected}]),
        "paths": Dataset.from_list([{"prompt": "p", **paths}]),
        "bytes": Dataset.from_list([{"prompt": "p", "chosen": encoded(chosen), "rejected": encoded(rejected)}]),
        "image feature of paths": Dataset.from_list([{"prompt": "p", **paths}], features=image_features),
        "image feature of bytes": Dataset.from_list(
            [{"prompt": "p", "chosen": {"bytes": encoded(chosen)}, "rejected": {"bytes": encoded(rejected)}}],
            features=image_features,
        ),
    }
    expected = np.stack([array(chosen), array(rejected)])
    for form, dataset in forms.items():
        item = ImagePreferenceDataset(dataset, 24)[0]
        assert item["prompt"] == "p"
        assert torch.equal(item["pixel_values"], normalize(expected)), form
    with open_image(tmp_path / "chosen.png") as image:  # a `Path`, and the image itself
        assert np.array_equal(array(open_image(image)), array(chosen))


def test_pixels_are_in_minus_one_to_one():
    pixels = normalize(np.array([0, 51, 255], dtype=np.uint8).reshape(1, 1, 3))
    assert pixels.shape == (3, 1, 1)
    assert pixels.flatten().tolist() == [-1.0, pytest.approx(-0.6), 1.0]


def test_exif_orientation_is_applied_and_known_without_decoding():
    upright = noise(0, (8, 16))
    exif = PIL.Exif()
    exif[0x0112] = 6  # to be turned clockwise by 90 degrees
    stored = encoded(upright.transpose(PIL.Transpose.ROTATE_90), exif=exif)
    image = open_image(stored)
    assert image.size == (8, 16) and upright_size(image) == (8, 16)  # width, height; then height, width
    assert np.array_equal(array(to_rgb(image)), array(upright))


def test_transparency_lies_over_white_not_over_what_it_hides():
    hidden = PIL.new("RGBA", (4, 4), (255, 0, 0, 0))
    assert (array(to_rgb(hidden)) == 255).all()
    half = PIL.new("RGBA", (1, 1), (0, 0, 0, 128))
    assert array(to_rgb(half)).flatten().tolist() == [127] * 3
    palette = PIL.new("P", (2, 2), 0)
    palette.putpalette([255, 0, 0] * 256)
    palette.info["transparency"] = 0
    assert (array(to_rgb(palette)) == 255).all()
    assert np.array_equal(array(to_rgb(open_image(encoded(hidden)))), array(to_rgb(hidden)))


def test_greyscale_and_sixteen_bits_become_rgb():
    assert array(to_rgb(PIL.new("L", (1, 1), 7))).flatten().tolist() == [7] * 3
    deep = PIL.fromarray(np.full((2, 2), 0x8040, dtype=np.uint16))
    assert (array(to_rgb(open_image(encoded(deep)))) == 0x80).all()
    with pytest.raises(ValueError, match="mode 'F'.*convert it to 8 bits"):
        to_rgb(PIL.new("F", (2, 2)))


# ---- Pick-a-Pic ----------------------------------------------------------------------------------------------------


def pickapic(labels) -> Dataset:
    rows = [
        {"caption": f"c{i}", "jpg_0": gray(i), "jpg_1": gray(100 + i), "label_0": label}
        for i, label in enumerate(labels)
    ]
    return Dataset.from_list(rows)


def gray(value: int) -> bytes:
    return encoded(PIL.new("L", (8, 8), value))


def test_pickapic_labels_choose_the_side_and_ties_are_dropped_and_counted(caplog):
    with caplog.at_level(logging.WARNING):
        images = ImagePreferenceDataset(pickapic([1.0, 0.5, 0.0, None, 0.5]), 8)
    assert "Left out 2 ties and 1 without a label of the 5 rows" in caplog.text and "2 pairs remain" in caplog.text
    assert images.rows.tolist() == [0, 2] and images.prompts() == ["c0", "c2"]
    values = [((images[i]["pixel_values"] + 1) * 127.5).round()[:, 0, 0, 0].int().tolist() for i in range(2)]
    assert values == [[0, 100], [102, 2]]  # chosen first: jpg_0 of row 0, jpg_1 of row 2


def test_an_unknown_label_is_named():
    with pytest.raises(ValueError, match=r"Row 1 of the train dataset has `label_0=0.7`; known are 1"):
        ImagePreferenceDataset(pickapic([1.0, 0.7]), 8)


def test_nothing_but_ties_is_refused():
    with pytest.raises(ValueError, match="no pairs: every row is a tie"):
        ImagePreferenceDataset(pickapic([0.5, 0.5]), 8)
    with pytest.raises(ValueError, match="The eval dataset has no rows"):
        ImagePreferenceDataset(pairs(2).select([]), 8, name="eval")


# ---- What a pair shares --------------------------------------------------------------------------------------------


def test_crop_covers_without_distortion():
    image = noise(0, (20, 40))
    # 8 x 8 of 20 x 40: resized to 8 x 16, cut in the middle.
    expected = array(image.resize((16, 8), PIL.Resampling.BILINEAR))[:, 4:12]
    assert np.array_equal(transform(image, (8, 8)), expected)
    assert place_crop((20, 40), (8, 8))[1].crop_top_left == (0, 4)
    assert np.array_equal(transform(image, (8, 8), flip=True), expected[:, ::-1])


def test_crop_coordinates_are_those_of_the_mirrored_image():
    image = noise(0, (8, 20))
    cut = transform(image, (8, 8), crop=(0.0, 0.25), flip=True)
    top, left = place_crop((8, 20), (8, 8), (0.0, 0.25), True)[1].crop_top_left
    assert (top, left) == (0, 9)  # 3 from the left of 20, seen in the mirror: 20 - 8 - 3
    assert np.array_equal(cut, array(ImageOps.mirror(image))[top : top + 8, left : left + 8])


def test_both_images_share_crop_and_flip():
    same = encoded(noise(0, (16, 32)))
    rows = [{"prompt": "p", "chosen": same, "rejected": same}] * 32
    images = ImagePreferenceDataset(Dataset.from_list(rows), 8, random_crop=True, random_flip=True)
    items = [images[i] for i in range(32)]
    assert all(torch.equal(*item["pixel_values"]) for item in items)
    assert len({item["crop_top_left"] for item in items}) > 4  # and they do differ from pair to pair
    assert 4 < sum(images.draw(i).flip for i in range(32)) < 28


def test_a_pair_of_other_sizes_is_brought_to_one_and_has_one_size_conditioning():
    rows = [{"prompt": "p", "chosen": encoded(noise(0, (32, 32))), "rejected": encoded(noise(1, (60, 64)))}]
    item = ImagePreferenceDataset(Dataset.from_list(rows), 16)[0]
    assert item["pixel_values"].shape == (2, 3, 16, 16)
    assert item["original_size"] == (32, 32) and item["crop_top_left"] == (0, 0)


def test_what_is_drawn_depends_on_seed_epoch_and_index_alone():
    options = dict(random_crop=True, random_flip=True, prompt_dropout=0.5)
    images = ImagePreferenceDataset(pairs(8), 16, **options)
    torch.manual_seed(0)
    first = [images.draw(i) for i in range(8)]
    before = torch.get_rng_state()
    _ = images[3]
    assert torch.equal(before, torch.get_rng_state())  # training's random state is not touched
    assert [images.draw(i) for i in reversed(range(8))] == first[::-1]
    images.set_epoch(1)
    assert [images.draw(i) for i in range(8)] != first
    copy = pickle.loads(pickle.dumps(images))
    assert [copy.draw(i) for i in range(8)] == [images.draw(i) for i in range(8)]
    images.set_epoch(0)
    assert [images.draw(i) for i in range(8)] == first
    assert [ImagePreferenceDataset(pairs(8), 16, seed=1, **options).draw(i) for i in range(8)] != first
    # One option does not change what another one draws.
    fewer = ImagePreferenceDataset(pairs(8), 16, random_flip=True)
    assert [fewer.draw(i).flip for i in range(8)] == [draw.flip for draw in first]


def test_epochs_reach_workers_that_outlive_them():
    images = ImagePreferenceDataset(pairs(4), 16, random_flip=True)
    loader = torch.utils.data.DataLoader(
        images, num_workers=1, persistent_workers=True, collate_fn=PairCollator((16, 16))
    )

    class State:
        epoch = None

    seen = []
    for epoch in (0.0, 1.0, 2.0):
        State.epoch = epoch
        EpochCallback().on_epoch_begin(None, State, None, train_dataloader=loader)
        expected = PairCollator((16, 16))([images[i] for i in range(4)])["pixel_values"]
        batches = [batch["pixel_values"] for batch in loader]
        chosen, rejected = (torch.cat([batch[side : side + 1] for batch in batches]) for side in (0, 1))
        assert torch.equal(torch.cat([chosen, rejected]), expected)
        seen.append(expected)
    assert not torch.equal(seen[0], seen[1]) or not torch.equal(seen[1], seen[2])


def test_prompts_are_dropped_at_the_asked_rate_for_both_sides():
    images = ImagePreferenceDataset(pairs(4), 8, prompt_dropout=0.2)
    share = np.mean([images.draw(i).drop_prompt for i in range(4000)])
    assert abs(share - 0.2) < 0.03
    everything = ImagePreferenceDataset(pairs(4), 8, prompt_dropout=1.0)
    assert [everything[i]["prompt"] for i in range(4)] == [""] * 4
    assert [ImagePreferenceDataset(pairs(4), 8)[i]["prompt"] for i in range(4)] == [f"prompt {i}" for i in range(4)]
    with pytest.raises(ValueError, match="`prompt_dropout` is a share of the pairs, between 0 and 1; got 20"):
        ImagePreferenceDataset(pairs(4), 8, prompt_dropout=20)


def test_collator_puts_all_chosen_first():
    images = ImagePreferenceDataset(pairs(3, (16, 32)), 16)
    items = [images[i] for i in (2, 0)]
    batch = PairCollator((16, 16))(items)
    assert batch["index"].tolist() == [2, 0] and batch["prompt"] == ["prompt 2", "prompt 0"]
    chosen, rejected = batch["pixel_values"].chunk(2)
    assert torch.equal(chosen[1], items[1]["pixel_values"][0]) and torch.equal(
        rejected[0], items[0]["pixel_values"][1]
    )
    assert batch["size_conditioning"].tolist() == [[16, 32, 0, 8, 16, 16]] * 2


# ---- Bad input -----------------------------------------------------------------------------------------------------


def test_missing_columns_are_named():
    with pytest.raises(
        ValueError, match=r"no column `prompt` and no column `rejected`; it has \['chosen', 'text'\].*label_0"
    ):
        ImagePreferenceDataset(pairs(2).rename_column("prompt", "text").remove_columns("rejected"), 8)


def test_only_a_map_style_dataset_is_taken():
    with pytest.raises(TypeError, match="got a `DatasetDict`. Give one of its splits"):
        ImagePreferenceDataset(DatasetDict(train=pairs(2)), 8)
    with pytest.raises(TypeError, match="got a `IterableDataset`.*streaming=False"):
        ImagePreferenceDataset(pairs(2).to_iterable_dataset(), 8)
    with pytest.raises(TypeError, match=r"got a `list`.*Dataset.from_list"):
        ImagePreferenceDataset([], 8)


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        (b"not an image", "not an image file that Pillow can read"),
        (None, "there is no image"),
        (b"", "there is no image"),
    ],
)
def test_an_image_that_cannot_be_read_is_named_with_row_column_and_reason(source, reason):
    rows = [*pairs(3), {"prompt": "p", "chosen": encoded(noise(0)), "rejected": source}]
    with pytest.raises(ValueError, match=rf"Row 3 of the eval dataset, column `rejected`: {reason}.\n1 of 4 pairs"):
        ImagePreferenceDataset(Dataset.from_list(rows), 8, name="eval")


def test_a_missing_file_and_an_address_are_named(tmp_path):
    rows = [
        {"prompt": "p", "chosen": str(tmp_path / "gone.png"), "rejected": "https://example.org/a.png"},
        {"prompt": "p", "chosen": "http://example.org/a.png", "rejected": "x"},
    ]
    with pytest.raises(ValueError, match=r"(?s)Row 0 .*column `chosen`: .*gone.png.*Row 1 .*is an address; download"):
        ImagePreferenceDataset(Dataset.from_list(rows), 8)


def test_a_truncated_file_is_named_when_its_pixels_are_read():
    whole = encoded(noise(0, (64, 64)), "JPEG")
    rows = [*pairs(1), {"prompt": "p", "chosen": whole[: len(whole) // 2], "rejected": whole}]
    images = ImagePreferenceDataset(Dataset.from_list(rows), 8)  # its header is sound
    with pytest.raises(ValueError, match=r"Row 1 of the train dataset, column `chosen`: .*truncated.*dataset.select"):
        images[1]


def test_the_row_is_that_of_the_users_dataset_and_the_column_its_own():
    rows = list(pickapic([0.5, 0.0]))
    rows[1]["jpg_0"] = b"broken"
    with pytest.raises(ValueError, match=r"Row 1 of the train dataset, column `jpg_0`"):
        ImagePreferenceDataset(Dataset.from_list(rows), 8)


def test_a_pair_of_too_different_shapes_is_refused():
    def pair(height, width):
        return Dataset.from_list(
            [{"prompt": "p", "chosen": encoded(noise(0, (100, 100))), "rejected": encoded(noise(1, (height, width)))}]
        )

    ImagePreferenceDataset(pair(100, 125), 8)
    with pytest.raises(
        ValueError, match=r"`chosen` 100 x 100 and `rejected` 126 x 100, width x height.*here it is 1.26"
    ):
        ImagePreferenceDataset(pair(100, 126), 8)


def test_a_prompt_that_is_no_text_is_refused():
    rows = [
        {"prompt": [{"role": "user", "content": "a cat"}], "chosen": encoded(noise(0)), "rejected": encoded(noise(1))}
    ]
    with pytest.raises(ValueError, match="Row 0 of the train dataset, column `prompt`: the prompt must be a text"):
        ImagePreferenceDataset(Dataset.from_list(rows), 8)


def test_resolution_must_be_divisible():
    assert check_resolution(64, 8) == (64, 64) and check_resolution((64, 32), 16) == (64, 32)
    with pytest.raises(ValueError, match=r"`resolution=100` is not divisible by 8.*Use 96 or 104"):
        ImagePreferenceDataset(pairs(1), 100, multiple=8)
    with pytest.raises(ValueError, match=r"Use 96 or 104 x 64\."):
        check_resolution((100, 64), 8)
    for bad in (0, -8, (8,), (8, True), "64"):
        with pytest.raises(ValueError, match="positive number of pixels"):
            check_resolution(bad, 8)


def test_content_hashes_tell_images_apart_and_same_ones_not(tmp_path):
    png, other = encoded(noise(0)), encoded(noise(1))
    (tmp_path / "a.png").write_bytes(png)
    assert image_hash(png) == image_hash(str(tmp_path / "a.png")) == image_hash({"bytes": png, "path": None})
    assert image_hash(png) != image_hash(other)
    assert image_hash(noise(0)) == image_hash(noise(0)) != image_hash(noise(1))


# ---- What would be dropped silently --------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["with_transform", "set_transform"])
def test_a_transform_is_refused(how):
    dataset = pairs(2)
    given = getattr(dataset, how)(lambda batch: batch) or dataset
    with pytest.raises(ValueError, match="The train dataset has a transform .*dataset.map"):
        ImagePreferenceDataset(given, 16)


@pytest.mark.parametrize("kind", ["torch", "numpy", "arrow"])
def test_a_format_changes_nothing(kind):
    plain, formatted = (ImagePreferenceDataset(d, 16)[0] for d in (pairs(2), pairs(2).with_format(kind)))
    assert torch.equal(plain["pixel_values"], formatted["pixel_values"]) and plain["prompt"] == formatted["prompt"]


# ---- Paths ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("feature", [Value("string"), Image()], ids=["path", "image"])
def test_relative_paths_are_looked_up_in_the_given_folder(feature, tmp_path, monkeypatch):
    (tmp_path / "data" / "images").mkdir(parents=True)
    noise(0).save(tmp_path / "data" / "images" / "a.png")
    noise(1).save(tmp_path / "data" / "images" / "b.png")
    features = Features(prompt=Value("string"), chosen=feature, rejected=feature)
    row = {"prompt": "p", "chosen": "images/a.png", "rejected": "images/b.png"}
    dataset = Dataset.from_list([row], features=features)
    found = ImagePreferenceDataset(dataset, 24, image_dir=tmp_path / "data")[0]
    assert torch.equal(found["pixel_values"][0], normalize(array(noise(0))))
    with pytest.raises(ValueError, match=r"Row 0 of the train dataset, column `chosen`.*relative.*give.*`image_dir`"):
        ImagePreferenceDataset(dataset, 24)
    with pytest.raises(ValueError, match=rf"looked up in {tmp_path} and "):
        ImagePreferenceDataset(dataset, 24, image_dir=tmp_path)
    with pytest.raises(ValueError, match="`image_dir='.*nowhere'` is not a folder"):
        ImagePreferenceDataset(dataset, 24, image_dir=tmp_path / "nowhere")
    # Where there is no such file beside the data, the working directory counts, as before.
    monkeypatch.chdir(tmp_path / "data")
    (tmp_path / "other").mkdir()
    assert torch.equal(
        ImagePreferenceDataset(dataset, 24, image_dir=tmp_path / "other")[0]["pixel_values"], found["pixel_values"]
    )


def test_image_folder_with_two_file_names_a_row(tmp_path):
    """
    The layout of `datasets`' ImageFolder for pairs: `metadata.jsonl` with `chosen_file_name` and `rejected_file_name`.
    """
    import json

    from datasets import load_dataset

    (tmp_path / "train").mkdir()
    for i in range(4):
        noise(i).save(tmp_path / "train" / f"{i}.png")
    rows = [
        {"prompt": f"p{i}", "chosen_file_name": f"{2 * i}.png", "rejected_file_name": f"{2 * i + 1}.png"}
        for i in (0, 1)
    ]
    (tmp_path / "train" / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    dataset = load_dataset("imagefolder", data_dir=str(tmp_path), split="train", cache_dir=str(tmp_path / "cache"))
    item = ImagePreferenceDataset(dataset, 24)[1]
    assert item["prompt"] == "p1"
    assert torch.equal(item["pixel_values"], normalize(np.stack([array(noise(2)), array(noise(3))])))


# ---- Broken images -------------------------------------------------------------------------------------------------


def broken(count: int = 6) -> Dataset:
    """Row 1 is cut behind its header (JPEG), row 2 (PNG) too, row 4 is no image at all, row 5 has another shape."""
    rows = pairs(count).to_list()
    rows[1]["chosen"] = encoded(noise(0, (64, 64)), "JPEG", quality=95)[:2500]
    rows[2]["rejected"] = encoded(noise(0, (64, 64)))[:2000]
    rows[2]["chosen"] = encoded(noise(1, (64, 64)))
    rows[4]["chosen"] = b"nothing"
    rows[5]["chosen"] = encoded(noise(9, (24, 48)))
    return Dataset.from_list(rows)


def test_broken_images_are_found_when_asked():
    rows = broken().select([0, 1, 2, 3])
    ImagePreferenceDataset(rows, 16)  # behind their headers nobody looks
    with pytest.raises(
        ValueError, match=r"(?s)Row 1 .*`chosen`.*Row 2 .*`rejected`.*2 of 4 pairs.*`skip_broken_images=True`"
    ):
        ImagePreferenceDataset(rows, 16, verify_images=True)
    with pytest.raises(ValueError, match=r"Row 1 .*`chosen`.*`skip_broken_images=True`"):
        ImagePreferenceDataset(rows, 16)[1]
    assert len(ImagePreferenceDataset(rows.select([0, 3]), 16, verify_images=True)) == 2


def test_broken_images_are_skipped_and_listed(caplog):
    with caplog.at_level(logging.WARNING):
        images = ImagePreferenceDataset(broken(), 16, skip_broken_images=True)
    assert [images.prompt(i) for i in range(len(images))] == ["prompt 0", "prompt 3"]
    assert [message.split(" of ")[0] for message in images.skipped] == ["Row 1", "Row 2", "Row 4", "Row 5"]
    assert "Left out 4 of the 6 pairs" in caplog.text
    assert all(images[i]["pixel_values"].isfinite().all() for i in range(2))
    with pytest.raises(ValueError, match="4 of 4 pairs"):
        ImagePreferenceDataset(broken().select([1, 2, 4, 5]), 16, skip_broken_images=True)


def test_pick_a_pic_rows_are_named_as_in_the_data():
    rows = [
        {"caption": f"p{i}", "jpg_0": encoded(noise(2 * i)), "jpg_1": encoded(noise(2 * i + 1)), "label_0": label}
        for i, label in enumerate([0.5, 1.0, 0.0, 1.0])
    ]
    rows[2]["jpg_1"] = b"broken"
    images = ImagePreferenceDataset(Dataset.from_list(rows), 16, skip_broken_images=True)
    assert images.rows.tolist() == [1, 3] and images.skipped[0].startswith("Row 2 ")
    assert images.columns(0) == ("jpg_0", "jpg_1")


# ---- Thin images ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("size", [(4, 2000), (1500, 3), (5, 400), (16, 16), (300, 20)])
def test_thin_images_are_cropped_before_they_are_resized(size, flip, monkeypatch):
    """The pixels of resizing the whole, but for rounding; and never more than a few times the pixels that are kept."""
    image, target, crop = noise(0, size), (32, 32), (0.3, 0.7)
    resized, placed = place_crop(size, target, crop)
    top, left = placed.crop_top_left
    whole = np.asarray(image.resize((resized[1], resized[0]), PIL.Resampling.BILINEAR)).astype(int)
    expected = whole[top : top + 32, left : left + 32]
    made, resize = [], PIL.Image.resize
    monkeypatch.setattr(
        PIL.Image, "resize", lambda self, size, *a, **k: made.append(size) or resize(self, size, *a, **k)
    )
    got = transform(image, target, crop, flip).astype(int)
    assert np.abs((got[:, ::-1] if flip else got) - expected).max() <= 1
    assert all(width * height <= 8 * 32 * 32 for width, height in made)
