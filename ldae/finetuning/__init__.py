"""Fine-tuning: its settings and recipes, how batches are mixed, the network and its loss."""
