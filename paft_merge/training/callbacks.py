"""Trainer callbacks: the L1 strength over time, the proximal step, sparsity measurements, and detection of a collapse."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from paft_merge.errors import TrainError
from paft_merge.training.delta_stats import quick_stats
from paft_merge.training.factors import Factors, adapted, owner, whole
from paft_merge.training.l1 import Controller, factor_l1, product_l1, prox_step_, ramp
from paft_merge.training.schema import L1Spec
from paft_merge.training.train_options import TrainProgress

MEASUREMENTS, CONTROLLED_MEASUREMENTS = 25, 100
"""Number of measurements in a run without and with a target; without one at most every tenth step, and the last step.

A measurement costs as much as a few product penalties.
"""

FIRST_STEPS = 10
"""Before this step every adapter is as small as one optimizer step, so a collapse is not checked."""

NOISE = {"product": 0.6, "factors": 1.0}
"""Amplitude that a penalty leaves instead of zeros, in learning rates, by the penalised matrix (measured on toys)."""

MOMENTUM_STEPS = 10
"""Steps over which Adam's momentum (beta1 = 0.9) averages."""

DEFAULT_WARMUP = {"penalty": 0.0, "prox": 0.1}


class L1:
    """The L1 term of one run: the penalised matrices, and the strength at every step."""

    def __init__(self, spec: L1Spec) -> None:
        self.spec = spec
        self.controller = Controller(spec.target, spec.strength) if spec.target is not None else None

    @property
    def strength(self) -> float:
        """Strength in force without the ramp."""
        return self.controller.strength if self.controller else self.spec.strength

    def warmup_steps(self, steps: int) -> int:
        """Length of the ramp in optimizer steps, in a run of `steps`."""
        warmup = DEFAULT_WARMUP[self.spec.mode] if self.spec.warmup is None else self.spec.warmup
        return int(warmup) if warmup >= 1 else math.ceil(warmup * steps)

    def at(self, step: int, steps: int) -> float:
        """Strength at optimizer step `step` (0-based) of `steps`."""
        return self.strength * ramp(step, self.warmup_steps(steps))

    def penalty(self, factors: tuple[Factors, ...]) -> torch.Tensor:
        """The L1 norm that the strength multiplies: scalar, differentiable."""
        return product_l1(factors) if self.spec.penalized == "product" else factor_l1(factors)


class ProxCallback(TrainerCallback):  # type: ignore[misc]
    """Shrinks the factors after each optimizer step, in the metric of that step."""

    def __init__(self, l1: L1) -> None:
        self.l1 = l1

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Apply the proximal operator with the learning rate and the second moment just used."""
        optimizer = kwargs["optimizer"]
        strength = self.l1.at(state.global_step, state.max_steps)
        if strength == 0 or getattr(optimizer, "step_was_skipped", False):
            return
        shrunk = {id(p) for f in adapted(kwargs["model"]) for p in (owner(f.a_RI), owner(f.b_OR))}
        moments = getattr(optimizer, "optimizer", optimizer).state
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if id(parameter) in shrunk:
                    moment, eps = _second_moment(moments[parameter], group)
                    cap = self.l1.spec.cap
                    prox_step_(parameter, lr=group["lr"], strength=strength, second_moment=moment, eps=eps, cap=cap)


def _second_moment(moments: dict[str, Any], group: dict[str, Any]) -> tuple[torch.Tensor | None, float]:
    """Bias-corrected Adam `v` of one parameter and Adam's epsilon; None for optimizers without one."""
    raw = moments.get("exp_avg_sq", moments.get("state2"))
    if raw is None or not raw.is_floating_point():
        return None, 0.0
    return raw / (1 - group["betas"][1] ** float(moments["step"])), float(group["eps"])


def _last_lr(scheduler: Any, steps: int) -> float:
    """Mean learning rate of the last `MOMENTUM_STEPS` steps of a run; 0 when unknown."""
    schedule = getattr(scheduler, "scheduler", scheduler)  # accelerate wraps it
    lambdas, bases = getattr(schedule, "lr_lambdas", None), getattr(schedule, "base_lrs", ())
    if not lambdas:
        return 0.0
    last = range(max(0, steps - MOMENTUM_STEPS), steps)
    found: float = max(base * sum(map(one, last)) / len(last) for base, one in zip(bases, lambdas, strict=True))
    return found


def _rms(side: Sequence[torch.Tensor]) -> float:
    """Root mean square of the nonzero entries: some rows of an embedding may not have been trained yet."""
    square = sum(float(whole(one).detach().square().sum()) for one in side)
    return math.sqrt(square / max(1, sum(int(whole(one).detach().count_nonzero()) for one in side)))


