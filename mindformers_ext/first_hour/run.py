"""The first hour on a card, step by step: what agrees with what was proved without one, and what the estimate missed.

    bash scripts/first_hour.sh --cards 8 --out output/first_hour

Each step leaves DIR/STEP.json and is not done again; one that failed is, and its failure stops no other. Without a card
every step runs on our CPU kernels and shared memory. Exit code: 0 all agrees, 1 something does not, or was not done.
"""

import argparse
import json
import os
import shlex
import shutil
import subprocess
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mindformers_ext.bin_dataset.indexed_dataset import IndexedDatasetWriter
from mindformers_ext.config.command_line import find, parse_overrides
from mindformers_ext.config.run import Run, read_run
from mindformers_ext.config.run_rules import refuse
from mindformers_ext.config.strategy_rules import check_plan
from mindformers_ext.errors import exit_code_of
from mindformers_ext.files.atomic import write_json, write_text
from mindformers_ext.first_hour import collective_times
from mindformers_ext.first_hour.environment import cards, check_environment
from mindformers_ext.first_hour.measured_profile import as_yaml, measured_profile
from mindformers_ext.first_hour.operator_checks import check_operators
from mindformers_ext.first_hour.report import FAILED, estimated_beside_measured, render_html, summary, verdict_of
from mindformers_ext.rank_compiler.rank_pool import MEMORY_LINES
from mindformers_ext.training.device_peak import device_peak

ROOT = Path(__file__).resolve().parents[2]
RUNS = ROOT / "research" / "deepseek3"
ON_CARDS = RUNS / "deepseek3_1b" / "pretrain_deepseek3_1b.yaml"
ON_CPU = RUNS / "deepseek3_tiny" / "pretrain_deepseek3_tiny_8p.yaml"
STEPS = 10
# Losses of two devices after ten steps: they sum in different orders, and bfloat16 rounds each of them.
LOSS_TOLERANCE = 1e-2
PORT = 8118


@dataclass(frozen=True)
class Hour:
    """What is asked for."""

    config: Path
    ranks: int
    on_card: bool
    out: Path
    overrides: tuple[str, ...]  # of run_mindformer.py's command line
    plan: Run

    @property
    def device(self) -> str:
        return "Ascend" if self.on_card else "CPU"


def layout_of(ranks: int) -> dict[str, Any]:
    """Degrees for a number of cards: two stages from eight on, tensor and expert parallelism from two on."""
    pp = 2 if ranks % 8 == 0 else 1
    mp = 2 if ranks % 2 == 0 else 1
    dp = ranks // (pp * mp)
    return {
        "parallel_config.data_parallel": dp,
        "parallel_config.model_parallel": mp,
        "parallel_config.pipeline_stage": pp,
        "parallel_config.expert_parallel": 2 if dp * mp % 2 == 0 else 1,
        "parallel_config.micro_batch_num": 4 if pp > 1 else 1,
        "parallel.dataset_strategy": [[dp, 1]] * 4,
    }


# --- steps: each takes what is asked for and the records of the earlier ones ---


def environment(hour: Hour, done: dict) -> dict[str, Any]:
    """Versions against what is wanted."""
    return {"rows": check_environment()}


def compilation(hour: Hour, done: dict) -> dict[str, Any]:
    """One rank of each stage, compiled over stand-in CANN with its memory plan."""
    out = hour.out / "dryrun"
    command = [sys.executable, str(ROOT / "scripts/dryrun.py"), "--config", str(hour.config), "--out", str(out)]
    command += ["--device_num", str(hour.ranks), "--level", "memory", *hour.overrides]
    finished = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    if not (out / "report.json").exists():
        raise RuntimeError(f"the dry run ended with {finished.returncode}: {finished.stderr.strip()[-500:]}")
    report = json.loads((out / "report.json").read_text())
    graphs = [str(out / f"rank_{rank['rank']}" / "graph.mindir") for rank in report["ranks"]]
    planned = {str(rank["rank"]): rank["memory"].get("actual_peak_bytes") for rank in report["ranks"]}
    estimate = {key: report["estimate"][key] for key in ("step_seconds", "tokens_per_s")}
    return {"graphs": graphs, "planned": planned, "estimate": estimate, "verdict": report["verdict"]}


