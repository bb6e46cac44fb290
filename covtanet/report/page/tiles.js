/**
 * The slices of a series as tiles of one picture, and the layout of the tiles (viewer.json).
 *
 * Red is the intensity, 0 to 255 over the window of the model; green is 1 in the lung and 2 in a
 * lesion.
 */

const LEGACY_COLUMNS = 10;
// Pictures of the first runs carry no window; their models had this one.
const LEGACY_WINDOW = { low_hu: -1000, high_hu: 400 };

export class Tiles {
  constructor(context, layout, size) {
    this.context = context;
    this.layout = layout;
    this.size = size;
  }

  get count() {
    return this.layout.tiles;
  }

  /** Return the pixels of one slice. */
  pixels(index) {
    const column = index % this.layout.columns;
    const row = Math.floor(index / this.layout.columns);
    return this.context.getImageData(column * this.size, row * this.size, this.size, this.size);
  }

  /** Return the HU of an intensity. */
  hu(intensity) {
    const { low_hu: low, high_hu: high } = this.layout;
    return low + ((high - low) * intensity) / 255;
  }
}

/** Decode a picture. layout: the content of viewer.json; null reads it from the picture. */
export async function readTiles(blob, layout) {
  // Any conversion of colours would change intensities and marks.
  const options = { colorSpaceConversion: "none", premultiplyAlpha: "none" };
  const image = await createImageBitmap(blob, options);
  const canvas = new OffscreenCanvas(image.width, image.height);
  const context = canvas.getContext("2d", { willReadFrequently: true });
  context.drawImage(image, 0, 0);
  const known = layout ?? legacyLayout(context);
  return new Tiles(context, known, image.width / known.columns);
}

/**
 * Return the layout that runs without viewer.json wrote into the blue of the first nine pixels: the
 * number of tiles, then the ends of the window in HU as two big-endian float32.
 */
function legacyLayout(context) {
  const { data } = context.getImageData(0, 0, 9, 1);
  const blue = Uint8Array.from({ length: 9 }, (_, pixel) => data[4 * pixel + 2]);
  const ends = new DataView(blue.buffer, 1);
  const [low, high] = [ends.getFloat32(0), ends.getFloat32(4)];
  const window = low < high ? { low_hu: low, high_hu: high } : LEGACY_WINDOW;
  return { tiles: blue[0], columns: LEGACY_COLUMNS, ...window };
}
