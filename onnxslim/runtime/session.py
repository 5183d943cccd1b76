"""Sessions: a model on a target, whatever runs it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from onnxslim.ir.graph import Array
from onnxslim.runtime.backend import Backend, Loadable, Opening
from onnxslim.runtime.limits import RunLimits
from onnxslim.runtime.ort import OnnxRuntime
from onnxslim.runtime.reference import Reference
from onnxslim.runtime.targets import BackendName, Target

BACKENDS: dict[BackendName, Backend] = {"onnxruntime": OnnxRuntime(), "reference": Reference()}


def no_latency(target: Target) -> str:
    """Why the time that a run takes says nothing about a target; empty if it does."""
    return BACKENDS[target.backend].no_latency(target)


class Session:
    """A loaded model.

    Args:
        model: a Model, a ModelProto or a file.
        target: where it runs; the provider must really be used.
        optimize: "all", "extended", "basic" or "none" of ONNX Runtime's own graph optimizations.
        optimized: if given, ONNX Runtime writes the graph it runs to this file.
        profile: if given, ONNX Runtime writes what ran where to a file in this folder; see
            `onnxslim.runtime.profile.places`.
        once: whether it is for a run or two. Large weights are not copied into another layout for these, and
            ONNX Runtime runs in a process of its own: if it crashes there, that is a LoadError.
        spin: whether threads keep their cores busy while they wait for the next run, as ONNX Runtime has it:
            they answer sooner, but take the time of whatever is done between runs. Not if it is `once`.
        limits: what opening the model may take, and each run that is given no others, if it is opened `once`.

    Raises:
        LoadError: the model is refused; carries ONNX Runtime's message.
        LimitExceeded: opening it took more than it may.
        TargetError: the provider is not there, or was silently replaced by another.
    """

    def __init__(
        self,
        model: Loadable,
        target: Target | None = None,
        *,
        optimize: str = "all",
        optimized: Path | None = None,
        profile: Path | None = None,
        once: bool = False,
        spin: bool = True,
        limits: RunLimits | None = None,
    ) -> None:
        self.target = target or Target.cpu()
        self.backend = BACKENDS[self.target.backend]
        how = Opening(optimize, optimized, profile, once, spin, limits)
        self._loaded = self.backend.open(model, self.target, how)
        self.input_names, self.output_names = self._loaded.input_names, self._loaded.output_names

    @property
    def no_latency(self) -> str:
        """Why the time that a run takes says nothing about the target; empty if it does."""
        return no_latency(self.target)

    def run(
        self,
        feeds: Mapping[str, Array],
        outputs: Sequence[str] | None = None,
        limits: RunLimits | None = None,
    ) -> dict[str, Any]:
        """Outputs by name.

        Args:
            feeds: one array per model input.
            outputs: names of those wanted; None means all.
            limits: what the run may take; not of the reference evaluator, which cannot be stopped.

        Raises:
            LoadError: it fails on these inputs; carries ONNX Runtime's message.
            LimitExceeded: the run was stopped because it took more than it may.
        """
        names = list(self.output_names if outputs is None else outputs)
        if not names:
            return {}  # onnxruntime would take an empty list for all of them
        return dict(zip(names, self._loaded.run(names, feeds, limits), strict=True))

    def end_profile(self) -> Path:
        """The profile so far, of a session that was opened with `profile`.

        Raises:
            TargetError: this target has none.
        """
        return self._loaded.end_profile()
