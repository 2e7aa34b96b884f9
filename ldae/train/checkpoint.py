"""Checkpoints: complete or absent, opened without unpickling anything but tensors."""

import os
import re
from pathlib import Path

import torch

from ldae.errors import InputError

_KEYS = ("images_seen", "model", "average", "optimizer", "describe")
_NAME = re.compile(r"images-(\d{12})\.pt")


class Checkpoints:
    """The checkpoints of one run folder, by images seen. ``keep`` of 0 keeps all of them."""

    def __init__(self, run: Path, keep: int = 0) -> None:
        self.folder, self.keep = Path(run) / "checkpoints", keep

    def paths(self) -> list[Path]:
        """Oldest first."""
        if not self.folder.is_dir():
            return []
        return sorted(path for path in self.folder.iterdir() if _NAME.fullmatch(path.name))

    def save(self, state: dict) -> Path:
        """Write ``state`` under its ``images_seen`` and forget the oldest beyond ``keep``.

        It is written aside, flushed to the disk and renamed, so a kill at any moment leaves either
        the old files or the new one.

        Raises: InputError when the disk does not take it; what was saved before is still there.
        """
        path = self.folder / f"images-{state['images_seen']:012d}.pt"
        aside = path.with_suffix(".partial")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with open(aside, "wb") as file:
                torch.save(state, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(aside, path)
            folder = os.open(self.folder, os.O_RDONLY)
            os.fsync(folder)  # the rename itself
            os.close(folder)
        except (OSError, RuntimeError) as error:  # torch reports a failed write as RuntimeError
            aside.unlink(missing_ok=True)
            last = self.paths()[-1].name if self.paths() else "none"
            reason = (
                error.strerror if isinstance(error, OSError) else "the file could not be written"
            )
            raise InputError(
                f"checkpoint {path} could not be saved ({reason}); the last good one: {last}"
            ) from None
        if self.keep:
            for old in self.paths()[: -self.keep]:
                old.unlink()
        return path

    def load(self, device: torch.device | str = "cpu") -> dict | None:
        """The newest state, or None before the first.

        Raises: InputError when the file is damaged.
        """
        if not self.paths():
            return None
        path = self.paths()[-1]
        try:
            state = torch.load(path, map_location=device, weights_only=True)
            return {key: state[key] for key in _KEYS}
        except Exception as error:  # torch raises many kinds for one fact: the file is not whole
            raise InputError(
                f"checkpoint {path} is damaged ({type(error).__name__}); delete it to go on from the "
                "one before it, if there is one"
            ) from None
