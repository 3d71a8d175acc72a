"""Runs on chats: what is learned of them, how a run goes on, what is scored, asked and answered, and who refuses."""

from __future__ import annotations

import io
import json
import math
import runpy
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from adapters import adapter_class
from adapters.base import Context, weighted_loss
from configs.messages import ConfigError
from data import load_dataset
from data.chats.messages import Message, chat_document, messages_of
from data.chats.rows import heldout_rows
from data.chats.template import ChatTemplate
from tests.contract.tiny import TYPES, config, session_of
from tests.trainer.test_evaluate import Rank, TableAdapter, random_table, score
from trainer.batching import StepLoader, plan_batch
from trainer.loop import train
from trainer.run.checkpoint import load_json, load_tensors

CHATS = ["data=jsonl", "training_mode=instruction_finetuning", "tokenizer=byte", "train_seq_len=96"]
SAVED = [
    *("save_steps=1", "save_total_limit=null", "save_minutes=null"),
    *("val_loss_every=0", "sample_tokens=0", "val_bytes=null"),
]
LONG = ["num_iterations=14", "global_batch_size=8", "model_cfg.dropout=0.1"]


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    """What makes a run one on chats: a few short ones, with one to three answers of unlike lengths."""
    path = tmp_path_factory.mktemp("chats") / "chats.jsonl"
    rows = []
    for number in range(80):
        turns = []
        for turn in range(1 + number % 2):
            turns += [("user", f"{number}"), ("assistant", "yes " * (1 + (number + turn) % 4))]
        rows.append({"messages": [{"role": role, "content": content} for role, content in turns]})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return [*CHATS, f"train_files={path}"]


def sized(architecture: str) -> list[str]:
    """A context that rows of chats fit into, where the architecture has one."""
    fields = type(config(architecture)[1]).model_fields
    return ["model_cfg.n_ctx=128"] if "n_ctx" in fields else []


def run(path, words, *more):
    train(*config("gpt2", *sized("gpt2"), *words, *SAVED, f"output_dir={path}", *more), path)
    return path


def weights(path):
    return load_tensors(path, "model.pt")


def same(left, right):
    return all(torch.equal(value, right[name]) for name, value in left.items())


@pytest.fixture(scope="module")
def whole(words, tmp_path_factory):
    return run(tmp_path_factory.mktemp("whole") / "run", words, *LONG)


@pytest.mark.parametrize("at", [pytest.param(3, marks=pytest.mark.slow), 11])
def test_resume_is_exact_in_the_first_epoch_and_behind_it(whole, words, tmp_path, at) -> None:
    again = tmp_path / "again"
    resumed = [f"resume={whole / f'checkpoint-{at}'}", *LONG]
    run(again, words, *resumed)
    assert same(weights(whole / "final_model"), weights(again / "final_model"))
    position = load_json(whole / f"checkpoint-{at}", "training_state.json")["position"]
    assert (position < 76) == (at == 3), "chats, of which an epoch has 76 or so"


def test_another_length_is_announced(whole, words, tmp_path, capsys) -> None:
    more = [*LONG, f"resume={whole / 'checkpoint-3'}", "train_seq_len=120", "num_iterations=4"]
    run(tmp_path / "again", words, *more)
    said = capsys.readouterr().out
    assert "train_seq_len 96 -> 120" in said
    assert "rows of 120 tokens instead of 96 are planned from document" in said


def test_a_step_does_not_depend_on_how_it_is_cut(words, tmp_path) -> None:
    """The step's loss is a mean over its learned tokens, however unlike its rows are."""
    one, four = (session_of("gpt2", *sized("gpt2"), *words, f"batch_size={n}") for n in (1, 4))
    gradients = []
    for s in (one, four):
        batch = s.loader.load(0)
        assert {tuple(p.tensors["inputs"].shape) for p in batch.micro} == {(4 if s is four else 1, 96)}
        for prepared in batch.micro:
            output = s.adapter(prepared)
            weighted_loss(output.terms, batch.denominators).backward()
        gradients.append([p.grad for p in s.adapter.parameters()])
        rows = s.rows.batch(np.arange(4))
        assert batch.denominators["tokens"] == batch.tokens == rows.weights.sum() < 4 * 96 / 2
        assert batch.bytes == rows.bytes
    plan = plan_batch(4, 1, None, 2, 96)  # on two processes
    shares = [StepLoader(one.rows, one.adapter, plan, rank, 0).load(0) for rank in range(2)]
    assert sum(share.denominators["tokens"] for share in shares) == batch.denominators["tokens"]
    assert shares[0].denominators != shares[1].denominators
    for left, right in zip(*gradients, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-6)


