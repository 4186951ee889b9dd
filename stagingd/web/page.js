"use strict";
// What clients name (stages, engines, tensors) is only ever set as text, never as markup.

const POLL_MS = 1000, DRAWING = 4, LATE_S = 5, SVG = "http://www.w3.org/2000/svg";
const KINDS = { fill: "fill", measure: "measure", seal: "seal", read: "read", swap: "swap", update: "update in place" };
const COLUMNS = [
  { key: "amax", title: "Amax", format: figure },
  { key: "mean", title: "Mean", format: figure },
  { key: "std", title: "Std. deviation", format: figure },
  { key: "clipped", title: "Clipped", format: share },
  { key: "flushed", title: "Flushed to zero", format: share },
  { key: "error", title: "Relative error", format: share },
  { key: "nonfinite", title: "Non-finite", format: String },
];
const FACTOR = 4, MOST_CLIPPED = 0.01, MOST_ERROR = 0.1, LEAST_VERSIONS = 4;

const page = {
  pid: null, stage: null, now: 0, heard: 0, next: null, drawing: 0,
  health: { layers: [], revision: 0, versions: new Map() },
  sort: { key: "notable", down: true }, selected: null,
};
const at = (id) => document.getElementById(id);

// Elements

function element(name, properties = {}, ...children) {
  const made = Object.assign(document.createElement(name), properties);
  made.append(...children);
  return made;
}

function drawn(name, attributes = {}, text = null) {
  const made = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  if (text !== null) made.textContent = text;
  return made;
}

function row(head, ...cells) {
  const first = element("th", { scope: "row" }, head);
  return element("tr", {}, first, ...cells.map((cell) => (cell instanceof Node ? cell : element("td", {}, cell))));
}

// Figures

function duration(seconds) {
  if (seconds === null) return "–";
  if (seconds < 1) return `${Number((seconds * 1e3).toPrecision(3))} ms`;
  if (seconds < 100) return `${seconds.toFixed(1)} s`;
  const minutes = Math.floor(seconds / 60);
  return minutes < 60 ? `${minutes} min ${Math.floor(seconds % 60)} s` : `${Math.floor(minutes / 60)} h ${minutes % 60} min`;
}

function bytes(size) {
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  let unit = 0;
  for (; size >= 1000 && unit < units.length - 1; unit++) size /= 1024;
  return `${Number(size.toPrecision(3))} ${units[unit]}`;
}

function figure(value) {
  return value === 0 || (Math.abs(value) >= 1e-3 && Math.abs(value) < 1e5) ? String(Number(value.toPrecision(3))) : value.toExponential(1);
}

function share(value) {
  return value === 0 ? "0 %" : value < 1e-5 ? `${(value * 100).toExponential(1)} %` : `${Number((value * 100).toPrecision(3))} %`;
}

function ago(seconds) {
  return seconds < 1 ? "now" : `${duration(seconds)} ago`;
}

function ranks(some, count) {
  if (some.length === count) return `all ${count}`;
  const runs = [];
  for (const rank of some) {
    const last = runs.at(-1);
    if (last && last[1] === rank - 1) last[1] = rank;
    else runs.push([rank, rank]);
  }
  const listed = runs.slice(0, 6).map(([a, b]) => (a === b ? `${a}` : `${a}–${b}`)).join(", ");
  return some.length ? `${some.length} of ${count}: ${listed}${runs.length > 6 ? " and more" : ""}` : "–";
}

// Now

function showDaemon(told) {
  if (told.pid !== page.pid) forget(); // another daemon counts its revisions by itself
  page.pid = told.pid;
  at("daemon").textContent = `pid ${told.pid}, up ${duration(told.uptime_s)}, ${told.connections} connections`;
  const names = told.stages.map((stage) => stage.stage), chooser = at("stage");
  if (names.join("\n") !== [...chooser.options].map((option) => option.value).join("\n")) {
    chooser.replaceChildren(...names.map((name) => element("option", { value: name }, name)));
    if (names.includes(page.stage)) chooser.value = page.stage;
  }
  choose(names.length ? chooser.value : null);
  at("nothing").hidden = names.length > 0;
  at("content").hidden = names.length === 0;
}

