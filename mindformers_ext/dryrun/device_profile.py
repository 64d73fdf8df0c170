"""What the cost model assumes about a device and its network: a YAML of stated, replaceable numbers."""

import re
from dataclasses import dataclass, field, fields
from pathlib import Path

from mindformers_ext.config.yaml_files import load_yaml
from mindformers_ext.errors import ConfigError

DEFAULT_PROFILE = Path(__file__).parent / "atlas_800t_a2.yaml"


@dataclass(frozen=True)
class DeviceProfile:
    """One kind of device in servers whose devices are connected pairwise; the YAML says where its numbers come from."""

    name: str
    peak_tflops: float  # dense bfloat16
    memory_gib: float
    usable_memory: float  # share of the memory that the framework may plan
    devices_per_node: int
    hbm_gb_per_s: float
    node_link_gb_per_s: float  # between two devices of a node, one direction
    across_nodes_gb_per_s: float  # per device, one direction
    latency_us: float  # per collective call
    matmul_efficiency: float  # share of the peak that matmuls reach
    attention_efficiency: float
    network_efficiency: float  # share of the link bandwidth that collectives reach
    gradient_overlap: float  # share of the gradient exchange hidden behind the backward pass
    operators: list[dict] = field(default_factory=list)  # as measured, by scripts/first_hour.sh
    notes: dict[str, str] = field(default_factory=dict)  # the YAML's comment on each number

    @property
    def memory_limit_bytes(self) -> float:
        """Bytes that a plan may use on one device."""
        return self.memory_gib * 2**30 * self.usable_memory

    def link_bytes_per_s(self, across: bool, group_size: int) -> float:
        """Bandwidth that a collective reaches, per device and direction: inside a node over the links of its group."""
        inside = self.node_link_gb_per_s * (group_size - 1)
        return (self.across_nodes_gb_per_s if across else inside) * 1e9 * self.network_efficiency


def load_profile(path: str | Path = DEFAULT_PROFILE) -> DeviceProfile:
    """Read a device profile.

    Raises:
        ConfigError: a key is missing or unknown, or a number is not above 0.
    """
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
