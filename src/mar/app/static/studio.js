// The studio's page: draws, edits and compares pictures with the API of `api.js`. Pictures stay in this tab.

import { ask, Busy, call } from "./api.js";
import { Asks, make, Presets, seconds, Settings } from "./controls.js";
import { canvasOf, decode, eachToken, paint, paintReveal } from "./picture.js";

const $ = (selector, within = document) => within.querySelector(selector);
const $$ = (selector, within = document) => [...within.querySelectorAll(selector)];
const randomSeed = () => Math.floor(Math.random() * 1e6);
const HISTORY = 80;
const MAX_IMAGES = 16;  // of a request
const MAX_COMPARED = 4;  // classes or prompts
const narrow = () => innerWidth <= 900;

const state = { models: [], model: null, running: null, reveals: [], selected: 0, step: 0 };
const asks = {
  draw: new Asks($("#draw-asks"), { check, examples: true }),
  edit: new Asks($("#edit-asks"), { multiple: false, title: "Draw there", check }),
  compare: new Asks($("#compare-asks"), { check }),
};
const presets = new Presets($("#presets"));
const settings = new Settings($("#more"));
const model = () => state.models.find((each) => each.name === state.model);
const sizes = () => ({ size: { width: model().width, height: model().height }, grid: { rows: model().rows, columns: model().columns } });

// ---- messages

function say(text, kind = "error") {
  const notice = $("#notice");
  notice.hidden = !text;
  notice.className = kind;
  $("span", notice).textContent = text || "";
}

// What the model does not read of prompts. While too many are waiting, nothing is told.
async function check(prompts) {
  try {
    return await ask("check", state.model, prompts.slice(0, MAX_IMAGES));
  } catch (error) {
    return { notes: error instanceof Busy ? [] : [error.message], draws: error instanceof Busy };
  }
}

// Runs something that the user asked for; whatever goes wrong is one line on the page.
async function attempt(work) {
  try {
    return await work();
  } catch (error) {
    if (error.name !== "AbortError") say(error.message, error instanceof Busy ? "busy" : "error");
    return undefined;
  }
}

// ---- models

async function refresh() {
  const { models, settings: described, presets: names, downloads } = await ask("models");
  if (!settings.fields.length) settings.build(described);
  Object.assign(state, { models, presetNames: names, downloads });
  if (!state.model) state.model = models[0].name;
  const select = $("#model");
  const size = (mebibytes) => !mebibytes ? "of unknown size" : (mebibytes >= 1024 ? `${(mebibytes / 1024).toFixed(1)} GiB` : `${Math.round(mebibytes)} MiB`);
  const text = (each) => shortName(each.name) + (each.state === "absent" ? ` (not here${each.mebibytes ? `: ${size(each.mebibytes)}` : ""})` : "");
  if ($$("option", select).map((option) => option.textContent).join() !== models.map(text).join()) {
    select.replaceChildren(...models.map((each) => make("option", { value: each.name, title: each.about || each.name, textContent: text(each) })));
  }
  select.value = state.model;
  const current = model();
  const offer = $("#offer");
  offer.hidden = current.state !== "absent" && current.received === null;
  if (!offer.hidden) {
    $("p", offer).textContent = current.received !== null
      ? `Downloading ${current.name}: ${size(current.received || 0.1)}${current.mebibytes ? ` of ${size(current.mebibytes)}` : ""}`
      : `${current.name} is not on this machine. It is ${size(current.mebibytes)} to download, with its tokenizer.` +
        (downloads ? "" : ` On the machine of this page: mar download ${current.name}`);
    $("#download").hidden = !downloads || current.received !== null;
  }
  if (current.state === "failed") say(`${current.name} can't be loaded: ${current.error}`);
  if (current.state === "absent" && current.error) say(`${current.name} can't be downloaded: ${current.error}`);
  if (current.asks) adopt(current);
  document.body.classList.toggle("loading", !current.asks);
  const line = offer.hidden && current.state !== "failed" ? `Loading ${shortName(current.name)} …` : "";
  document.body.classList.toggle("away", !current.asks && !line);
  $$(".stage").forEach((stage) => { stage.dataset.loading = line; });
  $$("main form").forEach((form) => { form.inert = !current.asks; });
  return current;
}

// The name of a model; of a file, its last folder and its name.
function shortName(name) {
  const parts = name.replace(/\.safetensors$/, "").split(/[\\/]/);
  return parts.slice(-2).join("/");
}

