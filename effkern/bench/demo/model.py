"""A small pre-norm GPT over bytes, written with nothing but torch.nn."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True)
class ModelShape:
    """Sizes of the model; the default has 10.7 million parameters."""

    layers: int = 6
    hidden_size: int = 384
    num_heads: int = 6
    context: int = 128
    vocabulary: int = 256


class Attention(nn.Module):
    """Causal self-attention of torch's fused kernel, without biases."""

    def __init__(self, shape: ModelShape) -> None:
        super().__init__()
        self.num_heads = shape.num_heads
        self.qkv = nn.Linear(shape.hidden_size, 3 * shape.hidden_size, bias=False)
        self.out = nn.Linear(shape.hidden_size, shape.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, length, hidden_size) -> the same shape."""
        batch, length, hidden = x.shape
        heads = self.qkv(x).view(batch, length, 3, self.num_heads, hidden // self.num_heads)
        query, key, value = heads.permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        return self.out(mixed.transpose(1, 2).reshape(batch, length, hidden))


class Block(nn.Module):
    """``x + attention(norm(x))``, then ``x + mlp(norm(x))``."""

    def __init__(self, shape: ModelShape) -> None:
        super().__init__()
        hidden = shape.hidden_size
        self.attention_norm = nn.RMSNorm(hidden)
        self.attention = Attention(shape)
        self.mlp_norm = nn.RMSNorm(hidden)
        self.widen = nn.Linear(hidden, 4 * hidden, bias=False)
        self.narrow = nn.Linear(4 * hidden, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, length, hidden_size) -> the same shape."""
        x = x + self.attention(self.attention_norm(x))
        return x + self.narrow(F.gelu(self.widen(self.mlp_norm(x))))


class ByteGPT(nn.Module):
    """Predicts the next byte. The head shares its weight with the embedding."""

    def __init__(self, shape: ModelShape) -> None:
        super().__init__()
        self.shape = shape
        self.bytes = nn.Embedding(shape.vocabulary, shape.hidden_size)
        self.positions = nn.Embedding(shape.context, shape.hidden_size)
        self.blocks = nn.ModuleList(Block(shape) for _ in range(shape.layers))
        self.norm = nn.RMSNorm(shape.hidden_size)
        self.apply(self._initialise)

    def _initialise(self, module: nn.Module) -> None:
        """As GPT-2: deviation 0.02, smaller where a layer writes to the residual stream."""
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=0.02)
        elif isinstance(module, Block):
            for writer in (module.attention.out, module.narrow):
                nn.init.normal_(writer.weight, std=0.02 / math.sqrt(2 * self.shape.layers))

    def forward(self, tokens: Tensor) -> Tensor:
        """(batch, length) int64 bytes -> (batch, length, vocabulary) logits."""
        x = self.bytes(tokens) + self.positions.weight[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
        return F.linear(self.norm(x), self.bytes.weight)

    def loss(self, tokens: Tensor) -> Tensor:
        """(batch, length + 1) int64 bytes -> mean cross-entropy of each next byte, in nats."""
        logits = self(tokens[:, :-1])
        return F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
