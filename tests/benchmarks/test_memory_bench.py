"""What is learned beside a decoder that stays as it is lies in the bank."""

import pytest

from benchmarks.memory_bench import PAIRS, learned

STEPS = 300


@pytest.mark.slow
@pytest.mark.parametrize("fields", [{}, {"quantize_memory": True}], ids=str)
def test_a_table_is_learned_and_lies_in_the_bank(fields):
    found = learned(STEPS, **fields)
    assert found["without"] <= 3 / PAIRS and found["emptied"] <= 3 / PAIRS
    assert found["right"][STEPS] >= 0.9
