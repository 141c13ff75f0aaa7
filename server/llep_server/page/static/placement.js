// Resident replicas: what holds, what the scheduler suggests and what that is worth, apply and roll back.

import { call, get } from "./api.js";
import { Bars } from "./charts.js";
import { ask, by, h, outcome, Table, text, tiles } from "./dom.js";
import * as format from "./format.js";

export function placementView(app) {
  const slots = new Bars(by("slots"), "Replica slots of each rank");
  const replicas = replicasTable("replicas", "No resident replica: every expert stands on its home rank alone.");
  let suggestion = null;

  async function load() {
    const placement = (await get("v1/placement", { engine: app.engine })).data.find((one) => one.engine === app.engine);
    if (!placement) return;
    tiles(by("placement-tiles"), figures(placement));
    slots.update({
      fills: [{ name: "used", values: placement.used_slots, colour: "used" }],
      frames: [{ name: "room", values: placement.used_slots.map(() => placement.slots_per_rank), colour: "muted" }],
      problem: placement.slots_per_rank ? null : "No room for resident replicas: start the engine with replica_slots_per_rank.",
    });
    replicas.update(placement.replicas);
    const { problem } = placement;
    by("suggest-problem").hidden = !problem || suggestion?.with_room;
    text(by("suggest-problem"), problem && `${format.sentence(problem)} Ask for a suggestion to see what slots would bring.`);
    text(by("replicas-count"), placement.replicas.length ? format.count(placement.replicas.length) : "");
    by("placement-rollback").disabled = false;
  }

  async function suggest() {
    await guarded(async () => {
      suggestion = await call("POST", "v1/placement/suggest", { query: { engine: app.engine } });
      by("suggestion").replaceChildren(suggestionCard(suggestion));
      if (suggestion.with_room) by("suggest-problem").hidden = true;
      by("placement-apply").disabled = !suggestion.added.length && !suggestion.dropped.length;
      by("placement-outcome").replaceChildren();
    });
  }

  async function apply() {
    const { added, dropped, replicas: wanted, is_worth_it: isWorthIt, reason } = suggestion;
    const words = h("p", {}, `${format.plural(added.length, "copy").replace("copys", "copies")} more, ${dropped.length} fewer; ${format.bytes(suggestion.move_bytes)} move between steps.`);
    const doubt = isWorthIt ? null : h("p", { class: "warn-text" }, `The scheduler would not do it: ${reason}`);
    if (!(await ask("Apply this placement?", [words, doubt].filter(Boolean), "Apply"))) return;
    await guarded(async () => {
      const body = { engine: app.engine, reason: by("placement-reason").value, replicas: wanted.map(({ layer, expert, rank }) => ({ layer, expert, rank })) };
      const placement = await call("POST", "v1/placement/apply", { body });
      outcome(by("placement-outcome"), "good", `Ordered with revision ${placement.number}: copies are filled between steps, then switched on at one step.`);
      clear();
      app.refresh("placement", "engines");
    });
  }

  async function rollback() {
    if (!(await ask("Roll the placement back?", h("p", {}, "The placement before this one is ordered again; copies that it does not have are dropped at once."), "Roll back"))) return;
    await guarded(async () => {
      const placement = await call("POST", "v1/placement/rollback", { body: { engine: app.engine, reason: by("placement-reason").value } });
      const words = placement.replicas.length ? `ordered again with revision ${placement.number}` : "no resident replicas";
      outcome(by("placement-outcome"), "good", `Went back to the placement before: ${words}.`);
      clear();
      app.refresh("placement", "engines");
    });
  }

  async function guarded(run) {
    by("suggest").disabled = true;
    try {
      await run();
    } catch (error) {
      if (error.status === 401 || error.status === 403) app.failed(error);
      outcome(by("placement-outcome"), "bad", error.message);
    } finally {
      by("suggest").disabled = false;
    }
  }

  function clear() {
    suggestion = null;
    by("placement-apply").disabled = true;
    by("placement-reason").value = "";
    by("suggestion").replaceChildren();
  }

  by("suggest").addEventListener("click", suggest);
  by("placement-apply").addEventListener("click", apply);
  by("placement-rollback").addEventListener("click", rollback);
  return {
    tasks: [{ name: "placement", every: 3, run: load, place: "replicas" }],
    onSelect: () => {
      clear();
      by("placement-outcome").replaceChildren();
    },
  };
}

