"""Argument validation shared by the functions on arrays."""

from collections.abc import Hashable, Iterable
from numbers import Integral
from typing import Annotated, cast

import numpy as np

from .._checks import above, at_least, between, check_value


# Prompts, or anything else that rows have in common, one a row; `None` where every row is its own.
Groups = Iterable[Hashable] | None


def as_array(name: str, values, ndim: int | tuple[int, ...] | None = None) -> np.ndarray:
    """
    Converts `values`, a list, a NumPy array, or a tensor of any dtype on any device, to a float64 array.

    Args:
        name (`str`):
            Name of the argument, for messages.
        values:
            Numbers.
        ndim (`int` or `tuple[int, ...]`, *optional*):
            Allowed numbers of dimensions.

    Raises:
        `ValueError`: If `values` is not an array of numbers, has another number of dimensions, or contains NaN.
            Skipping NaN would change what the metric measures.
    """
    if hasattr(values, "detach"):  # a tensor; bfloat16 has no NumPy counterpart
        values = values.detach().cpu().double().numpy()
    try:
        array = np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"`{name}` must be numbers in a rectangular array, got a {type(values).__name__}: {error}"
        ) from error
    allowed = (ndim,) if isinstance(ndim, int) else ndim
    if allowed is not None and array.ndim not in allowed:
        raise ValueError(
            f"`{name}` must have {' or '.join(map(str, allowed))} dimension(s), got an array of shape {array.shape}."
        )
    if np.isnan(array).any():
        raise ValueError(
            f"`{name}` has {int(np.isnan(array).sum())} NaN of {array.size} values. Find out where they come from, "
            "then drop these rows from every argument."
        )
    return array


def as_vectors(**named) -> list[np.ndarray]:
    """Arrays of shape `(N,)` with the same `N >= 1`, in the order of the arguments; `None` stays `None`."""
    arrays = {name: None if values is None else as_array(name, values, 1) for name, values in named.items()}
    lengths = {name: len(array) for name, array in arrays.items() if array is not None}
    if len(set(lengths.values())) > 1:
        raise ValueError(
            f"These must have the same length, got {lengths}. Give one value a row to each, in one order."
        )
    if 0 in lengths.values():
        raise ValueError(f"`{next(iter(lengths))}` is empty: there is nothing to measure.")
    return cast(list[np.ndarray], list(arrays.values()))


def group_codes(groups: Iterable[Hashable] | None, count: int) -> np.ndarray | None:
    """
    Numbers 0 to G - 1 of the groups that rows belong to, or `None` where every row is its own.

    Args:
        groups (`Iterable` of `count` labels, *optional*):
            Labels: ids, texts, tuples of token ids; anything hashable.
        count (`int`):
            Rows.

    Raises:
        `ValueError`: For another number of labels, and for labels that cannot be hashed.
    """
    if groups is None:
        return None
    if hasattr(groups, "tolist"):  # elements of a tensor are not equal to each other as keys
        groups = groups.tolist()
    numbers: dict = {}
    try:
        codes = np.array([numbers.setdefault(label, len(numbers)) for label in groups], dtype=np.int64)
    except TypeError as error:
        raise ValueError(
            f"`groups` must be hashable labels, one a row: {error}. Make texts or tuples of them, or number the "
            "prompts."
        ) from error
    if len(codes) != count:
        raise ValueError(f"`groups` has {len(codes)} labels for {count} rows. Give one a row, such as its prompt.")
    return None if len(numbers) == count else codes


def check_positive(name: str, value: float) -> float:
    """`value` as a `float`, if it is a finite number greater than 0."""
    return float(check_value(name, value, Annotated[float, above(0)]))


def check_between(name: str, value: float, low: float, high: float) -> float:
    """`value` as a `float`, if it is strictly between `low` and `high`."""
    return float(check_value(name, value, Annotated[float, between(low, high, "()")]))


def check_count(name: str, value: int, least: int) -> int:
    """`value` as an `int`, if it is an integer of at least `least`."""
    checked = check_value(name, value, Annotated[int, at_least(least)])
    if not isinstance(value, Integral):  # options of a command line may be 8.0, arguments of a function may not
        raise ValueError(f"`{name}` must be an integer of at least {least}, got {value!r}.")
    return checked


def check_comparable(**named: np.ndarray) -> None:
    """
    Refuses rows where both of two arrays are the same infinity: neither is the greater.

    Raises:
        `ValueError`: For such rows.
    """
    (first_name, first), (second_name, second) = named.items()
    same = np.isinf(first) & (first == second)
    if same.any():
        raise ValueError(
            f"`{first_name}` and `{second_name}` are both {first[same][0]} in {int(same.sum())} of {len(first)} rows, "
            f"the first of them row {int(same.argmax())}: neither is the greater. Drop these rows from every argument."
        )


def check_log_probs(name: str, values: np.ndarray, *, possible: bool = False) -> None:
    """
    Refuses `+inf` among log-probabilities, and with `possible` `-inf` too: a response that was sampled has a
    probability.

    Raises:
        `ValueError`: For such values.
    """
    wrong = np.isinf(values) if possible else np.isposinf(values)
    if wrong.any():
        raise ValueError(
            f"`{name}` has {int(wrong.sum())} infinite values of {values.size}, the first of them {values[wrong][0]}: "
            f"no log-probability of a response{' that the model has sampled' if possible else ''}. Check what was "
            "scored."
        )
