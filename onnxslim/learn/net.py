"""A graph that is computed with PyTorch, so that its weights can be learnt."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from onnxslim.ir.graph import Array, Constant, Graph, Node, captures, walk
from onnxslim.ir.graph import Tensor as Edge
from onnxslim.ir.model import Model, constant_of, is_literal
from onnxslim.learn.door import DType, Tensor, UnknownError, to_torch, torch, torch_type
from onnxslim.learn.rows import Call, Forward, ForwardRow, row_of

Values = dict[int, Tensor]
# What PyTorch, and Python on what it is given, raise for tensors that do not go together.
REFUSALS = (RuntimeError, ValueError, IndexError, TypeError, ArithmeticError, AssertionError)


def refusal(error: Exception) -> str:
    """Why PyTorch does not compute something, in its own words."""
    told = str(error).strip().partition("\n")[0].rstrip(".")
    return f"PyTorch does not compute it: {told or type(error).__name__}"


@dataclass(frozen=True)
class _Step:
    """A node, ready to be run.

    Attributes:
        call: its attributes.
        run: what computes it.
        reads, makes: ids of its tensors, 0 for those left out.
        drops: ids of tensors that nobody reads any more.
        flat: whether nothing is learnt through it.
    """

    call: Call
    run: Forward
    reads: tuple[int, ...]
    makes: tuple[int, ...]
    drops: tuple[int, ...]
    flat: bool


def unknown(model: Model) -> Iterator[tuple[Node, str]]:
    """Nodes that are not computed here, and why."""
    own = model.functions
    for node in model.nodes():
        if (node.domain, node.op) in own:
            yield node, f"it calls function '{node.op}' of the model"
        elif not is_literal(node) and row_of(node) is None:
            yield node, f"{node.op} is not known in PyTorch"


class Net:
    """Computes a model with PyTorch.

    Args:
        model: must not be edited any more.
        weights: constants to learn; parameters are in their order.
        real: what all floating-point numbers are computed in, such as torch.float32; None for the types that
            the model states.
        taps: names of tensors of the main graph that are handed out besides the outputs.
        rows: how some operators are computed instead, by name.

    Attributes:
        parameters: the weights, with gradients, in `real` or the model's type.
        kinds: the model's types of these.
        blocked: nodes through which nothing was learnt in the last run, though they read something learnt.

    Raises:
        UnknownError: PyTorch does not compute a node, or not in its type; names it.
    """

    def __init__(
        self,
        model: Model,
        weights: Sequence[Constant] = (),
        real: DType = None,
        taps: Sequence[str] = (),
        rows: Mapping[str, ForwardRow] | None = None,
    ) -> None:
        for node, why in unknown(model):
            raise UnknownError(f"node '{node.label}': {why}")
        self._model, self._real, self._weights = model, real, weights
        self._taps, self._rows = frozenset(taps), rows or {}
        self.blocked: list[Node] = []
        self._constants: Values = {}
        self.parameters: list[Tensor] = []
        self.kinds = [torch_type(constant.dtype) for constant in weights]
        for constant in weights:
            parameter = to_torch(constant.values, real)
            # Convolutions are faster where channels come last.
            layout = torch.channels_last if parameter.ndim == 4 else torch.contiguous_format
            self.parameters.append(parameter.to(memory_format=layout).requires_grad_())
            self._constants[id(constant)] = self.parameters[-1]
        self._steps: dict[int, list[_Step]] = {}
        self._compile(model.graph)
        self._settle(model.graph)

    def __call__(self, feeds: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Values of the outputs, and of what is tapped, by name.

        Args:
            feeds: tensors by name; floating-point ones of any such type.

        Raises:
            UnknownError: a node does what PyTorch does not compute; names it.
        """
        graph = self._model.graph
        self.blocked = []
        values = dict(self._constants)
        for tensor in graph.inputs:
            given = feeds.get(tensor.name)
            values[id(tensor)] = self._default(tensor.name) if given is None else self._taken(given)
        self._run(graph, values)
        wanted = [*graph.outputs, *(each for each in self._tapped() if id(each) in values)]
        return {tensor.name: values[id(tensor)] for tensor in wanted}

    def in_the_way(self, at: int) -> Node | None:
        """The first node behind a parameter through which nothing was learnt in the last run, if any."""
        blocked, seen = {id(node) for node in self.blocked}, set[int]()
        pending: list[Edge] = [self._weights[at]]
        while pending:
            for node in pending.pop(0).outputs:
                if id(node) in blocked:
                    return node
                if id(node) not in seen:
                    seen.add(id(node))
                    pending.extend(node.outputs)
        return None

    def _taken(self, given: Tensor) -> Tensor:
        real = self._real is not None and given.is_floating_point()
        return given.to(self._real) if real else given

    def _default(self, name: str) -> Tensor:
        return to_torch(self._model.graph.defaults[name].values, self._real)

    def _tapped(self) -> Iterator[Edge]:
        made = (tensor for node in self._model.graph.nodes for tensor in node.outputs)
        return (tensor for tensor in made if tensor.name in self._taps)

    # Running

    def _run(self, graph: Graph, values: Values) -> None:
        for step in self._steps[id(graph)]:
            if step.call.node.bodies:
                step.call.run = lambda body, inputs: self._body(body, inputs, values)
            values.update(self._made(step, values))
            for key in step.drops:
                values.pop(key, None)

    def _made(self, step: _Step, values: Values) -> Iterator[tuple[int, Tensor]]:
        """What a step makes, by id."""
        read = [values[each] if each else None for each in step.reads]
        try:
            made = step.run(step.call, *read)
        except (UnknownError, *REFUSALS) as error:
            node, why = step.call.node, error if isinstance(error, UnknownError) else refusal(error)
            raise UnknownError(f"node '{node.label}' ({node.op}): {why}") from error
        made = made if isinstance(made, list) else [made]
        self._note(step, read, made)
        return ((key, each) for key, each in zip(step.makes, made, strict=False) if key)

    def _body(self, graph: Graph, inputs: Sequence[Tensor], values: Values) -> list[Tensor]:
        inner = dict(values)
        inner.update((id(tensor), each) for tensor, each in zip(graph.inputs, inputs, strict=True))
        self._run(graph, inner)
        return [inner[id(tensor)] for tensor in graph.outputs]

    def _note(self, step: _Step, read: Sequence[Tensor], made: Sequence[Tensor]) -> None:
        """Take down a node that reads something learnt and lets no gradient through."""
        learnt = torch.is_grad_enabled() and any(each is not None and each.requires_grad for each in read)
        if learnt and (step.flat or not any(each.requires_grad for each in made)):
            self.blocked.append(step.call.node)

    # Made ready

    def _compile(self, outer: Graph) -> None:
        for graph in walk(outer):
            kept = {id(tensor) for tensor in graph.outputs}
            kept |= {id(tensor) for tensor in self._tapped()}
            last = _last_reads(graph)
            self._steps[id(graph)] = [
                self._step(node, tuple(last.get(id(node), set()) - kept - self._constants.keys()))
                for node in graph.nodes
                if not self._stated(node)
            ]
            for tensor in (*graph.initializers.values(), *_constants_read(graph)):
                self._store(tensor)

    def _settle(self, graph: Graph) -> None:
        """Run once what follows from constants alone in the main graph, such as codes in bits."""
        learnt = {id(each) for each in self.parameters}
        left: list[_Step] = []
        for step in self._steps[id(graph)]:
            read = [self._constants.get(each) for each in step.reads if each]
            fixed = all(each is not None and id(each) not in learnt for each in read)
            if not read or not fixed or step.call.node.bodies:
                left.append(step)
                continue
            with torch.no_grad():
                self._constants.update(self._made(step, self._constants))
        self._steps[id(graph)] = left

    def _store(self, tensor: Edge) -> None:
        if isinstance(tensor, Constant) and id(tensor) not in self._constants:
            try:
                self._constants[id(tensor)] = to_torch(tensor.values, self._real)
            except UnknownError as error:
                raise UnknownError(f"constant '{tensor.name}': {error}") from error

    def _stated(self, node: Node) -> bool:
        """Whether a node states its result, which is kept then."""
        values: Array | None = constant_of(node.outputs[0]) if is_literal(node) else None
        if is_literal(node):
            if values is None:
                raise UnknownError(f"node '{node.label}': a Constant that is sparse, or a text")
            self._constants[id(node.outputs[0])] = to_torch(values, self._real)
        return is_literal(node)

    def _step(self, node: Node, drops: tuple[int, ...]) -> _Step:
        row = self._rows.get(node.op) or row_of(node)
        assert row is not None
        reads, makes = (
            tuple(id(each) if each.name else 0 for each in tensors) for tensors in (node.inputs, node.outputs)
        )
        return _Step(Call(node, self._model.opset, self._real), row.run, reads, makes, drops, row.flat)


def _last_reads(graph: Graph) -> dict[int, set[int]]:
    """By node, the tensors made in this graph that no later one of it reads; by ids."""
    mine = {id(tensor) for node in graph.nodes for tensor in node.outputs}
    last: dict[int, int] = {}
    for node in graph.nodes:
        last.update({id(tensor): id(node) for tensor in node.outputs})
        reads = (*node.inputs, *captures(node)) if node.bodies else node.inputs
        last.update({id(tensor): id(node) for tensor in reads if id(tensor) in mine})
    found: dict[int, set[int]] = {}
    for tensor, node_id in last.items():
        found.setdefault(node_id, set()).add(tensor)
    return found


def _constants_read(graph: Graph) -> Iterator[Edge]:
    for node in graph.nodes:
        yield from node.inputs
    yield from graph.outputs
