"""Compilation in parts: few graphs, compiled once, with the losses and gradients of eager code."""

import copy

import pytest
import torch
from conftest import PARTS
from timm.models.vision_transformer import VisionTransformer
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.partitioners import min_cut_rematerialization_partition

from ldae import distributed, trajectory
from ldae.errors import InputError
from ldae.models.dit import Block
from ldae.models.drop_path import set_drop_path
from ldae.pretraining.latents import LatentEncoder
from ldae.settings import OptimSettings, SystemSettings
from ldae.train import compilation
from ldae.train.optim import adamw
from ldae.train.parallel import _blocks, compile_parts, parallelize, uses_cuda_graphs
from ldae.train.state import State

CPU = torch.device("cpu")
ROWS = [row.name for row in trajectory.ALL if row.name != "ddpm"]
# The encoder of a masked row sees the kept tokens, and its decoder has another width.
GRAPHS = dict.fromkeys(ROWS, 3) | {"l_dae_masked": 4}
# With a feature target, blocks see clean tokens too, without gradients.
FEATURE_TARGET = {"features__share": 0.5}


def losses(network, method, images):
    """Return the losses of three batches, and the gradients of their sum."""
    labels = torch.arange(len(images)) % 3
    found = [network(images, torch.arange(n, n + len(images)), labels) for n in (0, 8, 2**40)]
    found = [loss[0] if isinstance(loss, tuple) else loss for loss in found]
    sum(found).backward()
    gradients = {name: part.grad for name, part in method.named_parameters() if part.requires_grad}
    method.zero_grad()
    return found, gradients


@pytest.mark.parametrize(
    "row, recomputed",
    [*((row, False) for row in ROWS), ("l_dae", True), ("l_dae_masked", True)],
)
def test_each_row_is_few_graphs_with_the_eager_loss(row, recomputed, method, images, compiled_by):
    """The graphs are the noising, one block for all, and the loss. No position recompiles them."""
    one = method(row, num_classes=3, system__checkpoint_activations=recomputed).train()
    eager = losses(one, one, images)
    counter = compiled_by("eager")
    compile_parts(one)
    compiled = losses(one, one, images)
    assert counter.frame_count == GRAPHS[row]
    torch.testing.assert_close(compiled, eager)


def test_the_parts_of_other_vits_take_no_more_graphs(method, images, compiled_by):
    one = method("l_dae_masked", **PARTS, **FEATURE_TARGET).train()
    eager = losses(one, one, images)
    counter = compiled_by("aot_eager")
    compile_parts(one)
    torch.testing.assert_close(losses(one, one, images), eager)
    assert counter.frame_count == GRAPHS["l_dae_masked"] + 1


def test_blocks_of_all_drop_path_rates_share_a_graph(compiled_by):
    def graphs(rate: float) -> int:
        vit = VisionTransformer(16, 8, embed_dim=16, depth=5, num_heads=2, drop_path_rate=rate)
        set_drop_path(vit.train())
        counter = compiled_by("eager")
        compile_parts(vit)
        vit(torch.rand(2, 3, 16, 16)).sum().backward()
        return counter.frame_count

    assert graphs(0.4) == graphs(0.0) + 1  # the first block has no drop path


def test_a_u_net_has_a_graph_for_each_shape_of_its_blocks(method, images, compiled_by):
    """With more shapes than torch recompiles a function for by default."""
    changes = {"unet__layers": 2, "unet__channels": (8, 16, 12), "unet__attn_resolutions": (4,)}
    one = method("ddpm", model__patch_size=4, tokenizer__dim=48, **changes).train()
    shapes, blocks = set(), list(_blocks(one))

    def see(block, given):
        parameters = tuple(part.shape for part in block.parameters())
        shapes.add((type(block), parameters, given[0].shape, given[0].stride()))

    hooks = [block.register_forward_pre_hook(see) for block in blocks]
    eager = losses(one, one, images)
    for hook in hooks:
        hook.remove()
    counter = compiled_by("eager")
    compile_parts(one)
    torch.testing.assert_close(losses(one, one, images), eager)
    assert 8 + 2 < counter.frame_count == len(shapes) + 2 < len(blocks) + 2


@pytest.mark.parametrize("row", ["dit", "vqvae"])
def test_cached_latents_take_three_graphs_too(row, method, images, compiled_by):
    one = method(row, num_classes=3).train()
    rows = torch.from_numpy(LatentEncoder(one.tokenizer, CPU)(images))
    eager = losses(one, one, rows)
    counter = compiled_by("eager")
    compile_parts(one)
    compiled = losses(one, one, rows)
    assert counter.frame_count == 3
    torch.testing.assert_close(compiled, eager)


def test_each_size_of_a_batch_has_its_own_graphs(method, images, compiled_by):
    """A graph for all sizes would be slower than one for the size of a run."""
    one = method().train()
    counter = compiled_by("eager")
    compile_parts(one)
    for count, size in enumerate((8, 4, 2), start=1):
        losses(one, one, images[:size])
        assert counter.frame_count == 3 * count


def test_cuda_graphs_are_an_option_of_every_compiled_part(method, monkeypatch):
    options = []
    monkeypatch.setattr(torch, "compile", lambda part, **how: options.append(how["options"]))
    for cuda_graphs in (False, True):
        compile_parts(method(), cuda_graphs=cuda_graphs)
    parts = 4 + 2  # blocks, noising and loss
    assert options == [None] * parts + [{"triton.cudagraphs": True}] * parts


