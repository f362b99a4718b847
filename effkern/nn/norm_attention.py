"""NormSoftmax attention as a layer."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from effkern.backends.reference.norm_attention import attention, is_seen, restricted
from effkern.ops._modes import without_autocast
from effkern.ops.norm_attention import attend
from effkern.ops.norm_attention_checks import check, check_mask
from effkern.ops.norm_checks import check_kind
from effkern.ops.norm_softmax_checks import check_eps, check_tau, tau_of

__all__ = ["NormSoftmaxAttention"]


class NormSoftmaxAttention(nn.MultiheadAttention):
    """Stands in for `torch.nn.MultiheadAttention`, with NormSoftmax in place of softmax: the same
    arguments, parameters and state_dict.

    A ``tau`` that is learned has a key of its own in the state_dict. Without the weights
    (``need_weights=False``) no scores are held where `effkern.nn.functional.norm_softmax_attention`
    needs none; with them, as by default, all are.

    Args:
        embed_dim: features of the queries and of the result.
        num_heads: divides ``embed_dim``.
        dropout: of the probabilities, in training.
        bias: whether the projections have biases.
        add_bias_kv: as in `torch.nn.MultiheadAttention`; only False.
        add_zero_attn: as there; only False.
        kdim: features of the keys; None: ``embed_dim``.
        vdim: features of the values; None: ``embed_dim``.
        batch_first: whether tensors are (batch, length, features), not (length, batch, features).
        device, dtype: of the parameters.
        tau: the temperature, above 0: a number; or a tensor of one element, learned where it is a
            `torch.nn.Parameter`, else a buffer.
        eps: the least divisor, at least 0.

    Raises:
        NotImplementedError: for ``add_bias_kv`` and ``add_zero_attn``.
    """

    tau: float | Tensor
    eps: float

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        bias: bool = True,
        add_bias_kv: bool = False,
        add_zero_attn: bool = False,
        kdim: int | None = None,
        vdim: int | None = None,
        batch_first: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        tau: float | Tensor = 1.0,
        eps: float = 1e-6,
    ) -> None:
        if add_bias_kv or add_zero_attn:
            raise NotImplementedError(
                "NormSoftmaxAttention: add_bias_kv and add_zero_attn must be False"
            )
        super().__init__(
            embed_dim,
            num_heads,
            dropout=dropout,
            bias=bias,
            kdim=kdim,
            vdim=vdim,
            batch_first=batch_first,
            device=device,
            dtype=dtype,
        )
        give_temperature(self, tau, eps)
        # With it PyTorch's encoder layers would compute attention of their own from the parameters.
        self._qkv_same_embed_dim = False

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """As `torch.nn.MultiheadAttention.forward`.

        Args:
            query: shape (L, N, E), (N, L, E) with ``batch_first``, or (L, E).
            key: shape (S, N, kdim), and so on.
            value: shape (S, N, vdim), and so on.
            key_padding_mask: shape (N, S) or (S,). Boolean: True hides a key, as PyTorch's class
                has it; additive: as ``attn_mask``.
            need_weights: whether the probabilities are returned too; all scores are held then.
            attn_mask: shape (L, S) or (N num_heads, L, S). Boolean: True hides. Additive: entries
                at or below half the dtype's lowest finite value hide; others are added after the
                scores were normalised, and sigma is that of the scores without them.
            average_attn_weights: whether the returned probabilities are the heads' mean.
            is_causal: says that ``attn_mask`` is causal, which must be given too; with
                ``need_weights=False`` its values are then not looked at.

        Returns:
            The result, like query; and the probabilities, after dropout, shape (N, L, S), or
            (N, num_heads, L, S) if not averaged; None without ``need_weights``.
        """
        if is_causal and attn_mask is None:
            raise RuntimeError("Need attn_mask if specifying the is_causal hint.")
        self._check_inputs(query, key, value)
        batched = query.dim() == 3
        projected = self._projected(query, key, value)
        if not batched:
            projected = tuple(t[None] for t in projected)
        elif not self.batch_first:
            projected = tuple(t.transpose(0, 1) for t in projected)
        q, k, v = (
            t.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2) for t in projected
        )
        causal = is_causal and not need_weights
        masks = self._read_masks(None if causal else attn_mask, key_padding_mask, q, k)
        dropout_p = self.dropout if self.training else 0.0
        check(q, k, v, None, dropout_p, False, False, self.tau, self.eps)
        weights = None
        if need_weights:
            y, weights = self._with_weights(q, k, v, *masks, dropout_p)
            weights = weights.mean(1) if average_attn_weights else weights
            weights = weights if batched else weights[0]
        else:
            y = attend(
                q,
                k,
                v,
                attn_mask=masks[0],
                key_mask=masks[1],
                dropout_p=dropout_p,
                is_causal=causal,
                scale=None,
                enable_gqa=False,
                tau=self.tau,
                eps=self.eps,
            )
        y = F.linear(y.transpose(1, 2).flatten(-2), self.out_proj.weight, self.out_proj.bias)
        if not batched:
            return y[0], weights
        return y if self.batch_first else y.transpose(0, 1), weights

    def _check_inputs(self, query: Any, key: Any, value: Any) -> None:
        given = {"query": query, "key": key, "value": value}
        for name, tensor in given.items():
            check_kind("NormSoftmaxAttention", name, tensor)
        shapes = f"{tuple(query.shape)}, {tuple(key.shape)} and {tuple(value.shape)}"
        if query.dim() not in (2, 3) or not query.dim() == key.dim() == value.dim():
            raise RuntimeError(
                "NormSoftmaxAttention: query, key and value must all have 3 dimensions, or 2 "
                f"without a batch, got shapes {shapes}"
            )
        features = (self.embed_dim, self.kdim, self.vdim)
        for (name, tensor), wanted in zip(given.items(), features, strict=True):
            if tensor.shape[-1] != wanted:
                raise RuntimeError(
                    f"NormSoftmaxAttention: {name} must have {wanted} features, got shape "
                    f"{tuple(tensor.shape)}"
                )
        of_batch = 0 if self.batch_first else 1
        # Not broadcast, as it is not in PyTorch's class.
        if query.dim() == 3 and not (
            query.shape[of_batch] == key.shape[of_batch] == value.shape[of_batch]
        ):
            raise RuntimeError(
                "NormSoftmaxAttention: query, key and value must have the same batch size, got "
                f"shapes {shapes}"
            )

    def _projected(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
        if self.in_proj_weight is not None:
            if query is key is value:
                whole = F.linear(query, self.in_proj_weight, self.in_proj_bias)
                return tuple(whole.chunk(3, -1))
            weights = self.in_proj_weight.chunk(3)
        else:
            weights = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
        biases = (None,) * 3 if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
        given = zip((query, key, value), weights, biases, strict=True)
        return tuple(F.linear(*each) for each in given)

    def _read_masks(
        self, attn_mask: Tensor | None, key_padding_mask: Tensor | None, q: Tensor, k: Tensor
    ) -> tuple[Tensor | None, Tensor | None]:
        """The mask of all scores in four dimensions, and which keys may be seen, shape (N, S): in
        the functions' sense, where True takes part.
        """
        batch, heads, rows, keys = *q.shape[:-1], k.shape[-2]
        general, seen = None, None
        if attn_mask is not None:
            general = _taking_part(attn_mask, "attn_mask", q)
            if attn_mask.shape not in ((rows, keys), (batch * heads, rows, keys)):
                raise RuntimeError(
                    f"NormSoftmaxAttention: attn_mask must have shape {(rows, keys)} or "
                    f"{(batch * heads, rows, keys)}, got {tuple(attn_mask.shape)}"
                )
            if general.dim() == 2:
                general = general[None, None]
            else:
                general = general.unflatten(0, (batch, heads))
        if key_padding_mask is not None:
            padding = _taking_part(key_padding_mask, "key_padding_mask", q)
            if padding.dim() == 1:
                padding = padding[None]
            if padding.shape != (batch, keys):
                raise RuntimeError(
                    f"NormSoftmaxAttention: key_padding_mask must have shape {(batch, keys)}, got "
                    f"{tuple(key_padding_mask.shape)}"
                )
            if padding.dtype == torch.bool:
                seen = padding
            elif general is None or general.dtype == torch.bool:
                bias = padding[:, None, None, :]
                general = bias if general is None else torch.where(general, bias, float("-inf"))
            else:
                seen = is_seen(padding)
                general = general + torch.where(seen, padding, 0)[:, None, None, :]
        return general, seen

    def _with_weights(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None,
        seen: Tensor | None,
        dropout_p: float,
    ) -> tuple[Tensor, Tensor]:
        if seen is not None:
            mask = restricted(mask, seen[:, None, None, :])
        scale = self.head_dim**-0.5
        tau = tau_of(self.tau, q)
        with without_autocast(q.device.type):
            return attention(q, k, v, mask, False, scale, tau, self.eps, dropout_p)

    def extra_repr(self) -> str:
        """The arguments."""
        tau = "learnable" if isinstance(self.tau, nn.Parameter) else float(self.tau)
        return (
            f"{self.embed_dim}, {self.num_heads}, batch_first={self.batch_first}, tau={tau}, "
            f"eps={self.eps}"
        )


def give_temperature(module: Any, tau: float | Tensor, eps: float) -> None:
    """Set ``tau`` and ``eps``: a parameter stays one, another tensor becomes a buffer.

    Raises:
        TypeError: if one of them is no number (and tau no tensor).
        ValueError: if one of them is out of range.
        RuntimeError: if tau is a tensor of more than one element.
    """
    check_tau(type(module).__name__, tau)
    check_eps(type(module).__name__, eps)
    if isinstance(tau, Tensor) and not isinstance(tau, nn.Parameter):
        module.register_buffer("tau", tau)
    else:
        module.tau = tau
    module.eps = eps


def _taking_part(mask: Tensor, name: str, q: Tensor) -> Tensor:
    """In a boolean mask of PyTorch's class True hides."""
    check_mask(name, mask, q)
    return ~mask if mask.dtype == torch.bool else mask
