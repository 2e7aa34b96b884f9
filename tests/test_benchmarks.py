"""Benchmarks of speed: one command, one file for each machine, and the tables of the pages."""

import json
import re
import tomllib
from argparse import Namespace
from importlib import import_module
from pathlib import Path

import pytest
import torch

from benchmarks import __main__ as runner
from benchmarks import command, course, detection, gpu, latents, machines, tables
from benchmarks.registry import BENCHMARKS, GPU, Benchmark, Number
from ldae.backbones.open import load_backbone
from ldae.commands.pretrain import pretrain
from ldae.errors import InputError
from ldae.runs.checkpoints import Checkpoints
from ldae.trajectory import config
from ldae.tree import flatten

ROOT = Path(__file__).parent.parent
MACHINE = {"name": "cpu-some-2", "cpu": "some", "cores": 2, "gpu": None}
NO_SPEED = {  # studies of accuracy, soak tests, and what other benchmarks import
    *(
        "agreement",
        "classifier",
        "command",
        "contest",
        "course",
        "detection",
        "dit_reference",
        "embed",
        "finetune",
        "floors",
        "fuzz",
        "fuzz_targets",
        "going_on",
        "graphs",
        "guidance",
        "latents",
        "mutations",
        "paired",
        "recipe",
        "rows",
        "seeds",
        "soak",
        "watching",
    ),
    *("__init__", "__main__", "machines", "registry", "tables"),
}


def record(**values):
    environment = {"command": ["fast.py", "--out", "x"], "device": "cpu", "cpu_threads": 2}
    return values | {"environment": environment}


def test_the_tables_of_the_pages_are_those_of_the_files():
    used = set()
    for page in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        text = page.read_text()
        made = tables.fill(text, page)
        assert made == text, f"run: python -m benchmarks --write {page.relative_to(ROOT)}"
        used |= {name for name in tables.TABLES if f"<!-- table: {name} -->" in text}
    assert used == tables.TABLES.keys()


def test_the_table_of_latents_reads_what_its_benchmark_writes(tmp_path, monkeypatch):
    for name, results in (
        ("linear", {"top1": 47.2, "learning_rate": 1.0}),
        ("knn", {"top1_k20": 40}),
    ):
        monkeypatch.setattr(
            latents, name, lambda *words, results=results, **how: {"results": results}
        )
    monkeypatch.setattr(latents, "pretrain", lambda *words: None)
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    argv = f"latents.py --data d --eval-data e --runs r --out {tmp_path}/cifar10-latents.json"
    monkeypatch.setattr("sys.argv", [*argv.split(), "--dims", "8", "--seeds", "2"])
    latents.main()
    assert tables.TABLES["latents"]().splitlines() == [
        "| `tokenizer.scale` | `tokenizer.dim` | seeds | linear probe | k-NN, k = 20 |",
        "| --- | --: | --: | --: | --: |",
        *(
            f"| {latent} | 2 | 47.2 ± 0.0 | 40.0 ± 0.0 |"
            for latent in ("global | 12", "per-axis | 8", "per-axis | 12", "raw | 12")
        ),
    ]


def test_every_benchmark_of_speed_is_listed():
    files = {path.stem for path in (ROOT / "benchmarks").glob("*.py")}
    listed = {Path(part.file).stem for part in (BENCHMARKS | GPU).values()}
    assert files == listed | NO_SPEED and not listed & NO_SPEED
    for part in (BENCHMARKS | GPU).values():
        code = (ROOT / "benchmarks" / part.file).read_text()
        assert '"--out"' in code and part.takes_device == ('"--device"' in code)


def test_every_benchmark_finds_what_it_imports():
    for path in (ROOT / "benchmarks").glob("[a-z]*.py"):
        import_module(f"benchmarks.{path.stem}")


def test_the_parts_of_a_gpu_take_at_most_ten_minutes():
    assert sum(part.seconds for part in GPU.values()) <= 600


def test_each_number_is_in_a_committed_file():
    """A file of an older benchmark may lack the newest numbers."""
    records: dict[str, list[dict]] = {}
    for file in machines.MACHINES.glob("*.json"):
        for name, found in machines.read(file)["benchmarks"].items():
            if "error" not in found and name in BENCHMARKS:
                records.setdefault(name, []).append(found)
    assert records
    for name, measured in records.items():
        for number in BENCHMARKS[name].numbers:
            found = [machines._find(record, number.keys) for record in measured]
            assert any(value is not None for value in found), (name, number.keys)


