"""The cases of the benchmark, and in plain float64 what each must give.

A merged element is right when it is the exact value rounded to bfloat16, with room for float32 arithmetic on the way
(`FLOAT32_ROOM`) and for choices that a rule leaves open: which of several entries of one magnitude a trim keeps, how a
vote that ties to within rounding goes, which entries DARE's coin drops. `Check.open` counts elements decided by these.
Of paft it is demanded that a trim keeps the lowest flat index first (`exact_trim`), where deltas are exact: on
checkpoints.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

FLOAT32_ROOM = 2.0**-22
"""What float32 arithmetic may add to half a bfloat16 step, relative to the operands."""
FACTOR_ROOM = 1e-5
"""What a float32 product of LoRA factors may err, relative to the update's root mean square."""
SIGMAS = 6.0
LARGEST = 100_000_000
"""Elements of the largest tensor that is checked: float64 copies of it must fit in memory."""
BLOCK = 8_000_000
"""Elements compared at a time."""

Choice = Callable[..., Tensor]
"""One way to decide what a rule leaves open: the tensors in float64, elementwise, to the exact value."""


@dataclass(frozen=True)
class Case:
    """One method on one kind of source."""

    method: str
    kind: str
    """`checkpoints` or `adapters`."""
    weights: tuple[float, float] = (0.5, 0.3)
    density: float = 1.0
    t: float = 0.4

    def __str__(self) -> str:
        return f"{self.method}/{self.kind}"

    @property
    def sources(self) -> tuple[str, str]:
        """Folders of the two sources, under the data set."""
        return ("sft", "dpo") if self.kind == "checkpoints" else ("sft_lora", "dpo_lora")

    @property
    def folders(self) -> tuple[str, ...]:
        """Every folder that the merge reads."""
        needs_base = self.kind == "adapters" or self.method not in ("linear", "slerp")
        return (*(("base",) if needs_base else ()), *self.sources)

    def recipe(self, data: Path) -> dict[str, object]:
        """The recipe, which both programs read; it sets no `dtype`, so that each computes as it likes."""
        base = str(data / "base")
        names = [str(data / s) if self.kind == "checkpoints" else f"{base}+{data / s}" for s in self.sources]
        recipe: dict[str, object] = {"merge_method": self.method, "out_dtype": "bfloat16"}
        if self.method == "slerp":
            models = [{"model": name} for name in names]
            return recipe | {"base_model": names[0], "models": models, "parameters": {"t": self.t}}
        if self.method != "linear":
            recipe["base_model"] = base
        trim = {"density": self.density} if self.density < 1 else {}
        parameters = [{"weight": weight} | trim for weight in self.weights]
        return recipe | {"models": [{"model": n, "parameters": p} for n, p in zip(names, parameters, strict=True)]}


CASES = {
    str(case): case
    for kind in ("checkpoints", "adapters")
    for case in (
        Case("ties", kind, density=0.2),
        Case("linear", kind),
        Case("task_arithmetic", kind),
        Case("dare_ties", kind, density=0.5),
        Case("slerp", kind),
    )
}


@dataclass
class Check:
    """What a comparison with the reference found, over all sampled tensors."""

    tensors: int = 0
    elements: int = 0
    wrong: int = 0
    """Elements that no reading of the rule allows."""
    open: int = 0
    """Elements that only the second or a later reading of the rule allows."""
    loose: int = 0
    """Those of them for which a trim must have kept another of several entries of one magnitude than the first."""
    copied: int = 0
    """Tensors no source touches, found bit for bit."""
    error: float = 0.0
    """Squared distance to the first reading, and below it the squared size of the exact update."""
    update: float = 0.0
    faults: tuple[str, ...] = ()

    @property
    def passed(self) -> bool:
        """Whether nothing was wrong."""
        return not self.wrong and not self.faults

    def report(self, case: Case) -> dict[str, object]:
        """For the JSON line. `update_error` is the relative L2 error of the merged update, after rounding."""
        fixed = case.method != "dare_ties"
        return {
            "passed": self.passed,
            "tensors": self.tensors,
            "elements": self.elements,
            "wrong": self.wrong,
            "open": self.open if fixed else None,
            "loose": self.loose if fixed else None,
            "copied": self.copied,
            "update_error": math.sqrt(self.error / self.update) if fixed and self.update else None,
            "faults": list(self.faults),
        }


