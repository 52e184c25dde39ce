"""
Cache of latents and prompt embeddings on disk.

A frozen VAE gives the same latents in every epoch, and encoding takes about a third of an SD1.5 LoRA step. With
everything cached, the VAE and the text encoders can be freed.

The key of an entry is a hash of what it is computed from (image content, transform, weights and configuration of the
encoder, type), so any runs can share a cache folder, and no entry can be stale. Entries are stored in safetensors
files ([`~trl_ext.training.shards`]): they are written atomically and compared with their checksum before use, and a
killed run continues where it stopped. Every process and every run writes files of its own and reads those of all.
"""

import contextlib
import logging
import math
import os
import shutil
import time
import uuid
from collections import defaultdict
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import torch
from accelerate import PartialState
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from tqdm.auto import tqdm

from ..training.fingerprints import make_key
from ..training.shards import is_intact, write_shard
from .data import ImagePreferenceDataset, normalize, warn_once_a_run


logger = logging.getLogger(__name__)

FORMAT = "trl_ext.tensor_store.v2"

# A file is written when it has this many bytes, or when its oldest entry has waited this long. A killed run has to
# compute at most so much again.
SHARD_BYTES = 128 * 2**20
SHARD_SECONDS = 60.0

# Pairs whose keys are stored in one entry.
CHUNK = 64

# Age from which a temporary file is the leftover of a killed run. One that another run is writing is younger.
STALE_SECONDS = 24 * 3600.0


def _discard(path: Path, reason) -> None:
    try:
        path.unlink(missing_ok=True)
        done = "was removed"
    except OSError as error:
        done = f"is not used, and cannot be removed ({error})"
    logger.warning(f"{path} is damaged ({reason}). It {done}; its entries are computed again.")


