"""What is drawn of a text whose chunks select blocks of chunks, and what a hierarchy reports, of this one too."""

import pytest
import torch

from adapters.sparse import rankings
from tests.contract.tiny import adapter_of, batch_for, context, move_away_from_uniform


def test_the_picture_of_a_text_is_of_its_chunks_and_of_what_they_selected():
    """Of blocks of 2 chunks, 4 at most: a chunk's own is among them, and none behind it."""
    adapter = adapter_of("hnet_x_nsa", "model_cfg.n_inner_layers=2", dtype=torch.float64)
    text = "import os\nimport sys\nÄ = 1\n"
    move_away_from_uniform(adapter.eval(), std=0.1)
    with torch.no_grad(), rankings(adapter) as chosen:
        found = adapter.annotate(text)
    found.check(len(text.encode()))
    chunks = len(chosen[0])
    assert [one.name[:7] for one in found.spans] == ["stage 1"]
    # The first boundary in the text may stand on its first byte; what comes before is of the start token's chunk.
    assert len(found.spans[0].spans) in (chunks, chunks - 1) and 2 < chunks < len(text.encode())
    assert [one.name for one in found.maps] == [
        f"sparse layer {layer}, group {group}: selected blocks" for layer in range(2) for group in range(2)
    ]
    for number, drawn in enumerate(found.maps):
        starts = chosen[number // 2][1:, number % 2]
        assert drawn.values.shape == (chunks - 1, -(-chunks // 2))
        for chunk, (row, of) in enumerate(zip(drawn.values, starts.tolist(), strict=True), start=1):
            assert row.nonzero().flatten().tolist() == [start // 2 for start in of if start >= 0]
            assert row[chunk // 2] == 1 and not row[chunk // 2 + 1 :].any()
    assert not adapter.annotate("").maps


def test_the_ratio_loss_of_every_stage_is_added():
    adapter = adapter_of("hnet_x_nsa", "model_cfg.n_compress_decompress_layers=2", dtype=torch.float64)
    output = adapter(adapter.prepare(batch_for(adapter), context()))
    assert list(output.terms) == ["ce", "ratio"]
    assert {"ratio_loss_1", "ratio_loss_2", "bytes_per_chunk_2"} <= output.metrics.keys()
    output.terms["ratio"].sum.backward()
    moved = {name for name, p in adapter.named_model_parameters() if p.grad is not None and p.grad.any()}
    assert {name for name, _ in adapter.named_model_parameters() if "routing_module" in name} <= moved


def test_operations_are_those_of_the_chunks_that_there_were():
    adapter = adapter_of("hnet_x_nsa", dtype=torch.float64)
    move_away_from_uniform(adapter, std=0.1)
    prepared = adapter.prepare(batch_for(adapter), context())
    output, told = adapter(prepared), adapter.hidden(prepared).extra
    length, model = prepared.tensors["inputs"].shape[1], adapter.model
    each = [model.flops_of([length, float(n)], length).training_per_token for n in told["opened"][0]]
    torch.testing.assert_close(float(output.flops), length * sum(each))
    assert len(set(told["opened"][0].tolist())) > 1, "the check is blind"


@pytest.mark.parametrize("way", ["padded", "masked"])
def test_places_that_hold_nothing_are_not_drawn(way):
    """As packed ones are, which are as many as there are; `padded` is what compiled blocks take."""
    text, found = "import os\nimport sys\nÄ = 1\n", []
    for execution in ("packed", way):
        adapter = adapter_of("hnet_x_nsa", f"model_cfg.chunk_execution={execution}", dtype=torch.float64)
        move_away_from_uniform(adapter.eval(), std=0.1)
        with torch.no_grad():
            found.append(adapter.annotate(text))
    for packed, other in zip(*(one.maps for one in found), strict=True):
        assert torch.equal(packed.values, other.values) and len(packed.values) < len(text.encode())


def test_stages_of_bytes_select_blocks_of_bytes():
    words = ["nsa_stages=[0,main]", "stage_layout=T1"]
    adapter = adapter_of("hnet_x_nsa", *(f"model_cfg.{word}" for word in words), dtype=torch.float64)
    move_away_from_uniform(adapter.eval(), std=0.1)
    with torch.no_grad():
        maps = adapter.annotate("import os\nimport sys\n").maps[::2]  # of the first group
    assert [(one.rows, one.columns) for one in maps] == [
        ("byte", "block of 2 bytes"),
        ("chunk", "block of 2 chunks"),
        ("byte", "block of 2 bytes"),
    ]
    assert len(maps[0].values) == 21 > len(maps[1].values)


def pooled(stages, size, *more):
    words = (
        *more,
        "chunking=fixed",
        f"n_compress_decompress_layers={stages}",
        f"compression_decompress_size={size}",
    )
    adapter = adapter_of("hnet_x_nsa", *(f"model_cfg.{word}" for word in words), dtype=torch.float64)
    move_away_from_uniform(adapter.eval(), std=0.1)
    return adapter


def test_the_baseline_of_fixed_chunks_is_told_apart():
    """It learns by cross-entropy alone; the start token is the first place of the first chunk."""
    adapter = pooled(2, 9.0)
    prepared = adapter.prepare(batch_for(adapter, length=36), context())
    output = adapter(prepared)
    assert list(output.terms) == ["ce"] and any("H-Net (pool)" in note for note in adapter.notes)
    lengths = [
        float(output.metrics[f"bytes_per_chunk_{n}"].sum / output.metrics[f"bytes_per_chunk_{n}"].count)
        for n in (1, 2)
    ]
    assert lengths == [3, 9]
    assert float(output.flops) == pytest.approx(4 * 36 * adapter.flops(36).training_per_token)
    with torch.no_grad():
        of_bytes, of_chunks = adapter.annotate("abcdefghijklmno").spans
    assert [span.start for span in of_bytes.spans] == [0, 2, 5, 8, 11, 14]
    assert [span.start for span in of_chunks.spans] == [0, 8]


@pytest.mark.parametrize("way", ["packed", "padded"])
@pytest.mark.parametrize("length", [1, 2, 8])
def test_rows_too_short_for_a_chunk_of_the_baseline_train_all_the_same(length, way):
    """An empty place stands for their chunks, which is computed and is none of them; nothing of a stage within has a
    gradient."""
    adapter = pooled(2, 9.0, f"chunk_execution={way}")
    prepared = adapter.prepare(batch_for(adapter, length=length), context())
    output, told = adapter(prepared), adapter.hidden(prepared).extra
    assert told["places"].tolist() == [[length] * 4, [length // 3] * 4]
    assert told["opened"].tolist() == [[length // 3] * 4, [0] * 4]
    output.terms["ce"].sum.backward()
    gradients = {name: p.grad for name, p in adapter.named_model_parameters()}
    assert all(g is not None and g.isfinite().all() for g in gradients.values())
    main = [g for name, g in gradients.items() if name.startswith("backbone.main_network.main_network.")]
    assert main and not any(g.any() for g in main) and gradients["backbone.decoder.rmsnorm.weight"].any()
    plan = adapter.model.flops_of([length, max(1, length // 3), 1], length).training_per_token
    assert float(output.flops) == pytest.approx(4 * length * plan)
