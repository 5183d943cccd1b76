"""What really runs, and where: placement, optimized graphs, and the targets that work here."""

from __future__ import annotations

import functools
import json
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

import numpy as np
import onnx
import onnx.parser

from onnxslim.errors import LoadError, TargetError
from onnxslim.ir.graph import Array
from onnxslim.ir.model import Model
from onnxslim.runtime import native, plugins
from onnxslim.runtime.backend import Loadable
from onnxslim.runtime.native import CPU
from onnxslim.runtime.ort import plugin_library
from onnxslim.runtime.session import BACKENDS, Session, no_latency
from onnxslim.runtime.targets import Target, known


def places(
    model: Loadable, target: Target, feeds: Mapping[str, Array], *, once: bool = False
) -> dict[str, PlacedNode]:
    """Which execution provider really runs each operator, by its name, from the profile of one call.

    A provider may take many nodes of the model as one operator of its own.

    Args:
        model: what to run.
        target: where.
        feeds: its inputs.
        once: run it in a process of its own.

    Raises:
        TargetError: the provider of the target loads, but runs none of them; or it keeps no profile.
    """
    with tempfile.TemporaryDirectory() as folder:
        session = Session(model, target, profile=Path(folder), once=once)
        session.run(feeds)
        ran = placed_in(session.end_profile())
    counts = counted(ran)
    if ran and target.provider not in counts:
        others = ", ".join(f"{provider} runs {count}" for provider, count in counts.items())
        raise TargetError(f"{target.provider} loads, but runs no operator of the model: {others}")
    return ran


def placed_in(profile: Path) -> dict[str, PlacedNode]:
    """The operators that ran, by their names, from a file of `Session.end_profile`."""
    events = json.loads(profile.read_text(encoding="utf-8"))
    return {
        event["name"].removesuffix("_kernel_time"): PlacedNode(
            event["args"].get("op_name", ""), event["args"]["provider"]
        )
        for event in events
        if event.get("cat") == "Node" and event.get("args", {}).get("provider")
    }


def microseconds(profile: Path) -> dict[str, float]:
    """What each operator took in the last run, by its name, from a file of `Session.end_profile`."""
    events = json.loads(profile.read_text(encoding="utf-8"))
    suffix = "_kernel_time"
    timed = (event for event in events if event.get("cat") == "Node" and event["name"].endswith(suffix))
    return {event["name"].removesuffix(suffix): float(event["dur"]) for event in timed}


class PlacedNode(NamedTuple):
    """An operator that ran, and the execution provider that ran it."""

    op: str
    provider: str


def counted(nodes: Mapping[str, PlacedNode]) -> dict[str, int]:
    """How many operators each execution provider runs."""
    return dict(Counter(node.provider for node in nodes.values()))


def left_over(target: Target, which: str, nodes: Mapping[str, PlacedNode]) -> Iterator[str]:
    """A note on the operators of a model that a target leaves to other providers, if there are any."""
    for provider in counted(nodes):
        if provider != target.provider:
            ops = Counter(node.op for node in nodes.values() if node.provider == provider)
            told = ", ".join(f"{count} {op}" for op, count in ops.most_common())
            yield f"{target.name} leaves operators of the {which} model to {provider}: {told}"


def may_stray(target: Target) -> bool:
    """Whether operators may run elsewhere than on the target, so that `places` has something to tell."""
    return BACKENDS[target.backend].profiles and target.provider != CPU


