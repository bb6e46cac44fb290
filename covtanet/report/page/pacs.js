/** What a row offers from the PACS: a link to its viewer, labels of the study, full resolution. */

import { make } from "./dom.js";
import { orDash } from "./format.js";

/** Return the link to the viewer of the PACS and the switch to full resolution, as far as the
 * endpoint offers them. onSwitch: called when the user presses the switch. */
export function makePacsTools(row, onSwitch) {
  const tools = make("div", { className: "tools" });
  // A report offers nothing from a PACS.
  if (row.pacs?.viewer_url) tools.append(makeLink(row.pacs.viewer_url));
  if (row.pacs?.has_source) tools.append(makeSwitch(onSwitch));
  return tools;
}

function makeLink(href) {
  const rel = "noopener noreferrer";
  return make("a", { href, rel, target: "_blank", textContent: "Open in viewer" });
}

function makeSwitch(onSwitch) {
  const button = make("button", { type: "button", id: "full", textContent: "Full resolution" });
  button.setAttribute("aria-pressed", false);
  button.onclick = onSwitch;
  return button;
}

/** Add accession number and study date to the numbers of a row. */
export async function addStudyLabels(list, row, source) {
  const accession = make("dd", { textContent: "Loading" });
  const date = make("dd", { textContent: "Loading" });
  list.prepend(
    make("dt", { textContent: "accession number" }),
    accession,
    make("dt", { textContent: "study date" }),
    date,
  );
  try {
    const labels = await source.studyLabels(row);
    accession.textContent = orDash(labels.accession_number);
    date.textContent = orDash(labels.study_date);
  } catch (error) {
    accession.textContent = `unknown: ${error.message}`;
    date.textContent = orDash(null);
  }
}
