"""A checkpoint of DiT becomes a run of row dit, whose prediction is DiT's."""

import importlib.util
import math
from pathlib import Path

import diffusers
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from ldae import cli
from ldae.backbones.run import load_method
from ldae.errors import InputError
from ldae.patches import patchify, sincos_positions, unpatchify
from ldae.runs.kinds import settings_of
from ldae.trajectory import row_of

TOOL = Path(__file__).parents[2] / "tools" / "dit_checkpoint.py"
_spec = importlib.util.spec_from_file_location("dit_checkpoint", TOOL)
tool = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(tool)

WIDTH, DEPTH, HEADS, CLASSES, CHANS, SIDE = 32, 4, 4, 10, 4, 4  # 4 x 4 tokens: images of 64 pixels


def weights(
    seed: int = 0, width: int = WIDTH, depth: int = DEPTH, patch: int = 2, side: int = SIDE
):
    """Return random weights by the names and shapes of DiT's code (models.py), with variances."""
    shapes = {
        "x_embedder.proj.weight": (width, CHANS, patch, patch), "x_embedder.proj.bias": (width,),
        "t_embedder.mlp.0.weight": (width, 256), "t_embedder.mlp.0.bias": (width,),
        "t_embedder.mlp.2.weight": (width, width), "t_embedder.mlp.2.bias": (width,),
        "y_embedder.embedding_table.weight": (CLASSES + 1, width),
        "final_layer.linear.weight": (patch * patch * 2 * CHANS, width),
        "final_layer.linear.bias": (patch * patch * 2 * CHANS,),
        "final_layer.adaLN_modulation.1.weight": (2 * width, width),
        "final_layer.adaLN_modulation.1.bias": (2 * width,),
    }  # fmt: skip
    for n in range(depth):
        shapes |= {
            f"blocks.{n}.attn.qkv.weight": (3 * width, width),
            f"blocks.{n}.attn.qkv.bias": (3 * width,),
            f"blocks.{n}.attn.proj.weight": (width, width), f"blocks.{n}.attn.proj.bias": (width,),
            f"blocks.{n}.mlp.fc1.weight": (4 * width, width),
            f"blocks.{n}.mlp.fc1.bias": (4 * width,),
            f"blocks.{n}.mlp.fc2.weight": (width, 4 * width), f"blocks.{n}.mlp.fc2.bias": (width,),
            f"blocks.{n}.adaLN_modulation.1.weight": (6 * width, width),
            f"blocks.{n}.adaLN_modulation.1.bias": (6 * width,),
        }  # fmt: skip
    generator = torch.Generator().manual_seed(seed)
    state = {n: torch.randn(shape, generator=generator) / 8 for n, shape in shapes.items()}
    return state | {"pos_embed": sincos_positions(width, side)[None]}


