"""From a run to a stock timm VisionTransformer: fold, verify, write."""

import copy
from functools import partial
from pathlib import Path
from typing import Annotated

import timm
import torch
import tyro
from safetensors import SafetensorError
from safetensors.torch import load_file
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from ldae import tokenizers
from ldae.errors import InputError
from ldae.method import LDAE, build
from ldae.models.dit import Block
from ldae.settings import Config
from ldae.timm_folder import write_timm_folder
from ldae.tokenizers import PatchTokenizer
from ldae.train.checkpoint import Checkpoints
from ldae.tree import load

TIMESTEP = 10  # of 1000, the best of the paper's appendix with clean input
TOLERANCE = 1e-5  # relative, in float32


def load_run(run: Path) -> tuple[LDAE, dict]:
    """The method of a run folder with the weights of its newest checkpoint, and that checkpoint.

    The moving average of the weights is taken where the run has one.

    Raises: InputError when the folder is no run or has no checkpoint yet.
    """
    if not (run / "config.yaml").is_file():
        raise InputError(f"{run} is not a run folder: it has no config.yaml")
    state = Checkpoints(run).load()
    if state is None:
        raise InputError(f"run folder {run} has no checkpoint yet")
    if not any(name.startswith("denoiser.") for name in state["model"]):
        raise InputError(
            f"run folder {run} holds no pre-training, but the {state['describe']['row']}"
        )
    method = build(
        load(run / "config.yaml", Config()), num_classes=len(state["describe"]["classes"])
    )
    try:
        method.load_state_dict(state["average"] or state["model"])
    except RuntimeError:
        raise InputError(f"run folder {run}: config.yaml is not that of its checkpoints") from None
    return method.eval(), state


class TokenizerAndEncoder(nn.Module):
    """What ``fold`` gives, where the tokenizer is a network that no convolution can stand for.

    It is graded as any backbone is, but it is no timm model and is not exported.
    """

    def __init__(self, method: LDAE, timestep: int) -> None:
        super().__init__()
        self.method, self.timestep = method, timestep
        self.pretrained_cfg, self.model_args = pretrained_cfg(method), model_args(method)
        self.pretrained_cfg["architecture"] = method.denoiser.shape.name

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return features(self.method, images, self.timestep)


def backbone_of(method: LDAE) -> nn.Module:
    """The encoder as evaluators see it: normalised images (B, C, H, W) to features (B, W).

    Raises: InputError as ``fold`` does.
    """
    if isinstance(method.tokenizer, PatchTokenizer):
        return fold(method)
    alone = copy.deepcopy(method).eval()
    alone.bf16 = False
    return TokenizerAndEncoder(alone, min(TIMESTEP, len(method.sigma) - 1))


def backbone_of_run(run: str | Path) -> nn.Module:
    """The encoder of a run's newest checkpoint, see ``backbone_of``.

    Raises: InputError as ``load_run`` and ``fold`` do.
    """
    method, _ = load_run(Path(run))
    return backbone_of(method)


@torch.no_grad()
def fold(method: LDAE, timestep: int = TIMESTEP) -> VisionTransformer:
    """The encoder half at a fixed t and with clean input, as a VisionTransformer in eval mode.

    It takes images normalised by the tokenizer's pixel statistics, (B, C, H, W), and gives averaged
    features (B, W). Everything between the pixels and the first block is affine in a patch
    (projection, latent scale, gamma_t, inverse projection, embedding), so it becomes the one
    convolution of the patch embedding. At a fixed t, adaLN's shift and scale are a LayerNorm's bias
    and weight, and its gates scale the rows of the two projections that end on the residual.

    Rows of a single noise level have a single t; class-conditional rows get the null label.

    Raises: InputError when the tokenizer is a network, and when folded and unfolded features differ
        by more than 1e-5.
    """
    if not isinstance(method.tokenizer, PatchTokenizer):
        raise InputError(
            f"tokenizer.name {tokenizers.name_of(method.tokenizer)} is a network, which can not be "
            "folded into a timm ViT: ldae knn and linear grade the run itself"
        )
    t = min(timestep, len(method.sigma) - 1)
    exact = copy.deepcopy(method).cpu().double().eval()
    exact.bf16 = False
    condition = exact.denoiser.condition(torch.tensor([t]))
    state = {"pos_embed": exact.denoiser.pos_embed[None]} | _fold_embedding(exact, t)
    for number, block in enumerate(exact.denoiser.encoder):
        folded = _fold_block(block, condition)
        state |= {f"blocks.{number}.{name}": value for name, value in folded.items()}
    vit = timm.create_model(
        method.denoiser.shape.name,
        pretrained=False,
        pretrained_cfg=pretrained_cfg(method),
        **model_args(method),
    )
    vit.load_state_dict({name: value.float() for name, value in state.items()})
    vit.eval()
    vit.model_args = model_args(method)
    _verify(exact, vit, t)
    return vit


