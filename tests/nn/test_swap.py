"""effkern.swap_norms: what it exchanges, what it leaves alone and why, and what it keeps."""

from __future__ import annotations

import copy
import inspect
import io
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import effkern
from effkern.nn.swap import SwapReport
from tests.support.backends import Backend

# ---- the conventions of transformers' classes, in our own words ----


class _Scaled(nn.Module):
    """A norm with a weight."""

    def __init__(self, features: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(features))
        self.variance_epsilon = eps


def _rms(x: Tensor, eps: float) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)


class RoundsFirst(_Scaled):
    """As Llama: rounded to the input's dtype, then weighted."""

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * _rms(x.float(), self.variance_epsilon).to(x.dtype)


class RoundsLast(_Scaled):
    """As OLMo 2 and gpt-oss: weighted in float32, then rounded."""

    def forward(self, x: Tensor) -> Tensor:
        return (self.weight * _rms(x.float(), self.variance_epsilon)).to(x.dtype)


class CountsFromOne(nn.Module):
    """As Gemma: weight + 1 in float32, then rounded."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.eps = 1e-6
        self.weight = nn.Parameter(0.1 * torch.randn(features))

    def forward(self, x: Tensor) -> Tensor:
        return (_rms(x.float(), self.eps) * (1 + self.weight.float())).type_as(x)


class RoundsToTheWeight(_Scaled):
    """As T5: rounded to a 16-bit weight's dtype, else to nothing."""

    def forward(self, x: Tensor) -> Tensor:
        x = x * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        if self.weight.dtype in (torch.float16, torch.bfloat16):
            x = x.to(self.weight.dtype)
        return self.weight * x


class Centred(_Scaled):
    """As Cohere: a LayerNorm without bias, in float32."""

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        wide = wide - wide.mean(-1, keepdim=True)
        return (self.weight.float() * _rms(wide, self.variance_epsilon)).to(x.dtype)


class Weightless(nn.Module):
    """A norm without a weight."""

    def __init__(self) -> None:
        super().__init__()
        self.eps = 1e-5

    def forward(self, x: Tensor) -> Tensor:
        return _rms(x.float(), self.eps).to(x.dtype)


class InFloat32(nn.LayerNorm):
    """A LayerNorm in float32 whatever it is given."""

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self.weight.float(), self.bias.float()
        wide = nn.functional.layer_norm(x.float(), self.normalized_shape, weight, bias, self.eps)
        return wide.to(x.dtype)


CONVENTIONS: list[Callable[[], nn.Module]] = [
    lambda: RoundsFirst(48),
    lambda: RoundsLast(48),
    lambda: CountsFromOne(48),
    lambda: RoundsToTheWeight(48),
    lambda: Centred(48),
    Weightless,
    lambda: InFloat32(48),
]
conventions = pytest.mark.parametrize("make", CONVENTIONS, ids=lambda m: type(m()).__name__)


def expected_in(dtype: torch.dtype) -> dict[str, float]:
    return {"rtol": 2**-7, "atol": 0} if dtype == torch.bfloat16 else {"rtol": 2e-6, "atol": 2e-6}


@conventions
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("of_weight", [torch.float32, torch.bfloat16], ids=str)
def test_a_convention_is_kept(
    backend: Backend, make: Callable[[], nn.Module], dtype: torch.dtype, of_weight: torch.dtype
) -> None:
    """Api.md, "Llama-style norms in swap_norms": as the original rounds, so does what replaces it.

    Values are compared closer than one that rounds elsewhere would be.
    """
    norm = make().to(of_weight).to(backend.device)
    x = torch.randn(64, 48, device=backend.device).to(dtype)
    stock = norm(x)
    report = effkern.swap_norms(norm)
    assert [len(report.swapped), len(report.left)] == [1, 0], report
    mine = norm(x)
    assert mine.dtype == stock.dtype
    torch.testing.assert_close(mine, stock, **expected_in(stock.dtype))
    if stock.dtype == torch.bfloat16:
        assert (mine != stock).float().mean() < 0.01


@conventions
def test_gradients_are_the_originals(make: Callable[[], nn.Module]) -> None:
    norm = make()
    x = torch.randn(7, 48, requires_grad=True)
    g = torch.randn(7, 48)
    leaves = [x, *norm.parameters()]
    stock = torch.autograd.grad(norm(x), leaves, g)
    effkern.swap_norms(norm)
    torch.testing.assert_close(torch.autograd.grad(norm(x), leaves, g), stock, rtol=1e-4, atol=1e-5)


