"""Images: where they come from, how they are decoded and cropped, and the order of training."""
