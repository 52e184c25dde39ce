"""A run with a latent cache that is killed at any stage goes on as if it had not been."""

import diffusion_harness as harness
import pytest
import torch
from diffusion_harness import lora, trained, trainer
from killing import DieAt, die, die_in_a_checkpoint, killed

from trl_ext.diffusion import latent_cache


def make(folder, **given):
    # A cold cache draws nothing that dropout would notice.
    return trainer(
        "sd",
        folder,
        cache_latents=True,
        peft_config=lora(lora_dropout=0.2),
        max_steps=4,
        save_strategy="steps",
        save_steps=2,
        eval_dataset=harness.dataset(2),
        eval_strategy="steps",
        eval_steps=2,
        **given,
    )


def kill_in_the_cache(folder):
    written, write = [], latent_cache.write_shard

    def counted(*args):
        written.append(args)
        return die() if len(written) > 5 else write(*args)

    latent_cache.SHARD_BYTES, latent_cache.write_shard = 1, counted
    make(folder)


def kill_in_a_checkpoint(folder, number: int):
    die_in_a_checkpoint(number)
    make(folder).train()


STAGES = {
    "while the cache is filled": kill_in_the_cache,
    "between cache and training": lambda folder: (make(folder), die()),
    "before the first checkpoint": lambda folder: make(folder, callbacks=[DieAt("on_step_end", 1)]).train(),
    "while the first checkpoint is written": lambda folder: kill_in_a_checkpoint(folder, 1),
    "after the first checkpoint": lambda folder: make(folder, callbacks=[DieAt("on_step_end", 3)]).train(),
    "while the last checkpoint is written": lambda folder: kill_in_a_checkpoint(folder, 2),
    "after the last checkpoint": lambda folder: make(folder, callbacks=[DieAt("on_train_end", 4)]).train(),
}


def comparable(run) -> list[dict]:
    return [
        {key: value for key, value in entry.items() if "runtime" not in key and "per_second" not in key}
        for entry in run.state.log_history
    ]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    run = make(tmp_path_factory.mktemp("whole"))
    run.train()
    return comparable(run), trained(run)


@pytest.mark.parametrize("stage", STAGES)
def test_killed_run_continues(stage, uninterrupted, tmp_path):
    killed(lambda: STAGES[stage](tmp_path))
    run = make(tmp_path)
    run.train(resume_from_checkpoint=run.last_whole_checkpoint())
    logs, weights = uninterrupted
    assert comparable(run) == logs
    assert all(torch.equal(weights[name], value) for name, value in trained(run).items())
