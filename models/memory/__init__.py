"""Language models with a bank of learned latent tokens, and what stands on a pretrained one."""