function choose(stage) {
  if (stage === page.stage) return;
  page.stage = stage;
  page.selected = null;
  forget();
}

function forget() {
  page.health = { layers: [], revision: 0, versions: new Map() };
}

function tile(name, value, note = "") {
  return element("div", {}, element("dt", {}, name), element("dd", {}, value, element("small", {}, note)));
}

function showNow(stage, versions) {
  const sealed = versions.filter((one) => one.sealed_s !== null).at(-1), rates = stage.rates, pause = stage.pauses[0];
  const tiles = [
    tile("Newest version", stage.newest === null ? "none" : String(stage.newest), sealed ? `sealed ${ago(page.now - sealed.sealed_s)}` : ""),
    tile("Versions a minute", rates.versions_a_minute === null ? "–" : figure(rates.versions_a_minute), `${stage.sealed_versions} sealed, ${stage.aborted_versions} aborted`),
    tile("Written by trainers", rates.written_bytes_s === null ? "–" : `${bytes(rates.written_bytes_s)}/s`, `${stage.trainers.length} of ${stage.ranks} ranks attached`),
    tile("Last pause", pause ? duration(pause.seconds) : "–", pause ? `${pause.what} to ${pause.version}, ${pause.engine}, ${ago(page.now - pause.ended_s)}` : "no worker has told of one"),
    ...stage.engines.map((name) => engineTile(stage, name)),
  ];
  at("tiles").replaceChildren(...tiles);
  at("slots").tBodies[0].replaceChildren(...stage.slots.map((slot, number) => slotRow(stage, slot, number)));
  const waits = stage.waiting.map((wait) => element("li", {}, `${wait.who} waits for ${wait.what} from ${wait.peers.join(", ")}, for ${duration(wait.waited_s)}`));
  at("waits").replaceChildren(...(waits.length ? waits : [element("li", { className: "none" }, "Nobody waits.")]));
}

function engineTile(stage, name) {
  const version = stage.engine_versions[name] ?? null, behind = version === null ? 0 : stage.newest - version;
  const lease = stage.leases.find((one) => one.engine === name);
  const note = lease ? `reads ${lease.version}, for ${duration(lease.age_s)}` : behind > 0 ? `${behind} behind` : version === null ? "has read nothing yet" : "newest";
  return tile(`Engine ${name}`, version === null ? "–" : String(version), note);
}

function slotRow(stage, slot, number) {
  const readers = stage.leases.filter((lease) => lease.version === slot.version).map((lease) => `${lease.engine}, ${duration(lease.age_s)}`);
  const of = (some) => (slot.version === null ? "–" : ranks(some, stage.ranks));
  return row(String(number), slot.state, slot.version === null ? "–" : String(slot.version), of(slot.begun_ranks), of(slot.measured_ranks), of(slot.committed_ranks), readers.join("; ") || "–");
}

// Timeline

const LABELS = 190, WIDTH = 1120, TOP = 24, TALL = 22, DENSE = 8, MOST_TALL = 48, LETTERS = 14;

function lanes(versions) {
  // A lane for every rank, trainers first; engines in the order in which they came.
  const found = new Map();
  for (const version of versions) for (const [what, who, rank] of version.spans) found.set(`${who}\n${rank}`, { who, rank, what });
  const order = { trainer: 0, daemon: 1 };
  return [...found.values()].sort((a, b) => (order[a.who] ?? 2) - (order[b.who] ?? 2) || (a.who < b.who ? -1 : a.who > b.who ? 1 : a.rank - b.rank));
}

