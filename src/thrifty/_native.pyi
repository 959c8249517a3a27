"""The native engine (native/bindings.cpp). `thrifty.engine` is its face."""

from collections.abc import Mapping, Sequence
from typing import Any

from numpy.typing import NDArray

_Operators = Sequence[tuple[Any, ...]]
_Limits = Mapping[str, int] | None
_Decisions = Mapping[int, tuple[NDArray[Any] | None, ...]] | None
"""Place -> channels, columns, layer."""
_Changes = Sequence[tuple[int, str, float]]
"""Place, name and value of a setting each."""

def features() -> dict[str, Any]: ...
def check(buffers: Sequence[Sequence[int]], operators: _Operators, output: int, limits: _Limits = None) -> None: ...

class Sharing:
    """Whether threads share short calls (native/sharing.h), for tests; seconds."""

    shares: bool
    def took(self, seconds: float, now: float) -> None: ...

class Engine:
    def __init__(
        self,
        buffers: Sequence[Sequence[int]],
        operators: _Operators,
        output: int,
        threads: int = 1,
        limits: _Limits = None,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ) -> None: ...
    def run(
        self, x: NDArray[Any], out: NDArray[Any], decisions: _Decisions = None, channels_last: bool = False
    ) -> None: ...
    def trace(
        self,
        x: NDArray[Any],
        out: NDArray[Any],
        decisions: _Decisions = None,
        channels_last: bool = False,
        changes: _Changes = (),
    ) -> dict[str, Any]: ...
    def set(self, changes: _Changes) -> None: ...
    def settings(self) -> dict[int, dict[str, int | float]]: ...
    def fill_memory(self, value: float) -> None: ...
    @property
    def threads(self) -> int: ...
    @property
    def isa(self) -> str: ...
    @property
    def arena_bytes(self) -> int: ...
