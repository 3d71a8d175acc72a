"""Folders of transformers as a source of weights: what is read, and everything that is refused, by its message."""

import functools
import json
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from adapters import build_adapter
from configs import compose
from configs.grammar import word
from tests.huggingface_folder import TINY, VOCABULARY, edit_json, huggingface_folder, weights
from trainer.loaded import load
from trainer.run.huggingface import HuggingFaceFolder
from trainer.run.source import open_source


def opened(path):
    return open_source(path, warn=lambda text: None)


@functools.cache
def adapter_of(fields):
    """A model of these fields to be filled; composing and building it takes longer than the rest of a test."""
    cfg, model_cfg = compose(["model=gpt2", "preset=none"], notify=lambda text: None)
    model_cfg = model_cfg.model_copy(update={**TINY, "vocab_size": VOCABULARY, **dict(fields)})
    return build_adapter(cfg, model_cfg, SimpleNamespace(vocab_size=VOCABULARY, eot=0))


def state_of(path, **fields):
    """What a GPT-2 is filled with."""
    source = opened(path)
    adapter = adapter_of(tuple(fields.items()))
    source.fill(adapter)
    return adapter.model.to_hf_state_dict()


def refused(path, *words, **fields):
    with pytest.raises(ValueError) as caught:
        state_of(path, **fields)
    for part in words:
        assert part in str(caught.value)
    return str(caught.value)


@pytest.fixture
def gpt2(tmp_path):
    return huggingface_folder(tmp_path / "gpt2")


@pytest.fixture
def shards(tmp_path):
    return huggingface_folder(tmp_path / "shards", shards=3)


# -- what is read --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shards", [1, 2])
def test_weights_come_as_they_lie_there_in_fp32(tmp_path, shards, dtype):
    path = huggingface_folder(tmp_path / "x", shards=shards, dtype=dtype)
    for name, tensor in state_of(path).items():
        assert torch.equal(tensor, weights()[name].to(dtype).float()), name


@pytest.mark.parametrize(
    "fields",
    [
        {"n_kv_heads": 2, "ffn_hidden": 24, "norm_eps": 1e-6, "rope_theta": 500.0, "tie_embeddings": False},
        {"bias": True, "n_layers": 1},
    ],
)
def test_sizes_come_from_config_json(tmp_path, fields):
    path = huggingface_folder(tmp_path / "x", "vanilla", **fields)
    cfg, model_cfg = opened(path).config(lambda text: None)
    assert cfg.type == "vanilla" and (model_cfg.vocab_size, model_cfg.n_ctx, model_cfg.d_model) == (
        300,
        32,
        16,
    )
    assert {name: getattr(model_cfg, name) for name in fields} == fields
    assert cfg.train_seq_len == 32, "rows fit into the context"
    adapter = build_adapter(cfg, model_cfg, opened(path).tokenizer)
    opened(path).fill(adapter)
    theirs = weights("vanilla", **fields)
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in adapter.model.to_hf_state_dict().items())


def test_its_configuration_is_that_of_a_run_from_it(gpt2):
    cfg, model_cfg = compose([word("init_from_checkpoint", gpt2)], notify=lambda text: None)
    assert opened(gpt2).config(lambda text: None) == (cfg, model_cfg)


def test_rows_of_a_long_context_are_those_of_a_run(tmp_path):
    path = huggingface_folder(tmp_path / "x", "vanilla", n_ctx=131072)
    assert opened(path).config(lambda text: None)[0].train_seq_len == 1024


def test_the_kind_is_recognised_and_says_what_it_knows(gpt2):
    source = opened(gpt2)
    assert isinstance(source, HuggingFaceFolder)
    assert (source.type, source.weights, source.data, source.average()) == (
        "gpt2",
        "Hugging Face",
        None,
        None,
    )
    assert source.tokenizer.decode(source.tokenizer.encode("the cat\n")) == b"the cat\n"


def test_a_file_beside_an_index_wins_as_in_transformers(shards):
    other = huggingface_folder(shards.parent / "other", seed=5)
    (other / "model.safetensors").rename(shards / "model.safetensors")
    assert torch.equal(state_of(shards)["transformer.wte.weight"], weights(seed=5)["transformer.wte.weight"])


def test_links_of_a_download_cache_are_followed(gpt2, tmp_path):
    blob = (gpt2 / "model.safetensors").rename(tmp_path / "blob")
    (gpt2 / "model.safetensors").symlink_to(blob)
    assert state_of(gpt2)


