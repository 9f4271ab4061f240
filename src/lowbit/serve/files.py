"""/v1/files: uploads for batches, and what batches wrote. https://platform.openai.com/docs/api-reference/files"""

from __future__ import annotations

import asyncio
import errno
from pathlib import Path
from typing import Any

from aiohttp import BodyPartReader, hdrs, web
from aiohttp.http_exceptions import HttpProcessingError

from lowbit.harness import BadRequest, HarnessError
from lowbit.serve import guard
from lowbit.serve.store import Store, new_id

_SILENT = 30.0  # seconds for the next piece of an upload
_PIECE = 1 << 18  # bytes
_MOST = 10_000  # in a list
_LONGEST_NAME = 256
_MOST_PARTS = 16


class Files:
    """file_bytes: of an upload at most. kept_bytes: of all files together."""

    def __init__(self, store: Store, *, file_bytes: int, kept_bytes: int) -> None:
        self._store, self._file_bytes, self._kept_bytes = store, file_bytes, kept_bytes

    def add_to(self, app: web.Application) -> None:
        app.router.add_post("/v1/files", self.upload)
        app.router.add_get("/v1/files", self.list)
        app.router.add_get("/v1/files/{id}", self.get)
        app.router.add_delete("/v1/files/{id}", self.delete)
        app.router.add_get("/v1/files/{id}/content", self.content)

    async def upload(self, request: web.Request) -> web.StreamResponse:
        if request.content_type != "multipart/form-data":
            raise HarnessError(
                "the Content-Type must be multipart/form-data", status=415, code="unsupported_media_type"
            )
        if request.content_length is not None and request.content_length > self._file_bytes + (1 << 20):
            raise self._too_large()
        self._store.open()
        id = new_id("file-")
        partial = self._store.path(id).with_suffix(".partial")
        try:
            purpose, name = await self._receive(request, partial)
            partial.replace(self._store.path(id))
        except OSError as error:
            full = error.errno in (errno.ENOSPC, errno.EDQUOT)
            message = "the disk is full" if full else f"the file cannot be kept: {error.strerror}"
            raise HarnessError(message, status=507, code="no_room") from None
        finally:
            partial.unlink(missing_ok=True)
        return guard.json_response(self._store.add_file(id, name, purpose))

    async def _receive(self, request: web.Request, partial: Path) -> tuple[str, str]:
        """Purpose and name of an upload whose bytes are written to ``partial``."""
        purpose, name, count = "", None, 0
        try:
            parts = await request.multipart()
            while (part := await asyncio.wait_for(parts.next(), _SILENT)) is not None:
                count += 1
                if not isinstance(part, BodyPartReader) or count > _MOST_PARTS:
                    raise BadRequest(f"a form may have {_MOST_PARTS} parts, and none of them a form", param="file")
                if part.name == "purpose":
                    purpose = (await self._small(part)).decode("utf-8", "replace")
                elif part.name == "file" and name is None:
                    name = _shown(part.filename)
                    await self._write(part, partial)
                elif str(part.name).startswith("expires_after"):  # files are kept until they are deleted
                    await self._small(part)
                else:
                    raise BadRequest("the form has file and purpose, each once", param=str(part.name)[:40])
        except TimeoutError:
            raise HarnessError("the body did not come in time", status=408, code="body_timeout") from None
        except (ValueError, AssertionError, web.RequestPayloadError, HttpProcessingError) as error:
            raise BadRequest(f"the form is broken: {' '.join(str(error).split())[:100]}") from None
        if name is None:
            raise BadRequest("there is no file", param="file")
        if purpose != "batch":
            raise BadRequest(f'purpose must be "batch"; found {purpose[:40]!r}', param="purpose")
        return purpose, name

    async def _write(self, part: BodyPartReader, partial: Path) -> None:
        room, size = self._kept_bytes - self._store.bytes_kept(), 0
        with open(partial, "wb") as handle:
            while piece := await asyncio.wait_for(part.read_chunk(_PIECE), _SILENT):
                size += len(piece)
                if size > self._file_bytes:
                    raise self._too_large()
                if size > room:
                    message = f"all files together may have {self._kept_bytes:,} bytes; delete some"
                    raise HarnessError(message, status=413, code="files_too_large", param="file")
                handle.write(piece)
        if not size:
            raise BadRequest("the file is empty", param="file")

    async def _small(self, part: BodyPartReader) -> bytes:
        found = b""
        while piece := await asyncio.wait_for(part.read_chunk(4096), _SILENT):
            found += piece
            if len(found) > 4096:
                raise BadRequest(f"{str(part.name)[:40]} is too long", param=str(part.name)[:40])
        return found

    async def list(self, request: web.Request) -> web.StreamResponse:
        having = {"purpose": request.query["purpose"]} if "purpose" in request.query else {}
        order = request.query.get("order", "desc")
        if order not in ("asc", "desc"):
            raise BadRequest("order must be asc or desc", param="order")
        return guard.json_response(
            listing(self._store, "files", request, _MOST, _MOST, oldest_first=order == "asc", **having)
        )

    async def get(self, request: web.Request) -> web.StreamResponse:
        return guard.json_response(self._store.get("files", request.match_info["id"]))

    async def delete(self, request: web.Request) -> web.StreamResponse:
        record = self._store.get("files", request.match_info["id"])
        self._store.open()
        for batch in self._store.listed("batches", after=None, limit=_MOST, oldest_first=False)[0]:
            if batch["input_file_id"] == record["id"] and batch["status"] in UNFINISHED:
                message = f"{batch['id']} is not done with it; cancel the batch first"
                raise HarnessError(message, status=409, code="file_in_use", param="id")
        self._store.remove_file(record["id"])
        return guard.json_response({"id": record["id"], "object": "file", "deleted": True})

    async def content(self, request: web.Request) -> web.StreamResponse:
        record = self._store.get("files", request.match_info["id"])
        headers = {
            hdrs.CONTENT_TYPE: "application/octet-stream",
            hdrs.CONTENT_DISPOSITION: "attachment",  # it is a stranger's, and no page of this host
            "X-Content-Type-Options": "nosniff",
        }
        return web.FileResponse(self._store.path(record["id"]), headers=headers)

    def _too_large(self) -> HarnessError:
        message = f"a file may have {self._file_bytes:,} bytes"
        return HarnessError(message, status=413, code="body_too_large", param="file")


UNFINISHED = ("validating", "in_progress", "finalizing", "cancelling")


def listing(store: Store, kind: str, request: web.Request, usual: int, most: int, **how: Any) -> dict[str, Any]:
    """A page of a list. Raises BadRequest, HarnessError (404)."""
    try:
        limit = int(request.query.get("limit", usual))
    except ValueError:
        limit = 0
    if not 1 <= limit <= most:
        raise BadRequest(f"limit must be a whole number from 1 to {most}", param="limit")
    found, more = store.listed(kind, after=request.query.get("after"), limit=limit, **how)
    first, last = (found[0]["id"], found[-1]["id"]) if found else (None, None)
    return {"object": "list", "data": found, "first_id": first, "last_id": last, "has_more": more}


def _shown(name: str | None) -> str:
    """A file's name for people: it is never a path here."""
    last = (name or "file").replace("\\", "/").rpartition("/")[2]
    return "".join(c for c in last if c.isprintable())[:_LONGEST_NAME] or "file"
