/** Text of the values of a row. A missing number is a dash, never 0. */

const DASH = "–";

export function percent(value) {
  return isMissing(value) ? DASH : `${(100 * value).toFixed(1)} %`;
}

export function number(value, digits = 2) {
  return isMissing(value) ? DASH : Number(value).toFixed(digits);
}

export function orDash(value) {
  return isMissing(value) ? DASH : String(value);
}

/** Return the finding of a series, or the reason why it was not screened. */
export function finding(row) {
  if (row.status !== "screened") return `${row.status}: ${row.reason}`;
  if (row.diagnosis === "normal") return "normal";
  if (row.severity) return `infected, ${row.severity}`;
  if (row.diagnosis) return row.diagnosis;
  if (row.severity_by_involvement) return `${row.severity_by_involvement} by involvement`;
  return DASH;
}

/** Return the CSS class that colours the finding. */
export function findingClass(row) {
  if (row.status !== "screened") return row.status;
  if (row.diagnosis === "normal") return "normal";
  return row.severity ?? row.severity_by_involvement ?? "";
}

function isMissing(value) {
  return value === null || value === undefined;
}
