"""Which implementation attention takes: every device, number format and kind of mask, as a table."""

from __future__ import annotations

import inspect

import pytest
import torch

from adapters.base import weighted_loss
from kernels import KERNELS
from kernels.attention import attention_call, flash_attn, rule, varlen
from kernels.choose import Call, Kernels
from kernels.device import A100, B200, H100, Gpu, as_if
from tests.contract.tiny import adapter_of, batch_for, context

CPU, CUDA, MPS, META = (torch.device(name) for name in ("cpu", "cuda", "mps", "meta"))
HALF, SINGLE, DOUBLE = torch.bfloat16, torch.float32, torch.float64
TURING = Gpu((7, 5), 40, 64 * 1024)

DOCUMENTS = ("causal", "documents", "offsets")
IDS_ONLY = ("causal", "documents")
BLOCKS = ("documents", "block diffusion")

FUSED = "auto: no mask: torch's fused kernels, cuDNN's from Hopper on"
OFFSETS = "auto: documents and windows as offsets: FlashAttention without a mask"
TILES = "auto: FlexAttention: tiles in which nothing is seen are skipped"
MASK = "auto: torch's fused kernels that take a mask"
PLAIN = "auto: up to 512 keys plain products are faster"
LIBRARY = "auto: torch's fused attention"
GROUPS = "auto: groups of queries that see the same keys"

# device, GPU, dtype, facts; implementation, how its reason begins.
CHOICES = [
    # On a CPU as ever: what was measured there decides.
    (CPU, None, HALF, DOCUMENTS, "chunked", PLAIN),
    (CPU, None, HALF, ("causal",), "chunked", PLAIN),
    (CPU, None, HALF, ("causal", "long"), "sdpa", LIBRARY),
    (CPU, None, HALF, ("causal", "cache", "one query"), "sdpa", LIBRARY),
    (CPU, None, HALF, ("causal", "cache"), "chunked", PLAIN),
    (CPU, None, HALF, ("documents",), "chunked", PLAIN),
    (CPU, None, HALF, ("mask", "one query"), "chunked", PLAIN),
    (CPU, None, SINGLE, DOCUMENTS, "sdpa", LIBRARY),
    (
        CPU,
        None,
        SINGLE,
        (*DOCUMENTS, "softcap"),
        "chunked",
        "auto: blocks of queries in plain operations; not sdpa: ",
    ),
    (
        CPU,
        None,
        SINGLE,
        (*DOCUMENTS, "dropout"),
        "chunked",
        "auto: with dropout the library writes down all scores",
    ),
    (CPU, None, SINGLE, BLOCKS, "chunked", GROUPS),
    (CPU, None, HALF, (*BLOCKS, "long"), "chunked", GROUPS),
    (META, None, HALF, DOCUMENTS, "sdpa", LIBRARY),
    (MPS, None, SINGLE, DOCUMENTS, "sdpa", LIBRARY),
    (MPS, None, SINGLE, (*DOCUMENTS, "dropout"), "sdpa", LIBRARY),
    (MPS, None, SINGLE, (*DOCUMENTS, "dropout", "dropout of all"), "chunked", "auto: blocks of queries"),
    (MPS, None, SINGLE, ("causal", "softcap"), "chunked", "auto: blocks of queries"),
    (MPS, None, SINGLE, BLOCKS, "chunked", GROUPS),
    # On a GPU: no mask where it can be helped.
    (CUDA, H100, HALF, ("causal",), "sdpa", FUSED),
    (CUDA, A100, HALF, ("causal", "long", "grouped heads"), "sdpa", FUSED),
    (CUDA, B200, HALF, (), "sdpa", FUSED),
    (CUDA, H100, SINGLE, ("causal",), "sdpa", FUSED),
    (CUDA, H100, HALF, ("causal", "dropout"), "sdpa", FUSED),
    (CUDA, H100, HALF, DOCUMENTS, "varlen", OFFSETS),
    (CUDA, A100, HALF, (*DOCUMENTS, "window", "grouped heads", "long"), "varlen", OFFSETS),
    (CUDA, B200, torch.float16, ("causal", "window"), "varlen", OFFSETS),
    (CUDA, H100, HALF, ("documents", "offsets"), "varlen", OFFSETS),
    (
        CUDA,
        TURING,
        torch.float16,
        DOCUMENTS,
        "sdpa",
        f"{MASK}; not varlen: it needs sm_80, and this is sm_75",
    ),
    (
        CUDA,
        H100,
        HALF,
        IDS_ONLY,
        "flex",
        f"{TILES}; not varlen: it needs the offsets of documents (cu_seqlens)",
    ),
    (CUDA, H100, SINGLE, DOCUMENTS, "flex", f"{TILES}; not varlen: it computes bfloat16, float16"),
    (CUDA, H100, DOUBLE, DOCUMENTS, "sdpa", MASK),
    (
        CUDA,
        H100,
        HALF,
        (*DOCUMENTS, "softcap"),
        "flex",
        f"{TILES}; not varlen: torch's varlen_attn has no softcap",
    ),
    (CUDA, H100, HALF, (*DOCUMENTS, "dropout"), "sdpa", MASK),
    (
        CUDA,
        H100,
        HALF,
        (*DOCUMENTS, "dropout", "softcap"),
        "chunked",
        "auto: blocks of queries in plain operations",
    ),
    (CUDA, H100, HALF, ("causal", "softcap"), "flex", "auto: FlexAttention; not sdpa: "),
    (CUDA, H100, HALF, BLOCKS, "flex", f"{TILES}; not varlen: offsets of documents cannot say what"),
    (CUDA, H100, HALF, ("documents", "mask"), "sdpa", MASK),
    # Decoding: the tokens are few, and every step has another length.
    (CUDA, H100, HALF, ("causal", "cache", "one query"), "sdpa", FUSED),
    (CUDA, H100, HALF, ("causal", "cache"), "sdpa", MASK),
    (CUDA, H100, HALF, ("causal", "cache", "one query", "window"), "sdpa", MASK),
    (CUDA, H100, HALF, ("causal", "cache", "one query", "softcap"), "chunked", "auto: blocks of queries"),
]


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize(("device", "gpu", "dtype", "facts", "name", "why"), CHOICES)
def test_what_auto_takes(device, gpu, dtype, facts, name, why, deterministic):
    """All of it can be deterministic, so that changes nothing."""
    kernels, call = Kernels(deterministic=deterministic), Call(device, dtype, columns=64, facts=facts)
    found = chosen(kernels, call, gpu)
    assert found[0] == name and found[1].startswith(why), found