let adopted = "";
function adopt(current) {
  presets.setModel(current, state.presetNames);
  if (adopted === current.name) return;
  adopted = current.name;
  Object.values(asks).forEach((field) => field.setModel(current.asks));
  settings.setDefaults(current.defaults[presets.value]);
  const { kind } = current.asks;
  $("#count-title").textContent = kind === "none" ? "Pictures" : "Pictures of each";
  if (!state.counted) $("#count").value = kind === "prompt" ? 4 : 1;
  $("#compare .go + .hint").textContent = `The same ${things()} and seed with each of the settings.`;
  easel.clear();
  buildColumns();
  blank();
  blankTable();
}

// Asks for the models until this one is loaded and measured.
let watching = null;
async function watch() {
  clearTimeout(watching);
  const current = await attempt(refresh);
  const settled = current && (current.state === "failed" || (current.state === "absent" && current.received === null) || (current.asks && Object.values(current.seconds).every(Boolean)));
  if (!settled) watching = setTimeout(watch, current?.asks ? 1500 : 350);
}

async function choose(name) {
  Object.assign(state, { model: name, reveals: [], compared: false });
  adopted = "";
  say("");
  $$(".progress").forEach((bar) => { bar.hidden = true; });
  const current = await attempt(refresh);
  if (current && ["waiting", "failed"].includes(current.state)) await attempt(() => ask("load", name));
  watch();
}

// ---- drawing

// Runs work with a tab's progress bar and stop button; one thing at a time.
async function run(tab, work) {
  if (state.running) return;
  if (!model()?.asks) { say("the model is not loaded yet", "info"); return; }
  say("");
  const bar = $(".progress", tab);
  const busy = (value) => {
    $$(".go .primary, #model").forEach((each) => { each.disabled = value; });
    $$(".stop").forEach((each) => { each.hidden = !value; });
  };
  state.running = {};
  busy(true);
  bar.hidden = false;
  if (narrow()) scrollTo(0, 0);  // to the pictures
  const progress = (event, share = [0, 1]) => {
    const done = event?.steps ? event.step / event.steps : 0;
    $("progress", bar).value = share[0] + done * share[1];
    $("output", bar).textContent = !event ? "waiting for its turn"
      : event.kind === "done" ? `${event.stopped ? `stopped at step ${event.step} of ${event.steps}` : `${event.steps} steps`} in ${seconds(event.seconds)}`
      : `step ${event.step} of ${event.steps}` + (done ? ` · ${seconds(event.seconds)} · ${seconds(event.seconds / done - event.seconds)} left` : "");
  };
  progress(null);
  await attempt(() => work(progress));
  state.running = null;
  busy(false);
  bar.hidden = !$("output", bar).textContent.includes(" in ");
  watch();
}

async function stop() {
  if (!state.running) return;
  state.running.stopped = true;
  const { ticket, abort } = state.running;
  if (!ticket) return;
  abort?.abort();  // it waits for its turn: the studio drops it
  await attempt(() => ask("stop", ticket));
}

// Waits until the browser has painted what was drawn; a tab in the background is not waited for.
const shown = () => new Promise((done) => { requestAnimationFrame(done); if (document.hidden) done(); else setTimeout(done, 100); });

// Draws one request; `show(reveal, index, step, done)` is called for every preview of every picture.
async function draw(request, progress, show) {
  const { size, grid } = sizes();
  const reveals = request.asks.map(() => ({ size, grid, frames: [], steps: 1, revealedAt: null, result: null }));
  const name = state.model;
  state.running.ticket = crypto.randomUUID?.() || `${randomSeed()}-${randomSeed()}`;
  const [labels, prompts] = model().asks.kind === "prompt" ? [null, request.asks] : [request.asks, null];
  const parts = [name, labels, request.seeds, request.preset, request.settings, request.known ?? null, request.mask ?? null, request.grow ?? 1, state.running.ticket, prompts];
  state.running.abort = new AbortController();
  let last;
  try {
    for await (const event of call("draw", parts, state.running.abort.signal)) {
      state.running.abort = null;
      progress(event);
      if (event.revealed_at) reveals.forEach((reveal, i) => { Object.assign(reveal, { revealedAt: event.revealed_at[i], steps: event.steps }); show(reveal, i, 0); });
      for (const preview of event.previews) {
        const images = await Promise.all(preview.images.map(decode));
        images.forEach((image, i) => { reveals[i].frames.push({ step: preview.step, image }); show(reveals[i], i, preview.step); });
        await shown();
      }
      last = event;
    }
  } catch (error) {
    if (error.name === "AbortError") return null;  // withdrawn while it waited
    throw error;
  }
  if (!last.images?.length) return null;
  for (const [i, result] of last.images.entries()) {
    reveals[i].frames.push({ step: last.step, image: await decode(result.image) });
    reveals[i].result = { ...result, model: name, stopped: last.stopped, known: request.known, mask: request.mask };
    show(reveals[i], i, last.step, true);
  }
  return { reveals, event: last };
}

