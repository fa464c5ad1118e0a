// Form controls: what to draw, and the sampling settings.

const make = (tag, properties = {}, ...children) => {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  return element;
};
export { make };

const MATCHES = 60;
const COMPLETIONS = 6;

// The field for what is asked for. A model's `asks.kind` chooses it: `class` (chips of names), `prompt` (words) or `none`.
// Values are class numbers, prompts, or null for neither.
export class Asks {
  constructor(container, { multiple = true, title = "What to draw", check = null, examples = false } = {}) {
    Object.assign(this, { container, multiple, title, check, examples, asks: { kind: "none" }, chosen: [null] });
  }

  setModel(asks) {
    const Field = { class: Classes, prompt: Prompts }[asks.kind] || Nothing;
    const kept = this.field instanceof Field && this.field.fits(asks) ? this.field.values() : [];
    this.asks = asks;
    this.container.replaceChildren();
    this.field = new Field(this, asks);
    this.field.set(kept.length ? kept : this.field.suggestion());
  }

  // One value at least.
  values() { return this.field.values().length ? this.field.values() : [null]; }

  set(values) {
    this.field.set(this.multiple ? [...values] : values.slice(0, 1));
    this.onchange?.();
  }

  name(value) { return this.field.name(value); }

  // The value that a drawn picture was asked for by; null: none of this model's.
  of(picture) { return this.field.of(picture); }
}

class Nothing {
  constructor({ container }) { container.append(make("p", { className: "hint", textContent: "This model has no classes to choose from." })); }
  fits() { return true; }
  suggestion() { return [null]; }
  values() { return [null]; }
  set() {}
  name() { return null; }
  of() { return null; }
}

// A list below a field, to complete what is typed: arrows choose, Enter takes, Escape closes.
class Completion {
  constructor(input, { render, take }) {
    Object.assign(this, { input, render, take, found: [], index: -1 });
    this.list = make("ul", { id: `${input.id}-list`, role: "listbox", hidden: true });
    input.setAttribute("aria-autocomplete", "list");
    input.setAttribute("aria-controls", this.list.id);
    input.addEventListener("blur", () => this.close());
    this.expand();
  }

  get open() { return !this.list.hidden; }

  show(found, index) {
    this.found = found;
    this.list.replaceChildren(...found.map((value, i) => {
      const item = make("li", { id: `${this.list.id}-${i}`, role: "option" }, ...this.render(value));
      item.addEventListener("pointerdown", (event) => { event.preventDefault(); this.take(value); });
      return item;
    }));
    this.list.hidden = !found.length;
    this.expand();
    this.active(index);
  }

  active(index) {
    this.index = index;
    const items = [...this.list.children];
    items.forEach((item, i) => item.setAttribute("aria-selected", String(i === index)));
    items[index]?.scrollIntoView({ block: "nearest" });
    if (items[index]) this.input.setAttribute("aria-activedescendant", items[index].id);
    else this.input.removeAttribute("aria-activedescendant");
  }

  close() {
    this.list.hidden = true;
    this.expand();
    this.input.removeAttribute("aria-activedescendant");
  }

  expand() { if (this.input.role === "combobox") this.input.setAttribute("aria-expanded", String(this.open)); }

  // Whether the key was the list's.
  key(event) {
    const step = { ArrowDown: 1, ArrowUp: -1 }[event.key];
    if (!this.open || event.isComposing) return false;
    if (step) this.active(Math.max(0, Math.min(this.found.length - 1, this.index + step)));
    else if (event.key === "Enter" && this.index >= 0) this.take(this.found[this.index]);
    else if (event.key === "Escape") this.close();
    else return false;
    event.preventDefault();
    event.stopPropagation();
    return true;
  }
}