function extent(versions) {
  const times = versions.flatMap((one) => [one.begun_s, one.sealed_s ?? one.aborted_s ?? page.now, ...one.spans.flatMap((span) => [span[3], span[4] ?? page.now])]);
  const first = Math.min(...times), last = Math.max(...times);
  return [first, Math.max(last, first + 1e-3)];
}

function showTimeline(versions) {
  const picture = at("timeline"), rows = lanes(versions);
  if (!versions.length) return picture.replaceChildren();
  const [first, last] = extent(versions), x = (time) => LABELS + ((time - first) / (last - first)) * WIDTH;
  const dense = rows.length > MOST_TALL; // of hundreds of ranks, every eighth is named, where there is room
  const place = new Map(), all = [];
  let bottom = TOP, named = -Infinity;
  rows.forEach((lane, number) => {
    const y = bottom, name = lane.who === "daemon" ? "daemon" : `${lane.who} ${lane.rank}`, size = dense && name !== "daemon" ? DENSE : TALL;
    place.set(`${lane.who}\n${lane.rank}`, { y, size });
    bottom += size;
    if (number % 2) all.push(drawn("rect", { class: "band", x: 0, y, width: LABELS + WIDTH, height: size }));
    const middle = y + size / 2;
    if (middle - named < LETTERS || (dense && lane.rank % 8)) return;
    named = middle;
    all.push(drawn("text", { x: 4, y: middle + 4, class: "lane" }, name.length > 26 ? `…${name.slice(-25)}` : name));
  });
  for (const [time, text] of ticks(first, last)) {
    all.push(drawn("line", { class: "grid", x1: x(time), x2: x(time), y1: TOP, y2: bottom }));
    all.push(drawn("text", { x: x(time), y: bottom + 15, "text-anchor": "middle" }, text));
  }
  let written = -Infinity;
  for (const version of versions) {
    const aborted = version.aborted_s !== null, label = `${version.version}${aborted ? " aborted" : ""}`, from = x(version.begun_s);
    if (from > written) {
      all.push(drawn("text", { x: from, y: 15, class: aborted ? "aborted" : "version" }, label));
      written = from + 8 * label.length + 6;
    }
    all.push(drawn("line", { class: "grid", x1: from, x2: from, y1: 4, y2: bottom }));
    for (const span of version.spans) all.push(bar(version, span, x, place));
  }
  picture.setAttribute("viewBox", `0 0 ${LABELS + WIDTH + 20} ${bottom + 22}`);
  picture.setAttribute("width", "100%");
  picture.replaceChildren(...all);
}

const INSET = { fill: [0.14, 0.72], measure: [0.5, 0.28], seal: [0.14, 0.72], read: [0.14, 0.72], swap: [0.05, 0.9], update: [0.05, 0.9] };

function bar(version, [what, who, rank, begin, end, size], x, place) {
  const until = end ?? page.now, [inset, height] = INSET[what], { y, size: row } = place.get(`${who}\n${rank}`), wrong = version.aborted_s !== null && what !== "read";
  const made = drawn("rect", {
    class: wrong ? "aborted-bar" : end === null ? `${what} going` : what,
    x: x(begin), y: y + inset * row, width: Math.max(2, x(until) - x(begin)), height: height * row, rx: row > DENSE ? 2 : 0,
  });
  const told = size ? `, ${bytes(size)}` : "", going = end === null ? ", under way" : "";
  made.append(drawn("title", {}, `${version.version}: ${KINDS[what]} by ${who} ${rank}, ${duration(until - begin)}${told}${going}`));
  return made;
}

function ticks(first, last) {
  const span = last - first, rough = span / 8, power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((factor) => factor * power).find((one) => one >= rough), found = [];
  for (let before = Math.ceil((page.now - last) / step) * step; before <= page.now - first; before += step) {
    found.push([page.now - before, before === 0 ? "now" : `−${duration(before)}`]);
  }
  return found;
}

