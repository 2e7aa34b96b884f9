"""An exported folder on the Hugging Face hub."""

from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.utils import HFValidationError, validate_repo_id

from ldae.errors import InputError, first_line
from ldae.files import PARTIAL
from ldae.runs.layout import EVALS


def check_repository(name: str) -> None:
    """Check that a name is USER/NAME. Raises: InputError."""
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise InputError(f"--push {name} is no repository: {first_line(error)}") from None
    if name.count("/") != 1:
        raise InputError(f"--push {name} must be USER/NAME")


def push(folder: Path, repository: str, private: bool = False) -> str:
    """Upload a folder to a repository of models, which is created if there is none.

    Files of the repository that the folder has too are replaced; others stay. Results of graders in
    ``evals`` are left out: a repository may be public, and they name paths of this machine. What a
    killed export has left unfinished is left out too. The token is that of ``hf auth login``, or
    the environment variable HF_TOKEN.

    Args:
        private: create the repository as a private one, and refuse one that is public.

    Returns: the address of the repository.

    Raises: InputError when the hub refuses it or cannot be reached; the folder stays.
    """
    api = HfApi(library_name="ldae")
    try:
        url = api.create_repo(repository, private=private, exist_ok=True)
        if private and not api.model_info(repository).private:  # it was there before
            raise InputError(
                f"{repository} is there already, and public: make it private on the hub, or name "
                "another one"
            )
        api.upload_folder(
            repo_id=repository,
            folder_path=folder,
            ignore_patterns=[f"{EVALS}/*", f"*{PARTIAL}", f"*{PARTIAL}/*"],
            commit_message="Export from ldae",
        )
    except InputError:
        raise
    except ValueError as error:  # the hub refuses the card, and gives its reasons in further lines
        raise InputError(
            f"{folder} is written, but not pushed to {repository}: {' '.join(str(error).split())}; "
            "delete the folder and export it again"
        ) from error
    except Exception as error:  # of the network's libraries too, which share no base class
        raise InputError(
            f"{folder} is written, but not pushed to {repository}: {first_line(error)}; the same "
            "command tries again"
        ) from error
    return str(url)
