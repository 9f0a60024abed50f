"""DFloat11: a BF16 weight has 11 bits of information, so store 11 bits.

Zhang et al., 2025, https://arxiv.org/abs/2504.11651. Trained weights use the sign and the 7 bits of mantissa of BF16
evenly, but of the 256 exponents only some thirty occur, and they carry about 2.6 bits instead of 8. So the exponent
of each weight is Huffman coded and sign and mantissa are stored as one plain byte:

    sign 1 | exponent 8 | mantissa 7   ->   code of the exponent, ~2.6 bits  +  sign and mantissa, 8 bits

The weights come back bit for bit, whatever the bits are: a NaN's payload, -0 and subnormals as well.

We differ from the paper in four ways. It cuts the code stream every 8 bytes and stores where the first code of each
piece begins, which a GPU must decode twice, once to count and once to write; we cut it every 128 weights at a byte and
store each piece's size (tcw/codecs/lanes.py), which takes less room and decodes in one pass. Codes have at most 12 bits
instead of 32, which costs next to nothing (0.003 bits a weight on real models) and lets one small table decode them.
Each tensor has its own table, where the paper makes one for a transformer block. And the same coder takes FP16 (its
high byte is coded) and FP32 (its exponent is coded) where that pays. A tensor that would not get smaller by
`min_saving` is kept as it is. The paper's own file layout is an export target (`tcw export --to dfloat11`).
"""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from tcw.errors import FormatError
from tcw.methods import option
from tcw.tensor import TensorData, TensorInfo
from tcw.weights import Encoded, Reader, Statistics, WeightMethod

if TYPE_CHECKING:
    from tcw.codecs import lanes

SPLIT_OF = {"BF16": "bf16", "F16": "f16", "F32": "f32"}
LEAST_NUMEL = 1024  # below this, headers and names eat what coding saves
_NEAR = 4096  # words of a chunk of lanes
HEADER_BYTES = 600  # what six parts and a manifest entry take in the artifact, about


@dataclass(frozen=True)
class DFloat11(WeightMethod):
    """Huffman-code the exponents of BF16, FP16 and FP32 matrices: bit-identical, BF16 at about 2/3."""

    lossless: ClassVar[bool] = True
    paper: ClassVar[str] = "arXiv 2504.11651"

    layout: str = option("lanes", "how codes are laid out", choices=("lanes",))
    min_saving: float = option(0.05, "keep a tensor raw that would not get smaller by this share")

    def __post_init__(self) -> None:
        if not 0.0 <= self.min_saving < 1.0:
            raise ValueError(f"min_saving is a share from 0 to 1, not {self.min_saving}")

    def wants(self, info: TensorInfo) -> bool:
        """Take floating-point matrices, embeddings and convolution kernels; not vectors, not tiny ones."""
        return info.dtype in SPLIT_OF and len(info.shape) >= 2 and info.numel >= LEAST_NUMEL

    def part_names(self, info: TensorInfo) -> tuple[str, ...]:
        """The parts of the lanes codec: streams, their index, the table, and the bits that are not coded."""
        planes = ("raw", "low") if info.dtype == "F32" else ("raw",)
        return ("codes", "lane_bytes", "chunk_base", "table", *planes)

    def encode(self, tensor: TensorData, statistics: Statistics | None = None) -> Encoded | None:
        """Code the tensor, or return None where that does not save `min_saving`."""
        return self.encode_on("cpu", tensor)

    def encodes_on_gpu(self) -> bool:
        """Codes are counted, sized and written by kernels/lanes_encode."""
        return True

    def encode_on(self, device: str, tensor: TensorData) -> Encoded | None:
        """Code the tensor on a device: the same bytes, and None where `encode` gives None."""
        from tcw.codecs import lanes, lanes_gpu  # compiles its loops: not for `tcw --help`

        if tensor.info.dtype not in SPLIT_OF:
            return None
        try:
            stream = lanes_gpu.encode(tensor.words, SPLIT_OF[tensor.info.dtype], device)
        except lanes.NotCodable:
            return None
        if not self._pays(stream.nbytes, tensor.info):
            return None
        return Encoded(stream.parts, {"codec": "lanes", **stream.params})

    def predict(self, tensor: TensorData) -> int:
        """Bytes that `encode` would store, from the histogram alone; the raw size where it would return None."""
        from tcw.codecs import lanes

        if tensor.info.dtype not in SPLIT_OF:
            return tensor.info.nbytes
        try:
            size = lanes.predict(tensor.words, SPLIT_OF[tensor.info.dtype])
        except lanes.NotCodable:
            return tensor.info.nbytes
        return size if self._pays(size, tensor.info) else tensor.info.nbytes

    def _pays(self, size: int, info: TensorInfo) -> bool:
        return size + HEADER_BYTES <= (1.0 - self.min_saving) * info.nbytes

    @classmethod
    def decode(cls, info: TensorInfo, encoded: Encoded) -> TensorData:
        """Turn the parts back into the tensor's bytes. Raises FormatError when they do not fit `info`."""
        with _named(info):
            return TensorData(info, _open(info, encoded).decode().view("uint8"))

    @classmethod
    def reader(cls, info: TensorInfo, encoded: Encoded) -> Reader:
        """Check the parts and open them for reading them again and again. Raises FormatError."""
        return _LanesReader(cls, info, encoded)


