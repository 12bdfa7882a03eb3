"""The Python package against real machines."""

import asyncio
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pyro_mcp
import pytest
from pyro_mcp import AsyncPyro, Pyro
from pyro_process import PATIENCE, wait_until

SMALL = {"environment": "debian:12", "mem_mib": 512}


@pytest.fixture
def task(client):
    return client.create_task(**SMALL)["task_id"]


def test_every_error_is_a_pyro_error_and_one_of_pythons_own(client):
    kinds = [value for value in vars(pyro_mcp).values() if isinstance(value, type) and issubclass(value, pyro_mcp.PyroError)]
    assert len(kinds) == 17
    for kind in kinds:
        if kind is not pyro_mcp.PyroError:
            assert issubclass(kind, ValueError) != issubclass(kind, RuntimeError), kind
            assert kind.code and kind.__doc__
    with pytest.raises(ValueError, match="task 'nope' does not exist") as raised:
        client.status_task("nope")
    assert raised.value.code == "not_found"
    with pytest.raises(RuntimeError) as raised:
        client.create_vm(**SMALL, require_isolation="firecracker-kvm")
    assert raised.value.code == "isolation_unavailable" and raised.value.hint
    for bad in (float("nan"), float("inf"), -1, 0):
        with pytest.raises(pyro_mcp.InvalidValueError, match="timeout_seconds must be positive"):
            client.run_in_vm(**SMALL, command="true", timeout_seconds=bad)
    with pytest.raises(ValueError, match="max_active_vms"):
        Pyro(max_active_vms=0)


def test_a_machine_and_its_environment(client):
    names = [entry["name"] for entry in client.list_environments()]
    assert names == ["debian:12", "debian:12-base", "debian:12-build"]
    assert client.inspect_environment("debian:12")["verified"] is True
    vm = client.create_vm(**SMALL)
    assert vm["state"] == "created"
    assert client.start_vm(vm["vm_id"])["state"] == "started"
    assert client.stop_vm(vm["vm_id"])["state"] == "stopped"
    client.start_vm(vm["vm_id"])
    result = client.exec_vm(vm["vm_id"], command="cat; exit 2", stdin=b"\xff bytes")
    assert (result["exit_code"], result["stdout"]) == (2, "\ufffd bytes")
    assert result["cleanup"]["deleted"]
    with pytest.raises(pyro_mcp.NotFoundError):
        client.status_vm(vm["vm_id"])
    assert client.delete_vm(client.create_vm(**SMALL)["vm_id"])["reason"] == "explicit_delete"
    assert client.reap_expired()["count"] == 0


def test_a_task_from_beginning_to_end(client, task):
    assert client.exec_task(task, command="echo kept > file")["sequence"] == 1
    assert client.stop_task(task)["state"] == "stopped"
    with pytest.raises(pyro_mcp.WrongStateError, match="must be in 'started' state"):
        client.exec_task(task, command="true")
    assert client.start_task(task)["state"] == "started"
    assert client.exec_task(task, command=["cat", "file"])["stdout"] == "kept\n"
    assert [entry["sequence"] for entry in client.logs_task(task, since_sequence=2)["entries"]] == [2]
    assert client.list_tasks()["count"] == 1
    assert client.cancel_task(task, sequence=1) == {"task_id": task, "sequence": 1, "ended": False}
    with pytest.raises(pyro_mcp.NotFoundError, match="has no command 99"):
        client.cancel_task(task, sequence=99)
    assert client.delete_task(task, force=True)["deleted"]


def test_output_comes_as_it_is_written(client, task):
    seen = []
    # It ends only when somebody has seen what it wrote first.
    command = "echo first; until [ -e seen ]; do sleep 0.1; done; printf '\\377'; exit 5"
    for event in client.stream_task(task, command=command, timeout_seconds=120):
        if not seen:
            client.exec_task(task, command="touch seen")
        seen.append((event["type"], event.get("data")))
    assert seen[0] == ("stdout", b"first\n") and seen[-1][0] == "exit"
    assert b"".join(data for kind, data in seen if kind == "stdout") == b"first\n\xff"
    heard = []
    client.run_in_vm(**SMALL, command="echo called", stream=heard.append)
    assert heard == [{"type": "stdout", "data": b"called\n"}]


