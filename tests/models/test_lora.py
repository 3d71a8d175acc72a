"""Low-rank adapters by themselves: the product, which matrices, what is refused, merging."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from models.layers.experts import Experts
from models.layers.lora import LOW_RANK, LowRank, adapt, merge_all, scaled_linear, targets_of
from models.layers.roles import Rule

RULES = [
    Rule(LOW_RANK, "adapter"),
    Rule(r"table\.weight", "embedding"),
    Rule(r"head\.weight", "head"),
    Rule(r".*gate\.weight", "router"),
    Rule(r".*", "matrix"),
]


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.q_proj, self.xq_proj = nn.Linear(6, 4), nn.Linear(6, 5, bias=False)


class Toy(nn.Module):
    def __init__(self, tied=False):
        super().__init__()
        self.table = nn.Embedding(9, 6)
        self.attn, self.gate = Attention(), nn.Linear(6, 2, bias=False)
        self.experts = Experts(6, 3, 8, gated=True)
        self.head = nn.Linear(6, 9, bias=False)
        if tied:
            self.head.weight = self.table.weight


def toy(targets=("q_proj",), low_rank=None, dtype=torch.float64, b=True):
    generator = torch.Generator().manual_seed(0)
    model = Toy().to(dtype)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator))
    adapt(model, targets_of(model, targets, RULES), low_rank or LowRank(2, 6.0), generator)
    if b:
        with torch.no_grad():
            for name, p in model.named_parameters():
                if "lora_B" in name:
                    p.copy_(torch.randn(p.shape, generator=generator))
    return model


def paths(model, wanted):
    return [target.path for target in targets_of(model, wanted, RULES)]


def test_the_product_is_that_of_the_paper():
    model, x = toy(), torch.randn(3, 6, dtype=torch.float64)
    q = model.attn.q_proj
    state = model.state_dict()
    w, bias = state["attn.q_proj.weight"], state["attn.q_proj.bias"]
    a, b = state["attn.q_proj.lora_A"], state["attn.q_proj.lora_B"]
    expected = torch.stack([w @ v + bias + 6.0 / 2 * (b @ (a @ v)) for v in x])
    torch.testing.assert_close(q(x), expected)
    torch.testing.assert_close(F.linear(x, q.weight, q.bias), expected)
    factor = torch.tensor(0.3, dtype=torch.float64)
    wide = toy(("xq_proj",)).attn.xq_proj
    torch.testing.assert_close(scaled_linear(wide, x, factor), F.linear(x, factor * wide.weight))


def test_names_stay_and_only_adapters_are_trained():
    model = toy(b=False)
    assert set(model.state_dict()) - set(Toy().state_dict()) == {"attn.q_proj.lora_A", "attn.q_proj.lora_B"}
    assert type(model.attn.q_proj).__name__ == "Linear" and isinstance(model.attn.q_proj, nn.Linear)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {"attn.q_proj.lora_A", "attn.q_proj.lora_B"}
    a = model.attn.q_proj.lora_A
    assert a.shape == (2, 6) and 0 < a.abs().max() <= 6**-0.5 and not model.attn.q_proj.lora_B.any()


def test_blocks_that_are_alike_are_compiled_once():
    """Modules of one class stay modules of one class."""
    one, other = toy(("q_proj",)), toy(("q_proj", "xq_proj"))
    assert type(one.attn.q_proj) is type(other.attn.q_proj) is type(other.attn.xq_proj)


def test_a_stack_of_experts():
    model = toy(("experts.up_proj",))
    state, up = model.state_dict(), model.experts.up_proj
    a, b = state["experts.lora_A_up_proj"], state["experts.lora_B_up_proj"]
    assert a.shape == (3, 2, 6) and b.shape == (3, 8, 2)
    for e in range(3):
        torch.testing.assert_close(up[e], state["experts.up_proj"][e] + 3.0 * b[e] @ a[e])


def test_merging_adds_up_once_and_leaves_the_class():
    model = toy(("q_proj", "experts.down_proj"), dtype=torch.float32)
    q, down = model.attn.q_proj.weight.clone(), model.experts.down_proj.clone()
    merge_all(model)
    assert type(model.attn.q_proj) is nn.Linear and type(model.experts) is Experts
    assert set(model.state_dict()) == set(Toy().state_dict())
    torch.testing.assert_close(model.attn.q_proj.weight, q)
    torch.testing.assert_close(model.experts.down_proj, down)
    assert isinstance(model.attn.q_proj.weight, nn.Parameter) and model.attn.q_proj.weight.requires_grad
    merge_all(model)
    torch.testing.assert_close(model.attn.q_proj.weight, q)


def test_narrow_weights_are_added_up_wide():
    model = toy(dtype=torch.bfloat16)
    assert model.attn.q_proj.lora_A.dtype == torch.float32
    state = {name: value.clone() for name, value in model.state_dict().items()}
    merge_all(model)
    w, a, b = (state[f"attn.q_proj.{name}"].double() for name in ("weight", "lora_A", "lora_B"))
    exact = (w + 3.0 * b @ a).to(torch.bfloat16)
    assert (model.attn.q_proj.weight == exact).float().mean() > 0.9, "rounded once"


def test_dropout_is_of_what_is_read_and_off_in_evaluation():
    model, x = toy(low_rank=LowRank(2, 6.0, 0.5)), torch.ones(1000, 6, dtype=torch.float64)
    torch.manual_seed(0)
    q = model.attn.q_proj
    dropped = q(x) - F.linear(x, model.state_dict()["attn.q_proj.weight"], q.bias)
    kept = model.eval().attn.q_proj(x) - F.linear(x, model.state_dict()["attn.q_proj.weight"], q.bias)
    assert len(dropped.unique(dim=0)) > 20 and len(kept.unique(dim=0)) == 1
    torch.testing.assert_close(dropped.mean(0), kept[0], rtol=0.3, atol=0.3)


def test_a_matrix_that_is_multiplied_elsewhere_has_no_dropout():
    model = toy(low_rank=LowRank(2, 6.0, 0.5))
    with pytest.raises(ValueError, match=r"lora_dropout: 0.5 .* attn.q_proj .* Set lora_dropout=0"):
        _ = model.attn.q_proj.weight
    assert model.eval().attn.q_proj.weight.shape == (4, 6)


@pytest.mark.parametrize(
    ("wanted", "found"),
    [
        (["q_proj"], ["attn.q_proj"]),
        (["attn.xq_proj", "q_proj"], ["attn.q_proj", "attn.xq_proj"]),
        (r".*q_proj", ["attn.q_proj", "attn.xq_proj"]),
        ("all-linear", ["attn.q_proj", "attn.xq_proj"]),
        (["up_proj"], ["experts.up_proj"]),
        (["head"], ["head"]),
    ],
)
def test_targets(wanted, found):
    assert paths(Toy(), wanted) == found


@pytest.mark.parametrize(
    ("wanted", "told"),
    [
        (["qproj"], r"nothing is called 'qproj'.*q_proj.* There are: q_proj, xq_proj, gate"),
        (["table"], r"table is no linear layer but Embedding. There are"),
        (["gate"], r"gate decides where tokens go"),
        ("q_proj", r"'q_proj' matches no path"),
        ("(", r"'\(' is no regular expression"),
    ],
)
def test_what_cannot_be_adapted_is_refused_by_name(wanted, told):
    with pytest.raises(ValueError, match=f"lora_targets: {told}"):
        targets_of(Toy(), wanted, RULES)


def test_one_matrix_of_two_modules_is_refused():
    with pytest.raises(ValueError, match=r"lora_targets: head is one matrix with table.weight.* Untie"):
        targets_of(Toy(tied=True), ["head"], RULES)


def test_a_rank_beyond_the_matrix_is_refused():
    with pytest.raises(
        ValueError, match=r"lora_rank: 5 exceeds the smaller side of attn.q_proj \(4 x 6\); nearest 4"
    ):
        toy(low_rank=LowRank(5, 1.0))