def test_cuda_graphs_need_one_gpu_and_compilation(monkeypatch):
    system, gpu = SystemSettings(cuda_graphs=True), torch.device("cuda:0")
    assert uses_cuda_graphs(system, gpu, compiled=True)
    assert not uses_cuda_graphs(SystemSettings(), gpu, compiled=True)
    assert not uses_cuda_graphs(system, gpu, compiled=False)
    assert not uses_cuda_graphs(system, CPU, compiled=True)
    monkeypatch.setattr(distributed, "world_size", lambda: 8)
    with pytest.raises(InputError, match="cuda_graphs works on one GPU, .* 8 ranks"):
        uses_cuda_graphs(system, gpu, compiled=True)


def test_gradients_lie_outside_of_the_memory_of_cuda_graphs(method):
    """A graph would overwrite a gradient that it allocated when it runs for the next batch."""
    one, system = method(), SystemSettings(cuda_graphs=True)
    state = State(one, OptimSettings(), system, torch.device("cuda:0"), True, adamw)
    trained = [part for part in one.parameters() if part.requires_grad]
    gradients = [part.grad for part in trained]
    for gradient in gradients:
        gradient.fill_(1.0)
    state.update(0.0)
    for part, gradient in zip(trained, gradients, strict=True):
        assert part.grad is gradient and not gradient.any()


def test_compiled_gradients_equal_eager_ones(method, images, compiled_by):
    one = method().train()
    eager = losses(one, one, images)
    counter = compiled_by("aot_eager")
    compile_parts(one)
    torch.testing.assert_close(losses(one, one, images), eager)
    assert counter.frame_count == 3


def test_a_compiled_model_and_its_copies_evaluate_as_they_are(method, images, compiled_by):
    one = method()
    counter = compiled_by("eager")
    compile_parts(one)
    x = one.tokenizer.normalize(images)
    before = one.features(x, 10)
    other = copy.deepcopy(one)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    assert torch.equal(one.features(x, 10), before)
    assert not torch.equal(other.features(x, 10), before)  # a copy runs its own blocks
    assert counter.frame_count == 0


@pytest.mark.parametrize(
    "row, changes, graphs, fsdp",
    [
        ("l_dae", {}, 3, False),
        ("l_dae", {}, 3, True),
        ("l_dae", PARTS, 4, False),
        ("l_dae", PARTS, 4, True),
        ("l_dae_masked", {}, 4, True),
        ("l_dae_masked", FEATURE_TARGET, 5, True),
    ],
)
def test_two_ranks_compile_the_same_graphs(
    row, changes, graphs, fsdp, method, images, compiled_by, on_ranks
):
    """Neither DDP's buckets nor FSDP's hooks cut a graph."""
    one = method(row, **changes).train()
    expected, gradients = losses(one, one, images)

    def work():
        with distributed.process_group(CPU, rank_timeout=1):
            counter = compiled_by("aot_eager")
            system = SystemSettings(fsdp=fsdp)
            parallel = parallelize(one, None, system, CPU, compiled=True)
            found, sharded = losses(parallel.network, one, images)
            assert counter.frame_count == graphs
            full = {name: parallel.full_tensor(part) for name, part in sharded.items()}
            torch.testing.assert_close((found, full), (expected, gradients))

    assert on_ranks(work) == ["", ""]


class Captured(Exception):
    """The bytes that a graph keeps for its backward pass."""


@pytest.mark.parametrize("budget, most", [(1.0, 42.1), (0.9, 30.1), (0.6, 24.0), (0.5, 22.0)])
def test_a_block_keeps_fewer_bytes_than_eager_code(budget, most):
    """At the width of ViT-L, in bf16: bytes a token and channel. Eager code keeps 48.1 with a
    residual stream in float32, and 40.1 with one in bfloat16."""
    images, tokens, width = 16, 256, 1024
    rows = (images, images * tokens, images * 16)  # first sizes of all that grows with the batch

    def capture(graph, inputs):
        (outputs,) = graph.graph.find_nodes(op="output")[0].args
        kept = (node.meta["val"] for node in outputs[1:] if node is not None)
        grown = (value.untyped_storage() for value in kept if value.ndim and value.shape[0] in rows)
        stored = {storage._cdata: storage.nbytes() for storage in grown}  # views count once
        raise Captured(sum(stored.values()))

    torch._dynamo.reset()
    torch._functorch.config.activation_memory_budget = budget
    backend = aot_autograd(fw_compiler=capture, partition_fn=min_cut_rematerialization_partition)
    block = torch.compile(Block(width, 16, 4.0, width // 4), backend=backend, fullgraph=True)
    x = torch.zeros(images, tokens, width, dtype=torch.bfloat16, requires_grad=True)
    c = torch.zeros(images, width // 4, dtype=torch.bfloat16, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(Exception) as raised:
        block(x, c)
    error = raised.value
    while not isinstance(error, Captured):
        error = error.__cause__ or error.inner_exception
    assert error.args[0] / (images * tokens * width) == pytest.approx(most, abs=0.3)


@pytest.mark.parametrize("found", [None, "/usr/bin/gcc"])
def test_auto_compiles_on_gpus_where_kernels_can_be_built(found, monkeypatch, tmp_path):
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(compilation.shutil, "which", lambda name: found)
    monkeypatch.setattr(compilation.sysconfig, "get_path", lambda name: str(tmp_path))
    (tmp_path / "Python.h").touch()
    assert compilation.compiles("auto", torch.device("cuda")) == bool(found)
    assert compilation.compiles("on", torch.device("cuda")) and not compilation.compiles(
        "auto", CPU
    )
    (tmp_path / "Python.h").unlink()
    assert not compilation.compiles("auto", torch.device("cuda"))
