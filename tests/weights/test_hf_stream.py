"""A training model's weights, streamed to the model that generates: without a file, whole from split ranks."""

import importlib.util
import sys
from types import SimpleNamespace

import mindspore as ms
import numpy as np
import pytest
import torch
from collectives.rank_processes import results, run_ranks
from deepseek3_model import DeepseekV3ForCausalLM
from helpers.command_line import ROOT
from helpers.hf_reference import hf_model, hf_tensors
from helpers.small_models import v3_config
from hf_stream import huggingface_tensors
from mindspore import Tensor, nn
from weights import name_table

from mindformers_ext.errors import ConfigError
from mindformers_ext.sharded_checkpoint import live
from mindformers_ext.sharded_checkpoint.layout import Piece, Slot


@pytest.fixture
def operator_by_operator():
    ms.set_context(mode=ms.PYNATIVE_MODE, device_target="CPU")


def update(engine: torch.nn.Module, stream) -> set[str]:
    """As an engine does that is running."""
    tensors, seen = hf_tensors(engine), set()
    with torch.no_grad():
        for name, value in stream:
            tensors[name].copy_(torch.from_numpy(value))
            seen.add(name)
    return seen


def test_an_engine_follows_the_training_between_two_steps(operator_by_operator):
    config = v3_config(mtp_depth=1)
    network, engine = DeepseekV3ForCausalLM(config), hf_model(config).eval()
    ids = np.random.default_rng(0).integers(0, 128, (2, config.seq_length)).astype(np.int32)
    optimizer = nn.Adam(network.trainable_params(), learning_rate=1e-2)
    step = ms.value_and_grad(network.set_train(True), None, optimizer.parameters)
    before = None
    for _ in range(2):
        assert update(engine, huggingface_tensors(network, config)) == hf_tensors(engine).keys()
        logits = engine(torch.from_numpy(ids).long()).logits.detach().numpy()
        np.testing.assert_allclose(network.set_train(False)(Tensor(ids)).asnumpy(), logits, atol=1e-4)
        assert before is None or abs(logits - before).max() > 1e-2
        before = logits
        optimizer(step(Tensor(ids), Tensor(ids))[1])


RANKS = 4
SHAPES = {"even.weight": (8, 6), "experts": (4, 3, 4), "second_stage": (5,), "copied": (3, 2)}


def whole(name: str) -> np.ndarray:
    return np.random.default_rng(len(name)).standard_normal(SHAPES[name]).astype(np.float32)


def held(rank: int) -> dict[str, Piece]:
    """dp2 mp2 over two stages' worth of names: halves of two dimensions, one on two ranks only, one copied."""

    def piece(name: str, ranges, copy=0) -> Piece:
        array = whole(name)[tuple(slice(*bounds) for bounds in ranges)]
        return Piece(array, Slot(SHAPES[name], ranges, copy))

    row, column = divmod(rank, 2)
    pieces = {
        "even.weight": piece("even.weight", ((4 * row, 4 * row + 4), (3 * column, 3 * column + 3))),
        "experts": piece("experts", ((rank, rank + 1), (0, 3), (0, 4))),
        "copied": piece("copied", ((0, 3), (0, 2)), rank),
    }
    return pieces | ({"second_stage": piece("second_stage", ((0, 5),), rank - 2)} if row else {})


def test_split_weights_are_whole_and_exact_on_every_rank(monkeypatch):
    monkeypatch.setattr(live, "pieces_of", lambda network: held(network.rank))

    def of_rank(rank: int, size: int):
        network = SimpleNamespace(rank=rank, job=SimpleNamespace(world_size=size), stored=None)
        weights = live.LiveWeights(network, SHAPES)
        parts = {name: weights.read(name)[:] for name in weights.names()}
        return parts, weights.read("experts")[1:3, :, 2:4]

    for parts, part in results(run_ranks(RANKS, of_rank)):
        for name, array in parts.items():
            np.testing.assert_array_equal(array, whole(name))
        np.testing.assert_array_equal(part, whole("experts")[1:3, :, 2:4])


def test_no_more_than_one_tensor_is_held(monkeypatch):
    """What is gathered for a tensor is that tensor: of stacked experts one matrix."""
    config = v3_config()
    gathered = []

    def add(array):
        gathered.append(array.size)
        return array

    monkeypatch.setattr(live, "pieces_of", lambda _: {})
    monkeypatch.setattr(live, "is_lowered", lambda _: False)
    monkeypatch.setattr(live, "is_split", lambda: True)
    monkeypatch.setattr(live.LiveWeights, "__init__", with_sum(live.LiveWeights.__init__, add))
    sizes = [value.size for _, value in huggingface_tensors(None, config)]
    assert gathered == sizes
    expert = config.hidden_size * config.moe_config.moe_intermediate_size
    assert sizes.count(expert) >= 3 * config.moe_config.expert_num
    assert max(sizes) < max(np.prod(entry.shape) for entry in name_table(config))


def with_sum(initialise, add):
    def both(self, *arguments):
        initialise(self, *arguments)
        self.add = add

    return both


def test_a_wrapper_that_renames_the_weights_is_a_sentence(operator_by_operator):
    config = v3_config()

    class Wrapper(nn.Cell):
        def __init__(self, network):
            super().__init__()
            self.network = network

    network = DeepseekV3ForCausalLM(config)
    Wrapper(network)
    with pytest.raises(ConfigError, match="embed_tokens.weight: the network has no such weight; make the cells"):
        next(huggingface_tensors(network, config))


def test_adapters_are_not_streamed():
    lora = {"lora_rank": 4, "target_modules": ["o_proj"]}
    with pytest.raises(ConfigError, match="adapters are not merged while they train"):
        next(huggingface_tensors(None, v3_config(pet_config=lora)))


@pytest.mark.slow
def test_grpo_raises_the_reward(monkeypatch):
    spec = importlib.util.spec_from_file_location("grpo", ROOT / "research/deepseek3/rl/grpo.py")
    grpo = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "grpo", grpo)  # MindSpore's parser imports it by name
    spec.loader.exec_module(grpo)
    rewards = grpo.train(30, 0, say=lambda _: None)
    assert np.mean(rewards[:3]) < 0.6 and np.mean(rewards[-3:]) > 0.8, rewards
