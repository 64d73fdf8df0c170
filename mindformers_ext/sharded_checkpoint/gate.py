"""Is a state worth going on from? Every rank says what it holds of it; the first rank judges before it gives the name.

A checkpoint that is not healthy is kept as `unhealthy_step_N`, and `latest` goes on naming the last healthy one.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from mindformers_ext.files.finite import BITS, all_finite
from mindformers_ext.sharded_checkpoint.layout import Piece, is_weight

NORMS = "embedding_norms"  # of Meta.health
REMEMBERED = 10  # healthy checkpoints whose embedding says what is usual
BIASES = ("e_score_correction_bias", "expert_bias")  # of the models here, and of whoever names it shorter


@dataclass
class Gate:
    """What a healthy state is.

    Args:
        embedding_norm_factor: the norm of the embedding is between the usual one divided by this and times this.
        max_expert_bias: the biases of a router lie no further from their mean; None: they may.
    """

    embedding_norm_factor: float
    max_expert_bias: float | None = None

    def reasons(self, parts: Iterable[Mapping[str, Any]], health: dict[str, list[float]]) -> list[str]:
        """Why the state of which the ranks told `parts` is not healthy; if it is, `health` learns its norm."""
        bad: list[str] = []
        squares: dict[str, float] = {}
        spread = {}
        for part in parts:
            bad += [f"{name} is not finite" for name in part["not_finite"]]
            squares |= part["embedding_squares"]
            spread |= part["bias_spread"]
        for name, value in spread.items():
            if self.max_expert_bias is not None and value > self.max_expert_bias:
                bad.append(f"{name} is {value:.4g} off its mean, more than max_expert_bias {self.max_expert_bias}")
        norm, known = math.sqrt(sum(squares.values())), health.get(NORMS, [])
        usual = sum(known) / len(known) if known else norm
        if not usual / self.embedding_norm_factor <= norm <= usual * self.embedding_norm_factor:
            bad.append(f"the embedding's norm is {norm:.4g}, usual is {usual:.4g}")
        if not bad:
            health[NORMS] = [*known, norm][-REMEMBERED:]
        return sorted(set(bad))


def facts(pieces: Mapping[str, Piece]) -> dict[str, Any]:
    """What one rank holds of a state, as far as the gate asks."""
    own = {name: piece for name, piece in pieces.items() if piece.slot.copy == 0}
    weights = {name: piece.array for name, piece in own.items() if is_weight(name, own)}
    return {
        "not_finite": [n for n, piece in own.items() if piece.array.dtype in BITS and not all_finite(piece.array)],
        "embedding_squares": {
            f"{name} {own[name].slot.ranges}": sum_of_squares(array)
            for name, array in weights.items()
            if "embed" in name
        },
        "bias_spread": {
            name: float(np.abs(array - array.mean()).max()) for name, array in weights.items() if name.endswith(BIASES)
        },
    }


def sum_of_squares(array: np.ndarray) -> float:
    """In float64, without a copy of the whole."""
    flat = np.ascontiguousarray(array).reshape(-1)
    parts = (flat[begin : begin + (1 << 20)].astype(np.float64) for begin in range(0, len(flat), 1 << 20))
    return float(sum(np.dot(part, part) for part in parts))
