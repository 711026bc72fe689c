"""A run's network computed by onnxruntime or OpenVINO: a predictor like the network itself.

Its graph is exported once, which takes longer than many images do, and kept in the folder of the
run. So is the same graph in 8 bits.
"""

from __future__ import annotations

import hashlib
import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int64, UInt8
from torch import Tensor, nn
from torch.nn import functional

from iddc import __version__
from iddc.backbones import Backbone
from iddc.config import EngineName, Precision
from iddc.device import pick_precision
from iddc.errors import NumericError, SetupError, needs_extra
from iddc.modelfile import digest_of
from iddc.network import Network
from iddc.quantizing import quantized
from iddc.runs import write_atomic
from iddc.runtimes import Graph, import_onnxruntime, import_openvino, run_onnx, run_openvino

OPSET = 18
"""The version of ONNX operators: the first whose Resize can antialias."""
ENGINE, ENGINE_INT8 = "engine.onnx", "engine-int8.onnx"
"""The files in the folder of a run that hold the graph for engines, and that in 8 bits."""
ROUNDING = 1e-3
"""The largest difference of an engine's scores from PyTorch's in single precision, as a share of
their length."""
_INPUT, _OUTPUT = "image", "scores"


class EngineNetwork:
    """A network whose scores another program computes on the CPU. It is a PixelPredictor."""

    def __init__(self, network: Network, name: str, run: Graph) -> None:
        self.network = network
        self.name = name
        self._run = run

    @property
    def num_clusters(self) -> int:
        """K."""
        return self.network.num_clusters

    def scores(self, images: UInt8[Tensor, "b 3 H W"]) -> Float[Tensor, "b c h w"]:
        """What of every patch is enlarged to pixels, as `Network.scores`.

        Images go through the graph one at a time, so that none depends on those beside it.
        """
        found = [self._run(np.ascontiguousarray(image[None].cpu().numpy())) for image in images]
        return torch.from_numpy(np.concatenate(found))

    def probs_of(self, scores: Float[Tensor, "c ..."]) -> Float[Tensor, "k ..."]:
        """The probabilities of enlarged scores, by the network's own rule."""
        return self.network.probs_of(scores)

    def probs(self, images: UInt8[Tensor, "b 3 H W"]) -> Float[Tensor, "b k h w"]:
        """The probabilities of every patch."""
        return torch.stack([self.probs_of(scores) for scores in self.scores(images)])


class PatchScores(nn.Module):
    """The graph that an engine computes: one image in, the scores of its patches out."""

    def __init__(self, network: Network) -> None:
        super().__init__()
        self.network = network

    def forward(self, image: UInt8[Tensor, "1 3 H W"]) -> Float[Tensor, "1 c h w"]:
        """Give what of every patch is enlarged to pixels."""
        sides = torch.stack([torch.scalar_tensor(n, dtype=torch.int64) for n in image.shape[2:]])
        size = in_patches(self.network.backbone, sides)
        return self.network.scores(
            functional.interpolate(image.float() / 255, size, mode="bilinear")
        )


