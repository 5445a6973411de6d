"""Benchmarks against other libraries in the same process: `minicos bench`, or `minicos bench NAME`.

Each module has `lines(device, quick)`, which yields each `measure.Line` as soon as it is measured.
`quick` uses tiny sizes and few repeats: it shows that a benchmark runs, with meaningless figures.
Random weights at real sizes are created on the device.
"""

# Module -> what it measures. `load` comes first, since it measures new memory: others leave freed
# memory to the process, which would be used again.
BENCHMARKS = {
    "load": "reading a checkpoint against safetensors' load_file and torch's load_state_dict",
    "kernels": "each Triton kernel against its reference",
    "forward": "a pass of the network against diffusers' with the same weights",
    "layers": "a layer of the text encoder and of A14B at real width, against their peers",
    "vae": "encoding and decoding against diffusers, in float32 and bfloat16",
    "capture": "energy, attention and steps against a run without them, without and with pictures",
    "ensemble": "three seeds that share states at one step against a plain run",
    "sweep": "noise at every step, resumed from the saved run, against full runs",
}
