"""What a call from Python costs beside the engine's own work: calls that the engine has nothing to do for, and commands of
which that is counted which is not in the engine's account. `scripts/bench.sh python` sets the variables.
"""

import asyncio
import os
import statistics
import tempfile
import time

from pyro_mcp import AsyncPyro, Pyro
from pyro_mcp._requests import request

ROUNDS = 300
COMMANDS = 40


def told(what, times):
    print(f"{what:<44} {statistics.median(times) * 1e3:6.2f} ms")


def timed(work):
    began = time.perf_counter()
    value = work()
    return time.perf_counter() - began, value


async def awaited(state):
    async with AsyncPyro(base_dir=state) as client:
        times = []
        for _ in range(ROUNDS):
            began = time.perf_counter()
            await client._call(request("close"))
            times.append(time.perf_counter() - began)
        told("a call that does nothing, awaited", times)


with tempfile.TemporaryDirectory() as state:
    os.environ["PYRO_ENVIRONMENT_CACHE_DIR"] = os.environ["PYRO_TEST_ENVIRONMENTS"]
    with Pyro(base_dir=state) as client:
        told("a call that does nothing", [timed(lambda: client._call(request("close")))[0] for _ in range(ROUNDS)])
        task = client.create_task(environment="debian:12")["task_id"]
        told("status of a task", [timed(lambda: client.status_task(task))[0] for _ in range(ROUNDS)])
        ran = [timed(lambda: client.exec_task(task, command=["true"])) for _ in range(COMMANDS)]
        told("exec_task of true, beside the command", [took - result["duration_ms"] / 1e3 for took, result in ran])
        client.delete_task(task)
    asyncio.run(awaited(state))
