"""Coded tensors of a source, decoded on a GPU while a model is loaded: they cross over coded, and no processor decodes.

What is read so is what `dfloat11` has coded, in an artifact or in an official DFloat11 folder. Where kernels cannot be
compiled or launched, that is said once and the processor decodes, to the same bits.
"""

import logging
import threading

import torch

from tcw.artifact import Artifact
from tcw.cuda import NoGpu
from tcw.errors import FormatError
from tcw.kernels.df11_decode.folder import FolderDecoder
from tcw.kernels.lanes_decode import decode_checked, group
from tcw.source import Source
from tcw.sources.df11 import DF11Source
from tcw.weights import Encoded
from tcw.weights.dfloat11 import stream_params

_log = logging.getLogger("tcw")


class DeviceReader:
    """Reads the coded tensors of a source on a device. Threads may share one."""

    def __init__(self, source: Source, device: torch.device) -> None:
        """Nothing is read yet."""
        self._source, self._device = source, device
        self._folder = FolderDecoder(source, device) if isinstance(source, DF11Source) else None
        self._lock, self._why_not = threading.Lock(), ""

    def read(self, name: str) -> torch.Tensor | None:
        """Decode a tensor on the device; None for one that is not coded, and where the device cannot.

        Raises FormatError when its parts do not fit each other, or its codes do not end where they should.
        """
        if self._why_not:
            return None
        try:
            if self._folder is not None:
                return self._of_folder(self._folder, name)
            if isinstance(self._source, Artifact) and self._source.entry(name).method == "dfloat11":
                return self._decode(name, self._source.encoded(name))
        except NoGpu as error:
            self._give_up(f"{error.message}; {error.hint}")
        return None

    def _of_folder(self, folder: FolderDecoder, name: str) -> torch.Tensor | None:
        assert isinstance(self._source, DF11Source)
        if name not in self._source.coded:
            return None
        weight = folder.read(name)
        if weight.is_cuda:  # whoever takes it may be on another stream
            torch.cuda.current_stream(weight.device).synchronize()
        return weight

    def _decode(self, name: str, encoded: Encoded) -> torch.Tensor:
        info = self._source.tensors()[name]
        try:
            streams = group([(encoded.parts, stream_params(info, encoded), info.numel)])
            words = decode_checked(streams.to(self._device))
        except FormatError as error:
            raise FormatError(f"tensor `{name}`: {error.message}", error.hint) from None
        return words.view(info.shape)

    def _give_up(self, why: str) -> None:
        with self._lock:
            if not self._why_not:
                _log.warning("weights are decoded on the processor: %s", why)
            self._why_not = why
