"""What does each word look at? The share of cross-attention that tokens give to its rows."""

from itertools import islice
from pathlib import Path

import torch

import minicos
from minicos.analysis.tools import cases, figures
from minicos.words import words

wan, batch = minicos.load("tiny"), cases.held_out("mark", 1)
condition, layers = cases.condition(wan, batch), range(0, wan.depth, 2)
maps = minicos.Record(lambda p: p[0].mean(0), "l t")  # the mean over heads
hooks = minicos.Hooks().on("blocks.*.cross_attn.pattern", maps, layers=layers, step=10)
steps = wan.sample(condition, noise=cases.noise(wan, condition, batch), hooks=hooks)
*_, step = islice(steps, 11)
p = maps.stack().at(step=10, branch="cond")  # layer l t
grid, each = wan.grid(condition.shape), words(wan.tokenizer, batch[0].prompt)
values = torch.stack([p[:, :, list(word.rows)].sum(2).view(-1, *grid)[:, -1] for word in each])
rows, columns = [word.text for word in each], [f"layer {k}" for k in layers]
path, title = Path("word_maps.png"), "Attention to each word, last latent frame, over x0"
under, bar = [wan.decode(step.x0)[0][-1]] * len(each), "share of cross-attention"
print(
    figures.maps(
        path, values.numpy(), rows=rows, columns=columns, title=title, bar=bar, beneath=under
    )
)
