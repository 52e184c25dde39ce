"""The README's second command: `python3 tests/run.py [pytest arguments]` sets everything up and runs the tests."""

import os
import subprocess
import sys
from pathlib import Path


ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "recipes"))

from setup_env import prepare  # noqa: E402


def main() -> int:
    python = str(prepare("test"))
    env = dict(os.environ, HF_HUB_DISABLE_TELEMETRY="1", HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
    lint = subprocess.run([python, "-m", "ruff", "check", "."], cwd=ROOT)
    style = subprocess.run([python, "-m", "ruff", "format", "--check", "--quiet", "."], cwd=ROOT)
    types = subprocess.run([python, "-m", "mypy"], cwd=ROOT)
    # Two workers of one thread each: tiny models gain nothing from more threads, and launches of two processes fit
    # beside.
    options = ["-q", "-n", "2", "--dist", "worksteal", "--durations", "10"]
    tests = subprocess.run([python, "-m", "pytest", *options, *sys.argv[1:]], cwd=ROOT, env=env)
    if style.returncode != 0:
        print("ruff format would change files: run `ruff format .`")
    return tests.returncode or lint.returncode or style.returncode or types.returncode


if __name__ == "__main__":
    sys.exit(main())
