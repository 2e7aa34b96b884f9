"""The symptoms of a collapse and of a standstill, by the criteria of their docstring."""

import pytest

from ldae.runs.symptoms import new_symptoms, symptoms

HEALTHY = [
    {"loss": 1.0, "lr": 0.1, "rankme": 12.0, "spread": 0.30, "psnr_25": 8.0, "psnr_50": 7.0},
    {"loss": 0.6, "lr": 0.3, "rankme": 20.0, "spread": 0.35, "psnr_25": 11.0, "psnr_50": 9.0},
    {"loss": 0.5, "lr": 0.4, "rankme": 25.0, "spread": 0.40, "psnr_25": 12.0, "psnr_50": 10.0},
    {"loss": 0.49, "lr": 0.3, "rankme": 26.0, "spread": 0.41, "psnr_25": 12.1, "psnr_50": 10.1},
    {"loss": 0.49, "lr": 0.1, "rankme": 26.1, "spread": 0.41, "psnr_25": 12.1, "psnr_50": 10.2},
]


def records(**changes: list[float]) -> list[dict]:
    """Return records with an image number each, and with values in place of the healthy ones."""
    made = [{"images": 100 * n} | record for n, record in enumerate(HEALTHY, 1)]
    for name, values in changes.items():
        for record, value in zip(made, values, strict=True):
            record[name] = value
    return made


def found(history: list[dict], **how) -> list[tuple[int, str]]:
    """Return the images seen and the first words of each sentence, when it is new."""
    ends = range(1, len(history) + 1)
    return [
        (history[end - 1]["images"], " ".join(sentence.split()[:3]))
        for end in ends
        for sentence in new_symptoms(history[:end], **how)
    ]


COLLAPSE, STILL, LOSS = "the features have", "the run stands", "the loss stands"


def test_a_healthy_run_has_none():
    assert found(records()) == [] and symptoms([]) == {}


@pytest.mark.parametrize(
    "changes, at",
    [
        ({"spread": [0.3, 0.3, 0.009, 0.001, 0.3]}, 300),
        ({"spread": [0.3, 0.3, 0.05, 0.05, 0.3]}, 300),
        ({"rankme": [12, 20, 3.9, 3.9, 20]}, 300),
        ({"rankme": [1.4, 20, 20, 20, 20]}, 100),
        ({"rankme": [0, 20, 20, 20, 20]}, 100),
    ],
)
def test_a_collapse_is_reported_when_it_begins(changes, at):
    assert found(records(**changes)) == [(at, COLLAPSE)]


def test_a_symptom_that_comes_back_is_reported_again():
    history = records(spread=[0.3, 0.001, 0.3, 0.001, 0.001])
    assert found(history) == [(200, COLLAPSE), (400, COLLAPSE)]


FROZEN = {
    "rankme": [12, 20, 20.01, 20, 20],
    "spread": [0.3, 0.35, 0.35, 0.35, 0.35],
    "psnr_25": [8, 11, 11.004, 11, 11],
    "psnr_50": [7, 9, 9, 9, 9],
}


def test_a_run_that_moves_nothing_stands_still_after_three_measurements():
    assert found(records(**FROZEN)) == [(400, STILL)]
    for name, value in (("rankme", 20.1), ("spread", 0.36), ("psnr_25", 11.1), ("psnr_50", 9.1)):
        moves = FROZEN | {name: [*FROZEN[name][:3], value, FROZEN[name][4]]}
        assert found(records(**moves)) == []


def test_nothing_has_to_move_at_the_end_of_the_schedule():
    assert found(records(**FROZEN, lr=[0.1, 0.3, 0.4, 0.03, 0.01])) == []


@pytest.mark.parametrize("continued", [False, True])
def test_a_loss_that_does_not_fall_stands_still_unless_it_began_low(continued):
    history = records(loss=[1.0, 1.01, 0.999, 1.0, 0.8])
    expected = [] if continued else [(300, LOSS)]
    assert found(history, continued=continued) == expected


def test_records_without_features_count_as_losses_only():
    first = {"images": 10, "loss": 0.4, "lr": 0.1}  # below all others
    assert found([first, *records()]) == [(300, LOSS)]
    assert found([first, *records()], continued=True) == []
    assert new_symptoms([*records(spread=[0.001] * 5), first | {"images": 600}]) == []
