# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""Hostile messages for the control channel: valid ones of every kind, derived from the types, and what becomes of
them under mutation. Pure: the same seed gives the same messages.
"""

from __future__ import annotations

import random
import re
import struct
from collections.abc import Callable, Iterator
from typing import Any, Final

import msgpack
from pydantic import TypeAdapter

from stagingd import catalog, wire
from stagingd.boxes import whole
from stagingd.dtypes import ITEM_BYTES
from stagingd.errors import StagingError

Plain = dict[str, Any]

STAGES: Final = ("policy", "Stage-7.b")
"""Names that stages have in messages; a test may use the first for one that exists."""

WORDS: Final = ("reader", "x", "модель", "層" * 40)

SHORT_S: Final = 0.02
LONG_S: Final = 3600.0
"""How long valid messages ask to wait: nearly all at most the one, a few the other."""

POOL: Final = 24
"""Valid messages of each kind that are kept for mutation; they are renewed one by one."""

MARK: Final = b"\x00 a fragment stands here \xff"
_PACKED_MARK: Final = msgpack.packb(MARK)


def lies() -> Iterator[bytes]:
    """Headers that promise far more than follows: str, bin, array and map of 8, 16 and 32 bits of length, and ext."""
    for size in (0xFFFFFFFF, 0x7FFFFFFF, 1 << 24, 1 << 16):
        yield from (bytes([code]) + struct.pack(">I", size) for code in b"\xdb\xc6\xdd\xdf\xc9")
    for size in (0xFFFF, 0x0100):
        yield from (bytes([code]) + struct.pack(">H", size) for code in b"\xda\xc5\xdc\xde\xc8")
    yield from (bytes([code]) + b"\xff" for code in b"\xd9\xc4\xc7")
    yield b"\xdd\x00\xff\xff\xff" * 300  # each inside the one before: what is set aside for each adds up


def nested() -> Iterator[bytes]:
    """Arrays in arrays and maps in maps, complete and cut off."""
    for depth in (30, 500, 1023, 1025, 5000):
        yield b"\x91" * depth + b"\xc0"
        yield b"\x81\xa1k" * depth + b"\xc0"
    yield b"\x91" * 2000
    yield b"\x81" * 2000


def not_plain() -> Iterator[bytes]:
    """Values that no Python caller of msgpack would pack: broken text, ext types, timestamps, the unused code."""
    yield from (b"\xa2\xff\xfe", b"\xa3\xed\xa0\x80", b"\xa2\xc0\x80", b"\xa1\x80")
    yield from (b"\xd6\xff\x00\x00\x00\x01", b"\xd7\xff" + b"\xff" * 8, b"\xc7\x0c\xff" + b"\xff" * 12)
    yield from (b"\xc7\x00\xff", b"\xc7\x03\x05abc", b"\xd4\x7f\x00", b"\xc1")


NUMBERS: Final = (-1, 0, 1, 2**31 - 1, 2**31, 2**32, 2**53 + 1, 2**63 - 1, 2**63, 2**64 - 1, -(2**63))
FLOATS: Final = (0.0, -0.0, 1.0, 1e-9, 5e-324, 1e308, float("nan"), float("inf"), float("-inf"))
TEXTS: Final = ("", "../x", "/etc/passwd", "a\x00b", "\u202ex", "x\n", "1", "hello", "\U0001f600" * 200, "x" * 70_000)
OTHERS: Final = (None, True, False, b"", b"\xff" * 16, [], {}, [None] * 40, [[0], [1]], {"kind": "bye"}, {1: 2})


def fragments(limits: set[int]) -> tuple[bytes, ...]:
    """Hostile values, packed: those above, and one less and one more than every limit of a number or a length."""
    near = sorted({value + step for value in limits for step in (-1, 0, 1)})
    numbers = [value for value in (*NUMBERS, *near) if -(2**63) <= value < 2**64]
    lengths = ["x" * value for value in near if 0 <= value < 1 << 14]
    packed = (msgpack.packb(value) for value in (*numbers, *FLOATS, *TEXTS, *lengths, *OTHERS))
    return (*packed, *not_plain(), *lies(), *nested())


class Builder:
    """Valid messages from a JSON schema, as plain maps; what a name means is in ``_sensible``."""

    def __init__(self, messages: object, chance: random.Random) -> None:
        schema = TypeAdapter(messages).json_schema()
        self._definitions: dict[str, Plain] = schema["$defs"]
        self._chance = chance
        self.kinds = {
            definition["properties"]["kind"]["const"]: definition
            for definition in self._definitions.values()
            if "kind" in definition.get("properties", {})
        }
        self.limits: set[int] = set()
        self._note_limits(schema)

    def _note_limits(self, node: object) -> None:
        if isinstance(node, dict):
            names = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "minLength", "maxLength")
            self.limits.update(int(node[name]) for name in names if isinstance(node.get(name), int | float))
        for child in node.values() if isinstance(node, dict) else node if isinstance(node, list) else ():
            self._note_limits(child)

    def message(self, kind: str) -> Plain:
        """A valid message of this kind."""
        return self._object(self.kinds[kind])

    def _value(self, schema: Plain, name: str = "") -> Any:
        if "$ref" in schema:
            name = schema["$ref"].rpartition("/")[2]
            schema = self._definitions[name]
        if name in self._sensible:
            return self._sensible[name](self)
        for key in ("const", "enum", "anyOf"):
            if key in schema:
                found = self._chance.choice(schema[key]) if key != "const" else schema[key]
                return self._value(found, name) if key == "anyOf" else found
        return self._by_type[schema["type"]](self, schema)

    def _object(self, schema: Plain) -> Plain:
        wanted, optional = schema.get("required", ()), self._chance.random() < 0.7
        return {
            name: self._value(field, name)
            for name, field in schema.get("properties", {}).items()
            if name in wanted or name == "kind" or optional
        }

    def _array(self, schema: Plain) -> list[Any]:
        if "prefixItems" in schema:
            return [self._value(item) for item in schema["prefixItems"]]
        return [self._value(schema["items"]) for _ in range(schema.get("minItems", 0) + self._chance.randrange(3))]

    def _integer(self, schema: Plain) -> int:
        least = schema.get("minimum", schema.get("exclusiveMinimum", -1) + 1)
        most = schema.get("maximum", schema.get("exclusiveMaximum", 2**63) - 1)
        edge = self._chance.random() < 0.1
        return int(self._chance.choice((least, most)) if edge else self._chance.randint(least, min(most, least + 3)))

    def _string(self, schema: Plain) -> str | bytes:
        if schema.get("format") == "binary":
            return self._chance.randbytes(schema.get("maxLength", 16))
        if "pattern" in schema:
            return self._chance.choice([name for name in STAGES if re.search(schema["pattern"], name)])
        return self._chance.choice(WORDS)[: schema.get("maxLength", 2000)]

    def _tensor(self) -> Plain:
        """A tensor that the daemon might accept: its boxes are all of it, or its halves."""
        shape = [self._chance.choice((1, 2, 16, 300, 2**40)) for _ in range(self._chance.randrange(4))]
        boxes = [[list(part) for part in whole(shape)]]
        if shape and shape[0] > 1:
            half = shape[0] // 2
            rest = [[half] + [0] * (len(shape) - 1), [shape[0] - half, *shape[1:]]]
            boxes = self._chance.choice((boxes, [[boxes[0][0], [half, *shape[1:]]], rest]))
        name, dtype = self._chance.choice(WORDS), self._chance.choice((*ITEM_BYTES, "complex64"))
        return {"name": name, "dtype": dtype, "shape": shape, "boxes": boxes}

    _sensible: Final[dict[str, Callable[[Builder], Any]]] = {
        "protocol": lambda _: wire.PROTOCOL,
        "timeout_s": lambda self: LONG_S if self._chance.random() < 0.05 else SHORT_S * self._chance.uniform(0.1, 1.0),
        "TensorDeclaration": _tensor,
    }
    _by_type: Final[dict[str, Callable[[Builder, Plain], Any]]] = {
        "object": _object,
        "array": _array,
        "integer": _integer,
        "string": _string,
        "number": lambda self, _: self._chance.random(),
        "boolean": lambda self, _: self._chance.random() < 0.5,
        "null": lambda _self, _schema: None,
    }


class Fuzzer:
    """An endless source of messages, of which about one in ten is still valid.

    Args:
        seed: gives the same messages again.
        messages: the union of types that they are made from.
    """

    def __init__(self, seed: int, messages: object = wire.Request) -> None:
        self._chance = random.Random(seed)
        self.builder = Builder(messages, self._chance)
        self._kinds = tuple(self.builder.kinds)
        self._pool = [self.builder.message(kind) for kind in self._kinds for _ in range(POOL)]
        self._fragments = fragments(self.builder.limits)
        self._on_maps = (self._valid, self._replace, self._replace, self._remove, self._odd_key, self._other_kind)
        self._on_maps += (self._double_key,)
        self._on_bytes = (self._flip, self._truncate, self._insert, self._duplicate, self._splice, self._overwrite)
        self._on_bytes += (self._noise,)

    def message(self) -> bytes:
        """The next one."""
        roll = self._chance.random()
        at = int(roll * 1e9) % len(self._pool)
        if roll < 1 / 16:
            self._pool[at] = self.builder.message(self._pool[at]["kind"])
        plain = self._pool[at]
        if roll < 0.55:
            body = self._chance.choice(self._on_maps)(plain)
            return body if roll > 0.1 else self._chance.choice(self._on_bytes)(body)
        body = self._chance.choice(self._on_bytes)(msgpack.packb(plain))
        return body if roll < 0.9 else self._chance.choice(self._on_bytes)(body)

    def valid(self) -> bytes:
        """A message that is all right in itself, whatever the moment it comes in."""
        return self._valid(self.builder.message(self._chance.choice(self._kinds)))

    # On maps

    def _valid(self, plain: Plain) -> bytes:
        return bytes(msgpack.packb(plain))

    def _somewhere(self, plain: Plain) -> tuple[Any, Any]:
        """A container in the message, and a key or index in it."""
        container: Any = plain
        while True:
            key = self._chance.choice(list(container) if isinstance(container, dict) else range(len(container)))
            inner = container[key]
            if not (isinstance(inner, dict | list) and inner and self._chance.random() < 0.7):
                return container, key
            container = inner

    def _replace(self, plain: Plain) -> bytes:
        container, key = self._somewhere(plain)
        container[key], before = MARK, container[key]
        body = self._filled(plain)
        container[key] = before
        return body

    def _filled(self, plain: Plain) -> bytes:
        return bytes(msgpack.packb(plain).replace(_PACKED_MARK, self._chance.choice(self._fragments), 1))

    def _remove(self, plain: Plain) -> bytes:
        container, key = self._somewhere(plain)
        before = container.pop(key)
        body: bytes = msgpack.packb(plain)
        container.insert(key, before) if isinstance(container, list) else container.update({key: before})
        return body

    def _odd_key(self, plain: Plain) -> bytes:
        return self._filled({**plain, MARK: self._chance.choice((0, None, "x"))})

    def _double_key(self, plain: Plain) -> bytes:
        body = msgpack.packb(plain)
        key = self._chance.choice(list(plain))
        value = self._chance.choice(self._fragments)
        return bytes([body[0] + 1 if body[0] < 0x8F else 0x81]) + body[1:] + msgpack.packb(key) + value

    def _other_kind(self, plain: Plain) -> bytes:
        if self._chance.random() < 0.5:
            return self._filled({**plain, "kind": MARK})
        return bytes(msgpack.packb({**plain, "kind": self._chance.choice(self._kinds)}))

    # On bytes

    def _flip(self, body: bytes) -> bytes:
        flipped = bytearray(body)
        for _ in range(self._chance.choice((1, 1, 2, 8))):
            if flipped:
                flipped[self._chance.randrange(len(flipped))] ^= 1 << self._chance.randrange(8)
        return bytes(flipped)

    def _cut(self, body: bytes) -> tuple[int, int]:
        """Two places in the body, in order and at most 40 bytes apart."""
        first = self._chance.randrange(len(body) + 1)
        return first, min(len(body), first + self._chance.randrange(41))

    def _truncate(self, body: bytes) -> bytes:
        return body[: self._chance.randrange(len(body) + 1)]

    def _insert(self, body: bytes) -> bytes:
        at, _ = self._cut(body)
        return body[:at] + self._chance.choice(self._fragments) + body[at:]

    def _overwrite(self, body: bytes) -> bytes:
        first, last = self._cut(body)
        return body[:first] + self._chance.choice(self._fragments) + body[last:]

    def _duplicate(self, body: bytes) -> bytes:
        first, last = self._cut(body)
        return body[:last] + body[first:last] * self._chance.choice((1, 2, 50)) + body[last:]

    def _splice(self, body: bytes) -> bytes:
        other = msgpack.packb(self._chance.choice(self._pool))
        return body[: self._cut(body)[0]] + other[self._cut(other)[0] :]

    def _noise(self, body: bytes) -> bytes:
        return self._chance.randbytes(self._chance.randrange(len(body) + 2))


def asks(body: bytes) -> wire.Request | None:
    """What a message asks, or None when it is no request."""
    try:
        return wire.decode_request(body)
    except StagingError:
        return None


def may_make_a_stage(request: wire.Request | None) -> bool:
    """Whether it is a declaration that, alone or as the last of several, could rightly bring a stage about."""
    if not isinstance(request, wire.Declare) or request.rank != request.ranks - 1:
        return False
    if request.ranks > 1:
        return True
    try:
        made = catalog.build(request.stage, [request.tensors], request.options.grids, [request.aliases])
    except StagingError:
        return False
    return made.slot_bytes < 1 << 50  # beyond that there is no memory for it anywhere
