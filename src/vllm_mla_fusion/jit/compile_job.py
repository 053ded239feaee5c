# SPDX-License-Identifier: Apache-2.0
"""Child process of a build: compiles with torch.utils.cpp_extension and loads the result once as proof.

A process of its own, so that the server's environment, CUDA state and registered ops stay as they were.
"""

import json
import os
import signal
import sys
import threading
import traceback
from pathlib import Path

from vllm_mla_fusion.jit.explain import TRACEBACK


def _end_with_parent() -> None:
    """Ends this process group when stdin closes: the builder has died. ninja passes the signal on to the compilers."""
    os.read(sys.stdin.fileno(), 1)
    os.killpg(0, signal.SIGTERM)


def main(job: Path) -> None:
    """Runs the job that the builder wrote: keyword arguments of ``torch.utils.cpp_extension.load``."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    status = 0
    try:
        from torch.utils import cpp_extension

        cpp_extension.load(**json.loads(job.read_text()), is_python_module=False, verbose=True)
    except Exception as error:
        status = 1
        # The loader's own words are the cause of torch's.
        said = error.__cause__ if isinstance(error, OSError) and error.__cause__ else error
        print(f"error: {said}\n{TRACEBACK}\n{traceback.format_exc()}")
    # Tidying torch up would take a fifth of a second.
    sys.stdout.flush()
    os._exit(status)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
