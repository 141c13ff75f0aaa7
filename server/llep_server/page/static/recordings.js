// Recordings of counts, and operations that sweep settings over one.

import { call, download, get } from "./api.js";
import { VERDICTS } from "./decisions.js";
import { ask, by, empty, h, meter, outcome, Table } from "./dom.js";
import * as format from "./format.js";

const OVER = new Set(["done", "failed", "cancelled", "deleted"]);

export function recordingsView(app) {
  const table = recordingsTable({ stop, save, remove, tune });
  const shown = new Map();
  const results = new Map();
  let recordings = [];

  async function load() {
    recordings = (await get("v1/recordings")).data;
    table.update(recordings);
  }

  async function loadOperations() {
    const { data: listed } = await get("v1/operations");
    const data = await Promise.all(listed.map(withResult));
    const place = by("operations");
    for (const [id, card] of shown) if (!data.some((one) => one.id === id)) shown.delete(id) && card.remove();
    if (!data.length) return place.replaceChildren(empty("No tuning yet. Tune sweeps thresholds over a finished recording and ranks the settings; it needs no GPU and leaves engines alone."));
    if (!shown.size) place.replaceChildren();
    data.forEach((operation, index) => {
      const card = operationCard(operation, { cancel, use });
      const old = shown.get(operation.id);
      if (old?.dataset.version === card.dataset.version) return;
      const hadFocus = old?.contains(document.activeElement);
      if (old) old.replaceWith(card);
      else place.insertBefore(card, place.children[index] ?? null);
      if (hadFocus) card.querySelector("button").focus();
      shown.set(operation.id, card);
    });
  }

  /** A list of operations comes without their results: those of the ended are asked for once. */
  async function withResult(operation) {
    if (operation.state !== "done") return operation;
    if (!results.has(operation.id)) results.set(operation.id, (await get(`v1/operations/${encodeURIComponent(operation.id)}`)).result);
    return { ...operation, result: results.get(operation.id) };
  }

  async function record(event) {
    event.preventDefault();
    if (!app.engine) return outcome(by("record-outcome"), "bad", "No engine is here to record.");
    await guarded("record-outcome", async () => {
      const steps = Number(by("record-steps").value);
      const body = { engine: app.engine, duration_s: Number(by("record-duration").value), reason: by("record-reason").value, ...(steps ? { steps } : {}) };
      const recording = await call("POST", "v1/recordings", { body });
      by("record-reason").value = "";
      return `${recording.id} is recording ${recording.engine}.`;
    });
  }

  function stop(recording) {
    return guarded("record-outcome", async () => {
      await call("POST", `v1/recordings/${encodeURIComponent(recording.id)}/stop`, {});
      return `${recording.id} stops; its last part arrives within a few seconds.`;
    });
  }

  function save(recording) {
    return guarded("record-outcome", async () => {
      await download(`v1/recordings/${encodeURIComponent(recording.id)}/data`, {}, `${recording.id}.tar`);
      return `${recording.id}.tar: Parquet parts; llep simulate, tune and report read the folder.`;
    });
  }

  async function remove(recording) {
    if (!(await ask("Delete this recording?", h("p", {}, `${recording.id} of ${recording.engine}, ${format.bytes(recording.bytes)}. It can't be brought back.`), "Delete"))) return;
    await guarded("record-outcome", async () => {
      await call("DELETE", `v1/recordings/${encodeURIComponent(recording.id)}`);
      return `${recording.id} is deleted.`;
    });
  }

  function tune(recording) {
    return guarded("operation-outcome", async () => {
      const operation = await call("POST", "v1/tuning", { body: { recording: recording.id, cost_model: by("tuning-costs").value || null } });
      return `${operation.id} sweeps settings over ${recording.id}.`;
    });
  }

  function cancel(operation) {
    return guarded("operation-outcome", async () => {
      await call("DELETE", `v1/operations/${encodeURIComponent(operation.id)}`);
      return `${operation.id} is ${OVER.has(operation.state) ? "forgotten" : "cancelled"}.`;
    });
  }

  function use(patch, operation) {
    // For the engine that was recorded: another one's traffic may ask for something else.
    const recorded = recordings.find((one) => one.id === operation.arguments.recording)?.engine;
    const engine = app.engines.find((one) => one.id === recorded)?.id;
    app.proposal = { patch, reason: `found by ${operation.id}${recorded ? `, over traffic of ${recorded}` : ""}`, engine };
    app.open("settings", engine);
  }

  async function guarded(place, run) {
    try {
      outcome(by(place), "good", await run());
    } catch (error) {
      if (error.status === 401 || error.status === 403) app.failed(error);
      outcome(by(place), "bad", error.message);
    }
    app.refresh("recordings", "operations");
  }

  by("record-form").addEventListener("submit", record);
  return {
    tasks: [
      { name: "recordings", every: 2, run: load, place: "recordings" },
      { name: "operations", every: 2, run: loadOperations, place: "operations" },
    ],
  };
}

