"""to_crmsnorm: the stream has d - 1 features, affines are in the readers, outputs are equal."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import effkern
from effkern.convert import NotConvertible, to_crmsnorm, to_rmsnorm, training_form
from effkern.convert.runtime import ExpandedRMSNorm, FoldedCRMSNorm
from tests.convert import nets
from tests.convert.nets import Block, D, Net, layer_norms, randomised
from tests.convert.test_nets import NETS

FOLDED: dict[str, int] = {
    "plain": 3, "without affine": 3, "without bias": 3, "tied": 2, "LayerScale": 3,
    "lerp and addcmul": 3, "one group": 2, "functional": 2, "weight + 1": 2, "spelled out": 2,
    "spelled out with a variance": 2, "names of its own": 2, "mean of squares": 2,
    "leading ones": 2, "native": 2, "shared block": 1,
    "behind an activation": 3, "rebuilt positions": 3, "positions in a buffer": 3, "patches": 2,
    "mixer": 3, "nn.TransformerEncoder": 4,
}  # fmt: skip


def converted(model: nn.Module, inputs: Any, **options: Any) -> effkern.convert.Conversion:
    return nets.converted(model, inputs, to_crmsnorm, **options)


DEFAULT = ("tied", "functional", "leading ones", "native", "mixer", "nn.TransformerEncoder")


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[] if n in DEFAULT else [pytest.mark.slow]) for n in NETS]
)
def test_converts(name: str) -> None:
    make, inputs, before, after, recentred = NETS[name]
    model = randomised(make())
    result = converted(model, inputs)
    report = result.report
    assert (len(report.recentred), report.left) == (recentred, [])
    assert len(report.swapped) + len(report.left) == before or name == "spelled out"
    assert sum("affine folded" in swapped.how for swapped in report.swapped) == FOLDED[name]
    assert layer_norms(result.model, inputs) == after
    kinds = {check.inputs for check in report.checks}
    assert "random inputs of another batch size" in kinds
    for copied in (copy.deepcopy(result.model), pickle.loads(pickle.dumps(result.model))):
        nets.assert_same(nets.call(result.model, inputs), nets.call(copied, inputs), ["output"], 0)


@pytest.mark.parametrize("name", ["LayerScale", "rebuilt positions"])
def test_the_stream_has_no_last_feature(name: str) -> None:
    """Between blocks it is the original's, centred, with zero in place of the last feature."""
    make, inputs, *_ = NETS[name]
    model = randomised(make()).double()
    inputs = tuple(x.double() if x.is_floating_point() else x for x in inputs)
    twin = to_crmsnorm(copy.deepcopy(model), inputs).model
    streams: dict[nn.Module, Tensor] = {}

    def keep(block: nn.Module, _: Any, output: Tensor) -> None:
        streams[block] = output

    for each in (model, twin):
        each.blocks[-1].register_forward_hook(keep)
        nets.call(each, inputs)
    wanted = streams[model.blocks[-1]]
    wanted = wanted - wanted.mean(-1, keepdim=True)
    found = streams[twin.blocks[-1]]
    assert (found[..., -1] == 0).all()
    torch.testing.assert_close(found[..., :-1], wanted[..., :-1], rtol=0, atol=1e-12)


def test_weights_are_those_of_the_paper() -> None:
    """Readers have W diag(weight)[:, :-1] - [:, -1:], up to the factor of the stored width, and
    W bias more in their biases; writers lose the mean and the last output.
    """  # fmt: skip
    model = randomised(Net()).double()
    twin = to_crmsnorm(copy.deepcopy(model), nets.tokens()).model
    before, after = model.blocks[0], twin.blocks[0]
    assert type(after.norm) is FoldedCRMSNorm
    assert isinstance(after.norm, effkern.nn.CRMSNorm)
    product = before.up.weight * before.norm.weight
    wanted = (product - product[:, -1:]) * (D / (D + 1)) ** 0.5
    torch.testing.assert_close(after.up.weight, wanted, rtol=0, atol=1e-14)
    assert (after.up.weight[:, -1] == 0).all()
    bias = before.up.bias + before.up.weight @ before.norm.bias
    torch.testing.assert_close(after.up.bias, bias, rtol=0, atol=1e-14)
    wanted = (before.down.weight - before.down.weight.mean(0))[:-1]
    torch.testing.assert_close(after.down.weight[:-1], wanted, rtol=0, atol=1e-14)
    assert (after.down.weight[-1] == 0).all()
    assert after.down.bias[-1] == 0
    assert (after.norm.weight == 1).all()
    assert (after.norm.bias == 0).all()
    # the head has no bias: what the norm's adds is in the column that multiplies a one
    added = model.head.weight @ model.norm.bias
    torch.testing.assert_close(twin.head.weight[:, -1], added, rtol=0, atol=1e-14)


