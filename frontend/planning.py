"""A model for the planner: traced for any micro-batch, its layers priced, and a layout made a `Plan`.

    model = Planned.of(step, types)                 # of a train_step, a module that gives a loss, or a function
    prices = ModelPrices(model, cluster)
    found = search(prices, Machine(64, 24e9, cluster))
    plan_of(model, prices, found.layouts[0]).save("plan.json")
"""

from __future__ import annotations

import fnmatch
import functools
import inspect
import itertools
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from ..distributed.cost import Cluster, Link
from ..distributed.layouts import Chain as Units
from ..distributed.layouts import Costs, Layout, Machine, Unit
from ..distributed.mesh import Mesh
from ..distributed.planner import Choices, Found, best_cut, plan
from ..distributed.plans import Plan
from ..distributed.stages import Chain, chain_at, chain_of, regions, unwrapped
from ..ir.errors import ArgumentsError, TreadleError
from ..ir.graph import Graph
from ..ir.pipeline import Pipeline
from ..ir.types import TensorType
from . import functions as F
from . import tree
from .nn.module import Module
from .optim import base
from .pipeline_stages import LossGraph
from .pipelined import FORWARD_TIDY
from .pricing import Annotator, Dims, Price, Pricer, Run
from .tensor import Tensor
from .trace import Spec, leaf_type, record
from .train import TrainStep

ENOUGH = 4  # layers: with fewer, cuts where several tensors cross are looked at too


@dataclass
class Planned:
    """What is planned.

    Attributes:
        loss: a function of the batch's tensors.
        types: of the whole batch; `batch`: its examples, the first dimension of the first.
        params: what is trained; names: by `id`.
        slots: bytes of optimizer state for a byte of parameter.
        amp: mixed precision, as of `train_step`.
    """

    loss: Callable[..., Any]
    types: Sequence[TensorType]
    params: Sequence[Tensor] | None
    names: Mapping[int, str]
    slots: float = 2.0
    amp: str | None = None
    _graphs: dict[int, tuple[LossGraph, Chain]] = field(default_factory=dict)
    _ends: tuple[int, ...] | None = None

    @property
    def batch(self) -> int:
        """Examples of a step."""
        return int(self.types[0].shape[0])

    @property
    def sample(self) -> int:
        """Examples of the micro-batch whose layers are measured: few, so that it takes little time."""
        return min(self.batch, 4)

    @classmethod
    def of(cls, what: Any, types: Sequence[TensorType], modules: Sequence[Module] = (), optimizer: str = "adamw",
           amp: str | None = None) -> Planned:
        """From a training step, a module or a function of the batch that gives the loss (of other results, the mean).

        Args:
            modules: where a function's parameters get their names from.
            optimizer: its name in `td.optim`, unless a training step has one.

        Raises:
            ArgumentsError: no batch, a loss that takes other tensors, or no such optimizer.
        """
        if not types or not types[0].rank or not types[0].is_static or not types[0].shape[0]:
            raise ArgumentsError("give the type of a whole batch for each tensor, such as i64[64,1024]: its first "
                                 "dimension is split")
        _check_arguments(what, types)
        if isinstance(what, TrainStep):
            opt, own = what.opt, [what.model] if isinstance(what.model, Module) else []
            nbytes = sum(p.nbytes for p in opt.params)
            slots = sum(t.nbytes for s in opt.state for t in s.values()) / max(nbytes, 1)
            return cls(lambda *b: what.loss_fn(what.model, *b), types, opt.params, _names(own), slots,
                       amp or what._compiled.amp)
        if isinstance(what, Module):
            modules = [what]
        return cls(what, types, None, _names(modules), slots_of(optimizer), amp)

    def traced(self, examples: int) -> tuple[LossGraph, Chain]:
        """The loss of so many examples, and its layers: the same steps for every number.

        Raises:
            ArgumentsError: the model cannot be traced for it, or computes other steps then.
        """
        if examples not in self._graphs:
            self._graphs[examples] = self._trace(examples)
        return self._graphs[examples]

    def _trace(self, examples: int) -> tuple[LossGraph, Chain]:
        specs = [Spec(t.with_shape((examples, *t.shape[1:])) if t.rank and t.shape[0] == self.batch else t)
                 for t in self.types]
        try:
            graph = record(lambda *b: _scalar(self.loss(*b)), specs)
        except TreadleError as error:
            if examples == self.batch:
                raise
            raise ArgumentsError(f"the model cannot be traced for a micro-batch of {examples} of its {self.batch} "
                                 f"examples: {error}. A plan cuts the batch: take sizes from shapes") from error
        captures: dict[int, Tensor] = graph.meta["captures"]
        data = range(len(specs))
        tidy = Pipeline(FORWARD_TIDY).run(unwrapped(Pipeline(FORWARD_TIDY).run(graph), data))
        tidy.name = "loss"
        params = self.params
        if params is None:
            params = [t for i, t in captures.items() if graph.roles[i] == "parameter" and t.dtype.is_float]
        loss = LossGraph.of(tidy, len(specs), captures, params)
        if not loss.trained:
            raise ArgumentsError("the model has no parameters to train: nothing to plan")
        return loss, self._chain(loss, examples)

    def _chain(self, loss: LossGraph, examples: int) -> Chain:
        data = range(loss.batch)
        if self._ends is None:
            self._ends = _layers(loss.graph, data)
        chain = chain_at(loss.graph, data, self._ends)
        if not chain.layers:
            raise ArgumentsError("the loss does not depend on both the batch and the parameters: nothing to plan")
        first = next(iter(self._graphs.values()), (None, chain))[1]
        if chain.ops != first.ops or chain.ends != first.ends:
            raise ArgumentsError(f"for a micro-batch of {examples} examples the model computes other steps than for "
                                 "others: it cannot be planned for all of them at once")
        return chain

    def name(self, loss: LossGraph, i: int) -> str:
        """The name of a parameter by its number in the loss's graph."""
        tensor = loss.captures[i]
        return self.names.get(id(tensor), "") or str(tensor.name or f"parameter{i}")


