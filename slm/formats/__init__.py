"""Networks and tokenizers as other programs keep them: `transformers` and llama.cpp."""
