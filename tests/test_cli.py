"""The command line, in this process unless a process must die; training has its own file."""

import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from small import small_model
from test_data import write_noise

import deflow_aug
from deflow_aug import image_rows
from deflow_aug.cli import COMMANDS, main, module
from deflow_aug.degrader import DeFlowDegrader


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a small model whose samples differ visibly."""
    output = tmp_path_factory.mktemp("weights")
    training = {"data": {"clean": {"folder": "photos", "images": 1}}, "recipe": {"steps": 3}}
    model = small_model(shift_init=0.1)
    DeFlowDegrader(model, training=training, device="cpu").save_pretrained(output)
    return output


def test_commands_are_described_as_their_modules_are() -> None:
    for name, description in COMMANDS.items():
        assert (module(name).__doc__ or "").splitlines()[0] == description


def test_help_does_not_wait_for_torch() -> None:
    program = (
        "import sys; from deflow_aug.cli import main\n"
        "try: main(sys.argv[1:])\n"
        "finally: assert 'torch' not in sys.modules"
    )
    for words in (["--help"], ["train", "--help"]):
        command = [sys.executable, "-c", program, *words]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    assert "--degraded" in done.stdout


def test_an_unknown_command_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["trian"])
    assert "'train'" in capsys.readouterr().err


def test_a_missing_package_is_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(arguments: object) -> int:
        raise ImportError("it needs more: pip install 'deflow-aug[more]'")

    monkeypatch.setattr(module("info"), "run", run)
    assert main(["info"]) == 2
    assert "deflow-aug info: it needs more" in capsys.readouterr().err


def test_info_tells_settings_data_and_the_shift(
    weights: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["info", str(weights)]) == 0
    told = capsys.readouterr().out
    for words in ("hidden: 4", '"images": 1', "eigenvalues of Sigma 0.01", "MB on disk"):
        assert words in told
    assert "collapsed" not in told


def test_info_warns_of_a_collapsed_shift(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = small_model()
    for shift in model.domain_shifts():
        shift.factor.data.zero_()
    DeFlowDegrader(model, device="cpu").save_pretrained(tmp_path / "w")
    assert main(["info", str(tmp_path / "w")]) == 0
    assert "Sigma has collapsed" in capsys.readouterr().out


def test_degrading_keeps_the_tree_and_the_inputs(weights: Path, tmp_path: Path) -> None:
    photos, output = tmp_path / "photos", tmp_path / "out"
    write_noise(photos / "a.png", 9, 13)
    write_noise(photos / "sub" / "b.bmp", 12, 8)
    before = {path: path.read_bytes() for path in photos.rglob("*.*")}
    arguments = ["degrade", str(photos), f"--output={output}", f"--weights={weights}"]
    assert main(arguments) == 0
    assert {path: path.read_bytes() for path in photos.rglob("*.*")} == before
    results = sorted(path.relative_to(output).as_posix() for path in output.rglob("*.*"))
    assert results == ["a.png", "sub/b.png"]
    with Image.open(output / "a.png") as result, Image.open(photos / "a.png") as photo:
        assert result.size == photo.size
        assert (np.asarray(result) != np.asarray(photo)).any()


def test_samples_differ_and_a_seed_repeats_them(weights: Path, tmp_path: Path) -> None:
    write_noise(tmp_path / "photos" / "a.png", 16, 16)
    write_noise(tmp_path / "photos" / "b.png", 16, 16)

    def degraded(name: str, seed: int, photo: str = "") -> dict[str, bytes]:
        output = tmp_path / name
        arguments = [str(tmp_path / "photos" / photo), f"--output={output}", "--samples=2"]
        assert main(["degrade", *arguments, f"--weights={weights}", f"--seed={seed}"]) == 0
        return {path.name: path.read_bytes() for path in output.iterdir()}

    first = degraded("first", 1)
    assert set(first) == {"a_1.png", "a_2.png", "b_1.png", "b_2.png"}
    # The photos have the same pixels; each is degraded in its own way.
    assert len(set(first.values())) == 4
    assert degraded("again", 1) == first
    assert degraded("other", 2) != first
    alone = degraded("alone", 1, "b.png")
    assert alone == {name: first[name] for name in alone}


def test_dequantisation_noise_can_be_switched_on(weights: Path, tmp_path: Path) -> None:
    write_noise(tmp_path / "a.png", 16, 16)
    command = ["degrade", str(tmp_path / "a.png"), f"--weights={weights}"]
    results = []
    for number, more in enumerate(([], ["--dequantize"], ["--dequantize"])):
        output = tmp_path / str(number)
        assert main([*command, f"--output={output}", *more]) == 0
        results.append((output / "a.png").read_bytes())
    assert results[0] != results[1] == results[2]


def test_a_file_that_cannot_be_read_is_skipped_and_counted(
    weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    photos, output = tmp_path / "photos", tmp_path / "out"
    write_noise(photos / "good.png", 16, 16)
    (photos / "broken.jpg").write_bytes((photos / "good.png").read_bytes()[:200])
    arguments = ["degrade", str(photos), f"--output={output}", f"--weights={weights}"]
    assert main(arguments) == 1
    captured = capsys.readouterr()
    assert "broken.jpg" in captured.err
    assert "1 of 2 photos" in captured.out
    assert [path.name for path in output.iterdir()] == ["good.png"]
    (photos / "good.png").unlink()
    assert main(arguments) == 2


def test_links_that_lead_nowhere_are_skipped_and_counted(
    weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    photos = tmp_path / "photos"
    write_noise(photos / "a.png", 16, 16)
    (photos / "circle.png").symlink_to("circle.png")
    (photos / "dangling.png").symlink_to("gone.png")
    (photos / "folder").symlink_to(photos)
    command = ["degrade", str(photos), f"--output={tmp_path / 'out'}", f"--weights={weights}"]
    assert main(command) == 1
    captured = capsys.readouterr()
    for name, target in (("circle", "circle"), ("dangling", "gone")):
        path = photos / f"{name}.png"
        assert f"skipped {path}: it is a link to {target}.png, which leads nowhere" in captured.err
    assert captured.out.startswith("1 of 3 photos")


def test_warnings_name_the_photo(
    weights: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def degrade_file(*_: object, **__: object) -> None:
        warnings.warn("Corrupt EXIF data.  Expecting more. ", stacklevel=1)  # as Pillow's are

    write_noise(tmp_path / "a.png", 16, 16)
    monkeypatch.setattr(DeFlowDegrader, "degrade_file", degrade_file)
    command = ["degrade", str(tmp_path / "a.png"), f"--output={tmp_path / 'out'}"]
    assert main([*command, f"--weights={weights}"]) == 0
    lines = capsys.readouterr().err.splitlines()
    assert f"warning: {tmp_path / 'a.png'}: Corrupt EXIF data. Expecting more." in lines


def test_names_of_any_kind(weights: Path, tmp_path: Path) -> None:
    photos = tmp_path / "meine Fotos"
    for name in ("a b.png", "ünï 写真.jpg", "x.y.png", "-x.png", "[1]%d.png"):
        write_noise(photos / name, 16, 16)
    command = ["degrade", str(photos), f"--output={tmp_path / 'zu spät'}", f"--weights={weights}"]
    assert main(command) == 0
    names = {path.name for path in (tmp_path / "zu spät").iterdir()}
    assert names == {"a b.png", "ünï 写真.png", "x.y.png", "-x.png", "[1]%d.png"}


def test_paths_that_are_not_there_are_skipped_and_counted(
    weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_noise(tmp_path / "a.png", 16, 16)
    (tmp_path / "empty").mkdir()
    photos = [str(tmp_path / name) for name in ("missing.png", "a.png", "empty")]
    output = tmp_path / "out"
    assert main(["degrade", *photos, f"--output={output}", f"--weights={weights}"]) == 1
    captured = capsys.readouterr()
    assert f"skipped: no file or folder {photos[0]}" in captured.err
    assert f"skipped: no image files in {photos[2]}" in captured.err
    assert captured.out.startswith("1 of 3 photos")
    assert captured.out.endswith(", 2 skipped\n")
    assert [path.name for path in output.iterdir()] == ["a.png"]
    lost = [photos[0], photos[2]]
    assert main(["degrade", *lost, f"--output={output}", f"--weights={weights}"]) == 2
    told = capsys.readouterr().err
    assert all(path in told for path in lost)


@pytest.mark.usefixtures("locked")
def test_a_folder_that_cannot_be_searched_is_skipped_and_counted(
    weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_noise(tmp_path / "photos" / "a.png", 16, 16)
    write_noise(tmp_path / "photos" / "locked" / "b.png", 16, 16)
    output = tmp_path / "out"
    command = ["degrade", f"--output={output}", f"--weights={weights}"]
    assert main([*command, str(tmp_path / "photos")]) == 1
    captured = capsys.readouterr()
    reason = f"cannot search the folder {tmp_path / 'photos' / 'locked'}: Permission denied"
    assert f"skipped: {reason}" in captured.err
    assert captured.out.startswith("1 of 2 photos")
    assert [path.name for path in output.iterdir()] == ["a.png"]
    assert main([*command, str(tmp_path / "photos" / "locked")]) == 2
    assert f"deflow-aug degrade: {reason}\n" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{photos}", "--output={photos}"], "overwrite an input"),
        (["{photos}", "{photos}/a.png", "--output={out}"], None),
        (["{photos}/a.png", "{photos}/sub/a.png", "--output={out}"], "written to the same file"),
        (["", "--output={out}"], "is empty"),
        (["{photos}", "--output="], "is empty"),
        (["{photos}/none.png", "--output={out}"], "none.png"),
        (["{empty}", "--output={out}"], "no image files"),
        (["{photos}", "--output={out}", "--samples=0"], "--samples"),
        (["{photos}", "--output={out}", "--weights=nobody"], "nobody"),
        (["{photos}", "--output={out}", "--seed=-1"], "--seed"),
        (["{photos}", "--output={out}", "--temperature=-1"], "--temperature"),
    ],
)
def test_bad_arguments_are_told(
    weights: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str | None,
) -> None:
    places = {"photos": tmp_path / "photos", "out": tmp_path / "out", "empty": tmp_path / "empty"}
    write_noise(places["photos"] / "a.png", 16, 16)
    write_noise(places["photos"] / "sub" / "a.png", 16, 16)
    places["empty"].mkdir()
    words = [word.format(**places) for word in arguments]
    if not any(word.startswith("--weights") for word in words):
        words.append(f"--weights={weights}")
    status = main(["degrade", *words])
    if message is None:  # the same file named twice is degraded once
        assert status == 0
        assert len(list((tmp_path / "out").rglob("*.png"))) == 2
    else:
        assert status == 2
        assert message in capsys.readouterr().err
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--temperature=50", "warning: --temperature 50 makes the latent shift 50 times what was"),
        # 16 = 8 + 2 * 4 pixels a side, and 8 of them count.
        (
            "--tile=7",
            "warning: --tile 7: each tile of 8 pixels is computed with 8 pixels around it, 9",
        ),
        ("--temperature=3", None),
        ("--tile=16", None),
        ("--tile=0", None),
        ("--tile=auto", None),
    ],
)
def test_settings_that_make_little_sense_are_told_of_once(
    weights: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    flag: str,
    message: str | None,
) -> None:
    monkeypatch.setattr(DeFlowDegrader, "halo", lambda self: 8)
    for name in "abc":
        write_noise(tmp_path / "photos" / f"{name}.png", 24, 24)
    command = ["degrade", str(tmp_path / "photos"), f"--output={tmp_path / 'out'}"]
    assert main([*command, f"--weights={weights}", flag]) == 0
    told = [line for line in capsys.readouterr().err.splitlines() if "warning" in line]
    assert len(told) == (message is not None)
    assert message is None or told[0].startswith(message)
    assert flag != "--tile=7" or "9 times the work" in told[0]  # 24 pixels a side instead of 8
    assert len(list((tmp_path / "out").iterdir())) == 3


def test_the_command_tells_its_version() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "deflow_aug.cli", "--version"], capture_output=True, text=True
    )
    assert done.returncode == 0
    assert done.stdout.split() == ["deflow-aug", deflow_aug.__version__]


def test_all_photos_that_share_a_result_are_told_at_once(
    weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("a.png", "a.bmp", "b.png", "b.bmp", "b.webp", "c.png"):
        write_noise(tmp_path / "photos" / name, 16, 16)
    command = ["degrade", str(tmp_path / "photos"), f"--weights={weights}"]
    assert main([*command, f"--output={tmp_path / 'out'}"]) == 2
    first, second = capsys.readouterr().err.splitlines()[1:]
    assert all(name in first for name in ("a.png:", "a.bmp", "photos/a.png"))
    assert all(name in second for name in ("b.png:", "b.bmp", "b.webp", "photos/b.png"))


def test_waiting_threads_sleep_unless_the_user_decided(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which has to be said before PyTorch is loaded."""
    script = (
        "import os, sys; from deflow_aug.cli import main; main(['degrade', '', '--output=x']);"
        "print('torch' in sys.modules, os.environ.get('GOMP_SPINCOUNT'))"
    )

    def heard() -> list[str]:
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
        return done.stdout.split()

    for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
        monkeypatch.delenv(name, raising=False)
    assert heard() == ["True", "1000"]
    monkeypatch.setenv("GOMP_SPINCOUNT", "7")
    assert heard() == ["True", "7"]
    monkeypatch.delenv("GOMP_SPINCOUNT")
    monkeypatch.setenv("OMP_WAIT_POLICY", "active")
    assert heard() == ["True", "None"]


