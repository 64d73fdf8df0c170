"""--help of every program shows an example, and the program takes it."""

import argparse
import ast
import json
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import zstandard
from helpers.command_line import ROOT, run_command, run_environment

from mindformers_ext.cluster import launcher
from mindformers_ext.config.command_line import parse_overrides

FOLDERS = ("scripts", "dataset_tools", "docker", "research/deepseek3", "research/deepseek3/rl")
FILES = [ROOT / "run_mindformer.py", *(file for folder in FOLDERS for file in sorted((ROOT / folder).glob("*.*")))]
PYTHON = [file for file in FILES if file.suffix == ".py" and "__main__" in file.read_text()]
SHELL = [file for file in FILES if file.suffix == ".sh"]


class Parsed(Exception):
    """A program's parser took the arguments."""


@pytest.fixture
def only_parse(monkeypatch: pytest.MonkeyPatch) -> None:
    """Programs end with Parsed where their work would begin."""
    parse_known, parse = argparse.ArgumentParser.parse_known_args, argparse.ArgumentParser.parse_args

    def known(parser: argparse.ArgumentParser, args: list[str] | None = None, namespace: object = None) -> None:
        _, rest = parse_known(parser, args, namespace)
        parse_overrides(rest)
        raise Parsed

    def all_known(parser: argparse.ArgumentParser, args: list[str] | None = None, namespace: object = None) -> None:
        with monkeypatch.context() as inner:
            inner.setattr(argparse.ArgumentParser, "parse_known_args", parse_known)
            parse(parser, args, namespace)
        raise Parsed

    monkeypatch.setattr(argparse.ArgumentParser, "parse_known_args", known)
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", all_known)


def examples(text: str) -> list[list[str]]:
    """The commands of a help text, as words, each up to its end or redirection."""
    lines = re.findall(r"^ +((?:\w+=\S+ +)*(?:python|bash|sbatch) .+)", text.replace("\\\n", " "), re.M)
    return [shlex.split(re.split(r" (?:>|&&|#) ", line)[0]) for line in lines]


def docstring(program: Path) -> str:
    """The text at the top of a Python program, as it is indented there."""
    return ast.get_docstring(ast.parse(program.read_text()), clean=False)


def program_and_arguments(words: list[str]) -> tuple[Path, list[str]]:
    """The project's program that a command starts; sbatch has options before it."""
    place = next(index for index, word in enumerate(words) if word.endswith((".py", ".sh")))
    return ROOT / words[place], words[place + 1 :]


def take(program: Path, arguments: list[str]) -> None:
    """Run a program up to the end of its parser, or ask the launcher, which has none; raises what they raise."""
    text = program.read_text()
    if program.suffix == ".py":
        sys.argv[:] = [str(program), *arguments]
        with pytest.raises(Parsed):
            runpy.run_path(str(program), run_name="__main__")
    elif program.name == "msrun_launcher.sh":
        launcher.words_of(arguments)
        launcher.options_of(arguments[1:])
    elif module := re.search(r"exec python -m (\S+)", text):
        sys.argv[:] = [module[1], *arguments]
        with pytest.raises(Parsed):
            runpy.run_module(module[1], run_name="__main__")
    elif script := re.search(r'exec python "\$ROOT/(\S+)"', text):
        take(ROOT / script[1], arguments)
    else:  # it names them itself, or hands on keys of the YAML
        known = f"{text} {'--seed' if '--section.key' in text else ''}"
        assert [word for word in arguments if word.startswith("--") and not re.search(rf"{word}\b", known)] == []


@pytest.mark.parametrize("program", [*PYTHON, *SHELL], ids=lambda path: path.name)
def test_help_shows_an_example_that_the_program_takes(
    program: Path, only_parse: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    if program.suffix == ".sh":
        done = subprocess.run(["bash", program, "--help"], env=run_environment(), capture_output=True, text=True)
        assert done.returncode == 0 and done.stderr == ""
        text = done.stdout
    else:  # in this process, which has imported the heavy modules
        monkeypatch.setattr(sys, "argv", [str(program), "--help"])
        with pytest.raises(SystemExit) as end:
            runpy.run_path(str(program), run_name="__main__")
        assert not end.value.code
        text = capsys.readouterr().out
        assert text.startswith("usage: ") and " ".join(docstring(program).split()) in " ".join(text.split())
    commands = examples(text)
    own = {program.name, program.with_suffix(".sh").name}
    assert any(program_and_arguments(words)[0].name in own for words in commands), text
    monkeypatch.setattr(sys, "argv", list(sys.argv))
    for words in commands:
        started, arguments = program_and_arguments(words)
        assert started.exists(), started
        assert [word for word in arguments if word.startswith("research/") and not (ROOT / word).exists()] == []
        take(started, arguments)


ALPACA = [{"instruction": f"Count to {n}.", "input": "", "output": "one two three"} for n in range(4)]
# What the examples of dataset_tools name, beside what the ones before them have written.
INPUTS = {
    "my.txt": "A line of my own text.\n" * 200,
    "corpus.txt": "The cat sat on the mat. " * 200,
    "wiki.train.tokens": " = Cat = \n \n The cat sat on the mat . \n" * 40,
    "books.txt": "The cat sat on the mat and stayed there for a long time.\n" * 400,
    "alpaca.json": json.dumps(ALPACA),
}
RUN = (  # in an order in which each finds its files
    "make_sample_corpus",
    "train_tokenizer",
    "jsonl_to_bin",
    "text_to_fixed",
    "wikitext_to_bin",
    "instruct_to_bin",
    "inspect_bin",
    "merge_bin",
)


def test_the_examples_of_the_dataset_tools_run(tmp_path: Path) -> None:
    for name, text in INPUTS.items():
        (tmp_path / name).write_text(text)
    (tmp_path / "data").mkdir()
    line = json.dumps({"text": "The cat sat on the mat."}) + "\n"
    (tmp_path / "data/part.jsonl.zst").write_bytes(zstandard.compress(line.encode()))
    for name in RUN:
        program = ROOT / "dataset_tools" / f"{name}.py"
        if name == "merge_bin":
            for ending in (".bin", ".idx"):
                whole = tmp_path / f"P_text_document{ending}"
                shutil.copy(whole, tmp_path / f"P.shard-0-of-2_text_document{ending}")
                whole.rename(tmp_path / f"P.shard-1-of-2_text_document{ending}")
        for words in examples(docstring(program)):
            done = run_command([sys.executable, str(program), *words[2:]], tmp_path)
            assert done.returncode == 0, f"{words}: {done.stderr[-2000:]}"
    assert {"P_text_document.idx", "P_text_document_loss_mask.bin"} <= set(os.listdir(tmp_path))
