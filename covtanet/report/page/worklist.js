"use strict";
// The worklist. Served by the endpoint it asks for rows and pictures; in a report both stand in the page itself.
const at = (id) => document.getElementById(id);
const make = (tag, props = {}, ...children) => {
  const node = Object.assign(document.createElement(tag), props);
  node.append(...children);
  return node;
};
const WINDOWS = [["lung", -1350, 150], ["wide", -1000, 400], ["soft tissue", -160, 240]];
// Pictures of software before the window stood in them are of models with this one.
const FIRST_WINDOW = [-1000, 400];
const MARKS = { 1: [79, 195, 247], 2: [255, 112, 67] };
const PAGE_ROWS = 200;
const state = { offset: 0, rows: [], total: 0, chosen: -1, viewer: null, window: 0, opacity: 0.45, batch: "" };

class Report {
  constructor(data) { this.data = data; }
  async runs() { return null; }
  async page(query) {
    const text = query.text.toLowerCase();
    const rows = this.data.rows.filter((row) =>
      (!query.status || row.status === query.status) &&
      (!query.grade || (query.grade === "normal" ? row.diagnosis : row.severity) === query.grade) &&
      (!text || JSON.stringify([row.series_key, row.reason, row.reason_detail, row.study_uid, row.series_uid,
        row.source_uri]).toLowerCase().includes(text)));
    const rank = { worst: (r) => -(r.involvement ?? -1), uncertain: (r) => Math.abs((r.p_infected ?? 9) - 0.5),
      refused: (r) => (r.status === "screened" ? 1 : 0) }[query.sort];
    rows.sort((a, b) => (a.status !== "screened") - (b.status !== "screened") || rank(a) - rank(b));
    if (query.sort === "refused") rows.sort((a, b) => rank(a) - rank(b));
    return { summary: this.data.summary, total: rows.length, offset: 0, rows };
  }
  async picture(row) { return { preview: this.data.pictures[row.series_key] }; }
}

class Endpoint {
  constructor(token) { this.token = token; }
  async get(path, kind = "json") {
    const answer = await fetch(path, { headers: { Authorization: `Bearer ${this.token}`, Accept: "application/json" } });
    if (!answer.ok) {
      const problem = await answer.json().catch(() => ({ message: "no answer" }));
      throw Object.assign(new Error(problem.message), { status: answer.status });
    }
    return kind === "json" ? answer.json() : answer.blob();
  }
  async runs() { return (await this.get("v1/batches")).filter((each) => each.state === "committed"); }
  page(query) { return this.get(`v1/batches/${state.batch}/worklist?${new URLSearchParams(query)}`); }
  async picture(row) {
    const blob = await this.get(`v1/batches/${state.batch}/series/${row.series_key}/viewer.png`, "blob");
    return { viewer: URL.createObjectURL(blob) };
  }
}

let source;

function say(text) { at("message").textContent = text; }
const percent = (value) => (value === null || value === undefined ? "–" : `${(100 * value).toFixed(1)} %`);
const number = (value, digits = 2) => (value === null || value === undefined ? "–" : Number(value).toFixed(digits));
const finding = (row) => (row.status !== "screened" ? `${row.status}: ${row.reason}`
  : row.diagnosis === "normal" ? "normal" : row.severity ? `infected, ${row.severity}`
  : row.diagnosis ?? (row.severity_by_involvement ? `${row.severity_by_involvement} by involvement` : "–"));
const grade = (row) => (row.status !== "screened" ? row.status : row.diagnosis === "normal" ? "normal"
  : row.severity ?? row.severity_by_involvement ?? "");

function bars(title, counts) {
  const most = Math.max(1, ...Object.values(counts));
  const grid = make("div", { className: "bars", tabIndex: 0 });
  for (const [name, count] of Object.entries(counts)) {
    const bar = make("span", { className: "bar" });
    bar.style.width = `${(100 * count) / most}%`;
    grid.append(make("span", { textContent: name }), bar, make("span", { textContent: count }));
  }
  return make("div", {}, make("h2", { textContent: title }), grid);
}

function glance(summary) {
  const { edges, counts } = summary.involvement;
  const spread = Object.fromEntries(counts.map((count, k) => [`${100 * edges[k]}–${100 * edges[k + 1]} %`, count]));
  const rate = summary.studies_per_minute === null ? "" : `, ${number(summary.studies_per_minute, 0)} studies a minute`;
  const severity = Object.keys(summary.severity).length ? ["Severity", { normal: summary.diagnosis.normal ?? 0, ...summary.severity }]
    : ["Severity by involvement", summary.severity_by_involvement];
  const parts = [
    make("div", {}, make("div", { className: "figure", textContent: `${summary.series} series` }),
      make("div", { className: "quiet", textContent: `${summary.run_date ?? ""}${rate}` }),
      make("div", { className: "quiet", textContent: summary.models.join(", ") })),
    bars("Status", summary.status), bars(...severity), bars("Lung involved", spread),
  ];
  const reasons = Object.entries(summary.reasons).sort((a, b) => b[1] - a[1]);
  if (reasons.length) parts.push(bars("Not screened, by reason", Object.fromEntries(reasons)));
  at("glance").replaceChildren(...parts);
}

