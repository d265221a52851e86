"""A run that is killed at any moment goes on as if it had not been."""

from __future__ import annotations

import io
import json
import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_run import assert_same_weights, ignore, recipe, trainer, unpaired

from deflow_aug.training import checkpoints
from deflow_aug.training.loop import Progress, Trainer

pytestmark = pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no SIGKILL here")

STEPS = 16
SETTINGS = recipe(steps=STEPS, checkpoint_every=2)

# Processes forked from one that has imported everything, and computed nothing, start at once.
FORKED = multiprocessing.get_context("forkserver" if os.name == "posix" else "spawn")
FORKED.set_forkserver_preload(["deflow_aug.training.loop", "accelerate", "torch._dynamo"])


def train(output: Path, data: Path, stall: str | None = None) -> None:
    """Train to the end, or until killed.

    Args:
        stall: where to stop and wait to be killed: see :func:`waiting`.
    """
    torch.set_num_threads(1)
    if stall is not None:
        waiting(output, stall)
    trainer(unpaired(data), output, SETTINGS).run(ignore)


def waiting(output: Path, where: str) -> None:
    """Have this process stall in the middle of writing a checkpoint."""

    def wait() -> None:
        (output / "stalled").touch()
        time.sleep(600)

    def stalling(function: Callable[..., Any], call: Callable[..., bool]) -> Callable[..., Any]:
        def wrapped(*args: Any) -> Any:
            if call(*args):
                wait()
            return function(*args)

        return wrapped

    class HalfWritten(io.FileIO):
        """A file of which the second part never comes."""

        def write(self, data: Any) -> int:
            if self.tell() > 0:
                wait()
            return super().write(data)

    if where == "half of the file is written":
        checkpoints.CHUNK = 2**16

        def opened(path: Path, mode: str) -> Any:
            return (HalfWritten if path.name == "step-00000004.partial" else open)(path, mode)

        checkpoints.open = opened  # type: ignore[attr-defined]
    elif where == "it is not renamed yet":
        checkpoints._rename = stalling(
            checkpoints._rename, lambda _, path: path.stem == "step-00000004"
        )
    elif where == "the best one is not kept yet":
        checkpoints.keep_best = stalling(checkpoints.keep_best, lambda *_: True)
    elif where == "old ones are not removed yet":
        checkpoints.tidy = stalling(
            checkpoints.tidy, lambda *_: (output / "checkpoints/step-00000008.safetensors").exists()
        )
    else:
        raise ValueError(where)


def kill(process: Any) -> bool:
    """Kill a process; False if it had already come to its end by itself."""
    process.kill()
    process.join()
    assert process.exitcode in (0, -signal.SIGKILL)
    return process.exitcode != 0


def until(condition: Callable[[], bool], process: Any) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        # It may have ended, with the condition met, since that was looked at.
        assert process.is_alive() or condition()
        time.sleep(0.001)


def lines(run: Path) -> int:
    try:
        return (run / "log.jsonl").read_bytes().count(b"\n")
    except FileNotFoundError:
        return 0


def told(run: Path) -> list[tuple[int, dict[str, float], float]]:
    """What the log has of each step, but for the time it took."""
    entries = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [(entry["step"], entry["bits"], entry["gradient_norm"]) for entry in entries]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Trainer, Path]:
    """A run that nothing interrupts, and its folder, with the data beside it."""
    folder = tmp_path_factory.mktemp("whole")
    unpaired(folder / "data")
    process = FORKED.Process(target=train, args=(folder / "run", folder / "data"))
    process.start()
    process.join(120)
    assert process.exitcode == 0
    assert [step for step, *_ in told(folder / "run")] == list(range(1, STEPS + 1))
    return trainer(unpaired(folder / "data"), folder / "run", SETTINGS), folder


