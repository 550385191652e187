#!/usr/bin/env python3
"""Send every reader what is almost right: ``fuzz.py --seconds 60 [--seed N] [--only CASE]``.

The law: our own error or a right answer, soon, in flat memory, and the next good call works. Inputs are mutated, and grown by
repeating a piece of them. Each case is made by seed and number alone, and a failure prints the command that shows it again.
``--differential PYTHON`` compares with the public package, which that interpreter has: the same bytes, the same values.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import json
import os
import pathlib
import random
import resource
import socket
import subprocess
import sys
import time
import traceback
from typing import Any

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

import pyarrow as pa

import test_vgi_rpc as tests
import vgi_rpc as rpc

SPECIAL = (
    0,
    1,
    2,
    7,
    8,
    127,
    128,
    255,
    256,
    2**15,
    2**16 - 1,
    2**31 - 1,
    2**31,
    2**32 - 1,
    2**47,
    2**62,
    2**63 - 1,
    2**63,
)
# What no answer may be: exceptions that were not chosen.
INTERNAL = {
    "AttributeError",
    "IndexError",
    "KeyError",
    "NameError",
    "AssertionError",
    "struct.error",
    "error",
}
INTERNAL |= {
    "RecursionError",
    "UnboundLocalError",
    "UnicodeDecodeError",
    "UnicodeEncodeError",
    "MemoryError",
    "OverflowError",
}
GOOD = tests.request_bytes("add", {"a": 1.0, "b": 2.0})


def mutated(data: bytes, others: list[bytes], rng: random.Random) -> bytes:
    """*data* with one to four faults in it."""
    out = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        at = rng.randrange(len(out) + 1)
        kind = rng.choice((0, 0, 0, 0, 1, 1, 2, 2, 3, 4, 5, 6, 7, 8))
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
        elif kind == 7:
            other = rng.choice(others)
            start = rng.randrange(len(other) + 1)
            out[at : at + rng.randrange(40)] = other[start : start + rng.randrange(1, 200)]
        else:  # a message, a chunk or a line that comes again and again
            start = rng.randrange(len(out) + 1) // 8 * 8
            piece = bytes(out[start : start + rng.choice((8, 64, 200, 400, 1000))])
            out[at:at] = piece * rng.choice((2, 10, 100, 1000))
    return bytes(out[:2_000_000])


class MemorySocket:
    """A socket whose other side has said all that it will say."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self.written: list[bytes] = []

    def recv(self, size: int) -> bytes:
        got = self._data[:size]
        self._data = self._data[size:]
        return got

    def recv_into(self, view: memoryview) -> int:
        got = self.recv(len(view))
        view[: len(got)] = got
        return len(got)

    def send(self, data: Any) -> int:
        self.written.append(bytes(data))
        return len(data)

    def fileno(self) -> int:
        return -1

    def gettimeout(self) -> None:
        return None

    def settimeout(self, seconds: float | None) -> None:
        """Nothing is waited for."""

    def shutdown(self, how: int) -> None:
        """Nothing is held."""

    def close(self) -> None:
        """Nothing is held."""

    def __enter__(self) -> MemorySocket:
        return self

    def __exit__(self, *exc: object) -> None:
        """Nothing is held."""


def transport_of(sock: Any) -> rpc.Transport:
    """A transport over a socket in memory."""
    return rpc.Transport(rpc.ByteChannel(sock), rpc.TransportKind.PIPE)


def served(server: rpc.RpcServer, data: bytes) -> bytes:
    """What *server* writes to a client that sends *data* and hangs up."""
    sock = MemorySocket(data)
    server.serve(transport_of(sock))
    return b"".join(sock.written)


def well_formed(written: bytes) -> str:
    """Check that a server's bytes are whole streams without an internal error; say what the last one was."""
    outcome = "silence"
    for items in tests.read_streams(written):
        outcome = "answer"
        if any(m.get(b"vgi_rpc.log_level") == b"EXCEPTION" for _, m in items):
            error = tests.error_of(items)
            assert error["type"] not in INTERNAL, error
            outcome = "error"
    return outcome