class TensorStore:
    """
    Content-addressed tensors on disk. Entries are added and never changed.

    Any number of processes and runs can use the same folder, as each writes files of its own. An entry that two of
    them compute at the same time is stored twice, with the same value.

    When an entry is first read, its whole file is compared with its checksum. A damaged file is removed with a
    warning, and its entries are gone.

    Args:
        folder (`str` or `os.PathLike`):
            Folder of the files; created if it does not exist. Nothing in it is ever evicted: delete it to free the
            space.
    """

    def __init__(self, folder: str | os.PathLike):
        self.folder = Path(folder).expanduser()
        if self.folder.exists() and not self.folder.is_dir():
            raise ValueError(f"The cache folder {str(self.folder)!r} is a file. Give the path of a folder.")
        self.folder.mkdir(parents=True, exist_ok=True)
        self._files: dict[str, Any] = {}  # name -> open file
        self._known: set[str] = set()  # names of the files that were indexed
        self._intact: set[str] = set()  # and of those whose checksum matched
        # key -> files with that entry, and the names of its tensors
        self._where: dict[bytes, list[tuple[str, tuple[str, ...]]]] = {}
        self._pending: dict[bytes, dict[str, torch.Tensor]] = {}
        self._pending_bytes, self._pending_since = 0, 0.0
        self.refresh()

    def __getstate__(self):  # every worker opens the files itself
        return {**self.__dict__, "_files": {}}

    def __contains__(self, key: bytes) -> bool:
        if key in self._pending:
            return True
        while places := self._where.get(key):
            if self._is_intact(places[0][0]):  # otherwise the place is dropped, and the next one is tried
                return True
        return False

    def __len__(self) -> int:
        return len(self._where) + len(self._pending)

    # ---- Reading ---------------------------------------------------------------------------------------------------

    def refresh(self) -> None:
        """Indexes the files that any process has written since, and forgets those that were removed."""
        paths = sorted(self.folder.iterdir())
        gone = self._known - {path.name for path in paths}
        self._forget(gone)
        self._known -= gone
        for path in paths:
            if path.name in self._known:
                continue
            if path.name.startswith(".shard-") and path.suffix == ".safetensors":
                with contextlib.suppress(OSError):  # another run may have removed it
                    if time.time() - path.stat().st_mtime > STALE_SECONDS:
                        path.unlink()
                continue
            if path.name.startswith("."):
                continue  # not a file of this cache; the folder may hold others
            self._known.add(path.name)
            self._index(path)

    def _index(self, path: Path) -> None:
        ours = path.name.startswith("shard-") and path.suffix == ".safetensors"
        try:
            if not ours:
                raise ValueError("not a file of this cache")
            with safe_open(path, framework="pt") as file:
                if (file.metadata() or {}).get("format") != FORMAT:
                    raise ValueError("not a file of this cache, or of another version of it")
                entries: dict[bytes, list[str]] = {}
                for name in file.keys():  # noqa: SIM118 (not a dict)
                    key, _, tensor = name.partition("/")
                    entries.setdefault(bytes.fromhex(key), []).append(tensor)
        except SafetensorError as error:
            _discard(path, error)
        except FileNotFoundError:
            pass  # another process found it damaged and removed it
        except (OSError, ValueError) as error:
            logger.warning(f"{path} was ignored: {error}.")
        else:
            for key, names in entries.items():
                self._where.setdefault(key, []).append((path.name, tuple(names)))

    def _is_intact(self, name: str) -> bool:
        """Whether a file's checksum matches. If not, its entries are forgotten."""
        if name in self._intact:
            return True
        try:
            if is_intact(self.folder / name):
                self._intact.add(name)
                return True
            _discard(self.folder / name, "its checksum does not match its contents")
        except FileNotFoundError:
            pass  # another process found it damaged and removed it
        except OSError as error:  # a bad sector
            _discard(self.folder / name, error)
        self._forget({name})
        return False

    def _forget(self, names: set[str]) -> None:
        """Forgets the entries of these files that no other file has."""
        if not names:
            return
        for key, places in list(self._where.items()):
            places[:] = [place for place in places if place[0] not in names]
            if not places:
                del self._where[key]
        for name in names:
            self._files.pop(name, None)

    def get(self, key: bytes) -> dict[str, torch.Tensor]:
        """
        Returns the tensors of an entry.

        Raises:
            `KeyError`: If there is none.
        """
        if key in self._pending:
            return self._pending[key]
        if key not in self:
            raise KeyError(
                f"The cache folder {str(self.folder)!r} has no intact entry {key.hex()}. Run again to compute it."
            )
        name, tensors = self._where[key][0]
        if name not in self._files:
            self._files[name] = safe_open(self.folder / name, framework="pt")
        return {tensor: self._files[name].get_tensor(f"{key.hex()}/{tensor}") for tensor in tensors}

    # ---- Writing ---------------------------------------------------------------------------------------------------

    def put(self, key: bytes, tensors: dict[str, torch.Tensor]) -> None:
        """Adds an entry. It reaches the disk with the next [`flush`], which also happens automatically."""
        if key in self:
            return
        tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
        if not self._pending:
            self._pending_since = time.monotonic()
        self._pending[key] = tensors
        self._pending_bytes += sum(tensor.nbytes for tensor in tensors.values())
        if self._pending_bytes >= SHARD_BYTES or time.monotonic() - self._pending_since >= SHARD_SECONDS:
            self.flush()

    def flush(self) -> None:
        """
        Writes the pending entries into a file, atomically: no reader ever sees a part of it.

        Raises:
            `OSError`: If the file cannot be written, e.g. because the disk is full.
        """
        if not self._pending:
            return
        entries = {
            f"{key.hex()}/{tensor}": value
            for key, tensors in self._pending.items()
            for tensor, value in tensors.items()
        }
        try:
            content = save(entries, metadata={"format": FORMAT})
            name = write_shard(self.folder, f"shard-{uuid.uuid4().hex}", ".safetensors", content).name
        except OSError as error:
            raise OSError(
                f"Could not write {self._pending_bytes / 2**20:.0f} MiB to the cache folder {str(self.folder)!r}: "
                f"{error}. Earlier files are kept; free some space, or give another folder, and run again."
            ) from error
        for key, tensors in self._pending.items():
            self._where.setdefault(key, []).append((name, tuple(tensors)))
        self._known.add(name)
        self._intact.add(name)
        self._pending, self._pending_bytes = {}, 0
        self.refresh()  # and index what other processes have written


