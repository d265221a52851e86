"""``deflow-aug train``, in this process unless a process must die."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from test_convert import esrgan, export_encoder
from test_data import write_noise
from test_training_noise import flat_pictures

from deflow_aug.cli import main
from deflow_aug.conditioning import ConditioningNetwork
from deflow_aug.degrader import DeFlowDegrader
from deflow_aug.training import correcting, curves, tracking
from deflow_aug.training.state import State

TINY = [
    "--model.scale=2", "--model.levels=2", "--model.steps=1", "--model.hidden=4",
    "--model.encoder.channels=4", "--model.encoder.growth=4", "--model.encoder.blocks=1",
    "--model.encoder.stacked_blocks=[0]", "--crop=8", "--batch_size=2",
    "--model.shift_init=0.1",
]  # fmt: skip


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """clean, degraded and vintage, an image each; pairs, one."""
    root = tmp_path_factory.mktemp("data")
    for number, name in enumerate(("clean", "degraded", "vintage")):
        write_noise(root / name / "a.png", 32, 32, seed=number)
    for number, half in enumerate(("clean", "degraded")):
        write_noise(root / "pairs" / half / "p.png", 24, 24, seed=3 + number)
    return root


def train(folders: Path, output: Path, *more: str, data: bool = True) -> list[str]:
    """The words of a tiny run."""
    clean, degraded = (f"--{name}={folders / name}" for name in ("clean", "degraded"))
    return ["train", *([clean, degraded] if data else []), f"--output={output}", *TINY, *more]


@pytest.fixture(autouse=True)
def _no_curves(monkeypatch: pytest.MonkeyPatch) -> None:
    """They take a second; the fixture ``weights``, which is older, has them."""
    monkeypatch.setattr(curves, "available", lambda: False)


def config(output: Path) -> dict:
    return json.loads((output / "config.json").read_text())


@pytest.fixture(scope="module")
def weights(folders: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("trained")
    assert main(train(folders, output, "--steps=3", "--sample_every=2")) == 0
    return output


def test_training_leaves_weights_pictures_and_a_card(weights: Path) -> None:
    assert DeFlowDegrader.from_pretrained(weights).model.config.hidden == 4
    sheets = sorted(path.name for path in (weights / "samples").iterdir())
    assert sheets == ["step-00000002.png", "step-00000003.png"]
    for picture in (weights / "samples" / sheets[0], weights / "curves.png"):
        with Image.open(picture) as image:
            assert min(image.size) > 400
    card = (weights / "README.md").read_text()
    for words in ("steps: 3", "](samples.png)", "](curves.png)", "| clean | clean | 1 |"):
        assert words in card
    last = (weights / "samples" / sheets[1]).read_bytes()
    assert (weights / "samples.png").read_bytes() == last
    health = [json.loads(line) for line in (weights / "health.jsonl").read_text().splitlines()]
    assert [record["step"] for record in health if "shift" in record] == [1, 2, 3]
    assert [record["step"] for record in health if "noise" in record] == [2, 3]
    assert health[0]["shift"]["degraded"][0]["largest"] == pytest.approx(0.01, rel=0.05)


def test_the_card_shows_no_photographs_if_told_so(folders: Path, tmp_path: Path) -> None:
    output = tmp_path / "w"
    assert main(train(folders, output, "--steps=1", "--card-samples=false")) == 0
    assert "samples.png" not in (output / "README.md").read_text()
    assert not (output / "samples.png").exists()


def test_samples_that_fail_do_not_end_a_run(
    folders: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def draw(*_: object) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(tracking.SampleSheet, "draw", draw)
    output = tmp_path / "w"
    assert main(train(folders, output, "--steps=2", "--sample_every=2")) == 0
    assert "no pictures of step 2: out of memory" in capsys.readouterr().err
    assert (output / "model.safetensors").exists()
    assert "samples.png" not in (output / "README.md").read_text()


def test_no_curves_without_matplotlib(
    folders: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "w"
    assert main(train(folders, output, "--steps=2", "--sample_every=1")) == 0
    assert capsys.readouterr().err.count("deflow-aug[plots]") == 1
    assert not (output / "curves.png").exists()
    assert "curves" not in (output / "README.md").read_text()


def test_tensorboard(folders: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    output = tmp_path / "w"
    assert main(train(folders, output, "--steps=2", "--sample_every=2", "--tensorboard")) == 0
    events = EventAccumulator(str(output / "tensorboard"))
    events.Reload()
    scalars = events.Tags()["scalars"]
    assert {
        "bits per dimension/clean",
        "bits per dimension/degraded",
        "shift largest/degraded, latent 0",
        "shift mean_norm/degraded, latent 0",
        "training/gradient norm",
        "training/skipped steps",
        "training/outliers",
        "noise std_r/degraded, temperature 1",
        "noise lag_h/degraded, temperature 0.5",
    } <= set(scalars)
    log = [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]
    logged = [event.value for event in events.Scalars("training/gradient norm")]
    assert logged == pytest.approx([record["gradient_norm"] for record in log])
    assert [image.step for image in events.Images("samples")] == [2]


def test_tensorboard_that_is_not_there(
    folders: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(tracking, "find_spec", lambda name: None)
    assert main(train(folders, tmp_path / "w", "--tensorboard")) == 2
    assert "deflow-aug[tensorboard]" in capsys.readouterr().err
    assert not (tmp_path / "w").exists()


def test_training_starts_from_rrdb_weights(
    weights: Path, folders: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = DeFlowDegrader.from_pretrained(weights).model.config
    file = tmp_path / "rrdb.pth"
    torch.save(export_encoder(ConditioningNetwork(model), esrgan), file)
    assert main(train(folders, tmp_path / "w", "--steps=1", f"--encoder-weights={file}")) == 0
    assert "encoder_weights: rrdb.pth" in (tmp_path / "w" / "README.md").read_text()
    file.unlink()
    (tmp_path / "w" / "README.md").unlink()
    assert main(["train", f"--output={tmp_path / 'w'}", "--steps=2", "--resume"]) == 0
    assert "encoder_weights: rrdb.pth" in (tmp_path / "w" / "README.md").read_text()
    assert "encoder_weights" not in (weights / "README.md").read_text()

    other = train(folders, tmp_path / "other", "--model.encoder.blocks=2")
    torch.save(export_encoder(ConditioningNetwork(model), esrgan), file)
    capsys.readouterr()
    assert main([*other, f"--encoder-weights={file}"]) == 2
    assert "encoder.blocks is 2" in capsys.readouterr().err
    assert not (tmp_path / "other").exists()


def test_training_with_channel_statistics(folders: Path, tmp_path: Path) -> None:
    statistics = {name: [0.5, 0.4, 0.6] for name in ("clean_mean", "degraded_mean")}
    statistics |= {name: [0.3, 0.3, 0.2] for name in ("clean_std", "degraded_std")}
    setting = f"--model.statistics={json.dumps({'degraded': statistics})}"
    assert main(train(folders, tmp_path / "given", "--steps=1", setting)) == 0
    found = config(tmp_path / "given")["model"]["statistics"]
    assert found["degraded"]["degraded_std"] == [0.3, 0.3, 0.2]

    output = tmp_path / "measured"
    assert main(train(folders, output, "--steps=1", "--match_statistics=true")) == 0
    pixels = np.asarray(Image.open(folders / "degraded" / "a.png")).reshape(-1, 3) / 255
    measured = config(output)["model"]["statistics"]["degraded"]["degraded_mean"]
    assert measured == pytest.approx(list(pixels.mean(0)), abs=1e-3)
    assert main(["train", f"--output={output}", "--steps=2", "--resume"]) == 0


@pytest.mark.parametrize(
    "flag",
    ["--model.shift=diagonal", "--model.shift=zero", "--model.shift=fitted",
     "--model.conditioned=false", "--model.split_levels=[1]"],
)  # fmt: skip
def test_variants_are_a_flag_each(folders: Path, tmp_path: Path, flag: str) -> None:
    assert main(train(folders, tmp_path / "w", "--steps=1", flag)) == 0
    name, _, value = flag.removeprefix("--model.").partition("=")
    found = config(tmp_path / "w")["model"][name]
    assert json.dumps(found) in (value, f'"{value}"')
    assert list((tmp_path / "w" / "samples").iterdir())


# -- recipes -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def noisy(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Flags for folders of flat pictures, the degraded ones with noise."""
    root = tmp_path_factory.mktemp("noisy")
    for name, sigma in (("clean", 1.0), ("degraded", 6.0)):
        flat_pictures(root / name, sigma, seed=0)
    return [f"--{name}={root / name}" for name in ("clean", "degraded")]


