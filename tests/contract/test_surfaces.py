"""One table of cases, carried out through the command line, the MCP server and the Python package: the same words in, the
same objects and the same errors out."""

import json

import pytest
from raw_client import Raw

SMALL = {"environment": "debian:12", "mem_mib": 512}


class Failed(Exception):
    """An operation that failed, with its code and its text."""

    def __init__(self, code, text):
        super().__init__(f"{code}: {text}")
        self.code, self.text = code, text


class CommandLine:
    """Operations as commands."""

    def __init__(self, pyro):
        self.pyro = pyro

    def call(self, operation, arguments):
        words = {
            "run_vm": ["run"], "create_task": ["task", "create"], "exec_task": ["task", "exec"],
            "status_task": ["task", "status"], "logs_task": ["task", "logs"], "list_tasks": ["task", "list"],
            "delete_task": ["task", "delete"], "list_environments": ["env", "list"], "reap_expired": ["reap"],
        }[operation]
        arguments = dict(arguments)
        command = arguments.pop("command", None)
        named = [arguments.pop(name) for name in ("environment", "task_id") if name in arguments]
        for name, value in arguments.items():
            flag = "--since" if name == "since_sequence" else "--" + name.replace("_", "-")
            if isinstance(value, dict):
                words = words + [word for item in value.items() for word in (flag, "=".join(item))]
            else:
                words = words + ([flag] if value is True else [] if value is False else [flag, str(value)])
        words = [*words, *named, "--json"]
        if command is not None:
            words += ["--", *([command] if isinstance(command, str) else command)]
        done = self.pyro.run(*words, stdin=None)
        told = json.loads(done.stdout)
        if told.get("ok") is False:
            raise Failed(told["code"], told["error"])
        return told

    def close(self):
        pass


class Mcp:
    """Operations as tools."""

    def __init__(self, pyro):
        self.raw = Raw(pyro)

    def call(self, operation, arguments):
        noun_first = {
            "run_vm": "vm_run", "list_environments": "vm_list_environments", "reap_expired": "vm_reap_expired",
            "list_tasks": "task_list",
        }
        verb, _, noun = operation.partition("_")
        result = self.raw.tool(noun_first.get(operation, f"{noun}_{verb}"), **arguments)
        told = json.loads(result["content"][0]["text"])
        if result["isError"]:
            raise Failed(told["code"], told["error"])
        assert told == result["structuredContent"]
        return told

    def close(self):
        self.raw.process.stdin.close()
        self.raw.process.wait()


class Python:
    """Operations as methods."""

    def __init__(self, pyro):
        from pyro_mcp import Pyro

        self.client = Pyro(
            base_dir=pyro.state, cache_dir=pyro.environ["PYRO_ENVIRONMENT_CACHE_DIR"], max_active_vms=8
        )

    def call(self, operation, arguments):
        from pyro_mcp import PyroError, __version__

        arguments = dict(arguments)
        place = [arguments.pop("task_id")] if "task_id" in arguments else []
        method = getattr(self.client, {"run_vm": "run_in_vm"}.get(operation, operation))
        try:
            told = method(*place, **arguments)
        except PyroError as error:
            raise Failed(error.code, str(error)) from error
        if operation == "list_environments":
            return {"catalog_version": __version__, "environments": told}
        return told

    def close(self):
        self.client.close()


@pytest.fixture(params=[CommandLine, Mcp, Python], ids=["cli", "mcp", "python"])
def surface(request, pyro):
    surface = request.param(pyro)
    yield surface
    surface.close()