def _check_arguments(what: Any, types: Sequence[TensorType]) -> None:
    """Raises ArgumentsError if the loss does not take so many tensors."""
    step = isinstance(what, TrainStep)
    takes, model = (what.loss_fn, (what.model,)) if step else (getattr(what, "forward", what), ())
    try:
        signature = inspect.signature(takes)
    except (TypeError, ValueError):
        return  # of what has none nothing is known before it is traced
    try:
        signature.bind(*model, *types)
    except TypeError as error:
        raise ArgumentsError(f"the loss takes {signature}, but there are types of {len(types)} tensors of a batch: "
                             f"{error}. Give one for each, such as i64[64,1024]") from None


def _scalar(result: Any) -> Any:
    """The loss: the first result that has no whole numbers; the mean of what is no scalar."""
    results = tree.flatten(result)[0]
    first = next((x for x in results if isinstance(x, Tensor) and x.dtype.is_float), results[0] if results else result)
    return first if not isinstance(first, Tensor) or first.ndim == 0 else F.mean(first)


def _names(modules: Sequence[Module]) -> dict[int, str]:
    found: dict[int, str] = {}
    for module in modules:
        for name, p in module.named_parameters():
            found.setdefault(id(p), name)
    return found


def _layers(graph: Graph, data: range) -> tuple[int, ...]:
    """Where layers end: at the narrowest crossings that give enough of them."""
    best: tuple[int, ...] = ()
    for widest in range(1, 5):
        chain = chain_of(graph, data, widest=widest)
        ends = regions(chain)
        if len(ends) > 1.5 * len(best):
            best = ends
        if len(best) >= ENOUGH:
            break
    return best


def slots_of(optimizer: str) -> float:
    """Bytes of state for a byte of parameter: 2 for AdamW, 0 for SGD without momentum ("momentum": with).

    Raises:
        ArgumentsError: there is no such optimizer.
    """
    from . import optim

    known = {name.lower(): cls for name, cls in vars(optim).items()
             if isinstance(cls, type) and issubclass(cls, base.Optimizer) and cls is not base.Optimizer}
    if optimizer.lower() == "momentum":
        return 1.0
    if optimizer.lower() not in known:
        raise ArgumentsError(f"there is no optimizer {optimizer!r}; there are: {', '.join(sorted(known))}, momentum")
    param = Tensor(np.zeros((1024,), np.float32))
    made = known[optimizer.lower()]([param], lr=1e-3)
    return float(sum(t.nbytes for slots in made.state for t in slots.values())) / float(param.nbytes)


