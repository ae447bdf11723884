"""Applications of pretrained transformers, one system a file."""
