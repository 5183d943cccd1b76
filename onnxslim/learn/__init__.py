"""What is computed, and learnt, with PyTorch: graphs as they are, their weights as parameters."""
