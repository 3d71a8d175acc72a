"""What `doctor` looks at: this installation and this machine, section by section, in the order of the report.

Nothing of the project or of torch is imported before a section needs it: any of it may be what is broken.
"""

from __future__ import annotations

__all__ = ["SECTIONS", "SELF_TEST"]

SELF_TEST = "self-test"

# "module:function" of what yields the lines of a section.
SECTIONS = {
    "versions": "trainer.doctor.versions:check",
    "devices": "trainer.doctor.devices:check",
    "kernels": "trainer.doctor.kernels:check",
    "storage": "trainer.doctor.storage:check",
    SELF_TEST: "trainer.doctor.self_test:check",
}
