"""What a run prints, and what goes to its log file only."""

import logging
import re
from pathlib import Path

import pytest
from helpers.command_line import run_mindformer

from mindformers_ext.cpu_parallel.job import OWN_LINE
from mindformers_ext.training.console import MINDFORMERS, Console

OWN = str(Path(__file__).parents[2] / "mindformers_ext/training/metrics.py")
THEIRS = f"{MINDFORMERS}/trainer/trainer.py"


@pytest.mark.parametrize(
    "path,level,message,printed",
    [
        (OWN, logging.INFO, "step 1, loss 2.0", "step 1, loss 2.0"),
        (OWN, logging.WARNING, "step 2 is left out", "WARNING: step 2 is left out"),
        (THEIRS, logging.INFO, "..........Init Config..........", None),
        (THEIRS, logging.WARNING, "The config prefix is deprecated. Please use", None),
        (THEIRS, logging.WARNING, "num_parallel_workers is larger", "WARNING: num_parallel_workers is larger"),
        (THEIRS, logging.ERROR, "The config prefix is deprecated", "ERROR: The config prefix is deprecated"),
    ],
)
def test_what_is_printed(path: str, level: int, message: str, printed: str | None) -> None:
    """A launcher of CPU ranks finds the text again in what they print."""
    record = logging.LogRecord("mindformers", level, path, 1, "%s", (message,), None)
    console = Console()
    assert console.filter(record) == (printed is not None)
    if printed is not None:
        assert OWN_LINE.match(console.format(record))[1] == printed


def test_a_run_prints_its_own_lines_and_logs_all(toy_folder: Path) -> None:
    result = run_mindformer(toy_folder, "--output_dir", "told", "--train_dataset.data_loader.sizes", "[16, 0, 0]")
    assert result.returncode == 0, result.stderr[-3000:]
    lines, _, summary = result.stdout.partition("Training summary")
    said = [OWN_LINE.match(line)[1] for line in lines.splitlines()]
    assert said[0].startswith("run_mode train of ") and "a step is 64 tokens on 1 device(s)" in said
    wanted = ["run_mode", "dataset of", "a step is", *["step"] * 4, "saved step 4"]
    assert [word for line in said for word in wanted[:3] + ["step", "saved step 4"] if line.startswith(word)] == wanted
    assert summary and len(said) == len(wanted)
    log = Path(re.search(r"messages are in (\S+)", said[0])[1]).read_text()
    assert "Network Parameters" in log and "'optimizer': {" in log and "step 4, loss" in log
