"""Operations worth more than a composition of library calls: one folder each, with its plain definition.

The table of them, as strings: reading it imports no torch. Which implementation runs is decided in kernels/choose.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from naming import Entry, not_one_of

__all__ = [
    "AUTO",
    "CHUNKED",
    "CLOSED_FORM",
    "CPP",
    "KERNELS",
    "REFERENCE",
    "TRITON",
    "Implementation",
    "Kernel",
    "problems",
]

AUTO, REFERENCE, CHUNKED, TRITON = "auto", "reference", "chunked", "triton"
CLOSED_FORM, CPP = "closed_form", "cpp"
LIBRARIES = ("flash_attn", "mamba_ssm", "liger", "fla")  # an operation that one of them computes names it so


@dataclass(frozen=True)
class Implementation:
    """One way to compute an operation; `where` is "module:function", of the signature that all of them share.

    What it can do is said here and nowhere else: `devices` by type and `dtypes` by name (empty: any), the `package` it
    needs, the least compute `capability`. `adds_in_any_order`: floats are added by atomics, so that two runs differ;
    `deterministic` excludes it. `refuses`: "module:function", called with a `kernels.choose.Call`, returns why that
    call is beyond it, or None. `source`: a file below kernels/ that must be compiled on this machine (kernels/cpp.py).
    `host_syncs`: operations in it that wait for an accelerator, by name, as in
    `ModelAdapter.host_syncs`.
    """

    where: str
    devices: tuple[str, ...] = ()
    dtypes: tuple[str, ...] = ()
    package: str | None = None
    capability: tuple[int, int] = (0, 0)
    adds_in_any_order: bool = False
    refuses: str | None = None
    source: str | None = None
    host_syncs: tuple[str, ...] = ()


def by_triton(where: str, **more: object) -> Implementation:
    """A kernel of our own: bf16, fp16 and fp32 on NVIDIA GPUs from Ampere on."""
    return Implementation(
        where,
        devices=("cuda",),
        dtypes=("bfloat16", "float16", "float32"),
        package="triton",
        capability=(8, 0),
        **more,  # type: ignore[arg-type]
    )


def by_cpp(where: str, source: str) -> Implementation:
    """A kernel of our own for CPUs, in C++."""
    return Implementation(where, devices=("cpu",), dtypes=("bfloat16", "float32"), source=source)


@dataclass(frozen=True)
class Kernel(Entry):
    """One operation.

    `factory` is the function that models and adapters call; its module has a `SPEC` (kernels/spec.py), if the operation
    has more than its definition. `implementations` by name; `reference` is the plain definition. What `auto` takes:
    where `compiled_with_neighbours`, the reference inside compiled blocks, because the compiler fuses it with what
    surrounds it; on a GPU `triton`, where it is `for_memory` or its measured speed is committed (kernels/tuned.py);
    then `cpp` and `closed_form`, where they run; then `chunked`, where the logits of all rows are larger than
    `plain_bytes`; else the reference. `rule`:
    "module:function", called with a `Call` and a function that says of an implementation why it cannot run it ("" if it
    can), returns (name, why) in place of all that.

    `chunk_bytes`: the size of the logits that exist at once, by type of device, in the dtype that an implementation
    holds them in: that of statistics in torch (beside the product's own, where that is narrower), the product's in
    Triton; `plain_bytes` likewise, of all rows. A type that is not named is taken for "cuda".
    """

    implementations: Mapping[str, Implementation] = field(default_factory=dict)
    chunk_bytes: Mapping[str, int] = field(default_factory=dict)
    plain_bytes: Mapping[str, int] = field(default_factory=dict)
    compiled_with_neighbours: bool = False
    for_memory: bool = False
    rule: str | None = None


KERNELS: dict[str, Kernel] = {
    # On a CPU it is a matter of caches: D = 192, V = 1,025 (head of 1,152 rows), one thread, forward and backward,
    # reference : chunks of 8 MiB : of 24: 4,096 rows (19 MB) 100 : 89 : 101 ms fp32, 36 : 46 : 47 bf16; 8,192 rows
    # 195 : 163 : 200, 126 : 77 : 111; 16,384 rows 408 : 335 : 358, 385 : 169 : 200. On a GPU it is a matter of memory,
    # and of products large enough.
    "linear_cross_entropy": Kernel(
        "kernels.linear_cross_entropy:linear_cross_entropy",
        description="output layer and cross-entropy",
        implementations={
            REFERENCE: Implementation("kernels.linear_cross_entropy.reference:reference"),
            CHUNKED: Implementation("kernels.linear_cross_entropy.chunked:chunked"),
            TRITON: by_triton("kernels.linear_cross_entropy.triton:linear_cross_entropy"),
        },
        chunk_bytes={"cpu": 8 * 2**20, "cuda": 512 * 2**20, "mps": 256 * 2**20},
        plain_bytes={"cpu": 24 * 2**20, "cuda": 512 * 2**20, "mps": 256 * 2**20},
        for_memory=True,
    ),
    # Some modes hold three buffers of this size. On a CPU chunks that stay in its cache are faster: 4,096 rows,
    # V = 1,025, D = 192, one thread, masked cross-entropy: 75 ms in chunks of 1 or 2 MiB, 104 ms in one of 16.
    "linear_diffusion_loss": Kernel(
        "kernels.linear_diffusion_loss:linear_diffusion_loss",
        description="output layer and the losses of discrete diffusion",
        implementations={
            REFERENCE: Implementation("kernels.linear_diffusion_loss.reference:reference"),
            CHUNKED: Implementation("kernels.linear_diffusion_loss.chunked:chunked"),
            TRITON: by_triton("kernels.linear_diffusion_loss.triton:linear_diffusion_loss"),
        },
        chunk_bytes={"cpu": 2 * 2**20, "cuda": 512 * 2**20, "mps": 256 * 2**20},
        for_memory=True,
    ),
    # The function holds a handful of tensors of this size, some of them in fp64.
    "linear_function_loss": Kernel(
        "kernels.linear_function_loss:linear_function_loss",
        description="output layer and a loss given as a function of logits",
        implementations={
            REFERENCE: Implementation("kernels.linear_function_loss.reference:reference"),
            CHUNKED: Implementation("kernels.linear_function_loss.chunked:chunked"),
        },
        chunk_bytes={"cuda": 64 * 2**20},
    ),
    "grouped_linear": Kernel(
        "kernels.grouped_linear:grouped_linear",
        description="rows in groups, each times a matrix of its own",
        implementations={
            REFERENCE: Implementation(
                "kernels.grouped_linear.reference:reference", host_syncs=("_to_copy", "_local_scalar_dense")
            ),
            "by_groups": Implementation("kernels.grouped_linear.by_groups:by_groups", devices=("cpu",)),
            "grouped_mm": Implementation(
                "kernels.grouped_linear.grouped_mm:grouped_mm",
                devices=("cpu", "cuda", "meta"),
                dtypes=("bfloat16", "float16", "float32"),
                refuses="kernels.grouped_linear:refused_by_grouped_mm",
            ),
        },
        rule="kernels.grouped_linear:choose",
    ),
    "causal_conv1d": Kernel(
        "kernels.causal_conv1d:causal_conv1d",
        description="short convolution over tokens, channel by channel",
        implementations={
            REFERENCE: Implementation("kernels.causal_conv1d.reference:reference"),
            CLOSED_FORM: Implementation(
                "kernels.causal_conv1d.closed_form:closed_form", devices=("cpu",), host_syncs=("nonzero",)
            ),
            CPP: by_cpp("kernels.causal_conv1d.cpp:causal_conv1d", "causal_conv1d/conv.cpp"),
            TRITON: by_triton("kernels.causal_conv1d.triton:causal_conv1d"),
        },
        compiled_with_neighbours=True,
    ),
    "ssd": Kernel(
        "kernels.ssd:ssd",
        description="states whose decay is one number a head (version 2 of mamba)",
        implementations={
            REFERENCE: Implementation("kernels.ssd.reference:reference"),
            CHUNKED: Implementation("kernels.ssd.chunked:chunked"),
            CPP: by_cpp("kernels.ssd.cpp:cpp", "ssd/passes.cpp"),
        },
        rule="kernels.ssd:choose",
    ),
    "newton_schulz": Kernel(
        "kernels.newton_schulz:newton_schulz",
        description="orthogonalised matrices, for Muon",
        implementations={
            REFERENCE: Implementation("kernels.newton_schulz.reference:reference"),
            TRITON: by_triton("kernels.newton_schulz.triton:newton_schulz"),
        },
    ),
    "layer_norm": Kernel(
        "kernels.layer_norm:layer_norm",
        description="normalisation to mean 0 and variance 1, of a residual sum if wanted",
        implementations={
            REFERENCE: Implementation("kernels.layer_norm.reference:reference"),
            TRITON: by_triton("kernels.layer_norm.triton:layer_norm", refuses="kernels.rms_norm:too_wide"),
        },
        compiled_with_neighbours=True,
    ),
    "qk_norm_rope": Kernel(
        "kernels.qk_norm_rope:qk_norm_rope",
        description="normalisation and rotation of queries and keys",
        implementations={
            REFERENCE: Implementation("kernels.qk_norm_rope.reference:reference"),
            CLOSED_FORM: Implementation(
                "kernels.qk_norm_rope.closed_form:closed_form",
                devices=("cpu",),
                refuses="kernels.qk_norm_rope:refused_by_closed_form",
            ),
            TRITON: by_triton("kernels.qk_norm_rope.triton:qk_norm_rope"),
        },
        compiled_with_neighbours=True,
    ),
    "ngpt_update": Kernel(
        "kernels.ngpt_update:ngpt_update",
        description="step of nGPT from one hidden state to the next",
        implementations={
            REFERENCE: Implementation("kernels.ngpt_update.reference:reference"),
            TRITON: by_triton("kernels.ngpt_update.triton:ngpt_update", refuses="kernels.rms_norm:too_wide"),
        },
        compiled_with_neighbours=True,
    ),
    "selective_scan": Kernel(
        "kernels.selective_scan:selective_scan",
        description="recurrence of states whose decay the input chooses, for mamba",
        implementations={
            REFERENCE: Implementation("kernels.selective_scan.reference:reference"),
            CHUNKED: Implementation("kernels.selective_scan.chunked:chunked"),
            CPP: by_cpp("kernels.selective_scan.cpp:cpp", "selective_scan/scan.cpp"),
            TRITON: by_triton("kernels.selective_scan.triton:selective_scan"),
        },
        rule="kernels.selective_scan:choose",
    ),
    "linear_scan": Kernel(
        "kernels.linear_scan:linear_scan",
        description="recurrence whose decay is one number a step, for H-Net",
        implementations={
            REFERENCE: Implementation("kernels.linear_scan.reference:reference"),
            CHUNKED: Implementation("kernels.linear_scan.chunked:chunked"),
            TRITON: by_triton("kernels.linear_scan.triton:linear_scan"),
        },
        rule="kernels.linear_scan:choose",
    ),
    "compaction": Kernel(
        "kernels.compaction:compaction",
        description="numbers of chunks and of the places that open them, for H-Net",
        implementations={
            REFERENCE: Implementation("kernels.compaction.reference:reference"),
            TRITON: Implementation(
                "kernels.compaction.triton:compaction",
                devices=("cuda",),
                package="triton",
                capability=(8, 0),
            ),
        },
    ),
    "downsample": Kernel(
        "kernels.downsample:downsample",
        description="what opens chunks, picked out of all places, for H-Net",
        implementations={
            REFERENCE: Implementation("kernels.downsample.reference:reference"),
            TRITON: by_triton("kernels.downsample.triton:downsample"),
        },
    ),
    "upsample": Kernel(
        "kernels.upsample:upsample",
        description="chunks over their places, with what goes past them, for H-Net",
        implementations={
            REFERENCE: Implementation("kernels.upsample.reference:reference"),
            TRITON: by_triton("kernels.upsample.triton:upsample"),
        },
    ),
    "boundaries": Kernel(
        "kernels.boundaries:boundaries",
        description="where neighbours are unlike, and how sure that is, for H-Net",
        implementations={
            REFERENCE: Implementation("kernels.boundaries.reference:reference"),
            TRITON: by_triton("kernels.boundaries.triton:boundaries"),
        },
    ),
    "selected_attention": Kernel(
        "kernels.selected_attention:selected_attention",
        description="attention to the blocks that were selected for each query",
        implementations={
            REFERENCE: Implementation("kernels.selected_attention.reference:reference"),
            "masked": Implementation("kernels.selected_attention.masked:masked"),
            "gathered": Implementation("kernels.selected_attention.gathered:gathered"),
            "by_blocks": Implementation("kernels.selected_attention.by_blocks:by_blocks", devices=("cpu",)),
            TRITON: by_triton(
                "kernels.selected_attention.triton:selected_attention",
                refuses="kernels.selected_attention:too_wide",
            ),
            CPP: by_cpp(
                "kernels.selected_attention.cpp:selected_attention", "selected_attention/selected.cpp"
            ),
        },
        rule="kernels.selected_attention:choose",
    ),
    "patch_attention": Kernel(
        "kernels.patch_attention:patch_attention",
        description="attention within patches and to the end of the one before, for megabyte",
        implementations={
            REFERENCE: Implementation("kernels.patch_attention.reference:BACKEND"),
            "library": Implementation("kernels.patch_attention.library:BACKEND"),
            TRITON: by_triton(
                "kernels.patch_attention.triton:BACKEND", refuses="kernels.patch_attention:refused_by_triton"
            ),
        },
        rule="kernels.patch_attention:choose",
    ),
    "unit_norm": Kernel(
        "kernels.unit_norm:unit_norm",
        description="normalisation to length 1",
        implementations={
            REFERENCE: Implementation("kernels.unit_norm.reference:reference"),
            TRITON: by_triton("kernels.unit_norm.triton:unit_norm", refuses="kernels.rms_norm:too_wide"),
        },
        compiled_with_neighbours=True,
    ),
    "rms_norm": Kernel(
        "kernels.rms_norm:rms_norm",
        description="root-mean-square normalisation, of a residual sum if wanted",
        implementations={
            REFERENCE: Implementation("kernels.rms_norm.reference:reference"),
            CLOSED_FORM: Implementation("kernels.rms_norm.closed_form:closed_form", devices=("cpu",)),
            TRITON: by_triton("kernels.rms_norm.triton:rms_norm", refuses="kernels.rms_norm:too_wide"),
        },
        compiled_with_neighbours=True,
    ),
    "gated_rms_norm": Kernel(
        "kernels.gated_rms_norm:gated_rms_norm",
        description="root-mean-square normalisation behind a gate, for version 2 of mamba",
        implementations={
            REFERENCE: Implementation("kernels.gated_rms_norm.reference:reference"),
            CPP: by_cpp("kernels.gated_rms_norm.cpp:cpp", "gated_rms_norm/norm.cpp"),
        },
        compiled_with_neighbours=True,
    ),
    # Deterministic where `torch.use_deterministic_algorithms` asks for it, all of them; sdpa then leaves cuDNN out.
    "attention": Kernel(
        "kernels.attention:attention",
        description="attention within documents, windows and blocks",
        implementations={
            REFERENCE: Implementation("kernels.attention.reference:BACKEND"),
            CHUNKED: Implementation("kernels.attention.chunked:BACKEND"),
            "sdpa": Implementation(
                "kernels.attention.sdpa:BACKEND", refuses="kernels.attention.rule:refused_by_sdpa"
            ),
            "varlen": Implementation(
                "kernels.attention.varlen:BACKEND",
                devices=("cuda",),
                dtypes=("bfloat16", "float16"),
                capability=(8, 0),
                refuses="kernels.attention.rule:refused_by_varlen",
            ),
            "flex": Implementation(
                "kernels.attention.flex:BACKEND",
                devices=("cuda",),
                dtypes=("bfloat16", "float16", "float32"),
                capability=(8, 0),
                refuses="kernels.attention.rule:refused_by_flex",
            ),
            "flash_attn": Implementation(
                "kernels.attention.flash_attn:BACKEND",
                devices=("cuda",),
                dtypes=("bfloat16", "float16"),
                capability=(8, 0),
                refuses="kernels.attention.flash_attn:refuses",
            ),
        },
        rule="kernels.attention.rule:choose",
    ),
}


def problems(wanted: Mapping[str, str]) -> list[str]:
    """What is wrong with the field `kernels`: a mapping of `default` and operations to implementations."""
    every = dict.fromkeys(name for kernel in KERNELS.values() for name in kernel.implementations)
    found = []
    for op, name in wanted.items():
        if op != "default" and op not in KERNELS:
            found.append(f"kernels.{op}: {not_one_of(op, ['default', *KERNELS])}")
            continue
        allowed = every if op == "default" else KERNELS[op].implementations
        if name in LIBRARIES and name not in allowed:
            what = "no operation here" if op == "default" else "not this operation"
            found.append(f"kernels.{op}: {name} computes {what}; one of {', '.join([AUTO, *allowed])}")
        elif name not in (AUTO, *allowed):
            found.append(f"kernels.{op}: {not_one_of(name, [AUTO, *allowed])}")
    return found