class Fuzzer:
    """One server of each kind, and the corpora that are mutated."""

    def __init__(self) -> None:
        self.server = tests.make_server(max_request_bytes=8_000_000)
        self.app = tests.wsgi_client(self.server, max_request_bytes=8_000_000)
        options = {
            "token_key": tests.KEY,
            "max_request_bytes": 1_000_000,
            "read_timeout": 0.3,
            "keep_alive_timeout": 0.3,
        }
        _, self.port = tests.in_thread(rpc.serve_http, self.server, **options)
        one = tests.values(1.0, 2.0).batch
        tick = pa.RecordBatch.from_arrays([], schema=pa.schema([]))
        shape = tests.Shape(
            "b", [tests.Point(1)], {"k": tests.Point(3)}, frozenset({"t"})
        ).serialize_to_bytes()
        describe = pa.schema([pa.field("protocol", pa.utf8(), nullable=False)])
        packed = pa.BufferOutputStream()
        schema = rpc.rpc_methods(tests.Service)["echo_list_int"].params_schema
        rows = pa.RecordBatch.from_pydict({"value": [[7] * 3000]}, schema=schema)
        with pa.ipc.new_stream(packed, schema, options=pa.ipc.IpcWriteOptions(compression="lz4")) as writer:
            writer.write_batch(rows, custom_metadata=tests.request_metadata("echo_list_int"))
        self.requests = {
            "add": GOOD,
            "echo_str": tests.request_bytes("echo_str", {"value": "text"}),
            "echo_dict": tests.request_bytes("echo_dict", {"value": [("a", 1.0), ("b", 2.0)]}),
            "echo_list_enum": tests.request_bytes("echo_list_enum", {"value": ["RED", "BLUE"]}),
            "echo_deep_dataclass": tests.request_bytes("echo_deep_dataclass", {"value": shape}),
            "echo_batch": tests.request_bytes(
                "echo_batch", {"value": tests.ipc_bytes(tests.BATCH.schema, tests.BATCH)}
            ),
            "echo_list_int": packed.getvalue().to_pybytes(),
            "describe": tests.request_bytes(
                "describe", {"protocol": "Service"}, describe, protocol=b"vgi_rpc.Reflection.v1"
            ),
            "running/init": tests.request_bytes("running", {"label": "x"})
            + tests.ipc_bytes(tests.VALUE, one, one),
            "plain/init": tests.request_bytes("plain", {"limit": 2, "rows": [1], "pause": 0.0})
            + tests.ipc_bytes(tick.schema, tick, tick, tick),
        }
        self.corpus = list(self.requests.values())
        self.replies = [served(self.server, data) for data in self.corpus]
        head = f"POST /Service/add HTTP/1.1\r\nHost: localhost\r\nContent-Type: {tests.ARROW}\r\n"
        sized = f"{head}Content-Length: {len(GOOD)}\r\n\r\n".encode() + GOOD
        chunked = (
            f"{head}Transfer-Encoding: chunked\r\n\r\n{len(GOOD):x}\r\n".encode()
            + GOOD
            + b"\r\n0\r\nX: y\r\n\r\n"
        )
        get = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"
        self.framed = [get, chunked, sized, sized + get, chunked + sized]
        stream = tests.RawStream(self.app, "running", {"label": "x"})
        self.tokens = stream.tokens
        self.counts: collections.Counter[str] = collections.Counter()

    def bytes(self, rng: random.Random) -> str:
        """A byte stream of one to three requests."""
        data = b"".join(rng.choice(self.corpus) for _ in range(rng.randrange(1, 4)))
        outcome = well_formed(served(self.server, mutated(data, self.corpus, rng)))
        (good,) = tests.read_streams(served(self.server, GOOD))
        assert good[0][0].to_pydict() == {"result": [3.0]}, good
        return outcome

    def body(self, rng: random.Random) -> str:
        """An HTTP body, through WSGI."""
        path = rng.choice(list(self.requests))
        data = mutated(self.requests[path], self.corpus, rng)
        headers = {}
        if rng.random() < 0.2:
            coding = rng.choice(("gzip", "zstd"))
            headers["content_encoding"] = coding
            if rng.random() < 0.7:
                data = rpc.compress_body([data], coding, 1)
            if rng.random() < 0.5:
                data = mutated(data, [data], rng)
        return self.judged(self.app.post(f"/Service/{path}", data, **headers))

    def judged(self, reply: tests.Reply) -> str:
        """Check an answer, and that the next call is served."""
        assert reply.status in (200, 400, 404, 413, 415), reply
        if reply.headers["content-type"] == tests.ARROW:
            wanted = "error"
            if reply.status == 200 and "x-vgi-rpc-error" not in reply.headers:
                wanted = "answer"
            assert well_formed(reply.body) == wanted, reply
        assert self.app.post("/Service/add", GOOD).status == 200
        return str(reply.status)

    def json(self, rng: random.Random) -> str:
        """A JSON body."""
        value = {"point": {"x": 1, "color": "RED", "note": None}, "names": ["a", "b"], "color": "BLUE"}
        data = mutated(json.dumps(value).encode(), self.corpus[:2], rng)
        reply = self.app.post("/Service/defaults", data, content_type="application/json")
        assert reply.status in (200, 400, 413) or (reply.status == 500 and b"TypeError" in reply.body), reply
        assert isinstance(reply.json, dict)
        return str(reply.status)

    def token(self, rng: random.Random) -> str:
        """A turn with mutated tokens; none of them opens, unless it is the very one."""
        tokens = dict(self.tokens)
        for key in rng.choice(([tests.STATE], [tests.CALL_STATE], [tests.STATE, tests.CALL_STATE])):
            tokens[key] = mutated(tokens[key], list(self.tokens.values()), rng)
        data = tests.ipc_bytes(tests.VALUE, (tests.values(1.0).batch, tokens))
        reply = self.app.post("/Service/running/exchange", data)
        assert (reply.status == 200) == (tokens == self.tokens), (reply, tokens)
        return self.judged(reply)

    def framing(self, rng: random.Random) -> str:
        """A raw HTTP request, over a socket."""
        data = mutated(rng.choice(self.framed), self.framed, rng)
        answer = b""
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port), 3.0) as raw:
            raw.sendall(data)
            raw.shutdown(socket.SHUT_WR)
            while got := raw.recv(65536):
                answer += got
        statuses = [int(part[:3]) for part in answer.split(b"HTTP/1.1 ")[1:] if part[:3].isdigit()]
        assert not answer or answer.startswith(b"HTTP/1.1 "), answer[:200]
        assert 500 not in statuses, (data, answer)
        return str((statuses or ["closed"])[0])

    def byte_client(self, rng: random.Random) -> str:
        """Our client, on a byte stream whose server answers something else."""
        answer = mutated(rng.choice(self.replies), self.replies, rng)
        return self.called(rpc.RpcConnection(tests.Service, transport_of(MemorySocket(answer))), rng)

    def http_client(self, rng: random.Random) -> str:
        """Our HTTP client, whose server answers something else."""
        good = rng.choice(self.replies)
        head = rng.choice(("", "Connection: close\r\n", "Content-Encoding: zstd\r\n"))
        answer = (
            f"HTTP/1.1 200 OK\r\nContent-Type: {tests.ARROW}\r\n{head}Content-Length: {len(good)}\r\n\r\n".encode()
            + good
        )
        health = (
            b"HTTP/1.1 200 OK\r\nVGI-Accept-Max-Response-Bytes-Support: true\r\nContent-Length: 0\r\n\r\n"
        )
        data = mutated(answer, self.framed, rng)
        with socket.create_server(("127.0.0.1", 0)) as listening:
            listening.settimeout(5.0)
            pid = os.fork()
            if not pid:
                with contextlib.suppress(OSError):
                    for _ in range(2):
                        connected = listening.accept()[0]
                        connected.settimeout(1.0)
                        if connected.recv(5) == b"HEAD ":
                            connected.sendall(health)
                            connected.recv(100_000)
                        connected.sendall(data)
                        connected.close()
                os._exit(0)
            url = f"http://127.0.0.1:{listening.getsockname()[1]}"
            try:
                return self.called(rpc.http_connect(tests.Service, url, timeout=5.0), rng)
            finally:
                os.kill(pid, 9)
                os.waitpid(pid, 0)

    def called(self, connection: Any, rng: random.Random) -> str:
        """Call something; what comes is an answer of the declared type, or one of our errors."""
        with connection as proxy:
            try:
                which = rng.randrange(4)
                if which == 0:
                    assert isinstance(proxy.echo_str("q"), str)
                elif which == 1:
                    assert isinstance(proxy.add(1.0), float)
                elif which == 2:
                    for _ in zip(range(10), proxy.plain(2)):
                        pass
                else:
                    rpc.introspect(proxy)
                return "answer"
            except RpcErrors as exc:
                assert isinstance(exc, rpc.RpcError) or type(exc) is rpc.ParameterError, repr(exc)
                return "error"

    def template(self, rng: random.Random) -> str:
        """The same bytes with templates on and off: the same values, the same refusals."""
        path = rng.choice([p for p in self.requests if "/" not in p])
        data = mutated(self.requests[path], self.corpus, rng)
        found = [self.shown(served(self.server, data))]
        with tests.templates_off():
            found.append(self.shown(served(tests.make_server(max_request_bytes=8_000_000), data)))
        assert found[0] == found[1], (data, found)
        return found[0][-1][0] if found[0] else "silence"

    @staticmethod
    def shown(written: bytes) -> list[Any]:
        """An answer without what differs from call to call."""
        shown: list[Any] = []
        for items in tests.read_streams(written):
            if any(m.get(b"vgi_rpc.log_level") == b"EXCEPTION" for _, m in items):
                error = tests.error_of(items)
                shown.append(("error", error["type"], error["text"]))
            else:
                shown.append(("answer", [repr(batch.to_pydict()) for batch, _ in items]))
        return shown

    TARGETS = (
        "bytes",
        "body",
        "json",
        "token",
        "framing",
        "byte_client",
        "template",
        "bytes",
        "body",
        "http_client",
    )


