"""The pyro program as tests run it, and ways to look for what it leaves behind."""

import contextlib
import json
import os
import subprocess
import time
from pathlib import Path

PROGRAM = os.environ["PYRO_TEST_PROGRAM"]
# How long something may take that takes a moment on a quiet machine, in seconds.
PATIENCE = 60


class Pyro:
    """The pyro program with a state directory of its own, on the environments that all tests share."""

    def __init__(self, place: Path):
        self.place = place
        self.state = state = place / "state"
        self.started = []
        self.environ = {
            **os.environ,
            "PYRO_STATE_DIR": str(state),
            # What other tests promise to their machines is no concern of this one's.
            "PYRO_RUNTIME_DIR": str(place / "runtime"),
            "PYRO_ENVIRONMENT_CACHE_DIR": os.environ["PYRO_TEST_ENVIRONMENTS"],
            "PYRO_MAX_ACTIVE_VMS": "8",
        }

    def command(self, *words):
        return [PROGRAM, *words]

    def start(self, *words, **options):
        process = subprocess.Popen(self.command(*words), env=self.environ, **options)
        self.started.append(process)
        return process

    def end_all(self):
        """Ends what a failed test has left running."""
        for process in self.started:
            if process.poll() is None:
                process.terminate()
                process.wait(timeout=PATIENCE)

    def run(self, *words, **options):
        return subprocess.run(
            self.command(*words), env=self.environ, capture_output=True, text=True, timeout=180, **options
        )

    def json(self, *words):
        done = self.run(*words, "--json")
        assert done.returncode == 0, done
        return json.loads(done.stdout)

    def vmms(self):
        """Process ids of the VMMs of this state directory: their jails show a disk of a machine in it."""
        found = []
        for entry in Path("/proc").iterdir():
            with contextlib.suppress(OSError):
                if entry.name.isdigit() and b"qemu-system" in (entry / "cmdline").read_bytes():
                    shown = (line.split()[3] for line in (entry / "mountinfo").read_text().splitlines())
                    if any(path.startswith(str(self.state)) for path in shown):
                        found.append(int(entry.name))
        return found


def wait_until(done, what):
    deadline = time.monotonic() + PATIENCE
    while not done():
        assert time.monotonic() < deadline, f"never: {what}"
        time.sleep(0.02)
