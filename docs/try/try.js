// The page: it takes an image or a drawing, runs the model in the browser, and shows the classes.
import { prepare, readPixels, softmax, toDigit } from "./preprocess.js";

const SHOWN = 5; // classes
const find = (id) => document.getElementById(id);
const status = find("status");

async function readJson(file) {
  const answer = await fetch(file);
  if (!answer.ok) throw new Error(`${file}: ${answer.status} ${answer.statusText}`);
  return answer.json();
}

async function loadModel() {
  const ort = await import("./onnxruntime/ort.wasm.bundle.min.mjs");
  ort.env.wasm.wasmPaths = { wasm: new URL("./onnxruntime/ort-wasm-simd-threaded.wasm", import.meta.url).href };
  ort.env.wasm.numThreads = 1; // more need headers that a server of files does not send
  const [config, settings, session] = await Promise.all([
    readJson("model/config.json"),
    readJson("model/preprocessor_config.json"),
    ort.InferenceSession.create("model/model.onnx"),
  ]);
  return async (image) => {
    const { shape, values } = prepare(image, settings);
    const { logits } = await session.run({ pixel_values: new ort.Tensor("float32", values, shape) });
    const probabilities = softmax(logits.data);
    const order = [...probabilities.keys()].sort((a, b) => probabilities[b] - probabilities[a]);
    return order.map((label) => ({ name: config.id2label[label], probability: probabilities[label] }));
  };
}

const model = loadModel();

function showClasses(classes) {
  find("classes").replaceChildren(
    ...classes.slice(0, SHOWN).map(({ name, probability }) => {
      const row = document.createElement("li");
      const label = document.createElement("span");
      const bar = document.createElement("meter");
      const number = document.createElement("data");
      label.textContent = name; // never as HTML: names are anybody's
      bar.value = probability;
      number.value = probability;
      number.textContent = `${(100 * probability).toFixed(1)} %`;
      row.append(label, bar, number);
      return row;
    }),
  );
}

/** What the model is given, before its resize. */
function showImage({ width, height, data }) {
  const seen = find("seen");
  [seen.width, seen.height] = [width, height];
  const pixels = new ImageData(width, height);
  for (let pixel = 0; pixel < width * height; pixel++) {
    pixels.data.set([data[3 * pixel], data[3 * pixel + 1], data[3 * pixel + 2], 255], 4 * pixel);
  }
  seen.getContext("2d").putImageData(pixels, 0, 0);
  seen.classList.toggle("coarse", Math.max(width, height) < 64);
}

let asked = 0; // what is shown belongs to the image that was given last

async function classify(image) {
  const number = ++asked;
  showImage(image);
  status.textContent = "The model is working …";
  try {
    const started = performance.now();
    const classes = await (await model)(image);
    if (number !== asked) return;
    showClasses(classes);
    status.textContent = `Computed on this device in ${Math.round(performance.now() - started)} ms.`;
  } catch (error) {
    if (number === asked) showProblem(error.message);
  }
}

function showProblem(message) {
  asked++;
  find("classes").replaceChildren();
  status.textContent = message;
}

async function classifyFile(file) {
  let bitmap;
  try {
    bitmap = await createImageBitmap(file, { colorSpaceConversion: "none", premultiplyAlpha: "none" });
  } catch {
    return showProblem(`${file.name || "This"} is not an image that this browser can read.`);
  }
  // Larger sides than a canvas may have, and more pixels than a phone has memory for.
  if (bitmap.width * bitmap.height > 2 ** 25) return showProblem(`${file.name} has more than 33 million pixels.`);
  const canvas = new OffscreenCanvas(bitmap.width, bitmap.height);
  const context = canvas.getContext("2d");
  context.drawImage(bitmap, 0, 0);
  await classify(readPixels(context.getImageData(0, 0, bitmap.width, bitmap.height)));
}

function setUpDrawing() {
  const pad = find("pad");
  const pen = pad.getContext("2d", { willReadFrequently: true });
  const clear = () => {
    pen.fillStyle = "black";
    pen.fillRect(0, 0, pad.width, pad.height);
  };
  const place = (event) => {
    const box = pad.getBoundingClientRect();
    return [
      ((event.clientX - box.left) * pad.width) / box.width,
      ((event.clientY - box.top) * pad.height) / box.height,
    ];
  };
  let last = null;
  const draw = (event) => {
    if (!last) return;
    const next = place(event);
    pen.beginPath();
    pen.moveTo(...last);
    pen.lineTo(...next);
    pen.stroke();
    last = next;
  };
  const finish = () => {
    if (!last) return;
    last = null;
    const { width, height, data } = pen.getImageData(0, 0, pad.width, pad.height);
    const ink = Uint8ClampedArray.from({ length: width * height }, (_, pixel) => data[4 * pixel]);
    classify(toDigit({ width, height, data: ink }));
  };
  clear();
  Object.assign(pen, { lineWidth: 34, lineCap: "round", lineJoin: "round", strokeStyle: "white" });
  pad.addEventListener("pointerdown", (event) => {
    pad.setPointerCapture(event.pointerId);
    last = place(event);
    draw(event);
  });
  pad.addEventListener("pointermove", draw);
  pad.addEventListener("pointerup", finish);
  pad.addEventListener("pointercancel", finish);
  find("clear").addEventListener("click", () => {
    clear();
    showProblem("Draw a digit, or choose an image.");
  });
}

function setUpFiles() {
  const drop = find("drop");
  find("file").addEventListener("change", ({ target }) => {
    if (target.files.length) classifyFile(target.files[0]);
    target.value = ""; // so that the same file can be chosen again
  });
  for (const name of ["dragover", "dragleave", "drop"]) {
    drop.addEventListener(name, (event) => {
      event.preventDefault();
      drop.classList.toggle("over", name === "dragover");
      if (name === "drop" && event.dataTransfer.files.length) classifyFile(event.dataTransfer.files[0]);
    });
  }
  document.addEventListener("paste", ({ clipboardData }) => {
    if (clipboardData.files.length) classifyFile(clipboardData.files[0]);
  });
}

async function setUpExamples() {
  const names = await readJson("examples/examples.json");
  find("examples").replaceChildren(
    ...names.map((name) => {
      const button = document.createElement("button");
      const picture = document.createElement("img");
      Object.assign(picture, { src: `examples/${name}`, alt: name });
      button.append(picture);
      button.addEventListener("click", async () => {
        const answer = await fetch(picture.src);
        await classifyFile(new File([await answer.blob()], name));
      });
      return button;
    }),
  );
}

setUpDrawing();
setUpFiles();
setUpExamples().catch((error) => console.warn(error));
model.then(
  () => {
    if (!asked) status.textContent = "Draw a digit, or choose an image.";
  },
  (error) => showProblem(`The model could not be loaded. ${error.message}`),
);
