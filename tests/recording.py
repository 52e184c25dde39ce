"""What a computation costs, from the operations that PyTorch runs."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class Recorder(TorchDispatchMode):
    """Multiply-adds of the GEMMs, and the largest tensor that any operation made."""

    def __init__(self):
        super().__init__()
        self.multiplications, self.largest, self.weight_casts = 0, 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if name in ("mm", "addmm", "addmm_"):
            a, b = [x for x in args if isinstance(x, torch.Tensor)][-2:]
            self.multiplications += a.numel() * b.shape[-1]
        if name == "_to_copy" and out.dtype == torch.float32 and out.shape == (32, 8):
            self.weight_casts += 1
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, torch.Tensor):
                self.largest = max(self.largest, tensor.numel())
        return out
