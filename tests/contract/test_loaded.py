"""What `load` shows of a trained model is what the commands compute of it."""

import json

import numpy as np
import pytest
import torch

from adapters.base import ModelAdapter
from models import ARCHITECTURES
from trainer.loaded import load
from trainer.run.checkpoint import load_tensors

LONG = "Weißes Rauschen, 0123 01. " * 4  # several windows
SHORT = "0123 größer"  # one


@pytest.fixture(scope="module")
def loaded(whole_run):
    return load(whole_run[0], device="cpu")


@pytest.fixture(scope="module")
def readable(loaded):
    """One whose network can read clean text, as those of the table can."""
    try:
        loaded.hidden("")
    except ValueError as reason:
        (pytest.fail if loaded.config.type in ARCHITECTURES else pytest.skip)(str(reason))
    return loaded


def test_a_text_scores_as_a_file_with_it_does(loaded, whole_run, command, tmp_path):
    (tmp_path / "text.txt").write_text(LONG, encoding="utf-8")
    words = ["--checkpoint", whole_run[0], "--device", "cpu", "--input_file", tmp_path / "text.txt"]
    out, _ = command("eval", *words)
    found, printed = loaded.score(LONG), json.loads(out)["score"]
    of_both = {name: printed["estimates"][name] for name in found.score.estimates}
    assert {**printed, "estimates": of_both} == found.score.as_dict(), "the command asks for further ones"
    assert found.total == pytest.approx(found.bits_per_byte * np.log(2) * len(LONG.encode()), rel=1e-12)
    assert b"".join(found.text[a:b] for a, b in found.spans) == LONG.encode()
    assert loaded.tokenizer.decode(found.ids) == LONG.encode()
    assert found.seed == loaded.config.seed and (found.kind == "bound" or found.standard_error == 0)
    assert found.nats is None or found.kind == "exact"
    if found.nats is not None:
        assert found.nats.shape == found.ids.shape
        assert found.nats.sum() == pytest.approx(found.total, rel=1e-12)
    assert loaded.score(LONG.encode()).total == found.total, "bytes are the same text, and noise is the same"


def test_hidden_states_and_logits_have_a_row_for_each_token(readable):
    ids, hidden, logits = readable.ids(SHORT), readable.hidden(SHORT), readable.logits(SHORT)
    assert ids[0] == readable.tokenizer.eot and readable.tokenizer.decode(ids[1:].numpy()) == SHORT.encode()
    assert len(hidden) == len(logits) == len(ids) and logits.shape[1] >= readable.tokenizer.vocab_size
    assert {t.dtype for t in (hidden, logits)} == {torch.float32} and not hidden.requires_grad
    torch.testing.assert_close(readable.adapter.logits(hidden), logits, rtol=1e-5, atol=1e-5)
    assert hidden.std() > 0 and torch.equal(hidden, readable.hidden(SHORT.encode()))


def test_logits_are_what_the_score_is_made_of(readable):
    score, ids = readable.score(SHORT), readable.ids(SHORT)
    if score.nats is None:
        pytest.skip("its score has no parts by token")
    log_p = readable.logits(SHORT).double().log_softmax(1)
    nats = -log_p[:-1].gather(1, ids[1:, None]).squeeze(1)  # (L,)
    np.testing.assert_allclose(nats.numpy(), score.nats, rtol=1e-5, atol=1e-5)


def test_a_row_knows_its_token_and_of_next_token_models_none_behind_it(readable):
    before, after = readable.hidden(SHORT), readable.hidden(SHORT[:-1] + "?")
    assert not torch.allclose(before[-1], after[-1])
    if readable.score(SHORT).kind == "exact":
        torch.testing.assert_close(before[:-1], after[:-1], rtol=1e-5, atol=1e-5)


def hooks(model):
    """How many each module has, none by itself but where a memory reads what others compute."""
    return [len(module._forward_hooks) for module in model.modules()]


def test_a_block_shows_its_states_or_says_why_it_has_none(readable):
    blocks, before = readable.adapter.blocks(), hooks(readable.model)
    for layer, path in enumerate(blocks):
        try:
            states = readable.hidden(SHORT, layer)
        except ValueError as error:
            assert str(error).startswith((f"layer: block {path} gives", f"layer: block {path} did not run"))
            continue
        assert len(states) == len(readable.ids(SHORT))
        assert torch.equal(states, readable.hidden(SHORT, layer - len(blocks)))
    assert hooks(readable.model) == before


def test_it_writes_what_the_command_prints(loaded, whole_run, command):
    words = ["--checkpoint", whole_run[0], "--device", "cpu", "--max_new_tokens", 6, "--seed", 3]
    out, _ = command("generate", *words, "--prompt", "01", "--num_samples", 2)
    options = {"max_new_tokens": 6, "seed": 3}
    texts = loaded.generate(["01", "01"], **options)
    assert out == "".join(f"01{text}\n" for text in texts if text)
    assert loaded.generate("01", **options) == texts[:1]


def test_the_weights_are_those_that_were_asked_for(loaded, whole_run):
    checkpoint = whole_run[0] / "checkpoint-4"
    raw, average = load_tensors(checkpoint, "model.pt"), load_tensors(checkpoint, "ema.pt")["shadow"]
    own = load(whole_run[0], weights="raw", device="cpu")
    assert (loaded.weights, own.weights) == ("ema", "raw") and loaded.path == own.path == checkpoint
    name = max(average, key=lambda n: float((average[n] - raw[n]).abs().max()))
    averaged, plain = (dict(m.adapter.named_model_parameters())[name] for m in (loaded, own))
    assert torch.equal(plain, raw[name]) and not torch.equal(raw[name], average[name])
    # Not to the bit: an average of points of a set is put back onto it.
    assert (averaged - average[name]).norm() < 0.1 * (averaged - raw[name]).norm()


@pytest.mark.parametrize(
    "text", ["", "0", "0123 gr\N{LATIN SMALL LETTER O WITH DIAERESIS}\0\N{BUTTERFLY}\n01 <b>&"]
)
def test_what_is_drawn_of_a_text_fits_it_and_is_the_same_each_time(loaded, text):
    before = hooks(loaded.model)
    found, again = loaded.annotate(text), loaded.annotate(text.encode())  # which check that it fits
    assert found.spans == again.spans
    for of, other in zip(found.maps, again.maps, strict=True):
        assert of.name == other.name and of.labels == other.labels and torch.equal(of.values, other.values)
        assert not of.values.requires_grad
    names = [one.name for one in (*found.spans, *found.maps)]
    assert len(set(names)) == len(names), "people are to tell them apart"
    if type(loaded.adapter).annotate is ModelAdapter.annotate:
        assert not found
    assert hooks(loaded.model) == before


def test_looking_changes_nothing(readable):
    part = readable.model.get_submodule(readable.adapter.blocks()[0]).train()
    generators = torch.get_rng_state(), np.random.get_state()[1]
    (
        readable.score(SHORT),
        readable.hidden(SHORT),
        readable.generate("0", max_new_tokens=2),
        readable.annotate(SHORT),
    )
    assert part.training and not readable.model.training and torch.is_grad_enabled()
    assert torch.equal(generators[0], torch.get_rng_state())
    assert np.array_equal(generators[1], np.random.get_state()[1])
    part.eval()
