"""Run a command line of the tool; prints by how many bytes its own memory grew at most.

Counted are anonymous pages: what a process must have in memory. Pages of files that are mapped are
left out, since the system drops them when it needs room.
"""

import sys
import threading
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tools"))

import convert_checkpoint


def anonymous_bytes() -> int:
    """`RssAnon` of this process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("no RssAnon")


class Watch(threading.Thread):
    """Looks every millisecond."""

    def __init__(self) -> None:
        """Begin from what there is."""
        super().__init__(daemon=True)
        self.over = threading.Event()
        self.base = anonymous_bytes()
        self.peak = self.base

    def run(self) -> None:
        """Look until it is over."""
        while not self.over.wait(0.001):
            self.peak = max(self.peak, anonymous_bytes())


for words in sys.argv[1:]:
    watch = Watch()
    watch.start()
    code = convert_checkpoint.main(words.split())
    watch.over.set()
    watch.join()
    print(f"code {code} grew {watch.peak - watch.base}")
