"""
Checks of option values: what a field may hold is declared in its annotation, and one function walks the annotations.

```python
beta: Annotated[float, above(0)] = 0.1
alpha: Annotated[float | None, between(0, 1, "[)")] = None
kappa: Annotated[float | str, above(0), Words("auto")] = "auto"
```

`Annotated` rather than field metadata, since argument parsers of Transformers and TRL hand all metadata to `argparse`
and strip annotations. A closed set of strings is `metadata={"choices": [...]}`, which `argparse` checks, too.
"""

import dataclasses
import enum
import json
import math
import numbers
import os
import types
import typing
import unicodedata
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Union

from ._secrets import without_secrets


@dataclass(frozen=True)
class Range:
    """
    Numbers from `low` to `high`.

    Args:
        low (`float`, *optional*, defaults to `-inf`):
            Least number.
        high (`float`, *optional*, defaults to `inf`):
            Largest number.
        brackets (`str`, *optional*, defaults to `"[]"`):
            Whether the ends are in the range, as an interval is written: `"[]"`, `"(]"`, `"[)"`, `"()"`.
        finite (`bool`, *optional*, defaults to `True`):
            Whether infinity is refused even where the range has no end.
    """

    low: float = -math.inf
    high: float = math.inf
    brackets: str = "[]"
    finite: bool = True

    def holds(self, value: float) -> bool:
        if math.isnan(value) or (self.finite and math.isinf(value)):
            return False
        above_low = value > self.low if self.brackets[0] == "(" else value >= self.low
        below_high = value < self.high if self.brackets[1] == ")" else value <= self.high
        return above_low and below_high

    def describe(self, kind: str) -> str:
        """The range in words, after what kind of number it is about: `"a finite number"`, `"an integer"`."""
        if self.low == -math.inf and self.high == math.inf:
            return kind
        if self.high == math.inf:
            if self.low == 0 and self.brackets[0] == "(" and kind != "an integer":
                return "a positive, finite number" if self.finite else "a positive number"
            return f"{kind} {'greater than' if self.brackets[0] == '(' else 'of at least'} {self.low:g}"
        if self.low == -math.inf:
            return f"{kind} {'less than' if self.brackets[1] == ')' else 'of at most'} {self.high:g}"
        return f"{kind} in {self.brackets[0]}{self.low:g}, {self.high:g}{self.brackets[1]}"


@dataclass(frozen=True)
class Words:
    """Strings that are taken in place of a number; `None` is then refused, whatever the annotation says."""

    words: tuple[str, ...]

    def __init__(self, *words: str):
        object.__setattr__(self, "words", words)


@dataclass(frozen=True)
class _NotEmpty:
    """Strings that are more than space and have no control characters, as names and paths; lists that are not empty."""


NOT_EMPTY = _NotEmpty()


@dataclass(frozen=True)
class _JsonFile:
    """Besides a dictionary and its JSON text, the path of a file that holds one."""


JSON_FILE = _JsonFile()


@dataclass(frozen=True)
class _AnyText:
    """Besides a dictionary any text, which whoever reads it checks."""


ANY_TEXT = _AnyText()


@dataclass(frozen=True)
class _Explained:
    """Choices for the command line only: in Python the class itself refuses others, and explains them."""


EXPLAINED = _Explained()


def above(low: float) -> Range:
    """Finite numbers greater than `low`."""
    return Range(low, brackets="(]")


def at_least(low: float) -> Range:
    """Finite numbers from `low` on."""
    return Range(low)


def between(low: float, high: float, brackets: str = "[]") -> Range:
    """Numbers from `low` to `high`; `brackets` says whether the ends are among them, such as `"[)"`."""
    return Range(low, high, brackets)


def default_of(field: dataclasses.Field):
    """Default value of a dataclass field; `dataclasses.MISSING` if it has none."""
    return field.default_factory() if field.default_factory is not dataclasses.MISSING else field.default


def check_value(name: str, value, annotation, *, choices: Collection | None = None, default=dataclasses.MISSING):
    """
    Checks one option.

    Args:
        name (`str`):
            Its name, for the message.
        value:
            What it was given.
        annotation:
            Type of the option, possibly `Annotated` with [`Range`], [`Words`], `NOT_EMPTY`, or, for
            dictionaries, `JSON_FILE` or `ANY_TEXT`.
        choices (collection of `str`, *optional*):
            The strings that it may hold.
        default (*optional*):
            Its default, which is always taken, and named in the message.

    Returns:
        The value in plain Python: a number of NumPy becomes an `int` or a `float`, an integral `float` an `int` where
        the option is an integer, a path a `str`, and JSON text a dictionary where the option is one.

    Raises:
        `ValueError`: If the value has another type, is out of range, or not among the choices.
    """
    allowed = _Allowed.of(annotation, choices)
    if default is not dataclasses.MISSING and type(value) is type(default) and value == default:
        return value
    value = allowed.plain(value)
    if not allowed.holds(value):
        told = "" if default is dataclasses.MISSING else f" The default is {default!r}."
        shown = without_secrets(name, value, "<HIDDEN>")
        raise ValueError(f"`{name}` must be {allowed.describe()}, got {shown!r}.{told}")
    return value


