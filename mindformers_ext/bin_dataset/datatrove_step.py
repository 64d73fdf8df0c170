"""A step of datatrove's pipelines (its local, Slurm and Ray executors) that ends in Megatron .bin/.idx files.

Each task writes one shard, ``P.shard-00003-of-00100_text_document``; `dataset_tools/merge_bin.py` joins them. A task
that was killed leaves no shard, and datatrove starts it again; a shard depends on the task's documents alone.

datatrove needs numpy 2 and MindSpore needs numpy 1, so a pipeline runs in an environment of its own, where this project
lies in PYTHONPATH: nothing here imports MindSpore.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing

from datatrove.data import Document, DocumentsPipeline
from datatrove.pipeline.base import PipelineStep

from mindformers_ext.bin_dataset.cli import shard_prefix
from mindformers_ext.bin_dataset.indexed_dataset import smallest_dtype
from mindformers_ext.bin_dataset.pipeline import Job, write_documents
from mindformers_ext.bin_dataset.text_sources import BLOCK, Batch
from mindformers_ext.bin_dataset.tokenizer import TextTokenizer


class MegatronWriter(PipelineStep):
    """Tokenise the documents of every task; ``prefix`` is a path or an address (s3://...), P of the shards.

    ``append_eod`` and ``add_bos`` are those of jsonl_to_bin.py, and so are the bytes.
    """

    name = "Megatron .bin/.idx"
    type = "TOKENIZER"

    def __init__(self, prefix: str, tokenizer: str, append_eod: bool = False, add_bos: bool = False) -> None:
        super().__init__()
        self.prefix = prefix
        self.tokenizer = tokenizer
        self.append_eod = append_eod
        self.add_bos = add_bos

    def run(self, data: DocumentsPipeline, rank: int = 0, world_size: int = 1) -> DocumentsPipeline:
        """Write the shard of one task, and count in datatrove's statistics."""
        with closing(TextTokenizer(self.tokenizer)) as tokenizer, self.track_time():
            job = Job(
                tool="datatrove",
                inputs=(),
                prefix=shard_prefix(self.prefix, rank, world_size),
                tokenizer=tokenizer,
                dtype=smallest_dtype(tokenizer.vocab_size),
                eod=tokenizer.special_id("eod") if self.append_eod else None,
                bos=tokenizer.special_id("bos") if self.add_bos else None,
                shard=(rank, world_size),
            )
            counts = write_documents(job, _batches(data))
        for name in ("documents", "empty_documents", "sequences", "tokens"):
            self.stat_update(name, value=getattr(counts, name))
        yield from ()


def _batches(data: Iterator[Document]) -> Iterator[Batch]:
    """About as many characters at once as the tools read bytes."""
    texts: list[str] = []
    size = 0
    for document in data:
        texts.append(document.text)
        size += len(document.text)
        if size >= BLOCK:
            yield Batch({"text": texts}, size)
            texts, size = [], 0
    yield Batch({"text": texts}, size)
