"""A toy task that the model must learn: one batch by heart."""

import numpy as np
from deepseek3_model import DeepseekV3ForCausalLM
from helpers.small_models import v3_config
from mindspore import Tensor, nn


def test_one_batch_is_learnt_by_heart():
    config = v3_config(
        mtp_depth=1,
        initializer_range=0.05,
        moe=dict(balance_via_topk_bias=True, topk_bias_update_rate=0.001),
    )
    network = DeepseekV3ForCausalLM(config)
    step = nn.TrainOneStepCell(network, nn.Adam(network.trainable_params(), 5e-3))
    step.set_train()
    ids = np.random.default_rng(0).integers(2, config.vocab_size, (2, config.seq_length + 1)).astype(np.int32)
    inputs, labels = Tensor(ids[:, :-1]), Tensor(ids[:, 1:])
    for _ in range(120):
        step(inputs, labels)
        network.update_topk_bias()
    network.set_train(False)
    assert network(inputs, labels).asnumpy() < 0.1
