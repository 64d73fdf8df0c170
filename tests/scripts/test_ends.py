"""How commands end that the disk refuses, or that Ctrl-C stops: one line, an exit code, and no process left."""

import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from helpers.command_line import ROOT, TOY, run_command, run_environment, run_mindformer

from mindformers_ext.cpu_parallel import job
from mindformers_ext.errors import INTERRUPTED, UserError, exit_code_of
from mindformers_ext.files.atomic import naming, write_text

CASES = [
    (errno.ENOSPC, "x/y: No space left on device; make room ("),
    (errno.EACCES, "x/y: Permission denied; give a folder that this user may use"),
    (errno.EROFS, "x/y: Read-only file system; give a folder"),
    (errno.ENOENT, "x/y: No such file or directory"),
]


@pytest.mark.parametrize("number,words", CASES)
def test_what_a_file_system_refuses_is_a_sentence(number, words, capsys):
    def work():
        with naming("x/y"):
            raise OSError(number, os.strerror(number))

    assert exit_code_of(work) == UserError.exit_code
    error = capsys.readouterr().err
    assert error.startswith(f"error: {words}") and error.count("\n") == 1
    if number == errno.ENOSPC:
        assert f" MB free in {Path.cwd()}) or give another folder" in error


def test_other_errors_stay_tracebacks():
    def work():
        raise ConnectionResetError(errno.ECONNRESET, "peer")

    with pytest.raises(ConnectionResetError):
        exit_code_of(work)


def test_ctrl_c_is_a_line(capsys):
    def work():
        raise KeyboardInterrupt

    assert exit_code_of(work) == INTERRUPTED
    assert capsys.readouterr().err == "interrupted\n"


def test_a_full_disk_under_a_whole_file(mounted, capsys):
    full = mounted("size=64k")
    assert exit_code_of(lambda: write_text(full / "a.txt", "x" * 100_000)) == UserError.exit_code
    assert capsys.readouterr().err.startswith(f"error: {full}/a.txt: No space left on device; make room (0.1 MB free")
    assert list(full.iterdir()) == []


FULL = "No space left on device; make room (0.0 MB free in "
TOOLS = [
    ["dataset_tools/train_tokenizer.py", "--input", "text", "--vocab-size", "300", "--output", "OUT/tokenizer.json"],
    ["dataset_tools/make_sample_corpus.py", "--output", "OUT/corpus.txt"],
    ["dataset_tools/wikitext_to_bin.py", "--input", "text", "--vocab-file", "TOKENIZER", "--output-prefix", "OUT/p"],
]


@pytest.mark.parametrize("command", TOOLS, ids=[command[0] for command in TOOLS])
@pytest.mark.parametrize("options,words", [("size=4k", FULL), ("ro", "Read-only file system")])
def test_tools_on_a_full_or_read_only_disk(command, options, words, mounted, tmp_path, tokenizer_file):
    folder = mounted(options)
    if options != "ro":
        (folder / "filled").write_bytes(bytes(4096))
    (tmp_path / "text").write_text("the router and the experts of a model\n" * 2000)
    words_of = [word.replace("OUT", str(folder)).replace("TOKENIZER", tokenizer_file) for word in command]
    done = run_command([sys.executable, str(ROOT / words_of[0]), *words_of[1:]], tmp_path)
    error = done.stderr.strip().splitlines()[-1]
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    assert error.startswith(f"error: {folder}") and words in error


@pytest.mark.parametrize("options,words", [("size=4k", FULL), ("ro", "Read-only file system")])
def test_training_on_a_full_or_read_only_disk(options, words, mounted, toy_folder):
    folder = mounted(options)
    if options != "ro":
        (folder / "filled").write_bytes(bytes(4096))
    done = run_mindformer(toy_folder, "--output_dir", str(folder))
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr[-3000:]
    assert done.stderr.strip().splitlines()[-1].startswith(f"error: {folder}")
    assert words in done.stderr.strip().splitlines()[-1]


def test_a_disk_that_fills_while_training(mounted, toy_folder):
    """Background saves too: what was not saved is not said to be, and TensorBoard adds no traceback."""
    folder = mounted("size=400k")
    options = ["--callbacks.0.async_save", "True", "--callbacks.0.save_checkpoint_steps", "2"]
    done = run_mindformer(toy_folder, "--output_dir", str(folder), "--runner_config.epochs", "50", *options)
    assert done.returncode in (1, 3) and "Traceback" not in done.stdout + done.stderr, done.stderr[-3000:]
    assert done.stderr.strip().splitlines()[-1].startswith(f"error: {folder}")
    said = [int(line.split("saved step ")[1].split()[0]) for line in done.stdout.splitlines() if "saved step " in line]
    kept = sorted(int(path.name[5:]) for path in folder.glob("checkpoint/step_*"))
    last = done.stderr.strip().splitlines()[-1]
    assert said[-1] in kept  # older ones were deleted
    assert all(f"cannot save step {step}:" in last for step in set(kept) - set(said))  # `latest` could not follow


ENTRIES = [ROOT / "run_mindformer.py", ROOT / "mindformers_ext/cpu_parallel/job.py"]
ENTRIES += [*ROOT.glob("scripts/*.py"), *ROOT.glob("dataset_tools/*.py"), *ROOT.glob("research/*/convert_*.py")]


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry.name)
def test_every_command_line_ends_in_one_place(entry):
    ends = entry.read_text().partition('if __name__ == "__main__":')[2]
    assert any(place in ends for place in ("exit_code_of(", "cli.main(", "cli.run_tool(")), ends


def test_ctrl_c_of_a_job_of_ranks(tmp_path, monkeypatch, capsys):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(job, "run", interrupted)
    assert job.main(["--log_dir", str(tmp_path), "run_mindformer.py", "--config", "y.yaml"]) == INTERRUPTED
    assert capsys.readouterr().out == (tmp_path / "scheduler.log").read_text() == "interrupted\n"


def test_ctrl_c_ends_a_run_and_its_children(toy_folder, tmp_path):
    command = [sys.executable, str(ROOT / "run_mindformer.py"), "--config", str(TOY / "train_toy.yaml")]
    command += ["--register_path", str(TOY), "--output_dir", str(tmp_path / "out"), "--runner_config.epochs", "100000"]
    run = subprocess.Popen(
        command, cwd=toy_folder, env=run_environment(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    metrics = tmp_path / "out" / "metrics.jsonl"
    while not metrics.exists() or not metrics.read_text():
        assert run.poll() is None
        time.sleep(0.1)
    children = psutil.Process(run.pid).children(recursive=True)
    run.send_signal(signal.SIGINT)
    _, error = run.communicate(timeout=60)
    assert run.returncode == INTERRUPTED
    assert error.strip().splitlines()[-1] == "interrupted" and "Traceback" not in error
    assert not any(child.is_running() for child in children)
