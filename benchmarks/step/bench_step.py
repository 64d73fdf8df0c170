"""Training tokens per second of ours and of transformers on torch: python benchmarks/step/bench_step.py [--size small]

Same model, weights, batch, optimizer and threads; the sides take turns in one run, each in a process of its own, and
so does the machine's sgemm peak, which a hot or shared machine does not always reach.
Printed: tokens/s (median over the rounds), share of this machine's sgemm peak, peak memory and the losses of both.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

from models import SIZES

WORKER = Path(__file__).with_name("models.py")


@dataclass
class Side:
    """One side's process and what it measured."""

    name: str
    process: subprocess.Popen
    seconds: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    peak_bytes: int = 0

    def train(self, steps: int) -> float:
        """Train `steps` steps; returns the seconds of one."""
        self.process.stdin.write(f"{steps}\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"the {self.name} side stopped; its messages are above")
        result = json.loads(line)
        self.losses += result["losses"]
        self.peak_bytes = result["peak_bytes"]
        return result["seconds"]


def command_of(name: str, options: list[str]) -> list[str]:
    """Command of a worker."""
    return [sys.executable, str(WORKER), name, *options]


def environment_of(threads: int) -> dict[str, str]:
    """Environment in which both sides compute with `threads` threads."""
    return os.environ | {"OMP_NUM_THREADS": str(threads), "GLOG_v": "3"}


def start(name: str, options: list[str], threads: int) -> Side:
    """Start a side's worker; its library messages go to this process's standard error."""
    command, environment = command_of(name, options), environment_of(threads)
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    return Side(name, subprocess.Popen(command, env=environment, **pipes))


def compare(
    options: list[str], threads: int, rounds: int, steps: int, names=("torch", "ours", "sgemm"), quiet: bool = False
) -> dict[str, Side]:
    """Train the sides by turns, `rounds` times `steps` steps after two to warm up."""
    sides = {}
    try:
        for name in names:
            begin = time.perf_counter()
            sides[name] = start(name, options, threads)
            sides[name].train(1)
            if not quiet:
                print(f"{name}: first step {time.perf_counter() - begin:.1f} s after start", flush=True)
            sides[name].train(1)
        for _ in range(rounds):
            for side in sides.values():
                side.seconds.append(side.train(steps))
    finally:
        for side in sides.values():
            side.process.stdin.close()
            side.process.wait()
    return sides


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", default="tiny", choices=SIZES)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=3, help="steps of a side's turn")
    parser.add_argument("--model", default="{}", help="values of model_config that differ, as JSON")
    parser.add_argument("--moe", default="{}", help="values of moe_config that differ, as JSON")
    args = parser.parse_args()
    print(f"load {os.getloadavg()[0]:.2f}, {args.threads} threads")
    with tempfile.TemporaryDirectory() as folder:
        options = ["--size", args.size, "--batch", str(args.batch), "--model", args.model, "--moe", args.moe]
        options += ["--folder", folder]
        command, environment = command_of("prepare", options), environment_of(args.threads)
        prepared = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
        step = json.loads(prepared.stdout)
        sides = compare(options, args.threads, args.rounds, args.steps)
    peak = statistics.median(sides.pop("sgemm").losses)
    print(f"sgemm peak {peak / 1e9:.0f} GFLOP/s, the median of its turns")
    for side in sides.values():
        seconds = statistics.median(side.seconds)
        speed, share = step["tokens"] / seconds, step["flops"] / seconds / peak
        print(
            f"{side.name:6} {speed:8.0f} tokens/s  {100 * share:5.1f} % of sgemm peak  "
            f"{side.peak_bytes / 2**20:6.0f} MiB peak  losses {side.losses[0]:.6f} ... {side.losses[-1]:.6f}"
        )
    torch, ours = sides["torch"], sides["ours"]
    faster = statistics.median(torch.seconds) / statistics.median(ours.seconds)
    print(f"ours/torch: speed {faster:.2f}, peak memory {ours.peak_bytes / torch.peak_bytes:.2f}")


if __name__ == "__main__":
    main()
