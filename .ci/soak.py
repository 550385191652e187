#!/usr/bin/env python3
"""Look for leaks and wrong answers: ``soak.py --seconds 300 [--seed N]``, or ``soak.py --counts``.

The soak runs clients, servers and faults at once, and compares every answer with its question. ``--counts`` does a great
number of one thing, one thing after the other: calls, abandoned streams, worker restarts, idle connections, one large batch.
Descriptors, threads, zombies and memory must be afterwards what they were before.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import dataclasses
import os
import pathlib
import random
import re
import resource
import shutil
import signal
import socket
import struct
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any

TOP = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(TOP))

import pyarrow as pa

import test_vgi_rpc as tests
import vgi_rpc as rpc


def held(process: int | None = None) -> tuple[int, int, int]:
    """Descriptors, threads and zombie children of a process."""
    place = pathlib.Path("/proc", str(process or os.getpid()))
    zombies = 0
    for task in pathlib.Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            fields = task.read_text().rpartition(") ")[2].split()
            zombies += fields[0] == "Z" and fields[1] == place.name
    return len(os.listdir(place / "fd")), len(os.listdir(place / "task")), zombies


def megabytes(process: int | None = None) -> float:
    """Resident memory of a process."""
    status = pathlib.Path("/proc", str(process or os.getpid()), "status").read_text()
    return int(re.search(r"VmRSS:\s+(\d+)", status)[1]) / 1000


def settled(process: int | None = None) -> tuple[int, int, int]:
    """What a process holds once that has stayed the same for two seconds, or after twenty."""
    seen = [held(process)]
    while len(seen) < 40 and (len(seen) < 5 or len(set(seen[-5:])) > 1):
        time.sleep(0.5)
        seen.append(held(process))
    return seen[-1]


class Soak:
    """Clients, servers and faults at once."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.stopping = threading.Event()
        self.lock = threading.Lock()
        self.counts: collections.Counter[str] = collections.Counter()
        self.wrong: list[str] = []
        self.folder = tempfile.mkdtemp()
        self.pool = rpc.WorkerPool(max_idle=2, idle_timeout=1.0, stderr=rpc.StderrMode.DEVNULL)
        server = tests.make_server()
        options = {
            "token_key": tests.KEY,
            "read_timeout": 0.5,
            "keep_alive_timeout": 2.0,
            "max_connections": 64,
        }
        _, self.http_port = tests.in_thread(rpc.serve_http, server, **options)
        _, self.tcp_port = tests.in_thread(rpc.serve_tcp, server, threaded=True)
        (self.unix,) = tests.in_thread(rpc.serve_unix, server, os.path.join(self.folder, "s"), threaded=True)
        self.worker = tests.Worker("--http")
        self.port = self.worker.port

    def told(self, what: str, count: int = 1) -> None:
        """Count what happened."""
        with self.lock:
            self.counts[what] += count

    def ask(self, proxy: Any, rng: random.Random) -> None:
        """Some calls, an exchange and a producer; each answer must be to its own question."""
        number = float(rng.randrange(10**6))
        found = [proxy.add(number, 1.0), proxy.echo_str(str(number))]
        expected: list[Any] = [number + 1.0, str(number)]
        with proxy.running() as session:
            for i in range(3):
                found += session.exchange(tests.values(number)).batch.to_pydict()["sum"]
                expected.append(number * (i + 1))
        limit = rng.randrange(1, 30)
        found += [item.batch.column(0)[0].as_py() for item in proxy.plain(limit)]
        expected += list(range(limit))
        if found != expected:
            self.wrong.append(f"expected {expected}, got {found}")
        self.told("answers", len(found))

    def client(self, connection: Any, rng: random.Random) -> None:
        """One connection: calls, streams that are left, now and then a call that takes too long."""
        with connection as proxy:
            for _ in range(rng.randrange(1, 6)):
                if rng.random() < 0.3:
                    for _, item in zip(range(3), proxy.plain(10**6)):
                        item.batch.to_pydict()
                    self.told("abandoned streams")
                self.ask(proxy, rng)
            if rng.random() < 0.1:
                with self.error():
                    rpc.with_options(proxy, timeout=0.05).wait(5.0)
                self.told("deadlines")

    @contextlib.contextmanager
    def error(self) -> Iterator[None]:
        """A block that must end with an error of ours."""
        try:
            yield
        except rpc.RpcError:
            return
        self.wrong.append("no error where there should be one")

    def local(self, rng: random.Random) -> None:
        """A client of one of the listeners."""
        connections: list[Callable[[], Any]] = [
            lambda: rpc.http_connect(tests.Service, f"http://127.0.0.1:{self.http_port}", timeout=20.0),
            lambda: rpc.tcp_connect(tests.Service, "127.0.0.1", self.tcp_port, timeout=20.0),
            lambda: rpc.unix_connect(tests.Service, self.unix, timeout=20.0),
        ]
        self.client(rng.choice(connections)(), rng)

    def pooled(self, rng: random.Random) -> None:
        """A client of a pooled worker, which is killed now and then."""
        if rng.random() >= 0.15:
            self.client(self.pool.connect(tests.Service, tests.WORKER, timeout=20.0), rng)
            return
        with self.pool.connect(tests.Service, tests.WORKER) as proxy:
            process = proxy.process_id()
            session = proxy.plain(10**9)
            os.kill(process, signal.SIGKILL)
            with self.error():
                for _ in range(10_000):  # what was in the pipe may still be read
                    session.tick()
            self.told("killed workers")

    def hostile(self, rng: random.Random) -> None:
        """Half-open, slow and broken clients."""
        body = tests.request_bytes("plain", {"limit": 10**9, "rows": [1], "pause": 0.0})
        head = f"POST /Service/plain/init HTTP/1.1\r\nHost: localhost\r\nContent-Type: {tests.ARROW}\r\n"
        data = f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body
        port = self.http_port
        if rng.random() < 0.4:
            data = body
            port = self.tcp_port
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 2.0) as raw:
            kind = rng.randrange(3)
            if kind == 0:
                raw.sendall(data[: rng.randrange(len(data))])
            elif kind == 1:
                for byte in data[:20]:
                    raw.sendall(bytes([byte]))
                    time.sleep(0.01)
            else:
                raw.sendall(data)
                raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            if rng.random() < 0.3:
                time.sleep(rng.random())
        self.told("hostile clients")

    def restarted(self, rng: random.Random) -> None:
        """Calls to an HTTP server that is stopped or killed again and again: a right answer or an error that says so."""
        try:
            with rpc.http_connect(tests.Service, f"http://127.0.0.1:{self.port}", timeout=10.0) as proxy:
                self.ask(proxy, rng)
        except rpc.RpcError as exc:
            if exc.code is not rpc.Code.UNAVAILABLE:
                self.wrong.append(f"while restarting: {exc!r}")
            self.told("calls to a server that was not there")

    def restarting(self, rng: random.Random) -> None:
        """Stop or kill that server and start it again."""
        time.sleep(1.0 + rng.random())
        self.worker.process.send_signal(rng.choice((signal.SIGTERM, signal.SIGKILL)))
        self.worker.process.communicate()
        self.worker = tests.Worker("--http", "--port", str(self.port))
        self.told("restarts")

    def loop(self, work: Callable[[random.Random], None], number: int) -> None:
        """Do *work* until the soak stops."""
        rng = random.Random(f"{self.seed}/{number}")
        while not self.stopping.is_set():
            try:
                work(rng)
            except BaseException as exc:
                self.wrong.append(f"{work.__name__}: {exc!r}\n{traceback.format_exc()}")
                self.stopping.set()

    def run(self, seconds: float) -> None:
        """Run everything at once."""
        self.stopping.clear()
        works = [
            self.local,
            self.local,
            self.pooled,
            self.pooled,
            self.hostile,
            self.hostile,
            self.restarted,
            self.restarting,
        ]
        threads = [threading.Thread(target=self.loop, args=(work, n)) for n, work in enumerate(works)]
        for thread in threads:
            thread.start()
        self.stopping.wait(seconds)
        self.stopping.set()
        for thread in threads:
            thread.join()

    def close(self) -> None:
        """Stop the workers."""
        self.pool.close()
        self.worker.__exit__()
        shutil.rmtree(self.folder, ignore_errors=True)


