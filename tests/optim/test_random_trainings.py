"""Trainings drawn at random: rules, options, groups, shapes, layouts, and what happens on the way.

Everything is drawn from the number of the training, so that one that fails can be run alone. The
other side is torch's class, one tensor after another in float64.
"""

from __future__ import annotations

import copy
import io
import math
import pickle
from collections.abc import Callable
from random import Random
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

import effkern
from tests.optim.test_every_rule import FLAGS
from tests.support.twins import TORCH_TWIN, Twins

STEPS = 10

SHAPES = ((), (1,), (0,), (5,), (17, 3), (1, 1, 1), (2, 3, 4, 5), (3, 0, 2), (63,), (64,), (9001,))
DTYPES = (torch.float32, torch.float64, torch.complex64, torch.complex128)


def clip(params: list[Tensor], max_norm: float) -> Tensor:
    """torch's, but with squares summed in pairs: it loses digits over many equal ones."""
    grads = [p.grad for p in params if p.grad is not None]
    squares = [g.abs().square().sum() for g in grads]
    norm = torch.stack(squares).sum().sqrt() if squares else torch.zeros(())
    torch.nn.utils.clip_grads_with_norm_(params, max_norm, norm)
    return norm


class Training:
    """Two optimizers to which the same happens.

    Args:
        seed: what all is drawn from.
        kind: effkern's class; by default it is drawn too.
    """

    def __init__(self, seed: int, kind: type[Optimizer] | None = None) -> None:
        self.random = Random(seed)
        torch.manual_seed(seed)
        self.kind = kind or self.random.choice(list(FLAGS))
        # One for all of Adagrad's groups, as torch has it.
        self.initial = self.random.choice([0.0, 0.5]) if self.kind is effkern.FusedAdagrad else None
        options = {} if self.initial is None else {"initial_accumulator_value": self.initial}
        self.max_norm = self.random.choice([None, None, 0.5, 100.0])
        groups = [self.group() for _ in range(self.random.randint(1, 3))]
        self.twins = Twins(groups, self.kind, **options)
        self.twins.optimizer.max_grad_norm = self.max_norm
        self.frozen: set[int] = set()
        self.happened: list[str] = []

    def group(self) -> dict[str, Any]:
        """Options and parameters; eps far from rounding, which would drown the comparison."""
        flags = dict(self.random.choice(FLAGS[self.kind]))
        flags.pop("initial_accumulator_value", None)
        if self.kind is effkern.FusedRMSprop:
            flags["eps"] = 0.1
        lr = self.random.choice([0.01, 0.003])
        # torch's computes in the dtype of a learning rate, and so loses digits in float32.
        flags["lr"] = self.random.choice([lr, torch.tensor(lr, dtype=torch.float64)])
        params = [self.param() for _ in range(self.random.randint(1, 5))]
        return {"params": params, **flags}

    def param(self) -> Parameter:
        dtype = self.random.choice(DTYPES[:1] * 3 + DTYPES)
        return Parameter(self.laid_out(torch.randn(self.random.choice(SHAPES), dtype=dtype)))

    def laid_out(self, tensor: Tensor) -> Tensor:
        """The same values in a memory layout that is drawn."""
        way = self.random.choice(["as it is"] * 3 + ["transposed", "sliced", "offset"])
        if way == "transposed":
            return tensor.mT.contiguous().mT if tensor.dim() > 1 else tensor
        if way == "offset":
            stored = tensor.new_zeros(tensor.numel() + 1)
            return stored[1:].view(tensor.shape).copy_(tensor)
        if way == "sliced" and tensor.dim() > 0:
            stored = tensor.new_zeros((*tensor.shape[:-1], 2 * tensor.shape[-1]))
            return stored[..., ::2].copy_(tensor)
        return tensor

    # ---- what may happen between two steps ----

    def nothing(self) -> None:
        pass

    def freeze(self) -> None:
        self.frozen.add(self.random.randrange(len(self.twins.mine)))

    def unfreeze(self) -> None:
        self.frozen.clear()

    def exchange_data(self) -> None:
        i = self.random.randrange(len(self.twins.mine))
        mine, theirs = self.twins.mine[i], self.twins.theirs[i]
        mine.data = self.laid_out(torch.randn_like(mine))
        theirs.data = mine.detach().to(theirs.dtype, copy=True)

    def change_options(self) -> None:
        i = self.random.randrange(len(self.twins.twin.param_groups))
        group = self.twins.twin.param_groups[i]
        new: dict[str, Any] = {
            "lr": self.random.choice([0.02, torch.tensor(0.005, dtype=torch.float64)]),
            "weight_decay": self.random.choice([0.0, 0.05]),
            "maximize": self.random.random() < 0.5,
        }
        if "betas" in group:
            new["betas"] = (self.random.choice([0.0, 0.8]), 0.95)
        if self.kind is effkern.FusedSGD and group["momentum"]:
            new["momentum"] = 0.7
        self.twins.both(lambda optimizer: optimizer.param_groups[i].update(new))

    def add_a_group(self) -> None:
        group = self.group()
        wide = Twins([group], self.kind).theirs
        self.twins.optimizer.add_param_group(dict(group))
        self.twins.twin.add_param_group({**group, "params": wide})

    def copy_it(self) -> None:
        self.twins.optimizer = copy.deepcopy(self.twins.optimizer)

    def pickle_it(self) -> None:
        self.twins.optimizer = pickle.loads(pickle.dumps(self.twins.optimizer))

    def load_its_own(self) -> None:
        self.twins.optimizer.load_state_dict(copy.deepcopy(self.twins.optimizer.state_dict()))

    def load_through_torch(self) -> None:
        if self.kind not in TORCH_TWIN:
            return
        groups = [{"params": g["params"]} for g in self.twins.optimizer.param_groups]
        other = TORCH_TWIN[self.kind](groups)
        other.load_state_dict(copy.deepcopy(self.twins.optimizer.state_dict()))
        self.twins.optimizer.load_state_dict(other.state_dict())

    def begin_anew(self) -> None:
        """One parameter's state is lost."""
        if self.kind is effkern.FusedAdagrad:
            return
        i = self.random.randrange(len(self.twins.mine))
        self.twins.optimizer.state.pop(self.twins.mine[i], None)
        self.twins.twin.state.pop(self.twins.theirs[i], None)

    def share_memory(self) -> None:
        for state in self.twins.optimizer.state.values():
            for value in state.values():
                value.share_memory_()

    def step(self) -> None:
        """New gradients of any layout, perhaps scaled, perhaps with an infinity; then compare."""
        scale = self.random.choice([None, None, 1.0, 8.0])
        for i, (mine, theirs) in enumerate(zip(self.twins.mine, self.twins.theirs, strict=True)):
            mine.requires_grad_(i not in self.frozen)
            mine.grad = theirs.grad = None
            if i in self.frozen or self.random.random() < 0.1:
                continue
            grad = self.laid_out(torch.randn_like(mine))
            if mine.dim() and self.random.random() < 0.2:
                grad = grad[:1].expand(mine.shape) if mine.shape[0] else grad
            theirs.grad = grad.to(theirs.dtype, copy=True)
            mine.grad = grad if scale is None else grad * scale
        optimizer, twin = self.twins.optimizer, self.twins.twin
        stepped = [p for p in self.twins.mine if p.grad is not None]
        # A step that is skipped makes states, which torch's class has when it is called.
        infinite = scale is not None and all(map(optimizer.state.get, stepped))
        infinite = infinite and self.random.random() < 0.4
        if scale is not None:
            optimizer.grad_scale = torch.tensor(scale)  # type: ignore[attr-defined]
            optimizer.found_inf = torch.tensor(float(infinite))  # type: ignore[attr-defined]
        optimizer.step()
        optimizer.grad_scale = optimizer.found_inf = None  # type: ignore[attr-defined]
        if infinite:
            return  # what a skipped step leaves alone is seen after the next one
        if self.max_norm is not None:
            norm = clip(self.twins.theirs, self.max_norm)
            if stepped:
                assert math.isclose(optimizer.last_grad_norm, norm, rel_tol=1e-5)  # type: ignore[attr-defined]
        if self.initial is not None:
            self.make_sums()
        twin.step()
        self.twins.check()

    def make_sums(self) -> None:
        """torch's Adagrad makes states in its constructor alone, none of a group that is added."""
        for p in self.twins.theirs:
            if p.grad is not None and p not in self.twins.twin.state:
                value = complex(self.initial, self.initial) if p.is_complex() else self.initial
                state = {"step": torch.tensor(0.0), "sum": torch.full_like(p, value)}
                self.twins.twin.state[p] = state


