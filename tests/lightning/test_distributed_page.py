"""docs/distributed.md: its torchrun command is run, and a checkpoint of two processes resumes with one."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from sparse_callbacks import RigL, saved_masks
from sparse_callbacks.testing.comparison import assert_counts, assert_effective, differences
from sparse_callbacks.testing.runs import fit

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/distributed.md").read_text()


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_the_torchrun_command_of_the_page_trains_and_its_checkpoint_resumes_with_one_process(tmp_path: Path) -> None:
    (script,) = re.findall(r"^```python file=train_ddp.py\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    (tmp_path / "train_ddp.py").write_text(script.replace('accelerator="auto"', 'accelerator="cpu"'))
    torchrun, *options = shlex.split(re.findall(r"^torchrun --standalone .*$", PAGE, re.MULTILINE)[0])
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", *options]
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=200, check=False
    )
    assert torchrun == "torchrun"
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("RigL: sparsity 0.9") == 1
    (path,) = tmp_path.rglob("*.ckpt")

    names: dict[str, object] = {"__name__": "train_ddp"}
    exec(compile(script, "train_ddp.py", "exec"), names)
    module, callback = names["Net"](), RigL(0.9, every=5, stop=0.75, print_plan=False)  # type: ignore[operator]
    x = torch.randn(256, 20)
    data = DataLoader(TensorDataset(x, (x[:, 0] > 0).long()), batch_size=16)
    saved = saved_masks(path)
    fit(module, callback, loader=data, ckpt_path=path, max_epochs=6)
    assert callback.masks.keys() == saved.keys()
    assert_effective(module, callback)
    assert_counts(callback)
    # the run is longer now, so that updates go on
    assert differences(saved, dict(callback.masks)) != []
