"""How one run's tensors look on the wire, as a worker sends and takes them."""

from __future__ import annotations

from headwater.protos.compression import Compression, pulls
from headwater.protos.errors import HeadwaterError, UsageError
from headwater.protos.layout import Layout
from headwater.worker.compression import Pack, Unpack


class Forms:
    """What a welcome says of it, made ready.

    Args:
      layout: Of the model.
      compression: Of gradients.
      pull_dtype: Of weights.
      seed: The run's.

    Raises:
      HeadwaterError: The server speaks of forms that are not known here.
    """

    def __init__(
        self, layout: Layout, compression: str = "", pull_dtype: str = "", seed: int = 0
    ) -> None:
        self.of = compression, pull_dtype, seed
        """What it was made from."""
        try:
            pushes, pulled = Compression.parse(compression or "none"), pulls(pull_dtype)
        except UsageError as error:
            raise HeadwaterError(
                f"the server has a form for tensors that this worker does not know: {error}; are "
                "server and worker of one version?"
            ) from None
        moving = layout.moving
        self.pushed = pushes.packed(moving)
        """What is sent for a gradient and the new state."""
        self.pulled = pulled.packed(moving)
        """What is sent for a version's weights, constants left out."""
        self.pack = Pack(moving, pushes, seed)
        self.unpack = Unpack(moving, pulled).arrays

    def settle(self, *, applied: bool) -> None:
        """See `Pack`."""
        self.pack.settle(applied=applied)

    def forget(self) -> float:
        """See `Pack`."""
        return self.pack.forget()
