"""Which machine of a job this is, by what MindCluster, Slurm, ModelArts, Volcano and Open MPI export."""

import pytest
from helpers.command_line import ROOT, run_command

from mindformers_ext.cluster import nodes
from mindformers_ext.errors import ConfigError

MINDCLUSTER = {
    "MS_SCHED_HOST": "10.96.0.7",
    "MS_SCHED_PORT": "2222",
    "MS_WORKER_NUM": "32",
    "MS_LOCAL_WORKER": "8",
    "MS_NODE_RANK": "3",
    "MS_ROLE": "MS_WORKER",
}
SLURM = {
    "SLURM_JOB_ID": "1234567",
    "SLURM_JOB_NUM_NODES": "4",
    "SLURM_STEP_NUM_NODES": "4",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_STEP_NODELIST": "npu[011-013,020]",
    "SLURM_NODEID": "2",
}
MODELARTS = {"MASTER_ADDR": "job-0.example", "NNODES": "4", "NODE_RANK": "1", "MASTER_PORT": "6060"}
VOLCANO = {"VC_WORKER_HOSTS": "job-worker-0.job,job-worker-1.job", "VC_TASK_INDEX": "1", "VC_WORKER_NUM": "2"}
OPEN_MPI = {"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_LOCAL_SIZE": "1"}
OPEN_MPI["MASTER_ADDR"] = "a"


def place(environ, arguments=(), ranks=32):
    found = nodes.find(arguments, environ, lambda: ranks)
    return found.worker_num, found.local_worker_num, found.master_addr, found.master_port, found.node_rank


