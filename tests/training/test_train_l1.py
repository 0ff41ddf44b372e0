"""L1 on a low-rank product, its proximal step, the measures and the controller, on matrices of hand size."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from paft_merge.errors import TrainError
from paft_merge.training.delta_stats import measure, quick_stats, trimmed
from paft_merge.training.factors import Factors, adapted, frobenius, rows_per_chunk
from paft_merge.training.l1 import Controller, ProductL1, factor_l1, product_l1, prox_step_, ramp, soft_threshold_


def _factors(o=17, i=13, r=4, scale=0.7, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    a = torch.randn(r, i, generator=generator, dtype=dtype).requires_grad_()
    b = torch.randn(o, r, generator=generator, dtype=dtype).requires_grad_()
    return Factors("layer", a, b, scale, torch.ones(o, i))


def _naive(f):
    return (f.scale * (f.b_OR @ f.a_RI)).abs().sum()


@pytest.mark.parametrize("scale", [0.7, -2.0, 0.0])
@pytest.mark.parametrize("chunk", [1, 3, 17, 100])
def test_the_product_penalty_and_its_gradient_are_autograds(chunk, scale):
    f = _factors(scale=scale, dtype=torch.float64)
    ours = ProductL1.apply(f.a_RI, f.b_OR, f.scale, chunk)
    ours_grads = torch.autograd.grad(3 * ours, (f.a_RI, f.b_OR))
    theirs = _naive(f)
    torch.testing.assert_close(ours, theirs)
    for left, right in zip(ours_grads, torch.autograd.grad(3 * theirs, (f.a_RI, f.b_OR)), strict=True):
        torch.testing.assert_close(left, right)


def test_the_product_penalty_passes_gradcheck():
    f = _factors(o=5, i=4, r=2, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda a, b: ProductL1.apply(a, b, 0.5, 2), (f.a_RI, f.b_OR))


def test_a_zero_b_has_no_penalty_and_no_gradient():
    f = Factors("x", torch.randn(2, 5, requires_grad=True), torch.zeros(6, 2, requires_grad=True), 1.0)
    penalty = product_l1([f])
    penalty.backward()
    assert penalty.item() == 0
    assert not f.a_RI.grad.any()
    assert not f.b_OR.grad.any()


def test_the_penalty_of_several_matrices_is_their_sum_for_any_chunk():
    parts = [_factors(seed=s, o=9 + s) for s in range(3)]
    expected = sum(_naive(f) for f in parts)
    for chunk_bytes in (1, 200, 1 << 20):
        torch.testing.assert_close(product_l1(parts, chunk_bytes), expected)
    sides = sum(f.a_RI.abs().sum() + f.b_OR.abs().sum() for f in parts)
    torch.testing.assert_close(factor_l1(parts), sides)


def test_the_penalty_is_computed_in_float32_under_autocast():
    f = _factors(o=64, i=64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = product_l1([f])
    assert inside.dtype == torch.float32
    assert torch.equal(inside, product_l1([f]))


def test_the_penalty_never_holds_a_dense_delta():
    f = _factors(o=512, i=512, r=2)
    seen = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and out.device.type == "cpu":
                seen.append(out.untyped_storage().nbytes())
            return out

    with Watch():
        product_l1([f], chunk_bytes=4 * 512 * 8).backward()
    assert rows_per_chunk(f.a_RI, 4 * 512 * 8) == 8
    assert max(seen) == 4 * 512 * 8


def test_soft_thresholding_is_the_proximal_operator_of_the_absolute_value():
    x = torch.tensor([-3.0, -0.5, 0.0, 0.5, 3.0])
    assert soft_threshold_(x.clone(), 1.0).tolist() == [-2.0, 0.0, 0.0, 0.0, 2.0]


def test_the_proximal_step_is_preconditioned_and_capped():
    parameter = torch.full((3,), 1.0)
    prox_step_(parameter, lr=0.1, strength=0.5, second_moment=torch.tensor([4.0, 0.25, 0.0]), eps=1e-8, cap=3.0)
    assert parameter.tolist() == pytest.approx([1 - 0.025, 1 - 0.1, 1 - 0.3])


def test_the_ramp_is_silent_then_linear_then_full():
    assert [ramp(step, 8) for step in range(9)] == pytest.approx([0, 0, 0, 0, 0.25, 0.5, 0.75, 1, 1])
    assert ramp(0, 0) == 1.0


def test_the_measures_of_a_known_delta_are_exact():
    a = torch.tensor([[1.0, 0.0, 2.0, 0.0]])
    b = torch.tensor([[3.0], [0.0], [1e-6]])
    f = Factors("m", a, b, 1.0, torch.full((3, 4), 2.0))
    delta = b @ a
    stats = measure([f]).matrices[0]
    assert stats.exact_zero == pytest.approx(8 / 12)
    assert stats.below_epsilon == pytest.approx(10 / 12)
    assert stats.norm == pytest.approx(delta.norm().item(), rel=1e-6)
    assert stats.relative_norm == pytest.approx(delta.norm().item() / math.sqrt(48), rel=1e-6)
    assert stats.hoyer == pytest.approx((12**0.5 - (delta.abs().sum() / delta.norm()).item()) / (12**0.5 - 1), rel=1e-6)
    assert stats.effective_rank == pytest.approx(1.0)
    assert quick_stats([f]).norm == pytest.approx(stats.norm)


def test_energy_in_the_top_tenth_agrees_with_a_sort():
    f = _factors(o=200, i=100, r=8)
    delta = (f.scale * f.b_OR @ f.a_RI).detach().flatten().square().sort(descending=True).values
    exact = (delta[: len(delta) // 10].sum() / delta.sum()).item()
    assert measure([f]).energy_top_10 == pytest.approx(exact, abs=0.01)


def test_a_gaussian_product_is_not_called_sparse_by_the_scale_free_measures_at_any_scale():
    for scale in (1e-9, 1.0):
        f = _factors(o=100, i=100, r=16, scale=scale)
        stats = measure([f])
        assert stats.below_tenth_rms < 0.12
        assert stats.below_epsilon == (1.0 if scale < 1 else pytest.approx(0.0, abs=0.01))


def test_trimming_keeps_exactly_the_largest_entries_and_breaks_ties_by_order():
    f = _factors(o=10, i=10)
    delta = (f.scale * f.b_OR @ f.a_RI).detach()
    kept = trimmed(f, 0.13)
    assert int(kept.count_nonzero()) == 13
    assert kept.abs()[kept != 0].min() >= delta.abs()[kept == 0].max()
    torch.testing.assert_close(kept[kept != 0], delta[kept != 0])
    ties = Factors("t", torch.ones(1, 4), torch.ones(2, 1), 1.0)
    assert trimmed(ties, 0.5).tolist() == [[1.0] * 4, [0.0] * 4]
    assert int(trimmed(ties, 1e-6).count_nonzero()) == 1


def test_frobenius_needs_no_dense_delta():
    f = _factors()
    assert frobenius(f) == pytest.approx((f.scale * f.b_OR @ f.a_RI).norm().item(), rel=1e-6)


SCHEDULES = {"cosine": lambda at: (1 + math.cos(math.pi * at)) / 2, "linear": lambda at: 1 - at}


def plant(target, start, schedule, looks=100):
    """A sparsity that follows the strength as slowly as the learning rate lets it; the controller's and its last one."""
    controller, sparsity = Controller(target=target, strength=start), 0.1
    for look in range(1, looks + 1):
        lr = SCHEDULES[schedule](look / looks)
        wanted = 1 / (1 + 1e-3 / controller.strength)
        sparsity += 0.2 * lr * (wanted - sparsity)
        controller.update(sparsity, 2e-4 * lr, look / looks)
    return controller, sparsity


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("start", [1e-4, 1e-3, 5e-3])
@pytest.mark.parametrize("target", [0.3, 0.6, 0.9])
def test_the_controller_reaches_a_target_on_a_slow_plant_and_freezes(target, start, schedule):
    controller, sparsity = plant(target, start, schedule)
    assert abs(sparsity - target) < 0.02
    assert controller.frozen
    before = controller.strength
    assert controller.update(0.1, 1e-6, 1.0) == before


