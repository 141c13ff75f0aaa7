// The control plane's time: the browser's clock may be off by more than a chart shows.

let ahead_s = null; // of this clock; an answer's Date is cut to a second and has travelled, so the most is nearest

/** Learn from an answer what time it is there. */
export function heard(response) {
  const found = Date.parse(response.headers.get("Date")) / 1000 - Date.now() / 1000;
  if (Number.isNaN(found)) return;
  const isSet = ahead_s !== null && Math.abs(found - ahead_s) > 30; // somebody has set a clock meanwhile
  ahead_s = ahead_s === null || isSet ? found : Math.max(ahead_s, found);
}

export const now = () => Date.now() / 1000 + (ahead_s ?? 0);
