"""The two sides of the step benchmark: a worker process holds one of them and trains when it is told to.

Both train the same model from the same weights on the same batch: transformers' DeepseekV3ForCausalLM with torch's
fused AdamW, and ours as its YAML runs it. A worker reads lines from its standard input and answers each with a line of
JSON: a number n = train n steps; end of input = stop. `prepare` writes what the torch side starts from, so that its
process loads nothing of ours. `sgemm` measures, in the place of losses, what the machine's matrix products reach.
"""

import argparse
import json
import os
import resource
import sys
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "research/deepseek3"), str(ROOT / "tests")]

TINY_YAML = ROOT / "research/deepseek3/deepseek3_tiny/pretrain_deepseek3_tiny.yaml"
ADAMW = dict(betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
LEARNING_RATE, MAX_GRAD_NORM = 1e-3, 1.0
# What differs from the tiny YAML, by the name of the size; MTP is left out because transformers has none.
SIZES = {
    "tiny": ({}, {}),
    "small": (
        dict(hidden_size=512, num_layers=8, num_heads=8, intermediate_size=1376, seq_length=1024, kv_lora_rank=128)
        | dict(q_lora_rank=192, qk_nope_head_dim=64, qk_rope_head_dim=32, v_head_dim=64),
        dict(expert_num=64, num_experts_chosen=8, n_group=8, topk_group=4, moe_intermediate_size=128),
    ),
}


def configuration(size: str, model: dict, moe: dict):
    """Our configuration of `size` with single values of model_config and moe_config replaced."""
    import yaml
    from deepseek3_config import DeepseekV3Config

    run = yaml.safe_load(TINY_YAML.read_text())
    of_size, moe_of_size = SIZES[size]
    values = run["model"]["model_config"] | {"mtp_depth": 0, "return_extra_loss": False} | of_size | model
    values = {key: value for key, value in values.items() if key not in ("type", "auto_register")}
    return DeepseekV3Config(**values, moe_config=run["moe_config"] | moe_of_size | moe)


def step_flops(config, batch: int) -> float:
    """Floating-point operations that a training step of `batch` sequences needs."""
    from mindformers_ext.config.flops import flops_per_token

    return flops_per_token(config, config.seq_length) * batch * config.seq_length


def weights_of(config) -> dict[str, np.ndarray]:
    """Random values of every tensor of transformers' model, by its name; the same in every process."""
    from weights import name_table, to_huggingface

    rng = np.random.default_rng(0)
    tensors = {}
    for entry in name_table(config):
        value = np.ones(entry.shape, np.float32)
        if entry.ours.endswith("e_score_correction_bias"):
            value = np.zeros(entry.shape, np.float32)
        elif len(entry.shape) > 1:
            value = rng.standard_normal(entry.shape, np.float32) * np.float32(0.02)
        tensors.update(to_huggingface(entry, value))
    return tensors


def batch_of(config, batch: int) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and labels (batch, seq) int32."""
    ids = np.random.default_rng(1).integers(2, config.vocab_size, (batch, config.seq_length + 1)).astype(np.int32)
    return ids[:, :-1], ids[:, 1:]


def prepare(config, batch: int, folder: Path) -> None:
    """Write transformers' configuration, the weights and the batch into `folder`."""
    from helpers.hf_reference import hf_model
    from safetensors.numpy import save_file

    (folder / "config.json").write_text(hf_model(config).config.to_json_string(use_diff=False))
    save_file({name: np.ascontiguousarray(value) for name, value in weights_of(config).items()}, folder / "weights")
    np.savez(folder / "batch.npz", *batch_of(config, batch))


def torch_step(folder: Path):
    """Function that trains one step of transformers' model from what `prepare` wrote, and returns the loss."""
    import torch
    from safetensors.torch import load_file
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    config = DeepseekV3Config.from_json_file(folder / "config.json")
    config._attn_implementation = "sdpa"
    model = DeepseekV3ForCausalLM(config).float().train()
    model.load_state_dict(load_file(folder / "weights"))
    with np.load(folder / "batch.npz") as stored:
        ids, labels = (torch.from_numpy(stored[name]).long() for name in ("arr_0", "arr_1"))
    optimizer = torch.optim.AdamW(model.parameters(), LEARNING_RATE, **ADAMW, fused=True)

    def step() -> float:
        logits = model(ids, use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_GRAD_NORM)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step


def our_step(config, batch: int):
    """Function that trains one step of our model and returns the loss."""
    import mindspore as ms
    from deepseek3_model import DeepseekV3ForCausalLM
    from mindformers.core.optim import AdamW
    from weights import from_huggingface, name_table

    from mindformers_ext.training.wrapper import DeviceAwareTrainOneStepCell

    ms.set_context(mode=ms.GRAPH_MODE, device_target="CPU", memory_optimize_level="O1")  # as the tiny YAML
    network = DeepseekV3ForCausalLM(config)
    tensors, parameters = weights_of(config), network.parameters_dict()
    for entry in name_table(config):
        parameters[entry.ours].set_data(ms.Tensor(from_huggingface(entry, tensors.__getitem__)))
    optimizer = AdamW(network.trainable_params(), LEARNING_RATE, **ADAMW)
    cell = DeviceAwareTrainOneStepCell(network, optimizer, use_clip_grad=True, max_grad_norm=MAX_GRAD_NORM)
    cell.set_train()
    ids, labels = (ms.Tensor(x) for x in batch_of(config, batch))
    return lambda: float(cell(ids, labels)[0].asnumpy())


def sgemm_flops() -> float:
    """FLOP/s of the machine's best float32 matrix products at this moment."""
    from mindformers_ext.training.device_peak import measure_cpu_tflops

    return 1e12 * measure_cpu_tflops(int(os.environ["OMP_NUM_THREADS"]), repeats=100)


def answer_turns(step, answer) -> None:
    """Train as many steps as each line of the standard input says."""
    for line in sys.stdin:
        start, losses = time.perf_counter(), []
        for _ in range(int(line)):
            losses.append(step())
        seconds = (time.perf_counter() - start) / len(losses)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        print(json.dumps({"seconds": seconds, "losses": losses, "peak_bytes": peak}), file=answer)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("side", choices=("prepare", "torch", "ours", "sgemm"))
    parser.add_argument("--folder", type=Path, help="what `prepare` writes and `torch` reads")
    parser.add_argument("--size", default="tiny", choices=SIZES)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--model", type=json.loads, default={}, help="values of model_config that differ, as JSON")
    parser.add_argument("--moe", type=json.loads, default={}, help="values of moe_config that differ, as JSON")
    args = parser.parse_args()
    answer = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what libraries print must not mix with the answers
    if args.side in ("torch", "sgemm"):
        answer_turns(torch_step(args.folder) if args.side == "torch" else sgemm_flops, answer)
        return
    config = configuration(args.size, args.model, args.moe)
    if args.side == "ours":
        answer_turns(our_step(config, args.batch), answer)
        return
    prepare(config, args.batch, args.folder)
    print(json.dumps({"flops": step_flops(config, args.batch), "tokens": args.batch * config.seq_length}), file=answer)


if __name__ == "__main__":
    main()