const common = () => ({ preset: presets.value, settings: settings.values() });
const caption = (title, seed) => (title === null ? `seed ${seed}` : `${title} · ${seed}`);
const titleOf = ({ label, prompt }) => (label === undefined ? prompt || "no prompt" : label ?? (model().asks.kind === "none" ? null : "no class"));
const things = () => (model().asks.kind === "prompt" ? "prompts" : "classes");

// Lays out so many pictures, still to be drawn, that can be selected.
function cards(container, count, select, { wide = count === 4 ? 2 : 4, side = sideFor(count) } = {}) {
  const room = container.parentElement.clientWidth || innerWidth - 28;
  const columns = Math.max(1, Math.min(wide, count, Math.floor((room + 6) / (side + (narrow() ? 14 : 26)))));
  container.style.setProperty("--columns", columns);
  container.replaceChildren(...Array.from({ length: count }, (_, i) => {
    const card = make("button", { type: "button", className: "card" }, make("canvas"), make("span"));
    paintReveal($("canvas", card), undrawn(), 0, { side });
    card.addEventListener("click", () => select(i));
    return card;
  }));
  return $$(".card", container);
}

// About how wide each of so many pictures is on the page.
const sideFor = (count) => {
  if (innerWidth <= 700) return count === 1 ? Math.min(340, innerWidth - 50) : Math.min(168, innerWidth / 2 - 27);
  return count === 1 ? 440 : count <= 4 ? 260 : 196;
};

// ---- the tab Draw

// A reveal of which nothing is drawn.
function undrawn() {
  const { size, grid } = sizes();
  return { size, grid, frames: [], revealedAt: Array.from({ length: grid.rows }, () => Array(grid.columns).fill(1)), steps: 1 };
}

function blank() {
  cards($("#draw-pictures"), expanded().length, () => {});
  $("#scrubber").hidden = $("#draw-details").hidden = true;
}

const perClass = () => Math.max(1, Math.min(MAX_IMAGES, Math.round(Number($("#count").value)) || 1));
const expanded = () => asks.draw.values().flatMap((value) => Array(perClass()).fill(value)).slice(0, MAX_IMAGES);

function showReveal(i, step, live = false) {
  const reveal = state.reveals[i];
  const card = $$("#draw-pictures .card")[i];
  if (!card) return;
  paintReveal($("canvas", card), reveal, step, { side: sideFor($$("#draw-pictures .card").length), order: $("#order").checked, live });
}

async function drawTab() {
  await run($("#draw"), async (progress) => {
    const values = expanded();
    if (asks.draw.values().length * perClass() > MAX_IMAGES) say(`a request has at most ${MAX_IMAGES} pictures: the first ${MAX_IMAGES} are drawn`, "info");
    if ($("#die").getAttribute("aria-pressed") === "true" && state.drawn) $("#seed").value = randomSeed();
    state.drawn = true;
    const first = Number($("#seed").value) || 0;
    const seeds = values.map((_, i) => first + i);
    const request = { asks: values, seeds, ...common() };
    await drawInto(request, progress);
  });
}

async function drawInto(request, progress) {
  Object.assign(state, { reveals: [], selected: 0 });
  $("#scrubber").hidden = $("#draw-details").hidden = true;
  cards($("#draw-pictures"), request.asks.length, select).forEach((card, i) => {
    $("span", card).textContent = caption(asks.draw.name(request.asks[i]), request.seeds[i]);
  });
  const drawn = await draw(request, progress, (reveal, i, step) => { state.reveals[i] = reveal; showReveal(i, step, true); });
  if (!drawn) { blank(); return; }
  state.reveals = drawn.reveals;
  state.step = drawn.event.step;
  state.reveals.forEach((reveal, i) => showReveal(i, state.step));
  if (!drawn.event.stopped) drawn.reveals.forEach(remember);
  const scrub = $("#scrub");
  Object.assign(scrub, { max: drawn.event.step, value: state.step });
  $("#scrubber").hidden = false;
  select(0);
  scrubTo(state.step);
}

function select(i) {
  if (!state.reveals[i]?.result) return;
  state.selected = i;
  $$("#draw-pictures .card").forEach((card, j) => card.classList.toggle("selected", i === j));
  details($("#draw-details"), state.reveals[i]);
}

function scrubTo(step) {
  state.step = step;
  $("#scrub").value = step;
  const steps = state.reveals[0]?.steps ?? 1;
  $("#scrub-text").textContent = `step ${step} of ${steps}`;
  $("#again").disabled = step >= steps || step < 1;
  state.reveals.forEach((_, i) => showReveal(i, step));
}

