"""Mixers of state-space models: a convolution over the last tokens, and states that decay as each token says."""
