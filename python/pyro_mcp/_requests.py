"""Requests as the engine takes them, for both kinds of clients."""

from __future__ import annotations

import json
from typing import Any, Dict, List, Mapping, Optional, Sequence, Union

from .types import Command, NetworkPolicyText, Secret


def request(method: str, **arguments: Any) -> str:
    """One request."""
    return json.dumps({"method": method, **arguments})


def machine(
    environment: str,
    vcpu_count: int,
    mem_mib: int,
    disk_mib: int,
    ttl_seconds: int,
    network: Dict[str, Any],
    publish: Sequence[str],
    allow_host_compat: bool,
    require_isolation: Optional[str],
    cold: bool,
) -> Dict[str, Any]:
    """The machine of a request."""
    return {
        "environment": environment,
        "vcpu_count": vcpu_count,
        "mem_mib": mem_mib,
        "disk_mib": disk_mib,
        "ttl_seconds": ttl_seconds,
        "network": network,
        "publish": listed("publish", publish),
        "allow_host_compat": allow_host_compat,
        "require_isolation": require_isolation,
        "cold": cold,
    }


def listed(name: str, words: Sequence[str]) -> List[str]:
    """Words as a list. A single string in its place would become a list of letters."""
    if isinstance(words, str):
        raise TypeError(f"{name} must be a list, not a string")
    return list(words)


def networking(
    network: bool,
    allow: Sequence[str],
    deny: Sequence[str],
    network_policy: Union[str, NetworkPolicyText, None],
    secrets: Optional[Mapping[str, Secret]],
) -> Dict[str, Any]:
    """What a guest may reach, and what it uses there and does not see."""
    return {
        "network": network,
        "allow": listed("allow", allow),
        "deny": listed("deny", deny),
        "network_policy": network_policy,
        "secrets": {name: dict(secret) for name, secret in (secrets or {}).items()},
    }


def execution(
    command: Command,
    timeout_seconds: float,
    cwd: str,
    env: Optional[Mapping[str, str]],
    user: Union[str, int, None],
) -> Dict[str, Any]:
    """The command of a request. JSON has no infinity: what is none is refused by the engine in its own words."""
    limit = timeout_seconds if timeout_seconds == timeout_seconds and abs(timeout_seconds) < 1e18 else 0
    return {
        "command": command,
        "timeout_seconds": limit,
        "cwd": cwd,
        "env": dict(env or {}),
        "user": None if user is None else str(user),
    }


def stdin_bytes(stdin: Union[str, bytes, None]) -> Optional[bytes]:
    """What a command reads, as bytes."""
    return stdin.encode() if isinstance(stdin, str) else stdin
