"""For every verb that looks at a model: what it shows, how to read it, and what to try next.

Used by the page of a run and by the verb's --help. Does not import torch, so --help is instant.
"""

from dataclasses import dataclass

Next = tuple[str, str]  # why, and the command

ONE = (
    "The clean estimate of a denoising step is what the model takes the finished video to be, "
    "there."
)
SWEEP = (
    "Sensitivity: how far the video moves (D) if a step's latent is replaced by noise, 0: not at "
    "all, 1: as far as another seed's. Convergence: how far the step's clean estimate is from the "
    "last one. Dashed lines: the experts change."
)
EACH = "Every small video is the clean estimate of a step."


@dataclass(frozen=True)
class Reading:
    """What to know before looking at a result."""

    shows: str
    read: str
    next: tuple[Next, ...] = ()
    touch: str = ""  # what to do on a page that has videos or overlays; not in --help


NOISE = (
    "Put noise into one step, and see whether the answer changes",
    "minicos run --puzzle maze --noise step:3 --x0 --out runs/noised",
)
ATTEND = ("Click a token to see where it attends", "minicos attention --puzzle mark --also steps")
SWAP = ("Find the layer at which a prompt becomes an answer", "minicos swap --puzzle mark --n 4")
BELIEF = ("Compare with an ideal observer, on many mazes", "minicos belief --n 25")
COMMIT = ("Find the step at which the answer is decided", "minicos commitment --n 6")
SHARE = ("Let several seeds share their hidden states", "minicos ensemble --no-rivals")
WATCH = ("Watch another kind of puzzle", "minicos steps --puzzle turn --also energy")
KINDS = ("See all kinds of puzzles", "minicos puzzles --list")
MINE = (
    "Watch a picture of your own",
    'minicos steps --image PICTURE.png --prompt "what should happen"',
)
CUT = (
    "Cut attention in one run, and watch it",
    "minicos run --puzzle reveal --knockout frame:0 to frame:1-3 --x0",
)
CUPS = ("Cups whose swaps the model chooses", "minicos recall --puzzle shell --n 10")
RENOISE = ("The same with the noise level kept", "minicos noise --mode renoise --n 10")
BY_HAND = (
    "Swap two puzzles' prompts by hand",
    'minicos run --puzzle mark --swap 6 --other "mark the square" --x0 --energy',
)
SHARED = (
    "One picture, with the videos side by side",
    "minicos run --puzzle maze --ensemble 20-29 --x0",
)

