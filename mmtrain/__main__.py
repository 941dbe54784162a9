"""`python -m mmtrain`, and what launchers start by `--module mmtrain`."""

import sys

from mmtrain.cli import main

# torch's checkpointing re-imports the main module in its own processes
if __name__ == "__main__":
    sys.exit(main())