function recordingsTable({ stop, save, remove, tune }) {
  const button = (words, act, recording) => h("button", { type: "button", class: "small", onclick: () => act(recording), "aria-label": `${words} ${recording.id}` }, words);
  const buttons = (recording) => (OVER.has(recording.state) ? [button("Download", save, recording), button("Tune", tune, recording), button("Delete", remove, recording)] : [button("Stop", stop, recording)]);
  return new Table(
    by("recordings"),
    [
      { head: "Recording", class: "name", cell: (one) => one.id },
      { head: "Engine", cell: (one) => one.engine },
      { head: "State", version: (one) => one.state, cell: (one) => h("span", { class: "state", "data-state": { failed: "stale", done: "live" }[one.state] ?? "starting" }, h("i", { class: "dot", "aria-hidden": true }), one.state) },
      { head: "Steps", class: "number", cell: (one) => (one.steps_wanted ? `${format.count(one.steps)} of ${format.count(one.steps_wanted)}` : format.count(one.steps)) },
      { head: "Size", class: "number", cell: (one) => format.bytes(one.bytes) },
      { head: "Started", cell: (one) => format.clock(one.created_s) },
      { head: "Who", cell: (one) => one.author },
      { head: "Reason", class: "long", cell: (one) => one.problem || one.reason },
      { head: "Actions", isSilent: true, version: (one) => one.state, cell: (one) => h("span", { class: "buttons" }, ...buttons(one)) },
    ],
    { key: (one) => one.id, none: "No recording yet. One of a minute under real traffic is enough to simulate and tune with.", caption: "Recordings" },
  );
}

const WORDS_BY_STATE = {
  waiting: "One is done after the other.",
  starting: "The simulator starts; its first time on a machine it compiles the planners, which takes a minute.",
  running: "The recording is replayed under each choice of settings.",
};

function verdictWords({ verdict, reason, patch }) {
  const isHeld = verdict === "worth_it" && !Object.keys(patch).length;
  return `${VERDICTS[verdict][0]}: ${reason}${isHeld ? "; what holds now is as good as anything that was tried with as many slots" : ""}`;
}

function operationCard(operation, { cancel, use }) {
  const { id, state, progress_ratio: progress, arguments: order, result, error } = operation;
  const isOver = OVER.has(state);
  const patch = Object.entries(result?.patch ?? {});
  const words = error?.message ?? (result ? verdictWords(result) : WORDS_BY_STATE[state === "running" && !progress ? "starting" : state]);
  const card = h(
    "div",
    { class: "advice", "data-tone": { failed: "bad", done: "good" }[state] ?? "info" },
    h("div", { class: "actions" },
      h("h3", {}, `${order.recording}: ${state}`),
      !isOver && meter(progress, format.percent(progress)),
      h("button", { type: "button", class: "small", onclick: () => cancel(operation), "aria-label": `${isOver ? "Forget" : "Cancel"} ${id}` }, isOver ? "Forget" : "Cancel"),
    ),
    words && h("p", {}, words),
    result?.slots_reason && h("p", {}, `Slots: ${result.slots_reason}.`),
    patch.length > 0 && h("div", { class: "actions" }, h("code", {}, patch.map(([key, value]) => `${key}=${value}`).join(" ")), h("button", { type: "button", onclick: () => use(result.patch, operation) }, "Look at it in Settings")),
  );
  card.dataset.version = JSON.stringify(operation);
  return card;
}
