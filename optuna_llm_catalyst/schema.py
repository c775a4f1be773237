"""JSON to the types of the package, strictly: one place for all data that somebody else wrote.

A type is a schema. ``decode`` reads dataclasses, tuples, lists, dicts, unions, literals, texts,
numbers and ``Any``; what does not fit raises an error that names the place. ``encode`` writes
what ``decode`` reads.
"""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence
import dataclasses
from functools import cache
import math
import reprlib
import types
from typing import Annotated
from typing import Any
from typing import cast
from typing import get_args
from typing import get_origin
from typing import get_type_hints
from typing import Literal
from typing import TypeVar
from typing import Union


T = TypeVar("T")
#: A number that may be NaN or infinite. JSON cannot say so: it has null, which is read as NaN.
AnyFloat = Annotated[float, "null is NaN"]

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
_REFUSED = "is refused: "
_shorten = reprlib.Repr()
_shorten.maxstring = _shorten.maxother = 80


class Row:
    """Base of the dataclasses that are a list of their fields in JSON, which is short."""


class SchemaError(ValueError):
    """A JSON value is not of the type that was expected; the message names the place."""

    def __init__(self, problem: str, place: str = "") -> None:
        where = place.lstrip(".")
        super().__init__(f'"{where}" {problem}' if where else problem.removeprefix(_REFUSED))
        self.problem = problem
        self.place = place


def decode(kind: type[T], value: Any, *, at: str = "") -> T:
    """Reads a value that ``json.loads`` made as a type; ``at`` is its place, for the error.

    Integers are accepted as numbers; booleans are not. NaN and infinities, which are no JSON, are
    refused. Keys that a dataclass does not have are passed over.

    Raises:
        SchemaError: If the value does not fit.
    """
    return cast(T, _inside(at, kind, value))


def encode(value: Any) -> Any:
    """Writes a value as JSON that ``decode`` reads; numbers that are not finite become null."""
    if dataclasses.is_dataclass(value):
        fields = {f.name: encode(getattr(value, f.name)) for f in dataclasses.fields(value)}
        return list(fields.values()) if isinstance(value, Row) else fields
    if isinstance(value, Mapping):
        return {key: encode(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [encode(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _decode(kind: Any, value: Any) -> Any:
    origin, args = get_origin(kind), get_args(kind)
    if kind is Any:
        return value
    if origin is Annotated:
        return math.nan if value is None else _decode(args[0], value)
    if origin is Sequence:
        origin, args = tuple, (*args, ...)
    if origin in (Union, types.UnionType):
        return _union(args, value)
    if origin is Literal:
        # 1 == True: the types must be the same, too.
        if any(value == known and type(value) is type(known) for known in args):
            return value
        raise _wrong(" or ".join(map(repr, args)), value)
    if dataclasses.is_dataclass(kind):
        return _dataclass(kind, value)
    if origin in (tuple, list) or kind in (tuple, list):
        return _sequence(origin or kind, args, value)
    if origin in (dict, Mapping) or kind is dict:
        if not isinstance(value, dict):
            raise _wrong("an object", value)
        item_kind = args[1] if args else Any
        return {key: _inside(f".{key}", item_kind, item) for key, item in value.items()}
    if kind is float and type(value) is int and abs(value) < 2**1023:
        return float(value)
    if type(value) is not kind or (kind is float and not math.isfinite(value)):
        raise _wrong(_NAMES.get(kind, repr(kind)), value)
    return value


def _union(kinds: tuple[Any, ...], value: Any) -> Any:
    for kind in kinds:
        try:
            return _decode(kind, value)
        except SchemaError as error:
            nested = error
            if isinstance(value, dict | list) and (get_origin(kind) or kind) not in _NAMES:
                raise  # The one kind that can hold it says best what is wrong inside.
    names = [_NAMES.get(get_origin(kind) or kind, "") for kind in kinds]
    raise _wrong(" or ".join(names), value) if all(names) else nested


def _dataclass(kind: Any, value: Any) -> Any:
    fields = _fields(kind)
    if issubclass(kind, Row) and isinstance(value, list) and len(value) <= len(fields):
        value = dict(zip(fields, value, strict=False))
    if not isinstance(value, dict):
        raise _wrong(f"a list of {len(fields)}" if issubclass(kind, Row) else "an object", value)
    found = {}
    for name, (hint, is_needed) in fields.items():
        if name in value:
            found[name] = _inside(f".{name}", hint, value[name])
        elif is_needed:
            raise SchemaError("is missing", f".{name}")
    try:
        return kind(**found)
    except ValueError as error:  # From a check of its own.
        raise SchemaError(f"{_REFUSED}{error}") from error


def _sequence(kind: Any, args: tuple[Any, ...], value: Any) -> Any:
    if not isinstance(value, list | tuple):
        raise _wrong("a list", value)
    if kind is tuple and args and args[-1] is not Ellipsis:
        if len(value) != len(args):
            raise _wrong(f"a list of {len(args)}", value)
        kinds = args
    else:
        kinds = (args[0] if args else Any,) * len(value)
    items = enumerate(zip(kinds, value, strict=True))
    return kind([_inside(f"[{i}]", item_kind, item) for i, (item_kind, item) in items])


def _inside(place: str, kind: Any, value: Any) -> Any:
    try:
        return _decode(kind, value)
    except SchemaError as error:
        raise SchemaError(error.problem, place + error.place) from error.__cause__


@cache
def _fields(kind: Any) -> dict[str, tuple[Any, bool]]:
    """The fields of a dataclass: their types, and whether they have no default."""
    hints = get_type_hints(kind, include_extras=True)
    return {
        field.name: (hints[field.name], field.default is field.default_factory)
        for field in dataclasses.fields(kind)
    }


def _wrong(expected: str, value: Any) -> SchemaError:
    return SchemaError(f"must be {expected}, got {_shorten.repr(value)}")
