"""Classes are matched by name or number, never by the order of the folders' names."""

import numpy as np
import pytest
import torch
from timm.data import ImageNetInfo
from torch import nn

from ldae.data.source import Source
from ldae.errors import InputError
from ldae.evals.class_maps import label_targets, real_label_targets

SYNSETS = ImageNetInfo().label_names()


class Named(Source):
    """A source that has only names and classes."""

    def __init__(self, classes=None, names=None):
        labels = None if classes is None else np.arange(len(classes))
        super().__init__("SET", "all", sorted(classes) if classes else None, labels)
        self.names = names or classes

    def __len__(self):
        return len(self.names)

    def name(self, i):
        return self.names[i]


def classifier(outputs: int = 1000, names: list[str] | None = None) -> nn.Module:
    model = nn.Identity()
    model.num_classes, model.pretrained_cfg = outputs, {"label_names": names}
    return model


def found(source: Source, model: nn.Module, class_map: str | None = None) -> tuple[list[int], str]:
    """Return the output of each class of the source, and how it was matched."""
    targets = label_targets(source, model, "MODEL", class_map)
    return targets.compared[targets.labels[:, 0]].tolist(), targets.matched_by


def test_synsets_are_outputs_by_name():
    chosen = [SYNSETS[n] for n in (900, 3, 77)]
    assert found(Named(chosen), classifier()) == ([3, 77, 900], "names")
    reverse = classifier(1000, SYNSETS[::-1])
    assert found(Named(chosen), reverse) == ([996, 922, 99], "names")


def test_numbers_are_outputs_by_number_and_not_by_order():
    source = Named([str(n) for n in range(1000)])
    assert source.classes[:3] == ["0", "1", "10"]  # sorted as text: the trap
    for class_map in (None, "imagenet-v2"):
        outputs, matched_by = found(source, classifier(), class_map)
        assert outputs == [int(name) for name in source.classes]
    assert found(Named(["0002", "0010"]), classifier(20)) == ([2, 10], "numbers")
    # The numbers of V2 are ImageNet's classes, at any outputs of the classifier.
    assert found(Named(["0", "2"]), classifier(1000, SYNSETS[::-1]), "imagenet-v2")[0] == [999, 997]


def test_names_recorded_with_the_classifier_come_first():
    model = classifier(3, ["2", "1", "0"])
    assert found(Named(["0", "1", "2"]), model) == ([2, 1, 0], "names")


@pytest.mark.parametrize("classes", [12, 9])
def test_names_with_leading_zeros_are_names(classes):
    folders = [f"{number:02}" for number in range(1, 13)]
    model = classifier(12, folders)
    assert found(Named(folders[:classes]), model) == (list(range(classes)), "names")


@pytest.mark.parametrize(
    "class_map, folders, wanted, count",
    [
        ("imagenet-a", ["n01498041", "n01531178"], [6, 11], 200),
        ("imagenet-r", ["n01443537", "n01484850"], [1, 2], 200),
        ("imagenet-sketch", ["n01440764", "n15075141"], [0, 999], 1000),
        ("imagenet-v2", ["n01440764", "n15075141"], [0, 999], 1000),
    ],
)
def test_a_map_restricts_to_its_classes(class_map, folders, wanted, count):
    targets = label_targets(Named(folders), classifier(), "MODEL", class_map)
    assert len(targets.compared) == count and (targets.compared.diff() > 0).all()
    assert targets.compared[targets.labels[:, 0]].tolist() == wanted


def test_a_classifier_with_some_of_a_maps_classes_competes_in_these():
    model = classifier(3, ["n01531178", "n02119789", "n01498041"])
    targets = label_targets(Named(["n01498041", "n01531178"]), model, "MODEL", "imagenet-a")
    assert targets.compared.tolist() == [0, 2] and targets.labels.tolist() == [[1], [0]]
    with pytest.raises(InputError, match="'n01534433' .* none of the 3 classes of MODEL"):
        label_targets(Named(["n01498041", "n01534433"]), model, "MODEL", "imagenet-a")


