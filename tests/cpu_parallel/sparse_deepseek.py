"""small_deepseek as DeepSeek-V3.2: an indexer in each layer, attention over the keys that it selects."""

from functools import partial

from cpu_parallel import small_deepseek
from cpu_parallel.small_deepseek import data  # noqa: F401
from deepseek32_model import DeepseekV32ForCausalLM
from helpers.small_models import v32_config

from mindformers_ext.cpu_parallel.verify import Layout

V32 = dict(config_of=v32_config, network=DeepseekV32ForCausalLM)
SEQUENCE = {"model_parallel": 2, "use_seq_parallel": True}
LAYOUTS = [
    Layout("dp2-mp2-sparse", {"parallel": {"data_parallel": 2, **SEQUENCE, "expert_parallel": 2}}, world_size=4),
    Layout("cp2-sparse", {"parallel": {"context_parallel": 2}}, world_size=2),
]
build = partial(small_deepseek.build, **V32)
build_single = partial(small_deepseek.build_single, **V32)
