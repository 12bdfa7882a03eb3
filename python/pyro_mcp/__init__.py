"""pyro gives a program, or an agent, computers of its own: microVMs that start at once and cannot touch the host.

>>> from pyro_mcp import Pyro
>>> with Pyro() as pyro:
...     pyro.run_in_vm(environment="debian:12", command="git --version")["stdout"]
'git version 2.39.5\\n'
"""

from __future__ import annotations

from . import types
from ._asynchronous import AsyncPyro
from ._core import OnOutput
from ._pyro import (
    CapReachedError,
    CommandRefusedError,
    DamagedError,
    EnvironmentFailedError,
    ExpiredError,
    GuestUnavailableError,
    NetworkUnavailableError,
    HostError,
    HostResourcesError,
    InvalidValueError,
    IsolationUnavailableError,
    NotFoundError,
    OperationCancelledError,
    OutcomeUnknownError,
    PyroError,
    UnknownEnvironmentError,
    WrongStateError,
    __version__,
)
from ._server import Server
from ._synchronous import Pyro


def create_server(*, profile: str = "full") -> Server:
    """An MCP server on the state that the environment names.

    ``profile`` is ``full``, ``task-core`` (vm_run and the tools of tasks) or ``vm-run``. ``create_server().run()``
    serves stdio.
    """
    return Server(profile, {})


__all__ = [
    "AsyncPyro",
    "CapReachedError",
    "CommandRefusedError",
    "DamagedError",
    "EnvironmentFailedError",
    "ExpiredError",
    "GuestUnavailableError",
    "NetworkUnavailableError",
    "HostError",
    "HostResourcesError",
    "InvalidValueError",
    "IsolationUnavailableError",
    "NotFoundError",
    "OnOutput",
    "OperationCancelledError",
    "OutcomeUnknownError",
    "Pyro",
    "PyroError",
    "Server",
    "UnknownEnvironmentError",
    "WrongStateError",
    "__version__",
    "create_server",
    "types",
]
