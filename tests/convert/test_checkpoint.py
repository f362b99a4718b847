"""`effkern convert` and effkern.convert.load on checkpoint folders of transformers."""

from __future__ import annotations

import copy
import json
import socket
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import effkern
from benchmarks.architectures import ARCHITECTURES, IDS
from effkern import cli
from effkern.convert import checkpoint, to_crmsnorm
from tests.convert import nets

transformers = pytest.importorskip("transformers", reason="transformers is not installed")


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def written(name: str, folder: Path) -> torch.nn.Module:
    model = nets.randomised(ARCHITECTURES[name]()[0])
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize(("kind", "name"), [("rmsnorm", "RMSNorm"), ("crmsnorm", "CRMSNorm")])
def test_converts_a_folder(
    kind: str, name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = written("transformers GPT2", tmp_path / "in")
    arguments = ["convert", str(tmp_path / "in"), str(tmp_path / "out"), "--to", kind]
    assert cli.main([*arguments, "--json", str(tmp_path / "report.json")]) == 0
    captured = capsys.readouterr()
    assert f"5 layer norms became {name}, 0 stayed" in captured.out
    assert "convert" in captured.err or "load" in captured.err
    report = json.loads((tmp_path / "report.json").read_text())
    assert len(report["swapped"]) == 5
    assert max(check["difference"] for check in report["checks"]) <= 1e-10
    assert (tmp_path / "out" / "model.safetensors").exists()

    loaded = effkern.convert.load(tmp_path / "out")
    assert type(loaded) is type(model)
    assert nets.layer_norms(loaded, {"input_ids": IDS}) == 0
    expected = nets.call(model, {"input_ids": IDS})
    nets.assert_same(expected, nets.call(loaded, {"input_ids": IDS}), ["logits"], 1e-5)


def test_save_pretrained_after_to_crmsnorm_can_be_loaded(tmp_path: Path) -> None:
    """Its folder says what was done: layer norms on these weights would give something else."""
    model = nets.randomised(ARCHITECTURES["transformers GPT2"]()[0])
    expected = nets.call(model, {"input_ids": IDS})
    twin = copy.deepcopy(to_crmsnorm(model, {"input_ids": IDS}).model)
    twin.save_pretrained(tmp_path)
    assert "effkern" not in twin.config.to_dict()
    loaded = effkern.convert.load(tmp_path)
    nets.assert_same(expected, nets.call(loaded, {"input_ids": IDS}), ["logits"], 1e-5)
    stock = type(model).from_pretrained(tmp_path).eval()
    assert (stock(IDS).logits - expected["logits"]).abs().max() > 1e-2
    loaded.save_pretrained(tmp_path / "again")
    again = effkern.convert.load(tmp_path / "again")
    nets.assert_same(expected, nets.call(again, {"input_ids": IDS}), ["logits"], 1e-5)


def test_inputs_and_outputs_of_ones_own(tmp_path: Path) -> None:
    model = written("transformers CLIP vision", tmp_path / "in")
    save_file({"pixel_values": torch.randn(3, 3, 32, 32)}, tmp_path / "inputs.safetensors")
    arguments = ["convert", str(tmp_path / "in"), str(tmp_path / "out")]
    arguments += ["--inputs", str(tmp_path / "inputs.safetensors"), "--output", "pooler_output"]
    assert cli.main(arguments) == 0
    image = {"pixel_values": torch.randn(2, 3, 32, 32)}
    loaded = effkern.convert.load(tmp_path / "out")
    expected = nets.call(model, image)
    nets.assert_same(expected, nets.call(loaded, image), ["pooler_output"], 1e-5)


def test_what_cannot_be_converted_writes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    written("transformers BERT", tmp_path / "in")
    assert cli.main(["convert", str(tmp_path / "in"), str(tmp_path / "out")]) == 1
    lines = [s for s in capsys.readouterr().err.splitlines() if s.startswith("effkern: ")]
    assert len(lines) == 1
    assert "residual stream" in lines[0]
    assert not (tmp_path / "out").exists()


def test_a_folder_without_a_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["convert", str(tmp_path), str(tmp_path / "out")]) == 1
    assert "config.json" in capsys.readouterr().err
    with pytest.raises(FileNotFoundError):
        effkern.convert.load(tmp_path)


@pytest.mark.parametrize(
    "name",
    ["transformers ViT", "transformers Pegasus", "transformers Wav2Vec2 stable"],
)
def test_example_inputs_fit(name: str) -> None:
    model = ARCHITECTURES[name]()[0].eval()
    inputs = checkpoint.example_inputs(model)
    assert nets.call(model, inputs)
