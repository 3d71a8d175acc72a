"""The `eval` command: bits per byte of a trained model, printed and as JSON."""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from adapters.base import ModelAdapter
from configs.trust import trusting
from data import SOURCES, readers, source_of
from data.config import Mode
from data.huggingface.sets import HUB_NAME, is_saved
from data.scored import text_to_score
from naming import expand_path, shorten
from trainer.annotate import annotation_of
from trainer.bench.certify.certificate import Heard, certify, compare, other_environment, read_certificate
from trainer.bench.certify.certificate import lines as certificate_lines
from trainer.diagnose import non_finite
from trainer.run.files import output_file, write_atomically
from trainer.run.lines import refuse_taken_names_of_score
from trainer.run.restore import NO_RUN, Restored, add_checkpoint_arguments, named, restore_named
from trainer.signals import StopSignal
from trainer.view.console import Console
from trainer.view.format import bits_per_byte, ranking_notes, score_lines
from trainer.view.report import write_picture

if TYPE_CHECKING:
    from configs.schema import RunConfig

__all__ = ["main"]


# What a certificate keeps of the command line, to score the same again.
REPEATED = (
    *("checkpoint", "raw", "hydra_model_cfg", "device", "mixed_precision", "overrides"),
    *("data", "input_file", "dataset", "split", "text_field", "training_mode", "near_copies"),
    *("val_seq_len", "val_bytes", "max_samples", "batch_size"),
)
# What may be given beside a certificate: where the weights lie now, and what one may decide anew.
BESIDE_VERIFY = ("checkpoint", "model_name", "trust", "device", "verify")


def main(argv: list[str]) -> int:
    """`python mytrainer.py eval`: score a checkpoint on held-out text."""
    parser = _parser()
    args = parser.parse_args(argv)
    return _verify(parser, args) if args.verify else _evaluate(args)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python mytrainer.py eval",
        description="Bits per byte of a trained model on the held-out documents of its run, or of other text.",
    )
    add_checkpoint_arguments(parser)
    parser.add_argument("--data", choices=list(SOURCES), help="score other data than the run's")
    parser.add_argument(
        "--input_file", help="score all of this file or folder; of the run's own text the held-out part"
    )
    parser.add_argument(
        "--dataset", help="a source, a file or folder, or a data set of Hugging Face, whichever the name is"
    )
    parser.add_argument("--split", help="all of this split of a data set (default: the run's eval_split)")
    parser.add_argument(
        "--text_field", nargs="+", help="the field with the text, or several (default: the run's)"
    )
    parser.add_argument(
        "--training_mode",
        choices=get_args(Mode),
        help="whether documents are texts or chats (default: the run's)",
    )
    parser.add_argument(
        "--near_copies", choices=("drop", "keep"), help="held-out text that stands in training"
    )
    parser.add_argument("--val_seq_len", type=int, help="context in tokens (default: the run's)")
    parser.add_argument("--val_bytes", type=int, help="score at most this many bytes of whole documents")
    parser.add_argument("--max_samples", type=int, help="score at most so many documents")
    parser.add_argument("--batch_size", type=int, help="rows per forward pass (default: the run's)")
    parser.add_argument("--output", help="also write the result to this JSON file")
    parser.add_argument(
        "--picture",
        help="draw into this HTML file what the model did with a sample of the text; --output keeps its data too",
    )
    certificate = parser.add_mutually_exclusive_group()
    certificate.add_argument(
        "--certify",
        metavar="FILE.json",
        help="also check that the score means what it says (causality, normalisation, bytes, bounds, repeatability), "
        "and write that here; status 1 where a check fails",
    )
    certificate.add_argument(
        "--verify",
        metavar="FILE.json",
        help="do again what such a file says, and tell what of it no longer holds; status 1 where something does not",
    )
    return parser