let playing = null;
function play() {
  clearInterval(playing);
  const steps = Number($("#scrub").max);
  let step = 0;
  scrubTo(0);
  playing = setInterval(() => {
    scrubTo(++step);
    if (step >= steps) clearInterval(playing);
  }, Math.max(60, Math.min(200, 2400 / steps)));
}

// Keeps what is revealed up to the step on show, and draws the rest with another seed.
async function drawAgain() {
  const reveal = state.reveals[state.selected];
  const step = state.step;
  const mask = maskUrl(reveal.size, reveal.grid, (row, column) => reveal.revealedAt[row][column] > step);
  await run($("#draw"), (progress) => drawInto({
    asks: [asks.draw.of(reveal.result)], seeds: [randomSeed()], ...common(), known: reveal.result.image, mask, grow: 0,
  }, progress));
}

// ---- a picture's details and history

function details(container, reveal, { editable = true } = {}) {
  const { result } = reveal;
  container.hidden = false;
  const save = (url, name, text) => make("a", { href: url, download: name, textContent: text, className: "button" });
  const file = `${(result.label || result.prompt || "picture").replace(/[^\w-]+/g, "-").toLowerCase().slice(0, 80)}-${result.seed}.png`;
  const edit = make("button", { type: "button", textContent: "Edit" });
  edit.addEventListener("click", () => editPicture(result));
  const extra = result.known ? [save(result.known, "known.png", "known.png"), save(result.mask, "mask.png", "mask.png")] : [];
  extra.forEach((link) => { link.title = "The command below reads this file"; });
  const code = make("pre", { tabIndex: 0 });
  const copy = make("button", { type: "button", className: "copy", textContent: "Copy" });
  const tabs = [["Command line", result.command], ["Python", result.python]].map(([title, text]) => {
    const tab = make("button", { type: "button", textContent: title });
    tab.addEventListener("click", () => {
      code.textContent = text;
      tabs.forEach((each) => each.setAttribute("aria-pressed", String(each === tab)));
    });
    return tab;
  });
  copy.addEventListener("click", async () => {
    copy.textContent = (await copied(code)) ? "Copied" : "Selected";
    setTimeout(() => { copy.textContent = "Copy"; }, 1200);
  });
  const head = make("div", { className: "buttons" }, make("b", { textContent: caption(titleOf(result), result.seed) }), ...(editable ? [edit] : []), save(result.image, file, "Save PNG"), ...extra);
  container.replaceChildren(head, make("div", { className: "code" }, make("div", { className: "buttons" }, ...tabs, copy), code));
  tabs[0].click();
}

// Copies an element's text; where the browser forbids that, as under http from another machine, it is selected.
async function copied(element) {
  try {
    await navigator.clipboard.writeText(element.textContent);
    return true;
  } catch {
    getSelection().selectAllChildren(element);
    return document.execCommand("copy");
  }
}

function remember(reveal) {
  const strip = $("#history div");
  const alt = caption(titleOf(reveal.result), reveal.result.seed);
  const thumb = make("button", { type: "button", title: `${alt}: edit` }, make("img", { src: reveal.result.image, alt }));
  thumb.addEventListener("click", () => editPicture(reveal.result));
  strip.prepend(thumb);
  while (strip.children.length > HISTORY) strip.lastChild.remove();
  $("#history").hidden = false;
}

// ---- the tab Edit

const maskUrl = (size, grid, test) => {
  const canvas = canvasOf(size.width, size.height);
  const context = canvas.getContext("2d");
  context.fillStyle = "#000";
  context.fillRect(0, 0, size.width, size.height);
  context.fillStyle = "#fff";
  eachToken(canvas, grid, (row, column, x, y, w, h) => { if (test(row, column)) context.fillRect(x, y, w, h); });
  return canvas.toDataURL("image/png");
};

