"""Peak FLOP/s of GPUs: dense products in bfloat16, as their makers' data sheets state them.

Data sheets of H100 and later print the figure with 2:4 sparsity, twice this one: NVIDIA H100 Tensor
Core GPU (SXM 1,979, PCIe 1,513, NVL 1,671 TFLOP/s), H200 (SXM 1,979, NVL 1,671), GH200 (1,979),
L4 (242). The others print the dense one: A100 (312), A800 (312), A40 (149.7), A30 (165), A10 (125),
L40S (362.05), HGX B200 (2.25 PFLOP/s a GPU), AMD Instinct MI300X (1,307.4).
"""

import re

_PART = re.compile(r"-\d+[QCAB]$")
"""How names of virtual GPUs end."""

_TFLOPS = {
    "NVIDIA B200": 2250.0,
    "NVIDIA GH200": 989.5,
    "NVIDIA H200 NVL": 835.5,
    "NVIDIA H200": 989.5,
    "NVIDIA H100 PCIe": 756.5,
    "NVIDIA H100 NVL": 835.5,
    "NVIDIA H100": 989.5,
    "NVIDIA A100": 312.0,
    "NVIDIA A800": 312.0,
    "NVIDIA L40S": 362.05,
    "NVIDIA L4": 121.0,
    "NVIDIA A40": 149.7,
    "NVIDIA A30": 165.0,
    "NVIDIA A10": 125.0,
    "AMD Instinct MI300X": 1307.4,
}
"""By the name that the driver gives; a name's variants follow it after a space or a hyphen."""


def peak_flops(device_name: str) -> float | None:
    """FLOP/s of a GPU by its name; None where it is not known, as for a part of one (MIG,
    vGPU)."""
    if " MIG " in f"{device_name} " or _PART.search(device_name):
        return None
    for name, tflops in _TFLOPS.items():
        if device_name == name or device_name.startswith((f"{name} ", f"{name}-")):
            return tflops * 1e12
    return None
