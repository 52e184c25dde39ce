"""Locates the shipped configurations and the data of the recipes, in the wheel or in a clone."""

from pathlib import Path

from .._paths import ROOT


CONFIGURATIONS = ROOT / "recipes" / "configs"
ACCELERATE = ROOT / "recipes" / "accelerate"


def shipped(method: str) -> list[str]:
    """Names of the configurations that ship for a method, such as `lora`."""
    return sorted(path.stem for path in (CONFIGURATIONS / method).glob("*.yaml"))


def find_configuration(name: str, method: str) -> Path:
    """
    The file that `--config` names: a path, or the name of a configuration that ships with the method.

    Raises:
        `ValueError`: If it is neither, naming the configurations that ship.
    """
    return _find("config", name, CONFIGURATIONS / method, method)


def find_accelerate_configuration(name: str) -> Path:
    """The same for `--accelerate_config`."""
    return _find("accelerate_config", name, ACCELERATE, "accelerate")


def _find(option: str, name: str, folder: Path, what: str) -> Path:
    given = Path(name).expanduser()
    for path in (given, ROOT / given, folder / f"{name}.yaml"):
        if path.is_file():
            return path
    known = ", ".join(sorted(path.stem for path in folder.glob("*.yaml"))) or "none"
    raise ValueError(
        f"`--{option} {name}`: there is no such file in {Path.cwd()}, and no configuration of that name ships for "
        f"{what}. Shipped: {known}."
    )


def with_configuration(arguments: list[str], method: str) -> list[str]:
    """Arguments in which `--config NAME` and `--config=NAME` have become `--config FILE`."""
    words: list[str] = []
    iterator = iter(arguments)
    for word in iterator:
        name, equals, value = word.partition("=")
        if name != "--config":
            words.append(word)
            continue
        if not equals:
            value = next(iterator, "")
        if not value or value.startswith("--"):
            raise ValueError(
                f"`--config` needs a file, or one of the configurations that ship: {', '.join(shipped(method))}."
            )
        words += ["--config", str(find_configuration(value, method))]
    return words
