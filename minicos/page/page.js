"use strict";
// Draws one run from the JSON in #data. Text from the run enters through textContent alone, never as markup.
// Controls that reverse text, and halves of characters, become a replacement character.
const UNFIT = /[\u202a-\u202e\u2066-\u2069]|\p{Surrogate}/gu;
const data = JSON.parse(document.getElementById("data").textContent,
  (_, value) => typeof value === "string" ? value.replace(UNFIT, "\ufffd") : value);
const at = (id) => document.getElementById(id);
const state = { step: 0, frame: 0, layer: 0, map: -1, clip: null, token: null, pointed: null, playing: null };
const estimates = data.clips.filter((clip) => clip.step !== null); // one for each shown step
const videos = data.clips.filter((clip) => clip.step === null);
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
  if (x === null || x === undefined) return "";
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

function latentFrame(map, frame) { // of the map, which may hold fewer frames than the latent
  const latent = Math.min(map.latents - 1, map.lead + Math.ceil(frame / map.stride));
  return Math.floor(latent * map.grid[0] / map.latents);
}

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
  const canvas = at("overlay"), clip = state.clip;
  if (clip) drawFrame(canvas, clip, state.frame);
  const map = maps[state.map];
  at("overlay-figure").hidden = !map;
  if (!map) return;
  const shown = tokenValues(map, state.step, state.layer), [f, h, w] = map.grid;
  if (!clip) { canvas.width = w * 16; canvas.height = h * 16; }
  const alpha = Number(at("opacity").value) / 100, context = canvas.getContext("2d");
  if (!shown) {
    at("overlay-caption").textContent = "Click a token on this picture to see where it attends; click it again to see which tokens attend to it.";
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
  outline(context, map, state.token, frame, "#3b82f6");
  outline(context, map, state.pointed, frame, "#fff");
  at("low").textContent = number(shown.low);
  at("high").textContent = number(shown.high);
  at("under").textContent = map.unit;
  const token = map.kind === "pairs" ? (state.token.received ? ", attention that this token receives" : ", attention that this token gives") : "";
  let pointed = "";
  if (state.pointed && Math.floor(state.pointed.index / (h * w)) === frame) {
    const i = state.pointed.index % (h * w);
    const value = shown.low + values[i] / 255 * (shown.high - shown.low);
    pointed = `; row ${Math.floor(i / w)}, column ${i % w}: ${number(+value.toPrecision(3))}`;
  }
  at("overlay-caption").textContent = `${map.name}${token}; step ${shown.step}, layer ${shown.layer}, frame ${frame} of ${f} of tokens${pointed}`;
}

function outline(context, map, token, frame, colour) { // around a token of this latent frame
  const [, h, w] = map.grid, canvas = context.canvas, cw = canvas.width / w, ch = canvas.height / h;
  if (!token || Math.floor(token.index / (h * w)) !== frame) return;
  const i = token.index % (h * w);
  context.strokeStyle = colour;
  context.lineWidth = Math.max(1, canvas.width / 100);
  context.strokeRect((i % w) * cw, Math.floor(i / w) * ch, cw, ch);
}

function drawBar() {
  const canvas = at("bar"), context = canvas.getContext("2d");
  for (let i = 0; i < 256; i++) {
    context.fillStyle = `rgb(${colour(i / 255).join()})`;
    context.fillRect(i, 0, 1, 1);
  }
}

function under(event) { // the token under the pointer
  const [, h, w] = maps[state.map].grid, box = at("overlay").getBoundingClientRect();
  const x = Math.max(0, Math.min(w - 1, Math.floor((event.clientX - box.left) / box.width * w)));
  const y = Math.max(0, Math.min(h - 1, Math.floor((event.clientY - box.top) / box.height * h)));
  return (latentFrame(maps[state.map], state.frame) * h + y) * w + x;
}

function clicked(event) { // choose the token under the pointer; again: the other direction
  if (!maps[state.map]) return;
  const index = under(event), [, h, w] = maps[state.map].grid;
  const pairs = maps.findIndex((m) => m.kind === "pairs");
  if (maps[state.map].kind === "pairs" || pairs < 0) choose(index);
  else { // the same place in the map of pairs, which may be coarser
    const place = index % (h * w), [, ph, pw] = maps[pairs].grid;
    state.map = pairs;
    at("map").value = String(pairs);
    const y = Math.floor(Math.floor(place / w) * ph / h), x = Math.floor(place % w * pw / w);
    choose((latentFrame(maps[pairs], state.frame) * ph + y) * pw + x);
  }
  update();
}

