"""Code beside weights of transformers, which their files name, is followed nowhere."""

import pytest

from data.huggingface.folder import read_huggingface_tokenizer
from models.memory.pretrained import read_config
from tests.data.strange import code
from tests.huggingface_folder import edit_json, huggingface_folder
from trainer.loaded import load

MAP = {
    "AutoConfig": "evil.Config",
    "AutoModelForCausalLM": "evil.Model",
    "AutoTokenizer": ["evil.Tokenizer", None],
}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    path = huggingface_folder(tmp_path / "theirs", entries={"auto_map": MAP})
    edit_json(path / "tokenizer_config.json", auto_map=MAP, tokenizer_class="Tokenizer")
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr("builtins.input", lambda *words: "y")  # who is asked agrees
    return path


def test_weights_that_name_code_are_refused_and_a_tokenizer_is_read_without(folder):
    mark = code(folder, "evil")
    with pytest.raises(ValueError, match="auto_map is .* without it the weights mean another model"):
        load(folder, device="cpu", note=lambda text: None)
    edit_json(folder / "config.json", auto_map=None)
    assert load(folder, device="cpu", note=lambda text: None).logits("ab").shape[0] == 3
    assert read_huggingface_tokenizer(folder).encode("ab").size
    assert not mark.exists()


def test_a_model_that_is_nothing_but_code_is_refused(folder):
    mark = code(folder, "evil")
    edit_json(folder / "config.json", model_type="evil")
    with pytest.raises(ValueError, match="evil"):
        load(folder, device="cpu", note=lambda text: None)
    with pytest.raises(ValueError, match="code of a folder is never executed"):
        read_config(folder)
    assert not mark.exists()
