"""What a type checker and an editor see of the public names: classes and functions, never `Any`."""

import re
import sys
from pathlib import Path

import pytest

import trl_ext
import trl_ext.evaluation


api = pytest.importorskip("mypy.api")
ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("module", [trl_ext.evaluation], ids=lambda module: module.__name__)
def test_public_names_are_resolved(module, tmp_path, monkeypatch):
    names = [name for name in module.__all__ if name != "__version__"]
    source = tmp_path / "user.py"
    lines = [f"import {module.__name__}", *(f"reveal_type({module.__name__}.{name})" for name in names)]
    source.write_text("\n".join(lines) + "\n")
    monkeypatch.setenv("MYPYPATH", str(ROOT))
    options = [
        "--config-file",
        str(ROOT / "pyproject.toml"),
        "--cache-dir",
        str(tmp_path),
        "--follow-imports",
        "silent",
    ]
    output, errors, _ = api.run([*options, "--python-executable", sys.executable, str(source)])
    revealed = re.findall(r'user\.py:(\d+): note: Revealed type is "(.*)"', output)
    assert len(revealed) == len(names), output + errors
    for number, kind in revealed:
        name = names[int(number) - 2]
        assert kind.startswith(("def ", "Overload", "Module", "builtins.", "types.")) and kind != "Any", (
            f"{name}: {kind}"
        )
        if name.endswith(("Trainer", "Config")) and name in vars(trl_ext)["_PUBLIC"]:
            assert "-> trl_ext." in kind and kind.endswith(f".{name}"), f"{name}: {kind}"