def chosen(kernels: Kernels, call: Call, gpu: Gpu | None) -> tuple[str, str]:
    if gpu is None:
        return kernels.foresee("attention", call)
    with as_if(gpu):
        return kernels.foresee("attention", call)


@pytest.mark.parametrize("width", [12, 72, 264])
def test_heads_that_a_library_does_not_compute(width):
    name, why = chosen(Kernels(), Call(CUDA, HALF, columns=width, facts=DOCUMENTS), H100)
    if width % 8 == 0 and width <= 256:
        assert name == "varlen"
    else:
        assert name != "varlen" and f"heads of up to 256 in steps of 8, and these have {width}" in why
    assert chosen(Kernels(), Call(CUDA, HALF, columns=8, facts=BLOCKS), H100)[0] == "sdpa"  # flex: from 16 on


@pytest.fixture
def packages(monkeypatch):
    """`packages("dropout_p", ...)`: flash-attn is installed, with a function of these options."""

    def install(*options: str) -> None:
        def function() -> None: ...

        kind = inspect.Parameter.KEYWORD_ONLY
        function.__signature__ = inspect.Signature([inspect.Parameter(name, kind) for name in options])
        monkeypatch.setattr(flash_attn, "_imported", {"flash_attn": function}.get)

    return install


OPTIONS = ("dropout_p", "softcap", "deterministic")
PACKAGE = "auto: documents and windows as offsets: the package flash-attn; not varlen: "


