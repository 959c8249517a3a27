"""What is timed: other engines and ours, each as a runner of float32 images [N, C, H, W] on a number of threads.

Every runner flushes denormals. Otherwise peers keep their defaults, as their users run them on a CPU at float32.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any

import numpy as np

from thrifty.errors import require

if TYPE_CHECKING:
    from torch import nn

    from thrifty.engine import Engine

PEERS = ("onnxruntime", "openvino", "torch")


class Runner(ABC):
    """One engine with one network.

    Attributes:
        name: of the engine, as reports show it.
        setting: what was chosen for it, where there was a choice.
    """

    name: str
    setting: str = ""

    def begin(self) -> None:  # noqa: B027 (most have nothing to do)
        """Take the machine over from another runner: called, untimed, at the start of each turn."""

    @abstractmethod
    def __call__(self, x: np.ndarray) -> np.ndarray:
        """Logits [N, classes] for float32 images [N, C, H, W]."""


class OnnxRuntime(Runner):
    """ONNX Runtime's CPU provider."""

    name = "onnxruntime"

    def __init__(self, model: bytes, threads: int) -> None:
        runtime: Any = require("onnxruntime", "the peer onnxruntime")
        options = runtime.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.execution_mode = runtime.ExecutionMode.ORT_SEQUENTIAL
        options.graph_optimization_level = runtime.GraphOptimizationLevel.ORT_ENABLE_ALL
        options.add_session_config_entry("session.set_denormal_as_zero", "1")
        options.log_severity_level = 3
        self.session = runtime.InferenceSession(model, options, providers=["CPUExecutionProvider"])

    def __call__(self, x: np.ndarray) -> np.ndarray:
        (output,) = self.session.run(None, {"input": x})
        return output


class OpenVino(Runner):
    """OpenVINO's CPU plugin, one stream, tuned for latency, at float32."""

    name = "openvino"

    def __init__(self, model: bytes, threads: int) -> None:
        runtime: Any = require("openvino", "the peer openvino")
        core = runtime.Core()
        settings = {
            "INFERENCE_NUM_THREADS": threads,
            "NUM_STREAMS": 1,
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_PRECISION_HINT": "f32",
            "CPU_DENORMALS_OPTIMIZATION": True,
        }
        self.request = core.compile_model(core.read_model(model), "CPU", settings).create_infer_request()

    def __call__(self, x: np.ndarray) -> np.ndarray:
        return self.request.infer([x], share_inputs=True)[0]


class Torch(Runner):
    """PyTorch, eager, in inference mode; contiguous or channels-last, whichever is faster for this batch."""

    name = "torch"

    def __init__(self, model: nn.Module, threads: int, example: np.ndarray) -> None:
        self.torch: Any = require("torch", "the peer torch")
        self.threads = threads
        times = {}
        for setting in ("contiguous", "channels_last"):
            self.format = getattr(self.torch, f"{setting}_format" if setting == "contiguous" else setting)
            self.model = model.eval().to(memory_format=self.format)
            self.begin()
            self(example)
            times[setting] = min(self._seconds(example) for _ in range(3))
        self.setting = min(times, key=lambda setting: times[setting])
        if self.setting == "contiguous":
            self.format = self.torch.contiguous_format
            self.model = model.to(memory_format=self.format)

    def begin(self) -> None:
        """Threads and flags of torch are the process's, so every turn sets them."""
        self.torch.set_num_threads(self.threads)
        self.torch.set_flush_denormal(True)

    def __call__(self, x: np.ndarray) -> np.ndarray:
        with self.torch.inference_mode():
            y = self.model(self.torch.from_numpy(x).contiguous(memory_format=self.format))
        return y.numpy()

    def _seconds(self, x: np.ndarray) -> float:
        start = time.perf_counter()
        self(x)
        return time.perf_counter() - start


class Ours(Runner):
    """thrifty's engine; a dynamic network is set to its density at each turn.

    Attributes:
        density: share of channels kept in every gated layer, None for what the program says.
    """

    name = "thrifty"

    def __init__(self, engine: Engine, density: float | None = None) -> None:
        self.engine = engine
        self.density = density

    def begin(self) -> None:
        """Set the density: one engine serves several rows."""
        if self.density is not None:
            self.engine.set_density(self.density)

    def __call__(self, x: np.ndarray) -> np.ndarray:
        return np.asarray(self.engine(x))
