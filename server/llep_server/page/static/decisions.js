// What the scheduler decided and why, what it advises, and single plans of the workers.

import { get } from "./api.js";
import { by, h, Table, empty } from "./dom.js";
import * as format from "./format.js";
import { pages } from "./pages.js";

export const VERDICTS = { worth_it: ["Worth it", "good"], not_worth_it: ["Not worth it", "warn"], not_enough_evidence: ["Not enough evidence yet", "info"] };

export function decisionsView(app) {
  const decisions = pages("decisions-more", (query) => get("v1/decisions", { engine: app.engine, ...query }), decisionsTable(), "id");
  const plans = pages("plans-more", (query) => get("v1/plans", { engine: app.engine, ...query }), plansTable(openPlan), "id");

  async function loadAdvice() {
    const { data } = await get("v1/advice", { engine: app.engine });
    const version = JSON.stringify(data);
    if (by("advice").dataset.version === version) return;
    by("advice").dataset.version = version;
    by("advice").replaceChildren(...(data.length ? data.map(adviceCard) : [empty("No advice yet: it needs some minutes of loads under traffic.")]));
  }

  function adviceCard(advice) {
    const [words, tone] = VERDICTS[advice.verdict] ?? [advice.verdict, "info"];
    const numbers = Object.entries(advice.numbers).filter(([, value]) => value !== null);
    const patch = Object.keys(advice.patch).length;
    return h(
      "div",
      { class: "advice", "data-tone": tone },
      h("h3", {}, words),
      h("p", {}, advice.reason),
      numbers.length > 0 && h("dl", { class: "numbers" }, ...numbers.map(([name, value]) => h("div", {}, h("dt", {}, format.decision(name.replace(/_s$/, ""))), h("dd", {}, numberOf(name, value))))),
      patch > 0 && h("div", { class: "actions" }, h("code", {}, Object.entries(advice.patch).map(([key, value]) => `${key}=${value}`).join(" ")), h("button", { type: "button", onclick: () => propose(advice) }, "Look at it in Settings")),
    );
  }

  function propose(advice) {
    app.proposal = { patch: advice.patch, reason: `advice: ${advice.reason}`.slice(0, 500), engine: advice.engine };
    app.open("settings");
  }

  function openPlan(plan) {
    const place = by("plan");
    place.replaceChildren(planDetail(plan, () => (place.hidden = true)));
    place.hidden = false;
    place.scrollIntoView({ block: "nearest" });
    place.querySelector("h3").focus();
  }

  return {
    tasks: [
      { name: "advice", every: 10, run: loadAdvice, place: "advice" },
      { name: "decisions", every: 5, run: decisions.load, place: "decisions" },
      { name: "plans", every: 5, run: plans.load, place: "plans" },
    ],
    onSelect: () => {
      decisions.clear();
      plans.clear();
      by("plan").hidden = true;
      delete by("advice").dataset.version;
    },
  };
}

function numberOf(name, value) {
  if (/imbalance/.test(name)) return format.ratio(value);
  if (/_s$|seconds/.test(name)) return format.seconds(value);
  if (/_bytes$/.test(name)) return format.bytes(value);
  if (/share|error|_ratio$/.test(name) && value < 1) return format.percent(value);
  return format.count(value);
}

function decisionsTable() {
  return new Table(
    by("decisions"),
    [
      { head: "When", cell: (one) => format.clock(one.time_s), title: (one) => new Date(one.time_s * 1000).toISOString() },
      { head: "About", cell: (one) => one.kind },
      { head: "Outcome", cell: (one) => format.decision(one.outcome) },
      { head: "Reason", class: "long", version: (one) => one.id, cell: reasonWithInputs },
      { head: "Expected gain", class: "number", cell: (one) => format.percent(one.expected_gain_ratio) },
      { head: "Revision", class: "number", cell: (one) => (one.revision === null ? "none" : String(one.revision)) },
    ],
    { key: (one) => one.id, none: "The scheduler has decided nothing about this engine yet. It looks at windows of loads every few seconds once there is traffic.", caption: "Decisions of the scheduler" },
  );
}

function reasonWithInputs(decision) {
  if (!Object.keys(decision.inputs).length) return h("span", {}, decision.reason);
  return h("details", {}, h("summary", {}, decision.reason), h("pre", {}, JSON.stringify(decision.inputs, null, 1)));
}

function plansTable(open) {
  return new Table(
    by("plans"),
    [
      { head: "Step", class: "name", version: (plan) => plan.id, cell: (plan) => h("button", { type: "button", class: "link-button", onclick: () => open(plan) }, String(plan.step)) },
      { head: "When", cell: (plan) => format.clock(plan.time_s) },
      { head: "Layer", class: "number", cell: (plan) => String(plan.layer) },
      { head: "Phase", cell: (plan) => plan.phase },
      { head: "Decision", cell: (plan) => format.decision(plan.decision) },
      { head: "Tokens", class: "number", cell: (plan) => format.count(plan.tokens) },
      { head: "Imbalance", class: "number", cell: (plan) => `${format.ratio(plan.imbalance_ratio_before)} → ${format.ratio(plan.imbalance_ratio_after)}` },
      { head: "Lends", class: "number", cell: (plan) => String(plan.lends.length), title: (plan) => format.bytes(plan.lend_bytes) },
      { head: "Predicted gain", class: "number", cell: (plan) => format.seconds(plan.predicted_gain_s) },
      { head: "Layer took", class: "number", cell: (plan) => format.seconds(plan.layer_seconds) },
    ],
    { key: (plan) => plan.id, none: "No plan has been sampled yet: samples come from layers that lend.", caption: "Sampled plans" },
  );
}

function planDetail(plan, close) {
  const top = Math.max(...plan.routed, ...plan.computed, 1);
  const bar = (value, name) => {
    const element = h("span", { class: `rank-bar ${name}`, "aria-hidden": true });
    element.style.inlineSize = `${(value / top) * 100}%`;
    return element;
  };
  const ranks = plan.routed.map((routed, rank) =>
    h("tr", {}, h("th", { scope: "row" }, String(rank)), h("td", { class: "bars" }, bar(routed, "before"), bar(plan.computed[rank], "after")), h("td", { class: "number" }, format.count(routed)), h("td", { class: "number" }, format.count(plan.computed[rank]))),
  );
  const lends = plan.lends.map((lend) => h("li", {}, `expert ${lend.expert}: rank ${lend.src_rank} → rank ${lend.dst_rank}, ${format.count(lend.tokens)} pairs`));
  return h(
    "div",
    {},
    h("div", { class: "actions" }, h("h3", { tabindex: -1 }, `Step ${plan.step}, layer ${plan.layer}: ${format.decision(plan.decision)}`), h("button", { type: "button", class: "quiet", onclick: close }, "Close")),
    h("div", { class: "columns" },
      h("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": "Loads of the ranks under this plan" }, h("table", {}, h("thead", {}, h("tr", {}, ...["Rank", "Loads", "Routed", "Computed"].map((head) => h("th", { scope: "col" }, head)))), h("tbody", {}, ...ranks))),
      h("div", {}, h("h4", {}, `${format.plural(lends.length, "lend")}, ${format.bytes(plan.lend_bytes)}`), lends.length ? h("ul", { class: "plain" }, ...lends) : empty("Nothing was lent.")),
    ),
  );
}