function choose(index) {
  const same = state.token && state.token.index === index;
  state.token = { index, received: same ? !state.token.received : false };
  state.pointed = null;
}

// -- curves -------------------------------------------------------------------------------------

const MANY = 4; // curves of a chart, beyond which bands are shown one at a time
const INK = ["#2a62d9", "#c2410c", "#15803d", "#9333ea", "#0e7490", "#be123c", "#a16207", "#475569"];
function svg(tag, attributes, parent) {
  const e = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [key, value] of Object.entries(attributes)) e.setAttribute(key, value);
  if (parent) parent.append(e);
  return e;
}

function chart(curve, parent) {
  const figure = element("figure", undefined, parent), w = 360, h = 200, left = 44, right = 12, top = 10, bottom = 34;
  const all = curve.series.flatMap((s) => [...s.y, ...(s.low || []), ...(s.high || [])]).filter((v) => v !== null);
  all.push(...curve.levels.map(([, y]) => y));
  let low = Math.min(0, ...all, curve.from ?? Infinity), high = Math.max(...all, curve.to ?? -Infinity);
  if (!(high > low)) high = low + 1;
  const xs = [...curve.x, ...curve.marks.map(([, x]) => x)], first = Math.min(...xs), last = Math.max(...xs);
  const [near, far] = curve.falling ? [last, first] : [first, last]; // the ends of the axis, from the left
  const px = (x) => left + (last === first ? 0.5 : (x - near) / (far - near)) * (w - left - right);
  const py = (y) => h - bottom - (y - low) / (high - low) * (h - top - bottom);
  const picture = svg("svg", { viewBox: `0 0 ${w} ${h}`, role: "img" }, figure);
  svg("title", {}, picture).textContent = curve.title;
  for (const value of ticks(low, high)) {
    svg("line", { x1: left, x2: w - right, y1: py(value), y2: py(value), stroke: "var(--line)" }, picture);
    svg("text", { x: left - 4, y: py(value) + 4, "text-anchor": "end" }, picture).textContent = number(value);
  }
  const inside = { step: (m) => m.steps, layer: (m) => m.layers }[curve.follows] || (() => []);
  for (const mark of data.marks) for (const [a, b] of spans(inside(mark).filter((x) => x >= first && x <= last))) {
    const from = px(Math.max(first, a - 0.4)), to = px(Math.min(last, b + 0.4));
    const band = svg("rect", { x: from, width: Math.max(3, to - from), y: top, height: h - bottom - top, fill: "var(--mark)", opacity: 0.2 }, picture);
    svg("title", {}, band).textContent = sentence(mark);
  }
  [...new Set(curve.marks.map(([, x]) => x))].forEach((x, i) => { // names at one place in one line, others in lines of their own
    const names = curve.marks.filter(([, at]) => at === x).map(([name]) => name);
    upright(picture, px(x), top, h - bottom, names.join(", "), w - right, i);
  });
  for (const [name, y] of curve.levels) {
    svg("line", { x1: left, x2: w - right, y1: py(y), y2: py(y), stroke: "var(--soft)", "stroke-dasharray": "1 3" }, picture);
    svg("text", { x: w - right, y: py(y) - 3, "text-anchor": "end" }, picture).textContent = name;
  }
  const drawn = curve.series.map((s, k) => line(picture, curve.x, s, px, py, k));
  const many = drawn.length > MANY && curve.series.some((s) => s.low);
  picture.classList.toggle("many", many); // too many bands to tell apart: one at a time
  const sigma = curve.follows === "step" && data.sigmas.length;
  const middle = curve.x.every(Number.isInteger) ? Math.floor((first + last) / 2) : (first + last) / 2;
  for (const x of new Set([first, middle, last])) {
    const label = sigma && data.sigmas[x] !== undefined ? `${x} (σ ${data.sigmas[x].toFixed(2)})` : number(x);
    const anchor = x === near ? "start" : x === far ? "end" : "middle";
    svg("text", { x: px(x), y: h - bottom + 14, "text-anchor": anchor }, picture).textContent = label;
  }
  svg("text", { x: (left + w - right) / 2, y: h - 5, "text-anchor": "middle" }, picture).textContent = curve.axis;
  const cursor = svg("line", { y1: top, y2: h - bottom, stroke: "var(--accent)", "stroke-dasharray": "3 2" }, picture);
  element("figcaption", curve.unit ? `${curve.title} (${curve.unit})` : curve.title, figure);
  const legend = element("div", undefined, figure);
  legend.className = "legend";
  const readings = curve.series.map((s, k) => {
    const item = element("span", undefined, legend), swatch = element("i", undefined, item);
    swatch.style.borderColor = INK[k % INK.length];
    swatch.style.borderTopStyle = k < INK.length ? "solid" : "dashed";
    item.append(s.name);
    if (many) for (const [event, on] of [["pointerenter", true], ["pointerleave", false]])
      item.addEventListener(event, () => { picture.classList.toggle("chosen", on); drawn[k].classList.toggle("chosen", on); });
    return element("b", undefined, item);
  });
  if (many) element("span", "Point at a name to see its interval.", legend).className = "soft";
  picture.addEventListener("click", (event) => {
    if (!curve.follows) return;
    const box = picture.getBoundingClientRect(), x = (event.clientX - box.left) / box.width * w;
    const value = curve.x[curve.x.map((v) => Math.abs(px(v) - x)).reduce((a, v, i, all) => v < all[a] ? i : a, 0)];
    set(curve.follows, value);
  });
  return () => { // move the cursor to the slider, and read the curves there
    const value = curve.follows ? state[curve.follows] : null;
    cursor.setAttribute("visibility", value === null ? "hidden" : "visible");
    if (value === null) return;
    for (const end of ["x1", "x2"]) cursor.setAttribute(end, px(Math.max(first, Math.min(last, value))));
    const i = curve.x.indexOf(value);
    readings.forEach((place, k) => {
      const y = i < 0 ? null : curve.series[k].y[i];
      place.textContent = y === null ? "" : ` ${number(+y.toPrecision(3))}`;
    });
  };
}