def test_its_words_are_scored_written_and_looked_into(gpt2):
    found = load(gpt2, device="cpu")
    assert found.score("the cat sat").nats.shape == (len(found.tokenizer.encode("the cat sat")),)
    assert found.hidden("the cat").shape[1] == 16
    assert len(found.generate(["the cat"], max_new_tokens=3)) == 1


def test_eval_says_where_the_weights_came_from(gpt2, command, tmp_path):
    (tmp_path / "text.txt").write_text("the cat sat on a mat. " * 20)
    words = ["eval", "--checkpoint", str(gpt2), "--input_file", str(tmp_path / "text.txt"), "--device", "cpu"]
    out, err = command(*words)
    found = json.loads(out)
    assert (found["checkpoint"], found["weights"], found["overlap"]) == (str(gpt2), "Hugging Face", None)
    assert f"gpt2 (Hugging Face weights of {gpt2}) on all of text.txt" in err
    assert "what these weights were trained on is not known here; this text may have been among it" in err


# -- the folder ----------------------------------------------------------------------------------------------


def test_a_folder_without_config_json(gpt2):
    (gpt2 / "config.json").unlink()
    refused(
        gpt2, "holds no weights that are read", "config.json with a model_type", "checkpoint-<step>", "export"
    )


def test_no_folder_at_all(gpt2, monkeypatch):
    monkeypatch.chdir(gpt2.parent)
    refused(
        gpt2 / "model.safetensors",
        "is a file of weights, and the folder that it lies in is needed",
        str(gpt2),
    )
    hub = (
        "If that is a name on Hugging Face: hf download meta-llama/Llama-2-7b --local-dir DIR, then give DIR"
    )
    refused("meta-llama/Llama-2-7b", "no such checkpoint or run folder: meta-llama/Llama-2-7b", hub)
    refused("gpt3", "no such checkpoint or run folder: gpt3. In .: gpt2.", "hf download gpt3 --local-dir DIR")
    assert "Hugging Face" not in refused("/no/such/run")


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"model_type": None}, "config.json: no model_type. Architectures that are read: gpt2, llama"),
        (
            {"model_type": "lama"},
            "config.json: model_type: 'lama' is not one of gpt2, llama, mamba, mamba2, mixtral, glm4_moe. "
            "Did you mean 'llama'?",
        ),
        (
            {"layer_norm_epsilon": 0.1},
            "config.json: layer_norm_epsilon is 0.1: GPT-2 is computed with 1e-05 here",
        ),
    ],
)
def test_what_config_json_may_not_say(gpt2, entries, message):
    edit_json(gpt2 / "config.json", **entries)
    refused(gpt2, message)


def test_sizes_that_no_model_can_have(gpt2):
    edit_json(gpt2 / "config.json", n_head=5)
    with pytest.raises(
        ValueError, match=r"config.json: model_cfg.d_model \(16\) must be divisible by .*n_heads \(5\)"
    ):
        opened(gpt2).config(lambda text: None)


