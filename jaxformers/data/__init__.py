"""Sources, tokenizers, batching and features."""
