"""What the cost model assumes about a device and its network: a YAML of stated, replaceable numbers."""

import re
from dataclasses import dataclass, field, fields
from pathlib import Path

from mindformers_ext.config.yaml_files import load_yaml
from mindformers_ext.errors import ConfigError

FOLDER = Path(__file__).parent / "devices"
DEFAULT_PROFILE = FOLDER / "a2.yaml"


@dataclass(frozen=True)
class DeviceProfile:
    """One kind of device in servers; the YAML says where its numbers come from."""

    name: str
    peak_tflops: float  # dense bfloat16
    peak_fp8_tflops: float  # dense fp8; that of bfloat16 where there is none
    memory_gib: float
    usable_memory: float  # share of the memory that the framework may plan
    devices_per_node: int  # devices that the fast links join
    hbm_gb_per_s: float
    node_link_gb_per_s: float  # one link to other devices of the node, one direction
    node_links: int  # links of a device: one to each other device of a mesh, 1 to a switch that reaches all
    across_nodes_gb_per_s: float  # per device, one direction
    latency_us: float  # per collective call
    kernel_us: float  # per operator, on the device
    matmul_efficiency: float  # share of the peak that large products reach
    attention_efficiency: float
    memory_efficiency: float  # share of the memory's bandwidth
    network_efficiency: float  # share of the link bandwidth that collectives reach
    overlap_cost: float  # share of a hidden collective's time that computation takes longer beside it
    operators: list[dict] = field(default_factory=list)  # as measured, by scripts/first_hour.sh
    notes: dict[str, str] = field(default_factory=dict)  # the YAML's comment on each number

    @property
    def memory_limit_bytes(self) -> float:
        """Bytes that a plan may use on one device."""
        return self.memory_gib * 2**30 * self.usable_memory

    @property
    def memory_bytes_per_s(self) -> float:
        """Bandwidth that operators reach which only move values."""
        return self.hbm_gb_per_s * 1e9 * self.memory_efficiency

    def product_flops(self, low_precision: bool = False) -> float:
        """FLOP/s that large products reach."""
        return (self.peak_fp8_tflops if low_precision else self.peak_tflops) * 1e12 * self.matmul_efficiency

    def node_bytes_per_s(self, members: int) -> float:
        """Bandwidth of a device to `members` - 1 others of its node, one direction."""
        links = min(self.node_links, max(members - 1, 1))
        return self.node_link_gb_per_s * links * 1e9 * self.network_efficiency

    @property
    def across_bytes_per_s(self) -> float:
        """Bandwidth of a device to other nodes, one direction."""
        return self.across_nodes_gb_per_s * 1e9 * self.network_efficiency


def load_profile(path: str | Path = DEFAULT_PROFILE) -> DeviceProfile:
    """Read a device profile: a file, or the name of one in `devices/`.

    Raises:
        ConfigError: a name or key is unknown, a key is missing, or a number is below 0.
    """
    if "/" not in str(path) and not str(path).endswith(".yaml"):
        known = sorted(p.stem for p in FOLDER.glob("*.yaml"))
        if path not in known:
            raise ConfigError(f"--device {path}: name a YAML file, or one of {', '.join(known)}")
        path = FOLDER / f"{path}.yaml"
    values = load_yaml(path)
    operators = values.pop("operators", [])
    known = {f.name for f in fields(DeviceProfile)} - {"notes", "operators"}
    for key in sorted(set(values) ^ known):
        what = "is missing" if key in known else f"is unknown; legal keys are {', '.join(sorted(known))}"
        raise ConfigError(f"{path}: {key} {what}")
    for key, value in values.items():
        if key != "name" and (isinstance(value, bool) or not isinstance(value, int | float) or value < 0):
            raise ConfigError(f"{path}: {key} is {value!r}, but must be a number of at least 0")
    text = Path(path).read_text()
    head = " ".join(line.lstrip("# ") for line in text.splitlines() if line.startswith("#"))
    return DeviceProfile(**values, operators=operators, notes={"name": head} | dict(NOTE.findall(text)))


NOTE = re.compile(r"^(\w+):.*?\s# *(.+)$", re.MULTILINE)
