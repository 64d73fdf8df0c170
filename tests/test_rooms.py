"""The rooms of mindformers_ext and their order: no import runs from a lower room to a higher one."""

import ast
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1] / "mindformers_ext"
# From the ground up; docs/architecture.md draws it. A file of the package's own folder is a room by its name.
ROOMS = (
    "later_imports",
    "errors",
    "built_library",
    "child_process",
    "files",
    "cpu_kernels",
    "collectives",
    "bin_dataset",
    "config",
    "layers",
    "sharded_checkpoint",
    "data",
    "training",
    "rank_compiler",
    "dryrun",
    "lowering",
    "cpu_parallel",
    "cluster",
    "first_hour",
)


def imported(file: Path) -> set[str]:
    """Rooms that a file imports from, at its top or inside its functions."""
    names = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    return {name.split(".")[1] for name in names if name.startswith("mindformers_ext.")}


def room(file: Path) -> str:
    return file.relative_to(PACKAGE).parts[0].removesuffix(".py")


def test_every_room_has_its_place():
    files = [file for file in PACKAGE.rglob("*.py") if file != PACKAGE / "__init__.py"]
    assert {room(file) for file in files} == set(ROOMS)


def test_no_import_runs_upwards():
    upwards = [
        f"{file.relative_to(PACKAGE)} imports {name}"
        for file in PACKAGE.rglob("*.py")
        if file != PACKAGE / "__init__.py"
        for name in imported(file)
        if ROOMS.index(name) > ROOMS.index(room(file))
    ]
    assert upwards == []


def test_the_library_imports_no_script():
    scripts = {"run_mindformer", "scripts", "dataset_tools", "tests", "benchmarks"}
    for file in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            assert not {name.split(".")[0] for name in names} & scripts, file
