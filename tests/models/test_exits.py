"""When tokens leave a recurrence: the criteria, on laws and states by hand."""

import math

import pytest
import torch

from models.layers.exits import CRITERIA

UNIFORM = [0.25] * 4


def watched(name, start, threshold=None):
    criterion = CRITERIA[name]
    return criterion.watch(start, criterion.threshold if threshold is None else threshold)


def logits(*laws):
    """Of laws (V,), with a constant that must not matter."""
    return [torch.tensor([law]).double().log() + 7 for law in laws]


def when(name, start, seen, threshold):
    """The recurrence, from 1, that a single token leaves behind, or None."""
    watch = watched(name, start, threshold)
    return next((i for i, now in enumerate(seen, 1) if bool(watch.settled(now))), None)


def kl(p, q):
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))


NEAR = [0.25, 0.25, 0.3, 0.2]
FAR = [0.7, 0.1, 0.1, 0.1]


def test_kl_is_of_the_law_before_against_the_new_one_and_the_first_against_a_uniform_one():
    start, sure = torch.zeros(1, 4).double(), [0.97, 0.01, 0.01, 0.01]
    first, second = kl(UNIFORM, sure), kl(sure, NEAR)
    assert first > kl(sure, UNIFORM) * 1.5 and second < kl(NEAR, sure) / 1.5, "the order can be seen"
    assert when("kl", start, logits(sure, NEAR), first * 1.0001) == 1
    assert when("kl", start, logits(sure, NEAR), second * 1.0001) == 2
    assert when("kl", start, logits(sure, NEAR), second * 0.9999) is None
    assert when("kl", start, logits(sure, sure, NEAR), 1e-9) == 2


def test_difference_of_entropies():
    def entropy(law):
        return -sum(p * math.log(p) for p in law)

    start, change = torch.zeros(1, 4).double(), abs(entropy(FAR) - entropy(NEAR))
    assert when("entropy-diff", start, logits(FAR, NEAR), change * 0.9999) is None
    assert when("entropy-diff", start, logits(FAR, NEAR), change * 1.0001) == 2
    assert when("entropy-diff", start, logits(FAR, FAR[::-1]), 1e-9) == 2, "another law, as uncertain"
    assert when("entropy-diff", start, logits(UNIFORM), 1e-9) == 1


def test_distance_is_relative_to_the_new_state():
    start, then = torch.tensor([[3.0, 4.0]]), torch.tensor([[6.0, 8.0]])
    assert when("latent-diff", start, [then], 0.51) == 1
    assert when("latent-diff", start, [then], 0.49) is None
    assert when("latent-diff", then, [start], 0.99) is None


def test_angle_does_not_depend_on_lengths():
    start, turned = torch.tensor([[1.0, 0.0]]), torch.tensor([[1.0, 1.0]])
    change = 1 - math.sqrt(0.5)
    assert when("cosine", start, [5 * start], 1e-6) == 1
    assert when("cosine", start, [turned], change * 1.001) == 1
    assert when("cosine", start, [turned], change * 0.999) is None


def test_the_likeliest_token_must_be_the_same_so_often_in_a_row():
    one, other = logits(FAR, FAR[::-1])
    start = torch.zeros(1, 4).double()
    assert when("argmax-stability", start, [one] * 6, None) == 5
    assert when("argmax-stability", start, [one, one, other, other, other], 3) == 5
    assert when("argmax-stability", start, [one, other] * 4, 2) is None
    zero = torch.tensor([[1.0, 0.0]])  # token 0 is no better than others at first
    assert when("argmax-stability", torch.zeros(1, 2), [zero] * 2, 2) == 2


def test_unlikely_tokens_are_all_alike_to_minp_kl():
    """Those that are less than a tenth as likely as the likeliest: 1 / V each, and all made to sum to 1."""
    one, other = [0.9, 0.06, 0.03, 0.01], [0.9, 0.01, 0.02, 0.07]  # 0.09 is a tenth
    filtered = [0.9 / 1.65] + [0.25 / 1.65] * 3
    start = torch.zeros(1, 4).double()
    assert when("minp-kl", start, logits(one, other), 1e-9) == 2
    assert when("kl", start, logits(one, other), 1e-9) is None
    assert when("minp-kl", start, logits(one), kl(UNIFORM, filtered) * 1.0001) == 1
    assert when("minp-kl", start, logits(one), kl(UNIFORM, filtered) * 0.9999) is None


@pytest.mark.parametrize("name", sorted(CRITERIA))
def test_tokens_leave_one_by_one_and_others_do_not_matter(name):
    source = torch.Generator().manual_seed(0)
    start = (
        torch.zeros(3, 2, 5).double() if CRITERIA[name].of_laws else torch.randn(3, 2, 5, generator=source)
    )
    seen = [torch.randn(3, 2, 5, generator=source).to(start.dtype) for _ in range(3)]
    seen[2][1, 1] = seen[1][1, 1]  # this token has come to rest
    watch, fewer = watched(name, start, 2 if name == "argmax-stability" else None), torch.tensor([2, 1])
    if name == "argmax-stability":
        for i, now in enumerate(seen):
            now[..., i] += 9  # every other one finds another token likeliest
        seen[2][1, 1] = seen[1][1, 1]
    for now in seen[:2]:
        assert not watch.settled(now).any()
    watch.select(fewer)
    assert watch.settled(seen[2][fewer]).tolist() == [[False, False], [False, True]]


@pytest.mark.parametrize("name", sorted(set(CRITERIA) - {"argmax-stability"}))
def test_nothing_is_below_a_threshold_of_zero(name):
    start = torch.zeros(1, 4).double() if CRITERIA[name].of_laws else torch.ones(1, 4).double()
    assert when(name, start, [start + 1, start + 1, start + 1], 0.0) is None


def test_published_thresholds():
    assert {name: criterion.threshold for name, criterion in CRITERIA.items()} == {
        "kl": 1e-3,
        "latent-diff": 0.03,
        "entropy-diff": 1e-3,
        "cosine": 1e-3,
        "argmax-stability": 5,
        "minp-kl": 1e-5,
    }


@pytest.mark.parametrize("name", ["kl", "minp-kl", "entropy-diff", "latent-diff"])
def test_changes_are_measured_in_fp32_at_least(name):
    """A law in bf16 has two or three digits: changes of 1e-5 are made of others."""
    criterion = CRITERIA[name]
    watch = criterion.watch(torch.ones(1, 4, dtype=torch.bfloat16), criterion.threshold)
    watch.settled(torch.tensor([[1.0, 2.0, 3.0, 4.0]], dtype=torch.bfloat16))
    assert watch.before.dtype == torch.float32
