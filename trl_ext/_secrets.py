"""Secrets among options: told by their names, by their form, and in addresses. They are neither shown nor saved."""

import re
from collections.abc import Mapping
from typing import Any


# What a secret is called, after `-` and a change of case became `_`. `pad_token`, `eos_token` and their kin are none.
_NAME = re.compile(
    r"(.*_)?((access|api|auth|bearer|client|hf|hub|huggingface|private|refresh|secret|session)_token"
    r"|(access|account|api|auth|client|encryption|license|private|secret|signing|subscription)_?key(_id)?"
    r"|passw(or)?d|passphrase|pwd|secret|client_secret|credentials?|authorization|cookie|use_auth_token)s?|tokens?"
)
# What tokens and keys of common services look like, and a header that carries one.
_FORM = re.compile(
    r"\bhf_[A-Za-z0-9]{8,}|\bsk-[\w-]{12,}|\bgh[pousr]_[A-Za-z0-9]{16,}|\bgithub_pat_\w{16,}|\bglpat-[\w-]{16,}"
    r"|\bAKIA[A-Z0-9]{12,}|\bxox[abpr]-[\w-]{10,}|\bAIza[\w-]{20,}|\bBearer\s+(?=\S*\d)[\w.~+/=-]{12,}"
)
_USER_OF_ADDRESS = re.compile(r"(?<=://)[^/@\s]+@")


def is_secret_name(name: Any) -> bool:
    """Whether an option or a key is called as a secret is."""
    if not isinstance(name, str):
        return False
    words = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name.strip()).replace("-", "_").replace(".", "_").casefold()
    return bool(_NAME.fullmatch(words))


def without_secrets(name: Any, value: Any, instead: Any) -> Any:
    """
    An option's value without secrets, inside dictionaries and lists as well.

    Args:
        name (`str`): Name of the option, or key of the value.
        value: The value. It is returned as it is, not copied, if it holds no secret.
        instead: What stands in place of a secret.
    """
    if is_secret_name(name):
        # `True` means "the token of this machine", and numbers count tokens.
        is_plain = value is None or isinstance(value, (bool, int, float)) or value == ""
        return value if is_plain else instead
    if isinstance(value, Mapping):
        hidden: Any = {key: without_secrets(key, item, instead) for key, item in value.items()}
        return value if all(hidden[key] is value[key] for key in hidden) else hidden
    if isinstance(value, (list, tuple)) and type(value) in (list, tuple):
        items = [without_secrets(None, item, instead) for item in value]
        return value if all(a is b for a, b in zip(items, value, strict=True)) else type(value)(items)
    if isinstance(value, str):
        if _FORM.search(value):
            return instead
        return _USER_OF_ADDRESS.sub("<HIDDEN>@", value) if "://" in value else value
    return value