class Two(Block):
    """Two linears read one norm, one of them without a bias."""

    def __init__(self, bias: bool = False) -> None:
        super().__init__()
        self.gate = nn.Linear(D, 2 * D, bias=bias)

    def branch(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        return self.down(F.gelu(self.up(y)) * self.gate(y))


class Mixed(Two):
    """Reads rows of the normalised value, and a mean of rows."""

    def branch(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        first, rest = y[:, :1], y[:, 1:]
        gate = self.gate(rest.mean(1, keepdim=True)) + self.gate(first)
        return self.down(self.up(y.transpose(0, 1)).transpose(0, 1) * gate)


class Straight(Block):
    """One linear reads the norm and writes to the stream."""

    def __init__(self) -> None:
        super().__init__()
        self.straight = nn.Linear(D, D)

    def branch(self, x: Tensor) -> Tensor:
        return self.straight(self.norm(x))


class Stored(Block):
    """Weights of its own, stored by inputs, one of them read without a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.matrix = nn.Parameter(torch.randn(D, 2 * D))
        self.added = nn.Parameter(torch.randn(2 * D))

    def branch(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        rows = torch.addmm(self.added, y.flatten(0, 1), self.matrix).view(*y.shape[:-1], -1)
        return self.down(rows + y @ self.up.weight.T)


def test_affines_go_into_readers() -> None:
    """Into biases where every reader has its own, else into the column that multiplies a one."""
    blocks = [Two(True), Two(), Mixed(), Straight(), Stored()]
    result = converted(randomised(Net(*blocks)), nets.tokens())
    norms = [block.norm for block in result.model.blocks]
    assert all(type(norm) is FoldedCRMSNorm for norm in norms)
    assert [norm.one for norm in norms] == [False, True, True, False, True]


class Activated(Block):
    """Something other than a linear reads the norm."""

    def branch(self, x: Tensor) -> Tensor:
        return super().branch(x) + self.down(F.gelu(self.up(self.norm(x).relu())))


class Padded(Block):
    """Rows of zeros stand beside those of the norm."""

    def branch(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(F.pad(self.norm(x), (0, 0, 1, 0)))))[:, 1:]


class Summed(Block):
    """Rows of the norm are added."""

    def branch(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(self.norm(x).sum(1, keepdim=True))))


class Reused(Block):
    """The weight that reads the norm reads something else too."""

    def branch(self, x: Tensor) -> Tensor:
        return super().branch(x) + self.down(self.up(self.norm(x).relu()) * 2)


class Half(Block):
    """A part of a weight reads the norm."""

    def branch(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        return self.down(F.linear(y, self.up.weight[:D]).repeat(1, 1, 2))


class OtherWay(Block):
    """The weight that reads the norm is used the other way round as well."""

    def __init__(self) -> None:
        super().__init__()
        self.square = nn.Parameter(torch.randn(D, D))

    def branch(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        return self.down(torch.cat([F.linear(y, self.square), y @ self.square], -1))


class Weighed(Block):
    """The norm's weight is read outside the norm."""

    def branch(self, x: Tensor) -> Tensor:
        return super().branch(x) * self.norm.weight.sum()


def test_norms_that_give_all_features() -> None:
    """Whatever else a norm's result, its affine or its readers are used for."""
    joined, first, second = Block(), Block(), Block()
    joined.norm.weight = first.norm.weight
    second.up = first.up
    blocks = [Activated(), Padded(), Summed(), Reused(), Half(), OtherWay(), Weighed()]
    model = randomised(Net(*blocks, joined, first, second))
    result = converted(model, nets.tokens())
    for before, after in zip(model.blocks, result.model.blocks, strict=True):
        assert type(after.norm) is ExpandedRMSNorm, type(after)
        assert torch.equal(after.norm.weight, before.norm.weight)
        assert after.norm.weight.requires_grad
    assert type(result.model.norm) is FoldedCRMSNorm


def test_a_bias_of_two_readers_takes_nothing_in() -> None:
    block = Two(True)
    block.gate.bias = block.up.bias
    model = randomised(Net(block, Block()))
    twin = converted(model, nets.tokens()).model
    assert twin.blocks[0].norm.one
    assert torch.equal(twin.blocks[0].up.bias, model.blocks[0].up.bias)


def test_it_computes_no_mean_of_the_stream() -> None:
    model = to_crmsnorm(randomised(Net(tied=True)), nets.tokens()).model
    graph = torch.export.export(model, nets.tokens(), strict=False).graph
    names = [str(node.target) for node in graph.nodes]
    assert not any("layer_norm" in name for name in names)
    assert sum("mean" in name for name in names) == 1, "where the tied table is recentred"


@pytest.mark.parametrize("name", ["tied", "patches"])
def test_trains(name: str) -> None:
    """Gradients reach every parameter that needs one, and the loss falls."""
    make, inputs, *_ = NETS[name]
    model = to_crmsnorm(randomised(make()), inputs).model.train()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    losses = []
    for _ in range(5):
        optimizer.zero_grad()
        loss = (model(*inputs) - 1).square().mean()
        loss.backward()
        losses.append(loss.item())
        for parameter in model.parameters():
            assert (parameter.grad is not None) == parameter.requires_grad
        optimizer.step()
    assert losses[-1] < 0.9 * losses[0]


def test_gradients_are_those_of_the_function() -> None:
    """Of the inputs, they are the original's: the function is the same."""
    x = torch.randn(2, 5, D, dtype=torch.float64, requires_grad=True)
    model = randomised(NETS["nn.TransformerEncoder"][0]()).double()
    twin = to_crmsnorm(copy.deepcopy(model), (x.detach(),)).model
    wanted, found = (torch.autograd.grad(m(x).square().sum(), x)[0] for m in (model, twin))
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-11)


def test_compiles_in_one_graph() -> None:
    model = to_crmsnorm(randomised(Net(nets.FunctionalBlock(), Two())), nets.tokens()).model
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*nets.tokens()), model(*nets.tokens()))


