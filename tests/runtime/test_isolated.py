"""Models that crash, hang or swell are survived, in a worker of which nothing is left in the end."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest

from onnxslim.calibration.data import CalibrationData
from onnxslim.calibration.fidelity import Judge
from onnxslim.engine import check
from onnxslim.engine.base import Changes, Context, Log, Pass, options
from onnxslim.engine.pipeline import Pipeline
from onnxslim.errors import LoadError, TargetError, UsageError
from onnxslim.ir.model import Model, load
from onnxslim.passes.slim import Slim
from onnxslim.runtime import isolated
from onnxslim.runtime.isolated import WorkerEnded
from onnxslim.runtime.limits import LimitExceeded, RunLimits
from onnxslim.runtime.session import Session
from onnxslim.runtime.targets import Target
from tests.helpers import ROOT, heed_interrupts, ops, parse

TEXT = "g (float[N,2] x) => (float[N,2] y) { i = Identity(x)  y = Tanh(i) }"
ONE = {"x": np.ones((1, 2), np.float32)}
POSIX = pytest.mark.skipif(sys.platform == "win32", reason="processes end by signals")
LINUX = pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells what other processes do")

# An onnxruntime that suffers what the name of a node says. Only workers come across it: here it is imported.
FATEFUL = """
import os, signal, sys, time
sys.path.remove(os.path.dirname(os.path.dirname(__file__)))
del sys.modules["onnxruntime"]
import onnxruntime

def suffer(fate):
    if fate == b"die":
        os.kill(os.getpid(), signal.SIGSEGV)
    if fate == b"abort":
        sys.stderr.write("terminate called\\n what(): out of luck\\n\\n")
        os.abort()
    hoard = []
    while fate in (b"hang", b"hoard"):
        time.sleep(0.01)
        hoard += [b"x" * (16 << 20)] if fate == b"hoard" else []

class Fateful(onnxruntime.InferenceSession):
    def __init__(self, source, *args, **more):
        super().__init__(source, *args, **more)
        self.fate = source.partition(b"fate:")[2].split(b";")[0].split(b" ")
        if self.fate[-1] == b"opened":
            suffer(self.fate[0])

    def run(self, names, feeds, *more):
        if self.fate[-1] == b"run" or (feeds and (feeds["x"] == 13).any()):
            suffer(self.fate[0])
        return super().run(names, feeds, *more)