def operators(hour: Hour, done: dict) -> dict[str, Any]:
    """Every operator of these ranks alone, at its own shapes."""
    graphs = [Path(path) for path in done["compilation"]["graphs"]]
    return {"records": check_operators(graphs, hour.device, hour.out / "operators")}


def collectives(hour: Hour, done: dict) -> dict[str, Any]:
    """AllReduce and its like, by size and group."""
    if hour.ranks == 1:
        return {"records": []}
    if not hour.on_card:
        return {"records": collective_times.on_cpu(hour.ranks)}
    path = hour.out / "collectives" / "records.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    command = ["msrun", f"--worker_num={hour.ranks}", f"--local_worker_num={hour.ranks}", f"--master_port={PORT}"]
    command += ["--join=True", f"--log_dir={path.parent / 'logs'}", collective_times.__file__, str(path)]
    subprocess.run(command, check=True, cwd=ROOT)
    return {"records": json.loads(path.read_text())}


def profile(hour: Hour, done: dict) -> dict[str, Any]:
    """A device profile for `dryrun.py --device`."""
    peak = None if hour.on_card else device_peak("CPU", processes=1)[0]
    name = "measured by first_hour.sh on " + ("Ascend" if hour.on_card else "this machine's CPU")
    records = [done[step].get("records", []) for step in ("operators", "collectives")]
    path = hour.out / "device.yaml"
    write_text(path, as_yaml(measured_profile(name, peak, *records)))
    return {"path": str(path)}


def training(hour: Hour, done: dict) -> dict[str, Any]:
    """Ten steps on the devices, and of the same ranks on CPU."""
    folder = hour.out / "training"
    prefix = write_data(folder / "data", hour.plan)
    found: dict[str, Any] = {}
    for name, on_card in (("device", hour.on_card), ("cpu", False)):
        out = folder / name
        if name == "cpu" and not hour.on_card and (folder / "device/compiled_ranks").exists():
            shutil.copytree(folder / "device/compiled_ranks", out / "compiled_ranks", dirs_exist_ok=True)
        run_steps(hour, prefix, out, on_card)
        lines = (out / "metrics.jsonl").read_text().splitlines()
        found[name] = [json.loads(line) for line in lines]
    logs = sorted((folder / "device/msrun_log").glob("worker_*.log")) if hour.on_card else []
    pattern = MEMORY_LINES["actual_peak_bytes"]
    peaks = {log.stem.rpartition("_")[2]: pattern.search(log.read_text(errors="replace")) for log in logs}
    found["memory"] = {rank: int(match[1]) * 2**20 for rank, match in peaks.items() if match}
    return found


def write_data(prefix: Path, plan: Run) -> Path:
    """Random documents, some words more often than others; enough for all steps."""
    prefix.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    samples = STEPS * plan.global_batch + 1
    with IndexedDatasetWriter(prefix, np.int32) as writer:
        for _ in range(samples):
            tokens = rng.zipf(1.3, plan.model.seq_length + 1) % plan.model.vocab_size
            writer.add_document(tokens.astype(np.int32))
    return prefix


def run_steps(hour: Hour, prefix: Path, out: Path, on_card: bool) -> None:
    """Train; the logs are in `out`/msrun_log. Raises CalledProcessError."""
    data = "train_dataset.data_loader"
    command = ["run_mindformer.py", "--config", str(hour.config), "--use_parallel", "True", "--output_dir", str(out)]
    command += [f"--{data}.sizes", f"[{STEPS * hour.plan.global_batch}, 0, 0]"]
    command += [f"--{data}.config.data_path", json.dumps(["1", str(prefix)]), "--processor", "null"]
    command += ["--callbacks", '[{"type": "TrainingMetrics"}, {"type": "TopkBiasBalanceCallback"}]', *hour.overrides]
    logs = str(out / "msrun_log")
    if on_card:
        ranks = str(hour.ranks)
        launcher = ["bash", "scripts/msrun_launcher.sh", shlex.join(command), ranks, ranks, "127.0.0.1", str(PORT), "0"]
        launcher += [logs, "True", "7200"]
    else:
        launcher = [sys.executable, "-m", "mindformers_ext.cpu_parallel.job", "--worker_num", str(hour.ranks)]
        launcher += ["--log_dir", logs, "--", *command]
    subprocess.run(launcher, check=True, cwd=ROOT)


