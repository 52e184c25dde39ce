"""Models whose parameters are spread over processes: FSDP2, DeepSpeed ZeRO-3."""

import importlib.util
import json
import os
from pathlib import Path

import harness
import pytest
from launching import fork, launch
from methods import PRIMARY
from test_method_suite import result, script


TESTS = Path(__file__).parent

ZERO3 = {
    # Tiny parameters would otherwise stay whole on every process.
    "zero_optimization": {
        "stage": 3,
        "stage3_param_persistence_threshold": 0,
        "stage3_model_persistence_threshold": 0,
    },
    "train_micro_batch_size_per_gpu": "auto",
    "train_batch_size": "auto",
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "zero_allow_untested_optimizer": True,
}


@pytest.mark.parametrize("head", ["frozen", "trained"])
def test_sharded_heads(head):
    """
    FSDP2: both models' heads sharded, in two processes: values, gradients, and at most one head gathered by hand.
    """
    printed = fork(TESTS / "scripts" / "sharded_heads.py", head)
    assert printed.count("sharded heads agree") == 2


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="needs deepspeed: pip install deepspeed")
@pytest.mark.parametrize("method", PRIMARY, ids=lambda method: method.id)
def test_zero3(method, tiny_folder, tmp_path, monkeypatch):
    """
    ZeRO-3 in two processes logs what two processes with whole models log. DeepSpeed compiles a communication module at
    its first run: `pip install deepspeed`, then `DS_ACCELERATOR=cpu pytest tests/test_sharded.py --runslow`.
    """
    monkeypatch.setitem(os.environ, "DS_ACCELERATOR", "cpu")
    (tmp_path / "zero3.json").write_text(json.dumps(ZERO3))
    (tmp_path / "zero3.yaml").write_text(
        "compute_environment: LOCAL_MACHINE\n"
        f"deepspeed_config: {{deepspeed_config_file: {tmp_path / 'zero3.json'}, zero3_init_flag: true}}\n"
        "distributed_type: DEEPSPEED\nnum_machines: 1\nnum_processes: 2\nuse_cpu: true\n"
    )
    options = dict(per_device_train_batch_size=2, max_steps=3)
    launch(*script(method, tiny_folder, tmp_path / "whole", **options))
    launch(*script(method, tiny_folder, tmp_path / "sharded", **options), config=tmp_path / "zero3.yaml")
    (_, whole), (weights, sharded) = result(tmp_path / "whole"), result(tmp_path / "sharded")
    assert (whole["distributed"], sharded["distributed"]) == ("MULTI_CPU", "DEEPSPEED")
    assert all(weight.numel() == 0 for weight in weights.values())  # between steps a process holds no whole weight
    harness.assert_same_logs(whole["logs"], sharded["logs"], rtol=1e-3, atol=1e-4)