def dit(w: dict, x: torch.Tensor, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Return the noise (B, C, H, W) that DiT predicts for latents x, an image and a head at a time.

    Written from models.py of DiT, whose forward pass it repeats.
    """

    def linear(name: str, value: torch.Tensor) -> torch.Tensor:
        return value @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def norm(value: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        mean, variance = value.mean(-1, keepdim=True), value.var(-1, keepdim=True, correction=0)
        return (value - mean) / (variance + 1e-6).sqrt() * (1 + scale) + shift

    noise = []
    for latent, step, label in zip(x, t, y, strict=True):
        angles = step * torch.exp(-math.log(10_000) * torch.arange(128) / 128)
        sinusoids = torch.cat([angles.cos(), angles.sin()])
        c = linear("t_embedder.mlp.2", F.silu(linear("t_embedder.mlp.0", sinusoids)))
        c = F.silu(c + w["y_embedder.embedding_table.weight"][label])
        grid = [(row, column) for row in range(SIDE) for column in range(SIDE)]
        kernel, bias = w["x_embedder.proj.weight"], w["x_embedder.proj.bias"]
        z = torch.stack([
            (kernel * latent[:, 2 * r : 2 * r + 2, 2 * q : 2 * q + 2]).sum((1, 2, 3)) + bias
            for r, q in grid
        ]) + w["pos_embed"][0]  # fmt: skip
        for n in range(DEPTH):
            block = f"blocks.{n}"
            parts = linear(f"{block}.adaLN_modulation.1", c).chunk(6)
            q, k, v = linear(f"{block}.attn.qkv", norm(z, parts[0], parts[1])).chunk(3, -1)
            heads = []
            for one in range(HEADS):
                cut = slice(one * WIDTH // HEADS, (one + 1) * WIDTH // HEADS)
                scores = q[:, cut] @ k[:, cut].T / (WIDTH // HEADS) ** 0.5
                heads.append(scores.softmax(-1) @ v[:, cut])
            z = z + parts[2] * linear(f"{block}.attn.proj", torch.cat(heads, -1))
            hidden = linear(f"{block}.mlp.fc1", norm(z, parts[3], parts[4]))
            hidden = F.gelu(hidden, approximate="tanh")
            z = z + parts[5] * linear(f"{block}.mlp.fc2", hidden)
        output = linear(
            "final_layer.linear", norm(z, *linear("final_layer.adaLN_modulation.1", c).chunk(2))
        )
        image = torch.zeros(2 * CHANS, 2 * SIDE, 2 * SIDE)
        for token, (r, q) in enumerate(grid):
            for i in range(2):
                for j in range(2):
                    start = (2 * i + j) * 2 * CHANS
                    image[:, 2 * r + i, 2 * q + j] = output[token, start : start + 2 * CHANS]
        noise.append(image[:CHANS])
    return torch.stack(noise)


@pytest.fixture(scope="module")
def vae(tmp_path_factory):
    """A folder of diffusers: a narrow network with the scale and the levels of DiT's VAE."""
    torch.manual_seed(0)
    network = diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8, 8, 8, 8),
        layers_per_block=1,
        norm_num_groups=4,
        latent_channels=CHANS,
    )
    folder = tmp_path_factory.mktemp("vae")
    network.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def make(vae, tmp_path):
    """make(content, **settings): the run folder of a checkpoint."""

    def convert(content, name="file.pt", **settings):
        torch.save(content, tmp_path / name)
        how = {"vae": vae, "num_heads": HEADS, "images_seen": 7} | settings
        tool.dit_checkpoint(tmp_path / name, tmp_path / "run", **how)
        return tmp_path / "run"

    return convert


@torch.no_grad()
def test_the_prediction_is_that_of_dit(make):
    own = weights()
    method, state = load_method(make(own))
    x = torch.randn(3, CHANS, 2 * SIDE, 2 * SIDE, generator=torch.Generator().manual_seed(1))
    t, labels = torch.tensor([0, 517, 999]), torch.tensor([3, 9, CLASSES])  # the last is the null
    found = unpatchify(method.predict(patchify(x, 2), t, labels), 2, CHANS)
    wanted = dit(own, x, t, labels)
    assert wanted.std() > 0.1
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    assert state["images_seen"] == 7


def test_latents_are_those_of_the_vae_times_its_factor(make, vae):
    method, _ = load_method(make(weights()))
    network = diffusers.AutoencoderKL.from_pretrained(vae, low_cpu_mem_usage=False).eval()
    images = torch.randint(256, (2, 3, 64, 64), dtype=torch.uint8)
    with torch.no_grad():
        found = method.encode(method.tokenizer.normalize(images))
        latents = network.encode(images / 127.5 - 1).latent_dist.mean
    wanted = patchify(latents * network.config.scaling_factor, 2)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


def test_the_run_is_one_of_row_dit_with_dits_recipe(make):
    run = make(weights())
    config = settings_of(run, "pretraining")
    assert row_of(config).name == "dit" and config.data.img_size == 64
    assert (config.optim.ema, config.model.cond_ratio) == (0.9999, 1.0)


