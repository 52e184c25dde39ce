"""Options of Transformers that did nothing, or died in training: they work, or are refused in the constructor."""

import harness
import pytest
import tiny
import torch
from methods import BY_ID
from peft import LoraConfig


@pytest.mark.parametrize("method", ["fdpo", "simper"])
def test_group_by_length(method, tiny_folder, tmp_path):
    """Pairs of about the same length share a step: less padding than in random order, every pair once an epoch."""
    padding = {}
    for strategy in ("random", "group_by_length"):
        options = dict(train_sampling_strategy=strategy, per_device_train_batch_size=4, max_steps=8)
        trainer = harness.trainer(
            BY_ID[method],
            tiny_folder,
            tmp_path / strategy,
            train_dataset=tiny.dataset(32),
            eval_dataset=tiny.dataset(6, seed=1),
            **options,
        )
        batches = list(trainer.get_train_dataloader())
        padding[strategy] = sum((batch["attention_mask"] == 0).sum().item() for batch in batches)
        assert sum(len(batch["input_ids"]) for batch in batches) == 64
        trainer.train()
        assert len(harness.column(trainer, "loss")) == 8
        # An evaluation keeps the dataset's order.
        rows = [row for batch in trainer.get_eval_dataloader() for row in batch["input_ids"][:, 0].tolist()]
        expected = [row for start in (0, 4) for row in _first_tokens(trainer, start)]
        assert rows == expected
    assert padding["group_by_length"] < 0.8 * padding["random"]


def _first_tokens(trainer, start: int) -> list[int]:
    rows = [trainer.eval_dataset[i] for i in range(start, min(start + 4, 6))]
    return trainer.data_collator(rows)["input_ids"][:, 0].tolist()


def test_group_by_length_without_lengths(tiny_folder, tmp_path):
    with pytest.raises(ValueError, match="`train_sampling_strategy='group_by_length'`.*streaming"):
        harness.trainer(
            BY_ID["fdpo"],
            tiny_folder,
            tmp_path,
            train_dataset=tiny.dataset(8).to_iterable_dataset(),
            train_sampling_strategy="group_by_length",
        )


def test_a_warm_cache_changes_nothing(tiny_folder, tmp_path):
    """With dropout, a run that finds its reference's numbers in the cache is the one that computed them."""
    runs = []
    for name in ("cold", "warm"):
        options = dict(
            precompute_ref_log_probs=True, reference_cache_dir=str(tmp_path / "cache"), disable_dropout=False
        )
        lora = LoraConfig(r=4, lora_dropout=0.2, target_modules="all-linear")
        trainer = harness.trainer(
            BY_ID["fdpo"], tiny_folder, tmp_path / name, train_dataset=tiny.dataset(16), peft_config=lora, **options
        )
        trainer.train()
        runs.append(trainer)
    assert harness.column(runs[0], "loss") == harness.column(runs[1], "loss")
    assert harness.largest_difference(*(harness.weights(run.model) for run in runs)) == 0


@pytest.mark.parametrize("method", ["fdpo", "simper"])
def test_what_auto_find_batch_size_gave_up_is_not_logged(method, tiny_folder, tmp_path):
    """Memory runs out before the first optimizer step: the first log is of the smaller batches alone."""
    logs = []
    for size in (8, 7):  # Accelerate takes a tenth off
        options = dict(per_device_train_batch_size=size, gradient_accumulation_steps=4, max_steps=1)
        options |= dict(auto_find_batch_size=True, train_sampling_strategy="sequential")
        trainer = harness.trainer(BY_ID[method], tiny_folder, tmp_path / str(size), **options)
        compute, calls = trainer.compute_loss, []

        def failing(*args, compute=compute, calls=calls, size=size, **kwargs):
            calls.append(size)
            if calls == [8] * 4:
                raise torch.OutOfMemoryError("CUDA out of memory.")
            return compute(*args, **kwargs)

        trainer.compute_loss = failing
        trainer.train()
        assert len(calls) == (8 if size == 8 else 4) and trainer._train_batch_size == 7
        logs.append(harness.logs(trainer))
    harness.assert_same_logs(*logs)
