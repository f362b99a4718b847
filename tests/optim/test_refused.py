"""What the optimizers refuse: an error that names the parameter, and nothing changed anywhere."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter
from torch.testing._internal.two_tensor import TwoTensor

import effkern
from effkern.backends import choice
from effkern.optim.checks import check_grad
from tests.support.backends import Backend


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"lr": -1.0}, ValueError, "Invalid learning rate: -1.0"),
        ({"lr": float("nan")}, ValueError, "Invalid learning rate: nan"),
        ({"lr": torch.ones(2)}, ValueError, "Tensor lr must be 1-element"),
        ({"eps": -1e-8}, ValueError, "Invalid epsilon value: -1e-08"),
        ({"betas": (1.0, 0.9)}, ValueError, "Invalid beta parameter at index 0: 1.0"),
        ({"betas": (0.9, -0.1)}, ValueError, "Invalid beta parameter at index 1: -0.1"),
        ({"weight_decay": -0.1}, ValueError, "Invalid weight_decay value: -0.1"),
        ({"differentiable": True}, RuntimeError, "does not support differentiable=True"),
    ],
    ids=lambda v: str(v) if isinstance(v, dict) else "",
)
@pytest.mark.parametrize("made", [effkern.FusedAdam, effkern.FusedAdamW])
def test_options(made: Any, options: dict[str, Any], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        made([torch.zeros(1)], **options)


def sparse(p: Tensor) -> None:
    p.grad = torch.ones(p.shape).to_sparse().to(p.device)


def grad_of_another_dtype(p: Tensor) -> None:
    p.grad.data = p.grad.double()


def grad_of_another_shape(p: Tensor) -> None:
    p.grad.data = p.grad[:1]


def grad_of_another_rank(p: Tensor) -> None:
    p.grad.data = p.grad.view(-1)


def param_of_another_shape(p: Tensor) -> None:
    """The parameter changed, its old gradient and state stayed."""
    p.data = torch.zeros(7, device=p.device)


GRADS: dict[Callable[[Tensor], None], str] = {
    sparse: "does not support sparse gradients: that of {} is torch.sparse_coo",
    grad_of_another_dtype: "gradient of {} must have dtype torch.float32, got torch.float64",
    grad_of_another_shape: r"gradient of {} must have shape \(2, 3\), got \(1, 3\)",
    grad_of_another_rank: r"gradient of {} must have shape \(2, 3\), got \(6,\)",
    param_of_another_shape: r"gradient of {} must have shape \(7,\), got \(2, 3\)",
}


class Snapshot:
    """Everything that a step may change."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self._optimizer = optimizer
        self._params = self._values()
        self._states = [
            (p, {k: v.clone() for k, v in s.items()}) for p, s in optimizer.state.items()
        ]

    def _values(self) -> list[Tensor]:
        groups = self._optimizer.param_groups
        return [p.detach().clone() for group in groups for p in group["params"]]

    def assert_unchanged(self) -> None:
        assert all(map(torch.equal, self._values(), self._params))
        state = self._optimizer.state
        assert [id(p) for p in state] == [id(p) for p, _ in self._states]
        for p, before in self._states:
            assert list(state[p]) == list(before)
            for name, value in before.items():
                assert torch.equal(state[p][name], value), name


def make(backend: Backend, groups: int, steps: int, named: bool = False) -> torch.optim.Optimizer:
    """An optimizer whose last parameter, of shape (2, 3), is there to be refused.

    Args:
        backend: for the device.
        groups: 1 or 3.
        steps: taken before.
        named: whether parameters have names.
    """
    params = [Parameter(torch.randn(shape, device=backend.device)) for shape in ((4,), (), (2, 3))]
    listed: list[Any] = [(f"layer.{i}", p) for i, p in enumerate(params)] if named else params
    made = [{"params": listed}] if groups == 1 else [{"params": [one]} for one in listed]
    optimizer = effkern.FusedAdamW(made, amsgrad=True)
    for step in range(steps + 1):
        for p in params:
            p.grad = torch.randn_like(p)
        if step < steps:
            optimizer.step()
    return optimizer


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("steps", [0, 2])
@pytest.mark.parametrize("change", GRADS, ids=lambda f: f.__name__)
def test_gradients(
    backend: Backend, change: Callable[[Tensor], None], steps: int, groups: int
) -> None:
    optimizer = make(backend, groups, steps)
    last = optimizer.param_groups[-1]["params"][-1]
    change(last)
    before = Snapshot(optimizer)
    name = "parameter 2 of its group" if groups == 1 else "parameter 0 of its group"
    with pytest.raises(RuntimeError, match="FusedAdamW.*" + GRADS[change].format(name)):
        optimizer.step()
    before.assert_unchanged()


