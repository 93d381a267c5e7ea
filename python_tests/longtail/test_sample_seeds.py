"""Random numbers of the images of a batch: one seed each, independent of the batch."""

from __future__ import annotations

import itertools
import warnings

import numpy as np
import pytest
import torch
from scipy import stats

from fastsam.longtail.data import Draw
from fastsam.longtail.data.batch import occurrences
from fastsam.longtail.seeds import SampleSeeds, Stream, global_seed


def test_numbers_are_those_of_splitmix64() -> None:
    """The values are the first outputs of the published C code for the seeds 0 and 1234567."""
    found = SampleSeeds(np.array([0, 1234567], np.uint64)).bits(5).tolist()
    assert found[0][:3] == [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]
    assert found[1] == [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]


def test_numbers_do_not_depend_on_the_batch() -> None:
    order = [np.arange(7), np.array([30, 14]), np.array([], np.int64), np.array([9])]
    together = Draw(3, 2).seeds(order)
    assert [len(seeds) for seeds in together] == [7, 2, 0, 1]
    for indices, seeds in zip(order, together, strict=True):
        for row, index in enumerate(indices.tolist()):
            (alone,) = Draw(3, 2).seeds([np.array([index])])
            for numbers in (SampleSeeds.uniform, SampleSeeds.bits):
                assert (numbers(alone, 4)[0] == numbers(seeds, 4)[row]).all()
                assert (numbers(alone.spawn(2), 9)[0] == numbers(seeds.spawn(2), 9)[row]).all()
    assert Draw(3, 2).seeds([]) == []


def test_seed_epoch_view_image_and_occurrence_give_other_numbers() -> None:
    (twice,) = Draw(0, 1).seeds([np.array([5, 6, 5])])
    others = [
        *twice.keys.tolist(),
        *(
            int(draw.seeds([np.array([5])])[0].keys[0])
            for draw in (Draw(1, 1), Draw(0, 2), Draw(0, 1, 1), Draw(0, 1, 2), Draw(2**40, 1))
        ),
    ]
    assert len(set(others)) == len(others)
    (known,) = Draw(0, 1, occurrences=[np.array([1, 0])]).seeds([np.array([5, 5])])
    assert known.keys.tolist() == twice.keys[[2, 0]].tolist()


def test_numbers_are_uniform_and_independent() -> None:
    count = 20_000
    keys = SampleSeeds.derived(
        0, Stream.AUGMENT, 1, samples=np.stack([np.arange(count), np.zeros(count, np.int64)], 1)
    )
    assert len(set(keys.keys.tolist())) == count
    columns = [*keys.uniform(4).T, *keys.spawn(0).uniform(3).T, *keys.spawn(1).uniform(3).T]
    for column in columns:
        assert column.min() >= 0
        assert column.max() < 1
        assert stats.kstest(column, "uniform").pvalue > 1e-4
    # Images that follow each other, numbers of one image, and parts.
    pairs = [*itertools.combinations(columns, 2), *((c[1:], c[:-1]) for c in columns)]
    for one, other in pairs:
        table, *_ = np.histogram2d(one, other, bins=8, range=[[0, 1], [0, 1]])
        assert stats.chisquare(table.ravel()).pvalue > 1e-6


def test_no_warning_about_overflow() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        (seeds,) = Draw(0, 1).seeds([np.array([2**62])])
        assert seeds.spawn(3).uniform(1).shape == (1, 1)
        assert len(seeds.take(0)) == len(seeds.take(slice(0, 1))) == 1


@pytest.mark.parametrize("size", [0, 1, 2, 50])
def test_occurrences_are_counted(size: int) -> None:
    indices = np.random.default_rng(size).integers(0, 7, size)
    expected = [(indices[:place] == value).sum() for place, value in enumerate(indices)]
    assert occurrences(indices).tolist() == expected


def test_the_global_generator_is_seeded_and_restored() -> None:
    state = torch.random.get_rng_state()
    with global_seed(11):
        inside = torch.rand(3)
    assert torch.equal(inside, torch.rand(3, generator=torch.Generator().manual_seed(11)))
    with pytest.raises(ZeroDivisionError), global_seed(12):
        raise ZeroDivisionError
    assert torch.equal(state, torch.random.get_rng_state())
