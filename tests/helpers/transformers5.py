"""transformers 5 as an oracle: ours pins 4.57 through MindFormers, so 5 lives in a folder of its own.

As a program, run by `reference` with that folder first on Python's path, it writes a small random model of a family,
and what transformers 5 makes of it: logits, loss and the gradient of every parameter.
"""

import os
import subprocess
import sys
from pathlib import Path

VERSION = "5.24.0"
FOLDER = Path(__file__).resolve().parents[2] / ".cache" / f"transformers-{VERSION}"
SMALL = dict(
    vocab_size=160,
    hidden_size=48,
    intermediate_size=80,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=4,
    q_lora_rank=32,
    kv_lora_rank=24,
    qk_nope_head_dim=16,
    qk_rope_head_dim=8,
    v_head_dim=20,
    max_position_embeddings=64,
    bos_token_id=0,
    eos_token_id=1,
    rope_parameters={"rope_type": "default", "rope_theta": 1e6},
)
EXPERTS = dict(
    n_routed_experts=8, num_experts_per_tok=3, n_shared_experts=1, moe_intermediate_size=20, routed_scaling_factor=1.8
)


def installed() -> Path:
    """The folder of transformers 5, installed once."""
    if not (FOLDER / "transformers").is_dir():
        partial = FOLDER.with_name(f"{FOLDER.name}.{os.getpid()}")
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--target", str(partial), f"transformers=={VERSION}"]
        subprocess.run(pip, check=True, stderr=subprocess.DEVNULL)
        partial.rename(FOLDER)
    return FOLDER


def reference(family: str, folder: Path) -> Path:
    """A HuggingFace folder of a small random model, with oracle.npz beside its weights."""
    environment = os.environ | {"PYTHONPATH": str(installed())}
    subprocess.run([sys.executable, __file__, family, str(folder)], check=True, env=environment)
    return folder


def write(family: str, folder: Path) -> None:
    """What the program does."""
    import numpy as np
    import torch
    import transformers

    assert transformers.__version__ == VERSION
    if family == "glm4_moe_lite":
        model = transformers.Glm4MoeLiteForCausalLM(transformers.Glm4MoeLiteConfig(**SMALL, **EXPERTS))
    elif family.startswith("deepseek_v32"):
        topk = 8 if family.endswith("sparse") else 64
        indexer = dict(
            index_n_heads=16, index_head_dim=20, index_topk=topk, first_k_dense_replace=1, n_group=4, topk_group=2
        )
        model = transformers.DeepseekV32ForCausalLM(transformers.DeepseekV32Config(**SMALL, **EXPERTS, **indexer))
    else:
        model = transformers.YoutuForCausalLM(transformers.YoutuConfig(**SMALL))
    torch.manual_seed(3)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        with torch.no_grad():
            if name.endswith("e_score_correction_bias"):
                tensor.uniform_(-0.1, 0.1)
            elif "inv_freq" not in name:
                torch.nn.init.normal_(tensor, std=0.05) if tensor.dim() > 1 else torch.nn.init.uniform_(
                    tensor, 0.5, 1.5
                )
    model = model.float().train()
    model.set_attn_implementation("eager")
    ids = torch.from_numpy(np.random.default_rng(5).integers(2, SMALL["vocab_size"], (2, 25)))
    logits = model(ids[:, :-1]).logits
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
    loss.backward()
    model.save_pretrained(folder)
    gradients = {f"gradient.{name}": p.grad.numpy() for name, p in model.named_parameters() if p.grad is not None}
    arrays = {"ids": ids.numpy(), "logits": logits.detach().numpy(), "loss": loss.item()}
    np.savez(folder / "oracle.npz", **arrays, **gradients)


if __name__ == "__main__":
    write(sys.argv[1], Path(sys.argv[2]))
