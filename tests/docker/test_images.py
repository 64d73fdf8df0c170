"""The Dockerfiles' own steps, without a container engine: in a root that debootstrap makes."""

import fnmatch
import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers.command_line import ROOT

from mindformers_ext.first_hour.environment import CANN_VERSIONS

DOCKER = ROOT / "docker"
VERSIONS = dict(re.findall(r"^(\w+)=(\S+)$", (DOCKER / "versions.env").read_text(), re.M))
# How this machine reaches its package registries; the root sees the same.
REGISTRIES = ("/etc/resolv.conf", "/etc/ssl/certs/ca-certificates.crt", "/etc/pip.conf", "/etc/xdg/pip", "/opt")
# What the base image of Python has; Debian's Python of the same version stands in for it.
BASE = "python3,python3-pip,python3-dev,python-is-python3,ca-certificates"
can_make_roots = pytest.mark.skipif(
    os.geteuid() != 0 or not shutil.which("debootstrap"), reason="needs root and the program debootstrap"
)


def steps(name: str) -> list[tuple[str, str]]:
    """The instructions of a Dockerfile and their arguments."""
    text = re.sub(r"^#.*\n", "", (DOCKER / name).read_text(), flags=re.M).replace("\\\n", " ")
    return [tuple(line.split(" ", 1)) for line in text.splitlines() if line.strip()]


class Image:
    """A root in which instructions are carried out as an engine would."""

    def __init__(self, root: Path):
        self.root, self.folder, self.user, self.shell = root, "/", "0:0", "/bin/sh -c"
        self.environment = {"HOME": "/root", "PATH": "/usr/local/bin:/usr/local/sbin:/usr/bin:/usr/sbin:/bin:/sbin"}
        self.command: list[str] = []

    def do(self, instruction: str, argument: str) -> None:
        """Carry out one instruction."""
        if instruction == "RUN":
            self.run([*self.shell.split(), argument])
        elif instruction == "COPY":
            self.copy(*argument.split())
        elif instruction == "WORKDIR":
            self.folder = argument
            (self.root / argument[1:]).mkdir(parents=True, exist_ok=True)
        elif instruction == "USER":
            users = dict(re.findall(r"^\w+:x:(\d+):.*:(/[^:]+):[^:]*$", (self.root / "etc/passwd").read_text(), re.M))
            self.user, self.environment["HOME"] = f"{argument}:{argument}", users[argument]
        elif instruction == "ENV":
            self.environment |= dict(word.split("=", 1) for word in shlex.split(argument))
        elif instruction == "SHELL":
            self.shell = " ".join(re.findall(r'"([^"]+)"', argument))
        elif instruction == "CMD":
            self.command = re.findall(r'"([^"]+)"', argument)
        else:
            assert instruction in ("ARG", "FROM"), instruction

    def copy(self, *words: str) -> None:
        """COPY from the project, without what .dockerignore names."""
        *sources, target = words
        ignored = (ROOT / ".dockerignore").read_text().split()

        def left_out(folder: str, names: list[str]) -> list[str]:
            at = Path(folder).relative_to(ROOT)
            return [
                name
                for name in names
                if any(
                    fnmatch.fnmatch(name if p.startswith("**/") else str(at / name), p[3 * p.startswith("**/") :])
                    for p in ignored
                )
            ]

        for source in sources:
            to = self.root / self.folder[1:] / target
            if (ROOT / source).is_dir():
                shutil.copytree(ROOT / source, to, ignore=left_out, dirs_exist_ok=True, symlinks=True)
            else:
                shutil.copy2(ROOT / source, to)

    def run(self, command: list[str], timeout: int = 3600) -> str:
        """What a command prints inside; its mounts are gone with it."""
        for path in map(Path, REGISTRIES):
            place = self.root / path.relative_to("/")
            if path.is_dir():
                place.mkdir(parents=True, exist_ok=True)
            elif path.exists():
                place.parent.mkdir(parents=True, exist_ok=True)
                place.touch()
        mounts = [
            f"mount --rbind {path} {self.root}{path}" for path in ("/dev", "/sys", *filter(os.path.exists, REGISTRIES))
        ]
        inside = ["chroot", f"--userspec={self.user}", str(self.root), "env", f"--chdir={self.folder}", *command]
        script = "\n".join([*mounts, f"mount -t proc proc {self.root}/proc", f"exec {shlex.join(inside)}"])
        kept = {
            name: value
            for name, value in os.environ.items()
            if name.startswith("PIP_") or "CERT" in name or "CA_" in name
        }
        done = subprocess.run(
            ["unshare", "--mount", "--pid", "--fork", "--kill-child", "bash", "-euc", script],
            env=kept | self.environment, capture_output=True, text=True, timeout=timeout,
        )  # fmt: skip
        assert done.returncode == 0, f"{command}: {done.stdout[-3000:]}{done.stderr[-3000:]}"
        return done.stdout


