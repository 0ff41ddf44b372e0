"""Where blocks are computed: the CPU's kernels, or torch on another device."""

from __future__ import annotations

from paft_merge.compute.blocks import Ops
from paft_merge.compute.cpu_ops import CpuOps
from paft_merge.errors import MergeError


def ops_for(device: str) -> Ops:
    """The operations for a device, `cpu` or `cuda[:index]`.

    Raises:
        MergeError: DEVICE, it is unknown or not there.
    """
    if device == "cpu":
        return CpuOps()
    import torch

    from paft_merge.compute.torch_ops import TorchOps

    try:
        wanted = torch.device(device)
    except RuntimeError as error:
        raise MergeError.of("DEVICE", device, "is no device", "use cpu, cuda or cuda:1") from error
    if wanted.type != "cuda":
        raise MergeError.of("DEVICE", device, "is no device that a merge is computed on", "use cpu, cuda or cuda:1")
    if (wanted.index or 0) >= torch.cuda.device_count():
        raise MergeError.of(
            "DEVICE",
            device,
            "there is no such CUDA device here, or this torch is built without CUDA",
            "use --device cpu",
        )
    return TorchOps(wanted)
