"""Two processes are one run: one budget, one choice, one discriminator."""

import json
from pathlib import Path

import pytest
from harness import MACHINE_KEYS
from launching import fork, launch
from safetensors.torch import load_file


TESTS = Path(__file__).resolve().parent.parent


def run(model: str, folder: Path, processes: int, by=fork, **options):
    folder.mkdir(parents=True, exist_ok=True)
    arguments = (TESTS / "d2po" / "run_d2po.py", model, str(folder), json.dumps(options))
    launch(*arguments) if by is launch else fork(*arguments, processes=processes)
    results = [json.loads((folder / f"result-{rank}.json").read_text()) for rank in range(processes)]
    return results, [load_file(folder / f"weights-{rank}.safetensors") for rank in range(processes)]


def test_two_processes_are_one(tiny_folder, tmp_path):
    """
    Two processes of two pairs each are one of four: the same completions, the same labels bought, once and by the main
    process alone; policy and discriminator bitwise the same in both, and those of one process to rounding. When the
    labeler fails, both stop with its message and nothing is lost; resumed, they end where the undisturbed run ends.
    """
    options = dict(max_steps=4, adam_epsilon=1e-3, discriminator_lora_dropout=0.0, discriminator_learning_rate=1e-3)
    (single,), (expected,) = run(tiny_folder, tmp_path / "one", 1, **options)
    options |= dict(per_device_train_batch_size=2, label_retries=0)
    results, weights = run(tiny_folder, tmp_path / "two", 2, by=launch, **options)
    assert [result["processes"] for result in results] == [2, 2]
    assert [result["asked"] for result in results] == [6, 0]
    assert results[0]["keys"] == results[1]["keys"] == single["keys"] and len(single["keys"]) == 6
    assert results[0]["used"] == results[1]["used"] == list(range(6))
    for name, value in weights[0].items():
        assert (value == weights[1][name]).all(), name
        # AdamW divides by the root of tiny second moments, which magnifies rounding in the discriminator's first
        # steps.
        tolerance = 2e-4 if "discriminator" in name else 1e-6
        assert (value - expected[name]).abs().max() < tolerance, name
    for entry, other in zip(results[0]["logs"], single["logs"], strict=True):
        for key in (
            "loss",
            "d2po/gold_labels",
            "d2po/gold_reward",
            "d2po/silver_share",
            "d2po/kl",
            "eval_d2po/gold_reward",
        ):
            assert (key in entry) == (key in other), key
            if key in entry:
                assert entry[key] == pytest.approx(other[key], rel=1e-4, abs=2e-6), key

    broken, _ = run(tiny_folder, tmp_path / "broken", 2, fail_at=4, label_batch_size=1, **options)
    assert all("the judge is away" in result["error"] for result in broken)
    assert len(broken[0]["keys"]) == 3 and (tmp_path / "broken" / "checkpoint-2").exists()
    resumed, after = run(tiny_folder, tmp_path / "broken", 2, resume=True, label_batch_size=1, **options)
    assert resumed[0]["keys"] == single["keys"] and resumed[0]["asked"] == 3
    assert all((value == after[0][name]).all() for name, value in weights[0].items())


def test_sets_that_do_not_divide(tiny_folder, tmp_path):
    """
    Five prompts and five pairs in evaluation batches of two, and ten training prompts in windows of eight: two
    processes log what one does. The rows that fill up the last batches count nowhere, and the same labels are bought.
    """
    options = dict(max_steps=4, window_size=8, per_device_eval_batch_size=2, adam_epsilon=1e-3)
    options |= dict(discriminator_lora_dropout=0.0, discriminator_learning_rate=1e-3)
    found = []
    for processes in (1, 2):
        folder = tmp_path / str(processes)
        folder.mkdir()
        given = json.dumps(dict(options, per_device_train_batch_size=4 // processes))
        fork(TESTS / "d2po" / "run_uneven.py", tiny_folder, str(folder), given, processes=processes)
        found.append([json.loads((folder / f"result-{rank}.json").read_text()) for rank in range(processes)])
    (single,), (first, second) = found
    assert (first["processes"], second["processes"]) == (2, 2)
    assert first["asked"] == second["asked"] == single["asked"] and {window for window, _ in single["asked"]} == {0, 1}
    names = [name for name in single["metrics"] if not any(word in name for word in MACHINE_KEYS)]
    assert {"eval_prompts_d2po/gold_reward", "eval_prompts_rewards/margins", "eval_pairs_logps/chosen"} <= set(names)
    for name in names:
        assert first["metrics"][name] == pytest.approx(single["metrics"][name], rel=1e-3, abs=1e-4), name
    for entry, other in zip(first["logs"], single["logs"], strict=True):
        assert entry.keys() == other.keys()
        for name in entry:
            assert entry[name] == pytest.approx(other[name], rel=2e-3, abs=1e-4), name