function showLegend() {
  at("legend").replaceChildren(...Object.entries(KINDS).filter(([kind]) => kind !== "update").map(([kind, name]) => {
    const mark = drawn("svg", { viewBox: "0 0 12 12", "aria-hidden": "true" });
    mark.append(drawn("rect", { class: kind, width: 12, height: 12, rx: 2 }));
    return element("li", {}, mark, kind === "swap" ? "swap or update: the engine stands still" : name);
  }));
}

function slowest(version, ...kinds) {
  const found = version.spans.filter((span) => kinds.includes(span[0])).map((span) => (span[4] ?? page.now) - span[3]);
  return found.length ? Math.max(...found) : null;
}

function showVersions(versions) {
  const rows = [...versions].reverse().map((one) => {
    const outcome = one.aborted_s !== null ? element("td", { className: "bad-text" }, `aborted: ${one.reason}`) : one.sealed_s !== null ? "sealed" : "being filled";
    return row(String(one.version), ago(page.now - one.begun_s), ...["fill", "measure", "seal", "read"].map((kind) => duration(slowest(one, kind))), duration(slowest(one, "swap", "update")), outcome);
  });
  at("versions").tBodies[0].replaceChildren(...rows);
}

// Health

function courses() {
  // Per layer and column the values of all versions, oldest first; null where one is not known.
  const versions = [...page.health.versions.values()].sort((a, b) => a.version - b.version);
  return page.health.layers.map((layer, number) => {
    const of = Object.fromEntries(COLUMNS.map(({ key }) => [key, versions.map((one) => one[key]?.[number] ?? null)]));
    return { layer, number, of, marks: marks(of) };
  });
}

function latest(values) {
  return values.findLast((value) => value !== null) ?? null;
}

function median(values) {
  const sorted = values.filter((value) => value !== null).sort((a, b) => a - b);
  return sorted.length < LEAST_VERSIONS - 1 ? null : sorted[Math.floor(sorted.length / 2)];
}

function marks(of) {
  const found = {};
  if (latest(of.nonfinite) > 0) found.nonfinite = "bad";
  if (latest(of.clipped) > MOST_CLIPPED) found.clipped = "notable";
  if (latest(of.error) > MOST_ERROR) found.error = "notable";
  for (const key of ["amax", "std"]) {
    const usual = median(of[key].slice(0, -1)), now = of[key].at(-1) ?? null;
    if (usual !== null && now !== null && (now > FACTOR * usual || now * FACTOR < usual)) found[key] = "notable";
  }
  return found;
}

function path(values, width, height, least = 0) {
  // Of what varies by less than a part of its size nothing is made: a course is not its noise.
  const known = values.filter((value) => value !== null), middle = (Math.min(...known) + Math.max(...known)) / 2;
  const half = Math.max(Math.max(...known) - middle, (least * Math.abs(middle)) / 2), low = middle - half, high = middle + half;
  const x = (number) => (values.length < 2 ? width / 2 : 2 + (number / (values.length - 1)) * (width - 4));
  const y = (value) => (high === low ? height / 2 : height - 2 - ((value - low) / (high - low)) * (height - 4));
  let line = "", open = false;
  values.forEach((value, number) => {
    if (value !== null) line += `${open ? "L" : "M"}${x(number).toFixed(1)} ${y(value).toFixed(1)}`;
    open = value !== null;
  });
  const last = values.findLastIndex((value) => value !== null);
  return { line, dot: [x(last), y(values[last])], low, high };
}

function spark(values) {
  const picture = drawn("svg", { viewBox: "0 0 72 20", "aria-hidden": "true" });
  if (values.filter((value) => value !== null).length > 1) {
    const { line, dot } = path(values, 72, 20, 0.25);
    picture.append(drawn("path", { class: "course", d: line }), drawn("circle", { class: "dot", cx: dot[0], cy: dot[1], r: 1.8 }));
  }
  return picture;
}

