"""Read uploaded tables, one at a time, each in a separate process that ends with its request (`table_child`)."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import sys
import tempfile
from pathlib import Path

from distil.serving.engine import Refusal
from distil.serving.guard import max_features
from distil.tasks import Task

ROOT = Path(__file__).resolve().parents[2]
MAX_WAITING = 4
KEPT = ("PATH", "LD_LIBRARY_PATH", "LANG", "LC_ALL")  # of the environment: not the server's key


class TableReader:
    """Turns the bytes of tables into rows for the page. timeout: seconds from request to answer."""

    def __init__(self, task: Task, timeout: float):
        self.task, self.timeout = task, timeout
        self._one, self._waiting = asyncio.Semaphore(1), 0

    async def read(self, body: bytes, name: str, decimal: str | None) -> bytes:
        """Return the JSON of `table_child.table_rows`. name: of the file, for its kind and for messages.
        Nothing is stored beyond the request. Raises Refusal."""
        if self._waiting >= MAX_WAITING:
            raise Refusal(503, "busy", "too many files are waiting", "try again", retry_after=2)
        self._waiting += 1
        try:
            async with asyncio.timeout(self.timeout), self._one:
                status, answer = await self._run(body, name, decimal)
        except TimeoutError:
            text = f"the file was not read within {self.timeout:g} s"
            raise Refusal(504, "timeout", text, "send fewer rows") from None
        finally:
            self._waiting -= 1
        if status == 0:
            return answer
        if status == 3:
            problem = json.loads(answer)
            hint = "choose the decimal mark" if problem["code"] == "two_readings" else ""
            raise Refusal(422, problem["code"], problem["message"], hint)
        message = f"{name}: reading it ended with status {status}, at a limit of memory or time or by a crash"
        raise Refusal(422, "not_read", message, "save it as CSV, or use infer_creditmix.py --input")

    async def _run(self, body: bytes, name: str, decimal: str | None) -> tuple[int, bytes]:
        """Return exit status and output of a child that reads these bytes; it is killed where nobody waits for it."""
        with tempfile.TemporaryDirectory(prefix="table") as folder:
            path = Path(folder) / ("table" + re.search(r"(\.\w{1,8}){0,2}$", name, re.ASCII)[0])
            path.write_bytes(body)
            job = {"path": str(path), "name": name, "decimal": decimal, "task": self.task.record}
            job |= {"most": max_features(self.task), "seconds": self.timeout}
            environment = {key: os.environ[key] for key in KEPT if key in os.environ}
            environment |= {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "ARROW_DEFAULT_MEMORY_POOL": "system"}
            pipes = {"stdin": asyncio.subprocess.PIPE, "stdout": asyncio.subprocess.PIPE}
            pipes["stderr"] = asyncio.subprocess.DEVNULL
            command = [sys.executable, "-m", "distil.serving.table_child"]
            child = await asyncio.create_subprocess_exec(*command, cwd=ROOT, env=environment, **pipes)
            try:
                answer, _ = await child.communicate(json.dumps(job).encode())
            finally:
                with contextlib.suppress(ProcessLookupError):
                    child.kill()
                await child.wait()
            return child.returncode, answer
