"""The path through TRL's vLLM class, with a stand-in for it: what is handed over, and when the weights are sent."""

import inspect
import sys
from types import SimpleNamespace

import online
import pytest
from online import CountedLabeller
from trl.generation.vllm_generation import VLLMGeneration

from trl_ext import _trl
from trl_ext.d2po import build, generation
from trl_ext.training import vllm


class StandIn:
    """Takes what TRL's class takes and samples as a fixed rule says."""

    def __init__(self, **settings):
        inspect.signature(VLLMGeneration.__init__).bind(None, **settings)
        self.settings = settings
        self.synced, self.calls = [], []

    def sync_weights(self):
        model = self.settings["model"]
        self.synced.append(model.active_adapter)

    def generate(self, prompts, images, num_generations, profiler=None):
        assert images is None and len(prompts) % num_generations == 0
        assert all(prompts[i] == prompts[i - i % num_generations] for i in range(len(prompts)))
        self.calls.append(len(prompts))
        # The second of two ends early; vLLM gives the EOS token, which is 1 here, with the others.
        sampled = [[20 + i, 30, 40 + i] + ([1] if i % 2 else []) for i in range(len(prompts))]
        return prompts, sampled, None, None


def test_vllm_class_of_trl():
    """TRL's class still has the methods and the results that are used."""
    assert list(inspect.signature(VLLMGeneration.generate).parameters)[1:4] == ["prompts", "images", "num_generations"]
    assert not list(inspect.signature(VLLMGeneration.sync_weights).parameters)[1:]
    assert "(prompt_ids, completion_ids, logprobs, logprob_token_ids)" in VLLMGeneration.generate.__doc__


def test_sampling_with_vllm(tiny_folder, tmp_path, monkeypatch):
    """
    Each prompt stands there once a completion; the settings arrive; the weights are sent once a window, with the
    policy's adapter active; completions are the tokens that came back, the EOS token included and none added.
    """
    monkeypatch.setattr(generation, "load_vllm_generation", lambda: StandIn)
    monkeypatch.setattr(build, "check_vllm", lambda *args: None)  # which refuses a server on a CPU
    trainer = online.trainer(
        tiny_folder,
        tmp_path,
        labeller=CountedLabeller(),
        max_steps=4,
        use_vllm=True,
        vllm_mode="server",
        vllm_server_base_url="http://localhost:1",
        temperature=0.7,
        generation_kwargs={"repetition_penalty": 1.2, "stop": ["x"]},
    )
    trainer.train()
    vllm = trainer.sampler.vllm
    assert vllm.synced == ["default", "default"] and vllm.calls == [16, 16]
    settings = vllm.settings
    assert settings["mode"] == "server" and settings["server_base_url"] == "http://localhost:1"
    assert settings["temperature"] == 0.7 and settings["repetition_penalty"] == 1.2
    assert settings["generation_kwargs"] == {"stop": ["x"]} and settings["max_completion_length"] == 8
    entry = trainer.gold.entries[0]
    ids = [entry["completion_a_ids"], entry["completion_b_ids"]]
    assert sorted(len(sequence) for sequence in ids) == [3, 4] and sum(sequence[-1] == 1 for sequence in ids) == 1


@pytest.mark.parametrize("installed", [False, True])
@pytest.mark.parametrize(
    "given, message",
    [
        ({"presence_penality": 1.0}, "'presence_penality'.*`vllm.SamplingParams`.*'presence_penalty'"),
        ({"min_new_tokens": 2}, "'min_new_tokens'.*`vllm.SamplingParams`"),
        ({"max_tokens": 2}, "'max_tokens': set `max_completion_length`"),
        ({"n": 2}, "'n': set `num_completions`"),
        ({"seed": 2}, "'seed'.*leave it out"),
        ({"temperature": 2}, "'temperature': set `temperature`"),
    ],
    ids=str,
)
def test_settings_of_vllm_are_checked_in_the_constructor(given, message, installed, tmp_path, monkeypatch):
    """By the fields of the installed version, or by a list."""

    class SamplingParams:
        def __init__(self, presence_penalty=0.0, newest=1, seed=None, temperature=1.0, n=1, max_tokens=16):
            pass

    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(SamplingParams=SamplingParams) if installed else None)
    with pytest.raises(ValueError, match=f"`generation_kwargs` has {message}"):
        online.config(tmp_path, use_vllm=True, generation_kwargs=given)
    known = {"newest": 2} if installed else {"stop": ["x"], "min_tokens": 2, "structured_outputs": {"regex": "a"}}
    online.config(tmp_path, use_vllm=True, generation_kwargs=known)
    server = dict(vllm_mode="server", vllm_server_base_url="http://localhost:1")
    online.config(tmp_path, use_vllm=True, generation_kwargs={"seed": 1}, **server)


def test_vllm_that_is_not_there(tiny_folder, tmp_path, monkeypatch):
    from trl.generation import vllm_generation

    monkeypatch.setattr(vllm_generation, "is_vllm_available", lambda: False)
    with pytest.raises(ImportError, match="`use_vllm=True` needs vLLM"):
        _trl.load_vllm_generation()
    with pytest.raises(ValueError, match="`vllm_mode='server'` has no effect unless `use_vllm=True`"):
        online.config(tmp_path, vllm_mode="server")


def test_cpu_build_is_refused(tiny_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(vllm, "packs_weights", lambda: True)
    with pytest.raises(ValueError, match="use_vllm"):
        online.trainer(tiny_folder, tmp_path, labeller=CountedLabeller(), use_vllm=True)
