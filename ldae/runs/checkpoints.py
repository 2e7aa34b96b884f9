"""Checkpoints: files that are complete or absent, and read without executing pickled code."""

import pickle
import zipfile
from contextlib import suppress
from pathlib import Path

import torch

from ldae.distributed import gather_values, is_main
from ldae.errors import InputError, first_line
from ldae.files import PARTIAL, open_atomic, report_write_errors
from ldae.runs import layout

_KEYS = ("images_seen", "model", "average", "optimizer", "describe")
_NEWER_KEYS = ("watchdog", "division")  # older checkpoints do not have these


class Checkpoints:
    """The checkpoints of one run folder. The newest ``keep`` are kept, or all if ``keep`` is 0."""

    def __init__(self, run: Path, keep: int = 0) -> None:
        self.run, self.keep = Path(run), keep
        self.folder = self.run / layout.CHECKPOINTS

    def paths(self) -> list[Path]:
        """Return the paths of all checkpoints, oldest first."""
        if not self.folder.is_dir():
            return []
        named = (path for path in self.folder.iterdir() if layout.images_seen(path) is not None)
        return sorted(path for path in named if path.is_file())

    def save(self, state: dict) -> Path:
        """Write ``state`` under its ``images_seen``; delete the oldest checkpoints beyond ``keep``.

        A kill at any moment leaves either the old checkpoints or also the new one. Only one process
        may save in a folder (see ``ldae.runs.lock``), since partial files are removed.

        Raises: InputError when the file cannot be written; the checkpoints before it stay.
        """
        path = self.folder / layout.checkpoint(state["images_seen"])
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            for partial in self.folder.glob(f"*{PARTIAL}"):
                partial.unlink()
            with open_atomic(path) as file:
                torch.save(state, file)
        except (OSError, RuntimeError) as error:  # torch reports a failed write as RuntimeError
            last = self.paths()[-1].name if self.paths() else "none"
            cause = error if isinstance(error, OSError) else error.__context__
            reason = getattr(cause, "strerror", None) or "the file could not be written"
            raise InputError(
                f"checkpoint {path} could not be saved ({reason}); the last good one is {last}"
            ) from None
        if self.keep:
            # Newer checkpoints are damaged, or the run would have resumed from them.
            for old in [saved for saved in self.paths() if saved <= path][: -self.keep]:
                with report_write_errors(old):
                    old.unlink()
        return path

    def load(self) -> dict | None:
        """Return the state of the newest undamaged checkpoint, on the CPU; None if there are none.

        Raises: InputError when all checkpoints are damaged.
        """
        damaged = []
        for path in reversed(self.paths()):
            try:
                state = read(path)
            except FileNotFoundError:  # deleted since it was listed, so there is a newer one
                return self.load()
            except Exception as error:  # torch raises many types for a damaged file
                damaged.append(f"checkpoint {path} is damaged ({first_line(error)})")
                continue
            if damaged and is_main():
                print(f"{'; '.join(damaged)}; {path.name} is used instead", flush=True)
            return state
        if damaged:
            raise InputError(
                f"{damaged[0]}, and there is no undamaged one; nothing was changed: restore a "
                "copy, or name another --run"
            )
        return None

    def load_on_all_ranks(self) -> dict | None:
        """Return ``load()`` on every rank.

        Raises: InputError as ``load``, and when the ranks load different checkpoints.
        """
        state = self.load()
        seen = gather_values(state["images_seen"] if state else 0)
        if len(set(seen)) > 1:
            raise InputError(
                f"the ranks see different checkpoints in {self.folder}, of "
                f"{', '.join(map(str, seen))} images: is it the same folder on all machines?"
            )
        return state

    def describe(self) -> dict | None:
        """Return the newest readable checkpoint's description of the run; no tensor is read."""
        for path in reversed(self.paths()):
            with suppress(Exception):  # load() reports damage
                return torch.load(path, map_location="cpu", weights_only=True, mmap=True)[
                    "describe"
                ]
        return None


def read(path: Path) -> dict:
    """Return the state in one checkpoint, on the CPU.

    Raises: an exception of any type when a bit of the file has changed since it was written.
    """
    with zipfile.ZipFile(path) as file:  # torch's reader ignores the checksums of its own format
        if damaged := file.testzip():
            raise InputError(f"{damaged} in it has another checksum")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:  # torch's message says how to execute the code
        raise InputError("it holds pickled code, which ldae never executes") from None
    return {key: state[key] for key in _KEYS} | {key: state.get(key) for key in _NEWER_KEYS}
