"""What `onnxslim prune` tells besides what it does."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from onnxslim.cli import terminal


def tell(source: Path, families: bool, tensors: Sequence[str], as_json: bool) -> None:
    """Print the families of a model, and what may be removed of some of its tensors.

    Raises:
        LoadError: the model cannot be read.
        UsageError: there is no such tensor.
    """
    from onnxslim.families.analysis import analyze
    from onnxslim.families.costs import Costs
    from onnxslim.ir.model import load
    from onnxslim.passes.prune.cut import prepare

    model = load(source)
    prepare(model)
    analysis = analyze(model)
    costs = Costs(model, analysis)
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
        terminal.show_json({"families": rows, "explained": lines})
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
    for line in lines:
        out.print(line, markup=False, highlight=False, soft_wrap=True)
