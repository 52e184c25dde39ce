"""
Files of a cache, its shards: there in full or not at all, never changed, and not believed once a bit of them has changed.

A shard's name ends with the checksum of its bytes. So the whole of it is covered, whatever its format, headers included, and it
can be checked without being parsed.
"""

import contextlib
import hashlib
import os
from pathlib import Path

import xxhash


def write_shard(folder: Path, name: str, suffix: str, content) -> Path:
    """
    Writes a shard aside, synchronizes it and renames it, so that no reader ever sees part of it.

    Args:
        folder (`Path`):
            Its folder; made if it does not exist. Names with a dot in front are files that are being written, or were when
            their process died.
        name (`str`):
            What its name begins with. Must be unique: two processes that write the same name write to the same file.
        suffix (`str`):
            What its name ends with, after the checksum.
        content (bytes-like):
            All of it.

    Returns:
        `Path` of the file.

    Raises:
        `OSError`: If it cannot be written. Nothing is left of it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}-{xxhash.xxh3_128_hexdigest(content)}{suffix}"
    temporary = folder / f".{path.name}"
    try:
        # By hand and not by a format's own function, some of whose files only their owner may read: a cache can be a team's.
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
    Whether a shard's bytes are those that were written.

    Args:
        path (`Path`):
            The shard.
        content (bytes-like, *optional*):
            Its bytes, if they have been read already.

    Raises:
        `OSError`: If it cannot be read.
    """
    if content is None:
        with open(path, "rb") as file:
            found = hashlib.file_digest(file, xxhash.xxh3_128).hexdigest()
    else:
        found = xxhash.xxh3_128_hexdigest(content)
    return path.stem.rpartition("-")[2] == found


def _sync_folder(folder: Path) -> None:
    """Makes a rename survive a power cut, where the system lets folders be synchronized."""
    if os.name != "posix":
        return
    with contextlib.suppress(OSError):  # some network file systems refuse; the file itself is there
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
