"""The client whose methods block. Written by make_synchronous.py."""

from __future__ import annotations

from types import TracebackType
from typing import Iterator, List, Mapping, Optional, Sequence, Type, Union, cast

from ._core import Blocking, OnOutput
from ._requests import execution, listed, machine, networking, request
from .types import (
    Cancelled,
    Command,
    Deleted,
    DeletedTask,
    Environment,
    ExecResult,
    Inspection,
    NetworkInfo,
    NetworkLog,
    NetworkPolicyText,
    Pruned,
    Pulled,
    Reaped,
    Secret,
    StreamEvent,
    TaskList,
    TaskLogs,
    TaskNetwork,
    TaskPorts,
    TaskRecord,
    VmRecord,
)


class Pyro(Blocking):
    """Machines, tasks, commands and environments of one state directory.

    Machines that are made through a client end with it; tasks live on. All methods may be called at the same time, from
    any thread. After a fork a client is of no use to the child, which makes its own.

    Args:
        backend_name: the VMM, ``firecracker`` or ``qemu``; by default the strongest that works.
        base_dir: registry, machines and tasks; by default ``$PYRO_STATE_DIR``, else ``pyro`` in the user's state directory.
        cache_dir: environments; by default ``$PYRO_ENVIRONMENT_CACHE_DIR``, else below the user's cache directory.
        max_active_vms: live machines and tasks at the most; ``$PYRO_MAX_ACTIVE_VMS`` sets another default than 4.

    Raises:
        PyroError: with ``code`` and ``hint``. Errors of bad values and missing ids are ValueErrors too, all others
            RuntimeErrors.
    """

    def __enter__(self) -> Pyro:
        return self

    def __exit__(
        self,
        kind: Optional[Type[BaseException]],
        error: Optional[BaseException],
        traceback: Optional[TracebackType],
    ) -> None:
        self.close()

    def close(self) -> None:
        """Ends all machines that were made through this client. Tasks live on. A second time does nothing."""
        self._close()

    def list_environments(self) -> List[Environment]:
        """All environments, each with whether it is installed."""
        return cast(List[Environment], self._call(request("list_environments")))

    def pull_environment(self, environment: str) -> Pulled:
        """Builds an environment, or verifies every byte of it where it is installed.

        Raises:
            UnknownEnvironmentError: there is none of this name.
            EnvironmentFailedError: it could not be built.
        """
        return cast(Pulled, self._call(request("pull_environment", environment=environment)))

    def inspect_environment(self, environment: str) -> Inspection:
        """An environment with the result of a full verification.

        Raises:
            UnknownEnvironmentError: there is none of this name.
        """
        return cast(Inspection, self._call(request("inspect_environment", environment=environment)))

    def prune_environments(self) -> Pruned:
        """Removes all installed environments that are not in use."""
        return cast(Pruned, self._call(request("prune_environments")))

    def create_vm(
        self,
        *,
        environment: str,
        vcpu_count: int = 1,
        mem_mib: int = 1024,
        disk_mib: int = 8192,
        ttl_seconds: int = 600,
        network: bool = False,
        allow: Sequence[str] = (),
        deny: Sequence[str] = (),
        network_policy: Union[str, NetworkPolicyText, None] = None,
        secrets: Optional[Mapping[str, Secret]] = None,
        publish: Sequence[str] = (),
        allow_host_compat: bool = False,
        require_isolation: Optional[str] = None,
        cold: bool = False,
    ) -> VmRecord:
        """Makes a machine; it is not started. It ends with this client, at the latest after its time.

        Args:
            environment: its name, such as ``debian:12``.
            vcpu_count: virtual processors, 1 to 8.
            mem_mib: memory in MiB, 256 to 32768.
            disk_mib: size of the writable disk in MiB; only what is written takes room.
            ttl_seconds: its life in seconds, 60 to 3600.
            network: whether the guest may reach the public internet; never this host, its networks, or cloud metadata.
            allow: hosts that it may reach: ``NAME[:PORTS]``, ``*.NAME[:PORTS]``, ``ADDRESS[/LENGTH][:PORTS]`` or
                ``host.pyro.internal:PORT``.
            deny: hosts that it may not reach, also where another rule allows them.
            network_policy: further rules: a file, the name of one in ``~/.config/pyro/policies``, or what one would hold.
            secrets: what the guest uses and never sees, by variable: ``{"TOKEN": {"value_from": "env:TOKEN", "hosts":
                ["api.example.com"]}}``. The guest's variable holds a placeholder, which the host replaces in the headers of
                https requests to these hosts.
            publish: ports of this host that lead to servers in the guest: ``[IP:]HOSTPORT:GUESTPORT``; ``127.0.0.1`` unless told,
                host port 0 takes a free one, which the record tells.
            allow_host_compat: whether commands may run on this host, without isolation, where no guest can be had.
            require_isolation: refuse less than ``firecracker-kvm``, ``qemu-kvm`` or ``qemu-tcg``.
            cold: boot it, also where a saved machine could be restored.

        Raises:
            InvalidValueError: a value is outside its limits.
            UnknownEnvironmentError: there is no such environment.
            CapReachedError: as many machines as allowed are live.
            IsolationUnavailableError: this host cannot isolate as strongly as was required.
        """
        vm = machine(
            environment, vcpu_count, mem_mib, disk_mib, ttl_seconds, networking(network, allow, deny, network_policy, secrets),
            publish, allow_host_compat,
            require_isolation, cold,
        )
        return cast(VmRecord, self._call(request("create_vm", machine=vm)))

    def start_vm(self, vm_id: str) -> VmRecord:
        """Starts a machine that is created or stopped.

        Raises:
            NotFoundError: there is none of this id.
            WrongStateError: it is started already.
            GuestUnavailableError: no guest can be had.
        """
        return cast(VmRecord, self._call(request("start_vm", vm_id=vm_id)))

    def stop_vm(self, vm_id: str) -> VmRecord:
        """Powers a machine off, from any state; its disk is kept.

        Raises:
            NotFoundError: there is none of this id.
        """
        return cast(VmRecord, self._call(request("stop_vm", vm_id=vm_id)))

    def delete_vm(self, vm_id: str) -> Deleted:
        """Ends a machine in any state and removes every trace of it.

        Raises:
            NotFoundError: there is none of this id.
        """
        return cast(Deleted, self._call(request("delete_vm", vm_id=vm_id)))

    def status_vm(self, vm_id: str) -> VmRecord:
        """A machine's record.

        Raises:
            NotFoundError: there is none of this id.
            ExpiredError: its time was up; said once.
        """
        return cast(VmRecord, self._call(request("status_vm", vm_id=vm_id)))

    def network_info_vm(self, vm_id: str) -> NetworkInfo:
        """A machine's network, or why it has none.

        Raises:
            NotFoundError: there is none of this id.
        """
        return cast(NetworkInfo, self._call(request("network_info_vm", vm_id=vm_id)))

    def exec_vm(
        self,
        vm_id: str,
        *,
        command: Command,
        timeout_seconds: float = 30,
        stdin: Union[str, bytes, None] = None,
        cwd: str = "/workspace",
        env: Optional[Mapping[str, str]] = None,
        user: Union[str, int, None] = None,
        stream: Optional[OnOutput] = None,
    ) -> ExecResult:
        """Runs one command in a started machine, then deletes the machine, whatever came of it.

        Args:
            command: a string for the guest's ``/bin/sh -lc``, or a list of words that is run as it is.
            timeout_seconds: seconds until the command is ended; more than 0.
            stdin: what the command reads.
            cwd: where it starts, absolute.
            env: variables of the command.
            user: who runs it, a name or a number of the guest's, or ``"USER:GROUP"``; root unless given.
            stream: is called with each piece of output as it comes.

        Returns:
            The result, also of a command that failed: ``exit_code``, ``stdout``, ``stderr`` (of more than 1 MiB the head
            and the tail), ``fault``, ``output_open`` (whether processes that it has left behind may write more),
            ``timings``, ``cleanup``.

        Raises:
            InvalidValueError: a value is outside its limits.
            NotFoundError: there is none of this id.
            WrongStateError: the machine is not started.
            OutcomeUnknownError: the connection broke after the command was sent.
        """
        command_of = execution(command, timeout_seconds, cwd, env, user)
        return cast(ExecResult, self._call(request("exec_vm", vm_id=vm_id, exec=command_of), stdin, stream))

    def run_in_vm(
        self,
        *,
        environment: str,
        command: Command,
        vcpu_count: int = 1,
        mem_mib: int = 1024,
        disk_mib: int = 8192,
        ttl_seconds: int = 600,
        network: bool = False,
        allow: Sequence[str] = (),
        deny: Sequence[str] = (),
        network_policy: Union[str, NetworkPolicyText, None] = None,
        secrets: Optional[Mapping[str, Secret]] = None,
        publish: Sequence[str] = (),
        allow_host_compat: bool = False,
        require_isolation: Optional[str] = None,
        cold: bool = False,
        timeout_seconds: float = 30,
        stdin: Union[str, bytes, None] = None,
        cwd: str = "/workspace",
        env: Optional[Mapping[str, str]] = None,
        user: Union[str, int, None] = None,
        stream: Optional[OnOutput] = None,
    ) -> ExecResult:
        """Runs one command in a fresh machine and removes every trace of the machine, however it ends.

        Parameters, results and errors are those of :meth:`create_vm` and :meth:`exec_vm`.
        """
        vm = machine(
            environment, vcpu_count, mem_mib, disk_mib, ttl_seconds, networking(network, allow, deny, network_policy, secrets),
            publish, allow_host_compat,
            require_isolation, cold,
        )
        command_of = execution(command, timeout_seconds, cwd, env, user)
        return cast(ExecResult, self._call(request("run_in_vm", machine=vm, exec=command_of), stdin, stream))

    def reap_expired(self) -> Reaped:
        """Removes what dead owners have left, and tells what was removed since this client was made."""
        return cast(Reaped, self._call(request("reap_expired")))

    def create_task(
        self,
        *,
        environment: str,
        vcpu_count: int = 1,
        mem_mib: int = 1024,
        disk_mib: int = 8192,
        ttl_seconds: int = 600,
        network: bool = False,
        allow: Sequence[str] = (),
        deny: Sequence[str] = (),
        network_policy: Union[str, NetworkPolicyText, None] = None,
        secrets: Optional[Mapping[str, Secret]] = None,
        publish: Sequence[str] = (),
        allow_host_compat: bool = False,
        require_isolation: Optional[str] = None,
        cold: bool = False,
    ) -> TaskRecord:
        """Makes a task: a machine that is started, has ``/workspace``, and lives on after this process.

        Parameters and errors are those of :meth:`create_vm`; GuestUnavailableError when its guest does not start.
        """
        vm = machine(
            environment, vcpu_count, mem_mib, disk_mib, ttl_seconds, networking(network, allow, deny, network_policy, secrets),
            publish, allow_host_compat,
            require_isolation, cold,
        )
        return cast(TaskRecord, self._call(request("create_task", machine=vm)))

    def exec_task(
        self,
        task_id: str,
        *,
        command: Command,
        timeout_seconds: float = 30,
        stdin: Union[str, bytes, None] = None,
        cwd: str = "/workspace",
        env: Optional[Mapping[str, str]] = None,
        user: Union[str, int, None] = None,
        stream: Optional[OnOutput] = None,
    ) -> ExecResult:
        """Runs one command in a task. Its output is on record as it comes, whatever becomes of this process.

        Parameters and errors are those of :meth:`exec_vm`; the result has ``sequence``, the command's number in the
        task's journal. A call that a signal interrupts ends its command.
        """
        command_of = execution(command, timeout_seconds, cwd, env, user)
        return cast(
            ExecResult, self._call(request("exec_task", task_id=task_id, exec=command_of), stdin, stream)
        )

    def stream_task(
        self,
        task_id: str,
        *,
        command: Command,
        timeout_seconds: float = 30,
        stdin: Union[str, bytes, None] = None,
        cwd: str = "/workspace",
        env: Optional[Mapping[str, str]] = None,
        user: Union[str, int, None] = None,
    ) -> Iterator[StreamEvent]:
        """Runs one command in a task and gives its output as it comes, then its end.

        Events are ``{"type": "stdout" or "stderr", "data": bytes}`` and, as the last, ``{"type": "exit", "result": …}``
        with what :meth:`exec_task` returns. A reader that stops early ends the command.
        """
        command_of = execution(command, timeout_seconds, cwd, env, user)
        for event in self._stream(request("exec_task", task_id=task_id, exec=command_of), stdin):
            yield event

    def cancel_task(self, task_id: str, *, sequence: int) -> Cancelled:
        """Ends one command of a task; it has ended when this returns.

        ``ended`` says whether it was running; it is false when the command had ended before.

        Raises:
            NotFoundError: there is no such task, or it has run no such command.
        """
        return cast(Cancelled, self._call(request("cancel_task", task_id=task_id, sequence=sequence)))

    def status_task(self, task_id: str) -> TaskRecord:
        """A task's record.

        Raises:
            NotFoundError: there is none of this id.
            ExpiredError: its time was up; said once.
        """
        return cast(TaskRecord, self._call(request("status_task", task_id=task_id)))

    def logs_task(
        self,
        task_id: str,
        *,
        since_sequence: int = 1,
        limit: Optional[int] = None,
        max_bytes: Optional[int] = None,
    ) -> TaskLogs:
        """Commands of a task with their output, in the order of their numbers; one that runs has what came so far.

        Args:
            since_sequence: the first number wanted.
            limit: the newest so many of them.
            max_bytes: output of all together at the most.
        """
        return cast(
            TaskLogs,
            self._call(
                request(
                    "logs_task", task_id=task_id, since_sequence=since_sequence, limit=limit, max_bytes=max_bytes
                )
            ),
        )

    def list_tasks(self) -> TaskList:
        """All tasks of this state directory, newest activity first."""
        return cast(TaskList, self._call(request("list_tasks")))

    def start_task(self, task_id: str) -> TaskRecord:
        """Boots the guest of a stopped task from its disk.

        Raises:
            NotFoundError: there is none of this id.
            WrongStateError: it is started already.
        """
        return cast(TaskRecord, self._call(request("start_task", task_id=task_id)))

    def stop_task(self, task_id: str) -> TaskRecord:
        """Powers the guest of a task off; its disk and its journal are kept.

        Raises:
            NotFoundError: there is none of this id.
        """
        return cast(TaskRecord, self._call(request("stop_task", task_id=task_id)))

    def task_network(self, task_id: str) -> TaskNetwork:
        """What the guest of a task may reach, and counts of what it did.

        Raises:
            NotFoundError: there is no such task.
        """
        return cast(TaskNetwork, self._call(request("task_network", task_id=task_id)))

    def set_task_network(
        self,
        task_id: str,
        *,
        allow: Sequence[str] = (),
        deny: Sequence[str] = (),
        revoke: Sequence[str] = (),
        open: Optional[bool] = None,
    ) -> TaskNetwork:
        """Changes what the guest of a task may reach, at once and for its later starts.

        Args:
            allow: rules to add to those that allow.
            deny: rules to add to those that deny.
            revoke: rules to remove; open connections that no other rule allows are reset.
            open: allow the public internet, or allow it no more; by default it stays as it is.

        Raises:
            InvalidValueError: a rule cannot be understood, or one to revoke is not there.
            NotFoundError: there is no such task.
            WrongStateError: the task was made without a network.
        """
        change = {"allow": list(allow), "deny": list(deny), "revoke": list(revoke), "open": open}
        return cast(TaskNetwork, self._call(request("set_task_network", task_id=task_id, change=change)))

    def task_ports(self, task_id: str) -> TaskPorts:
        """Returns the published ports of a task.

        Raises:
            NotFoundError: there is none of this id.
        """
        return cast(TaskPorts, self._call(request("change_task_ports", task_id=task_id, change={})))

    def set_task_ports(
        self, task_id: str, *, add: Sequence[str] = (), remove: Sequence[str] = ()
    ) -> TaskPorts:
        """Publishes ports of a task's guest, or publishes them no more.

        Args:
            task_id: the task.
            add: ports to publish, ``[IP:]HOSTPORT:GUESTPORT``.
            remove: ports to publish no more, ``[IP:]HOSTPORT[:GUESTPORT]``. They are removed before others are added.

        Raises:
            NotFoundError: there is none of this id.
            InvalidValueError: one is no port, or is not published.
            HostResourcesError: a port is in use.
        """
        change = {"add": listed("add", add), "remove": listed("remove", remove)}
        return cast(TaskPorts, self._call(request("change_task_ports", task_id=task_id, change=change)))

    def network_log(self, task_id: str, *, offset: int = 0) -> NetworkLog:
        """What the guest of a task did on its network, from this offset on; ``next_offset`` is where to read on.

        Raises:
            NotFoundError: there is no such task.
        """
        return cast(NetworkLog, self._call(request("network_log", task_id=task_id, offset=offset)))

    def delete_task(self, task_id: str, *, force: bool = False) -> DeletedTask:
        """Ends a task and removes every trace of it. Running commands are ended first.

        With ``force``, a supervisor that does not obey within 3 seconds is killed.

        Raises:
            NotFoundError: there is none of this id.
            HostError: its supervisor does not answer, and ``force`` is false.
        """
        return cast(DeletedTask, self._call(request("delete_task", task_id=task_id, force=force)))
