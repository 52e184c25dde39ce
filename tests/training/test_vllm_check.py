"""
vLLM's CPU build, and a server for a policy that is not on CUDA, are refused before a model is loaded; without vLLM,
TRL says so. D2PO: `d2po/test_vllm.py`.
"""

import sys
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace

import pytest
import sampling
import torch

from trl_ext.training.vllm import check_vllm


@pytest.fixture
def build(monkeypatch):
    def install(is_cpu: bool):
        module, package = ModuleType("vllm.platforms"), ModuleType("vllm")
        package.__spec__ = ModuleSpec("vllm", None)  # which says that it is installed
        module.current_platform = SimpleNamespace(is_cpu=lambda: is_cpu)
        monkeypatch.setitem(sys.modules, "vllm", package)
        monkeypatch.setitem(sys.modules, "vllm.platforms", module)

    return install


CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


def test_only_the_cpu_build_in_the_process(build):
    build(is_cpu=True)
    check_vllm("server", CUDA)
    with pytest.raises(ValueError, match="use_vllm"):
        check_vllm("colocate", CPU)
    build(is_cpu=False)
    check_vllm("colocate", CUDA)


def test_a_server_takes_weights_from_cuda_alone(build):
    build(is_cpu=False)
    with pytest.raises(ValueError, match="`vllm_mode='server'`.*NCCL.*'cpu'"):
        check_vllm("server", CPU)


def test_without_vllm(monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)
    check_vllm("colocate", CPU)


@pytest.mark.parametrize("mode", ["colocate", "server"])
@pytest.mark.parametrize("method", sampling.ROLLOUTS, ids=lambda method: method.id)
def test_rollouts_refuse_it(method, mode, build, tmp_path):
    build(is_cpu=True)
    with pytest.raises(ValueError, match="use_vllm" if mode == "colocate" else "NCCL"):
        sampling.trainer(method, "no/such-model", tmp_path, use_vllm=True, vllm_mode=mode)
