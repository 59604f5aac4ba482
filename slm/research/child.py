"""`train.py` as a sweep starts it: a run that is stopped, and saved, where the sweep has gone."""

import os
import signal
import threading


def end_with_parent() -> None:
    """End this process, as a signal does, when the one that started it has ended; that holds its standard input."""

    def wait() -> None:
        os.read(0, 1)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=wait, daemon=True).start()


if __name__ == "__main__":
    end_with_parent()
    from slm.cli import main  # which takes seconds, in which the sweep may be gone

    main()
