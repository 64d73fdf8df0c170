"""What the ranks of a job say, and leave behind, when something goes wrong."""

import os
import re
import resource
import signal
import socket
import time

import numpy as np
import pytest
from collectives.rank_processes import results, run_ranks

from mindformers_ext.collectives import collectives

ONES = np.ones(1000, np.float32)


def shared_memory_files() -> set[str]:
    return set(os.listdir("/dev/shm"))


def test_killed_worker_is_named_by_all_others():
    before = shared_memory_files()

    def body(rank, size):
        collectives.all_reduce(ONES, range(size))
        if rank == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        collectives.all_reduce(ONES, range(size))

    outcome = run_ranks(4, body)
    assert outcome.pop(2) == ("died", -signal.SIGKILL)
    for rank, (kind, sentence) in outcome.items():
        assert kind == "error"
        assert sentence.startswith(f"rank {rank}: ")
        assert "rank 2 (process" in sentence and "has died" in sentence
        assert "AllReduce of 1000 float32 (operation 2 of group [0, 1, 2, 3])" in sentence
    assert shared_memory_files() == before


def test_raising_worker_stops_the_others_with_its_message():
    def body(rank, size):
        if rank == 1:
            raise ValueError("the batch is empty")
        collectives.all_reduce(ONES, range(size))

    outcome = run_ranks(3, body)
    for rank in (0, 2):
        assert outcome[rank][0] == "error"
        assert "because rank 1: ValueError: the batch is empty" in outcome[rank][1]


def test_worker_that_ends_early_is_not_waited_for():
    outcome = run_ranks(2, lambda rank, size: rank == 0 and collectives.receive(ONES, 1, tag=5) is None)
    assert "Receive of 1000 float32 from rank 1 (tag 5): rank 1 (process" in outcome[0][1]
    assert "has already ended" in outcome[0][1]


def test_stuck_worker_is_reported_after_the_limit():
    def body(rank, size):
        if rank == 1:
            time.sleep(1.5)
        collectives.barrier(range(size))

    outcome = run_ranks(2, body, wait_seconds=0.5)
    assert outcome[0][0] == "error"
    assert "waited 0 s in Barrier (operation 1 of group [0, 1]) for rank 1" in outcome[0][1]
    assert "last in: no collective yet" in outcome[0][1]


@pytest.mark.parametrize("missing", [0, 2])
def test_missing_peer_is_named(missing):
    outcome = run_ranks(3, lambda rank, size: None, missing=(missing,), join_seconds=0.5)
    assert len(outcome) == 2
    for kind, sentence in outcome.values():
        assert kind == "error"
        assert "rank 0 did not open job" in sentence or "ranks [2] of 3 did not join the job in time" in sentence


def test_disagreeing_ranks_are_told():
    outcome = run_ranks(2, lambda rank, size: collectives.all_reduce(np.ones(10 + rank, np.float32), range(size)))
    sentences = [sentence for _, sentence in outcome.values()]
    assert any("10 elements against 11" in s or "11 elements against 10" in s for s in sentences), sentences


def test_wrong_receive_counts_are_told():
    outcome = run_ranks(2, lambda rank, size: collectives.all_to_all_v(np.ones(4), (0, 1), [2, 2], [2, 2 + rank]))
    assert any("expects 3 elements from rank 1, which sends 2" in str(what[1]) for what in outcome.values())


FOUR = np.ones(4, np.float32)
WRONG_CALLS = {
    "has rank 0 twice": lambda: collectives.all_reduce(FOUR, [0, 0]),
    "has a rank outside the job of 1": lambda: collectives.all_reduce(FOUR, range(100)),
    "is not a member of group []": lambda: collectives.barrier([]),
    "a rank is 4294967296": lambda: collectives.barrier([1 << 32]),
    "more than the 4 elements of its array": lambda: collectives.all_to_all_v(FOUR, [0], [5], [5]),
    "counts that are negative": lambda: collectives.all_to_all_v(FOUR, [0], [-1], [-1]),
    "send_counts has 2 numbers, but there are 1 ranks": lambda: collectives.all_to_all_v(FOUR, [0], [1, 1], [1]),
    "cannot be split along dimension 2": lambda: collectives.all_to_all(FOUR, [0], 2, 0),
    "dimension 0 of () must be a multiple": lambda: collectives.reduce_scatter(FOUR[0:1].reshape(()), [0]),
    "this machine's byte order": lambda: collectives.all_reduce(FOUR.astype(">f4"), [0]),
    "element type 'complex64' is not supported": lambda: collectives.broadcast(FOUR.astype("c8"), [0], 0),
    "Broadcast from rank 3, which is not in": lambda: collectives.broadcast(FOUR, [0], 3),
    "are impossible in a job of 1": lambda: collectives.send(FOUR, 0),
    "peer is 4294967296": lambda: collectives.send(FOUR, 1 << 32),
}


@pytest.mark.parametrize("words", WRONG_CALLS)
def test_wrong_calls_are_refused(words):
    def body(rank, size):
        with pytest.raises((collectives.CollectiveError, ValueError), match=re.escape(words)):
            WRONG_CALLS[words]()

    results(run_ranks(1, body))