function cell(layer, { key, format }) {
  const value = latest(layer.of[key]), mark = layer.marks[key];
  if (value === null) return element("td", { className: "unknown" }, "not reported");
  const text = mark ? `▲ ${format(value)}` : format(value);
  return element("td", { className: mark ?? "" }, text, key === "nonfinite" ? "" : spark(layer.of[key]));
}

function layerRow(layer) {
  const open = element("button", { type: "button", onclick: () => select(layer.layer) }, layer.layer);
  return row(open, ...COLUMNS.map((column) => cell(layer, column)));
}

function sorted(layers) {
  const { key, down } = page.sort, marked = (layer) => Object.values(layer.marks).map((mark) => (mark === "bad" ? 100 : 1)).reduce((a, b) => a + b, 0);
  const by = { layer: (layer) => layer.number, notable: marked }[key] ?? ((layer) => latest(layer.of[key]) ?? -Infinity);
  const sign = key === "layer" ? (down ? 1 : -1) : down ? -1 : 1;
  return layers.sort((a, b) => sign * (by(a) - by(b)) || a.number - b.number);
}

function showHealth() {
  const wanted = at("filter").value.toLowerCase(), only = at("only-notable").checked, all = courses();
  const notable = all.filter((layer) => Object.keys(layer.marks).length);
  const shown = sorted((only ? notable : all).filter((layer) => layer.layer.toLowerCase().includes(wanted)));
  const body = at("layers").tBodies[0], held = body.contains(document.activeElement) ? document.activeElement.textContent : null;
  body.replaceChildren(...shown.map(layerRow));
  if (held !== null) [...body.querySelectorAll("button")].find((button) => button.textContent === held)?.focus();
  for (const head of at("layers").tHead.rows[0].cells) markSorted(head);
  at("notable-first").setAttribute("aria-pressed", String(page.sort.key === "notable"));
  const text = `${shown.length} of ${all.length} layers; ${notable.length} notable`;
  if (at("shown").textContent !== text) at("shown").textContent = text;
  note();
  const selected = all.find((layer) => layer.layer === page.selected);
  at("detail").hidden = !selected;
  if (selected) showDetail(selected);
}

function note() {
  const versions = [...page.health.versions.values()], newest = Math.max(...versions.map((one) => one.version));
  const told = versions.filter((one) => one.error).map((one) => one.version);
  at("health-note").textContent = !versions.length ? "No version has been sealed yet." :
    `Versions ${Math.min(...versions.map((one) => one.version))} to ${newest}. ▲ marks values that are not finite, amax or deviation ${FACTOR} times off their median, more than ${MOST_CLIPPED * 100} % clipped, and errors above ${MOST_ERROR * 100} %. ` +
    (told.length ? `What quantization costs was reported last for version ${Math.max(...told)}.` : "What quantization costs has not been reported: a worker's stagingd_quantization_error does so.");
}

function heading(key, title) {
  const made = element("th", { scope: "col" }, element("button", { type: "button", onclick: () => sortBy(key) }, title));
  made.dataset.key = key;
  return made;
}

function markSorted(head) {
  const { key, down } = page.sort;
  if (head.dataset.key === key) head.setAttribute("aria-sort", down === (key === "layer") ? "ascending" : "descending");
  else head.removeAttribute("aria-sort");
}

function sortBy(key) {
  page.sort = { key, down: page.sort.key === key ? !page.sort.down : true };
  showHealth();
}

function select(layer) {
  page.selected = layer;
  showHealth();
  at("detail").scrollIntoView({ block: "nearest" });
  at("detail-close").focus();
}

function showDetail(layer) {
  at("detail-title").textContent = layer.layer;
  const known = [...page.health.versions.keys()].sort((a, b) => a - b);
  at("charts").replaceChildren(...COLUMNS.map(({ key, title, format }) => chart(title, format, layer.of[key], known)));
}

