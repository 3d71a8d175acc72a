"""Certificates: honest scores have one, dishonest ones fail by name, and what has changed since is told."""

import json

import numpy as np
import pytest
import torch

import mytrainer
from adapters import build_adapter
from data.corpus import Document
from data.store import encode_documents
from data.tokenizers import ByteTokenizer
from tests.contract.tiny import config, move_away_from_uniform
from trainer.bench.certify import bounds, causality, normalisation
from trainer.bench.certify.bounds import standard_errors
from trainer.bench.certify.certificate import Heard, certify
from trainer.loop import train
from trainer.run.restore import Restored

DISHONEST = "tests.trainer.bench.dishonest"
TEXTS = [b"the first text, of some length", b"another one", "die dritte, mit Umlauten: äöü".encode()]


@pytest.fixture
def quick(monkeypatch):
    """Fewer places: what is found here is large."""
    monkeypatch.setattr(normalisation, "PLACES", 2)
    monkeypatch.setattr(causality, "ROWS", 2)
    monkeypatch.setattr(bounds, "DRAWS", 64)
    monkeypatch.setattr(bounds, "MOST", 64)


def certificate(architecture, *more, change=None):
    """Of an untrained model of random weights on `TEXTS`."""
    cfg, model_cfg = config(architecture, *more)
    tokenizer = ByteTokenizer()
    adapter = build_adapter(cfg, model_cfg, tokenizer).eval()
    move_away_from_uniform(adapter, 0.1)
    if change:
        change(adapter)
    store = encode_documents([Document("text", text) for text in TEXTS], tokenizer)
    restored = Restored(cfg, adapter, tokenizer, adapter.device, "no", None, "untrained", 4)
    rows, heard = restored.rows(store), Heard()
    score = restored.score(rows, hear=heard.hear)
    return certify(restored, rows, score, heard, {}, lambda targets: restored.rows(store, None, targets))


def failed(content):
    assert content["certified"] is (not any(c["result"] == "failed" for c in content["checks"]))
    return {check["name"]: check["found"] for check in content["checks"] if check["result"] == "failed"}


def test_an_honest_score_has_one(quick):
    found = certificate("vanilla", f"model_adapter={DISHONEST}:Honest")
    assert failed(found) == {} and found["certified"]
    assert {check["name"] for check in found["checks"] if check["result"] == "passed"} == {
        "causality",
        "normalisation",
        "bytes",
        "repeatability",
        "independence of rows",
    }
    measured = {check["name"]: check["measured"] for check in found["checks"]}
    assert measured["causality"]["nats"] < 1e-4 < 0.1 < measured["causality"]["nats_behind"]
    assert measured["normalisation"]["smallest_sum"] == pytest.approx(1, abs=1e-5)
    assert measured["bytes"]["bytes"] == sum(map(len, TEXTS)) == found["score"]["bytes"]
    assert f"code {DISHONEST}" in found["digests"], "what is outside of the project is code too"


@pytest.mark.parametrize(
    ("words", "names", "said"),
    [
        (f"type={DISHONEST}:Ahead", {"causality"}, "the model looks ahead"),
        (f"type={DISHONEST}:Own", {"causality", "normalisation"}, "the very token that it is asked for"),
        (f"model_adapter={DISHONEST}:Generous", {"normalisation"}, "add up to 1.2"),
        (f"model_adapter={DISHONEST}:Lazy", {"normalisation"}, "add up to 257"),
        (f"model_adapter={DISHONEST}:TwoBytes", {"bytes"}, "has 30 bytes, and was scored as 60"),
        (f"model_adapter={DISHONEST}:Sociable", {"independence of rows"}, "what is scored together"),
        (f"model_adapter={DISHONEST}:Fickle", {"repeatability"}, "apart by at most"),
        (f"model_adapter={DISHONEST}:NonCausal", {"causality"}, "non_causal_routing"),
    ],
)
def test_a_dishonest_score_fails_by_name(quick, words, names, said):
    found = failed(certificate("gpt2", words))
    assert names <= found.keys(), found
    assert any(said in text for text in found.values()), found


