"""What cannot be proved is refused with the place and the reason, and left bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from effkern.convert import (
    Conversion,
    NotConvertible,
    check,
    structure,
    to_crmsnorm,
    to_rmsnorm,
    weights,
)
from tests.convert import nets
from tests.convert.nets import Block, Net, randomised


class PostNorm(Block):
    """Normalises the sum."""

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x + self.down(self.up(x).relu()))


class Tapped(Net):
    """Returns the stream beside the logits."""

    def forward(self, tokens: Tensor) -> Any:
        x = self.blocks[1](self.blocks[0](self.stream(tokens)))
        return {"logits": self.head(self.norm(x)), "stream": x}


class Reader(Net):
    """Reads the stream without a norm."""

    def forward(self, tokens: Tensor) -> Any:
        x = self.blocks[1](self.blocks[0](self.stream(tokens)))
        return self.head(self.norm(x)) + self.head(x)


class Merged(Net):
    """Normalises two rows of the stream as one."""

    def __init__(self) -> None:
        super().__init__(final=nn.LayerNorm(32))
        self.head = nn.Linear(32, 5)

    def forward(self, tokens: Tensor) -> Any:
        x = self.blocks[1](self.blocks[0](self.stream(tokens)))
        return self.head(self.norm(torch.cat([x[:, 0::2], x[:, 1::2]], -1)))


class Depthwise(Block):
    """Reads the stream with a convolution of its own for each feature."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(16, 16, 3, padding=1, groups=16)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.branch(self.conv(x.transpose(1, 2)).transpose(1, 2))


class GroupNorm(nn.GroupNorm):
    """Normalises features and positions together."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.transpose(1, 2)).transpose(1, 2)


class RootMeanSquare(nn.Module):
    """RMSNorm in elementary operations."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)


