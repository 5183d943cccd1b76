"""A plan of cheaper forms: which functions of a model become which others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import field, replace
from typing import Annotated

from pydantic import AfterValidator

from onnxslim.engine.plans import PassPlan, distinct, strict
from onnxslim.errors import UsageError, nearest


@strict
class CheaperForm:
    """What becomes of one function.

    Attributes:
        output: the tensor it makes.
        ops: the operators it is computed by.
        form: name of the form.
        values: of an approximation.
    """

    output: str
    ops: tuple[str, ...]
    form: str
    values: tuple[float, ...] = ()


def _once(forms: tuple[CheaperForm, ...]) -> tuple[CheaperForm, ...]:
    distinct(each.output for each in forms)
    return forms


@strict
class CheapeningPlan(PassPlan):
    """What becomes of the functions of a model; those that are not named stay as they are.

    Attributes:
        forms: in the order in which they run.
    """

    forms: Annotated[tuple[CheaperForm, ...], AfterValidator(_once)]
    kind: str = field(default="cheapen", init=False)
    version: int = field(default=1, init=False)

    def joined(self, other: CheapeningPlan) -> CheapeningPlan:
        """The forms of both."""
        return replace(self, forms=(*self.forms, *other.forms))

    def require(self, there: Mapping[str, Sequence[str]]) -> None:
        """Insist that a model computes what the plan is about.

        Args:
            there: by output, the operators of each function of the model.

        Raises:
            UsageError: it does not; names the first.
        """
        problem = "the plan of pass 'cheapen' does not fit the model: "
        for each in self.forms:
            if each.output not in there:
                made = f"nothing makes '{each.output}' element by element"
                raise UsageError(f"{problem}{made}; {nearest(each.output, there)}")
            if tuple(there[each.output]) != each.ops:
                ops = " ".join(there[each.output])
                raise UsageError(f"{problem}'{each.output}' is made by {ops}, not by {' '.join(each.ops)}")
