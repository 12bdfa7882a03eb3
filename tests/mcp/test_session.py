"""What an agent does all day: write a program, see its test fail, mend it, see it pass."""

import pytest
from mcp_clients import call, over_stdio

pytestmark = pytest.mark.anyio

PROGRAM = """\
def mean(numbers):
    return sum(numbers) / 2
"""
TEST = """\
import unittest
from mean import mean

class Mean(unittest.TestCase):
    def test_of_three(self):
        self.assertEqual(mean([1, 2, 6]), 3)

unittest.main()
"""


async def test_a_program_is_written_tested_mended_and_tested_again(pyro):
    async with over_stdio(pyro, "--profile", "task-core") as session:
        task = (await call(session, "task_create", environment="debian:12-build"))["task_id"]

        async def write(path, text):
            done = await call(session, "task_exec", task_id=task, command=f"cat > {path}", stdin=text)
            assert done["exit_code"] == 0

        await write("mean.py", PROGRAM)
        await write("test_mean.py", TEST)
        run_tests = {"task_id": task, "command": ["python3", "test_mean.py"], "timeout_seconds": 120}
        failed = await call(session, "task_exec", **run_tests)
        assert failed["exit_code"] == 1 and failed["fault"] is None
        assert "AssertionError: 4.5 != 3" in failed["stderr"]
        mended = await call(session, "task_exec", task_id=task, command="sed -i 's|/ 2|/ len(numbers)|' mean.py")
        assert mended["exit_code"] == 0
        passed = await call(session, "task_exec", **run_tests)
        assert passed["exit_code"] == 0 and "OK" in passed["stderr"]

    # Another conversation finds the task, reads what was done, and ends it.
    async with over_stdio(pyro, "--profile", "task-core") as session:
        tasks = (await call(session, "task_list"))["tasks"]
        assert [found["task_id"] for found in tasks] == [task]
        logs = await call(session, "task_logs", task_id=task)
        assert [entry["exit_code"] for entry in logs["entries"]] == [0, 0, 1, 0, 0]
        assert (await call(session, "task_delete", task_id=task))["deleted"]
        assert (await call(session, "task_list"))["count"] == 0
