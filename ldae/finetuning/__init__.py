"""Fine-tuning: settings, recipes, mixing of batches, the network and its loss."""
