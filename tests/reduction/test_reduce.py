"""The smallest model with a fault: faults are planted, and all that is left must be part of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import numpy as np
import onnx
import pytest

from onnxslim import Pipeline
from onnxslim.engine.editor import Editor
from onnxslim.errors import InvalidGraph, LoadError, UsageError
from onnxslim.ir import graph as ir
from onnxslim.ir.graph import Array, Node
from onnxslim.ir.model import Model, load
from onnxslim.passes import eliminate
from onnxslim.passes.eliminate import Eliminate, noop
from onnxslim.passes.predicates import Detour
from onnxslim.reduction import Reduction, reduce
from onnxslim.runtime.session import Session
from tests.helpers import FASHION, feeds_for, normal, ops, parse

CHAIN = """g (float[N,4] x, bool c) => (float[N,4] y, float[N,4] z) <float[4,4] w, float[4] b> {
  a = Relu(x) p = MatMul(a, w) q = Add(p, b) r = Tanh(q) s = Neg(r) t = Sin(s)
  u = Mul(t, a) v = Sigmoid(u) y = Add(v, x) z = Cos(v) }"""
BRANCH = """g (float[N,4] x, bool c) => (float[N,4] y) { a = Relu(x)
  d = If (c) < then_branch = t () => (float[N,4] u) { h = Neg(a) k = Tanh(h) u = Sin(k) },
               else_branch = e () => (float[N,4] v) { v = Cos(a) }> y = Abs(d) }"""
LOOP = """g (float[4] x, int64 n, bool c) => (float[4] y) { a = Relu(x)
  d = Loop (n, c, a) < body = b (int64 i, bool on, float[4] s) => (bool off, float[4] f) {
        off = Identity(on) h = Neg(s) k = Tanh(h) m = Mul(k, a) f = Sin(m) }> y = Abs(d) }"""
CALL = """<ir_version: 8, opset_import: ["" : 17, "own" : 1]>
g (float[N,4] x) => (float[N,4] y) { a = Relu(x) d = own.f(a) y = Abs(d) }
<domain: "own", opset_import: ["" : 17]> f (i) => (o) { h = Neg(i) k = Tanh(h) o = Sin(k) }"""


def chain() -> Model:
    return parse(CHAIN, {"w": normal(4, 4), "b": normal(4)})


def has(*wanted: str) -> Callable[[Model], bool]:
    return lambda model: not set(wanted) - set(ops(model))


def feeding(model: Model, first: str, second: str) -> bool:
    """Whether an operator reads what another one makes."""
    return any(
        node.op == second and any(each.inputs and each.inputs[0].op == first for each in node.inputs)
        for node in model.nodes()
    )


def reaches(model: Model, first: str, last: str) -> bool:
    """Whether an operator depends on what another one makes."""
    behind: set[int] = set()
    for node in model.nodes():
        if node.op == first or any(id(each) in behind for each in node.inputs):
            behind.update(id(each) for each in node.outputs)
            if node.op == last:
                return True
    return False


def runs(model: Model) -> bool:
    try:
        onnx.checker.check_model(model.to_proto(), full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError):
        return False
    Session(model).run(feeds_for(model))
    return True


def counts(found: Reduction) -> dict[str, int]:
    return dict(Counter(node.op for node in found.model.nodes()))


@pytest.mark.parametrize("op", ["Relu", "MatMul", "Tanh", "Sigmoid", "Add", "Cos"])
def test_one_operator_is_left(op: str) -> None:
    found = reduce(chain(), has(op))
    assert counts(found) == {op: 1}
    assert runs(found.model)
    assert found.kept == ()
    assert found.complete
    assert len(found.model.graph.outputs) == 1


def test_operators_that_are_apart_stay_both() -> None:
    assert counts(reduce(chain(), has("Relu", "Cos"))) == {"Relu": 1, "Cos": 1}


def test_what_lies_between_is_bypassed() -> None:
    found = reduce(chain(), lambda model: reaches(model, "Tanh", "Cos"))
    assert counts(found) == {"Tanh": 1, "Cos": 1}
    assert feeding(found.model, "Tanh", "Cos")
    assert runs(found.model)


def test_what_is_left_runs_whether_anybody_asks_for_that_or_not() -> None:
    assert runs(reduce(parse(BRANCH), has("If")).model)
    text = "g (float[4] x) => (float[4] y) { a = Tanh(x) b = Cast<to = 7>(a) c = Cast<to = 1>(b) y = Cos(c) }"
    found = reduce(parse(text), lambda model: reaches(model, "Tanh", "Cos"))
    assert counts(found) == {"Tanh": 1, "Cast": 2, "Cos": 1}, "floats do not stand for integers"
    assert runs(found.model)


@pytest.mark.parametrize(("text", "holder"), [(BRANCH, "If"), (CALL, "f")])
def test_branches_and_functions_take_the_place_of_what_holds_them(text: str, holder: str) -> None:
    found = reduce(parse(text), lambda model: bool({"Tanh", holder} & set(ops(model))))
    assert counts(found) == {"Tanh": 1}
    assert runs(found.model)
    assert not found.model.functions
    assert set(found.model.opsets) == {""}


@pytest.mark.parametrize("text", [BRANCH, LOOP])
def test_bodies_shrink_where_they_have_to_stay(text: str) -> None:
    model = parse(text)
    whole = next(node.op for node in model.nodes() if node.bodies)

    def inside(model: Model) -> bool:
        return any(has("Tanh")(Model(body, model.shell)) for node in model.nodes() for body in node.bodies)

    found = reduce(model, lambda model: inside(model) and runs(model))
    left = counts(found)
    assert left.pop(whole) == 1
    assert left.pop("Tanh") == 1
    assert set(left) <= {"Identity", "Cos"}, "a body has to make its outputs"


def test_what_nothing_reads_may_be_the_fault() -> None:
    text = """g (float[4] x, float[4] idle) => (float[4] y) <float[4] spare> {
      r = Relu(x) y = Neg(r) lost = Tanh(x) }"""
    model = parse(text, {"spare": normal(4)})
    found = reduce(model, lambda each: "idle" in {spec.name for spec in each.inputs()})
    assert sum(counts(found).values()) == 1
    found = reduce(model, lambda each: "spare" in each.graph.initializers)
    assert sum(counts(found).values()) == 1
    found = reduce(model, lambda each: "lost" in {node.outputs[0].name for node in each.nodes()})
    assert (counts(found), found.model.inputs()[1:]) == ({"Relu": 1, "Tanh": 1}, ())


def test_notes_go_with_the_rest() -> None:
    model = chain().with_metadata({"secret": "yes"})
    proto = model.to_proto()
    proto.producer_name = proto.graph.doc_string = proto.graph.node[3].doc_string = "secret"
    assert "secret" not in str(reduce(proto, has("Tanh")).model.to_proto())


# ----------------------------------------------------------------------------------------------- values


def test_weights_become_inputs_or_one_value_or_random() -> None:
    def weight(model: Model) -> Array | None:
        node = next((node for node in model.nodes() if node.op == "MatMul"), None)
        return None if node is None else node.constant(1)

    original, found = chain(), reduce(chain(), has("MatMul"))
    assert list(found.model.constants()) == [], "nothing asks for values"
    found = reduce(original, lambda model: weight(model) is not None)
    assert (found.kept, np.ptp(weight(found.model))) == ((), 0)  # type: ignore[arg-type]
    found = reduce(original, lambda model: (at := weight(model)) is not None and np.ptp(at) > 0)
    drawn, own = weight(found.model), weight(original)
    assert drawn is not None
    assert own is not None
    assert found.kept == ()
    assert not np.isin(drawn, own).any()
    assert 0.3 < np.square(drawn).mean() / np.square(own).mean() < 3, "about as large"
    exact = float(own[1, 2])
    found = reduce(original, lambda model: (at := weight(model)) is not None and exact in at)
    assert found.kept == ("w",), "said where it could not be helped"


def test_random_values_fit_where_the_own_ones_do() -> None:
    values = {"i": np.arange(20, dtype=np.int64) % 3, "v": np.abs(normal(4))}
    text = "g (float[3,4] x) => (float[20,4] y) { a = Gather(x, i) b = Sqrt(v) y = Mul(a, b) }"

    def differ(model: Model) -> bool:
        found = {each.name: each.values for each in model.constants()}
        return set(found) == {"i", "v"} and all(np.ptp(each) > 0 for each in found.values()) and finite(model)

    def finite(model: Model) -> bool:
        return all(np.isfinite(each).all() for each in Session(model).run(feeds_for(model)).values())

    found = reduce(parse(text, values), differ)
    assert found.kept == ()


@pytest.mark.parametrize(
    "text",
    [
        "g (float[2] x) => (float[2] y) { w = Constant<value = float[2] {1.5, 2.5}>() y = Add(x, w) }",
        "g (float[2] x) => (float[2] y) { y = own.Trees<values = "
        "[1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0]>(x) }",
    ],
)
def test_values_in_nodes_are_told(text: str) -> None:
    model = parse(f'<ir_version: 8, opset_import: ["" : 17, "own" : 1]>\n{text}')
    count = len(list(model.nodes()))
    assert len(reduce(model, lambda each: len(list(each.nodes())) == count).kept) == 1


# ------------------------------------------------------------------------------------------ real faults


def test_a_rule_that_is_wrong_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a user would: the pass fails on the whole network, and on what is left."""

    class Wrong(noop.Identity):
        name = "wrong"
        ops = frozenset(("Relu",))

        def pattern(self, node: Node, edit: Editor) -> Detour:
            return node, node.inputs[0]

        def check(self, match: Detour, edit: Editor) -> str | None:
            maker = ir.producer(match[1])
            return None if maker is not None and maker.op == "Add" else "it follows no sum"

    monkeypatch.setattr(eliminate, "RULES", (Wrong(),))

    def broken(model: Model) -> bool:
        try:
            Pipeline(Eliminate(), on_error="raise")(model)
        except InvalidGraph as error:
            return "Relu" in str(error)
        return False

    text = """g (float[2,3,8,8] x) => (float[2,3,8,8] y) {
      [conv1] a = Conv<pads = [1,1,1,1]>(x, w) b = Relu(a) [conv2] c = Conv<pads = [1,1,1,1]>(b, w)
      d = Add(c, x) e = Relu(d) [conv3] f = Conv<pads = [1,1,1,1]>(e, w) y = Sigmoid(f) }"""
    found = reduce(parse(text, {"w": normal(3, 3, 3, 3)}), broken)
    assert counts(found) == {"Add": 1, "Relu": 1}
    assert found.kept == ()
    assert feeding(found.model, "Add", "Relu")


