"""A pyro of a test's own."""

import pytest
from pyro_process import Pyro, wait_until


@pytest.fixture
def anyio_backend():
    return "asyncio"


@pytest.fixture
def pyro(tmp_path):
    pyro = Pyro(tmp_path)
    yield pyro
    pyro.end_all()
    for task in pyro.json("task", "list")["tasks"]:
        pyro.run("task", "delete", task["task_id"])
    wait_until(lambda: not pyro.vmms(), "no VMM is left")
