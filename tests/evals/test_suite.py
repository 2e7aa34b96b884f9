"""A suite is every combination; errors name the file and the key."""

from pathlib import Path

import pytest
import timm

from ldae.cli.protocols import graders
from ldae.commands.linear import CachedProtocol
from ldae.errors import InputError
from ldae.evals.evaluation import Setup
from ldae.evals.neighbours import KNNProtocol
from ldae.evals.suite import read_suite

SUITE = """
[[backbones]]
spec = "test_vit"
random_init = true
img_size = 16

[data.a]
train = "digits"
[data.b]
train = "x.zip"
eval = "y.zip"

[protocols.knn]
k = [10, 20]
[protocols.fast]
verb = "linear"
epochs = 2
pools = ["avg"]
learning_rates = [1, 0.5]
precision = "bf16"
data = ["b"]
"""


@pytest.fixture
def read(tmp_path):
    def make(text: str, specs=("pixels:8",), **setup):
        path = tmp_path / "my.toml"
        path.write_text(text)
        return read_suite(path, specs, Setup(out=tmp_path / "out", **setup), graders())

    return make


def test_cells_are_every_combination(read, tmp_path):
    cells = read(SUITE, workers=1)
    assert [(c.backbone, c.data, c.column.name) for c in cells] == [
        (backbone, *rest)
        for backbone in ("pixels-8", "test_vit-random-init")
        for rest in (("a", "knn"), ("b", "knn"), ("b", "fast"))
    ]
    assert [cell.column.grader.name for cell in cells[:3]] == ["knn", "knn", "linear"]
    assert (cells[0].train, cells[0].eval) == ("digits", None)
    assert (cells[1].train, cells[1].eval) == ("x.zip", "y.zip")
    assert cells[0].column.protocol == KNNProtocol(k=(10, 20))
    given = {"epochs": 2, "pools": ("avg",), "learning_rates": (1.0, 0.5)}
    assert cells[2].column.protocol == CachedProtocol(**given)
    assert (cells[0].setup.random_init, cells[0].setup.img_size) == (False, None)
    assert (cells[3].setup.random_init, cells[3].setup.img_size) == (True, 16)
    assert [c.setup.precision for c in cells[:3]] == ["fp32", "fp32", "bf16"]
    assert {c.setup.workers for c in cells} == {1}
    assert cells[2].results == tmp_path / "out" / "pixels-8" / "b" / "fast" / "results.json"


def test_random_init_on_the_command_line_does_not_apply_to_the_suites_backbones(read):
    """Each group of backbones has its own switch for the untrained control."""
    cells = read(SUITE.replace("random_init = true", ""), random_init=True)
    assert [c.setup.random_init for c in cells] == [True] * 3 + [False] * 3


def test_cells_with_the_same_random_weights_follow_each_other(read):
    cells = [c for c in read(SUITE, seeds=(3, 1)) if c.setup.random_init and c.data == "b"]
    assert [(c.column.name, c.setup.seed) for c in cells] == [
        (name, seed) for seed in (1, 3) for name in ("knn", "fast")
    ]


