"""Both architectures against loops written from the equations (tests/models/reference.py), in fp64."""

import pytest
import torch
import torch.nn.functional as F

from tests.models.reference import gpt2_logits, vanilla_logits
from tests.models.tiny import VARIANT_NAMES, VARIANTS, build, tokens_of

LENGTH = 7  # the reference takes the square of it; a window of 5 must still be shorter than a document
DOCUMENTS = [[0, 0, 0, 1, 1, 2, 2], [5, 6, 6, 6, 6, 6, 6]]


def reference_logits(type_, model, tokens, docs):
    p = {name: q.detach().clone().requires_grad_() for name, q in model.named_parameters()}
    rows = []
    for row, doc in zip(tokens.tolist(), docs, strict=True):
        if type_ == "gpt2":
            rows.append(gpt2_logits(p, row, doc, model.cfg.n_layers, model.cfg.n_heads))
        else:
            rows.append(vanilla_logits(p, row, doc, model.cfg))
    return p, torch.stack(rows)[..., : model.vocab_size]


@pytest.mark.parametrize("packed", [False, True], ids=["one-document", "packed"])
@pytest.mark.parametrize(("type_", "fields"), VARIANTS, ids=VARIANT_NAMES)
def test_logits_and_every_gradient(type_, fields, packed):
    model, tokens = build(type_, **fields), tokens_of(length=LENGTH)
    docs = DOCUMENTS if packed else [[0] * LENGTH] * 2
    doc_ids = torch.tensor(docs, dtype=torch.int32) if packed else None
    logits = model.logits(model(tokens, doc_ids=doc_ids))
    p, expected = reference_logits(type_, model, tokens, docs)
    assert logits.shape == (2, LENGTH, 11)
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-9)

    targets = tokens_of(length=LENGTH, seed=2).flatten()
    for value in (logits, expected):
        F.cross_entropy(value.flatten(0, 1), targets).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad.abs().max() > 0, f"{name} has no part in the loss"
        torch.testing.assert_close(parameter.grad, p[name].grad, rtol=0, atol=1e-7, msg=name)


def test_the_tied_matrix_gets_the_gradients_of_look_up_and_head():
    model, tokens = build("gpt2"), tokens_of()
    hidden = model(tokens)
    head = model.head_weight.detach().clone().requires_grad_()
    loss = (hidden @ head.T)[..., : model.vocab_size].logsumexp(-1).sum()
    look_up, from_head = torch.autograd.grad(loss, (model.wte.weight, head), retain_graph=True)
    (both,) = torch.autograd.grad(model.logits(hidden).logsumexp(-1).sum(), model.wte.weight)
    assert look_up.abs().max() > 1e-3 and from_head.abs().max() > 1e-3
    torch.testing.assert_close(both, look_up + from_head, rtol=0, atol=1e-12)