def soak(seconds: float, seed: int) -> None:
    """Run the soak and print what it found."""
    print(f"seed {seed}", flush=True)
    soaking = Soak(seed)
    try:
        soaking.run(min(20.0, seconds / 4))  # caches fill, pools of memory reach their size
        before = settled()
        memory = megabytes()
        soaking.run(seconds)
        after = settled()
        grown = megabytes() - memory
    finally:
        soaking.close()
    for name, count in sorted(soaking.counts.items()):
        print(f"  {name:40} {count}")
    print(f"descriptors, threads, zombies: {before} before, {after} after; memory grew by {grown:.1f} MB")
    leaked = after[0] > before[0] + 3 or after[1] > before[1] + 1 or after[2]
    if soaking.wrong or leaked or grown > 32:
        raise SystemExit("FAILED\n" + "\n".join(soaking.wrong[:5]))


def expect(found: Any, expected: Any) -> None:
    """End the run unless both are the same."""
    if found != expected:
        raise SystemExit(f"FAILED: expected {expected!r}, got {found!r}")


def repeated(what: str, number: int, step: Callable[[int], None], server: int | None = None) -> None:
    """Do *step* so often; print what client and server held after a tenth and at the end, where more is a failure."""
    started = time.monotonic()
    before: list[Any] = []
    processes = [process for process in (os.getpid(), server) if process]
    for i in range(number):
        if i == number // 10:
            before = [(settled(process), megabytes(process)) for process in processes]
        step(i)
    after = [(settled(process), megabytes(process)) for process in processes]
    print(
        f"{number:,} {what}: {time.monotonic() - started:.1f} s; {before} before, {after} after", flush=True
    )
    for (old, memory), (new, now) in zip(before, after):
        if new[0] > old[0] + 3 or new[1] > old[1] + 1 or new[2] or now > memory + 32:
            raise SystemExit("FAILED: more is held than before")


