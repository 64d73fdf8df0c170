"""What turns conversations into samples, asked for by a tool's command line or by a YAML; both give the same files."""

import contextlib
import fcntl
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Any

from mindformers_ext.bin_dataset import index_cache
from mindformers_ext.bin_dataset.chat_template import DEEPSEEK_V3, NEEDED, ChatTemplate
from mindformers_ext.bin_dataset.conversations import LEARN, read_conversations
from mindformers_ext.bin_dataset.indexed_dataset import smallest_dtype
from mindformers_ext.bin_dataset.pipeline import Job, run
from mindformers_ext.bin_dataset.shapes import PACKING, TRUNCATION, Pack
from mindformers_ext.bin_dataset.text_sources import find_inputs
from mindformers_ext.bin_dataset.tokenizer import TextTokenizer
from mindformers_ext.bin_dataset.tokenizer_files import TokenizerError


@dataclass(frozen=True)
class ConversationOptions:
    """How conversations are rendered, learnt, cut and packed."""

    seq_length: int  # tokens of a sample
    pad_token: str | None = None  # fills samples; None: the tokenizer's pad_token
    chat_template: str | None = None  # a Jinja file; None: the tokenizer's own, or DeepSeek-V3's
    template_arguments: dict[str, object] = field(default_factory=dict)  # what else the template reads
    learn: str = "all"  # of LEARN
    truncation: str = "cut"  # of TRUNCATION
    packing: str = "best"  # of PACKING
    ignore_keys: Sequence[str] = ()  # keys of rows and turns that say nothing to the model

    def __post_init__(self) -> None:
        for name, known in (("learn", LEARN), ("truncation", TRUNCATION), ("packing", PACKING)):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, got {getattr(self, name)!r}")

    def job_fields(self, tokenizer: TextTokenizer) -> dict[str, Any]:
        """The fields of a Job that they decide."""
        template = ChatTemplate.of(tokenizer.path, self.chat_template, **self.template_arguments)
        missing = [name for name in NEEDED if name not in tokenizer.special_ids]
        if template.source == DEEPSEEK_V3 and missing:
            raise TokenizerError(
                f"{tokenizer.path} comes without a chat template, and lacks the tokens {missing} of DeepSeek-V3's; "
                "name a Jinja file with --chat-template"
            )
        pad = tokenizer.special_id("pad", self.pad_token)
        return {
            "read": read_conversations,
            "read_options": {
                "template": {"source": template.source, "variables": template.variables},
                "learn": self.learn,
                "ignored": sorted(self.ignore_keys),
            },
            "shape": partial(Pack, self.seq_length, pad, self.truncation, self.packing),
        }


def tokenized(config: Mapping[str, Any], seq_length: int, folder: str | None = None) -> str:
    """Prefix of the samples of a YAML's ``conversations``: made by the first process that asks, kept in the cache.

    ``config`` has ``input`` (files, patterns or hf:// names), ``tokenizer`` and fields of ConversationOptions.
    """
    known = {"input", "tokenizer", *(item.name for item in fields(ConversationOptions))} - {"seq_length"}
    unknown, missing = sorted(config.keys() - known), sorted({"input", "tokenizer"} - config.keys())
    if unknown or missing:
        what = f"{unknown[0]} is unknown" if unknown else f"{missing[0]} is missing"
        raise ValueError(f"config.conversations.{what}; known keys are {', '.join(sorted(known))}")
    given = [config["input"]] if isinstance(config["input"], str) else list(config["input"])
    options = ConversationOptions(
        seq_length, **{key: value for key, value in config.items() if key not in ("input", "tokenizer")}
    )
    inputs = find_inputs(given)
    cache = Path(folder or index_cache.default_folder(inputs[0]))
    facts = json.dumps([inputs, str(config["tokenizer"]), asdict(options)], sort_keys=True)
    prefix = cache / f"conversations-{hashlib.sha256(facts.encode()).hexdigest()[:16]}"
    cache.mkdir(parents=True, exist_ok=True)
    with open(f"{prefix}.lock", "w") as file, contextlib.closing(TextTokenizer(config["tokenizer"])) as tokenizer:
        fcntl.flock(file, fcntl.LOCK_EX)
        job = Job(
            tool="conversations",
            inputs=tuple(inputs),
            prefix=str(prefix),
            tokenizer=tokenizer,
            dtype=smallest_dtype(tokenizer.vocab_size),
            arguments=dict(config),
            **options.job_fields(tokenizer),
        )
        run(job)
    return job.output(job.keys[0])
