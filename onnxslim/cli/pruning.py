"""What `onnxslim prune` tells besides what it does."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from onnxslim.cli import terminal
from onnxslim.engine.pipeline import Report
from onnxslim.errors import SaveError, UsageError


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


def save_plan(report: Report, path: Path) -> None:
    """Write the plan of the last pruning.

    Raises:
        UsageError: nothing was pruned.
        SaveError: the file cannot be written.
    """
    from onnxslim.passes.prune import PruneFigures

    told = [step.changes.figures for step in report.steps]
    plans = [figures.plan for figures in told if isinstance(figures, PruneFigures)]
    if not plans:
        raise UsageError("--save-plan: nothing was pruned, so there is no plan")
    try:
        path.write_text(plans[-1].to_json(), encoding="utf-8")
    except OSError as error:
        raise SaveError(f"cannot write the plan to '{path}': {error.strerror or error}") from error
