/** The list of series, one page at a time. */

import { byId, make } from "./dom.js";
import { finding, findingClass, number, percent } from "./format.js";

/** Show rows. onSelect: called with the index of the row that the user opens. */
export function showRows(rows, onSelect) {
  const lines = rows.map((row, index) => {
    const line = makeLine(row);
    line.onclick = () => onSelect(index);
    line.onkeydown = (event) => {
      if (event.key === "Enter") onSelect(index);
    };
    return line;
  });
  byId("rows").replaceChildren(...lines);
}

/** Mark the row of the open series. */
export function markSelected(selected) {
  [...byId("rows").children].forEach((line, index) => {
    line.setAttribute("aria-selected", index === selected);
  });
  byId("rows").children[selected].scrollIntoView({ block: "nearest" });
}

/** Show which rows of all are listed, and enable the buttons of the pages. */
export function showPosition(offset, numRows, total) {
  const last = offset + numRows;
  byId("shown").textContent = total ? `${offset + 1}–${last} of ${total}` : "no series";
  byId("previous").disabled = offset === 0;
  byId("next").disabled = last >= total;
}

function makeLine(row) {
  const cell = (textContent, className = "") => make("td", { textContent, className });
  const line = make(
    "tr",
    { tabIndex: 0 },
    cell(row.series_key.slice(0, 8), "code"),
    cell(finding(row), findingClass(row)),
    cell(percent(row.involvement)),
    cell(number(row.p_infected)),
    cell(number(row.p_severe)),
    cell(row.qc_flags.join(", ")),
  );
  line.setAttribute("aria-selected", false);
  return line;
}
