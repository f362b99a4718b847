"""Small Pre-LN networks, each with a trap of its own, and what is asked of a conversion."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from effkern.convert import Conversion, to_rmsnorm
from effkern.convert.flatten import named_tensors

D, VOCABULARY = 16, 23


def randomised(model: nn.Module, seed: int = 0) -> nn.Module:
    """A model whose affines and biases are random, and whose weights have means of their own."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
            if parameter.dim() > 1:
                parameter.add_(0.02 * noise + 0.01)
            else:
                parameter.copy_(0.3 * noise + (0 if name.endswith("bias") else 1))
    return model.eval()


def call(model: nn.Module, inputs: Any) -> dict[str, Tensor]:
    """What a model returns, by name; random numbers in it are the same each time."""
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(0)
        result = model(**inputs) if isinstance(inputs, dict) else model(*inputs)
        return {k: v.clone() for k, v in named_tensors(result)}


def assert_same(
    before: dict[str, Tensor], after: dict[str, Tensor], names: list[str], tolerance: float
) -> None:
    """Outputs agree, relative to their largest entry or to one."""
    for name in names:
        a, b = before[name], after[name]
        if a.is_floating_point():
            size = max(1.0, a.abs().max().item())
            assert (a - b).abs().max().item() <= tolerance * size, name
        else:
            assert torch.equal(a, b), name


def converted(
    model: nn.Module,
    inputs: Any,
    convert: Callable[..., Conversion] = to_rmsnorm,
    **options: Any,
) -> Conversion:
    """Convert a copy; check it against the model in the model's dtype, and its names."""
    twin = copy.deepcopy(model)
    objects = dict(twin.named_parameters())
    result = convert(twin, inputs, **options)
    assert result.model is twin
    assert type(twin) is type(model)
    assert list(twin.state_dict()) == list(model.state_dict())
    assert all(p is objects[name] for name, p in twin.named_parameters())
    assert result.report.swapped
    assert result.report.checks[0].dtype == "float64"
    assert max(c.difference for c in result.report.checks) <= 1e-10
    assert_same(call(model, inputs), call(twin, inputs), result.report.outputs, 1e-5)
    return result


def layer_norms(model: nn.Module, inputs: Any) -> int:
    """How many layer norms a trace of the model has."""
    from effkern.convert.norms import find_norms
    from effkern.convert.trace import trace

    return sum(len(group.norms) for group in find_norms(trace(model, inputs)))


class Block(nn.Module):
    """x + f(norm(x)) with two linears."""

    def __init__(self, norm: nn.Module | None = None) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(D) if norm is None else norm
        self.up, self.down = nn.Linear(D, 2 * D), nn.Linear(2 * D, D)

    def branch(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(self.norm(x))))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.branch(x)


class ScaledBlock(Block):
    """With LayerScale, written either way round."""

    def __init__(self) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.rand(D))

    def forward(self, x: Tensor) -> Tensor:
        return self.gamma * self.branch(x) + x


class LerpBlock(Block):
    """A weighted sum as one operation."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.lerp(x, self.branch(x), 0.3)


class AddcmulBlock(ScaledBlock):
    """LayerScale and sum as one operation."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.addcmul(x, self.gamma, self.branch(x))


class FunctionalBlock(Block):
    """Holds its norm's parameters itself, and calls the function."""

    def __init__(self) -> None:
        super().__init__(nn.Identity())
        self.scale, self.shift = nn.Parameter(torch.ones(D)), nn.Parameter(torch.zeros(D))

    def branch(self, x: Tensor) -> Tensor:
        return super().branch(F.layer_norm(x, (D,), self.scale, self.shift, 1e-4))


class GroupBlock(FunctionalBlock):
    """Normalises with one group, over rows that have nothing but features."""

    def branch(self, x: Tensor) -> Tensor:
        rows = F.group_norm(x.reshape(-1, D), 1, self.scale, self.shift, 1e-4)
        return Block.branch(self, rows.view_as(x))


class PlusOne(nn.LayerNorm):
    """A subclass whose affine is weight + 1."""

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.normalized_shape, self.weight + 1, self.bias, self.eps)