def _columns_of_paths(dataset: datasets.Dataset, columns: Iterable[str]) -> list[str]:
    """Returns the columns with images that the dataset names by path instead of containing them."""
    found = []
    for column in columns:
        values = dataset.data.column(column)
        if pa.types.is_struct(values.type):
            # The validity bitmap has the count; no image is read.
            if any(chunk.field("bytes").null_count for chunk in values.chunks):
                found.append(column)
        elif pa.types.is_string(values.type) or pa.types.is_large_string(values.type):
            found.append(column)
    return found


# ---- The cache -----------------------------------------------------------------------------------------------------


class CachedPairs(torch.utils.data.Dataset):
    """
    The pairs of an [`ImagePreferenceDataset`] with latents and prompt embeddings from a cache, as [`cache_latents`]
    returns them.

    An item is that of the dataset, with `latents` of shape `(2, channels, height, width)`, chosen first, in place of
    `pixel_values`, and with `conditioning`, a `dict` of the text encoders' output for its prompt. Flips and dropped
    prompts are those of the dataset without a cache.
    """

    def __init__(self, images: ImagePreferenceDataset, store: TensorStore, keys, sizes, prompt_keys: dict[str, bytes]):
        self.images = images
        self.store = store
        self._keys = keys  # (number of pairs, orientations, 2, 32) bytes
        self._sizes = sizes  # (number of pairs, orientations, 4)
        self._prompt_keys = prompt_keys

    def __len__(self) -> int:
        return len(self.images)

    def set_epoch(self, epoch: int) -> None:
        """Sets the epoch for which flips and dropped prompts are drawn."""
        self.images.set_epoch(epoch)

    def conditioning(self, prompt: str) -> dict[str, torch.Tensor]:
        """
        Returns the text encoders' output for `prompt`, one of the dataset's or the empty one, without a batch
        dimension.
        """
        return self.store.get(self._prompt_keys[prompt])

    def __getitem__(self, index: int) -> dict:
        draw = self.images.draw(index)
        prompt = "" if draw.drop_prompt else self.images.prompt(index)
        height, width, top, left = self._sizes[index, int(draw.flip)].tolist()
        latents = [self.store.get(key.tobytes())["latents"] for key in self._keys[index, int(draw.flip)]]
        return {
            "prompt": prompt,
            "latents": torch.stack(latents),
            "conditioning": self.conditioning(prompt),
            **self.images.facts(index, (height, width), (top, left)),
        }