// Classes, chosen by their names.
class Classes {
  constructor(owner, { names, aliases }) {
    Object.assign(this, { owner, names, aliases, chosen: [] });
    const id = `${owner.container.id}-input`;
    this.input = make("input", { id, type: "text", role: "combobox", spellcheck: false, placeholder: "Search the classes" });
    this.completion = new Completion(this.input, {
      render: (label) => [this.name(label), ...(label === null ? [] : [make("small", { textContent: label })])],
      take: (label) => this.choose(label),
    });
    this.chips = make("div", { className: "chips" });
    owner.container.append(make("label", { htmlFor: id, textContent: owner.title }), this.chips, make("div", { className: "combo" }, this.input, this.completion.list));
    this.input.addEventListener("input", () => this.search());
    this.input.addEventListener("focus", () => this.search());
    this.input.addEventListener("keydown", (event) => this.key(event));
  }

  fits({ names }) { return names.join() === this.names.join(); }

  suggestion() {
    const count = this.names.length;
    if (!this.owner.multiple) return [0];
    return [...new Set([0, 1, 2, 3].map((i) => Math.round((i * (count - 1)) / 3)))].slice(0, Math.min(4, count));
  }

  values() { return this.chosen; }

  set(labels) {
    this.chosen = labels;
    this.show();
  }

  // The name of a class; with its number, if another one is called the same.
  name(label) {
    if (label === null) return "no class";
    const { names } = this;
    return names[label] + (names.indexOf(names[label]) === names.lastIndexOf(names[label]) ? "" : ` (${label})`);
  }

  of({ label }) {
    const found = this.names.indexOf(label);
    return found >= 0 ? found : /^\d+$/.test(label) && label < this.names.length ? Number(label) : null;
  }

  show() {
    this.chips.replaceChildren(...this.chosen.map((label, index) => {
      const remove = make("button", { type: "button", textContent: "×" });
      remove.setAttribute("aria-label", `Remove ${this.name(label)}`);
      remove.addEventListener("click", () => this.owner.set(this.chosen.filter((_, i) => i !== index)));
      return make("span", { className: "chip" }, this.name(label), remove);
    }));
  }

  matches() {
    const wanted = this.input.value.trim().toLowerCase();
    const found = [];
    this.names.forEach((name, label) => {
      const [own, others] = [name.toLowerCase(), this.aliases[label] || ""];
      const rank = own.startsWith(wanted) ? 0 : own.includes(wanted) ? 1 : others.includes(wanted) || String(label) === wanted ? 2 : 3;
      if (rank < 3) found.push([rank, label]);
    });
    found.sort((a, b) => a[0] - b[0] || a[1] - b[1]);
    const labels = found.slice(0, MATCHES).map(([, label]) => label);
    return "no class".startsWith(wanted) ? [...labels, null] : labels;
  }

  search() { this.completion.show(this.matches(), this.input.value ? 0 : -1); }

  choose(label) {
    const chosen = this.owner.multiple ? [...new Set([...this.chosen, label])] : [label];
    this.input.value = "";
    this.completion.close();
    this.owner.set(chosen);
  }

  key(event) {
    if (["ArrowDown", "ArrowUp"].includes(event.key) && !this.completion.open) this.search();
    if (this.completion.key(event)) return;
    if (event.key === "Backspace" && !this.input.value && this.chosen.length) this.owner.set(this.chosen.slice(0, -1));
  }
}