def test_rows_without_a_learned_token_change_nothing(words) -> None:
    """In a micro-batch, and as one of its own: finite, and the loss is that of the others."""
    s = session_of("gpt2", *sized("gpt2"), *words)
    ctx = Context(0, 0, "train", 4)
    batch = s.rows.batch(np.arange(4))
    alone = s.adapter.prepare(s.rows.batch(np.arange(2)), ctx)
    batch.weights[2:] = 0
    both = s.adapter.prepare(batch, ctx)
    assert both.denominators == alone.denominators
    losses = [weighted_loss(s.adapter(p).terms, p.denominators) for p in (alone, both)]
    torch.testing.assert_close(*losses)
    batch.weights[:] = 0
    none = s.adapter.prepare(batch, ctx)
    loss = weighted_loss(s.adapter(none).terms, none.denominators)
    loss.backward()
    assert loss == 0 and all(p.grad.isfinite().all() for p in s.adapter.parameters())


# -- every architecture ------------------------------------------------------------------------------------------------

ABLE = [
    *("gpt2", "vanilla", "megabyte", "mtp", "mtm", "current_best_gpt"),
    *("mamba", "ngpt", "nsa", "rd", "memory", "memory_adapter"),
]


def test_who_takes_chats() -> None:
    assert set(ABLE) == {n for n in TYPES if not adapter_class(config(n)[0]).masks(config(n)[1])}


@pytest.mark.parametrize("name", sorted(set(TYPES) - set(ABLE)))
def test_others_refuse_chats_and_padding_by_name(name, words) -> None:
    with pytest.raises(
        ConfigError, match=rf"training_mode .* type '{name}' cannot: .*Nearest: training_mode"
    ):
        config(name, *words)
    with pytest.raises(ConfigError, match=rf"packing .* type '{name}' cannot"):
        config(name, "packing=false")


@pytest.mark.parametrize("name", ABLE)
def test_nothing_depends_on_what_padding_holds(name, words) -> None:
    s = session_of(name, *sized(name), *words)
    ctx = Context(0, 0, "train", 4)
    s.adapter.on_step_start(ctx, 10)
    s.adapter.eval()
    batch = s.rows.batch(np.arange(4))
    learned = batch.weights.sum()
    losses = []
    for token in (s.dataset.tokenizer.eot, 5):
        padding = np.zeros(batch.tokens.shape, dtype=bool)
        for row, weights_of_row in enumerate(batch.weights):
            last = int(np.flatnonzero(weights_of_row)[-1])
            padding[row, last + 4 :] = True  # what ends a line, and the start token of nothing
        batch.tokens[padding] = token
        prepared = s.adapter.prepare(batch, ctx)
        assert prepared.denominators["tokens"] == learned > 0
        losses.append(weighted_loss(s.adapter(prepared).terms, prepared.denominators))
    torch.testing.assert_close(*losses, rtol=1e-5, atol=1e-6)
    losses[0].backward()
    assert losses[0].isfinite()


# -- scores ------------------------------------------------------------------------------------------------------------


def test_a_uniform_model_scores_log2_of_the_vocabulary_per_learned_token(words) -> None:
    dataset = load_dataset(config("gpt2", *sized("gpt2"), *words)[0])
    store, tokenizer = dataset.heldout, dataset.tokenizer
    found = score(TableAdapter(np.zeros((257, 257)), tokenizer), heldout_rows(store, tokenizer.eot, 200))
    learned, said = store.learned_in(np.arange(store.n_docs), 200)
    assert (found.tokens, found.bytes, found.of) == (learned.sum(), said.sum(), "answers")
    assert found.bits_per_byte == pytest.approx(math.log2(257) * learned.sum() / said.sum(), rel=1e-12)
    assert found.perplexity == pytest.approx(257, rel=1e-10) and found.comparable
    assert found.end_nats_per_document is None


