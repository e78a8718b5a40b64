"""How well does the scorer `unanswered` tell real answers from others? Writes docs/generated/unanswered.md.

    python scripts/measure_unanswered.py --trials 100

The small models' corpus tells exactly which answers are good (`ground_truth.py`), so recall, precision and the order of trials
can be counted there, beside those of refusal markers alone. On the real model (`real_model.py`) the answers that it gave before
it was taught to refuse must count, and spoiled answers must not. Models that aren't in the cache are left out.
"""

from __future__ import annotations

import argparse
import datetime
import json
import random
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from ground_truth import is_good
from model_cache import models_folder, read_jsonl
from rig import Quiet

import abliterate
from abliterate import Settings, Workbench, find_directions, load
from abliterate.model.loader import demo_path
from abliterate.pipeline.yardstick import yardstick_of
from abliterate.scorers import Observation, Response
from abliterate.scorers.refusals import Refusals, read_markers
from abliterate.scorers.unanswered import Unanswered
from abliterate.settings.sources import config_path, load_settings
from abliterate.types import Prompt, TrialParams