onnxruntime.InferenceSession = Fateful
"""


@options
class Fatal(Pass):
    """Makes a model of which ONNX Runtime comes to harm."""

    name: ClassVar[str] = "fatal"
    lossless: ClassVar[bool] = True
    fate: str = "die"
    when: str = "opened"

    def run(self, model: Model, ctx: Context) -> Changes:
        """Give a node its name."""
        log = Log()
        node = model.graph.nodes[-1]
        node.name = f"fate:{self.fate} {self.when};"
        log.change(node.name, "is renamed")
        return log.done()


def fated(fate: str, when: str) -> Model:
    model = parse(TEXT)
    Fatal(fate=fate, when=when).run(model, Context(Target.cpu()))
    return model


@pytest.fixture(autouse=True)
def pool(monkeypatch: pytest.MonkeyPatch) -> Iterator[isolated._Pool]:
    """A pool of its own for each test, of which nothing is left."""
    monkeypatch.delenv("ONNXSLIM_ISOLATE", raising=False)
    fresh = isolated._Pool()
    monkeypatch.setattr(isolated, "_POOL", fresh)
    yield fresh
    fresh.end()


@pytest.fixture
def fateful(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "onnxruntime").mkdir()
    (tmp_path / "onnxruntime" / "__init__.py").write_text(FATEFUL)
    monkeypatch.syspath_prepend(tmp_path)


def until(condition: Callable[[], bool]) -> bool:
    end = time.monotonic() + 60
    while not condition() and time.monotonic() < end:
        time.sleep(0.01)
    return condition()


def children(process: int) -> set[int]:
    listed = Path(f"/proc/{process}/task").glob("*/children")
    return {int(child) for file in listed for child in file.read_text().split()}


def gone(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


# ------------------------------------------------------------------------------------ what is survived


@POSIX
@pytest.mark.parametrize(
    ("fate", "when", "told"),
    [
        ("die", "opened", "ONNX Runtime ended with signal 11 while it opened the model"),
        ("die", "run", "ONNX Runtime ended with signal 11 while it ran the model"),
        ("abort", "run", "ONNX Runtime ended with signal 6 while it ran the model: what(): out of luck"),
        ("hang", "opened", "ONNX Runtime was stopped: it took more than 2 seconds while it opened the model"),
        ("hang", "run", "ONNX Runtime was stopped: it took more than 2 seconds while it ran the model"),
        pytest.param("hoard", "opened", "bytes while it opened the model", marks=LINUX),
        pytest.param("hoard", "run", "bytes while it ran the model", marks=LINUX),
    ],
)
@pytest.mark.usefixtures("fateful")
def test_a_step_that_ends_onnx_runtime_is_reverted_and_named(
    fate: str, when: str, told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(check, "LEAST_SECONDS", 1.0 if fate == "hang" else 60.0)
    monkeypatch.setattr(check, "TIME_FACTOR", 0.0)
    monkeypatch.setattr(check, "MAX_TENSOR_BYTES", 32 << 20 if fate == "hoard" else 1 << 40)
    result = Pipeline(Fatal(fate=fate, when=when), Slim())(parse(TEXT))
    first, second = result.report.steps
    assert first.error.startswith(f"pass 'fatal' broke the model at 'fate:{fate} {when};': ONNX Runtime ")
    assert first.error.endswith(told)
    assert first.after == first.before
    assert not second.error
    assert ops(result.model) == {"Tanh": 1}


@POSIX
@pytest.mark.usefixtures("fateful")
def test_a_session_goes_on_after_a_run_that_ended_its_worker() -> None:
    session = Session(fated("die", "at thirteen"), once=True)
    with pytest.raises(WorkerEnded, match="ended with signal 11 while it ran the model"):
        session.run({"x": np.full((1, 2), 13, np.float32)})
    np.testing.assert_allclose(session.run(ONE)["y"], np.tanh(ONE["x"]), rtol=1e-6)


@POSIX
@pytest.mark.usefixtures("fateful")
def test_an_original_that_ends_onnx_runtime_is_noted_and_rewritten() -> None:
    result = Pipeline(Slim())(fated("die", "opened"))
    (note,) = result.report.notes
    assert note == "the input does not run: ONNX Runtime ended with signal 11 while it opened the model"
    assert ops(result.model) == {"Tanh": 1}


@POSIX
@pytest.mark.usefixtures("fateful")
def test_what_others_hold_is_not_lost_with_a_worker() -> None:
    healthy = Session(parse(TEXT), once=True)
    with pytest.raises(WorkerEnded):
        Session(fated("die", "opened"), once=True)
    assert healthy.run(ONE)["y"].shape == (1, 2)


# ------------------------------------------------------------------------------------------ workers


def test_a_worker_serves_one_model_after_the_other(pool: isolated._Pool) -> None:
    for _ in range(3):
        Session(parse(TEXT), once=True).run(ONE)
    assert len(pool._all) == 1
    first, second = (Session(parse(TEXT), once=True) for _ in range(2))
    assert len(pool._all) == 2
    del first, second
    assert len(pool._idle) == 2


def test_a_worker_that_nobody_needs_is_ended(pool: isolated._Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(isolated, "LINGER_SECONDS", 0.05)
    Session(parse(TEXT), once=True).run(ONE)
    (worker,) = pool._all
    assert until(lambda: worker._process.returncode is not None)
    assert not pool._idle


def test_a_worker_that_has_died_is_replaced(pool: isolated._Pool) -> None:
    isolated.start()
    (worker,) = pool._idle
    worker._process.kill()
    worker._process.wait()
    assert Session(parse(TEXT), once=True).run(ONE)["y"].shape == (1, 2)


@POSIX
def test_a_worker_outlives_an_interruption_of_who_asks(pool: isolated._Pool) -> None:
    """Ctrl-C goes to all processes of a terminal, and who asks may be in the middle of a run."""
    session = Session(parse(TEXT), once=True)
    session.run(ONE)
    (worker,) = pool._all
    os.kill(worker._process.pid, signal.SIGINT)
    assert session.run(ONE)["y"].shape == (1, 2)
    assert list(pool._all) == [worker]
    assert worker._process.poll() is None


def test_workers_start_with_little() -> None:
    code = "import sys, onnxslim.runtime.worker as _; sys.exit(bool({'onnx', 'numpy'} & set(sys.modules)))"
    subprocess.run(
        [sys.executable, "-S", "-c", code], check=True, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )


@pytest.mark.parametrize("why", ["it fails", "it is not there"])
def test_without_workers_models_are_run_here(
    why: str, pool: isolated._Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if why == "it fails":
        monkeypatch.setattr(isolated, "_BOOT", f"raise SystemExit('{why}')")
    else:
        monkeypatch.setattr(sys, "executable", "/no/such/python")
    with pytest.warns(UserWarning, match=f"run in this process.*({why}|No such file)"):
        session = Session(parse(TEXT), once=True)
    assert session.run(ONE)["y"].shape == (1, 2)
    Session(parse(TEXT), once=True)  # said once
    assert not pool.usable()


def test_workers_can_be_switched_off(pool: isolated._Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ONNXSLIM_ISOLATE", "0")
    assert Session(parse(TEXT), once=True).run(ONE)["y"].shape == (1, 2)
    isolated.start()
    assert not pool._all


# ------------------------------------------------------------------------------- what passes to and fro


@pytest.mark.parametrize(
    ("text", "feed"),
    [
        ("g (float16[N] x) => (float16[N] y) { y = Add(x, x) }", np.ones(3, np.float16)),
        ("g (float[N] x) => (float[N] y) { y = Add(x, x) }", np.ones(0, np.float32)),
        ("g (float[N] x) => (float[N] y) { y = Add(x, x) }", np.arange(6, dtype=np.float32)[::2]),
        ("g (string[N] x) => (string[N] y) { y = Identity(x) }", np.array(["a", "ü"], object)),
        ("g (float[N] x) => (seq(float[N]) y) { y = SequenceConstruct(x, x) }", np.ones(3, np.float32)),
    ],
)
def test_values_come_back_as_they_are_made(text: str, feed: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    there = Session(parse(text), once=True).run({"x": feed})["y"]
    monkeypatch.setenv("ONNXSLIM_ISOLATE", "0")
    here = Session(parse(text), once=True).run({"x": feed})["y"]
    assert type(there) is type(here)
    np.testing.assert_array_equal(there, here)
    assert not isinstance(there, np.ndarray) or there.flags.writeable


def test_errors_come_back_as_they_are_raised() -> None:
    with pytest.raises(LoadError, match=r"refuses the model: .*No opset import for domain"):
        Session(parse(TEXT.replace("Tanh", "my.Tanh")), once=True)
    with pytest.raises(LoadError, match="fails to run the model"):
        Session(parse(TEXT), once=True).run({"x": np.ones((1, 3), np.float32)})
    with pytest.raises(UsageError, match=r"cannot load custom operators from 'none\.so'"):
        Session(parse(TEXT), Target.cpu().with_libraries(["none.so"]), once=True)
    with pytest.raises(TargetError, match="NoSuchProvider is not available here"):
        Session(parse(TEXT), Target("none", "NoSuchProvider"), once=True)


def test_a_run_with_limits_stops_without_the_end_of_its_worker(pool: isolated._Pool) -> None:
    endless = """<ir_version: 8, opset_import: ["" : 17]> g (float[1] x) => (float[1] y)
