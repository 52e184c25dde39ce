r"""
Cache of the reference's statistics on disk: computed once for a pair of responses and a reference, and reused by every
run that needs that pair and that reference.

The key of an entry contains exactly what its values depend on:

- the reference ([`~trl_ext.training.fingerprints.reference_fingerprint`]): its weights, its configuration, the adapter
  that is active in it, its dtype and quantization, and the precision of its forward. The path that it was loaded from
  does not count.
- the pair ([`pair_keys`], [`row_keys`]): the tokens that the model reads, after truncation, and which of them are the
  response. The dataset, the row, the padding and the batch do not count.

A run with another output folder, learning rate, beta or batch size therefore finds everything. A run with a longer
`max_length` computes the pairs that were truncated before, and a run with a larger dataset computes the new pairs.

On disk each reference has a folder with Arrow files in it, its shards ([`~trl_ext.training.shards`]). A shard holds
keys and statistics of some pairs. It is written atomically and never modified, so runs at the same time do not disturb
each other, and an interrupted run's shards are where the next one continues.
"""

import itertools
import logging
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
import xxhash
from accelerate.logging import get_logger
from accelerate.utils import gather_object, send_to_device
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from .._trl import DataCollatorForPreference
from ..training.fingerprints import FORMAT as _FORMAT
from ..training.shards import is_intact, write_shard
from .data import TOKENIZED_COLUMNS, ColumnCollator, list_column
from .scoring import NON_MODEL_KEYS, REFERENCE_COLUMNS, TokenStatistics


logger = get_logger(__name__)

_KEY_BYTES = 16

# A shard is written after so many pairs of a process, or so many seconds, whichever comes first: what an interruption
# costs, against the number of files.
SHARD_PAIRS = 1024
SHARD_SECONDS = 60.0

# Rows that are collated at once to compute their keys.
_HASHED_AT_ONCE = 64


def default_cache_dir() -> Path:
    """Default of `reference_cache_dir`: a folder next to the cache of `datasets`."""
    return Path(datasets.config.HF_DATASETS_CACHE) / "trl_ext" / "reference_cache"


# ---- What identifies a number ---------------------------------------------------------------------------------------


def pair_keys(batch: dict) -> tuple[list[bytes], list[int]]:
    """
    Key and length of every pair of a collated batch.

    Args:
        batch (`dict`):
            What the collator returns for `B` pairs: tensors whose first `B` rows are chosen and last `B` rejected.

    Returns:
        `tuple` of two lists of length `B`: 16 bytes that identify what the model is given of the pair, whatever the
        padding; and the number of tokens of the longer response with its prompt.
    """
    attended = batch["attention_mask"].bool().numpy()
    count = len(attended) // 2
    inputs = {name: value for name, value in batch.items() if name not in NON_MODEL_KEYS or name == "completion_mask"}

    def of_row(value, row):
        if not isinstance(value, torch.Tensor) or len(value) != 2 * count:
            return np.frombuffer(repr(value).encode(), dtype=np.uint8)  # of the whole batch: at worst not found again
        value = value.numpy()
        return value[row][attended[row]] if value.shape[:2] == attended.shape else value[row]

    rows = [{name: of_row(value, row) for name, value in inputs.items()} for row in range(2 * count)]
    lengths = attended.sum(axis=1)
    keys = [_key(rows[i], rows[i + count]) for i in range(count)]
    return keys, np.maximum(lengths[:count], lengths[count:]).tolist()


def row_keys(rows: datasets.Dataset, max_length: int | None, truncation_mode: str) -> tuple[list[bytes], list[int]]:
    """
    Equals [`pair_keys`] of the batches that [`~trl.DPOTrainer`]'s own collator builds from tokenized rows, but avoids
    Python integers, tensors and padding.
    """
    keys, lengths = [], []
    kept = slice(None)
    if max_length is not None:
        kept = slice(max_length) if truncation_mode == "keep_start" else slice(-max_length, None)
    for table in rows.select_columns(list(TOKENIZED_COLUMNS)).with_format("arrow").iter(batch_size=1000):
        prompts, *responses = (list_column(table[column]) for column in TOKENIZED_COLUMNS)
        for i in range(len(table)):
            prompt, *pair = (values[offsets[i] : offsets[i + 1]] for values, offsets in (prompts, *responses))
            sides = []
            for response in pair:
                ids = np.concatenate((prompt, response))[kept]
                mask = (np.arange(len(prompt) + len(response)) >= len(prompt))[kept]
                sides.append({"input_ids": ids, "attention_mask": np.ones_like(ids), "completion_mask": mask})
            keys.append(_key(*sides))
            lengths.append(max(len(side["input_ids"]) for side in sides))
    return keys, lengths


