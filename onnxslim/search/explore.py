"""The search: trials one after the other, each chosen by what came of those before.

First every way to store weights and data by itself. Then, with the ones that look best, less and less of the
network's work: how far that may go, or has to, is found by halving, since more damage and less cost are what
leaving away more means. What is measured decides, on samples that no pass of a trial has seen.
"""

from __future__ import annotations

import itertools
import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from onnxslim.engine.allocate import fewest
from onnxslim.engine.base import Effort, Progress
from onnxslim.errors import OnnxSlimError
from onnxslim.search.chains import SHARES
from onnxslim.search.goals import Goals
from onnxslim.search.trials import Cut, SearchTrial, TrialConfig

# Ways to store with which less of the network is tried, by how much is tried.
WIDTH: Mapping[Effort, int] = {"quick": 1, "normal": 2, "thorough": 4}
# How much slower a way to store may be, all by itself, than that of the best so far: if it loses less, more
# of the network can go.
LEEWAY: Mapping[Effort, float] = {"quick": 1.0, "normal": 1.3, "thorough": math.inf}
# Times that are this near are the same: bytes decide between them.
SAME_TIME = 1.03
# Of each halving, how many questions ahead are told.
AHEAD = 7
# Milder trials after a choice that other samples do not confirm.
CORRECTIONS, MILDER = 3, 1.12


class _Line(NamedTuple):
    """A way to store and one to leave away, along which to go down."""

    encoding: str
    cut: Cut


class OutOfTime(Exception):
    """The time limit of a search is over."""


class Executor(Protocol):
    """Makes trials; see `onnxslim.search.executor.TrialExecutor`."""

    def possible(self, config: TrialConfig, begin: Callable[[], None]) -> bool:
        """Whether anything can be left away for a trial, as there is if it is known.

        Calls `begin` before it finds that out.
        """

    def prefetch(self, configs: Sequence[TrialConfig]) -> None:
        """Trials that may be asked for next, most likely first: some can be made ahead of the question."""

    def run(self, config: TrialConfig, begin: Callable[[], None]) -> SearchTrial:
        """A trial; one that fails says why.

        Calls `begin` before it makes one that is not known yet, and not begun ahead.
        """

    def keep(self, trial: SearchTrial) -> None:
        """Hold on to what this trial made, the last one, as long as nothing better comes."""


