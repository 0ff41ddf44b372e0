"""The launcher's child, with accelerate made to believe that FSDP can shard over CPU processes (torch can, with gloo)."""

from __future__ import annotations

import os
import sys

import accelerate.state
from accelerate.utils import DistributedType

from paft_merge.training import callbacks
from paft_merge.training.launch import main

_was = accelerate.state.AcceleratorState.__init__


def _sharded(self, *args, fsdp_plugin=None, **options):
    _was(self, *args, fsdp_plugin=fsdp_plugin, **options)
    if fsdp_plugin is not None and self.distributed_type == DistributedType.MULTI_CPU:
        for kind in (accelerate.state.PartialState, accelerate.state.AcceleratorState):
            kind._shared_state["distributed_type"] = DistributedType.FSDP
        accelerate.state.AcceleratorState._shared_state["fsdp_plugin"] = fsdp_plugin
        self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, fsdp_plugin


accelerate.state.AcceleratorState.__init__ = _sharded

if "STOP_AFTER" in os.environ:
    _step = callbacks.Watch.on_step_end

    def _stop(self, args, state, control, **more):
        _step(self, args, state, control, **more)
        if state.global_step == int(os.environ["STOP_AFTER"]):
            os._exit(9)

    callbacks.Watch.on_step_end = _stop

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
