"""``effkern bench optimizers`` from end to end, on two tensors of 17 elements."""

import json

import pytest
import torch

from effkern import cli
from effkern.bench import adam, optimizers, plots
from effkern.bench.results import COPY_LIMIT, OURS
from effkern.bench.timers import Scrubber
from effkern.cli.bench import OptimizerCase

ELEMENTS = 17

#: For each case its peers, the bytes of an element in float32, and the limit's streams.
EXPECTED = {
    "adamw": (["torch fused"], 28, "4r 3w"),
    "sgd": (["torch fused"], 20, "3r 2w"),
    "adagrad": (["torch fused"], 20, "3r 2w"),
    "rmsprop": (["torch foreach"], 20, "3r 2w"),
    "adadelta": (["torch foreach"], 28, "4r 3w"),
    "lion": ([], 20, "3r 2w"),
    "lamb": ([], 40, "4r 2w, 3r 1w"),
    "int8": ([optimizers.PLAIN, "torch fused"], 16, "4r 3w"),
    "clip": ([optimizers.PLAIN, optimizers.TORCH_CLIPPED], 32, "1r 0w, 4r 3w"),
}


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    monkeypatch.setitem(adam.TENSOR_SETS, "gpt2", ("tiny", lambda: [(5,), (3, 4)]))
    monkeypatch.setattr(adam, "LIMIT_BYTES", 2**12)
    monkeypatch.setattr(adam, "Scrubber", lambda device: Scrubber(device, 2**12))


@pytest.fixture
def native_limit(monkeypatch):
    """The limit's streams as with the CPU library, whether it is built or not."""
    from effkern.bench import limits

    monkeypatch.setattr(limits.native, "serves", lambda key: True)
    monkeypatch.setattr(limits.native, "stream_limit", lambda reads, writes: None)


def test_the_command_line_offers_every_case():
    assert tuple(EXPECTED) == optimizers.CASES == tuple(case.value for case in OptimizerCase)


@pytest.mark.usefixtures("native_limit")
@pytest.mark.parametrize("name", optimizers.CASES)
def test_each_case_end_to_end(name):
    told = []
    settings = optimizers.OptimizersSettings(cases=(name,), rounds=2)
    result = optimizers.run(settings, lambda *progress: told.append(progress[1:]))
    (case,) = result.cases
    peers, bytes_an_element, streams = EXPECTED[name]
    assert [row.name for row in case.rows] == [OURS, *peers, COPY_LIMIT]
    assert case.elements == ELEMENTS
    assert case.bytes_moved == bytes_an_element * ELEMENTS
    assert case.limit_streams == streams
    assert told == [(done, adam.WARM_UP + 2) for done in range(adam.WARM_UP + 3)]
    assert bool(result.left_out) == (name in ("lion", "lamb"))
    assert bool(result.notes) == (name in optimizers.VARIANTS)
    other_work = {row.name for row in case.rows if row.bandwidth is None}
    assert other_work == {"int8": set(peers), "clip": {optimizers.PLAIN}}.get(name, set())


def test_a_result_of_several_cases_is_kept_and_drawn(tmp_path):
    settings = optimizers.OptimizersSettings(cases=("lion", "clip"), dtype="bfloat16", rounds=1)
    result = optimizers.run(settings)
    assert [case.bytes_moved for case in result.cases] == [10 * ELEMENTS, 16 * ELEMENTS]
    assert result.left_out == {"Lion: torch": "torch.optim has no Lion"}
    result.write(tmp_path / "optimizers.json")
    written = json.loads((tmp_path / "optimizers.json").read_text())
    assert written["settings"]["cases"] == ["lion", "clip"]
    plots.draw(result, tmp_path / "optimizers.png")
    assert (tmp_path / "optimizers.png").stat().st_size > 0


def test_8_bit_states_move_as_many_bytes_whatever_the_parameters():
    assert optimizers.work_of("int8", torch.bfloat16).bytes_an_element == 3 * 2 + 4
    result = optimizers.run(optimizers.OptimizersSettings(cases=("int8",), dtype="float64"))
    assert result.cases == []
    assert "float64" in result.left_out["int8"]


def stepped(make_step, *, rewrites):
    """Parameters after three steps on one and the same gradients, taken as the bench takes them."""
    generator = torch.Generator().manual_seed(0)
    values = [torch.randn(33, generator=generator)]
    gradients = [torch.randn(33, generator=generator)]  # of a norm well above `MAX_NORM`
    before = gradients[0].clone()
    contestant = adam._contestant(make_step, values, gradients, rewrites=rewrites)
    for _ in range(2):
        contestant.run(contestant.prepare())
    assert torch.equal(gradients[0], before)
    return values[0]


@pytest.mark.parametrize("name", optimizers.CASES)
def test_every_contestant_takes_the_same_steps(name):
    """But for those that do other work than the case's, and are there to show its price."""
    work = optimizers.work_of(name, torch.float32)
    ours = stepped(work.ours, rewrites=False)
    for peer, make_step in work.peers.found.items():
        theirs = stepped(make_step, rewrites=peer in work.rewriting)
        if peer not in work.other_work:
            torch.testing.assert_close(theirs, ours)


def test_peers_that_rewrite_gradients_get_them_restored_before_each_step():
    seen = []

    def make_step(parameters):
        (parameter,) = parameters

        def step():
            seen.append(parameter.grad.clone())
            parameter.grad.zero_()

        return step

    stepped(make_step, rewrites=True)
    assert len(seen) == 3
    assert all(torch.equal(gradient, seen[0]) for gradient in seen)
    assert seen[0].any()


def test_the_command_measures_what_it_was_asked_for(tmp_path, capsys):
    file = tmp_path / "optimizers.json"
    asked = ["--cases", "sgd", "--cases", "int8", "--rounds", "1", "--seed", "3"]
    assert cli.main(["bench", "optimizers", *asked, "--json", str(file)]) == 0
    written = json.loads(file.read_text())
    assert written["settings"] == {
        "device": "cpu",
        "cases": ["sgd", "int8"],
        "tensors": ["gpt2"],
        "dtype": "float32",
        "rounds": 1,
        "seed": 3,
    }
    assert "SGD with momentum, tiny: 2 tensors" in capsys.readouterr().out
