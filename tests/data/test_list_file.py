import pytest

from ldae.data.image import BadImage
from ldae.data.open import open_source
from ldae.errors import InputError
from ldae.evals.features import known_labels


@pytest.fixture
def listed(make_tree):
    """listed(name, content): open a list file beside the folder tree with images."""
    root = make_tree("tree", ["a/1.png", "a/2 b.png", "b/3.png"])

    def open_list(name: str, content: str | bytes):
        path = root.with_name(name)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return open_source(str(path), "train")

    return open_list


def content(source) -> list[tuple[str, str]]:
    labels = source.labels
    kinds = ["" if labels is None else source.classes[label] for label in labels]
    return [(source.name(i), kind) for i, kind in enumerate(kinds)]


PAIRS = [("tree/b/3.png", "two"), ("tree/a/2 b.png", "one"), ("tree/a/1.png", "two")]


@pytest.mark.parametrize(
    "name, text",
    [
        ("l.txt", "{0} {1}\n\n{2}   {3}\r\n{4}\t{5}\n"),
        ("l.csv", "{0},{1}\n{2},{3}\n{4},{5}"),
        ("l.csv", '\ufeffsize,Class,file_name\r\n1,{1},{0}\r\n2,{3},"{2}"\r\n3,{5},{4}\r\n'),
        ("l.tsv", "path\tlabel\n{0}\t{1}\n{2}\t{3}\n\n{4}\t{5}\n"),
    ],
)
def test_a_line_is_a_path_and_a_label_in_the_order_of_the_file(name, text, listed):
    source = listed(name, text.format(*(cell for pair in PAIRS for cell in pair)))
    assert content(source) == PAIRS
    assert source.classes == ["one", "two"] and source.split == "all"
    assert [source.image(i).size for i in range(3)] == [(8, 8)] * 3


@pytest.mark.parametrize("name", ["l.txt", "l.csv", "l.tsv"])
def test_without_labels_the_images_are_unlabelled(name, listed):
    source = listed(name, "tree/a/2 b.png\ntree/a/1.png\n")
    assert source.labels is None and [source.name(0), source.name(1)] == [
        "tree/a/2 b.png",
        "tree/a/1.png",
    ]
    with pytest.raises(InputError, match=r"has no labels, .*: .* that named label or class$"):
        known_labels(source)


def test_numbers_are_classes_in_their_order(listed):
    source = listed("l.txt", "tree/a/1.png 10\ntree/b/3.png 9\n")
    assert source.classes == ["9", "10"] and source.labels.tolist() == [1, 0]


def test_absolute_paths_are_read_too(listed, tmp_path):
    source = listed("l.txt", f"{tmp_path}/tree/a/1.png x\n")
    assert source.image(0).size == (8, 8)


def test_a_missing_file_is_a_bad_image_with_its_path(listed, tmp_path):
    source = listed("l.txt", "tree/a/1.png x\ntree/a/9.png x\n")
    with pytest.raises(BadImage, match=f"^{tmp_path}/tree/a/9.png cannot be decoded: No such file"):
        source.image(1)


@pytest.mark.parametrize(
    "name, text, message",
    [
        ("l.txt", "", "contains no images"),
        ("l.txt", "tree/a/1.png\nthis is prose\n", "line 2 of .* names no image: 'this is'"),
        ("l.txt", "x" * 500, "names no image: 'x{80}...'"),
        ("l.txt", "a.png 1\nb.png 2\na.png 1\n", "lines 1 and 3 of .* both name 'a.png'"),
        ("l.txt", "a.png 1\nb.png\n", "line 2 of .* has no label, and others have"),
        ("l.txt", "a/1.png x\n", "line 1 of .* names 'a/1.png', which does not exist in "),
        ("l.txt", f"{'x' * 300}.png 1\n", "line 1 of .* which does not exist in "),
        ("l.txt", "a.png 1".encode("utf-16"), "is no text in UTF-8"),
        ("l.csv", "a.png,1\nb.png\n", "line 2 of .* has another number of columns than line 1"),
        ("l.csv", "a.png,1,2\n", "has 3 columns: name them in its first line, as path and label"),
        ("l.csv", "name,label\na.png,1\n", "has no column path; .* are 'name, label'"),
        ("l.csv", 'path,label\n"a.png"x,1\n', "line 2 of .* cannot be read: "),
        ("l.tsv", "path\tlabel\na.png\t1\nb.png\t\n", "line 3 of .* has no label, and others have"),
    ],
)
def test_wrong_lists_are_refused_in_one_sentence(name, text, message, listed, tmp_path):
    with pytest.raises(InputError, match=message) as caught:
        listed(name, text)
    assert str(tmp_path / name) in str(caught.value) and "\n" not in str(caught.value)
