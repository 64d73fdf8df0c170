"""GRPO (arXiv 2402.03300) in small: a tiny DeepSeek-V3 learns to write what a reward likes, on one CPU in minutes.

    python research/deepseek3/rl/grpo.py --steps 40 --seed 0

Three parts, as in every such system: transformers generates (with its cache), a function rewards, and our model learns;
after each step the generating model gets the new weights tensor by tensor, without a file. A split model streams the
same way: every rank goes through huggingface_tensors, and the first hands them on.
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn, ops

ROOT = Path(__file__).resolve().parents[3]
sys.path[:0] = [str(ROOT), str(ROOT / "research/deepseek3")]

from deepseek3_config import DeepseekV3Config  # noqa: E402 (after the project is on the path)
from deepseek3_model import DeepseekV3ForCausalLM  # noqa: E402
from hf_config import config_to_hf  # noqa: E402
from hf_stream import huggingface_tensors  # noqa: E402

from mindformers_ext.errors import exit_code_of  # noqa: E402

PROMPTS, GROUP = 8, 8  # prompts of a step, and completions of each, which are compared with one another
PROMPT, COMPLETION = 4, 12  # tokens
LIMIT, KL = 0.2, 0.02  # how far a ratio may go, and the weight of the distance to the first model
BETTER = 1e-4  # keeps a group of equal rewards from dividing by zero


def tiny_config() -> DeepseekV3Config:
    """Every part of DeepSeek-V3, 64 tokens."""
    return DeepseekV3Config(
        seq_length=PROMPT + COMPLETION,
        hidden_size=64,
        num_layers=2,
        num_heads=4,
        intermediate_size=128,
        kv_lora_rank=32,
        q_lora_rank=32,
        qk_rope_head_dim=8,
        qk_nope_head_dim=16,
        v_head_dim=16,
        vocab_size=64,
        compute_dtype="float32",
        initializer_range=0.05,
        mtp_depth=0,
        moe_config=dict(
            expert_num=8,
            num_experts_chosen=2,
            shared_expert_num=1,
            moe_intermediate_size=32,
            first_k_dense_replace=1,
            use_gmm=True,
        ),
    )


def even_share(completions: np.ndarray) -> np.ndarray:
    """A reward that anybody can check: the share of even tokens, 0.5 by chance. (N,) <- (N, T)."""
    return (completions % 2 == 0).mean(1)


class Rollout:
    """The generating side: transformers' model, float32."""

    def __init__(self, config: DeepseekV3Config):
        import torch
        from transformers import DeepseekV3Config as HfConfig
        from transformers import DeepseekV3ForCausalLM as HfModel

        values = config_to_hf(config, 0, "float32")
        self.torch = torch
        self.model = HfModel(HfConfig(**{k: v for k, v in values.items() if k != "torch_dtype"})).float().eval()
        self.tensors = dict(self.model.named_parameters()) | dict(self.model.named_buffers())

    def update(self, stream) -> None:
        """Take new weights, one tensor at a time."""
        with self.torch.no_grad():
            for name, value in stream:
                self.tensors[name].copy_(self.torch.from_numpy(value))

    def generate(self, prompts: np.ndarray) -> np.ndarray:
        """Prompts (N, P) with sampled completions, (N, P + T)."""
        ids = self.torch.from_numpy(prompts).long()
        options = dict(do_sample=True, top_k=0, top_p=1.0, temperature=1.0, eos_token_id=None)
        options |= dict(attention_mask=self.torch.ones_like(ids), max_new_tokens=COMPLETION, min_new_tokens=COMPLETION)
        with self.torch.no_grad():
            return self.model.generate(ids, **options).numpy()


class TokenLogProbs(nn.Cell):
    """log p of every token of the completion: (N, T) <- ids (N, P + T)."""

    def __init__(self, network: nn.Cell):
        super().__init__(auto_prefix=False)  # weights keep their names
        self.network = network

    def construct(self, ids):
        logits = self.network(ids)[:, PROMPT - 1 : -1]
        chosen = ops.gather_elements(logits, 2, ids[:, PROMPT:].reshape(ids.shape[0], COMPLETION, 1))
        return chosen.reshape(ids.shape[0], COMPLETION) - ops.logsumexp(logits, -1)


class Loss(nn.Cell):
    """GRPO's (eq. 3): clipped ratios times advantages, and the distance to the first model (eq. 4)."""

    def __init__(self, network: nn.Cell):
        super().__init__(auto_prefix=False)
        self.log_probs = TokenLogProbs(network)

    def construct(self, ids, advantages, old, first):
        new = self.log_probs(ids)
        ratio = ops.exp(new - old)
        gain = ops.minimum(ratio * advantages, ops.clip(ratio, 1 - LIMIT, 1 + LIMIT) * advantages)
        further = first - new
        return -(gain - KL * (ops.exp(further) - further - 1)).mean()


def advantages_of(rewards: np.ndarray) -> np.ndarray:
    """Each reward against the others of its prompt, (N, 1) in units of their deviation."""
    groups = rewards.reshape(PROMPTS, GROUP)
    centred = groups - groups.mean(1, keepdims=True)
    return (centred / (groups.std(1, keepdims=True) + BETTER)).reshape(-1, 1).astype(np.float32)


def train(steps: int, seed: int, reward: Callable[[np.ndarray], np.ndarray] = even_share, say=print) -> list[float]:
    """Returns the mean reward of every step."""
    rng = np.random.default_rng(seed)
    ms.set_context(mode=ms.GRAPH_MODE, device_target="CPU")
    ms.set_seed(seed)
    config = tiny_config()
    network = DeepseekV3ForCausalLM(config).set_train(True)
    rollout = Rollout(config)
    rollout.torch.manual_seed(seed)
    rollout.update(huggingface_tensors(network, config))
    log_probs, loss = TokenLogProbs(network), Loss(network)
    first_model = DeepseekV3ForCausalLM(config).set_train(False)
    ms.load_param_into_net(first_model, {p.name: p for p in network.get_parameters()}, strict_load=True)
    first_log_probs = TokenLogProbs(first_model)
    optimizer = nn.Adam(network.trainable_params(), learning_rate=3e-3)
    step_of = ms.value_and_grad(loss, None, optimizer.parameters)
    rewards = []
    for step in range(steps):
        prompts = rng.integers(0, config.vocab_size, (PROMPTS, PROMPT)).repeat(GROUP, 0)
        ids = rollout.generate(prompts)
        scores = reward(ids[:, PROMPT:])
        tokens = Tensor(ids.astype(np.int32))
        old, first = Tensor(log_probs(tokens).asnumpy()), Tensor(first_log_probs(tokens).asnumpy())
        for _ in range(2):  # steps on the same completions, which the clipped ratio is for
            value, gradients = step_of(tokens, Tensor(advantages_of(scores)), old, first)
            optimizer(gradients)
        rollout.update(huggingface_tensors(network, config))
        rewards.append(float(scores.mean()))
        say(f"step {step + 1}, reward {rewards[-1]:.3f}, loss {float(value):.4f}")
    return rewards


def main(argv: list[str] | None = None) -> None:
    """Parse and train."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(argv)
    rewards = train(options.steps, options.seed)
    print(f"mean reward {np.mean(rewards[:3]):.3f} -> {np.mean(rewards[-3:]):.3f}")


if __name__ == "__main__":
    sys.exit(exit_code_of(main))
