"""Stand-in CANN libraries, so that MindSpore's Ascend plugin loads on a machine without CANN, driver or card.

Extends: mindspore/lib/plugin/libmindspore_ascend.so.2 (MindSpore 2.9.0, PyPI wheel for x86-64 Linux).
Why: the wheel holds the whole Ascend compiler front end, yet it refuses to load where CANN's shared libraries are
missing, so nobody can check a strategy without cards. With `MS_SIMULATION_LEVEL` set the front end never asks
those libraries to compute anything: functions that exist and return success are enough.
Goes: when MindSpore's dry run works without CANN.

The libraries are built once per MindSpore wheel with the system's C compiler and cached. They have to be in the
environment *before* Python starts, so the compiler always runs in a child process (`python -m` this module builds them
ahead, for images without a compiler)::

    env = ascend_environment(rank=17, world_size=1024, level=COMPILE)
    subprocess.run([sys.executable, "-m", "mindformers_ext.rank_compiler.compile_rank", ...], env=env)
"""

import ctypes
import fcntl
import hashlib
import importlib.metadata
import importlib.util
import os
import re
import shutil
import subprocess
import tempfile
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from elftools.common.exceptions import ELFError
from elftools.elf.elffile import ELFFile

from mindformers_ext.training.start import GRAPH_KERNEL_FLAGS

COMPILE = 0  # MS_SIMULATION_LEVEL: graph compilation only
MEMORY = 1  # graph compilation and the memory plan of the device
SUPPORTED_VERSIONS = ("2.9.0",)  # 2.10.0 loads over stand-ins, but its compiler crashes

# Libraries the plugin is linked against, and those it opens by name.
LIBRARY_NAMES = (
    "libge_runner libgraph libascendcl libmsprofiler libhccl libruntime libplatform libc_sec libnnopbase "
    "libascend_hal libatb libacl_dvpp libacl_dvpp_op libacl_dvpp_mpi libacl_op_compiler libacl_tdt_channel libopapi "
    "libcust_opapi libaclnn_math libaclnn_ops_infer libaclnn_ops_train libmmpa liberror_manager"
)
SYSTEM_LIBRARIES = "libc.so.6 libstdc++.so.6 libm.so.6 libpthread.so.0 libdl.so.2 libgcc_s.so.1 librt.so.1 libgomp.so.1"
# Undefined in the plugin, but resolved by the interpreter or the loader.
FOREIGN_SYMBOL = re.compile(r"Py|_Py|_ITM|__gmon|__tls_get_addr|__cxa_|_dl_")
# APIs that the plugin looks up with dlsym: only their names, as strings, are in the libraries.
DLSYM_NAME = re.compile(rb"(?<=\0)((?:aclnn|acl|Hccl|Hcom|rt|hal)[A-Za-z0-9_]+)(?=\0)")
IDENTIFIER = re.compile(r"[A-Za-z_]\w*")
CREATES_HANDLE = re.compile(r"(?:acl|aclop|aclmdl|aclprof|acltdt)Create")
DATA_SYMBOL = ("_ZTV", "_ZTI", "_ZTS", "_ZTT")  # vtables and type information
SYMBOL_DTYPE = np.dtype(
    [("name", "<u4"), ("info", "u1"), ("other", "u1"), ("section", "<u2"), ("value", "<u8"), ("size", "<u8")]
)
# The plugin's own simulation of this call returns at once, so that the thread which waits for callbacks spins and takes
# a whole core from the compiler. Loaded before the plugin, this one takes its place and waits as the real one does.
WAITS = "libwaits_for_callbacks.so"
WAITS_SOURCE = """#include <unistd.h>
int _ZN9mindspore6device6ascend27SimuFuncIaclrtProcessReportIiEET_i(int timeout) { usleep(5000); return 0; }
"""
RECIPE = 2  # raise when the generated libraries change, so that old caches are not used


class StandInError(RuntimeError):
    """The stand-in libraries cannot be built on this machine; the message says what to do."""


