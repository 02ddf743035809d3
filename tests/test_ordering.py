"""Batches of like length: nothing lost, nothing moved far, less padding."""

from random import Random

import pytest

from idavlm.data import batches_of_like_length

LENGTHS = Random(1).choices(range(1, 50), k=1000)


def padding(order, batch_size):
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    return sum(max(LENGTHS[n] for n in batch) - LENGTHS[n] for batch in batches for n in batch)


@pytest.mark.parametrize("count", [0, 5, 128, 130, 1000])
def test_every_sample_once_and_within_its_window(count):
    order = Random(2).sample(range(1000), count)
    arranged = batches_of_like_length(order, LENGTHS, 16, Random(3), window=4)
    for start in range(0, count, 64):
        assert sorted(arranged[start : start + 64]) == sorted(order[start : start + 64])


def test_less_padding():
    order = Random(2).sample(range(1000), 1000)
    arranged = batches_of_like_length(order, LENGTHS, 16, Random(3))
    assert padding(arranged, 16) < padding(order, 16) / 4


def test_batches_are_shuffled_and_the_same_every_time():
    order = list(range(128))
    arranged = batches_of_like_length(order, LENGTHS, 16, Random(3))
    assert arranged == batches_of_like_length(order, LENGTHS, 16, Random(3))
    longest = [max(LENGTHS[n] for n in arranged[start : start + 16]) for start in range(0, 128, 16)]
    assert longest not in (sorted(longest), sorted(longest, reverse=True))


def test_impossible_sizes():
    with pytest.raises(ValueError, match="batch_size=0"):
        batches_of_like_length([1], LENGTHS, 0, Random(0))
