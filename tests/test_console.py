from ldae import console


def test_durations_are_shown_as_a_clock():
    assert console.format_duration(5.9) == "00:00:05"
    assert console.format_duration(3 * 3600 + 62) == "03:01:02"
    assert console.format_duration(93784) == "1d 02:03:04"
