"""What stands behind a session, and what a session may ask of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeAlias

import onnx

from onnxslim.ir.graph import Array
from onnxslim.ir.model import Model
from onnxslim.runtime.limits import RunLimits
from onnxslim.runtime.targets import Target

Loadable: TypeAlias = Model | onnx.ModelProto | Path


@dataclass(frozen=True)
class Opening:
    """How a model is to be opened; what each means is said at `onnxslim.runtime.session.Session`."""

    optimize: str = "all"
    optimized: Path | None = None
    profile: Path | None = None
    once: bool = False
    spin: bool = True
    limits: RunLimits | None = None


class Loaded(Protocol):
    """A model that a backend has opened.

    Attributes:
        input_names: what it is fed.
        output_names: what it makes.
    """

    input_names: tuple[str, ...]
    output_names: tuple[str, ...]

    def run(
        self, names: Sequence[str], feeds: Mapping[str, Array], limits: RunLimits | None
    ) -> Sequence[Any]:
        """These outputs, in this order.

        Raises:
            LoadError: it fails on these inputs; says who does, and why.
            LimitExceeded: it was stopped.
        """

    def end_profile(self) -> Path:
        """What ran where, of a model that was opened with `profile`.

        Raises:
            TargetError: this backend does not tell.
        """


class Backend(Protocol):
    """Opens models for targets.

    Attributes:
        profiles: whether it tells what really ran where, and can thus be caught at running it elsewhere.
    """

    profiles: bool

    def no_latency(self, target: Target) -> str:
        """Why the time that a run takes says nothing about the target; empty if it does."""

    def open(self, model: Loadable, target: Target, how: Opening) -> Loaded:
        """Load a model.

        Raises:
            LoadError: the model is refused; says by whom and why.
            TargetError: the provider of the target is not there, or not what is used.
        """
