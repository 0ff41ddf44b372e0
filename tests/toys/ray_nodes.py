"""A Ray cluster of two nodes in this machine, whose tasks can be made slow."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

os.environ["RAY_USAGE_STATS_ENABLED"] = "0"

import pytest
import ray
from ray.cluster_utils import Cluster
from toys.merge import HERE

NODE: dict[str, Any] = {"num_cpus": 1, "object_store_memory": 80 << 20}
SLOW = "PAFT_TEST_SLOW"
"""Variable with the name of a file that holds the seconds that each tensor takes in a task."""


def slowly() -> None:
    """Make the tensors of tasks take time; runs in each process of the cluster."""
    import time

    from paft_merge.output.folder import Output

    finish = Output.finish_tensor

    def finish_slowly(self: Output, finished: Any) -> None:
        time.sleep(float(Path(os.environ[SLOW]).read_text()))
        finish(self, finished)

    Output.finish_tensor = finish_slowly  # type: ignore[method-assign]


class Nodes:
    """The cluster: `nodes.slow(0.2)` makes each tensor of a task take that many seconds."""

    def __init__(self, cluster: Cluster, place: Path) -> None:
        self.cluster, self._place = cluster, place
        self.slow(0)

    def slow(self, seconds: float) -> None:
        self._place.write_text(str(seconds))


@contextmanager
def two_nodes(folder: Path) -> Iterator[Nodes]:
    """Start the cluster and connect to it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([HERE, str(Path(HERE) / "tests")]))
        patch.setenv(SLOW, str(folder / "seconds"))
        cluster = Cluster(initialize_head=True, head_node_args={**NODE, "include_dashboard": False})
        cluster.add_node(**NODE)
        hook = {"worker_process_setup_hook": slowly}
        ray.init(cluster.address, log_to_driver=False, logging_level="ERROR", runtime_env=hook)
        yield Nodes(cluster, folder / "seconds")
        ray.shutdown()
        cluster.shutdown()