def cache_latents(
    images: ImagePreferenceDataset,
    folder: str | os.PathLike,
    *,
    encode_images: Callable[[torch.Tensor], torch.Tensor],
    encode_prompts: Callable[[list[str]], dict[str, torch.Tensor]],
    image_fingerprint: str,
    prompt_fingerprint: str,
    legacy_prompt_fingerprint: str | None = None,
    latent_bytes: int | None = None,
    dtype: torch.dtype | None = None,
    batch_size: int = 8,
    num_threads: int = 4,
    progress: bool = True,
) -> CachedPairs:
    """
    Encodes what is not in the cache yet: every image and every prompt once, however often it occurs, and the empty
    prompt. Returns pairs that hold neither function, so that the encoders can be freed.

    `encode_images` should return the mode of a VAE's posterior; the latents are then those of a run that encodes at
    every step. With `random_flip` each image is stored in both orientations, at twice the cost. `random_crop` is
    refused, as every place of the crop would need its own latents.

    All processes of a run call this function. Each encodes its share and writes its own files, into a folder that they
    share.

    Args:
        images ([`ImagePreferenceDataset`]):
            The pairs.
        folder (`str` or `os.PathLike`):
            Folder of the cache.
        encode_images (`Callable`):
            Maps pixels of shape `(N, 3, height, width)` in [-1, 1] to scaled latents of shape `(N, channels, h, w)`.
        encode_prompts (`Callable`):
            Maps `N` texts to tensors by name, whose first dimension is `N`. The output for a text must not depend on
            the other texts.
        image_fingerprint (`str`):
            [`~trl_ext.training.fingerprints.fingerprint`] of the VAE.
        prompt_fingerprint (`str`):
            The same of the text encoders, the tokenizers, their lengths and
            [`~trl_ext.training.fingerprints.describe_tokenizer`].
        legacy_prompt_fingerprint (`str`, *optional*):
            The fingerprint of version 0.1.0. Embeddings stored under it are used if a sample of them equals what
            `encode_prompts` returns.
        latent_bytes (`int`, *optional*):
            Bytes of the latents of an image of the dataset's `resolution`, with which the size of the cache is
            estimated before it is filled.
        dtype (`torch.dtype`, *optional*):
            Type in which latents and embeddings are stored. Defaults to their own type, without loss. A latent of
            SD1.5 at 512 pixels takes 64 KiB in float32 and 32 KiB in 16 bits.
        batch_size (`int`, *optional*, defaults to `8`):
            Number of images, or prompts, in a batch.
        num_threads (`int`, *optional*, defaults to `4`):
            Number of threads that read and decode images.
        progress (`bool`, *optional*, defaults to `True`):
            Whether to show progress bars, on the main process.

    Raises:
        `ValueError`: With `random_crop`; for an image that cannot be read; for latents or embeddings that are not
            finite, naming row and column, or the prompt.
        `OSError`: If the cache cannot be written.
        `RuntimeError`: If the other processes' files cannot be seen.
    """
    if images.random_crop:
        raise ValueError(
            "`random_crop=True` cannot be used with cached latents: each place of the crop has its own. Set "
            "`random_crop=False`, which crops at the center, or do not cache the latents."
        )
    state = PartialState()
    store = TensorStore(folder)
    bar = dict(disable=not (progress and state.is_local_main_process), leave=False)
    chunks = _Chunks(images, image_fingerprint, str(dtype))

    unique = list(dict.fromkeys(["", *images.prompts()]))
    prompt_keys = {prompt: make_key("prompt", prompt_fingerprint, str(dtype), prompt) for prompt in unique}
    if legacy_prompt_fingerprint is not None:
        legacy = {prompt: make_key("prompt", legacy_prompt_fingerprint, str(dtype), prompt) for prompt in unique}
        legacy = {p: key for p, key in legacy.items() if prompt_keys[p] not in store and key in store}
        if legacy and _are_current(legacy, store, encode_prompts, dtype):
            prompt_keys.update(legacy)
    missing = [p for p in unique[state.process_index :: state.num_processes] if prompt_keys[p] not in store]

    def encode_missing(batch: list[str]) -> None:
        encoded = {name: t.cpu().to(dtype or t.dtype) for name, t in encode_prompts(batch).items()}
        for i, prompt in enumerate(batch):
            tensors = {name: tensor[i] for name, tensor in encoded.items()}
            for name, tensor in tensors.items():
                if not torch.isfinite(tensor).all():
                    raise ValueError(
                        f"The text encoders' `{name}` of the prompt {prompt!r} is not finite in {tensor.dtype}. "
                        "Load them in float32 or bfloat16."
                    )
            store.put(prompt_keys[prompt], tensors)

    with torch.no_grad():
        mine = chunks.starts[state.process_index :: state.num_processes]
        if latent_bytes is not None and state.is_main_process:
            new_pairs = [i for s in chunks.starts if chunks.key(s) not in store for i in chunks.indices(s)]
            new_prompts = sum(key not in store for key in prompt_keys.values())
            prompt_bytes = sum(tensor.nbytes for tensor in encode_prompts([""]).values()) if new_prompts else 0
            new_bytes = (estimate_bytes(images, new_pairs, latent_bytes), new_prompts * prompt_bytes)
            _announce(store, len(new_pairs), new_prompts, new_bytes, progress)
        total = sum(len(chunks.indices(s)) for s in mine)
        with tqdm(total=total, desc="Encoding images", unit="pair", **bar) as images_bar:
            with ThreadPoolExecutor(num_threads) as executor:
                for start in mine:
                    if not chunks.complete(start, store):
                        _encode_chunk(chunks, start, store, executor, encode_images, dtype, batch_size)
                    images_bar.update(len(chunks.indices(start)))
        for start in tqdm(range(0, len(missing), batch_size), desc="Encoding prompts", unit="batch", **bar):
            encode_missing(missing[start : start + batch_size])
    store.flush()
    state.wait_for_everyone()
    store.refresh()

    keys, sizes = chunks.gather(store)
    absent = sum(key not in store for key in prompt_keys.values())
    if absent:
        raise RuntimeError(_not_shared(store, f"{absent} prompts"))
    identical = np.flatnonzero((keys[:, 0, 0] == keys[:, 0, 1]).all(axis=-1))
    if len(identical):
        shown = ", ".join(map(str, images.rows[identical[:10]])) + (", ..." if len(identical) > 10 else "")
        warn_once_a_run(
            f"{len(identical)} of the {len(images)} pairs of the {images.name} dataset have the same image on both "
            f"sides: rows {shown}. They are kept, but have no effect on training."
        )
    return CachedPairs(images, store, keys, sizes, prompt_keys)