RpcErrors = (rpc.RpcError, TypeError)


def memory() -> int:
    """Resident bytes of this process."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


def run(options: argparse.Namespace) -> None:
    """Run cases until the time is over; the first that breaks the law ends the run."""
    seed = options.seed
    if seed is None:
        seed = random.SystemRandom().randrange(10**9)
    print(f"seed {seed}", flush=True)
    tests.setUpModule()
    fuzzer = Fuzzer()
    number = options.only or 0
    slowest = 0.0
    begun = 0
    end = time.monotonic() + options.seconds
    while time.monotonic() < end:
        rng = random.Random(f"{seed}/{number}")
        target = Fuzzer.TARGETS[number % len(Fuzzer.TARGETS)]
        before = memory()
        clock = time.process_time()
        try:
            outcome = getattr(fuzzer, target)(rng)
            took = time.process_time() - clock
            assert memory() - before < 200_000_000, f"{memory() - before} more bytes in memory"
            assert took < 3.0 or number == 0, f"{took:.1f} s of CPU"
        except BaseException:
            traceback.print_exc()
            raise SystemExit(f"FAILED: {target}; again: fuzz.py --seed {seed} --only {number}") from None
        fuzzer.counts[f"{target} {outcome}"] += 1
        if number:
            slowest = max(slowest, took)
        if number == 2000:
            begun = memory()
        number += 1
        if options.only is not None:
            break
    grown = 0.0
    if begun:
        grown = (memory() - begun) / 1e6
    print(
        f"{number} cases, slowest {slowest:.3f} s of CPU, memory grew by {grown:.1f} MB after the first 2000"
    )
    for name, count in sorted(fuzzer.counts.items()):
        print(f"  {name:24} {count}")
    if grown > 100:
        raise SystemExit(f"FAILED: memory grew; seed {seed}")


REFERENCE = """
import importlib, io, sys
from typing import Protocol
from vgi_rpc.rpc import PipeTransport, RpcServer

