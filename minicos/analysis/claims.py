"""The paper's claims, fixed before the test split was used: which number decides each claim, what
it is compared with, and the smallest effect that would matter.

A headline effect is the network's minus that of an exact ideal observer if its control is the
observer, run as the model: an effect that Bayes' rule also shows is not a finding about a network.
The other effects are the network's own, and the observer's number, if it can have one, is printed
for comparison. Claims about layers have no such observer, and each names its control.
"""

from minicos.analysis.counts import SLOPE
from minicos.analysis.verdicts import Claim, Need

BAYES = "an ideal observer run as the model, from the same noise"
SEVERAL = "answers alive in the estimate, mean over steps minus the last"
LEAN = "answer shown most at step 0 is the run's own end minus another seed's end"
TASTE = "answer shown most at step 0 is another seed's end minus chance"
FRAMES = "step at which it settles: last minus second latent frame"
COMMITTED = "commitment: step 2 minus step 0"
CORRECTED = "foil to valid minus valid to foil, step 3 to the end"
PLANTED = "repaired minus switched, planted at step 4"
HOW = "step at which it settles: how minus where"
NOISE = "D of the video: step noise minus frame noise"
BACK = "consistency lost: later frames without earlier ones minus the reverse"
ENERGY = "AUROC within frames, centred energy, step 5, late third of layers"
TURNED = "rate of A's answer at layer 6"
VOTE = "puzzles solved: vote among 3 plain runs, minus plain"
EARLY = "puzzles solved: early selection among 3 seeds, minus plain"
DONOR = "own donor minus another picture's A"


def own(name: str) -> str:
    """The network's value of an effect that was measured for each model."""
    return f"{name}: network"


def bayes(name: str) -> str:
    """The ideal observer's value."""
    return f"{name}: ideal observer"


def minus(name: str) -> str:
    """The network's value minus the ideal observer's."""
    return f"{name}: network minus ideal observer"


def room(number: str, low: float = 0.05, high: float = 0.95) -> tuple[Need, ...]:
    """A rate that must leave room for a change."""
    return (Need(number, low, high, f'no room for a change in "{number}"'),)


PLAIN = room("puzzles solved: plain (T = 1)")
MISTAKES = (
    Need(
        "completions that show a foil, step 3: network",
        0.02,
        1.0,
        "hardly a wrong answer to put right: completions that show a foil",
    ),
)

