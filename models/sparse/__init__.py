"""The parts of native sparse attention (Yuan et al. 2025, arXiv:2502.11089)."""
