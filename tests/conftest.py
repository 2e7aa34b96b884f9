"""Fixtures that many tests share: small settings, images, runs and ranks."""

import functools
import multiprocessing
import os
import signal
import socket
import sys
import warnings
from multiprocessing import connection

# One thread for each test and for the commands that it starts, since tests run in parallel.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pytest
import timm
import torch
from PIL import Image

import ldae
from ldae.backbones.open import adapt_cfg
from ldae.backbones.timm_folder import write_timm_folder
from ldae.data.source import Source
from ldae.evals.features import Features
from ldae.evals.neighbours import Bank
from ldae.finetuning.recipes import finetune_config
from ldae.finetuning.settings import FinetuneConfig
from ldae.method import build
from ldae.runs.checkpoints import Checkpoints
from ldae.runs.kinds import to_yaml
from ldae.settings import Config
from ldae.tokenizers import Tokenizer
from ldae.tree import replace

TINY = {
    "data.source": "scattered-digits:64",
    "data.img_size": 32,
    "tokenizer.dim": 6,
    "tokenizer.fit_images": 64,
    "tokenizer.width": 8,
    "tokenizer.perceptual_weight": 0.0,  # VGG16's weights are a download
    "tokenizer.adversarial_start": 4,
    "tokenizer.optim.batch_size": 8,
    "tokenizer.optim.blr": 0.1,
    "tokenizer.optim.epochs": 1,
    "tokenizer.optim.warmup_epochs": 0.25,
    "model.name": "vit_tiny_patch16_224",
    "model.patch_size": 8,
    "model.depth": 2,
    "model.embed_dim": 32,
    "model.num_heads": 2,
    "unet.channels": (8, 16),
    "unet.layers": 1,
    "unet.attn_resolutions": (2,),
    "unet.dropout": 0.0,
    "unet.groups": 4,
    "optim.batch_size": 8,
    "optim.blr": 1e-2,
    "optim.epochs": 1,
    "optim.warmup_epochs": 0.25,
    "system.device": "cpu",
    "system.precision": "fp32",
    "system.workers": 0,
}


# The parts of a ViT that rows do not have.
PARTS = {
    "model__vit__class_token": True,
    "model__vit__reg_tokens": 2,
    "model__vit__act_layer": "quick_gelu",
    "model__vit__norm_eps": 1e-5,
    "model__vit__pre_norm": True,
    "model__vit__final_norm": True,
    "model__vit__pos_embed": "learn",
    "model__name": "vit_base_patch16_clip_224",  # timm has this eps only with such a name
}

# tokenizer.dim for tokenizers that cannot have 6 numbers a token.
_DIMS = {"conv_vae": 8, "pixel": 192}
# Of a row with a decoder of its own.
_DECODER = {"model.decoder_depth": 1, "model.decoder_embed_dim": 16, "model.decoder_num_heads": 2}


