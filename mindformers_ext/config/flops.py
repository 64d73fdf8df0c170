"""Training FLOPs of a token, counted honestly: matmuls that run, causal attention once (facts 16)."""


def flops_per_token(config, seq_length: int) -> float:
    """Forward and backward FLOPs per token: 3 x 2 x multiply-adds; embedding look-ups and recompute not counted.

    250.4e9 for DeepSeek-V3 at 4096 without MTP, 260.6e9 with it.
    """
    layers = config.num_layers + config.mtp_depth
    macs = sum(attention_macs(config, seq_length) + ffn_macs(config, layer) for layer in range(layers))
    macs += config.vocab_size * config.hidden_size * (1 + config.mtp_depth)
    macs += 2 * config.hidden_size**2 * config.mtp_depth  # eh_proj
    if config.warms_up:  # only the indexers have a backward pass
        return 2.0 * macs + 4.0 * layers * indexer_macs(config, seq_length)
    return 6.0 * macs


def attention_macs(config, seq_length: int) -> int:
    """Multiply-adds per token of one MLA: projections, and products with half of the sequence on average.

    With selected keys the products with these, and the indexer's.
    """
    heads, hidden = config.num_heads, config.hidden_size
    query = heads * config.qk_head_dim
    if config.q_lora_rank is None:
        projections = hidden * query
    else:
        projections = config.q_lora_rank * (hidden + query)
    projections += hidden * (config.kv_lora_rank + config.qk_rope_head_dim)
    projections += config.kv_lora_rank * heads * (config.qk_nope_head_dim + config.v_head_dim)
    projections += heads * config.v_head_dim * hidden
    per_key = heads * (config.qk_head_dim + config.v_head_dim)
    if not config.has_indexer:
        return projections + per_key * seq_length // 2
    most = seq_length if config.warms_up else min(config.index_topk, seq_length)
    seen = most * (2 * seq_length - most) // (2 * seq_length)  # the first `most` queries see half of it on average
    return projections + per_key * seen + indexer_macs(config, seq_length)


def indexer_macs(config, seq_length: int) -> int:
    """Multiply-adds per token of one lightning indexer: projections, and products with every key before."""
    heads, width = config.index_n_heads, config.index_head_dim
    projections = config.q_lora_rank * heads * width + config.hidden_size * (width + heads)
    return projections + heads * (width + 1) * seq_length // 2


def ffn_macs(config, layer: int) -> int:
    """Multiply-adds per token of one FFN: dense, or router, K routed and the shared experts."""
    if not config.is_moe_layer(layer):
        return 3 * config.hidden_size * config.intermediate_size
    moe = config.moe_config
    active = moe.num_experts_chosen + moe.shared_expert_num
    return config.hidden_size * (moe.expert_num + 3 * moe.moe_intermediate_size * active)