function ticks(low, high) { // about four round numbers between the ends
  const rough = (high - low) / 4, power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 2.5, 5, 10].map((k) => k * power).find((s) => s >= rough), out = [];
  for (let v = Math.ceil(low / step - 1e-9) * step; v <= high + 1e-9 * step; v += step) out.push(+v.toPrecision(12));
  return out;
}

function upright(picture, x, top, bottom, name, right, row) {
  svg("line", { x1: x, x2: x, y1: top, y2: bottom, stroke: "var(--soft)", "stroke-dasharray": "5 3" }, picture);
  const end = x > right / 2;
  svg("text", { x: x + (end ? -4 : 4), y: top + 9 + 12 * row, "text-anchor": end ? "end" : "start" }, picture).textContent = name;
}

function line(picture, xs, s, px, py, k) { // gaps where there is no value; a dot for a lone one
  const ink = INK[k % INK.length], dash = k < INK.length ? "none" : "5 3", group = svg("g", {}, picture);
  const runs = [[]];
  xs.forEach((_, i) => { if (s.gaps.includes(i)) runs.push([]); else if (s.y[i] !== null) runs[runs.length - 1].push(i); });
  for (const run of runs.filter((points) => points.length)) {
    const banded = s.low && s.high ? run.filter((i) => s.low[i] !== null && s.high[i] !== null) : [];
    if (banded.length > 1) {
      const up = banded.map((i) => `${px(xs[i])},${py(s.high[i])}`), down = banded.map((i) => `${px(xs[i])},${py(s.low[i])}`);
      svg("polygon", { points: [...up, ...down.reverse()].join(" "), fill: ink, opacity: 0.15 }, group);
    }
    svg("polyline", { points: run.map((i) => `${px(xs[i])},${py(s.y[i])}`).join(" "), fill: "none", stroke: ink, "stroke-width": 1.8, "stroke-dasharray": dash }, group);
    if (run.length === 1 || xs.length < 12) for (const i of run) svg("circle", { cx: px(xs[i]), cy: py(s.y[i]), r: 2.2, fill: ink }, group);
  }
  return group;
}

// -- the page -----------------------------------------------------------------------------------

let cursors = [], wall = [];

function set(name, value) { // a slider moved, or what moves with it
  state[name] = value;
  if (name === "step" && estimates.length) state.clip = estimates[nearest(estimates.map((c) => c.step), value)];
  update();
}

function beside(file) { // the address of a file beside this page, never of anything else
  return "./" + file.split("/").map(encodeURIComponent).join("/");
}

function table(place, rows, header) {
  if (header) {
    const kept = [...header.keys()].filter((i) => !i || rows.some((row) => number(row[i]) !== "")); // no empty columns
    [header, ...rows] = [header, ...rows].map((row) => kept.map((i) => row[i]));
    const line = element("tr", undefined, place);
    header.forEach((h) => element("th", h, line));
  }
  for (const row of rows) {
    const line = element("tr", undefined, place);
    row.forEach((cell, i) => {
      const spot = element("td", undefined, line);
      if (header) spot.dataset.name = header[i]; // on a narrow screen each cell has its name beside it
      if (cell && typeof cell === "object") {
        if (cell.href) element("a", cell.text, spot).href = beside(cell.href);
        if (cell.image) { const image = element("img", undefined, spot); image.src = cell.image; image.alt = ""; }
      } else {
        spot.textContent = number(cell);
        if (spot.textContent.length < 32) spot.className = "figure";
      }
    });
  }
}

