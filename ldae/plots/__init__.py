"""PNG files of a run: pictures of the denoiser and the tokenizer, and heat maps of results."""