class Folder:
    """A checkpoint's or an adapter's tensors by name, from all its files."""

    def __init__(self, folder: Path) -> None:
        files: list[Any] = [safe_open(path, "pt") for path in sorted(folder.glob("*.safetensors"))]
        self.at = {name: file for file in files for name in file.keys()}  # noqa: SIM118 (no mapping)

    def tensor(self, name: str) -> Tensor:
        """The whole tensor as stored."""
        tensor: Tensor = self.at[name].get_tensor(name)
        return tensor

    def form(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Each tensor's dtype and shape."""
        slices = {name: file.get_slice(name) for name, file in self.at.items()}
        return {name: (s.get_dtype(), tuple(s.get_shape())) for name, s in slices.items()}


class Inputs:
    """The inputs of one case, in float64."""

    def __init__(self, case: Case, data: Path) -> None:
        self.case = case
        self.base = Folder(data / "base")
        self.sources = [Folder(data / name) for name in case.sources]

    def touched(self, name: str) -> bool:
        """Whether a source changes the tensor."""
        return self.case.kind == "checkpoints" or factor(name, "A") in self.sources[0].at

    def delta(self, source: Folder, name: str, base: Tensor) -> Tensor:
        """What a source adds to the base, float64 `[numel]`."""
        if self.case.kind == "checkpoints":
            return source.tensor(name).double().flatten() - base
        a_RI, b_OR = (source.tensor(factor(name, side)).double() for side in "AB")
        return (b_OR @ a_RI).flatten()

    def tensors(self, name: str) -> tuple[Tensor, Tensor, Tensor]:
        """Base and both deltas, float64 `[numel]`."""
        base = self.base.tensor(name).double().flatten()
        first, second = (self.delta(source, name, base) for source in self.sources)
        return base, first, second

    def samples(self) -> Iterator[str]:
        """Names to compare: the largest tensor, the smallest, and linears of the first, a middle and the last layer."""
        layers = [int(n.split(".")[2]) for n in self.base.at if n.endswith("q_proj.weight")]
        middle, last = max(layers) // 2, max(layers)
        names = [
            "model.embed_tokens.weight",
            "model.norm.weight",
            "model.layers.0.self_attn.q_proj.weight",
            f"model.layers.{middle}.self_attn.k_proj.weight",
            f"model.layers.{middle}.mlp.gate_proj.weight",
            f"model.layers.{last}.mlp.down_proj.weight",
        ]
        form = self.base.form()
        yield from (n for n in names if self.touched(n) and math.prod(form[n][1]) <= LARGEST)


def factor(name: str, side: str) -> str:
    """PEFT's key of a base tensor's LoRA factor."""
    return f"base_model.model.{name.removesuffix('.weight')}.lora_{side}.weight"


def check(case: Case, data: Path, out: Path, *, exact_trim: bool) -> Check:
    """Compare a merged checkpoint with the reference; with `exact_trim`, `loose` elements of full checkpoints are faults."""
    inputs, merged = Inputs(case, data), Folder(out)
    found = Check()
    if merged.form() != inputs.base.form():
        return Check(faults=("names, dtypes or shapes differ from the base's",))
    for name in inputs.base.at:
        if not inputs.touched(name):
            same = torch.equal(*(f.tensor(name).view(torch.int16) for f in (merged, inputs.base)))
            found.copied += same
            found.faults += () if same else (f"{name}: not copied",)
    for name in inputs.samples():
        compare(inputs, name, merged.tensor(name).double().flatten(), found)
    if exact_trim and found.loose and case.kind == "checkpoints":
        found.faults += (f"{found.loose} elements were not trimmed by lowest index",)
    return found


def compare(inputs: Inputs, name: str, out: Tensor, found: Check) -> None:
    """Add one tensor's comparison to `found`."""
    case = inputs.case
    base, first, second = inputs.tensors(name)
    is_adapter = case.kind == "adapters"
    rooms = [FACTOR_ROOM * d.square().mean().sqrt().item() if is_adapter else 0.0 for d in (first, second)]
    choices = list(CHOICES[case.method](case, base, (first, second), rooms))
    masks = [largest(delta, case.density) for delta in (first, second)] if case.method == "ties" else []
    coin = coin_room(case, base.numel())
    for start in range(0, base.numel(), BLOCK):
        block = tuple(t[start : start + BLOCK] for t in (out, base, first, second, *masks))
        compare_block(block, choices, sum(rooms), coin, found)
        if case.method == "dare_ties" and start == 0:
            found.faults += tuple(f"{name}: {fault}" for fault in unfair(case, block, coin))
    found.tensors += 1
    found.elements += base.numel()


def compare_block(left: tuple[Tensor, ...], choices: list[Choice], room: float, coin: float, found: Check) -> None:
    """Strike out of `left` (output, base, both deltas, perhaps masks) what each choice explains; the rest is wrong."""
    for number, choice in enumerate(choices):
        out, *tensors = left
        exact = choice(*tensors)
        if number == 0:
            found.error += (out - exact).square().sum().item()
            found.update += (exact - tensors[0]).square().sum().item()
        sizes = [t.abs() for t in tensors[:3]]
        around = FLOAT32_ROOM * (sizes[0] + sizes[1] + sizes[2]) + coin * (sizes[1] + sizes[2]) + room
        wrong = (out - exact).abs() > half_step(exact) + around
        found.open += int((~wrong).sum()) if number else 0
        found.loose += int((~wrong).sum()) if len(left) > 4 and number >= STRICT else 0
        left = tuple(t[wrong] for t in left)
    found.wrong += left[0].numel()


def half_step(exact: Tensor) -> Tensor:
    """Half the distance between neighbouring bfloat16 numbers around `exact`."""
    return torch.ldexp(torch.ones_like(exact), torch.frexp(exact).exponent - 9)


def linear(case: Case, base: Tensor, deltas: Sequence[Tensor], rooms: Sequence[float]) -> Iterator[Choice]:
    """The weighted mean of the sources."""
    first, second = (weight / sum(case.weights) for weight in case.weights)
    yield lambda b, x, y: first * (b + x) + second * (b + y)


def task_arithmetic(case: Case, base: Tensor, deltas: Sequence[Tensor], rooms: Sequence[float]) -> Iterator[Choice]:
    """The base plus the weighted sum of the deltas."""
    first, second = case.weights
    yield lambda b, x, y: b + first * x + second * y


def slerp(case: Case, base: Tensor, deltas: Sequence[Tensor], rooms: Sequence[float]) -> Iterator[Choice]:
    """The point `t` of the way on the arc from the first source to the second; nearly parallel ones on the line."""
    x, y = (base + delta for delta in deltas)
    cosine = ((x @ y) / (x.norm() * y.norm())).clamp(-1, 1).item()
    first, second = 1 - case.t, case.t
    if abs(cosine) <= 0.9995:
        angle = math.acos(cosine)
        first, second = (math.sin(share * angle) / math.sin(angle) for share in (first, second))
    yield lambda b, x, y: first * (b + x) + second * (b + y)


def ties(case: Case, base: Tensor, deltas: Sequence[Tensor], rooms: Sequence[float]) -> Iterator[Choice]:
    """TIES: the largest entries of each delta, a vote on the sign, the weighted mean of those who agree."""
    thresholds = [magnitude_at(delta, case.density) for delta in deltas]
    bands = [FLOAT32_ROOM * limit + room for limit, room in zip(thresholds, rooms, strict=True)]

    def mix(b: Tensor, trimmed: list[Tensor], flip: bool) -> Tensor:
        return b + vote(trimmed, case.weights, flip=flip, room=sum(rooms), normalize=True)

    for flip in (False, True):
        yield lambda b, x, y, keep_x, keep_y, flip=flip: mix(b, [x * keep_x, y * keep_y], flip)
    for *near_kept, flip in itertools.product((True, False), (True, False), (False, True)):
        least = [
            limit - band if kept else limit + band
            for limit, band, kept in zip(thresholds, bands, near_kept, strict=True)
        ]

        def loose(b: Tensor, x: Tensor, y: Tensor, *_: Tensor, least: list[float] = least, flip: bool = flip) -> Tensor:
            return mix(b, [x * (x.abs() >= least[0]), y * (y.abs() >= least[1])], flip)

        yield loose


STRICT = 2
"""How many of the readings of `ties`, the first, trim by the masks of what is kept."""


def kept_count(numel: int, density: float) -> int:
    """How many entries a trim keeps."""
    return max(1, int(density * numel))


def magnitude_at(delta: Tensor, density: float) -> float:
    """The smallest magnitude that a trim keeps."""
    return float(delta.abs().kthvalue(delta.numel() - kept_count(delta.numel(), density) + 1).values)


def largest(delta: Tensor, density: float) -> Tensor:
    """Which entries a trim keeps: the largest, and of several of one magnitude the first; bool `[numel]`."""
    limit = magnitude_at(delta, density)
    keep = delta.abs() > limit
    at_limit = (delta.abs() == limit).nonzero().flatten()
    keep[at_limit[: kept_count(delta.numel(), density) - int(keep.sum())]] = True
    return keep


def dare_ties(case: Case, base: Tensor, deltas: Sequence[Tensor], rooms: Sequence[float]) -> Iterator[Choice]:
    """DARE with a vote: entries kept with probability `density` and scaled up, a vote on the sign, the sum."""
    for *masks, flip in itertools.product((1, 0), (1, 0), (False, True)):

        def choice(b: Tensor, *xs: Tensor, masks: list[int] = masks, flip: bool = flip) -> Tensor:
            dropped = [x * (mask / case.density) for x, mask in zip(xs, masks, strict=True)]
            return b + vote(dropped, case.weights, flip=flip, room=sum(rooms), normalize=False)

        yield choice


def vote(deltas: Sequence[Tensor], weights: Sequence[float], *, flip: bool, room: float, normalize: bool) -> Tensor:
    """Sum the weighted deltas that have the sign of the sum; `flip` turns votes that are closer than rounding."""
    parts = [weight * delta for weight, delta in zip(weights, deltas, strict=True)]
    total = torch.stack(parts).sum(0)
    positive = total >= 0
    if flip:
        positive = positive ^ (total.abs() <= FLOAT32_ROOM * torch.stack(parts).abs().sum(0) + room)
    sign = torch.where(positive, 1.0, -1.0).double()
    agree = [part * sign > 0 for part in parts]
    mixed = torch.stack([part * a for part, a in zip(parts, agree, strict=True)]).sum(0)
    if not normalize:
        return mixed
    divisor = torch.stack([weight * a for weight, a in zip(weights, agree, strict=True)]).sum(0)
    return mixed / torch.where(divisor == 0, 1.0, divisor)


CHOICES = {"linear": linear, "task_arithmetic": task_arithmetic, "slerp": slerp, "ties": ties, "dare_ties": dare_ties}


def coin_room(case: Case, numel: int) -> float:
    """How far DARE's scale, L1 before over L1 after, may lie from 1 / density in a tensor of `numel` entries.

    Relative to a delta. The ratio's standard deviation is sqrt((1 - p) / (p numel)) times that of a normal entry's
    root mean square over its mean magnitude, 1.25.
    """
    if case.method != "dare_ties":
        return 0.0
    return SIGMAS * 1.25 * math.sqrt((1 - case.density) / (case.density * numel)) * max(case.weights) / case.density


def unfair(case: Case, block: tuple[Tensor, ...], coin: float) -> Iterator[str]:
    """Say where the shares of kept and dropped entries are not those of two independent fair coins.

    Counted over entries whose outcomes are told apart after rounding, a choice made from inputs alone: all four where
    the deltas agree in sign; three where they do not, because with both kept the vote leaves the larger alone.
    """
    out, *tensors = block
    p = case.density
    both, first, second, none = (c(*tensors) for c in list(dare_ties(case, tensors[0], tensors[1:], (0.0, 0.0)))[::2])
    agree = tensors[1] * tensors[2] > 0
    first_larger = case.weights[0] * tensors[1].abs() > case.weights[1] * tensors[2].abs()
    larger, smaller = torch.where(first_larger, first, second), torch.where(first_larger, second, first)
    room = half_step(both) + coin * (tensors[1].abs() + tensors[2].abs())
    agreeing = {
        "both": (both, p * p),
        "first": (first, p - p * p),
        "second": (second, p - p * p),
        "none": (none, (1 - p) ** 2),
    }
    opposed = {"larger": (larger, p), "smaller": (smaller, p - p * p), "none": (none, (1 - p) ** 2)}
    for outcomes, where in ((agreeing, agree), (opposed, ~agree)):
        values = torch.stack([value[where] for value, _ in outcomes.values()])
        gaps = torch.stack([(x - y).abs() for x, y in itertools.combinations(values, 2)]).amin(0)
        told = gaps > 3 * room[where]
        nearest = (values[:, told] - out[where][told]).abs().argmin(0)
        for number, (name, (_, share)) in enumerate(outcomes.items()):
            expected, seen = share * nearest.numel(), int((nearest == number).sum())
            if abs(seen - expected) > SIGMAS * math.sqrt(expected * (1 - share)) + 1:
                yield f"{name} {seen} times of {nearest.numel()}, expected {expected:.0f}"
