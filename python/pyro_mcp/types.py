"""What the methods return: the objects of the public contract.

Times are seconds since the epoch, durations milliseconds, sizes bytes.
"""

from __future__ import annotations

from typing import Any, Dict, List, Literal, Optional, TypedDict, Union

__all__ = [
    "Cancelled",
    "Cleanup",
    "Command",
    "Deleted",
    "DeletedTask",
    "Environment",
    "ExecResult",
    "ExitEvent",
    "Fault",
    "Inspection",
    "JournalEntry",
    "LastCommand",
    "NetworkCounts",
    "NetworkInfo",
    "NetworkLog",
    "NetworkPolicy",
    "NetworkPolicyText",
    "OutputEvent",
    "Pruned",
    "Published",
    "Pulled",
    "Reaped",
    "Secret",
    "SecretRecord",
    "State",
    "Status",
    "StreamEvent",
    "TaskList",
    "TaskLogs",
    "TaskNetwork",
    "TaskPorts",
    "TaskRecord",
    "Timings",
    "VmRecord",
]

Command = Union[str, List[str]]
"""A string for the guest's ``/bin/sh -lc``, or a list of words that is run as it is."""

State = Literal["created", "started", "stopped"]
Fault = Literal[
    "timeout", "out_of_memory", "disk_full", "output_limit", "guest_lost", "cancelled", "ttl_expired"
]
Status = Literal["running", "finished", "timed_out", "interrupted"]


class NetworkPolicyText(TypedDict, total=False):
    """What a file of a network policy holds."""

    include: List[str]
    open: bool
    allow: List[str]
    deny: List[str]
    hosts: Dict[str, str]
    inspect: Dict[str, List[str]]


class Secret(TypedDict):
    """What a guest uses and never sees."""

    value_from: str
    """``env:VARIABLE`` of this process, or ``file:PATH``."""
    hosts: List[str]
    """The hosts that it is sent to."""


class SecretRecord(TypedDict):
    """A secret as records show it: never its value."""

    value_from: str
    hosts: List[str]


class Published(TypedDict):
    """A port of this host that leads to one of a guest."""

    host_ip: str
    host_port: int
    guest_port: int


class TaskPorts(TypedDict):
    """The published ports of a task."""

    task_id: str
    ports: List[Published]


class NetworkPolicy(TypedDict):
    """What a guest may reach."""

    mode: Literal["none", "deny", "allow", "open"]
    allow: List[str]
    deny: List[str]
    digest: str


class VmRecord(TypedDict):
    """A machine."""

    vm_id: str
    environment: str
    environment_version: str
    vcpu_count: int
    mem_mib: int
    ttl_seconds: int
    created_at: float
    expires_at: float
    state: State
    network_enabled: bool
    network_policy: NetworkPolicy
    ports: List[Published]
    secrets: Dict[str, SecretRecord]
    allow_host_compat: bool
    guest_ip: Optional[str]
    tap_name: Optional[str]
    execution_mode: str
    isolation: str
    start_mode: Optional[str]
    metadata: Dict[str, str]
    last_error: Optional[str]


class LastCommand(TypedDict):
    """The newest command of a task."""

    sequence: int
    command: str
    cwd: str
    exit_code: Optional[int]
    duration_ms: Optional[float]
    execution_mode: str
    status: Status


class TaskRecord(TypedDict):
    """A task."""

    task_id: str
    environment: str
    environment_version: str
    vcpu_count: int
    mem_mib: int
    disk_mib: int
    ttl_seconds: int
    created_at: float
    expires_at: float
    state: State
    network_enabled: bool
    network_policy: NetworkPolicy
    ports: List[Published]
    secrets: Dict[str, SecretRecord]
    allow_host_compat: bool
    guest_ip: Optional[str]
    tap_name: Optional[str]
    execution_mode: str
    isolation: str
    start_mode: str
    metadata: Dict[str, str]
    last_error: Optional[str]
    workspace_path: str
    command_count: int
    last_command: Optional[LastCommand]
    disk_bytes: int


class TaskList(TypedDict):
    """All tasks, newest activity first."""

    count: int
    disk_bytes: int
    tasks: List[TaskRecord]
    problems: List[str]


class Timings(TypedDict):
    """Milliseconds by phase."""

    prepare: float
    start: float
    handshake: float
    execute: float
    cleanup: float


class Cleanup(TypedDict):
    """What became of a machine after its command."""

    vm_id: str
    deleted: bool
    reason: str


class _Subject(TypedDict, total=False):
    vm_id: str
    task_id: str
    sequence: int
    cwd: str
    cleanup: Cleanup


