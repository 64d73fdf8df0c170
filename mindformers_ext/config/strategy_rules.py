"""The arithmetic that a parallel strategy must satisfy, checked in a moment, before anything is compiled.

Each rule yields a Violation whose sentence states the rule, both numbers and the nearest legal values. The layout is
that of research/deepseek3/sharding.py: the devices of a stage form a grid (dp, cp, mp) for dense layers and
(edp, ep) with edp * ep = dp * cp * mp for experts.
"""

from collections.abc import Iterator
from math import gcd

from mindformers_ext.config.model import FAMILIES
from mindformers_ext.config.run import Run
from mindformers_ext.config.run_rules import CPU_RULES, RUN_RULES, Violation
from mindformers_ext.config.typed import divisors_near, legal_words, nearest_legal


def check_plan(plan: Run) -> list[Violation]:
    """Every rule that a run breaks which is to be split over a cluster; empty when it is legal."""
    rules = (*RUN_RULES, *(RULES if plan.model is not None else (of_a_known_model,)))
    return [violation for rule in rules for violation in rule(plan)]


def check_run(run: Run) -> list[Violation]:
    """Every rule that a run breaks on the device that it names."""
    if run.is_semi_auto:
        return [*check_plan(run), *(violation for rule in CPU_RULES for violation in rule(run))]
    return [violation for rule in (*RUN_RULES, *CPU_RULES, split_by_hand, means_over_ranks) for violation in rule(run)]


def of_a_known_model(run: Run) -> Iterator[Violation]:
    yield Violation("model.model_config.type", f"strategies are known of {' and '.join(FAMILIES)} only")


def split_by_hand(run: Run) -> Iterator[Violation]:
    mode = run.sections.parallel.parallel_mode
    if run.sections.use_parallel and OTHER_MODES.get(mode) not in (None, NOT_SPLIT):
        yield Violation("parallel.parallel_mode", f"{OTHER_MODES[mode]}; use 1 (semi-auto) or 0 (data parallel)")


def means_over_ranks(run: Run) -> Iterator[Violation]:
    if run.sections.use_parallel and run.trains and run.value("parallel.gradients_mean") is not True:
        yield Violation(
            "parallel.gradients_mean",
            "each rank's loss is the mean over its own samples, so the gradients would be the sum of data_parallel "
            "means; nearest legal: True",
        )


def split_by_the_compiler(plan: Run) -> Iterator[Violation]:
    mode = plan.sections.parallel.parallel_mode
    if mode in OTHER_MODES:
        yield Violation("parallel.parallel_mode", f"{OTHER_MODES[mode]}; nearest legal: 1")


def own_part_of_the_batch(plan: Run) -> Iterator[Violation]:
    if plan.sections.parallel.full_batch:
        columns = (plan.sections.train_dataset and plan.sections.train_dataset.input_columns) or ["input_ids"]
        yield Violation(
            "parallel.full_batch",
            f"every rank would read the samples of all; nearest legal: False, with dataset_strategy "
            f"{[[plan.dp, 1]] * len(columns)}",
        )


def gradients_are_means_already(plan: Run) -> Iterator[Violation]:
    if plan.value("parallel.gradients_mean"):
        yield Violation(
            "parallel.gradients_mean",
            f"the loss of a split graph is the mean over all samples, so its gradients would be divided by "
            f"data_parallel = {plan.dp} a second time; nearest legal: False",
        )


def one_count_of_micro_batches(plan: Run) -> Iterator[Violation]:
    steps = plan.sections.runner_config.gradient_accumulation_steps
    if plan.pp > 1 and steps > 1:
        yield Violation(
            "runner_config.gradient_accumulation_steps",
            f"with a pipeline the micro-batches of a step are parallel_config.micro_batch_num; nearest legal: 1, with "
            f"micro_batch_num {plan.micro_batches * steps}",
        )