def restart(i: int) -> None:
    """One worker from its start to its end; every other one is killed in a stream."""
    with rpc.connect(tests.Service, tests.WORKER, stderr=rpc.StderrMode.DEVNULL) as proxy:
        expect(proxy.add(float(i), 1.0), i + 1.0)
        if i % 2:
            session = proxy.plain(10**9)
            expect(session.tick().batch.to_pydict(), {"value": [0]})
            os.kill(proxy_process(session), signal.SIGKILL)
            with contextlib.suppress(rpc.TransportError):
                for _ in range(10**6):
                    session.tick()
                expect("no error", "an error")


def proxy_process(session: Any) -> int:
    """The only child of this process: the worker."""
    children = pathlib.Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    return int(children[-1])


def idle_connections(worker: tests.Worker, number: int) -> None:
    """So many connections that say nothing: health is answered, a call is served or told to come back."""
    with contextlib.ExitStack() as stack:
        for _ in range(number):
            stack.enter_context(socket.create_connection(("127.0.0.1", int(worker.port))))
        with socket.create_connection(("127.0.0.1", int(worker.port)), 10.0) as raw:
            raw.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
            expect(raw.recv(12), b"HTTP/1.1 200")
    with rpc.http_connect(tests.Service, worker.url) as proxy:
        until = time.monotonic() + 10.0
        while True:  # the server may not have seen yet that so many have left
            try:
                expect(proxy.add(1.0), 3.0)
                return
            except rpc.RpcError as exc:
                if not exc.is_retryable() or time.monotonic() > until:
                    raise


@dataclasses.dataclass
class Same(rpc.ExchangeState):
    """Answers with what comes."""

    def exchange(self, input: rpc.AnnotatedBatch, out: rpc.OutputCollector, ctx: rpc.CallContext) -> None:
        out.emit(input.batch)


class Large:
    """The service of the large batch."""

    def same(self) -> rpc.Stream[Same]:
        return rpc.Stream(tests.VALUE, Same(), input_schema=tests.VALUE)


def large_batch(size: int = 2_362_232_013) -> None:
    """A value above what one system call takes (2.2 GiB), to a worker and back."""
    free = int(re.search(r"MemAvailable:\s+(\d+)", pathlib.Path("/proc/meminfo").read_text())[1]) * 1024
    if free < 6 * size:
        raise SystemExit(
            f"FAILED: {size:,} bytes there and back need {6 * size:,} bytes of memory, {free:,} are free"
        )
    started = time.monotonic()
    data = pa.py_buffer(os.urandom(1 << 20) * (1 + (size >> 20)))
    numbers = pa.Array.from_buffers(pa.float64(), size // 8, [None, data])
    batch = pa.RecordBatch.from_arrays([numbers], schema=tests.VALUE)
    with rpc.connect(Large, [sys.executable, __file__, "worker"]) as proxy, proxy.same() as session:
        answer = session.exchange(batch).batch
        expect(
            answer.column(0).view(pa.int64()).equals(batch.column(0).view(pa.int64())), True
        )  # NaN among them
    print(f"a batch of {batch.nbytes:,} bytes over a pipe and back: {time.monotonic() - started:.1f} s")


def counts() -> None:
    """Calls, abandoned streams, restarts and idle connections in the numbers in which they must be borne."""
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(4096, most), min(4096, most)))
    for kind in ("a pipe", "HTTP"):
        with contextlib.ExitStack() as stack:
            if kind == "HTTP":
                worker = stack.enter_context(tests.Worker("--http"))
                proxy: Any = stack.enter_context(rpc.http_connect(tests.Service, worker.url))
            else:
                proxy = stack.enter_context(rpc.connect(tests.Service, tests.WORKER))
            server = proxy.process_id()
            repeated(
                f"calls over {kind}",
                100_000,
                lambda i, p=proxy: expect(p.add(float(i), 1.0), i + 1.0),
                server,
            )
            repeated(
                f"abandoned streams over {kind}",
                10_000,
                lambda i, p=proxy: expect(next(iter(p.plain(10**9))) is not None, True),
                server,
            )
            expect(proxy.add(1.0), 3.0)
    repeated("worker restarts, every other one by kill -9 in a stream", 1_000, restart)
    with tests.Worker("--http") as worker:
        repeated(
            "times 1,000 idle connections", 10, lambda _: idle_connections(worker, 1_000), worker.process.pid
        )
    large_batch()


if __name__ == "__main__":
    if sys.argv[1:] == ["worker"]:
        sys.argv.pop()
        rpc.run_server(Large)
        sys.exit()
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=300.0)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(10**9))
    parser.add_argument(
        "--counts", action="store_true", help="a great number of one thing, one thing after the other"
    )
    given = parser.parse_args()
    tests.setUpModule()
    if given.counts:
        counts()
    else:
        soak(given.seconds, given.seed)