READINGS: dict[str, Reading] = {
    "demo": Reading(
        "A maze with several right answers, solved by the embedded model in front of you.",
        f"{ONE} At first several routes are drawn faintly at once, then one survives.",
        (NOISE, ATTEND, BELIEF, WATCH),
        f"{EACH} Put Step at its left end and drag it to the right. The curves below count the "
        "routes.",
    ),
    "generate": Reading(
        "A video of your prompt, or of a puzzle.",
        "To see how it came about, run `steps` with the same prompt and picture.",
        (WATCH, ATTEND, MINE),
        "Press Play.",
    ),
    "steps": Reading(
        "The clean estimate at every denoising step, from noise to the final video.",
        f"{ONE} Look for several answers drawn at once early and a single one late, and for the "
        "step from which on nothing changes.",
        (ATTEND, NOISE, COMMIT, KINDS),
        f"{EACH} Put Step at its left end and drag it to the right.",
    ),
    "energy": Reading(
        "The size of every token's hidden state after every layer: which tokens have the most "
        "energy.",
        "Bright tokens have more energy than the median token. Early layers respond to the whole "
        "picture, late ones to what the task is about. Centred energy leaves out what all tokens "
        "share, since raw energy is dominated by a few channels that are nearly equal on all of "
        "them.",
        (ATTEND, ("Measure it over many puzzles", "minicos energy --n 25"), SWAP),
        "Drag Layer, and choose another Overlay.",
    ),
    "attention": Reading(
        "Where attention goes: to which tokens, from frame to frame, and to padding.",
        "Attention received is bright for tokens that many others attend to.",
        (("Measure it over many puzzles", "minicos attention --n 25"), SWAP, NOISE),
        "Click a token on the overlay to see where it attends; click it again to see which tokens "
        "attend to it.",
    ),
    "belief": Reading(
        "How many answers are alive at each step, in the network and for an ideal observer.",
        "Where the two curves agree, several answers follow from Bayes' rule and are not a "
        "property of "
        "the network. Look at where they differ.",
        (COMMIT, NOISE, SHARE),
    ),
    "commitment": Reading(
        "When the answer is decided: estimates are noised again and completed several times.",
        "0: the completions are as different as random answers; 1: all are equal. The answer is "
        "decided "
        "where the curve passes 0.9, which is often before the picture is sharp.",
        (BELIEF, NOISE, SWAP),
    ),
    "behaviours": Reading(
        "Perception before action (is it decided where to go before how?), and working memory, "
        "each with its control.",
        "Read the differences: an effect that an ideal observer also shows is not a behaviour of "
        "the network.",
        (BELIEF, COMMIT, SWAP),
    ),
    "recall": Reading(
        "Whether an invented object is the same when it reappears, and which frames must read "
        "which.",
        "Consistent: what is hidden looks the same both times. Attention is cut between its two "
        "appearances. forward: the second does not see the first; backward: the first does not see "
        "the second; both; random: as many keys anywhere; causal: no frame sees a later one. If "
        "it is "
        "handed on in time, only forward and both lose it.",
        (CUT, CUPS, ATTEND),
    ),
    "plant": Reading(
        "Whether a run corrects a wrong answer that was put into it.",
        "Compare with the control, which plants a valid answer: a run that abandons what it holds "
        "for "
        "no reason abandons that as well.",
        (COMMIT, BELIEF, NOISE),
    ),
    "counts": Reading(
        "The share of puzzles solved over step counts and video lengths.",
        "Every setting starts from the same noise; bars are 95 % intervals.",
        (COMMIT, ("Where few steps hurt", "minicos distilled --counts 4,20 --n 4"), SHARE),
    ),
    "noise": Reading(
        "What noise at one step, or in one frame, does to the video.",
        "D is 0 where the video stays the same and 1 where it becomes another seed's. Compare the "
        "videos side by side: noise at a late step, at an early one, in one frame.",
        (NOISE, RENOISE, COMMIT),
    ),
    "frames": Reading(
        "Convergence and sensitivity to noise over video lengths.",
        f"{SWEEP} The embedded model was trained at 13 frames; other lengths are outside its "
        "training, so look at the share solved first.",
        (COMMIT, NOISE, ("Over step counts", "minicos distilled --counts 4,20 --n 4")),
    ),
    "distilled": Reading(
        "Convergence and sensitivity to noise with few steps, or with other weights.",
        f"{SWEEP} The x axis is the noise level sigma, since steps of different schedules do not "
        "correspond.",
        (COMMIT, NOISE, ("Over video lengths", "minicos frames --counts 9,13 --n 4")),
    ),
    "swap": Reading(
        "At which layer a prompt becomes an answer: states of run A are put into run B.",
        "The last layer turns every run into A's by construction. The finding is where the curve "
        "crosses the middle: the state is still the prompt before it, and the answer after it.",
        (BY_HAND, ATTEND, SHARE),
    ),
    "ensemble": Reading(
        "Whether seeds that share middle-layer states solve more.",
        "Each bar is a gain over one plain run, with its 95 % interval. Compare it with the "
        "controls, and with a vote among plain runs at equal cost. In override 20-29 @0, blocks 20 "
        "to 29, of 40, take the mean over seeds at step 0.",
        (SHARED, NOISE, SWAP),
    ),
    "run": Reading(
        "One run with the interventions you chose, and what it did.",
        f"{ONE} Compare with the same command without the intervention.",
        (CUT, SWAP, SHARE),
        f"{EACH} Orange marks show where interventions act: on the sliders, the curves and the "
        "videos.",
    ),
    "reproduce": Reading(
        "Every claim of the paper on the embedded model, with a verdict, then all numbers.",
        "A claim says that an effect is above zero. It is supported if the interval is above zero "
        "and the effect may be large enough to matter (p corrected for all headlines), not "
        "supported "
        "if it is too small to matter, and otherwise undecided. Where an ideal observer is the "
        "control, the effect is what the network shows beyond it. report.md has the caveats "
        "of each section; each study has a page of its own.",
        (BELIEF, SWAP, ("Ten times as many puzzles: hours", "minicos reproduce --full")),
    ),
    "vbvr": Reading(
        "Scores of a model, and of interventions on it, over a benchmark.",
        "Compare conditions by their paired differences; static holds the first frame, and truth is "
        "the right answer. ID: kinds of tasks that the model was trained on; OOD: others. The tables "
        "are also files.",
        (("Score every denoising step", "minicos vbvr --puzzles 4 --every all"), BELIEF, SHARE),
    ),
}
