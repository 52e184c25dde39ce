"""Results on disk: computed once, found again whole, computed again where a file is damaged."""

import torch

from trl_ext.training.tensor_cache import TensorCache


def test_found_again_and_damage(tmp_path):
    calls = []

    def compute():
        calls.append(1)
        return {"values": torch.arange(3.0, dtype=torch.float64) / 3, "ids": torch.tensor([[1, 2]])}

    first = TensorCache(tmp_path)(compute, "model", 3)
    again = TensorCache(tmp_path)
    for _ in range(2):
        found = again(compute, "model", 3)
        assert all(torch.equal(found[name], first[name]) and found[name].dtype == first[name].dtype for name in first)
    assert len(calls) == 1 and (again.num_found, again.num_computed) == (2, 0)
    again(compute, "model", 4)
    assert len(calls) == 2
    path = sorted(tmp_path.glob("*.safetensors"), key=lambda p: p.stat().st_mtime_ns)[0]
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    again(compute, "model", 3)
    assert len(calls) == 3
    (tmp_path / ".partial.safetensors").write_bytes(b"killed while writing")
    again(compute, "model", 4)
    assert len(calls) == 3


def test_without_a_folder(tmp_path):
    calls = []
    cache = TensorCache(None)
    for _ in range(2):
        cache(lambda: calls.append(1) or {"x": torch.ones(1)}, "key")
    assert len(calls) == 2
    (tmp_path / "file").write_text("")
    unwritable = TensorCache(tmp_path / "file")
    assert torch.equal(unwritable(lambda: {"x": torch.ones(1)}, "key")["x"], torch.ones(1))
