"""Running the commands of the package, as studies of accuracy do."""

import subprocess
import sys


def run_ldae(*words: object) -> None:
    """Run a command of the package, and stop when it fails."""
    command = [str(word) for word in words]
    print("\n$ ldae", *command, flush=True)
    subprocess.run([sys.executable, "-m", "ldae", *command], check=True)
