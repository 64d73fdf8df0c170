"""Continue a text with a model that keeps no key/value cache; every token recomputes the whole sequence.

MindFormers 1.9.0's generate() needs incremental inference operators of Ascend. A trained checkpoint is tried out
here; serving belongs to engines such as vLLM.
"""

from collections.abc import Callable

import numpy as np


def pick_token(
    logits: np.ndarray,
    rng: np.random.Generator | None = None,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
) -> int:
    """Choose the next token from logits (V,): the largest without `rng`, else a sample.

    Args:
        temperature: divides the logits; below 1 sharpens.
        top_k: keep the k most likely tokens; 0 keeps all.
        top_p: keep the most likely tokens that together reach this probability.
    """
    if rng is None or temperature == 0:
        return int(logits.argmax())
    logits = logits.astype(np.float64) / temperature
    order = np.argsort(-logits, kind="stable")
    probabilities = np.exp(logits[order] - logits.max())
    probabilities /= probabilities.sum()
    if top_k:
        probabilities[top_k:] = 0
    probabilities[np.cumsum(probabilities) - probabilities >= top_p] = 0  # the first token always stays
    return int(order[rng.choice(len(order), p=probabilities / probabilities.sum())])


def generate(
    forward: Callable[[np.ndarray], np.ndarray],
    prompt: list[int],
    seq_length: int,
    eos_token_id: int,
    max_new_tokens: int,
    choose: Callable[[np.ndarray], int],
) -> list[int]:
    """Return the new tokens after `prompt`, up to eos_token_id, max_new_tokens or the end of the context.

    Args:
        forward: logits (1, S, V) of tokens (1, S) int32, S always seq_length so that the graph compiles once.
        choose: next token from logits (V,), see pick_token.
    """
    tokens = np.full((1, seq_length), eos_token_id, np.int32)
    tokens[0, : len(prompt)] = prompt
    end = min(len(prompt) + max_new_tokens, seq_length)
    for position in range(len(prompt), end):
        tokens[0, position] = choose(forward(tokens)[0, position - 1])
        if tokens[0, position] == eos_token_id:
            return tokens[0, len(prompt) : position].tolist()
    return tokens[0, len(prompt) : end].tolist()
