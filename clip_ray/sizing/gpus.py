"""GPU types, and the machine that each usually comes in.

Peaks are of dense matrix products: data sheets print twice that, "with sparsity". Memory is as
sold, in units of 10^9 bytes: A100, H100 and V100 show up to 7 % more (2^30), L4, A10G and L40S some
percent less, which the reserve of a plan covers.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from clip_ray.errors import ConfigError

GB = 10**9
TERA = 10**12


@dataclass(frozen=True)
class Gpu:
    """One type.

    Attributes:
        name: as in `64xH100`.
        memory: bytes.
        bf16: peak operations/s of matrix products in bfloat16, summed in float32; None: the type
            has none, and emulates it slowly.
        fp16: likewise in float16, which published runs on such types used.
        fp32: peak operations/s in float32 (not TF32, which CLIP-Ray does not turn on).
        bandwidth: bytes/s of its memory.
        link: bytes/s that it sends to the other GPUs of its machine.
        machine: the usual machine.
    """

    name: str
    memory: float
    bf16: float | None
    fp16: float
    fp32: float
    bandwidth: float
    link: float
    machine: Machine

    def peak(self, precision: str) -> float:
        """Return the peak operations/s of bf16 or fp32; bf16 where there is none is as fp32."""
        return self.fp32 if precision == "fp32" or self.bf16 is None else self.bf16


@dataclass(frozen=True)
class Machine:
    """A machine with GPUs.

    Attributes:
        name: whose figures these are.
        gpus: GPUs in it.
        cpus: virtual CPUs (threads).
        memory: bytes of its main memory.
        network_gbit: 10^9 bits/s that it sends to other machines.
    """

    name: str
    gpus: int
    cpus: int
    memory: float
    network_gbit: float


@dataclass(frozen=True)
class Cluster:
    """What a run is planned on.

    Attributes:
        gpus: workers, one a GPU.
        gpu: their type.
        machine: what they are in.
    """

    gpus: int
    gpu: Gpu
    machine: Machine

    @property
    def nodes(self) -> int:
        """Machines, the last perhaps not full."""
        return math.ceil(self.gpus / self.machine.gpus)

    @property
    def workers_of_node(self) -> int:
        """Workers of a full machine."""
        return min(self.gpus, self.machine.gpus)


# https://aws.amazon.com/ec2/instance-types/ ("Accelerated computing"). GiB there, 10^9 here. Where
# the network is above 100 Gbit/s it is EFA's, which plain TCP does not reach.
_P6_B200 = Machine("AWS p6-b200.48xlarge", 8, 192, 2199 * GB, 3200)
_P5EN = Machine("AWS p5en.48xlarge", 8, 192, 2199 * GB, 3200)
_P5 = Machine("AWS p5.48xlarge", 8, 192, 2199 * GB, 3200)
_P4DE = Machine("AWS p4de.24xlarge", 8, 96, 1237 * GB, 400)
_P4D = Machine("AWS p4d.24xlarge", 8, 96, 1237 * GB, 400)
_P3DN = Machine("AWS p3dn.24xlarge", 8, 96, 825 * GB, 100)
_G6E = Machine("AWS g6e.48xlarge", 8, 192, 1649 * GB, 400)
_G6 = Machine("AWS g6.48xlarge", 8, 192, 825 * GB, 100)
_G5 = Machine("AWS g5.48xlarge", 8, 192, 825 * GB, 100)
_G4DN = Machine("AWS g4dn.metal", 8, 96, 412 * GB, 100)
_STATION = Machine("a workstation of 4", 4, 64, 256 * GB, 10)  # an assumption, no product's


def _gpu(
    name: str,
    memory: float,
    bf16: float | None,
    fp32: float,
    bandwidth: float,
    link: float,
    machine: Machine,
    fp16: float | None = None,
) -> Gpu:
    """Return a type from the units of data sheets: GB, TFLOP/s, GB/s."""
    return Gpu(
        name, memory * GB, None if bf16 is None else bf16 * TERA, (fp16 or bf16 or 0) * TERA,
        fp32 * TERA, bandwidth * GB, link * GB, machine,
    )  # fmt: skip


_TYPES = (
    # NVIDIA DGX B200 data sheet, an eighth of it: 1,440 GB, 64 TB/s, 36 PFLOP/s of bf16 with
    # sparsity, NVLink 14.4 TB/s both ways; fp32: Blackwell architecture brief.
    _gpu("B200", 180, 2250, 75, 8000, 900, _P6_B200),
    # NVIDIA H200 data sheet (SXM): 141 GB, 4.8 TB/s, bf16 1,979 with sparsity, fp32 67.
    _gpu("H200", 141, 989, 67, 4800, 450, _P5EN),
    # NVIDIA H100 data sheet, SXM: 80 GB, 3.35 TB/s, 1,979 with sparsity, 67, NVLink 900 GB/s.
    _gpu("H100", 80, 989, 67, 3350, 450, _P5),
    # The same, PCIe (first edition): 80 GB, 2 TB/s, 1,513 with sparsity, 51; PCIe 5 x16.
    _gpu("H100-PCIe", 80, 756, 51, 2000, 64, _STATION),
    # NVIDIA A100 data sheet, SXM: 80 GB, 2,039 GB/s, 312, 19.5, NVLink 600 GB/s both ways.
    _gpu("A100-80", 80, 312, 19.5, 2039, 300, _P4DE),
    # The same: 40 GB, 1,555 GB/s.
    _gpu("A100-40", 40, 312, 19.5, 1555, 300, _P4D),
    # NVIDIA L40S data sheet: 48 GB, 864 GB/s, 362 dense, 91.6; PCIe 4 x16.
    _gpu("L40S", 48, 362, 91.6, 864, 32, _G6E),
    # NVIDIA RTX A6000 data sheet: 48 GB, 768 GB/s, 309.7 with sparsity, 38.7; PCIe 4 x16.
    _gpu("A6000", 48, 154.8, 38.7, 768, 32, _STATION),
    # NVIDIA A10G data sheet: 24 GB, 600 GB/s, 70 dense, 35; PCIe 4 x16.
    _gpu("A10G", 24, 70, 35, 600, 32, _G5),
    # NVIDIA L4 data sheet: 24 GB, 300 GB/s, 242 with sparsity, 30.3; PCIe 4 x16.
    _gpu("L4", 24, 121, 30.3, 300, 32, _G6),
    # NVIDIA Ada architecture paper, appendix A: 24 GB, 1,008 GB/s, 165.2 summed in fp32, 82.6.
    _gpu("RTX-4090", 24, 165.2, 82.6, 1008, 32, _STATION),
    # NVIDIA GA102 architecture paper, table of the RTX 3090: 24 GB, 936 GB/s, 71, 35.6.
    _gpu("RTX-3090", 24, 71, 35.6, 936, 32, _STATION),
    # NVIDIA V100 data sheet, SXM2: 32 GB, 900 GB/s, 125 in fp16, 15.7, NVLink 300 GB/s both ways.
    _gpu("V100", 32, None, 15.7, 900, 150, _P3DN, fp16=125),
    # NVIDIA T4 data sheet: 16 GB, 320 GB/s, 65 in fp16, 8.1; PCIe 3 x16.
    _gpu("T4", 16, None, 8.1, 320, 16, _G4DN, fp16=65),
)
GPUS = {gpu.name: gpu for gpu in _TYPES}


def parse_gpus(text: str) -> tuple[int, Gpu]:
    """Return the number and type of `64xH100`; a number alone left out is 1.

    Raises:
        ConfigError: it is not of this form, or the type is not known.
    """
    match = re.fullmatch(r"(?:(\d+)x)?(.+)", text.strip())
    count, name = (match[1] or "1", match[2]) if match else ("0", text)
    if name.upper() == "CPU":
        raise ConfigError(
            f"--gpus {text}: a plan is of GPUs. On CPUs nothing is published to calibrate with: "
            "run jobs/pretrain.py with --train.steps 20 and read samples_per_s in metrics.jsonl"
        )
    known = {_key(gpu.name): gpu for gpu in _TYPES}
    if _key(name) not in known:
        raise ConfigError(f"--gpus {text}: no GPU type {name!r} is known; known: {', '.join(GPUS)}")
    if int(count) < 1:
        raise ConfigError(f"--gpus {text}: expected at least 1 GPU, such as 8xH100")
    return int(count), known[_key(name)]


def _key(name: str) -> str:
    """Return a name as it is compared: `a100-80GB` is A100-80."""
    return re.sub(r"[^A-Z0-9]", "", name.upper()).removesuffix("GB")
