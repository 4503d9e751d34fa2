"""``kvlode serve-metrics``: Prometheus metrics of a store that another process has open."""

from __future__ import annotations

import errno
import signal
import sys
import threading
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from ...format.errors import DeviceError, InvalidConfig
from ..exit_codes import EXIT_FINE
from ..store_files import StoreFiles

if TYPE_CHECKING:
    from wsgiref.simple_server import WSGIServer

    from prometheus_client import CollectorRegistry


def serve_metrics(path: Path, *, address: str, port: int, once: bool) -> int:
    """Serve until interrupted (SIGINT, SIGTERM), or print what would be served, once; the exit code.

    Raises ``PathUnavailable`` when there is no store, ``InvalidConfig`` when ``prometheus-client`` is missing, ``DeviceError`` when
    the port is taken or the address is not one of this machine.
    """
    registry = registry_of(path)
    if once:
        from prometheus_client import generate_latest

        sys.stdout.write(generate_latest(registry).decode())
        return EXIT_FINE
    server, thread = _start(registry, address, port)
    try:
        shown = f"[{server.server_address[0]!s}]" if ":" in str(server.server_address[0]) else str(server.server_address[0])
        print(f"metrics of {path} at http://{shown}:{server.server_address[1]}/metrics", file=sys.stderr, flush=True)
        _wait_for_the_end()
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
    return EXIT_FINE


def registry_of(path: Path) -> CollectorRegistry:
    """A registry with the metrics of the store in folder ``path``, and nothing else. Raises as ``serve_metrics`` does."""
    try:
        from prometheus_client import CollectorRegistry

        from .collector import PublishedCollector
    except ImportError as error:
        raise InvalidConfig(
            "serve-metrics needs prometheus-client",
            expected="the package prometheus-client",
            actual=str(error),
            action="pip install 'kvlode[metrics]'",
        ) from error
    StoreFiles(path).close()  # says so when there is no store
    registry = CollectorRegistry()
    registry.register(PublishedCollector(path))
    return registry


def _start(registry: CollectorRegistry, address: str, port: int) -> tuple[WSGIServer, threading.Thread]:
    from prometheus_client import start_http_server

    try:
        return start_http_server(port, addr=address, registry=registry)
    except OSError as error:
        actions = {
            errno.EADDRINUSE: "Stop what listens there, or choose another --port.",
            errno.EACCES: "Choose a --port above 1023.",
        }
        action = actions.get(error.errno or 0, "Check --address: it has to be one of this machine.")
        raise DeviceError("listen", f"{address}:{port}", errno=error.errno, action=action) from error


def _wait_for_the_end() -> None:
    """Until SIGINT or SIGTERM."""
    ended = threading.Event()

    def end(number: int, frame: FrameType | None) -> None:
        ended.set()

    before = {number: signal.signal(number, end) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        ended.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
