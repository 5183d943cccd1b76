"""What --help shows first and marks, and completion of words by the shell."""

from __future__ import annotations

import pytest

from onnxslim import cli, passes


def sections(capsys: pytest.CaptureFixture[str], name: str) -> dict[str, str]:
    """The help of a command, by heading."""
    assert cli.main([name, "--help"]) == 0
    found: dict[str, str] = {}
    heading = ""
    for line in capsys.readouterr().out.splitlines():
        if line and not line.startswith(" "):
            heading = line.rstrip(":")
        found[heading] = found.get(heading, "") + " " + line.strip()
    return found


@pytest.mark.parametrize("name", ["slim", "quantize", "prune", "inline", "shapes"])
def test_own_options_come_first_and_shared_ones_under_their_heading(
    capsys: pytest.CaptureFixture[str], name: str
) -> None:
    found = sections(capsys, name)
    assert list(found)[1:] == ["Arguments", "Options", "Data", "Options that commands share"]
    for option in passes.options_of(passes.get(name)):
        assert f"--{option.name.replace('_', '-')} " in found["Options"]
    assert "--report " in found["Options that commands share"]
    assert "--report " not in found["Options"]


def test_images_are_offered_where_passes_learn_from_data(capsys: pytest.CaptureFixture[str]) -> None:
    for name, offered in (("quantize", True), ("half", True), ("inline", False), ("slim", False)):
        assert ("--image-mean" in sections(capsys, name)["Data"]) == offered, name
    assert "--image-mean" in sections(capsys, "run")["Data"]
    assert "--image-mean" in sections(capsys, "validate")["Data"]


def test_data_is_marked_where_a_pass_cannot_do_without(capsys: pytest.CaptureFixture[str]) -> None:
    def data(name: str) -> str:
        return sections(capsys, name)["Data"].partition("--batch-size")[0]

    assert "[required" in data("quantize")
    assert "[required" not in data("half")
    assert "[required" not in data("prune")


def test_the_shell_completes_commands_and_options(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("_ONNXSLIM_COMPLETE", "complete_bash")
    for typed, wanted in (("onnxslim quan", "quantize"), ("onnxslim quantize --obs", "--observer")):
        monkeypatch.setenv("COMP_WORDS", typed)
        monkeypatch.setenv("COMP_CWORD", str(len(typed.split()) - 1))
        with pytest.raises(SystemExit):
            cli.main([])
        assert wanted in capsys.readouterr().out.split()
