/** The viewer of a series: one slice at a time, with window and overlay. */

import { byId, make } from "./dom.js";

export const WINDOWS = [
  { name: "lung", low: -1350, high: 150 },
  { name: "wide", low: -1000, high: 400 },
  { name: "soft tissue", low: -160, high: 240 },
];
const MARKS = { none: 0, lung: 1, lesion: 2 };
// The lung is tinted weakly, so that lesions stand out.
const SHARES = { [MARKS.lung]: 0.25, [MARKS.lesion]: 1 };
const OPACITY = 0.45;

// The choices of the user, kept from series to series.
export const choices = { window: 0, opacity: OPACITY };

export class Viewer {
  constructor(tiles) {
    this.tiles = tiles;
    this.canvas = make("canvas", { width: tiles.size, height: tiles.size, tabIndex: 0 });
    this.canvas.setAttribute("role", "img");
    this.position = make("span", { className: "quiet" });
    this.slider = makeSlider("slice", tiles.count - 1, tiles.count >> 1);
    this.overlay = makeSlider("opacity of the overlay", 100, 100 * choices.opacity);
    this.preset = makePresets();
    this.tints = readTints();
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
      make("label", {}, "Overlay ", this.overlay),
    );
    const picture = make("div", { className: "picture" }, this.canvas, makeLegend());
    return [picture, tools];
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

  toggleOverlay() {
    choices.opacity = choices.opacity ? 0 : OPACITY;
    this.overlay.value = 100 * choices.opacity;
    this.draw();
  }

  draw() {
    const index = Number(this.slider.value);
    this.preset.value = choices.window;
    const pixels = this.tiles.pixels(index);
    const palette = this.#palette();
    const { data } = pixels;
    for (let start = 0; start < data.length; start += 4) {
      const [intensity, mark] = [data[start], data[start + 1]];
      data.set(palette[mark][intensity], start);
    }
    this.canvas.getContext("2d").putImageData(pixels, 0, 0);
    this.position.textContent = `${index + 1} of ${this.tiles.count}`;
    const label = `slice ${this.position.textContent}, lesions in orange, lung in blue`;
    this.canvas.setAttribute("aria-label", label);
  }

  /** Return red, green, blue and alpha of every intensity, for every mark. */
  #palette() {
    return Object.values(MARKS).map((mark) =>
      Array.from({ length: 256 }, (_, intensity) => this.#colour(intensity, mark)),
    );
  }

  #colour(intensity, mark) {
    const { low, high } = WINDOWS[choices.window];
    const grey = (255 * (this.tiles.hu(intensity) - low)) / (high - low);
    const shown = Math.max(0, Math.min(255, grey));
    const tint = this.tints[mark];
    if (!tint) return [shown, shown, shown, 255];
    const share = choices.opacity * SHARES[mark];
    return [...tint.map((value) => (1 - share) * shown + share * value), 255];
  }

  #listen() {
    this.canvas.onwheel = (event) => {
      event.preventDefault();
      this.move(Math.sign(event.deltaY));
    };
    this.slider.oninput = () => this.draw();
    this.preset.onchange = () => this.chooseWindow(Number(this.preset.value));
    this.overlay.oninput = () => {
      choices.opacity = this.overlay.value / 100;
      this.draw();
    };
  }
}

export const NUM_WINDOWS = WINDOWS.length;

/** Return the legend of the colours. */
export function makeLegend() {
  return byId("legend").content.cloneNode(true);
}

/** Return red, green and blue of the marks, as the style sheet has them. */
function readTints() {
  const style = getComputedStyle(document.documentElement);
  const read = (name) => style.getPropertyValue(name).trim().split(" ").map(Number);
  return { [MARKS.lung]: read("--lung-rgb"), [MARKS.lesion]: read("--lesion-rgb") };
}

export function makeSlider(label, max, value) {
  const slider = make("input", { type: "range", min: 0, max, value, title: label });
  slider.setAttribute("aria-label", label);
  return slider;
}

/** Return the list of windows. */
export function makePresets() {
  const preset = make("select", {}, ...WINDOWS.map(makeOption));
  preset.setAttribute("aria-label", "window");
  preset.value = choices.window;
  return preset;
}

function makeOption({ name }, index) {
  return make("option", { value: index, textContent: name });
}
