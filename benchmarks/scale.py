"""What many workers are good for: overheads that are measured here, and searches that are simulated.

    pip install -e ".[cpu,dask,ray]"                # without Dask or Ray their lines are left out
    python benchmarks/scale.py measure [--jobs N]   # start-up, a job, bytes of a search
    python benchmarks/scale.py simulate             # one search, and 1,000 trials; the same every time

`simulate` runs the search (`onnxslim/search/explore.py`) on made-up figures and a clock of its own; then
independent trials on workers of which some are slow and some are lost.
"""

from __future__ import annotations

import argparse
import heapq
import importlib.util
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np

from onnxslim.search.backends import ProcessBackend, RayBackend, SearchBackend, open_backend
from onnxslim.search.explore import Explorer
from onnxslim.search.goals import Goals, TrialFigures
from onnxslim.search.trials import SearchTrial, TrialConfig

FASHION = Path(__file__).resolve().parent.parent / "models" / "fashion"
# Of ways to store: time and bytes of what is stored so, and dB that it keeps.
WAYS = {"float": (1.0, 1.0, 60.0), "int8": (0.4, 0.27, 40.0), "dynamic int8": (0.7, 0.27, 45.0)}
# What finding out what could go takes, in trials; measured with `auto` on the bundled networks, 3 to 5.
MOVES = 4.0
# In so many jobs, one for each pass that proposes.
JOBS = 2
WORKERS = (1, 2, 4, 8, 16, 100)
TRIALS = 1000


# ------------------------------------------------------------------------------------------- one search


@dataclass
class Imagined:
    """Makes trials on a clock of its own; see `onnxslim.search.explore.Executor`."""

    workers: int
    clock: float = 0.0
    ends: dict[TrialConfig | int, float] = field(default_factory=dict)
    seconds: float = 0.0

    def _begin(self, config: TrialConfig | int, length: float = 1.0) -> None:
        self.ends[config] = self.clock + length
        self.seconds += length

    def _free(self) -> int:
        return self.workers - sum(end > self.clock for end in self.ends.values())

    def prefetch(self, configs: Sequence[TrialConfig]) -> None:
        for job in range(JOBS):
            if self._free() > 0 and job not in self.ends:
                self._begin(job, MOVES / JOBS)
        known = all(self.ends.get(job, math.inf) <= self.clock for job in range(JOBS))
        for config in configs[: max(self._free(), 0) if self.workers > 1 else 0]:
            if (config.structure == 1 or known) and config not in self.ends:
                self._begin(config)

    def _wait(self, config: TrialConfig | int, length: float = 1.0) -> None:
        while config not in self.ends and self._free() <= 0:
            self.clock = min(end for end in self.ends.values() if end > self.clock)
        if config not in self.ends:
            self._begin(config, length)
        self.clock = max(self.clock, self.ends[config])

    def possible(self, config: TrialConfig, begin: Callable[[], None]) -> bool:
        for job in range(JOBS):
            self._wait(job, MOVES / JOBS)
        return True

    def run(self, config: TrialConfig, begin: Callable[[], None]) -> SearchTrial:
        self._wait(config)
        latency, size, kept = WAYS[config.encoding]
        share = config.structure
        figures = TrialFigures(
            kept - 40 * (1 - share), 1.0, None, latency * share, size * share, size * share, share, 0.0
        )
        return config.trial(f"{config}", figures)

    def keep(self, trial: SearchTrial) -> None:
        pass


def searches() -> Iterator[str]:
    """One search by as many workers: what it takes, in trials."""
    yield "| workers | quick | of which worked for nothing | normal | of which worked for nothing |"
    yield "|---|---|---|---|---|"
    alone: dict[str, float] = {}
    for workers in WORKERS:
        cells = []
        for effort in ("quick", "normal"):
            executor = Imagined(workers)
            Explorer(executor, dict.fromkeys(WAYS, ""), Goals(require_sqnr=20.0), effort=effort).explore()
            alone.setdefault(effort, executor.seconds)
            cells += [f"{executor.clock:.0f}", f"{executor.seconds - alone[effort]:.0f}"]
        yield f"| {workers} | {' | '.join(cells)} |"


# ------------------------------------------------------------------------------------ independent trials


@dataclass(frozen=True)
class Cluster:
    """What trials are made on.

    Attributes:
        workers: processes; each is sent the files once, and again after it was lost.
        megabytes: of these files.
        link: megabytes a second that the one that asks sends, to all together.
        spread: standard deviation of the logarithm of a trial's seconds.
        slow, factor: share of the workers that take so many times as long.
        lost: workers lost in an hour of work; each is back after `back` seconds.
    """

    workers: int = 100
    megabytes: float = 3.0
    link: float = 110.0
    seconds: float = 60.0
    spread: float = 0.3
    slow: float = 0.0
    factor: float = 3.0
    lost: float = 0.0
    back: float = 30.0