class _LanesReader(Reader):
    """A tensor in the lanes codec: all cores decode it, and a row costs no more than the chunks it lies in."""

    def __init__(self, method: type[WeightMethod], info: TensorInfo, encoded: Encoded) -> None:
        super().__init__(method, info, encoded)
        with _named(info):
            self._stream = _open(info, encoded)

    def pieces(self, out: np.ndarray) -> list[Callable[[], None]]:
        return [self._naming(piece) for piece in self._stream.pieces(out.view(f"u{self.info.bits // 8}"))]

    def rows(self, wanted: np.ndarray) -> np.ndarray:
        width = self.info.numel // self.info.shape[0]
        out = np.empty((len(wanted), width), f"u{self.info.bits // 8}")
        apart = np.diff(wanted) > _NEAR // width  # rows that are nearer share a chunk
        at = 0
        for near in np.split(wanted, np.flatnonzero(apart) + 1) if len(wanted) else ():
            with _named(self.info):
                words = self._stream.span(int(near[0]) * width, (int(near[-1]) + 1) * width)
            out[at : at + near.size] = words.reshape(-1, width)[near - near[0]]
            at += near.size
        return out.view(np.uint8)

    def _naming(self, piece: Callable[[], None]) -> Callable[[], None]:
        def named() -> None:
            try:  # not `with`: this runs a thousand times a second
                piece()
            except FormatError as error:
                raise _about(self.info, error) from None

        return named


def stream_params(info: TensorInfo, encoded: Encoded) -> dict[str, Any]:
    """The parameters of a tensor's `lanes` stream. Raises FormatError for another codec, or another dtype's stream."""
    params = dict(encoded.params)
    codec = params.pop("codec", None)
    if codec != "lanes":
        raise FormatError(f"dfloat11 cannot read the codec `{codec}`")
    if params.get("split") != SPLIT_OF.get(info.dtype):
        raise FormatError(f"it is {info.dtype}, its codes are `{params.get('split')}`")
    return params


def _open(info: TensorInfo, encoded: Encoded) -> "lanes.Reader":
    """Check the parts of a tensor. Raises FormatError."""
    from tcw.codecs import lanes

    return lanes.reader(encoded.parts, stream_params(info, encoded), info.numel)


@contextlib.contextmanager
def _named(info: TensorInfo) -> Iterator[None]:
    """Say in an error which tensor it is about."""
    try:
        yield
    except FormatError as error:
        raise _about(info, error) from None


def _about(info: TensorInfo, error: FormatError) -> FormatError:
    return FormatError(f"tensor `{info.name}`: {error.message}", error.hint)