def test_a_gradient_on_another_device() -> None:
    """PyTorch lets nobody assign one on machines without a GPU."""
    optimizer = effkern.FusedAdamW([torch.zeros(2)])
    (group,) = optimizer.param_groups
    with pytest.raises(RuntimeError, match=r"gradient of parameter 0 .* device cpu, got meta"):
        check_grad(optimizer, group, group["params"][0], torch.zeros(2, device="meta"))


def test_names_of_parameters(backend: Backend) -> None:
    optimizer = make(backend, groups=1, steps=1, named=True)
    sparse(optimizer.param_groups[0]["params"][2])
    with pytest.raises(RuntimeError, match=r"that of parameter 'layer\.2'"):
        optimizer.step()


def test_a_parameter_without_a_name_among_named_ones() -> None:
    """Put into the group's list behind torch's back."""
    optimizer = effkern.FusedSGD([("weight", torch.zeros(2))])
    optimizer.param_groups[0]["params"].append(torch.zeros(2, dtype=torch.int64))
    for p in optimizer.param_groups[0]["params"]:
        p.grad = torch.ones_like(p)
    with pytest.raises(RuntimeError, match="parameter 1 of its group must be float32"):
        optimizer.step()


def test_the_step_after_a_refused_one(backend: Backend) -> None:
    """The optimizer is as good as before."""
    optimizer, other = (make(backend, groups=3, steps=1) for _ in range(2))
    pairs = list(zip(optimizer.param_groups, other.param_groups, strict=True))
    for mine, theirs in pairs:
        theirs["params"][0].data.copy_(mine["params"][0].data)
    other.load_state_dict(optimizer.state_dict())
    last = optimizer.param_groups[-1]["params"][0]
    good, bad = last.grad, last.grad.double()
    last.grad.data, good = bad, good.clone()
    with pytest.raises(RuntimeError, match="must have dtype"):
        optimizer.step()
    last.grad = good
    for mine, theirs in pairs:
        theirs["params"][0].grad = mine["params"][0].grad.clone()
        other.state[theirs["params"][0]] = {
            k: v.clone() for k, v in optimizer.state[mine["params"][0]].items()
        }
    optimizer.step()
    other.step()
    for mine, theirs in pairs:
        assert torch.equal(mine["params"][0], theirs["params"][0])