CLAIMS: tuple[Claim, ...] = (
    # -- several candidates, one survives --
    Claim(
        "The estimate holds several answers for longer than Bayes' rule does",
        "Figs 1, 2a-d",
        "belief/mazes",
        minus(SEVERAL),
        least=0.1,
        control=BAYES,
        ideal=bayes(SEVERAL),
        headline=True,
    ),
    Claim(
        "Several answers, of other kinds (turned and mirrored figures): longer than Bayes' rule",
        "Fig. 2e, f",
        "belief/figures",
        minus(SEVERAL),
        least=0.1,
        control=BAYES,
        ideal=bayes(SEVERAL),
    ),
    Claim(
        "In pure noise the estimate leans to where this noise will end",
        "Figs 1, 2",
        "belief/mazes",
        minus(LEAN),
        least=0.05,
        control="another seed's end, and an ideal observer",
        ideal=bayes(LEAN),
        headline=True,
    ),
    Claim(
        "In pure noise the estimate leans to the answer that the picture's other seeds end at",
        "Figs 1, 2",
        "belief/mazes",
        minus(TASTE),
        least=0.05,
        control="chance, and an ideal observer",
        ideal=bayes(TASTE),
    ),
    # -- along the steps, or along the frames --
    Claim(
        "Later frames are decided later (Chain-of-Frames, which the paper denies)",
        "Sec. 3",
        "steps/mazes",
        minus(FRAMES),
        least=0.5,
        control=BAYES,
        ideal=bayes(FRAMES),
        headline=True,
    ),
    Claim(
        "Longer chains of dependent facts gain more from more steps",
        "Secs 3, 6",
        "counts/chains",
        f"{SLOPE}: longer chains minus their twins",
        least=0.02,
        control="families with short chains, one right answer in both",
        headline=True,
        needs=room("puzzles solved: 20 steps", 0.05, 1.0),
    ),
    Claim(
        "Steps do more than choose between right answers",
        "Secs 3, 6",
        "counts/choices",
        minus(SLOPE),
        least=0.02,
        control=BAYES,
        ideal=bayes(SLOPE),
        headline=True,
        needs=room("puzzles solved: 20 steps", 0.05, 1.0),
    ),
    Claim(
        "By step 2 of 10 the answer is committed, more than by Bayes' rule",
        "Sec. 3",
        "commitment/mazes",
        minus(COMMITTED),
        least=0.1,
        control=BAYES,
        ideal=bayes(COMMITTED),
        headline=True,
    ),
    # -- noise --
    Claim(
        "Noise at a step changes the video more than noise in a frame, the paper's doses",
        "Fig. 3b",
        "noise/paper",
        minus(NOISE),
        least=0.1,
        control=BAYES,
        ideal=bayes(NOISE),
        headline=True,
    ),
    Claim(
        "The same at equal doses, on the schedule",
        "Fig. 3b",
        "noise/matched",
        minus(NOISE),
        least=0.1,
        control=f"{BAYES}; equal doses",
        ideal=bayes(NOISE),
    ),
    Claim(
        "Noise at an early step changes the video more than at a late one",
        "Fig. 3c",
        "noise/matched",
        minus("D of the video: noise at step 0 minus step 7"),
        least=0.1,
        control=BAYES,
        ideal=bayes("D of the video: noise at step 0 minus step 7"),
    ),
    # -- behaviours --
    Claim(
        "What is remembered is handed forward in time",
        "Fig. 4a, b",
        "memory/reveal",
        BACK,
        least=0.1,
        control="the same number of keys, cut the other way round",
        headline=True,
        needs=room("consistent: nothing cut", 0.3, 1.0),
    ),
    Claim(
        "The ball under a cup is followed forward in time",
        "Fig. 4a, b",
        "memory/shell",
        BACK,
        least=0.1,
        control="the same number of keys, cut the other way round",
        needs=room("consistent: nothing cut", 0.3, 1.0),
    ),
    Claim(
        "What is remembered depends on frames reading each other",
        "Fig. 4a, b",
        "memory/reveal",
        "consistency lost: neither reads the other minus as many random keys",
        least=0.1,
        control="as many keys, drawn at random",
        needs=room("consistent: nothing cut", 0.3, 1.0),
    ),
    Claim(
        "Wrong answers are put right between step 3 of 10 and the end",
        "Fig. 4c, d",
        "correction/completions",
        minus(CORRECTED),
        least=0.02,
        control="valid answers that become wrong, and an ideal observer",
        ideal=bayes(CORRECTED),
        headline=True,
        needs=MISTAKES,
    ),
    Claim(
        "A planted wrong answer is left more often than a valid one (sigma .88)",
        "Fig. 4c, d",
        "correction/planted",
        own(PLANTED),
        least=0.05,
        control="a valid answer, planted likewise; an ideal observer shows it too",
        ideal=bayes(PLANTED),
        headline=True,
    ),
    Claim(
        "Where it goes is decided before how it gets there",
        "Fig. 5",
        "perception/goals",
        minus(HOW),
        least=0.5,
        control=BAYES,
        ideal=bayes(HOW),
        headline=True,
    ),
    # -- layers --
    Claim(
        "Late layers are busy with the answer, more than the step's own estimate shows it",
        "Fig. 6a",
        "energy/mark",
        f"{ENERGY}: minus the estimate's own",
        least=0.02,
        control="the clean estimate of the same step, within frames",
        headline=True,
    ),
    Claim(
        "Late layers are busy with the answer, more than an untrained network's",
        "Fig. 6a",
        "energy/mark",
        f"{ENERGY}: trained minus untrained",
        least=0.05,
        control="an untrained network",
    ),
    Claim(
        "A swap at the middle layer, at all steps, turns the answer",
        "Fig. 6b",
        "swap/when",
        f"{TURNED}, steps 0-9, A at B's latent: {DONOR}",
        least=0.1,
        control="another picture's states",
        headline=True,
    ),
    Claim(
        "A swap in the first tenth of the steps turns the answer",
        "Fig. 6b",
        "swap/when",
        f"{TURNED}, step 0, A at B's latent: {DONOR}",
        least=0.1,
        control="another picture's states",
        headline=True,
    ),
    # -- ensembles --
    Claim(
        "Seeds that share middle layers at the first step solve more",
        "Table 1",
        "ensemble/mixed",
        "puzzles solved: override 20-29 @0, minus plain",
        least=0.03,
        control="a plain run of the same seed",
        headline=True,
        needs=PLAIN,
    ),
    Claim(
        "Seeds that share them in the first quarter of the steps do",
        "Table 1",
        "ensemble/mixed",
        "puzzles solved: override 20-29 @0-1, minus plain",
        least=0.03,
        control="a plain run of the same seed",
        headline=True,
        needs=PLAIN,
    ),
    Claim(
        "A vote among three runs solves more than one run",
        "Table 1",
        "ensemble/mixed",
        VOTE,
        least=0.03,
        control="a plain run, and an ideal observer",
        ideal=f"{VOTE}: ideal observer",
        headline=True,
        needs=PLAIN,
    ),
    Claim(
        "The best-scored of three seeds after two steps solves more",
        "Table 1",
        "ensemble/mixed",
        EARLY,
        least=0.03,
        control="a plain run, and an ideal observer; the scorer knows the rules",
        ideal=f"{EARLY}: ideal observer",
        headline=True,
        needs=PLAIN,
    ),
    Claim(
        "Sharing what middle layers add, instead of their streams, solves more",
        "App. A",
        "ensemble/mixed",
        "puzzles solved: update 20-29 @0-1, minus plain",
        least=0.03,
        control="a plain run of the same seed",
        needs=PLAIN,
    ),
    Claim(
        "An answer takes the usual number of frames: 13 solve more than 5",
        "App. B",
        "frames/lengths",
        "puzzles solved: 5 frames minus 10 steps",
        least=0.05,
        control="the same mazes and noise seeds at 13 frames",
        flipped=True,
    ),
    # -- variants --
    Claim(
        "A network trained with one answer holds fewer than Bayes' rule (positive control)",
        "Figs 1, 2a-d",
        "variants/one-answer",
        minus(SEVERAL),
        least=0.1,
        control=BAYES,
        ideal=bayes(SEVERAL),
        flipped=True,
    ),
    Claim(
        "Distilled to four steps, the estimate still holds several answers for longer",
        "App. C",
        "variants/distilled",
        minus(SEVERAL),
        least=0.1,
        control=BAYES,
        ideal=bayes(SEVERAL),
    ),
    Claim(
        "Where no frame reads a later one, memory goes along the frames (positive control)",
        "Sec. 4",
        "variants/frame-causal",
        BACK,
        least=0.05,
        control="as many keys, cut in the other direction of time",
        needs=room("consistent: nothing cut"),
    ),
    Claim(
        "Wrong answers are put right, in an earlier checkpoint that makes more of them",
        "Fig. 4c, d",
        "variants/mid-correction",
        minus(CORRECTED),
        least=0.02,
        control="valid answers that become wrong, and an ideal observer",
        ideal=bayes(CORRECTED),
        needs=MISTAKES,
    ),
    Claim(
        "Seeds that share middle layers at the first step solve more, in an earlier checkpoint",
        "Table 1",
        "variants/mid-ensemble",
        "puzzles solved: override 20-29 @0, minus plain",
        least=0.03,
        control="a plain run of the same seed",
        needs=PLAIN,
    ),
)
