"""Commands that are given a file, a folder or nothing where they expect something else."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import pytest
from test_data import write_noise

from deflow_aug.cli import main


@pytest.fixture
def places(tmp_path: Path) -> dict[str, Path]:
    found = {name: tmp_path / name for name in ("photos", "others", "file", "empty", "missing")}
    for name in ("photos", "others"):
        for number in range(4):
            write_noise(found[name] / f"{number}.png", 40, 40, seed=number)
    found["file"].write_text("nothing of use")
    found["empty"].mkdir()
    return found


def told(words: str, places: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> str:
    """What a command that cannot be done says; it leaves nothing behind."""
    before = sorted(places["photos"].parent.rglob("*"))
    assert main([word.format(**places) for word in words.split()]) == 2
    assert sorted(places["photos"].parent.rglob("*")) == before
    captured = capsys.readouterr()
    assert "Errno" not in captured.err
    return captured.err


WRITING = {
    "degrade": "degrade {photos} --output",
    "train": "train --clean {photos} --degraded {others} --output",
    "adapt": "adapt --degraded {photos} --name a --output",
    "suggest": "suggest --clean {photos} --degraded {others} --output",
    "evaluate": "evaluate --clean {photos} --degraded {others} --report",
    "convert": "convert {file} --output",
}


@pytest.mark.parametrize("command", WRITING)
@pytest.mark.parametrize("place", ["{file}", "{file}/new"])
def test_a_file_is_no_place_for_results(
    places: dict[str, Path], capsys: pytest.CaptureFixture[str], command: str, place: str
) -> None:
    message = told(f"{WRITING[command]} {place}", places, capsys)
    flag = WRITING[command].split()[-1]
    expected = f"{flag} must be a folder, but {places['file']} is a file; choose another name"
    assert expected in message


@pytest.mark.parametrize("command", WRITING)
def test_a_place_that_cannot_be_written_to(
    places: dict[str, Path],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    command: str,
) -> None:
    """It is told before anything is computed."""

    def refuse(**where: Any) -> None:
        raise PermissionError(13, "Permission denied", where["dir"])

    monkeypatch.setattr(tempfile, "TemporaryFile", refuse)
    message = told(f"{WRITING[command]} {{empty}}/new", places, capsys)
    assert f"nothing can be written to {places['empty']} (Permission denied)" in message


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("convert {missing} --output {empty}/w", "CHECKPOINT must be a .pth or .safetensors file"),
        ("convert {photos} --output {empty}/w", "but {photos} is a folder"),
        ("convert {file} --output {empty}/w --statistics {missing}", "--statistics must be a YAML"),
        ("convert {file} --output {empty}/w --statistics {photos}", "but {photos} is a folder"),
        (WRITING["train"] + " {empty}/w --encoder-weights {missing}", "there is no {missing}"),
        (WRITING["train"] + " {empty}/w --encoder-weights {photos}", "--encoder-weights must be"),
        (WRITING["train"] + " {empty}/w --cache-dir {file}", "--cache-dir must be a folder"),
        (WRITING["adapt"] + " {empty}/w --clean {missing}", "no such folder: {missing}"),
        ("evaluate --pairs {missing}", "{missing} is not there"),
        ("evaluate --pairs {file}", "{file} is a file"),
        ("evaluate --pairs {photos} --json {file}/a.json", "the place of --json must be a folder"),
    ],
)
def test_what_was_expected_is_told(
    places: dict[str, Path], capsys: pytest.CaptureFixture[str], words: str, message: str
) -> None:
    answer = told(words, places, capsys)
    assert message.format(**places) in answer
    assert "photographs:" not in answer  # nothing was computed before


def test_errors_of_the_system_come_without_their_number(
    places: dict[str, Path], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device", "out/a.png")

    monkeypatch.setattr("deflow_aug.degrader.DeFlowDegrader.degrade_file", refuse)
    message = told("degrade {photos} --output {empty}/out", places, capsys)
    assert "deflow-aug degrade: out/a.png: No space left on device" in message