@pytest.mark.parametrize(
    ("param", "message"),
    [
        (lambda z: z.to(torch.int64), "complex128, got torch.int64"),
        (lambda z: z.to(torch.complex32), "complex128, got torch.complex32"),
        (lambda z: z.to(torch.complex64).conj(), "negated or conjugated view"),
        (lambda z: z.to(torch.float8_e4m3fn), "complex128, got torch.float8_e4m3fn"),
        (lambda z: z.to(torch.complex64).conj().imag, "must not be a negated or conjugated view"),
        (lambda z: z.to_sparse(), "must be a dense tensor, got layout torch.sparse_coo"),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_parameters(backend: Backend, param: Callable[[Tensor], Tensor], message: str) -> None:
    """In the last group of three: no group before it is touched."""
    optimizer = make(backend, groups=3, steps=0)
    refused = param(torch.zeros(2, 2, device=backend.device))
    refused.grad = refused.clone()
    optimizer.add_param_group({"params": [refused]})
    before = [p.detach().clone() for g in optimizer.param_groups[:3] for p in g["params"]]
    with pytest.raises(RuntimeError, match=f"FusedAdamW: parameter 0 of its group .*{message}"):
        optimizer.step()
    after = [p for g in optimizer.param_groups[:3] for p in g["params"]]
    assert all(map(torch.equal, after, before))
    assert not optimizer.state


def test_wrappers_of_tensors() -> None:
    """A subclass without memory of its own."""
    param = TwoTensor(torch.zeros(2), torch.zeros(2)).requires_grad_()
    param.grad = TwoTensor(torch.ones(2), torch.ones(2))
    with pytest.raises(RuntimeError, match="must be a plain tensor, got TwoTensor"):
        effkern.FusedAdamW([param]).step()


@pytest.mark.parametrize("steps", [0, 1])
def test_gradients_that_wrap_others(steps: int) -> None:
    """At once, and after plain ones."""
    param = Parameter(torch.zeros(2))
    optimizer = effkern.FusedAdamW([param])
    for _ in range(steps):
        param.grad = torch.ones(2)
        optimizer.step()
    before = param.detach().clone()
    param.grad = TwoTensor(torch.ones(2), torch.ones(2))
    with pytest.raises(RuntimeError, match="must be a plain tensor, got TwoTensor"):
        optimizer.step()
    assert torch.equal(param, before)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda s: s.update(exp_avg=torch.zeros(5)), r"'exp_avg' .* shape \(2, 3\), got \(5,\)"),
        (lambda s: s.update(max_exp_avg_sq=None), "step"),
        (lambda s: s.update(exp_avg_sq=3.0), r"'exp_avg_sq' .* shape \(2, 3\), got float"),
        (lambda s: s.update(step=torch.zeros(2)), r"'step' .* one number, got \(2,\)"),
        (lambda s: s.update(step="three"), "'step' .* one number, got str"),
    ],
)
def test_state_that_does_not_fit(
    backend: Backend, spoil: Callable[[dict[str, Any]], None], message: str
) -> None:
    optimizer = make(backend, groups=3, steps=1)
    params = [g["params"][0] for g in optimizer.param_groups]
    spoil(optimizer.state[params[2]])
    before = [p.detach().clone() for p in params]
    if message == "step":  # a missing state is made
        optimizer.step()
        return
    with pytest.raises(RuntimeError, match="FusedAdamW: state " + message):
        optimizer.step()
    assert all(map(torch.equal, params, before))
    assert optimizer.state[params[0]]["step"].item() == 1


def test_a_backend_that_takes_no_such_tensors() -> None:
    """Before any state is made."""
    param = Parameter(torch.zeros(3))
    param.grad = torch.ones(3)
    optimizer = effkern.FusedAdamW([param])
    token = choice._choice.set("cuda")
    try:
        with pytest.raises(RuntimeError, match="cuda"):
            optimizer.step()
    finally:
        choice._choice.reset(token)
    assert not optimizer.state
    optimizer.step()


@pytest.mark.parametrize("capturable", [False, True])
def test_a_captured_graph(monkeypatch: pytest.MonkeyPatch, capturable: bool) -> None:
    """Counters on the host would stand still when the graph is replayed; and what the graph reads
    is kept, and no longer changed by later steps."""
    param = Parameter(torch.zeros(3))
    param.grad = torch.ones(3)
    optimizer = effkern.FusedAdamW([param], capturable=capturable)
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "is_initialized", lambda: True)
        patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        if not capturable:
            with pytest.raises(RuntimeError, match="only with capturable=True"):
                optimizer.step()
            assert torch.equal(param, torch.zeros(3))
            return
        optimizer.step()
    (kept,) = optimizer._captured
    optimizer.step()
    assert optimizer._prepared is not None
    assert optimizer._prepared is not kept
    assert optimizer.state[param]["step"].item() == 2


def test_a_parameter_without_memory() -> None:
    """On the meta device; once it has memory, a step works."""
    with torch.device("meta"):
        module = torch.nn.Linear(2, 3)
        for p in module.parameters():
            p.grad = torch.ones_like(p)
    optimizer = effkern.FusedAdamW(module.named_parameters())
    with pytest.raises(RuntimeError, match="FusedAdamW: parameter 'weight' must have memory"):
        optimizer.step()
    assert not optimizer.state
    module.to_empty(device="cpu")
    optimizer = effkern.FusedAdamW(module.named_parameters())
    for p in module.parameters():
        torch.nn.init.zeros_(p).grad = torch.ones_like(p)
    optimizer.step()
    assert all((p < 0).all() for p in module.parameters())
