"""The form of a converted model to train in: the original parameters, centred on the fly.

The gradient of a centred weight reaches the original through the centring, so that it is that of
the Pre-LN original (Jiang et al., NeurIPS 2023, section 3.5).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from effkern.convert.axes import Axis
from effkern.convert.report import NotConvertible
from effkern.convert.runtime import BiasedRMSNorm, RunWithRmsNorm
from effkern.convert.trace import left_as_found
from effkern.convert.weights import centred, mean_along, scaled, split

__all__ = ["ATTRIBUTE", "EditRecord", "Record", "ScaleRecord", "inference_form", "training_form",
    "uses_dropout"]  # fmt: skip

#: The attribute of a converted model that remembers the conversion.
ATTRIBUTE = "_effkern_conversion"


@dataclass
class EditRecord:
    """An edited parameter: how it was centred, and what brings the original back."""

    names: list[str]  # every name of the parameter
    readers: list[str]  # modules in whose calls it is read
    axis: Axis
    features: int
    removed: Tensor  # the mean that was subtracted: float64, the feature axis of size one
    scale: str | None = None  # name of the LayerScale that was multiplied in


@dataclass
class ScaleRecord:
    """A LayerScale that was multiplied into a weight and is one since."""

    names: list[str]
    readers: list[str]
    value: Tensor  # the original


@dataclass
class Record:
    """What a converted model has to remember."""

    edits: list[EditRecord] = field(default_factory=list)
    scales: list[ScaleRecord] = field(default_factory=list)
    dropout: bool = True  # whether dropout is active in training mode
    training_form: bool = False


def training_form(model: nn.Module) -> nn.Module:
    """Give a converted model its original parameters back, to be centred at each forward pass.

    Gradients, and so training, are those of the Pre-LN original. Parameters keep their names and
    stay the same objects. Where dropout is active in training mode, it would make centred rows
    uncentred again: there the model runs as the original does, with layer norms, until `eval()`.

    Args:
        model: what `to_rmsnorm` converted; nothing happens if it is in this form already.

    Returns:
        The model. `inference_form` folds the centring into the weights again.

    Raises:
        NotConvertible: if the model was not converted.
    """
    record = _record(model)
    if record.training_form:
        return model
    tensors = named_tensors_of(model)
    scales = {name: scale.value for scale in record.scales for name in scale.names}
    with torch.no_grad():
        for edit in record.edits:
            value = tensors[edit.names[0]]
            value.copy_(_restored(value, edit, scales[edit.scale] if edit.scale else None))
        for scale in record.scales:
            tensors[scale.names[0]].copy_(scale.value)
    readers: dict[str, _Shadow] = {}
    entries: list[EditRecord | ScaleRecord] = [*record.edits, *record.scales]
    for entry in entries:
        for path in entry.readers:
            readers.setdefault(path, _Shadow(model, record.dropout)).entries.append(entry)
    for path, shadow in readers.items():
        module = model.get_submodule(path)
        module.register_forward_pre_hook(shadow.enter)
        module.register_forward_hook(shadow.leave, always_call=True)
    _as_layer_norms_in_training(model, record.dropout)
    record.training_form = True
    return model


def inference_form(model: nn.Module) -> nn.Module:
    """Fold the centring of a model in `training_form` into its weights; the opposite direction.

    Raises:
        NotConvertible: if the model was not converted.
    """
    record = _record(model)
    if not record.training_form:
        return model
    for module in model.modules():
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            for number, hook in list(hooks.items()):
                if isinstance(getattr(hook, "__self__", None), _Shadow):
                    del hooks[number]
                    module._forward_hooks_always_called.pop(number, None)
    _as_layer_norms_in_training(model, False)
    tensors = named_tensors_of(model)
    with torch.no_grad():
        for edit in record.edits:
            value = tensors[edit.names[0]]
            scale = tensors[edit.scale].double() if edit.scale else None
            product = scaled(value.double(), edit.axis, edit.features, scale)
            edit.removed = mean_along(product, edit.axis, edit.features)
            value.copy_(centred(product, edit.axis, edit.features))
        for scale_record in record.scales:
            scale_record.value = tensors[scale_record.names[0]].detach().clone()
            tensors[scale_record.names[0]].fill_(1)
    record.training_form = False
    return model


def uses_dropout(model: nn.Module, inputs: tuple[Any, ...] | dict[str, Any]) -> bool:
    """Whether a forward pass in training mode drops anything; true where that cannot be told.

    Leaves the model as it was.
    """
    seen = _DropoutSeen()
    with left_as_found(model), torch.no_grad():
        model.train()
        try:
            with seen:
                _ = model(**inputs) if isinstance(inputs, dict) else model(*inputs)
        except Exception:  # whatever the model needs to train
            return True
    return seen.found


class _DropoutSeen(TorchDispatchMode):
    """Notices random numbers: dropout of every kind draws them.

    What attention drops of its probabilities does not matter: its result is not written to the
    stream as it is.
    """

    def __init__(self) -> None:
        super().__init__()
        self.found = False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        attention = "scaled_dot_product" in func.name()
        random = torch.Tag.nondeterministic_seeded in func.tags and not attention
        self.found = self.found or random
        return func(*args, **(kwargs or {}))


def named_tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by every name they have."""
    tensors: dict[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))
    return tensors | dict(model.named_buffers(remove_duplicate=False))


