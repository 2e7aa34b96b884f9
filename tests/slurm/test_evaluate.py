"""A suite on a real SLURM: its jobs are an array, which fills one table."""

import json
import shutil

from slurm.cluster import wait_for

from ldae.cluster.settings import SlurmSettings
from ldae.cluster.status import read_statuses
from ldae.commands.evaluate import send_cells
from ldae.evals.evaluation import Setup

SUITE = """
[data.digits]
train = "digits"
[data.nowhere]
train = "nowhere"
[protocols.knn]
k = [5]
[protocols.retrieve]
k = [1]
data = ["digits"]
"""


def test_an_array_fills_the_table_and_only_missing_cells_are_sent_again(tmp_path):
    suite, out = tmp_path / "suite.toml", tmp_path / "a table"
    suite.write_text(SUITE)
    setup = Setup(in_chans=1, workers=0, device="cpu", out=out)
    slurm = SlurmSettings(array_parallelism=2)

    def send() -> list:
        """Send the suite, wait for the end of its jobs, and return their states."""
        send_cells(slurm, ("pixels:8",), suite=suite, setup=setup)
        ended = ("done", "failed", "cancelled")
        wait_for(lambda: all(s.state in ended for s in read_statuses(out)), "end of all jobs")
        return read_statuses(out)

    first = send()
    assert [status.state for status in first] == ["done", "failed"], first
    (array,) = {status.id.split("_")[0] for status in first}
    script = out / "jobs" / array / f"{array}_submission.sh"
    assert "--array=0-1%2\n" in script.read_text()
    cells = json.loads((out / "table.json").read_text())["cells"]
    assert [bool(cell["results"]) for cell in cells] == [True, True, False]
    assert "nowhere" in cells[2]["error"]

    shutil.rmtree(out / "pixels-8" / "digits" / "retrieve")
    again = send()
    sent = [status.command.split()[-1] for status in again[2:]]
    assert sent == ["pixels-8/digits/retrieve", "pixels-8/nowhere/knn"], again
    assert [status.state for status in again[2:]] == ["done", "failed"], again
    assert (out / "table.md").read_text().count("to do") == 0
