// What the image processor does to an image, in the visitor's browser. Nothing here needs a page, so it runs in Node too.
//
// An image is {width, height, data}: three bytes for each pixel, RGB, row by row.

/** The RGB of an ImageData. Transparency is dropped, as the image processors drop it. */
export function readPixels({ width, height, data }) {
  const pixels = new Uint8ClampedArray(3 * width * height);
  for (let pixel = 0; pixel < width * height; pixel++) {
    for (let channel = 0; channel < 3; channel++) pixels[3 * pixel + channel] = data[4 * pixel + channel];
  }
  return { width, height, data: pixels };
}

/** The cubic of Pillow's and torchvision's resize, a = -0.5. */
function cubic(x) {
  const distance = Math.abs(x);
  if (distance < 1) return (1.5 * distance - 2.5) * distance * distance + 1;
  if (distance < 2) return ((-0.5 * distance + 2.5) * distance - 4) * distance + 2;
  return 0;
}

/** For each of `to` places the first of the `from` places that it is made of, and their weights. */
function findWeights(from, to) {
  const scale = from / to;
  const stretch = Math.max(scale, 1); // a smaller image averages over all that becomes a pixel of it
  return Array.from({ length: to }, (_, place) => {
    const center = (place + 0.5) * scale;
    const first = Math.max(0, Math.trunc(center - 2 * stretch + 0.5));
    const last = Math.min(from, Math.trunc(center + 2 * stretch + 0.5));
    const weights = Array.from({ length: last - first }, (_, k) => cubic((first + k - center + 0.5) / stretch));
    const sum = weights.reduce((total, weight) => total + weight, 0);
    return { first, weights: weights.map((weight) => weight / sum) };
  });
}

/** Resizes the rows of an image: the result lies on its side, so that doing it twice resizes both and sets it upright. */
function resizeRows({ width, height, data }, to) {
  const resized = new Uint8ClampedArray(3 * to * height); // rounds, as Pillow does after each of the two passes
  findWeights(width, to).forEach(({ first, weights }, x) => {
    for (let y = 0; y < height; y++) {
      for (let channel = 0; channel < 3; channel++) {
        let value = 0;
        weights.forEach((weight, k) => (value += weight * data[3 * (y * width + first + k) + channel]));
        resized[3 * (x * height + y) + channel] = value;
      }
    }
  });
  return { width: height, height: to, data: resized };
}

/** Bicubic with antialiasing, as Pillow and torchvision resize 8 bits. */
export function resize(image, { width, height }) {
  return resizeRows(resizeRows(image, width), height);
}

/** An image as the model's `pixel_values`, by the settings of a preprocessor_config.json without a crop. */
export function prepare(image, settings) {
  const { width, height, data } = resize(image, settings.size);
  const values = new Float32Array(data.length);
  for (let pixel = 0; pixel < width * height; pixel++) {
    for (let channel = 0; channel < 3; channel++) {
      const value = data[3 * pixel + channel] * settings.rescale_factor;
      const normalized = (value - settings.image_mean[channel]) / settings.image_std[channel];
      values[channel * width * height + pixel] = normalized; // channels first
    }
  }
  return { shape: [1, 3, height, width], values };
}

export function softmax(logits) {
  const largest = Math.max(...logits);
  const exponentials = Array.from(logits, (logit) => Math.exp(logit - largest));
  const sum = exponentials.reduce((total, value) => total + value, 0);
  return exponentials.map((value) => value / sum);
}

/**
 * A drawing as an image of 8 x 8 pixels like those of the training data, whose makers fitted each digit into 32 x 32
 * places and counted the ink in blocks of 4 x 4. Null if there is no ink.
 *
 * The drawing is {width, height, data}: a byte for each pixel, ink from 128 on.
 */
export function toDigit({ width, height, data }) {
  let [left, top, right, bottom] = [width, height, -1, -1];
  for (let y = 0; y < height; y++) {
    for (let x = 0; x < width; x++) {
      if (data[y * width + x] < 128) continue;
      [left, top, right, bottom] = [Math.min(left, x), Math.min(top, y), Math.max(right, x), Math.max(bottom, y)];
    }
  }
  if (right < 0) return null;
  const side = Math.max(right - left, bottom - top) + 1;
  const [startX, startY] = [(left + right + 1 - side) / 2, (top + bottom + 1 - side) / 2];
  const counts = new Array(64).fill(0);
  for (let y = 0; y < 32; y++) {
    for (let x = 0; x < 32; x++) {
      const drawnX = Math.floor(startX + ((x + 0.5) * side) / 32);
      const drawnY = Math.floor(startY + ((y + 0.5) * side) / 32);
      const inside = drawnX >= left && drawnX <= right && drawnY >= top && drawnY <= bottom;
      if (inside && data[drawnY * width + drawnX] >= 128) counts[8 * (y >> 2) + (x >> 2)]++;
    }
  }
  const pixels = new Uint8ClampedArray(3 * 64);
  counts.forEach((count, place) => pixels.fill(Math.floor((count * 255) / 16), 3 * place, 3 * place + 3));
  return { width: 8, height: 8, data: pixels };
}
