"""Import everything that a run of the demo imports, for processes forked from here; nothing runs, as threads wouldn't survive.

The garbage collector ignores these permanent objects, because a collection over them takes a third of a second.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import os

for name in (
    *("transformers.models.qwen2.modeling_qwen2", "transformers.models.qwen2.tokenization_qwen2"),
    *("abliterate.cli.app", "abliterate.cli.run", "abliterate.pipeline.run", "abliterate.pipeline.export_trial"),
    *("peft", "peft.tuners.lora", "torch._dynamo", "torch._inductor", "support.peaks", "support.fake_worker"),
):
    with contextlib.suppress(ImportError):
        importlib.import_module(name)
gc.freeze()
os.fsync = lambda fd: None  # as tests/conftest.py says
