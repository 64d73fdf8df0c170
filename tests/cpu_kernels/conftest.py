"""Kernels run operator by operator here (each shape at once); test_in_graphs.py compiles them."""

import mindspore as ms
import pytest


@pytest.fixture(autouse=True)
def pynative_mode():
    ms.set_context(mode=ms.PYNATIVE_MODE, device_target="CPU")
