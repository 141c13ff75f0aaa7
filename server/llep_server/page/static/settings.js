// Mode and settings: look, change with a dry run first, try in shadow, apply with a reason, go back.

import { call, get } from "./api.js";
import { ask, by, diffTable, h, outcome, Table, text } from "./dom.js";
import * as format from "./format.js";
import { pages } from "./pages.js";

export function settingsView(app) {
  const rows = [...by("settings-rows").rows].map((row) => new Row(row, changed));
  const history = pages("revisions-more", (query) => get("v1/settings/revisions", query), revisionsTable(goBack), "number");
  let revision = null;
  let checked = ""; // the patch that a dry run has shown, as text

  async function loadSettings() {
    const view = await get("v1/settings", { engine: app.engine });
    revision = view.revision;
    const values = new Map(view.settings.map((setting) => [setting.key, setting]));
    for (const row of rows) if (values.has(row.key)) row.show(values.get(row.key));
    takeProposal();
    const engine = app.current();
    text(by("settings-revision"), engine ? `revision ${revision}; ${whereItIs(engine)}` : `revision ${revision}`);
    text(by("mode-now"), modeWords(values.get("mode"), engine));
    changed();
  }

  /** What the decisions view or a tuning run proposes, filled in to be looked at. */
  function takeProposal() {
    if (!app.proposal) return;
    const { patch, reason, engine } = app.proposal;
    app.proposal = null;
    for (const row of rows) if (row.key in patch) row.propose(patch[row.key]);
    by("settings-reason").value = reason;
    if (engine) by("settings-whom").value = "one";
    check();
  }

  const patch = () => Object.fromEntries(rows.filter((row) => row.isEdited).map((row) => [row.key, row.wanted]));
  const whom = (select) => (by(select).value === "one" && app.engine ? [app.engine] : undefined);

  function changed() {
    const wanted = patch();
    const number = Object.keys(wanted).length;
    const isValid = rows.every((row) => !row.isEdited || row.input.checkValidity());
    text(by("change-count"), number ? `${format.plural(number, "change")}${isValid ? "" : ", not valid yet"}` : "Nothing changed");
    by("change-bar").dataset.open = number ? "yes" : "no";
    for (const id of ["settings-check", "settings-apply", "settings-try"]) by(id).disabled = !number || !isValid;
    by("settings-try").disabled ||= "mode" in wanted;
    by("settings-reset").disabled = !number;
    if (checked && checked !== JSON.stringify(wanted)) {
      checked = "";
      by("settings-outcome").replaceChildren();
    }
  }

  function send(wanted, { dryRun, reason = by("settings-reason").value }) {
    const query = { dry_run: dryRun || undefined, reason, engines: whom("settings-whom") };
    return call("PATCH", "v1/settings", { query, body: wanted, headers: revision === null ? {} : { "If-Match": `"${revision}"` } });
  }

  async function check(event) {
    event?.preventDefault();
    const wanted = patch();
    await guarded("settings-outcome", async () => {
      const change = await send(wanted, { dryRun: true });
      checked = JSON.stringify(wanted);
      const whose = change.engines ? change.engines.join(", ") : "all engines, also those to come";
      const isSame = !Object.keys(change.diff).length;
      outcome(by("settings-outcome"), "info", h("p", {}, isSame ? "This is what holds already: applying it changes nothing." : `Dry run: nothing has changed yet. On ${whose}:`), isSame ? "" : diffTable(change.diff, format.setting));
    });
  }

  async function apply() {
    await guarded("settings-outcome", async () => {
      const change = await send(patch(), { dryRun: false });
      done("settings-outcome", change);
    });
  }

  async function tryInShadow() {
    const wanted = { ...patch(), mode: "shadow" };
    await guarded("settings-outcome", async () => {
      const reason = `trial in shadow${by("settings-reason").value && `: ${by("settings-reason").value}`}`;
      done("settings-outcome", await send(wanted, { dryRun: false, reason }));
    });
  }

  function done(place, change) {
    rows.forEach((row) => row.forget());
    by("settings-reason").value = "";
    checked = "";
    revision = change.revision;
    outcome(by(place), "good", h("p", {}, `Revision ${change.revision}. ${appliedWords(change)}`), diffTable(change.diff, format.setting));
    app.refresh("settings", "revisions", "engines");
    watch(place, change);
  }

  /** Says where a revision has got to, until it is live everywhere or a minute is over. */
  function watch(place, change) {
    const line = by(place).querySelector("p");
    const started = Date.now();
    const timer = setInterval(() => {
      const addressed = app.engines.filter((engine) => !change.engines || change.engines.includes(engine.id));
      const waiting = addressed.filter((engine) => engine.live_revision < change.revision && engine.desired_revision >= change.revision);
      if (!line.isConnected || Date.now() - started > 60000) return clearInterval(timer);
      if (waiting.length) return text(line, `Revision ${change.revision} is on its way to ${waiting.map((engine) => engine.id).slice(0, 5).join(", ")}.`);
      clearInterval(timer);
      const since = addressed.length === 1 ? ` since step ${addressed[0].live_since_step}` : "";
      if (addressed.length) text(line, `Revision ${change.revision} is live on ${addressed.length === 1 ? addressed[0].id : `all ${addressed.length} engines`}${since}.`);
    }, 500);
  }

  async function switchMode(event) {
    event.preventDefault();
    const ttl = Number(by("mode-ttl").value);
    await guarded("mode-outcome", async () => {
      const query = { reason: by("mode-reason").value, engines: whom("mode-whom") };
      const change = await call("PUT", "v1/mode", { query, body: { mode: by("mode-to").value, ...(ttl ? { ttl_s: ttl } : {}) } });
      const back = change.reverts_at_s ? ` It goes back by itself at ${format.clock(change.reverts_at_s)}.` : "";
      const isSame = !Object.keys(change.diff).length;
      outcome(by("mode-outcome"), "good", h("p", {}, isSame ? `That mode holds already.${back}` : `Revision ${change.revision}: mode ${by("mode-to").value}. ${appliedWords(change)}${back}`));
      by("mode-reason").value = "";
      app.refresh("settings", "revisions", "engines");
    });
  }

  async function goBack(to, reason = "") {
    await guarded("settings-outcome", async () => {
      const { diff } = await rollback(to, reason, true);
      if (!Object.keys(diff).length) return outcome(by("settings-outcome"), "info", h("p", {}, `Revision ${to} holds the same settings as now: there is nothing to go back to.`));
      const why = h("input", { type: "text", maxlength: 500, value: reason, autocomplete: "off" });
      const isSure = await ask(`Go back to revision ${to}?`, [diffTable(diff, format.setting), h("label", {}, "Reason ", why)], "Roll back");
      if (!isSure) return;
      done("settings-outcome", await rollback(to, why.value, false));
      by("settings-outcome").scrollIntoView({ block: "nearest" });
    });
  }

  function rollback(to, reason, isDry) {
    return call("POST", "v1/settings/rollback", { body: { revision: to, reason, dry_run: isDry } });
  }

  async function loadRevisions() {
    const data = await history.load();
    showTrial(data);
  }

  /** A trial is a newest revision that set mode shadow together with other keys. */
  function showTrial([newest, before]) {
    const { mode, ...others } = newest?.patch ?? {};
    const isTrial = mode === "shadow" && Object.keys(others).length > 0 && newest.reason.startsWith("trial in shadow");
    by("trial").hidden = !isTrial;
    if (!isTrial) return;
    text(by("trial-text"), `Revision ${newest.number} runs in shadow: plans are made with ${Object.entries(others).map(([key, value]) => `${key}=${format.setting(value)}`).join(", ")}, nothing is moved. Compare imbalance and decisions in the live view, then keep it or go back.`);
    by("trial-keep").onclick = () => keepTrial(newest);
    by("trial-back").onclick = () => goBack(before?.number ?? 0, "trial in shadow ended");
  }

  async function keepTrial(trial) {
    await guarded("settings-outcome", async () => {
      const was = trial.diff.mode?.[0];
      const mode = typeof was === "string" ? was : "active";
      const query = { reason: `trial of revision ${trial.number} kept`, engines: trial.engines ?? undefined };
      done("settings-outcome", await call("PATCH", "v1/settings", { query, body: { mode } }));
    });
  }

  async function guarded(place, run) {
    const buttons = [...by(place).closest(".panel").querySelectorAll("button")].filter((button) => !button.disabled);
    buttons.forEach((button) => (button.disabled = true));
    try {
      await run();
    } catch (error) {
      if (error.status === 401) app.failed(error);
      if (error.status === 403) app.failed(error);
      if (error.status === 412) app.refresh("settings", "revisions");
      const more = error.status === 412 ? " The values here are being read again; check once more." : "";
      outcome(by(place), "bad", h("p", {}, `${error.message}.${more}`.replace("..", ".")));
    } finally {
      buttons.forEach((button) => (button.disabled = false));
      changed();
    }
  }

  by("settings-form").addEventListener("submit", check);
  by("settings-apply").addEventListener("click", apply);
  by("settings-try").addEventListener("click", tryInShadow);
  by("settings-reset").addEventListener("click", () => {
    rows.forEach((row) => row.forget());
    changed();
  });
  by("mode-form").addEventListener("submit", switchMode);

  return {
    tasks: [
      { name: "settings", every: 3, run: loadSettings, place: "settings-rows" },
      { name: "revisions", every: 4, run: loadRevisions, place: "revisions" },
    ],
    onSelect: () => {
      rows.forEach((row) => row.forget());
      by("settings-outcome").replaceChildren();
      by("mode-outcome").replaceChildren();
    },
  };
}