@pytest.mark.parametrize(
    ("dtype", "options", "facts", "name", "why"),
    [
        (HALF, OPTIONS, DOCUMENTS, "varlen", OFFSETS),
        (HALF, OPTIONS, (*DOCUMENTS, "dropout"), "flash_attn", PACKAGE),
        (HALF, OPTIONS, ("causal", "window", "dropout"), "flash_attn", PACKAGE),
        (HALF, OPTIONS, (*DOCUMENTS, "softcap"), "flex", TILES),
        (HALF, OPTIONS, ("causal", "softcap"), "flex", "auto: FlexAttention; not sdpa: "),
        (HALF, OPTIONS, ("causal", "dropout"), "sdpa", FUSED),
        (HALF, OPTIONS, (*DOCUMENTS, "dropout", "softcap"), "chunked", "auto: blocks of queries"),
        (HALF, OPTIONS, (*DOCUMENTS, "dropout", "dropout of all"), "chunked", "auto: blocks of queries"),
        (HALF, OPTIONS, (*IDS_ONLY, "dropout"), "sdpa", MASK),
        (HALF, OPTIONS, (*BLOCKS, "dropout"), "sdpa", MASK),
        (HALF, OPTIONS, ("causal", "cache", "dropout"), "sdpa", MASK),
        (HALF, ("softcap",), (*DOCUMENTS, "dropout"), "sdpa", MASK),
        (SINGLE, OPTIONS, (*DOCUMENTS, "dropout"), "sdpa", MASK),
    ],
)
def test_what_auto_takes_where_flash_attn_is_installed(packages, dtype, options, facts, name, why):
    packages(*options)
    found = chosen(Kernels(), Call(CUDA, dtype, columns=64, facts=facts), H100)
    assert found[0] == name and found[1].startswith(why), found


def test_flex_of_narrow_heads_is_replaced_by_flash_attn(packages):
    packages(*OPTIONS)
    found = chosen(Kernels(), Call(CUDA, HALF, columns=8, facts=("causal", "softcap")), H100)
    assert found[0] == "flash_attn" and found[1].startswith("auto: the package flash-attn; not sdpa: "), found


@pytest.mark.parametrize(
    ("gpu", "modules"),
    [
        (A100, ("flash_attn",)),
        (H100, ("flash_attn.cute", "flash_attn_interface", "flash_attn")),
        (B200, ("flash_attn.cute", "flash_attn")),
        (Gpu((12, 0), 170, 99 * 1024), ("flash_attn",)),
    ],
)
def test_the_newest_flash_attn_that_is_made_for_the_gpu(monkeypatch, gpu, modules):
    """Versions that are not there are passed over, one after another."""
    installed = [*flash_attn.MODULES]
    monkeypatch.setattr(flash_attn, "_imported", lambda name: name if name in installed else None)
    for module in modules:
        assert flash_attn.function_for(gpu) == module
        installed.remove(module)
    assert flash_attn.function_for(gpu) is None
    with as_if(gpu):
        reason = flash_attn.refuses(Call(CUDA, HALF, columns=64, facts=DOCUMENTS))
    assert reason is not None and reason.endswith(f"can be imported here and is made for {gpu.name}")


def test_flash_attn_is_taken_where_it_is_asked_for(packages):
    kernels, call = Kernels({"attention": "flash_attn"}), Call(CUDA, HALF, columns=64, facts=DOCUMENTS)
    with (
        as_if(H100),
        pytest.raises(ValueError, match="none of flash_attn.cute, flash_attn_interface, flash_attn can"),
    ):
        kernels.foresee("attention", call)
    packages("dropout_p", "softcap", "deterministic")
    assert chosen(kernels, call, H100) == ("flash_attn", "kernels.attention")
    assert chosen(Kernels({"default": "flash_attn"}), call, H100) == ("flash_attn", "kernels.default")
    name, why = chosen(
        Kernels({"default": "flash_attn"}), Call(CUDA, SINGLE, columns=64, facts=DOCUMENTS), H100
    )
    assert (
        name == "flex"
        and "kernels.default=flash_attn: it computes bfloat16, float16, and this is float32" in why
    )