EVENTS: tuple[Callable[[Training], None], ...] = (
    Training.nothing,
    Training.nothing,
    Training.freeze,
    Training.unfreeze,
    Training.exchange_data,
    Training.change_options,
    Training.add_a_group,
    Training.copy_it,
    Training.pickle_it,
    Training.load_its_own,
    Training.load_through_torch,
    Training.begin_anew,
    Training.share_memory,
)


def run(training: Training) -> None:
    for _ in range(STEPS):
        event = training.random.choice(EVENTS)
        training.happened.append(event.__name__)
        event(training)
        try:
            training.step()
        except Exception as error:
            what = f"{training.kind.__name__}: {', '.join(training.happened)}"
            raise AssertionError(f"after {what}") from error


@pytest.mark.parametrize("seed", range(40))
def test_a_training(seed: int) -> None:
    run(Training(seed))


# ---- what must not change a bit, however states are stored ----


def copied(optimizer: Optimizer) -> Optimizer:
    return copy.deepcopy(optimizer)


def pickled(optimizer: Optimizer) -> Optimizer:
    return pickle.loads(pickle.dumps(optimizer))  # type: ignore[no-any-return]


def filed(optimizer: Optimizer) -> Optimizer:
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    optimizer.load_state_dict(torch.load(file))
    return optimizer


