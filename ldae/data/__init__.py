"""Images: where they come from, how they are decoded and cropped, in which order they are shown."""
