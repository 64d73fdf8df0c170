"""MindFormers starts without the packages of its text metrics and data loaders, and finds them when it needs them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from mindformers_ext.later_imports import PACKAGES, LaterModule

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = f"""
import sys
import mindformers_ext
import mindformers
early = set({PACKAGES!r}) & set(sys.modules)
assert not early, early

from mindformers.core.metric import metric
from mindformers.dataset.dataloader import hf_dataloader, training_dataloader
words = "a router chooses few experts".split()
assert metric.sentence_bleu([words], words) == 1.0
import pyarrow
assert isinstance(pyarrow.table({{"x": [1]}}), training_dataloader.Table)
assert not isinstance(words, training_dataloader.Table)
assert len(hf_dataloader.datasets.Dataset.from_dict({{"x": [1, 2]}})) == 2
import nltk
assert nltk.__file__
print("found them all")
"""


def test_mindformers_imports_its_rare_packages_when_it_uses_them():
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True)
    assert "found them all" in done.stdout, done.stderr[-3000:]


def test_a_converter_says_nothing_of_mindformers_and_leaves_no_log(tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "LOG_MF_PATH"}
    command = [sys.executable, ROOT / "research/deepseek3/convert_weight.py", "--help"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.stdout.startswith("usage: convert_weight.py") and done.stderr == ""
    assert list(tmp_path.iterdir()) == []


def test_a_placeholder_names_the_package_that_is_missing():
    with pytest.raises(ModuleNotFoundError, match="no_such_package"):
        LaterModule("no_such_package").function()
