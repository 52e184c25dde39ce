"""Several processes: none waits for ever for another that has less to do, or that does not come."""

import re

import pytest
from launching import TESTS, fork


@pytest.fixture(scope="module")
def printed(tiny_folder, tmp_path_factory) -> dict[str, list[str]]:
    output = fork(TESTS / "scripts" / "unequal_processes.py", tiny_folder, str(tmp_path_factory.mktemp("unequal")))
    lines: dict[str, list[str]] = {}
    for line in output.splitlines():
        if re.match(r"\w+\|[01]\|", line):
            name, _, text = line.split("|", 2)
            lines.setdefault(name, []).append(text)
    return lines


@pytest.mark.parametrize(
    "case, told",
    [
        ("train", r"train datasets of different lengths: 8 rows on process 0, 6 rows on process 1"),
        ("eval", r"dev datasets of different lengths: 8 rows on process 0, 6 rows on process 1"),
        ("names", r"dev datasets of different lengths: 8 rows on process 0, none on process 1"),
        ("d2po", r"train datasets of different lengths: 8 rows on process 0, 6 rows on process 1"),
        ("images", r"train datasets of different lengths: 6 rows on process 0, 4 rows on process 1"),
        ("evaluate", r"eval datasets of different lengths: 8 rows on process 0, 6 rows on process 1"),
        ("predict", r"test datasets of different lengths: 8 rows on process 0, 6 rows on process 1"),
        ("later", r"train datasets of different lengths: 8 rows on process 0, 7 rows on process 1"),
    ],
)
def test_data_of_different_lengths_are_refused(case, told, printed):
    """In the constructor, in `evaluate`, `predict` and `train`: on both processes, so that neither waits."""
    assert len(printed[case]) == 2
    for text in printed[case]:
        assert re.search(told, text)


def test_equal_data_pass(printed):
    assert printed["equal"] == ["passed", "passed"]


def test_a_process_that_does_not_come(printed):
    """`ddp_timeout` holds on a CPU, where Transformers does not pass it on: an error after it, and not 30 minutes."""
    seconds = [float(text.split("|")[0]) for text in printed["hang"]]
    assert len(seconds) >= 1 and min(seconds) < 20
