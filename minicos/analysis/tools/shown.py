"""Data for the page of a run that the files do not contain otherwise: which videos to show side by
side, and where interventions act.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass

import numpy as np

from minicos.media import save_video
from minicos.runs import Run

VIDEOS, INTERVENTIONS = "shown.json", "interventions.json"


@dataclass(frozen=True)
class Where:
    """An intervention and where it acts; an empty axis means everywhere on it."""

    label: str
    steps: Sequence[int] = ()
    frames: Sequence[int] = ()  # latent frames
    layers: Sequence[int] = ()


def save_videos(run: Run, videos: Mapping[str, np.ndarray], fps: float) -> None:
    """Write every video (uint8 f h w 3) under its label, and list them in order."""
    named = {f"videos/{i:02d}_{_name(label)}.mp4": label for i, label in enumerate(videos)}
    for file, label in named.items():
        save_video(run.path(file), videos[label], fps=fps)
    list_videos(run, named)


def list_videos(run: Run, labels: Mapping[str, str]) -> None:
    """List videos in the folder: file -> label, in the order in which they are shown."""
    run.save_json(VIDEOS, [{"file": file, "label": label} for file, label in labels.items()])


def list_interventions(run: Run, interventions: Iterable[Where]) -> None:
    """Record where interventions act."""
    run.save_json(INTERVENTIONS, [asdict(one) for one in interventions])


def _name(label: str) -> str:
    return re.sub(r"[^\w-]+", "_", label)[:60]
