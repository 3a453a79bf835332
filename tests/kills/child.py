"""`train.py` as the child processes that are killed: they note their steps, and may kill themselves while they write.

``python -m kills.child`` imports everything once, which takes longer than a run, and then forks a process for each line on
its input, a JSON object with argv, environment, folder and the file for its errors. It answers with the number of the
process, and with its exit status when it has ended.
"""

import json
import os
import signal
import sys
import threading
import traceback
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))


def note(text: str) -> None:
    """Replace the note by ``text``; a reader sees one of the two whole."""
    beside = Path(os.environ["NOTES"] + ".new")
    beside.write_text(text)
    beside.replace(os.environ["NOTES"])


def tell_steps() -> None:
    """Note the optimizer step after every batch, before anything is saved there."""
    from sparse_callbacks.tasks.safe_stop import SafeStop

    real = SafeStop.on_train_batch_end

    def telling(self: Any, trainer: Any, *args: Any) -> None:
        note(str(trainer.global_step))
        real(self, trainer, *args)

    SafeStop.on_train_batch_end = telling  # type: ignore[method-assign]


def kill_in_write(number: int, seconds: float) -> None:
    """Let a SIGKILL end this process so many seconds after it has begun to write checkpoint ``number``."""
    from sparse_callbacks.tasks import safe_stop

    real, written = safe_stop.save_atomically, [0]

    def write(trainer: Any, path: Path) -> None:
        written[0] += 1
        if written[0] == number:
            note(f"{trainer.global_step} writing")
            threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGKILL)).start()
        real(trainer, path)

    safe_stop.save_atomically = write


def run(argv: list[str], environment: dict[str, str], folder: str, errors: str) -> None:
    """What the forked process does: train, and end with the status of `train.py`."""
    os.environ.update(environment)
    os.chdir(folder)
    for stream, place in ((1, os.devnull), (2, errors)):
        os.dup2(os.open(place, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream)
    sys.argv = [str(ROOT / "train.py"), *argv]
    status = 1
    try:
        from train import main

        tell_steps()
        if wanted := environment.get("KILL_IN_WRITE"):
            kill_in_write(int(wanted.split()[0]), float(wanted.split()[1]))
        main()
        status = 0
    except SystemExit as ended:
        status = int(ended.code or 0)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(status)


def serve() -> None:
    """Fork a process for each line of the input."""
    import wandb.sdk  # noqa: F401

    import train  # noqa: F401

    for line in sys.stdin:
        given = json.loads(line)
        if not (child := os.fork()):
            run(**given)
        print(child, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


if __name__ == "__main__":
    serve()
