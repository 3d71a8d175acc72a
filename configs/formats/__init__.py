"""Configurations in formats of other projects, each read into the names of our own YAML files."""
