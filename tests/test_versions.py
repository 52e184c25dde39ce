"""`tests/versions.py` names tests and environments that exist."""

import re
import subprocess
from pathlib import Path

import pytest
import versions


ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize("selected", versions.QUICK)
def test_quick_tests_exist(selected):
    path, _, name = selected.partition("[")[0].partition("::")
    source = (ROOT / path).read_text()
    assert not name or re.search(rf"^def {name}\(", source, re.MULTILINE)


def test_oldest_is_what_the_bounds_say():
    bounds = versions.lower_bounds()
    declared = versions.declared("test")
    for name in ("torch", "transformers", "peft", "accelerate", "datasets", "diffusers", "trl"):
        version = next(pin.split("==")[1] for pin in bounds if pin.startswith(f"{name}=="))
        assert any(requirement.startswith(f"{name}>={version}") for requirement in declared)


def test_environments():
    assert "trl" not in {versions._name(each) for each in versions.environment("trl-1.15").constraints}
    assert "trl==1.15.*" in versions.environment("trl-1.15").requirements
    assert set(versions.DEEPSPEED) <= set(versions.environment("deepspeed").requirements)
    assert versions.environment("python3.12").interpreter == "python3.12"
    with pytest.raises(ValueError, match="'newer'"):
        versions.environment("newer")


def test_uv_looks_where_pip_does(monkeypatch):
    told = ":env:.find-links='/own'\nglobal.extra-index-url='file:///a file:///b'\nglobal.find-links='/other'\nglobal.retries='3'\n"
    monkeypatch.setattr(subprocess, "run", lambda *args, **options: subprocess.CompletedProcess(args, 0, told))
    settings = versions.pip_settings()
    assert settings["UV_FIND_LINKS"] == "/own" and settings["UV_INDEX"] == "file:///a file:///b"
    assert set(settings) == {"UV_FIND_LINKS", "UV_INDEX", "UV_INDEX_STRATEGY"}
