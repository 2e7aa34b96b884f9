"""The record of the environment."""

import json

from ldae.runs import environment


def test_the_environment_holds_versions_and_device():
    record = environment.environment("cpu")
    assert record["device"] == "cpu" and record["packages"]["torch"] and record["python"]
    assert record["packages"].keys() >= {"ldae", "timm", "numpy", "faiss-cpu"}
    json.dumps(record)


def test_a_missing_package_has_no_version(monkeypatch):
    monkeypatch.setattr(environment, "_PACKAGES", ("no-such-package",))
    assert environment.environment()["packages"] == {"no-such-package": None}