def assert_ends_the_same(run: Path, whole: tuple[Trainer, Path]) -> None:
    """Weights and optimiser bit by bit, the log, and the checkpoints that are kept."""
    ended = trainer(unpaired(whole[1] / "data"), run, SETTINGS)
    assert ended.step == STEPS
    assert_same_weights(ended, whole[0])
    assert told(run) == told(whole[1] / "run")
    files = [sorted(p.name for p in (r / "checkpoints").iterdir()) for r in (run, whole[1] / "run")]
    assert files[0] == files[1]
    for name in files[0]:
        one, other = (checkpoints.load(r / "checkpoints" / name) for r in (run, whole[1] / "run"))
        assert (one.step, one.state) == (other.step, other.state)
        assert one.tensors.keys() == other.tensors.keys()
        assert all(torch.equal(one.tensors[n], other.tensors[n]) for n in one.tensors), name


def test_killed_at_random_moments(whole: tuple[Trainer, Path], tmp_path: Path) -> None:
    """One run, killed again and again; sometimes before it has got any further."""
    rng = torch.Generator().manual_seed(int(time.time()))  # other moments each time
    run = tmp_path / "run"
    for _ in range(5):
        process = FORKED.Process(target=train, args=(run, whole[1] / "data"))
        process.start()
        # A checkpoint takes about as long as a step: either may be under way.
        more = int(torch.randint(0, 4, (), generator=rng))
        reached = lines(run)
        until(lambda more=more, reached=reached: lines(run) >= min(reached + more, STEPS), process)
        time.sleep(float(torch.rand((), generator=rng)) * 0.1)
        if not kill(process):  # faster than the moment drawn
            break
    process = FORKED.Process(target=train, args=(run, whole[1] / "data"))
    process.start()
    process.join(120)
    assert process.exitcode == 0
    assert_ends_the_same(run, whole)


@pytest.mark.parametrize(
    "stall",
    [
        "half of the file is written",
        "it is not renamed yet",
        "the best one is not kept yet",
        "old ones are not removed yet",
    ],
)
def test_killed_while_a_checkpoint_is_written(
    whole: tuple[Trainer, Path], tmp_path: Path, stall: str
) -> None:
    run = tmp_path / "run"
    process = FORKED.Process(target=train, args=(run, whole[1] / "data", stall))
    process.start()
    until((run / "stalled").exists, process)
    assert kill(process)
    partial = list((run / "checkpoints").glob("*.partial"))
    if stall in ("half of the file is written", "it is not renamed yet"):
        assert [path.name for path in partial] == ["step-00000004.partial"]
        size = (run / "checkpoints" / "step-00000002.safetensors").stat().st_size
        assert (partial[0].stat().st_size < size) == ("half" in stall)
    process = FORKED.Process(target=train, args=(run, whole[1] / "data"))
    process.start()
    process.join(120)
    assert process.exitcode == 0
    assert_ends_the_same(run, whole)


class Stop(Exception):
    pass


@pytest.mark.parametrize("at", [3, 4])
def test_a_run_that_an_error_ends_is_saved(
    whole: tuple[Trainer, Path], tmp_path: Path, at: int
) -> None:
    """At the very step, in this process: the resumed one repeats nothing."""

    def stop(progress: Progress) -> None:
        if progress.step == at:
            raise Stop

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with pytest.raises(Stop):
            trainer(unpaired(whole[1] / "data"), tmp_path / "run", SETTINGS).run(stop)
        again = trainer(unpaired(whole[1] / "data"), tmp_path / "run", SETTINGS)
        assert again.step == at
        steps: list[int] = []
        again.run(lambda progress: steps.append(progress.step))
        assert steps[0] == at + 1
        assert_ends_the_same(tmp_path / "run", whole)
    finally:
        torch.set_num_threads(threads)


def test_the_log_is_cut_at_the_step_that_is_taken_up(tmp_path: Path) -> None:
    """Also where its last line is half-written, and where it is behind."""
    batches, log = unpaired(tmp_path / "data"), tmp_path / "run" / "log.jsonl"
    trainer(batches, tmp_path / "run").run(ignore)
    newest = checkpoints.latest(tmp_path / "run" / "checkpoints")
    assert newest is not None
    newest.unlink()
    log.write_bytes(log.read_bytes()[:-20])
    again = trainer(batches, tmp_path / "run")
    assert again.step == 6
    again.run(ignore)
    assert [step for step, *_ in told(tmp_path / "run")] == list(range(1, 9))
    assert not list((tmp_path / "run").glob("*.partial"))
