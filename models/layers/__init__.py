"""Parts that two or more architectures share."""
