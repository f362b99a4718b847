"""States in other dtypes and in 8 bits, masters, stochastic rounding: every rule and backend."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from effkern.backends.reference.quantize import dequantized, quantized
from effkern.backends.reference.rounding import stochastically_rounded
from tests.support.backends import Backend
from tests.support.rules import RULES, Rule
from tests.support.stored import Stored, compare

rules = pytest.mark.parametrize("rule", RULES, ids=lambda r: r.name)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SIZES: list[int | tuple[int, ...]] = [0, (), 5, 255, 256, 257, (3, 100), 1100]


def both(rule: Rule, stored: Stored, **more: Any) -> tuple[Stored, Stored]:
    right = stored.clone()
    (kernel,) = rule.ops.from_lists(stored.params[0])
    stored.step(kernel, **more)
    right.step(getattr(torch.ops.effkern, f"_{rule.name}_").reference, **more)
    return stored, right


@rules
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("state", [torch.float32, torch.bfloat16, "int8"], ids=str)
@pytest.mark.parametrize("masters", [False, True])
def test_against_the_reference(
    backend: Backend, rule: Rule, dtype: torch.dtype, state: Any, masters: bool
) -> None:
    if masters and dtype is torch.float32:
        pytest.skip("a float32 parameter needs no master")
    sizes = [0, (), 300] if backend.slow else SIZES
    for changed in rule.branches[:1] if backend.slow else rule.branches:
        options = {**rule.options, **changed}
        stored = Stored(rule, sizes, dtype, backend.device, state, options, masters=masters)
        for _ in range(1 if backend.slow else 2):
            mine, right = both(rule, stored)
            compare(rule, mine, right)
            stored = right


@rules
@pytest.mark.parametrize("state", [torch.bfloat16, "int8"], ids=str)
@pytest.mark.parametrize("masters", [False, True])
def test_stochastic_rounding_against_the_reference(
    backend: Backend, rule: Rule, state: Any, masters: bool
) -> None:
    """The same random bits: nearly all parameters are bit for bit the same."""
    sizes = [(), 300] if backend.slow else SIZES
    stored = Stored(
        rule,
        sizes,
        torch.bfloat16,
        backend.device,
        state,
        rule.options,
        masters=masters,
        keys=True,
    )
    mine, right = both(rule, stored)
    if rule.name != "lamb":
        compare(rule, mine, right)
    same = torch.cat([(a == b).reshape(-1) for a, b in zip(mine.params, right.params, strict=True)])
    assert same.float().mean() > 0.95


def test_stochastic_rounding_keeps_the_mean(backend: Backend) -> None:
    """100,000 parameters that SGD moves a quarter of the way to the next bfloat16 number."""
    (sgd,) = (rule for rule in RULES if rule.name == "sgd")
    count = 2000 if backend.slow else 100_000
    options = {**sgd.options, "momentum": 0.0, "weight_decay": 0.0, "lr": 1.0}
    spacing = 2.0**-7
    stored = Stored(
        sgd, [count], torch.bfloat16, backend.device, torch.bfloat16, options, keys=True
    )
    stored.params[0].fill_(1.0)
    stored.grads[0].fill_(-spacing / 4)
    (kernel,) = sgd.ops.from_lists(stored.params[0])
    first = stored.clone()
    stored.step(kernel)
    up = (stored.params[0] > 1).float()
    assert set(stored.params[0].float().tolist()) == {1.0, 1.0 + spacing}
    deviation = (0.25 * 0.75 / count) ** 0.5
    assert abs(up.mean().item() - 0.25) < 4 * deviation
    # Reproducible; other at another step, for another key, and without pattern in memory.
    again = first.clone()
    again.step(kernel)
    assert torch.equal(again.params[0], stored.params[0])
    for change in ("steps", "keys"):
        other = first.clone()
        if change == "steps":
            other.steps[0] += 1
        else:
            other.keys = [first.keys[0] + 1]
        other.step(kernel)
        differ = (other.params[0] != stored.params[0]).float().mean().item()
        assert abs(differ - 2 * 0.25 * 0.75) < 0.05
    neighbours = (up[1:] * up[:-1]).mean().item()
    assert abs(neighbours - 0.0625) < 0.02


def test_infinities_are_rounded_as_they_are(backend: Backend) -> None:
    (sgd,) = (rule for rule in RULES if rule.name == "sgd")
    options = {**sgd.options, "momentum": 0.0, "weight_decay": 0.0, "lr": 1.0}
    stored = Stored(sgd, [8], torch.bfloat16, backend.device, torch.bfloat16, options, keys=True)
    for place, value in enumerate((float("inf"), float("-inf"), float("nan"))):
        stored.params[0][place] = value
    mine, right = both(sgd, stored)
    assert torch.equal(mine.params[0].isnan(), right.params[0].isnan())
    assert mine.params[0][:2].tolist() == [float("inf"), float("-inf")]


@rules
def test_infinities_in_a_quantised_block_are_not_hidden(backend: Backend, rule: Rule) -> None:
    stored = Stored(rule, [600], torch.float32, backend.device, "int8", rule.options)
    stored.grads[0][300] = float("inf")
    mine, _ = both(rule, stored)
    values = mine.values()
    for one, keep in zip(values, mine.kept, strict=True):
        if keep:
            assert one[0][:256].isfinite().all()
            assert not one[0][256:512].isfinite().all()
            assert one[0][512:].isfinite().all()


@pytest.mark.parametrize("size", [1e-30, 1e-37, 1e-40, 1e-45])
def test_blocks_of_tiny_values(backend: Backend, size: float) -> None:
    """127 over their scale is no float32; signs and finiteness stay."""
    (sgd,) = (rule for rule in RULES if rule.name == "sgd")
    options = {**sgd.options, "momentum": 1.0, "dampening": 0.0, "weight_decay": 0.0}
    stored = Stored(sgd, [256], torch.float32, backend.device, "int8", options)
    stored.states[0][0].zero_()
    stored.grads[0].copy_(size * torch.randn(256).sign())
    mine, _ = both(sgd, stored)
    value, grad = mine.values()[0][0].cpu(), mine.grads[0].cpu()
    assert value.isfinite().all()
    assert (value * grad.sign() >= 0).all()
    assert (value.abs() <= grad.abs()).all()
    if size >= 1e-37:
        assert (value.abs() >= grad.abs() / 4).all()


@rules
@pytest.mark.parametrize("state", [torch.float32, "int8"], ids=str)
@pytest.mark.parametrize("size", [1e-30, 1e-22, 1e-19, 1e-16, 1e16, 5e19])
def test_gradients_whose_squares_leave_float32(
    backend: Backend, rule: Rule, state: Any, size: float
) -> None:
    """Squares that are subnormal or none, and such as only their share of a mean is a float32."""
    options = dict(rule.options)
    if "eps" in options:
        options["eps"] = 1e-8
    stored = Stored(rule, [300], torch.float32, backend.device, state, options, steps=(0.0,))
    for one in stored.states:
        for tensor in one:
            tensor.zero_()
    stored.grads[0].copy_(size * torch.randn(300).sign())
    mine, right = both(rule, stored)
    assert torch.equal(mine.params[0].isfinite(), right.params[0].isfinite())
    finite = right.params[0].isfinite()
    torch.testing.assert_close(
        mine.params[0][finite], right.params[0][finite], rtol=1e-4, atol=1e-5
    )


@rules
def test_clipping_and_scale_reach_mixed_kernels(backend: Backend, rule: Rule) -> None:
    """Clipped to half their norm, gradients scaled by 4 act like halves of the plain ones."""
    plain = Stored(rule, [300], torch.float32, backend.device, "int8", rule.options)
    clipped = plain.clone()
    squares = torch.tensor(
        [1.0, (4 * plain.grads[0]).double().square().sum().item() - 1.0],
        dtype=torch.float64,
        device=backend.device,
    )
    norm = plain.grads[0].norm().item()
    plain.grads[0] *= 0.5
    clipped.grads[0] *= 4
    (kernel,) = rule.ops.from_lists(plain.params[0])
    plain.step(kernel)
    scale = torch.tensor(4.0, device=backend.device)
    clipped.step(kernel, grad_scale=scale, squares=squares, max_norm=norm / 2)
    compare(rule, clipped, plain)


@pytest.mark.parametrize("signed", [True, False])
def test_bounds_of_the_maps(signed: bool) -> None:
    """math/quantize.h promises them; and a value that is not 0 does not become 0 unsigned."""
    torch.manual_seed(0)
    exponents = torch.randint(-30, 1, (4096,)).float()
    values = torch.randn(4096) * 2.0**exponents
    values = values if signed else values.abs()
    values[:256] = 0.0
    codes, scales = quantized(values, signed)
    back = dequantized(codes, scales)
    most = scales.repeat_interleave(256)
    assert torch.equal(back[:256], values[:256])
    if signed:
        assert ((back - values).abs() <= most / 254 * 1.0001).all()
    else:
        assert ((back > 0) == (values > 0)).all()
        assert ((back.sqrt() - values.sqrt()).abs() <= most.sqrt() / 255 * 1.0001).all()
        large = values.sqrt() >= most.sqrt() / 510
        off = (back.sqrt() - values.sqrt()).abs()[large]
        assert (off <= most.sqrt()[large] / 510 * 1.0001).all()


def test_the_reference_of_rounding() -> None:
    """Between the two neighbours; exact values stay; the random bits are the documented hash."""
    values = torch.randn(5000) * 2.0 ** torch.randint(-100, 100, (5000,))
    rounded = stochastically_rounded(values, -12345, 7.0).float()
    down = (values.view(torch.int32) & -65536).view(torch.float32)
    up = ((values.view(torch.int32) & -65536) + 65536).view(torch.float32)
    assert ((rounded == down) | (rounded == up)).all()
    exact = values.bfloat16().float()
    assert torch.equal(stochastically_rounded(exact, 1, 1.0).float(), exact)

    def mix(x: int) -> int:
        x ^= x >> 16
        x = x * 0x7FEB352D & 0xFFFFFFFF
        x ^= x >> 15
        x = x * 0x846CA68B & 0xFFFFFFFF
        return x ^ x >> 16

    key = -12345 & 2**64 - 1
    seed = mix(mix(mix(key & 0xFFFFFFFF) ^ key >> 32) ^ 7)
    for i in (0, 1, 4999):
        random = mix((i * 0x9E3779B9 + (seed ^ mix(0))) & 0xFFFFFFFF)
        bits = values[i : i + 1].view(torch.int32).item() & 0xFFFFFFFF
        expected = (bits + (random & 0xFFFF)) >> 16
        assert rounded[i : i + 1].view(torch.int32).item() & 0xFFFFFFFF == expected << 16


REFUSED: dict[str, tuple[Any, str]] = {
    "masters of another dtype": (
        lambda s: s.masters.__setitem__(0, s.masters[0].double()),
        "masters",
    ),
    "too few masters": (lambda s: s.masters.pop(), "masters has 1 tensors"),
    "too few scales": (lambda s: s.scales.pop(), "scales"),
    "too short scales": (lambda s: s.scales.__setitem__(1, s.scales[1][:1]), "scales"),
    "too few keys": (lambda s: s.keys.pop(), "rounding_keys"),
    "unsigned codes of a signed state": (
        lambda s: s.states[0].__setitem__(0, s.states[0][0].to(torch.uint8)),
        "exp_avgs",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_and_nothing_written(backend: Backend, case: str) -> None:
    if backend.name == "reference":
        pytest.skip("the definition is called with what fits")
    rule = RULES[0]
    spoil, message = REFUSED[case]
    stored = Stored(
        rule,
        [5, 300],
        torch.bfloat16,
        backend.device,
        "int8",
        rule.options,
        masters=True,
        keys=True,
    )
    before = stored.clone()
    spoil(stored)
    (kernel,) = rule.ops.from_lists(stored.params[0])
    with pytest.raises(RuntimeError, match=message):
        stored.step(kernel)
    assert all(map(torch.equal, stored.params, before.params))
    assert all(map(torch.equal, stored.steps, before.steps))
