"""The file of the images that a run skipped."""

import json

import torch

from ldae import distributed
from ldae.runs.skipped import record_skipped


def test_images_of_all_ranks_are_named_once_with_the_first_reason(tmp_path, on_ranks):
    def skip(images):
        with distributed.process_group(torch.device("cpu")):
            record_skipped(tmp_path, images[distributed.rank()])

    def skipped():
        return list(json.loads((tmp_path / "skipped.json").read_text()).items())

    first = [{}, {"b.png": "truncated"}]
    assert on_ranks(lambda: skip(first)) == ["", ""]
    assert skipped() == [("b.png", "truncated")]
    resumed = [{"c.png": "é is no image"}, {"b.png": "empty", "a.png": "empty"}]
    assert on_ranks(lambda: skip(resumed)) == ["", ""]
    assert skipped() == [("a.png", "empty"), ("b.png", "truncated"), ("c.png", "é is no image")]


def test_there_is_no_file_when_nothing_was_skipped(tmp_path):
    record_skipped(tmp_path, {})
    assert not list(tmp_path.iterdir())
