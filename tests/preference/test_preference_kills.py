"""An f-DPO run with the cache of its reference that is killed at any stage goes on as if it had not been."""

import harness
import pytest
import tiny
from killing import DieAt, die, die_in_a_checkpoint, killed
from methods import BY_ID
from peft import LoraConfig

from trl_ext.preference import reference_cache


def make(base, folder, **given):
    """Dropout is on, so that a draw more or less from the global generator shows."""
    return harness.trainer(
        BY_ID["fdpo"],
        base,
        folder / "run",
        train_dataset=tiny.dataset(16),
        eval_dataset=tiny.dataset(5, seed=1),
        peft_config=LoraConfig(r=4, target_modules=["q_proj", "v_proj"], lora_dropout=0.2),
        precompute_ref_log_probs=True,
        reference_cache_dir=str(folder / "cache"),
        precompute_ref_batch_size=2,
        disable_dropout=False,
        max_steps=6,
        save_strategy="steps",
        save_steps=2,
        eval_strategy="steps",
        eval_steps=3,
        **given,
    )


def die_in_the_cache(base, folder):
    written, write = [], reference_cache.ReferenceCache.write

    def counted(self, *args, **kwargs):
        written.append(args)
        return die() if len(written) > 3 else write(self, *args, **kwargs)

    reference_cache.SHARD_PAIRS, reference_cache.ReferenceCache.write = 2, counted
    make(base, folder)


def die_while_saving(base, folder, number: int):
    die_in_a_checkpoint(number)
    make(base, folder).train()


def die_while_saving_anew(base, folder):
    """The checkpoint is there, complete, of an earlier run; the run begins again before it and dies in it."""
    make(base, folder).train()
    run = make(base, folder)
    die_in_a_checkpoint(1)
    run.train(resume_from_checkpoint=str(folder / "run" / "checkpoint-4"))


STAGES = {
    "while the cache is filled": die_in_the_cache,
    "between cache and training": lambda *where: (make(*where), die()),
    "before the first checkpoint": lambda *where: make(*where, callbacks=[DieAt("on_step_end", 1)]).train(),
    "while the first checkpoint is written": lambda *where: die_while_saving(*where, 1),
    "between checkpoints": lambda *where: make(*where, callbacks=[DieAt("on_step_end", 3)]).train(),
    "in an evaluation": lambda *where: make(*where, callbacks=[DieAt("on_prediction_step", 3)]).train(),
    "while the last checkpoint is written": lambda *where: die_while_saving(*where, 3),
    "while a checkpoint is written anew": die_while_saving_anew,
    "after the last checkpoint": lambda *where: make(*where, callbacks=[DieAt("on_train_end", 6)]).train(),
}


@pytest.fixture(scope="module")
def uninterrupted(tiny_folder, tmp_path_factory):
    run = make(tiny_folder, tmp_path_factory.mktemp("whole"))
    run.train()
    return harness.logs(run), harness.weights(run.model)


@pytest.mark.parametrize("stage", STAGES)
def test_killed_run_continues(stage, uninterrupted, tiny_folder, tmp_path):
    killed(lambda: STAGES[stage](tiny_folder, tmp_path))
    run = make(tiny_folder, tmp_path)
    run.train(resume_from_checkpoint=run.last_whole_checkpoint())
    logs, weights = uninterrupted
    harness.assert_same_logs(harness.logs(run), logs)
    assert harness.largest_difference(harness.weights(run.model), weights) == 0