@pytest.fixture
def base(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A Debian with Python, a new one for each image: what one installs is no help to the other."""
    root = tmp_path_factory.mktemp("image")
    listed = subprocess.run(["apt-get", "indextargets", "--format", "$(REPO_URI)"], capture_output=True, text=True)
    mirror = next(uri for uri in listed.stdout.split() if uri.endswith("/debian/"))
    subprocess.run(
        ["unshare", "--mount", "debootstrap", "--variant=minbase", f"--include={BASE}", "bookworm", str(root), mirror],
        check=True,
    )
    root.chmod(0o755)  # pytest's folders are root's alone
    for marker in root.glob("usr/lib/python3*/EXTERNALLY-MANAGED"):
        marker.unlink()
    yield root
    shutil.rmtree(root)


@pytest.mark.slow
@can_make_roots
def test_the_image_for_cpu_ends_in_the_quickstart_without_a_compiler(base: Path) -> None:
    image = Image(base)
    for instruction, argument in steps("Dockerfile.cpu"):
        image.do(instruction, argument)
    as_root = Image(base)
    as_root.run(["sh", "-c", "apt-get purge --yes --auto-remove g++ gcc cpp && ! command -v cc gcc g++ c++"])
    said = image.run(image.command)
    assert "Training summary" in said and "is below it" in said


@pytest.mark.slow
@can_make_roots
def test_the_image_for_ascend_up_to_what_needs_cann(base: Path) -> None:
    """Its base has CANN, which nobody else has; all its steps run without, and the versions are those of the table."""
    image = Image(base)
    for instruction, argument in steps("Dockerfile.ascend"):
        image.do(instruction, argument)
    table = image.run(
        ["python", "-c", "from mindformers_ext.first_hour.environment import check_environment as table\n"
         "print(*(row['name'] for row in table() if row['right']))"]
    )  # fmt: skip
    assert table.split() == ["Python", "MindSpore", "MindFormers"]
    assert image.run(["python", "run_mindformer.py", "--help"]).startswith("usage: run_mindformer.py")


def test_the_images_are_of_the_versions_that_runs_ask_for() -> None:
    """Python's and CANN's, as scripts/first_hour.sh checks them; and of all that Dockerfiles ask for."""
    cann = re.fullmatch(r".+/cann:(\d+\.\d+)\.\d+-910b-ubuntu22\.04-py3\.11", VERSIONS["ASCEND_IMAGE"])
    assert cann and cann[1] in CANN_VERSIONS
    assert re.fullmatch(r"python:3\.11\.\d+-slim-bookworm", VERSIONS["PYTHON_IMAGE"])
    for name in ("Dockerfile.cpu", "Dockerfile.ascend"):
        asked = [re.search(r"\w+", argument)[0] for instruction, argument in steps(name) if instruction == "ARG"]
        assert asked and set(asked) <= set(VERSIONS)
