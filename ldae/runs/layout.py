"""The names of the files in a run folder."""

JOBS = "jobs"  # folder of a run folder: the jobs that were sent from it
TOKENIZER = "tokenizer.safetensors"
RECONSTRUCTION = "reconstruction.json"
CLASSIFIER = "classifier"  # folder of a fine-tuning
