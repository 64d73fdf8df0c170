"""Every generator goes on where it stood, after a way through JSON."""

import json
import random

import mindspore as ms
import numpy as np

from mindformers_ext.sharded_checkpoint.random_state import random_state, restore_random_state


def draw() -> list:
    """A few numbers of every generator; the normal one keeps a spare value."""
    return [np.random.rand(3).tolist(), np.random.randn(), random.random(), random.gauss(0, 1)]


def test_generators_go_on() -> None:
    draw()
    ms.manual_seed(7)
    text = json.dumps(random_state())
    expected = [draw(), draw()]
    assert expected[0] != expected[1]
    ms.manual_seed(8)
    restore_random_state(json.loads(text))
    assert [draw(), draw()] == expected
    assert random_state()["mindspore"] == json.loads(text)["mindspore"]
    ms.manual_seed(8)
    assert random_state()["mindspore"] != json.loads(text)["mindspore"]
