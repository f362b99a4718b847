"""The demo's parts, on a model small enough for a test."""

import json
import statistics

import pytest
import torch

import effkern
from effkern.bench.demo import report, text, train
from effkern.bench.demo.model import ByteGPT, ModelShape
from effkern.bench.demo.train import DemoSettings, Side
from effkern.bench.results import write_json

TINY = ModelShape(layers=2, hidden_size=16, num_heads=2, context=8)


@pytest.fixture(scope="module")
def training():
    return train.train(DemoSettings(steps=20, batch_size=4, shape=TINY))


def test_the_default_model_has_about_ten_million_parameters():
    with torch.device("meta"):
        model = ByteGPT(ModelShape())
    assert sum(p.numel() for p in model.parameters()) == 10_769_280
    assert sum(isinstance(m, torch.nn.RMSNorm) for m in model.modules()) == 13


def test_the_model_sees_no_later_byte():
    model = ByteGPT(TINY)
    tokens = torch.arange(8).view(1, 8)
    changed = tokens.clone()
    changed[0, 5] = 200
    before, after = model(tokens), model(changed)
    torch.testing.assert_close(before[0, :5], after[0, :5])
    assert not torch.allclose(before[0, 5], after[0, 5])


def test_swapped_norms_share_their_weights_and_keep_the_result():
    model = ByteGPT(TINY)
    tokens = torch.arange(9).view(1, 9)
    weights, loss = list(model.parameters()), model.loss(tokens)
    assert len(effkern.swap_norms(model).swapped) == 5
    assert not any(type(m) is torch.nn.RMSNorm for m in model.modules())
    assert isinstance(model.norm, effkern.nn.RMSNorm)
    assert {id(p) for p in model.parameters()} == {id(p) for p in weights}
    torch.testing.assert_close(model.loss(tokens), loss)
    assert not effkern.swap_norms(model).swapped


def test_the_sides_start_equal_and_share_nothing():
    stock, ours, swapped = train.make_sides(DemoSettings(shape=TINY))
    assert swapped == 5
    assert isinstance(ours.optimizer, effkern.FusedAdamW)
    assert type(stock.optimizer) is torch.optim.AdamW
    for a, b in zip(stock.model.parameters(), ours.model.parameters(), strict=True):
        assert torch.equal(a, b)
        assert a.data_ptr() != b.data_ptr()


def test_both_sides_train_alike(training):
    stock, ours = training.stock, training.effkern
    assert len(stock.losses) == len(ours.losses) == 20
    assert statistics.mean(stock.losses[-5:]) < statistics.mean(stock.losses[:5]) - 0.02
    torch.testing.assert_close(ours.losses, stock.losses, rtol=1e-4, atol=0)
    assert ours.held_out == pytest.approx(stock.held_out, rel=1e-4)
    assert report.summarise(training).losses_agree


@pytest.mark.parametrize("state_dtype", train.STATE_DTYPES)
def test_states_in_fewer_bits_train_alike(state_dtype):
    settings = DemoSettings(steps=20, batch_size=4, shape=TINY, state_dtype=state_dtype)
    training = train.train(settings)
    states = next(iter(training.effkern.optimizer.state.values()))
    stored = [t for key, t in states.items() if not key.endswith(("step", "_scales"))]
    assert {t.dtype for t in stored} <= {torch.bfloat16, torch.int8, torch.uint8}
    summary = report.summarise(training)
    assert summary.curve_difference == max(
        abs(b - a) / a for a, b in zip(training.stock.losses, training.effkern.losses, strict=True)
    )
    assert 0 < summary.curve_difference < 0.01
    assert training.effkern.resident_bytes < training.stock.resident_bytes


def test_the_same_seed_gives_the_same_training(training):
    again = train.train(training.settings)
    assert again.stock.losses == training.stock.losses
    other = train.train(DemoSettings(steps=1, batch_size=4, shape=TINY, seed=1))
    assert other.stock.losses[0] != training.stock.losses[0]


def test_training_stops_when_its_time_is_over():
    settings = DemoSettings(steps=100, seconds=0.0, batch_size=2, shape=TINY)
    assert len(train.train(settings).stock.losses) == 1


def test_peak_memory_counts_parameters_state_and_gradients(training):
    parameters = 4 * training.parameters
    steps = 4 * len(list(training.stock.model.parameters()))
    for side in (training.stock, training.effkern):
        assert side.resident_bytes == 3 * parameters + steps
        assert side.peak_bytes >= side.resident_bytes + parameters


def test_a_training_that_went_wrong_is_noticed(training):
    for wrong in (training.effkern.held_out * 1.02, float("nan")):
        side = Side(**{**vars(training.effkern), "held_out": wrong})
        changed = train.Training(**{**vars(training), "effkern": side})
        assert not report.summarise(changed).losses_agree


def test_times_leave_the_warm_up_out(training):
    summary = report.summarise(training)
    steps = training.stock.step_times()[report.WARM_UP :]
    assert summary.times["step"][0].median == statistics.median(steps)
    assert set(summary.speedups) == {"step", *train.PHASES}


def test_table_picture_and_data(training, tmp_path):
    from rich.console import Console

    summary = report.summarise(training)
    with open("/dev/null", "w") as nowhere:
        console = Console(width=120, record=True, file=nowhere)
        console.print(report.render(training, summary))
    shown = console.export_text()
    for expected in ("whole step", "optimizer", "peak memory", "held-out loss", "yes ("):
        assert expected in shown
    data = report.as_data(training, summary)
    write_json(tmp_path / "result.json", data)
    assert json.loads((tmp_path / "result.json").read_text())["steps"] == 20
    report.draw(training, summary, tmp_path / "demo.png")
    assert (tmp_path / "demo.png").read_bytes().startswith(b"\x89PNG")


def test_the_default_text_is_python_and_always_the_same():
    training_text, held_out = text.corpus(None, context=128)
    assert len(training_text) + len(held_out) == text.CORPUS_BYTES
    assert b"import " in bytes(held_out.tolist())
    assert torch.equal(text.corpus(None, context=128)[0], training_text)


def test_a_text_that_is_too_short_is_refused(tmp_path):
    short = tmp_path / "short.txt"
    for content in (b"", b"x" * 99):
        short.write_bytes(content)
        with pytest.raises(ValueError, match=r"short\.txt: .* are too few, 100 are needed"):
            text.corpus(short, context=8)
    short.write_bytes(b"x" * 100)
    training_text, held_out = text.corpus(short, context=8)
    assert (len(training_text), len(held_out)) == (90, 10)


def test_batches_are_windows_of_the_text():
    source = torch.arange(50, dtype=torch.uint8)
    batch = text.batch(source, torch.Generator().manual_seed(0), size=200, context=4)
    assert batch.shape == (200, 5)
    assert batch.dtype == torch.int64
    assert bool((batch.diff(dim=1) == 1).all())
    assert (batch.min(), batch.max()) == (0, 49)  # both ends of the text are reached