# Prices --------------------------------------------------------------------------------------------------------------

IDEAL = Link(1e-7, 1e12)
ATTEMPTS = 4
MORE = 4  # layouts than are asked for are priced exactly
EVERYTHING = Choices()


class ModelPrices:
    """The units of a model for every size of the tensor axis and of a micro-batch.

    Args:
        cluster: what devices compute and send; the tensor axis is the innermost of the mesh.
        shard: patterns of parameter names -> a mesh axis or None for each dimension; None: found.
        factors: of measured times, for the forward and backward programs of a layer by its number (`measured.py`).
    """

    def __init__(self, model: Planned, cluster: Cluster, shard: Mapping[str, Dims] | None = None,
                 factors: Sequence[tuple[float, float]] | None = None):
        self.model, self.cluster, self.shard, self.factors = model, cluster, shard, factors
        self._pricers: dict[tuple[int, Link], Pricer] = {}
        self._runs: dict[int, list[Run] | None] = {}
        self._patterns: dict[bool, list[Run]] = {}
        self._units: dict[Any, Sequence[Unit] | None] = {}

    def _cluster(self, ranks: int, link: Link | None = None) -> Cluster:
        found = self.cluster.on(Mesh({"tensor": ranks}))
        return replace(found, links=(("tensor", link),)) if link is not None else found

    def pricer(self, examples: int, ranks: int, link: Link | None = None) -> Pricer:
        """Prices for micro-batches of so many examples."""
        cluster = self._cluster(ranks, link)
        key = examples, cluster.along("tensor")
        if key not in self._pricers:
            self._pricers[key] = Pricer(*self.model.traced(examples), cluster, self.model.amp)
        return self._pricers[key]

    def runs(self, ranks: int) -> list[Run] | None:
        """Which layers stay together and how parameters lie over so many ranks; None if nothing can be split."""
        if ranks not in self._runs:
            found = self._find(ranks)
            self._runs[ranks] = found if ranks == 1 or any(run.dims for run in found) else None
        return self._runs[ranks]

    def _find(self, ranks: int) -> list[Run]:
        """Looked for with the first number of ranks; where talking is so slow that nothing pays, as if it were fast,
        since to split may be the only way to fit."""
        per_byte = (3 + 2 * self.model.slots) / self.cluster.memory + 2 / self.cluster.link.bandwidth
        found: list[Run] = []
        for link in (None, IDEAL) if self.shard is None and ranks > 1 else (None,):
            pricer = self.pricer(self.model.batch, ranks, link)
            annotator = Annotator(pricer, ranks, per_byte, self._given(pricer) if self.shard is not None else None)
            pattern = self._patterns.get(link is None)
            found = annotator.runs() if pattern is None or self.shard is not None or ranks == 1 \
                else annotator.again(pattern)
            if any(run.dims for run in found):
                self._patterns.setdefault(link is None, found)
                break
        return found

    def _given(self, pricer: Pricer) -> Callable[[int], Dims | None]:
        table = Plan(shard=dict(self.shard or {}))

        def given(i: int) -> Dims | None:
            dims = table.of(self.model.name(pricer.loss, i), pricer.loss.graph.inputs[i].rank).dims
            return dims if any(dims) else None
        return given

    def units(self, tensor: int, examples: int, recompute: bool) -> Sequence[Unit] | None:
        """See `planner.Prices`. Between few sizes of a micro-batch figures are interpolated, and what recomputation
        changes is taken from one rank: `exact` prices the very programs."""
        key = tensor, examples, recompute
        if key not in self._units:
            found: Sequence[Unit] | None
            if examples in self._knots() and not (recompute and tensor > 1):
                found = self.exact(tensor, examples, recompute)
            elif recompute and tensor > 1:
                before, after, own = (self.units(*k) for k in (
                    (1, examples, False), (1, examples, True), (tensor, examples, False)))
                found = _recomputed(own, before, after)
            else:
                high = next(k for k in self._knots()[1:] if k > examples)
                low = max(k for k in self._knots() if k < high)
                found = _between(self.units(tensor, low, recompute), self.units(tensor, high, recompute),
                                 (examples - low) / (high - low))
            self._units[key] = found
        return self._units[key]

    def _knots(self) -> list[int]:
        """Sizes of a micro-batch for which layers are priced: 2, 16, 128..., and the whole batch. With one example a
        model may simplify to other steps; what that takes follows from the others."""
        found = [2]
        while 8 * found[-1] < self.model.batch:
            found.append(8 * found[-1])
        return [*found, self.model.batch] if self.model.batch > 2 else sorted({1, self.model.batch})

    def exact(self, tensor: int, examples: int, recompute: bool) -> tuple[Unit, ...] | None:
        """The units by the very programs that would run."""
        runs = self.runs(tensor)
        if runs is None or examples < self._knots()[0]:
            return None if runs is None else tuple(self.units(tensor, examples, recompute) or ())
        pricer = self.pricer(examples, tensor)
        prices = [pricer.price(r.first, r.end, tensor, r.dims, recompute) for r in runs]
        units = [self._unit(pricer, run, price) for run, price in zip(runs, prices)]
        # what is handed on is kept by who reads it in its backward pass
        read = [p.reads_handed or k > 0 and prices[k - 1].reads_out for k, p in enumerate(prices)]
        return tuple(replace(u, activations=u.activations + p.handed * r) for u, p, r in zip(units, prices, read))

    def _unit(self, pricer: Pricer, run: Run, price: Price) -> Unit:
        f, b = self._factors(run)
        tied = tuple((self.model.name(pricer.loss, i), n, price.gradients[i], self.model.slots * n)
                     for i, n in price.parameters.items() if self.readers[i] > 1)
        own = sum(price.parameters.values())
        return Unit(f * price.forward.seconds + price.forward.talk, b * price.backward.seconds + price.backward.talk,
                    own, sum(price.gradients.values()), self.model.slots * own, price.kept, price.work, price.output,
                    price.forward.sent + price.backward.sent, self._title(pricer, run), tied, run.end - run.first)

    @functools.cached_property
    def readers(self) -> Mapping[int, int]:
        """How many layers read a parameter, by its number."""
        pricer = self.pricer(self.model.batch, 1)
        return Counter(i for layer in range(len(pricer.chain.layers)) for i in pricer.stage(layer, layer + 1)[0].inputs
                       if i in pricer.loss.trained)

    def _factors(self, run: Run) -> tuple[float, float]:
        if self.factors is None:
            return 1.0, 1.0
        own = self.factors[run.first:run.end]
        return sum(f for f, _ in own) / len(own), sum(b for _, b in own) / len(own)

    def _title(self, pricer: Pricer, run: Run) -> str:
        """A run by the names of its parameters, as far as they agree, else by its first op."""
        stage = pricer.stage(run.first, run.end)[0]
        names = [self.model.name(pricer.loss, i) for i in stage.inputs if i in pricer.loss.trained]
        if not names:
            return str(pricer.chain.layers[run.first].name)
        heads = [n.split(".") for n in names]
        same = [a[0] for a in itertools.takewhile(lambda a: len(set(a)) == 1, zip(*heads))]
        return ".".join(same) or f"{names[0]}.."


