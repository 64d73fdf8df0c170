"""A Slurm of one machine for tests: `sbatch`, `srun` and `scontrol` in a folder, which start every task here."""

import os
import sys
from pathlib import Path

SBATCH = r"""
import os, re, shutil, subprocess, sys
options, script, rest = {}, None, []
for word in sys.argv[1:]:
    if script is not None:
        rest.append(word)
    elif word.startswith("--"):
        options.update([word[2:].split("=", 1)])
    else:
        script = word
given = dict(re.findall(r"^#SBATCH --([a-z-]+)=?(.*)$", open(script).read(), re.M)) | options
spooled = os.path.join(os.environ["FAKE_SLURM"], "slurm_script")  # Slurm runs a copy
shutil.copy(script, spooled)
print("Submitted batch job 4242", flush=True)
base = dict(os.environ, SLURM_JOB_ID="4242", SLURM_SUBMIT_DIR=os.getcwd(), SLURM_NODEID="0")
base["SLURM_JOB_NUM_NODES"] = given.get("nodes", "1")
for pair in given.get("export", "").split(",")[1:]:
    base.update([pair.split("=", 1)])
if "array" not in given:
    batch = subprocess.Popen(["bash", spooled, *rest], env=base)
    open(os.path.join(os.environ["FAKE_SLURM"], "pid"), "w").write(str(batch.pid))
    sys.exit(batch.wait())
first, last = map(int, (given["array"].split("%")[0].split("-") * 2)[:2])
for task in range(first, last + 1):
    own = {"SLURM_ARRAY_TASK_ID": task, "SLURM_ARRAY_TASK_MIN": first, "SLURM_ARRAY_TASK_COUNT": last - first + 1}
    subprocess.run(["bash", spooled, *rest], env=base | {key: str(value) for key, value in own.items()}, check=True)
"""
SRUN = r"""
import os, subprocess, sys
words = sys.argv[1:]
while words[0].startswith("-"):
    if words.pop(0) == "-n":
        words.pop(0)
nodes = int(os.environ["SLURM_JOB_NUM_NODES"])
step = {"SLURM_STEP_NUM_NODES": str(nodes), "SLURM_STEP_NUM_TASKS": str(nodes)}
step["SLURM_STEP_NODELIST"] = os.environ.get("FAKE_NODES", f"127.0.0.[1-{nodes}]")
tasks = [subprocess.Popen(words, env=dict(os.environ, **step, SLURM_NODEID=str(i))) for i in range(nodes)]
sys.exit(max(task.wait() for task in tasks))
"""
SCONTROL = r"""
import os, sys
open(os.path.join(os.environ["FAKE_SLURM"], "requeued"), "w").write(" ".join(sys.argv[1:]))
"""


def install(folder: Path) -> dict[str, str]:
    """Put the three commands into a folder; returns the environment in which they are found."""
    for name, text in (("sbatch", SBATCH), ("srun", SRUN), ("scontrol", SCONTROL)):
        (folder / name).write_text(f"#!{sys.executable}{text}")
        (folder / name).chmod(0o755)
    path = os.pathsep.join([str(folder), str(Path(sys.executable).parent), os.environ["PATH"]])
    return dict(os.environ, PATH=path, FAKE_SLURM=str(folder), GLOG_v="3", OMP_NUM_THREADS="1")
