import json

from ldae.runs import environment


def test_the_environment_tells_versions_and_device():
    record = environment.environment("cpu")
    assert record["device"] == "cpu" and record["packages"]["torch"] and record["python"]
    assert record["packages"].keys() >= {"ldae", "timm", "numpy", "faiss-cpu"}
    json.dumps(record)


def test_packages_that_are_missing_are_told_as_missing(monkeypatch):
    monkeypatch.setattr(environment, "_PACKAGES", ("no-such-package",))
    assert environment.environment()["packages"] == {"no-such-package": None}