function list() {
  at("rows").replaceChildren(...state.rows.map((row, index) => {
    const line = make("tr", { tabIndex: 0, onclick: () => choose(index) },
      make("td", { className: "code", textContent: row.series_key.slice(0, 8) }),
      make("td", { className: grade(row), textContent: finding(row) }),
      make("td", { textContent: percent(row.involvement) }), make("td", { textContent: number(row.p_infected) }),
      make("td", { textContent: number(row.p_severe) }), make("td", { textContent: row.qc_flags.join(", ") }));
    line.setAttribute("aria-selected", index === state.chosen);
    line.onkeydown = (event) => { if (event.key === "Enter") choose(index); };
    return line;
  }));
  const last = state.offset + state.rows.length;
  at("shown").textContent = state.total ? `${state.offset + 1}–${last} of ${state.total}` : "none";
  at("back").disabled = state.offset === 0;
  at("on").disabled = last >= state.total;
}

async function load() {
  const query = { sort: at("sort").value, status: at("status").value, grade: at("grade").value,
    text: at("text").value, offset: state.offset, limit: PAGE_ROWS };
  try {
    const page = await source.page(query);
    Object.assign(state, { rows: page.rows, total: page.total, chosen: -1 });
    glance(page.summary);
    list();
    close();
    at("work").hidden = false;
    say("");
  } catch (error) { failed(error); }
}

function failed(error) {
  if (error.status === 401 || error.status === 403) { sessionStorage.removeItem("token"); at("login").hidden = false; }
  say(error.message);
}

function close() { at("study").hidden = true; state.viewer = null; }

async function choose(index) {
  if (index < 0 || index >= state.rows.length) return;
  const row = state.rows[index];
  state.chosen = index;
  [...at("rows").children].forEach((line, k) => line.setAttribute("aria-selected", k === index));
  at("rows").children[index].scrollIntoView({ block: "nearest" });
  const place = make("div", { textContent: row.status === "screened" ? "loading" : `Not screened: ${row.reason_detail ?? row.reason}` });
  const shown = { series: row.series_key, finding: finding(row), "lung involved": percent(row.involvement),
    "severity by involvement": row.severity_by_involvement ?? "–", "lesion": row.lesion_volume_ml === null ? "–" : `${number(row.lesion_volume_ml, 0)} ml of ${number(row.lung_volume_ml, 0)} ml lung`,
    "p infected": number(row.p_infected, 3), "p severe": number(row.p_severe, 3), flags: row.qc_flags.join(", ") || "none",
    slices: `${row.num_slices ?? "–"}, ${row.num_slices_segmented ?? "–"} segmented, ${number(row.spacing_z_mm, 1)} mm apart`,
    source: row.source_uri, "series UID": row.series_uid ?? "–", model: `${row.model_name} ${row.model_version}, ${row.model_digest.slice(0, 12)}`,
    configuration: row.config_digest.slice(0, 12), software: row.software_version, run: `${row.run_id}, ${row.screened_at}` };
  const numbers = make("dl", { className: "numbers" });
  for (const [name, value] of Object.entries(shown)) numbers.append(make("dt", { textContent: name }), make("dd", { textContent: value }));
  at("study").replaceChildren(place, numbers);
  at("study").hidden = false;
  state.viewer = null;
  if (row.status !== "screened") return;
  try {
    const found = await source.picture(row);
    if (state.chosen !== index) return;
    if (found.viewer) await openViewer(place, found.viewer);
    else if (found.preview) place.replaceChildren(make("img", { src: found.preview, alt: "slices with lung outline and lesions" }));
    else place.textContent = "No pictures were kept of this study.";
  } catch (error) { place.textContent = `No pictures: ${error.message}`; }
}

// The ends of the model's window in HU: two big-endian float32 in the blue of eight pixels behind the first.
function windowOf(all) {
  const { data } = all.getImageData(1, 0, 8, 1);
  const bytes = new DataView(Uint8Array.from({ length: 8 }, (_, k) => data[4 * k + 2]).buffer);
  const ends = [bytes.getFloat32(0), bytes.getFloat32(4)];
  return ends[0] < ends[1] ? ends : FIRST_WINDOW;
}

