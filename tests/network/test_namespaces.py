"""Do the test network's nodes behave as machines on a cable, and is nothing left of them?"""

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

from network.namespaces import Network

TESTS = Path(__file__).parents[1]

# Connects to n2 and says what it receives.
CLIENT = """
import socket
with socket.create_connection(("n2", 5000), timeout=10) as connection:
    print("connected", flush=True)
    connection.settimeout(3)
    try:
        print("received", connection.recv(1))
    except TimeoutError:
        print("silence")
"""
SERVER = """
import socket, sys, time
with socket.create_server(("n2", 5000)) as listener:
    print("listens", flush=True)
    connection = listener.accept()[0]
    time.sleep(100)
"""


def python(code: str) -> tuple[str, ...]:
    return (sys.executable, "-S", "-c", code)


def connected(network: Network, log: Path) -> None:
    """n1 has a connection to n2, and writes into `log`."""
    server = network.run("n2", *python(SERVER))
    assert server.stdout is not None
    assert server.stdout.readline() == "listens\n"
    network.run("n1", *python(CLIENT), log=log)
    wait_for(log, "connected")


def wait_for(log: Path, text: str) -> None:
    deadline = time.monotonic() + 30
    while text not in log.read_text():
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.02)


def alive(pid: int) -> bool:
    with suppress(FileNotFoundError, ProcessLookupError):
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    return False


def test_each_node_has_its_name_and_knows_the_others(network: Network) -> None:
    for name, other in (("n1", "n2"), ("n2", "n1")):
        assert network.call(name, "hostname").stdout == f"{name}\n"
        assert network.call(name, "getent", "hosts", other).stdout.split() == [network.addresses[other], other]


def test_a_node_sees_its_own_processes_and_memory_files_only(network: Network) -> None:
    sleeper = network.run("n1", "sleep", "100")
    assert sleeper.command_pid in network.pids("n1", "sleep 100")
    assert network.pids("n2", "sleep 100") == []
    network.call("n1", "touch", "/dev/shm/mine")
    assert network.call("n2", "ls", "/dev/shm").stdout == ""
    assert "sleep" not in network.call("n2", "sh", "-c", "cat /proc/[0-9]*/comm").stdout


def test_signals_and_exit_codes_pass_between_command_and_caller(network: Network) -> None:
    sleeper = network.run("n1", "sh", "-c", "trap 'exit 7' USR1; echo ready; while :; do sleep 0.05; done")
    assert sleeper.stdout is not None
    assert sleeper.stdout.readline() == "ready\n"
    sleeper.send_signal(signal.SIGUSR1)
    assert sleeper.wait(30) == 7
    killed = network.run("n1", "sleep", "100")
    killed.kill()
    assert killed.wait(30) == -signal.SIGKILL


def test_orphans_are_reaped(network: Network) -> None:
    network.call("n1", "sh", "-c", "(sleep 0.05 &)")
    time.sleep(0.2)
    assert "Z (zombie)" not in network.call("n1", "sh", "-c", "cat /proc/[0-9]*/status").stdout


def test_a_cut_cable_loses_packets_until_it_heals(network: Network, tmp_path: Path) -> None:
    reach = python("import socket; socket.create_connection(('n2', 5000), timeout=1)")
    connected(network, tmp_path / "log")
    network.cut("n2")
    assert "TimeoutError" in network.call("n1", *reach, check=False).stderr
    wait_for(tmp_path / "log", "silence")
    network.heal("n2")
    network.call("n1", *reach)


def test_a_killed_node_says_no_goodbye_and_comes_back(network: Network, tmp_path: Path) -> None:
    connected(network, tmp_path / "log")
    before = network.pids("n2")
    network.kill("n2")
    assert not [pid for pid in before if alive(pid)]
    wait_for(tmp_path / "log", "silence")
    network.boot("n2")
    assert network.call("n2", "hostname").stdout == "n2\n"
    connected(network, tmp_path / "log")


def test_a_shaped_link_is_slow_both_ways(network: Network) -> None:
    send = "import socket; c = socket.create_server(('', 5001)).accept()[0]; c.sendall(bytes(3_000_000)); c.recv(1)"
    take = """
import socket, time
for _ in range(500):
    try:
        c = socket.create_connection(("{}", 5001))
        break
    except ConnectionRefusedError:
        time.sleep(0.01)
start = time.monotonic()
left = 3_000_000
while left:
    left -= len(c.recv(65536))
print(time.monotonic() - start)
"""
    network.shape("n2", "20mbit")
    for source, sink in (("n1", "n2"), ("n2", "n1")):
        network.run(source, *python(send))
        assert float(network.call(sink, *python(take.format(source))).stdout) > 0.8  # 24 Mbit, of which 2 in one burst


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGKILL])
def test_nothing_is_left_when_the_holder_dies(network: Network, tmp_path: Path, signum: signal.Signals) -> None:
    """`network` only skips this test where there can be none."""
    code = f"""
import signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # which what a script starts in the background ignores
sys.path.insert(0, {str(TESTS)!r})
from network.namespaces import Network
with Network() as nodes:
    nodes.run("n1", "setsid", "sleep", "100")
    nodes.call("n2", "sh", "-c", "setsid sleep 100 > /dev/null 2>&1 &")
    while not (nodes.pids("n1", "sleep") and nodes.pids("n2", "sleep")):
        time.sleep(0.01)
    print(*(pid for name in ("switch", "n1", "n2") for pid in nodes.pids(name)), flush=True)
    time.sleep(100)
"""
    environment = os.environ | {"TMPDIR": str(tmp_path)}
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment
    ) as holder:
        assert holder.stdout is not None
        pids = [int(pid) for pid in holder.stdout.readline().split()]
        assert len(pids) >= 5
        holder.send_signal(signum)
        holder.wait(30)
    deadline = time.monotonic() + 30
    while left := [pid for pid in pids if alive(pid)]:
        assert time.monotonic() < deadline, left
        time.sleep(0.02)
    assert signum == signal.SIGKILL or not list(tmp_path.iterdir())
