"""Everything a run is made of, put together once: data, rows, adapter, optimizer, EMA, loader.

`open_session` needs a validated configuration and a `World`; it touches no run folder, so `bench` uses it too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import nn

from adapters import adapter_class, build_adapter, own_tokenizer
from adapters.base import ModelAdapter, weighted_loss
from data import Dataset, load_dataset, unheard
from data.chats.rows import heldout_rows
from data.rows import HeldoutRows, TrainingRows
from kernels.choose import Kernels
from models.layers.recompute import recomputing
from naming import shorten
from trainer.batching import BatchPlan, StepLoader, divisors, plan_batch, plan_run
from trainer.distributed import World
from trainer.memory import largest_that_fits
from trainer.optim.ema import EMA
from trainer.optim.optimizers import Optimizers, build_optimizers
from trainer.optim.schedules import require_room_for_warmup
from trainer.optim.stages import common_rows, stages_of, steps_of_rows
from trainer.precision import LossScaler, autocast, choose_precision, should_compile, tune_host
from trainer.run.adapting import give_adapters

if TYPE_CHECKING:
    from configs.schema import ModelConfig, RunConfig
    from data.tokenizers import Tokenizer

__all__ = ["Session", "open_session", "total_steps"]

VARIANTS = 8  # of a block that are compiled: torch's own limit for one piece of code


@dataclass
class Session:
    cfg: RunConfig
    world: World
    dataset: Dataset
    rows: TrainingRows
    adapter: ModelAdapter
    wrapped: nn.Module  # the adapter, or DistributedDataParallel around it
    optimizers: Optimizers
    ema: EMA | None
    scaler: LossScaler
    plan: BatchPlan
    loader: StepLoader
    precision: str
    precision_reason: str
    compiled: bool
    not_compiled: str  # why, where it would be
    total_steps: int
    val_rows: int  # of a batch as `val_steps` counts: those that the run began with

    def heldout(self, max_bytes: int | None) -> HeldoutRows:
        cfg = self.cfg
        tokens = cfg.val_tokens
        if cfg.val_steps is not None:
            tokens = cfg.val_steps * self.val_rows * (cfg.val_seq_len or cfg.train_seq_len)
        return heldout_rows(
            self.dataset.heldout,
            self.dataset.tokenizer.eot,
            cfg.val_seq_len or cfg.train_seq_len,
            lookahead=self.adapter.data_spec().lookahead,
            max_bytes=max_bytes,
            max_tokens=tokens,
        )

    @contextmanager
    def averaged_weights(self) -> Iterator[None]:
        """Run the body with the average of the weights in the model, where there is one."""
        if self.ema is None:
            yield
            return
        with self.ema.swap():
            # An average of points of a set need not lie on it.
            self.adapter.constrain(torch.zeros((), device=self.world.device))
            yield

    def last(self, steps: int) -> None:
        """Have the run last so many steps."""
        self.total_steps = steps
        self.loader.stages = stages_of(self.cfg, steps)
        set_length(self.cfg, self.rows, steps)

    @property
    def may_take_fewer_rows(self) -> bool:
        """Whether the size of a micro-batch is ours to choose."""
        return self.cfg.batch_size == "auto" and self.cfg.gradient_accumulation_steps is None

    def smaller_sizes(self) -> list[int]:
        """Micro-batches below the present ones that fit into the steps of all stages."""
        share = common_rows(self.cfg) // self.world.size
        return [rows for rows in divisors(share) if rows < self.plan.micro_rows]

    def take_fewer_rows(self) -> None:
        """The next smaller micro-batches, from the next step on that is loaded."""
        self.plan = plan_run(self.cfg, self.smaller_sizes()[-1], self.world.size)
        self.loader.plan = self.plan

    def try_rows(self, rows: int) -> None:
        """Forward and backward pass of a micro-batch of so many rows beside the optimizers' state, by this process
        alone."""
        self.optimizers.allocate()
        _try_rows(self.cfg, self.world, self.rows, self.adapter, self.precision, rows)

    @property
    def parameters(self) -> list[nn.Parameter]:
        return [p for p in self.adapter.parameters() if p.requires_grad]


def total_steps(cfg: RunConfig, rows: TrainingRows) -> int:
    """Optimizer steps of the run: `num_epochs` over the training rows if set, else `num_iterations`."""
    if cfg.num_epochs is None:
        return cfg.num_iterations
    return max(1, steps_of_rows(cfg, rows.rows_of(cfg.num_epochs)))


def set_length(cfg: RunConfig, rows: TrainingRows, steps: int) -> None:
    """Tell the rows how long a run is that has so many steps."""
    rows.set_length(stages_of(cfg, steps).rows_before(steps) * cfg.train_seq_len, cfg.num_epochs)


def require_enough_text(cfg: RunConfig, rows: TrainingRows) -> None:
    """ValueError where `num_epochs` asks for less than one step."""
    if cfg.num_epochs is None or steps_of_rows(cfg, rows.rows_of(cfg.num_epochs)) >= 1:
        return
    passes = cfg.global_batch_size / rows.rows_per_epoch
    asked = math.floor(cfg.num_epochs * rows.rows_per_epoch)
    smaller = f"global_batch_size={asked}, " if asked else ""
    raise ValueError(
        f"num_epochs={cfg.num_epochs:g} is less than one step: the training text is {rows.rows_per_epoch:,} rows of "
        f"{rows.seq_len:,} tokens, and a step of global_batch_size {cfg.global_batch_size} passes over it {passes:.2g} "
        f"times. Set {smaller}a shorter train_seq_len, or num_iterations instead of num_epochs"
    )


def require_same_text(world: World, dataset: Dataset) -> None:
    """Refuse processes that read other text, as they may on machines with other files or another Python: each would
    train on, and score, rows of its own text under the numbers of the others'."""
    if world.agree(world.broadcast(dataset.fingerprint) != dataset.fingerprint):
        raise ValueError(
            "the processes of this run do not read the same text (its files, or with data=embedded the Python, differ "
            "between them). Give all of them the same files, such as a shared input_file"
        )