async function openViewer(place, url) {
  const image = await createImageBitmap(await (await fetch(url)).blob(), { colorSpaceConversion: "none", premultiplyAlpha: "none" });
  URL.revokeObjectURL(url);
  const side = image.width / 10;
  const all = new OffscreenCanvas(image.width, image.height).getContext("2d", { willReadFrequently: true });
  all.drawImage(image, 0, 0);
  const count = all.getImageData(0, 0, 1, 1).data[2];
  const [lowest, highest] = windowOf(all);
  const canvas = make("canvas", { width: side, height: side, tabIndex: 0 });
  canvas.setAttribute("role", "img");
  const which = make("span", { className: "quiet" });
  const slider = make("input", { type: "range", min: 0, max: count - 1, value: count >> 1, title: "slice" });
  slider.setAttribute("aria-label", "slice");
  const opacity = make("input", { type: "range", min: 0, max: 100, value: 100 * state.opacity, title: "overlay" });
  opacity.setAttribute("aria-label", "opacity of the overlay");
  const preset = make("select", {}, ...WINDOWS.map(([name], k) => make("option", { value: k, textContent: name })));
  preset.value = state.window;
  preset.setAttribute("aria-label", "window");
  const viewer = { draw, move: (by) => { slider.value = Number(slider.value) + by; draw(); }, preset, opacity };
  function draw() {
    const index = Number(slider.value);
    const pixels = all.getImageData((index % 10) * side, Math.floor(index / 10) * side, side, side);
    const [, low, high] = WINDOWS[state.window];
    const { data } = pixels;
    for (let k = 0; k < data.length; k += 4) {
      const hu = lowest + ((highest - lowest) * data[k]) / 255;
      const grey = Math.max(0, Math.min(255, (255 * (hu - low)) / (high - low)));
      const colour = MARKS[data[k + 1]];
      const share = colour ? state.opacity * (data[k + 1] === 2 ? 1 : 0.25) : 0;
      for (let c = 0; c < 3; c += 1) data[k + c] = colour ? (1 - share) * grey + share * colour[c] : grey;
      data[k + 3] = 255;
    }
    canvas.getContext("2d").putImageData(pixels, 0, 0);
    which.textContent = `slice ${index + 1} of ${count}`;
    canvas.setAttribute("aria-label", `${which.textContent}, lesions in orange, lung in blue`);
  }
  canvas.onwheel = (event) => { event.preventDefault(); viewer.move(Math.sign(event.deltaY)); };
  slider.oninput = draw;
  preset.onchange = () => { state.window = Number(preset.value); draw(); };
  opacity.oninput = () => { state.opacity = opacity.value / 100; draw(); };
  place.replaceChildren(canvas, make("div", { className: "tools" }, slider, which,
    make("label", {}, "Window ", preset), make("label", {}, "Overlay ", opacity)));
  state.viewer = viewer;
  draw();
}

document.onkeydown = (event) => {
  const typing = /^(INPUT|SELECT|TEXTAREA)$/.test(event.target.tagName);
  if (event.key === "Escape") { close(); event.target.blur?.(); return; }
  if (typing && !(event.target.type === "range" && /^[jko123]$/.test(event.key))) return;
  const { viewer } = state;
  const keys = { j: () => choose(state.chosen + 1), k: () => choose(state.chosen - 1), "/": () => at("text").focus() };
  if (viewer) {
    keys.ArrowUp = () => viewer.move(1);
    keys.ArrowDown = () => viewer.move(-1);
    keys.o = () => { state.opacity = state.opacity ? 0 : 0.45; viewer.opacity.value = 100 * state.opacity; viewer.draw(); };
    WINDOWS.forEach((_, k) => { keys[k + 1] = () => { state.window = k; viewer.preset.value = k; viewer.draw(); }; });
  }
  if (keys[event.key] && !event.ctrlKey && !event.metaKey && !event.altKey) { event.preventDefault(); keys[event.key](); }
};

for (const id of ["sort", "status", "grade"]) at(id).onchange = () => { state.offset = 0; load(); };
let typed;
at("text").oninput = () => { clearTimeout(typed); typed = setTimeout(() => { state.offset = 0; load(); }, 200); };
at("filters").onsubmit = (event) => event.preventDefault();
at("back").onclick = () => { state.offset = Math.max(0, state.offset - PAGE_ROWS); load(); };
at("on").onclick = () => { state.offset += PAGE_ROWS; load(); };
at("batch").onchange = () => { state.batch = at("batch").value; state.offset = 0; load(); };
at("login").onsubmit = (event) => {
  event.preventDefault();
  sessionStorage.setItem("token", at("token").value);
  start();
};

async function start() {
  const embedded = at("data");
  if (embedded) { source = new Report(JSON.parse(embedded.textContent)); return load(); }
  const token = sessionStorage.getItem("token");
  if (!token) { at("login").hidden = false; return undefined; }
  source = new Endpoint(token);
  try {
    const runs = await source.runs();
    at("login").hidden = true;
    if (!runs.length) return say("No batch is finished yet.");
    at("batch").replaceChildren(...runs.map((run) => make("option", { value: run.batch_id,
      textContent: `${run.run_date}  ${run.series} series  ${run.batch_id.slice(0, 6)}` })));
    at("batch-label").hidden = false;
    state.batch = runs[0].batch_id;
    return load();
  } catch (error) { return failed(error); }
}
start();
