import pytest

from ldae.data.open import check_unseen, open_source, open_splits
from ldae.errors import InputError


def names(source) -> list[str]:
    return [source.name(i) for i in range(len(source))]


def class_of(source, i: int) -> str:
    return source.classes[source.labels[i]]


def test_eval_labels_follow_the_train_classes_by_name(make_tree):
    train_root = make_tree("train_data", ["ant/1.png", "bee/1.png", "cat/1.png"])
    eval_root = make_tree("eval_data", ["bee/1.png", "cat/1.png"])
    train, evaluation = open_splits(str(train_root), str(eval_root))
    assert evaluation.classes == train.classes
    assert [class_of(evaluation, i) for i in range(2)] == ["bee", "cat"]


def test_an_eval_class_unknown_in_training_is_refused(make_tree):
    roots = [str(make_tree("a", ["ant/1.png"])), str(make_tree("b", ["ant/1.png", "wasp/1.png"]))]
    with pytest.raises(InputError, match="class 'wasp' of .*b is not among the classes of .*a$"):
        open_splits(*roots)
    both = make_tree("both", ["train/ant/1.png", "val/ant/1.png", "val/wasp/1.png"])
    message = r"class 'wasp' of .*both \(eval\) is not among the classes of .*both \(train\)$"
    with pytest.raises(InputError, match=message):
        open_splits(str(both), None)


def test_eval_data_replaces_the_eval_split(make_tree):
    split = str(make_tree("split", ["train/x/1.png", "val/x/2.png"]))
    whole = str(make_tree("whole", ["x/3.png"]))
    assert names(open_splits(split, whole)[1]) == ["x/3.png"]
    train, evaluation = open_splits(whole, split)
    assert (names(train), names(evaluation)) == (["x/3.png"], ["val/x/2.png"])
    with pytest.raises(InputError, match="--eval-data"):
        open_splits(whole, None)


@pytest.mark.parametrize("name", ["0.tar", "0.PARQUET"])
def test_shards_beside_images_are_left_out_with_a_warning(name, make_tree, caplog):
    root = make_tree("tree", {"a/cover.png": None, f"a/{name}": b""})
    assert names(open_source(str(root), "train")) == ["a/cover.png"]
    suffix = name[1:].lower()
    assert [record.getMessage() for record in caplog.records] == [
        f"{root}: its 1 image files are the images, and its 1 {suffix} files are left out: to read "
        "them, name a folder without image files"
    ]


def test_an_unlabelled_split_stays_unlabelled(make_tree):
    labelled, plain = str(make_tree("l", ["x/1.png"])), str(make_tree("p", ["1.png"]))
    assert open_splits(labelled, plain)[1].labels is None
    assert open_splits(plain, labelled)[0].labels is None


def test_images_to_learn_from_are_not_graded_on(make_tree):
    root = make_tree("tree", ["train/x/1.png", "train/x/2.png", "train/y/3.png", "val/x/4.png"])
    root.with_name("link").symlink_to(root / "train")
    lists = {
        "all.txt": "train/x/1.png x\ntrain/x/2.png x\ntrain/y/3.png y\n",
        "part.txt": "../link/x/2.png x\ntrain/x/../y/3.png y\nval/x/4.png x\n",
        "other.txt": "val/x/4.png x\n",
    }
    for name, lines in lists.items():
        (root / name).write_text(lines)
    learned = [str(root / "all.txt"), str(root), f"{root}/train"]
    for spec in learned:
        train = open_source(spec, "train")
        with pytest.raises(
            InputError, match=r"^2 of the 3 images .* as .*tree/train/x/2.png: name"
        ):
            check_unseen(train, open_source(str(root / "part.txt"), "eval"))
        check_unseen(train, open_source(str(root / "other.txt"), "eval"))
    check_unseen(*open_splits(str(root), None))


def test_training_on_only_an_evaluation_split_is_refused(make_tree):
    root = make_tree("data", ["val/cat/1.png"])
    (root / "train").mkdir()
    assert len(open_source(str(root), "eval")) == 1
    with pytest.raises(InputError, match="has only an evaluation split"):
        open_source(str(root), "train")


@pytest.mark.parametrize(
    "spec, message",
    [
        ("", "no images: name their source with --data"),
        ("/no/such/place", "is named '/no/such/place'$"),
        ("scatered-digits:100", "did you mean scattered-digits"),
        ("digits:5", "neither digits nor"),
        ("scattered-digits:", "N >= 1"),
        ("scattered-digits:0", "N >= 1"),
        ("scattered-digits:ten", "N >= 1"),
        ("scattered-digits:1:2:3", "N >= 1"),
        ("scattered-digits:1:-2", "N >= 1"),
        ("torch/cifar10", "torch/cifar10@ROOT"),
        ("torch/cifar99@/tmp", "cannot be opened: Unknown torchvision dataset cifar99"),
    ],
)
def test_wrong_specs_are_refused_in_one_sentence(spec, message):
    with pytest.raises(InputError, match=message) as caught:
        open_source(spec, "train")
    assert "\n" not in str(caught.value)
