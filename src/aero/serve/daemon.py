"""A server, or the client's endpoint, as a process: it listens until it is told to stop.

SIGTERM and SIGINT drain: running requests get their time. A second one ends at once. SIGHUP makes a server read its
configuration again.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import signal
import socket
import sys
import time
from pathlib import Path

import uvicorn

from aero.errors import AeroError
from aero.private.dumps import forbid_dumps
from aero.serve.desk import Desk
from aero.serve.endpoint import Endpoint
from aero.serve.metrics import Metrics
from aero.serve.server import Server

log = logging.getLogger("aero.serve")

_STANDARD = set(vars(logging.makeLogRecord({})))


class JsonLines(logging.Formatter):
    """One JSON object a line: time, level, event, and what the event brings."""

    def format(self, record: logging.LogRecord) -> str:
        """The line."""
        line = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(record.created)),
            "level": record.levelname.lower(),
            # The rest of a library's message could quote a value.
            "event": record.getMessage().partition("\n")[0],
        }
        line.update({key: value for key, value in vars(record).items() if key not in _STANDARD and key != "message"})
        if record.exc_info and record.exc_info[0] is not None:
            # The kind alone: a traceback's text could quote a value.
            line["exception"] = record.exc_info[0].__name__
        return json.dumps(line, default=str)


def start_log() -> None:
    """Structured log on the error stream. Nothing in it is a secret: events, sessions' numbers, addresses, reasons."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines())
    # The libraries' own lines as well: their tracebacks could quote a value, and a line's first words cannot.
    for name in ("aero.serve", "asyncio", "uvicorn.error"):
        logger = logging.getLogger(name)
        logger.handlers = [handler]
        logger.propagate = False
        logger.setLevel(logging.INFO if name == "aero.serve" else logging.ERROR)
    # A line that cannot be written, on a full disk say, is lost; a traceback of that must not follow it.
    logging.raiseExceptions = False


async def serve(server: Server) -> None:
    """Run until a signal ends it."""
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()

    def told_to_stop() -> None:
        if stop.is_set():
            # Parties notice that this process is gone and end.
            os._exit(1)
        stop.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, told_to_stop)
    reloading: set[asyncio.Future[None]] = set()

    def told_to_reload() -> None:
        task = asyncio.ensure_future(server.reload())
        reloading.add(task)
        task.add_done_callback(reloading.discard)

    loop.add_signal_handler(signal.SIGHUP, told_to_reload)
    await server.start()
    if server.settings.metrics is not None:
        server.metrics.serve(server.settings.metrics)
    await stop.wait()
    await server.drain()


def run(server: Server) -> None:
    """``serve`` in a fresh event loop, without dumps: they would hold what passes through."""
    forbid_dumps()
    start_log()
    asyncio.run(serve(server))


def offer(config: Path, port: int) -> None:
    """The client's endpoint on 127.0.0.1, until a signal ends it. Raises AeroError if no session can be had."""
    forbid_dumps()
    start_log()
    asyncio.run(_offer(config, port))


async def _offer(config: Path, port: int) -> None:
    desk = Desk(config, Metrics())
    # The socket first: a taken port shows before the other parties are troubled.
    try:
        listener = socket.create_server(("127.0.0.1", port))
    except OSError as error:
        raise AeroError(f"Cannot listen on 127.0.0.1:{port}: {error.strerror}; choose another --port.") from None
    with listener:
        await desk.start()
        settings = uvicorn.Config(
            Endpoint(desk).app, log_config=None, access_log=False, timeout_graceful_shutdown=30, server_header=False
        )
        log.info("endpoint", extra={"url": f"http://127.0.0.1:{port}/", "model": desk.model})
        await uvicorn.Server(settings).serve(sockets=[listener])
