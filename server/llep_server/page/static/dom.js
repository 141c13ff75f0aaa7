// Elements, and tables that keep their rows: what has focus or is being read must not be made anew every second.

export const by = (id) => document.getElementById(id);

/** h("button", {class: "primary", onclick: f}, "text", node, ...): an element. */
export function h(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (value === undefined || value === null || value === false) continue;
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.filter((child) => child !== null && child !== undefined && child !== false));
  return element;
}

export function text(element, words) {
  if (element.textContent !== words) element.textContent = words;
}

export function empty(words, ...more) {
  return h("p", { class: "empty" }, words, ...more);
}

/**
 * A table in `place`. Columns: {head, cell(item) -> text or Node, class, title(item)}; a Node is made again only when
 * column.version(item), which such a column must have, says something else. isSilent: its head is heard, not seen.
 */
export class Table {
  constructor(place, columns, { key, none, caption, row = () => {} }) {
    Object.assign(this, { place, columns, key, none, row });
    this.rows = new Map();
    this.body = h("tbody");
    const heads = columns.map((column) => h("th", { scope: "col", class: column.class }, column.isSilent ? h("span", { class: "visually-hidden" }, column.head) : column.head));
    this.table = h("table", {}, h("caption", { class: "visually-hidden" }, caption), h("thead", {}, h("tr", {}, ...heads)), this.body);
  }

  update(items) {
    if (!items.length) return this.place.replaceChildren(typeof this.none === "string" ? empty(this.none) : this.none());
    if (this.place.firstChild !== this.table) this.place.replaceChildren(this.table);
    const left = new Set(this.rows.keys());
    let after = null;
    for (const item of items) {
      const key = String(this.key(item));
      left.delete(key);
      const row = this.rows.get(key) ?? this.add(key);
      this.fill(row, item);
      const next = after ? after.nextSibling : this.body.firstChild;
      if (next !== row.element) this.body.insertBefore(row.element, next);
      after = row.element;
    }
    for (const key of left) {
      this.rows.get(key).element.remove();
      this.rows.delete(key);
    }
  }

  add(key) {
    const cells = this.columns.map((column) => h("td", { class: column.class, "data-head": column.head }));
    const row = { cells, element: h("tr", {}, ...cells), versions: [] };
    this.rows.set(key, row);
    return row;
  }

  fill(row, item) {
    this.row(row.element, item);
    this.columns.forEach((column, index) => {
      const cell = row.cells[index];
      if (column.title) cell.title = column.title(item);
      if (!column.version) return text(cell, column.cell(item));
      const version = String(column.version(item));
      if (row.versions[index] === version) return;
      row.versions[index] = version;
      cell.replaceChildren(column.cell(item));
    });
  }
}

/** Big figures: [{name, value, note, tone}] into a <dl>. */
export function tiles(list, figures) {
  while (list.children.length > figures.length) list.lastChild.remove();
  while (list.children.length < figures.length) {
    list.append(h("div", { class: "tile" }, h("dt"), h("dd"), h("dd", { class: "note" })));
  }
  figures.forEach(({ name, value, note, tone }, index) => {
    const [title, figure, remark] = list.children[index].children;
    text(title, name);
    text(figure, value);
    text(remark, note ?? "");
    list.children[index].dataset.tone = tone ?? "";
  });
}

/** A share of one as a bar, with the figure as text beside it. */
export function meter(share, words, tone = "") {
  const bar = h("span", { class: "meter", "aria-hidden": true, "data-tone": tone }, h("i"));
  bar.firstChild.style.inlineSize = `${Math.min(Math.max(share, 0), 1) * 100}%`;
  return h("span", { class: "metered" }, bar, words);
}

/** Ask before something that others will notice. Resolves to whether the answer was yes. */
export function ask(title, body, yes) {
  const dialog = by("ask");
  text(by("ask-h"), title);
  text(by("ask-yes"), yes);
  by("ask-body").replaceChildren(...[body].flat());
  dialog.returnValue = "no";
  dialog.showModal();
  return new Promise((resolve) => {
    dialog.addEventListener("close", () => resolve(dialog.returnValue === "yes"), { once: true });
  });
}

/** Said by a screen reader, and not more than once. */
export function announce(words) {
  text(by("announcer"), words);
}

export function outcome(element, tone, ...content) {
  element.dataset.tone = tone;
  element.replaceChildren(...content);
}

/** The value of a group of radio buttons. */
export function chosen(fieldset) {
  return fieldset.querySelector("input:checked").value;
}

/** before -> after for every key that changes. */
export function diffTable(diff, format) {
  const rows = Object.entries(diff).map(([key, [before, after]]) =>
    h("tr", {}, h("th", { scope: "row" }, key), h("td", {}, h("del", {}, format(before))), h("td", {}, h("ins", {}, format(after)))),
  );
  const heads = ["Setting", "Before", "After"].map((head) => h("th", { scope: "col" }, head));
  return h("table", { class: "diff" }, h("thead", {}, h("tr", {}, ...heads)), h("tbody", {}, ...rows));
}
