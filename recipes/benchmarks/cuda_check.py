"""
Everything that this project wants to know of a CUDA device, in one command of minutes.

Each part runs in a process of its own, within a time limit, and is one of the benchmarks in this folder, the tests
marked `gpu`, or a short quickstart. What a part found, or how it failed, is appended to a file of JSON lines as soon
as it ends. Run again, the script skips the parts that are done, runs those that it has not come to, and then those
that failed. So it can be interrupted anywhere, and spread over several runs.

    python recipes/benchmarks/cuda_check.py --list
    python recipes/benchmarks/cuda_check.py --budget 540
    python recipes/benchmarks/cuda_check.py --table                              # Markdown, for RESULTS.md
    python recipes/benchmarks/cuda_check.py --device cpu --shape tiny            # rehearsal without a device

Nothing is downloaded: models have random weights and a real model's shape. Only the quickstart trains real weights
where it finds them, and says which it trained. `cuda_wheels.py` packs what a machine without a network lacks.
"""

import argparse
import contextlib
import json
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

from cuda_tables import (
    rows_of_diffusion,
    rows_of_generation,
    rows_of_head,
    rows_of_mixes,
    rows_of_quickstart,
    rows_of_steps,
    rows_of_tests,
)


BENCHMARKS = Path(__file__).resolve().parent
ROOT = BENCHMARKS.parents[1]
SHORTEST = 5  # seconds; with less of the budget left, no part is started
TAIL = 3000  # characters of a failed part's output that are kept with its record
SHOWN = (
    "torch", "triton", "transformers", "trl", "accelerate", "peft", "bitsandbytes", "datasets", "diffusers",
    "flash-attn",
)  # fmt: skip


# ---- Parts ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Kind:
    """A program that parts run: its command, its option that names the file of results, and how these are read."""

    command: tuple[str, ...]
    option: str
    read: Callable[[Path], dict]
    rows: Callable[[dict], list[tuple[str, str]]]
    takes_device: bool = False


@dataclass(frozen=True)
class Part:
    """
    Args:
        kind (`str`): Key of `KINDS`.
        limit (`int`): Seconds after which the part is ended.
        full (`str`): Arguments at the shapes of real models.
        tiny (`str`): Arguments of the rehearsal.
        needs (`str`): A distribution without which the part is skipped.
    """

    kind: str
    about: str
    limit: int
    full: str = ""
    tiny: str = ""
    needs: str | None = None

    def arguments(self, shape: str) -> list[str]:
        return shlex.split(self.tiny if shape == "tiny" else self.full)


def read_json(path: Path) -> dict:
    return json.loads(path.read_text())


def read_junit(path: Path) -> dict:
    suite = ElementTree.parse(path).getroot().find("testsuite")
    assert suite is not None
    counts = {name: int(suite.get(name, 0)) for name in ("tests", "skipped", "failures", "errors")}
    failed = [f"{case.get('classname')}::{case.get('name')}" for case in suite if case.find("failure") is not None]
    return {**counts, "failed": failed}


def benchmark(name: str, rows: Callable, **options) -> Kind:
    return Kind((str(BENCHMARKS / name),), "--json", read_json, rows, **options)


def files_of_gpu_tests() -> list[str]:
    """Files with a test for a device. To collect the whole suite would take longer than these tests do."""
    return [str(path) for path in sorted((ROOT / "tests").rglob("test_*.py")) if "mark.gpu" in path.read_text()]


KINDS = {
    "tests": Kind(
        ("-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", *files_of_gpu_tests()),
        "--junitxml",
        read_junit,
        rows_of_tests,
    ),
    "head": benchmark("paired_head.py", rows_of_head, takes_device=True),
    "steps": benchmark("step_cost.py", rows_of_steps),
    "mixes": benchmark("step_cost.py", rows_of_mixes),
    "diffusion": benchmark("diffusion_cost.py", rows_of_diffusion),
    "generation": benchmark("generation_cost.py", rows_of_generation),
    "quickstart": benchmark("short_quickstart.py", rows_of_quickstart),
}

