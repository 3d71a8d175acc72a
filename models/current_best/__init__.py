"""Parts of `models/current_best_gpt.py`: its fields, its layout over a depth, its stages, and its layers."""
