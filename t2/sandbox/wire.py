"""Values as bytes between the judge and the judged program: data only, of exact builtin types.

Runs inside the sandbox, so it imports the standard library only. A value that arrives is built here from its bytes,
one builtin object at a time. Nothing that the sender defines comes along: no class, no method, no comparison.

`encode` accepts None, bool, int, float, complex, str, bytes, bytearray, list, tuple, set, frozenset, dict, range,
deque, Counter, OrderedDict, defaultdict, the views of a dict, Decimal and Fraction. Instances of a subclass arrive as
the builtin type below it: a named tuple as a tuple, a member of an IntEnum as an int. Iterators and generators stay
where they are and arrive as a number to ask for their items by. Everything else is refused.
"""

from __future__ import annotations

import builtins
import os
import struct
import sys
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterable
from typing import Any

MESSAGE_BYTES = 16 << 20
"""Maximum size of a message."""
DEPTH = 100
"""Maximum nesting of a value, which bounds cycles too."""
NONCE_BYTES = 16

_EMPTY: dict[Any, Any] = {}
DICT_KEYS, DICT_VALUES, DICT_ITEMS = type(_EMPTY.keys()), type(_EMPTY.values()), type(_EMPTY.items())
FACTORIES = {kind.__name__: kind for kind in (bool, int, float, complex, str, bytes, list, tuple, set, frozenset, dict)}
"""Factories that arrive with their defaultdict; any other arrives as None."""
EXCEPTIONS = {
    name: kind
    for name, kind in vars(builtins).items()
    if isinstance(kind, type) and issubclass(kind, BaseException) and not issubclass(kind, BaseExceptionGroup)
}
"""The builtin exceptions. A group holds other exceptions, which do not travel."""


class EncodeError(Exception):
    """Raised for a value that cannot be encoded."""


class DecodeError(Exception):
    """Raised for bytes that are no message."""


