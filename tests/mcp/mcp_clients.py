"""The official Python client, connected to a server of pyro."""

import contextlib
import json
import re
import signal
import subprocess

import httpx
from mcp import ClientSession, StdioServerParameters
from mcp.client.stdio import stdio_client
from mcp.client.streamable_http import streamable_http_client
from pyro_process import PATIENCE, PROGRAM


@contextlib.asynccontextmanager
async def over_stdio(pyro, *arguments):
    server = StdioServerParameters(
        command=PROGRAM, args=["mcp", "serve", *arguments], env=pyro.environ
    )
    with open(pyro.place / "server.log", "w") as log:
        async with stdio_client(server, errlog=log) as (reader, writer):
            async with ClientSession(reader, writer) as session:
                await session.initialize()
                yield session


class HttpServer:
    """A server over HTTP on a free port."""

    def __init__(self, pyro, *arguments):
        self.log = open(pyro.place / "http.log", "w")
        self.process = pyro.start(
            "mcp", "serve", "--http", "127.0.0.1:0", "--json", *arguments,
            stdout=subprocess.PIPE, stderr=self.log, text=True,
        )
        text = ""
        while not text.endswith("}\n"):
            line = self.process.stdout.readline()
            assert line, "the server ended"
            text += line
        told = json.loads(text)
        self.url, self.token = told["url"], told["token"]
        assert re.fullmatch(r"[0-9a-f]{64}", self.token)

    @property
    def headers(self):
        return {"Authorization": f"Bearer {self.token}"}

    @contextlib.asynccontextmanager
    async def connect(self):
        async with httpx.AsyncClient(headers=self.headers, timeout=PATIENCE) as client:
            async with streamable_http_client(self.url, http_client=client) as (reader, writer, _):
                async with ClientSession(reader, writer) as session:
                    await session.initialize()
                    yield session

    def post(self, body, patience=PATIENCE, **headers):
        accept = {"Accept": "application/json, text/event-stream", "Content-Type": "application/json"}
        return httpx.post(self.url, content=body, headers={**accept, **headers}, timeout=patience)

    def stop(self):
        self.process.send_signal(signal.SIGTERM)
        code = self.process.wait(timeout=PATIENCE)
        self.log.close()
        return code


async def call(session, name, **arguments):
    """What a tool returns that must succeed; its two forms must be the same object."""
    result = await session.call_tool(name, arguments)
    assert not result.isError, result.content
    assert json.loads(result.content[0].text) == result.structuredContent
    return result.structuredContent


async def refused(session, name, **arguments):
    """What a tool returns that must fail."""
    result = await session.call_tool(name, arguments)
    assert result.isError, result.content
    assert result.structuredContent is None, "clients would hold it against the schema of a result"
    failure = json.loads(result.content[0].text)
    assert set(failure) == {"error", "code", "hint"} and failure["error"]
    return failure