const easel = {
  canvas: $("#easel"), url: null, image: null, mask: [], keep: false, past: [], future: [], soft: true,

  clear() {
    const { grid } = sizes();
    Object.assign(this, { url: null, image: null, past: [], future: [], keep: false });
    this.mask = Array.from({ length: grid.rows }, () => Array(grid.columns).fill(false));
    this.show();
    clearVariants();
  },

  // Opens another picture, with nothing painted.
  async open(url) {
    const image = await decode(url);
    if (this.url) this.save();
    Object.assign(this, { url, image, keep: false });
    this.unpaint();
    this.show();
    clearVariants();
  },

  unpaint() {
    this.mask = this.mask.map((cells) => cells.map(() => false));
    $("#soft").checked = this.soft;
  },

  snapshot() { return { url: this.url, image: this.image, mask: this.mask.map((row) => [...row]), keep: this.keep }; },
  save() { this.past.push(this.snapshot()); this.past.splice(0, this.past.length - 100); this.future = []; },
  restore(from, to) {
    if (!from.length) return;
    to.push(this.snapshot());
    Object.assign(this, from.pop());
    this.show();
  },

  drawn(row, column) { return this.mask[row]?.[column] !== this.keep; },

  side() { return Math.min(430, innerWidth - 28); },

  show() {
    if (!model()?.asks) return;
    const { size, grid } = sizes();
    const context = paint(this.canvas, this.image, size, this.side());
    $("#easel-empty").hidden = Boolean(this.image);
    $$("#edit fieldset").forEach((tools) => { tools.disabled = !this.image; });
    const style = getComputedStyle(document.documentElement);
    let painted = 0;
    eachToken(this.canvas, grid, (row, column, x, y, w, h) => {
      if (this.image && this.drawn(row, column)) {
        painted++;
        context.fillStyle = style.getPropertyValue("--paint");
        context.fillRect(x, y, w, h);
      }
      if (!this.image) return;
      context.strokeStyle = style.getPropertyValue("--grid");
      context.lineWidth = 1;
      context.strokeRect(Math.round(x) + 0.5, Math.round(y) + 0.5, w, h);
    });
    $("#painted").textContent = this.image ? `${painted} of ${grid.rows * grid.columns} tokens` : "";
    $("#undo").disabled = !this.past.length;
    $("#redo").disabled = !this.future.length;
    $("#mask-keep").setAttribute("aria-pressed", String(this.keep));
  },

  fill(test) {
    this.save();
    this.mask = this.mask.map((row, i) => row.map((value, j) => test(i, j, value)));
    this.show();
  },

  at(event) {
    const box = this.canvas.getBoundingClientRect();
    const { grid } = sizes();
    const clamp = (value, most) => Math.max(0, Math.min(most - 1, Math.floor(value * most)));
    return [clamp((event.clientY - box.top) / box.height, grid.rows), clamp((event.clientX - box.left) / box.width, grid.columns)];
  },

  stroke(event) {
    const [endRow, endColumn] = this.at(event);
    const [fromRow, fromColumn] = this.last;
    this.last = [endRow, endColumn];
    const cells = Math.max(1, Math.abs(endRow - fromRow), Math.abs(endColumn - fromColumn));
    for (let i = 1; i <= cells; i++) {  // no token is jumped over, however fast the brush
      this.dab(fromRow + Math.round(((endRow - fromRow) * i) / cells), fromColumn + Math.round(((endColumn - fromColumn) * i) / cells));
    }
    this.show();
  },

  dab(row, column) {
    const tool = $("[name=tool]:checked").value;
    const reach = (Number($("#brush").value) - 1) / 2;
    const near = (i, j) => i >= row - Math.floor(reach) && i <= row + Math.ceil(reach) && j >= column - Math.floor(reach) && j <= column + Math.ceil(reach);
    const [top, left] = this.corner;
    const inside = (i, j) => i >= Math.min(top, row) && i <= Math.max(top, row) && j >= Math.min(left, column) && j <= Math.max(left, column);
    this.mask = (tool === "box" ? this.before : this.mask).map((cells, i) => cells.map((value, j) => (tool === "box" ? value || inside(i, j) : near(i, j) ? tool === "brush" : value)));
  },

  // Moves the picture by whole tokens; what comes free is to be drawn.
  async move(rows, columns) {
    if (!this.image) return;
    const { size, grid } = sizes();
    const canvas = canvasOf(size.width, size.height);
    const context = canvas.getContext("2d");
    context.fillStyle = "#808080";
    context.fillRect(0, 0, size.width, size.height);
    context.drawImage(this.image, (columns * size.width) / grid.columns, (rows * size.height) / grid.rows);
    this.save();
    const outside = (i, j) => i < 0 || j < 0 || i >= grid.rows || j >= grid.columns;
    this.mask = this.mask.map((cells, i) => cells.map((_, j) => (outside(i - rows, j - columns) ? !this.keep : this.mask[i - rows][j - columns])));
    this.url = canvas.toDataURL("image/png");
    this.image = await decode(this.url);
    this.show();
    clearVariants();
  },
};

function clearVariants() {
  $("#variants").replaceChildren();
  $("#slider").hidden = $("#edit-details").hidden = true;
}

async function editPicture(result) {
  if (!model()?.asks) return;
  await attempt(async () => {
    const url = result.model === state.model ? result.image : (await ask("open", state.model, result.image)).image;
    go("edit");
    const value = asks.edit.of(result);
    if (value !== null) asks.edit.set([value]);
    await easel.open(url);
    if (!narrow()) details($("#edit-details"), { result }, { editable: false });  // on a phone it would hide the tools
  });
}

