"""Training of one adapter on the objectives of several: each optimizer step is a step of one of their trainers.

Every part has its own TRL trainer on one shared model, with its rows, loss, L1 term and micro-batches. The loop around
them has the optimizer, the learning rate, the logs and the checkpoints.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from fractions import Fraction
from itertools import chain
from typing import Any

import torch
from accelerate import skip_first_batches
from torch import nn
from transformers import Trainer, TrainerCallback, get_scheduler

from paft_merge.errors import TrainError
from paft_merge.training.callbacks import ProxCallback, Watch
from paft_merge.training.job import Job, make_trainer, without_printer


def steps_of(alone: Sequence[int], ratio: Sequence[float] | None = None, total: int = 0) -> list[int]:
    """Divide the optimizer steps of a mixed training among its parts.

    Args:
        alone: Steps of each part when it is trained alone.
        ratio: Relative number of steps of each part, finite, >= 0, with a sum above 0. Default: `alone`.
        total: Number of all steps; 0: the sum of `alone`.

    Returns:
        Steps of each part. Their sum is the total: shares are rounded down, and the steps that are left go to the largest
        remainders, of equal ones to the first.
    """
    exact = [Fraction(share) for share in (alone if ratio is None else ratio)]
    total = total or sum(alone)
    shares = [total * share / sum(exact) for share in exact]
    found = [math.floor(share) for share in shares]
    for i in sorted(range(len(shares)), key=lambda i: found[i] - shares[i])[: total - sum(found)]:
        found[i] += 1
    return found


def interleaved(steps: Sequence[int]) -> list[int]:
    """The part that each optimizer step trains, as an index: spread evenly, by error diffusion.

    After every step each part has had its share of the steps so far, up to less than one step for two parts. The next
    step goes to the part that is furthest behind its share, of equal ones to the first.
    """
    total, done, order = sum(steps), [0] * len(steps), list[int]()
    for step in range(1, total + 1):
        behind = [of * step - total * had for of, had in zip(steps, done, strict=True)]
        part = behind.index(max(behind))
        done[part] += 1
        order.append(part)
    return order


@dataclass
class Part:
    """One part of a mixed training: its trainer, and how that changes the model."""

    name: str
    trainer: Any
    forward: Any
    """TRL's forward of the base, which gives the outputs that this loss reads."""
    dropouts: dict[nn.Dropout, float]
    """The rates with which this part is trained alone: DPO switches dropout off."""
    loader: Any = None
    steps: int = 0
    """Optimizer steps of the whole training."""
    losses: list[float] = field(default_factory=list)
    """Losses of the steps since the last log."""

    @property
    def accumulated(self) -> int:
        """Micro-batches of an optimizer step."""
        return int(self.trainer.args.gradient_accumulation_steps)

    @property
    def steps_in_epoch(self) -> int:
        """Optimizer steps of one pass over the rows; the last one may have fewer micro-batches."""
        return max(1, -(-len(self.loader) // self.accumulated))

    def batches(self, done: int) -> Iterator[list[Any]]:
        """Yield the micro-batches of each optimizer step after the first `done`, epoch by epoch, without an end."""
        epoch, begun = divmod(done, self.steps_in_epoch)
        while True:
            self.loader.set_epoch(epoch)
            skipped = begun * self.accumulated
            left = iter(skip_first_batches(self.loader, skipped) if skipped else self.loader)
            for step in range(begun, self.steps_in_epoch):
                wanted = min(self.accumulated, len(self.loader) - step * self.accumulated)
                yield [next(left) for _ in range(wanted)]
            for _ in left:  # ends the iteration of accelerate's loader
                pass
            epoch, begun = epoch + 1, 0


@dataclass
class _Batch:
    """The micro-batches of one optimizer step."""

    part: Part
    micro: list[Any]
    items: Any
    """Number of tokens with a label, where the part's loss is a mean over them."""


class _Loop(TrainerCallback):  # type: ignore[misc]
    """The proximal step in the steps of its part, and the epoch of the log as the share of all steps."""

    def __init__(self, trainer: MixedTrainer) -> None:
        self.trainer = trainer

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Shrink the factors after a step of the part that has `l1: {mode: prox}`."""
        l1 = self.trainer.part_at(state.global_step).trainer.l1
        if l1 is not None and l1.spec.mode == "prox":
            ProxCallback(l1).on_optimizer_step(args, state, control, **kwargs)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Set the epoch, also in a resumed run."""
        state.epoch = state.global_step / state.max_steps


class MixedTrainer(Trainer):  # type: ignore[misc]
    """Steps of the trainers of several parts, interleaved, with one optimizer."""

    _created_lr_scheduler: bool

    def __init__(self, parts: Sequence[Part], ratio: Mapping[str, float] | None, **options: Any) -> None:
        super().__init__(**options)
        self.parts = list(parts)
        self.order: list[int] = []
        self.ratio = [ratio[part.name] for part in parts] if ratio else None
        self.streams: list[Iterator[list[Any]]] = []
        sparse = [part.trainer.l1 for part in parts if part.trainer.l1]
        self.l1 = next(iter(sparse), None)
        self.watch: Watch | None = None
        for part in self.parts:
            part.trainer.accelerator = self.accelerator
        self.add_callback(_Loop(self))

    @property
    def row_sets(self) -> list[Any]:
        """The sets of rows that are trained on."""
        return [part.trainer.train_dataset for part in self.parts]

    @property
    def facts(self) -> dict[str, Any]:
        """The steps of each part, for the record."""
        return {"parts": {part.name: {"steps": part.steps} for part in self.parts}}

    def part_at(self, step: int) -> Part:
        """The part that is trained in a step (from 0); after the end, the last one."""
        return self.parts[self.order[min(step, len(self.order) - 1)]]

    def get_train_dataloader(self) -> Any:
        """Open the parts' rows and divide the steps; returns one item for each step, because the parts have the batches."""
        for part in self.parts:
            part.loader = part.trainer.get_train_dataloader()
        alone = [part.trainer.set_initial_training_values(part.trainer.args, part.loader)[-1] for part in self.parts]
        for part, steps in zip(self.parts, steps_of(alone, self.ratio, max(0, self.args.max_steps)), strict=True):
            part.steps = steps
            if not steps:
                what = f"has none of the {sum(alone) if self.args.max_steps <= 0 else self.args.max_steps} steps"
                raise TrainError.of("TRAINING", part.name, what, "give it a larger share of the ratio, or 0")
        self.order = interleaved([part.steps for part in self.parts])
        self._open_streams(0)
        return range(len(self.order))

    def _open_streams(self, step: int) -> None:
        """Let every part continue with its batches after so many steps of all parts.

        An epoch begins with a random number. So a part in the middle of one begins it here, and the others at their next step.
        """
        done = [self.order[:step].count(i) for i in range(len(self.parts))]
        self.streams = [part.batches(had) for part, had in zip(self.parts, done, strict=True)]
        for i, (part, had) in enumerate(zip(self.parts, done, strict=True)):
            if had % part.steps_in_epoch:
                self.streams[i] = chain([next(self.streams[i])], self.streams[i])

    def set_initial_training_values(self, args: Any, dataloader: Any) -> tuple[int, int, int, int, int, int, int]:
        """One epoch with all steps."""
        steps = len(self.order)
        rows = sum(len(part.trainer.train_dataset) for part in self.parts)
        return 1, steps, rows, steps * self._train_batch_size, self._train_batch_size, steps, steps

    def _load_rng_state(self, checkpoint: Any) -> None:
        """Skip the batches of the steps before the checkpoint; then load its random numbers."""
        self._open_streams(self.state.global_step)
        super()._load_rng_state(checkpoint)

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """In the steps of a part its own learning rate and schedule, over all steps."""
        if not self._created_lr_scheduler:
            rates = [_rates(part, num_training_steps) for part in self.parts]
            peak = self.args.learning_rate or 1.0

            def share(step: int) -> float:
                part = self.order[min(step, len(self.order) - 1)]
                return float(rates[part](step) * (self.parts[part].trainer.args.learning_rate / peak))

            self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, share)
            self._created_lr_scheduler = True
        return self.lr_scheduler

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: Any) -> tuple[list[_Batch], None]:
        """Take the micro-batches of the next step from its part."""
        at = self.order[self.state.global_step]
        part, micro = self.parts[at], next(self.streams[at])
        return [_Batch(part, micro, part.trainer._get_num_items_in_batch(micro, device))], None

    def training_step(self, model: Any, inputs: _Batch, num_items_in_batch: Any = None) -> torch.Tensor:
        """Run the part's step on each micro-batch, and accumulate their gradients."""
        part, trainer = inputs.part, inputs.part.trainer
        trainer.state, trainer.optimizer, trainer.lr_scheduler = self.state, self.optimizer, self.lr_scheduler
        trainer.current_gradient_accumulation_steps = len(inputs.micro)
        self.accelerator.unwrap_model(model).get_base_model().__dict__["forward"] = part.forward
        for dropout, rate in part.dropouts.items():
            dropout.p = rate
        total = torch.zeros((), device=self.args.device)
        for i, micro in enumerate(inputs.micro, 1):
            last = i == len(inputs.micro)
            self.accelerator.gradient_state._set_sync_gradients(last)
            with nullcontext() if last else self.accelerator.no_sync(model):
                total = total + trainer.training_step(model, micro, inputs.items)
        part.losses.append(self.accelerator.gather(total).mean().item())
        return total

    def floating_point_ops(self, inputs: _Batch) -> int:
        """Operations of all micro-batches."""
        return sum(super(MixedTrainer, self).floating_point_ops(micro) for micro in inputs.micro)

    def _track_num_input_tokens(self, inputs: _Batch) -> None:
        for micro in inputs.micro:
            super()._track_num_input_tokens(micro)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log the loss of all steps, each part's loss and values under its name, and the measures of the adapter."""
        if "loss" in logs:
            for part in self.parts:
                found = {"loss": part.losses, **part.trainer._metrics["train"], **part.trainer.extra_logs}
                logs.update(
                    {f"{part.name}/{key}": sum(values) / len(values) for key, values in found.items() if values}
                )
                for values in (part.losses, part.trainer._metrics["train"], part.trainer.extra_logs):
                    values.clear()
            logs.update(self.watch.latest if self.watch else {})
        super().log(logs, start_time)


