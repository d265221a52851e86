"""A pair depends on (seed, epoch, index) alone: not on workers, batches or processes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from clean_images import SIDES, GlobalStates, degrader, global_states, same, write
from torch.utils.data import DataLoader, DistributedSampler

from deflow_aug import DegradedPairs
from deflow_aug.transforms import Chain, MixedDegradation, RandomJPEG

EPOCHS = (3, 4)

# Four workers on fewer cores are slow, not wrong.
pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> DegradedPairs:
    folder = tmp_path_factory.mktemp("clean")
    write(folder)
    model = degrader()
    mixed = MixedDegradation([(model, 0.5), (Chain([model, RandomJPEG()]), 0.5)])
    return DegradedPairs(folder, mixed, 2, 16, "basicsr", seed=6)


@pytest.fixture(scope="module")
def expected(pairs: DegradedPairs) -> dict[int, list[dict[str, Any]]]:
    """The pairs of both epochs by index, made one by one in this process."""
    made = {}
    for epoch in EPOCHS:
        pairs.set_epoch(epoch)
        made[epoch] = [pairs[index] for index in range(len(pairs))]
    assert not same(made[EPOCHS[0]], made[EPOCHS[1]])
    return made


def unbatched(loader: Any) -> list[dict[str, Any]]:
    """The items of a loader of dicts, one by one, as they were before they were batched."""
    items = []
    for batch in loader:
        for i in range(len(batch["lq"])):
            items.append({name: value[i] for name, value in batch.items()})
    return items


@pytest.mark.parametrize(
    ("batch_size", "workers", "context", "persistent"),
    [
        (1, 0, None, False),
        (3, 0, None, False),
        (1, 1, "fork", False),
        (2, 1, "fork", True),
        (1, 4, "fork", True),
        (3, 4, "fork", False),
        (2, 1, "spawn", False),
        (3, 2, "spawn", True),
    ],
)
def test_workers_and_batches(
    pairs: DegradedPairs,
    expected: dict[int, list[dict[str, Any]]],
    batch_size: int,
    workers: int,
    context: str | None,
    persistent: bool,
) -> None:
    loader = DataLoader(
        pairs,
        batch_size,
        num_workers=workers,
        multiprocessing_context=context,
        persistent_workers=persistent,
    )
    # Without persistent workers the second epoch only starts new ones.
    epochs = EPOCHS if persistent or context != "spawn" else EPOCHS[1:]
    for epoch in epochs:
        pairs.set_epoch(epoch)
        assert same(unbatched(loader), expected[epoch]), f"epoch {epoch}"


def test_persistent_workers_that_were_left_in_the_middle_of_an_epoch(
    pairs: DegradedPairs, expected: dict[int, list[dict[str, Any]]]
) -> None:
    loader = DataLoader(pairs, 1, num_workers=2, persistent_workers=True)
    pairs.set_epoch(EPOCHS[0])
    next(iter(loader))  # the workers have made more than this one
    pairs.set_epoch(EPOCHS[1])
    assert same(unbatched(loader), expected[EPOCHS[1]])


def test_shuffling_does_not_matter(
    pairs: DegradedPairs, expected: dict[int, list[dict[str, Any]]]
) -> None:
    pairs.set_epoch(EPOCHS[0])
    shuffle = torch.Generator().manual_seed(1)
    items = unbatched(DataLoader(pairs, 2, shuffle=True, generator=shuffle, num_workers=1))
    order = [item["gt_path"] for item in items]
    assert order != sorted(order)
    assert same(sorted(items, key=lambda item: item["gt_path"]), expected[EPOCHS[0]])


def test_two_processes_with_a_distributed_sampler(
    pairs: DegradedPairs, expected: dict[int, list[dict[str, Any]]]
) -> None:
    for epoch in EPOCHS:
        made: dict[str, Any] = {}
        for rank in range(2):
            sampler = DistributedSampler(pairs, num_replicas=2, rank=rank, shuffle=True)
            sampler.set_epoch(epoch)
            pairs.set_epoch(epoch)
            for item in unbatched(DataLoader(pairs, 2, sampler=sampler, num_workers=rank)):
                # The sampler fills the last place with the first image: the same pair again.
                assert same(made.setdefault(item["gt_path"], item), item)
        assert same([made[path] for path in sorted(made)], expected[epoch])
        assert len(made) == len(SIDES)


@pytest.mark.parametrize("workers", [0, 1])
def test_no_global_random_state_is_touched(pairs: DegradedPairs, workers: int) -> None:
    pairs.set_epoch(0)
    untouched = global_states()
    # Its own generator, since a loader draws the seed of its workers from the global one.
    loader = DataLoader(GlobalStates(pairs), None, num_workers=workers, generator=torch.Generator())
    told = [left_alone for _, left_alone in loader]
    assert told == [True] * len(pairs)
    assert same(global_states(), untouched)


def test_global_random_states_are_not_read(
    pairs: DegradedPairs, expected: dict[int, list[dict[str, Any]]]
) -> None:
    pairs.set_epoch(EPOCHS[0])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(99)
        assert same([*pairs], expected[EPOCHS[0]])
