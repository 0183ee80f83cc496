"""Train under a launcher, whichever it is; `sparse-hf train CONFIG key=value ...` does the same on one device.

torchrun --nproc_per_node 8 scripts/train.py CONFIG key=value ...
accelerate launch --config_file configs/accelerate/fsdp2.yaml --num_processes 8 scripts/train.py CONFIG ...
deepspeed --num_gpus 8 scripts/train.py CONFIG trainer.deepspeed=configs/deepspeed/zero3.json ...
"""

import sys

from sparse_hf.cli import main

if __name__ == "__main__":
    sys.argv[1:1] = ["train"]
    main()
