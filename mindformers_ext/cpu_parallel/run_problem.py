"""A run's YAML under many parallel layouts, for verify_parallel.py: each trains the same samples as one process."""

import hashlib
import json
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from mindformers_ext.bin_dataset.blended_dataset import parse_blend
from mindformers_ext.bin_dataset.indexed_dataset import IndexedDatasetWriter, idx_path
from mindformers_ext.config.one_process import one_process_overrides
from mindformers_ext.config.pipeline import FOLDED
from mindformers_ext.config.run import Run
from mindformers_ext.config.run_rules import refuse
from mindformers_ext.config.strategy_rules import check_plan
from mindformers_ext.cpu_parallel import job, launch, worker
from mindformers_ext.cpu_parallel.command import absolute, read_plan
from mindformers_ext.cpu_parallel.run_rank import rank_folder
from mindformers_ext.cpu_parallel.verify import Layout
from mindformers_ext.errors import ConfigError
from mindformers_ext.rank_compiler.rank_pool import RankJobs, RankPool

CAPACITY = {"moe_config.use_gmm": False, "moe_config.capacity_factor": 4.0}
ALL_TO_ALL = {"moe_config.moe_token_dispatcher_type": "alltoall"}
BY_NODE = {"moe_config.moe_token_dispatcher_type": "alltoall_deredundency", "moe_config.npu_nums_per_device": 2}
BOUNDED = {"moe_config.dropless_rows": "bounded", "moe_config.dropless_row_factor": 2.0}  # all choices of two ranks
DROPS = {"moe_config.use_gmm": False, "moe_config.capacity_factor": 0.75}
MUON = {"optimizer": {"type": "Muon", "weight_decay": 0.1}}
CLIP = {  # so low that every head is scaled down in every step
    "optimizer": {"type": "Muon", "qk_clip_threshold": 0.0001},
    "model.model_config.track_max_attention_logit": True,
}
RECIPE = {"recipe": {"mtp_loss_factor": [[1, 0.1]], "topk_bias_update_rate": [[1, 0.0]]}}  # from the second step on
SCHEDULER = "parallel.pipeline_config.pipeline_scheduler"
OPTIMIZER = "parallel.enable_parallel_optimizer"
SHARDS = "parallel.parallel_optimizer_config"