def test_a_score_is_a_mean_over_learned_tokens_whatever_the_batch(words) -> None:
    """Against a sum by hand over the chats one by one, without rows or padding."""
    dataset = load_dataset(config("gpt2", *sized("gpt2"), *words)[0])
    store, tokenizer, table = dataset.heldout, dataset.tokenizer, random_table(257)
    log_p = table - np.log(np.exp(table).sum(1, keepdims=True))
    nats, count = 0.0, 0
    for chat in range(store.n_docs):
        place = slice(store.offsets[chat], store.offsets[chat + 1])
        ids, learned = np.asarray(store.tokens[place], dtype=int), store.answers[place] >= 0
        before = np.array([tokenizer.eot, *ids[:-1]])
        nats -= log_p[before, ids][learned].sum()
        count += learned.sum()
    for batch_rows in (1, 3, 64):
        rows = heldout_rows(store, tokenizer.eot, 200)
        found = score(TableAdapter(table, tokenizer), rows, batch_rows=batch_rows)
        assert found.nats_per_token == pytest.approx(nats / count, rel=1e-9)
        assert found.bits_per_byte == pytest.approx(nats / math.log(2) / store.total_bytes, rel=1e-9)
        assert found.perplexity == pytest.approx(math.exp(nats / count), rel=1e-9)
    ranks: list[list[float]] = []
    rows = heldout_rows(store, tokenizer.eot, 200)
    found = [score(TableAdapter(table, tokenizer), rows, world=Rank(n, 2, ranks)) for n in range(2)][-1]
    assert found.nats_per_token == pytest.approx(nats / count, rel=1e-9) and found.tokens == count


def test_eval_scores_the_answers_of_a_run_and_of_other_chats(whole, command, tmp_path) -> None:
    summary = json.loads((whole / "summary.json").read_text())["score"]
    out, err = command("eval", "--checkpoint", whole)
    assert json.loads(out)["score"]["perplexity"] == summary["perplexity"] and summary["of"] == "answers"
    assert "(answers)" in err and "another score than that of text" in err
    (tmp_path / "other.jsonl").write_text(json.dumps({"prompt": "1", "response": "é" * 5}) + "\n")
    out, _ = command("eval", "--checkpoint", whole, "--input_file", tmp_path / "other.jsonl")
    found = json.loads(out)
    assert (found["part"], found["score"]["bytes"], found["score"]["tokens"]) == ("all", 10, 11)
    (tmp_path / "plain.txt").write_text("not a chat")
    out, err = command("eval", "--checkpoint", whole, "--input_file", tmp_path / "plain.txt")
    assert json.loads(out)["score"]["of"] == "text" and "(answers)" not in err


def test_eval_reads_rows_of_other_fields_and_what_a_model_file_names(whole, command, tmp_path) -> None:
    (tmp_path / "alpaca.jsonl").write_text(json.dumps({"ask": "1", "more": "", "say": "é" * 5}) + "\n")
    words = ["eval", "--checkpoint", whole, "--input_file", tmp_path / "alpaca.jsonl"]
    _, err = command(*words, status=2)
    assert "text_field" in err
    out, _ = command(*words, "--text_field", "ask", "more", "say")
    assert (json.loads(out)["score"]["bytes"], json.loads(out)["score"]["of"]) == (10, "answers")
    out, _ = command(*words, "--text_field", "say", "--training_mode", "pretraining")
    assert (json.loads(out)["score"]["bytes"], json.loads(out)["score"]["of"]) == (10, "text")
    # A file beside the checkpoint says which text, where it names one.
    sizes = json.loads((whole / "config.json").read_text())["model_cfg"]
    (tmp_path / "more.jsonl").write_text(json.dumps({"ask": "2", "more": "", "say": "other"}) + "\n")
    text = {
        "data": "jsonl",
        "train_files": [str(tmp_path / "more.jsonl")],
        "val_files": [str(tmp_path / "alpaca.jsonl")],
        "text_field": ["ask", "more", "say"],
        "training_mode": "instruction_finetuning",
    }
    model = {"defaults": ["training", "_self_"], "type": "gpt2", "model_cfg": sizes, "train_seq_len": 32}
    for name, said in (("with.yaml", model | text), ("without.yaml", model)):
        (tmp_path / name).write_text(yaml.safe_dump(said, sort_keys=False))
    out, _ = command("eval", "--config", tmp_path / "with.yaml", "--checkpoint", whole)
    assert json.loads(out)["score"]["bytes"] == 10
    out, _ = command("eval", "--config", tmp_path / "without.yaml", "--checkpoint", whole)
    own, _ = command("eval", "--checkpoint", whole)
    assert json.loads(out) == json.loads(own)