def test_who_stops_reading_ends_the_command(client, task):
    for event in client.stream_task(task, command="echo one; sleep 100"):
        break
    entry = client.logs_task(task)["entries"][0]
    assert (entry["status"], entry["fault"]) == ("interrupted", "cancelled")

    def raising(piece):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        client.exec_task(task, command="echo one; sleep 100", stream=raising)
    assert client.logs_task(task)["entries"][1]["fault"] == "cancelled"


@pytest.fixture
def interruptible():
    """A process that a shell has started in the background ignores what Ctrl-C sends."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_ctrl_c_ends_what_the_call_has_begun(interruptible, client, task, pyro):
    def interrupt_when(ready):
        def press():
            wait_until(ready, "the command runs")
            os.kill(os.getpid(), signal.SIGINT)

        threading.Thread(target=press).start()

    journal = pyro.state / "tasks" / task / "commands" / "000001.stdout"
    interrupt_when(lambda: journal.exists() and journal.read_text() == "began\n")
    with pytest.raises(KeyboardInterrupt):
        told = client.exec_task(task, command="echo began; sleep 100")
        pytest.fail(f"it returned {told}; SIGINT goes to {signal.getsignal(signal.SIGINT)}")
    assert client.logs_task(task)["entries"][0]["fault"] == "cancelled"
    interrupt_when(lambda: len(pyro.vmms()) == 2)
    with pytest.raises(KeyboardInterrupt):
        told = client.run_in_vm(**SMALL, command="sleep 100", timeout_seconds=200)
        pytest.fail(f"it returned {told}; SIGINT goes to {signal.getsignal(signal.SIGINT)}")
    wait_until(lambda: len(pyro.vmms()) == 1, "the machine of the interrupted call is gone")
    assert client.exec_task(task, command="echo works")["stdout"] == "works\n"


def test_threads_work_at_the_same_time(client):
    with ThreadPoolExecutor(32) as pool:
        tasks = [made["task_id"] for made in pool.map(lambda _: client.create_task(**SMALL), range(4))]

        def work(number):
            result = client.exec_task(tasks[number % 4], command=["echo", str(number)], timeout_seconds=120)
            return int(result["stdout"])

        assert list(pool.map(work, range(128))) == list(range(128))
        list(pool.map(client.delete_task, tasks))


def test_two_hundred_coroutines_over_four_tasks():
    async def main():
        async with AsyncPyro() as client:
            made = await asyncio.gather(*[client.create_task(**SMALL) for _ in range(4)])
            tasks = [task["task_id"] for task in made]

            async def work(number):
                pieces = []
                async for event in client.stream_task(
                    tasks[number % 4], command=f"echo {number}", timeout_seconds=300
                ):
                    pieces.append(event.get("data", b""))
                return int(b"".join(pieces))

            assert await asyncio.gather(*map(work, range(200))) == list(range(200))
            await asyncio.gather(*map(client.delete_task, tasks))

    asyncio.run(main())


def test_cancelling_a_coroutine_ends_its_command(client, task, pyro):
    async def main():
        async with AsyncPyro() as awaited:
            with pytest.raises(asyncio.TimeoutError):
                await asyncio.wait_for(awaited.exec_task(task, command="sleep 100"), 2)
            with pytest.raises(asyncio.TimeoutError):
                await asyncio.wait_for(awaited.run_in_vm(**SMALL, command="sleep 100"), 2)
            heard = []

            async def hear(piece):
                heard.append(piece["data"])

            await awaited.exec_task(task, command="echo heard", stream=hear)
            assert heard == [b"heard\n"]

    asyncio.run(main())
    wait_until(lambda: client.logs_task(task)["entries"][0]["fault"] == "cancelled", "the command has ended")
    wait_until(lambda: len(pyro.vmms()) == 1, "the machine is gone")


def test_a_task_whose_maker_is_cancelled_is_gone_also_when_it_was_ready(client):
    async def main():
        loop, told = asyncio.get_running_loop(), threading.Event()
        tell = loop.call_soon_threadsafe
        loop.call_soon_threadsafe = lambda *call: (tell(*call), told.set())
        async with AsyncPyro() as awaited:
            making = asyncio.ensure_future(awaited.create_task(**SMALL))
            await asyncio.sleep(0)
            # The loop does not run: that the task is ready has come to it, and to nobody who awaits it.
            assert told.wait(PATIENCE)
            assert len(client.list_tasks()["tasks"]) == 1
            assert making.cancel()
            with pytest.raises(asyncio.CancelledError):
                await making

    asyncio.run(main())
    assert not client.list_tasks()["tasks"]


def test_a_guest_has_the_network_that_was_asked_for_and_it_changes_on_a_live_task(client):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        def serve():
            while True:
                listener.accept()[0].sendall(b"here")

        threading.Thread(target=serve, daemon=True).start()
        port = listener.getsockname()[1]
        rule = f"host.pyro.internal:{port}"
        ask = ["bash", "-c", f"head -c 4 < /dev/tcp/host.pyro.internal/{port}"]
        vm = client.create_vm(**SMALL, allow=[rule])
        assert vm["network_policy"]["allow"] == [rule]
        told = client.network_info_vm(vm["vm_id"])
        assert (told["network_enabled"], told["guest_ip"], told["dns_servers"]) == (True, "198.18.0.2", ["198.18.0.1"])
        client.start_vm(vm["vm_id"])
        assert client.exec_vm(vm["vm_id"], command=ask)["stdout"] == "here"
        task = client.create_task(**SMALL, network_policy={"deny": [rule]})["task_id"]
        result = client.exec_task(task, command=ask)
        assert result["exit_code"] != 0 and "denied by policy" in result["notes"][0]
        changed = client.set_task_network(task, revoke=[rule], allow=[rule])
        assert changed["network_policy"]["mode"] == "allow" and changed["new_digest"] != changed["old_digest"]
        assert client.exec_task(task, command=ask)["stdout"] == "here"
        assert client.task_network(task)["counts"]["allowed"] >= 2
        log = client.network_log(task)
        asked = [entry["allowed"] for entry in log["entries"] if entry["kind"] == "dns"]
        assert asked[0] is False and asked[-1] is True, asked
        assert client.network_log(task, offset=log["next_offset"])["count"] == 0
        client.delete_task(task)
    with pytest.raises(TypeError, match="allow must be a list"):
        client.create_task(**SMALL, allow="a.test")
    for wrong in ({"allow": ["*"]}, {"network_policy": {"alow": []}}, {"network_policy": "nobody"}):
        with pytest.raises(pyro_mcp.InvalidValueError):
            client.create_task(**SMALL, **wrong)
    assert not client.list_tasks()["tasks"]


def script(text, **options):
    return subprocess.Popen([sys.executable, "-c", text], stdout=subprocess.PIPE, text=True, **options)


def test_a_forked_child_keeps_no_machine_of_its_killed_parent_alive(pyro):
    program = """