@pytest.mark.parametrize("content", ["", "{", "[1]", b"\xff\xfe"])
def test_a_config_json_that_is_none(gpt2, content):
    (gpt2 / "config.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    refused(gpt2, "config.json: ", "JSON")


# -- the weights ---------------------------------------------------------------------------------------------


def test_no_weights(gpt2):
    (gpt2 / "model.safetensors").unlink()
    refused(gpt2, "no weights: neither model.safetensors nor model.safetensors.index.json is there")


def test_a_pickle_is_never_opened(gpt2):
    (gpt2 / "model.safetensors").rename(gpt2 / "pytorch_model.bin")
    refused(
        gpt2,
        "the weights are in pytorch_model.bin, and model.safetensors alone is read: nothing that is loaded is executed",
        f"GPT2LMHeadModel.from_pretrained('{gpt2}').save_pretrained('NEW')",
    )


@pytest.mark.parametrize("kept", [0, 5, 200, -1])
def test_a_file_cut_short(gpt2, kept):
    file = gpt2 / "model.safetensors"
    file.write_bytes(file.read_bytes()[:kept])
    refused(gpt2, f"{file} is cut short or damaged: ")


def test_a_damaged_header(gpt2):
    file = gpt2 / "model.safetensors"
    file.write_bytes(b"\xff" * 64 + file.read_bytes()[64:])
    refused(gpt2, f"{file} is cut short or damaged: ")


def test_a_file_that_was_cloned_without_its_content(gpt2):
    file = gpt2 / "model.safetensors"
    file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:12\nsize 548105171\n")
    refused(gpt2, f"{file} is cut short or damaged: it is a pointer of Git LFS; git lfs pull")


def changed(folder, **tensors):
    """Other tensors in the file; None takes one out."""
    found = {**load_file(folder / "model.safetensors"), **tensors}
    save_file({name: t for name, t in found.items() if t is not None}, folder / "model.safetensors")
    return folder


MLP = "transformer.h.1.mlp.c_fc.weight"


def test_missing_extra_and_misshapen_tensors(gpt2):
    refused(changed(gpt2, **{MLP: None}), str(gpt2), f"missing 1: {MLP}")
    refused(changed(gpt2, **{MLP: torch.ones(2, 3)}), f"wrong 1: {MLP} is (2, 3), needed is (16, 64)")
    more = {MLP: torch.ones(16, 64), "score.weight": torch.ones(1)}
    refused(changed(gpt2, **more), "unexpected 1: transformer.score.weight")


def test_a_head_as_config_json_says(gpt2):
    head = torch.ones(VOCABULARY, 16)
    edit_json(gpt2 / "config.json", tie_word_embeddings=False)
    refused(gpt2, "missing 1: lm_head.weight", tie_embeddings=False)
    changed(gpt2, **{"lm_head.weight": head})
    assert torch.equal(state_of(gpt2, tie_embeddings=False)["lm_head.weight"], head)
    refused(
        gpt2, "has a head of its own: it needs tie_embeddings: false (tie_word_embeddings in config.json)"
    )


def test_a_table_that_holds_nan_is_no_head_of_its_own(gpt2):
    """Such weights are of no use, and that is for their scores to say."""
    changed(
        gpt2, **{"transformer.wte.weight": torch.full((VOCABULARY, 16), torch.nan), "lm_head.weight": None}
    )
    assert state_of(gpt2)["transformer.wte.weight"].isnan().all()


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_numbers_in_a_code(gpt2, dtype):
    refused(changed(gpt2, **{MLP: torch.ones(16, 64).to(dtype)}), f"quantised?): {MLP} is {dtype}")


def test_causal_masks_of_older_files_are_no_weights(gpt2):
    changed(gpt2, **{"transformer.h.0.attn.bias": torch.ones(1, 1, 32, 32, dtype=torch.uint8)})
    assert torch.equal(state_of(gpt2)[MLP], weights()[MLP])


# -- several files -------------------------------------------------------------------------------------------


def indexed(shards, **entries):
    index = shards / "model.safetensors.index.json"
    edit_json(index, weight_map={**json.loads(index.read_text())["weight_map"], **entries})
    return shards


SECOND = "model-00002-of-00003.safetensors"


def test_a_missing_shard(shards):
    (shards / SECOND).unlink()
    refused(shards, f"{shards}: files of the weights are missing: {SECOND} (by model.safetensors.index.json)")


def test_a_shard_cut_short(shards):
    (shards / SECOND).write_bytes((shards / SECOND).read_bytes()[:-1])
    refused(shards, f"{shards / SECOND} is cut short or damaged")


def test_an_index_that_is_wrong(shards):
    refused(indexed(shards, extra=SECOND), f"not as their index says: extra is not in {SECOND}")


def test_a_tensor_that_the_index_lacks(shards):
    save_file({**load_file(shards / SECOND), "extra": torch.ones(1)}, shards / SECOND)
    refused(shards, f"not as their index says: {SECOND} holds extra, which the index lacks")


@pytest.mark.parametrize("place", ["../outside.safetensors", "/etc/passwd", "..", "a/b.safetensors", ""])
def test_an_index_names_no_file_outside_of_the_folder(shards, place):
    save_file({MLP: torch.ones(1)}, shards.parent / "outside.safetensors")
    refused(indexed(shards, **{MLP: place}), "names files that are not in its folder: ")


@pytest.mark.parametrize("content", [{}, {"weight_map": {}}, {"weight_map": {"a": 1}}, {"weight_map": ["a"]}])
def test_an_index_that_is_none(shards, content):
    (shards / "model.safetensors.index.json").write_text(json.dumps(content))
    refused(shards, "index.json: weight_map must say of each tensor which file it is in")


# -- the tokenizer -------------------------------------------------------------------------------------------


def test_a_tokenizer_whose_ids_exceed_the_vocabulary(tmp_path):
    path = huggingface_folder(tmp_path / "x", entries={"vocab_size": 280})
    with pytest.raises(ValueError, match=r"is id 289, and the model has 280 rows \(vocab_size of "):
        _ = opened(path).tokenizer


def test_a_folder_without_tokenizer(gpt2):
    (gpt2 / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match="has no tokenizer.json"):
        _ = opened(gpt2).tokenizer
