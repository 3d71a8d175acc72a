"""`generate` and `eval` on models that write in no particular order: what is printed where, and gaps."""

import json
import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest

import mytrainer
from tests.contract.tiny import config
from trainer.loop import train
from trainer.view.stream import escaped

pytestmark = pytest.mark.xdist_group("diffusion commands")  # one worker trains the runs that they share
ROOT = Path(__file__).resolve().parents[3]
TEXT = "0123____01____3"


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A run folder of each type, hardly trained."""
    work = tmp_path_factory.mktemp("work")
    short = ["num_iterations=2", "val_loss_every=0", "val_bytes=64", "sample_tokens=0", "ema_decay=0.0"]
    for type_ in ("mdl", "sedd", "bd3lm"):
        train(*config(type_, *short), work / type_)
    train(*config("sedd", *short, "model_cfg.transition_type=uniform"), work / "uniform")
    return work


@pytest.fixture
def generate(runs, capsys):
    """Run the command in process on one of the runs, piped: (exit status, stdout, stderr)."""

    def run(type_, *words):
        capsys.readouterr()
        status = mytrainer.main(
            ["generate", "--checkpoint", str(runs / type_), "--device", "cpu", *map(str, words)]
        )
        return status, *capsys.readouterr()

    return run


def test_piped_text_is_plain(generate):
    status, out, err = generate("mdl", "--prompt", "01", "--max_new_tokens", 30)
    assert status == 0 and out.startswith("01") and out.endswith("\n")
    assert "\x1b" not in out + err and "░" not in out
    assert "30 tokens" in err and "a document's end is not modelled" in err


def test_a_seed_repeats_a_text_and_temperature_1_is_the_default(generate):
    plain, again, one, other = (
        generate("mdl", "--max_new_tokens", 30, *more)[1]
        for more in ([], ["--seed", 0], ["--temperature", 1], ["--temperature", 0.2])
    )
    assert plain == again == one != other


def test_long_text_goes_on_behind_its_last_part(generate):
    """Three windows; what the first one wrote stays."""
    short, long = (generate("mdl", "--max_new_tokens", n, "--steps", 8)[1] for n in (32, 80))
    assert long.startswith(short.rstrip("\n")) and len(long) > len(short)


@pytest.mark.parametrize("type_", ["mdl", "sedd", "bd3lm", "uniform"])
def test_gaps_are_filled_and_the_rest_stays(generate, type_):
    status, out, err = generate(type_, "--infill", TEXT, "--gap_tokens", 3)
    assert status == 0, err
    text = out.rstrip("\n").encode("utf-8", errors="replace")
    assert out.startswith("0123") and out.rstrip("\n").endswith("3") and "01" in out[4:] and len(text) >= 13
    caveat = {"bd3lm": "from the text before it", "uniform": "approximation"}.get(type_)
    assert ("note:" in err) is (caveat is not None) and (caveat or "") in err
    assert generate(type_, "--infill", TEXT, "--gap_tokens", 3, "--seed", 5)[1] != out


def test_gaps_in_a_file(generate, tmp_path):
    (tmp_path / "gaps.txt").write_text(TEXT)
    words = ["--gap_tokens", 3]
    in_file = generate("mdl", "--infill", tmp_path / "gaps.txt", *words)[1]
    assert in_file == generate("mdl", "--infill", TEXT, *words)[1]


def test_steps_and_confidence_change_the_text_and_the_latter_is_named(generate):
    words = ["--max_new_tokens", 24]
    plain, few, sure = (
        generate("mdl", *words, *more) for more in ([], ["--steps", 3], ["--steps", 3, "--by_confidence"])
    )
    assert len({plain[1], few[1], sure[1]}) == 3
    assert "no draw from the model's distribution" in sure[2] and "by_confidence" not in few[2]


@pytest.mark.parametrize(
    ("type_", "words", "message"),
    [
        ("mdl", ["--infill", "no gap"], "there is no gap in the text. Write ____"),
        ("mdl", ["--infill", TEXT, "--gap_tokens", 0], "gap_tokens: must be at least 1, got 0"),
        ("mdl", ["--infill", TEXT, "--gap_tokens", 99], "the model's context is"),
        ("mdl", ["--infill", TEXT, "--prompt", "0"], "prompt and infill exclude each other"),
        ("mdl", ["--steps", -1], "steps: must be 0"),
        ("bd3lm", ["--steps", 5], "sampler is first_hitting"),
        ("uniform", ["--by_confidence"], "this chain has no mask"),
    ],
)
def test_what_cannot_be_done_is_refused(generate, type_, words, message):
    status, out, err = generate(type_, *words)
    assert (status, out) == (2, "") and message in err and "Traceback" not in err


@pytest.mark.slow
@pytest.mark.parametrize("term", ["xterm", "dumb"])
def test_a_terminal_sees_the_text_resolve(runs, term):
    """Frames with undecided tokens, drawn over each other; on a terminal that cannot move its cursor only the text."""
    words = [sys.executable, str(ROOT / "mytrainer.py"), "generate", "--checkpoint", str(runs / "mdl")]
    words += ["--device", "cpu", "--max_new_tokens", "30"]
    env = {**os.environ, "TERM": term, "OMP_NUM_THREADS": "1"}
    piped = subprocess.run(words, env=env, capture_output=True, text=True)
    ours, theirs = pty.openpty()
    with subprocess.Popen(words, env=env, stdout=theirs, stderr=subprocess.PIPE) as child:
        os.close(theirs)
        seen = b""
        while chunk := _read(ours):
            seen += chunk
        os.close(ours)
    assert child.returncode == piped.returncode == 0
    shown = seen.decode("utf-8", errors="replace").replace("\r\n", "\n")
    assert shown.endswith(escaped(piped.stdout))
    assert ("░" in shown and "\x1b[J" in shown) is (term == "xterm")


def test_a_score_is_called_a_bound(runs, capsys):
    capsys.readouterr()
    assert mytrainer.main(["eval", "--checkpoint", str(runs / "sedd"), "--device", "cpu"]) == 0
    out, err = capsys.readouterr()
    assert "bits per byte     <= " in err and "perplexity        <= " in err
    assert "an upper bound (the score-entropy bound (absorbing)" in err and "4 noise draws per row" in err
    assert "diffusion" in err and "prior" in err and "recon" in err
    assert json.loads(out)["score"]["kind"] == "bound"


def _read(fd):
    """b"" when the other side has closed (Linux raises instead)."""
    try:
        return os.read(fd, 65536)
    except OSError:
        return b""
