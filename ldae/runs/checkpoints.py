"""Checkpoints: complete or absent, opened without unpickling anything but tensors."""

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


class Checkpoints:
    """The checkpoints of one run folder, by images seen. ``keep`` of 0 keeps all of them."""

    def __init__(self, run: Path, keep: int = 0) -> None:
        self.folder, self.keep = Path(run) / layout.CHECKPOINTS, keep

    def paths(self) -> list[Path]:
        """Oldest first."""
        if not self.folder.is_dir():
            return []
        found = (path for path in self.folder.iterdir() if layout.images_seen(path) is not None)
        return sorted(path for path in found if path.is_file())

    def save(self, state: dict) -> Path:
        """Write ``state`` under its ``images_seen`` and forget the oldest beyond ``keep``.

        A kill at any moment leaves either the old files or the new one. Only one process may save
        in a folder, see ``ldae.train.lock``: what another left half written is removed.

        Raises: InputError when the disk does not take it; what was saved before is still there.
        """
        path = self.folder / layout.checkpoint(state["images_seen"])
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            for left in self.folder.glob(f"*{PARTIAL}"):
                left.unlink()
            with open_atomic(path) as file:
                torch.save(state, file)
        except (OSError, RuntimeError) as error:  # torch reports a failed write as RuntimeError
            last = self.paths()[-1].name if self.paths() else "none"
            cause = error if isinstance(error, OSError) else error.__context__
            reason = getattr(cause, "strerror", None) or "the file could not be written"
            raise InputError(
                f"checkpoint {path} could not be saved ({reason}); the last good one: {last}"
            ) from None
        if self.keep:
            # Not what is newer: it was found damaged, or this state would not be behind it.
            for old in [known for known in self.paths() if known <= path][: -self.keep]:
                with report_write_errors(old):
                    old.unlink()
        return path

    def load(self) -> dict | None:
        """The newest state that is whole, on the CPU, or None before the first.

        Raises: InputError when there are some and all of them are damaged.
        """
        damaged = []
        for path in reversed(self.paths()):
            try:
                state = read(path)
            except FileNotFoundError:  # forgotten since it was listed, so there is a newer one
                return self.load()
            except Exception as error:  # of many kinds for one fact: the file is not whole
                damaged.append(f"checkpoint {path} is damaged ({first_line(error)})")
                continue
            if damaged and is_main():
                print(f"{'; '.join(damaged)}; {path.name} before it is used instead", flush=True)
            return state
        if damaged:
            raise InputError(
                f"{damaged[0]}, and there is no whole one beside it; nothing was changed: put a copy "
                "there, or name another --run"
            )
        return None

    def load_together(self) -> dict | None:
        """``load`` on every rank.

        Raises: InputError as it does, and when the ranks do not see the same.
        """
        found = self.load()
        seen = gather_values(found["images_seen"] if found else 0)
        if len(set(seen)) > 1:
            raise InputError(
                f"the ranks see different checkpoints in {self.folder}, of "
                f"{', '.join(map(str, seen))} images: is it the same folder on all machines?"
            )
        return found

    def describe(self) -> dict | None:
        """What the newest readable checkpoint says about the run, without reading its tensors."""
        for path in reversed(self.paths()):
            with suppress(Exception):  # load() tells of it
                return torch.load(path, map_location="cpu", weights_only=True, mmap=True)[
                    "describe"
                ]
        return None


def read(path: Path) -> dict:
    """One checkpoint, on the CPU.

    Raises: an exception of some kind when the file is not, bit for bit, what was written.
    """
    with zipfile.ZipFile(path) as file:  # torch's reader ignores the checksums of its own format
        wrong = file.testzip()
    if wrong:
        raise InputError(f"{wrong} in it has another checksum")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:  # whose words tell how to run it
        raise InputError("it holds pickled code, which is not run here") from None
    return {key: state[key] for key in _KEYS} | {"watchdog": state.get("watchdog")}
