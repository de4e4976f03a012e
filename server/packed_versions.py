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
      model: The layout of the weights.
      compression: How they are sent.
    """

    def __init__(self, model: Layout, compression: Compression) -> None:
        self.layout = compression.packed(model)
        """Of what is sent."""
        self._pack = Pack(model, compression)

    def arrays(self, published: Published) -> list[np.ndarray]:
        """What is sent, in the order of `layout`."""
        return self._pack(published.leaves)
