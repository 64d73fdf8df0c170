"""Machines that watch each other: one that is cut off, fails or is killed ends the others, with its name."""

import json
import shutil
import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pytest
from helpers.command_line import ROOT, TOY, run_environment

MACHINE = """
import sys
from mindformers_ext.cluster import watch
from mindformers_ext.cluster.nodes import Place
from mindformers_ext.errors import exit_code_of
watch.BEAT_SECONDS, watch.SILENCE_SECONDS, watch.MOURNING_SECONDS = 0.1, 1.5, 0.5
machines, rank, port = map(int, sys.argv[1:4])
place = Place("test", machines, 1, "127.0.0.1", 1, rank)
sys.exit(exit_code_of(lambda: watch.run(sys.argv[4:], place, port)))
"""
WORKS = [sys.executable, "-c", "import subprocess; subprocess.run(['sleep', '60'])"]  # with a child, as msrun


def free_port() -> int:
    with socket.socket() as tried:
        tried.bind(("127.0.0.1", 0))
        return tried.getsockname()[1]


def start(machines: int, rank: int, port: int, work: list[str]) -> subprocess.Popen:
    command = [sys.executable, "-c", MACHINE, str(machines), str(rank), str(port), *work]
    return subprocess.Popen(command, env=run_environment(), stderr=subprocess.PIPE, text=True)


def wait_for_children(processes: list[subprocess.Popen]) -> list[psutil.Process]:
    """Of each machine: its work, and the work's child."""
    end = time.monotonic() + 30
    while time.monotonic() < end:
        below = [psutil.Process(process.pid).children(recursive=True) for process in processes]
        if all(len(found) == 2 for found in below):
            return [child for found in below for child in found]
        time.sleep(0.05)
    raise AssertionError("no machine works")


class Cable:
    """What lies between machine 0's port and the others: cut, nothing goes through, and nobody is told."""

    def __init__(self, port: int):
        self.port, self.cut, self.ends = port, threading.Event(), []
        self.server = socket.create_server(("127.0.0.1", 0))
        self.own_port = self.server.getsockname()[1]
        threading.Thread(target=self.accept, daemon=True).start()

    def accept(self) -> None:
        while True:
            near, _ = self.server.accept()
            far = socket.create_connection(("127.0.0.1", self.port))
            self.ends += [near, far]  # which stay open
            for source, sink in ((near, far), (far, near)):
                threading.Thread(target=self.carry, args=(source, sink), daemon=True).start()

    def carry(self, source: socket.socket, sink: socket.socket) -> None:
        with suppress(OSError):
            while (data := source.recv(4096)) and not self.cut.is_set():
                sink.sendall(data)


def test_a_cut_cable_ends_both_sides():
    port = free_port()
    first = start(2, 0, port, WORKS)
    time.sleep(0.5)
    cable = Cable(port)
    second = start(2, 1, cable.own_port, WORKS)
    children = wait_for_children([first, second])
    time.sleep(1)
    assert first.poll() is None and second.poll() is None
    cable.cut.set()
    here, there = (process.communicate(timeout=30)[1] for process in (first, second))
    assert (first.returncode, second.returncode) == (1, 1)
    host = socket.gethostname()
    assert f"machine 1 ({host}, 127.0.0.1) is not heard of for 1.5 s, so its cable or its power is out" in here
    assert "machine 0 (127.0.0.1) is not heard of for 1.5 s" in there and f"({host}) are ended" in there
    assert not any(child.is_running() and child.status() != psutil.STATUS_ZOMBIE for child in children)


@pytest.mark.parametrize("fails", [0, 1])
def test_ranks_that_fail_end_all_machines(fails):
    port = free_port()
    work = [sys.executable, "-c", "import time; time.sleep(1.5); raise SystemExit(7)"]
    machines = [start(3, rank, port, work if rank == fails else WORKS) for rank in range(3)]
    errors = [process.communicate(timeout=30)[1] for process in machines]
    assert [process.returncode for process in machines] == [7 if rank == fails else 1 for rank in range(3)]
    for rank in {0, 1, 2} - {fails}:
        assert f"machine {fails} (" in errors[rank] and "its ranks failed with exit code 7" in errors[rank], errors


def test_a_killed_launcher_ends_the_others():
    port = free_port()
    machines = [start(3, rank, port, WORKS) for rank in range(3)]
    children = wait_for_children(machines)
    time.sleep(0.5)
    machines[2].kill()
    errors = [process.communicate(timeout=30)[1] for process in machines[:2]]
    assert all("machine 2 (" in error and "is not heard of: its connection broke" in error for error in errors), errors
    for child in children:
        if child.is_running():
            child.kill()


def test_machines_that_end_one_after_another_are_no_failure():
    port = free_port()
    sleeps = [[sys.executable, "-c", f"import time; time.sleep({seconds})"] for seconds in (1.5, 0.5, 2.5)]
    machines = [start(3, rank, port, work) for rank, work in enumerate(sleeps)]
    errors = [process.communicate(timeout=30)[1] for process in machines]
    assert [process.returncode for process in machines] == [0, 0, 0], errors


