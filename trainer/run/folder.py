"""What a run leaves behind, and who may write it: rank 0 alone, one run at a time.

config.yaml      written by the launcher before this starts
manifest.json metrics.jsonl samples.txt summary.json report.html
checkpoint-<step>/  best_model/  final_model/  and links to the newest checkpoint's files
"""

from __future__ import annotations

import json
import re
import shutil
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import filelock
import torch

from adapters.base import GenerateOptions
from configs.schema import redacted
from data.yardsticks import start_background
from trainer.errors import StopRequested, TrainingError
from trainer.optim.optimizers import role_table
from trainer.run.checkpoint import FORMAT, link_files, link_folder, prune, save_checkpoint, write_atomically
from trainer.run.manifest import collect_environment, peak_flops, peak_memory_bytes
from trainer.run.metrics import MetricsWriter
from trainer.run.progress import Progress
from trainer.view.console import Console
from trainer.view.format import bits_per_byte, quantity
from trainer.view.report import write_report

if TYPE_CHECKING:
    from trainer.distributed import World
    from trainer.evaluate import Score
    from trainer.session import Session
    from trainer.signals import StopSignal

__all__ = ["RunFolder"]


class RunFolder:
    """Use as a context manager. On ranks other than 0 every method does nothing."""

    def __init__(self, path: Path, world: World, config_yaml: str = "") -> None:
        self.path, self.world, self.config_yaml = Path(path), world, config_yaml
        self.console = Console(enabled=world.is_main)
        self._lock = filelock.FileLock(str(self.path / ".lock"))
        self._metrics: MetricsWriter | None = None
        self._yardsticks: Any = None
        self._sampled_at = -1
        self._started = time.monotonic()

    def __enter__(self) -> RunFolder:
        self.world.on_main(self._lock_folder)
        return self

    def _lock_folder(self) -> None:
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock.acquire(timeout=0)
        except filelock.Timeout:
            raise TrainingError(
                f"another run is writing to {self.path}. Wait for it, or choose another output_dir"
            ) from None
        except OSError as error:
            raise TrainingError(
                f"cannot write to {self.path}: {error.strerror or error}. Choose another output_dir"
            ) from error

    def refuse_to_overwrite(self) -> None:
        """A new run into a folder that holds another's results would mix or lose them."""
        there = [name for name in ("metrics.jsonl", "summary.json") if (self.path / name).exists()]
        if there:
            raise ValueError(
                f"{self.path} already holds a run ({', '.join(there)}). Add resume=auto to go on with it, or choose "
                f"another output_dir"
            )

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.console.close()
        if self._yardsticks is not None:
            self._yardsticks.close()
        if self.world.is_main:
            self._lock.release()
            if error is not None and {p.name for p in self.path.glob("*")} <= {".lock"}:
                shutil.rmtree(self.path, ignore_errors=True)  # a mistake leaves no folder behind

    # -- start ---------------------------------------------------------------------------------------------------

    def begin(self, s: Session, progress: Progress) -> None:
        if not self.world.is_main:
            return
        cfg = s.cfg
        self._metrics = MetricsWriter(self.path)
        self._metrics.truncate_after(progress.step)  # what a life cut short wrote after its last checkpoint
        self._sampled_at = self._drop_samples_after(progress.step)
        if self.config_yaml:
            write_atomically(self.path / "config.yaml", self.config_yaml)
        manifest = self._manifest(s)
        write_atomically(self.path / "manifest.json", json.dumps(manifest, indent=2) + "\n")
        counts = manifest["parameters"]
        for text in s.dataset.notes:
            self.console.note(text)
        self.console.banner(
            [
                f"{cfg.type} · {counts['total']:,} parameters "
                f"({', '.join(f'{role} {n:,}' for role, n in counts['by_role'].items())})",
                f"data {s.dataset.name}: {s.dataset.train.total_bytes / 1e6:.1f} MB to train on, "
                f"{s.dataset.heldout.total_bytes / 1e6:.2f} MB held out · tokenizer {s.dataset.tokenizer.name}, "
                f"{s.dataset.tokenizer.vocab_size:,} tokens",
                f"{s.total_steps:,} steps of {s.plan.rows} rows x {cfg.train_seq_len} tokens = "
                f"{quantity(s.total_steps * s.plan.rows * cfg.train_seq_len)} tokens "
                f"({s.plan.world_size} process{'es' if s.plan.world_size > 1 else ''} x {s.plan.accumulation} x "
                f"{s.plan.micro_rows} rows)",
                f"{self.world.device} · "
                + ("fp32" if s.precision == "no" else s.precision)
                + f" ({s.precision_reason}) · {'compiled blocks' if s.compiled else 'eager'} · {cfg.optimizer}",
                f"run folder {self.path}",
            ]
        )
        self._yardsticks = start_background(s.dataset, cfg.val_bytes)

    def _manifest(self, s: Session) -> dict[str, Any]:
        by_role: dict[str, int] = {}
        roles = role_table(
            s.adapter.named_model_parameters(), s.adapter.param_roles(), s.cfg, s.adapter.width
        )
        for row in roles:
            by_role[row["role"]] = by_role.get(row["role"], 0) + row["parameters"]
        flops = s.adapter.flops(s.cfg.train_seq_len)
        return {
            "type": s.cfg.type,
            "environment": collect_environment(self.world.device),
            "kernels": {"attention": "torch scaled_dot_product_attention", s.adapter.loss_kernel: "torch"},
            "precision": s.precision,
            "compiled": s.compiled,
            "execution": execution(s),
            "data": {
                "name": s.dataset.name,
                "fingerprint": s.dataset.fingerprint,
                "train_bytes": s.dataset.train.total_bytes,
                "heldout_bytes": s.dataset.heldout.total_bytes,
                "tokenizer": s.dataset.tokenizer.name,
                "tokenizer_digest": s.dataset.tokenizer.digest,
            },
            "parameters": {"total": sum(by_role.values()), "by_role": by_role},
            "roles": roles,
            "flops_per_token": {"forward": flops.forward_per_token, "training": flops.training_per_token},
            "argv": sys.argv,
        }

    # -- resume ----------------------------------------------------------------------------------------------------

    def check_resumable(self, s: Session, checkpoint: Path, saved: dict[str, Any]) -> None:
        """Refuse what would silently be another run; announce what changes results or rounding."""
        theirs = json.loads((checkpoint / "config.json").read_text())
        mine = _architecture(s)
        differing = [k for k in mine["model_cfg"] if mine["model_cfg"][k] != theirs["model_cfg"].get(k)]
        if theirs["type"] != mine["type"] or differing:
            what = ", ".join(f"{k} {theirs['model_cfg'].get(k)} -> {mine['model_cfg'][k]}" for k in differing)
            raise ValueError(
                f"the architecture is fixed by {checkpoint}/config.json (type {theirs['type']}): {what}"
            )
        for key, now in (
            ("fingerprint", s.dataset.fingerprint),
            ("tokenizer_digest", s.dataset.tokenizer.digest),
        ):
            if saved["data"][key] != now:
                raise ValueError(
                    f"the data is not what {checkpoint} was trained on ({key} {saved['data'][key][:12]} then, "
                    f"{now[:12]} now). Restore the data, or start a new run with init_from_checkpoint={checkpoint}"
                )
        before, after = saved["training_config"], redacted(s.cfg)
        changed = [k for k in after if k not in _NOT_COMPARED and before.get(k) != after[k]]
        for key in changed:
            self.console.note(f"changed since the checkpoint: {key} {before.get(key)} -> {after[key]}")
        for key, now in execution(s).items():
            then = saved["execution"].get(key)
            if then != now:
                self.console.note(
                    f"{key} was {then} and is {now}: equal to rounding from here, not bit for bit"
                )

    def resumed(self, checkpoint: Path, step: int, seconds: float) -> None:
        self.console.note(f"resumed {checkpoint.name} at step {step}, after {seconds:.0f} s of training")

    def finished(self, step: int) -> float | None:
        """The score a run ended with at this step, None if it has not been scored to the end."""

        def read() -> float | None:
            path = self.path / "summary.json"
            summary = json.loads(path.read_text()) if path.exists() else {}
            return summary["score"]["bits_per_byte"] if summary.get("steps") == step else None

        return self.world.on_main(read)

    # -- along the way -----------------------------------------------------------------------------------------------

    def log_step(self, line: dict[str, Any], s: Session) -> None:
        if not self.world.is_main or self._metrics is None:
            return
        peak = peak_flops(self.world.device)
        if peak:
            per_token = s.adapter.flops(s.cfg.train_seq_len).training_per_token
            line["mfu"] = line["tokens_per_second"] * per_token / (peak * self.world.size)
        self._metrics.write(line)
        self.console.step(line)

    def log_evaluation(self, progress: Progress, score: Score) -> None:
        if not self.world.is_main or self._metrics is None:
            return
        line = {
            "step": progress.step,
            "tokens": progress.tokens,
            "seconds": round(progress.seconds, 3),
            **{f"val_{k}": v for k, v in score.as_dict().items()},
        }
        self._metrics.write(line)
        self.console.evaluation(line)

    def log_raw_evaluation(self, progress: Progress, score: Score) -> None:
        """The score of the weights as they are, beside that of their average."""
        if not self.world.is_main or self._metrics is None:
            return
        fields = {f"val_raw_{k}": getattr(score, k) for k in ("bits_per_byte", "standard_error", "kind")}
        self._metrics.write({"step": progress.step, **fields})
        self.console.note(f"without averaging the weights: {bits_per_byte(score.as_dict())} bits/byte")

    def sample(self, s: Session, step: int, stop: StopSignal) -> None:
        """Append a text from the present weights to samples.txt, once per step."""
        if not self.world.is_main or not s.cfg.sample_tokens or self._sampled_at == step:
            return

        def check(row: int, tokens: list[int]) -> None:
            if stop.requested:
                raise StopRequested

        training = s.adapter.training
        s.adapter.eval()
        tokenizer = s.dataset.tokenizer
        prompt = tokenizer.encode(s.cfg.sample_prompt).tolist()
        options = GenerateOptions(
            max_new_tokens=s.cfg.sample_tokens,
            seed=s.cfg.seed,
            stop_at_document_end=False,
            steps=s.adapter.sample_steps,
        )
        try:
            with torch.random.fork_rng(devices=[]):
                new = s.adapter.generate([prompt], options, check).tokens[0]
        except StopRequested:
            return
        finally:
            s.adapter.train(training)
        text = tokenizer.decode(prompt + new).decode("utf-8", errors="replace")
        try:
            with open(self.path / "samples.txt", "a", encoding="utf-8") as file:
                file.write(f"--- step {step} ---\n{text}\n\n")
        except OSError as error:
            raise TrainingError(
                f"could not write {self.path / 'samples.txt'}: {error.strerror or error}"
            ) from error
        self._sampled_at = step

    def _drop_samples_after(self, step: int) -> int:
        """Forget the samples of a life cut short after its last checkpoint; returns the step of the last one kept."""
        path = self.path / "samples.txt"
        text = path.read_text(encoding="utf-8") if path.exists() else ""
        starts = [(int(m[1]), m.start()) for m in re.finditer(r"^--- step (\d+) ---$", text, re.MULTILINE)]
        late = [start for number, start in starts if number > step]
        if late:
            write_atomically(path, text[: late[0]])
        return max((number for number, _ in starts if number <= step), default=-1)

    def save(self, s: Session, progress: Progress, meter: dict[str, Any], *, best: bool) -> None:
        self.world.on_main(lambda: self._save(s, progress, meter, best))

    def _save(self, s: Session, progress: Progress, meter: dict[str, Any], best: bool) -> None:
        cfg = s.cfg
        tensors: dict[str, Any] = {
            "model.pt": s.adapter.model.state_dict(),
            "optimizer.pt": {
                "optimizers": s.optimizers.state_dict(),
                "scaler": s.scaler.state_dict(),
                "meter": meter,
            },
        }
        if s.ema:
            tensors["ema.pt"] = s.ema.state_dict()
        state = {
            "format": FORMAT,
            "step": progress.step,
            "tokens_seen": progress.tokens,
            "position": s.loader.position(progress.step),
            "optimizer_file": "optimizer.pt",
            "progress": progress.to_json(),
            "execution": execution(s),
            "data": {"fingerprint": s.dataset.fingerprint, "tokenizer_digest": s.dataset.tokenizer.digest},
            "training_config": redacted(cfg),
        }
        texts = {
            "config.json": json.dumps(_architecture(s), indent=2) + "\n",
            "training_state.json": json.dumps(state, indent=2) + "\n",
            "tokenizer.json": s.dataset.tokenizer.to_json(),
        }
        checkpoint = save_checkpoint(self.path, progress.step, tensors, texts)
        if best:
            link_folder(checkpoint, self.path / "best_model")
        link_files(checkpoint, self.path)
        prune(self.path, cfg.save_total_limit)

    # -- the end -----------------------------------------------------------------------------------------------------

    def stopped(self, step: int, signal_name: str, saved: bool) -> None:
        kept = f"saved step {step}" if saved and step else "nothing was saved"
        self.console.note(f"{signal_name or 'stop'} received: {kept}")
        if saved and step:
            self.console.note(f"go on with: python mytrainer.py resume={self.path}")

    def finish(self, s: Session, progress: Progress, score: Score) -> None:
        if not self.world.is_main:
            return
        newest = self.path / f"checkpoint-{progress.step}"
        if newest.exists() and not s.cfg.eval_only:
            link_folder(newest, self.path / "final_model")
        yardsticks = self._yardsticks.result() if self._yardsticks is not None else {}
        if s.dataset.entropy_bits_per_byte is not None:
            yardsticks["true entropy"] = s.dataset.entropy_bits_per_byte
        per_token = s.adapter.flops(s.cfg.train_seq_len).training_per_token
        summary: dict[str, Any] = {
            "type": s.cfg.type,
            "score": score.as_dict(),
            "weights": "averaged (EMA)" if s.ema else "raw",
            "precision": s.precision,
            "yardsticks": yardsticks,
            "steps": progress.step,
            "tokens": progress.tokens,
            "bytes": progress.bytes,
            "seconds": round(progress.seconds, 3),
            "seconds_total": round(time.monotonic() - self._started, 3),
            "tokens_per_second": progress.tokens / progress.seconds if progress.seconds else None,
            "peak_memory_bytes": peak_memory_bytes(self.world.device),
            "flops": per_token * progress.tokens,
        }
        write_atomically(self.path / "summary.json", json.dumps(summary, indent=2) + "\n")
        write_report(self.path)
        self.console.score_table(summary["score"], yardsticks)
        samples = (self.path / "samples.txt").read_text() if (self.path / "samples.txt").exists() else ""
        if samples:
            self.console.sample(samples.rsplit("--- step ", 1)[-1].split("\n", 1)[-1].strip("\n"))
        commands = [
            f"python mytrainer.py generate --checkpoint {self.path} --prompt 'def '",
            f"python mytrainer.py resume={self.path} num_iterations={2 * max(progress.step, 1)}",
        ]
        self.console.finish(self.path, commands if newest.exists() else [])


# Where a run is and how long it may go on do not make it another run.
# The architecture is compared apart.
_NOT_COMPARED = {
    "type",
    "model_cfg",
    "resume",
    "output_dir",
    "model_name",
    "preset",
    "env",
    "init_from_checkpoint",
}


def execution(s: Session) -> dict[str, Any]:
    """What bit-exact resume depends on beside the configuration."""
    return {
        "device": str(s.world.device.type),
        "world_size": s.world.size,
        "micro_rows": s.plan.micro_rows,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


def _architecture(s: Session) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "type": s.cfg.type,
        "model_adapter": s.cfg.model_adapter,
        "model_cfg": s.adapter.model_cfg.model_dump(mode="json"),
        "train_seq_len": s.cfg.train_seq_len,
        "batch_size": s.plan.micro_rows,
        "preset": s.cfg.preset,
    }
