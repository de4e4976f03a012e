"""A version's weights as they are sent: as they are, or with fewer bytes."""

from __future__ import annotations

import numpy as np

from headwater.protos.compression import Compression
from headwater.protos.layout import Layout
from headwater.server.store import Published
from headwater.worker.compression import Pack


class PackedVersions:
    """Packs versions. May be used by several threads.

    Args:
      sent: The layout of the tensors that are sent, the first ones of a version's.
      compression: How they are sent.
    """

    def __init__(self, sent: Layout, compression: Compression) -> None:
        self.layout = compression.packed(sent)
        """Of what crosses the wire for them."""
        self._count = len(sent.tensors)
        self._pack = Pack(sent, compression)

    def arrays(self, published: Published) -> list[np.ndarray]:
        """What is sent, in the order of `layout`."""
        return self._pack(published.tensors[: self._count])
