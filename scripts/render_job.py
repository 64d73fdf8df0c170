"""Write the job of a training for a cluster's scheduler, sized by the YAML's own number of ranks.

    python scripts/render_job.py --config research/deepseek3/deepseek3_1b/pretrain_deepseek3_1b.yaml --kind ascendjob \
        --name deepseek3 --image deepseek3-mindspore:ascend > job.yaml && kubectl apply -f job.yaml
    python scripts/render_job.py --config research/deepseek3/deepseek3_1b/pretrain_deepseek3_1b.yaml --kind slurm \
        > job.sh && sbatch job.sh

ascendjob is MindCluster's (Scheduler and Workers, gang scheduling), volcano a plain Volcano Job; what is your cluster's
(volumes, node selector, queue) is in docker/kubernetes/. slurm is scripts/slurm.sh with its size filled in. Options
--section.key go into the run's command. A job that starts again goes on from its own last checkpoint.
"""

import argparse
import copy
import re
import shlex
import sys
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from mindformers_ext.config.run import Run  # noqa: E402 (after the project is on the path)
from mindformers_ext.config.run_rules import refuse  # noqa: E402
from mindformers_ext.config.strategy_rules import check_plan  # noqa: E402
from mindformers_ext.cpu_parallel.command import read_plan  # noqa: E402
from mindformers_ext.errors import ConfigError, exit_code_of  # noqa: E402
from mindformers_ext.files.atomic import write_text  # noqa: E402

PARTS = ROOT / "docker/kubernetes"
NPU = "huawei.com/Ascend910"


def machines_of(plan: Run, each: int) -> tuple[int, int]:
    """Machines, and ranks of each. Raises ConfigError when the ranks do not fill machines evenly."""
    if plan.device_num <= each:
        return 1, plan.device_num
    if plan.device_num % each:
        raise ConfigError(
            f"{plan.path}: the degrees ask for {plan.device_num} ranks, which do not fill machines of {each}; give "
            "--devices_per_node a divisor, or change parallel_config"
        )
    return plan.device_num // each, each


def pod(name: str, image: str, command: list[str], npus: int) -> dict[str, Any]:
    """The pod template of one machine."""
    template = yaml.safe_load((PARTS / "pod.yaml").read_text())
    template["metadata"]["labels"]["app"] = name
    container = template["spec"]["containers"][0]
    container |= {"image": image, "command": command}
    container["resources"] = {"requests": {NPU: npus}, "limits": {NPU: npus}}
    return template


def ascend_job(name: str, machines: int, template: dict[str, Any]) -> dict[str, Any]:
    """MindCluster's AscendJob: the Scheduler is the first machine."""
    job = yaml.safe_load((PARTS / "ascendjob.yaml").read_text())
    job["metadata"]["name"] = name
    job["spec"]["runPolicy"]["schedulingPolicy"]["minAvailable"] = machines
    counts = {"Scheduler": 1, "Worker": machines - 1}
    job["spec"]["replicaSpecs"] = {
        role: {"replicas": count, "restartPolicy": "Never", "template": copy.deepcopy(template)}
        for role, count in counts.items()
        if count
    }
    return job


def volcano_job(name: str, machines: int, template: dict[str, Any]) -> dict[str, Any]:
    """A plain Volcano Job; the task's name is what its variables are called by (VC_WORKER_HOSTS)."""
    job = yaml.safe_load((PARTS / "volcano.yaml").read_text())
    job["metadata"]["name"] = name
    job["spec"]["minAvailable"] = machines
    job["spec"]["tasks"] = [{"name": "worker", "replicas": machines, "template": template}]
    return job


def slurm_job(name: str, machines: int, npus: int, config: str, rest: list[str], output_dir: str) -> str:
    """scripts/slurm.sh with its size and its run."""
    text = (ROOT / "scripts/slurm.sh").read_text()
    text = text.replace("--job-name=deepseek3", f"--job-name={name}")
    size = f"#SBATCH --nodes={machines}\n#SBATCH --gres=npu:{npus}\n"
    text = text.replace("#SBATCH --ntasks-per-node=1\n", f"{size}#SBATCH --ntasks-per-node=1\n", 1)
    values = {"CONFIG": shlex.quote(config), "OUTPUT_DIR": shlex.quote(output_dir), "OPTIONS": f"({shlex.join(rest)})"}
    for variable, value in values.items():
        text = re.sub(rf"^{variable}=.*$", lambda _, line=f"{variable}={value}": line, text, flags=re.M)
    return text


def main(argv: list[str] | None = None) -> None:
    """Parse, check the plan, and write the job."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, help="the run's YAML, as the machines find it")
    parser.add_argument("--kind", required=True, choices=["ascendjob", "volcano", "slurm"])
    parser.add_argument("--name", default="deepseek3", help="of the job")
    parser.add_argument("--image", default="deepseek3-mindspore:ascend", help="of docker/build.sh ascend")
    parser.add_argument("--devices_per_node", type=int, default=8)
    parser.add_argument("--output", type=Path, help="file; default is the terminal")
    args, rest = parser.parse_known_args(argv)
    if not re.fullmatch(r"[a-z0-9]([-a-z0-9]{0,50}[a-z0-9])?", args.name):
        raise ConfigError(f"--name is {args.name!r}, but must be up to 52 lower-case letters, digits and '-'")
    if args.devices_per_node < 1:
        raise ConfigError(f"--devices_per_node is {args.devices_per_node}, but must be at least 1")
    plan = read_plan(["--config", args.config, *rest, "--use_parallel", "True"])
    if plan.is_semi_auto:
        refuse(plan, check_plan(plan))
    machines, npus = machines_of(plan, args.devices_per_node)
    output_dir = plan.sections.output_dir
    if args.kind == "slurm":
        text = slurm_job(args.name, machines, npus, args.config, rest, output_dir)
    else:
        command = ["bash", "scripts/train_job.sh", args.config, output_dir, *rest]
        template = pod(args.name, args.image, command, npus)
        job = {"ascendjob": ascend_job, "volcano": volcano_job}[args.kind](args.name, machines, template)
        head = f"# {machines} x {npus} NPUs for {args.config}, by scripts/render_job.py from docker/kubernetes\n"
        text = head + yaml.safe_dump(job, sort_keys=False, width=10_000)
    if args.output:
        write_text(args.output, text)
        print(f"wrote {args.output}: {machines} x {npus} NPUs")
    else:
        print(text, end="")


if __name__ == "__main__":
    sys.exit(exit_code_of(main))