VARYING = ("forward", "backward", "activations", "work", "output", "sent")


def _between(low: Sequence[Unit] | None, high: Sequence[Unit] | None, part: float) -> tuple[Unit, ...] | None:
    """Units for a size between two others."""
    if low is None or high is None:
        return None
    return tuple(replace(a, **{n: (1 - part) * getattr(a, n) + part * getattr(b, n) for n in VARYING})
                 for a, b in zip(low, high))


def _recomputed(own: Sequence[Unit] | None, before: Sequence[Unit] | None,
                after: Sequence[Unit] | None) -> tuple[Unit, ...] | None:
    """Units with recomputation, by what it changes on one rank; what is sent forwards is sent again."""
    if own is None or before is None or after is None:
        return None
    ratio = sum(u.forward for u in own) / max(sum(u.forward for u in before), 1e-30)
    whole = {n: sum(getattr(u, n) for u in after) / max(sum(getattr(u, n) for u in before), 1e-30)
             for n in ("forward", "activations", "work")}
    extra = sum(u.backward for u in after) - sum(u.backward for u in before)
    total = max(sum(u.forward for u in own), 1e-30)
    return tuple(replace(u, forward=u.forward * whole["forward"],
                         backward=u.backward + ratio * extra * u.forward / total,
                         activations=u.activations * whole["activations"], work=u.work * whole["work"],
                         sent=1.5 * u.sent) for u in own)


