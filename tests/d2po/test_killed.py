"""A run that is killed at any moment and resumed is the run that was not, and pays for every label once."""

import json
import os
import subprocess
import sys
from pathlib import Path

from killed_runs import PLACES


TESTS = Path(__file__).resolve().parent.parent
KILLS = 20


def test_killed_at_twenty_random_points(tiny_folder, tmp_path):
    """
    Twenty runs are killed with SIGKILL, at random calls (fixed seed) anywhere in training, while a checkpoint is
    written, and while labels are bought; some again while they resume. Each ends with the ledger, the policy's and the
    discriminator's weights, the discriminator's optimizer and the log of the run that was not killed, byte for byte.
    What was on its way from the labeler when the process died, and nothing else, is asked for again: at most one
    call's comparisons (`label_batch_size=2`) a kill.
    """
    environment = dict(os.environ, OMP_NUM_THREADS="1", PYTHONPATH=str(TESTS.parent), HF_HUB_OFFLINE="1")
    script = [sys.executable, str(TESTS / "d2po" / "killed_runs.py"), tiny_folder, str(tmp_path), str(KILLS)]
    done = subprocess.run(script, env=environment, timeout=600, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    outcomes = json.loads(done.stdout.splitlines()[-1])
    assert len(outcomes) == KILLS
    for outcome in outcomes:
        assert outcome["killed"] >= 1, outcome
        assert outcome["same ledger"] and outcome["same weights"] and outcome["same logs"], outcome
        assert outcome["labels"] == 9 and outcome["labels bought twice"] == 0, outcome
        assert 0 <= outcome["asked for again"] <= 2 * outcome["killed"], outcome
    # The points are spread: every place, runs with and without a checkpoint, ledgers of many lengths.
    assert {outcome["place"] for outcome in outcomes} == set(PLACES)
    assert {bool(outcome["found"]) for outcome in outcomes} == {True, False}
    assert len({outcome["labels found"] for outcome in outcomes}) >= 4
