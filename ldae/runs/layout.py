"""Names of the files and folders in a run folder. The batch script imports this file too."""

import re
from pathlib import Path

# Every run
CONFIG = "config.yaml"  # the kind of the run and its settings
ENVIRONMENT = "environment.json"  # versions, device, git state
LOCK = "running.json"  # exists while a process uses the folder
CHECKPOINTS = "checkpoints"
CHECKPOINT = "images-"  # the number of images seen follows
METRICS = "metrics.jsonl"
SKIPPED = "skipped.json"  # images that could not be decoded: name -> reason
TENSORBOARD = "tensorboard"
WANDB_ID = "wandb-id.txt"  # the id of the run at Weights & Biases

# A tokenizer, or the tokenizer of a pre-training
TOKENIZER = "tokenizer.safetensors"
RECONSTRUCTION = "reconstruction.json"
RECONSTRUCTED = "reconstructed.png"
TOKENIZER_RUN = "tokenizer"  # the run folder, in that of a pre-training, that trains its tokenizer

# A pre-training, and files derived from it
DENOISED = "denoised.png"
FILTERS = "filters.png"
LATENTS = "latents.safetensors"
SAMPLES = "samples"
EXPORTED = "exported"
DEMO = "demo.json"

# A fine-tuning
CLASSIFIER = "classifier"

# Evaluations, each in a folder of EVALS
EVALS = "evals"
RESULTS = "results.json"
FAILURE = "failure.txt"  # why a cell of a suite failed, until the cell is run again
RERUN = "rerun.json"  # a repeated evaluation beside the first one
PREDICTIONS = "predictions.npz"
DETECTIONS = "predictions.json"  # in COCO's format of results
GRID_TABLE, GRID_PICTURE = "grid.md", "grid.png"
GRID_PASSES = "passes"  # a folder with the cells of each finished pass of a grid
EMBEDDED = "progress.jsonl"  # the blocks of rows that embed has written
CORRUPTIONS_TABLE, CORRUPTIONS_PICTURE = "corruptions.md", "corruptions.png"

# Jobs sent to a cluster, each in a folder of JOBS, and the code that they run
JOBS = "jobs"
JOB_RECORD = "job.json"  # the command and the time of sending
JOB_STATE = "state.json"  # the state of the job
RANK_STATUS = ".status"  # suffix of the file with the exit status of a rank
CODE = "code-"  # prefix of a copy of the package
GIT = "git.json"  # the git state of the checkout that was copied


def checkpoint(images_seen: int) -> str:
    """Return the file name of the checkpoint after ``images_seen`` images."""
    return f"{CHECKPOINT}{images_seen:012d}.pt"


def images_seen(path: Path) -> int | None:
    """Return the number of images in a checkpoint's file name, or None for another file."""
    match = re.fullmatch(rf"{CHECKPOINT}(\d{{12}})\.pt", path.name)
    return int(match[1]) if match else None
