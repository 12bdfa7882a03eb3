"""How calls reach the engine and how its events come back, for both kinds of clients."""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import inspect
import json
import os
import weakref
from typing import Any, AsyncIterator, Callable, Dict, Iterator, List, Optional, Tuple, Union

from . import _pyro
from ._program import find_program
from ._requests import request, stdin_bytes
from ._server import Server
from .types import OutputEvent, StreamEvent

DEFAULT_MAX_ACTIVE_VMS = 4

OnOutput = Callable[[OutputEvent], Any]
"""Is called with each piece of output as it comes; in :class:`AsyncPyro` it may be a coroutine function."""

Path = Union[str, "os.PathLike[str]"]


def _absolute(directory: Optional[Path]) -> Optional[str]:
    """A directory as other processes of pyro must understand it, whatever their own working directory."""
    return None if directory is None else os.path.abspath(os.path.expanduser(os.fspath(directory)))


class Client:
    """An engine, and what both kinds of clients do with it."""

    def __init__(
        self,
        *,
        backend_name: Optional[str] = None,
        base_dir: Optional[Path] = None,
        cache_dir: Optional[Path] = None,
        max_active_vms: int = DEFAULT_MAX_ACTIVE_VMS,
    ) -> None:
        # A server that is started later has the directories of now.
        base_dir, cache_dir = _absolute(base_dir), _absolute(cache_dir)
        given = {"PYRO_BACKEND": backend_name, "PYRO_STATE_DIR": base_dir, "PYRO_ENVIRONMENT_CACHE_DIR": cache_dir}
        self._environ: Dict[str, str] = {name: value for name, value in given.items() if value is not None}
        # The environment may set another default.
        cap = None if max_active_vms == DEFAULT_MAX_ACTIVE_VMS else max_active_vms
        if cap is not None:
            if not isinstance(cap, int) or not 1 <= cap < 1 << 32:
                raise _pyro.InvalidValueError(f"max_active_vms must be 1 or more, not {cap!r}")
            self._environ["PYRO_MAX_ACTIVE_VMS"] = str(cap)
        self._pid = os.getpid()
        # Requests that were given up and may not have ended yet.
        self._given_up: List[_pyro.Running] = []
        self._opened: Optional[_pyro.Engine] = _pyro.Engine(
            program=find_program(),
            backend_name=backend_name,
            base_dir=base_dir,
            cache_dir=cache_dir,
            max_active_vms=cap,
        )
        _open_clients.add(self)

    def create_server(self, *, profile: str = "full") -> Server:
        """An MCP server on the state and the environments of this client; see :func:`pyro_mcp.create_server`."""
        return Server(profile, self._environ)

    def _start(self, text: str, stdin: Union[str, bytes, None], output: bool) -> _pyro.Running:
        if self._opened is None:
            raise _pyro.WrongStateError("this client is closed; make a new one")
        return self._opened.start(text, stdin=stdin_bytes(stdin), output=output)

    def _give_up(self, running: _pyro.Running) -> None:
        running.cancel()
        self._given_up = [other for other in self._given_up if not other.ended()]
        self._given_up.append(running)

    def _see_off(self) -> None:
        """Waits until what was given up has ended: else a command could outlive this process."""
        while self._given_up:
            self._given_up.pop().abandon()


class Blocking(Client):
    """Calls that block their thread, without the GIL."""

    def _call(self, text: str, stdin: Union[str, bytes, None] = None, stream: Optional[OnOutput] = None) -> Any:
        running = self._start(text, stdin, stream is not None)
        try:
            while True:
                kind, payload = running.next()
                if kind == "result":
                    return json.loads(payload)
                if stream is not None:
                    stream(_output(kind, payload))
        except BaseException:
            # What is not returned was not made.
            running.abandon()
            raise

    def _stream(self, text: str, stdin: Union[str, bytes, None]) -> Iterator[StreamEvent]:
        running = self._start(text, stdin, True)
        try:
            while True:
                kind, payload = running.next()
                if kind == "result":
                    yield {"type": "exit", "result": json.loads(payload)}
                    return
                yield _output(kind, payload)
        finally:
            running.abandon()

    def _close(self) -> None:
        if self._opened is not None and self._pid == os.getpid():
            self._see_off()
            self._call(request("close"))
        self._opened = None


class Awaiting(Client):
    """Calls that are awaited. Cancelling one ends its command, or what it was making."""

    async def _call(self, text: str, stdin: Union[str, bytes, None] = None, stream: Optional[OnOutput] = None) -> Any:
        running = self._start(text, stdin, stream is not None)
        while True:
            try:
                kind, payload = await _next(running)
                if kind == "result":
                    return json.loads(payload)
                if stream is not None:
                    heard = stream(_output(kind, payload))
                    if inspect.isawaitable(heard):
                        await heard
            except BaseException:
                self._give_up(running)
                raise

    async def _stream(self, text: str, stdin: Union[str, bytes, None]) -> AsyncIterator[StreamEvent]:
        running = self._start(text, stdin, True)
        try:
            while True:
                kind, payload = await _next(running)
                if kind == "result":
                    yield {"type": "exit", "result": json.loads(payload)}
                    return
                yield _output(kind, payload)
        finally:
            self._give_up(running)

    async def _close(self) -> None:
        if self._opened is not None and self._pid == os.getpid():
            await asyncio.get_running_loop().run_in_executor(None, self._see_off)
            await self._call(request("close"))
        self._opened = None


def _output(kind: Any, payload: Any) -> OutputEvent:
    return {"type": kind, "data": payload}


async def _next(running: _pyro.Running) -> Tuple[Any, Any]:
    loop = asyncio.get_running_loop()
    future: "asyncio.Future[Tuple[Any, Any]]" = loop.create_future()

    def settle(event: Any, error: Optional[BaseException]) -> None:
        if future.done():
            return
        if error is None:
            future.set_result(event)
        else:
            future.set_exception(error)

    running.when_ready(lambda event, error: loop.call_soon_threadsafe(settle, event, error))
    return await future


_open_clients: "weakref.WeakSet[Client]" = weakref.WeakSet()


@atexit.register
def _end_machines() -> None:
    """Ends the machines of clients that were not closed. Those of a killed interpreter end with it too."""
    for client in list(_open_clients):
        engine = client._opened
        if engine is not None and client._pid == os.getpid():
            with contextlib.suppress(_pyro.PyroError):
                client._see_off()
                engine.start(request("close")).next()