<int64 n = {9000000000000000}, bool c = {1}>
{ y = Loop(n, c, x) <body = b (int64 i, bool d, float[1] v) => (bool e, float[1] w)
  { e = Identity(d)  w = Cos(v) }> }"""
    session = Session(parse(endless), once=True)
    with pytest.raises(LimitExceeded, match=r"the run took more than 0\.1 seconds"):
        session.run({"x": np.ones(1, np.float32)}, limits=RunLimits(0.1, 1 << 40))
    (worker,) = pool._all
    assert worker.usable()


# ------------------------------------------------------------------------------------- who asks for it


SCRIPT = """
import sys
from onnxslim import Pipeline
from tests.runtime.test_isolated import TEXT, Fatal, parse
sys.path.insert(0, {folder!r})
print("hello", flush=True)
Pipeline(Fatal(fate="hang", when="opened"))(parse(TEXT))
"""


@LINUX
@pytest.mark.parametrize(("number", "told"), [(signal.SIGINT, "KeyboardInterrupt"), (signal.SIGKILL, "")])
@pytest.mark.usefixtures("fateful")
def test_nothing_is_left_of_a_script_that_is_ended(number: int, told: str, tmp_path: Path) -> None:
    """The script has no guard for its main module, which a worker must not run again."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.format(folder=str(tmp_path)))
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        [sys.executable, script],
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=heed_interrupts,
    )
    assert until(lambda: bool(children(process.pid)))
    (worker,) = children(process.pid)
    time.sleep(1)  # it opens the model now, or is about to
    os.killpg(process.pid, number) if number == signal.SIGINT else process.kill()
    output, errors = process.communicate(timeout=60)
    assert process.returncode == -number
    assert output == "hello\n"
    assert told in errors
    assert until(lambda: gone(worker))


