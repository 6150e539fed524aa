// The demo: a picture against labels, and a sentence against the gallery.

import { Api, Problem, key } from "./api.js";
import { fromFile, fromServer, pictureIn } from "./pictures.js";

const OFFERED = 12; // gallery pictures beside the drop zone; their names are the first labels
const MAX_BARS = 20;
const SENTENCES = ["something to eat", "an animal", "a musical instrument", "a sad face"];

const $ = (id) => document.getElementById(id);
const api = new Api(askKey);

/* Shared by both parts */

function element(tag, properties = {}, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  return made;
}

function showModel(id, clip) {
  $("model").textContent = id;
  const digest = clip?.digest ?? "";
  $("digest").hidden = !digest;
  $("digest").textContent = digest.slice(0, 12);
  $("digest").title = digest;
}

/** A part of the page: only its newest request may show something; `clear` empties its results. */
class Part {
  constructor(name, results, clear) {
    this.name = name;
    this.results = results;
    this.clear = clear;
    this.current = null;
  }

  /** Run `work(signal)`; show its failure, and leave out what a newer run has overtaken. */
  async run(work) {
    this.current?.abort();
    const mine = (this.current = new AbortController());
    this.results.setAttribute("aria-busy", "true");
    this.problem("");
    this.status(""); // the same words twice are two announcements
    try {
      await work(mine.signal);
    } catch (error) {
      if (this.current !== mine) return;
      this.clear(); // numbers of before would stand beside what was asked for now
      this.meta("");
      this.problem(error instanceof Problem ? error.text() : error.message);
    } finally {
      if (this.current === mine) {
        this.current = null;
        this.results.removeAttribute("aria-busy");
      }
    }
  }

  problem(text) {
    $(`${this.name}-problem`).textContent = text;
    $(`${this.name}-problem`).hidden = !text;
  }

  meta(text) {
    $(`${this.name}-meta`).textContent = text;
  }

  status(text) {
    $(`${this.name}-status`).textContent = text;
  }
}

const milliseconds = (ms) => `${Math.max(1, Math.round(ms))} ms`;

/* A picture against labels */

const classifying = new Part("classify", $("bars"), () => $("bars").replaceChildren());
let picture = null; // data URI

function labelsIn(text) {
  return [...new Set(text.split(/[,\n]/).map((label) => label.trim()).filter(Boolean))];
}

function classify(follow = false) {
  return classifying.run(async (signal) => {
    const labels = labelsIn($("labels").value);
    const template = $("template").value.trim();
    if (!picture) throw new Problem("Choose a picture first.");
    if (!labels.length) throw new Problem("Type at least one label.");
    if (template && !/\{c?\}/.test(template)) {
      throw new Problem("The prompt needs {c}, the place of the label: a photo of a {c}.");
    }
    const body = { input: { image: picture }, labels, top_k: Math.min(labels.length, MAX_BARS) };
    if (template) body.templates = [template];
    const { answer, ms } = await api.call("v1/classify", body, signal);
    if (signal.aborted) return;
    showModel(answer.model, answer.clip);
    const found = [...answer.data[0].predictions].sort((a, b) => b.score - a.score);
    $("bars").replaceChildren(...found.map(bar));
    const more = labels.length > found.length ? ` · best ${found.length} of ${labels.length}` : "";
    const cache = answer.cached ? "label cache hit" : "label cache miss";
    classifying.meta(`${milliseconds(ms)} · ${cache}${more}`);
    classifying.status(`${found[0].label} fits best, ${percent(found[0].score)}`);
    if (follow) $("bars").scrollIntoView({ block: "nearest" });
  });
}

const percent = (score) => `${(score * 100).toFixed(1)} %`;

function bar({ label, score }) {
  const fill = element("span", { className: "fill" });
  fill.style.width = `${score * 100}%`;
  const track = element("span", { className: "track" }, fill);
  track.setAttribute("aria-hidden", "true");
  const name = element("span", { className: "name", textContent: label });
  return element("li", {}, name, track, element("span", { className: "value" }, percent(score)));
}

function show(dataUri, name) {
  picture = dataUri;
  $("preview").src = dataUri;
  $("preview").alt = name;
  $("preview").hidden = false;
  $("drop").classList.add("filled");
}