def test_nothing_is_changed_and_all_is_the_same_every_time() -> None:
    model = load(FASHION / "mobilenet.onnx")
    before = model.to_proto().SerializeToString(deterministic=True)
    ends = [reduce(model, has("HardSwish", "Gemm")) for _ in range(2)]
    one, two = (each.model.to_proto().SerializeToString(deterministic=True) for each in ends)
    assert one == two
    assert ends[0].tried == ends[1].tried < 60
    assert model.to_proto().SerializeToString(deterministic=True) == before
    assert model.source == FASHION / "mobilenet.onnx"


def test_it_stops_when_the_time_is_over() -> None:
    found = reduce(chain(), lambda model: True, time_limit=1e-9)
    assert (found.complete, found.tried, counts(found)["Add"]) == (False, 1, 2)


def test_what_is_not_interesting_itself_is_refused() -> None:
    with pytest.raises(UsageError, match="does not show"):
        reduce(chain(), has("Conv"))


def test_what_is_wrong_may_be_what_asks_of_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Types are then those declared, and what cannot be edited stays."""

    def broken(*_: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr("onnxslim.shapes.deduce", broken)
    model = chain()
    model.graph.nodes[3].outputs[0].dtype = np.dtype(np.float32)  # as noted by an exporter
    left = counts(reduce(model, has("Neg")))
    assert "Neg" in left
    assert not {"MatMul", "Tanh", "Cos"} & set(left)


def test_errors_count_as_no_and_others_come_through() -> None:
    def picky(model: Model) -> bool:
        if len(ops(model)) < 5:
            raise LoadError("too small")
        return True

    assert len(ops(reduce(chain(), picky).model)) == 5
    with pytest.raises(ZeroDivisionError):
        reduce(chain(), lambda model: bool(1 / 0))
