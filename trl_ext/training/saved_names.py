"""Names of models in what is saved: a path of this machine means nothing on another, and is not to be published."""

import json
import os
from collections.abc import Iterable
from pathlib import Path

from .card_facts import BaseModel, public_name


# Keys under which PEFT, Transformers, Diffusers and this project write where a model was loaded from.
_KEYS = {"base_model_name_or_path", "_name_or_path", "name_or_path"}
_FILES = ("adapter_config.json", "config.json", "model_index.json", "base_model.json", "tokenizer_config.json")


def rename_models(folder: Path, base: BaseModel, parts: Iterable[str] = (), is_public: bool = False) -> None:
    """
    Rewrites the names of models in the configurations that were saved in `folder`, and in the metadata of cards beside
    them that were written by hand.

    The base gets its id on the Hub, in place of the local path that PEFT wrote or of none. (If PEFT itself were given
    the id, it would ask the Hub for the base's configuration at every save.) In what is published any other local
    path gives way to its last part.

    Args:
        folder (`Path`): Where a model was saved.
        base ([`BaseModel`]): What training starts from.
        parts (iterable of `str`): Names of the folders in it that parts of the model were saved in.
        is_public (`bool`): Whether the folder is pushed.
    """
    for place in [folder, *(folder / part for part in parts)]:
        for path in (place / name for name in _FILES if (place / name).is_file()):
            values = json.loads(path.read_text(encoding="utf-8"))
            renamed = _rename(values, base, is_public, adapts_base=place == folder)
            if not renamed:
                continue
            path.write_text(json.dumps({**values, **renamed}, indent=2, sort_keys=True) + "\n", encoding="utf-8")
            readme = place / "README.md"
            if readme.is_file():
                head, separator, body = readme.read_text(encoding="utf-8").partition("\n---\n")
                for key, name in renamed.items():
                    head = head.replace(values[key], name) if values[key] else head
                readme.write_text(head + separator + body, encoding="utf-8")


def _rename(values: dict, base: BaseModel, is_public: bool, adapts_base: bool) -> dict[str, str]:
    """The new names by their keys."""
    renamed = {}
    is_on_the_hub = base.hub_ids == [base.name]
    for key in _KEYS & values.keys():
        value = values[key] or ""
        is_base = value == base.loaded_from if value else key == "base_model_name_or_path" and adapts_base
        if is_base and is_on_the_hub:
            renamed[key] = base.name
        elif is_public and (os.path.isabs(value) or os.path.exists(value)):
            renamed[key] = public_name(value)
    return {key: name for key, name in renamed.items() if name != values[key]}