def _key(*sides: dict[str, np.ndarray]) -> bytes:
    digest = xxhash.xxh3_128(_FORMAT)
    for inputs in sides:
        for name in sorted(inputs):
            value = inputs[name]
            value = np.ascontiguousarray(value, dtype=np.int64 if value.dtype.kind in "bui" else None)
            digest.update(f"{name} {value.dtype.str} {value.shape} ".encode())
            digest.update(value.data)
    return digest.digest()


# ---- Shards on disk -------------------------------------------------------------------------------------------------


class ReferenceCache:
    """
    The shards of one reference.

    Args:
        folder (`Path`):
            Their folder. It need not exist.
        fingerprint (`str`):
            The reference's. A shard that names another one is not read.
    """

    def __init__(self, folder: Path, fingerprint: str):
        self.folder = Path(folder)
        self.fingerprint = fingerprint
        self._reported: set[Path | None] = set()

    def read(self, keys: list[bytes], columns: list[str]) -> np.ndarray:
        """
        Returns the cached statistics of the pairs.

        Args:
            keys (`list[bytes]`):
                Keys of the pairs.
            columns (`list[str]`):
                Names of the statistics. A shard without one of them is passed over.

        Returns:
            `np.ndarray` of shape `(len(keys), len(columns))`, float32: NaN where nothing is known. Of a pair that is
            there more than once, the oldest numbers.
        """
        values = np.full((len(keys), len(columns)), np.nan, dtype=np.float32)
        tables = [self._load(path) for path in sorted(self.folder.glob("*.arrow"))]
        tables = [t.select(["key", *columns]) for t in tables if t is not None and {*columns} <= {*t.column_names}]
        if tables:
            table = pa.concat_tables(tables).combine_chunks()
            known = table["key"].combine_chunks() if table.num_rows else pa.array([], pa.binary(_KEY_BYTES))
            places = pc.index_in(pa.array(keys, pa.binary(_KEY_BYTES)), value_set=known)
            found = places.is_valid().to_numpy(zero_copy_only=False)
            places = places.drop_null()
            for i, column in enumerate(columns):
                values[found, i] = table[column].take(places).to_numpy()
        return values

    def write(self, keys: list[bytes], values: np.ndarray, columns: list[str]) -> None:
        """
        Adds a shard. Values that are not finite are left out, since they indicate an error.

        If the disk cannot be written to, a warning is logged: the numbers are in memory, so the run does not need the
        file.
        """
        finite = np.isfinite(values).all(axis=1)
        if not finite.any():
            return
        keys = [key for key, kept in zip(keys, finite, strict=True) if kept]
        table = pa.table(
            [
                pa.array(keys, pa.binary(_KEY_BYTES)),
                *(pa.array(column) for column in values[finite].T.astype(np.float32)),
            ],
            names=["key", *columns],
        )
        table = table.replace_schema_metadata({"format": _FORMAT, "reference": self.fingerprint})
        content = pa.BufferOutputStream()
        with pa.ipc.new_file(content, table.schema) as writer:
            writer.write_table(table)
        # The name begins with the time, so that the oldest numbers of a pair stay the ones that are read.
        name = f"{time.time_ns():020d}-{uuid.uuid4().hex[:8]}"
        try:
            write_shard(self.folder, name, ".arrow", content.getvalue())
        except OSError as error:
            if None not in self._reported:
                self._reported.add(None)
                logger.warning(
                    f"The reference's statistics cannot be kept in {self.folder} ({error}). This run goes on without; "
                    "the next one computes them again. Give a writable `reference_cache_dir`.",
                    main_process_only=False,
                )

    def _load(self, path: Path) -> pa.Table | None:
        """
        Reads a shard's table. Returns `None`, with a warning, if the file is damaged or belongs to another reference.
        """
        try:
            content = path.read_bytes()
            table = pa.ipc.open_file(pa.BufferReader(content)).read_all()
            metadata = table.schema.metadata or {}
            if metadata.get(b"format") != _FORMAT:
                reason = "it is not a shard of this cache"
            elif metadata.get(b"reference") != self.fingerprint.encode():
                reason = "it belongs to another reference"
            elif not is_intact(path, content):
                reason = "its checksum does not match its contents"
            else:
                return table
        except FileNotFoundError:  # removed by another process
            return None
        except (OSError, pa.ArrowException, TypeError, ValueError) as error:
            reason = f"it cannot be read: {error}"
        if path not in self._reported:
            self._reported.add(path)
            logger.warning(
                f"{path} is not used: {reason}. The pairs it may have held are computed anew. Delete the file.",
                main_process_only=False,
            )
        return None


