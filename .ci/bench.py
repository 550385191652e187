#!/usr/bin/env python3
"""Print what this machine does: calls, batches and turns a second, and megabytes a second of a 16 MiB echo, per transport."""

from __future__ import annotations

import argparse
import contextlib
import os
import pathlib
import sys
import tempfile
import time
from collections.abc import Iterator
from typing import Any

TOP = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(TOP))

import pyarrow as pa

import test_vgi_rpc as tests
import vgi_rpc as rpc


@contextlib.contextmanager
def connected(kind: str, folder: str) -> Iterator[Any]:
    """A proxy of the tests' service over one transport; but for the first the server is a process of its own."""
    if kind == "in process":
        with rpc.serve_pipe(tests.Service, tests.ServiceImpl()) as proxy:
            yield proxy
    elif kind == "pipe":
        with rpc.connect(tests.Service, tests.WORKER) as proxy:
            yield proxy
    else:
        flags = {"unix": ["--unix", os.path.join(folder, "s")], "tcp": ["--tcp", "0"], "http": ["--http"]}[
            kind
        ]
        with tests.Worker(*flags) as worker, contextlib.ExitStack() as stack:
            if kind == "unix":
                connection: Any = rpc.unix_connect(tests.Service, os.path.join(folder, "s"))
            elif kind == "tcp":
                connection = rpc.tcp_connect(tests.Service, "127.0.0.1", int(worker.port))
            else:
                connection = rpc.http_connect(tests.Service, worker.url)
            yield stack.enter_context(connection)


def rate(seconds: float, one: Any) -> float:
    """How many units a second *one* does, which returns how many each call was; the first call does not count."""
    one()
    done = 0
    started = time.perf_counter()
    while (spent := time.perf_counter() - started) < seconds:
        done += one()
    return done / spent


def main() -> None:
    """Measure and print a table in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=1.0, help="for each figure")
    seconds = parser.parse_args().seconds
    ten = tests.values(*map(float, range(10)))
    blob = os.urandom(1 << 20) * 16
    versions = f"vgi_rpc {rpc.__version__}, Python {sys.version.split()[0]}, pyarrow {pa.__version__}"
    print(f"{versions}, {os.cpu_count()} CPUs, {time.strftime('%Y-%m-%d')}\n")
    print("| transport | unary calls/s | producer batches/s | exchange turns/s | 16 MiB echo MB/s |")
    print("|---|--:|--:|--:|--:|")
    with tempfile.TemporaryDirectory() as folder:
        for kind in ("in process", "pipe", "unix", "tcp", "http"):
            with connected(kind, folder) as proxy:
                figures = [rate(seconds, lambda: int(proxy.add(a=1.0, b=2.0) == 3.0))]
                figures.append(rate(seconds, lambda: sum(item.batch.num_rows for item in proxy.plain(500))))
                with proxy.filter() as session:
                    figures.append(rate(seconds, lambda: int(session.exchange(ten).batch.num_rows == 10)))
                figures.append(rate(seconds, lambda: len(proxy.echo_bytes(blob)) / 1e6))
            print(f"| {kind} | " + " | ".join(f"{figure:,.0f}" for figure in figures) + " |", flush=True)


if __name__ == "__main__":
    main()
