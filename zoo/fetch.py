"""Weights that are not here yet: streamed from where their card says, verified, and put in place whole."""

from __future__ import annotations

import hashlib
import http.client
import logging
import os
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from tqdm import tqdm

from .cards import Weights
from .errors import CardError, CheckpointError
from .files import replacing
from .sources import require_secure, to_url

CHUNK = 1 << 18
ATTEMPTS = 5
TIMEOUT = 20.0
OFFLINE = ("RESTPOINT_OFFLINE", "HF_HUB_OFFLINE")

log = logging.getLogger(__name__)


class _Interrupted(Exception):
    """The connection broke or the stream ended early; what has arrived is good."""


class _SecureRedirects(urllib.request.HTTPRedirectHandler):
    """Follows a redirection only to where a card itself might point."""

    def redirect_request(
        self, req: urllib.request.Request, fp: Any, code: int, msg: str, headers: Any, newurl: str
    ) -> urllib.request.Request | None:
        try:
            require_secure(newurl)
        except CardError:
            fp.close()
            raise
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def fetch_weights(weights: Weights, folder: Path) -> Path:
    """Transfer the file of a card to `folder`.

    An interrupted transfer goes on where it stopped if the server can, and anew if it cannot, as long as every attempt
    brings something. The file takes its name when it is whole and its sha256 is that of the card; until then, and
    after any failure, there is no file.

    Args:
        weights: the entry of a card, with a source.
        folder: made where it does not exist.

    Returns:
        The path of the file.

    Raises:
        CheckpointError: there is no way to the source, it does not have the file, or what came is not what the card
            says. The message names the file and where to put it by hand. With RESTPOINT_OFFLINE or HF_HUB_OFFLINE in
            the environment set to anything but 0, nothing is tried.
        OSError: the folder cannot be written, or the disk is full.
    """
    url, path = to_url(weights.source, weights.file), folder / weights.file
    remedy = f"Or put the file into {folder} by hand: {url}, {weights.size:,} bytes, sha256 {weights.sha256}."
    switch = next((name for name in OFFLINE if os.environ.get(name, "0") not in ("", "0")), None)
    if switch:
        raise CheckpointError(f"The weights {weights.file} are not here, and {switch} forbids to fetch them. {remedy}")
    log.info("fetching %s (%s bytes) from %s", weights.file, f"{weights.size:,}", url)
    try:
        with replacing(path) as file:
            _receive(url, file, weights)
            _verify(file, weights)
    except (CheckpointError, CardError) as error:
        raise CheckpointError(f"The weights {weights.file} could not be fetched: {error} {remedy}") from error
    return path


def _receive(url: str, file: BinaryIO, weights: Weights) -> None:
    """Fill the empty `file` with the `weights.size` bytes of `url`."""
    bar = tqdm(desc=weights.file, total=weights.size, unit="B", unit_scale=True, unit_divisor=1024, disable=None)
    with bar:
        for _ in range(ATTEMPTS):
            arrived, reason = 0, "the stream ended early"
            try:
                for chunk in _stream(url, file, weights.size):
                    file.write(chunk)
                    arrived += len(chunk)
                    bar.update(file.tell() - bar.n)
                    if file.tell() > weights.size:
                        raise CheckpointError(f"there are more bytes than the {weights.size:,} of its card.")
            except _Interrupted as error:
                reason = str(error)
            if file.tell() == weights.size:
                return
            log.info("interrupted after %s bytes: %s", f"{file.tell():,}", reason)
            if not arrived:
                break
    raise CheckpointError(f"only {file.tell():,} of {weights.size:,} bytes came: {reason}. Try again.")


def _stream(url: str, file: BinaryIO, size: int) -> Iterator[bytes]:
    """What `file` lacks of `url`, in pieces; the file is emptied where the server can only begin at the beginning."""
    start = file.tell()
    require_secure(url)
    request = urllib.request.Request(url, headers={"User-Agent": "restpoint"})
    if start:
        request.add_header("Range", f"bytes={start}-")
    try:
        response = urllib.request.build_opener(_SecureRedirects).open(request, timeout=TIMEOUT)
    except urllib.error.HTTPError as error:
        with error:
            raise CheckpointError(f"the server answers {error.code} {error.reason}.") from error
    except (OSError, http.client.HTTPException) as error:
        raise CheckpointError(f"there is no connection ({getattr(error, 'reason', error)}).") from error
    with response:
        if not (response.status == 206 and str(response.headers.get("Content-Range")).startswith(f"bytes {start}-")):
            file.seek(0)
            file.truncate()
            length = response.headers.get("Content-Length")
            if length is not None and int(length) != size:
                raise CheckpointError(f"the server has {int(length):,} bytes, and its card says {size:,}.")
        while True:
            try:
                chunk = response.read(CHUNK)
            except (OSError, http.client.HTTPException) as error:
                raise _Interrupted(str(error) or type(error).__name__) from error
            if not chunk:
                return
            yield chunk


def _verify(file: BinaryIO, weights: Weights) -> None:
    file.seek(0)
    digest = hashlib.file_digest(file, "sha256").hexdigest()  # type: ignore[arg-type]
    if digest != weights.sha256:
        raise CheckpointError(f"what came has the sha256 {digest}, and was thrown away.")