function press(button) {
  for (const other of $("strip").children) {
    other.setAttribute("aria-pressed", String(other === button));
  }
}

async function takeFile(file) {
  try {
    show(await fromFile(file), file.name || "your picture");
  } catch (error) {
    classifying.problem(error.message);
    return;
  }
  press(null);
  await classify(true);
}

async function showOffered(item, button) {
  press(button);
  show(await fromServer(item.url), item.name);
}

async function takeOffered(item, button) {
  try {
    await showOffered(item, button);
  } catch (error) {
    classifying.problem(error.message);
    return;
  }
  await classify(true);
}

function listenForPictures() {
  $("file").addEventListener("change", () => {
    const [file] = $("file").files;
    $("file").value = ""; // the same file again is a change, too
    if (file) takeFile(file);
  });
  document.addEventListener("paste", (event) => {
    const file = pictureIn(event.clipboardData);
    if (!file || $("key-dialog").open) return;
    event.preventDefault();
    takeFile(file);
  });
  document.addEventListener("dragover", (event) => {
    if (!event.dataTransfer.types.includes("Files")) return;
    event.preventDefault();
    $("drop").classList.add("over");
  });
  document.addEventListener("dragleave", (event) => {
    if (!event.relatedTarget) $("drop").classList.remove("over");
  });
  document.addEventListener("drop", (event) => {
    $("drop").classList.remove("over");
    if (!event.dataTransfer.files.length) return;
    event.preventDefault();
    const file = pictureIn(event.dataTransfer);
    if (file) takeFile(file);
    else classifying.problem("That is no picture. Drop a JPEG, PNG, WebP or GIF file.");
  });
}

/* A sentence against the gallery */

const ranking = new Part("rank", $("gallery"), () => {
  $("gallery").classList.remove("ranked");
  gallery.forEach(({ entry }) => (entry.querySelector(".value").textContent = ""));
});
let gallery = []; // {name, url, entry}, in the server's order
let embedded = null; // {digest, rows, ms}: the gallery in one model's space

function vectors(answer) {
  return answer.data
    .toSorted((a, b) => a.index - b.index)
    .map(({ embedding }) => {
      const bytes = Uint8Array.from(atob(embedding), (character) => character.charCodeAt(0));
      return new Float32Array(bytes.buffer);
    });
}

async function embed(input, model, signal) {
  const body = { input, encoding_format: "base64" };
  if (model) body.model = model;
  const { answer, ms } = await api.call("v1/embeddings", body, signal);
  return { answer, ms, rows: vectors(answer), digest: answer.clip.digest };
}

/** Return the gallery as one model sees it, or null if that model does not answer any more. */
async function embedGallery(model, signal) {
  ranking.meta(`Encoding ${gallery.length} pictures, once…`);
  const input = await Promise.all(
    gallery.map(async (item) => ({ image: await fromServer(item.url) })),
  );
  try {
    const { digest, rows, ms } = await embed(input, model, signal);
    return { digest, rows, ms };
  } catch (error) {
    // The model that knew the sentence is gone already, or not everywhere yet.
    if (error.status === 404 || error.status === 409) return null;
    throw error;
  }
}

function rank() {
  return ranking.run(async (signal) => {
    const text = $("sentence").value.trim();
    if (!text) throw new Problem("Type a sentence first.");
    // Features of two models cannot be compared: during a promotion one may answer for the
    // sentence and another for the pictures.
    for (let tries = 0; tries < 3; tries += 1) {
      const sentence = await embed([{ text }], null, signal);
      if (signal.aborted) return;
      const fresh = embedded?.digest !== sentence.digest;
      if (fresh) embedded = await embedGallery(sentence.answer.model, signal);
      if (signal.aborted) return;
      if (embedded?.digest === sentence.digest) {
        showModel(sentence.answer.model, sentence.answer.clip);
        showRanking(text, sentence, fresh);
        return;
      }
    }
    throw new Problem("The model is being replaced just now. Try again in a moment.");
  });
}