def optimized_model(model: Model, target: Target | None = None) -> onnx.ModelProto:
    """The graph that ONNX Runtime really runs, weights left out."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "optimized.onnx"
        # "extended" fuses integer kernels but keeps plain operators where layout changes would hide them.
        Session(model, target, optimize="extended", optimized=path)
        return onnx.load_model(path, load_external_data=False)


def available() -> tuple[Target, ...]:
    """Every target that is seen to be really used here, in the order of the registry.

    A backend that does not tell what ran where, such as the reference evaluator, is used only when asked for.
    """
    seen = (target for target in known() if BACKENDS[target.backend].profiles)
    return tuple(each for each in seen if not may_stray(each) or (installed(each) and not unusable(each)))


def installed(target: Target) -> bool:
    """Whether the provider of a target is on this machine at all, be it in working order or not."""
    outside = target.backend != "onnxruntime" or target.provider in native.built_in()
    return outside or bool(plugin_library(target))


def here_or_simulated(target: Target, simulate: bool = False) -> Target:
    """The target, or processors in its place where its provider is not installed, or where that is asked for.

    Raises:
        TargetError: the provider is installed, but does not work here.
    """
    if target.backend != "onnxruntime" or target.provider == CPU:
        return target
    if simulate or not installed(target):
        return target.simulated()
    if why := unusable(target):
        raise TargetError(f"{why}; to lay the model out for another machine, simulate it (--simulate)")
    return target


def require_usable(target: Target) -> None:
    """See that an installed provider works, before anything else is done with it, in a process of its own.

    Raises:
        TargetError: it does not; says why.
    """
    if may_stray(target) and installed(target) and (why := unusable(target)):
        raise TargetError(why)


@functools.cache
def unusable(target: Target) -> str:
    """Why a small product does not really run on this target; empty if it does."""
    model = onnx.parser.parse_model(
        '<ir_version: 8, opset_import: ["" : 13]> g (float[2,2] x) => (float[2,2] y) { y = MatMul(x, x) }'
    )
    feeds = {"x": np.ones((2, 2), np.float32)}
    try:
        if BACKENDS[target.backend].profiles:
            places(model, target, feeds, once=True)
        else:
            Session(model, target).run(feeds)
    except (LoadError, TargetError) as error:
        return str(error)
    return ""


@dataclass(frozen=True)
class Offer:
    """A target, and what there is of it on this machine.

    Attributes:
        target: its name.
        provider: ONNX Runtime's name of it.
        source: what has it, with its version; empty if nothing has.
        devices: that it offers: kind, vendor and version; of plugins only, as others do not tell.
        problem: why a small model does not run on it; empty if it does.
        notes: in what precision it computes, and whether its times say anything.
    """

    target: str
    provider: str
    source: str
    devices: tuple[str, ...] = ()
    problem: str = ""
    notes: tuple[str, ...] = ()


def offers() -> tuple[Offer, ...]:
    """All targets that are known of, and what is installed of them."""
    return (*map(_offer, known()), *_broken())


def _offer(target: Target) -> Offer:
    if not installed(target):
        wanted = " or ".join(target.packages)
        return Offer(
            target.name, target.provider, "", problem=f"not installed{wanted and f': pip install {wanted}'}"
        )
    slow = no_latency(target)
    notes = (target.precision, slow and f"no latency is told: {slow}")
    return Offer(
        target.name,
        target.provider,
        _source(target),
        _devices(target),
        unusable(target),
        tuple(filter(None, notes)),
    )


def _broken() -> Iterator[Offer]:
    """Packages of plugins that do not even tell what they have."""
    for each in plugins.packages():
        if each.problem:
            yield Offer("", "", each.name, problem=each.problem)


def _source(target: Target) -> str:
    if target.backend != "onnxruntime":
        return f"onnx {metadata.version('onnx')}"
    if target.provider in native.built_in():
        return f"onnxruntime {native.onnxruntime().__version__}"
    package = plugins.package_of(target.provider)
    return Path(target.plugin).name or (package.name if package else "")


def _devices(target: Target) -> tuple[str, ...]:
    library = plugin_library(target)
    if not library or target.provider in native.built_in():
        return ()
    try:
        found = native.plugin_devices(library, target.provider)
    except TargetError:  # told as the problem
        return ()
    mine = (each for each in found if each.provider == target.provider)
    return tuple(f"{each.kind} by {each.vendor}, provider {each.version}" for each in mine)
