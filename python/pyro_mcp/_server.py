"""The MCP server, as a program of its own."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import threading
from typing import Dict, Iterator, List, Optional

from ._program import find_program
from ._pyro import InvalidValueError


class Server:
    """An MCP server that is ready to run; see :func:`pyro_mcp.create_server`."""

    def __init__(self, profile: str, environ: Dict[str, str]) -> None:
        if profile not in ("full", "task-core", "vm-run"):
            raise InvalidValueError(f"profile must be full, task-core or vm-run, not {profile!r}")
        self.profile = profile
        self.environ = environ

    @property
    def command(self) -> List[str]:
        """Program and arguments, as an MCP host's configuration wants them."""
        return [find_program(), "mcp", "serve", "--profile", self.profile]

    def run(self, transport: str = "stdio", *, listen: Optional[str] = None) -> int:
        """Serves until the client goes away or a signal comes, and returns the exit code.

        ``transport`` is ``stdio``, or ``http`` with ``listen`` as ``ADDRESS:PORT``.
        """
        if transport not in ("stdio", "http"):
            raise InvalidValueError(f"transport must be stdio or http, not {transport!r}")
        command = self.command
        if transport == "http":
            command += ["--http", listen] if listen else ["--http"]
        # Even a process that is killed lets go of its end.
        watched, held = os.pipe()
        try:
            # In a session of its own: of a terminal's signals it hears what is passed on, once.
            process = subprocess.Popen(
                [*command, "--while-open", str(watched)],
                env={**os.environ, **self.environ},
                start_new_session=True,
                pass_fds=[watched],
            )
            with _passed_on(process):
                return process.wait()
        finally:
            os.close(watched)
            os.close(held)


@contextlib.contextmanager
def _passed_on(process: "subprocess.Popen[bytes]") -> Iterator[None]:
    """Has the signals that would end this process end the server, which ends this process's wait for it."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def tell(number: int, frame: object) -> None:
        process.send_signal(number)

    before = {number: signal.signal(number, tell) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
