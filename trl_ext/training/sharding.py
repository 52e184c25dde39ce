"""Parameters that FSDP2 shards: distributed tensors, of which every process holds a part."""

import contextlib
import os
from collections.abc import Iterator
from typing import Any

import torch
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor

from .._patches import generation_apart


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


@contextlib.contextmanager
def whole_weights(*models: Any) -> Iterator[None]:
    """
    Context in which every process holds all weights of models that FSDP2 shards, so that each may run them as often as
    it likes, alone. Every process must enter and leave it; it takes the memory of whole models, in the data type in
    which FSDP2 computes. Afterward the weights are sharded as before. Anything that is not sharded is left alone.

    Args:
        models (`torch.nn.Module`, any number):
            The models; what is no module is passed over.
    """
    modules = [model for model in models if isinstance(model, torch.nn.Module)]
    sharded = [module for model in modules for module in model.modules() if isinstance(module, FSDPModule)]
    kept = []
    with contextlib.ExitStack() as stack:
        for model in modules if sharded else ():
            stack.enter_context(generation_apart(model))
        # The model is the root of its shards, even if a part of it is the first to run.
        for model in modules:
            if isinstance(model, FSDPModule):
                model._get_fsdp_state()._lazy_init()
        try:
            for module in sharded:
                state = module._get_fsdp_state()
                groups = [(group, group.post_forward_mesh_info) for group in _parameter_groups(state)]
                kept.append((state, state._auto_reshard_after_forward, groups))
                module.set_reshard_after_forward(False, recurse=False)
                module.unshard()
            yield
        finally:
            for state, automatic, groups in kept:
                state._auto_reshard_after_forward = automatic
                for group, mesh_info in groups:
                    group.post_forward_mesh_info = mesh_info
                    # A backward gathers in the reverse order of the forwards since the last one, and this process may
                    # have run more of them than another.
                    group._post_forward_indices.clear()
                    group.comm_ctx.post_forward_order.clear()
            for module in sharded:
                module.reshard()


@contextlib.contextmanager
def loaded_by_every_process() -> Iterator[None]:
    """
    Context in which every process reads the weights of models. With `fsdp_cpu_ram_efficient_loading` in Transformers
    5.17 the main process alone does, and the others are sent their shards: those of a model that is not sharded would
    stay empty.
    """
    name = "FSDP_CPU_RAM_EFFICIENT_LOADING"
    before = os.environ.get(name)
    if before is not None:
        os.environ[name] = "false"
    try:
        yield
    finally:
        if before is not None:
            os.environ[name] = before


def _parameter_groups(state) -> list:
    """The groups of parameters that an FSDP2 module gathers at once; PyTorch had one a module at first."""
    groups = getattr(state, "_fsdp_param_groups", None)
    if groups is None:
        groups = [state._fsdp_param_group]
    return [group for group in groups if group is not None]
