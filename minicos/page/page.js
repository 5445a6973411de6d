"use strict";
// Draws one run from the JSON in #data. Text from the run enters through textContent alone, never as markup.
const data = JSON.parse(document.getElementById("data").textContent);
const at = (id) => document.getElementById(id);
const state = { step: 0, frame: 0, layer: 0, map: -1, token: null, playing: null };
const clips = data.clips; // one for each shown step
const maps = data.maps;

function bytes(base64) {
  const text = atob(base64);
  const out = new Uint8Array(text.length);
  for (let i = 0; i < text.length; i++) out[i] = text.charCodeAt(i);
  return out;
}

function element(tag, text, parent) {
  const e = document.createElement(tag);
  if (text !== undefined) e.textContent = text;
  if (parent) parent.append(e);
  return e;
}

function number(x) {
  if (x === null || x === undefined) return "-";
  if (typeof x !== "number") return String(x);
  const size = Math.abs(x);
  return size !== 0 && (size < 0.01 || size >= 10000) ? x.toExponential(2) : String(+x.toPrecision(4));
}

// A perceptually even map from black through purple and orange to pale yellow.
const STOPS = [[0, 0, 4], [60, 15, 110], [140, 41, 129], [222, 73, 104], [254, 159, 109], [252, 253, 191]];
function colour(t) {
  const p = Math.max(0, Math.min(1, t)) * (STOPS.length - 1), i = Math.min(STOPS.length - 2, Math.floor(p));
  return STOPS[i].map((c, k) => Math.round(c + (p - i) * (STOPS[i + 1][k] - c)));
}

// -- frames of a clip, cut from its sprite ------------------------------------------------------

function drawFrame(canvas, clip, frame) {
  const image = clip.image;
  if (!image || !image.complete || !image.naturalWidth) return;
  if (canvas.width !== clip.width || canvas.height !== clip.height) {
    canvas.width = clip.width;
    canvas.height = clip.height;
    canvas.classList.toggle("smooth", clip.width > 160);
  }
  const f = Math.min(frame, clip.frames - 1), column = f % clip.columns, row = Math.floor(f / clip.columns);
  canvas.getContext("2d").drawImage(image, column * clip.width, row * clip.height, clip.width, clip.height,
    0, 0, clip.width, clip.height);
}

function nearest(steps, step) { // the shown step closest to `step`, the earlier one of two
  let best = 0;
  steps.forEach((s, i) => { if (Math.abs(s - step) < Math.abs(steps[best] - step)) best = i; });
  return best;
}

// -- the overlay --------------------------------------------------------------------------------

function latentFrame(map, frame) { return Math.min(map.grid[0] - 1, Math.ceil(frame / map.stride)); }

function tokenValues(map, step, layer) { // values of one step and layer, 0..255, with their true ends
  const s = nearest(map.steps, step), l = nearest(map.layers, layer), [f, h, w] = map.grid, n = f * h * w;
  const place = s * map.layers.length + l; // among the maps of all steps and layers
  if (map.kind === "pairs") {
    const token = state.token === null ? null : state.token.index;
    if (token === null || token >= n) return null;
    const values = new Uint8Array(n), base = place * n * n, received = state.token.received;
    for (let i = 0; i < n; i++) values[i] = map.values[base + (received ? i * n + token : token * n + i)];
    return { values, low: 0, high: map.high[place], step: map.steps[s], layer: map.layers[l] };
  }
  return { values: map.values.subarray(place * n, (place + 1) * n), low: map.low[place], high: map.high[place],
    step: map.steps[s], layer: map.layers[l] };
}

