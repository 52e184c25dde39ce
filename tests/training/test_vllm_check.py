"""vLLM's CPU build is refused before a model is loaded; without vLLM, TRL says so. D2PO: `d2po/test_vllm.py`."""

import sys
from types import ModuleType, SimpleNamespace

import pytest
import sampling

from trl_ext.training.vllm import check_vllm


@pytest.fixture
def build(monkeypatch):
    def install(is_cpu: bool):
        module = ModuleType("vllm.platforms")
        module.current_platform = SimpleNamespace(is_cpu=lambda: is_cpu)
        monkeypatch.setitem(sys.modules, "vllm", ModuleType("vllm"))
        monkeypatch.setitem(sys.modules, "vllm.platforms", module)

    return install


def test_only_the_cpu_build_in_the_process(build):
    build(is_cpu=True)
    check_vllm("server")
    with pytest.raises(ValueError, match="use_vllm"):
        check_vllm("colocate")
    build(is_cpu=False)
    check_vllm("colocate")


def test_without_vllm(monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)
    check_vllm("colocate")


@pytest.mark.parametrize("method", sampling.ROLLOUTS, ids=lambda method: method.id)
def test_rollouts_refuse_it(method, build, tmp_path):
    build(is_cpu=True)
    with pytest.raises(ValueError, match="use_vllm"):
        sampling.trainer(method, "no/such-model", tmp_path, use_vllm=True)
