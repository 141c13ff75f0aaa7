// The control plane's API: the key, one call, one event stream.

import { heard } from "./clock.js";

const KEY = "llep-key";
const TIMEOUT_MS = 15000;

export const key = {
  get: () => sessionStorage.getItem(KEY),
  set: (value) => sessionStorage.setItem(KEY, value),
  forget: () => sessionStorage.removeItem(KEY),
  isNeeded: document.documentElement.dataset.needsKey === "yes",
};

/** A failure in the server's own words. status 0: no answer at all. */
export class ApiError extends Error {
  constructor(status, message, code = "", requestId = "") {
    super(message);
    Object.assign(this, { status, code, requestId });
  }
}

/** An answer's JSON. query: undefined members are left out, arrays repeat. */
export async function call(method, path, { query = {}, body, headers = {}, signal } = {}) {
  const response = await request(method, path, { query, body, headers, signal });
  if (response.status === 204) return null;
  const answer = await response.json().catch(() => {
    throw new ApiError(0, "the control plane's answer broke off");
  });
  return answer;
}

export const get = (path, query = {}) => call("GET", path, { query });

/** The response itself, for downloads and streams. Raises ApiError for everything but success. */
export async function request(method, path, { query = {}, body, headers = {}, signal, timeoutMs = TIMEOUT_MS } = {}) {
  const limit = timeoutMs ? [AbortSignal.timeout(timeoutMs)] : [];
  const signals = signal ? [signal, ...limit] : limit;
  let response;
  try {
    response = await fetch(path + queryOf(query), {
      method,
      headers: { ...authorization(), ...(body === undefined ? {} : { "Content-Type": "application/json" }), ...headers },
      body: body === undefined ? undefined : JSON.stringify(body),
      signal: signals.length ? AbortSignal.any(signals) : undefined,
      cache: "no-store",
    });
  } catch (error) {
    if (signal?.aborted) throw error;
    const late = error.name === "TimeoutError";
    throw new ApiError(0, late ? `no answer from the control plane within ${timeoutMs / 1000} s` : "no answer from the control plane");
  }
  heard(response);
  if (!response.ok) throw await problemOf(response);
  return response;
}

/** Lets the browser store what `path` answers. With a key it can't be a plain link, so it goes through memory. */
export async function download(path, query, name) {
  const link = document.createElement("a");
  link.download = name;
  if (key.get()) {
    const response = await request("GET", path, { query, timeoutMs: 0 });
    link.href = URL.createObjectURL(await response.blob());
    setTimeout(() => URL.revokeObjectURL(link.href), 60000);
  } else {
    link.href = path + queryOf(query);
  }
  link.click();
}

/**
 * Follow a stream of server-sent events until `signal` is aborted or it ends. EventSource can't send a key, so this
 * reads the response itself. onEvent({id, event, data}) with data parsed; returns the last id. Silence of `quietMs`
 * counts as an end: a dead connection looks like that.
 */
export async function follow(path, query, { lastId, signal, onOpen, onEvent, quietMs = 45000 }) {
  const quiet = new AbortController();
  let timer = setTimeout(() => quiet.abort(), quietMs);
  const headers = { Accept: "text/event-stream", ...(lastId ? { "Last-Event-ID": lastId } : {}) };
  try {
    const response = await request("GET", path, { query, headers, signal: AbortSignal.any([signal, quiet.signal]), timeoutMs: 0 });
    onOpen();
    const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
    let rest = "";
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return lastId;
      clearTimeout(timer);
      timer = setTimeout(() => quiet.abort(), quietMs);
      const blocks = (rest + value).replaceAll("\r\n", "\n").split("\n\n");
      rest = blocks.pop();
      for (const block of blocks) {
        const event = parseEvent(block);
        lastId = event.id ?? lastId;
        if (event.data !== undefined) onEvent(event);
      }
    }
  } finally {
    clearTimeout(timer);
  }
}

function parseEvent(block) {
  const event = { event: "message" };
  const data = [];
  for (const line of block.split("\n")) {
    const [, name, value] = /^([^:]*):? ?(.*)$/.exec(line);
    if (name === "data") data.push(value);
    else if (name === "id" || name === "event") event[name] = value;
  }
  if (data.length) event.data = JSON.parse(data.join("\n"));
  return event;
}

function authorization() {
  const value = key.get();
  return value ? { Authorization: `Bearer ${value}` } : {};
}

function queryOf(query) {
  const parameters = new URLSearchParams();
  for (const [name, value] of Object.entries(query)) {
    for (const one of [value].flat()) if (one !== undefined && one !== null && one !== "") parameters.append(name, one);
  }
  const words = parameters.toString();
  return words && `?${words}`;
}

async function problemOf(response) {
  const body = await response.json().catch(() => ({}));
  const { message = `the control plane answered ${response.status}`, code = "" } = body.error ?? {};
  return new ApiError(response.status, message, code, body.request_id ?? "");
}
