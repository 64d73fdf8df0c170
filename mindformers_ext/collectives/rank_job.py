"""What a rank process on CPU is told by its launcher, through the environment; imports nothing heavy."""

import os
from dataclasses import dataclass
from pathlib import Path

FOLDER, JOB, DEGREES = "CPU_PARALLEL_FOLDER", "CPU_PARALLEL_JOB", "CPU_PARALLEL_DEGREES"
# Not RANK_ID and RANK_SIZE: MindFormers would take a part of the samples, and every rank reads the global batch.
RANK, WORLD_SIZE = "CPU_PARALLEL_RANK", "CPU_PARALLEL_WORLD_SIZE"


@dataclass(frozen=True)
class RankJob:
    """One rank of a run whose graphs were compiled for Ascend and lowered to CPU.

    Args:
        folder: holds rank_R/cpu.mindir and rank_R/compiled.json of every rank.
        job: name of the shared memory, unique on the machine.
        rank: this process's global rank.
        world_size: ranks of the run.
        stages: pipeline stages.
        ranks_per_sample: ranks of a stage that read the same samples (cp * mp).
        loss_stage: the stage that knows the loss; a folded pipeline ends on the first.
    """

    folder: Path
    job: str
    rank: int
    world_size: int
    stages: int
    ranks_per_sample: int
    loss_stage: int = 0

    @classmethod
    def current(cls) -> "RankJob":
        """The job of this process."""
        rank, world_size = int(os.environ[RANK]), int(os.environ[WORLD_SIZE])
        return cls(
            Path(os.environ[FOLDER]), os.environ[JOB], rank, world_size, *map(int, os.environ[DEGREES].split(","))
        )

    def environment(self) -> dict[str, str]:
        """What makes `current` return this job in a child process."""
        return {
            FOLDER: str(self.folder.resolve()),
            JOB: self.job,
            DEGREES: f"{self.stages},{self.ranks_per_sample},{self.loss_stage}",
            RANK: str(self.rank),
            WORLD_SIZE: str(self.world_size),
        }

    @property
    def ranks_per_stage(self) -> int:
        """Devices of a pipeline stage."""
        return self.world_size // self.stages

    @property
    def index(self) -> int:
        """Place of this rank in its stage."""
        return self.rank % self.ranks_per_stage

    @property
    def data_rank(self) -> int:
        """Which part of the global batch is this rank's."""
        return self.index // self.ranks_per_sample


def is_cpu_rank() -> bool:
    """True in a process that `cpu_parallel.job` started."""
    return FOLDER in os.environ
