"""One rule for ties and one name for each quantity, in the trainers and in the evaluation (README, "Metric names")."""

import harness
import pytest
import tiny
import torch
from datasets import Dataset
from methods import BY_ID
from test_evaluation_callbacks import SETTINGS, longer

from trl_ext.evaluation import FrontierCallback, RankingAccuracyCallback, ranking_accuracy, reward_accuracy


def test_ties(tiny_folder, tmp_path):
    """
    A model whose head is 0 finds all responses of one length equally probable: ranked correctly, but not rewarded.
    """
    policy, generator = tiny.model(), torch.Generator().manual_seed(0)
    policy.get_output_embeddings().weight.data.zero_()
    ids = torch.randint(5, 300, (6, 3, 4), generator=generator).tolist()
    pairs = Dataset.from_list(
        [dict(zip(("prompt_ids", "chosen_ids", "rejected_ids"), row, strict=True)) for row in ids]
    )
    policy.save_pretrained(tmp_path / "model")
    tiny.tokenizer().save_pretrained(tmp_path / "model")
    trainer = harness.trainer(
        BY_ID["fdpo"], str(tmp_path / "model"), tmp_path / "out", train_dataset=pairs, eval_dataset=pairs
    )
    callback = RankingAccuracyCallback(trainer)
    trainer.add_callback(callback)
    found = trainer.evaluate()
    for name in ("policy", "policy_norm", "reference", "reference_norm"):
        assert found[f"eval_ranking_accuracy/{name}"] == 1.0
    for name in ("accuracy", "accuracy_norm", "reference_accuracy", "reference_accuracy_norm"):
        assert found[f"eval_ranking/{name}"] == 1.0
    assert found["eval_rewards/accuracies"] == found["eval_ranking/reward_accuracy"] == 0.0
    assert ranking_accuracy([-1.0, -2.0], [-1.0, -1.0]).value == 0.5 and reward_accuracy([0.0], [0.0]).value == 0.0


@pytest.mark.parametrize("best", ["eval_forward_kl/chosen", "eval_kl/chosen"])
def test_kl_on_data_and_on_samples(best, tiny_folder, tmp_path):
    """
    KL(reference || policy) on data is `forward_kl`, KL(policy || reference) on samples is `reverse_kl`; the names in
    0.1.0 are logged too, and can choose the best model.
    """
    trainer = harness.trainer(
        BY_ID["tdpo"],
        tiny_folder,
        tmp_path,
        eval_dataset=tiny.dataset(6, seed=3),
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        max_steps=2,
        learning_rate=1e-2,
        load_best_model_at_end=True,
        metric_for_best_model=best,
        greater_is_better=True,
    )
    trainer.add_callback(FrontierCallback(longer, trainer, num_prompts=2, settings=SETTINGS))
    trainer.train()
    training, evaluated = (
        [entry for entry in trainer.state.log_history if key in entry] for key in ("loss", "eval_loss")
    )
    for prefix, entries in (("", training), ("eval_", evaluated)):
        for entry in entries:
            for side in ("chosen", "rejected", "margin"):
                assert entry[f"{prefix}forward_kl/{side}"] == entry[f"{prefix}kl/{side}"]
    assert trainer.state.best_metric == evaluated[-1]["eval_forward_kl/chosen"] > 0
    frontier = [entry for entry in trainer.state.log_history if "eval_frontier/reverse_kl" in entry]
    assert len(frontier) == 2 and frontier[-1]["eval_frontier/reverse_kl"] > 0
    for entry in frontier:
        assert entry["eval_frontier/kl"] == entry["eval_frontier/reverse_kl"]
        assert entry["eval_frontier/kl_k1"] == entry["eval_frontier/reverse_kl_k1"]
