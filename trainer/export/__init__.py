"""Trained weights in files for elsewhere: the table of their forms. Importing this brings no torch."""

from __future__ import annotations

from naming import Entry

__all__ = ["FORMS"]

# Each makes a `trainer.export.form:Form` from nothing.
FORMS: dict[str, Entry] = {
    "hf": Entry(
        "trainer.export.huggingface:HuggingFace",
        description="a folder that transformers opens, of architectures that it has too",
    ),
    "memory": Entry(
        "trainer.export.memory:MemoryAlone",
        description="the memory alone, its bank in the bits that it is kept in, of types that have one",
    ),
    "peft": Entry(
        "trainer.export.peft:Peft",
        description="adapters alone (use_lora), in a folder that PEFT opens beside such a base",
    ),
    "safetensors": Entry(
        "trainer.export.own:Own",
        description="a folder that this trainer opens, of any architecture",
    ),
}
