"""What `onnxslim prune` tells besides what it does."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from onnxslim.cli import terminal

if TYPE_CHECKING:
    from onnxslim.families.analysis import Analysis
    from onnxslim.ir.model import Model


def tell(
    source: Path, families: bool, tensors: Sequence[str], as_json: bool, input_shapes: Sequence[str] = ()
) -> None:
    """Print the families of a model, and what may be removed of some of its tensors.

    Raises:
        LoadError: the model cannot be read.
        UsageError: there is no such tensor or input.
    """
    from onnxslim.families.analysis import analyze
    from onnxslim.families.costs import Costs
    from onnxslim.ir.model import load
    from onnxslim.ops.spec import sizes
    from onnxslim.passes.prune.cut import prepare
    from onnxslim.passes.unfuse import unfuse
    from onnxslim.shapes import cost
    from onnxslim.shapes.given import by_name, one_sample, sized_by, with_sizes

    model = load(source)
    declared = model.inputs()
    specs = with_sizes(declared, by_name(input_shapes))
    given = sized_by(declared, specs)
    unfuse(model, "units")
    prepare(model)
    asked = {spec.name: known for spec in specs if spec.name in given and (known := sizes(spec.shape))}
    analysis = analyze(model, sizes=asked)
    shapes = one_sample(declared, specs, analysis.sizes)
    costs = Costs(model, _of_one_sample(analysis, model, shapes))
    caveats = list(cost.caveats(model, shapes, cost.ASSUMED, given)) if families else []
    rows: list[dict[str, Any]] = []
    for family in analysis.families if families else ():
        parameters, macs = costs.per_unit(family)
        rows.append(
            {
                "family": family.name,
                "units": family.size,
                "channels": family.width,
                "parameters": parameters,
                "macs": macs,
                "crosses": list(family.crosses),
                "members": [f"{member.tensor}:{member.axis}" for member in family.members],
            }
        )
    lines = [line for tensor in tensors for line in analysis.explain(tensor)]
    if as_json:
        terminal.show_json({"families": rows, "explained": lines, "notes": caveats})
        return
    out = terminal.console()
    for row in rows:
        exact = f", changes the statistics of '{row['crosses'][0]}'" if row["crosses"] else ""
        out.print(
            f"{row['family']}: {row['units']} units of {row['channels']} channels, each "
            f"{row['parameters']:,} parameters and {row['macs']:,} MACs{exact}",
            markup=False,
            highlight=False,
            soft_wrap=True,
        )
    for line in (*lines, *(f"note: {caveat}" for caveat in caveats)):
        out.print(line, markup=False, highlight=False, soft_wrap=True)


def _of_one_sample(analysis: Analysis, model: Model, shapes: Mapping[str, tuple[int, ...]]) -> Analysis:
    """The analysis with sizes of one sample, where all that it knows follows from those too.

    It is made at a batch that stands out.
    """
    from onnxslim.ops.spec import sizes
    from onnxslim.shapes import cost

    sized = cost.sized(model, shapes)
    tensors = (*sized.graph.inputs, *(made for node in sized.graph.nodes for made in node.outputs))
    found = {tensor.name: known for tensor in tensors if (known := sizes(tensor.shape)) is not None}
    return replace(analysis, sizes=found) if found.keys() >= analysis.sizes.keys() else analysis