function showRanking(text, { rows: [query], ms }, fresh) {
  const scores = embedded.rows.map((row) => row.reduce((sum, x, i) => sum + x * query[i], 0));
  const order = scores.map((_, n) => n).sort((a, b) => scores[b] - scores[a] || a - b);
  order.forEach((n) => {
    gallery[n].entry.querySelector(".value").textContent = scores[n].toFixed(3);
  });
  reorder(order.map((n) => gallery[n].entry));
  const once = `${gallery.length} pictures encoded in ${milliseconds(embedded.ms)}, once`;
  ranking.meta(`${milliseconds(ms)} · ${fresh ? once : "pictures encoded before"}`);
  ranking.status(`For ${text}: ${order.slice(0, 3).map((n) => gallery[n].name).join(", ")}`);
}

/** Put the entries in this order; each glides from its old place. */
function reorder(entries) {
  const before = entries.map((entry) => entry.getBoundingClientRect());
  $("gallery").replaceChildren(...entries);
  $("gallery").classList.add("ranked");
  if (matchMedia("(prefers-reduced-motion: reduce)").matches) return;
  entries.forEach((entry, n) => {
    const after = entry.getBoundingClientRect();
    const [x, y] = [before[n].left - after.left, before[n].top - after.top];
    if (!x && !y) return;
    const path = [{ transform: `translate(${x}px, ${y}px)` }, { transform: "none" }];
    entry.animate(path, { duration: 450, easing: "cubic-bezier(.2, .7, .2, 1)" });
  });
}

/* The key */

/** Ask for a key, with the problem of the last one; resolves to null if the reader cancels. */
function askKey(problem) {
  const dialog = $("key-dialog");
  $("key-problem").textContent = problem ? problem.text() : "";
  $("key-problem").hidden = !problem;
  $("key").value = "";
  dialog.returnValue = "";
  dialog.showModal();
  return new Promise((resolve) => {
    const closed = () => {
      const value = dialog.returnValue === "ok" ? $("key").value.trim() : null;
      $("key").value = "";
      $("key-change").hidden = !value && !key.get();
      resolve(value);
    };
    dialog.addEventListener("close", closed, { once: true });
  });
}

function listenForKeys() {
  $("key-form").addEventListener("submit", (event) => {
    event.preventDefault();
    $("key-dialog").close("ok");
  });
  $("key-cancel").addEventListener("click", () => $("key-dialog").close());
  $("key-change").hidden = !key.get();
  $("key-change").addEventListener("click", async () => {
    const value = await askKey(null);
    if (value) key.set(value);
  });
}

/* Start */

function fillGallery() {
  $("strip").replaceChildren(
    ...gallery.slice(0, OFFERED).map((item) => {
      const image = element("img", { src: item.url, alt: item.name, width: 64, height: 64 });
      const button = element("button", { type: "button", title: item.name }, image);
      button.setAttribute("aria-pressed", "false");
      button.addEventListener("click", () => takeOffered(item, button));
      return button;
    }),
  );
  for (const item of gallery) {
    const image = element("img", { src: item.url, alt: item.name, width: 64, height: 64 });
    const value = element("span", { className: "value" });
    item.entry = element("li", { title: item.name }, image, value);
  }
  $("gallery").replaceChildren(...gallery.map((item) => item.entry));
}

function listenForForms() {
  $("classify-form").addEventListener("submit", (event) => {
    event.preventDefault();
    classify(true);
  });
  $("labels").addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || !(event.ctrlKey || event.metaKey)) return;
    event.preventDefault();
    classify(true);
  });
  $("rank-form").addEventListener("submit", (event) => {
    event.preventDefault();
    rank();
  });
  $("chips").replaceChildren(
    ...SENTENCES.map((text) => {
      const chip = element("button", { type: "button", textContent: text });
      chip.addEventListener("click", () => {
        $("sentence").value = text;
        rank();
      });
      return chip;
    }),
  );
}

async function start() {
  listenForForms();
  listenForPictures();
  listenForKeys();
  const listing = await (await fetch("gallery.json")).json();
  gallery = listing.items;
  fillGallery();
  $("credit").textContent = listing.credit;
  if (!$("labels").value) {
    $("labels").value = gallery.slice(0, OFFERED).map((item) => item.name).join(", ");
  }
  await showOffered(gallery[0], $("strip").firstElementChild);
  const { answer } = await api.call("v1/models");
  showModel(answer.data[0].id, answer.data[0].clip);
  await classify();
}

start().catch((error) => {
  $("model").textContent = "no model";
  classifying.problem(error instanceof Problem ? error.text() : error.message);
});
