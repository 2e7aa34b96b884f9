"""On the path of a job, for the interpreter to find: each step takes LDAE_TEST_STEP seconds more.

It gives a test the time to do something to a run, and costs no processor.
"""

import importlib.abc
import os
import signal
import sys
import time


class _AtTheLoop(importlib.abc.MetaPathFinder):
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


sys.meta_path.insert(0, _AtTheLoop())
