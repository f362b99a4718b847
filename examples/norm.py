"""A drop-in norm, and the residual addition fused into it.

python examples/norm.py
"""

import torch

import effkern
from effkern.nn import functional


class Block(torch.nn.Module):
    """A pre-norm layer that carries the residual stream beside its own output."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        # was: torch.nn.RMSNorm(hidden_size)
        self.norm = effkern.nn.RMSNorm(hidden_size)
        self.linear = torch.nn.Linear(hidden_size, hidden_size)

    def forward(self, x: torch.Tensor, stream: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Add x to the stream and normalise the sum, in one pass over both."""
        normalised, stream = functional.rms_norm(
            x, self.norm.normalized_shape, self.norm.weight, residual=stream
        )
        return self.linear(normalised), stream


torch.manual_seed(0)
blocks = [Block(128) for _ in range(4)]
x, stream = torch.randn(2, 16, 128), torch.zeros(2, 16, 128)
for block in blocks:
    x, stream = block(x, stream)
output = x + stream
output.square().mean().backward()
print(
    f"output {tuple(output.shape)}, first norm's gradient {blocks[0].norm.weight.grad.norm():.4f}"
)
