"""JSON to the types of the package, strictly: one place for all data that somebody else wrote.

A type is a schema. ``decode`` reads dataclasses, tuples, lists, dicts, unions, literals, texts,
numbers and ``Any``; what does not fit raises an error that names the place.
"""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence
import dataclasses
from functools import cache
import math
import types
from typing import Any
from typing import cast
from typing import get_args
from typing import get_origin
from typing import get_type_hints
from typing import Literal
from typing import TypeVar
from typing import Union


T = TypeVar("T")
_NAMES: dict[Any, str] = {
    str: "a text",
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    type(None): "null",
    list: "a list",
    tuple: "a list",
    dict: "an object",
}
_MAX_SHOWN = 80


class SchemaError(ValueError):
    """A JSON value is not of the type that was expected; the message names the place."""


def decode(kind: type[T], value: Any, *, at: str = "") -> T:
    """Reads a JSON value as a type.

    A whole number is a number, ``true`` is none. NaN and infinities, which are no JSON, are
    refused. Keys that a dataclass does not have are passed over.

    Args:
        kind: The type.
        value: What ``json.loads`` made.
        at: Where the value stands, for the error.

    Raises:
        SchemaError: If the value does not fit.
    """
    return cast(T, _decode(kind, value, at))


def _decode(kind: Any, value: Any, at: str) -> Any:
    origin, args = get_origin(kind), get_args(kind)
    if kind is Any:
        return value
    if origin is Sequence:
        origin, args = tuple, (*args, ...)
    if origin in (Union, types.UnionType):
        return _union(args, value, at)
    if origin is Literal:
        # 1 == True: the types must be the same, too.
        if any(value == known and type(value) is type(known) for known in args):
            return value
        raise _wrong(" or ".join(map(repr, args)), value, at)
    if dataclasses.is_dataclass(kind):
        return _dataclass(kind, value, at)
    if origin in (tuple, list) or kind in (tuple, list):
        return _sequence(origin or kind, args, value, at)
    if origin in (dict, Mapping) or kind is dict:
        return _mapping(args, value, at)
    return _scalar(kind, value, at)


def _union(kinds: tuple[Any, ...], value: Any, at: str) -> Any:
    for kind in kinds:
        try:
            return _decode(kind, value, at)
        except SchemaError as error:
            nested = error
            if isinstance(value, dict | list) and (get_origin(kind) or kind) not in _NAMES:
                raise  # The one kind that can hold it says best what is wrong inside.
    names = [_NAMES.get(get_origin(kind) or kind, "") for kind in kinds]
    raise _wrong(" or ".join(names), value, at) if all(names) else nested


def _dataclass(kind: Any, value: Any, at: str) -> Any:
    if not isinstance(value, dict):
        raise _wrong("an object", value, at)
    hints = _hints(kind)
    found = {}
    for field in dataclasses.fields(kind):
        place = f"{at}.{field.name}" if at else field.name
        if field.name in value:
            found[field.name] = _decode(hints[field.name], value[field.name], place)
        elif field.default is field.default_factory is dataclasses.MISSING:
            raise SchemaError(f'"{place}" is missing')
    try:
        return kind(**found)
    except ValueError as error:  # From a check of its own.
        raise SchemaError(str(error)) from error


def _sequence(kind: Any, args: tuple[Any, ...], value: Any, at: str) -> Any:
    if not isinstance(value, list | tuple):
        raise _wrong("a list", value, at)
    if kind is tuple and args and args[-1] is not Ellipsis:
        if len(value) != len(args):
            raise _wrong(f"a list of {len(args)}", value, at)
        kinds = args
    else:
        kinds = (args[0] if args else Any,) * len(value)
    items = zip(kinds, value, strict=True)
    return kind(_decode(k, item, f"{at}[{i}]") for i, (k, item) in enumerate(items))


def _mapping(args: tuple[Any, ...], value: Any, at: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise _wrong("an object", value, at)
    kind = args[1] if args else Any
    return {key: _decode(kind, item, f"{at}.{key}".lstrip(".")) for key, item in value.items()}


def _scalar(kind: Any, value: Any, at: str) -> Any:
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if type(value) is not kind or (kind is float and not math.isfinite(value)):
        raise _wrong(_NAMES.get(kind, repr(kind)), value, at)
    return value


@cache
def _hints(kind: Any) -> dict[str, Any]:
    return get_type_hints(kind)


def _wrong(expected: str, value: Any, at: str) -> SchemaError:
    shown = repr(value)
    shown = shown if len(shown) <= _MAX_SHOWN else f"{shown[:_MAX_SHOWN]}…"
    return SchemaError(
        f"{f'{chr(34)}{at}{chr(34)} ' if at else ''}must be {expected}, got {shown}"
    )
