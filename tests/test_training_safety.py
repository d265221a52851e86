"""Bad steps: skipped, counted, and left behind."""

import json
import math
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny_run import assert_same_weights, ignore, recipe, trainer, unpaired

from deflow_aug.data.unpaired import UnpairedBatches
from deflow_aug.training import checkpoints
from deflow_aug.training.loop import Progress, Trainer, TrainingError
from deflow_aug.training.safety import (
    ENOUGH,
    HISTORY,
    IN_A_ROW,
    IN_WINDOW,
    ROLLBACKS,
    WINDOW,
    Safety,
    Verdict,
)


@pytest.fixture
def batches(tmp_path: Path) -> UnpairedBatches:
    return unpaired(tmp_path / "data")


def spoil(run: Trainer, factor: Callable[[int], float]) -> None:
    """Multiply the loss of step 0, 1, ... by a factor."""
    honest = run.model.nll
    run.model.nll = lambda *a, **k: honest(*a, **k) * factor(run.step)  # type: ignore[method-assign]


def weights(run: Trainer) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in run.model.state_dict().items()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_step_that_is_not_finite_changes_nothing(
    batches: UnpairedBatches, tmp_path: Path, value: float
) -> None:
    run = trainer(batches, tmp_path / "run", recipe(steps=3))
    states, log = [weights(run)], []
    spoil(run, lambda step: value if step == 1 else 1.0)

    def watch(progress: Progress) -> None:
        log.append(progress)
        states.append(weights(run))

    run.run(watch)
    assert [(progress.skipped, progress.outliers) for progress in log] == [(0, 0), (1, 0), (1, 0)]
    assert not same(states[0], states[1])
    assert same(states[1], states[2])
    assert not same(states[2], states[3])
    assert all(bool(tensor.float().isfinite().all()) for tensor in states[3].values())
    lines = (tmp_path / "run" / "log.jsonl").read_text().splitlines()
    # JSON has no NaN.
    told = [json.loads(line, parse_constant=pytest.fail) for line in lines]
    assert told[1]["bits"] == {"clean": None, "degraded": None}


def test_a_gradient_far_off_is_skipped(batches: UnpairedBatches, tmp_path: Path) -> None:
    run = trainer(batches, tmp_path / "run", recipe(steps=ENOUGH + 2))
    spoil(run, lambda step: 50.0 if step in (1, ENOUGH) else 1.0)
    log: list[Progress] = []
    before: list[dict[str, torch.Tensor]] = []

    def watch(progress: Progress) -> None:
        log.append(progress)
        before.append(weights(run))

    run.run(watch)
    # The first of the two came before it could be known what norms are usual.
    assert [p.step for p in log if p.outliers > (log[p.step - 2].outliers if p.step > 1 else 0)] \
        == [ENOUGH + 1]  # fmt: skip
    assert (log[-1].skipped, log[-1].outliers) == (1, 1)
    assert same(before[ENOUGH - 1], before[ENOUGH])


def judged(safety: Safety, norms: list[float]) -> list[Verdict]:
    return [safety.judge([8.0], norm) for norm in norms]


def test_outliers_are_told_by_the_median() -> None:
    safety = Safety(outlier_factor=10.0)
    usual = [1.0 + 0.1 * (n % 5) for n in range(ENOUGH)]
    assert judged(safety, [1e6, *usual[1:]]) == [Verdict.GOOD] * ENOUGH
    assert judged(safety, [11.9, 12.1, 1.0]) == [Verdict.GOOD, Verdict.OUTLIER, Verdict.GOOD]
    # Gradients that have grown for good are usual again once half of the history has them.
    grown = judged(safety, [100.0] * HISTORY)
    assert grown[0] is Verdict.OUTLIER
    assert grown[-1] is Verdict.GOOD
    assert judged(Safety(outlier_factor=0), [*usual, 1e30]) == [Verdict.GOOD] * (ENOUGH + 1)


def test_a_run_is_lost_after_bad_steps_in_a_row_or_many_in_a_while() -> None:
    safety = Safety(10.0)
    judged(safety, [math.nan] * (IN_A_ROW - 1))
    assert not safety.lost
    judged(safety, [1.0, math.nan])
    assert not safety.lost
    assert not safety.calm
    judged(safety, [1.0] * IN_A_ROW)
    assert safety.calm
    for _ in range(IN_A_ROW):
        safety.judge([math.inf], 1.0)
    assert safety.lost
    assert safety.skipped == 2 * IN_A_ROW

    often = Safety(10.0)
    judged(often, [math.nan if n % 4 == 0 else 1.0 for n in range(WINDOW - IN_A_ROW)])
    while sum(often.bad) < IN_WINDOW - 1:
        judged(often, [math.nan])
    assert not often.lost
    assert len(often.bad) < WINDOW
    judged(often, [math.nan])
    assert often.lost


def test_its_state_is_kept() -> None:
    safety = Safety(10.0)
    judged(safety, [0.1 * n for n in range(30)] + [math.nan, 1e9])
    safety.go_back([1.0, 2.0])
    judged(safety, [3.0, math.nan])
    again = Safety.restore(10.0, json.loads(json.dumps(safety.state())))
    assert again == safety
    assert again.lr_factor == 0.5