def test_bfloat16_weights() -> None:
    model = randomised(Net(tied=True)).bfloat16()
    result = to_crmsnorm(copy.deepcopy(model), nets.tokens())
    assert result.report.checks[0].dtype == "float64"
    before, after = (nets.call(m, nets.tokens()) for m in (model, result.model))
    nets.assert_same(before, after, ["output"], 0.02)


def test_other_forms_refuse_what_was_converted() -> None:
    model = to_crmsnorm(randomised(Net()), nets.tokens()).model
    with pytest.raises(NotConvertible, match="was not converted by"):
        training_form(model)
    for convert in (to_rmsnorm, to_crmsnorm):
        with pytest.raises(NotConvertible, match="no layer norm"):
            convert(model, nets.tokens())


def test_report_as_text_and_data() -> None:
    report = converted(randomised(Net(nets.ScaledBlock(), Two(), tied=True)), nets.tokens()).report
    text = str(report)
    assert "3 layer norms became CRMSNorm, 0 stayed" in text
    assert "blocks.0.norm (CRMSNorm, affine folded)" in text
    assert "blocks.1.norm (CRMSNorm, affine folded, a one in its last feature)" in text
    assert "norm (RMSNorm of all features again, module swapped)" in text
    assert "folded     blocks.0.norm into blocks.0.up.weight, dimension 1" in text
    assert "folded     blocks.0.norm into blocks.0.up.bias\n" in text
    assert "blocks.1.up.bias" not in text
    assert report.as_dict()["folded"][0]["parameter"] in report.to_json()
    assert report.kind == "crmsnorm"
