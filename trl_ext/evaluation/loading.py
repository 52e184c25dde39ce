"""Models and datasets by name, as `trl-ext evaluate` takes them, and the packages that it needs."""

import importlib
import json
from collections.abc import Iterable
from pathlib import Path

import torch


def load_causal_lm(name: str, *, dtype: str = "float32", device: str | None = None, trust_remote_code: bool = False):
    """
    A causal language model by its Hub id or folder; a folder with an adapter gives its base model with the adapter.

    Args:
        name (`str`):
            Hub id or folder.
        dtype (`str`, *optional*, defaults to `"float32"`):
            Precision. In bfloat16 the log-probabilities of whole responses are known to a few tenths of a nat only.
        device (`str`, *optional*):
            Where to put it; a CUDA device if there is one, by default.
        trust_remote_code (`bool`, *optional*, defaults to `False`):
            Whether code that comes with the model may run.
    """
    from transformers import AutoModelForCausalLM

    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    # Weights in other formats are pickles, which can run code.
    options = dict(dtype=getattr(torch, dtype), trust_remote_code=trust_remote_code, use_safetensors=True)
    return AutoModelForCausalLM.from_pretrained(name, **options).to(device)


def check_causal_lm(name: str, *, trust_remote_code: bool = False) -> None:
    """
    Raises an error if [`load_causal_lm`] could not load a model, as far as its configuration and a folder's files tell: in
    seconds, where loading would tell after hours of measuring others.

    Args:
        name (`str`):
            Hub id or folder, of a model or of an adapter.
        trust_remote_code (`bool`, *optional*, defaults to `False`):
            As for [`load_causal_lm`].

    Raises:
        `ValueError`: What is missing, of which model.
    """
    from transformers import AutoConfig
    from transformers.utils import find_adapter_config_file

    _refuse_missing_path("model", name)
    try:
        adapter = find_adapter_config_file(name)
        base = name if adapter is None else json.loads(Path(adapter).read_text())["base_model_name_or_path"]
        AutoConfig.from_pretrained(base, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        missing = "" if Path(name).exists() else f" There is no folder {name} in {Path.cwd()} either."
        raise ValueError(
            f"The model {name!r} cannot be loaded, as its configuration cannot be read. {error}{missing}"
        ) from error
    for folder, what in ((name, "adapter" if adapter else "model"), (base, "model")):
        if Path(folder).is_dir() and not list(Path(folder).glob("*.safetensors")):
            raise ValueError(
                f"The model {name!r} cannot be loaded: the folder {folder} has no weights of the {what} in safetensors. Other "
                "formats can run code, and are not read: save it with `save_pretrained`."
            )


def require(*packages: str, needed_by: str = "A report") -> None:
    """
    Fails early, with what to install, where the first measurement would fail with a bare `No module named ...`.

    Args:
        *packages (`str`):
            Packages of the extra `evaluation`.
        needed_by (`str`, *optional*, defaults to `"A report"`):
            What needs them, for the message.

    Raises:
        `ImportError`: If one of the packages cannot be imported.
    """
    missing = []
    for package in packages:
        try:
            importlib.import_module(package)
        except ImportError:
            missing.append(package)
    if missing:
        raise ImportError(
            f"{needed_by} needs the package{'s' * (len(missing) > 1)} {', '.join(f'`{name}`' for name in missing)}: "
            'pip install "trl-ext[evaluation]".'
        )


FILE_TYPES = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv"}


def _refuse_missing_path(option: str, name: str, file_types: Iterable[str] = ()) -> None:
    """
    An error for a path that does not exist. The Hub would be asked for it several times, and then be said not to have it.
    """
    path_like = name.startswith(("/", "./", "../", "~")) or name.removesuffix(".gz").endswith(tuple(file_types))
    if path_like and not Path(name).expanduser().exists():
        raise ValueError(f"`{option}={name!r}`: there is no file or folder {name} in {Path.cwd()}. Check the path.")


def load_pairs(name: str, split: str, config: str | None = None):
    """
    A split of a preference dataset: of the Hub, of a folder (of data files named after their splits, or written by
    `save_to_disk`), or one JSONL, JSON, Parquet or CSV file, which is taken whole.
    """
    from datasets import Dataset, load_dataset, load_from_disk

    _refuse_missing_path("dataset", name, FILE_TYPES)
    path = Path(name).expanduser()
    name = str(path) if path.exists() else name
    if path.is_file():
        suffix = Path(path.stem if path.suffix == ".gz" else path.name).suffix
        if suffix not in FILE_TYPES:
            raise ValueError(f"`dataset={name!r}` is a file of an unknown type; known: {', '.join(FILE_TYPES)}.")
        return load_dataset(FILE_TYPES[suffix], data_files={"train": str(path)}, split="train")
    saved = any((path / file).exists() for file in ("dataset_dict.json", "state.json"))
    dataset = load_from_disk(name) if saved else load_dataset(name, name=config)
    if isinstance(dataset, Dataset):
        return dataset
    if split not in dataset:
        raise ValueError(
            f"`split={split!r}`: the dataset {name} has {', '.join(map(repr, dataset))}. Give one of these."
        )
    return dataset[split]
