// Form controls: what to draw, and the sampling settings.

const make = (tag, properties = {}, ...children) => {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  return element;
};
export { make };

const MATCHES = 60;

// The field for what is asked for. A model's `asks.kind` chooses it: `class` (chips of names) or `none`.
export class Asks {
  constructor(container, { multiple = true, title = "What to draw" } = {}) {
    Object.assign(this, { container, multiple, title, asks: { kind: "none", names: [], aliases: [] }, chosen: [] });
  }

  setModel(asks) {
    const kept = this.asks.names.join() === asks.names.join() && this.chosen.length;
    this.asks = asks;
    if (!kept) this.chosen = asks.kind === "class" ? this.suggestion() : [null];
    this.container.replaceChildren();
    if (asks.kind !== "class") {
      this.container.append(make("p", { className: "hint", textContent: "This model has no classes to choose from." }));
      return;
    }
    const id = `${this.container.id}-input`;
    this.input = make("input", { id, type: "text", role: "combobox", spellcheck: false, placeholder: "Search the classes" });
    this.input.setAttribute("aria-autocomplete", "list");
    this.input.setAttribute("aria-expanded", "false");
    this.list = make("ul", { role: "listbox", hidden: true });
    this.chips = make("div", { className: "chips" });
    this.container.append(make("label", { htmlFor: id, textContent: this.title }), this.chips, make("div", { className: "combo" }, this.input, this.list));
    this.input.addEventListener("input", () => this.search());
    this.input.addEventListener("focus", () => this.search());
    this.input.addEventListener("blur", () => this.close());
    this.input.addEventListener("keydown", (event) => this.key(event));
    this.show();
  }

  suggestion() {
    const count = this.asks.names.length;
    if (!this.multiple) return [0];
    return [...new Set([0, 1, 2, 3].map((i) => Math.round((i * (count - 1)) / 3)))].slice(0, Math.min(4, count));
  }

  // Class numbers, or null for no class; one at least.
  labels() { return this.chosen.length ? this.chosen : [null]; }

  set(labels) {
    this.chosen = this.multiple ? [...labels] : labels.slice(0, 1);
    if (this.chips) this.change();
  }

  // The name of a class; with its number, if another one is called the same.
  name(label) {
    if (label === null) return "no class";
    const { names } = this.asks;
    return names[label] + (names.indexOf(names[label]) === names.lastIndexOf(names[label]) ? "" : ` (${label})`);
  }

  // The class that a drawn picture names; null: none of this model's.
  number(name) {
    const found = this.asks.names.indexOf(name);
    return found >= 0 ? found : /^\d+$/.test(name) && name < this.asks.names.length ? Number(name) : null;
  }

  show() {
    this.chips.replaceChildren(...this.chosen.map((label, index) => {
      const remove = make("button", { type: "button", textContent: "×" });
      remove.setAttribute("aria-label", `Remove ${this.name(label)}`);
      remove.addEventListener("click", () => { this.chosen.splice(index, 1); this.change(); });
      return make("span", { className: "chip" }, this.name(label), remove);
    }));
  }

  change() {
    this.show();
    this.onchange?.();
  }

  matches() {
    const wanted = this.input.value.trim().toLowerCase();
    const found = [];
    this.asks.names.forEach((name, label) => {
      const [own, others] = [name.toLowerCase(), this.asks.aliases[label] || ""];
      const rank = own.startsWith(wanted) ? 0 : own.includes(wanted) ? 1 : others.includes(wanted) || String(label) === wanted ? 2 : 3;
      if (rank < 3) found.push([rank, label]);
    });
    found.sort((a, b) => a[0] - b[0] || a[1] - b[1]);
    const labels = found.slice(0, MATCHES).map(([, label]) => label);
    return "no class".startsWith(wanted) ? [...labels, null] : labels;
  }

  search() {
    this.found = this.matches();
    this.list.replaceChildren(...this.found.map((label) => {
      const item = make("li", { role: "option", textContent: this.name(label) });
      if (label !== null) item.append(make("small", { textContent: label }));
      item.addEventListener("pointerdown", (event) => { event.preventDefault(); this.choose(label); });
      return item;
    }));
    this.active(this.input.value ? 0 : -1);
    this.list.hidden = !this.found.length;
    this.input.setAttribute("aria-expanded", String(!this.list.hidden));
  }

  active(index) {
    this.index = index;
    [...this.list.children].forEach((item, i) => item.setAttribute("aria-selected", String(i === index)));
    this.list.children[index]?.scrollIntoView({ block: "nearest" });
  }

  choose(label) {
    if (!this.multiple) this.chosen = [label];
    else if (!this.chosen.includes(label)) this.chosen.push(label);
    this.input.value = "";
    this.close();
    this.change();
  }

  close() {
    this.list.hidden = true;
    this.input.setAttribute("aria-expanded", "false");
  }

  key(event) {
    const open = !this.list.hidden;
    if (event.key === "ArrowDown" || event.key === "ArrowUp") {
      if (!open) this.search();
      this.active(Math.max(0, Math.min(this.found.length - 1, this.index + (event.key === "ArrowDown" ? 1 : -1))));
      event.preventDefault();
    } else if (event.key === "Enter" && open && this.index >= 0) {
      this.choose(this.found[this.index]);
      event.preventDefault();
      event.stopPropagation();
    } else if (event.key === "Escape" && open) {
      this.close();
      event.stopPropagation();
    } else if (event.key === "Backspace" && !this.input.value && this.chosen.length) {
      this.chosen.pop();
      this.change();
    }
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