def ascend_environment(rank: int, world_size: int, level: int = COMPILE) -> dict[str, str]:
    """Environment for a child process that compiles as `rank` of a cluster of `world_size` Ascend cards.

    Builds the stand-in libraries on first use (about 20 s). The result is the caller's own environment plus what
    the plugin needs. `level` is COMPILE or MEMORY. Raises StandInError with what is missing, ValueError for a rank
    outside the cluster.
    """
    if not 0 <= rank < world_size:
        raise ValueError(f"rank {rank} is not in a cluster of {world_size} devices: use 0 to {world_size - 1}")
    home = stand_in_home()
    env = dict(os.environ)
    env.update(
        LD_LIBRARY_PATH=_prepend(f"{home}/lib64", env.get("LD_LIBRARY_PATH")),
        PYTHONPATH=_prepend(f"{home}/python", env.get("PYTHONPATH")),
        LD_PRELOAD=_prepend(f"{home}/lib64/{WAITS}", env.get("LD_PRELOAD")),
        ASCEND_HOME_PATH=str(home),
        ASCEND_OPP_PATH=str(home),
        MS_SIMULATION_LEVEL=str(level),
        RANK_SIZE=str(world_size),
        RANK_ID=str(rank),
    )
    if level == MEMORY:
        env["GLOG_v"] = "2"  # MindSpore prints its memory plan as a warning
        # Fused kernels of jit_level O1 are built by a compiler that only CANN has; unfused ones keep no less memory.
        env[GRAPH_KERNEL_FLAGS] = f"{env.get(GRAPH_KERNEL_FLAGS, '')} --opt_level=0".strip()
    for name in ("MS_ROLE", "MS_WORKER_NUM", "MS_SCHED_HOST", "MS_SCHED_PORT", "MS_NODE_ID"):
        env.pop(name, None)  # a child of an msrun worker must not join the parent's cluster
    return env


def stand_in_home() -> Path:
    """Folder of the stand-in libraries for the installed MindSpore; built on first use, safe to call concurrently."""
    package = _mindspore_folder()
    plugin = plugin_libraries(package)
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "deepseek3-mindspore" / "stand_in"
    folder = cache / f"{importlib.metadata.version('mindspore')}-{_fingerprint(plugin)}"
    home = folder / "cann"  # MindSpore cuts the libraries' path after its last "cann" to find CANN's home
    if home.is_dir():
        return home
    folder.mkdir(parents=True, exist_ok=True)
    with _exclusive(folder / "lock"):
        if not home.is_dir():
            _build(home, generate_source(package, plugin))
    return home


def plugin_libraries(package: Path) -> list[Path]:
    """Shared libraries of the Ascend plugin that need CANN. Raises StandInError where the wheel lacks them."""
    plugin = package / "lib" / "plugin"
    required = [plugin / "libmindspore_ascend.so.2", plugin / "libmindspore_ops_ascend.so"]
    required += [plugin / "ascend" / f"lib{n}.so" for n in ("mindspore_ascend_res_manager", "hccl_plugin")]
    for path in required:
        if not path.is_file():
            raise StandInError(
                f"{path} is missing: this MindSpore has no Ascend plugin; install the PyPI wheel of MindSpore "
                f"{SUPPORTED_VERSIONS[0]} for x86-64 Linux"
            )
    # Left out is what runs on the card's own CPU, or is opened by operators only: never loaded in a dry run.
    found = {p for p in (plugin / "ascend").rglob("*.so*") if not re.search("cpu_kernels|libcust", p.name)}
    return sorted(found | set(required))


def generate_source(package: Path, plugin: list[Path]) -> str:
    """C source that defines every symbol which `plugin` needs and nobody in the wheel or the system provides."""
    defined: set[str] = set()
    for path in sorted({*package.glob("*.so"), *package.glob("lib/*.so*"), *package.glob("lib/plugin/*.so*"), *plugin}):
        if "gpu" not in path.name:
            defined |= dynamic_symbols(path)[0]
    needed: set[str] = set()
    for path in plugin:
        needed |= dynamic_symbols(path)[1] - defined
        needed |= {m.decode() for m in DLSYM_NAME.findall(path.read_bytes())} - defined
    system = _system_libraries()
    names = sorted(n for n in needed if _is_ours(n, system))
    return "#include <string.h>\nstatic char handle[4096];\n" + "".join(map(_definition, names))


def dynamic_symbols(path: Path) -> tuple[set[str], set[str]]:
    """Names that a shared library exports, and names that it needs from others (weak ones left out)."""
    with path.open("rb") as stream:
        try:
            section = ELFFile(stream).get_section_by_name(".dynsym")
        except ELFError as error:
            raise StandInError(f"{path} is not a shared library ({error}): reinstall the MindSpore wheel") from error
        if section is None:
            return set(), set()
        # Read as one array: pyelftools takes minutes for the 10^6 symbols of the wheel one by one.
        symbols = np.frombuffer(section.data(), SYMBOL_DTYPE)
        strings = section.stringtable.data()
    strong = (symbols["info"] >> 4) != 2
    exported = symbols["name"][symbols["section"] != 0]
    needed = symbols["name"][(symbols["section"] == 0) & strong & (symbols["name"] != 0)]
    return {_string(strings, i) for i in exported}, {_string(strings, i) for i in needed}