class Model(nn.Module):
    """One of each, one of them twice."""

    def __init__(self) -> None:
        super().__init__()
        self.torch_rms = nn.RMSNorm(48, eps=1e-4)
        self.torch_layer = nn.LayerNorm(48)
        self.linear = nn.Linear(48, 48)
        self.blocks = nn.ModuleList([RoundsFirst(48), CountsFromOne(48)])
        self.again = self.blocks[0]
        self.others = [self.torch_rms]

    def forward(self, x: Tensor) -> Tensor:
        x = self.torch_layer(self.torch_rms(x) + self.linear(x))
        for block in self.blocks:
            x = x + block(x)
        return self.again(self.others[0](x))


def test_a_model_keeps_all_but_the_classes() -> None:
    model = Model()
    x = torch.randn(5, 48)
    stock, names = model(x), list(model.state_dict())
    parameters, modules = list(model.parameters()), list(model.modules())
    seen = []
    model.blocks[1].register_forward_hook(lambda *_: seen.append(1))
    report = effkern.swap_norms(model)
    assert [norm.path for norm in report.swapped] == [
        "torch_rms",
        "torch_layer",
        "blocks.0",
        "blocks.1",
    ]
    assert report.left == []
    assert type(model.torch_rms) is effkern.nn.RMSNorm
    assert type(model.torch_layer) is effkern.nn.LayerNorm
    assert isinstance(model.blocks[0], effkern.nn.RMSNorm)
    assert isinstance(model.blocks[0], RoundsFirst)
    torch.testing.assert_close(model(x), stock, rtol=1e-5, atol=1e-5)
    assert seen == [1]
    assert list(model.state_dict()) == names
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert all(a is b for a, b in zip(model.modules(), modules, strict=True))
    text = str(report)
    assert "4 norms swapped, 0 left" in text
    assert "blocks.1: CountsFromOne -> FusedCountsFromOne" in text


def test_undo() -> None:
    model = Model()
    before = [type(module) for module in model.modules()]
    attributes = [set(vars(module)) for module in model.modules()]
    x = torch.randn(5, 48)
    stock = model(x)
    report = effkern.swap_norms(model)
    again = effkern.swap_norms(model)
    assert (again.swapped, again.left) == ([], [])
    for _ in range(2):
        report.undo()
        assert [type(module) for module in model.modules()] == before
        assert [set(vars(module)) for module in model.modules()] == attributes
        assert torch.equal(model(x), stock)
    assert len(effkern.swap_norms(model).swapped) == 4


def test_undo_says_what_is_no_longer_there() -> None:
    model = Model()
    report = effkern.swap_norms(model)
    model.torch_rms.__class__ = type("Other", (nn.RMSNorm,), {})
    with pytest.raises(RuntimeError, match="torch_rms"):
        report.undo()
    assert type(model.torch_layer) is nn.LayerNorm


def test_copies_pickles_and_checkpoints() -> None:
    model = Model()
    stock = copy.deepcopy(model)
    effkern.swap_norms(model)
    x = torch.randn(5, 48)
    saved = io.BytesIO()
    torch.save(model, saved)
    saved.seek(0)
    for twin in (
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
        torch.load(saved, weights_only=False),
    ):
        assert torch.equal(twin(x), model(x))
        assert [type(m) for m in twin.modules()] == [type(m) for m in model.modules()]
    stock.load_state_dict(model.state_dict())
    model.load_state_dict(stock.state_dict())


def test_what_a_module_holds_is_read_at_each_call() -> None:
    norm = RoundsFirst(48)
    effkern.swap_norms(norm)
    x = torch.randn(5, 48)
    before = norm(x)
    norm.weight = nn.Parameter(2 * norm.weight.detach())
    torch.testing.assert_close(norm(x), 2 * before)
    norm.variance_epsilon = 100.0
    assert norm(x).abs().max() < before.abs().max()
    assert norm.eps == 100.0
    assert norm.to(torch.bfloat16)(x.bfloat16()).dtype == torch.bfloat16


def test_compiled_in_one_graph() -> None:
    model = Model()
    effkern.swap_norms(model)
    torch._dynamo.reset()
    x = torch.randn(5, 48)
    torch.testing.assert_close(torch.compile(model, fullgraph=True)(x), model(x))


# ---- what stays ----


class Gated(_Scaled):
    """Takes a second tensor."""

    def forward(self, x: Tensor, gate: Tensor | None = None) -> Tensor:
        return self.weight * _rms(x.float(), self.variance_epsilon).to(x.dtype)


class EpsilonOutside(_Scaled):
    """Adds epsilon to the root."""

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * (x / (x.pow(2).mean(-1, keepdim=True).sqrt() + self.variance_epsilon))


