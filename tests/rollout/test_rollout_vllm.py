"""The path through TRL's vLLM class, with a stand-in for it: what is handed over, and when the weights are sent."""

import inspect
from types import SimpleNamespace

import harness
import pytest
import sampling
import torch
import trl.trainer.grpo_trainer
import trl.trainer.rloo_trainer
from joint import by_id
from sampling import PRIMARY, ROLLOUTS
from trl.generation.vllm_generation import VLLMGeneration

from trl_ext.rollout import checks


class StandIn:
    """Takes what TRL's class takes, samples as a fixed rule says, and knows the log-probabilities of its model."""

    # GRPO asks a server whether its log-probabilities are those of the sampled distribution.
    vllm_client = SimpleNamespace(get_server_info=lambda: {"model_config": {"logprobs_mode": "processed_logprobs"}})

    def __init__(self, **settings):
        inspect.signature(VLLMGeneration.__init__).bind(None, **settings)
        self.settings, self.logprobs = settings, settings["logprobs"]
        self.synced, self.calls, self.asked = [], [], []
        self.error = 0.0

    def sync_weights(self):
        model = self.settings["accelerator"].unwrap_model(self.settings["model"])
        self.synced.append(sum(p.abs().sum().item() for p in model.parameters() if p.requires_grad))

    def generate(self, prompts, images, num_generations, profiler=None):
        assert images is None and len(prompts) % num_generations == 0
        assert all(prompts[i] == prompts[i - i % num_generations] for i in range(len(prompts)))
        self.calls.append(len(prompts))
        self.asked.append(self.logprobs)
        sampled = [[20 + i, 30, 40 + i] + ([1] if i % 2 else []) for i in range(len(prompts))]
        if self.logprobs is None:
            return prompts, sampled, None, None
        model = self.settings["accelerator"].unwrap_model(self.settings["model"])
        logps = []
        for prompt, ids in zip(prompts, sampled, strict=True):
            with torch.no_grad():
                found = model(torch.tensor([[*prompt, *ids]])).logits[0, :-1].log_softmax(-1)
            rows = found[len(prompt) - 1 :].gather(1, torch.tensor(ids)[:, None])
            logps.append((rows + self.error).tolist())
        return prompts, sampled, logps, [[[token] for token in ids] for ids in sampled]


@pytest.fixture
def any_device(monkeypatch):
    """A server that takes weights from this machine's device, whatever is installed."""
    monkeypatch.setattr(checks, "check_vllm", lambda *args: None)


@pytest.fixture
def vllm(monkeypatch, any_device):
    for module in (trl.trainer.grpo_trainer, trl.trainer.rloo_trainer):
        monkeypatch.setattr(module, "is_vllm_available", lambda *args, **kwargs: True, raising=False)
        monkeypatch.setattr(module, "VLLMGeneration", StandIn)


ENGINE = dict(use_vllm=True, vllm_mode="server", vllm_server_base_url="http://localhost:1")


@by_id([method for method in ROLLOUTS if method in PRIMARY])
def test_rollouts_with_vllm(method, vllm, tiny_folder, tmp_path):
    """
    The settings arrive; each prompt stands there once a completion; the weights are sent once a window, and those of
    its step; the completions are the tokens that came back. Stopped inside a window and resumed, the run samples only
    what is missing and is bitwise the uninterrupted one.
    """

    def build(name, **options):
        options = {**ENGINE, **dict(max_steps=5, steps_per_generation=2, logging_steps=1), **options}
        return sampling.trainer(method, tiny_folder, tmp_path / name, **options)

    whole = build("whole")
    whole.train()
    engine = whole.vllm_generation
    assert engine.settings["mode"] == "server" and engine.settings["max_completion_length"] == 6
    assert engine.settings["server_base_url"] == "http://localhost:1" and engine.settings["temperature"] == 1.0
    assert engine.calls == [16] * 3 and len(set(engine.synced)) == 3
    assert set(harness.column(whole, "completions/mean_length")) == {3.5}
    build("stopped", callbacks=[harness.StopAt(3)]).train()
    resumed = build("stopped")
    resumed.train(resume_from_checkpoint=True)
    assert resumed.vllm_generation.calls == [16]
    assert harness.largest_difference(harness.weights(whole.model), harness.weights(resumed.model)) == 0
    # The difference to vLLM is measured on the first batch of a process.
    harness.assert_same_logs(harness.logs(whole)[:4], harness.logs(resumed)[:4])


@pytest.mark.parametrize("error", [0.0, 0.25])
def test_fdpg_measures_the_difference_to_vllm(error, vllm, tiny_folder, tmp_path, caplog):
    """Asked once for its log-probabilities; a difference that RLOO does not correct for is logged, and warned of."""
    trained = sampling.trainer(sampling.BY_ID["fdpg"], tiny_folder, tmp_path, max_steps=3, **ENGINE)
    trained.vllm_generation.error = error
    trained.train()
    assert trained.vllm_generation.asked == [0, None, None]
    for name in ("mean", "max"):
        values = harness.column(trained, f"sampling/sampling_logp_difference/{name}")
        assert values == pytest.approx([error], abs=1e-4)
    assert ("differ by 0.250 nats" in caplog.text) == (error > 0)


def test_vllm_that_is_not_there(tiny_folder, tmp_path, monkeypatch, any_device):
    for module in (trl.trainer.grpo_trainer, trl.trainer.rloo_trainer):
        for holder in (module, inspect.getmodule(VLLMGeneration)):
            monkeypatch.setattr(holder, "is_vllm_available", lambda *args, **kwargs: False, raising=False)
    for name in ("dph_rl", "fdpg"):
        with pytest.raises(ImportError, match="vLLM is not available"):
            sampling.trainer(sampling.BY_ID[name], tiny_folder, tmp_path, **ENGINE)
