"""``effkern.swap_softmax``: the attention and the loss of a model get NormSoftmax, in place."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from torch import nn

from effkern.nn import transformers_attention as transformers
from effkern.nn.norm_attention import NormSoftmaxAttention
from effkern.nn.norm_softmax import NormSoftmaxCrossEntropyLoss
from effkern.nn.swap_report import Left, Report, Swapped
from effkern.ops._declare import DTYPES

__all__ = ["SoftmaxReport", "swap_softmax"]


@dataclass
class SoftmaxReport(Report[str]):
    """What `swap_softmax` did: which classes, or attention functions, have another name since."""

    noun = "softmaxes"

    _back: list[Callable[[], None]] = field(default_factory=list, repr=False, compare=False)

    def undo(self) -> None:
        """Give every module back what it had; a second call does nothing."""
        while self._back:
            self._back.pop()()


def swap_softmax(model: nn.Module, attention: bool = True, loss: bool = False) -> SoftmaxReport:
    """Give the attention of ``model`` NormSoftmax in place of softmax, in place: to try it out.

    What a trained model computes is no longer the same; it is meant for training, or for fine
    tuning. A module stays the same object, with the same parameters, hooks and names in the
    state_dict. tau is 1 and eps 1e-6; they are attributes of the modules.

    `torch.nn.MultiheadAttention` becomes `effkern.nn.NormSoftmaxAttention`, also inside
    `torch.nn.TransformerEncoderLayer`, whose fast path (and nested tensors) are switched off.
    Layers of transformers that look up their attention function get that of effkern, by copies of
    their configurations; they return no attention weights then.

    Args:
        model: any module; an attention or a loss itself too.
        attention: whether attention is exchanged.
        loss: whether `torch.nn.CrossEntropyLoss` becomes
            `effkern.nn.NormSoftmaxCrossEntropyLoss`.

    Returns:
        What was swapped, what was not and why; its ``undo()`` takes it back.

    Raises:
        TypeError: if ``model`` is no module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"swap_softmax: model must be a torch.nn.Module, got {type(model).__name__}"
        )
    report = SoftmaxReport()
    layers: list[nn.Module] = []
    for path, module in model.named_modules():
        if attention and isinstance(module, nn.MultiheadAttention):
            _swap_class(report, path, module, nn.MultiheadAttention, NormSoftmaxAttention)
        elif loss and isinstance(module, nn.CrossEntropyLoss):
            _swap_class(report, path, module, nn.CrossEntropyLoss, NormSoftmaxCrossEntropyLoss)
        elif attention and transformers.asks_the_registry(module):
            _take_layer(report, path, module, layers)
    if layers:
        _swap_layers(report, model, layers)
    if attention:
        _without_nested_tensors(report, model)
        _mention_others(report, model)
    return report


#: Attributes that a module does not have from its class before, or has otherwise.
_GIVEN: dict[type[nn.Module], dict[str, object]] = {
    NormSoftmaxAttention: {"tau": 1.0, "eps": 1e-6, "_qkv_same_embed_dim": False},
    NormSoftmaxCrossEntropyLoss: {"tau": 1.0, "eps": 1e-6, "inplace": False},
}


def _swap_class(
    report: SoftmaxReport,
    path: str,
    module: nn.Module,
    stock: type[nn.Module],
    twin: type[nn.Module],
) -> None:
    kind = type(module)
    if kind is twin:
        return
    if reason := _why_not(module, stock):
        report.left.append(Left(path, kind, reason))
        return
    before = dict(vars(module))
    module.__class__ = twin
    for name, value in _GIVEN[twin].items():
        object.__setattr__(module, name, value)

    def back() -> None:
        module.__class__ = kind
        for name in _GIVEN[twin]:
            if name in before:
                object.__setattr__(module, name, before[name])
            else:
                vars(module).pop(name, None)
                module._parameters.pop(name, None)
                module._buffers.pop(name, None)

    report._back.append(back)
    report.swapped.append(Swapped(path, module, kind.__name__, twin.__name__))


def _why_not(module: nn.Module, stock: type[nn.Module]) -> str:
    """What forbids that a module changes its class; empty if nothing does."""
    if type(module) is not stock:
        return f"it is a subclass of {stock.__name__}"
    if "forward" in vars(module):
        return "its forward was replaced on the instance"
    if getattr(module, "_compiled_call_impl", None) is not None:
        return "it was compiled in place"
    if any(parameter.dtype not in DTYPES for parameter in module.parameters()):
        return "its parameters are of a dtype that the kernels do not take"
    if stock is nn.MultiheadAttention and (module.bias_k is not None or module.add_zero_attn):
        return "it adds a key of its own (add_bias_kv or add_zero_attn)"
    return ""


def _take_layer(
    report: SoftmaxReport, path: str, module: nn.Module, layers: list[nn.Module]
) -> None:
    if transformers.is_swapped(module):
        return
    if reason := transformers.why_not(module):
        report.left.append(Left(path, type(module), reason))
        return
    layers.append(module)
    was = str(module.config._attn_implementation)  # type: ignore[union-attr]
    report.swapped.append(Swapped(path, module, was, transformers.NAME))


def _swap_layers(report: SoftmaxReport, model: nn.Module, layers: list[nn.Module]) -> None:
    transformers.register()
    before = transformers.Configurations(layers).give(model)

    def back() -> None:
        for module, config in before:
            module.config = config

    report._back.append(back)


def _without_nested_tensors(report: SoftmaxReport, model: nn.Module) -> None:
    """PyTorch's encoder makes nested tensors of padded batches for its layers' fast path."""
    for encoder in model.modules():
        if not isinstance(encoder, nn.TransformerEncoder) or not encoder.use_nested_tensor:
            continue
        if any(isinstance(module, NormSoftmaxAttention) for module in encoder.modules()):
            encoder.use_nested_tensor = False

            def back(encoder: nn.TransformerEncoder = encoder) -> None:
                encoder.use_nested_tensor = True

            report._back.append(back)


def _mention_others(report: SoftmaxReport, model: nn.Module) -> None:
    """Modules that are called attention, and have none within that is known."""
    known = {id(entry.module) for entry in report.swapped}
    left = {entry.path for entry in report.left}
    for path, module in model.named_modules():
        is_called_so = "attention" in type(module).__name__.lower()
        if not is_called_so or path in left or isinstance(module, nn.MultiheadAttention):
            continue
        if transformers.is_swapped(module):
            continue
        below = list(module.modules())
        if any(id(m) in known or isinstance(m, nn.MultiheadAttention) for m in below):
            continue
        if any("attention" in type(m).__name__.lower() for m in below[1:]):
            continue
        reason = "it is neither PyTorch's nor does it look its function up with transformers"
        if any(path.startswith(f"{swapped.path}.") for swapped in report.swapped):
            continue
        report.left.append(Left(path, type(module), reason))
