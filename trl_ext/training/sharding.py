"""Parameters that FSDP2 shards: distributed tensors, of which every process holds a part."""

import torch
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor


def whole(tensor):
    """A tensor's value, gathered from all processes if it is sharded; then every process must call it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def is_sharded(model: torch.nn.Module) -> bool:
    """Whether a process holds only parts of some of a model's parameters, under FSDP2 or DeepSpeed ZeRO-3."""
    return any(isinstance(parameter, DTensor) or hasattr(parameter, "ds_id") for parameter in model.parameters())


def sharded_like(value: torch.Tensor, tensor: torch.Tensor) -> torch.Tensor:
    """A whole `value` as `tensor` is: on its device, and sharded if it is."""
    value = value.to(tensor.device)
    return distribute_tensor(value, tensor.device_mesh, tensor.placements) if isinstance(tensor, DTensor) else value


def reshard(model: torch.nn.Module) -> None:
    """Has every parameter of `model` sharded again. FSDP2 leaves some whole after a forward without a backward."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
