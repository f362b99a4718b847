"""NormSoftmax attention behind the attention-function registry of transformers.

Nothing here imports transformers: a model of its brings it along.
"""

from __future__ import annotations

import copy
import inspect
import sys
from typing import Any

import torch
from torch import Tensor, nn

from effkern.nn.functional import norm_softmax_attention

#: The name under which transformers finds the function.
NAME = "effkern_norm_softmax"

_REGISTRY = "ALL_ATTENTION_FUNCTIONS"


def norm_softmax_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    position_bias: Tensor | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """What transformers calls for a layer whose configuration names `NAME`.

    Args:
        module: the layer.
        query: shape (B, H, L, E).
        key: shape (B, Hk, S, E).
        value: shape (B, Hk, S, Ev).
        attention_mask: boolean or additive, broadcasting to (B, H, L, S), or None.
        dropout: of the probabilities.
        scaling: of the scores.
        is_causal: whether the layer is causal where there is no mask; None: as the layer says.
        position_bias: added to the normalised scores, as an additive mask is.
        softcap: not taken.
        s_aux: not taken.
        others: are of no concern here.

    Returns:
        The result, shape (B, L, H, Ev), and no probabilities.

    Raises:
        ValueError: for scores that are capped, or a softmax with a sink.
    """
    if softcap is not None or s_aux is not None:
        raise ValueError(f"{NAME}: takes no softcap and no attention sinks")
    if is_causal is None:
        is_causal = getattr(module, "is_causal", True)
    rows, keys = query.shape[2], key.shape[2]
    causal = bool(is_causal) and attention_mask is None and rows > 1
    mask = attention_mask
    if mask is not None:
        mask = mask[..., :keys]
    if position_bias is not None:
        lowest = torch.finfo(position_bias.dtype).min
        if causal:
            mask = torch.ones(rows, keys, dtype=torch.bool, device=query.device).tril()
            causal = False
        if mask is None:
            mask = position_bias
        elif mask.dtype == torch.bool:
            mask = torch.where(mask, position_bias, lowest)
        else:
            mask = position_bias + mask
    y = norm_softmax_attention(
        query,
        key,
        value,
        attn_mask=mask,
        dropout_p=dropout,
        is_causal=causal,
        scale=scaling,
        enable_gqa=query.shape[1] != key.shape[1],
        tau=getattr(module, "norm_softmax_tau", 1.0),
    )
    return y.transpose(1, 2).contiguous(), None


def asks_the_registry(module: nn.Module) -> bool:
    """Whether a layer of transformers looks its attention function up."""
    if not hasattr(module, "config"):
        return False
    forward = inspect.unwrap(type(module).forward)
    return _REGISTRY in getattr(getattr(forward, "__code__", None), "co_names", ())


def why_not(module: nn.Module) -> str:
    """What forbids NormSoftmax in a layer that asks the registry; empty if nothing does."""
    config: Any = module.config
    if getattr(config, "attn_logit_softcapping", None) is not None:
        return "its scores are capped before the softmax"
    if isinstance(getattr(module, "sinks", None), Tensor):
        return "its softmax has a learned sink"
    if not hasattr(config, "_attn_implementation"):
        return "its configuration names no attention function"
    if _mask_registry() is None:
        return "this version of transformers has no registry of masks"
    return ""


def is_swapped(module: nn.Module) -> bool:
    """Whether a layer's configuration names NormSoftmax already."""
    return getattr(getattr(module, "config", None), "_attn_implementation", None) == NAME


def register() -> None:
    """Make `NAME` known to transformers, with the masks that its "sdpa" gets."""
    functions = sys.modules["transformers.modeling_utils"].ALL_ATTENTION_FUNCTIONS
    functions.register(NAME, norm_softmax_attention_forward)
    masks: Any = _mask_registry()
    masks.register(NAME, masks["sdpa"])


def _mask_registry() -> Any:
    module = sys.modules.get("transformers.masking_utils")
    return getattr(module, "ALL_MASK_ATTENTION_FUNCTIONS", None)


class Configurations:
    """Copies of a model's configurations that name NormSoftmax.

    A configuration may be shared with another model, so that it is not changed itself.

    Args:
        layers: those whose attention is exchanged.
    """

    def __init__(self, layers: list[nn.Module]) -> None:
        self._wanted = {id(layer.config) for layer in layers}
        self._copies: dict[int, Any] = {}
        self._originals: list[Any] = []

    def give(self, model: nn.Module) -> list[tuple[nn.Module, Any]]:
        """Exchange the configurations of all modules.

        Returns:
            Modules, and the configuration that each had.
        """
        before = []
        for module in model.modules():
            config = vars(module).get("config")
            if config is None or not hasattr(config, "_attn_implementation"):
                continue
            new = self._copy(config)
            if new is not config:
                before.append((module, config))
                module.config = new
        return before

    def _copy(self, config: Any) -> Any:
        """The configuration itself, if none of its parts is wanted."""
        key = id(config)
        if key not in self._copies:
            parts = {
                name: getattr(config, name, None) for name in getattr(config, "sub_configs", ())
            }
            changed = {
                name: new
                for name, part in parts.items()
                if part is not None and (new := self._copy(part)) is not part
            }
            new = config
            if key in self._wanted or changed:
                new = copy.copy(config)
                for name, part in changed.items():
                    setattr(new, name, part)
                # Not by the property, which would go on to parts that keep their own.
                private = "_attn_implementation_internal"
                name = private if private in vars(new) else "_attn_implementation"
                object.__setattr__(new, name, NAME)
            self._copies[key] = new
            self._originals.append(config)  # so that its id stays its own
        return self._copies[key]