/** One setting: what holds, and what somebody has typed but not applied. */
class Row {
  constructor(element, changed) {
    this.element = element;
    this.input = element.querySelector("[data-key]");
    this.key = this.input.dataset.key;
    this.source = element.querySelector(".source");
    this.held = undefined;
    this.isReset = false;
    this.changed = changed;
    this.input.addEventListener("input", () => {
      this.isReset = false;
      this.mark();
      changed();
    });
  }

  get isEdited() {
    return !this.input.disabled && this.held !== undefined && (this.isReset || this.input.value !== this.held);
  }

  get wanted() {
    if (this.isReset) return null;
    if (this.input.dataset.type === "boolean") return this.input.value === "true";
    if (this.input.dataset.type === "number") return this.input.value === "" ? "" : Number(this.input.value);
    return this.input.value;
  }

  show(setting) {
    const isEdited = this.isEdited;
    const value = typeof setting.value === "object" ? JSON.stringify(setting.value) : String(setting.value);
    this.held = value;
    if (!isEdited) this.input.value = value;
    if (this.source.dataset.from !== setting.source) {
      this.source.dataset.from = setting.source;
      const canReset = setting.hot && setting.source.startsWith("revision");
      this.source.replaceChildren(setting.source, canReset ? this.resetButton() : "");
    }
    this.mark();
  }

