"""A tiny model, forward and backward against fp64, saved, loaded, and shared by two processes: under a minute.

In processes of their own, as they also are in a run: `python -m trainer.doctor.self_test RESULTS STAGE ...`. What one
of them finds stands in RESULTS, a line for each step; what it does not come to, its end says.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer.doctor.lines import ROOT, Line, note, ok, problem, said_by

if TYPE_CHECKING:
    import torch

    from trainer.session import Session

__all__ = ["alone", "check", "shared"]

SECONDS = 55.0  # for everything
COMMAND = [sys.executable, "-m", "trainer.doctor.self_test"]
ALONE = ("forward", "backward", "save", "load")
RIGHT = 0.02  # of the largest gradient: GPUs multiply with 10 bits of mantissa
REMEDIES = {
    "forward": "see devices and kernels above; CUDA_VISIBLE_DEVICES= tries the CPU alone, kernels=reference (of a run) "
    "the plain definitions",
    "backward": "as for forward",
    "save": "TMPDIR=<a folder that can be written to> where it is the disk, see storage above",
    "load": "a disk or memory that changes bits: test both before any run",
}
OF_GLOO = (
    "torch.distributed must reach this machine itself: GLOO_SOCKET_IFNAME=lo, no firewall on the loopback"
)
OF_NCCL = "NCCL_DEBUG=INFO says more; NCCL_P2P_DISABLE=1 or NCCL_SHM_DISABLE=1; ddp_backend=gloo does without"
WORDS = [
    "--hydra_model_cfg=configs/vanilla.yaml",
    "preset=none",
    "data=synthetic",
    "synthetic_bytes=20000",
    "train_seq_len=32",
    "global_batch_size=4",
    "batch_size=2",
    "num_iterations=2",
    "mixed_precision=no",
    "torch_compile=false",
    "model_cfg.n_layers=2",
    "model_cfg.n_heads=2",
    "model_cfg.d_model=64",
]


def check() -> Iterator[Line]:
    with tempfile.TemporaryDirectory(prefix="mytrainer-doctor-") as folder:
        until = time.monotonic() + SECONDS
        found, ended = _run(Path(folder), [["alone"]], until)
        yield from _lines(ALONE, found[0], ended[0])
        if "backward" not in found[0] or found[0]["backward"].get("failed"):
            yield note("two processes (gloo)", "not tried, as one process does not get that far")
            return
        for backend in ["gloo", *(["nccl"] if _gpus() > 1 else [])]:
            found, ended = _run(Path(folder), [["shared", backend, str(rank)] for rank in range(2)], until)
            bad = next(
                (rank for rank in range(2) if found[rank].get("shared", {"failed": 1}).get("failed")), 0
            )
            yield _two(backend, found[bad].get("shared", {}), ended[bad])


def _gpus() -> int:
    import torch

    return torch.cuda.device_count()


def _lines(steps: tuple[str, ...], found: dict[str, dict[str, str]], ended: str) -> Iterator[Line]:
    """Of each step; behind the first that failed nothing was tried."""
    failed = ""
    for step in steps:
        result = found.get(step, {"failed": ended})
        if "said" in result:
            yield ok(step, result["said"])
        elif failed:
            yield note(step, f"not tried, as {failed} failed")
        else:
            failed = step
            yield problem(step, result["failed"], REMEDIES[step])


def _two(backend: str, found: dict[str, str], ended: str) -> Line:
    about = f"two processes ({backend})"
    if "said" in found:
        return ok(about, found["said"])
    return problem(about, found.get("failed", ended), OF_NCCL if backend == "nccl" else OF_GLOO)


def _run(
    folder: Path, works: list[list[str]], until: float
) -> tuple[list[dict[str, dict[str, str]]], list[str]]:
    """A process for each: what they found by step, and how each ended, by itself or at `until`."""
    results = [folder / f"{'-'.join(work)}.jsonl" for work in works]
    logs = [path.with_suffix(".log") for path in results]
    processes: list[subprocess.Popen[bytes]] = []
    ended = []
    try:
        group = {"WORLD_SIZE": str(len(works)), "LOCAL_WORLD_SIZE": str(len(works))}
        group |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port())}
        for rank, (work, result, log) in enumerate(zip(works, results, logs, strict=True)):
            result.touch()
            here = {"MYTRAINER_CACHE": str(folder / "cache")}  # nothing of it depends on what was cached
            here |= {**group, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            with open(log, "wb") as out:
                command = [*COMMAND, str(result), *work]
                processes.append(
                    subprocess.Popen(
                        command,
                        cwd=ROOT,
                        env={**os.environ, **here},
                        stdin=subprocess.DEVNULL,
                        stdout=out,
                        stderr=out,
                    )
                )
        for process, log in zip(processes, logs, strict=True):
            ended.append(_end_of(process, log, until))
    finally:
        for process in processes:
            process.kill()
            process.wait()
    return [_read(path) for path in results], ended


def _end_of(process: subprocess.Popen[bytes], log: Path, until: float) -> str:
    try:
        status = process.wait(max(0.1, until - time.monotonic()))
    except subprocess.TimeoutExpired:
        return f"not done after {SECONDS:.0f} s, all steps together"
    last = (log.read_text(encoding="utf-8", errors="replace").strip().splitlines() or [""])[-1]
    return f"the process ended with exit status {status}{last and f': {last}'}"


def _read(path: Path) -> dict[str, dict[str, str]]:
    """Step -> {"said" or "failed": text}; a line that was cut short is none."""
    found = {}
    for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
        if line.endswith("\n"):
            step, result = json.loads(line)
            found[step] = result
    return found


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


# -- in the processes ------------------------------------------------------------------------------------------------


def _session(device: str, *more: str, alone: bool) -> Session:
    import torch

    from configs.compose import compose
    from trainer.distributed import World, choose_device
    from trainer.session import open_session

    cfg, model_cfg = compose([*WORDS, f"device={device}", *more])
    local = 0 if alone else int(os.environ["LOCAL_RANK"])
    chosen = choose_device(cfg.device, local)
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    return open_session(cfg, model_cfg, World(chosen, cfg.ddp_backend, alone=alone))


def _gradient(s: Session) -> tuple[Any, dict[str, torch.Tensor]]:
    """Whether the first step's loss is not finite, and its gradients by name, on the CPU."""
    from trainer.step import accumulate_gradients

    batch = s.loader.load(0)
    names = sorted(batch.denominators)
    everywhere = dict(zip(names, s.world.add_up([batch.denominators[n] for n in names]), strict=True))
    losses: list[Any] = []

    def keep(output: Any) -> None:
        losses.append(sum(term.sum.item() / everywhere[term.denominator] for term in output.terms.values()))

    bad = accumulate_gradients(s, batch, everywhere, s.total_steps, keep)
    if bad.item():
        raise ArithmeticError("the loss of the first step is not finite")
    found = {
        name: p.grad.detach().cpu().clone()
        for name, p in s.adapter.named_model_parameters()
        if p.grad is not None
    }
    s.optimizers.zero_grad()
    return sum(losses), found