def test_a_machine_is_named_by_its_gpu_or_by_its_processor_cores_and_instructions(monkeypatch):
    monkeypatch.setattr(machines, "available_cpus", lambda: 2)
    cpu = {"cpu": "Intel(R) Xeon(R) Platinum 8488C CPU @ 2.40GHz", "cpu_instructions": []}
    assert machines.machine_of(cpu)["name"] == "cpu-intel-xeon-platinum-8488c-2"
    epyc = {"cpu": "AMD EPYC", "cpu_instructions": ["avx2", "avx512_f", "avx512_bf16"]}
    assert machines.machine_of(epyc)["name"] == "cpu-amd-epyc-2-avx512-bf16"
    gpu = machines.machine_of(cpu | {"gpu": "NVIDIA H100 80GB HBM3"})
    assert gpu["name"] == "nvidia-h100-80gb-hbm3"


def test_a_new_measurement_replaces_only_its_own(tmp_path):
    for name, value in (("a", 1), ("b", 2), ("a", 3)):
        file = machines.merge(tmp_path, MACHINE, name, record(value=value))
    machines.merge(tmp_path, MACHINE, "b", record(error="too slow"))
    machines.merge(tmp_path, MACHINE, "c", record(error="too slow"))
    found = json.loads(file.read_text())
    assert file == tmp_path / "cpu-some-2.json" and found["machine"] == MACHINE
    assert found["benchmarks"] == {
        "a": record(value=3),
        "b": record(value=2),
        "c": record(error="too slow"),
    }
    (tmp_path / "cpu-some-2.json").write_text("[1]")
    with pytest.raises(InputError, match="cpu-some-2.json is not a file of measurements"):
        machines.merge(tmp_path, MACHINE, "a", record(value=4))


@pytest.fixture
def fast(monkeypatch):
    """A registry of one benchmark."""
    numbers = (Number("speed of light", "deep/value", "{:.1f} m/s"), Number("right", "right", "{}"))
    only = {"fast": Benchmark("fast.py", numbers)}
    monkeypatch.setattr(machines, "BENCHMARKS", only)
    monkeypatch.setattr(machines, "GPU", {})


def test_the_table_has_a_column_for_each_machine_and_an_empty_one_without_a_gpu(tmp_path, fast):
    machines.merge(tmp_path, MACHINE, "fast", record(deep={"value": 1.25}, right=True))
    assert machines.table(tmp_path).splitlines() == [
        "| benchmark |  | cpu-some-2 | GPU |",
        "| --- | --- | --: | --: |",
        "| fast | speed of light | 1.2 m/s |  |",
        "| fast | right | yes |  |",
    ]
    other = record(deep={"value": 9})
    other["environment"] = {"command": ["fast.py", "--rounds", "3"], "device": "cuda:0"}
    machines.merge(tmp_path, MACHINE | {"name": "best", "gpu": "best"}, "fast", other)
    lines = machines.table(tmp_path).splitlines()
    assert lines[0] == "| benchmark |  | cpu-some-2 | best |"
    assert lines[2] == "| fast | speed of light | 1.2 m/s | 9.0 m/s \\* |"
    assert lines[-1] == "\\* measured with other arguments than the benchmark has now"


