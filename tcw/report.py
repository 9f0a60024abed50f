"""What a run of the pipeline would do, and what it did."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tcw.recipe import Recipe
from tcw.tensor import TensorInfo

if TYPE_CHECKING:
    from tcw.kv.plan import Plan as KVPlan
    from tcw.tokens.flops import Outlook


@dataclass(frozen=True)
class PlannedTensor:
    """What a run would do with one tensor."""

    info: TensorInfo
    method: str
    predicted_bytes: int


@dataclass(frozen=True)
class Plan:
    """What a run would do, without doing it."""

    recipe: Recipe
    tensors: tuple[PlannedTensor, ...]
    peak_memory_bytes: int
    calibration: dict[str, Any] | None = None  # what it would take (tcw/calibration/run.py), None without
    kv: "KVPlan | None" = None  # what its KV policy would hold of KV_CONTEXT tokens (tcw/policies.py)
    tokens: "Outlook | None" = None  # what its token policy would leave of an image

    @property
    def original_bytes(self) -> int:
        """Bytes of all tensors as they are."""
        return sum(t.info.nbytes for t in self.tensors)

    @property
    def predicted_bytes(self) -> int:
        """Bytes of all tensors as they would be stored."""
        return sum(t.predicted_bytes for t in self.tensors)


@dataclass(frozen=True)
class CompressReport:
    """What a run did. Bytes are of whole weight files, headers included."""

    artifact: Path
    methods: list[str]
    bytes_original: int
    bytes_compressed: int
    bits_per_weight: float
    tensors_total: int
    tensors_compressed: int
    tensors_kept: int
    kept_reasons: dict[str, int]
    seconds: float
    peak_memory_bytes: int
    notes: tuple[str, ...] = ()  # what could not be done as asked
    kv: "KVPlan | None" = None  # what its KV policy holds of KV_CONTEXT tokens
    tokens: "Outlook | None" = None  # what its token policy leaves of an image

    @property
    def ratio(self) -> float:
        """Compressed over original bytes."""
        return self.bytes_compressed / self.bytes_original if self.bytes_original else 1.0

    def to_json(self) -> dict[str, Any]:
        """The report under the keys of docs/cli.md."""
        fields = vars(self)
        sizes = {"original": self.bytes_original, "compressed": self.bytes_compressed, "ratio": self.ratio}
        tensors = {k: fields[f"tensors_{k}"] for k in ("total", "compressed", "kept")}
        rest = ("methods", "bits_per_weight", "kept_reasons", "notes", "seconds", "peak_memory_bytes")
        policies = {key: fields[key].to_json() for key in ("kv", "tokens") if fields[key]}
        rows = {k: fields[k] for k in rest}
        return {"artifact": str(self.artifact), "bytes": sizes, "tensors": tensors, **rows, **policies}