class ExecResult(_Subject):
    """The end of a command. ``fault`` tells what ended it other than itself.

    A command in a machine has ``vm_id`` and ``cleanup``; one in a task ``task_id``, ``sequence`` and ``cwd``.
    """

    environment: str
    environment_version: str
    command: str
    argv: Optional[List[str]]
    stdout: str
    stderr: str
    exit_code: int
    duration_ms: float
    execution_mode: str
    timed_out: bool
    stdout_bytes: int
    stderr_bytes: int
    stdout_truncated: bool
    stderr_truncated: bool
    isolation: str
    start_mode: str
    fault: Optional[Fault]
    output_open: bool
    timings: Timings
    notes: List[str]


class JournalEntry(TypedDict):
    """A command of a task with its output."""

    sequence: int
    command: str
    argv: Optional[List[str]]
    cwd: str
    user: Optional[str]
    status: Status
    exit_code: Optional[int]
    duration_ms: Optional[float]
    execution_mode: str
    stdout_file: str
    stderr_file: str
    started_at: float
    recorded_at: float
    stdout_bytes: int
    stderr_bytes: int
    stdout_dropped_bytes: int
    stderr_dropped_bytes: int
    fault: Optional[Fault]
    output_open: bool
    reason: Optional[str]
    request_id: str
    stdout: str
    stderr: str
    stdout_truncated: bool
    stderr_truncated: bool


class TaskLogs(TypedDict):
    """Commands of a task, in the order of their numbers."""

    task_id: str
    count: int
    entries: List[JournalEntry]


class Deleted(TypedDict):
    """A deleted machine."""

    vm_id: str
    deleted: bool
    reason: str


class DeletedTask(TypedDict):
    """A deleted task."""

    task_id: str
    deleted: bool
    reason: str


class _Addresses(TypedDict, total=False):
    reason: str
    tap_name: str
    guest_ip: str
    gateway_ip: str
    subnet_cidr: str
    mac_address: str
    dns_servers: List[str]


class NetworkInfo(_Addresses):
    """The network of a machine, or the reason why it has none."""

    vm_id: str
    network_enabled: bool
    outbound_connectivity_expected: bool


class NetworkCounts(TypedDict):
    """What a guest did on its network since it was started."""

    allowed: int
    denied: int
    bytes_in: int
    bytes_out: int
    log_dropped: int


class _Changed(TypedDict, total=False):
    old_digest: str
    new_digest: str
    closed_connections: int


class TaskNetwork(_Changed):
    """The network of a task; the digests and the closed connections after a change."""

    task_id: str
    network_policy: NetworkPolicy
    counts: Optional[NetworkCounts]


class NetworkLog(TypedDict):
    """What a guest did on its network."""

    task_id: str
    count: int
    entries: List[Dict[str, Any]]
    next_offset: int


class Reaped(TypedDict):
    """What a reaping has removed."""

    deleted_vm_ids: List[str]
    deleted_task_ids: List[str]
    count: int
    problems: List[str]


class Environment(TypedDict):
    """An environment of the catalog, and what is installed of it."""

    name: str
    version: str
    description: str
    default_packages: List[str]
    distribution: str
    distribution_version: str
    platform: str
    oci_registry: Optional[str]
    oci_repository: Optional[str]
    oci_reference: Optional[str]
    source_digest: Optional[str]
    compatibility: str
    catalog_version: str
    installed: bool
    cache_dir: str
    install_dir: Optional[str]
    install_manifest: Optional[str]


class Pulled(Environment):
    """An environment that is installed now."""

    kernel_image: str
    rootfs_image: str
    source: str


class Inspection(Environment):
    """An environment with the result of a full verification."""

    verified: bool
    problems: List[str]
    rootfs_digest: Optional[str]
    kernel_digest: Optional[str]
    kernel_release: Optional[str]
    rootfs_bytes: Optional[int]


class Pruned(TypedDict):
    """Environments that were removed."""

    deleted_environment_dirs: List[str]
    count: int


class Cancelled(TypedDict):
    """A command of a task that was to be ended. ``ended``: it was running."""

    task_id: str
    sequence: int
    ended: bool


class OutputEvent(TypedDict):
    """A piece of output, as the command wrote it."""

    type: Literal["stdout", "stderr"]
    data: bytes


class ExitEvent(TypedDict):
    """The end of the command: the last event."""

    type: Literal["exit"]
    result: ExecResult


StreamEvent = Union[OutputEvent, ExitEvent]
