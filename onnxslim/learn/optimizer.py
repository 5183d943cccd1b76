"""Adam, with steps in proportion to what they change."""

from __future__ import annotations

import math
from collections.abc import Sequence

from onnxslim.learn.door import Tensor, torch

BETAS = (0.9, 0.999)
EPSILON = 1e-8
# Steps of a tensor whose numbers are smaller than this are as large as if they were not.
LEAST_SCALE = 1e-3


class RelativeAdam:
    """Adam (Kingma and Ba 2015), its steps times the root mean square of each tensor, as in Adafactor.

    Shazeer and Stern, Adafactor: adaptive learning rates with sublinear memory cost, 2018, section 8. One
    rate then fits tensors of any scale: a file may divide its inputs by 255 or not, and normalization that
    was folded leaves weights of very different size.

    Args:
        parameters: changed in place; those without a gradient stay as they are.
    """

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        self._parameters = parameters
        self._first = [torch.zeros_like(each) for each in parameters]
        self._second = [torch.zeros_like(each) for each in parameters]
        self._steps = 0

    @property
    def moments(self) -> tuple[list[Tensor], list[Tensor]]:
        """Running means of gradients and of their squares, one of each for every parameter."""
        return self._first, self._second

    @property
    def steps(self) -> int:
        """How many were taken."""
        return self._steps

    @steps.setter
    def steps(self, steps: int) -> None:
        self._steps = steps

    def step(self, rate: float) -> None:
        """Go on against the gradients, which are forgotten.

        Args:
            rate: size of a step, relative to each tensor.
        """
        self._steps += 1
        at = [index for index, each in enumerate(self._parameters) if each.grad is not None]
        tensors, first, second = (
            [each[index] for index in at] for each in (self._parameters, self._first, self._second)
        )
        if not tensors:
            return
        gradients = [each.grad for each in tensors]
        with torch.no_grad():
            torch._foreach_lerp_(first, gradients, 1 - BETAS[0])
            torch._foreach_mul_(second, BETAS[1])
            torch._foreach_addcmul_(second, gradients, gradients, 1 - BETAS[1])
            # Both means begin at zero.
            late, early = (1 - beta**self._steps for beta in reversed(BETAS))
            roots = torch._foreach_sqrt(second)
            torch._foreach_div_(roots, math.sqrt(late))
            torch._foreach_add_(roots, EPSILON)
            moves = torch._foreach_div(first, roots)
            torch._foreach_mul_(moves, [-rate / early * scale for scale in _scales(tensors)])
            torch._foreach_add_(tensors, moves)
        for each in tensors:
            each.grad = None


def _scales(tensors: Sequence[Tensor]) -> list[float]:
    """Root mean square of each tensor, or the least scale."""
    norms = torch.stack(torch._foreach_norm(tensors)).tolist()
    return [
        max(norm / math.sqrt(each.numel()), LEAST_SCALE) for norm, each in zip(norms, tensors, strict=True)
    ]