@pytest.fixture(autouse=True)
def no_cached_files(monkeypatch, tmp_path_factory):
    """Hide the machine's downloaded weights, and keep listings of folders out of its home."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path_factory.getbasetemp() / "torch-home"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache-home"))


@pytest.fixture
def tiny():
    """tiny(row, **changes): a row small enough to train in a second; a__b stands for a.b."""

    def make(row: str = "l_dae", **changes) -> Config:
        config = ldae.config(row)
        given = {name.replace("__", "."): value for name, value in changes.items()}
        kind = given.get("tokenizer.name", config.tokenizer.name)
        sizes = {"tokenizer.dim": _DIMS.get(kind, TINY["tokenizer.dim"])}
        sizes["tokenizer.codes"] = min(config.tokenizer.codes, 16)
        sizes |= _DECODER if config.model.decoder_depth else {}
        return replace(config, TINY | sizes | given)

    return make


@pytest.fixture
def images() -> torch.Tensor:
    """Eight uint8 images (8, 3, 32, 32) of smooth waves with random directions."""
    generator = torch.Generator().manual_seed(1)
    axis = torch.linspace(0, 6, 32)
    weights = torch.randn(8, 3, 3, generator=generator)
    waves = weights[..., :1, None] * axis[:, None] + weights[..., 1:2, None] * axis
    noise = 0.1 * torch.randn(8, 3, 32, 32, generator=generator)
    return ((waves + weights[..., 2:, None]).sin() * 100 + 128 + 20 * noise).clamp(0, 255).byte()


@pytest.fixture
def fitted(images):
    """fitted(tokenizer, batches): fit the statistics of a tokenizer, and return it."""

    def fit(tokenizer: Tokenizer, batches=(images,)) -> Tokenizer:
        if tokenizer.trained:
            tokenizer.fit_pixels(batches)
            tokenizer.fit_latents(batches)
        else:
            tokenizer.fit(batches)
        return tokenizer

    return fit


@pytest.fixture
def awake():
    """awake(module): make every parameter random, so that no zero gate hides a block."""

    def randomise(module: torch.nn.Module) -> torch.nn.Module:
        generator = torch.Generator().manual_seed(2)
        with torch.no_grad():
            for parameter in module.parameters():
                noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                parameter.copy_(0.2 * noise)
        return module

    return randomise


@pytest.fixture
def method(tiny, images, awake, fitted):
    """method(row): a method with random weights and a fitted tokenizer."""

    def make(row="l_dae", num_classes=0, **changes):
        method = build(tiny(row, **changes), num_classes=num_classes)
        fitted(method.tokenizer)
        awake(method.denoiser)
        return method.eval()

    return make


@pytest.fixture
def run(method, tiny, tmp_path):
    """run(row): a run folder with one checkpoint of a random network."""

    def make(row="l_dae", **changes):
        folder = tmp_path / f"run-{row}"
        folder.mkdir()
        (folder / "config.yaml").write_text(to_yaml(tiny(row, **changes), "pretraining"))
        describe = {"row": row, "images": 64, "classes": []}
        state = {"images_seen": 8, "average": None, "optimizer": {}, "describe": describe}
        Checkpoints(folder).save(state | {"model": method(row, **changes).state_dict()})
        return folder

    return make


@pytest.fixture
def data(tmp_path):
    """A folder of two classes, and a folder of the same images with label maps."""
    rng = np.random.default_rng(0)
    for i in range(40):
        part = "train" if i < 30 else "val"
        pixels = rng.integers(0, 256, (8, 8, 3)).astype(np.uint8)
        places = [f"data/{part}/{i % 2}", f"maps/images/{part}", f"maps/labels/{part}"]
        for place, image in zip(places, (pixels, pixels, pixels[..., 0] % 2)):
            (tmp_path / place).mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(tmp_path / place / f"{i}.png")
    return tmp_path / "data"


@pytest.fixture
def classifier(tmp_path):
    """A classifier of the two classes of ``data``, whose backbone has seen 8 images."""
    args = {"img_size": 16, "num_classes": 2}
    model = timm.create_model("test_vit", **args).eval()
    adapt_cfg(model, 3, args["img_size"])
    model.images_seen = 8
    folder = tmp_path / "classifier"
    write_timm_folder(folder, model, args, classes=["0", "1"])
    return folder


@pytest.fixture
def short_tuning():
    """short_tuning(backbone, source, recipe): settings of a fine-tuning that takes a second."""

    def make(backbone, source, recipe: str = "mae", seed: int = 0) -> FinetuneConfig:
        return replace(finetune_config(backbone, recipe, size="B"), {
            "data.source": str(source), "seed": seed, "augment.mix_images": 2,
            "optim.batch_size": 10, "optim.epochs": 1, "optim.warmup_epochs": 0.2,
            "system.device": "cpu", "system.precision": "fp32", "system.workers": 0,
        })  # fmt: skip

    return make


def _free_port() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


@pytest.fixture
def launch(monkeypatch):
    """launch(**changes): set the variables that torchrun sets, for one rank; None removes one."""

    def make(**changes: str | None) -> None:
        alone = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
        for name, value in (alone | {"MASTER_PORT": _free_port()} | changes).items():
            monkeypatch.setenv(name, value or "")
            if value is None:
                monkeypatch.delenv(name)

    return make


@pytest.fixture
def fork():
    """The processes that start with torch imported and with all that a test has changed."""
    if sys.platform == "darwin":
        pytest.skip("macOS' frameworks do not survive a fork")
    return multiprocessing.get_context("fork")


@pytest.fixture
def on_ranks(fork):
    """on_ranks(function): call a function on two ranks, each in a process, and return their errors.

    An error is a string, empty if there is none. A rank without an answer ``seconds`` after the
    first one is aborted, for which faulthandler prints where it is, and its error is None. So is a
    rank that answers and then does not end, with a warning: how ranks end is tested with whole
    processes, in test_distributed.py and test_launch.py, not with forks.
    """

    def run(function, ranks: int = 2, seconds: float = 120) -> list[str | None]:
        launch = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": _free_port()}

        def rank(number: int, pipe) -> None:
            os.environ.update(launch, RANK=str(number), LOCAL_RANK=str(number))
            try:
                function()
                pipe.send("")
            except Exception as error:
                pipe.send(f"{type(error).__name__}: {error}")

        pipes = [fork.Pipe(duplex=False) for _ in range(ranks)]
        processes = [fork.Process(target=rank, args=(n, pipes[n][1])) for n in range(ranks)]
        for process in processes:
            process.start()
        errors = []
        connection.wait([ours for ours, _ in pipes], timeout=120)
        for process, (ours, _) in zip(processes, pipes, strict=True):
            errors.append(ours.recv() if ours.poll(seconds) else None)
            process.join(0 if errors[-1] is None else seconds)
            if process.exitcode is None:
                warnings.warn(f"{process} did not end by itself", stacklevel=2)
                os.kill(process.pid, signal.SIGABRT)
                process.join(seconds)
                process.kill()
        return errors

    return run


@pytest.fixture
def interrupts(monkeypatch):
    """interrupts(module, *numbers): calls of its forward that get Ctrl-C; returns all calls."""

    def make(module: type, *numbers: int) -> list[int]:
        calls, original = [], module.forward

        def forward(self, *args):
            calls.append(1)
            if len(calls) in numbers:
                os.kill(os.getpid(), signal.SIGINT)
            return original(self, *args)

        monkeypatch.setattr(module, "forward", forward)
        return calls

    return make


class Pictures(Source):
    """Images of noise around a grey level that depends on the class."""

    def __init__(self, count: int, split: str = "train", classes: int = 3, seed: int = 0):
        rng = np.random.default_rng(seed)
        labels = np.arange(count, dtype=np.int64) % classes
        super().__init__("pictures", split, [f"class-{c}" for c in range(classes)], labels)
        levels = 60 + 60 * labels[:, None, None, None]
        noise = rng.integers(-60, 61, (count, 16, 16, 3))
        self.pixels = (levels + noise).clip(0, 255).astype(np.uint8)

    def __len__(self) -> int:
        return len(self.pixels)

    def name(self, i: int) -> str:
        return f"{self.split}/{i}.png"

    def image(self, i: int) -> Image.Image:
        return Image.fromarray(self.pixels[i])


@pytest.fixture
def pictures():
    return Pictures


@pytest.fixture
def cloud():
    """cloud(count, seed): features of overlapping classes."""

    def make(count: int, seed: int, classes: int = 4, dim: int = 8) -> Features:
        generator = torch.Generator().manual_seed(seed)
        labels = torch.randint(classes, (count,), generator=generator)
        noise = 3 + 0.7 * torch.randn(count, dim, generator=generator)
        return Features(noise + torch.eye(classes, dim)[labels], labels)

    return make


@pytest.fixture(params=["faiss", "torch"])
def search(request, monkeypatch):
    """The two searches of nearest neighbours."""
    if request.param == "torch":
        monkeypatch.setattr(Bank, "_search_by_faiss", Bank._search_by_torch)  # as on a GPU
        monkeypatch.setattr("ldae.evals.neighbours._ROWS_AT_ONCE", 37)  # several blocks


@pytest.fixture
def compiled_by(monkeypatch):
    """compiled_by(backend): a counter of graphs that stands in for inductor."""
    from torch._dynamo.testing import CompileCounterWithBackend  # takes a second

    def use(backend):
        torch._dynamo.reset()
        counter = CompileCounterWithBackend(backend)
        monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=counter))
        return counter

    yield use
    torch._dynamo.reset()
