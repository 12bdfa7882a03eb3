"""The MCP server, as a program of its own."""

from __future__ import annotations

import os
import subprocess
from typing import Dict, List, Optional

from ._program import find_program


class Server:
    """An MCP server that is ready to run; see :func:`pyro_mcp.create_server`."""

    def __init__(self, profile: str, environ: Dict[str, str]) -> None:
        if profile not in ("full", "task-core", "vm-run"):
            raise ValueError(f"profile must be full, task-core or vm-run, not {profile!r}")
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
            raise ValueError(f"transport must be stdio or http, not {transport!r}")
        command = self.command
        if transport == "http":
            command += ["--http", listen] if listen else ["--http"]
        process = subprocess.Popen(command, env={**os.environ, **self.environ})
        while True:
            try:
                return process.wait()
            except KeyboardInterrupt:
                # The terminal has told the server too; its machines end with it.
                continue
            except BaseException:
                process.terminate()
                raise