def estimate_bytes(images: ImagePreferenceDataset, indices: Iterable[int], latent_bytes: int) -> int:
    """
    Bytes that the latents of these pairs take in a cache, in every orientation, if those of an image of the dataset's
    `resolution` take `latent_bytes`.
    """
    pixels = sum(math.prod(images.size_of(i)) for i in indices)
    return 2 * (1 + images.random_flip) * latent_bytes * pixels // math.prod(images.size)


def _announce(store: TensorStore, pairs: int, prompts: int, sizes: tuple[int, int], progress: bool) -> None:
    """Says how large the cache will get, before it is filled; a warning if the disk has not that much space."""
    if not pairs and not prompts:
        return
    needed, free = sum(sizes), shutil.disk_usage(store.folder).free
    text = (
        f"The latent cache in {str(store.folder)!r} will grow by about {needed / 2**30:.3g} GiB: {pairs:,} pairs of "
        f"images ({sizes[0] / 2**30:.3g} GiB) and {prompts:,} prompts. {free / 2**30:.3g} GiB are free."
    )
    if needed > free:
        warn_once_a_run(f"{text} That is not enough: give another `cache_dir`, fewer pairs, or `cache_latents=False`.")
    elif progress:
        tqdm.write(text)
    else:
        logger.info(text)


def _are_current(keys: dict[str, bytes], store: TensorStore, encode_prompts, dtype) -> bool:
    """
    Whether embeddings of up to 8 prompts, evenly spaced over those in `keys`, are what `encode_prompts` makes of them.
    """
    prompts = [list(keys)[i] for i in sorted(set(np.linspace(0, len(keys) - 1, 8).astype(int).tolist()))]
    with torch.no_grad():
        encoded = encode_prompts(prompts)
    for i, prompt in enumerate(prompts):
        stored = store.get(keys[prompt])
        if stored.keys() != encoded.keys():
            return False
        for name, tensor in encoded.items():
            wanted, found = tensor[i].cpu().to(dtype or tensor.dtype), stored[name]
            # Encoded in another batch or on another device: equal but for rounding.
            rounding = 1e-4 if wanted.dtype == torch.float32 else 2e-2
            if (
                found.shape != wanted.shape
                or (found.float() - wanted.float()).norm() > rounding * wanted.float().norm()
            ):
                return False
    return True


def _not_shared(store: TensorStore, what: str) -> str:
    return (
        f"{what} encoded by other processes are not in {str(store.folder)!r}. All processes must see the same cache "
        "folder: put it on a file system that the machines share."
    )


