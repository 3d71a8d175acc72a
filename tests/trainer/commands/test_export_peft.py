"""What `export --to peft` writes, opened by PEFT; and a run that begins with such a folder."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.contract.tiny import config, session_of
from tests.huggingface_folder import edit_json, huggingface_folder
from trainer.loop import train
from trainer.run.restore import restore
from trainer.run.source import open_source

pytestmark = pytest.mark.xdist_group("transformers")

STEPS = ["num_iterations=3", "val_loss_every=0", "val_bytes=64", "sample_tokens=0", "lora_lr=0.05"]
CLASSES = {"gpt2": "GPT2LMHeadModel", "vanilla": "LlamaForCausalLM"}


@pytest.fixture(scope="module", params=CLASSES)
def trained(request, tmp_path_factory):
    """(type, base, run, folder): adapters trained beside a base of transformers, and their export."""
    import mytrainer

    folder = tmp_path_factory.mktemp(request.param)
    base = huggingface_folder(folder / "base", request.param)
    words = [f"init_from_checkpoint={base}", "use_lora=true", "lora_rank=2", "train_seq_len=16"]
    train(*config(request.param, *STEPS, *words), folder / "run")
    told = ["export", "--checkpoint", folder / "run", "--to", "peft", "--output", folder / "peft"]
    assert mytrainer.main([str(word) for word in told]) == 0
    return request.param, base, folder / "run", folder / "peft"


def logits(run, ids):
    found = restore(run)
    adapter = found.adapter.double()
    with torch.no_grad():
        return adapter.model.logits(adapter.model(ids))[..., : adapter.tokenizer.vocab_size]


def test_peft_opens_it(trained):
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    type_, base, run, folder = trained
    ids = torch.arange(12)[None] * 7 % 250
    plain = getattr(transformers, CLASSES[type_]).from_pretrained(base).double().eval()
    with torch.no_grad():
        before = plain(ids).logits
        theirs = peft.PeftModel.from_pretrained(plain, folder).double().eval()(ids).logits
    torch.testing.assert_close(theirs[..., :250], logits(run, ids)[..., :250], rtol=1e-6, atol=1e-6)
    assert (theirs - before).abs().max() > 1e-3, "the adapters were trained"


def test_a_run_begins_with_it(trained):
    type_, _, run, folder = trained
    source = open_source(folder, print)
    assert source.adapts and source.type == type_
    ids = torch.arange(12)[None] * 5 % 250
    torch.testing.assert_close(logits(folder, ids), logits(run, ids))
    session = session_of(type_, f"init_from_checkpoint={folder}", "train_seq_len=16")
    source.begin(session, print)
    model = session.adapter.double().eval().model
    with torch.no_grad():
        whole = model.logits(model(ids))[..., :250]
    torch.testing.assert_close(whole, logits(run, ids)[..., :250], rtol=1e-5, atol=1e-5)
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize(
    ("entries", "told"),
    [
        ({"peft_type": "IA3"}, "peft_type must be LORA, got 'IA3'"),
        ({"use_dora": True}, "use_dora is True, and adapters are known with False alone"),
        ({"base_model_name_or_path": "nowhere"}, "base_model_name_or_path is 'nowhere'"),
        ({"r": 3}, "lora_A"),
        ({"r": None}, "r must be a positive whole number, got None"),
        ({"r": "abc"}, "r must be a positive whole number, got 'abc'"),
        ({"lora_alpha": 0}, "lora_alpha must be a positive number, got 0"),
        ({"lora_dropout": 2}, "lora_dropout must be at least 0 and below 1, got 2"),
        ({"exclude_modules": ["q_proj"]}, r"exclude_modules is \['q_proj'\]"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights is 'pissa', which changes the weights"),
    ],
)
def test_what_is_not_understood_is_refused(trained, tmp_path, entries, told):
    type_, _, _, folder = trained
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    edit_json(tmp_path / "adapter_config.json", **entries)
    with pytest.raises(ValueError, match=told):
        restore(tmp_path)


@pytest.mark.parametrize("change", ["renamed", "left out"])
def test_matrices_that_do_not_fit_are_refused(trained, tmp_path, change):
    *_, folder = trained
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    held = load_file(folder / "adapter_model.safetensors")
    name = sorted(held)[0]
    matrix = held.pop(name)
    if change == "renamed":
        held[name.replace("lora_A", "lora_X")] = matrix
    save_file(held, tmp_path / "adapter_model.safetensors")
    with pytest.raises(ValueError, match="lora_A"):
        restore(tmp_path)


def copied(trained, folder):
    """The adapters and their base, which may be changed."""
    _, base, _, peft = trained
    shutil.copytree(base, folder / "base")
    shutil.copytree(peft, folder / "peft")
    edit_json(folder / "peft" / "adapter_config.json", base_model_name_or_path=str(folder / "base"))
    return folder / "peft"


def test_adapters_are_told_from_others_by_base_and_strength(trained, tmp_path):
    path = copied(trained, tmp_path)
    before = open_source(path, print).digest
    assert open_source(path, print).digest == before
    edit_json(path / "adapter_config.json", lora_alpha=99)
    stronger = open_source(path, print).digest
    (weights,) = (tmp_path / "base").glob("*.safetensors")
    tensors = load_file(weights)
    first = sorted(tensors)[0]
    save_file(tensors | {first: tensors[first] + 1}, weights, metadata={"format": "pt"})
    assert len({before, stronger, open_source(path, print).digest}) == 3


def test_a_run_as_the_base_is_no_folder_of_transformers(tmp_path, capsys):
    """Nothing is named that PEFT could not open, and the hint says what to put there."""
    import mytrainer

    train(*config("gpt2", *STEPS[1:], "num_iterations=1", "train_seq_len=16"), tmp_path / "base")
    words = [f"init_from_checkpoint={tmp_path / 'base'}", "use_lora=true", "lora_rank=2", "train_seq_len=16"]
    train(*config("gpt2", *STEPS, *words), tmp_path / "run")
    told = [
        "export",
        "--checkpoint",
        str(tmp_path / "run"),
        "--to",
        "peft",
        "--output",
        str(tmp_path / "peft"),
    ]
    assert mytrainer.main(told) == 0
    assert "from_pretrained(BASE)  # of what the run began from" in capsys.readouterr().out
    assert json.loads((tmp_path / "peft/adapter_config.json").read_text())["base_model_name_or_path"] is None
    with pytest.raises(ValueError, match="base_model_name_or_path is None, .* write their folder into it"):
        open_source(tmp_path / "peft", print)
    told = ["export", "--checkpoint", str(tmp_path / "base"), "--to", "hf", "--output", str(tmp_path / "hf")]
    assert mytrainer.main(told) == 0
    edit_json(tmp_path / "peft" / "adapter_config.json", base_model_name_or_path=str(tmp_path / "hf"))
    ids = torch.arange(12)[None] * 5 % 250
    torch.testing.assert_close(logits(tmp_path / "peft", ids), logits(tmp_path / "run", ids))


def test_only_adapters_are_exported_so(trained, tmp_path, capsys):
    import mytrainer

    _, base, _, folder = trained
    told = ["export", "--checkpoint", str(base), "--to", "peft", "--output", str(tmp_path / "new")]
    assert mytrainer.main(told) == 2
    assert "peft is for adapters, and this run has none" in capsys.readouterr().err
    names = json.loads((folder / "adapter_config.json").read_text())["target_modules"]
    assert all(name.startswith(("transformer.h.", "model.layers.")) for name in names)
