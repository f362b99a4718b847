"""The command line: help, exit statuses, and one line for each failure."""

import contextlib
import functools
import json
import os
import pty
import subprocess
import sys

import pytest
import torch

from effkern import cli
from effkern.bench import adam, norm_softmax, norms
from effkern.bench.demo import train
from effkern.bench.demo.model import ModelShape
from effkern.bench.results import Result
from effkern.cli import console, doctor, options
from effkern.cli.console import progress
from effkern.version import __version__

COMMANDS = (
    [],
    ["doctor"],
    ["demo"],
    ["bench"],
    ["bench", "adam"],
    ["bench", "optimizers"],
    ["bench", "norms"],
    ["bench", "rms_norm"],
    ["bench", "norm_softmax"],
    ["convert"],
)
WORKING = [command for command in COMMANDS if command not in ([], ["bench"])]


@pytest.fixture
def wide(monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("NO_COLOR", "1")


@pytest.fixture
def tiny(monkeypatch):
    """A demo that takes no time."""
    shape = ModelShape(layers=1, hidden_size=8, num_heads=1, context=8)
    settings = functools.partial(train.DemoSettings, shape=shape)
    monkeypatch.setattr(train, "DemoSettings", settings)


def failure(capsys):
    """What was said on stderr, which must be one line."""
    captured = capsys.readouterr()
    lines = [line for line in captured.err.splitlines() if line.startswith("effkern: ")]
    assert len(lines) == 1, captured.err
    assert "Traceback" not in captured.err
    return lines[0]


@pytest.mark.usefixtures("wide")
@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_help(command, capsys):
    assert cli.main([*command, "--help"]) == 0
    shown = capsys.readouterr().out
    if command in WORKING:
        for option in ("--device", "--seed", "--json"):
            assert option in shown


@pytest.mark.usefixtures("wide")
def test_only_commands_that_exist_are_listed(capsys):
    cli.main(["--help"])
    shown = capsys.readouterr().out
    commands = shown.split("Commands")[1]
    names = {line.split()[1] for line in commands.splitlines() if line.startswith("│ ")}
    assert names == {"doctor", "demo", "bench", "convert"}


def test_version(capsys):
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"effkern {__version__}\n"


@pytest.mark.parametrize(
    "arguments",
    [
        ["nonsense"],
        ["demo", "--nonsense"],
        ["demo", "--device", "gpu"],
        ["demo", "--device", "cuda:x"],
        ["demo", "--steps", "0"],
        ["demo", "--seed", "-1"],
        ["demo", "--out", __file__],
        ["doctor", "--json", "/proc/nowhere/result.json"],
        ["bench", "adam", "--dtype", "int8"],
        ["bench", "adam", "--tensors", "huge"],
        ["bench", "adam", "--plot", "picture.txt"],
        ["bench", "rms_norm", "--rounds", "0"],
        ["bench", "rms_norm", "--hidden-size", "0"],
        ["bench", "nonsense"],
        ["convert", "/nowhere/at/all", "out"],
        ["convert", ".", "."],
        ["convert", ".", "tests"],
        ["convert", ".", "out", "--to", "layernorm"],
    ],
    ids=" ".join,
)
def test_bad_arguments_exit_with_2(arguments, capsys):
    assert cli.main(arguments) == 2
    assert "Error" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
@pytest.mark.parametrize("command", [c for c in WORKING if c != ["convert"]], ids=" ".join)
def test_a_device_that_is_not_there_exits_with_1(command, capsys):
    assert cli.main([*command, "--device", "cuda"]) == 1
    assert failure(capsys).startswith("effkern: --device cuda: ")


def test_a_gpu_too_many_is_refused(monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    chosen = []
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    assert options.open_device("cuda:1") == torch.device("cuda:1")
    with pytest.raises(RuntimeError, match="--device cuda:2: this machine has 2 GPUs"):
        options.open_device("cuda:2")
    # Without an index it is the current one.
    assert options.open_device("cuda") == torch.device("cuda")
    assert chosen == [torch.device("cuda:1")]


def test_demo_on_a_missing_text(tmp_path, capsys):
    arguments = ["demo", "--out", str(tmp_path), "--text", str(tmp_path / "missing.txt")]
    assert cli.main(arguments) == 1
    assert failure(capsys).endswith("missing.txt: No such file or directory")


def test_demo_on_a_short_text(tmp_path, capsys):
    text = tmp_path / "short.txt"
    text.write_text("too short")
    assert cli.main(["demo", "--out", str(tmp_path), "--text", str(text)]) == 1
    assert failure(capsys).endswith("9 bytes of text are too few, 1300 are needed")


@pytest.mark.usefixtures("tiny", "wide")
def test_demo_end_to_end(tmp_path, capsys):
    out, copy = tmp_path / "out", tmp_path / "copy.json"
    assert cli.main(["demo", "--steps", "6", "--out", str(out), "--json", str(copy)]) == 0
    captured = capsys.readouterr()
    assert "Losses agree within 1%: yes" in captured.out
    assert "training: 0 of 6" in captured.err
    assert sorted(path.name for path in out.iterdir()) == ["demo.png", "result.json"]
    result = json.loads(copy.read_text())
    assert result == json.loads((out / "result.json").read_text())
    assert result["summary"]["losses_agree"] is True
    assert [len(side["losses"]) for side in result["sides"].values()] == [6, 6]


@pytest.mark.usefixtures("tiny")
def test_demo_fails_when_the_losses_differ(tmp_path, capsys, monkeypatch):
    right = train.make_sides

    def wrong(settings):
        stock, ours, swapped = right(settings)
        ours.optimizer.step = lambda: None
        return stock, ours, swapped

    monkeypatch.setattr(train, "make_sides", wrong)
    monkeypatch.setattr(train, "peak_memory", lambda *arguments: (0, 0))
    monkeypatch.setattr(train, "LEARNING_RATE", 1.0)
    assert cli.main(["demo", "--steps", "6", "--out", str(tmp_path)]) == 1
    assert "the losses at the end differ by" in failure(capsys)


@pytest.mark.usefixtures("wide")
def test_doctor(tmp_path, capsys):
    file = tmp_path / "doctor.json"
    assert cli.main(["doctor", "--json", str(file)]) == 0
    shown = capsys.readouterr().out
    assert torch.__version__ in shown
    findings = json.loads(file.read_text())
    assert list(findings["backends"]) == ["reference", "cpu", "cuda", "triton"]
    for name, status in findings["backends"].items():
        assert name in shown
        assert status["available"] or (status["reason"] and status["remedy"])
    assert findings["served_by"]["cpu"] in ("cpu", "reference")
    checked = {check["backend"] for check in findings["checks"]}
    assert checked == {n for n, s in findings["backends"].items() if s["available"]}


def test_doctor_fails_when_a_backend_is_wrong(capsys, monkeypatch):
    from effkern.bench import self_check

    monkeypatch.setattr(self_check, "check", lambda *arguments, seed: "differs")
    assert cli.main(["doctor", "--device", "cpu"]) == 1
    assert "reference on cpu: differs" in failure(capsys)


def test_doctor_tells_a_choice_that_cannot_serve(monkeypatch):
    from effkern.backends import choice

    def serving(device):
        raise RuntimeError("effkern backend 'cuda' cannot run here")

    monkeypatch.setattr(choice, "serving", serving)
    served_by = doctor.examine("cpu", seed=0)["served_by"]
    assert served_by["cpu"] == "none: effkern backend 'cuda' cannot run here"


@pytest.mark.parametrize(
    ("arguments", "bench", "settings"),
    [
        (
            ["adam", "--tensors", "small", "--dtype", "bfloat16", "--rounds", "3", "--seed", "5"],
            adam,
            adam.AdamSettings("cpu", ("small",), "bfloat16", 3, False, 5),
        ),
        (["adam"], adam, adam.AdamSettings()),
        (
            ["rms_norm", "--rows", "7", "--hidden-size", "8", "--hidden-size", "9", "--no-compile"],
            norms,
            norms.NormsSettings(norms=("rms_norm",), rows=7, hidden_sizes=(8, 9), compile=False),
        ),
        (["norms"], norms, norms.NormsSettings()),
        (
            ["crms_norm", "--no-fresh", "--no-overhead"],
            norms,
            norms.NormsSettings(norms=("crms_norm",), fresh=False, overhead=False),
        ),
        (
            ["norm_softmax", "--batch", "0", "--tokens", "5", "--classes", "9", "--no-compile"],
            norm_softmax,
            norm_softmax.NormSoftmaxSettings(shape=(), tokens=5, classes=9, compile=False),
        ),
        (["norm_softmax"], norm_softmax, norm_softmax.NormSoftmaxSettings()),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bench_arguments_become_settings(arguments, bench, settings, monkeypatch, tmp_path):
    asked = []
    machine = {"cpu": "", "gpus": [], "threads": 1, "cpu_isa": None, "torch": "", "effkern": ""}

    def run(settings, report):
        asked.append(settings)
        return Result("none", {"device": "cpu"}, machine, [])

    monkeypatch.setattr(bench, "run", run)
    file = tmp_path / "result.json"
    assert cli.main(["bench", *arguments, "--json", str(file)]) == 0
    assert asked == [settings]
    assert json.loads(file.read_text())["benchmark"] == "none"


def test_bench_threads_are_set(monkeypatch):
    asked = []
    monkeypatch.setattr(torch, "set_num_threads", asked.append)
    monkeypatch.setattr(adam, "run", lambda *arguments: 1 / 0)
    assert cli.main(["bench", "adam", "--threads", "1"]) == 1
    assert asked == [1]


def test_a_traceback_on_request(monkeypatch, tmp_path):
    monkeypatch.setenv("EFFKERN_TRACEBACK", "1")
    with pytest.raises(FileNotFoundError):
        cli.main(["demo", "--out", str(tmp_path), "--text", str(tmp_path / "none.txt")])


def run_python(*arguments):
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True)


def test_as_a_module_with_its_exit_status():
    finished = run_python("-m", "effkern.cli", "demo", "--steps", "none")
    assert finished.returncode == 2
    assert "Traceback" not in finished.stderr


def test_the_command_line_itself_imports_no_torch():
    """`import effkern` needs torch; the commands must not before they run."""
    code = """
import importlib.util, sys, types
package = types.ModuleType("effkern")
package.__path__ = list(importlib.util.find_spec("effkern").submodule_search_locations)
sys.modules["effkern"] = package
from effkern.cli import main
assert main(["bench", "adam", "--help"]) == 0
assert "torch" not in sys.modules and "matplotlib" not in sys.modules
"""
    finished = run_python("-c", code)
    assert finished.returncode == 0, finished.stderr


def read_all(terminal):
    """What was written to a terminal whose other end is closed."""
    shown = b""
    with contextlib.suppress(OSError):  # how Linux says that it is closed
        while chunk := os.read(terminal, 65536):
            shown += chunk
    os.close(terminal)
    return shown.decode()


def test_a_terminal_gets_a_bar(monkeypatch):
    terminal, other_end = pty.openpty()
    monkeypatch.setenv("TERM", "xterm")
    with os.fdopen(other_end, "w") as screen:
        monkeypatch.setattr(sys, "stderr", screen)
        with progress() as report:
            for done in range(4):
                report("working", done, 3)
    shown = read_all(terminal)
    assert "3/3" in shown
    assert "\x1b[" in shown


def test_no_terminal_gets_plain_lines_not_too_many(capsys):
    with progress() as report:
        for what in ("first", "second"):
            for done in range(1000):
                report(what, done, 999)
    assert capsys.readouterr().err.splitlines() == ["first: 0 of 999", "second: 0 of 999"]


def test_a_long_work_tells_how_far_it_is(capsys, monkeypatch):
    seconds = iter(range(0, 1000, 4))
    monkeypatch.setattr(console.time, "monotonic", lambda: next(seconds))
    with progress() as report:
        for done in range(8):
            report("working", done, 7)
    assert capsys.readouterr().err.splitlines() == [f"working: {done} of 7" for done in (0, 3, 6)]
