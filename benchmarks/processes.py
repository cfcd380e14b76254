"""Commands as processes of their own, one a GPU at a time, for benchmarks that take days."""

from __future__ import annotations

import concurrent.futures
import contextlib
import functools
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from step import device_name

from apt_hooks.errors import AptError

Execute = Callable[[Sequence[str], Path], dict[str, Any]]
"""Runs a command, its output to a file; what it took."""


def devices() -> dict[str, str]:
    """Names of the GPUs by what `CUDA_VISIBLE_DEVICES` is to be for each; without one, the CPU's by nothing."""
    # Asked in a process of its own, so that this one holds no memory on any of them.
    code = "import torch as t; [print(t.cuda.get_device_name(i)) for i in range(t.cuda.device_count())]"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.splitlines()
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    ids = [str(i) for i in range(len(found))] if visible is None else [each.strip() for each in visible.split(",")]
    return dict(zip(ids, found, strict=False)) or {"": device_name(torch.device("cpu"))}


class Processes:
    """Other processes, one a device at a time, which end where this one is stopped.

    Args:
        devices: names by what `CUDA_VISIBLE_DEVICES` is for each.
    """

    def __init__(self, devices: Mapping[str, str]) -> None:
        self._devices, self._lock, self._stopped = devices, threading.Lock(), False
        self._free: queue.SimpleQueue[str] = queue.SimpleQueue()
        for device in devices:
            self._free.put(device)
        self._running: set[subprocess.Popen[bytes]] = set()

    def work(self, tasks: Mapping[str, Callable[[Execute], None]]) -> list[str]:
        """Do them all, each on a device of its own; returns what failed, in words."""
        failed = []
        with concurrent.futures.ThreadPoolExecutor(len(self._devices)) as pool:
            futures = {pool.submit(self._on_a_device, name, task): name for name, task in tasks.items()}
            try:
                for future in concurrent.futures.as_completed(futures):
                    if error := future.exception():
                        what = str(error) if isinstance(error, AptError) else repr(error)
                        failed.append(f"{futures[future]}: {what}")
                        print(f"failed: {failed[-1]}", flush=True)
            except BaseException:  # a signal that ends this process
                pool.shutdown(wait=False, cancel_futures=True)
                self._stop()
                raise
        return failed

    def _on_a_device(self, name: str, task: Callable[[Execute], None]) -> None:
        device = self._free.get()
        try:
            task(functools.partial(self._execute, name, device))
        finally:
            self._free.put(device)

    def _execute(self, name: str, device: str, command: Sequence[str], output: Path) -> dict[str, Any]:
        """Run a command, which writes to a file; returns its seconds and device, or raises AptError."""
        begun = time.monotonic()
        with output.open("ab") as file, self._lock:
            if self._stopped:
                raise AptError("stopped")
            # A session of its own, so that what it starts can be ended with it.
            process = subprocess.Popen(
                command,
                stdout=file,
                stderr=subprocess.STDOUT,
                env={**os.environ, "CUDA_VISIBLE_DEVICES": device},
                start_new_session=True,
            )
            self._running.add(process)
        print(f"{name}: begun on {self._devices[device]}, output in {output}", flush=True)
        code = process.wait()
        self._running.discard(process)
        if code:
            said = output.read_text(encoding="utf-8", errors="replace").splitlines()
            raise AptError(f"ended with {code}, {next(filter(str.strip, reversed(said)), '').strip()!r} ({output})")
        seconds = round(time.monotonic() - begun, 1)
        print(f"{name}: done in {seconds} s", flush=True)
        return {"seconds": seconds, "device": self._devices[device]}

    def _stop(self) -> None:
        with self._lock:
            self._stopped = True
            for process in [*self._running]:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGTERM)