def test_tables_are_written_between_their_marks(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(tables, "TABLES", {"one": lambda: "new\n", "other": lambda: "newer\n"})
    start, end = "<!-- table: {} -->\n", "<!-- /table -->\n"
    files = [tmp_path / "page.md", tmp_path / "plain.md"]
    page = "before\n" + start.format("one") + "{}" + end + "between\n" + start.format("other")
    page += "{}" + end + "after\n"
    files[0].write_text(page.format("old\n", ""))
    files[1].write_text("no table\n")
    assert runner.main(["--write", *map(str, files)]) == 0
    assert files[0].read_text() == page.format("new\n", "newer\n")
    assert files[1].read_text() == "no table\n"


@pytest.mark.parametrize(
    "text, words",
    [
        ("<!-- table: one -->\n", "<!-- /table -->"),
        ("<!-- /table -->\n", "<!-- table: NAME -->"),
        ("<!-- table: one -->\n<!-- table: one -->\n<!-- /table -->\n", "<!-- /table -->"),
        ("<!-- table: cifra10 -->\n<!-- /table -->\n", "nearest is .cifar10"),
        (None, "cannot be read"),
    ],
)
def test_a_wrong_page_is_refused_and_stays(text, words, tmp_path, capsys):
    page = tmp_path / "page.md"
    if text is not None:
        page.write_text(text)
    assert runner.main(["--write", str(page)]) == 2
    error = capsys.readouterr().err
    assert "page.md" in error and re.search(words, error)
    assert text is None or page.read_text() == text


BENCHMARK = """
import argparse, json, pathlib, subprocess, sys, time
parser = argparse.ArgumentParser()
for name in ("how", "--out", "--device"):
    parser.add_argument(name)
args = parser.parse_args()
if args.how == "fails":
    sys.exit("the reason")
if args.how == "hangs":
    subprocess.run(["sleep", "60"])
path = pathlib.Path(args.out)
path.parent.mkdir(parents=True, exist_ok=True)
command = {"command": sys.argv, "device": args.device}
path.write_text(json.dumps({"how": args.how, "environment": command}))
"""


def test_a_benchmark_that_fails_or_hangs_stops_no_other(tmp_path, monkeypatch, capsys):
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "benchmarks" / "fast.py").write_text(BENCHMARK)
    monkeypatch.setattr(runner, "ROOT", tmp_path)
    for name in ("fails", "hangs", "works"):
        monkeypatch.setitem(runner.ALL, name, Benchmark("fast.py", (), (name,), seconds=20))
    monkeypatch.setitem(runner.ALL, "hangs", runner.ALL["hangs"]._replace(seconds=0.2))
    argv = ["fails", "hangs", "works", "--out", str(tmp_path / "machines"), "--device", "cpu"]
    assert runner.main(argv) == 1
    (file,) = (tmp_path / "machines").iterdir()
    found = json.loads(file.read_text())["benchmarks"]
    assert found["works"]["how"] == "works" and found["works"]["environment"]["device"] == "cpu"
    assert found["fails"]["error"] == "it ended with status 1: the reason"
    assert found["hangs"]["error"] == "it took longer than its limit of 0.2 s"
    assert capsys.readouterr().out.endswith("failed: fails, hangs\n")


def test_names_are_chosen_and_a_wrong_one_names_the_nearest(capsys):
    assert runner.chosen([]) == list(BENCHMARKS)
    assert runner.chosen(["knn", "gpu"]) == ["knn", *GPU]
    assert runner.main(["--list"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == list(runner.ALL)
    assert runner.main(["kn"]) == 2
    assert "'knn'" in capsys.readouterr().err


@pytest.mark.parametrize("part", ["waits", "step-l", "features"])
def test_a_part_of_the_gpus_runs_at_a_tiny_size_on_a_cpu(part):
    assert {f"gpu-{name}" for name in gpu.PARTS} == GPU.keys()
    args = Namespace(part=part, device="cpu", tiny=True)
    found = gpu.PARTS[part](args, torch.device("cpu"))
    assert "error" not in str(found)
    numbers = GPU[f"gpu-{part}"].numbers
    present = [number.what for number in numbers if machines._find(found, number.keys) is not None]
    on_a_gpu = ("peak memory", "CUDA graphs", "wait for the GPU")
    assert present == [number.what for number in numbers if not number.what.endswith(on_a_gpu)]


def test_two_ranks_on_gpus_do_not_share_the_gpu_that_the_runner_names(monkeypatch):
    """`python -m benchmarks gpu --device cuda` gives each part the device cuda:0."""
    devices = []

    class Rank:
        returncode = 1

        def __init__(self, command, **options):
            devices.append(command[command.index("--device") + 1])

        def communicate(self):
            return "0", ""

    monkeypatch.setattr(gpu.subprocess, "Popen", Rank)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    args = Namespace(part="ranks", device="cuda:0", tiny=False)
    gpu.ranks(args, torch.device("cuda:0"))
    assert devices == ["cuda", "cuda"]


@pytest.fixture
def contest(monkeypatch):
    """The benchmark contest.py, which runs no command: ``contest.commands`` lists them."""
    module = import_module("benchmarks.contest")

    def run_ldae(*words):
        module.commands.append([str(word) for word in words])
        finished(Path(words[-1]), top1=50.0, top1_k20=40.0)

    monkeypatch.setattr(module, "commands", [], raising=False)
    monkeypatch.setattr(module, "run_ldae", run_ldae)
    monkeypatch.setattr(module, "environment", dict)
    return module


def finished(folder, **results):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "results.json").write_text(json.dumps({"results": results}))


def trained(run, images=(100, 200, 300), speeds=(1.0, 10.0, 20.0)):
    """Write the files of a run with a checkpoint after each of its records."""
    (run / "checkpoints").mkdir(parents=True)
    (run / "config.yaml").write_text("kind: pretraining\n")
    records = [{"images": n, "images_per_second": speed} for n, speed in zip(images, speeds)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(one) + "\n" for one in records))
    for seen in images:
        (run / "checkpoints" / f"images-{seen:012d}.pt").write_text(str(seen))
    (run / "seconds.json").write_text('{"images": 300, "seconds": 1.0}')


