"""Compare a HuggingFace folder, run by transformers, with one of our checkpoints: logits, KL and greedy tokens.

    python scripts/compare_hf.py --hf_dir HF_DIR --checkpoint CHECKPOINT --prompts "Hello" "def f(x):"

--checkpoint is a HuggingFace folder, a folder of convert_weight.py or a checkpoint of a training run; the model is
built from HF_DIR's config.json. Both run in float32 on CPU. Needs torch and transformers; without a tokenizer in the
folder, random token ids stand for the prompts.

transformers 4.57 leaves DeepSeek's own code in two places, which then show here: it masks losing expert groups with 0,
which wins over negative biased scores, and leaves out V2's YaRN temperature.
"""

import argparse
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "research/deepseek3")]

from mindformers_ext.errors import ConfigError, exit_code_of  # noqa: E402 (after the project is on the path)

TOKENIZERS = ("tokenizer.*", "*.tiktoken", "tiktoken.model", "vocab.*", "spiece.model")  # files of a tokenizer
RANDOM_TOKENS = 24
PROMPTS = ["The assert statement", "What is a list?"]


def import_reference():
    """torch and transformers, which only this script needs."""
    try:
        import torch
        import transformers
    except ImportError as error:
        raise ConfigError(f"{error.name} is missing: pip install torch transformers==4.57.1") from None
    return torch, transformers


class Reference:
    """The folder as transformers runs it."""

    def __init__(self, folder: Path):
        torch, transformers = import_reference()
        self.torch = torch
        named = any(file for pattern in TOKENIZERS for file in folder.glob(pattern))
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(folder) if named else None
        self.model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    def tokens(self, prompt: str, number: int) -> list[int]:
        """Ids of a prompt; without a tokenizer random ones, the same for the same number."""
        if self.tokenizer:
            return self.tokenizer.encode(prompt)
        vocab = self.model.config.vocab_size
        return np.random.default_rng(number).integers(0, vocab, RANDOM_TOKENS).tolist()

    def logits(self, tokens: list[int]) -> np.ndarray:
        """(S, V) float32."""
        with self.torch.no_grad():
            return self.model(self.torch.tensor([tokens])).logits[0].numpy()


class Ours:
    """Our model with a checkpoint, operator by operator, so that any length runs without compiling."""

    def __init__(self, hf_dir: Path, checkpoint: Path):
        import mindspore as ms
        from deepseek2_model import DeepseekV2ForCausalLM
        from deepseek3_model import DeepseekV3ForCausalLM
        from hf_config import config_from_hf, read_config

        from mindformers_ext.sharded_checkpoint.reader import open_source
        from mindformers_ext.training.checkpoint_monitor import load_weights
        from mindformers_ext.training.pretrained import HuggingFaceFolder, is_huggingface, resolve

        ms.set_context(mode=ms.PYNATIVE_MODE, device_target="CPU")
        self.tensor = lambda tokens: ms.Tensor([tokens], ms.int32)
        config = config_from_hf(read_config(hf_dir), 0, hf_dir / "config.json")
        config.compute_dtype = "float32"
        model = DeepseekV3ForCausalLM if config.model_type == "deepseekv3" else DeepseekV2ForCausalLM
        self.network = model(config).set_train(False)
        folder = HuggingFaceFolder(checkpoint, "--checkpoint")
        load_weights(
            self.network, resolve(folder if is_huggingface(checkpoint) else open_source(checkpoint), self.network)
        )

    def logits(self, tokens: list[int]) -> np.ndarray:
        """(S, V) float32."""
        return self.network(self.tensor(tokens)).asnumpy()[0]


def greedy(model: Reference | Ours, tokens: list[int], count: int) -> list[int]:
    """The next `count` most likely tokens, each after those before."""
    tokens = list(tokens)
    for _ in range(count):
        tokens.append(int(model.logits(tokens)[-1].argmax()))
    return tokens[-count:] if count else []


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """log p of the last axis, float64."""
    shifted = logits.astype(np.float64) - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def compare(theirs: np.ndarray, ours: np.ndarray) -> tuple[float, float]:
    """Largest difference of logits (S, V), and mean KL(theirs || ours) in nats per token."""
    p, q = log_softmax(theirs), log_softmax(ours)
    return float(np.abs(theirs - ours).max()), float((np.exp(p) * (p - q)).sum(-1).mean())


def run(arguments: list[str] | None = None) -> bool:
    """Print the comparison of every prompt; True when all greedy tokens are the same."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hf_dir", type=Path, required=True)
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--prompts", nargs="+", default=PROMPTS)
    parser.add_argument("--tokens", type=int, default=16, help="greedy tokens to compare (default 16)")
    args = parser.parse_args(arguments)
    reference, ours = Reference(args.hf_dir), Ours(args.hf_dir, args.checkpoint)
    same = True
    if not reference.tokenizer:
        print(f"{args.hf_dir} has no tokenizer: {RANDOM_TOKENS} random token ids stand for each prompt")
    for number, prompt in enumerate(args.prompts):
        tokens = reference.tokens(prompt, number)
        difference, kl = compare(reference.logits(tokens), ours.logits(tokens))
        first, second = greedy(reference, tokens, args.tokens), greedy(ours, tokens, args.tokens)
        same &= first == second
        print(f"{prompt!r}: logits differ by at most {difference:.2e}, KL {kl:.2e} nats per token")
        print(f"  transformers {first}\n  ours         {second}{'' if first == second else '   DIFFERENT'}")
    return same


if __name__ == "__main__":
    sys.exit(exit_code_of(lambda: 0 if run() else 1))  # 0: the same greedy tokens, 1: others, 2: bad input