def _record(model: nn.Module) -> Record:
    record = vars(model).get(ATTRIBUTE)
    if not isinstance(record, Record):
        raise NotConvertible("", "it was not converted by effkern.convert.to_rmsnorm")
    return record


def _restored(value: Tensor, edit: EditRecord, scale: Tensor | None) -> Tensor:
    """An edited parameter as it was, in its dtype."""
    parts = split(value.double(), edit.axis, edit.features) + edit.removed.to(value.device)
    product = parts.reshape(value.shape)
    inverse = None if scale is None else scale.double().reciprocal()
    return scaled(product, edit.axis, edit.features, inverse).to(value.dtype)


class _Shadow:
    """Hooks of a module: while its call runs, edited parameters read as centred."""

    def __init__(self, model: nn.Module, dropout: bool) -> None:
        self.model, self.dropout = model, dropout
        self.entries: list[EditRecord | ScaleRecord] = []
        self.depth = 0
        self.hidden: list[tuple[nn.Module, str]] = []  # what this one hides, and no call around it

    def enter(self, module: nn.Module, args: Any) -> None:
        """Let attributes hide the parameters of their names."""
        self.depth += 1
        if self.depth > 1 or (module.training and self.dropout):
            return
        for entry in self.entries:
            places = [(owner, n) for owner, n in self._owners(entry) if n not in vars(owner)]
            if not places:
                continue
            parameter = self._parameter(entry.names[0])
            if isinstance(entry, ScaleRecord):
                value = torch.ones_like(parameter)
            else:
                scale = self._parameter(entry.scale) if entry.scale else None
                value = centred(scaled(parameter, entry.axis, entry.features, scale),
                                entry.axis, entry.features)  # fmt: skip
            for owner, name in places:
                vars(owner)[name] = value
            self.hidden += places

    def leave(self, module: nn.Module, args: Any, output: Any) -> None:
        """Let the parameters be seen again."""
        self.depth -= 1
        if self.depth == 0:
            for owner, name in self.hidden:
                vars(owner).pop(name, None)
            self.hidden = []

    def _owners(self, entry: EditRecord | ScaleRecord) -> list[tuple[nn.Module, str]]:
        places = []
        for full in entry.names:
            path, _, name = full.rpartition(".")
            places.append((self.model.get_submodule(path), name))
        return places

    def _parameter(self, full: str) -> Tensor:
        """A parameter itself, whatever hides it."""
        path, _, name = full.rpartition(".")
        owner = self.model.get_submodule(path)
        value = owner._parameters.get(name)
        found = owner._buffers.get(name) if value is None else value
        assert found is not None
        return found


def _as_layer_norms_in_training(model: nn.Module, wanted: bool) -> None:
    for module in model.modules():
        forward = vars(module).get("forward")
        for changed in (module, forward):
            if isinstance(changed, BiasedRMSNorm | RunWithRmsNorm):
                changed.layer_norm_in_training = wanted