@pytest.mark.parametrize(
    ("options", "facts", "deterministic", "message"),
    [
        ((), (*DOCUMENTS, "dropout"), False, "the installed version has no dropout"),
        (("dropout_p",), (*DOCUMENTS, "softcap"), False, "the installed version has no softcap"),
        (("softcap",), DOCUMENTS, True, "adds floats in no fixed order, and deterministic=true"),
        (("softcap",), BLOCKS, False, "cannot say what a block diffusion does"),
        (("softcap",), IDS_ONLY, False, "it needs the offsets of documents"),
    ],
)
def test_what_an_installed_version_cannot_do(packages, options, facts, deterministic, message):
    packages("window", *options)
    torch.use_deterministic_algorithms(deterministic)
    try:
        kernels = Kernels({"attention": "flash_attn"}, deterministic=deterministic)
        with as_if(H100), pytest.raises(ValueError, match=message):
            kernels.foresee("attention", Call(CUDA, HALF, columns=64, facts=facts))
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("device", [CPU, MPS])
@pytest.mark.parametrize("name", ["varlen", "flex", "flash_attn"])
def test_what_needs_a_gpu_is_refused_elsewhere_before_anything_starts(name, device):
    with pytest.raises(ValueError, match=f"kernels.attention={name} is not possible here: it runs on cuda"):
        Kernels({"attention": name}, device=device)


def test_what_computes_in_16_bits_is_not_refused_before_the_number_format_is_known():
    with as_if(H100):
        Kernels({"attention": "varlen"}, device=CUDA)
    with as_if(TURING), pytest.raises(ValueError, match="it needs sm_80"):
        Kernels({"attention": "varlen"}, device=CUDA)


def test_an_explicit_choice_never_falls_back():
    call = Call(CUDA, HALF, columns=64, facts=(*DOCUMENTS, "softcap"))
    with (
        as_if(H100),
        pytest.raises(ValueError, match=r"no softcap. Possible: auto, reference, chunked, flex$"),
    ):
        Kernels({"attention": "varlen"}).foresee("attention", call)


def test_every_fact_of_the_table_is_one_that_calls_have():
    said = {fact for row in CHOICES for fact in row[3]}
    assert {"softcap", "dropout", "dropout of all", "grouped heads"} <= said
    assert attention_call((), (4, 2), 8, softcap=1.0, dropout=1.0) == {
        "columns": 8,
        "facts": ("grouped heads", "softcap", "dropout", "dropout of all"),
    }
    assert [*KERNELS["attention"].implementations] == [
        "reference",
        "chunked",
        "sdpa",
        "varlen",
        "flex",
        "flash_attn",
    ]


@pytest.mark.parametrize(
    ("architecture", "more", "name"),
    [
        ("gpt2", (), "varlen"),
        ("vanilla", ("model_cfg.sliding_window=8", "model_cfg.n_kv_heads=2"), "varlen"),
        ("vanilla", ("model_cfg.attn_softcap=30",), "flex"),
        ("gpt2", ("model_cfg.dropout=0.1",), "sdpa"),
        ("mdl", (), "varlen"),
        ("bd3lm", (), "flex"),
    ],
)
def test_documents_of_training_no_longer_rule_out_flash_attention(architecture, more, name):
    adapter = adapter_of(architecture, *more)
    call = Call(CUDA, HALF, **adapter.kernel_calls(16, 1024)["attention"])
    assert chosen(Kernels(), call, H100)[0] == name


@pytest.mark.parametrize("architecture", ["gpt2", "vanilla", "mdl"])
def test_models_hand_over_the_offsets_of_their_batch(architecture, monkeypatch):
    """Training and scoring, on a device without data: what FlashAttention gets has its shapes, and gives gradients."""
    monkeypatch.setattr(rule, "choose", lambda call, lacking: ("varlen", "asked for"))
    monkeypatch.setattr(varlen, "GROUPED_HEADS", False)  # torch's shapes of gradients do without them
    at_home = adapter_of(architecture)
    adapter = adapter_of(architecture, dtype=torch.bfloat16).to(META)
    prepared = at_home.prepare(batch_for(at_home), context())
    assert prepared.tensors["cu_seqlens"].dtype == torch.int32
    loss = weighted_loss(adapter(prepared.to(META)).terms, prepared.denominators)
    loss.backward()
    assert [*adapter.kernels.used["attention"]] == ["varlen"]
