"""What devices could do at best: the denominator of model FLOP utilisation."""

import torch

# Dense bf16 matrix FLOP/s by `torch.cuda.get_device_name`, from the makers' data sheets. A device
# that is not listed gets no MFU: a guessed peak would make the figure worthless.
PEAK_BF16_FLOPS = {
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA A100-PCIE-40GB": 312e12,
    "NVIDIA A100 80GB PCIe": 312e12,
    "NVIDIA H100 80GB HBM3": 989.4e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H200": 989.4e12,
    "NVIDIA L4": 121e12,
    "NVIDIA L40S": 362e12,
}


def peak_flops(device: torch.device, precision: str) -> float | None:
    """FLOP/s of one device in bf16, None where it is not known."""
    if device.type != "cuda" or precision != "bf16":
        return None
    return PEAK_BF16_FLOPS.get(torch.cuda.get_device_name(device))
