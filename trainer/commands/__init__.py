"""The commands of mytrainer.py, one file each."""
