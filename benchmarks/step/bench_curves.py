"""Step time over tokens and over experts at constant active weights: python benchmarks/step/bench_curves.py

The tiny model, batch 1: sequences of 256 to 4096 tokens with 16 experts, then 16 to 256 experts with 512 tokens.
"""

import argparse
import json
import os
import statistics

from bench_step import compare

TOKENS = (256, 512, 1024, 2048, 4096)
EXPERTS = (16, 32, 64, 128, 256)


def measure(model: dict, moe: dict, threads: int, rounds: int) -> float:
    """Median seconds of a step of ours."""
    options = ["--batch", "1", "--model", json.dumps(model), "--moe", json.dumps(moe)]
    sides = compare(options, threads, rounds, 2, names=("ours",), quiet=True)
    return statistics.median(sides["ours"].seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    print(f"load {os.getloadavg()[0]:.2f}, {args.threads} threads")
    for tokens in TOKENS:
        seconds = measure({"seq_length": tokens}, {}, args.threads, args.rounds)
        print(f"{tokens:5} tokens: {1e3 * seconds:7.1f} ms, {1e6 * seconds / tokens:6.1f} us a token", flush=True)
    for experts in EXPERTS:
        seconds = measure({"seq_length": 512}, {"expert_num": experts}, args.threads, args.rounds)
        print(f"{experts:5} experts: {1e3 * seconds:7.1f} ms", flush=True)


if __name__ == "__main__":
    main()
