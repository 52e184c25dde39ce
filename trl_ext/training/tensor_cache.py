"""Tensors that are expensive to compute, kept on disk under what they follow from."""

import hashlib
import logging
from collections.abc import Callable
from pathlib import Path

import safetensors
import safetensors.torch
import torch

from .shards import is_intact, write_shard


logger = logging.getLogger(__name__)


class TensorCache:
    """
    Computes named tensors once. Each result is a file of its own, written atomically, so that an interrupted run
    resumes where it stopped and a damaged file is computed again.

    Args:
        folder (`str` or `Path`, *optional*):
            Where results are kept; created on first use. `None` keeps nothing.
    """

    def __init__(self, folder: str | Path | None):
        self.folder = None if folder is None else Path(folder).expanduser()
        self.num_computed = 0
        self.num_found = 0

    def __call__(self, compute: Callable[[], dict[str, torch.Tensor]], *key) -> dict[str, torch.Tensor]:
        """
        Returns what is kept under `key`, or the result of `compute`, which is kept.

        Args:
            compute (`Callable`):
                Returns tensors by name.
            key:
                Everything that the result depends on. Its `repr` counts.
        """
        digest = hashlib.sha256(repr(key).encode()).hexdigest()[:32]
        found = self._read(digest)
        if found is not None:
            self.num_found += 1
            return found
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in compute().items()}
        self.num_computed += 1
        if self.folder is not None:
            try:
                write_shard(self.folder, digest, ".safetensors", safetensors.torch.save(tensors))
            except OSError as error:
                logger.warning(f"Nothing can be kept in {self.folder} ({error}); this run continues without.")
                self.folder = None
        return tensors

    def _read(self, digest: str) -> dict[str, torch.Tensor] | None:
        if self.folder is None:
            return None
        for path in sorted(self.folder.glob(f"{digest}-*.safetensors")):
            try:
                content = path.read_bytes()
                if is_intact(path, content):
                    return safetensors.torch.load(content)
            except (OSError, safetensors.SafetensorError):
                pass
            logger.warning(f"{path} is damaged or cannot be read; its content is computed again.")
        return None
