"""effkern.swap_softmax: what it exchanges, what it leaves alone and why, and what it gives back."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import effkern
from effkern.nn import NormSoftmaxAttention, NormSoftmaxCrossEntropyLoss
from effkern.nn.swap_softmax import SoftmaxReport


class Model(nn.Module):
    """PyTorch's own transformer, and a loss."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2)
        self.decoder = nn.TransformerDecoderLayer(32, 4, 64, dropout=0.0, batch_first=True)
        self.loss = nn.CrossEntropyLoss(label_smoothing=0.1, ignore_index=3)

    def forward(self, x: Tensor, padding: Tensor) -> Tensor:
        x = self.decoder(x, self.encoder(x, src_key_padding_mask=padding))
        return self.loss(x.flatten(0, 1), torch.arange(x.shape[0] * x.shape[1]) % 32)


def example() -> tuple[Tensor, Tensor]:
    padding = torch.zeros(3, 10, dtype=torch.bool)
    padding[1, 4:] = True
    return torch.randn(3, 10, 32), padding


def test_a_model_keeps_all_but_the_softmax() -> None:
    model = Model()
    names, parameters = list(model.state_dict()), list(model.parameters())
    attentions = [m for m in model.modules() if isinstance(m, nn.MultiheadAttention)]
    before = model(*example())
    report = effkern.swap_softmax(model)
    assert [entry.path for entry in report.swapped] == [
        "encoder.layers.0.self_attn",
        "encoder.layers.1.self_attn",
        "decoder.self_attn",
        "decoder.multihead_attn",
    ]
    assert report.left == []
    assert all(type(m) is NormSoftmaxAttention for m in attentions)
    assert list(model.state_dict()) == names
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert type(model.loss) is nn.CrossEntropyLoss
    assert not torch.equal(model(*example()), before)
    text = str(report)
    assert "4 softmaxes swapped, 0 left" in text
    assert "decoder.self_attn: MultiheadAttention -> NormSoftmaxAttention" in text


def test_the_fast_path_does_not_bypass_it() -> None:
    """PyTorch's encoder layers compute attention of their own in eval, and nested tensors."""
    model = Model()
    x, padding = example()
    stock = copy.deepcopy(model).eval()
    effkern.swap_softmax(model)
    trained = model.encoder.train()(x, src_key_padding_mask=padding)
    with torch.no_grad():
        evaluated = model.encoder.eval()(x, src_key_padding_mask=padding)
        plain = stock.encoder(x, src_key_padding_mask=padding)
    torch.testing.assert_close(evaluated, trained, rtol=1e-4, atol=1e-5)
    assert (evaluated - plain)[~padding].abs().max() > 1e-2


def test_what_is_swapped_is_what_a_user_would_write() -> None:
    model = Model()
    x, _ = example()
    attention = model.encoder.layers[0].self_attn
    written = NormSoftmaxAttention(32, 4, batch_first=True)
    written.load_state_dict(attention.state_dict())
    effkern.swap_softmax(model)
    for mine, theirs in zip(attention(x, x, x), written(x, x, x), strict=True):
        assert torch.equal(mine, theirs)


def test_losses() -> None:
    model = Model()
    report = effkern.swap_softmax(model, attention=False, loss=True)
    assert [entry.path for entry in report.swapped] == ["loss"]
    logits, target = torch.randn(6, 5), torch.arange(6) % 5
    stock = NormSoftmaxCrossEntropyLoss(label_smoothing=0.1, ignore_index=3)
    assert torch.equal(model.loss(logits, target), stock(logits, target))
    weighted = nn.CrossEntropyLoss(weight=torch.rand(5))
    effkern.swap_softmax(weighted, loss=True)
    assert weighted(logits, target).isfinite()


def test_undo() -> None:
    model = Model()
    before = [(type(m), dict(vars(m))) for m in model.modules()]
    given = example()
    stock = model(*given)
    report = effkern.swap_softmax(model, loss=True)
    again = effkern.swap_softmax(model, loss=True)
    assert (again.swapped, again.left) == ([], [])
    for _ in range(2):
        report.undo()
        for module, (kind, attributes) in zip(model.modules(), before, strict=True):
            assert type(module) is kind
            assert set(vars(module)) == set(attributes)
        assert torch.equal(model(*given), stock)
    assert len(effkern.swap_softmax(model, loss=True).swapped) == 5


