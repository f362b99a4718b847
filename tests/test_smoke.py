"""The shortest proof that effkern works under this torch: `make test-oldest` runs it under 2.10."""

import functools

import pytest
import torch

import effkern
from effkern.backends import native


def test_the_cpu_library_is_loaded():
    folder = native.library_folder()
    if not (folder / "libeffkern_cpu.so").exists():
        pytest.skip(f"no CPU library in {folder}")
    assert native.serves("CPU"), native.why_not("CPU")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_training_steps_follow_torch(dtype):
    def train(norm_class, optimizer_class):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(16, 40), norm_class(40), torch.nn.Linear(40, 4))
        model.to(dtype)
        optimizer = optimizer_class(model.parameters(), lr=1e-2, eps=1e-4)
        losses = []
        for _ in range(5):
            loss = model(torch.randn(32, 16, dtype=dtype)).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.detach().double())
        return torch.stack(losses)

    ours = train(effkern.nn.RMSNorm, effkern.FusedAdamW)
    # fused=True computes in float32, as effkern does.
    theirs = train(torch.nn.RMSNorm, functools.partial(torch.optim.AdamW, fused=True))
    tolerance = {torch.float64: 1e-9, torch.float32: 1e-5}.get(dtype, 2e-2)
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)
    assert ours[-1] < ours[0]


def test_compiles_in_one_graph():
    norm = effkern.nn.RMSNorm(24)
    x = torch.randn(5, 24)
    compiled = torch.compile(norm, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), norm(x))
