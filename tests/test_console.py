from ldae import console


def test_durations():
    assert console.duration(5.9) == "00:00:05"
    assert console.duration(3 * 3600 + 62) == "03:01:02"
    assert console.duration(93784) == "1d 02:03:04"
