"""A client of the MCP server that writes and reads lines as they are."""

import json
import subprocess
import threading

from pyro_process import PATIENCE


class Raw:
    """A client that writes lines as they are."""

    def __init__(self, pyro):
        self.log = open(pyro.place / "server.log", "w")
        self.process = pyro.start(
            "mcp", "serve", stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log, text=True
        )
        self.answers = {}
        self.lines = []
        self.heard = threading.Condition()
        threading.Thread(target=self.read, daemon=True).start()
        hello = {
            "protocolVersion": "2025-11-25", "capabilities": {}, "clientInfo": {"name": "raw", "version": "1"},
        }
        assert self.ask("initialize", hello)["result"]["serverInfo"]["name"] == "pyro_mcp"
        self.send({"jsonrpc": "2.0", "method": "notifications/initialized"})

    def read(self):
        for line in self.process.stdout:
            with self.heard:
                self.lines.append(line)
                message = json.loads(line)
                self.answers[message.get("id")] = message
                self.heard.notify_all()

    def line(self, text):
        self.process.stdin.write(text + "\n")
        self.process.stdin.flush()

    def send(self, message):
        self.line(json.dumps(message))

    def begin(self, method, params, number):
        self.send({"jsonrpc": "2.0", "id": number, "method": method, "params": params})

    def answer(self, number):
        with self.heard:
            assert self.heard.wait_for(lambda: number in self.answers, PATIENCE), f"no answer to {number}"
            return self.answers[number]

    def ask(self, method, params):
        number = len(self.answers) + 1000
        self.begin(method, params, number)
        return self.answer(number)

    def tool(self, name, **arguments):
        return self.ask("tools/call", {"name": name, "arguments": arguments})["result"]