def _fold_embedding(method: LDAE, t: int) -> dict[str, torch.Tensor]:
    """The path from a normalised patch to the embedded token, read off its values at 0 and at I."""
    tokenizer, denoiser = method.tokenizer, method.denoiser

    def embed(patches: torch.Tensor) -> torch.Tensor:
        z = method.gamma[t] * tokenizer.project(patches)
        return denoiser.embed(tokenizer.inverse(z) if method.image_input else z)

    unit = torch.eye(tokenizer.patch_dim, dtype=method.gamma.dtype)
    bias = embed(torch.zeros_like(unit[:1]))[0]
    weight = (embed(unit) - bias).T
    shape = (-1, tokenizer.in_chans, tokenizer.patch_size, tokenizer.patch_size)
    return {"patch_embed.proj.weight": weight.reshape(shape), "patch_embed.proj.bias": bias}


def _fold_block(block: Block, condition: torch.Tensor) -> dict[str, torch.Tensor]:
    """An adaLN-Zero block at a fixed condition (1, cond_dim) as the weights of a plain ViT block."""
    modulation = block.adaLN_modulation(condition)[0]
    shift1, scale1, gate1, shift2, scale2, gate2 = modulation.chunk(6)
    folded = {f"attn.{name}": value for name, value in block.attn.state_dict().items()}
    folded |= {f"mlp.{name}": value for name, value in block.mlp.state_dict().items()}
    folded |= {"norm1.weight": 1 + scale1, "norm1.bias": shift1}
    folded |= {"norm2.weight": 1 + scale2, "norm2.bias": shift2}
    for name, gate in (("attn.proj", gate1), ("mlp.fc2", gate2)):
        folded[f"{name}.weight"] = gate[:, None] * folded[f"{name}.weight"]
        folded[f"{name}.bias"] = gate * folded[f"{name}.bias"]
    return folded


@torch.no_grad()
def features(method: LDAE, images: torch.Tensor, t: int) -> torch.Tensor:
    """What the unfolded encoder gives for clean normalised images (B, C, H, W): (B, W)."""
    return method.denoiser.encode(*input_at(method, images, t)).mean(1)