def test_a_photo_beside_the_inputs_is_not_overwritten(
    weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Although it was not named: a.bmp would become a.png, and there is another a.png."""
    write_noise(tmp_path / "a.bmp", 16, 16)
    write_noise(tmp_path / "a.png", 16, 16, seed=1)
    before = (tmp_path / "a.png").read_bytes()
    command = ["degrade", str(tmp_path / "a.bmp"), f"--output={tmp_path}", f"--weights={weights}"]
    assert main(command) == 2
    assert "overwrite" in capsys.readouterr().err
    assert (tmp_path / "a.png").read_bytes() == before


def test_degrading_again_replaces_the_results(weights: Path, tmp_path: Path) -> None:
    write_noise(tmp_path / "photos" / "a.png", 16, 16)
    command = ["degrade", str(tmp_path / "photos"), f"--output={tmp_path / 'out'}"]
    assert main([*command, f"--weights={weights}", "--seed=1"]) == 0
    first = (tmp_path / "out" / "a.png").read_bytes()
    assert main([*command, f"--weights={weights}", "--seed=2"]) == 0
    assert (tmp_path / "out" / "a.png").read_bytes() != first


@pytest.mark.parametrize("error", [PermissionError, ImportError, MemoryError])
def test_whatever_keeps_a_photo_from_being_read_concerns_it_alone(
    weights: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    error: type[Exception],
) -> None:
    for name in ("bad", "good"):
        write_noise(tmp_path / "photos" / f"{name}.png", 16, 16)
    honest = image_rows.decoded

    def decoded(data: bytes, path: Path) -> object:
        if path.stem == "bad":
            raise error("cannot")
        return honest(data, path)

    monkeypatch.setattr(image_rows, "decoded", decoded)
    output = tmp_path / "out"
    command = ["degrade", str(tmp_path / "photos"), f"--output={output}", f"--weights={weights}"]
    assert main(command) == 1
    assert "bad.png" in capsys.readouterr().err
    assert [path.name for path in output.iterdir()] == ["good.png"]


def test_a_device_that_is_not_there(weights: Path, capsys: pytest.CaptureFixture[str]) -> None:
    photo = str(Path(__file__).parents[1] / "examples" / "images" / "dog.png")
    command = ["degrade", photo, "--output=unused", f"--weights={weights}"]
    for device in ("cuda:99", "toaster"):
        assert main([*command, f"--device={device}"]) == 2
        assert f"no device '{device}'" in capsys.readouterr().err
