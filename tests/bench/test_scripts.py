"""What a user would copy runs; the scripts in benchmarks/ ask for what they say."""

import json
import runpy
import sys
from pathlib import Path

import pytest

from effkern import cli
from effkern.bench import call_overhead, norms
from effkern.bench.norms import NormsSettings

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("script", sorted(ROOT.glob("examples/*.py")), ids=lambda path: path.stem)
def test_examples_run(script, capsys):
    runpy.run_path(str(script), run_name="__main__")
    assert capsys.readouterr().out


@pytest.fixture
def common(monkeypatch, tmp_path):
    """The benchmarks' shared module, with another folder for results."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import common

    monkeypatch.setattr(common, "RESULTS", tmp_path)
    yield common
    del sys.modules["common"]


@pytest.mark.parametrize("benchmark", ["adam", "optimizers", "norm_softmax"])
def test_benchmarks_keep_their_result(benchmark, common, monkeypatch):
    asked = []
    monkeypatch.setattr(common, "main", lambda arguments: asked.append(arguments) or 3)
    monkeypatch.setattr(sys, "argv", ["script", "--rounds", "2"])
    with pytest.raises(SystemExit, match="3"):
        runpy.run_path(str(ROOT / "benchmarks" / f"{benchmark}.py"), run_name="__main__")
    kept = f"{common.RESULTS / benchmark}"
    expected = ["--json", f"{kept}.json", "--plot", f"{kept}.png", "--rounds", "2"]
    assert asked == [["bench", benchmark, *expected]]
    assert cli.main(["bench", benchmark, "--help"]) == 0


def test_the_benchmark_of_norms(common, monkeypatch, tmp_path, capsys):
    asked = []
    monkeypatch.setattr(common, "main", lambda arguments: asked.append(arguments) or 0)
    monkeypatch.setattr(sys, "argv", ["script", "768", "7x1024"])
    script = str(ROOT / "benchmarks" / "norms.py")
    runpy.run_path(script, run_name="__main__")
    kept = [f"{tmp_path}/norms_{size}" for size in ("768", "7x1024")]
    less = ["--rows", "7", "--no-fresh", "--no-overhead", "--no-compile"]
    files = [["--json", f"{name}.json", "--plot", f"{name}.png"] for name in kept]
    assert asked == [
        ["bench", "norms", *files[0], "--hidden-size", "768", "--rounds", "9"],
        ["bench", "norms", *files[1], "--hidden-size", "1024", "--rounds", "9", *less],
    ]

    settings = NormsSettings(rows=2, rounds=1, compile=False, overhead=False)
    norms.run(settings).write(tmp_path / "norms_768.json")
    monkeypatch.setattr(sys, "argv", ["script", "--table"])
    runpy.run_path(script, run_name="__main__")
    table = capsys.readouterr().out
    assert "| 2 x 768 + residual, forward + backward |" in table
    assert "| 2 x 768, forward |" in table
    assert "| 2 x 768, forward + backward, fresh |" in table


@pytest.mark.usefixtures("common")
def test_the_benchmark_of_call_overhead(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(call_overhead, "CALLS", 2)
    monkeypatch.setattr(sys, "argv", ["script"])
    runpy.run_path(str(ROOT / "benchmarks" / "call_overhead.py"), run_name="__main__")
    assert "call overhead" in capsys.readouterr().out
    written = json.loads((tmp_path / "call_overhead.json").read_text())
    assert [case["of_overhead"] for case in written["cases"]] == [True, True]
    assert (tmp_path / "call_overhead.png").exists()
