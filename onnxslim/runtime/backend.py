"""What stands behind a session."""

from __future__ import annotations

import re


def message(error: Exception) -> str:
    """ONNX Runtime's message without its prefixes and source locations."""
    text = " ".join(str(error).split())
    text = re.sub(r"^/\S+:\d+ .*?\) ", "", text.split("Status Message: ")[-1])
    return text.removeprefix("[ONNXRuntimeError] : ")[:400]
