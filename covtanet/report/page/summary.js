/** The summary of a run: counts as bars. */

import { byId, make } from "./dom.js";
import { number } from "./format.js";

/** Show the summary that the worklist route returns. */
export function showSummary(summary) {
  const parts = [
    makeTotals(summary),
    makeBars("Status", summary.status),
    makeSeverity(summary),
    makeBars("Lung involved", spread(summary.involvement)),
  ];
  const reasons = Object.entries(summary.reasons).sort((left, right) => right[1] - left[1]);
  if (reasons.length) parts.push(makeBars("Not screened, by reason", Object.fromEntries(reasons)));
  byId("summary").replaceChildren(...parts);
}

function makeTotals(summary) {
  const when = [summary.run_date ?? ""];
  if (summary.studies_per_minute !== null) {
    when.push(`${number(summary.studies_per_minute, 0)} studies a minute`);
  }
  return make(
    "div",
    {},
    make("div", { className: "figure", textContent: `${summary.series} series` }),
    make("div", { className: "quiet", textContent: when.join(", ") }),
    make("div", { className: "quiet", textContent: summary.models.join(", ") }),
  );
}

/** Severity by the network, or by involvement if the model has no severity. */
function makeSeverity(summary) {
  if (!Object.keys(summary.severity).length) {
    return makeBars("Severity by involvement", summary.severity_by_involvement);
  }
  const normal = summary.diagnosis.normal ?? 0;
  return makeBars("Severity", { normal, ...summary.severity });
}

function spread({ edges, counts }) {
  const name = (bin) => `${100 * edges[bin]}–${100 * edges[bin + 1]} %`;
  return Object.fromEntries(counts.map((count, bin) => [name(bin), count]));
}

function makeBars(title, counts) {
  const most = Math.max(1, ...Object.values(counts));
  // A long list scrolls, so the keyboard must reach it.
  const grid = make("div", { className: "bars", tabIndex: 0 });
  for (const [name, count] of Object.entries(counts)) {
    const bar = make("span", { className: "bar" });
    bar.style.width = `${(100 * count) / most}%`;
    grid.append(make("span", { textContent: name }), bar, make("span", { textContent: count }));
  }
  return make("div", {}, make("h2", { textContent: title }), grid);
}