function drawOverlay() {
  const canvas = at("overlay"), clip = clips.length ? clips[nearest(clips.map((c) => c.step), state.step)] : null;
  if (clip) drawFrame(canvas, clip, state.frame);
  const map = maps[state.map];
  at("overlay-figure").hidden = !map;
  if (!map) return;
  const shown = tokenValues(map, state.step, state.layer), [f, h, w] = map.grid;
  if (!clip) { canvas.width = w * 16; canvas.height = h * 16; }
  const alpha = Number(at("opacity").value) / 100, context = canvas.getContext("2d");
  if (!shown) {
    at("overlay-caption").textContent = "Click a token on the picture to see where it attends; click it again to see who attends to it.";
    at("low").textContent = at("high").textContent = at("under").textContent = "";
    return;
  }
  const frame = latentFrame(map, state.frame), cw = canvas.width / w, ch = canvas.height / h;
  const values = shown.values.subarray(frame * h * w, (frame + 1) * h * w);
  context.globalAlpha = clip ? alpha : 1;
  for (let i = 0; i < h * w; i++) {
    context.fillStyle = `rgb(${colour(values[i] / 255).join()})`;
    context.fillRect((i % w) * cw, Math.floor(i / w) * ch, cw, ch);
  }
  context.globalAlpha = 1;
  if (state.token && state.token.index >= frame * h * w && state.token.index < (frame + 1) * h * w) {
    const i = state.token.index - frame * h * w;
    context.strokeStyle = "#3b82f6";
    context.lineWidth = Math.max(1, canvas.width / 100);
    context.strokeRect((i % w) * cw, Math.floor(i / w) * ch, cw, ch);
  }
  at("low").textContent = number(shown.low);
  at("high").textContent = number(shown.high);
  at("under").textContent = map.unit;
  const token = map.kind === "pairs" ? (state.token.received ? ", attention that this token receives" : ", attention that this token gives") : "";
  at("overlay-caption").textContent = `${map.name}${token}; step ${shown.step}, layer ${shown.layer}, latent frame ${frame} of ${f}`;
}

function drawBar() {
  const canvas = at("bar"), context = canvas.getContext("2d");
  for (let i = 0; i < 256; i++) {
    context.fillStyle = `rgb(${colour(i / 255).join()})`;
    context.fillRect(i, 0, 1, 1);
  }
}

function clicked(event) { // choose the token under the pointer; again: the other direction
  const map = maps[state.map], canvas = at("overlay"), box = canvas.getBoundingClientRect();
  if (!map) return;
  const [, h, w] = map.grid, frame = latentFrame(map, state.frame);
  const x = Math.min(w - 1, Math.floor((event.clientX - box.left) / box.width * w));
  const y = Math.min(h - 1, Math.floor((event.clientY - box.top) / box.height * h));
  const index = (frame * h + y) * w + x, same = state.token && state.token.index === index;
  state.token = { index, received: same ? !state.token.received : false };
  if (map.kind !== "pairs") {
    const pairs = maps.findIndex((m) => m.kind === "pairs");
    if (pairs >= 0) { state.map = pairs; at("map").value = String(pairs); }
  }
  update();
}

// -- curves -------------------------------------------------------------------------------------

const INK = ["#2a62d9", "#c2410c", "#15803d", "#9333ea", "#0e7490", "#be123c", "#a16207", "#475569"];
function svg(tag, attributes, parent) {
  const e = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [key, value] of Object.entries(attributes)) e.setAttribute(key, value);
  if (parent) parent.append(e);
  return e;
}

