"""The benchmarks that measure speed: their commands, and their numbers in the table."""

from typing import NamedTuple


class Number(NamedTuple):
    """A number of the table."""

    what: str
    keys: str
    """Where the number is in the benchmark's JSON: keys, separated by slashes."""
    form: str
    """The number in the table, a format string."""


class Benchmark(NamedTuple):
    """A benchmark that measures speed."""

    file: str
    numbers: tuple[Number, ...]
    arguments: tuple[str, ...] = ()
    takes_device: bool = True
    """Whether it has --device; the others run on the CPU."""
    seconds: float | None = None
    """Time limit."""


def _steps(model: str) -> tuple[Number, ...]:
    return (
        Number(f"step of {model}", "step/images_per_second", "{:,.0f} images/s"),
        Number(
            f"step of {model}, share of the rate of a matrix product in bf16",
            "step/share_of_matmul",
            "{:.0%}",
        ),
        Number(f"step of {model}, times as fast as DiT's in eager bf16", "over_dit_bf16", "{:.2f}"),
        Number(f"step of {model}, peak memory", "step/peak_gib", "{:.1f} GiB"),
        Number(f"step of {model}, first step", "step/first_step_seconds", "{:.0f} s"),
        Number(
            f"step of {model}, with CUDA graphs",
            "step_with_cuda_graphs/images_per_second",
            "{:,.0f} images/s",
        ),
    )


def _methods(*names: str) -> tuple[Number, ...]:
    return tuple(
        Number(
            f"step of {name}, ViT-Ti, 64 tokens",
            f"methods/{name}/images_per_second",
            "{:.0f} images/s",
        )
        for name in names
    )


def _speed(model: str, tokens: int, *arguments: str) -> Benchmark:
    step = f"step of {model}, {tokens} tokens"
    return Benchmark(
        "speed.py",
        (
            Number(f"{step}, compiled", "medians/ldae_compiled", "{:.1f} images/s"),
            Number(f"{step}, times as fast as DiT's in eager float32", "over_dit_fp32", "{:.2f}"),
            Number(f"{step}, times as fast as DiT's in eager bf16", "over_dit_bf16", "{:.2f}"),
            Number(
                f"{step}, share of the rate of a matrix product",
                "share_of_matmul",
                "{:.0%}",
            ),
        ),
        arguments,
    )


_SMALL = ("--model", "vit_small_patch16_224", "--rounds", "3")

_EQUAL = (
    Number("20 steps, run twice: the same bits", "twice_equal", "{}"),
    Number("20 steps, killed and resumed: the same bits", "resumed_equal", "{}"),
)

