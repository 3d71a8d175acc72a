"""Sweeps: what their jobs were asked for and how each ended, who may use which GPU, and what comes of all of them.

Hydra decides the jobs and starts them. Nothing is read from what they return: the folders say it.
"""
