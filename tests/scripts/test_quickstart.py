"""The first command of the README, whole."""

import json
from pathlib import Path

import pytest
from helpers.command_line import ROOT, run_command


@pytest.mark.slow
def test_quickstart_learns_and_repeats_nothing(tmp_path: Path) -> None:
    """The last loss is below the unigram entropy (the script's exit code); a second run trains nothing."""
    command = ["bash", str(ROOT / "scripts/quickstart.sh"), "--no-venv", "--output-dir", str(tmp_path / "out")]
    first = run_command(command, tmp_path, timeout=1800)
    assert first.returncode == 0, first.stdout[-2000:] + first.stderr[-2000:]
    assert "Training summary" in first.stdout and "is below it" in first.stdout
    records = [json.loads(line) for line in (tmp_path / "out/metrics.jsonl").read_text().splitlines()]
    assert len(records) == 150 and records[-1]["mtp_loss"] < records[0]["mtp_loss"]
    written = (tmp_path / "out/metrics.jsonl").stat().st_mtime
    second = run_command(command, tmp_path, timeout=120)
    assert second.returncode == 0 and "Already trained" in second.stdout
    assert (tmp_path / "out/metrics.jsonl").stat().st_mtime == written
