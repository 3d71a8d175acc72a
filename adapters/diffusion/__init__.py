"""Discrete diffusion: one adapter over interchangeable processes.

d3pm, mdl, sedd, bd3lm   objective, bound, sampler and adapter of one model each
process, adapter         what the models differ in; the trainer's contract
schedules, chains        how text turns into noise
clipping                 the part of all masking probabilities that blocks are trained with
reverse, scores, masked  how a step is undone: by posteriors, by scores, by revealing
sampling, likelihood     loops over windows of text; replicates and standard errors
network                  hidden states to losses and logits
"""
