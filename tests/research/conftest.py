"""These tests run what trains: graph mode on CPU."""

import mindspore as ms
import pytest


@pytest.fixture(autouse=True)
def graph_mode():
    """Compile networks, as every YAML does (MindSpore's own default is PyNative)."""
    ms.set_context(mode=ms.GRAPH_MODE, device_target="CPU")