BENCHMARKS = {
    "speed": _speed("ViT-Ti", 64, "--budgets"),
    "speed-256": _speed("ViT-Ti", 256, "--side", "16", "--batch-size", "32"),
    "speed-s": _speed("ViT-S", 64, *_SMALL),
    "speed-s-256": _speed("ViT-S", 256, *_SMALL, "--side", "16", "--batch-size", "32"),
    "startup": Benchmark(
        "startup.py",
        (
            Number(
                "first compiled step without caches, 12 + 12 blocks", "medians/in_parts", "{:.0f} s"
            ),
            Number("times as fast as one graph of the network", "times_as_fast", "{:.1f}"),
        ),
    ),
    "step": Benchmark(
        "step.py",
        (
            Number("training loop, share of the speed of a step alone", "loop_over_step", "{:.1%}"),
            *_methods("MAE", "l-DAE"),
            *_methods(
                *(f"l_dae_masked, {share} of the tokens dropped" for share in ("25%", "50%", "75%"))
            ),
        ),
    ),
    "scaling": Benchmark(
        "scaling.py", (Number("two ranks, times as fast as one", "times_as_fast/2", "{:.2f}"),)
    ),
    "saving": Benchmark(
        "saving.py",
        (
            Number("a save of ViT-B stalls training", "stall_in_steps_median", "{:.2f} steps"),
            Number("from the command to the first step", "start/new_seconds", "{:.1f} s"),
        ),
    ),
    "cache": Benchmark(
        "cache.py",
        (
            Number("batches from a folder of JPEGs", "folder", "{:,.0f} images/s"),
            Number("batches from .tar shards", "shards", "{:,.0f} images/s"),
            Number("batches from parquet, 100 rows a group", "parquet", "{:,.0f} images/s"),
            Number("batches from a cache", "cache", "{:,.0f} images/s"),
        ),
        takes_device=False,
    ),
    "latent_cache": Benchmark(
        "latent_cache.py",
        (
            Number("step of row 1, ViT-L, 256 px, batch 8", "medians/images", "{:.1f} s"),
            Number("the same step from cached latents", "medians/cached_latents", "{:.1f} s"),
        ),
    ),
    "tokenizer": Benchmark(
        "tokenizer.py",
        (
            Number(
                "patch-wise PCA, D = 48, times as fast as scikit-learn",
                "D=48/times_faster",
                "{:.0f}",
            ),
            Number(
                "patch-wise PCA, D = 768, times as fast as scikit-learn",
                "D=768/times_faster",
                "{:.0f}",
            ),
        ),
        takes_device=False,
    ),
    "fit_tokenizer": Benchmark(
        "fit_tokenizer.py",
        (
            Number(
                "step of the tokenizer of no_perceptual",
                "rows/no_perceptual/images_per_second",
                "{:.1f} images/s",
            ),
        ),
        ("--rows", "no_perceptual", "no_adversarial", "vqvae"),  # no perceptual net is downloaded
    ),
    "knn": Benchmark(
        "knn.py",
        (
            Number(
                "k-NN of 10,000 queries among 50,000 features", "searches/ours/seconds", "{:.1f} s"
            ),
            Number("times as fast as scikit-learn", "ratios/scikit_learn over ours", "{:.1f}"),
        ),
        takes_device=False,
    ),
    "probe": Benchmark(
        "probe.py",
        (Number("40 linear probes of 10 classes", "seconds/heads together", "{:.1f} s"),),
    ),
    "probe-1000": Benchmark(
        "probe.py",
        (Number("40 linear probes of 1,000 classes", "seconds/heads together", "{:.1f} s"),),
        ("--classes", "1000", "--rounds", "1"),
    ),
    "features": Benchmark(
        "features.py",
        (
            Number(
                "features of ViT-S at 224 x 224, bf16", "images_per_second/bf16", "{:.1f} images/s"
            ),
            Number("times as fast as in float32", "times_as_fast", "{:.2f}"),
        ),
    ),
    "growth": Benchmark(
        "growth.py",
        (
            Number("step, exponent of tokens", "exponents/training step, tokens", "{:.2f}"),
            Number("step, exponent of the width", "exponents/training step, width", "{:.2f}"),
            Number("step, exponent of blocks", "exponents/training step, blocks", "{:.2f}"),
            Number("step, exponent of images", "exponents/training step, images", "{:.2f}"),
        ),
    ),
    "logreg": Benchmark(
        "logreg.py",
        (
            Number("logistic regressions, six tasks", "seconds/ours", "{:.1f} s"),
            Number("times as fast as scikit-learn", "scikit_learn over ours", "{:.0f}"),
        ),
        takes_device=False,
    ),
    "sample": Benchmark(
        "sample.py",
        (
            Number(
                "samples, 50 steps of DDIM", "medians/unguided/images_per_second", "{:.2f} images/s"
            ),
        ),
    ),
}
"""By name; they run where there is a GPU and where there is none."""

GPU = {
    "gpu-waits": Benchmark(
        "gpu.py",
        (Number("steps that never wait for the GPU", "steps", "{}"),),
        ("waits",),
        seconds=50,
    ),
    "gpu-step-l": Benchmark("gpu.py", _steps("ViT-L, 256 tokens"), ("step-l",), seconds=110),
    "gpu-step-b": Benchmark("gpu.py", _steps("ViT-B, 256 tokens"), ("step-b",), seconds=70),
    "gpu-step-small": Benchmark(
        "gpu.py", _steps("ViT-Ti, 4 + 4 blocks, 64 tokens"), ("step-small",), seconds=40
    ),
    "gpu-features": Benchmark(
        "gpu.py",
        (
            Number(
                "features of ViT-L, 12 blocks, from a cache",
                "extraction_images_per_second",
                "{:,.0f} images/s",
            ),
            Number(
                "neighbours among 500,000 features of 1,024",
                "neighbours/queries_per_second",
                "{:,.0f} queries/s",
            ),
        ),
        ("features",),
        seconds=70,
    ),
    "gpu-resume": Benchmark("gpu.py", _EQUAL, ("resume",), seconds=80),
    "gpu-resume-deterministic": Benchmark("gpu.py", _EQUAL, ("resume-deterministic",), seconds=70),
    "gpu-ranks": Benchmark(
        "gpu.py",
        (
            Number(
                "from the error of a rank to the end of the other",
                "seconds_until_both_ended",
                "{:.1f} s",
            ),
        ),
        ("ranks",),
        seconds=40,
    ),
    "gpu-memory": Benchmark("gpu.py", (), ("memory",), seconds=60),
}
"""By name; their sizes are for a GPU, and their limits add up to ten minutes."""
