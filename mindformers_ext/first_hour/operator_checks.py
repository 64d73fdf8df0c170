"""Every operator of compiled ranks on a device against float32 on CPU, timed: a line of JSON each, resumed by them."""

import contextlib
import json
import os
import select
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tqdm import tqdm

from mindformers_ext.child_process import end_with_parent
from mindformers_ext.files.atomic import write_text
from mindformers_ext.first_hour.one_operator import Use, distinct_uses
from mindformers_ext.first_hour.worker import DEVICE, REFERENCE
from mindformers_ext.rank_compiler.roofline import bytes_of, flops_of, kind_of, part_of

PATIENCE_S = 600.0  # for one operator, which may be compiled first


class Lost(Exception):
    """A worker ended, or answered nothing for too long."""


class Answering:
    """A worker process that is started when it is needed, and anew after it was lost."""

    def __init__(self, role: str, device: str, folder: Path, graphs: list[Path]):
        self.command = [sys.executable, "-m", "mindformers_ext.first_hour.worker", role, device, str(folder)]
        self.command += [str(path) for path in graphs]
        self.log = folder / f"{role}.log"
        self.process: subprocess.Popen | None = None

    def ask(self, index: int) -> dict[str, Any]:
        """The worker's answer. Raises Lost."""
        if self.process is None:
            with self.log.open("ab") as log:
                self.process = subprocess.Popen(
                    self.command,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=log,
                    text=True,
                    bufsize=1,
                    preexec_fn=end_with_parent,
                )
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(f"{index}\n")
        answered, _, _ = select.select([self.process.stdout], [], [], PATIENCE_S)
        line = self.process.stdout.readline() if answered else ""
        if not line:
            code = self.end()
            why = f"ended with code {code}" if answered else f"gave no answer in {PATIENCE_S:.0f} s"
            raise Lost(f"its process {why}; log: {self.log}")
        return json.loads(line)

    def end(self) -> int | None:
        """Stop the process; its exit code."""
        if self.process is None:
            return None
        self.process.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(10)
        self.process.kill()
        code, self.process = self.process.wait(), None
        return code


def check_operators(graphs: list[Path], device: str, folder: Path) -> list[dict[str, Any]]:
    """Try every use of an operator that is not in `folder`/operators.jsonl yet; all records, the old ones too.

    A record has operator, attributes, dtypes, shapes, part, kind, flops, bytes; and seconds, agrees, error, tolerance,
    or `failed` with the reason.
    """
    folder.mkdir(parents=True, exist_ok=True)
    done = {record["identity"]: record for record in read_records(folder)}
    kept = folder / "operators.jsonl"
    write_text(
        kept, "".join(json.dumps(record) + "\n" for record in done.values())
    )  # without a line that was cut short
    uses = distinct_uses(graphs)
    left = [(index, use) for index, use in enumerate(uses) if use.identity not in done]
    workers = Answering(REFERENCE, "CPU", folder, graphs), Answering(DEVICE, device, folder, graphs)
    try:
        with kept.open("a") as file:
            for index, use in tqdm(left, desc="operators", unit="operator"):
                record = describe(use) | tried(workers, index)
                (folder / f"{index}.npz").unlink(missing_ok=True)
                file.write(json.dumps(record) + "\n")
                file.flush()
                os.fsync(file.fileno())
                done[use.identity] = record
    finally:
        for worker in workers:
            worker.end()
    return [done[use.identity] for use in uses]


def tried(workers: tuple[Answering, Answering], index: int) -> dict[str, Any]:
    """What the reference and then the device say of a use."""
    answer: dict[str, Any] = {}
    for worker, whose in zip(workers, ("the reference on CPU", "the device"), strict=True):
        try:
            answer = worker.ask(index)
        except Lost as error:
            answer = {"failed": str(error)}
        if "failed" in answer:
            return {"failed": f"{whose}: {answer['failed']}"}
    return answer


def describe(use: Use) -> dict[str, Any]:
    """What an operator is, without what it took."""
    operator = use.operator
    return {
        "identity": use.identity,
        "operator": operator.name,
        "attributes": operator.attributes(),
        "dtypes": operator.dtypes(),
        "shapes": operator.shapes(),
        "part": part_of(operator),
        "kind": kind_of(operator),
        "flops": flops_of(operator),
        "bytes": bytes_of(operator),
    }


def read_records(folder: Path) -> Iterator[dict[str, Any]]:
    """The records of an earlier start; a line that was cut short is left out."""
    path = folder / "operators.jsonl"
    for line in path.read_text().splitlines() if path.exists() else []:
        with contextlib.suppress(json.JSONDecodeError):
            yield json.loads(line)
