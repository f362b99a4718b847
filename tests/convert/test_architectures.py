"""The conversion of other packages' models, built small from their configs."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterable
from typing import Any

import pytest
import torch

import effkern
from benchmarks.architectures import ARCHITECTURES, IDS, OUTPUTS
from effkern.convert import NotConvertible, to_crmsnorm, to_rmsnorm
from effkern.convert.norms import find_norms
from effkern.convert.trace import trace
from tests.convert import nets

#: Those that the default suite tries; the rest is slow.
DEFAULT = (
    "transformers GPT2", "transformers OPT", "transformers CLIP vision, pooled",
    "transformers Whisper", "transformers Cohere", "timm deit3", "timm mixer", "torchvision vit",
)  # fmt: skip

REFUSED = {
    "transformers BERT": "residual stream",
    "transformers BART": "residual stream",
    "transformers T5": "RMSNorm already",
    "transformers Llama": "RMSNorm already",
    "transformers Swin": "cat reads the un-normalised stream",
    "transformers ConvNeXt": "residual stream",
    "transformers ResNet": "no layer norm",
    "transformers CLIP vision": "'last_hidden_state' is the un-normalised stream",
    "transformers BEiT": "'last_hidden_state' is the un-normalised stream",
    "transformers VideoMAE": "'last_hidden_state' is the un-normalised stream",
    "transformers ModernBERT": "residual stream",
    "transformers SAM vision": "conv2d reads the un-normalised stream",
    "transformers PVT": "conv2d reads the un-normalised stream",
    "timm xcit": "reads the un-normalised stream",
    "torchvision swin": "cat reads the un-normalised stream",
    "nn.TransformerEncoder without a last norm": "'output' is the un-normalised stream",
    "transformers OPT Post-LN": "linear reads the un-normalised stream",
    "transformers BLOOM, residual behind the norm": "residual stream",
    "transformers RWKV": "what mul in rwkv.blocks.1.feed_forward gives",
    "transformers CLIP vision with projection": "'last_hidden_state' is the un-normalised stream",
    "transformers PatchTST Pre-LN": "'last_hidden_state' is the un-normalised stream",
    "transformers Swin v2": "residual stream",
    "timm volo": "conv2d reads the un-normalised stream",
    "timm tnt": "layer_norm reads the un-normalised stream",
    "torchvision maxvit": "conv2d reads the un-normalised stream",
    "vit-pytorch CaiT": "linear reads the un-normalised stream",
    "transformers Marian": "linear reads the un-normalised stream",
}
#: Convert to Pre-RMSNorm alone: a norm that stays would see that a feature is missing.
REFUSED_CRMSNORM = ("transformers BLIP vision",)
DEFAULT_REFUSED = (
    "transformers BERT", "transformers Llama", "transformers Swin", "transformers ConvNeXt",
    "transformers CLIP vision", "nn.TransformerEncoder without a last norm",
)  # fmt: skip

#: The same for to_crmsnorm, whose proof is a part of the same search.
DEFAULT_CRMSNORM = ("transformers GPTJ", "transformers Whisper")
DEFAULT_REFUSED_CRMSNORM = ("transformers CLIP vision",)

CONVERTED = [*(name for name in ARCHITECTURES if name not in REFUSED), *OUTPUTS]


def built(name: str) -> tuple[torch.nn.Module, Any]:
    """A model with random affines, or a skip that says which package is missing."""
    try:
        model, inputs = ARCHITECTURES[name]()
    except ImportError:
        pytest.skip(f"{name.split()[0]} is not installed")
    return nets.randomised(model), inputs


def slow_unless(default: bool) -> list[pytest.MarkDecorator]:
    return [] if default else [pytest.mark.slow]


def cases(
    names: Iterable[str], default: Collection[str], default_crmsnorm: Collection[str]
) -> list[Any]:
    """Each architecture with each conversion."""
    pairs = ((to_rmsnorm, default), (to_crmsnorm, default_crmsnorm))
    return [
        pytest.param(
            convert, name, marks=slow_unless(name in fast), id=f"{name}-{convert.__name__}"
        )
        for convert, fast in pairs
        for name in names
        if not (convert is to_crmsnorm and name in REFUSED_CRMSNORM)
    ]


@pytest.mark.parametrize(("convert", "name"), cases(CONVERTED, DEFAULT, DEFAULT_CRMSNORM))
def test_converts(convert: Callable[..., Any], name: str) -> None:
    name, outputs = OUTPUTS.get(name, (name, None))
    model, inputs = built(name)
    result = nets.converted(model, inputs, convert, outputs=outputs)
    if any("another way" in text for text in result.report.not_covered):
        return  # folded norms read no parameters, for which a second trace would refuse it
    again = {group.path for group in find_norms(trace(result.model, inputs))}
    assert again == {left.module for left in result.report.left}


@pytest.mark.parametrize(
    ("convert", "name"), cases(REFUSED, DEFAULT_REFUSED, DEFAULT_REFUSED_CRMSNORM)
)
def test_refused(convert: Callable[..., Any], name: str) -> None:
    model, inputs = built(name)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(NotConvertible, match=REFUSED[name]):
        convert(model, inputs)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_experts_by_a_grouped_matrix_product() -> None:
    moe = pytest.importorskip("transformers.integrations.moe", reason="needs its operator")

    class Experts(nets.Block):
        def __init__(self) -> None:
            super().__init__()
            self.into = torch.nn.Parameter(torch.randn(2, 16, 24))
            self.out = torch.nn.Parameter(torch.randn(2, 24, 16))

        def branch(self, x: torch.Tensor) -> torch.Tensor:
            rows = self.norm(x).flatten(0, 1)
            ends = torch.tensor([len(rows) // 2, len(rows)], dtype=torch.int32)
            hidden = torch.ops.transformers.grouped_mm_fallback(rows, self.into, ends).relu()
            return torch.ops.transformers.grouped_mm_fallback(hidden, self.out, ends).view_as(x)

    assert moe
    result = nets.converted(nets.randomised(nets.Net(Experts(), Experts())), nets.tokens())
    assert not result.report.left
    assert {"blocks.0.out", "blocks.1.out"} <= {edit.parameter for edit in result.report.edits}


@pytest.mark.parametrize("convert", [to_rmsnorm, to_crmsnorm])
def test_generate_gives_the_same_tokens(convert: Callable[..., Any]) -> None:
    """Greedy, float32, with the key-value cache; and the cache from one model serves the other."""
    model, _ = built("transformers GPT2")
    twin = convert(copy.deepcopy(model), {"input_ids": IDS}).model
    settings = {"max_new_tokens": 10, "do_sample": False, "pad_token_id": 0}
    expected = model.generate(IDS, **settings)
    assert torch.equal(twin.generate(IDS, **settings), expected)
    assert torch.equal(twin.generate(IDS, use_cache=False, **settings), expected)
    assert len(expected.unique()) > 8, "a model that repeats itself shows nothing"
    with torch.no_grad():
        cache = model(IDS, use_cache=True).past_key_values
        wanted = model(IDS[:, :3], past_key_values=copy.deepcopy(cache)).logits
        found = twin(IDS[:, :3], past_key_values=cache).logits
    nets.assert_same({"logits": wanted}, {"logits": found}, ["logits"], 1e-5)


def test_save_pretrained_gives_a_folder_that_transformers_itself_loads(tmp_path) -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    model, inputs = built("transformers GPT2")
    twin = to_rmsnorm(copy.deepcopy(model), inputs).model
    twin.save_pretrained(tmp_path)
    loaded = transformers.GPT2LMHeadModel.from_pretrained(tmp_path).eval()
    nets.assert_same(nets.call(model, inputs), nets.call(loaded, inputs), ["logits"], 1e-5)
    with pytest.raises(NotConvertible, match="was not written by"):
        effkern.convert.load(tmp_path)
