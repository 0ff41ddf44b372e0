"""The operations of a device: compiled kernels on the CPU, torch on a GPU."""

from __future__ import annotations

from paft_merge.compute.blocks import Ops
from paft_merge.compute.cpu_ops import CpuOps
from paft_merge.errors import MergeError


def ops_for(device: str, process: int | None = None) -> Ops:
    """The operations for a device.

    Args:
        device: `cpu` or `cuda[:index]`.
        process: number of this process on its machine. Without an index, the visible GPUs are given to processes in turn.

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
    count = torch.cuda.device_count()
    if wanted == torch.device("cuda") and process is not None and count:
        wanted = torch.device("cuda", process % count)
    if (wanted.index or 0) >= count:
        what = "CUDA device not found, or torch is built without CUDA"
        raise MergeError.of("DEVICE", device, what, "use device='cpu'")
    return TorchOps(wanted)