HEAD = "--tokens 8192 --vocabulary 151936 --hidden 4096 --dtype bfloat16 --rounds 5"
TINY_HEAD = "--tokens 64 --vocabulary 512 --hidden 32 --rounds 2 --threads 1 --methods paired compiled floor"
MIXES = "--shape llama-1b --mixes 2048:512 512:512 --rounds 6 --warmup 2 --no_memory"
TINY_MIXES = "--shape tiny --mixes 24:8 --rounds 1 --threads 1 --no_memory"
PAIRS = "--prompt_length 512 --response_length 512"
TINY_STEPS = "--shape tiny --prompt_length 12 --response_length 8 --pairs 1 --rounds 1 --threads 1 --no_memory"
TINY_IMAGES = "--shape tiny --rounds 1 --threads 1"
TINY_XL = "--shape tiny-sdxl --rounds 1 --threads 1"

# In the order in which they run: what matters most comes first, as time may run out.
PARTS = {
    "gpu-tests": Part("tests", "the tests marked `gpu`", 120),
    "head-frozen": Part(
        "head", "paired head, frozen and shared by both models", 120, f"{HEAD} --shared_head", TINY_HEAD
    ),
    "head-trained": Part("head", "paired head, trained", 120, f"{HEAD} --trained_head", f"{TINY_HEAD} --trained_head"),
    "qlora-8b": Part(
        "steps",
        "QLoRA (NF4, bf16) at the shape of an 8B model",
        240,
        f"--shape llama-8b --mode qlora --pairs 1 {PAIRS} --rounds 5 --methods 'f-DPO (reverse KL)' TDPO2",
        f"{TINY_STEPS} --mode qlora --methods 'f-DPO (reverse KL)' TDPO2",
    ),
    "mixes-sdpa": Part(
        "mixes",
        "a 1B shape, with and without shared prompts, sdpa",
        120,
        f"{MIXES} --attention sdpa",
        f"{TINY_MIXES} --attention sdpa",
    ),
    "mixes-flash": Part(
        "mixes",
        "a 1B shape, with and without shared prompts, flash attention",
        120,
        f"{MIXES} --attention flash_attention_2",
        f"{TINY_MIXES} --attention flash_attention_2",
        needs="flash-attn",
    ),
    "methods-1b": Part(
        "steps",
        "every paired method, LoRA, at the shape of a 1B model",
        150,
        f"--shape llama-1b --mode lora --pairs 4 {PAIRS} --rounds 5",
        f"{TINY_STEPS} --mode lora",
    ),
    "sd15-lora": Part("diffusion", "Stable Diffusion 1.5, LoRA", 120, "--shape sd15 --rounds 5", TINY_IMAGES),
    "sd15-qlora": Part(
        "diffusion",
        "Stable Diffusion 1.5, QLoRA",
        120,
        "--shape sd15 --rounds 5 --mode qlora",
        f"{TINY_IMAGES} --mode qlora",
    ),
    "generation": Part(
        "generation",
        "D2PO's sampling at the shape of a 1B model",
        90,
        "--shape llama-1b --prompts 64 --prompt_length 128 --completion_length 128 --rounds 3",
        "--shape tiny --prompts 4 --prompt_length 8 --completion_length 8 --rounds 1 --threads 1",
    ),
    "quickstart": Part(
        "quickstart",
        "the quickstart, cut short",
        150,
        "--shape smollm2-135m --max_steps 8 --openings 16",
        "--shape tiny --max_steps 1 --openings 2",
    ),
    "sdxl-lora": Part("diffusion", "SDXL, LoRA", 180, "--shape sdxl --rounds 3", TINY_XL),
    "sdxl-qlora": Part(
        "diffusion", "SDXL, QLoRA", 180, "--shape sdxl --rounds 3 --mode qlora", f"{TINY_XL} --mode qlora"
    ),
}


# ---- Records --------------------------------------------------------------------------------------------------------


def read_records(path: Path) -> dict[str, dict]:
    """The last record of each part. A last line that was cut off while it was written is ignored."""
    records = {}
    if path.exists():
        for line in path.read_text().splitlines():
            with contextlib.suppress(json.JSONDecodeError):
                record = json.loads(line)
                records[record["part"]] = record
    return records