@pytest.mark.slow
def test_a_bound_that_leaves_a_part_out_fails(quick, monkeypatch):
    honest = certificate("mdl")
    assert failed(honest) == {}
    bound = next(check for check in honest["checks"] if check["name"] == "bound")
    assert (
        "the sum over all patterns of masks" in bound["asked"] and bound["measured"]["otherwise_error"] == 0
    )

    def halved(adapter):
        estimate = adapter.process.estimate
        adapter.process.estimate = lambda draw: {k: v / 2 for k, v in estimate(draw).items()}

    assert "apart by" in failed(certificate("mdl", change=halved))["bound"]


def test_a_bound_without_other_means_has_no_certificate(quick, monkeypatch):
    monkeypatch.setattr("adapters.diffusion.adapter.DiffusionAdapter.bound_otherwise", lambda self, *_: None)
    assert "knows its bound by no other means" in failed(certificate("mdl"))["bound"]


def test_standard_errors_that_are_too_small_are_seen():
    values = torch.from_numpy(np.random.default_rng(0).normal(50, 3, (512, 2)))
    assert standard_errors(values, torch.full((512, 2), 9.0)).result == "passed"
    assert standard_errors(values, torch.full((512, 2), 2.0)).result == "failed"


# -- the command -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("certified") / "run"
    train(*config("gpt2", "num_iterations=3", "val_loss_every=0", "synthetic_bytes=20000"), folder)
    return folder


@pytest.fixture
def command(monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)

    def eval_(*argv):
        capsys.readouterr()
        try:
            status = mytrainer.main(["eval", *map(str, argv)])
        except SystemExit as leaving:  # argparse
            status = leaving.code
        return status, *capsys.readouterr()

    return eval_


def test_a_certificate_is_written_and_holds(quick, run, command, tmp_path):
    words = ("--checkpoint", run, "--device", "cpu", "--val_bytes", 400, "--certify", "c.json")
    status, out, err = command(*words)
    assert status == 0, err
    content = json.loads((tmp_path / "c.json").read_text())
    assert content["certified"] and json.loads(out)["certificate"]["certified"]
    assert "certified: " in err and "passed     causality" in err and "tolerance: " in err
    assert content["request"]["checkpoint"].startswith(str(run)) and content["request"]["val_bytes"] == 400
    status, out, err = command("--verify", "c.json")
    assert status == 0 and json.loads(out) | {"score": 0} == {
        "holds": True,
        "no_longer_holds": [],
        "score": 0,
    }
    assert "the certificate of " in err and "holds" in err

    content["score"]["bits_per_byte"] -= 0.01
    content["digests"]["weights"] = "0" * 64
    content["digests"]["code models"] = "1" * 64
    (tmp_path / "c.json").write_text(json.dumps(content))
    status, out, err = command("--verify", "c.json")
    gone = json.loads(out)["no_longer_holds"]
    assert status == 1 and [line.partition(":")[0] for line in gone] == [
        "file",
        "weights",
        "code models",
        "score.bits_per_byte",
    ]
    assert err.count("no longer holds: ") == 4


def test_what_is_no_certificate_is_refused(command, run, tmp_path):
    def refused(*words):
        status, out, err = command(*words)
        assert (status, out) == (2, "") and len(err.strip().splitlines()) == 1, err
        return err

    assert "cannot be read: No such file" in refused("--verify", "none.json")
    (tmp_path / "x.json").write_text("{")
    assert "is no JSON file" in refused("--verify", "x.json")
    (tmp_path / "x.json").write_text("{}")
    assert "is no certificate" in refused("--verify", "x.json")
    (tmp_path / "x.json").write_text('{"certificate": 7}')
    assert "of format 7, and this version reads 1" in refused("--verify", "x.json")
    (tmp_path / "x.json").write_text('{"certificate": 1, "score": {}}')
    assert "it has no certified, checks" in refused("--verify", "x.json")
    whole = {name: {} for name in ("certified", "request", "score", "checks", "digests", "digest")}
    for request, said in (
        ({"shell": "rm"}, "asks for what eval does not have: ['shell']"),
        ({"val_bytes": "many"}, "val_bytes='many', which is no value of --val_bytes"),
    ):
        (tmp_path / "x.json").write_text(json.dumps({"certificate": 1, **whole, "request": request}))
        assert said in refused("--verify", "x.json")
    assert "Leave out --val_bytes" in refused("--verify", "x.json", "--val_bytes", 3)
    same = ("--checkpoint", run, "--certify", "c.json", "--output", "c.json")
    assert "is the file of another option too" in refused(*same)
    assert "cannot write" in refused("--checkpoint", run, "--certify", "nowhere/c.json")
