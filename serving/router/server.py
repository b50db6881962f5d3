"""The router's HTTP server: time limits of clients, errors in OpenAI's form, graceful shutdown."""

from __future__ import annotations

import asyncio
import gc
import json
import socket
from functools import partial
from typing import Any, cast

import h11
import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.flow_control import CLOSE_HEADER
from uvicorn.protocols.http.h11_impl import H11Protocol

from serving.router.errors import RefusedError
from serving.router.limits import MOST_UNFINISHED, Limits, ShutdownTimer

LAST_REQUEST_S = 1.0
"""After SIGTERM, for a connection without a request, since one may be on its way."""


def make_server(app: FastAPI, limits: Limits, host: str = "127.0.0.1", port: int = 0) -> uvicorn.Server:
    """Make a server of `make_app`'s application."""
    clients = _Clients(limits.client_s)
    config = uvicorn.Config(
        app,
        host=host,
        port=port,
        http=cast("type[asyncio.Protocol]", partial(_Connection, clients=clients)),
        ws="none",
        log_level="warning",
        access_log=False,
        timeout_graceful_shutdown=int(limits.stop_s) + 3,
    )
    return _Server(config, clients, app.state.stopping, limits.stop_s)


def rarely_collect() -> None:
    """Collect garbage seldom, and never among what is loaded by now.

    A body of a million lists otherwise stops the process for a second: each of the collections that its parsing causes
    walks through all modules.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(10_000, 20, 20)


def allow_connections(limits: Limits) -> None:
    """Raise the limit on open files as far as needed and allowed."""
    try:
        import resource
    except ImportError:  # Windows has no such limit
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 2 * MOST_UNFINISHED + 4 * limits.in_flight + 256
    if hard != resource.RLIM_INFINITY:
        wanted = min(wanted, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


class _Server(uvicorn.Server):
    """After SIGTERM answers the requests in flight, and closes the rest after `stop_s`."""

    def __init__(self, config: uvicorn.Config, clients: _Clients, stopping: ShutdownTimer, stop_s: float) -> None:
        super().__init__(config)
        self._clients, self._stopping, self._stop_s = clients, stopping, stop_s

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        loop = asyncio.get_running_loop()
        self._clients.are_last = True
        loop.call_later(self._stop_s, self._stopping.end)
        loop.call_later(self._stop_s + 1, self._abort)
        for _ in range(3):  # turns of the loop, in which the connections in the socket's queue are taken
            await asyncio.sleep(0)
        await super().shutdown(sockets)

    def _abort(self) -> None:
        for connection in list(self.server_state.connections):
            connection.transport.abort()


class _Clients:
    """Connections without a request in flight, each with its time limit, the earliest first."""

    def __init__(self, limit_s: float) -> None:
        self.limit_s, self.are_last = limit_s, False
        self._silent: dict[_Connection, asyncio.TimerHandle] = {}

    def add(self, connection: _Connection, seconds: float) -> None:
        """Cut the connection after the time; the earliest at once where there are too many."""
        self.remove(connection)
        self._silent[connection] = connection.loop.call_later(seconds, connection.transport.abort)
        if len(self._silent) > MOST_UNFINISHED:
            earliest = next(iter(self._silent))
            self.remove(earliest)
            earliest.transport.abort()

    def remove(self, connection: _Connection) -> None:
        if connection in self._silent:
            self._silent.pop(connection).cancel()


class _Connection(H11Protocol):
    """uvicorn's protocol with time limits for request heads and answers."""

    def __init__(self, *arguments: Any, clients: _Clients, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._clients = clients
        self._unread: asyncio.TimerHandle | None = None
        self._is_refused = False

    @property
    def _is_answering(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._wait()

    def connection_lost(self, exc: Exception | None) -> None:
        self._clients.remove(self)
        self._forget_unread()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if not self._is_refused:
            super().data_received(data)

    def handle_events(self) -> None:
        super().handle_events()
        if self._is_answering:
            self._clients.remove(self)
            if self._clients.are_last:
                self._close_after_answer()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if not self._is_answering and not self.transport.is_closing():
            self._wait()

    def _wait(self) -> None:
        self._clients.add(self, LAST_REQUEST_S if self._clients.are_last else self._clients.limit_s)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._unread = self.loop.call_later(self._clients.limit_s, self.transport.abort)

    def resume_writing(self) -> None:
        self._forget_unread()
        super().resume_writing()

    def _forget_unread(self) -> None:
        if self._unread is not None:
            self._unread.cancel()

    def shutdown(self) -> None:
        """End after the request that is in flight or on its way."""
        if self._is_answering:
            self._close_after_answer()
        else:
            self._wait()

    def _close_after_answer(self) -> None:
        self.cycle.keep_alive = False
        self.cycle.scope["headers"] = [*self.cycle.scope["headers"], CLOSE_HEADER]  # so that the answer says so too

    def send_400_response(self, msg: str) -> None:
        """End a connection that is not HTTP, with an answer where none has begun."""
        begun = self._is_answering and self.cycle.response_started
        if self._is_answering:
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        if begun or self.conn.our_state not in (h11.IDLE, h11.SEND_RESPONSE):
            self.transport.close()
            return
        self._is_refused = True
        content = json.dumps(RefusedError(400, msg).body).encode()
        headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(content)), CLOSE_HEADER]
        head = h11.Response(status_code=400, headers=headers, reason=b"Bad Request")
        for event in (head, h11.Data(data=content), h11.EndOfMessage()):
            self.transport.write(self.conn.send(event) or b"")
        self.transport.write_eof()
        self._clients.add(self, LAST_REQUEST_S)  # closed at once, the connection could be reset before this is read