def alone(folder: Path) -> Iterator[tuple[str, str]]:
    """(step, what was found) one after the other; raises where one fails."""
    import torch

    from trainer.run.checkpoint import load_tensors, save_checkpoint
    from trainer.run.source import load_weights

    s = _session("auto", alone=True)
    device = s.world.device
    in_fp64 = _session("cpu", "kernels=reference", alone=True)
    in_fp64.adapter.load_state_dict(s.adapter.state_dict())
    in_fp64.adapter.double()
    loss, found = _gradient(s)
    exact_loss, exact = _gradient(in_fp64)
    off = abs(loss - exact_loss) / exact_loss
    if not off < RIGHT:
        raise ArithmeticError(f"the loss is {loss:.4f} on {device}, and {exact_loss:.4f} in fp64 on the CPU")
    yield "forward", f"on {device}: the loss is off by {off:.1e} of its value in fp64"
    worst = max((_off(found[name], exact[name]), name) for name in exact)
    if not worst[0] < RIGHT:
        raise ArithmeticError(f"the gradient of {worst[1]} is off by {worst[0]:.1e} of its largest value")
    torch.save(found, folder / "gradient.pt")
    yield "backward", f"gradients are off by at most {worst[0]:.1e} of the largest value in fp64"
    state = {name: tensor.clone() for name, tensor in s.adapter.trained_state().items()}
    began = time.perf_counter()
    saved = save_checkpoint(folder, 1, {"model.pt": state}, {})
    bytes_ = (saved / "model.pt").stat().st_size
    yield "save", f"{bytes_ / 1e3:.0f} kB, flushed to the disk in {time.perf_counter() - began:.2f} s"
    loaded = load_tensors(saved, "model.pt")
    with torch.no_grad():
        for parameter in s.adapter.parameters():
            parameter.zero_()
    load_weights(s.adapter, loaded, str(saved))
    now = s.adapter.trained_state()
    if differing := [name for name, tensor in state.items() if not torch.equal(tensor, now[name])]:
        raise ArithmeticError(f"{differing[0]} comes back otherwise than it was saved")
    yield "load", f"all {len(state)} tensors came back bit for bit"


def _off(found: torch.Tensor, exact: torch.Tensor) -> float:
    return ((found.double() - exact.double()).abs().max() / exact.abs().max().clamp(min=1e-12)).item()


def shared(folder: Path, backend: str) -> Iterator[tuple[str, str]]:
    """The gradient of the same step, half of its rows on each of two processes."""
    import torch

    from trainer.distributed import join_process_group, leave_process_group

    join_process_group()
    device = "cuda" if backend == "nccl" else "cpu"
    s = _session(device, f"ddp_backend={backend}", "batch_size=1", alone=False)
    _, found = _gradient(s)
    flat = torch.cat([gradient.flatten() for gradient in found.values()])
    if not all(torch.equal(flat, other) for other in s.world.gather(flat)):
        raise ArithmeticError("the two processes have other gradients")
    exact = torch.load(folder / "gradient.pt")
    worst = max((_off(found[name], exact[name]), name) for name in exact)
    if not worst[0] < RIGHT:
        raise ArithmeticError(f"the gradient of {worst[1]} is off by {worst[0]:.1e} of that of one process")
    yield "shared", f"equal gradients, off by at most {worst[0]:.1e} of the largest of one process"
    leave_process_group()


def main(results: str, stage: str, *more: str) -> int:
    """Exit status 1 where a step failed, having said so."""
    path = Path(results)
    steps: Callable[[], Iterator[tuple[str, str]]]
    steps = (lambda: alone(path.parent)) if stage == "alone" else (lambda: shared(path.parent, more[0]))
    left = list(ALONE) if stage == "alone" else ["shared"]
    try:
        for step, said in steps():
            _write(path, step, {"said": said})
            left.remove(step)
    except (Exception, SystemExit) as error:
        if left:
            _write(path, left[0], {"failed": said_by(error)})
        return 1
    return 0


def _write(path: Path, step: str, result: dict[str, str]) -> None:
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps([step, result]) + "\n")


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