def _string(strings: bytes, start: int) -> str:
    return strings[start : strings.index(b"\0", start)].decode()


def _definition(name: str) -> str:
    """C definition of one stand-in symbol."""
    if name.startswith(DATA_SYMBOL):
        return f"char {name}[4096];\n"
    if "OperatorFactory14CreateOperator" in name:
        # Returns a ge::Operator by value: the caller passes where to put it, and expects that address back.
        return f"void *{name}(void *result) {{ memset(result, 0, 24); return result; }}\n"
    if CREATES_HANDLE.match(name):
        return f"void *{name}(void) {{ return handle; }}\n"
    return f"long {name}(void) {{ return 0; }}\n"


def _is_ours(name: str, system: list[ctypes.CDLL]) -> bool:
    if not IDENTIFIER.fullmatch(name) or FOREIGN_SYMBOL.match(name):
        return False
    return not any(hasattr(library, name) for library in system)


def _system_libraries() -> list[ctypes.CDLL]:
    loaded = []
    for name in SYSTEM_LIBRARIES.split():
        try:
            loaded.append(ctypes.CDLL(name))
        except OSError:
            continue  # absent here: then the plugin does not link against it either
    return loaded


def _build(home: Path, source: str) -> None:
    """Compile the stand-ins next to `home`, then rename: nobody ever sees half a folder."""
    compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None or shutil.which(compiler) is None:
        raise StandInError(
            "no C compiler found (looked for $CC, cc, gcc, clang): install one, for example `apt-get install gcc`"
        )
    with tempfile.TemporaryDirectory(dir=home.parent, prefix=".build-") as temporary:
        root = Path(temporary) / "cann"
        (root / "lib64").mkdir(parents=True)
        (root / "stand_in.c").write_text(source)
        _run_compiler(compiler, "-w", "-O1", "-fPIC", "-fno-builtin", "-c", "stand_in.c", "-o", "stand_in.o", cwd=root)
        for name in LIBRARY_NAMES.split():
            target = f"lib64/{name}.so"
            _run_compiler(compiler, "-shared", f"-Wl,-soname,{name}.so", "-o", target, "stand_in.o", cwd=root)
        (root / "stand_in.o").unlink()
        (root / "waits.c").write_text(WAITS_SOURCE)
        _run_compiler(compiler, "-O1", "-fPIC", "-shared", "waits.c", "-o", f"lib64/{WAITS}", cwd=root)
        hccl = root / "python" / "hccl"
        hccl.mkdir(parents=True)
        (hccl / "__init__.py").write_text('"""Stand-in for CANN\'s hccl."""\n')
        (hccl / "sys_version.py").write_text('__sys_version__ = "stand-in"\n')
        root.rename(home)


def _run_compiler(*command: str, cwd: Path) -> None:
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True)
    if done.returncode:
        raise StandInError(
            f"the C compiler failed on the stand-in libraries: {' '.join(command)}\n{done.stderr[-2000:]}"
        )


def _mindspore_folder() -> Path:
    """Folder of the installed MindSpore, found without importing it."""
    spec = importlib.util.find_spec("mindspore")
    if spec is None or not spec.origin:
        raise StandInError(f"MindSpore is not installed: pip install mindspore=={SUPPORTED_VERSIONS[0]}")
    version = importlib.metadata.version("mindspore")
    if version not in SUPPORTED_VERSIONS:
        raise StandInError(
            f"MindSpore {version} is not supported by the dry run: install one of {', '.join(SUPPORTED_VERSIONS)}"
        )
    return Path(spec.origin).parent


def _fingerprint(plugin: list[Path]) -> str:
    """Names the wheel's build and this recipe; file sizes tell two wheels of one version apart."""
    text = f"{RECIPE} " + " ".join(f"{path.name}:{path.stat().st_size}" for path in plugin)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


@contextmanager
def _exclusive(path: Path):
    """Hold a lock file; the kernel frees it when its owner dies."""
    with path.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _prepend(first: str, rest: str | None) -> str:
    return f"{first}:{rest}" if rest else first


if __name__ == "__main__":
    print(stand_in_home())
