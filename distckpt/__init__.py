"""distckpt: distributed training for PyTorch that never loses a checkpoint."""
