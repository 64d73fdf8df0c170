"""The arithmetic that a parallel strategy must satisfy, checked in a moment, before anything is compiled.

Each rule yields a Violation whose sentence states the rule, both numbers and the nearest legal values. The layout is
that of research/deepseek3/sharding.py: the devices of a stage form a grid (dp, cp, mp) for dense layers and
(edp, ep) with edp * ep = dp * cp * mp for experts.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from math import gcd

from mindformers_ext.config.run_plan import RunPlan
from mindformers_ext.config.yaml_files import lookup, short
from mindformers_ext.errors import ConfigError


@dataclass(frozen=True)
class Violation:
    """A rule that a plan breaks; `key` is the YAML key to change."""

    key: str
    sentence: str


def check_plan(plan: RunPlan) -> list[Violation]:
    """Every rule that `plan` breaks; empty when it is legal."""
    return [violation for rule in RULES for violation in rule(plan)]


def refuse_illegal(plan: RunPlan) -> None:
    """Raise ConfigError that names the file, key, value and rule of the first violation, if there is one."""
    for violation in check_plan(plan):
        value = short(lookup(plan.config, violation.key))
        raise ConfigError(f"{plan.path}: {violation.key} is {value}, but {violation.sentence}")


def nearest(value: int, legal: Callable[[int], bool], limit: int) -> list[int]:
    """The closest legal numbers at or below and above `value`, within 1..limit."""
    below = next((n for n in range(min(value, limit), 0, -1) if legal(n)), None)
    above = next((n for n in range(value + 1, limit + 1) if legal(n)), None)
    return [n for n in (below, above) if n is not None]


def divisors_near(value: int, of: int) -> str:
    """'nearest legal: 4 or 8', the divisors of `of` around `value`."""
    return _near(nearest(value, lambda n: of % n == 0, of))


def _near(values: list[int]) -> str:
    return f"nearest legal: {' or '.join(map(str, values))}" if values else "no value is legal"


def device_product(plan: RunPlan) -> Iterator[Violation]:
    product = plan.dp * plan.cp * plan.mp * plan.pp
    if product == plan.device_num:
        return
    rest = plan.cp * plan.mp * plan.pp
    options = {}
    for key, field in (("data_parallel", "dp"), ("pipeline_stage", "pp"), ("model_parallel", "mp")):
        value = getattr(plan, field)
        if plan.device_num % (product // value) == 0:
            changed = replace(plan, **{field: plan.device_num * value // product})
            if not [*stages_within_layers(changed), *widths_over_model_parallel(changed)]:
                options[key] = getattr(changed, field)
    hint = " or ".join(f"{key}: {value}" for key, value in options.items())
    if not hint:
        below = plan.device_num // rest * rest
        hint = f"a device number that is a multiple of {rest}, for example {below or rest} or {below + rest}"
    yield Violation(
        "parallel_config.data_parallel",
        f"data_parallel x context_parallel x model_parallel x pipeline_stage must equal the number of devices, but "
        f"{plan.dp} x {plan.cp} x {plan.mp} x {plan.pp} = {product} and there are {plan.device_num}; "
        f"nearest legal: {hint}",
    )


def whole_servers(plan: RunPlan) -> Iterator[Violation]:
    if plan.device_num % 8 and plan.device_num not in (1, 2, 4):
        yield Violation(
            "parallel_config.data_parallel",
            f"MindSpore splits over 1, 2, 4 or a multiple of 8 devices, but there are {plan.device_num}; "
            f"{_near(nearest(plan.device_num, lambda n: n % 8 == 0 or n in (1, 2, 4), plan.device_num + 8))}",
        )


def expert_parallel_in_stage(plan: RunPlan) -> Iterator[Violation]:
    stage = plan.devices_per_stage
    if stage % plan.ep:
        common = gcd(stage, plan.model.moe_config.expert_num)
        yield Violation(
            "parallel_config.expert_parallel",
            f"expert_parallel must divide the devices of a stage, data_parallel x context_parallel x model_parallel, "
            f"but {plan.ep} does not divide {stage}; {divisors_near(plan.ep, common)}",
        )


def experts_over_expert_parallel(plan: RunPlan) -> Iterator[Violation]:
    experts = plan.model.moe_config.expert_num
    if experts % plan.ep:
        yield Violation(
            "parallel_config.expert_parallel",
            f"expert_parallel must divide moe_config.expert_num, so that every rank holds as many experts, but "
            f"{plan.ep} does not divide {experts}; {divisors_near(plan.ep, gcd(experts, plan.devices_per_stage))}",
        )


def widths_over_model_parallel(plan: RunPlan) -> Iterator[Violation]:
    model, moe = plan.model, plan.model.moe_config
    widths = {
        "num_heads": (model.num_heads, "attention heads lie on model_parallel"),
        "vocab_size": (model.vocab_size, "the rows of the output head lie on model_parallel"),
    }
    if any(not model.is_moe_layer(i) for i in range(model.layers_in_all)):
        widths["intermediate_size"] = (model.intermediate_size, "the dense FFN's width lies on model_parallel")
    if moe.expert_num > 1 and moe.shared_expert_num:
        width = moe.shared_expert_num * moe.moe_intermediate_size
        widths["moe_intermediate_size"] = (width, "the shared experts' width lies on model_parallel")
    common = gcd(*(width for width, _ in widths.values()))
    for key, (width, why) in widths.items():
        if width % plan.mp:
            yield Violation(
                "parallel_config.model_parallel",
                f"model_parallel must divide {key}, because {why}, but {plan.mp} does not divide {width}; "
                f"{divisors_near(plan.mp, common)}",
            )


def experts_need_sequence_parallel(plan: RunPlan) -> Iterator[Violation]:
    if plan.mp > 1 and plan.model.moe_config.expert_num > 1 and not plan.sequence_parallel:
        yield Violation(
            "parallel_config.use_seq_parallel",
            f"model_parallel is {plan.mp} and expert_num {plan.model.moe_config.expert_num}: MindFormers trains "
            "experts together with model parallelism only when use_seq_parallel is True",
        )


def sequence_over_devices(plan: RunPlan) -> Iterator[Violation]:
    on_mp = plan.sequence_parallel or plan.model.moe_config.expert_num > 1
    ways = plan.cp * (plan.mp if on_mp else 1)
    length = plan.model.seq_length
    if length % ways:
        why = "tokens lie on context_parallel x model_parallel" if on_mp else "tokens lie on context_parallel"
        product = f"{plan.cp} x {plan.mp} = {ways}" if on_mp else f"{ways}"
        below = length // ways * ways
        legal = [n for n in (below, below + ways) if n]
        yield Violation(
            "model.model_config.seq_length",
            f"{why}, so {product} must divide seq_length, but {length} is not a multiple of {ways}; {_near(legal)}",
        )


def capacity_groups(plan: RunPlan) -> Iterator[Violation]:
    moe = plan.model.moe_config
    if moe.expert_num == 1 or moe.use_gmm or not moe.expert_group_size:
        return
    tokens = plan.batch_size * plan.model.seq_length // (plan.cp * plan.mp)
    if tokens > moe.expert_group_size and tokens % moe.expert_group_size:
        yield Violation(
            "moe_config.expert_group_size",
            f"capacity is counted over groups that stay on one device, so expert_group_size must divide the tokens of "
            f"a device, batch_size x seq_length / (context_parallel x model_parallel), but {moe.expert_group_size} "
            f"does not divide {tokens}; {divisors_near(moe.expert_group_size, tokens)}",
        )


def experts_per_token(plan: RunPlan) -> Iterator[Violation]:
    moe = plan.model.moe_config
    if moe.num_experts_chosen > moe.expert_num:
        yield Violation(
            "moe_config.num_experts_chosen",
            f"a token can choose at most expert_num experts, but num_experts_chosen is {moe.num_experts_chosen} and "
            f"expert_num is {moe.expert_num}; {_near([moe.expert_num])}",
        )
    if moe.expert_num % moe.n_group:
        yield Violation(
            "moe_config.n_group",
            f"n_group must divide expert_num, but {moe.n_group} does not divide {moe.expert_num}; "
            f"{divisors_near(moe.n_group, moe.expert_num)}",
        )
    elif moe.topk_group and not 1 <= moe.topk_group <= moe.n_group:
        yield Violation(
            "moe_config.topk_group",
            f"a token chooses topk_group of n_group groups, but topk_group is {moe.topk_group} and n_group is "
            f"{moe.n_group}; {_near([min(max(moe.topk_group, 1), moe.n_group)])}",
        )


def stages_within_layers(plan: RunPlan) -> Iterator[Violation]:
    if plan.pp > plan.model.num_layers:
        yield Violation(
            "parallel_config.pipeline_stage",
            f"every stage needs a layer, but pipeline_stage is {plan.pp} and num_layers is {plan.model.num_layers}; "
            f"{_near(nearest(plan.model.num_layers, lambda n: plan.device_num % n == 0, plan.model.num_layers))}",
        )


def micro_batches_fill_stages(plan: RunPlan) -> Iterator[Violation]:
    if plan.micro_batches < plan.pp:
        yield Violation(
            "parallel_config.micro_batch_num",
            f"the pipeline needs at least as many micro-batches as stages, but micro_batch_num is "
            f"{plan.micro_batches} and pipeline_stage is {plan.pp}; {_near([plan.pp])}",
        )


def offset_list(plan: RunPlan) -> Iterator[Violation]:
    offset, layers, pp = plan.model.offset, plan.model.num_layers, plan.pp
    if not isinstance(offset, list):
        return
    base, rest = divmod(layers, pp)
    even = [1] * rest + [0] * (pp - rest)
    if len(offset) != pp:
        yield Violation(
            "model.model_config.offset",
            f"offset needs one number per pipeline stage, but has {len(offset)} and pipeline_stage is {pp}; "
            f"nearest legal: {even}",
        )
    elif sum(offset) != rest:
        yield Violation(
            "model.model_config.offset",
            f"stage i holds num_layers // pipeline_stage + offset[i] = {base} + offset[i] layers, which must sum to "
            f"num_layers = {layers}, but the offsets sum to {sum(offset)} instead of {rest} and give "
            f"{base * pp + sum(offset)} layers; nearest legal: {even}",
        )
    for stage, count in enumerate(plan.layers_per_stage):
        if count < 1:
            yield Violation(
                "model.model_config.offset",
                f"every stage needs a layer, but stage {stage} holds {base} + ({count - base}) = {count}; "
                f"nearest legal: offset[{stage}] = {1 - base}",
            )


def recompute_lists(plan: RunPlan) -> Iterator[Violation]:
    if len(plan.layers_per_stage) != plan.pp:
        return  # an offset list of another length: its own rule speaks
    held_by_stage = [len(plan.layers_of(stage)) for stage in range(plan.pp)]
    for key, value in (("recompute", plan.recompute), ("select_recompute", plan.select_recompute)):
        if not isinstance(value, list):
            continue
        if len(value) != plan.pp:
            yield Violation(
                f"recompute_config.{key}",
                f"{key} needs one number of layers per pipeline stage, but has {len(value)} and pipeline_stage is "
                f"{plan.pp}; nearest legal: a list of {plan.pp} numbers up to {held_by_stage}",
            )
            continue
        for stage, (asked, held) in enumerate(zip(value, held_by_stage, strict=True)):
            if not 0 <= asked <= held:
                yield Violation(
                    f"recompute_config.{key}",
                    f"{key}[{stage}] must lie between 0 and the layers of stage {stage}, but is {asked} and the stage "
                    f"holds {held}; {_near([min(max(asked, 0), held)])}",
                )


def plain_pipeline(plan: RunPlan) -> Iterator[Violation]:
    if lookup(plan.config, "parallel.pipeline_config.pipeline_interleave"):
        yield Violation(
            "parallel.pipeline_config.pipeline_interleave",
            "interleaving needs several runs of layers in a stage (MindSpore's Cell.pipeline_segment), and this model "
            "gives every stage one run; nearest legal: False",
        )


def optimizer_shards(plan: RunPlan) -> Iterator[Violation]:
    size, stage = plan.optimizer_shard_size, plan.devices_per_stage
    if plan.shard_optimizer and size != -1 and (size < 1 or stage % size):
        yield Violation(
            "parallel.parallel_optimizer_config.optimizer_weight_shard_size",
            f"optimizer_weight_shard_size must divide the devices of a stage, data_parallel x context_parallel x "
            f"model_parallel, or be -1 for all of a weight's copies, but {size} does not divide {stage}; "
            f"{divisors_near(max(size, 1), stage)}",
        )


def dataset_strategy(plan: RunPlan) -> Iterator[Violation]:
    """One sentence for all entries: they are usually wrong together."""
    if not isinstance(plan.dataset_strategy, list | tuple):
        return
    for index, axes in enumerate(plan.dataset_strategy):
        if axes[0] != plan.dp:
            legal = [[plan.dp, *axes[1:]] for axes in plan.dataset_strategy]
            yield Violation(
                "parallel.dataset_strategy",
                f"the first number of every entry splits the batch and must be data_parallel, but entry {index} has "
                f"{axes[0]} and data_parallel is {plan.dp}; nearest legal: {legal}",
            )
            return


RULES = (
    device_product,
    whole_servers,
    expert_parallel_in_stage,
    experts_over_expert_parallel,
    widths_over_model_parallel,
    experts_need_sequence_parallel,
    sequence_over_devices,
    capacity_groups,
    experts_per_token,
    stages_within_layers,
    micro_batches_fill_stages,
    plain_pipeline,
    offset_list,
    recompute_lists,
    optimizer_shards,
    dataset_strategy,
)
