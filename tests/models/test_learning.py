"""Each model of next tokens learns text of known entropy as far as it can be learned, and no further."""

import math
import random

import pytest
import torch

import mytrainer
from adapters.default import DefaultModelAdapter
from data import load_dataset
from models import ARCHITECTURES
from naming import load
from tests.contract.tiny import config
from tests.trainer.test_evaluate import chain
from trainer.distributed import World
from trainer.evaluate import evaluate
from trainer.loop import train
from trainer.run.restore import restore

DEEPSEEK = "model_cfg.gate_type=deepseek_v3"
DUAL = ["mamba", "model_cfg.version=2", "model_cfg.headdim=32", "model_cfg.d_state=32"]
NEXT_TOKEN = [  # whose sizes and tokens are not those of weights that were trained elsewhere
    name
    for name, row in ARCHITECTURES.items()
    if issubclass(load(row.adapter), DefaultModelAdapter) and not load(row.model).Config.elsewhere
]
WIDTH = 64
RUN = [  # of 32 symbols, order 1; the recipe is each architecture's own
    "synthetic_bytes=800000",
    f"train_seq_len={WIDTH}",
    "global_batch_size=32",
    "batch_size=32",
    "num_iterations=300",
    "val_loss_every=0",
    "val_bytes=20000",
    "sample_tokens=0",
]
SIZES = {"n_ctx": WIDTH, "d_model": WIDTH, "n_heads": 2}


def nats_by_row(adapter, rows):
    """(R,) over the held-out text."""
    found = []
    evaluate(
        adapter,
        rows,
        World(torch.device("cpu")),
        batch_rows=64,
        seed=0,
        hear=lambda batch, likelihood: found.append(likelihood.nats[torch.from_numpy(batch.rows >= 0)]),
    )
    return torch.cat(found).numpy()


@pytest.mark.slow
@pytest.mark.parametrize(
    "words", [*([name] for name in NEXT_TOKEN), ["moe", DEEPSEEK, "model_cfg.top_k=2"], DUAL], ids=" ".join
)
def test_the_score_reaches_that_of_the_source_itself_and_not_less(words, tmp_path):
    type_, *fields = words
    known = type(config(type_)[1]).model_fields
    sizes = [f"model_cfg.{name}={size}" for name, size in SIZES.items() if name in known]
    cfg, model_cfg = config(type_, *RUN, *sizes, *fields)
    train(cfg, model_cfg, tmp_path)
    trained, dataset = restore(tmp_path, device="cpu"), load_dataset(cfg)
    rows = trained.rows(dataset.heldout, cfg.val_bytes)
    mine, true = nats_by_row(trained.adapter, rows), nats_by_row(chain(dataset), rows)
    error = (mine - true).std(ddof=1) * math.sqrt(len(mine))  # of the sum over rows
    print(f"{words}: {mine.sum() / true.sum():.4f} of the source's own score, +- {error / true.sum():.4f}")
    assert true.sum() > 10 * error, "the text is long enough to tell"
    assert mine.sum() > true.sum() - 3 * error
    assert mine.sum() < 1.05 * true.sum()


@pytest.mark.slow
def test_chunks_come_to_be_as_long_as_they_are_aimed_to_be_and_tell_of_the_text(tmp_path):
    """Words of six letters, the space included, of which the first says all: half a bit for each byte. At first every
    other byte or so opens a chunk."""
    source, words = random.Random(0), ["alpha", "bravo", "carol", "delta", "ember", "frost", "grape", "hotel"]
    text = " ".join(source.choice(words) for _ in range(40_000))
    (tmp_path / "text.txt").write_text(text)
    fields = [
        "data=text",
        f"input_file={tmp_path / 'text.txt'}",
        "near_copies=keep",
        "model_cfg.target_ratio=6.0",
    ]
    fields += [*RUN[1:], f"model_cfg.n_ctx={WIDTH}", "num_iterations=200"]
    train(*config("hnet", *fields), tmp_path / "run")
    model = mytrainer.load(tmp_path / "run", device="cpu")
    held_out = text[-3000:]
    scored = model.score(held_out)
    assert 0.49 < scored.bits_per_byte < 0.6
    (chunks,) = model.annotate(held_out).spans
    opened = [span.start for span in chunks.spans]
    assert len(opened) == pytest.approx(len(held_out) / 6, rel=0.4)
    with torch.no_grad():
        model.model.backbone.main_network.main_network.rmsnorm.weight.zero_()
    assert model.score(held_out).bits_per_byte > scored.bits_per_byte + 0.02, "the chunks were of no use"