def test_copies_and_pickles() -> None:
    model = Model()
    effkern.swap_softmax(model, loss=True)
    given = example()
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(*given), model(*given))


class OwnAttention(nn.Module):
    """With a softmax that nobody can exchange."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.softmax(x @ x.transpose(-2, -1), -1) @ x


class Subclass(nn.MultiheadAttention):
    """May do anything."""


def replaced() -> nn.Module:
    module = nn.MultiheadAttention(8, 2)
    module.forward = lambda *a: a  # type: ignore[method-assign]
    return module


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: nn.MultiheadAttention(8, 2, add_bias_kv=True), "a key of its own"),
        (lambda: nn.MultiheadAttention(8, 2, add_zero_attn=True), "a key of its own"),
        (lambda: Subclass(8, 2), "subclass"),
        (replaced, "its forward was replaced"),
        (OwnAttention, "neither PyTorch's nor"),
    ],
)
def test_what_is_left_alone(make: Any, reason: str) -> None:
    model = nn.Sequential(make())
    kind = type(model[0])
    report = effkern.swap_softmax(model)
    assert report.swapped == []
    assert [entry.path for entry in report.left] == ["0"]
    assert reason in report.left[0].reason
    assert type(model[0]) is kind
    assert "left    0:" in str(report)


def test_a_loss_of_another_class_is_left() -> None:
    loss = type("Loss", (nn.CrossEntropyLoss,), {})()
    report = effkern.swap_softmax(nn.Sequential(loss), loss=True)
    assert "subclass" in report.left[0].reason


def test_other_modules_are_not_mentioned() -> None:
    assert effkern.swap_softmax(nn.Sequential(nn.Linear(4, 4), nn.Softmax(-1))) == SoftmaxReport()
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got int"):
        effkern.swap_softmax(3)  # type: ignore[arg-type]


# ---- transformers, where it is installed ----


def transformers() -> Any:
    return pytest.importorskip("transformers", reason="transformers is not installed")


def small(name: str) -> nn.Module:
    package = transformers()
    common: dict[str, Any] = {"vocab_size": 64, "eos_token_id": None, "bos_token_id": None}
    sizes = {"num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    if name == "GPT2LMHeadModel":
        config = package.GPT2Config(n_embd=32, n_layer=2, n_head=4, **common)
    elif name == "LlamaForCausalLM":
        config = package.LlamaConfig(hidden_size=32, num_key_value_heads=2, **sizes, **common)
    elif name == "BertModel":
        config = package.BertConfig(vocab_size=64, hidden_size=32, **sizes)
    else:
        config = package.Gemma2Config(hidden_size=32, num_key_value_heads=2, **sizes, **common)
    return getattr(package, name)(config).eval()


@pytest.mark.parametrize("name", ["LlamaForCausalLM", "GPT2LMHeadModel", "BertModel"])
def test_models_of_transformers(name: str) -> None:
    model = small(name)
    other = type(model)(model.config).eval()
    ids = torch.randint(3, 64, (2, 9))
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[1, 6:] = 0
    with torch.no_grad():
        stock, others = (m(input_ids=ids, attention_mask=mask)[0] for m in (model, other))
        report = effkern.swap_softmax(model)
        assert len(report.swapped) == 2 and report.left == []
        mine = model(input_ids=ids, attention_mask=mask)[0]
        assert (mine - stock)[0].abs().max() > 1e-3
        assert torch.equal(other(input_ids=ids, attention_mask=mask)[0], others)
        alone = model(input_ids=ids[1:, :6])[0]  # what is padded changes nothing
        torch.testing.assert_close(mine[1:, :6], alone, rtol=1e-4, atol=1e-4)
        assert effkern.swap_softmax(model).swapped == []
        report.undo()
        assert torch.equal(model(input_ids=ids, attention_mask=mask)[0], stock)


def test_generation_with_a_cache() -> None:
    model = small("LlamaForCausalLM")
    effkern.swap_softmax(model)
    ids = torch.randint(3, 64, (1, 5))
    written = model.generate(ids, max_new_tokens=4, do_sample=False)
    with torch.no_grad():
        for length in range(5, written.shape[1]):
            assert model(written[:, :length])[0][0, -1].argmax() == written[0, length]


def test_capped_scores_are_left_alone() -> None:
    report = effkern.swap_softmax(small("Gemma2ForCausalLM"))
    assert report.swapped == []
    assert all("capped" in entry.reason for entry in report.left)