class SpelledOut(nn.Module):
    """A layer norm in elementary operations."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(D))

    def forward(self, x: Tensor) -> Tensor:
        dtype = x.dtype
        x = x.to(torch.float32)
        mean = x.mean(-1, keepdim=True)
        variance = (x - mean).pow(2).mean(-1, keepdim=True)
        x = (x - mean) * torch.rsqrt(variance + 1e-6)
        return (self.weight.to(torch.float32) * x).to(dtype)


class Variance(SpelledOut):
    """The same with the variance as one operation."""

    def forward(self, x: Tensor) -> Tensor:
        variance = x.var(-1, keepdim=True, unbiased=False)
        return self.weight * (x - x.mean(-1, keepdim=True)) / torch.sqrt(variance + 1e-6)


class VarianceAndMean(SpelledOut):
    """The same with the variance and the mean as one operation."""

    def forward(self, x: Tensor) -> Tensor:
        variance, mean = torch.var_mean(x, -1, correction=0, keepdim=True)
        return (x - mean) * (variance + 1e-6) ** -0.5 * self.weight


class OwnNames(nn.Module):
    """The same with names of its own for weight and bias."""

    def __init__(self) -> None:
        super().__init__()
        self.gamma, self.beta = nn.Parameter(torch.ones(D)), nn.Parameter(torch.zeros(D))

    def forward(self, x: Tensor) -> Tensor:
        mean = x.mean(-1, keepdim=True)
        variance = (x - mean).pow(2).mean(-1, keepdim=True)
        return self.gamma[None, None] * ((x - mean) / torch.sqrt(variance + 1e-6)) + self.beta


class MeanOfSquares(OwnNames):
    """The same with the variance as the mean square minus the square of the mean."""

    def forward(self, x: Tensor) -> Tensor:
        mean = x.mean(-1, keepdim=True)
        variance = x.square().mean(-1, keepdim=True) - mean * mean
        normal = (x - mean) * torch.rsqrt(variance + 1e-6)
        return torch.addcmul(self.beta, self.gamma, normal)


class SumsOverSize(OwnNames):
    """The same with sums divided by the size."""

    def forward(self, x: Tensor) -> Tensor:
        x = x - x.sum(-1, keepdim=True) / x.shape[-1]
        variance = (x**2).sum(-1, keepdim=True) / x.shape[-1]
        return x * (variance + 1e-6).sqrt().reciprocal() * self.gamma + self.beta


class LeadingOnes(OwnNames):
    """The same with parameters that have the dimensions of a batch of rows."""

    def __init__(self) -> None:
        super().__init__()
        self.gamma, self.beta = (nn.Parameter(p.detach()[None, None]) for p in self.parameters())

    def forward(self, x: Tensor) -> Tensor:
        variance, mean = torch.var_mean(x, -1, correction=0, keepdim=True)
        return (x - mean) / (variance + 1e-6).sqrt() * self.gamma + self.beta


class Native(OwnNames):
    """A module around the operation that gives the statistics too."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.native_layer_norm(x, (D,), self.gamma, self.beta, 1e-4)[0]


class NativeBlock(FunctionalBlock):
    """The same as part of a block."""

    def branch(self, x: Tensor) -> Tensor:
        return Block.branch(self, torch.native_layer_norm(x, (D,), self.scale, self.shift, 1e-4)[0])


class InlineBlock(Block):
    """Spells its norm out among its other operations."""

    def __init__(self) -> None:
        super().__init__(OwnNames())

    def branch(self, x: Tensor) -> Tensor:
        x = OwnNames.forward(self.norm, x)  # type: ignore[arg-type]
        return self.down(F.gelu(self.up(x)))


class Net(nn.Module):
    """Embedding, blocks, norm, head."""

    def __init__(
        self, *blocks: nn.Module, tied: bool = False, final: nn.Module | None = None
    ) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, D)
        self.blocks = nn.ModuleList(blocks or [Block(), Block()])
        self.norm = nn.LayerNorm(D) if final is None else final
        self.head = nn.Linear(D, VOCABULARY, bias=False)
        if tied:
            self.head.weight = self.embed.weight

    def stream(self, tokens: Tensor) -> Tensor:
        return self.embed(tokens)

    def forward(self, tokens: Tensor) -> Any:
        x = self.stream(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


class ActivationNet(Net):
    """The stream begins behind an activation."""

    def stream(self, tokens: Tensor) -> Tensor:
        return F.relu(self.embed(tokens))


class AsksIds(Net):
    """Asks the ids which way to go."""

    def stream(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        return x[:, 1:] if (tokens[:, 0] == VOCABULARY).all() else x


class RebuiltPositions(Net):
    """Adds positions that are computed in every call, then drops out."""

    def stream(self, tokens: Tensor) -> Tensor:
        place = torch.arange(tokens.shape[1])[:, None] / 10 ** (torch.arange(D) / D)
        return F.dropout(self.embed(tokens) + place.sin().to(self.embed.weight), 0.1, self.training)


class BufferPositions(Net):
    """Adds a table that checkpoints leave out."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("table", torch.rand(32, D), persistent=False)

    def stream(self, tokens: Tensor) -> Tensor:
        return self.embed(tokens) + self.table[: tokens.shape[1]]


class Patches(nn.Module):
    """Patch convolution, class token, positions, mean over the rest: a vision transformer."""

    def __init__(self, *blocks: nn.Module) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, D, 4, stride=4)
        self.token = nn.Parameter(torch.randn(1, 1, D))
        self.positions = nn.Parameter(torch.randn(1, 5, D))
        self.blocks = nn.Sequential(*(blocks or (Block(), ScaledBlock())))
        self.norm = nn.LayerNorm(D)

    def forward(self, image: Tensor) -> Tensor:
        x = self.patch(image).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1) + self.positions
        x = self.blocks(x)
        return self.norm(x[:, 1:].mean(1) + x[:, 0])


class Mixer(nn.Module):
    """A block whose first branch acts on tokens."""

    def __init__(self, tokens: int = 5) -> None:
        super().__init__()
        self.norm, self.mix = nn.LayerNorm(D), nn.Linear(tokens, tokens)
        self.block = Block()

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x + self.mix(self.norm(x).transpose(1, 2)).transpose(1, 2))


def tokens(batch: int = 2, length: int = 5) -> tuple[Tensor]:
    """Token ids."""
    return (torch.randint(VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(1)),)


def image() -> tuple[Tensor]:
    """Two pictures of 8 x 8."""
    return (torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1)),)