def test_noise_that_is_not_that_of_the_photographs_is_told(
    noisy: list[str], folders: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As after a few steps; nothing is said where it is not gone by, or cannot be measured."""
    output, words = tmp_path / "w", ("--steps=2", "--sample_every=1", "--crop=48")
    assert main([*train(folders, output, *words, data=False), *noisy]) == 0
    told = capsys.readouterr()
    (line,) = [line for line in told.out.splitlines() if line.startswith("noise in flat areas")]
    mine, real = re.findall(r"(\d+\.\d) \(-?\d\.\d\d\)", line)
    assert float(real) == pytest.approx(6, abs=0.3)
    assert f"of samples: {mine} " in (output / "README.md").read_text()
    assert f"of the photographs: {real} " in (output / "README.md").read_text()
    assert "is far from that of its photographs" in told.err
    assert str(output / "samples" / "step-00000002.png") in told.err
    health = [json.loads(line) for line in (output / "health.jsonl").read_text().splitlines()]
    flat = [record["flat"]["degraded"] for record in health if "flat" in record]
    assert [f"{one['photographs']['std']:.1f}" for one in flat] == [real, real]
    assert f"{flat[-1]['samples']['std']:.1f}" == mine

    off = train(folders, tmp_path / "off", *words, "--fit_in_flat_areas=false", data=False)
    assert main([*off, *noisy]) == 0
    none = train(folders, tmp_path / "none", *words[:2])  # nothing is flat
    assert main(none) == 0
    assert "noise in flat areas" not in "".join(capsys.readouterr())


@pytest.mark.parametrize("first", [True, False])
def test_a_flag_wins_before_and_after_the_recipe(
    folders: Path, tmp_path: Path, first: bool
) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("steps: 5\nseed: 7\nlr: 5e-6\n")
    config_words = ["--config", str(recipe)]
    flags = ["--steps=2", *config_words] if first else [*config_words, "--steps=2"]
    output = tmp_path / "w"
    assert main(train(folders, output, *flags)) == 0
    found = config(output)["training"]["recipe"]
    assert (found["steps"], found["seed"], found["lr"]) == (2, 7, 5e-6)


def test_a_bundled_recipe_by_name_and_its_printout(
    folders: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["train", "--lr=1e-3", "--config=published-dped", "--print_config"])
    assert stopped.value.code == 0
    printed = capsys.readouterr().out
    for words in ("batch_size: 48", "degraded_as_clean: 4", "lr: 0.001"):
        assert words in printed
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(printed)
    more = ("--config", str(recipe), "--degraded_as_clean=0", "--clean_downscale=1", "--workers=0")
    assert main(train(folders, tmp_path / "w", *more, "--steps=1", "--batch_size=3")) == 0
    assert config(tmp_path / "w")["training"]["recipe"]["lr"] == 1e-3


@pytest.mark.parametrize(
    ("recipe", "message"),
    [("learning_speed: 5\n", "learning_speed"), ("model: {steeps: 5}\n", "steeps"),
     ("steps: many\n", "steps"), ("steps: [\n", "steps")],
)  # fmt: skip
def test_a_recipe_with_something_wrong(
    folders: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], recipe: str, message: str
) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(recipe)
    with pytest.raises(SystemExit):
        main(train(folders, tmp_path / "w", "--config", str(file)))
    assert message in capsys.readouterr().err
    assert not (tmp_path / "w").exists()


def test_a_recipe_that_is_not_there(
    folders: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(train(folders, tmp_path / "w", "--config=publisht")) == 2
    told = capsys.readouterr().err
    assert "'publisht'" in told
    assert "published-ntire" in told


# -- folders -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--clean={clean}", "--degraded={clean}"], "same folder"),
        (["--clean={nowhere}", "--degraded={degraded}"], "nowhere"),
        (["--clean={clean}", "--degraded={degraded}", "--crop=64"], "at least 64 x 64"),
        (["--clean={clean}", "--degraded={degraded}", "--crop=10"], "multiple of"),
        (["--clean={clean}"], "--clean needs --degraded"),
        (["--degraded={degraded}"], "--degraded needs --clean"),
        ([], "--paired DIR"),
        (["--clean={clean}", "--clean={clean}", "--degraded={degraded}"], "twice"),
        (["--clean={clean}", "--degraded={degraded}", "--degraded={vintage}"], "low=DIR1"),
        (["--clean={clean}", "--degraded=a={degraded}", "--degraded=a={vintage}"], "twice for a"),
        (["--clean={clean}", "--degraded=a={degraded}", "--paired={pairs}"], "NAME=DIR"),
        (["--clean={clean}", "--degraded={degraded}", "--model.domains=[a,b]"], "which of"),
        (["--clean={clean}", "--degraded=c={degraded}", "--model.domains=[a,b]"], "for c"),
        (["--clean={clean}", "--degraded=a={degraded}", "--degraded=b={vintage}"], "at least 3"),
        (["--paired={clean}"], "no pairs"),
        (["--paired={pairs}", "--match_statistics=true"], "match_statistics"),
    ],
)
def test_training_that_cannot_start(
    folders: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    change: list[str],
    message: str,
) -> None:
    names = ("clean", "degraded", "vintage", "pairs", "nowhere")
    change = [word.format(**{name: folders / name for name in names}) for word in change]
    assert main(train(folders, tmp_path / "w", *change, data=False)) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "w").exists()


def test_several_domains_get_their_names_from_the_folders(folders: Path, tmp_path: Path) -> None:
    words = [
        f"--clean={folders / 'clean'}", f"--degraded=low={folders / 'degraded'}",
        "--degraded", f"vintage={folders / 'vintage'}", "--batch_size=3", "--steps=2",
    ]  # fmt: skip
    output = tmp_path / "w"
    assert main(train(folders, output, *words, data=False)) == 0
    model = DeFlowDegrader.from_pretrained(output).model
    assert model.config.domains == ("low", "vintage")
    card = (output / "README.md").read_text()
    assert 'domain="low"' in card
    assert "| vintage | vintage | 1 |" in card


def test_pairs_alone_and_with_unpaired_folders(folders: Path, tmp_path: Path) -> None:
    pairs = f"--paired={folders / 'pairs'}"
    assert main(train(folders, tmp_path / "alone", pairs, "--steps=1", data=False)) == 0
    card = (tmp_path / "alone" / "README.md").read_text()
    assert "learned from paired images" in card
    assert "| degraded, paired | pairs | 1 pairs |" in card
    more = (pairs, "--steps=1", "--batch_size=4")
    assert main(train(folders, tmp_path / "both", *more)) == 0
    assert "unpaired and paired" in (tmp_path / "both" / "README.md").read_text()
    named = (f"--clean={folders / 'clean'}", f"--degraded=a={folders / 'degraded'}")
    words = (*named, f"--paired=b={folders / 'pairs'}", "--steps=1", "--batch_size=6")
    assert main(train(folders, tmp_path / "apart", *words, data=False)) == 0
    assert config(tmp_path / "apart")["model"]["domains"] == ["a", "b"]
    health = (tmp_path / "both" / "health.jsonl").read_text().splitlines()
    # Real pairs have noise that can be measured: that of independent random pictures.
    assert json.loads(health[-1])["real"]["degraded"]["std"] > 60


def test_more_clean_folders_and_degraded_images_as_clean(folders: Path, tmp_path: Path) -> None:
    more = (f"--clean={folders / 'vintage'}", "--degraded_as_clean=2", "--steps=1")
    assert main(train(folders, tmp_path / "w", *more)) == 0
    clean = config(tmp_path / "w")["training"]["data"]["clean"]
    assert clean["images"] == 3
    assert [part["folder"] for part in clean["also"]] == ["vintage", "degraded"]


def test_degraded_images_alone_are_the_clean_ones_too_when_downscaled(
    folders: Path, tmp_path: Path
) -> None:
    """The released settings for phone photographs."""
    words = (f"--degraded={folders / 'degraded'}", "--degraded_as_clean=2", "--steps=1")
    assert main(train(folders, tmp_path / "w", *words, data=False)) == 0
    data = config(tmp_path / "w")["training"]["data"]
    assert (data["clean"]["folder"], data["clean"]["downscale"]) == ("degraded", 2)
    assert data["clean"]["pixels"] * 4 == data["degraded"]["pixels"]


# -- stopping and going on -----------------------------------------------------------------


def test_training_does_not_overwrite_a_run(
    weights: Path, folders: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(train(folders, weights, "--steps=3")) == 2
    assert "--resume" in capsys.readouterr().err


def test_weights_are_not_overwritten_by_training(
    weights: Path, folders: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "finished"
    DeFlowDegrader.from_pretrained(weights).save_pretrained(output)
    before = (output / "model.safetensors").read_bytes()
    assert main(train(folders, output, "--steps=1")) == 2
    assert "holds weights already" in capsys.readouterr().err
    assert (output / "model.safetensors").read_bytes() == before


def test_a_stopped_run_tells_how_to_go_on_and_does(
    folders: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    settings = ("--steps=4", "--sample_every=100", "--seed=5")
    assert main(train(folders, tmp_path / "whole", *settings)) == 0
    output = tmp_path / "stopped"
    honest = tracking.Watch.__call__

    def press(self: tracking.Watch, progress: object) -> None:
        honest(self, progress)  # type: ignore[arg-type]
        signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(tracking.Watch, "__call__", press)
        assert main(train(folders, output, *settings)) == 130
    told = capsys.readouterr().out
    assert "step-00000001.safetensors" in told or "step-00000002.safetensors" in told
    assert not (output / "model.safetensors").exists()
    (advice,) = [line for line in told.splitlines() if line.startswith("go on with: ")]
    assert main(advice.removeprefix("go on with: deflow-aug ").split()) == 0
    same = [(tmp_path / run / "model.safetensors").read_bytes() for run in ("whole", "stopped")]
    assert same[0] == same[1]
    # What was written down before the stop is not written twice.
    steps = [json.loads(line)["step"] for line in (output / "log.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3, 4]


def test_a_run_stopped_in_its_corrections_releases_the_same_weights(
    folders: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    settings = ("--steps=4", "--checkpoint_every=3", "--sample_every=4")
    assert main(train(folders, tmp_path / "whole", *settings)) == 0
    output = tmp_path / "stopped"
    with monkeypatch.context() as patch:
        patch.setattr(
            correcting, "remove_cast", lambda *_, **__: signal.raise_signal(signal.SIGINT)
        )
        assert main(train(folders, output, *settings)) == 130
    told = capsys.readouterr().out
    assert "stopped after all 4 steps, before the release was complete" in told
    assert "step-00000004.safetensors" in told
    assert not (output / "model.safetensors").exists()
    # As they are, they can be had, and are no reason not to go on.
    assert main(["train", "--release=last", f"--output={output}"]) == 0
    assert "without the corrections" in capsys.readouterr().out
    assert "without the corrections" in (output / "README.md").read_text()
    assert main(["train", "--resume", f"--output={output}"]) == 0
    for name in ("model.safetensors", "samples.png", "health.jsonl"):
        assert (output / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
    assert "without the corrections" not in (output / "README.md").read_text()


def test_what_is_told_of_a_run_that_was_interrupted_is_what_it_has_saved(
    folders: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """By a second Ctrl-C in the middle of an update, which cannot be saved."""
    honest = State.update_average

    def press(self: State) -> None:
        honest(self)
        if self.step == 1:
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(State, "update_average", press)
        assert main(train(folders, tmp_path / "w", "--steps=4")) == 130
    told = capsys.readouterr().out
    assert "stopped at step 0 of 4; checkpoint" in told
    assert "interrupted at step 1: those since are taken again" in told


@pytest.mark.parametrize(
    ("where", "told"), [("__init__", "interrupted\n"), ("finish", "stopped after all 2 steps")]
)
def test_sigterm_before_and_after_the_steps_is_told(
    folders: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    where: str,
    told: str,
) -> None:
    """Where there is nothing to save; by itself it would end the process without a word."""
    before, output = signal.getsignal(signal.SIGTERM), tmp_path / "w"
    with monkeypatch.context() as patch:
        patch.setattr(tracking.Watch, where, lambda *_, **__: signal.raise_signal(signal.SIGTERM))
        assert main(train(folders, output, "--steps=2")) == 130
    assert told in "".join(capsys.readouterr())
    assert signal.getsignal(signal.SIGTERM) is before
    assert main(["train", "--resume", f"--output={output}"]) == 0
    assert (output / "model.safetensors").exists()


def test_a_killed_run_ends_in_the_same_weights(folders: Path, tmp_path: Path) -> None:
    settings = ("--steps=30", "--checkpoint_every=5", "--sample_every=1000", "--seed=3")
    assert main(train(folders, tmp_path / "whole", *settings)) == 0

    output = tmp_path / "killed"
    command = [sys.executable, "-m", "deflow_aug.cli", *train(folders, output, *settings)]
    process = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=os.environ
    )
    deadline = time.monotonic() + 120
    while not (output / "checkpoints" / "step-00000005.safetensors").exists():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not (output / "model.safetensors").exists()

    assert main(["train", "--resume", f"--output={output}"]) == 0
    same = [(tmp_path / run / "model.safetensors").read_bytes() for run in ("whole", "killed")]
    assert same[0] == same[1]


def test_a_longer_run_tells_its_own_length(folders: Path, tmp_path: Path) -> None:
    output = tmp_path / "w"
    assert main(train(folders, output, "--sample_every=1", "--steps=1")) == 0
    assert main(["train", f"--output={output}", "--resume", "--steps=2"]) == 0
    assert "steps: 2" in (output / "README.md").read_text()
    assert main(["train", f"--output={output}", "--steps=1", "--resume"]) == 2


def test_what_contradicts_a_run_is_refused_and_moved_folders_are_told(
    folders: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "w"
    assert main(train(folders, output, "--steps=1")) == 0
    resume = ["train", "--resume", "--steps=2", f"--output={output}"]
    for contradiction, message in (
        ("--lr=1", "lr: 1.0, was 0.0008"),
        ("--from=camera-noise", "--from"),
        (f"--degraded=low={folders / 'degraded'}", "model.domains: ['low'], was ['degraded']"),
    ):
        capsys.readouterr()
        assert main([*resume, contradiction]) == 2
        assert message in capsys.readouterr().err
    (tmp_path / "moved").mkdir()
    write_noise(tmp_path / "moved" / "a.png", 32, 32, seed=0)
    assert main([*resume, f"--clean={tmp_path / 'moved'}"]) == 0
    assert "goes on with" in capsys.readouterr().err
    assert str(tmp_path / "moved") in (output / "run.yaml").read_text()


def test_one_of_several_processes_speaks_and_writes(folders: Path, tmp_path: Path) -> None:
    """Two, in the environment that ``accelerate launch`` makes for them."""
    output = tmp_path / "w"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    shared |= {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    words = train(folders, output, "--steps=2", "--device=cpu")
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "deflow_aug.cli", *words],
            env=os.environ | shared | {"RANK": rank, "LOCAL_RANK": rank},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in "01"
    ]
    told = [process.communicate(timeout=240)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    assert "weights in " in told[0]
    assert told[1] == ""
    steps = [json.loads(line)["step"] for line in (output / "log.jsonl").read_text().splitlines()]
    assert steps == [1, 2]


# -- fine-tuning ---------------------------------------------------------------------------


def test_fine_tuning_takes_the_model_of_the_weights(
    weights: Path, folders: Path, tmp_path: Path
) -> None:
    output = tmp_path / "tuned"
    clean, degraded = (f"--{name}={folders / name}" for name in ("clean", "degraded"))
    more = ("--steps=1", "--crop=8", "--batch_size=2", "--model.shift_init=0.2", "--lr=1e-9")
    assert main(["train", clean, degraded, f"--output={output}", f"--from={weights}", *more]) == 0
    tuned, start = (DeFlowDegrader.from_pretrained(path).model for path in (output, weights))
    assert (tuned.config.hidden, tuned.config.shift_init) == (4, 0.2)
    for name, tensor in start.state_dict().items():
        assert torch.allclose(tuned.state_dict()[name], tensor, atol=1e-3), name
    assert f"fine_tuned_from: {weights.name}" in (output / "README.md").read_text()
    assert main(["train", "--resume", "--steps=2", f"--output={output}"]) == 0


def test_fine_tuning_to_other_domains(
    weights: Path, folders: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A domain of the weights goes on by its name, a new one starts, one without data goes."""
    command = ["train", f"--clean={folders / 'clean'}", "--crop=8", "--batch_size=3", "--lr=1e-9"]
    both, new = tmp_path / "both", tmp_path / "new"
    words = [f"--degraded=old={folders / 'vintage'}", f"--degraded=degraded={folders / 'degraded'}"]
    more = [f"--from={weights}", "--steps=1", "--model.shift_init=0.5"]
    assert main([*command, *words, *more, f"--output={both}"]) == 0
    assert "new domains, with a shift of their own: old" in capsys.readouterr().out
    tuned, start = (DeFlowDegrader.from_pretrained(path).model for path in (both, weights))
    assert tuned.config.domains == ("old", "degraded")
    for mine, theirs in zip(tuned.domain_shifts(), start.domain_shifts(), strict=True):
        assert torch.allclose(mine.factors()[2], theirs.factors()[1], atol=1e-3)
        assert torch.allclose(mine.factors()[1].diagonal(), torch.tensor(0.5), atol=1e-3)

    assert main([*command, words[0], f"--from={both}", "--steps=1", f"--output={new}"]) == 0
    assert "without data, left out: degraded" in capsys.readouterr().out
    assert DeFlowDegrader.from_pretrained(new).model.config.domains == ("old",)
    # Without a name it could be either.
    unnamed = f"--degraded={folders / 'vintage'}"
    assert main([*command, unnamed, f"--from={both}", f"--output={tmp_path / 'x'}"]) == 2
    assert "which of the domains old, degraded" in capsys.readouterr().err


def test_settings_that_the_weights_stand_in_for_are_told(
    weights: Path, folders: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = train(folders, tmp_path / "w", f"--from={weights}", "--steps=1", "--model.hidden=6")
    assert main(words) == 0
    told = capsys.readouterr().err
    assert "these settings are ignored: model.hidden 6 (theirs is 4)\n" in told
    assert config(tmp_path / "w")["model"]["hidden"] == 4


# -- the end -------------------------------------------------------------------------------


def contents(output: Path) -> dict[str, bytes]:
    return {str(p): p.read_bytes() for p in output.rglob("*") if p.is_file()}


def test_a_wrecked_run_releases_nothing(
    folders: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "w"
    words = train(folders, output, "--steps=24", "--lr=5", "--warmup=0", "--sample_every=12")
    assert main(words) == 1
    told = capsys.readouterr()
    assert "no weights are released: " in told.err
    assert "lower --lr (it was 5)" in told.err
    assert "weights in" not in told.out
    assert not (output / "model.safetensors").exists()
    assert not (output / "README.md").exists()
    assert (output / "checkpoints" / "step-00000024.safetensors").exists()
    # Warnings have lines of their own.
    assert re.search(r"[\r\n]warning: too many bad steps[^\r\n]*\n", told.err)


def test_nothing_is_written_where_no_step_is_left(
    weights: Path, folders: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """But what is missing is, if the run was killed before it was written."""
    output = tmp_path / "w"
    shutil.copytree(weights, output)
    before = contents(output)
    (tmp_path / "other").mkdir()
    write_noise(tmp_path / "other" / "a.png", 32, 32, seed=8)
    resume = ["train", "--resume", f"--output={output}", f"--clean={tmp_path / 'other'}"]
    assert main(resume) == 0
    assert "all 3 steps were taken before" in capsys.readouterr().out
    assert contents(output) == before
    (output / "README.md").unlink()
    assert main(resume) == 0
    after = contents(output)
    card = str(output / "README.md")
    assert after[card] == before[card]
    assert after[str(output / "run.yaml")] == before[str(output / "run.yaml")]
    assert config(output)["training"]["data"]["clean"]["folder"] == "clean"


def test_the_card_tells_all_data_that_a_run_has_had(
    weights: Path, folders: Path, tmp_path: Path
) -> None:
    output = tmp_path / "w"
    shutil.copytree(weights, output)
    (tmp_path / "other").mkdir()
    write_noise(tmp_path / "other" / "a.png", 32, 32, seed=8)
    other = f"--clean={tmp_path / 'other'}"
    assert main(["train", "--resume", f"--output={output}", other, "--steps=5"]) == 0
    data = config(output)["training"]["data"]
    assert {name: fact["folder"] for name, fact in data.items()} == {
        "clean (steps 1 to 3)": "clean", "clean (from step 4)": "other", "degraded": "degraded",
    }  # fmt: skip
    assert "| clean (from step 4) | other | 1 |" in (output / "README.md").read_text()
    assert str(tmp_path / "other") in (output / "run.yaml").read_text()


def test_what_is_left_of_a_run_is_not_overwritten(
    weights: Path, folders: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its best checkpoint, its log, and damaged ones, at any time."""
    output = tmp_path / "w"
    shutil.copytree(weights, output)
    for name in ("config.json", "model.safetensors", "README.md"):
        (output / name).unlink()
    for path in (output / "checkpoints").iterdir():
        path.write_bytes(b"rot")
    resume = ["train", "--resume", f"--output={output}"]
    for words in (resume, resume, train(folders, output, "--steps=1")):
        log = (output / "log.jsonl").read_bytes()
        assert main(words) == 2
        assert "choose another" in capsys.readouterr().err
        assert (output / "log.jsonl").read_bytes() == log


def test_weights_of_a_checkpoint_are_released(
    folders: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In place of those of the end; no folder of images is needed."""
    output = tmp_path / "w"
    words = ("--steps=4", "--checkpoint_every=2", "--sample_every=2")
    assert main(train(folders, output, *words)) == 0
    last = (output / "model.safetensors").read_bytes()
    assert main(["train", "--release=2", f"--output={output}"]) == 0
    assert "weights of step 2 of 4" in capsys.readouterr().out
    saved = load_file(output / "checkpoints" / "step-00000002.safetensors")
    released = DeFlowDegrader.from_pretrained(output).model.state_dict()
    for name, tensor in released.items():
        assert torch.equal(tensor, saved[f"average.{name}"].half().to(tensor.dtype)), name
    facts = config(output)["training"]
    assert (facts["released_step"], facts["data"]["clean"]["folder"]) == (2, "clean")
    sheet = (output / "samples" / "step-00000002.png").read_bytes()
    assert (output / "samples.png").read_bytes() == sheet
    assert (output / "model.safetensors").read_bytes() != last
    assert main(["train", "--release=last", f"--output={output}"]) == 0
    assert (output / "model.safetensors").read_bytes() == last
    assert main(["train", "--release", "best", f"--output={output}", "--card-samples=false"]) == 0
    assert not (output / "samples.png").exists()
    for which, message in (("3", "there are steps 0, 2, 4"), ("worst", "best, last, or a step")):
        assert main(["train", f"--release={which}", f"--output={output}"]) == 2
        assert message in capsys.readouterr().err


def test_an_output_folder_is_asked_for(folders: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", f"--clean={folders / 'clean'}"]) == 2
    assert capsys.readouterr().err.startswith("deflow-aug train: --output DIR is missing")
