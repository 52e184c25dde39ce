"""Packed rows in two processes of which one cannot pack: both decide alike, say why, and nobody waits for the other."""

import json
from pathlib import Path

import pytest
from engines import needs_deepspeed
from launching import fork


SCRIPT = Path(__file__).resolve().parent.parent / "scripts" / "run_layout.py"


def run(model: str, folder: Path, *arguments: str) -> list[dict]:
    folder.mkdir()
    fork(SCRIPT, model, str(folder), *arguments)
    return [json.loads((folder / f"layout-{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize(
    "engine",
    ["none", "fsdp2", *(pytest.param(name, marks=[pytest.mark.slow, needs_deepspeed]) for name in ("zero2", "zero3"))],
)
def test_two_processes_on_packed_rows(engine, tiny_folder, tmp_path):
    """
    Plain data parallelism, and FSDP2 and ZeRO-3 with both models in shards: every number of the first step is that of
    two processes on padded rows.
    """
    packed, padded = (run(tiny_folder, tmp_path / share, "nothing", share, engine) for share in ("True", "False"))
    for result in packed:
        # Tried in the constructor, if its weights are whole, then compared on the first batch: policy and reference.
        assert result["packed"].count(False) == 3 - (engine == "zero3") and result["packed"][-4:] == [True] * 4
    assert not any(flag for result in padded for flag in result["packed"])
    assert all(result["sharded"] == [engine in ("fsdp2", "zero3")] * 2 for result in packed + padded)
    first, expected = ({k: v for k, v in runs[0]["logs"][0].items() if k != "grad_norm"} for runs in (packed, padded))
    assert first == expected
    assert packed[0]["logs"][1]["loss"] == pytest.approx(padded[0]["logs"][1]["loss"], rel=1e-5)


@pytest.mark.parametrize("what, reason", {"batch": "position_ids", "model": "nats a token"}.items())
def test_one_process_that_cannot_pack_decides_for_all(what, reason, tiny_folder, tmp_path):
    """The second process's batches, or its model, refuse: both train on padded rows and give its reason."""
    results = run(tiny_folder, tmp_path / what, what)
    for result in results:
        # Each model is compared on the first batch, unless a further argument tells at once; then there are two steps.
        assert result["packed"][-4:] == [False] * 4 and result["error"] is None
        assert reason in result["messages"][0] and len(result["messages"]) == 2  # policy and reference
    assert results[0]["messages"] == results[1]["messages"]
    # Nobody runs a forward that the other does not: what wraps the model communicates in each.
    assert len(results[0]["packed"]) == len(results[1]["packed"]) and sum(results[0]["packed"]) == 2 * (
        what == "model"
    )


def test_an_explicit_wish_is_an_error_on_both(tiny_folder, tmp_path):
    errors = [result["error"] for result in run(tiny_folder, tmp_path / "run", "batch", "True")]
    assert errors[0] == errors[1] and "`share_prompts=True`" in errors[0] and "position_ids" in errors[0]


def test_a_batch_without_anything_to_share_is_padded_alone(tiny_folder, tmp_path):
    """It is no reason against packing, and the other process packs its own."""
    first, second = run(tiny_folder, tmp_path / "run", "single")
    assert first["packed"][-4:] == [True] * 4 and not any(second["packed"])
    assert len(first["packed"]) == len(second["packed"]) == 2 * 2 + 2 * 2
    assert not first["messages"] and not second["messages"]
