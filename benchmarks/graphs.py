"""Compare ONNX and programs of torch.export with timm, for five networks at their own sizes.

python benchmarks/graphs.py --runs runs/graphs [--out FILE]

The networks are l-DAE's encoder after a short pre-training, the same with whitened features, a
linear probe on it, timm's ViT-S/16 and a ViT-S/14 with registers as DINOv2 has them, both at 224 x
224 with random weights. The numbers are relative errors of the outputs in batches of 1 and 7.
"""

import argparse
import time
from pathlib import Path

import timm
import torch

import ldae
from ldae.backbones.open import adapt_cfg
from ldae.backbones.timm_folder import write_timm_folder
from ldae.deployment.graphs import read_graphs
from ldae.files import write_json
from ldae.runs.environment import environment

DATA = "scattered-digits:2000"
HOW = {"onnx": True, "torch_export": True, "tokens": True}
TIMM = {
    "ViT-S/16": ("vit_small_patch16_224", {}),
    "ViT-S/14 with registers": ("vit_small_patch14_reg4_dinov2", {"img_size": 224}),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/graphs.json"))
    args = parser.parse_args()

    changes = {"data.source": DATA, "optim.epochs": 10.0, "optim.warmup_epochs": 1.0}
    run = ldae.pretrain(ldae.config("l_dae", "demo", changes=changes), args.runs / "l_dae")
    probe = args.runs / "probe"
    if not probe.exists():
        protocol = ldae.CachedProtocol(epochs=5)
        setup = ldae.Setup(workers=0, out=args.runs / "probed")
        ldae.linear(run.folder, DATA, protocol=protocol, save=probe, setup=setup)
    networks: dict[str, tuple[Path, dict]] = {
        "l-DAE": (run.folder, {}),
        "l-DAE, whitened": (run.folder, {"whiten": DATA, "workers": 0}),
        "linear probe on l-DAE": (probe, {}),
    }
    for title, (name, options) in TIMM.items():
        networks[title] = (_random(name, args.runs / name, options), {})
    found = {}
    for number, (title, (spec, how)) in enumerate(networks.items()):
        start = time.perf_counter()
        folder = ldae.export(spec, args.runs / f"exported-{number}", **HOW, **how)
        records = read_graphs(folder)
        found[title] = {
            "largest_relative_error": {
                name: record["largest_relative_error"] for name, record in records.items()
            },
            "input": records["model.onnx"]["input"]["shape"],
            "outputs": records["model.onnx"]["outputs"],
            "versions": records["model.onnx"]["versions"],
            "seconds": round(time.perf_counter() - start, 1),
        }
        print(f"{title}: {found[title]['largest_relative_error']}", flush=True)
    write_json(args.out, {"networks": found, "environment": environment("cpu")})


def _random(name: str, folder: Path, options: dict) -> Path:
    """Return the folder of a timm model with random weights, none of which is a zero gate."""
    if not folder.exists():
        torch.manual_seed(0)
        options = options | {"num_classes": 0}
        model = timm.create_model(name, **options).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.02 * torch.randn_like(parameter)
        adapt_cfg(model, 3, options.get("img_size"))
        write_timm_folder(folder, model, options)
    return folder


if __name__ == "__main__":
    main()
