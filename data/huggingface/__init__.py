"""Tokenizers of Hugging Face's `tokenizers` library: read as they are (`folder`, `tokenizer`, `spelling`), and ours in
its form (`written`). The library is imported on use: it comes with the extra `hf`."""
