"""What the page is about: one look at the store as ``top`` takes it, and how old and how used its blocks are."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ...engine.miss_ratio import MissRatioCurve
from ..inspect.survey import Survey
from ..liveness import RecordState
from ..store_files import StoreFiles
from ..top.model import TopView, view_of
from ..top.sample import Sample, file_facts, take_sample

CELLS = 240
SEGMENTS_MAX = 128
AGE_EDGES_S = (0, 10, 60, 600, 3600, 6 * 3600, 86_400, 7 * 86_400, 30 * 86_400)
AGE_NAMES = ("10 s", "1 min", "10 min", "1 h", "6 h", "1 d", "7 d", "30 d", "older")
"""Upper ends of the bins."""
HIT_EDGES = (0, 1, 2, 3, 5, 9, 17, 33, 255)
HIT_NAMES = ("0", "1", "2", "3-4", "5-8", "9-16", "17-32", "33-254", "255+")


@dataclass(frozen=True, slots=True)
class Histograms:
    """Live blocks and their bytes (as stored) by age, blocks by hits; in the order of the names above."""

    age_blocks: list[int]
    age_bytes: list[int]
    hit_blocks: list[int]
    """Empty when there is no heat table."""


@dataclass(frozen=True, slots=True)
class Report:
    """Everything on the page."""

    view: TopView
    sample: Sample
    histograms: Histograms
    curve: MissRatioCurve | None
    """``None`` when no running process publishes one."""
    seen_ns: int


def collect(path: Path) -> Report:
    """Read the store. Raises ``KvlodeError`` or ``OSError`` when this is none."""
    began_s = time.monotonic()
    with StoreFiles(path) as files:
        survey = Survey(files)
        facts = file_facts(survey, cells=CELLS, segments_max=SEGMENTS_MAX, began_s=began_s)
        histograms = _histograms(survey)
    sample = take_sample(path, facts, time.monotonic())
    view = view_of(None, sample, now_ns=time.time_ns())
    return Report(view, sample, histograms, curve_of(sample), time.time_ns())


def curve_of(sample: Sample) -> MissRatioCurve | None:
    """The curve that the process publishes; ``None`` without one, or with one of another version of kvlode."""
    told = sample.stats.get("miss_ratio")
    if not isinstance(told, dict):
        return None
    try:
        return MissRatioCurve(**{name: told[name] for name in MissRatioCurve.__slots__})
    except KeyError:
        return None


def _histograms(survey: Survey) -> Histograms:
    ages, sizes, hits = np.zeros(len(AGE_NAMES), np.int64), np.zeros(len(AGE_NAMES), np.int64), np.zeros(len(HIT_NAMES), np.int64)
    for view, states in survey.views():
        live = np.flatnonzero(states == RecordState.LIVE)
        written_s = view.table.written_at_ns[live].astype(np.float64) / 1e9
        places = np.clip(np.searchsorted(AGE_EDGES_S, survey.now_ns / 1e9 - written_s, side="right") - 1, 0, len(AGE_NAMES) - 1)
        np.add.at(ages, places, 1)
        np.add.at(sizes, places, view.table.stored_length[live].astype(np.int64))
        counts = np.array(survey.hits_of(view, live), dtype=np.int64)
        np.add.at(hits, np.searchsorted(HIT_EDGES, counts, side="right") - 1, 1)
    return Histograms(ages.tolist(), sizes.tolist(), hits.tolist() if survey.heat is not None else [])