@pytest.mark.parametrize(("precision", "tolerance"), [("no", 1e-6), ("bf16", 1e-3)])
def test_eval_gives_one_score_for_every_number_of_rows(whole, command, precision, tolerance) -> None:
    """Of a trained model: to rounding, which bf16 does to a part in a thousand of the perplexity."""
    words = ["eval", "--checkpoint", whole, "--mixed_precision", precision, "--batch_size"]
    one, three, sixteen = (json.loads(command(*words, rows)[0])["score"] for rows in (1, 3, 16))
    assert one["tokens"] == three["tokens"] == sixteen["tokens"]
    for other in (three, sixteen):
        assert other["perplexity"] == pytest.approx(one["perplexity"], rel=tolerance)
        assert other["bits_per_byte"] == pytest.approx(one["bits_per_byte"], rel=tolerance)


def test_no_yardstick_of_text_stands_beside_answers(whole) -> None:
    assert json.loads((whole / "summary.json").read_text())["yardsticks"] == {}


# -- questions and answers ---------------------------------------------------------------------------------------------


class Asked(list):
    """Prompts with their stops; `opened`: what of each prompt stands before its first answer."""


def answers(monkeypatch, said: list[str]):
    """Have models answer so, up to a stop, and tell what they were asked."""
    from adapters.default import DefaultModelAdapter

    asked, left = Asked(), iter(said)
    asked.opened = []

    def generate(self, prompts, options, on_tokens=None, on_state=None):
        from adapters.base import Generation

        asked.append((self.tokenizer.decode(prompts[0]).decode(), options.stop_ids))
        asked.opened.append(self.tokenizer.decode(prompts[0][: options.openings[0]]).decode())
        tokens = self.tokenizer.encode(next(left)).tolist()
        for row in range(len(prompts)):
            on_tokens(row, tokens)
        return Generation([tokens] * len(prompts), 1)

    monkeypatch.setattr(DefaultModelAdapter, "generate", generate)
    return asked


def test_generate_asks_in_the_template_by_default(whole, command, monkeypatch) -> None:
    asked = answers(monkeypatch, ["an answer"])
    out, err = command("generate", "--checkpoint", whole, "--prompt", "why?", "--system", "Be brief.")
    header = "<|im_start|>system\nBe brief.\n<|im_start|>user\nwhy?\n<|im_start|>assistant\n"
    assert (
        asked == [(header, (256,))]
        and asked.opened == [header]
        and out == "an answer\n"
        and "asked as ChatML has it" in err
    )


def test_generate_can_continue_text_all_the_same(whole, command) -> None:
    out, _ = command(
        "generate", "--checkpoint", whole, "--prompt", "why?", "--no_chat", "--max_new_tokens", 3
    )
    assert out.startswith("why?")


def test_a_chat_goes_on_over_turns_on_a_terminal(whole, command, monkeypatch) -> None:
    asked = answers(monkeypatch, ["one", "two"])

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr(sys, "stdin", Terminal("second?\n\nnever\n"))
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    command("generate", "--checkpoint", whole, "--prompt", "first?", "--chat")
    template, turns = ChatTemplate(load_dataset(config("gpt2")[0]).tokenizer), ["first?", "one", "second?"]
    expected = [Message(role, text) for role, text in zip(("user", "assistant", "user"), turns, strict=True)]
    first, second = (template.tokenizer.decode(template.prompt(expected[:n])).decode() for n in (1, 3))
    assert [text for text, _ in asked] == [first, second] and second.startswith(first)
    assert asked.opened == [first, first]


