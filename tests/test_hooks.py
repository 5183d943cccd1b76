"""What other tools pick up: names that they look for, entries that they run, and files that they parse."""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import yaml

from onnxslim.ir.model import load
from tests.helpers import ROOT, normal, parse

HOOKS = {hook["id"]: hook for hook in yaml.safe_load((ROOT / ".pre-commit-hooks.yaml").read_text("utf-8"))}
SLACK = "g (float[N,4] x) => (float[N,4] y) { [a] z = Identity(x) [b] y = Relu(z) }"


def example(name: str) -> dict[str, Any]:
    return runpy.run_path(str(ROOT / "examples" / name))


def pre_commit(hook: str, *files: Path) -> subprocess.CompletedProcess[str]:
    """Run an entry as pre-commit does: with the files behind it, `onnxslim` in the path."""
    folder = files[0].parent
    script = folder / "onnxslim"
    script.write_text(f'#!/bin/sh\nexec "{sys.executable}" -W error -m onnxslim "$@"\n', encoding="utf-8")
    script.chmod(0o755)
    path = f"{folder}{os.pathsep}{os.environ['PATH']}"
    entry = f"{HOOKS[hook]['entry']} {' '.join(map(str, files))}"
    words = {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT)}
    return subprocess.run(entry, shell=True, env=words, capture_output=True, text=True)


@pytest.mark.slow
def test_pre_commit_slims_what_it_is_given_and_leaves_the_rest(tmp_path: Path) -> None:
    files = [tmp_path / "a.onnx", tmp_path / "b.onnx"]
    parse(SLACK).save(files[0])
    parse(SLACK.replace("Identity", "Neg")).save(files[1])
    kept = files[1].read_bytes()
    done = pre_commit("onnxslim-slim", *files)
    assert done.returncode == 0, done.stderr
    assert [load(file).stats().nodes for file in files] == [1, 2]
    assert files[1].read_bytes() == kept, "nothing to do, nothing written"
    slimmed = files[0].read_bytes()
    assert pre_commit("onnxslim-slim", files[0]).returncode == 0
    assert files[0].read_bytes() == slimmed
    assert pre_commit("onnxslim-verify", files[0]).returncode == 0
    assert pre_commit("onnxslim-verify", *files).returncode == 2, "the second has no certificate"


@pytest.mark.slow
def test_the_action_runs_what_it_is_told_and_nothing_else(tmp_path: Path) -> None:
    action = yaml.safe_load((ROOT / "action.yml").read_text("utf-8"))
    *_, install, run = action["runs"]["steps"]
    assert "${{" not in install["run"] + run["run"], "inputs come in the environment, where nothing runs them"
    (tmp_path / "onnxslim").write_text(f'#!/bin/sh\nexec "{sys.executable}" -m onnxslim "$@"\n', "utf-8")
    (tmp_path / "onnxslim").chmod(0o755)
    (tmp_path / "python").symlink_to(sys.executable)
    for args, code in (("--version", 0), ("slim none.onnx; touch owned", 2), ("slim none.onnx", 3)):
        path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
        words = {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT), "ARGS": args}
        done = subprocess.run(["bash", "-e", "-c", run["run"]], env=words, capture_output=True, cwd=tmp_path)
        assert done.returncode == code, done.stderr
    assert not (tmp_path / "owned").exists()


def test_transformers_js_finds_its_names(tmp_path: Path) -> None:
    model = tmp_path / "exported.onnx"
    text = "g (float[N,64] x) => (float[N,64] y) <float[64,64] w> { y = MatMul(x, w) }"
    parse(text, {"w": normal(64, 64)}).save(model)
    written = example("transformers_js.py")["layout"](model, tmp_path)
    names = ["model.onnx", "model_fp16.onnx", "model_quantized.onnx", "model_q4.onnx"]
    assert sorted(path.name for path in (tmp_path / "onnx").iterdir()) == sorted(written) == sorted(names)
    sizes = [written[name] for name in names]
    assert sizes == sorted(sizes, reverse=True)


def test_the_hook_of_ultralytics_quantizes_on_its_own_images(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = example("ultralytics_hook.py")
    found["small_detector"]().save(tmp_path / "best.onnx")
    seen = np.random.default_rng(0).integers(0, 255, (5, 8, 3, 32, 32), dtype=np.uint8)
    exporter = SimpleNamespace(
        file=tmp_path / "best.pt",
        args=SimpleNamespace(format="onnx"),
        get_int8_calibration_dataloader=lambda: ({"img": batch} for batch in seen),
    )
    data = found["calibration_images"](exporter, 20)
    images = np.concatenate([feeds["images"] for feeds in data])
    np.testing.assert_array_equal(images, seen.reshape(-1, 3, 32, 32)[:20].astype(np.float32) / 255)
    found["hook"](int8=True, images=20)(exporter)
    assert "int8: 0." in capsys.readouterr().out
    small = load(tmp_path / "best.int8.onnx")
    assert small.stats().bytes < load(tmp_path / "best.onnx").stats().bytes
    found["hook"]()(SimpleNamespace(args=SimpleNamespace(format="engine")))


def test_templates_are_read() -> None:
    for form in (ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml"):
        read = yaml.safe_load(form.read_text("utf-8"))
        assert read["name"]
        assert all(each["attributes"] for each in read["body"])