class Watch(TrainerCallback, ExportableState):  # type: ignore[misc]
    """Measures the adapter a few dozen times in a run, adjusts the strength, and stops a collapsed run.

    Its state is part of the trainer's checkpoints, so a resumed run continues with the same strength.
    """

    def __init__(self, name: str, l1: L1 | None, progress: Callable[[TrainProgress], None] | None = None) -> None:
        self.name, self.l1, self.progress = name, l1, progress
        self.latest: dict[str, float] = {}
        self.faint = 0
        self.stepping = False
        """Whether the first step has begun; a checkpoint is loaded before it."""
        self.tokens = 0
        """Tokens of all batches so far, without padding; of all processes, and of the run before it was interrupted."""
        self.seconds = 0.0
        """Wall time of all steps so far."""
        self._since = 0.0

    def state(self) -> dict[str, Any]:
        """Return the state for `trainer_state.json`."""
        controller = self.l1.controller.state() if self.l1 and self.l1.controller else None
        attributes = {"controller": controller, "faint": self.faint, "latest": self.latest}
        return {"args": {}, "attributes": attributes | {"tokens": self.tokens, "seconds": self.seconds}}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Load the state of the checkpoint when the run is resumed."""
        self._since = time.monotonic()
        saved = state.stateful_callbacks.get("Watch")
        if state.global_step == 0 or not isinstance(saved, dict):
            return
        attributes = saved["attributes"]
        self.faint, self.latest = attributes["faint"], attributes["latest"]
        self.tokens, self.seconds = attributes.get("tokens", 0), attributes.get("seconds", 0.0)
        if self.l1 and attributes["controller"]:
            self.l1.controller = Controller(**attributes["controller"])

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Note that a step has begun."""
        self.stepping = True

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Measure the adapter if a measurement is due, and report the step."""
        controlled = self.l1 is not None and self.l1.controller is not None
        every = (
            max(1, state.max_steps // CONTROLLED_MEASUREMENTS)
            if controlled
            else max(10, state.max_steps // MEASUREMENTS)
        )
        if state.global_step % every == 0 or state.global_step == state.max_steps:
            self._measure(state, kwargs["model"], kwargs["optimizer"], kwargs["lr_scheduler"])
        self.seconds, self._since = self.seconds + time.monotonic() - self._since, time.monotonic()
        if self.progress:
            self.progress(TrainProgress(self.name, state.global_step, state.max_steps, {}))

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        """Report the logged values."""
        if self.progress:
            self.progress(TrainProgress(self.name, state.global_step, state.max_steps, dict(logs or {})))

    def _measure(self, state: Any, model: torch.nn.Module, optimizer: Any, scheduler: Any) -> None:
        factors = adapted(getattr(model, "module", model))
        lr = max(float(group["lr"]) for group in optimizer.param_groups)
        penalised = self.l1 is not None and self.l1.spec.mode == "penalty"
        fall = max(0.0, lr - _last_lr(scheduler, state.max_steps)) if penalised else 0.0
        seen = quick_stats(factors, fall * NOISE[self.l1.spec.penalized] if self.l1 else 0.0)
        self.latest = {
            "sparsity/below_1e-5": seen.below_epsilon,
            "sparsity/exact_zero": seen.exact_zero,
            "sparsity/below_tenth_rms": seen.below_tenth_rms,
            "delta/norm": seen.norm,
        }
        if self.l1 is None:
            return
        if state.global_step > self.l1.warmup_steps(state.max_steps):
            self.check_collapse(factors, lr, state)
            if self.l1.controller:
                self.l1.controller.update(seen.settled, lr, state.global_step / state.max_steps)

    def check_collapse(self, factors: tuple[Factors, ...], lr: float, state: Any) -> None:
        """Raise TrainError L1_COLLAPSE when the factors are as small as an optimizer step in two measurements in a row.

        In learning rates, after 20 steps of every run that learned (toys and the quickstart's base) the largest |B| was
        at least 18 and the root mean square at least 2.8. In collapsed runs they were about 1 (4 where Adam's first
        steps were large) and 0.15 to 0.24.
        """
        if self.l1 is None or lr == 0 or state.global_step < FIRST_STEPS:
            return
        sides = ([f.b_OR for f in factors], [f.a_RI for f in factors])
        left = min(max(float(whole(one).detach().abs().max()) for one in side) for side in sides)
        self.faint = self.faint + 1 if left <= 2 * lr or min(map(_rms, sides)) <= lr / 4 else 0
        if self.faint >= 2:
            raise TrainError.of(
                "L1_COLLAPSE",
                self.name,
                f"the L1 strength {self.l1.strength:.3g} has driven the adapter to zero by step {state.global_step} of "
                f"{state.max_steps}; A = B = 0 has no gradient, so it cannot recover",
                "use a strength about ten times smaller, a longer l1.warmup, or l1.target",
            )