def test_ranks_that_end_before_the_line_stands_are_told_as_done():
    """Machine 0 knows the other one's name and has not answered yet when its ranks end: no broken connection."""
    with socket.create_server(("127.0.0.1", 0)) as machine_0:
        machine_1 = start(2, 1, machine_0.getsockname()[1], ["true"])
        connection, _ = machine_0.accept()
        with connection, connection.makefile("rwb") as line:
            assert json.loads(line.readline())[0] == 1
            time.sleep(0.4)  # its ranks end meanwhile, which it sees after 0.2 s
            line.write(b'["alive", ""]\n')
            line.flush()
            said = [json.loads(text)[0] for text in line]
    assert said[-1] == "done" and machine_1.wait(10) == 0


def test_a_proxy_that_answers_before_machine_0_does_is_no_lost_machine():
    port = free_port()
    with socket.create_server(("127.0.0.1", port)) as proxy:
        second = start(2, 1, port, WORKS)
        for _ in range(2):
            proxy.accept()[0].close()
    first = start(2, 0, port, [sys.executable, "-c", "import time; time.sleep(1.5); raise SystemExit(7)"])
    assert "machine 0 (127.0.0.1): its ranks failed with exit code 7" in second.communicate(timeout=30)[1]
    first.communicate(timeout=30)


def test_strangers_are_no_machines():
    port = free_port()
    first = start(2, 0, port, WORKS)
    wait_for_children([first])
    for hello in (b"GET / HTTP/1.1\r\n\r\n", b"[7, 1]\n", b"[0, 1]\n", b"x" * 5000, b"{}\n", b""):
        with socket.create_connection(("127.0.0.1", port)) as stranger:
            stranger.sendall(hello)
    time.sleep(0.5)
    assert first.poll() is None
    first.terminate()
    first.wait()


@contextmanager
def two_hosts():
    """Two network namespaces on one cable; ends with everything that runs in them."""
    names = [f"ms{time.monotonic_ns() % 10**6}{side}" for side in "ab"]
    ends = [f"v{name[2:]}" for name in names]

    def ip(*words: str) -> None:
        subprocess.run(["ip", *words], check=True, capture_output=True)

    try:
        for name in names:
            ip("netns", "add", name)
        ip("link", "add", ends[0], "type", "veth", "peer", "name", ends[1])
        for number, (name, cable) in enumerate(zip(names, ends, strict=True)):
            ip("link", "set", cable, "netns", name)
            ip("-n", name, "addr", "add", f"10.77.0.{number + 1}/24", "dev", cable)
            ip("-n", name, "link", "set", cable, "up")
            ip("-n", name, "link", "set", "lo", "up")
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("this user cannot make network namespaces")
    try:
        yield names, lambda: ip("-n", names[1], "link", "set", ends[1], "down")
    finally:
        for name in names:
            pids = subprocess.run(["ip", "netns", "pids", name], capture_output=True, text=True).stdout.split()
            for pid in map(int, pids):
                if psutil.pid_exists(pid):
                    psutil.Process(pid).kill()
            ip("netns", "delete", name)


def on_host(name: str, rank: int, folder, *more: str) -> subprocess.Popen:
    """The launcher on one of the two hosts, with one rank."""
    command = f"run_mindformer.py --config {TOY}/train_toy.yaml --register_path {TOY} --output_dir out "
    command += " ".join(["--runner_config.batch_size", "2", *more])
    place = ["2", "1", "10.77.0.1", "18349", str(rank), f"log{rank}", "True", "120"]
    launcher = ["ip", "netns", "exec", name, "bash", str(ROOT / "scripts/msrun_launcher.sh"), command, *place]
    # Both see the folder, as machines see a shared disk.
    return subprocess.Popen(
        launcher, cwd=folder, env=run_environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def losses(folder: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_two_hosts_train_together_and_a_cut_cable_ends_them(toy_folder, trained):
    """Real machines but for the processor: namespaces with a cable, MindSpore's own collectives over it."""
    with two_hosts() as (names, cut):
        both = [on_host(name, rank, toy_folder) for rank, name in enumerate(names)]
        said = [process.communicate(timeout=200) for process in both]
        assert [process.returncode for process in both] == [0, 0], said
        together, alone = losses(toy_folder / "out"), losses(trained)
        assert len(together) == 8 and together == pytest.approx(alone[:8], rel=2e-6)

        shutil.rmtree(toy_folder / "out")
        both = [on_host(name, rank, toy_folder, "--runner_config.epochs", "100000") for rank, name in enumerate(names)]
        end = time.monotonic() + 120
        metrics = toy_folder / "out/metrics.jsonl"
        while not (metrics.exists() and metrics.read_text().count("\n") > 20) and time.monotonic() < end:
            assert [process.poll() for process in both] == [None, None]
            time.sleep(0.2)
        cut()
        start_of_end = time.monotonic()
        said = [process.communicate(timeout=90)[1] for process in both]
        assert time.monotonic() - start_of_end < 60
        assert [process.returncode for process in both] == [1, 1]
        assert f"machine 1 ({socket.gethostname()}, 10.77.0.2) is not heard of for 25 s" in said[0]
        assert "machine 0 (10.77.0.1) is not heard of for 25 s" in said[1]
        assert all(not subprocess.check_output(["ip", "netns", "pids", name]).split() for name in names)