def thousand(cluster: Cluster) -> str:
    """Cells of a row: minutes, what of the workers' time was of use, files sent, begun again, the tail."""
    rng = np.random.default_rng(0)
    lengths = cluster.seconds * np.exp(rng.normal(-(cluster.spread**2) / 2, cluster.spread, TRIALS))
    pace = np.where(np.arange(cluster.workers) < cluster.slow * cluster.workers, cluster.factor, 1.0)
    free = [(0.0, worker) for worker in range(cluster.workers)]
    waiting, sent, again, wire = list(lengths[::-1]), 0.0, 0, 0.0
    ends, holds = list[float](), set[int]()
    while waiting:
        now, worker = heapq.heappop(free)
        if worker not in holds:
            wire = max(wire, now) + cluster.megabytes / cluster.link
            now, sent = wire, sent + cluster.megabytes
            holds.add(worker)
        length = waiting.pop() * pace[worker]
        until = rng.exponential(3600 / cluster.lost) if cluster.lost else math.inf
        if until < length:
            again += 1
            waiting.append(length / pace[worker])
            holds.discard(worker)
            heapq.heappush(free, (now + until + cluster.back, worker))
        else:
            ends.append(now + length)
            heapq.heappush(free, (now + length, worker))
    end, enough = max(ends), sorted(ends)[int(0.95 * TRIALS)]
    use = lengths.sum() / (cluster.workers * end)
    return f"{end / 60:.1f} | {use:.0%} | {sent / 1e3:.1f} GB | {again} | {(end - enough) / 60:.1f}"


CLUSTERS = {
    "one worker": Cluster(workers=1),
    "100 workers, 3 MB of model and data, trials of a minute": Cluster(),
    "trials of five seconds": Cluster(seconds=5),
    "400 MB": Cluster(megabytes=400),
    "400 MB, on a folder that all see": Cluster(megabytes=0),
    "4 GB": Cluster(megabytes=4000),
    "a tenth of the workers takes three times as long": Cluster(slow=0.1),
    "each worker is lost once an hour": Cluster(lost=1),
    "each worker is lost ten times an hour, 400 MB": Cluster(lost=10, megabytes=400),
}


def simulated() -> Iterator[str]:
    """Both tables."""
    yield from searches()
    yield ""
    yield "| 1,000 trials | minutes | workers in use | sent | begun again | minutes for the last 5 % |"
    yield "|---|---|---|---|---|---|"
    yield from (f"| {name} | {thousand(cluster)} |" for name, cluster in CLUSTERS.items())


# --------------------------------------------------------------------------------------------- measured


def nothing(*details: Any) -> int:
    """A job that is none, but for imports of what a trial needs."""
    from onnxslim.search import jobs

    return len(jobs.__name__)


def timed(pool: SearchBackend) -> str:
    """Seconds until a worker has done its first job, then milliseconds of one more."""
    start = time.perf_counter()
    pool.submit(nothing).result()
    first = time.perf_counter() - start
    start = time.perf_counter()
    for _ in range(20):
        pool.submit(nothing).result()
    return f"{first:.1f} s, then {(time.perf_counter() - start) / 20 * 1e3:.1f} ms"


def measured(jobs: int) -> Iterator[str]:
    """Overheads of each backend that is here, and what of a search travels."""
    start = time.perf_counter()
    with closing(ProcessBackend(jobs)) as pool:
        yield f"processes: first job after {timed(pool)}"
    if importlib.util.find_spec("distributed"):
        import distributed

        start = time.perf_counter()
        local = distributed.LocalCluster(n_workers=jobs, threads_per_worker=1, dashboard_address=None)
        with local, open_backend(f"dask={local.scheduler_address}", 1) as workers:
            assert workers is not None
            up = time.perf_counter() - start
            yield f"Dask: cluster up in {up:.1f} s, first job after {timed(workers)}"
    if importlib.util.find_spec("ray"):
        start = time.perf_counter()
        with closing(RayBackend("")) as rays:
            up = time.perf_counter() - start
            yield f"Ray: cluster up in {up:.1f} s, first job after {timed(rays)}"
    yield from travels()


def travels() -> Iterator[str]:
    """Bytes of the files of a search with 256 images."""
    from onnxslim import optimize
    from onnxslim.search import jobs

    kept: list[str] = []
    pack = jobs._pack

    def packed(problem: Any, folder: Path) -> None:
        pack(problem, folder)
        kept.extend(f"{file.name} {file.stat().st_size / 1e3:.0f} kB" for file in sorted(folder.iterdir()))

    jobs._pack = packed
    images = np.load(FASHION / "calibration.npz")["image"][:256]
    optimize(FASHION / "resnet.onnx", {"image": images}, effort="quick", jobs=2, time_limit=0.0)
    yield f"ResNet, 256 images: {', '.join(kept)}"


def main() -> None:
    """Print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("what", choices=("measure", "simulate"))
    parser.add_argument("--jobs", type=int, default=2)
    given = parser.parse_args()
    for line in measured(given.jobs) if given.what == "measure" else simulated():
        print(line, flush=True)


if __name__ == "__main__":
    main()
