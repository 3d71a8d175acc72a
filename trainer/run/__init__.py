"""What a run leaves behind: its folder, checkpoints, manifest and metrics, and the way back from them."""
