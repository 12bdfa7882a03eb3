"""Each tool as the official Python client sees it, over stdio and over HTTP."""

import socket
import threading

import anyio
import pytest
from mcp_clients import call, over_stdio, refused
from pyro_process import PATIENCE, wait_until
from jsonschema import Draft202012Validator

pytestmark = pytest.mark.anyio

RUN = ["vm_run"]
TASKS = ["task_create", "task_exec", "task_status", "task_logs", "task_list", "task_start", "task_delete"]
REST = [
    "vm_list_environments", "vm_create", "vm_start", "vm_exec", "vm_stop", "vm_delete", "vm_status",
    "vm_network_info", "vm_reap_expired",
]
SMALL = {"environment": "debian:12", "mem_mib": 512}


async def test_a_server_says_who_it_is_and_how_to_use_it(pyro):
    async with over_stdio(pyro) as session:
        assert session.get_server_capabilities().tools is not None
        told = await session.send_ping()
        assert told is not None


@pytest.mark.parametrize(
    ("profile", "names"), [("vm-run", RUN), ("task-core", RUN + TASKS), ("full", RUN + TASKS + REST)]
)
async def test_a_profile_has_its_tools_and_each_is_described(pyro, profile, names):
    async with over_stdio(pyro, "--profile", profile) as session:
        tools = (await session.list_tools()).tools
        assert [tool.name for tool in tools] == names
        for tool in tools:
            assert len(tool.description) > 40 and tool.title, tool.name
            for schema in (tool.inputSchema, tool.outputSchema):
                Draft202012Validator.check_schema(schema)
                assert schema["type"] == "object"
            assert tool.inputSchema["additionalProperties"] is False
            for name, argument in tool.inputSchema["properties"].items():
                assert argument.get("description"), f"{tool.name}: {name}"
            hints = tool.annotations
            assert None not in (hints.readOnlyHint, hints.destructiveHint, hints.idempotentHint)
            assert hints.destructiveHint == (
                tool.name in ("task_delete", "vm_delete", "vm_exec", "vm_reap_expired")
            )
        if profile == "vm-run":
            failure = await refused(session, "task_list")
            assert failure["code"] == "unknown_tool" and "vm-run" in failure["hint"]


async def test_each_tool_returns_what_its_schema_says(connect):
    async with connect() as session:
        schemas = {tool.name: tool.outputSchema for tool in (await session.list_tools()).tools}
        called = set()

        async def checked(name, **arguments):
            result = await call(session, name, **arguments)
            Draft202012Validator(schemas[name]).validate(result)
            called.add(name)
            return result

        ran = await checked("vm_run", command="echo out; echo err >&2; exit 3", **SMALL)
        assert (ran["stdout"], ran["stderr"], ran["exit_code"]) == ("out\n", "err\n", 3)
        assert ran["cleanup"]["deleted"] is True

        task = (await checked("task_create", **SMALL))["task_id"]
        done = await checked("task_exec", task_id=task, command=["sh", "-c", "cat > kept"], stdin="text")
        assert (done["sequence"], done["cwd"]) == (1, "/workspace")
        done = await checked("task_exec", task_id=task, command="cat kept")
        assert (done["stdout"], done["sequence"]) == ("text", 2)
        assert (await checked("task_status", task_id=task))["command_count"] == 2
        assert (await checked("task_list"))["tasks"][0]["task_id"] == task
        logs = await checked("task_logs", task_id=task)
        assert [entry["command"] for entry in logs["entries"]] == ["sh -c 'cat > kept'", "cat kept"]
        failure = await refused(session, "task_start", task_id=task)
        assert failure["code"] == "wrong_state"
        called.add("task_start")
        assert (await checked("task_delete", task_id=task, force=True))["deleted"] is True

        listed = await checked("vm_list_environments")
        assert [entry["name"] for entry in listed["environments"]] == [
            "debian:12", "debian:12-base", "debian:12-build",
        ]
        vm = (await checked("vm_create", **SMALL))["vm_id"]
        assert (await checked("vm_start", vm_id=vm))["state"] == "started"
        assert (await checked("vm_status", vm_id=vm))["state"] == "started"
        assert (await checked("vm_network_info", vm_id=vm))["network_enabled"] is False
        assert (await checked("vm_stop", vm_id=vm))["state"] == "stopped"
        await checked("vm_start", vm_id=vm)
        assert (await checked("vm_exec", vm_id=vm, command=["true"]))["cleanup"]["deleted"] is True
        vm = (await checked("vm_create", **SMALL))["vm_id"]
        assert (await checked("vm_delete", vm_id=vm))["reason"] == "explicit_delete"
        assert (await checked("vm_reap_expired"))["count"] == 0
        assert called == set(schemas)


