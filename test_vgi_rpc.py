# SPDX-License-Identifier: MIT
"""Tests of vgi_rpc; the sections carry the module's numbers.

``python -m unittest test_vgi_rpc`` runs all of them with nothing but pyarrow; README's dataframe block needs polars, duckdb
and pandas, and is passed over without them. Where all of them run, two processes share them; chosen ones run in one.
"""

from __future__ import annotations

import ast
import atexit
import base64
import concurrent.futures
import contextlib
import copy
import dataclasses
import datetime
import decimal
import dis
import enum
import faulthandler
import functools
import gc
import hashlib
import hmac
import http.client
import html
import html.parser
import importlib.util
import inspect
import io
import itertools
import json
import logging
import os
import pathlib
import pickle
import random
import re
import select
import shlex
import shutil
import signal
import socket
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
import urllib.parse
import uuid
import warnings
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import InitVar, dataclass, field, make_dataclass
from typing import Annotated, Any, ClassVar, Final, Generic, Literal, NamedTuple, NewType, Optional
from typing import Protocol, TypeVar
from unittest import mock
from wsgiref.util import setup_testing_defaults
from wsgiref.validate import validator

import pyarrow as pa

import vgi_rpc as rpc
from vgi_rpc import AnnotatedBatch, ArrowSerializableDataclass, ArrowType, AuthContext, CallContext
from vgi_rpc import ExchangeState, Level, OutputCollector, ProducerState, RpcError, RpcServer, Stream
from vgi_rpc import StreamState, Transient, TransportError

HERE = pathlib.Path(__file__).resolve().parent
# A worker reads no more of this file than it needs: the whole takes longer to compile than many a test to run.
WORKER = [
    *(sys.executable, "-c"),
    f"""
import sys
__file__ = {str(HERE / "test_vgi_rpc.py")!r}
sys.path.insert(0, {str(HERE)!r})
with open(__file__, encoding="utf-8") as file:
    exec(compile(file.read().partition("\\n# -- not for workers")[0], __file__, "exec"))
worker()
""",
]
KEY = b"a key of the tests long enough!"
WATCHDOG_SECONDS = 60
ARROW = "application/vnd.apache.arrow.stream"
STATE = b"vgi_rpc.stream_state#b64"
CALL_STATE = b"vgi_rpc.call_state#b64"
VALUE = pa.schema([pa.field("value", pa.float64())])
INTEGERS = pa.schema([pa.field("value", pa.int64())])
TEXT = pa.schema([pa.field("value", pa.utf8())])
UTC = datetime.timezone.utc


# ============================================================================
# 0. THE SERVICE AND THE TOOLS OF THE TESTS
# ============================================================================


class Color(enum.Enum):
    """An enum whose names differ from its values: names travel."""

    RED = "r"
    BLUE = "b"


class Shade(str, enum.Enum):
    """An enum whose members are texts, with a ``__str__`` that says something else."""

    RED = "red"

    def __str__(self) -> str:
        return "Shade.RED"


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


@dataclass(frozen=True)
class Dated(ArrowSerializableDataclass):
    """The types that people write first."""

    day: datetime.date
    price: Annotated[decimal.Decimal, ArrowType(pa.decimal128(20, 4))]
    at: datetime.datetime | None = None
    key: uuid.UUID | None = None
    unit: Literal["C", "F"] = "C"


class Case(NamedTuple):
    """One row of the type table: an annotation, its Arrow type, values that survive, and whether None is one."""

    annotation: Any
    arrow_type: Any
    values: tuple[Any, ...]
    nullable: bool = False


def exact(annotation: Any, arrow_type: pa.DataType, *values: Any) -> Case:
    """A row of the table for ``Annotated[annotation, ArrowType(arrow_type)]``."""
    return Case(Annotated[annotation, ArrowType(arrow_type)], arrow_type, values)


BATCH = pa.RecordBatch.from_pydict({"a": [1, 2], "b": ["x", None]})
NESTED = pa.struct(list(Point.ARROW_SCHEMA))
ENUM = pa.dictionary(pa.int16(), pa.utf8())
MOMENT = datetime.datetime(2024, 1, 2, 3, 4, 5, 6)

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
    "dict_list": Case(
        dict[int, list[bool]], pa.map_(pa.int64(), pa.list_(pa.bool_())), ({1: [True], 2: []},)
    ),
    "dict_dict": Case(
        dict[str, dict[str, int]], pa.map_(pa.utf8(), pa.map_(pa.utf8(), pa.int64())), ({"a": {"b": 1}}, {})
    ),
    "dict_date": Case(
        dict[datetime.date, Literal[-1, 2]],
        pa.map_(pa.date32(), pa.int64()),
        ({datetime.date(2024, 2, 29): 2},),
    ),
    "enum": Case(Color, ENUM, (Color.RED, Color.BLUE)),
    "list_enum": Case(list[Color], pa.list_(ENUM), ([], [Color.BLUE, Color.RED, Color.BLUE])),
    "dict_enum": Case(dict[str, Color], pa.map_(pa.utf8(), ENUM), ({"a": Color.BLUE}, {})),
    "optional_int": Case(Optional[int], pa.int64(), (None, 0, 5), True),
    "union_str": Case(str | None, pa.utf8(), (None, "", "a"), True),
    "optional_enum": Case(Optional[Color], ENUM, (None, Color.RED), True),
    "optional_list": Case(Optional[list[int]], pa.list_(pa.int64()), (None, [], [1]), True),
    "dataclass": Case(Point, pa.binary(), (Point(1), Point(-1, Color.BLUE, "n"))),
    "optional_dataclass": Case(Optional[Point], pa.binary(), (None, Point(1)), True),
    "deep_dataclass": Case(
        Shape,
        pa.binary(),
        (Shape("a"), Shape("b", [Point(1), Point(2)], {"k": Point(3, Color.BLUE)}, frozenset({"t"}))),
    ),
    "dated": Case(
        Dated,
        pa.binary(),
        (
            Dated(datetime.date(2024, 2, 29), decimal.Decimal("1.2500")),
            Dated(
                datetime.date.min, decimal.Decimal("-9999999999999999.9999"), MOMENT, uuid.UUID(int=7), "F"
            ),
        ),
    ),
    "list_dataclass": Case(list[Point], pa.list_(NESTED), ([], [Point(1), Point(2, Color.BLUE, "x")])),
    "dict_dataclass": Case(dict[str, Point], pa.map_(pa.utf8(), NESTED), ({"a": Point(1)}, {})),
    "list_optional_dataclass": Case(list[Optional[Point]], pa.list_(NESTED), ([None], [None, Point(1)], [])),
    "dict_optional_dataclass": Case(
        dict[str, Optional[Point]], pa.map_(pa.utf8(), NESTED), ({"a": None}, {"a": Point(1)})
    ),
    "list_dict_dataclass": Case(
        list[dict[str, Point]], pa.list_(pa.map_(pa.utf8(), NESTED)), ([{"a": Point(1)}, {}],)
    ),
    "batch": Case(pa.RecordBatch, pa.binary(), (BATCH, BATCH.slice(0, 0), BATCH.slice(1, 1))),
    "schema": Case(pa.Schema, pa.binary(), (BATCH.schema, pa.schema([]))),
    "newtype": Case(UserId, pa.int64(), (UserId(7),)),
    "annotated_other": Case(Annotated[str, "doc"], pa.utf8(), ("a",)),
    "annotated_unhashable": Case(Annotated[int, {"unit": "metre"}], pa.int64(), (3,)),
    "date": Case(datetime.date, pa.date32(), (datetime.date(2024, 2, 29), datetime.date.max)),
    "datetime": Case(datetime.datetime, pa.timestamp("us"), (MOMENT, datetime.datetime.min)),
    "time": Case(datetime.time, pa.time64("us"), (datetime.time(1, 2, 3, 4), datetime.time())),
    "timedelta": Case(datetime.timedelta, pa.duration("us"), (datetime.timedelta(days=-1, microseconds=5),)),
    "uuid": Case(uuid.UUID, pa.binary(16), (uuid.UUID(int=2**100 + 3),)),
    "literal_text": Case(Literal["C", "F"], pa.utf8(), ("C", "F")),
    "literal_int": Case(Literal[1, 2], pa.int64(), (1, 2)),
    "int8": exact(int, pa.int8(), -128, 127),
    "uint64": exact(int, pa.uint64(), 0, 2**64 - 1),
    "float32": exact(float, pa.float32(), 0.5, -2.0),
    "large_utf8": exact(str, pa.large_utf8(), "a"),
    "large_binary": exact(bytes, pa.large_binary(), b"a"),
    "fixed_binary": exact(bytes, pa.binary(4), b"abcd"),
    "timestamp_s": exact(datetime.datetime, pa.timestamp("s"), MOMENT.replace(microsecond=0)),
    "timestamp_utc": exact(datetime.datetime, pa.timestamp("us", tz="UTC"), MOMENT.replace(tzinfo=UTC)),
    "duration_s": exact(datetime.timedelta, pa.duration("s"), datetime.timedelta(days=-1, seconds=5)),
    "decimal": exact(decimal.Decimal, pa.decimal128(20, 4), decimal.Decimal("-12.3400")),
    "list_decimal": Case(
        list[Optional[Annotated[decimal.Decimal, ArrowType(pa.decimal128(9, 2))]]],
        pa.list_(pa.decimal128(9, 2)),
        ([decimal.Decimal("1.25"), None],),
    ),
    "dictionary": exact(str, pa.dictionary(pa.int32(), pa.utf8()), "a"),
    "large_list": exact(list[int], pa.large_list(pa.int32()), [1, 2]),
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
class Plain(ProducerState):
    """Counts to *limit* with *rows* equal rows a turn, and waits before each."""

    limit: int
    rows: list[int] = field(default_factory=lambda: [1])
    pause: float = 0.0
    at: int = 0

    def produce(self, out: OutputCollector, ctx: CallContext) -> None:
        if self.at >= self.limit:
            out.finish()
            return
        if self.pause:
            time.sleep(self.pause)
        out.emit_pydict({"value": [self.at] * min(self.rows[self.at % len(self.rows)], 1_000_000)})
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
class Filter(ExchangeState):
    """Lets through the numbers that are not negative, after a pause: an answer may have no rows."""

    pause: float = 0.0
    turns: int = 0

    def exchange(self, input: AnnotatedBatch, out: OutputCollector, ctx: CallContext) -> None:
        if self.pause:
            time.sleep(self.pause)
        self.turns += 1
        kept = [value for value in input.batch.column(0).to_pylist() if value >= 0]
        out.emit_pydict({"value": kept}, metadata={"turns": str(self.turns)})


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


@dataclass
class Odd(ExchangeState):
    """A state whose fields are what reading back would change, were it not read back for every turn."""

    one: list[int] = field(default_factory=list)
    other: list[int] = field(default_factory=list)
    ratio: float = 1
    word: str = Shade.RED

    def exchange(self, input: AnnotatedBatch, out: OutputCollector, ctx: CallContext) -> None:
        self.one.append(1)
        facts = [len(self.one), len(self.other), type(self.ratio).__name__, type(self.word).__name__]
        out.emit_pydict({"value": [json.dumps(facts)]})


@dataclass
class Shapes(ProducerState):
    """Zero-row batches of any schema, between batches with rows."""

    left: int

    def produce(self, out: OutputCollector, ctx: CallContext) -> None:
        if not self.left:
            out.finish()
            return
        self.left -= 1
        columns = [pa.array([0] * (self.left % 2), f.type) for f in out.output_schema]
        batch = pa.RecordBatch.from_arrays(columns, schema=out.output_schema)
        out.emit(batch, metadata={"left": str(self.left)})


@dataclass
class Fixed(ArrowSerializableDataclass):
    """A call state: what never changes during a stream."""

    factor: int


@dataclass
class Scaled(ExchangeState):
    """Multiplies by the factor of its call state, adds what the implementation holds."""

    CALL_STATE_TYPE: ClassVar[Any] = Fixed  # bare, typing of Python 3.10 does not resolve it
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


def raising(exc: BaseException) -> Any:
    """A callable that raises."""
    return mock.Mock(side_effect=exc)


MISDEEDS: dict[str, Callable[[Any], Any]] = {  # what a turn does to its collector
    "none": lambda out: None,
    "finish": lambda out: out.finish(),
    "twice": lambda out: [out.emit_pydict({"value": [n]}) for n in (1, 2)],
    "type": lambda out: out.emit(pa.RecordBatch.from_pydict({"value": ["text"]})),
    "names": lambda out: out.emit_pydict({"other": [1]}),
    "after finish": lambda out: [out.finish(), out.emit_pydict({"value": [2]})],
    "raise": lambda out: raising(LookupError("in the second turn"))(),
    "exit": lambda out: sys.exit(3),
    "state": lambda out: out.emit_pydict({"value": [2]}),
    "cut": lambda out: out.emit_pydict({"value": [1.5]}),
    "our key": lambda out: out.emit_pydict({"value": []}, {"vgi_rpc.location": "https://example.com"}),
    "our keys": lambda out: out.emit_pydict(
        {"value": []}, {"vgi_rpc.log_level": "", "vgi_rpc.log_message": ""}
    ),
    "unread": lambda out: out.emit_pydict({"value": [2]}),
}


@dataclass
class Misbehaving(ProducerState):
    """Breaks the rule that *how* names, in its second turn."""

    how: str
    at: int = 0

    def produce(self, out: OutputCollector, ctx: CallContext) -> None:
        self.at += 1
        if self.at == 1:
            out.emit_pydict({"value": [1]})
            return
        if self.how == "state":
            self.at = "text"
        MISDEEDS[self.how](out)

    def __post_init__(self) -> None:
        if self.how == "unread" and self.at > 1:
            raise ValueError("nobody reads this back")


@dataclass
class BadExchange(ExchangeState):
    """Breaks a rule of exchanges."""

    how: str

    def exchange(self, input: AnnotatedBatch, out: OutputCollector, ctx: CallContext) -> None:
        MISDEEDS[self.how](out)


class BrokenText(Exception):
    """An exception that cannot be shown."""

    def __str__(self) -> str:
        raise RuntimeError("no text")


FAILURES: dict[str, Callable[[], Any]] = {
    "TypeError": lambda: len(3),
    "KeyError": lambda: {}["x"],
    "SystemExit": lambda: sys.exit(7),
    "KeyboardInterrupt": raising(KeyboardInterrupt()),
    "StopIteration": lambda: next(iter(())),
    "RecursionError": lambda: FAILURES["RecursionError"](),
    "MemoryError": raising(MemoryError()),
    "BrokenText": raising(BrokenText()),
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
    def defaults(
        self, point: Point = Point(9), names: list[str] = ["a"], *, color: Color = Color.BLUE
    ) -> str: ...
    def logs(self, count: int) -> int: ...
    def fail(self, how: str) -> int: ...
    def refuse(self) -> None: ...
    def lie(self, how: str) -> list[int]: ...
    def lie_none(self) -> None: ...
    def noisy(self) -> str: ...
    def process_id(self) -> int: ...
    def cancels(self) -> list[int]: ...
    def context(self) -> dict[str, str]: ...
    def wait(self, seconds: float) -> int: ...
    def exact_sum(
        self, a: Annotated[int, ArrowType(pa.float64())], b: float = 1
    ) -> Annotated[float, ArrowType(pa.float64())]: ...
    def count(self, limit: int) -> Stream[StreamState]: ...
    def plain(self, limit: int, rows: list[int] = [1], pause: float = 0.0) -> Stream[ProducerState]: ...
    def count_with_header(self, limit: int) -> Stream[StreamState, Header]: ...
    def ticks(self) -> Stream[ProducerState]: ...
    def once(self) -> Stream[StreamState]: ...
    def running(self, label: str = "r") -> Stream[ExchangeState]: ...
    def running_with_header(self, label: str) -> Stream[StreamState, Header]: ...
    def filter(self, pause: float = 0.0) -> Stream[ExchangeState]: ...
    def nested(self) -> Stream[StreamState]: ...
    def odd(self) -> Stream[ExchangeState]: ...
    def shapes(self, columns: list[str], left: int) -> Stream[StreamState]: ...
    def scaled(self, factor: int) -> Stream[StreamState]: ...
    def init_fails(self) -> Stream[StreamState]: ...
    def exchange_init_fails(self) -> Stream[ExchangeState]: ...
    def header_init_fails(self) -> Stream[StreamState, Header]: ...
    def wrong_header(self) -> Stream[StreamState, Header]: ...
    def not_a_stream(self) -> Stream[StreamState]: ...
    def misbehaving(self, how: str) -> Stream[StreamState]: ...
    def bad_exchange(self, how: str) -> Stream[ExchangeState]: ...


def served(state: Any, schema: pa.Schema, **options: Any) -> Any:
    """A method that returns a stream of *state*, made of its arguments."""

    def start(self, **given):
        return Stream(schema, state(**given), **options)

    start.__annotations__ = {"return": Stream[state]}
    return start


BUSY: list[Any] = [rpc.RetryInfo(1.5), rpc.ErrorInfo({"a": "b"}), {"@type": "tests.Own", "n": 1}]
LIES: dict[str, Any] = {"type": "text", "member": [1, "x"], "none": None, "large": [2**63]}


class ServiceImpl(Echo):
    """Implements `Service`; one instance serves every transport of a server."""

    def __init__(self) -> None:
        self.cancelled: list[int] = []
        self.offset = 100
        self.kept: list[int] = []

    def cancels(self) -> list[int]:
        taken = self.cancelled
        self.cancelled = []
        return taken

    def add(self, a: float, b: float = 2.0) -> float:
        return a + b

    def nothing(self) -> None: ...

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
        raise rpc.StatusError("not now", code=rpc.Code.RESOURCE_EXHAUSTED, kind="tests_busy", details=BUSY)

    def lie(self, how: str) -> list[int]:
        return LIES[how]

    def lie_none(self) -> None:
        return 3

    def noisy(self) -> str:
        print("printed by a method", flush=True)
        os.write(1, b"written to descriptor 1\n")
        subprocess.run([sys.executable, "-S", "-c", "print('printed by a child')"], check=True)
        return "quiet"

    def process_id(self) -> int:
        return os.getpid()

    def context(self, ctx: CallContext) -> dict[str, str]:
        facts = {"method": ctx.method_name, "protocol": ctx.protocol_name, "kind": str(ctx.kind)}
        who = {"principal": ctx.auth.principal or "", "domain": rpc.current_auth().domain or ""}
        return {**facts, **who, "id": ctx.request_id, "cancelled": str(ctx.cancelled)}

    def wait(self, seconds: float, ctx: CallContext) -> int:
        gate = threading.Event()
        rounds = 0
        while not gate.wait(min(seconds, 0.01)) and not ctx.cancelled and rounds * 0.01 < seconds:
            rounds += 1
        return rounds

    def exact_sum(self, a: int, b: float = 1) -> float:
        return a + int(b)

    count = served(Count, INTEGERS)
    plain = served(Plain, INTEGERS)
    ticks = served(Ticks, TEXT)
    once = served(Once, INTEGERS)
    running = served(Running, RUNNING, input_schema=VALUE)
    running_with_header = served(Running, RUNNING, input_schema=VALUE, header=Header(0))
    filter = served(Filter, VALUE, input_schema=VALUE)
    nested = served(Nested, TEXT, input_schema=INTEGERS)
    misbehaving = served(Misbehaving, INTEGERS)
    bad_exchange = served(BadExchange, INTEGERS, input_schema=INTEGERS)

    def count_with_header(self, limit: int, ctx: CallContext) -> Stream[Count, Header]:
        ctx.client_log(Level.DEBUG, "with the header")
        return Stream(INTEGERS, Count(limit), header=Header(limit, "counting"))

    def odd(self) -> Stream[Odd]:
        return Stream(TEXT, Odd(self.kept, self.kept), input_schema=INTEGERS)

    def shapes(self, columns: list[str], left: int) -> Stream[Shapes]:
        return Stream(pa.schema([(name, pa.int32()) for name in columns]), Shapes(left))

    def scaled(self, factor: int) -> Stream[Scaled]:
        fixed: Any = Fixed(factor) if factor else Header(factor)
        return Stream(INTEGERS, Scaled(offset=self.offset), input_schema=INTEGERS, call_state=fixed)

    def init_fails(self):
        raise KeyError("at init")

    exchange_init_fails = init_fails
    header_init_fails = init_fails

    def wrong_header(self) -> Stream[Count, Header]:
        return Stream(INTEGERS, Count(1), header=Header("text"))

    def not_a_stream(self) -> Stream[Count]:
        return 3


def make_server(**options: Any) -> RpcServer:
    """A fresh server of the tests' service."""
    return RpcServer(Service, ServiceImpl(), **options)


def values(*numbers: Any) -> AnnotatedBatch:
    """A batch with one column ``value``."""
    return AnnotatedBatch.from_pydict({"value": list(numbers)})


def numbers(stream: Any) -> list[list[Any]]:
    """The first column of each batch."""
    return [item.batch.column(0).to_pylist() for item in stream]


@contextlib.contextmanager
def templates_off() -> Iterator[None]:
    """Within it no row template is made, and none that was made before is used: what is left is the ordinary way."""
    caches = [rpc.read_protocol, rpc.dataclass_codec]
    for cache in caches:
        cache.cache_clear()
    with mock.patch.object(rpc, "row_template", lambda *_, **__: None):
        yield
    for cache in caches:
        cache.cache_clear()


def worker() -> None:
    """What a subprocess of the tests does: `run_server`; ``--no-templates`` switches the row templates off."""
    with contextlib.ExitStack() as stack:
        if "--no-templates" in sys.argv:
            sys.argv.remove("--no-templates")
            stack.enter_context(templates_off())
        rpc.run_server(make_server())


# -- not for workers: bytes, made and read with pyarrow alone


def ipc_bytes(schema: pa.Schema, *items: Any) -> bytes:
    """An IPC stream; each item is a batch or (batch, metadata)."""
    sink = io.BytesIO()
    with pa.ipc.new_stream(sink, schema) as writer:
        for item in items:
            if not isinstance(item, tuple):
                item = (item, None)
            writer.write_batch(item[0], custom_metadata=item[1])
    return sink.getvalue()


def request_metadata(method: Any, protocol: Any = b"Service", **changes: Any) -> dict[bytes, bytes]:
    """Metadata of a request; a value of ``None`` leaves the key out."""
    found = {"method": method, "request_version": b"1", "protocol": protocol, **changes}
    encoded = {}
    for name, value in found.items():
        if isinstance(value, str):
            value = value.encode()
        if value is not None:
            encoded[b"vgi_rpc." + name.encode()] = value
    return encoded


def request_bytes(method: str, data: Any = None, schema: pa.Schema | None = None, **metadata: Any) -> bytes:
    """A request of one row (none for a method without parameters), as a foreign client would write it."""
    if schema is None:
        schema = rpc.rpc_methods(Service)[method].params_schema
    columns = [pa.array([(data or {})[f.name]], f.type) for f in schema]
    batch = pa.RecordBatch.from_arrays(columns, schema=schema)
    return ipc_bytes(schema, (batch, request_metadata(metadata.pop("named", method), **metadata)))


def read_stream(source: Any) -> list[tuple[pa.RecordBatch, dict[bytes, bytes]]]:
    """One IPC stream, to its end marker and not a byte further."""
    reader = pa.ipc.open_stream(source)
    found = []
    while True:
        try:
            batch, metadata = reader.read_next_batch_with_custom_metadata()
        except StopIteration:
            return found
        found.append((batch, dict(metadata or {})))


def read_streams(data: bytes) -> list[list[tuple[pa.RecordBatch, dict[bytes, bytes]]]]:
    """All IPC streams in *data*: lists of (batch, metadata as a dict)."""
    source = io.BytesIO(data)
    streams = []
    while source.tell() < len(data):
        streams.append(read_stream(source))
    return streams


def error_of(items: list[Any]) -> dict[str, Any]:
    """The error batch of an answer: ``type``, ``text``, ``code``, ``kind`` and ``extra``."""
    for batch, metadata in items:
        if metadata.get(b"vgi_rpc.log_level") == b"EXCEPTION":
            assert batch.num_rows == 0
            extra = json.loads(metadata[b"vgi_rpc.log_extra"])
            return {
                "type": extra["exception_type"],
                "text": extra["exception_message"],
                "code": metadata[b"vgi_rpc.error_code"].decode(),
                "kind": metadata.get(b"vgi_rpc.error_kind", b"").decode(),
                "extra": extra,
            }
    raise AssertionError(f"no error in {items!r:.300}")


class Reply(NamedTuple):
    """An HTTP answer; header names in lower case."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def error(self) -> dict[str, Any]:
        return error_of(read_streams(self.body)[-1])

    @property
    def json(self) -> Any:
        return json.loads(self.body)


def reply_of(status: int, headers: Any, body: bytes) -> Reply:
    """An answer, its body decoded."""
    answered = {k.lower(): v for k, v in headers}
    coding = answered.get("x-vgi-content-encoding") or answered.get("content-encoding")
    if coding == "zstd":
        body = pa.CompressedInputStream(pa.BufferReader(body), "zstd").read()
    elif coding == "gzip":
        body = zlib.decompress(body, 31)
    return Reply(status, answered, body)


class WsgiClient(rpc.HttpSender):
    """Calls a WSGI application through `wsgiref.validate`; it is also a ``client`` for `http_connect`."""

    def __init__(self, app: Any) -> None:
        self.app = validator(app)

    def send(self, method: str, path: str, headers: Any, body: Any, *_: Any, **more: Any) -> Reply:
        """Send one request; *more* goes into the WSGI environment."""
        path, _, query = path.partition("?")
        environ: dict[str, Any] = {"REQUEST_METHOD": method, "PATH_INFO": path, "SCRIPT_NAME": ""}
        body = b"".join(body) if isinstance(body, list) else body
        environ.update({"QUERY_STRING": query, "wsgi.input": io.BytesIO(body)}, **more)
        if method == "POST":
            environ["CONTENT_LENGTH"] = str(len(body))
        for name, value in headers:
            key = name.upper().replace("-", "_")
            if key not in ("CONTENT_TYPE", "CONTENT_LENGTH"):
                key = f"HTTP_{key}"
            environ[key] = value
        setup_testing_defaults(environ)
        seen: list[Any] = []

        def start_response(status: str, given: Any, exc_info: Any = None) -> Any:
            seen.append((status, given))
            return lambda data: None

        result = self.app(environ, start_response)
        try:
            whole = b"".join(result)
        finally:
            result.close()
        status, given = seen[0]
        return reply_of(int(status[:3]), given, whole)

    def post(self, path: str, body: bytes, **headers: str) -> Reply:
        """Post Arrow; a keyword ``x_y`` is the header ``x-y``."""
        given = {"content-type": ARROW, **{k.replace("_", "-"): v for k, v in headers.items()}}
        return self.send("POST", path, [(k, v) for k, v in given.items() if v], body)

    def post_json(self, path: str, value: Any, **headers: str) -> Reply:
        return self.post(path, json.dumps(value).encode(), **{"content_type": "application/json", **headers})

    def get(self, path: str, **headers: str) -> Reply:
        return self.send("GET", path, [(k.replace("_", "-"), v) for k, v in headers.items()], b"")


def wsgi_client(server: RpcServer | None = None, **options: Any) -> WsgiClient:
    """A client of a fresh application."""
    options.setdefault("token_key", KEY)
    return WsgiClient(rpc.make_wsgi_app(server or make_server(), **options))


class FreshServerClient(WsgiClient):
    """Every request meets the application of another server: what is left is what the tokens carry."""

    def __init__(self) -> None:
        implementation = ServiceImpl()
        servers = [RpcServer(Service, implementation) for _ in range(5)]
        self.apps = itertools.cycle([validator(rpc.make_wsgi_app(one, token_key=KEY)) for one in servers])

    def send(self, *request: Any, **more: Any) -> Reply:
        self.app = next(self.apps)
        return super().send(*request, **more)


class ReplayingClient(WsgiClient):
    """Sends every later turn of a stream twice, and takes the second answer, which must be like the first."""

    def send(self, method: str, path: str, headers: Any, body: bytes, *rest: Any, **more: Any) -> Reply:
        reply = super().send(method, path, headers, body, *rest, **more)
        if not path.endswith("/exchange") or b"vgi_rpc.cancel" in b"".join(body):
            return reply
        second = super().send(method, path, headers, body, *rest, **more)
        shown = []
        for answer in (reply, second):
            batches = [batch.to_pydict() for stream in read_streams(answer.body) for batch, _ in stream]
            shown.append((answer.status, batches))
        # Several turns of a producer end after a time: then one answer may have more of them, and a batch of tokens.
        turns = min(len(batches) for _, batches in shown) - ("VGI-Max-Turns" in dict(headers))
        if shown[0][0] != shown[1][0] or shown[0][1][:turns] != shown[1][1][:turns]:
            raise AssertionError(f"one cursor, two answers: {shown[0]!r:.500} and {shown[1]!r:.500}")
        return second


class RawStream:
    """A stream over HTTP held by its tokens: what any client of the family would send and see."""

    def __init__(self, client: Any, method: str, data: Any = None, **headers: str) -> None:
        self.client = client
        self.path = f"/Service/{method}"
        self.reply = client.post(f"{self.path}/init", request_bytes(method, data), **headers)
        self.tokens: dict[bytes, bytes] = {}
        self._keep(self.reply)

    def _keep(self, reply: Reply) -> None:
        if reply.status == 200:
            for _, metadata in read_streams(reply.body)[-1]:
                self.tokens.update({k: v for k, v in metadata.items() if k in (STATE, CALL_STATE)})

    def exchange(self, batch: Any = None, metadata: Any = None, **headers: str) -> Reply:
        """Send a batch (a tick by default) with both tokens, and keep the fresh cursor; *metadata* overrides."""
        if batch is None:
            batch = pa.RecordBatch.from_arrays([], schema=pa.schema([]))
        sent = {k: v for k, v in {**self.tokens, **(metadata or {})}.items() if v is not None}
        reply = self.client.post(f"{self.path}/exchange", ipc_bytes(batch.schema, (batch, sent)), **headers)
        self._keep(reply)
        return reply


def serve_and_close(server: RpcServer, transport: Any) -> None:
    """Serve a byte stream to its end."""
    with contextlib.closing(transport):
        server.serve(transport)


class BytePeer:
    """A served byte stream seen from the far end: raw bytes in, IPC streams out."""

    def __init__(self, server: RpcServer) -> None:
        near, far = socket.socketpair()
        self.socket = near
        self.output = near.makefile("rb")
        transport = rpc.Transport(rpc.ByteChannel(far), rpc.TransportKind.PIPE)
        self.thread = threading.Thread(target=serve_and_close, args=(server, transport), daemon=True)
        self.thread.start()

    def send(self, data: bytes) -> None:
        self.socket.sendall(data)

    def ask(self, data: bytes) -> list[Any]:
        self.send(data)
        return read_stream(self.output)

    def hang_up(self) -> bytes:
        """Close the way there, return what still comes back."""
        self.socket.shutdown(socket.SHUT_WR)
        rest = self.output.read()
        self.thread.join(WATCHDOG_SECONDS)
        assert not self.thread.is_alive()
        return rest

    def __enter__(self) -> BytePeer:
        return self

    def __exit__(self, *exc: object) -> None:
        self.output.close()
        self.socket.close()
        self.thread.join(WATCHDOG_SECONDS)


def in_thread(serve: Any, server: RpcServer, *args: Any, **options: Any) -> tuple[Any, ...]:
    """Run a ``serve_...`` function in a thread; return what it gave to ``on_bound``."""
    bound: list[Any] = []
    ready = threading.Event()

    def on_bound(*where: Any) -> None:
        bound.extend(where)
        ready.set()

    keywords = {**options, "on_bound": on_bound}
    threading.Thread(target=serve, args=(server, *args), kwargs=keywords, daemon=True).start()
    if not ready.wait(WATCHDOG_SECONDS):
        raise AssertionError("nothing listens")
    return tuple(bound)


class Worker:
    """The worker as a process that listens: ``--http``, ``--tcp`` or ``--unix``; its discovery line is read."""

    def __init__(self, *arguments: str, key: bytes = KEY) -> None:
        environment = {**os.environ, "VGI_RPC_TOKEN_KEY": key.decode(), "PYTHONWARNINGS": "default"}
        pipe = subprocess.PIPE
        self.process = subprocess.Popen([*WORKER, *arguments], stdout=pipe, stderr=pipe, env=environment)
        assert self.process.stdout is not None
        self.line = self.process.stdout.readline().decode().strip()
        self.port = self.line.rpartition(":")[2]
        self.url = f"http://127.0.0.1:{self.port}"

    def stop(self, number: int = signal.SIGTERM) -> tuple[int, str]:
        """Signal it; return exit status and what it wrote on stderr."""
        self.process.send_signal(number)
        _, error = self.process.communicate(timeout=WATCHDOG_SECONDS)
        return self.process.returncode, error.decode()

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *exc: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.communicate()


def fork() -> int:
    """Fork. Python warns of it where threads run; what the children of these tests do is safe there."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return os.fork()


def at_once(count: int, work: Callable[[int], Any]) -> list[Any]:
    """Call *work* in *count* threads with their numbers; return what it gave, or raise what it raised."""
    with concurrent.futures.ThreadPoolExecutor(count) as pool:
        return list(pool.map(work, range(count)))


class TestCase(unittest.TestCase):
    """A test that dumps all threads and ends the run when it hangs."""

    maxDiff = 2000

    def setUp(self) -> None:
        faulthandler.dump_traceback_later(WATCHDOG_SECONDS, exit=True, file=sys.__stderr__)
        self.addCleanup(faulthandler.cancel_dump_traceback_later)

    @contextlib.contextmanager
    def raises(self, kind: Any, *parts: str) -> Iterator[Any]:
        """A context in which *kind* is raised, with every one of *parts* in its text."""
        with self.assertRaises(kind) as caught:
            yield caught
        for part in parts:
            self.assertIn(part, str(caught.exception))


def setUpModule() -> None:
    """Log lines of the module are of no interest here, unless a test asks for them."""
    logging.getLogger("vgi_rpc").addHandler(logging.NullHandler())
    logging.getLogger("vgi_rpc").propagate = False
    if (
        signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    ):  # in a shell's background; children would have it so, too
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if "PYTHONPYCACHEPREFIX" not in os.environ:  # programs of the tests need not compile the module each
        os.environ["PYTHONPYCACHEPREFIX"] = tempfile.mkdtemp()
        os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
        atexit.register(shutil.rmtree, os.environ["PYTHONPYCACHEPREFIX"], ignore_errors=True)


class Told(unittest.TestCase):
    """Stands for a test of the other process, and fares as it did there."""

    source: ClassVar[Any]
    told: ClassVar[dict[str, tuple[str, str]]] = {}

    def __init__(self, test: Any) -> None:
        super().__init__("fare")
        self.name = test.id()

    def __str__(self) -> str:
        return self.name

    def fare(self) -> None:
        while self.name not in self.told:
            self.told.update(json.loads(self.source.readline() or self.fail("the other process has ended")))
        skipped, fault = self.told.pop(self.name)
        if fault:
            self.fail(fault)
        if skipped:
            self.skipTest(skipped)


class Teller(unittest.TestResult):
    """Writes a line for each test: why it was skipped, and what went wrong."""

    def stopTest(self, test: Any) -> None:
        told = ["".join(text for _, text in found) for found in (self.skipped, self.errors + self.failures)]
        print(json.dumps({test.id(): told}), file=sys.__stdout__, flush=True)
        for found in (self.skipped, self.errors, self.failures):
            found.clear()


class Dealt(unittest.TestSuite):
    """Tests of this process, and those that another one tells of, which runs at the same time."""

    def run(self, result: Any, debug: bool = False) -> Any:
        names = {test.name.rpartition(".")[0]: None for test in self if isinstance(test, Told)}
        code = f"import sys, unittest; sys.stdout = sys.stderr; sys.path.insert(0, {str(HERE)!r})\n"
        code += "import test_vgi_rpc as tests\n"
        code += "unittest.defaultTestLoader.loadTestsFromNames(sys.argv[1:]).run(tests.Teller())"
        command = [sys.executable, *subprocess._args_from_interpreter_flags(), "-c", code, *names]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            Told.source = process.stdout
            super().run(result, debug)
            if result.shouldStop:
                process.kill()
        return result


def load_tests(loader: Any, tests: Any, pattern: Any) -> Any:
    """Deal the classes to two processes, unless some tests were chosen."""
    classes = [list(each) for each in tests if each.countTestCases()]
    if loader.testNamePatterns or __name__ == "__main__":
        return tests
    return Dealt([*itertools.chain(*classes[::2]), *map(Told, itertools.chain(*classes[1::2]))])


# ============================================================================
# 2. ERRORS
# ============================================================================

DETAILS = [
    rpc.ErrorInfo({"a": "b"}), rpc.RetryInfo(2.5), rpc.ResourceInfo("table", "t"), rpc.LocalizedMessage("de", "nein"),
    rpc.BadRequest((rpc.FieldViolation("a.b", "too long"), rpc.FieldViolation("c"))),
    rpc.PreconditionFailure((rpc.PreconditionViolation("tos", "user", "not accepted"),)),
    rpc.QuotaFailure((rpc.QuotaViolation("user", "spent"),)), rpc.Help((rpc.HelpLink("read", "https://example.org"),)),
]  # fmt: skip
READERS = "error_info retry_info resource_info localized_message bad_request precondition_failure quota_failure help"
OWN_DETAIL = {"@type": "my.Own", "n": 1}
STRANGE_DETAILS = [{"@type": 7}, {}, {"@type": "vgi_rpc.RetryInfo"}, {"@type": []}]
STRANGE_DETAILS += [{"@type": "vgi_rpc.Help", "links": links} for links in (3, [3], [{}], ["url"])]
REFUSED_DETAILS: dict[str, Any] = {
    "twice": [rpc.RetryInfo(1), rpc.RetryInfo(2)], "@type": [{"a": 1}], "reserved": [{"@type": "vgi_rpc.Mine"}], "mapping": [3],
}  # fmt: skip


class OwnStatus(rpc.StatusError):
    """An application's error, whose constructor has other parameters."""

    def __init__(self, name: str, number: int) -> None:
        super().__init__(f"no {name}", code="NOT_FOUND", details=[rpc.RetryInfo(1.0)])
        self.number = number


class Evil(Exception):
    """An exception that refuses to be looked at."""

    def __str__(self) -> str:
        raise RuntimeError("no")

    def __getattr__(self, name: str) -> Any:
        raise SystemExit(name)


EXCEPTIONS: list[tuple[BaseException, str, int, str]] = [  # with its text, HTTP status and code in JSON
    (RpcError("E", "m", "tb", "r", "ABORTED", "k", [OWN_DETAIL]), "E: m", 409, "aborted"),
    (RpcError("E", "E: m", "", error_code="FROM_THE_FUTURE"), "E: m", 500, "unknown"),
    (TransportError("TransportError: gone"), "gone", 503, "unavailable"),
    (rpc.DeadlineExceededError("late", request_id="r", remote_traceback="tb"), "late", 504, "deadline_exceeded"),
    (rpc.AuthenticationError("who", reason=rpc.AuthReason.EXPIRED_CREDENTIAL), "who", 401, "unauthenticated"),
    (OwnStatus("item", 3), "no item", 404, "not_found"), (rpc.StatusError("m", code="CANCELLED"), "m", 499, "canceled"),
    (rpc.ParameterError("m"), "m", 400, "invalid_argument"), (KeyError("m"), "'m'", 500, "unknown"),
    (rpc.ProtocolVersionError("m", protocol="P"), "m", 400, "failed_precondition"),
    (rpc.MethodNotImplementedError("m"), "m", 404, "unimplemented"),
    (rpc.RequestTooLargeError("m"), "m", 413, "resource_exhausted"),
    (rpc.ResponseTooLargeError("m"), "m", 429, "resource_exhausted"),
    (rpc.ServerDrainingError("m"), "m", 503, "unavailable"),
    (rpc.AuthFailure(rpc.AuthReason.PROXY_REQUIRED, "m"), "m", 401, "unauthenticated"),
    (Evil(), "<Evil: its __str__ raised RuntimeError>", 500, "unknown"),
]  # fmt: skip


class ErrorTests(TestCase):
    """The error classes on their own; how they travel is in the transport contract."""

    def test_texts_and_statuses(self) -> None:
        for exc, text, status, code in EXCEPTIONS:
            found = (rpc.text_of(exc), rpc.http_status_of(exc), rpc.error_as_json(exc)["code"])
            self.assertEqual(found, (text, status, code))
        own = rpc.ProtocolError("m")
        own.http_status = 421
        self.assertEqual(rpc.http_status_of(own), 421)
        self.assertEqual(rpc.text_of("\ud800"), "\\ud800")
        self.assertEqual(len(rpc.text_of("x" * 20_000)), 16_000 + len("… <truncated>"))
        self.assertEqual((str(rpc.Code.ABORTED), rpc.Code("ABORTED")), ("ABORTED", rpc.Code.ABORTED))
        self.assertEqual([rpc.suggest(name, ["add"]) for name in ("ad", "x")], ["; did you mean 'add'?", ""])
        error: Any = EXCEPTIONS[0][0]
        noted = ["On the other side:\ntb"] * hasattr(error, "add_note")
        self.assertEqual(getattr(error, "__notes__", []), noted)
        answers = [rpc.was_answer(exc) for exc, *_ in EXCEPTIONS[:5] if isinstance(exc, RpcError)]
        self.assertEqual(answers, [True, True, False, True, False])

    def test_they_survive_pickle_and_copy(self) -> None:
        ways: list[Callable[[Any], Any]] = [copy.copy, copy.deepcopy]
        ways += [lambda v, p=p: pickle.loads(pickle.dumps(v, p)) for p in range(pickle.HIGHEST_PROTOCOL + 1)]
        values = [*DETAILS, rpc.Code.ABORTED, rpc.AuthReason.UNAUTHORIZED, rpc.Message.info("m", a=1)]
        told = rpc.http_introspect(client=rpc.make_sync_client(make_server()))
        for way in ways:
            self.assertEqual([way(value) for value in values], values)
            self.assertEqual(repr(way(told)), repr(told))
            for sent, *_ in EXCEPTIONS[:-1]:
                got = way(sent)
                self.assertIs(type(got), type(sent))
                self.assertEqual((vars(got), str(got), got.args), (vars(sent), str(sent), sent.args))

    def test_details(self) -> None:
        raised = rpc.StatusError("no", code="NOT_FOUND", details=[*DETAILS, OWN_DETAIL])
        received = RpcError("E", "no", "", error_details=json.loads(json.dumps(raised.error_details)))
        self.assertEqual(received.details(), [*DETAILS, OWN_DETAIL])
        self.assertEqual([getattr(received, name)() for name in READERS.split()], DETAILS)
        self.assertFalse(received.is_retryable())  # whatever its details say, by its code
        received.error_details = [
            {"@type": "vgi_rpc.Help", "links": [{"url": "u", "description": "d", "more": 1}], "more": 1}
        ]
        expected = (rpc.Help((rpc.HelpLink("d", "u"),)), None)
        self.assertEqual((received.help(), received.bad_request()), expected)
        received.error_details = STRANGE_DETAILS
        self.assertEqual(received.details(), STRANGE_DETAILS)
        for text, details in REFUSED_DETAILS.items():
            with self.subTest(text), self.raises(ValueError, text):
                rpc.StatusError("x", code="UNKNOWN", details=details)
        with self.raises(ValueError, "NO_SUCH"):
            rpc.StatusError("x", code="NO_SUCH")
        for value in ("v" * 5000, float("nan"), object()):  # these do not travel, and are left out
            raised = rpc.StatusError("x", code="ABORTED", details=[{"@type": "my.Own", "value": value}])
            self.assertNotIn("error_details", rpc.error_fields(raised))

    def test_json(self) -> None:
        raised = rpc.StatusError("m", code="ABORTED", kind="k", details=[rpc.RetryInfo(1.0)])
        said = rpc.error_as_json(raised, request_id="r", trace="tb")
        [detail] = said.pop("details")
        expected = {"code": "aborted", "message": "m", "type": "StatusError", "kind": "k"}
        self.assertEqual(said, {**expected, "request_id": "r", "traceback": "tb"})
        self.assertEqual((detail["type"], detail["debug"]), ("vgi_rpc.RetryInfo", raised.error_details[0]))
        self.assertEqual(json.loads(base64.b64decode(detail["value"] + "==")), detail["debug"])
        bare = {"code": "unknown", "message": "", "type": "ValueError"}
        self.assertEqual(rpc.error_as_json(ValueError()), bare)


# ============================================================================
# 3. LOG MESSAGES
# ============================================================================

STRANGE_ERRORS: list[dict[str, bytes]] = [  # metadata of error batches
    {},
    {"log_extra": b"{", "error_details": b"[3, {}]"},
    {"log_extra": b"[" * 100_000, "error_details": b"{" * 100_000},
    {"log_message": b"\xff", "error_code": b"\xff", "error_details": b"\xff"},
    {"log_extra": b'{"exception_type": 3, "error_details": {"a": 1}, "traceback": []}'},
]


class MessageTests(TestCase):
    """Messages on their own, and as the metadata in which they travel."""

    def test_constructors(self) -> None:
        for level in Level:
            made = getattr(rpc.Message, level.name.lower())("text", key="value")
            self.assertEqual((made, made.extra), (rpc.Message(level, "text", key="value"), {"key": "value"}))
        self.assertEqual(rpc.Message.info(5), rpc.Message.info("5"))
        self.assertIn("'text'", repr(rpc.Message.info("text")))
        self.assertEqual(
            rpc.message_metadata(rpc.Message.info(Shade.RED), "", "")[rpc.LOG_MESSAGE_KEY], b"red"
        )
        with self.raises(TypeError, "expected a Level", "'INFO'"):
            rpc.Message("INFO", "text")

    def test_an_exception_becomes_a_message(self) -> None:
        def deep(n: int) -> None:
            if n:
                deep(n - 1)
            raise ValueError("x" * 20_000) from KeyError("inner")

        try:
            deep(30)
        except ValueError as exc:
            extra: Any = rpc.Message.from_exception(exc).extra
        self.assertTrue(extra["traceback"].endswith("\n… <traceback truncated>"))
        self.assertEqual([frame["function"] for frame in extra["frames"]], ["deep"] * 5)
        self.assertEqual(extra["cause"], "KeyError: 'inner'")
        bare = rpc.Message.from_exception(ValueError("outer"), include_traceback=False)
        facts = {"exception_type": "ValueError", "exception_message": "outer", "error_code": "UNKNOWN"}
        self.assertEqual(bare, rpc.Message(Level.EXCEPTION, "ValueError: outer", **facts))

    def test_logs_there_and_back(self) -> None:
        for message in (rpc.Message.debug("ü€"), rpc.Message.trace("", n=1, nested={"a": [1, None]})):
            metadata = rpc.message_metadata(message, "server", "request")
            self.assertEqual(rpc.message_from_metadata(metadata), message)
            ids = (metadata[b"vgi_rpc.server_id"], metadata[b"vgi_rpc.request_id"])
            self.assertEqual((ids, b"vgi_rpc.error_code" in metadata), ((b"server", b"request"), False))
        loop: list[Any] = []
        loop.append(loop)
        for given, text in ({1}, "{1}"), (loop, "[[...]]"):
            metadata = rpc.message_metadata(rpc.Message.info("\ud800", a=given), "", "")
            self.assertEqual(json.loads(metadata[b"vgi_rpc.log_extra"]), {"a": text})
            self.assertEqual(metadata[b"vgi_rpc.log_message"], b"\\ud800")
        keys = (b"vgi_rpc.log_level", b"vgi_rpc.log_message", b"vgi_rpc.log_extra")
        strange = dict(zip(keys, (b"LOUD", b"\xff", b"[1]")))
        self.assertEqual(rpc.message_from_metadata(strange), rpc.Message.info("\ufffd"))

    def test_errors_there_and_back(self) -> None:
        told = rpc.StatusError("m", code="ABORTED", kind="k", details=DETAILS)
        for exc in (ValueError("m"), told, Evil(), rpc.DeadlineExceededError("late")):
            facts = rpc.error_fields(exc)
            metadata = rpc.message_metadata(rpc.Message.from_exception(exc), "server", "request")
            error = rpc.error_from_metadata(metadata)
            found = (
                error.error_type,
                error.error_message,
                error.request_id,
                error.error_code,
                error.error_kind,
            )
            kind = facts.get("error_kind", "")
            self.assertEqual(
                found, (type(exc).__name__, rpc.text_of(exc), "request", facts["error_code"], kind)
            )
            self.assertEqual(error.error_details, facts.get("error_details", []))
            self.assertIn(type(exc).__name__, error.remote_traceback)
            late = isinstance(
                exc, rpc.DeadlineExceededError
            )  # a late answer is the same error as a late wait
            self.assertIs(type(error), type(exc) if late else RpcError)
            # Older servers say these things in the extra alone, or in the text.
            older = {k: v for k, v in metadata.items() if not k.startswith(b"vgi_rpc.error_")}
            self.assertEqual(vars(rpc.error_from_metadata(older)), vars(error))
        bare = {k: metadata[k] for k in (b"vgi_rpc.log_message", b"vgi_rpc.error_code")}
        self.assertIsInstance(rpc.error_from_metadata(bare), rpc.DeadlineExceededError)

    def test_errors_of_strange_servers(self) -> None:
        for metadata in STRANGE_ERRORS:
            error = rpc.error_from_metadata({f"vgi_rpc.{key}".encode(): v for key, v in metadata.items()})
            self.assertEqual((error.code, [*filter(None, error.details())]), (rpc.Code.UNKNOWN, []))


# ============================================================================
# 4. BATCHES
# ============================================================================

ENUM_TYPE = pa.dictionary(pa.int16(), pa.utf8())


class Unhashable(pa.ExtensionType):
    """An extension type that says what is equal to it, and so has no hash."""

    __hash__ = None  # type: ignore[assignment]

    def __init__(self) -> None:
        super().__init__(pa.int64(), "test.unhashable")

    def __eq__(self, other: object) -> bool:
        return type(other) is Unhashable

    def __arrow_ext_serialize__(self) -> bytes:
        return b""

    @classmethod
    def __arrow_ext_deserialize__(cls, storage: pa.DataType, data: bytes) -> Unhashable:
        return cls()


END = b"\xff\xff\xff\xff\0\0\0\0"
NUMBERS = pa.RecordBatch.from_pydict({"value": [1.0, 2.0]}, VALUE)
LOG = {rpc.LOG_LEVEL_KEY: b"INFO", rpc.LOG_MESSAGE_KEY: b"m"}
PAIR = [b"key", b"value"]


class OneByteSource(rpc.ByteSource):
    """A source whose reads come in the smallest pieces that a socket could give."""

    def read(self, size: int) -> bytes:
        return b"".join(super(OneByteSource, self).read(1) for _ in range(size))


class Number(NamedTuple):
    """A number in a flatbuffer, and what `struct` calls it."""

    code: str
    value: int


def blob(part: Any) -> tuple[bytes, int, list[tuple[int, Any]]]:
    """The bytes of a table (a list), a vector of tables (a tuple) or of bytes; where it begins in them, what it names."""
    if isinstance(part, tuple):
        named_ = [(4 + 4 * i, x) for i, x in enumerate(part)]
        return struct.pack("<I", len(part)) + bytes(4 * len(part)), 0, named_
    if not isinstance(part, list):
        count = len(part) // 16 if isinstance(part, bytearray) else len(part)  # of pairs of int64
        return struct.pack("<4xI", count) + part + b"\0", 4, []
    front = (4 + 2 * len(part) + 7) & -8
    slots = [0 if slot is None else 8 + 8 * i for i, slot in enumerate(part)]
    table = struct.pack(f"<{2 + len(part)}H", 4 + 2 * len(part), 8 + 8 * len(part), *slots).ljust(
        front, b"\0"
    )
    table += struct.pack("<i4x", front)
    for slot in part:
        table += (struct.pack("<" + slot.code, slot.value) if isinstance(slot, Number) else b"").ljust(
            8, b"\0"
        )
    return table, front, [(front + at, x) for at, x in zip(slots, part) if not isinstance(x, Number)]


def flatbuffer(root: Any) -> bytes:
    """A flatbuffer, in which parts may be shared."""
    order: dict[int, Any] = {}  # children before parents

    def visit(part: Any) -> None:
        if part is not None and id(part) not in order:
            blobs = blob(part)
            for _, child in blobs[2]:
                visit(child)
            order[id(part)] = part, *blobs

    visit(root)
    places = {}
    out = bytearray(8)
    for key, (_, data, begin, _) in reversed(order.items()):
        places[key] = len(out), len(out) + begin
        out += data + bytes(-len(data) % 8)
    struct.pack_into("<I", out, 0, places[id(root)][1])
    for key, (_, _, _, children) in order.items():
        for offset, child in children:
            if child is not None:
                at = places[key][0] + offset
                struct.pack_into("<I", out, at, places[id(child)][1] - at)
    return bytes(out)


def framed(head: bytes, body: bytes = b"") -> bytes:
    """A message."""
    head += bytes(-len(head) % 8)
    return END[:4] + struct.pack("<i", len(head)) + head + body


def message(
    kind: int, header: Any, body: bytes = b"", pairs: Any = None, size: int = -1, version: int = 4
) -> bytes:
    """A message with a head that no honest writer may have written; *size*: what it says that its body has."""
    length = Number("q", len(body) if size < 0 else size)
    return framed(flatbuffer([Number("h", version), Number("B", kind), header, length, pairs]), body)


def int_field(
    name: bytes = b"c", kind: int = 2, params: Any = None, children: Any = (), pairs: Any = None
) -> list[Any]:
    """The flatbuffer of a column, of int64 if nothing else is said."""
    params = params or [Number("i", 64), Number("B", 1)]
    return [name, Number("B", 1), Number("B", kind), params, None, children, pairs]


def schema_message(*columns: Any, pairs: Any = None, endianness: int = 0, **options: Any) -> bytes:
    """A schema message of these columns."""
    return message(1, [Number("h", endianness), columns, pairs], **options)


def batch_message(
    rows: int, nodes: Any, buffers: Any, body: bytes = b"", more: Any = (), **options: Any
) -> bytes:
    """A message of a record batch."""
    longs = [bytearray(struct.pack(f"<{len(values)}q", *values)) for values in (nodes, buffers)]
    return message(3, [Number("q", rows), *longs, *more], body, **options)


def read_all(data: bytes, source: Any = None, **options: Any) -> list[Any]:
    """Everything in one stream, by the module's reader."""
    reader = rpc.IpcReader(source or rpc.ByteSource(data), **options)
    return list(iter(reader.next, None))


def pyarrow_bytes(schema: pa.Schema, *batches: Any, **options: Any) -> bytes:
    """A stream that pyarrow writes with options."""
    sink = io.BytesIO()
    with pa.ipc.new_stream(sink, schema, options=pa.ipc.IpcWriteOptions(**options)) as writer:
        for batch in batches:
            writer.write_batch(batch)
    return sink.getvalue()


def column(array: pa.Array, name: str = "c") -> pa.RecordBatch:
    """A batch of one column."""
    return pa.RecordBatch.from_arrays([array], schema=pa.schema([pa.field(name, array.type)]))


def named(*names: str) -> pa.RecordBatch:
    """A batch of one row of an enum, whose dictionary has these names."""
    return column(pa.DictionaryArray.from_arrays(pa.array([len(names) - 1], pa.int16()), pa.array(names)))


def deltas(count: int, is_delta: bool = True) -> bytes:
    """A stream with one dictionary, *count* further messages of it, and a batch."""
    data = pyarrow_bytes(named("a").schema, named("a"), named("a", "b"), emit_dictionary_deltas=True)
    reader = rpc.IpcReader(rpc.ByteSource(data))
    first = reader.next_message()
    dictionary = reader.dictionaries[0][0][1]
    reader.next_message()
    repeated = reader.dictionaries[0][1][1] if is_delta else dictionary
    return b"".join([reader.wire.message, dictionary, *[repeated] * count, first.data, END])


def raw_text(offsets: Any, data: bytes) -> bytes:
    """A stream of one text column with these offsets and bytes."""
    body = struct.pack(f"<{len(offsets)}i", *offsets)
    body += bytes(-len(body) % 8)
    places = (0, 0, 0, 4 * len(offsets), len(body), len(data))
    count = len(offsets) - 1
    return ipc_bytes(TEXT)[:-8] + batch_message(count, (count, 0), places, body + data) + END


def nested(levels: int, kind: int, times: int) -> bytes:
    """A schema of lists or structs in each other, each of which names its child some times."""
    field_ = int_field()
    for _ in range(levels):
        field_ = int_field(kind=kind, params=[], children=(field_,) * times)
    return schema_message(field_) + END


def compressed(values: Any, claim: int) -> bytes:
    """A stream of one zstd column, whose data says that it decodes to *claim* bytes."""
    data = pyarrow_bytes(VALUE, pa.RecordBatch.from_pydict({"value": values}, VALUE), compression="zstd")
    return data.replace(struct.pack("<q", 8 * len(values)), struct.pack("<q", claim))


INTS = schema_message(int_field())
SEVEN = struct.pack("<q", 7)
ONE_INT = batch_message(1, (1, 0), (0, 0, 0, 8), SEVEN)
COLORS = column(pa.DictionaryArray.from_arrays(pa.array([0, 1, 0], pa.int16()), pa.array(["RED", "BLUE"])))
NESTED = pa.list_(pa.struct([("a", pa.map_(pa.utf8(), ENUM_TYPE))]))
NULLS = ipc_bytes(pa.schema([("n", pa.null())]))[:-8]
OLD = {"pairs": ([b"ARROW:experimental_compression", b"zstd"],)}
STREAMS = {
    "no batch": ipc_bytes(VALUE),
    "no columns": ipc_bytes(rpc.EMPTY.schema, (rpc.TICK, {b"k": b"v"})),
    "two batches": ipc_bytes(VALUE, (NUMBERS, {b"k": b"\xff"}), NUMBERS.slice(1)),
    "no rows": ipc_bytes(TEXT, (column(pa.array([], pa.utf8()), "value"), {b"a": b"", b"": b"b"})),
    "dictionary": ipc_bytes(COLORS.schema, COLORS, COLORS.slice(1)),
    "replaced": pyarrow_bytes(named("a").schema, named("a"), named("b", "c"), named("a")),
    "deltas": pyarrow_bytes(named("a").schema, named("a"), named("a", "b"), emit_dictionary_deltas=True),
    "compressed": pyarrow_bytes(VALUE, NUMBERS, compression="lz4"),
    "by hand": INTS + 2 * ONE_INT + END,
    "nested": ipc_bytes(
        pa.schema([("c", NESTED)]), column(pa.array([[{"a": [("k", "RED")]}], None], NESTED))
    ),
}
HOSTILE: dict[str, tuple[bytes, str]] = {  # and a part of what is said about it
    "text": (b"GET / HTTP/1.1\r\n\r\n", "not an Arrow IPC stream"),
    "end of stream only": (END, "schema"),
    "negative head": (END[:4] + struct.pack("<i", -1), "head"),
    "head of zeros": (framed(bytes(64)), "not an Arrow IPC message"),
    "head of ones": (framed(b"\xff" * 64), "not an Arrow IPC message"),
    "a batch first": (ONE_INT + END, "schema"),
    "a second schema": (2 * INTS + END, "second schema"),
    "an old version": (schema_message(int_field(), version=2), "metadata version"),
    "big-endian": (schema_message(int_field(), endianness=1) + ONE_INT + END, "little-endian"),
    "deep nesting": (nested(70, 12, 1), "nesting"),
    "5,000 columns": (schema_message(*[int_field()] * 5000) + END, "at most 4096 entries"),
    "2**20 fields in 21 levels": (nested(20, 13, 2), "paid for"),
    "one long name": (schema_message(*[int_field(b"x" * 100_000)] * 4000) + END, "paid for"),
    "metadata of a schema": (schema_message(int_field(), pairs=(PAIR,) * 1000) + END, "at most 512"),
    "metadata of a field": (schema_message(int_field(pairs=(PAIR,) * 1000)) + END, "at most 512"),
    "metadata of all": (schema_message(*[int_field(pairs=(PAIR,) * 500)] * 4000) + END, "paid for"),
    "a name that is no text": (schema_message(int_field(b"\xff\xfe")) + END, "utf-8"),
    "a zone that is no text": (
        schema_message(int_field(kind=10, params=[Number("h", 0), b"\xff"])) + END,
        "utf-8",
    ),
    "entries": (INTS + batch_message(1, (1, 0), (0, 0, 0, 8), SEVEN, pairs=(PAIR,) * 1000), "at most 512"),
    "long entries": (INTS + batch_message(1, (1, 0), (), pairs=([b"k", b"v" * 100_000],) * 500), "paid for"),
    "a trillion rows": (NULLS + batch_message(10**12, (10**12, 0), ()), "rows"),
    "a list of a trillion": (INTS + batch_message(1, (1, 0, 10**12, 0), (0, 0, 0, 0)), "rows"),
    "negative rows": (INTS + batch_message(-5, (1, 0), ()), "-5 rows"),
    "a buffer outside": (INTS + batch_message(1, (1, 0), (0, 0, 0, 16), SEVEN), ""),
    "a short buffer": (INTS + batch_message(2, (2, 0), (0, 0, 0, 8), SEVEN), ""),
    "a buffer before": (INTS + batch_message(1, (1, 0), (0, 0, -8, 8), SEVEN), ""),
    "a million buffers": (INTS + batch_message(1, (1, 0), (0, 0) * 10**5), "65536 entries"),
    "views": (INTS + batch_message(1, (1, 0), (0, 0), b"", (None, bytearray(SEVEN + SEVEN))), "variadic"),
    "compressed": (compressed([0.0] * 1000, 1 << 40), f"at most {1 << 30} bytes, got {1 << 40}"),
    "compressed to more, later": (
        compressed([0.0] * 1000, 8000)[:-8] + compressed([0.0] * 1000, 1 << 40)[len(VALUE.serialize()) :],
        f"got {1 << 40}",
    ),
    "compressed to less": (compressed([0.0] * 1000, -5), "decoded length"),
    "compressed as of old": (
        INTS + batch_message(1, (1, 0), (0, 0, 0, 8), b"\0\0\0\0\0\1\0\0", **OLD),
        "compressed",
    ),
    "a text behind its head": (ONE_INT.join([INTS, b""]).replace(b"\1\0\0\0c", b"\1\2\0\0c"), "at most"),
    "bad UTF-8": (raw_text((0, 40), b"\xff" * 40), ""),
    "offsets backwards": (raw_text((0, 40, 20), b"a" * 40), ""),
    "negative offset": (raw_text((-4, 40), b"a" * 40), ""),
    "offset past the data": (raw_text((0, 4000), b"a" * 40), ""),
    "no such name": (b"\0\0\11\0\0\0".join(STREAMS["dictionary"].rsplit(b"\0\0\1\0\0\0", 1)), ""),
    "many deltas": (deltas(2000), "1024 messages"),
    "a dictionary of no column": (INTS + deltas(0)[len(named("a").schema.serialize()) :], "0 dictionaries"),
}


INSTANT = MOMENT.replace(tzinfo=UTC)
MIDNIGHT = datetime.datetime(2024, 1, 2)
TWO_NUMBERS = pa.struct([("a", pa.int64()), ("b", pa.int8())])
CASTS: list[tuple[list[Any], pa.DataType, list[Any] | None]] = [  # values, the declared type, what arrives (None: refused)
    ([1.5], pa.decimal128(5, 2), [decimal.Decimal("1.50")]), ([1.005], pa.decimal128(5, 2), None),
    ([0.1], pa.float32(), [*struct.unpack("<f", struct.pack("<f", 0.1))]), ([1e300], pa.float32(), None),
    ([[1.0, None], None], pa.list_(pa.float32()), [[1.0, None], None]), ([[1e300]], pa.list_(pa.float32()), None),
    ([float("inf"), None], pa.float32(), [float("inf"), None]), ([2.0], pa.int64(), [2]), ([2.5], pa.int64(), None),
    ([decimal.Decimal("2.5")], pa.int64(), None), ([5], pa.bool_(), None), ([[5]], pa.list_(pa.bool_()), None),
    ([True], pa.int64(), [1]), (["5", None], pa.int64(), [5, None]), (["2024-01-02"], pa.date32(), [MOMENT.date()]),
    ([MOMENT], pa.date32(), None), ([MOMENT], pa.time64("us"), None), ([MOMENT], pa.timestamp("s"), None),
    ([MOMENT], pa.timestamp("us", "UTC"), None), ([INSTANT], pa.timestamp("us"), None),
    ([MIDNIGHT], pa.date32(), [MOMENT.date()]), ([MOMENT.date()], pa.timestamp("s"), [MIDNIGHT]),
    ([INSTANT], pa.timestamp("us", "Asia/Tokyo"), [INSTANT]), ([[MOMENT]], pa.list_(pa.date32()), None),
    ([5], pa.timestamp("us"), None), ([5], pa.duration("s"), None), ([datetime.timedelta(1)], pa.int64(), None),
    ([{"a": 1, "b": 2}], TWO_NUMBERS, [{"a": 1, "b": 2}]), ([{"a": 1, "b": 2.5}], TWO_NUMBERS, None),
    ([{"a": 1, "c": 2}], TWO_NUMBERS, None), ([None], pa.date32(), [None]), ([[]], pa.list_(pa.date32()), [[]]),
]  # fmt: skip


class BatchTests(TestCase):
    """The IPC reader and writer: as pyarrow on good bytes, errors of our own on all others."""

    def test_reads_what_pyarrow_wrote(self) -> None:
        for name, data in STREAMS.items():
            for kind in (rpc.ByteSource, OneByteSource):
                with self.subTest(name=name, source=kind.__name__):
                    source = kind(data + b"rest")
                    self.assertEqual(read_all(b"", source), read_stream(io.BytesIO(data)))
                    self.assertEqual((source.read(9), source.read(1)), (b"rest", b""))

    def test_no_part_and_no_flipped_byte_raises_anything_else(self) -> None:
        for name, data in STREAMS.items():
            refused = 0
            for at in range(len(data)):
                with self.subTest(name=name, end=at), self.assertRaises(rpc.IPCError if at else EOFError):
                    read_all(data[:at])
                try:
                    read_all(data[:at] + bytes([data[at] ^ 0xFF]) + data[at + 1 :])
                except (rpc.IPCError, rpc.RequestTooLargeError):
                    refused += 1
            self.assertGreater(refused, 8)

    def test_hostile_bytes_are_refused(self) -> None:
        for name, (data, part) in HOSTILE.items():
            for validation in (rpc.IpcValidation.FULL, rpc.IpcValidation.STANDARD):
                if part or validation is rpc.IpcValidation.FULL:
                    with self.subTest(name), self.raises((rpc.IPCError, rpc.RequestTooLargeError), part):
                        read_all(data, validation=validation)

    def test_limits(self) -> None:
        large = ipc_bytes(VALUE, pa.RecordBatch.from_pydict({"value": [1.0] * 3000}, VALUE))
        long_key = INTS + batch_message(1, (1, 0), (), pairs=([b"k", b"v" * 5000],))
        packed = compressed([0.0] * 3000, 24_000)
        for data, limits, part in (
            (large, (30_000, 3000), None),
            (large, (20_000,), "message: expected at most 20000 bytes"),
            (large, (None, 2999), "at most 2999 rows in a batch, got 3000"),
            (long_key, (5000,), "message head: expected at most 5000"),
            (packed, (30_000,), None),
            (packed, (20_000,), "compressed buffers, decoded: expected at most 20000"),
            (deltas(100), (10_000,), "dictionaries: expected at most 10000 bytes"),
            (deltas(1000), (), None),
            (deltas(2000, is_delta=False), (10_000,), None),  # each takes the place of the one before
            (pyarrow_bytes(named("a").schema, *[named("a" * n) for n in range(1, 2000)]), (5000,), None),
        ):
            with self.subTest(limits=limits, part=part):
                raised = self.raises(rpc.RequestTooLargeError, part) if part else contextlib.nullcontext()
                with raised:
                    found = read_all(data, limits=rpc.IpcLimits(*limits))
                    self.assertEqual(found, read_stream(io.BytesIO(data)))

    def test_after_a_refusal_the_bytes_that_follow_are_known_or_not_read(self) -> None:
        one = (1, (1, 0), ())
        for name, data, problem in (
            ("too many rows", batch_message(-1, (1, 0), ()), ""),
            ("too large", batch_message(*one, bytes(8000)), ""),
            ("a second schema", INTS, ""),
            ("half a body", batch_message(*one, size=8000), "half a message"),
            ("a body that cannot be", batch_message(*one, size=1 << 47), "are left"),
            ("a body of 2 GiB", batch_message(*one, size=1 << 31), "are left"),
            ("a head that is none", framed(b"\xff" * 64), "unknown"),
            ("a head above the limit", framed(bytes(8000)), "unknown"),
            ("no message", b"GET / HTTP/1.1\r\n", "unknown"),
        ):
            with self.subTest(name):
                source = rpc.ByteSource(INTS + data + ONE_INT + END + b"the next request")
                reader = rpc.IpcReader(source, rpc.IpcLimits(5000))
                source.read_after = mock.Mock(side_effect=source.read_after)
                with self.assertRaises((rpc.IPCError, rpc.RequestTooLargeError)):
                    reader.next()
                self.assertLess(max([0, *[call.args[1] for call in source.read_after.mock_calls]]), 8001)
                with self.raises(rpc.IPCError, problem) if problem else contextlib.nullcontext():
                    reader.read_to_end()
                    reader.read_to_end()
                if not problem:
                    self.assertEqual(source.read(100), b"the next request")

    def test_what_a_source_raises_passes_through(self) -> None:
        for failure, kind in ((TransportError("gone"), TransportError), (MemoryError(), rpc.IPCError)):
            source = rpc.ByteSource(STREAMS["two batches"])
            reader = rpc.IpcReader(source)
            source.read_after = mock.Mock(side_effect=failure)
            with self.assertRaises(kind):
                reader.next()

    def test_expected_schemas(self) -> None:
        colors = rpc.WireSchema(COLORS.schema)
        other = rpc.WireSchema(pa.schema([pa.field("c", ENUM_TYPE, metadata={"not": "the same bytes"})]))
        value = rpc.WireSchema(VALUE)
        for expected in ([value, colors], {value.message: value, colors.message: colors}):
            reader = rpc.IpcReader(rpc.ByteSource(STREAMS["dictionary"]), expected=expected)
            self.assertIs(reader.wire, colors)
            self.assertEqual(reader.next()[0], COLORS)
        self.assertEqual(len(read_all(STREAMS["dictionary"], expected=[other])), 2)  # an equal schema
        self.assertEqual(len(read_all(STREAMS["two batches"], expected=[other])), 2)  # without dictionaries
        reader = rpc.IpcReader(rpc.ByteSource(STREAMS["dictionary"]), expected=[value])
        found = reader.next_message()
        self.assertEqual(found.rows, 3)  # who reads it may say what is wrong with it
        with self.raises(rpc.IPCError, "not expected", "dictionary"):
            reader.decode(found)

    def test_twice_as_many_of_anything_take_at_most_thrice_the_time(self) -> None:
        makers: dict[str, Callable[[int], bytes]] = {
            "deltas": lambda n: deltas(40 * n),
            "dictionaries": lambda n: deltas(40 * n, is_delta=False),
            "dictionary batches": lambda n: pyarrow_bytes(
                COLORS.schema, *[named(*"abc"[: i % 3 + 1]) for i in range(n)]
            ),
            "entries": lambda n: INTS + batch_message(1, (1, 0), (), pairs=(PAIR,) * (400 * n)),
            "keys": lambda n: (
                INTS + batch_message(1, (1, 0), (), pairs=tuple([b"%d" % i, b""] for i in range(40 * n)))
            ),
            "fields": lambda n: schema_message(*[int_field(b"%d" % i) for i in range(5 * n)]) + END,
            "children": lambda n: nested(min(n // 10, 60), 13, 2),
            "metadata of fields": lambda n: schema_message(*[int_field(pairs=(PAIR,) * 500)] * (10 * n)),
            "buffers": lambda n: INTS + batch_message(1, (1, 0), (0, 0) * (100 * n)) + END,
            "nodes": lambda n: INTS + batch_message(1, (1, 0) * (100 * n), (0, 0)) + END,
            "batches": lambda n: INTS + ONE_INT * (10 * n) + END,
        }
        for name, make in makers.items():
            spent = []
            for data in (make(400), make(800)):
                began = time.process_time()
                with contextlib.suppress(rpc.IPCError, rpc.RequestTooLargeError):
                    read_all(data)
                spent.append(time.process_time() - began)
            with self.subTest(name):
                self.assertLess(spent[1], max(3 * spent[0], 0.3))

    def test_writes_what_pyarrow_reads(self) -> None:
        kinds: list[Any] = [
            *(pa.null(), pa.int8(), pa.utf8(), pa.map_(pa.utf8(), pa.int8()), pa.struct([("a", ENUM_TYPE)])),
            *(ENUM_TYPE, pa.list_(ENUM_TYPE), pa.binary(4), pa.list_(pa.int8(), 3), pa.decimal128(9, 2)),
            *(pa.timestamp("us", "UTC"), pa.dense_union([pa.field("a", pa.int8())])),
            *[getattr(pa, name)() for name in ("string_view", "binary_view") if hasattr(pa, name)],
        ]
        pairs: list[Any] = [None, {}, {b"k" * n: b"v" * (n * n) for n in range(9)}, {"text": "also"}]
        for kind in kinds:
            rows = [pa.nulls(n, kind) for n in (0, 1, 5, 100_000)]
            batches = [column(array) for array in (*rows, rows[3].slice(7, 9), pa.nulls(0, kind))]
            wire = rpc.WireSchema(batches[0].schema)
            items = list(itertools.product(batches, pairs))
            data = rpc.stream_bytes(wire, items)
            with self.subTest(kind=kind):
                self.assertEqual(wire.empty, batches[0])
                wanted = [(b, dict(pa.KeyValueMetadata(m or {}).items())) for b, m in items]
                self.assertEqual(read_stream(io.BytesIO(data)), wanted)
                self.assertEqual(read_all(data), wanted)
                self.assertEqual(rpc.total_size(rpc.stream_pieces(wire, items)), len(data))

    def test_a_writer(self) -> None:
        sent: list[list[Any]] = []
        wire = rpc.WireSchema(VALUE)
        writer = rpc.IpcWriter(sent.append, wire)
        writer.write_all([])
        writer.write_all([])
        writer.write_all([(NUMBERS, None), (NUMBERS, {b"k": b"v"})], close=True)
        self.assertEqual([len(sent), sent[0]], [2, [wire.message]])
        self.assertEqual(read_all(b"".join(itertools.chain(*sent))), [(NUMBERS, {}), (NUMBERS, {b"k": b"v"})])
        large = pa.RecordBatch.from_pydict({"value": pa.array(range(100_000), pa.float64())}, VALUE)
        pieces = rpc.stream_pieces(wire, [(large, {b"k": b"v"})])
        self.assertIn(large.column(0).buffers()[1].address, [pa.py_buffer(piece).address for piece in pieces])
        colors = rpc.WireSchema(COLORS.schema)
        ready = ipc_bytes(colors.schema, named("GREEN"))[len(colors.message) : -8]
        items = [(COLORS, None), ready, (COLORS, None), ready]
        self.assertEqual(
            [b for b, _ in read_all(rpc.stream_bytes(colors, items))], [COLORS, named("GREEN")] * 2
        )
        for batch, metadata, part in (
            (named("a"), None, "schema"),
            (NUMBERS, {b"%d" % i: b"" for i in range(513)}, "512 entries"),
            (NUMBERS, {b"k": b"v" * (1 << 26)}, "metadata"),
        ):
            with self.subTest(part), self.raises((rpc.ParameterError, rpc.IPCError), part):
                rpc.stream_bytes(wire, [(batch, metadata)])

    def test_nulls_are_found_in_the_message_of_a_small_batch(self) -> None:
        texts = pa.struct([("t", pa.utf8()), ("n", pa.int8())])
        examples: list[tuple[pa.DataType, Any]] = [(pa.int64(), 1), (pa.utf8(), "x"), (pa.bool_(), True)]
        examples += [
            (pa.list_(pa.int8()), [1]),
            (texts, {"t": "x", "n": 1}),
            (pa.map_(pa.utf8(), pa.int8()), [("k", 1)]),
        ]
        for kind, value in [*examples, (pa.null(), None)]:
            for more in ([], [None]):
                column = pa.array([value, value, *more], kind)
                batch = pa.RecordBatch.from_arrays(
                    [pa.nulls(len(column), pa.int8()).fill_null(0), column], ["a", "b"]
                )
                with self.subTest(kind=kind, more=more):
                    wire = rpc.WireSchema(batch.schema)
                    message = wire.small_message(batch)
                    self.assertEqual(pa.ipc.read_record_batch(message, batch.schema), batch)
                    self.assertEqual(wire.plain_message(batch), None if column.null_count else message)
                    self.assertIsNone(wire.plain_message(batch.slice(0, 0)))
                    reader = rpc.IpcReader(rpc.ByteSource(wire.message + message))
                    self.assertEqual(reader.next_message().has_nulls, bool(column.null_count))
        inside = pa.RecordBatch.from_arrays([pa.array([[1, None]])], ["l"])
        self.assertIsNone(rpc.WireSchema(inside.schema).plain_message(inside))

    def test_kinds_of_batches(self) -> None:
        for rows, metadata, kind in (
            *((0, None, "data"), (0, {b"mine": b""}, "data"), (1, LOG, "data"), (0, LOG, "log")),
            *((0, {rpc.LOG_LEVEL_KEY: b"EXCEPTION"}, "data"), (0, {CALL_STATE: b""}, "data")),
            (0, {**LOG, rpc.LOG_LEVEL_KEY: b"EXCEPTION", STATE: b""}, "error"),
            *((0, {rpc.LOCATION_KEY: b"", STATE: b""}, "location"), (0, {rpc.SHM_OFFSET_KEY: b""}, "shm")),
            (0, {STATE: b""}, "token"),
        ):
            self.assertEqual(rpc.batch_role(rows, metadata), kind, metadata)

    def test_conform_batch(self) -> None:
        strict = pa.field("c", pa.int64(), nullable=False)
        ints = pa.array([1, 2], pa.int8())
        no_null = "column 'c': expected int64 without nulls, got a null"
        cases: list[
            tuple[Any, Any, Any]
        ] = [  # a batch or array, the type or column, what comes out or what is said
            (ints, pa.int64(), [1, 2]),
            (ints, strict, [1, 2]),
            (ints, pa.float64(), [1.0, 2.0]),
            (ints.slice(2), pa.utf8(), []),
            (pa.array([1, None]), strict, no_null),
            (pa.array([1, None], pa.int8()), strict, no_null),
            (ints, pa.field("v", pa.int8()), "expected columns (v: int8), got (c: int8)"),
            (pa.array(["x"]), pa.int64(), "column 'c': expected int64, got utf8 ("),
            (pa.array([1.5]), pa.int64(), "column 'c': expected int64, got float64 ("),
            ([1], pa.int64(), "expected a pyarrow.RecordBatch, got list"),
        ]
        if hasattr(pa, "string_view"):
            view = pa.py_buffer(struct.pack("<i4s2i", 50_000, b"xxxx", 0, 0) * 100_000)
            buffers = [None, view, pa.py_buffer(b"x" * 50_000)]
            many = pa.Array.from_buffers(pa.string_view(), 100_000, buffers)  # all of them the same text
            few = pa.array(["a", None, "b" * 40], pa.string_view())
            lists = pa.ListArray.from_arrays([0, 9], many)
            cases += [
                (few, pa.utf8(), ["a", None, "b" * 40]),
                (few.slice(1), pa.large_utf8(), [None, "b" * 40]),
                (many, pa.utf8(), "expected utf8, got string_view"),
                (lists, pa.list_(pa.utf8()), "got list<item: string_view>"),
                (pa.array([[1]], pa.list_view(pa.int8())), pa.list_(pa.int8()), "got list_view"),
            ]
        for given, kind, kept in CASTS:
            what = f"column 'c': expected {rpc.type_text(kind)}, got " if kept is None else kept
            cases.append((pa.array(given), kind, what))
        for values_, kind, expected in cases:
            schema = pa.schema([kind if isinstance(kind, pa.Field) else pa.field("c", kind)])
            batch = column(values_) if isinstance(values_, pa.Array) else values_
            refused = contextlib.nullcontext()
            if isinstance(expected, str):
                refused = self.raises(rpc.ParameterError, "where: ", expected)
            with self.subTest(kind=kind, expected=str(expected)), refused:
                found = rpc.conform_batch(batch, rpc.WireSchema(schema), "where", cast_values=True)
                self.assertEqual((found.schema, found.column(0).to_pylist()), (schema, expected))
        with self.raises(rpc.ParameterError, "column 'c': expected int64, got int8"):
            rpc.conform_batch(column(ints), rpc.WireSchema(pa.schema([strict])), "where", cast_values=False)

    def test_columns_that_are_cast_go_by_name(self) -> None:
        schema = pa.schema([("a", pa.int64()), ("b", pa.utf8())])
        turned = pa.RecordBatch.from_pydict({"b": ["x"], "a": [1.0]})
        found = rpc.conform_batch(turned, rpc.WireSchema(schema), "where", cast_values=True)
        self.assertEqual((found.schema, found.to_pydict()), (schema, {"a": [1], "b": ["x"]}))
        with self.raises(TypeError, "expected columns (a: int64, b: utf8), got (b: utf8, a: float64)"):
            rpc.conform_batch(turned, rpc.WireSchema(schema), "where", cast_values=False)

    def test_from_pydict(self) -> None:
        inferred = AnnotatedBatch.from_pydict({"a": [1, None]}).batch
        self.assertEqual(inferred.schema, pa.schema([("a", pa.int64())]))
        self.assertEqual(AnnotatedBatch.from_pydict({"value": [1]}, schema=VALUE).batch.schema, VALUE)
        strict = pa.schema([pa.field("value", pa.int64(), nullable=False)])
        for data, schema, parts in (
            ({"value": ["x"]}, VALUE, ("'value'", "float64")),
            ({"value": pa.array([1])}, VALUE, ("'value'", "float64", "int64")),
            ({"other": [1.0]}, VALUE, ("['value']", "['other']")),
            ({"value": [None]}, strict, ("'value'", "null")),
            ({"value": 1.5}, VALUE, ("column 'value'", "expected a list", "got float")),
            ({"value": b"ab"}, VALUE, ("column 'value'", "expected a list", "got bytes")),  # not 97.0, 98.0
            ({"a": "text"}, None, ("column 'a'", "expected a list", "got str")),
            (5, VALUE, ()),
            ({"a": [1], "b": [1, 2]}, None, ()),
            ({"a": [1, "x"]}, None, ()),
        ):
            with self.subTest(data=data), self.raises(TypeError, "from_pydict", *parts):
                AnnotatedBatch.from_pydict(data, schema)
        for given, kind, kept in CASTS:
            refused = contextlib.suppress(rpc.ParameterError)  # which takes less than a cast
            if kept is None:
                refused = self.raises(
                    rpc.ParameterError, f"from_pydict: column 'c': expected {rpc.type_text(kind)}"
                )
            with self.subTest(given=given, kind=kind), refused:
                made = AnnotatedBatch.from_pydict({"c": given}, pa.schema([("c", kind)]))
                self.assertEqual(made.batch.to_pydict(), {"c": kept})


# ============================================================================
# 5. ROW TEMPLATES
# ============================================================================

REQUIRED_TEXT = pa.field("t", pa.utf8(), nullable=False)
POINT_TYPE = pa.struct([pa.field("x", pa.int64(), nullable=False), ("color", ENUM_TYPE), REQUIRED_TEXT])
PLAIN_TYPES = [
    *[getattr(pa, name)() for name in "int8 int16 int32 int64 uint8 uint16 uint32 uint64".split()],
    *[getattr(pa, name)() for name in "float32 float64 bool_ utf8 binary".split()],
    *(ENUM_TYPE, POINT_TYPE, pa.list_(pa.int16()), pa.list_(pa.utf8()), pa.list_(pa.bool_())),
    *(pa.list_(ENUM_TYPE), pa.list_(POINT_TYPE), pa.list_(pa.list_(pa.float64()))),
    *(pa.map_(pa.utf8(), pa.float64()), pa.map_(pa.int64(), pa.list_(POINT_TYPE))),
]
OTHER_TYPES = [
    *(pa.null(), pa.float16(), pa.date32(), pa.timestamp("us"), pa.decimal128(9, 2), pa.binary(4)),
    *(
        pa.large_utf8(),
        pa.dictionary(pa.int32(), pa.utf8()),
        pa.list_(pa.int8(), 2),
        pa.large_list(pa.int8()),
    ),
    *(
        Unhashable(),
        pa.list_(Unhashable()),
        pa.list_(pa.date32()),
        pa.struct([]),
        pa.struct([("a", pa.int8()), ("a", pa.int8())]),
    ),
    pa.map_(pa.utf8(), pa.null()),
]
NOT_PLAIN: list[tuple[pa.DataType, list[Any]]] = [  # and values that the ordinary way must judge
    (pa.int8(), [128]),
    (pa.int64(), [1 << 63, True, 1.0]),
    (pa.float64(), [1]),
    (pa.float32(), [1e300]),
    (pa.bool_(), [1]),
    (pa.utf8(), [b"x", "\ud800", Shade.RED, "x" * 300_000]),
    (pa.binary(), [bytearray(b"x")]),
    (pa.list_(pa.int64()), [(1, 2), [1, "x"], ["x"] * 1000]),
    (pa.list_(pa.float64()), [[1.0] * 200_000]),
    (pa.map_(pa.utf8(), pa.int64()), [{"a": 1}, [(None, 1)], [("a", 1, 2)]]),
    (POINT_TYPE, [{"x": 1, "color": "RED", **more} for more in ({}, {"t": "", "more": 1}, {"t": None})]),
    (ENUM_TYPE, [1, None]),
]


def random_value(random_: random.Random, kind: pa.DataType, nullable: bool) -> Any:
    """A value as codecs encode it, often an extreme one."""

    def some(fields: Any) -> list[Any]:
        return [random_value(random_, f.type, f.nullable) for f in fields]

    if nullable and random_.random() < 0.2:
        return None
    if pa.types.is_map(kind):
        return [tuple(some((kind.key_field, kind.item_field))) for _ in range(random_.randrange(4))]
    if pa.types.is_list(kind):
        return some([kind.value_field] * random_.choice((0, 1, 2, 9)))
    if pa.types.is_struct(kind):
        return {f.name: value for f, value in zip(kind, some(kind))}
    if pa.types.is_integer(kind):
        signed = pa.types.is_signed_integer(kind)
        most = 1 << (kind.bit_width - signed)
        return random_.choice((0, most - 1, -most if signed else 1))
    if pa.types.is_floating(kind):
        return random_.choice((0.0, -1.5, 2.0**100, float("inf")))
    if pa.types.is_boolean(kind):
        return random_.random() < 0.5
    text = random_.choice(("", "a", "schöne Grüße", "x" * 8, "\0", "🦆" * 40))
    return text.encode() if pa.types.is_binary(kind) else text


def random_schema(random_: random.Random) -> pa.Schema:
    """A schema of plain columns."""
    kinds = random_.choices(PLAIN_TYPES, k=random_.randrange(5))
    return pa.schema([pa.field(f"c{i}", kind, random_.random() < 0.5) for i, kind in enumerate(kinds)])


def ordinary_bytes(schema: pa.Schema, row: Any, metadata: Any = None) -> bytes:
    """The stream of one row without a template."""
    wire = rpc.WireSchema(schema)
    arrays = [pa.array([v], f.type) for v, f in zip(row, schema)]
    batch = pa.RecordBatch.from_arrays(arrays, schema=schema) if arrays else wire.empty
    return rpc.stream_bytes(wire, [(batch, metadata)])


def shown_row(data: bytes) -> list[Any]:
    """The row of a stream, as pyarrow shows it."""
    [(batch, _)] = read_all(data)
    return [values.to_pylist()[0] for values in batch.columns if batch.num_rows]


class RowTemplateTests(TestCase):
    """Rows without pyarrow: the bytes that it writes, and no others are read."""

    def test_a_list_that_another_thread_changes(self) -> None:
        template = rpc.row_template(pa.schema([("a", pa.list_(pa.list_(pa.int64())))]))
        outer = [[1, 2], [3]]
        real = itertools.accumulate

        def change(*args: Any, **options: Any) -> Any:  # where another thread may run
            outer[0].append(7)
            return real(*args, **options)

        with mock.patch.object(rpc.itertools, "accumulate", change):
            data = template.write([outer])
        self.assertEqual(rpc.IpcReader(rpc.ByteSource(data)).next()[0].to_pydict(), {"a": [[[1, 2], [3]]]})
        self.assertIsNotNone(template.read(data))

    def test_rows_are_written_and_read_as_pyarrow_does(self) -> None:
        plain = 0
        for case in range(150):
            random_ = random.Random(f"rows/{case}")
            schema = random_schema(random_)
            varying = random_.choice(({}, {b"id": 16}, {b"id": 16, b"other": 3}))
            values = [random_.randbytes(length) for length in varying.values()]
            metadata = {b"k": b"v", **dict(zip(varying, values))} if varying else None
            template = rpc.row_template(schema, {b"k": b"v"} if varying else None, varying)
            for _ in range(8):
                row = [random_value(random_, f.type, f.nullable) for f in schema]
                with self.subTest(case=case, row=row):
                    wanted = ordinary_bytes(schema, row, metadata)
                    try:
                        found = template.write(row, values)
                    except rpc.NotPlain:
                        self.assertRegex(str(row), r"None|\[\]")  # enums without a name
                        self.assertIsNone(template.read(wanted))
                        continue
                    plain += 1
                    self.assertEqual((found, shown_row(found)), (wanted, row))
                    end = 6 + len(found)
                    self.assertEqual(template.read(b"before" + found + b"after", 6), (row, values, end))
                    self.assertIsNone(template.read(found, 1))
        self.assertGreater(plain, 900)
        # A key that stands among the fixed metadata keeps its place there: not where its value is looked for.
        self.assertIsNone(rpc.row_template(INTEGERS, {b"b": b"12"}, {b"a": 2, b"b": 2}))

    def test_no_other_bytes_are_read(self) -> None:
        seen = set()
        for case in range(60):
            random_ = random.Random(f"bytes/{case}")
            schema = random_schema(random_)
            template = rpc.row_template(schema, {b"k": b"v"}, {b"id": 4})
            row = [random_value(random_, f.type, False) for f in schema]
            data = ordinary_bytes(schema, row, {b"k": b"v", b"id": b"1234"})
            for end in range(0, len(data), 3):
                self.assertIsNone(template.read(data[:end]))
            for _ in range(300):
                broken = bytearray(data)
                for _ in range(random_.choice((1, 1, 2))):
                    at = random_.randrange(len(template.schema_message) - 8, len(data))
                    broken[at] = random_.choice((0, 1, 2, 3, 8, 127, 128, 255))
                found = template.read(bytes(broken))
                seen.add(found is None)
                if found is not None:
                    with self.subTest(case=case, found=found):
                        self.assertEqual(template.write(*found[:2]), bytes(broken[: found[2]]))
                        # A NaN is not equal to itself.
                        self.assertEqual(repr(shown_row(bytes(broken))), repr(found[0]))
        self.assertEqual(seen, {True, False})

    def test_bytes_that_mean_a_row_but_are_not_written_so(self) -> None:
        floats = pa.schema([("c", pa.float32())])
        nan = float("nan")
        odd_nan = ordinary_bytes(floats, [nan]).replace(b"\xc0\x7f", b"\x81\x7f")
        text = ordinary_bytes(TEXT, ["x"])
        longer = text[:-8].replace(struct.pack("<q", 16), struct.pack("<q", 24), 1) + bytes(8) + END
        two_names = ipc_bytes(named("b").schema, named("a", "b"))
        for name, schema, value, data in (
            ("a name that is not used", named("b").schema, "b", two_names),
            ("a longer body", TEXT, "x", longer),
            ("another NaN", floats, nan, odd_nan),
            ("padding", TEXT, "x", text[:-9] + b"\1" + END),
        ):
            with self.subTest(name):
                template = rpc.row_template(schema)
                honest = ordinary_bytes(schema, [value])
                self.assertNotEqual(honest, data)
                self.assertIsNotNone(template.read(honest))
                read = template.read(data)  # Python 3.14 keeps each form of NaN
                self.assertTrue(read is None or template.write(read[0]) == data)
                self.assertEqual(repr(shown_row(data)), repr(shown_row(honest)))

    def test_an_index_that_names_nothing(self) -> None:
        schema = named("b").schema
        honest = ordinary_bytes(schema, ["b"])
        for index in (-1, 1, -32768):
            data = honest[:-16] + struct.pack("<h", index) + honest[-14:]
            with self.subTest(index):
                self.assertIsNone(rpc.row_template(schema).read(data))
                with self.raises(rpc.IPCError, "the batch"):
                    shown_row(data)

    def test_values_that_are_not_plain(self) -> None:
        for kind, unusual in NOT_PLAIN:
            template = rpc.row_template(pa.schema([pa.field("c", kind, nullable=False)]))
            for value in unusual:
                with self.subTest(kind=kind, value=str(value)[:50]), self.assertRaises(rpc.NotPlain):
                    template.write([value])
        template = rpc.row_template(VALUE, None, {b"id": 4})
        for row, values in (([1.0, 2.0], [b"1234"]), ([], [b"1234"]), ([1.0], []), ([1.0], [b"123"])):
            with self.subTest(row=row, values=values), self.assertRaises(rpc.NotPlain):
                template.write(row, values)

    def test_many_numbers(self) -> None:
        for kind, many in ((pa.float64(), [0.5] * 8_000), (pa.int32(), [*range(-500, 500)])):
            template = rpc.row_template(pa.schema([pa.field("c", pa.list_(kind))]))
            for row in ([many], [[*many, None]]):
                data = template.write(row)
                self.assertEqual((shown_row(data), template.read(data)), (row, (row, [], len(data))))

    def test_messages_in_a_longer_stream(self) -> None:
        schema = pa.schema([("color", ENUM_TYPE), ("n", pa.int64())])
        wire = rpc.WireSchema(schema)
        template = rpc.row_template(schema)
        rows = [["RED", 1], ["BLUE", 2], ["BLUE", None], ["RED", 4]]
        items: list[Any] = [template.message(row) for row in rows]
        batch = pa.RecordBatch.from_arrays([pa.array(["BLUE"], ENUM_TYPE), pa.array([9])], schema=schema)
        items[2:2] = [(batch, {b"k": b"v"}), (wire.empty, {b"log": b""})]
        items.append((batch, None))
        data = rpc.stream_bytes(wire, items)
        wanted = [*rows[:2], ["BLUE", 9], *rows[2:], ["BLUE", 9]]
        for found in (read_all(data), read_stream(io.BytesIO(data))):
            self.assertEqual([list(b.to_pylist()[0].values()) for b, _ in found if b.num_rows], wanted)

    def test_which_schemas_have_templates(self) -> None:
        for kind in [*PLAIN_TYPES, *OTHER_TYPES]:
            with self.subTest(kind=kind):
                template = rpc.row_template(
                    pa.schema([("a", pa.int64()), ("c", kind)]), {b"a": b"b"}, {b"id": 16}
                )
                self.assertEqual(template is not None, kind in PLAIN_TYPES)

    def test_a_template_that_would_write_other_bytes_is_not_made(self) -> None:
        def odd(wire: Any, items: Any, honest: Any = rpc.stream_bytes) -> bytes:
            data = honest(wire, items)
            return data[:-9] + b"\1" + data[-8:]  # padding that is not zero

        with mock.patch.object(rpc, "stream_bytes", odd), self.assertRaises(ValueError):
            rpc.RowTemplate(TEXT, {}, {})


# ============================================================================
# 6. TYPES
# ============================================================================


def row_class(annotation: Any, **options: Any) -> Any:
    """A dataclass with the one field ``value``."""

    class Row(ArrowSerializableDataclass):
        pass

    Row.__annotations__ = {"value": annotation}
    return dataclass(**options)(Row)


def round_trip(annotation: Any, value: Any) -> Any:
    """What arrives when *value* is a parameter: the way of section 9, without the bytes around it."""
    row = rpc.RowCodec([("value", rpc.codec_for(annotation, whole=True))])
    encoded = rpc.located("f() argument ", row.encode, [value])
    batch = rpc.located("f() argument ", row.to_batch, encoded)
    batch.validate(full=True)
    [(batch, _)] = read_stream(io.BytesIO(ipc_bytes(batch.schema, batch)))
    return rpc.located("f() parameter ", row.from_batch, batch)[0]


T = TypeVar("T")
K = TypeVar("K")


class Name(str):
    """A text that shows itself as something else."""

    def __str__(self) -> str:
        return "****"

    __repr__ = __str__


class Summer(datetime.tzinfo):
    """It ends, so that an hour comes twice."""

    def utcoffset(self, at: Any) -> Any:
        return datetime.timedelta(hours=2 - getattr(at, "fold", 0))

    dst = tzname = lambda *_: None


class Perm(enum.Flag):
    R = 1
    W = 2


class IntPerm(enum.IntFlag):
    R = 1


@dataclass
class Recursive(ArrowSerializableDataclass):
    inner: "Recursive | None" = None


@dataclass
class Late(ArrowSerializableDataclass):
    """A field that the constructor does not take, and one that it alone makes."""

    given: int
    derived: int = field(init=False, default=0)
    made: list[int] = field(init=False)

    def __post_init__(self) -> None:
        self.made = [self.given]


@dataclass
class Picky:
    number: int

    def __post_init__(self) -> None:
        if self.number < 0:
            raise ValueError("negative")


class OwnConstructor(ArrowSerializableDataclass):
    def __init__(self, start: int = 0) -> None:
        self.start = start


class Forgot(ProducerState):
    count: int = 0


class Loose(ProducerState):
    """No fields, and yet it keeps something."""


@dataclass
class Named(ProducerState):
    """No fields, and class variables: as text, Python 3.10 does not resolve the first."""

    kind: ClassVar = Loose
    other: ClassVar[int] = 3


SENT = (ArrowSerializableDataclass,)
Animal: Any = make_dataclass("Animal", [("name", str)])
Dog: Any = make_dataclass("Dog", [("breed", str, "beagle")], bases=(Animal,))
Box: Any = make_dataclass(
    "Box", [("value", T), ("more", list[T], field(default_factory=list))], bases=(Generic[T],)
)
IntBox: Any = make_dataclass("IntBox", [("label", Final[str], "x")], bases=(Box[int],))
# It gives the type variable of its base to another one, and uses that one's name for itself.
Pair: Any = make_dataclass("Pair", [("second", Optional[T], None)], bases=(Box[K], Generic[K, T]))
Needy: Any = make_dataclass("Needy", [("wanted", InitVar[int]), ("kept", int, 0)])
NeedsCache: Any = make_dataclass("NeedsCache", [("cache", Annotated[Any, Transient()])])
MADE = ("made", list[int], field(default_factory=lambda: [1]))  # what a newer or older peer may have written
Versioned: Any = make_dataclass("Versioned", [("kept", int), ("added", str, "default"), MADE], bases=SENT)
ZONE = datetime.timezone(datetime.timedelta(hours=5, minutes=30))
NOON = datetime.datetime(2024, 6, 1, 12)
TWICE = datetime.datetime(2024, 10, 27, 2, 30, tzinfo=Summer(), fold=1)
DAY = datetime.date(2024, 6, 1)
PAIR_STRUCT = pa.struct([pa.field("a", pa.int64(), nullable=False), pa.field("b", pa.utf8())])


def annotated(annotation: Any, arrow_type: pa.DataType, nullable: bool | None = None) -> Any:
    return Annotated[annotation, ArrowType(arrow_type, nullable)]


MONEY = annotated(decimal.Decimal, pa.decimal128(10, 2))

ARRIVING_VALUES: list[tuple[Any, Any, Any]] = [  # annotation, what is sent, what arrives
    (str, Shade.RED, "red"), (str, Name("plain"), "plain"), (float, 3, 3.0),
    (bytes, memoryview(b"x.y")[::2], b"xy"), (Optional[str], Shade.RED, "red"),
    (list[str], [Shade.RED, "a", Name("b")], ["red", "a", "b"]), (list[float], (1, 2.5), [1.0, 2.5]),
    (dict[str, list[int]], {Name("k"): [1]}, {"k": [1]}),
    (Animal, type("Cat", (Animal,), {})(Name("Tom")), Animal("Tom")),
    (annotated(Optional[int], pa.int8(), True), None, None), (Optional[annotated(int, pa.int8(), False)], 5, 5),
    (annotated(list[annotated(int, pa.int8())], pa.list_(pa.int32())), [1], [1]),
    (annotated(int, pa.float64()), 1, 1), (annotated(float, pa.int64()), 2.0, 2.0),
    (annotated(float, pa.float32()), 0.1, struct.unpack("<f", struct.pack("<f", 0.1))[0]),
    (annotated(int, pa.decimal128(5, 0)), 12, 12), (MONEY, 3, decimal.Decimal("3.00")),
    (annotated(decimal.Decimal, pa.decimal256(50, 2)), decimal.Decimal("1.5"), decimal.Decimal("1.50")),
    (annotated(str, pa.dictionary(pa.int8(), pa.utf8())), Shade.RED, "red"),
    (annotated(Color, pa.utf8()), Color.RED, Color.RED),
    (annotated(Point, pa.struct(list(Point.ARROW_SCHEMA))), Point(1), Point(1)),
    (annotated(Literal[1, 2], pa.int8()), 2, 2), (Literal["a", "b", None], None, None),
    (annotated(set[int], pa.list_(pa.int8())), {1}, {1}), (annotated(list, pa.list_(pa.int8())), [1, None], [1, None]),
    (annotated(dict[str, Any], PAIR_STRUCT), {"a": 1, "b": None}, {"a": 1, "b": None}),
    (annotated(object, pa.map_(pa.utf8(), PAIR_STRUCT)), {"k": {"a": 1, "b": ""}}, {"k": {"a": 1, "b": ""}}),
    (annotated(Any, pa.month_day_nano_interval()), pa.MonthDayNano([1, 2, 3]), pa.MonthDayNano([1, 2, 3])),
    (Optional[annotated(object, pa.null())], None, None),
    (annotated(datetime.datetime, pa.timestamp("us", "UTC")), NOON.replace(tzinfo=ZONE), NOON.replace(tzinfo=ZONE)),
    (annotated(datetime.time, pa.time64("ns")), datetime.time(1, 2, 3, 4), datetime.time(1, 2, 3, 4)),
    (dict[datetime.date, list[datetime.time]], {DAY: [datetime.time(1)]}, {DAY: [datetime.time(1)]}),
    (Optional[list[Optional[Dated]]], [None], [None]),
    (Box[Annotated[int, {"unit": "metre"}]], Box(1, [2]), Box(1, [2])),
    (IntBox, IntBox(1, [2], "y"), IntBox(1, [2], "y")), (Pair[int, str], Pair(1, [2], "y"), Pair(1, [2], "y")),
    (Named, Named(), Named()), (Box[Box[int]], Box(Box(1, [2]), []), Box(Box(1, [2]), [])),
    (Literal["red", "blue"], Shade.RED, "red"), (dict[str, int], Counter({Shade.RED: True + 1}), {"red": 2}),
    (set[str], {Name("a"), Shade.RED}, {"a", "red"}), (annotated(bytes, pa.binary(2)), bytearray(b"ab"), b"ab"),
    # Two zones that show the same instant are not equal in the hour that comes twice.
    *[(annotated(datetime.datetime, pa.timestamp(unit, "UTC")), TWICE, TWICE.astimezone(UTC))
      for unit in ("s", "ms", "us", "ns")],
    (annotated(datetime.datetime, pa.timestamp("ns", "UTC")), NOON.replace(tzinfo=ZONE), NOON.replace(tzinfo=ZONE)),
]  # fmt: skip

REFUSED_VALUES: list[tuple[Any, Any, tuple[str, ...]]] = [  # annotation, value, parts of what is said before sending
    (int, "x", ("f() argument value: ", "expected int64", "got str")), (int, True, ("expected int64", "got bool")),
    (int, 1.5, ("expected int64, got float 1.5 (it would arrive as 1)",)),
    (Optional[annotated(int, pa.int8(), False)], None, ("expected int8, got None",)),
    (int, 2**63, ("expected int64", str(2**63))), (float, True, ("expected float64", "got bool")),
    (str, "\ud800", ("value: expected utf8", "surrogates")),
    (dict[str, int], {"\ud800": 1}, (r"value['\ud800']", "surrogates")), (bytes, "x", ("expected binary", "got str")),
    (list[int], [1, None], ("value[1]", "expected int64", "got None")),
    (list[int], [1, 2**63], ("value[1]", "expected int64", str(2**63))),
    (dict[str, int], {None: 1}, ("value[None]", "expected utf8", "got None")),
    (dict[str, dict[str, int]], {"a": {"b": 2**63}}, ("value['a']['b']", "expected int64")),
    (Color, "RED", ("Color (RED, BLUE)", "got str")), (Literal["C", "F"], "K", ("expected 'C' or 'F'", "got 'K'")),
    (Literal[1, 2], True, ("got bool",)),
    (list[Point], [Point(1), Header(1)], ("value[1]: expected Point", "got Header")),
    (Shape, Shape("a", named={"k": Point("z")}), ("value.named['k'].x", "expected int64")),
    (Shape, Shape("a", [Point(2**63)]), ("value.points[0].x", "expected int64", str(2**63))),
    (dict[str, Animal], {"d": Dog("c")}, ("value['d']: expected Animal", "got Dog", "more fields (breed)")),
    (pa.RecordBatch, {"a": [1]}, ("RecordBatch", "got dict")), (uuid.UUID, "5", ("UUID", "got str")),
    (annotated(int, pa.int8()), 128, ("value", "int8", "128")),
    (annotated(float, pa.float32()), 1e300, ("float32", "1e+300", "inf")),
    (annotated(bytes, pa.binary(4)), b"abc", ("value", "fixed_size_binary[4]")),
    (annotated(list[int], pa.list_(pa.int8(), 2)), [1], ("value",)),
    (annotated(dict, PAIR_STRUCT), {"a": 1, "b": "", "typo": 2}, ("struct<a: int64 not null, b: utf8>", "'typo'")),
    (annotated(object, pa.list_(PAIR_STRUCT)), [{"a": 2**63}], ("value", str(2**63))),
    *[(MONEY, decimal.Decimal(text), ("decimal128(10, 2)", text)) for text in ("1.234", "1E+20", "NaN", "sNaN", "-Infinity")],
    (MONEY, 0.5, ("got float",)), (datetime.date, NOON, ("date32", "got datetime")),
    (datetime.datetime, DAY, ("timestamp[us]", "got date")),
    (datetime.datetime, NOON.replace(tzinfo=ZONE),
     ("timestamp[us] without a zone", "ArrowType(pa.timestamp('us', tz='UTC'))", "+05:30")),
    (annotated(datetime.datetime, pa.timestamp("us", "UTC")), NOON, ("timestamp[us, tz=UTC], got datetime", "+00:00")),
    (annotated(datetime.datetime, pa.timestamp("ms")), MOMENT, ("timestamp[ms]", ".000006")),
    (annotated(datetime.datetime, pa.timestamp("ns")), datetime.datetime(2300, 1, 1), ("timestamp[ns]", "bounds")),
    (datetime.time, datetime.time(1, tzinfo=ZONE), ("time64[us] without a zone", "+05:30")),
    (annotated(datetime.time, pa.time32("s")), datetime.time(1, 2, 3, 999), ("time32[s]", ".000999")),
    (Dated, Dated(DAY, decimal.Decimal("1.23456")), ("value.price", "decimal128(20, 4)")),
    (annotated(Any, pa.month_day_nano_interval()), 5, ("month_day_nano_interval",)),
    (annotated(object, pa.list_(PAIR_STRUCT)), [{"a": 1, "b": "", "typo": 2}], ("'typo'",)),
    (Box[annotated(datetime.time, pa.time32("s"))], Box(datetime.time(1, 2, 3, 4)), ("value.value: ", "time32[s]")),
    (list[annotated(float, pa.float32())], [0.5, 1e300], ("value[1]", "float32")),
]  # fmt: skip

UNMAPPED_ANNOTATIONS: list[tuple[Any, tuple[str, ...]]] = [  # annotations that are refused when a service is made
    (list[complex], ("complex", "two floats")), (Any, ("Any", "ArrowType")), (list, ("list", "list[T]")),
    (decimal.Decimal, ("Decimal", "Annotated[Decimal, ArrowType(pa.decimal128(20, 4))]")),
    (int | str | None, ("int | str | None", "T | None")),
    (dict[str, list[threading.Thread]], ("Thread", "str, bytes, int")),
    (dict[Optional[Color], int], ("Color", "never None")), (Name, ("Name", "use str", "NewType")),
    (Box, ("T", "Box[int]")), (Optional[Perm], ("Perm", "a Flag is not an Enum of single members")),
    (list[IntPerm], ("IntPerm", "a Flag is not")), (dict[Literal["a", None], int], ("never None",)),
    (Box[Needy], ("Box.value", "Needy", "InitVar")), (Literal[1, "a"], ("Literal[1, 'a']",)),
    (Recursive, ("Recursive.inner", "contains itself")),
    (Needy, ("Needy", "InitVar")), (NeedsCache, ("NeedsCache", "Transient", "'cache'")),
    (OwnConstructor, ("OwnConstructor", "__init__ of its own", "@dataclass")),
    (Forgot, ("Forgot", "count", "@dataclass")),
    (annotated(datetime.datetime, pa.date32()), ("datetime does not go into date32[day]",)),
    (annotated(list[int], pa.int64()), ("list[int] does not go into int64",)),
    (annotated(Color, pa.int8()), ("Color does not go into int8",)),
    (annotated(Point, pa.struct([("x", pa.int64())])), ("Point does not go into struct",)),
]  # fmt: skip

ANNOTATION_TEXTS: list[tuple[Any, str]] = [
    (typing.List[int], "list[int]"), (dict[str, list[Color]], "dict[str, list[Color]]"),
    (Optional[datetime.date], "date | None"), (None | Point, "Point | None"), (int | str | None, "int | str | None"),
    (Literal["C", 1], "Literal['C', 1]"), (Stream[StreamState, Header], "Stream[StreamState, Header]"),
    (Annotated[int, "doc"], "int"), (annotated(Optional[int], pa.int8()), "int8 | None"),
    (annotated(int, pa.int8(), True), "int8 | None"), (annotated(list[int], pa.large_list(pa.int32())), "list[int]"),
    (list[annotated(decimal.Decimal, pa.decimal128(20, 4))], "list[Decimal(20, 4)]"),
    (annotated(datetime.datetime, pa.timestamp("us", "UTC")), "datetime[UTC]"),
    (annotated(object, pa.decimal128(20, 4)), "Decimal(20, 4)"), (annotated(object, pa.utf8()), "utf8"),
    (typing.ForwardRef("Item"), "ForwardRef('Item')"),
]  # fmt: skip

FOREIGN_COLUMNS: list[tuple[Any, pa.Array, Any]] = [  # declared, what a peer sends for it, what arrives (a text: refused)
    (int, pa.array([5.0]), 5), (int, pa.array([5.5]), "expected int64, got float 5.5"),
    (int, pa.array([True]), "expected int64, got bool"), (int, pa.nulls(1), "expected int64, got None"),
    (Optional[int], pa.nulls(1), None), (float, pa.array([2**53 + 1]), "expected float64"),
    (annotated(str, pa.utf8()), pa.array(["x"]).dictionary_encode(), Name("x")),
    (datetime.date, pa.array([15000], pa.int32()), "expected date32[day], got int"),
    (datetime.date, pa.array([NOON]), "expected date32[day], got datetime"),
    (datetime.datetime, pa.array([MOMENT], pa.timestamp("ns")), MOMENT),
    (datetime.datetime, pa.array([NOON], pa.timestamp("us", "UTC")), "without a zone"),
    (annotated(datetime.datetime, pa.timestamp("s")), pa.array([MOMENT]), "expected timestamp[s]"),
    (MONEY, pa.array([decimal.Decimal("1.5")]), decimal.Decimal("1.50")),
    (MONEY, pa.array([decimal.Decimal("1.505")]), "decimal128(10, 2)"),
    (annotated(int, pa.float64()), pa.array([1.5]), "expected int64, got float 1.5"),
    (annotated(float, pa.float32()), pa.array([1e300]), "expected float32"),
    (list[int], pa.array([[1, 2]], pa.large_list(pa.int16())), [1, 2]),
    (list[datetime.date], pa.array([[1, 2]]), "value[0]: expected date32[day], got int"),
    (dict[str, int], pa.array([[("a", 5)]], pa.map_(pa.utf8(), pa.int8())), {"a": 5}),
    (dict[str, int], pa.array([{"a": 5}]), "expected dict of utf8 to int64, got dict"),
    (Color, pa.array(["GREEN"]), "'GREEN'"), (Color, pa.array([0]), "expected Color (RED, BLUE), got int"),
    (uuid.UUID, pa.array([b"short"]), "expected a valid value, got ValueError"),
    (Point, pa.array([{"x": 5, "odd": 1.5}]), Point(5)), (Point, pa.array([{"note": "n"}]), "value.x: "),
    (list[Point], pa.array([[{"x": 5, "color": "BLUE"}]]), [Point(5, Color.BLUE)]),
    (Picky, pa.array([{"number": -1}]), "expected a valid value, got ValueError: negative"),
    (Literal[1, 2], pa.array([True]), "expected 1 or 2, got bool"), (bool, pa.array([1]), "expected bool, got int"),
    (dict[str, int], pa.array([[("a", 1), ("a", 2)]], pa.map_(pa.utf8(), pa.int64())), "expected keys that differ"),
    (datetime.timedelta, pa.array([5]), "expected duration[us], got int"),
    (uuid.UUID, pa.array([b"\0" * 16]), uuid.UUID(int=0)),
    (dict[str, datetime.date], pa.array([[("a", 5)]], pa.map_(pa.utf8(), pa.int64())),
     "value['a']: expected date32[day], got int"),
    (annotated(datetime.datetime, pa.timestamp("ns", "UTC")), pa.array([INSTANT], pa.timestamp("ns", "UTC")), INSTANT),
    (annotated(datetime.datetime, pa.timestamp("ns", "UTC")), pa.array([MOMENT], pa.timestamp("ns")), "tz=UTC], got "),
]  # fmt: skip


class TypeTests(TestCase):
    """Annotations, both ways from tables."""

    def check(self, got: Any, expected: Any) -> None:
        """Equal, and of the same types all the way down; which object stands for UTC and the order of sets do not count."""
        self.assertEqual(got, expected)
        self.assertIs(type(got), type(expected))
        if "tzinfo" not in repr(expected):
            self.assertEqual(sorted(repr(got)), sorted(repr(expected)))

    def check_row(self, annotation: Any, sent: Any, arrives: Any) -> None:
        """As a parameter, and as a field in bytes and in a batch."""
        self.check(round_trip(annotation, sent), arrives)
        cls = row_class(annotation)
        data = cls(sent).serialize_to_bytes()
        self.check(cls.deserialize_from_bytes(data), cls(arrives))
        [(batch, _)] = read_stream(io.BytesIO(data))
        batch.validate(full=True)
        self.check(cls.deserialize_from_batch(batch), cls(arrives))

    def test_types_without_a_hash(self) -> None:
        annotation = Annotated[Any, ArrowType(Unhashable())]
        self.addCleanup(pa.unregister_extension_type, "test.unhashable")
        pa.register_extension_type(Unhashable())
        self.check_row(annotation, 5, 5)
        self.check_row(Optional[annotation], None, None)

    def test_indices_that_lead_out_of_a_dictionary(self) -> None:
        for index, names, arrives in (
            (None, [], None),
            (None, ["RED"], None),
            (0, ["RED"], Color.RED),
            *[(index, ["RED"], "out of bounds") for index in (-1, 1, 32_767)],
            *[(index, [], "out of bounds") for index in (-1, 0)],
        ):
            found = pa.DictionaryArray.from_arrays(
                pa.array([index], pa.int16()), pa.array(names, pa.utf8()), safe=False
            )
            listed = pa.ListArray.from_arrays(pa.array([0, 1], pa.int32()), found)
            for annotation, array in ((Optional[Color], found), (list[Optional[Color]], listed)):
                cls = row_class(annotation)
                batch = pa.RecordBatch.from_arrays([array], schema=cls.ARROW_SCHEMA)
                data = ipc_bytes(batch.schema, batch)
                reads = [
                    functools.partial(cls.deserialize_from_bytes, data, checks)
                    for checks in rpc.IpcValidation
                ]
                for read in (*reads, functools.partial(cls.deserialize_from_batch, batch)):
                    with self.subTest(index=index, names=names, annotation=annotation, read=read):
                        if arrives == "out of bounds":
                            self.assertRaisesRegex((rpc.IPCError, rpc.ParameterError), arrives, read)
                        else:
                            self.assertEqual(read(), cls(arrives if array is found else [arrives]))

    def test_what_arrives(self) -> None:
        for name, case in TYPES.items():
            codec = rpc.codec_for(case.annotation, whole=True)
            [column] = row_class(case.annotation).ARROW_SCHEMA
            with self.subTest(name):
                self.assertEqual((codec.arrow_type, codec.nullable), (case.arrow_type, case.nullable))
                self.assertEqual(column.nullable, case.nullable)
                self.assertEqual(pa.types.is_struct(column.type), codec.dataclass is not None)
                for value in case.values:
                    self.check_row(case.annotation, value, value)
        for annotation, sent, arrives in ARRIVING_VALUES:
            with self.subTest(annotation=annotation, sent=sent):
                self.check_row(annotation, sent, arrives)

    def test_what_arrives_without_templates(self) -> None:
        with templates_off():
            self.test_what_arrives()

    def test_values_that_are_refused(self) -> None:
        for annotation, value, parts in REFUSED_VALUES:
            with self.subTest(annotation=annotation, value=value), self.raises(TypeError, *parts):
                round_trip(annotation, value)
            inner = [part.replace("f() argument value", "Row.value") for part in parts]
            with self.subTest("field", annotation=annotation, value=value), self.raises(TypeError, *inner):
                row_class(annotation)(value).serialize_to_bytes()

    def test_annotations_without_a_mapping(self) -> None:
        for annotation, parts in UNMAPPED_ANNOTATIONS:
            with self.subTest(annotation=annotation):
                with self.raises(TypeError, *parts):
                    rpc.codec_for(annotation, whole=True)
                with self.raises(TypeError, "Row.value", *parts):
                    rpc.dataclass_codec(row_class(annotation))

    def test_annotations_as_a_person_writes_them(self) -> None:
        for annotation, text in ANNOTATION_TEXTS:
            with self.subTest(text):
                self.assertEqual(rpc.annotation_text(annotation), text)

    def test_what_another_peer_sends(self) -> None:
        for annotation, column, arrives in FOREIGN_COLUMNS:
            cls = row_class(annotation)
            batch = pa.RecordBatch.from_arrays([column], ["value"])
            rows = pa.StructArray.from_arrays([column], ["value"])
            outer = pa.RecordBatch.from_arrays([rows], ["value"])
            with self.subTest(annotation=annotation, sent=column.type):
                if type(arrives) is str:
                    with self.raises(TypeError, "Row.value", arrives):
                        cls.deserialize_from_bytes(ipc_bytes(batch.schema, batch))
                    with self.raises(TypeError, "Row.value.value", arrives):
                        row_class(cls).deserialize_from_batch(outer)
                else:
                    found = cls.deserialize_from_bytes(ipc_bytes(batch.schema, batch)).value
                    self.assertEqual(found, arrives)
                    self.check(row_class(cls).deserialize_from_batch(outer).value.value, found)
        for annotation, number in ((datetime.date, 10**8), (datetime.datetime, 2**62)):
            cls = row_class(annotation)
            kind = cls.ARROW_SCHEMA.field(0).type
            column = pa.array([number], f"int{kind.bit_width}").view(kind)
            with self.subTest("beyond Python", kind=kind), self.raises(TypeError, "Row.value: expected "):
                cls.deserialize_from_batch(pa.RecordBatch.from_arrays([column], ["value"]))

    def test_reading_goes_by_name(self) -> None:
        def read(**columns: Any) -> Versioned:
            batch = pa.RecordBatch.from_pydict(columns)
            found = Versioned.deserialize_from_batch(batch)
            self.assertEqual(found, Versioned.deserialize_from_bytes(ipc_bytes(batch.schema, batch)))
            return found

        self.assertEqual(read(unknown=[1.5], made=[[3]], kept=[2]), Versioned(2, made=[3]))
        self.assertEqual(read(kept=[2]), Versioned(2, "default", [1]))
        with self.raises(TypeError, "Versioned.kept", "no such field, and it has no default"):
            read(added=["x"])
        with self.raises(TypeError, "Versioned.kept", "expected int64", "got None"):
            read(kept=pa.array([None], pa.int64()))
        with self.raises(TypeError, "one row", "2 rows"):
            read(kept=[1, 2])
        sink = io.BytesIO()
        Versioned(3).serialize(sink)
        data = sink.getvalue()
        for form in (memoryview(data), pa.py_buffer(data), bytearray(data)):
            self.assertEqual(Versioned.deserialize_from_bytes(form), Versioned(3))
        with self.raises(TypeError, "Point.color", "Color (RED, BLUE)", "'BLU'; did you mean 'BLUE'?"):
            Point.deserialize_from_batch(pa.RecordBatch.from_pydict({"x": [1], "color": ["BLU"]}))
        late = Late(3)
        late.derived = 7
        late.made = [8]
        self.assertEqual(Late.deserialize_from_bytes(late.serialize_to_bytes()), late)
        self.assertEqual(Late.deserialize_from_batch(pa.RecordBatch.from_pydict({"given": [4]})), Late(4))

    def test_nothing_means_a_row_of_defaults(self) -> None:
        cls: Any = make_dataclass("Row", [("a", int, 3)], bases=(ArrowSerializableDataclass,))
        for data in (b"", ipc_bytes(cls.ARROW_SCHEMA), ipc_bytes(pa.schema([]))):
            self.assertEqual(cls.deserialize_from_bytes(data), cls())
        self.assertEqual(cls.deserialize_from_batch(rpc.EMPTY.empty), cls())
        read = rpc.codec_for(pa.RecordBatch).read
        self.assertEqual((read(b"").num_rows, read(ipc_bytes(BATCH.schema))), (0, BATCH.slice(0, 0)))
        self.assertEqual(rpc.codec_for(pa.Schema).read(b""), pa.schema([]))

    def test_bytes_that_are_no_value(self) -> None:
        good = Point(5, Color.BLUE, "note").serialize_to_bytes()
        sink = io.BytesIO()
        zeros = pa.RecordBatch.from_arrays([pa.array([bytes(1 << 26)])], ["x"])
        with pa.ipc.new_stream(
            sink, zeros.schema, options=pa.ipc.IpcWriteOptions(compression="zstd")
        ) as writer:
            writer.write_batch(zeros)  # 64 MiB in few bytes: the bounds of what is around hold inside, too
        for data in (b"x", b"\xff\xff\xff\xff", b"\0" * 100, good[:-200], good[:-9], sink.getvalue()):
            for annotation in (Point, pa.RecordBatch, pa.Schema):
                row = rpc.RowCodec([("value", rpc.codec_for(annotation, whole=True))])
                with self.subTest(annotation, data=data[:50]), contextlib.suppress(rpc.Mismatch):
                    row.decode([data])
                    self.assertIs(annotation, pa.Schema)
            with self.subTest(data=data[:50]), self.assertRaises((rpc.IPCError, rpc.RequestTooLargeError)):
                Point.deserialize_from_bytes(data)
        for cut in range(1, len(good) - 8):
            with self.subTest(cut=cut), contextlib.suppress(rpc.IPCError):
                self.assertEqual(Point.deserialize_from_bytes(good[:cut]), Point(5, Color.BLUE, "note"))

    def test_classes_that_object(self) -> None:
        loose = Loose()
        self.assertEqual(type(Loose.deserialize_from_bytes(loose.serialize_to_bytes())), Loose)
        loose.kept = 3
        with self.raises(TypeError, "Loose", "more fields (kept)"):
            loose.serialize_to_bytes()
        with self.raises(TypeError, "Late", "given"):
            Late.__new__(Late).serialize_to_bytes()
        refused = mock.Mock(side_effect=rpc.StatusError("no", code=rpc.Code.NOT_FOUND))
        with mock.patch.object(Picky, "__post_init__", refused), self.assertRaises(rpc.StatusError):
            row_class(Picky).deserialize_from_batch(pa.RecordBatch.from_pydict({"value": [{"number": 1}]}))
        for text in ("Ponit", "1 +"):
            broken = type("Broken", (), {"__annotations__": {"value": text}, "__module__": __name__})
            with self.raises(TypeError, "Broken: its annotations do not resolve", "module level"):
                rpc.hints_of(broken)

    def test_many_threads_make_one_codec(self) -> None:
        cls = row_class(list[Box[int]])
        found = at_once(8, lambda _: rpc.dataclass_codec(cls))
        self.assertEqual([codec.arrow_type for codec in found], [rpc.dataclass_codec(cls).arrow_type] * 8)


# ============================================================================
# 7. STREAM STATE
# ============================================================================

ANONYMOUS = AuthContext.anonymous()
TWO_CHUNKS = pa.concat_tables([pa.table({"value": [1, 2]}), pa.table({"value": [3]})])
TEXTS = pa.table({"value": ["x"]})
REQUIRED = pa.schema([pa.field("value", pa.int64(), nullable=False)])
EMITTED: list[tuple[str, Any, list[Any]]] = [  # a method, what it is given, the values that are sent
    ("emit", TWO_CHUNKS, [1, 2, 3]),
    ("emit", TWO_CHUNKS.slice(0, 0), []),
    ("emit", values(1, 2).batch.slice(1), [2]),
    ("emit_arrays", [pa.array([7])], [7]),
    ("emit_arrays", [pa.chunked_array([[1], [2]])], [1, 2]),
    *[("emit_pydict", {"value": given}, given) for given in ([], [8], [None])],
    ("emit_pydict", {"value": (5, 6)}, [5, 6]),
    ("emit_pydict", {"value": pa.array([4])}, [4]),
]
NOT_EMITTED: list[tuple[pa.Schema, str, Any, tuple[str, ...]]] = [  # and parts of what is said
    (INTEGERS, "emit", TEXTS, ("'value'", "expected int64", "got utf8")),
    (INTEGERS, "emit", TEXTS.to_batches()[0], ("'value'", "expected int64", "got utf8")),
    (INTEGERS, "emit", pa.table({"other": [1]}), ("value: int64", "other: int64")),
    (INTEGERS, "emit", {"value": [1]}, ("RecordBatch", "dict")),
    (INTEGERS, "emit_arrays", [], ("emit_arrays", "['value']", "got []")),
    (INTEGERS, "emit_arrays", [pa.array([1])] * 2, ("['value']", "'one too many'")),
    *[(INTEGERS, "emit_pydict", {"value": [wrong]}, ("'value'", "int64")) for wrong in ("x", True, 1.5)],
    (INTEGERS, "emit_pydict", {"value": [1], "more": [2]}, ("'value'", "'more'")),
    *[(INTEGERS, "emit_pydict", wrong, ("'value'", str([*wrong]))) for wrong in ({}, {"other": [1]})],
    (VALUE, "emit_pydict", {"value": [2**53 + 1]}, ("'value'", "9007199254740993")),
    (
        REQUIRED,
        "emit",
        pa.RecordBatch.from_arrays([pa.array([1, None])], schema=REQUIRED),
        ("'value'", "null"),
    ),
    *[(REQUIRED, "emit_pydict", {"value": wrong}, ("'value'", "null")) for wrong in ([None], [1, None])],
]


def collector(schema: pa.Schema = INTEGERS, template: bool = True, **options: Any) -> OutputCollector:
    """A collector, with the row template of its schema if there is one."""
    out = OutputCollector(rpc.WireSchema(schema), **options)
    if template:
        out.template = rpc.row_template(schema)
    return out


def sent(out: OutputCollector) -> Any:
    """The batch that a collector sends, with its metadata."""
    item: Any = out.item
    return read_stream(io.BytesIO(rpc.stream_bytes(rpc.WireSchema(out.output_schema), [item])))[0]


class StateTests(TestCase):
    """The collector of one turn, contexts, states and the stream as the server holds it."""

    def test_what_fits(self) -> None:
        for method, given, expected in EMITTED:
            for template in (False, True):
                with self.subTest(method, given=given, template=template):
                    out = collector(template=template)
                    getattr(out, method)(given)
                    out.validate()
                    self.assertEqual((sent(out)[0].to_pydict(), sent(out)[1]), ({"value": expected}, {}))
                    self.assertEqual(out.data_batch.batch, sent(out)[0])
                    is_ready = not isinstance(given, pa.Table) and expected and None not in expected
                    self.assertEqual(
                        isinstance(out.item, bytes), bool(is_ready or (template and expected == [None]))
                    )

    def test_what_does_not_fit_the_schema(self) -> None:
        for schema, method, given, parts in NOT_EMITTED:
            with self.subTest(parts=parts), self.raises(TypeError, *parts):
                getattr(collector(schema), method)(given)
        with self.raises(TypeError, "'value'", "expected int64", "got float64"):
            collector().emit_pydict({"value": iter([1, 2.5])})
        for key in (STATE, CALL_STATE, rpc.LOCATION_KEY, rpc.SHM_OFFSET_KEY, b"mine"):
            with self.subTest(key), self.raises(TypeError, "emit: metadata"):
                collector().emit_pydict({"value": []}, metadata={**LOG, key: b""})

    def test_a_turn(self) -> None:
        out = OutputCollector(INTEGERS)
        ready = rpc.Message.warn("ready-made", place="2")
        out.client_log(Level.INFO, "first")
        out.emit_client_log_message(ready)
        self.assertEqual((out.messages[0].message, out.messages[1:]), ("first", [ready]))
        with self.raises(RuntimeError, "nothing emitted", "or call finish()"):
            out.validate()
        out.emit_pydict({"value": [1]}, metadata={"k": "v"})
        self.assertEqual(sent(out)[1], {b"k": b"v"})
        for again in (lambda: out.emit(values(1).batch), lambda: out.emit_pydict({"value": [1]})):
            with self.raises(RuntimeError, "emit called twice"):
                again()
        out.finish()
        with self.raises(RuntimeError, "after finish"):
            out.emit_arrays([pa.array([1])])
        ended = collector()
        ended.finish()
        ended.validate()
        with self.raises(RuntimeError, "after finish"):
            ended.emit_pydict({"value": [1]})
        exchange = collector(producer_mode=False)
        with self.raises(RuntimeError, "finish() in an exchange"):
            exchange.finish()
        with self.raises(RuntimeError, "exactly one data batch"):
            exchange.validate()

    def test_what_the_method_changes_later_is_not_sent(self) -> None:
        columns: list[Any] = [["a"], ["a", "b"], [["a"], ["b", "c"]], [["a"]], [{"x": [1]}]]
        for column in columns:
            before = copy.deepcopy(column)
            out = collector(pa.schema([pa.field("value", pa.array(column).type)]))
            out.emit_pydict({"value": column})
            if isinstance(column[-1], list):
                column[-1].clear()
            column.clear()
            self.assertEqual(sent(out)[0]["value"].to_pylist(), before)
        with contextlib.suppress(ImportError):
            import numpy

            array = numpy.arange(4)
            out = collector()
            out.emit_pydict({"value": array})
            array[:] = 9
            self.assertEqual(sent(out)[0]["value"].to_pylist(), [0, 1, 2, 3])

    def test_contexts(self) -> None:
        now = time.monotonic()
        sent_logs: list[rpc.Message] = []
        for deadline, gone, expected in (
            (None, None, False),
            (now + 60, lambda: False, False),
            (now - 1, None, True),
            (now + 60, lambda: True, True),
        ):
            context = CallContext(ANONYMOUS, sent_logs.append, request_id="r", deadline=deadline, gone=gone)
            self.assertEqual((context.cancelled, context.transport_metadata), (expected, {}))
        context.client_log(Level.INFO, "to the client", n="1")
        self.assertEqual(sent_logs, [rpc.Message(Level.INFO, "to the client", n="1")])
        with self.assertLogs("vgi_rpc.method", "WARNING") as caught:
            context.logger.warning("on the server")
        self.assertEqual(caught.records[0].__dict__["request_id"], "r")
        self.assertEqual((rpc.current_auth(), ANONYMOUS.authenticated), (ANONYMOUS, False))
        AuthContext("d", True, "me").require_authenticated()
        with self.assertRaises(rpc.StatusError) as refused:
            ANONYMOUS.require_authenticated()
        self.assertIs(refused.exception.error_code, rpc.Code.UNAUTHENTICATED)
        parts = {StreamState(): "process()", ProducerState(): "produce()", ExchangeState(): "exchange()"}
        for state, part in parts.items():
            with self.raises(TypeError, type(state).__name__, part):
                state.process(values(), OutputCollector(INTEGERS), context)

    def test_streams(self) -> None:
        empty = pa.schema([])
        for stream, expected in (
            (Stream(INTEGERS, StreamState()), True),
            (Stream(INTEGERS, StreamState(), empty), True),
            (Stream(INTEGERS, StreamState(), INTEGERS), False),
            (Stream(INTEGERS, Running("a"), input_schema=empty), False),
        ):
            self.assertEqual(stream.is_producer, expected)
        with self.raises(TypeError, "input_schema is missing", "Running"):
            Stream(INTEGERS, Running("a"))
        self.assertEqual(typing.get_args(Stream[Count]), (Count, type(None)))
        self.assertEqual(typing.get_args(Stream[Count, Header]), (Count, Header))


# ============================================================================
# 8. METHODS
# ============================================================================


class Undeclared:
    """A class without an Arrow mapping."""


@dataclass
class Unserialisable(ProducerState):
    """A state with a field that no token can hold."""

    handle: Undeclared


class OwnInit(ProducerState):
    """A state that is no dataclass."""

    def __init__(self, left: int) -> None:
        self.left = left


@dataclass
class OddCallState(ProducerState):
    """A state whose call state no token can hold."""

    CALL_STATE_TYPE: ClassVar[Any] = int


@dataclass
class AsyncState(ProducerState):
    """A state whose turn never runs."""

    async def produce(self, out: Any, ctx: Any) -> None: ...


BROKEN_PROTOCOL = {  # a method of a Protocol: what the one error says of it
    "def one(self, a: complex) -> int: ...": "parameter 'a'.* complex",
    "def two(self, a) -> int: ...": "parameter 'a': no annotation",
    "def three(self, a: int): ...": "result: no return annotation.*-> None",
    "def four(self, *args: int) -> int: ...": "parameter 'args': expected a named parameter",
    "def five(self) -> 'NoSuchName': ...": "NoSuchName.*module level",
    "def six(self) -> list[Undeclared]: ...": "result: .*Undeclared",
    "def seven(self, a: complex, b) -> Undeclared: ...": "(?s)parameter 'a'.*parameter 'b'.*result: .*Undeclared",
    "def eight(self, a: int = 'text') -> int: ...": "parameter 'a': its default: expected int64, got str",
    "def nine(self) -> Stream[ProducerState, int]: ...": "result: the header .*int",
    "def ten() -> int: ...": "'self'.*@staticmethod",
    "async def eleven(self) -> int: ...": "'async def'.*asyncio.run",
    "def twelve(self) -> int: yield 1": "generator function.*Stream",
    "thirteen = functools.partial(add)": "expected a function, got partial",
    "fourteen = Adder()": "expected a function, got Adder",
    "fifteen = staticmethod(Adder())": "expected a function, got Adder",
    "sixteen = functools.partialmethod(add, 1)": "expected a function, got partial",
    "seventeen = functools.singledispatchmethod(add)": "dispatches on a positional argument",
}
INTEGER, STREAM = "(self) -> int", "(self) -> Stream[StreamState]"
DISAGREEMENTS = {  # a method: the rest of its line in the Protocol, its lines in the implementation, what is said
    "missing": (INTEGER, "", "expected a method, got None"),
    "constant": (INTEGER, "constant = 3", "expected a method, got int"),
    "renamed": ("(self, alpha: int) -> int", "def renamed(self, alpa: int): ...", r"\['alpha'\].*'alpa'"),
    "demands": ("(self, a: int) -> int", "def demands(self, a: int, b: int): ...", r"\['a'\].*'b'"),
    "bare": ("(self, a: int) -> int", "def bare(self): ...", r"\['a'\].*'a'"),
    "positional": ("(self, a: int) -> int", "def positional(self, a, /): ...", r"\['a'\].*'a'"),
    "coroutine": (INTEGER, "async def coroutine(self): ...", "'async def'"),
    "generator": (INTEGER, "def generator(self): yield 1", "generator function"),
    "called": (INTEGER, "called = AsyncAdder()", "AsyncAdder is 'async def'"),
    "partial": (
        INTEGER,
        "partial = staticmethod(functools.partial(AsyncAdder.__call__, 1))",
        "partial is 'async def'",
    ),
    "value": (STREAM, "int", r"returns int, the protocol says Stream\[StreamState\]"),
    "stream": (INTEGER, "Stream[Count]", r"returns Stream\[Count\], the protocol says int"),
    "no_state": (STREAM, "Stream[Header]", "a Stream of Header: expected a StreamState"),
    "other_kind": ("(self) -> Stream[Ticks]", "Stream[Running]", "of Running: the protocol says producer"),
    "unsent": (STREAM, "Stream[Unserialisable]", "Unserialisable.handle: .*Undeclared"),
    "own_init": (STREAM, "Stream[Count | OwnInit]", "OwnInit has an __init__ of its own"),
    "async_state": (STREAM, "Stream[AsyncState]", "AsyncState: produce is 'async def'"),
    "unknown": (STREAM, "Stream[NoSuchState]", "'NoSuchState'"),
    "call_state": (STREAM, "Stream[OddCallState]", "CALL_STATE_TYPE: expected a dataclass, got int"),
}
FINE = "def fine(self, a: int, b: str = 'b', ctx: CallContext | None = None) -> int: ..."
FITS = "def fine(self, a, *more: 'NotResolved', ctx: int, **others) -> int: ..."

CONTEXTS = (
    "a: int, ctx",
    "c: CallContext, a: int",
    "a: int, c: CallContext | None = None",
    "a: int, ctx: int",
)
SIGNATURES = (  # as they are shown, but for the module and what is behind a name
    "price(p: Price) -> Price",
    "down(start: int) -> Stream[Count]",
    "headed() -> Stream[Count, Header]",
    "convert(unit: Color = Color.RED, day: datetime.date = datetime.date(2024, 1, 31)) -> None",
    "several(c: list[Color] = [Color.RED], s: str | None = None) -> dict[str, Point]",
)
ADDS = "(self, a: int, b: int = 10) -> int: return a + b"
CALLABLES = (  # each public method adds 10 to its ``a``
    f"def plain{ADDS}",
    "outside = staticmethod(add)",
    "static = rpc.idempotent(staticmethod(add))",
    "cached = staticmethod(functools.lru_cache(add))",
    f"@functools.lru_cache\n    def kept{ADDS}",
    f"@doubled\n    def half{ADDS.replace('a + b', '(a + b) / 2').replace('-> int', '-> float')}",
    f"@classmethod\n    def of_class{ADDS.replace('self', 'cls')}",
    f"@property\n    def shown{ADDS}",
    "def on_serve_start(self, kind): ...",
    "def _private(self): ...",
    "step, Nested, Rows, Id = 10, Header, list[int], UserId",
)


def doubled(function: Any) -> Any:
    """A decorator as people write them."""

    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        return 2 * function(*args, **kwargs)

    return wrapper


class Adder:
    """An object that is called."""

    def __call__(self, a: int, b: int = 10) -> int: ...


class AsyncAdder:
    """The same for another kind of server."""

    async def __call__(self) -> int: ...


def add(a: int, b: int = 10) -> int:
    """Add."""
    return a + b


def made(name: str, *lines: str) -> Any:
    """A class of this module with these lines."""
    namespace: dict[str, Any] = {}
    exec("\n    ".join([f"class {name}:", *lines]), globals(), namespace)
    return namespace[name]


class MethodTests(TestCase):
    """Protocol classes and implementations, checked at construction."""

    def check(self, text: str, expected: Mapping[str, str]) -> None:
        """In *text* a line or more stands for each of *expected*, and none for ``fine()``."""
        for name, pattern in expected.items():
            told = "\n".join(line for line in text.split("\n  - ") if re.match(rf"(\w+\.)?{name}\b", line))
            with self.subTest(name):
                self.assertRegex(told, pattern)
        self.assertNotIn("fine()", text)

    def test_all_that_is_wrong_is_said_in_one_error(self) -> None:
        broken = made("Broken", *BROKEN_PROTOCOL, FINE)
        with self.raises(TypeError, "Broken cannot be served") as caught:
            rpc.rpc_methods(broken)
        expected = {re.sub("async |def |\\W.*", "", line): told for line, told in BROKEN_PROTOCOL.items()}
        self.check(str(caught.exception), expected)
        with self.raises(TypeError, "Undeclared does not implement Broken", "fine(): expected") as caught:
            RpcServer(broken, Undeclared())
        self.check(str(caught.exception).replace("fine()", ""), expected)
        ours = [f"def {name}{rest}: ..." for name, (rest, _, _) in DISAGREEMENTS.items()]
        theirs = []
        for name, (_, body, _) in DISAGREEMENTS.items():
            if body == "int" or body.startswith("Stream"):
                body = f"def {name}(self) -> {body!r}: ..."
            theirs.append(body)
        with self.raises(TypeError, "Theirs does not implement Ours") as caught:
            RpcServer(made("Ours", *ours, FINE), made("Theirs", *theirs, FITS)())
        self.check(str(caught.exception), {name: told for name, (_, _, told) in DISAGREEMENTS.items()})

    def test_what_is_no_service(self) -> None:
        async def make() -> Any:
            return ServiceImpl()

        coroutine = make()
        self.addCleanup(coroutine.close)
        for protocol, implementation, part in (
            (Service, ServiceImpl, "the class Service and the class ServiceImpl"),
            (ServiceImpl(), Service, "a ServiceImpl and the class Service"),
            (Service, None, "the class Service and a None"),
            (Service, coroutine, "the class Service and a coroutine"),
            ("Service", ServiceImpl(), "a str and a ServiceImpl"),
            (made("Empty", "_hidden = 3"), ServiceImpl(), "there are no methods"),
        ):
            with self.subTest(part), self.raises(TypeError, part):
                rpc.bind_implementation(protocol, implementation)
        with self.raises(TypeError, "expected a Protocol class", "ServiceImpl"):
            rpc.rpc_methods(ServiceImpl())

    def test_annotations_for_the_own_eyes_of_an_implementation(self) -> None:
        eyes = made("Eyes", "def echo(self, x: int) -> int: ...", "def go(self) -> Stream: ...")
        own = made("Own", "def echo(self, x: 'Local', ctx) -> 'Local': ...", "def go(self): ...")
        methods = rpc.bind_implementation(eyes, own()).methods
        self.assertEqual(methods["echo"].context_parameter, "ctx")
        self.assertEqual((methods["go"].state_types, methods["go"].is_exchange), ((), None))

    def test_callables_of_every_kind(self) -> None:
        callables = made("Callables", *CALLABLES)
        methods = rpc.bind_implementation(callables, callables()).methods
        self.assertEqual(list(methods), "plain outside static cached kept half of_class".split())
        for name, bound in methods.items():
            with self.subTest(name):
                info = bound.info
                self.assertEqual((info.params.names, info.param_defaults), (("a", "b"), {"b": 10}))
                self.assertEqual((bound.function(a=1, b=10), bound.function(a=2, b=20)), (11, 22))
                self.assertEqual(bound.context_parameter, None)
        contextual = made("Contextual", *(f"def m{i}(self, {p}) -> int: ..." for i, p in enumerate(CONTEXTS)))
        bound = rpc.bind_implementation(contextual, contextual()).methods.values()
        found = [(m.info.params.names, m.context_parameter) for m in bound]
        self.assertEqual(found, [(("a",), "ctx"), (("a",), "c"), (("a",), "c"), (("a", "ctx"), None)])
        told = [methods[name].info.idempotency for name in ("static", "plain")]
        self.assertEqual(told, ["idempotent", "unknown"])

    def test_what_a_method_info_says(self) -> None:
        methods = rpc.rpc_methods(Service)
        self.assertEqual(methods["add"].param_docs, {"a": "The one.", "b": "The other."})
        self.assertIs(methods["count_with_header"].header_type, Header)
        text = rpc.describe_rpc(Service)
        for part in (
            "Service: ",
            "add(a: float, b: float = 2.0) -> float",
            "a: float64",
            "The one.",
            "total: int",
        ):
            self.assertIn(part, text)
        names = ("add", "running", "ticks", "count")
        self.assertEqual([methods[name].kind for name in names], ["unary", "exchange", "producer", "stream"])
        bound = rpc.bind_implementation(Service, ServiceImpl()).methods
        self.assertEqual(bound["scaled"].state_types, (Scaled,))

    def test_signatures(self) -> None:
        lines = [f"def {text.replace('(', '(self, ', 1)}: ..." for text in SIGNATURES]
        found = [info.signature() for info in rpc.rpc_methods(made("Shown", *lines)).values()]
        shown = [re.sub(r"\bdatetime\.", "", text).replace("Price", "Decimal(20, 4)") for text in SIGNATURES]
        self.assertEqual(found, shown)

    def test_names_and_versions(self) -> None:
        def service(**facts: Any) -> Any:
            named = made("Named", "def ping(self) -> None: ...")
            for key, value in facts.items():
                setattr(named, key, value)
            return rpc.bind_implementation(named, named())

        self.assertEqual((service().name, service().version), ("Named", ""))
        told = service(protocol_name="a.B_1", protocol_version="1.2.3")
        info = told.methods["ping"].info
        self.assertEqual(
            (told.name, info.protocol_name, told.version, info.protocol_version),
            ("a.B_1", "a.B_1", "1.2.3", "1.2.3"),
        )
        for name in ("", "1a", "a-b", "ü", "a" * 256, 3):
            with self.subTest(name=name), self.raises(ValueError, "protocol name"):
                service(protocol_name=name)
        for version in ("1", "1.2", "1.2.x", "01.2.3", "1.2.3-rc1", 3):
            with self.subTest(version=version), self.raises(ValueError, "MAJOR.MINOR.PATCH"):
                service(protocol_version=version)
        derived = type("Derived", (told.protocol,), {})
        self.assertEqual(rpc.rpc_methods(derived)["ping"].protocol_name, "Derived")  # one's own name alone


# ============================================================================
# 9. REQUESTS AND RESULTS
# ============================================================================

METHODS = rpc.rpc_methods(Service)
BOUND = rpc.bind_implementation(Service, ServiceImpl()).methods
TWO_VALUES = values(1.0, 2.0).batch.slice(1)


def reshaped(
    *columns: str, kind: pa.DataType = pa.float64(), nullable: bool = False, cells: Any = (1,)
) -> bytes:  # noqa: B008
    """A request to ``add`` with other columns."""
    schema = pa.schema([pa.field(name, kind, nullable=nullable) for name in columns])
    batch = pa.RecordBatch.from_arrays([pa.array(cells, kind) for _ in columns], schema=schema)
    return ipc_bytes(schema, (batch, request_metadata("add")))


REFUSED_PARAMETERS = {  # what is wrong: the request, its exception, parts of the text
    "missing": (reshaped("a"), rpc.ParameterError, ("add()", "missing 'b'", "a: float64")),
    "extra": (reshaped("a", "b", "c"), rpc.ParameterError, ("no parameter 'c'",)),
    "renamed": (reshaped("a", "bb"), rpc.ParameterError, ("'bb'", "did you mean 'b'")),
    "reordered": (reshaped("b", "a"), rpc.ParameterError, ("order",)),
    "twice": (reshaped("a", "a"), rpc.ParameterError, ("missing 'b'",)),
    "type": (reshaped("a", "b", kind=pa.int64()), rpc.ParameterError,
     ("parameter 'a': expected a: float64 not null, got a: int64",)),
    "nullability": (reshaped("a", "b", nullable=True), rpc.ParameterError, ("(a: float64, b: float64)", "null")),
    "null": (reshaped("a", "b", cells=(None,)), rpc.ParameterError, ("parameter a", "float64", "got None")),
    "no row": (reshaped("a", "b", cells=()), rpc.ProtocolError, ("exactly 1 row", "got 0")),
    "two rows": (reshaped("a", "b", cells=(1, 2)), rpc.ProtocolError, ("exactly 1 row", "got 2")),
    "no batch": (ipc_bytes(VALUE), rpc.IPCError, ("one batch", "no batch")),
    "two batches": (ipc_bytes(VALUE, TWO_VALUES, TWO_VALUES), rpc.ProtocolError, ("exactly one batch",)),
}  # fmt: skip
# Their last values have no member of an enum, whose dictionary is then empty: templates leave that to pyarrow.
NAMELESS = {"echo_dict_enum", "echo_dict_dataclass", "echo_list_optional_dataclass"}
REQUEST_IDS = {b"x" * 128: "x" * 128, b"x" * 129: "", b"a b": "", b"a\n": "", b"\xff": "", b"": "", None: ""}
TIMEOUTS = {b"1500": 1.5, b"0": 0.0, b"-1": None, b"1" * 16: None, b"": None}


def read_request(data: bytes) -> rpc.Request:
    """A request read the ordinary way."""
    return rpc.read_request(rpc.IpcReader(rpc.ByteSource(data)))


def sample_arguments(name: str) -> list[Any]:
    """Arguments for a method of the tests' service."""
    info = METHODS[name]
    if name.startswith("echo_"):
        return [TYPES[name[5:]].values[-1]]
    known = {str: "text", int: 7, float: 1.5, list[str]: ["a"]}
    return [info.param_defaults.get(n, known.get(kind, 7)) for n, kind in info.param_types.items()]


def written(name: str, timeout: float | None = None, methods: Any = METHODS) -> bytes:
    """A request as our client writes it."""
    row = rpc.encode_arguments(methods[name], sample_arguments(name))
    return b"".join(map(bytes, rpc.request_pieces(methods[name], row, "0123456789abcdef", timeout)))


def outcome(request: rpc.Request, info: Any) -> str:
    """The arguments of a request, or the error."""
    try:
        return repr(request.arguments(info))
    except rpc.ParameterError as exc:
        return str(exc)


class RequestTests(TestCase):
    """Requests as foreign clients may write them, and as ours do; results and headers."""

    def test_what_is_refused(self) -> None:
        for name, (data, kind, parts) in REFUSED_PARAMETERS.items():
            with self.subTest(name), self.raises(kind, *parts):
                read_request(data).arguments(METHODS["add"])
        for rows in (pa.array([], pa.struct([])), pa.array([{}], pa.struct([]))):  # no parameters: any rows
            batch = pa.RecordBatch.from_struct_array(rows)
            data = ipc_bytes(batch.schema, (batch, request_metadata("nothing")))
            self.assertEqual(read_request(data).arguments(METHODS["nothing"]), {})

    def test_a_dictionary_behind_the_batch_changes_no_value(self) -> None:
        info = METHODS["echo_enum"]
        red, blue = (request_bytes("echo_enum", {"value": n}, info.params_schema) for n in ("RED", "BLUE"))
        at = len(info.params.wire.message)
        [place] = [i for i in range(at, len(red), 8) if red[i : i + 8] == b"RED\0\0\0\0\0"]
        data = red[:-8] + blue[at : place + 8] + red[-8:]
        self.assertEqual(read_request(data).arguments(info), {"value": Color.RED})

    def test_metadata(self) -> None:
        request = read_request(request_bytes("add", {"a": 1.0, "b": 2.0}, named=b"\xff\xfe"))
        self.assertEqual((request.text(rpc.PROTOCOL_KEY), request.text(rpc.TIMEOUT_KEY)), ("Service", None))
        with self.raises(rpc.ProtocolError, "vgi_rpc.method", "not UTF-8"):
            request.text(rpc.METHOD_KEY)
        for sent, expected in REQUEST_IDS.items():
            self.assertEqual(read_request(request_bytes("nothing", request_id=sent)).request_id, expected)
        for text, seconds in TIMEOUTS.items():
            self.assertEqual(rpc.read_timeout({rpc.TIMEOUT_KEY: text}), seconds)
        ids = {rpc.new_request_id() for _ in range(100)}
        self.assertEqual((len(ids), {len(i) for i in ids}), (100, {16}))

    def test_every_request_is_written_and_read_in_both_ways(self) -> None:
        table = rpc.RequestTable()
        for bound in (*BOUND.values(), *BOUND.values()):
            table.add(bound)
        for name, info in METHODS.items():
            for timeout, more in ((None, {}), (1.5, {"timeout_ms": b"000000000001500"})):
                data = written(name, timeout)
                expected = dict(zip(info.params.names, sample_arguments(name)))
                request = read_request(data)
                with self.subTest(name, timeout=timeout):
                    metadata = request_metadata(name, request_id=b"0123456789abcdef", **more)
                    self.assertEqual((request.metadata, request.arguments(info)), (metadata, expected))
                    hit = table.read(b"before" + data + b"behind", 6)
                    self.assertEqual(hit is None, name in NAMELESS or info.request_templates[0] is None)
                    if hit is not None:
                        self.assertEqual((hit[0], hit[2]), (BOUND[name], 6 + len(data)))
                        self.assertEqual((hit[1].metadata, hit[1].arguments(info)), (metadata, expected))

    def test_the_table_reads_nothing_but_whole_good_requests(self) -> None:
        table = rpc.RequestTable()
        self.assertIsNone(table.read(written("add")))
        for name in ("add", "echo_str", "defaults"):
            table.add(BOUND[name])
            data = written(name)
            self.assertIsNotNone(table.read(data, 0, len(data)))
            self.assertIsNone(table.read(data, 0, len(data) - 1))
            for at in range(len(data)):
                self.assertIsNone(table.read(data[:at]))
                damaged = data[:at] + bytes([data[at] ^ 1 << at % 8]) + data[at + 1 :]
                if hit := table.read(damaged):
                    request = read_request(damaged)
                    self.assertEqual(
                        (hit[0], hit[1].metadata, hit[2]), (BOUND[name], request.metadata, len(data))
                    )
                    self.assertEqual(outcome(hit[1], METHODS[name]), outcome(request, METHODS[name]))

    def test_values_too_large_for_a_template(self) -> None:
        info = METHODS["echo_bytes"]
        big = os.urandom(1 << 20)
        pieces = rpc.request_pieces(info, [big], rpc.new_request_id(), None)
        addresses = [pa.py_buffer(piece).address for piece in pieces if len(piece) >= len(big)]
        self.assertEqual(addresses, [pa.py_buffer(big).address])  # not copied
        self.assertEqual(read_request(b"".join(map(bytes, pieces))).arguments(info), {"value": big})

    def test_what_is_not_as_declared(self) -> None:
        numbers = pa.RecordBatch.from_pydict({"result": [1]})
        nested = METHODS["echo_dataclass"]
        data = rpc.stream_bytes(nested.result.wire, [(nested.result.to_batch([b"no Arrow"]), None)])
        self.assertIsNone(rpc.read_result(nested, data))
        good = rpc.stream_bytes(METHODS["add"].result.wire, [rpc.result_item(METHODS["add"], 5.0)])
        self.assertEqual(rpc.read_result(METHODS["add"], b"before" + good, 6), (5.0, 6 + len(good)))
        self.assertIsNone(rpc.read_result(METHODS["add"], good[:-1]))
        for use, name, given, parts in (
            (rpc.result_item, "lie", [1, "x"], ("lie() result[1]: expected int64, got str",)),
            (rpc.result_item, "nothing", 3, ("nothing() result", "None", "got int")),
            (rpc.decode_result, "echo_str", numbers, ("echo_str() result: expected utf8, got int",)),
            (rpc.decode_result, "echo_str", BATCH, ("echo_str() result: expected 1 row", "result: utf8")),
            (
                rpc.decode_result,
                "echo_dataclass",
                read_streams(data)[0][0][0],
                ("echo_dataclass() result: ",),
            ),
            (
                rpc.header_batch,
                "count_with_header",
                None,
                ("count_with_header() header: expected Header, got None",),
            ),
            (rpc.header_batch, "count_with_header", Header("x"), ("header.total: expected int64, got str",)),
        ):
            with self.subTest(parts=parts), self.raises(rpc.ParameterError, *parts):
                use(METHODS[name], given)
        batch = rpc.header_batch(METHODS["count_with_header"], Header(3))
        self.assertEqual(batch.to_pylist(), [{"total": 3, "text": "none"}])


# ============================================================================
# 10. REFLECTION
# ============================================================================

TOKENS = {  # how the hash spells a type
    "large_binary": pa.large_binary(),
    "fixed_size_binary(8)": pa.binary(8),
    "float16": pa.float16(),
    "date32": pa.date32(),
    "time64(ns)": pa.time64("ns"),
    "timestamp(us,tz=Europe/Berlin)": pa.timestamp("us", "Europe/Berlin"),
    "decimal256(50,-4)": pa.decimal256(50, -4),
    "list<item:int64>": pa.list_(pa.field("element", pa.int64(), nullable=False)),
    "large_list<item?:utf8>": pa.large_list(pa.utf8()),
    "fixed_size_list(3)<item?:int8>": pa.list_(pa.int8(), 3),
    "map<key:utf8,value?:int64,keys_sorted>": pa.map_(pa.utf8(), pa.int64(), keys_sorted=True),
    "struct<a:int64,b?:utf8>": pa.struct([pa.field("a", pa.int64(), nullable=False), ("b", pa.utf8())]),
    "dictionary<index:int8,value:int64,ordered>": pa.dictionary(pa.int8(), pa.int64(), ordered=True),
}


@dataclass
class Window(ArrowSerializableDataclass):
    """From and to."""

    start: datetime.date
    color: Color = Color.BLUE
    colors: list[Color] = field(default_factory=list)


@dataclass
class Query(ArrowSerializableDataclass):
    windows: list[Window]
    named: dict[str, Window]
    first: Window | None = None


Price = Annotated[decimal.Decimal, ArrowType(pa.decimal128(20, 4))]


class Telling(Protocol):
    """Methods with something to tell."""

    def price(
        self,
        price: Price,
        color: Color = Color.BLUE,
        window: Window = Window(datetime.date(2024, 1, 31)),
        key: uuid.UUID | None = None,
        numbers: set[int] = {3},
        colors: Annotated[list[Color], ["unhashable"]] = [Color.RED],
    ) -> list[Window]:
        """Price it.

        Args:
            price: What it costs
                today.
        """

    @rpc.idempotent
    @rpc.deprecated("use price")
    def ask(self, query: Query) -> Query: ...

    def stream(self) -> Stream[StreamState, Header]: ...


class TellingImpl:
    """Only its annotations count here."""

    def price(self, price, color, window, key, numbers, colors):
        """Not the Protocol's text."""

    def ask(self, query: Query) -> Query:
        return query

    def stream(self) -> Stream[Running, Header]: ...


def described(answer: rpc.ProtocolDescription) -> rpc.ServiceDescription:
    """What a client learns of a service, with everything through its bytes."""
    codec = rpc.dataclass_codec(rpc.ProtocolDescription)
    answer = codec.from_bytes(codec.to_bytes(answer))
    return rpc.service_description(rpc.ProtocolList("id", "", "1", []), answer)


class ReflectionTests(TestCase):
    """What a server tells, and the protocol hash, which the family computes alike."""

    def setUp(self) -> None:
        super().setUp()
        self.infos = rpc.rpc_methods(Telling)
        self.answer = rpc.describe_service(rpc.bind_implementation(Telling, TellingImpl()))
        self.service = described(self.answer)
        self.methods = self.service.methods

    def test_default_of_odd_classes(self) -> None:
        class Odd(enum.Enum):
            A = 1
            name = property(lambda self: self.label)  # type: ignore[assignment]

        class Mute(str):
            def __repr__(self) -> str:
                raise ValueError

        def call(odd=Odd.A, text=Mute("a")): ...

        shown = [rpc.default_text(default) for default in call.__defaults__ or ()]
        self.assertEqual(shown, ["Odd.A", "…"])

    def test_the_hash_of_a_known_protocol(self) -> None:
        class Known(Protocol):
            def add(self, a: int, b: float | None) -> list[int]:
                """Docs and the names of types change nothing."""

            def feed(self) -> Stream[StreamState, Header]: ...

        spelt = (
            '{"methods":[{"has_header":false,"has_return":true,"name":"add","params":['
            '{"name":"a","nullable":false,"type":"int64"},{"name":"b","nullable":true,"type":"float64"}],'
            '"result":[{"name":"result","nullable":false,"type":"list<item?:int64>"}],"type":"unary"},'
            '{"has_header":true,"has_return":false,"header":[{"name":"total","nullable":false,"type":"int64"},'
            '{"name":"text","nullable":false,"type":"utf8"}],"name":"feed","params":[],"type":"stream"}],'
            '"protocol":"Known"}'
        )
        expected = hashlib.sha256(b"vgi_rpc.protocol_hash.v1|" + spelt.encode()).hexdigest()
        self.assertEqual(rpc.protocol_hash("Known", rpc.rpc_methods(Known).values()), expected)
        self.assertEqual(list(map(rpc._type_token, TOKENS.values())), list(TOKENS))
        with self.raises(TypeError, "no token"):
            rpc._type_token(pa.dense_union([pa.field("a", pa.int8())]))

    def test_methods(self) -> None:
        for name, method in self.methods.items():
            own = self.infos[name]
            self.assertEqual((method.doc, method.signature()), (own.doc or "", own.signature()))
            self.assertEqual((method.params.schema, method.kind != "stream"), (own.params_schema, True))
            self.assertEqual(method.request_metadata, own.request_metadata)
            for what, schema in rpc.described_schemas(own).items():
                told = rpc.described_schemas(method)[what]
                self.assertTrue(told.equals(schema, check_metadata=True), (name, what))
        ask = self.methods["ask"]
        marks = (ask.idempotency, ask.deprecation, ask.has_header, ask.header_schema)
        self.assertEqual(marks, ("idempotent", "use price", False, None))

    def test_fields_tell_what_is_inside(self) -> None:
        price = self.methods["price"]
        params = price.params_schema
        told = ["Decimal(20, 4)", "Color", "Window", "UUID | None", "set[int]", "list[Color]"]
        self.assertEqual([rpc.type_of(member) for member in params], told)
        self.assertEqual(price.param_docs, {"price": "What it costs today."})
        defaults = dict(price.param_defaults)
        first = Window.deserialize_from_bytes(defaults.pop("window"))
        self.assertEqual(first, Window(datetime.date(2024, 1, 31)))
        self.assertEqual(defaults, {"color": "BLUE", "key": None, "numbers": [3], "colors": ["RED"]})
        window: Any = rpc.struct_schema(params.field("window"))
        query: Any = rpc.struct_schema(self.methods["ask"].params_schema.field("query"))
        result = price.result_schema.field("result")
        named = query.field("named").type.item_field
        found = [rpc.type_of(member) for member in (*window, result, named, query.field("first"))]
        self.assertEqual(found, ["date", "Color", "list[Color]", "list[Window]", "Window", "Window | None"])
        shown = list(rpc.described_rows(params))
        default = "Window(start=date(2024, 1, 31), color=Color.BLUE, colors=[])"
        self.assertIn(("window", f"Window = {default}", "From and to."), shown)
        self.assertIn(("  color", "Color (RED, BLUE) = Color.BLUE", Color.__doc__), shown)
        self.assertIn(("  colors", "list[Color] (RED, BLUE) = []", ""), shown)
        same = made("Same", "def h(self, total: int = 9) -> Stream[StreamState, Header]: ...")
        schemas = rpc.described_schemas(rpc.rpc_methods(same)["h"])
        for what, text in (("params", "int = 9"), ("header", "int")):
            first, *_ = rpc.described_rows(schemas[what])
            self.assertEqual(first, ("total", text, ""))
        self.assertIn(("colors", "list[Color] (RED, BLUE) = [Color.RED]", ""), shown)
        nested = window.field("colors").type.value_field
        for color in (window.field("color"), nested, result.type.value_field.type[1], named.type[1]):
            self.assertEqual(rpc.field_text(color, rpc.ENUM_KEY).split(), ["RED", "BLUE"])
        docs = [rpc.field_text(params.field(name), rpc.DOC_KEY) for name in ("window", "color", "key")]
        self.assertEqual(docs, ["From and to.", Color.__doc__, ""])
        self.assertEqual(rpc.field_text(self.methods["ask"].params_schema.field("query"), rpc.DOC_KEY), "")
        header: Any = self.methods["stream"].header_schema
        self.assertEqual((header, rpc.type_of(header.field(0))), (Header.ARROW_SCHEMA, "int"))
        self.assertFalse(any(member.metadata for member in self.infos["price"].params_schema))

    def test_strange_servers(self) -> None:
        """What another server does not tell, or tells in another way, is done without."""
        bare = self.infos["price"].params_schema
        keys = (rpc.STRUCT_KEY, rpc.ENUM_KEY, rpc.DEFAULT_KEY, rpc.TYPE_KEY)
        strange = [member.with_metadata(dict.fromkeys(keys, b"\xff{")) for member in bare]
        [summary] = [method for method in self.answer.methods if method.name == "price"]
        for schema in (bare, pa.schema(strange, metadata={rpc.PARAM_DOCS_KEY: b"["})):
            summary.params_schema_ipc = schema.serialize().to_pybytes()
            method = described(self.answer).methods["price"]
            self.assertEqual((method.param_defaults, method.param_docs, method.doc), ({}, {}, ""))
            self.assertEqual([rpc.struct_schema(member) for member in method.params_schema], [None] * 6)
            self.assertIn("price(price: ", method.signature())
        summary.params_schema_ipc = b"x" * 16
        with self.raises(rpc.IPCError, "not an Arrow IPC"):
            described(self.answer)

    def test_many_fields(self) -> None:
        """A wide dataclass stays within the bounds that the reader has for foreign schemas."""
        wide = make_dataclass("Wide", [(f"field_{n}", Color, Color.RED) for n in range(400)])
        taking = made("Taking", "def take(self, wide: int) -> None: ...")
        taking.take.__annotations__["wide"] = wide
        service = described(rpc.describe_service(rpc.bind_implementation(taking, taking())))
        told: Any = rpc.struct_schema(service.methods["take"].params_schema.field("wide"))
        self.assertEqual(len(told), 400)


# ============================================================================
# 11. TOKENS
# ============================================================================


class SealTests(TestCase):
    """The sealer alone: what was sealed for one binding opens for it, all else is one uniform refusal."""

    BINDING = (b"protocol", b"method", b"domain", b"principal")

    def refused(self, sealer: Any, token: Any, half: bytes = b"state", binding: Any = BINDING) -> str:
        """Return the text of the refusal."""
        with self.assertRaises(rpc.TokenError) as caught:
            sealer.open(half, binding, token)
        return str(caught.exception)

    def test_contents_come_back(self) -> None:
        sealer = rpc.TokenSealer([KEY])
        for content in (b"", b"\0", b"x" * 9_999, b"x" * 1_000_000, os.urandom(20_000)):
            token = sealer.seal(b"state", self.BINDING, content)
            self.assertEqual(sealer.open(b"state", self.BINDING, token), content)
            self.assertLess(len(token), min(len(content), 30_000) * 4 // 3 + 110)
            self.assertTrue(base64.b64decode(token, validate=True))
        with mock.patch.object(rpc, "MAX_STATE_BYTES", 20_000):
            token = sealer.seal(b"state", self.BINDING, b"x" * 20_000)
            self.assertEqual(len(sealer.open(b"state", self.BINDING, token)), 20_000)
            with self.raises(rpc.ResponseTooLargeError, "at most 20000 bytes", "got 20001"):
                sealer.seal(b"state", self.BINDING, b"x" * 20_001)

    def test_every_damage_has_the_same_answer(self) -> None:
        sealer = rpc.TokenSealer([KEY])
        token = sealer.seal(b"state", self.BINDING, b"content of the state")
        raw = base64.b64decode(token)
        broken: list[Any] = [None, b"", b"not base64!", token + b"\n", token.rstrip(b"=")[:-1], token + token]
        broken += [raw, b" " + token, token + b"=", b"\xff" + token]
        broken += [base64.b64encode(raw + b"\0"), base64.b64encode(b"\0" + raw)]
        for data, encode in ((raw, base64.b64encode), (token, bytes)):
            for at in range(len(data)):
                flips = (bytes([data[at] ^ (1 << bit)]) for bit in range(8))
                broken += [encode(data[:at] + flipped + data[at + 1 :]) for flipped in flips]
                broken.append(encode(data[:at]))
        self.assertEqual({self.refused(sealer, damaged) for damaged in broken}, {rpc.TOKEN_REFUSED})
        tokens = (sealer.seal(b"s", (), bytes([n]) * 200) for n in range(255, 0, -1))
        token = next(token for token in tokens if b"+" in token or b"/" in token)
        self.refused(sealer, token.translate(bytes.maketrans(b"+/", b"-_")), b"s", ())  # another alphabet

    def test_binding(self) -> None:
        sealer = rpc.TokenSealer([KEY])
        token = sealer.seal(b"state", self.BINDING, b"content")
        one, two, *more = self.BINDING
        others = [tuple(part + b"2" * (part is own) for part in self.BINDING) for own in self.BINDING]
        others += [(one + two[:1], two[1:], *more), self.BINDING[:3], (*self.BINDING, b"")]
        texts = {self.refused(sealer, token, binding=other) for other in others}
        self.assertEqual(texts | {self.refused(sealer, token, half=b"call")}, {rpc.TOKEN_REFUSED})

    def test_rotation(self) -> None:
        old = b"old" * 8
        new = b"new" * 8
        token = rpc.TokenSealer([old]).seal(b"s", (), b"content")
        both = rpc.TokenSealer([new, old, KEY])
        with mock.patch.object(hmac, "compare_digest", wraps=hmac.compare_digest) as compare:
            self.assertEqual(both.open(b"s", (), token), b"content")
        self.assertEqual(compare.call_count, 3)  # always all of them
        self.refused(rpc.TokenSealer([new]), token, b"s", ())
        self.assertEqual(rpc.TokenSealer([new]).open(b"s", (), both.seal(b"s", (), b"content")), b"content")

    def test_age(self) -> None:
        now = [1_700_000_000.0]
        sealer = rpc.TokenSealer([KEY], 100.0, lambda: now[0])
        for_ever = rpc.TokenSealer([KEY], 0, lambda: now[0])
        token = sealer.seal(b"s", (), b"content")
        now[0] += 99
        self.assertEqual(sealer.open(b"s", (), token), b"content")
        now[0] += 2
        self.assertIn("expired", self.refused(sealer, token, b"s", ()))
        self.assertEqual(self.refused(sealer, token, b"other", ()), rpc.TOKEN_REFUSED)
        self.assertEqual(sealer.open(b"s", (), token, aged=False), b"content")
        self.assertEqual(for_ever.open(b"s", (), token), b"content")
        now[0] -= 10_000
        for each in (sealer, for_ever):
            self.assertIn("future", self.refused(each, token, b"s", ()))

    def test_keys(self) -> None:
        text = KEY.decode()
        good: list[tuple[Any, list[bytes]]] = [
            (f"{text}, {text}2\n,", [KEY, KEY + b"2"]),
            ([KEY + b"\r\n", KEY + b"2"], [KEY, KEY + b"2"]),
            (KEY + b"\n", [KEY]),
            (b"\xff" * 15 + b"\n", [b"\xff" * 15 + b"\n"]),  # random bytes may end so
        ]
        for given, keys in good:
            self.assertEqual(rpc.token_keys(given), keys)
        wrong: list[Any] = [[text], [KEY, 5], 5, bytearray(KEY)]
        for given in wrong:
            with self.raises(TypeError, "token_key", "sequence of bytes", "got "):
                rpc.token_keys(given)
        wrong = [[], "", " , ", "short", [KEY, b""]]
        for given in wrong:
            with self.raises(ValueError, "token_key", "at least 16 bytes"):
                rpc.token_keys(given)

    def test_parts(self) -> None:
        for parts in ([], [b""], [b"a", b"", b"x" * 70_000]):
            packed = rpc.pack_parts(parts)
            count = len(parts)
            self.assertEqual(rpc.unpack_parts(packed, count), parts)
            for data, wrong in (
                (packed, count + 1),
                (packed + b"\0", count),
                (packed[:-1], count),
                (b"", count),
            ):
                with self.raises(rpc.TokenError, "another version"):
                    rpc.unpack_parts(data, wrong)


# ============================================================================
# 12. BYTE CHANNELS
# ============================================================================


def pipe_pair() -> tuple[Any, Any]:
    """Two channels over a pair of pipes."""
    ends = [io.FileIO(fd, mode) for _ in range(2) for fd, mode in zip(os.pipe(), ("rb", "wb"))]
    return rpc.FdChannel(ends[0], ends[3]), rpc.FdChannel(ends[2], ends[1])


CHANNELS = {"socket": lambda: map(rpc.ByteChannel, socket.socketpair()), "pipe": pipe_pair}


class ChannelTests(TestCase):
    """Whatever the bytes go through, they arrive; and it is told when they do not."""

    def pairs(self) -> Iterator[tuple[str, Any, Any]]:
        """Fresh channels of each kind: one to be tested and its peer."""
        for name, make in CHANNELS.items():
            channel, far = make()
            self.addCleanup(far.close)
            self.addCleanup(channel.close)
            with self.subTest(name):
                yield name, channel, far

    def in_background(self, *steps: Callable[[], Any]) -> None:
        """Run *steps* in a thread."""
        thread = threading.Thread(target=lambda: [step() for step in steps])
        thread.start()
        self.addCleanup(thread.join)

    def test_reading(self) -> None:
        data = bytes(range(256)) * 1024  # more than is received at a time
        stream = request_bytes("add", {"a": 1.0, "b": 2.0})
        for _, channel, far in self.pairs():
            one_by_one = [functools.partial(far.write, [stream[i : i + 1]]) for i in range(len(stream))]
            self.in_background(functools.partial(far.write, [data]), *one_by_one, far.close)
            self.assertEqual(channel.read(3), data[:3])
            received, at = channel.received()
            self.assertEqual(received[at:], data[3 : 3 + len(received) - at])
            channel.at = at + 2
            self.assertEqual(bytes(channel.read_after(b"head", 10)), b"head" + data[5:15])
            self.assertEqual(bytes(channel.read_after(b"head", 100_000)), b"head" + data[15:100_015])
            self.assertEqual(channel.read(len(data) - 100_015), data[100_015:])
            self.assertEqual(rpc.IpcReader(channel).next()[0].to_pydict(), {"a": [1.0], "b": [2.0]})
            self.assertEqual((channel.read(100_000), channel.ended), (rpc.END_OF_STREAM, True))  # fewer
            self.assertEqual((channel.read(1), channel.received()), (b"", (b"", 0)))
            self.assertEqual(bytes(channel.read_after(b"h", 70_000)), b"h")

    def test_writing(self) -> None:
        large = os.urandom(1 << 20)
        for pieces in ([b"a"], [b"a", b"", b"bc"], [b"a", large, b"b"], [large, pa.py_buffer(large)], []):
            for _, channel, far in self.pairs():
                with mock.patch.object(rpc, "_MAX_IO_BYTES", 300_000):
                    self.in_background(functools.partial(channel.write, pieces), channel.close)
                    self.assertEqual(far.read(1 << 22), b"".join(pieces))

    def test_deadlines(self) -> None:
        large = [bytes(1 << 24)]
        uses = (lambda c: c.read(1), lambda c: c.read_after(b"", 1 << 17), lambda c: c.write(large))
        for name in ("poll", "no_poll"):
            with mock.patch.object(select, "poll", select.poll):
                if name == "no_poll":
                    del select.poll
                for _, channel, far in self.pairs():
                    for use in uses:
                        channel.deadline = time.monotonic() + 0.02
                        with self.raises(rpc.DeadlineExceededError, "within the time allowed"):
                            use(channel)
                    channel.deadline = time.monotonic() - 1.0
                    with self.assertRaises(rpc.DeadlineExceededError):
                        channel.received()
                    channel.deadline = time.monotonic() + 5.0
                    self.in_background(functools.partial(far.write, [b"in", b"time"]))
                    self.assertEqual(channel.read(6), b"intime")

    def test_trickling_bytes_do_not_put_off_a_deadline(self) -> None:
        clock = [100.0]
        for _, channel, far in self.pairs():
            far.write([bytes(50)])
            channel.deadline = clock[0] + 5.0
            tick = mock.Mock(side_effect=lambda: clock.__setitem__(0, clock[0] + 0.1) or clock[0])
            with mock.patch.object(rpc.time, "monotonic", tick), mock.patch.object(rpc, "_RECEIVE_BYTES", 1):
                with self.assertRaises(rpc.DeadlineExceededError):
                    channel.read(100)

    def test_the_peer_goes_away(self) -> None:
        for _, channel, far in self.pairs():
            self.assertEqual((channel.peer_gone(), channel.is_quiet()), (False, True))
            far.write([b"a"])
            self.assertFalse(channel.is_quiet())
            self.assertEqual((channel.read(1), channel.is_quiet()), (b"a", True))
            far.close()
            self.assertEqual((channel.peer_gone(), channel.is_quiet()), (True, False))
            with self.raises(TransportError, "connection lost"):
                channel.write([bytes(1 << 20), bytes(1 << 20)])
            channel.close()
            channel.close()
            self.assertEqual((channel.peer_gone(), channel.is_quiet()), (True, False))
            for use in (lambda c: c.read(1), lambda c: c.write([b"x"])):
                with self.raises(TransportError, "connection lost"):
                    use(channel)

    def test_a_connection_belongs_to_its_process(self) -> None:
        for _, channel, far in self.pairs():
            transport = rpc.Transport(channel, rpc.TransportKind.PIPE)
            transport.check_process()
            uses: Any = (transport.check_process, lambda: channel.read(1), lambda: channel.write([b"x"]))
            child = fork()
            if not child:
                said = 0
                for use in uses:
                    try:
                        use()
                    except TransportError:
                        said += 1
                    except BaseException:
                        pass
                os._exit(said)
            self.assertEqual(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), 3)
            channel.write([b"x"])
            self.assertEqual(far.read(1), b"x")

    def test_file_objects(self) -> None:
        reader, writer = (os.fdopen(fd, mode) for fd, mode in zip(os.pipe(), ("rb", "wb")))
        transport = rpc.PipeTransport(reader, writer)
        transport.channel.write([b"round"])
        self.assertEqual(transport.channel.read(5), b"round")
        transport.close()
        self.assertTrue(reader.closed and writer.closed)

    def test_connections_that_cannot_be_made(self) -> None:
        with socket.create_server(("127.0.0.1", 0)) as gone:
            port = gone.getsockname()[1]
        for connect, part in (
            (lambda: rpc.connect_tcp_socket("127.0.0.1", port), f"127.0.0.1:{port}: Connection refused"),
            (lambda: rpc.connect_unix_socket("/nowhere/at/all"), "unix:/nowhere/at/all: No such file"),
            (lambda: rpc.connect_unix_socket("/" + "d" * 200), "ddd: AF_UNIX path too long"),
        ):
            with self.subTest(part), self.raises(TransportError, part):
                connect()


class WorkerProcessTests(TestCase):
    """Programs that do not do what a worker should."""

    def call(self, command: Any, timeout: float = 15.0, **options: Any) -> None:
        """Connect and call ``add``, which fails; the connection says then that it is closed."""
        if isinstance(command, str):
            command = [sys.executable, "-S", "-c", command]
        options.setdefault("stderr", rpc.StderrMode.DEVNULL)
        transport = rpc.SubprocessTransport(command, **options)
        with rpc.RpcConnection(Service, transport, timeout=timeout) as proxy:
            try:
                proxy.add(1.0)
            finally:
                with self.assertRaises(TransportError):
                    proxy.add(1.0)
                self.assertIsNotNone(transport.proc.poll())  # it was ended and reaped

    def test_programs_that_are_no_workers(self) -> None:
        for command, parts in (
            (["/nowhere/at/all"], ("/nowhere/at/all", "No such file")),
            ([str(HERE)], (str(HERE), "Permission denied")),
            ("import sys; sys.exit(3)", ("sys.exit(3)", "exited with status 3")),
            ("import os; os.kill(os.getpid(), 9)", ("was killed by signal 9",)),
            ("print('hello there')", ("hello there", "print(")),
            ("print('hi')", ("'hi'", "got text")),
            ("import os, time; os.close(1); time.sleep(600)", ("closed its stdout but still runs",)),
        ):
            with self.subTest(parts=parts), self.raises(TransportError, *parts):
                self.call(command)
        with self.raises(TypeError, "expected a list"):
            rpc.SubprocessTransport("python worker.py")
        stubborn = "import signal as s, time; s.signal(s.SIGTERM, s.SIG_IGN); time.sleep(600)"
        with self.assertRaises(rpc.DeadlineExceededError):
            self.call(stubborn, timeout=0.1)

    def test_standard_error(self) -> None:
        source = "import sys; sys.stderr.buffer.write(b'one\\n\\xff\\nlast, without an end'); sys.exit(4)"
        lines = ["one", "\ufffd", "last, without an end"]
        text = "\n  ".join(["exited with status 4; its last lines on stderr:", *lines])
        with contextlib.redirect_stderr(io.StringIO()) as shown, self.raises(TransportError, text):
            self.call(source, stderr=rpc.StderrMode.INHERIT)
        self.assertEqual(shown.getvalue().splitlines(), lines)
        log = logging.getLogger("tests.worker")
        with self.assertLogs(log, "INFO") as caught, self.raises(TransportError, text):
            self.call(source, stderr=rpc.StderrMode.PIPE, stderr_logger=log)
        self.assertEqual([record.getMessage() for record in caught.records], lines)
        with mock.patch.object(sys, "stderr", None), self.raises(TransportError, text):
            self.call(source, stderr=rpc.StderrMode.INHERIT)

    def test_a_grandchild_holds_standard_error(self) -> None:
        source = (
            "import subprocess, sys\n"
            "subprocess.Popen([sys.executable, '-S', '-c', 'input()'], stdout=subprocess.DEVNULL)\n"
            "sys.stderr.write('last words\\n')"
        )
        command = [sys.executable, "-S", "-c", source]
        transport = rpc.SubprocessTransport(command, stderr=rpc.StderrMode.PIPE)
        transport.proc.wait()
        began = time.monotonic()
        self.assertIn("last words", transport.obituary())
        self.assertLess(time.monotonic() - began, 0.8)
        transport.close()

    def test_nothing_is_left_of_a_start_that_fails(self) -> None:
        before = sorted(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else []
        full = OSError(24, "Too many open files")
        thread = mock.patch.object(
            threading.Thread, "start", side_effect=RuntimeError("can't start new thread")
        )
        for refusal, text in (
            (mock.patch.object(os, "pipe", side_effect=full), "Too many open files"),
            (mock.patch.object(os, "pipe", side_effect=[os.pipe(), full]), "Too many open files"),
            (thread, "can't start new thread"),
        ):
            with refusal, self.raises(TransportError, text):
                self.call(WORKER, stderr=rpc.StderrMode.PIPE)
        if before:
            self.assertEqual(sorted(os.listdir("/proc/self/fd")), before)

    def test_leaving_while_a_forked_child_lives(self) -> None:
        with rpc.connect(Service, WORKER, stderr=rpc.StderrMode.DEVNULL) as proxy:
            proxy.add(1.0)
            alive, hold = os.pipe()
            child = fork()
            if not child:
                os.close(hold)
                os.read(alive, 1)
                os._exit(0)
            os.close(alive)
            began = time.monotonic()
        self.assertLess(time.monotonic() - began, rpc.WORKER_EXIT_SECONDS)  # it was not waited for
        os.close(hold)
        os.waitpid(child, 0)

    def test_a_child_forked_before_the_first_connection_ends_its_worker(self) -> None:
        program = (
            "import os, sys, vgi_rpc\n"
            "if os.fork():\n    sys.exit(os.waitstatus_to_exitcode(os.wait()[1]))\n"
            f"transport = vgi_rpc.SubprocessTransport({WORKER!r})\n"
            "transport.close()\n"
            "os._exit(transport.proc.returncode is None)"
        )
        done = subprocess.run([sys.executable, "-c", program], cwd=HERE, timeout=WATCHDOG_SECONDS)
        self.assertEqual(done.returncode, 0)


# ============================================================================
# 13. SERVER CORE
# ============================================================================


def bad_request(method: Any = "add", protocol: Any = b"Service", **changes: Any) -> bytes:
    """A request to ``add(1, 2)`` with other metadata."""
    schema = rpc.rpc_methods(Service)["add"].params_schema
    batch = pa.RecordBatch.from_arrays([pa.array([1.0]), pa.array([2.0])], schema=schema)
    return ipc_bytes(schema, (batch, request_metadata(method, protocol, **changes)))


ADD_BYTES = bad_request()
NO_SCHEMA = pa.schema([])
NO_COLUMNS = pa.RecordBatch.from_arrays([], schema=NO_SCHEMA)
COUNT_BYTES = request_bytes("count", {"limit": 2})


def rows_to_add(count: int) -> bytes:
    """A request to ``add`` with *count* rows of another schema."""
    return ipc_bytes(VALUE, (values(*[1.0] * count).batch, request_metadata("add")))


REFUSED_REQUESTS = (  # a request, the class of the refusal, a part of its text
    (bad_request(request_version=None), rpc.VersionError, "got b'none'"),
    (bad_request(request_version=b"999"), rpc.VersionError, "got b'999'"),
    (bad_request(protocol=None), rpc.ProtocolNotSpecifiedError, "this server hosts ['Service', "),
    (bad_request(protocol=b"Servic"), rpc.ProtocolNotSupportedError, "did you mean 'Service'?"),
    (bad_request(protocol=b"<b>"), rpc.ProtocolNotSupportedError, "not hold a protocol name"),
    (bad_request(None), rpc.ProtocolError, "must name its method"),
    (bad_request("ad"), rpc.MethodNotImplementedError, "no method 'ad'; did you mean 'add'?"),
    (bad_request("x" * 300), rpc.MethodNotImplementedError, "no method '…'"),
    (bad_request(b"\xff"), rpc.ProtocolError, "not UTF-8"),
    (ipc_bytes(VALUE, values(1.0).batch, values(1.0).batch), rpc.ProtocolError, "exactly one batch"),
    (ipc_bytes(VALUE), rpc.IPCError, "no batch"),
    (rows_to_add(1), rpc.ParameterError, "add(): expected (a: float64 not null"),
    (rows_to_add(5000), rpc.RequestTooLargeError, "at most 1000 rows in a batch, got 5000"),
    (rows_to_add(20_000), rpc.RequestTooLargeError, "at most 100000 bytes"),
)

# Bytes behind which nobody knows where the next request begins: they are answered, and the connection ends.
LOST = {
    "text": (b"GET / HTTP/1.1\r\n\r\n" + ADD_BYTES, "not an Arrow IPC stream"),
    "half a request": (ADD_BYTES[:-30], "half a message"),
    "half a head": (ADD_BYTES[:50], "half a message"),
    "a head of a gigabyte": (b"\xff\xff\xff\xff\x00\x00\x00\x40" + ADD_BYTES, "message head"),
    "a negative head": (b"\xff\xff\xff\xff\xff\xff\xff\xff" + ADD_BYTES, "message head"),
    "an end marker": (rpc.END_OF_STREAM + ADD_BYTES, "expected a schema message"),
}


def limited_server(**options: Any) -> RpcServer:
    """A server with small limits."""
    return make_server(max_request_bytes=100_000, max_rows=1000, **options)


class ByteServingTests(TestCase):
    """The loop of one byte stream, by its bytes."""

    def test_behind_a_refusal_a_head_that_is_too_large_ends_the_connection(self) -> None:
        text = pa.RecordBatch.from_pydict({"value": ["no number"]})
        refused = request_bytes("running", {"label": "r"}) + ipc_bytes(text.schema, text)[:-8]
        near, far = socket.socketpair()
        with near, far:
            near.sendall(refused + struct.pack("<Ii", 0xFFFFFFFF, 1 << 25) + request_bytes("nothing"))
            near.shutdown(socket.SHUT_WR)
            limited_server().serve(rpc.Transport(rpc.ByteChannel(far), rpc.TransportKind.PIPE))
            far.shutdown(socket.SHUT_WR)
            with near.makefile("rb") as file:
                (answer,) = read_streams(file.read())
        self.assertEqual(error_of(answer)["type"], "TypeError")

    def test_refused_requests_leave_the_connection_usable(self) -> None:
        with BytePeer(limited_server()) as peer:
            for request, kind, text in REFUSED_REQUESTS:
                with self.subTest(text):
                    error = error_of(peer.ask(request))
                    name = "TypeError" if kind is rpc.ParameterError else kind.__name__
                    said = [error[key] for key in ("type", "code", "kind")]
                    self.assertEqual(said, [name, kind.error_code, kind.error_kind])
                    self.assertIn(text, error["text"])
                    self.assertEqual(peer.ask(ADD_BYTES)[0][0].to_pydict(), {"result": [3.0]})
            self.assertEqual(peer.hang_up(), b"")

    def test_bytes_of_unknown_use_end_the_connection(self) -> None:
        for name, (data, text) in LOST.items():
            with self.subTest(name), BytePeer(make_server()) as peer:
                peer.send(data)
                answers = read_streams(peer.hang_up())
                self.assertEqual(len(answers), 1)  # what stands behind is not executed
                self.assertIn(text, error_of(answers[0])["text"])

    def test_a_body_that_nobody_can_hold_is_not_read_as_requests(self) -> None:
        schema, batch = ADD_BYTES.split(b"\xff\xff\xff\xff")[1:3]
        head = b"\xff\xff\xff\xff" + batch
        for size in (1 << 40, 1 << 47, (1 << 63) - 8):
            body = head.index((16).to_bytes(8, "little"))  # the body of two float64 columns
            claims = head[:body] + size.to_bytes(8, "little") + head[body + 8 : -16]
            for server in (limited_server(), make_server()):
                with self.subTest(size=size), BytePeer(server) as peer:
                    peer.send(b"\xff\xff\xff\xff" + schema + claims + ADD_BYTES * 3)
                    answers = read_streams(peer.hang_up())
                    self.assertEqual(len(answers), 1)
                    self.assertEqual(error_of(answers[0])["type"], "RequestTooLargeError")

    def test_the_input_of_a_refused_stream_is_passed_over(self) -> None:
        inputs = ipc_bytes(NO_SCHEMA, NO_COLUMNS, NO_COLUMNS, NO_COLUMNS)
        for refused in ("init_fails", "nowhere", "header_init_fails"):
            for stream in (inputs, ipc_bytes(NO_SCHEMA), ipc_bytes(VALUE, values(1.0).batch), b""):
                with self.subTest(refused), BytePeer(make_server()) as peer:
                    error_of(peer.ask(request_bytes("nothing", named=refused)))
                    self.assertEqual(peer.ask(stream + ADD_BYTES)[0][0].to_pydict(), {"result": [3.0]})

    def test_lockstep(self) -> None:
        ahead = ipc_bytes(NO_SCHEMA, *[NO_COLUMNS] * 5)  # more ticks than there are turns
        ended = ipc_bytes(NO_SCHEMA, NO_COLUMNS)  # by the client
        with BytePeer(make_server()) as peer:
            for inputs, expected in ((ahead, [[0], [1]]), (ended, [[0]]), (ipc_bytes(NO_SCHEMA), [])):
                answers = peer.ask(COUNT_BYTES + inputs)
                data = [batch["value"].to_pylist() for batch, _ in answers if batch.num_rows]
                self.assertEqual(data, expected)
            self.assertEqual((len(peer.ask(ADD_BYTES)), peer.hang_up()), (1, b""))

    def test_inputs_that_are_damaged(self) -> None:
        running = request_bytes("running", {"label": "x"})
        coded = pa.RecordBatch.from_pydict({"value": pa.array(["a"]).dictionary_encode()})
        with BytePeer(make_server()) as peer:
            error = error_of(peer.ask(running + ipc_bytes(coded.schema, coded)))
            self.assertIn(error["type"], ("IPCError", "TypeError"))
            self.assertEqual(len(peer.ask(ADD_BYTES)), 1)
        for inputs in (ipc_bytes(VALUE, values(1.0).batch)[:-40], b"no stream at all" + ADD_BYTES):
            with BytePeer(make_server()) as peer:
                peer.send(running + inputs)
                (answer,) = read_streams(peer.hang_up())
                self.assertEqual(error_of(answer)["type"], "IPCError")

    def test_what_cannot_be_written_is_an_error(self) -> None:
        many = {b"%d" % i: b"" for i in range(1000)}
        with byte_proxy() as proxy:
            with mock.patch.object(rpc.Call, "logs", lambda call, wire: [(wire.empty, many)]):
                for use in (
                    lambda: proxy.logs(2),
                    lambda: list(proxy.count(3)),
                    lambda: proxy.count_with_header(3),
                ):
                    with self.raises(RpcError, "metadata: expected at most 512 entries"):
                        use()
            self.assertEqual(proxy.add(1.0), 3.0)

    def test_transport_options(self) -> None:
        asked = {b"vgi_rpc.transport.shm": b"true", **request_metadata("__transport_options__", None)}
        server = make_server()
        with BytePeer(server) as peer:
            ((batch, told),) = peer.ask(ipc_bytes(NO_SCHEMA, (NO_COLUMNS, asked)))
        self.assertEqual((batch.num_rows, told[b"vgi_rpc.transport.shm"]), (0, b"false"))
        self.assertEqual(told[b"vgi_rpc.server_id"], server.server_id.encode())

    def test_versions_of_a_protocol(self) -> None:
        class Versioned:
            protocol_version = "2.3.4"

            def one(self) -> int:
                return 1

        def asked(version: bytes | None) -> bytes:
            metadata = request_metadata("one", b"Versioned", protocol_version=version)
            return ipc_bytes(NO_SCHEMA, (NO_COLUMNS, metadata))

        with BytePeer(RpcServer(Versioned, Versioned())) as peer:
            self.assertEqual(peer.ask(asked(b"2.3.9"))[0][0].to_pydict(), {"result": [1]})
            for version, part in (
                (None, "the client sent no version; upgrade the client"),
                (b"2.3", "'2.3', which is not MAJOR.MINOR.PATCH"),
                (b"2.2.4", "speaks 2.3.4, the client sent 2.2.4; upgrade the client"),
                (b"3.0.0", "3.0.0; upgrade the server"),
            ):
                error = error_of(peer.ask(asked(version)))
                said = (error["code"], error["kind"])
                self.assertEqual(said, ("FAILED_PRECONDITION", "protocol_version_mismatch"))
                self.assertIn(part, error["text"])

    def test_a_start_that_fails_is_tried_again(self) -> None:
        class Slow(ServiceImpl):
            on_serve_start = mock.Mock(side_effect=[LookupError("a"), LookupError("b"), None])

        with BytePeer(RpcServer(Service, Slow())) as peer:
            for reason in "ab":
                error = error_of(peer.ask(ADD_BYTES))
                self.assertEqual((error["type"], error["code"]), ("StatusError", "UNAVAILABLE"))
                self.assertIn(f"Service could not start: {reason}", error["text"])
            self.assertEqual([len(peer.ask(ADD_BYTES)) for _ in range(2)], [1, 1])
        self.assertEqual(Slow.on_serve_start.mock_calls, [mock.call(rpc.TransportKind.PIPE)] * 3)

    def test_a_client_that_stalls_in_its_request_holds_up_no_drain(self) -> None:
        server = make_server()
        with BytePeer(server) as peer:
            peer.send(ADD_BYTES[:-20])
            self.assertTrue(server.drain(WATCHDOG_SECONDS))

    def test_draining(self) -> None:
        server = make_server()
        with BytePeer(server) as peer:
            self.assertEqual(len(peer.ask(ADD_BYTES)), 1)
            self.assertTrue(server.drain(WATCHDOG_SECONDS))
            for _ in range(2):
                error = error_of(peer.ask(ADD_BYTES))
                self.assertEqual((error["code"], error["kind"]), ("UNAVAILABLE", "server_draining"))
                self.assertIn("RetryInfo", str(error["extra"]["error_details"]))
        busy = make_server()
        with busy:
            self.assertFalse(busy.drain(0.01))
        self.assertTrue(busy.drain(0.0))


class Recorder:
    """A hook that keeps what it hears."""

    def __init__(self) -> None:
        self.records: list[tuple[Any, Any]] = []

    def on_dispatch_start(self, record: Any) -> str:
        return record.method

    def on_dispatch_end(self, token: Any, record: Any, error: Any) -> None:
        assert token == record.method
        self.records.append((record, error))


class ServerCallTests(TestCase):
    """Calls without a transport."""

    def call(self, method: str, server: RpcServer | None = None, caller: Any = None, **options: Any) -> Any:
        """A call of the tests' service."""
        server = server or make_server()
        if "timeout" in options:
            options["metadata"] = {b"vgi_rpc.timeout_ms": b"%d" % (1000 * options.pop("timeout"))}
        options.setdefault("metadata", {})
        return rpc.Call(server, server.primary.methods[method], caller or rpc.CallRecord(), "id", **options)

    def test_the_time_of_each_turn_begins_anew(self) -> None:
        clock = [1000.0]
        with mock.patch.object(rpc.time, "monotonic", lambda: clock[0]):
            call = self.call("plain", timeout=5.0)
            call.begin(lambda info: {"limit": 9, "rows": [1], "pause": 0.0})
            for timeout in (None, 2.0, None, 7.0):
                clock[0] += 100.0
                turn = call.turn(rpc.TICK, timeout and {b"vgi_rpc.timeout_ms": b"%d" % (1000 * timeout)})
                self.assertIsNone(turn.error)
                self.assertEqual(call.deadline, clock[0] + (timeout or 5.0))
                self.assertEqual(call.context.deadline, call.deadline)
            call.stream.state.process = lambda *_: clock.__setitem__(0, clock[0] + 2.5)
            turn = call.turn(rpc.TICK, {b"vgi_rpc.timeout_ms": b"2000"})
            self.assertIsInstance(turn.error, rpc.DeadlineExceededError)
            self.assertTrue(turn.finished)

    def test_statuses(self) -> None:
        call = self.call("add")
        for exc, refused, status in (
            (rpc.ParameterError("x"), True, 400),
            (rpc.ParameterError("x"), False, 200),
            (rpc.MethodNotImplementedError("x"), True, 404),
            (rpc.StatusError("x", code="NOT_FOUND"), True, 200),
        ):
            self.assertEqual(call.failed(exc, refused=refused).http_status, status)
        self.assertIn(
            "add(): the answer exceeds max_response_bytes (7 > 6)", str(rpc.too_large(call, 7, 6).error)
        )

    def test_cancel(self) -> None:
        calls = []

        class Cancelled(Running):
            def on_cancel(self, ctx: CallContext) -> None:
                calls.append(ctx.deadline)
                ctx.client_log(Level.INFO, "so long")
                raise SystemExit(1)

        call = self.call("running", timeout=9.0)
        call.begin(lambda info: {"label": "x"})
        call.stream.state = Cancelled("x")
        turns = [call.cancel() for _ in range(3)]
        self.assertEqual(len(calls), 1)
        self.assertEqual([len(turn.items) for turn in turns], [1, 0, 0])
        self.assertTrue(all(turn.finished and turn.error is None for turn in turns))
        self.assertIn(b"so long", dict(turns[0].items[0][1]).values())
        self.assertEqual(self.call("add").cancel().items, [])

    def test_who_calls_is_known_to_the_method(self) -> None:
        auth = AuthContext("static", True, "ann")
        metadata = {b"traceparent": b"00-ab", b"tracestate": b"\xff", b"other": b"x"}
        caller = rpc.CallRecord(rpc.TransportKind.TCP, auth, "1.2.3.4:5", {"more": 1}, lambda: True, 99)
        call = self.call("context", caller=caller, metadata=metadata)
        call.begin(lambda info: {})
        context = call.context
        expected = {"more": 1, "traceparent": "00-ab", "tracestate": "\ufffd", "remote_addr": "1.2.3.4:5"}
        self.assertEqual(context.transport_metadata, expected)
        self.assertEqual((context.auth, context.response_limit_bytes, context.cancelled), (auth, 99, True))
        self.assertIs(rpc.current_auth(), AuthContext.anonymous())

    def test_hooks(self) -> None:
        server = make_server()
        broken = mock.Mock(on_dispatch_start=raising(SystemExit(1)), on_dispatch_end=raising(SystemExit(1)))
        recorder = Recorder()
        server.add_hook(broken)
        server.add_hook(recorder)
        inputs = ipc_bytes(NO_SCHEMA, NO_COLUMNS, NO_COLUMNS, (NO_COLUMNS, {b"vgi_rpc.cancel": b"1"}))
        with BytePeer(server) as peer:
            for request in (ADD_BYTES, bad_request("fail"), COUNT_BYTES + inputs):  # the second is refused
                peer.ask(request)
        (add, none), (fail, refusal), (count, _) = recorder.records
        seen = (add.method, add.method_type, add.request_rows, add.stream_id, add.request_schema.names, none)
        self.assertEqual(seen, ("add", "unary", 1, "", ["a", "b"], None))
        self.assertEqual(add.statistics, rpc.CallStatistics(1, 1, 1, 1, 0, 8))
        self.assertEqual((fail.method, type(refusal).__name__), ("fail", "ParameterError"))
        self.assertEqual((count.method_type, count.cancelled, len(count.stream_id)), ("stream", True, 32))
        counts = count.statistics
        self.assertEqual((counts.input_batches, counts.output_batches, counts.output_rows), (3, 2, 2))

    def test_the_access_log(self) -> None:
        folder = tempfile.mkdtemp()
        self.addCleanup(shutil.rmtree, folder)
        server = limited_server()
        rpc.configure_access_log(os.path.join(folder, "log"), server)
        self.addCleanup(server.access_log.close)
        asked = (
            (ADD_BYTES, "add", ""),
            (request_bytes("echo_str", {"value": "a secret value"}), "echo_str", ""),
            (bad_request("nowhere"), "nowhere", "MethodNotImplementedError"),
            (bad_request("fail"), "fail", "TypeError"),
            (REFUSED_REQUESTS[-1][0], "", "RequestTooLargeError"),
            (request_bytes("fail", {"how": "KeyError"}), "fail", "KeyError"),
            (COUNT_BYTES + ipc_bytes(NO_SCHEMA, NO_COLUMNS), "count", ""),
            (b"a secret that is no Arrow", "", "IPCError"),
        )
        with BytePeer(server) as peer:
            for request, *_ in asked:
                peer.ask(request)
        text = pathlib.Path(folder, "log").read_text()
        self.assertNotIn("secret", text)
        lines = [json.loads(line) for line in text.splitlines()]
        seen = [(line["method"], line["error_type"]) for line in lines]
        self.assertEqual(seen, [tuple(expected) for _, *expected in asked])
        self.assertTrue(all((line["status"] == "ok") == (not line["error_type"]) for line in lines))
        first = lines[0]
        self.assertRegex(first["timestamp"], r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z$")
        names = ("level", "logger", "protocol", "output_rows", "authenticated", "principal")
        told = ["INFO", "vgi_rpc.access", "Service", 1, False, ""]
        self.assertEqual([first[name] for name in names], told)
        self.assertEqual(first["request_fields"], [{"name": n, "type": "double"} for n in ("a", "b")])
        self.assertEqual((lines[5]["error_code"], lines[5]["error_message"]), ("UNKNOWN", "'y'"))
        self.assertEqual(len(lines[6]["stream_id"]), 32)

    def test_an_access_log_that_cannot_be_written(self) -> None:
        surrogate = AuthContext("d", True, "p\ud800")
        stream = io.StringIO()
        for target in (stream, None, mock.Mock(write=raising(OSError("full")))):
            server = make_server()
            server.access_log = target
            call = self.call("fail", server, rpc.CallRecord(auth=surrogate))
            call.begin(lambda info: {"how": "BrokenText"})
            call.end()
        line = json.loads(stream.getvalue())
        self.assertEqual((line["principal"], line["error_type"]), ("p\ud800", "BrokenText"))
        with self.assertRaises(OSError):
            rpc.configure_access_log("/nowhere/at/all", make_server())

    def test_protocols_that_cannot_be_hosted(self) -> None:
        class Other:
            def one(self) -> int:
                return 1

        wrong = {"vgi_rpc.Mine": "is reserved", "Service": "given twice", "no name": "no name"}
        for name, part in wrong.items():
            cls = type("Named", (Other,), {"protocol_name": name})
            with self.subTest(name), self.raises(ValueError, part):
                make_server(extra_protocols=[(cls, cls())])
        server = make_server(extra_protocols=[(Other, Other())], server_id="abc", enable_describe=False)
        self.assertEqual((list(server.services), server.server_id), (["Service", "Other"], "abc"))


# ============================================================================
# 14. CLIENT
# ============================================================================


@contextlib.contextmanager
def byte_proxy(server: RpcServer | None = None, **options: Any) -> Iterator[Any]:
    """A proxy of `Service` on a byte stream of its own, whose server runs in a thread."""
    near, far = rpc.make_pipe_pair()
    thread = threading.Thread(target=serve_and_close, args=(server or make_server(), far), daemon=True)
    thread.start()
    with rpc.RpcConnection(Service, near, **options) as proxy:
        yield proxy
    thread.join(WATCHDOG_SECONDS)
    assert not thread.is_alive()


def error_bytes(message: str, request_id: bytes) -> bytes:
    """An answer that is an error."""
    empty = pa.RecordBatch.from_arrays([], schema=pa.schema([]))
    metadata = {b"vgi_rpc.log_level": b"EXCEPTION", b"vgi_rpc.log_message": message.encode()}
    return ipc_bytes(empty.schema, (empty, {**metadata, b"vgi_rpc.request_id": request_id}))


RESULT = pa.schema([pa.field("result", pa.float64(), nullable=False)])
ONE_RESULT = pa.RecordBatch.from_arrays([pa.array([3.0])], schema=RESULT)
THREE = ipc_bytes(RESULT, ONE_RESULT)


class Interrupt(BaseException):
    """What the tests inject."""


def steps_of(work: Callable[[], Any], at: int = -1) -> list[tuple[Any, int]]:
    """Run *work*, with an interrupt before its *at*-th step within the module; return the steps as (code, place).

    A step is a line; where the lock is taken and given back, an instruction.
    """
    steps: list[tuple[Any, int]] = []

    def trace(frame: Any, event: str, argument: Any) -> Any:
        if frame.f_code.co_filename != rpc.__file__:
            return None
        frame.f_trace_opcodes = frame.f_code.co_name in ("own", "_leave")
        if event in ("line", "opcode"):
            if len(steps) == at:
                raise Interrupt
            steps.append((frame.f_code, frame.f_lasti))
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        work()
    finally:
        sys.settrace(before)
    return steps


class InterruptTests(TestCase):
    """An interrupt before any step of the client leaves a connection that answers rightly, or says that it is closed."""

    def outcome(self, proxy: Any, number: float) -> str:
        try:
            self.assertEqual(rpc.with_options(proxy, timeout=10.0).add(number, 1.0), number + 1.0)
        except TransportError as exc:
            self.assertIn("the connection is closed: a call was interrupted", str(exc))
            return "closed"
        return "right"

    def check(self, work: Callable[[Any], Any]) -> None:
        """Interrupt *work* the first time that it comes to each of its steps; then this thread and another one call."""
        server = make_server()
        with contextlib.ExitStack() as stack:
            proxy = stack.enter_context(byte_proxy(server))
            work(proxy)
            steps = steps_of(lambda: work(proxy))
            outcomes = set()
            for at in sorted({step: at for at, step in reversed(list(enumerate(steps)))}.values()):
                with contextlib.suppress(Interrupt):
                    steps_of(lambda: work(proxy), at)
                seen = [self.outcome(proxy, float(at))]
                other = threading.Thread(target=lambda: seen.append(self.outcome(proxy, 0.5)))
                other.start()
                other.join(WATCHDOG_SECONDS / 2)
                self.assertEqual(seen, [seen[0]] * 2, f"after an interrupt at {steps[at]}")
                outcomes.add(seen[0])
                if seen[0] == "closed":
                    stack.close()
                    proxy = stack.enter_context(byte_proxy(server))
        self.assertEqual(outcomes, {"right", "closed"})

    def test_a_call_that_fails(self) -> None:
        def work(proxy: Any) -> None:
            proxy.add(1.0)
            with contextlib.suppress(RpcError):
                proxy.refuse()

        self.check(work)

    def test_streams(self) -> None:
        def work(proxy: Any) -> None:
            with proxy.running() as session:
                session.exchange(values(1.0))
            next(iter(proxy.count_with_header(9)))
            proxy.count(5).cancel()

        self.check(work)


class BadPeerTests(TestCase):
    """A client on a byte stream whose far end does not keep to the wire."""

    def client(self, answer: bytes) -> Any:
        """A connection that finds *answer*, whatever it asks, and then the end."""
        near, far = socket.socketpair()
        self.addCleanup(far.close)
        far.sendall(answer)
        far.shutdown(socket.SHUT_WR)
        return rpc.RpcConnection(Service, rpc.Transport(rpc.ByteChannel(near), rpc.TransportKind.PIPE))

    def test_answers_that_are_none(self) -> None:
        nothing = ONE_RESULT.slice(0, 0)
        for answer, part in (
            (b"", "closed by the other side"),
            (b"Segmentation fault\n", "got text: 'Segmentation fault'"),
            (b"hi\n", "got text: 'hi'"),
            ("schöner Tag".encode(), "got text: 'schöner Tag'"),
            (THREE[:-20], "closed by the other side"),
            (b"\0" * 100, "not an Arrow IPC stream"),
            (ipc_bytes(RESULT), "expected a result"),
            (ipc_bytes(RESULT, (nothing, {b"vgi_rpc.location": b"x"})), "external storage"),
            (ipc_bytes(RESULT, (nothing, {b"vgi_rpc.shm_offset": b"1"})), "shared memory"),
        ):
            with self.subTest(part), self.client(answer) as proxy:
                for text in (part, "the connection is closed: "):
                    with self.raises(TransportError, text):
                        proxy.add(1.0)
        wrong = pa.RecordBatch.from_arrays([pa.array(["x"])], ["result"])
        with self.client(ipc_bytes(wrong.schema, wrong) + THREE) as proxy:
            with self.raises(TypeError, "add() result"):
                proxy.add(1.0)
            self.assertEqual(proxy.add(1.0), 3.0)

    @contextlib.contextmanager
    def against(self, serve: Callable[[Any], Any], **options: Any) -> Iterator[Any]:
        """A proxy whose far end is a thread that runs *serve* on a socket."""
        near, far = socket.socketpair()

        def run() -> None:
            with far, contextlib.suppress(OSError):
                serve(far)

        thread = threading.Thread(target=run)
        thread.start()
        transport = rpc.Transport(rpc.ByteChannel(near), rpc.TransportKind.PIPE)
        with rpc.RpcConnection(Service, transport, **options) as proxy:
            yield proxy
        thread.join(WATCHDOG_SECONDS)

    def test_a_server_that_takes_a_refused_streams_input_for_a_request(self) -> None:
        def serve(far: socket.socket) -> None:
            with far.makefile("rb") as source:
                asked = read_stream(source)[0][1]
                far.sendall(error_bytes("no such method", asked[b"vgi_rpc.request_id"]))
                read_stream(source)  # the input, which has no method
                far.sendall(error_bytes("a request without a method", b"0123456789abcdef"))
                read_stream(source)
                far.sendall(THREE)

        for use in (lambda proxy: proxy.count(3).tick(), lambda proxy: proxy.count_with_header(3)):
            with self.against(serve) as proxy:
                with self.raises(RpcError, "no such method"):
                    use(proxy)
                self.assertEqual(proxy.add(1.0), 3.0)

    def test_log_lines_without_end_meet_the_deadline(self) -> None:
        line = (ONE_RESULT.slice(0, 0), {b"vgi_rpc.log_level": b"INFO", b"vgi_rpc.log_message": b"x"})
        many = ipc_bytes(RESULT, *[line] * 100)[:-8]

        def flood(far: socket.socket) -> None:
            far.sendall(many)
            while True:
                far.sendall(many[many.index(b"\xff\xff\xff\xff", 8) :])

        with self.against(flood, timeout=0.3) as proxy, self.assertRaises(rpc.DeadlineExceededError):
            proxy.add(1.0)


class ByteClientTests(TestCase):
    """Whose turn it is on one byte stream, and how far ahead it asks."""

    def test_a_call_within_a_call(self) -> None:
        errors: list[str] = []

        def call_back(message: Any) -> None:
            with self.assertRaises(RpcError) as caught:
                proxy.add(1.0)
            errors.append(caught.exception.error_message)

        with byte_proxy(on_log=call_back) as proxy:
            self.assertEqual(proxy.logs(2), 2)
        said = "a call is running on this connection: on_log cannot make another one on it"
        self.assertEqual(errors, [said] * 2)

    def test_a_call_ends_the_stream_that_was_open(self) -> None:
        with byte_proxy() as proxy:
            session = proxy.count(20)
            self.assertEqual(numbers(b for _, b in zip(range(4), session)), [[0], [1], [2], [3]])
            exchange = proxy.running()
            for use in (session.tick, lambda: list(session), session.to_table):
                with self.raises(RpcError, "was ended by another call"):
                    use()
            self.assertEqual(numbers([exchange.exchange(values(2.0))]), [["r"]])

    def test_who_waits_too_long_for_another_thread(self) -> None:
        with byte_proxy() as proxy:
            slow = threading.Thread(target=lambda: proxy.wait(0.4))
            slow.start()
            while proxy._channel.phase is not rpc.ConnectionPhase.CALLING:
                time.sleep(0.001)
            with self.raises(rpc.DeadlineExceededError, "other threads"):
                rpc.with_options(proxy, timeout=0.05).add(1.0)
            self.assertEqual(proxy.add(1.0), 3.0)
            slow.join()

    def test_closing_while_a_call_runs(self) -> None:
        near, far = rpc.make_pipe_pair()
        connection = rpc.RpcConnection(Service, near)
        errors: list[Any] = []

        def call() -> None:
            with self.assertRaises(TransportError) as caught:
                connection.add(1.0)
            errors.append(str(caught.exception))

        caller = threading.Thread(target=call)
        caller.start()
        with contextlib.closing(far):
            far.channel.received()  # the request
            connection.close()
            caller.join(WATCHDOG_SECONDS)
        self.assertEqual(errors, ["the connection is closed: it was closed here"])

    def test_ticks_ahead(self) -> None:
        for timeout, prefetch, most in ((None, None, 150), (20.0, None, 150), (None, 3, 400), (None, 1, 510)):
            with self.subTest((timeout, prefetch)), byte_proxy(timeout=timeout) as proxy:
                channel = proxy._channel.transport.channel
                with mock.patch.object(channel, "_send", side_effect=channel._send) as send:
                    session = rpc.with_options(proxy, prefetch=prefetch).plain(500)
                    self.assertEqual(numbers(session), [[i] for i in range(500)])
                self.assertTrue(most * 0.6 < send.call_count < most or prefetch is None)
                self.assertLess(max(len(call.args[0]) for call in send.call_args_list), 16_384)  # of any pipe
        with byte_proxy(timeout=20.0) as proxy, proxy.ticks() as session:
            seen = [next(iter(session)), session.tick({b"a": b"b"}), session.tick()]
            self.assertEqual(numbers(seen), [["{}"], ['{"a": "b"}'], ["{}"]])
            session.schema  # a producer that is slow is not asked ahead
            slow = proxy.plain(1000, [1], 0.03)
            self.assertEqual(len(list(zip(range(5), slow))), 5)
            self.assertLessEqual(slow._in_flight, 2)


class SessionTests(TestCase):
    """What a session makes of its inputs and outputs; what users see on each transport stands in the contract."""

    def test_inputs(self) -> None:
        chunks = pa.concat_tables([pa.table({"value": [4]}), pa.table({"value": [5, 6]})])
        with byte_proxy() as proxy, proxy.running() as session:
            session.exchange({"value": [1]})
            session.exchange(pa.table({"value": pa.array([3], pa.int8())}))
            for wrong in ({"value": [2.5]}, {"other": [1]}, pa.table({"value": ["x"]})):
                with self.raises(TypeError, "running() exchange", "expected"):
                    session.exchange(wrong)
            self.assertEqual(session.exchange(chunks).batch.column("sum").to_pylist(), [19.0])
            table = pa.table({"value": [1.0, 2.0]})
            for given, sums in (
                (table, [3.0]),
                ([{"value": [1.0, 2.0]}], [3.0]),
                (iter(table.to_batches()), [3.0]),
                ([], []),
                (table.slice(0, 0), []),
            ):
                with proxy.running() as other:
                    with self.raises(RpcError, "comes with the first answer"):
                        other.schema
                    self.assertEqual(other.exchange_all(given).read_all()["sum"].to_pylist(), sums)

    def test_asking_for_the_schema_loses_nothing(self) -> None:
        with byte_proxy() as proxy:
            for limit in (0, 1, 20):
                with proxy.plain(limit) as session:
                    self.assertEqual((session.schema, session.schema), (INTEGERS, INTEGERS))
                    self.assertEqual(numbers(session), [[i] for i in range(limit)])
            with proxy.ticks() as session:
                self.assertEqual(session.schema, TEXT)
                seen = [session.tick({b"a": b"b"}), session.tick()]
                self.assertEqual(numbers(seen), [["{}"], ['{"a": "b"}']])

    def test_what_only_http_has_and_what_does_not_mix(self) -> None:
        with byte_proxy() as proxy, proxy.count(9) as session:
            answer, token = session.next_with_token()
            self.assertEqual((numbers([answer]), token), ([[0]], None))
            for use in (
                session.token,
                lambda: session.seek_to_token(b""),
                lambda: rpc.resume(proxy, "count", b""),
            ):
                with self.raises(RpcError, "only streams over HTTP can be resumed"):
                    use()
            ahead = iter(session)
            self.assertEqual(numbers([next(ahead), next(ahead)]), [[1], [2]])
            with self.raises(RpcError, "exchange() on a stream that was asked for batches ahead"):
                session.exchange({"value": [1]})
            self.assertEqual(numbers(ahead), [[i] for i in range(3, 9)])


class ConnectionTests(TestCase):
    """`RpcConnection` and the proxy that it gives."""

    def test_copies(self) -> None:
        with rpc.serve_pipe(Service, ServiceImpl()) as proxy:
            for use in (copy.copy, copy.deepcopy, pickle.dumps):
                with self.raises(TypeError, "cannot be copied or pickled"):
                    use(proxy)
        with self.raises(TransportError, "it was closed here"):
            proxy.add(1.0)

    def test_a_protocol_with_mistakes_closes_the_transport(self) -> None:
        class Wrong(Protocol):
            def method(self, value): ...

        near, far = rpc.make_pipe_pair()
        with self.raises(TypeError, "method"):
            rpc.RpcConnection(Wrong, near)
        self.assertLess(near.channel.source.fileno(), 0)
        far.close()

    def test_what_a_notebook_shows(self) -> None:
        with rpc.serve_pipe(Service, ServiceImpl()) as proxy:
            proxy.add(1.0)
            self.assertLessEqual({"add", "plain", "close"}, set(dir(proxy)))
            self.assertEqual(len(dir(proxy)), len(set(dir(proxy))))
            self.assertEqual(repr(proxy), "<proxy of Service over ByteClient>")

    def test_closed_while_it_is_dialled(self) -> None:
        near, far = rpc.make_pipe_pair()
        self.addCleanup(far.close)

        def dial() -> Any:
            connection.close()  # as another thread may
            return near

        connection: Any = rpc.RpcConnection(Service, dial)
        with self.raises(TransportError, "it was closed here"):
            connection.nothing()
        self.assertLess(near.channel.source.fileno(), 0)

    def test_pipes_that_do_not_block(self) -> None:
        (a, b), (c, d) = os.pipe(), os.pipe()
        near, far = (rpc.PipeTransport(open(r, "rb", 0), open(w, "wb", 0)) for r, w in ((c, b), (a, d)))
        for end in (a, d):
            os.set_blocking(end, False)
        server = make_server()
        thread = threading.Thread(target=server.serve_one, args=[far])
        thread.start()
        with contextlib.closing(far), rpc.RpcConnection(Service, near) as proxy:
            self.assertEqual(proxy.echo_str("x" * 1_000_000), "x" * 1_000_000)
            thread.join()  # which has served one request

    def test_threads_that_use_a_pool_first_at_once(self) -> None:
        for _ in range(100):
            pool = rpc.WorkerPool()
            gate = threading.Barrier(4)
            found: list[int] = []
            asking = [
                threading.Thread(target=lambda p=pool, g=gate: (g.wait(), found.append(p.idle_count)))
                for _ in range(4)
            ]
            for thread in asking:
                thread.start()
            for thread in asking:
                thread.join()
            self.assertEqual(found, [0] * 4)

    def test_methods_of_any_name(self) -> None:
        class Names:
            def close(self, a: int) -> int:
                """Close nothing."""
                return a

            def token(self, *, a: int, b: int = 1) -> int:
                return a + b

        with rpc.serve_pipe(Names, Names()) as proxy:
            self.assertEqual((proxy.close(1), proxy.token(a=1)), (1, 2))
            self.assertEqual(rpc.with_options(proxy, timeout=9.0).close(3), 3)
            self.assertIn("*, a", str(inspect.signature(proxy.token)))
            self.assertEqual((proxy.close.__name__, inspect.getdoc(proxy.close)), ("close", "Close nothing."))
            with self.raises(AttributeError, "no method 'tokens'", "did you mean 'token'"):
                proxy.tokens
        for use in (rpc.with_options, rpc.list_protocols, lambda thing: rpc.resume(thing, "a", b"")):
            with self.raises(TypeError, "expected a proxy", "got int"):
                use(3)


POOLED = f"""
import os, signal, sys, threading
sys.path.insert(0, {str(HERE)!r})
import pyarrow as pa
import vgi_rpc

class Left(vgi_rpc.ProducerState):
    def produce(self, out: vgi_rpc.OutputCollector, ctx: vgi_rpc.CallContext) -> None:
        out.emit_pydict(dict(value=[1]))

class Pooled:
    def process_id(self) -> int:
        return os.getpid()
    def stream(self) -> vgi_rpc.Stream[Left]:
        return vgi_rpc.Stream(pa.schema([("value", pa.int64())]), Left())
    def fail(self) -> int:
        raise LookupError("on purpose")
    def leave(self, seconds: float) -> int:
        threading.Event().wait(seconds)
        os._exit(3)
    def print_at_signal(self, path: str) -> int:
        def write(*_):
            os.write(channel, b"late")
            open(path, "w").close()
        signal.signal(signal.SIGUSR1, write)
        return os.getpid()
"""
POOLED_WORKER = [sys.executable, "-c", f"{POOLED}\nchannel = os.dup(1)\nvgi_rpc.run_server(Pooled, Pooled())"]
POOLED_NAMES: dict[str, Any] = {"__name__": "pooled"}
exec(POOLED, POOLED_NAMES)
Pooled: Any = POOLED_NAMES["Pooled"]  # the worker imports no tests, which take longer to load than it lives


@unittest.skipUnless(hasattr(os, "fork"), "counts of descriptors and forked children")
class PoolTests(TestCase):
    """Workers that are used again, and those that must not be."""

    def pool(self, **options: Any) -> rpc.WorkerPool:
        """A pool that is closed at the end of the test."""
        pool = rpc.WorkerPool(stderr=rpc.StderrMode.DEVNULL, **options)
        self.addCleanup(pool.close)
        return pool

    @staticmethod
    def until(condition: Callable[[], Any]) -> None:
        """Wait for something that another thread or process does; the watchdog ends what never comes."""
        while not condition():
            threading.Event().wait(0.01)

    def held(self) -> int:
        """How many descriptors there are, once no pool has a thread any more."""
        self.until(lambda: all(thread.name != "vgi_rpc pool" for thread in threading.enumerate()))
        return len(os.listdir("/dev/fd"))

    def test_reuse(self) -> None:
        found = []
        with rpc.WorkerPool() as pool:
            other = [sys.executable, "-u", *POOLED_WORKER[1:]]
            for command in (POOLED_WORKER, POOLED_WORKER, other, POOLED_WORKER):
                with pool.connect(Pooled, command) as proxy:
                    found.append(proxy.process_id())
                    self.assertEqual((pool.active_count, pool.metrics.active), (1, 1))
            self.assertEqual((found[0], found[0], found[0] == found[2]), (found[1], found[3], False))
            expected = rpc.PoolMetrics(borrows=4, spawns=2, reuses=2, returns=4, idle=2)
            self.assertEqual((pool.metrics, pool.idle_count, pool.active_count), (expected, 2, 0))
        self.assertEqual((pool.idle_count, pool.metrics.discards), (0, 2))
        with self.raises(TransportError, "closed"), pool.connect(Pooled, POOLED_WORKER):
            pass
        pool.close()

    def test_what_is_left_is_ended_or_refused(self) -> None:
        pool = self.pool()
        with pool.connect(Pooled, POOLED_WORKER) as left:
            session = left.stream()
            self.assertEqual(next(iter(session)).batch.to_pydict(), {"value": [1]})
        with self.assertRaises(KeyError), pool.connect(Pooled, POOLED_WORKER) as proxy:
            for use, kind, text in (
                (left.process_id, TransportError, "closed"),
                (session.tick, RpcError, "closed"),
                (proxy.fail, RpcError, "on purpose"),
            ):
                with self.raises(kind, text):
                    use()
            raise KeyError("of the one who calls")
        self.assertEqual(pool.metrics, rpc.PoolMetrics(borrows=2, spawns=1, reuses=1, returns=2, idle=1))

    def test_what_is_not_used_again(self) -> None:
        pool = self.pool()
        with pool.connect(Pooled, POOLED_WORKER) as proxy, self.assertRaises(TransportError):
            proxy.leave(0.0)
        with pool.connect(Pooled, POOLED_WORKER) as proxy, self.assertRaises(rpc.DeadlineExceededError):
            rpc.with_options(proxy, timeout=0.1).leave(30.0)
        with tempfile.TemporaryDirectory() as folder:
            printed = os.path.join(folder, "printed")
            with pool.connect(Pooled, POOLED_WORKER) as proxy:
                prints = proxy.print_at_signal(printed)
            os.kill(prints, signal.SIGUSR1)
            self.until(lambda: os.path.exists(printed))
        with pool.connect(Pooled, POOLED_WORKER) as proxy:
            killed = proxy.process_id()
        self.assertEqual(pool.metrics, rpc.PoolMetrics(borrows=4, spawns=4, returns=2, discards=3, idle=1))
        os.kill(killed, signal.SIGKILL)
        self.until(lambda: not pool.idle_count)  # it was reaped
        with self.assertRaises(ProcessLookupError):  # a zombie would still be there
            os.kill(killed, 0)
        self.assertEqual((pool.metrics.discards, pool.metrics.evictions_idle), (4, 0))

    def test_what_cannot_be_borrowed(self) -> None:
        pool = self.pool()
        for protocol, command, kind, part in (
            (Pooled, ["/no/such"], TransportError, "no/such"),
            (Pooled, "one string", TypeError, ""),
            (Pooled(), POOLED_WORKER, TypeError, "Pooled"),
        ):
            with self.raises(kind, part), pool.connect(protocol, command):
                pass
        self.assertEqual((pool.metrics.borrows, pool.metrics.active), (3, 0))
        for options in ({"max_idle": -1}, {"idle_timeout": 0.0}, {"idle_timeout": float("inf")}):
            with self.subTest(options=options), self.raises(ValueError, *options):
                rpc.WorkerPool(**options)

    def test_eviction_leaves_nothing(self) -> None:
        with rpc.WorkerPool() as pool, pool.connect(Pooled, POOLED_WORKER):
            pass  # what the first worker of a process leaves is not counted
        before = self.held()
        for options, expected in (
            ({"max_idle": 0}, (0, 2, 0)),
            ({"max_idle": 1}, (0, 1, 1)),
            ({"idle_timeout": 0.05}, (2, 0, 0)),
        ):
            with self.subTest(options), rpc.WorkerPool(**options) as pool:
                with pool.connect(Pooled, POOLED_WORKER), pool.connect(Pooled, POOLED_WORKER):
                    pass
                self.until(lambda: "idle_timeout" not in options or not pool.idle_count)
                found = pool.metrics
            self.assertEqual((found.evictions_idle, found.evictions_max, found.idle), expected)
            self.assertEqual(self.held(), before)

    def test_a_forked_child_begins_with_an_empty_pool(self) -> None:
        import warnings

        pool = self.pool()
        with pool.connect(Pooled, POOLED_WORKER) as proxy:
            ours = proxy.process_id()
            borrowed = pool.connect(Pooled, POOLED_WORKER)
            borrowed.__enter__()
        reader, writer = os.pipe()
        warnings.simplefilter("ignore")  # of what the child has of its parent
        child = fork()
        if child == 0:
            try:
                found = list(pool.metrics)
                borrowed.__exit__(None, None, None)  # what the parent had borrowed is not ours to give back
                with pool, pool.connect(Pooled, POOLED_WORKER) as proxy:
                    os.write(writer, json.dumps([*found, pool.active_count, proxy.process_id()]).encode())
            finally:
                os._exit(0)
        os.close(writer)
        with open(reader, "rb") as file:
            *metrics, active, theirs = json.loads(file.read())
        os.waitpid(child, 0)
        borrowed.__exit__(None, None, None)
        self.assertEqual((rpc.PoolMetrics(*metrics), active), (rpc.PoolMetrics(), 1))
        self.assertEqual((pool.active_count, pool.idle_count), (0, 2))
        with pool.connect(Pooled, POOLED_WORKER), pool.connect(Pooled, POOLED_WORKER) as proxy:
            self.assertEqual((proxy.process_id(), ours == theirs), (ours, False))

    def test_many_threads(self) -> None:
        pool = self.pool(max_idle=2)

        def borrow(_: int) -> int:
            with pool.connect(Pooled, POOLED_WORKER) as proxy:
                return proxy.process_id()

        seen = list(itertools.chain(*at_once(3, lambda _: list(map(borrow, range(5))))))
        found = pool.metrics
        self.assertEqual((len(seen), found.borrows, found.returns, found.active), (15, 15, 15, 0))
        self.assertEqual((len(set(seen)), found.spawns - found.evictions_max), (found.spawns, found.idle))


# ============================================================================
# 15. LISTENERS
# ============================================================================


class ListenerTests(TestCase):
    """Listening sockets in threads of this process."""

    def setUp(self) -> None:
        super().setUp()
        self.folder = tempfile.mkdtemp()
        self.addCleanup(shutil.rmtree, self.folder)
        self.path = os.path.join(self.folder, "s")

    def serve(self, **options: Any) -> threading.Thread:
        """Serve a Unix socket until nobody was connected for a moment."""
        options.setdefault("idle_timeout", 0.4)
        bound = threading.Event()
        options["on_bound"] = lambda path: bound.set()
        server = options.pop("server", None) or make_server()
        thread = threading.Thread(target=rpc.serve_unix, args=(server, self.path), kwargs=options)
        thread.start()
        self.addCleanup(thread.join)
        self.assertTrue(bound.wait(WATCHDOG_SECONDS))
        return thread

    def connect(self, **options: Any) -> Any:
        """A connection to it."""
        options.setdefault("timeout", WATCHDOG_SECONDS / 2)
        return rpc.unix_connect(Service, self.path, **options)

    def test_it_ends_when_nobody_is_connected(self) -> None:
        for threaded in (False, True):
            thread = self.serve(threaded=threaded, idle_timeout=0.3)
            with self.connect() as proxy:
                self.assertEqual(proxy.wait(0.4), 40)  # longer than it would be idle
                self.assertTrue(thread.is_alive())
            thread.join()
            self.assertEqual(os.listdir(self.folder), [])

    def test_a_forked_child_does_not_listen(self) -> None:
        statuses = []

        def bound(*where: Any) -> None:
            child = fork()
            if not child:
                os._exit(1 + listening.fileno())
            statuses.append(os.waitpid(child, 0)[1])

        with rpc.listen_tcp("127.0.0.1", 0) as listening:
            with mock.patch.object(rpc, "listen_tcp", return_value=listening):
                rpc.serve_tcp(make_server(), idle_timeout=0.0, on_bound=bound)
        self.assertEqual(statuses, [0])

    def test_further_connections_wait(self) -> None:
        for options in ({"threaded": True, "max_connections": 2}, {"threaded": False}):
            thread = self.serve(**options)
            self.further_connections_wait(self.connect, options.get("max_connections", 1))
            thread.join()
            where = in_thread(rpc.serve_tcp, make_server(), **options)
            connect = functools.partial(rpc.tcp_connect, Service, *where, timeout=WATCHDOG_SECONDS / 2)
            self.further_connections_wait(connect, options.get("max_connections", 1))

    def further_connections_wait(self, connect: Callable[..., Any], most: int) -> None:
        """Hold *most* connections; one more is served when one of them was closed."""
        with contextlib.ExitStack() as stack:
            held = [stack.enter_context(contextlib.ExitStack()) for _ in range(most)]
            for one in held:
                self.assertEqual(one.enter_context(connect()).add(1.0), 3.0)
            with connect(timeout=0.2) as proxy, self.assertRaises(rpc.DeadlineExceededError):
                proxy.add(1.0)
            waiting = stack.enter_context(connect())
            held[0].close()
            self.assertEqual(waiting.add(2.0), 4.0)

    def test_a_signal_while_a_child_is_forked_is_not_lost(self) -> None:
        program = (
            "import os, signal, vgi_rpc\n"
            "class Plain:\n    def plain(self) -> int: ...\n"
            "os.register_at_fork(after_in_child=lambda: os.kill(os.getpid(), signal.SIGTERM))\n"
            "with vgi_rpc._stop_signals(vgi_rpc.RpcServer(Plain, Plain()), 1.0, None):\n"
            "    child = os.fork()\n    if not child:\n        os._exit(0)\n"
            "    print(os.waitpid(child, 0)[1], signal.pthread_sigmask(signal.SIG_BLOCK, []))"
        )
        done = subprocess.run([sys.executable, "-c", program], cwd=HERE, stdout=subprocess.PIPE)
        self.assertEqual(
            done.stdout.split(), [b"15", b"set()"]
        )  # the child ended by it, nothing stays blocked

    def test_what_the_system_refuses_does_not_end_it(self) -> None:
        with self.assertLogs("vgi_rpc", "ERROR") as caught:
            thread = self.serve(threaded=True, idle_timeout=0.5)
            real = socket.socket.accept
            refusals = [OSError(24, "Too many open files"), OSError(12, "no memory"), MemoryError("none")]

            def accept(listening: socket.socket) -> Any:
                if refusals:
                    raise refusals.pop(0)
                return real(listening)

            with mock.patch.object(socket.socket, "accept", accept), self.connect() as proxy:
                self.assertEqual(proxy.add(1.0), 3.0)
            refusal = RuntimeError("can't start new thread")
            with mock.patch.object(threading.Thread, "start", side_effect=refusal):
                with self.connect() as proxy, self.assertRaises(TransportError):
                    proxy.add(1.0)
            with self.connect() as proxy:
                self.assertEqual(proxy.add(1.0), 3.0)
            thread.join()
        said = [record.getMessage() for record in caught.records]
        self.assertEqual(len(said), 2, said)  # once for each kind of trouble
        self.assertIn("no room for new connections: [Errno 24] Too many open files", said[0])
        self.assertIn("no room for new connections: can't start new thread", said[1])

    def test_a_handler_that_raises_is_logged(self) -> None:
        server = make_server()
        broken = mock.patch.object(server, "serve", side_effect=LookupError("a mistake"))
        with broken, self.assertLogs("vgi_rpc", "ERROR") as caught:
            thread = self.serve(server=server)
            with self.connect() as proxy, self.assertRaises(TransportError):
                proxy.add(1.0)
            thread.join()
        self.assertIn("the handler of a connection", caught.records[0].getMessage())

    def test_paths_that_are_taken(self) -> None:
        self.serve()
        with self.connect() as proxy:  # which keeps the server there
            self.assertEqual(proxy.add(1.0), 3.0)
            with self.raises(OSError, repr(self.path), "Address already in use"):
                rpc.serve_unix(make_server(), self.path)
            self.assertEqual(proxy.add(1.0), 3.0)
        dead = os.path.join(self.folder, "dead")
        with socket.socket(socket.AF_UNIX) as old:
            old.bind(dead)
        rpc.serve_unix(make_server(), dead, idle_timeout=0.0)
        self.assertFalse(os.path.exists(dead))
        file = pathlib.Path(self.folder, "file")
        file.write_text("not a socket")
        for path, part in (
            (str(file), "Address already in use"),
            (os.path.join(self.folder, "no", "folder"), "No such file"),
            (self.folder + "d" * 200, "dddd': AF_UNIX path too long"),
            ("a\0b", "embedded null"),
        ):
            with self.subTest(part), self.raises(OSError, "cannot listen on the Unix socket", part):
                rpc.serve_unix(make_server(), path)
        self.assertEqual(file.read_text(), "not a socket")

    def test_a_file_that_is_another_ones_by_now_stays(self) -> None:
        def replace(path: str) -> None:
            os.unlink(path)
            pathlib.Path(path).write_text("another one's")

        rpc.serve_unix(make_server(), self.path, idle_timeout=0.0, on_bound=replace)
        self.assertEqual(pathlib.Path(self.path).read_text(), "another one's")

    def test_addresses(self) -> None:
        for host in ("127.0.0.1", "localhost", "::1", "::", "0.0.0.0"):
            try:
                with (
                    self.assertLogs("vgi_rpc", "WARNING")
                    if host in ("::", "0.0.0.0")
                    else contextlib.nullcontext()
                ):
                    rpc.listen_tcp(host, 0).close()
                rpc.listen_tcp(host, 0, asks=True).close()
            except OSError:
                self.assertIn(":", host)  # this machine has no IPv6
        with rpc.listen_tcp("127.0.0.1", 0) as taken:
            port = taken.getsockname()[1]
            with self.raises(OSError, "Address already in use"):
                rpc.serve_tcp(make_server(), port=port)
        for host, port in (("127.0.0.1", 99999), ("a" * 300, 0), ("no.such.host.invalid", 0)):
            with self.subTest(host=host), self.assertRaises(OSError):
                rpc.serve_tcp(make_server(), host, port)

    @unittest.skipUnless(shutil.which("openssl"), "openssl makes the certificate")
    def test_tls(self) -> None:
        import ssl

        names = [os.path.join(self.folder, name) for name in ("certificate", "key")]
        command = (
            "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 9 -subj /CN=x"
        )
        command += f" -addext subjectAltName=IP:127.0.0.1 -out {names[0]} -keyout {names[1]}"
        subprocess.run(command.split(), check=True, stderr=subprocess.DEVNULL)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(*names)
        trusting = ssl.create_default_context(cafile=names[0])
        with mock.patch.object(rpc, "TLS_HANDSHAKE_SECONDS", 0.2):
            options = {"threaded": True, "tls_context": context, "idle_timeout": 0.5}
            _, port = in_thread(rpc.serve_tcp, make_server(), **options)
            silent = socket.create_connection(("127.0.0.1", port))
            self.addCleanup(silent.close)
            connect = functools.partial(rpc.tcp_connect, Service, "127.0.0.1", port, timeout=30.0)
            for options in ({}, {"tls_context": ssl.create_default_context()}):
                with self.assertRaises(TransportError), connect(**options) as proxy:
                    proxy.add(1.0)
            with connect(tls_context=trusting) as proxy:
                self.assertEqual(proxy.context()["kind"], "tcp")
                data = os.urandom(1 << 20)
                self.assertEqual(proxy.echo_bytes(data), data)
                self.assertEqual(len(list(proxy.plain(100))), 100)
                session = rpc.with_options(proxy, timeout=0.1).filter(0.5)
                with self.assertRaises(rpc.DeadlineExceededError):
                    session.exchange(values(1.0))
            silent.settimeout(WATCHDOG_SECONDS)
            self.assertEqual(silent.recv(1), b"")  # it never said anything


SIGNALLED = """
    import contextlib, multiprocessing, os, signal, sys, time
    import vgi_rpc
    class Slow:
        def add(self, a: int) -> int:
            os.write(1, b"")  # as printing does, in the place of which standard error is
            return a + 1
        def fork(self, how: str) -> int:
            child = os.fork()
            if child: return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            if how == "raises": raise ValueError
            if how == "exits": sys.exit(3)
            return 7
        def wait(self, seconds: float) -> float:
            open("waiting", "w").close()
            end = time.monotonic() + seconds
            while time.monotonic() < end: time.sleep(0.01)
            return seconds
        def child(self) -> int:
            child = multiprocessing.get_context("fork").Process(target=time.sleep, args=(600,))
            child.start()
            while child.exitcode is None:  # Python may lose a signal to a child that a thread forks
                child.terminate()
                child.join(0.02)
            return child.exitcode
    if __name__ == "__main__":
        vgi_rpc.DRAIN_GRACE_SECONDS = grace = float(os.environ["GRACE"])
        os.chdir(os.path.dirname(__file__))
        vgi_rpc.run_server(Slow, Slow())
        with contextlib.suppress(OSError): os.write(1, b"left\\n")
"""


@unittest.skipUnless(hasattr(os, "fork"), "signals as Unix has them")
class SignalTests(TestCase):
    """Servers as processes, which are told to stop."""

    def setUp(self) -> None:
        super().setUp()
        self.folder = tempfile.mkdtemp()
        self.addCleanup(shutil.rmtree, self.folder)
        self.program = os.path.join(self.folder, "slow.py")
        pathlib.Path(self.program).write_text(textwrap.dedent(SIGNALLED))
        self.protocol = type("Slow", (), {})
        spec = importlib.util.spec_from_file_location("slow", self.program)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        self.protocol = module.Slow

    @contextlib.contextmanager
    def serving(self, kind: str, grace: float = 30.0) -> Iterator[tuple[Any, Any]]:
        """A server process and a proxy of it; it ends with 0, by a signal or because its client leaves."""
        with mock.patch.dict(os.environ, {"PYTHONPATH": str(HERE), "GRACE": str(grace)}):
            command = [sys.executable, "-W", "ignore", self.program]
            if kind == "stdio":
                transport = rpc.SubprocessTransport(command)
                process = transport.proc
            else:
                path = os.path.join(self.folder, "socket")
                process = subprocess.Popen([*command, "--unix", path], stdout=subprocess.PIPE)
                process.stdout.readline()
                transport = rpc.connect_unix_socket(path)
        with rpc.RpcConnection(self.protocol, transport) as proxy:
            yield process, proxy
        if kind != "stdio":
            process.communicate(timeout=WATCHDOG_SECONDS)
            self.assertFalse(os.path.exists(path))
        self.assertEqual(process.returncode, 0)

    def waiting(self, proxy: Any, seconds: float, results: list[Any]) -> threading.Thread:
        """Call ``wait`` in a thread, and return when it runs."""

        def call() -> None:
            try:
                results.append(proxy.wait(seconds))
            except RpcError as exc:
                results.append(exc)

        thread = threading.Thread(target=call)
        thread.start()
        file = pathlib.Path(self.folder, "waiting")
        while not file.exists():
            time.sleep(0.01)
        file.unlink()
        return thread

    def test_sigterm(self) -> None:
        for kind in ("stdio", "unix"):
            with self.subTest(kind), self.serving(kind) as (process, proxy):
                self.assertEqual(proxy.child(), -signal.SIGTERM)  # which does not wait for the server's calls
                process.send_signal(signal.SIGTERM)  # idle: it ends at once
                process.wait(WATCHDOG_SECONDS)
            with self.subTest(kind), self.serving(kind) as (process, proxy):
                results: list[Any] = []
                caller = self.waiting(proxy, 0.6, results)
                process.send_signal(signal.SIGTERM)
                time.sleep(0.1)
                if kind == "unix":  # who comes now is told
                    late = rpc.RpcConnection(self.protocol, rpc.connect_unix_socket(f"{self.folder}/socket"))
                    with self.assertRaises(RpcError) as caught, late as other:
                        other.add(1)
                    self.assertEqual(caught.exception.error_kind, "server_draining")
                caller.join()
                self.assertEqual(results, [0.6])
            for grace in (30.0, 0.3):
                with self.subTest(kind, grace=grace), self.serving(kind, grace) as (process, proxy):
                    caller = self.waiting(proxy, 25.0, [])
                    process.send_signal(signal.SIGTERM)
                    time.sleep(0.1)
                    if grace > 1:
                        process.send_signal(signal.SIGTERM)
                    process.wait(WATCHDOG_SECONDS)
                    caller.join()

    def test_a_forked_child_that_leaves_its_method_ends(self) -> None:
        for kind in ("stdio", "unix"):
            with self.serving(kind) as (process, proxy):
                self.assertEqual([proxy.fork(how) for how in ("returns", "raises", "exits")], [0, 1, 3])
                self.assertEqual(proxy.add(1), 2)
                process.send_signal(signal.SIGTERM)

    def test_an_interrupt_is_meant_for_the_parent_of_a_worker(self) -> None:
        with self.serving("stdio") as (process, proxy):
            self.assertEqual(proxy.add(1), 2)
            process.send_signal(signal.SIGINT)
            time.sleep(0.1)
            self.assertEqual(proxy.add(2), 3)
        with self.serving("unix") as (process, proxy):
            process.send_signal(signal.SIGINT)
            process.wait(WATCHDOG_SECONDS)

    def test_standard_files_that_are_closed(self) -> None:
        command = f"GRACE=1 PYTHONPATH={shlex.quote(str(HERE))} {shlex.quote(sys.executable)} {self.program}"
        info = rpc.rpc_methods(self.protocol)["add"]
        request = b"".join(rpc.request_pieces(info, [1], "0123456789abcdef", None))
        for closed in ("2>&-", ""):
            done = subprocess.run(f"{command} {closed}", shell=True, input=request, capture_output=True)
            self.assertEqual(read_stream(io.BytesIO(done.stdout))[0][0].to_pydict(), {"result": [2]})
            self.assertTrue(done.stdout.endswith(b"left\n"))  # standard output is there again
        for closed in (">&-", "<&-"):
            done = subprocess.run(f"{command} {closed}", shell=True, capture_output=True)
            self.assertIn(b"serve_stdio: stdin or stdout is closed", done.stderr)


# ============================================================================
# 16. HTTP MESSAGES
# ============================================================================


def http_head(*lines: str, start: str = "POST /Service/add HTTP/1.1", host: str = "Host: localhost") -> bytes:
    """A request head with these further lines."""
    given = [start, *([host] if host else []), f"Content-Type: {ARROW}", *lines]
    return ("\r\n".join(given) + "\r\n\r\n").encode("latin-1")


def spelt(table: bytes) -> list[bytes]:
    """The entries of a table, in which escapes stand as they are written in source."""
    entries = table.strip(b"\n").replace(b"\n", b"|").split(b"|")
    return [entry.decode("unicode_escape").encode("latin-1") for entry in entries]


GOOD = request_bytes("add", {"a": 1.0, "b": 2.0})
LENGTH = f"Content-Length: {len(GOOD)}"
ASKED = http_head(LENGTH) + GOOD
CHUNKS = b"%x\r\n" % len(GOOD) + GOOD + b"\r\n0\r\n\r\n"
IN_CHUNKS = http_head("Transfer-Encoding: chunked")
GET_HEALTH = "GET /health HTTP/1.1"
ENDED = CHUNKS[:-2]  # up to the trailers
NO_LENGTHS = (f"+{len(GOOD)}", "-1", "1_0", "4 4", "0x4", "\xb2", "")
NO_CHUNKS = (b"-1\r\n", b"0x10\r\n", b"2\r\nabXX0\r\n\r\n", CHUNKS.replace(b"\r\n", b"\n", 1))
NO_TRAILERS = (b"no trailer\r\n", b"a: b\r\n c\r\n", b"a: b\r\n" * 10_000)
NO_LINES = rb"""
Host: localhost\n|Host: local\rhost\r\n|Host : localhost\r\n|Host: \0localhost\r\n|Host: x\r\n y\r\n|Host: x\r\n: x\r\n
Host: x\r\nnonsense\r\n|Host: x\r\nHost: x\r\n|Host: a b/@\r\n|Host: a@localhost\r\n
Host: x\r\nAuthorization: a\r\nAuthorization: b\r\n|Host: x\r\nTransfer-Encoding: \r\n|
"""
NO_STARTS = ("GET /health HTTP/one", "get /health HTTP/1.1", "GET health HTTP/1.1", "GET /a b HTTP/1.1")
NO_STARTS += ("GET ftp://localhost/health HTTP/1.1", "GET http://a@localhost/health HTTP/1.1")
ABSOLUTE = ("GET http://localhost/health HTTP/1.1", "GET HTTP://localhost:8/health?a=/b HTTP/1.1")
NO_HEADS = (
    b"GET /health\r\n\r\n",
    b"GET /health HTTP/1.1\nHost: x\n\n",
    b"\x16\x03\x01\x02\0\x01" + b"\0" * 50,
)
DECIDED_BY_HEAD = [  # status, raw request
    (200, ASKED),
    (411, http_head() + GOOD),
    (400, http_head(LENGTH, LENGTH) + GOOD),
    (400, http_head(LENGTH, "Content-Length: 1") + GOOD),
    (400, http_head("Transfer-Encoding: chunked", LENGTH) + CHUNKS),
    *[(400, http_head(f"Content-Length: {bad}") + GOOD) for bad in NO_LENGTHS],
    *[(413, http_head(f"Content-Length: {large}")) for large in ("9" * 20, "1000001")],
    (200, IN_CHUNKS + CHUNKS),
    (200, IN_CHUNKS + CHUNKS.replace(b"\r\n", b";a=b\r\n", 1)),
    (200, IN_CHUNKS + ENDED + b"A: b\r\nC: d\r\n\r\n"),
    (413, IN_CHUNKS + b"40000000\r\n"),
    *[(400, IN_CHUNKS + bad) for bad in NO_CHUNKS],
    *[(400, IN_CHUNKS + ENDED + bad + b"\r\n") for bad in NO_TRAILERS],
    (400, IN_CHUNKS.replace(b"/1.1", b"/1.0") + CHUNKS),
    (400, http_head(*["Transfer-Encoding: chunked"] * 2) + CHUNKS),
    (501, http_head("Transfer-Encoding: gzip, chunked") + CHUNKS),
    *[(400, ASKED.replace(b"Host: localhost\r\n", bad)) for bad in spelt(NO_LINES)],
    *[(400, bad) for bad in NO_HEADS],
    *[(400, http_head(start=bad)) for bad in NO_STARTS],
    *[(200, http_head(start=start)) for start in ABSOLUTE],
    (200, http_head(LENGTH, "Expect: x", start="POST /Service/add HTTP/1.0") + GOOD),
    (414, http_head(start="GET /" + "x" * 70_000 + " HTTP/1.1")),
    (414, b"GET /" + b"x" * 200_000),
    (431, http_head(*[f"x-{i}: y" for i in range(200)], start=GET_HEALTH)),
    (431, http_head("x: " + "y" * 200_000, start=GET_HEALTH)),
    (505, http_head(start="GET /health HTTP/3.0")),
    (505, b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"),
]
DECIDED_LATER = [
    (400, http_head(LENGTH, *["VGI-Accept-Max-Response-Bytes: 65536"] * 2) + GOOD),
    (415, http_head(LENGTH, *["Content-Encoding: gzip"] * 2) + GOOD),
    (415, ASKED.replace(f"Content-Type: {ARROW}\r\n".encode(), b"")),
    (404, http_head(start="GET /\xff HTTP/1.1")),
    (404, http_head(start="GET /%6d HTTP/1.1")),
]


class GivenBytes(io.BytesIO):
    """A socket from which bytes come *step* at a time, and then the end."""

    step = 1 << 20

    def recv(self, size: int) -> bytes:
        return self.read(min(size, self.step))

    def recv_into(self, view: memoryview) -> int:
        return self.readinto(view[: self.step])

    def settimeout(self, seconds: Any) -> None:
        """Nothing is waited for."""


def http_reader(data: bytes, step: int = 1 << 20) -> rpc.HttpReader:
    """A reader of these bytes."""
    source = GivenBytes(data)
    source.step = step
    return rpc.HttpReader(rpc.ByteChannel(source))


def read_message(data: bytes, step: int = 1 << 20) -> tuple[Any, bytes]:
    """Head and body of a request as the server's reader finds them."""
    reader = http_reader(data, step)
    head = rpc.parse_http_head(reader.head())
    rpc.check_request_head(head)
    framing = "chunked" if "transfer-encoding" in head.headers else "sized"
    return head, bytes(reader.body(framing, head.headers, 1_000_000))


def outcome_of(data: bytes, step: int = 1 << 20) -> Any:
    """What reading a request gives: head and body, or the status of the refusal, or why the connection is closed."""
    try:
        return read_message(data, step)
    except rpc.ProtocolError as exc:
        return exc.http_status
    except TransportError as exc:
        return exc.error_message


class HttpMessageTests(TestCase):
    """Heads, bodies and their codings, without a socket."""

    def test_the_framing_table_whole_and_byte_by_byte(self) -> None:
        for status, data in DECIDED_BY_HEAD + DECIDED_LATER:
            with self.subTest(data[:300], status=status):
                outcome = outcome_of(data)
                if status == 200 or (status, data) in DECIDED_LATER:
                    self.assertIn(outcome[1], (b"", GOOD))
                else:
                    self.assertEqual(outcome, status)
                self.assertEqual(outcome_of(data, 1 if len(data) < 10_000 else 1_000), outcome)

    def test_every_strict_prefix_is_no_message(self) -> None:
        for data in (ASKED, IN_CHUNKS + CHUNKS[:-2] + b"A: b\r\n\r\n"):
            for end in range(1, len(data)):
                self.assertIsInstance(outcome_of(data[:end]), (int, str), data[:end])
        self.assertEqual(http_reader(b"").head(), b"")

    def test_what_is_in_a_head(self) -> None:
        head = rpc.parse_http_head(b"GET /a?b HTTP/1.1\r\nA: 1\r\nb:  2 \t\r\na:\t3\r\nEmpty:\r\n\r\n")
        self.assertEqual(head.start, ("GET", "/a?b", "HTTP/1.1"))
        self.assertEqual(head.headers, {"a": "1, 3", "b": "2", "empty": ""})
        for target, host, found in (
            ("/a?b", "x:1", ("/a", "x:1")),
            ("http://y:2/c?d", "x", ("/c", "y:2")),
            ("http://y", "x", ("/", "y")),
            ("/", "[::1]:80", ("/", "[::1]:80")),
            ("/", "", ("/", "")),
        ):
            head = rpc.parse_http_head(f"GET {target} HTTP/1.1\r\nHost: {host}\r\n\r\n".encode())
            self.assertEqual(rpc.check_request_head(head), found)
        head = rpc.parse_http_head(b"OPTIONS * HTTP/1.1\r\nHost: x\r\n\r\n")
        self.assertEqual(rpc.check_request_head(head), ("*", "x"))

    def test_answers(self) -> None:
        for lines, method, found in (
            ("HTTP/1.1 200 OK\r\nContent-Length: 3", "POST", (200, "sized")),
            ("HTTP/1.1 200 OK\r\nContent-Length: 3", "HEAD", (200, "none")),
            ("HTTP/1.0 200 OK\r\nServer: x", "POST", (200, "to close")),
            ("HTTP/1.1 503 \r\nTransfer-Encoding: Chunked", "POST", (503, "chunked")),
            ("HTTP/1.1 204 No\r\nTransfer-Encoding: chunked", "POST", (204, "none")),
            ("HTTP/1.1 100 Continue\r\nA: b", "POST", (100, "none")),
            ("HTTP/1.1 2000 OK\r\nA: b", "POST", None),
            ("HTTP/2 200 OK\r\nA: b", "POST", None),
            ("HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip", "POST", None),
            ("HTTP/1.1 200 OK\r\nContent-Length: 3\r\nTransfer-Encoding: chunked", "POST", None),
        ):
            head = rpc.parse_http_head(f"{lines}\r\n\r\n".encode())
            with self.subTest(lines, method=method):
                if found is None:
                    self.assertRaises(rpc.ProtocolError, rpc.check_answer_head, head, method)
                else:
                    self.assertEqual(rpc.check_answer_head(head, method), found)

    def test_bodies_to_the_end_of_a_connection(self) -> None:
        for step in (1, 1000):
            reader = http_reader(b"x" * 3000, step)
            self.assertEqual(reader.body("to close", {}, 3000, "rule"), b"x" * 3000)
        with self.raises(rpc.RequestTooLargeError, "2999", "rule"):
            http_reader(b"x" * 3000).body("to close", {}, 2999, "rule")
        large = os.urandom(200_000)
        self.assertEqual(bytes(http_reader(large, 999).exactly(len(large))), large)

    def test_twice_the_input_costs_twice_the_time(self) -> None:
        def cost(make: Callable[[int], bytes], times: int) -> float:
            begun = time.process_time()
            outcome_of(make(times))
            return time.process_time() - begun

        for name, make in {
            "spaces": lambda n: ASKED.replace(b"localhost", b"a" + b" " * n + b"\x01"),
            "start": lambda n: b"GET " + b"x" * n,
            "headers": lambda n: ASKED.replace(b"\r\n\r\n", b"\r\n" + b"a:\r\n" * (n // 4) + b"\x01\r\n\r\n"),
            "chunks": lambda n: IN_CHUNKS + b"1\r\nx\r\n" * n,
            "chunk line": lambda n: IN_CHUNKS + b"1;" + b" " * n,
        }.items():
            tries = (cost(make, 120_000) <= max(0.1, 3 * cost(make, 60_000)) for _ in range(3))
            self.assertTrue(any(tries), name)

    def test_codings(self) -> None:
        for encoding in rpc.supported_encodings():
            for body in (b"a", GOOD, b"\0" * 1_000_000, os.urandom(100_000)):
                packed = rpc.compress_body([body[:7], memoryview(body)[7:]], encoding, 1)
                with self.subTest(encoding, size=len(body)):
                    self.assertEqual(rpc.decompress_body(packed, encoding, len(body)), body)
                    self.assertEqual(rpc.decompress_body(memoryview(packed), encoding, len(body)), body)
                    with self.raises(rpc.RequestTooLargeError):
                        rpc.decompress_body(packed, encoding, len(body) - 1)
                    for end in {1, len(packed) // 2, len(packed) - 1}:
                        with self.raises(rpc.IPCError):
                            rpc.decompress_body(packed[:end], encoding, 10**7)
                    if encoding == "gzip":
                        self.assertRaises(rpc.IPCError, rpc.decompress_body, packed + b"x", encoding, 10**7)
            self.assertRaises(rpc.IPCError, rpc.decompress_body, b"nonsense" * 10, encoding, 10**7)
            self.assertFalse(rpc.is_worth_packing([b"\0" * 1000], encoding, 1))
            self.assertFalse(rpc.is_worth_packing([b"\0" * 50_000, os.urandom(100_000)], encoding, 1))
            self.assertTrue(rpc.is_worth_packing([b"\0" * 50_000, os.urandom(100)], encoding, 1))
        self.assertEqual(rpc.decompress_body(b"x", "", 0), b"x")

    def test_which_coding(self) -> None:
        best = rpc.supported_encodings()[0]
        for private, public, found in (
            (None, "", ("", False)),
            (None, "br", ("", False)),
            (None, "gzip", ("gzip", False)),
            (None, f"{best}, gzip, identity", (best, True)),
            (None, f"br, GZIP , {best}", ("gzip", False)),
            (None, "identity, gzip", ("", True)),
            (None, "gzip;q=0", ("", False)),
            (None, "gzip; q=0.000", ("", False)),
            (None, "gzip;q=0.5", ("gzip", False)),
            ("identity", "gzip", ("", True)),
        ):
            coding, header, identity = rpc.choose_encoding(private, public)
            self.assertEqual((coding, identity), found, (private, public))
            if coding:
                self.assertEqual(header, "Content-Encoding")
        self.assertEqual(rpc.choose_encoding("gzip", "br")[:2], ("gzip", "X-VGI-Content-Encoding"))
        self.assertEqual(rpc.choose_encoding("gzip", "br, gzip")[:2], ("gzip", "Content-Encoding"))
        for headers, coding in (
            ({}, ""),
            ({"content-encoding": "Identity"}, ""),
            ({"content-encoding": " GZIP"}, "gzip"),
            ({"content-encoding": "br", "x-vgi-content-encoding": "gzip"}, "gzip"),
        ):
            self.assertEqual(rpc.coding_of(headers), coding)
        for coding in ("br", "gzip, gzip", "identity, gzip"):
            with self.raises(rpc.ProtocolError, "gzip", repr(coding)) as caught:
                rpc.coding_of({"content-encoding": coding})
            self.assertEqual(caught.exception.http_status, 415)


# ============================================================================
# 17. JSON AND PAGES
# ============================================================================


class People:
    """<script>alert('docs')</script>"""

    protocol_version: ClassVar[str] = "1.2.3"

    def add(self, a: float, b: float = 2.0) -> float:
        """Add <b>two</b> numbers & more.

        Args:
            a: The first.
        """
        return a + b

    def many(self, whole: int, small: Annotated[int, ArrowType(pa.uint8())], at: datetime.datetime, raw: bytes,
             half: Annotated[float, ArrowType(pa.float32())],
             price: Annotated[decimal.Decimal, ArrowType(pa.decimal128(10, 2))],
             zoned: Annotated[datetime.datetime, ArrowType(pa.timestamp("s", "Europe/Berlin"))], clock: datetime.time,
             span: datetime.timedelta, key: uuid.UUID, color: Color, table: dict[int, list[str]], point: Point,
             points: list[Point], flag: bool) -> None: ...  # fmt: skip

    def day(self, day: datetime.date, shape: Shape | None = None) -> Shape:
        return shape or Shape(str(day))

    def batch(self, rows: pa.RecordBatch, schema: pa.Schema) -> pa.RecordBatch:
        return rows

    def count(self, n: int) -> Stream[Plain, Dated]:
        return Stream(
            INTEGERS,
            Plain(n),
            header=Dated(datetime.date(2024, 1, 31), decimal.Decimal(n), key=uuid.UUID(int=n)),
        )

    def level(self, level: Literal["it's low", "high"]) -> str:
        return level

    def sums(self) -> Stream[Running]:
        return Stream(RUNNING, Running("r"), input_schema=VALUE)


@dataclass(frozen=True)
class Choice(ArrowSerializableDataclass):
    """Has a check of its own."""

    least: int

    def __post_init__(self) -> None:
        if self.least < 5:
            raise ValueError("too few")


class Choosy:
    """Takes a dataclass that refuses most values."""

    def pick(self, choice: Choice) -> None: ...


MANY = {
    "whole": 1, "small": 255, "half": 0.5, "price": "1.25", "at": "2024-01-31T12:30:00",
    "zoned": "2024-01-31T12:30:00Z", "clock": "12:30:00", "span": 1.5, "raw": "AAH/", "key": str(uuid.UUID(int=7)),
    "color": "RED", "table": {"1": ["a"]}, "point": {"x": 1}, "points": [], "flag": True,
}  # fmt: skip
BERLIN = datetime.timezone(datetime.timedelta(hours=1))
# A parameter of many(), JSON, and what the method gets, or the text of the refusal.
GIVEN: list[tuple[str, str, Any]] = [
    ("whole", "-9223372036854775808", -(2**63)), ("half", "1", 1.0), ("half", '"-Infinity"', -float("inf")),
    ("price", "12345678.12", decimal.Decimal("12345678.12")), ("price", '"1e2"', decimal.Decimal("100.00")),
    ("price", "3", decimal.Decimal("3.00")), ("at", '"2024-02-29"', datetime.datetime(2024, 2, 29)),
    ("at", '"2024-02-29 01:02:03.0040"', datetime.datetime(2024, 2, 29, 1, 2, 3, 4000)),
    ("zoned", '"2024-01-31T12:30:00.0+02:00"', datetime.datetime(2024, 1, 31, 11, 30, tzinfo=BERLIN)),
    ("clock", '"01:02"', datetime.time(1, 2)), ("clock", '"01:02:03.000004000"', datetime.time(1, 2, 3, 4)),
    ("span", '"-1.5s"', datetime.timedelta(seconds=-1.5)), ("span", "86400", datetime.timedelta(days=1)),
    ("raw", '""', b""), ("key", '"AAAAAAAAAAAAAAAAAAAABw=="', uuid.UUID(int=7)),
    ("table", '[[3, ["x"]], [4, []]]', {3: ["x"], 4: []}), ("table", '{"-3": []}', {-3: []}),
    ("point", '{"x": 2, "note": null, "color": "BLUE"}', Point(2, Color.BLUE)),
    ("points", '[{"x": 1}, {"x": 2, "color": "BLUE"}]', [Point(1), Point(2, Color.BLUE)]),
    ("whole", "1.0", ": expected int64, got 1.0"),
    ("whole", "9223372036854775808", ": expected int64"),
    ("small", "256", ": expected uint8"),
    ("half", '"1.5"', ': expected float32, got "1.5"'),
    ("price", "1.234", ": expected decimal128(10, 2)"),
    ("at", '"2024-02-30"', ': expected timestamp[us], got "2024-02-30"'),
    ("at", '"2024-01-01T00:00:00Z"', ": expected timestamp[us] without a zone"),
    ("zoned", '"2024-01-01T00:00:00"', ": expected timestamp[s, tz=Europe/Berlin]"),
    ("span", '"1 day"', ": expected duration[us]"),
    ("key", '"nope"', ': expected UUID, got "nope"'),
    ("raw", '"AA"', ": expected bytes"), ("points", '"1"', ': expected list[Point], got "1"'),
    ("color", '"PINK"', ": expected Color (RED, BLUE), got 'PINK'"),
    ("table", '{"a": []}', "['a']: expected int64, got \"a\""),
    ("table", '{"1": ["a", 2]}', "[1][1]: expected utf8, got 2"),
    ("point", '{"x": "1"}', '.x: expected int64, got "1"'),
    ("point", '{"x": 1, "colour": "RED"}', ": expected one of x, color, note, got 'colour'; did you mean 'color'?"),
    ("points", '[{"x": 1}, {"x": 1, "note": 3}]', "[1].note: expected utf8, got 3"),
]  # fmt: skip
NOT_JSON = [
    b"", b"{", b'{"a":1,"a":2}', b'{"a":NaN}', b'{"a":-Infinity}', b'{"a":1}x', b"{'a':1}", b'{"a":01}', b'{"a":"\xff"}',
    b'\xef\xbb\xbf{"a":1}', b'{"a":1,}', '{"a":1}'.encode("utf-16"), b'{"a":"\x01"}', b'{"a":1e99999}',
    b'{"a":1e-999999999}', b'{"a":' + b"9" * 5000 + b"}", b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
]  # fmt: skip


class JsonValueTests(TestCase):
    """The one conversion between JSON and values."""

    def test_every_type_there_and_back_with_and_without_its_protocol(self) -> None:
        infos = rpc.rpc_methods(Echo)
        described = rpc.describe_service(make_server().services["Service"])
        description = rpc.service_description(rpc.ProtocolList("", "", "1", []), described)
        for name, case in TYPES.items():
            info = infos[f"echo_{name}"]
            told = description.methods[f"echo_{name}"]
            for each in (info, told):
                example = {"value": rpc.example_of(rpc.described_schemas(each)["params"].field(0))}
                rpc.decode_arguments(
                    info, rpc.arguments_from_json(each, example)
                )  # which raises where it is none
            for value in case.values:
                with self.subTest(name, value=value):
                    batch = info.result.to_batch(info.result.encode([value]))
                    text = rpc.json_text({"value": rpc.result_to_json(info, batch)})
                    for each in (info, told):
                        row = rpc.arguments_from_json(each, rpc.parse_json(text))
                        sent = info.params.decode(row)[0]
                        if name != "batch":  # of whose rows JSON does not say the types
                            self.assertEqual((type(sent), sent), (type(value), value))
                    shown = rpc.value_to_json(
                        told.params.decode(row)[0], rpc.described_schemas(told)["params"].field(0)
                    )
                    self.assertEqual({"value": shown}, json.loads(text))

    def test_other_forms_and_what_does_not_fit(self) -> None:
        info = rpc.rpc_methods(People)["many"]

        def arguments(text: str) -> Any:
            return rpc.decode_arguments(info, rpc.arguments_from_json(info, rpc.parse_json(text)))

        whole = arguments(json.dumps(MANY))
        for name, text, wanted in GIVEN:
            given = json.dumps({k: v for k, v in MANY.items() if k != name})[:-1] + f', "{name}": {text}}}'
            with self.subTest(name, text=text):
                if isinstance(wanted, str):
                    with self.raises(rpc.ParameterError, f"many() parameter {name}{wanted}"):
                        arguments(given)
                else:
                    self.assertEqual(arguments(given), {**whole, name: wanted})

    def test_what_is_no_object_of_its_parameters(self) -> None:
        for given, wanted in (
            ({}, "is missing argument 'a'"), (None, "expected an object of parameters, got null"),
            ({"a": 1, "bb": 2}, "has no parameter 'bb'; did you mean 'b'?"),
        ):  # fmt: skip
            with self.raises(rpc.ParameterError, "add()", wanted):
                rpc.arguments_from_json(rpc.rpc_methods(People)["add"], given)
        for data in NOT_JSON:
            with self.subTest(data[:40]), self.raises(rpc.ProtocolError, "request: not JSON"):
                rpc.parse_json(data)

    def test_rows_of_a_batch(self) -> None:
        columns = {
            "at": pa.array([datetime.datetime(2024, 1, 2, 3, 4, 5)], pa.timestamp("s", "UTC")),
            "nanoseconds": pa.array([1], pa.timestamp("ns")),
            "span": pa.array([datetime.timedelta(seconds=100)]),
            "price": pa.array([decimal.Decimal("1E+2")], pa.decimal128(5, -2)),
            "tags": pa.array([[("a", 1), ("a", 2)]], pa.map_(pa.utf8(), pa.int64())),
            "flags": pa.array([[(True, b"\xff")]], pa.map_(pa.bool_(), pa.binary())),
            "deep": pa.array([{"x": [float("nan"), None]}]),
        }
        [row] = rpc.batch_rows(pa.RecordBatch.from_pydict(columns))
        self.assertTrue(row.pop("nanoseconds").startswith("1970-01-01"))
        wanted = {"at": "2024-01-02T03:04:05+00:00", "span": "100s", "price": "100", "tags": [["a", 1], ["a", 2]],
                  "flags": {"true": "/w=="}, "deep": {"x": ["NaN", None]}}  # fmt: skip
        self.assertEqual(row, wanted)
        empty = pa.RecordBatch.from_struct_array(pa.array([{}, {}], pa.struct([])))
        self.assertEqual(rpc.batch_rows(empty), [{}, {}])
        self.assertEqual(rpc.json_text({"a": [float("nan"), Color.RED]}), '{"a": [null, "Color.RED"]}')


class PagesTests(TestCase):
    """Pages for people: links, escaping, what can be pasted."""

    def page(
        self,
        path: str,
        status: int = 200,
        host: str = "h:1",
        token: str = "",
        P: Any = People,
        **options: Any,
    ) -> str:
        """A page of *P*; it loads and runs nothing."""
        headers = {"Accept": "text/html", "Host": host, "Authorization": f"Bearer {token}"}
        reply = wsgi_client(RpcServer(P, P()), **options).get(path, **headers)
        self.assertEqual(reply.status, status, reply.body)
        text = reply.body.decode()
        style = re.search(r"<style>(.*?)</style>", text, re.S)[1]
        digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
        for part in (f"style-src 'sha256-{digest}'", "default-src 'none'"):
            self.assertIn(part, reply.headers["content-security-policy"])
        self.assertNotRegex(text.replace(style, ""), r"<script|<b>two|\s(?:src|style|on\w+)=")
        return text

    def test_links_are_relative_and_lead_somewhere(self) -> None:
        for prefix in ("", "/api/v1"):
            pages = {
                f"{prefix}/{name}": self.page(f"{prefix}/{name}", prefix=prefix) for name in ("", "describe")
            }
            for path, text in pages.items():
                for link in re.findall('href="(.*?)"', text):
                    target, _, anchor = urllib.parse.urljoin(f"http://h{path}", link)[8:].partition("#")
                    self.assertIn(target, [*pages, f"{prefix}/health"])
                    self.assertFalse(link.startswith(("/", "http")))
                    self.assertIn(f'id="{anchor}"' if anchor else "", pages.get(target, ""))
                for info in rpc.rpc_methods(People).values():
                    self.assertIn(info.signature(), html.unescape(text))

    def test_root_of_a_page(self) -> None:
        for path, prefix, root in (
            ("/", "", "./"), ("/describe", "", "./"), ("/a/b/c", "", "../../"), ("/api", "/api", "./api/"),
            ("/api/", "/api", "./"), ("/api/a/b", "/api", "../"), ("/nowhere", "/api", "./api/"), ("/x/y", "/api", ".././api/"),
        ):  # fmt: skip
            self.assertEqual(rpc.root_of(path, prefix), root)

    def test_cards_tell_what_is_inside(self) -> None:
        for host in ("evil'; rm -rf ~ #", "a<b>", 'q"'):
            words = html.unescape(self.page("/describe", host=host))
            self.assertIn("http://HOST/People/add", words)
        for text in ("The first.", "Add <b>two</b> numbers & more.", "Decimal(10, 2)", "list[Point]", "producer", "1.2.3",
                     "Frozen, with an enum and a default.", "float = 2.0", rpc.__version__, pa.__version__):  # fmt: skip
            self.assertIn(text, words)
        self.assertNotIn("curl", self.page("/describe", json=False))
        words = html.unescape(
            self.page("/describe", P=Choosy)
        )  # whose class takes no example that it is shown
        self.assertIn("print(proxy.pick(choice={'least': 1}))", words)

    def test_what_can_be_pasted_works(self) -> None:
        client = wsgi_client(RpcServer(People, People()))
        page = html.unescape(self.page("/describe").partition("Reflection")[0])
        names = []
        for kind, text in re.findall(r"<h4>(\w+)(?: line)?</h4><pre>(.*?)</pre>", page, re.S):
            if kind == "curl":
                [_, url, _, _, _, body] = shlex.split(text)
                headers = [("Content-Type", "application/json")]
                answer = client.send("POST", url.removeprefix("http://h:1"), headers, body.encode())
                self.assertEqual(answer.status, 200, answer.body)
                names.append(url.rpartition("/")[2])
            elif kind == "Python" and "exchange(" not in text:
                near = mock.patch.object(rpc, "http_connect", lambda P, url: rpc.serve_pipe(P, People()))
                with near, contextlib.redirect_stdout(io.StringIO()):
                    exec(compile(text, "block", "exec"), {})
        self.assertEqual(names, ["add", "batch", "count", "day", "level", "many"])

    def test_who_may_see_them(self) -> None:
        check = rpc.bearer_authenticate_static(tokens={"secret": AuthContext("t", True, "me")})
        for path in ("/", "/describe"):
            self.assertNotIn("add(", self.page(path, 401, authenticate=check))
            self.assertIn("add(", self.page(path, token="secret", authenticate=check))
        self.assertIn("--bearer-file", self.page("/describe", token="secret", authenticate=check))
        self.assertNotIn("add(", self.page("/nowhere", 404, token="secret", authenticate=check))
        for options in ({"pages": False}, {"json": True}):
            server = RpcServer(People, People(), enable_describe="pages" in options)
            reply = wsgi_client(server, **options).get("/", Accept="application/json")
            self.assertEqual((reply.status, json.loads(reply.body)["code"]), (404, "unimplemented"))


# ============================================================================
# 18. HTTP SERVING
# ============================================================================

ADD = "/Service/add"
PEOPLE = {"ada": AuthContext("static", True, "ada"), "bob": AuthContext("static", True, "bob")}
PEOPLE["nameless"] = AuthContext(None, True, None)
KNOWN = rpc.bearer_authenticate_static(tokens=PEOPLE)


def by_header(request: Any) -> AuthContext:
    """Who a header names."""
    name = request.get_header("X-User")
    if name is None:
        raise rpc.AuthFailure(rpc.AuthReason.MISSING_CREDENTIAL)
    if name == "banned":
        raise PermissionError("banned")
    return AuthContext("header", True, name)


class HttpRequestTests(TestCase):
    """Paths, statuses, headers, codings, budgets, credentials: the request function, through WSGI."""

    def test_paths_and_methods(self) -> None:
        client = wsgi_client()
        nowhere = "/__session__ /__upload_url__/init /__x__/x"
        slashes = "/Service/nobody /Nobody/add /Service / /Service/add/extra /Service/add/ //Service/add"
        for method, status, paths in (
            ("POST", 404, slashes),
            ("POST", 404, "/Service%2Fadd /Servic%65/add /Service/../Service/add /Service/%2e%2e /\xff/add"),
            ("POST", 400, "/Service/add/init /Service/count /Service/add/exchange"),
            ("GET", 405, "/Service/add /Service/count/init"),
            ("GET", 404, f"/nowhere/at/all /Nobody/add {nowhere}"),
            ("HEAD", 405, ADD),
            ("PUT", 405, ADD),
            ("DELETE", 405, ADD),
            ("POST", 405, "/health"),
            ("GET", 200, "/health"),
            ("HEAD", 200, "/health"),
            ("OPTIONS", 200, ADD),
            ("DELETE", 404, nowhere),
            ("POST", 404, nowhere),
        ):
            for path in paths.split(" "):
                with self.subTest(method=method, path=path):
                    reply = client.send(method, path, [("Content-Type", ARROW)], GOOD * (method == "POST"))
                    allows = status == 405 or method == "OPTIONS"
                    self.assertEqual((reply.status, "allow" in reply.headers), (status, allows))
        for path, protocol, status, kind in (
            ("/Service/nobody", "Service", 404, "method_not_implemented"),
            ("/Nobody/add", "Service", 404, "protocol_not_supported"),
            ("/Service/nothing", "Service", 400, None),
            (ADD, "Other", 400, "protocol_not_supported"),
            (ADD, None, 200, None),
        ):
            reply = client.post(path, request_bytes("add", {"a": 1.0, "b": 2.0}, protocol=protocol))
            self.assertEqual((reply.status, kind and reply.error["kind"]), (status, kind))

    def test_what_every_answer_says(self) -> None:
        server = make_server(server_id="0123456789ab")
        client = wsgi_client(server, max_request_bytes=1_000_000, max_response_bytes=2_000_000)
        health = client.get("/health")
        self.assertEqual(health.json, {"status": "ok", "server_id": "0123456789ab", "protocol": "Service"})
        told = {"vgi-supported-encodings": ", ".join(rpc.supported_encodings())}
        told.update({"vgi-externalization-enabled": "false", "vgi-accept-max-response-bytes-support": "true"})
        told.update({"vgi-max-request-bytes": "1000000", "vgi-max-response-bytes": "2000000"})
        for status, reply in {
            200: client.post(ADD, GOOD),
            400: client.post(ADD, b"x"),
            404: client.post("/Service/nobody", GOOD),
            405: client.get(ADD),
            413: client.post(ADD, b"x" * 1_000_001),
            415: client.post(ADD, GOOD, content_type="text/plain"),
        }.items():
            with self.subTest(status=status):
                self.assertEqual(reply.status, status)
                self.assertRegex(reply.headers["x-request-id"], "^[0-9a-f]{16}$")
                self.assertLessEqual(told.items(), reply.headers.items())
                if status in (405, 415):
                    self.assertLessEqual({"code", "message"}, reply.json.keys())
                    self.assertIn("POST" if status == 405 else ARROW, reply.json["message"])
                elif status != 200:
                    self.assertTrue(reply.error["text"])
        bare = wsgi_client(compression_level=None).get("/health").headers
        found = [(name, bare[name]) for name in bare if name.startswith(("vgi-max", "vgi-supp"))]
        self.assertEqual(found, [("vgi-supported-encodings", "")])
        self.assertEqual(wsgi_client(json=False).post_json(ADD, {"a": 1}).status, 415)
        for sent in ("abc-1", "x" * 128, "x" * 129, "a b", "\xff"):
            echoed = sent in ("abc-1", "x" * 128)
            got = client.post(ADD, GOOD, x_request_id=sent).headers["x-request-id"]
            self.assertEqual((got == sent, bool(got)), (echoed, True))

    def test_codings(self) -> None:
        client = wsgi_client(max_request_bytes=1_000_000)
        for coding in rpc.supported_encodings():
            packed = rpc.compress_body([GOOD], coding, 1)
            bomb = rpc.compress_body([b"\0" * 50_000_000], coding, 1)
            for header, body, status in (
                (coding, packed, 200),
                (coding.upper(), packed, 200),
                (coding, GOOD, 400),
                (coding, packed[:-3], 400),
                (coding, b"", 400),
                (coding, bomb, 413),
                (f"{coding}, {coding}", packed, 415),
                ("br", GOOD, 415),
                ("identity", GOOD, 200),
            ):
                with self.subTest(coding=header, size=len(body)):
                    self.assertEqual(client.post(ADD, body, content_encoding=header).status, status)
            self.assertEqual(client.post(ADD, packed, x_vgi_content_encoding=coding).status, 200)
            reply = client.post(ADD, GOOD, accept_encoding=coding)
            self.assertEqual(reply.headers["content-encoding"], coding)
            self.assertEqual(read_stream(reply.body)[0][0].to_pydict(), {"result": [3.0]})
            reply = client.post(ADD, GOOD, accept_encoding=f"{coding}, identity")
            self.assertNotIn("content-encoding", reply.headers)  # too short to be worth it

    def test_response_budgets(self) -> None:
        body = request_bytes("echo_bytes", {"value": b"x" * 100_000})
        for own, status, budgets in (
            (None, 200, ("65536", "1000000", str(2**53 - 1))),
            (None, 400, ("65535", "0", "abc", "065536", "+65536", str(2**53), "65536, 65536")),
            (70_000, 200, ("1000000",)),
        ):
            client = wsgi_client(max_response_bytes=own)
            for budget in budgets:
                reply = client.post("/Service/echo_bytes", body, vgi_accept_max_response_bytes=budget)
                self.assertEqual(reply.status, status, budget)
                if own or budget == "65536":
                    text = rf"echo_bytes.*max_response_bytes \(\d+ > {own or 65536}\)"
                    self.assertRegex(reply.error["text"], text)
                    self.assertEqual(reply.error["type"], "ResponseTooLargeError")
                    self.assertEqual(reply.headers["x-vgi-rpc-error"], "true")
                elif status == 200:
                    self.assertEqual(read_stream(reply.body)[0][0].to_pydict(), {"result": [b"x" * 100_000]})

    def test_cors(self) -> None:
        origin = "https://page.example"
        asked = [("Origin", origin), ("Access-Control-Request-Method", "POST")]
        asked.append(("Access-Control-Request-Headers", "X-Y\r\nZ"))
        exposed = (
            "WWW-Authenticate X-Request-ID X-VGI-Content-Encoding X-VGI-RPC-Error VGI-Auth-Reason".split()
        )
        shown = {"*": "*", (origin,): origin, f"{origin},b": origin, ("b",): None, None: None}
        for allowed, expected in shown.items():
            client = wsgi_client(cors_origins=allowed, authenticate=KNOWN)
            preflight = client.send("OPTIONS", ADD, asked, b"")
            refused = client.post(ADD, GOOD, origin=origin)
            self.assertEqual((preflight.status, refused.status), (200, 401))
            for headers in (preflight.headers, refused.headers):
                self.assertEqual(headers.get("access-control-allow-origin"), expected)
                self.assertEqual(headers.get("cross-origin-resource-policy"), expected and "cross-origin")
            if expected:
                told = refused.headers["access-control-expose-headers"].split(", ")
                self.assertLessEqual({*exposed, "VGI-Supported-Encodings"}, set(told))
                self.assertEqual(preflight.headers["access-control-allow-headers"], "X-YZ")

    def test_hosts(self) -> None:
        proxied = {"x-forwarded-prefix": "/svc"}
        for port, allowed, host, more, status in (
            (0, None, "anything", {}, 200),
            (0, ["a.example"], "A.example:99", {}, 200),
            (0, "a.example, b.example", "b.example", {}, 200),
            (0, ["a.example:8"], "a.example:8", {}, 200),
            (0, ["a.example"], "b.example", {}, 421),
            (0, ["[::1]"], "[::1]:80", {}, 200),
            (0, "*", "b.example", {}, 200),
            (8000, None, "localhost:1", {}, 200),
            (8000, None, "LocalHost", {}, 200),
            (8000, None, "127.0.0.1:8000", {}, 200),
            (8000, None, "[::1]:8", {}, 200),
            (8000, None, "evil.example:8000", {}, 421),
            (8000, None, "evil.example", {}, 421),
            (8000, None, "127.0.0.1.evil.example", {}, 421),
            (8000, "a.example", "a.example:8000", {}, 200),
            (8000, "a.example", "b.example", proxied, 421),
            (8000, "*", "b.example:8000", {}, 200),
            (8000, None, "api.example", proxied, 200),  # a proxy has dialled us under another name
            (8000, None, "api.example:", {"x-forwarded-for": "1.2.3.4"}, 200),
            (8000, None, "api.example:8443", {"forwarded": "for=1.2.3.4"}, 200),
            (8000, None, "evil.example:8000", proxied, 421),  # this is the port that a browser has dialled
            (8000, None, "evil.example:08000", proxied, 421),
            (80, None, "evil.example", proxied, 421),
            (80, None, "api.example:81", proxied, 200),
        ):
            app = rpc.HttpApp(make_server(), rpc.HttpOptions(token_key=KEY, allowed_hosts=allowed))
            app.loopback_port = port
            response = app(rpc.HttpRequest("GET", "/health", {"host": host, **more}))
            self.assertEqual(response.status, status, (port, allowed, host, more))
            self.assertEqual(b"allowed_hosts" in response.body, status == 421)

    def test_wsgi_knows_where_it_is(self) -> None:
        client = wsgi_client()
        for environ, status in (
            ({"SCRIPT_NAME": "/mnt", "RAW_URI": "/mnt/Service/add"}, 200),
            ({"SCRIPT_NAME": "/m n", "REQUEST_URI": "/m%20n/Service/add?x=%41"}, 200),
            ({"RAW_URI": "/v1/Service/add"}, 200),
            ({"RAW_URI": "/Servic%65/add"}, 404),
        ):
            reply = client.send("POST", ADD, [("Content-Type", ARROW)], GOOD, **environ)
            self.assertEqual(reply.status, status, environ)
        app = rpc.make_wsgi_app(make_server(), token_key=KEY)
        for arguments in (({"type": "http"}, None, None), ({"type": "lifespan"},)):
            with self.raises(TypeError, "WSGI", "ASGI"):
                app(*arguments)
        with self.raises(TypeError, "RpcServer", "ServiceImpl"):
            rpc.make_wsgi_app(ServiceImpl())
        environ = {"wsgi.multiprocess": True}
        with mock.patch.dict(os.environ, {"VGI_RPC_TOKEN_KEY": ""}), self.assertLogs("vgi_rpc", "WARNING"):
            client = wsgi_client(token_key=None)
        body = request_bytes("running", {"label": "x"})
        reply = client.send("POST", "/Service/running/init", [("Content-Type", ARROW)], body, **environ)
        self.assertEqual((reply.status, reply.error["code"]), (500, "FAILED_PRECONDITION"))
        self.assertEqual(client.send("POST", ADD, [("Content-Type", ARROW)], GOOD, **environ).status, 200)

    def test_options(self) -> None:
        for prefix in ("/api", "api/", "/a/b"):
            client = wsgi_client(prefix=prefix)
            base = "/" + prefix.strip("/")
            self.assertEqual(client.post(f"{base}/Service/add", GOOD).status, 200)
            self.assertEqual(client.get(f"{base}/health").status, 200)
            for path in (ADD, f"{base}x/Service/add", f"{base}{base}/Service/add", "/health"):
                self.assertEqual(client.post(path, GOOD).status, 404)
        with self.raises(TypeError, "token_keys"):
            rpc.make_wsgi_app(make_server(), token_keys=KEY)
        for name in ("max_request_bytes", "max_response_bytes", "max_rows"):
            for value in (-1, 0, True, "5"):
                with self.raises(ValueError, name, repr(value)):
                    rpc.make_wsgi_app(make_server(), token_key=KEY, **{name: value})
        for key in (b"short", ["text"], 5):
            with self.raises((TypeError, ValueError), "token_key"):
                rpc.make_wsgi_app(make_server(), token_key=key)

    def test_a_start_that_fails_is_tried_again(self) -> None:
        class Starting(ServiceImpl):
            def on_serve_start(self, kind: Any) -> None:
                if not self.kept:
                    self.kept.append(1)
                    raise RuntimeError("not yet")

        client = wsgi_client(RpcServer(Service, Starting()))
        reply = client.post(ADD, GOOD)
        self.assertEqual((reply.status, reply.error["code"]), (500, "UNAVAILABLE"))
        self.assertEqual(client.post(ADD, GOOD).status, 200)

    def test_the_access_log_has_a_line_for_each_answer(self) -> None:
        def refuse(request: Any) -> AuthContext:
            if request.get_header("authorization") != "good":
                raise ValueError("secret")
            return AuthContext("d", True, "p\ud800")

        server = make_server()
        with tempfile.TemporaryDirectory() as folder:
            path = pathlib.Path(folder, "log")
            rpc.configure_access_log(str(path), server)
            client = wsgi_client(server, authenticate=refuse, max_request_bytes=1000)
            good = {"authorization": "good"}
            client.post(ADD, GOOD)
            client.post(ADD, GOOD, **good)
            client.post("/Service/nope", GOOD, **good)
            client.post(ADD, b"secret", **good)
            client.post(ADD, GOOD * 9, **good)
            client.post_json(ADD, {"a": "secret"}, **good)
            text = path.read_text()
            server.access_log.close()
        lines = [json.loads(line) for line in text.splitlines()]
        self.assertEqual([line["http_status"] for line in lines], [401, 200, 404, 400, 413, 400])
        self.assertEqual([line["method"] for line in lines], ["add", "add", "nope", "add", "add", "add"])
        self.assertEqual([line["status"] for line in lines], ["error", "ok", *["error"] * 4])
        self.assertNotIn("secret", text)

    def test_credentials(self) -> None:
        client = wsgi_client(authenticate=KNOWN)
        for reason, credentials in (
            ("missing_credential", ("", "Basic YTpi")),
            ("invalid_credential", ("Bearer", "Bearer ", "Bearer  ada ", "Bearer ada x", "Bearer ad")),
            ("invalid_credential", ("Bearer adA", "Bearer " + "x" * 100_000, "Bearer \xe9")),
        ):
            for given in credentials:
                with self.subTest(given=given[:100]):
                    reply = client.post(ADD, GOOD, authorization=given)
                    told = {"error": "unauthorized", "reason": reason, "code": "unauthenticated"}
                    told["message"] = reply.json["detail"]
                    self.assertLessEqual(told.items(), reply.json.items())
                    told = {
                        "vgi-auth-reason": reason,
                        "cache-control": "no-store",
                        "www-authenticate": "Bearer",
                    }
                    self.assertEqual(reply.status, 401)
                    self.assertLessEqual(told.items(), reply.headers.items())
                    self.assertNotIn("ada", re.sub('_id": "[0-9a-f]*', "", reply.body.decode()))
        for given in ("Bearer ada", "bearer ada"):
            self.assertEqual(client.post(ADD, GOOD, authorization=given).status, 200)
        self.assertEqual(client.get("/health").status, 200)

    def test_strangers_learn_nothing(self) -> None:
        client = wsgi_client(authenticate=KNOWN)
        seen = set()
        for method in ("GET", "HEAD", "POST", "PUT"):
            for path in [ADD, *"/Service/nope /Nobody/add / /describe /x/y/z/a /Service/count/init".split()]:
                reply = client.send(method, path, [("Content-Type", ARROW)], b"")
                body = {k: v for k, v in reply.json.items() if k != "request_id"} if method != "HEAD" else {}
                seen.add((reply.status, json.dumps(body) if body else "", *sorted(reply.headers)))
        self.assertEqual({(status, bool(body)) for status, body, *_ in seen}, {(401, True), (401, False)})
        self.assertEqual(len(seen), 2)

    def test_what_callbacks_raise(self) -> None:
        failure = rpc.AuthFailure(rpc.AuthReason.EXPIRED_CREDENTIAL, "why")
        reasons = {ValueError("why"): "unauthorized", PermissionError("why"): "unauthorized"}
        for exc, reason in {**reasons, failure: "expired_credential"}.items():
            client = wsgi_client(authenticate=mock.Mock(side_effect=exc, challenge="Own"))
            reply = client.post(ADD, GOOD)
            self.assertEqual((reply.status, reply.headers["vgi-auth-reason"]), (401, reason))
            self.assertEqual((reply.json["detail"], reply.headers["www-authenticate"]), ("why", "Own"))
        secrets = (KeyError("a secret"), SystemExit("a secret"))
        for broken in (*[{"side_effect": secret} for secret in secrets], {"return_value": "x"}):
            with self.assertLogs("vgi_rpc", "ERROR"):
                reply = wsgi_client(authenticate=mock.Mock(**broken)).post(ADD, GOOD)
            self.assertEqual((reply.status, reply.error["code"]), (500, "INTERNAL"))
            self.assertNotIn(b"secret", reply.body)

    def test_html_for_browsers_and_nothing_raw_in_it(self) -> None:
        client = wsgi_client(authenticate=mock.Mock(side_effect=ValueError("<script>"), challenge=""))
        reply = client.get(ADD, accept="text/html,*/*")
        self.assertEqual((reply.status, reply.headers["www-authenticate"]), (401, "Bearer"))
        self.assertTrue(reply.headers["content-type"].startswith("text/html"))
        self.assertNotIn(b"<script>", reply.body)
        reply = wsgi_client().get("/nowhere", accept="text/html")
        self.assertEqual((reply.status, reply.headers["content-type"]), (404, "text/html; charset=utf-8"))

    def test_chains(self) -> None:
        client = wsgi_client(authenticate=rpc.chain_authenticate(KNOWN, by_header))
        for headers, status, reason in (
            ({"authorization": "Bearer ada"}, 200, None),
            ({"x_user": "bob"}, 200, None),
            ({"authorization": "Bearer wrong", "x_user": "bob"}, 200, None),
            ({}, 401, "missing_credential"),
            ({"authorization": "Bearer wrong"}, 401, "invalid_credential"),
            ({"x_user": "banned"}, 401, "unauthorized"),
        ):
            reply = client.post(ADD, GOOD, **headers)
            self.assertEqual((reply.status, reply.headers.get("vgi-auth-reason")), (status, reason))
        self.assertRaises(ValueError, rpc.chain_authenticate)
        reply = client.post_json("/Service/context", {}, authorization="Bearer ada")
        self.assertEqual([reply.json["result"][key] for key in ("principal", "domain")], ["ada", "static"])
        self.assertEqual(rpc.current_auth(), AuthContext.anonymous())


def clock(seconds: float) -> Any:
    """Turn the clock of all sealers that are made within it."""
    late = functools.partial(rpc.TokenSealer, clock=lambda: time.time() + seconds)
    return mock.patch.object(rpc, "TokenSealer", late)


@dataclass
class UnreadMoment(ProducerState):
    """In UTC, in which it is read back, Python does not have this moment."""

    at: Annotated[datetime.datetime, ArrowType(pa.timestamp("us", tz="UTC"))] = datetime.datetime(
        1, 1, 1, tzinfo=datetime.timezone(datetime.timedelta(hours=5))
    )

    def produce(self, out: OutputCollector, ctx: CallContext) -> None:
        out.emit_pydict({"value": [1]})


@dataclass
class UnreadDefault(UnreadMoment):
    """What does not travel has a default that can be had once."""

    at: Annotated[Any, Transient()] = field(default_factory=[1].pop)


@dataclass
class UnreadAttribute(UnreadMoment):
    """Takes its attribute in the first instance alone."""

    at: list[int] = field(default_factory=list)
    made: ClassVar[list[Any]] = []

    def __setattr__(self, name: str, value: Any) -> None:
        if self.made and self not in [self.made[0]]:
            raise ValueError("no second one")
        self.made.append(self)
        object.__setattr__(self, name, value)

    def __eq__(self, other: object) -> bool:
        return self is other


@dataclass
class UnreadBytes(UnreadMoment):
    """Cannot read what it writes."""

    at: int = 0

    @classmethod
    def deserialize_from_bytes(cls, data: bytes, ipc_validation: Any = None) -> Any:
        raise TypeError("Unread: no such bytes")


class HttpTokenTests(TestCase):
    """Streams held by their tokens."""

    def refused(self, reply: Reply) -> str:
        """The text of a refusal."""
        self.assertEqual((reply.status, reply.error["type"]), (400, "TokenError"))
        return str(reply.error["text"])

    def test_damaged_tokens(self) -> None:
        stream = RawStream(wsgi_client(), "running", {"label": "r"})
        texts = set()
        batch = values(1.0).batch
        state = stream.tokens[STATE]
        fixed = stream.tokens[CALL_STATE]
        for key in (STATE, CALL_STATE):
            token = stream.tokens[key]
            bad: list[Any] = [None, b"", b"\xff" * 20, token + b"A", token.replace(b"=", b""), b"A" * 100_000]
            for at in range(0, len(token) - 1, 5):
                other = b"B" if token[at : at + 1] == b"A" else b"A"
                bad += [token[:at] + other + token[at + 1 :], token[:at]]
            texts |= {self.refused(stream.exchange(batch, {key: b})) for b in bad if b != token}
        for swapped in ((fixed, state), (fixed, fixed), (state, state)):
            texts.add(self.refused(stream.exchange(batch, dict(zip((STATE, CALL_STATE), swapped)))))
        self.assertEqual(len(texts), 1)
        self.assertEqual(stream.exchange(batch).status, 200)

    def test_tokens_of_another_stream_method_or_caller(self) -> None:
        anyone = rpc.chain_authenticate(KNOWN, lambda request: AuthContext.anonymous())
        client = wsgi_client(authenticate=anyone)
        batch = values(1.0).batch
        who = {name: {"authorization": f"Bearer {name}"} for name in PEOPLE} | {"": {}}
        streams = {name: RawStream(client, "running", {"label": "r"}, **who[name]) for name in who}
        for one, stream in streams.items():
            for other, headers in who.items():
                if other != one:
                    self.refused(stream.exchange(batch, **headers))
            self.assertEqual(stream.exchange(batch, **who[one]).status, 200)
        one = RawStream(client, "running", {"label": "r"})
        two = RawStream(client, "running", {"label": "r"})
        self.refused(one.exchange(batch, {CALL_STATE: two.tokens[CALL_STATE]}))
        self.refused(one.exchange(batch, {STATE: two.tokens[STATE]}))
        self.assertEqual(one.exchange(batch, two.tokens).status, 200)
        one.path = "/Service/filter"
        self.refused(one.exchange(batch))

    def test_keys_and_age(self) -> None:
        stream = RawStream(wsgi_client(), "running", {"label": "r"})
        batch = values(1.0).batch
        keys = ((KEY, True), (b"another" * 4, False), ([b"new" * 8, KEY], True))
        for key, good in (*keys, (f"{'n' * 20},{KEY.decode()}", True)):
            stream.client = wsgi_client(token_key=key)
            self.assertEqual(stream.exchange(batch).status == 200, good, key)
            stream = RawStream(wsgi_client(), "running", {"label": "r"})
        for seconds, ttl, text in ((59, 60, ""), (62, 60, "expired"), (62, 0, ""), (-1000, 60, "future")):
            stream = RawStream(wsgi_client(), "running", {"label": "r"})
            with clock(seconds):
                stream.client = wsgi_client(token_ttl=ttl)
            reply = stream.exchange(batch)
            if text:
                self.assertIn(text, self.refused(reply))
            else:
                self.assertEqual(reply.status, 200)
        stream = RawStream(wsgi_client(), "running", {"label": "r"})
        for turn in range(1, 5):  # a long stream outlives the age of its call half
            with clock(50 * turn):
                stream.client = wsgi_client(token_ttl=60)
            self.assertEqual(stream.exchange(batch).status, 200)
        with mock.patch.dict(os.environ, {"VGI_RPC_TOKEN_KEY": KEY.decode()}):
            stream = RawStream(wsgi_client(token_key=None), "running", {"label": "r"})
        stream.client = wsgi_client()
        self.assertEqual(stream.exchange(batch).status, 200)

    def test_another_version_of_the_service(self) -> None:
        def client_of(fields: Any, fixed: Any = int, late: Any = None) -> WsgiClient:
            def exchange(self: Any, input: Any, out: Any, ctx: Any) -> None:
                out.emit_pydict({"value": [1.0]})

            def rehydrate(self: Any, implementation: Any) -> None:
                if late is not None:
                    raise late

            kind = fixed and make_dataclass("Fixed", [("scale", fixed)], bases=(ArrowSerializableDataclass,))
            members = {"exchange": exchange, "rehydrate": rehydrate, "CALL_STATE_TYPE": kind}
            state = make_dataclass("State", fields, bases=(ExchangeState,), namespace=members)

            def running(self: Any) -> Any:
                return Stream(VALUE, state(1, 2), input_schema=VALUE, call_state=kind(3))

            running.__annotations__["return"] = Stream[state]
            service = type("Service", (), {"running": running})
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
        body = ipc_bytes(pa.schema([]), (rpc.TICK, request_metadata("running")))
        for name, (version, error) in versions.items():
            with self.subTest(name):
                reply = client_of(same).post("/Service/running/init", body)
                sent = (values(1.0).batch, read_stream(reply.body)[0][1])
                reply = client_of(*version).post("/Service/running/exchange", ipc_bytes(VALUE, sent))
                if error == "TokenError":
                    self.assertIn("another version of the service", self.refused(reply))
                else:
                    found = reply.error["type"] if "x-vgi-rpc-error" in reply.headers else ""
                    self.assertEqual((reply.status, found), (200, error))

    def test_what_the_answers_carry(self) -> None:
        client = wsgi_client()
        empty = values(1.0).batch.slice(0, 0)
        for method in ("running", "filter"):
            stream = RawStream(client, method, {"label": "r"} if method == "running" else {"pause": 0.0})
            self.assertEqual(stream.tokens.keys(), {STATE, CALL_STATE})
            for batch in (empty, values(-1.0).batch, values(1.0).batch):
                ((answer, metadata),) = read_stream(stream.exchange(batch).body)
                self.assertEqual(metadata.keys() & {STATE, CALL_STATE}, {STATE})
                self.assertEqual(answer.schema.names[0], "label" if method == "running" else "value")
        stream = RawStream(client, "ticks")
        reply = stream.exchange(metadata={b"own": b"1"})
        self.assertEqual(read_stream(reply.body)[0][0].to_pydict(), {"value": ['{"own": "1"}']})
        stream = RawStream(client, "once")
        self.assertEqual(([b.num_rows for b, _ in read_stream(stream.reply.body)], stream.tokens), ([1], {}))
        stream = RawStream(client, "plain", {"limit": 1, "rows": [1], "pause": 0.0})
        self.assertEqual(read_stream(stream.exchange().body), [])
        stream = RawStream(client, "running", {"label": "r"})
        for items in ([], [(empty, stream.tokens), (empty, None)]):
            reply = client.post("/Service/running/exchange", ipc_bytes(VALUE, *items))
            self.assertEqual(reply.status, 400)
        reply = client.post("/Service/running/exchange", ipc_bytes(VALUE, (empty, stream.tokens)) + b"x")
        self.assertEqual(reply.status, 400)

    def test_states_that_are_written_but_not_read_back(self) -> None:
        class Unread:
            def moment(self) -> Stream[UnreadMoment]:
                return Stream(INTEGERS, UnreadMoment())

            def default(self) -> Stream[UnreadDefault]:
                return Stream(INTEGERS, UnreadDefault())

            def attribute(self) -> Stream[UnreadAttribute]:
                return Stream(INTEGERS, UnreadAttribute())

            def bytes(self) -> Stream[UnreadBytes]:
                return Stream(INTEGERS, UnreadBytes())

        with rpc.http_connect(Unread, client=rpc.make_sync_client(rpc.RpcServer(Unread, Unread()))) as proxy:
            for name in ("moment", "default", "attribute", "bytes"):
                with self.subTest(name), self.raises(RpcError, "TypeError: Unread"):
                    getattr(proxy, name)().tick()

    @mock.patch.object(rpc, "MAX_TURNS_SECONDS", 60.0)  # a busy machine ends an answer no sooner
    def test_several_turns(self) -> None:
        client = wsgi_client()

        def batches(reply: Reply) -> list[Any]:
            sent = read_stream(reply.body)
            return [b.column(0).to_pylist() for b, m in sent if not m.keys() & {STATE, CALL_STATE}]

        def stream_of(limit: int, rows: list[int], pause: float = 0.0, **headers: str) -> RawStream:
            return RawStream(client, "plain", {"limit": limit, "rows": rows, "pause": pause}, **headers)

        for asked, turns in (("1", 1), ("3", 3), ("", 1), ("99999999", 10)):
            stream = stream_of(10, [2, 0], vgi_max_turns=asked)
            self.assertEqual(batches(stream.reply), [[i] * (2 - 2 * (i % 2)) for i in range(turns)])
            self.assertEqual(bool(stream.tokens), turns < 10)
        stream = stream_of(1000, [1], vgi_max_turns="100")  # the rest of it, from a cursor in its middle
        seen = batches(stream.reply)
        while len(seen) < 1000:
            seen += batches(stream.exchange(vgi_max_turns="300"))
        self.assertEqual(seen, [[i] for i in range(1000)])
        with mock.patch.object(rpc, "MAX_TURNS_SECONDS", 0.01):
            stream = stream_of(10, [1], 0.02, vgi_max_turns="9")  # slow: answered turn by turn
        self.assertEqual(batches(stream.reply), [[0]])
        with mock.patch.object(rpc, "MAX_TURNS_BYTES", 100_000):
            stream = stream_of(9, [10_000], vgi_max_turns="9")  # large: about 80 kB each
            self.assertEqual(len(batches(stream.reply)), 2)
        budget = {"vgi_accept_max_response_bytes": "100000", "vgi_max_turns": "9"}
        stream = stream_of(9, [3000], **budget)  # 24 kB each: what does not fit is not lost
        seen = batches(stream.reply)
        self.assertLess(len(stream.reply.body), 100_000)
        while len(seen) < 9:
            reply = stream.exchange(**budget)
            self.assertLess(len(reply.body), 100_000)
            seen += batches(reply)
        self.assertEqual([row[0] for row in seen], list(range(9)))
        stream = stream_of(9, [1, 1, 20_000], **budget)  # one that never fits is an error, and the last thing
        self.assertEqual(batches(stream.reply), [[0], [1]])
        reply = stream.exchange(**budget)
        self.assertEqual((reply.error["type"], len(read_stream(reply.body))), ("ResponseTooLargeError", 1))
        stream = RawStream(client, "misbehaving", {"how": "raise"}, vgi_max_turns="9")
        self.assertEqual((stream.reply.error["type"], stream.tokens), ("LookupError", {}))
        self.assertEqual(read_stream(stream.reply.body)[0][0].to_pydict(), {"value": [1]})
        self.assertEqual(stream.reply.headers["x-vgi-rpc-error"], "true")
        stream = RawStream(client, "misbehaving", {"how": "state"}, vgi_max_turns="9")
        self.assertIn("Misbehaving.at", stream.reply.error["text"])

    def test_the_budget_of_init_stays_with_the_stream(self) -> None:
        client = wsgi_client()
        few = "65536"
        many = "1000000"
        for budget, later, fits in (
            (few, "", False),
            (few, many, False),
            (many, "", True),
            (many, few, False),
        ):
            stream = RawStream(client, "filter", {"pause": 0.0}, vgi_accept_max_response_bytes=budget)
            reply = stream.exchange(values(*[1.0] * 10_000).batch, vgi_accept_max_response_bytes=later)
            if fits:
                self.assertEqual(read_stream(reply.body)[0][0].num_rows, 10_000)
            else:
                self.assertEqual(reply.error["type"], "ResponseTooLargeError")
                self.assertFalse([m for _, m in read_stream(reply.body) if STATE in m])

    def test_inputs_with_dictionaries(self) -> None:
        kind = pa.dictionary(pa.int8(), pa.utf8())
        schema = pa.schema([("value", kind)])

        class Same(ExchangeState):
            def exchange(self, input: AnnotatedBatch, out: OutputCollector, ctx: CallContext) -> None:
                out.emit(input.batch)

        class Words:
            def words(self) -> Stream[Same]:
                return Stream(schema, Same(), input_schema=schema)

        dataclasses.dataclass(Same)
        Words.words.__annotations__["return"] = Stream[Same]
        client = wsgi_client(RpcServer(Words, Words()))
        body = ipc_bytes(pa.schema([]), (rpc.TICK, request_metadata("words", "Words")))
        tokens = read_stream(client.post("/Words/words/init", body).body)[0][1]
        for given, status in ((kind, 200), (pa.dictionary(pa.int16(), pa.utf8()), 400)):
            column = pa.array(["a", "b", "a"]).dictionary_encode().cast(given)
            batch = pa.RecordBatch.from_arrays([column], ["value"])
            reply = client.post("/Words/words/exchange", ipc_bytes(batch.schema, (batch, tokens)))
            self.assertEqual(reply.status, status)
            if status == 200:
                self.assertEqual(read_stream(reply.body)[0][0].to_pydict(), {"value": ["a", "b", "a"]})


@dataclass
class FarState(ProducerState):
    """Emits a date in a list that Python does not have."""

    def produce(self, out: OutputCollector, ctx: CallContext) -> None:
        out.emit(pa.RecordBatch.from_pydict({"x": pa.array([[10**7]], pa.list_(pa.date32()))}))


class JsonCallTests(TestCase):
    """Calls in JSON."""

    def test_answers(self) -> None:
        client = wsgi_client()
        kind = {"content_type": "application/json"}
        dataclass = {"result": {"x": 1, "color": "RED", "note": None}}
        for method, body, headers, status, found in (
            ("add", b'{"a": 1, "b": 2.5}', kind, 200, {"result": 3.5}),
            ("add", b'{"a": 1}', {"content_type": "application/json; charset=utf-8"}, 200, {"result": 3.0}),
            ("add", b'{"a": 1}', {"content_type": "Application/JSON"}, 200, {"result": 3.0}),
            ("add", b'{"a": 1}', {"content_type": "application/json; x"}, 415, "invalid_argument"),
            ("add", b'{"a": 1}', {"content_type": "text/plain"}, 415, "invalid_argument"),
            ("add", b'{"a": 1}', {"content_type": ""}, 415, "invalid_argument"),
            ("nothing", b"{}", kind, 200, {"result": None}),
            ("defaults", b"", {"content_type": ""}, 200, {"result": "9 a BLUE"}),
            ("defaults", b"", kind, 200, {"result": "9 a BLUE"}),
            ("echo_dataclass", b'{"value": {"x": 1}}', kind, 200, dataclass),
            *[
                ("add", bad, kind, 400, "invalid_argument")
                for bad in (b"", b"{}", b"{", b"[1]", b'{"a": "x"}')
            ],
            ("add", b'{"a": NaN}', kind, 400, "invalid_argument"),
            ("add", b'{"a": 1, "a": 2}', kind, 400, "invalid_argument"),
            ("add", b'{"a": 1, "c": 1}', kind, 400, "invalid_argument"),
            ("add", b'{"a": 1}' + b" " * (1 << 20), kind, 413, "resource_exhausted"),
            ("nobody", b"{}", kind, 404, "unimplemented"),
            ("fail", b'{"how": "KeyError"}', kind, 500, "unknown"),
            ("refuse", b"{}", kind, 429, "resource_exhausted"),
            ("running", b"{}", kind, 415, "unimplemented"),
            ("count/init", b'{"limit": 1}', kind, 415, "unimplemented"),
            ("add", b'{"a": 1}', {**kind, "connect_protocol_version": "1"}, 200, {"result": 3.0}),
            ("add", b'{"a": 1}', {**kind, "connect_protocol_version": "2"}, 400, "invalid_argument"),
            ("add", b'{"a": 1}', {**kind, "connect_timeout_ms": "60000"}, 200, {"result": 3.0}),
            ("add", b'{"a": 1}', {**kind, "connect_timeout_ms": "x"}, 400, "invalid_argument"),
            ("add", b'{"a": 1}', {**kind, "connect_timeout_ms": "0"}, 504, "deadline_exceeded"),
        ):
            with self.subTest(method, body=body[:30], headers=headers):
                reply = client.post(f"/Service/{method}", body, **headers)
                self.assertEqual(reply.status, status, reply)
                self.assertEqual(reply.json.get("code", reply.json), found)
                self.assertEqual("traceback" in reply.json, method in ("fail", "refuse") or status == 504)
                if status == 415 and method == "add":
                    self.assertIn("-H 'Content-Type: application/json'", reply.json["message"])
        hidden = wsgi_client(make_server(include_tracebacks=False))
        self.assertNotIn("traceback", hidden.post_json("/Service/fail", {"how": "KeyError"}).json)

    def test_rows_of_producers(self) -> None:
        client = wsgi_client()

        def lines(method: str, given: Any, **headers: str) -> list[Any]:
            reply = client.post_json(f"/Service/{method}", given, **headers)
            self.assertEqual((reply.status, reply.headers["content-type"]), (200, "application/x-ndjson"))
            return [json.loads(line) for line in reply.body.splitlines()]

        self.assertEqual(lines("plain", {"limit": 3, "rows": [0, 2]}), [{"value": 1}, {"value": 1}])
        self.assertEqual(lines("plain", {"limit": 0}), [])
        header = {"__header__": {"total": 1, "text": "counting"}}
        self.assertEqual(lines("count_with_header", {"limit": 1}), [header, {"value": 0}])
        body = wsgi_client(RpcServer(People, People())).post_json("/People/count", {"n": 1}).body
        header = json.loads(body.splitlines()[0])["__header__"]
        self.assertEqual((header["key"], header["price"]), (str(uuid.UUID(int=1)), "1.0000"))
        *rows, error = lines("misbehaving", {"how": "raise"})
        self.assertEqual((rows, error["__error__"]["code"]), ([{"value": 1}], "unknown"))
        *rows, error = lines("plain", {"limit": 20_000, "rows": [100]}, vgi_accept_max_response_bytes="65536")
        self.assertIn("max_response_bytes", error["__error__"]["message"])
        self.assertLess(len(rows), 20_000)
        for method, status in (("init_fails", 500), ("not_a_stream", 400)):
            reply = client.post_json(f"/Service/{method}", {})
            self.assertEqual((reply.status, reply.headers["content-type"]), (status, "application/json"))

    def test_a_value_without_words_in_json_ends_its_call(self) -> None:
        batch = pa.RecordBatch.from_pydict({"x": pa.array([[10**7]], pa.list_(pa.date32()))})

        class Far:
            def far(self) -> pa.RecordBatch:
                return batch

            def rows(self) -> Stream[FarState]:
                return Stream(batch.schema, FarState())

        server: Any = rpc.RpcServer(Far, Far())
        with tempfile.TemporaryDirectory() as folder:
            rpc.configure_access_log(path := os.path.join(folder, "log"), server)
            self.assertEqual(wsgi_client(server).post_json("/Far/far", {}).status, 500)
            reply = wsgi_client(server).post_json("/Far/rows", {})
            self.assertEqual((reply.status, list(reply.json)), (200, ["__error__"]))
            server.access_log.close()
            with open(path) as log:
                told = [json.loads(line) for line in log]
            self.assertEqual([line["method_type"] for line in told], ["unary", "stream"])
            self.assertEqual({line["status"] for line in told}, {"error"})

    def test_rows_that_nobody_reads_to_their_end(self) -> None:
        server = make_server()
        app = rpc.HttpApp(server, rpc.HttpOptions(token_key=KEY))
        body = b'{"limit": 1000000}'
        headers = {"content-type": "application/json", "content-length": str(len(body))}
        for reads in (0, 1, 5):
            response = app(rpc.HttpRequest("POST", "/Service/plain", headers, read_body=lambda limit: body))
            seen = [next(response.body) for _ in range(reads)]
            self.assertEqual((len(seen), server.running), (reads, 1))
            response.body.close()
            response.body.close()
            self.assertEqual((server.running, list(response.body)), (0, []))


class RawHttp:
    """A socket to an HTTP server, and a reader of answers that trusts nothing."""

    def __init__(self, port: int) -> None:
        self.socket = socket.create_connection(("127.0.0.1", port), WATCHDOG_SECONDS / 2)
        self.file = self.socket.makefile("rb")

    def send(self, data: bytes) -> None:
        """Send; a server that has already hung up is no failure."""
        with contextlib.suppress(ConnectionError):
            self.socket.sendall(data)

    def blank_line(self) -> None:
        line = self.file.readline()
        assert line == b"\r\n", line

    def answer(self, head_only: bool = False) -> Reply:
        """Read one answer; its framing must be right."""
        version, status, _ = self.file.readline().decode("latin-1").split(" ", 2)
        assert version == "HTTP/1.1", version
        headers: dict[str, str] = {}
        for line in iter(self.file.readline, b"\r\n"):
            name, _, value = line.decode("latin-1").rstrip("\r\n").partition(": ")
            assert name.lower() not in headers, name
            headers[name.lower()] = value
        body = b""
        if "transfer-encoding" in headers:
            while size := int(self.file.readline(), 16):
                body += self.file.read(size)
                self.blank_line()
            self.blank_line()
        elif not head_only:
            body = self.file.read(int(headers.get("content-length", "-1")))  # or to the end
        return Reply(int(status), headers, body)

    def ask(self, data: bytes) -> Reply:
        """Send and read the answer."""
        self.send(data)
        return self.answer()

    def ended(self) -> bool:
        """Whether the server hangs up."""
        with contextlib.suppress(ConnectionError):
            return self.file.read(1) == b""
        return True

    def __enter__(self) -> RawHttp:
        return self

    def __exit__(self, *exc: object) -> None:
        self.file.close()
        self.socket.close()


def raw_post(
    path: str, body: bytes, *lines: str, kind: str = "application/json", version: str = "1.1"
) -> bytes:
    """A request in bytes."""
    head = http_head(f"Content-Length: {len(body)}", *lines, start=f"POST {path} HTTP/{version}")
    return head.replace(ARROW.encode(), kind.encode()) + body


class HttpServerTests(TestCase):
    """The HTTP/1.1 server, by raw bytes."""

    @classmethod
    def setUpClass(cls) -> None:
        _, cls.port = in_thread(rpc.serve_http, make_server(), token_key=KEY, max_request_bytes=1_000_000)

    def test_the_framing_table(self) -> None:
        for status, data in DECIDED_BY_HEAD + DECIDED_LATER:
            with self.subTest(data[:300]), RawHttp(self.port) as raw:
                reply = raw.ask(data)
                self.assertEqual(reply.status, status)
                self.assertTrue(reply.headers["x-request-id"])
                self.assertTrue(reply.headers["date"].endswith(" GMT"))
                if status not in (200, 404, 405) and b"VGI-Accept" not in data:
                    self.assertEqual((reply.headers.get("connection"), raw.ended()), ("close", True))
                if status == 413:
                    self.assertEqual(reply.headers["vgi-max-request-bytes"], "1000000")
        with RawHttp(self.port) as raw:
            self.assertEqual(raw.ask(ASKED).status, 200)

    def test_keep_alive_and_pipelining(self) -> None:
        with RawHttp(self.port) as raw:
            raw.send(ASKED * 3)
            self.assertEqual([raw.answer().status for _ in range(3)], [200] * 3)
            self.assertEqual(raw.ask(http_head(start="GET /nowhere HTTP/1.1")).status, 404)
            for byte in ASKED:
                raw.send(bytes([byte]))
            self.assertEqual(raw.answer().status, 200)
            large = request_bytes("echo_bytes", {"value": os.urandom(900_000)})
            reply = raw.ask(raw_post("/Service/echo_bytes", large, kind=ARROW))
            self.assertGreater(len(reply.body), 900_000)
            self.assertEqual(raw.ask(ASKED).status, 200)
        for line, start in (
            ("Connection: close", "POST /Service/add HTTP/1.1"),
            ("Connection: Keep-Alive, CLOSE", "POST /Service/add HTTP/1.1"),
            ("X: y", "POST /Service/add HTTP/1.0"),
        ):
            with RawHttp(self.port) as raw:
                self.assertEqual(raw.ask(http_head(LENGTH, line, start=start) + GOOD).status, 200)
                self.assertTrue(raw.ended())

    def test_head_continue_and_a_body_that_was_refused(self) -> None:
        with RawHttp(self.port) as raw:  # the body is not the next request
            smuggled = raw_post(ADD, http_head(start=GET_HEALTH), kind="text/plain")
            self.assertEqual((raw.ask(smuggled).status, raw.ended()), (415, True))
        with RawHttp(self.port) as raw:
            raw.send(http_head(start="HEAD /health HTTP/1.1"))
            self.assertGreater(int(raw.answer(head_only=True).headers["content-length"]), 0)
            raw.send(http_head(LENGTH, "Expect: 100-continue"))
            self.assertEqual(raw.file.readline() + raw.file.readline(), b"HTTP/1.1 100 Continue\r\n\r\n")
            self.assertEqual(raw.ask(GOOD).status, 200)
            raw.send(http_head(LENGTH, "Expect: 100-continue", start="POST /Service/add HTTP/1.0") + GOOD)
            self.assertEqual(raw.answer().status, 200)

    def test_rows_as_they_are_made(self) -> None:
        body = json.dumps({"limit": 3}).encode()
        with RawHttp(self.port) as raw:
            for version, framing in (("1.1", "transfer-encoding"), ("1.0", "connection")):
                reply = raw.ask(raw_post("/Service/plain", body, version=version))
                self.assertEqual(reply.body, b'{"value": 0}\n{"value": 1}\n{"value": 2}\n')
                self.assertIn(framing, reply.headers)
            self.assertTrue(raw.ended())

    def test_slow_silent_and_vanished_clients(self) -> None:
        _, port = in_thread(
            rpc.serve_http, make_server(), token_key=KEY, read_timeout=0.2, keep_alive_timeout=0.2
        )
        with contextlib.ExitStack() as stack:
            sockets = (stack.enter_context(RawHttp(port)) for _ in range(5))
            silent, half_head, half_body, vanished, idle = sockets
            half_head.send(ASKED[:20])
            half_body.send(ASKED[:-5])
            vanished.send(ASKED[:-5])
            vanished.socket.shutdown(socket.SHUT_WR)
            self.assertEqual(idle.ask(ASKED).status, 200)
            for raw in (silent, half_head, idle):
                self.assertTrue(raw.ended())
            self.assertEqual((half_body.answer().status, half_body.ended()), (408, True))
            vanished.file.read()

    def test_a_client_that_reads_nothing(self) -> None:
        server = make_server()
        _, port = in_thread(rpc.serve_http, server, token_key=KEY, read_timeout=0.2, request_deadline=0.2)
        body = json.dumps({"limit": 10**9, "rows": [10_000]}).encode()
        with RawHttp(port) as raw:
            raw.send(raw_post("/Service/plain", body))
            self.assertEqual(raw.socket.recv(5), b"HTTP/")
            while server.running:
                time.sleep(0.01)

    def test_a_cap_on_connections(self) -> None:
        _, port = in_thread(rpc.serve_http, make_server(), token_key=KEY, max_connections=2)
        with contextlib.ExitStack() as stack:
            for _ in range(2):
                self.assertEqual(stack.enter_context(RawHttp(port)).ask(ASKED).status, 200)
            with RawHttp(port) as refused:
                reply = refused.ask(ASKED)
                told = (reply.status, reply.headers["retry-after"], refused.ended())
                self.assertEqual(told, (503, "1", True))
            with RawHttp(port) as asking:
                self.assertEqual(asking.ask(http_head(start=GET_HEALTH)).status, 200)

    def test_hosts_and_a_server_for_all(self) -> None:
        proxied = "X-Forwarded-Proto: https"
        hosts = {("localhost:1", "X: y"): 200, ("evil.example:8000", "X: y"): 421}
        hosts |= {("api.example", proxied): 200, (f"evil.example:{self.port}", proxied): 421}
        for (host, line), status in hosts.items():
            for start in (GET_HEALTH, f"GET http://{host}/health HTTP/1.1"):
                with RawHttp(self.port) as raw:
                    asked = http_head(line, start=start, host=f"Host: {host}")
                    self.assertEqual(raw.ask(asked).status, status)
        with self.assertLogs("vgi_rpc", "WARNING") as seen:
            _, port = in_thread(rpc.serve_http, make_server(), token_key=KEY, host="0.0.0.0")
        self.assertIn("without authentication", seen.output[0])
        with RawHttp(port) as raw:
            self.assertEqual(raw.ask(http_head(start=GET_HEALTH, host="Host: any.example")).status, 200)

    def test_a_client_that_leaves_in_a_call(self) -> None:
        server = make_server()
        started = threading.Event()
        hook = mock.Mock(on_dispatch_start=lambda record: started.set())
        server.add_hook(hook)
        _, port = in_thread(rpc.serve_http, server, token_key=KEY)
        with RawHttp(port) as raw:
            raw.send(raw_post("/Service/wait", b'{"seconds": 1000.0}'))
            self.assertTrue(started.wait(WATCHDOG_SECONDS / 4))
            with RawHttp(port) as other:
                self.assertEqual(other.ask(ASKED).status, 200)
        self.assertTrue(server.drain(WATCHDOG_SECONDS / 4))
        with RawHttp(port) as raw:
            reply = raw.ask(ASKED)
            self.assertEqual((reply.status, reply.headers["retry-after"], raw.ended()), (503, "1", True))


# ============================================================================
# 19. HTTP CLIENT
# ============================================================================

HEALTHY = b"HTTP/1.1 200 OK\r\nVGI-Accept-Max-Response-Bytes-Support: true\r\nContent-Length: 0\r\n\r\n"


class BadHttpServer:
    """Answers ``/health`` as it should, every other request with given bytes, and then hangs up.

    *keep* has it go on instead; *health* is sent in place of the right answer.
    """

    def __init__(self, *answers: bytes, keep: bool = False, health: bytes = HEALTHY) -> None:
        self.answers = list(answers)
        self.keep = keep
        self.health = health
        self.heads: list[bytes] = []  # of the requests but those to /health
        self.connections = 0
        self.listening = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.listening.getsockname()[1]}"
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def _run(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                connected, _ = self.listening.accept()
                self.connections += 1
                with connected, connected.makefile("rb") as source, contextlib.suppress(OSError):
                    connected.settimeout(WATCHDOG_SECONDS / 4)
                    while self._answer(connected, source):
                        pass

    def _answer(self, connected: socket.socket, source: Any) -> bool:
        head = b""
        while not head.endswith(b"\r\n\r\n"):
            line = source.readline()
            if not line:
                return False
            head += line
        length = re.search(rb"(?i)\r\ncontent-length: (\d+)", head)
        if length:
            source.read(int(length[1]))
        if b"/health " in head:
            connected.sendall(self.health)
            return True
        self.heads.append(head)
        connected.sendall(self.answers[min(len(self.heads), len(self.answers)) - 1])
        if self.keep:
            return True
        connected.shutdown(socket.SHUT_WR)
        source.read()
        return False

    def __enter__(self) -> BadHttpServer:
        return self

    def __exit__(self, *exc: object) -> None:
        self.listening.shutdown(socket.SHUT_RDWR)
        self.listening.close()
        self.thread.join(WATCHDOG_SECONDS / 4)


def http_answer(
    body: bytes, *lines: str, status: str = "200 OK", length: bool = True, kind: str = ARROW
) -> bytes:
    """An HTTP answer."""
    sized = [f"Content-Length: {len(body)}"] * length
    head = [f"HTTP/1.1 {status}", *lines, f"Content-Type: {kind}", *sized, "", ""]
    return "\r\n".join(head).encode() + body


def gzip_bomb() -> bytes:
    packer = zlib.compressobj(wbits=31)
    return packer.compress(b"\0" * 1_000_000) + packer.flush()


CHUNKED = "Transfer-Encoding: chunked"
ZEROS = b"\0" * 2_000_000
BAD_ANSWERS = {  # name: what a server sends, what the error's text holds
    "nothing": (b"", "closed the connection without an answer"),
    "text": (b"I am not an HTTP server\r\n\r\n", "expected a status line"),
    "an alert of TLS": (b"\x15\x03\x03\x00\x02\x02\x0a", "speaks TLS: connect to https://"),
    "endless headers": (b"HTTP/1.1 200 OK\r\n" + b"x: y\r\n" * 50_000, "head exceeds"),
    "interim answers without end": (b"HTTP/1.1 102 Processing\r\n\r\n" * 99, "more than 16 interim answers"),
    "half a head": (b"HTTP/1.1 200 OK\r\nContent-Le", "within a head"),
    "half a body": (http_answer(THREE)[:-9], "half a body"),
    "not Arrow": (http_answer(b"x" * 100), "not an Arrow IPC stream"),
    "empty": (http_answer(b""), "the answer is empty"),
    "no batch": (http_answer(ipc_bytes(RESULT)), "expected a result"),
    "no length and no end": (http_answer(ZEROS, length=False), "65536"),
    "many chunks": (http_answer((b"400\r\n" + b"\0" * 1024 + b"\r\n") * 100, CHUNKED, length=False), "65536"),
    "two lengths": (http_answer(THREE, "Content-Length: 3"), "two content-length headers"),
    "a gzip bomb": (http_answer(gzip_bomb(), "Content-Encoding: gzip"), "65536"),
    "broken gzip": (http_answer(THREE, "Content-Encoding: gzip"), "gzip"),
    "an unknown coding": (http_answer(THREE, "Content-Encoding: br"), "'br'"),
}
GATEWAYS = """
200 OK                INTERNAL            expected Arrow, got HTTP 200 text/html
301 Moved             UNIMPLEMENTED       redirects /Service/add to 'https://other.example/'; connect there instead
307 Temporary         UNIMPLEMENTED       connect there instead
400 Bad Request       INTERNAL            HTTP 400
403 Forbidden         PERMISSION_DENIED   HTTP 403
404 Not Found         UNIMPLEMENTED       is the path of the base URL right?
405 Not Allowed       UNKNOWN             HTTP 405
408 Timeout           UNAVAILABLE         HTTP 408
413 Too Large         RESOURCE_EXHAUSTED  HTTP 413
429 Too Many          UNAVAILABLE         HTTP 429
500 Error             UNKNOWN             HTTP 500
502 Bad Gateway       UNAVAILABLE         <h1>gateway</h1>
503 Unavailable       UNAVAILABLE         HTTP 503
504 Timeout           UNAVAILABLE         HTTP 504
"""  # what somebody answers in the server's place: code of the error, words


class HttpClientTests(TestCase):
    """The client against servers that do not keep to the rules, and its own rules."""

    def connect(self, server: Any, **options: Any) -> Any:
        return rpc.http_connect(Service, server.url, **{"timeout": 20.0, **options})

    def test_bad_answers(self) -> None:
        for name, (answer, part) in BAD_ANSWERS.items():
            with self.subTest(name), BadHttpServer(answer) as server:
                with self.connect(server, accepted_max_response_bytes=65536) as proxy:
                    with self.raises(RpcError, part) as caught:
                        proxy.add(1.0)
                    self.assertNotIsInstance(caught.exception, rpc.DeadlineExceededError)
                    self.assertEqual(len(server.heads), 1)

    def test_every_prefix_of_an_answer_is_refused(self) -> None:
        whole = http_answer(THREE)
        prefixes = [whole[:size] for size in range(len(whole))]
        with BadHttpServer(*prefixes) as server, self.connect(server) as proxy:
            for _ in whole:
                with self.assertRaises(TransportError):
                    proxy.add(1.0)

    def test_good_answers(self) -> None:
        pieces = b"".join(b"%x;x=y\r\n%c\r\n" % (1, byte) for byte in THREE)
        packed = rpc.compress_body([THREE], "zstd", 1)
        for answer in (
            http_answer(THREE),
            http_answer(THREE, length=False),
            http_answer(pieces + b"0\r\nTrailer: x\r\n\r\n", CHUNKED, length=False),
            http_answer(packed, "X-VGI-Content-Encoding: zstd"),
            b"HTTP/1.1 100 Continue\r\n\r\n" + http_answer(THREE),
        ):
            for opener in (None, urllib_opener()):
                with self.subTest(answer=answer[:200], opener=opener), BadHttpServer(answer) as server:
                    with self.connect(server, opener=opener) as proxy:
                        self.assertEqual(proxy.add(1.0), 3.0)

    def test_what_a_gateway_answers(self) -> None:
        for status, code, part in [re.split("  +", line) for line in GATEWAYS.strip().splitlines()]:
            lines = ["Location: https://other.example/"] * status.startswith("3")
            answer = http_answer(b"<h1>gateway</h1>", *lines, status=status, kind="text/html")
            for opener in (None, urllib_opener())[: 2 - len(lines)]:  # an opener follows redirects, if it can
                with self.subTest(status, opener=opener), BadHttpServer(answer) as server:
                    proxy = self.connect(server, opener=opener)
                    with proxy as add, self.raises(TransportError, part) as caught:
                        add.add(1.0)
                    found = (caught.exception.error_code, caught.exception.is_retryable())
                    self.assertEqual(found, (code, code == "UNAVAILABLE"))

    def test_a_401_is_never_read_as_arrow(self) -> None:
        expired = b'{"error":"unauthorized","reason":"expired_credential"}'
        for line, body, reason in (
            ("X: y", expired, "expired_credential"),
            ("VGI-Auth-Reason: insufficient_scope", b"not json", "insufficient_scope"),
            ("VGI-Auth-Reason: from_the_future", THREE, "unauthorized"),
        ):
            answer = http_answer(body, line, status="401 Unauthorized")
            with BadHttpServer(answer) as server, self.connect(server) as proxy:
                with self.assertRaises(rpc.AuthenticationError) as caught:
                    proxy.add(1.0)
                self.assertEqual(caught.exception.reason.value, reason)

    def test_a_deadline_while_an_answer_comes(self) -> None:
        for answer in (b"", b"HTTP/1.1 200 OK\r\n", http_answer(THREE)[:-5]):
            for opener in (None, urllib_opener()):
                with BadHttpServer(answer, keep=True) as server:
                    with self.connect(server, timeout=0.1, opener=opener) as proxy:
                        with self.assertRaises(rpc.DeadlineExceededError):
                            proxy.add(1.0)

    def test_urls_and_headers(self) -> None:
        for url in [*"ftp://x x http:// http://x?y http://u@x http://x:99999".split(), "http://a b", None]:
            with self.subTest(url=url), self.assertRaises(ValueError):
                rpc.http_connect(Service, url)
        for url, authority, prefix in (
            ("http://h:80/a/b/", "h", "/a/b"),
            ("https://h:80", "h:80", ""),
            ("http://[::1]:8000/x", "[::1]:8000", "/x"),
        ):
            target = rpc.HttpTarget.parse(url)
            self.assertEqual((target.authority, target.prefix), (authority, prefix))
        sent = itertools.count()
        for headers, part in (
            ({"Authorization": "Bearer x"}, b"\r\nAuthorization: Bearer x\r\n"),
            (lambda: {"X-Count": str(next(sent))}, b"\r\nX-Count: 2\r\n"),
        ):
            with BadHttpServer(http_answer(THREE), keep=True) as server:
                with self.connect(server, headers=headers) as proxy:
                    self.assertEqual([proxy.add(1.0), proxy.add(1.0)], [3.0, 3.0])
                self.assertIn(part, server.heads[1])
        for value in ("a\r\nY: b", "\u20ac"):
            with BadHttpServer() as server, self.connect(server, headers={"X": value}) as proxy:
                with self.assertRaises(ValueError):
                    proxy.add(1.0)

    def test_limits(self) -> None:
        with rpc.http_connect(Service, client=wsgi_client(max_request_bytes=1000)) as proxy:
            with self.raises(RpcError, "RequestTooLargeError", "1000"):
                proxy.echo_bytes(os.urandom(5000))
        with rpc.http_connect(Service, client=wsgi_client(), accepted_max_response_bytes=65536) as proxy:
            with self.raises(RpcError, "ResponseTooLargeError", "> 65536"):
                proxy.echo_bytes(b"x" * 100_000)
        health = http_answer(b"", "VGI-Max-Request-Bytes: 1000", "VGI-Supported-Encodings: zstd, gzip")
        with BadHttpServer(health=health) as server:
            found = rpc.http_capabilities(server.url)
        self.assertEqual((found.max_request_bytes, found.supported_encodings), (1000, ("zstd", "gzip")))


def urllib_opener() -> Any:
    import urllib.request

    return urllib.request.build_opener(urllib.request.ProxyHandler({}))


class KeptConnectionTests(TestCase):
    """Connections that are used again, and those that must not be."""

    def test_how_many_connections_three_calls_take(self) -> None:
        good = http_answer(THREE)
        for name, answer, keep, connections in (
            ("kept", good, True, 1),
            ("closed after all", good, False, 3),
            ("close", http_answer(THREE, "Connection: Keep-Alive, Close"), True, 3),
            ("HTTP/1.0", good.replace(b"HTTP/1.1", b"HTTP/1.0"), True, 3),
            ("an answer that nobody asked for", good + good.replace(b"\x08@", b"\x10@"), True, 3),
            ("more", good + b"x" * 100_000, True, 3),
        ):
            with self.subTest(name), BadHttpServer(answer, keep=keep) as server:
                with rpc.http_connect(Service, server.url) as proxy:
                    for _ in range(3):
                        self.assertEqual(proxy.add(1.0), 3.0)
                        while not keep and any(kept.is_quiet() for kept in proxy._channel._sender._idle):
                            time.sleep(0.001)  # the server is about to hang up
                self.assertEqual((server.connections, len(server.heads)), (connections, 3))
                with self.raises(TransportError, "it was closed here"):
                    proxy.add(1.0)

    def test_a_client_that_is_closed_during_a_call_keeps_no_connection(self) -> None:
        with BadHttpServer(http_answer(THREE), keep=True) as server:
            with rpc.http_connect(Service, server.url) as proxy:
                proxy.add(1.0)
                sender = proxy._channel._sender
                with mock.patch.object(rpc, "header_has", lambda *_: sender.close()):
                    self.assertEqual(proxy.add(1.0), 3.0)
                self.assertEqual(sender._idle, [])

    def test_an_interrupt_closes_the_connection(self) -> None:
        import warnings

        with BadHttpServer(http_answer(THREE), keep=True) as server:
            with rpc.http_connect(Service, server.url) as proxy, warnings.catch_warnings():
                warnings.simplefilter("ignore", ResourceWarning)  # of a socket that nobody held any more
                proxy.add(1.0)
                for at in range(len(steps_of(lambda: proxy.add(1.0)))):
                    with contextlib.suppress(Interrupt):
                        steps_of(lambda: proxy.add(1.0), at)
                    self.assertEqual(proxy.add(1.0), 3.0)

    def test_proxies_of_the_environment(self) -> None:
        clean = {name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")}
        refuses = b"HTTP/1.1 407 Authenticate\r\nContent-Length: 0\r\n\r\n"

        def call(url: str, **variables: str) -> Any:
            with mock.patch.dict(os.environ, {**clean, **variables}, clear=True):
                with rpc.http_connect(Service, url) as proxy:
                    return proxy.add(1.0)

        with BadHttpServer(http_answer(THREE), refuses) as server:
            url = server.url.replace("//", "//us%65r:pass@")
            self.assertEqual(call("http://never.invalid/p", http_proxy=url), 3.0)
            text = "https://never.invalid through the proxy of the environment"
            with self.raises(TransportError, text, "407"):
                call("https://never.invalid", https_proxy=url)
            self.assertIn(b"POST http://never.invalid/p/Service/add HTTP/1.1\r\n", server.heads[0])
            self.assertIn(b"CONNECT never.invalid:443 HTTP/1", server.heads[1])
            for head in server.heads:
                self.assertIn(b"Proxy-Authorization: Basic " + base64.b64encode(b"user:pass"), head)
            with self.raises(TransportError, "through the proxy of the environment, 127.0.0.1:1", "refused"):
                call(server.url, http_proxy="127.0.0.1:1")
            with self.raises(TransportError, "407"):
                call(server.url, http_proxy="127.0.0.1:1", no_proxy="127.0.0.1")
        with warnings.catch_warnings():  # Python 3.10 leaves the answer of a tunnel that was refused open
            warnings.simplefilter("ignore", ResourceWarning)
            gc.collect()

    def test_wrong_places(self) -> None:
        def reset(connected: Any, source: Any) -> bool:  # as a server does for whom this is no TLS
            connected.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            return not connected.recv(1)

        _, port = in_thread(rpc.serve_http, make_server(), token_key=KEY)
        for opener in (None, urllib_opener()):
            with rpc.http_connect(Service, f"https://127.0.0.1:{port}", opener=opener) as proxy:
                with self.raises(TransportError, "does not speak TLS", "http://"):
                    proxy.add(1.0)
        with rpc.http_connect(Service, f"http://127.0.0.1:{port}/too/many") as proxy:
            with self.raises(
                RpcError, "expected /{protocol}/{method}", "below /, got '/too/many/Service/add'"
            ):
                proxy.add(1.0)
        with BadHttpServer() as server, mock.patch.object(server, "_answer", reset):
            with rpc.http_connect(Service, server.url) as proxy:
                with self.raises(TransportError, "if it speaks TLS, connect to https://"):
                    proxy.add(1.0)
        for opener in (None, urllib_opener()):
            with rpc.http_connect(Service, "http://127.0.0.1:1", opener=opener) as proxy:
                with self.raises(TransportError, "127.0.0.1:1", "refused"):
                    proxy.add(1.0)


class HttpStreamTests(TestCase):
    """What tells tokens from data, and what a token says."""

    both = {STATE: b"s0", CALL_STATE: b"c"}

    def session(self, method: str, *answers: Any) -> tuple[Any, list[bytes], list[Any]]:
        """A session of *method* whose answers hold these batches: (values, metadata); answers to come; inputs."""
        schema = VALUE if method == "filter" else INTEGERS
        bodies = []
        inputs = []
        for answer in answers:
            items = [(pa.RecordBatch.from_pydict({"value": v}, schema), metadata) for v, metadata in answer]
            bodies.append(ipc_bytes(schema, *items))

        class Client(rpc.HttpSender):
            def send(self, method: str, path: str, headers: Any, body: bytes, *rest: Any) -> Any:
                if method != "POST":
                    return rpc.HttpReply(200, {}, b"")
                state = read_stream(b"".join(body))[0][1].get(STATE)
                inputs.append((state, dict(headers).get("VGI-Max-Turns")))
                return rpc.HttpReply(200, {"content-type": ARROW}, bodies.pop(0))

        proxy = rpc.http_connect(Service, client=Client()).__enter__()
        return getattr(proxy, method)(*([9] * (method == "plain"))), bodies, inputs

    def test_a_stream_goes_on_behind_a_server_that_drains(self) -> None:
        servers = [make_server(), make_server()]
        clients = [rpc.make_sync_client(server, token_key=KEY) for server in servers]
        client = rpc.HttpSender()
        client.send = lambda *asked: clients[servers[0].draining].send(*asked)
        with rpc.http_connect(Service, client=client) as proxy:
            session = proxy.plain(limit=3)
            self.assertEqual(session.tick().batch.to_pydict(), {"value": [0]})
            for server in servers:
                server.draining = True
            for _ in range(2):
                with self.assertRaises(RpcError) as caught:
                    session.tick()
                self.assertEqual(caught.exception.error_kind, "server_draining")
            servers[1].draining = False
            again = rpc.resume(proxy, "plain", session.token())
            for stream in (session, again):
                self.assertEqual([b.batch.column(0).to_pylist() for b in stream], [[1], [2]])

    def test_producers(self) -> None:
        both = self.both
        later = [([1], None), ([], None), ([2], None), ([], {STATE: b"s"})]
        for name, answers, expected in (
            ("older servers", [[([1], None), ([], None), ([2], None)]], [[1], [], [2]]),
            (
                "no rows",
                [[([], None), ([], both)], [([], None), ([], {STATE: b"s"})], [([3], None)]],
                [[], [], [3]],
            ),
            ("many", [[([0], None), ([], both)], later, []], [[0], [1], [], [2]]),
            ("nothing", [[]], []),
            ("finished", [[([0], None), ([], both)], []], [[0]]),
        ):
            with self.subTest(name):
                session, left, inputs = self.session("plain", *answers)
                self.assertEqual((numbers(session), left, session.closed), (expected, [], True))
                self.assertEqual({turns for _, turns in inputs[1:]} - {str(rpc.MAX_TURNS)}, set())

    def test_exchanges(self) -> None:
        session, _, inputs = self.session(
            "filter",
            [([], self.both)],
            [([], {STATE: b"s1", b"a": b"b"})],
            [([1.0], {STATE: b"s2"})],
            [([2.0], None), ([], {STATE: b"s3"})],
            [([3.0], None)],
        )
        answers = [session.exchange(values(1.0)) for _ in range(4)]
        self.assertEqual(numbers(answers), [[], [1.0], [2.0], [3.0]])
        self.assertEqual([dict(a.custom_metadata or {}) for a in answers[:2]], [{b"a": b"b"}, {}])
        self.assertEqual([state for state, _ in inputs[1:]], [b"s0", b"s1", b"s2", b"s3"])
        with self.raises(RpcError, "finished instead of answering"):
            session.exchange(values(1.0))

    def test_tokens(self) -> None:
        turns = [([1], None), ([2], None), ([3], None), ([], {STATE: b"s1"})]
        session, bodies, _ = self.session("plain", [([0], None), ([], self.both)], turns)
        with self.raises(RpcError, "no token yet"):
            session.token()
        seen = []
        for _ in zip(range(4), session):
            facts = json.loads(session.token())
            seen.append((facts["state"], facts["skip"]))
        self.assertEqual(seen, [("s0", 0), ("s0", 1), ("s0", 2), ("s1", 0)])
        bodies.append(b"\xff" * 20)
        with self.assertRaises(TransportError):
            session.tick()
        with self.raises(RpcError, "was cut off"):
            list(session)
        self.assertEqual(json.loads(session.token())["state"], "s1")
        bodies.append(ipc_bytes(INTEGERS, pa.RecordBatch.from_pydict({"value": [4]}, INTEGERS)))
        session.seek_to_token(session.token())
        self.assertEqual(numbers(session), [[4]])
        with self.raises(RpcError, "over"):
            session.token()

    def test_metadata_behind_an_iteration(self) -> None:
        with rpc.http_connect(Service, client=wsgi_client()) as proxy, proxy.ticks() as session:
            self.assertEqual(len(list(zip(range(4), session))), 4)
            seen = [session.tick({b"a": b"b"}).batch.column(0)[0].as_py() for _ in range(1200)]
            self.assertEqual((seen[0], seen[-1]), ("{}", '{"a": "b"}'))


# ============================================================================
# 20. ENTRY POINTS
# ============================================================================

ANY: Any = 1  # a value where the annotation does not allow it
ANY_LIST: Any = []
OPENER: Any = types.SimpleNamespace(open=None)
SWAPPED: Any = ServiceImpl()
USES: dict[str, tuple[Any, ...]] = {  # what is done with a function, the error, and parts of its text
    "no url": (lambda: rpc.http_connect(Service), ValueError, "base URL or a client"),
    "no such url": (lambda: rpc.http_connect(Service, "host:80"), ValueError, "http(s)://", "host:80"),
    "too small": (lambda: rpc.http_connect(Service, "http://h", accepted_max_response_bytes=5), ValueError, "65536"),
    "two homes for TLS": (lambda: rpc.http_connect(Service, "https://h", opener=ANY, tls_context=ANY), ValueError,
     "HTTPSHandler"),
    "no opener": (lambda: rpc.http_connect(Service, "http://h", opener=ANY), TypeError, "opener: expected", "got int"),
    "no TLS there": (lambda: rpc.http_connect(Service, "https://h", tls_context=ANY), TypeError, "tls_context: expected"),
    "no TLS to a host": (lambda: rpc.tcp_connect(Service, "h", 1, tls_context=ANY).__enter__(), TypeError, "got int"),
    "no TLS on TCP": (lambda: rpc.serve_tcp(make_server(), tls_context=ANY), TypeError, "tls_context: expected", "got int"),
    "no TLS on HTTP": (lambda: rpc.serve_http(make_server(), tls_context=ANY), TypeError, "tls_context: expected"),
    "no implementation": (lambda: rpc.serve_pipe(Service, None), TypeError, "Protocol class and an instance"),
    "another one's": (lambda: rpc.serve_pipe(Service, Once()), TypeError, "does not implement Service"),
    "no Protocol": (lambda: rpc.unix_connect(ANY, "/nowhere"), TypeError, "expected a Protocol class"),
    "no limit": (lambda: make_server(max_request_bytes=0), ValueError, "max_request_bytes: expected a positive"),
    "not an option": (lambda: rpc.make_sync_client(make_server(), max_rows=0), ValueError, "max_rows"),
    "a key of text": (lambda: rpc.make_sync_client(make_server(), token_key=["k" * 16]), TypeError, "token_key"),
    "a Protocol alone": (lambda: rpc.run_server(Service), TypeError, "Service"),
    "swapped": (lambda: rpc.run_server(SWAPPED, Service), TypeError, "the class Service"),
    "one too many": (lambda: rpc.run_server(make_server(), SWAPPED), TypeError, "a server alone"),
    "no TCP server": (lambda: rpc.serve_tcp(SWAPPED), TypeError,
     "expected RpcServer(Protocol, implementation), got ServiceImpl"),
    "no HTTP server": (lambda: rpc.serve_http(SWAPPED), TypeError,
     "expected RpcServer(Protocol, implementation), got ServiceImpl"),
    "no client": (lambda: rpc.http_connect(Service, client=ANY), TypeError, "client: expected", "got int"),
    "no transport": (lambda: rpc.RpcConnection(Service, ANY_LIST), TypeError, "expected a transport, got list"),
    "a list": (lambda: rpc.connect(ANY_LIST, Service), TypeError, "expected a Protocol class, got list"),
    "no text": (lambda: rpc.http_connect(Service, ANY), ValueError, "base URL: expected http(s)://", "'1'"),
    "no ASCII": (lambda: rpc.http_connect(Service, "http://h/\u00e9"), ValueError, "base URL: expected http(s)://"),
    "no command": (lambda: rpc.connect(Service, []).add(1.0), TypeError, "cmd: expected a list of texts, got []"),
    "no word": (lambda: rpc.connect(Service, [ANY]).add(1.0), TypeError, "expected str"),
    "a NUL": (lambda: rpc.connect(Service, ["a\0"]).add(1.0), ValueError, "cannot be started: embedded null byte"),
    "no path": (lambda: rpc.unix_connect(Service, ANY).add(1.0), TypeError, "not 'int'"),
    "no port": (lambda: rpc.tcp_connect(Service, "h", 99999).add(1.0), ValueError, "cannot connect to h:99999: ex"),
    "no number": (lambda: rpc.tcp_connect(Service, "h", None).add(1.0), TypeError, "not 'NoneType'"),
    "no host": (lambda: rpc.tcp_connect(Service, "a" * 300, 1).add(1.0), ValueError, "cannot connect to aaa"),
    "no header": (lambda: rpc.http_connect(Service, "http://h", headers={"a b": ""}).add(1.0), ValueError, "'a b'"),
    "nor by an opener": (lambda: rpc.http_connect(Service, "http://h", headers={"a b": ""}, opener=OPENER).add(1.0),
     ValueError, "header 'a b'"),
    "no level": (lambda: rpc.make_sync_client(make_server(), compression_level=0), ValueError, "1 to 9 or None"),
    "an input for a producer": (lambda: Stream(TEXT, Once(), input_schema=TEXT), TypeError, "Once is a producer"),
}  # fmt: skip


class EntryTests(TestCase):
    """Arguments, and what connections do besides calling; how each transport calls is in the contract."""

    def test_mistakes(self) -> None:
        for name, (use, kind, *parts) in USES.items():
            with self.subTest(name), self.raises(kind, *parts):
                use()

    def test_what_is_left_open_at_the_end_of_a_program(self) -> None:
        with (
            rpc.serve_pipe(Service, ServiceImpl()) as proxy,
            mock.patch.object(sys, "is_finalizing", lambda: True),
        ):
            with self.raises(
                TransportError, "the interpreter exits"
            ):  # the thread that would answer is no more
                proxy.add(1.0)
        program = """
            from test_vgi_rpc import WORKER, Service, ServiceImpl, rpc
            pool = rpc.WorkerPool()
            def use(connection):
                with connection as proxy:
                    yield proxy.add(1.0)
            ways = (rpc.serve_pipe(Service, ServiceImpl()), rpc.connect(Service, WORKER), pool.connect(Service, WORKER))
            left = [use(way) for way in ways]
            print([next(each) for each in left])
        """
        command = [sys.executable, "-c", textwrap.dedent(program)]
        done = subprocess.run(command, cwd=HERE, capture_output=True, timeout=WATCHDOG_SECONDS / 2)
        self.assertEqual((done.stdout, done.stderr), (b"[3.0, 3.0, 3.0]\n", b""))

    def test_a_connection_without_with(self) -> None:
        client = rpc.make_sync_client(make_server(), prefix="deep/path")
        for connection in (rpc.serve_pipe(Service, ServiceImpl()), rpc.http_connect(Service, client=client)):
            proxy: Any = connection
            self.assertEqual((proxy.add(1.0), proxy.add(a=1.0, b=1.0)), (3.0, 2.0))
            connection.close()
            connection.close()
            self.assertNotIn("vgi_rpc serve_pipe", [thread.name for thread in threading.enumerate()])

    def test_no_thread_or_descriptor_for_a_pipe(self) -> None:
        faults = {"threading.Thread.start": RuntimeError("no"), "vgi_rpc.make_pipe_pair": OSError(24, "no")}
        for what, exc in faults.items():
            with mock.patch(what, side_effect=exc), self.raises(TransportError, "cannot serve a pipe"):
                rpc.serve_pipe(Service, ServiceImpl())

    def test_a_method_may_close_its_own_connection(self) -> None:
        class Closing:
            def close_it(self) -> int:
                connection.close()
                return 1

        connection: Any = rpc.serve_pipe(Closing, Closing())
        with self.assertRaises(RpcError), connection as proxy:
            proxy.close_it()

    def test_asking_a_server_what_it_is(self) -> None:
        client = rpc.make_sync_client(make_server(), prefix="/deep", max_request_bytes=1000)
        self.assertEqual(rpc.http_capabilities(client=client, timeout=5.0).max_request_bytes, 1000)
        reflection = rpc.http_introspect(client=client, protocol="vgi_rpc.Reflection.v1")
        self.assertEqual(reflection.methods.keys(), {"describe", "list_protocols"})
        _, port = in_thread(rpc.serve_http, make_server(), token_key=KEY, prefix="/deep/path")
        for path, prefix in (("deep/path/", ""), ("deep", "path")):
            url = f"http://127.0.0.1:{port}/{path}"
            self.assertTrue(rpc.http_capabilities(url, prefix=prefix).accept_max_response_bytes_support)
            self.assertEqual(rpc.http_introspect(url, prefix=prefix).protocol_name, "Service")

    def test_signatures_tell_the_keywords(self) -> None:
        """What editors and ``help`` see: every option by name, the HTTP ones alike wherever they stand."""
        options = {f.name for f in dataclasses.fields(rpc.HttpOptions)}
        for function in (rpc.make_wsgi_app, rpc.serve_http):
            self.assertLessEqual(options, inspect.signature(function).parameters.keys())
        self.assertLessEqual(
            {f.name for f in dataclasses.fields(rpc.HttpServeOptions)},
            inspect.signature(rpc.serve_http).parameters.keys(),
        )
        for name in filter(lambda name: inspect.isfunction(getattr(rpc, name)), rpc.__all__):
            kinds = {each.kind for each in inspect.signature(getattr(rpc, name)).parameters.values()}
            if name != "make_sync_client":  # which is for tests
                self.assertNotIn(inspect.Parameter.VAR_KEYWORD, kinds, name)


# ============================================================================
# 21. COMMAND LINE
# ============================================================================

APP = """
import datetime, enum, sys
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Annotated, Protocol
import pyarrow as pa
import vgi_rpc
TEXT = pa.schema([("code", pa.utf8()), ("m", pa.decimal128(20, 4)), ("x", pa.float64())])
Money = Annotated[Decimal, vgi_rpc.ArrowType(pa.decimal128(20, 4))]
class Unit(enum.Enum):
    C = "c"
    F = "f"
@dataclass(frozen=True)
class Window:
    start: datetime.date
    unit: Unit = Unit.C
    tags: list[str] = field(default_factory=list)
@dataclass
class Echo(vgi_rpc.ExchangeState):
    def exchange(self, input, out, ctx): out.emit(input.batch)
@dataclass
class Nothing(vgi_rpc.ProducerState):
    def produce(self, out, ctx): out.finish()
class Plain:
    def pay(self, m: Money = Decimal("1.5"), raw: bytes = b"x", key: float = float("inf")) -> str: return f"{m} {raw} {key}"
    def mean(self, window: Window, at: datetime.datetime = datetime.datetime(2024, 1, 1)) -> Window:
        "Mean temperature."
        return window
    def means(self, windows: list[Window]) -> list[Window]: return windows
    def table(self, rows: pa.RecordBatch) -> pa.RecordBatch: return rows
    def shout(self, text: str, ctx: vgi_rpc.CallContext) -> str:
        ctx.client_log(vgi_rpc.Level.WARN, "shouting")
        return text.upper()
    def fail(self, text: str) -> int: raise ValueError(text)
    def same(self) -> bool: return vgi_rpc is sys.modules.get("vgi_rpc")
    def nothing(self) -> None: ...
    def units(self, units: dict[str, Unit]) -> dict[str, Unit]: return units
    def echo(self) -> vgi_rpc.Stream[Echo]: return vgi_rpc.Stream(TEXT, Echo(), input_schema=TEXT)
    def empty(self) -> vgi_rpc.Stream[Nothing]: return vgi_rpc.Stream(TEXT, Nothing())
class Calculator(Protocol):
    def add(self, a: int) -> int: ...
class CalculatorImpl:
    def add(self, a: int) -> int: return a + 1
class Needy:
    def __init__(self, factor): ...
    def f(self) -> int: ...
def make(): return CalculatorImpl()
"""
HEAD = '{"__header__": {"start": 1, "batches": 2}}'
# Arguments behind "call", stdin, stdout. {demo} is the demo over HTTP, {app} the service above over HTTP.
CALLS: list[tuple[str, str, str]] = [
    ("{demo} add a=1 b:=2", "", "3.0\n"),
    ("{demo} add -j '{{\"a\": 1, \"b\": 2}}' b=5", "", "6.0\n"),
    ("{demo} add -j @a.json b=@b.txt", "", "8.0\n"),
    ("{demo} add a=NaN", "", '"NaN"\n'),
    ("{demo} countdown start=1", "", f'{HEAD}\n{{"n": 1}}\n{{"n": 0}}\n'),
    ("{demo} countdown start=1 -f json", "", f'[\n{HEAD},\n{{"n": 1}},\n{{"n": 0}}\n]\n'),
    ("{demo} countdown start=1 -f table", "", 'Header: {"start": 1, "batches": 2}\nn\n1\n0\n'),
    ("{demo} countdown start=9 --limit 1 pause:=null", "", '{"__header__": {"start": 9, "batches": 10}}\n{"n": 9}\n'),
    ("{demo} statistics -i - -f table", 'value\n1.5\n"2.5"\n',
     "count         mean\n2             2.0\n"),
    ("{app} echo -i - --rows 1 -f json", 'code,m,x\n"b\nc",,1\n\n', '[\n{"code": "b\\nc", "m": null, "x": 1.0}\n]\n'),
    ("{tcp} add a=1", "", "2.0\n"), ("{unix} add a=1", "", "2.0\n"), ("{locked} add a=1 --bearer-file keys", "", "2.0\n"),
    ("{locked} add a=1 -H 'Authorization: Bearer s3cret'", "", "2.0\n"),
    ("{app} pay", "", '"1.5000 b\'x\' inf"\n'),
    ("{app} pay m=12345678901234.1234 raw=AAH/ key=-Infinity", "", '"12345678901234.1234 b\'\\\\x00\\\\x01\\\\xff\' -inf"\n'),
    ("{app} pay m:=12345678901234.1234 raw=@a.bin", "", '"12345678901234.1234 b\'\\\\x00\\\\xff\' inf"\n'),
    ("{app} mean window.start=2024-01-31", "", '{"start": "2024-01-31", "unit": "C", "tags": []}\n'),
    ("{app} mean window=@window.json", "", '{"start": "2024-01-31", "unit": "F", "tags": []}\n'),
    ("{app} mean 'window:={{\"start\": \"2024-01-31\"}}' window.unit=F window.tags='[\"a\"]' -f json", "",
     '{"start": "2024-01-31", "unit": "F", "tags": ["a"]}\n'),
    ("{app} mean 'window={{\"start\": \"2024-01-31\"}}' -f table", "",
     "start         unit          tags\n2024-01-31    C             []\n"),
    ("{app} means 'windows:=[{{\"start\": \"2024-01-31\"}}]'", "",
     '[{"start": "2024-01-31", "unit": "C", "tags": []}]\n'),
    ("{app} table 'rows:=[{{\"a\": 1}}, {{\"a\": 2}}]'", "", '{"a": 1}\n{"a": 2}\n'),
    ("{app} nothing", "", "null\n"),
    ("{app} empty", "", ""),
    ("{app} echo -i -", 'code,m,x\n007,12345678901234.1234,1e5\nTRUE,,\n"",0.1,NaN\nNA,1,-1\n1.50,2,3\n',
     '{"code": "007", "m": "12345678901234.1234", "x": 100000.0}\n{"code": "TRUE", "m": null, "x": null}\n'
     '{"code": "", "m": "0.1000", "x": "NaN"}\n{"code": "NA", "m": "1.0000", "x": -1.0}\n'
     '{"code": "1.50", "m": "2.0000", "x": 3.0}\n'),
    ("{app} echo --rows 1 -i -", '{"code": "a", "m": 12345678901234.1234, "x": 1}\n\n{"m": null, "code": "\\u00e9", "x": 2.5}',
     '{"code": "a", "m": "12345678901234.1234", "x": 1.0}\n{"code": "é", "m": null, "x": 2.5}\n'),
]  # fmt: skip
FAILS: list[tuple[str, str, int, str]] = [  # arguments, stdin, exit code, what stderr says
    ("call {demo} add a=1 bb=2", "", 2,
     r"no parameter 'bb'; did you mean 'b'\?.*\nhint: usage: .* call WHERE add a=1.5 \[b=1.0\]$"),
    ("call {demo} add a", "", 2, "parameter 'a': expected key=value"),
    ("call {demo} add a=1 a.b=1", "", 2, "parameter 'a.b=1': expected"),
    ("call {demo} add a=1 -i x.csv", "", 2, "takes no input"),
    ("call {demo} ad", "", 2, "no method 'ad'; did you mean 'add'"),
    ("call {demo}", "", 2, "METHOD is missing\nhint: Demo has add, countdown, statistics"),
    ("call {demo} statistics", "", 2, "takes batches"),
    ("call {demo} statistics -i -", "value\na\n", 1, "value"),
    ("call {app} echo -i -", '{"code": "a"}\n{"code": [1]}\n', 2, "input: "),
    ("call {app} echo -i -", '{"code": "a"}\n[1]\n', 2, "expected a JSON object for each row"),
    ("call {app} echo -i -", 'code,m,x\na,1\n', 2, "Expected 3 columns, got 2"),
    ("call {app} mean window.start=2024-02-30", "", 2, 'parameter window.start: expected date32'),
    ("call {app} mean 'window:=[1]'", "", 2, r"parameter window: expected Window, got \[1\]"),
    ("call {app} echo -i -", '[{"code": "a"}]', 2, "expected a JSON object for each row"),
    ("call {app} echo -i -", "ARROW1", 2, "^error: "),
    ("call {demo} add a=1 -H 'a b: c'", "", 2, "header 'a b': expected a name"),
    ("call {demo} Nope.add", "", 1, r"hosted: .*\]\n$"),
    ("call tcp:h:99999 add", "", 2, "cannot connect to h:99999"),
    ("call {demo} countdown start=3 pause=9 --timeout 0.3", "", 5, "deadline|no answer|DeadlineExceeded"),
    ("call {demo} countdown start=3 --resume mark -o x.parquet", "", 2, "x.parquet: expected an ending of .ndjson"),
    ("call {demo} add a=1 --rows 0", "", 2, "--rows: expected a number above 0, got '0'"),
    ("call localhost:1 add", "", 2, "expected a URL.*\nhint: http://localhost:1"),
    ("call tcp:localhost add", "", 2, "or a command\n$"),
    ("call http://127.0.0.1:1 add", "", 3, "cannot connect.*\nhint: is the server running"),
    ("call unix:/no/such add", "", 3, "cannot connect"),
    ("call no-such-program add", "", 3, "no-such-program"),
    ("call unix:/no/such add -H 'A: b'", "", 2, "are for HTTP"),
    ("call {locked} add", "", 4, "missing_credential.*\nhint: send credentials"),
    ("call {demo} vgi_rpc.Reflection.v1.list_protocols -f table", "", 0,
     r"^server_id     server_version  request_version  protocols\n\w{12}  .{14}  1                \["),
    ("serve --check", "", 0, "^Demo: 3 methods"),
    ("serve app.py:CalculatorImpl --check", "", 0, "^Calculator: 1 methods"),
    ("serve 'app:make()' --check", "", 0, "^Calculator: 1 methods"),
    ("serve app:Plain --check", "", 0, "^Plain: 11 methods"),
    ("serve app", "", 2, "try app:NAME\nhint: a target is module:Class"),
    ("serve nowhere.py:A", "", 2, "FileNotFoundError"),
    ("serve app:make", "", 2, "app:make is a function"),
    ("serve app:Calculator", "", 2, "a Protocol says what there is; name the class that implements it"),
    ("serve app:Needy", "", 2, "TypeError: .*factor"),
    ("serve raising.py:A", "", 2, "raising.py:2: RuntimeError: no database"),
    ("serve odd.py:A", "", 2, r"f\(\).*parameter 'a'"),
    ("serve --stdio --tcp 0", "", 2, "one at a time"),
    ("serve --stdio --bearer-file keys", "", 2, "--bearer-file is for HTTP"),
    ("call {app} shout text=a -v", "", 0, r'^\[WARN\] shouting\n"A"\n$'),
    ("call {app} fail text=no -v", "", 1, "no\nTraceback"),
    ("describe {app} mean", "", 0, r"^mean\(window: Window, at: datetime = datetime\(2024, 1, 1, 0, 0\)\) -> Window    unary\n"
     r"    Mean temperature\.\n(.|\n)*      start  date\n"
     r"      unit   Unit \(C, F\) = Unit\.C\n      tags   list\[str\] = \[\]\n"
     r"  usage: .* mean 'window:=\{\"start\": \"2024-01-31\".* \[at=2024-01-01T00:00:00\]\n$"),
    ("describe {app} -v", "", 0, r"^Plain\n\necho\(\) -> Stream\[Echo\]    exchange\n(.|\n)*\nserver id: "),
    ("describe {app} men", "", 2, "did you mean 'mean'"),
    ("describe {demo}", "", 0, r"header\n    start    int\n    batches  int\n"),
    ("--version", "", 0, rf"^vgi_rpc {rpc.__version__} \(wire 1, Python "),
    ("--help", "", 0, r"COMMAND …\n  serve .*\n  call .*\n  describe .*\n  selfcheck "),
    ("serve --help", "", 0, r"usage: (.|\n)*VGI_RPC_PORT"),
    ("call --help", "", 0, r"usage: (.|\n)*default:\s+auto"),
    ("cal", "", 2, "no command 'cal'; did you mean 'call'"),
    ("", "", 2, "^$"),
    ("call {unix} countdown start=1 --resume mark", "", 2, "--resume is for streams over HTTP"),
    ("serve --port 99999", "", 2, "--port: expected"),
    ("serve --port 8K", "", 2, "--port: expected a port"),
    ("serve --access-log /no/such/log", "", 2, "error: /no/such/log: No such file"),
    ("serve app:Nope", "", 2, "^error: AttributeError: .*Nope"),
    ("serve --max-request-bytes 10X", "", 2, "--max-request-bytes: expected a size such as 64M, got '10X'"),
    ("serve --bearer-file no/such", "", 2, "no/such: No such file"),
    ("serve --token-key-file short.txt --check", "", 2, "at least 16 bytes|token_key"),
    ("serve --timeout 0", "", 2, "--timeout: expected seconds above 0, got '0'"),
]  # fmt: skip
COMMAND_LINES = [  # of run_server: words, exit status or text, what is printed
    ("--help", 0, r"Serves Service(.|\n)*--tcp \[HOST:\]PORT"),
    ("--htttp", 2, "--htttp"),
    ("--http --port 99999", 2, "--port: expected a port, 0 to 65535, got '99999'"),
    ("--tcp host", 2, "--tcp: expected a port, 0 to 65535, got 'host'"),
    ("--http --unix /nowhere/x", 2, "--http, --unix: one at a time"),
    ("--unix /nowhere/at/all", 3, "/nowhere/at/all.*No such file"),
    ("--tcp 0 --access-log /nowhere/at/all", 2, "/nowhere/at/all: No such file"),
    ("word", 2, "unrecognized arguments: word"),
]
VALUES: list[tuple[str, str, Any]] = [  # of options: what stands for them, text, value
    ("[HOST:]PORT", "host:65535", ("host", 65_535)), ("[HOST:]PORT", "[::1]:80", ("::1", 80)),
    ("[HOST:]PORT", ":0", ("127.0.0.1", 0)), ("N", "3", 3), ("SECONDS", "0.5", 0.5), ("AGE", "0", 0.0),
    ("SIZE", "64M", 64 << 20), ("SIZE", "1.5kib", 1536), ("a|b", "b", "b"), ("FILE", "", ""),
    *[("[HOST:]PORT", text, None) for text in ("", "host", "host:", "65536", "-1", "1e3", "١", "host:80x")],
    ("N", "0", None), ("N", "1.5", None), ("SECONDS", "-1", None), ("SECONDS", "inf", None), ("SIZE", "1X", None),
    ("a|b", "c", None),
]  # fmt: skip
# What lies in the folder of the tests beside the application.
FILES = {
    "app.py": APP, "window.json": '\n {"start": "2024-01-31", "unit": "F"}',
    "a.json": '{"a": 1, "b": 5}', "b.txt": "7\n", "short.txt": "short\n", "a.bin": "\0\xff",
    "keys": "ann s3cret\n",
    "raising.py": "x = 1\nraise RuntimeError('no database')\n", "odd.py": "class A:\n    def f(self, a: complex) -> int: ...\n",
    "acme/__init__.py": "", "acme/vendor/__init__.py": "", "acme/service.py":
    "from acme.vendor import rpc\nimport acme.vendor.rpc\nclass Svc:\n    def who(self, ctx: rpc.CallContext) -> str: ...\n"
    "    def all(self) -> rpc.Stream[acme.vendor.rpc.ProducerState]: ...\n",
}  # fmt: skip


def cli(*words: str, given: bytes = b"", **terminals: bool) -> tuple[int, bytes, str]:
    """(exit code, stdout, stderr) of the command line, run in this process."""
    streams = {name: io.TextIOWrapper(io.BytesIO(), encoding="utf-8") for name in ("stdout", "stderr")}
    streams["stdin"] = io.TextIOWrapper(io.BufferedReader(io.BytesIO(given)), encoding="utf-8")
    for name in terminals:
        streams[name].isatty = lambda: True
    with contextlib.ExitStack() as stack:
        for name, stream in streams.items():
            stack.enter_context(mock.patch.object(sys, name, stream))
        code = rpc.main(list(words))
        said = [streams[name].detach() for name in ("stdout", "stderr") if streams[name].flush() is None]
    return code, said[0].getvalue(), said[1].getvalue().decode()


class CliTests(TestCase):
    """The command line in a folder with the application's file; servers of it and of the demo run in threads."""

    places: ClassVar[dict[str, str]] = {}

    @classmethod
    def setUpClass(cls) -> None:
        cls.addClassCleanup(os.chdir, os.getcwd())
        folder = tempfile.mkdtemp()
        cls.addClassCleanup(shutil.rmtree, folder)
        os.chdir(folder)
        for name, text in FILES.items():
            path = pathlib.Path(name)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="latin-1")
        for patch in (mock.patch.dict(sys.modules), mock.patch.object(sys, "path", [folder, *sys.path])):
            patch.start()
            cls.addClassCleanup(patch.stop)
        app = importlib.import_module("app").Plain
        known = rpc.bearer_authenticate_static(tokens={"s3cret": AuthContext("bearer", True, "ann")})
        demo = RpcServer(rpc.Demo, rpc.Demo())
        servers = {"demo": (demo, None), "app": (RpcServer(app, app()), None), "locked": (demo, known)}
        for name, (server, check) in servers.items():
            _, port = in_thread(rpc.serve_http, server, token_key=KEY, authenticate=check)
            cls.places[name] = f"http://127.0.0.1:{port}"
        cls.places["tcp"] = "tcp:{}:{}".format(*in_thread(rpc.serve_tcp, demo, threaded=True))
        cls.places["unix"] = "unix:{}".format(
            *in_thread(rpc.serve_unix, demo, f"{folder}/socket", threaded=True)
        )

    def run_cli(self, text: str, given: bytes = b"", **terminals: bool) -> tuple[int, bytes, str]:
        return cli(*shlex.split(text.format(**self.places)), given=given, **terminals)

    def ok(self, text: str, given: bytes = b"", **terminals: bool) -> bytes:
        code, out, said = self.run_cli(text, given, **terminals)
        self.assertEqual(code, 0, said)
        return out

    def test_answers(self) -> None:
        for text, given, wanted in CALLS:
            with self.subTest(text):
                self.assertEqual(self.ok(f"call {text}", given.encode()).decode(), wanted)

    def test_failures(self) -> None:
        for text, given, wanted, pattern in FAILS:
            with self.subTest(text):
                code, out, said = self.run_cli(text, given.encode())
                self.assertEqual(code, wanted, said)
                self.assertRegex(said + out.decode() * (code == 0), pattern)
                self.assertLessEqual(len(said.splitlines()), 2 + 99 * text.endswith("-v"))
        with mock.patch.dict(os.environ, VGI_RPC_TARGET="app:Plain", VGI_RPC_CHECK="1"):
            self.assertIn(b"Plain: 11 methods", self.ok("serve"))
        with mock.patch.dict(os.environ, VGI_RPC_PORT="many"):
            self.assertIn("--port: expected", cli("serve", "--check")[2])

    def test_arrow(self) -> None:
        head = [{"start": 1, "batches": 2}]
        header, rows = read_streams(self.ok("call {demo} countdown start=1 -f arrow"))
        self.assertEqual([batch.to_pylist() for batch, _ in header + rows], [head, [{"n": 1}], [{"n": 0}]])
        self.assertEqual(self.ok("call {demo} countdown start=1 -o o.arrow"), b"")
        self.assertEqual(pa.ipc.open_stream("o.arrow.header").read_all().to_pylist(), head)
        self.assertEqual(pa.ipc.open_stream("o.arrow").read_all().to_pylist(), [{"n": 1}, {"n": 0}])
        for text, wanted, names in (
            ("""units 'units:={{"a": "F"}}'""", [{"result": [("a", "F")]}], ["result"]),
            ("nothing", [], []), ("empty", [], ["code", "m", "x"]),
        ):  # fmt: skip
            table = pa.ipc.open_stream(self.ok(f"call {{app}} {text} -f arrow")).read_all()
            self.assertEqual((table.to_pylist(), table.schema.names), (wanted, names))
        code, out, said = self.run_cli("call {demo} add a=1 -f arrow", stdout=True)
        self.assertEqual((code, out, "neither for a terminal" in said), (2, b"", True))
        table = pa.table({"value": [1.0, None, 3.0, 5.0]})
        for name, new in (("t.arrows", pa.ipc.new_stream), ("t.arrow", pa.ipc.new_file)):
            with pa.OSFile(name, "wb") as f, new(f, table.schema) as writer:
                writer.write_table(table, 2)
            for more, counts in (("", [1, 3]), ("--rows 1", [1, 1, 2, 3]), ("--rows 3", [2, 3])):
                lines = self.ok(f"call {{demo}} statistics -i {name} {more}").splitlines()
                self.assertEqual([json.loads(line)["count"] for line in lines], counts)

    def test_files_and_terminals(self) -> None:
        for name, wanted in {"o.json": b"[\n", "o.ndjson": b'{"', "o.txt": b"Head", "plain": b'{"'}.items():
            self.ok(f"call {{demo}} countdown start=1 -o {name}")
            self.assertTrue(pathlib.Path(name).read_bytes().startswith(wanted))
        self.assertTrue(self.ok("call {demo} countdown start=1", stdout=True).startswith(b"Header"))
        said = self.run_cli("call {demo} countdown start=3 pause=0.4", stderr=True)[2]
        self.assertRegex(said, r"\r\x1b\[K(\d) batches, \1 rows")

    def test_resume(self) -> None:
        first = self.ok("call {demo} countdown start=5 --resume mark --limit 2").splitlines()
        self.assertEqual(os.stat("mark").st_mode & 0o777, 0o600)
        code, _, said = self.run_cli("call {demo} statistics -i - --resume mark", b"value\n1\n")
        self.assertEqual((code, "not where a call of Demo.statistics stopped" in said), (2, True))
        rest = self.ok("call {demo} countdown start=5 --resume mark").splitlines()
        self.assertEqual([json.loads(line).get("n") for line in first + rest], [None, 5, 4, 3, 2, 1, 0])
        self.assertFalse(os.path.exists("mark"))
        pathlib.Path("x.csv").write_text("value\n" + "".join(f"{i}\n" for i in range(250)))
        whole = self.ok("call {demo} statistics -i x.csv")
        part = self.ok("call {demo} statistics -i x.csv --resume mark --limit 1")
        rest = self.ok("call {demo} statistics -i x.csv --resume mark --rows 75").splitlines()
        self.assertEqual([*part.splitlines(), *rest[-1:]], whole.splitlines()[::2])

    def start(self, *words: str, program: str = sys.executable, **more: Any) -> subprocess.Popen[bytes]:
        more = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **more}
        child = subprocess.Popen([program, *words], **more)
        self.addCleanup(child.communicate)
        self.addCleanup(child.kill)
        return child

    def test_run_server_reads_its_command_line(self) -> None:
        for words, status, said in COMMAND_LINES:
            out = io.StringIO()
            code: Any = 0
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
                with mock.patch.object(sys, "argv", ["worker", *words.split()]):
                    try:
                        rpc.run_server(make_server())
                    except SystemExit as exc:
                        code = exc.code
            with self.subTest(words):
                self.assertRegex(out.getvalue(), said)
                self.assertEqual(code, status)

    def test_values_of_options(self) -> None:
        for kind, text, wanted in VALUES:
            with self.subTest(kind, text=text):
                if wanted is not None:
                    self.assertEqual(rpc._read_value(kind, text), wanted)
                else:
                    with self.raises(Exception, "expected", repr(text.rpartition(":")[2])):
                        rpc._read_value(kind, text)

    def test_discovery_lines(self) -> None:
        with tempfile.TemporaryDirectory() as folder:
            path = os.path.join(folder, "s")
            connects: list[tuple[str, str, Any]] = [
                ("--http --port 0", r"PORT:\d+", lambda w: rpc.http_connect(Service, w.url)),
                ("--tcp 0", r"TCP:127\.0\.0\.1:\d+", lambda w: rpc.tcp_connect(Service, "127.0.0.1", int(w.port))),
                (f"--unix {path}", re.escape(f"UNIX:{path}"), lambda w: rpc.unix_connect(Service, path)),
            ]  # fmt: skip
            for words, line, connect in connects:
                with self.subTest(words), Worker(*words.split()) as worker:
                    self.assertRegex(worker.line, f"^{line}$")
                    with connect(worker) as proxy:
                        self.assertEqual(proxy.add(1.0), 3.0)
                    self.assertEqual(worker.stop(), (0, ""))

    def test_a_server_from_start_to_stop(self) -> None:
        options = "--port=0 --prefix=api --announce --bearer-file=keys --access-log=log"
        child = self.start(rpc.__file__, "serve", "app.py:Plain", *options.split())
        url = f"http://127.0.0.1:{child.stdout.readline().decode().strip().removeprefix('PORT:')}/api"
        self.assertEqual(self.ok(f"call {url} same --bearer-file keys"), b"true\n")
        self.assertEqual(cli("call", url, "same")[0], 4)
        child.send_signal(signal.SIGINT)
        said = child.communicate(timeout=WATCHDOG_SECONDS)[1].decode()
        self.assertEqual(child.returncode, 0)
        self.assertRegex(
            said,
            rf"(?m)^Plain served by(.|\n)*  same\(\) -> bool    unary\n(.|\n)*\naddress    {url}\n",
        )
        self.assertIn('"Plain.same ok"', pathlib.Path("log").read_text())

    def test_closed_and_full_standard_streams(self) -> None:
        python = f"PYTHONPATH={shlex.quote(str(HERE))} {shlex.quote(sys.executable)} -m vgi_rpc"
        words = f"{python} call {self.places['demo']} countdown start="
        uses = ("9 >&-", "9 2>&-", "9 <&- >&- 2>&-", "9 >/dev/full", "9 2>/dev/full", "9999 | head -n 1")
        children = [self.start("-c", words + use, program="sh") for use in uses]
        for use, child in zip(uses, children):
            with self.subTest(use):
                self.assertNotRegex(child.communicate(timeout=WATCHDOG_SECONDS)[1], b"Traceback|Exception")

    def test_a_pipe_is_read_as_it_comes(self) -> None:
        words = [rpc.__file__, "call", self.places["demo"], "statistics", "-i", "-"]
        child = self.start(*words, stdin=subprocess.PIPE)
        for data, wanted in ((b"value\n1.5\n", 1), (b"2\n3\n", 3)):
            child.stdin.write(data)
            child.stdin.flush()
            self.assertEqual(json.loads(child.stdout.readline())["count"], wanted)
        child.send_signal(signal.SIGINT)
        self.assertEqual((child.communicate(timeout=WATCHDOG_SECONDS), child.returncode), ((b"", b""), 130))

    def test_text_in_pieces(self) -> None:
        wanted = [{"a": "x\ny", "b": "1"}, {"a": None, "b": "2"}]
        for text, is_csv in (
            (b'\xef\xbb\xbfa,b\r\n"x\ny",1\n,2', True),
            (b'{"a": "x\\ny", "b": 1}\n\n{"b": 2}', False),
        ):
            for size in (1, 7, 99):
                pieces = [text[at : at + size] for at in range(0, len(text), size)]
                file = mock.Mock(read1=mock.Mock(side_effect=[*pieces, b""]))
                rows = [row for batch in rpc._text_batches(file, is_csv) for row in batch.to_pylist()]
                self.assertEqual(rows, wanted)

    def test_copies_elsewhere(self) -> None:
        """A copy in a package is one module with what serves; one in an archive starts itself through that."""
        shutil.copy(rpc.__file__, "acme/vendor/rpc.py")
        with zipfile.ZipFile("app.pyz", "w") as archive:
            archive.write(rpc.__file__, "vgi_rpc.py")
            archive.writestr("__main__.py", "import sys, vgi_rpc\nsys.exit(vgi_rpc.main())\n")
        with zipfile.ZipFile("alone.pyz", "w") as archive:
            archive.write(rpc.__file__, "__main__.py")
        selfcheck = r"\npipe +ok\nworker +ok\nhttp +ok\n$"
        serve = "serve acme.service:Svc --check"
        told = r"^Svc: 2 methods"
        shown = r"^countdown\(start: int(.|\n)*usage: .* countdown start=1"  # though there are no docstrings
        uses = {f"-m acme.vendor.rpc {serve}": told, f"acme/vendor/rpc.py {serve}": told,
                "-OO -bb app.pyz selfcheck": selfcheck, "-OO -bb acme/vendor/rpc.py --help": "^usage",
                f"-OO -bb acme/vendor/rpc.py describe {self.places['demo']} countdown": shown,
                "app.pyz selfcheck": selfcheck, "alone.pyz selfcheck": selfcheck}  # fmt: skip
        children = [self.start(*words.split()) for words in uses]
        for child, wanted in zip(children, uses.values()):
            out, said = child.communicate(timeout=WATCHDOG_SECONDS)
            self.assertEqual(said, b"", out)
            self.assertRegex(out.decode(), wanted)


# ============================================================================
# 30. THE CONTRACT: WHAT HOLDS ON EVERY TRANSPORT
# ============================================================================
# Each behaviour that users see stands here once. A subclass says how to connect; the same classes run once more with the
# row templates switched off.


def sums(session: Any, *inputs: Any) -> list[Any]:
    """The ``sum`` of each answer."""
    return [session.exchange(given).batch.to_pydict()["sum"][0] for given in inputs]


def no_rows() -> AnnotatedBatch:
    """A batch of `VALUE` without rows."""
    return AnnotatedBatch(pa.RecordBatch.from_pydict({"value": []}, schema=VALUE))


class TransportContract:
    """What holds on every transport. One connection serves all tests of a class."""

    kind = ""
    templates = True
    connect: Any
    proxy: Any
    log: list[Any]
    stack: contextlib.ExitStack

    @classmethod
    def serve(cls) -> Any:
        """Start a server; return what connects to it with options of the transport's connect function."""

    @classmethod
    def setUpClass(cls) -> None:
        cls.log = []
        cls.stack = contextlib.ExitStack()
        cls.addClassCleanup(cls.stack.close)
        if not cls.templates:
            cls.stack.enter_context(templates_off())
        cls.connect = staticmethod(cls.serve())
        cls.proxy = cls.stack.enter_context(cls.connect(on_log=cls.log.append))
        cls.proxy.add(1.0)  # a worker takes its time to start, which no test with a short timeout is about

    def setUp(self) -> None:
        """Each test begins without log lines, and ends on a connection that answers."""
        super().setUp()
        self.log.clear()
        self.addCleanup(lambda: self.assertEqual(self.proxy.add(a=20.0, b=22.0), 42.0))

    # -- unary

    def test_every_type(self) -> None:
        for name, case in TYPES.items():
            echo = getattr(self.proxy, f"echo_{name}")
            for value in case.values:
                with self.subTest(name=name, value=value):
                    got = echo(value=value)
                    self.assertEqual(got, value)
                    self.assertIs(type(got), type(value))

    def test_values_arrive_as_what_was_declared(self) -> None:
        class Loud(str):
            def __str__(self) -> str:
                return "LOUD"

        class Whole(int):
            pass

        for name, sent, expected in (
            ("str", Shade.RED, "red"), ("str", Loud("quiet"), "quiet"), ("float", 1, 1.0), ("float", Whole(2), 2.0),
            ("list_list", [[Shade.RED], [Loud("b")]], [["red"], ["b"]]), ("dict", {Shade.RED: 1}, {"red": 1.0}),
            ("int", Whole(3), 3), ("bytes", bytearray(b"ab"), b"ab"), ("bytes", memoryview(b"ab"), b"ab"),
            ("list_int", (1, Whole(2)), [1, 2]), ("optional_int", Whole(0), 0),
        ):  # fmt: skip
            with self.subTest(name=name, sent=sent):
                self.assertEqual(repr(getattr(self.proxy, f"echo_{name}")(sent)), repr(expected))
        self.assertEqual(self.proxy.exact_sum(1), 2.0)
        self.assertEqual(self.proxy.exact_sum(2, b=2.0), 4.0)

    def test_values_that_would_lose_something_are_refused_before_sending(self) -> None:
        for name, value in (
            ("datetime", MOMENT.replace(tzinfo=UTC)), ("timestamp_utc", MOMENT), ("timestamp_s", MOMENT), ("date", MOMENT),
            ("date", 3), ("datetime", 5), ("time", datetime.time(1, tzinfo=UTC)), ("int", 1.5), ("int", True),
            ("duration_s", datetime.timedelta(microseconds=1)), ("int8", 128), ("uint64", -1), ("float32", 1e300),
            ("decimal", decimal.Decimal("1.00001")), ("decimal", decimal.Decimal("NaN")), ("str", "\ud800"),
            ("str", b"a"), ("literal_text", "K"), ("literal_int", 3), ("uuid", "text"), ("enum", Phase.COLLECTING),
            ("list_int", [1, None]), ("dict", {"a": None}),
        ):  # fmt: skip
            with self.subTest(name=name, value=value):
                with self.raises(rpc.ParameterError, "argument value", "expected"):
                    getattr(self.proxy, f"echo_{name}")(value)

    def test_calls(self) -> None:
        proxy = self.proxy
        got = [proxy.add(1.0), proxy.add(1.0, 5.0), proxy.add(b=1.0, a=2), proxy.add(a=1.5)]
        self.assertEqual(got, [3.0, 6.0, 3.0, 3.5])
        self.assertIsNone(proxy.nothing())
        self.assertEqual([proxy.optional(), proxy.optional(None), proxy.optional(4)], [None, None, 4])
        self.assertEqual(proxy.defaults(), "9 a BLUE")
        self.assertEqual(proxy.defaults(Point(1), names=["x", "y"], color=Color.RED), "1 x,y RED")

    def test_arguments_that_do_not_fit_are_refused_here(self) -> None:
        for method, args, kwargs, parts in (
            ("add", (), {}, ("missing argument 'a'", "add(a: float, b: float = 2.0) -> float")),
            ("add", (1.0,), {"c": 1.0}, ("no parameter 'c'", "['a', 'b']")),
            ("add", (1.0, 2.0, 3.0), {}, ("2 arguments", "got 3")),
            ("add", (1.0,), {"a": 1.0}, ("'a' twice",)),
            ("add", (), {"a": "x"}, ("argument a", "expected float64", "got str")),
            ("count", (), {"limit": "x"}, ("count()", "argument limit", "expected int64", "got str")),
        ):
            with self.subTest(parts=parts), self.raises(TypeError, *parts):
                getattr(self.proxy, method)(*args, **kwargs)
        with self.raises(AttributeError, "'ad'", "did you mean 'add'"):
            self.proxy.ad()

    def test_the_proxy_looks_like_the_service(self) -> None:
        self.assertIn("proxy of Service", repr(self.proxy))
        self.assertEqual(list(inspect.signature(self.proxy.add).parameters), ["a", "b"])
        self.assertIn("Add.", self.proxy.add.__doc__)
        with self.assertRaises(TypeError):
            copy.copy(self.proxy)

    def test_logs(self) -> None:
        self.assertEqual(self.proxy.logs(3), 3)
        expected = [rpc.Message(Level.WARN, f"line {i}", index=str(i)) for i in range(3)]
        self.assertEqual(self.log, expected)

    def test_a_client_log_that_fails_ends_no_call(self) -> None:
        noisy = rpc.with_options(self.proxy, on_log=raising(RuntimeError("a broken log")))
        with self.assertLogs("vgi_rpc", "ERROR") as caught:
            self.assertEqual([noisy.logs(count=2), noisy.logs(count=1)], [2, 1])
        self.assertEqual(len(caught.records), 3)

    def test_context(self) -> None:
        facts = self.proxy.context()
        self.assertRegex(facts["id"], "^[0-9a-f]{16}$")
        self.assertNotEqual(facts.pop("id"), self.proxy.context()["id"])
        expected = {"method": "context", "protocol": "Service", "kind": self.kind, "cancelled": "False"}
        self.assertEqual(facts, {**expected, "principal": "", "domain": ""})

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
        again = pickle.loads(pickle.dumps(caught.exception))
        self.assertEqual((str(again), again.request_id), (str(caught.exception), caught.exception.request_id))

    def test_status_errors(self) -> None:
        with self.assertRaises(RpcError) as caught:
            self.proxy.refuse()
        error = caught.exception
        found = (error.error_type, error.error_message, error.error_code, error.error_kind)
        self.assertEqual(found, ("StatusError", "not now", "RESOURCE_EXHAUSTED", "tests_busy"))
        self.assertEqual(error.details(), BUSY)
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
        batch = pa.RecordBatch.from_pydict({"x": pa.array(range(300_000))})
        self.assertTrue(self.proxy.echo_batch(batch).equals(batch))
        data = os.urandom(100_000)
        self.assertEqual(self.proxy.echo_bytes(data), data)

    def test_a_call_that_takes_too_long(self) -> None:
        with self.assertRaises(rpc.DeadlineExceededError) as caught:
            rpc.with_options(self.another(), timeout=0.1).wait(30.0)
        self.assertLessEqual(str(caught.exception).count("DeadlineExceededError"), 1)

    def test_a_turn_that_takes_too_long(self) -> None:
        session = rpc.with_options(self.another(), timeout=0.1).filter(0.3)
        with self.assertRaises(rpc.DeadlineExceededError):
            session.exchange(values(1.0))

    def another(self) -> Any:
        """A proxy of its own: a byte stream is over when an answer did not come in time."""
        stack = contextlib.ExitStack()
        self.addCleanup(stack.close)
        return stack.enter_context(self.connect())

    def test_time_is_allowed_for_each_turn(self) -> None:
        proxy = rpc.with_options(self.proxy, timeout=0.6)
        self.assertEqual(len(numbers(proxy.plain(4, [1], 0.16))), 4)
        with proxy.filter(0.16) as session:
            for i in range(4):
                self.assertEqual(session.exchange(values(float(i))).batch.to_pydict(), {"value": [float(i)]})

    # -- producers

    def test_producer(self) -> None:
        batches = list(self.proxy.count(3))
        seen = [(b.batch.to_pydict(), dict(b.custom_metadata)) for b in batches]
        self.assertEqual(seen, [({"value": [i]}, {b"at": b"%d" % i}) for i in range(3)])
        self.assertEqual(self.log, [rpc.Message.info(f"number {i}", at=str(i)) for i in range(3)])
        self.assertEqual(list(self.proxy.count(0)), [])

    def test_producers_of_any_number_of_rows(self) -> None:
        for rows in ([1], [0], [3], [0, 1], [1, 0], [0, 0, 2], [1, 0, 1000]):
            expected = [[at] * rows[at % len(rows)] for at in range(7)]
            for prefetch in (None, 1, 3):
                with self.subTest(rows=rows, prefetch=prefetch):
                    proxy = rpc.with_options(self.proxy, prefetch=prefetch)
                    self.assertEqual(numbers(proxy.plain(7, rows)), expected)

    def test_a_long_producer(self) -> None:
        self.assertEqual(numbers(self.proxy.plain(1100)), [[i] for i in range(1100)])

    def test_streams_with_header(self) -> None:
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
        with self.proxy.running_with_header("label") as session:
            self.assertEqual((session.header, sums(session, values(2.0))), (Header(0, "none"), [2.0]))

    def test_ticks_carry_metadata(self) -> None:
        ticks = (None, {b"a": b"1"}, pa.KeyValueMetadata({"b": "2"}))
        with self.proxy.ticks() as session:
            seen = [session.tick(m).batch.column(0)[0].as_py() for m in ticks]
        # Over HTTP the first turn runs when the stream starts: before any tick could carry metadata.
        self.assertEqual(seen, ["{}", '{"a": "1"}', '{"b": "2"}'])

    def test_the_end_of_a_producer(self) -> None:
        for start, number in ((self.proxy.once, 1), (functools.partial(self.proxy.count, 1), 0)):
            session = start()
            self.assertEqual(session.tick().batch.to_pydict(), {"value": [number]})
            with self.assertRaises(StopIteration):
                session.tick()
            self.assertTrue(session.closed)
            self.assertEqual(list(session), [])

    def test_zero_rows_and_zero_columns(self) -> None:
        for columns in (["a", "b"], ["only"], []):
            with self.subTest(columns=columns):
                batches = list(self.proxy.shapes(columns, 4))
                seen = [(b.batch.schema.names, dict(b.custom_metadata)) for b in batches]
                self.assertEqual(seen, [(columns, {b"left": b"%d" % left}) for left in (3, 2, 1, 0)])
                if columns:
                    self.assertEqual([b.batch.num_rows for b in batches], [1, 0, 1, 0])

    def test_abandoned_streams(self) -> None:
        for _ in self.proxy.count(1000):
            break
        self.assertEqual(self.proxy.add(1.0), 3.0)
        session = self.proxy.count(1000)
        session.close()
        session.close()
        with self.proxy.running():
            pass
        unused = self.proxy.running()
        half = self.proxy.running()
        half.exchange(values(1.0))
        self.assertEqual(self.proxy.add(1.0), 3.0)
        if self.kind != "http":
            self.assertTrue(unused.closed and half.closed)
        self.proxy.count_with_header(3)

    # -- exchanges

    def test_exchange(self) -> None:
        with self.proxy.running("label") as session:
            rows = [session.exchange(values(float(i), 1.0)).batch.to_pylist() for i in range(5)]
        seen = [(row["label"], row["count"], row["sum"]) for [row] in rows]
        expected = [(2, 1.0), (4, 3.0), (6, 6.0), (8, 10.0), (10, 15.0)]
        self.assertEqual(seen, [("label", *each) for each in expected])
        with self.raises(RpcError, "closed"):
            session.exchange(values(1.0))

    def test_exchange_whose_answers_have_no_rows(self) -> None:
        inputs = [[-1.0], [1.0, -2.0], [], [-3.0, -4.0], [5.0, 6.0], [-7.0]]
        with self.proxy.filter() as session:
            answers = [session.exchange(pa.RecordBatch.from_pydict({"value": v}, VALUE)) for v in inputs]
        self.assertEqual(numbers(answers), [[], [1.0], [], [], [5.0, 6.0], []])
        turns = [dict(a.custom_metadata)[b"turns"] for a in answers]
        self.assertEqual(turns, [b"1", b"2", b"3", b"4", b"5", b"6"])
        self.assertEqual({a.batch.schema for a in answers}, {VALUE})

    def test_nested_state(self) -> None:
        with self.proxy.nested() as session:
            given = [values(1), values(2, 3), values(4)]
            answers = [json.loads(session.exchange(v).batch.column(0)[0].as_py()) for v in given]
        expected = [[1], "BLUE", "COLLECTING", 1, None], [[1, 2, 3], "BLUE", "PROCESSING", 2, 1]
        self.assertEqual(answers, [*expected, [[1, 2, 3, 4], "BLUE", "PROCESSING", 3, 2]])

    def test_call_state_and_rehydration(self) -> None:
        with self.proxy.scaled(3) as session:
            answers = [session.exchange(values(1, 2)) for _ in range(3)]
        seen = [(a.batch.to_pydict(), dict(a.custom_metadata)) for a in answers]
        self.assertEqual(seen, [({"value": [103, 106]}, {b"turns": b"%d" % turn}) for turn in (1, 2, 3)])

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
            self.assertEqual(sums(session, values(1, 2), values(3)), [3.0, 6.0])
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
        for wrong in (1.5, datetime.timedelta(1), MOMENT):
            with self.proxy.nested() as session, self.raises(RpcError, "TypeError", "'value'", "int64"):
                session.exchange(values(wrong))

    def test_what_exchange_takes(self) -> None:
        table = pa.table({"value": [4.0, 5.0]})
        with self.proxy.running() as session:
            given = [values(1.0), values(2.0).batch, {"value": [3.0]}, table, no_rows()]
            self.assertEqual(sums(session, *given), [1.0, 3.0, 6.0, 15.0, 15.0])
            for wrong in ("text", AnnotatedBatch("text"), None, 5):
                with self.assertRaises(TypeError):
                    session.exchange(wrong)
            self.assertEqual(sums(session, values(5.0)), [20.0])

    def test_the_wrong_use_of_a_session(self) -> None:
        with self.proxy.plain(2) as session, self.raises(TypeError, "exchange"):
            session.exchange(values(1.0))
        with self.proxy.filter() as session, self.raises(TypeError, "exchange"):
            next(iter(session))

    # -- streams are Arrow

    def test_a_producer_is_a_table(self) -> None:
        for limit, rows in ((4, [0, 1, 1, 2, 3, 3]), (0, [])):
            expected = pa.table({"value": rows}, INTEGERS)
            for read in (rpc.StreamSession.to_table, lambda session: session.reader().read_all(), pa.table):
                self.assertEqual(read(self.proxy.plain(limit, [1, 2])), expected)
            session = self.proxy.plain(limit, [1, 2])
            self.assertEqual((session.schema, session.to_table()), (INTEGERS, expected))

    def test_an_exchange_maps_batches(self) -> None:
        batches = [values(float(i), -1.0).batch for i in range(4)]
        with self.proxy.filter() as session:
            reader = session.exchange_all(iter(batches))
            self.assertEqual(reader.schema, VALUE)
            self.assertEqual(reader.read_all().column("value").to_pylist(), [0.0, 1.0, 2.0, 3.0])
        with self.proxy.filter() as session:
            reader = session.exchange_all(pa.RecordBatchReader.from_batches(VALUE, batches))
            self.assertEqual(reader.read_all().num_rows, 4)
            for alone in (batches[0], AnnotatedBatch(batches[0]), {"value": [1.0]}):
                with self.raises(TypeError, "expected an iterable of batches, got one"):
                    session.exchange_all(alone)

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
        with self.raises(RpcError, "Stream.call_state: expected Fixed, got Header"):
            self.proxy.scaled(0).exchange(values(1))

    def test_states_that_break_the_rules(self) -> None:
        for how, parts in (
            ("twice", ("RuntimeError", "emit called twice")),
            ("none", ("RuntimeError", "nothing emitted")),
            ("type", ("TypeError", "'value'", "expected int64", "got utf8")),
            ("names", ("TypeError", "['value']", "['other']")),
            ("after finish", ("RuntimeError", "after finish()")),
            ("raise", ("LookupError", "in the second turn")),
            ("cut", ("TypeError", "'value'", "expected int64", "got float64")),
            ("our key", ("TypeError", "emit: metadata", "vgi_rpc.location")),
        ):
            with self.subTest(how):
                session = self.proxy.misbehaving(how)
                self.assertEqual(session.tick().batch.to_pydict(), {"value": [1]})
                with self.raises(RpcError, *parts):
                    session.tick()
                self.assertTrue(session.closed)
                with self.raises(RpcError, *parts):
                    self.proxy.misbehaving(how).reader().read_all()
        for how, parts in (
            ("finish", ("RuntimeError", "finish() in an exchange")),
            ("none", ("RuntimeError", "emit exactly one")),
            ("our keys", ("TypeError", "emit: metadata", "vgi_rpc.log_level")),
            ("exit", ("SystemExit", "3")),
        ):
            with self.subTest(how), self.proxy.bad_exchange(how) as session:
                with self.raises(RpcError, *parts):
                    session.exchange(values(1))
                self.assertTrue(session.closed)

    def test_introspection(self) -> None:
        self.assertEqual(rpc.list_protocols(self.proxy)[0].protocol, "Service")
        described = rpc.introspect(self.proxy)
        found = (described.protocol_name, described.request_version, described.protocol_hash)
        self.assertEqual(found, ("Service", "1", make_server().protocol_hash))
        methods = described.methods
        self.assertEqual(set(methods), set(METHODS))
        self.assertEqual(rpc.describe_protocol(self.proxy, "Service").methods.keys(), methods.keys())
        count = methods["count_with_header"]
        found = (count.has_header, count.header_type, count.header_schema)
        self.assertEqual(found, (True, pa.RecordBatch, Header.ARROW_SCHEMA))
        # The Protocol's annotation decides the kind where it tells, else the implementation's state class.
        kinds = [methods[name].kind for name in ("count", "plain", "ticks", "running", "nested")]
        self.assertEqual(kinds, [*["producer"] * 3, *["exchange"] * 2])
        add = methods["add"]
        found = (add.params_schema, add.result_schema.names, add.has_return)
        self.assertEqual(found, (METHODS["add"].params_schema, ["result"], True))
        with self.raises(RpcError, "Nobody"):
            rpc.describe_protocol(self.proxy, "Nobody")

    def test_many_threads_share_a_proxy(self) -> None:
        def work(number: int) -> None:
            for i in range(20):
                self.assertEqual(self.proxy.add(float(number), float(i)), number + float(i))

        at_once(6, work)


class PipeTests(TransportContract, TestCase):
    """In this process, over a pair of sockets."""

    kind = "pipe"

    @classmethod
    def serve(cls) -> Any:
        return functools.partial(rpc.serve_pipe, Service, ServiceImpl())


class SubprocessTests(TransportContract, TestCase):
    """A worker process."""

    kind = "pipe"

    @classmethod
    def serve(cls) -> Any:
        command = [*WORKER, *["--no-templates"] * (not cls.templates)]
        return functools.partial(rpc.connect, Service, command, stderr=rpc.StderrMode.PIPE)

    def test_what_a_method_prints_goes_to_stderr(self) -> None:
        seen = set()
        complete = threading.Event()
        expected = {"printed by a method", "written to descriptor 1", "printed by a child"}

        class Handler(logging.Handler):
            def emit(self, record: logging.LogRecord) -> None:
                seen.add(record.getMessage())
                if expected <= seen:
                    complete.set()

        worker_log = logging.getLogger("vgi_rpc.worker")
        handler = Handler()
        self.addCleanup(worker_log.setLevel, worker_log.level)
        worker_log.addHandler(handler)
        worker_log.setLevel(logging.INFO)
        self.addCleanup(worker_log.removeHandler, handler)
        self.assertEqual(self.proxy.noisy(), "quiet")
        self.assertTrue(complete.wait(WATCHDOG_SECONDS / 4), seen)


class UnixTests(TransportContract, TestCase):
    """A Unix socket, one thread a connection."""

    kind = "unix"

    @classmethod
    def serve(cls) -> Any:
        folder = cls.stack.enter_context(tempfile.TemporaryDirectory())
        (cls.path,) = in_thread(rpc.serve_unix, make_server(), os.path.join(folder, "s"), threaded=True)
        return functools.partial(rpc.unix_connect, Service, cls.path)

    def test_only_the_owner_may_connect(self) -> None:
        self.assertEqual(os.stat(self.path).st_mode & 0o077, 0)

    def test_connections_are_served_side_by_side(self) -> None:
        session = self.another().running()
        self.assertEqual(sums(session, values(1.0)), [1.0])
        self.assertEqual(self.proxy.add(1.0), 3.0)
        self.assertEqual(sums(session, values(1.0)), [2.0])


class TcpTests(TransportContract, TestCase):
    """A TCP socket."""

    kind = "tcp"

    @classmethod
    def serve(cls) -> Any:
        _, cls.port = in_thread(rpc.serve_tcp, make_server(), threaded=True)
        return functools.partial(rpc.tcp_connect, Service, "127.0.0.1", cls.port)

    def test_garbage_hurts_nobody_else(self) -> None:
        with socket.create_connection(("127.0.0.1", self.port), WATCHDOG_SECONDS) as raw:
            raw.sendall(b"GET / HTTP/1.1\r\n\r\n")
            with raw.makefile("rb") as file:
                self.assertIn("not an Arrow IPC stream", error_of(read_stream(file))["text"])


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
        again = rpc.resume(self.proxy, "running", token)
        answer = again.exchange(values(4.0)).batch.to_pydict()
        self.assertEqual((answer["sum"], answer["label"], answer["count"]), ([7.0], ["saved"], [3]))
        session.close()
        with self.raises(RpcError, "over"):
            session.token()

    def test_a_producer_goes_on_from_its_token(self) -> None:
        for rows in ([1], [0, 1]):
            session = self.proxy.plain(5, rows)
            seen = []
            for _ in range(4):
                seen += numbers([session.tick()])
                rest = numbers(rpc.resume(self.proxy, "plain", session.token()))
                self.assertEqual(seen + rest, [[i] * rows[i % len(rows)] for i in range(5)])

    def test_a_producer_that_is_iterated_goes_on_from_any_batch(self) -> None:
        session = self.proxy.plain(50)
        for at, _ in enumerate(session):
            if at % 7 == 3:
                rest = numbers(rpc.resume(self.proxy, "plain", session.token()))
                self.assertEqual(rest, [[i] for i in range(at + 1, 50)])

    def test_every_turn_runs_on_what_the_token_says(self) -> None:
        with self.proxy.odd() as session:
            seen = [json.loads(session.exchange(values(1)).batch.column(0)[0].as_py()) for _ in range(3)]
        self.assertEqual(seen, [[n, 0, "float", "str"] for n in (1, 2, 3)])

    def test_tokens_that_are_none(self) -> None:
        token = self.proxy.running().token()
        for bad in (b"", b"{}", b"\xff", b'{"method":"running"}', token[:-5]):
            with self.subTest(bad=bad), self.raises(RpcError, "resume"):
                rpc.resume(self.proxy, "running", bad)
        with self.raises(RpcError, "resume"):
            rpc.resume(self.proxy, "nested", token)
        with self.raises(RpcError, "not a stream"):
            rpc.resume(self.proxy, "add", token)
        damaged = json.loads(token)
        damaged["state"] = damaged["state"][:-8] + "AAAAAAA="
        with self.raises(RpcError, "state token refused"):
            rpc.resume(self.proxy, "running", json.dumps(damaged).encode()).exchange(values(1.0))

    def test_a_state_that_cannot_be_sealed(self) -> None:
        for how, parts in (
            ("state", ("Misbehaving.at: expected int64, got str",)),
            ("unread", ("Misbehaving: ", "ValueError: nobody reads this back")),
        ):
            for prefetch in (1, 5):
                session = rpc.with_options(self.proxy, prefetch=prefetch).misbehaving(how)
                self.assertEqual(session.tick().batch.to_pydict(), {"value": [1]})
                with self.subTest(how), self.raises(RpcError, "TypeError", *parts):
                    list(session)


class WsgiTests(HttpContract, TestCase):
    """A WSGI application behind `wsgiref.validate`."""

    client = staticmethod(wsgi_client)

    @classmethod
    def serve(cls) -> Any:
        return functools.partial(rpc.http_connect, Service, client=cls.client())


class FreshServerTests(WsgiTests):
    """Every turn is served by another server with the same key."""

    client = FreshServerClient


class ReplayTests(WsgiTests):
    """Every cursor is used twice and gives the same turn."""

    client = staticmethod(lambda: ReplayingClient(rpc.make_wsgi_app(make_server(), token_key=KEY)))


class SyncClientTests(WsgiTests):
    """The HTTP side without a socket, under a prefix, and nothing cached between turns."""

    client = staticmethod(
        lambda: rpc.make_sync_client(make_server(), prefix="/some/where", call_state_cache_entries=0)
    )


class HttpTests(HttpContract, TestCase):
    """A real HTTP server and real connections."""

    @classmethod
    def serve(cls) -> Any:
        _, port = in_thread(rpc.serve_http, make_server(), token_key=KEY, prefix="/deep/path/")
        cls.url = f"http://127.0.0.1:{port}/deep/path"
        return functools.partial(rpc.http_connect, Service, cls.url)

    def test_the_same_without_compression(self) -> None:
        with rpc.http_connect(Service, self.url, compression_level=None) as proxy:
            batch = pa.RecordBatch.from_pydict({"x": [0] * 100_000})
            self.assertTrue(proxy.echo_batch(batch).equals(batch))

    def test_exchanges_of_many_threads(self) -> None:
        def work(n: int) -> list[float]:
            with self.proxy.running() as session:
                return sums(session, *[values(float(n))] * 10)

        self.assertEqual(at_once(8, work), [[n * (i + 1.0) for i in range(10)] for n in range(8)])

    def test_capabilities_and_description(self) -> None:
        found = rpc.http_capabilities(self.url)
        self.assertTrue(found.accept_max_response_bytes_support)
        self.assertEqual(set(found.supported_encodings) - {"zstd"}, {"gzip"})
        self.assertFalse(found.externalization_enabled or found.upload_url_support)
        self.assertEqual(rpc.http_introspect(self.url).protocol_name, "Service")

    def test_a_proxy_without_with(self) -> None:
        proxy = rpc.http_connect(Service, self.url)
        self.assertEqual(proxy.add(1.0), 3.0)
        proxy.close()


class OpenerTests(HttpTests):
    """The same server, reached through a `urllib.request` opener: each call is one ``open``."""

    @classmethod
    def serve(cls) -> Any:
        return functools.partial(super().serve(), opener=urllib_opener())


class RoundRobin(rpc.HttpSender):
    """A load balancer without stickiness, as a ``client`` for `http_connect`: each request goes to the next server."""

    def __init__(self, *ports: Any) -> None:
        self.ports = itertools.cycle(map(int, ports))

    def send(self, method: str, path: str, headers: Any, body: Any, *_: Any) -> Reply:
        connection = http.client.HTTPConnection("127.0.0.1", next(self.ports), timeout=WATCHDOG_SECONDS)
        with contextlib.closing(connection):
            connection.request(method, path, body, dict(headers))
            answer = connection.getresponse()
            return reply_of(answer.status, answer.getheaders(), answer.read())


class TwoServersTests(TestCase):
    """Two server processes with one key behind a load balancer."""

    def test_an_exchange_of_200_turns_lands_on_both(self) -> None:
        with Worker("--http") as one, Worker("--http") as two:
            client = RoundRobin(one.port, two.port)
            with rpc.http_connect(Service, client=client) as proxy, proxy.running() as session:
                answers = [session.exchange(values(float(i))).batch.to_pylist()[0] for i in range(200)]
        self.assertEqual(answers[-1]["sum"], sum(range(200)))
        self.assertEqual({answer["pid"] for answer in answers}, {one.process.pid, two.process.pid})


class WithoutTemplates:
    """Once more with the templates switched off: everything goes the ordinary way, with the same results."""

    templates = False
    test_time_is_allowed_for_each_turn = None  # waiting is the same
    test_a_turn_that_takes_too_long = None


for _plain in [
    type(f"Plain{each.__name__}", (WithoutTemplates, each), {"__module__": __name__})
    for each in (PipeTests, SubprocessTests, UnixTests, TcpTests, WsgiTests, SyncClientTests, HttpTests)
]:
    globals()[_plain.__name__] = _plain
del _plain


class ElsewhereTests(TestCase):
    """In-process, TCP and HTTP need nothing that macOS and Windows lack."""

    def test_without_what_other_systems_lack(self) -> None:
        program = """
            import os, select, signal, socket, sys
            missing = [(select, 'POLLRDHUP'), (select, 'poll'), (select, 'epoll'), (os, 'readv'), (os, 'writev'), (os, 'fork')]
            missing += [(signal, 'pthread_kill'), (socket, 'AF_UNIX'), (os, 'register_at_fork'), (os, 'set_blocking')]
            missing += [(signal, 'pthread_sigmask'), (select, 'PIPE_BUF'), (os, 'forkpty'), (os, 'posix_spawn')]
            pair = socket.socketpair
            def socketpair():
                listening = socket.create_server(('127.0.0.1', 0))
                with listening:
                    ends = socket.create_connection(listening.getsockname()), listening.accept()[0]
                for end in ends:
                    end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                return ends
            for module, name in missing:
                if hasattr(module, name):
                    delattr(module, name)
            socket.socketpair = socketpair
            sys.modules['fcntl'] = None
            import unittest
            unittest.main("test_vgi_rpc", argv=["", "PipeTests", "TcpTests", "HttpTests"])
        """
        command = [sys.executable, "-c", textwrap.dedent(program)]
        done = subprocess.run(command, cwd=HERE, capture_output=True, text=True, timeout=WATCHDOG_SECONDS)
        self.assertEqual(done.returncode, 0, done.stderr[-3000:])
        self.assertRegex(done.stderr, r"\nRan 1\d\d tests")


# ============================================================================
# 31. THE USER'S DESCRIPTION OF STREAMING
# ============================================================================
# Its code blocks as they stand, with the service around them, and each of its statements.


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


class DocService:
    """The services of the description in one."""

    def stats(self, label: str) -> Stream[RunningStatsState]:
        schema = pa.schema([("count", pa.int64()), ("mean", pa.float64())])
        return Stream(output_schema=schema, state=RunningStatsState(label=label), input_schema=VALUE)

    def search(self, query: str, page_size: int = 100) -> Stream[PaginatedQueryState]:
        return Stream(output_schema=INTEGERS, state=PaginatedQueryState(query, page_size))

    def pipeline(self, threshold: float) -> Stream[StatefulPipeline]:
        schema = pa.schema([("phase", pa.utf8()), ("buffer_size", pa.int64()), ("total", pa.float64())])
        return Stream(output_schema=schema, state=StatefulPipeline(threshold=threshold), input_schema=VALUE)

    def fetch_rows(self, query: str) -> Stream[FetchState, JobHeader]:
        schema = pa.schema([pa.field("value", pa.int64())])
        header = JobHeader(total_rows=100, description=f"Results for: {query}")
        return Stream(output_schema=schema, state=FetchState(remaining=100), header=header)

    def transform_rows(self, factor: float) -> Stream[TransformState, JobHeader]:
        header = JobHeader(total_rows=-1, description=f"times {factor}")
        return Stream(output_schema=VALUE, state=TransformState(factor), input_schema=VALUE, header=header)


class StreamingTests(TestCase):
    """Every statement, on a transport with state in memory and on a stateless one."""

    def proxies(self) -> Iterator[Any]:
        """One proxy of `DocService` after the other."""
        with self.subTest("pipe"), rpc.serve_pipe(DocService, DocService()) as proxy:
            yield proxy
        client = wsgi_client(RpcServer(DocService, DocService()))
        with self.subTest("http"), rpc.http_connect(DocService, client=client) as proxy:
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
        kinds = (pa.int64(), pa.float64(), pa.list_(pa.float64()), pa.utf8())
        fields = [pa.field(f.name, kind, False) for f, kind in zip(dataclasses.fields(state), kinds)]
        self.assertEqual(RunningStatsState.ARROW_SCHEMA, pa.schema(fields))
        self.assertTrue(issubclass(StreamState, ArrowSerializableDataclass))
        self.assertTrue(pa.types.is_dictionary(StatefulPipeline.ARROW_SCHEMA.field("phase").type))

    def test_paginated_query(self) -> None:
        for proxy in self.proxies():
            pages = [batch.batch.num_rows for batch in proxy.search(query="SELECT *", page_size=100)]
            self.assertEqual(pages, [100, 100, 50])

    def test_stateful_pipeline(self) -> None:
        for proxy in self.proxies():
            with proxy.pipeline(threshold=100.0) as session:
                for given, *expected in (
                    ([10.0, 20.0], "collecting", 2, 30.0),
                    ([80.0], "processing", 3, 110.0),
                ):
                    [row] = session.exchange(AnnotatedBatch.from_pydict({"value": given})).batch.to_pylist()
                    self.assertEqual(row, dict(zip(("phase", "buffer_size", "total"), expected)))

    def test_headers(self) -> None:
        for proxy in self.proxies():
            session = proxy.fetch_rows(query="SELECT *")
            shown = "JobHeader(total_rows=100, description='Results for: SELECT *')"
            self.assertEqual(repr(session.header), shown)
            self.assertEqual(numbers(session), [[n] for n in range(100, 0, -1)])
            with proxy.transform_rows(factor=2.0) as session:
                self.assertEqual(session.typed_header(JobHeader), JobHeader(-1, "times 2.0"))
                self.assertEqual(numbers([session.exchange(values(1.0))]), [[2.0]])

    def test_a_header_is_sent_once(self) -> None:
        stream = RawStream(wsgi_client(), "running_with_header", {"label": "r"})
        self.assertEqual(len(read_streams(stream.reply.body)), 2)
        self.assertEqual(len(read_streams(stream.exchange(values(1.0).batch).body)), 1)

    def test_state_lives_in_memory_or_in_the_token(self) -> None:
        """On a pipe the same object serves all turns; over HTTP each turn has one of its own."""
        exchange = RunningStatsState.exchange
        for proxy, objects in zip(self.proxies(), (1, 3)):
            with mock.patch.object(
                RunningStatsState, "exchange", autospec=True, side_effect=exchange
            ) as turn:
                with proxy.stats("x") as session:
                    counts = [session.exchange(values(1.0)).batch["count"][0].as_py() for _ in range(3)]
            self.assertEqual(
                (counts, len({id(call.args[0]) for call in turn.mock_calls})), ([1, 2, 3], objects)
            )

    def test_a_token_is_signed_and_readable(self) -> None:
        stream = RawStream(wsgi_client(), "running", {"label": "readable"})
        self.assertIn(b"readable", base64.b64decode(stream.tokens[STATE]))
        self.assertNotIn(KEY, base64.b64decode(stream.tokens[STATE]))


# ============================================================================
# 40. THE FILE AS ITS READERS FIND IT
# ============================================================================

SOURCE = pathlib.Path(rpc.__file__)
README = HERE / "README.md"
BANNER = re.compile(r"^# (\d+)\. ([A-Z][A-Z0-9, -]*[A-Z]) \.{3,} uses (nothing|[\d, -]+)$", re.M)
MAX_LINES = 9_509  # of each of the two files
MAX_BYTES = 476_430


def defined_names(statement: ast.stmt) -> list[str]:
    """The names that a top-level statement defines."""
    if isinstance(statement, (ast.FunctionDef, ast.ClassDef)):
        return [statement.name]
    if isinstance(statement, (ast.If, ast.Try)):
        return [name for inner in statement.body for name in defined_names(inner)]
    nodes = ast.walk(statement)
    return [node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)]


class ModuleTests(TestCase):
    """Sections, sizes, names, docstrings, and what importing costs."""

    @classmethod
    def setUpClass(cls) -> None:
        cls.text = SOURCE.read_text(encoding="utf-8")
        cls.tree = ast.parse(cls.text)
        cls.starts = [(cls.text.count("\n", 0, m.start()) + 1, int(m[1])) for m in BANNER.finditer(cls.text)]

    def section(self, line: int) -> int:
        """The number of the section in which *line* stands."""
        return max((number for start, number in self.starts if start <= line), default=0)

    def sections_of_names(self) -> dict[str, int]:
        """Top-level names and the section that defines them first."""
        found: dict[str, int] = {}
        for statement in self.tree.body:
            for name in defined_names(statement):
                found.setdefault(name, self.section(statement.lineno))
        return found

    def test_sizes(self) -> None:
        for path in (SOURCE, HERE / "test_vgi_rpc.py"):
            text = path.read_text(encoding="utf-8")
            with self.subTest(path.name):
                self.assertLessEqual(text.count("\n"), MAX_LINES)
                self.assertLessEqual(len(text.encode()), MAX_BYTES)
                self.assertLessEqual(max(map(len, text.splitlines())), 128)  # of a table in the tests
        nodes = list(ast.walk(self.tree))
        kinds = (ast.Module, ast.ClassDef, ast.FunctionDef)
        texts = [node.body[0] for node in nodes if isinstance(node, kinds) and ast.get_docstring(node)]
        documented = sum(text.end_lineno - text.lineno + 1 for text in texts)
        self.assertGreaterEqual(documented, 0.09 * self.text.count("\n"))
        functions = [node for node in nodes if isinstance(node, ast.FunctionDef)]
        self.assertLessEqual(max(node.end_lineno - node.lineno + 1 for node in functions), 100)
        counts = [sum(isinstance(node, kind) for node in nodes) for kind in (ast.IfExp, ast.stmt)]
        self.assertLessEqual(counts[0], 0.03 * counts[1])

    def test_banners(self) -> None:
        found = [int(m[1]) for m in BANNER.finditer(self.text)]
        self.assertEqual(found, list(range(1, len(found) + 1)))
        self.assertGreaterEqual(len(found), 20)
        contents = re.findall(r"^# [0-9]*\. [A-Z]", self.text, re.M)
        self.assertEqual(len(contents), len(found))

    def test_no_reference_upwards(self) -> None:
        defined = self.sections_of_names()
        wrong = set()

        def walk(code: types.CodeType) -> None:
            here = self.section(code.co_firstlineno)
            for step in dis.get_instructions(code):
                if step.opname == "LOAD_GLOBAL" and defined.get(step.argval, 0) > here > 0:
                    wrong.add(f"section {here} uses {step.argval} of section {defined[step.argval]}")
            for constant in code.co_consts:
                if isinstance(constant, types.CodeType):
                    walk(constant)

        walk(compile(self.tree, "vgi_rpc.py", "exec"))
        self.assertEqual(sorted(wrong), [])

    def test_public_names(self) -> None:
        self.assertEqual([name for name, count in Counter(rpc.__all__).items() if count > 1], [])
        self.assertLessEqual(set(rpc.__all__), self.sections_of_names().keys())
        self.assertTrue(rpc.__doc__ and rpc.__version__)
        for name in rpc.__all__:
            thing = getattr(rpc, name)
            if isinstance(thing, (type, types.FunctionType)) and not typing.get_origin(thing):
                text = thing.__doc__ or ""
                self.assertTrue(text.strip() and not text.startswith(f"{name}("), f"{name} has no docstring")
            for member, value in vars(thing).items() if isinstance(thing, type) else ():
                if isinstance(getattr(value, "__func__", value), types.FunctionType) and member[0] != "_":
                    self.assertTrue(
                        inspect.getdoc(getattr(thing, member)), f"{name}.{member} has no docstring"
                    )

    def test_imports(self) -> None:
        for node in ast.walk(self.tree):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                names = [str(node.module)]
            found = {name.partition(".")[0] for name in names}
            self.assertLessEqual(found, {*sys.stdlib_module_names, "pyarrow", "__future__"})

    def run_python(self, program: str, cwd: Any, *arguments: str) -> str:
        """Run a program in a fresh interpreter, without this folder on its path."""
        command = [sys.executable, "-c", textwrap.dedent(program), *arguments]
        environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONDEVMODE")}
        done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)
        self.assertEqual(done.returncode, 0, done.stderr)
        return done.stdout

    def test_the_module_example_under_another_name(self) -> None:
        example = textwrap.dedent(re.search(r"::\n\n((?:    .*\n|\n)+)", rpc.__doc__)[1])
        self.assertIn("vgi_rpc", example)
        program = example.replace("vgi_rpc", "carried") + "\nimport sys; print('vgi_rpc' in sys.modules)"
        with tempfile.TemporaryDirectory() as folder:
            shutil.copy(SOURCE, os.path.join(folder, "carried.py"))
            self.assertEqual(self.run_python(program, folder).split()[-1], "False")
        self.run_python(example, SOURCE.parent)

    def test_importing_is_light(self) -> None:
        program = """
            import pyarrow, sys, threading
            before = set(sys.modules)
            import vgi_rpc
            heavy = {"http", "http.client", "http.server", "urllib.request", "socketserver", "ssl", "argparse", "email",
                     "subprocess", "csv", "difflib", "json", "base64", "multiprocessing", "asyncio", "html"}
            print(sorted(heavy & (set(sys.modules) - before)), threading.active_count())
        """
        self.assertEqual(self.run_python(program, SOURCE.parent).strip(), "[] 1")
        self.assertEqual(rpc.EMPTY.message, pa.schema([]).serialize())  # which importing does not ask for

    def test_readme_blocks(self) -> None:
        blocks = re.findall(r"^```python\n(.*?)^```", README.read_text(encoding="utf-8"), re.M | re.S)
        self.assertGreater(len(blocks), 8)
        dataframes = all(map(importlib.util.find_spec, ("polars", "duckdb", "pandas")))
        with tempfile.TemporaryDirectory() as folder:
            paths = []
            for number, block in enumerate(blocks):
                if not re.match(r"# \w+\.py\n", block) and (dataframes or "import polars" not in block):
                    paths.append(os.path.join(folder, f"block_{number}.py"))
                    pathlib.Path(paths[-1]).write_text(block, encoding="utf-8")
            program = "import runpy, sys\nfor path in sys.argv[1:]: runpy.run_path(path, run_name='__main__')"
            self.run_python(program, SOURCE.parent, *paths)

    def test_readme_texts_of_errors(self) -> None:
        table = README.read_text(encoding="utf-8").partition("| text of the error ")[2].partition("\n\n")[0]
        texts = re.findall("^\\| `(.*?)`", table, re.M)
        self.assertGreater(len(texts), 8)
        for part in re.split(r"(?:: )?\.\.\.|\n", "\n".join(texts)):
            self.assertIn(part.strip(), self.text)

    def test_readme_files(self) -> None:
        """The three files of README's beginning, as a reader writes them, on a port of their own."""
        text = README.read_text(encoding="utf-8")
        with tempfile.TemporaryDirectory() as folder, socket.create_server(("127.0.0.1", 0)) as taken:
            port = taken.getsockname()[1]
            taken.close()
            shutil.copy(SOURCE, folder)
            for name, block in re.findall(r"^```python\n# (\w+\.py)\n(.*?)^```", text, re.M | re.S):
                pathlib.Path(folder, name).write_text(block.replace("8000", str(port)), encoding="utf-8")
            self.run_python("import service; service.app", folder)
            [command] = re.findall(r"`python (vgi_rpc\.py serve server:.*?)`", text)
            command = [sys.executable, *command.split(), "--port", str(port)]
            with subprocess.Popen(command, cwd=folder, stderr=subprocess.DEVNULL) as server:
                self.addCleanup(server.kill)
                while server.poll() is None:
                    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)):
                        break
                run = "import runpy; runpy.run_path('client.py', run_name='__main__')"
                shown = self.run_python(run, folder)
                server.terminate()
            self.assertIn("27.0", shown)
            self.assertIn("day: date32[day]", shown)


if __name__ == "__main__":
    unittest.main()
