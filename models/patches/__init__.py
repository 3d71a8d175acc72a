"""Patches of bytes: where bytes stand in them, and the two stacks that read them."""
