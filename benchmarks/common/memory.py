"""Peak memory of the running process."""

from __future__ import annotations

import threading
from pathlib import Path


class AnonymousPeak(threading.Thread):
    """Background thread that samples the anonymous resident memory of this process, in bytes.

    Mapped model and cache files are left out: the system can drop them.

    Args:
        interval: Seconds between samples.
    """

    def __init__(self, interval: float = 0.002) -> None:
        super().__init__(daemon=True)
        self.interval = interval
        self.peak = 0
        self.done = threading.Event()

    def now(self) -> int:
        status = Path("/proc/self/status").read_text()
        return int(status.partition("RssAnon:")[2].split()[0]) * 1024

    def run(self) -> None:
        while not self.done.wait(self.interval):
            self.peak = max(self.peak, self.now())
