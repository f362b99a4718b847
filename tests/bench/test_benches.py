"""The benches from end to end, on shapes small enough that the figures mean nothing."""

import json
import math

import pytest
import torch

from effkern.bench import (
    adam,
    call_overhead,
    limits,
    machine,
    norm_softmax,
    norms,
    plots,
    tables,
)
from effkern.bench.limits import Streams, copy_limit
from effkern.bench.peers import Peers, adamw_peers, norm_peers
from effkern.bench.results import COPY_LIMIT, OURS
from effkern.bench.timers import Scrubber
from effkern.nn import functional

CPU = torch.device("cpu")


def rendered(result):
    from rich.console import Console

    console = Console(width=120, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(tables.render(result))
    return console.export_text()


@pytest.fixture(autouse=True)
def small_buffers(monkeypatch):
    monkeypatch.setattr(adam, "LIMIT_BYTES", 2**12)
    monkeypatch.setattr(adam, "Scrubber", lambda device: Scrubber(device, 2**12))
    monkeypatch.setattr(call_overhead, "CALLS", 2)


def test_gpt2_small_has_the_shapes_of_the_original():
    shapes = adam.gpt2_small_shapes()
    assert len(shapes) == 148
    assert sum(math.prod(shape) for shape in shapes) == 124_439_808


def test_the_small_tensors_are_2500_of_2_2_million_elements():
    shapes = adam.many_small_shapes()
    assert len(shapes) == 2500
    assert sum(math.prod(shape) for shape in shapes) == 2_208_000


@pytest.fixture
def tiny_set(monkeypatch):
    monkeypatch.setitem(adam.TENSOR_SETS, "small", ("tiny", lambda: [(5,), (3, 4)]))


@pytest.mark.usefixtures("tiny_set")
def test_bench_adam_end_to_end(tmp_path):
    settings = adam.AdamSettings(tensors=("small",), rounds=2)
    told = []
    result = adam.run(settings, lambda *progress: told.append(progress[1:]))
    (case,) = result.cases
    names = [row.name for row in case.rows]
    assert names[0] == OURS
    assert {"torch fused", "torch foreach", COPY_LIMIT} <= set(names)
    assert case.bytes_moved == 17 * 28
    assert "torch.compile" in result.left_out
    assert told == [(done, 5) for done in range(6)]

    result.write(tmp_path / "new" / "adam.json")
    written = json.loads((tmp_path / "new" / "adam.json").read_text())
    assert written["settings"]["rounds"] == 2
    assert written["cases"][0]["rows"][0]["name"] == OURS
    assert written["machine"]["torch"] == torch.__version__
    text = rendered(result)
    assert "28 bytes an element" in text
    assert "left out: torch.compile" in text
    plots.draw(result, tmp_path / "adam.png")
    assert (tmp_path / "adam.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.usefixtures("tiny_set")
def test_a_peer_that_fails_is_left_out_with_the_reason(monkeypatch):
    def broken(parameters):
        raise RuntimeError("no compiler here\nand a long explanation")

    peers = Peers(found={"broken": broken})
    monkeypatch.setattr(adam, "adamw_peers", lambda device, compiled: peers)
    result = adam.run(adam.AdamSettings(tensors=("small",), rounds=1))
    assert result.left_out == {"broken": "RuntimeError: no compiler here"}
    assert [row.name for row in result.cases[0].rows] == [OURS, COPY_LIMIT]


def test_every_contestant_of_bench_adam_takes_the_same_steps():
    """A contestant that trained something else would not be a peer."""
    generator = torch.Generator().manual_seed(0)
    value, gradient = (torch.randn(33, generator=generator) for _ in range(2))
    results = []
    for make_step in (adam._effkern_adamw, *adamw_peers(CPU, compiled=False).found.values()):
        parameter = torch.nn.Parameter(value.clone())
        parameter.grad = gradient
        step = make_step([parameter])
        step()
        step()
        results.append(parameter.detach())
    assert len(results) >= 3
    for result in results[1:]:
        torch.testing.assert_close(result, results[0])


@pytest.mark.parametrize("name", list(norms.NORMS))
def test_every_contestant_of_bench_norms_computes_the_same(name):
    generator = torch.Generator().manual_seed(0)
    x, residual = (torch.randn(4, 19, generator=generator) for _ in range(2))
    ours = norms.NORMS[name]
    parameters = tuple(torch.randn(19, generator=generator) for _ in range(ours.parameters))
    found = norm_peers(name, CPU, compiled=False).found
    same = [peer for key, peer in found.items() if "layer_norm" not in key or name == "layer_norm"]
    assert same
    for peer in same:
        for given in (None, residual):
            mine, theirs = (norm(x, parameters, given) for norm in (ours.function, peer))
            assert len(mine) == len(theirs) == (1 if given is None else 2)
            torch.testing.assert_close(mine, theirs)


def test_bench_norms_end_to_end():
    settings = norms.NormsSettings(rows=4, hidden_sizes=(8, 9), rounds=1, compile=False)
    result = norms.run(settings)
    names = [case.name for case in result.cases]
    allocators = 2 if "fresh" in " ".join(names) else 1
    assert len(names) == len(set(names)) == 2 * 3 * 2 * 3 * allocators + 2
    case = result.cases[names.index("RMSNorm 4 x 9 float32 + residual, backward, warm allocator")]
    assert case.bytes_moved == 4 * 4 * 9 * 4
    assert [row.name for row in case.rows] == [
        OURS,
        "torch rms_norm",
        "torch layer_norm",
        COPY_LIMIT,
    ]
    text = rendered(result)
    assert "CRMSNorm 4 x 8 float32, forward" in text
    assert "call overhead, RMSNorm 1 x 64, no gradient" in text
    assert "copy limit (" in text


def test_every_form_of_bench_norm_softmax_computes_the_same():
    x = torch.randn(4, 19)
    target = torch.tensor([0, 3, 18, 7])
    ours = functional.norm_softmax(x), functional.norm_softmax_cross_entropy(x, target)
    theirs = norm_softmax.plain(x), norm_softmax.plain_cross_entropy(x, target)
    torch.testing.assert_close(ours, theirs)


def test_bench_norm_softmax_end_to_end():
    settings = norm_softmax.NormSoftmaxSettings(
        shape=(2, 3, 8), tokens=4, classes=50, rounds=1, compile=False
    )
    result = norm_softmax.run(settings)
    names = [case.name for case in result.cases]
    assert len(names) == len(set(names)) == 2 * (2 if "fresh" in " ".join(names) else 1) + 1
    case = result.cases[-1]
    assert case.bytes_moved == 2 * 4 * 50 * 4
    assert [row.name for row in case.rows] == [
        OURS,
        "effkern, inplace",
        "torch cross_entropy",
        "plain NormSoftmax",
        COPY_LIMIT,
    ]
    assert sum("times their memory" in note for note in result.notes) == 4


def test_bench_norms_of_one_norm_in_short(monkeypatch):
    monkeypatch.setattr(norms, "ELEMENTS", 64)
    settings = norms.NormsSettings(
        norms=("layer_norm",), hidden_sizes=(16,), rounds=1, compile=False,
        fresh=False, overhead=False,
    )  # fmt: skip
    result = norms.run(settings)
    assert len(result.cases) == 2 * 3
    assert all(case.elements == 64 for case in result.cases)
    assert "not measured here" in result.notes[0]


def test_call_overhead_alone():
    result = call_overhead.run("cpu")
    assert [case.of_overhead for case in result.cases] == [True, True]


@pytest.mark.parametrize("has_library", [True, False])
def test_the_copy_limit_counts_what_it_moves(monkeypatch, has_library):
    moved = []
    monkeypatch.setattr(limits.native, "serves", lambda key: has_library)
    monkeypatch.setattr(
        limits.native, "stream_limit", lambda reads, writes: moved.append((len(reads), len(writes)))
    )
    passes = [Streams(4, 3, in_place=True), Streams(2, 1)]
    limit = copy_limit(passes, buffer_bytes=400, device=CPU)
    written = limit.contestant.run(limit.contestant.prepare())
    assert moved == ([(4, 3), (2, 1)] if has_library else [])
    assert limit.bytes_moved == (10 if has_library else 4) * 400
    assert [tensor.numel() for tensor in written] == [100] * (4 if has_library else 2)


@pytest.mark.parametrize("has_library", [True, False])
def test_the_copy_limit_reads_what_a_pass_only_reads(monkeypatch, has_library):
    monkeypatch.setattr(limits.native, "serves", lambda key: has_library)
    moved = []
    monkeypatch.setattr(
        limits.native, "stream_limit", lambda reads, writes: moved.append((len(reads), len(writes)))
    )
    limit = copy_limit([Streams(1, 0), Streams(4, 3, in_place=True)], buffer_bytes=400, device=CPU)
    total, *written = limit.contestant.run(limit.contestant.prepare())
    assert total.shape == ()  # a sum: the loads of a loop without stores would be left out
    assert limit.streams == ("1r 0w, 4r 3w" if has_library else "1r 0w, 1r 1w")
    assert limit.bytes_moved == (8 if has_library else 3) * 400
    assert len(written) == (3 if has_library else 1)
    assert moved == ([(4, 3)] if has_library else [])


def test_the_copy_limit_writes_in_place_only_where_it_says_so(monkeypatch):
    monkeypatch.setattr(limits.native, "serves", lambda key: True)
    monkeypatch.setattr(limits.native, "stream_limit", lambda reads, writes: None)
    for in_place in (True, False):
        limit = copy_limit([Streams(2, 1, in_place)], buffer_bytes=400, device=CPU)
        buffers = limit.contestant.prepare()
        (written,) = limit.contestant.run(buffers)
        assert any(written is buffer for buffer in buffers) == in_place


def test_the_machine_is_described_in_plain_data():
    described = machine.describe()
    assert json.loads(json.dumps(described)) == described
    assert described["torch"] == torch.__version__
    assert described["threads"] == torch.get_num_threads()
    assert machine.package_version("no-such-package-as-this") is None
    assert not machine.is_importable("no_such_module_as_this")
