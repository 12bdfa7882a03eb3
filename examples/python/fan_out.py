"""Fifty commands at once over four tasks."""

import asyncio

from pyro_mcp import AsyncPyro


async def main() -> None:
    async with AsyncPyro(max_active_vms=6) as pyro:
        made = await asyncio.gather(*[pyro.create_task(environment="debian:12", mem_mib=512) for _ in range(4)])
        tasks = [task["task_id"] for task in made]
        try:
            results = await asyncio.gather(
                *[
                    pyro.exec_task(tasks[number % 4], command=f"echo $(({number} * {number}))", timeout_seconds=120)
                    for number in range(50)
                ]
            )
        finally:
            await asyncio.gather(*[pyro.delete_task(task) for task in tasks])
    squares = [int(result["stdout"]) for result in results]
    assert squares == [number * number for number in range(50)]
    print(f"{len(squares)} results, the last {squares[-1]}")


asyncio.run(main())