@pytest.mark.parametrize(
    "environ,expected",
    [
        ({}, (8, 8, "127.0.0.1", 8118, 0)),
        (MINDCLUSTER, (32, 8, "10.96.0.7", 2222, 3)),
        (MINDCLUSTER | {"MS_ROLE": "MS_SCHED", "MS_NODE_RANK": "0"}, (32, 8, "10.96.0.7", 2222, 0)),
        (MINDCLUSTER | {"MS_NODE_RANK": "0", "MS_WORKER_NUM": "8"}, (8, 8, "127.0.0.1", 2222, 0)),
        (SLURM, (32, 8, "npu011", 24567, 2)),
        ({"SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "1"}, (32, 32, "127.0.0.1", 20007, 0)),
        (MODELARTS, (32, 8, "job-0.example", 6060, 1)),
        ({"NNODES": "1", "NODE_RANK": "0"}, (32, 32, "127.0.0.1", 8118, 0)),
        (VOLCANO, (32, 16, "job-worker-0.job", 8118, 1)),
        (OPEN_MPI, (32, 16, "a", 8118, 1)),
        ({"MASTER_ADDR": "somewhere", "RANK_ID": "3", "MS_WORKER_NUM": "4"}, (8, 8, "127.0.0.1", 8118, 0)),
    ],
)
def test_each_source(environ, expected):
    assert place(environ) == expected


def test_the_first_source_decides_alone():
    everything = OPEN_MPI | VOLCANO | MODELARTS | SLURM | MINDCLUSTER
    for source, name in (
        (MINDCLUSTER, "MindCluster's MS_NODE_RANK"),
        (SLURM, "Slurm's SLURM_NODEID"),
        (MODELARTS, "NODE_RANK of NNODES"),
        (VOLCANO, "VC_TASK_INDEX of VC_WORKER_HOSTS"),
        (OPEN_MPI, "Open MPI's OMPI_COMM_WORLD_RANK"),
    ):
        assert nodes.find([], everything, lambda: 32).source == name
        everything = {key: value for key, value in everything.items() if key not in source or key in OPEN_MPI}
    everything = OPEN_MPI | VOLCANO | MODELARTS | SLURM | MINDCLUSTER
    assert place(everything, ["16", "8", "h", "", "1"]) == (16, 8, "h", 8118, 1)
    assert nodes.find(["2"], everything, lambda: 32).source == nodes.ARGUMENTS


@pytest.mark.parametrize(
    "environ,words",
    [
        ({key: value for key, value in MINDCLUSTER.items() if key != "MS_SCHED_PORT"}, "MS_SCHED_PORT is not set, but"),
        (MINDCLUSTER | {"MS_NODE_RANK": "0"}, "Scheduler has no NPU"),
        (MINDCLUSTER | {"MS_LOCAL_WORKER": "0"}, "Scheduler has no NPU"),
        (MINDCLUSTER | {"MS_WORKER_NUM": "eight"}, "MS_WORKER_NUM is 'eight'"),
        (MINDCLUSTER | {"MS_NODE_RANK": "4"}, r"NODE_RANK is '4', but must be from 0 to 3, .* \(by MindCluster"),
        ({"SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "4", "SLURM_NODEID": "0"}, "this is the batch script"),
        (SLURM | {"SLURM_STEP_NUM_TASKS": "32"}, "SLURM_STEP_NUM_TASKS is 32 on 4 nodes"),
        (SLURM | {"SLURM_STEP_NUM_NODES": "5", "SLURM_STEP_NUM_TASKS": "5"}, "32 ranks, which 5 machines"),
        ({"NNODES": "2", "NODE_RANK": "0"}, "MASTER_ADDR is not set, but NODE_RANK of NNODES is"),
        (MODELARTS | {"MASTER_PORT": "0"}, "MASTER_PORT is '0'"),
        ({"VC_WORKER_HOSTS": ",", "VC_TASK_INDEX": "0"}, "VC_WORKER_HOSTS is empty"),
        (OPEN_MPI | {"OMPI_COMM_WORLD_LOCAL_SIZE": "8"}, "--map-by ppr:1:node"),
        (OPEN_MPI | {"MASTER_ADDR": ""}, "MASTER_ADDR is missing"),
    ],
)
def test_what_does_not_fit_is_a_sentence(environ, words):
    with pytest.raises(ConfigError, match=words):
        place(environ)


@pytest.mark.parametrize(
    "hosts,first",
    [
        ("node7", "node7"),
        ("a-1,b-2", "a-1"),
        ("npu[011-013,020],gpu[1-2]", "npu011"),
        ("rack[2-3]n[004-007,9].example", "rack2n004.example"),
    ],
)
def test_first_host_of_a_slurm_list(hosts, first):
    assert nodes.first_host(hosts) == first


def test_the_launcher_prints_the_source_and_waits(tmp_path):
    """A recording msrun in PATH; the YAML's degrees say how many ranks four machines share."""
    (tmp_path / "msrun").write_text('#!/bin/sh\necho "msrun $*"\n')
    (tmp_path / "msrun").chmod(0o755)
    exports = " ".join(f"{name}='{value}'" for name, value in (MODELARTS | {"NNODES": "4"}).items())
    config = ROOT / "research/deepseek3/deepseek3_671b/pretrain_deepseek3_671b.yaml"
    script = f"PATH={tmp_path}:$PATH {exports} bash {ROOT}/scripts/msrun_launcher.sh"
    result = run_command(["bash", "-c", f"{script} 'run_mindformer.py --config {config}'"], tmp_path)
    # Without cards 1024 ranks on four machines end here; the place is said before.
    assert "machine 1 of 4 (by NODE_RANK of NNODES): ranks 256 to 511 of 1024, scheduler job-0.example:6060" in (
        result.stdout
    )
    assert "LOCAL_WORKER_NUM is 256, but without NPUs all 1024 ranks run on one machine" in result.stderr
    tiny = ROOT / "research/deepseek3/deepseek3_tiny/pretrain_deepseek3_tiny.yaml"
    command = f"{script} 'run_mindformer.py --config {tiny}'"
    result = run_command(["bash", "-c", f"{command} 8 2 job-0.example 6060 1"], tmp_path)
    assert result.returncode == 0 and "--node_rank=1" in result.stdout and "--join=False" in result.stdout
    result = run_command(["bash", "-c", command], tmp_path)
    assert result.returncode == 2 and "parallel_config.data_parallel is 1, but the run is to be shared" in result.stderr
    exports = " ".join(f"{name}='{value}'" for name, value in MINDCLUSTER.items())
    script = f"PATH={tmp_path}:$PATH {exports} bash {ROOT}/scripts/msrun_launcher.sh"
    result = run_command(["bash", "-c", f"{script} 'run_mindformer.py --config {tiny}' '' '' '' '' '' logs"], tmp_path)
    assert result.returncode == 0, result.stderr
    assert "--worker_num=32 --local_worker_num=8 --master_addr=10.96.0.7 --master_port=2222 --node_rank=3 " in (
        result.stdout
    )
    assert "--log_dir=logs --join=True" in result.stdout