def check_fields(options, *, annotations: Mapping[str, Any] | None = None) -> None:
    """
    Checks every field of a dataclass instance, and sets it to the plain form of its value.

    Args:
        options:
            The instance.
        annotations (`Mapping[str, Any]`, *optional*):
            Annotations that take the place of the fields' own, for those that are inherited from another library.

    Raises:
        `ValueError`: For the first field with an invalid value.
    """
    hints = {**annotations_of(type(options)), **(annotations or {})}
    for field in dataclasses.fields(options):
        if not field.init:
            continue
        value = getattr(options, field.name)
        choices = None if annotations and field.name in annotations else field.metadata.get("choices")
        checked = check_value(field.name, value, hints[field.name], choices=choices, default=default_of(field))
        if checked is not value:
            setattr(options, field.name, checked)


def annotations_of(cls: type) -> dict[str, Any]:
    """
    Annotations of a class and its parents, `Annotated` included. `Field.type` is no substitute: parsers rewrite it.
    """
    if cls not in _ANNOTATIONS:
        _ANNOTATIONS[cls] = typing.get_type_hints(cls, include_extras=True)
    return _ANNOTATIONS[cls]


_ANNOTATIONS: dict[type, dict[str, Any]] = {}


@dataclass(frozen=True)
class _Allowed:
    """An annotation taken apart."""

    members: tuple
    range: Range | None
    words: Words | None
    not_empty: bool
    choices: tuple[str, ...] | None
    text: _JsonFile | _AnyText | None  # what a text may be where the option is a dictionary

    @classmethod
    def of(cls, annotation, choices: Collection | None = None) -> "_Allowed":
        marks: Sequence[Any] = ()
        if typing.get_origin(annotation) is Annotated:
            annotation, *marks = typing.get_args(annotation)
        is_union = typing.get_origin(annotation) in (Union, types.UnionType)
        members = typing.get_args(annotation) if is_union else (annotation,)
        return cls(
            members=tuple(type(None) if member is None else member for member in members),
            range=next((mark for mark in marks if isinstance(mark, Range)), None),
            words=next((mark for mark in marks if isinstance(mark, Words)), None),
            not_empty=NOT_EMPTY in marks,
            choices=None if choices is None or EXPLAINED in marks else tuple(choices),
            text=next((mark for mark in marks if isinstance(mark, (_JsonFile, _AnyText))), None),
        )

    @property
    def _is_dictionary(self) -> bool:
        """Whether the option is a dictionary, which may come as JSON text."""
        return any(_is_mapping(member) for member in self.members) and str in self.members

    def plain(self, value):
        if isinstance(value, os.PathLike) and str in self.members and self.choices is None:
            return os.fspath(value)
        kinds = {typing.get_origin(member) or member for member in self.members}
        if isinstance(value, tuple) and list in kinds and tuple not in kinds:
            return list(value)
        if isinstance(value, str) and self._is_dictionary and value.lstrip().startswith("{"):
            try:
                return json.loads(value)
            except ValueError:
                return value
        if isinstance(value, str) and self.words is not None and value not in self.words.words:
            try:  # as it comes from the command line
                return float(value)
            except ValueError:
                return value
        if isinstance(value, bool) or not isinstance(value, numbers.Real):
            return value
        if not isinstance(value, (int, float)) and hasattr(value, "item"):
            value = value.item()
        if isinstance(value, float) and int in self.members and float not in self.members:
            # Beyond 2^53 a float is no longer the integer that it was written as.
            return int(value) if abs(value) <= 2**53 and value == int(value) else value
        return value

    def holds(self, value) -> bool:
        if value is None:
            return self.words is None and (type(None) in self.members or Any in self.members)
        if not any(_is_a(value, member) for member in self.members):
            return False
        if isinstance(value, numbers.Real) and not isinstance(value, bool):
            return (self.range or Range()).holds(typing.cast(float, value))
        if isinstance(value, Mapping):
            return not self._is_dictionary or self.text is not None or not _has_lost_types(value)
        if isinstance(value, str):
            if self.words is not None:
                return value in self.words.words
            if self._is_dictionary:
                is_file = isinstance(self.text, _JsonFile) and "\0" not in value and os.path.isfile(value)
                return is_file or isinstance(self.text, _AnyText)
            if self.not_empty and (not value.strip() or _has_control_characters(value)):
                return False
            kinds = [member for member in self.members if isinstance(member, type) and issubclass(member, enum.Enum)]
            if self.choices is not None and str(value) not in self.choices:
                return False
            if kinds and not isinstance(value, enum.Enum):
                return any(_is_value_of(value, kind) for kind in kinds)
        return not (self.not_empty and isinstance(value, (str, list, tuple)) and not value)

    def describe(self) -> str:
        if self.choices is not None:
            parts = [f"one of {', '.join(map(repr, self.choices))}"]
        else:
            parts = []
            for member in self.members:
                text = self._describe(member)
                if text is not None and text not in parts:
                    parts.append(text)
        if bool in self.members and self.choices is not None:
            parts.append("True or False")
        if type(None) in self.members and self.words is None:
            parts.append("None")
        return " or ".join(parts)

    def _describe(self, member) -> str | None:
        if member is type(None):
            return None
        if member in (int, float):
            kind = "an integer" if member is int else "a finite number"
            if self.range is None:
                return kind
            is_open = math.inf in (-self.range.low, self.range.high)
            if member is float and not (self.range.finite and is_open):
                kind = "a number"
            return self.range.describe(kind)
        if member is str:
            if self.words is not None:
                return " or ".join(map(repr, self.words.words))
            if any(isinstance(kind, type) and issubclass(kind, enum.Enum) for kind in self.members):
                return None
            if self._is_dictionary and not isinstance(self.text, _AnyText):
                other = ", or a file that holds one" if self.text is not None else ""
                return f"the JSON text of one, without NaN and with `true` and `false` for truth values{other}"
            return "a string that is not empty and without control characters" if self.not_empty else "a string"
        return _describe_type(member)