async function editTab() {
  if (!easel.image) { say("there is no picture to edit: draw one, or drop one here", "info"); return; }
  const { size, grid } = sizes();
  if (!easel.mask.some((row, i) => row.some((_, j) => easel.drawn(i, j)))) { say("nothing is painted: paint the part that is to be drawn again", "info"); return; }
  await run($("#edit"), async (progress) => {
    const [value] = asks.edit.values();
    const first = randomSeed();
    const mask = maskUrl(size, grid, (row, column) => easel.drawn(row, column));
    const request = { asks: Array(4).fill(value), seeds: [0, 1, 2, 3].map((i) => first + i), ...common(), known: easel.url, mask, grow: $("#soft").checked ? 1 : 0 };
    const before = easel.image;
    clearVariants();
    const side = narrow() ? sideFor(4) : 196;
    const row = cards($("#variants"), 4, (i) => variant(drawn?.reveals[i], row, i, before), { wide: 4, side });
    if (narrow()) $("#variants").scrollIntoView({ block: "start" });
    const drawn = await draw(request, progress, (reveal, i, step, done) => {
      paintReveal($("canvas", row[i]), reveal, step, { side, live: !done });
    });
    if (!drawn || drawn.event.stopped) return;
    drawn.reveals.forEach(remember);
    variant(drawn.reveals[0], row, 0, before);
    if (narrow()) $("#variants").scrollIntoView({ block: "start" });
  });
}

// Shows a variant beside the original, with a button to take it on.
function variant(reveal, row, i, before) {
  if (!reveal?.result) return;
  row.forEach((card, j) => card.classList.toggle("selected", i === j));
  const slider = $("#slider");
  slider.hidden = false;
  const [under, over] = $$("canvas", slider);
  paint(under, before, reveal.size, easel.side());
  paint(over, reveal.frames.at(-1).image, reveal.size, easel.side());
  wipe();
  details($("#edit-details"), reveal, { editable: false });
  const take = make("button", { type: "button", className: "primary", textContent: "Take this one on" });
  take.addEventListener("click", () => easel.open(reveal.result.image));
  $("#edit-details .buttons").prepend(take);
}

const wipe = () => {
  const share = $("#slider input").value / 10;
  $$("#slider canvas")[1].style.clipPath = `inset(0 0 0 ${share}%)`;
  $("#slider .before-after").style.setProperty("--at", `${share}%`);
};

async function vary(kind) {
  if (!easel.image) return;
  const { grid } = sizes();
  const [value] = asks.edit.values();
  const asked = model().asks.kind === "prompt" ? [null, easel.url, value ?? ""] : [value, easel.url];
  const count = Math.max(1, Math.round((grid.rows * grid.columns * $("#share").value) / 100));
  const rank = kind === "random" ? easel.mask.map((row) => row.map(Math.random))
    : await attempt(() => ask("confidence", state.model, ...asked));
  if (!rank) return;
  const least = rank.flat().sort((a, b) => b - a)[count - 1];
  easel.keep = false;
  easel.fill((row, column) => rank[row][column] >= least);
  $("#soft").checked = false;
}

// ---- the tab Compare

function buildColumns(given = [{ preset: "exact" }, { preset: "balanced" }, { preset: "fast" }]) {
  $("#columns").replaceChildren();
  given.forEach(addColumn);
}

function addColumn({ preset = "exact" } = {}) {
  const columns = $("#columns");
  if (columns.children.length >= 3) return;
  const choice = make("select", { name: "preset" }, ...state.presetNames.map((name) => make("option", { value: name, textContent: name, selected: name === preset })));
  const number = (name, title) => make("label", {}, `${title} `, make("input", { name, type: "text", inputMode: "decimal", placeholder: String(model().defaults[preset][name]) }));
  const remove = make("button", { type: "button", className: "icon", textContent: "×", title: "Remove these settings" });
  const box = make("fieldset", { className: "column" }, make("legend", { textContent: "Settings" }), make("label", {}, "Preset ", choice), number("steps", "Steps"), number("guidance_scale", "Guidance"), remove);
  choice.addEventListener("change", () => { $$("input", box).forEach((input) => { input.placeholder = String(model().defaults[choice.value][input.name]); }); });
  box.addEventListener("input", blankTable);
  remove.addEventListener("click", () => { if (columns.children.length > 1) { box.remove(); $("#add-column").hidden = false; blankTable(); } });
  columns.append(box);
  $("#add-column").hidden = columns.children.length >= 3;
  blankTable();
}

const readColumns = () => $$("#columns .column").map((box) => ({
  preset: $("select", box).value,
  own: Object.fromEntries($$("input", box).filter((input) => input.value.trim()).map((input) => {
    const value = Number(input.value);
    return [input.name, Number.isFinite(value) ? value : input.value];
  })),
}));

const compared = () => asks.compare.values().slice(0, MAX_COMPARED);

