"""The operations of a device: compiled kernels on the CPU, torch on a GPU."""

from __future__ import annotations

from paft_merge.compute.blocks import Ops
from paft_merge.compute.cpu_ops import CpuOps
from paft_merge.errors import MergeError


def ops_for(device: str) -> Ops:
    """The operations for a device, `cpu` or `cuda[:index]`.

    Raises:
        MergeError: DEVICE, the device is unknown or not available.
    """
    if device == "cpu":
        return CpuOps()
    import torch

    from paft_merge.compute.torch_ops import TorchOps

    try:
        wanted = torch.device(device)
    except RuntimeError as error:
        raise MergeError.of("DEVICE", device, "is not a device", "use cpu, cuda or cuda:1") from error
    if wanted.type != "cuda":
        what = "merges run on the CPU and on CUDA devices only"
        raise MergeError.of("DEVICE", device, what, "use cpu, cuda or cuda:1")
    if (wanted.index or 0) >= torch.cuda.device_count():
        what = "CUDA device not found, or torch is built without CUDA"
        raise MergeError.of("DEVICE", device, what, "use device='cpu'")
    return TorchOps(wanted)