import os, time
from pyro_mcp import Pyro
pyro = Pyro()
vms = [pyro.create_vm(environment="debian:12", mem_mib=256)["vm_id"] for _ in range(4)]
for vm in vms:
    pyro.start_vm(vm)
child = os.fork()
if child:
    print(child, *vms, flush=True)
time.sleep(600)
"""
    parent = subprocess.Popen([sys.executable, "-c", program], env=pyro.environ, stdout=subprocess.PIPE, text=True)
    child, *vms = parent.stdout.readline().split()
    assert len(vms) == 4
    try:
        assert len(pyro.vmms()) == 4, "all of them run"
        assert pyro.json("reap")["deleted_vm_ids"] == [], "their owner lives"
        parent.kill()
        parent.wait()
        full = {**pyro.environ, "PYRO_MAX_ACTIVE_VMS": "4"}
        ran = subprocess.run(pyro.command("run", "debian:12", "--mem-mib", "256", "--", "true"), env=full)
        assert ran.returncode == 0, "the next command reaps them and takes a slot"
        os.kill(int(child), 0)
        wait_until(lambda: not pyro.vmms(), "the VMMs have died with their owner")
        assert not [entry for kind in ("vms", "trash") for entry in (pyro.state / kind).iterdir()]
    finally:
        os.kill(int(child), signal.SIGKILL)


def test_a_forked_child_makes_a_client_of_its_own(pyro):
    program = pyro.place / "forking.py"
    # In a file, because `spawn` imports the main module.
    program.write_text(
        """
import multiprocessing, os
from pyro_mcp import Pyro, WrongStateError
SMALL = dict(environment="debian:12", mem_mib=512)