def test_full_shared_memory_is_a_sentence():
    """The file size limit stands for a full memory: allocation fails before anything is written."""

    def body(rank, size):
        if rank == 0:
            resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
            collectives.all_reduce(ONES, range(size))
        time.sleep(0.5)
        collectives.all_reduce(ONES, range(size))

    outcome = run_ranks(2, body)
    assert "rank 0: shared memory is full: group [0, 1] needs 6144 KiB more" in outcome[0][1]
    assert "because rank 0: " in outcome[1][1] and "shared memory is full" in outcome[1][1]


def test_full_shared_memory_at_the_start():
    def body():
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
        collectives.join(f"small-{os.getpid()}", 0, 1)

    pid = os.fork()
    if pid == 0:
        try:
            body()
        except collectives.CollectiveError as error:
            os._exit(7 if "shared memory is full" in str(error) else 8)
        os._exit(9)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7


def test_earlier_run_of_the_same_name_leaves_nothing():
    """A job that was killed whole can be started again under the same name at once."""
    job = f"again-{os.getpid()}"

    def killed(rank, size):
        collectives.all_reduce(ONES, range(size))
        os.kill(os.getpid(), signal.SIGKILL)

    assert {kind for kind, _ in run_ranks(3, killed, job=job).values()} == {"died"}
    sums = results(run_ranks(3, lambda rank, size: collectives.all_reduce(ONES, range(size)).sum(), job=job))
    assert sums == [3000.0] * 3


def test_name_in_use_is_told():
    """An earlier run that still waits for its ranks holds the name; the second one says so and does not mix in."""
    job = f"taken-{os.getpid()}"
    holder = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    holder.bind(f"\0cpu_parallel.{os.getuid()}.{job}")
    outcome = run_ranks(1, lambda rank, size: None, job=job)
    assert f"job '{job}' is already starting on this machine" in outcome[0][1]
    holder.close()


def as_user(uid: int, work) -> int:
    """The exit code of `work()` in a process of another user."""
    pid = os.fork()
    if pid == 0:
        code = 99
        try:
            os.setresuid(uid, uid, uid)
            code = work()
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


needs_root = pytest.mark.skipif(os.getuid() != 0, reason="only root can become another user")


@needs_root
def test_another_user_gets_nothing_from_a_job_that_joins():
    job = f"private-{os.getpid()}"
    address = f"\0cpu_parallel.{os.getuid()}.{job}"

    def ask() -> int:
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as asking:
            asking.settimeout(10)
            asking.connect(address)
            _, descriptors, _, _ = socket.recv_fds(asking, 4, 1)
            return len(descriptors)

    def body(rank, size):
        links = [f"/proc/self/fd/{fd}" for fd in os.listdir("/proc/self/fd")]
        memory = next(link for link in links if os.path.islink(link) and "memfd:cpu_parallel." in os.readlink(link))
        with open(memory, "rb+") as file, pytest.raises(PermissionError):
            file.truncate(4096)
        return os.stat(memory).st_mode & 0o777

    def ask_while_rank_0_waits():
        deadline = time.monotonic() + 10
        while not any(address[1:] in line for line in open("/proc/net/unix")):  # noqa: SIM115
            assert time.monotonic() < deadline
            time.sleep(0.01)
        os._exit(as_user(12345, ask))

    asking = os.fork()
    if asking == 0:
        ask_while_rank_0_waits()
    outcome = run_ranks(2, body, job=job, missing=(1,), join_seconds=3)
    assert os.waitstatus_to_exitcode(os.waitpid(asking, 0)[1]) == 0
    assert "ranks [1] of 2 did not join the job in time" in outcome[0][1]
    assert results(run_ranks(2, body, job=job)) == [0o600, 0o600]


@needs_root
def test_a_socket_of_another_user_is_not_joined():
    job = f"squatted-{os.getpid()}"
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.setresuid(12345, 12345, 12345)
        holder = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        holder.bind(f"\0cpu_parallel.0.{job}")
        holder.listen()
        os.write(writer, b"x")
        time.sleep(60)
        os._exit(0)
    os.read(reader, 1)
    outcome = run_ranks(2, lambda rank, size: None, job=job, missing=(0,), join_seconds=3)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    assert f"another user of this machine has taken the name of job '{job}'" in outcome[1][1]


def test_size_of_the_job_must_agree():
    def body(rank, size):
        return None

    job = f"sizes-{os.getpid()}"
    pid = os.fork()
    if pid == 0:
        try:
            collectives.join(job, 1, 3, join_seconds=2)
        except collectives.CollectiveError as error:
            os._exit(7 if "has 2 ranks, this process expects 3" in str(error) else 8)
        os._exit(9)
    run_ranks(2, body, job=job, missing=(1,), join_seconds=2)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7


def test_collective_before_join():
    pid = os.fork()
    if pid == 0:
        try:
            collectives.barrier([0])
        except collectives.CollectiveError as error:
            os._exit(7 if "before this process joined a job" in str(error) else 8)
        os._exit(9)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7
