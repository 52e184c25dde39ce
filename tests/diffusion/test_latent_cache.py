"""The cache of latents and prompt embeddings: what is computed once, what it is keyed by, what may happen to it."""

import copy
import io
import logging
import os
import pickle
import threading
import weakref
from pathlib import Path

import numpy as np
import pytest
import tiny_pipelines
import torch
from datasets import Dataset
from launching import fork_and_kill
from PIL import Image as PIL

from trl_ext.diffusion import get_family, latent_cache
from trl_ext.diffusion.data import ImagePreferenceDataset, PairCollator
from trl_ext.diffusion.latent_cache import TensorStore, cache_latents
from trl_ext.training.fingerprints import describe_tokenizer, fingerprint, make_key


SCRIPT = Path(__file__).resolve().parents[1] / "scripts" / "fill_latent_cache.py"
SIZE = tiny_pipelines.RESOLUTION


def png(seed: int, size: int = 20) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (size, size + 4, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    PIL.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def pairs(count: int, prompts: int = 3) -> Dataset:
    """Pairs of distinct images, under prompts that repeat."""
    return Dataset.from_list(
        [{"prompt": f"digit {i % prompts}", "chosen": png(2 * i), "rejected": png(2 * i + 1)} for i in range(count)]
    )


def images(count: int = 6, **options) -> ImagePreferenceDataset:
    return ImagePreferenceDataset(pairs(count), SIZE, **options)


def options_of(family) -> dict:
    """What [`cache_latents`] needs to know of a family."""
    pipeline = family.pipeline
    tokenizers = [getattr(pipeline, name.replace("text_encoder", "tokenizer")) for name in family.text_encoder_names]
    return dict(
        encode_images=family.encode_images,
        encode_prompts=family.encode_prompts,
        image_fingerprint=fingerprint(pipeline.vae),
        prompt_fingerprint=fingerprint(*family.text_encoders, *tokenizers),
        progress=False,
    )


class Counted:
    """A family that counts what it encodes."""

    def __init__(self, name: str = "sd", seed: int = 0):
        self.family = get_family(tiny_pipelines.pipeline(name, seed))
        self.images, self.prompts = 0, []
        encode_images, encode_prompts = self.family.encode_images, self.family.encode_prompts

        def count_images(pixels):
            self.images += len(pixels)
            return encode_images(pixels)

        def count_prompts(prompts):
            self.prompts += prompts
            return encode_prompts(prompts)

        self.family.encode_images, self.family.encode_prompts = count_images, count_prompts

    def cache(self, dataset, folder, **options):
        self.images, self.prompts = 0, []
        return cache_latents(dataset, folder, **{**options_of(self.family), **options})


@pytest.fixture(scope="module")
def sd():
    return Counted("sd")


def shards(folder) -> list[Path]:
    return sorted(Path(folder).glob("shard-*.safetensors"))


def latents(dataset) -> torch.Tensor:
    return torch.stack([dataset[i]["latents"] for i in range(len(dataset))])


# ---- What it gives -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", tiny_pipelines.FAMILIES)
def test_a_cached_batch_is_the_batch_encoded_on_the_fly(name, tmp_path):
    family = get_family(tiny_pipelines.pipeline(name))
    plain = images(4)
    cached = cache_latents(plain, tmp_path, **options_of(family))
    order = [2, 0, 3]
    collate = PairCollator(plain.size)
    batch, fly = collate([cached[i] for i in order]), collate([plain[i] for i in order])
    expected = family.encode_images(fly["pixel_values"])
    assert batch["latents"].dtype == expected.dtype
    torch.testing.assert_close(batch["latents"], expected, rtol=0, atol=1e-5)
    expected = family.encode_prompts(fly["prompt"])
    assert batch["conditioning"].keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(batch["conditioning"][key], value, rtol=0, atol=1e-5)
    empty = family.encode_prompts([""])
    for key, value in cached.conditioning("").items():
        torch.testing.assert_close(value, empty[key][0], rtol=0, atol=1e-5)
    for key in ("index", "prompt", "size_conditioning"):
        assert torch.as_tensor(batch[key] == fly[key]).all(), key


def test_a_flip_has_a_latent_of_its_own(sd, tmp_path):
    plain = images(6, random_flip=True)
    cached = sd.cache(plain, tmp_path)
    assert sd.images == 2 * 2 * 6
    drawn = [plain.draw(i).flip for i in range(6)]
    assert set(drawn) == {False, True}
    for epoch in (0, 1):
        cached.set_epoch(epoch)
        for i in range(6):
            expected = sd.family.encode_images(plain[i]["pixel_values"])
            torch.testing.assert_close(latents(cached)[i], expected, rtol=0, atol=1e-5)
            assert cached[i]["crop_top_left"] == plain[i]["crop_top_left"]


def test_a_dropped_prompt_has_the_empty_prompts_embedding(sd, tmp_path):
    plain = images(16, prompt_dropout=0.5)
    cached = sd.cache(plain, tmp_path)
    dropped = [plain.draw(i).drop_prompt for i in range(16)]
    assert set(dropped) == {False, True}
    for i, drop in enumerate(dropped):
        assert cached[i]["prompt"] == plain[i]["prompt"] == ("" if drop else f"digit {i % 3}")
        same = torch.equal(cached[i]["conditioning"]["prompt_embeds"], cached.conditioning("")["prompt_embeds"])
        assert same == drop


def test_a_random_crop_is_refused(sd, tmp_path):
    with pytest.raises(
        ValueError, match="`random_crop=True` cannot be used with cached latents.*center, or do not cache"
    ):
        sd.cache(images(2, random_crop=True), tmp_path)


def test_nothing_of_the_family_is_held(tmp_path):
    family = get_family(tiny_pipelines.pipeline("sd"))
    cached = cache_latents(images(2), tmp_path, **options_of(family))
    held = [weakref.ref(part) for part in (family, family.pipeline.vae, family.pipeline.text_encoder)]
    del family
    assert [reference() for reference in held] == [None] * 3
    assert cached[0]["latents"].isfinite().all()


def test_workers_and_copies_read_it_too(sd, tmp_path):
    cached = sd.cache(images(4), tmp_path)
    expected = latents(cached)  # its files are open now
    assert torch.equal(latents(pickle.loads(pickle.dumps(cached))), expected)
    loader = torch.utils.data.DataLoader(cached, batch_size=4, num_workers=1, collate_fn=PairCollator((SIZE, SIZE)))
    chosen, rejected = next(iter(loader))["latents"].chunk(2)
    assert torch.equal(torch.stack([chosen, rejected], dim=1), expected)


# ---- What is computed, and once ------------------------------------------------------------------------------------


def test_every_image_and_every_prompt_is_encoded_once(sd, tmp_path):
    rows = [*pairs(4, prompts=2), *pairs(4, prompts=2)]  # every pair twice
    dataset = ImagePreferenceDataset(Dataset.from_list(rows), SIZE)
    cached = sd.cache(dataset, tmp_path, batch_size=3)
    assert sd.images == 8 and sorted(sd.prompts) == ["", "digit 0", "digit 1"]
    assert torch.equal(latents(cached)[:4], latents(cached)[4:])
    assert torch.equal(sd.cache(dataset, tmp_path)[5]["latents"], cached[5]["latents"])
    assert sd.images == 0 and sd.prompts == []


def test_a_second_run_does_not_read_the_images(sd, tmp_path, monkeypatch):
    dataset = images(4)
    sd.cache(dataset, tmp_path)

    def refuse(self, index):
        raise AssertionError("an image was read")

    monkeypatch.setattr(ImagePreferenceDataset, "pair", refuse)
    assert len(sd.cache(dataset, tmp_path)) == 4
    assert sd.images == 0


def test_another_dataset_shares_what_it_has_in_common(sd, tmp_path):
    sd.cache(images(3), tmp_path)
    sd.cache(images(5), tmp_path)
    assert sd.images == 4 and sd.prompts == []  # two new pairs; their prompts are known


def test_what_the_key_covers(tmp_path):
    sd = Counted("sd")
    sd.cache(images(2), tmp_path)
    vae = sd.family.pipeline.vae

    def encoded(dataset=None, **options):
        sd.cache(dataset or images(2), tmp_path, **options)
        return sd.images, len(sd.prompts)

    assert encoded() == (0, 0)
    assert encoded(ImagePreferenceDataset(pairs(2), 2 * SIZE)) == (4, 0)  # resolution
    assert encoded(dtype=torch.bfloat16) == (4, 3)
    assert encoded(images(2, random_flip=True)) == (4, 0)  # the mirrored ones only
    with torch.no_grad():
        bias = vae.encoder.conv_in.bias.clone()
        vae.encoder.conv_in.bias[0] += 1.0
        assert encoded() == (4, 0)
        vae.encoder.conv_in.bias.copy_(bias)
    scaling = vae.config.scaling_factor
    vae.register_to_config(scaling_factor=2 * scaling)
    assert encoded() == (4, 0)
    vae.register_to_config(scaling_factor=scaling)
    with torch.no_grad():
        weight = sd.family.pipeline.text_encoder.get_input_embeddings().weight
        before = weight.clone()
        weight.mul_(2.0)
        assert encoded() == (0, 3)
        weight.copy_(before)
    length = sd.family.pipeline.tokenizer.model_max_length
    sd.family.pipeline.tokenizer.model_max_length = length - 1
    assert encoded() == (0, 3)
    sd.family.pipeline.tokenizer.model_max_length = length
    assert encoded() == (0, 0)


def test_a_file_that_changed_under_its_path_is_encoded_again(sd, tmp_path):
    for name in ("a", "b"):
        (tmp_path / f"{name}.png").write_bytes(png(ord(name)))
    rows = [{"prompt": "p", "chosen": str(tmp_path / "a.png"), "rejected": str(tmp_path / "b.png")}]
    dataset = ImagePreferenceDataset(Dataset.from_list(rows), SIZE)
    before = latents(sd.cache(dataset, tmp_path / "cache"))
    sd.cache(dataset, tmp_path / "cache")
    assert sd.images == 0
    (tmp_path / "a.png").write_bytes(png(1000))
    os.utime(tmp_path / "a.png", ns=(0, 0))
    after = latents(sd.cache(dataset, tmp_path / "cache"))
    assert sd.images == 1
    assert not torch.equal(before[0, 0], after[0, 0]) and torch.equal(before[0, 1], after[0, 1])


def test_fingerprints_tell_encoders_apart_whatever_they_were_loaded_from():
    first, same, other = (tiny_pipelines.pipeline("sd", seed).vae for seed in (0, 0, 1))
    same.register_to_config(_name_or_path="elsewhere")
    assert fingerprint(first) == fingerprint(same) != fingerprint(other)
    assert fingerprint(first) != fingerprint(copy.deepcopy(first).to(torch.bfloat16))
    assert fingerprint(first, None) != fingerprint(first) != fingerprint(None, first)
    assert make_key("ab", "c") != make_key("a", "bc") and make_key(1) != make_key("1")


# ---- What may happen to it -----------------------------------------------------------------------------------------


def test_a_killed_run_is_taken_up_where_it_stopped(sd, tmp_path):
    fork_and_kill(lambda: len(shards(tmp_path / "cache")) >= 4, SCRIPT, str(tmp_path / "cache"), "40")
    found = len(TensorStore(tmp_path / "cache"))
    assert 4 <= found < 80
    cached = sd.cache(images(40), tmp_path / "cache")
    assert sd.images == 80 - found
    torch.testing.assert_close(latents(cached), latents(sd.cache(images(40), tmp_path / "fresh")), rtol=0, atol=1e-5)


def test_a_damaged_file_is_removed_and_its_entries_computed_again(sd, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(latent_cache, "SHARD_BYTES", 1)  # a file an entry
    expected = latents(sd.cache(images(3), tmp_path))
    for path in shards(tmp_path):
        path.write_bytes(path.read_bytes()[:-8])
    survivor = tmp_path / "shard-empty.safetensors"
    survivor.write_bytes(b"")
    with caplog.at_level(logging.WARNING):
        cached = sd.cache(images(3), tmp_path)
    assert "is damaged" in caplog.text and "computed again" in caplog.text
    assert sd.images == 6 and len(sd.prompts) == 4 and not survivor.exists()
    assert torch.equal(latents(cached), expected)


@pytest.mark.parametrize("place", [0.02, 0.5, 0.99], ids=["header", "middle", "end"])
def test_a_flipped_bit_is_noticed_and_the_entries_computed_again(place, sd, tmp_path, caplog):
    """In one file of many entries: no format notices a bit of a latent, and nothing that the file held is believed."""
    expected = latents(sd.cache(images(3), tmp_path))
    (path,) = shards(tmp_path)
    content = bytearray(path.read_bytes())
    content[int(place * len(content))] ^= 64
    path.write_bytes(content)
    with caplog.at_level(logging.WARNING):
        cached = sd.cache(images(3), tmp_path)
    assert sd.images == 6 and len(sd.prompts) == 4
    assert str(path) in caplog.text
    if place > 0.1:
        assert "its checksum does not match" in caplog.text and "computed again" in caplog.text and not path.exists()
    assert torch.equal(latents(cached), expected)
    caplog.clear()
    assert torch.equal(latents(sd.cache(images(3), tmp_path)), expected) and sd.images == 0


def test_what_a_damaged_file_held_is_found_in_another(tmp_path, caplog):
    """Two runs at once store the same twice: one of the two is enough."""
    stores = [TensorStore(tmp_path), TensorStore(tmp_path)]
    for store in stores:
        store.put(b"key", {"latents": torch.ones(64)})
    for store in stores:
        store.flush()
    damaged, whole = shards(tmp_path)
    content = bytearray(damaged.read_bytes())
    content[-1] ^= 1
    damaged.write_bytes(content)
    store = TensorStore(tmp_path)
    with caplog.at_level(logging.WARNING):
        assert b"key" in store and torch.equal(store.get(b"key")["latents"], torch.ones(64))
    assert damaged.name in caplog.text and shards(tmp_path) == [whole]
    # Gone altogether, it is gone for those too that knew it; they never read the damaged one.
    whole.unlink()
    other = stores[1]
    other.refresh()
    assert b"key" not in other and len(other) == 0
    with pytest.raises(KeyError, match="no intact entry 6b6579. Run again"):
        other.get(b"key")


def test_a_file_is_checked_once(tmp_path, monkeypatch):
    """By whoever asks first; copies for worker processes know of it."""
    store = TensorStore(tmp_path)
    for i in range(3):
        store.put(bytes([i]), {"latents": torch.zeros(8)})
    store.flush()
    read = []
    original = latent_cache.is_intact
    monkeypatch.setattr(latent_cache, "is_intact", lambda path: read.append(path) or original(path))
    fresh = TensorStore(tmp_path)
    assert read == []  # the files of other data in the same folder are not read
    assert all(bytes([i]) in fresh for i in range(3))
    pickle.loads(pickle.dumps(fresh)).get(bytes([1]))
    assert read == shards(tmp_path)


def test_a_foreign_file_is_left_alone_and_named(sd, tmp_path, caplog):
    from safetensors.torch import save_file

    save_file({"weight": torch.zeros(2)}, tmp_path / "shard-foreign.safetensors")
    (tmp_path / "notes.txt").write_text("mine")
    with caplog.at_level(logging.WARNING):
        sd.cache(images(2), tmp_path)
    assert "shard-foreign.safetensors was ignored" in caplog.text and "notes.txt was ignored" in caplog.text
    assert (tmp_path / "notes.txt").read_text() == "mine" and (tmp_path / "shard-foreign.safetensors").exists()
    with pytest.raises(ValueError, match="The cache folder .*notes.txt' is a file"):
        sd.cache(images(2), tmp_path / "notes.txt")


def test_half_written_files_are_never_read_and_old_ones_are_removed(tmp_path):
    old, young = tmp_path / ".shard-old.safetensors", tmp_path / ".shard-young.safetensors"
    for path in (old, young):
        path.write_bytes(b"half")
    os.utime(old, (0, 0))
    assert len(TensorStore(tmp_path)) == 0
    assert young.exists() and not old.exists()


def test_a_full_disk_says_what_is_kept(sd, tmp_path, monkeypatch):
    def full(descriptor):
        os.truncate(descriptor, os.fstat(descriptor).st_size // 2)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(
        OSError, match=r"(?s)Could not write .* MiB to the cache folder .*No space left.*free some space"
    ):
        sd.cache(images(2), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_processes_share_the_work_and_see_each_others(tmp_path, monkeypatch):
    barrier = threading.Barrier(2)
    ranks = threading.local()

    class State:
        num_processes = 2
        is_local_main_process = False

        @property
        def process_index(self):
            return ranks.index

        def wait_for_everyone(self):
            barrier.wait(60)

    monkeypatch.setattr(latent_cache, "PartialState", State)
    monkeypatch.setattr(latent_cache, "CHUNK", 2)
    families = [Counted("sd"), Counted("sd")]
    results = [None, None]

    def work(index):
        ranks.index = index
        results[index] = families[index].cache(images(7), tmp_path)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [family.images for family in families] == [8, 6]  # chunks of 2, 2 and 2, 1 pairs
    assert sorted(families[0].prompts + families[1].prompts) == ["", "digit 0", "digit 1", "digit 2"]
    assert torch.equal(latents(results[0]), latents(results[1]))

    ranks.index = 0
    monkeypatch.setattr(State, "wait_for_everyone", lambda self: None)
    with pytest.raises(
        RuntimeError, match="encoded by other processes are not in .*file system that the machines share"
    ):
        families[0].cache(images(7), tmp_path / "not shared")


def test_two_runs_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(latent_cache, "SHARD_BYTES", 1)
    families = [Counted("sd"), Counted("sd")]
    results = [None, None]

    def work(index):
        results[index] = families[index].cache(images(8), tmp_path, batch_size=1)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert torch.equal(latents(results[0]), latents(results[1]))
    assert all(16 >= family.images > 0 for family in families)
    assert torch.equal(latents(Counted("sd").cache(images(8), tmp_path)), latents(results[0]))


# ---- Bad input -----------------------------------------------------------------------------------------------------


def test_latents_that_are_not_finite_are_named(tmp_path):
    counted = Counted("sd")
    encode = counted.family.encode_images
    counted.family.encode_images = lambda pixels: encode(pixels).masked_fill(
        torch.arange(len(pixels)).view(-1, 1, 1, 1) == 3, torch.nan
    )
    with pytest.raises(
        ValueError, match=r"Row 1 of the train dataset, column `rejected`: its latents are not finite in .*float16"
    ):
        counted.cache(images(3), tmp_path)


def test_an_overflow_of_the_kept_type_is_named(sd, tmp_path):
    counted = Counted("sd")
    encode = counted.family.encode_images
    counted.family.encode_images = lambda pixels: encode(pixels) * 1e6
    with pytest.raises(ValueError, match="not finite in torch.float16"):
        counted.cache(images(3), tmp_path, dtype=torch.float16)


def test_embeddings_that_are_not_finite_are_named(tmp_path):
    counted = Counted("sd")
    counted.family.encode_prompts = lambda prompts: {"prompt_embeds": torch.full((len(prompts), 2, 2), torch.inf)}
    with pytest.raises(ValueError, match="`prompt_embeds` of the prompt '' is not finite in torch.float32"):
        counted.cache(images(3), tmp_path)


def test_an_image_that_breaks_while_caching_is_named_and_what_was_done_is_kept(sd, tmp_path, monkeypatch):
    monkeypatch.setattr(latent_cache, "SHARD_BYTES", 1)
    rows = [*pairs(3), {"prompt": "p", "chosen": png(0, 64), "rejected": png(1, 64)[:2000]}]
    dataset = ImagePreferenceDataset(Dataset.from_list(rows), SIZE)
    with pytest.raises(ValueError, match="Row 3 of the train dataset, column `rejected`: .*truncated"):
        sd.cache(dataset, tmp_path, batch_size=1)
    assert len(shards(tmp_path)) == 6


def test_pairs_of_the_same_image_are_counted(sd, tmp_path, caplog):
    rows = [*pairs(2), {"prompt": "p", "chosen": png(0), "rejected": png(0)}]
    with caplog.at_level(logging.WARNING):
        sd.cache(ImagePreferenceDataset(Dataset.from_list(rows), SIZE), tmp_path)
    assert "1 of the 3 pairs of the train dataset have the same image on both sides: rows 2" in caplog.text


# ---- Whose files they are ------------------------------------------------------------------------------------------


def test_files_of_the_user_stay(tmp_path):
    """A cache folder may be any folder: hidden files, however old, belong to somebody."""
    names = (".bashrc", ".env", ".gitignore", ".shard-notes.txt", ".x-shard-1.safetensors", "shard-1.txt")
    for name in names:
        (tmp_path / name).write_text("mine")
        os.utime(tmp_path / name, (0, 0))
    TensorStore(tmp_path).refresh()
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(names)


# ---- Tokenizers ----------------------------------------------------------------------------------------------------


def test_what_decides_how_a_prompt_is_tokenized_is_in_the_key():
    def described(change=lambda tokenizer: None):
        tokenizer = tiny_pipelines.clip_tokenizer()
        change(tokenizer)
        return describe_tokenizer(tokenizer)

    def lower(tokenizer):
        tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()

    def merges(tokenizer):
        vocab = tokenizer.get_vocab()
        tokenizer.backend_tokenizer.model = models.BPE(
            vocab=vocab, merges=[], end_of_word_suffix="</w>", unk_token="!"
        )

    from tokenizers import models, normalizers

    changes = [
        lambda tokenizer: setattr(tokenizer, "pad_token", "!"),
        lambda tokenizer: setattr(tokenizer, "eos_token", "!"),
        lambda tokenizer: setattr(tokenizer, "padding_side", "left"),
        lambda tokenizer: setattr(tokenizer, "truncation_side", "left"),
        lower,
        merges,
    ]
    made = [described(), *map(described, changes)]
    assert len(set(made)) == len(made)
    # What it was last asked for is no property of it.
    assert (
        described(lambda tokenizer: tokenizer(["a"], padding="max_length", max_length=9, truncation=True)) == made[0]
    )
    assert describe_tokenizer(None) == ""


@pytest.mark.parametrize("pad_token", ["<|endoftext|>", "!"])
def test_embeddings_of_the_first_version_are_used_if_they_are_what_is_computed(pad_token, tmp_path):
    """0.1.0 kept them under a key that did not know the special tokens."""
    sd = Counted("sd")
    sd.cache(images(4), tmp_path, prompt_fingerprint="of 0.1.0")
    sd.family.pipeline.tokenizer.pad_token = pad_token
    cached = sd.cache(images(4), tmp_path, prompt_fingerprint="new", legacy_prompt_fingerprint="of 0.1.0")
    fresh = sd.family.encode_prompts(["digit 1"])["prompt_embeds"][0]
    torch.testing.assert_close(cached.conditioning("digit 1")["prompt_embeds"], fresh)
    before = len(shards(tmp_path))
    sd.cache(images(4), tmp_path, prompt_fingerprint="new", legacy_prompt_fingerprint="of 0.1.0")
    assert len(shards(tmp_path)) == before == (1 if pad_token == "<|endoftext|>" else 2)


# ---- How large it will be ------------------------------------------------------------------------------------------


def test_the_size_is_said_before_the_cache_is_filled(tmp_path, capsys, monkeypatch, caplog):
    sd = Counted("sd")
    said = []
    monkeypatch.setattr(latent_cache.tqdm, "write", said.append)
    sd.cache(images(6, random_flip=True), tmp_path / "a", latent_bytes=2**28, progress=True)
    assert len(said) == 1
    # 6 pairs, 2 images, 2 orientations; the empty prompt counts.
    assert "6 pairs of images (6 GiB) and 4 prompts" in said[0] and "GiB are free" in said[0]
    sd.cache(images(6, random_flip=True), tmp_path / "a", latent_bytes=2**28, progress=True)
    assert len(said) == 1  # nothing is added
    with caplog.at_level(logging.WARNING):
        sd.cache(images(2), tmp_path / "b", latent_bytes=2**60)
    assert "That is not enough" in caplog.text and "`cache_latents=False`" in caplog.text