@torch.no_grad()
def test_the_average_of_a_training_checkpoint_is_graded(make):
    average, own = weights(1), weights(2)
    run = make({"model": own, "ema": average, "opt": {"state": {}}})
    method, state = load_method(run)
    assert torch.equal(method.denoiser.y_embed.weight, average["y_embedder.embedding_table.weight"])
    trained = state["model"]["denoiser.y_embed.weight"]
    assert torch.equal(trained, own["y_embedder.embedding_table.weight"])


def test_published_files_bring_their_number_of_images(make):
    run = make(weights(), name="DiT-XL-2-256x256.pt", images_seen=None)
    assert load_method(run)[1]["images_seen"] == 1_792_000_000


@pytest.fixture
def digits(tmp_path):
    """A folder of ten classes, with four images of each to train on and one to evaluate on."""
    for split, count in (("train", 4), ("val", 1)):
        for number in range(CLASSES):
            folder = tmp_path / "digits" / split / f"digit-{number}"
            folder.mkdir(parents=True)
            for image in range(count):
                Image.new("RGB", (64, 64), (25 * number, 60 * image, 99)).save(
                    folder / f"{image}.png"
                )
    return str(tmp_path / "digits")


COMMANDS = {
    "sample": "RUN --steps 2 --images 2 --labels digit-3 --guidance 4",
    "knn": "RUN --data DATA --k 1 --workers 0",
    "grid": "RUN --data DATA --timesteps 10 --epochs 1 --workers 0",
}


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_take_the_run(command, make, digits):
    given = {"RUN": str(make(weights(), data=digits)), "DATA": digits}
    argv = [given.get(word, word) for word in COMMANDS[command].split()]
    assert cli.main([command, *argv, "--device", "cpu"]) == 0


def without(name: str) -> dict:
    return {key: value for key, value in weights().items() if key != name}


@pytest.mark.parametrize(
    ("content", "settings", "sentence"),
    [
        (lambda: {"MODEL": {}, "EMA": {}}, {}, "file.pt is no checkpoint of DiT"),
        (lambda: weights(depth=3), {}, "its 3 blocks have no half"),
        (lambda: weights(patch=4), {}, "its tokens are 4 x 4 latents, those of row dit 2 x 2"),
        (weights, {"num_heads": None}, "has the width 32 of no published DiT: set --num-heads"),
        (weights, {"images_seen": None}, "say how many images .*: --images-seen N"),
        (weights, {"vae": "none"}, "tokenizer.pretrained: there is no folder none"),
        (lambda: weights() | {"pos_embed": torch.zeros(1, 16, WIDTH)}, {}, "other positions than"),
        (lambda: weights() | {"pos_embed": torch.zeros(1, 15, WIDTH)}, {}, "other positions than"),
        (lambda: without("blocks.1.mlp.fc1.bias"), {},
         "no DiT of row dit: denoiser.encoder.1.mlp.fc1.bias is missing there, .128,. here"),
        (lambda: weights() | {"blocks.0.attn.q_norm.weight": torch.ones(8)}, {},
         r"encoder.0.attn.q_norm.weight is \(8,\) there, missing here"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused(content, settings, sentence, make, tmp_path):
    with pytest.raises(InputError, match=sentence):
        make(content(), **settings)
    assert not (tmp_path / "run").exists()


def test_a_folder_with_a_run_is_left_alone(make):
    make(weights())
    with pytest.raises(InputError, match="run folder .*run is not empty"):
        make(weights())


def test_a_source_of_other_classes_is_refused(make, digits):
    own = weights()
    own["y_embedder.embedding_table.weight"] = torch.zeros(CLASSES, WIDTH)
    with pytest.raises(InputError, match="digits has 10 classes, and the checkpoint 9"):
        make(own, data=digits)


def test_the_command_line_prints_one_sentence(tmp_path, capsys):
    assert tool.main([str(tmp_path / "none.pt"), str(tmp_path / "run")]) == 2
    assert capsys.readouterr().err.startswith("ldae: there is no checkpoint file")
