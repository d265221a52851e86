"""RandomDeFlow as an augmentation of Kornia: the contract that its own tests have for every one."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import numpy as np
import pytest
import torch
from small import small_model
from torch import Tensor

K = pytest.importorskip("kornia.augmentation", reason="the extra [test] brings kornia")

from deflow_aug import DeFlowDegrader  # noqa: E402
from deflow_aug.transforms.kornia import RandomDeFlow  # noqa: E402


@pytest.fixture(scope="module")
def degrader() -> DeFlowDegrader:
    return DeFlowDegrader(small_model(domains=("night", "day")), device="cpu")


@pytest.fixture
def seeded() -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(42)
        yield


def tensor(*shape: int) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(0)) * 0.4 + 0.3


def make(degrader: DeFlowDegrader, **settings: Any) -> Any:
    return RandomDeFlow(degrader, **{"domain": "random", "p": 1.0, **settings})


@pytest.mark.parametrize("p", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("keepdim", [False, True])
@pytest.mark.parametrize("shape", [(4, 5), (3, 4, 5), (1, 4, 5), (2, 3, 4, 5), (2, 1, 4, 5)])
def test_shapes(degrader: DeFlowDegrader, shape: tuple[int, ...], keepdim: bool, p: float) -> None:
    result = make(degrader, p=p, keepdim=keepdim)(tensor(*shape))
    assert result.shape == (shape if keepdim else (*(1,) * (4 - len(shape)), *shape))


@pytest.mark.parametrize("seed", [None, 3])
def test_draws_are_made_on_the_cpu(degrader: DeFlowDegrader, seed: int | None) -> None:
    draws = make(degrader, seed=seed)._param_generator
    with torch.device("meta"):  # holds no data
        params = draws.forward((2, 3, 8, 8))
    assert {values.device.type for values in params.values()} == {"cpu"}
    assert params["seed"].unique().numel() == 2


def test_it_can_be_taken_apart(degrader: DeFlowDegrader) -> None:
    augment = make(degrader)
    assert isinstance(augment, K.AugmentationBase2D)
    params = augment.forward_parameters((4, 3, 5, 6))
    batch = tensor(4, 3, 5, 6)
    matrix = augment.compute_transformation(batch, params, augment.flags)
    assert matrix.equal(torch.eye(3).expand(4, 3, 3))
    result = augment.apply_transform(batch, params, augment.flags, matrix)
    assert result.equal(augment(batch, params=params))
    assert augment.transform_matrix.equal(matrix)
    for i in range(4):
        alone = degrader.degrade(
            batch[i],
            float(params["temperature"][i]),
            seed=int(params["seed"][i]),
            domain=("night", "day")[int(params["domain"][i])],
        )
        assert torch.allclose(alone, result[i], rtol=0, atol=1e-5)


def test_a_mix_of_domains(degrader: DeFlowDegrader) -> None:
    mix = {"night": 1.0, "day": 3.0}
    augment, batch = make(degrader, domain=mix), tensor(2, 3, 4, 8)
    result, params = augment(batch), augment._params
    expected = degrader.degrade(
        batch, params["temperature"], seed=params["seed"].tolist(), domain=mix
    )
    assert torch.allclose(result, expected, rtol=0, atol=1e-5)


def test_probabilities(degrader: DeFlowDegrader, seeded: None) -> None:
    batch = tensor(40, 3, 4, 4)
    assert make(degrader, p=0.0)(batch).equal(batch)
    augment = make(degrader, p=0.5)
    result = augment(batch)
    applied = augment._params["batch_prob"] > 0.5
    assert 8 < applied.sum() < 32
    changed = (result != batch).flatten(1).any(1)
    assert changed.equal(applied)
    assert (make(degrader)(batch) != batch).flatten(1).any(1).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_dtypes(degrader: DeFlowDegrader, dtype: torch.dtype) -> None:
    assert make(degrader)(tensor(1, 3, 4, 4).to(dtype)).dtype == dtype


@pytest.mark.parametrize("p", [0.5, 1.0])
@pytest.mark.parametrize("seed", [None, 1])
def test_a_draw_can_be_repeated(degrader: DeFlowDegrader, p: float, seed: int | None) -> None:
    augment = make(degrader, p=p, seed=seed)
    batch = tensor(6, 3, 4, 8)
    result = augment(batch)
    params = copy.deepcopy(augment._params)
    other = augment(batch)
    assert not other.equal(result)
    assert augment(batch, params=params).equal(result)
    assert make(degrader, p=p)(batch, params=params).equal(result)


@pytest.mark.parametrize("seed", [None, 1])
def test_same_on_batch(degrader: DeFlowDegrader, seed: int | None) -> None:
    batch = tensor(1, 3, 8, 8).expand(4, -1, -1, -1).contiguous()
    same = make(degrader, same_on_batch=True, seed=seed)
    result = same(batch)
    assert torch.allclose(result, result[:1].expand_as(result), rtol=0, atol=1e-5)
    assert len(set(same._params["seed"].tolist())) == 1
    different = make(degrader, seed=seed)
    assert (different(batch)[0] - different(batch)[1]).abs().max() > 1e-3
    assert len(set(different._params["seed"].tolist())) == 4
    assert len(set(different._params["temperature"].tolist())) == 4


def test_torch_seeds_fix_the_result(degrader: DeFlowDegrader, seeded: None) -> None:
    """As of every augmentation of Kornia; a seed of its own makes it independent."""
    batch = tensor(2, 3, 5, 5)
    first, second = make(degrader), make(degrader)
    torch.manual_seed(42)
    by_hand = second(first(batch))
    torch.manual_seed(42)
    sequence = K.AugmentationSequential(first, second)
    assert torch.allclose(sequence(batch), by_hand, rtol=0, atol=1e-5)
    assert sequence.transform_matrix.equal(torch.eye(3).expand(2, 3, 3))

    before = torch.get_rng_state()
    own = make(degrader, seed=1)
    sequence_of_draws = [own(batch), own(batch)]
    assert torch.get_rng_state().equal(before)
    assert not sequence_of_draws[0].equal(sequence_of_draws[1])
    assert make(degrader, seed=1)(batch).equal(sequence_of_draws[0])


def test_masks_and_boxes_pass(degrader: DeFlowDegrader) -> None:
    batch, mask = tensor(2, 3, 8, 8), (tensor(2, 1, 8, 8) > 0.5).float()
    boxes = torch.tensor([[[1.0, 1.0, 6.0, 6.0]]]).expand(2, -1, -1).contiguous()
    augment = K.AugmentationSequential(
        K.RandomHorizontalFlip(p=0.0), make(degrader), data_keys=["input", "mask", "bbox_xyxy"]
    )
    images, masks, after = augment(batch, mask, boxes)
    assert not images.equal(batch)
    assert masks.equal(mask)
    assert after.equal(boxes)
    again, _, _ = augment(batch, mask, boxes, params=augment._params)
    assert again.equal(images)


@pytest.mark.parametrize("same_on_batch", [False, True])
@pytest.mark.parametrize("same_on_frame", [False, True])
def test_videos(degrader: DeFlowDegrader, same_on_frame: bool, same_on_batch: bool) -> None:
    clip = tensor(1, 1, 3, 8, 8).expand(2, 3, -1, -1, -1).contiguous()
    augment = K.VideoSequential(
        make(degrader, same_on_batch=same_on_batch),
        data_format="BTCHW",
        same_on_frame=same_on_frame,
    )
    result = augment(clip)
    assert result.shape == clip.shape
    # To Kornia, frames that are drawn one by one are a batch as well.
    frames_are_equal = torch.allclose(result[:, 0], result[:, 1], rtol=0, atol=1e-5)
    assert frames_are_equal == (same_on_frame or same_on_batch)
    assert torch.allclose(result[0], result[1], rtol=0, atol=1e-5) == same_on_batch


def test_it_survives_copying_and_pickling(degrader: DeFlowDegrader) -> None:
    augment = make(degrader, seed=1)
    batch = tensor(2, 3, 4, 4)
    copies = [copy.deepcopy(augment), pickle.loads(pickle.dumps(augment))]
    expected = augment(batch)
    for one in copies:
        assert one(batch).equal(expected)
    assert not augment.state_dict()


def test_an_empty_batch_stays_one(degrader: DeFlowDegrader) -> None:
    for settings in ({}, {"p": 0.5}, {"same_on_batch": True}, {"seed": 1}):
        assert make(degrader, **settings)(torch.zeros(0, 3, 4, 4)).shape == (0, 3, 4, 4)


def test_no_gradient_flows(degrader: DeFlowDegrader) -> None:
    assert not make(degrader)(tensor(1, 3, 4, 4).requires_grad_()).requires_grad


def test_it_says_what_it_is(degrader: DeFlowDegrader) -> None:
    text = repr(make(degrader, temperature=(0.1, 0.2)))
    for part in ("RandomDeFlow(", "temperature=(0.1, 0.2)", "domain='random'", "p=1.0"):
        assert part in text


def test_what_is_refused(degrader: DeFlowDegrader) -> None:
    with pytest.raises(ValueError, match=r"lie in \[0, 1\]"):
        make(degrader)(tensor(1, 3, 4, 4) * 255)
    with pytest.raises(ValueError, match="temperature must be at least 0"):
        make(degrader, temperature=-1)
    with pytest.raises(ValueError, match="domain must be one of"):
        make(degrader, domain=None)
    augment = make(degrader)
    params = augment.forward_parameters((2, 3, 4, 4))
    with pytest.raises(ValueError, match="a batch of 3 images needs as many draws"):
        augment(tensor(3, 3, 4, 4), params=params)


def test_numpy_and_python_generators_are_not_touched(degrader: DeFlowDegrader) -> None:
    before = np.random.get_state()[1].tolist()  # noqa: NPY002
    make(degrader)(tensor(1, 3, 4, 4))
    assert np.random.get_state()[1].tolist() == before  # noqa: NPY002
