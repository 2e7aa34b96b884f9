"""Uses of the public names, read by mypy (`make lint`) only: it must see the real signatures."""

from pathlib import Path
from typing import Any, assert_type

import torch

import ldae


def right() -> None:
    run = ldae.pretrain(ldae.config("l_dae", changes={"data.source": "photos/"}), "runs/photos")
    assert_type(run, ldae.Run)
    ldae.pretrain(run.config, "runs/auto", scale="auto", hours=4)
    assert_type(ldae.load_run(Path("runs/photos")).sample(4), torch.Tensor)
    assert_type(run.denoise(run.images(8), t=10), ldae.Denoised)
    assert_type(ldae.load_backbone(run.folder), torch.nn.Module)
    setup = ldae.Setup(workers=0, out="results")
    assert_type(setup.out, str | Path | None)
    assert_type(ldae.replace(setup, {"workers": 2}), ldae.Setup)
    probe = ldae.MAEProtocol(blr=0.2)
    assert_type(ldae.linear("pixels", Path("photos"), protocol=probe), dict[Any, Any])
    assert_type(ldae.embed(run.folder, "photos/", out="features.npy"), Path)
    assert_type(ldae.finetune(ldae.finetune_config("pixels"), "runs/tuned"), dict[Any, Any])
    assert_type(ldae.detect(ldae.detect_config("pixels"), "runs/detector"), dict[Any, Any])
    found = ldae.load_detector("runs/detector")([])
    assert_type(found, list[ldae.Found])
    assert_type(ldae.rerun(Path("results.json"), tolerance=0.2), dict[Any, Any])
    seeds = ldae.Setup(seeds=(0, 1, 2), out="results")
    assert_type(ldae.linear("pixels", "photos", setup=seeds), dict[Any, Any])
    assert_type([job.id for job in ldae.jobs("runs")], list[str])
    with ldae.relisting():
        ldae.sample("runs/photos", 4, sampling=ldae.SamplingSettings(steps=10))


def wrong() -> None:
    """Each of these is an error for mypy; it reports an ignored error that is none."""
    ldae.knn("pixels", "photos/", protocol=ldae.MAEProtocol())  # type: ignore[arg-type]
    ldae.knn("pixels", "photos/", k=(5,))  # type: ignore[call-arg]
    ldae.Setup(workers="two")  # type: ignore[arg-type]
    ldae.load_rum("runs/photos")  # type: ignore[attr-defined]
    ldae.pretrain(3, "runs/photos")  # type: ignore[arg-type]
    ldae.pretrain("runs/photos", scale="huge")  # type: ignore[arg-type]