def own(_):
    with Pyro() as client:
        return client.run_in_vm(**SMALL, command="echo own")["stdout"]

if __name__ == "__main__":
    client = Pyro()
    vm = client.create_vm(**SMALL)["vm_id"]
    client.start_vm(vm)
    pid = os.fork()
    if pid == 0:
        try:
            client.status_vm(vm)
        except WrongStateError as error:
            assert "fork" in str(error) and error.hint
            del client
            assert own(0) == "own\\n"
            raise SystemExit(0)
        raise SystemExit(1)
    assert os.waitpid(pid, 0)[1] == 0
    assert client.status_vm(vm)["state"] == "started"
    for method in ("fork", "spawn"):
        with multiprocessing.get_context(method).Pool(2) as pool:
            assert pool.map(own, range(4)) == ["own\\n"] * 4
    print(client.exec_vm(vm, command="echo parent")["stdout"])
"""
    )
    child = subprocess.Popen([sys.executable, program], stdout=subprocess.PIPE, text=True)
    text, _ = child.communicate(timeout=180)
    assert child.returncode == 0 and text == "parent\n\n", text


def test_an_interpreter_that_ends_takes_its_machines(pyro):
    child = script(
        'from pyro_mcp import Pyro\nclient = Pyro()\n'
        'client.start_vm(client.create_vm(environment="debian:12", mem_mib=512)["vm_id"])\nprint("there")'
    )
    assert child.communicate(timeout=PATIENCE)[0] == "there\n"
    assert child.returncode == 0 and not pyro.vmms()
    assert not list((pyro.state / "vms").iterdir())


def test_an_interpreter_that_is_killed_leaves_nothing(pyro):
    dice = random.Random(7)
    for _ in range(10):
        child = script(
            """
import threading
from pyro_mcp import Pyro
client = Pyro()
print("ready", flush=True)
def work():
    while True:
        client.run_in_vm(environment="debian:12", mem_mib=512, command="echo x")
for _ in range(2):
    threading.Thread(target=work).start()
"""
        )
        assert child.stdout.readline() == "ready\n"
        time.sleep(dice.random() * 2)
        child.kill()
        child.wait()
        wait_until(lambda: not pyro.vmms(), "the machines are gone")
        pyro.run("reap")
        assert not list((pyro.state / "vms").iterdir())


def test_a_directory_is_the_same_one_after_a_change_of_the_working_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for given in ["own/state", "~/own/state"]:
        with Pyro(base_dir=given) as client:
            monkeypatch.chdir("/")
            task_id = client.create_task(**SMALL)["task_id"]
            assert (tmp_path / "own/state/tasks" / task_id).is_dir()
            assert client.exec_task(task_id, command="echo here")["stdout"] == "here\n"
            client.delete_task(task_id)
            monkeypatch.chdir(tmp_path)


def test_the_server_of_a_client_and_of_the_package(client):
    server = client.create_server(profile="vm-run")
    assert server.command[1:] == ["mcp", "serve", "--profile", "vm-run"]
    child = script("import pyro_mcp; raise SystemExit(pyro_mcp.create_server().run())", stdin=subprocess.PIPE)
    hello = (
        '{"jsonrpc":"2.0","id":1,"method":"initialize","params":{"protocolVersion":"2025-11-25",'
        '"capabilities":{},"clientInfo":{"name":"x","version":"1"}}}\n'
    )
    child.stdin.write(hello)
    child.stdin.flush()
    assert '"pyro_mcp"' in child.stdout.readline()
    child.stdin.close()
    assert child.wait(timeout=PATIENCE) == 0
    with pytest.raises(ValueError, match="profile"):
        pyro_mcp.create_server(profile="nope")


def test_the_server_of_a_process_that_is_killed_ends(environment):
    program = "import pyro_mcp; pyro_mcp.create_server().run('http', listen='127.0.0.1:0')"
    child = script(program, stderr=subprocess.PIPE)
    assert "serving MCP at http://127.0.0.1:" in child.stderr.readline()
    child.kill()
    # The server holds the other end.
    child.communicate(timeout=PATIENCE)


def test_a_closed_client_says_so():
    client = Pyro()
    client.close()
    client.close()
    with pytest.raises(pyro_mcp.WrongStateError, match="closed"):
        client.list_tasks()
