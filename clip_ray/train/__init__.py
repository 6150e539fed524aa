"""The training loop, its state and its commits; it needs torch, and no Ray."""
