"""Discrete diffusion: d3pm, mdl, sedd and bd3lm as one adapter over interchangeable processes.

schedules, chains     how text turns into noise            d3pm, mdl, sedd, bd3lm   objective, bound, reverse step
sampling              loops over reverse steps             likelihood               replicates and standard errors
network               hidden states to losses and logits   adapter                  the trainer's contract
"""