def encode(value: Any, keep: Callable[[Any], int] | None = None) -> bytes:
    """Encode a value as bytes.

    Args:
        value: of the types above, nested at most DEPTH deep.
        keep: stores an iterator and returns its number; None refuses iterators.

    Raises:
        EncodeError: a value of another type, too deep, or more than MESSAGE_BYTES.
    """
    out = bytearray()

    def size(number: int) -> None:
        out.extend(number.to_bytes(4, "big"))

    def text(tag: bytes, content: bytes) -> None:
        out.extend(tag)
        if len(content) > MESSAGE_BYTES:
            raise EncodeError(f"a value of more than {MESSAGE_BYTES:,} bytes")
        size(len(content))
        out.extend(content)

    def many(tag: bytes, items: Iterable[Any], depth: int) -> None:
        out.extend(tag)
        place, count = len(out), 0
        size(0)
        for item in items:
            write(item, depth)
            count += 1
        out[place : place + 4] = count.to_bytes(4, "big")

    def pairs(tag: bytes, items: Iterable[tuple[Any, Any]], depth: int) -> None:
        many(tag, (part for pair in items for part in pair), depth)

    def write(value: Any, depth: int) -> None:
        if depth > DEPTH:
            raise EncodeError(f"a value nested more than {DEPTH} deep")
        if len(out) > MESSAGE_BYTES:
            raise EncodeError(f"a value of more than {MESSAGE_BYTES:,} bytes")
        depth += 1
        if value is None:
            out.extend(b"N")
        elif value is True:
            out.extend(b"T")
        elif value is False:
            out.extend(b"F")
        elif isinstance(value, int):
            number = int.__int__(value)
            text(b"i", number.to_bytes(number.bit_length() // 8 + 1, "big", signed=True))
        elif isinstance(value, float):
            out.extend(struct.pack(">cd", b"f", value))
        elif isinstance(value, str):
            text(b"s", str.encode(value, "utf-8", "surrogatepass"))
        elif isinstance(value, list):
            many(b"l", list.__iter__(value), depth)
        elif isinstance(value, tuple):
            many(b"t", tuple.__iter__(value), depth)
        elif isinstance(value, Counter):
            pairs(b"C", dict.items(value), depth)
        elif isinstance(value, OrderedDict):
            pairs(b"O", OrderedDict.items(value), depth)
        elif isinstance(value, defaultdict):
            out.extend(b"D")
            factory = value.default_factory
            write(next((name for name, kind in FACTORIES.items() if kind is factory), None), depth)
            pairs(b"d", dict.items(value), depth)
        elif isinstance(value, dict):
            pairs(b"d", dict.items(value), depth)
        elif isinstance(value, set):
            many(b"S", set.__iter__(value), depth)
        elif isinstance(value, frozenset):
            many(b"Z", frozenset.__iter__(value), depth)
        elif isinstance(value, complex):
            out.extend(struct.pack(">cdd", b"c", value.real, value.imag))
        elif isinstance(value, bytes | bytearray):
            text(b"b" if isinstance(value, bytes) else b"B", bytes(value))
        elif isinstance(value, deque):
            out.extend(b"q")
            write(value.maxlen, depth)
            many(b"l", deque.__iter__(value), depth)
        elif isinstance(value, range):
            many(b"r", (value.start, value.stop, value.step), depth)
        elif isinstance(value, DICT_KEYS):
            many(b"k", value, depth)
        elif isinstance(value, DICT_VALUES):
            many(b"v", value, depth)
        elif isinstance(value, DICT_ITEMS):
            pairs(b"m", value, depth)
        elif is_a(value, "decimal", "Decimal"):
            text(b"x", str(value).encode())
        elif is_a(value, "fractions", "Fraction"):
            many(b"y", (value.numerator, value.denominator), depth)
        elif hasattr(type(value), "__next__") and keep is not None:
            out.extend(b"g")
            write(keep(value), depth)
        else:
            raise EncodeError(f"a value of type {type(value).__name__}")

    write(value, 0)
    if len(out) > MESSAGE_BYTES:
        raise EncodeError(f"a value of more than {MESSAGE_BYTES:,} bytes")
    return bytes(out)


def is_a(value: Any, module: str, name: str) -> bool:
    """True for an instance of a class, without importing the class's module."""
    kind = getattr(sys.modules.get(module), name, None)
    return isinstance(kind, type) and isinstance(value, kind)


def decode(data: bytes, ask: Callable[[int], Any] | None = None) -> Any:
    """Decode the bytes that `encode` gives.

    Args:
        data: from anyone.
        ask: makes an iterator of its number; None accepts no iterators.

    Raises:
        DecodeError: not what `encode` makes, or nested too deep.
    """
    place = 0

    def take(length: int) -> bytes:
        nonlocal place
        if length > len(data) - place:
            raise DecodeError("it ends too early")
        place += length
        return data[place - length : place]

    def size() -> int:
        return int.from_bytes(take(4), "big")

    def many(depth: int) -> list[Any]:
        return [read(depth) for _ in range(size())]

    def exactly(kind: type, value: Any) -> Any:
        if type(value) is not kind:
            raise DecodeError(f"{type(value).__name__} in place of {kind.__name__}")
        return value

    def pairs(depth: int) -> list[tuple[Any, Any]]:
        parts = many(depth)
        if len(parts) % 2:
            raise DecodeError("a key without a value")
        return list(zip(parts[::2], parts[1::2], strict=True))

    def read(depth: int) -> Any:
        if depth > DEPTH:
            raise DecodeError("nested too deep")
        depth += 1
        tag = take(1)
        match tag:
            case b"N":
                return None
            case b"T":
                return True
            case b"F":
                return False
            case b"i":
                return int.from_bytes(take(size()), "big", signed=True)
            case b"f":
                return struct.unpack(">d", take(8))[0]
            case b"c":
                return complex(*struct.unpack(">dd", take(16)))
            case b"s":
                return take(size()).decode("utf-8", "surrogatepass")
            case b"b":
                return take(size())
            case b"B":
                return bytearray(take(size()))
            case b"l":
                return many(depth)
            case b"t":
                return tuple(many(depth))
            case b"S":
                return set(many(depth))
            case b"Z":
                return frozenset(many(depth))
            case b"d":
                return dict(pairs(depth))
            case b"C":
                return Counter(dict(pairs(depth)))
            case b"O":
                return OrderedDict(pairs(depth))
            case b"D":
                name = read(depth)
                factory = None if name is None else FACTORIES[exactly(str, name)]
                return defaultdict(factory, exactly(dict, read(depth)))
            case b"q":
                length = read(depth)
                return deque(exactly(list, read(depth)), None if length is None else exactly(int, length))
            case b"r":
                return range(*(exactly(int, part) for part in many(depth)))
            case b"k":
                return dict.fromkeys(many(depth)).keys()
            case b"v":
                return dict(enumerate(many(depth))).values()
            case b"m":
                return dict(pairs(depth)).items()
            case b"x":
                from decimal import Decimal

                return Decimal(take(size()).decode("ascii"))
            case b"y":
                from fractions import Fraction

                return Fraction(*(exactly(int, part) for part in many(depth)))
            case b"g" if ask is not None:
                return ask(exactly(int, read(depth)))
        raise DecodeError(f"tag {tag!r}")

    try:
        value = read(0)
    except DecodeError:
        raise
    except (ValueError, TypeError, KeyError, ArithmeticError, RecursionError, MemoryError) as error:
        raise DecodeError(f"{type(error).__name__}: {error}") from None
    if place != len(data):
        raise DecodeError("it goes on after its end")
    return value


def send(descriptor: int, nonce: bytes, content: bytes) -> None:
    """Write one message."""
    unsent = memoryview(nonce + len(content).to_bytes(4, "big") + content)
    while unsent:
        unsent = unsent[os.write(descriptor, unsent) :]


def receive(descriptor: int) -> tuple[bytes, bytes]:
    """Read the next message: its nonce and content.

    Raises:
        EOFError: the other side has closed its end.
        DecodeError: it is longer than MESSAGE_BYTES.
    """
    nonce = _exactly(descriptor, NONCE_BYTES)
    length = int.from_bytes(_exactly(descriptor, 4), "big")
    if length > MESSAGE_BYTES:
        raise DecodeError(f"{length:,} bytes")
    return nonce, _exactly(descriptor, length)


def _exactly(descriptor: int, length: int) -> bytes:
    content = bytearray()
    while len(content) < length:
        part = os.read(descriptor, length - len(content))
        if not part:
            raise EOFError("the other side has closed its end")
        content += part
    return bytes(content)