def _judge(answers: Any) -> None:
    answers.put(Session(parse(TEXT), once=True).run(ONE)["y"].shape)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there are no forks")
def test_forks_and_daemons_have_workers_of_their_own(pool: isolated._Pool) -> None:
    held = Session(parse(TEXT), once=True)
    isolated.start()
    context = multiprocessing.get_context("fork")
    answers = context.SimpleQueue()
    processes = [context.Process(target=_judge, args=(answers,), daemon=True) for _ in range(2)]
    for process in processes:
        process.start()
    assert [answers.get() for _ in processes] == [(1, 2)] * 2
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    assert held.run(ONE)["y"].shape == (1, 2)
    assert all(worker.usable() for worker in pool._all)


COMMAND = """
import sys
from onnxslim import cli
from onnxslim.runtime import isolated
start = isolated._Fork.__init__
isolated._Fork.__init__ = lambda fork, said: (print("forked", flush=True), start(fork, said))[0]
{before}
sys.argv[1:] = ["slim", {model!r}, {made!r}]
sys.exit(cli.main())
"""


@LINUX
@pytest.mark.parametrize(
    ("before", "fate"),
    [
        ("", "live"),
        ("import onnxruntime", "live"),
        ("sys.path.insert(0, {folder!r})", "live"),
        ("sys.path.insert(0, {folder!r})", "die"),
        ("import signal; signal.signal(signal.SIGCHLD, signal.SIG_IGN)", "live"),
        ("import signal; signal.signal(signal.SIGCHLD, signal.SIG_IGN)", "die"),
    ],
)
@pytest.mark.usefixtures("fateful")
def test_the_command_line_forks_its_worker_while_nothing_else_runs(
    before: str, fate: str, tmp_path: Path
) -> None:
    fated(fate, "opened").save(tmp_path / "a.onnx")
    model, made = str(tmp_path / "a.onnx"), tmp_path / "b.onnx"
    code = COMMAND.format(before=before.format(folder=str(tmp_path)), model=model, made=str(made))
    # With `CI`, ONNX Runtime has no thread of its own, without which a fork of it aborts in the end.
    env = {name: value for name, value in os.environ.items() if name != "CI"} | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("forked\n") == (before != "import onnxruntime")
    assert "Traceback" not in done.stderr
    survived = "the input does not run: ONNX Runtime ended with signal 11 while it opened the model"
    assert (survived in done.stdout) == (fate == "die" and before.startswith("sys"))
    assert ops(load(made)) == {"Tanh": 1}


@pytest.mark.usefixtures("fateful")
def test_candidates_of_a_search_may_end_a_process() -> None:
    judge = Judge(parse(TEXT), CalibrationData([ONE]), Target.cpu())
    for _ in range(2):
        with pytest.raises(WorkerEnded):
            judge(fated("die", "opened"))
        assert judge(parse(TEXT)).sqnr == np.inf


@pytest.mark.usefixtures("fateful")
def test_only_the_first_candidate_is_opened_twice() -> None:
    judge = Judge(parse(TEXT), CalibrationData([ONE]), Target.cpu())
    for _ in range(2):
        assert judge(parse(TEXT)).sqnr == np.inf
    assert judge(fated("die", "opened")).sqnr == np.inf
