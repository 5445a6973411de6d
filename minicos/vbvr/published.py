"""What is published about VBVR-Bench, as reference rows beside one's own.

Only numbers that could be traced to a text are here; a cell that could not is empty. None of them
says which revision of the scorer it comes from, and the scorer has changed since (2026-03-27,
2026-04-14): they are for orientation, and only runs that were scored by the same checkout can be
subtracted from each other. Sources: A, "A Very Big Video Reasoning Suite" (arXiv 2602.20159); B,
"Demystifying Video Reasoning" (arXiv 2603.16870), by way of notes and digests; C, CollabVR (arXiv
2605.08735). The peers' rows were made with geometry that costs them points: LTX-2 got letterboxed
pictures and a distilled model in a schedule for the other, CogVideoX got square pictures squashed
to 1360x768.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

MAIN = ("Overall", "ID", "OOD")
MARK = "published, scorer revision unknown"


@dataclass(frozen=True)
class Published:
    """One row: column -> score."""

    name: str
    scores: Mapping[str, float]
    source: str

    @property
    def suspicions(self) -> tuple[str, ...]:
        """Why the row should not be believed as it stands; () where nothing speaks against it."""
        why = []
        if any(not 0 <= value <= 1 for value in self.scores.values()):
            why.append("a score outside 0 to 1")
        if len({self.scores.get(column) for column in MAIN}) == 1:
            why.append("overall, in-domain and out-of-domain are one number")
        overall, inside, outside = (self.scores.get(column, math.nan) for column in MAIN)
        if abs(overall - (inside + outside) / 2) > 0.0011:  # the two domains have 250 samples each
            why.append("overall is not the mean of the two domains")
        return tuple(why)


PUBLISHED = (
    Published("human", {"Overall": 0.974}, "A"),
    Published("VBVR-Wan2.2", {"Overall": 0.685, "ID": 0.760, "OOD": 0.610}, "A"),
    Published("VBVR-Wan2.2, ensemble of 3", {"Overall": 0.716}, "B, version 3"),
    Published("VBVR-Wan2.2, 33 frames", {"Overall": 0.685, "ID": 0.685, "OOD": 0.685}, "B"),
    Published("VBVR-Wan2.2, measured by others", {"Overall": 0.671}, "C"),
    Published("VBVR-LTX2.3", {"Overall": 0.516}, "A"),
    Published("Sora 2", {"Overall": 0.546}, "A"),
    Published("Veo 3.1", {"Overall": 0.480}, "A"),
    Published("Wan2.2-I2V-A14B", {"Overall": 0.371, "ID": 0.412, "OOD": 0.329}, "A"),
    Published("LTX-2", {"Overall": 0.313}, "A"),
    Published("CogVideoX1.5-5B-I2V", {"Overall": 0.273}, "A"),
    Published("HunyuanVideo-I2V", {"Overall": 0.273}, "A"),
)
