"""onnxruntime and OpenVINO, which compute graphs on the CPU, kept from reporting to their makers.

As soon as they are imported both report that they are used, over the network and without asking,
and write an identifier to the home folder for it. Here they are imported so that they do not.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Any

import numpy as np

from iddc.config import Precision
from iddc.errors import needs_extra

Graph = Callable[[np.ndarray], np.ndarray]
"""A graph at work: one array in, one out."""
_PRECISIONS = {"bf16": "bf16", "fp32": "f32", "fp16": "f32"}


def import_onnxruntime() -> Any:
    """Import onnxruntime.

    Raises:
        SetupError: The extra `export` is missing.
    """
    # Read once, while it is imported.
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    with needs_extra("export", "Computing with ONNX needs onnxruntime"):
        import onnxruntime
    return onnxruntime


def import_openvino() -> Any:
    """Import OpenVINO.

    Raises:
        SetupError: The extra `openvino` is missing.
    """
    # Where the package that reports cannot be imported, OpenVINO has a stub of its own.
    modules: dict[str, Any] = sys.modules
    modules.setdefault("openvino_telemetry", None)
    with needs_extra("openvino", "Computing with OpenVINO needs openvino"):
        import openvino
    return openvino


def run_onnx(data: bytes, threads: int) -> Graph:
    """Make an ONNX graph of one input and one output runnable by onnxruntime.

    Args:
        data: The graph.
        threads: How many cores it may use.

    Raises:
        SetupError: onnxruntime is missing.
    """
    runtime = import_onnxruntime()
    options = runtime.SessionOptions()
    options.intra_op_num_threads = threads
    session = runtime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda image: session.run(None, {name: image})[0]


def run_openvino(data: bytes, threads: int, *, precision: Precision = "fp32") -> Graph:
    """Make an ONNX graph of one input and one output runnable by OpenVINO.

    Args:
        data: The graph.
        threads: How many cores it may use.
        precision: bf16, or else single precision.

    Raises:
        SetupError: openvino is missing.
    """
    core = import_openvino().Core()
    options = {
        "INFERENCE_NUM_THREADS": threads,
        "INFERENCE_PRECISION_HINT": _PRECISIONS[precision],
        "PERFORMANCE_HINT": "LATENCY",
    }
    compiled = core.compile_model(core.read_model(data), "CPU", options)
    return lambda image: compiled(image)[0]
