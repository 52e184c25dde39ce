"""Datasets by name, as every command line of the project takes them: a Hub id, a folder, or a file."""

import re
from collections.abc import Iterable
from pathlib import Path

from .._paths import ROOT


FILE_TYPES = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv"}


def file_type(path: Path) -> str | None:
    """The `datasets` loader of a data file by its suffix (`.gz` may follow); `None` for other files."""
    return FILE_TYPES.get(Path(path.stem if path.suffix == ".gz" else path.name).suffix)


def refuse_missing_path(
    option: str, name: str, file_types: Iterable[str] = FILE_TYPES, roots: tuple[Path, ...] = ()
) -> None:
    """
    Fails early if a local-looking path does not exist; otherwise it would be reported as a missing Hub repository.

    Raises:
        `ValueError`: Naming the option, the path, and where it was looked up.
    """
    path_like = name.startswith(("/", "./", "../", "~")) or name.removesuffix(".gz").endswith(tuple(file_types))
    if path_like and not any((root / Path(name).expanduser()).exists() for root in (Path.cwd(), *roots)):
        searched = " or ".join(str(root) for root in (Path.cwd(), *roots))
        raise ValueError(
            f"`{option}={name!r}`: there is no file or folder {name} in {searched}. Check the path, or give a Hub id "
            f"such as {'trl-lib/ultrafeedback_binarized' if file_types else 'Qwen/Qwen2.5-0.5B-Instruct'!r}."
        )


def find_path(name: str) -> Path | None:
    """The file or folder that `name` is, looked up in the working directory and the project; `None` for a Hub id."""
    places = (root / Path(name).expanduser() for root in (Path.cwd(), ROOT))
    return next((place for place in places if place.exists()), None)


def folder_of_images(name: str | None) -> str | None:
    """
    The folder from which relative image paths in a dataset start: that of its file, or the folder of its files; `None`
    for a dataset of the Hub.
    """
    path = None if name is None else find_path(name)
    return None if path is None else str(path.parent if path.is_file() else path)


def load_named_dataset(
    name: str,
    config: str | None = None,
    streaming: bool = False,
    *,
    option: str = "dataset_name",
):
    """
    Loads a dataset with its splits.

    Args:
        name (`str`):
            A Hub id, a folder (of data files named after their splits, or written by `save_to_disk`), or one JSONL,
            JSON, Parquet or CSV file (gzipped or not), which becomes the split `train`.
        config (`str`, *optional*):
            Configuration of a Hub dataset.
        streaming (`bool`, *optional*, defaults to `False`):
            Whether to stream.
        option (`str`, *optional*, defaults to `"dataset_name"`):
            The option that named it, for messages.

    Returns:
        [`~datasets.DatasetDict`] or [`~datasets.IterableDatasetDict`]; a [`~datasets.Dataset`] if `save_to_disk` wrote
        one.

    Raises:
        `ValueError`: If a path does not exist or is a file of an unknown type.
    """
    from datasets import load_dataset, load_from_disk

    refuse_missing_path(option, name, roots=(ROOT,))
    path = find_path(name)
    if path is None:
        return load_dataset(name, name=config, streaming=streaming)
    if path.is_file():
        if file_type(path) is None:
            raise ValueError(f"`{option}={name!r}` is a file of an unknown type; known: {', '.join(FILE_TYPES)}.")
        return load_dataset(file_type(path), data_files={"train": str(path)}, streaming=streaming)
    if (path / "dataset_dict.json").exists() or (path / "state.json").exists():
        return load_from_disk(str(path))
    return load_dataset(str(path), name=config, streaming=streaming)


def get_split(dataset, name: str, option: str):
    """
    The split `name` of a dataset, or its first rows, as in `test` or `test[:96]`. A dataset without splits is its
    `train`.

    Raises:
        `ValueError`: If there is no such split, naming those that there are.
    """
    if not isinstance(dataset, dict):
        dataset = {"train": dataset}
    match = re.fullmatch(r"([^\[]+)(?:\[:(\d+)\])?", name)
    if match is None or match[1] not in dataset:
        raise ValueError(
            f"`{option}={name!r}`: the dataset has {', '.join(map(repr, dataset))}. Give one of these, or its first "
            "rows as in 'test[:96]'."
        )
    split = dataset[match[1]]
    return split.take(int(match[2])) if match[2] else split


def load_split(name: str, split: str, config: str | None = None, *, option: str = "dataset"):
    """
    One split of a dataset by its name. A dataset without splits, such as a single file, is taken whole, or its first
    rows with `split="test[:96]"`.

    Raises:
        `ValueError`: If there is no such dataset or split.
    """
    dataset = load_named_dataset(name, config, option=option)
    path = find_path(name)
    if not isinstance(dataset, dict) or (path is not None and path.is_file()):
        split = re.sub(r"^[^\[]*", "train", split)
    return get_split(dataset, split, "split")
