/** The panel of one series: its pictures and its numbers. */

import { byId, make } from "./dom.js";
import { finding, number, orDash, percent } from "./format.js";
import { SourceViewer } from "./full_resolution.js";
import { addStudyLabels, makePacsTools } from "./pacs.js";
import { readTiles } from "./tiles.js";
import { makeLegend, Viewer } from "./viewer.js";

// The row of the open panel, and its viewers once the pictures have arrived; `full` is the one at
// full resolution, and isFull tells which of both is on the screen.
const panel = { row: null, viewer: null, full: null, isFull: false };

/** Return the viewer on the screen; null if there is none. */
export function currentViewer() {
  return panel.isFull ? panel.full : panel.viewer;
}

export function closeStudy() {
  byId("study").hidden = true;
  showRow(null);
}

function showRow(row) {
  panel.full?.close();
  Object.assign(panel, { row, viewer: null, full: null, isFull: false });
}

/** Open a series and load its pictures from the source. */
export async function openStudy(row, source) {
  showRow(row);
  const pictures = make("div", { textContent: openingText(row) });
  const full = make("div", { hidden: true });
  const tools = makePacsTools(row, () => toggleFull(row, source, pictures, full));
  const numbers = makeNumbers(row);
  byId("study").replaceChildren(pictures, full, tools, numbers);
  byId("study").hidden = false;
  if (row.pacs?.has_labels) addStudyLabels(numbers, row, source);
  if (row.status !== "screened") return;
  try {
    const picture = await source.picture(row);
    // The user may have opened another series while this picture was loading.
    if (panel.row === row) await showPicture(pictures, row, picture);
  } catch (error) {
    pictures.textContent = `No pictures: ${error.message}`;
  }
}

/** Press the switch to full resolution, if the open series has one. */
export function pressFull() {
  byId("full")?.click();
}

/** Change between the slices that the network saw and the series of the PACS. */
function toggleFull(row, source, pictures, full) {
  panel.isFull = !panel.isFull;
  pictures.hidden = panel.isFull;
  full.hidden = !panel.isFull;
  byId("full").setAttribute("aria-pressed", panel.isFull);
  if (!panel.isFull) panel.viewer?.draw();
  else if (panel.full) panel.full.draw();
  else openFull(row, source, full);
}

async function openFull(row, source, full) {
  full.textContent = "Loading";
  try {
    const numSlices = await source.numSlices(row);
    // The user may have opened another series, or pressed the switch twice, meanwhile.
    if (panel.row !== row || panel.full) return;
    panel.full = new SourceViewer(row, source, numSlices);
    full.replaceChildren(...panel.full.elements());
    panel.full.draw();
  } catch (error) {
    full.textContent = `No full resolution: ${error.message}`;
  }
}

function openingText(row) {
  if (row.status === "screened") return "Loading";
  return `Not screened: ${row.reason_detail ?? row.reason}`;
}

async function showPicture(pictures, row, { tiles, layout, preview }) {
  if (tiles) {
    const viewer = new Viewer(await readTiles(tiles, layout));
    if (panel.row !== row) return;
    panel.viewer = viewer;
    pictures.replaceChildren(...viewer.elements());
    viewer.draw();
  } else if (preview) {
    const alt = "slices with the outline of the lungs and lesions";
    pictures.replaceChildren(make("img", { src: preview, alt }), makeLegend());
  } else {
    pictures.textContent = "No pictures were kept of this series.";
  }
}

function makeNumbers(row) {
  const list = make("dl", { className: "numbers" });
  for (const [name, value] of Object.entries(numbersOf(row))) {
    list.append(make("dt", { textContent: name }), make("dd", { textContent: value }));
  }
  return list;
}

function numbersOf(row) {
  return {
    series: row.series_key,
    finding: finding(row),
    "lung involved": percent(row.involvement),
    "severity by involvement": orDash(row.severity_by_involvement),
    lesion: lesionText(row),
    "probability of infection": number(row.p_infected, 3),
    "probability of severe infection": number(row.p_severe, 3),
    flags: row.qc_flags.join(", ") || "none",
    slices: slicesText(row),
    source: row.source_uri,
    "series UID": orDash(row.series_uid),
    model: `${row.model_name} ${row.model_version}, ${row.model_digest.slice(0, 12)}`,
    configuration: row.config_digest.slice(0, 12),
    software: row.software_version,
    engine: orDash(row.engine),
    run: `${row.run_id}, ${row.screened_at}`,
  };
}

function lesionText(row) {
  if (row.lesion_volume_ml === null) return orDash(null);
  return `${number(row.lesion_volume_ml, 0)} ml of ${number(row.lung_volume_ml, 0)} ml lung`;
}

function slicesText(row) {
  const segmented = orDash(row.num_slices_segmented);
  const distance = number(row.spacing_z_mm, 1);
  return `${orDash(row.num_slices)}, ${segmented} segmented, ${distance} mm apart`;
}
