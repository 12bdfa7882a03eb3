"""Stand-ins for the servers that real tools talk to, on this host's loopback, over TLS with an authority of the tests' own.

One server answers for all names. It remembers each request, and may ask for a credential.
"""

import asyncio
import base64
import gzip
import hashlib
import io
import json
import os
import socket
import subprocess
import tarfile
import threading
from dataclasses import dataclass, field
from pathlib import Path

import trustme
from hypercorn.asyncio import serve
from hypercorn.config import Config

NAMES = ["pypi.test", "npm.test", "deb.test", "git.test", "crates.test", "web.test"]
PIECE = 1 << 16


@dataclass
class Seen:
    """A request that a server has heard."""

    host: str
    method: str
    path: str
    version: str
    headers: dict


@dataclass
class Standins:
    """What the servers have, and what they have heard."""

    place: Path
    wheels: Path
    # What a request must have in `authorization`, by name; a name that is not here asks for nothing.
    credentials: dict = field(default_factory=dict)
    seen: list = field(default_factory=list)

    def start(self):
        """Serves from a thread of its own until the process ends."""
        authority = trustme.CA()
        self.place.mkdir(parents=True, exist_ok=True)
        self.roots = self.place / "authority.pem"
        authority.cert_pem.write_to_path(str(self.roots))
        certificate = authority.issue_cert(*NAMES)
        chain, key = self.place / "chain.pem", self.place / "key.pem"
        chain.write_bytes(b"".join(blob.bytes() for blob in certificate.cert_chain_pems))
        certificate.private_key_pem.write_to_path(str(key))
        self._make_packages()
        listener = socket.socket()
        listener.bind(("127.0.0.1", 0))
        listener.listen(256)
        self.port = listener.getsockname()[1]
        config = Config()
        config.bind = [f"fd://{listener.detach()}"]
        config.certfile, config.keyfile = str(chain), str(key)
        config.accesslog = config.errorlog = None
        # As servers have it: a tool may think for a while between two requests.
        config.keep_alive_timeout = 75
        config.h11_max_incomplete_size = PIECE
        started = threading.Event()

        async def run():
            started.set()
            await serve(self.answer, config, shutdown_trigger=asyncio.Event().wait)

        threading.Thread(target=lambda: asyncio.run(run()), daemon=True).start()
        started.wait()
        return self

    def policy(self):
        """A network policy under which a guest reaches them and nothing else."""
        return {
            "allow": [f"{name}:443" for name in NAMES],
            "hosts": {name: f"127.0.0.1:{self.port}" for name in NAMES},
        }

    def heard(self, host):
        """What one of them has heard since this was last asked."""
        found = [seen for seen in self.seen if seen.host == host]
        self.seen = [seen for seen in self.seen if seen.host != host]
        return found

    def _make_packages(self):
        """Makes an npm package, a Debian package and a crate, all called `demo`, and an empty repository."""
        def packed(files):
            out = io.BytesIO()
            with tarfile.open(fileobj=out, mode="w:gz") as tar:
                for name, text in files.items():
                    info = tarfile.TarInfo(name)
                    info.size = len(text)
                    tar.addfile(info, io.BytesIO(text))
            return out.getvalue()

        body = json.dumps({"name": "demo", "version": "1.0.0", "main": "index.js"}).encode()
        # Eight megabytes that hardly shrink.
        weight = os.urandom(8 << 20)
        self.npm = packed({"package/package.json": body, "package/index.js": b"module.exports = 'npm works'\n",
                           "package/weight.bin": weight})
        manifest = b'[package]\nname = "demo"\nversion = "1.0.0"\nedition = "2021"\n'
        self.crate = packed({"demo-1.0.0/Cargo.toml": manifest, "demo-1.0.0/src/lib.rs": b"// nothing\n"})
        tree = self.place / "deb"
        (tree / "DEBIAN").mkdir(parents=True)
        (tree / "usr/bin").mkdir(parents=True)
        control = "Package: demo\nVersion: 1.0\nArchitecture: all\nMaintainer: tests <tests@localhost>\nDescription: a test\n"
        (tree / "DEBIAN/control").write_text(control)
        (tree / "usr/bin/demo").write_text("#!/bin/sh\necho apt works\n")
        (tree / "usr/bin/demo").chmod(0o755)
        package = self.place / "demo.deb"
        subprocess.run(["dpkg-deb", "--root-owner-group", "--build", tree, package], check=True, capture_output=True)
        self.deb = package.read_bytes()
        self.packages = (
            f"{control}Filename: ./demo.deb\nSize: {len(self.deb)}\nSHA256: {hashlib.sha256(self.deb).hexdigest()}\n\n"
        ).encode()
        repository = self.place / "repository.git"
        git = ["git", "-c", "init.defaultBranch=main"]
        subprocess.run([*git, "init", "--quiet", "--bare", repository], check=True)
        for key, value in (("http.receivepack", "true"), ("http.postBuffer", str(64 << 20))):
            subprocess.run([*git, "-C", repository, "config", key, value], check=True)
        work = self.place / "work"
        subprocess.run([*git, "init", "--quiet", work], check=True)
        (work / "weight.bin").write_bytes(os.urandom(20 << 20))
        own = [*git, "-C", work, "-c", "user.name=tests", "-c", "user.email=tests@localhost"]
        subprocess.run([*own, "add", "."], check=True)
        subprocess.run([*own, "commit", "--quiet", "-m", "first"], check=True)
        subprocess.run([*own, "push", "--quiet", repository, "HEAD:main"], check=True)
        self.repository = repository

    async def answer(self, scope, receive, send):
        """The ASGI application."""
        if scope["type"] == "lifespan":
            while True:
                message = await receive()
                await send({"type": f"{message['type']}.complete"})
                if message["type"] == "lifespan.shutdown":
                    return
        headers = {name.decode(): value.decode("latin-1") for name, value in scope["headers"]}
        host = headers.get("host", headers.get(":authority", "")).split(":")[0]
        method = scope.get("method", "WEBSOCKET")
        self.seen.append(Seen(host, method, scope["path"], scope["http_version"], headers))
        if scope["type"] == "websocket":
            await self._echo(receive, send)
            return
        wanted = self.credentials.get(host)
        if wanted is not None and headers.get("authorization") != wanted:
            challenge = [(b"www-authenticate", b'Basic realm="tests"')]
            await respond(send, 401, b"a credential is missing\n", challenge)
            return
        serve_host = getattr(self, "_" + host.split(".")[0], None)
        if serve_host is None:
            await respond(send, 421, b"no such name\n")
            return
        await serve_host(scope, headers, receive, send)

    async def _pypi(self, scope, headers, receive, send):
        parts = [part for part in scope["path"].split("/") if part]
        if parts[:1] == ["simple"] and len(parts) == 2:
            wanted = parts[1].replace("-", "_").lower()
            files = [file.name for file in self.wheels.iterdir() if file.name.split("-")[0].lower() == wanted]
            links = "".join(f'<a href="/files/{name}">{name}</a>\n' for name in sorted(files))
            await respond(send, 200 if files else 404, links.encode(), [(b"content-type", b"text/html")])
        elif parts[:1] == ["files"] and len(parts) == 2 and (self.wheels / parts[1]).is_file():
            await respond(send, 200, (self.wheels / parts[1]).read_bytes())
        else:
            await respond(send, 404, b"")

    async def _npm(self, scope, headers, receive, send):
        if scope["path"] == "/demo":
            integrity = "sha512-" + base64.b64encode(hashlib.sha512(self.npm).digest()).decode()
            dist = {"tarball": "https://npm.test/demo/-/demo-1.0.0.tgz", "integrity": integrity}
            version = {"name": "demo", "version": "1.0.0", "dist": dist}
            about = {"name": "demo", "dist-tags": {"latest": "1.0.0"}, "versions": {"1.0.0": version}}
            await respond(send, 200, json.dumps(about).encode(), [(b"content-type", b"application/json")])
        elif scope["path"].endswith(".tgz"):
            await respond(send, 200, self.npm)
        else:
            await respond(send, 404, b"{}")

    async def _deb(self, scope, headers, receive, send):
        name = scope["path"].rsplit("/", 1)[-1]
        found = {"Packages": self.packages, "Packages.gz": gzip.compress(self.packages), "demo.deb": self.deb}.get(name)
        await respond(send, 200 if found else 404, found or b"")

    async def _crates(self, scope, headers, receive, send):
        path = scope["path"]
        if path == "/config.json":
            about = {"dl": "https://crates.test/dl/{crate}/{version}", "api": "https://crates.test"}
            if "crates.test" in self.credentials:
                about["auth-required"] = True
            await respond(send, 200, json.dumps(about).encode())
        elif path == "/de/mo/demo":
            checksum = hashlib.sha256(self.crate).hexdigest()
            line = {"name": "demo", "vers": "1.0.0", "deps": [], "cksum": checksum, "features": {}, "yanked": False}
            await respond(send, 200, json.dumps(line).encode() + b"\n")
        elif path == "/dl/demo/1.0.0":
            await respond(send, 200, self.crate)
        else:
            await respond(send, 404, b"")

    async def _git(self, scope, headers, receive, send):
        """git's own server, as a web server calls it."""
        environ = {
            **os.environ,
            "GIT_PROJECT_ROOT": str(self.place),
            "GIT_HTTP_EXPORT_ALL": "1",
            "REQUEST_METHOD": scope["method"],
            "PATH_INFO": scope["path"],
            "QUERY_STRING": scope["query_string"].decode(),
            "CONTENT_TYPE": headers.get("content-type", ""),
            "REMOTE_USER": "tests",
            "REMOTE_ADDR": "127.0.0.1",
            "GIT_PROTOCOL": headers.get("git-protocol", ""),
            "HTTP_CONTENT_ENCODING": headers.get("content-encoding", ""),
        }
        body = b"".join([piece async for piece in pieces(receive)])
        environ["CONTENT_LENGTH"] = str(len(body))
        process = await asyncio.create_subprocess_exec(
            "git", "-c", "safe.directory=*", "http-backend", env=environ,
            stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE,
        )
        out, _ = await process.communicate(body)
        head, _, body = out.partition(b"\r\n\r\n")
        fields = [tuple(line.split(b": ", 1)) for line in head.split(b"\r\n")]
        status = next((int(value.split()[0]) for name, value in fields if name.lower() == b"status"), 200)
        await respond(send, status, body, [(name.lower(), value) for name, value in fields if name.lower() != b"status"])

    async def _web(self, scope, headers, receive, send):
        if scope["method"] in ("POST", "PUT"):
            digest, length = hashlib.sha256(), 0
            async for piece in pieces(receive):
                digest.update(piece)
                length += len(piece)
            await respond(send, 200, json.dumps({"sha256": digest.hexdigest(), "length": length}).encode())
        elif scope["path"].startswith("/bytes/"):
            length = int(scope["path"].rsplit("/", 1)[-1])
            await send({"type": "http.response.start", "status": 200,
                        "headers": [(b"content-length", str(length).encode())]})
            for at in range(0, length, PIECE):
                piece = pattern(at // PIECE)[: length - at]
                await send({"type": "http.response.body", "body": piece, "more_body": True})
            await send({"type": "http.response.body", "body": b""})
        else:
            await respond(send, 200, f"{scope['http_version']} {scope['path']}".encode())

    async def _echo(self, receive, send):
        await receive()
        await send({"type": "websocket.accept"})
        while True:
            message = await receive()
            if message["type"] != "websocket.receive":
                return
            await send({"type": "websocket.send", "text": message.get("text"), "bytes": message.get("bytes")})


def pattern(number):
    """One piece of the bytes that are downloaded."""
    return hashlib.sha256(str(number).encode()).digest() * (PIECE // 32)


def pattern_digest(length):
    """The digest of what a download of this length has."""
    digest = hashlib.sha256()
    for at in range(0, length, PIECE):
        digest.update(pattern(at // PIECE)[: length - at])
    return digest.hexdigest()


async def pieces(receive):
    """The body of a request, as it comes."""
    while True:
        message = await receive()
        if message["type"] != "http.request":
            return
        yield message.get("body", b"")
        if not message.get("more_body"):
            return


async def respond(send, status, body, headers=()):
    """Answers with a whole body."""
    length = (b"content-length", str(len(body)).encode())
    fields = [(name, value) for name, value in headers if name != b"content-length"] + [length]
    await send({"type": "http.response.start", "status": status, "headers": fields})
    await send({"type": "http.response.body", "body": body})
