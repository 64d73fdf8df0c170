"""Jobs for MindCluster, Volcano and Slurm: valid by the schedulers' published schemas, and as large as the YAML."""

import subprocess
import sys
import time
from pathlib import Path

import jsonschema
import kubernetes_validate
import pytest
import yaml
from helpers import slurm
from helpers.command_line import ROOT, TOY, run_command

from mindformers_ext.bin_dataset.indexed_dataset import IndexedDataset
from mindformers_ext.errors import ConfigError
from scripts import render_job

NPU = "huawei.com/Ascend910"
LARGE = "research/deepseek3/deepseek3_671b/pretrain_deepseek3_671b.yaml"
SERVER = "research/deepseek3/deepseek3_1b/pretrain_deepseek3_1b.yaml"
COUNT, NAME = {"type": "integer", "minimum": 0}, {"type": "string"}
SUBDOMAIN = {"type": "string", "pattern": r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*$"}


def closed(**properties):
    return {"type": "object", "properties": properties, "additionalProperties": False}


POD = {"type": "object"}  # checked by kubernetes_validate
# What the published resources say beside pods: MindCluster's component/ascend-operator/build/ascend-operator.yaml
# (ascendjobs.mindxdl.gitee.com, v1) and Volcano's config/crd/volcano/bases/batch.volcano.sh_jobs.yaml (v1alpha1).
# Kubernetes drops unknown fields of both without a word, so here they are refused.
ASCEND_JOB = closed(
    replicaSpecs={
        "type": "object",
        "additionalProperties": closed(replicas=COUNT, restartPolicy=NAME, template=POD),
    },
    runPolicy=closed(
        activeDeadlineSeconds=COUNT,
        backoffLimit=COUNT,
        cleanPodPolicy=NAME,
        ttlSecondsAfterFinished=COUNT,
        schedulingPolicy=closed(minAvailable=COUNT, minResources=POD, priorityClass=NAME, queue=NAME),
    ),
    schedulerName=NAME,
    successPolicy={"enum": ["", "AllWorkers"]},
) | {"required": ["replicaSpecs"]}
EVENTS = (
    "* PodPending PodRunning PodFailed PodEvicted Unknown TaskCompleted OutOfSync CommandIssued JobUpdated TaskFailed"
)
POLICY = closed(
    action=NAME,
    event={"enum": EVENTS.split()},
    events={"type": "array", "items": {"enum": EVENTS.split()}},
    exitCode={"type": "integer"},
    timeout=NAME,
)
POLICIES = {"type": "array", "items": POLICY}
VOLCANO_JOB = closed(
    maxRetry=COUNT,
    minAvailable=COUNT,
    minSuccess=COUNT,
    plugins={"type": "object", "additionalProperties": {"type": "array", "items": NAME}},
    policies=POLICIES,
    priorityClassName=SUBDOMAIN,
    queue=SUBDOMAIN,
    runningEstimate=NAME,
    schedulerName={"type": "string", "maxLength": 63},
    tasks={
        "type": "array",
        "items": closed(
            maxRetry=COUNT,
            minAvailable=COUNT,
            name={"type": "string", "maxLength": 63, "pattern": "^[a-z0-9]([-a-z0-9]*[a-z0-9])?$"},
            policies=POLICIES,
            replicas=COUNT,
            template=POD,
        ),
    },
)


def rendered(capsys, kind, config=LARGE, *more):
    render_job.main(["--config", config, "--kind", kind, *more])
    text = capsys.readouterr().out
    return text if kind == "slurm" else yaml.safe_load(text)


def npus(template):
    container = template["spec"]["containers"][0]
    assert container["resources"]["limits"] == container["resources"]["requests"]
    return container["resources"]["limits"][NPU]


def check_pods(templates):
    for template in templates:
        resource = {"apiVersion": "v1", "kind": "PodTemplate", "metadata": {"name": "x"}, "template": template}
        kubernetes_validate.validate(resource, kubernetes_validate.latest_version(), strict=True)


@pytest.mark.parametrize("config,machines", [(LARGE, 128), (SERVER, 1)])
def test_an_ascend_job(capsys, config, machines):
    job = rendered(capsys, "ascendjob", config)
    assert (job["apiVersion"], job["kind"]) == ("mindxdl.gitee.com/v1", "AscendJob")
    jsonschema.validate(job["spec"], ASCEND_JOB)
    specs = job["spec"]["replicaSpecs"]
    check_pods(spec["template"] for spec in specs.values())
    # The Scheduler has cards and is machine 0, as MS_NODE_RANK counts then.
    assert list(specs) == ["Scheduler", "Worker"][: 1 if machines == 1 else 2] and specs["Scheduler"]["replicas"] == 1
    assert sum(spec["replicas"] for spec in specs.values()) == machines
    assert sum(spec["replicas"] * npus(spec["template"]) for spec in specs.values()) == machines * 8
    assert job["spec"]["runPolicy"]["schedulingPolicy"]["minAvailable"] == machines  # all or none
    assert job["metadata"]["labels"]["framework"] == "mindspore" and job["metadata"]["labels"]["fault-retry-times"]
    pod = specs["Scheduler"]["template"]["spec"]
    assert pod["terminationGracePeriodSeconds"] >= 60
    mounts = {mount["name"]: mount["mountPath"] for mount in pod["containers"][0]["volumeMounts"]}
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    assert mounts["shm"] == "/dev/shm" and volumes["shm"]["emptyDir"]["medium"] == "Memory"
    assert set(mounts) == set(volumes)


@pytest.mark.parametrize("config,machines", [(LARGE, 128), (SERVER, 1)])
def test_a_volcano_job(capsys, config, machines):
    job = rendered(capsys, "volcano", config, "--name", "run-7", "--image", "registry/x:1", "--seed", "3")
    assert (job["apiVersion"], job["kind"]) == ("batch.volcano.sh/v1alpha1", "Job")
    jsonschema.validate(job["spec"], VOLCANO_JOB)
    (task,) = job["spec"]["tasks"]
    check_pods([task["template"]])
    assert task["name"] == "worker"  # whose hosts are VC_WORKER_HOSTS
    assert (task["replicas"], job["spec"]["minAvailable"]) == (machines, machines)
    assert task["replicas"] * npus(task["template"]) == machines * 8
    container = task["template"]["spec"]["containers"][0]
    assert container["image"] == "registry/x:1" and job["metadata"]["name"] == "run-7"
    assert container["command"] == ["bash", "scripts/train_job.sh", config, "./output", "--seed", "3"]


def test_a_slurm_job(capsys):
    text = rendered(capsys, "slurm", LARGE, "--model.model_config.mtp_depth", "0", "--output_dir", "/shared/my out")
    assert "#SBATCH --nodes=128\n#SBATCH --gres=npu:8\n#SBATCH --ntasks-per-node=1\n" in text
    assert f"\nCONFIG={LARGE}\nOUTPUT_DIR='/shared/my out'\nOPTIONS=(--model.model_config.mtp_depth 0 " in text


@pytest.mark.parametrize(
    "arguments,words",
    [
        (
            ["--config", LARGE, "--kind", "slurm", "--devices_per_node", "7"],
            "1024 ranks, which do not fill",
        ),
        (["--config", LARGE, "--kind", "slurm", "--devices_per_node", "0"], "--devices_per_node is 0"),
        (["--config", LARGE, "--kind", "volcano", "--name", "My_Job"], "--name is 'My_Job'"),
        (["--config", LARGE, "--kind", "volcano", "--parallel_config.expert_parallel", "7"], "expert_parallel must"),
    ],
)
def test_what_is_refused(arguments, words):
    with pytest.raises(ConfigError) as error:
        render_job.main(arguments)
    assert words in str(error.value)


RECORDING = """#!/bin/sh
echo "msrun $*" >> "$FAKE_SLURM/msrun.$SLURM_NODEID"
i=0
while [ "$SLOW" ] && [ ! -e out/kill_switch ] && [ $i -lt 200 ]; do sleep 0.05; i=$((i + 1)); done
"""


def project(folder: Path) -> None:
    """A folder from which a job starts: the scripts and what they run, without copies."""
    for name in ("scripts", "research", "mindformers_ext", "dataset_tools", "run_mindformer.py"):
        (folder / name).symlink_to(ROOT / name)


def slurm_run(tmp_path, *words):
    """A rendered job of the toy over three machines with four ranks each, as a process of the fake Slurm."""
    project(tmp_path)
    (tmp_path / "bin").mkdir()
    environment = slurm.install(tmp_path / "bin")
    (tmp_path / "bin" / "msrun").write_text(RECORDING)
    (tmp_path / "bin" / "msrun").chmod(0o755)
    command = [sys.executable, "scripts/render_job.py", "--config", str(TOY / "train_toy.yaml"), "--kind", "slurm"]
    command += ["--devices_per_node", "4", "--parallel_config.data_parallel", "12", "--output_dir", "out", *words]
    done = run_command([*command, "--output", "job.sh"], tmp_path)
    assert done.returncode == 0 and "wrote job.sh: 3 x 4 NPUs" in done.stdout, done.stderr
    return environment


def test_slurm_starts_every_machine(tmp_path):
    environment = slurm_run(tmp_path, "--seed", "7")
    done = subprocess.run(
        ["sbatch", "job.sh"], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stdout + done.stderr
    for rank in range(3):
        line = (tmp_path / "bin" / f"msrun.{rank}").read_text()
        assert (
            f"--worker_num=12 --local_worker_num=4 --master_addr=127.0.0.1 --master_port=24242 --node_rank={rank} "
            in (line)
        )
        assert "--join=True" in line and "--seed 7" in line and "--load_checkpoint" not in line
    assert not (tmp_path / "bin" / "requeued").exists()


def test_slurms_time_limit_ends_the_run_and_requeues_it(tmp_path):
    environment = slurm_run(tmp_path)
    (tmp_path / "out/checkpoint").mkdir(parents=True)
    (tmp_path / "out/checkpoint/latest").touch()
    (tmp_path / "out/kill_switch").touch()  # left by a job that died
    run = subprocess.Popen(["sbatch", "job.sh"], cwd=tmp_path, env=environment | {"SLOW": "1"}, stdout=subprocess.PIPE)
    end = time.monotonic() + 60
    while len([*(tmp_path / "bin").glob("msrun.*")]) < 3 and time.monotonic() < end:
        time.sleep(0.05)
    subprocess.run(["kill", "-USR1", (tmp_path / "bin" / "pid").read_text()], check=True)
    out = run.communicate(timeout=60)[0]
    assert run.returncode == 0 and b"goes back into the queue" in out, out
    assert (tmp_path / "bin" / "requeued").read_text() == "requeue 4242"
    assert "--load_checkpoint out/checkpoint --resume_training True" in (tmp_path / "bin" / "msrun.2").read_text()


def test_sigterm_of_a_pod_asks_the_run_to_end(tmp_path):
    project(tmp_path)
    # The run ends at once, while the script is still busy with the signal.
    for name, text in (("msrun", RECORDING), ("touch", '#!/bin/sh\n/usr/bin/touch "$@"; sleep 0.5\n')):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    environment = slurm.install(tmp_path) | {"SLOW": "1", "SLURM_NODEID": "0", "NNODES": "1", "NODE_RANK": "0"}
    config, more = str(TOY / "train_toy.yaml"), ["--parallel_config.data_parallel", "2"]
    pod = subprocess.Popen(["bash", "scripts/train_job.sh", config, "out", *more], cwd=tmp_path, env=environment)
    end = time.monotonic() + 60
    while not (tmp_path / "msrun.0").exists() and time.monotonic() < end:
        time.sleep(0.05)
    pod.terminate()
    assert pod.wait(timeout=30) == 0 and (tmp_path / "out/kill_switch").exists()


def test_an_array_of_tokenizers_writes_what_one_would(tmp_path, tokenizer_file):
    project(tmp_path)
    (tmp_path / "bin").mkdir()
    environment = slurm.install(tmp_path / "bin")
    for i in range(5):
        (tmp_path / f"part{i}.jsonl").write_text(f'{{"text": "the router of expert {i}"}}\n' * (i + 1))

    def sbatch(*words):
        command = ["sbatch", *words]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stdout + done.stderr

    sbatch("--array=0-1", "scripts/slurm_data.sh", "part*.jsonl", "data", tokenizer_file)
    sbatch("--array=0", "scripts/slurm_data.sh", "--join", "data")
    joined = IndexedDataset(str(tmp_path / "data_text_document"))
    assert len(joined) == 1 + 2 + 3 + 4 + 5


@pytest.mark.slow
def test_slurm_really_trains(toy_folder, tmp_path):
    """Two data-parallel ranks of one machine, started by sbatch, srun, the launcher and msrun."""
    project(toy_folder)
    environment = slurm.install(tmp_path)
    command = [sys.executable, "scripts/render_job.py", "--config", str(TOY / "train_toy.yaml"), "--kind", "slurm"]
    command += ["--parallel_config.data_parallel", "2", "--register_path", str(TOY), "--output_dir", "slurm"]
    assert run_command([*command, "--output", "job.sh"], toy_folder).returncode == 0
    done = subprocess.run(["sbatch", "job.sh"], cwd=toy_folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert (toy_folder / "slurm/checkpoint/latest").exists()
