"""
A real vLLM, its CPU build, in the training process: `python tests/versions.py vllm` makes its environment, in which
alone it can be installed, and runs these tests there. They take two minutes each, most of it vLLM's import.
"""

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from launching import TIMEOUT, environment


TESTS = Path(__file__).resolve().parent.parent
ENVIRONMENT = TESTS.parent / ".versions" / "vllm" / "bin" / "python"

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def python() -> str:
    if find_spec("vllm") is not None:
        return sys.executable
    if not ENVIRONMENT.exists():
        pytest.skip("no environment with vLLM: python tests/versions.py vllm")
    return str(ENVIRONMENT)


@pytest.fixture(scope="module")
def smollm() -> str:
    """A real small model, as vLLM cannot run the tests' tiny one."""
    sys.path.insert(0, str(TESTS.parent / "recipes"))
    try:
        from quickstart_model import cache_root

        folders = sorted(cache_root().glob("SmolLM2-135M-Instruct*/config.json"))
    finally:
        sys.path.pop(0)
    if not folders:
        pytest.skip("no SmolLM2-135M in the cache: python recipes/quickstart.py")
    return str(folders[0].parent)


@pytest.mark.parametrize("method", ["d2po", "plain_grpo", "dph_rl", "fdpg", "wro"])
def test_trains_with_vllm(method, python, smollm, tmp_path):
    """
    Two steps with a LoRA whose weights vLLM is sent. Before and after them: greedy completions are those of
    Transformers, log-probabilities of sampled tokens agree with a plain forward to float32, a seed repeats its
    sample, and a stop string and a stop token end a completion. Training changes what vLLM says as it changes the policy.
    """
    command = [python, str(TESTS / "scripts" / "sample_with_vllm.py"), method, smollm, str(tmp_path)]
    env = dict(environment(), VLLM_CPU_KVCACHE_SPACE="1")
    done = subprocess.run(
        command, env=env, timeout=2 * TIMEOUT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert done.returncode == 0, done.stdout[-4000:]
    result = json.loads(Path(tmp_path, "result.json").read_text())
    assert result["steps"] == 2
    for state in (result["before"], result["after"]):
        assert state["greedy"] == state["own_greedy"]
        for given, own in zip(state["logprobs"], state["own_logprobs"], strict=True):
            assert given == pytest.approx(own, abs=2e-3)
        assert state["sampled"] == state["sampled_again"]
        assert len(state["greedy"][0]) > 3 and state["stopped"] == [3, 3]
    assert result["after"]["greedy"] != result["before"]["greedy"]
    # The policy has moved on the tokens that it gave at the start, by more than what vLLM's may differ.
    moved = [
        abs(a - b)
        for x, y in zip(result["moved"], result["before"]["own_logprobs"], strict=True)
        for a, b in zip(x, y, strict=True)
    ]
    assert max(moved) > 2e-2
