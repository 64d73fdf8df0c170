"""Dropless dispatches with buffers as long as their rows: compiled for Ascend, lowered, run by two ranks; torch."""

from pathlib import Path

import numpy as np
import pytest
import torch
from cpu_parallel.expert_exchange import EXPERTS, TOKENS, TOPK, batch

from mindformers_ext.cpu_parallel import launch
from mindformers_ext.cpu_parallel.run_rank import write_batches

TESTS = Path(__file__).parents[1]
RANKS = 2
ROUTINGS = {
    "uneven": None,
    "all choose the same experts": np.tile([5, 2, 6], (TOKENS * RANKS, 1)),
    "rank 1 is chosen by nobody": np.tile([3, 0, 2], (TOKENS * RANKS, 1)),
    "the last expert by one token only": np.array([[4, 5, 7]] + [[0, 1, 4]] * (TOKENS * RANKS - 1)),
}
FORMS = {
    "allgather": {},
    "alltoall": {"moe_token_dispatcher_type": "alltoall"},
    "bounded": {"dropless_rows": "bounded", "dropless_row_factor": 1.25},
}


def kept_rows(ids, form: dict) -> np.ndarray:
    """(T, K) bool: choices that find a row; with a bound each rank's experts take the first, by expert and token."""
    kept = np.ones(ids.shape, bool)
    if form.get("dropless_rows") != "bounded":
        return kept
    bound = int(np.ceil(form["dropless_row_factor"] * ids.size / RANKS))
    for rank in range(RANKS):
        experts = range(rank * EXPERTS // RANKS, (rank + 1) * EXPERTS // RANKS)
        places = [(token, k) for e in experts for token, k in zip(*np.nonzero(ids == e), strict=True)]
        for place in places[bound:]:
            kept[place] = False
    return kept


def expected(inputs, kept) -> list[list[float]]:
    """For each rank its loss and the digests of its gradients: a loop over tokens and their experts."""
    x, gates, ids, gate_up, down, weights = inputs
    x, gates, gate_up, down = (torch.tensor(a, requires_grad=True) for a in (x, gates, gate_up, down))
    rows = []
    for token in range(len(x)):
        parts = []
        for rank in range(TOPK):
            gate, up = (x[token] @ gate_up[ids[token, rank]]).chunk(2)
            gate_of_row = gates[token, rank] * float(kept[token, rank])
            parts.append(gate_of_row * ((torch.nn.functional.silu(gate) * up) @ down[ids[token, rank]]))
        rows.append((sum(parts) * torch.tensor(weights[token])).sum())
    sum(rows).backward()
    found = []
    for rank in range(RANKS):
        own = slice(rank * TOKENS, (rank + 1) * TOKENS)
        held = slice(rank * EXPERTS // RANKS, (rank + 1) * EXPERTS // RANKS)
        digests = [digest(a.grad[part]) for a, part in ((x, own), (gates, own), (gate_up, held), (down, held))]
        found.append([float(sum(rows[own])), *digests, float((~kept[own]).sum())])
    return found


def digest(x: torch.Tensor) -> float:
    return float(x.double().flatten() @ torch.cos(torch.arange(x.numel()).double()))


@pytest.mark.parametrize("form", FORMS)
def test_every_routing(tmp_path, form):
    path = tuple(map(str, (TESTS.parent, TESTS, TESTS.parent / "research" / "deepseek3")))
    builder = launch.Builder("cpu_parallel.expert_exchange:build", FORMS[form], path)
    launch.compile_ranks(builder, RANKS, tmp_path)
    np.savez(tmp_path / "initial.npz")
    batches = [batch(ids) for ids in ROUTINGS.values()]
    write_batches(tmp_path, batches)
    results = launch.run_ranks(tmp_path, RANKS)
    for step, (routing, inputs) in enumerate(zip(ROUTINGS, batches, strict=True)):
        found = [result["outputs"][step] for result in results]
        kept = kept_rows(inputs[2], FORMS[form])
        np.testing.assert_allclose(found, expected(inputs, kept), rtol=2e-4, atol=2e-4, err_msg=routing)
