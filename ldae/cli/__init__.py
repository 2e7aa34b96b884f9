"""The command line: from the words that a user types to an exit status."""

import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from ldae import launch
from ldae.cli.commands import COMMANDS, RELIST
from ldae.errors import InputError, exit_status, report
from ldae.train.interrupt import Interrupted, stop_signals


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Returns: the exit status, which is 0, 2 for wrong input, ``LOST_RANK`` for a lost rank, or 128 +
        the number of the signal that stopped the command.
    """
    command, *rest = (sys.argv[1:] if argv is None else argv) or ["--help"]
    if command in ("-h", "--help", "help"):
        print(_usage())
        return 0
    if command == "--version":
        from ldae import __version__

        print(__version__)
        return 0
    try:
        with _stopped_by_signals():
            from ldae.cli.dispatch import dispatch  # `ldae --help` needs none of its imports

            launch.stop_with_launcher()
            return dispatch(command, rest)
    except (InputError, Interrupted) as error:
        report(error)
        return error.exit_status
    except BrokenPipeError:  # the reader of our output has seen enough
        sys.stderr.close()
        return 141
    except KeyboardInterrupt as stopped:
        print("ldae: stopped", file=sys.stderr)
        return exit_status(stopped)


def _usage() -> str:
    commands = "\n".join(f"  {name:<14} {summary}" for name, summary in COMMANDS.items())
    return (
        "usage: ldae COMMAND ...\n\n"
        "Pre-train image encoders by latent denoising (l-DAE); export them to timm.\n\n"
        f"{commands}\n\n"
        "`ldae COMMAND --help` lists a command's settings; `ldae COMMAND ... --slurm` sends it "
        "to a cluster.\n"
        f"{launch.HELP}\n"
        f"`ldae COMMAND ... {RELIST}` lists the files of large data sets anew.\n"
        "Start with: ldae demo, or "
        "ldae pretrain l_dae_masked --scale auto --data DIR --run runs/first"
    )


@contextmanager
def _stopped_by_signals() -> Iterator[None]:
    """End the command after another stop signal as after Ctrl-C, together with its workers."""
    signals = set(stop_signals()) - {signal.SIGINT}

    def stop(number: int, frame: object) -> None:
        for other in signals:  # a scheduler repeats its signals, which would interrupt the cleanup
            signal.signal(other, signal.SIG_IGN)
        raise KeyboardInterrupt(number)

    previous = {number: signal.signal(number, stop) for number in signals}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
