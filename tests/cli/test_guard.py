"""The command line survives what ends its process: without the pass that did, or with one line."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from onnxslim import load
from onnxslim.cli import guard
from tests.helpers import heed_interrupts, ops, parse

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the command is forked on Linux only")
ENV = {**os.environ, "PYTHONPATH": str(ROOT)}
SINE = "agraph (float[2,3] x) => (float[2,3] y) { i = Identity(x) y = Sin(i) }"
# The command line with one of its passes, or what comes behind them, doing something native code may do.
COMMAND = """
import os, signal, sys, time
from onnxslim.passes.half import Half
from onnxslim.recipes.recipe import Work
def fate(*_):
    {fate}
{place} = fate
sys.argv[1:] = {words!r}
from onnxslim.cli import main
sys.exit(main())
"""


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "a.onnx"
    parse(SINE).save(path)
    return path


def run(fate: str, words: list[str], place: str = "Half.run") -> subprocess.CompletedProcess[str]:
    code = COMMAND.format(fate=fate, place=place, words=words)
    return subprocess.run([sys.executable, "-c", code], env=ENV, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("name", ["SIGSEGV", "SIGABRT", "SIGKILL"])
def test_a_pass_that_ends_the_process_is_reverted_and_named(name: str, source: Path, tmp_path: Path) -> None:
    made = tmp_path / "b.onnx"
    words = ["run", str(source), str(made), "-p", "slim", "-p", "half"]
    done = run(f"os.kill(os.getpid(), signal.{name})", words)
    assert done.returncode == 0, done.stderr
    how = f"signal {getattr(signal, name).value}"
    assert f"a pass ended the process with {how}" in done.stderr
    reverted = f"the model is as it was before: pass 'half' ended the process with {how}"
    assert f"pass half() was reverted, {reverted}" in done.stderr
    assert ops(load(made)) == {"Sin": 1}
    assert done.stdout.count("saved") + done.stderr.count("saved") == 1


def test_asked_to_stop_at_errors_it_saves_nothing(source: Path, tmp_path: Path) -> None:
    made = tmp_path / "b.onnx"
    words = ["run", str(source), str(made), "-p", "slim", "-p", "half", "--on-error", "raise"]
    done = run("os.kill(os.getpid(), signal.SIGSEGV)", words)
    assert done.returncode == 3
    assert "error: pass 'half' ended the process with signal 11" in done.stderr
    assert not made.exists()


def test_what_no_pass_did_is_told_in_one_line(source: Path, tmp_path: Path) -> None:
    made = tmp_path / "b.onnx"
    done = run("os.abort()", ["slim", str(source), str(made)], "Work.run")
    assert done.returncode == 3
    assert "error: the process was ended by signal 6 (Aborted)" in done.stderr
    assert "Traceback" not in done.stderr
    assert not made.exists()


def test_codes_and_words_come_through(source: Path) -> None:
    done = run("pass", ["inspect", str(source)])
    assert done.returncode == 0
    assert "Sin" in done.stdout
    assert run("pass", ["inspect", "--nothing", str(source)]).returncode == 2
    assert run("pass", ["inspect", "nowhere.onnx"]).returncode == 3


@pytest.mark.parametrize("everybody", [False, True], ids=["one", "group"])
def test_an_interruption_is_told_once(everybody: bool, source: Path, tmp_path: Path) -> None:
    started = tmp_path / "pid"
    fate = f"open({str(started)!r}, 'w').write('.'); time.sleep(60)"
    words = ["run", str(source), str(tmp_path / "b.onnx"), "-p", "half"]
    command = [sys.executable, "-c", COMMAND.format(fate=fate, place="Half.run", words=words)]
    with subprocess.Popen(
        command, env=ENV, stderr=subprocess.PIPE, start_new_session=True, preexec_fn=heed_interrupts
    ) as process:
        while not (started.exists() and started.read_text()):
            assert process.poll() is None
            time.sleep(0.02)
        (os.killpg if everybody else os.kill)(process.pid, signal.SIGINT)
        _, told = process.communicate(timeout=20)
    assert (process.returncode, told) == (130, b"onnxslim: interrupted\n")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGKILL, -signal.SIGKILL)])
def test_it_ends_with_the_process_that_waits(number: int, code: int, source: Path, tmp_path: Path) -> None:
    started = tmp_path / "pid"
    fate = f"open({str(started)!r}, 'w').write(str(os.getpid()) + '.'); time.sleep(60)"
    words = ["run", str(source), str(tmp_path / "b.onnx"), "-p", "half"]
    command = [sys.executable, "-c", COMMAND.format(fate=fate, place="Half.run", words=words)]
    with subprocess.Popen(command, env=ENV, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        while not (started.exists() and started.read_text().endswith(".")):
            assert process.poll() is None
            time.sleep(0.02)
        process.send_signal(number)
        assert process.wait(20) == code
    child = Path("/proc") / started.read_text().rstrip(".")
    deadline = time.monotonic() + 20
    while child.exists() and "Z" not in (child / "stat").read_text().split(")")[1]:
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_the_echo_of_an_interruption_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [10.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    interrupt = guard._once()
    with pytest.raises(KeyboardInterrupt):
        interrupt(signal.SIGINT, None)
    interrupt(signal.SIGINT, None)
    now[0] += 5
    with pytest.raises(KeyboardInterrupt):
        interrupt(signal.SIGINT, None)