def input_at(
    method: LDAE, images: torch.Tensor, t: int, eps: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """What the denoiser sees of normalised images at ``t``: tokens (B, N, in_dim) and condition.

    Without ``eps`` (B, N, d) the input is clean: what the network saw at that t, less the noise.
    """
    z = method.gamma[t] * method.encode(images)
    if eps is not None:
        z = z + method.sigma[t] * eps
    steps = torch.full((len(images),), t, device=images.device)
    tokens = method.tokenizer.inverse(z) if method.image_input else z
    return tokens, method.denoiser.condition(steps)


def _verify(exact: LDAE, vit: VisionTransformer, t: int) -> None:
    tokenizer = exact.tokenizer
    generator = torch.Generator().manual_seed(0)
    size = (4, tokenizer.in_chans, tokenizer.img_size, tokenizer.img_size)
    images = torch.randn(size, generator=generator)
    wanted = features(exact, images.double(), t)
    error = (vit(images) - wanted).norm() / wanted.norm()
    if not error < TOLERANCE:
        raise InputError(
            f"not exported: the folded backbone differs from the encoder by {error:.1e} on random "
            f"images, more than {TOLERANCE:.0e}"
        )


def model_args(method: LDAE) -> dict:
    """The arguments that make timm's registered ViT the shape of the encoder."""
    shape, tokenizer = method.denoiser.shape, method.tokenizer
    return {
        "img_size": tokenizer.img_size,
        "patch_size": shape.patch_size,
        "in_chans": tokenizer.in_chans,
        "num_classes": 0,
        "embed_dim": shape.embed_dim,
        "depth": shape.depth,
        "num_heads": shape.num_heads,
        "mlp_ratio": shape.mlp_ratio,
        "class_token": False,
        "global_pool": "avg",
        "final_norm": False,
        "fc_norm": False,
        "act_layer": "gelu_tanh",
    }


def pretrained_cfg(method: LDAE) -> dict:
    """timm's record of the preprocessing; every key that it would inherit wrongly is set."""
    tokenizer = method.tokenizer
    side = tokenizer.img_size
    return {
        "tag": "ldae",
        "license": "other",
        "origin_url": "https://arxiv.org/abs/2401.14404",
        "input_size": (tokenizer.in_chans, side, side),
        "fixed_input_size": True,
        "num_classes": 0,
        "interpolation": "bicubic",
        "crop_pct": 1.0,
        "crop_mode": "center",
        "mean": tuple(round(value, 6) for value in tokenizer.pixel_mean.tolist()),
        "std": tuple(round(value, 6) for value in tokenizer.pixel_std.tolist()),
        "first_conv": "patch_embed.proj",
        "classifier": "head",
    }


def export(
    run: Annotated[Path, tyro.conf.arg(metavar="RUN")],
    out: Annotated[Path, tyro.conf.arg(metavar="OUT")],
    /,
    timestep: int = TIMESTEP,
) -> Path:
    """Write the backbone of a run as a folder that timm and the Hugging Face hub open.

    The folder holds config.json, model.safetensors and a model card, README.md. It is verified
    before it appears under its name: the folded encoder against the unfolded one, and the file
    as timm reads it against what was written.

    Args:
        run: a run folder; its newest checkpoint is exported.
        out: the folder to write, which must not exist yet, or hold just this export.
        timestep: the t that is folded into the weights.

    Raises: InputError when ``run`` has no checkpoint, ``out`` holds something else, or the
        verification fails.
    """
    run, out = Path(run), Path(out)
    method, state = load_run(run)
    if not 0 <= timestep < len(method.sigma):
        if len(method.sigma) > 1:
            raise InputError(f"timestep {timestep} is not in 0 .. {len(method.sigma) - 1}")
    vit = fold(method, timestep)
    if out.exists():
        if not _holds(out, vit):
            raise InputError(f"{out} exists already; export to another folder")
        print(f"{out} is this export already")
        return out
    card = _model_card(run, method, state, timestep)
    write_timm_folder(out, vit, model_args(method), partial(_verify_file, vit, method), card=card)
    print(f"exported {run} at {state['images_seen']:,} images to {out}")
    return out


def _holds(out: Path, vit: VisionTransformer) -> bool:
    """Whether a folder has just these weights."""
    try:
        there = load_file(out / "model.safetensors")
    except (OSError, SafetensorError):
        return False
    own = vit.state_dict()
    return there.keys() == own.keys() and all(torch.equal(there[n], own[n]) for n in own)


def _verify_file(vit: VisionTransformer, method: LDAE, opened: nn.Module) -> None:
    side = method.tokenizer.img_size
    images = torch.randn(2, method.tokenizer.in_chans, side, side)
    with torch.no_grad():
        if not torch.equal(opened(images), vit(images)):
            raise InputError("not exported: timm does not read back what was written")


def _model_card(run: Path, method: LDAE, state: dict, timestep: int) -> str:
    shape, tokenizer = method.denoiser.shape, method.tokenizer
    describe = state["describe"]
    return f"""---
library_name: timm
tags:
- image-feature-extraction
- timm
- self-supervised-learning
- denoising-autoencoder
---
# {run.resolve().name}

An image encoder pre-trained by latent denoising ([l-DAE](https://arxiv.org/abs/2401.14404)) with
[ldae](https://pypi.org/project/ldae/): a plain ViT, no class token, averaged features.

| | |
|---|---|
| row of the paper | {describe["row"]} |
| architecture | {shape.name}: {shape.depth} blocks, width {shape.embed_dim}, {shape.num_heads} heads |
| input | {tokenizer.in_chans} x {tokenizer.img_size} x {tokenizer.img_size}, patch {shape.patch_size} |
| pre-trained on | {describe["images"]:,} images, {state["images_seen"]:,} seen |
| tokenizer | {type(tokenizer).__name__}, d = {tokenizer.dim}, scale {tokenizer.scale} |
| folded at | t = {min(timestep, len(method.sigma) - 1)}, clean input |

```python
import timm

model = timm.create_model("local-dir:PATH", pretrained=True).eval()  # or hf-hub:USER/NAME
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
features = model(transform(image).unsqueeze(0))  # (1, {shape.embed_dim})
```
"""