def in_patches(backbone: Backbone, sides: Int64[Tensor, " 2"]) -> list[int]:
    """The sides of an image rounded to whole patches, as `Backbone.prepared` rounds them.

    Both are computed by tensors, not by Python. An exporter then takes them as values that it
    does not know, and the graph is right for every size. In Python they would be branches on
    the size, which the graph would keep as they fell for the example.
    """
    least = math.isqrt(backbone.num_patches(1))
    steps = ((sides + backbone.patch_size // 2) // backbone.patch_size).clamp(min=least)
    grid = steps.tolist()
    for step in grid:
        torch._check(step >= least)
    return [step * backbone.patch_size for step in grid]


def engine_network(
    network: Network,
    folder: Path,
    engine: EngineName,
    precision: Precision,
    calibration: Iterable[UInt8[np.ndarray, "3 H W"]] | None = None,
    note: Callable[[str], object] = warnings.warn,
) -> EngineNetwork:
    """Let an engine compute the scores of a run's network.

    The graph is taken from the run's folder. If it is missing there, or is of another model or
    version, it is exported and kept.

    Args:
        network: The network, on the CPU.
        folder: Holds its model.safetensors.
        engine: onnx (onnxruntime) or openvino.
        precision: What OpenVINO multiplies in: bf16, else single precision; auto: bf16 where the
            hardware computes in it. onnxruntime multiplies in single precision.
        calibration: Crops that say how large numbers become, for a graph in 8 bits; they are not
            looked at if there is one already. None: a graph in single precision.
        note: Told in one line what is exported, and if it cannot be kept.

    Raises:
        SetupError: An extra is missing, or PyTorch cannot export this backbone.
        NumericError: The engine computes something else than PyTorch.
    """
    # What is missing is said before an export.
    if engine == "openvino":
        import_openvino()
    else:
        import_onnxruntime()
    about = {"iddc": __version__, "torch": torch.__version__, "model": digest_of(folder)}

    def exported() -> bytes:
        size: Any = torch.export.Dim
        free = {2: size("height", min=1), 3: size("width", min=1)}
        example = torch.zeros(1, 3, 97, 121, dtype=torch.uint8)
        with exporting(network):
            return onnx_graph(PatchScores(network).eval(), example, free, _INPUT, _OUTPUT, about)

    threads, data = torch.get_num_threads(), _kept(folder / ENGINE, about, exported, note)
    run = run_onnx(data, threads) if engine == "onnx" else run_openvino(data, threads)
    _refuse_other(network, run, engine)
    name: str = engine
    if calibration is not None:
        samples = (crop[None] for crop in calibration)
        whole = data
        data = _kept(folder / ENGINE_INT8, about, lambda: quantized(whole, _INPUT, samples), note)
        # Another calibration gives other masks.
        name += f" int8 {hashlib.sha256(data).hexdigest()[:12]}"
        run = run_onnx(data, threads) if engine == "onnx" else run_openvino(data, threads)
    elif engine == "openvino":  # which mixes 8 bits with single precision faster than with bf16
        picked = pick_precision(precision, torch.device("cpu"))
        run = run_openvino(data, threads, precision=picked)
    return EngineNetwork(network, name, run)


def _refuse_other(network: Network, run: Graph, engine: str) -> None:
    """Compare what an engine and PyTorch make of a small image, in single precision.

    An engine may know an operator by name and compute something else: OpenVINO 2026.4 reduces
    bicubically without antialiasing, which the positions of some ViTs need. A small image shows
    that most.

    Raises:
        NumericError: They differ by more than rounding.
    """
    side = network.backbone.patch_size
    pixels = np.random.default_rng(0).integers(0, 256, (1, 3, 3 * side, 5 * side), dtype=np.uint8)
    with torch.inference_mode():
        expected = network.scores(torch.from_numpy(pixels)).numpy()
    error = float(np.linalg.norm(run(pixels) - expected) / np.linalg.norm(expected))
    if not error <= ROUNDING:
        raise NumericError(
            f"--engine {engine} computes something else than PyTorch with the backbone "
            f"{network.backbone.architecture.timm_name}: its scores differ by {error:.2%}, "
            f"expected at most {ROUNDING:.1%}. Use another engine, or --engine torch."
        )


def _kept(
    path: Path,
    about: Mapping[str, str],
    make: Callable[[], bytes],
    note: Callable[[str], object],
) -> bytes:
    """The graph of a file if it is whole and says this of itself; else it is made, and kept."""
    import onnx

    try:
        data = path.read_bytes()
        found = {item.key: item.value for item in onnx.load_from_string(data).metadata_props}
        if found == about:
            return data
    except Exception:  # none, or a damaged one: the graph is made again
        pass
    note(f"note: making {path}, once; this takes a minute")
    data = make()
    try:
        write_atomic(path, data)
    except SetupError as error:
        note(f"note: {error} The next command makes it again.")
    return data


@contextmanager
def exporting(network: Network) -> Iterator[None]:
    """Turn what an exporter raises into one sentence.

    Raises:
        SetupError: PyTorch cannot export this backbone, or the extra `export` is missing.
    """
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")  # of the exporter, about its own future
            yield
    except SetupError:
        raise
    except Exception as error:  # exporters raise almost anything
        raise SetupError(
            f"PyTorch {torch.__version__} cannot export {network.backbone.architecture.timm_name} "
            f"for images of any size ({type(error).__name__}: {str(error).splitlines()[0][:200]}). "
            "Try a newer PyTorch and timm."
        ) from error


def onnx_graph(
    graph: nn.Module,
    example: Tensor,
    free: Mapping[int, Any],
    input_name: str,
    output_name: str,
    about: Mapping[str, str],
) -> bytes:
    """Write a module of one input and one output as ONNX.

    Args:
        graph: The module, in evaluation mode.
        example: An input, for the kinds and the sizes that are not free.
        free: The axes of the input that may have any size, each a `torch.export.Dim`.
        input_name: The name of the input.
        output_name: The name of the output.
        about: What the file says of itself.

    Raises:
        SetupError: The extra `export` is missing.
    """
    with needs_extra("export", "Exporting to ONNX needs onnx and onnxscript"):
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    program: Any = torch.onnx.export(
        graph,
        (example,),
        dynamic_shapes=(dict(free),),
        dynamo=True,
        opset_version=OPSET,
        input_names=[input_name],
        output_names=[output_name],
        verbose=False,
    )
    program.model.metadata_props.update(about)
    data: bytes = program.model_proto.SerializeToString()
    return data
