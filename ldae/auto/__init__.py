"""The scale auto: settings for the images, the machine and the hours of one run, with reasons."""
