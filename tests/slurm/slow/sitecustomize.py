"""Slow training, for jobs with this folder on PYTHONPATH: Python imports this file at its start.

Each step sleeps LDAE_TEST_STEP seconds, which gives a test time to disturb the run and needs no
processor. The process kills itself at step LDAE_TEST_DIES_AT.
"""

import importlib.abc
import os
import signal
import sys
import time


class _SlowSteps(importlib.abc.MetaPathFinder):
    """Slows the optimizer down when the training loop is imported."""

    def find_spec(self, name, path, target=None):
        if name == "ldae.train.loop":
            sys.meta_path.remove(self)
            import torch

            step = torch.optim.AdamW.step
            steps = 0

            def slow(*args, **kwargs):
                nonlocal steps
                steps += 1
                if steps == int(os.environ.get("LDAE_TEST_DIES_AT", 0)):
                    os.kill(os.getpid(), signal.SIGKILL)
                time.sleep(float(os.environ["LDAE_TEST_STEP"]))
                return step(*args, **kwargs)

            torch.optim.AdamW.step = slow
        return None


sys.meta_path.insert(0, _SlowSteps())