# name: (degrees, other keys of the layout, keys that change the maths and so the single process too)
LAYOUTS: dict[str, tuple[dict[str, int], dict[str, Any], dict[str, Any]]] = {
    "dp2": ({"dp": 2}, {}, {}),
    "mp2": ({"mp": 2}, {}, {}),
    "mp4": ({"mp": 4}, {}, {}),
    "dp2-mp2": ({"dp": 2, "mp": 2}, {}, {}),
    "mp2-vocab": ({"mp": 2}, {"parallel_config.vocab_emb_dp": False}, {}),
    "cp2": ({"cp": 2}, {}, {}),
    "dp2-cp2-mp2": ({"dp": 2, "cp": 2, "mp": 2}, {}, {}),
    "ep2": ({"dp": 2, "ep": 2}, {}, {}),
    "ep4": ({"dp": 4, "ep": 4}, {}, {}),
    "dp4-ep2": ({"dp": 4, "ep": 2}, {}, {}),
    "dp2-mp2-ep2": ({"dp": 2, "mp": 2, "ep": 2}, {}, {}),
    "ep4-alltoall": ({"dp": 4, "ep": 4}, ALL_TO_ALL, {}),
    "ep4-deredundency": ({"dp": 4, "ep": 4}, BY_NODE, {}),
    "ep2-worst-case": ({"dp": 2, "ep": 2}, {"moe_config.dropless_rows": "worst_case"}, {}),
    "dp2-mp2-ep4-alltoall": ({"dp": 2, "mp": 2, "ep": 4}, ALL_TO_ALL, {}),
    "dp2-mp2-pp2-ep2-alltoall": ({"dp": 2, "mp": 2, "pp": 2, "ep": 2, "micro": 2}, ALL_TO_ALL, {}),
    "mp2-shared-width": ({"mp": 2}, {"moe_config.shared_expert_split": "width"}, {}),
    "ep2-bounded": ({"dp": 2, "ep": 2}, {}, BOUNDED),
    "ep2-capacity": ({"dp": 2, "ep": 2}, {}, CAPACITY),
    "ep4-mp2-a2a": ({"dp": 2, "mp": 2, "ep": 4}, {}, CAPACITY),
    "ep4-mp2-grouped-a2a": ({"dp": 2, "mp": 2, "ep": 4}, {"moe_config.group_wise_a2a": True}, CAPACITY),
    "ep2-drops": ({"dp": 2, "ep": 2}, {}, DROPS),
    "ep2-static-drop": ({"dp": 2, "ep": 2}, {}, DROPS | {"moe_config.enable_sdrop": True}),
    "pp2": ({"pp": 2, "micro": 2}, {}, {}),
    "pp2-micro4": ({"pp": 2, "micro": 4}, {}, {}),
    "pp4": ({"pp": 4, "micro": 4}, {}, {}),
    "dp2-mp2-pp2-ep2": ({"dp": 2, "mp": 2, "pp": 2, "ep": 2, "micro": 2}, {}, {}),
    "pp2-chunks2": ({"pp": 2, "chunks": 2, "micro": 4}, {}, {}),
    "pp2-chunks3": ({"pp": 2, "chunks": 3, "micro": 2}, {}, {}),
    "pp4-chunks2": ({"pp": 4, "chunks": 2, "micro": 4}, {}, {}),
    "pp2-chunks2-gpipe": ({"pp": 2, "chunks": 2, "micro": 4}, {SCHEDULER: "gpipe"}, {}),
    "pp2-chunks2-seqpipe": ({"pp": 2, "chunks": 2, "micro": 4}, {SCHEDULER: "seqpipe"}, {}),
    "pp2-chunks2-seqsmartvpp": ({"pp": 2, "chunks": 2, "micro": 4}, {SCHEDULER: "seqsmartvpp"}, {}),
    "pp2-zero-bubble": ({"pp": 2, "chunks": 2, "micro": 4}, {SCHEDULER: FOLDED}, {}),
    "mp2-ep2-pp2-chunks2-uneven": (
        {"mp": 2, "ep": 2, "pp": 2, "chunks": 2, "micro": 2},
        {"model.model_config.offset": [[0, 1], [0, 0]], "recompute_config.recompute": [[1, 1], [0, 1]]},
        {"model.model_config.num_layers": 5},
    ),
    "dp2-optimizer": ({"dp": 2}, {OPTIMIZER: True, SHARDS: {"parallel_optimizer_threshold": 0}}, {}),
    "dp4-optimizer2": (
        {"dp": 4},
        {OPTIMIZER: True, SHARDS: {"parallel_optimizer_threshold": 0, "optimizer_weight_shard_size": 2}},
        {},
    ),
    "dp2-muon": ({"dp": 2}, {}, MUON),
    "mp2-muon": ({"mp": 2}, {}, MUON),
    "ep2-muon": ({"dp": 2, "ep": 2}, {}, MUON),
    "pp2-muon": ({"pp": 2, "micro": 2}, {}, MUON),
    "dp2-mp2-qk-clip": ({"dp": 2, "mp": 2}, {}, CLIP),
    "pp2-recipe": ({"pp": 2, "micro": 2}, {}, RECIPE),
    "dp2-mp2-ep2-muon-shards": (
        {"dp": 2, "mp": 2, "ep": 2},
        {OPTIMIZER: True, SHARDS: {"parallel_optimizer_threshold": 0}},
        MUON,
    ),
    "dp2-recompute": ({"dp": 2}, {"recompute_config.recompute": True}, {}),
    "dp2-select-recompute": ({"dp": 2}, {"recompute_config.select_recompute": True}, {}),
    "pp2-recompute-list": ({"pp": 2, "micro": 2}, {"recompute_config.recompute": [1, 0]}, {}),
    "dp2-accumulation2": ({"dp": 2, "accumulation": 2}, {}, {}),
    "dp2-losses": (
        {"dp": 2, "ep": 2},
        {},
        {
            "moe_config.z_loss_factor": 0.001,
            "moe_config.aux_loss_types": ["expert", "device", "comm"],
            "moe_config.aux_loss_factors": [0.01, 0.01, 0.01],
        },
    ),
}
SHORT = {
    "dp": "data_parallel",
    "cp": "context_parallel",
    "mp": "model_parallel",
    "pp": "pipeline_stage",
    "ep": "expert_parallel",
    "micro": "micro_batch_num",
}
OWN = "own"  # the YAML's layout