def device_product(plan: Run) -> Iterator[Violation]:
    product = plan.dp * plan.cp * plan.mp * plan.pp
    if product == plan.device_num:
        return
    rest = plan.cp * plan.mp * plan.pp
    options = {}
    for key, field in (("data_parallel", "dp"), ("pipeline_stage", "pp"), ("model_parallel", "mp")):
        value = getattr(plan, field)
        if plan.device_num % (product // value) == 0:
            changed = plan.changed([(f"parallel_config.{key}", plan.device_num * value // product)], plan.device_num)
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


def whole_servers(plan: Run) -> Iterator[Violation]:
    if plan.device_num % 8 and plan.device_num not in (1, 2, 4):
        near = nearest_legal(plan.device_num, lambda n: n % 8 == 0 or n in (1, 2, 4), plan.device_num + 8)
        yield Violation(
            "parallel_config.data_parallel",
            f"MindSpore splits over 1, 2, 4 or a multiple of 8 devices, but there are {plan.device_num}; "
            f"{legal_words(near)}",
        )


def expert_parallel_in_stage(plan: Run) -> Iterator[Violation]:
    stage = plan.devices_per_stage
    if stage % plan.ep:
        common = gcd(stage, plan.model.moe_config.expert_num)
        yield Violation(
            "parallel_config.expert_parallel",
            f"expert_parallel must divide the devices of a stage, data_parallel x context_parallel x model_parallel, "
            f"but {plan.ep} does not divide {stage}; {divisors_near(plan.ep, common)}",
        )


def experts_over_expert_parallel(plan: Run) -> Iterator[Violation]:
    experts = plan.model.moe_config.expert_num
    if experts % plan.ep:
        yield Violation(
            "parallel_config.expert_parallel",
            f"expert_parallel must divide moe_config.expert_num, so that every rank holds as many experts, but "
            f"{plan.ep} does not divide {experts}; {divisors_near(plan.ep, gcd(experts, plan.devices_per_stage))}",
        )


def widths_over_model_parallel(plan: Run) -> Iterator[Violation]:
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


def experts_need_sequence_parallel(plan: Run) -> Iterator[Violation]:
    if plan.mp > 1 and plan.model.moe_config.expert_num > 1 and not plan.sequence_parallel:
        yield Violation(
            "parallel_config.use_seq_parallel",
            f"model_parallel is {plan.mp} and expert_num {plan.model.moe_config.expert_num}: MindFormers trains "
            "experts together with model parallelism only when use_seq_parallel is True",
        )


def sequence_over_devices(plan: Run) -> Iterator[Violation]:
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
            f"{why}, so {product} must divide seq_length, but {length} is not a multiple of {ways}; "
            f"{legal_words(legal)}",
        )


def capacity_groups(plan: Run) -> Iterator[Violation]:
    moe = plan.model.moe_config
    if moe.expert_num == 1 or moe.use_gmm:
        return
    group = moe.expert_group_size or plan.model.seq_length
    tokens = plan.batch_size * plan.model.seq_length // (plan.cp * plan.mp)
    common = gcd(plan.model.seq_length, tokens)
    if common % group:
        which = f"{group}" if moe.expert_group_size else f"the default, a sequence of {group},"
        yield Violation(
            "moe_config.expert_group_size",
            f"capacity is counted over groups of tokens that cross neither sequences nor devices, so that every layout "
            f"drops the same: expert_group_size must divide seq_length and the tokens of a device, batch_size x "
            f"seq_length / (context_parallel x model_parallel) = {tokens}, but {which} does not divide {common}; "
            f"{divisors_near(group, common)}",
        )


def stages_within_layers(plan: Run) -> Iterator[Violation]:
    if plan.pp > plan.model.num_layers:
        layers = plan.model.num_layers
        near = nearest_legal(layers, lambda n: plan.device_num % n == 0, layers)
        yield Violation(
            "parallel_config.pipeline_stage",
            f"every stage needs a layer, but pipeline_stage is {plan.pp} and num_layers is {layers}; "
            f"{legal_words(near)}",
        )


def micro_batches_fill_stages(plan: Run) -> Iterator[Violation]:
    if plan.micro_batches < plan.pp:
        yield Violation(
            "parallel_config.micro_batch_num",
            f"the pipeline needs at least as many micro-batches as stages, but micro_batch_num is "
            f"{plan.micro_batches} and pipeline_stage is {plan.pp}; {legal_words([plan.pp])}",
        )


def offset_list(plan: Run) -> Iterator[Violation]:
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


def recompute_lists(plan: Run) -> Iterator[Violation]:
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
                    f"holds {held}; {legal_words([min(max(asked, 0), held)])}",
                )


def plain_pipeline(plan: Run) -> Iterator[Violation]:
    if plan.sections.parallel.pipeline_config.pipeline_interleave:
        yield Violation(
            "parallel.pipeline_config.pipeline_interleave",
            "interleaving needs several runs of layers in a stage (MindSpore's Cell.pipeline_segment), and this model "
            "gives every stage one run; nearest legal: False",
        )


def tied_embeddings(plan: Run) -> Iterator[Violation]:
    if not plan.model.tie_word_embeddings:
        return
    if plan.pp > 1:
        yield Violation(
            "model.model_config.tie_word_embeddings",
            f"a parameter lies on one pipeline stage, and the embedding is used on the first and the head on the last "
            f"of {plan.pp}; nearest legal: False, or pipeline_stage 1",
        )
    elif plan.mp > 1 and plan.vocab_emb_dp:
        yield Violation(
            "parallel_config.vocab_emb_dp",
            f"a tied embedding is split as the head is, over model_parallel = {plan.mp}, and vocab_emb_dp keeps it "
            "whole; nearest legal: False",
        )


def optimizer_shards(plan: Run) -> Iterator[Violation]:
    size, stage = plan.optimizer_shard_size, plan.devices_per_stage
    if plan.shard_optimizer and size != -1 and (size < 1 or stage % size):
        yield Violation(
            "parallel.parallel_optimizer_config.optimizer_weight_shard_size",
            f"optimizer_weight_shard_size must divide the devices of a stage, data_parallel x context_parallel x "
            f"model_parallel, or be -1 for all of a weight's copies, but {size} does not divide {stage}; "
            f"{divisors_near(max(size, 1), stage)}",
        )


def dataset_strategy(plan: Run) -> Iterator[Violation]:
    """One sentence for all entries: they are usually wrong together."""
    if not isinstance(plan.sections.parallel.dataset_strategy, list | tuple):
        return
    for index, axes in enumerate(plan.sections.parallel.dataset_strategy):
        if axes[0] != plan.dp:
            legal = [[plan.dp, *axes[1:]] for axes in plan.sections.parallel.dataset_strategy]
            yield Violation(
                "parallel.dataset_strategy",
                f"the first number of every entry splits the batch and must be data_parallel, but entry {index} has "
                f"{axes[0]} and data_parallel is {plan.dp}; nearest legal: {legal}",
            )
            return


SEARCHED = "MindSpore 2.9 does not search strategies beside those of sharding.py ('Init tensor_layout failed')"
BY_HAND = "the model splits nothing by hand, which that mode is for"
NOT_SPLIT = "in that mode every device holds the whole model"
OTHER_MODES = {
    0: NOT_SPLIT,
    "stand_alone": "in that mode every process trains a model of its own",
    "data_parallel": NOT_SPLIT,
    2: SEARCHED,
    "auto_parallel": SEARCHED,
    3: BY_HAND,
    "hybrid_parallel": BY_HAND,
}
RULES = (
    split_by_the_compiler,
    own_part_of_the_batch,
    gradients_are_means_already,
    one_count_of_micro_batches,
    device_product,
    whole_servers,
    expert_parallel_in_stage,
    experts_over_expert_parallel,
    widths_over_model_parallel,
    experts_need_sequence_parallel,
    sequence_over_devices,
    capacity_groups,
    stages_within_layers,
    micro_batches_fill_stages,
    plain_pipeline,
    offset_list,
    recompute_lists,
    tied_embeddings,
    optimizer_shards,
    dataset_strategy,
)