def test_a_map_can_be_a_file(tmp_path):
    file = tmp_path / "map.txt"
    file.write_text("Hund dog\nKatze cat\n\n7\t0\n")
    model = classifier(4, ["cow", "cat", "dog", "horse"])
    with pytest.raises(InputError, match="class '0' of class map .* none of the 4 classes"):
        found(Named(["007", "Hund", "Katze"]), model, str(file))
    file.write_text("Hund dog\nKatze cat\n\nhorse\n")
    targets = label_targets(Named(["Hund", "Katze", "horse"]), model, "MODEL", str(file))
    assert targets.compared.tolist() == [1, 2, 3] and targets.labels.tolist() == [[1], [0], [2]]
    file.write_text("Hund 2\n007\t0\n", "utf-8-sig")  # as Notepad writes it
    assert found(Named(["7", "Hund"]), classifier(4), str(file)) == ([0, 2], "numbers")


def test_wrong_maps_are_refused(tmp_path):
    file = tmp_path / "map.txt"
    for content, message in (
        ("a b c\n", "line 1 of class map"),
        ("a 1\na 2\n", "line 2 of class map"),
        ("\n", "is empty"),
        ("b 1\n", "class 'a' of SET is not in class map"),
    ):
        file.write_text(content)
        with pytest.raises(InputError, match=message):
            found(Named(["a"]), classifier(), str(file))
    with pytest.raises(InputError, match="neither imagenet-a, .* nor a text file"):
        found(Named(["a"]), classifier(), "imagenet-z")


def test_order_is_the_last_resort_and_for_classifiers_without_names():
    assert found(Named(["b", "a"]), classifier(2)) == ([0, 1], "order")
    for model in (classifier(2, ["a", "c"]), classifier(3)):
        with pytest.raises(InputError, match="class '.' of SET is none of the . classes of MODEL"):
            found(Named(["b", "a"]), model)
    with pytest.raises(InputError, match="class '1000'"):
        found(Named(["1000"]), classifier())


def test_real_labels_are_found_by_the_number_in_the_file_name():
    """Beyer et al.: the first image has no label, the second two, the third two."""
    names = [f"n01440764/ILSVRC2012_val_{n:08d}.JPEG" for n in (3, 1, 2, 4)]
    targets = real_label_targets(Named(names=names), classifier(), "MODEL")
    assert targets.images.tolist() == [0, 2, 3]
    sets = [set(row.tolist()) - {-1} for row in targets.labels]
    assert sets == [{230, 231}, set(), {795, 970}, {809}]
    reverse = real_label_targets(Named(names=names), classifier(1000, SYNSETS[::-1]), "MODEL")
    assert set(reverse.labels[0].tolist()) == {999 - 230, 999 - 231}
    more = real_label_targets(Named(names=names), classifier(1001, ["other", *SYNSETS]), "MODEL")
    assert more.compared.equal(torch.arange(1, 1001)) and more.labels[0].tolist() == [230, 231]


def test_images_and_classifiers_without_real_labels_are_refused():
    with pytest.raises(InputError, match="SET/cat.jpg is not named ILSVRC2012_val_00000001"):
        real_label_targets(Named(names=["cat.jpg"]), classifier(), "MODEL")
    with pytest.raises(InputError, match="SET/ILSVRC2012_val_00050001.JPEG is not named"):
        real_label_targets(Named(names=["ILSVRC2012_val_00050001.JPEG"]), classifier(), "MODEL")
    with pytest.raises(InputError, match="MODEL knows 0 of ImageNet's 1000 classes"):
        real_label_targets(Named(names=["ILSVRC2012_val_00000002.JPEG"]), classifier(10), "MODEL")
    with pytest.raises(InputError, match="none of the images of SET has a real label"):
        real_label_targets(Named(names=["ILSVRC2012_val_00000001.JPEG"]), classifier(), "MODEL")