// Builds the table of pictures, still to be drawn; returns how to show them, and each column's cards and time.
function buildTable(values, columns) {
  const table = $("#table");
  table.style.setProperty("--columns", columns.length);
  table.replaceChildren();
  $("#compare-details").hidden = true;
  const inHeight = Math.max(120, (innerHeight - 270) / values.length);
  const side = narrow() ? (Math.min(innerWidth, 700) - 28) / columns.length - 8 : Math.min(inHeight, values.length > 2 ? 196 : 280, 800 / columns.length);
  const show = (card, reveal, step, live) => paintReveal($("canvas", card), reveal, step, { side, live });
  const cells = columns.map(({ preset, own }) => {
    const changes = Object.entries(own).map(([name, value]) => `${name.replace("_scale", "").replaceAll("_", " ")} ${value}`);
    const time = make("small", { textContent: "\u00a0" });
    const row = values.map(() => make("button", { type: "button", className: "card" }, make("canvas")));
    row.forEach((card) => show(card, undrawn(), 0, false));
    table.append(make("div", { className: "compared" }, make("h3", { textContent: [preset, ...changes].join(", ") }), ...row, time));
    return { row, time };
  });
  return { cells, show };
}

function blankTable() {
  if (!state.compared && !state.running && model()?.asks) buildTable(compared(), readColumns());
}

async function compareTab() {
  await run($("#compare"), async (progress) => {
    if (asks.compare.values().length > MAX_COMPARED) say(`the first ${MAX_COMPARED} ${things()} are compared`, "info");
    const values = compared();
    const first = Number($("#compare-seed").value) || 0;
    const columns = readColumns();
    const { cells, show } = buildTable(values, columns);
    state.compared = true;
    for (const [i, { preset, own }] of columns.entries()) {
      if (state.running.stopped) break;
      const { row, time } = cells[i];
      const drawn = await draw({ asks: values, seeds: values.map((_, j) => first + j), preset, settings: own },
        (event) => progress(event, [i / columns.length, 1 / columns.length]), (reveal, j, step, done) => show(row[j], reveal, step, !done));
      if (!drawn) continue;
      time.textContent = `${seconds(drawn.event.seconds)}${values.length > 1 ? ` · ${seconds(drawn.event.seconds / values.length)} a picture` : ""}`;
      row.forEach((card, j) => card.addEventListener("click", () => {
        $$("#table .card").forEach((other) => other.classList.toggle("selected", other === card));
        details($("#compare-details"), drawn.reveals[j]);
      }));
    }
  });
}

// ---- files

async function openFile(file) {
  if (!model()?.asks) return;
  if (state.running) { say("pictures are being drawn: wait, or stop them", "info"); return; }
  await attempt(async () => {
    if (file.size > 10 * 2 ** 20) throw new Error(`${file.name} has more than 10 MiB; make it smaller`);
    const url = await new Promise((resolve, reject) => {
      const reader = new FileReader();
      reader.onload = () => resolve(reader.result);
      reader.onerror = () => reject(new Error(`${file.name} can't be read`));
      reader.readAsDataURL(file);
    });
    const { image, restored, note } = await ask("open", state.model, url);
    if (restored) {
      asks.draw.set([restored.prompt ?? restored.label ?? null]);
      presets.set(restored.preset);
      settings.set(restored.settings);
      $("#seed").value = restored.seed;
      $("#count").value = 1;
      state.counted = true;
      $("#die").setAttribute("aria-pressed", "false");
      const other = restored.model && restored.model !== state.model ? ` (it was drawn by ${restored.model})` : "";
      say(`settings restored from ${file.name}${other}: ${note || "Draw makes it again"}`, "info");
      if (current() === "edit") await easel.open(image);
      else go("draw");
    } else {
      go("edit");
      await easel.open(image);
      say(note ? `${file.name}: ${note}` : "", "info");
    }
  });
}

// ---- tabs, keys and the rest

function go(name) {
  for (const tab of ["draw", "edit", "compare"]) {
    $(`#${tab}`).hidden = tab !== name;
    $(`#tab-${tab}`).setAttribute("aria-selected", String(tab === name));
  }
  if (name === "edit") easel.show();
  scrollTo(0, 0);
}

const tabs = { draw: drawTab, edit: editTab, compare: compareTab };
const current = () => Object.keys(tabs).find((name) => !$(`#${name}`).hidden);

function redraw() {
  if (!model()?.asks) return;
  if (state.reveals.length) state.reveals.forEach((_, i) => showReveal(i, state.step));
  else if (!state.running) blank();
  blankTable();
  easel.show();
}

