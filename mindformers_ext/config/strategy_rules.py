"""The arithmetic that a parallel strategy must satisfy, checked in a moment, before anything is compiled.

Each rule yields a Violation whose sentence states the rule, both numbers and the nearest legal values. The layout is
that of research/deepseek3/sharding.py: the devices of a stage form a grid (dp, cp, mp) for dense layers and
(edp, ep) with edp * ep = dp * cp * mp for experts.
"""

from collections.abc import Iterator
from math import gcd

from mindformers_ext.config.model import FAMILIES
from mindformers_ext.config.pipeline import FOLDED, by_chunk
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
    rules = (*RUN_RULES, *CPU_RULES, split_by_hand, means_over_ranks, tokens_are_counted_once)
    return [violation for rule in rules for violation in rule(run)]


def of_a_known_model(run: Run) -> Iterator[Violation]:
    yield Violation("model.model_config.type", f"strategies are known of {', '.join(FAMILIES)} only")


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


def tokens_are_counted_once(run: Run) -> Iterator[Violation]:
    if run.is_pynative and run.trains and run.value("recompute_config.recompute"):
        yield Violation(
            "recompute_config.recompute",
            "PyNative mode would count the tokens of every expert again while it recomputes a layer; nearest legal: "
            "False, or context.mode 0",
        )


def split_by_the_compiler(plan: Run) -> Iterator[Violation]:
    mode = plan.sections.parallel.parallel_mode
    if mode in OTHER_MODES:
        yield Violation("parallel.parallel_mode", f"{OTHER_MODES[mode]}; nearest legal: 1")
    if plan.is_pynative:
        yield Violation("context.mode", "PyNative mode has no graph that could be split over devices; nearest legal: 0")


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


def nodes_of_an_expert_group(plan: Run) -> Iterator[Violation]:
    moe = plan.model.moe_config
    if moe.expert_num == 1 or moe.moe_token_dispatcher_type != "alltoall_deredundency" or plan.ep == 1:
        return
    if plan.ep % moe.npu_nums_per_device or not 1 < moe.npu_nums_per_device < plan.ep:
        yield Violation(
            "moe_config.moe_token_dispatcher_type",
            f"alltoall_deredundency needs several nodes of several devices: expert_parallel must be a multiple of "
            f"npu_nums_per_device, but they are {plan.ep} and {moe.npu_nums_per_device}; nearest legal: alltoall",
        )


def widths_over_model_parallel(plan: Run) -> Iterator[Violation]:
    model, moe = plan.model, plan.model.moe_config
    widths = {
        "num_heads": (model.num_heads, "attention heads lie on model_parallel"),
        "vocab_size": (model.vocab_size, "the rows of the output head lie on model_parallel"),
    }
    if any(not model.is_moe_layer(i) for i in range(model.layers_in_all)):
        widths["intermediate_size"] = (model.intermediate_size, "the dense FFN's width lies on model_parallel")
    if moe.expert_num > 1 and moe.shared_expert_num and moe.shared_expert_split == "width":
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


def chunks_and_their_switch(plan: Run) -> Iterator[Violation]:
    """A stage has several chunks when model and MindSpore's context both say so; only then other schedulers work."""
    pipeline, chunks = plan.sections.parallel.pipeline_config, plan.chunks
    if plan.scheduler == "seqvpp":
        yield Violation("parallel.pipeline_config.pipeline_scheduler", f"{SEQVPP}; nearest legal: 'seqpipe'")
    elif chunks > 1 and plan.pp == 1:
        yield Violation(
            "model.model_config.pp_interleave_num",
            "chunks of a stage need a pipeline, and pipeline_stage is 1; nearest legal: 1",
        )
    elif pipeline.pipeline_interleave and plan.pp == 1:
        yield Violation(
            "parallel.pipeline_config.pipeline_interleave",
            "pipeline_stage is 1, which has no order to change; nearest legal: False",
        )
    elif chunks > 1 and not pipeline.pipeline_interleave:
        yield Violation(
            "model.model_config.pp_interleave_num",
            "MindSpore orders chunks only with parallel.pipeline_config.pipeline_interleave True; set it, or leave "
            "pp_interleave_num out",
        )
    elif plan.scheduler != "1f1b" and not pipeline.pipeline_interleave:
        yield Violation(
            "parallel.pipeline_config.pipeline_scheduler",
            "MindSpore has other orders than 1f1b only for chunks: set pipeline_interleave True and "
            "model.model_config.pp_interleave_num to 2 or more, or leave it out",
        )
    elif plan.scheduler == "seqsmartvpp" and plan.pp % 2:
        yield Violation(
            "parallel.pipeline_config.pipeline_scheduler",
            f"it needs an even number of stages, and pipeline_stage is {plan.pp}; nearest legal: '1f1b'",
        )
    elif plan.scheduler == FOLDED and chunks != 2:
        yield Violation(
            "model.model_config.pp_interleave_num",
            f"{FOLDED} goes through the stages once forth and once back; nearest legal: 2",
        )
    elif chunks == 1 and pipeline.pipeline_interleave:
        yield Violation(
            "parallel.pipeline_config.pipeline_interleave",
            "stages have one chunk of layers; set model.model_config.pp_interleave_num to 2 or more, or leave it out",
        )


