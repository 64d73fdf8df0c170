"""MindFormers starts without the packages of its text metrics and data loaders, and finds them when it needs them."""

import subprocess
import sys

import pytest

from mindformers_ext.later_imports import PACKAGES, LaterModule

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


def test_a_placeholder_names_the_package_that_is_missing():
    with pytest.raises(ModuleNotFoundError, match="no_such_package"):
        LaterModule("no_such_package").function()
