/**
 * The source series of a row at full resolution: one slice at a time, as the PACS renders it.
 *
 * Pictures carry no marks of lung or lesions. They are kept while the series is open.
 */

import { make } from "./dom.js";
import { choices, makePresets, makeSlider, WINDOWS } from "./viewer.js";

// Slices beside the one on the screen that are loaded ahead, the nearest first.
const AHEAD = [0, 1, -1, 2, -2, 3, -3];
const MAX_LOADS = 3;
const MAX_PICTURES = 100;

export class SourceViewer {
  /** Build the viewer. source: an `Endpoint`. numSlices: of the series. */
  constructor(row, source, numSlices) {
    this.row = row;
    this.source = source;
    this.count = numSlices;
    this.image = make("img", { tabIndex: 0, hidden: true });
    this.problem = make("p", { className: "problem" });
    this.problem.setAttribute("role", "alert");
    this.position = make("span", { className: "quiet" });
    this.slider = makeSlider("slice", numSlices - 1, numSlices >> 1);
    this.preset = makePresets();
    // URLs of loaded pictures by window and slice, the one that was used last at the end.
    this.pictures = new Map();
    this.loading = new Set();
    this.isFailed = false;
    this.isClosed = false;
    this.#listen();
  }

  /** Return the elements of the viewer. */
  elements() {
    const tools = make(
      "div",
      { className: "tools" },
      make("label", {}, "Slice ", this.slider),
      this.position,
      make("label", {}, "Window ", this.preset),
    );
    const note = make("p", { className: "quiet", textContent: "From the PACS, without marks." });
    return [make("div", { className: "source" }, this.image), this.problem, tools, note];
  }

  /** Go up or down by some slices. */
  move(slices) {
    this.slider.value = Number(this.slider.value) + slices;
    this.draw();
  }

  /** Choose a window by its position in the list. */
  chooseWindow(index) {
    choices.window = index;
    this.draw();
  }

  /** Do nothing: pictures of the PACS have no overlay. */
  toggleOverlay() {}

  /** Show the chosen slice, once it is loaded, and load its neighbours. */
  draw() {
    const index = Number(this.slider.value);
    const name = WINDOWS[choices.window].name;
    this.preset.value = choices.window;
    this.position.textContent = `${index + 1} of ${this.count}`;
    this.image.alt = `slice ${this.position.textContent} at full resolution, ${name} window`;
    this.isFailed = false;
    this.#show();
    this.#load();
  }

  /** Forget all pictures. */
  close() {
    this.isClosed = true;
    for (const url of this.pictures.values()) URL.revokeObjectURL(url);
    this.pictures.clear();
  }

  /** Show the picture of the chosen slice if it is there; the last one stays until then. */
  #show() {
    const url = this.pictures.get(this.#key(Number(this.slider.value)));
    this.image.classList.toggle("late", !url);
    if (!url) return;
    this.problem.textContent = "";
    this.image.src = url;
    this.image.hidden = false;
  }

  /** Start to load what is missing around the chosen slice, a few pictures at a time. */
  #load() {
    const chosen = Number(this.slider.value);
    const near = AHEAD.map((distance) => chosen + distance);
    const slices = near.filter((index) => index >= 0 && index < this.count);
    for (const index of slices) {
      const key = this.#key(index);
      if (this.isClosed || this.isFailed || this.loading.size >= MAX_LOADS) return;
      if (!this.pictures.has(key) && !this.loading.has(key)) this.#fetch(key, index);
    }
  }

  async #fetch(key, index) {
    this.loading.add(key);
    try {
      const picture = await this.source.slice(this.row, index, WINDOWS[choices.window]);
      if (!this.isClosed) this.#keep(key, URL.createObjectURL(picture));
    } catch (error) {
      // The next step of the user tries again.
      this.isFailed = true;
      if (!this.pictures.has(this.#key(Number(this.slider.value)))) {
        this.problem.textContent = `No picture: ${error.message}`;
        // The picture of another slice under this slice's number would mislead.
        this.image.hidden = true;
      }
    } finally {
      this.loading.delete(key);
    }
    if (this.isClosed) return;
    this.#show();
    this.#load();
  }

  #keep(key, url) {
    this.pictures.set(key, url);
    for (const [oldest, old] of this.pictures) {
      if (this.pictures.size <= MAX_PICTURES) return;
      if (old !== this.image.src) URL.revokeObjectURL(old);
      this.pictures.delete(oldest);
    }
  }

  #key(index) {
    return `${choices.window} ${index}`;
  }

  #listen() {
    this.image.onwheel = (event) => {
      event.preventDefault();
      this.move(Math.sign(event.deltaY));
    };
    this.slider.oninput = () => this.draw();
    this.preset.onchange = () => this.chooseWindow(Number(this.preset.value));
  }
}