class _Chunks:
    """
    Keys of the images of `CHUNK` pairs at a time, stored as entries, too: a second run finds them without reading the
    images, and the processes of a run exchange them.

    An image's key has the size that it is brought to, so runs with buckets and without share what they have in common.
    """

    def __init__(self, images: ImagePreferenceDataset, image_fingerprint: str, dtype: str):
        self.images = images
        self._encoder = (image_fingerprint, dtype)
        self.flips = (False, True) if images.random_flip else (False,)
        self.starts = list(range(0, len(images), CHUNK))
        self._keys: dict[int, bytes] = {}
        # The dataset's fingerprint covers its contents, but a file can change under its path.
        paths = _columns_of_paths(images.dataset, images.image_columns)
        self._paths = images.dataset.select_columns(paths) if paths else None

    def _stamps(self, rows: np.ndarray) -> list[tuple]:
        """Returns path, size and modification time of the files that these rows name."""
        stamps = []
        for row in self._paths.select(rows) if self._paths is not None else ():
            for source in map(self.images.locate, row.values()):
                path = source if isinstance(source, str) else source["path"] if not source["bytes"] else None
                if path is None:
                    continue
                with contextlib.suppress(OSError):  # reading the row names a missing file
                    stat = os.stat(path)
                    stamps.append((path, stat.st_size, stat.st_mtime_ns))
        return stamps

    def indices(self, start: int) -> range:
        return range(start, min(start + CHUNK, len(self.images)))

    def key(self, start: int) -> bytes:
        if start not in self._keys:
            rows = self.images.rows[start : start + CHUNK]
            buckets = [self.images.size_of(i) for i in self.indices(start)] if self.images.buckets is not None else []
            self._keys[start] = make_key(
                "chunk",
                *self._image_part(self.images.size),
                self.flips,
                self.images.dataset._fingerprint,
                rows.tolist(),
                [self.images.columns(i)[0] for i in self.indices(start)],
                self._stamps(rows),
                *([buckets] if buckets else []),
            )
        return self._keys[start]

    def _image_part(self, size: tuple[int, int]) -> tuple:
        fingerprint, dtype = self._encoder
        return ("latents", fingerprint, size, dtype)

    def image_key(self, content: bytes, size: tuple[int, int], flip: bool) -> bytes:
        return make_key(*self._image_part(size), flip, content)

    def complete(self, start: int, store: TensorStore) -> bool:
        if self.key(start) not in store:
            return False
        return all(key.tobytes() in store for key in store.get(self.key(start))["keys"].numpy().reshape(-1, 32))

    def gather(self, store: TensorStore) -> tuple[np.ndarray, np.ndarray]:
        lacking = [start for start in self.starts if self.key(start) not in store]
        if lacking:
            raise RuntimeError(_not_shared(store, f"The latents of {len(lacking) * CHUNK} pairs"))
        entries = [store.get(self.key(start)) for start in self.starts]
        return tuple(torch.cat([entry[name] for entry in entries]).numpy() for name in ("keys", "sizes"))


def _encode_chunk(chunks, start, store, executor, encode_images, dtype, batch_size) -> None:
    images = chunks.images

    def load(index: int):
        """Returns where a pair is, and for each orientation its keys, its pixels if they are needed, and its size."""
        pair = images.pair(index)
        contents = pair.hashes()
        orientations = []
        for flip in chunks.flips:
            pair_keys = [chunks.image_key(content, pair.resolution, flip) for content in contents]
            pixels = pair.pixels(flip=flip) if any(key not in store for key in pair_keys) else None
            orientations.append((pair_keys, pixels, pair.size_conditioning(flip=flip)))
        return pair.where, orientations

    keys, sizes = [], []
    waiting: dict[tuple[int, int], dict[bytes, tuple]] = defaultdict(dict)  # by size, as a batch has one

    def encode(batch: list) -> None:
        latents = encode_images(normalize(np.stack([pixels for _, pixels, _ in batch]))).cpu()
        latents = latents.to(dtype or latents.dtype)
        for (key, _, where), latent in zip(batch, latents, strict=True):
            if not torch.isfinite(latent).all():
                raise ValueError(
                    f"{where}: its latents are not finite in {latent.dtype}. The VAE overflows: SDXL's own does in "
                    "float16. Load it in float32 or bfloat16, or use `madebyollin/sdxl-vae-fp16-fix`."
                )
            store.put(key, {"latents": latent})

    for where, orientations in executor.map(load, chunks.indices(start)):
        keys.append([pair_keys for pair_keys, _, _ in orientations])
        sizes.append([[*placed.original_size, *placed.crop_top_left] for _, _, placed in orientations])
        for pair_keys, pixels, _ in orientations:
            for side, key in enumerate(pair_keys):
                if key not in store:
                    same_size = waiting[pixels.shape[1:3]]
                    same_size.setdefault(key, (key, pixels[side], where[side]))
                    if len(same_size) == batch_size:
                        encode(list(waiting.pop(pixels.shape[1:3]).values()))
    for same_size in waiting.values():
        encode(list(same_size.values()))
    flat = np.frombuffer(b"".join(key for pair in keys for orientation in pair for key in orientation), dtype=np.uint8)
    store.put(
        chunks.key(start),
        {
            "keys": torch.from_numpy(flat.reshape(len(keys), len(chunks.flips), 2, 32).copy()),
            "sizes": torch.tensor(sizes, dtype=torch.int32),
        },
    )
