"""The one training loop and what it needs; optimizers, run folders, views and commands in folders of their own."""
