// The audit trail: who changed what and why, engines coming and going, failures.

import { get } from "./api.js";
import { by, h, Table } from "./dom.js";
import * as format from "./format.js";
import { pages } from "./pages.js";

const BAD = /stale|failed|error|refused|set_aside/;

export function eventsView() {
  const events = pages("events-more", (query) => get("v1/events", query), eventsTable(), "id");
  return { tasks: [{ name: "events", every: 4, run: events.load, place: "events" }] };
}

function eventsTable() {
  return new Table(
    by("events"),
    [
      { head: "When", cell: (event) => format.clock(event.time_s), title: (event) => new Date(event.time_s * 1000).toISOString() },
      { head: "What", version: (event) => event.id, cell: (event) => h("span", { class: "state", "data-state": BAD.test(event.kind) ? "stale" : "quiet" }, h("i", { class: "dot", "aria-hidden": true }), format.decision(event.kind)) },
      { head: "Engine", cell: (event) => event.engine ?? "all" },
      { head: "Who", cell: (event) => event.author },
      { head: "Message", class: "long", version: (event) => event.id, cell: messageWithData },
    ],
    { key: (event) => event.id, none: "Nothing has happened yet.", caption: "Events" },
  );
}

function messageWithData(event) {
  if (!Object.keys(event.data).length) return h("span", {}, event.message);
  return h("details", {}, h("summary", {}, event.message), h("pre", {}, JSON.stringify(event.data, null, 1)));
}
