"""Named weights as a safetensors file, written whole or not at all."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from headwater.protos.files import replace_file
from headwater.protos.tensor_file import encode


def save_weights(path: Path, arrays: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> None:
    """Write `arrays` to `path`, replacing it only when everything is on disk.

    Raises:
      OSError: See `replace_file`.
    """
    replace_file(path, encode(arrays, metadata))
