"""Where a card may say that its weights are to be had: an https address, or a repository of the Hugging Face hub."""

from __future__ import annotations

import os
import re
import urllib.parse

from .errors import CardError

HUB = "https://huggingface.co"
PREFIX = "hf:"
LOCALHOST = ("localhost", "127.0.0.1", "::1")
_PART = r"[A-Za-z0-9][A-Za-z0-9_.-]*"


def require_secure(url: str) -> None:
    """Refuse an address from which nothing should be loaded.

    Raises:
        CardError: the address is not https, or http on this very machine.
    """
    parts = urllib.parse.urlsplit(url)
    if parts.hostname and (parts.scheme == "https" or (parts.scheme == "http" and parts.hostname in LOCALHOST)):
        return
    raise CardError(f"weights are fetched by https only, and not from {url!r}.")


def to_url(source: str, file: str) -> str:
    """The address of a file.

    Args:
        source: an https address of the file itself, or `hf:OWNER/NAME` or `hf:OWNER/NAME@REVISION` for a repository
            that holds it. The environment's HF_ENDPOINT names another hub.
        file: its name in the repository.

    Raises:
        CardError: the source is neither.
    """
    if not source.startswith(PREFIX):
        require_secure(source)
        return source
    match = re.fullmatch(rf"({_PART}/{_PART})(?:@({_PART}))?", source.removeprefix(PREFIX))
    if match is None:
        raise CardError(f"weights.source must be hf:OWNER/NAME or hf:OWNER/NAME@REVISION; got {source!r}.")
    return f"{os.environ.get('HF_ENDPOINT') or HUB}/{match[1]}/resolve/{match[2] or 'main'}/{file}"