def open_session(
    cfg: RunConfig,
    model_cfg: ModelConfig,
    world: World,
    *,
    micro_rows: int | None = None,
    val_rows: int | None = None,
    tokenizer: Tokenizer | None = None,
    accept: Callable[[Tokenizer], None] | None = None,
    interruptible: Callable[[], AbstractContextManager[None]] = nullcontext,
    tell: Callable[[str], object] = unheard,
) -> Session:
    """`micro_rows`, `val_rows` and `tokenizer`: what a resumed run used, where the configuration leaves them open.
    `accept` is told of the tokenizer before a model is built for it, and raises ValueError where the weights to come
    know another.

    `interruptible`: around reading and tokenising the text on the first process, which may raise StopRequested there;
    the others wait for it, and raise it too. `tell` is called with what is being done, as it changes.
    """
    device = world.device
    tune_host(cfg, device)
    Kernels(cfg.kernels, deterministic=cfg.deterministic, device=device)  # refused before any text is read
    precision, reason = choose_precision(cfg.mixed_precision, device)
    compiled, not_compiled = should_compile(cfg.torch_compile, device)

    why = model_cfg.lacking()
    if world.agree(bool(why)):
        raise ValueError(why or "another process of this run lacks what its model stands on")

    def load() -> Dataset:
        with interruptible() if world.is_main else nullcontext():
            known = own_tokenizer(cfg, model_cfg) if tokenizer is None else tokenizer
            return load_dataset(cfg, unit=adapter_class(cfg).unit(model_cfg), tokenizer=known, tell=tell)

    dataset = world.main_first(load)  # it fills the caches of the tokenizer and the token shards
    require_same_text(world, dataset)
    if accept is not None:
        accept(dataset.tokenizer)
    tell("building the model")
    adapter = build_adapter(cfg, model_cfg, dataset.tokenizer, device)
    adapter.on_training_text(dataset.train)
    if cfg.use_lora:
        tell("reading the weights that are adapted")
        give_adapters(adapter, cfg, lambda text: None)  # who began the run was told
    spec = adapter.data_spec()
    rows = dataset.training_rows(cfg.train_seq_len, spec.lookahead, cfg.seed)
    steps = total_steps(cfg, rows)
    set_length(cfg, rows, steps)
    if not cfg.eval_only:
        require_enough_text(cfg, rows)
        require_room_for_warmup(steps, cfg)
    if cfg.gradient_checkpointing:
        _recompute_blocks(adapter)
    if compiled:
        _compile_blocks(adapter)
    optimizers = build_optimizers(
        adapter.named_model_parameters(), adapter.param_roles(), cfg, adapter.width, adapter.kernels
    )
    averaged = cfg.ema_decay and any(p.requires_grad for p in adapter.parameters())
    ema = EMA(adapter.named_model_parameters(), cfg.ema_decay) if averaged else None
    scaler = LossScaler(precision == "fp16", device)
    world.attach(adapter)
    wrapped = world.wrap(adapter)

    given = cfg.batch_size if isinstance(cfg.batch_size, int) else micro_rows
    plan = plan_run(cfg, given, world.size)
    if given is None and cfg.gradient_accumulation_steps is None and device.type == "cuda":
        plan = _probe(cfg, world, rows, adapter, optimizers, precision)
        adapter.kernels.used.clear()  # what other batches took is not what the run takes
    if cfg.use_lora and not cfg.eval_only:
        _try_rows(cfg, world, rows, adapter, precision, 1, partial(_require_gradients, adapter))
    loader = StepLoader(rows, adapter, plan, world.rank, cfg.seed, stages_of(cfg, steps))
    return Session(
        cfg=cfg,
        world=world,
        dataset=dataset,
        rows=rows,
        adapter=adapter,
        wrapped=wrapped,
        optimizers=optimizers,
        ema=ema,
        scaler=scaler,
        plan=plan,
        loader=loader,
        precision=precision,
        precision_reason=reason,
        compiled=compiled,
        not_compiled=not_compiled,
        total_steps=steps,
        val_rows=(val_rows if cfg.batch_size == "auto" else None) or plan.micro_rows,
    )


