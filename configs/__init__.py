"""What to run: the YAML files, their schema, and the way from a command line to one checked config."""
