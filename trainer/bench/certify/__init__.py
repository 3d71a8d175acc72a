"""Certified scores: what must hold for a score to mean what it says, tried on the trained model itself, through the
very path that scores it, and kept in one file that anyone can have checked again.

`checks` says what a check is; each other file but `certificate` and `digests` is one.
"""
