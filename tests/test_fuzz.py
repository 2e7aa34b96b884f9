"""Damaged input of every kind is read, or refused in one sentence; nothing else, and in time.

`benchmarks/fuzz.py` does the same with many more cases.
"""

import pytest
from hypothesis import HealthCheck, given, settings

from benchmarks.fuzz import Fuzzed
from benchmarks.fuzz_targets import TARGETS
from benchmarks.mutations import Edit, mutate
from ldae.errors import InputError

CASES = {"images": 80, "run folders": 8, "resumed runs": 4}


@pytest.mark.parametrize("name", TARGETS)
def test_damaged_files_are_read_or_refused_in_one_sentence(name, tmp_path):
    fuzzed = Fuzzed(TARGETS[name], tmp_path)
    for valid in fuzzed.mutated[: None if name == "images" else 4]:
        assert fuzzed.answer(valid, []) == "read", valid

    @settings(
        max_examples=CASES.get(name, 30),
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(fuzzed.cases())
    def every_case(case):
        assert fuzzed.answer(*case) in ("read", "refused")

    every_case()


def test_a_traceback_a_change_and_a_long_sentence_are_failures(tmp_path):
    """The judge itself: it finds what it looks for."""

    def change(folder, name):
        (folder / "other").write_bytes(b"lost")

    def two_lines(folder, name):
        raise InputError("one\ntwo")

    def no_sentence(folder, name):
        raise KeyError(name)

    target = TARGETS["lists"]._replace(
        tree=lambda: {"other": b"", "a": b"abc"}, mutated=lambda name: name == "a"
    )
    for read, error in (
        (change, AssertionError),
        (two_lines, AssertionError),
        (no_sentence, KeyError),
    ):
        fuzzed = Fuzzed(target._replace(read=read), tmp_path)
        with pytest.raises(error):
            fuzzed.answer("a", [])
        assert (tmp_path / "other").read_bytes() == b""


def test_edits_overwrite_insert_delete_and_truncate():
    content = b"0123456789"
    assert mutate(content, [Edit(2, 2, b"ab")]) == b"01ab456789"
    assert mutate(content, [Edit(0.5, 0, b"x"), Edit(0, 1, b"")]) == b"1234x56789"
    assert mutate(content, [Edit(-3, 1 << 62, b"")]) == b"0123456"
    assert mutate(content, [Edit(99, 1, b"end"), Edit(-99, 0, b"<")]) == b"<0123456789end"