def _compile_blocks(adapter: ModelAdapter) -> None:
    """One by one. Blocks of one class share their code, and with it the number of variants that the compiler makes of
    it before it runs the rest eagerly: each may have as many as one alone could."""
    blocks, config = adapter.blocks(), torch._dynamo.config
    config.recompile_limit = max(config.recompile_limit, VARIANTS * len(blocks))
    # It fails on sums whose length happens to be the number of the elements behind them (pytorch#197077).
    torch._inductor.config.triton.coalesce_tiling_analysis = False
    for path in blocks:
        adapter.model.get_submodule(path).compile()


def _recompute_blocks(adapter: ModelAdapter) -> None:
    """Recompute each block's activations in backward instead of keeping them. The forward method is replaced,
    not the module, so that names in the state dict stay."""
    for path in adapter.blocks():
        block = adapter.model.get_submodule(path)
        block.forward = recomputing(block)  # type: ignore[method-assign]


def _probe(
    cfg: RunConfig,
    world: World,
    rows: TrainingRows,
    adapter: ModelAdapter,
    optimizers: Optimizers,
    precision: str,
) -> BatchPlan:
    """Find the largest micro-batch that fits beside the optimizer state; every process takes the smallest found."""
    optimizers.allocate()
    share = common_rows(cfg) // world.size
    fits = largest_that_fits(divisors(share), lambda n: _try_rows(cfg, world, rows, adapter, precision, n))
    fits = int(-world.maximum([-float(fits)])[0])
    return plan_run(
        cfg, fits or 1, world.size
    )  # the first step says what can be done about a row that does not fit


def _require_gradients(adapter: ModelAdapter) -> None:
    """After a backward pass: refuse adapters that the loss does not depend on."""
    idle = [name for name, p in adapter.named_model_parameters() if p.requires_grad and p.grad is None]
    if idle:
        raise ValueError(f"lora_targets: the loss does not depend on {shorten(idle)}. Leave them out")


def _try_rows(
    cfg: RunConfig,
    world: World,
    rows: TrainingRows,
    adapter: ModelAdapter,
    precision: str,
    n: int,
    look: Callable[[], None] = lambda: None,
) -> None:
    """Forward and backward pass of n rows, and a `look` at what they left."""
    plan = plan_batch(n * world.size, n, None, world.size, cfg.train_seq_len)
    batch = StepLoader(rows, adapter, plan, world.rank, cfg.seed).load(0, "most")
    adapter.on_step_start(batch.ctx, total_steps(cfg, rows))
    try:
        with autocast(precision, world.device):
            output = adapter(batch.micro[0].to(world.device))
        weighted_loss(output.terms, batch.denominators).backward()
        look()
    finally:
        adapter.zero_grad(set_to_none=True)
