from ldae.machine.packages import check_packages


def test_old_and_missing_packages_are_named():
    versions = {"timm": "1.0.9", "torch": "2.10.0+cu128", "pytest": None}.get
    requirements = ["timm>=1.0.15", "torch>=2.5", "tqdm>=4.60"]
    requirements += ["wandb>=0.16; extra == 'wandb'", "pytest>=8; extra == 'test'"]
    problems, optional = check_packages(requirements, versions)
    assert problems == [
        "timm 1.0.9 is too old: pip install 'timm>=1.0.15'",
        "tqdm is not installed: pip install 'tqdm>=4.60'",
    ]
    assert len(optional) == 1 and "ldae[wandb]" in optional[0]
