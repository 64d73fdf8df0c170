"""Which machine of a job this is: what the launcher was told, else what the cluster exported; imports nothing heavy.

The first source that is there decides alone: arguments, MindCluster, Slurm, ModelArts (and Volcano), Open MPI. Without
any, all ranks run on this machine.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from mindformers_ext.errors import ConfigError

PORT = 8118
ALONE = "127.0.0.1"
ARGUMENTS, DEFAULT = "the launcher's arguments", "default"


@dataclass(frozen=True)
class Place:
    """One machine's part of a job.

    Args:
        source: who said so.
        worker_num: ranks of the job.
        local_worker_num: ranks of this machine.
        node_rank: this machine's number; it holds the ranks from node_rank * local_worker_num on.
    """

    source: str
    worker_num: int
    local_worker_num: int
    master_addr: str = ALONE
    master_port: int = PORT
    node_rank: int = 0

    @property
    def of_a_cluster(self) -> bool:
        """True where a cluster started this process, and ends its job when the process ends."""
        return self.source not in (ARGUMENTS, DEFAULT)

    @property
    def nodes(self) -> int:
        """Machines of the job."""
        return self.worker_num // self.local_worker_num

    def __str__(self) -> str:
        first = self.node_rank * self.local_worker_num
        return (
            f"machine {self.node_rank} of {self.nodes} (by {self.source}): ranks {first} to "
            f"{first + self.local_worker_num - 1} of {self.worker_num}, scheduler {self.master_addr}:{self.master_port}"
        )


def count(name: str, text: str, least: int = 1) -> int:
    """A number of a job. Raises ConfigError that names the variable."""
    if not re.fullmatch(r"(0|[1-9][0-9]{0,8})", text) or int(text) < least:
        raise ConfigError(f"{name} is {text!r}, but must be a whole number of at least {least}")
    return int(text)


def find(arguments: Sequence[str], environ: Mapping[str, str], ranks: Callable[[], int]) -> Place:
    """This machine's place.

    Args:
        arguments: WORKER_NUM, LOCAL_WORKER_NUM, MASTER_ADDR, MASTER_PORT, NODE_RANK; empty ones are not given.
        ranks: how many ranks the run has, asked where the cluster tells its machines only.

    Raises:
        ConfigError: what is said does not fit together.
    """
    if not any(arguments):
        for source in (from_mindcluster, from_slurm, from_modelarts, from_open_mpi):
            place = source(environ, ranks)
            if place is not None:
                return checked(place)
    return checked(from_arguments(arguments))


def from_arguments(arguments: Sequence[str]) -> Place:
    """The launcher's own arguments, eight ranks of this machine where there are none."""
    workers, local, address, port, rank = [*arguments, *[""] * 5][:5]
    worker_num = count("WORKER_NUM", workers or "8")
    return Place(
        ARGUMENTS if any(arguments) else DEFAULT,
        worker_num,
        count("LOCAL_WORKER_NUM", local) if local else worker_num,
        address or ALONE,
        port_number("MASTER_PORT", port) if port else PORT,
        count("NODE_RANK", rank or "0", 0),
    )


def from_mindcluster(environ: Mapping[str, str], ranks: Callable[[], int]) -> Place | None:
    """What MindCluster's operator gives the pods of an AscendJob of framework mindspore."""
    if "MS_NODE_RANK" not in environ or "MS_SCHED_HOST" not in environ:
        return None
    told = "MindCluster's MS_NODE_RANK"
    said = need(environ, told, "MS_SCHED_PORT", "MS_WORKER_NUM", "MS_LOCAL_WORKER")
    local = count("MS_LOCAL_WORKER", said["MS_LOCAL_WORKER"], 0)
    rank = count("MS_NODE_RANK", environ["MS_NODE_RANK"], 0)
    total = count("MS_WORKER_NUM", said["MS_WORKER_NUM"])
    alone = total == local
    # A Scheduler pod without cards is no machine of the job, and its Workers count from 0 themselves.
    if local == 0 or (environ.get("MS_ROLE") == "MS_WORKER" and rank == 0 and not alone):
        raise ConfigError(
            "MS_LOCAL_WORKER: the AscendJob's Scheduler has no NPU, but here it is machine 0; ask for as many NPUs as "
            "a Worker has (scripts/render_job.py --kind ascendjob writes such a job)"
        )
    port = port_number("MS_SCHED_PORT", said["MS_SCHED_PORT"])
    return Place(told, total, local, ALONE if alone else environ["MS_SCHED_HOST"], port, rank)


def from_slurm(environ: Mapping[str, str], ranks: Callable[[], int]) -> Place | None:
    """A step of a Slurm job, one task a machine."""
    if "SLURM_JOB_ID" not in environ:
        return None
    said = need(environ, "Slurm's SLURM_JOB_ID", "SLURM_JOB_NUM_NODES")
    told = "Slurm's SLURM_NODEID"
    if "SLURM_STEP_NODELIST" not in environ:
        nodes = count("SLURM_JOB_NUM_NODES", said["SLURM_JOB_NUM_NODES"])
        if nodes > 1:
            raise ConfigError(
                f"SLURM_JOB_NUM_NODES is {nodes}, but this is the batch script, which runs on the first node only; "
                "start the launcher with `srun --ntasks-per-node=1` as scripts/slurm.sh does"
            )
        return shared_out("Slurm, one node", 1, 0, ALONE, slurm_port(environ), ranks)
    said = need(environ, told, "SLURM_STEP_NUM_NODES", "SLURM_STEP_NUM_TASKS", "SLURM_NODEID")
    nodes = count("SLURM_STEP_NUM_NODES", said["SLURM_STEP_NUM_NODES"])
    tasks = count("SLURM_STEP_NUM_TASKS", said["SLURM_STEP_NUM_TASKS"])
    if tasks != nodes:
        raise ConfigError(
            f"SLURM_STEP_NUM_TASKS is {tasks} on {nodes} nodes, but the launcher starts a machine's ranks itself; "
            "give srun --ntasks-per-node=1"
        )
    rank = count("SLURM_NODEID", said["SLURM_NODEID"], 0)
    return shared_out(told, nodes, rank, first_host(environ["SLURM_STEP_NODELIST"]), slurm_port(environ), ranks)


