/** Two sources of rows and pictures: the endpoint, or the data that a report embeds. */

/** A report: rows and pictures stand in the page itself, and there is one run. */
export class Report {
  constructor(data) {
    this.data = data;
  }

  async runs() {
    return [];
  }

  /**
   * Return the rows of a query. The report has the order of the rows for every `sort`, and the
   * grade and searchable text of each row; nothing is ranked here.
   */
  async page(query) {
    const { rows, orders, grades, texts, summary } = this.data;
    const text = query.text.toLowerCase();
    const matches = (index) =>
      (!query.status || rows[index].status === query.status) &&
      (!query.grade || grades[index] === query.grade) &&
      texts[index].includes(text);
    const matching = orders[query.sort].filter(matches);
    return { summary, total: matching.length, rows: matching.map((index) => rows[index]) };
  }

  /** Return the preview of a series; undefined if the report has none. */
  async picture(row) {
    return { preview: this.data.pictures[row.series_key] };
  }
}

/** The endpoint, asked with the caller's token. */
export class Endpoint {
  constructor(token) {
    this.token = token;
    this.batch = "";
  }

  /** Return the committed batches of the caller, the newest first. */
  async runs() {
    const batches = await this.#json("v1/batches");
    return batches.filter((batch) => batch.state === "committed");
  }

  page(query) {
    return this.#json(`v1/batches/${this.batch}/worklist?${new URLSearchParams(query)}`);
  }

  /** Return the tiles of a series and their layout; the layout is null for results of old runs. */
  async picture(row) {
    const folder = this.#folder(row);
    const [tiles, layout] = await Promise.all([
      this.#get(`${folder}/viewer.png`).then((answer) => answer.blob()),
      this.#json(`${folder}/viewer.json`).catch(nullIfMissing),
    ]);
    return { tiles, layout };
  }

  /** Return accession number and date of a series' study, which the PACS tells. */
  studyLabels(row) {
    return this.#json(`${this.#folder(row)}/study`);
  }

  /** Return the number of slices of a series at the PACS. */
  async numSlices(row) {
    return (await this.#json(`${this.#folder(row)}/source`)).num_slices;
  }

  /** Return the picture of one slice at full resolution, counted from the base. */
  async slice(row, index, { low, high }) {
    const path = `${this.#folder(row)}/source/${index}?low_hu=${low}&high_hu=${high}`;
    return (await this.#get(path)).blob();
  }

  #folder(row) {
    return `v1/batches/${this.batch}/series/${row.series_key}`;
  }

  async #json(path) {
    return (await this.#get(path)).json();
  }

  async #get(path) {
    const headers = { Authorization: `Bearer ${this.token}`, Accept: "application/json" };
    const answer = await fetch(path, { headers });
    if (!answer.ok) {
      const problem = await answer
        .json()
        .catch(() => ({ message: "the endpoint does not answer" }));
      throw Object.assign(new Error(problem.message), { status: answer.status });
    }
    return answer;
  }
}

function nullIfMissing(error) {
  if (error.status === 404) return null;
  throw error;
}