for (const name of Object.keys(tabs)) {
  $(`#tab-${name}`).addEventListener("click", () => go(name));
  $(`#${name} form`).addEventListener("submit", (event) => { event.preventDefault(); tabs[name](); });
  $(`#${name} .stop`).addEventListener("click", stop);
}
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") stop();
  const field = event.target.closest("form input, select, textarea, button, a, summary");
  if (event.key === "Enter" && !field && !event.isComposing) tabs[current()]();
  if ((event.ctrlKey || event.metaKey) && event.key === "z" && current() === "edit" && !event.target.closest("input[type=text], textarea")) {
    event.preventDefault();
    if (event.shiftKey) easel.restore(easel.future, easel.past);
    else easel.restore(easel.past, easel.future);
  }
});

$("#model").addEventListener("change", (event) => choose(event.target.value));
$("#notice button").addEventListener("click", () => say(""));
$("#empty-draw").addEventListener("click", () => go("draw"));
$("#empty-file").addEventListener("click", () => $("#file").click());
$("#download").addEventListener("click", async () => { await attempt(() => ask("download", state.model)); watch(); });
$("#die").addEventListener("click", (event) => {
  const pressed = event.currentTarget.getAttribute("aria-pressed") !== "true";
  event.currentTarget.setAttribute("aria-pressed", String(pressed));
  if (pressed) $("#seed").value = randomSeed();
});
$("#seed").addEventListener("input", () => $("#die").setAttribute("aria-pressed", "false"));
asks.draw.onchange = () => { if (!state.reveals.length && !state.running) blank(); };
$("#count").addEventListener("input", () => { state.counted = true; asks.draw.onchange(); });
asks.compare.onchange = blankTable;
presets.onchange = () => { if (model()?.defaults) settings.setDefaults(model().defaults[presets.value]); };
$("#scrub").addEventListener("input", (event) => { clearInterval(playing); scrubTo(Number(event.target.value)); });
$("#order").addEventListener("change", () => scrubTo(state.step));
$("#play").addEventListener("click", play);
$("#again").addEventListener("click", drawAgain);

const canvas = easel.canvas;
canvas.addEventListener("pointerdown", (event) => {
  if (!easel.image) return;
  canvas.setPointerCapture(event.pointerId);
  easel.save();
  Object.assign(easel, { painting: true, corner: easel.at(event), last: easel.at(event), before: easel.mask });
  easel.stroke(event);
});
canvas.addEventListener("pointermove", (event) => { if (easel.painting) easel.stroke(event); });
for (const end of ["pointerup", "pointercancel"]) canvas.addEventListener(end, () => { easel.painting = false; });
$("#mask-all").addEventListener("click", () => easel.fill(() => !easel.keep));
$("#mask-clear").addEventListener("click", () => { easel.fill(() => easel.keep); $("#soft").checked = easel.soft; });
$("#soft").addEventListener("change", (event) => { easel.soft = event.target.checked; });
$("#mask-invert").addEventListener("click", () => easel.fill((row, column, value) => !value));
$("#mask-keep").addEventListener("click", () => { easel.save(); easel.keep = !easel.keep; easel.show(); });
$("#undo").addEventListener("click", () => easel.restore(easel.past, easel.future));
$("#redo").addEventListener("click", () => easel.restore(easel.future, easel.past));
$("#share").addEventListener("input", (event) => { $("#share + output").textContent = `${event.target.value}%`; });
$("#vary-random").addEventListener("click", () => vary("random"));
$("#vary-unsure").addEventListener("click", () => vary("unsure"));
$$("[data-move]").forEach((button) => button.addEventListener("click", () => easel.move(...button.dataset.move.split(",").map(Number))));
$("#slider input").addEventListener("input", wipe);
$("#add-column").addEventListener("click", () => addColumn());
$("#file").addEventListener("change", (event) => { if (event.target.files[0]) openFile(event.target.files[0]); event.target.value = ""; });
document.addEventListener("dragover", (event) => { event.preventDefault(); document.body.classList.add("dropping"); });
document.addEventListener("dragleave", (event) => { if (!event.relatedTarget) document.body.classList.remove("dropping"); });
document.addEventListener("drop", (event) => {
  event.preventDefault();
  document.body.classList.remove("dropping");
  if (event.dataTransfer.files[0]) openFile(event.dataTransfer.files[0]);
});
$("#theme").addEventListener("click", () => {
  const dark = getComputedStyle(document.documentElement).colorScheme === "dark";
  document.documentElement.dataset.theme = dark ? "light" : "dark";
  redraw();
});
addEventListener("resize", redraw);
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);
addEventListener("pagehide", () => { if (state.running?.ticket) navigator.sendBeacon("gradio_api/call/stop", new Blob([JSON.stringify({ data: [state.running.ticket] })], { type: "application/json" })); });

$("#history").hidden = true;
watch();
