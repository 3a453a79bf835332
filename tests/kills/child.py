"""`train.py` as the child process that is killed: it notes its steps, and may kill itself while it writes a checkpoint.

``python -m kills.child OVERRIDES``, with NOTES, the file of the notes, and perhaps KILL_IN_WRITE, the number of the
checkpoint from 1 and the seconds after which its writing is cut short: "3 0.002".
"""

import os
import signal
import sys
import threading
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from sparse_callbacks.tasks import safe_stop  # noqa: E402
from train import main  # noqa: E402


def note(text: str) -> None:
    """Replace the note by ``text``; a reader sees one of the two whole."""
    beside = Path(os.environ["NOTES"] + ".new")
    beside.write_text(text)
    beside.replace(os.environ["NOTES"])


def tell_steps() -> None:
    """Note the optimizer step after every batch, before anything is saved there."""
    real = safe_stop.SafeStop.on_train_batch_end

    def telling(self: Any, trainer: Any, *args: Any) -> None:
        note(str(trainer.global_step))
        real(self, trainer, *args)

    safe_stop.SafeStop.on_train_batch_end = telling  # type: ignore[method-assign]


def kill_in_write(number: int, seconds: float) -> None:
    """Let a SIGKILL end this process so many seconds after it has begun to write checkpoint ``number``."""
    real, written = safe_stop.save_atomically, [0]

    def write(trainer: Any, path: Path) -> None:
        written[0] += 1
        if written[0] == number:
            note(f"{trainer.global_step} writing")
            threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGKILL)).start()
        real(trainer, path)

    safe_stop.save_atomically = write


if __name__ == "__main__":
    tell_steps()
    if wanted := os.environ.get("KILL_IN_WRITE"):
        kill_in_write(int(wanted.split()[0]), float(wanted.split()[1]))
    main()