function chart(curve, parent) {
  const figure = element("figure", undefined, parent), w = 360, h = 190, left = 44, right = 10, top = 10, bottom = 30;
  const all = curve.series.flatMap((s) => [...s.y, ...(s.low || []), ...(s.high || [])]).filter((v) => v !== null);
  let low = Math.min(...all, curve.from ?? Infinity), high = Math.max(...all, curve.to ?? -Infinity);
  if (!(high > low)) { low -= 0.5; high += 0.5; }
  const first = curve.x[0], last = curve.x[curve.x.length - 1];
  const px = (x) => left + (last === first ? 0.5 : (x - first) / (last - first)) * (w - left - right);
  const py = (y) => h - bottom - (y - low) / (high - low) * (h - top - bottom);
  const picture = svg("svg", { viewBox: `0 0 ${w} ${h}`, role: "img" }, figure);
  svg("title", {}, picture).textContent = curve.title;
  for (const [value, y] of [[low, py(low)], [high, py(high)]]) {
    svg("line", { x1: left, x2: w - right, y1: y, y2: y, stroke: "var(--line)" }, picture);
    svg("text", { x: left - 4, y: y + 4, "text-anchor": "end" }, picture).textContent = number(value);
  }
  for (const mark of data.marks) for (const step of curve.axis === "step" ? mark.steps : []) {
    svg("line", { x1: px(step), x2: px(step), y1: top, y2: h - bottom, stroke: "var(--mark)", "stroke-width": 4, opacity: 0.35 }, picture);
  }
  curve.series.forEach((s, k) => {
    const ink = INK[k % INK.length];
    if (s.low && s.high) {
      const up = curve.x.map((x, i) => `${px(x)},${py(s.high[i])}`), down = curve.x.map((x, i) => `${px(x)},${py(s.low[i])}`);
      svg("polygon", { points: [...up, ...down.reverse()].join(" "), fill: ink, opacity: 0.15 }, picture);
    }
    const points = curve.x.flatMap((x, i) => s.y[i] === null ? [] : [`${px(x)},${py(s.y[i])}`]);
    svg("polyline", { points: points.join(" "), fill: "none", stroke: ink, "stroke-width": 1.8 }, picture);
  });
  const sigma = curve.axis === "step" && data.sigmas.length;
  for (const x of [first, last]) {
    const label = sigma ? `${x} (σ ${data.sigmas[x].toFixed(2)})` : number(x);
    svg("text", { x: px(x), y: h - 14, "text-anchor": x === first ? "start" : "end" }, picture).textContent = label;
  }
  svg("text", { x: (left + w - right) / 2, y: h - 3, "text-anchor": "middle" }, picture).textContent = curve.axis;
  const cursor = svg("line", { y1: top, y2: h - bottom, stroke: "var(--accent)", "stroke-dasharray": "3 2" }, picture);
  element("figcaption", curve.title, figure);
  const legend = element("div", undefined, figure);
  legend.className = "legend";
  curve.series.forEach((s, k) => {
    const item = element("span", undefined, legend);
    element("i", undefined, item).style.background = INK[k % INK.length];
    item.append(s.name);
  });
  picture.addEventListener("click", (event) => {
    if (curve.axis !== "step" && curve.axis !== "layer") return;
    const box = picture.getBoundingClientRect(), x = (event.clientX - box.left) / box.width * w;
    const value = curve.x[curve.x.map((v) => Math.abs(px(v) - x)).reduce((a, v, i, all) => v < all[a] ? i : a, 0)];
    state[curve.axis] = value;
    update();
  });
  return () => {
    const value = curve.axis === "step" ? state.step : curve.axis === "layer" ? state.layer : null;
    cursor.setAttribute("visibility", value === null ? "hidden" : "visible");
    if (value !== null) for (const end of ["x1", "x2"]) cursor.setAttribute(end, px(Math.max(first, Math.min(last, value))));
  };
}

// -- the page -----------------------------------------------------------------------------------

let cursors = [], wall = [];

function table(id, rows, header) {
  at(id).parentElement.parentElement.hidden = false;
  if (header) { const line = element("tr", undefined, at(id)); header.forEach((h) => element("th", h, line)); }
  for (const row of rows) {
    const line = element("tr", undefined, at(id));
    row.forEach((cell) => {
      const place = element("td", undefined, line);
      if (cell && typeof cell === "object") {
        if (cell.href) { const a = element("a", cell.text, place); a.href = cell.href; }
      } else place.textContent = number(cell);
    });
  }
}

function sentence(mark) {
  const parts = [];
  if (mark.steps.length) parts.push(`step${mark.steps.length > 1 ? "s" : ""} ${ranges(mark.steps)}`);
  if (mark.frames.length) parts.push(`latent frame${mark.frames.length > 1 ? "s" : ""} ${ranges(mark.frames)}`);
  if (mark.layers.length) parts.push(`layer${mark.layers.length > 1 ? "s" : ""} ${ranges(mark.layers)}`);
  return `${mark.label}${parts.length ? ": " : ""}${parts.join(", ")}`;
}

function ranges(numbers) { // 0 1 2 5 -> "0-2, 5"
  const out = [];
  for (const n of numbers) {
    const last = out[out.length - 1];
    if (last && n === last[1] + 1) last[1] = n; else out.push([n, n]);
  }
  return out.map(([a, b]) => a === b ? `${a}` : `${a}-${b}`).join(", ");
}

function update() {
  at("step").value = state.step;
  at("frame").value = state.frame;
  at("layer").value = state.layer;
  const sigma = data.sigmas[state.step];
  at("step-value").textContent = `${state.step}${sigma === undefined ? "" : `  (σ ${sigma.toFixed(3)})`}`;
  at("frame-value").textContent = `${state.frame} of 0-${data.frames - 1}`;
  at("layer-value").textContent = String(state.layer);
  at("opacity-value").textContent = `${at("opacity").value} %`;
  if (clips.length) {
    const i = nearest(clips.map((c) => c.step), state.step), clip = clips[i];
    drawFrame(at("estimate"), clip, state.frame);
    const marked = data.marks.filter((m) => m.steps.includes(clip.step)).map((m) => m.label);
    at("estimate-caption").textContent = `${clip.label}, frame ${state.frame}` + (marked.length ? ` - ${marked.join(", ")} here` : "");
    at("estimate-caption").classList.toggle("mark", marked.length > 0);
    wall.forEach(({ button, canvas, clip: one }, k) => {
      drawFrame(canvas, one, state.frame);
      button.setAttribute("aria-pressed", String(k === i));
    });
  }
  drawOverlay();
  cursors.forEach((move) => move());
}