def test_a_controller_that_never_moved_misses():
    assert abs(plant(0.6, 1e-3, "cosine")[1] - 0.6) < 0.02 < abs(plant_of_one_strength(1e-3) - 0.6)


def plant_of_one_strength(strength):
    sparsity = 0.1
    for look in range(1, 101):
        sparsity += 0.2 * SCHEDULES["cosine"](look / 100) * (1 / (1 + 1e-3 / strength) - sparsity)
    return sparsity


def test_the_controllers_state_round_trips():
    controller = Controller(target=0.9, strength=1e-4)
    controller.update(0.3, 1e-4, 0.1)
    again = Controller(**controller.state())
    assert again == controller
    assert again.update(0.4, 5e-5, 0.2) == controller.update(0.4, 5e-5, 0.2)


def test_a_model_without_the_adapter_is_refused():
    with pytest.raises(TrainError, match="changes no module"):
        adapted(nn.Sequential(nn.Linear(2, 2)))


def test_lora_layers_are_found_with_their_scale_and_dora_is_refused():
    from peft import LoraConfig, get_peft_model

    net = nn.Sequential(nn.Linear(6, 5), nn.Embedding(7, 6))
    model = get_peft_model(net, LoraConfig(r=2, lora_alpha=8, target_modules=["0", "1"]))
    linear, embedding = adapted(model)
    assert (linear.name, linear.scale, linear.numel) == ("0", 4.0, 30)
    assert linear.weight is net[0].base_layer.weight
    assert embedding.numel == 42
    dora = get_peft_model(nn.Sequential(nn.Linear(6, 5)), LoraConfig(r=2, target_modules=["0"], use_dora=True))
    with pytest.raises(TrainError, match="DoRA"):
        adapted(dora)
