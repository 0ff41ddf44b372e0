"""The operations of a device: compiled kernels on the CPU, torch on a GPU."""

from __future__ import annotations

from typing import TYPE_CHECKING

from paft_merge.compute.blocks import Ops
from paft_merge.compute.cpu_ops import CpuOps
from paft_merge.errors import MergeError

if TYPE_CHECKING:
    import torch


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

    wanted = _read(device)
    if wanted.type != "cuda":
        what = "merges run on the CPU and on CUDA devices only"
        raise MergeError.of("DEVICE", device, what, "use cpu, cuda or cuda:1")
    count = torch.cuda.device_count()
    if wanted == torch.device("cuda") and process is not None and count:
        wanted = torch.device("cuda", process % count)
    return TorchOps(_present(wanted))


def torch_device(device: str | None) -> torch.device:
    """The device that a model runs on; None: a GPU if there is one.

    Raises:
        MergeError: DEVICE, the device is unknown or not available.
    """
    import torch

    return _present(_read(device or ("cuda" if torch.cuda.is_available() else "cpu")))


def _read(device: str) -> torch.device:
    import torch

    try:
        return torch.device(device)
    except RuntimeError as error:
        raise MergeError.of("DEVICE", device, "is not a device", "use cpu, cuda or cuda:1") from error


def _present(device: torch.device) -> torch.device:
    import torch

    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        what = "CUDA device not found, or torch is built without CUDA"
        raise MergeError.of("DEVICE", str(device), what, "use device='cpu'")
    return device
