"""``deflow-aug evaluate``: tables, figures, and a page that needs nothing else."""

from __future__ import annotations

import base64
import json
import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from small import small_model

from deflow_aug import DeFlowDegrader
from deflow_aug.cli import evaluate, main
from deflow_aug.evaluation import html_report, sheets, two_sample
from deflow_aug.evaluation.page import Picture, Section, page
from deflow_aug.evaluation.tables import Table
from deflow_aug.image_files import write_image

SIZE = 96


def photograph(seed: int, side: int = SIZE) -> np.ndarray:
    """A smooth picture with edges, uint8 [side, side, 3]."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:side, :side] / side
    picture = 120 + 50 * np.sin(5 * x + seed)[..., None] + 40 * np.cos(4 * y)[..., None]
    picture = picture + 20 * (x > 0.5)[..., None] + rng.uniform(-8, 8, 3)
    return np.clip(np.rint(picture), 0, 255).astype(np.uint8)


def noisy(picture: np.ndarray, seed: int) -> np.ndarray:
    noise = np.random.default_rng(seed).normal(0, 5, picture.shape)
    return np.clip(np.rint(picture + noise), 0, 255).astype(np.uint8)


@pytest.fixture(scope="module", name="data")
def _data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data")
    for name in ("one/validation", "two/validation", "degraded", "clean"):
        (root / name).mkdir(parents=True)
    for number in range(3):
        clean = photograph(number)
        write_image(clean, root / f"one/validation/s{number // 2}_{number}_clean.png")
        write_image(
            noisy(clean, number), root / f"one/validation/s{number // 2}_{number}_degraded.png"
        )
    write_image(photograph(5), root / "two/validation/a_clean.png")
    write_image(noisy(photograph(5), 5), root / "two/validation/a_degraded.png")
    for number in range(8):
        write_image(noisy(photograph(10 + number, 192), number), root / f"degraded/{number}.png")
        write_image(photograph(30 + number, 192), root / f"clean/{number}.png")
    DeFlowDegrader(small_model()).save_pretrained(root / "small")
    return root


class Reader(HTMLParser):
    """What a page holds: its cells, images, and anything that would need more."""

    def __init__(self) -> None:
        super().__init__()
        self.cells: list[str] = []
        self.images: list[dict[str, Any]] = []
        self.outside: list[str] = []
        self.inside = False

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        found = dict(attributes)
        if tag in ("th", "td"):
            self.cells.append("")
            self.inside = True
        if tag == "img":
            self.images.append(found)
        if tag in ("script", "link", "iframe", "object", "base"):
            self.outside.append(tag)
        for name, value in attributes:
            if name in ("src", "href", "srcset") and not (value or "").startswith("data:"):
                self.outside.append(f"{name}={value}")

    def handle_endtag(self, tag: str) -> None:
        self.inside = self.inside and tag not in ("th", "td")

    def handle_data(self, data: str) -> None:
        if self.inside:
            self.cells[-1] += data


METHODS = ["nothing", "white", "signal-dependent", "noise patches", "classical chain"]


def test_it_compares_models_on_several_folders(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--weights", "camera-noise", f"small={data / 'small'}"]
    words += ["--pairs", str(data / "one/validation"), "--pairs", str(data / "two/validation")]
    words += ["--degraded", str(data / "degraded"), "--draws", "2", "--scenes", "^s?([0-9a]+)"]
    file = tmp_path / "figures.json"
    assert main(["evaluate", *words, "--json", str(file)]) == 0
    printed = capsys.readouterr().out
    methods = ["camera-noise", "small", *METHODS, evaluate.TUNED]
    for name in [*methods, "floor: same picture", "floor: other pictures"]:
        assert f"| {name} |" in printed
    assert "3 pairs of 2 scenes, 2 draws each" in printed

    figures = json.loads(file.read_text())
    one, two = figures["one/validation"], figures["two/validation"]
    assert list(one["methods"]) == methods
    assert list(one["differences"]) == methods[1:]
    akld = one["methods"]["camera-noise"]["akld"]
    assert 0 < akld["low"] <= akld["value"] <= akld["high"]
    assert f"{akld['value']:.3f} [{akld['low']:.3f}, {akld['high']:.3f}]" in printed
    assert list(one["bits"]) == ["camera-noise", "small"]
    assert one["methods"]["nothing"]["variety"]["value"] == 0
    assert two["methods"]["white"]["akld"]["low"] is None  # one pair has no interval
    assert "floor: other pictures" not in two["floors"]
    assert figures["settings"]["white"].startswith("sigma ")


def test_the_page_holds_everything_and_needs_nothing(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "new" / "report"
    words = ["--weights", str(data / "small"), "--pairs", str(data / "one/validation")]
    file = tmp_path / "also" / "new" / "figures.json"
    words += ["--draws", "1", "--temperature", "0", "--json", str(file)]
    assert main(["evaluate", *words, "--report", str(output)]) == 0
    settings = json.loads(file.read_text())["settings"]
    assert {"--temperature": "0.0", "--seed": "0"}.items() <= settings.items()
    assert not {"--clean", "--report", "--json", "--dequantize"} & settings.keys()
    printed = capsys.readouterr().out
    text = (output / html_report.FILE).read_text()
    reader = Reader()
    reader.feed(text)
    assert reader.outside == []
    assert "url(" not in text
    assert "@import" not in text
    rows = [line for line in printed.splitlines() if line.startswith("| ")]
    assert len(rows) > 30
    for line in rows:
        cells = [cell.strip() for cell in line.strip("| ").split(" | ")]
        assert all(cell in reader.cells for cell in cells if cell), line
    pictures = {path.read_bytes() for path in output.glob("*.png")}
    assert {_decoded(image) for image in reader.images} == pictures
    # Six plots, a sheet of three methods, and one of temperatures.
    assert len(reader.images) == len(pictures) == 8
    assert all(image["alt"] for image in reader.images)
    assert sorted(path.suffix for path in output.iterdir()) == [".html", *[".png"] * 8]


def test_noise_at_inference_can_be_chosen(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["evaluate", "--weights", str(data / "small"), "--draws", "2"]
    words += ["--pairs", str(data / "two/validation")]
    printed = []
    for further in ([], ["--dequantize"], ["--plain_conditioning"]):
        assert main([*words, *further]) == 0
        printed.append(capsys.readouterr().out.split("## Settings")[0])
    assert len(set(printed)) == 3


def _decoded(image: dict[str, Any]) -> bytes:
    kind, _, text = image["src"].partition(",")
    assert kind == "data:image/png;base64"
    return base64.b64decode(text)


def test_without_ground_truth_it_asks_classifiers(
    data: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: dict[str, Any] = {}

    def compare(real: Any, fakes: Any, *, seed: int) -> Table:
        seen.update(real=real, fakes=fakes, seed=seed)
        return Table("Told?", ("", "AUC"), (("small", "0.5"),))

    monkeypatch.setattr(two_sample, "compare", compare)
    monkeypatch.setitem(sys.modules, "pyiqa", None)
    write_image(photograph(1, 64), data / "clean/small.png")
    (data / "clean/broken.png").write_bytes(b"none")
    words = ["--weights", str(data / "small"), "--clean", str(data / "clean"), "--seed", "3"]
    words += ["--degraded", str(data / "degraded"), "--report", str(tmp_path / "out")]
    assert main(["evaluate", *words]) == 0
    printed = capsys.readouterr().out
    assert "| small | 0.5 |" in printed
    assert "1 files in" in printed
    assert "smaller than 192 x 192 pixels: small.png" in printed
    assert "cannot be read: broken.png" in printed
    assert (len(seen["real"]), seen["seed"]) == (8, 3)
    assert list(seen["fakes"])[:2] == ["small", "nothing"]
    assert len(seen["fakes"]) == 6
    assert np.array_equal(seen["fakes"]["nothing"][0], photograph(30, 192))
    assert len(list((tmp_path / "out").glob("*.png"))) == 2  # six methods, four on a sheet


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "give --pairs DIR, or --clean DIR and --degraded DIR"),
        (["--clean", "{clean}"], "--clean is compared with the photographs of --degraded"),
        (["--pairs", "{one}", "--draws", "0"], "--draws must be at least 1"),
        (["--pairs", "{one}", "--seed", "-1"], "--seed must be at least 0"),
        (["--pairs", "{one}", "--temperature", "-1"], "--temperature must be at least 0"),
        (["--pairs", "{one}", "{one}"], "--pairs names one/validation twice"),
        (["--pairs", "{one}", "--json", "{clean}"], "--json must be a file"),
        (["--pairs", "{one}", "--report", "{file}"], "--report must be a folder"),
        (["--pairs", "{clean}"], "no pairs NAME_degraded"),
        (["--pairs", "{one}/absent"], "absent is not there"),
        (["--pairs", "{one}", "--weights", "small="], "--weights takes NAME=WEIGHTS"),
        (["--pairs", "{one}", "--weights", "a={small}", "a={small}"], "each name once"),
        (["--pairs", "{one}", "--weights", "nothing={small}"], "may not have a baseline's name"),
        (["--pairs", "{one}", "--weights", "no-such"], "no weights 'no-such'"),
        (["--pairs", "{one}", "--domain", "night", "--weights", "{small}"], "got 'night'"),
        (["--pairs", "{one}", "--scenes", "^k", "--weights", "{small}"], "does not match"),
    ],
)
def test_senseless_settings_are_refused(
    data: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    places = {"one": data / "one/validation", "clean": data / "clean", "small": data / "small"}
    places["file"] = data / "clean/0.png"
    assert main(["evaluate", *(word.format(**places) for word in words)]) == 2
    assert message in capsys.readouterr().err


def test_pairs_that_do_not_fit_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "pairs"
    folder.mkdir()
    write_image(photograph(0), folder / "a_clean.png")
    assert main(["evaluate", "--pairs", str(folder)]) == 2
    assert "but not a_degraded" in capsys.readouterr().err
    write_image(photograph(0, 64), folder / "a_degraded.png")
    assert main(["evaluate", "--pairs", str(folder)]) == 2
    assert "a is 96 x 96 clean, 64 x 64 degraded" in capsys.readouterr().err


def test_a_report_without_matplotlib_is_refused_at_once(
    data: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(evaluate, "find_spec", lambda name: None)
    words = ["--pairs", str(data / "one/validation"), "--report", str(tmp_path / "out")]
    assert main(["evaluate", *words]) == 2
    captured = capsys.readouterr()
    assert "pip install 'deflow-aug[plots]'" in captured.err
    assert captured.out == ""
    assert not (tmp_path / "out").exists()


def test_what_stands_on_the_page_is_escaped() -> None:
    table = Table("a < b", ("", "x"), (("<script>", "1"),))
    picture = Picture("p", b"png", 'noise & "grain"')
    text = page("<title>", "less < more", [Section("x & y", [table, picture])])
    reader = Reader()
    reader.feed(text)
    assert reader.outside == []
    assert reader.images[0]["alt"] == 'noise & "grain"'
    assert not re.search("<(script|b)>", text)


def test_sheets_show_crops_at_300_percent_brightened_alike() -> None:
    crops = [np.full((64, 64, 3), value, np.uint8) for value in (40, 100)]
    crops[0][10, 20] = 80
    drawn = np.asarray(sheets.sheet({"a": crops[:1], "b": crops[1:]}, ["dark"]))
    top, left, step = sheets.MARGIN + sheets.LABEL, sheets.MARGIN, 3 * 64 + sheets.GAP
    assert drawn[top, left].tolist() == [102] * 3  # by 255 / 100, which the brighter one allows
    assert drawn[top, left + step].tolist() == [255] * 3
    assert (drawn[top + 30 : top + 33, left + 60 : left + 63] == 204).all()
    assert (drawn[[top + 29, top + 33], left + 61] == 102).all()
    assert sheets.gain(crops[:1]) == pytest.approx(4)  # and not more
    assert sheets.shown([3.0, 1.0, 9.0, 2.0, 5.0], 3) == [1, 0, 2]
    assert sheets.middle(np.arange(80 * 70 * 3).reshape(80, 70, 3))[0, 0, 0] == (8 * 70 + 3) * 3
