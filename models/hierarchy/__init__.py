"""Hierarchies that cut text into chunks as they read it: what opens a chunk, what goes into it, what comes back."""