const WORD_BEFORE = /[\p{L}\p{N}_]+(?:[-'’][\p{L}\p{N}_]+)*[-'’]?$/u;  // as `split_words` cuts them
const WORD_AFTER = /^[\p{L}\p{N}_'’-]*/u;

// Prompts, one a line; words that the model knows are completed, unknown ones are told below.
class Prompts {
  constructor(owner, { words, examples }) {
    Object.assign(this, { owner, words });
    const id = `${owner.container.id}-input`;
    this.input = make("textarea", { id, rows: 2, spellcheck: false, placeholder: "Describe a picture", autocapitalize: "none", enterKeyHint: "go" });
    this.completion = new Completion(this.input, { render: (word) => [this.marked(word)], take: (word) => this.complete(word) });
    this.note = make("output", { className: "hint", htmlFor: id });
    this.note.setAttribute("aria-live", "polite");
    owner.container.append(make("label", { htmlFor: id, textContent: owner.title }), make("div", { className: "combo" }, this.input, this.completion.list), this.note);
    if (owner.examples && examples.length) owner.container.append(this.examples(examples));
    this.suggested = examples[0] ?? "";
    this.input.addEventListener("input", () => { this.search(); this.changed(); });
    this.input.addEventListener("blur", () => this.checkSoon());
    this.input.addEventListener("keydown", (event) => this.key(event));
  }

  fits() { return this.input.value.trim() !== this.suggested; }
  suggestion() { return [this.suggested]; }
  values() { return this.lines().filter(Boolean); }
  name(prompt) { return prompt || "no prompt"; }
  of({ prompt }) { return prompt === undefined ? null : prompt ?? ""; }

  lines() {
    const lines = this.input.value.split("\n").map((line) => line.trim());
    return this.owner.multiple ? lines : [lines.filter(Boolean).join(" ")];
  }

  set(prompts) {
    this.input.value = prompts.map((prompt) => prompt ?? "").join("\n");
    this.completion.close();
    this.checkSoon(0);
  }

  // Buttons that put an example in the place of the line with the cursor.
  examples(texts) {
    const buttons = texts.map((text) => {
      const button = make("button", { type: "button", textContent: text });
      button.addEventListener("click", () => {
        const { value, selectionStart } = this.input;
        const start = value.lastIndexOf("\n", selectionStart - 1) + 1;
        const end = value.indexOf("\n", start);
        this.input.setRangeText(text, start, end < 0 ? value.length : end, "end");
        this.changed();
        this.checkSoon(0);
      });
      return button;
    });
    return make("div", { className: "examples" }, ...buttons);
  }

  changed() { this.owner.onchange?.(); }

  // The word with the cursor at or after its letters: where it is, and its letters up to the cursor.
  word() {
    const { value, selectionStart, selectionEnd } = this.input;
    const typed = selectionStart === selectionEnd ? value.slice(0, selectionStart).match(WORD_BEFORE)?.[0] ?? "" : "";
    const rest = value.slice(selectionStart).match(WORD_AFTER)[0];
    return { typed: typed.toLowerCase(), start: selectionStart - typed.length, end: selectionStart + rest.length, whole: (typed + rest).toLowerCase() };
  }

  search() {
    const { typed, whole } = this.word();
    const found = typed ? this.words.filter((word) => word.startsWith(typed) && word !== whole).slice(0, COMPLETIONS) : [];
    this.completion.show(found, this.words.includes(whole) ? -1 : 0);
    this.checkSoon();
  }

  marked(word) {
    const { length } = this.word().typed;
    return make("span", {}, word.slice(0, length), make("b", { textContent: word.slice(length) }));
  }

  complete(word) {
    const { start, end } = this.word();
    this.input.setRangeText(word, start, end, "end");
    this.completion.close();
    this.changed();
    this.checkSoon(0);
  }

  // Tells what is not read of the prompts, once the typing pauses; not of a word that is being completed.
  checkSoon(wait = 400) {
    clearTimeout(this.timer);
    this.timer = setTimeout(() => { if (!this.completion.open) this.tell(); }, wait);
  }

  async tell() {
    const prompts = this.values();
    const asked = prompts.join("\n");
    if (this.told === asked) return;
    this.told = asked;
    const { notes, draws } = prompts.length && this.owner.check ? await this.owner.check(prompts) : { notes: [], draws: true };
    if (this.told !== asked) return;
    this.note.textContent = notes.join(" · ");
    this.note.classList.toggle("wrong", !draws);
  }

  key(event) {
    if (this.completion.key(event) || event.key !== "Enter" || event.isComposing) return;
    if (event.shiftKey && this.owner.multiple) return;  // another line
    event.preventDefault();
    this.completion.close();
    this.input.form.requestSubmit();
  }
}

export const seconds = (value) => {
  if (value >= 90) return `${Math.round(value / 60)} min`;
  return `${value >= 10 ? Math.round(value) : value.toFixed(value < 1 ? 2 : 1)} s`;
};

// Presets, each with the seconds of a picture on this machine.
export class Presets {
  constructor(container) { this.container = container; this.value = "exact"; }

  setModel(model, presets) {
    const hints = { exact: "as trained", balanced: "fewer steps", fast: "fewest steps" };
    const legend = this.container.querySelector("legend");
    this.container.replaceChildren(legend, ...presets.map((name) => {
      const radio = make("input", { type: "radio", name: "preset", value: name, checked: name === this.value });
      radio.addEventListener("change", () => { this.value = name; this.onchange?.(); });
      const time = model.seconds?.[name];
      return make("label", { className: "preset" }, radio, make("b", { textContent: name }),
        make("small", { textContent: time ? `${seconds(time)} a picture` : hints[name] || "" }));
    }));
  }

  set(value) {
    this.value = value;
    this.container.querySelectorAll("input").forEach((radio) => { radio.checked = radio.value === value; });
    this.onchange?.();
  }
}

// All sampling settings. An empty field is the preset's own value, which it shows.
export class Settings {
  constructor(container) { this.container = container; this.fields = []; }

  build(described) {
    const box = this.container.querySelector("div");
    this.fields = described.map((setting) => {
      const inputs = setting.kind === "choice"
        ? [make("select", {}, make("option", { value: "" }), ...setting.choices.map((value) => make("option", { value, textContent: value })))]
        : Array.from({ length: setting.kind === "pair" ? 2 : 1 }, () => make("input", { type: "text", inputMode: "decimal", spellcheck: false }));
      inputs.forEach((input, i) => {
        input.id = `setting-${setting.name}${i ? `-${i}` : ""}`;
        input.addEventListener("input", () => this.count());
      });
      const title = setting.name.replaceAll("_", " ");
      const label = make("label", { htmlFor: inputs[0].id, textContent: title });
      if (inputs[1]) inputs[1].setAttribute("aria-label", `${title}, until`);
      const help = make("small", { textContent: setting.help.replaceAll("`", "") });
      box.append(make("div", { className: "setting" }, label, make("span", { className: "joined" }, ...inputs), help));
      return { ...setting, inputs };
    });
    const reset = make("button", { type: "button", textContent: "Reset all" });
    reset.addEventListener("click", () => this.set({}));
    box.append(reset);
  }

  setDefaults(defaults) {
    const shown = (value) => (value === null ? "off" : String(value));
    for (const { name, kind, inputs } of this.fields) {
      const values = kind === "pair" ? defaults[name] : [defaults[name]];
      inputs.forEach((input, i) => {
        if (kind === "choice") input.options[0].textContent = shown(values[i]);
        else input.placeholder = shown(values[i]);
      });
    }
    this.defaults = defaults;
  }

  set(values) {
    for (const { name, kind, inputs } of this.fields) {
      const given = values[name];
      inputs.forEach((input, i) => {
        const value = kind === "pair" ? given?.[i] : given;
        input.value = value === undefined ? "" : value === null ? "off" : String(value);
      });
    }
    this.count();
    if (Object.keys(values).length) this.container.open = true;
  }

  // The settings that were filled in. Throws an Error for text that is no number.
  values() {
    const values = {};
    for (const { name, kind, optional, inputs } of this.fields) {
      const texts = inputs.map((input) => input.value.trim());
      if (texts.every((text) => !text)) continue;
      if (kind === "choice") values[name] = texts[0];
      else if (optional && texts[0].toLowerCase() === "off") values[name] = null;
      else {
        const numbers = texts.map((text, i) => (text ? Number(text) : this.defaults[name][i]));
        if (numbers.some((number) => !Number.isFinite(number))) {
          throw new Error(`${name}: got ${texts.find((text) => !Number.isFinite(Number(text)))}, expected a number${optional ? " or off" : ""}`);
        }
        values[name] = kind === "pair" ? numbers : numbers[0];
      }
    }
    return values;
  }

  count() {
    const changed = this.fields.filter(({ inputs }) => inputs.some((input) => input.value.trim())).length;
    this.container.querySelector("summary output").textContent = changed ? `${changed} changed` : "";
  }
}
