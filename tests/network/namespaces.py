"""Several machines on one: each node has its own network, host name, mounts and process ids, and all hang on one switch.

Nothing has a name outside (no `ip netns`, no device on this machine), so any number of networks live side by side with the
same addresses. A node's first process reads a pipe that the test holds: with the pipe's end, for whatever reason, the kernel
kills all that runs in the node and takes its devices and mounts away.
"""

import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from types import TracebackType
from typing import Self

_PROGRAMS = ("ip", "tc", "unshare", "nsenter", "mount", "hostname")
_NEW_NAMESPACES = ("--net", "--uts", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc")
_SWITCH = "switch"
# As process 1 it would have to reap every orphan: with SIGCHLD ignored the kernel does. cat ends when the pipe does.
_FIRST_PROCESS = """
hostname "$1" && mount --bind "$2" /etc/hosts && mount -t tmpfs tmpfs /dev/shm && echo up && exec env --ignore-signal=CHLD cat
"""


def why_not() -> str:
    """Why there can be no namespaces here, in a line; empty where they can be."""
    if os.geteuid() != 0:
        return "namespaces need root"
    missing = [program for program in _PROGRAMS if shutil.which(program) is None]
    if missing:
        return f"not installed: {', '.join(missing)}"
    tried = subprocess.run(["unshare", *_NEW_NAMESPACES, "true"], capture_output=True, text=True, check=False)
    return "" if tried.returncode == 0 else f"namespaces are not allowed here: {tried.stderr.strip()}"


class NodeProcess(subprocess.Popen[str]):
    """A command in a node. What is started here is nsenter, which ends as the command does; signals go to the command."""

    @property
    def command_pid(self) -> int:
        """The command's process id on this machine; inside the node it has another."""
        for _ in range(1000):
            children = _children(self.pid)
            if children or self.poll() is not None:
                break
            time.sleep(0.005)
        return children[0] if children else self.pid

    def send_signal(self, sig: int) -> None:
        pid = self.command_pid
        if self.poll() is None:
            with suppress(ProcessLookupError):
                os.kill(pid, sig)


class Network:
    """Nodes by name on one switch, 10.77.0.11 and on, names in everybody's /etc/hosts; a context manager that leaves nothing.

    Files are shared by all nodes. /dev/shm is each node's own, and so are process ids: a node sees its own processes only.
    """

    def __init__(self, names: Sequence[str] = ("n1", "n2")) -> None:
        self.names = tuple(names)
        self.addresses = {name: f"10.77.0.{11 + k}" for k, name in enumerate(self.names)}
        self._first: dict[str, subprocess.Popen[str]] = {}
        self._started: list[NodeProcess] = []

    def __enter__(self) -> Self:
        self._folder = tempfile.TemporaryDirectory(prefix="nodes-")
        self._hosts = Path(self._folder.name, "hosts")
        try:
            lines = ["127.0.0.1 localhost", *(f"{address} {name}" for name, address in self.addresses.items())]
            self._hosts.write_text("\n".join(lines) + "\n")
            self._begin(_SWITCH)
            self._ip(_SWITCH, "link add br0 type bridge", "link set br0 up")
            for name in self.names:
                self.boot(name)
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Everything that runs in a node is killed, every device and file removed."""
        for name in list(self._first):
            self._end(name)
        for process in self._started:
            process.wait()
            for stream in (process.stdout, process.stderr):
                if stream:
                    stream.close()
        self._started.clear()
        self._folder.cleanup()

    def run(
        self,
        node: str,
        *command: str | Path,
        env: Mapping[str, str] | None = None,
        cwd: Path | None = None,
        log: Path | None = None,
    ) -> NodeProcess:
        """Start a command in a node, in a session of its own.

        What it prints goes to the end of `log`, or into two pipes, which hold 64 KiB if nobody reads them.
        `env` is the whole environment; None: this process's.
        """
        inside = ["nsenter", f"--target={self._pid(node)}", "--net", "--uts", "--mount", "--pid"]
        if cwd is not None:
            inside.append(f"--wd={cwd}")
        with ExitStack() as opened:
            output = subprocess.PIPE if log is None else opened.enter_context(log.open("a"))
            errors = subprocess.PIPE if log is None else subprocess.STDOUT
            process = NodeProcess(
                [*inside, *command],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=errors,
                text=True,
                env=env,
                start_new_session=True,
            )
        self._started.append(process)
        return process

    def call(
        self,
        node: str,
        *command: str | Path,
        env: Mapping[str, str] | None = None,
        cwd: Path | None = None,
        timeout: float = 60.0,
        check: bool = True,
    ) -> subprocess.CompletedProcess[str]:
        """A command in a node from start to end (seconds: `timeout`); with `check` it must exit with 0."""
        process = self.run(node, *command, env=env, cwd=cwd)
        try:
            output, errors = process.communicate(timeout=timeout)
        except BaseException:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            raise
        self._started.remove(process)
        assert process.returncode == 0 or not check, f"{node}: {command}: exit code {process.returncode}\n{output}{errors}"
        return subprocess.CompletedProcess(command, process.returncode, output, errors)

    def pids(self, node: str, containing: str = "") -> list[int]:
        """Ids, on this machine, of a node's processes whose command line contains a text."""
        home = Path(f"/proc/{self._pid(node)}/ns/pid").readlink()
        found = []
        for entry in Path("/proc").iterdir():
            if not entry.name.isdigit():
                continue
            with suppress(FileNotFoundError, ProcessLookupError, PermissionError):
                if (entry / "ns/pid").readlink() == home:
                    line = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                    if line and containing in line:
                        found.append(int(entry.name))
        return sorted(found)

    def cut(self, node: str) -> None:
        """Pull the node's cable: nobody is told, packets are lost."""
        self._ip(_SWITCH, f"link set {node} down")

    def heal(self, node: str) -> None:
        """Plug it in again."""
        self._ip(_SWITCH, f"link set {node} up")

    def shape(self, node: str, rate: str) -> None:
        """Limit the node's link in both directions, for instance to 200mbit."""
        limit = f"root tbf rate {rate} burst 256kb latency 50ms"
        self._inside(_SWITCH, "tc", "qdisc", "replace", "dev", node, *limit.split())
        self._inside(node, "tc", "qdisc", "replace", "dev", "eth0", *limit.split())

    def kill(self, node: str) -> None:
        """Power failure: all its processes are killed at once, and no connection is closed in an orderly way."""
        self.cut(node)
        self._end(node)
        # The device goes with the node, but some time later; it may have gone already.
        self._inside(_SWITCH, "ip", "link", "del", node, check=False)

    def boot(self, node: str) -> None:
        """A node of this name and address, with no process yet."""
        self._begin(node)
        address = self.addresses[node]
        # The hardware address stays the same over a reboot, or the others' neighbour tables would be wrong for seconds.
        hardware = f"02:00:00:00:00:{int(address.rpartition('.')[2]):02x}"
        self._ip(
            _SWITCH,
            f"link add {node} type veth peer name eth0 address {hardware} netns {self._pid(node)}",
            f"link set {node} master br0 up",
        )
        self._ip(node, "link set lo up", f"addr add {address}/24 dev eth0", "link set eth0 up")

    def _begin(self, name: str) -> None:
        assert name not in self._first, f"{name} is up"
        command = ["unshare", *_NEW_NAMESPACES, "sh", "-c", _FIRST_PROCESS, "sh", name, str(self._hosts)]
        pipe = subprocess.PIPE
        first = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True, start_new_session=True)
        self._first[name] = first
        assert first.stdout is not None
        assert first.stderr is not None
        if first.stdout.readline() != "up\n":
            raise AssertionError(f"{name}: no namespaces: {first.stderr.read()}")

    def _end(self, name: str) -> None:
        """Returns when all is dead: the kernel lets a namespace's first process end as the last."""
        first = self._first.pop(name)
        assert first.stdin is not None
        first.stdin.close()  # enough where the first process is still about to start
        for pid in _children(first.pid):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        first.wait()
        for stream in (first.stdout, first.stderr):
            assert stream is not None
            stream.close()

    def _pid(self, name: str) -> int:
        assert name in self._first, f"{name} is not up"
        return _children(self._first[name].pid)[0]

    def _ip(self, name: str, *lines: str) -> None:
        self._inside(name, "ip", "-batch", "-", text="\n".join(lines) + "\n")

    def _inside(self, name: str, *command: str, text: str = "", check: bool = True) -> None:
        """A command of this machine with the node's network alone, so that process ids mean what they mean here."""
        inside = ["nsenter", f"--target={self._pid(name)}", "--net", *command]
        done = subprocess.run(inside, input=text, capture_output=True, text=True, check=False)
        assert done.returncode == 0 or not check, f"{name}: {command} {text}: {done.stderr}"


def _children(pid: int) -> list[int]:
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except (FileNotFoundError, ProcessLookupError):
        return []
