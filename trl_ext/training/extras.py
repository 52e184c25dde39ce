"""Packages of the optional extras, looked for before anything is loaded."""

import importlib


def require_extra(extra: str, what: str, *modules: str) -> None:
    """
    Raises an error that says what to install if a module of an extra is missing.

    Args:
        extra (`str`):
            The extra of this project that brings the modules.
        what (`str`):
            What needs them, in the singular, for the message.
        modules (`str`):
            Names to import.

    Raises:
        `ImportError`: Naming the missing modules and the extra.
    """
    missing = []
    for module in modules:
        try:
            importlib.import_module(module)
        except ImportError:
            missing.append(module)
    if missing:
        packages = ", ".join(f"`{name.partition('.')[0]}`" for name in missing)
        raise ImportError(
            f'{what} needs the package{"s" * (len(missing) > 1)} {packages}: pip install "trl-ext[{extra}]".'
        )
