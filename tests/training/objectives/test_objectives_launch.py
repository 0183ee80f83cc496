"""The chunked objectives in two processes; what is compared is in `workers/loss_head.py`."""

import json
import os
import subprocess
import sys
from pathlib import Path

WORKER = Path(__file__).parents[1] / "workers" / "loss_head.py"


def test_ddp_and_fsdp2_give_the_gradients_of_one_process() -> None:
    run = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(WORKER)],
        capture_output=True,
        text=True,
        timeout=180,
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
    )
    assert run.returncode == 0, run.stderr[-3000:]
    assert len(json.loads(run.stdout.splitlines()[-1])) == 10
