"""Checks the folder of a command's results before hours of work go into them."""

import tempfile
from pathlib import Path


def check_writable(folder: str | Path, files: tuple[str, ...] = ()) -> None:
    """
    Creates an output folder and tries it.

    Args:
        folder (`str` or `Path`):
            The option `output_dir`.
        files (`tuple[str, ...]`, *optional*):
            Names of the files that will be written there.

    Raises:
        `ValueError`: If it cannot be written, or a folder has the name of one of the files.
    """
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
        taken = [name for name in files if Path(folder, name).is_dir()]
    except (OSError, ValueError) as error:  # `ValueError` for a null character
        raise ValueError(f"`output_dir={str(folder)!r}` cannot be written: {error}. Give another folder.") from error
    if taken:
        raise ValueError(
            f"`output_dir={str(folder)!r}` holds a folder `{taken[0]}`, where a file of this name is to be written. "
            "Give another folder."
        )