class NoisyRMSNorm(_Scaled):
    """Is itself only in eval."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.weight * _rms(x.float(), self.variance_epsilon).to(x.dtype)
        return y * 1.5 if self.training else y


class WeightlessRMSNorm(Weightless):
    """Gives float32 for bfloat16."""

    def forward(self, x: Tensor) -> Tensor:
        return _rms(x.float(), self.eps)


class WeightlessNoisyRMSNorm(Weightless):
    """Is itself only in eval."""

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return y * 1.5 if self.training else y


class PartialRMSNorm(_Scaled):
    """Takes its statistics of half the features."""

    def forward(self, x: Tensor) -> Tensor:
        half = x[..., : x.shape[-1] // 2].float()
        rstd = torch.rsqrt(half.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        return self.weight * (x * rstd).to(x.dtype)


class ChannelsFirstLayerNorm(_Scaled):
    """Normalises the second dimension."""

    def forward(self, x: Tensor) -> Tensor:
        x = x - x.mean(1, keepdim=True)
        return self.weight[:, None, None] * x * (x.pow(2).mean(1, keepdim=True) + 1e-6).rsqrt()


class ThirdDimensionRMSNorm(Weightless):
    """Normalises the third dimension, which is the last in a batch of sequences alone."""

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        return (wide * torch.rsqrt(wide.pow(2).mean(2, keepdim=True) + self.eps)).to(x.dtype)


class Shifted(nn.RMSNorm):
    """A subclass that does more."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 1


def patched() -> nn.Module:
    norm = nn.LayerNorm(8)
    norm.forward = lambda x: x  # type: ignore[method-assign]
    return norm


def compiled() -> nn.Module:
    norm = nn.LayerNorm(8)
    norm.compile()
    return norm


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: type("GatedRMSNorm", (Gated,), {})(8), "takes more than the input"),
        (lambda: type("OuterRMSNorm", (EpsilonOutside,), {})(8), "no known convention"),
        (lambda: NoisyRMSNorm(8).eval(), "no known convention"),
        (WeightlessRMSNorm, "no known convention"),
        (lambda: WeightlessNoisyRMSNorm().eval(), "no known convention"),
        (lambda: PartialRMSNorm(8), "no known convention"),
        (lambda: ChannelsFirstLayerNorm(8), "no known convention"),
        (ThirdDimensionRMSNorm, "no known convention"),
        (lambda: Shifted(8, eps=1e-6), "no known convention"),
        (lambda: Shifted(8), "no attribute holds an epsilon"),
        (lambda: Shifted((2, 4), eps=1e-6), "not of one dimension"),
        (patched, "its forward was replaced"),
        (compiled, "compiled in place"),
        (lambda: nn.LayerNorm(8, dtype=torch.complex64), "dtype"),
        (
            lambda: nn.utils.parametrizations.weight_norm(nn.LayerNorm(8), dim=None),
            "children or buffers",
        ),
    ],
)
def test_what_cannot_be_reproduced_is_left_alone(make: Any, reason: str) -> None:
    model = nn.Sequential(make())
    kind, state = type(model[0]), copy.deepcopy(model.state_dict())
    report = effkern.swap_norms(model)
    assert report.swapped == []
    assert [norm.path for norm in report.left] == ["0"]
    assert reason in report.left[0].reason
    assert type(model[0]) is kind
    assert "left    0:" in str(report)
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())


class WithProjection(RoundsFirst):
    """Has more than a norm where it is given more."""

    def __init__(self, features: int, project: bool, scaled: bool) -> None:
        super().__init__(features)
        if project:
            self.project = nn.Linear(features, features)
        if scaled:
            self.register_buffer("scale", torch.tensor(2.0))

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x) * getattr(self, "scale", 1)
        return self.project(y) if hasattr(self, "project") else y


def test_a_module_with_more_is_not_taken_for_one_of_its_class() -> None:
    model = nn.Sequential(*(WithProjection(48, *more) for more in ((0, 0), (1, 0), (0, 1))))
    x = torch.randn(5, 48)
    stock = model(x)
    assert [norm.path for norm in effkern.swap_norms(model).swapped] == ["0"]
    torch.testing.assert_close(model(x), stock)


@pytest.mark.parametrize(
    "make", [lambda: nn.LayerNorm(48), lambda: nn.RMSNorm(48), lambda: RoundsFirst(48)]
)
def test_called_by_keyword_as_before(make: Callable[[], nn.Module]) -> None:
    norm = make()
    (name,) = inspect.signature(norm.forward).parameters
    x = torch.randn(5, 48)
    stock = norm(**{name: x})
    assert effkern.swap_norms(norm).swapped
    torch.testing.assert_close(norm(**{name: x}), stock)
    with pytest.raises(TypeError):
        norm(other=x)
    with pytest.raises(TypeError):
        norm()


