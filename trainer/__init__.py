"""The one training loop and its organs: optimizers, schedules, checkpoints, evaluation, reports."""
