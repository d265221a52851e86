"""Do the degradations train better networks? The same network, trained on pairs of each kind.

    python benchmarks/downstream.py --data DATA --quick
    python benchmarks/downstream.py --data DATA --json results.json --plot results.png

DATA holds ``camera_noise`` and ``low_light``, each with ``clean``, ``degraded`` (unpaired, other
scenes) and ``validation`` (pairs NAME_clean.*, NAME_degraded.*), and ``clean``, a folder of clean
pictures; whichever tasks ask for. Tasks:

- ``camera_noise``, ``low_light``: denoising of real noise. Each method degrades the pictures of
  ``clean``, having seen those of ``degraded`` at most; the validation pairs are tested on. The
  ceiling, "real pairs", is trained on the validation pairs of the other scenes, in turn for all
  scenes: on the real degradation, but on other and fewer pictures than the methods have, so that
  it can be passed.
- ``sr``: x4 super-resolution of an unknown degradation (see ``hidden`` in restoration_tasks.py).
  A third of DATA/clean (of examples/images without --data) is tested on, another third is the
  unpaired degraded domain, downscaled and degraded; the rest are the clean pictures. DeFlow is
  trained on the two domains first, unless ``--weights sr=FOLDER`` is given.

Methods: "nothing", all baselines of ``deflow_aug.baselines`` (fitted to the unpaired degraded
pictures), "DeFlow" and "real pairs". NAME@LOW:HIGH draws temperatures from a range. In denoising a
network trained on "nothing" learns to do nothing; the row "input" stands for it.

All networks of a seed start from the same weights and see the same crops of the same clean
pictures in the same steps (those of the ceiling: of other pictures). PGap = PSNR(real pairs) -
PSNR(method), smaller is better. "± seeds" is the standard deviation over seeds, of training and
degradations; the 95 % intervals are bootstrapped over the test pictures, and those of PGap of the
differences of each picture. Pictures of one scene are alike: the intervals are rather too narrow.

Every network's figures are written to ``--json`` at once; the same command goes on from there.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import restoration
import restoration_tasks as tasks
import torch
from restoration import Pool, Settings
from train_sr import bicubic_upscale

from deflow_aug import randomness
from deflow_aug.devices import resolve
from deflow_aug.evaluation.tables import Table, number
from deflow_aug.hub import DEFAULT_WEIGHTS
from deflow_aug.training.checkpoints import write_atomically

INPUT = "input"
NOTHING = "nothing"
DENOISING = ("camera_noise", "low_light")
SR = "sr"
EXAMPLES = Path(__file__).resolve().parents[1] / "examples" / "images"

BASELINES = ("white", "signal-dependent", "noise patches", "classical chain")
QUICK = Settings(channels=32, layers=7, steps=1000, batch=8, crop=64)
FULL = Settings(channels=48, layers=8, steps=6000, batch=16, crop=64)

Run = dict[str, Any]
"""Figures of a network: for psnr, ssim and lpips, a number by the name of the test picture."""


@dataclass
class Results:
    """Runs by their name, kept in a file where one is given."""

    settings: dict[str, Any]
    file: Path | None
    runs: dict[str, Run]

    @classmethod
    def open(cls, settings: dict[str, Any], file: Path | None) -> Results:
        runs: dict[str, Run] = {}
        if file is not None and file.exists():
            found = json.loads(file.read_text(encoding="utf-8"))
            if found["settings"] != settings:
                other = [k for k in settings if found["settings"].get(k) != settings[k]]
                raise SystemExit(
                    f"{file} holds results of other settings ({', '.join(other)}); give the same "
                    "ones, or another file"
                )
            runs = found["runs"]
        return cls(settings, file, runs)

    def add(self, name: str, run: Run) -> None:
        self.runs[name] = run
        if self.file is not None:
            text = json.dumps({"settings": self.settings, "runs": self.runs}, indent=1)
            write_atomically(self.file, (text + "\n").encode())


def main(arguments: list[str] | None = None) -> dict[str, Table]:
    """The tables, by task."""
    args = parsed(arguments)
    settings = QUICK if args.quick else FULL
    if args.steps is not None:
        settings = Settings(**{**asdict(settings), "steps": args.steps})
    methods = [tasks.Method.parse(text) for text in args.methods]
    device = resolve(args.device)
    told = {
        "data": None if args.data is None else args.data.name,
        "draws": args.draws,
        "deflow_steps": args.deflow_steps,
        "weights": args.weights,
        **asdict(settings),
    }
    results = Results.open(told, args.json)
    lpips = restoration.installed_lpips()
    tables = {}
    with tempfile.TemporaryDirectory() as scratch:
        for name in args.tasks:
            if name in DENOISING:
                task = tasks.denoising(args.data / name)
            else:
                task = tasks.super_resolution(
                    EXAMPLES if args.data is None else args.data / "clean", args.draws
                )
            bench = Bench(task, settings, args, device, lpips, results, Path(scratch))
            bench.run(methods)
            tables[name] = table(task, results.runs, methods)
            print("\n" + tables[name].to_markdown(), flush=True)
            if args.plot:
                file = args.plot.with_name(f"{args.plot.stem}_{name}{args.plot.suffix}")
                plot(task, results.runs, methods, file)
    return tables


def parsed(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--data", type=Path, metavar="DATA", help="see above")
    parser.add_argument(
        "--quick", action="store_true", help="small networks, one seed, denoising alone"
    )
    parser.add_argument("--tasks", help=f"of {', '.join((*DENOISING, SR))}; with commas between")
    parser.add_argument("--seeds", help="numbers, with commas between; default: 0,1,2 (quick: 0)")
    parser.add_argument("--methods", help="of those above, with commas between")
    parser.add_argument(
        "--weights",
        action="append",
        default=[],
        metavar="TASK=WEIGHTS[@DOMAIN]",
        help=f"of DeFlow for a task, and their domain if they have several; default: "
        f"{DEFAULT_WEIGHTS}, and for {SR} a training",
    )
    parser.add_argument("--steps", type=int, help="training steps of each network")
    parser.add_argument("--draws", type=int, help="degradations of each clean picture")
    parser.add_argument(
        "--deflow-steps",
        type=int,
        help=f"training steps of DeFlow for {SR}; default: those of the small recipe",
    )
    parser.add_argument("--device", default="auto")
    parser.add_argument("--json", type=Path, metavar="FILE", help="see above")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="a figure for each task")
    args = parser.parse_args(arguments)
    ranges = [] if args.quick else ["DeFlow@0.5:1.5"]
    default = [NOTHING, *BASELINES, tasks.DEFLOW, *ranges, tasks.REAL]
    args.methods = args.methods.split(",") if args.methods else default
    args.tasks = (
        args.tasks.split(",") if args.tasks else [*DENOISING, *([] if args.quick else [SR])]
    )
    seeds = args.seeds or ("0" if args.quick else "0,1,2")
    args.seeds = [int(seed) for seed in seeds.split(",")]
    if args.draws is None:
        args.draws = 2 if args.quick else 6
    known = (*DENOISING, SR)
    for task in args.tasks:
        if task not in known:
            parser.error(f"there is no task {task!r}; there are {', '.join(known)}")
        if task in DENOISING and args.data is None:
            parser.error(f"{task} needs --data")
    weights = dict(pair.partition("=")[::2] for pair in args.weights)
    if other := set(weights) - set(known):
        parser.error(f"--weights takes TASK=WEIGHTS; there is no task {other.pop()!r}")
    args.weights = weights
    return args


@dataclass
class Bench:
    """All runs of a task."""

    task: tasks.Task
    settings: Settings
    args: argparse.Namespace
    device: torch.device
    lpips: restoration.Lpips | None
    results: Results
    scratch: Path

    def run(self, methods: list[tasks.Method]) -> None:
        """What is not among the results yet."""
        everything = tuple(range(len(self.task.test)))
        if (name := f"{self.task.name}/{INPUT}") not in self.results.runs:
            self._record(name, self._unchanged, everything, time.perf_counter())
        for seed in self.args.seeds:
            for method in methods:
                if method.name == NOTHING and self.task.scale == 1:
                    continue
                for fold, (test, pool) in enumerate(self._folds(method, seed)):
                    name = f"{self.task.name}/{method.text}/seed {seed}/fold {fold}"
                    if name in self.results.runs:
                        continue
                    started = time.perf_counter()
                    net = restoration.train(pool(), self._settings(), seed, self.device)
                    self._record(name, net, test, started)

    def _folds(self, method: tasks.Method, seed: int) -> Iterator[tuple[tuple[int, ...], Any]]:
        """Which pictures a network is tested on, and a function that makes what it learns from."""
        if method.name == tasks.REAL:
            for fold in self.task.folds:
                yield fold.test, lambda fold=fold: fold.real
        else:
            yield tuple(range(len(self.task.test))), lambda: self._pool(method, seed)

    def _pool(self, method: tasks.Method, seed: int) -> Pool:
        return tasks.pool(self.task, self._degrade(method.name), method, self.args.draws, seed)

    def _degrade(self, name: str) -> tasks.Degrade:
        if name != tasks.DEFLOW:
            known = self._baselines
            if name not in known:
                raise SystemExit(
                    f"there is no method {name!r}; there are "
                    f"{', '.join((*known, tasks.DEFLOW, tasks.REAL))}"
                )
            return known[name]
        weights = self.args.weights.get(self.task.name)
        if weights is None and self.task.name == SR:
            file = self.args.json
            folder = self.scratch if file is None else file.with_name(f"{file.stem}-deflow")
            weights = str(
                tasks.train_deflow(self.task, folder, self.args.deflow_steps, self.args.device)
            )
        return tasks.deflow(weights or DEFAULT_WEIGHTS, self.args.device)

    @cached_property
    def _baselines(self) -> Mapping[str, tasks.Degrade]:
        return tasks.baselines(self.task)

    def _settings(self) -> Settings:
        """The crops of a super-resolution's input are half as large: their targets are larger."""
        crop = self.settings.crop // (1 if self.task.scale == 1 else 2)
        return Settings(**{**asdict(self.settings), "crop": crop})

    def _unchanged(self, lq: torch.Tensor) -> torch.Tensor:
        return lq if self.task.scale == 1 else bicubic_upscale(lq, self.task.scale)

    def _record(
        self, name: str, restore: restoration.Restore, test: tuple[int, ...], started: float
    ) -> None:
        pairs = [self.task.test[i] for i in test]
        figures = restoration.measure(restore, pairs, self.task.scale, self.device, self.lpips)
        names = [self.task.names[i] for i in test]
        run = {kind: dict(zip(names, of, strict=True)) for kind, of in figures.items()}
        seconds = round(time.perf_counter() - started, 1)
        self.results.add(name, {**run, "seconds": seconds})
        print(f"{name}: PSNR {np.mean(figures['psnr']):.2f} dB, {seconds:.0f} s", flush=True)