def test_the_seconds_of_a_run_add_up(tmp_path):
    """The first record, which compiles, counts at the median speed of the others."""
    run = tmp_path / "run"
    trained(run)
    assert command.seconds_of(run) == pytest.approx(100 / 15 + 15, abs=0.05)
    finished(run, box_ap50=40.0)
    assert detection.measured(run) == {
        "results": {"box_ap50": 40.0},
        "images": 300,
        "minutes_of_training": round(command.seconds_of(run) / 60, 2),
    }


def test_contestants_train_for_the_same_time_at_the_speed_of_one_machine(
    contest, tmp_path, monkeypatch
):
    """Speeds are kept; who comes later, on a slower machine, is measured beside the rival."""
    found = iter([{"mae": 100.0, "l_dae": 50.0}, {"mae": 20.0, "masked": 15.0}])
    measured = []
    monkeypatch.setattr(
        contest, "calibrate", lambda args, words: measured.append([*words]) or next(found)
    )
    wanted = {"mae": 12_000, "l_dae": 6_000, "masked": 9_000}
    args, words = Namespace(runs=tmp_path, minutes=2), dict.fromkeys(wanted, [])
    for names in (["l_dae"], ["mae", "l_dae"], ["mae", "masked"]):
        images = contest.images_in_the_time(args, words, names)
        assert images == {name: wanted[name] for name in names}
    assert measured == [["mae", "l_dae"], ["mae", "masked"]]


def test_leads_have_the_settings_of_those_that_they_change(contest):
    """And the row that won has the settings of the lead that won."""
    found = tomllib.loads(contest.CONTEST.read_text())
    words = contest.words_of(found["leads"], ["--scale", "demo"])
    assert words["masked, without features"] == [
        *("l_dae", "--scale", "demo", "--objective.target", "whitened"),
        *("--objective.residual-weight", "1.0", "--masking.ratio", "0.75"),
        *("--masking.kept-weight", "0.2", "--features.share", "0.0"),
    ]
    won = "narrow, normalized, only dropped tokens, half without noise, sigma to 0.5"
    row, *settings = words[won]
    changes = {name.removeprefix("--"): value for name, value in zip(settings[::2], settings[1::2])}
    lead = flatten(config(row, changes.pop("scale")))
    lead |= {name.replace("-", "_"): value for name, value in changes.items()}
    winner = flatten(config("l_dae_masked", "demo"))
    differing = {name for name in winner if str(winner[name]) != str(lead[name])}
    # The target reads no weight of axes, and the encoder has four heads too.
    assert differing == {"objective.residual_weight", "model.decoder_num_heads"}


def test_turns_of_a_calibration_count_what_is_new_and_compiled(contest, tmp_path, monkeypatch):
    """Each turn resumes, and its first record does not count."""
    monkeypatch.setattr(contest, "SECONDS_OF_A_TURN", 0)
    program = (
        "import json, pathlib, signal, sys, time\n"
        "signal.signal(signal.SIGINT, signal.SIG_DFL)\n"
        "run = pathlib.Path(sys.argv[-1])\n"
        "run.mkdir(parents=True, exist_ok=True)\n"
        "for speed in (1.0, 40.0, 60.0):\n"
        "    with open(run / 'metrics.jsonl', 'a') as file:\n"
        "        print(json.dumps({'images': 1, 'images_per_second': speed}), file=file)\n"
        "time.sleep(60)\n"
    )
    start = contest.subprocess.Popen

    def popen(command, **how):
        return start([command[0], "-c", program, *command[3:]], **how)

    monkeypatch.setattr(contest.subprocess, "Popen", popen)
    run = tmp_path / "run"
    turns = [contest.take_turn(["pretrain", "--run", str(run)], run) for _ in range(2)]
    assert turns == [[40.0, 60.0]] * 2