def append_record(path: Path, record: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    is_cut = path.exists() and not path.read_bytes().endswith(b"\n") and path.stat().st_size > 0
    with path.open("a") as file:
        file.write("\n" * is_cut + json.dumps(record) + "\n")
        file.flush()
        os.fsync(file.fileno())


def waiting(names: list[str], records: dict[str, dict]) -> list[str]:
    """Parts to run: first those without a record, then those that failed, were too slow or lacked a package."""
    fresh = [name for name in names if name not in records]
    return fresh + [name for name in names if name in records and records[name]["status"] != "done"]


# ---- Running --------------------------------------------------------------------------------------------------------


def environment(device: str) -> dict[str, str]:
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    own = {
        "PYTHONPATH": os.pathsep.join(path for path in paths if path),
        "PYTHONUNBUFFERED": "1",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    if device == "cpu":
        own["CUDA_VISIBLE_DEVICES"] = ""
    return {**os.environ, **own}


# Asked in a process of its own: this one must not hold memory of the device.
ABOUT_MACHINE = """
import importlib.metadata, json, platform, sys
import torch
versions = {}
for name in sys.argv[1:]:
    try:
        versions[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        pass
versions["torch"] = torch.__version__
found = {"python": platform.python_version(), "versions": versions, "device": "CPU"}
if torch.cuda.is_available():
    properties = torch.cuda.get_device_properties(0)
    found["device"], found["gibibytes"] = properties.name, round(properties.total_memory / 2**30)
    found["cuda"] = torch.version.cuda
print(json.dumps(found))
"""


def about_machine(device: str) -> dict:
    done = subprocess.run(
        [sys.executable, "-c", ABOUT_MACHINE, *SHOWN], env=environment(device), capture_output=True, text=True
    )
    if done.returncode != 0:
        sys.exit(f"PyTorch does not start:\n{done.stderr[-TAIL:]}")
    machine = json.loads(done.stdout.splitlines()[-1])
    if device == "cuda" and machine["device"] == "CPU":
        sys.exit("`--device cuda`: PyTorch finds no CUDA device. `--device cpu --shape tiny` rehearses without one.")
    return machine


def run_part(name: str, options, machine: dict, limit: float) -> dict:
    """Runs a part and returns its record."""
    part = PARTS[name]
    kind = KINDS[part.kind]
    record = {"part": name, "device": options.device, "shape": options.shape, "machine": machine}
    if part.needs is not None and part.needs not in machine["versions"]:
        return {**record, "status": "skipped", "seconds": 0.0, "error": f"{part.needs} is not installed"}
    log = options.results.with_suffix("") / f"{name}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        found = Path(folder) / "found"
        command = [*kind.command, *part.arguments(options.shape), kind.option, str(found)]
        command += ["--device", options.device] if kind.takes_device else []
        # What an ended part leaves behind (a model of 16 GB) is removed with the folder.
        env = {**environment(options.device), "TMPDIR": folder}
        start = time.monotonic()
        with log.open("w") as file:
            process = subprocess.Popen(
                [sys.executable, *command],
                cwd=ROOT,
                env=env,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                process_group=0,  # not a session of its own, which would outlive a command that ends this one
            )
            try:
                code = process.wait(timeout=limit)
                status = "done" if code == 0 else "failed"
                error = None if code == 0 else f"exit status {code}"
            except subprocess.TimeoutExpired:
                status, error = "over time", f"ended after {limit:.0f} s"
            finally:
                # With its own children, also at Ctrl-C or SIGTERM.
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        record |= {"status": status, "seconds": round(time.monotonic() - start, 1), "command": command}
        try:
            record["result"] = kind.read(found)
        except (OSError, ValueError, ElementTree.ParseError) as problem:
            if status == "done":
                record["status"], error = "failed", f"no results to read: {problem}"
    if error is not None:
        record["error"] = f"{error}\n{log.read_text(errors='replace')[-TAIL:]}"
    return record


def run(options) -> int:
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    names = options.parts if options.again else waiting(options.parts, read_records(options.results))
    start, machine = time.monotonic(), about_machine(options.device) if names else {}
    for name in names:
        left = options.budget - (time.monotonic() - start)
        if left < SHORTEST:
            print(f"The budget of {options.budget} s is used up. Run again for the rest.", flush=True)
            break
        limit = options.limits.get(name, options.limits.get(None, PARTS[name].limit))
        print(f"{name}: {PARTS[name].about} ...", flush=True)
        record = run_part(name, options, machine, min(limit, left))
        append_record(options.results, record)
        print(f"{name}: {record['status']}, {record['seconds']:.0f} s", flush=True)
        if "error" in record:
            print(record["error"], flush=True)
    records = read_records(options.results)
    unfinished = [name for name in options.parts if records.get(name, {}).get("status") not in ("done", "skipped")]
    print(f"Not done: {', '.join(unfinished)}" if unfinished else f"All is done: {options.results}")
    return int(bool(unfinished))


# ---- What a person reads --------------------------------------------------------------------------------------------


def table(options) -> str:
    """The records as Markdown."""
    records = read_records(options.results)
    lines, machines = [], []
    for name in options.parts:
        about, record = PARTS[name].about, records.get(name)
        if record is None:
            lines.append(f"| {about} | | not measured |")
            continue
        if record["machine"] not in machines:
            machines.append(record["machine"])
        if record["status"] != "done":
            told = record["error"].strip().splitlines()
            shown = "; ".join(dict.fromkeys([told[0], told[-1]])).replace("|", "\\|")
            lines.append(f"| {about} | | {record['status']}: {shown} |")
        if record.get("result"):
            rows = KINDS[PARTS[name].kind].rows(record["result"])
            lines += [f"| {about} | {what} | {value} |" for what, value in rows]
    heads = ["Rehearsal at tiny shapes: these figures measure nothing.", ""] if options.shape == "tiny" else []
    for machine in machines:
        memory = f", {machine['gibibytes']} GiB, CUDA {machine['cuda']}" if "cuda" in machine else ""
        versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
        heads.append(f"{machine['device']}{memory}, Python {machine['python']}, {versions}")
    return "\n".join([*heads, "", "| part | what | result |", "|---|---|---|", *lines])


def listing(options) -> str:
    records = read_records(options.results)
    lines = []
    for name in options.parts:
        part, record = PARTS[name], records.get(name, {})
        lines.append(f"{name:14}{part.limit:5} s  {record.get('status', 'not run'):10}  {part.about}")
        program = " ".join(word for word in KINDS[part.kind].command if not word.startswith(str(ROOT / "tests")))
        shown = " ".join([program.replace(f"{ROOT}{os.sep}", ""), *part.arguments(options.shape)])
        lines.append(f"{'':21}{shown}")
    return "\n".join(lines)


def limit_of(text: str) -> tuple[str | None, float]:
    name, _, seconds = text.rpartition("=")
    if name and name not in PARTS:
        raise argparse.ArgumentTypeError(f"{text}: there is no part `{name}`; see `--list`")
    return name or None, float(seconds)


def parse_args(arguments: list[str] | None = None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--list", action="store_true", help="list the parts, their limits and what became of them")
    parser.add_argument("--table", action="store_true", help="print the results as Markdown")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), metavar="PART", help="these alone")
    parser.add_argument("--again", action="store_true", help="run the chosen parts even if they are done")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--shape", choices=["full", "tiny"], default="full", help="tiny: a rehearsal")
    parser.add_argument("--budget", type=float, default=540, help="seconds of this run, all parts together")
    parser.add_argument(
        "--limit",
        nargs="+",
        type=limit_of,
        default=[],
        metavar="[PART=]SECONDS",
        help="time limit of a part, or of all parts without one of their own, in place of those that `--list` shows",
    )
    parser.add_argument("--results", type=Path, help="file of JSON lines; outputs/cuda_check-DEVICE-SHAPE.jsonl")
    options = parser.parse_args(arguments)
    options.limits = dict(options.limit)
    if options.results is None:
        options.results = ROOT / "outputs" / f"cuda_check-{options.device}-{options.shape}.jsonl"
    options.results = options.results.resolve()
    for record in read_records(options.results).values():
        if (record["device"], record["shape"]) != (options.device, options.shape):
            parser.error(
                f"--results {options.results} is of `--device {record['device']} --shape {record['shape']}`. Name "
                "another file, or leave `--results` out."
            )
    return options


def main(arguments: list[str] | None = None) -> int:
    options = parse_args(arguments)
    if options.list or options.table:
        print(listing(options) if options.list else table(options))
        return 0
    return run(options)


if __name__ == "__main__":
    sys.exit(main())