RESULTS = [
    ({"command": "echo out; echo err >&2; exit 3"}, {"stdout": "out\n", "stderr": "err\n", "exit_code": 3, "fault": None}),
    (
        {"command": ["printf", "%s|", "a b", "$HOME"]},
        {"stdout": "a b|$HOME|", "exit_code": 0, "argv": ["printf", "%s|", "a b", "$HOME"],
         "command": "printf '%s|' 'a b' '$HOME'", "output_open": False},
    ),
    (
        {"command": 'echo "$A|$B"; id -un; pwd', "env": {"A": "1 =", "B": ""}, "user": "games", "cwd": "/usr"},
        {"stdout": "1 =|\ngames\n/usr\n", "exit_code": 0, "argv": None},
    ),
    ({"command": "sleep 9 & echo out"}, {"stdout": "out\n", "exit_code": 0, "output_open": True}),
    ({"command": ["true"], "user": "nosuch"}, {"exit_code": 126, "stderr": "no such user: nosuch\n"}),
    ({"command": "pwd; cd /; exec pwd"}, {"stdout": "/workspace\n/\n", "exit_code": 0}),
    ({"command": r"printf 'caf\303\251 \377'"}, {"stdout": "café \ufffd", "stdout_bytes": 7}),
    ({"command": ["sh", "-c", "kill -9 $$"]}, {"exit_code": 137, "fault": None}),
    ({"command": ["cat"]}, {"stdout": "", "exit_code": 0}),
    (
        {"command": "echo before; sleep 60", "timeout_seconds": 5},
        {"exit_code": 124, "timed_out": True, "fault": "timeout", "stdout": "before\n",
         "stderr": "command timed out after 5s"},
    ),
]

REFUSALS = [
    ("run_vm", {**SMALL, "command": ["true"], "vcpu_count": 9}, "invalid_value", "vcpu_count must be between 1 and 8"),
    ("run_vm", {**SMALL, "command": ["true"], "vcpu_count": -1}, "invalid_value", "vcpu_count must be between 1 and 8"),
    ("run_vm", {"environment": "debian:12", "command": ["true"], "mem_mib": 255}, "invalid_value",
     "mem_mib must be between 256 and 32768"),
    ("create_task", {**SMALL, "ttl_seconds": 59}, "invalid_value", "ttl_seconds must be between 60 and 3600"),
    ("create_task", {**SMALL, "ttl_seconds": 3601}, "invalid_value", "ttl_seconds must be between 60 and 3600"),
    ("run_vm", {**SMALL, "command": ["true"], "timeout_seconds": 0}, "invalid_value", "timeout_seconds must be positive"),
    ("run_vm", {**SMALL, "command": ["true"], "timeout_seconds": -2.5}, "invalid_value", "timeout_seconds must be positive"),
    ("run_vm", {**SMALL, "command": [""]}, "invalid_value", "command must not be empty"),
    ("run_vm", {**SMALL, "command": ["true"], "env": {"": "x"}}, "invalid_value", "env: '' is no name of a variable"),
    ("run_vm", {**SMALL, "command": ["true"], "user": ""}, "invalid_value", "invalid user ''"),
    ("run_vm", {**SMALL, "command": ["true"], "cwd": "tmp"}, "invalid_value", "cwd must be an absolute path"),
    ("run_vm", {"environment": "nope", "command": ["true"]}, "unknown_environment",
     "unknown environment 'nope'; expected one of: debian:12, debian:12-base, debian:12-build"),
    ("create_task", {**SMALL, "require_isolation": "firecracker-kvm"}, "isolation_unavailable",
     "isolation 'firecracker-kvm' was required; this host gives 'qemu-tcg'"),
    ("status_task", {"task_id": "0123456789ab"}, "not_found", "task '0123456789ab' does not exist"),
    ("exec_task", {"task_id": "../../x", "command": ["true"]}, "not_found", "task '../../x' does not exist"),
    ("delete_task", {"task_id": ""}, "not_found", "task '' does not exist"),
    ("delete_task", {"task_id": "0123456789ab", "force": True}, "not_found", "task '0123456789ab' does not exist"),
    ("logs_task", {"task_id": "nope"}, "not_found", "task 'nope' does not exist"),
]