def test_bad_steps_that_do_not_end_send_a_run_back(
    batches: UnpairedBatches, tmp_path: Path
) -> None:
    """To the last good weights, with half the learning rate; and it gets over it."""
    settings = recipe(steps=24, checkpoint_every=4, warmup=0)
    run = trainer(batches, tmp_path / "run", settings)
    spoil(run, lambda step: math.nan if 6 <= step < 6 + IN_A_ROW else 1.0)
    log: list[Progress] = []
    states: list[dict[str, torch.Tensor]] = [weights(run)]

    def watch(progress: Progress) -> None:
        log.append(progress)
        states.append(weights(run))

    with pytest.warns(UserWarning, match="back to the weights of step 4, with half the learning"):
        run.run(watch)
    # Good checkpoints are of steps 0 and 4; at 8 and 12 steps had been bad.
    lost = 6 + IN_A_ROW
    assert [progress.step for progress in log] == list(range(1, 25))
    assert [progress.rolled_back for progress in log] == [0] * lost + [1] * (24 - lost)
    assert [progress.lr for progress in log] == [8e-4] * lost + [4e-4] * (24 - lost)
    assert log[-1].skipped == IN_A_ROW
    assert same(states[6], states[lost])
    after = checkpoints.load(tmp_path / "run" / "checkpoints" / f"step-{24:08d}.safetensors")
    assert after.state["went_back"] == [lost, 4]
    assert not same(states[4], states[24])


def test_what_it_goes_back_to(batches: UnpairedBatches, tmp_path: Path) -> None:
    """The weights, the average and the optimiser's memory, bit by bit."""
    settings = recipe(steps=6 + IN_A_ROW, checkpoint_every=4)
    run = trainer(batches, tmp_path / "run", settings)
    spoil(run, lambda step: math.nan if step >= 6 else 1.0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run.run(ignore)
    good = checkpoints.load(tmp_path / "run" / "checkpoints" / "step-00000004.safetensors")
    now = checkpoints.load(
        tmp_path / "run" / "checkpoints" / f"step-{6 + IN_A_ROW:08d}.safetensors"
    )
    assert same(dict(good.tensors), dict(now.tensors))
    assert now.state["safety"]["rollbacks"] == 1
    assert not now.state["good"]


@pytest.mark.filterwarnings("ignore:too many bad steps")
def test_a_second_time_it_goes_back_further(batches: UnpairedBatches, tmp_path: Path) -> None:
    """The weights of step 8 may be what is bad, if no good ones came of them."""
    settings = recipe(steps=10 + 3 * IN_A_ROW, checkpoint_every=4)
    run = trainer(batches, tmp_path / "run", settings)
    spoil(run, lambda step: math.nan if step >= 10 else 1.0)
    targets = []

    def watch(progress: Progress) -> None:
        if run.state.went_back != (-1, 0) and run.state.went_back not in targets:
            targets.append(run.state.went_back)

    run.run(watch)
    targets.append(run.state.went_back)
    assert targets == [(10 + n * IN_A_ROW, to) for n, to in ((1, 8), (2, 4), (3, 0))]


@pytest.mark.filterwarnings("ignore:too many bad steps")
def test_a_run_that_stays_bad_is_given_up(batches: UnpairedBatches, tmp_path: Path) -> None:
    run = trainer(batches, tmp_path / "run", recipe(steps=200))
    spoil(run, lambda step: math.inf)
    with pytest.raises(TrainingError, match=r"5 returns.*down to 2\.5e-05.*lower lr"):
        run.run(ignore)
    assert run.step == IN_A_ROW * (ROLLBACKS + 1)
    lines = (tmp_path / "run" / "log.jsonl").read_text().splitlines()
    assert len(lines) == run.step


@pytest.mark.filterwarnings("ignore:too many bad steps")
def test_a_resumed_run_knows_that_it_went_back(batches: UnpairedBatches, tmp_path: Path) -> None:
    """Stopped before, between and after going back, it ends as one that was never stopped."""
    settings = recipe(steps=22, checkpoint_every=4)

    def bad(step: int) -> float:
        return math.nan if 6 <= step < 6 + IN_A_ROW else 1.0

    whole = trainer(batches, tmp_path / "whole", settings)
    spoil(whole, bad)
    logs: list[list[Progress]] = [[], []]
    whole.run(logs[0].append)

    class Stop(Exception):
        pass

    def stop(progress: Progress) -> None:
        logs[1].append(progress)
        if progress.step in (9, 16, 18):
            raise Stop

    for _ in range(3):
        part = trainer(batches, tmp_path / "parts", settings)
        spoil(part, bad)
        with pytest.raises(Stop):
            part.run(stop)
    last = trainer(batches, tmp_path / "parts", settings)
    spoil(last, bad)
    last.run(logs[1].append)
    assert_same_weights(last, whole)
    told = [[(p.step, p.lr, p.skipped, p.rolled_back, repr(p.bits)) for p in log] for log in logs]
    assert told[0] == told[1]