@dataclass
class Explorer:
    """One search.

    Attributes:
        executor: makes trials.
        encodings: names of the ways to store weights and data; with the name of the one that may lose too
            much, where a way is of use only then.
        cuts: ways to leave away.
        goals: what is asked for.
        effort: how much to try.
        narrower: by name of a way to store, one that takes as long and fewer bytes, and loses more.
        progress: called with (what, done, total).
        until: when, by `time.monotonic`, no trial is begun any more.
        on_trial: called with each trial that is made.
        trials: that were made, in order.
        untried: what time did not allow.
    """

    executor: Executor
    encodings: Mapping[str, str]
    goals: Goals
    cuts: Sequence[Cut] = ("work",)
    effort: Effort = "normal"
    narrower: Mapping[str, str] = field(default_factory=dict)
    progress: Progress | None = None
    until: float = math.inf
    on_trial: Callable[[SearchTrial], None] | None = None
    trials: list[SearchTrial] = field(default_factory=list)
    untried: str = ""

    def __post_init__(self) -> None:
        """Try just what is asked for, too."""
        macs = self.goals.macs
        self._shares = sorted({*SHARES, *([macs] if macs is not None and macs < 1 else [])}, reverse=True)

    def explore(self) -> None:
        """Make all trials that the search wants, as far as time allows."""
        try:
            whole = [TrialConfig(1.0, encoding) for encoding in self.encodings]
            each = enumerate(zip(whole, self.encodings.values(), strict=True))
            in_time = [self._tried(config, spared, whole[at:]) for at, (config, spared) in each]
            if not all(in_time):
                raise OutOfTime
            self._require_one()
            self._narrow()
            lines = [_Line(encoding, cut) for encoding in self._promising() for cut in self.cuts]
            for at in range(len(lines)):
                self._shrink(lines[at:])
            self._narrow()
        except OutOfTime:
            self.untried = f"the time limit was over after {len(self.trials)} trials"

    def _tried(self, config: TrialConfig, spared: str, ahead: Sequence[TrialConfig]) -> bool:
        """Try a way to store by itself; whether there was time to, as there is for a trial that is known."""
        try:
            if not spared or self._loses(self.trial(TrialConfig(1.0, spared))):
                self.executor.prefetch(ahead)
                self.trial(config)
        except OutOfTime:
            return False
        return True

    def _require_one(self) -> None:
        if all(each.figures is None for each in self.trials):
            raise OnnxSlimError(next(each.error for each in self.trials))

    def trial(self, config: TrialConfig) -> SearchTrial:
        """What comes of a config.

        Raises:
            OutOfTime: there is no time to make it.
        """
        for known in self.trials:
            if known.config == config:
                return known
        trial = self.executor.run(config, self._begin)
        best = self.eligible()[:1]
        self.trials.append(trial)
        if self.meets(trial) and all(self._rank(trial) < self._rank(each) for each in best):
            self.executor.keep(trial)
        self._tell(trial)
        return trial

    def _begin(self) -> None:
        if time.monotonic() > self.until:
            raise OutOfTime

    def eligible(self) -> list[SearchTrial]:
        """Trials that meet all goals on the samples to choose by, the best first."""
        return sorted(filter(self.meets, self.trials), key=self._rank)

    def nearest(self) -> tuple[SearchTrial, str] | None:
        """Where no trial meets all goals, the one that comes nearest, and what it falls short of."""
        measured = [each for each in self.trials if each.figures is not None]
        if not measured:
            return None
        best = min(measured, key=lambda each: (len(self._shortfalls(each)), self._excess(each)))
        return best, "; ".join(self._shortfalls(best))

    def milder(self, trial: SearchTrial) -> SearchTrial | None:
        """The same with somewhat more left; None where nothing is left away."""
        share = round(min(trial.structure * MILDER, 1.0), 3)
        return None if trial.structure >= 1 else self.trial(trial.config._replace(structure=share))

    def _tell(self, trial: SearchTrial) -> None:
        if self.on_trial:
            self.on_trial(trial)
        if self.progress:
            each = len(self.cuts) * math.ceil(math.log2(len(self._shares) + 1))
            total = len(self.encodings) + WIDTH[self.effort] * each
            self.progress("trials", len(self.trials), max(total, len(self.trials)))

    def meets(self, trial: SearchTrial) -> bool:
        """Whether a trial meets all goals on the samples to choose by."""
        return trial.figures is not None and not self.goals.shortfalls(trial.figures)

    def _shortfalls(self, trial: SearchTrial) -> list[str]:
        assert trial.figures is not None
        return self.goals.shortfalls(trial.figures)

    def _excess(self, trial: SearchTrial) -> float:
        """By how much a trial takes more than it may, as a factor; then by what it loses."""
        assert trial.figures is not None
        figures = trial.figures
        over = [(getattr(figures, name) or math.inf) / limit for name, limit in self.goals.budgets.items()]
        return max([1.0, *over]) - 1e-3 * min(figures.sqnr, 100.0)

    def _rank(self, trial: SearchTrial) -> tuple[float, ...]:
        """Less is better: within budgets what loses least; else what is fastest, and of equals smallest."""
        figures = trial.figures
        assert figures is not None
        if self.goals.budgets:
            return tuple(-worth for worth in figures.worth)
        return round(math.log(figures.latency or 1.0) / math.log(SAME_TIME)), figures.size

    def _promising(self) -> list[str]:
        """Ways to store with which to try less of the network."""
        known = [each for each in self.trials if each.encoding in self.encodings]
        measured = [each for each in known if each.figures is not None]
        if self.goals.budgets:
            # What is nearest to the budgets needs least of the network to go; what is within them needs
            # nothing to, and what loses more than that cannot win.
            within = [_worth(each) for each in measured if self._fits(each)]
            over = (each for each in measured if not self._fits(each))
            best = sorted(
                (each for each in over if all(_worth(each) > it for it in within)), key=self._excess
            )
        else:
            best = sorted((each for each in measured if self._keeps(each)), key=self._rank)
        return [each.encoding for each in best][: WIDTH[self.effort]]

    def _keeps(self, trial: SearchTrial) -> bool:
        return trial.figures is not None and not self.goals.losses(trial.figures)

    def _loses(self, trial: SearchTrial) -> bool:
        return trial.figures is not None and not self._keeps(trial)

    def _shrink(self, lines: Sequence[_Line]) -> None:
        """Leave as much as budgets allow, or as little as still keeps enough, in the first of some ways."""
        worth = [line for line in lines if self._worthwhile(line.encoding)]
        if worth[:1] != list(lines[:1]):
            return
        first = worth[0]
        if not self.executor.possible(self._config(first, next(ahead(len(self._shares), {}))), self._begin):
            return
        known: dict[int, bool] = {}

        def enough(step: int) -> bool:
            steps = itertools.islice(ahead(len(self._shares), known), AHEAD)
            others = itertools.product(worth[1:], itertools.islice(ahead(len(self._shares), {}), AHEAD))
            every = [*((first, each) for each in steps), *others]
            self.executor.prefetch([self._config(line, each) for line, each in every])
            trial = self.trial(self._config(first, step))
            known[step] = self._fits(trial) if self.goals.budgets else self._keeps(trial)
            return known[step]

        fewest(enough, len(self._shares))

    def _narrow(self) -> None:
        """The best so far in fewer bytes."""
        for best in self.eligible()[:1]:
            if narrower := self.narrower.get(best.encoding):
                self.trial(best.config._replace(encoding=narrower))

    def _config(self, line: _Line, step: int) -> TrialConfig:
        """Less is left the more steps within budgets; without, more."""
        share = self._shares[step - 1] if self.goals.budgets else self._shares[-step]
        return TrialConfig(share, line.encoding, line.cut)

    def _worthwhile(self, encoding: str) -> bool:
        """Whether a way to store may win, although all by itself it is slower than the best so far."""
        best = next(iter(self.eligible()), None)
        if self.goals.budgets or best is None:
            return True
        own, other = (_latency(self.trial(TrialConfig(1.0, name))) for name in (encoding, best.encoding))
        return own <= LEEWAY[self.effort] * other

    def _fits(self, trial: SearchTrial) -> bool:
        return trial.figures is not None and not self.goals.excesses(trial.figures)


def ahead(most: int, known: Mapping[int, bool]) -> Iterator[int]:
    """Numbers that `fewest` may ask for: the next one, those after either answer, and so on.

    Args:
        most: the largest.
        known: what has been answered.
    """
    line = deque([known])
    while line:
        answers = line.popleft()
        asked: list[int] = []

        def answer(number: int, answers: Mapping[int, bool] = answers, asked: list[int] = asked) -> bool:
            if number not in answers:
                asked.append(number)
            return answers.get(number, False)

        fewest(answer, most)
        if asked:
            yield asked[0]
            line += ({**answers, asked[0]: True}, {**answers, asked[0]: False})


def _worth(trial: SearchTrial) -> tuple[float, float]:
    assert trial.figures is not None
    return trial.figures.worth


def _latency(trial: SearchTrial) -> float:
    """Relative to the original's; as long as that where times say nothing."""
    return 1.0 if trial.figures is None or trial.figures.latency is None else trial.figures.latency