function figures(placement) {
  const total = placement.replicas.length;
  const state = { none: "home ranks only", ordered: "ordered", filling: `${placement.filled} of ${total} copies filled`, live: "live" }[placement.state] ?? placement.state;
  const used = placement.used_slots.reduce((sum, value) => sum + value, 0);
  return [
    { name: "Placement", value: state, note: placement.number ? `ordered with revision ${placement.number}, live ${placement.live_number || "none"}` : "" },
    { name: "Setting replicas", value: placement.replicas_setting, note: { off: "never suggested by itself", suggest: "suggested, not applied", apply: "applied when worth it" }[placement.replicas_setting] },
    { name: "Slots used", value: `${used} of ${placement.slots_per_rank * placement.used_slots.length}`, note: placement.slots_per_rank ? `${format.bytes(placement.bytes_per_slot)} each` : "no room was reserved at start" },
  ];
}

function suggestionCard(suggestion) {
  const isSame = !suggestion.added.length && !suggestion.dropped.length;
  if (isSame && suggestion.with_room) return roomCard(suggestion);
  if (isSame) return h("div", { class: "advice" }, h("h3", {}, "No change"), h("p", {}, suggestion.reason));
  const rows = [
    ["Imbalance, forecast", `${format.ratio(suggestion.imbalance_ratio_before)} → ${format.ratio(suggestion.imbalance_ratio_after)}`],
    ["Moves", `${format.bytes(suggestion.move_bytes)} in ${format.seconds(suggestion.move_s)}`],
    ["Saves", `${format.seconds(suggestion.saving_s)} over ${format.seconds(suggestion.horizon_s)}`],
    ["Copies", `${suggestion.added.length} more, ${suggestion.dropped.length} fewer, ${suggestion.replicas.length} in all`],
  ];
  const list = (name, replicas) => replicas.length > 0 && h("details", {}, h("summary", {}, `${name} (${replicas.length})`), h("ul", { class: "plain few" }, ...replicas.map(({ layer, expert, rank }) => h("li", {}, `layer ${layer}, expert ${expert} on rank ${rank}`))));
  return h(
    "div",
    { class: "advice", "data-tone": suggestion.is_worth_it ? "good" : "warn" },
    h("h3", {}, suggestion.is_worth_it ? "Worth it" : "Not worth it"),
    h("p", {}, suggestion.reason),
    figuresOf(rows),
    list("Added", suggestion.added),
    list("Dropped", suggestion.dropped),
  );
}

/** What an engine without slots would gain by some. */
function roomCard({ reason, horizon_s: horizon, with_room: room }) {
  const rows = [
    ["Slots", `${room.slots_per_rank} on each rank, ${format.bytes(room.bytes_per_rank)}`],
    ["Copies", String(room.replicas)],
    ["Imbalance, forecast", `${format.ratio(room.imbalance_ratio_before)} → ${format.ratio(room.imbalance_ratio_after)}`],
    ["Saves", `${format.seconds(room.saving_s)} over ${format.seconds(horizon)}`],
  ];
  return h(
    "div",
    { class: "advice", "data-tone": "warn" },
    h("h3", {}, "No room"),
    h("p", {}, format.sentence(reason)),
    h("p", {}, room.replicas ? `With room it would ${room.is_worth_it ? "" : "not "}be worth it, by the loads of the last minutes:` : "By the loads of the last minutes no copy would surely help: slots would bring nothing."),
    room.replicas > 0 && figuresOf(rows),
  );
}

const figuresOf = (rows) => h("dl", { class: "numbers" }, ...rows.map(([name, value]) => h("div", {}, h("dt", {}, name), h("dd", {}, value))));

function replicasTable(place, none) {
  return new Table(
    by(place),
    [
      { head: "Layer", class: "number", cell: (replica) => String(replica.layer) },
      { head: "Expert", class: "number", cell: (replica) => String(replica.expert) },
      { head: "On rank", class: "number", cell: (replica) => String(replica.rank) },
      { head: "Share of its layer", class: "number", cell: (replica) => format.percent(replica.share) },
    ],
    { key: (replica) => `${replica.layer}/${replica.expert}/${replica.rank}`, none, caption: "Resident replicas" },
  );
}