function sentence(mark) {
  const parts = [];
  if (mark.steps.length) parts.push(`step${mark.steps.length > 1 ? "s" : ""} ${ranges(mark.steps)}`);
  if (mark.frames.length) parts.push(`latent frame${mark.frames.length > 1 ? "s" : ""} ${ranges(mark.frames)}`);
  if (mark.layers.length) parts.push(`layer${mark.layers.length > 1 ? "s" : ""} ${ranges(mark.layers)}`);
  return `${mark.label}${parts.length ? " at " : ""}${parts.join(", ")}`;
}

function spans(numbers) { // 0 1 2 5 -> [0, 2], [5, 5]
  const out = [];
  for (const n of numbers) {
    const last = out[out.length - 1];
    if (last && n === last[1] + 1) last[1] = n; else out.push([n, n]);
  }
  return out;
}

function ranges(numbers) { // 0 1 2 5 -> "0-2, 5"
  return spans(numbers).map(([a, b]) => a === b ? `${a}` : `${a}-${b}`).join(", ");
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
  if (state.clip) {
    drawFrame(at("estimate"), state.clip, state.frame);
    const here = state.clip.step === null ? [] : data.marks.filter((m) => m.steps.includes(state.clip.step));
    const marked = here.map((m) => m.label);
    at("estimate-caption").textContent = `${state.clip.label}, frame ${state.frame}` + (marked.length ? ` - ${marked.join(", ")} here` : "");
    at("estimate-caption").classList.toggle("mark", marked.length > 0);
    at("estimate-file").hidden = !state.clip.file;
    at("estimate-file").textContent = state.clip.file;
    at("estimate-file").href = beside(state.clip.file);
    wall.forEach(({ button, canvas, clip }) => {
      drawFrame(canvas, clip, state.frame);
      button.setAttribute("aria-pressed", String(clip === state.clip));
    });
  }
  drawOverlay();
  cursors.forEach((move) => move());
}

function ticksBelow(name, spots, most) { // where interventions act, under a slider; spots: [first, last]
  for (const [a, b] of spots) {
    const tick = element("i", undefined, at(`${name}-track`)), width = Math.max(1, most);
    tick.style.left = `${100 * Math.max(0, a - 0.4) / width}%`;
    tick.style.right = `${100 * (1 - Math.min(width, b + 0.4) / width)}%`;
  }
}

function play(on) {
  if (state.playing) clearInterval(state.playing);
  state.playing = on ? setInterval(() => { state.frame = (state.frame + 1) % Math.max(1, data.frames); update(); }, 1000 / data.fps) : null;
  at("play").textContent = on ? "Pause" : "Play";
  at("play").setAttribute("aria-pressed", String(on));
}

function start() {
  document.title = `minicos: ${data.title}`;
  for (const id of ["title", "summary", "reading", "command", "thinned"]) at(id).textContent = data[id];
  at("prompt").textContent = data.prompt ? `“${data.prompt}”` : "";
  for (const mark of data.marks) { const line = element("p", sentence(mark), at("marks")); line.className = "mark"; }
  if (videos.length === 1) at("videos-title").textContent = "The finished video";
  for (const m of maps) {
    m.values = bytes(m.data);
    delete m.data;
    element("option", m.name, at("map")).value = String(maps.indexOf(m));
  }
  if (maps.length) state.map = 0;
  sliders();
  if (data.picture) {
    const image = new Image();
    image.onload = () => { const c = at("picture"); c.width = image.naturalWidth; c.height = image.naturalHeight; c.getContext("2d").drawImage(image, 0, 0); c.hidden = false; };
    image.src = data.picture;
  }
  estimates.forEach((clip) => hang(clip, "wall"));
  videos.forEach((clip) => hang(clip, "videos"));
  cursors = data.curves.map((curve) => chart(curve, at("curves")));
  tables();
  for (const item of data.next) { element("p", item.why, at("next")); element("pre", item.command, at("next")); }
  for (const picture of data.pictures) figure(picture);
  table(at("settings"), data.settings);
  at("files").textContent = data.files.length ? `Files in this folder: ${data.files.join(", ")}` : "";
  sections();
  listen();
  drawBar();
  update();
}