def test_published_numbers_go_to_their_cells(read):
    published = "published.a = { knn = 74.5 }\npublished.b = { knn = 70, fast = 77.0 }"
    cells = read(SUITE.replace("img_size = 16", published))
    assert [c.published for c in cells] == [None] * 3 + [74.5, 70.0, 77.0]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("[data.a]", "[dta.a]", "the suite has no setting 'dta'; the nearest is 'data'"),
        ("k = [10, 20]", "kk = [10]", r"\[protocols.knn\] has no setting 'kk'; the nearest is 'k'"),
        ("k = [10, 20]", "k = 10", r"\[protocols.knn\]: .*'k' takes a list of int, not 10"),
        ("k = [10, 20]", "k = [1.5]", r"'k' takes a list of int, not \[1.5\]"),
        ("epochs = 2", 'epochs = "2"', r"\[protocols.fast\]: .*'epochs' takes int, not '2'"),
        ("epochs = 2", "epochs = true", "'epochs' takes int, not True"),
        ('["avg"]', '["max"]', "'pools' takes a list of default or avg or cls or cls.avg or None"),
        ("epochs = 2", 'save = "x"', "has no setting 'save'"),
        ("epochs = 2", 'out = "x"', "has no setting 'out'"),
        ("epochs = 2", "random_init = true", "has no setting 'random_init'"),
        ("epochs = 2", "k = [1]", "has no setting 'k'"),
        ("epochs = 2", "momentum = 0.1", "has no setting 'momentum'"),
        ("epochs = 2", "epochs = 0", r"\[protocols.fast\]: epochs must be at least 1, not 0"),
        ("epochs = 2", "weight_decays = []", "weight_decays must name at least one"),
        ("epochs = 2", "protocol = 'mea'", "linear has no protocol 'mea'; the nearest is 'mae'"),
        ("epochs = 2", "protocol = 'mae'", "the protocol mae of linear has no setting pools"),
        ("epochs = 2", "in_chans = 0", r"\[protocols.fast\]: in_chans must be at least 1, not 0"),
        ('"linear"', '"lienar"', r"\[protocols.fast\] has the verb 'lienar', and there are knn"),
        ('"linear"', '["linear"]', r"\[protocols.fast\] has the verb \['linear'\]"),
        ("[protocols.fast]\nverb", "[protocols.fast]\n#", "has the verb 'fast', and there are"),
        ('["b"]', '["c"]', r"\[protocols.fast\] names the data 'c', and there are a, b"),
        ('train = "x.zip"', "", r"\[data.b\] has no train"),
        ('train = "x.zip"', "train = 3", r"\[data.b\]: setting 'train' takes str, not 3"),
        ('eval = "y.zip"', 'evil = "y"', r"\[data.b\] has no setting 'evil'; .* is 'eval'"),
        ("[data.a]", '[data."a/b"]', r"\[data.a/b\]: 'a/b' cannot be a folder's name"),
        ('spec = "test_vit"', "", r"\[\[backbones\]\] 1 has no spec"),
        ("img_size = 16", "img_size = 0", r"\[\[backbones\]\] 1: img_size must be at least 1"),
        ("img_size = 16", "img = 0", r"\[\[backbones\]\] 1 has no setting 'img'"),
        ("img_size = 16", "published = 74.5", r"1: setting 'published' takes a table, not 74.5"),
        ("img_size = 16", "published.aa.knn = 7", r"1 has published .* data 'aa'; .* 'a'"),
        ("img_size = 16", "published.a = 7", r"1 published.a must be a table, not 7"),
        ("img_size = 16", "published.b.fats = 7", r"published.b has no setting 'fats'; .*fast"),
        ("img_size = 16", "published.a.fast = 7", r"1 published.a has no setting 'fast'"),
        ("img_size = 16", "published.a.knn = '7 %'", r"published.a: .*'knn' takes float, not '7"),
        ("img_size = 16", "published.a.knn = 745", r"knn must be at least 0 and at most 100"),
        ("[[backbones]]", "[backbones]", "backbones are a list of tables"),
        ("[protocols.knn]", "[protocols", "it is not a TOML file"),
        (SUITE, "[data.a]\ntrain='digits'", r"there is no table \[protocols.NAME\]"),
        (SUITE, "data = 3", r"there is no table \[data.NAME\]"),
        (SUITE, "[data]\na = 3\n[protocols.knn]", r"\[data.a\] must be a table, not 3"),
        (SUITE, "[data.a]\ntrain='d'\n[protocols]\nknn = 3", r"\[protocols.knn\] must be a table"),
    ],
)  # fmt: skip
def test_mistakes_are_refused_by_file_and_key(old, new, message, read, tmp_path):
    assert old in SUITE
    with pytest.raises(InputError, match=f"^suite .*my.toml: .*{message}"):
        read(SUITE.replace(old, new, 1))


def test_backbones_need_distinct_names(read, tmp_path):
    with pytest.raises(
        InputError, match="two backbones are called pixels-8: give one another name"
    ):
        read(SUITE, specs=("pixels:8", "pixels:8"))
    with pytest.raises(InputError, match="name a backbone on the command line, or in"):
        read(SUITE.split("[data.a]")[1].join(["[data.a]", ""]), specs=())
    named = SUITE.replace('spec = "test_vit"', 'spec = "test_vit"\nname = "pixels-8"')
    with pytest.raises(InputError, match="two backbones are called pixels-8"):
        read(named)
    with pytest.raises(InputError, match="absent.toml: it can ?not be read"):
        read_suite(tmp_path / "absent.toml", ("pixels:8",), Setup(out=tmp_path), graders())


def test_sample_suites_are_read(tmp_path):
    found = list((Path(__file__).parents[2] / "benchmarks" / "suites").glob("*.toml"))
    for path in found:
        assert read_suite(path, (), Setup(out=tmp_path), graders())
    assert found


def test_the_published_encoders_are_timms_and_each_has_a_published_number(tmp_path):
    path = Path(__file__).parents[2] / "benchmarks" / "suites" / "published.toml"
    cells = read_suite(path, (), Setup(out=tmp_path), graders())
    specs = {cell.spec for cell in cells}
    assert len(specs) == 10 and specs <= {*timm.list_pretrained()}
    assert {cell.spec for cell in cells if cell.published} == specs
