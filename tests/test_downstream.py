"""benchmarks/downstream.py: the comparison is fair, goes on where it was, and adds up right."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from clean_images import degrader
from PIL import Image
from without_torchvision import without_torchvision

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
SIDE = 64


@pytest.fixture(scope="module")
def bench() -> Iterator[Any]:
    """The benchmark's modules, with small networks and a degrader that is quick."""
    with without_torchvision() as patch:
        patch.syspath_prepend(BENCHMARKS)
        import downstream
        import restoration
        import restoration_tasks

        torch.set_num_threads(1)
        quick = restoration.Settings(channels=8, layers=4, steps=80, batch=4, crop=24, lr=5e-3)
        patch.setattr(downstream, "QUICK", quick)
        patch.setattr(
            restoration_tasks.DeFlowDegrader, "from_pretrained", lambda *_, **__: degrader()
        )
        yield SimpleNamespace(main=downstream, nets=restoration, tasks=restoration_tasks)
        for name in ("downstream", "restoration", "restoration_tasks", "train_sr"):
            sys.modules.pop(name)


def smooth(rng: np.random.Generator, side: int = SIDE) -> np.ndarray[Any, Any]:
    coarse = Image.fromarray(rng.integers(90, 160, (5, 5, 3), np.uint8))
    return np.asarray(coarse.resize((side, side), Image.Resampling.BICUBIC))


