"""Names of the files and folders in a run folder, for all who need them, the batch script too."""

import re
from pathlib import Path

# Every run
CONFIG = "config.yaml"  # the kind of the run and its settings
ENVIRONMENT = "environment.json"  # versions, device, git state
LOCK = "running.json"  # there while a process works in the folder
CHECKPOINTS = "checkpoints"
METRICS = "metrics.jsonl"
TENSORBOARD = "tensorboard"
WANDB_ID = "wandb-id.txt"  # the id of the run at Weights & Biases

# The tokenizer, of a run of its own or of a pre-training
TOKENIZER = "tokenizer.safetensors"
RECONSTRUCTION = "reconstruction.json"
RECONSTRUCTED = "reconstructed.png"
TOKENIZER_RUN = "tokenizer"  # in a pre-training: the run that trains its tokenizer

# A pre-training, and what was made from it
DENOISED = "denoised.png"
FILTERS = "filters.png"
LATENTS = "latents.safetensors"
SAMPLES = "samples"
EXPORTED = "exported"
DEMO = "demo.json"

# A fine-tuning
CLASSIFIER = "classifier"

# Evaluations: a folder each in EVALS
EVALS = "evals"
RESULTS = "results.json"
GRID_TABLE, GRID_PICTURE = "grid.md", "grid.png"
CORRUPTIONS_TABLE, CORRUPTIONS_PICTURE = "corruptions.md", "corruptions.png"

# Jobs sent to a cluster: a folder each in JOBS, and the code that they run
JOBS = "jobs"
JOB_RECORD = "job.json"  # what was sent, and when
JOB_STATE = "state.json"  # how the job stands
RANK_STATUS = ".status"  # ending of the file that holds the exit status of a rank
CODE = "code-"  # beginning of the name of a copy of the package
GIT = "git.json"  # beside that copy: the state of the checkout that it was made from


def checkpoint(images_seen: int) -> str:
    """Return the name of the checkpoint after so many images."""
    return f"images-{images_seen:012d}.pt"


def images_seen(path: Path) -> int | None:
    """Return the images seen of a checkpoint by its name, or None for a file of another name."""
    found = re.fullmatch(r"images-(\d{12})\.pt", path.name)
    return int(found[1]) if found else None
