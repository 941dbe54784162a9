"""Peak matmul rate of a device, the denominator of MFU.

Figures are the vendor's dense bf16 rates; a CPU is measured with a square fp32 matmul, since no
data sheet says what two cores of a host reach.
"""

import time

import torch

from mmtrain.settings import Precision

# dense bf16 TFLOP/s by substring of the device name (NVIDIA data sheets, without sparsity)
_BF16_TFLOPS = {
    "H200": 989.0,
    "H100 PCIe": 756.0,
    "H100": 989.0,
    "B200": 2250.0,
    "A100": 312.0,
    "A800": 312.0,
    "L40S": 362.0,
    "L4": 121.0,
    "4090": 165.0,
    "3090": 71.0,
    "V100": 125.0,
}


def peak_tflops(device: torch.device, precision: Precision, given: float) -> tuple[float, str]:
    """(TFLOP/s of one rank's device, where the figure is from); 0 when unknown."""
    if given > 0:
        return given, "recipe key log.peak_tflops"
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        found = next((rate for part, rate in _BF16_TFLOPS.items() if part in name), 0.0)
        if precision is Precision.fp32:
            return found / 2, f"{name}, half of its bf16 data-sheet rate (TF32)"
        return found, f"{name}, bf16 data-sheet rate"
    return _measure_cpu(), "a 768 x 768 fp32 matmul measured at start"


def _measure_cpu(size: int = 768, repeats: int = 4) -> float:
    a = torch.ones(size, size)
    best = float("inf")
    torch.mm(a, a)
    for _ in range(repeats):
        started = time.perf_counter()
        torch.mm(a, a)
        best = min(best, time.perf_counter() - started)
    return 2 * size**3 / best / 1e12
