"""docs/corpus.md, run on small text by datatrove's executors: raw, filtered, .bin. Needs datatrove (and ray)."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers import slurm
from helpers.tools import bytes_of

from mindformers_ext.bin_dataset.indexed_dataset import IndexedDataset
from mindformers_ext.bin_dataset.tokenizer import TextTokenizer

pytest.importorskip("datatrove", reason="pip install datatrove ray, in an environment of its own")
pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs/corpus.md").read_text(encoding="utf-8")
GOOD = "the training of a model and the data that it reads have to be in order, with the tokens of every layer."


@pytest.fixture
def folder(tokenizer_file, tmp_path):
    """raw/ with documents that the filter keeps and drops, and tokenizer.json."""
    (tmp_path / "raw").mkdir()
    for number in range(7):
        texts = [f"{GOOD} Part {i} of {number}." if i % 3 else "buy #### now" for i in range(40 * (number + 1))]
        (tmp_path / f"raw/{number}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    (tmp_path / "tokenizer.json").write_bytes(Path(tokenizer_file).read_bytes())
    config = {"eos_token": "<｜end▁of▁sentence｜>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    return tmp_path


def program(folder, **changes):
    """The page's program, with other words."""
    text = re.search(r"```python\n(.*?)```", PAGE, re.S).group(1)
    for old, new in changes.items():
        text = re.sub(rf"\b{old}\b", new, text)
    path = folder / f"pipeline{len(list(folder.glob('pipeline*')))}.py"
    path.write_text(text)
    return path


def run(path, folder, environment=os.environ):
    environment = dict(environment, PYTHONPATH=str(ROOT))
    done = subprocess.run([sys.executable, str(path)], cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


def merged(folder):
    """The page's commands of the last section."""
    block = PAGE[PAGE.index("## One corpus") :]
    for line in re.search(r"```bash\n(.*?)```", block, re.S).group(1).strip().splitlines():
        words = [str(ROOT / word) if word.endswith(".py") else word for word in shlex.split(line)]
        subprocess.run([sys.executable, *words[1:]], cwd=folder, check=True, capture_output=True)
    return bytes_of(folder / "clean/P_text_document")


def test_the_page_makes_the_corpus(folder):
    run(program(folder), folder)
    merged(folder)
    tokenizer = TextTokenizer(folder / "tokenizer.json", fast=False)
    texts = [tokenizer.decode(ids) for ids in IndexedDataset(folder / "clean/P_text_document")]
    expected = [f"{GOOD} Part {i} of {n}.<｜end▁of▁sentence｜>" for n in range(7) for i in range(40 * (n + 1)) if i % 3]
    assert sorted(texts) == sorted(expected)


def test_killed_workers_and_one_machine_give_the_same_bytes(folder):
    run(program(folder, workers="workers", logs="logs1"), folder)
    expected = merged(folder)
    for path in (folder / "clean").iterdir():
        path.unlink()
    path = program(folder, logs="logs2")
    path.write_text(path.read_text().replace("workers=2", "workers=4"))
    environment = dict(os.environ, PYTHONPATH=str(ROOT))
    for seconds in (3, 5, 7):
        process = subprocess.Popen(
            [sys.executable, str(path)], cwd=folder, env=environment, start_new_session=True,
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        time.sleep(seconds)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    run(path, folder)
    assert merged(folder) == expected


def test_slurm(folder):
    """datatrove's own job scripts, started by tests/helpers/slurm.py."""
    run(program(folder, logs="logs1"), folder)
    expected = merged(folder)
    for path in (folder / "clean").iterdir():
        path.unlink()
    path = program(folder, LocalPipelineExecutor="SlurmPipelineExecutor", logs="logs2")
    path.write_text(path.read_text().replace("workers=2", 'workers=2, time="1:00:00", partition="cpu"'))
    (folder / "bin").mkdir()
    run(path, folder, slurm.install(folder / "bin"))
    assert merged(folder) == expected


def test_ray_with_four_workers(folder):
    pytest.importorskip("ray")
    run(program(folder, logs="logs1"), folder)
    expected = merged(folder)
    for path in (folder / "clean").iterdir():
        path.unlink()
    path = program(folder, LocalPipelineExecutor="RayPipelineExecutor", logs="logs2")
    text = (
        path.read_text()
        .replace("workers=2", "workers=4")
        .replace(
            'if __name__ == "__main__":\n', 'if __name__ == "__main__":\n    import ray\n\n    ray.init(num_cpus=4)\n'
        )
    )
    for name in ("raw", "clean/P", "tokenizer.json", "logs2"):
        text = text.replace(f'"{name}"', f'"{folder / name}"')
    path.write_text(text)
    run(path, folder)
    assert merged(folder) == expected