def test_methods_and_attributes_of_the_class_stay() -> None:
    class FromZero(CountsFromOne):
        def reset_parameters(self) -> None:
            nn.init.zeros_(self.weight)

    norm = FromZero(48)
    assert effkern.swap_norms(norm).swapped
    norm.reset_parameters()
    assert not norm.weight.any()
    assert norm.normalized_shape == (48,)
    norm.normalized_shape = (48,)  # what an instance is given stands before what is computed

    without = Weightless()
    without.register_parameter("weight", None)
    assert effkern.swap_norms(without).swapped
    assert (without.normalized_shape, without.elementwise_affine) == ((0,), False)


def test_a_subclass_of_effkerns_own() -> None:
    class InItsOwnDtype(effkern.nn.RMSNorm):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x)

    norm = InItsOwnDtype(48, eps=1e-6)
    x = torch.randn(5, 48)
    stock = norm(x)
    assert effkern.swap_norms(norm).swapped
    torch.testing.assert_close(norm(x), stock)


def test_modules_that_draw_warn_or_have_no_shape_yet() -> None:
    model = nn.Sequential(
        nn.Dropout(0.05), nn.InstanceNorm1d(3), nn.LazyInstanceNorm1d(affine=True), nn.LayerNorm(4)
    )
    state = torch.get_rng_state()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        report = effkern.swap_norms(model)
    assert torch.equal(torch.get_rng_state(), state)
    assert [norm.path for norm in report.swapped] == ["3"]


def test_other_modules_are_not_mentioned() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.PReLU(4), nn.BatchNorm1d(4), nn.GroupNorm(2, 4))
    assert effkern.swap_norms(model) == SwapReport()


def test_nothing_of_the_callers_is_touched() -> None:
    norm = RoundsFirst(48)
    norm.weight.grad = torch.ones(48)
    norm.register_forward_hook(lambda *_: pytest.fail("a probe ran the hook"))
    state, version = torch.get_rng_state(), norm.weight._version
    effkern.swap_norms(norm)
    assert torch.equal(torch.get_rng_state(), state)
    assert norm.weight._version == version
    assert torch.equal(norm.weight.grad, torch.ones(48))


def test_flags_of_a_class_tell_its_modules_apart() -> None:
    class Either(_Scaled):
        def __init__(self, features: int, plus_one: bool) -> None:
            super().__init__(features)
            self.plus_one = plus_one

        def forward(self, x: Tensor) -> Tensor:
            weight = self.weight.float() + self.plus_one
            return (_rms(x.float(), self.variance_epsilon) * weight).to(x.dtype)

    model = nn.ModuleList([Either(48, False), Either(48, True), Either(48, False)])
    x = torch.randn(5, 48)
    stock = [norm(x) for norm in model]
    assert len(effkern.swap_norms(model).swapped) == 3
    torch.testing.assert_close([norm(x) for norm in model], stock)


def test_a_meta_model_and_no_model() -> None:
    with torch.device("meta"):
        model = nn.Sequential(RoundsFirst(16), nn.LayerNorm(16))
    assert len(effkern.swap_norms(model).swapped) == 2
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got int"):
        effkern.swap_norms(3)  # type: ignore[arg-type]


@pytest.mark.parametrize("mode", [lambda: torch.device("meta"), FakeTensorMode])
def test_a_default_device_or_a_mode_does_not_matter(mode: Callable[[], Any]) -> None:
    norm = RoundsFirst(16)
    with mode():
        assert len(effkern.swap_norms(norm).swapped) == 1


@pytest.mark.parametrize(
    ("module", "name", "swapped"),
    [
        ("llama", "LlamaRMSNorm", True),
        ("gemma", "GemmaRMSNorm", True),
        ("t5", "T5LayerNorm", True),
        ("gpt_oss", "GptOssRMSNorm", True),
        ("cohere", "CohereLayerNorm", True),
        ("zamba2", "Zamba2RMSNormGated", False),
    ],
)
def test_the_classes_of_transformers(module: str, name: str, swapped: bool) -> None:
    package = f"transformers.models.{module}.modeling_{module}"
    pytest.importorskip("transformers", reason="transformers is not installed")
    kind = getattr(pytest.importorskip(package), name)
    norm = kind(64) if swapped else kind(64, 2)
    report = effkern.swap_norms(norm)
    assert len(report.swapped) == swapped
    assert len(report.left) == (not swapped)
