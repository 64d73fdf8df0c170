"""The machines of a job watch each other: when one is cut off, or its ranks fail, the others end and say which it was.

Without it a rank waits in a collective for one that will never come: TCP tells nobody of a pulled cable, and HCCL gives
up after half an hour. Every machine's launcher holds one connection to that of machine 0, over which both say every few
seconds that they are there.
"""

import contextlib
import json
import queue
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable

import psutil

from mindformers_ext.cluster.nodes import Place
from mindformers_ext.errors import UserError

BEAT_SECONDS, SILENCE_SECONDS = 3.0, 25.0
MOURNING_SECONDS = 3.0  # for a machine's own ranks to say why they failed, and for the news to go out
ALIVE, DONE, FAILED = "alive", "done", "failed"


class MachineLost(UserError, RuntimeError):
    """Another machine of the job is gone; the sentence names it."""


class Line:
    """One connection: says that this side is there, and hands on what the other says.

    Args:
        other: the other machine, as a sentence names it.
        heard: called with (message, sentence) of everything but a sign of life; once with FAILED when it goes silent.
    """

    def __init__(self, connection: socket.socket, other: str, heard: Callable[[str, str], None]):
        self.connection, self.other, self.heard = connection, other, heard
        self.over = threading.Event()
        self.lock = threading.Lock()
        connection.settimeout(SILENCE_SECONDS)
        for work in (self.speak, self.listen):
            threading.Thread(target=work, daemon=True).start()

    def say(self, message: str, text: str = "") -> None:
        """Send a message; a broken line is noticed by listening."""
        with self.lock, contextlib.suppress(OSError):
            self.connection.sendall(json.dumps([message, text]).encode() + b"\n")

    def speak(self) -> None:
        while not self.over.wait(BEAT_SECONDS):
            self.say(ALIVE)

    def listen(self) -> None:
        said = FAILED, f"{self.other} is not heard of: its connection broke"
        try:
            with self.connection.makefile("rb") as lines:
                for line in lines:
                    message, text = json.loads(line)
                    if message != ALIVE:
                        self.heard(message, text)
                        if message == DONE:
                            return
        except TimeoutError:
            said = FAILED, f"{self.other} is not heard of for {SILENCE_SECONDS:g} s, so its cable or its power is out"
        except (OSError, ValueError, TypeError):
            pass
        finally:
            self.over.set()
        self.heard(*said)


class Watch:
    """This machine's part: what has been heard is in `news`, as sentences about machines that are lost."""

    def __init__(self, place: Place, port: int):
        self.place, self.port = place, port
        self.news: queue.Queue[str] = queue.Queue()
        self.lines: dict[int, Line] = {}
        self.server: socket.socket | None = None
        self.stands = threading.Event()  # machine 0 knows this one
        if place.node_rank == 0:
            family = socket.AF_INET6 if ":" in place.master_addr else socket.AF_INET
            self.server = socket.create_server(("", port), family=family)
            self.stands.set()
            threading.Thread(target=self.accept, daemon=True).start()
        else:
            threading.Thread(target=self.connect, daemon=True).start()

    def accept(self) -> None:
        """Machine 0: a line to every other machine, by its number."""
        while True:
            try:
                connection, (address, *_) = self.server.accept()
            except OSError:
                return
            threading.Thread(target=self.greet, args=(connection, address), daemon=True).start()

    def greet(self, connection: socket.socket, address: str) -> None:
        """Take up a machine that says which it is; whoever says something else is no part of the job."""
        try:
            connection.settimeout(BEAT_SECONDS)
            rank, host = first_words(connection)
            if not isinstance(rank, int) or not 0 < rank < self.place.nodes or rank in self.lines:
                raise ValueError
        except (OSError, ValueError, TypeError):
            connection.close()
            return
        name = f"machine {rank} ({str(host)[:100]}, {address})"
        line = Line(connection, name, lambda message, text: self.heard_by_first(message, text, name))
        self.lines[rank] = line
        line.say(ALIVE)

    def heard_by_first(self, message: str, text: str, name: str) -> None:
        """Machine 0 passes news of one on to the others."""
        if message == FAILED:
            sentence = text if text.startswith(name) else f"{name}: {text}"
            self.tell(FAILED, sentence)
            self.news.put(sentence)

    def connect(self) -> None:
        """Another machine: a line to machine 0, as soon as it listens."""
        address = self.place.master_addr
        while True:
            with contextlib.suppress(OSError, ValueError):
                connection = socket.create_connection((address, self.port), timeout=SILENCE_SECONDS)
                connection.sendall(json.dumps([self.place.node_rank, socket.gethostname()]).encode() + b"\n")
                first_words(connection)  # what answers there may be a proxy of a machine that does not listen yet
                break
            time.sleep(BEAT_SECONDS)
        name = f"machine 0 ({address})"

        def heard(message: str, text: str) -> None:
            if message == FAILED:
                self.news.put(text if "machine " in text else f"{name}: {text}")

        self.lines[0] = Line(connection, name, heard)
        self.stands.set()

    def tell(self, message: str, text: str = "") -> None:
        """Say something to all machines that this one has a line to."""
        for line in [*self.lines.values()]:
            line.say(message, text)

    def close(self) -> None:
        if self.server is not None:
            self.server.close()


def first_words(connection: socket.socket) -> list:
    """The first line of a connection, no byte more. Raises OSError or ValueError when it is none of ours."""
    text = b""
    while not text.endswith(b"\n") and len(text) < 1000 and (piece := connection.recv(1)):
        text += piece
    return json.loads(text)


def run(command: list[str], place: Place, port: int) -> int:
    """Run msrun, and end it when another machine is lost. Returns its exit code.

    Raises:
        MachineLost: another machine is cut off, or its ranks failed.
    """
    watch = Watch(place, port)
    child = subprocess.Popen(command)
    try:
        while (code := child.poll()) is None:
            with contextlib.suppress(queue.Empty):
                sentence = watch.news.get(timeout=0.2)
                end(child)
                raise MachineLost(f"{sentence}; the ranks of this machine ({socket.gethostname()}) are ended")
        if code:
            watch.tell(FAILED, f"its ranks failed with exit code {code}; their logs say why")
            time.sleep(min(MOURNING_SECONDS, 1))
        else:
            watch.stands.wait(MOURNING_SECONDS)  # ranks may end while the line is made: it would break unexplained
            watch.tell(DONE)
        return code if code >= 0 else 128 - code
    finally:
        if child.poll() is None:
            end(child)
        watch.close()


def end(child: subprocess.Popen) -> None:
    """End msrun and everything it started: its ranks are in sessions of their own."""
    with contextlib.suppress(psutil.NoSuchProcess):
        below = psutil.Process(child.pid).children(recursive=True)
        child.send_signal(signal.SIGINT)  # msrun's own way to end its ranks
        _, left = psutil.wait_procs(below, timeout=MOURNING_SECONDS)
        for process in left:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
    child.kill()
    child.wait()
