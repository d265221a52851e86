"""The command line, in this process unless a process must die."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_convert import esrgan, export_encoder
from test_data import write_noise

from deflow_aug.cli import degrade, main
from deflow_aug.conditioning import ConditioningNetwork
from deflow_aug.degrader import DeFlowDegrader

TINY = [
    "--model.scale=2", "--model.levels=2", "--model.steps=1", "--model.hidden=4",
    "--model.encoder.channels=4", "--model.encoder.growth=4", "--model.encoder.blocks=1",
    "--model.encoder.stacked_blocks=[0]", "--crop=8", "--batch_size=2",
    "--model.shift_init=0.1",
]  # fmt: skip


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data")
    for number, name in enumerate(("clean", "degraded")):
        write_noise(root / name / "a.png", 32, 32, seed=number)
    return root


def train_command(folders: Path, output: Path, *more: str) -> list[str]:
    return [
        "train", f"--clean={folders / 'clean'}", f"--degraded={folders / 'degraded'}",
        f"--output={output}", *TINY, *more,
    ]  # fmt: skip


@pytest.fixture(scope="module")
def weights(folders: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("trained")
    assert main(train_command(folders, output, "--steps=3", "--sample_every=2")) == 0
    return output


def test_training_leaves_weights_samples_and_a_card(weights: Path) -> None:
    assert DeFlowDegrader.from_pretrained(weights).model.config.hidden == 4
    sheets = sorted(path.name for path in (weights / "samples").iterdir())
    assert sheets == ["step-00000002.png", "step-00000003.png"]
    with Image.open(weights / "samples" / sheets[0]) as sheet:
        assert min(sheet.size) > 80
    assert "steps: 3" in (weights / "README.md").read_text()


def test_info_tells_settings_data_and_the_shift(
    weights: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["info", str(weights)]) == 0
    told = capsys.readouterr().out
    for words in ("hidden: 4", '"images": 1', "eigenvalues of Sigma 0.01", "MB on disk"):
        assert words in told
    assert "collapsed" not in told


def test_info_warns_of_a_collapsed_shift(
    folders: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = train_command(folders, tmp_path / "w", "--steps=1", "--model.shift_init=0")
    assert main(command) == 0
    assert main(["info", str(tmp_path / "w")]) == 0
    assert "Sigma has collapsed" in capsys.readouterr().out


def test_training_starts_from_rrdb_weights(
    weights: Path, folders: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = DeFlowDegrader.from_pretrained(weights).model.config
    file = tmp_path / "rrdb.pth"
    torch.save(export_encoder(ConditioningNetwork(config), esrgan), file)
    command = train_command(folders, tmp_path / "w", "--steps=1", f"--encoder-weights={file}")
    assert main(command) == 0
    assert "encoder_weights: rrdb.pth" in (tmp_path / "w" / "README.md").read_text()
    file.unlink()
    resumed = train_command(folders, tmp_path / "w", "--steps=2", "--resume")
    (tmp_path / "w" / "README.md").unlink()
    assert main(resumed) == 0
    assert "encoder_weights: rrdb.pth" in (tmp_path / "w" / "README.md").read_text()
    assert "encoder_weights" not in (weights / "README.md").read_text()

    other = train_command(folders, tmp_path / "other", "--model.encoder.blocks=2")
    torch.save(export_encoder(ConditioningNetwork(config), esrgan), file)
    capsys.readouterr()
    assert main([*other, f"--encoder-weights={file}"]) == 2
    assert "encoder.blocks is 2" in capsys.readouterr().err
    assert not (tmp_path / "other").exists()


def test_training_with_channel_statistics(folders: Path, tmp_path: Path) -> None:
    statistics = {name: [0.5, 0.4, 0.6] for name in ("clean_mean", "degraded_mean")}
    statistics |= {name: [0.3, 0.3, 0.2] for name in ("clean_std", "degraded_std")}
    setting = f"--model.statistics={json.dumps({'degraded': statistics})}"
    assert main(train_command(folders, tmp_path / "w", "--steps=1", setting)) == 0
    found = DeFlowDegrader.from_pretrained(tmp_path / "w").model.config.statistics
    assert found is not None
    assert found["degraded"].degraded_std == (0.3, 0.3, 0.2)


def test_training_does_not_overwrite_a_run(
    weights: Path, folders: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(train_command(folders, weights, "--steps=3")) == 2
    assert "--resume" in capsys.readouterr().err


def test_a_recipe_file_and_a_flag_that_wins(folders: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("steps: 5\nseed: 7\n")
    output = tmp_path / "w"
    assert main(train_command(folders, output, "--config", str(recipe), "--steps=2")) == 0
    card = (output / "README.md").read_text()
    assert "steps: 2" in card
    assert "seed: 7" in card


def test_an_unknown_setting_is_refused(
    folders: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("learning_speed: 5\n")
    with pytest.raises(SystemExit):
        main(train_command(folders, tmp_path / "w", "--config", str(recipe)))
    assert "learning_speed" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--degraded={clean}"], "same folder"),
        (["--clean={nowhere}"], "nowhere"),
        (["--crop=64"], "at least 64 x 64"),
        (["--crop=10"], "multiple of"),
    ],
)
def test_training_that_cannot_start(
    folders: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    change: list[str],
    message: str,
) -> None:
    paths = {"clean": folders / "clean", "nowhere": tmp_path / "nowhere"}
    change = [word.format(**paths) for word in change]
    assert main(train_command(folders, tmp_path / "w", *change)) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "w").exists()


def test_a_killed_run_ends_in_the_same_weights(folders: Path, tmp_path: Path) -> None:
    settings = ("--steps=30", "--checkpoint_every=5", "--sample_every=1000", "--seed=3")
    assert main(train_command(folders, tmp_path / "whole", *settings)) == 0

    output = tmp_path / "killed"
    command = [sys.executable, "-m", "deflow_aug.cli", *train_command(folders, output, *settings)]
    process = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=os.environ
    )
    deadline = time.monotonic() + 120
    while not list((output / "checkpoints").glob("step-*")) and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not (output / "model.safetensors").exists()

    assert main(train_command(folders, output, *settings, "--resume")) == 0
    same = [(tmp_path / run / "model.safetensors").read_bytes() for run in ("whole", "killed")]
    assert same[0] == same[1]


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


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{photos}", "--output={photos}"], "overwrite an input"),
        (["{photos}", "{photos}/a.png", "--output={out}"], None),
        (["{photos}/a.png", "{photos}/sub/a.png", "--output={out}"], "both be written"),
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


def test_the_command_tells_its_version() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "deflow_aug.cli", "--version"], capture_output=True, text=True
    )
    assert done.returncode == 0
    assert "deflow-aug 0." in done.stdout


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
    honest = degrade.read_image

    def read(path: Path) -> object:
        if path.stem == "bad":
            raise error("cannot")
        return honest(path)

    monkeypatch.setattr(degrade, "read_image", read)
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


def test_weights_are_not_overwritten_by_training(
    weights: Path, folders: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "finished"
    DeFlowDegrader.from_pretrained(weights).save_pretrained(output)
    before = (output / "model.safetensors").read_bytes()
    assert main(train_command(folders, output, "--steps=1")) == 2
    assert "holds weights already" in capsys.readouterr().err
    assert (output / "model.safetensors").read_bytes() == before


def test_a_longer_run_tells_its_own_length(folders: Path, tmp_path: Path) -> None:
    command = train_command(folders, tmp_path / "w", "--sample_every=1")
    assert main([*command, "--steps=1"]) == 0
    longer = train_command(folders, tmp_path / "w", "--sample_every=2", "--steps=2", "--resume")
    assert main(longer) == 0
    assert "steps: 2" in (tmp_path / "w" / "README.md").read_text()
    shorter = train_command(folders, tmp_path / "w", "--steps=1", "--resume")
    assert main(shorter) == 2


def test_training_takes_one_degraded_domain(
    folders: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = train_command(folders, tmp_path / "w", "--model.domains=[a,b]", "--batch_size=3")
    assert main(command) == 2
    assert "one degraded domain" in capsys.readouterr().err


def test_fine_tuning_takes_the_model_of_the_weights(
    weights: Path, folders: Path, tmp_path: Path
) -> None:
    output = tmp_path / "tuned"
    command = [
        "train", f"--clean={folders / 'clean'}", f"--degraded={folders / 'degraded'}",
        f"--output={output}", f"--from={weights}", "--steps=1", "--crop=8", "--batch_size=2",
        "--model.shift_init=0.2",
    ]  # fmt: skip
    assert main(command) == 0
    config = DeFlowDegrader.from_pretrained(output).model.config
    assert (config.hidden, config.shift_init) == (4, 0.2)
    assert "fine_tuned_from" in (output / "README.md").read_text()