# ---- Found or computed ----------------------------------------------------------------------------------------------


def add_reference_statistics(
    dataset: datasets.Dataset,
    name: str,
    *,
    rows: datasets.Dataset,
    statistics: tuple[str, ...],
    reference,
    score: Callable[[dict], TokenStatistics],
    collator: Callable[[list[dict]], dict],
    accelerator,
    folder: str | Path | None = None,
    batch_size: int = 1,
    num_workers: int = 0,
    pin_memory: bool = False,
    show_progress: bool = True,
) -> datasets.Dataset:
    """
    Returns the dataset with the columns of the reference's statistics: found in the cache, or computed.

    The work is divided over the processes, the longest pairs first, so that a batch that does not fit in memory fails
    at once. Each process writes its own shards. What is known is exchanged in memory, so nodes need not share a disk,
    and nodes that do not each find their own part again.

    Args:
        dataset ([`~datasets.Dataset`]):
            Tokenized pairs.
        name (`str`):
            Name of the split, for messages.
        rows ([`~datasets.Dataset`]):
            The same pairs with only the columns that the collator reads.
        statistics (`tuple[str, ...]`):
            What to add, of [`REFERENCE_STATISTICS`].
        reference ([`Reference`]):
            The reference; it must still be available if pairs are missing from the cache.
        score (`Callable`):
            Scores a batch under it.
        collator (`Callable`):
            Makes a batch of rows.
        accelerator ([`~accelerate.Accelerator`]):
            Accelerator of the processes that share the work.
        folder (`str` or `Path`, *optional*):
            Folder of the cache, [`default_cache_dir`] by default.
        batch_size (`int`, *optional*, defaults to `1`):
            Pairs in a batch of one process.
        num_workers (`int`, *optional*, defaults to `0`), pin_memory (`bool`, *optional*, defaults to `False`):
            Passed to the data loader.
        show_progress (`bool`, *optional*, defaults to `True`):
            Show a progress bar and a line on what was found.

    Raises:
        `ValueError`: If something must be computed, and the reference is no longer there.
        `FloatingPointError`: If a statistic is not finite.
    """
    columns = [column for statistic in statistics for column in REFERENCE_COLUMNS[statistic]]
    fingerprint = reference.fingerprint()
    cache = ReferenceCache(Path(folder or default_cache_dir()).expanduser() / fingerprint, fingerprint)
    keys, lengths = _hash(rows, collator, accelerator)

    values = _read(cache, keys, columns, accelerator)
    missing = np.flatnonzero(np.isnan(values).any(axis=1))
    found = len(keys) - len(missing)
    _report(_summary(name, len(keys), found, cache.folder), show_progress and accelerator.is_main_process)
    if len(missing):
        reference.require(name, len(missing))
        order = missing[np.argsort(-lengths[missing], kind="stable")]
        # The longest pairs first; sharded references run in step, so every process has as many, the last of some
        # twice.
        count = -(-len(order) // accelerator.num_processes)
        places = (accelerator.process_index + accelerator.num_processes * np.arange(count)) % len(order)
        mine = order[places]
        loader = DataLoader(
            rows.select(mine),
            batch_size=batch_size,
            collate_fn=collator,
            num_workers=num_workers,
            pin_memory=pin_memory,
            generator=torch.Generator(),  # or it draws from the global one, and a full cache would change the training
        )
        quiet = {} if show_progress and accelerator.is_main_process else {"disable": True}
        progress = tqdm(total=len(keys), initial=found, unit="pair", desc=f"Reference of the {name} dataset", **quiet)
        with progress, reference.before_training():
            scored = _compute(score, loader, statistics, accelerator)
            own = _write_shards(cache, scored, [keys[i] for i in mine], columns, progress, accelerator.num_processes)
        computed = np.empty((len(order), len(columns)), dtype=np.float32)
        for theirs, part in gather_object([(places, own)]):
            computed[theirs] = part
        if not np.isfinite(computed).all():
            bad = order[~np.isfinite(computed).all(axis=1)]
            raise FloatingPointError(
                f"The reference's statistics {columns} of {len(bad)} pair(s) of the {name} dataset are not finite: "
                f"rows {', '.join(map(str, np.sort(bad)[:10]))}{', ...' if len(bad) > 10 else ''} (after "
                "preparation). The reference's weights or activations are not finite on them. Look at its weights, or "
                "use bf16 or fp32 rather than fp16."
            )
        # Use what a later run will read, in case another run has written these pairs first.
        values = _read(cache, keys, columns, accelerator)
        missing = np.isnan(values[order]).any(axis=1)
        values[order[missing]] = computed[missing]
    with accelerator.local_main_process_first():  # a filtered dataset is written out, once a node
        for i, column in enumerate(columns):
            dataset = dataset.add_column(column, values[:, i])
    return dataset


def _hash(rows: datasets.Dataset, collator, accelerator) -> tuple[list[bytes], np.ndarray]:
    """Keys and lengths of all pairs; each process hashes its part."""
    bounds = [len(rows) * i // accelerator.num_processes for i in range(accelerator.num_processes + 1)]
    start, end = bounds[accelerator.process_index : accelerator.process_index + 2]
    rows = rows.select(range(start, end))
    if isinstance(collator, ColumnCollator):
        collator = collator.collator  # whose columns no model is given
    if type(collator) is DataCollatorForPreference and collator.truncation_mode in ("keep_start", "keep_end"):
        keys, lengths = row_keys(rows, collator.max_length, collator.truncation_mode)
    else:
        keys, lengths = [], []
        remaining = iter(rows)
        while chunk := list(itertools.islice(remaining, _HASHED_AT_ONCE)):
            more_keys, more_lengths = pair_keys(collator(chunk))
            keys += more_keys
            lengths += more_lengths
    keys, lengths = gather_object(keys), gather_object(lengths)
    return keys, np.array(lengths, dtype=np.int64)


def _read(cache: ReferenceCache, keys: list[bytes], columns: list[str], accelerator) -> np.ndarray:
    """Gathers the cached values of all nodes: one process per node reads, and every process gets the same result."""
    here = [cache.read(keys, columns)] if accelerator.is_local_main_process else []
    first, *others = gather_object(here)
    for values in others:
        unknown = np.isnan(first).any(axis=1)
        first[unknown] = values[unknown]
    return first


def _compute(score, loader: DataLoader, statistics: tuple[str, ...], accelerator) -> Iterator[np.ndarray]:
    """The statistics of each batch, `(pairs, 2 * len(statistics))`."""
    for batch in loader:
        with accelerator.autocast():
            scored = score(send_to_device(batch, accelerator.device))
        sides = [side for statistic in statistics for side in scored.per_response(statistic).chunk(2)]
        yield torch.stack(sides, dim=1).float().cpu().numpy()


def _write_shards(
    cache: ReferenceCache,
    scored: Iterable[np.ndarray],
    keys: list[bytes],
    columns: list[str],
    progress,
    processes: int,
) -> np.ndarray:
    """Writes statistics to the cache as they are computed, in the order of `keys`, and returns them all."""
    shard: list[np.ndarray] = []
    done, written, last_write = [], 0, time.monotonic()

    def write() -> None:
        nonlocal written, last_write
        if shard:
            batch = np.concatenate(shard)
            cache.write(keys[written : written + len(batch)], batch, columns)
            written, last_write = written + len(batch), time.monotonic()
            shard.clear()

    try:
        for values in scored:
            shard.append(values)
            done.append(values)
            progress.update(min(len(values) * processes, progress.total - progress.n))
            if sum(map(len, shard)) >= SHARD_PAIRS or time.monotonic() - last_write > SHARD_SECONDS:
                write()
    finally:
        write()  # what was computed before an error or Ctrl-C, too
    return np.concatenate(done)


def _summary(name: str, count: int, found: int, folder: Path) -> str:
    head = f"Reference statistics of the {name} dataset:"
    if found == count:
        return f"{head} all {count} pairs found in {folder}."
    if found:
        return f"{head} resuming with {found} of {count} pairs found in {folder}, computing {count - found}."
    return f"{head} computing {count} pairs, kept in {folder}."


def _report(line: str, show: bool) -> None:
    """Logs a line, and shows it where progress bars are shown."""
    logger.info(line)
    if show and not logger.isEnabledFor(logging.INFO):
        tqdm.write(line)