function sliders() {
  const steps = Math.max(data.sigmas.length - 1, 1), layers = maps.flatMap((m) => m.layers);
  const { stride, lead } = maps.length ? maps[0] : { stride: 4, lead: 0 };
  at("step").max = steps - 1;
  at("frame").max = Math.max(0, data.frames - 1);
  at("layer").max = layers.length ? Math.max(...layers) : 0;
  state.layer = Number(at("layer").max);
  state.frame = Math.max(0, data.frames - 1);
  state.step = steps - 1;
  state.clip = estimates.length ? estimates[nearest(estimates.map((c) => c.step), state.step)] : videos[0] || null;
  for (const mark of data.marks) {
    ticksBelow("step", spans(mark.steps), steps - 1);
    ticksBelow("frame", mark.frames.map((f) => Math.max(0, f - lead)).map((f) => [f ? stride * (f - 1) + 1 : 0, stride * f]), data.frames - 1);
    ticksBelow("layer", spans(mark.layers), Number(at("layer").max));
  }
  at("step-control").hidden = steps < 2 || !(estimates.length || maps.length || data.curves.some((c) => c.follows === "step"));
  at("frame-control").hidden = at("play-control").hidden = data.frames < 2 || !(data.clips.length || maps.length);
  for (const id of ["layer-control", "map-control", "opacity-control"]) at(id).hidden = !maps.length;
  at("controls").hidden = [...at("controls").children].every((part) => part.hidden);
  at("hint").textContent = maps.some((m) => m.kind === "pairs") ? "Click a token on the overlay to see where it attends." : "";
}

function hang(clip, place) { // one video of a wall
  const button = element("button", undefined, at(place)), canvas = element("canvas", undefined, button);
  button.type = "button";
  element("span", clip.label, button);
  button.classList.toggle("marked", clip.step !== null && data.marks.some((m) => m.steps.includes(clip.step)));
  button.addEventListener("click", () => {
    state.clip = clip;
    if (clip.step === null) update(); else set("step", clip.step);
    at("stage").scrollIntoView({ block: "nearest" });
  });
  wall.push({ button, canvas, clip });
  clip.image = new Image();
  clip.image.onload = update;
  clip.image.src = clip.sprite;
}

function tables() {
  for (const [i, one] of data.tables.entries()) {
    const section = element("section", undefined, at("tables"));
    if (one.rows.length > (i ? 10 : 24)) { // long ones are folded, details earlier than findings
      const details = element("details", undefined, section);
      element("summary", `${one.title} (${one.rows.length} rows)`, details);
      const scroll = element("div", undefined, details);
      scroll.className = "scroll rows";
      table(element("table", undefined, scroll), one.rows, one.columns);
      continue;
    }
    element("h2", one.title, section);
    const scroll = element("div", undefined, section);
    scroll.className = "scroll rows";
    table(element("table", undefined, scroll), one.rows, one.columns);
  }
}

function figure(picture) {
  const place = element("figure", undefined, at("figures")), image = element("img", undefined, place);
  image.src = picture.data;
  image.alt = picture.name;
  element("figcaption", picture.name, place);
  image.addEventListener("click", () => place.classList.toggle("large"));
}

function sections() { // hide the empty ones, and list the others
  const filled = {
    stage: ["", data.clips.length || maps.length], "wall-section": ["Steps", estimates.length],
    "videos-section": ["Videos", data.clips.length > 1 && videos.length], "curves-section": ["Curves", data.curves.length],
    tables: ["Numbers", data.tables.length], "next-section": ["What to try next", data.next.length],
    "figures-section": ["Figures", data.pictures.length], "made-section": ["How this was made", 1],
  };
  for (const [id, [name, some]] of Object.entries(filled)) {
    at(id).hidden = !some;
    if (some && name) element("a", name, at("contents")).href = `#${id}`;
  }
  at("estimate-figure").hidden = !data.clips.length;
}

function listen() {
  for (const id of ["step", "frame", "layer"]) at(id).addEventListener("input", () => {
    if (id === "frame") play(false);
    set(id, Number(at(id).value));
  });
  at("opacity").addEventListener("input", update);
  at("map").addEventListener("change", () => { state.map = Number(at("map").value); state.token = state.pointed = null; update(); });
  at("play").addEventListener("click", () => play(!state.playing));
  at("overlay").addEventListener("click", clicked);
  at("overlay").addEventListener("pointermove", (event) => { state.pointed = maps[state.map] ? { index: under(event) } : null; drawOverlay(); });
  at("overlay").addEventListener("pointerleave", () => { state.pointed = null; drawOverlay(); });
}

start();
