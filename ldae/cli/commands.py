"""The list of all commands, and what sets some of them apart from the others."""

from collections.abc import Callable
from importlib import import_module

from ldae.errors import unknown

# The function of a command has the command's name and lies in the file of that name. The file is
# imported when the command is called.
GRADERS = {
    "knn": "grade a backbone: accuracy of nearest neighbours",
    "linear": "grade a backbone: accuracy of a linear probe",
    "logreg": "grade a backbone: accuracy of logistic regression, also few-shot",
    "retrieve": "grade a backbone: mAP and recall of image retrieval",
    "segment": "grade a backbone: mean IoU of semantic segmentation",
    "validate": "grade a finished classifier: accuracy, also on robustness sets, or corrupted",
}
"""The commands with a protocol, which may be part of a suite."""
COMMANDS = {
    "pretrain": "pre-train a row of the paper, or a rival (mae); the same command resumes",
    "fit-tokenizer": "fit or train only the tokenizer of a row; the same command resumes",
    "finetune": "fine-tune a backbone by a recipe; the same command resumes",
    "detect": "train and grade an object detector on a backbone; the same command resumes",
    **GRADERS,
    "evaluate": "run many gradings of a suite file into one table; resumes too",
    "rerun": "repeat an evaluation, and say whether its numbers are the same",
    "grid": "probe the encoder of a run at many noise levels and after every block; resumes too",
    "fid": "measure the FID of generated images to reference images",
    "sample": "generate images from a run: a grid, a folder or a file.npz",
    "embed": "write the features of a backbone as .npy or .parquet; resumes too",
    "cache": "decode images once, into one file that any command reads fast; resumes too",
    "export": "write a backbone or classifier for timm and the hub, and as ONNX",
    "submit": "send a pre-training and the jobs that follow it to a cluster",
    "jobs": "list the jobs of a folder, and their states",
    "curves": "print the loss and the features of a run, beside a reference run",
    "show": "show the rows of the paper and their rivals, or the settings of one",
    "diff": "show the settings that differ between two rows",
    "doctor": "measure this machine: what bounds a pre-training, and how long ImageNet takes",
    "demo": "run everything in minutes, on built-in images",
}
"""The summary of each command in ``ldae --help``."""
BY_ROW: dict[str, tuple[str, ...]] = {"pretrain": (), "fit-tokenizer": ("tokenizer",)}
"""The commands that take a row, and the kinds of run that they start; empty: any pre-training."""
BY_RECIPE = {"finetune": "ldae.finetuning.recipes", "detect": "ldae.detection.recipes"}
"""The commands that take a backbone and a recipe, and the module of the recipes."""
IN_RANKS = (
    *BY_ROW, *BY_RECIPE, *GRADERS, "evaluate", "rerun", "grid", "fid", "sample", "embed"
)  # fmt: skip
"""The commands that share their work among the ranks of --devices."""
WITHOUT_JOBS = ("jobs", "curves", "show", "diff")
"""The commands that are done in a moment, so that --slurm sends none of them."""
RELIST = "--relist"
"""The flag that lists the files of large data sets anew, of all commands that read images."""


def check_command(command: str) -> None:
    """Check that there is such a command. Raises: InputError that names the nearest one."""
    if command not in COMMANDS:
        raise unknown("there is no command", command, COMMANDS, " (`ldae --help`)")


def function_of(command: str) -> Callable:
    """Return the function of a command."""
    name = command.replace("-", "_")
    return getattr(import_module(f"ldae.commands.{name}"), name)
