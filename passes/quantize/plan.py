"""Which nodes run in integers, and which tensors share a scale.

The weighted operators of the target start it. A tensor that one of them reads has to be integer, and so does
the output of one that needs a requantized result to have an integer kernel at all. Operators in between
follow where their inputs are integer anyway and somebody wants an integer from them; everything else stays in
floating point. Nothing is guessed: what a node lacks is the reason given for skipping it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import networkx as nx
import numpy as np

from onnxslim.calibration.collect import is_mask
from onnxslim.calibration.observers import Range
from onnxslim.engine.base import Log
from onnxslim.ir.graph import Constant, Node, Tensor, Variable, captures, producer
from onnxslim.ir.model import DEFAULT_DOMAINS, Model
from onnxslim.ops import OpSpec, Role, Trait, has, spec_of, view_of
from onnxslim.ops.layers import Convolution
from onnxslim.ops.layouts import IntegerLayout
from onnxslim.passes.fold.weights import why_no_weight
from onnxslim.passes.quantize.choices import Refusal
from onnxslim.passes.quantize.recurrent import NO_RANGES, is_recurrent, unfit
from onnxslim.passes.quantize.tables import SHOWN


@dataclass
class Plan:
    """What is to be quantized.

    Attributes:
        linear: weighted operators with an integer kernel, in order.
        stored: weighted operators that stay in floating point and only store their weight as integers.
        tables: lookups of tables that are stored as integers of one size or another.
        recurrent: recurrent layers whose data and state become integers as they come.
        last: ids of those of them that are the last matrix product before an output.
        followers: operators that run in integers between them, in order.
        tensors: tensors that get a Q/DQ pair, by id, in order of appearance.
        scales: for each of them, the tensors whose values set its range (more than one if they share).
        own: the same if tensors that are joined keep scales of their own.
        labels: how messages name the nodes that run in integers, by id; unnamed ones go by their output,
            which may get another name.
        limits: largest magnitude of a code of the weight of a node that runs in integers or stores it so, by
            id.
    """

    linear: list[Node] = field(default_factory=list)
    stored: list[Node] = field(default_factory=list)
    tables: list[Node] = field(default_factory=list)
    recurrent: list[Node] = field(default_factory=list)
    last: set[int] = field(default_factory=set)
    followers: list[Node] = field(default_factory=list)
    tensors: dict[int, Tensor] = field(default_factory=dict)
    scales: dict[int, tuple[Tensor, ...]] = field(default_factory=dict)
    own: dict[int, tuple[Tensor, ...]] = field(default_factory=dict)
    labels: dict[int, str] = field(default_factory=dict)
    limits: dict[int, int] = field(default_factory=dict)

    @property
    def integer(self) -> set[int]:
        """Ids of all nodes that run in integers."""
        dynamic = [node for node in self.stored if has(node, Trait.INTEGER)]
        dynamic += [node for node in self.recurrent if not is_recurrent(node)]
        return {id(node) for node in (*self.linear, *self.followers, *dynamic)}

    def sources(self) -> list[str]:
        """Names of the tensors to calibrate: those whose values set a range, constants left out."""
        names = (t.name for group in self.scales.values() for t in group if isinstance(t, Variable))
        return list(dict.fromkeys(names))


class Planner:
    """Makes the plan for one model.

    Args:
        model: with shapes inferred; not modified.
        rules: of the target.
        log: where the reasons go.
        refuse: why the caller wants a node to stay in floating point; None where it does not.
        kept: labels of nodes that would lose too much in integers, with what to say of them; where a target
            runs a matrix product as fast that way, its weight is stored as integers all the same.
        weights_only: whether that is all that is wanted.
        sharing: whether a weight that several nodes read may be stored so.
        classifier: whether the last matrix product before an output is quantized too.
        irregular: of tensors whose values no integer range should cover, by name, what they hold.
        trained: whether a weighted node was trained to run in integers.
        looks_up: whether a node looks up a table whose size of integers is to be chosen.
        recurs: whether recurrent layers are to turn their data into integers as they come.
        coded: names of the constants that are stored as integers already, however small they are.
    """

    def __init__(
        self,
        model: Model,
        rules: IntegerLayout,
        log: Log,
        *,
        refuse: Refusal = lambda node: None,
        kept: Mapping[str, str] | None = None,
        weights_only: bool = False,
        sharing: bool = False,
        classifier: bool = False,
        irregular: Mapping[str, str] | None = None,
        trained: Callable[[Node], bool] = lambda node: False,
        looks_up: Callable[[Node], bool] = lambda node: False,
        recurs: bool = False,
        coded: Collection[str] = (),
    ) -> None:
        self._nodes = model.graph.nodes
        self._rules = rules
        self._refuse = refuse
        self._kept = kept or {}
        self._weights_only = weights_only
        self._sharing = sharing
        self._outputs = {id(tensor) for tensor in model.graph.outputs}
        # What a body reads stays what it is: the plan does not look inside.
        self._captured = {id(t) for node in self._nodes if node.bodies for t in captures(node)}
        self._log = log
        self._irregular = irregular or {}
        self._trained = trained
        self._looks_up = looks_up
        self._recurs = recurs
        self._coded = coded
        self._sealed = {id(self._result(node)) for node in self._nodes if _is_misread(node)}
        self._seal_moved()
        self._classifiers = set[int]() if classifier else self._found_classifiers()

    def plan(self) -> Plan:
        """The nodes to run in integers and the tensors to quantize."""
        plan = Plan()
        plan.linear = [node for node in self._nodes if self._is_linear(node)]
        plan.stored = [node for node in self._nodes if self._is_stored(node)]
        plan.tables = [node for node in self._nodes if self._looks_up(node) and self._may_look_up(node)]
        plan.recurrent = [node for node in self._nodes if self._is_recurrent(node)]
        plan.last = self._classifiers
        available = self._required(plan.linear)
        candidates = self._forward(available, plan.linear)
        plan.followers = self._wanted(candidates, plan.linear)
        wanted = {id(node) for node in plan.followers}
        for node in candidates:
            if id(node) not in wanted:
                self._log.skip(node.label, "nothing that runs in integers reads it")
        for tensor in self._quantized(plan):
            plan.tensors[id(tensor)] = tensor
        self._share_scales(plan)
        everything = (*plan.linear, *plan.stored, *plan.followers, *plan.tables, *plan.recurrent)
        plan.labels = {id(node): node.label for node in everything}
        return plan

    def _seal_moved(self) -> None:
        """Seal what is moved from a tensor that a body reads: ONNX Runtime moves a Q up to that tensor, and
        does not mind that the body then reads rounded and clipped values.
        """
        moved = set(self._captured)
        for node in self._nodes:
            if is_movable(node) and id(node.inputs[0]) in moved and producer(node.inputs[0]) is not None:
                results = {id(tensor) for tensor in node.outputs}
                moved |= results
                self._sealed |= results

    # Weighted operators

    def _is_linear(self, node: Node) -> bool:
        spec = _standard(node)
        if spec is None or spec.role is not Role.LINEAR:
            return False
        if self._weights_only:
            if reason := self._unstored(node):
                self._log.skip(node.label, reason)
            return False
        reason = self._unfit(node) or self._unfit_weight(node) or self._narrow(node)
        if reason:
            self._log.skip(node.label, reason)
        return reason is None

    def _unfit(self, node: Node) -> str | None:
        """Why a node cannot run in integers, whatever is around it."""
        spec = spec_of(node)
        if spec.role is not Role.MOVE and node.op not in self._rules.kernels:
            return f"the target has no integer kernel for {node.op}"
        if node.op in self._rules.slow:
            return f"the target runs {node.op} faster in floating point"
        if reason := self._refuse(node) or self._kept.get(node.label):
            return reason
        if self._is_quantized(node):
            return "it is quantized already"
        for rule in (spec.unfit, spec.misread):
            if rule and (reason := rule(node)):
                return reason
        data = [node.inputs[index] for index in spec.data_inputs(node)]
        if any(id(tensor) in self._sealed for tensor in data):
            return "ONNX Runtime would misplace a QuantizeLinear on what it reads"
        types = {tensor.dtype for tensor in (*data, *node.outputs[:1])}
        if types - {_FLOAT32}:
            told = sorted("of a type that is not known" if t is None else str(t) for t in types - {_FLOAT32})
            return f"its data is not float32 but {', '.join(told)}"
        if any(isinstance(tensor, Constant) and is_mask(tensor.values) for tensor in data):
            return "a constant it reads holds infinities or mask values"
        for tensor in (*data, self._result(node), *node.outputs):
            if tensor.name in self._irregular:
                return f"its data holds {self._irregular[tensor.name]}"
        return None

    def _is_quantized(self, node: Node) -> bool:
        """Whether a node reads what comes back from integers, or makes what becomes integers."""
        makers = (producer(tensor) for tensor in node.inputs)
        readers = (reader for tensor in (*node.outputs, self._result(node)) for reader in tensor.outputs)
        return any(has(maker, Trait.DEQUANTIZES) for maker in makers) or any(
            has(reader, Trait.QUANTIZES) for reader in readers
        )

    def _unfit_weight(self, node: Node) -> str | None:
        weight = node.inputs[1]
        if not isinstance(weight, Constant):
            return why_no_weight(node)
        if reason := self._unfit_values(weight):
            return reason
        if id(weight) in self._captured or any(reader.bodies for reader in weight.outputs):
            return "a body reads its weight too, in floating point: it would be stored twice"
        if isinstance(node.inputs[0], Constant):
            return "its data is a constant"
        bias = node.input(2)
        if bias is not None and not isinstance(bias, Constant):
            return "its bias is computed, not stored"
        if id(node) in self._classifiers:
            return LAST
        return None

    def _is_recurrent(self, node: Node) -> bool:
        """Whether a recurrent layer can run in integers, and may."""
        if not is_recurrent(node):
            return False
        why_not = self._refuse(node) or unfit(node, self._rules) or (None if self._recurs else NO_RANGES)
        if why_not:
            self._log.skip(node.label, why_not)
        return why_not is None

    def _may_look_up(self, node: Node) -> bool:
        """Whether a table may be integers."""
        shown = id(node.inputs[0]) in self._outputs
        if shown:
            self._log.skip(node.label, SHOWN)
        return not shown and self._refuse(node) is None

    def _is_stored(self, node: Node) -> bool:
        """Whether the weight of a matrix product left in floating point is worth storing as integers."""
        wanted = id(node) in self._classifiers or self._stores(node)
        return wanted and self._unstored(node) is None

    def _unstored(self, node: Node) -> str | None:
        """Why a weight is not stored as integers where its node stays in floating point."""
        if reason := self._refuse(node):
            return reason
        weight = node.inputs[1]
        if not isinstance(weight, Constant):
            return why_no_weight(node)
        if id(node) not in self._classifiers and not self._stores(node):
            return self._kept.get(node.label)
        if weight.nbytes < MIN_STORED_BYTES and weight.name not in self._coded:
            return f"its weight takes less than {MIN_STORED_BYTES} bytes"
        if len(weight.outputs) > 1 and not self._sharing:
            return "other nodes read its weight too"
        if id(weight) in self._outputs and not self._sharing:
            return SHOWN
        return self._unfit_values(weight)

    def _stores(self, node: Node) -> bool:
        """Whether a matrix product kept out of integers reads its weight as integers and loses no time by it.

        Behind integers ONNX Runtime would run it in integers after all.
        """
        spec = _standard(node)
        if node.label not in self._kept or spec is None or node.op not in self._rules.weight_only:
            return False
        if isinstance(node.inputs[0], Constant):
            return False
        maker = producer(node.inputs[0])
        while maker is not None and spec_of(maker).role is Role.MOVE:
            maker = producer(maker.inputs[0])
        return maker is None or spec_of(maker).role is Role.FLOAT or maker.label in self._kept

    @staticmethod
    def _unfit_values(weight: Constant) -> str | None:
        if len(weight.shape) < 2:
            return "its weight is a vector"
        if weight.dtype != np.float32:
            return f"its weight is not float32 but {weight.dtype}"
        if not np.isfinite(weight.values).all():
            return "its weight holds values that are not finite"
        if not weight.size:
            return "its weight is empty"
        return None

    def _narrow(self, node: Node) -> str | None:
        """Why a convolution over very few channels is left alone."""
        layer = view_of(node)
        if not isinstance(layer, Convolution) or layer.channelwise or self._trained(node):
            return None
        if layer.inputs >= self._rules.min_channels:
            return None
        return f"it has few input channels ({layer.inputs}) and is faster in floating point"

    def _found_classifiers(self) -> set[int]:
        """Ids of the matrix products whose results reach an output through nothing but simple operators.

        And reach no other weighted operator: what is given back as a state or a cache, and used too, is no
        decision.
        """
        found: set[int] = set()
        reached = set(self._outputs)
        used: set[int] = set()
        for node in reversed(self._nodes):
            spec = spec_of(node)
            goes_on = any(id(tensor) in used for tensor in node.outputs)
            if goes_on or spec.role is Role.LINEAR:
                used.update(id(tensor) for tensor in node.inputs)
            if not any(id(tensor) in reached for tensor in node.outputs):
                continue
            if spec.role is Role.LINEAR:
                if spec.classifies and not goes_on and not self._trained(node):
                    found.add(id(node))
            elif spec.role is not Role.FLOAT or Trait.KEEPS_ORDER in spec.traits:
                reached.update(id(tensor) for tensor in node.inputs if isinstance(tensor, Variable))
        return found

    # Tensors and the operators in between

    def _required(self, linear: Iterable[Node]) -> set[int]:
        """Ids of tensors that are integer for the sake of weighted operators alone."""
        found: set[int] = set()
        for node in linear:
            found.add(id(node.inputs[0]))
            if self._requantized(node):
                found.add(id(self._result(node)))
        return found

    def _requantized(self, node: Node) -> bool:
        """Whether a weighted operator has an integer kernel only if its result is integer too.

        With a Relu behind it, every one of them does: ONNX Runtime gives up on it unless there is a Q.
        """
        if self._rules.bits is not None:
            return False
        return spec_of(node).requantized or self._result(node) is not node.outputs[0]

    def _result(self, node: Node) -> Variable:
        """The tensor behind the Relu or Clip that disappears in the range of a node's result.

        What is moved or joined keeps the scale of where it came from, and with it values that a Relu cuts.
        """
        tensor = node.outputs[0]
        spec = spec_of(node)
        if spec.role is Role.MOVE or Trait.JOINS in spec.traits:
            return tensor
        while id(tensor) not in self._outputs | self._captured and len(tensor.outputs) == 1:
            clamp = tensor.outputs[0]
            if spec_of(clamp).role is not Role.CLAMP or not _holds_zero(clamp):
                break
            tensor = clamp.outputs[0]
        return tensor

    def _forward(self, available: set[int], linear: Iterable[Node]) -> list[Node]:
        """Operators that could run in integers because what they read is integer already."""
        candidates: list[Node] = []
        if self._rules.bits is not None:
            return candidates
        reach = set(available)
        made = {id(self._result(node)) for node in linear}
        for node in self._nodes:
            spec = _standard(node)
            if spec is None or spec.role not in (Role.KERNEL, Role.MOVE):
                continue
            data = [node.inputs[index] for index in spec.data_inputs(node)]
            if not any(id(tensor) in reach for tensor in data):
                continue
            reason = self._unfit(node)
            if reason is None and Trait.SEARCHES in spec.traits and id(data[0]) not in made:
                reason = "what it reads is made in floating point, where it is faster"
            if reason:
                self._log.skip(node.label, reason)
                continue
            candidates.append(node)
            results = (self._result(node), *node.outputs[: 1 if spec.role is Role.KERNEL else None])
            made.update(id(tensor) for tensor in results)
            reach.update(id(tensor) for tensor in results)
        return candidates

    def _wanted(self, candidates: Sequence[Node], linear: Iterable[Node]) -> list[Node]:
        """Those of the candidates whose result is read by something that runs in integers."""
        integer = {id(node) for node in linear}
        kept: list[Node] = []
        for node in reversed(candidates):
            results = [self._result(node), *node.outputs[1:]]
            if any(id(reader) in integer for tensor in results for reader in tensor.outputs):
                integer.add(id(node))
                kept.append(node)
        return kept[::-1]

    def _quantized(self, plan: Plan) -> Iterable[Tensor]:
        """Tensors with a Q/DQ pair, each once, in the order in which nodes meet them."""
        integer = plan.integer
        found: dict[int, Tensor] = {}
        for node in self._nodes:
            if id(node) not in integer:
                continue
            spec = spec_of(node)
            for index in spec.data_inputs(node)[: 1 if spec.role is Role.LINEAR else None]:
                found.setdefault(id(node.inputs[index]), node.inputs[index])
            result = self._result(node)
            if spec.role is not Role.LINEAR or self._requantized(node):
                found.update({id(tensor): tensor for tensor in (result, *_more_results(node))})
            elif any(id(reader) in integer for reader in result.outputs):
                found.setdefault(id(result), result)
        return found.values()

    def _share_scales(self, plan: Plan) -> None:
        """Tie what must be on one scale, as it is only moved, and what had better be, as it is joined."""
        moved, joined = nx.Graph(), nx.Graph()
        derived: set[int] = set()
        for ties in (moved, joined):
            ties.add_nodes_from(plan.tensors)
        for node in plan.followers:
            spec = spec_of(node)
            if spec.role is Role.MOVE or Trait.JOINS in spec.traits:
                results = [id(self._result(node)), *(id(tensor) for tensor in _more_results(node))]
                derived.update(results)
                read = [id(node.inputs[index]) for index in spec.data_inputs(node)]
                edges = [(read[0], other) for other in (*read[1:], *results)]
                joined.add_edges_from(edges)
                if spec.role is Role.MOVE:
                    moved.add_edges_from(edges)
        # What is only moved or joined has no values of its own to look at.
        plan.scales = _sources(joined, plan.tensors, derived)
        plan.own = _sources(moved, plan.tensors, derived)


def _sources(
    ties: nx.Graph[int], tensors: Mapping[int, Tensor], derived: Collection[int]
) -> dict[int, tuple[Tensor, ...]]:
    """For each tensor those it is tied to, itself included, that have values of their own."""
    order = {key: place for place, key in enumerate(tensors)}
    found: dict[int, tuple[Tensor, ...]] = {}
    for group in nx.connected_components(ties):
        members = sorted(group, key=order.__getitem__)
        sources = tuple(tensors[key] for key in members if key not in derived)
        found.update(dict.fromkeys(members, sources))
    return found


def _standard(node: Node) -> OpSpec | None:
    return spec_of(node) if node.domain in DEFAULT_DOMAINS else None


def is_movable(node: Node) -> bool:
    """Whether ONNX Runtime takes a Q from behind this node to its front, or drops the node before a Q."""
    spec = spec_of(node)
    return Trait.COPIES in spec.traits or spec.role in (Role.CLAMP, Role.MOVE)


def _is_misread(node: Node) -> bool:
    misread = spec_of(node).misread
    return misread is not None and misread(node) is not None


def _more_results(node: Node) -> list[Variable]:
    """Data outputs after the first, such as those of Split; the positions that MaxPool found are none."""
    return [tensor for tensor in node.outputs[1:] if tensor.name and tensor.dtype == node.outputs[0].dtype]


def exceeds(tensor: Tensor, values: Range) -> bool:
    """Whether a range holds values that the Relu or Clip which makes a tensor does not let through."""
    maker = producer(tensor)
    limits = spec_of(maker).limits if maker is not None else None
    found = limits(maker) if limits and maker is not None else None
    return found is not None and (values.low < found[0] or values.high > found[1])


def _holds_zero(clamp: Node) -> bool:
    """Whether a Relu or Clip keeps zero, as every integer range does; its limits must be known."""
    limits = spec_of(clamp).limits
    found = limits(clamp) if limits else None
    return found is not None and found[0] <= 0.0 <= found[1]


_FLOAT32 = np.dtype(np.float32)
LAST = "the final classifier stays in floating point (option `classifier`)"
# Below this, scales and names take what the integers save.
MIN_STORED_BYTES = 4096