def _evaluate(args: argparse.Namespace, kept: dict[str, Any] | None = None) -> int:
    """`kept`: a certificate, to be compared with what comes out now."""
    for name in ("val_seq_len", "val_bytes", "max_samples", "batch_size"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise ValueError(f"{name}: must be at least 1, got {getattr(args, name)}")
    if args.dataset is not None and (args.data or args.input_file):
        raise ValueError("dataset: it says what --data and --input_file say. Leave out one or the other")
    if args.dataset is not None:
        _read_dataset(args)
    if args.input_file and args.data is None:
        args.data = source_of("input_file", args.input_file)
    if args.input_file and args.data not in readers("input_file"):
        those = " or ".join(f"--data {name}" for name in readers("input_file"))
        raise ValueError(f"input_file is read by {those} only. Add {those}")
    output = output_file(args.output) if args.output else None
    picture = output_file(args.picture, "picture") if args.picture else None
    if picture and output and picture == output:
        raise ValueError(f"picture: {picture} is the file of --output too. Give another")

    certificate = output_file(args.certify, "certify") if args.certify else None
    if certificate and certificate in (output, picture):
        raise ValueError(f"certify: {certificate} is the file of another option too. Give another")

    restored = restore_named(args, {"val_seq_len": args.val_seq_len} if args.val_seq_len else {})
    cfg, checkpoint = restored.cfg, restored.checkpoint
    adapter = type(restored.adapter)
    if picture and adapter.annotate is ModelAdapter.annotate:
        raise ValueError(
            f"picture: {adapter.__name__} of type={cfg.type} has nothing to draw of a text (it defines no annotate). "
            f"Leave picture out"
        )
    if broken := non_finite(restored.adapter):
        known_so_far = {"checkpoint": str(checkpoint), "type": cfg.type, "weights": restored.weights}
        none = dict.fromkeys(("avg_loss", "perplexity", "score"))
        return _no_score(
            known_so_far | none, f"{checkpoint} holds weights that are not finite: {shorten(broken)}", output
        )
    source = restored.source
    trained_on = source.data if source else None
    known = source is None or trained_on is not None
    console = Console(live=False, stream=sys.stderr)
    with console.doing("reading the text"):
        beside = _of_file(args, cfg)  # scored as a run of it would be
        asked, split = _asked(args, cfg.model_copy(update=beside) if beside else cfg), _split(args, cfg)
        if split is not None:
            asked = asked.model_copy(update={"dataset_split": split, "eval_split": None})
        run = asked if beside else cfg if known else None
        trained_on = None if beside else trained_on
        text = text_to_score(run, asked, restored.tokenizer, trained_on, whole=split is not None)
    limit = args.val_bytes or (None if text.whole or args.max_samples else cfg.val_bytes)
    rows = restored.rows(text.store, limit, max_documents=args.max_samples)
    heard = Heard()
    with StopSignal("leaving without a score") as stop, console.doing("scoring"):
        score = restored.score(
            rows, args.batch_size, should_stop=lambda: stop.requested, estimates=True, hear=heard.hear
        )
    if score is None:
        print(f"{stop.name} received: stopped before the score was complete", file=sys.stderr)
        return 0
    refuse_taken_names_of_score(restored.adapter, score)
    result = {
        "checkpoint": str(checkpoint) if checkpoint else None,
        "type": cfg.type,
        "weights": restored.weights,
        "data": text.name,
        "part": "all" if text.whole else "held out",
        "dataset": text.name,
        "split": split or (None if text.whole else "held out"),
        "num_samples": score.documents,
        "num_tokens": score.tokens,
        "avg_loss": score.nats_per_token,
        "perplexity": score.perplexity,
        "non_causal_routing": score.non_causal_routing,
        "data_fingerprint": text.fingerprint,
        "overlap": text.overlap and text.overlap.as_dict(),
        "precision": restored.precision,
        "score": score.as_dict(),
    }
    if not math.isfinite(score.bits_per_byte):
        told = f"the score of {checkpoint} is {score.bits_per_byte}. Try --mixed_precision no"
        return _no_score(result, told, output)
    if certificate or kept:
        with console.doing("certifying") as doing:
            made = certify(
                restored,
                rows,
                score,
                heard,
                _request(args, restored),
                lambda targets: restored.rows(text.store, limit, targets, args.max_samples),
                lambda what: doing(f"checking {what}"),
            )
        if kept:
            return _tell_whether(kept, made)
        assert certificate is not None
        write_atomically(certificate, json.dumps(made, indent=2) + "\n")
        result["certificate"] = {"file": str(certificate), "certified": made["certified"]}
    drawn, written = "", result
    if picture:
        context = cfg.val_seq_len or cfg.train_seq_len
        found = annotation_of(restored.adapter, text.store, context, restored.precision)
        written = result | {"annotation": found}
        drawn = _draw(picture, f"{cfg.type} on {text}", found)
    if output:  # before anything is printed: nobody may be reading that to its end
        write_atomically(output, json.dumps(_without_nan(written), indent=2) + "\n")
    whence = f" of {checkpoint}" if checkpoint and not known else ""
    print(f"{cfg.type} ({restored.weights} weights{whence}) on {text}", file=sys.stderr)
    if restored.weights == "untrained":
        print("  no checkpoint was given: this is the model before any training", file=sys.stderr)
    shown = score.as_dict()
    lines = [
        ("Dataset", text.name),
        ("Split", result["split"] or "all"),
        ("Samples", f"{score.documents:,}"),
        ("Tokens", f"{score.tokens:,}"),
        ("Avg Loss", f"{score.nats_per_token:.6f}"),
        ("Perplexity", f"{score.perplexity:.4f}"),
        ("bits per byte", bits_per_byte(shown)),
        *score_lines(shown),
    ]
    lines += [("picture", drawn)] if drawn else []
    for name, value in lines:
        print(f"  {name:<18}{value}", file=sys.stderr)
    for note in [*ranking_notes(shown, {}), *text.notes]:
        print(f"  {note}", file=sys.stderr)
    if certificate:
        print(f"{'certified' if made['certified'] else 'NOT CERTIFIED'}: {certificate}", file=sys.stderr)
        for line in certificate_lines(made):
            print(f"  {line}", file=sys.stderr)
    print(json.dumps(_without_nan(result)))
    return 0 if not certificate or made["certified"] else 1


def _request(args: argparse.Namespace, restored: Restored) -> dict[str, Any]:
    """What scores the same again from any folder: the arguments that were given, and the weights that they named."""
    found = {name: value for name in REPEATED if (value := getattr(args, name)) not in (None, False, [])}
    if restored.checkpoint:
        found["checkpoint"] = str(restored.checkpoint.absolute())
    for name in ("input_file", "hydra_model_cfg"):
        if name in found:
            found[name] = _absolute(found[name])
    found["device"] = restored.device.type
    return found


def _absolute(given: str) -> str:
    """A path that is there, from the root; what else it may be (a name of ours) as it is."""
    path = expand_path(given)
    return str(path.absolute()) if path.exists() else given


def _verify(parser: argparse.ArgumentParser, args: argparse.Namespace) -> int:
    """Do again what a certificate says, and tell what of it no longer holds."""
    beside = [
        name
        for name, value in vars(args).items()
        if name not in BESIDE_VERIFY and value != parser.get_default(name) and value != []
    ]
    if beside:
        raise ValueError(
            f"verify: what is scored is as {args.verify} says. Leave out {', '.join(f'--{name}' for name in beside)}; "
            f"beside it may stand {', '.join(f'--{name}' for name in BESIDE_VERIFY[:-1])}"
        )
    kept = read_certificate(expand_path(args.verify))
    again = parser.parse_args([])
    request = kept["request"]
    if not isinstance(request, dict) or (strange := sorted(request.keys() - {*REPEATED})):
        raise ValueError(f"verify: {args.verify} asks for what eval does not have: {strange or request}")
    for name, value in request.items():
        setattr(again, name, _of_type(parser, name, value, args.verify))
    if given := named(args):
        again.checkpoint = given
    again.trust = args.trust
    if args.device != parser.get_default("device"):
        again.device = args.device
    if again.dataset is not None:  # which the command has read into these already
        again.data = again.input_file = None
    return _evaluate(again, kept)


def _of_type(parser: argparse.ArgumentParser, name: str, value: Any, file: str) -> Any:
    """A value as the command line would give it."""
    option = next(action for action in parser._actions if action.dest == name)
    wanted = bool if option.nargs == 0 else option.type or str
    values = value if option.nargs in ("*", "+") else [value]
    if not isinstance(values, list) or not all(type(one) is wanted for one in values):
        raise ValueError(f"verify: {file} says {name}={value!r}, which is no value of --{name}")
    return value


def _tell_whether(kept: dict[str, Any], made: dict[str, Any]) -> int:
    """Print what no longer holds, and the result of both as JSON on stdout."""
    gone = compare(kept, made)
    for line in certificate_lines(made):
        print(f"  {line}", file=sys.stderr)
    for line in gone:
        print(f"no longer holds: {line}" if kept["certified"] else f"does not hold: {line}", file=sys.stderr)
    for line in other_environment(kept, made):
        print(f"note: {line}", file=sys.stderr)
    if not gone:
        print(f"the certificate of {kept['made']} holds", file=sys.stderr)
    print(json.dumps({"holds": not gone, "no_longer_holds": gone, "score": made["score"]}))
    return 1 if gone else 0


def _no_score(result: dict[str, Any], why: str, output: Path | None) -> int:
    """Say that there is none, in the result too, whose numbers that are none are null."""
    text = json.dumps(_without_nan(result) | {"error": why})
    if output:
        write_atomically(output, text + "\n")
    print(f"error: {why}", file=sys.stderr)
    print(text)
    return 1


def _without_nan(value: Any) -> Any:
    """JSON has no number that is not finite."""
    if isinstance(value, dict):
        return {key: _without_nan(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_without_nan(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _draw(path: Path, title: str, found: dict[str, Any]) -> str:
    """Write the page; what is in it, and where it is."""
    if not found:
        return "nothing to draw: the model, as it is configured, shows nothing of a text"
    write_picture(path, title, found)
    number = len(found["spans"]) + len(found["maps"])
    first = (found["spans"] or found["maps"])[0]["name"]
    return (
        f"{first}{f' and {number - 1} more' if number > 1 else ''}, of {len(found['tokens'])} tokens: {path}"
    )


def _read_dataset(args: argparse.Namespace) -> None:
    """Put what `--dataset` names where `--data` and `--input_file` have it. A set of Hugging Face stays there alone."""
    given = args.dataset
    if given in SOURCES:
        args.data = given
    elif (path := expand_path(given)).is_file() or (
        path.is_dir() and args.split is None and not _is_set(path)
    ):
        args.input_file = given
    elif path.is_dir() or ("/" in given and HUB_NAME.fullmatch(given)):
        args.data = "hf"
    else:
        raise ValueError(
            f"dataset: {given!r} is no file or folder here (looked from {Path.cwd()}), no set of the hub (owner/name), "
            f"and none of {', '.join(SOURCES)}"
        )


def _is_set(folder: Path) -> bool:
    """Whether `datasets` saved it, or it holds files that it reads and no text."""
    if is_saved(folder):
        return True
    endings = {file.suffix for file in folder.iterdir() if file.is_file()}
    return bool(endings & {".arrow", ".json"}) and ".txt" not in endings


def _split(args: argparse.Namespace, run: RunConfig) -> str | None:
    """The split that is scored whole; None where that is for the source to say."""
    data = args.data or run.data
    if args.split is not None and data != "hf":
        raise ValueError(
            f"split: {args.split!r} is of a data set of Hugging Face, and the text is data={data}. Leave it out, or "
            f"name one by --dataset"
        )
    another = args.dataset is not None and args.dataset not in SOURCES and data == "hf"
    return args.split or (run.eval_split if another else None)


def _asked(args: argparse.Namespace, run: RunConfig) -> RunConfig:
    """The data to score; `run` itself where none is named. A path is looked for from here, not in the run's folder."""
    changes: dict[str, Any] = {}
    if args.text_field:
        changes["text_field"] = args.text_field[0] if len(args.text_field) == 1 else args.text_field
    if args.training_mode:
        changes["training_mode"] = args.training_mode
    if args.data:
        changes["data"] = args.data
    if args.input_file:
        changes |= dict.fromkeys(("train_files", "val_files") if args.data != "text" else ())
        changes |= {"input_file": args.input_file, "data_root": None}
    if args.data == "hf" and args.dataset not in (None, *SOURCES):
        changes |= {"dataset_name": args.dataset, "data_root": None}
        changes |= {} if args.dataset == run.dataset_name else {"dataset_subset": None}
    if args.near_copies or args.data not in (None, run.data):
        changes["near_copies"] = args.near_copies
    return run.model_copy(update=changes) if changes else run


def _of_file(args: argparse.Namespace, run: RunConfig) -> dict[str, Any]:
    """What a model file beside a checkpoint says of the text, where it names one; nothing where the arguments do."""
    from configs.compose import compose

    if not (args.hydra_model_cfg and named(args)) or args.data:
        return {}
    file = f"--hydra_model_cfg={args.hydra_model_cfg}"
    with trusting(args.trust):
        other, _ = compose([file, "preset=none", *NO_RUN], notify=lambda text: None)
    if other.data == type(other).model_fields["data"].default:
        return {}
    read = {"data", "near_copies", "training_mode", *SOURCES[other.data].reads}
    return {name: getattr(other, name) for name in read if getattr(other, name) != getattr(run, name)}