function play(on) {
  if (state.playing) clearInterval(state.playing);
  state.playing = on ? setInterval(() => { state.frame = (state.frame + 1) % Math.max(1, data.frames); update(); }, 1000 / data.fps) : null;
  at("play").textContent = on ? "Pause" : "Play";
  at("play").setAttribute("aria-pressed", String(on));
}

function start() {
  document.title = `minicos: ${data.title}`;
  at("title").textContent = data.title;
  at("prompt").textContent = data.prompt ? `“${data.prompt}”` : "";
  at("summary").textContent = data.summary;
  for (const mark of data.marks) { const line = element("p", sentence(mark), at("marks")); line.className = "mark"; }
  at("command").textContent = data.command;
  for (const m of maps) { m.values = bytes(m.data); delete m.data; }
  for (const m of maps) {
    const option = element("option", m.name, at("map"));
    option.value = String(maps.indexOf(m));
  }
  if (maps.length) state.map = 0;
  const steps = Math.max(data.sigmas.length ? data.sigmas.length - 1 : 0, 1);
  at("step").max = steps - 1;
  at("frame").max = Math.max(0, data.frames - 1);
  const layers = maps.flatMap((m) => m.layers);
  at("layer").max = layers.length ? Math.max(...layers) : 0;
  state.layer = layers.length ? Math.max(...layers) : 0;
  state.frame = Math.max(0, data.frames - 1);
  state.step = steps - 1;
  at("step-control").hidden = steps < 2;
  at("frame-control").hidden = at("play").hidden = data.frames < 2;
  for (const id of ["layer-control", "map-control", "opacity-control"]) at(id).hidden = !maps.length;
  at("estimate-figure").hidden = at("wall-section").hidden = !clips.length;
  at("hint").textContent = maps.some((m) => m.kind === "pairs") ? "Click a token on the overlay." : "";
  if (data.picture) {
    const image = new Image();
    image.onload = () => { const c = at("picture"); c.width = image.naturalWidth; c.height = image.naturalHeight; c.getContext("2d").drawImage(image, 0, 0); c.hidden = false; };
    image.src = data.picture;
  }
  for (const clip of clips) {
    const button = element("button", undefined, at("wall")), canvas = element("canvas", undefined, button);
    button.type = "button";
    element("span", clip.label, button);
    button.classList.toggle("marked", data.marks.some((m) => m.steps.includes(clip.step)));
    button.addEventListener("click", () => { state.step = Math.max(0, clip.step); update(); });
    wall.push({ button, canvas, clip });
    clip.image = new Image();
    clip.image.onload = update;
    clip.image.src = clip.sprite;
  }
  cursors = data.curves.map((curve) => chart(curve, at("curves")));
  at("curves-section").hidden = !data.curves.length;
  for (const id of ["numbers-section", "rows-section", "next-section"]) at(id).hidden = true;
  if (data.numbers.length) table("numbers", data.numbers, ["", "value", "95 %", "n", ""]);
  if (data.rows.length) table("rows", data.rows, data.columns);
  table("settings", data.settings);
  for (const item of data.next) { at("next-section").hidden = false; element("p", item.why, at("next")); element("pre", item.command, at("next")); }
  at("files").textContent = data.files.length ? `Files beside this page: ${data.files.join(", ")}` : "";
  at("thinned").textContent = data.thinned;
  for (const id of ["step", "frame", "layer"]) at(id).addEventListener("input", () => { state[id] = Number(at(id).value); if (id === "frame") play(false); update(); });
  at("opacity").addEventListener("input", update);
  at("map").addEventListener("change", () => { state.map = Number(at("map").value); update(); });
  at("play").addEventListener("click", () => play(!state.playing));
  at("overlay").addEventListener("click", clicked);
  drawBar();
  update();
}

start();