class Branching(Net):
    """Asks the data which way to go."""

    def stream(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        return x if x.sum() > 0 else -x


class Unseen(nets.AsksIds):
    """Asks the ids whether a layer writes to the stream."""

    def __init__(self) -> None:
        super().__init__()
        self.other = nn.Linear(16, 16)

    def stream(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        return x + self.other(x) if (tokens == 0).all() else x


REFUSED: dict[str, tuple[Callable[[], nn.Module], str, str]] = {
    "Post-LN": (lambda: Net(PostNorm(), PostNorm()), "blocks.0.norm", "reads the un-normalised"),
    "returned": (Tapped, "blocks.1.norm", "'stream' is the un-normalised stream; name the outputs"),
    "read": (Reader, "blocks.1.norm", "linear reads the un-normalised stream"),
    "merged": (Merged, "blocks.1.norm", "cat reads the un-normalised stream"),
    "depthwise": (lambda: Net(Depthwise(), Depthwise()), "norm", "conv1d reads the un-normalised"),
    "positions too": (lambda: Net(Block(GroupNorm(1, 16)), final=GroupNorm(1, 16)),
                      "", "no layer norm over a last"),
    "RMSNorm": (lambda: Net(Block(RootMeanSquare()), final=RootMeanSquare()),
                "", "RMSNorm already"),
    "no norm": (lambda: Net(Block(nn.Identity()), final=nn.Identity()), "", "no layer norm"),
    "not traced": (Branching, "", "cannot be traced"),
    "a way not seen": (Unseen, "other", "the example inputs do not come here"),
}  # fmt: skip


def everything(model: nn.Module) -> list[Any]:
    """All that a refusal must leave."""
    found: list[Any] = [torch.get_rng_state().tolist(), [m.training for m in model.modules()]]
    for module in model.modules():
        hooks = (module._forward_hooks, module._forward_pre_hooks, vars(module).get("forward"))
        found += [type(module), *map(repr, hooks), sorted(vars(module))]
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        found += [name, id(tensor), tensor.data_ptr(), tensor.dtype, tensor.tolist()]
        found += [tensor._version, tensor.requires_grad]
    return found


BOTH = pytest.mark.parametrize("convert", [to_rmsnorm, to_crmsnorm])


#: With to_crmsnorm, which fails as to_rmsnorm does, these; the rest is slow.
DEFAULT_CRMSNORM = ("returned", "merged", "depthwise")


@pytest.mark.parametrize(
    ("name", "convert"),
    [
        *((name, to_rmsnorm) for name in REFUSED),
        *(
            pytest.param(
                name,
                to_crmsnorm,
                marks=[] if name in DEFAULT_CRMSNORM else [pytest.mark.slow],
            )
            for name in REFUSED
        ),
    ],
)
def test_refused(name: str, convert: Callable[..., Conversion]) -> None:
    make, module, reason = REFUSED[name]
    model = randomised(make()).train()
    model.norm.eval()
    before = everything(model)
    with pytest.raises(NotConvertible) as caught:
        convert(model, nets.tokens(length=6))
    assert everything(model) == before
    assert caught.value.module == module
    assert reason in caught.value.reason
    assert str(caught.value) == f"{module or 'the model'}: {caught.value.reason}"


@BOTH
def test_what_has_no_values_or_cannot_be_changed(convert: Callable[..., Conversion]) -> None:
    model = Net()
    model.blocks[0].norm.to("meta")
    with pytest.raises(NotConvertible, match="weight is on the meta device") as caught:
        convert(model, nets.tokens())
    assert caught.value.module == "blocks.0.norm"
    model.blocks[0] = torch.jit.trace(Block().eval(), (torch.randn(2, 5, 16),))
    with pytest.raises(NotConvertible, match="it is TorchScript") as caught:
        convert(model, nets.tokens())
    assert caught.value.module == "blocks.0"


@BOTH
def test_outputs_name_what_must_stay_equal(convert: Callable[..., Conversion]) -> None:
    model = randomised(Tapped())
    result = nets.converted(model, nets.tokens(), convert, outputs=["logits"])
    assert result.report.outputs == ["logits"]
    assert any("stream" in text for text in result.report.not_covered)


@pytest.mark.parametrize(
    ("fault", "convert"),
    [
        ("weights", to_rmsnorm),
        ("norms", to_rmsnorm),
        ("check fails to run", to_rmsnorm),
        ("weights", to_crmsnorm),
        ("norms", to_crmsnorm),
    ],
)
def test_a_wrong_conversion_is_found_and_taken_back(
    fault: str, convert: Callable[..., Conversion], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The numerical check is able to fail, and what it finds leaves nothing behind."""
    model = randomised(Net(nets.FunctionalBlock(), tied=True))
    before = everything(model)
    if fault == "weights":
        monkeypatch.setattr(weights, "centred", lambda value, axis, features: value)
    elif fault == "norms":
        real = structure.steps_of
        monkeypatch.setattr(
            structure, "steps_of",
            lambda *given: [{**s, "eps": 0.1} if "eps" in s else s for s in real(*given)],
        )  # fmt: skip
    else:
        real_compare = check.compare

        def compare(*given: Any) -> Any:
            real_compare(*given)
            raise NotConvertible("", "differ")

        monkeypatch.setattr(check, "compare", compare)
    with pytest.raises(NotConvertible, match="differ"):
        convert(model, nets.tokens())
    assert everything(model) == before


def test_a_model_that_does_not_run_in_float64_is_checked_in_its_own_dtype() -> None:
    class Stubborn(Net):
        def stream(self, tokens: Tensor) -> Tensor:
            x = self.embed(tokens)
            if x.dtype != torch.float32:
                raise RuntimeError("float32 alone")
            return x

    model = randomised(Stubborn())
    result = to_rmsnorm(model, nets.tokens())
    assert {c.dtype for c in result.report.checks} == {"float32"}
    assert any("does not run in it" in text for text in result.report.not_covered)