async def test_a_machine_has_the_network_that_the_user_offers_and_no_other(pyro):
    async with over_stdio(pyro) as session:
        failure = await refused(session, "task_create", **SMALL, network=True)
        assert failure["error"] == "network=true is not available: this server offers no network"
        assert "--allow HOST" in failure["hint"]
    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=lambda: listener.accept()[0].sendall(b"from the host"), daemon=True).start()
        port = listener.getsockname()[1]
        async with over_stdio(pyro, "--allow", f"host.pyro.internal:{port}") as session:
            for wanted, out, notes in [(False, "none\n", 0), (True, "from the host\n", 1)]:
                command = f"getent hosts other.test; exec 3<>/dev/tcp/host.pyro.internal/{port} || echo none; head -c 13 <&3 && echo"
                result = await call(session, "vm_run", **SMALL, network=wanted, command=["bash", "-c", command])
                assert (result["stdout"], len(result["notes"])) == (out, notes), result
            assert result["notes"] == [
                f"resolve other.test denied by policy; allowed: host.pyro.internal:{port}"
            ]


async def test_bad_arguments_are_told_by_name_before_anything_is_made(pyro):
    async with over_stdio(pyro) as session:
        for arguments, code, words in [
            ({}, "invalid_value", "environment"),
            ({"environment": "debian:12"}, "invalid_value", "command"),
            ({"environment": "nope", "command": "true"}, "unknown_environment", "unknown environment 'nope'"),
            ({**SMALL, "command": 7}, "invalid_value", "argument command: expected a string, or a list"),
            ({**SMALL, "command": ""}, "invalid_value", "command must not be empty"),
            ({**SMALL, "command": "true", "vcpu_count": 9}, "invalid_value", "vcpu_count must be between 1 and 8"),
            ({**SMALL, "command": "true", "mem_mib": -1}, "invalid_value", "mem_mib must be between 256 and 32768"),
            ({**SMALL, "command": "true", "timeout_seconds": 0}, "invalid_value", "timeout_seconds must be positive"),
            ({**SMALL, "command": "true", "timeout_seconds": "x"}, "invalid_value", "argument timeout_seconds"),
            ({**SMALL, "command": "true", "colour": 1}, "invalid_value", "unknown argument 'colour'"),
            ({**SMALL, "command": "true", "max_output_bytes": 5}, "invalid_value", "max_output_bytes must be between"),
            ({**SMALL, "command": "x" * 200_000}, "invalid_value", "shorter than 131072 bytes"),
        ]:
            failure = await refused(session, "vm_run", **arguments)
            assert failure["code"] == code and words in failure["error"], failure
            assert failure["hint"], failure
        for name, key in [("task_status", "task_id"), ("vm_status", "vm_id"), ("task_exec", "task_id")]:
            extra = {"command": "true"} if name == "task_exec" else {}
            failure = await refused(session, name, **{key: "../../etc/passwd"}, **extra)
            assert failure["code"] == "not_found" and "does not exist" in failure["error"]
        assert (await refused(session, "nope"))["code"] == "unknown_tool"
        assert not list((pyro.state / "vms").iterdir())


async def test_progress_tells_phases_and_output(connect):
    async with connect() as session:
        told = []

        async def hear(progress, total, message):
            told.append((progress, message))

        command = "for i in 1 2 3 4 5; do echo line; sleep 0.3; done"
        result = await session.call_tool("vm_run", {**SMALL, "command": command}, progress_callback=hear)
        assert result.structuredContent["stdout"] == "line\n" * 5
        steps = [progress for progress, _ in told]
        assert steps == sorted(set(steps)) and len(steps) >= 3
        words = " | ".join(message for _, message in told)
        assert "running the command" in words and "stdout " in words, words


async def test_cancelling_a_call_ends_its_command(connect, pyro):
    async with connect() as session:
        task = (await call(session, "task_create", **SMALL))["task_id"]
        for name, arguments in [
            ("task_exec", {"task_id": task}),
            ("vm_run", SMALL),
        ]:
            running = anyio.Event()

            async def hear(progress, total, message):
                if "stdout" in message:
                    running.set()

            request_id = session._request_id
            async with anyio.create_task_group() as group:

                async def long_call():
                    command = "echo began; sleep 100"
                    await session.call_tool(name, {**arguments, "command": command}, progress_callback=hear)

                group.start_soon(long_call)
                with anyio.fail_after(PATIENCE):
                    await running.wait()
                await cancel(session, request_id)
                group.cancel_scope.cancel()
        logs = await call(session, "task_logs", task_id=task)
        with anyio.fail_after(PATIENCE):
            while logs["entries"][0]["status"] == "running":
                logs = await call(session, "task_logs", task_id=task)
        assert logs["entries"][0]["status"] == "interrupted"
        assert logs["entries"][0]["fault"] == "cancelled"
        await call(session, "task_exec", task_id=task, command="true")
        await call(session, "task_delete", task_id=task)
    wait_until(lambda: not pyro.vmms(), "the machine of the cancelled vm_run is gone")


