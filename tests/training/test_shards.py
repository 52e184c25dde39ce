"""Files of a cache: in full or not at all, and not believed once a bit of them has changed."""

import os

import pytest

from trl_ext.training.shards import is_intact, write_shard


def test_every_bit_counts(tmp_path):
    """
    A shard is made with its folder, readable as its folder is, and no longer intact if any bit of it or its length
    changes.
    """
    content = bytes(range(64))
    path = write_shard(tmp_path / "new" / "folder", "0-name", ".bin", memoryview(content))
    assert path.read_bytes() == content and path.name.startswith("0-name-") and path.suffix == ".bin"
    assert is_intact(path) and is_intact(path, content)
    assert list(path.parent.iterdir()) == [path]
    for place in range(len(content)):
        for bit in range(8):
            changed = bytearray(content)
            changed[place] ^= 1 << bit
            assert not is_intact(path, bytes(changed))
    path.write_bytes(changed)
    assert not is_intact(path)
    for other in (content[:-1], content + b"\0", b""):
        path.write_bytes(other)
        assert not is_intact(path) and not is_intact(path, other)


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_nothing_is_left_of_what_could_not_be_written(step, tmp_path, monkeypatch):
    """Nor is anything in its place before all of it is on disk."""

    def fail(*args):
        assert [path.name[0] for path in tmp_path.iterdir()] == ["."]
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, step, fail)
    with pytest.raises(OSError, match="No space left"):
        write_shard(tmp_path, "name", ".bin", b"content")
    assert list(tmp_path.iterdir()) == []


def test_a_file_system_that_does_not_synchronise_folders(tmp_path, monkeypatch):
    """The file is there all the same."""
    original = os.fsync

    def refuse_folders(descriptor):
        if os.path.isdir(f"/proc/self/fd/{descriptor}"):
            raise OSError(22, "Invalid argument")
        original(descriptor)

    monkeypatch.setattr(os, "fsync", refuse_folders)
    assert is_intact(write_shard(tmp_path, "name", ".bin", b"content"))
