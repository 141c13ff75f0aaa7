// Long lists, newest first: the first page is asked again and again, older ones once, when somebody wants them.

import { by } from "./dom.js";

const SIZE = 50;
const MOST = 1000; // rows on the page; for more there is the command line

/** {load, clear} of a list that `ask({limit, cursor})` answers and `table` shows; `id` names what tells rows apart. */
export function pages(button, ask, table, id) {
  let items = new Map();
  let cursor = null;

  function show(data) {
    for (const item of data) items.set(item[id], item);
    const sorted = [...items.values()].sort((a, b) => b[id] - a[id]);
    items = new Map(sorted.slice(0, MOST).map((item) => [item[id], item]));
    table.update([...items.values()]);
    by(button).hidden = cursor === null || items.size >= MOST;
  }

  async function load() {
    const isFirst = items.size === 0;
    const page = await ask({ limit: SIZE });
    if (isFirst) cursor = page.has_more ? page.next_cursor : null;
    show(page.data);
    return page.data;
  }

  async function loadOlder() {
    by(button).disabled = true;
    try {
      const page = await ask({ limit: SIZE, cursor });
      cursor = page.has_more ? page.next_cursor : null;
      show(page.data);
    } finally {
      by(button).disabled = false;
    }
  }

  function clear() {
    items = new Map();
    cursor = null;
    by(button).hidden = true;
  }

  by(button).addEventListener("click", loadOlder);
  return { load, clear };
}