def test_finished_runs_are_fine_tuned_once_and_have_a_column(contest, tmp_path, monkeypatch):
    argv = "contest.py finetune --data d --eval-data e --graders knn --seeds 2 --runs".split()
    monkeypatch.setattr("sys.argv", [*argv, str(tmp_path), "--only", "mae"])
    with pytest.raises(SystemExit, match="mae-seed0 is not trained"):
        contest.main()
    runs = [tmp_path / f"{name}-seed{seed}" for name in ("l-dae", "mae") for seed in (0, 1)]
    for run in runs:
        trained(run)
        finished(run / "evals" / "knn", top1_k20=40.0)
    finished(runs[2] / "untrained" / "knn", top1_k20=30.0)
    monkeypatch.setattr(contest, "differences", lambda args, name: {})
    (tmp_path / "rates.json").write_text('{"mae": 9.0}')
    contest.main()
    contest.main()
    assert [command[0] for command in contest.commands] == ["finetune"] * 3
    scratch = [command for command in contest.commands if "--model.random-init" in command]
    assert [command[-1] for command in scratch] == [str(runs[2] / "untrained" / "finetuned")]
    assert all(command[1] in map(str, runs[2:]) for command in contest.commands)
    lines = (tmp_path / "table.md").read_text().splitlines()
    assert lines[0] == "|  | knn | finetuned | images | images/s in turns |"
    assert "| mae | 40.0 ± 0.0 | 50.0 ± 0.0 | 300 | 9 |" in lines
    assert "| mae, untrained | 30.0 | 50.0 |  |  |" in lines
    assert "| l_dae | 40.0 ± 0.0 |  | 300 |  |" in lines  # which --only left out


def test_each_checkpoint_of_a_course_is_graded_once(contest, tmp_path, monkeypatch):
    monkeypatch.setattr(course, "environment", dict)
    monkeypatch.setattr(
        course, "train", lambda data, words, run, seed, images: run.exists() or trained(run)
    )
    rates = {"mae": 300 / 3600, "l_dae": 300 / 3600}
    (tmp_path / "rates.json").write_text(json.dumps(rates))
    argv = "course.py mae l_dae --data d --eval-data e --runs".split()
    monkeypatch.setattr("sys.argv", [*argv, str(tmp_path)])
    course.main()
    commands = list(contest.commands)
    course.main()
    # Two embeddings and two graders: of the pixels, and of three checkpoints of two runs.
    assert contest.commands == commands and len(commands) == 4 * (1 + 3 * 2)
    found = json.loads((tmp_path / "course.json").read_text())
    assert [part["name"] for part in found["contestants"]] == ["mae", "l_dae"]
    for part in found["contestants"]:
        assert [point["images"] for point in part["checkpoints"]] == [100, 200, 300]
        assert part["checkpoints"][-1] == {
            "images": 300, "seconds": 3600.0, "accuracies": {"linear": 50.0, "knn": 40.0}
        }  # fmt: skip
    embeddings = [command for command in commands if command[0] == "embed"]
    embedded = {command[1] for command in embeddings}
    # Networks are compared by one pooling, and pixels have none.
    assert all(("--pools" in words) == (words[1] != "pixels:32") for words in embeddings)
    for run in map(Path, embedded - {"pixels:32"}):
        (only,) = (run / "checkpoints").iterdir()
        assert only.read_text() in str(run) and (run / "config.yaml").exists()
    assert found["pixels"] == {"linear": 50.0, "knn": 40.0}


def test_a_run_with_an_early_checkpoint_is_a_backbone_of_that_checkpoint(contest, tiny, tmp_path):
    run = tmp_path / "run"
    pretrain(tiny(system__keep=0, system__save_minutes=0, optim__blr=0.1), run, "l_dae")
    first, *_, last = Checkpoints(run).paths()
    early = load_backbone(course.run_with(run, first, tmp_path / "early"))
    late = load_backbone(course.run_with(run, last, tmp_path / "late"))
    newest = load_backbone(run).state_dict()
    assert early.images_seen < late.images_seen == load_backbone(run).images_seen
    assert all(torch.equal(part, newest[name]) for name, part in late.state_dict().items())
    assert any(not torch.equal(part, newest[name]) for name, part in early.state_dict().items())
