"""to_rmsnorm on networks with one trap each: equal outputs, no layer norm left, nothing moved."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import effkern
from effkern.convert import to_rmsnorm
from tests.convert import nets
from tests.convert.nets import Block, Net, converted, layer_norms, randomised


def encoder(final: bool = True) -> nn.Module:
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, norm_first=True)
    return nn.TransformerEncoder(
        layer, 2, norm=nn.LayerNorm(16) if final else None, enable_nested_tensor=False
    )


#: name: the model, its inputs, layer norms before and after, places recentred at run time
NETS: dict[str, tuple[Callable[[], nn.Module], Any, int, int, int]] = {
    "plain": (Net, nets.tokens(), 3, 0, 0),
    "without affine": (lambda: Net(final=nn.LayerNorm(16, elementwise_affine=False)),
                       nets.tokens(), 3, 0, 0),
    "without bias": (lambda: Net(final=nn.LayerNorm(16, bias=False)), nets.tokens(), 3, 0, 0),
    "tied": (lambda: Net(tied=True), nets.tokens(), 3, 0, 1),
    "LayerScale": (lambda: Net(nets.ScaledBlock(), Block()), nets.tokens(), 3, 0, 0),
    "lerp and addcmul": (lambda: Net(nets.LerpBlock(), nets.AddcmulBlock()),
                         nets.tokens(), 3, 0, 0),
    "one group": (lambda: Net(nets.GroupBlock(), Block()), nets.tokens(), 3, 0, 0),
    "functional": (lambda: Net(nets.FunctionalBlock(), Block()), nets.tokens(), 3, 0, 0),
    "weight + 1": (lambda: Net(Block(nets.PlusOne(16)), Block()), nets.tokens(), 3, 0, 0),
    "spelled out": (lambda: Net(Block(nets.SpelledOut()), final=nets.SpelledOut()),
                    nets.tokens(), 2, 0, 0),
    "spelled out with a variance": (
        lambda: Net(Block(nets.Variance()), final=nets.VarianceAndMean()), nets.tokens(), 2, 0, 0),
    "names of its own": (lambda: Net(Block(nets.OwnNames()), final=nets.OwnNames()),
                         nets.tokens(), 2, 0, 0),
    "mean of squares": (lambda: Net(Block(nets.MeanOfSquares()), final=nets.SumsOverSize()),
                        nets.tokens(), 2, 0, 0),
    "leading ones": (lambda: Net(Block(nets.LeadingOnes()), final=nets.LeadingOnes()),
                     nets.tokens(), 2, 0, 0),
    "native": (lambda: Net(Block(nets.Native()), nets.NativeBlock(), final=nets.Native()),
               nets.tokens(), 3, 0, 0),
    "shared block": (lambda: Net(*[Block()] * 3), nets.tokens(), 4, 0, 0),
    "behind an activation": (nets.ActivationNet, nets.tokens(), 3, 0, 1),
    "rebuilt positions": (nets.RebuiltPositions, nets.tokens(), 3, 0, 1),
    "positions in a buffer": (nets.BufferPositions, nets.tokens(), 3, 0, 1),
    "patches": (nets.Patches, nets.image(), 3, 0, 0),
    "mixer": (lambda: Net(nets.Mixer(), nets.Mixer()), nets.tokens(), 5, 0, 2),
    "nn.TransformerEncoder": (encoder, (torch.randn(2, 5, 16),), 5, 0, 1),
}  # fmt: skip


@pytest.mark.parametrize("name", NETS)
def test_converts(name: str) -> None:
    make, inputs, before, after, recentred = NETS[name]
    model = randomised(make())
    assert layer_norms(model, inputs) == before
    result = converted(model, inputs)
    assert layer_norms(result.model, inputs) == after
    assert len(result.report.recentred) == recentred
    assert not result.report.left
    kinds = {check.inputs for check in result.report.checks}
    assert "random inputs of another batch size" in kinds
    if name not in ("mixer", "patches"):  # their weights fix the length
        assert "random inputs of another length" in kinds
    for copied in (copy.deepcopy(result.model), pickle.loads(pickle.dumps(result.model))):
        nets.assert_same(
            nets.call(result.model, inputs), nets.call(copied, inputs), result.report.outputs, 0
        )


def test_one_norm_left_as_a_layer_norm_keeps_its_mean() -> None:
    """A norm in a branch that cannot be proved stays, beside a functional one that is converted."""

    class Inner(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.LayerNorm(16)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.norm(x.relu())

    class Outer(nets.FunctionalBlock):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Inner()

        def branch(self, x: torch.Tensor) -> torch.Tensor:
            return self.down(self.up(self.inner(super().branch(x))).relu())

    model = randomised(Net(Outer(), Block()))
    result = converted(model, nets.tokens())
    assert [left.module for left in result.report.left] == ["blocks.0.inner.norm"]
    assert layer_norms(result.model, nets.tokens()) == 1


def test_a_norm_that_is_called_on_the_stream_and_on_its_own_result_stays() -> None:
    """Neither call needs it to be an RMSNorm, and the other norms do not need it either."""

    class Pooled(Net):
        def forward(self, tokens: torch.Tensor) -> Any:
            x = self.norm(self.blocks[1](self.blocks[0](self.stream(tokens))))
            return self.head(x), self.norm(x[:, 0])

    result = converted(randomised(Pooled()), nets.tokens())
    assert [left.module for left in result.report.left] == ["norm"]
    assert len(result.report.swapped) == 2


def test_a_norm_among_other_operations_stays_and_is_reported() -> None:
    report = converted(randomised(Net(Block(), nets.InlineBlock())), nets.tokens()).report
    assert [left.module for left in report.left] == ["blocks.1"]
    assert "spelled out among" in str(report)


def test_ids_may_decide_the_way_where_all_parameters_are_seen() -> None:
    report = converted(randomised(nets.AsksIds()), nets.tokens()).report
    assert any("another way" in text for text in report.not_covered)


def test_the_report_names_what_the_example_inputs_do_not_reach() -> None:
    model = randomised(Net())
    model.other = Block()
    report = converted(model, nets.tokens()).report
    assert any("do not reach: other.down, other.norm, other.up" in t for t in report.not_covered)


def test_weights_are_centred_and_tied_ones_are_not() -> None:
    model = randomised(Net(tied=True))
    table = model.embed.weight.detach().clone()
    converted_model = to_rmsnorm(model, nets.tokens()).model
    assert converted_model.head.weight is converted_model.embed.weight
    assert torch.equal(converted_model.embed.weight, table)
    for block in converted_model.blocks:
        assert block.down.weight.mean(0).abs().max() < 1e-7
        assert block.down.bias.mean().abs() < 1e-7
        assert isinstance(block.norm, effkern.nn.RMSNorm | torch.nn.RMSNorm)


def test_parameters_that_share_storage_as_different_views_are_left() -> None:
    model = randomised(Net())
    model.other = nn.Parameter(torch.empty(0))
    model.other.data = model.blocks[0].down.weight.data.view(-1)[: 16 * 16]
    before = model.blocks[0].down.weight.detach().clone()
    report = to_rmsnorm(model, nets.tokens()).report
    assert torch.equal(model.blocks[0].down.weight, before)
    assert "blocks.0.down.weight" not in {edit.parameter for edit in report.edits}
    assert [place.module for place in report.recentred] == ["blocks.1"]


def test_keeps_mode_random_state_hooks_and_gradients() -> None:
    model = randomised(nets.RebuiltPositions()).train()
    model.blocks[0].eval()
    model.head.weight.requires_grad_(False)
    seen: list[str] = []
    handle = model.norm.register_forward_hook(lambda *_: seen.append("hook"))
    modes = [m.training for m in model.modules()]
    state = torch.get_rng_state()
    to_rmsnorm(model, nets.tokens())
    assert [m.training for m in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)
    assert not model.head.weight.requires_grad
    assert all(p.grad is None for p in model.parameters())
    seen.clear()
    model(*nets.tokens())
    assert seen == ["hook"]
    handle.remove()
    model(*nets.tokens())
    assert seen == ["hook"]


def test_fast_paths_are_switched_off() -> None:
    model = randomised(encoder())
    result = converted(model, (torch.randn(2, 5, 16),))
    for layer in result.model.layers:
        assert layer.activation_relu_or_gelu == 0
    calls = []
    result.model.layers[0].norm1.register_forward_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        result.model(torch.randn(2, 5, 16))
    assert calls


def test_bfloat16_weights() -> None:
    model = randomised(Net()).bfloat16()
    result = to_rmsnorm(copy.deepcopy(model), nets.tokens())
    assert result.report.checks[0].dtype == "float64"
    before, after = (nets.call(m, nets.tokens()) for m in (model, result.model))
    nets.assert_same(before, after, ["output"], 0.02)


def test_compiles_in_one_graph() -> None:
    model = to_rmsnorm(randomised(Net(nets.FunctionalBlock(), Block())), nets.tokens()).model
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*nets.tokens()), model(*nets.tokens()))


def test_report_as_text_and_data() -> None:
    report = converted(randomised(Net(nets.ScaledBlock(), tied=True)), nets.tokens()).report
    text = str(report)
    assert "blocks.0.norm" in text
    assert "after blocks.0.gamma was multiplied in" in text
    assert "recentred  input.x of blocks.0, for 2 norms" in text
    assert "not proved" in text
    assert report.as_dict()["edits"][0]["parameter"] in report.to_json()


def test_bad_arguments() -> None:
    with pytest.raises(TypeError, match="model must be a module, got int"):
        to_rmsnorm(3, ())  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="example_inputs must be a tuple or a dict, got Tensor"):
        to_rmsnorm(Net(), nets.tokens()[0])  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="outputs must be a sequence of names"):
        to_rmsnorm(Net(), nets.tokens(), outputs="output")
    with pytest.raises(ValueError, match="outputs names 'logits', but the model returns output"):
        to_rmsnorm(Net(), nets.tokens(), outputs=["logits"])
