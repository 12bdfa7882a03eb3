"""Writes the blocking client from the one whose methods are awaited, so that there is one text of both.

`make_synchronous.py --check` only tells whether the file is what would be written.
"""

import sys
from pathlib import Path

PACKAGE = Path(__file__).parent / "pyro_mcp"
WORDS = [
    ("The client whose methods are awaited.", "The client whose methods block. Written by make_synchronous.py."),
    ("async def __aenter__", "def __enter__"),
    ("async def __aexit__", "def __exit__"),
    ("async def ", "def "),
    ("async for ", "for "),
    ("await ", ""),
    ("AsyncIterator", "Iterator"),
    ("AsyncPyro", "Pyro"),
    ("Awaiting", "Blocking"),
    ("A call that is cancelled, or interrupted by a signal, ends its command.", "A call that a signal interrupts ends its command."),
]


def main() -> None:
    text = (PACKAGE / "_asynchronous.py").read_text()
    for before, after in WORDS:
        assert before in text, before
        text = text.replace(before, after)
    target = PACKAGE / "_synchronous.py"
    if "--check" in sys.argv:
        if target.read_text() != text:
            sys.exit("pyro_mcp/_synchronous.py is out of date: run python/make_synchronous.py")
    else:
        target.write_text(text)


if __name__ == "__main__":
    main()