def stages_within_layers(plan: Run) -> Iterator[Violation]:
    layers, chunks = plan.model.num_layers, plan.chunks
    if plan.pp * chunks > layers:
        near = nearest_legal(layers, lambda n: plan.device_num % n == 0 and n * chunks <= layers, layers)
        if chunks > 1:
            held = (
                f"every chunk of a stage needs a layer, but pipeline_stage x pp_interleave_num is {plan.pp} x {chunks}"
            )
        else:
            held = f"every stage needs a layer, but pipeline_stage is {plan.pp}"
        yield Violation("parallel_config.pipeline_stage", f"{held} and num_layers is {layers}; {legal_words(near)}")


def micro_batches_fill_stages(plan: Run) -> Iterator[Violation]:
    times, words = (
        (2, "twice as many micro-batches as") if plan.scheduler == FOLDED else (1, "as many micro-batches as")
    )
    if plan.micro_batches < times * plan.pp:
        yield Violation(
            "parallel_config.micro_batch_num",
            f"the pipeline needs at least {words} stages, but micro_batch_num is {plan.micro_batches} and "
            f"pipeline_stage is {plan.pp}; {legal_words([times * plan.pp])}",
        )


def wrong_form(key: str, value: list, plan: Run, example: str = "") -> Iterator[Violation]:
    """A list is one number per stage, or one such list per chunk."""
    rows = [row for row in value if isinstance(row, list)]
    name = key.rpartition(".")[2]
    if not rows and len(value) != plan.pp:
        yield Violation(
            key,
            f"{name} needs one number per pipeline stage, but has {len(value)} and pipeline_stage is {plan.pp}; "
            f"nearest legal: {example}",
        )
    elif rows and (len(rows) != len(value) or len(rows) != plan.chunks or any(len(row) != plan.pp for row in rows)):
        yield Violation(
            key,
            f"{name} needs one list per chunk, each with one number per pipeline stage, but pp_interleave_num is "
            f"{plan.chunks} and pipeline_stage is {plan.pp}; nearest legal: {example}",
        )


def offset_list(plan: Run) -> Iterator[Violation]:
    key, offset, layers, pp, chunks = (
        "model.model_config.offset",
        plan.model.offset,
        plan.model.num_layers,
        plan.pp,
        plan.chunks,
    )
    if not isinstance(offset, list):
        return
    base, rest = divmod(layers, pp * plan.chunks)
    first = plan.pipeline.way[:rest]
    rows = [[int((stage, chunk) in first) for stage in range(pp)] for chunk in range(plan.chunks)]
    example = rows if plan.chunks > 1 else rows[0]
    if found := [*wrong_form(key, offset, plan, str(example))]:
        yield from found
        return
    rows = by_chunk(offset, plan.chunks)
    total = sum(map(sum, rows))
    if total != rest:
        ways = "num_layers // pipeline_stage" + (" // pp_interleave_num" if chunks > 1 else "")
        what = "chunk of stage i holds" if chunks > 1 else "stage i holds"
        yield Violation(
            key,
            f"{what} {ways} + offset[i] = {base} + offset[i] layers, which must sum to num_layers = {layers}, but the "
            f"offsets sum to {total} instead of {rest} and give {base * pp * chunks + total} layers; nearest legal: "
            f"{example}",
        )
    for (stage, chunk), count in plan.pipeline.counts.items():
        if count < 1:
            place = f"[{chunk}][{stage}]" if isinstance(offset[0], list) else f"[{stage}]"
            what = f"chunk {chunk} of stage {stage}" if chunks > 1 else f"stage {stage}"
            yield Violation(
                key,
                f"every {'chunk' if chunks > 1 else 'stage'} needs a layer, but {what} holds {base} + ({count - base}) "
                f"= {count}; nearest legal: offset{place} = {1 - base}",
            )


def recompute_lists(plan: Run) -> Iterator[Violation]:
    if [*offset_list(plan)]:
        return  # its own rule speaks
    held = {place: len(plan.pipeline.layers_of(*place)) for place in plan.pipeline.way}
    by_stage = [len(plan.layers_of(stage)) for stage in range(plan.pp)]
    for name, value in (("recompute", plan.recompute), ("select_recompute", plan.select_recompute)):
        if not isinstance(value, list):
            continue
        key = f"recompute_config.{name}"
        if found := [*wrong_form(key, value, plan, f"a list of {plan.pp} numbers up to {by_stage}")]:
            yield from found
            continue
        in_chunks = isinstance(value[0], list)
        for stage, chunk in held if in_chunks else [(stage, 0) for stage in range(plan.pp)]:
            asked, most = (value[chunk][stage], held[stage, chunk]) if in_chunks else (value[stage], by_stage[stage])
            if not 0 <= asked <= most:
                place = f"[{chunk}][{stage}]" if in_chunks else f"[{stage}]"
                what = f"chunk {chunk} of stage {stage}" if in_chunks else f"stage {stage}"
                yield Violation(
                    key,
                    f"{name}{place} must lie between 0 and the layers of {what}, but is {asked} and "
                    f"{'it' if in_chunks else 'the stage'} holds {most}; {legal_words([min(max(asked, 0), most)])}",
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


SEQVPP = "MindFormers 1.9 takes it only with seq_split_num above 1, which these models do not have"
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
    nodes_of_an_expert_group,
    experts_over_expert_parallel,
    widths_over_model_parallel,
    experts_need_sequence_parallel,
    sequence_over_devices,
    capacity_groups,
    chunks_and_their_switch,
    stages_within_layers,
    micro_batches_fill_stages,
    offset_list,
    recompute_lists,
    tied_embeddings,
    optimizer_shards,
    dataset_strategy,
)
