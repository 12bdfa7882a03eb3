"""Servers that a test's clients connect to."""

import pytest
from mcp_clients import HttpServer, over_stdio


@pytest.fixture
def http(pyro):
    server = HttpServer(pyro)
    yield server
    if server.process.poll() is None:
        server.stop()


@pytest.fixture(params=["stdio", "http"])
def connect(request, pyro):
    """Connects a client, once over each transport."""
    if request.param == "stdio":
        yield lambda: over_stdio(pyro)
    else:
        server = HttpServer(pyro)
        yield server.connect
        assert server.stop() == 143
