// Numbers, times and sizes as people read them.

import { now } from "./clock.js";

const EMPTY = "–";

/** 1234567 -> "1.23M". Three digits, never more. */
export function count(value) {
  if (value === null || value === undefined || Number.isNaN(value)) return EMPTY;
  const size = Math.abs(value);
  if (size < 1000) return Number.isInteger(value) ? String(value) : digits(value);
  const power = Math.min(Math.floor(Math.log10(size) / 3), 5);
  return digits(value / 1000 ** power) + ["", "k", "M", "G", "T", "P"][power];
}

export function bytes(value) {
  if (value === null || value === undefined) return EMPTY;
  if (value < 1024) return `${Math.round(value)} B`;
  const power = Math.min(Math.floor(Math.log2(value) / 10), 5);
  return `${digits(value / 1024 ** power)} ${["", "KiB", "MiB", "GiB", "TiB", "PiB"][power]}`;
}

/** An imbalance ratio or a load against the fair share. */
export function ratio(value) {
  if (value === null || value === undefined) return EMPTY;
  return value >= 100 ? count(Math.round(value)) : value >= 10 ? value.toFixed(1) : value.toFixed(2);
}

export function percent(share) {
  if (share === null || share === undefined || !Number.isFinite(share)) return EMPTY;
  const value = share * 100;
  return `${Math.abs(value) >= 10 || value === 0 ? Math.round(value) : value.toFixed(1)} %`;
}

/** A length of time: "420 µs", "3.2 s", "4 min", "2.5 h". */
export function seconds(value) {
  if (value === null || value === undefined) return EMPTY;
  const size = Math.abs(value);
  if (size === 0) return "0 s";
  if (size < 1e-3) return `${digits(value * 1e6)} µs`;
  if (size < 1) return `${digits(value * 1e3)} ms`;
  if (size < 120) return `${digits(value)} s`;
  if (size < 7200) return `${Math.round(value / 60)} min`;
  return size < 172800 ? `${digits(value / 3600)} h` : `${Math.round(value / 86400)} d`;
}

export function ago(time_s, now_s = now()) {
  const past = now_s - time_s;
  if (past < 1.5) return "now";
  return `${past < 120 ? `${Math.round(past)} s` : seconds(past)} ago`;
}

/** Clock time; with the date where it isn't today's. */
export function clock(time_s) {
  const then = new Date(time_s * 1000);
  const time = then.toLocaleTimeString([], { hour: "2-digit", minute: "2-digit", second: "2-digit", hourCycle: "h23" });
  return then.toDateString() === new Date().toDateString() ? time : `${isoDate(then)} ${time}`;
}

/** A setting's value, or a mapping from engine to value, in words. */
export function setting(value) {
  if (value === null || value === undefined) return "as at start";
  if (typeof value !== "object") return String(value);
  return Object.entries(value).map(([engine, own]) => `${engine}: ${setting(own)}`).join(", ");
}

export function decision(name) {
  return name.replaceAll("_", " ");
}

export function sentence(words) {
  return `${words[0].toUpperCase()}${words.slice(1)}${words.endsWith(".") ? "" : "."}`;
}

export function plural(number, word) {
  return `${count(number)} ${word}${number === 1 ? "" : "s"}`;
}

function digits(value) {
  const size = Math.abs(value);
  return size >= 99.95 ? value.toFixed(0) : size >= 9.995 ? trimmed(value, 1) : trimmed(value, 2);
}

function trimmed(value, places) {
  return String(Number(value.toFixed(places)));
}

function isoDate(date) {
  const two = (number) => String(number).padStart(2, "0");
  return `${date.getFullYear()}-${two(date.getMonth() + 1)}-${two(date.getDate())}`;
}
