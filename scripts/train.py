"""Train under a launcher: `accelerate launch scripts/train.py CONFIG key=value ...` or `torchrun ... scripts/train.py`.

On one device, `sparse-hf train CONFIG key=value ...` does the same.
"""

import sys

from sparse_hf.cli import main

if __name__ == "__main__":
    sys.argv[1:1] = ["train"]
    main()