def shared(optimizer: Optimizer) -> Optimizer:
    for state in optimizer.state.values():
        for value in state.values():
            value.share_memory_()
    return optimizer


def moved(optimizer: Optimizer) -> Optimizer:
    for p in optimizer.param_groups[0]["params"]:
        p.data = p.data.clone()
    return optimizer


def restored(optimizer: Optimizer) -> Optimizer:
    """States as tensors of their own."""
    for state in optimizer.state.values():
        for key in state:
            state[key] = state[key].clone()
    return optimizer


INTERRUPTIONS = (copied, pickled, filed, shared, moved, restored)


@pytest.mark.parametrize("seed", range(24))
def test_interruptions(seed: int) -> None:
    random = Random(seed)
    kind = random.choice(list(FLAGS))
    options = {
        **random.choice(FLAGS[kind]),
        "state_dtype": random.choice([None, torch.float32, torch.bfloat16, "int8"]),
        "master_weights": random.random() < 0.5,
        "stochastic_rounding": random.random() < 0.4,
        "max_grad_norm": random.choice([None, 1.0]),
    }
    dtypes = (torch.bfloat16, torch.bfloat16, torch.float16, torch.float32)
    values = [
        torch.randn(random.choice([*SHAPES, (256,), (257,)])).to(random.choice(dtypes))
        for _ in range(4)
    ]
    one, other = (kind([Parameter(v.clone()) for v in values], **options) for _ in range(2))
    for number in range(6):
        one = random.choice(INTERRUPTIONS)(one)
        grads = [torch.randn_like(v) if random.random() > 0.15 else None for v in values]
        scale = random.choice([None, 4.0])
        infinite = scale is not None and number > 1 and random.random() < 0.3
        for optimizer in (one, other):
            for p, grad in zip(optimizer.param_groups[0]["params"], grads, strict=True):
                p.grad = None if grad is None else grad.clone()
            if scale is not None:
                optimizer.grad_scale = torch.tensor(scale)  # type: ignore[attr-defined]
                optimizer.found_inf = torch.tensor(float(infinite))  # type: ignore[attr-defined]
            optimizer.step()
            optimizer.grad_scale = optimizer.found_inf = None  # type: ignore[attr-defined]
        for a, b in zip(*(o.param_groups[0]["params"] for o in (one, other)), strict=True):
            assert torch.equal(a, b)
            mine, theirs = one.state.get(a, {}), other.state.get(b, {})
            assert list(mine) == list(theirs)
            assert all(mine[key].dtype == theirs[key].dtype for key in mine)
            assert all(torch.equal(mine[key], theirs[key]) for key in mine)
