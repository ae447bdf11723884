"""Pre-training methods, one system a file."""