def stripes(rng: np.random.Generator, clean: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Noise that is the same along each row, and a little that is not."""
    noise = rng.normal(0, 12, (len(clean), 1, 1)) + rng.normal(0, 3, clean.shape)
    return (clean + noise).round().clip(0, 255).astype(np.uint8)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """camera_noise: striped pictures, pairs of two scenes; clean: six pictures."""
    folder = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    for number in range(4):
        save(smooth(rng), folder / "camera_noise" / "clean" / f"{number}.png")
        large = stripes(rng, smooth(rng, 160))  # with flat areas, to measure noise in
        save(large, folder / "camera_noise" / "degraded" / f"{number}.png")
    for name in ("wall_1", "wall_2", "door_1", "door_12"):
        clean = smooth(rng)
        for half, picture in (("clean", clean), ("degraded", stripes(rng, clean))):
            save(picture, folder / "camera_noise" / "validation" / f"{name}_{half}.png")
    for number in range(6):
        save(smooth(rng, 480), folder / "clean" / f"{number}.png")
    return folder


def save(picture: np.ndarray[Any, Any], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(picture).save(path)


def figures(table: Any, column: str) -> dict[str, float]:
    place = table.columns.index(column)
    return {row[0]: float(row[place]) for row in table.rows}


def test_the_ceiling_wins_and_a_stopped_benchmark_goes_on(
    bench: Any, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, picture = tmp_path / "results.json", tmp_path / "results.png"
    command = ["--data", str(data), "--quick", "--tasks", "camera_noise", "--device", "cpu"]
    command += ["--json", str(file), "--methods", "nothing,white,DeFlow@0.5:1,real pairs"]
    table = bench.main.main([*command, "--plot", str(picture)])["camera_noise"]
    psnr, gap = figures(table, "PSNR (dB)"), figures(table, "PGap (dB)")
    assert list(psnr) == ["input", "white", "DeFlow@0.5:1", "real pairs"]
    assert psnr["real pairs"] > max(psnr["input"], psnr["white"], psnr["DeFlow@0.5:1"]) + 1
    assert gap["real pairs"] == 0
    for name in psnr:
        assert gap[name] == pytest.approx(psnr["real pairs"] - psnr[name], abs=0.011)
    assert picture.with_name("results_camera_noise.png").exists()

    written = json.loads(file.read_text())
    assert len(written["runs"]) == 1 + 2 + 2  # input, two methods, a ceiling for each scene
    assert set(written["runs"]["camera_noise/real pairs/seed 0/fold 1"]["psnr"]) == {
        "wall_1",
        "wall_2",
    }
    lost = written["runs"].pop("camera_noise/white/seed 0/fold 0")
    file.write_text(json.dumps(written))
    trained = []
    original = bench.nets.train
    monkeypatch.setattr(
        bench.nets, "train", lambda *args: (trained.append(args), original(*args))[1]
    )
    assert bench.main.main(command)["camera_noise"] == table
    assert len(trained) == 1
    again = json.loads(file.read_text())["runs"]["camera_noise/white/seed 0/fold 0"]
    assert again["psnr"] == lost["psnr"]

    with pytest.raises(SystemExit, match="results of other settings \\(steps\\)"):
        bench.main.main([*command, "--steps", "7"])


@pytest.mark.filterwarnings("ignore:only . patches")  # of pictures as small as these
def test_super_resolution_trains_deflow_and_keeps_the_recipe_hidden(
    bench: Any, data: Path, tmp_path: Path
) -> None:
    command = ["--data", str(data), "--quick", "--tasks", "sr", "--device", "cpu"]
    command += ["--steps", "2", "--deflow-steps", "1", "--json", str(tmp_path / "sr.json")]
    table = bench.main.main([*command, "--methods", "nothing,DeFlow,real pairs"])["sr"]
    assert list(figures(table, "PSNR (dB)")) == ["input", "nothing", "DeFlow", "real pairs"]
    folder = tmp_path / "sr-deflow"
    assert (folder / "weights" / "config.json").exists()
    assert {len(list((folder / kind).iterdir())) for kind in ("clean", "degraded")} == {2}

    task = bench.tasks.super_resolution(data / "clean", 1)
    assert [p.shape for p in task.clean] == [(480, 480, 3)] * 2
    assert [p.shape for p in task.inputs] == [(120, 120, 3)] * 2
    contents = [*task.clean, *(clean for _, clean in task.test)]
    assert len({p.tobytes() for p in contents}) == 4  # other pictures are tested on
    assert not any(np.array_equal(a, b) for a in task.inputs for b in task.degraded)


def test_the_hidden_noise_is_correlated_and_of_high_frequency(bench: Any) -> None:
    grey = np.full((96, 96, 3), 128, np.uint8)
    one = bench.tasks.hidden(grey, 1).astype(float) - 128
    assert np.array_equal(one + 128, bench.tasks.hidden(grey, 1))
    assert not np.array_equal(one + 128, bench.tasks.hidden(grey, 2))
    assert 0.7 * bench.tasks.NOISE < one.std() < bench.tasks.NOISE  # JPEG takes some of it
    rows = [np.corrcoef(one[:, :-lag].ravel(), one[:, lag:].ravel())[0, 1] for lag in (1, 4)]
    assert rows[0] > 0.3
    assert abs(rows[1]) < 0.1
    coarse = one.reshape(8, 12, 8, 12, 3).mean((1, 3))
    assert coarse.std() < 0.75 * one.std() / 12  # white noise would have a twelfth


def test_pools_of_the_same_pictures_give_the_same_clean_crops(bench: Any) -> None:
    rng = np.random.default_rng(0)
    small = [rng.integers(0, 256, (20, 24, 3), np.uint8) for _ in range(3)]
    clean = [p.repeat(4, 0).repeat(4, 1) for p in small]
    one = bench.nets.Pool(clean, [[p] for p in small], 4)
    other = bench.nets.Pool(clean, [[255 - p, 255 - p] for p in small], 4)
    (lq, gt), (inverse, same) = (pool.batch(6, 8, 5) for pool in (one, other))
    assert torch.equal(gt, same)
    torch.testing.assert_close(lq, 1 - inverse)
    torch.testing.assert_close(lq.repeat_interleave(4, 2).repeat_interleave(4, 3), gt)
    assert not torch.equal(one.batch(6, 8, 6)[1], gt)


def test_pools_draw_temperatures_from_the_range_and_other_seeds(bench: Any) -> None:
    picture = np.zeros((8, 8, 3), np.uint8)
    task = SimpleNamespace(clean=[picture] * 3, inputs=[picture] * 3, scale=1)
    seen = []

    def degrade(picture: Any, temperature: float, *, seed: int) -> Any:
        seen.append((temperature, seed))
        return picture

    pool = bench.tasks.pool(task, degrade, bench.tasks.Method.parse("x@0.5:1.5"), 4, 0)
    assert [len(draws) for draws in pool.degraded] == [4, 4, 4]
    temperatures, seeds = zip(*seen, strict=True)
    assert 0.5 <= min(temperatures) < 0.8 < 1.2 < max(temperatures) <= 1.5
    assert len(set(seeds)) == 12
    bench.tasks.pool(task, degrade, bench.tasks.Method.parse("x"), 1, 0)
    assert [t for t, _ in seen[12:]] == [1, 1, 1]
    for wrong in ("x@2", "x@2:1", "x@a:b"):
        with pytest.raises(SystemExit, match="expected NAME or NAME@LOW:HIGH"):
            bench.tasks.Method.parse(wrong)


def test_training_repeats_itself_and_touches_no_global_generator(bench: Any) -> None:
    rng = np.random.default_rng(0)
    pool = bench.nets.Pool([smooth(rng)], [[stripes(rng, smooth(rng))]])
    settings = replace(bench.main.QUICK, steps=3)
    before = torch.get_rng_state()
    one, again, other = (
        bench.nets.train(pool, settings, seed, torch.device("cpu")).state_dict()
        for seed in (0, 0, 1)
    )
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(one[name], again[name]) for name in one)
    assert not all(torch.equal(one[name], other[name]) for name in one)


def test_the_denoiser_takes_odd_sizes_and_starts_at_doing_nothing(bench: Any) -> None:
    net = bench.nets.Denoiser(8, 4)
    images = torch.rand(2, 3, 21, 34, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(net(images), images)


def test_psnr_is_of_rounded_pictures_without_borders(bench: Any) -> None:
    clean = np.full((40, 40, 3), 100, np.uint8)

    def restore(lq: torch.Tensor) -> torch.Tensor:
        result = torch.full((1, 3, 40, 40), 104.4 / 255)
        result[..., 0, :] = 1.0  # in the border
        return result

    found = bench.nets.measure(restore, [(clean[::4, ::4], clean)], 4, torch.device("cpu"), None)
    assert found["psnr"] == [pytest.approx(20 * math.log10(255 / 4), abs=1e-3)]
    assert list(found) == ["psnr", "ssim"]
    seen = bench.nets.measure(
        lambda lq: lq, [(clean, clean)], 1, torch.device("cpu"), lambda a, b: 0.25
    )
    assert seen["lpips"] == [0.25]


def test_a_table_adds_up_folds_and_seeds(bench: Any) -> None:
    task = SimpleNamespace(name="t", names=["a", "b"], test=[0, 0], clean=[0])

    def run(**psnr: float) -> dict[str, Any]:
        return {"psnr": psnr, "ssim": dict.fromkeys(psnr, 0.5), "seconds": 1}

    runs = {
        "t/input": run(a=20, b=30),
        "t/white/seed 0/fold 0": run(a=24, b=32),
        "t/white/seed 1/fold 0": run(a=26, b=34),
        "t/real pairs/seed 0/fold 0": run(a=30),
        "t/real pairs/seed 0/fold 1": run(b=40),
        "t/real pairs/seed 1/fold 0": run(a=99),  # stopped before its second fold
        "other/white/seed 0/fold 0": run(a=99, b=99),
    }
    methods = [bench.tasks.Method.parse(m) for m in ("white", "DeFlow", "real pairs")]
    table = bench.main.table(task, runs, methods)
    assert [row[0] for row in table.rows] == ["input", "white", "real pairs"]
    assert figures(table, "PSNR (dB)") == {"input": 25, "white": 29, "real pairs": 35}
    assert figures(table, "PGap (dB)") == {"input": 10, "white": 6, "real pairs": 0}
    assert table.rows[1][2] == "1.41"  # 28 and 30
    assert table.rows[1][-1] == "5.00 to 7.00"
    assert table.rows[2][2] == "-"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tasks", "camera_noise"], "camera_noise needs --data"),
        (["--tasks", "moon"], "there is no task 'moon'"),
        (["--tasks", "sr", "--weights", "moon=x"], "there is no task 'moon'"),
    ],
)
def test_what_cannot_be_run_is_refused(
    bench: Any, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        bench.main.main(arguments)
    assert message in capsys.readouterr().err


def test_an_unknown_method_is_refused(bench: Any, data: Path) -> None:
    with pytest.raises(SystemExit, match="no method 'magic'; there are nothing, white"):
        bench.main.main(
            ["--data", str(data), "--quick", "--tasks", "camera_noise", "--methods", "magic"]
        )
