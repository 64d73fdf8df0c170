"""A training step of two V3 layers on one H100, put together from the operators that were measured there one by one.

The layers are torch's own operators, none fused. What is not measured by itself is counted in the bytes that it moves,
at the rate of the measured copy: T tokens, H hidden, N heads, bfloat16 where it is not said.
"""

import json
from pathlib import Path

DATA = Path(__file__).parent / "h100_v3_operators.json"
T, H, N, EXPERT_ROWS = 4096, 7168, 128, 32768
STEP = "step tp1 ep8 2 layers"


def measured_and_estimated() -> tuple[float, float]:
    """Milliseconds of forward and backward pass together."""
    data = json.loads(DATA.read_text())
    step = data[STEP]
    return step["fwd_bwd_ms"], step["layers"] * (forward_ms(data) + backward_ms(data))


def forward_ms(data: dict) -> float:
    """One layer's forward pass."""
    query, value, rotary, rows, experts = T * N * 192, T * N * 128, T * N * 64, T * H, EXPERT_ROWS * H
    moved = (
        2 * 4 * rows + 4 * T * (1536 + 512)  # norms
        + rotary * ROTARY
        + 2 * 4 * query  # queries and keys put together
        + 2 * (value + query)  # values padded to 192
        + 4 * value  # and cut, and turned
        + 3 * 6 * rows  # sums
        + 6 * rows  # the router's float32 input
        + 4 * experts  # rows times gates
        + 6 * experts + 2 * rows  # index_add
        + 10 * T * 2048  # the shared expert's SwiGLU
    )  # fmt: skip
    return (
        products_ms(data) + attention(data)["fwd_ms"] + grouped(data)["fwd_ms"] + gather_ms(data) + copied(data, moved)
    )


def backward_ms(data: dict) -> float:
    """One layer's backward pass: a slice's gradient fills a whole tensor, and gradients of one tensor are added."""
    query, value, rotary, rows, experts = T * N * 192, T * N * 128, T * N * 64, T * H, EXPERT_ROWS * H
    keys = T * N * 256  # and values, as kv_b makes them
    moved = (
        2 * 6 * rows  # norms
        + rotary * ROTARY
        + 2 * (2 * query + 2 * query) + 6 * query  # two slices of the queries
        + 2 * (2 * keys + 2 * keys) + 6 * keys  # two of keys and values
        + 4 * query  # what was put together
        + 4 * value + 2 * query + 4 * value  # values
        + 2 * rotary  # the shared key
        + 3 * 4 * rows + 3 * 6 * rows  # sums
        + 2 * 6 * rows  # the router
        + 4 * experts + 6 * experts  # gates
        + 2 * experts + 6 * experts  # gathered rows added up
        + 20 * T * 2048
    )  # fmt: skip
    made = 2 * products_ms(data) + attention(data)["bwd_ms"] + grouped(data)["bwd_ms"]
    return made + gather_ms(data) + copied(data, moved)


# Bytes of a value: to float32 (6), four products of halves from strided values (16), sums (12), joined (8), cast (6).
ROTARY = 48


def products_ms(data: dict) -> float:
    """The projections and the shared expert, forward."""
    shapes = ("q_a 4096x7168x1536", "q_b 4096x1536x24576", "kv_a 4096x7168x576", "kv_b 4096x512x32768")
    found = [data["matmul"][name]["ms"] for name in (*shapes, "o 4096x16384x7168")]
    router = 2 * T * H * 256 / FLOAT32_FLOPS * 1e3
    return sum(found) + 3 * data["matmul"]["shared_up 4096x7168x2048"]["ms"] + router


FLOAT32_FLOPS = 60e12  # of torch without TF32, of 67e12 that the device has


def attention(data: dict) -> dict:
    """Of 128 heads with values padded to 192: torch's first choice."""
    return data["attention"]["FLASH_ATTENTION N128 dv192"]


def grouped(data: dict) -> dict:
    """The routed experts."""
    return data["grouped_swiglu"]["h7168 f2048 32768/32"]


def gather_ms(data: dict) -> float:
    """Rows of the experts."""
    return data["memory_bound"]["gather 65536 rows"]["ms"] * EXPERT_ROWS / 65536


def copied(data: dict, moved: float) -> float:
    """Milliseconds to move bytes."""
    return moved / data["memory_bound"]["copy"]["gb_s"] / 1e6
