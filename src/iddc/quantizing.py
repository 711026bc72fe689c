"""A graph of ONNX in 8-bit numbers, by onnxruntime's static quantisation.

Products of matrices and convolutions are computed in 8 bits, with a scale for each channel of the
weights. The scales of what flows between them come from the activations of some images: the
smallest and the largest value of each. All else stays in single precision.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from iddc.errors import needs_extra
from iddc.runtimes import import_onnxruntime

QUANTIZED = ("Conv", "Gemm", "MatMul")
"""The operators that are computed in 8 bits."""


def quantized(data: bytes, name: str, samples: Iterable[np.ndarray]) -> bytes:
    """Turn an ONNX graph into one that computes in 8 bits, with the same input and output.

    Args:
        data: The graph.
        name: The name of its input.
        samples: Inputs, at least one, whose activations say how large numbers become.

    Raises:
        SetupError: The extra `export` is missing.
    """
    with needs_extra("export", "Computing in 8 bits needs onnx and onnxruntime"):
        import_onnxruntime()
        import onnx
        from onnxruntime import quantization
        from onnxruntime.quantization import shape_inference
    ways: Any = quantization
    shapes: Any = shape_inference
    about = onnx.load_from_string(data).metadata_props
    with TemporaryDirectory() as folder, _quiet():
        given, folded, out = (str(Path(folder) / f"{part}.onnx") for part in ("a", "b", "c"))
        Path(given).write_bytes(data)
        # Batch norms become part of the convolutions before them.
        shapes.quant_pre_process(given, folded, skip_symbolic_shape=True)
        ways.quantize_static(
            folded,
            out,
            _Samples({name: sample} for sample in samples),
            quant_format=ways.QuantFormat.QDQ,
            op_types_to_quantize=[*QUANTIZED],
            per_channel=True,
            activation_type=ways.QuantType.QUInt8,
            weight_type=ways.QuantType.QInt8,
        )
        model = onnx.load(out)
    del model.metadata_props[:]
    model.metadata_props.extend(about)
    found: bytes = model.SerializeToString()
    return found


class _Samples:
    """Inputs as onnxruntime asks for them: one after the other, then None."""

    def __init__(self, inputs: Iterator[Mapping[str, np.ndarray]]) -> None:
        self._inputs = inputs

    def get_next(self) -> Mapping[str, np.ndarray] | None:
        """Give the next input."""
        return next(self._inputs, None)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep back onnxruntime's advice to prepare a model, which is done here."""
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)
