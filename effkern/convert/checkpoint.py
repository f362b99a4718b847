"""Checkpoint folders of the transformers package, converted and loaded. Never asks a network.

A converted folder is an ordinary one: its config says under ``effkern`` which modules change. A
reader that does not know that key gets layer norms on the converted weights: after `to_rmsnorm`
those give the same outputs, after `to_crmsnorm` they do not.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from effkern.convert import structure
from effkern.convert.conversion import Conversion
from effkern.convert.report import NotConvertible

__all__ = ["KEY", "example_inputs", "let_save_with_mark", "load", "load_model", "save"]

#: Where a config says what was done.
KEY = "effkern"


def load(folder: str | os.PathLike[str]) -> nn.Module:
    """Load what `effkern convert` wrote, or ``save_pretrained`` after `to_crmsnorm`.

    Args:
        folder: with config.json and safetensors.

    Returns:
        The converted model, in evaluation mode, in the dtype of the checkpoint.

    Raises:
        NotConvertible: if the folder holds no converted checkpoint.
        FileNotFoundError: if it holds none at all.
        ImportError: if transformers is not installed.
    """
    mark = _config(folder).get(KEY)
    if not isinstance(mark, dict) or "steps" not in mark:
        raise NotConvertible("", f"{os.fspath(folder)} was not written by `effkern convert`")
    model = load_model(folder)
    structure.apply(model, mark["steps"])
    let_save_with_mark(model, mark["kind"], mark["steps"])
    return model


def save(conversion: Conversion, folder: str | os.PathLike[str]) -> None:
    """Write a converted transformers model, so that `load` brings it back.

    Args:
        conversion: of a model that has ``save_pretrained``.
        folder: is made where it is missing.
    """
    model: Any = conversion.model
    model.save_pretrained(folder)
    _write_mark(folder, conversion.report.kind, conversion.steps)


def _write_mark(folder: str | os.PathLike[str], kind: str, steps: list[structure.Step]) -> None:
    file = Path(folder) / "config.json"
    config = json.loads(file.read_text())
    config[KEY] = {"kind": kind, "steps": steps}
    file.write_text(json.dumps(config, indent=2) + "\n")


class SaveWithMark:
    """A model's ``save_pretrained`` that also says in the config what was done to the model.

    Args:
        model: whose it is.
        kind: of the conversion.
        steps: the changes to modules.
    """

    def __init__(self, model: nn.Module, kind: str, steps: list[structure.Step]) -> None:
        self.model, self.kind, self.steps = model, kind, steps

    def __call__(
        self, save_directory: str | os.PathLike[str], *arguments: Any, **options: Any
    ) -> Any:
        """Save as the model's class does, then write the mark."""
        original: Any = type(self.model)
        result = original.save_pretrained(self.model, save_directory, *arguments, **options)
        if (Path(save_directory) / "config.json").exists():
            _write_mark(save_directory, self.kind, self.steps)
        return result


def let_save_with_mark(model: nn.Module, kind: str, steps: list[structure.Step]) -> None:
    """Let a converted model's own ``save_pretrained``, if it has one, write what `load` reads."""
    if callable(getattr(type(model), "save_pretrained", None)):
        vars(model)["save_pretrained"] = SaveWithMark(model, kind, steps)


def load_model(folder: str | os.PathLike[str]) -> nn.Module:
    """The transformers model of a checkpoint folder, of the class that its config names.

    Raises:
        FileNotFoundError: if there is no config.json.
        ValueError: if it names no class that transformers has.
        ImportError: if transformers is not installed.
    """
    names = _config(folder).get("architectures") or []
    with _offline():
        import transformers

        kind = next((k for name in names if (k := getattr(transformers, name, None))), None)
        if kind is None:
            raise ValueError(f"{os.fspath(folder)}: transformers has no class named {names}")
        model = kind.from_pretrained(folder, local_files_only=True, dtype="auto")
    return model.eval()


def _config(folder: str | os.PathLike[str]) -> dict[str, Any]:
    return json.loads((Path(folder) / "config.json").read_text())


@contextmanager
def _offline() -> Iterator[None]:
    """Keep transformers and its hub client from the network, at import and after."""
    names = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
    before = {name: os.environ.get(name) for name in names}
    os.environ.update(dict.fromkeys(names, "1"))
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def example_inputs(model: nn.Module, seed: int = 0) -> dict[str, torch.Tensor]:
    """Random inputs of the kinds that a transformers model's forward and config name.

    Raises:
        ValueError: if its main input is of a kind that this does not know.
    """
    config: Any = model.config
    text, vision = _part(config, "text_config"), _part(config, "vision_config")
    generator = torch.Generator().manual_seed(seed)
    main = getattr(model, "main_input_name", "input_ids")
    dtype = next(model.parameters()).dtype

    def floats(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    def ids() -> torch.Tensor:
        return torch.randint(_size(text, "vocab_size"), (2, 8), generator=generator)

    inputs: dict[str, torch.Tensor] = {}
    wanted = {main}
    if vision is not config and text is not config:
        wanted |= {"input_ids", "pixel_values"}
    for name in sorted(wanted):
        if name == "input_ids":
            inputs[name] = ids()
        elif name == "pixel_values":
            size = vision.image_size
            height, width = size if isinstance(size, list | tuple) else (size, size)
            inputs[name] = floats(2, getattr(vision, "num_channels", 3), height, width)
        elif name == "input_features" and hasattr(config, "num_mel_bins"):
            length = 2 * config.max_source_positions
            inputs[name] = floats(2, config.num_mel_bins, length)
        elif name == "input_values" and hasattr(config, "conv_stride"):
            inputs[name] = floats(2, 16_000)
        else:
            raise ValueError(f"give example inputs: {type(model).__name__} wants {name}")
    if getattr(config, "is_encoder_decoder", False):
        inputs["decoder_input_ids"] = ids()
    return inputs


def _part(config: Any, name: str) -> Any:
    """A part of a composite config, or the config itself."""
    return getattr(config, name, None) or config


def _size(config: Any, name: str) -> int:
    size = getattr(config, name, None)
    if not isinstance(size, int):
        raise ValueError(f"give example inputs: the config has no {name}")
    return size