def test_ctrl_c_at_a_question_ends_the_chat(whole, command, monkeypatch) -> None:
    """A read goes on behind a signal, unless somebody raises."""
    answers(monkeypatch, ["one"])

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

        def readline(self, *_) -> str:
            signal.raise_signal(signal.SIGINT)
            return "asked all the same\n"

    monkeypatch.setattr(sys, "stdin", Terminal())
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    out, _ = command("generate", "--checkpoint", whole, "--prompt", "first?", "--chat")
    assert out == "one\n"


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ((), "no question, and no terminal"),
        (("--infill", "a ____", "--chat"), "infill fills gaps"),
        (("--prompt", "x", "--no_chat", "--system", "s"), "system belongs to a chat"),
        (
            ("--prompt", "x", "--ignore_document_end"),
            "an answer ends with its turn: leave it out, or --no_chat",
        ),
    ],
)
def test_bad_questions_are_refused(whole, command, monkeypatch, more, message) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    _, err = command("generate", "--checkpoint", whole, *more, status=2)
    assert message in err


@pytest.mark.parametrize(
    ("prompt", "asked"), [("why?", "<|im_start|>user\nwhy?\n"), ("", "<|im_start|>user\n")]
)
def test_samples_along_a_run_are_answers(words, monkeypatch, prompt, asked) -> None:
    from trainer.sample import sample_text

    s = session_of("gpt2", *sized("gpt2"), *words, f"sample_prompt={prompt}", "sample_tokens=5")
    heard = answers(monkeypatch, ["so"])
    drawn = sample_text(s, lambda: False)
    assert heard[0][0].startswith(asked) and heard[0][0].endswith("<|im_start|>assistant\n")
    assert drawn and drawn.text == heard[0][0] + "so" and drawn.tokens == len(drawn.text) - len(heard[0][0])
    assert heard[0][1] == (256,) and heard.opened == [heard[0][0]]


def test_the_example_makes_chats(tmp_path, monkeypatch) -> None:
    path = Path(__file__).parents[2] / "examples/make_chats.py"
    monkeypatch.setattr(sys, "argv", [str(path), str(tmp_path / "chats.jsonl"), "5"])
    runpy.run_path(str(path), run_name="__main__")
    rows = [json.loads(line) for line in (tmp_path / "chats.jsonl").read_text().splitlines()]
    chats = [messages_of(chat_document(row, "text", "here")) for row in rows]
    assert len(chats) == 5 and all(chat[-1].role == "assistant" for chat in chats)


def test_a_command_line_lists_fields() -> None:
    from configs.compose import compose
    from tests.contract.tiny import overrides

    given = ["data=jsonl", "train_files=x.jsonl", "text_field=[instruction,output]"]
    with pytest.raises(ConfigError, match="x.jsonl"):
        compose(overrides("gpt2", *given))
    assert config("gpt2", "text_field=[instruction,output]")[0].text_field == ["instruction", "output"]


def test_padded_text_trains_and_goes_on_as_it_began(tmp_path) -> None:
    words = ["packing=false", "num_iterations=4"]
    whole = run(tmp_path / "whole", words)
    run(tmp_path / "again", words, f"resume={whole / 'checkpoint-2'}")
    assert same(weights(whole / "final_model"), weights(tmp_path / "again/final_model"))
    with pytest.raises(
        ValueError, match="a place in packed text is none in padded rows. Go on with packing=false"
    ):
        run(tmp_path / "other", ["num_iterations=4"], f"resume={whole / 'checkpoint-2'}")


# -- bad input ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["training_mode=instruction_finetuning"], "data=synthetic does not have. Set data to one of jsonl"),
        (
            ["packing=false", "data=mix", "mix=[{data: embedded, weight: 1}]"],
            "packing=false pads documents of one",
        ),
        (["training_mode=chat"], "training_mode: .*instruction_finetuning"),
        (["text_field=[]"], "text_field"),
        (["text_field=[ask,say,ask]"], "text_field names 'ask' twice"),
    ],
)
def test_bad_fields_are_refused(given, message) -> None:
    with pytest.raises(ConfigError, match=message):
        config("gpt2", *given)
