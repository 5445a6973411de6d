"""Benchmarks, measured beside their peers in one run: `minicos bench`, or `minicos bench NAME`.

Each module has `lines(device, quick)`, which yields a `measure.Line` as soon as it is measured.
`quick` takes tiny sizes and few repeats: it shows that a benchmark runs, and its figures mean
nothing. Random weights at real sizes are built on the device.
"""

BENCHMARKS = {  # module -> what it measures
    "kernels": "each Triton kernel beside its reference",
    "forward": "a pass of the network beside diffusers' with the same weights",
    "layers": "a layer of the text encoder and of A14B at real width, beside their peers",
    "vae": "encoding and decoding beside diffusers, in float32 and bfloat16",
    "load": "reading a checkpoint beside safetensors' load_file and torch's load_state_dict",
    "capture": "energy, attention and steps as the verbs watch, beside an unwatched run",
    "ensemble": "three seeds that share states at one step beside a plain run",
    "sweep": "noise at every step, resumed from the saved run, beside full runs",
}
