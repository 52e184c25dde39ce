"""
Training engines that spread a model over processes, on CPUs: FSDP2 and DeepSpeed ZeRO.

Accelerate 1.15 shards on accelerators only: with `use_cpu`, FSDP is silently plain data parallelism. So the runs of
these tests have it shard on CPUs too, and every run counts the parameters that are sharded.
"""

import contextlib
import importlib.util
import json
import os
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor


TESTS = Path(__file__).resolve().parent
SCRIPT = TESTS / "scripts" / "run_engine.py"
needs_deepspeed = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="needs deepspeed: pip install deepspeed"
)


def shard_on_cpus() -> None:
    """Has Accelerate take FSDP on CPUs for what it is."""
    construct = AcceleratorState.__init__

    def __init__(self, *args, fsdp_plugin=None, **kwargs):
        construct(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None and self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP
            self.fsdp_plugin = fsdp_plugin

    AcceleratorState.__init__ = __init__


def start(engine: str) -> None:
    """Prepares a process of a test for an engine, before it makes a trainer."""
    if engine in ("fsdp2", "launched"):  # without effect unless FSDP is asked for
        shard_on_cpus()
    elif engine != "none":
        import deepspeed

        os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"  # as the launcher does
        deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False)


def arguments_of(engine: str, layers: list[str]) -> dict:
    """Training arguments that choose an engine: `fsdp2`, `zero2` or `zero3`."""
    if engine in ("none", "launched"):
        return {}
    if engine == "fsdp2":
        return {"fsdp": True, "fsdp_config": {"version": 2, "transformer_layer_cls_to_wrap": layers}}
    zero = {"stage": int(engine[-1])}
    if engine == "zero3":
        # Tiny parameters would otherwise stay whole on every process.
        zero |= {"stage3_param_persistence_threshold": 0, "stage3_model_persistence_threshold": 0}
        zero |= {"stage3_gather_16bit_weights_on_model_save": True}
    auto = ("train_micro_batch_size_per_gpu", "train_batch_size", "gradient_accumulation_steps", "gradient_clipping")
    return {
        "deepspeed": {"zero_optimization": zero, "zero_allow_untested_optimizer": True, **dict.fromkeys(auto, "auto")}
    }


def is_sharded(parameter: torch.Tensor) -> bool:
    return isinstance(parameter, DTensor) or hasattr(parameter, "ds_id")


@contextlib.contextmanager
def whole(parameter: torch.Tensor):
    """The value of a parameter, gathered from all processes. All of them must ask."""
    if isinstance(parameter, DTensor):
        yield parameter.full_tensor()
    elif hasattr(parameter, "ds_id"):
        import deepspeed

        with deepspeed.zero.GatheredParameters([parameter]):
            yield parameter
    else:
        yield parameter


def weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    gathered = {}
    for name, parameter in model.named_parameters():
        with whole(parameter) as value:
            gathered[name] = value.detach().cpu().clone()
    return gathered


def result(folder) -> tuple[dict, dict]:
    """Weights and logs of a run."""
    folder = Path(folder)
    return load_file(folder / "weights.safetensors"), json.loads((folder / "result.json").read_text())