  resetButton() {
    const put = () => {
      this.isReset = !this.isReset;
      this.mark();
      this.changed();
    };
    return h("button", { type: "button", class: "quiet small", onclick: put, title: `put ${this.key} back to what it was at the engine's start` }, "reset");
  }

  propose(value) {
    this.isReset = value === null;
    if (value !== null) this.input.value = String(value);
    this.mark();
  }

  forget() {
    this.isReset = false;
    if (this.held !== undefined) this.input.value = this.held;
    this.mark();
  }

  mark() {
    this.element.dataset.edited = this.isReset ? "reset" : this.isEdited ? "yes" : "no";
    this.element.dataset.valid = this.input.checkValidity() ? "yes" : "no";
  }
}

function appliedWords({ applied, engines }) {
  if (!applied.length) return engines ? "It is kept for when they come." : "No engine is here: those that come take it.";
  return `${applied.map(({ engine, state, step }) => `${engine}: ${state}${state === "live" && step !== null ? ` since step ${step}` : ""}`).slice(0, 6).join(", ")}.`;
}

function whereItIs(engine) {
  if (engine.live_revision >= engine.desired_revision) return `${engine.id} runs under ${engine.live_revision} since step ${engine.live_since_step}`;
  return `${engine.id} runs under ${engine.live_revision}, ${engine.desired_revision} is on its way`;
}

function modeWords(mode, engine) {
  if (!mode) return "";
  const live = engine && engine.mode !== mode.value ? `; ${engine.id} still runs ${engine.mode}` : "";
  return `now ${mode.value}, from ${mode.source}${live}`;
}

function revisionsTable(goBack) {
  return new Table(
    by("revisions"),
    [
      { head: "Revision", class: "number", cell: (one) => String(one.number) },
      { head: "When", cell: (one) => format.clock(one.time_s), title: (one) => new Date(one.time_s * 1000).toISOString() },
      { head: "Who", cell: (one) => one.author },
      { head: "On", cell: (one) => (one.engines ? one.engines.join(", ") : "all") },
      { head: "Change", class: "long", version: (one) => one.number, cell: changeList },
      { head: "Reason", class: "long", cell: (one) => one.reason || "none given" },
      { head: "Go back", isSilent: true, version: (one) => one.number, cell: (one) => h("button", { type: "button", class: "small", onclick: () => goBack(one.number), "aria-label": `Roll back to revision ${one.number}` }, "Roll back") },
    ],
    { key: (one) => one.number, none: "No change yet: every engine runs on the settings it was started with.", caption: "Revisions" },
  );
}

function changeList(revision) {
  const entries = Object.entries(revision.diff);
  if (!entries.length) return h("span", { class: "muted" }, Object.keys(revision.patch).join(", ") || "no difference");
  return h("ul", { class: "plain" }, ...entries.map(([key, [before, after]]) => h("li", {}, `${key}: ${format.setting(before)} → ${format.setting(after)}`)));
}
