"""Calls into sanitized builds of our extensions: all that must be refused, and random legal ones."""

import importlib.util
import sys
from functools import partial

import numpy as np


def load(name: str, path: str):
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def refused(call, *arguments) -> None:
    try:
        call(*arguments)
    except (ValueError, IndexError, TypeError, MemoryError):
        return
    raise SystemExit(f"not refused: {call} {arguments}")


def with_one_wrong(call, legal: dict, wrong: dict) -> None:
    """The legal call returns; with each of the wrong values in its place it is refused."""
    call(**legal)
    for name, values in wrong.items():
        for value in values:
            refused(partial(call, **legal | {name: value}))


def blends(builder) -> None:
    legal = {"weights": np.array([0.3, 0.7]), "size": 100, "sizes": np.array([50, 50])}
    nan, inf, least, most = float("nan"), float("inf"), np.iinfo(np.int64).min, np.iinfo(np.int64).max
    with_one_wrong(
        builder.build_blend_indices,
        legal,
        {
            "weights": [np.array(pair) for pair in ([nan, 1], [0.5, nan], [inf, 1], [-inf, 1], [-0.5, 1], [1], [])],
            "size": [101, -1, least],
            "sizes": [np.array(pair) for pair in ([50, 49], [-1, 200], [0, 0], [least, most], [100], [1, 1, 98])],
        },
    )
    for size in (0, 1, 1000):
        index, samples = builder.build_blend_indices(np.array([1e308, 0, 1e-308]), size, np.empty(0, np.int64))
        assert len(index) == len(samples) == size and (size == 0 or index.min() >= 0)


def indices(builder) -> None:
    state = np.random.RandomState(3).get_state()
    lengths, none = np.array([5, 0, 300, 7, 1], np.int32), np.empty(0, np.int32)
    legal = {"lengths": lengths, "begin": 0, "end": 5, "epochs": 3, "separate_final": True, "sequence_length": 16}
    legal |= {"extra": 1, "samples": 50, "samples_first": 30, "key": state[1], "position": state[2], "threads": 2}
    big = 2**62
    with_one_wrong(
        builder.build_gpt_indices,
        legal,
        {
            "lengths": [
                np.array([5, -1, 3, 2, 1], np.int32),
                lengths[:4],
                none,
                lengths.astype(np.int64),
            ],
            "begin": [-1, 5, 6, -big],
            "end": [0, 6, big],
            "epochs": [0, -1, big],
            "sequence_length": [0, -1, big],
            "extra": [-1, big],
            "samples": [-1, 29, big, 2**63 - 1],
            "samples_first": [-1, 51],
            "key": [state[1][:623], np.empty(0, np.uint32)],
            "position": [-1, 625, 2**31 - 1],
            "threads": [0, -1, 2**31 - 1],
        },
    )
    for seed in range(50):
        random = np.random.default_rng(seed)
        count, epochs = int(random.integers(1, 40)), int(random.integers(1, 5))
        legal |= {"lengths": random.integers(0, 90, count).astype(np.int32), "end": count, "epochs": epochs}
        legal |= {"samples": 30 * epochs, "samples_first": 20, "threads": int(random.integers(1, 5))}
        builder.build_gpt_indices(**legal)


def reads(builder) -> None:
    for source in (np.uint8, np.int8, np.int16, np.uint16, np.int32, np.int64):
        size, width = np.dtype(source).itemsize, 9
        legal = {"tokens": np.arange(20).astype(source), "pointers": np.array([0, 8 * size]), "extra": 1, "pad": 3}
        legal |= {"lengths": np.array([8, 12], np.int32), "documents": np.array([1, 0, 1], np.int32), "threads": 2}
        legal |= {"places": np.array([[0, 10, 1, 4], [0, 0, 0, 7]]), "out": np.zeros((2, width), np.int32)}
        legal["out"] = legal["out"].astype(np.int64 if source is np.int64 else np.int32)
        least, most = np.iinfo(np.int64).min, np.iinfo(np.int64).max
        places = [np.array([[0, 0, 0, 4]] * 2)]
        for column in range(4):
            for value in (least, -2, 13, most, most - 1):
                wrong = np.array([[0, 10, 1, 4], [0, 10, 1, 4]])
                wrong[1, column] = value
                places.append(wrong)
        with_one_wrong(
            builder.read_samples,
            legal,
            {
                "tokens": [legal["tokens"][:19], legal["tokens"][:0]],
                "pointers": [np.array([0, pointer]) for pointer in (-1, 8 * size + 1, least, most, 10**9)],
                "lengths": [np.array([8, 13], np.int32), np.array([-8, -1], np.int32), np.array([8], np.int32)],
                "documents": [np.array([2, 0, 1], np.int32), np.array([-1, 0, 1], np.int32), np.empty(0, np.int32)],
                "places": places[1:] + [np.zeros((1, 4), np.int64), np.zeros((2, 3), np.int64), np.zeros(8, np.int64)],
                "extra": [-1, 20, 2**62],
                "out": [np.zeros((2, 5), legal["out"].dtype), np.zeros(18, legal["out"].dtype)],
                "threads": [0, -1, 2**31 - 1],
            },
        )


def transposes(module) -> None:
    for kind in (np.uint16, np.float32):
        for rows in (0, 1, 7, 8, 65, 130):
            for columns in (0, 1, 5, 16, 67):
                value, place = (
                    np.arange(rows * columns).astype(kind).reshape(rows, columns),
                    np.zeros((columns, rows), kind),
                )
                module.transpose_into(place, value)
                assert (place == value.T).all()
        wide = np.zeros((9, 40), kind)
        module.transpose_into(wide[:, 3:10], np.ones((7, 9), kind))
        assert wide.sum() == 63 and (wide[:, 3:10] == 1).all()
        module.transpose_into(wide[::-1, 3:10], np.ones((7, 9), kind))
        square = np.zeros((6, 6), kind)
        foreign = np.dtype(kind).newbyteorder()
        for value in (square, square[::-1], square.astype(foreign), np.zeros(36, kind), np.zeros((6, 6, 1), kind)):
            refused(module.transpose_into, square, value)
        for value in (np.zeros((6, 7), kind), np.zeros((6, 12), kind)[:, ::2], np.zeros((6, 6), np.float64)):
            refused(module.transpose_into, square, value)


def finite(module) -> None:
    for kind in (np.uint8, np.uint16, np.uint32, np.uint64):
        half = int(np.iinfo(kind).max) >> 1  # every bit below the highest
        for size in (0, 1, 4095, 4096, 4097):
            odd = np.zeros(size * np.dtype(kind).itemsize + 1, np.uint8)[1:].view(kind)
            assert not module.any_has_all(odd, half)
            odd[-1:] = half
            assert module.any_has_all(odd, half) == (size > 0)
        for wrong in (np.zeros(9, kind)[::2], np.zeros(9, np.int32), np.zeros(9, np.float32)):
            refused(module.any_has_all, wrong, half)


builder = load("_index_builder", sys.argv[1])
blends(builder)
indices(builder)
reads(builder)
transposes(load("_transpose", sys.argv[2]))
finite(load("_finite", sys.argv[3]))
print("all calls ran")