STEP_FUNCTIONS: dict[str, Callable[[Hour, dict], dict[str, Any]]] = {
    function.__name__: function for function in (environment, compilation, operators, collectives, profile, training)
}


def do_all(hour: Hour) -> dict[str, Any]:
    """Every step that has no record yet, or whose record is a failure; the records of all."""
    asked = {"config": str(hour.config), "ranks": hour.ranks, "device": hour.device, "overrides": list(hour.overrides)}
    if _record(hour.out / "asked.json") != asked:
        for step in STEP_FUNCTIONS:
            (hour.out / f"{step}.json").unlink(missing_ok=True)
        write_json(hour.out / "asked.json", asked)
    done: dict[str, Any] = {}
    for step, function in STEP_FUNCTIONS.items():
        path = hour.out / f"{step}.json"
        record = _record(path)
        if record is None or FAILED in record:
            print(f"{step} ...", flush=True)
            try:
                record = function(hour, done)
            except Exception as error:  # whatever it is, the other steps can still tell something
                traceback.print_exc()
                record = {FAILED: f"{type(error).__name__}: {error}"}
            write_json(path, record)
        done[step] = record
    return done


def _record(path: Path) -> dict[str, Any] | None:
    return json.loads(path.read_text()) if path.exists() else None


def first_hour(arguments: list[str]) -> int:
    """Do what the command line asks for."""
    options, rest = _parse(arguments)
    here = cards()
    ranks = options.cards or here or 8
    config = find(options.config or (ON_CARDS if here else ON_CPU)).resolve()
    layout = layout_of(ranks) if ranks != read_run(config).device_num else {}
    overrides = tuple(text for key, value in layout.items() for text in (f"--{key}", json.dumps(value))) + tuple(rest)
    plan = read_run(config, ranks, parse_overrides(list(overrides)))
    refuse(plan, check_plan(plan))
    options.out.mkdir(parents=True, exist_ok=True)
    hour = Hour(config, ranks, here > 0, options.out.resolve(), overrides, plan)
    done = do_all(hour)
    report = {"device": hour.device, "ranks": ranks, "config": str(config), **done}
    report["estimates"] = estimated_beside_measured(done)
    report["verdict"], code = verdict_of(done, LOSS_TOLERANCE)
    write_json(hour.out / "report.json", report)
    write_text(hour.out / "report.html", render_html(report))
    print(summary(report))
    if hour.on_card:
        tests = [sys.executable, "-m", "pytest", "-n", "0", "-m", "ascend", str(ROOT / "tests/ascend")]
        code |= subprocess.run(tests, cwd=ROOT, env=os.environ | {"FIRST_HOUR": str(hour.out)}).returncode
    print(f"\nVerdict: {report['verdict']}\nreport: {hour.out / 'report.html'} and {hour.out / 'report.json'}")
    return min(code, 1)


def _parse(arguments: list[str]) -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cards", type=int, help="ranks, one a card (default: all cards, or 8 ranks on CPU)")
    parser.add_argument("--config", help=f"YAML (default: {ON_CARDS.name}, without cards {ON_CPU.name})")
    parser.add_argument("--out", type=Path, default=ROOT / "output/first_hour", help="folder for the report")
    return parser.parse_known_args(arguments)


if __name__ == "__main__":
    sys.exit(exit_code_of(lambda: first_hour(sys.argv[1:])))
