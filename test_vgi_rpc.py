# SPDX-License-Identifier: MIT
"""Tests of vgi_rpc; the sections carry the module's numbers.

``python -m unittest -q test_vgi_rpc`` runs all of them with nothing but pyarrow. Two groups need more and say so when they
are skipped: ``VGI_RPC_REFERENCE_PYTHON`` (an interpreter with the public vgi-rpc package) and gunicorn.
``python test_vgi_rpc.py worker ...`` is the subprocess worker of the tests; it takes the arguments of `run_server`.
"""

import ast
import traceback
import tracemalloc
import random
import collections
import argparse
import base64
import contextlib
import copy
import dataclasses
import datetime
import decimal
import enum
import faulthandler
import functools
import importlib.util
import http.client
import io
import itertools
import json
import logging
import os
import pathlib
import re
import select
import shlex
import shutil
import signal
import socket
import ssl
import struct
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
import types
import typing
import unittest
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from html.parser import HTMLParser
from typing import Annotated, Any, ClassVar, NamedTuple, NewType, Optional, Protocol
from unittest import mock
from wsgiref.util import setup_testing_defaults
from wsgiref.validate import validator

import pyarrow as pa

import vgi_rpc
from vgi_rpc import (
    AnnotatedBatch,
    ArrowSerializableDataclass,
    ArrowType,
    AuthContext,
    AuthFailure,
    AuthReason,
    CallContext,
    ExchangeState,
    Level,
    OutputCollector,
    ProducerState,
    RpcError,
    RpcServer,
    Stream,
    StreamState,
    Transient,
    TransportError,
)

HERE = pathlib.Path(__file__).resolve().parent
WORKER = [sys.executable, str(HERE / "test_vgi_rpc.py"), "worker"]
KEY = b"a key of the tests long enough!"
WATCHDOG_SECONDS = 60
VALUE = pa.schema([pa.field("value", pa.float64())])
INTEGERS = pa.schema([pa.field("value", pa.int64())])
ARROW = "application/vnd.apache.arrow.stream"


# ============================================================================
# 0. THE SERVICE AND THE TOOLS OF THE TESTS
# ============================================================================


class Color(enum.Enum):
    """An enum whose names differ from its values: names travel."""

    RED = "r"
    BLUE = "b"


UserId = NewType("UserId", int)


@dataclass(frozen=True)
class Point(ArrowSerializableDataclass):
    """Frozen, with an enum and a default."""

    x: int
    color: Color = Color.RED
    note: str | None = None


@dataclass
class Shape(ArrowSerializableDataclass):
    """Nested dataclasses in containers, default factories, and a field that does not travel."""

    name: str
    points: list[Point] = field(default_factory=list)
    named: dict[str, Point] = field(default_factory=dict)
    tags: frozenset[str] = frozenset()
    cache: Annotated[Any, Transient()] = None


class Case(NamedTuple):
    """One row of the type table: an annotation, its Arrow type, whether it is nullable, and values that survive."""

    annotation: Any
    arrow_type: Any
    values: tuple
    nullable: bool = False


UTC = datetime.timezone.utc
BATCH = pa.RecordBatch.from_pydict({"a": [1, 2], "b": ["x", None]})
NESTED = pa.struct(list(Point.ARROW_SCHEMA))
ENUM = pa.dictionary(pa.int16(), pa.utf8())

TYPES: dict[str, Case] = {
    "str": Case(str, pa.utf8(), ("", "ü€😀", "x" * 1000)),
    "bytes": Case(bytes, pa.binary(), (b"", b"\x00\xff")),
    "int": Case(int, pa.int64(), (0, -(2**63), 2**63 - 1)),
    "float": Case(float, pa.float64(), (0.0, -1.5, float("inf"))),
    "bool": Case(bool, pa.bool_(), (True, False)),
    "list_int": Case(list[int], pa.list_(pa.int64()), ([], [1, 2, 3])),
    "list_list": Case(list[list[str]], pa.list_(pa.list_(pa.utf8())), ([], [[], ["a"]])),
    "list_optional": Case(list[Optional[int]], pa.list_(pa.int64()), ([1, None], [None])),
    "set": Case(set[int], pa.list_(pa.int64()), (set(), {1, 2})),
    "frozenset": Case(frozenset[str], pa.list_(pa.utf8()), (frozenset(), frozenset({"a", "b"}))),
    "dict": Case(dict[str, float], pa.map_(pa.utf8(), pa.float64()), ({}, {"a": 1.0, "b": 2.0})),
    "dict_list": Case(dict[int, list[bool]], pa.map_(pa.int64(), pa.list_(pa.bool_())), ({1: [True], 2: []},)),
    "dict_dict": Case(dict[str, dict[str, int]], pa.map_(pa.utf8(), pa.map_(pa.utf8(), pa.int64())), ({"a": {"b": 1}},)),
    "enum": Case(Color, ENUM, (Color.RED, Color.BLUE)),
    "list_enum": Case(list[Color], pa.list_(ENUM), ([], [Color.BLUE, Color.RED, Color.BLUE])),
    "dict_enum": Case(dict[str, Color], pa.map_(pa.utf8(), ENUM), ({"a": Color.BLUE},)),
    "optional_int": Case(Optional[int], pa.int64(), (None, 0, 5), True),
    "union_str": Case(str | None, pa.utf8(), (None, "", "a"), True),
    "optional_enum": Case(Optional[Color], ENUM, (None, Color.RED), True),
    "optional_list": Case(Optional[list[int]], pa.list_(pa.int64()), (None, [], [1]), True),
    "dataclass": Case(Point, pa.binary(), (Point(1), Point(-1, Color.BLUE, "n"))),
    "optional_dataclass": Case(Optional[Point], pa.binary(), (None, Point(1)), True),
    "deep_dataclass": Case(
        Shape, pa.binary(), (Shape("a"), Shape("b", [Point(1), Point(2)], {"k": Point(3, Color.BLUE)}, frozenset({"t"})))
    ),
    "list_dataclass": Case(list[Point], pa.list_(NESTED), ([], [Point(1), Point(2, Color.BLUE, "x")])),
    "dict_dataclass": Case(dict[str, Point], pa.map_(pa.utf8(), NESTED), ({"a": Point(1)},)),
    "list_optional_dataclass": Case(list[Optional[Point]], pa.list_(NESTED), ([None], [None, Point(1)], [])),
    "dict_optional_dataclass": Case(dict[str, Optional[Point]], pa.map_(pa.utf8(), NESTED), ({"a": None}, {"a": Point(1)})),
    "list_dict_dataclass": Case(list[dict[str, Point]], pa.list_(pa.map_(pa.utf8(), NESTED)), ([{"a": Point(1)}, {}],)),
    "batch": Case(pa.RecordBatch, pa.binary(), (BATCH, BATCH.slice(0, 0))),
    "schema": Case(pa.Schema, pa.binary(), (BATCH.schema, pa.schema([]))),
    "newtype": Case(UserId, pa.int64(), (UserId(7),)),
    "annotated_other": Case(Annotated[str, "doc"], pa.utf8(), ("a",)),
    "int8": Case(Annotated[int, ArrowType(pa.int8())], pa.int8(), (-128, 127)),
    "uint64": Case(Annotated[int, ArrowType(pa.uint64())], pa.uint64(), (0, 2**64 - 1)),
    "float32": Case(Annotated[float, ArrowType(pa.float32())], pa.float32(), (0.5, -2.0)),
    "large_utf8": Case(Annotated[str, ArrowType(pa.large_utf8())], pa.large_utf8(), ("a",)),
    "large_binary": Case(Annotated[bytes, ArrowType(pa.large_binary())], pa.large_binary(), (b"a",)),
    "fixed_binary": Case(Annotated[bytes, ArrowType(pa.binary(4))], pa.binary(4), (b"abcd",)),
    "date32": Case(Annotated[datetime.date, ArrowType(pa.date32())], pa.date32(), (datetime.date(2024, 2, 29),)),
    "timestamp": Case(
        Annotated[datetime.datetime, ArrowType(pa.timestamp("us"))],
        pa.timestamp("us"),
        (datetime.datetime(2024, 1, 2, 3, 4, 5, 6),),
    ),
    "timestamp_utc": Case(
        Annotated[datetime.datetime, ArrowType(pa.timestamp("us", tz="UTC"))],
        pa.timestamp("us", tz="UTC"),
        (datetime.datetime(2024, 1, 2, 3, 4, 5, 6, tzinfo=UTC),),
    ),
    "time64": Case(Annotated[datetime.time, ArrowType(pa.time64("us"))], pa.time64("us"), (datetime.time(1, 2, 3, 4),)),
    "duration": Case(
        Annotated[datetime.timedelta, ArrowType(pa.duration("us"))],
        pa.duration("us"),
        (datetime.timedelta(days=-1, seconds=5),),
    ),
    "decimal": Case(
        Annotated[decimal.Decimal, ArrowType(pa.decimal128(20, 4))], pa.decimal128(20, 4), (decimal.Decimal("-12.3400"),)
    ),
    "list_decimal": Case(
        list[Optional[Annotated[decimal.Decimal, ArrowType(pa.decimal128(9, 2))]]],
        pa.list_(pa.decimal128(9, 2)),
        ([decimal.Decimal("1.25"), None],),
    ),
    "dictionary": Case(
        Annotated[str, ArrowType(pa.dictionary(pa.int32(), pa.utf8()))], pa.dictionary(pa.int32(), pa.utf8()), ("a",)
    ),
    "large_list": Case(Annotated[list[int], ArrowType(pa.large_list(pa.int32()))], pa.large_list(pa.int32()), ([1, 2],)),
    "optional_exact": Case(Optional[Annotated[int, ArrowType(pa.int16())]], pa.int16(), (None, 3), True),
    "nullable_exact": Case(Annotated[int, ArrowType(pa.int16(), nullable=True)], pa.int16(), (None, 3), True),
}


def _echo(annotation: Any) -> Any:
    def echo(self, value):
        return value

    echo.__annotations__ = {"value": annotation, "return": annotation}
    return echo


class Echo(Protocol):
    """One method ``echo_<name>`` for every row of `TYPES`."""


for _name, _case in TYPES.items():
    setattr(Echo, f"echo_{_name}", _echo(_case.annotation))


@dataclass(frozen=True)
class Header(ArrowSerializableDataclass):
    """A stream's header."""

    total: int
    text: str = "none"


class Phase(enum.Enum):
    """A state machine's states."""

    COLLECTING = "collecting"
    PROCESSING = "processing"


@dataclass
class Count(ProducerState):
    """Counts to *limit*, a log line and batch metadata with each number."""

    limit: int
    at: int = 0

    def produce(self, out: OutputCollector, ctx: CallContext) -> None:
        if self.at >= self.limit:
            out.finish()
            return
        out.client_log(Level.INFO, f"number {self.at}", at=str(self.at))
        out.emit_pydict({"value": [self.at]}, metadata={"at": str(self.at)})
        self.at += 1


@dataclass
class Ticks(ProducerState):
    """Echoes the metadata of each tick."""

    def process(self, input: AnnotatedBatch, out: OutputCollector, ctx: CallContext) -> None:
        metadata = {k.decode(): v.decode() for k, v in dict(input.custom_metadata or {}).items()}
        out.emit_pydict({"value": [json.dumps(metadata, sort_keys=True)]})


@dataclass
class Once(ProducerState):
    """Emits and finishes in one turn."""

    def produce(self, out: OutputCollector, ctx: CallContext) -> None:
        out.emit_pydict({"value": [1]})
        out.finish()


@dataclass
class Running(ExchangeState):
    """A running sum over everything that came, with the process that served the turn."""

    label: str
    count: int = 0
    history: list[float] = field(default_factory=list)

    def exchange(self, input: AnnotatedBatch, out: OutputCollector, ctx: CallContext) -> None:
        self.history.extend(input.batch.column(0).to_pylist())
        self.count += input.batch.num_rows
        row = {"label": [self.label], "count": [self.count], "sum": [sum(self.history)], "pid": [os.getpid()]}
        out.emit_pydict(row)

    def on_cancel(self, ctx: CallContext) -> None:
        ctx.implementation.cancelled.append(self.count)
        raise RuntimeError("swallowed")


RUNNING = pa.schema([("label", pa.utf8()), ("count", pa.int64()), ("sum", pa.float64()), ("pid", pa.int64())])


@dataclass
class Inner:
    """A plain dataclass inside a state."""

    seen: list[int] = field(default_factory=list)
    color: Color = Color.RED


@dataclass
class Nested(ExchangeState):
    """A state with an enum, nested dataclasses, a dict and an optional."""

    inner: Inner = field(default_factory=Inner)
    phase: Phase = Phase.COLLECTING
    table: dict[str, Inner] = field(default_factory=dict)
    last: int | None = None

    def exchange(self, input: AnnotatedBatch, out: OutputCollector, ctx: CallContext) -> None:
        values = input.batch.column(0).to_pylist()
        self.inner.seen.extend(values)
        self.inner.color = Color.BLUE
        self.table[str(len(self.table))] = Inner([len(values)])
        if len(self.inner.seen) > 2:
            self.phase = Phase.PROCESSING
        facts = [self.inner.seen, self.inner.color.name, self.phase.name, len(self.table), self.last]
        self.last = len(values)
        out.emit_pydict({"value": [json.dumps(facts)]})


TEXT = pa.schema([pa.field("value", pa.utf8())])


@dataclass
class Shapes(ProducerState):
    """Zero-row batches of any schema, between batches with rows."""

    left: int

    def produce(self, out: OutputCollector, ctx: CallContext) -> None:
        if not self.left:
            out.finish()
            return
        self.left -= 1
        rows = self.left % 2
        columns = [pa.array([0] * rows, f.type) for f in out.output_schema]
        out.emit(pa.RecordBatch.from_arrays(columns, schema=out.output_schema), metadata={"left": str(self.left)})


@dataclass
class Fixed(ArrowSerializableDataclass):
    """A call state: what never changes during a stream."""

    factor: int


@dataclass
class Scaled(ExchangeState):
    """Multiplies by the factor of its call state, adds what the implementation holds."""

    CALL_STATE_TYPE: ClassVar = Fixed
    turns: int = 0
    fixed: Annotated[Any, Transient()] = None
    offset: Annotated[int, Transient()] = 0

    def rehydrate(self, implementation: Any) -> None:
        self.offset = implementation.offset

    def bind_call_state(self, call_state: Any) -> None:
        self.fixed = call_state

    def exchange(self, input: AnnotatedBatch, out: OutputCollector, ctx: CallContext) -> None:
        self.turns += 1
        values = [v * self.fixed.factor + self.offset for v in input.batch.column(0).to_pylist()]
        out.emit_pydict({"value": values}, metadata={"turns": str(self.turns)})


@dataclass
class Misbehaving(ProducerState):
    """Breaks the rule that *how* names, in its second turn."""

    how: str
    at: int = 0

    def produce(self, out: OutputCollector, ctx: CallContext) -> None:
        self.at += 1
        if self.at == 1:
            out.emit_pydict({"value": [1]})
        elif self.how == "twice":
            out.emit_pydict({"value": [1]})
            out.emit_pydict({"value": [2]})
        elif self.how == "type":
            out.emit(pa.RecordBatch.from_pydict({"value": ["text"]}))
        elif self.how == "names":
            out.emit_pydict({"other": [1]})
        elif self.how == "after finish":
            out.finish()
            out.emit_pydict({"value": [2]})
        elif self.how == "raise":
            raise LookupError("in the second turn")
        elif self.how == "state":
            self.at = "text"  # type: ignore[assignment]
            out.emit_pydict({"value": [2]})


@dataclass
class BadExchange(ExchangeState):
    """Breaks a rule of exchanges."""

    how: str

    def exchange(self, input: AnnotatedBatch, out: OutputCollector, ctx: CallContext) -> None:
        if self.how == "finish":
            out.finish()
        elif self.how == "exit":
            raise SystemExit(3)
        elif self.how == "kill":
            os.kill(os.getpid(), signal.SIGKILL)


class BrokenText(Exception):
    """An exception that cannot be shown."""

    def __str__(self) -> str:
        raise RuntimeError("no text")


FAILURES = {
    "TypeError": lambda: len(3),  # type: ignore[arg-type]
    "KeyError": lambda: {}["x"],
    "SystemExit": lambda: sys.exit(7),
    "KeyboardInterrupt": lambda: (_ for _ in ()).throw(KeyboardInterrupt()),
    "RecursionError": lambda: (lambda f: f(f))(lambda f: f(f)),
    "MemoryError": lambda: (_ for _ in ()).throw(MemoryError()),
    "BrokenText": lambda: (_ for _ in ()).throw(BrokenText()),
}


class Service(Echo, Protocol):
    """The service of the tests."""

    def add(self, a: float, b: float = 2.0) -> float:
        """Add.

        Args:
            a: The one.
            b: The other.
        """
        ...

    def nothing(self) -> None: ...

    def optional(self, value: int | None = None) -> int | None: ...

    def defaults(self, point: Point = Point(9), names: list[str] = ["a"], *, color: Color = Color.BLUE) -> str: ...  # noqa: B006

    def logs(self, count: int) -> int: ...

    def fail(self, how: str) -> int: ...

    def refuse(self) -> None: ...

    def lie(self, how: str) -> list[int]: ...

    def lie_none(self) -> None: ...

    def noisy(self) -> str: ...

    def process_id(self) -> int: ...

    def kill(self) -> int: ...

    def cancels(self) -> list[int]: ...

    def context(self) -> dict[str, str]: ...

    def wait(self, seconds: float) -> int: ...

    def count(self, limit: int) -> Stream[StreamState]: ...

    def count_with_header(self, limit: int) -> Stream[StreamState, Header]: ...

    def ticks(self) -> Stream[ProducerState]: ...

    def once(self) -> Stream[StreamState]: ...

    def running(self, label: str = "r") -> Stream[ExchangeState]: ...

    def running_with_header(self, label: str) -> Stream[StreamState, Header]: ...

    def nested(self) -> Stream[StreamState]: ...

    def shapes(self, columns: list[str], left: int) -> Stream[StreamState]: ...

    def scaled(self, factor: int) -> Stream[StreamState]: ...

    def init_fails(self) -> Stream[StreamState]: ...

    def exchange_init_fails(self) -> Stream[ExchangeState]: ...

    def header_init_fails(self) -> Stream[StreamState, Header]: ...

    def wrong_header(self) -> Stream[StreamState, Header]: ...

    def not_a_stream(self) -> Stream[StreamState]: ...

    def misbehaving(self, how: str) -> Stream[StreamState]: ...

    def bad_exchange(self, how: str) -> Stream[StreamState]: ...


class ServiceImpl(Echo):
    """Implements `Service`; one instance serves every transport of a server."""

    def __init__(self) -> None:
        self.cancelled: list[int] = []
        self.offset = 100

    def cancels(self) -> list[int]:
        taken, self.cancelled = self.cancelled, []
        return taken

    def add(self, a: float, b: float = 2.0) -> float:
        return a + b

    def nothing(self) -> None:
        return None

    def optional(self, value: int | None = None) -> int | None:
        return value

    def defaults(self, point: Point, names: list[str], color: Color) -> str:
        return f"{point.x} {','.join(names)} {color.name}"

    def logs(self, count: int, ctx: CallContext) -> int:
        for i in range(count):
            ctx.client_log(Level.WARN, f"line {i}", index=str(i))
        return count

    def fail(self, how: str) -> int:
        try:
            return FAILURES[how]()
        except Exception as exc:
            if how != "KeyError":
                raise
            raise KeyError("y") from exc

    def refuse(self) -> None:
        details = [vgi_rpc.RetryInfo(1.5), vgi_rpc.ErrorInfo({"a": "b"}), {"@type": "tests.Own", "n": 1}]
        raise vgi_rpc.StatusError("not now", code=vgi_rpc.Code.RESOURCE_EXHAUSTED, kind="tests_busy", details=details)

    def lie(self, how: str) -> list[int]:
        return {"type": "text", "member": [1, "x"], "none": None, "large": [2**63]}[how]  # type: ignore[return-value]

    def lie_none(self) -> None:
        return 3  # type: ignore[return-value]

    def noisy(self) -> str:
        print("printed by a method", flush=True)
        os.write(1, b"written to descriptor 1\n")
        subprocess.run([sys.executable, "-S", "-c", "print('printed by a child')"], check=True)
        return "quiet"

    def process_id(self) -> int:
        return os.getpid()

    def kill(self) -> int:
        os.kill(os.getpid(), signal.SIGKILL)
        return 0

    def context(self, ctx: CallContext) -> dict[str, str]:
        facts = {"method": ctx.method_name, "protocol": ctx.protocol_name, "kind": str(ctx.kind), "id": ctx.request_id}
        return {**facts, "principal": ctx.auth.principal or "", "domain": vgi_rpc.current_auth().domain or ""}

    def wait(self, seconds: float, ctx: CallContext) -> int:
        gate = threading.Event()
        rounds = 0
        while not gate.wait(min(seconds, 0.01)) and not ctx.cancelled and rounds * 0.01 < seconds:
            rounds += 1
        return rounds

    def count(self, limit: int) -> Stream[Count]:
        return Stream(INTEGERS, Count(limit))

    def count_with_header(self, limit: int, ctx: CallContext) -> Stream[Count, Header]:
        ctx.client_log(Level.DEBUG, "with the header")
        return Stream(INTEGERS, Count(limit), header=Header(limit, "counting"))

    def ticks(self) -> Stream[Ticks]:
        return Stream(TEXT, Ticks())

    def once(self) -> Stream[Once]:
        return Stream(INTEGERS, Once())

    def running(self, label: str) -> Stream[Running]:
        return Stream(RUNNING, Running(label), input_schema=VALUE)

    def running_with_header(self, label: str) -> Stream[Running, Header]:
        return Stream(RUNNING, Running(label), input_schema=VALUE, header=Header(0))

    def nested(self) -> Stream[Nested]:
        return Stream(TEXT, Nested(), input_schema=INTEGERS)

    def shapes(self, columns: list[str], left: int) -> Stream[Shapes]:
        return Stream(pa.schema([(name, pa.int32()) for name in columns]), Shapes(left))

    def scaled(self, factor: int) -> Stream[Scaled]:
        fixed = Fixed(factor)
        return Stream(INTEGERS, Scaled(offset=self.offset), input_schema=INTEGERS, call_state=fixed)

    def init_fails(self) -> Stream[Count]:
        raise KeyError("at init")

    def exchange_init_fails(self) -> Stream[Running]:
        raise KeyError("at init")

    def header_init_fails(self) -> Stream[Count, Header]:
        raise KeyError("at init")

    def wrong_header(self) -> Stream[Count, Header]:
        return Stream(INTEGERS, Count(1), header=Header("text"))  # type: ignore[arg-type]

    def not_a_stream(self) -> Stream[Count]:
        return 3  # type: ignore[return-value]

    def misbehaving(self, how: str) -> Stream[Misbehaving]:
        return Stream(INTEGERS, Misbehaving(how))

    def bad_exchange(self, how: str) -> Stream[BadExchange]:
        return Stream(INTEGERS, BadExchange(how), input_schema=INTEGERS)


def make_server(**options: Any) -> RpcServer:
    """The server of the tests; `Doc` is hosted beside `Service`."""
    return RpcServer(Service, ServiceImpl(), extra_protocols=[(DocService, DocServiceImpl())], **options)


def gunicorn_app(environ: dict[str, Any], start_response: Any) -> Any:
    """The WSGI application that gunicorn's workers serve; its key comes from the environment."""
    return _gunicorn_app()(environ, start_response)


@functools.cache
def _gunicorn_app() -> Any:
    return vgi_rpc.make_wsgi_app(make_server())


def values(*numbers: Any) -> AnnotatedBatch:
    """A batch with one column ``value``."""
    return AnnotatedBatch.from_pydict({"value": list(numbers)})


# -- bytes, made and read with pyarrow alone


def ipc_bytes(schema: pa.Schema, *items: Any) -> bytes:
    """An IPC stream; each item is a batch or (batch, metadata)."""
    sink = io.BytesIO()
    with pa.ipc.new_stream(sink, schema) as writer:
        for item in items:
            batch, metadata = item if isinstance(item, tuple) else (item, None)
            writer.write_batch(batch, custom_metadata=metadata)
    return sink.getvalue()


def request_metadata(method: Any, protocol: Any = b"Service", **changes: Any) -> dict[bytes, bytes]:
    """Metadata of a request; a value of ``None`` leaves the key out."""
    found = {"vgi_rpc.method": method, "vgi_rpc.request_version": b"1", "vgi_rpc.protocol": protocol, **changes}
    encoded = {k: v.encode() if isinstance(v, str) else v for k, v in found.items()}
    return {k.encode(): v for k, v in encoded.items() if v is not None}


def request_bytes(method: str, data: Any = None, schema: pa.Schema | None = None, **metadata: Any) -> bytes:
    """A request of one row (none for a method without parameters), as a foreign client would write it."""
    schema = schema if schema is not None else vgi_rpc.rpc_methods(Service)[method].params_schema
    columns = [pa.array([(data or {})[f.name]], f.type) for f in schema]
    batch = pa.RecordBatch.from_arrays(columns, schema=schema)
    return ipc_bytes(schema, (batch, request_metadata(metadata.pop("named", method), **metadata)))


def read_streams(data: Any) -> list[list[Any]]:
    """All IPC streams in *data* (bytes or a file): lists of (batch, metadata as a dict)."""
    source = io.BytesIO(data) if isinstance(data, bytes) else data
    streams = []
    while not isinstance(data, bytes) or source.tell() < len(data):
        streams.append(read_stream(source))
    return streams


def read_stream(source: Any) -> list[Any]:
    """One IPC stream, to its end marker and not a byte further."""
    reader = pa.ipc.open_stream(source)
    found = []
    while True:
        try:
            batch, metadata = reader.read_next_batch_with_custom_metadata()
        except StopIteration:
            return found
        found.append((batch, dict(metadata or {})))


def error_of(items: list[Any]) -> dict[str, Any]:
    """The error batch of an answer: ``type``, ``text``, ``code`` and ``kind``."""
    for batch, metadata in items:
        if metadata.get(b"vgi_rpc.log_level") == b"EXCEPTION":
            assert batch.num_rows == 0
            extra = json.loads(metadata[b"vgi_rpc.log_extra"])
            facts = {"type": extra["exception_type"], "text": extra["exception_message"], "extra": extra}
            facts["code"] = metadata[b"vgi_rpc.error_code"].decode()
            facts["kind"] = metadata.get(b"vgi_rpc.error_kind", b"").decode()
            return facts
    raise AssertionError(f"no error in {items!r:.300}")


class Reply(NamedTuple):
    """An HTTP answer; header names in lower case."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def error(self) -> dict[str, Any]:
        """The error batch in the body."""
        return error_of(read_streams(self.body)[-1])


def decode_body(body: bytes, coding: str) -> bytes:
    """Undo a content coding."""
    if coding == "zstd":
        return pa.CompressedInputStream(pa.BufferReader(body), "zstd").read()
    return zlib.decompress(body, 31) if coding == "gzip" else body


class WsgiClient:
    """Calls a WSGI application through `wsgiref.validate`; it is also a ``client`` for `http_connect`."""

    prefix = ""

    def __init__(self, app: Any) -> None:
        self.app = validator(app)

    def send(self, method: str, path: str, headers: Any, body: bytes, deadline: Any = None, limit: Any = None) -> Reply:
        path, _, query = path.partition("?")
        environ: dict[str, Any] = {"REQUEST_METHOD": method, "PATH_INFO": path, "SCRIPT_NAME": "", "QUERY_STRING": query}
        environ["wsgi.input"] = io.BytesIO(body)
        if method == "POST":
            environ["CONTENT_LENGTH"] = str(len(body))
        for name, value in headers:
            key = name.upper().replace("-", "_")
            environ[key if key in ("CONTENT_TYPE", "CONTENT_LENGTH") else f"HTTP_{key}"] = value
        setup_testing_defaults(environ)
        seen: list[Any] = []
        result = self.app(environ, lambda status, given, exc_info=None: seen.append((status, given)) or (lambda data: None))
        try:
            whole = b"".join(result)
        finally:
            result.close()
        (status, given) = seen[0]
        answered = {k.lower(): v for k, v in given}
        coding = answered.get("x-vgi-content-encoding") or answered.get("content-encoding") or ""
        return Reply(int(status[:3]), answered, decode_body(whole, coding))

    def post(self, path: str, body: bytes, **headers: str) -> Reply:
        """Post Arrow; a keyword ``x_y`` is the header ``x-y``."""
        given = {"content-type": ARROW, **{k.replace("_", "-"): v for k, v in headers.items()}}
        return self.send("POST", path, [(k, v) for k, v in given.items() if v], body)

    def close(self) -> None:
        """Nothing is kept."""


def wsgi_client(server: RpcServer | None = None, **options: Any) -> WsgiClient:
    """A client of a fresh application."""
    options.setdefault("token_key", KEY)
    return WsgiClient(vgi_rpc.make_wsgi_app(server or make_server(), **options))


class BytePeer:
    """A served pipe seen from the far end: raw bytes in, IPC streams out."""

    def __init__(self, server: RpcServer) -> None:
        (server_read, write), (read, server_write) = os.pipe(), os.pipe()
        self.input, self.output = os.fdopen(write, "wb", 0), os.fdopen(read, "rb")
        transport = vgi_rpc.PipeTransport(os.fdopen(server_read, "rb", 0), os.fdopen(server_write, "wb", 0))
        self.thread = threading.Thread(target=self._serve, args=(server, transport), daemon=True)
        self.thread.start()

    @staticmethod
    def _serve(server: RpcServer, transport: Any) -> None:
        try:
            server.serve(transport)
        finally:
            transport.close()

    def ask(self, data: bytes) -> list[Any]:
        """Send bytes, read one stream of an answer."""
        self.input.write(data)
        return read_stream(self.output)

    def hang_up(self) -> bytes:
        """Close the way there, return what still comes back."""
        self.input.close()
        rest = self.output.read()
        self.thread.join(WATCHDOG_SECONDS)
        assert not self.thread.is_alive()
        return rest

    def __enter__(self) -> "BytePeer":
        return self

    def __exit__(self, *exc: object) -> None:
        self.input.close()
        self.output.close()
        self.thread.join(WATCHDOG_SECONDS)


def in_thread(serve: Any, server: RpcServer, *args: Any, **options: Any) -> tuple:
    """Run a ``serve_...`` function in a thread; return what it gave to ``on_bound``."""
    bound: list[Any] = []
    ready = threading.Event()

    def on_bound(*where: Any) -> None:
        bound.extend(where)
        ready.set()

    thread = threading.Thread(target=serve, args=(server, *args), kwargs={**options, "on_bound": on_bound}, daemon=True)
    thread.start()
    assert ready.wait(WATCHDOG_SECONDS)
    return (*bound, thread)


class Worker:
    """The worker as a process that listens: ``--http``, ``--tcp`` or ``--unix``; its discovery line is read."""

    def __init__(self, *arguments: str, key: bytes = KEY) -> None:
        environment = {**os.environ, "VGI_RPC_TOKEN_KEY": key.decode(), "PYTHONWARNINGS": "default"}
        self.process = subprocess.Popen([*WORKER, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment)
        assert self.process.stdout is not None
        self.line = self.process.stdout.readline().decode().strip()
        self.port = self.line.rpartition(":")[2]
        self.url = f"http://127.0.0.1:{self.port}"

    def stop(self, number: int = signal.SIGTERM) -> tuple[int, str]:
        """Signal it; return exit status and what it wrote on stderr."""
        self.process.send_signal(number)
        _, error = self.process.communicate(timeout=WATCHDOG_SECONDS)
        return self.process.returncode, error.decode()

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *exc: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.communicate()


class TestCase(unittest.TestCase):
    """A test that dumps all threads and ends the run when it hangs."""

    maxDiff = 2000

    def setUp(self) -> None:
        faulthandler.dump_traceback_later(WATCHDOG_SECONDS, exit=True, file=sys.__stderr__)
        self.addCleanup(faulthandler.cancel_dump_traceback_later)

    def raises(self, kind: type, *parts: str) -> Any:
        """A context in which *kind* is raised, with every one of *parts* in its text."""
        return _Raises(self, kind, parts)


class _Raises:
    def __init__(self, test: unittest.TestCase, kind: type, parts: tuple[str, ...]) -> None:
        self._test, self._kind, self._parts = test, kind, parts
        self.exception: Any = None

    def __enter__(self) -> "_Raises":
        return self

    def __exit__(self, kind: Any, exc: Any, tb: Any) -> bool:
        if exc is None:
            self._test.fail(f"{self._kind.__name__} not raised")
        if not isinstance(exc, self._kind):
            return False
        self.exception = exc
        for part in self._parts:
            self._test.assertIn(part, str(exc))
        return True


def setUpModule() -> None:
    """Log lines of the module are of no interest here, unless a test asks for them."""
    logging.getLogger("vgi_rpc").addHandler(logging.NullHandler())
    logging.getLogger("vgi_rpc").propagate = False


# -- the user's description of streaming: its code blocks as they stand, with the service around them


@dataclass
class RunningStatsState(ExchangeState):
    """All fields are automatically serialized between calls."""

    count: int = 0  # simple counter
    total: float = 0.0  # running accumulator
    history: list[float] = field(default_factory=list)  # grows each call
    label: str = ""  # set once at init

    def exchange(self, input: AnnotatedBatch, out: OutputCollector, ctx: CallContext) -> None:
        """Each call sees the updated state from the previous call."""
        values = input.batch.column("value").to_pylist()
        self.count += len(values)
        self.total += sum(values)
        self.history.extend(values)
        out.emit_pydict({"count": [self.count], "mean": [self.total / self.count]})


@dataclass
class PaginatedQueryState(ProducerState):
    """Produces pages of results, tracking the current offset."""

    query: str
    page_size: int = 100
    offset: int = 0  # persisted — increments each call
    exhausted: bool = False  # persisted — signals completion

    def produce(self, out: OutputCollector, ctx: CallContext) -> None:
        """Emit one page per call."""
        if self.exhausted:
            out.finish()
            return
        # ... fetch results from offset ... (a table of 250 rows stands for the query's results)
        results = list(range(self.offset, min(self.offset + self.page_size, 250)))
        if len(results) < self.page_size:
            self.exhausted = True
        self.offset += self.page_size
        out.emit_pydict({"value": results})


@dataclass
class StatefulPipeline(ExchangeState):
    """Exchange state with enum and list fields — all serialized automatically."""

    phase: Phase = Phase.COLLECTING
    buffer: list[float] = field(default_factory=list)
    threshold: float = 100.0

    def exchange(self, input: AnnotatedBatch, out: OutputCollector, ctx: CallContext) -> None:
        """Accumulate values, switch phase when threshold is reached."""
        values = input.batch.column("value").to_pylist()
        self.buffer.extend(values)
        if sum(self.buffer) >= self.threshold and self.phase == Phase.COLLECTING:
            self.phase = Phase.PROCESSING
        out.emit_pydict({
            "phase": [self.phase.value],
            "buffer_size": [len(self.buffer)],
            "total": [sum(self.buffer)],
        })  # fmt: skip


@dataclass(frozen=True)
class JobHeader(ArrowSerializableDataclass):
    """One-time metadata sent before the stream begins."""

    total_rows: int
    description: str


@dataclass
class FetchState(ProducerState):
    """Produces query results."""

    remaining: int

    def produce(self, out: OutputCollector, ctx: CallContext) -> None:
        """Emit one batch per call."""
        if self.remaining <= 0:
            out.finish()
            return
        out.emit_pydict({"value": [self.remaining]})
        self.remaining -= 1


@dataclass
class TransformState(ExchangeState):
    """Scales the values of a batch."""

    factor: float

    def exchange(self, input: AnnotatedBatch, out: OutputCollector, ctx: CallContext) -> None:
        """Multiply."""
        out.emit_pydict({"value": [v * self.factor for v in input.batch.column("value").to_pylist()]})


class DocService(Protocol):
    """The services of the description in one."""

    def stats(self, label: str) -> Stream[StreamState]: ...

    def search(self, query: str, page_size: int = 100) -> Stream[StreamState]: ...

    def pipeline(self, threshold: float) -> Stream[StreamState]: ...

    def fetch_rows(self, query: str) -> Stream[StreamState, JobHeader]: ...

    def transform_rows(self, factor: float) -> Stream[StreamState, JobHeader]: ...


class DocServiceImpl:
    """Implementation with stream headers."""

    def stats(self, label: str) -> Stream[RunningStatsState]:
        """Keep statistics."""
        schema = pa.schema([("count", pa.int64()), ("mean", pa.float64())])
        return Stream(output_schema=schema, state=RunningStatsState(label=label), input_schema=VALUE)

    def search(self, query: str, page_size: int) -> Stream[PaginatedQueryState]:
        """Return pages."""
        return Stream(output_schema=INTEGERS, state=PaginatedQueryState(query, page_size))

    def pipeline(self, threshold: float) -> Stream[StatefulPipeline]:
        """Return the pipeline."""
        schema = pa.schema([("phase", pa.utf8()), ("buffer_size", pa.int64()), ("total", pa.float64())])
        return Stream(output_schema=schema, state=StatefulPipeline(threshold=threshold), input_schema=VALUE)

    def fetch_rows(self, query: str) -> Stream[FetchState, JobHeader]:
        """Return a stream with a header."""
        schema = pa.schema([pa.field("value", pa.int64())])
        header = JobHeader(total_rows=100, description=f"Results for: {query}")
        return Stream(output_schema=schema, state=FetchState(remaining=100), header=header)

    def transform_rows(self, factor: float) -> Stream[TransformState, JobHeader]:
        """Return an exchange with a header."""
        header = JobHeader(total_rows=-1, description=f"times {factor}")
        return Stream(output_schema=VALUE, state=TransformState(factor), input_schema=VALUE, header=header)


# ============================================================================
# 2. ERRORS
# ============================================================================


class ErrorTests(TestCase):
    """The error classes on their own; how they travel is in the transport contract."""

    def test_details_travel_as_json_and_come_back_typed(self) -> None:
        details = [
            vgi_rpc.ErrorInfo({"a": "b"}),
            vgi_rpc.RetryInfo(2.5),
            vgi_rpc.BadRequest((vgi_rpc.FieldViolation("a.b", "too long"),)),
            vgi_rpc.PreconditionFailure((vgi_rpc.PreconditionViolation("tos", "user", "not accepted"),)),
            vgi_rpc.QuotaFailure((vgi_rpc.QuotaViolation("user", "spent"),)),
            vgi_rpc.ResourceInfo("table", "t", "me", "gone"),
            vgi_rpc.Help((vgi_rpc.HelpLink("read", "https://example.org"),)),
            vgi_rpc.LocalizedMessage("de", "nein"),
        ]
        raised = vgi_rpc.StatusError("no", code="NOT_FOUND", kind="k", details=details)
        received = RpcError(
            "StatusError", "no", "", error_code="NOT_FOUND", error_details=json.loads(json.dumps(raised.error_details))
        )
        self.assertEqual(received.details(), details)
        self.assertEqual(received.retry_info(), details[1])
        self.assertEqual(received.help(), details[6])
        self.assertTrue(all(d["@type"].startswith("vgi_rpc.") for d in raised.error_details))

    def test_wrong_details_are_refused_where_they_are_given(self) -> None:
        twice = [vgi_rpc.RetryInfo(1), vgi_rpc.RetryInfo(2)]
        for details, text in (
            (twice, "twice"),
            ([{"a": 1}], "@type"),
            ([{"@type": "vgi_rpc.Mine"}], "reserved"),
            ([3], "mapping"),
        ):
            with self.subTest(text=text), self.raises(ValueError, text):
                vgi_rpc.StatusError("x", code="UNKNOWN", details=details)  # type: ignore[arg-type]
        with self.raises(ValueError, "NO_SUCH"):
            vgi_rpc.StatusError("x", code="NO_SUCH")

    def test_retryable(self) -> None:
        retry = [vgi_rpc.RetryInfo(1.0).to_json()]
        for code, details, answer in (
            ("UNAVAILABLE", [], True),
            ("RESOURCE_EXHAUSTED", [], False),
            ("RESOURCE_EXHAUSTED", retry, True),
            ("ABORTED", retry, False),
            ("FROM_THE_FUTURE", [], False),
        ):
            with self.subTest(code=code, details=bool(details)):
                self.assertIs(RpcError("E", "m", "", error_code=code, error_details=details).is_retryable(), answer)

    def test_an_unknown_code_counts_as_unknown(self) -> None:
        self.assertIs(RpcError("E", "m", "", error_code="FROM_THE_FUTURE").code, vgi_rpc.Code.UNKNOWN)

    def test_errors_survive_pickling(self) -> None:
        import pickle

        sent = RpcError("E", "m", "tb", request_id="r", error_code="ABORTED", error_kind="k", error_details=[{"@type": "x"}])
        got = pickle.loads(pickle.dumps(sent))
        self.assertEqual((type(got), vars(got), str(got)), (RpcError, vars(sent), str(sent)))
        self.assertEqual(str(pickle.loads(pickle.dumps(TransportError("gone")))), str(TransportError("gone")))


# ============================================================================
# 3. LOG MESSAGES
# ============================================================================


class MessageTests(TestCase):
    """Messages on their own."""

    def test_constructors(self) -> None:
        for level in Level:
            with self.subTest(level=level):
                made = getattr(vgi_rpc.Message, level.name.lower())("text", key="value")
                self.assertEqual(made, vgi_rpc.Message(level, "text", key="value"))
                self.assertEqual(made.extra, {"key": "value"})
        self.assertIsNone(vgi_rpc.Message.info("text").extra)

    def test_an_exception_becomes_a_message(self) -> None:
        try:
            try:
                raise KeyError("inner")
            except KeyError as exc:
                raise ValueError("outer") from exc
        except ValueError as exc:
            message = vgi_rpc.Message.from_exception(exc)
        assert message.extra is not None
        self.assertEqual((message.level, message.message), (Level.EXCEPTION, "ValueError: outer"))
        self.assertIn("test_an_exception_becomes_a_message", message.extra["traceback"])
        self.assertEqual(message.extra["frames"][-1]["function"], "test_an_exception_becomes_a_message")
        self.assertIn("KeyError", message.extra["cause"])

    def test_a_long_traceback_is_cut_and_five_frames_are_kept(self) -> None:
        def deep(n: int) -> None:
            if not n:
                raise ValueError("x" * 20_000)
            deep(n - 1)

        try:
            deep(30)
        except ValueError as exc:
            extra = vgi_rpc.Message.from_exception(exc).extra
        assert extra is not None
        self.assertTrue(extra["traceback"].endswith("\n… <traceback truncated>"))
        self.assertEqual(len(extra["frames"]), 5)

    def test_metadata(self) -> None:
        metadata = vgi_rpc.Message.warn("text", a="b").add_to_metadata({"own": "1"})
        extra = json.loads(metadata.pop("vgi_rpc.log_extra"))
        self.assertEqual(metadata, {"own": "1", "vgi_rpc.log_level": "WARN", "vgi_rpc.log_message": "text"})
        self.assertEqual(extra, {"a": "b"})


# ============================================================================
# 4. BATCHES
# ============================================================================


class OneByteSource(vgi_rpc.BufferSource):
    """A source whose reads come in the smallest pieces that a socket could give; it must be asked again."""

    def read(self, size: int) -> bytes:
        return b"".join(super(OneByteSource, self).read(1) for _ in range(size))


def read_all(data: bytes, source: Any = None) -> list[Any]:
    """Everything in one stream, by the module's reader."""
    reader = vgi_rpc.IpcReader(source or vgi_rpc.BufferSource(data))
    return list(iter(reader.next, None))


COLORS = pa.DictionaryArray.from_arrays(pa.array([0, 1, 0], pa.int16()), pa.array(["RED", "BLUE"]))
STREAMS = {
    "no batch": ipc_bytes(VALUE),
    "no columns": ipc_bytes(pa.schema([]), (pa.RecordBatch.from_arrays([], schema=pa.schema([])), {b"k": b"v"})),
    "two batches": ipc_bytes(BATCH.schema, (BATCH, {b"k": b"\xff"}), BATCH.slice(1)),
    "dictionary": ipc_bytes(pa.schema([("c", COLORS.type)]), pa.RecordBatch.from_arrays([COLORS], names=["c"])),
    "nested": ipc_bytes(
        pa.schema([("n", pa.list_(pa.struct([("a", pa.map_(pa.utf8(), pa.int64()))])))]),
        pa.RecordBatch.from_arrays(
            [pa.array([[{"a": [("k", 1)]}], None], pa.list_(pa.struct([("a", pa.map_(pa.utf8(), pa.int64()))])))], names=["n"]
        ),
    ),
}


def flat_message(head: bytes, body: bytes = b"") -> bytes:
    """An encapsulated message around a flatbuffer head."""
    head += b"\0" * (-len(head) % 8)
    return b"\xff\xff\xff\xff" + struct.pack("<i", len(head)) + head + body


def tampered(data: bytes, old: bytes, new: bytes) -> bytes:
    """Replace bytes that stand exactly once or more; the tests must notice when they do not."""
    assert old in data and len(old) == len(new), old
    return data.replace(old, new)


def claiming_rows(rows: int) -> bytes:
    """A stream whose null column says that it has *rows* rows, in two hundred bytes."""
    schema = pa.schema([("n", pa.null())])
    honest = ipc_bytes(schema, pa.RecordBatch.from_arrays([pa.nulls(123_456_789)], schema=schema))
    return tampered(honest, struct.pack("<q", 123_456_789), struct.pack("<q", rows))


def raw_text(offsets: Any, data: bytes) -> bytes:
    """A stream of one text column with these offsets and data in its body, valid or not."""
    column = pa.array(["x" * len(data)] + [""] * (len(offsets) - 2))
    honest = ipc_bytes(pa.schema([("s", pa.utf8())]), pa.RecordBatch.from_arrays([column], names=["s"]))
    stream = tampered(honest, b"x" * len(data), data)
    before = struct.pack(f"<{len(offsets)}i", 0, *[len(data)] * (len(offsets) - 1))
    return tampered(stream, before, struct.pack(f"<{len(offsets)}i", *offsets))


def _dictionary_index() -> bytes:
    honest = STREAMS["dictionary"]
    return tampered(honest, struct.pack("<3h", 0, 1, 0), struct.pack("<3h", 0, 99, 0))


def _deep(levels: int) -> bytes:
    kind: pa.DataType = pa.int8()
    for _ in range(levels):
        kind = pa.list_(kind)
    return ipc_bytes(pa.schema([("d", kind)]))


def _compressed_bomb() -> bytes:
    sink = io.BytesIO()
    batch = pa.RecordBatch.from_pydict({"z": pa.array([0.0] * 4_000_000)})
    options = pa.ipc.IpcWriteOptions(compression="zstd" if pa.Codec.is_available("zstd") else "lz4")
    with pa.ipc.new_stream(sink, batch.schema, options=options) as writer:
        writer.write_batch(batch)
    return sink.getvalue()


HOSTILE = {  # name: bytes that are no request, and a part of what is said about them
    "random bytes": (b"\x00\x01garbage that is not Arrow at all", "not an Arrow IPC stream"),
    "text": (b"GET / HTTP/1.1\r\n\r\n", "not an Arrow IPC stream"),
    "end of stream only": (b"\xff\xff\xff\xff\0\0\0\0", "schema"),
    "negative head": (b"\xff\xff\xff\xff" + struct.pack("<i", -1), "head"),
    "head of 2 GiB": (b"\xff\xff\xff\xff" + struct.pack("<i", 2**31 - 1), "head"),
    "head of zeros": (flat_message(b"\0" * 64), "head"),
    "head of ones": (flat_message(b"\xff" * 64), "head"),
    "schema and no batch": (ipc_bytes(VALUE), "no batch"),
    "nesting that pyarrow would take": (_deep(70), "nesting"),
    "two batches": (ipc_bytes(VALUE, *[pa.RecordBatch.from_pydict({"value": [1.0]}, VALUE)] * 2), "one batch"),
    "many columns": (ipc_bytes(pa.schema([(f"c{i}", pa.int8()) for i in range(5000)])), "columns"),
    "deep nesting": (_deep(500), ""),
    "a trillion rows": (claiming_rows(10**12), "rows"),
    "negative rows": (claiming_rows(-5), "rows"),
}


class BatchTests(TestCase):
    """The IPC reader: the same as pyarrow on good bytes, an error of our own on all others."""

    def test_reads_what_pyarrow_wrote(self) -> None:
        for name, data in STREAMS.items():
            for source in (vgi_rpc.BufferSource, OneByteSource):
                with self.subTest(name=name, source=source.__name__):
                    found = [(b, m or {}) for b, m in read_all(data, source(data))]
                    self.assertEqual(found, read_stream(io.BytesIO(data)))

    def test_stops_at_the_end_marker(self) -> None:
        source = vgi_rpc.BufferSource(STREAMS["two batches"] + STREAMS["dictionary"] + b"rest")
        self.assertEqual(len(list(iter(vgi_rpc.IpcReader(source).next, None))), 2)
        self.assertEqual(len(list(iter(vgi_rpc.IpcReader(source).next, None))), 1)
        self.assertEqual(source.read(100), b"rest")

    def test_batches_of_all_sizes_come_in_pieces(self) -> None:
        rows = {size: pa.RecordBatch.from_pydict({"n": pa.array(range(size), pa.int64())}) for size in (0, 3, 9_000, 20_000)}
        batches = [*[rows[20_000]] * 3, *[rows[3]] * 3, rows[0], *[rows[9_000]] * 2, rows[20_000].slice(7, 12_000), rows[3]]
        items = [(b, {b"k": b"%d" % (i // 2)} if i % 5 else None) for i, b in enumerate(batches)]
        for most in (5_000, 70_000, 1 << 30):
            with self.subTest(most=most):
                written = MemoryChannel(b"", most)
                writer = vgi_rpc.IpcWriter(written.write, rows[3].schema)
                for batch, metadata in items:
                    writer.write(batch, metadata)
                writer.close()
                data = b"".join(written.written)
                self.assertEqual([(b, m or None) for b, m in read_stream(io.BytesIO(data))], items)
                channel = MemoryChannel(data + b"rest", most)
                self.assertEqual(read_all(b"", channel), items)
                self.assertEqual(channel.read(5), b"rest")
        for end in range(len(data) - 300, len(data), 7):
            with self.subTest(end=end), self.assertRaises(vgi_rpc.IPCError):
                read_all(b"", MemoryChannel(data[:end], 70_000))

    def test_a_dictionary_that_another_reader_kept_has_this_ones_limits(self) -> None:
        schema = pa.schema([("c", pa.dictionary(pa.int16(), pa.utf8()), True, {"for": "this test"})])
        column = pa.DictionaryArray.from_arrays(pa.array([0], pa.int16()), pa.array(list("abcde")))
        data = ipc_bytes(schema, pa.RecordBatch.from_arrays([column], schema=schema))
        for _ in range(2):
            with self.assertRaises(vgi_rpc.RequestTooLargeError):
                vgi_rpc.IpcReader(vgi_rpc.BufferSource(data), vgi_rpc.IpcLimits(max_rows=2)).next()
            self.assertEqual([b.to_pydict() for b, _ in read_all(data)], [{"c": ["a"]}])

    def test_nothing_is_read_behind_the_end(self) -> None:
        vgi_rpc._cached_schema.cache_clear()  # and with it the dictionaries that other tests had kept
        data = STREAMS["dictionary"]
        messages = data.removeprefix(vgi_rpc.IpcReader(vgi_rpc.BufferSource(data)).facts.message)
        for _ in range(2):
            reader = vgi_rpc.IpcReader(source := vgi_rpc.BufferSource(data + messages))
            self.assertEqual(len(list(iter(reader.next, None))), 1)
            self.assertIsNone(reader.next())
            self.assertEqual(source.position, len(data))

    def test_every_strict_prefix_is_refused(self) -> None:
        for name, data in STREAMS.items():
            for end in range(len(data)):
                with self.subTest(name=name, end=end), self.assertRaises(vgi_rpc.IPCError if end else EOFError):
                    read_all(data[:end])

    def test_every_flipped_byte_is_read_or_refused(self) -> None:
        for name, data in STREAMS.items():
            outcomes = set()
            for at in range(len(data)):
                broken = data[:at] + bytes([data[at] ^ 0xFF]) + data[at + 1 :]
                try:
                    read_all(broken)
                    outcomes.add("read")
                except (vgi_rpc.IPCError, vgi_rpc.RequestTooLargeError):
                    outcomes.add("refused")
            with self.subTest(name=name):
                self.assertIn("refused", outcomes)

    def test_values_are_validated(self) -> None:
        for name, data in (
            ("bad UTF-8", raw_text((0, 40), b"\xff" * 40)),
            ("offsets backwards", raw_text((0, 40, 20), b"a" * 40)),
            ("negative offset", raw_text((-4, 40), b"a" * 40)),
            ("offset past the data", raw_text((0, 4000), b"a" * 40)),
            ("dictionary index out of range", _dictionary_index()),
        ):
            with self.subTest(name), self.assertRaises(vgi_rpc.IPCError):
                read_all(data)

    def test_raw_columns_are_readable_when_they_are_right(self) -> None:
        self.assertEqual(read_all(raw_text((0, 40), b"a" * 40))[0][0].column(0).to_pylist(), ["a" * 40])

    def test_a_claim_of_decoded_bytes_is_refused_without_a_limit_of_ours(self) -> None:
        size, claimed = struct.pack("<q", 32_000_000), struct.pack("<q", 1 << 40)
        bomb = _compressed_bomb()
        self.assertEqual(bomb.count(size), 1)
        with self.assertRaisesRegex(vgi_rpc.RequestTooLargeError, f"at most {1 << 30} decoded bytes, got {1 << 40}"):
            vgi_rpc.IpcReader(vgi_rpc.BufferSource(bomb.replace(size, claimed))).next_message()

    def test_a_claim_of_rows_costs_nothing(self) -> None:
        with self.raises(vgi_rpc.IPCError, "1000000000000 rows"):
            read_all(claiming_rows(10**12))
        self.assertEqual(read_all(claiming_rows(1000))[0][0].num_rows, 1000)

    def test_from_pydict(self) -> None:
        self.assertEqual(AnnotatedBatch.from_pydict({"a": [1, None]}).batch.schema, pa.schema([("a", pa.int64())]))
        self.assertEqual(AnnotatedBatch.from_pydict({"value": [1]}, schema=VALUE).batch.schema, VALUE)
        strict = pa.schema([pa.field("value", pa.int64(), nullable=False)])
        for data, schema, parts in (
            ({"value": ["x"]}, VALUE, ("'value'", "double")),
            ({"other": [1.0]}, VALUE, ("['value']", "['other']")),
            ({"value": [None]}, strict, ("'value'", "null")),
            ({"a": [1], "b": [1, 2]}, None, ()),
            ({"a": [1, "x"]}, None, ()),
        ):
            with self.subTest(data=data), self.raises(TypeError, *parts):
                AnnotatedBatch.from_pydict(data, schema)


# ============================================================================
# 5. PLAIN ROWS
# ============================================================================


class RecordingClient(WsgiClient):
    """Keeps what went through last."""

    sent = b""
    received = b""

    def send(self, method: str, path: str, headers: Any, body: bytes, deadline: Any = None, limit: Any = None) -> Reply:
        reply = super().send(method, path, headers, body)
        self.sent, self.received = body, reply.body
        return reply


def as_pyarrow_shows(value: Any) -> Any:
    """A value of the type table as pyarrow's ``as_py`` shows it; dataclasses at the top are not shown, they are bytes."""
    if isinstance(value, enum.Enum):
        return value.name
    if isinstance(value, Point):
        return {"x": value.x, "color": value.color.name, "note": value.note}
    if isinstance(value, dict):
        return [(as_pyarrow_shows(k), as_pyarrow_shows(v)) for k, v in value.items()]
    if isinstance(value, (list, set, frozenset)):
        return [as_pyarrow_shows(v) for v in value]
    return value


class PlainRowTests(TestCase):
    """Small rows may take a short cut around pyarrow: it must not show in a byte's meaning, nor in what is refused."""

    def test_buffers_outside_the_body_and_strange_dictionaries_are_left_to_pyarrow(self) -> None:
        point = Point(3, Color.RED, "a note")
        data, plan = point.serialize_to_bytes(), vgi_rpc.dataclass_codec(Point).row.plan
        reader = vgi_rpc.IpcReader(vgi_rpc.BufferSource(data))
        message = reader.next_message()
        self.assertEqual(plan.read(reader, message), [[v] for v in plan.read_stream(data)])
        head = message.data[8 : len(message.data) - message.head.body_length]
        at = data.index(head) + next(start for start, _, name in vgi_rpc._parse_head(bytes(head))[1] if name == "buffers")
        for i in range(len(message.head.buffers)):
            for wrong in (-8, 4, message.head.body_length + 8, 2**62):
                broken = data[: at + 8 * i] + struct.pack("<q", wrong) + data[at + 8 * i + 8 :]
                offset, size = struct.unpack_from("<2q", broken, at + 16 * (i // 2))
                if offset >= 0 and size >= 0 and not offset % 8 and offset + size <= message.head.body_length:
                    continue
                with self.subTest(buffer=i // 2, wrong=wrong), self.assertRaises(vgi_rpc._NotPlain):
                    plan.read_stream(broken)
        (known,) = reader.dictionaries()
        reader._dictionaries = {7: [known._replace(head=known.head._replace(dictionary_id=7))]}
        with self.assertRaises(vgi_rpc._NotPlain):
            plan.read(reader, message)

    def test_pyarrow_reads_what_was_meant(self) -> None:
        client = RecordingClient(vgi_rpc.make_wsgi_app(make_server(), token_key=KEY))
        with vgi_rpc.http_connect(Service, client=client, compression_level=None) as proxy:
            for name, case in TYPES.items():
                for value in case.values:
                    getattr(proxy, f"echo_{name}")(value)
                    for data, column in ((client.sent, "value"), (client.received, "result")):
                        with self.subTest(name=name, value=value, column=column):
                            [(batch, _)] = read_stream(io.BytesIO(data))
                            batch.validate(full=True)
                            self.assertEqual(
                                batch.schema, pa.schema([pa.field(column, case.arrow_type, nullable=case.nullable)])
                            )
                            shown = batch.column(0)[0].as_py()
                            if pa.types.is_binary(case.arrow_type) and value is not None and not isinstance(value, bytes):
                                [(batch, _)] = read_stream(io.BytesIO(shown)) if name != "schema" else [(BATCH, None)]
                                batch.validate(full=True)
                            else:
                                same = self.assertCountEqual if isinstance(value, (set, frozenset)) else self.assertEqual
                                same(shown, as_pyarrow_shows(value))

    def test_damaged_rows_are_refused_or_mean_what_pyarrow_reads(self) -> None:
        client = wsgi_client()
        accepted = refused = 0
        for method, data in (
            ("add", {"a": 1.0, "b": 2.0}),
            ("echo_list_int", {"value": [1, 2, 3]}),
            ("echo_union_str", {"value": "text"}),
            ("echo_list_enum", {"value": ["BLUE", "RED"]}),
        ):
            honest = request_bytes(method, data)
            for at in range(0, len(honest), 2):
                broken = honest[:at] + bytes([honest[at] ^ 0x81]) + honest[at + 1 :]
                reply = client.post(f"/Service/{method}", broken)
                with self.subTest(method=method, at=at):
                    self.assertIn(reply.status, (200, 400, 404, 413))
                    if reply.status != 200 or "x-vgi-rpc-error" in reply.headers:
                        refused += 1
                        continue
                    accepted += 1
                    try:
                        [(batch, _)] = read_stream(io.BytesIO(broken))
                    except (OSError, pa.ArrowException):  # damage to what no reader of a row needs
                        [(batch, _)] = read_stream(io.BytesIO(honest))
                    batch.validate(full=True)
                    meant = sum(c[0].as_py() for c in batch.columns) if method == "add" else batch.column(0)[0].as_py()
                    self.assertEqual(read_stream(io.BytesIO(reply.body))[-1][0].column(0)[0].as_py(), meant)
        self.assertTrue(accepted and refused)


    def test_columns_may_change_once_they_were_emitted(self) -> None:
        for kind, metadata in itertools.product((pa.utf8(), pa.list_(pa.utf8()), vgi_rpc._ENUM_TYPE), (None, {b"k": b"v"})):
            column = [["a"], ["b", "c"]] if pa.types.is_list(kind) else ["a", "b"]
            schema = pa.schema([pa.field("c", kind, metadata={"for": f"this test {metadata}"})])  # not seen before
            for _ in range(2):
                out, rows, written = vgi_rpc.OutputCollector(schema), copy.deepcopy(column), list[Any]()
                out.emit_pydict({"c": rows})
                if pa.types.is_list(kind):
                    rows[1].clear()
                rows.clear()
                vgi_rpc.write_stream(written.extend, schema, [(out._data, metadata)])
                with self.subTest(kind=kind, metadata=metadata):
                    [(batch, _)] = read_stream(io.BytesIO(b"".join(written)))
                    self.assertEqual([batch["c"].to_pylist(), out.data_batch.batch["c"].to_pylist()], [column, column])

    def test_only_short_dictionaries_are_kept_and_others_may_clear_them(self) -> None:
        class Clearing(dict[Any, Any]):
            def __setitem__(self, key: Any, value: Any) -> None:
                super().__setitem__(key, value)
                self.clear()  # as another thread does when it finds too many

        schema = pa.schema([pa.field("c", vgi_rpc._ENUM_TYPE, metadata={"for": "this test"})])
        facts, plan = vgi_rpc.schema_facts(schema), vgi_rpc.plain_plan(schema)
        for n in range(100):
            plan.write([["x" * 100_000 + str(n)]]).messages(None)
            self.assertEqual(facts.dictionaries, {})
            plan.write([[f"short {n}"]]).messages(None)
            facts.dictionaries.clear()
        facts.dictionaries = Clearing()
        dictionary, _ = plan.write([["short"]]).messages(None)
        self.assertIn(b"short", dictionary)

def ordinary(server: RpcServer, data: bytes) -> Any:
    """What the ordinary way makes of a request: method, id, time limit, arguments and length; its exception when it refuses."""
    source = vgi_rpc.BufferSource(data)
    try:
        request = vgi_rpc.Request(vgi_rpc.IpcReader(source, server.limits))
        bound = server.resolve(request)
        return bound.info.name, request.request_id, request.timeout, vgi_rpc.read_arguments(bound.info, request), source.position
    except Exception as exc:
        return exc


def recalled(server: RpcServer, data: bytes, at: int = 0) -> Any:
    """The same of a request that is recognised, ``None`` when it is not."""
    if (found := server.recall(data, at)) is None:
        return None
    bound, request, end = found
    try:
        return bound.info.name, request.request_id, request.timeout, vgi_rpc.read_arguments(bound.info, request), end - at
    except Exception as exc:
        return exc


class StreamLayoutTests(TestCase):
    """Requests and results that look like those before them are recognised; that must show in nothing but the time."""

    def server_that_knows(self, *requests: bytes) -> RpcServer:
        """A server that has served each of the requests."""
        server = make_server()
        server.serve(vgi_rpc.Transport(MemoryChannel(b"".join(requests)), vgi_rpc.TransportKind.PIPE))
        return server

    def test_every_type_means_the_same_when_it_is_recognised(self) -> None:
        known = 0
        for name, case in TYPES.items():
            info = vgi_rpc.rpc_methods(Service)[f"echo_{name}"]
            for timeout in (None, 5.0):
                for first, second in itertools.product(case.values, repeat=2):
                    info.layouts.clear()
                    one, two = (vgi_rpc.request_batch(info, [value]) for value in (first, second))
                    learned_of = b"".join(vgi_rpc.request_stream(info, one, "", "0123456789abcdef", timeout))
                    recognised = b"".join(vgi_rpc.request_stream(info, two, "", "fedcba9876543210", timeout))
                    info.layouts.clear()
                    with self.subTest(name=name, first=first, second=second, timeout=timeout):
                        self.assertEqual(recognised, b"".join(vgi_rpc.request_stream(info, two, "", "fedcba9876543210", timeout)))
                        server = self.server_that_knows(learned_of)
                        found, wanted = recalled(server, b"xy" + recognised, 2), ordinary(server, recognised)
                        if found is not None:
                            known += 1
                            self.assertEqual(repr(found), repr(wanted))
        self.assertGreater(known, 100)

    def test_calls_answer_the_same_before_and_after_they_are_known(self) -> None:
        with vgi_rpc.serve_pipe(Service, ServiceImpl()) as proxy:
            for name, case in TYPES.items():
                for value in [*case.values, *case.values]:
                    with self.subTest(name=name, value=value):
                        self.assertEqual(getattr(proxy, f"echo_{name}")(value), value)
            for _ in range(3):
                self.assertIsNone(proxy.nothing())
                self.assertEqual([proxy.optional(1), proxy.optional(), proxy.optional(2)], [1, None, 2])
                with self.assertRaises(RpcError):
                    proxy.fail(how="TypeError")
                with self.assertRaisesRegex(RpcError, "large|int64"):
                    proxy.lie(how="large")
                self.assertEqual(proxy.add(a=1.5), 3.5)

    def test_damaged_bytes_are_taken_for_nothing_else(self) -> None:
        for method, data in (
            ("add", {"a": 1.0, "b": 2.0}), ("echo_str", {"value": "text"}), ("echo_union_str", {"value": None}), ("nothing", None),
        ):  # fmt: skip
            honest = request_bytes(method, data, **{"vgi_rpc.request_id": "0123456789abcdef", "vgi_rpc.timeout_ms": "000000000009000"})
            server, seen = self.server_that_knows(honest), 0
            self.assertIsNotNone(recalled(server, honest))
            for at, bit in itertools.product(range(len(honest)), (0x01, 0x80)):
                broken = honest[:at] + bytes([honest[at] ^ bit]) + honest[at + 1 :]
                found, wanted = recalled(server, broken), ordinary(server, broken)
                with self.subTest(method=method, at=at, bit=bit):
                    if isinstance(found, Exception):
                        self.assertEqual((type(found), str(found)), (type(wanted), str(wanted)))
                    elif found is not None:
                        seen += 1
                        self.assertEqual(repr(found), repr(wanted))
            self.assertGreater(seen, 16, method)

    def test_half_a_request_is_not_one(self) -> None:
        for method, data in (("add", {"a": 1.0, "b": 2.0}), ("echo_bytes", {"value": b"12345"})):
            honest = request_bytes(method, data)
            server = self.server_that_knows(honest)
            for size in range(len(honest)):
                self.assertIsNone(server.recall(honest[:size], 0), (method, size))
            self.assertIsNotNone(server.recall(honest + b"next", 0))

    def test_limits_hold_for_what_is_known(self) -> None:
        server = RpcServer(Service, ServiceImpl(), max_request_bytes=2_000)
        small, large = (request_bytes("echo_str", {"value": "x" * size}) for size in (10, 3_000))
        answers = ask_core(server, small + large + small)
        self.assertEqual([read[0][0].num_rows for read in answers], [1, 0, 1])
        self.assertIn("at most 2000 bytes", error_of(answers[1])["text"])

    def test_what_may_be_left_out_over_http_is_missed_on_a_pipe(self) -> None:
        server, unnamed = make_server(), request_bytes("add", {"a": 1.0, "b": 2.0}, protocol=None)
        for _ in range(3):
            self.assertEqual(wsgi_client(server).post("/Service/add", unnamed).status, 200)
        self.assertEqual(error_of(ask_core(server, unnamed)[0])["kind"], "protocol_not_specified")

    def test_what_differs_in_each_request_is_not_learned(self) -> None:
        traced = [request_bytes("add", {"a": 1.0, "b": 2.0}, traceparent=f"00-{n:032x}-01") for n in range(40)]
        self.assertIsNone(recalled(self.server_that_knows(*traced), traced[0]))
        named = [request_bytes("add", {"a": 1.0, "b": 2.0}, **{"vgi_rpc.request_id": "x" * (n + 1)}) for n in range(40)]
        server = self.server_that_knows(*named)
        self.assertLessEqual(sum(map(len, server._known.values())), 16)

    def test_a_layout_is_learned_once(self) -> None:
        whole = request_bytes("echo_str", {"value": "text"}, **{"vgi_rpc.request_id": "0123456789abcdef"})
        server = make_server()
        for _ in range(20):  # not there as a whole, and so not recognised
            server.serve(vgi_rpc.Transport(MemoryChannel(whole, 100), vgi_rpc.TransportKind.PIPE))
        self.assertEqual([len(layouts) for layouts in server._known.values()], [1])
        self.assertIsNotNone(recalled(server, whole))

    def test_what_a_peer_makes_long_is_not_kept(self) -> None:
        honest = request_bytes("add", {"a": 1.0, "b": 2.0})
        server = self.server_that_knows(honest)
        known, schema = dict(server._known), server.methods["add"].params_schema
        long = [request_bytes("add", {"a": 1.0, "b": 2.0}, schema.with_metadata({"x": "y" * 20_000 + str(n)})) for n in range(3)]
        long += [request_bytes("add", {"a": 1.0, "b": 2.0}, **{"vgi_rpc.protocol_version": "9" * 20_000 + str(n)}) for n in range(3)]
        answers = ask_core(server, b"".join(long) + honest)
        self.assertEqual([read[0][0].num_rows for read in answers], [1] * 7)
        self.assertEqual(server._known, known)

    def test_hooks_count_the_rows_of_what_is_known(self) -> None:
        server, recorder = make_server(), Recorder()
        server.add_hook(recorder)
        ask_core(server, 3 * request_bytes("nothing") + 3 * request_bytes("add", {"a": 1.0, "b": 2.0}))
        counted = [(r.request_rows, r.statistics.input_rows) for r in recorder.records]
        self.assertEqual(counted, 3 * [(0, 0)] + 3 * [(1, 1)])

    def test_the_wire_is_logged_also_for_what_is_known(self) -> None:
        with vgi_rpc.serve_pipe(Service, ServiceImpl()) as proxy:
            proxy.add(a=1.0)
            for _ in range(2):
                with self.assertLogs("vgi_rpc.wire", "DEBUG") as caught:
                    self.assertEqual(proxy.add(a=1234.5, b=1.0), 1235.5)
                said = [(record.name, record.getMessage()) for record in caught.records]
                read = [text for name, text in said if name == "vgi_rpc.wire.read"]
                self.assertEqual(sum("batch of 1 rows" in text for text in read), 2, said)  # the request and the result
                self.assertTrue(any("vgi_rpc.method" in text for text in read))
                self.assertEqual(sum("messages of" in text for name, text in said if name == "vgi_rpc.wire.write"), 2, said)
                self.assertNotIn("1234", repr(said))

    def test_a_method_sees_its_caller_and_its_deadline_when_known(self) -> None:
        with vgi_rpc.serve_pipe(Service, ServiceImpl()) as proxy:
            hurried = vgi_rpc.with_options(proxy, timeout=0.05)
            self.assertEqual([hurried.wait(seconds=0.0) for _ in range(3)], [0, 0, 0])
            with self.assertRaises(vgi_rpc.DeadlineExceededError):
                hurried.wait(seconds=0.5)


# ============================================================================
# 6. TYPES
# ============================================================================


def row_class(annotation: Any) -> Any:
    """A dataclass with the one field ``value`` of *annotation*."""

    class Row(ArrowSerializableDataclass):
        value: Any

    Row.__annotations__ = {"value": annotation}
    return dataclass(Row)


class Unsupported:
    """A class without a mapping."""


@dataclass
class Recursive(ArrowSerializableDataclass):
    """Contains itself."""

    inner: "Recursive | None" = None


@dataclass
class Versioned(ArrowSerializableDataclass):
    """What a newer or older peer may have written."""

    kept: int
    added: str = "default"
    made: list[int] = field(default_factory=lambda: [1])


@dataclass
class Late(ArrowSerializableDataclass):
    """A field that the constructor does not take."""

    given: int
    derived: int = field(init=False, default=0)


class TypeTests(TestCase):
    """Annotations, both ways from one table."""

    def test_table_in_dataclasses(self) -> None:
        for name, case in TYPES.items():
            cls = row_class(case.annotation)
            inside = name not in ("dataclass", "optional_dataclass", "deep_dataclass")
            with self.subTest(name):
                if inside:
                    self.assertEqual(cls.ARROW_SCHEMA, pa.schema([pa.field("value", case.arrow_type, nullable=case.nullable)]))
                else:
                    self.assertTrue(pa.types.is_struct(cls.ARROW_SCHEMA.field(0).type))
                for value in case.values:
                    got = cls.deserialize_from_bytes(cls(value).serialize_to_bytes())
                    self.assertEqual(got.value, value)
                    self.assertIs(type(got.value), type(value))

    def test_table_in_methods(self) -> None:
        methods = vgi_rpc.rpc_methods(Service)
        for name, case in TYPES.items():
            info = methods[f"echo_{name}"]
            with self.subTest(name):
                self.assertEqual(info.params_schema, pa.schema([pa.field("value", case.arrow_type, nullable=case.nullable)]))
                self.assertEqual(info.result_schema, pa.schema([pa.field("result", case.arrow_type, nullable=case.nullable)]))

    def test_what_pyarrow_sees_of_an_encoded_row(self) -> None:
        shape = Shape("b", [Point(1, Color.BLUE)], {"k": Point(3)}, frozenset({"t"}), cache=object())
        [(batch, _)] = read_stream(io.BytesIO(shape.serialize_to_bytes()))
        point = {"x": 1, "color": "BLUE", "note": None}
        self.assertEqual(
            batch.to_pylist(),
            [{"name": "b", "points": [point], "named": [("k", {"x": 3, "color": "RED", "note": None})], "tags": ["t"]}],
        )

    def test_wrong_values(self) -> None:
        with vgi_rpc.serve_pipe(Service, ServiceImpl()) as proxy:
            for name, value, parts in (
                ("int", "x", ("value", "expected int64", "got str")),
                ("int", True, ("expected int64", "got bool")),
                ("int", 1.5, ("expected int64", "got float")),
                ("int", None, ("expected int64", "got None")),
                ("int", 2**63, ("expected int64", str(2**63))),
                ("float", "1", ("expected float64", "got str")),
                ("str", b"x", ("expected utf8", "got bytes")),
                ("bytes", "x", ("expected binary", "got str")),
                ("bool", 1, ("expected bool", "got int")),
                ("list_int", "abc", ("expected list of int64", "got str")),
                ("list_int", [1, "x"], ("value[1]", "expected int64", "got str")),
                ("list_int", [1, 2**63], ("value[1]", "expected int64")),
                ("set", [1], ("expected set", "got list")),
                ("dict", {"a": "x"}, ("value['a']", "expected float64", "got str")),
                ("dict", [("a", 1.0)], ("expected dict", "got list")),
                ("list_list", [["a"], [3]], ("value[1][0]", "expected utf8", "got int")),
                ("enum", "RED", ("Color", "RED, BLUE", "got str")),
                ("dataclass", Header(1), ("expected Point", "got Header")),
                ("dataclass", Point("1"), ("value.x", "expected int64", "got str")),
                ("list_dataclass", [Point(1), Point(2, note=3)], ("value[1].note", "expected utf8", "got int")),
                ("deep_dataclass", Shape("a", named={"k": Point("z")}), ("value.named['k'].x", "expected int64", "got str")),
                ("batch", {"a": [1]}, ("RecordBatch", "got dict")),
                ("schema", 3, ("Schema", "got int")),
                ("int8", 128, ("value", "int8", "128")),
                ("fixed_binary", b"abc", ("value", "fixed_size_binary[4]")),
                ("decimal", decimal.Decimal("1e30"), ("value", "decimal128(20, 4)")),
                ("date32", "2024", ("value", "date32")),
            ):
                with self.subTest(name=name, value=value), self.raises(TypeError, f"echo_{name}()", *parts):
                    getattr(proxy, f"echo_{name}")(value=value)
                with self.subTest("serialised", name=name, value=value), self.raises(TypeError):
                    row_class(TYPES[name].annotation)(value).serialize_to_bytes()
            self.assertEqual(proxy.add(a=1.0), 3.0)

    def test_numbers_that_fit_are_taken(self) -> None:
        with vgi_rpc.serve_pipe(Service, ServiceImpl()) as proxy:
            self.assertEqual(proxy.echo_float(3), 3.0)
            self.assertEqual(proxy.echo_int(pa.scalar(5)), 5)
            self.assertEqual(proxy.echo_bytes(bytearray(b"x")), b"x")
            self.assertEqual(proxy.echo_list_int((1, 2)), [1, 2])

    def test_annotations_without_a_mapping(self) -> None:
        for annotation, parts in (
            (complex, ("complex",)),
            (object, ("object",)),
            (Any, ("Any",)),
            (list, ("list", "list[T]")),
            (dict, ("dict", "dict[K, V]")),
            (tuple[int, str], ("tuple",)),
            (datetime.datetime, ("datetime", "ArrowType(pa.timestamp('us'))")),
            (datetime.date, ("date", "ArrowType(pa.date32())")),
            (decimal.Decimal, ("Decimal", "ArrowType(pa.decimal128(20, 4))")),
            (int | str, ("int | str",)),
            (list[complex], ("complex",)),
            (dict[str, list[Unsupported]], ("Unsupported",)),
            (pa.Table, ("Table", "RecordBatch")),
        ):
            cls = row_class(annotation)
            with self.subTest(annotation=annotation), self.raises(TypeError, "Row.value", *parts):
                cls(None).serialize_to_bytes()
        with self.raises(TypeError, "Recursive", "contains itself"):
            Recursive().serialize_to_bytes()

    def test_reading_goes_by_name(self) -> None:
        def read(**columns: Any) -> Versioned:
            batch = pa.RecordBatch.from_pydict(columns)
            self.assertEqual(
                Versioned.deserialize_from_batch(batch), Versioned.deserialize_from_bytes(ipc_bytes(batch.schema, batch))
            )
            return Versioned.deserialize_from_batch(batch)

        self.assertEqual(read(unknown=[1.5], made=[[3]], kept=[2]), Versioned(2, made=[3]))
        self.assertEqual(read(kept=[2]), Versioned(2, "default", [1]))
        with self.raises(TypeError, "Versioned.kept", "no default"):
            read(added=["x"])
        with self.raises(TypeError, "Versioned.kept", "expected int64", "got None"):
            read(kept=pa.array([None], pa.int64()))
        with self.raises(TypeError, "Versioned.kept"):
            read(kept=["x"])
        with self.raises(TypeError, "one row", "2 rows"):
            read(kept=[1, 2])
        self.assertEqual(Late.deserialize_from_bytes(Late(3).serialize_to_bytes()), Late(3))

    def test_nothing_means_a_row_of_defaults(self) -> None:
        @dataclass
        class Defaults(ArrowSerializableDataclass):
            a: int = 3

        self.assertEqual(Defaults.deserialize_from_bytes(ipc_bytes(Defaults.ARROW_SCHEMA)), Defaults())
        self.assertEqual(Defaults.deserialize_from_bytes(b""), Defaults())

    def test_bytes_that_are_no_dataclass(self) -> None:
        for data in (b"x", b"\xff\xff\xff\xff", b"\0" * 100):
            with self.subTest(data=data), self.assertRaises(vgi_rpc.IPCError):
                Point.deserialize_from_bytes(data)

    def test_an_unknown_enum_name(self) -> None:
        column = pa.DictionaryArray.from_arrays(pa.array([0], pa.int16()), pa.array(["GREEN"]))
        with self.raises(TypeError, "Point.color", "Color", "GREEN"):
            Point.deserialize_from_batch(pa.RecordBatch.from_arrays([pa.array([1]), column], names=["x", "color"]))

    def test_serialize_to_a_file(self) -> None:
        sink = io.BytesIO()
        Point(5).serialize(sink)
        self.assertEqual(sink.getvalue(), Point(5).serialize_to_bytes())

    def test_a_state_that_forgot_its_decorator(self) -> None:
        class Forgot(ProducerState):
            count: int = 0

        with self.raises(TypeError, "Forgot", "count", "@dataclass"):
            Forgot().serialize_to_bytes()

    def test_a_transient_field_needs_a_default(self) -> None:
        @dataclass
        class Needs(ArrowSerializableDataclass):
            cache: Annotated[Any, Transient()]

        with self.raises(TypeError, "Needs.cache", "default"):
            Needs(1).serialize_to_bytes()


# ============================================================================
# 7. STREAM STATE
# ============================================================================


class OutputCollectorTests(TestCase):
    """The collector of one turn on its own."""

    def test_ready_made_messages_keep_their_place(self) -> None:
        out = vgi_rpc.OutputCollector(pa.schema([("value", pa.int64())]))
        ready = vgi_rpc.Message.warn("ready-made", place="2")
        out.client_log(Level.INFO, "first")
        out.emit_client_log_message(ready)
        out.client_log(Level.INFO, "third")
        self.assertEqual([message.message for message in out.messages], ["first", "ready-made", "third"])
        self.assertIs(out.messages[1], ready)

    def test_an_integer_that_no_float_holds_is_refused_each_time(self) -> None:
        schema = pa.schema([("value", pa.float64())])
        for values in ([1.5], [2], [2.5], [2**53 + 1], [2.5], [1.0, 2**53 + 1]):
            out = vgi_rpc.OutputCollector(schema)
            with self.subTest(values=values):
                if 2**53 + 1 in values:
                    with self.assertRaisesRegex(TypeError, "column 'value'.*9007199254740993"):
                        out.emit_pydict({"value": values})
                    continue
                out.emit_pydict({"value": values})
                self.assertEqual(out.data_batch.batch.to_pydict(), {"value": values})  # type: ignore[union-attr]

    def test_one_batch_a_turn(self) -> None:
        out = OutputCollector(INTEGERS)
        self.assertIsNone(out.data_batch)
        with self.raises(RuntimeError, "nothing emitted"):
            out.validate()
        out.emit_pydict({"value": [1]}, metadata={"k": "v"})
        out.validate()
        assert out.data_batch is not None
        self.assertEqual(out.data_batch.batch.to_pydict(), {"value": [1]})
        self.assertEqual(dict(out.data_batch.custom_metadata or {}), {b"k": b"v"})
        for again in (
            lambda: out.emit(values(1).batch),
            lambda: out.emit_pydict({"value": [1]}),
            lambda: out.emit_arrays([pa.array([1])]),
        ):
            with self.raises(RuntimeError, "emit called twice"):
                again()

    def test_finish(self) -> None:
        out = OutputCollector(INTEGERS)
        out.finish()
        out.validate()
        self.assertTrue(out.finished)
        with self.raises(RuntimeError, "after finish"):
            out.emit_pydict({"value": [1]})
        with self.raises(RuntimeError, "exchange"):
            OutputCollector(INTEGERS, producer_mode=False).finish()

    def test_schema(self) -> None:
        for emit, parts in (
            (lambda out: out.emit(pa.RecordBatch.from_pydict({"value": ["x"]})), ("'value'", "expected int64", "got utf8")),
            (lambda out: out.emit(pa.RecordBatch.from_pydict({"other": [1]})), ("value: int64", "other: int64")),
            (lambda out: out.emit({"value": [1]}), ("RecordBatch", "dict")),
            (lambda out: out.emit_arrays([]), ("1 columns", "0")),
            (lambda out: out.emit_pydict({"value": ["x"]}), ("'value'", "int64")),
            (lambda out: out.emit_pydict({}), ("['value']", "[]")),
        ):
            with self.subTest(parts=parts), self.raises(TypeError, *parts):
                emit(OutputCollector(INTEGERS))
        self.assertEqual(OutputCollector(INTEGERS).output_schema, INTEGERS)

    def test_statistics(self) -> None:
        counted = vgi_rpc.CallStatistics()
        counted.record_input(BATCH)
        counted.record_output(BATCH.slice(1))
        self.assertEqual((counted.input_batches, counted.input_rows, counted.input_bytes), (1, 2, BATCH.nbytes))
        self.assertEqual((counted.output_batches, counted.output_rows), (1, 1))

    def test_auth_context(self) -> None:
        self.assertFalse(AuthContext.anonymous().authenticated)
        self.assertEqual(vgi_rpc.current_auth(), AuthContext.anonymous())
        AuthContext("d", True, "me").require_authenticated()
        with self.assertRaises(vgi_rpc.StatusError) as caught:
            AuthContext.anonymous().require_authenticated()
        self.assertIs(caught.exception.error_code, vgi_rpc.Code.UNAUTHENTICATED)

    def test_states_that_define_nothing(self) -> None:
        context = CallContext(AuthContext.anonymous(), print)
        for state in (StreamState(), ProducerState(), ExchangeState()):
            with self.subTest(type(state).__name__), self.raises(TypeError, type(state).__name__):
                state.process(values(), OutputCollector(INTEGERS), context)


# ============================================================================
# 8. METHODS
# ============================================================================


class MethodTests(TestCase):
    """Protocol classes and implementations, checked at construction."""

    def test_problems_of_a_protocol_are_reported_together(self) -> None:
        class Broken(Protocol):
            def one(self, a: complex) -> int: ...
            def two(self, a) -> int: ...
            def three(self, a: int): ...
            def four(self, *args: int) -> int: ...
            def five(self) -> "NoSuchName": ...  # noqa: F821
            def six(self) -> list[Unsupported]: ...
            def fine(self) -> int: ...

        with self.raises(TypeError) as caught:
            vgi_rpc.rpc_methods(Broken)
        text = str(caught.exception)
        for part in (
            "one() parameter 'a'",
            "complex",
            "two() parameter 'a' has no annotation",
            "three() has no return annotation",
            "four()",
            "NoSuchName",
            "six() result",
            "Unsupported",
        ):
            self.assertIn(part, text)
        self.assertNotIn("fine()", text)

    def test_problems_of_an_implementation_are_reported_together(self) -> None:
        class Contract(Protocol):
            def missing(self) -> int: ...
            def not_callable(self) -> int: ...
            def renamed(self, alpha: int) -> int: ...
            def demands(self, a: int) -> int: ...
            def streams(self) -> Stream[StreamState]: ...
            def state(self) -> Stream[StreamState]: ...
            def fine(self, a: int) -> int: ...

        @dataclass
        class Unserialisable(ProducerState):
            handle: Unsupported

        class Implementation:
            not_callable = 3

            def renamed(self, alpa: int) -> int: ...  # type: ignore[empty-body]
            def demands(self, a: int, b: int) -> int: ...  # type: ignore[empty-body]
            def streams(self) -> int: ...  # type: ignore[empty-body]
            def state(self) -> Stream[Unserialisable]: ...  # type: ignore[empty-body]
            def fine(self, a: int, ctx: CallContext, optional: int = 3) -> int: ...  # type: ignore[empty-body]

        with self.raises(TypeError) as caught:
            RpcServer(Contract, Implementation())
        text = str(caught.exception)
        for part in (
            "missing() is missing",
            "not_callable is not callable",
            "renamed() takes no parameter 'alpha'",
            "did you mean 'alpa'",
            "demands() requires 'b'",
            "streams() returns int",
            "state() has a state",
            "Unserialisable.handle",
            "Unsupported",
        ):
            self.assertIn(part, text)
        self.assertNotIn("fine()", text)

    def test_a_class_instead_of_an_instance(self) -> None:
        with self.raises(TypeError, "ServiceImpl()"):
            RpcServer(Service, ServiceImpl)

    def test_a_plain_class_is_its_own_protocol(self) -> None:
        class Plain:
            def double(self, value: int) -> int:
                return 2 * value

            def _private(self) -> object:
                return self

        with vgi_rpc.serve_pipe(Plain, Plain()) as proxy:
            self.assertEqual(proxy.double(4), 8)
            self.assertEqual(list(vgi_rpc.rpc_methods(Plain)), ["double"])

    def test_what_a_method_info_says(self) -> None:
        methods = vgi_rpc.rpc_methods(Service)
        add = methods["add"]
        self.assertEqual((add.name, add.method_type, add.has_return), ("add", vgi_rpc.MethodType.UNARY, True))
        self.assertEqual((add.param_defaults, add.param_docs), ({"b": 2.0}, {"a": "The one.", "b": "The other."}))
        self.assertFalse(methods["nothing"].has_return)
        self.assertIs(methods["count_with_header"].header_type, Header)
        self.assertEqual([methods[m].is_exchange for m in ("running", "ticks", "count")], [True, False, None])
        text = vgi_rpc.describe_rpc(Service)
        for part in ("Service", "add(a: float, b: float = 2.0) -> float", "a: float64 not null", "The one.", "total: int64"):
            self.assertIn(part, text)

    def test_names_and_versions(self) -> None:
        def service(**facts: Any) -> RpcServer:
            class Named(Protocol):
                def ping(self) -> None: ...

            class Impl:
                def ping(self) -> None: ...

            for key, value in facts.items():
                setattr(Named, key, value)
            return RpcServer(Named, Impl())

        self.assertEqual(service().protocol_name, "Named")
        self.assertEqual(service(protocol_name="a.B_1").protocol_name, "a.B_1")
        for name in ("", "1a", "a-b", "ü", "a" * 256, 3):
            with self.subTest(name=name), self.assertRaises(ValueError):
                service(protocol_name=name)
        with self.raises(ValueError, "reserved"):
            service(protocol_name="vgi_rpc.Mine")
        for version in ("1", "1.2", "1.2.x", "01.2.3", "1.2.3-rc1"):
            with self.subTest(version=version), self.raises(ValueError, "MAJOR.MINOR.PATCH"):
                service(protocol_version=version)
        with self.raises(ValueError, "unique"):
            RpcServer(DocService, DocServiceImpl(), extra_protocols=[(DocService, DocServiceImpl())])

    def test_an_inherited_protocol_name_is_not_used(self) -> None:
        class Base(Protocol):
            protocol_name = "base"

        class Derived(Base, Protocol):
            def ping(self) -> None: ...

        class Impl:
            def ping(self) -> None: ...

        self.assertEqual(RpcServer(Derived, Impl()).protocol_name, "Derived")


# ============================================================================
# 9. REQUESTS AND REPLIES
# ============================================================================

ADD = vgi_rpc.rpc_methods(Service)["add"].params_schema
GOOD = request_bytes("add", {"a": 1.0, "b": 2.0})


def reshaped(*fields: Any, rows: int = 1, **metadata: Any) -> bytes:
    """A request to ``add`` with other columns: (name, type, nullable)."""
    schema = pa.schema([pa.field(n, t, nullable=nullable) for n, t, nullable in fields])
    columns = [pa.array([1] * rows, t) if t != pa.utf8() else pa.array(["1"] * rows) for _, t, _ in fields]
    return ipc_bytes(schema, (pa.RecordBatch.from_arrays(columns, schema=schema), request_metadata("add", **metadata)))


F64 = pa.float64()
NULL_ARGUMENT = ipc_bytes(
    ADD, (pa.RecordBatch.from_arrays([pa.array([None], F64), pa.array([1.0])], schema=ADD), request_metadata("add"))
)
REFUSED = {  # name: request, HTTP status, error type, code, kind, parts of the text; the connection stays usable
    "missing": (reshaped(("a", F64, False)), 400, "TypeError", "INVALID_ARGUMENT", "", ("add()", "missing 'b'")),
    "extra": (
        reshaped(("a", F64, False), ("b", F64, False), ("c", F64, False)),
        400,
        "TypeError",
        "INVALID_ARGUMENT",
        "",
        ("no parameter 'c'",),
    ),
    "renamed": (
        reshaped(("a", F64, False), ("bb", F64, False)),
        400,
        "TypeError",
        "INVALID_ARGUMENT",
        "",
        ("'bb'", "did you mean 'b'"),
    ),
    "reordered": (reshaped(("b", F64, False), ("a", F64, False)), 400, "TypeError", "INVALID_ARGUMENT", "", ("order",)),
    "twice": (reshaped(("a", F64, False), ("a", F64, False)), 400, "TypeError", "INVALID_ARGUMENT", "", ("add()",)),
    "type": (
        reshaped(("a", F64, False), ("b", pa.int64(), False)),
        400,
        "TypeError",
        "INVALID_ARGUMENT",
        "",
        ("'b'", "expected double", "got int64"),
    ),
    "nullability": (
        reshaped(("a", F64, True), ("b", F64, False)),
        400,
        "TypeError",
        "INVALID_ARGUMENT",
        "",
        ("'a'", "not null"),
    ),
    "null": (NULL_ARGUMENT, 400, "TypeError", "INVALID_ARGUMENT", "", ("parameter a", "expected float64", "got None")),
    "no row": (
        reshaped(("a", F64, False), ("b", F64, False), rows=0),
        400,
        "ProtocolError",
        "INVALID_ARGUMENT",
        "",
        ("1 row", "got 0"),
    ),
    "two rows": (
        reshaped(("a", F64, False), ("b", F64, False), rows=2),
        400,
        "ProtocolError",
        "INVALID_ARGUMENT",
        "",
        ("1 row", "got 2"),
    ),
    "no method": (
        request_bytes("add", {"a": 1.0, "b": 2.0}, named=None),
        400,
        "ProtocolError",
        "INVALID_ARGUMENT",
        "",
        ("method",),
    ),
    "method not UTF-8": (
        request_bytes("add", {"a": 1.0, "b": 2.0}, named=b"\xff\xfe"),
        400,
        "ProtocolError",
        "INVALID_ARGUMENT",
        "",
        ("UTF-8",),
    ),
    "no version": (
        request_bytes("add", {"a": 1.0, "b": 2.0}, **{"vgi_rpc.request_version": None}),
        400,
        "VersionError",
        "FAILED_PRECONDITION",
        "",
        ("wire version", "got none"),
    ),
    "another version": (
        request_bytes("add", {"a": 1.0, "b": 2.0}, **{"vgi_rpc.request_version": b"999"}),
        400,
        "VersionError",
        "FAILED_PRECONDITION",
        "",
        ("999",),
    ),
}


class RequestTests(TestCase):
    """Requests as foreign clients may write them: over pipe bytes and over HTTP, the same refusal."""

    def check(self, error: dict[str, Any], kind: str, code: str, error_kind: str, parts: Any) -> None:
        """Compare an error batch."""
        self.assertEqual((error["type"], error["code"], error["kind"]), (kind, code, error_kind), error["text"])
        for part in parts:
            self.assertIn(part, error["text"])

    def test_refused_requests_on_a_pipe(self) -> None:
        with BytePeer(make_server()) as peer:
            for name, (data, _, *expected) in REFUSED.items():
                with self.subTest(name):
                    self.check(error_of(peer.ask(data)), *expected)
                    self.assertEqual(peer.ask(GOOD)[0][0].to_pydict(), {"result": [3.0]})

    def test_refused_requests_over_http(self) -> None:
        client = wsgi_client()
        for name, (data, status, *expected) in REFUSED.items():
            with self.subTest(name):
                reply = client.post("/Service/add", data)
                self.assertEqual(reply.status, status)
                self.check(reply.error, *expected)
        self.assertEqual(read_stream(io.BytesIO(client.post("/Service/add", GOOD).body))[0][0].to_pydict(), {"result": [3.0]})

    def test_hostile_bytes_on_a_pipe(self) -> None:
        for name, (data, part) in HOSTILE.items():
            with self.subTest(name), BytePeer(make_server()) as peer:
                error = error_of(peer.ask(data + b"\0" * 8))
                self.assertIn(part, error["text"])
                self.assertEqual(error["code"], "INVALID_ARGUMENT")

    def test_well_framed_hostile_bytes_leave_the_pipe_usable(self) -> None:
        for name in ("schema and no batch", "two batches"):
            with self.subTest(name), BytePeer(make_server()) as peer:
                error_of(peer.ask(HOSTILE[name][0]))
                self.assertEqual(peer.ask(GOOD)[0][0].to_pydict(), {"result": [3.0]})

    def test_hostile_bytes_over_http(self) -> None:
        client = wsgi_client()
        for name, (data, part) in {
            **HOSTILE,
            "empty": (b"", "empty"),
            "trailing bytes": (GOOD + b"x", "1 bytes after"),
        }.items():
            with self.subTest(name):
                reply = client.post("/Service/add", data)
                self.assertEqual(reply.status, 400)
                self.assertIn(part, reply.error["text"])
                self.assertEqual(client.post("/Service/add", GOOD).status, 200)

    def test_every_prefix_of_a_request_over_http(self) -> None:
        client = wsgi_client()
        for end in range(len(GOOD)):
            with self.subTest(end=end):
                self.assertEqual(client.post("/Service/add", GOOD[:end]).status, 400)

    def test_every_prefix_of_a_request_on_a_pipe(self) -> None:
        server = make_server()
        for end in range(0, len(GOOD), 13):
            with self.subTest(end=end), BytePeer(server) as peer:
                peer.input.write(GOOD[:end])
                answer = peer.hang_up()
                self.assertEqual(bool(answer), bool(end))
                if end:
                    error = error_of(read_streams(answer)[0])
                    self.assertEqual((error["type"], error["code"]), ("IPCError", "INVALID_ARGUMENT"))

    def test_a_request_in_single_bytes(self) -> None:
        with BytePeer(make_server()) as peer:
            for byte in GOOD[:-1]:
                peer.input.write(bytes([byte]))
            self.assertEqual(peer.ask(GOOD[-1:])[0][0].to_pydict(), {"result": [3.0]})

    def test_a_compressed_bomb_is_refused_over_http(self) -> None:
        bomb = _compressed_bomb()
        self.assertLess(len(bomb), 1_000_000)
        reply = wsgi_client(max_request_bytes=1_000_000).post("/Service/add", bomb)
        self.assertEqual(reply.status, 413)
        self.assertEqual(reply.headers["vgi-max-request-bytes"], "1000000")

    def test_values_are_validated_before_dispatch(self) -> None:
        schema = vgi_rpc.rpc_methods(Service)["echo_str"].params_schema
        column = pa.Array.from_buffers(pa.utf8(), 1, [None, pa.py_buffer(struct.pack("<2i", 0, 2)), pa.py_buffer(b"\xff\xfe")])
        data = ipc_bytes(schema, (pa.RecordBatch.from_arrays([column], schema=schema), request_metadata("echo_str")))
        reply = wsgi_client().post("/Service/echo_str", data)
        self.assertEqual((reply.status, reply.error["type"]), (400, "IPCError"))

    def test_a_request_without_parameters_may_have_rows(self) -> None:
        empty = pa.RecordBatch.from_arrays([], schema=pa.schema([]))
        one_row = pa.RecordBatch.from_struct_array(pa.array([{}], pa.struct([])))
        for batch in (empty, one_row):
            data = ipc_bytes(batch.schema, (batch, request_metadata("nothing")))
            with self.subTest(rows=batch.num_rows), BytePeer(make_server()) as peer:
                [(answer, metadata)] = peer.ask(data)
                self.assertEqual((answer.num_rows, answer.num_columns, metadata), (0, 0, {}))

    def test_request_ids(self) -> None:
        with BytePeer(make_server()) as peer:
            for sent, echoed in (
                (b"0123456789abcdef", True),
                (b"x" * 128, True),
                (b"x" * 129, False),
                (b"a b", False),
                (b"\xff", False),
            ):
                data = request_bytes("fail", {"how": "TypeError"}, **{"vgi_rpc.request_id": sent})
                [(_, metadata)] = peer.ask(data)
                with self.subTest(sent=sent):
                    self.assertEqual(metadata[b"vgi_rpc.request_id"] == sent, echoed)
                    self.assertTrue(metadata[b"vgi_rpc.request_id"])


# ============================================================================
# 10. INTROSPECTION
# ============================================================================


class IntrospectionTests(TestCase):
    """Reflection, and the protocol hash, which the family computes alike."""

    def test_the_hash_depends_on_the_signatures_alone(self) -> None:
        def service(annotation: Any, doc: str = "", name: str = "P") -> str:
            def method(self, value):
                return value

            method.__annotations__, method.__doc__ = {"value": annotation, "return": annotation}, doc
            cls = type(name, (), {"method": method, "__module__": __name__})
            return RpcServer(cls, cls()).protocol_hash

        self.assertRegex(service(int), "^[0-9a-f]{64}$")
        self.assertEqual(service(int), service(UserId, doc="other words"))
        self.assertEqual(len({service(t) for t in (int, str, int | None, list[int], list[str])}), 5)
        self.assertNotEqual(service(int), service(int, name="Q"))

    def test_the_hash_of_a_known_protocol(self) -> None:
        import hashlib

        class Known(Protocol):
            def add(self, a: int, b: float | None) -> list[int]: ...

        class Impl:
            def add(self, a: int, b: float | None) -> list[int]: ...  # type: ignore[empty-body]

        spelt = (
            '{"methods":[{"has_header":false,"has_return":true,"name":"add","params":[{"name":"a","nullable":false,"type":"int64"},'
            '{"name":"b","nullable":true,"type":"float64"}],"result":[{"name":"result","nullable":false,"type":"list<item?:int64>"}],'
            '"type":"unary"}],"protocol":"Known"}'
        )
        expected = hashlib.sha256(b"vgi_rpc.protocol_hash.v1|" + spelt.encode()).hexdigest()
        self.assertEqual(RpcServer(Known, Impl()).protocol_hash, expected)

    def test_marks(self) -> None:
        class Marked(Protocol):
            @vgi_rpc.idempotent
            def put(self) -> None: ...

            @vgi_rpc.no_side_effects
            def get(self) -> None: ...

            @vgi_rpc.deprecated("use get")
            def old(self) -> None: ...

        class Impl:
            def put(self) -> None: ...
            def get(self) -> None: ...
            def old(self) -> None: ...

        with vgi_rpc.serve_pipe(Marked, Impl()) as proxy:
            methods = vgi_rpc.introspect(proxy).methods
        self.assertEqual([methods[m].idempotency for m in ("put", "get", "old")], ["idempotent", "no_side_effects", "unknown"])
        self.assertEqual([methods[m].deprecation for m in ("get", "old")], [None, "use get"])

    def test_limits(self) -> None:
        """A server of any transport tells all of its caps, also those that nobody configured."""
        everywhere = {"max_columns": (4096, "columns"), "max_nesting": (64, "levels"), "free_rows": (1 << 24, "rows, or 8 for each byte of the batch")}
        bytes_ = {**everywhere, "max_request_bytes": (None, "bytes"), "max_rows": (None, "rows")}
        http = {**everywhere, "max_request_bytes": (256 << 20, "bytes"), "max_response_bytes": (None, "bytes"), "token_ttl": (3600, "seconds")}
        served = {"max_connections": (512, "connections"), "request_deadline": (300, "seconds"), "max_head_bytes": (131_072, "bytes")}
        own, never_told = {"max_request_bytes": 1000, "max_rows": 10}, set(vgi_rpc._LIMITS)
        shown = {k: (v, k.rpartition("_")[2]) for k, v in own.items()}
        _, tcp, _ = in_thread(vgi_rpc.serve_tcp, make_server(**own), threaded=True, max_connections=7, idle_timeout=60.0)
        _, web, _ = in_thread(vgi_rpc.serve_http, make_server(), token_key=KEY)
        connect = functools.partial(vgi_rpc.http_connect, Service)
        with tempfile.TemporaryDirectory() as folder:
            path, _ = in_thread(vgi_rpc.serve_unix, make_server(), os.path.join(folder, "s"), threaded=True)
            for name, proxy, expected in (
                ("pipe", vgi_rpc.serve_pipe(Service, ServiceImpl()), {**bytes_, "free_decoded_bytes": (1 << 30, "bytes, or 1,024 times the compressed ones")}),
                ("worker", vgi_rpc.connect(Service, WORKER), {**bytes_, "drain_grace_seconds": (30, "seconds")}),
                ("unix", vgi_rpc.unix_connect(Service, path), {**bytes_, "max_connections": (None, "connections"), "idle_timeout": (None, "seconds")}),
                ("tcp", vgi_rpc.tcp_connect(Service, "127.0.0.1", tcp), {**bytes_, **shown, "max_decoded_bytes": (1000, "bytes"), "max_connections": (7, "connections"), "idle_timeout": (60, "seconds")}),
                ("http", connect(f"http://127.0.0.1:{web}"), {**http, **served}),
                ("wsgi", connect(client=wsgi_client()), {**http, "max_json_request_bytes": (16 << 20, "bytes")}),
                ("wsgi with options", connect(client=wsgi_client(token_ttl=0, **own)), {**http, **shown, "token_ttl": (None, "seconds")}),
            ):
                with self.subTest(name), proxy as p:
                    told = vgi_rpc.introspect(p).limits
                    self.assertEqual({k: v for k, v in told.items() if k in expected}, expected)
                    self.assertEqual("max_connections" in told, name in ("unix", "tcp", "http"))
                    self.assertEqual("token_ttl" in told, name.startswith(("http", "wsgi")))
                    self.assertEqual(vgi_rpc.describe_protocol(p, "vgi_rpc.Reflection.v1").limits, told)
                    never_told -= told.keys()
        self.assertEqual(never_told, {"tls_handshake_timeout"})

    def test_limits_that_are_none(self) -> None:
        """What a strange server tells is passed over, and a limit is text that people read."""
        service = make_server().primary
        strange: Any = {"good": [1, "rows"], "open": [None, "bytes"], "zero": [0, "tokens"], "a": 3, "b": [1], "c": ["1", "rows"], "d": [True, "rows"], "e": []}
        told = vgi_rpc._limits_told(vgi_rpc.describe_service(service, strange))
        self.assertEqual(told, {"good": (1, "rows"), "open": (None, "bytes"), "zero": (0, "tokens")})
        self.assertEqual(list(map(str, [*told.values(), vgi_rpc.Limit(10**6, "bytes"), vgi_rpc.Limit(2.5, "seconds")])), ["1 rows", "none", "0 tokens", "1,000,000 bytes", "2.5 seconds"])
        with mock.patch.object(vgi_rpc, "LIMITS_KEY", b"unknown"):
            told_by_another = vgi_rpc.describe_service(service, strange)
        self.assertEqual(vgi_rpc._limits_told(told_by_another), {})

    def test_it_can_be_switched_off(self) -> None:
        client = vgi_rpc.make_sync_client(make_server(enable_describe=False))
        with vgi_rpc.http_connect(Service, client=client) as proxy:
            self.assertEqual(proxy.add(1.0), 3.0)
            with self.assertRaises(RpcError) as caught:
                vgi_rpc.introspect(proxy)
        self.assertEqual(caught.exception.error_kind, "protocol_not_supported")


# ============================================================================
# 11. TOKENS
# ============================================================================


class Clock:
    """A clock that tests turn."""

    now = 1_700_000_000.0

    def __call__(self) -> float:
        return self.now


class SealTests(TestCase):
    """The sealer alone: what was sealed for one binding opens for it, everything else is one uniform refusal."""

    BINDING = (b"protocol", b"method", b"domain", b"principal")

    def refused(self, sealer: Any, token: Any, half: bytes = b"state", binding: Any = BINDING) -> str:
        """Return the text of the refusal."""
        with self.assertRaises(vgi_rpc.TokenError) as caught:
            sealer.open(half, binding, token)
        return str(caught.exception)

    def test_contents_come_back(self) -> None:
        sealer = vgi_rpc.TokenSealer([KEY])
        for content in (b"", b"\0", b"x" * 1_000_000, os.urandom(5000)):
            with self.subTest(size=len(content)):
                token = sealer.seal(b"state", self.BINDING, content)
                self.assertEqual(sealer.open(b"state", self.BINDING, token), content)
                self.assertLess(len(token), len(content) * 4 // 3 + 100)
        self.assertLess(len(sealer.seal(b"state", self.BINDING, b"x" * 1_000_000)), 10_000)

    def test_every_damage_has_the_same_answer(self) -> None:
        sealer = vgi_rpc.TokenSealer([KEY])
        token = sealer.seal(b"state", self.BINDING, b"content of the state")
        raw = base64.b64decode(token)
        broken: list[Any] = [None, b"", b"not base64!", token + b"\n", token.rstrip(b"=")[:-1], token + token, raw]
        broken += [
            base64.b64encode(raw[:at] + bytes([raw[at] ^ (1 << bit)]) + raw[at + 1 :])
            for at in range(len(raw))
            for bit in range(8)
        ]
        broken += [token[:end] for end in range(len(token))] + [base64.b64encode(raw[:end]) for end in range(len(raw))]
        broken += [base64.b64encode(raw + b"\0"), base64.b64encode(b"\0" + raw)]
        broken += [
            token[:at] + bytes([token[at] ^ (1 << bit)]) + token[at + 1 :] for at in range(len(token)) for bit in range(8)
        ]
        self.assertEqual(len({self.refused(sealer, t) for t in broken}), 1)
        self.assertEqual(sealer.open(b"state", self.BINDING, token), b"content of the state")

    def test_the_url_safe_alphabet_is_not_ours(self) -> None:
        sealer = vgi_rpc.TokenSealer([KEY])
        token = next(t for t in (sealer.seal(b"s", (), os.urandom(200)) for _ in range(50)) if b"+" in t or b"/" in t)
        self.refused(sealer, token.translate(bytes.maketrans(b"+/", b"-_")), b"s", ())

    def test_binding(self) -> None:
        sealer = vgi_rpc.TokenSealer([KEY])
        token = sealer.seal(b"state", self.BINDING, b"content")
        texts = {self.refused(sealer, token, half=b"call")}
        for at, _ in enumerate(self.BINDING):
            changed = list(self.BINDING)
            changed[at] += b"2"
            texts.add(self.refused(sealer, token, binding=changed))
        for shifted in ((b"protocolm", b"ethod", *self.BINDING[2:]), self.BINDING[:3], (*self.BINDING, b"")):
            texts.add(self.refused(sealer, token, binding=shifted))
        self.assertEqual(len(texts), 1)

    def test_rotation(self) -> None:
        old, new = b"old" * 8, b"new" * 8
        token = vgi_rpc.TokenSealer([old]).seal(b"s", (), b"content")
        both = vgi_rpc.TokenSealer([new, old])
        self.assertEqual(both.open(b"s", (), token), b"content")
        self.refused(vgi_rpc.TokenSealer([new]), token, b"s", ())
        self.assertEqual(vgi_rpc.TokenSealer([new]).open(b"s", (), both.seal(b"s", (), b"content")), b"content")

    def test_keys_that_are_none(self) -> None:
        for keys in ([], [b"short"], [KEY, b""]):
            with self.subTest(keys=keys), self.raises(ValueError, "16 bytes"):
                vgi_rpc.TokenSealer(keys)

    def test_age(self) -> None:
        clock = Clock()
        sealer = vgi_rpc.TokenSealer([KEY], ttl=100.0, clock=clock)
        for_ever = vgi_rpc.TokenSealer([KEY], ttl=0, clock=clock)
        token = sealer.seal(b"s", (), b"content")
        clock.now += 99
        self.assertEqual(sealer.open(b"s", (), token), b"content")
        clock.now += 2
        self.assertIn("expired", self.refused(sealer, token, b"s", ()))
        self.assertNotIn("expired", self.refused(sealer, token, b"other", ()))
        self.assertEqual(sealer.open(b"s", (), token, aged=False), b"content")
        self.assertEqual(for_ever.open(b"s", (), token), b"content")
        clock.now -= 10_000
        self.assertIn("future", self.refused(sealer, token, b"s", ()))
        self.assertIn("future", self.refused(for_ever, token, b"s", ()))


class RawStream:
    """A stream over HTTP with the tokens in hand."""

    def __init__(
        self, client: Any, method: str = "running", data: Any = None, protocol: str = "Service", **headers: str
    ) -> None:
        self.client, self.path, self.headers = client, f"/{protocol}/{method}", headers
        body = request_bytes(method, data if data is not None else {"label": "r"}, protocol=protocol)
        reply = client.post(f"{self.path}/init", body, **headers)
        assert reply.status == 200, reply
        self.items = read_streams(reply.body)[-1]
        self.tokens = self.items[-1][1] if self.items else {}

    def exchange(self, batch: Any = None, path: str | None = None, tokens: Any = None, **headers: str) -> Reply:
        """One turn with these or other tokens."""
        batch = batch if batch is not None else values(1.0).batch
        body = ipc_bytes(batch.schema, (batch, self.tokens if tokens is None else tokens))
        return self.client.post(f"{path or self.path}/exchange", body, **{**self.headers, **headers})


STATE, CALL = b"vgi_rpc.stream_state#b64", b"vgi_rpc.call_state#b64"


class HttpTokenTests(TestCase):
    """Tokens in requests."""

    def refused(self, reply: Reply) -> str:
        """Return the text of a refusal."""
        self.assertEqual((reply.status, reply.error["type"]), (400, "TokenError"), reply)
        return str(reply.error["text"])

    def test_damaged_tokens(self) -> None:
        client = wsgi_client()
        stream = RawStream(client)
        texts = set()
        for key in (STATE, CALL):
            token = stream.tokens[key]
            for at in range(0, len(token), 3):
                flipped = token[:at] + (b"A" if token[at : at + 1] != b"A" else b"B") + token[at + 1 :]
                texts.add(self.refused(stream.exchange(tokens={**stream.tokens, key: flipped})))
                texts.add(self.refused(stream.exchange(tokens={**stream.tokens, key: token[:at]})))
            texts.add(self.refused(stream.exchange(tokens={k: v for k, v in stream.tokens.items() if k != key})))
            texts.add(self.refused(stream.exchange(tokens={**stream.tokens, key: b"\xff" * 20})))
        texts.add(self.refused(stream.exchange(tokens={STATE: stream.tokens[CALL], CALL: stream.tokens[STATE]})))
        texts.add(self.refused(stream.exchange(tokens={STATE: stream.tokens[CALL], CALL: stream.tokens[CALL]})))
        texts.add(self.refused(stream.exchange(tokens={STATE: stream.tokens[STATE], CALL: stream.tokens[STATE]})))
        self.assertEqual(len(texts), 1)
        self.assertEqual(stream.exchange().status, 200)

    def test_tokens_of_another_stream_method_or_protocol(self) -> None:
        client = wsgi_client()
        one, two = RawStream(client), RawStream(client)
        header = RawStream(client, "running_with_header")
        stats = RawStream(client, "nested", {})
        self.refused(one.exchange(tokens={STATE: one.tokens[STATE], CALL: two.tokens[CALL]}))
        self.refused(one.exchange(tokens={STATE: two.tokens[STATE], CALL: one.tokens[CALL]}))
        self.refused(one.exchange(tokens=header.tokens))
        self.refused(one.exchange(path="/Service/running_with_header"))
        self.refused(one.exchange(tokens=stats.tokens))
        self.refused(one.exchange(path="/DocService/stats"))
        for stream in (one, two, header):
            self.assertEqual(stream.exchange().status, 200)

    def test_tokens_of_another_principal(self) -> None:
        people = {name: AuthContext("static", True, name) for name in ("ada", "bob")}
        client = wsgi_client(
            authenticate=vgi_rpc.chain_authenticate(
                vgi_rpc.bearer_authenticate_static(tokens=people), lambda request: AuthContext.anonymous()
            )
        )
        ada = RawStream(client, authorization="Bearer ada")
        self.refused(ada.exchange(authorization="Bearer bob"))
        self.refused(ada.exchange(authorization=""))
        anonymous = RawStream(client)
        self.refused(anonymous.exchange(authorization="Bearer ada"))
        self.assertEqual(ada.exchange().status, 200)
        self.assertEqual(anonymous.exchange().status, 200)

    def test_a_state_that_is_still_here_ages_too(self) -> None:
        app = vgi_rpc.make_wsgi_app(make_server(), token_key=KEY)
        sealer, client = app.app.sealer, WsgiClient(app)
        for seconds, text in ((3_000, ""), (4_000, "expired"), (-4_000, "future")):
            with self.subTest(seconds=seconds):
                sealer.clock = time.time
                stream = RawStream(client)  # another one each time: a state is taken once
                self.assertTrue(app.app._live)
                sealer.clock = lambda ahead=seconds: time.time() + ahead
                if text:
                    self.assertIn(text, self.refused(stream.exchange()))
                else:
                    self.assertEqual(stream.exchange().status, 200)

    def test_another_server_needs_the_same_key(self) -> None:
        stream = RawStream(wsgi_client(token_key=KEY))
        for key, good in (
            (KEY, True),
            (b"another" * 4, False),
            ([b"new" * 8, KEY], True),
            (f"{'n' * 20},{KEY.decode()}", True),
        ):
            stream.client = wsgi_client(token_key=key)
            with self.subTest(key=key):
                self.assertEqual(stream.exchange().status == 200, good)

    def test_expiry(self) -> None:
        stream = RawStream(wsgi_client())
        for seconds, ttl, text in ((59, 60, ""), (62, 60, "expired"), (62, 0, ""), (-1000, 60, "future")):
            reply = moved(stream, seconds, token_ttl=ttl).exchange()
            with self.subTest(seconds=seconds, ttl=ttl):
                if text:
                    self.assertIn(text, self.refused(reply))
                else:
                    self.assertEqual(reply.status, 200)

    def test_a_long_stream_outlives_the_age_of_its_call_half(self) -> None:
        stream = RawStream(wsgi_client())
        for turn in range(1, 6):
            reply = moved(stream, 50 * turn, token_ttl=60).exchange()
            self.assertEqual(reply.status, 200)
            stream.tokens = {**stream.tokens, STATE: read_streams(reply.body)[-1][-1][1][STATE]}

    def test_a_token_of_another_version_of_the_service(self) -> None:
        """Fields may come with a default, and go; a state that no longer fits is a refused token, not a method that failed."""

        def client_of(fields: Any, fixed: Any = int, late: Any = None) -> WsgiClient:
            def exchange(self: Any, input: AnnotatedBatch, out: OutputCollector, ctx: CallContext) -> None:
                out.emit_pydict({"value": [1.0]})

            def rehydrate(self: Any, implementation: Any) -> None:
                if late is not None:
                    raise late

            kind = fixed and dataclasses.make_dataclass("Fixed", [("scale", fixed)], bases=(ArrowSerializableDataclass,))
            members = {"exchange": exchange, "rehydrate": rehydrate, "CALL_STATE_TYPE": kind}
            state = dataclasses.make_dataclass("State", fields, bases=(ExchangeState,), namespace=members)

            def go(self: Any) -> Any:
                return Stream(VALUE, state(1, 2), input_schema=VALUE, call_state=kind(3))

            go.__annotations__["return"] = Stream[state]
            service = type("Service", (), {"nested": go})
            return wsgi_client(RpcServer(service, service()))

        same = [("total", int), ("step", int)]
        versions: dict[str, tuple[tuple[Any, ...], str]] = {
            "the same": ((same,), ""),
            "a field fewer": ((same[:1],), ""),
            "a field more": (([*same, ("more", int, field(default=0))],), ""),
            "a field more, without a default": (([*same, ("more", int)],), "TokenError"),
            "a field of another type": (([("total", str), ("step", int)],), "TokenError"),
            "another call state": ((same, list[str]), "TokenError"),
            "no call state": ((same, None), "TokenError"),
            "the same, but its rehydrate() raises": ((same, int, ValueError("late")), "ValueError"),
        }
        stream = RawStream(client_of(same), "nested", {})
        for name, (version, error) in versions.items():
            stream.client = client_of(*version)
            with self.subTest(name):
                reply = stream.exchange()
                if error == "TokenError":
                    self.assertIn("not issued by this service", self.refused(reply))
                else:
                    self.assertEqual((reply.status, reply.error["type"] if b"EXCEPTION" in reply.body else ""), (200, error))

    def test_an_old_cursor_is_an_old_state(self) -> None:
        stream = RawStream(wsgi_client())
        sums = [read_streams(stream.exchange(values(n).batch).body)[-1][-1][0].to_pydict()["sum"] for n in (1.0, 5.0)]
        self.assertEqual(sums, [[1.0], [5.0]])

    def test_the_call_half_is_not_sent_again(self) -> None:
        stream = RawStream(wsgi_client())
        metadata = read_streams(stream.exchange().body)[-1][-1][1]
        self.assertEqual(set(metadata), {STATE})

    def test_no_key_is_said_aloud_once(self) -> None:
        with mock.patch.dict(os.environ), self.assertLogs("vgi_rpc", "WARNING") as seen:
            os.environ.pop("VGI_RPC_TOKEN_KEY", None)
            client = WsgiClient(vgi_rpc.make_wsgi_app(make_server()))
            self.assertEqual(RawStream(client).exchange().status, 200)
        self.assertEqual(len(seen.output), 1)
        self.assertIn("VGI_RPC_TOKEN_KEY", seen.output[0])

    def test_the_key_of_the_environment(self) -> None:
        with mock.patch.dict(os.environ, {"VGI_RPC_TOKEN_KEY": KEY.decode()}):
            stream = RawStream(WsgiClient(vgi_rpc.make_wsgi_app(make_server())))
        stream.client = wsgi_client(token_key=KEY)
        self.assertEqual(stream.exchange().status, 200)

    def test_a_state_that_cannot_be_sealed_is_an_error_at_the_turn(self) -> None:
        with vgi_rpc.http_connect(Service, client=wsgi_client()) as proxy:
            with self.raises(RpcError, "Misbehaving.at", "expected int64", "got str"):
                list(proxy.misbehaving("state"))
            self.assertEqual(proxy.add(1.0), 3.0)


    def test_a_state_that_is_still_here_is_what_its_cursor_says(self) -> None:
        client = vgi_rpc.make_sync_client(RpcServer(Kept, KeptImpl()))
        with vgi_rpc.http_connect(Kept, client=client) as proxy:
            answers = []
            for forgets in (False, True):
                session, seen = proxy.narrow(), []
                for _ in range(3):
                    if forgets:
                        client.app._live.clear()
                    seen.append(session.exchange(values(0.1)).batch.to_pydict())
                answers.append(seen)
            self.assertEqual(*answers)
            client.app._live.clear()
            proxy.padded(size=1_000)
            self.assertEqual(len(client.app._live), 1)
            proxy.padded(size=2_000_000)  # a cursor of a few hundred bytes
            self.assertEqual(len(client.app._live), 1)


@dataclass
class Narrow(ExchangeState):
    """A sum that is rounded where it is written."""

    total: Annotated[float, vgi_rpc.ArrowType(pa.float32())] = 0.0

    def exchange(self, input: AnnotatedBatch, out: OutputCollector, ctx: CallContext) -> None:
        self.total += input.batch.column(0)[0].as_py()
        out.emit_pydict({"value": [self.total]})


@dataclass
class Padded(ExchangeState):
    """A state that packs well."""

    padding: bytes

    def exchange(self, input: AnnotatedBatch, out: OutputCollector, ctx: CallContext) -> None:
        out.emit(input.batch)


class Kept(Protocol):
    """Streams whose states are kept, or not."""

    def narrow(self) -> Stream[ExchangeState]: ...
    def padded(self, size: int) -> Stream[ExchangeState]: ...


class KeptImpl:
    """Its implementation."""

    def narrow(self) -> Stream[Narrow]:
        return Stream(VALUE, Narrow(), input_schema=VALUE)

    def padded(self, size: int) -> Stream[Padded]:
        return Stream(VALUE, Padded(bytes(size)), input_schema=VALUE)


def moved(stream: RawStream, seconds: float, **options: Any) -> RawStream:
    """The same stream at a fresh server, which has opened none of its tokens yet and lives *seconds* later."""
    there = RawStream.__new__(RawStream)
    late = functools.partial(vgi_rpc.TokenSealer, clock=lambda: time.time() + seconds)
    with mock.patch.object(vgi_rpc, "TokenSealer", late):
        vars(there).update(vars(stream), client=wsgi_client(**options))
    return there


# ============================================================================
# 12. SERVER CORE
# ============================================================================


class Stranger(Protocol):
    """A client's idea of `Service` that does not agree with it."""

    protocol_name = "Service"

    def ad(self) -> None: ...

    def process_id(self) -> str: ...


class Elsewhere(Protocol):
    """A protocol that no server hosts."""

    protocol_name = "Servise"

    def add(self, a: float, b: float) -> float: ...


class Recorder:
    """A dispatch hook that keeps everything; *fails* makes it raise as well."""

    def __init__(self, fails: bool = False) -> None:
        self.fails, self.records, self.errors, self.tokens = fails, [], [], []

    def on_dispatch_start(self, record: Any) -> int:
        if self.fails:
            raise RuntimeError("a hook's own failure")
        return len(self.records)

    def on_dispatch_end(self, token: Any, record: Any, error: Any) -> None:
        if self.fails:
            raise RuntimeError("a hook's own failure")
        self.tokens.append(token)
        self.records.append(record)
        self.errors.append(error)


class ServerTests(TestCase):
    """Routing, versions, hooks and the access log; on a pipe or without a socket."""

    def sync(self, protocol: Any, server: RpcServer | None = None, **options: Any) -> Any:
        """A connection to a server in this process."""
        return vgi_rpc.http_connect(protocol, client=vgi_rpc.make_sync_client(server or make_server(), **options))

    def test_unknown_method(self) -> None:
        with self.sync(Stranger) as proxy, self.raises(RpcError, "'ad'", "did you mean 'add'", "'echo_int'") as caught:
            proxy.ad()
        error = caught.exception
        self.assertEqual((error.error_type, error.error_kind), ("MethodNotImplementedError", "method_not_implemented"))
        self.assertEqual(error.error_code, "UNIMPLEMENTED")

    def test_unknown_protocol(self) -> None:
        with self.sync(Elsewhere) as proxy, self.raises(RpcError, "did you mean 'Service'", "DocService") as caught:
            proxy.add(1.0, 2.0)
        self.assertEqual(
            (caught.exception.error_kind, caught.exception.error_code), ("protocol_not_supported", "UNIMPLEMENTED")
        )

    def test_routing_on_a_pipe(self) -> None:
        data = {"a": 1.0, "b": 2.0}
        with BytePeer(make_server()) as peer:
            for changes, kind, code, part in (
                ({"protocol": None}, "protocol_not_specified", "INVALID_ARGUMENT", "Service"),
                ({"protocol": "Nobody"}, "protocol_not_supported", "UNIMPLEMENTED", "'Nobody'"),
                ({"named": "nobody"}, "method_not_implemented", "UNIMPLEMENTED", "'nobody'"),
                ({"protocol": "DocService"}, "method_not_implemented", "UNIMPLEMENTED", "DocService has no method 'add'"),
            ):
                with self.subTest(changes=changes):
                    error = error_of(peer.ask(request_bytes("add", data, **changes)))
                    self.assertEqual((error["kind"], error["code"]), (kind, code))
                    self.assertIn(part, error["text"])
            error = error_of(peer.ask(request_bytes("add", data, protocol="no/../name")))
            self.assertEqual(error["kind"], "protocol_not_supported")
            self.assertNotIn("no/../name", error["text"])
            self.assertEqual(peer.ask(GOOD)[0][0].to_pydict(), {"result": [3.0]})

    def test_the_handshake_offers_no_shared_memory(self) -> None:
        empty = pa.RecordBatch.from_arrays([], schema=pa.schema([]))
        asked = request_metadata("__transport_options__", None, **{"vgi_rpc.transport.shm": b"true"})
        with BytePeer(make_server(server_id="0123456789ab")) as peer:
            [(batch, metadata)] = peer.ask(ipc_bytes(empty.schema, (empty, asked)))
            self.assertEqual(batch.num_rows, 0)
            self.assertEqual(metadata[b"vgi_rpc.transport.shm"], b"false")
            self.assertEqual(metadata[b"vgi_rpc.server_id"], b"0123456789ab")
            self.assertEqual(metadata[b"vgi_rpc.request_version"], b"1")

    def test_protocol_versions(self) -> None:
        class Impl:
            def ping(self) -> str:
                return "pong"

        def protocol(version: str) -> Any:
            class Ping(Protocol):
                def ping(self) -> str: ...

            if version:
                Ping.protocol_version = version  # type: ignore[attr-defined]
            return Ping

        for ours, theirs, side in (
            ("1.2.3", "1.2.9", None),
            ("1.2.3", "1.3.0", "upgrade the server"),
            ("1.2.3", "2.0.0", "upgrade the server"),
            ("1.2.3", "1.1.0", "upgrade the client"),
            ("1.2.3", "", "upgrade the client"),
            ("1.2.3", "one", "upgrade the client"),
            ("", "7.0.0", None),
        ):
            client = vgi_rpc.make_sync_client(RpcServer(protocol(ours), Impl()))
            with self.subTest(ours=ours, theirs=theirs), vgi_rpc.http_connect(protocol(theirs), client=client) as proxy:
                if side is None:
                    self.assertEqual(proxy.ping(), "pong")
                    continue
                with self.raises(RpcError, "Ping", ours, theirs, side) as caught:
                    proxy.ping()
                error = caught.exception
                self.assertEqual((error.error_kind, error.error_code), ("protocol_version_mismatch", "FAILED_PRECONDITION"))
                [violation] = error.precondition_failure().violations
                self.assertEqual((violation.type, violation.subject), ("protocol_version", "Ping"))

    def test_tracebacks_can_be_left_out(self) -> None:
        for show in (True, False):
            with self.subTest(show=show), self.sync(Service, make_server(include_tracebacks=show)) as proxy:
                with self.assertRaises(RpcError) as caught:
                    proxy.fail("TypeError")
                self.assertIs("test_vgi_rpc" in caught.exception.remote_traceback, show)
                self.assertEqual(caught.exception.error_type, "TypeError")

    def test_details_that_are_too_large_are_left_out_whole(self) -> None:
        class Verbose:
            def run(self, size: int) -> None:
                raise vgi_rpc.StatusError("x", code="ABORTED", details=[vgi_rpc.ErrorInfo({"k": "v" * size})])

        with vgi_rpc.serve_pipe(Verbose, Verbose()) as proxy:
            for size, kept in ((3000, 1), (5000, 0)):
                with self.subTest(size=size), self.assertRaises(RpcError) as caught:
                    proxy.run(size)
                self.assertEqual((caught.exception.error_code, len(caught.exception.error_details)), ("ABORTED", kept))

    def test_hooks(self) -> None:
        server, recorder = make_server(), Recorder()
        server.add_hook(Recorder(fails=True))
        server.add_hook(recorder)
        with self.sync(Service, server) as proxy, self.assertLogs("vgi_rpc", "ERROR") as seen:
            proxy.add(1.0)
            with self.assertRaises(RpcError):
                proxy.fail("KeyError")
            list(proxy.count(2))
        self.assertIn("a hook's own failure", "".join(seen.output))
        methods = [(r.method, r.method_type, bool(e)) for r, e in zip(recorder.records, recorder.errors, strict=True)]
        self.assertEqual(methods[:2], [("add", "unary", False), ("fail", "unary", True)])
        self.assertEqual(set(methods[2:]), {("count", "stream", False)})
        self.assertEqual(len({r.stream_id for r in recorder.records[2:]}), 1)
        self.assertTrue(all(r.duration_ms >= 0 and r.kind is vgi_rpc.TransportKind.HTTP for r in recorder.records))
        self.assertEqual(sum(r.statistics.output_rows for r in recorder.records[2:]), 2)

    def test_access_log(self) -> None:
        server, written = make_server(), io.StringIO()
        with contextlib.redirect_stderr(written):
            vgi_rpc.configure_access_log("-", server)
        with self.sync(Service, server) as proxy:
            proxy.echo_str("a secret value")
            with self.assertRaises(RpcError):
                proxy.fail("TypeError")
            session = proxy.running("secret label")
            session.exchange(values(1.0))
            session.cancel()
        text = written.getvalue()
        self.assertNotIn("secret", text)
        lines = [json.loads(line) for line in text.splitlines()]
        self.assertEqual([line["method"] for line in lines], ["echo_str", "fail", "running", "running", "running"])
        self.assertEqual([line["status"] for line in lines], ["ok", "error", "ok", "ok", "ok"])
        first, failed = lines[0], lines[1]
        self.assertRegex(first["timestamp"], r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z$")
        self.assertEqual((first["logger"], first["protocol"], first["http_status"]), ("vgi_rpc.access", "Service", 200))
        self.assertEqual((first["request_fields"], first["request_rows"]), ([{"name": "value", "type": "string"}], 1))
        self.assertEqual((failed["error_type"], failed["error_code"]), ("TypeError", "UNKNOWN"))
        self.assertEqual(len({line["stream_id"] for line in lines[2:]}), 1)
        self.assertTrue(lines[-1]["cancelled"])

    def test_on_serve_start_is_called_once_and_again_after_a_failure(self) -> None:
        class Starting:
            def __init__(self) -> None:
                self.calls: list[str] = []

            def on_serve_start(self, kind: vgi_rpc.TransportKind) -> None:
                self.calls.append(str(kind))
                if len(self.calls) == 1:
                    raise OSError("no database yet")

            def ping(self) -> str:
                return "pong"

        implementation = Starting()
        with vgi_rpc.serve_pipe(Starting, implementation) as proxy, self.assertLogs("vgi_rpc", "ERROR"):
            with self.raises(RpcError, "no database yet") as caught:
                proxy.ping()
            self.assertTrue(caught.exception.is_retryable())
            self.assertEqual([proxy.ping(), proxy.ping()], ["pong", "pong"])
        self.assertEqual(implementation.calls, ["pipe", "pipe"])

    def test_draining_refuses_new_calls(self) -> None:
        server = make_server()
        with self.sync(Service, server) as proxy:
            self.assertEqual(proxy.add(1.0), 3.0)
            self.assertTrue(server.drain(0))
            with self.raises(RpcError) as caught:
                proxy.add(1.0)
        self.assertEqual((caught.exception.error_kind, caught.exception.is_retryable()), ("server_draining", True))

    def test_trace_context_is_handed_through(self) -> None:
        class Traced:
            def trace(self, ctx: CallContext) -> str:
                return str(ctx.transport_metadata.get("traceparent"))

        empty = pa.RecordBatch.from_arrays([], schema=pa.schema([]))
        metadata = request_metadata("trace", "Traced", traceparent=b"00-ab-cd-01")
        with BytePeer(RpcServer(Traced, Traced())) as peer:
            self.assertEqual(
                peer.ask(ipc_bytes(empty.schema, (empty, metadata)))[0][0].to_pydict(), {"result": ["00-ab-cd-01"]}
            )


# ============================================================================
# 13, 14, 15. BYTE TRANSPORTS, CLIENT, BYTE SERVING - and the same behaviour over HTTP
# ============================================================================


class TransportContract:
    """What holds on every transport; a subclass says how to connect. One connection serves all tests of a class."""

    kind = ""
    proxy: Any
    log: list[Any]
    in_process = True

    @classmethod
    def open(cls, stack: contextlib.ExitStack) -> Any:
        """Return a proxy of `Service` whose ``on_log`` is ``cls.log.append``; *stack* closes what was opened."""
        raise AssertionError("a transport opens its own connection")

    @classmethod
    def setUpClass(cls) -> None:
        """Connect."""
        cls.log = []
        cls.stack = contextlib.ExitStack()
        cls.proxy = cls.open(cls.stack)

    @classmethod
    def tearDownClass(cls) -> None:
        """Disconnect."""
        cls.stack.close()

    def setUp(self) -> None:
        """Each test begins without log lines, and on a connection that answers."""
        super().setUp()  # type: ignore[misc]
        self.log.clear()
        self.addCleanup(lambda: self.assertEqual(self.proxy.add(a=20.0, b=22.0), 42.0))

    # -- unary

    def test_what_is_no_batch_is_not_sent(self) -> None:
        with self.proxy.running() as session:
            for wrong in (values(1.0).batch, AnnotatedBatch("text"), None):  # type: ignore[arg-type]
                with self.assertRaises(TypeError):
                    session.exchange(wrong)
            self.assertEqual(session.exchange(values(2.0)).batch.to_pydict()["sum"], [2.0])
        with self.assertRaisesRegex(RpcError, "closed"):
            session.exchange(values(1.0))
        self.assertIn("proxy of Service", repr(self.proxy))

    def test_a_client_log_that_fails_ends_no_call(self) -> None:
        def fails(message: vgi_rpc.Message) -> None:
            raise RuntimeError("a broken log")

        noisy = vgi_rpc.with_options(self.proxy, on_log=fails)
        with self.assertLogs("vgi_rpc", "ERROR") as caught:
            self.assertEqual([noisy.logs(count=2), noisy.logs(count=1)], [2, 1])
        self.assertEqual(len(caught.records), 3)

    def test_every_type(self) -> None:
        for name, case in TYPES.items():
            echo = getattr(self.proxy, f"echo_{name}")
            for value in case.values:
                with self.subTest(name=name, value=value):
                    got = echo(value=value)
                    self.assertEqual(got, value)
                    self.assertIs(type(got), type(value))

    def test_calls(self) -> None:
        proxy = self.proxy
        self.assertEqual([proxy.add(1.0), proxy.add(1.0, 5.0), proxy.add(b=1.0, a=2), proxy.add(a=1.5)], [3.0, 6.0, 3.0, 3.5])
        self.assertIsNone(proxy.nothing())
        self.assertEqual([proxy.optional(), proxy.optional(None), proxy.optional(4)], [None, None, 4])
        self.assertEqual(proxy.defaults(), "9 a BLUE")
        self.assertEqual(proxy.defaults(Point(1), names=["x", "y"], color=Color.RED), "1 x,y RED")

    def test_arguments_that_do_not_fit_are_refused_here(self) -> None:
        before = len(self.proxy.context()["id"])
        for call, parts in (
            (lambda p: p.add(), ("missing argument 'a'", "add(a: float, b: float = 2.0) -> float")),
            (lambda p: p.add(1.0, c=1.0), ("no parameter 'c'", "['a', 'b']")),
            (lambda p: p.add(1.0, 2.0, 3.0), ("2 arguments", "got 3")),
            (lambda p: p.add(1.0, a=1.0), ("'a' twice",)),
            (lambda p: p.add(a="x"), ("argument a", "expected float64", "got str")),
            (lambda p: p.add(a=None), ("argument a", "got None")),
            (lambda p: p.count(limit="x"), ("count()", "argument limit", "expected int64", "got str")),
        ):
            with self.subTest(parts=parts), self.raises(TypeError, *parts):
                call(self.proxy)
        with self.raises(AttributeError, "'ad'", "did you mean 'add'"):
            self.proxy.ad()
        self.assertEqual(len(self.proxy.context()["id"]), before)

    def test_logs(self) -> None:
        self.assertEqual(self.proxy.logs(3), 3)
        expected = [vgi_rpc.Message(Level.WARN, f"line {i}", index=str(i)) for i in range(3)]
        self.assertEqual(self.log, expected)

    def test_context(self) -> None:
        facts = self.proxy.context()
        self.assertEqual((facts["method"], facts["protocol"], facts["kind"]), ("context", "Service", self.kind))
        self.assertRegex(facts["id"], "^[0-9a-f]{16}$")
        self.assertEqual((facts["principal"], facts["domain"]), ("", ""))
        self.assertNotEqual(facts["id"], self.proxy.context()["id"])

    def test_exceptions(self) -> None:
        for name in FAILURES:
            with self.subTest(name), self.assertRaises(RpcError) as caught:
                self.proxy.fail(name)
            error = caught.exception
            self.assertEqual((error.error_type, error.error_code), (name, "UNKNOWN"))
            self.assertIn("test_vgi_rpc.py", error.remote_traceback)
            self.assertRegex(error.request_id, "^[0-9a-f]{16}$")
            self.assertEqual(self.proxy.add(1.0), 3.0)
        with self.raises(RpcError, "KeyError: 'y'") as caught:
            self.proxy.fail("KeyError")
        self.assertEqual(caught.exception.error_message, "'y'")

    def test_status_errors(self) -> None:
        with self.assertRaises(RpcError) as caught:
            self.proxy.refuse()
        error = caught.exception
        self.assertEqual((error.error_type, error.error_message), ("StatusError", "not now"))
        self.assertEqual((error.error_code, error.error_kind), ("RESOURCE_EXHAUSTED", "tests_busy"))
        details = [vgi_rpc.RetryInfo(1.5), vgi_rpc.ErrorInfo({"a": "b"}), {"@type": "tests.Own", "n": 1}]
        self.assertEqual(error.details(), details)
        self.assertTrue(error.is_retryable())

    def test_results_that_are_not_what_was_declared(self) -> None:
        for how, parts in (
            ("type", ("lie() result", "expected list of int64", "got str")),
            ("member", ("lie() result[1]", "expected int64", "got str")),
            ("none", ("lie() result", "got None")),
            ("large", ("lie() result[0]", "expected int64", str(2**63))),
        ):
            with self.subTest(how), self.raises(RpcError, "TypeError", *parts):
                self.proxy.lie(how)
        with self.raises(RpcError, "TypeError", "lie_none() result", "None", "got int"):
            self.proxy.lie_none()

    def test_large_values(self) -> None:
        batch = pa.RecordBatch.from_pydict({"x": pa.array(range(1_000_000))})
        self.assertTrue(self.proxy.echo_batch(batch).equals(batch))

    # -- producers

    def test_producer(self) -> None:
        batches = list(self.proxy.count(3))
        self.assertEqual([b.batch.to_pydict() for b in batches], [{"value": [i]} for i in range(3)])
        self.assertEqual([dict(b.custom_metadata) for b in batches], [{b"at": b"%d" % i} for i in range(3)])
        self.assertEqual(
            [(m.level, m.message, m.extra) for m in self.log], [(Level.INFO, f"number {i}", {"at": str(i)}) for i in range(3)]
        )
        self.assertEqual(list(self.proxy.count(0)), [])

    def test_producer_with_header(self) -> None:
        with self.proxy.count_with_header(2) as session:
            self.assertEqual(session.header, Header(2, "counting"))
            self.assertEqual(session.typed_header(Header), Header(2, "counting"))
            with self.raises(TypeError, "expected Point", "got Header"):
                session.typed_header(Point)
            self.assertEqual([m.message for m in self.log if m.level is Level.DEBUG], ["with the header"])
            self.assertEqual(len(list(session)), 2)
        with self.proxy.count(1) as session:
            self.assertIsNone(session.header)
            with self.raises(TypeError, "expected Header", "got None"):
                session.typed_header(Header)

    def test_ticks_carry_metadata(self) -> None:
        with self.proxy.ticks() as session:
            seen = [session.tick(m).batch.column(0)[0].as_py() for m in (None, {b"a": b"1"}, pa.KeyValueMetadata({"b": "2"}))]
        expected = ["{}", '{"a": "1"}', '{"b": "2"}']
        # Over HTTP the first turn runs when the stream starts: before any tick could carry metadata.
        self.assertEqual(seen[-1] if self.kind != "http" else seen[1:], expected[-1] if self.kind != "http" else expected[1:])
        self.assertEqual(seen[0], "{}")

    def test_emit_and_finish_in_one_turn(self) -> None:
        session = self.proxy.once()
        self.assertEqual([b.batch.to_pydict() for b in session], [{"value": [1]}])
        self.assertTrue(session.closed)
        with self.assertRaises((RpcError, StopIteration)):
            session.tick()

    def test_the_end_of_a_tick(self) -> None:
        session = self.proxy.count(1)
        self.assertEqual(session.tick().batch.to_pydict(), {"value": [0]})
        with self.assertRaises(StopIteration):
            session.tick()
        self.assertTrue(session.closed)

    def test_zero_rows_and_zero_columns(self) -> None:
        for columns in (["a", "b"], ["only"], []):
            with self.subTest(columns=columns):
                batches = list(self.proxy.shapes(columns, 4))
                self.assertEqual([b.batch.schema.names for b in batches], [columns] * 4)
                self.assertEqual([dict(b.custom_metadata)[b"left"] for b in batches], [b"3", b"2", b"1", b"0"])
                if columns:
                    self.assertEqual([b.batch.num_rows for b in batches], [1, 0, 1, 0])

    def test_abandoned_streams(self) -> None:
        for _ in self.proxy.count(1000):
            break
        self.assertEqual(self.proxy.add(1.0), 3.0)
        session = self.proxy.count(1000)
        session.close()
        session.close()
        self.assertEqual(self.proxy.add(1.0), 3.0)
        with self.proxy.running():
            pass
        unused = self.proxy.running()
        half = self.proxy.running()
        half.exchange(values(1.0))
        self.assertEqual(self.proxy.add(1.0), 3.0)
        if self.kind != "http":
            self.assertTrue(unused.closed and half.closed)
        self.proxy.count_with_header(3)
        self.assertEqual(self.proxy.add(1.0), 3.0)

    # -- exchanges

    def test_exchange(self) -> None:
        with self.proxy.running("label") as session:
            answers = [session.exchange(values(float(i), 1.0)).batch.to_pydict() for i in range(5)]
        self.assertEqual([a["sum"] for a in answers], [[1.0], [3.0], [6.0], [10.0], [15.0]])
        self.assertEqual([a["count"] for a in answers], [[2], [4], [6], [8], [10]])
        self.assertEqual({a["label"][0] for a in answers}, {"label"})
        with self.raises(RpcError, "closed"):
            session.exchange(values(1.0))

    def test_exchange_with_header(self) -> None:
        with self.proxy.running_with_header("label") as session:
            self.assertEqual(session.header, Header(0, "none"))
            self.assertEqual(session.exchange(values(2.0)).batch.to_pydict()["sum"], [2.0])

    def test_nested_state(self) -> None:
        with self.proxy.nested() as session:
            answers = [json.loads(session.exchange(values(*v)).batch.column(0)[0].as_py()) for v in ([1], [2, 3], [4])]
        self.assertEqual(
            answers,
            [
                [[1], "BLUE", "COLLECTING", 1, None],
                [[1, 2, 3], "BLUE", "PROCESSING", 2, 1],
                [[1, 2, 3, 4], "BLUE", "PROCESSING", 3, 2],
            ],
        )

    def test_call_state_and_rehydration(self) -> None:
        with self.proxy.scaled(3) as session:
            answers = [session.exchange(values(1, 2)) for _ in range(3)]
        self.assertEqual([a.batch.to_pydict() for a in answers], [{"value": [103, 106]}] * 3)
        self.assertEqual([dict(a.custom_metadata) for a in answers], [{b"turns": b"1"}, {b"turns": b"2"}, {b"turns": b"3"}])

    def test_cancel(self) -> None:
        self.proxy.cancels()
        session = self.proxy.running()
        session.exchange(values(1.0, 2.0))
        session.cancel()
        session.cancel()
        session.close()
        with self.raises(RpcError, "closed"):
            session.exchange(values(1.0))
        self.assertEqual(self.proxy.cancels(), [2])
        self.proxy.running().cancel()
        self.assertEqual(self.proxy.cancels(), [0])
        self.proxy.running().close()
        self.assertEqual(self.proxy.cancels(), [])
        self.proxy.count(5).cancel()

    def test_inputs_are_cast_where_that_is_safe(self) -> None:
        with self.proxy.running() as session:
            self.assertEqual(session.exchange(values(1, 2)).batch.to_pydict()["sum"], [3.0])
            self.assertEqual(session.exchange(values(3)).batch.to_pydict()["sum"], [6.0])
        for batch, parts in (
            (values("x"), ("'value'", "float64")),
            (AnnotatedBatch.from_pydict({"other": [1.0]}), ("value: float64", "other: float64")),
            (AnnotatedBatch.from_pydict({"value": [1.0], "more": [1.0]}), ("running() input",)),
            (AnnotatedBatch(pa.RecordBatch.from_arrays([], schema=pa.schema([]))), ("running() input",)),
        ):
            with self.subTest(parts=parts), self.proxy.running() as session:
                with self.raises(RpcError, "TypeError", *parts):
                    session.exchange(batch)
                self.assertTrue(session.closed)
        with self.proxy.nested() as session, self.raises(RpcError, "TypeError", "'value'", "int64"):
            session.exchange(values(1.5))
        with self.proxy.running() as session, self.raises(TypeError, "AnnotatedBatch", "got RecordBatch"):
            session.exchange(values(1.0).batch)

    def test_zero_rows_in(self) -> None:
        with self.proxy.running() as session:
            empty = AnnotatedBatch(pa.RecordBatch.from_pydict({"value": []}, schema=VALUE))
            self.assertEqual(session.exchange(empty).batch.to_pydict()["count"], [0])

    # -- streams that go wrong

    def test_errors_at_init(self) -> None:
        for start in (
            lambda p: list(p.init_fails()),
            lambda p: p.exchange_init_fails().exchange(values(1.0)),
            lambda p: p.header_init_fails(),
        ):
            with self.raises(RpcError, "KeyError: 'at init'") as caught:
                start(self.proxy)
            self.assertIn("test_vgi_rpc.py", caught.exception.remote_traceback)
            self.assertEqual(self.proxy.add(1.0), 3.0)
        with self.raises(RpcError, "wrong_header() header.total", "expected int64", "got str"):
            self.proxy.wrong_header()
        with self.raises(RpcError, "not_a_stream()", "expected a Stream", "got int"):
            list(self.proxy.not_a_stream())

    def test_states_that_break_the_rules(self) -> None:
        for how, parts in (
            ("twice", ("RuntimeError", "emit called twice")),
            ("none", ("RuntimeError", "nothing emitted")),
            ("type", ("TypeError", "'value'", "expected int64", "got utf8")),
            ("names", ("TypeError", "['value']", "['other']")),
            ("after finish", ("RuntimeError", "after finish")),
            ("raise", ("LookupError", "in the second turn")),
        ):
            with self.subTest(how):
                session = self.proxy.misbehaving(how)
                self.assertEqual(session.tick().batch.to_pydict(), {"value": [1]})
                with self.raises(RpcError, *parts):
                    session.tick()
                self.assertTrue(session.closed)
                self.assertEqual(self.proxy.add(1.0), 3.0)
        for how, parts in (
            ("none", ("RuntimeError", "nothing emitted")),
            ("finish", ("RuntimeError", "finish() in an exchange")),
            ("exit", ("SystemExit", "3")),
        ):
            with self.subTest("exchange", how=how), self.proxy.bad_exchange(how) as session:
                with self.raises(RpcError, *parts):
                    session.exchange(values(1))
                self.assertEqual(self.proxy.add(1.0), 3.0)

    # -- introspection

    def test_introspection(self) -> None:
        listed = [p.protocol for p in vgi_rpc.list_protocols(self.proxy)]
        self.assertEqual((listed[0], listed[-1]), ("Service", "vgi_rpc.Reflection.v1"))
        described = vgi_rpc.introspect(self.proxy)
        self.assertEqual((described.protocol_name, described.request_version), ("Service", "1"))
        self.assertEqual(described.protocol_hash, make_server().protocol_hash)
        self.assertEqual(set(described.methods), set(vgi_rpc.rpc_methods(Service)))
        count, running, add = (described.methods[m] for m in ("count_with_header", "running", "add"))
        self.assertEqual((count.has_header, count.header_schema, count.is_exchange), (True, Header.ARROW_SCHEMA, False))
        self.assertEqual((running.has_header, running.header_schema, running.is_exchange), (False, None, True))
        self.assertEqual((add.params_schema, add.result_schema.names, add.has_return), (ADD, ["result"], True))
        self.assertEqual(vgi_rpc.describe_protocol(self.proxy, "Service").methods, described.methods)
        with self.raises(RpcError, "Nobody"):
            vgi_rpc.describe_protocol(self.proxy, "Nobody")


class PipeTests(TransportContract, TestCase):
    """In this process, over a pair of pipes."""

    kind = "pipe"

    @classmethod
    def open(cls, stack: contextlib.ExitStack) -> Any:
        return stack.enter_context(vgi_rpc.serve_pipe(Service, ServiceImpl(), on_log=cls.log.append))


class SubprocessTests(TransportContract, TestCase):
    """A worker process."""

    kind = "pipe"

    @classmethod
    def open(cls, stack: contextlib.ExitStack) -> Any:
        connection = vgi_rpc.connect(Service, WORKER, on_log=cls.log.append, stderr=vgi_rpc.StderrMode.PIPE)
        return stack.enter_context(connection)

    def test_what_a_method_prints_goes_to_stderr(self) -> None:
        seen, complete = set(), threading.Event()
        expected = {"printed by a method", "written to descriptor 1", "printed by a child"}

        class Handler(logging.Handler):
            def emit(self, record: logging.LogRecord) -> None:
                seen.add(record.getMessage())
                if expected <= seen:
                    complete.set()

        worker_log = logging.getLogger("vgi_rpc.worker")
        handler, level = Handler(), worker_log.level
        worker_log.addHandler(handler)
        worker_log.setLevel(logging.INFO)
        self.addCleanup(worker_log.setLevel, level)
        self.addCleanup(worker_log.removeHandler, handler)
        self.assertEqual(self.proxy.noisy(), "quiet")
        self.assertTrue(complete.wait(WATCHDOG_SECONDS / 4), seen)


class UnixTests(TransportContract, TestCase):
    """A Unix socket, one thread a connection."""

    kind = "unix"

    @classmethod
    def open(cls, stack: contextlib.ExitStack) -> Any:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        cls.path, _ = in_thread(vgi_rpc.serve_unix, make_server(), os.path.join(folder, "s"), threaded=True)
        return stack.enter_context(vgi_rpc.unix_connect(Service, cls.path, on_log=cls.log.append))

    def test_only_the_owner_may_connect(self) -> None:
        self.assertEqual(os.stat(self.path).st_mode & 0o077, 0)

    def test_connections_are_served_side_by_side(self) -> None:
        with vgi_rpc.unix_connect(Service, self.path) as one, vgi_rpc.unix_connect(Service, self.path) as two:
            session = one.running()
            session.exchange(values(1.0))
            self.assertEqual(two.add(1.0), 3.0)
            self.assertEqual(session.exchange(values(1.0)).batch.to_pydict()["sum"], [2.0])


class TcpTests(TransportContract, TestCase):
    """A TCP socket."""

    kind = "tcp"

    @classmethod
    def open(cls, stack: contextlib.ExitStack) -> Any:
        _, cls.port, _ = in_thread(vgi_rpc.serve_tcp, make_server(), threaded=True)
        return stack.enter_context(vgi_rpc.tcp_connect(Service, "127.0.0.1", cls.port, on_log=cls.log.append))

    def test_garbage_hurts_nobody_else(self) -> None:
        with socket.create_connection(("127.0.0.1", self.port), WATCHDOG_SECONDS) as raw:
            raw.sendall(b"GET / HTTP/1.1\r\n\r\n")
            answer = raw.makefile("rb").read()
        self.assertIn("not an Arrow IPC stream", error_of(read_streams(answer)[0])["text"])
        self.assertEqual(self.proxy.add(1.0), 3.0)


class HttpContract(TransportContract):
    """What holds over HTTP beside the contract."""

    kind = "http"

    def test_a_session_goes_back_to_a_token(self) -> None:
        with self.proxy.count(limit=9) as session:
            _, token = session.next_with_token()
            first, _ = session.next_with_token()
            second, _ = session.next_with_token()
            self.assertNotEqual(first.batch.to_pydict(), second.batch.to_pydict())
            session.seek_to_token(token)
            again, after = session.next_with_token()
            self.assertEqual(again.batch.to_pydict(), first.batch.to_pydict())
            self.assertNotEqual(after, token)
            with self.assertRaisesRegex(RpcError, "token"):
                session.seek_to_token(b"no token")
        self.assertEqual(session.next_with_token()[0], None)

    def test_a_stream_goes_on_from_its_token(self) -> None:
        session = self.proxy.running("saved")
        session.exchange(values(1.0, 2.0))
        token = session.token()
        session.exchange(values(100.0))
        again = vgi_rpc.resume(self.proxy, "running", token)
        answer = again.exchange(values(4.0)).batch.to_pydict()
        self.assertEqual((answer["sum"], answer["label"], answer["count"]), ([7.0], ["saved"], [3]))
        session.close()
        with self.raises(RpcError, "over"):
            session.token()

    def test_a_producer_goes_on_from_its_token(self) -> None:
        session = self.proxy.count(5)
        for seen in range(1, 5):
            self.assertEqual(session.tick().batch.to_pydict(), {"value": [seen - 1]})
            rest = [b.batch.to_pydict()["value"][0] for b in vgi_rpc.resume(self.proxy, "count", session.token())]
            self.assertEqual(rest, list(range(seen, 5)))

    def test_tokens_that_are_none(self) -> None:
        token = self.proxy.running().token()
        for bad in (b"", b"{}", b"\xff", b'{"method":"running"}', token[:-5]):
            with self.subTest(bad=bad), self.raises(RpcError, "resume"):
                vgi_rpc.resume(self.proxy, "running", bad)
        with self.raises(RpcError, "resume"):
            vgi_rpc.resume(self.proxy, "nested", token)
        with self.raises(RpcError, "not a stream"):
            vgi_rpc.resume(self.proxy, "add", token)
        damaged = json.loads(token)
        damaged["state"] = damaged["state"][:-8] + "AAAAAAA="
        with self.raises(RpcError, "state token refused"):
            vgi_rpc.resume(self.proxy, "running", json.dumps(damaged).encode()).exchange(values(1.0))


class WsgiTests(HttpContract, TestCase):
    """A WSGI application behind `wsgiref.validate`."""

    @classmethod
    def open(cls, stack: contextlib.ExitStack) -> Any:
        return stack.enter_context(vgi_rpc.http_connect(Service, client=wsgi_client(), on_log=cls.log.append))


class SyncClientTests(HttpContract, TestCase):
    """The HTTP side without a socket, under a prefix, and nothing cached between turns."""

    @classmethod
    def open(cls, stack: contextlib.ExitStack) -> Any:
        client = vgi_rpc.make_sync_client(make_server(), prefix="/some/where", call_state_cache_entries=0)
        return stack.enter_context(vgi_rpc.http_connect(Service, client=client, on_log=cls.log.append))


class HttpTests(HttpContract, TestCase):
    """A real HTTP server and real connections."""

    @classmethod
    def open(cls, stack: contextlib.ExitStack) -> Any:
        _, port, _ = in_thread(vgi_rpc.serve_http, make_server(), token_key=KEY, prefix="/deep/path/")
        cls.url = f"http://127.0.0.1:{port}/deep/path"
        return stack.enter_context(vgi_rpc.http_connect(Service, cls.url, on_log=cls.log.append))

    def test_the_same_without_compression(self) -> None:
        with vgi_rpc.http_connect(Service, self.url, compression_level=None) as proxy:
            batch = pa.RecordBatch.from_pydict({"x": [0] * 100_000})
            self.assertTrue(proxy.echo_batch(batch).equals(batch))

    def test_one_proxy_serves_many_threads(self) -> None:
        failures: list[Any] = []

        def work(n: int) -> None:
            try:
                with self.proxy.running() as session:
                    for i in range(10):
                        total = session.exchange(values(float(n))).batch.to_pydict()["sum"][0]
                        self.assertEqual(total, n * (i + 1.0))
            except BaseException as exc:  # noqa: BLE001
                failures.append(exc)

        threads = [threading.Thread(target=work, args=(n,)) for n in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        self.assertEqual(failures, [])

    def test_capabilities_and_description(self) -> None:
        found = vgi_rpc.http_capabilities(self.url)
        self.assertTrue(found.accept_max_response_bytes_support)
        self.assertEqual(set(found.supported_encodings) - {"zstd"}, {"gzip"})
        self.assertFalse(found.externalization_enabled or found.upload_url_support)
        self.assertEqual(vgi_rpc.http_introspect(self.url).protocol_name, "Service")


class StreamingDocTests(TestCase):
    """Every statement of the user's description of streaming, on a transport with state in memory and on a stateless one."""

    def proxies(self) -> Any:
        """One proxy of `DocService` after the other."""
        for name in ("pipe", "http"):
            with self.subTest(name):
                if name == "pipe":
                    with vgi_rpc.serve_pipe(DocService, DocServiceImpl()) as proxy:
                        yield proxy
                else:
                    with vgi_rpc.http_connect(DocService, client=wsgi_client()) as proxy:
                        yield proxy

    def test_running_stats(self) -> None:
        for proxy in self.proxies():
            with proxy.stats(label="temperatures") as session:
                for data, count, mean in (([1.0, 2.0], 2, 1.5), ([6.0], 3, 3.0), ([-9.0], 4, 0.0)):
                    answer = session.exchange(AnnotatedBatch.from_pydict({"value": data}))
                    self.assertEqual(answer.batch.to_pydict(), {"count": [count], "mean": [mean]})

    def test_every_field_of_a_state_is_serialised(self) -> None:
        state = RunningStatsState(3, 4.5, [1.0, 2.0], "label")
        self.assertEqual(RunningStatsState.deserialize_from_bytes(state.serialize_to_bytes()), state)
        table = {"count": pa.int64(), "total": pa.float64(), "history": pa.list_(pa.float64()), "label": pa.utf8()}
        self.assertEqual(RunningStatsState.ARROW_SCHEMA, pa.schema([pa.field(n, t, nullable=False) for n, t in table.items()]))
        self.assertTrue(issubclass(StreamState, ArrowSerializableDataclass))
        self.assertTrue(pa.types.is_dictionary(StatefulPipeline.ARROW_SCHEMA.field("phase").type))

    def test_paginated_query(self) -> None:
        for proxy in self.proxies():
            pages = []
            for batch in proxy.search(query="SELECT *", page_size=100):
                rows = batch.batch.to_pylist()
                pages.append(len(rows))
            self.assertEqual(pages, [100, 100, 50])

    def test_stateful_pipeline(self) -> None:
        for proxy in self.proxies():
            with proxy.pipeline(threshold=100.0) as session:
                r1 = session.exchange(AnnotatedBatch.from_pydict({"value": [10.0, 20.0]}))
                self.assertEqual(r1.batch.to_pydict(), {"phase": ["collecting"], "buffer_size": [2], "total": [30.0]})
                r2 = session.exchange(AnnotatedBatch.from_pydict({"value": [80.0]}))
                self.assertEqual(r2.batch.to_pydict(), {"phase": ["processing"], "buffer_size": [3], "total": [110.0]})

    def test_headers(self) -> None:
        for proxy in self.proxies():
            session = proxy.fetch_rows(query="SELECT *")
            self.assertEqual(repr(session.header), "JobHeader(total_rows=100, description='Results for: SELECT *')")
            self.assertEqual([b.batch.to_pydict() for b in session], [{"value": [n]} for n in range(100, 0, -1)])
            with proxy.transform_rows(factor=2.0) as session:
                self.assertEqual(session.header, JobHeader(-1, "times 2.0"))
                result = session.exchange(AnnotatedBatch.from_pydict({"value": [1.0]}))
                self.assertEqual(result.batch.to_pydict(), {"value": [2.0]})
                self.assertEqual(session.typed_header(JobHeader).total_rows, -1)
            with proxy.pipeline(threshold=1.0) as session:
                self.assertIsNone(session.header)
                with self.assertRaises(TypeError):
                    session.typed_header(JobHeader)
            description = vgi_rpc.describe_protocol(proxy, "DocService").methods["fetch_rows"]
            self.assertEqual((description.has_header, description.header_schema), (True, JobHeader.ARROW_SCHEMA))

    def test_a_header_is_sent_once(self) -> None:
        stream = RawStream(wsgi_client(), "running_with_header")
        reply = stream.exchange()
        self.assertEqual([len(read_streams(body)) for body in (reply.body,)], [1])

    def test_state_lives_in_memory_or_in_the_token(self) -> None:
        """On a pipe the same object serves all turns; over HTTP each turn has one of its own."""
        alive: list[RunningStatsState] = []

        @dataclass
        class Observed(RunningStatsState):
            def exchange(self, input: AnnotatedBatch, out: OutputCollector, ctx: CallContext) -> None:
                if not any(self is seen for seen in alive):
                    alive.append(self)
                super().exchange(input, out, ctx)

        class Watching:
            def stats(self, label: str) -> Stream[Observed]:
                schema = pa.schema([("count", pa.int64()), ("mean", pa.float64())])
                return Stream(schema, Observed(label=label), VALUE)

        server = RpcServer(Watching, Watching())
        for connection, objects in (
            (vgi_rpc.serve_pipe(Watching, Watching()), 1),
            (vgi_rpc.http_connect(Watching, client=vgi_rpc.make_sync_client(server)), 3),
        ):
            alive.clear()
            with self.subTest(objects=objects), connection as proxy, proxy.stats("x") as session:
                counts = [session.exchange(values(1.0)).batch.to_pydict()["count"][0] for _ in range(3)]
                self.assertEqual((counts, len(alive)), ([1, 2, 3], objects))

    def test_a_token_is_signed_and_readable(self) -> None:
        stream = RawStream(wsgi_client(), "running", {"label": "readable"})
        self.assertIn(b"readable", base64.b64decode(stream.tokens[STATE]))
        self.assertNotIn(KEY, base64.b64decode(stream.tokens[STATE]))


class ByteServingTests(TestCase):
    """Listeners and the serve loop, beside the contract."""

    def test_a_null_where_none_is_allowed_is_refused_in_the_streams_own_schema_too(self) -> None:
        strict = pa.schema([pa.field("value", pa.int64(), nullable=False), pa.field("more", pa.utf8())])

        @dataclass
        class Strict(ExchangeState):
            def exchange(self, input: AnnotatedBatch, out: OutputCollector, ctx: CallContext) -> None:
                out.emit_pydict({"value": [input.batch.num_rows]})

        class Strictly:
            def strictly(self) -> Stream[StreamState]:
                return Stream(INTEGERS, Strict(), input_schema=strict)

        good, null = (
            pa.RecordBatch.from_arrays([pa.array(values, pa.int64()), pa.array([None, "x"])], schema=strict)
            for values in ([1, 2], [None, 2])
        )
        empty = pa.RecordBatch.from_arrays([], schema=pa.schema([]))
        request = ipc_bytes(empty.schema, (empty, request_metadata("strictly", "Strictly")))
        for sent, rows in (([good, good], [1, 1]), ([good, null], [1, 0])):
            (answers,) = ask_core(RpcServer(Strictly, Strictly()), request + ipc_bytes(strict, *sent))
            self.assertEqual([batch.num_rows for batch, _ in answers], rows)
            if null in sent:
                self.assertIn("column 'value': expected int64 without nulls", error_of(answers[1:])["text"])

    def test_one_request_at_a_time(self) -> None:
        server, channel = make_server(), MemoryChannel(GOOD + request_bytes("add", {"a": 5.0, "b": 2.0}))
        for expected in ([3.0], [7.0]):
            channel.written.clear()
            server.serve_one(vgi_rpc.Transport(channel, vgi_rpc.TransportKind.PIPE))
            [[(answer, _)]] = read_streams(b"".join(channel.written))
            self.assertEqual(answer.to_pydict(), {"result": expected})

    def test_connections_one_after_the_other(self) -> None:
        _, port, _ = in_thread(vgi_rpc.serve_tcp, make_server())
        for _ in range(3):
            with vgi_rpc.tcp_connect(Service, "127.0.0.1", port) as proxy:
                self.assertEqual(proxy.add(1.0), 3.0)

    def test_an_idle_server_ends_and_removes_its_socket(self) -> None:
        with tempfile.TemporaryDirectory() as folder:
            path, thread = in_thread(
                vgi_rpc.serve_unix, make_server(), os.path.join(folder, "s"), threaded=True, idle_timeout=0.3
            )
            with vgi_rpc.unix_connect(Service, path) as proxy:
                self.assertEqual(proxy.add(1.0), 3.0)
            thread.join(WATCHDOG_SECONDS / 2)
            self.assertFalse(thread.is_alive())
            self.assertFalse(os.path.exists(path))
            with self.raises(TransportError, path):
                vgi_rpc.unix_connect(Service, path).__enter__()

    def test_a_dead_socket_is_replaced_and_a_live_one_is_not(self) -> None:
        with tempfile.TemporaryDirectory() as folder:
            path = os.path.join(folder, "s")
            with socket.socket(socket.AF_UNIX) as dead:
                dead.bind(path)
            in_thread(vgi_rpc.serve_unix, make_server(), path, threaded=True)
            with vgi_rpc.unix_connect(Service, path) as proxy:
                self.assertEqual(proxy.add(1.0), 3.0)
            with self.assertRaises(OSError):
                vgi_rpc.serve_unix(make_server(), path)
            with vgi_rpc.unix_connect(Service, path) as proxy:
                self.assertEqual(proxy.add(1.0), 3.0)

    def test_a_port_in_use(self) -> None:
        with socket.create_server(("127.0.0.1", 0)) as taken:
            port = taken.getsockname()[1]
            with self.assertRaises(OSError):
                vgi_rpc.serve_tcp(make_server(), port=port)
            with self.assertRaises(OSError):
                vgi_rpc.serve_http(make_server(), port=port, token_key=KEY)

    def test_nobody_listens(self) -> None:
        with socket.create_server(("127.0.0.1", 0)) as closed:
            port = closed.getsockname()[1]
        with self.raises(TransportError, f"127.0.0.1:{port}"):
            vgi_rpc.tcp_connect(Service, "127.0.0.1", port).__enter__()
        with vgi_rpc.http_connect(Service, f"http://127.0.0.1:{port}") as proxy, self.raises(TransportError, str(port)):
            proxy.add(1.0)

    def test_a_stream_in_raw_bytes(self) -> None:
        """Lockstep as WIRE section 5 has it: logs, then one data batch; an end of input ends the output."""
        with BytePeer(make_server()) as peer:
            peer.input.write(request_bytes("running", {"label": "raw"}))
            with pa.ipc.new_stream(peer.input, VALUE) as writer:
                writer.write_batch(values(1.0, 2.0).batch)
                reader = pa.ipc.open_stream(peer.output)
                self.assertEqual(reader.read_next_batch().to_pydict()["sum"], [3.0])
                writer.write_batch(values(4.0).batch)
                self.assertEqual(reader.read_next_batch().to_pydict()["sum"], [7.0])
            with self.assertRaises(StopIteration):
                reader.read_next_batch()
            self.assertEqual(peer.ask(GOOD)[0][0].to_pydict(), {"result": [3.0]})

    def test_cancel_in_raw_bytes(self) -> None:
        server = make_server()
        with BytePeer(server) as peer:
            peer.input.write(request_bytes("running", {"label": "raw"}))
            empty = pa.RecordBatch.from_pydict({"value": []}, schema=VALUE)
            data = ipc_bytes(VALUE, values(1.0).batch, (empty, {b"vgi_rpc.cancel": b"1"}))
            self.assertEqual([b.num_rows for b, _ in peer.ask(data)], [1])
            self.assertEqual(peer.ask(GOOD)[0][0].to_pydict(), {"result": [3.0]})
        self.assertEqual(server.implementation.cancels(), [1])

    def test_an_error_at_init_drains_the_input(self) -> None:
        empty = pa.RecordBatch.from_arrays([], schema=pa.schema([]))
        for method in ("init_fails", "exchange_init_fails", "header_init_fails"):
            with self.subTest(method), BytePeer(make_server()) as peer:
                data = ipc_bytes(empty.schema, (empty, request_metadata(method)))
                self.assertEqual(error_of(peer.ask(data + ipc_bytes(VALUE, values(1.0).batch)))["type"], "KeyError")
                self.assertEqual(peer.ask(GOOD)[0][0].to_pydict(), {"result": [3.0]})

    def test_input_that_turns_into_garbage(self) -> None:
        with BytePeer(make_server()) as peer:
            peer.input.write(request_bytes("running", {"label": "raw"}))
            peer.input.write(ipc_bytes(VALUE, values(1.0).batch)[:-8] + b"garbage in the stream")
            answer = read_stream(peer.output)
            self.assertEqual(answer[0][0].to_pydict()["sum"], [1.0])
            self.assertEqual(error_of(answer)["type"], "IPCError")


@unittest.skipUnless(shutil.which("openssl"), "no openssl to make a certificate with")
class TlsTests(TestCase):
    """TLS by contexts of the standard library's ssl."""

    @classmethod
    def setUpClass(cls) -> None:
        cls.folder = tempfile.mkdtemp()
        cls.addClassCleanup(shutil.rmtree, cls.folder)
        cls.certificate, key = cls.make_certificate("server")
        cls.server_context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        cls.server_context.load_cert_chain(cls.certificate, key)
        cls.client_context = ssl.create_default_context(cafile=cls.certificate)

    @classmethod
    def make_certificate(cls, name: str) -> tuple[str, str]:
        """Paths of a certificate that vouches for itself and of its key."""
        certificate, key = (os.path.join(cls.folder, f"{name}.{kind}") for kind in ("cert", "key"))
        command = f"openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 30 -subj /CN={name}".split()
        command += ["-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1", "-keyout", key, "-out", certificate]
        subprocess.run(command, check=True, stderr=subprocess.DEVNULL)
        return certificate, key

    def exercise(self, trusted: Any, stranger: Any, plain: Any) -> None:
        """A client that trusts the certificate is served, others are refused, and hurt nobody."""
        for refused in (stranger, plain):
            with self.assertRaises(TransportError), refused as proxy:
                proxy.add(1.0)
        with trusted as proxy:
            self.assertEqual(proxy.add(1.0), 3.0)
            with proxy.running() as session:
                self.assertEqual(session.exchange(values(2.0)).batch.to_pydict()["sum"], [2.0])
            batch = pa.RecordBatch.from_pydict({"x": pa.array(range(100_000))})
            self.assertTrue(proxy.echo_batch(batch).equals(batch))
            self.assertEqual(vgi_rpc.introspect(proxy).limits["tls_handshake_timeout"], (5, "seconds"))

    def test_tcp(self) -> None:
        _, port, _ = in_thread(vgi_rpc.serve_tcp, make_server(), threaded=True, tls_context=self.server_context)
        connect = functools.partial(vgi_rpc.tcp_connect, Service, "127.0.0.1", port, timeout=WATCHDOG_SECONDS / 4)
        self.exercise(connect(tls_context=self.client_context), connect(tls_context=ssl.create_default_context()), connect())

    def test_http(self) -> None:
        _, port, _ = in_thread(vgi_rpc.serve_http, make_server(), token_key=KEY, tls_context=self.server_context)
        url = f"https://127.0.0.1:{port}"
        connect = functools.partial(vgi_rpc.http_connect, Service, timeout=WATCHDOG_SECONDS / 4)
        self.exercise(connect(url, tls_context=self.client_context), connect(url), connect(url.replace("https", "http")))

    def test_http_through_a_proxy(self) -> None:
        """A tunnel to the server, by CONNECT; a proxy that refuses is named."""
        _, port, _ = in_thread(vgi_rpc.serve_http, make_server(), token_key=KEY, tls_context=self.server_context)
        asked: list[bytes] = []

        def forward(source: socket.socket, target: socket.socket) -> None:
            with contextlib.suppress(OSError):
                while data := source.recv(65_536):
                    target.sendall(data)
            for one in (source, target):
                with contextlib.suppress(OSError):
                    one.shutdown(socket.SHUT_RDWR)

        def proxy(listening: socket.socket, answer: bytes) -> None:
            with listening.accept()[0] as near:
                asked.append(near.recv(65_536))
                near.sendall(answer + b"\r\n\r\n")
                with socket.create_connection(("127.0.0.1", port)) as far:
                    back = threading.Thread(target=forward, args=(far, near), daemon=True)
                    back.start()
                    forward(near, far)
                    back.join(WATCHDOG_SECONDS)

        for answer, refused in ((b"HTTP/1.1 200 Connection established", False), (b"HTTP/1.1 403 Forbidden", True)):
            with self.subTest(answer), socket.create_server(("127.0.0.1", 0)) as listening:
                thread = threading.Thread(target=proxy, args=(listening, answer), daemon=True)
                thread.start()
                where = f"http://user:pass@127.0.0.1:{listening.getsockname()[1]}"
                environment = {"https_proxy": where, "no_proxy": "", "NO_PROXY": ""}
                connected = vgi_rpc.http_connect(
                    Service, f"https://127.0.0.1:{port}", tls_context=self.client_context, timeout=WATCHDOG_SECONDS / 4
                )
                with mock.patch.dict(os.environ, environment), contextlib.ExitStack() as stack:
                    if refused:
                        stack.enter_context(self.assertRaisesRegex(TransportError, "through proxy 127.0.0.1:.*403 Forbidden"))
                    self.assertEqual(stack.enter_context(connected).add(1.0), 3.0)
                thread.join(WATCHDOG_SECONDS)
                self.assertFalse(thread.is_alive())
                self.assertIn(b"CONNECT 127.0.0.1:%d HTTP/1.1\r\n" % port, asked[-1])
                self.assertIn(b"Proxy-Authorization: Basic dXNlcjpwYXNz\r\n", asked[-1])

    def test_client_certificates(self) -> None:
        """A server that asks for one serves those that its authority vouches for, and nobody else."""
        known, stranger = self.make_certificate("known"), self.make_certificate("stranger")
        strict = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        strict.load_cert_chain(self.certificate, self.certificate.replace(".cert", ".key"))
        strict.verify_mode = ssl.CERT_REQUIRED
        strict.load_verify_locations(known[0])
        _, tcp_port, _ = in_thread(vgi_rpc.serve_tcp, make_server(), threaded=True, tls_context=strict)
        _, http_port, _ = in_thread(vgi_rpc.serve_http, make_server(), token_key=KEY, tls_context=strict)
        connects = {
            "tcp": functools.partial(vgi_rpc.tcp_connect, Service, "127.0.0.1", tcp_port),
            "http": functools.partial(vgi_rpc.http_connect, Service, f"https://127.0.0.1:{http_port}"),
        }
        # In TLS 1.3 a client has finished its handshake before the server looks at the certificate.
        for version in (ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3):

            def presenting(own: Any, version: Any = version) -> ssl.SSLContext:
                context = ssl.create_default_context(cafile=self.certificate)
                context.maximum_version = version
                if own is not None:
                    context.load_cert_chain(*own)
                return context

            for kind, connect in connects.items():
                with self.subTest(kind, version=version):
                    connect = functools.partial(connect, timeout=WATCHDOG_SECONDS / 4)
                    refused = [connect(tls_context=presenting(own)) for own in (None, stranger)]
                    self.exercise(connect(tls_context=presenting(known)), *refused)


class ProcessTests(TestCase):
    """Workers that are not what they should be (each test reaps what it starts)."""

    def setUp(self) -> None:
        super().setUp()
        quiet = mock.patch("sys.stderr", io.StringIO())
        self.stderr = quiet.start()
        self.addCleanup(quiet.stop)

    def python(self, program: str, **options: Any) -> Any:
        """Connect to a worker that runs *program*, without site packages."""
        return vgi_rpc.connect(Service, [sys.executable, "-S", "-c", program], **options)

    def test_not_found(self) -> None:
        for command in (["/no/such/worker", "--flag"], [str(HERE)], []):
            with self.subTest(command=command), self.raises(TransportError, repr(command)):
                with vgi_rpc.connect(Service, command):
                    pass

    def test_exits_at_once(self) -> None:
        with self.python(
            "import sys; print('first line', file=sys.stderr); print('last line', file=sys.stderr); sys.exit(3)"
        ) as proxy:
            with self.raises(TransportError, "exited with status 3", "first line", "last line", "-c"):
                proxy.add(1.0)
            with self.raises(TransportError, "closed"):
                proxy.add(1.0)

    def test_prints_text_first(self) -> None:
        with self.python("import sys; print('Welcome to the worker', flush=True); sys.stdin.read()") as proxy:
            with self.raises(TransportError, "Welcome to the worker", "-c"):
                proxy.add(1.0)

    def test_killed_in_a_call(self) -> None:
        with vgi_rpc.connect(Service, WORKER) as proxy:
            self.assertNotEqual(proxy.process_id(), os.getpid())
            with self.raises(TransportError, "killed by signal 9"):
                proxy.kill()
            with self.raises(TransportError, "closed"):
                proxy.add(1.0)

    def test_killed_in_a_stream(self) -> None:
        with vgi_rpc.connect(Service, WORKER) as proxy, proxy.bad_exchange("kill") as session:
            with self.raises(TransportError, "killed by signal 9"):
                session.exchange(values(1))
            self.assertTrue(session.closed)

    def test_deaf(self) -> None:
        with (
            self.python("import time; time.sleep(600)", timeout=0.2) as proxy,
            self.assertRaises(vgi_rpc.DeadlineExceededError),
        ):
            proxy.add(1.0)

    def test_a_deadline_reaches_the_method(self) -> None:
        with vgi_rpc.serve_pipe(Service, ServiceImpl()) as proxy:
            with self.assertRaises(vgi_rpc.DeadlineExceededError):
                vgi_rpc.with_options(proxy, timeout=0.05).wait(seconds=WATCHDOG_SECONDS)
        with vgi_rpc.http_connect(Service, client=wsgi_client()) as proxy:
            with self.assertRaises(vgi_rpc.DeadlineExceededError):
                vgi_rpc.with_options(proxy, timeout=0.05).wait(seconds=WATCHDOG_SECONDS)
            self.assertEqual(proxy.add(1.0), 3.0)

    @unittest.skipUnless(os.path.isdir("/proc/self/fd"), "counts descriptors in /proc")
    def test_nothing_is_left_behind(self) -> None:
        def once() -> None:
            with self.python("import sys; sys.stdin.read()"):
                pass
            with self.python("raise SystemExit(1)") as proxy, self.assertRaises(TransportError):
                proxy.add(1.0)
            with self.assertRaises(TransportError), vgi_rpc.connect(Service, ["/no/such/worker"]):
                pass
            with vgi_rpc.serve_pipe(Service, ServiceImpl()) as proxy:
                next(iter(proxy.count(5)))

        once()
        before, threads = len(os.listdir("/proc/self/fd")), threading.active_count()
        for _ in range(3):
            once()
        self.assertEqual((len(os.listdir("/proc/self/fd")), threading.active_count()), (before, threads))
        children = pathlib.Path(f"/proc/self/task/{os.getpid()}/children")
        if children.exists():
            states = [
                pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
                for pid in children.read_text().split()
            ]
            self.assertNotIn("Z", states)

    def test_a_worker_without_a_parent_ends(self) -> None:
        worker = subprocess.Popen(WORKER, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        output, error = worker.communicate(GOOD, timeout=WATCHDOG_SECONDS)
        self.assertEqual(
            (read_stream(io.BytesIO(output))[0][0].to_pydict(), error, worker.returncode), ({"result": [3.0]}, b"", 0)
        )

    def test_listening_workers_announce_themselves_and_stop_when_told(self) -> None:
        with tempfile.TemporaryDirectory() as folder:
            path, log = os.path.join(folder, "s"), os.path.join(folder, "log")
            with Worker("--unix", path, "--access-log", log) as worker:
                self.assertEqual(worker.line, f"UNIX:{path}")
                with vgi_rpc.unix_connect(Service, path) as proxy:
                    self.assertEqual(proxy.echo_str("secret"), "secret")
                self.assertEqual(worker.stop()[0], 0)
            text = pathlib.Path(log).read_text(encoding="utf-8")
            self.assertEqual(json.loads(text)["method"], "echo_str")
            self.assertNotIn("secret", text)
        with Worker("--tcp", "0") as worker:
            self.assertRegex(worker.line, r"^TCP:127\.0\.0\.1:\d+$")
            with vgi_rpc.tcp_connect(Service, "127.0.0.1", int(worker.port)) as proxy:
                self.assertEqual(proxy.add(1.0), 3.0)
            self.assertEqual(worker.stop()[0], 0)

    def test_http_streams_survive_a_killed_server(self) -> None:
        with Worker("--http") as first:
            self.assertRegex(first.line, r"^PORT:\d+$")
            with vgi_rpc.http_connect(Service, first.url) as proxy:
                session = proxy.running("survivor")
                one = session.exchange(values(1.0)).batch.to_pydict()
                token = session.token()
                first.stop(signal.SIGKILL)
                with self.assertRaises(TransportError):
                    proxy.add(1.0)
                with Worker("--http", "--port", first.port) as second:
                    two = session.exchange(values(2.0)).batch.to_pydict()
                    self.assertEqual((one["sum"], two["sum"], two["label"]), ([1.0], [3.0], ["survivor"]))
                    self.assertEqual((two["pid"], one["pid"]), ([second.process.pid], [first.process.pid]))
                    self.assertEqual(self.resumed_elsewhere(second.url, token), 11.0)
                    status, error = second.stop(signal.SIGINT)
                    self.assertNotIn("Traceback", error)
                    self.assertIn(status, (0, 130))

    def resumed_elsewhere(self, url: str, token: bytes) -> float:
        """Go on with a saved stream in another process; return the running sum."""
        program = (
            "import sys, vgi_rpc, test_vgi_rpc as t\n"
            "with vgi_rpc.http_connect(t.Service, sys.argv[1]) as proxy:\n"
            "    session = vgi_rpc.resume(proxy, 'running', sys.stdin.buffer.read())\n"
            "    print(session.exchange(t.values(10.0)).batch.to_pydict()['sum'][0])\n"
        )
        command = [sys.executable, "-c", program, url]
        return float(subprocess.run(command, input=token, stdout=subprocess.PIPE, cwd=HERE, check=True).stdout)


class BadPeerTests(TestCase):
    """A client on a byte stream whose far end does not keep to the wire."""

    def client(self, answer: bytes) -> Any:
        """A proxy that finds *answer* in its pipe, whatever it asks."""
        (read, write), (drain, sink) = os.pipe(), os.pipe()
        with os.fdopen(write, "wb") as f:
            f.write(answer)
        self.addCleanup(os.close, drain)
        transport = vgi_rpc.PipeTransport(os.fdopen(read, "rb", 0), os.fdopen(sink, "wb", 0))
        return vgi_rpc.RpcConnection(Service, transport)

    def test_answers_that_are_none(self) -> None:
        result = vgi_rpc.rpc_methods(Service)["add"].result_schema
        good = pa.RecordBatch.from_arrays([pa.array([1.0])], schema=result)
        pointer = (good.slice(0, 0), {b"vgi_rpc.location": b"https://example.org/x"})
        for name, answer, parts in (
            ("nothing", b"", ()),
            ("text", b"Segmentation fault\n", ("Segmentation fault",)),
            ("half", ipc_bytes(result, good)[:-20], ()),
            ("zeros", b"\0" * 100, ()),
            ("no batch", ipc_bytes(result), ("result",)),
            ("pointer", ipc_bytes(result, pointer), ("external storage",)),
            ("a trillion rows", claiming_rows(10**12), ("rows",)),
        ):
            with self.subTest(name), self.client(answer) as proxy:
                with self.raises(TransportError, *parts):
                    proxy.add(1.0)
                with self.raises(TransportError, "closed"):
                    proxy.add(1.0)

    def test_results_of_another_type(self) -> None:
        for batch in (
            pa.RecordBatch.from_pydict({"result": ["x"]}),
            pa.RecordBatch.from_pydict({"other": [1.0]}),
            pa.RecordBatch.from_pydict({"result": [1.0, 2.0]}),
            pa.RecordBatch.from_pydict({"result": pa.array([None], pa.float64())}),
        ):
            with self.subTest(batch=batch), self.client(ipc_bytes(batch.schema, batch)) as proxy:
                with self.raises(TypeError, "add() result"):
                    proxy.add(1.0)

    def test_errors_of_other_servers(self) -> None:
        """Code, kind and details come from their own keys, else from log_extra, and nothing needs to be there."""
        empty = pa.RecordBatch.from_arrays([], schema=pa.schema([]))
        base = {b"vgi_rpc.log_level": b"EXCEPTION", b"vgi_rpc.log_message": b"Oops: text"}
        extra = {
            "exception_type": "E",
            "exception_message": "m",
            "error_code": "ABORTED",
            "error_kind": "k",
            "error_details": [{"@type": "x"}],
        }
        for metadata, expected in (
            (base, ("Oops", "Oops: text", "", "", [])),
            ({**base, b"vgi_rpc.log_extra": b"not json"}, ("Oops", "Oops: text", "", "", [])),
            ({**base, b"vgi_rpc.log_extra": json.dumps(extra).encode()}, ("E", "m", "ABORTED", "k", [{"@type": "x"}])),
            (
                {
                    **base,
                    b"vgi_rpc.log_extra": json.dumps(extra).encode(),
                    b"vgi_rpc.error_code": b"NOT_FOUND",
                    b"vgi_rpc.error_kind": b"own",
                    b"vgi_rpc.error_details": b'[{"@type": "y"}]',
                },
                ("E", "m", "NOT_FOUND", "own", [{"@type": "y"}]),
            ),
        ):
            with self.subTest(metadata=metadata), self.client(ipc_bytes(empty.schema, (empty, metadata))) as proxy:
                with self.assertRaises(RpcError) as caught:
                    proxy.add(1.0)
                error = caught.exception
                found = (error.error_type, error.error_message, error.error_code, error.error_kind, error.error_details)
                self.assertEqual(found, expected)


# ============================================================================
# 16. HTTP SERVING
# ============================================================================


class HttpSemanticsTests(TestCase):
    """Paths, statuses, headers, codings, budgets: the request function below both HTTP shells, through WSGI."""

    def test_paths_and_methods(self) -> None:
        client = wsgi_client()
        for method, path, status in (
            ("POST", "/Service/nobody", 404),
            ("POST", "/Nobody/add", 404),
            ("POST", "/Service", 404),
            ("POST", "/", 404),
            ("POST", "/Service/add/extra", 404),
            ("POST", "/Service/add/", 404),
            ("POST", "//Service/add", 404),
            ("POST", "/Service%2Fadd", 404),
            ("POST", "/Servic%65/add", 404),
            ("POST", "/Service/../Service/add", 404),
            ("POST", "/Service/%2e%2e", 404),
            ("POST", "/\xff/add", 404),
            ("POST", "/Service/add/init", 400),
            ("POST", "/Service/count", 400),
            ("POST", "/Service/add/exchange", 400),
            ("GET", "/Service/add", 405),
            ("GET", "/Service/count/init", 405),
            ("PUT", "/Service/add", 405),
            ("DELETE", "/Service/add", 405),
            ("GET", "/nowhere/at/all", 404),
            ("GET", "/Nobody/add", 404),
            ("POST", "/health", 405),
            ("GET", "/health", 200),
            ("HEAD", "/health", 200),
        ):
            with self.subTest(method=method, path=path):
                reply = client.send(method, path, [("Content-Type", ARROW)], GOOD if method == "POST" else b"")
                self.assertEqual(reply.status, status)
                if status == 405:
                    self.assertTrue(reply.headers["allow"])
                if path == "/Service/nobody":
                    self.assertEqual(reply.error["kind"], "method_not_implemented")
                if path == "/Nobody/add" and method == "POST":
                    self.assertEqual(reply.error["kind"], "protocol_not_supported")
        for path in ("/__session__", "/__upload_url__/init", "/__anything__/x"):
            for method in ("GET", "DELETE", "POST"):
                with self.subTest(method=method, path=path):
                    self.assertIn(client.send(method, path, [("Content-Type", ARROW)], b"").status, (400, 404, 405))

    def test_the_path_must_agree_with_the_request(self) -> None:
        client = wsgi_client()
        reply = client.post("/Service/nothing", GOOD)
        self.assertEqual((reply.status, reply.error["type"]), (400, "ProtocolError"))
        reply = client.post("/Service/add", request_bytes("add", {"a": 1.0, "b": 2.0}, protocol="DocService"))
        self.assertEqual((reply.status, reply.error["kind"]), (400, "protocol_not_supported"))
        reply = client.post("/Service/add", request_bytes("add", {"a": 1.0, "b": 2.0}, protocol=None))
        self.assertEqual(reply.status, 200)

    def test_health(self) -> None:
        reply = wsgi_client(make_server(server_id="0123456789ab")).send("GET", "/health", [], b"")
        self.assertEqual(json.loads(reply.body), {"status": "ok", "server_id": "0123456789ab", "protocol": "Service"})

    def test_headers_of_every_answer(self) -> None:
        client = wsgi_client(max_request_bytes=1_000_000, max_response_bytes=2_000_000)
        replies = {
            200: client.post("/Service/add", GOOD),
            400: client.post("/Service/add", b"x"),
            404: client.post("/Service/nobody", GOOD),
            405: client.send("GET", "/Service/add", [], b""),
            413: client.post("/Service/add", b"x" * 1_000_001),
            415: client.post("/Service/add", GOOD, content_type="text/plain"),
        }
        encodings = "zstd, gzip" if pa.Codec.is_available("zstd") else "gzip"
        for status, reply in replies.items():
            with self.subTest(status=status):
                self.assertEqual(reply.status, status)
                self.assertRegex(reply.headers["x-request-id"], "^[0-9a-f]{16}$")
                self.assertEqual(reply.headers["vgi-supported-encodings"], encodings)
                self.assertEqual(reply.headers["vgi-externalization-enabled"], "false")
                self.assertEqual(reply.headers["vgi-accept-max-response-bytes-support"], "true")
                self.assertEqual(reply.headers["vgi-max-request-bytes"], "1000000")
                self.assertEqual(reply.headers["vgi-max-response-bytes"], "2000000")
                if status not in (200, 405):
                    self.assertTrue(reply.error["text"])
        self.assertIn(ARROW, replies[415].error["text"])
        self.assertFalse([n for n in wsgi_client().send("GET", "/health", [], b"").headers if n.startswith("vgi-max")])

    def test_errors_of_methods_are_answers(self) -> None:
        reply = wsgi_client().post("/Service/fail", request_bytes("fail", {"how": "TypeError"}))
        self.assertEqual((reply.status, reply.headers["x-vgi-rpc-error"], reply.error["type"]), (200, "true", "TypeError"))
        self.assertNotIn("x-vgi-rpc-error", wsgi_client().post("/Service/add", GOOD).headers)

    def test_request_ids(self) -> None:
        client = wsgi_client()
        for sent, echoed in (
            ("abc-123", True),
            ("x" * 128, True),
            ("x" * 129, False),
            ("a b", False),
            ("\xff", False),
            ("x" * 5000, False),
        ):
            with self.subTest(sent=sent[:200]):
                got = client.post("/Service/add", GOOD, x_request_id=sent).headers["x-request-id"]
                self.assertEqual(got == sent, echoed)
                self.assertTrue(got)

    def test_content_types(self) -> None:
        for given, status in (
            (ARROW, 200),
            ("text/plain", 415),
            ("", 415),
            (f"{ARROW}; charset=x", 415),
            ("application/json; x", 415),
        ):
            with self.subTest(given=given):
                self.assertEqual(wsgi_client().post("/Service/add", GOOD, content_type=given).status, status)

    def test_request_codings(self) -> None:
        client = wsgi_client(max_request_bytes=1_000_000)
        packer = zlib.compressobj(wbits=31)
        packed = packer.compress(GOOD) + packer.flush()
        packer = zlib.compressobj(wbits=31)
        bomb = packer.compress(b"\0" * 50_000_000) + packer.flush()
        cases: list[Any] = [
            ("gzip", packed, 200),
            ("GZIP", packed, 200),
            ("identity", GOOD, 200),
            ("br", GOOD, 415),
            ("gzip, gzip", packed, 415),
            ("gzip", GOOD, 400),
            ("gzip", packed[:-9], 400),
            ("gzip", packed + b"x", 400),
            ("gzip", b"", 400),
            ("gzip", bomb, 413),
        ]
        if pa.Codec.is_available("zstd"):
            codec = pa.Codec("zstd")
            zstd = codec.compress(GOOD, asbytes=True)
            huge = codec.compress(b"\0" * 50_000_000, asbytes=True)
            cases += [("zstd", zstd, 200), ("zstd", GOOD, 400), ("zstd", zstd[:-3], 400), ("zstd", huge, 413)]
        for coding, body, status in cases:
            with self.subTest(coding=coding, size=len(body), status=status):
                self.assertEqual(client.post("/Service/add", body, content_encoding=coding).status, status)
        self.assertEqual(client.post("/Service/add", packed, x_vgi_content_encoding="gzip").status, 200)

    def test_answer_codings(self) -> None:
        client = wsgi_client()
        best = "zstd" if pa.Codec.is_available("zstd") else "gzip"
        for public, private, header, coding in (
            ("", "", None, None),
            ("br", "", None, None),
            ("gzip", "", "content-encoding", "gzip"),
            (f"{best}, gzip", "", "content-encoding", best),
            (f"gzip, {best}", "", "content-encoding", "gzip"),
            ("identity, gzip", "", None, None),
            ("gzip;q=0", "", None, None),
            ("gzip;q=0.5", "", "content-encoding", "gzip"),
            ("", "gzip", "x-vgi-content-encoding", "gzip"),
            ("br", "gzip", "x-vgi-content-encoding", "gzip"),
            ("gzip", "gzip", "content-encoding", "gzip"),
            ("gzip", "identity", None, None),
        ):
            with self.subTest(public=public, private=private):
                reply = client.post("/Service/add", GOOD, accept_encoding=public, x_vgi_accept_encoding=private)
                found = {k: v for k, v in reply.headers.items() if "content-encoding" in k}
                self.assertEqual(found, {header: coding} if header else {})
                self.assertEqual(read_streams(reply.body)[0][0][0].to_pydict(), {"result": [3.0]})

    def test_response_budgets(self) -> None:
        client = wsgi_client()
        body = request_bytes("echo_bytes", {"value": b"x" * 100_000})
        for budget, status in (
            ("65536", 200),
            ("1000000", 200),
            ("65535", 400),
            ("0", 400),
            ("abc", 400),
            ("", 200),
            ("065536", 400),
            ("+65536", 400),
            (str(2**53 - 1), 200),
            (str(2**53), 400),
            ("65536, 65536", 400),
        ):
            with self.subTest(budget=budget):
                reply = client.post("/Service/echo_bytes", body, vgi_accept_max_response_bytes=budget)
                self.assertEqual(reply.status, status)
                if budget == "65536":
                    error = reply.error
                    self.assertEqual((error["type"], reply.headers["x-vgi-rpc-error"]), ("ResponseTooLargeError", "true"))
                    self.assertRegex(error["text"], r"echo_bytes.*max_response_bytes \(\d+ > 65536\)")
                elif status == 200:
                    self.assertEqual(read_streams(reply.body)[0][0][0].to_pydict(), {"result": [b"x" * 100_000]})
        own = wsgi_client(max_response_bytes=70_000).post("/Service/echo_bytes", body, vgi_accept_max_response_bytes="1000000")
        self.assertIn("> 70000", own.error["text"])

    def test_the_budget_of_init_stays_with_the_stream(self) -> None:
        class Large:
            def data(self) -> Stream[LargeState]:
                return Stream(TEXT, LargeState(), INTEGERS)

        client = wsgi_client(RpcServer(Large, Large()))
        empty = pa.RecordBatch.from_arrays([], schema=pa.schema([]))
        for budget, later, fits in (
            ("65536", "", False),
            ("65536", "1000000", False),
            ("1000000", "", True),
            ("1000000", "65536", False),
        ):
            body = ipc_bytes(empty.schema, (empty, request_metadata("data", "Large")))
            reply = client.post("/Large/data/init", body, vgi_accept_max_response_bytes=budget)
            tokens = read_streams(reply.body)[-1][-1][1]
            turn = ipc_bytes(INTEGERS, (values(100_000).batch, tokens))
            answer = client.post("/Large/data/exchange", turn, vgi_accept_max_response_bytes=later)
            items = read_streams(answer.body)[-1]
            with self.subTest(budget=budget, later=later):
                if fits:
                    self.assertEqual(len(items[0][0].column(0)[0].as_py()), 100_000)
                else:
                    self.assertEqual(error_of(items)["type"], "ResponseTooLargeError")
                    self.assertFalse([m for _, m in items if STATE in m])

    def test_bodies_of_a_producer(self) -> None:
        client = wsgi_client()
        for limit, rows in ((0, [1][:0]), (2, [1, 0])):
            stream = RawStream(client, "count", {"limit": limit})
            data = [(b.num_rows, set(m) & {STATE, CALL}) for b, m in stream.items if b"vgi_rpc.log_level" not in m]
            with self.subTest(limit=limit):
                self.assertEqual([r for r, _ in data], rows)
                if rows:
                    self.assertEqual(data[-1][1], {STATE, CALL})
        reply = RawStream(client, "count", {"limit": 1}).exchange(pa.RecordBatch.from_arrays([], schema=pa.schema([])))
        self.assertEqual(read_streams(reply.body), [[]])
        once = RawStream(client, "once", {})
        self.assertEqual([b.num_rows for b, _ in once.items], [1])

    def test_ticks_reach_the_state_without_the_tokens(self) -> None:
        stream = RawStream(wsgi_client(), "ticks", {})
        empty = pa.RecordBatch.from_arrays([], schema=pa.schema([]))
        reply = stream.exchange(empty, tokens={**stream.tokens, b"own": b"1"})
        self.assertEqual(read_streams(reply.body)[0][0][0].to_pydict(), {"value": ['{"own": "1"}']})

    def test_cors(self) -> None:
        origin = "https://page.example"
        for allowed, given, expected in (
            (None, origin, None),
            ([origin], origin, origin),
            (origin, origin, origin),
            ([origin], "https://evil.example", None),
            ("*", origin, "*"),
        ):
            client = wsgi_client(cors_origins=allowed, authenticate=lambda request: (_ for _ in ()).throw(ValueError("no")))
            with self.subTest(allowed=allowed, given=given):
                asked = [
                    ("Origin", given),
                    ("Access-Control-Request-Method", "POST"),
                    ("Access-Control-Request-Headers", "Content-Type"),
                ]
                preflight = client.send("OPTIONS", "/Service/add", asked, b"")
                self.assertIn(preflight.status, (200, 204))
                refused = client.post("/Service/add", GOOD, origin=given)
                self.assertEqual(refused.status, 401)
                for reply in (preflight, refused):
                    self.assertEqual(reply.headers.get("access-control-allow-origin"), expected)
                if expected:
                    exposed = refused.headers["access-control-expose-headers"]
                    for name in (
                        "WWW-Authenticate",
                        "X-Request-ID",
                        "X-VGI-Content-Encoding",
                        "X-VGI-RPC-Error",
                        "VGI-Auth-Reason",
                        "VGI-Supported-Encodings",
                        "VGI-Accept-Max-Response-Bytes-Support",
                    ):
                        self.assertIn(name, exposed)
                    self.assertIn("POST", preflight.headers["access-control-allow-methods"])

    def test_prefixes(self) -> None:
        for prefix in ("/api", "api/", "/a/b"):
            client, base = wsgi_client(prefix=prefix), "/" + prefix.strip("/")
            with self.subTest(prefix=prefix):
                self.assertEqual(client.post(f"{base}/Service/add", GOOD).status, 200)
                self.assertEqual(client.send("GET", f"{base}/health", [], b"").status, 200)
                for path in ("/Service/add", f"{base}x/Service/add", f"{base}/{base}/Service/add"):
                    self.assertEqual(client.post(path, GOOD).status, 404)

    def test_options_that_do_not_exist(self) -> None:
        with self.raises(TypeError, "'token_keys'", "did you mean 'token_key'"):
            vgi_rpc.make_wsgi_app(make_server(), token_keys=KEY)
        for name in ("max_request_bytes", "max_response_bytes"):
            with self.subTest(name), self.raises(ValueError, name, "-1"):
                vgi_rpc.make_wsgi_app(make_server(), token_key=KEY, **{name: -1})
        with self.raises(ValueError, "16 bytes"):
            vgi_rpc.make_wsgi_app(make_server(), token_key=b"short")


@dataclass
class LargeState(ExchangeState):
    """Answers with a text as long as it is told."""

    def exchange(self, input: AnnotatedBatch, out: OutputCollector, ctx: CallContext) -> None:
        out.emit_pydict({"value": ["x" * input.batch.column(0)[0].as_py()]})


class AuthenticationTests(TestCase):
    """Who calls, over HTTP."""

    TOKENS: ClassVar = {"ada-token": AuthContext("static", True, "ada", {"role": "admin"})}

    def client(self, authenticate: Any) -> WsgiClient:
        """A client of a server that asks."""
        return wsgi_client(authenticate=authenticate)

    def test_credentials(self) -> None:
        client = self.client(vgi_rpc.bearer_authenticate_static(tokens=self.TOKENS))
        for given, reason in (
            ("", "missing_credential"),
            ("Basic YTpi", "missing_credential"),
            ("Bearer", "invalid_credential"),
            ("Bearer ", "invalid_credential"),
            ("Bearer  ada-token ", "invalid_credential"),
            ("Bearer ada-token x", "invalid_credential"),
            ("Bearer ada-toke", "invalid_credential"),
            ("Bearer ada-tokeN", "invalid_credential"),
            ("Bearer " + "x" * 100_000, "invalid_credential"),
            ("Bearer \xe9", "invalid_credential"),
        ):
            with self.subTest(given=given[:100]):
                reply = client.post("/Service/add", GOOD, authorization=given)
                self.assertEqual(reply.status, 401)
                body = json.loads(reply.body)
                self.assertEqual((body["error"], body["reason"]), ("unauthorized", reason))
                self.assertEqual(reply.headers["vgi-auth-reason"], reason)
                self.assertEqual(reply.headers["cache-control"], "no-store")
                self.assertTrue(reply.headers["www-authenticate"].startswith("Bearer"))
                self.assertNotIn("ada-token", reply.body.decode())
        for given in ("Bearer ada-token", "bearer ada-token"):
            self.assertEqual(client.post("/Service/add", GOOD, authorization=given).status, 200)
        self.assertEqual(client.send("GET", "/health", [], b"").status, 200)

    def test_what_callbacks_raise(self) -> None:
        def raising(exc: Exception) -> Any:
            def authenticate(request: Any) -> AuthContext:
                raise exc

            return authenticate

        for exc, status, reason in (
            (ValueError("why"), 401, "unauthorized"),
            (PermissionError("why"), 401, "unauthorized"),
            (AuthFailure(AuthReason.EXPIRED_CREDENTIAL, "why"), 401, "expired_credential"),
        ):
            reply = self.client(raising(exc)).post("/Service/add", GOOD)
            with self.subTest(exc=exc):
                self.assertEqual(
                    (reply.status, reply.headers["vgi-auth-reason"], json.loads(reply.body)["detail"]), (status, reason, "why")
                )
        for broken in (raising(KeyError("a secret of the server")), lambda request: "not a context"):
            with self.assertLogs("vgi_rpc", "ERROR"):
                reply = self.client(broken).post("/Service/add", GOOD)
            self.assertEqual(reply.status, 500)
            self.assertNotIn(b"secret", reply.body)

    def test_html_for_browsers_and_nothing_raw_in_it(self) -> None:
        def authenticate(request: Any) -> AuthContext:
            raise ValueError("<script>")

        reply = self.client(authenticate).post("/Service/add", GOOD, accept="text/html,*/*")
        self.assertEqual(reply.status, 401)
        self.assertTrue(reply.headers["content-type"].startswith("text/html"))
        self.assertNotIn(b"<script>", reply.body)

    def test_methods_know_who_calls(self) -> None:
        client = self.client(vgi_rpc.bearer_authenticate_static(tokens=self.TOKENS))
        with vgi_rpc.http_connect(Service, client=client, headers={"Authorization": "Bearer ada-token"}) as proxy:
            facts = proxy.context()
            self.assertEqual((facts["principal"], facts["domain"]), ("ada", "static"))
            with proxy.running() as session:
                self.assertEqual(session.exchange(values(1.0)).batch.num_rows, 1)
        self.assertEqual(vgi_rpc.current_auth(), AuthContext.anonymous())

    def test_clients_learn_why(self) -> None:
        client = self.client(vgi_rpc.bearer_authenticate_static(tokens=self.TOKENS))
        with vgi_rpc.http_connect(Service, client=client) as proxy, self.assertRaises(vgi_rpc.AuthenticationError) as caught:
            proxy.add(1.0)
        error = caught.exception
        self.assertIs(error.reason, AuthReason.MISSING_CREDENTIAL)
        self.assertEqual((error.error_code, isinstance(error, RpcError)), ("UNAUTHENTICATED", True))

    def test_headers_may_change(self) -> None:
        given = iter(["Bearer wrong", "Bearer wrong", "Bearer ada-token"])
        client = self.client(vgi_rpc.bearer_authenticate_static(tokens=self.TOKENS))
        with vgi_rpc.http_connect(Service, client=client, headers=lambda: {"Authorization": next(given)}) as proxy:
            with self.assertRaises(vgi_rpc.AuthenticationError):
                proxy.add(1.0)
            self.assertEqual(proxy.add(1.0), 3.0)

    def test_chains(self) -> None:
        def header(request: Any) -> AuthContext:
            name = request.get_header("X-User")
            if name is None:
                raise AuthFailure(AuthReason.MISSING_CREDENTIAL)
            if name == "banned":
                raise PermissionError("banned")
            return AuthContext("header", True, name)

        chain = vgi_rpc.chain_authenticate(vgi_rpc.bearer_authenticate_static(tokens=self.TOKENS), header)
        client = self.client(chain)
        for headers, status, reason in (
            ({"authorization": "Bearer ada-token"}, 200, None),
            ({"x_user": "bob"}, 200, None),
            ({"authorization": "Bearer wrong", "x_user": "bob"}, 200, None),
            ({}, 401, "missing_credential"),
            ({"authorization": "Bearer wrong"}, 401, "invalid_credential"),
            ({"x_user": "banned"}, 401, "unauthorized"),
        ):
            with self.subTest(headers=headers):
                reply = client.post("/Service/add", GOOD, **headers)
                self.assertEqual((reply.status, reply.headers.get("vgi-auth-reason")), (status, reason))
        with self.assertRaises(ValueError):
            vgi_rpc.chain_authenticate()


def http_head(*lines: str, start: str = "POST /Service/add HTTP/1.1", host: str = "Host: x") -> bytes:
    """A request head with these further lines."""
    given = [start, *([host] if host else []), f"Content-Type: {ARROW}", *lines]
    return ("\r\n".join(given) + "\r\n\r\n").encode("latin-1")


def error_or(call: Any) -> Any:
    """What *call* returns, or what it raised in as many parts."""
    try:
        return call()
    except vgi_rpc.ProtocolError as exc:
        return ("error", str(exc), exc.http_status, None)


LENGTH = f"Content-Length: {len(GOOD)}"
CHUNKED = b"%x\r\n" % len(GOOD) + GOOD + b"\r\n0\r\n\r\n"
ASKED = http_head(LENGTH) + GOOD
FRAMING = {  # name: raw request, accepted statuses; after any but 200, 404, 405 and 415 the server hangs up
    "good": (ASKED, (200,)),
    "no length": (http_head() + GOOD, (411,)),
    "two equal lengths": (http_head(LENGTH, LENGTH) + GOOD, (400,)),
    "two lengths": (http_head(LENGTH, "Content-Length: 1") + GOOD, (400,)),
    "length with plus": (http_head(f"Content-Length: +{len(GOOD)}") + GOOD, (400,)),
    "negative length": (http_head("Content-Length: -1") + GOOD, (400,)),
    "length with underscore": (http_head("Content-Length: 1_0") + GOOD, (400,)),
    "length with a space": (http_head("Content-Length: 4 4") + GOOD, (400,)),
    "length in hex": (http_head("Content-Length: 0x4") + GOOD, (400,)),
    "length in other digits": (http_head("Content-Length: \xb2") + GOOD, (400,)),
    "length of 20 digits": (http_head("Content-Length: " + "9" * 20), (413,)),
    "length over the limit": (http_head("Content-Length: 1000001"), (413,)),
    "chunked": (http_head("Transfer-Encoding: chunked") + CHUNKED, (200,)),
    "chunked with an extension": (http_head("Transfer-Encoding: chunked") + CHUNKED.replace(b"\r\n", b";a=b\r\n", 1), (200,)),
    "chunked and a length": (http_head("Transfer-Encoding: chunked", LENGTH) + CHUNKED, (400,)),
    "another transfer coding": (http_head("Transfer-Encoding: gzip, chunked") + CHUNKED, (400, 501)),
    "negative chunk": (http_head("Transfer-Encoding: chunked") + b"-1\r\n", (400,)),
    "chunk in 0x": (http_head("Transfer-Encoding: chunked") + b"0x10\r\n", (400,)),
    "chunk of a gigabyte": (http_head("Transfer-Encoding: chunked") + b"40000000\r\n", (413,)),
    "chunk without its end": (http_head("Transfer-Encoding: chunked") + b"2\r\nabXX0\r\n\r\n", (400,)),
    "10,000 trailers": (http_head("Transfer-Encoding: chunked") + CHUNKED[:-2] + b"a: b\r\n" * 10_000 + b"\r\n", (400,)),
    "bare LF": (ASKED.replace(b"Host: x\r\n", b"Host: x\n"), (400,)),
    "bare CR": (ASKED.replace(b"Host: x", b"Host: x\ry"), (400,)),
    "space before the colon": (ASKED.replace(b"Host:", b"Host :"), (400,)),
    "NUL": (ASKED.replace(b"Host: x", b"Host: x\0"), (400,)),
    "folded header": (ASKED.replace(b"Host: x\r\n", b"Host: x\r\n y\r\n"), (400,)),
    "header without a colon": (ASKED.replace(b"Host: x\r\n", b"Host: x\r\nnonsense\r\n"), (400,)),
    "no host": (http_head(LENGTH, host="") + GOOD, (400,)),
    "two hosts": (http_head(LENGTH, "Host: y") + GOOD, (400,)),
    "HTTP/0.9": (b"GET /health\r\n\r\n", (400,)),
    "HTTP/2 preface": (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", (505,)),
    "HTTP/3.0": (http_head(start="GET /health HTTP/3.0"), (505,)),
    "no such version": (http_head(start="GET /health HTTP/one"), (400,)),
    "lower-case method": (http_head(LENGTH, start="post /Service/add HTTP/1.1") + GOOD, (400, 405)),
    "TLS hello": (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\0" * 50, (400,)),
    "absolute form": (http_head(start="GET http://x/health HTTP/1.1"), (200, 400)),
    "long target": (http_head(start="GET /" + "x" * 70_000 + " HTTP/1.1"), (414,)),
    "target not ASCII": (http_head(start="GET /\xff HTTP/1.1"), (400, 404)),
    "too many headers": (http_head(*[f"x-{i}: y" for i in range(200)], start="GET /health HTTP/1.1"), (431,)),
    "a header of 200 kB": (http_head("x: " + "y" * 200_000, start="GET /health HTTP/1.1"), (431,)),
    "two authorizations": (http_head(LENGTH, "Authorization: a", "Authorization: b") + GOOD, (400,)),
    "two budgets": (http_head(LENGTH, *["VGI-Accept-Max-Response-Bytes: 65536"] * 2) + GOOD, (400,)),
    "two codings": (http_head(LENGTH, "Content-Encoding: gzip", "Content-Encoding: gzip") + GOOD, (400, 415)),
    "no content type": (ASKED.replace(f"Content-Type: {ARROW}\r\n".encode(), b""), (415,)),
    "not found": (http_head(start="GET /%6d HTTP/1.1"), (404,)),
}


class RawHttp:
    """A socket to an HTTP server, and a reader of answers that trusts nothing."""

    def __init__(self, port: int) -> None:
        self.socket = socket.create_connection(("127.0.0.1", port), WATCHDOG_SECONDS / 2)
        self.file = self.socket.makefile("rb")

    def send(self, data: bytes) -> None:
        """Send; a server that has already hung up is no failure."""
        with contextlib.suppress(ConnectionError):
            self.socket.sendall(data)

    def answer(self, head_only: bool = False) -> Reply:
        """Read one answer; its framing must be right."""
        try:
            version, status, _ = self.file.readline().decode("latin-1").split(" ", 2)
        except ConnectionError:
            return Reply(0, {}, b"")
        assert version == "HTTP/1.1", version
        headers: dict[str, str] = {}
        for line in iter(self.file.readline, b"\r\n"):
            name, _, value = line.decode("latin-1").rstrip("\r\n").partition(": ")
            assert name.lower() not in headers, name
            headers[name.lower()] = value
        body = b"" if head_only else self.file.read(int(headers["content-length"]))
        return Reply(int(status), headers, body)

    def ended(self) -> bool:
        """Whether the server hangs up."""
        try:
            return self.file.read(1) == b""
        except ConnectionError:
            return True

    def __enter__(self) -> "RawHttp":
        return self

    def __exit__(self, *exc: object) -> None:
        self.file.close()
        self.socket.close()


class HttpFramingTests(TestCase):
    """The HTTP/1.1 server by raw bytes."""

    @classmethod
    def setUpClass(cls) -> None:
        _, cls.port, _ = in_thread(vgi_rpc.serve_http, make_server(), token_key=KEY, max_request_bytes=1_000_000)

    def test_table(self) -> None:
        for name, (data, statuses) in FRAMING.items():
            with self.subTest(name), RawHttp(self.port) as raw:
                raw.send(data)
                reply = raw.answer()
                self.assertIn(reply.status, statuses)
                self.assertTrue(reply.headers["x-request-id"])
                self.assertTrue(reply.headers["date"])
                if reply.status in (400, 413, 414, 431, 501, 505):
                    self.assertLess(len(reply.body.splitlines()), 200)
                    if name not in ("two budgets", "two codings"):
                        self.assertEqual(reply.headers.get("connection"), "close")
                        self.assertTrue(raw.ended())
                if reply.status == 413:
                    self.assertEqual(reply.headers["vgi-max-request-bytes"], "1000000")
        with RawHttp(self.port) as raw:
            raw.send(ASKED)
            self.assertEqual(raw.answer().status, 200)

    def test_heads_alone(self) -> None:
        """The parser without a socket, over the same table: an error of its own, or a head."""
        for name, (data, _) in FRAMING.items():
            head = data[: data.index(b"\r\n\r\n") + 4] if b"\r\n\r\n" in data else b""
            if head:
                with self.subTest(name), contextlib.suppress(vgi_rpc.ProtocolError):
                    parsed = vgi_rpc.parse_http_head(head)
                    self.assertEqual(len(parsed.start), 3)
                    self.assertEqual(parsed.headers.get("host", "x").split(",")[0], "x")
        parsed = vgi_rpc.parse_http_head(b"GET / HTTP/1.1\r\nA: 1\r\nb:  2 \r\na: 3\r\n\r\n")
        self.assertEqual(parsed.headers, {"a": "1, 3", "b": "2"})
        self.assertEqual(set(parsed.repeated), {"a"})

    def test_heads_one_after_the_other(self) -> None:
        """What is known of a head never shows in those that follow it on their connection."""
        rng = random.Random(11)
        lines = ["X-Request-ID: a1", "X-Request-ID: a b", "x-request-id: c", "Date: Sun, 06 Nov 1994 08:49:37 GMT", "Date: x", "DATE: y"]
        lines += ["Content-Length: 5", "Content-Length: 71", "Content-Length: +5", "Content-Length: 5 ", "content-length: 5"]
        lines += ["X: Content-Length: 5", "X-Content-Length: 5", "Content-Length : 5", "Host: y", "Accept: a", "", "\x00: b"]
        last, same = http_head("Date: Sun, 06 Nov 1994 08:49:37 GMT", LENGTH), 0

        class Prepared(vgi_rpc.ByteChannel):
            def _receive(self, size: int) -> bytes:
                return last

        reader = vgi_rpc.HeadReader(Prepared())
        for _ in range(20_000):
            if rng.random() < 0.7:
                last = http_head(*(rng.choice(lines) for _ in range(rng.randrange(4))))
                last = last[: last.index(b"\r\n\r\n") + 4]
            memories = set()
            for raw in (last, last.replace(b"Length: 5\r\n\r\n", b"Length: 71\r\n\r\n")):
                last = raw
                found, wanted = error_or(reader.read), error_or(lambda: vgi_rpc.parse_http_head(last))
                self.assertEqual(found[:3], wanted[:3], raw)
                memories.add(id(found[3]))
            same += len(memories) == 1
        self.assertGreater(same, 1000)

    def test_a_known_head_changes_no_answer(self) -> None:
        for name, (data, statuses) in FRAMING.items():
            with self.subTest(name), RawHttp(self.port) as raw:
                for given, accepted in ((ASKED, (200,)), (ASKED, (200,)), (data, statuses)):
                    raw.send(given)
                    self.assertIn(raw.answer().status, accepted)

    def test_each_request_of_a_connection_is_authenticated(self) -> None:
        asked: list[str] = []

        def authenticate(request: Any) -> AuthContext:
            asked.append(request.get_header("x-request-id"))
            if len(asked) == 3:
                raise ValueError("over")
            return AuthContext("t", True, f"caller {len(asked)}")

        _, port, _ = in_thread(vgi_rpc.serve_http, make_server(), token_key=KEY, authenticate=authenticate)
        body = request_bytes("context", {})
        with RawHttp(port) as raw:
            for number, status in ((1, 200), (2, 200), (3, 401)):
                raw.send(http_head(f"X-Request-ID: r{number}", f"Content-Length: {len(body)}", start="POST /Service/context HTTP/1.1") + body)
                reply = raw.answer()
                self.assertEqual((reply.status, reply.headers["x-request-id"]), (status, f"r{number}"))
                self.assertEqual(f"caller {number}".encode() in reply.body, status == 200)
        self.assertEqual(asked, ["r1", "r2", "r3"])

    def test_keep_alive_and_pipelining(self) -> None:
        with RawHttp(self.port) as raw:
            raw.send(ASKED * 3)
            for _ in range(3):
                self.assertEqual(raw.answer().status, 200)
            raw.send(http_head(LENGTH, start="POST /Service/nobody HTTP/1.1") + GOOD)
            self.assertEqual(raw.answer().status, 404)
        for line, start, closes in (
            ("Connection: close", "POST /Service/add HTTP/1.1", True),
            ("Connection: Keep-Alive, CLOSE", "POST /Service/add HTTP/1.1", True),
            ("X: y", "POST /Service/add HTTP/1.0", True),
        ):
            with self.subTest(line=line, start=start), RawHttp(self.port) as raw:
                raw.send(http_head(LENGTH, line, start=start) + GOOD)
                self.assertEqual((raw.answer().status, raw.ended()), (200, closes))

    def test_a_body_that_was_refused_is_not_the_next_request(self) -> None:
        smuggled = http_head(start="GET /health HTTP/1.1")
        with RawHttp(self.port) as raw:
            raw.send(
                http_head(f"Content-Length: {len(smuggled)}", start="POST /Service/add HTTP/1.1").replace(
                    ARROW.encode(), b"text/plain"
                )
                + smuggled
            )
            self.assertEqual(raw.answer().status, 415)
            self.assertTrue(raw.ended())

    def test_one_byte_at_a_time(self) -> None:
        with RawHttp(self.port) as raw:
            raw.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            for byte in ASKED:
                raw.send(bytes([byte]))
            self.assertEqual(raw.answer().status, 200)

    def test_head_and_continue(self) -> None:
        with RawHttp(self.port) as raw:
            raw.send(http_head(start="HEAD /health HTTP/1.1"))
            reply = raw.answer(head_only=True)
            self.assertEqual(reply.status, 200)
            self.assertGreater(int(reply.headers["content-length"]), 0)
            raw.send(http_head(LENGTH, "Expect: 100-continue"))
            self.assertEqual(raw.file.readline() + raw.file.readline(), b"HTTP/1.1 100 Continue\r\n\r\n")
            raw.send(GOOD)
            self.assertEqual(raw.answer().status, 200)

    def test_slow_silent_and_vanished_clients(self) -> None:
        _, port, _ = in_thread(vgi_rpc.serve_http, make_server(), token_key=KEY, read_timeout=0.2, keep_alive_timeout=0.2)
        with RawHttp(port) as silent, RawHttp(port) as half_head, RawHttp(port) as half_body, RawHttp(port) as vanished:
            half_head.send(ASKED[:20])
            half_body.send(ASKED[:-5])
            vanished.send(ASKED[:-5])
            vanished.socket.shutdown(socket.SHUT_WR)
            with RawHttp(port) as busy:
                busy.send(ASKED)
                self.assertEqual(busy.answer().status, 200)
            for raw in (silent, half_head):
                self.assertTrue(raw.ended())
            self.assertEqual((half_body.answer().status, half_body.ended()), (408, True))
            vanished.file.read()

    def test_a_cap_on_connections(self) -> None:
        _, port, _ = in_thread(vgi_rpc.serve_http, make_server(), token_key=KEY, max_connections=2)
        with contextlib.ExitStack() as stack:
            for _ in range(2):
                held = stack.enter_context(RawHttp(port))
                held.send(ASKED)
                self.assertEqual(held.answer().status, 200)
            with RawHttp(port) as refused:
                refused.send(ASKED)
                reply = refused.answer()
                self.assertEqual((reply.status, reply.headers["retry-after"]), (503, "1"))
            with RawHttp(port) as asking:
                asking.send(http_head(start="GET /health HTTP/1.1"))
                self.assertEqual(asking.answer().status, 200)

    def test_a_client_that_leaves_in_a_call(self) -> None:
        """The method learns of it, and its thread is free again."""
        started = threading.Event()

        class Starts(Recorder):
            def on_dispatch_start(self, record: Any) -> int:
                started.set()
                return 0

        server = make_server()
        server.add_hook(Starts())
        _, port, _ = in_thread(vgi_rpc.serve_http, server, token_key=KEY)
        with RawHttp(port) as raw:
            body = request_bytes("wait", {"seconds": 1000.0})
            raw.send(http_head(f"Content-Length: {len(body)}", start="POST /Service/wait HTTP/1.1") + body)
            self.assertTrue(started.wait(WATCHDOG_SECONDS / 4))
            with RawHttp(port) as other:
                other.send(ASKED)
                self.assertEqual(other.answer().status, 200)
        self.assertTrue(server.drain(WATCHDOG_SECONDS / 4))


# ============================================================================
# 17. HTTP CLIENT
# ============================================================================

HEALTHY = b"HTTP/1.1 200 OK\r\nVGI-Accept-Max-Response-Bytes-Support: true\r\nContent-Length: 0\r\n\r\n"


class BadHttpServer:
    """Answers ``/health`` as it should, and everything else with given bytes; then it hangs up."""

    def __init__(self, answer: bytes) -> None:
        self.answer, self.requests = answer, 0
        self.listening = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.listening.getsockname()[1]}"
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def _run(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                connected, _ = self.listening.accept()
                with connected, connected.makefile("rb") as source, contextlib.suppress(OSError):
                    connected.settimeout(WATCHDOG_SECONDS / 4)
                    while self._answer(connected, source):
                        pass

    def _answer(self, connected: socket.socket, source: Any) -> bool:
        start = source.readline()
        length = 0
        for line in iter(source.readline, b"\r\n"):
            if not line:
                return False
            if line.lower().startswith(b"content-length:"):
                length = int(line.partition(b":")[2])
        source.read(length)
        if start.startswith(b"HEAD"):
            connected.sendall(HEALTHY)
            return True
        self.requests += 1
        connected.sendall(self.answer)
        connected.shutdown(socket.SHUT_WR)
        source.read()
        return False

    def __enter__(self) -> "BadHttpServer":
        return self

    def __exit__(self, *exc: object) -> None:
        self.listening.shutdown(socket.SHUT_RDWR)
        self.listening.close()
        self.thread.join(WATCHDOG_SECONDS / 4)


def http_answer(body: bytes, *lines: str, status: str = "200 OK", length: bool = True) -> bytes:
    """An HTTP answer."""
    given = [f"HTTP/1.1 {status}", f"Content-Type: {ARROW}", *lines, *([f"Content-Length: {len(body)}"] if length else [])]
    return "\r\n".join(given).encode() + b"\r\n\r\n" + body


def _gzip_bomb() -> bytes:
    packer = zlib.compressobj(wbits=31)
    return packer.compress(b"\0" * 50_000_000) + packer.flush()


RESULT = vgi_rpc.rpc_methods(Service)["add"].result_schema
THREE = ipc_bytes(RESULT, pa.RecordBatch.from_arrays([pa.array([3.0])], schema=RESULT))
BAD_ANSWERS = {  # name: what a server sends, what the error's text holds
    "nothing": (b"", ""),
    "garbage": (b"\x00\x01\x02", ""),
    "text": (b"I am not an HTTP server\r\n\r\n", "HTTP"),
    "endless headers": (b"HTTP/1.1 200 OK\r\n" + b"x: y\r\n" * 20_000, ""),
    "one endless header": (b"HTTP/1.1 200 OK\r\nx: " + b"y" * 200_000, ""),
    "half a head": (b"HTTP/1.1 200 OK\r\nContent-Le", ""),
    "half a body": (http_answer(THREE)[:-9], ""),
    "not Arrow": (http_answer(b"x" * 100), ""),
    "empty": (http_answer(b""), ""),
    "half a stream": (http_answer(THREE[:-30]), ""),
    "no batch": (http_answer(ipc_bytes(RESULT)), "result"),
    "a page": (http_answer(b"<h1>Bad Gateway</h1>", status="502 Bad Gateway").replace(ARROW.encode(), b"text/html"), "502"),
    "a length of 10 GB": (http_answer(b"", f"Content-Length: {10**10}", length=False), "65536"),
    "no length and no end": (http_answer(b"\0" * 2_000_000, length=False), "65536"),
    "a large body": (http_answer(b"\0" * 2_000_000), "65536"),
    "large chunks": (http_answer(b"fffffff\r\n", "Transfer-Encoding: chunked", length=False), "65536"),
    "many chunks": (
        http_answer(b"400\r\n" + b"\0" * 1024 + b"\r\n", "Transfer-Encoding: chunked", length=False)
        + (b"400\r\n" + b"\0" * 1024 + b"\r\n") * 100,
        "65536",
    ),
    "a wrong chunk": (http_answer(b"zz\r\n", "Transfer-Encoding: chunked", length=False), "chunk"),
    "two lengths": (http_answer(THREE, "Content-Length: 3"), ""),
    "length and chunks": (http_answer(THREE, "Transfer-Encoding: chunked"), ""),
    "a negative length": (http_answer(b"", "Content-Length: -1", length=False), ""),
    "a gzip bomb": (http_answer(_gzip_bomb(), "Content-Encoding: gzip"), "65536"),
    "broken gzip": (http_answer(THREE, "Content-Encoding: gzip"), ""),
    "an unknown coding": (http_answer(THREE, "Content-Encoding: br"), "br"),
    "a redirect elsewhere": (
        http_answer(b"", "Location: http://elsewhere.invalid/", status="307 Temporary Redirect"),
        "elsewhere",
    ),
    "a redirect in circles": (http_answer(b"", "Location: /again", status="308 Permanent Redirect"), ""),
    "a trillion rows": (http_answer(claiming_rows(10**12)), ""),
}


class HttpClientTests(TestCase):
    """The client against servers that do not keep to the rules, and its own rules."""

    def test_bad_answers(self) -> None:
        for name, (answer, part) in BAD_ANSWERS.items():
            with self.subTest(name), BadHttpServer(answer) as server:
                with vgi_rpc.http_connect(Service, server.url, accepted_max_response_bytes=65536, timeout=20.0) as proxy:
                    with self.raises(RpcError, part) as caught:
                        proxy.add(1.0)
                    self.assertNotIsInstance(caught.exception, vgi_rpc.DeadlineExceededError)
                    if "redirect" not in name:  # and a connection that ends without a byte is dialled once more
                        self.assertIn(server.requests, (1, 2) if name == "nothing" else (1,))

    def test_a_good_answer_by_the_same_means(self) -> None:
        chunked = b"".join(b"%x\r\n%c\r\n" % (1, byte) for byte in THREE) + b"0\r\n\r\n"
        for answer in (
            http_answer(THREE),
            http_answer(THREE, length=False),
            http_answer(chunked, "Transfer-Encoding: chunked", length=False),
            b"HTTP/1.1 100 Continue\r\n\r\n" + http_answer(THREE),
        ):
            with self.subTest(answer=answer[:200]), BadHttpServer(answer) as server:
                with vgi_rpc.http_connect(Service, server.url, timeout=20.0) as proxy:
                    self.assertEqual(proxy.add(1.0), 3.0)

    def test_a_401_is_never_read_as_arrow(self) -> None:
        for lines, body, reason in (
            ((), b'{"error":"unauthorized","reason":"expired_credential"}', AuthReason.EXPIRED_CREDENTIAL),
            (("VGI-Auth-Reason: insufficient_scope",), b"not json", AuthReason.INSUFFICIENT_SCOPE),
            (("VGI-Auth-Reason: from_the_future",), THREE, AuthReason.UNAUTHORIZED),
        ):
            with self.subTest(reason=reason), BadHttpServer(http_answer(body, *lines, status="401 Unauthorized")) as server:
                with vgi_rpc.http_connect(Service, server.url, timeout=20.0) as proxy:
                    with self.assertRaises(vgi_rpc.AuthenticationError) as caught:
                        proxy.add(1.0)
                    self.assertIs(caught.exception.reason, reason)

    def test_several_data_batches_before_the_token(self) -> None:
        """Older servers send a producer's batches in one answer; zero-row data among them is data."""
        batches = [pa.RecordBatch.from_pydict({"value": v}, schema=INTEGERS) for v in ([1], [], [2])]

        class Old(WsgiClient):
            def send(self, method: str, path: str, headers: Any, body: bytes, deadline: Any = None, limit: Any = None) -> Reply:
                if method == "POST":
                    return Reply(200, {"content-type": ARROW}, ipc_bytes(INTEGERS, *batches))
                return super().send(method, path, headers, body)

        with vgi_rpc.http_connect(Service, client=Old(wsgi_client().app)) as proxy:
            self.assertEqual([b.batch.to_pydict()["value"] for b in proxy.count(3)], [[1], [], [2]])

    def test_urls(self) -> None:
        for url in ("ftp://x", "x", "http://", "http://x?y", "http://u@x", "http://x:99999", "http://a b", None):
            with self.subTest(url=url), self.assertRaises(ValueError):
                vgi_rpc.http_connect(Service, url).__enter__()
        with self.raises(ValueError, "65536"):
            vgi_rpc.http_connect(Service, "http://x", accepted_max_response_bytes=5).__enter__()

    def test_headers_cannot_be_smuggled(self) -> None:
        with BadHttpServer(http_answer(THREE)) as server:
            with vgi_rpc.http_connect(Service, server.url, headers={"X": "a\r\nY: b"}) as proxy, self.assertRaises(ValueError):
                proxy.add(1.0)
            self.assertEqual(server.requests, 0)

    def test_a_connection_that_the_server_had_closed_is_reopened(self) -> None:
        _, port, _ = in_thread(vgi_rpc.serve_http, make_server(), token_key=KEY, keep_alive_timeout=0.05)
        with vgi_rpc.http_connect(Service, f"http://127.0.0.1:{port}") as proxy:
            for _ in range(3):
                self.assertEqual(proxy.add(1.0), 3.0)
                threading.Event().wait(0.1)

    def test_a_proxy_of_the_environment_is_used(self) -> None:
        with BadHttpServer(http_answer(THREE)) as proxy_server:
            with mock.patch.dict(os.environ, {"http_proxy": proxy_server.url, "no_proxy": ""}):
                with vgi_rpc.http_connect(Service, "http://never.invalid", timeout=20.0) as proxy:
                    self.assertEqual(proxy.add(1.0), 3.0)

    def test_a_server_limit_is_heeded_before_sending(self) -> None:
        with vgi_rpc.http_connect(Service, client=wsgi_client(max_request_bytes=1000)) as proxy:
            with self.raises(RpcError, "RequestTooLargeError", "1000"):
                proxy.echo_bytes(os.urandom(5000))
            self.assertEqual(proxy.add(1.0), 3.0)

    def test_an_answer_over_the_budget(self) -> None:
        with vgi_rpc.http_connect(Service, client=wsgi_client(), accepted_max_response_bytes=65536) as proxy:
            with self.raises(RpcError, "ResponseTooLargeError", "> 65536") as caught:
                proxy.echo_bytes(b"x" * 100_000)
            self.assertEqual(caught.exception.error_code, "RESOURCE_EXHAUSTED")
            self.assertEqual(proxy.echo_bytes(b"x"), b"x")


@unittest.skipUnless(importlib.util.find_spec("gunicorn"), "gunicorn is not installed")
class GunicornTests(TestCase):
    """Two processes behind one port, one shared key."""

    def test_a_stream_lands_on_both_processes(self) -> None:
        environment = {**os.environ, "VGI_RPC_TOKEN_KEY": KEY.decode(), "PYTHONWARNINGS": "default"}
        command = [sys.executable, "-m", "gunicorn", "-w", "2", "-b", "127.0.0.1:0", "test_vgi_rpc:gunicorn_app"]
        process = subprocess.Popen(command, cwd=HERE, env=environment, stderr=subprocess.PIPE, text=True)
        self.addCleanup(process.communicate)
        self.addCleanup(process.kill)
        assert process.stderr is not None
        found = None
        while found is None:
            line = process.stderr.readline()
            self.assertTrue(line, "gunicorn ended")
            found = re.search(r"http://127\.0\.0\.1:\d+", line)
        drain = threading.Thread(target=process.stderr.read, daemon=True)
        drain.start()
        served, total = set(), 0.0
        with vgi_rpc.http_connect(Service, found[0], timeout=30.0) as proxy:
            # Which process takes a turn is the kernel's choice: while one stream goes on, another keeps a process busy.
            with proxy.running("both") as session, vgi_rpc.http_connect(Service, found[0]) as other:
                for turn in range(200):
                    busy = threading.Thread(target=other.wait, kwargs={"seconds": 0.02}) if turn % 20 == 0 else None
                    if busy:
                        busy.start()
                    row = session.exchange(values(float(turn))).batch.to_pydict()
                    if busy:
                        busy.join()
                    served.add(row["pid"][0])
                    total = row["sum"][0]
        process.terminate()
        drain.join(WATCHDOG_SECONDS / 4)
        self.assertEqual(total, sum(range(200)))
        self.assertEqual(len(served), 2)


# ============================================================================
# THE REFERENCE: the public vgi-rpc package on the other end
# ============================================================================

REFERENCE = os.environ.get("VGI_RPC_REFERENCE_PYTHON", "")

# One program for both packages: a service written for the one runs on the other.
INTEROP = """
import json, sys
from dataclasses import dataclass, field
from enum import Enum
from typing import Protocol

import pyarrow as pa
from vgi_rpc import (
    AnnotatedBatch, ArrowSerializableDataclass, CallContext, ExchangeState, Level, OutputCollector, ProducerState, RpcError,
    Stream, StreamState, connect, http_connect, run_server,
)

try:
    from vgi_rpc import tcp_connect, unix_connect
except ImportError:
    from vgi_rpc.rpc import tcp_connect, unix_connect


class Color(Enum):
    RED = "r"
    BLUE = "b"


@dataclass(frozen=True)
class Point(ArrowSerializableDataclass):
    x: int
    color: Color
    names: list[str]
    table: dict[str, float]
    note: str | None = None


@dataclass(frozen=True)
class Header(ArrowSerializableDataclass):
    total: int
    text: str


SCHEMA = pa.schema([pa.field("value", pa.float64())])


@dataclass
class Count(ProducerState):
    limit: int
    at: int = 0

    def produce(self, out: OutputCollector, ctx: CallContext) -> None:
        if self.at >= self.limit:
            out.finish()
            return
        out.client_log(Level.INFO, f"at {self.at}")
        out.emit_pydict({"value": [float(self.at)]})
        self.at += 1


@dataclass
class Sum(ExchangeState):
    seen: list[float] = field(default_factory=list)
    color: Color = Color.RED

    def exchange(self, input: AnnotatedBatch, out: OutputCollector, ctx: CallContext) -> None:
        self.seen.extend(input.batch.column("value").to_pylist())
        if sum(self.seen) < 0:
            raise ValueError("negative")
        out.emit_pydict({"value": [sum(self.seen)]})

    def on_cancel(self, ctx: CallContext) -> None:
        CANCELLED.append(len(self.seen))


CANCELLED = []


class Interop(Protocol):
    def echo(self, point: Point, many: list[Point], flags: frozenset[int], maybe: int | None = None) -> Point: ...
    def numbers(self, values: dict[str, list[int]]) -> dict[str, list[int]]: ...
    def nothing(self) -> None: ...
    def fail(self) -> int: ...
    def cancelled(self) -> int: ...
    def count(self, limit: int) -> Stream[StreamState]: ...
    def count_with_header(self, limit: int) -> Stream[StreamState, Header]: ...
    def header_fails(self) -> Stream[StreamState, Header]: ...
    def total(self) -> Stream[StreamState]: ...


class InteropImpl:
    def echo(self, point: Point, many: list[Point], flags: frozenset[int], maybe: int | None = None) -> Point:
        assert many == [point, point] and flags == frozenset({1, 2}), (many, flags)
        return point

    def numbers(self, values: dict[str, list[int]]) -> dict[str, list[int]]:
        return values

    def nothing(self) -> None:
        return None

    def fail(self) -> int:
        raise LookupError("as asked")

    def cancelled(self) -> int:
        return len(CANCELLED)

    def count(self, limit: int) -> Stream[Count]:
        return Stream(output_schema=SCHEMA, state=Count(limit))

    def count_with_header(self, limit: int) -> Stream[Count, Header]:
        return Stream(output_schema=SCHEMA, state=Count(limit), header=Header(limit, "text"))

    def header_fails(self) -> Stream[Count, Header]:
        raise KeyError("no header")

    def total(self) -> Stream[Sum]:
        return Stream(output_schema=SCHEMA, state=Sum(), input_schema=SCHEMA)


def values(*numbers):
    return AnnotatedBatch.from_pydict({"value": list(numbers)}, schema=SCHEMA)


def error_of(call):
    try:
        call()
    except RpcError as exc:
        return [exc.error_type, "as asked" in exc.error_message, exc.error_code]
    return None


def exercise(p, logs):
    point = Point(7, Color.BLUE, ["a", "b"], {"k": 1.5}, None)
    facts = {}
    facts["unary"] = p.echo(point=point, many=[point, point], flags=frozenset({1, 2})) == point
    facts["map"] = p.numbers(values={"a": [1, 2], "b": []})
    facts["none"] = p.nothing()
    facts["error"] = error_of(lambda: p.fail())
    facts["producer"] = [b.batch.to_pydict()["value"] for b in p.count(limit=3)]
    facts["logs"] = [m.message for m in logs]
    session = p.count_with_header(limit=2)
    facts["header"] = repr(session.header)
    facts["header rows"] = sum(b.batch.num_rows for b in session)
    facts["header error"] = error_of(lambda: p.header_fails())[0]
    with p.total() as session:
        facts["exchange"] = [session.exchange(values(float(i), 1.0)).batch.to_pydict()["value"][0] for i in range(4)]
        facts["exchange error"] = error_of(lambda: session.exchange(values(-100.0)))[0]
    before = p.cancelled()
    session = p.total()
    session.exchange(values(1.0))
    session.cancel()
    facts["cancelled"] = p.cancelled() - before
    facts["after"] = p.numbers(values={})
    return facts


CONNECT = {
    "pipe": lambda where, **o: connect(Interop, where.split("|"), **o),
    "unix": lambda where, **o: unix_connect(Interop, where, **o),
    "tcp": lambda where, **o: tcp_connect(Interop, where.rpartition(":")[0], int(where.rpartition(":")[2]), **o),
    "http": lambda where, **o: http_connect(Interop, where, **o),
}

if __name__ == "__main__":
    if sys.argv[1] == "client":
        logs = []
        with CONNECT[sys.argv[2]](sys.argv[3], on_log=logs.append) as proxy:
            print(json.dumps(exercise(proxy, logs)))
    else:
        del sys.argv[1]
        run_server(Interop, InteropImpl())
"""

EXPECTED = {
    "unary": True,
    "map": {"a": [1, 2], "b": []},
    "none": None,
    "error": ["LookupError", True, "UNKNOWN"],
    "producer": [[0.0], [1.0], [2.0]],
    "logs": ["at 0", "at 1", "at 2"],
    "header": "Header(total=2, text='text')",
    "header rows": 2,
    "header error": "KeyError",
    "exchange": [1.0, 3.0, 6.0, 10.0],
    "exchange error": "ValueError",
    "cancelled": 1,
    "after": {},
}


@unittest.skipUnless(REFERENCE, "VGI_RPC_REFERENCE_PYTHON names no interpreter with the public vgi-rpc package")
class ReferenceTests(TestCase):
    """The same program on this file and on the public package, each as client of the other."""

    @classmethod
    def setUpClass(cls) -> None:
        cls.folder = tempfile.mkdtemp()
        cls.addClassCleanup(shutil.rmtree, cls.folder)
        cls.program = os.path.join(cls.folder, "interop.py")
        pathlib.Path(cls.program).write_text(INTEROP, encoding="utf-8")

    def python(self, ours: bool) -> tuple[list[str], dict[str, str]]:
        """The command of the program with this file or with the package, and its environment."""
        environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
        environment.update(VGI_RPC_TOKEN_KEY=KEY.decode(), PYTHONWARNINGS="ignore")
        if ours:
            environment["PYTHONPATH"] = str(HERE)
        return [sys.executable if ours else REFERENCE, self.program], environment

    @contextlib.contextmanager
    def server(self, ours: bool, *arguments: str) -> Iterator[str]:
        """A listening server; gives what stands behind the first colon of its discovery line."""
        command, environment = self.python(ours)
        process = subprocess.Popen(
            [*command, "server", *arguments], stdout=subprocess.PIPE, env=environment, cwd=self.folder, text=True
        )
        try:
            assert process.stdout is not None
            yield process.stdout.readline().strip().partition(":")[2]
        finally:
            process.kill()
            process.communicate()

    def run_client(self, ours: bool, kind: str, where: str) -> Any:
        """Run the client; return what it found."""
        command, environment = self.python(ours)
        done = subprocess.run(
            [*command, "client", kind, where],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=environment,
            cwd=self.folder,
            text=True,
            timeout=WATCHDOG_SECONDS / 2,
            check=False,
        )
        self.assertEqual(done.returncode, 0, done.stderr[-3000:])
        return json.loads(done.stdout.splitlines()[-1])

    def both_ways(self, kind: str, *arguments: str) -> None:
        """Our client and their server, then the other way round."""
        for ours in (True, False):
            with self.subTest(client="ours" if ours else "theirs"), self.server(not ours, *arguments) as where:
                where = f"http://127.0.0.1:{where}" if kind == "http" else where
                self.assertEqual(self.run_client(ours, kind, where), EXPECTED)

    def test_subprocess(self) -> None:
        for ours in (True, False):
            command, environment = self.python(not ours)
            # The worker inherits the client's environment: its module path must be its own.
            path = [f"PYTHONPATH={environment.get('PYTHONPATH', '')}"]
            with self.subTest(client="ours" if ours else "theirs"):
                self.assertEqual(self.run_client(ours, "pipe", "|".join(["env", *path, *command, "server"])), EXPECTED)

    def test_unix(self) -> None:
        self.both_ways("unix", "--unix", os.path.join(self.folder, "socket"))

    def test_tcp(self) -> None:
        self.both_ways("tcp", "--tcp", "127.0.0.1:0")

    def test_http(self) -> None:
        self.both_ways("http", "--http")


# ============================================================================
# THE FILE ITSELF
# ============================================================================

SOURCE = HERE / "vgi_rpc.py"
BANNER = re.compile(r"^# (\d+)\. ([A-Z ]+?) \.{3,} uses (nothing|[0-9, -]+)$", re.M)
SECTIONS = {
    1: "CONSTANTS",
    2: "ERRORS",
    3: "LOG MESSAGES",
    4: "BATCHES",
    5: "PLAIN ROWS",
    6: "TYPES",
    7: "STREAM STATE",
    8: "METHODS",
    9: "REQUESTS AND REPLIES",
    10: "INTROSPECTION",
    11: "TOKENS",
    12: "SERVER CORE",
    13: "BYTE TRANSPORTS",
    14: "CLIENT",
    15: "BYTE SERVING",
    16: "HTTP SERVING",
    17: "HTTP CLIENT",
    18: "ENTRY POINTS",
    19: "COMMAND LINE",
}


def type_checking_only(node: ast.AST) -> bool:
    """Whether *node* is ``if typing.TYPE_CHECKING``."""
    return (
        isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test) and not ast.unparse(node.test).startswith("not")
    )


def run_time_nodes(node: ast.AST) -> Iterator[ast.AST]:
    """All nodes below *node* but annotations (never evaluated) and what is for type checkers alone."""
    yield node
    for name, value in ast.iter_fields(node):
        if name in ("annotation", "returns"):
            continue
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.AST):
                if type_checking_only(child):
                    for other in child.orelse:  # type: ignore[attr-defined]
                        yield from run_time_nodes(other)
                else:
                    yield from run_time_nodes(child)


def import_time_nodes(node: ast.AST) -> Iterator[ast.AST]:
    """As `run_time_nodes`, without the bodies of functions."""
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
        for part in [*node.decorator_list, *node.args.defaults, *[d for d in node.args.kw_defaults if d]]:
            yield from run_time_nodes(part)
    elif isinstance(node, ast.ClassDef):
        for part in [*node.decorator_list, *node.bases, *[k.value for k in node.keywords]]:
            yield from run_time_nodes(part)
        for statement in node.body:
            yield from import_time_nodes(statement)
    elif isinstance(node, ast.Lambda):
        return
    elif not type_checking_only(node):
        yield node
        for name, value in ast.iter_fields(node):
            if name not in ("annotation", "returns"):
                for child in value if isinstance(value, list) else [value]:
                    if isinstance(child, ast.AST):
                        yield from import_time_nodes(child)


class ModuleTests(TestCase):
    """The file as its readers find it."""

    @classmethod
    def setUpClass(cls) -> None:
        cls.text = SOURCE.read_text(encoding="utf-8")
        cls.tree = ast.parse(cls.text)
        cls.starts = [(cls.text.count("\n", 0, m.start()) + 1, int(m[1])) for m in BANNER.finditer(cls.text)]

    def section(self, line: int) -> int:
        """The number of the section in which *line* stands."""
        return max((number for start, number in self.starts if start <= line), default=0)

    def definitions(self) -> dict[str, int]:
        """Top-level names and the section that defines them."""
        found: dict[str, int] = {}
        for node in self.tree.body:
            names = [node.name] if isinstance(node, (ast.FunctionDef, ast.ClassDef)) else []
            targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
            for target in targets:
                names += [n.id for n in ast.walk(target) if isinstance(n, ast.Name)]
            for name in names:
                found.setdefault(name, self.section(node.lineno))
        return found

    def test_banners(self) -> None:
        found = {int(m[1]): m[2] for m in BANNER.finditer(self.text)}
        self.assertEqual(list(found), list(range(1, len(found) + 1)))
        for number, name in found.items():
            self.assertEqual(name, SECTIONS[number])
        self.assertGreaterEqual(len(found), 18)
        grep = re.findall(r"^# [0-9]*\. [A-Z]", self.text, re.M)
        self.assertEqual(len(grep), len(found))
        for match in BANNER.finditer(self.text):
            if match[3] != "nothing":
                with self.subTest(match[0]):
                    self.assertLess(max(map(int, re.findall(r"\d+", match[3]))), int(match[1]))

    def test_no_reference_upwards(self) -> None:
        defined = self.definitions()
        wrong = set()
        for statement in self.tree.body:
            here = self.section(statement.lineno)
            for node in run_time_nodes(statement):
                if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load) and defined.get(node.id, 0) > here:
                    wrong.add(f"line {node.lineno} (section {here}) uses {node.id} of section {defined[node.id]}")
        self.assertEqual(sorted(wrong), [])

    def test_nothing_is_used_at_import_before_it_is_defined(self) -> None:
        line_of = {}
        for node in self.tree.body:
            for name in [node.name] if isinstance(node, (ast.FunctionDef, ast.ClassDef)) else []:
                line_of[name] = node.lineno
        for statement in self.tree.body:
            for node in import_time_nodes(statement):
                if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load) and node.id in line_of:
                    self.assertLess(line_of[node.id], node.lineno, node.id)

    def test_public_names(self) -> None:
        names = vgi_rpc.__all__
        self.assertEqual(len(names), len(set(names)))
        defined = self.definitions()
        for name in names:
            with self.subTest(name):
                self.assertIn(name, defined)
                self.assertFalse(name.startswith("_"))
                thing = getattr(vgi_rpc, name)
                if isinstance(thing, types.FunctionType) or (isinstance(thing, type) and not typing.get_origin(thing)):
                    self.assertTrue((thing.__doc__ or "").strip() and not thing.__doc__.startswith(f"{name}("), "no docstring")
        self.assertTrue(vgi_rpc.__doc__ and vgi_rpc.__version__)

    def test_public_methods_have_docstrings(self) -> None:
        missing = []
        for node in self.tree.body:
            if isinstance(node, ast.ClassDef) and node.name in vgi_rpc.__all__:
                for member in node.body:
                    if isinstance(member, ast.FunctionDef) and not member.name.startswith("_"):
                        inherited = any(
                            getattr(getattr(base, member.name, None), "__doc__", None)
                            for base in getattr(vgi_rpc, node.name).__mro__[1:]
                        )
                        if (
                            not ast.get_docstring(member)
                            and not inherited
                            and not any("setter" in ast.unparse(d) for d in member.decorator_list)
                        ):
                            missing.append(f"{node.name}.{member.name}")
        self.assertEqual(missing, [])

    def test_imports(self) -> None:
        allowed = set(sys.stdlib_module_names) | {"pyarrow", "__future__"}
        for node in run_time_nodes(self.tree):
            if isinstance(node, ast.Import):
                self.assertLessEqual({alias.name.partition(".")[0] for alias in node.names}, allowed)
            elif isinstance(node, ast.ImportFrom):
                self.assertEqual(node.level, 0)
                self.assertIn((node.module or "").partition(".")[0], allowed)

    def run_python(self, program: str, cwd: Any, *arguments: str) -> str:
        """Run a program in a fresh interpreter, without this folder on its path."""
        command = [sys.executable, "-c", program, *arguments]
        environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONDEVMODE")}
        done = subprocess.run(
            command, cwd=cwd, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, check=False
        )
        self.assertEqual(done.returncode, 0, done.stderr)
        return done.stdout

    def test_it_works_under_another_name(self) -> None:
        program = """
import carried, sys

class Calculator:
    def add(self, a: float, b: float = 1.0) -> float:
        return a + b

with carried.serve_pipe(Calculator, Calculator()) as proxy:
    assert proxy.add(a=2.0) == 3.0
    assert carried.introspect(proxy).protocol_name == "Calculator"
with carried.http_connect(Calculator, client=carried.make_sync_client(carried.RpcServer(Calculator, Calculator()))) as proxy:
    assert proxy.add(a=2.0) == 3.0
assert "vgi_rpc" not in sys.modules
print("carried")
"""
        with tempfile.TemporaryDirectory() as folder:
            shutil.copy(SOURCE, os.path.join(folder, "carried.py"))
            self.assertEqual(self.run_python(program, folder), "carried\n")

    def test_what_an_import_loads(self) -> None:
        program = """
import sys, pyarrow, pyarrow.ipc
before = set(sys.modules)
import vgi_rpc, threading
lazy = {"http.server", "http.client", "argparse", "subprocess", "ssl", "urllib.request", "asyncio", "email", "multiprocessing"}
assert not lazy & (set(sys.modules) - before), lazy & (set(sys.modules) - before)
assert threading.active_count() == 1
print("lazy")
"""
        self.assertEqual(self.run_python(program, HERE), "lazy\n")

    def test_the_example_of_the_docstring_runs(self) -> None:
        block = re.search(r"::\n\n((?:    .*\n|\n)+)", vgi_rpc.__doc__ or "")
        assert block is not None
        self.run_block(re.sub(r"^    ", "", block[1], flags=re.M), "docstring")

    def test_the_blocks_of_the_readme_run(self) -> None:
        text = (HERE / "README.md").read_text(encoding="utf-8")
        blocks = re.findall(r"^```python\n(.*?)^```", text, re.M | re.S)
        self.assertTrue(blocks, "README.md has no Python block")
        with tempfile.TemporaryDirectory() as folder:
            here = os.getcwd()
            os.chdir(folder)
            try:
                for number, block in enumerate(blocks):
                    with self.subTest(block=block[:200]):
                        self.run_block(block, f"readme_{number}")
            finally:
                os.chdir(here)

    def run_block(self, block: str, name: str) -> None:
        """Run a block as a module of its own, since annotations are resolved there; what it prints is dropped."""
        module = types.ModuleType(name)
        with mock.patch.dict(sys.modules, {name: module}), contextlib.redirect_stdout(io.StringIO()):
            exec(compile(block, name, "exec", dont_inherit=True), vars(module))

    def test_settings_of_the_project_agree(self) -> None:
        text = (HERE / "pyproject.toml").read_text(encoding="utf-8")
        self.assertIn('requires-python = ">=3.10"', text)
        self.assertIn("pyarrow>=14.0.1", text)
        head = self.text[: self.text.index('"""')]
        self.assertIn('# requires-python = ">=3.10"', head)
        self.assertIn("# SPDX-License-Identifier: MIT", head)
        self.assertIn("pyarrow>=14.0.1", head)


# ============================================================================
# 19. COMMAND LINE
# ============================================================================


FILE = str(HERE / "vgi_rpc.py")


PROGRAM = [sys.executable, FILE]
CLI_WORKER = shlex.join([*PROGRAM, "serve", "--stdio"])
LIMIT = 60.0  # a watchdog, not a measure
CSV = "day,rain,wind,sky\n" + "".join(f"{i},{i / 2},{'' if i % 7 == 0 else i},{'sun' if i % 2 else 'fog'}\n" for i in range(250))
APP = """
    from typing import Protocol
    import vgi_rpc

    class Calculator(Protocol):
        def multiply(self, a: float, b: float) -> float:
            '''Multiply.'''

    class CalculatorImpl:
        def multiply(self, a: float, b: float) -> float:
            return a * b

    class Plain:
        def fail(self, text: str) -> str:
            raise ValueError(text)

        def shout(self, text: str, ctx: vgi_rpc.CallContext) -> str:
            ctx.client_log(vgi_rpc.Level.WARN, "shouting")
            return text.upper()

        def same(self) -> bool:
            import sys
            return sys.modules["vgi_rpc"] is sys.modules["__main__"]

    class Needy(CalculatorImpl):
        def __init__(self, factor: float) -> None:
            self.factor = factor

    def make():
        return vgi_rpc.RpcServer(Calculator, CalculatorImpl())
"""


def environment(**more: str) -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if not k.startswith("VGI_RPC_") and k not in ("NO_COLOR", "TERM")}
    return {**kept, "TERM": "xterm", "PYTHONPATH": str(HERE), **more}


def run(*words: str, given: bytes | None = None, cwd: str | None = None, **more: str) -> subprocess.CompletedProcess[bytes]:
    stdin = {"input": given} if given is not None else {"stdin": subprocess.DEVNULL}
    return subprocess.run([*PROGRAM, *words], capture_output=True, timeout=LIMIT, cwd=cwd, env=environment(**more), **stdin)


@contextlib.contextmanager
def serving(*words: str, cwd: str | None = None, **more: str):
    """(process, its discovery line) of a server."""
    child = subprocess.Popen(
        [*PROGRAM, "serve", "--announce", *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=cwd, env=environment(**more)
    )
    with child:
        try:
            assert child.stdout is not None and child.stderr is not None
            ready, _, _ = select.select([child.stdout], [], [], LIMIT)
            line = child.stdout.readline().decode().strip() if ready else ""
            if not line:
                child.kill()
                raise AssertionError(f"no discovery line; stderr: {child.stderr.read().decode()}")
            yield child, line
        finally:
            child.terminate()  # not kill: `--reload` has a child of its own to take along
            try:
                child.wait(LIMIT)
            except subprocess.TimeoutExpired:
                child.kill()


@contextlib.contextmanager
def http_server(*words: str, **more: str):
    with serving("--port", "0", *words, **more) as (_, line):
        yield f"http://127.0.0.1:{line.partition(':')[2]}"


def on_terminal(*words: str, rows: int = 24, **more: str) -> tuple[int, str]:
    """(exit code, all that a person sees)."""
    import pty

    main, side = pty.openpty()
    child = subprocess.Popen([*PROGRAM, *words], stdin=side, stdout=side, stderr=side, env=environment(**more))
    os.close(side)
    seen = b""
    deadline = time.monotonic() + LIMIT
    try:
        while time.monotonic() < deadline and select.select([main], [], [], LIMIT)[0]:
            try:
                data = os.read(main, 65_536)
            except OSError:
                break
            if not data:
                break
            seen += data
        return child.wait(LIMIT), seen.decode()
    finally:
        os.close(main)
        if child.poll() is None:
            child.kill()
            child.wait()


class CliTests(unittest.TestCase):
    maxDiff = None

    @classmethod
    def setUpClass(cls) -> None:
        cls.folder = tempfile.mkdtemp()
        cls.addClassCleanup(shutil.rmtree, cls.folder)
        for name, text in (("app.py", textwrap.dedent(APP)), ("weather.csv", CSV)):
            with open(os.path.join(cls.folder, name), "w", encoding="utf-8") as f:
                f.write(text)
        cls.stack = contextlib.ExitStack()
        cls.addClassCleanup(cls.stack.close)
        cls.url = cls.stack.enter_context(http_server())
        cls.app = cls.stack.enter_context(http_server("app.py:Plain", cwd=cls.folder))

    def path(self, name: str) -> str:
        return os.path.join(self.folder, name)

    def ok(self, *words: str, **more: object) -> str:
        done = run(*words, **more)  # type: ignore[arg-type]
        self.assertEqual(done.returncode, 0, done.stderr.decode())
        return done.stdout.decode()

    def fails(self, code: int, pattern: str, *words: str, **more: object) -> str:
        done = run(*words, **more)  # type: ignore[arg-type]
        said = done.stderr.decode()
        self.assertEqual(done.returncode, code, said)
        self.assertRegex(said, pattern)
        self.assertNotIn("Traceback", said)
        return said


class CliCallTests(CliTests):
    def lines(self, *words: str, **more: object) -> list[object]:
        return [json.loads(line) for line in self.ok("call", *words, **more).splitlines()]

    def test_unary_in_every_format(self) -> None:
        for kind, wanted in {"auto": "3.0\n", "json": "3.0\n", "ndjson": "3.0\n", "table": "3\n", "csv": "result\n3.0\n"}.items():
            with self.subTest(kind):
                self.assertEqual(self.ok("call", self.url, "add", "a=1", "b:=2", "-f", kind), wanted)
        data = run("call", self.url, "add", "a=1", "b=2", "-f", "arrow").stdout
        self.assertEqual(pa.ipc.open_stream(data).read_all().to_pylist(), [{"result": 3.0}])

    def test_header_in_every_format(self) -> None:
        header = {"__header__": {"start": 1, "batches": 2}}
        words = ("call", self.url, "countdown", "start=1", "-f")
        self.assertEqual([json.loads(x) for x in self.ok(*words, "ndjson").splitlines()], [header, {"n": 1}, {"n": 0}])
        self.assertEqual(json.loads(self.ok(*words, "json")), [header, {"n": 1}, {"n": 0}])
        self.assertEqual(self.ok(*words, "csv").splitlines(), ["# " + json.dumps(header), "n", "1", "0"])
        self.assertRegex(self.ok(*words, "table"), r"^Header:\n  start    1\n  batches  2\nn\n1\n0\n$")
        source = pa.py_buffer(run(*words, "arrow").stdout)
        stream = pa.BufferReader(source)
        self.assertEqual(pa.ipc.open_stream(stream).read_all().to_pylist(), [header["__header__"]])
        self.assertEqual(pa.ipc.open_stream(stream).read_all().to_pylist(), [{"n": 1}, {"n": 0}])

    def test_where(self) -> None:
        self.assertEqual(self.lines(CLI_WORKER, "add", "a=1", "b=2"), [3.0])
        with serving("--tcp", "0") as (_, line):
            self.assertEqual(self.lines(line.replace("TCP", "tcp"), "Demo.add", "a=1", "b=2"), [3.0])
        path = self.path("socket")
        with serving("--unix", path) as (_, line):
            self.assertEqual(line, f"UNIX:{path}")
            self.assertEqual(self.lines(f"unix:{path}", "add", "a=1", "b=2"), [3.0])

    def test_parameters(self) -> None:
        with open(self.path("a.json"), "w") as f:
            f.write('{"a": 1, "b": 5}')
        with open(self.path("b.txt"), "w") as f:
            f.write("7\n")
        for words, given, wanted in (
            (["-j", '{"a": 1, "b": 2}'], None, 3.0),
            (["-j", "@" + self.path("a.json"), "b=6"], None, 7.0),
            (["-j", "-"], b'{"a": 1, "b": 3}', 4.0),
            (["a=1", "-f", "json", "b=@" + self.path("b.txt")], None, 8.0),
            (["a=-1", "b:=1e3"], None, 999.0),
            (["a=3"], None, 4.0),
        ):
            with self.subTest(words):
                self.assertEqual(self.lines(self.url, "add", *words, given=given), [wanted])
        self.assertEqual(len(self.lines(self.url, "countdown", "start=0", "pause:=null")), 2)
        for words, pattern in (
            (["a=1", "bb=2"], r"no parameter 'bb'; did you mean 'b'\?\nhint: usage: .* add a=FLOAT64 \[b=FLOAT64\]"),
            (["b=1"], r"add\(\) needs a\nhint: usage: "),
            (["a=x", "b=1"], "'a': expected float64, got 'x'"),
            (['a:="x"', "b=1"], "argument a: expected float64, got str"),
            (["a:=[", "b=1"], "not JSON"),
            (["a"], "expected key=value"),
            (["a=@/no/such"], "/no/such: No such file"),
            (["-j", "[1]"], "expected a JSON object, got list"),
        ):
            with self.subTest(words):
                self.fails(2, pattern, "call", self.url, "add", *words)

    def test_exchange_over_http_and_a_subprocess(self) -> None:
        want = {"count": 250, "mean": sum(i / 2 for i in range(250)) / 250, "min": 0.0, "max": 124.5}
        for where in (self.url, CLI_WORKER):
            got = self.lines(where, "statistics", "-i", self.path("weather.csv"))
            self.assertEqual([row["day"]["count"] for row in got], [100, 200, 250])  # type: ignore[index]
            self.assertEqual(list(got[-1]), ["day", "rain", "wind"])  # type: ignore[call-overload]
            self.assertEqual(got[-1]["rain"], want)  # type: ignore[index]
            self.assertEqual(got[-1]["wind"]["count"], sum(i % 7 != 0 for i in range(250)))  # type: ignore[index]

    def test_input_formats(self) -> None:
        table = pa.table({"x": [1.0, None, 3.0, 5.0], "s": ["a", 'b\n"', None, "d"]})
        with pa.OSFile(self.path("t.arrows"), "wb") as f, pa.ipc.new_stream(f, table.schema) as writer:
            writer.write_table(table, 2)
        with pa.OSFile(self.path("t.arrow"), "wb") as f, pa.ipc.new_file(f, table.schema) as writer:
            writer.write_table(table, 2)
        with open(self.path("t.ndjson"), "w") as f:
            f.write("".join(json.dumps(row) + "\n" for row in table.to_pylist()).rstrip("\n"))
        with open(self.path("t.csv"), "w") as f:
            f.write('\ufeffx,s\n1,a\n,"b\n"""\n3,\n\n5,d')
        for name, counts in {"t.arrows": [1, 3], "t.arrow": [1, 3], "t.ndjson": [3], "t.csv": [3]}.items():
            with self.subTest(name):
                got = self.lines(self.url, "statistics", "-i", self.path(name))
                self.assertEqual([row["x"]["count"] for row in got], counts)  # type: ignore[index]
                by_one = self.lines(self.url, "statistics", "-i", self.path(name), "--rows", "1")
                self.assertEqual([row["x"]["count"] for row in by_one], [1, 1, 2, 3])  # type: ignore[index]
        self.fails(2, "is an exchange|takes batches", "call", self.url, "statistics")
        self.fails(2, "takes no input", "call", self.url, "add", "-i", self.path("t.csv"))
        self.fails(2, "no/such: No such file", "call", self.url, "statistics", "-i", "no/such")
        self.fails(2, "row|JSON", "call", self.url, "statistics", "-i", "-", given=b'{"x": 1}\n[2]\n')

    def test_pipe_is_read_as_it_comes(self) -> None:
        child = subprocess.Popen(
            [*PROGRAM, "call", self.url, "statistics", "-i", "-"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment()
        )
        with child:
            assert child.stdin is not None and child.stdout is not None
            for data, wanted in ((b"x\n1.5\n", 1), (b"2\n3\n", 3)):
                child.stdin.write(data)
                child.stdin.flush()
                self.assertTrue(select.select([child.stdout], [], [], LIMIT)[0])
                self.assertEqual(json.loads(child.stdout.readline())["x"]["count"], wanted)
            child.stdin.close()
            self.assertEqual(child.wait(LIMIT), 0)

    def test_limit_and_output(self) -> None:
        for name in ("o.csv", "o.arrow", "o.json", "o.txt"):
            self.assertEqual(self.ok("call", self.url, "countdown", "start=9", "--limit", "2", "-o", self.path(name)), "")
        with open(self.path("o.csv")) as f:
            self.assertEqual(f.read().splitlines()[1:], ["n", "9", "8"])
        with open(self.path("o.json")) as f:
            self.assertEqual(json.load(f)[1:], [{"n": 9}, {"n": 8}])
        with open(self.path("o.txt")) as f:
            self.assertEqual(len(f.readlines()), 3)

    def test_resume_producer_and_exchange(self) -> None:
        mark = self.path("mark")
        first = self.lines(self.url, "countdown", "start=5", "--limit", "2", "--resume", mark)
        self.assertEqual(os.stat(mark).st_mode & 0o777, 0o600)
        rest = self.lines(self.url, "countdown", "start=5", "--resume", mark)
        self.assertEqual([r["n"] for r in first[1:] + rest], [5, 4, 3, 2, 1, 0])  # type: ignore[index]
        self.assertFalse(os.path.exists(mark))
        words = (self.url, "statistics", "-i", self.path("weather.csv"), "--resume", mark)
        whole = self.lines(*words[:4])
        got = self.lines(*words, "--limit", "1")
        self.fails(2, "not where a call of Demo.countdown stopped", "call", self.url, "countdown", "start=5", "--resume", mark)
        self.assertEqual(got + self.lines(*words), whole)
        self.fails(2, "--resume is for streams over HTTP", "call", CLI_WORKER, "countdown", "start=5", "--resume", mark)

    def test_killed_call_goes_on(self) -> None:
        mark, out = self.path("killed"), self.path("killed.ndjson")
        words = [*PROGRAM, "call", self.url, "countdown", "start=30", "pause=0.05", "--resume", mark, "-o", out]
        child = subprocess.Popen(words, env=environment())
        with child:
            deadline = time.monotonic() + LIMIT
            while not os.path.exists(mark) and time.monotonic() < deadline:
                time.sleep(0.02)
            child.kill()
        self.ok("call", self.url, "countdown", "start=30", "--resume", mark, "-o", out)
        with open(out) as f:
            numbers = [json.loads(line).get("n") for line in f][1:]
        self.assertEqual(sorted(set(numbers), reverse=True), list(range(30, -1, -1)))
        self.assertLessEqual(len(numbers), 32)  # at most the one batch that was written and not yet remembered comes twice

    def test_logs_and_tracebacks_with_v(self) -> None:
        done = run("call", self.app, "shout", "text=a", "-v")
        self.assertEqual((done.stdout, done.stderr), (b'"A"\n', b"[WARN] shouting\n"))
        self.assertEqual(run("call", self.app, "shout", "text=a").stderr, b"")
        self.fails(1, r"^error: ValueError: no\n$", "call", self.app, "fail", "text=no")
        self.assertIn(b"Traceback", run("call", self.app, "fail", "text=no", "-v").stderr)
        error = json.loads(run("call", self.app, "fail", "text=no", "-f", "json").stderr)["error"]
        self.assertEqual((error["error_type"], error["error_message"], error["exit_code"]), ("ValueError", "no", 1))

    def test_debug_shows_shapes(self) -> None:
        said = run("call", self.url, "countdown", "start=0", "--debug").stderr.decode()
        self.assertRegex(said, r"> request: 1 rows of \(start: int64 not null.*\n< header: 1 rows.*\n< answer: 1 rows of \(n: int64\)")

    def test_exit_codes(self) -> None:
        self.fails(2, "no method 'ad'; did you mean 'add'", "call", self.url, "ad")
        self.fails(2, "METHOD is missing\nhint: Demo has add, countdown, statistics", "call", self.url)
        self.fails(2, "no command 'cal'; did you mean 'call'", "cal")
        self.fails(2, "usage:", "call", self.url, "add", "--nope")
        self.fails(2, "expected a URL.*\nhint: http://localhost:1", "call", "localhost:1", "add")
        self.fails(3, "cannot connect.*\nhint: is the server running", "call", "http://127.0.0.1:1", "add")
        self.fails(3, "cannot connect", "call", "unix:/no/such", "add")
        self.fails(3, "cannot connect", "call", "tcp:127.0.0.1:1", "add")
        self.fails(3, "cannot be started", "call", "no-such-program", "add")
        self.fails(3, "exited with status 7", "call", shlex.join([sys.executable, "-c", "raise SystemExit(7)"]), "add")
        self.fails(5, "DeadlineExceeded|no answer", "call", self.url, "countdown", "start=3", "pause=9", "--timeout", "0.3")
        self.fails(1, "StatusError|expected numeric", "call", self.url, "statistics", "-i", "-", given=b"s\na\n")

    def test_authentication_and_limits(self) -> None:
        for name, text in (("tokens", "# known\nann s3cret\n"), ("token", "s3cret\n"), ("wrong", "other\n")):
            with open(self.path(name), "w") as f:
                f.write(text)
        with http_server("--bearer-file", self.path("tokens"), "--max-request-bytes", "64K") as url:
            self.fails(4, "missing_credential.*\nhint: send credentials", "call", url, "add", "a=1", "b=1")
            self.fails(4, "invalid_credential", "call", url, "add", "--bearer-file", self.path("wrong"))
            self.assertEqual(self.ok("call", url, "add", "a=1", "b=1", "--bearer-file", self.path("token")), "2.0\n")
            self.assertEqual(self.ok("call", url, "add", "a=1", "b=1", "-H", "Authorization: Bearer s3cret"), "2.0\n")
            with open(self.path("big.csv"), "w") as f:
                f.write("x,s\n" + "".join(f"{i},{os.urandom(40).hex()}\n" for i in range(3000)))
            words = ("-i", self.path("big.csv"), "--rows", "3000", "--bearer-file", self.path("token"))
            self.fails(4, "RequestTooLarge", "call", url, "statistics", *words)
        self.fails(2, "for HTTP", "call", CLI_WORKER, "add", "-H", "A: b")

    def test_interrupt(self) -> None:
        words = [*PROGRAM, "call", self.url, "countdown", "start=100", "pause=0.05"]
        child = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment())
        with child:
            assert child.stdout is not None and child.stderr is not None
            self.assertTrue(child.stdout.readline())
            child.send_signal(signal.SIGINT)
            self.assertEqual(child.wait(LIMIT), 130)
            self.assertEqual(child.stderr.read(), b"")

    def test_closed_stdout_is_quiet(self) -> None:
        words = [*PROGRAM, "call", self.url, "countdown", "start=5000"]
        child = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment())
        with child:
            assert child.stdout is not None and child.stderr is not None
            child.stdout.readline()
            child.stdout.close()
            self.assertEqual((child.wait(LIMIT), child.stderr.read()), (0, b""))

    @unittest.skipUnless(hasattr(os, "openpty"), "a machine without pseudo-terminals has no terminal face")
    def test_two_faces(self) -> None:
        words = ("call", self.url, "countdown", "start=1")
        code, seen = on_terminal(*words)
        self.assertEqual(code, 0)
        self.assertRegex(seen, r"\x1b\[1mHeader:\x1b\[0m\r\n  start    1\r\n")
        self.assertIn("\x1b[1mn\x1b[0m\r\n", seen)
        self.assertNotIn("\x1b[1m", on_terminal(*words, NO_COLOR="1")[1])
        self.assertNotIn("\x1b", self.ok(*words))
        _, slow = on_terminal("call", self.url, "countdown", "start=4", "pause=0.4")
        self.assertRegex(slow, r"\r\x1b\[K(\d) batches, \1 rows, 0\.0 MB, \d+ rows/s")
        self.assertTrue(slow.rstrip("\r\n0").endswith("\r\x1b[K") or slow.endswith("\r\x1b[K"))
        self.assertIn("\x1b[1;31merror:\x1b[0m", on_terminal("call", self.url, "nope")[1])


class CliServeTests(CliTests):
    def test_targets(self) -> None:
        for target, wanted in (
            ("app.py:CalculatorImpl", "Calculator: 1 methods"),
            ("app:CalculatorImpl", "Calculator: 1 methods"),
            ("app:make()", "Calculator: 1 methods"),
            ("app:Plain", "Plain: 3 methods"),
        ):
            with self.subTest(target):
                self.assertIn(wanted, self.ok("serve", target, "--check", cwd=self.folder))
        self.assertIn("Demo: 3 methods", self.ok("serve", "--check"))
        self.assertIn("Plain: 3 methods", self.ok("serve", "--check", cwd=self.folder, VGI_RPC_TARGET="app:Plain"))

    def test_served_module_sees_the_same_classes(self) -> None:
        self.assertEqual(self.ok("call", self.app, "same"), "true\n")

    def test_bad_targets_are_one_line_and_a_hint(self) -> None:
        for name, text in (
            ("syntax.py", "def f(:\n"),
            ("raising.py", "x = 1\nraise RuntimeError('no database')\n"),
            ("unannotated.py", "class A:\n    def ok(self) -> int: ...\n\n    def f(self, a: complex) -> int: ...\n"),
        ):
            with open(self.path(name), "w") as f:
                f.write(text)
        for target, pattern in (
            ("app", "expected module:Class.*\nhint: try app:NAME"),
            ("nowhere:A", "no module 'nowhere'\nhint: run from its folder"),
            ("nowhere.py:A", "no file .*nowhere.py"),
            ("app:CalculatorImp", "has no 'CalculatorImp'; did you mean 'CalculatorImpl'.*\nhint: it defines"),
            ("app:make", "is a function\nhint: name app:make()"),
            ("app:Calculator", "is a Protocol\nhint: name the class"),
            ("app:Needy", "needs factor\nhint: name a function"),
            ("syntax.py:A", r"syntax.py:1: SyntaxError"),
            ("raising.py:A", r"raising.py:2: RuntimeError: no database"),
            ("unannotated.py:A", r"unannotated.py:4: .*f\(\) parameter 'a'"),
        ):
            with self.subTest(target):
                said = self.fails(2, pattern, "serve", target, "--check", cwd=self.folder)
                self.assertLessEqual(len(said.splitlines()), 2)

    def test_bad_flags(self) -> None:
        port = self.url.rpartition(":")[2]
        self.fails(3, f"cannot listen on 127.0.0.1:{port}: Address already in use\nhint: ", "serve", "--port", port)
        self.fails(2, "one at a time", "serve", "--stdio", "--tcp", "0")
        self.fails(2, "--tls-cert no/such: No such file", "serve", "--tls-cert", "no/such")
        self.fails(2, "_size value: 'x'", "serve", "--max-request-bytes", "x")
        self.fails(2, "no/such: No such file", "serve", "--bearer-file", "no/such")
        self.fails(2, "at least 16 bytes", "serve", VGI_RPC_TOKEN_KEY="short")
        self.fails(2, "invalid int value: 'many'", "serve", VGI_RPC_PORT="many")

    def test_banner(self) -> None:
        for words, more, wanted, missing in (
            (["--port", "0", "--prefix", "api"], {}, r"Demo served(.|\n)*add\(a: float, b: float = 1.0\)(.|\n)*token key  random(.|\n)*/api\n(.|\n)*Ctrl-C", "warning"),
            (["--port", "0"], {"VGI_RPC_TOKEN_KEY": "k" * 32}, r"token key  from VGI_RPC_TOKEN_KEY", "random"),
            (["--port", "0", "--host", "0.0.0.0"], {}, r"warning: .*no authentication", "__main__"),
        ):
            with self.subTest(words), serving(*words, **more) as (child, _):
                child.send_signal(signal.SIGINT)
                _, said = child.communicate(timeout=LIMIT)
                self.assertEqual(child.returncode, 0)
                self.assertRegex(said.decode(), wanted)
                self.assertNotIn(missing, said.decode())

    def test_no_describe(self) -> None:
        with http_server("--no-describe") as url:
            self.fails(1, "hint: a server with --no-describe", "call", url, "add")

    def test_access_log(self) -> None:
        with http_server("--access-log", self.path("log")) as url:
            self.ok("call", url, "add", "a=1", "b=1")
        with open(self.path("log")) as f:
            self.assertIn("Demo.add ok", [json.loads(line)["message"] for line in f])

    def test_reload_keeps_streams(self) -> None:
        app = self.path("changing.py")
        text = "import vgi_rpc\n\nclass Impl(vgi_rpc.DemoImpl):\n    def version(self) -> int:\n        return 1\n"
        with open(app, "w") as f:
            f.write(text)
        with http_server(f"{app}:Impl", "--reload") as url:
            mark = self.path("reload")
            self.assertEqual(self.ok("call", url, "version"), "1\n")
            self.ok("call", url, "countdown", "start=3", "pause:=null", "--limit", "2", "--resume", mark)
            with open(app, "w") as f:
                f.write(text.replace("return 1", "return 22"))
            deadline = time.monotonic() + LIMIT
            while run("call", url, "version").stdout != b"22\n":
                self.assertLess(time.monotonic(), deadline)
            rest = self.ok("call", url, "countdown", "--resume", mark)
            self.assertEqual(rest.splitlines(), ['{"n": 1}', '{"n": 0}'])


class CliOtherTests(CliTests):
    def test_describe(self) -> None:
        self.assertRegex(self.ok("describe", self.url), r"countdown\n  kind: producer\n  doc: Count from start to 0.*\n  parameters: start: int64, pause: float64 \| null = null")
        self.assertIn("## add\n- kind: unary", self.ok("describe", self.url, "-f", "markdown"))
        for where in (self.url, CLI_WORKER):
            self.assertIn("\n  max columns: 4,096 columns\n", self.ok("describe", where))
        self.assertIn("\n  max request bytes: 268,435,456 bytes\n", self.ok("describe", self.url))
        facts = json.loads(self.ok("describe", self.url, "countdown", "-f", "json"))
        self.assertEqual(facts["limits"]["max_connections"], {"value": 512, "unit": "connections"})
        self.assertEqual([m["name"] for m in facts["methods"]], ["countdown"])
        self.assertEqual(facts["methods"][0]["header"][0], {"name": "start", "type": "int64", "nullable": False})

    def test_describe_of_a_server_that_tells_its_limits_in_headers_alone(self) -> None:
        with mock.patch.object(vgi_rpc, "limits_of", lambda transport: {}):
            _, port, _ = in_thread(vgi_rpc.serve_http, make_server(), token_key=KEY, max_request_bytes=1_000_000)
        said = self.ok("describe", f"http://127.0.0.1:{port}", "add")
        self.assertIn("\n  max request bytes: 1,000,000 bytes\n", said)
        self.assertNotIn("max columns", said)

    def test_described_python_works(self) -> None:
        scope: dict[str, object] = {"__name__": "generated"}
        sys.modules["generated"] = type(sys)("generated")
        self.addCleanup(sys.modules.pop, "generated")
        sys.modules["generated"].__dict__.update(scope)
        exec(self.ok("describe", self.url, "-f", "python"), sys.modules["generated"].__dict__)
        with vgi_rpc.http_connect(sys.modules["generated"].Demo, self.url) as proxy:  # type: ignore[attr-defined]
            self.assertEqual(proxy.add(a=1.0, b=2.0), 3.0)
            session = proxy.countdown(start=1, pause=None)
            self.assertEqual(session.header.batches, 2)
            self.assertEqual([b.batch.to_pylist()[0]["n"] for b in session], [1, 0])

    def test_ping(self) -> None:
        self.assertRegex(self.ok("ping", self.url, "-n", "5"), r"^5 round trips: min [\d.]+ ms, median [\d.]+ ms, p99 [\d.]+ ms\n$")
        self.fails(3, "cannot connect", "ping", "http://127.0.0.1:1")

    def test_selfcheck(self) -> None:
        said = self.ok("selfcheck")
        for kind in ("pipe", "subprocess", "wsgi", "http", "tcp", "unix"):
            self.assertRegex(said, rf"(?m)^{kind} .*ok$")

    def test_explain(self) -> None:
        answer = self.path("answer.bin")
        self.ok("call", self.url, "countdown", "start=1", "-f", "arrow", "-o", answer)
        said = self.ok("explain", answer)
        self.assertEqual(said.count("stream at byte"), 2)
        self.assertIn('{"n": 1}', said)
        with open(answer, "rb") as f:
            data = f.read()
        captured = b"POST /Demo/add HTTP/1.1\r\nAuthorization: Bearer s3cret\r\n\r\n" + data
        said = self.ok("explain", "-", given=captured)
        self.assertIn("Authorization: …", said)
        self.assertNotIn("s3cret", said)
        self.fails(1, "before byte", "explain", "-", given=data[:-20])

    def test_completion_and_versions(self) -> None:
        script = self.ok("completion", "bash")
        asked = 'COMP_WORDS=(vgi-rpc call --res); COMP_CWORD=2; _vgi_rpc; echo "${COMPREPLY[@]}"'
        done = subprocess.run(["bash", "-c", f"{script}\n{asked}"], capture_output=True, timeout=LIMIT)
        self.assertEqual(done.stdout, b"--resume\n", done.stderr)
        for shell in ("zsh", "fish"):
            self.assertIn("selfcheck", self.ok("completion", shell))
        self.assertRegex(self.ok("--version"), rf"vgi_rpc {vgi_rpc.__version__} \(wire 1, Python .*pyarrow {pa.__version__}, codecs .*gzip")
        self.assertEqual(run().returncode, 2)
        self.assertIn("selfcheck", self.ok("--help"))

    def test_every_example_of_help(self) -> None:
        shutil.copy(FILE, self.path("vgi_rpc.py"))
        self.ok("call", self.url, "add", "a=1", "b=1", "-f", "arrow", "-o", self.path("answer.bin"))
        with open(self.path("app.py"), "a", encoding="utf-8") as f:
            f.write("\nCalculator = CalculatorImpl\n")
        self.addCleanup(self.setUpClass)  # the appended line is for these examples alone
        seen = 0
        for command in ("serve", "call", "describe", "ping", "selfcheck", "explain", "completion"):
            examples = self.ok(command, "--help").partition("examples:\n")[2].strip().splitlines()
            self.assertTrue(examples, command)
            for example in examples:
                seen += 1
                with self.subTest(example):
                    line = example.strip().replace("python vgi_rpc.py", shlex.join(PROGRAM)).replace("http://127.0.0.1:8000", self.url)
                    words = shlex.split(line)[2:]
                    if command == "serve" and "--check" not in words:
                        words += [] if "--port" in words or "--unix" in words else ["--port", "0"]
                        with serving(*words[1:], cwd=self.folder) as (_, said):
                            self.assertRegex(said, "^(PORT|UNIX):")
                    else:
                        self.ok(*words, cwd=self.folder)
        self.assertGreaterEqual(seen, 12)

    def test_nothing_runs_on_import(self) -> None:
        code = "import sys, vgi_rpc; print([m for m in ('argparse', 'http.server', 'shlex', 'subprocess', 'pyarrow.csv') if m in sys.modules])"
        bare = "import sys, pyarrow, pyarrow.ipc; print([m for m in ('argparse', 'http.server', 'shlex', 'subprocess', 'pyarrow.csv') if m in sys.modules])"
        outputs = [subprocess.check_output([sys.executable, "-c", c], env=environment(), timeout=LIMIT) for c in (code, bare)]
        self.assertEqual(*outputs)


# ============================================================================
# 16. HTTP SERVING: PAGES AND THE DOOR FOR JSON
# ============================================================================


PAGES_KEY = b"k" * 16
VALUES = pa.schema([pa.field("x", pa.float64(), nullable=False), pa.field("note", pa.utf8())])
COUNTS = pa.schema([("n", pa.int64()), ("at", pa.timestamp("us")), ("raw", pa.binary()), ("tags", pa.map_(pa.utf8(), pa.int64()))])


class PagesColor(enum.Enum):
    RED = "r"
    BLUE = "b"


@dataclass(frozen=True)
class PagesPoint(ArrowSerializableDataclass):
    x: int
    color: PagesColor = PagesColor.RED
    names: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Head(ArrowSerializableDataclass):
    total: int
    color: PagesColor


cancelled = threading.Event()


@dataclass
class Counting(ProducerState):
    left: int
    fail_at: int = -1

    def produce(self, out: Any, ctx: CallContext) -> None:
        if self.left == self.fail_at:
            raise vgi_rpc.StatusError("no more", code=vgi_rpc.Code.ABORTED)
        if self.left <= 0:
            out.finish()
            return
        when = datetime.datetime(2024, 1, 2, 3, 4, 5)
        out.emit_pydict({"n": [self.left], "at": [when], "raw": [b"\x00\xff"], "tags": [[("a", self.left)]]})
        self.left -= 1

    def on_cancel(self, ctx: CallContext) -> None:
        cancelled.set()


@dataclass
class Summing(ExchangeState):
    total: float = 0.0

    def exchange(self, input: Any, out: Any, ctx: CallContext) -> None:
        self.total += sum(input.batch.column("x").to_pylist())
        out.emit_pydict({"sum": [self.total]})

    def on_cancel(self, ctx: CallContext) -> None:
        cancelled.set()


Day = Annotated[datetime.date, ArrowType(pa.date32())]
Price = Annotated[decimal.Decimal, ArrowType(pa.decimal128(10, 2))]
Pause = Annotated[datetime.timedelta, ArrowType(pa.duration("us"))]
Hour = Annotated[datetime.time, ArrowType(pa.time64("us"))]
Small = Annotated[int, ArrowType(pa.int8())]


class Everything(Protocol):
    """<script>alert('docs')</script>"""

    protocol_version = "1.2.3"

    def add(self, a: float, b: float = 2.0) -> float:
        """Add <b>two</b> numbers & more.

        Args:
            a: The first.
        """

    def none(self) -> None: ...
    def maybe(self, x: int | None = None) -> int | None: ...
    def point(self, p: PagesPoint) -> PagesPoint: ...
    def points(self, p: list[PagesPoint]) -> dict[str, PagesPoint]: ...
    def shapes(self, m: dict[int, str], s: set[int], c: PagesColor, d: bytes) -> dict[int, str]: ...
    def times(self, day: Day, price: Price, pause: Pause, hour: Hour) -> list[str]: ...
    def day(self, day: Day) -> Day: ...
    def small(self, n: Small) -> int: ...
    def batch(self, b: pa.RecordBatch) -> pa.RecordBatch: ...
    def schema(self, s: pa.Schema) -> pa.Schema: ...
    def code(self, name: str) -> int: ...
    def huge(self, n: int) -> str: ...
    def count(self, n: int, fail_at: int = -1) -> Stream[ProducerState, Head]: ...
    def plain(self, n: int) -> Stream[ProducerState]: ...
    def sums(self) -> Stream[ExchangeState]: ...
    def headed(self) -> Stream[StreamState, Head]: ...


class EverythingImpl:
    def add(self, a: float, b: float = 2.0) -> float:
        return a + b

    def none(self) -> None: ...

    def maybe(self, x: int | None = None) -> int | None:
        return x

    def point(self, p: PagesPoint) -> PagesPoint:
        return PagesPoint(p.x + 1, p.color, [*p.names, "z"])

    def points(self, p: list[PagesPoint]) -> dict[str, PagesPoint]:
        return {str(q.x): q for q in p}

    def shapes(self, m: dict[int, str], s: set[int], c: PagesColor, d: bytes) -> dict[int, str]:
        assert isinstance(c, PagesColor) and isinstance(s, set)
        return {**m, len(s): c.name, 99: d.hex()}

    def times(self, day: Day, price: Price, pause: Pause, hour: Hour) -> list[str]:
        return [repr(v) for v in (day, price, pause, hour)]

    def day(self, day: Day) -> Day:
        return day

    def small(self, n: Small) -> int:
        return n

    def batch(self, b: pa.RecordBatch) -> pa.RecordBatch:
        return b

    def schema(self, s: pa.Schema) -> pa.Schema:
        return s

    def code(self, name: str) -> int:
        if name == "plain":
            raise ValueError("plain\u2028<b>")
        if name == "nan":
            raise vgi_rpc.StatusError("nan", code=vgi_rpc.Code.ABORTED, details=[{"@type": "my.Fact", "value": float("nan")}])
        raise vgi_rpc.StatusError("told", code=name, kind="kind")

    def huge(self, n: int) -> str:
        return "x" * n

    def count(self, n: int, fail_at: int = -1) -> Stream[Counting, Head]:
        return Stream(COUNTS, Counting(n, fail_at), header=Head(n, PagesColor.BLUE))

    def plain(self, n: int) -> Stream[Counting]:
        return Stream(COUNTS, Counting(n))

    def sums(self) -> Stream[Summing]:
        return Stream(pa.schema([("sum", pa.float64())]), Summing(), input_schema=VALUES)

    def headed(self) -> Stream[Summing, Head]:
        return Stream(pa.schema([("sum", pa.float64())]), Summing(), input_schema=VALUES, header=Head(1, PagesColor.RED))


class Other(Protocol):
    def ping(self) -> str: ...


class OtherImpl:
    def ping(self) -> str:
        return "pong"


class PagesReply:
    def __init__(self, answer: http.client.HTTPResponse, body: bytes) -> None:
        self.status, self.body = answer.status, body
        self.headers = {k.lower(): v for k, v in answer.getheaders()}

    @property
    def text(self) -> str:
        return self.body.decode("utf-8")

    def json(self) -> Any:
        def refuse(name: str) -> None:
            raise AssertionError(f"{name} is not JSON")

        return json.loads(self.text, parse_constant=refuse)

    def lines(self) -> list[Any]:
        return [json.loads(line) for line in self.text.splitlines()]


@contextlib.contextmanager
def pages_serving(server: RpcServer | None = None, **options: Any) -> Iterator[Any]:
    """Serve over a socket; gives ``ask(method, path, body, **headers)``."""
    server = server or RpcServer(Everything, EverythingImpl(), extra_protocols=[(Other, OtherImpl())], server_version="9.9")
    http_server = vgi_rpc.HttpServing(vgi_rpc.HttpApp(server, vgi_rpc.HttpOptions(token_key=PAGES_KEY, **options)), "127.0.0.1", 0)
    thread = threading.Thread(target=http_server.run, daemon=True)
    thread.start()

    def ask(method: str, path: str, body: Any = None, **headers: str) -> PagesReply:
        sent = {k.replace("_", "-"): v for k, v in headers.items()}
        if body is not None:
            sent.setdefault("Content-Type", "application/json")
            body = body if isinstance(body, bytes) else json.dumps(body).encode()
        connection = http.client.HTTPConnection("127.0.0.1", http_server.port, timeout=20)
        with contextlib.closing(connection):
            connection.request(method, path, body, sent)
            answer = connection.getresponse()
            return PagesReply(answer, answer.read())

    ask.port = http_server.port  # type: ignore[attr-defined]
    try:
        yield ask
    finally:
        http_server.stop()
        thread.join(20)


class PageReader(HTMLParser):
    """Collects links, ids, texts and every attribute and tag of a page; unbalanced tags are an error."""

    VOID = ("meta", "br", "!doctype")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: list[str] = []
        self.ids: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[str] = []
        self.words = ""
        self.open: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.append(tag)
        self.attributes += [name for name, _ in attrs]
        self.links += [value for name, value in attrs if name == "href"]
        self.ids += [value for name, value in attrs if name == "id"]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if self.open.pop() != tag:
            raise AssertionError(f"</{tag}> does not close what is open")

    def handle_data(self, data: str) -> None:
        self.words += data


class PagesTests(unittest.TestCase):
    def assert_page(self, reply: PagesReply, status: int = 200) -> PageReader:
        self.assertEqual(reply.status, status)
        self.assertEqual(reply.headers["content-type"], "text/html; charset=utf-8")
        self.assertEqual(reply.headers["x-content-type-options"], "nosniff")
        self.assertEqual(reply.headers["referrer-policy"], "no-referrer")
        policy = reply.headers["content-security-policy"]
        self.assertIn("default-src 'none'", policy)
        self.assertNotIn("unsafe", policy)
        style = re.search(r"<style>(.*?)</style>", reply.text, re.S)[1]
        digest = base64.b64encode(vgi_rpc.hashlib.sha256(style.encode()).digest()).decode()
        self.assertIn(f"style-src 'sha256-{digest}'", policy)
        page = PageReader(reply.text)
        self.assertEqual(page.open, [])
        self.assertNotIn("script", page.tags)
        for attribute in page.attributes:
            self.assertNotIn(attribute, ("src", "style", "onclick"))
        self.assertNotIn("http://", style)
        self.assertNotIn("url(", style)
        return page

    def test_every_link_leads_somewhere_and_every_method_is_shown(self) -> None:
        for prefix in ("", "/api/v1"):
            with self.subTest(prefix=prefix), pages_serving(prefix=prefix) as ask:
                seen: dict[str, PageReader | None] = {}
                waiting = [prefix + "/"]
                while waiting:
                    path, _, anchor = waiting.pop().partition("#")
                    if path not in seen:
                        reply = ask("GET", path)
                        self.assertEqual(reply.status, 200, path)
                        page = self.assert_page(reply) if "html" in reply.headers["content-type"] else None
                        seen[path] = page
                        for link in page.links if page else ():
                            waiting.append(link if not link.startswith("#") else path + link)
                    if anchor:
                        self.assertIn(anchor, seen[path].ids)
                self.assertEqual(set(seen), {prefix + "/", prefix + "/describe", prefix + "/health"})
                for path in (prefix + "/", prefix + "/describe"):
                    for protocol in (Everything, Other, vgi_rpc.Reflection):
                        for name, info in vgi_rpc.rpc_methods(protocol).items():
                            self.assertIn(info.signature(), seen[path].words, f"{path} {name}")

    def test_prefix_without_slash_is_the_same_page(self) -> None:
        with pages_serving(prefix="/api") as ask:
            self.assertEqual(ask("GET", "/api").body, ask("GET", "/api/").body)

    def test_overview_tells_versions_health_and_lines_to_copy(self) -> None:
        with pages_serving() as ask:
            words = self.assert_page(ask("GET", "/")).words
            url = f"http://127.0.0.1:{ask.port}"
            caps = "max request bytes268,435,456 bytes", "max connections512 connections", "max columns4,096 columns", "max response bytesnone"
            for text in (vgi_rpc.__version__, pa.__version__, "9.9", "1.2.3", f"call {url} add a=1.5", "Healthok", *caps):
                self.assertIn(text, words)
            line = re.search(r"curl \S+ -H 'Content-Type: application/json' -d '(.*?)'", words)
            self.assertEqual(ask("POST", "/Everything/add", json.loads(line[1])).json(), {"result": 3.5})
            compile(re.search(r"with .*?http_connect.*?\)\)", words)[0], "line", "exec")

    def test_host_header_is_not_believed(self) -> None:
        with pages_serving() as ask:
            for host in ("evil'; rm -rf ~ #", "a<b>", "x&y", 'q"'):
                page = self.assert_page(ask("GET", "/", Host=host))
                self.assertIn("http://HOST/Everything/add", page.words)

    def test_describe_shows_schemas_header_limits_and_docs(self) -> None:
        with pages_serving(max_request_bytes=1_234_567, max_response_bytes=7_654_321, max_rows=4_321, token_ttl=99) as ask:
            words = self.assert_page(ask("GET", "/describe")).words
            for text in ("1,234,567", "7,654,321", "4,321 rows", "99 seconds", "dictionary<values=utf8", "default 2.0", "producer", "exchange",
                         "Add <b>two</b> numbers & more.", "The first."):
                self.assertIn(text, words)

    def test_everything_is_escaped(self) -> None:
        with pages_serving() as ask:
            for path in ("/", "/describe"):
                text = ask("GET", path).text
                self.assertNotIn("<b>two</b>", text)
                self.assertNotIn("<script", text)

    def test_not_found_is_a_page_for_people_only(self) -> None:
        with pages_serving(prefix="/api") as ask:
            for path in ("/nowhere", "/api/nowhere", "/api/a/b/c/d", "/apix", "/api/%3Cscript%3E"):
                page = self.assert_page(ask("GET", path, Accept="text/html,*/*"), 404)
                self.assertIn("/api/describe", page.links)
                self.assertNotIn("script", page.words)
                reply = ask("GET", path)
                self.assertEqual((reply.status, reply.json()["error"]), (404, "not_found"))

    def test_head_and_other_methods(self) -> None:
        with pages_serving() as ask:
            for path in ("/", "/describe"):
                reply = ask("HEAD", path)
                self.assertEqual((reply.status, reply.body), (200, b""))
                self.assertGreater(int(reply.headers["content-length"]), 1000)
            self.assertEqual(ask("POST", "/describe", {}).status, 404)
            self.assertEqual(ask("GET", "/Everything/add", Accept="text/html").status, 405)

    def test_pages_ask_for_authentication(self) -> None:
        authenticate = vgi_rpc.bearer_authenticate_static(tokens={"secret": AuthContext("t", True, "me")})
        with pages_serving(authenticate=authenticate) as ask:
            for path in ("/", "/describe"):
                refused = ask("GET", path, Accept="text/html")
                self.assertEqual(refused.status, 401)
                self.assertNotIn("add", refused.text)
                page = self.assert_page(ask("GET", path, Authorization="Bearer secret"))
                self.assertIn("add(", page.words)
            missing = self.assert_page(ask("GET", "/nowhere", Accept="text/html"), 404)
            self.assertNotIn("add(", missing.words)

    def test_pages_can_be_switched_off(self) -> None:
        plain = RpcServer(Everything, EverythingImpl(), enable_describe=False)
        for server, options in ((None, {"pages": False}), (plain, {})):
            with self.subTest(options=options), pages_serving(server, **options) as ask:
                for path in ("/", "/describe", "/nowhere"):
                    reply = ask("GET", path, Accept="text/html")
                    self.assertEqual((reply.status, reply.headers["content-type"]), (404, "application/json"))

    def test_wsgi_serves_the_same_page(self) -> None:
        app = vgi_rpc.make_wsgi_app(RpcServer(Other, OtherImpl()), token_key=PAGES_KEY)
        seen: dict[str, Any] = {}
        environ = {"REQUEST_METHOD": "GET", "PATH_INFO": "/", "wsgi.url_scheme": "https", "HTTP_HOST": "example.org"}
        body = b"".join(app(environ, lambda status, headers: seen.update(status=status, headers=dict(headers))))
        self.assertEqual(seen["status"], "200 OK")
        self.assertIn("https://example.org", body.decode())


class JsonDoorTests(unittest.TestCase):
    @classmethod
    def setUpClass(cls) -> None:
        cls.stack = contextlib.ExitStack()
        cls.ask = staticmethod(cls.stack.enter_context(pages_serving()))

    @classmethod
    def tearDownClass(cls) -> None:
        cls.stack.close()

    def call(self, name: str, body: Any, action: str = "", **headers: str) -> PagesReply:
        return self.ask("POST", f"/Everything/{name}{action}", body, **headers)

    def refused(self, reply: PagesReply, status: int, text: str = "", code: str = "INVALID_ARGUMENT") -> dict[str, Any]:
        self.assertEqual(reply.headers["content-type"], "application/json", reply.text)
        error = reply.json()["error"]
        self.assertEqual((reply.status, error["code"]), (status, code), error["message"])
        self.assertIn(text, error["message"])
        self.assertEqual(error["request_id"], reply.headers["x-request-id"])
        return error

    def test_values_there_and_back(self) -> None:
        inner = {"x": 1, "color": "BLUE", "names": ["a"]}
        batch = [{"a": 1, "b": "x"}, {"a": None, "b": "y"}]
        sealed = base64.b64encode(vgi_rpc.stream_bytes(pa.schema([]), [])).decode()
        for name, given, wanted in (
            ("add", {"a": 1, "b": 2}, 3.0),
            ("add", {"a": 0.5}, 2.5),
            ("none", {}, None),
            ("maybe", {}, None),
            ("maybe", {"x": None}, None),
            ("maybe", {"x": 9007199254740993}, 9007199254740993),
            ("point", {"p": inner}, {"x": 2, "color": "BLUE", "names": ["a", "z"]}),
            ("point", {"p": {"x": 1}}, {"x": 2, "color": "RED", "names": ["z"]}),
            ("points", {"p": [inner]}, {"1": inner}),
            ("shapes", {"m": {"1": "a"}, "s": [1, 2, 2], "c": "RED", "d": "AP8="}, {"1": "a", "2": "RED", "99": "00ff"}),
            ("shapes", {"m": [[1, "a"]], "s": [], "c": "BLUE", "d": ""}, {"1": "a", "0": "BLUE", "99": ""}),
            ("times", {"day": "2024-02-29", "price": "1.25", "pause": 1.5, "hour": "10:11:12"},
             [repr(datetime.date(2024, 2, 29)), "Decimal('1.25')", repr(datetime.timedelta(seconds=1.5)), "datetime.time(10, 11, 12)"]),
            ("day", {"day": "2024-02-29"}, "2024-02-29"),
            ("small", {"n": -128}, -128),
            ("batch", {"b": batch}, batch),
            ("batch", {"b": sealed}, []),
            ("schema", {"s": {"x": "float64", "y": "utf8"}}, {"x": "float64", "y": "utf8"}),
            ("add", {"a": "NaN"}, None),
            ("add", {"a": "-Infinity"}, None),
        ):
            with self.subTest(name=name, given=given):
                reply = self.call(name, given)
                self.assertEqual((reply.status, reply.json()), (200, {"result": wanted}))
                self.assertEqual(reply.headers["content-type"], "application/json")

    def test_what_does_not_fit_is_refused_by_name_and_path(self) -> None:
        for name, given, text in (
            ("add", {}, "missing argument 'a'"),
            ("add", {"a": 1, "bb": 2}, "no parameter 'bb'; did you mean 'b'?"),
            ("add", {"a": "x"}, "add() parameter a: expected float64, got "),
            ("add", {"a": True}, "parameter a: expected float64, got bool"),
            ("add", {"a": None}, "parameter a: expected float64, got None"),
            ("add", {"a": [1]}, "parameter a: expected float64, got list"),
            ("maybe", {"x": 1.0}, "parameter x: expected int64, got float"),
            ("maybe", {"x": 2**63}, "parameter x: expected int64, got"),
            ("small", {"n": 128}, "parameter n: expected int8, got"),
            ("point", {"p": {}}, "parameter p.x: expected int64"),
            ("point", {"p": {"x": "1"}}, "parameter p.x: expected int64, got str"),
            ("point", {"p": {"x": 1, "colour": "RED"}}, "got 'colour'; did you mean 'color'?"),
            ("point", {"p": {"x": 1, "color": "PINK"}}, "parameter p.color: expected PagesColor (RED, BLUE), got 'PINK'"),
            ("points", {"p": [{"x": 1}, {"x": 1, "names": ["a", 2]}]}, "parameter p[1].names[1]: expected utf8, got int"),
            ("shapes", {"m": {"a": "b"}, "s": [], "c": "RED", "d": ""}, "parameter m"),
            ("shapes", {"m": {}, "s": [], "c": "RED", "d": "!"}, "parameter d: expected binary, got '!'"),
            ("day", {"day": "2024-02-30"}, "parameter day: expected date32"),
            ("times", {"day": "2024-02-29", "price": "x", "pause": 1, "hour": "10:11"}, "parameter price: expected decimal128"),
            ("schema", {"s": {"x": "no such type"}}, "parameter s"),
            ("schema", {"s": {"x": 1}}, "parameter s"),
            ("batch", {"b": [1]}, "parameter b"),
            ("add", [1], "expected an object, got list"),
        ):
            with self.subTest(name=name, given=given):
                self.refused(self.call(name, given), 400, text)

    def test_only_strict_json_is_read(self) -> None:
        deep = b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}"
        for body in (b"", b"{", b'{"a":1,"a":2}', b'{"a":NaN}', b'{"a":-Infinity}', b'{"a":1e999}', b'{"a":1}x', b"{'a':1}", b'{"a":01}',
                     b'{"a":"\xff"}', b'\xef\xbb\xbf{"a":1}', b'{"a":1,}', '{"a":1}'.encode("utf-16"), deep, b'{"a":' + b"9" * 5000 + b"}",
                     b'{"a":"\x01"}', b"null"):
            with self.subTest(body=body[:40]):
                self.refused(self.call("add", body), 400)
        self.refused(self.call("code", b'{"name":"\\ud800"}'), 400)
        self.refused(self.call("maybe", b'{"\\ud800":1}'), 400)

    def test_status_follows_the_code(self) -> None:
        table = {"INVALID_ARGUMENT": 400, "NOT_FOUND": 404, "UNIMPLEMENTED": 404, "PERMISSION_DENIED": 403, "UNAUTHENTICATED": 401,
                 "RESOURCE_EXHAUSTED": 429, "UNAVAILABLE": 503, "DEADLINE_EXCEEDED": 504, "ABORTED": 409, "ALREADY_EXISTS": 409,
                 "FAILED_PRECONDITION": 400, "CANCELLED": 499, "OUT_OF_RANGE": 400, "INTERNAL": 500, "UNKNOWN": 500, "DATA_LOSS": 500}
        self.assertEqual(set(table), {c.value for c in vgi_rpc.Code})
        for code, status in table.items():
            error = self.refused(self.call("code", {"name": code}), status, "told", code)
            self.assertEqual((error["type"], error["kind"], error["details"]), ("StatusError", "kind", []))
            self.assertIn("Traceback", error["traceback"])
        error = self.refused(self.call("code", {"name": "plain"}), 500, "plain\u2028<b>", "UNKNOWN")
        self.assertEqual(error["type"], "ValueError")
        error = self.refused(self.call("code", {"name": "nan"}), 409, "nan", "ABORTED")
        self.assertEqual(error["details"], [{"@type": "my.Fact", "value": None}])

    def test_tracebacks_can_be_switched_off(self) -> None:
        with pages_serving(RpcServer(Everything, EverythingImpl(), include_tracebacks=False)) as ask:
            self.assertNotIn("traceback", ask("POST", "/Everything/code", {"name": "plain"}).json()["error"])

    def test_wrong_places(self) -> None:
        for path in ("/Everything/ad", "/Nothing/add", "/Everything/ad/init"):
            self.refused(self.ask("POST", path, {}), 404, "", "UNIMPLEMENTED")
        self.refused(self.call("add", {"a": 1}, "/init"), 400, "is not a stream")
        self.refused(self.call("add", {"a": 1}, "/exchange"), 400, "is not a stream")
        self.assertEqual(self.call("add", {"a": 1}, Content_Type="application/JSON; charset=utf-8").json(), {"result": 3.0})
        self.assertEqual(self.call("add", {"a": 1}, Content_Type="text/plain").status, 415)

    def test_producer_answers_in_lines(self) -> None:
        row = {"n": 2, "at": "2024-01-02T03:04:05", "raw": "AP8=", "tags": {"a": 2}}
        for action in ("", "/init"):
            reply = self.call("count", {"n": 2}, action)
            self.assertEqual((reply.status, reply.headers["content-type"]), (200, "application/x-ndjson"))
            self.assertEqual(reply.lines(), [{"__header__": {"total": 2, "color": "BLUE"}}, row, {**row, "n": 1, "tags": {"a": 1}}])
        self.assertEqual([r["n"] for r in self.call("plain", {"n": 3}).lines()], [3, 2, 1])
        self.assertEqual(self.call("plain", {"n": 0}).lines(), [])
        self.assertEqual(self.call("count", {"n": 0}).lines(), [{"__header__": {"total": 0, "color": "BLUE"}}])

    def test_error_of_a_producer(self) -> None:
        self.refused(self.call("count", {"n": 2, "fail_at": 2}), 409, "no more", "ABORTED")
        reply = self.call("count", {"n": 3, "fail_at": 1})
        self.assertEqual(reply.status, 200)
        *rows, last = reply.lines()
        self.assertEqual(len(rows), 3)
        self.assertEqual((last["__error__"]["code"], last["__error__"]["message"]), ("ABORTED", "no more"))

    def test_rows_come_as_they_are_produced_and_a_lost_client_cancels(self) -> None:
        cancelled.clear()
        connection = http.client.HTTPConnection("127.0.0.1", self.ask.port, timeout=20)
        connection.request("POST", "/Everything/plain", b'{"n":1000000000}', {"Content-Type": "application/json"})
        answer = connection.getresponse()
        self.assertEqual(answer.getheader("Transfer-Encoding"), "chunked")
        self.assertEqual(json.loads(answer.readline())["n"], 1000000000)
        answer.close()
        connection.close()
        self.assertTrue(cancelled.wait(20))

    def test_exchange_carries_its_token(self) -> None:
        begun = self.call("headed", {}, "/init").json()
        self.assertEqual((set(begun), begun["header"]), ({"token", "header"}, {"total": 1, "color": "RED"}))
        token = self.call("sums", {}, "/init").json()["token"]
        for rows, wanted in (([{"x": 1}, {"x": 2.5, "note": "n"}], 3.5), ([], 3.5), ([{"x": -1}], 2.5)):
            answer = self.call("sums", {"token": token, "rows": rows}, "/exchange").json()
            self.assertEqual(answer["rows"], [{"sum": wanted}] if rows else answer["rows"])
            token = answer["token"]
        cancelled.clear()
        self.assertEqual(self.call("sums", {"token": token, "cancel": True}, "/exchange").json(), {"rows": []})
        self.assertTrue(cancelled.is_set())

    def test_exchange_in_lines(self) -> None:
        token = self.call("sums", {}, "/init").json()["token"]
        lines = b"\n".join(json.dumps(e).encode() for e in ({"token": token}, {"x": 1}, {"x": 2, "note": "n"})) + b"\n"
        reply = self.call("sums", lines, "/exchange", Content_Type="application/x-ndjson")
        self.assertEqual((reply.status, reply.json()["rows"]), (200, [{"sum": 3.0}]))
        again = self.call("sums", {"token": reply.json()["token"], "rows": [{"x": 4}]}, "/exchange").json()
        self.assertEqual(again["rows"], [{"sum": 7.0}])
        for bad, text in ((b'{"y": 2}', "[2].y"), (b"[1]", "expected an object"), (b"{", "not a JSON object")):
            where = "[2]: expected one of ['x', 'note'], got 'y'" if text == "[2].y" else text
            self.refused(self.call("sums", lines + bad, "/exchange", Content_Type="application/x-ndjson"), 400, where)
        self.refused(self.call("sums", b"", "/exchange", Content_Type="application/x-ndjson"), 400, "not a JSON object")

    def test_exchange_refuses_what_is_wrong(self) -> None:
        token = self.call("sums", {}, "/init").json()["token"]
        other = self.call("headed", {}, "/init").json()["token"]
        for given, text in (
            ({}, "expected token, and rows or cancel, got nothing"),
            ({"rows": []}, "state token refused"),
            ({"token": 3, "rows": []}, "state token refused"),
            ({"token": token[:-4], "rows": []}, "state token refused"),
            ({"token": other, "rows": []}, "state token refused"),
            ({"token": "\ud800", "rows": []}, "state token refused"),
            ({"token": token}, "expected token, and rows or cancel"),
            ({"token": token, "rows": {}}, "sums() input: expected list<"),
            ({"token": token, "rows": [1]}, "sums() input[0]: expected struct<"),
            ({"token": token, "rows": [{"x": 1}, {"x": "1"}]}, "[1].x: expected float64"),
            ({"token": token, "rows": [{"note": "n"}]}, "without nulls"),
            ({"token": token, "rows": [{"x": 1, "nota": ""}]}, "did you mean 'note'?"),
            ({"token": token, "row": []}, "got token, row"),
        ):
            with self.subTest(given=given):
                self.refused(self.call("sums", given, "/exchange"), 400, text)

    def test_limits_hold(self) -> None:
        with pages_serving(max_request_bytes=1000, max_response_bytes=5000) as ask:
            self.refused(ask("POST", "/Everything/code", {"name": "x" * 2000}), 413, "", "RESOURCE_EXHAUSTED")
            self.assertEqual(ask("POST", "/Everything/huge", {"n": 4000}).status, 200)
            self.refused(ask("POST", "/Everything/huge", {"n": 6000}), 429, "max_response_bytes", "RESOURCE_EXHAUSTED")
            *rows, last = ask("POST", "/Everything/plain", {"n": 1000}).lines()
            self.assertIn("max_response_bytes", last["__error__"]["message"])
            self.assertTrue(rows)
        big = b'{"name":"' + b"x" * (17 << 20) + b'"}'
        self.refused(self.call("code", big), 413, "bytes of JSON", "RESOURCE_EXHAUSTED")
        reply = self.call("huge", {"n": 70_000}, VGI_Accept_Max_Response_Bytes="65536")
        self.refused(reply, 429, "max_response_bytes", "RESOURCE_EXHAUSTED")
        self.refused(self.call("huge", {"n": 1}, VGI_Accept_Max_Response_Bytes="1"), 400, "VGI-Accept-Max-Response-Bytes")

    def test_authentication_and_switching_off(self) -> None:
        authenticate = vgi_rpc.bearer_authenticate_static(tokens={"secret": AuthContext("t", True, "me"), "two": AuthContext("t", True, "you")})
        with pages_serving(authenticate=authenticate) as ask:
            self.assertEqual(ask("POST", "/Everything/add", {"a": 1}).status, 401)
            self.assertEqual(ask("POST", "/Everything/add", {"a": 1}, Authorization="Bearer secret").json(), {"result": 3.0})
            token = ask("POST", "/Everything/sums/init", {}, Authorization="Bearer secret").json()["token"]
            body = {"token": token, "rows": []}
            self.refused(ask("POST", "/Everything/sums/exchange", body, Authorization="Bearer two"), 400, "state token refused")
            self.assertEqual(ask("POST", "/Everything/sums/exchange", body, Authorization="Bearer secret").status, 200)
        with pages_serving(json=False) as ask:
            self.assertEqual(ask("POST", "/Everything/add", {"a": 1}).status, 415)
            self.assertNotIn("curl", PageReader(ask("GET", "/").text).words)

    def test_draining_and_hooks(self) -> None:
        seen: list[Any] = []

        class Hook:
            def on_dispatch_start(self, record: Any) -> None: ...

            def on_dispatch_end(self, token: Any, record: Any, error: Any) -> None:
                seen.append((record.method, record.http.get("http_status"), type(error).__name__, record.statistics.output_rows))

        server = RpcServer(Everything, EverythingImpl())
        server.add_hook(Hook())
        with pages_serving(server) as ask:
            ask("POST", "/Everything/add", {"a": 1})
            ask("POST", "/Everything/plain", {"n": 3})
            ask("POST", "/Everything/code", {"name": "ABORTED"})
            token = ask("POST", "/Everything/sums/init", {}).json()["token"]
            ask("POST", "/Everything/sums/exchange", {"token": token, "rows": [{"x": 1}]})
            none = "NoneType"
            # A streamed answer's call ends behind its last byte, when the next request may already be served.
            self.assertCountEqual(seen, [("add", 200, none, 1), ("plain", 200, none, 3), ("code", 409, "StatusError", 0),
                                         ("sums", 200, none, 0), ("sums", 200, none, 1)])
            server.drain(0)
            self.refused(ask("POST", "/Everything/add", {"a": 1}), 503, "stopping", "UNAVAILABLE")

    def test_wsgi_answers_the_same(self) -> None:
        import io

        app = vgi_rpc.make_wsgi_app(RpcServer(Everything, EverythingImpl()), token_key=PAGES_KEY)
        body = b'{"n":2}'
        environ = {"REQUEST_METHOD": "POST", "PATH_INFO": "/Everything/plain", "CONTENT_TYPE": "application/json", "CONTENT_LENGTH": "7",
                   "wsgi.input": io.BytesIO(body)}
        pieces = list(app(environ, lambda status, headers: None))
        self.assertEqual([json.loads(line)["n"] for line in b"".join(pieces).splitlines()], [2, 1])


# ============================================================================
# 14. CLIENT AND 16. HTTP SERVING: BATCHES TAKEN AHEAD
# ============================================================================


AHEAD_KEY = b"a key of the tests long enough!"
AHEAD_VALUE = pa.schema([pa.field("value", pa.int64())])
BLOB = pa.schema([pa.field("blob", pa.binary())])
AHEAD_WATCHDOG_SECONDS = 30

produced = []  # the number of each turn that ran, in order
ahead_cancelled = []
proceed = threading.Event()
arrived = threading.Event()


@dataclass
class AheadCount(ProducerState):
    """0, 1, 2 … with a log before each; turn *fail_at* raises."""

    n: int
    fail_at: int = -1
    i: int = 0

    def produce(self, out: OutputCollector, ctx: CallContext) -> None:
        produced.append(self.i)
        if self.i == self.fail_at:
            raise LookupError(f"turn {self.i}")
        if self.i >= self.n:
            out.finish()
            return
        out.client_log(Level.INFO, f"log {self.i}")
        out.emit_pydict({"value": [self.i]})
        self.i += 1

    def on_cancel(self, ctx: CallContext) -> None:
        ahead_cancelled.append(self.i)


@dataclass
class Lazy(ProducerState):
    """Makes batch i + 1 only when the test has batch i in hand."""

    i: int = 0

    def produce(self, out: OutputCollector, ctx: CallContext) -> None:
        if self.i and not arrived.wait(AHEAD_WATCHDOG_SECONDS):
            raise TimeoutError("the batch before this one did not arrive")
        arrived.clear()
        if self.i == 4:
            out.finish()
            return
        out.emit_pydict({"value": [self.i]})
        self.i += 1


@dataclass
class Named(StreamState):
    """Answers each tick with the metadata that came with it."""

    i: int = 0

    def process(self, input, out: OutputCollector, ctx: CallContext) -> None:
        given = dict(input.custom_metadata or {}).get(b"filter", b"-").decode()
        self.i += 1
        out.emit(pa.RecordBatch.from_pydict({"value": [self.i]}, schema=AHEAD_VALUE), {"seen": given})


@dataclass
class Blobs(ProducerState):
    """Batches of the sizes asked for."""

    sizes: list[int]
    i: int = 0

    def produce(self, out: OutputCollector, ctx: CallContext) -> None:
        if self.i == len(self.sizes):
            out.finish()
            return
        out.emit_pydict({"blob": [bytes([self.i]) * self.sizes[self.i]]})
        self.i += 1


@dataclass
class Growing(ProducerState):
    """A state that a shallow copy does not keep: its list grows in place."""

    seen: list[int]

    def produce(self, out: OutputCollector, ctx: CallContext) -> None:
        out.emit_pydict({"blob": [bytes([len(self.seen)]) * 30_000]})
        self.seen.append(0)


@dataclass
class Spoilt(ProducerState):
    """A state that cannot be sealed after its fourth turn; the batch of the fifth fits into no answer that was begun."""

    at: int = 0
    wide: int = 0

    def produce(self, out: OutputCollector, ctx: CallContext) -> None:
        self.at += 1
        self.wide = 0 if self.at < 4 else 2**70
        out.emit_pydict({"blob": [bytes(1 if self.at < 5 else 90_000)]})


@dataclass
class Same(ExchangeState):
    """Gives each batch back."""

    def exchange(self, input, out: OutputCollector, ctx: CallContext) -> None:
        out.emit(input.batch)


@dataclass
class Unwritable(ProducerState):
    """In the middle its state cannot be written, for a turn."""

    n: int = 0
    turn: int = 0

    def produce(self, out: OutputCollector, ctx: CallContext) -> None:
        self.turn += 1
        self.n = 2**70 if self.turn == 3 else 0
        out.emit_pydict({"blob": [bytes(60_000 if self.turn > 3 else 10)]})


class Ahead(Protocol):
    """The service of these tests."""

    def add(self, a: int, b: int) -> int: ...
    def count(self, n: int, fail_at: int = -1) -> Stream[AheadCount]: ...
    def lazy(self) -> Stream[Lazy]: ...
    def named(self) -> Stream[StreamState]: ...
    def blobs(self, sizes: list[int]) -> Stream[Blobs]: ...
    def growing(self) -> Stream[Growing]: ...
    def unwritable(self) -> Stream[Unwritable]: ...
    def spoilt(self) -> Stream[Spoilt]: ...
    def same(self) -> Stream[Same]: ...


class AheadImpl:
    """Its implementation."""

    def add(self, a: int, b: int) -> int:
        return a + b

    def count(self, n: int, fail_at: int = -1) -> Stream[AheadCount]:
        return Stream(AHEAD_VALUE, AheadCount(n, fail_at))

    def lazy(self) -> Stream[Lazy]:
        return Stream(AHEAD_VALUE, Lazy())

    def named(self) -> Stream[Named]:
        return Stream(AHEAD_VALUE, Named())

    def blobs(self, sizes: list[int]) -> Stream[Blobs]:
        return Stream(BLOB, Blobs(sizes))

    def growing(self) -> Stream[Growing]:
        return Stream(BLOB, Growing([]))

    def unwritable(self) -> Stream[Unwritable]:
        return Stream(BLOB, Unwritable())
    def spoilt(self) -> Stream[Spoilt]:
        return Stream(BLOB, Spoilt())

    def same(self) -> Stream[Same]:
        return Stream(AHEAD_VALUE, Same(), input_schema=AHEAD_VALUE)


def ahead_values(batches) -> list[int]:
    return [b.batch.to_pydict()["value"][0] for b in batches]


@contextlib.contextmanager
def ahead_http_server(stack_options=None, hook=None):
    """Serve over real HTTP; give host and port."""
    server = RpcServer(Ahead, AheadImpl())
    if hook is not None:
        server.add_hook(hook)
    options = vgi_rpc.HttpOptions(token_key=AHEAD_KEY, **(stack_options or {}))
    serving = vgi_rpc.HttpServing(vgi_rpc.HttpApp(server, options), "127.0.0.1", 0)
    thread = threading.Thread(target=serving.listener.run, daemon=True)
    thread.start()
    try:
        yield serving
    finally:
        serving.stop()
        thread.join(AHEAD_WATCHDOG_SECONDS)
        serving.listener.close()


class CountingSender(vgi_rpc.HttpConnections):
    """Counts what is posted."""

    def __init__(self, url: str) -> None:
        super().__init__(vgi_rpc.HttpTarget.parse(url))
        self.posts: list[str] = []

    def _message(self, method, path, headers, body):
        self.posts += [path] if method == "POST" else []
        return super()._message(method, path, headers, body)


class AheadContract:
    """What holds for every transport."""

    def connect(self, **options):
        raise NotImplementedError

    def setUp(self) -> None:
        produced.clear()
        ahead_cancelled.clear()
        arrived.clear()

    def test_order_and_completeness(self) -> None:
        logs = []
        with self.connect(on_log=lambda m: logs.append(m.message)) as p:
            for n in (0, 1, 2, 3, 17, 500, 3000):
                self.assertEqual(ahead_values(p.count(n=n)), list(range(n)))
                self.assertEqual(logs, [f"log {i}" for i in range(n)])
                logs.clear()
            self.assertEqual(p.add(a=1, b=2), 3)

    def test_lockstep_when_asked_for(self) -> None:
        with self.connect() as p, vgi_rpc.with_options(p, prefetch=1).count(n=5) as session:
            iterator = iter(session)
            for i in range(4):
                next(iterator)
                self.assertEqual(produced, list(range(i + 1)))

    def test_prefetch_is_a_bound(self) -> None:
        with self.connect() as p, vgi_rpc.with_options(p, prefetch=3).count(n=50) as session:
            for seen, _ in enumerate(session, 1):
                self.assertLessEqual(len(produced), seen + 3)

    def test_prefetch_must_be_one_or_more(self) -> None:
        with self.connect() as p, self.assertRaisesRegex(ValueError, "prefetch: expected 1 or more"):
            vgi_rpc.with_options(p, prefetch=0)

    def test_abandoned_after_any_number(self) -> None:
        with self.connect() as p:
            for k in (1, 2, 3, 5, 8, 20):
                session = p.count(n=10_000)
                for seen, _ in enumerate(session, 1):
                    if seen == k:
                        break
                session.close()
                self.assertTrue(session.closed)
                self.assertEqual(p.add(a=k, b=1), k + 1)
                with self.assertRaises(RpcError):
                    session.tick()

    def test_error_in_any_turn(self) -> None:
        with self.connect() as p:
            for k in (0, 1, 2, 7, 40):
                seen = []
                with self.assertRaisesRegex(RpcError, f"turn {k}") as caught:
                    for batch in p.count(n=100, fail_at=k):
                        seen += ahead_values([batch])
                self.assertEqual((seen, caught.exception.error_type), (list(range(k)), "LookupError"))
                self.assertEqual(p.add(a=1, b=k), k + 1)

    def test_tick_metadata_after_iteration(self) -> None:
        with self.connect() as p, p.named() as session:
            self.assertEqual(ahead_values(b for _, b in zip(range(5), session)), [1, 2, 3, 4, 5])
            seen = [session.tick({b"filter": b"x"}) for _ in range(2000)]
            self.assertEqual(ahead_values(seen), list(range(seen[0].batch["value"][0].as_py(), seen[0].batch["value"][0].as_py() + 2000)))
            self.assertEqual(dict(seen[-1].custom_metadata), {b"seen": b"x"})

    def test_plain_ticks_take_what_was_asked_for(self) -> None:
        with self.connect() as p, p.count(n=40) as session:
            seen = ahead_values(b for _, b in zip(range(5), session))
            seen += [ahead_values([session.tick()])[0] for _ in range(3)]
            self.assertEqual(seen + ahead_values(session), list(range(40)))

    def test_cancel_runs_on_cancel_once(self) -> None:
        with self.connect() as p:
            for k in (1, 3, 10):
                ahead_cancelled.clear()
                session = p.count(n=100_000)
                for seen, _ in enumerate(session, 1):
                    if seen == k:
                        break
                session.cancel()
                session.cancel()
                session.close()
                self.assertEqual(p.add(a=1, b=1), 2)
                self.assertEqual(len(ahead_cancelled), 1)

    def test_large_batches(self) -> None:
        with self.connect() as p:
            sizes = [10, 3_000_000, 70_000, 65_536, 1, 200_000, 1_000_000]
            seen = [b.batch["blob"][0].as_py() for b in p.blobs(sizes=sizes)]
            self.assertEqual(seen, [bytes([i]) * size for i, size in enumerate(sizes)])
            with p.blobs(sizes=[2_000_000] * 30) as session:
                self.assertEqual(len(next(iter(session)).batch["blob"][0].as_py()), 2_000_000)
            self.assertEqual(p.add(a=1, b=1), 2)

    def test_exchange_is_untouched(self) -> None:
        with self.connect() as p, p.same() as session:
            for i in range(5):
                given = vgi_rpc.AnnotatedBatch.from_pydict({"value": [i]}, AHEAD_VALUE)
                self.assertEqual(ahead_values([session.exchange(given)]), [i])


class AheadPipeTests(AheadContract, unittest.TestCase):
    def connect(self, **options):
        return vgi_rpc.serve_pipe(Ahead, AheadImpl(), **options)

    def test_ticks_go_in_few_writes(self) -> None:
        client, serving = vgi_rpc.make_pipe_pair()
        server = RpcServer(Ahead, AheadImpl())
        thread = threading.Thread(target=server.serve, args=(serving,))
        thread.start()
        written = []
        send = client.channel._send
        client.channel._send = lambda pieces: written.append(send(pieces)) or written[-1]
        with vgi_rpc.RpcConnection(Ahead, client) as p:
            self.assertEqual(ahead_values(p.count(n=500)), list(range(500)))
        thread.join(AHEAD_WATCHDOG_SECONDS)
        serving.close()
        self.assertLess(len(written), 500)
        self.assertLess(max(written), 65_536 // 4)

    def test_a_batch_is_not_held_back_for_the_next(self) -> None:
        with self.connect() as p:
            seen = []
            for batch in p.lazy():
                seen += ahead_values([batch])
                arrived.set()
            self.assertEqual(seen, [0, 1, 2, 3])

    def test_exchange_after_iteration_is_refused(self) -> None:
        with self.connect() as p, p.count(n=100) as session:
            for seen, _ in enumerate(session, 1):
                if seen == 4:
                    break
            with self.assertRaisesRegex(RpcError, "asked for batches ahead"):
                session.exchange(vgi_rpc.AnnotatedBatch.from_pydict({"value": [1]}, AHEAD_VALUE))


class AheadUnixTests(AheadContract, unittest.TestCase):
    @contextlib.contextmanager
    def connect(self, **options):
        with tempfile.TemporaryDirectory() as folder:
            path, bound = f"{folder}/s", threading.Event()
            server = RpcServer(Ahead, AheadImpl())
            listening = {"threaded": True, "on_bound": lambda *_: bound.set(), "idle_timeout": 0.2}
            thread = threading.Thread(target=vgi_rpc.serve_unix, args=(server, path), kwargs=listening, daemon=True)
            thread.start()
            self.assertTrue(bound.wait(AHEAD_WATCHDOG_SECONDS))
            with vgi_rpc.unix_connect(Ahead, path, **options) as p:
                yield p
            thread.join(AHEAD_WATCHDOG_SECONDS)


class SyncTests(AheadContract, unittest.TestCase):
    def connect(self, **options):
        return vgi_rpc.http_connect(Ahead, client=vgi_rpc.make_sync_client(RpcServer(Ahead, AheadImpl())), **options)


class AheadHttpTests(AheadContract, unittest.TestCase):
    @contextlib.contextmanager
    def connect(self, **options):
        with ahead_http_server() as serving:
            with vgi_rpc.http_connect(Ahead, f"http://127.0.0.1:{serving.port}", **options) as p:
                yield p

    def test_prefetch_is_a_bound(self) -> None:
        with self.connect() as p, vgi_rpc.with_options(p, prefetch=3).count(n=50) as session:
            for seen, _ in enumerate(session, 1):
                self.assertLessEqual(len(produced), seen + 3)

    def test_a_cursor_that_cannot_be_written_is_an_error_of_the_stream(self) -> None:
        with self.connect(accepted_max_response_bytes=65_536, compression_level=None) as p:
            seen = []
            with self.assertRaisesRegex(RpcError, "Unwritable.n: expected int64"):
                for batch in p.unwritable():
                    seen.append(batch)
            self.assertEqual((len(seen), p.add(a=1, b=2)), (3, 3))

    def test_one_answer_for_many_turns(self) -> None:
        with ahead_http_server() as serving:
            sender = CountingSender(f"http://127.0.0.1:{serving.port}")
            with vgi_rpc.http_connect(Ahead, client=sender) as p:
                self.assertEqual(ahead_values(p.count(n=1000)), list(range(1000)))
                self.assertEqual(sender.posts, ["/Ahead/count/init", "/Ahead/count/exchange"])
                self.assertEqual(len(sender._idle), 1)  # the connection came back

    def test_a_batch_arrives_before_the_next_is_made(self) -> None:
        with self.connect(timeout=AHEAD_WATCHDOG_SECONDS) as p:
            seen = []
            for batch in p.lazy():
                seen += ahead_values([batch])
                arrived.set()
            self.assertEqual(seen, [0, 1, 2, 3])

    def test_token_within_an_answer(self) -> None:
        with self.connect() as p:
            for k in (1, 2, 5, 30):
                session = p.count(n=60)
                for seen, _ in enumerate(session, 1):
                    if seen == k:
                        break
                token = session.token() if k > 1 else None
                rest = ahead_values(session)
                self.assertEqual(rest, list(range(k, 60)))
                if token is not None:
                    self.assertEqual(ahead_values(vgi_rpc.resume(p, "count", token)), rest)

    def test_a_cut_answer_is_resumed_where_it_was_cut(self) -> None:
        with self.connect() as p:
            session = p.count(n=5000)
            seen = []
            with self.assertRaises(TransportError):
                for batch in session:
                    seen += ahead_values([batch])
                    if len(seen) == 20:
                        session._stream._rest.channel.socket.shutdown(socket.SHUT_RDWR)
            self.assertTrue(session.closed)
            with self.assertRaisesRegex(RpcError, "was cut off"):
                next(iter(session))
            going_on = vgi_rpc.resume(p, "count", session.token())
            self.assertEqual(seen + ahead_values(going_on), list(range(5000)))

    def test_budget_holds_per_answer(self) -> None:
        sizes = [20_000] * 20
        with ahead_http_server({"max_response_bytes": 70_000}) as serving:
            sender = CountingSender(f"http://127.0.0.1:{serving.port}")
            sizes_seen = []
            chunked = vgi_rpc.read_chunked

            def counted(channel, limit, rule):
                sizes_seen.append(0)
                for piece in chunked(channel, limit, rule):
                    sizes_seen[-1] += len(piece)
                    yield piece

            with vgi_rpc.http_connect(Ahead, client=sender) as p, mock.patch.object(vgi_rpc, "read_chunked", counted):
                seen = [b.batch["blob"][0].as_py() for b in p.blobs(sizes=sizes)]
                self.assertEqual(seen, [bytes([i]) * 20_000 for i in range(20)])
                self.assertLessEqual(max(sizes_seen), 70_000)
                self.assertGreater(max(sizes_seen), 40_000)  # several batches to an answer
                with self.assertRaisesRegex(RpcError, r"max_response_bytes \(\d+ > 70000\)"):
                    list(p.blobs(sizes=[10, 10, 10, 90_000]))
                self.assertEqual([len(b.batch["blob"][0].as_py()) for b in p.blobs(sizes=[10, 60_000, 60_000, 1])], [10, 60_000, 60_000, 1])
                with p.growing() as session:  # what does not fit is made again from the state before it
                    seen = [b.batch["blob"][0].as_py()[0] for _, b in zip(range(12), session)]
                self.assertEqual(seen, list(range(12)))

    def test_a_state_that_cannot_be_sealed_when_the_next_batch_does_not_fit(self) -> None:
        with self.connect(accepted_max_response_bytes=70_000) as p, p.spoilt() as session:
            with self.assertRaisesRegex(RpcError, "wide: expected int64") as caught:
                for seen, _ in enumerate(session, 1):
                    self.assertLessEqual(seen, 4)
            self.assertEqual(caught.exception.error_type, "TypeError")  # an answer, not a connection that breaks

    def test_a_server_that_answers_one_turn(self) -> None:
        with mock.patch.object(vgi_rpc, "MAX_TURNS_HEADER", "X-Nobody-Knows"):
            client = vgi_rpc.make_sync_client(RpcServer(Ahead, AheadImpl()))
        app, client.app = client.app, None
        client.app = lambda request: app(drop(request))

        def drop(request):
            request.headers = {k: v for k, v in request.headers.items() if k != "vgi-max-turns"}
            return request

        with vgi_rpc.http_connect(Ahead, client=client) as p:
            self.assertEqual(ahead_values(p.count(n=30)), list(range(30)))

    def test_each_turn_of_an_answer_has_the_whole_time(self) -> None:
        late, left, produce = [0.0], [], AheadCount.produce
        clock = types.SimpleNamespace(**{**vars(time), "monotonic": lambda: time.monotonic() + late[0]})

        def slow(state: Any, out: OutputCollector, ctx: CallContext) -> None:
            left.append(ctx.deadline - clock.monotonic())
            late[0] += 50.0
            produce(state, out, ctx)

        client = vgi_rpc.make_sync_client(RpcServer(Ahead, AheadImpl()), token_key=AHEAD_KEY)
        with contextlib.ExitStack() as stack:
            for owner, name, value in ((vgi_rpc, "time", clock), (vgi_rpc, "MAX_TURNS_SECONDS", 1e9), (AheadCount, "produce", slow)):
                stack.enter_context(mock.patch.object(owner, name, value))
            proxy = stack.enter_context(vgi_rpc.http_connect(Ahead, client=client, timeout=80.0))
            self.assertEqual(ahead_values(proxy.count(n=10)), list(range(10)))
        self.assertEqual((len(left), [seconds for seconds in left if not 30 < seconds < 81]), (11, []))

    def test_init_streams_too(self) -> None:
        server = RpcServer(Ahead, AheadImpl())
        app = vgi_rpc.HttpApp(server, vgi_rpc.HttpOptions(token_key=AHEAD_KEY))
        info = vgi_rpc.rpc_methods(Ahead)["count"]
        request = vgi_rpc.request_batch(info, [3000, -1])
        body = vgi_rpc._request_body(info, request, vgi_rpc.CallOptions())
        headers = {"content-type": "application/vnd.apache.arrow.stream", "vgi-max-turns": "10"}
        for asked, batches in (("10", 10), ("1", 1), ("0", 1), ("+5", 1), ("99999", vgi_rpc.MAX_TURNS)):
            headers["vgi-max-turns"] = asked
            response = app(vgi_rpc.HttpRequest("POST", "/Ahead/count/init", dict(headers), "", lambda limit: body))
            whole = response.body if isinstance(response.body, bytes) else b"".join(response.body)
            reader = vgi_rpc.IpcReader(vgi_rpc.BufferSource(whole))
            items = []
            while (item := reader.next()) is not None:
                items.append(vgi_rpc.batch_kind(item[0].num_rows, item[1]).value)
            self.assertEqual(items, ["log", "data"] * batches + ["token"])

    def test_an_answer_that_nobody_reads_ends_its_call(self) -> None:
        ended = threading.Event()
        records = []

        class Hook:
            def on_dispatch_start(self, record):
                return None

            def on_dispatch_end(self, token, record, error):
                records.append((record.statistics.output_batches, dict(record.http)))
                if len(records) == 2:
                    ended.set()

        with ahead_http_server(hook=Hook()) as serving:
            with vgi_rpc.http_connect(Ahead, f"http://127.0.0.1:{serving.port}") as p:
                session = p.blobs(sizes=[1_000_000] * 200)
                iterator = iter(session)
                next(iterator), next(iterator)
                self.assertGreater(serving.app.server._active, 0)
                session.close()
                self.assertTrue(ended.wait(AHEAD_WATCHDOG_SECONDS))
                with serving.app.server._state:
                    self.assertTrue(serving.app.server._state.wait_for(lambda: not serving.app.server._active, AHEAD_WATCHDOG_SECONDS))
            self.assertLess(records[1][0], 200)
            self.assertEqual(records[1][1]["http_status"], 200)

    def test_draining_ends_an_answer_with_its_token(self) -> None:
        with ahead_http_server() as serving:
            with vgi_rpc.http_connect(Ahead, f"http://127.0.0.1:{serving.port}", timeout=AHEAD_WATCHDOG_SECONDS) as p:
                session, seen = p.lazy(), []
                with self.assertRaisesRegex(RpcError, "stopping") as caught:
                    for batch in session:
                        seen += ahead_values([batch])
                        if len(seen) == 2:
                            serving.app.server.draining = True
                        arrived.set()
                self.assertEqual(caught.exception.error_code, "UNAVAILABLE")
                self.assertEqual(seen, [0, 1, 2])


class AheadWsgiTests(unittest.TestCase):
    def test_turns_come_as_they_are_made(self) -> None:
        produced.clear()
        app = vgi_rpc.make_wsgi_app(RpcServer(Ahead, AheadImpl()), token_key=AHEAD_KEY)
        info = vgi_rpc.rpc_methods(Ahead)["count"]
        body = vgi_rpc._request_body(info, vgi_rpc.request_batch(info, [50, -1]), vgi_rpc.CallOptions())
        environ = {
            "REQUEST_METHOD": "POST", "PATH_INFO": "/Ahead/count/init", "CONTENT_LENGTH": str(len(body)),
            "CONTENT_TYPE": "application/vnd.apache.arrow.stream", "HTTP_VGI_MAX_TURNS": "20", "wsgi.input": io.BytesIO(body),
        }  # fmt: skip
        answer = app(environ, lambda status, headers: None)
        next(answer)
        self.assertEqual(produced, [0])
        next(answer)
        self.assertEqual(produced, [0, 1])
        self.assertEqual(app.app.server._active, 1)
        answer.close()
        self.assertEqual(app.app.server._active, 0)


# ============================================================================
# FAULTS: WHAT MUST NOT BREAK, A FUZZER AND A SOAK
# ============================================================================


HARD_WORKER = [sys.executable, str(HERE / "test_vgi_rpc.py"), "hard-worker"]
ANSWERS = pa.schema([("answer", pa.utf8())])
NUMBERS = pa.schema([("n", pa.int64())])


# -- a service that is hard on its server


@dataclass
class Asking(ProducerState):
    """Answers one question for ever, or *limit* times."""

    question: str
    limit: int
    at: int = 0

    def produce(self, out: Any, ctx: CallContext) -> None:
        if self.at >= self.limit:
            out.finish()
            return
        out.emit_pydict({"answer": [f"{self.question}/{self.at}"]})
        self.at += 1


@dataclass
class Answering(ExchangeState):
    """Answers with what it is asked, and its own name."""

    name: str

    def exchange(self, input: AnnotatedBatch, out: Any, ctx: CallContext) -> None:
        out.emit_pydict({"answer": [f"{self.name}:{v}" for v in input.batch.column(0).to_pylist()]})


@dataclass
class Broken(ExchangeState):
    """Breaks outside of its own methods, too."""

    how: str

    def exchange(self, input: AnnotatedBatch, out: Any, ctx: CallContext) -> None:
        if self.how in LOGS:
            LOGS[self.how](out.client_log)
        elif self.how in RAISED:
            raise RAISED[self.how]()
        out.emit_pydict({"answer": ["fine"]})

    def rehydrate(self, implementation: Any) -> None:
        if self.how.startswith("rehydrate "):
            raise RAISED[self.how[10:]]()


@dataclass
class HardSumming(ExchangeState):
    """Says how many rows came in."""

    total: int = 0

    def exchange(self, input: AnnotatedBatch, out: Any, ctx: CallContext) -> None:
        self.total += input.batch.num_rows
        out.emit_pydict({"n": [self.total]})


class _NoAttributes(Exception):
    error_kind = property(lambda self: 1 / 0)  # type: ignore[assignment]
    error_code = property(lambda self: sys.exit(3))  # type: ignore[assignment]
    error_details = property(lambda self: (_ for _ in ()).throw(KeyboardInterrupt()))  # type: ignore[assignment]


class _Exits(Exception):
    def __str__(self) -> str:
        raise SystemExit(3)


class _NoText(Exception):
    def __str__(self) -> str:
        return 5  # type: ignore[return-value]

    __repr__ = __str__


class _Truth:
    def __bool__(self) -> bool:
        raise RuntimeError("neither")

    def __eq__(self, other: object) -> bool:
        raise RuntimeError("not comparable")

    __hash__ = None  # type: ignore[assignment]


def _with(kind: Any = "", code: Any = "", details: Any = (), text: str = "text") -> Exception:
    exc = type("\ud800odd", (Exception,), {})(text)
    exc.error_kind, exc.error_code, exc.error_details = kind, code, details  # type: ignore[attr-defined]
    return exc


def _chain(levels: int) -> Exception:
    exc: BaseException = _Exits("inner")
    for level in range(levels):
        outer = ValueError(level)
        outer.__cause__ = exc
        exc = outer
    return exc  # type: ignore[return-value]


def _circle() -> Exception:
    one, two = KeyError("one"), KeyError("two")
    one.__cause__, two.__context__ = two, one
    return one


RAISED: dict[str, Any] = {  # what a method may raise; each comes as one answer, and the server lives
    "attributes that raise": lambda: _NoAttributes("text"),
    "text that exits": lambda: _Exits("text"),
    "text that is a number": lambda: _NoText("text"),
    "kind and code without truth": lambda: _with(_Truth(), _Truth(), _Truth()),
    "surrogates everywhere": lambda: _with("\udcff", "\udcff", [{"@type": "a\udcff"}], "\udcff" * 50),
    "details without end": lambda: _with(details=iter(int, 1)),
    "details that hold themselves": lambda: _with(details=[_own_holder()]),
    "a text of ten million": lambda: ValueError("x" * 10_000_000),
    "a kind of a million": lambda: _with("k" * 1_000_000),
    "a chain of a thousand": lambda: _chain(1000),
    "a circle of causes": _circle,
    "StopIteration": lambda: StopIteration(3),
    "GeneratorExit": lambda: GeneratorExit(),
    "a base exception": lambda: type("Own", (BaseException,), {})("text"),
    "one of ours": lambda: vgi_rpc.TransportError("not really"),
    "a refusal": lambda: vgi_rpc.IPCError("not really"),
}


def _own_holder() -> dict[str, Any]:
    held: dict[str, Any] = {"@type": "own.Type"}
    held["self"] = held
    return held


def _circular() -> list[Any]:
    circle: list[Any] = []
    circle.append(circle)
    return circle


LOGS: dict[str, Any] = {  # log lines that are none; they fail the method or arrive, and the server lives
    "log: no level": lambda log: log("INFO", "text"),
    "log: a number": lambda log: log(Level.INFO, 5),
    "log: surrogates": lambda log: log(Level.INFO, "\udcff", key="\udcff"),
    "log: a circle": lambda log: log(Level.INFO, "text", key=_circular()),
    "log: odd keys": lambda log: log(Level.INFO, "text", key={(1, 2): 3}),
    "log: no text": lambda log: log(Level.INFO, _NoText("x")),
}


@dataclass
class Picky(vgi_rpc.ArrowSerializableDataclass):
    """Takes positive numbers only."""

    n: int

    def __post_init__(self) -> None:
        if self.n < 0:
            raise KeyError("negative")


@dataclass
class Outer(vgi_rpc.ArrowSerializableDataclass):
    """Holds one."""

    inner: Picky


class Hard(Protocol):
    """The service of these tests."""

    def ask(self, question: str) -> str: ...
    def hold(self, folder: str) -> str: ...
    def deaf(self, folder: str) -> int: ...
    def fail(self, how: str) -> int: ...
    def log(self, how: str) -> int: ...
    def sizes(self, values: list[float], names: list[str]) -> int: ...
    def nulls(self, values: Annotated[list, vgi_rpc.ArrowType(pa.list_(pa.null()))]) -> int: ...
    def color(self, color: Color) -> str: ...
    def picky(self, one: Picky, more: list[Outer]) -> int: ...
    def date(self, date: Annotated[datetime.datetime, vgi_rpc.ArrowType(pa.timestamp("us"))]) -> str: ...
    def table(self, batch: pa.RecordBatch) -> int: ...
    def point(self, point: Point) -> int: ...
    def asking(self, question: str, limit: int) -> Stream[StreamState]: ...
    def answering(self, name: str) -> Stream[StreamState]: ...
    def broken(self, how: str) -> Stream[StreamState]: ...
    def summing(self) -> Stream[StreamState]: ...
    def process_id(self) -> int: ...


class HardImpl:
    """Implements `Hard`."""

    def ask(self, question: str) -> str:
        return f"answer to {question}"

    def hold(self, folder: str, ctx: CallContext) -> str:
        place, gate = pathlib.Path(folder), threading.Event()
        (place / "begun").touch()
        while not (place / "go").exists() and not ctx.cancelled:
            gate.wait(0.005)
        if ctx.cancelled:
            (place / "cancelled").touch()
            return "cancelled"
        return "held"

    def deaf(self, folder: str) -> int:
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)
        (pathlib.Path(folder) / str(os.getpid())).touch()
        while True:
            time.sleep(60)

    def fail(self, how: str) -> int:
        raise RAISED[how]()

    def log(self, how: str, ctx: CallContext) -> int:
        LOGS[how](ctx.client_log)
        return 1

    def sizes(self, values: list[float], names: list[str]) -> int:
        return len(values) + len(names)

    def nulls(self, values: list) -> int:
        return len(values)

    def picky(self, one: Picky, more: list[Outer]) -> int:
        return one.n

    def date(self, date: datetime.datetime) -> str:
        return str(date)

    def table(self, batch: pa.RecordBatch) -> int:
        return batch.num_rows

    def color(self, color: Color) -> str:
        return color.name

    def point(self, point: Point) -> int:
        return point.x

    def asking(self, question: str, limit: int) -> Stream[Asking]:
        return Stream(ANSWERS, Asking(question, limit))

    def answering(self, name: str) -> Stream[Answering]:
        return Stream(ANSWERS, Answering(name), input_schema=pa.schema([("question", pa.utf8())]))

    def broken(self, how: str) -> Stream[Broken]:
        return Stream(ANSWERS, Broken(how), input_schema=pa.schema([("question", pa.utf8())]))

    def summing(self) -> Stream[HardSumming]:
        return Stream(NUMBERS, HardSumming(), input_schema=pa.schema([("value", pa.list_(pa.int64()))]))

    def process_id(self) -> int:
        return os.getpid()


def hard_server(**options: Any) -> RpcServer:
    """A server of `Hard`."""
    return RpcServer(Hard, HardImpl(), **options)


def questions(*texts: str) -> AnnotatedBatch:
    """A batch with one column ``question``."""
    return AnnotatedBatch.from_pydict({"question": list(texts)}, pa.schema([("question", pa.utf8())]))


def hard_request(method: str, **values: Any) -> bytes:
    """A request, as a foreign client would write it."""
    schema = vgi_rpc.rpc_methods(Hard)[method].params_schema
    batch = pa.RecordBatch.from_arrays([pa.array([values[f.name]], f.type) for f in schema], schema=schema)
    return ipc_bytes(schema, (batch, request_metadata(method, b"Hard")))


def ask_core(server: RpcServer, data: bytes) -> list[list[Any]]:
    """What a server answers on a byte stream that holds *data* and ends."""
    channel = MemoryChannel(data)
    server.serve(vgi_rpc.Transport(channel, vgi_rpc.TransportKind.PIPE))
    return read_streams(b"".join(channel.written))


class MemoryChannel(vgi_rpc.ByteChannel):
    """A byte channel without a file: what it reads is given, what is written is kept, *most* bytes at a time."""

    def __init__(self, data: bytes, most: int = 1 << 30) -> None:
        super().__init__()
        self._data, self.written, self._most = io.BytesIO(data), [], most

    def fileno(self) -> int:
        return -1

    def close(self) -> None:
        self._data = io.BytesIO()

    def _receive(self, size: int) -> bytes:
        return self._data.read(min(size, self._most))

    def _receive_into(self, view: memoryview) -> int:
        return self._data.readinto(view[: self._most])

    def _send(self, pieces: list) -> int:
        self.written.append(b"".join(pieces)[: self._most])
        return len(self.written[-1])


def rss() -> int:
    """Resident bytes of this process, as far as the system tells."""
    with contextlib.suppress(OSError):
        return int(pathlib.Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return 0


# -- B: bytes


def compressed(batch: pa.RecordBatch, metadata: dict[bytes, bytes] | None = None, codec: str = "lz4") -> bytes:
    """A stream with compressed buffers."""
    sink = io.BytesIO()
    with pa.ipc.new_stream(sink, batch.schema, options=pa.ipc.IpcWriteOptions(compression=codec)) as writer:
        writer.write_batch(batch, custom_metadata=metadata)
    return sink.getvalue()


def sizes_batch(values: Any, names: Any) -> pa.RecordBatch:
    schema = vgi_rpc.rpc_methods(Hard)["sizes"].params_schema
    return pa.RecordBatch.from_arrays([pa.array([v], f.type) for v, f in zip((values, names), schema)], schema=schema)


def list_of_nulls(items: int) -> bytes:
    """A request whose one list has *items* nulls in a few hundred bytes."""
    schema = vgi_rpc.rpc_methods(Hard)["nulls"].params_schema
    column = pa.ListArray.from_arrays(pa.array([0, items], pa.int32()), pa.nulls(items))
    return ipc_bytes(schema, (pa.RecordBatch.from_arrays([column], schema=schema), request_metadata("nulls", b"Hard")))


def shared_head() -> bytes:
    """A good request in whose head the vectors of nodes and of buffers are made the same bytes."""
    data = hard_request("ask", question="x")
    start = 8 + struct.unpack_from("<i", data, 4)[0]
    size = struct.unpack_from("<i", data, start + 4)[0]
    head = bytearray(data[start + 8 : start + 8 + size])
    found, regions = vgi_rpc._parse_head(bytes(head))
    places = {name: at for at, _, name in regions}
    for at in range(0, len(head) - 4, 4):  # the offset that leads to the buffers now leads to the nodes
        (offset,) = struct.unpack_from("<I", head, at)
        if at + offset + 4 == places["buffers"]:
            struct.pack_into("<I", head, at, places["nodes"] - 4 - at)
    assert bytes(head) != data[start + 8 : start + 8 + size]
    return data[: start + 8] + bytes(head) + data[start + 8 + size :]


def twice() -> bytes:
    """A request whose metadata names its method twice."""
    schema = vgi_rpc.rpc_methods(Hard)["ask"].params_schema
    metadata = {**request_metadata("ask", b"Hard"), b"vgi_rpc.methoX": b"nothing"}
    data = ipc_bytes(schema, (pa.RecordBatch.from_arrays([pa.array(["q"])], schema=schema), metadata))
    return tampered(data, b"vgi_rpc.methoX", b"vgi_rpc.method")


BOMB_FLOATS = 8_000_000
BOMBS: dict[str, Any] = {  # name: bytes, HTTP statuses
    "compressed list over the limit": (lambda: compressed(sizes_batch([0.0] * BOMB_FLOATS, []), request_metadata("sizes", b"Hard")), (413,)),
    "a list of two billion nulls": (lambda: list_of_nulls(2**31 - 1), (400,)),
    "a trillion rows": (lambda: claiming_rows(10**12), (400,)),
    "nesting 500": (lambda: _deep(500), (400,)),
    "10,000 columns": (lambda: ipc_bytes(pa.schema([(f"c{i}", pa.int8()) for i in range(10_000)])), (400,)),
    "vectors that share their bytes": (shared_head, (200, 400)),
    "a method named twice": (twice, (200, 400, 404)),
}
if hasattr(pa, "run_end_encoded"):
    def _run_ends() -> bytes:
        column = pa.RunEndEncodedArray.from_arrays([2**30], [1], pa.run_end_encoded(pa.int32(), pa.int64()))
        return ipc_bytes(pa.schema([("n", column.type)]), pa.RecordBatch.from_arrays([column], names=["n"]))

    BOMBS["run ends of a billion"] = (_run_ends, (400,))


class HostileBytesTests(TestCase):
    """Requests that claim more than they hold."""

    def test_what_may_differ_between_heads_is_never_what_decides_how_they_are_read(self) -> None:
        fuzzer = Fuzzer()
        for case in range(3000):
            with self.subTest(case=case):
                fuzzer.layout(random.Random(f"layout/{case}"))

    def test_over_http(self) -> None:
        client = wsgi_client(hard_server(), max_request_bytes=16_000_000)
        paths = {"compressed list over the limit": "sizes", "a list of two billion nulls": "nulls"}
        for name, (make, statuses) in BOMBS.items():
            data = make()
            with self.subTest(name):
                for _ in range(3):  # what is learned from the first must not be wrong for the second
                    before = rss()
                    reply = client.post(f"/Hard/{paths.get(name, 'ask')}", data)
                    self.assertIn(reply.status, statuses)
                    self.assertLess(rss() - before, 64_000_000)
                    if reply.status != 200:
                        self.assertTrue(reply.error["text"])
        self.assertEqual(client.post("/Hard/ask", hard_request("ask", question="q")).status, 200)

    def test_bodies_that_do_not_decode_leave_nothing_behind(self) -> None:
        client = wsgi_client(hard_server())
        packed = vgi_rpc.zstd_compress(hard_request("ask", question="q" * 5000))
        tracemalloc.start()
        self.addCleanup(tracemalloc.stop)
        for data in (b"\x28\xb5\x2f\xfd garbage", packed[:-1], packed[:50] + b"\xff" * 20, os.urandom(5000)):
            client.post("/Hard/ask", data, content_encoding="zstd")
            before = tracemalloc.get_traced_memory()[0]
            for _ in range(20):
                self.assertEqual(client.post("/Hard/ask", data, content_encoding="zstd").status, 400)
            self.assertLess(tracemalloc.get_traced_memory()[0] - before, 1_000_000)

    def test_over_bytes(self) -> None:
        server = hard_server(max_request_bytes=16_000_000, max_rows=1000)
        for name, (make, _) in BOMBS.items():
            data = make()
            with self.subTest(name):
                before = rss()
                streams = ask_core(server, data)
                self.assertEqual(len(streams), 1)
                self.assertLess(rss() - before, 64_000_000)
        for data, text in (
            (ipc_bytes(pa.schema([("x", pa.int8())]), (pa.RecordBatch.from_pydict({"x": pa.array([1] * 1001, pa.int8())}), request_metadata("ask", b"Hard"))), "1000 rows"),
            (hard_request("ask", question="x" * 16_000_001), "16000000 bytes"),
        ):
            with self.subTest(text):
                error = error_of(ask_core(server, data + hard_request("ask", question="after"))[0])
                self.assertEqual((error["type"], error["code"]), ("RequestTooLargeError", "RESOURCE_EXHAUSTED"))
                self.assertIn(text, error["text"])
                self.assertEqual(ask_core(server, data + hard_request("ask", question="q"))[1][0][0].to_pydict(), {"result": ["answer to q"]})

    def test_values_that_the_application_or_python_does_not_take(self) -> None:
        inner = ipc_bytes(NUMBERS, pa.RecordBatch.from_pydict({"n": [-1]}, NUMBERS))
        good = ipc_bytes(NUMBERS, pa.RecordBatch.from_pydict({"n": [1]}, NUMBERS))
        bomb = compressed(pa.RecordBatch.from_pydict({"n": [0] * 40_000_000}, NUMBERS))
        client = wsgi_client(hard_server())
        schema = vgi_rpc.rpc_methods(Hard)["date"].params_schema
        batch = pa.RecordBatch.from_arrays([pa.array([2**62]).cast(schema.field(0).type)], schema=schema)
        for method, data, parts in (
            ("picky", hard_request("picky", one=inner, more=[]), ("picky()", "one", "negative")),
            ("picky", hard_request("picky", one=good, more=[{"inner": {"n": -1}}]), ("picky()", "more[0].inner", "negative")),
            ("picky", hard_request("picky", one=bomb, more=[]), ("picky()", "one")),
            ("table", hard_request("table", batch=bomb), ("table()", "batch")),
            ("table", hard_request("table", batch=b"garbage"), ("table()", "batch", "Arrow")),
            ("date", ipc_bytes(schema, (batch, request_metadata("date", b"Hard"))), ("date()", "date")),
        ):
            for _ in range(2):
                with self.subTest(method=method, parts=parts):
                    before = rss()
                    first, second = ask_core(hard_server(), data + hard_request("ask", question="q"))
                    reply = client.post(f"/Hard/{method}", data)
                    self.assertEqual((reply.status, reply.error["type"]), (400, "TypeError"))
                    for error in (error_of(first), reply.error):
                        self.assertEqual((error["type"], error["code"]), ("TypeError", "INVALID_ARGUMENT"))
                        for part in parts:
                            self.assertIn(part, error["text"])
                    self.assertEqual(second[0][0].to_pydict(), {"result": ["answer to q"]})
                    self.assertLess(rss() - before, 64_000_000)

    def test_an_exchange_input_of_nulls_is_not_cast_to_gigabytes(self) -> None:
        column = pa.ListArray.from_arrays(pa.array([0, 2**31 - 1], pa.int32()), pa.nulls(2**31 - 1))
        batch = pa.RecordBatch.from_arrays([column], names=["value"])
        before = rss()
        with vgi_rpc.serve_pipe(Hard, HardImpl()) as proxy:
            with proxy.summing() as session, self.raises(RpcError, "rows"):
                session.exchange(AnnotatedBatch(batch))
            self.assertEqual(proxy.ask("q"), "answer to q")
        with vgi_rpc.http_connect(Hard, client=wsgi_client(hard_server())) as proxy:
            with self.raises(RpcError, "rows"):
                proxy.summing().exchange(AnnotatedBatch(batch))
        self.assertLess(rss() - before, 64_000_000)


# -- C: methods


class MisbehavingMethodTests(TestCase):
    """Whatever a method raises or logs, one answer comes and the next call works."""

    def proxies(self) -> Any:
        yield "pipe", vgi_rpc.serve_pipe(Hard, HardImpl())
        yield "http", vgi_rpc.http_connect(Hard, client=wsgi_client(hard_server()))

    def test_exceptions(self) -> None:
        for where, connection in self.proxies():
            with connection as proxy:
                for how in RAISED:
                    if how == "details without end":
                        continue
                    with self.subTest(how, where=where):
                        with self.assertRaises(RpcError) as caught:
                            proxy.fail(how)
                        self.assertTrue(caught.exception.error_type)
                        self.assertLess(len(caught.exception.error_message), 20_000)
                        self.assertLess(len(caught.exception.remote_traceback), 20_000)
                        self.assertLess(len(caught.exception.error_kind), 300)
                        caught.exception.details()
                        with self.assertRaises(RpcError):
                            proxy.broken(how).exchange(questions("q"))
                        self.assertEqual(proxy.ask("q"), "answer to q")

    def test_logs(self) -> None:
        for where, connection in self.proxies():
            with connection as proxy:
                for how in LOGS:
                    with self.subTest(how, where=where):
                        with contextlib.suppress(RpcError):
                            self.assertEqual(proxy.log(how), 1)
                        with contextlib.suppress(RpcError):
                            self.assertEqual(proxy.broken(how).exchange(questions("q")).batch.to_pydict(), {"answer": ["fine"]})
                        self.assertEqual(proxy.ask("q"), "answer to q")

    def test_rehydrate(self) -> None:
        with vgi_rpc.http_connect(Hard, client=wsgi_client(hard_server())) as proxy:
            for how in RAISED:
                if how != "details without end":
                    with self.subTest(how), self.assertRaises(RpcError):
                        proxy.broken(f"rehydrate {how}").exchange(questions("q"))

    def test_hooks_that_exit(self) -> None:
        class Exits:
            def on_dispatch_start(self, record: Any) -> None:
                raise SystemExit(1)

            def on_dispatch_end(self, token: Any, record: Any, error: Any) -> None:
                raise KeyboardInterrupt

        server = hard_server()
        server.add_hook(Exits())
        self.assertEqual(ask_core(server, hard_request("ask", question="q"))[0][0][0].to_pydict(), {"result": ["answer to q"]})


# -- D and E: tokens and callers


class CallerTests(TestCase):
    """Tokens and credentials, over raw HTTP."""

    def test_several_processes_need_a_key(self) -> None:
        for given, multiprocess, status in ((None, True, 500), (None, False, 200), (KEY, True, 200)):
            with mock.patch.dict(os.environ):
                os.environ.pop("VGI_RPC_TOKEN_KEY", None)
                app = vgi_rpc.make_wsgi_app(hard_server(), token_key=given)

            def started(path: str, body: bytes, app: Any = app, several: bool = multiprocess) -> int:
                environ = {"REQUEST_METHOD": "POST", "PATH_INFO": path, "SCRIPT_NAME": "", "CONTENT_TYPE": ARROW}
                environ |= {"CONTENT_LENGTH": str(len(body)), "wsgi.input": io.BytesIO(body), "wsgi.multiprocess": several}  # type: ignore[dict-item]
                seen: list[str] = []
                answer = b"".join(app(environ, lambda status, headers: seen.append(status)))
                if seen[0].startswith("500"):
                    self.assertIn("VGI_RPC_TOKEN_KEY", error_of(read_streams(answer)[-1])["text"])
                return int(seen[0][:3])

            with self.subTest(given=given, multiprocess=multiprocess):
                self.assertEqual(started("/Hard/asking/init", hard_request("asking", question="q", limit=2)), status)
                self.assertEqual(started("/Hard/ask", hard_request("ask", question="q")), 200)

    def test_an_interrupt_leaves_the_connection_to_others(self) -> None:
        class Interrupted:
            """A lock that is taken, and then a signal comes."""

            def __init__(self, lock: Any) -> None:
                self.release, self._is_owned, self.take = lock.release, lock._is_owned, lock.acquire

            def acquire(self, timeout: float) -> bool:
                raise KeyboardInterrupt if self.take(timeout=timeout) else AssertionError

        near, far = vgi_rpc.make_pipe_pair()
        with contextlib.closing(near), contextlib.closing(far):
            client = vgi_rpc.ByteClient(near)
            lock, client._lock = client._lock, Interrupted(client._lock)  # type: ignore[assignment]
            with self.assertRaises(KeyboardInterrupt), client.exclusive(None):
                pass
            client._lock = lock
            taken = []

            def take() -> None:
                with client.exclusive(time.monotonic() + 5.0):
                    taken.append(client._caller)

            take()
            thread = threading.Thread(target=take)
            thread.start()
            thread.join()
            self.assertEqual((len(taken), client._caller), (2, 0))

    def test_credentials(self) -> None:
        people = {"secret": vgi_rpc.AuthContext("static", True, "ada")}

        def exits(request: Any) -> Any:
            raise SystemExit(3)

        _, port, _ = in_thread(vgi_rpc.serve_http, hard_server(), token_key=KEY, authenticate=vgi_rpc.bearer_authenticate_static(tokens=people))
        _, leaving, _ = in_thread(vgi_rpc.serve_http, hard_server(), token_key=KEY, authenticate=exits)
        body = hard_request("ask", question="q")
        for lines, status, reason in (
            (["Authorization: Bearer secret"], 200, None),
            (["authorization: bearer secret"], 200, None),
            ([], 401, "missing_credential"),
            (["Authorization:"], 401, "missing_credential"),
            (["Authorization: Bearer"], 401, "invalid_credential"),
            (["Authorization: Bearer  x "], 401, "invalid_credential"),
            (["Authorization: Bearer secret x"], 401, "invalid_credential"),
            (["Authorization: Basic c2VjcmV0"], 401, "missing_credential"),
            (["Authorization: Bearer s\xe9cret"], 401, "invalid_credential"),
            (["Authorization: Bearer " + "x" * 102_400], 401, "invalid_credential"),
            (["Authorization: Bearer secret", "Authorization: Bearer secret"], 400, None),
        ):
            with self.subTest(lines=[line[:60] for line in lines]), RawHttp(port) as raw:
                raw.send(http_head(f"Content-Length: {len(body)}", *lines, start="POST /Hard/ask HTTP/1.1") + body)
                reply = raw.answer()
                self.assertEqual(reply.status, status)
                if status == 401:
                    self.assertEqual((json.loads(reply.body)["reason"], reply.headers["vgi-auth-reason"]), (reason, reason))
                    self.assertEqual(reply.headers["www-authenticate"], "Bearer")
        with RawHttp(leaving) as raw:
            raw.send(http_head(f"Content-Length: {len(body)}", start="POST /Hard/ask HTTP/1.1") + body)
            self.assertEqual(raw.answer().status, 500)

    def test_a_token_bomb_is_not_opened(self) -> None:
        client = wsgi_client(hard_server())
        schema = pa.schema([("question", pa.utf8())])
        for size in (8_000, 64_000, 10_000_000):
            for token in (b"A" * size, b"\xff" * size, b"=" * size):
                metadata = {STATE: token, CALL: token}
                before = rss()
                reply = client.post("/Hard/answering/exchange", ipc_bytes(schema, (questions("q").batch, metadata)))
                self.assertEqual((reply.status, reply.error["type"]), (400, "TokenError"))
                self.assertLess(rss() - before, 150_000_000)

    def test_tiny_chunks_cost_no_more_than_their_bytes(self) -> None:
        _, port, _ = in_thread(vgi_rpc.serve_http, hard_server(), token_key=KEY, max_request_bytes=1_000_000)
        before = rss()
        with RawHttp(port) as raw:
            head = http_head("Transfer-Encoding: chunked", start="POST /Hard/ask HTTP/1.1")
            raw.send(head + b"2\r\nab\r\n" * 499_000 + b"0\r\n\r\n")
            self.assertEqual(raw.answer().status, 400)
        self.assertLess(rss() - before, 16_000_000)
        body = hard_request("ask", question="q")
        with RawHttp(port) as raw:
            raw.send(head + b"".join(b"1\r\n%c\r\n" % byte for byte in body) + b"0\r\n\r\n")
            self.assertEqual(raw.answer().status, 200)

    def test_idle_connections_beyond_the_cap(self) -> None:
        _, port, _ = in_thread(vgi_rpc.serve_http, hard_server(), token_key=KEY, max_connections=20)
        body = hard_request("ask", question="q")
        with contextlib.ExitStack() as stack:
            idle = [stack.enter_context(RawHttp(port)) for _ in range(200)]
            with RawHttp(port) as asking:
                asking.send(http_head(start="GET /health HTTP/1.1"))
                self.assertEqual(asking.answer().status, 200)
            with RawHttp(port) as refused:
                refused.send(http_head(f"Content-Length: {len(body)}", start="POST /Hard/ask HTTP/1.1") + body)
                reply = refused.answer()
                self.assertEqual((reply.status, reply.headers["retry-after"]), (503, "1"))
            self.assertTrue(idle[-1].ended())
            idle[0].send(http_head(f"Content-Length: {len(body)}", start="POST /Hard/ask HTTP/1.1") + body)
            self.assertEqual(idle[0].answer().status, 200)

    def test_a_client_that_leaves_in_the_answer_is_one_line_in_the_log(self) -> None:
        server = hard_server()
        _, port, _ = in_thread(vgi_rpc.serve_http, server, token_key=KEY)
        body = hard_request("ask", question="x" * 30_000_000)
        with self.assertLogs("vgi_rpc") as seen:
            with RawHttp(port) as raw:
                raw.send(http_head(f"Content-Length: {len(body)}", start="POST /Hard/ask HTTP/1.1") + body)
                self.assertEqual(raw.socket.recv(12), b"HTTP/1.1 200")
                raw.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            gate = threading.Event()
            while not seen.output:
                gate.wait(0.01)
        self.assertEqual(len(seen.output), 1)
        self.assertNotIn("Traceback", seen.output[0])

    def test_everybody_may_call_is_said_aloud(self) -> None:
        for host, options, lines in (
            ("0.0.0.0", {}, 1), ("127.0.0.1", {}, 0), ("0.0.0.0", {"authenticate": lambda request: vgi_rpc.AuthContext.anonymous()}, 0),
        ):
            with self.subTest(host=host, options=options), self.assertLogs("vgi_rpc") as seen:
                vgi_rpc.logger.info("at least one line")
                in_thread(vgi_rpc.serve_http, hard_server(), host=host, token_key=KEY, **options)
                self.assertEqual(len([line for line in seen.output if "without authentication" in line]), lines)

    def test_a_byte_at_a_time_does_not_pass_the_deadline(self) -> None:
        _, port, _ = in_thread(vgi_rpc.serve_http, hard_server(), token_key=KEY, read_timeout=0.5, request_deadline=0.5)
        body = hard_request("ask", question="q")
        for data in (http_head(start="GET /health HTTP/1.1"), http_head(f"Content-Length: {len(body)}", start="POST /Hard/ask HTTP/1.1") + body):
            with RawHttp(port) as raw:
                raw.socket.settimeout(0.05)
                sent = 0
                with contextlib.suppress(OSError):
                    while sent < len(data):
                        raw.socket.send(data[sent : sent + 1])
                        sent += 1
                        with contextlib.suppress(TimeoutError):
                            if not raw.socket.recv(4096):
                                break
                            break
                self.assertLess(sent, len(data))
        with RawHttp(port) as raw:
            raw.send(http_head(start="GET /health HTTP/1.1"))
            self.assertEqual(raw.answer().status, 200)


# -- F: processes


class HardWorker:
    """This file as a process that listens."""

    def __init__(self, *arguments: str) -> None:
        environment = {**os.environ, "VGI_RPC_TOKEN_KEY": KEY.decode(), "PYTHONPATH": sys.path[0]}
        self.process = subprocess.Popen([*HARD_WORKER, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment)
        assert self.process.stdout is not None
        self.line = self.process.stdout.readline().decode().strip()
        self.port = int(self.line.rpartition(":")[2]) if "UNIX" not in self.line else 0

    def connect(self, **options: Any) -> Any:
        """A new connection."""
        if self.line.startswith("PORT:"):
            return vgi_rpc.http_connect(Hard, f"http://127.0.0.1:{self.port}", **options)
        if self.line.startswith("UNIX:"):
            return vgi_rpc.unix_connect(Hard, self.line[5:], **options)
        return vgi_rpc.tcp_connect(Hard, "127.0.0.1", self.port, **options)

    def __enter__(self) -> "HardWorker":
        return self

    def __exit__(self, *exc: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.communicate()


def await_file(*path: Any) -> None:
    """Wait until a file is there; the watchdog ends what never comes."""
    gate = threading.Event()
    while not pathlib.Path(*path).exists():
        gate.wait(0.005)


class StoppingTests(TestCase):
    """SIGTERM: running calls finish, new ones are refused, the process ends with 0. And a worker that does not listen."""

    def setUp(self) -> None:
        super().setUp()
        self.folder = tempfile.mkdtemp()
        self.addCleanup(shutil.rmtree, self.folder)

    def test_a_signal_that_interrupts_nothing(self) -> None:
        program = """
import signal, sys, threading
sys.path.insert(0, sys.argv[1])
import vgi_rpc

class Empty: pass

def bound(*address):  # another thread gets the signal: the main one is not interrupted where it waits
    threading.Timer(0.2, lambda: signal.pthread_kill(threading.get_ident(), signal.SIGTERM)).start()

server = vgi_rpc.RpcServer(Empty, Empty())
{"http": vgi_rpc.serve_http, "tcp": vgi_rpc.serve_tcp}[sys.argv[2]](server, on_bound=bound)
print("stopped")
"""
        for kind in ("http", "tcp"):
            with self.subTest(kind):
                command = [sys.executable, "-c", program, str(HERE), kind]
                self.assertEqual(subprocess.check_output(command, timeout=LIMIT, env=environment(VGI_RPC_TOKEN_KEY="k" * 32), text=True), "stopped\n")

    def test_draining(self) -> None:
        for arguments in (["--http"], ["--tcp", "0"], ["--unix", os.path.join(self.folder, "s")]):
            with self.subTest(arguments[0]), HardWorker(*arguments) as worker:
                place = tempfile.mkdtemp(dir=self.folder)
                found: list[Any] = []

                def hold(worker: Any = worker, place: str = place, found: Any = found) -> None:
                    with worker.connect() as proxy:
                        found.append(proxy.hold(place))

                thread = threading.Thread(target=hold)
                with worker.connect() as other:
                    self.assertEqual(other.ask("q"), "answer to q")
                    thread.start()
                    await_file(place, "begun")
                    worker.process.send_signal(signal.SIGTERM)
                    while True:  # until the signal has arrived
                        try:
                            other.ask("q")
                        except RpcError as exc:
                            self.assertEqual((exc.error_kind, exc.code, exc.is_retryable()), ("server_draining", vgi_rpc.Code.UNAVAILABLE, True))
                            break
                with worker.connect() as late, self.assertRaises(RpcError) as caught:
                    late.ask("q")
                self.assertEqual(caught.exception.error_kind, "server_draining")
                if arguments == ["--http"]:
                    with RawHttp(worker.port) as raw:
                        raw.send(http_head(start="GET /health HTTP/1.1"))
                        self.assertEqual(json.loads(raw.answer().body)["status"], "draining")
                self.assertIsNone(worker.process.poll())
                pathlib.Path(place, "go").touch()
                thread.join(WATCHDOG_SECONDS)
                self.assertEqual(found, ["held"])
                _, error = worker.process.communicate(timeout=WATCHDOG_SECONDS)
                self.assertEqual((worker.process.returncode, b"Traceback" in error), (0, False), error)

    def test_draining_stdio(self) -> None:
        with mock.patch("sys.stderr", io.StringIO()):
            transport = vgi_rpc.SubprocessTransport(HARD_WORKER)
            with vgi_rpc.RpcConnection(Hard, transport) as proxy:
                found: list[Any] = []
                thread = threading.Thread(target=lambda: found.append(proxy.hold(self.folder)))
                thread.start()
                await_file(self.folder, "begun")
                transport.proc.send_signal(signal.SIGTERM)
                pathlib.Path(self.folder, "go").touch()
                thread.join(WATCHDOG_SECONDS)
                self.assertEqual(found, ["held"])
                self.assertEqual(transport.proc.wait(WATCHDOG_SECONDS), 0)

    def test_a_deaf_worker_is_killed_and_reaped(self) -> None:
        with mock.patch("sys.stderr", io.StringIO()), vgi_rpc.connect(Hard, HARD_WORKER) as proxy:
            proxy.ask("q")
            with self.assertRaises(vgi_rpc.DeadlineExceededError) as caught:
                proxy.with_options(timeout=1.0).deaf(self.folder)
            self.assertIs(caught.exception.code, vgi_rpc.Code.DEADLINE_EXCEEDED)
            (process,) = os.listdir(self.folder)
            with self.assertRaises(ProcessLookupError):  # a zombie would still be there
                os.kill(int(process), 0)
            with self.raises(TransportError, "closed"):
                proxy.ask("q")

    def test_deadlines_and_leaving_clients(self) -> None:
        for arguments in (["--http"], ["--tcp", "0"], ["--unix", os.path.join(self.folder, "s2")]):
            with self.subTest(arguments[0]), HardWorker(*arguments) as worker:
                late, gone = tempfile.mkdtemp(dir=self.folder), tempfile.mkdtemp(dir=self.folder)
                with worker.connect(timeout=0.5) as proxy, self.assertRaises(vgi_rpc.DeadlineExceededError) as caught:
                    proxy.hold(late)
                self.assertIs(caught.exception.code, vgi_rpc.Code.DEADLINE_EXCEEDED)
                await_file(late, "cancelled")
                family = socket.AF_UNIX if "--unix" in arguments else socket.AF_INET
                body = hard_request("hold", folder=gone)
                with socket.socket(family) as raw:
                    raw.connect(worker.line[5:] if "--unix" in arguments else ("127.0.0.1", worker.port))
                    head = http_head(f"Content-Length: {len(body)}", start="POST /Hard/hold HTTP/1.1") if arguments == ["--http"] else b""
                    raw.sendall(head + body)
                    await_file(gone, "begun")
                await_file(gone, "cancelled")
                with worker.connect() as proxy:
                    self.assertEqual(proxy.ask("q"), "answer to q")


class PoolTests(TestCase):
    """Workers that are used again, and those that must not be."""

    def setUp(self) -> None:
        super().setUp()
        quiet = mock.patch("sys.stderr", io.StringIO())
        quiet.start()
        self.addCleanup(quiet.stop)

    def test_reuse_per_command(self) -> None:
        with vgi_rpc.WorkerPool(shm_size=64 << 20) as pool:
            found = []
            for command in (HARD_WORKER, HARD_WORKER, [*HARD_WORKER, "--idle-timeout", "9"], HARD_WORKER):
                with pool.connect(Hard, command) as proxy:
                    found.append(proxy.process_id())
                    self.assertEqual((pool.active_count, pool.metrics.active), (1, 1))
                    self.assertEqual(proxy.ask(str(len(found))), f"answer to {len(found)}")
            self.assertEqual((found[0], found[0]), (found[1], found[3]))
            self.assertNotEqual(found[0], found[2])
            self.assertEqual(pool.metrics, vgi_rpc.PoolMetrics(4, 2, 2, 4, 0, 0, 0, 2, 0))
            self.assertEqual((pool.idle_count, pool.active_count), (2, 0))
        self.assertEqual((pool.idle_count, pool.metrics.discards), (0, 2))
        with self.raises(TransportError, "closed"), pool.connect(Hard, HARD_WORKER):
            pass
        pool.close()

    def test_a_left_stream_is_ended_and_a_left_proxy_is_refused(self) -> None:
        with vgi_rpc.WorkerPool() as pool:
            with pool.connect(Hard, HARD_WORKER) as left:
                session = left.asking("q", 1000)
                self.assertEqual(next(iter(session)).batch.to_pydict(), {"answer": ["q/0"]})
            with pool.connect(Hard, HARD_WORKER) as proxy:
                self.assertEqual(proxy.ask("new"), "answer to new")
                with self.raises(TransportError, "closed"):
                    left.ask("old")
                with self.assertRaises(RpcError):
                    session.tick()
                with self.assertRaises(RpcError):
                    proxy.broken("StopIteration").exchange(questions("q"))
            with pool.connect(Hard, HARD_WORKER) as proxy:
                self.assertEqual(proxy.ask("after an error"), "answer to after an error")
            self.assertEqual((pool.metrics.spawns, pool.metrics.reuses), (1, 2))

    def test_what_is_not_used_again(self) -> None:
        with vgi_rpc.WorkerPool() as pool:
            with pool.connect(Hard, HARD_WORKER) as proxy:
                killed = proxy.process_id()
            os.kill(killed, signal.SIGKILL)
            os.waitid(os.P_PID, killed, os.WEXITED | os.WNOWAIT)
            with pool.connect(Hard, HARD_WORKER) as proxy:
                self.assertEqual(proxy.ask("q"), "answer to q")
                with self.assertRaises(vgi_rpc.DeadlineExceededError):
                    with tempfile.TemporaryDirectory() as folder:
                        proxy.with_options(timeout=0.2).hold(folder)
            with pool.connect(Hard, HARD_WORKER) as proxy:
                self.assertEqual(proxy.ask("q"), "answer to q")
            self.assertEqual(pool.metrics, vgi_rpc.PoolMetrics(3, 3, 0, 2, 2, 0, 0, 1, 0))
        program = "import sys, os; sys.path.insert(0, sys.argv[1]); import test_vgi_rpc as h\nh.late_printer()"
        with vgi_rpc.WorkerPool() as pool:
            for _ in range(2):
                with pool.connect(Hard, [sys.executable, "-c", program, str(HERE)]) as proxy:
                    self.assertEqual(proxy.ask("q"), "answer to q")
            self.assertEqual((pool.metrics.spawns, pool.metrics.reuses), (2, 0))
        with self.raises(TransportError, "no/such"), vgi_rpc.WorkerPool() as pool, pool.connect(Hard, ["/no/such"]):
            pass
        self.assertEqual(pool.metrics, vgi_rpc.PoolMetrics(borrows=1))

    def test_eviction_leaves_nothing(self) -> None:
        def round_of(idle: int, timeout: float) -> vgi_rpc.PoolMetrics:
            with vgi_rpc.WorkerPool(max_idle=idle, idle_timeout=timeout) as pool:
                with pool.connect(Hard, HARD_WORKER) as one, pool.connect(Hard, HARD_WORKER) as two:
                    self.assertNotEqual(one.process_id(), two.process_id())
                while timeout < 1 and pool.idle_count:
                    threading.Event().wait(0.02)
                return pool.metrics

        round_of(0, 60.0)
        before = resources()
        for idle, timeout, expected in ((0, 60.0, (0, 2, 0)), (1, 60.0, (0, 1, 1)), (4, 0.05, (2, 0, 0))):
            found = round_of(idle, timeout)
            with self.subTest(idle=idle, timeout=timeout):
                self.assertEqual((found.evictions_idle, found.evictions_max, found.idle), expected)
        self.assertEqual(resources(), before)

    def test_an_idle_worker_that_dies_is_reaped(self) -> None:
        before = resources()
        with vgi_rpc.WorkerPool() as pool:
            with pool.connect(Hard, HARD_WORKER) as proxy:
                killed = proxy.process_id()
            os.kill(killed, signal.SIGKILL)
            while pool.idle_count:
                threading.Event().wait(0.02)
            with self.assertRaises(ProcessLookupError):  # a zombie would still be there
                os.kill(killed, 0)
            self.assertEqual((pool.metrics.discards, pool.metrics.evictions_idle), (1, 0))
        self.assertEqual(resources(), before)

    def test_many_threads(self) -> None:
        with vgi_rpc.WorkerPool(max_idle=2) as pool:
            wrong: list[str] = []

            def work(name: str) -> None:
                for i in range(5):
                    with pool.connect(Hard, HARD_WORKER) as proxy:
                        if proxy.ask(f"{name}{i}") != f"answer to {name}{i}":
                            wrong.append(name)

            threads = [threading.Thread(target=work, args=(name,)) for name in "abc"]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            found = pool.metrics
            self.assertEqual((wrong, found.borrows, found.returns, found.active), ([], 15, 15, 0))
            self.assertEqual(found.spawns - found.evictions_max, found.idle)

    def test_arguments(self) -> None:
        for options in ({"max_idle": -1}, {"idle_timeout": 0.0}, {"idle_timeout": float("inf")}, {"shm_size": 0}, {"shm_size": "1"}):
            with self.subTest(options=options), self.assertRaises(ValueError):
                vgi_rpc.WorkerPool(**options)  # type: ignore[arg-type]
        with vgi_rpc.WorkerPool() as pool, self.assertRaises(TypeError), pool.connect(Hard, "one string"):
            pass

    def test_options_of_a_proxy(self) -> None:
        lines: list[Any] = []
        with vgi_rpc.serve_pipe(Hard, HardImpl(), on_log=lines.append, timeout=30.0) as proxy:
            other = proxy.with_options(timeout=None)
            self.assertEqual((other._options.timeout, proxy._options.timeout), (None, 30.0))
            other.log("log: surrogates")
            self.assertEqual(len(lines), 1)
            proxy.with_options(on_log=None).log("log: surrogates")
            self.assertEqual(len(lines), 1)
            self.assertEqual(vgi_rpc.with_options(proxy, timeout=5.0)._options.timeout, 5.0)
            with self.raises(TypeError, "patience"):
                proxy.with_options(patience=3)
            with self.assertRaises(ValueError):
                proxy.with_options(timeout=0)


def late_printer() -> None:
    """A worker that prints to its channel behind every answer."""

    class Server(RpcServer):
        def serve(self, transport: Any, **options: Any) -> None:
            write = transport.channel.write
            transport.channel.write = lambda pieces: write([*pieces, b"stray"])
            super().serve(transport, **options)

    vgi_rpc.serve_stdio(Server(Hard, HardImpl()))


def resources() -> tuple[int, int, int]:
    """Descriptors and threads of this process, and dead children that nobody reaped."""
    descriptors = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
    zombies = 0
    with contextlib.suppress(OSError):
        for child in pathlib.Path(f"/proc/self/task/{os.getpid()}/children").read_text().split():
            zombies += pathlib.Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    return descriptors, threading.active_count(), zombies


# -- G: the client


class HostileServerTests(TestCase):
    """A client on a byte stream whose server is hostile."""

    def proxy(self, answer: bytes, **options: Any) -> Any:
        return vgi_rpc.RpcConnection(Hard, vgi_rpc.Transport(MemoryChannel(answer), vgi_rpc.TransportKind.PIPE), **options)

    def test_logs_without_end_meet_the_deadline(self) -> None:
        ours, theirs = socket.socketpair()
        schema = vgi_rpc.rpc_methods(Hard)["ask"].result_schema
        log = ipc_bytes(schema, *[(vgi_rpc.empty_batch(schema), {b"vgi_rpc.log_level": b"INFO", b"vgi_rpc.log_message": b"x"})] * 100)[:-8]

        def flood() -> None:
            with contextlib.suppress(OSError), theirs:
                theirs.sendall(log)
                rest = log[log.index(b"\xff\xff\xff\xff", 8) :]
                while True:
                    theirs.sendall(rest)

        thread = threading.Thread(target=flood)
        thread.start()
        before = rss()
        with vgi_rpc.RpcConnection(Hard, vgi_rpc.Transport(vgi_rpc.SocketChannel(ours), vgi_rpc.TransportKind.TCP), timeout=0.5) as proxy:
            with self.assertRaises(vgi_rpc.DeadlineExceededError):
                proxy.ask("q")
        thread.join(WATCHDOG_SECONDS)
        self.assertLess(rss() - before, 64_000_000)

    def test_answers(self) -> None:
        schema = vgi_rpc.rpc_methods(Hard)["ask"].result_schema
        honest = pa.RecordBatch.from_arrays([pa.array(["x"])], schema=schema)
        for name, answer in {
            "a head of 60 MB": b"\xff\xff\xff\xff" + struct.pack("<i", 60_000_000),
            "a body of 2^62": tampered(ipc_bytes(NUMBERS, pa.RecordBatch.from_arrays([pa.array(range(1234567))], schema=NUMBERS))[:2000], struct.pack("<q", 1234567 * 8 + 48), struct.pack("<q", 2**62))
            if struct.pack("<q", 1234567 * 8 + 48) in ipc_bytes(NUMBERS, pa.RecordBatch.from_arrays([pa.array(range(1234567))], schema=NUMBERS))[:2000] else b"\0",
            "a bomb": compressed(pa.RecordBatch.from_arrays([pa.array(["x" * 50_000_000])], schema=schema))[:-2000],
            "another column": ipc_bytes(NUMBERS, pa.RecordBatch.from_pydict({"n": [1]}, NUMBERS)),
            "bad UTF-8": tampered(ipc_bytes(schema, pa.RecordBatch.from_arrays([pa.array(["xyzxyzxyz"])], schema=schema)), b"xyzxyzxyz", b"\xff" * 9),
            "an error that is none": ipc_bytes(schema, (honest.slice(0, 0), {b"vgi_rpc.log_level": b"EXCEPTION", b"vgi_rpc.log_message": b"\xff", b"vgi_rpc.log_extra": b"[" * 100_000})),
        }.items():
            with self.subTest(name), self.proxy(answer) as proxy, self.assertRaises((RpcError, TypeError)):
                before = rss()
                try:
                    proxy.ask("q")
                finally:
                    self.assertLess(rss() - before, 128_000_000)


# -- the fuzzer

SPECIAL = [0, 1, 2, 7, 8, 0x7F, 0x80, 0xFF, 0xFFFF, 2**31 - 1, 2**31, 2**32 - 1, 2**62, 2**63 - 1, 2**63, 2**64 - 1]


def mutated(data: bytes, others: list[bytes], rng: random.Random) -> bytes:
    """*data* with one to four faults in it."""
    out = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        at = rng.randrange(len(out) + 1)
        kind = rng.choice((0, 0, 0, 0, 1, 1, 2, 2, 3, 4, 5, 6, 7))
        if kind == 0 and out:
            out[min(at, len(out) - 1)] ^= 1 << rng.randrange(8)
        elif kind == 1 and out:
            out[min(at, len(out) - 1)] = rng.choice((0, 1, 0x20, 0x7F, 0x80, 0xFF, rng.randrange(256)))
        elif kind == 2:
            width = rng.choice((2, 4, 8))
            at -= at % width
            out[at : at + width] = (rng.choice(SPECIAL) % 2 ** (8 * width)).to_bytes(width, "little")
        elif kind == 3:
            del out[at:]
        elif kind == 4:
            del out[at : at + rng.randrange(1, 20)]
        elif kind == 5:
            out[at:at] = rng.randbytes(rng.randrange(1, 20))
        elif kind == 6:
            start = rng.randrange(len(out) + 1)
            out[at:at] = out[start : start + rng.randrange(1, 200)]
        else:
            other = rng.choice(others)
            start = rng.randrange(len(other) + 1)
            out[at : at + rng.randrange(40)] = other[start : start + rng.randrange(1, 200)]
    return bytes(out)


class Fuzzer:
    """One server of each kind, and the corpora that are mutated; each case is made by seed and number alone."""

    def __init__(self) -> None:
        self.server = hard_server(max_request_bytes=8_000_000)
        self.app = wsgi_client(self.server, max_request_bytes=8_000_000)
        _, self.port, _ = in_thread(
            vgi_rpc.serve_http, self.server, token_key=KEY, max_request_bytes=1_000_000, read_timeout=0.3, keep_alive_timeout=0.3
        )
        self.good = hard_request("ask", question="good")
        many = hard_request("sizes", values=[1.0, 2.0, 3.0], names=["a", "bb", "ccc"])
        point = hard_request("point", point=Point(3).serialize_to_bytes())
        schema = pa.schema([("question", pa.utf8())])
        exchange = hard_request("answering", name="n") + ipc_bytes(schema, questions("a", "b").batch, questions("c").batch)
        ticks = pa.RecordBatch.from_arrays([], schema=pa.schema([]))
        producer = hard_request("asking", question="q", limit=2) + ipc_bytes(ticks.schema, ticks, ticks, ticks)
        packed = compressed(sizes_batch([0.5] * 1000, ["x" * 100] * 20), request_metadata("sizes", b"Hard"))
        describe = request_bytes("describe", {"protocol": "Hard"}, pa.schema([pa.field("protocol", pa.utf8(), nullable=False)]), **{"vgi_rpc.protocol": b"vgi_rpc.Reflection.v1"})
        color = hard_request("color", color="RED")
        more = {"one": ipc_bytes(NUMBERS, pa.RecordBatch.from_pydict({"n": [1]}, NUMBERS)), "more": [{"inner": {"n": 1}}] * 3}
        self.requests = [hard_request("picky", **more), hard_request("date", date=datetime.datetime(2000, 1, 1)), self.good, many, point, exchange, producer, packed, describe, color, hard_request("nulls", values=[None, None])]
        self.paths = ["picky", "date", "ask", "sizes", "point", "answering/init", "asking/init", "sizes", "ask", "color", "nulls"]
        self.framed = [data for data, _ in FRAMING.values() if len(data) < 4000]
        self.framed += [http_head(f"Content-Length: {len(self.good)}", start="POST /Hard/ask HTTP/1.1") + self.good] * 10
        stream = self.app.post("/Hard/answering/init", hard_request("answering", name="n"))
        self.tokens = {k: v for k, v in read_streams(stream.body)[-1][-1][1].items() if k in (STATE, CALL)}
        self.replies = [b"".join(m.written) for m in map(self.served, self.requests)]
        self.counts: collections.Counter[str] = collections.Counter()

    def served(self, data: bytes) -> MemoryChannel:
        channel = MemoryChannel(data)
        self.server.serve(vgi_rpc.Transport(channel, vgi_rpc.TransportKind.PIPE))
        return channel

    def well_formed(self, written: bytes) -> str:
        """Check that the server's bytes are whole streams; return what the last one was."""
        outcome = "silence"
        for items in read_streams(written):
            errors = [b for b, m in items if m.get(b"vgi_rpc.log_level") == b"EXCEPTION"]
            if errors:
                assert error_of(items)["type"] not in INTERNAL, error_of(items)
            outcome = "error" if errors else "answer"
        return outcome

    def core(self, rng: random.Random) -> str:
        """A byte stream of one to three requests, mutated."""
        data = b"".join(rng.choice(self.requests) for _ in range(rng.randrange(1, 4)))
        outcome = self.well_formed(b"".join(self.served(mutated(data, self.requests, rng)).written))
        (good,) = read_streams(b"".join(self.served(self.good).written))
        assert good[0][0].to_pydict() == {"result": ["answer to good"]}, good
        return outcome

    def body(self, rng: random.Random) -> str:
        """An HTTP body, through WSGI."""
        at = rng.randrange(len(self.requests))
        headers = {"content-encoding": rng.choice(("gzip", "zstd", ""))} if rng.random() < 0.2 else {}
        data = mutated(self.requests[at], self.requests, rng)
        if headers.get("content-encoding") and rng.random() < 0.5:
            data = mutated(vgi_rpc.compress_body(data, headers["content-encoding"], 1), [data], rng)
        reply = self.app.post(f"/Hard/{self.paths[at]}", data, **{k.replace("-", "_"): v for k, v in headers.items()})
        return self.judged(reply)

    def judged(self, reply: Reply) -> str:
        assert reply.status in (200, 400, 404, 413, 415), reply
        if reply.headers["content-type"] == ARROW:
            assert self.well_formed(reply.body) == ("answer" if reply.status == 200 and "x-vgi-rpc-error" not in reply.headers else "error"), reply
        assert self.app.post("/Hard/ask", self.good).status == 200
        return str(reply.status)

    def token(self, rng: random.Random) -> str:
        """A turn with mutated tokens; none of them opens, unless it is the very one."""
        tokens = dict(self.tokens)
        for key in rng.choice(([STATE], [CALL], [STATE, CALL])):
            tokens[key] = mutated(tokens[key], list(self.tokens.values()), rng)
        reply = self.app.post("/Hard/answering/exchange", ipc_bytes(pa.schema([("question", pa.utf8())]), (questions("q").batch, tokens)))
        assert (reply.status == 200) == (tokens == self.tokens), (reply, tokens)
        return self.judged(reply)

    def framing(self, rng: random.Random) -> str:
        """A raw HTTP request, over a socket."""
        data = mutated(rng.choice(self.framed), self.framed, rng)
        with RawHttp(self.port) as raw:
            raw.socket.settimeout(2.0)
            raw.send(data)
            with contextlib.suppress(OSError):
                raw.socket.shutdown(socket.SHUT_WR)
            answer = b""
            with contextlib.suppress(ConnectionError):
                answer = raw.file.read()
        statuses = [int(part[:3]) for part in answer.split(b"HTTP/1.1 ")[1:] if part[:3].isdigit()]
        assert not answer or answer.startswith(b"HTTP/1.1 "), answer[:200]
        assert 500 not in statuses, (data, answer)
        with RawHttp(self.port) as raw:
            raw.send(self.framed[-1])
            assert raw.answer().status == 200
        return str(statuses[0]) if statuses else "closed"

    def byte_client(self, rng: random.Random) -> str:
        """Our client, on a byte stream whose server answers something else."""
        answer = mutated(rng.choice(self.replies), self.replies, rng)
        transport = vgi_rpc.Transport(MemoryChannel(answer), vgi_rpc.TransportKind.PIPE)
        return self.called(vgi_rpc.RpcConnection(Hard, transport), rng)

    def called(self, connection: Any, rng: random.Random) -> str:
        with connection as proxy:
            try:
                which = rng.randrange(4)
                if which == 0:
                    assert isinstance(proxy.ask("q"), str)
                elif which == 1:
                    assert isinstance(proxy.sizes([1.0], ["a"]), int)
                elif which == 2:
                    for _ in zip(range(10), proxy.asking("q", 2)):
                        pass
                else:
                    vgi_rpc.introspect(proxy)
                return "answer"
            except (RpcError, TypeError) as exc:
                assert isinstance(exc, RpcError) or type(exc) is vgi_rpc.ParameterError, repr(exc)
                return "error"

    def http_client(self, rng: random.Random) -> str:
        """Our HTTP client on a socket that already holds its answers."""
        body = rng.choice(self.replies)
        plain = http_answer(body, *rng.choice(((), ("Connection: close",), ("Content-Encoding: zstd",), ("Transfer-Encoding: chunked",))), length=rng.random() < 0.8)
        answer = mutated(plain, self.framed, rng)

        class Prepared(vgi_rpc.HttpConnections):
            def _dial(self, deadline: Any) -> Any:
                ours, theirs = socket.socketpair()
                with theirs:
                    theirs.sendall(answer[:100_000])
                    theirs.shutdown(socket.SHUT_WR)
                    kept.append(theirs.dup())
                return vgi_rpc.SocketChannel(ours)

        kept: list[socket.socket] = []
        client = vgi_rpc.HttpClient(Prepared(vgi_rpc.HttpTarget.parse("http://x")), max_response_bytes=8_000_000)
        client._capabilities = vgi_rpc.HttpServerCapabilities()
        try:
            return self.called(vgi_rpc.RpcConnection(Hard, client, timeout=5.0), rng)
        finally:
            for one in kept:
                one.close()

    def layout(self, rng: random.Random) -> str:
        """A head that was learned, and others that differ only where it says that they may: the same as without learning."""
        data = rng.choice(self.requests)
        start = 8 + struct.unpack_from("<i", data, 4)[0]
        head = data[start + 8 : start + 8 + struct.unpack_from("<i", data, start + 4)[0]]
        if rng.random() < 0.5:  # a value of the metadata, or a vector, that lies over something else
            at = rng.randrange(0, len(head) - 4, 4)
            head = head[:at] + struct.pack("<I", rng.randrange(0, len(head), 4)) + head[at + 4 :]
        else:
            head = mutated(head, [head], rng)[: len(head)].ljust(len(head), b"\0")
        outcome = "refused"
        for _ in range(8):
            found: list[Any] = []
            for parse in (vgi_rpc.parse_message_head, lambda one: vgi_rpc._parse_head(one)[0]):
                try:
                    found.append(parse(head))
                except (vgi_rpc.IPCError, struct.error, IndexError, ValueError, OverflowError, MemoryError):
                    found.append(None)
            if found[0] is not None:
                outcome = "parsed"
                found = [one._replace(nodes=tuple(one.nodes), buffers=tuple(one.buffers)) for one in found if one is not None]
            assert len(found) == 2 and found[0] == found[1], (head, found)
            try:
                regions = vgi_rpc._parse_head(head)[1]
            except (struct.error, IndexError, ValueError, OverflowError):
                regions = []
            if not regions:
                break
            at, size, _ = rng.choice(regions)
            head = head[:at] + rng.randbytes(size) + head[at + size :]
        return outcome

    def plain(self, rng: random.Random) -> str:
        """A short batch read without pyarrow: the same values as with it, or left to it."""
        at = rng.randrange(len(self.requests))
        info = vgi_rpc.rpc_methods(Hard)[self.paths[at].partition("/")[0]]
        data = self.requests[at]
        start = 8 + struct.unpack_from("<i", data, 4)[0]
        damaged = data[:start] + mutated(data[start:], [data], rng)
        try:
            reader = vgi_rpc.IpcReader(vgi_rpc.BufferSource(damaged))
            message = reader.next_message()
            if message is None or info.params.plan is None or reader.facts is not info.params.plan.facts:
                return "other"
            columns = info.params.plan.read(reader, message)
        except (vgi_rpc.IPCError, vgi_rpc._NotPlain, vgi_rpc.RequestTooLargeError):
            return "left"
        try:
            batch = reader.decode(message)
        except vgi_rpc.IPCError as exc:
            assert "flatbuffer" in str(exc), (exc, damaged)  # pyarrow minds some of what is around the data
            return "lenient"
        assert repr(columns) == repr([c.to_pylist() for c in batch.columns]), (damaged, columns, batch.to_pydict())
        return "same"

    def known(self, rng: random.Random) -> str:
        """A request like one that was served: recognised for what the ordinary way takes it for, or not at all."""
        data = rng.choice(self.requests[:6])
        ask_core(self.server, data)
        damaged = mutated(data, [data], rng)
        if (found := recalled(self.server, damaged)) is None:
            return "unknown"
        wanted = ordinary(self.server, damaged)
        same = type(found) is type(wanted) and (isinstance(found, Exception) or repr(found) == repr(wanted))
        assert same, (damaged, found, wanted)
        return "refused" if isinstance(found, Exception) else "same"

    TARGETS = ("layout", "plain", "known", "core", "body", "token", "framing", "byte_client", "http_client")


INTERNAL = {"AttributeError", "IndexError", "KeyError", "NameError", "AssertionError", "struct.error", "error", "RecursionError", "UnboundLocalError", "UnicodeDecodeError", "UnicodeEncodeError", "MemoryError", "OverflowError"}


def fuzz(argv: list[str]) -> None:
    """Send what is almost right; the invariant: our error or a right answer, soon, in flat memory, and the next good call works."""
    parser = argparse.ArgumentParser(prog="fuzz")
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=None)
    parser.add_argument("--only", type=int, default=None, help="run one case by its number")
    options = parser.parse_args(argv)
    seed = options.seed if options.seed is not None else random.SystemRandom().randrange(10**9)
    print(f"seed {seed}", flush=True)
    setUpModule()
    fuzzer, slowest, number, begun = Fuzzer(), 0.0, options.only or 0, 0
    end = time.monotonic() + options.seconds
    while time.monotonic() < end:
        rng = random.Random(f"{seed}/{number}")
        target = Fuzzer.TARGETS[number % len(Fuzzer.TARGETS)]
        before, clock = rss(), time.monotonic()
        try:
            outcome = getattr(fuzzer, target)(rng)
            took = time.monotonic() - clock
            assert rss() - before < 100_000_000, f"{rss() - before} more bytes in memory"
            assert took < 1.0 or number == 0, f"{took:.1f} s"
        except BaseException:
            traceback.print_exc()
            raise SystemExit(f"FAILED: {target}; again: fuzz --seed {seed} --only {number}") from None
        fuzzer.counts[f"{target} {outcome}"] += 1
        slowest = max(slowest, took if number else 0.0)
        begun = rss() if number == 2000 else begun
        number += 1
        if options.only is not None:
            break
    grown = (rss() - begun) / 1e6 if begun else 0.0
    print(f"{number} cases, slowest {slowest:.3f} s, memory grew by {grown:.1f} MB after the first 2000")
    for name, count in sorted(fuzzer.counts.items()):
        print(f"  {name:24} {count}")
    if grown > 100:
        raise SystemExit(f"FAILED: memory grew; seed {seed}")


# -- the soak


class Soak:
    """Clients, servers and faults at once; every answer is compared with its question."""

    def __init__(self, seed: int) -> None:
        self.seed, self.stopping, self.lock = seed, threading.Event(), threading.Lock()
        self.counts: collections.Counter[str] = collections.Counter()
        self.wrong: list[str] = []
        self.folder = tempfile.mkdtemp()
        self.pool = vgi_rpc.WorkerPool(max_idle=2, idle_timeout=1.0, stderr=vgi_rpc.StderrMode.DEVNULL)
        self.server = hard_server()
        options = {"token_key": KEY, "read_timeout": 0.5, "keep_alive_timeout": 2.0, "max_connections": 64}
        _, self.http_port, _ = in_thread(vgi_rpc.serve_http, self.server, **options)
        _, self.tcp_port, _ = in_thread(vgi_rpc.serve_tcp, self.server, threaded=True)
        self.unix, _ = in_thread(vgi_rpc.serve_unix, self.server, os.path.join(self.folder, "s"), threaded=True)
        self.worker = HardWorker("--http")
        self.worker_port = self.worker.port

    def told(self, what: str, count: int = 1) -> None:
        with self.lock:
            self.counts[what] += count

    def ask(self, proxy: Any, question: str) -> None:
        """One call, one exchange, one producer; each answer must be to its own question."""
        found = [proxy.ask(question)]
        expected = [f"answer to {question}"]
        with proxy.answering(question) as session:
            for i in range(3):
                found += session.exchange(questions(f"{question}-{i}")).batch.to_pydict()["answer"]
                expected.append(f"{question}:{question}-{i}")
        found += [b.batch.to_pydict()["answer"][0] for b in proxy.asking(question, 3)]
        expected += [f"{question}/{i}" for i in range(3)]
        if found != expected:
            self.wrong.append(f"expected {expected}, got {found}")
        self.told("answers", len(found))

    def abandon(self, proxy: Any, question: str) -> None:
        session = proxy.asking(question, 10**9)
        for _, batch in zip(range(3), session):
            if not batch.batch.to_pydict()["answer"][0].startswith(f"{question}/"):
                self.wrong.append(question)
        self.told("abandoned streams")

    def clients(self, connect: Any, rng: random.Random, name: str) -> None:
        """One connection: some calls, some streams that are left, some calls that take too long."""
        for connection in (connect(timeout=20.0),):
            with connection as proxy:
                for i in range(rng.randrange(1, 6)):
                    question = f"{name}-{rng.randrange(10**9)}"
                    if rng.random() < 0.3:
                        self.abandon(proxy, question)
                    self.ask(proxy, question)
                if rng.random() < 0.1:
                    with self.assert_error():
                        proxy.with_options(timeout=0.05).hold(tempfile.mkdtemp(dir=self.folder))
                    self.told("deadlines")

    @contextlib.contextmanager
    def assert_error(self) -> Any:
        try:
            yield
        except RpcError:
            return
        self.wrong.append("no error where there should be one")

    def local(self, rng: random.Random) -> None:
        kind = rng.randrange(3)
        if kind == 0:
            self.clients(lambda **o: vgi_rpc.http_connect(Hard, f"http://127.0.0.1:{self.http_port}", **o), rng, "http")
        elif kind == 1:
            self.clients(lambda **o: vgi_rpc.tcp_connect(Hard, "127.0.0.1", self.tcp_port, **o), rng, "tcp")
        else:
            self.clients(lambda **o: vgi_rpc.unix_connect(Hard, self.unix, **o), rng, "unix")

    def pooled(self, rng: random.Random) -> None:
        if rng.random() < 0.15:
            with self.pool.connect(Hard, HARD_WORKER) as proxy:
                process = proxy.process_id()
                session = proxy.asking("killed", 10**9) if rng.random() < 0.5 else None
                os.kill(process, signal.SIGKILL)
                with self.assert_error():
                    for _ in range(10_000):  # what was in the pipe may still be read
                        session.tick() if session is not None else proxy.ask("q")
                self.told("killed workers")
        else:
            self.clients(lambda **o: self.pool.connect(Hard, HARD_WORKER, **o), rng, "pool")

    def hostile(self, rng: random.Random) -> None:
        """Half-open, slow and broken clients."""
        request = http_head("Content-Length: 480", start="POST /Hard/ask HTTP/1.1") + hard_request("ask", question="x" * 8)
        http = rng.random() < 0.6
        data = request if http else hard_request("asking", question="h", limit=10**9)
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.http_port if http else self.tcp_port), 2.0) as raw:
            kind = rng.randrange(4)
            if kind == 0:
                raw.sendall(data[: rng.randrange(len(data))])
            elif kind == 1:
                for byte in data[:20]:
                    raw.sendall(bytes([byte]))
                    time.sleep(0.01)
            elif kind == 2:
                raw.sendall(mutated(data, [data], rng))
                raw.shutdown(socket.SHUT_WR)
                raw.recv(100)
            else:
                raw.sendall(data)
                raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            if rng.random() < 0.3:
                time.sleep(rng.random())
        self.told("hostile clients")

    def restarted(self, rng: random.Random) -> None:
        """Calls to an HTTP server that is stopped or killed again and again: a right answer or an error that says so."""
        try:
            with vgi_rpc.http_connect(Hard, f"http://127.0.0.1:{self.worker_port}", timeout=10.0) as proxy:
                self.ask(proxy, f"restart-{rng.randrange(10**9)}")
        except RpcError as exc:
            if exc.code is not vgi_rpc.Code.UNAVAILABLE:
                self.wrong.append(f"while restarting: {exc!r}")
            self.told("calls to a server that was not there")

    def restarting(self, rng: random.Random) -> None:
        with self.lock:
            if self.stopping.is_set():
                return
        time.sleep(1.0 + rng.random())
        self.worker.process.send_signal(rng.choice((signal.SIGTERM, signal.SIGKILL)))
        self.worker.process.communicate()
        self.worker = HardWorker("--http", "--port", str(self.worker_port))
        self.told("restarts")

    def loop(self, work: Any, number: int) -> None:
        rng = random.Random(f"{self.seed}/{number}")
        while not self.stopping.is_set():
            try:
                work(rng)
            except BaseException as exc:
                self.wrong.append(f"{work.__name__}: {exc!r}\n{traceback.format_exc()}")
                self.stopping.set()

    def run(self, seconds: float) -> None:
        self.stopping.clear()
        works = [self.local, self.local, self.pooled, self.pooled, self.hostile, self.hostile, self.restarted, self.restarting]
        threads = [threading.Thread(target=self.loop, args=(work, n)) for n, work in enumerate(works)]
        for thread in threads:
            thread.start()
        self.stopping.wait(seconds)
        self.stopping.set()
        for thread in threads:
            thread.join()

    def settled(self, before: tuple[int, int, int]) -> tuple[int, int, int]:
        """Resources once what must end has ended, for which it has ten seconds."""
        end = time.monotonic() + 10.0
        while resources() != before and time.monotonic() < end:
            time.sleep(0.1)
        return resources()

    def close(self) -> None:
        self.pool.close()
        self.worker.__exit__()
        shutil.rmtree(self.folder, ignore_errors=True)


def soak(argv: list[str]) -> None:
    """Run everything at once for a while; at the end descriptors, threads and memory are where they were, and no answer was wrong."""
    parser = argparse.ArgumentParser(prog="soak")
    parser.add_argument("--seconds", type=float, default=300.0)
    parser.add_argument("--seed", type=int, default=None)
    parser.add_argument("--counts", action="store_true", help="instead: a great number of one thing, one thing after the other")
    options = parser.parse_args(argv)
    setUpModule()
    if options.counts:
        counts()
        return
    seed = options.seed if options.seed is not None else random.SystemRandom().randrange(10**9)
    print(f"seed {seed}", flush=True)
    soaking = Soak(seed)
    try:
        idle = resources()
        soaking.run(min(20.0, options.seconds / 4))  # caches fill, pools of memory reach their size
        before, memory = soaking.settled(idle), rss()
        soaking.run(options.seconds)
        after, grown = soaking.settled(before), (rss() - memory) / 1e6
    finally:
        soaking.close()
    for name, count in sorted(soaking.counts.items()):
        print(f"  {name:40} {count}")
    print(f"  {soaking.pool.metrics}")
    print(f"descriptors, threads, zombies: {before} before, {after} after; memory grew by {grown:.1f} MB")
    if soaking.wrong or after > before and (after[0] > before[0] + 3 or after[1] > before[1] + 1 or after[2]) or grown > 32:
        raise SystemExit("FAILED\n" + "\n".join(soaking.wrong[:5]))


# -- great numbers, which must leave nothing behind


class Footprint(NamedTuple):
    """What a process holds."""

    descriptors: int
    threads: int
    megabytes: float

    @classmethod
    def settled(cls, process: int) -> "Footprint":
        """What it holds once its descriptors and threads have stayed the same for two seconds, or after twenty."""
        seen = [cls.of(process)]
        while len(seen) < 40 and (len(seen) < 5 or len({held[:2] for held in seen[-5:]}) > 1):
            time.sleep(0.5)
            seen.append(cls.of(process))
        return seen[-1]

    @classmethod
    def of(cls, process: int) -> "Footprint":
        place = pathlib.Path("/proc", str(process))
        threads, kilobytes = (int(re.search(rf"{key}:\s+(\d+)", (place / "status").read_text())[1]) for key in ("Threads", "VmRSS"))
        return cls(len(os.listdir(place / "fd")), threads, kilobytes / 1000)

    def __str__(self) -> str:
        return f"{self.descriptors} descriptors, {self.threads} threads, {self.megabytes:.1f} MB"


def repeated(what: str, number: int, step: Any, server: int | None = None) -> None:
    """Do *step* so often and print what the processes held after a tenth and at the end; more at the end is a failure."""
    start, processes, before = time.monotonic(), {"client": os.getpid(), **({"server": server} if server else {})}, {}
    for i in range(number):
        if i == number // 10:
            paused = time.monotonic()
            before = {name: Footprint.settled(process) for name, process in processes.items()}
            start += time.monotonic() - paused
        step(i)
    seconds = time.monotonic() - start
    after = {name: Footprint.settled(process) for name, process in processes.items()}
    print(f"{number:,} {what}: {seconds:.1f} s", *(f"{name} {before[name]} before, {after[name]} after" for name in processes), sep="; ", flush=True)
    for name, held in before.items():
        now = after[name]
        if now.descriptors > held.descriptors or now.threads > held.threads or now.megabytes > held.megabytes + 32 or resources()[2]:
            raise SystemExit(f"FAILED: {name} holds more than before, or there are zombies: {resources()}")


def expect(found: Any, expected: Any) -> None:
    if found != expected:
        raise SystemExit(f"FAILED: expected {expected!r}, got {found!r}")


def counts() -> None:
    """Calls, abandoned streams, restarts and idle connections in the numbers in which they must be borne, and one large batch."""
    import resource

    resource.setrlimit(resource.RLIMIT_NOFILE, (min(4096, resource.getrlimit(resource.RLIMIT_NOFILE)[1]),) * 2)
    os.environ["VGI_RPC_TOKEN_KEY"] = KEY.decode()
    for kind in ("a pipe", "HTTP"):
        with contextlib.ExitStack() as stack:
            worker = stack.enter_context(HardWorker("--http")) if kind == "HTTP" else None
            proxy = stack.enter_context(worker.connect() if worker else vgi_rpc.connect(Hard, HARD_WORKER))
            server = proxy.process_id()

            def call(i: int, proxy: Any = proxy) -> None:
                expect(proxy.ask(str(i)), f"answer to {i}")

            def abandon(i: int, proxy: Any = proxy) -> None:
                expect(next(iter(proxy.asking(str(i), 10**9))).batch.to_pydict(), {"answer": [f"{i}/0"]})

            repeated(f"calls over {kind}", 100_000, call, server)
            repeated(f"abandoned streams over {kind}", 10_000, abandon, server)
            call(0)
    repeated("worker restarts, every other one by kill -9 in a stream", 1_000, restart)
    with HardWorker("--http") as worker:
        repeated("times 100 idle connections", 10, functools.partial(idle_connections, worker, 100), worker.process.pid)
        repeated("times 1,000 idle connections", 10, functools.partial(idle_connections, worker, 1_000), worker.process.pid)
    large_batch()


def restart(i: int) -> None:
    """One worker from its start to its end."""
    with vgi_rpc.connect(vgi_rpc.Demo, [*PROGRAM, "serve", "--stdio"], stderr=vgi_rpc.StderrMode.DEVNULL) as proxy:
        expect(proxy.add(a=float(i), b=1.0), i + 1.0)
        if i % 2:
            session = proxy.countdown(start=10**9)
            expect(next(iter(session)).batch.to_pydict(), {"n": [10**9]})
            (child,) = pathlib.Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
            os.kill(int(child), signal.SIGKILL)
            with contextlib.suppress(TransportError):
                for _ in range(10**6):  # what was in the pipe may still be read
                    session.tick()
                expect("no error", "an error")


def idle_connections(worker: HardWorker, number: int, _: int) -> None:
    """So many connections that say nothing: a call is answered or told to come back, health is answered, and so is who comes later."""
    body = hard_request("ask", question="q")
    asked = http_head(f"Content-Length: {len(body)}", start="POST /Hard/ask HTTP/1.1") + body
    with contextlib.ExitStack() as stack:
        for _ in range(number):
            stack.enter_context(socket.create_connection(("127.0.0.1", worker.port)))
        for request, statuses in ((asked, (200,) if number < 512 else (503,)), (http_head(start="GET /health HTTP/1.1"), (200,))):
            with RawHttp(worker.port) as raw:
                raw.send(request)
                reply = raw.answer()
                expect((reply.status in statuses, "retry-after" in reply.headers), (True, reply.status == 503))
    with worker.connect() as proxy:
        expect(proxy.ask("q"), "answer to q")


def large_batch(size: int = 2_362_232_013) -> None:
    """A batch above what one system call takes (2.2 GiB), to a worker and back."""
    free = int(re.search(r"MemAvailable:\s+(\d+)", pathlib.Path("/proc/meminfo").read_text())[1]) * 1024
    if free < 6 * size:
        raise SystemExit(f"FAILED: a batch of {size:,} bytes there and back needs {6 * size:,} bytes of memory, {free:,} are free")
    numbers = pa.Array.from_buffers(pa.int64(), size // 8, [None, pa.py_buffer(os.urandom(1 << 20) * (1 + (size >> 20)))])
    start, batch = time.monotonic(), pa.RecordBatch.from_arrays([numbers], schema=AHEAD_VALUE)
    with vgi_rpc.connect(Ahead, [*WORKER[:-1], "ahead-worker"]) as proxy:
        with proxy.same() as session:
            expect(session.exchange(AnnotatedBatch(batch)).batch.equals(batch), True)
        expect(proxy.add(a=1, b=2), 3)
    print(f"a batch of {batch.nbytes:,} bytes over a pipe and back: {time.monotonic() - start:.1f} s")


# ============================================================================
# THE BENCHMARK: python test_vgi_rpc.py bench [--seconds 1]
# ============================================================================


class Measured(Protocol):
    def add(self, a: float, b: float) -> float: ...
    def echo(self, data: bytes) -> bytes: ...
    def rows(self, n: int) -> Stream[ProducerState]: ...
    def sums(self) -> Stream[ExchangeState]: ...


@dataclass
class MeasuredRows(ProducerState):
    n: int
    at: int = 0

    def produce(self, out: OutputCollector, ctx: CallContext) -> None:
        if self.at >= self.n:
            out.finish()
            return
        out.emit_pydict({"value": [float(self.at)]})
        self.at += 1


@dataclass
class MeasuredSums(ExchangeState):
    total: float = 0.0

    def exchange(self, input: AnnotatedBatch, out: OutputCollector, ctx: CallContext) -> None:
        self.total += sum(input.batch.column(0).to_pylist())
        out.emit_pydict({"value": [self.total]})


class MeasuredImpl:
    def add(self, a: float, b: float) -> float:
        return a + b

    def echo(self, data: bytes) -> bytes:
        return data

    def rows(self, n: int) -> Stream[MeasuredRows]:
        return Stream(VALUE, MeasuredRows(n))

    def sums(self) -> Stream[MeasuredSums]:
        return Stream(VALUE, MeasuredSums(), input_schema=VALUE)


@contextlib.contextmanager
def measured_server(*flags: str) -> Iterator[str]:
    """A server process of the measured service; gives what stands behind the colon of its discovery line."""
    command = [sys.executable, str(HERE / "test_vgi_rpc.py"), "measured", *flags]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        try:
            yield server.stdout.readline().strip().partition(":")[2]
        finally:
            server.terminate()


@contextlib.contextmanager
def measured_proxy(kind: str, folder: str) -> Iterator[Measured]:
    """A proxy of the measured service over one transport; but for the first the server is a process of its own."""
    if kind == "in process":
        with vgi_rpc.serve_pipe(Measured, MeasuredImpl()) as proxy:
            yield proxy
    elif kind == "pipe":
        with vgi_rpc.connect(Measured, [sys.executable, str(HERE / "test_vgi_rpc.py"), "measured"]) as proxy:
            yield proxy
    else:
        flags = {"unix": ["--unix", os.path.join(folder, "s")], "tcp": ["--tcp", "0"], "http": ["--http"]}[kind]
        with measured_server(*flags) as where:
            if kind == "unix":
                manager = vgi_rpc.unix_connect(Measured, where)
            elif kind == "tcp":
                manager = vgi_rpc.tcp_connect(Measured, *where.split(":"))
            else:
                manager = vgi_rpc.http_connect(Measured, f"http://127.0.0.1:{where}")
            with manager as proxy:
                yield proxy


def rate(seconds: float, one: Any) -> float:
    """How many units a second *one* does, which says how many each call was; the first call does not count."""
    one()
    done, started = 0, time.perf_counter()
    while (spent := time.perf_counter() - started) < seconds:
        done += one()
    return done / spent


def bench(argv: list[str]) -> None:
    """Print what this machine does: calls, batches and turns a second, and megabytes a second of a 16 MiB echo."""
    parser = argparse.ArgumentParser(prog="test_vgi_rpc.py bench")
    parser.add_argument("--seconds", type=float, default=1.0, help="for each figure")
    seconds = parser.parse_args(argv).seconds
    ten, blob = AnnotatedBatch.from_pydict({"value": [float(i) for i in range(10)]}, VALUE), os.urandom(1 << 20) * 16
    python, arrow = sys.version.split()[0], pa.__version__
    print(f"vgi_rpc {vgi_rpc.__version__}, Python {python}, pyarrow {arrow}, {os.cpu_count()} CPUs, {time.strftime('%Y-%m-%d')}\n")
    print("| transport | unary calls/s | producer batches/s | exchange turns/s | 16 MiB echo MB/s |")
    print("|---|--:|--:|--:|--:|")
    os.environ.setdefault("VGI_RPC_TOKEN_KEY", KEY.decode())
    with tempfile.TemporaryDirectory() as folder:
        for kind in ("in process", "pipe", "unix", "tcp", "http"):
            with measured_proxy(kind, folder) as proxy:
                figures = [rate(seconds, lambda: len(str(proxy.add(a=1.0, b=2.0))) // 3)]
                figures.append(rate(seconds, lambda: sum(b.batch.num_rows for b in proxy.rows(n=500))))
                with proxy.sums() as session:
                    figures.append(rate(seconds, lambda: session.exchange(ten).batch.num_rows))
                figures.append(rate(seconds, lambda: len(proxy.echo(data=blob)) / 1e6))
            print(f"| {kind} | " + " | ".join(f"{f:,.0f}" for f in figures) + " |", flush=True)


if __name__ == "__main__":
    sys.modules["test_vgi_rpc"] = sys.modules["__main__"]  # a worker's classes are those that its imports find
    chosen, words = sys.argv[1] if len(sys.argv) > 1 else "", sys.argv[2:]
    services = {
        "worker": make_server,
        "hard-worker": hard_server,
        "ahead-worker": lambda: RpcServer(Ahead, AheadImpl()),
        "measured": lambda: RpcServer(Measured, MeasuredImpl()),
    }
    commands = {"fuzz": fuzz, "soak": soak, "bench": bench}
    if chosen in services:
        del sys.argv[1]
        vgi_rpc.run_server(services[chosen]())
    elif chosen in commands:
        commands[chosen](words)
    else:
        unittest.main()