def _is_a(value, kind) -> bool:
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is Annotated:
        return _Allowed.of(kind).holds(value)
    if kind is Any:
        return True
    if origin is Literal:
        return any(type(value) is type(choice) and value == choice for choice in arguments)
    if origin in (Union, types.UnionType):
        return any(_is_a(value, member) for member in arguments)
    if kind is None or kind is type(None):
        return value is None
    if kind is bool:
        return isinstance(value, bool)
    if kind is int:
        return isinstance(value, numbers.Integral) and not isinstance(value, bool)
    if kind is float:
        return isinstance(value, numbers.Real) and not isinstance(value, bool) and not math.isnan(value)
    if origin is list or kind is list:
        elements = arguments[0] if arguments else Any
        return isinstance(value, (list, tuple)) and all(_is_element(element, elements) for element in value)
    if _is_mapping(kind):
        keys, values = arguments or (str, Any)
        return isinstance(value, Mapping) and all(_is_a(k, keys) and _is_a(v, values) for k, v in value.items())
    checked = origin or kind
    return isinstance(value, checked) if isinstance(checked, type) else True


def _is_mapping(kind) -> bool:
    return typing.get_origin(kind) in (dict, Mapping) or kind in (dict, Mapping)


def _has_lost_types(value) -> bool:
    """Whether there is a NaN, or a truth value as text, in what may be nested."""
    if isinstance(value, Mapping):
        return any(map(_has_lost_types, value.values()))
    if isinstance(value, (list, tuple)):
        return any(map(_has_lost_types, value))
    if isinstance(value, str):
        return value.strip().lower() in ("true", "false")
    return isinstance(value, float) and math.isnan(value)


def _has_control_characters(text: str) -> bool:
    return any(unicodedata.category(character) == "Cc" for character in text)


def _is_element(value, kind) -> bool:
    if isinstance(kind, type) and issubclass(kind, enum.Enum) and isinstance(value, str):
        return _is_value_of(value, kind)
    return _is_a(value, kind) and not (isinstance(value, float) and math.isinf(value))


def _is_value_of(value: str, kind: type[enum.Enum]) -> bool:
    try:
        kind(value)
    except ValueError:
        return False
    return True


_ELEMENTS = {str: "strings", int: "integers", float: "finite numbers", bool: "truth values"}


def _describe_type(kind) -> str:
    origin, arguments = typing.get_origin(kind) or kind, typing.get_args(kind)
    if origin is Annotated:
        return _Allowed.of(kind).describe()
    if origin is bool:
        return "True or False"
    if origin is list:
        elements = arguments[0] if arguments else None
        if isinstance(elements, type) and issubclass(elements, enum.Enum):
            return f"a list of {', '.join(repr(item.value) for item in elements)}"
        return f"a list of {_ELEMENTS[elements]}" if elements in _ELEMENTS else "a list"
    if origin in (dict, Mapping):
        return "a dictionary"
    if origin is Literal:
        return f"one of {', '.join(map(repr, arguments))}"
    if isinstance(origin, type) and issubclass(origin, enum.Enum):
        return f"one of {', '.join(repr(item.value) for item in origin)}"
    return f"a `{getattr(origin, '__name__', origin)}`"