class Service(Protocol):
    def add(self, a: float, b: float = 2.0) -> float: ...
    def echo_str(self, value: str) -> str: ...
    def echo_dict(self, value: dict[str, float]) -> dict[str, float]: ...
    def echo_list_int(self, value: list[int]) -> list[int]: ...

class Impl:
    def add(self, a, b=2.0): return a + b
    def echo_str(self, value): return value
    def echo_dict(self, value): return value
    def echo_list_int(self, value): return value

server = RpcServer(Service, Impl())
source, sink = sys.stdin.buffer, sys.stdout.buffer
while size := source.read(4):
    out = io.BytesIO()
    try:
        server.serve_one(PipeTransport(io.BytesIO(source.read(int.from_bytes(size, "little"))), out))
    except BaseException:
        pass
    sink.write(len(out.getvalue()).to_bytes(4, "little") + out.getvalue())
    sink.flush()
"""


def differential(options: argparse.Namespace) -> None:
    """Send the same mutated requests to the public package; where both answer, the values are the same.

    A server of ours without row templates gives the same answers and the same refusals as the one with them.
    """
    seed = options.seed or 1
    fuzzer = Fuzzer()
    paths = ["add", "echo_str", "echo_dict", "echo_list_int"]
    counts: collections.Counter[str] = collections.Counter()
    with tests.templates_off():
        plain = tests.make_server(max_request_bytes=8_000_000)
        for path in paths:  # what it answers first, it answers so from then on
            served(plain, fuzzer.requests[path])
    pipe = subprocess.PIPE
    with subprocess.Popen(
        [options.differential, "-P", "-c", REFERENCE], stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL
    ) as peer:
        end = time.monotonic() + options.seconds
        number = 0
        while time.monotonic() < end:
            rng = random.Random(f"{seed}/{number}")
            number += 1
            data = mutated(fuzzer.requests[rng.choice(paths)], fuzzer.corpus, rng)[:100_000]
            peer.stdin.write(len(data).to_bytes(4, "little") + data)
            peer.stdin.flush()
            theirs = peer.stdout.read(int.from_bytes(peer.stdout.read(4), "little"))
            ours = served(fuzzer.server, data)
            ordinary = served(plain, data)
            if Fuzzer.shown(ordinary) != Fuzzer.shown(ours):
                raise SystemExit(f"FAILED: with templates {ours!r}, without {ordinary!r}: {data!r}")
            shown = []
            for written in (ours, theirs):
                try:
                    shown.append(Fuzzer.shown(written)[:1])
                except Exception:
                    shown.append([])
            kinds = [found[0][0] if found else "none" for found in shown]
            counts[" / ".join(kinds)] += 1
            if kinds == ["answer", "answer"] and shown[0] != shown[1]:
                raise SystemExit(f"FAILED: ours {shown[0]}, theirs {shown[1]}: {data!r}")
        peer.stdin.close()
    print(f"{number} inputs, ours / theirs: {dict(counts)}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--seed", type=int)
    parser.add_argument("--only", type=int, help="run one case by its number")
    parser.add_argument(
        "--differential", metavar="PYTHON", help="compare with the public package of that interpreter"
    )
    given = parser.parse_args()
    if given.differential:
        differential(given)
    else:
        run(given)
