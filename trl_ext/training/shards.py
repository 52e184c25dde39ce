"""
Append-only cache shards: written atomically, never modified, ignored if their checksum no longer matches.

A shard's name ends with the checksum of its bytes. The checksum therefore covers the whole file, headers included,
whatever its format, and can be verified without parsing.
"""

import contextlib
import hashlib
import os
from pathlib import Path

import xxhash


def write_shard(folder: Path, name: str, suffix: str, content) -> Path:
    """
    Writes a shard to a temporary file, syncs it to disk and renames it, so that no reader ever sees a part of it.

    Args:
        folder (`Path`):
            The shard's folder; created if it does not exist. Files whose names begin with a dot are being written, or
            were when their process died.
        name (`str`):
            Beginning of the file name. It must be unique: two processes that use the same name write to the same file.
        suffix (`str`):
            End of the file name, after the checksum.
        content (bytes-like):
            The shard's whole content.

    Returns:
        `Path` of the file.

    Raises:
        `OSError`: If the shard cannot be written. No partial file remains.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}-{xxhash.xxh3_128_hexdigest(content)}{suffix}"
    temporary = folder / f".{path.name}"
    try:
        # Written here rather than by a format's own writer, since some create files only their owner can read; caches
        # are shared.
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
    _sync_folder(folder)
    return path


def is_intact(path: Path, content=None) -> bool:
    """
    Whether a shard's bytes still match the checksum in its name.

    Args:
        path (`Path`):
            The shard.
        content (bytes-like, *optional*):
            Its bytes, if they have been read already.

    Raises:
        `OSError`: If the shard cannot be read.
    """
    if content is None:
        with open(path, "rb") as file:
            found = hashlib.file_digest(file, xxhash.xxh3_128).hexdigest()
    else:
        found = xxhash.xxh3_128_hexdigest(content)
    return path.stem.rpartition("-")[2] == found


def _sync_folder(folder: Path) -> None:
    """Syncs a folder, so that a rename survives a power cut, if the file system supports it."""
    if os.name != "posix":
        return
    with contextlib.suppress(OSError):  # some network file systems refuse; the file itself is there
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