EXEC_KEYS = {
    "environment", "environment_version", "command", "stdout", "stderr", "exit_code", "duration_ms", "execution_mode",
    "timed_out", "stdout_bytes", "stderr_bytes", "stdout_truncated", "stderr_truncated", "isolation", "start_mode", "fault",
    "timings", "notes", "argv", "output_open",
}
TASK_KEYS = {
    "task_id", "environment", "environment_version", "vcpu_count", "mem_mib", "disk_mib", "ttl_seconds", "created_at",
    "expires_at", "state", "network_enabled", "network_policy", "ports", "secrets", "allow_host_compat", "guest_ip", "tap_name", "execution_mode", "isolation",
    "start_mode", "metadata", "last_error", "workspace_path", "command_count", "last_command", "disk_bytes",
}


def test_commands_end_alike(surface):
    task = surface.call("create_task", SMALL)["task_id"]
    for number, (arguments, expected) in enumerate(RESULTS, 1):
        fresh = surface.call("run_vm", {**SMALL, **arguments})
        assert set(fresh) == EXEC_KEYS | {"vm_id", "cleanup"}
        assert fresh["cleanup"] == {"vm_id": fresh["vm_id"], "deleted": True, "reason": "post_exec_cleanup"}
        kept = surface.call("exec_task", {"task_id": task, **arguments})
        assert set(kept) == EXEC_KEYS | {"task_id", "sequence", "cwd"}
        assert (kept["sequence"], kept["cwd"]) == (number, arguments.get("cwd", "/workspace"))
        for result in (fresh, kept):
            for key, value in expected.items():
                got = result[key].strip() if key == "stderr" else result[key]
                assert got == (value.strip() if key == "stderr" else value), (arguments, key)
    surface.call("delete_task", {"task_id": task})


@pytest.mark.parametrize(("operation", "arguments", "code", "text"), REFUSALS)
def test_refusals_are_worded_alike(surface, operation, arguments, code, text, pyro):
    with pytest.raises(Failed) as refused:
        surface.call(operation, arguments)
    assert (refused.value.code, refused.value.text) == (code, text)
    for kind in ("vms", "tasks"):
        assert not (pyro.state / kind).exists() or not list((pyro.state / kind).iterdir()), "nothing was made"


def test_a_task_is_told_alike(surface):
    record = surface.call("create_task", {**SMALL, "ttl_seconds": 120})
    task = record["task_id"]
    assert set(record) == TASK_KEYS and record["state"] == "started" and record["last_command"] is None
    assert (record["network_enabled"], record["network_policy"]["mode"]) == (False, "none")
    assert record["expires_at"] == record["created_at"] + 120 and record["workspace_path"] == "/workspace"
    surface.call("exec_task", {"task_id": task, "command": ["sh", "-c", "exit 4"]})
    surface.call("exec_task", {"task_id": task, "command": "echo two"})
    record = surface.call("status_task", {"task_id": task})
    assert record["command_count"] == 2
    assert set(record["last_command"]) == {
        "sequence", "command", "cwd", "exit_code", "duration_ms", "execution_mode", "status",
    }
    logs = surface.call("logs_task", {"task_id": task})
    assert logs["task_id"] == task and logs["count"] == 2
    assert [(entry["sequence"], entry["exit_code"], entry["status"]) for entry in logs["entries"]] == [
        (1, 4, "finished"), (2, 0, "finished"),
    ]
    assert logs["entries"][1]["stdout"] == "two\n"
    assert surface.call("logs_task", {"task_id": task, "since_sequence": 2})["count"] == 1
    assert [found["task_id"] for found in surface.call("list_tasks", {})["tasks"]] == [task]
    assert surface.call("delete_task", {"task_id": task}) == {
        "task_id": task, "deleted": True, "reason": "explicit_delete",
    }
    assert surface.call("list_tasks", {})["count"] == 0


def test_environments_are_told_alike(surface):
    listed = surface.call("list_environments", {})
    assert listed["catalog_version"] == "2.1.0"
    assert [entry["name"] for entry in listed["environments"]] == ["debian:12", "debian:12-base", "debian:12-build"]
    assert surface.call("reap_expired", {}) == {
        "deleted_vm_ids": [], "deleted_task_ids": [], "count": 0, "problems": [],
    }
