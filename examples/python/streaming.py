"""Output as it comes, in three ways."""

import asyncio
import sys

from pyro_mcp import AsyncPyro, Pyro

COMMAND = "for number in 1 2 3; do echo $number; sleep 0.2; done"


async def awaited(task_id: str) -> None:
    async with AsyncPyro() as pyro:
        async for event in pyro.stream_task(task_id, command=COMMAND):
            if event["type"] != "exit":
                print("async:", event["data"])


with Pyro() as pyro:
    task_id = pyro.create_task(environment="debian:12", mem_mib=512)["task_id"]
    try:
        for event in pyro.stream_task(task_id, command=COMMAND):
            if event["type"] == "exit":
                print("ended with", event["result"]["exit_code"])
            else:
                sys.stdout.write(event["data"].decode())
        pyro.exec_task(task_id, command=COMMAND, stream=lambda piece: print("callback:", piece["data"]))
        asyncio.run(awaited(task_id))
    finally:
        pyro.delete_task(task_id)
