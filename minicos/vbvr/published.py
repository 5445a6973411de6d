"""Published numbers for VBVR-Bench and VBVR-Pro-Bench, as reference rows.

Only numbers that could be traced to a text are included; cells without one are empty, such as the
categories of VBVR-Bench. None of the sources names its revision of the scorer, and the scorer has
changed since (2026-03-27, 2026-04-14): use them for orientation only, and subtract only runs that
were scored by the same checkout. The peers' rows on VBVR-Bench were made with geometry that costs
them points: LTX-2 received letterboxed pictures and used a distilled model in the other model's
schedule, CogVideoX received square pictures distorted to 1360x768.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

MAIN = ("Overall", "ID", "OOD")
CATEGORIES = ("Abstraction", "Knowledge", "Perception", "Spatiality", "Transformation")
COLUMNS = (
    "Overall",
    *(name for d in ("ID", "OOD") for name in (d, *(f"{d} {category}" for category in CATEGORIES))),
)
MARK = "published, scorer revision unknown"
SOURCES = {
    "A": '"A Very Big Video Reasoning Suite", arXiv 2602.20159',
    "B": '"Demystifying Video Reasoning", arXiv 2603.16870, by way of notes and digests',
    "C": "CollabVR, arXiv 2605.08735",
    "D": "the README of Video-Reason/VBVR-Pro, its video models",
}
ROUNDED = 0.0011  # largest difference of two three-digit numbers that should be equal


@dataclass(frozen=True)
class Published:
    """One row: column -> score."""

    name: str
    scores: Mapping[str, float]
    source: str

    @property
    def suspicions(self) -> tuple[str, ...]:
        """Reasons to doubt the row; () if there are none."""
        outside = [name for name, value in self.scores.items() if not 0 <= value <= 1]
        why = [f"{name} is outside 0 to 1" for name in outside]
        overall, *domains = (self.scores.get(column, math.nan) for column in MAIN)
        if overall == domains[0] == domains[1]:
            why.append("overall, in-domain and out-of-domain are one number")
        if abs(overall - sum(domains) / 2) > ROUNDED:  # the two domains have 250 samples each
            why.append("overall is not the mean of the two domains")
        for name, value in zip(MAIN[1:], domains, strict=True):
            parts = [v for column, v in self.scores.items() if column.startswith(f"{name} ")]
            if parts and (value < min(parts) - ROUNDED or value > max(parts) + ROUNDED):
                why.append(f"{name} lies outside its categories and cannot be their mean")
        return tuple(why)


def _pro(name: str, *scores: float) -> Published:
    """A row with every column."""
    return Published(name, dict(zip(COLUMNS, scores, strict=True)), "D")


BENCH = (
    Published("human", {"Overall": 0.974}, "A"),
    Published("VBVR-Wan2.2", {"Overall": 0.685, "ID": 0.760, "OOD": 0.610}, "A"),
    Published("VBVR-Wan2.2, ensemble of 3", {"Overall": 0.716}, "B, version 3"),
    Published("VBVR-Wan2.2, 33 frames", {"Overall": 0.685, "ID": 0.685, "OOD": 0.685}, "B"),
    Published("VBVR-Wan2.2, measured by others", {"Overall": 0.671}, "C"),
    Published("VBVR-Wan2.2 in CollabVR's loop", {"Overall": 0.757}, "C"),
    Published("VBVR-LTX2.3", {"Overall": 0.516}, "A"),
    Published("Sora 2", {"Overall": 0.546}, "A"),
    Published("Veo 3.1", {"Overall": 0.480}, "A"),
    Published("Wan2.2-I2V-A14B", {"Overall": 0.371, "ID": 0.412, "OOD": 0.329}, "A"),
    Published("LTX-2", {"Overall": 0.313}, "A"),
    Published("CogVideoX1.5-5B-I2V", {"Overall": 0.273}, "A"),
    Published("HunyuanVideo-I2V", {"Overall": 0.273}, "A"),
)
PRO = (
    _pro("VBVR-Pro-Wan2.2-I2V-14B", .670, .808, .632, .685, .556, .751, .636, .532, .479, .418, .350, .679, .690),
    _pro("VBVR-Pro-Wan2.1-I2V-14B", .562, .730, .617, .580, .452, .676, .623, .395, .410, .305, .230, .617, .439),
    _pro("VBVR-Wan2.2", .517, .548, .237, .499, .334, .566, .591, .486, .310, .343, .345, .732, .684),
    _pro("Seedance 2.0", .499, .451, .338, .361, .353, .468, .308, .547, .369, .511, .478, .538, .532),
    _pro("VBVR-Pro-Wan2.2-TI2V-5B", .470, .641, .528, .556, .373, .565, .557, .300, .333, .127, .161, .505, .409),
    _pro("VBVR-Pro-LTX2.3", .425, .527, .409, .510, .346, .460, .390, .324, .381, .108, .201, .477, .386),
    _pro("Kling 3.0", .392, .356, .213, .326, .320, .355, .229, .427, .294, .564, .375, .242, .412),
    _pro("Veo 3.1", .309, .312, .275, .299, .252, .267, .157, .305, .305, .233, .252, .312, .219),
    _pro("Wan2.2-I2V-A14B", .182, .157, .082, .131, .110, .161, .156, .207, .224, .139, .140, .195, .273),
    _pro("LTX-2.3", .112, .106, .062, .109, .070, .133, .055, .119, .161, .135, .086, .091, .050),
    _pro("Wan2.1-I2V-14B", .100, .105, .052, .125, .091, .102, .052, .095, .112, .073, .071, .123, .044),
    _pro("Wan2.2-TI2V-5B", .094, .066, .029, .073, .050, .083, .031, .122, .156, .052, .106, .063, .099),
    _pro("CogVideoX1.5-5B-I2V", .085, .100, .061, .118, .069, .092, .060, .070, .125, .038, .051, .040, .024),
    _pro("HunyuanVideo-I2V", .054, .054, .023, .064, .015, .084, .032, .053, .088, .014, .028, .062, .055),
)  # fmt: skip