@dataclass(frozen=True)
class RunProblem:
    """What `run_mindformer.py --config Y ...` trains, for `steps` steps of the YAML's global batch.

    Args:
        command: arguments of run_mindformer.py.
        plan: what they describe.
        folder: of this check; holds random data when the YAML's is not there.
    """

    command: tuple[str, ...]
    plan: Run
    folder: Path
    steps: int = 5

    @classmethod
    def of(cls, command: list[str], folder: Path, steps: int) -> "RunProblem":
        """Read the YAML. Raises ConfigError."""
        plan = read_plan(command)
        loader = plan.sections.train_dataset and plan.sections.train_dataset.megatron
        prefixes = parse_blend(loader.config.data_path)[0] if loader else []
        data = []
        if not prefixes or not all(idx_path(prefix).exists() for prefix in prefixes):
            prefix = random_data(folder / "random", plan, steps)
            data = ["--train_dataset.data_loader.config.data_path", json.dumps(["1", str(prefix)])]
        return cls((*absolute(command), *data), plan, folder, steps)

    def layouts(self) -> dict[str, Layout]:
        """The layouts that suit the YAML's global batch, by name."""
        found = {name: self._layout(name, *spec) for name, spec in LAYOUTS.items()}
        p = self.plan
        if p.device_num > 1:
            arguments = {"overrides": {"use_parallel": True}, "model": {}}
            found[OWN] = Layout(OWN, arguments, p.device_num, p.pp, loss_stage=p.pipeline.last.stage)
        return found

    def _layout(self, name: str, degrees: dict[str, int], other: dict, model: dict) -> Layout:
        degrees = {"dp": 1, "cp": 1, "mp": 1, "pp": 1, "ep": 1, "micro": 1, "accumulation": 1, "chunks": 1} | degrees
        parts = degrees["dp"] * degrees["micro"] * degrees["accumulation"]
        chunks = degrees["pp"] * degrees["chunks"]
        if self.plan.model.num_layers < chunks:  # every chunk needs a layer
            model = {"model.model_config.num_layers": chunks} | model
        columns = self.plan.sections.train_dataset.input_columns or ["input_ids"]
        overrides = {
            "use_parallel": True,
            "parallel": {"parallel_mode": 1, "full_batch": False, "search_mode": "sharding_propagation"},
            "parallel.dataset_strategy": [[degrees["dp"], 1]] * len(columns),
            "parallel_config": {long: degrees[short] for short, long in SHORT.items()}
            | {"use_seq_parallel": degrees["mp"] > 1},  # MindFormers refuses experts with mp alone
            "recompute_config": {},
            "parallel.pipeline_config": {"pipeline_interleave": degrees["chunks"] > 1, "pipeline_scheduler": "1f1b"},
            "model.model_config.pp_interleave_num": degrees["chunks"],
            "model.model_config.offset": 0,
            "runner_config.batch_size": max(self.plan.global_batch // parts, 1),
            "runner_config.gradient_accumulation_steps": degrees["accumulation"],
        }
        if model.get("moe_config.use_gmm") is False:  # the same groups as in one process
            length = self.plan.model.seq_length
            tokens = overrides["runner_config.batch_size"] * length // (degrees["cp"] * degrees["mp"])
            model = model | {"moe_config.expert_group_size": math.gcd(length, tokens)}
        world_size = degrees["dp"] * degrees["cp"] * degrees["mp"] * degrees["pp"]
        loss_stage = 0 if other.get(SCHEDULER) == FOLDED else degrees["pp"] - 1
        arguments = {"overrides": overrides | other, "model": model}
        return Layout(name, arguments, world_size, degrees["pp"], loss_stage=loss_stage)

    def single_name(self, layout: Layout) -> str:
        """Folder of the single process with the same maths."""
        model = json.dumps(layout.arguments["model"], sort_keys=True)
        return "single-" + hashlib.sha256(model.encode()).hexdigest()[:8]

    def single(self, layout: Layout, folder: Path, runners: RankPool) -> None:
        """Train in one process."""
        overrides = one_process_overrides(self.plan) | layout.arguments["model"]
        launch.run_forked(runners, self._runs(overrides, folder, Layout(folder.name, {}, 1)))

    def jobs(self, layout: Layout, folder: Path) -> RankJobs:
        """How all ranks are compiled and lowered; raises ConfigError when the YAML does not allow the layout."""
        overrides = layout.arguments["overrides"] | layout.arguments["model"]
        plan = self.plan.changed(overrides.items(), layout.world_size)
        if plan.global_batch != self.plan.global_batch:
            raise ConfigError(f"the YAML's global batch of {self.plan.global_batch} does not divide for {layout.name}")
        refuse(plan, check_plan(plan))
        builder = launch.RunBuilder(tuple(self._command(overrides, folder)), (str(job.ROOT),))
        return launch.rank_jobs(builder, layout.world_size, folder, layout.stages)

    def run(self, layout: Layout, single: Path, folder: Path, runners: RankPool) -> list[dict]:
        """Train as ranks; what ParallelCheck wrote of each."""
        overrides = layout.arguments["overrides"] | layout.arguments["model"]
        plan = self.plan.changed(overrides.items(), layout.world_size)
        first = job.rank_job(plan, folder)
        launch.run_forked(
            runners, self._runs(overrides, folder, layout, lambda rank: replace(first, rank=rank).environment())
        )
        results = [rank_folder(folder, rank) / "result.json" for rank in range(layout.world_size)]
        return [json.loads(path.read_text()) for path in results]

    def _runs(
        self,
        overrides: dict[str, Any],
        folder: Path,
        layout: Layout,
        own_environment: Callable[[int], dict[str, str]] = lambda _: {},
    ) -> RankJobs:
        """How ranks, or one process, train into `folder`; their logs are in its folder `runs`."""
        return RankJobs(
            module=worker.__name__,
            arguments=lambda own: [str(own / launch.FAILURE), *self._command(overrides, folder)],
            world_size=layout.world_size,
            devices_per_stage=layout.world_size // layout.stages,
            out=folder / "runs",
            level=None,
            timeout_seconds=launch.RUN_SECONDS,
            python_path=(str(job.ROOT),),
            environment={"OMP_NUM_THREADS": "1"} | launch.bytecode_cache(),
            own_environment=own_environment,
        )

    def _command(self, overrides: dict[str, Any], folder: Path) -> list[str]:
        """run_mindformer.py's arguments for a check into `folder`."""
        check = [{"type": "ParallelCheck", "folder": str(folder)}]
        if self.plan.model.moe_config.balance_via_topk_bias:
            check.insert(0, {"type": "TopkBiasBalanceCallback"})
        settings = {
            "context.device_target": "CPU",
            "output_dir": str(folder / "output"),
            "callbacks": check,
            "runner_config.epochs": 1,
            "train_dataset.data_loader.sizes": [self.steps * self.plan.global_batch, 0, 0],
            "load_checkpoint": "",
            "processor": None,
        }
        pairs = (overrides | settings).items()
        return [*self.command, *(text for key, value in pairs for text in (f"--{key}", as_text(value)))]


def random_data(prefix: Path, plan: Run, steps: int) -> Path:
    """Documents of random tokens, enough for the check; returns the prefix of the .bin/.idx pair."""
    rng = np.random.default_rng(1)
    left = (steps * plan.global_batch + 2) * plan.model.seq_length * 2
    with IndexedDatasetWriter(prefix) as writer:
        while left > 0:
            length = int(rng.integers(1, 2 * plan.model.seq_length))
            writer.add_document(rng.integers(2, plan.model.vocab_size, length))
            left -= length
    return prefix


def as_text(value: Any) -> str:
    """A value on run_mindformer.py's command line."""
    return value if isinstance(value, str) else json.dumps(value)