function chart(title, format, values, versions) {
  const last = latest(values), name = `${title}: ${last === null ? "not reported" : format(last)}`;
  const picture = drawn("svg", { viewBox: "0 0 300 110", role: "img", "aria-label": `${name}, over versions ${versions[0]} to ${versions.at(-1)}` });
  if (last !== null) {
    const { line, dot, low, high } = path(values, 232, 84), inside = drawn("g", { transform: "translate(64 4)" });
    inside.append(drawn("path", { class: "grid", d: "M0 0V86H232", fill: "none" }), drawn("path", { class: "course", d: line }), drawn("circle", { class: "dot", cx: dot[0], cy: dot[1], r: 2.5 }));
    picture.append(inside, drawn("text", { x: 60, y: 14, "text-anchor": "end" }, format(high)));
    if (low !== high) picture.append(drawn("text", { x: 60, y: 90, "text-anchor": "end" }, format(low)));
    picture.append(drawn("text", { x: 64, y: 106 }, String(versions[0])), drawn("text", { x: 296, y: 106, "text-anchor": "end" }, String(versions.at(-1))));
  }
  return element("figure", {}, element("figcaption", {}, name), picture);
}

// Asking

async function ask(what, parameters = {}) {
  const answer = await fetch(`api/${what}?${new URLSearchParams(parameters)}`, { signal: AbortSignal.timeout(LATE_S * 1000) });
  if (!answer.ok) throw new Error((await answer.text()).trim());
  return answer.json();
}

async function look() {
  const told = await ask("stages");
  page.now = told.now_s;
  showDaemon(told);
  const stage = told.stages.find((one) => one.stage === page.stage);
  if (!stage) return;
  const { versions } = await ask("versions", { stage: page.stage, last: at("last").value });
  const began = performance.now();
  showNow(stage, versions);
  showTimeline(versions);
  showVersions(versions);
  page.drawing = performance.now() - began;
  await lookAtHealth(page.stage);
}

async function lookAtHealth(stage) {
  const known = page.health, told = await ask("health", { stage, since: known.revision });
  if (known !== page.health || (told.revision === known.revision && known.layers.length === told.layers.length)) return;
  if (told.revision < known.revision || (known.layers.length && known.layers.join("\n") !== told.layers.join("\n"))) return forget(); // declared anew
  for (const version of told.versions) known.versions.set(version.version, version);
  for (const version of [...known.versions.keys()]) if (!told.kept.includes(version)) known.versions.delete(version);
  known.layers = told.layers;
  known.revision = told.revision;
  showHealth();
}

function say(text, lost) {
  const place = at("connection");
  if (place.textContent !== text) place.textContent = text;
  place.classList.toggle("lost", lost);
}

async function loop() {
  page.next = null;
  try {
    if (!document.hidden) {
      await look();
      page.heard = performance.now();
      say("Connected", false);
    }
  } catch (error) {
    const since = page.heard ? `, for ${duration(Math.round((performance.now() - page.heard) / 1000))}` : "";
    say(`No answer from the daemon${since}: ${error.message}`, true);
  }
  page.next = setTimeout(loop, Math.max(POLL_MS, DRAWING * page.drawing)); // what takes long to draw must leave time to be read
}

function again() {
  // At once, unless it is being asked anyway.
  if (page.next === null) return;
  clearTimeout(page.next);
  loop();
}

at("stage").addEventListener("change", () => { choose(at("stage").value); again(); });
at("last").addEventListener("change", () => again());
at("filter").addEventListener("input", showHealth);
at("only-notable").addEventListener("change", showHealth);
at("notable-first").addEventListener("click", () => { page.sort = { key: page.sort.key === "notable" ? "layer" : "notable", down: true }; showHealth(); });
at("detail-close").addEventListener("click", () => { page.selected = null; showHealth(); at("filter").focus(); });
at("layers").tHead.rows[0].append(heading("layer", "Layer"), ...COLUMNS.map(({ key, title }) => heading(key, title)));
showLegend();
loop();
