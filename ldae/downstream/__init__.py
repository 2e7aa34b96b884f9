"""What a fine-tuning and a detection share: both train a network on a backbone by a recipe."""