def _rates(part: Part, steps: int) -> Any:
    """The learning rate of a part at each step as a share of its peak."""
    args = part.trainer.args
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=args.learning_rate)
    schedule = get_scheduler(
        args.lr_scheduler_type, optimizer, num_warmup_steps=args.get_warmup_steps(steps), num_training_steps=steps,
        scheduler_specific_kwargs=args.lr_scheduler_kwargs,
    )  # fmt: skip
    if not hasattr(schedule, "lr_lambdas"):
        where, what = f"{part.name}: training.lr_scheduler_type", "does not depend on the step alone"
        raise TrainError.of("TRAINING", where, what, "use cosine, linear or constant")
    return schedule.lr_lambdas[0]


def mixed_trainer(job: Job) -> MixedTrainer:
    """Build the trainers of all parts on the job's base, and the loop around them."""
    parts, policy = list[Part](), None
    plain = job.base.__dict__.get("forward")
    rates = {module: module.p for module in job.base.modules() if isinstance(module, nn.Dropout)}
    for name, own in job.parts.items():
        job.base.__dict__.pop("forward", None)
        if plain is not None:
            job.base.__dict__["forward"] = plain
        trainer = make_trainer(own, policy=policy)
        policy = trainer.model
        if "ref" in policy.peft_config:  # TRL's copy of a new adapter, which equals the base
            policy.delete_adapter("ref")
        modules = [module for module in policy.modules() if isinstance(module, nn.Dropout)]
        rates |= {module: job.spec.lora.lora_dropout for module in modules if module not in rates}
        parts.append(Part(name, trainer, job.base.__dict__["forward"], {module: module.p for module in modules}))
        for module, rate in rates.items():
            module.p = rate
    trainer = MixedTrainer(
        parts, job.spec.ratio, model=policy, args=job.arguments, train_dataset=parts[0].trainer.train_dataset,
        processing_class=job.tokenizer, callbacks=list(job.options.callbacks),
    )  # fmt: skip
    trainer.watch = Watch(job.name, trainer.l1, job.options.progress)
    trainer.add_callback(trainer.watch)
    for part in parts:
        part.trainer.watch = trainer.watch
    without_printer(trainer)
    return trainer
