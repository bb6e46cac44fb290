/** The panel of one series: its pictures and its numbers. */

import { byId, make } from "./dom.js";
import { finding, number, orDash, percent } from "./format.js";
import { readTiles } from "./tiles.js";
import { makeLegend, Viewer } from "./viewer.js";

// The row of the open panel, and its viewer once the pictures have arrived.
const panel = { row: null, viewer: null };

export function currentViewer() {
  return panel.viewer;
}

export function closeStudy() {
  byId("study").hidden = true;
  panel.row = null;
  panel.viewer = null;
}

/** Open a series and load its pictures from the source. */
export async function openStudy(row, source) {
  const pictures = make("div", { textContent: openingText(row) });
  byId("study").replaceChildren(pictures, makeNumbers(row));
  byId("study").hidden = false;
  panel.row = row;
  panel.viewer = null;
  if (row.status !== "screened") return;
  try {
    const picture = await source.picture(row);
    // The user may have opened another series while this picture was loading.
    if (panel.row === row) await showPicture(pictures, row, picture);
  } catch (error) {
    pictures.textContent = `No pictures: ${error.message}`;
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
