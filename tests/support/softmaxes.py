"""NormSoftmax under test: its check against float64, and rows that reach each branch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from effkern.backends.reference import norm_softmax as reference
from effkern.nn.functional import norm_softmax
from tests.support.accuracy import assert_as_accurate

#: Deviations of rows on both sides of eps and of tau, for an eps of 0.01 and a tau of 1; the first
#: two come again, for masks may hide those rows.
SCALES = (1e-4, 0.3, 1e-4, 0.3, 0.9, 1.2, 6.0)
ROWS = len(SCALES)
EPS = 0.01


def rows_of_every_branch(
    features: int, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> Tensor:
    """Random rows, one for each of `SCALES`."""
    x = torch.randn(ROWS, features, dtype=torch.float64)
    if features > 1:
        x = (x - x.mean(-1, keepdim=True)) / x.std(-1, correction=0, keepdim=True)
    return (x * torch.tensor(SCALES)[:, None]).to(dtype).to(device)


def naive(x: Tensor, dim: int, tau: Any, eps: float) -> Tensor:
    """What a user of stock PyTorch writes, without a mask."""
    sigma = x.std(dim, correction=0, keepdim=True)
    return torch.softmax(x / sigma.clamp(max=tau).clamp(min=eps), dim)


def masks(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> dict[str, Tensor | None]:
    """Masks of all kinds; in some rows nothing, or one entry, is visible."""
    visible = torch.rand(shape) > 0.3
    visible[0], visible[1] = False, False
    visible[1, ..., -1:] = True
    bias = torch.randn(shape)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    other = torch.float16 if dtype != torch.float16 else torch.bfloat16
    found: dict[str, Tensor | None] = {"none": None, "bool": visible}
    for name, of in (("own", dtype), ("wide", wide), ("other", other)):
        additive = torch.where(visible, bias.to(of), torch.finfo(of).min)
        additive[..., : max(shape[-1] // 4, 1)] = float("-inf")
        found[name] = additive
    found["keys"], found["causal"] = visible[-1:], torch.ones(shape[-2:]).tril().bool()
    found["queries"] = torch.where(visible[..., :1], 0.0, float("-inf"))
    return {name: None if mask is None else mask.to(device) for name, mask in found.items()}


def check(
    x: Tensor,
    dim: int = -1,
    *,
    tau: float | Tensor = 1.0,
    eps: float = EPS,
    mask: Tensor | None = None,
    grad: Tensor | None = None,
    function: Any = norm_softmax,
    plain: Any = None,
) -> None:
    """Compare the value and all gradients with float64, by the rule of agreement.

    ``plain`` is another eager form; of the two y the one that is further off is eager PyTorch's.

    Eager PyTorch is the plain formula in the dtype; its gradients are those of autograd. Without a
    ``grad`` it is such that all rows have gradients of one size, whatever divides them.
    """
    visible, _ = reference.split_mask(mask)
    row = reference.centred(x.double(), visible, dim % max(x.dim(), 1))
    divisor = reference.divisor(row.variance, row.entries, torch.as_tensor(tau).double(), eps)
    grad = torch.randn(x.shape, device=x.device).double() * divisor if grad is None else grad
    bias = mask if mask is not None and mask.is_floating_point() else None

    def run(kind: str) -> list[Tensor | None]:
        wide = kind == "exact"
        a, t = x.detach(), torch.as_tensor(tau).detach().to(x.device)
        a, t = (v.double() if wide else v.to(v.dtype, copy=True) for v in (a, t))
        leaves = [a.requires_grad_(), t.requires_grad_()]
        given = mask
        if bias is not None:
            given = (_widened(bias) if wide else bias).detach().requires_grad_()
            leaves.append(given)
        if kind == "actual":
            y = function(a, dim, tau=t, eps=eps, mask=given)
        else:
            y = reference.norm_softmax(a, given, t, eps, dim % max(x.dim(), 1))
        (y * grad.to(y.dtype)).sum().backward()
        return [y.detach(), *(leaf.grad for leaf in leaves)]

    actual, stock, exact = run("actual"), run("eager"), run("exact")
    if plain is not None:
        both = stock[0], plain(x, dim, tau, eps)
        stock[0] = max(both, key=lambda y: (y.double() - exact[0]).abs().max().item())
    # A few roundings of the terms that cancel; y has none but in float64, where eager is exact.
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    few = 8 * torch.finfo(wide).eps
    slack = [few if wide == torch.float64 else 0.0]
    if x.numel():
        slack.append(few * (grad / divisor).abs().max().item())
        terms = (grad * row.values).abs() / torch.as_tensor(tau) ** 2
        slack.append(few * terms.amax(dim).sum().item() if x.dim() else 0.0)
        slack.append(few * grad.abs().max().item())
    names = "y", "grad_x", "grad_tau", "grad_mask"
    for what, mine, theirs, wanted, atol in zip(names, actual, stock, exact, slack, strict=False):
        assert mine is not None and theirs is not None and wanted is not None
        assert_as_accurate(mine, theirs, wanted, atol=atol, what=what)


def _widened(mask: Tensor) -> Tensor:
    """In float64, hiding what it hides in its own dtype."""
    hidden = mask <= torch.finfo(mask.dtype).min / 2
    return torch.where(hidden, float("-inf"), mask.double())