# -- what came of it -------------------------------------------------------------------------------


def figures(task: tasks.Task, runs: dict[str, Run], method: str, kind: str) -> np.ndarray:
    """[seeds, pictures] of a method; seeds that are not complete are left out."""
    parts: dict[str, Run] = {}
    for name, run in runs.items():
        of, _, rest = name.partition("/")
        text, _, seed = rest.partition("/")
        if of == task.name and text == method and kind in run:
            parts.setdefault(seed.partition("/")[0], {}).update(run[kind])
    rows = [[p[n] for n in task.names] for p in parts.values() if len(p) == len(task.names)]
    return np.array(rows).reshape(len(rows), len(task.names))


def interval(values: np.ndarray) -> str:
    """Of the mean of values [pictures]: 95 %, by bootstrap over the pictures."""
    rng = randomness.generator(0, len(values))
    means = values[rng.integers(len(values), size=(4000, len(values)))].mean(1)
    low, high = np.quantile(means, (0.025, 0.975))
    return f"{low:.2f} to {high:.2f}"


def spread(values: np.ndarray) -> str:
    """Standard deviation over the seeds of means over pictures, of values [seeds, pictures]."""
    return number(float(values.mean(1).std(ddof=1)) if len(values) > 1 else float("nan"), 2)


def table(task: tasks.Task, runs: dict[str, Run], methods: list[tasks.Method]) -> Table:
    """A row for the input and for each method, of the runs that are there."""
    real = figures(task, runs, tasks.REAL, "psnr")
    with_lpips = any("lpips" in run for run in runs.values())
    rows = []
    for method in (INPUT, *(m.text for m in methods)):
        psnr = figures(task, runs, method, "psnr")
        if not len(psnr):
            continue
        cells = [method, number(float(psnr.mean()), 2), spread(psnr), interval(psnr.mean(0))]
        cells.append(number(float(figures(task, runs, method, "ssim").mean()), 4))
        if with_lpips:
            cells.append(number(float(figures(task, runs, method, "lpips").mean()), 4))
        if len(real):
            gap = real.mean(0) - psnr.mean(0)
            cells += [number(float(gap.mean()), 2), interval(gap)]
        rows.append(tuple(cells))
    heads = ["", "PSNR (dB)", "± seeds", "95 %", "SSIM", *(["LPIPS"] if with_lpips else [])]
    heads += ["PGap (dB)", "95 %"] if len(real) else []
    notes = [
        f"{len(task.test)} test pictures, {len(task.clean)} clean ones to train on. PGap: real "
        f"pairs less method. Intervals: bootstrap over test pictures."
    ]
    if not with_lpips:
        notes.append("LPIPS is left out: the network that it needs is not installed.")
    return Table(task.name, tuple(heads), tuple(rows), tuple(notes))


def plot(task: tasks.Task, runs: dict[str, Run], methods: list[tasks.Method], file: Path) -> None:
    """PSNR of every seed by method, and their mean."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    found = {m: figures(task, runs, m, "psnr") for m in (INPUT, *(m.text for m in methods))}
    found = {name: psnr for name, psnr in found.items() if len(psnr)}
    figure, axes = plt.subplots(figsize=(7, 1 + 0.4 * len(found)), layout="constrained")
    for row, psnr in enumerate(found.values()):
        means = psnr.mean(1)
        axes.scatter(means, np.full(len(means), row), s=22, alpha=0.7, color="tab:blue")
        axes.scatter(means.mean(), row, s=140, marker="|", color="black")
    axes.set_yticks(range(len(found)), list(found))
    axes.invert_yaxis()
    axes.set(xlabel="PSNR (dB), a point for each seed", title=task.name)
    axes.grid(alpha=0.3)
    figure.savefig(file, dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    main()
