"""Log-probabilities of given completions (run_mode score): JSONL in, JSONL out, several completions packed in a row.

A line has `prompt` and `completion`, texts, or `prompt_ids` and `completion_ids`, token ids. It comes back with
`completion_ids`, `token_logprobs` (natural logarithms, one for each token of the completion) and `logprob`, their sum.
"""

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from mindformers_ext.errors import ConfigError
from mindformers_ext.files.atomic import whole_file

IDS = ("prompt_ids", "completion_ids")
TEXTS = ("prompt", "completion")


@dataclass(frozen=True)
class Line:
    """One line of the input, as tokens."""

    content: dict[str, Any]
    prompt: list[int]
    completion: list[int]

    @property
    def tokens(self) -> list[int]:
        """Of both."""
        return self.prompt + self.completion


def read_lines(path: Path, tokenizer: Tokenizer | None, vocab_size: int, seq_length: int) -> Iterator[Line]:
    """The lines of a file. Raises ConfigError that names the line that cannot be scored."""
    with path.open(encoding="utf-8") as stream:
        for number, text in enumerate(stream, 1):
            if not text.strip():
                continue
            where = f"{path}, line {number}"
            try:
                content = json.loads(text)
            except ValueError as error:
                raise ConfigError(f"{where}: is not JSON ({error})") from None
            prompt, completion = tokens_of(content, tokenizer, where)
            if not prompt or not completion:
                raise ConfigError(f"{where}: prompt and completion must have a token each")
            if len(prompt) + len(completion) > seq_length:
                raise ConfigError(
                    f"{where}: has {len(prompt) + len(completion)} tokens, but model_config.seq_length is {seq_length}"
                )
            wrong = [token for token in prompt + completion if not 0 <= token < vocab_size]
            if wrong:
                raise ConfigError(f"{where}: token id {wrong[0]} is not below vocab_size {vocab_size}")
            yield Line(content, prompt, completion)


def tokens_of(content: Any, tokenizer: Tokenizer | None, where: str) -> tuple[list[int], list[int]]:
    """Prompt and completion as ids; only the prompt gets what a tokenizer puts before a text."""
    if isinstance(content, dict) and all(key in content for key in IDS):
        found = tuple(content[key] for key in IDS)
        if all(isinstance(ids, list) and all(type(token) is int for token in ids) for ids in found):
            return found
        raise ConfigError(f"{where}: {' and '.join(IDS)} must be lists of token ids")
    if not isinstance(content, dict) or not all(isinstance(content.get(key), str) for key in TEXTS):
        raise ConfigError(f"{where}: needs the texts {' and '.join(TEXTS)}, or {' and '.join(IDS)}")
    if tokenizer is None:
        raise ConfigError(f"{where}: has texts, which need processor.tokenizer.tokenizer_file; or give {IDS[0]}")
    prompt, completion = (content[key] for key in TEXTS)
    return tokenizer.encode(prompt).ids, tokenizer.encode(completion, add_special_tokens=False).ids


def packed(lines: Iterable[Line], rows: int, seq_length: int) -> Iterator[list[list[Line]]]:
    """Batches of rows of lines, in the order of the file."""
    batch: list[list[Line]] = [[]]
    room = seq_length
    for line in lines:
        if len(line.tokens) > room:
            if len(batch) == rows:
                yield batch
                batch = []
            batch.append([])
            room = seq_length
        batch[-1].append(line)
        room -= len(line.tokens)
    if batch[0]:
        yield batch


def inputs_of(batch: list[list[Line]], rows: int, seq_length: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """ids and positions (B, S), and where lines end (B, S / 2), filled up with S: no line sees another."""
    ids, positions = np.zeros((2, rows, seq_length), np.int32)
    ends = np.full((rows, seq_length // 2), seq_length, np.int32)  # a line has two tokens at least
    for row, lines in enumerate(batch):
        start = 0
        for number, line in enumerate(lines):
            end = start + len(line.tokens)
            ids[row, start:end], positions[row, start:end] = line.tokens, np.arange(end - start)
            ends[row, number] = start = end
    return ids, positions, ends


def scores(
    forward: Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray],
    lines: Iterable[Line],
    rows: int,
    seq_length: int,
) -> Iterator[tuple[Line, np.ndarray]]:
    """(line, log-probabilities of its completion's tokens); `forward` gives logits (B, S, V)."""
    for batch in packed(lines, rows, seq_length):
        logits = forward(*inputs_of(batch, rows, seq_length))
        for row, of_row in enumerate(batch):
            start = 0
            for line in of_row:
                first, end = start + len(line.prompt), start + len(line.tokens)
                yield line, log_probabilities(logits[row, first - 1 : end - 1], np.asarray(line.completion))
                start = end


def log_probabilities(logits: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    """log p of tokens (T,) by logits (T, V), in nats."""
    shifted = (logits - logits.max(-1, keepdims=True)).astype(np.float64)
    return shifted[np.arange(len(tokens)), tokens] - np.log(np.exp(shifted).sum(-1))


def write_scores(results: Iterable[tuple[Line, np.ndarray]], output: Path) -> tuple[int, int, float]:
    """Write every line with its scores; returns lines, tokens and the sum of the log-probabilities."""
    count, tokens, total = 0, 0, 0.0
    with whole_file(output) as temporary, temporary.open("w", encoding="utf-8") as stream:
        for line, logprobs in results:
            values = [round(float(value), 6) for value in logprobs]
            own = {
                "completion_ids": line.completion,
                "token_logprobs": values,
                "logprob": round(float(logprobs.sum()), 6),
            }
            stream.write(json.dumps(line.content | own, ensure_ascii=False) + "\n")
            count, tokens, total = count + 1, tokens + len(values), total + float(logprobs.sum())
    return count, tokens, total