def from_modelarts(environ: Mapping[str, str], ranks: Callable[[], int]) -> Place | None:
    """MASTER_ADDR, NNODES and NODE_RANK, or the list of hosts that ModelArts and Volcano's plugins export."""
    port = master_port(environ)
    if "NNODES" in environ and "NODE_RANK" in environ:
        told = "NODE_RANK of NNODES"
        nodes, rank = count("NNODES", environ["NNODES"]), count("NODE_RANK", environ["NODE_RANK"], 0)
        address = need(environ, told, "MASTER_ADDR")["MASTER_ADDR"] if nodes > 1 else ALONE
        return shared_out(told, nodes, rank, address, port, ranks)
    if "VC_WORKER_HOSTS" in environ and "VC_TASK_INDEX" in environ:
        hosts = [host.strip() for host in environ["VC_WORKER_HOSTS"].split(",") if host.strip()]
        if not hosts:
            raise ConfigError("VC_WORKER_HOSTS is empty, but must name the job's machines")
        rank = count("VC_TASK_INDEX", environ["VC_TASK_INDEX"], 0)
        return shared_out("VC_TASK_INDEX of VC_WORKER_HOSTS", len(hosts), rank, hosts[0], port, ranks)
    return None


def from_open_mpi(environ: Mapping[str, str], ranks: Callable[[], int]) -> Place | None:
    """mpirun with one process a machine."""
    if "OMPI_COMM_WORLD_SIZE" not in environ:
        return None
    told = "Open MPI's OMPI_COMM_WORLD_RANK"
    said = need(environ, told, "OMPI_COMM_WORLD_RANK")
    nodes = count("OMPI_COMM_WORLD_SIZE", environ["OMPI_COMM_WORLD_SIZE"])
    here = count("OMPI_COMM_WORLD_LOCAL_SIZE", environ.get("OMPI_COMM_WORLD_LOCAL_SIZE", "1"))
    if here > 1:
        raise ConfigError(
            f"OMPI_COMM_WORLD_LOCAL_SIZE is {here}, but the launcher starts a machine's ranks itself; give mpirun "
            "--map-by ppr:1:node"
        )
    if nodes > 1 and not environ.get("MASTER_ADDR"):
        raise ConfigError("MASTER_ADDR is missing; give mpirun -x MASTER_ADDR=HOST, the machine of rank 0")
    rank = count("OMPI_COMM_WORLD_RANK", said["OMPI_COMM_WORLD_RANK"], 0)
    return shared_out(told, nodes, rank, environ.get("MASTER_ADDR") or ALONE, master_port(environ), ranks)


def shared_out(told: str, nodes: int, rank: int, address: str, port: int, ranks: Callable[[], int]) -> Place:
    """A place where the cluster tells machines, and the run how many ranks they share."""
    total = ranks()
    if total % nodes:
        raise ConfigError(
            f"the run has {total} ranks, which {nodes} machines (by {told}) cannot share evenly; ask for a number of "
            "machines that divides it"
        )
    return Place(told, total, total // nodes, address, port, rank)


def checked(place: Place) -> Place:
    """The place, when its numbers fit together."""
    if place.local_worker_num > place.worker_num:
        raise ConfigError(
            f"LOCAL_WORKER_NUM is {place.local_worker_num}, but must not exceed WORKER_NUM {place.worker_num}"
        )
    if place.worker_num % place.local_worker_num:
        raise ConfigError(
            f"WORKER_NUM is {place.worker_num}, but must be a multiple of LOCAL_WORKER_NUM {place.local_worker_num}"
        )
    if place.node_rank >= place.nodes:
        raise ConfigError(
            f"NODE_RANK is '{place.node_rank}', but must be from 0 to {place.nodes - 1}, one per machine "
            f"(by {place.source})"
        )
    return place


def need(environ: Mapping[str, str], told: str, *names: str) -> dict[str, str]:
    """Variables that come together. Raises ConfigError that names the first one that is missing."""
    for name in names:
        if not environ.get(name):
            raise ConfigError(f"{name} is not set, but {told} is; the cluster exports both, or give the arguments")
    return {name: environ[name] for name in names}


def port_number(name: str, text: str) -> int:
    """A port. Raises ConfigError that names the variable."""
    if not re.fullmatch(r"[1-9][0-9]{0,4}", text) or int(text) > 65535:
        raise ConfigError(f"{name} is {text!r}, but must be a number from 1 to 65535")
    return int(text)


def master_port(environ: Mapping[str, str]) -> int:
    """The port of those who export one."""
    return port_number("MASTER_PORT", environ["MASTER_PORT"]) if environ.get("MASTER_PORT") else PORT


def slurm_port(environ: Mapping[str, str]) -> int:
    """A port that two jobs on one node do not share."""
    return 20000 + count("SLURM_JOB_ID", environ["SLURM_JOB_ID"], 0) % 10000


def first_host(hosts: str) -> str:
    """The first of Slurm's list of hosts: node-a of node-a,node-b and rack1n004 of rack[1-2]n[004-007,9]."""
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])+", hosts)
    return re.sub(r"\[(\w+)[^\]]*\]", r"\1", first[0]) if first else ""