def search(prices: ModelPrices, machine: Machine, most: int = 1, choices: Choices = EVERYTHING) -> Found:
    """`planner.plan` for a model; the layouts that it finds are costed by their exact programs, and cut again.

    Raises:
        As `plan`.
    """
    memory = machine.memory
    for _ in range(ATTEMPTS):
        found = plan(prices, replace(machine, memory=memory), prices.model.batch, most + MORE, choices)
        layouts = []
        for layout in found.layouts:
            c = layout.candidate
            units = prices.exact(c.size("tensor"), c.examples, c.recompute)
            assert units is not None
            costs = Costs(c, Units(units), machine)
            bounds = best_cut(costs, machine.memory)
            if bounds is not None:
                layouts.append(costs.layout(bounds))
        if layouts:
            layouts.sort(key=lambda x: (x.seconds, x.nbytes))
            return replace(found, layouts=tuple(layouts[:most]))
        memory *= 0.95  # what seemed to fit does not: leave some room
    return found


# The plan ------------------------------------------------------------------------------------------------------------


def best_plan(step: TrainStep, batch: Sequence[Any], devices: int, memory: float, cluster: Cluster) -> Plan:
    """The fastest plan for a training step on batches like this one. Errors as of `search`."""
    types = [t for leaf in tree.flatten(tuple(batch))[0] if (t := leaf_type(leaf)) is not None]
    prices = ModelPrices(Planned.of(step, types), cluster)
    return plan_of(prices.model, prices, search(prices, Machine(devices, memory, cluster)).layouts[0])


def shard_of(model: Planned, prices: ModelPrices, layout: Layout) -> dict[str, Dims]:
    """Patterns of parameter names that say how they lie; numbers in names become stars where all agree.

    Raises:
        ArgumentsError: a parameter that is split has no name.
    """
    c = layout.candidate
    runs = prices.runs(c.size("tensor")) or []
    loss, _ = model.traced(model.batch)
    dims: dict[str, Dims] = {}
    for run in runs:
        if nameless := [i for i in run.dims if id(loss.captures[i]) not in model.names]:
            raise ArgumentsError(f"{len(nameless)} parameters that the plan splits have no names to write down: plan a "
                                 "train_step or a module, or assign the module to a name in its file")
        dims.update((model.name(loss, i), d) for i, d in run.dims.items())
    every = [model.name(loss, i) for i in sorted(loss.trained)]
    found: dict[str, Dims] = {}
    for name, d in dims.items():
        pattern = re.sub(r"(?<=\.)\d+(?=\.)", "*", name)
        same = all(dims.get(n) == d for n in every if fnmatch.fnmatchcase(n, pattern))
        found[pattern if same else name] = d
    return found


def ends_of(model: Planned, layout: Layout) -> tuple[int, ...]:
    """Where the stages of a layout end: steps of the loss's graph, all but the last."""
    _, chain = model.traced(model.batch)
    return tuple(chain.ends[b - 1] for b in layout.cut[1:])


def plan_of(model: Planned, prices: ModelPrices, layout: Layout) -> Plan:
    """A layout as what `parallelize` takes."""
    c = layout.candidate
    return Plan(shard=shard_of(model, prices, layout) if c.size("tensor") > 1 else {}, zero=c.zero,
                schedule=c.schedule, chunks=c.chunks, recompute=c.recompute,
                mesh={name: size for name, size in c.axes if size > 1}, accumulate=c.micro,
                cut=ends_of(model, layout) if c.stages > 1 else None)
