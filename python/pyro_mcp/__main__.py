"""The `pyro` command: ``python -m pyro_mcp``, and the script that the package installs."""

from __future__ import annotations

import os
import sys

from ._program import find_program
from ._pyro import PyroError


def main() -> None:
    """Becomes the program."""
    try:
        program = find_program()
    except PyroError as error:
        sys.exit(f"error: {error}\nhint: {error.hint}")
    os.execv(program, ["pyro", *sys.argv[1:]])


if __name__ == "__main__":
    main()
