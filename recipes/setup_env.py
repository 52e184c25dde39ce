"""Set-up shared by the two commands of the README. Needs nothing but Python >= 3.11.

Creates `.venv` in the project's folder, installs the project and its tested set of versions (`.ci/constraints.txt`)
there, and does nothing on later runs unless `pyproject.toml` or the constraints have changed.
"""

import hashlib
import os
import subprocess
import sys
from pathlib import Path
from typing import NoReturn


ROOT = Path(__file__).resolve().parent.parent
CONSTRAINTS = ROOT / ".ci" / "constraints.txt"


def environment_python(venv: Path) -> Path:
    return venv / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def prepare(extra: str) -> Path:
    """
    Returns the interpreter of an environment in which the project is installed with `extra`.

    The environment is `.venv`, or the folder named by the variable `TRL_EXT_VENV`.
    """
    if sys.version_info < (3, 11):  # noqa: UP036 (this file runs before pip can refuse)
        sys.exit(f"trl_ext needs Python >= 3.11; this is Python {sys.version.split()[0]}. Use a newer `python3`.")
    venv = Path(os.environ.get("TRL_EXT_VENV") or ROOT / ".venv").resolve()
    python = environment_python(venv)
    key = f"{extra} {sys.version_info[:2]} {ROOT}".encode()
    key += (ROOT / "pyproject.toml").read_bytes() + CONSTRAINTS.read_bytes()
    stamp, wanted = venv / f".trl_ext-{extra}", hashlib.sha256(key).hexdigest()
    if python.exists() and stamp.exists() and stamp.read_text() == wanted:
        return python

    if not python.exists():
        print(f"Creating the environment {venv} ...", flush=True)
        result = subprocess.run([sys.executable, "-m", "venv", str(venv)])
        if result.returncode != 0:
            sys.exit(
                f"`{sys.executable} -m venv` failed. On Debian and Ubuntu install the package `python3-venv`, "
                "then run this command again."
            )
    print(f"Installing trl_ext[{extra}] and the tested versions (minutes on the first run) ...", flush=True)
    command = [str(python), "-m", "pip", "install", "-qq", "--disable-pip-version-check"]
    command += ["--constraint", str(CONSTRAINTS), "--editable", f"{ROOT}[{extra}]"]
    if subprocess.run(command).returncode != 0:
        sys.exit("The installation failed; pip's message is above. Fix it and run this command again.")
    stamp.write_text(wanted)
    return python


def run_in_environment(script: str, extra: str, **variables: str) -> NoReturn:
    """
    Runs `script` again with this command line, by the interpreter of [`prepare`], and ends with its exit status.
    `variables` of the environment tell it, among other things, that it runs there.
    """
    common = {
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONWARNINGS": "ignore::FutureWarning,ignore::UserWarning",
    }
    command = [str(prepare(extra)), script, *sys.argv[1:]]
    sys.exit(subprocess.run(command, env={**os.environ, **common, **variables}).returncode)


def run_demo(script: str, inside: str) -> NoReturn:
    """[`run_in_environment`] of a demonstration on digits, whose variable `inside` says that it runs there."""
    # Nothing is asked of the Hub, so nobody waits for an answer; at these sizes more threads get in each other's way.
    threads = str(min(os.cpu_count() or 1, 4))
    run_in_environment(script, "demo", **{inside: "1"}, HF_HUB_OFFLINE="1", OMP_NUM_THREADS=threads)