async def cancel(session, request_id):
    from mcp.types import CancelledNotification, CancelledNotificationParams, ClientNotification

    params = CancelledNotificationParams(requestId=request_id, reason="enough")
    await session.send_notification(ClientNotification(CancelledNotification(params=params)))


async def test_a_slow_call_delays_no_other_and_a_hundred_at_once_are_answered(connect):
    async with connect() as session:
        task = (await call(session, "task_create", **SMALL))["task_id"]
        order = []

        async def slow():
            await call(session, "task_exec", task_id=task, command="sleep 3")
            order.append("slow")

        async def quick(number):
            if number % 2:
                await call(session, "task_status", task_id=task)
            else:
                done = await call(session, "task_exec", task_id=task, command=["echo", str(number)])
                assert done["stdout"] == f"{number}\n"
            order.append("quick")

        async with anyio.create_task_group() as group:
            group.start_soon(slow)
            with anyio.fail_after(PATIENCE):
                await call(session, "task_list")
                order.append("list")
            for number in range(100):
                group.start_soon(quick, number)
        assert order[0] == "list" and order.count("quick") == 100
        logs = await call(session, "task_logs", task_id=task, limit=200)
        assert sorted(entry["sequence"] for entry in logs["entries"]) == list(range(1, 52))
        await call(session, "task_delete", task_id=task)


async def test_long_output_is_cut_and_can_be_read_on(connect):
    async with connect() as session:
        task = (await call(session, "task_create", **SMALL))["task_id"]
        done = await call(session, "task_exec", task_id=task, command="seq 100000")
        assert done["stdout_truncated"] and len(done["stdout"]) < 17_000
        assert done["stdout"].startswith("1\n2\n") and done["stdout"].endswith("\n100000\n")
        mark = done["stdout"].split("[… ")[1].split(" …]")[0]
        assert f"task_logs with task_id={task}, sequence=1, stream=stdout, offset=" in mark
        offset = int(mark.rsplit("=", 1)[1])
        text = done["stdout"].split("\n[… ")[0]
        while offset is not None:
            part = await call(
                session, "task_logs", task_id=task, sequence=1, stream="stdout", offset=offset, max_bytes=262_144
            )
            text += part["entries"][0]["stdout"]
            offset = part["range"]["next_offset"]
        assert text == "".join(f"{number}\n" for number in range(1, 100_001))
        coloured = await call(session, "task_exec", task_id=task, command=r"printf '\033[31mred\033[0m\r\n\a\000x'")
        assert coloured["stdout"] == "red\nx"
        short = await call(session, "vm_run", command="seq 10000", max_output_bytes=1024, **SMALL)
        assert len(short["stdout"]) < 1200 and "task_exec" in short["stdout"]
        await call(session, "task_delete", task_id=task)


async def test_resources_and_prompts(connect):
    async with connect() as session:
        task = (await call(session, "task_create", **SMALL))["task_id"]
        await call(session, "task_exec", task_id=task, command="echo said; echo complained >&2; exit 4")
        listed = [str(resource.uri) for resource in (await session.list_resources()).resources]
        assert f"task://{task}/logs/1" in listed
        text = (await session.read_resource(f"task://{task}/logs/1")).contents[0].text
        for words in ["exit_code=4", "$ echo said", "--- stdout\nsaid\n", "--- stderr\ncomplained\n"]:
            assert words in text
        for uri in listed:
            assert (await session.read_resource(uri)).contents
        for bad in [f"task://{task}/logs/99", "task://nope/logs/1", "environment://nope", "file:///etc/passwd"]:
            with pytest.raises(Exception, match="no resource"):
                await session.read_resource(bad)
        assert len((await session.list_resource_templates()).resourceTemplates) == 2
        prompt = await session.get_prompt("work_in_a_sandbox", {"goal": "count to three"})
        assert "count to three" in prompt.messages[0].content.text
        await call(session, "task_delete", task_id=task)
