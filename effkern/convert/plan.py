"""The search for a set of edits, and the forward walk that proves it.

The search proposes: it centres what norms demand, and recentres at run time where that fails. The
forward walk disposes: it follows every edit through the whole graph; where one reaches an output or
something that is not known to let it through, the edits that led there are given up, and the search
begins again without them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch.fx import Node

# the modules of rules fill the table that `transfer` reads
from effkern.convert import arithmetic_rules, indexing_rules, layout_rules  # noqa: F401
from effkern.convert.axes import Axis
from effkern.convert.calls import name_of
from effkern.convert.demands import Demands, Key
from effkern.convert.dropped import transfer_dropped
from effkern.convert.norms import NormModule, find_norms, transfer_norm
from effkern.convert.report import NotConvertible
from effkern.convert.rules import transfer
from effkern.convert.states import Lost, One, Shift, State
from effkern.convert.trace import Site, Trace, is_mark

__all__ = ["Plan", "find_plan"]

#: Places that are compared when one to recentre at is chosen.
MOST_PLACES = 256


@dataclass
class Plan:
    """What to change."""

    converted: list[NormModule] = field(default_factory=list)
    left: dict[str, str] = field(default_factory=dict)  # module -> why its norms stay
    met: set[Node] = field(default_factory=set)  # of them, those that could be converted alone
    edits: dict[Node, Key] = field(default_factory=dict)  # parameter -> how it is centred
    ones: list[Node] = field(default_factory=list)  # scales that become one
    sites: dict[Site, Key] = field(default_factory=dict)  # where to recentre, and along what
    serves: dict[Site, int] = field(default_factory=dict)  # norms that a place serves


@dataclass(frozen=True)
class Conflict:
    """An edit that is seen where it must not be."""

    module: str
    reason: str
    sources: int


def find_plan(trace: Trace, outputs: Sequence[str], *, drop: bool = False) -> Plan:
    """Edits that turn layer norms into RMSNorms and leave the named outputs as they are.

    Args:
        trace: of the model.
        outputs: those that must stay equal.
        drop: whether every centred value is to lose its last feature as well (Pre-CRMSNorm).

    Raises:
        NotConvertible: if there is none, or a norm of a residual stream would stay.
    """
    return _Search(trace, outputs, drop).run()


class _Search:
    def __init__(self, trace: Trace, outputs: Sequence[str], drop: bool) -> None:
        self.trace = trace
        self.outputs = outputs
        self.drop = drop
        self.demands = Demands(trace)
        self.groups = find_norms(trace)
        self.banned: dict[Node | Site, Conflict] = {}
        for node in trace.parameters:
            other = trace.overlaps(node)
            if other is not None:
                reason = f"{trace.parameters[node]} shares its storage with {other}"
                self.banned[node] = Conflict("", reason, 0)
        self.dropped: dict[str, str] = {}  # norms that the forward walk does not prove, and why
        self.marks: dict[Site, list[Node]] = {}
        for node in trace.graph.nodes:
            if is_mark(node):
                self.marks.setdefault(trace.sites[node.args[1]], []).append(node)

    def run(self) -> Plan:
        """The plan that the forward walk finds nothing against."""
        if not self.groups:
            raise NotConvertible("", self._no_norms())
        while True:
            plan = self._propose()
            conflicts = self._walk_forward(plan)
            if not conflicts:
                break
            self._give_up(plan, conflicts)
        self._refuse(plan)
        return plan

    def _no_norms(self) -> str:
        names = {name_of(node) for node in self.trace.graph.nodes}
        if any("rms_norm" in name for name in names) or (
            "aten::mean" in names and (names & {"aten::rsqrt", "aten::sqrt"})
        ):
            return "it has no layer norm over a last dimension; it seems to use RMSNorm already"
        return "it has no layer norm over a last dimension"

    # ---- backward ----

    def _failure(self, key: Key) -> str | None:
        """Why a demand cannot be met at this value itself; None where it can, or children must."""
        demand = self.demands[key]
        if demand.failure is not None:
            return demand.failure
        if demand.edit or demand.ones is not None:
            parameter = key.node if demand.edit else demand.ones
            assert parameter is not None
            if parameter in self.banned:
                return self.banned[parameter].reason
            wanted = self.uses.setdefault(parameter, key if demand.edit else None)
            if wanted != (key if demand.edit else None):
                return f"{self.trace.parameters[parameter]} would have to be centred in two ways"
        return None

    def _propose(self) -> Plan:
        """What the norms demand, with places to recentre at where that cannot be met."""
        self.uses: dict[Node, Key | None] = {}
        roots = {group.path: [self.demands.of(n) for n in group.norms] for group in self.groups}
        for path in self.dropped:
            del roots[path]
        order = self.demands.below([key for keys in roots.values() for key in keys], set())
        reasons = {key: reason for key in order if (reason := self._failure(key)) is not None}
        cut: set[Key] = set()
        while True:
            met = self._met(order, reasons, cut)
            unmet = {path: keys for path, keys in roots.items() if not all(met[k] for k in keys)}
            place = self._best_place(order, reasons, cut, met, unmet) if unmet else None
            if place is None:
                break
            cut |= place
        plan = Plan(left=dict(self.dropped))
        for group in self.groups:
            if group.path in self.dropped:
                continue
            if group.path not in unmet:
                plan.converted.append(group)
            else:
                below = self.demands.below(roots[group.path], cut)
                plan.left[group.path] = self._why_unmet(below, reasons, cut)
                plan.met |= {norm.node for norm in group.norms if met[self.demands.of(norm)]}
        used = self.demands.below([k for g in plan.converted for k in roots[g.path]], cut)
        for key in used:
            demand = self.demands[key]
            if key in cut:
                site = self.trace.sites[key.node.args[1]]  # type: ignore[index]
                plan.sites[site] = key
                plan.serves[site] = sum(
                    key in self.demands.below(roots[group.path], cut) for group in plan.converted
                )
                continue
            if demand.edit:
                plan.edits[key.node] = key
            if demand.ones is not None and demand.ones not in plan.ones:
                plan.ones.append(demand.ones)
        return plan

    def _why_unmet(self, below: list[Key], reasons: dict[Key, str], cut: set[Key]) -> str:
        """Why demands cannot be met: first what the forward walk found, then the lowest failure."""
        for key in below:
            site = self.trace.sites[key.node.args[1]] if is_mark(key.node) else None  # type: ignore[index]
            conflict = self.banned.get(key.node) or (self.banned.get(site) if site else None)
            if conflict is not None:
                return conflict.reason
        return next(reasons[key] for key in below if key in reasons and key not in cut)

    def _met(self, order: list[Key], reasons: dict[Key, str], cut: set[Key]) -> dict[Key, bool]:
        """For each demand, whether it is met by edits and by recentring at the cut."""
        met: dict[Key, bool] = {}
        for key in order:  # children lie earlier in the graph
            met[key] = key in cut or (
                key not in reasons and all(met[child] for child in self.demands[key].children)
            )
        return met

    def _best_place(
        self,
        order: list[Key],
        reasons: dict[Key, str],
        cut: set[Key],
        met: dict[Key, bool],
        unmet: dict[str, list[Key]],
    ) -> set[Key] | None:
        """The place that lets most norms be converted; None if it is not two.

        Of equals the last: what comes before it, such as dropout on embeddings or embeddings that a
        caller passes, then does not matter. Where no place lets two norms be converted by itself,
        the first that two need.
        """
        open_below = {path: set(self._open_below(keys, cut, met)) for path, keys in unmet.items()}
        found: tuple[int, set[Key]] | None = None
        shared: set[Key] | None = None
        tried = 0
        for key in order:
            if met[key] or not self._may_recentre(key):
                continue
            serves = sum(key in below for below in open_below.values())
            if serves < 2:
                continue
            site = self.trace.sites[key.node.args[1]]  # type: ignore[index]
            place = {
                key._replace(node=mark, axis=self._axis_at(mark, key)) for mark in self.marks[site]
            }
            place = {k for k in place if k in met}
            shared = shared or place
            now = self._met(order, reasons, cut | place)
            gained = sum(all(now[k] for k in keys) for keys in unmet.values())
            if gained >= 2 and (found is None or gained >= found[0]):
                found = gained, place
            tried += 1
            if tried == MOST_PLACES:
                break
        return found[1] if found is not None else shared

    def _open_below(self, keys: list[Key], cut: set[Key], met: dict[Key, bool]) -> list[Key]:
        """The unmet demands below these."""
        stop = cut | {key for key, done in met.items() if done}
        return [key for key in self.demands.below(keys, stop) if not met[key]]

    def _may_recentre(self, key: Key) -> bool:
        if not is_mark(key.node) or key.scale is not None or not key.axis.whole:
            return False
        site = self.trace.sites[key.node.args[1]]  # type: ignore[index]
        return site not in self.banned

    def _axis_at(self, mark: Node, key: Key) -> Axis:
        """The axis at another call's mark of the same place: as many dimensions from the right."""
        dims, other = (node.meta["val"].dim() for node in (key.node, mark))
        return key.axis._replace(dim=key.axis.dim + other - dims)

    # ---- forward ----

    def _walk_forward(self, plan: Plan) -> list[Conflict]:
        """Follow every edit through the graph; what stands against the plan."""
        trace = self.trace
        self.numbered: list[Node | Site] = [*plan.edits, *plan.ones, *plan.sites]
        bits = {source: 1 << i for i, source in enumerate(self.numbered)}
        tied = {trace.parameters[n]: n for n in (*plan.edits, *plan.ones)}
        norms = {norm.node: norm for group in plan.converted for norm in group.norms}
        states: dict[Node, State] = {}
        for node in trace.graph.nodes:
            if node.op == "placeholder":
                source = node if node in bits else None
                if source is None and node in trace.parameters:
                    names = trace.aliases(node) & tied.keys()
                    source = tied[min(names)] if names else None
                states[node] = self._edited(plan, source, bits)
            elif node.op == "call_function":
                if node in norms:
                    state = transfer_norm(norms[node], states)
                else:
                    state = (transfer_dropped if self.drop else transfer)(node, states)
                if is_mark(node):
                    state = self._recentred(plan, node, state, bits)
                states[node] = state
            else:
                states[node] = None
        return self._conflicts(plan, states)

    def _edited(self, plan: Plan, source: Node | None, bits: dict[Node | Site, int]) -> State:
        if source is None:
            return None
        if source in plan.edits:
            key = plan.edits[source]
            return Shift(key.axis, key.features, True, key.scale, bits[source])
        return One(source, bits[source])

    def _recentred(
        self, plan: Plan, node: Node, state: State, bits: dict[Node | Site, int]
    ) -> State:
        site = self.trace.sites[node.args[1]]  # type: ignore[index]
        key = plan.sites.get(site)
        if key is None:
            return state
        axis = self._axis_at(node, key)
        if self.drop and state is not None:
            # without its last feature a row's mean is not zero: this is no place to recentre at
            return Lost(node, bits[site])
        if isinstance(state, Lost):
            return state
        before = 0 if state is None else state.sources
        plain = state is None or (
            isinstance(state, Shift) and state.axis == axis and state.scale is None
        )
        if not plain or node.meta["val"].shape[axis.dim] != key.features:
            return Lost(node, before | bits[site])
        return Shift(axis, key.features, True, None, before | bits[site])

    def _conflicts(self, plan: Plan, states: dict[Node, State]) -> list[Conflict]:
        found: list[Conflict] = []

        def must_be_unchanged(node: Node, what: str) -> None:
            state = states[node]
            if isinstance(state, Lost):
                op = name_of(state.node).removeprefix("aten::")
                where = self.trace.module(state.node)
                found.append(Conflict(where, f"{op} reads the un-normalised stream", state.sources))
            elif state is not None:
                found.append(
                    Conflict(
                        self.trace.module(node),
                        f"{what} is the un-normalised stream; name the outputs that matter "
                        "(outputs=...) if it is not among them",
                        state.sources,  # type: ignore[union-attr]
                    )
                )

        for name, node in self.trace.outputs.items():
            if name in self.outputs:
                must_be_unchanged(node, f"output {name!r}")
        for name, node in self.trace.mutated:
            must_be_unchanged(node, f"what is written to {name}")
        for group in plan.converted:
            for norm in group.norms:
                state = states[norm.value]
                proved = isinstance(state, Shift) and state.centred and state.axis == norm.axis
                if not proved:
                    edits = 0 if state is None else state.sources
                    found.append(Conflict(group.path, "what it reads is not centred", edits))
        return found

    def _give_up(self, plan: Plan, conflicts: list[Conflict]) -> None:
        """Ban the edits that a conflict depends on; leave a norm that is not proved without any."""
        for conflict in conflicts:
            if conflict.sources == 0:
                self.dropped[conflict.module] = conflict.reason
            for i, source in enumerate(self.numbered):
                if conflict.sources >> i & 1:
                    self.banned.setdefault(source, conflict)

    # ---- refusing ----

    def _refuse(self, plan: Plan) -> None:
        for group in self.groups:
            if group.path in plan.left and any(
                n.node not in plan.met and self._reads_residual_sum(n.value) for n in group.norms
            ):
                raise NotConvertible(
                    group.path, f"this norm of a residual stream stays: {plan.left[group.path]}"
                )
        if not plan.converted:
            path, reason = next(iter(plan.left.items()))
            raise NotConvertible(path, f"no layer norm can be converted: {reason}")

    def _reads_residual_sum(self, value: Node) -> bool:
        """Whether a value is x + f(x), seen through what keeps a row together."""
        seen: set[Node] = set()
        pending = [value]
        while pending:
            node = pending.pop()
            if node in seen or node.op != "call_function":
                continue
            seen.add(node)
            name = name_of(node)
            if name in ("aten::add", "aten::sub"):
                operands = [x for x in node.args[:2] if isinstance(x, Node)]
                if len(operands) == 2:
                    first, second = operands
                    if self._leads_to(first, second) or self._leads_to(second, first):
                        return True
                    pending += operands
            elif name in _ROWS:
                pending += node.all_input_nodes
        return False

    def _leads_to(self, start: Node, end: Node) -> bool:
        """Whether ``end`` depends on ``start``, seen through marks."""
        while is_mark(start):
            start = start.args[0]  # type: ignore[assignment]
        if start.op != "call_function":
            return False
        seen: set[Node] = set()
        pending = [end]
        lowest = self.trace.position[start]
        while pending:
            node = pending.pop()
            if node is start:
                return True
            if node not in seen and self.trace.position[node] > lowest:
                seen.add(node)
                pending += node.all_input_nodes
        return False


_ROWS = {
    "effkern_trace::mark", "getitem", "aten::dropout", "aten::clone", "aten::contiguous",
    "aten::to", "aten::_to_copy", "aten::view", "aten::reshape", "aten::flatten", "aten::unflatten",
    "aten::squeeze", "aten::unsqueeze", "aten::permute", "aten::transpose", "aten::slice",
    "aten::select", "aten::split", "aten::chunk", "aten::cat", "aten::roll", "aten::pad",
    "aten::mean", "aten::index", "aten::expand",
}  # fmt: skip
