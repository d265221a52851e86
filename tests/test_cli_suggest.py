"""``deflow-aug suggest``."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from deflow_aug.cli import main, suggest
from deflow_aug.image_files import write_image


@pytest.fixture(name="folders")
def _folders(tmp_path: Path) -> list[str]:
    rng = np.random.default_rng(0)
    words = []
    for name in ("clean", "degraded"):
        (tmp_path / name).mkdir()
        for number in range(4):
            pixels = rng.integers(0, 256, (48, 64, 3), dtype=np.uint8)
            write_image(pixels, tmp_path / name / f"{number}.png")
        words += [f"--{name}", str(tmp_path / name)]
    return words


QUICK = ["--scales", "2", "4", "--noises", "0.03", "--steps", "3"]


def test_it_prints_a_table_and_writes_table_figures_and_plot(
    tmp_path: Path, folders: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "new" / "folder"
    assert main(["suggest", *folders, *QUICK, "--output", str(output)]) == 0
    printed = capsys.readouterr().out
    assert (output / suggest.MARKDOWN).read_text() == printed
    assert "| s | noise |" in printed
    figures = json.loads((output / suggest.FIGURES).read_text())
    assert [(r["scale"], r["noise"]) for r in figures["readings"]] == [(2, 0.03), (4, 0.03)]
    for r in figures["readings"]:
        assert r["network"]["low"] <= r["network"]["auc"] <= r["network"]["high"]
    with Image.open(output / suggest.PLOT) as image:
        image.load()
        assert image.format == "PNG"
    assert sorted(p.name for p in output.iterdir()) == sorted(
        [suggest.MARKDOWN, suggest.FIGURES, suggest.PLOT]
    )


def test_without_matplotlib_it_says_what_brings_the_plot(
    tmp_path: Path,
    folders: list[str],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    for name in [name for name in sys.modules if name.startswith("matplotlib.")]:
        monkeypatch.delitem(sys.modules, name)
    output = tmp_path / "out"
    assert main(["suggest", *folders, *QUICK, "--match_brightness", "--output", str(output)]) == 0
    assert "pip install 'deflow-aug[plots]'" in capsys.readouterr().out
    assert not (output / suggest.PLOT).exists()
    assert json.loads((output / suggest.FIGURES).read_text())["matched_brightness"] is True


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--scales", "0"], "--scales must be 1 or more"),
        (["--noises", "-0.1"], "--noises must be between 0 and 1"),
        (["--noises", "1.5"], "--noises must be between 0 and 1"),
        (["--scenes", "("], "--scenes is no regular expression"),
        (["--seed", "-1"], "--seed must be at least 0"),
        (["--steps", "0"], "--steps must be at least 2"),
        (["--images", "3"], "--images must be at least 4"),
    ],
)
def test_senseless_settings_are_refused(
    folders: list[str], capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    assert main(["suggest", *folders, *words]) == 2
    assert message in capsys.readouterr().err


def test_the_same_folder_twice_is_refused(
    folders: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["suggest", *folders[:2], "--degraded", folders[1]]) == 2
    assert "share 4 of their files" in capsys.readouterr().err


def test_the_command_is_parsed_without_torch() -> None:
    code = "import sys; import deflow_aug.cli.suggest; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
